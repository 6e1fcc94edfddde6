"""What it costs a decoding step when interventions that do nothing are attached to every layer.

``python -m attnlib.bench.speed.hooks benchmarks/results/hooks-cpu.json`` measures again what that file holds. Each
contender is attached to the same model with the same weights, runs a few steps on the same cache, the first of them
untimed, and is detached; contenders take turns, and each turn is compared to the untouched steps right before it. Times
are those of the processor, on one thread.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...hooks import IMAGE, TEXT, Intervention, Record, attach
from ..clock import limit_threads, machine, now

Make = Callable[[], Sequence[Intervention]]


class Around(Intervention):
    """Every attention call goes through the protocol and comes out as it went in."""

    name = "around attention"

    def around_attention(self, site: Any, q: Tensor, k: Tensor, v: Tensor, call: Callable[..., Tensor]) -> Tensor:
        return call(q, k, v)


class Typed(Around):
    """The same, with the types of all tokens at hand."""

    name = "around attention, token types"
    needs_types = True


class Sublayer(Intervention):
    """Every attention module is called by an intervention."""

    name = "around sublayer"

    def around_sublayer(self, site: Any, hidden: Tensor, call: Callable[[Tensor], Any]) -> Any:
        return call(hidden)


class Weights(Intervention):
    """All weights of the step are computed beside the kernel and handed over."""

    name = "on weights"

    def on_weights(self, site: Any, weights: Tensor, rows: Tensor) -> Tensor:
        return weights


class Steps(Intervention):
    """Nothing in any layer: told each step."""

    name = "on step"

    def on_step(self, step: int) -> None:
        return None


#: Contenders by name; those in which nothing is computed beside the model come first.
CONTENDERS: dict[str, Make] = {
    "untouched": lambda: (),
    "on step": lambda: (Steps(),),
    "around attention": lambda: (Around(),),
    "around attention, one layer": lambda: (_only(Around()),),
    "around attention, token types": lambda: (Typed(),),
    "around sublayer": lambda: (Sublayer(),),
    "on weights": lambda: (Weights(),),
    "recorded entropy": lambda: (Record(what=("entropy",), calls=1),),
}


def _only(intervention: Intervention) -> Intervention:
    intervention.layers = [0]
    return intervention


def measure(
    hidden_size: int = 1024,
    layers: int = 8,
    head_dim: int = 64,
    context: int = 1024,
    rounds: int = 21,
    steps: int = 4,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Medians of interleaved decoding steps, and of their ratio to the untouched model.

    Args:
        hidden_size: width of the Llama model, randomly initialised.
        layers: its layers.
        head_dim: width of a head; there are half as many key heads as query heads.
        context: tokens in the cache.
        rounds: turns of each contender.
        steps: decoding steps per turn.
        progress: told what is being measured.

    Returns:
        A dict of plain values: settings, machine and one record per contender.

    Raises:
        AssertionError: a contender that changes the logits.

    >>> measure(64, 1, 32, 8, rounds=1, steps=1)["records"][0]["contender"]
    'untouched'
    """
    import transformers

    heads = hidden_size // head_dim
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=hidden_size, intermediate_size=hidden_size * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 2),
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with limit_threads(1):
        records = _rounds(model, context, rounds, steps, progress)
    return {
        "what": "decoding steps with interventions that do nothing",
        "settings": {
            "model": "Llama", "hidden_size": hidden_size, "layers": layers, "heads": heads, "context": context,
            "batch": 1, "steps": steps, "rounds": rounds, "threads": 1, "clock": "processor time",
            "dtype": "float32",
        },
        "machine": machine(),
        "records": records,
    }  # fmt: skip


def _rounds(
    model: Any, context: int, rounds: int, steps: int, progress: Callable[[str], None] | None
) -> list[dict[str, Any]]:
    ids = torch.randint(0, 1024, (1, context))
    types = torch.full((1, context), TEXT)
    types[:, : context // 2] = IMAGE
    token = torch.randint(0, 1024, (1, 1))
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    ratios: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values

        def run() -> tuple[float, Tensor]:
            start = 0.0
            for done in range(steps + 1):
                if done == 1:  # the step right after attaching, or detaching, finds cold caches
                    start = now("cpu")
                logits = model(token, past_key_values=cache, use_cache=True).logits
            seconds = (now("cpu") - start) / steps
            cache.crop(-steps - 1)
            return seconds, logits

        _, reference = run()
        for done in range(rounds + 1):  # the first round warms up
            for name, make in CONTENDERS.items():
                if progress:
                    progress(f"round {done} of {rounds}: {name}")
                interventions = make()
                # An untouched turn right before each one: the machine's load changes slower than that.
                before, _ = run()
                attached: Any = nullcontext()
                if interventions:
                    needed = types if any(i.needs_types for i in interventions) else None
                    attached = attach(model, *interventions, token_types=needed)
                with attached:
                    seconds, logits = run()
                if not torch.equal(logits, reference):
                    raise AssertionError(f"{name} changes the logits")
                if done:
                    times[name].append(seconds)
                    ratios[name].append(seconds / before)
    return [
        {
            "contender": name,
            "step_seconds": statistics.median(times[name]),
            "over_untouched": statistics.median(ratios[name]),
        }
        for name in CONTENDERS
    ]


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results/hooks-cpu.json")
    result = measure(progress=lambda line: print(line, file=sys.stderr))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
