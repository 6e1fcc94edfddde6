"""Train any of the task models on generated data, in a loop of Accelerate.

    python examples/tasks/train.py fpn --steps 300 --out run
    accelerate launch examples/tasks/train.py fpn --steps 300 --out run

`python examples/tasks/train.py list` prints what there is. Started again with the same ``--out``, training goes on
from the last checkpoint as if it had not stopped. At the end ``--out`` holds ``model.safetensors``, the terms of the
loss in ``log.jsonl`` and ``result.json``. What trains in turns (adversaries, stages) has one optimizer per turn.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import nn

from attnlib.models.protocol import Optimizers, Step, train_batch

sys.path.insert(0, str(Path(__file__).parent))
from tasks import TASKS, Task  # noqa: E402

#: Seeds of data that is not trained on begin here.
HELD_OUT = 2**40


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    def count(text: str) -> int:
        number = int(text)
        if number < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
        return number

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*TASKS, "list"], metavar="NAME", help="a row of tasks.py, or `list`")
    parser.add_argument("--out", type=Path, help="folder for checkpoints, weights and the result")
    parser.add_argument("--steps", type=count, default=300)
    parser.add_argument("--batch", type=count, help="samples in a batch")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--save-every", type=count, default=100)
    parser.add_argument("--test", type=count, default=32, help="samples that the result is counted on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.name != "list" and args.out is None:
        parser.error("--out FOLDER is needed")
    return args


class Taken:
    """How many steps were taken: what a checkpoint holds beside the model and its optimizers."""

    def __init__(self) -> None:
        self.steps = 0

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]


def moved(value: Any, device: torch.device) -> Any:
    """Tensors of a batch, however deep they lie, on a device."""
    if isinstance(value, dict):
        return {k: moved(v, device) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        made = [moved(v, device) for v in value]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def same_run(folder: Path, **settings: Any) -> None:
    """Keep what a run depends on in its folder, or refuse to go on from another one.

    Raises:
        SystemExit: the folder holds a run with other settings.
    """
    file = folder / "settings.json"
    if file.exists():
        held = json.loads(file.read_text())
        other = [f"{name}={held.get(name)!r}" for name, value in settings.items() if held.get(name) != value]
        if other:
            raise SystemExit(
                f"--out {folder} holds a run with {', '.join(other)}: go on with that, or name another folder"
            )
    file.write_text(json.dumps(settings) + "\n")


def save(accelerator: Accelerator, folder: Path) -> None:
    """A checkpoint that is there as a whole, or the one before."""
    new = folder.with_name("checkpoint.new")
    accelerator.save_state(str(new))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    accelerator.wait_for_everyone()


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, and return what ``result.json`` holds."""
    args = parse(arguments)
    if args.name == "list":
        print("\n".join(TASKS))
        return {}
    task: Task = TASKS[args.name]
    set_seed(args.seed)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    model = task.build().to(accelerator.device)
    peak, count = args.lr or task.lr, args.batch or task.batch_size

    def optimizer(name: str, params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=peak, weight_decay=task.weight_decay)

    optimizers, taken = Optimizers(optimizer), Taken()
    accelerator.register_for_checkpointing(model, optimizers, taken)
    folder = args.out / "checkpoint"
    args.out.mkdir(parents=True, exist_ok=True)
    same_run(args.out, name=args.name, seed=args.seed, batch=count, lr=peak)
    log_file = args.out / "log.jsonl"
    if folder.exists():
        accelerator.load_state(str(folder))
        accelerator.print(f"going on from step {taken.steps}")
    if accelerator.is_main_process and log_file.exists():  # lines behind the checkpoint are written again
        lines = log_file.read_text().splitlines(keepends=True)
        log_file.write_text("".join(line for line in lines if json.loads(line)["step"] <= taken.steps))

    def ready(step: Step) -> None:
        """The mean of the gradients of all processes, and this moment's rate."""
        part = taken.steps / args.steps
        for group in optimizers.of(step).param_groups:
            group["lr"] = peak * min(1.0, 10 * (taken.steps + 1) / args.steps) * (1 - 0.95 * part)
        if accelerator.num_processes > 1:
            for p in step.params:
                p.grad = accelerator.reduce(torch.zeros_like(p) if p.grad is None else p.grad, "mean")

    columns = (TextColumn(args.name), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"),
               TimeRemainingColumn())  # fmt: skip
    began = time.process_time()
    with Progress(*columns, console=Console(stderr=True), disable=not accelerator.is_main_process) as progress:
        bar = progress.add_task(args.name, total=args.steps, completed=taken.steps, loss="")
        while taken.steps < args.steps:
            model.train()
            for module in model.modules():
                if hasattr(module, "set_progress"):
                    module.set_progress(taken.steps / args.steps)
            # A step's data depends on its number only, so that what was seen before a stop is not seen again.
            number = (args.seed * args.steps + taken.steps) * accelerator.num_processes + accelerator.process_index
            batch = moved(task.batch(count, torch.Generator().manual_seed(number)), accelerator.device)
            with accelerator.autocast():
                terms = train_batch(
                    model, batch, optimizers, backward=accelerator.backward, ready=ready, clip=task.clip
                )
            taken.steps += 1
            loss = " ".join(f"{name} {value:.3g}" for step in terms.values() for name, value in step.items())
            progress.update(bar, completed=taken.steps, loss=loss)
            if accelerator.is_main_process:
                with log_file.open("a") as log:
                    log.write(json.dumps({"step": taken.steps, **terms}) + "\n")
            if taken.steps % args.save_every == 0 or taken.steps == args.steps:
                save(accelerator, folder)
    model.eval()
    result: dict[str, Any] = {"task": args.name, "steps": taken.steps, "seconds": time.process_time() - began}
    if task.score is not None:
        held_out = task.batch(args.test, torch.Generator().manual_seed(HELD_OUT + args.seed))
        result.update(task.score(model, moved(held_out, accelerator.device)))
    if accelerator.is_main_process:
        state = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
        save_file(state, args.out / "model.safetensors")
        (args.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    accelerator.print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
