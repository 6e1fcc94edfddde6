"""Train any backbone of the library on digits among clutter, in a loop of Accelerate.

    python examples/vision/train.py --out run
    python examples/vision/train.py --out run --model nat_mini --set depths=1,1 --set embed_dim=32 --set num_heads=2,4
    accelerate launch examples/vision/train.py --out run --mechanism halonet

``--set`` gives settings of the family's constructor, ``--mechanism`` one of the registry that takes the place of the
model's own in every block. Started again with the same ``--out``, training goes on from the last checkpoint; at the end
``--out`` holds ``model.safetensors``, which ``create_model(..., pretrained=PATH)`` loads, and ``result.json``.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import save_file

import attnlib
from attnlib.bench.data.worlds import cluttered_digits

SMALL = {"embed_dims": (32, 64), "depths": (1, 1), "num_heads": (2, 4), "group_size": 4, "interval": (2, 1),
         "patch_sizes": (2, 4), "mlp_ratio": 2.0, "drop_path_rate": 0.0}  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, weights and the result")
    parser.add_argument("--model", default="crossformer_tiny", help="one of `attnlib models`; a small one by default")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="setting of the model")
    parser.add_argument("--mechanism", help="registry name of what stands in the blocks")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--side", type=int, default=32, help="pixels per side of the images")
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def settings_of(given: Sequence[str]) -> dict[str, Any]:
    """``["depths=1,1", "pad=mask"]`` -> ``{"depths": (1, 1), "pad": "mask"}``."""
    out: dict[str, Any] = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise SystemExit(f"--set {pair}: write NAME=VALUE")
        try:
            out[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            out[name] = value
    return out


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, and return what ``result.json`` holds."""
    args = parse(arguments)
    set_seed(args.seed)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    small = SMALL if args.model == "crossformer_tiny" and not args.set else {}
    model = attnlib.create_model(
        args.model, num_classes=10, in_chans=1, img_size=args.side, mechanism=args.mechanism,
        **{**small, **settings_of(args.set)},
    )  # fmt: skip
    decayed = model.no_weight_decay()
    groups = [
        {"params": [p for n, p in model.named_parameters() if (n in decayed or p.dim() < 2) == bare],
         "weight_decay": 0.0 if bare else 0.05} for bare in (True, False)
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps + 1, pct_start=0.1)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    folder, taken = args.out / "checkpoint", 0
    if (folder / "taken.json").exists():
        accelerator.load_state(str(folder))
        taken = json.loads((folder / "taken.json").read_text())["steps"]
        accelerator.print(f"going on from step {taken}")
    generator = torch.Generator().manual_seed(args.seed + 7919 * accelerator.process_index)
    for _ in range(taken):  # what was seen before is not seen again
        cluttered_digits(args.batch, args.side, generator=generator)
    while taken < args.steps:
        model.train()
        images, labels = cluttered_digits(args.batch, args.side, generator=generator)
        loss = F.cross_entropy(model(images.to(accelerator.device)), labels.to(accelerator.device))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        taken += 1
        if taken % args.save_every == 0 or taken == args.steps:
            accelerator.print(f"step {taken} of {args.steps}: loss {float(loss.detach()):.3f}")
            accelerator.save_state(str(folder))
            if accelerator.is_main_process:
                (folder / "taken.json").write_text(json.dumps({"steps": taken}))
    plain = accelerator.unwrap_model(model).eval()
    images, labels = cluttered_digits(512, args.side, "test", generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        guesses = torch.cat([plain(part.to(accelerator.device)).argmax(-1).cpu() for part in images.split(64)])
    result = {"model": args.model, "steps": taken, "accuracy": 100 * float((guesses == labels).float().mean())}
    if accelerator.is_main_process:
        save_file({k: v.contiguous().cpu() for k, v in plain.state_dict().items()}, args.out / "model.safetensors")
        (args.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    accelerator.print(f"accuracy on digits that were not trained on: {result['accuracy']:.1f} %")
    return result


if __name__ == "__main__":
    main()
