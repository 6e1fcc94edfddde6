"""Train the judge of painted scenes, and examine it.

    python examples/diffusion/judge.py --work diffusion-checkpoints

Painted scenes only, some of their things spoilt; half an hour on one core. Started again it goes on from the last
checkpoint. ``--examine`` measures the trained judge against its bars and writes ``--results``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import save_file

from attnlib.bench.clock import machine
from attnlib.bench.worlds import judge as judging

ROOT = Path(__file__).resolve().parents[2]


def keep(model: judging.Judge, out: Path) -> None:
    """Write it in half precision."""
    (out / "judge").mkdir(parents=True, exist_ok=True)
    held = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in model.state_dict().items()}
    save_file(held, str(out / "judge" / "model.safetensors"))


def train(args: argparse.Namespace) -> None:
    """AdamW, a warm-up, a cosine; new scenes in every batch."""
    set_seed(0)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    model = judging.Judge().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.02, betas=(0.9, 0.98))

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1, step / args.steps))))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    folder, taken = args.work / "judge", 0
    if (folder / "taken.json").exists():
        accelerator.load_state(str(folder))
        taken = json.loads((folder / "taken.json").read_text())["steps"]
        accelerator.print(f"going on from step {taken}")
    began, first, told = time.time(), taken, 0.0
    while taken < args.steps:
        generator = torch.Generator().manual_seed(taken)
        numbers = torch.arange(args.batch) + args.batch * taken
        given = judging.batch(numbers, generator)
        value = judging.loss(model, (given[0].contiguous(memory_format=torch.channels_last), *given[1:]))
        accelerator.backward(value)
        accelerator.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        taken += 1
        told = float(value.detach()) if not told else 0.97 * told + 0.03 * float(value.detach())
        if taken % 50 == 0 or taken == args.steps:
            each = (time.time() - began) / (taken - first)
            left = each * (args.steps - taken) / 60
            line = f"step {taken} of {args.steps}, loss {told:.4f}, {each:.3f} s each, {left:.1f} min left"
            accelerator.print(line, flush=True)
        if taken % 250 == 0 or taken == args.steps:
            accelerator.save_state(str(folder))
            (folder / "taken.json").write_text(json.dumps({"steps": taken}))
            keep(accelerator.unwrap_model(model), args.out if taken == args.steps else args.work / "snapshots")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "weights")
    parser.add_argument("--work", type=Path, default=Path("diffusion-checkpoints"))
    parser.add_argument("--steps", type=int, default=3100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--examine", action="store_true", help="measure the trained judge and do not train")
    parser.add_argument("--part", default="test", choices=("dev", "test"))
    parser.add_argument("--count", type=int, default=1000, help="scenes of each measurement")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "diffusion-judge-cpu.json")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    if not args.examine:
        train(args)
        return
    found = judging.examine(judging.load(args.out), args.count, args.part)
    bars = {k: {"bar": bar, "met": found[k]["mean"] >= bar} for k, bar in judging.BARS.items()}
    for name, value in found.items():
        print(f"{name:10} {value['mean']:.4f} ± {value['half']:.4f}  {bars.get(name, '')}")
    args.results.write_text(
        json.dumps({"part": args.part, "found": found, "bars": bars, "machine": machine()}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
