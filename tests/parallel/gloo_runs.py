"""What the tests of parallel sequences run, in one process or in several: ``python gloo_runs.py FOLDER``."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from attnlib import masks, parallel
from attnlib.models.language import DecoderConfig, DecoderForCausalLM
from attnlib.nn.registry import create, find, list_mechanisms
from attnlib.ops import attention, linear_attention

WORLDS = (2, 4)
#: What looks back over tokens that exist.
NO_VALID = {"lolcats", "based-window", "based-conv"}
FIXTURE = Path(__file__).parent.parent / "fixtures" / "lasp2.safetensors"
SLUGS = sorted(slug for slug in list_mechanisms() if find(slug).cuts_sequence)
N, B, H, D, DV = 16, 2, 4, 3, 5


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cut(tensors, axis, whole):
    """The tensors as leaves: whole, or the chunk of this process."""
    if not whole:
        tensors = [t if axis is None else parallel.shard(t, axis=axis) for t in tensors]
    return [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]


# ---- operators: name -> (settings, inputs)

LINEAR = {
    f"{decay}-{'causal' if causal else 'both'}-{normalizer}-{'valid' if valid else 'all'}": (
        decay, causal, normalizer, valid,
    )
    for decay, causal, normalizer, valid in itertools.product(
        ("none", "head", "token", "channel"), (True, False), ("none", "sum", "subtract", "foreign"), (False, True)
    )
    if (decay, normalizer) != ("channel", "foreign") and (valid or normalizer in ("none", "sum"))
}  # fmt: skip
SOFTMAX = {
    "full": dict(),
    "causal": dict(mask=masks.causal()),
    "window": dict(mask=masks.causal() & masks.sliding_window(5)),
    "causal-valid": dict(mask=masks.causal(), valid=True),
    "valid": dict(valid=True),
    "sigmoid": dict(mask=masks.causal(), normalizer="sigmoid"),
    "weights": dict(mask=masks.causal(), return_weights=True),
    "cross": dict(context=8),
}


def exists(n=N):
    """Some tokens of the second and the last quarter are absent, in one sample."""
    valid = torch.ones(B, n, dtype=torch.bool)
    valid[0, n // 4 : n // 4 + 2] = False
    valid[0, -1] = False
    return valid


def linear(name, whole):
    kind, causal, normalizer, some = LINEAR[name]
    q, k = random(B, H, N, D, seed=1).abs(), random(B, H // 2, N, D, seed=2).abs()
    v = random(B, H // 2, N, DV, seed=3)
    shapes = {"head": (H,), "token": (B, H, N), "channel": (B, H, N, D)}
    leaves = cut([q, k, v], 2, whole)
    decay = []
    if kind != "none":
        g = -random(*shapes[kind], seed=4).abs()
        decay = cut([g], None if kind == "head" else 2, whole)
    valid = exists() if some else None
    call = dict(decay=decay[0] if decay else None, causal=causal, normalizer=normalizer, chunk=3)
    if normalizer == "foreign":
        foreign = cut([random(B, H, N, 2, seed=8).abs(), random(B, H // 2, N, 2, seed=9).abs()], 2, whole)
        call |= dict(normalizer="sum", denominator=foreign)
        leaves = [*leaves, *foreign]
    if whole:
        out = linear_attention(*leaves[:3], valid=valid, return_state=True, **call)
    else:
        valid = None if valid is None else parallel.shard(valid)
        out = parallel.linear_attention(*leaves[:3], valid=valid, return_state=True, **call)
    seed = random(B, H, N, DV, seed=5)
    (out.out * (seed if whole else parallel.shard(seed, axis=2))).sum().backward()
    found = {"out": out.out, **{f"state {name}": out.state[name] for name in out.state}}
    found |= {f"d{n}": t.grad for n, t in zip("qkvab", leaves, strict=False)}
    if decay:
        found["dg"] = decay[0].grad
        if kind == "head" and not whole:
            dist.all_reduce(found["dg"])
    return found


def softmax(name, whole):
    settings = dict(SOFTMAX[name])
    m = settings.pop("context", N)
    q, k, v = random(B, H, N, D, seed=1), random(B, H // 2, m, D, seed=2), random(B, H // 2, m, DV, seed=3)
    leaves = cut([q, k, v], 2, whole)
    if settings.pop("valid", False):
        settings["valid"] = exists() if whole else parallel.shard(exists())
    if whole:
        out = attention(*leaves, **settings)
    else:
        out = parallel.attention(*leaves, length=N, context_length=m, **settings)
    found = {}
    if settings.get("return_weights"):
        out, found["weights"] = out
    seed = random(B, H, N, DV, seed=5)
    (out * (seed if whole else parallel.shard(seed, axis=2))).sum().backward()
    return found | {"out": out} | {f"d{n}": t.grad for n, t in zip("qkv", leaves, strict=True)}


# ---- mechanisms and models


def layers():
    """Rows of the table whose mechanisms say that a sequence may be cut: id -> (slug, settings)."""
    from table import rows

    found = {}
    for row in rows():
        if row.context_grid is None and len(row.grid) == 1 and row.name in SLUGS:
            module = create(row.name, **row.config)
            alone = any(p.endswith("self") for p in module.traits.patterns)
            if alone and module.cuts_sequence and not module.reads_length:
                found[row.id] = (row.name, row.config)
    return found


def layer(name, whole):
    slug, settings = layers()[name]
    torch.manual_seed(0)
    module = create(slug, **settings).double().eval()
    (x,) = cut([random(B, N, module.dim)], 1, whole)
    seed = random(B, N, module.dim, seed=5)
    seed = seed if whole else parallel.shard(seed)
    found = {}
    for what, valid in (("all", None), ("valid", exists())):
        if what == "valid" and slug in NO_VALID:
            continue
        module.zero_grad()
        x.grad = None
        valid = valid if whole or valid is None else parallel.shard(valid)
        if whole:
            y = module(x, valid=valid)
            (y * seed).sum().backward()
        else:
            with parallel.sequence_parallel(module, length=N):
                y = module(x, valid=valid)
                (y * seed).sum().backward()
            parallel.sum_gradients(module)
        found |= {f"{what} y": y, f"{what} dx": x.grad}
        found |= {f"{what} w {n}": p.grad for n, p in module.named_parameters() if p.grad is not None}
    return found


def decoder(name, whole):
    """A hybrid language model in float32: logits, loss and gradients of all weights."""
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, use_cache=False,
        mechanisms=["lightning-attention-2", {"name": "lolcats", "window_size": 3}, "softmax-attention"],
    )  # fmt: skip
    model = DecoderForCausalLM(config)
    tokens = torch.randint(30, (B, N + 1), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    def loss_of(logits, targets):
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / (B * N)

    if whole:
        logits = model(inputs).logits
        loss = loss_of(logits, targets)
        loss.backward()
    else:
        with parallel.sequence_parallel(model, length=N):
            logits = model(parallel.shard(inputs)).logits
            loss = loss_of(logits, parallel.shard(targets))
            loss.backward()
        parallel.sum_gradients(model)
        loss = loss.detach()
        dist.all_reduce(loss)
    return {"logits": logits, "w loss": loss} | {f"w {n}": p.grad for n, p in model.named_parameters()}


# ---- accounts


def traffic(name, whole):
    """Bytes by layer, phase and collective at two lengths."""
    found = {}
    for n in (16, 64):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            create("lightning-attention-2", dim=8, num_heads=2),
            create("softmax-attention", dim=8, num_heads=2, causal=True),
        )  # fmt: skip
        x = random(B, n, 8, dtype=torch.float32)
        with parallel.sequence_parallel(model, length=n) as account:
            model(parallel.shard(x)).sum().backward()
        found[n] = account.by_layer()
        found[f"{n} count"] = len(account.select(layer="0"))
        found["table"] = account.table()
    q = random(B, H, 4, D)
    group = parallel.Group()
    parallel.linear_attention(q.requires_grad_(), q, q, group=group).sum().backward()
    found["plain"] = [(t.phase, t.bytes) for t in group.traffic.transfers]
    return found


def errors(name, whole):
    """What is said to bad input, in every process alike, so that nobody waits."""
    from attnlib.parallel import Group, sequence_parallel, shard

    soft, x = create("softmax-attention", dim=8, num_heads=2, causal=True), random(1, N, 8, dtype=torch.float32)
    rank, world = dist.get_rank(), dist.get_world_size()

    def alone():
        groups = [dist.new_group([r]) for r in range(world)]
        return Group(groups[(rank + 1) % world])

    def inside(call, module=soft, **settings):
        with sequence_parallel(module, length=N, **settings):
            return call()

    q = random(1, 1, N // world, 2)
    mesh2 = parallel.mesh(world)
    cases = {
        "length": lambda: shard(random(1, N + 1, 2)),
        "sequence": lambda: parallel.mesh(3),
        "outside": alone,
        "mesh": lambda: Group(mesh2),
        "type": lambda: Group("gloo"),
        "whole": lambda: inside(lambda: soft(x)),
        "state": lambda: inside(lambda: soft(shard(x), returns=("state",))),
        "alibi": lambda: inside(
            lambda: create("softmax-attention", dim=8, num_heads=2, causal=True, alibi=True)(shard(x))
        ),
        "unable": lambda: inside(lambda: None, create("nprf-rpe-fft-attention", dim=8, num_heads=2, max_distance=N)),
        "conv": lambda: inside(lambda: None, torch.nn.Sequential(soft, torch.nn.Conv1d(2, 2, 3))),
        "nothing": lambda: inside(lambda: None, torch.nn.Linear(2, 2)),
        "segments": lambda: inside(lambda: linear_attention(q, q, q, cu_seqlens=[0, q.shape[2]])),
        "operator": lambda: inside(lambda: _neighborhood(q)),
        "valid": lambda: inside(
            lambda: create("lolcats", dim=8, num_heads=2)(shard(x), valid=torch.ones(1, N // world) > 0)
        ),
        "terraces": lambda: inside(lambda: None, create("lolcats", dim=8, num_heads=2, window="terraced")),
        "softmax": lambda: parallel.attention(q[:, :, 1:], q, q, length=N),
        "fields": lambda: Group().traffic.total(size="1"),
    }
    found = {}
    for key, call in cases.items():
        try:
            call()
            found[key] = ""
        except (ValueError, TypeError) as error:
            found[key] = f"{type(error).__name__}: {error}"
    return found


def _neighborhood(q):
    from attnlib.ops import neighborhood_attention

    return neighborhood_attention(q, q, q, kernel_size=3)


def released(name, whole):
    fixture = load_file(FIXTURE)
    found = {}
    for n in (32, 512):
        for masked in (False, True):
            leaves = cut([fixture[f"{n}.{t}"] for t in "qkv"], 2, False)
            out = parallel.lasp2_as_released(*leaves, masked=masked)
            (out * parallel.shard(fixture[f"{n}.grad"], axis=2)).sum().backward()
            for what, t in zip(("out", "dq", "dk", "dv"), (out, *(t.grad for t in leaves)), strict=True):
                found[f"{n}.{masked}.{what}"] = t.detach()
    return found


def round_trip(name, whole):
    x = random(2, 8, 3)
    mine = parallel.shard(x).clone().requires_grad_()
    all_ = parallel.gather(mine)
    (all_ * random(2, 8, 3, seed=1)).sum().backward()
    state = {"S": random(B, H, D, DV, seed=7)}
    from attnlib.types import State

    q = parallel.shard(random(B, H, N, D, seed=1), axis=2)
    v = parallel.shard(random(B, H, N, DV, seed=2), axis=2)
    n = N // dist.get_world_size()
    first = q[:, :, : n - 1] if dist.get_rank() == 0 else q  # unequal chunks
    went = parallel.linear_attention(q, q, v, state=State(state), decay=-torch.ones(H).double())
    uneven = parallel.linear_attention(first, first, v[:, :, : first.shape[2]], decay=-torch.ones(H).double())
    return {"all": all_, "dx": mine.grad, "went": went, "uneven": uneven}


def example(name, whole):
    """The example, with and without two replicas of two processes each."""
    path = Path(__file__).parents[2] / "examples" / "parallel" / "train.py"
    spec = importlib.util.spec_from_file_location("parallel_example", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    call = ["--length", "32", "--steps", "3", "--width", "16"]
    found = {"all": module.main(call)}
    if dist.get_world_size() == 4:
        found["pairs"] = module.main([*call, "--sequence", "2"])
    return found


def cases():
    """(function, name) of all that is compared with one process."""
    found = [(linear, n) for n in LINEAR] + [(softmax, n) for n in SOFTMAX] + [(layer, n) for n in layers()]
    return [*found, (decoder, "hybrid")]


def held(found):
    return {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in found.items()}


def work(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
    found = {(f.__name__, name): held(f(name, False)) for f, name in cases()}
    for extra in (traffic, errors, round_trip, example):
        found[extra.__name__] = held(extra("", False))
    if world == 2:
        found["released"] = held(released("", False))
    torch.save(found, Path(folder) / f"{world}.{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    # Forked, so that what is imported above is imported once.
    for count in WORLDS:
        mp.start_processes(work, args=(count, sys.argv[1]), nprocs=count, start_method="fork")
