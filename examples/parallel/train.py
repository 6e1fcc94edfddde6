"""Train a small language model on sequences that several processes share.

    torchrun --nproc-per-node 2 examples/parallel/train.py --length 4096

Each process reads its own chunk of every sequence. Linear layers send states, softmax layers keys and values; what went
over the wire is printed at the end. With ``--sequence 2`` of 4 processes, two pairs read different sequences.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from attnlib import parallel
from attnlib.models.language import DecoderConfig, DecoderForCausalLM


def text() -> torch.Tensor:
    """Bytes of prose that comes with Python."""
    import pydoc_data.topics

    return torch.tensor(list(Path(pydoc_data.topics.__file__).read_bytes()), dtype=torch.long)


def main(arguments: list[str]) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=4096, help="tokens of a whole sequence")
    parser.add_argument("--sequence", type=int, default=0, help="processes that share a sequence; all by default")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", nargs="+", default=["lightning-attention-2", "softmax-attention"])
    given = parser.parse_args(arguments)
    mesh = parallel.mesh(given.sequence or dist.get_world_size())
    group, replicas = parallel.Group(mesh["sequence"]), mesh["data"].size()

    torch.manual_seed(0)  # the same weights everywhere
    config = DecoderConfig(
        vocab_size=256, hidden_size=given.width, num_hidden_layers=len(given.layers), num_attention_heads=4,
        mechanisms=given.layers, use_cache=False,
    )  # fmt: skip
    model = DecoderForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    data, losses = text(), []
    for step in range(given.steps):
        # All processes of a sequence draw the same one.
        draw = torch.Generator().manual_seed(step * replicas + mesh.get_local_rank("data"))
        start = int(torch.randint(len(data) - given.length - 1, (1,), generator=draw))
        tokens = data[None, start : start + given.length + 1]
        inputs, targets = parallel.shard(tokens[:, :-1], group), parallel.shard(tokens[:, 1:], group)
        group.traffic.clear()
        with parallel.sequence_parallel(model, given.length, group) as traffic:
            logits = model(inputs).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            loss = loss / (given.length * replicas)
            loss.backward()
        parallel.sum_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total))
        if dist.get_rank() == 0 and step % 5 == 0:
            print(f"step {step}: {losses[-1]:.3f}", flush=True)
    if dist.get_rank() == 0:
        print(traffic.table())
    return {"losses": losses, "traffic": traffic.by_layer()}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(sys.argv[1:])
    dist.destroy_process_group()
