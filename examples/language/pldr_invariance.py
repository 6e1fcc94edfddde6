"""Do a trained PLDR-LLM's deductive outputs stop depending on the input, so that a cache can replace their network?

    python examples/language/pldr_invariance.py --out run --json benchmarks/results/pldr-invariance-cpu.json

Trains a small model (as ``train.py --model pldr``) and measures, before, during and after:

- ``spread``: how much A_LM and G move from prompt to prompt, over their size (``operator_invariance``);
- ``drift``: the same between a prompt and what the model has written after it, without caches;
- losses on held-out text: looking ahead through the metric (no cache), with the metric of each window's first half, and
  with the metric of other prompts;
- how many greedily generated tokens agree with and without caches.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from train import Windows, make_model, make_trainer, parse, prepare
from transformers import TrainerCallback, set_seed

from attnlib.bench.clock import machine
from attnlib.bench.store import write_json
from attnlib.models.pldr import PLDRForCausalLM
from attnlib.nn.dense.pldr_llm_plga import operator_invariance

NAMES = ("A_LM", "G")


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def half_loss(model: PLDRForCausalLM, windows: Tensor) -> float:
    """Nats per token over the second halves of ``windows`` (B, N), each read with the metric of its first half."""
    half = windows.shape[1] // 2
    first = model(windows[:, :half], use_cache=True)
    rest = model(windows[:, half:], past_key_values=first.past_key_values, use_cache=True)
    logits = torch.cat([first.logits[:, -1:], rest.logits[:, :-1]], 1)
    return float(F.cross_entropy(logits.flatten(0, 1), windows[:, half:].flatten()))


def second_half(model: PLDRForCausalLM, windows: Tensor) -> float:
    """The same loss without a cache."""
    half = windows.shape[1] // 2
    logits = model(windows, use_cache=False).logits[:, half - 1 : -1]
    return float(F.cross_entropy(logits.flatten(0, 1), windows[:, half:].flatten()))


@torch.no_grad()
def look(model: PLDRForCausalLM, train: Windows, test: Windows, prompts: int = 16, tokens: int = 32) -> dict[str, Any]:
    """All measurements of one state of the model."""
    was = model.training
    model.eval()
    windows = test.windows[:: max(1, len(test) // prompts)][:prompts]
    half = windows[:, : windows.shape[1] // 2]
    found: dict[str, Any] = {}
    made = model.deductive_outputs(half)
    for name in NAMES:
        found[f"spread, {name}"] = mean([float(operator_invariance(getattr(d, name))) for d in made])
    plain = model.generate(half, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, use_cache=False)
    cached = model.generate(half, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, use_cache=True)
    later = model.deductive_outputs(plain)
    for name in NAMES:
        pairs = [(getattr(a, name), getattr(b, name)) for a, b in zip(made, later, strict=True)]
        found[f"drift, {name}"] = mean([float((b - a).square().mean().sqrt() / a.square().mean().sqrt())
                                        for a, b in pairs])  # fmt: skip
    new = half.shape[1]
    found["tokens that agree, KV-cache and G-cache against none"] = float((plain == cached)[:, new:].float().mean())
    found["loss, no cache (looks ahead)"] = second_half(model, windows)
    found["loss, metric of the first half"] = half_loss(model, windows)
    model.freeze_metric(train.windows[:prompts])
    found["loss, metric of other prompts"] = second_half(model, windows)
    frozen = model.generate(half, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    found["tokens that agree, metric of other prompts against none"] = float((plain == frozen)[:, new:].float().mean())
    model.thaw_metric()
    model.train(was)
    return found


class Watch(TrainerCallback):
    """Measures at the steps named."""

    def __init__(self, steps: Sequence[int], train: Windows, test: Windows):
        self.steps, self.train, self.test = set(steps), train, test
        self.found: list[dict[str, Any]] = []

    def measure(self, step: int, model: PLDRForCausalLM) -> None:
        self.found.append({"step": step, **look(model, self.train, self.test)})
        print(json.dumps(self.found[-1]), flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step in self.steps:
            self.measure(state.global_step, model)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of tokenizer and checkpoints")
    parser.add_argument("--json", type=Path, required=True, help="results")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=2)
    mine, rest = parser.parse_known_args(argv)
    threads = torch.get_num_threads()
    results: dict[str, Any] = {"what": "deductive outputs of a small PLDR-LLM before, during and after training"}
    runs = []
    for seed in range(mine.seeds):
        given = parse([
            "--model", "pldr", "--dim", "64", "--depth", "3", "--heads", "4", "--length", "128", "--batch", "16",
            *rest, "--out", str(mine.out / f"seed-{seed}"), "--steps", str(mine.steps), "--seed", str(seed),
            "--save-steps", str(10 * mine.steps),
        ])  # fmt: skip
        given.out.mkdir(parents=True, exist_ok=True)
        tokenizer, train, test, bytes_per_token = prepare(given)
        set_seed(seed)
        model = make_model(given, len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id)
        assert isinstance(model, PLDRForCausalLM)
        model.config.use_cache = False
        model.generation_config.eos_token_id = None  # all prompts write as many tokens
        marks = sorted({max(1, mine.steps * share // 16) for share in (1, 2, 4, 8, 16)})
        watch = Watch(marks, train, test)
        watch.measure(0, model)
        trainer = make_trainer(given, model, train, test)
        trainer.add_callback(watch)
        trainer.train()
        runs.append({"seed": seed, "states": watch.found})
        results.update(
            settings={
                "dim": given.dim, "depth": given.depth, "heads": given.heads, "metric_hidden": given.metric_hidden,
                "residual_units": 2, "length": given.length, "batch": given.batch, "steps": given.steps,
                "learning_rate": given.learning_rate, "tokenizer": given.tokenizer, "unit": "nats per token",
                "bytes_per_token": bytes_per_token, "parameters": sum(p.numel() for p in model.parameters()),
            },
            machine={**machine(), "threads": threads},
            runs=runs,
        )  # fmt: skip
        mine.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(mine.json, results)
    return results


if __name__ == "__main__":
    main()
