"""What becomes of sinks and outliers of a pretrained decoder when a clipped or a gated copy of it is fine-tuned.

``attnlib bench --suite real-remedies --out benchmarks/results`` measures again what ``real-remedies-cpu.json`` holds.
Clipped softmax, ``clip((1 - gamma) softmax + gamma, 0, 1)`` with ``gamma = -alpha / length``, lets a head write exact
zeros; a gate, ``sigmoid`` of a linear map of each head's slice of the input, lets it do nothing (Bondarenko et al.,
2023, arXiv 2306.12929). Both remove outliers of models that are *trained* so; here a model that has them already is
taken, with either remedy or with neither, and the weights of its attention are trained on the next token of real text,
the same windows in the same order, for equal steps. Measured before and after, on held-out windows: the loss, the share
of attention that the first token gets, kurtosis (3 for a normal distribution) and the largest entry of the residual
stream.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....hooks import attach
from ....hooks.intervention import Intervention
from ....hooks.site import Site
from ....look import Statistics
from ....nn.dense.quantizable_transformers import HeadGate
from ....normalizers import ClippedSoftmax
from ... import models
from ...clock import machine
from ...converting import tokens_of
from ...data import files
from ...small import Progress, picture, study
from ._items import Items, row_losses, states, text_items

QUESTION = "do sinks and outliers leave when a clipped or gated copy is fine-tuned?"
MODELS = ("smollm2-135m",)

PLAIN, CLIPPED, GATED = "plain", "clipped softmax", "gated heads"


class Clipped(Intervention):
    """Weights of the clipped softmax in place of those of softmax."""

    name = "clipped"

    def __init__(self, gamma: float):
        self.layers = None
        self.normalizer = ClippedSoftmax(gamma)

    def on_weights(self, site: Site, weights: Tensor, rows: Tensor) -> Tensor:
        stretched = weights * (self.normalizer.zeta - self.normalizer.gamma) + self.normalizer.gamma
        there = weights > 0  # a pair that may not meet stays so, and has no gradient
        return torch.where(there, stretched.clamp(0, 1), weights)


class Gated(Intervention):
    """What a head puts out times a gate that reads the head's slice of the layer's input; open at first.

    Args:
        width: of the residual stream.
        heads: query heads.
        layers: of the model.
        init: how far gates are open at first; outputs are divided by it.
    """

    name = "gated"

    def __init__(self, width: int, heads: int, layers: int, init: float = 0.5):
        self.layers = None
        self.gates = nn.ModuleList(
            HeadGate(width, heads, "conditional_per_token", None, False, init, True, 0.001) for _ in range(layers)
        )
        self._inputs: dict[int, Tensor] = {}

    def around_sublayer(self, site: Site, hidden: Tensor, call: Callable[[Tensor], Any]) -> Any:
        self._inputs[site.layer] = hidden
        return call(hidden)

    def on_output(self, site: Site, out: Tensor) -> Tensor:
        gate: HeadGate = self.gates[site.layer]  # type: ignore[assignment]
        return out * gate(self._inputs.pop(site.layer).to(gate.w2.dtype), None).to(out.dtype)


@torch.no_grad()
def seen(model: Any, items: Items, what: Intervention | None) -> dict[str, float]:
    """Loss on held-out text, and what the module says is measured beside it."""
    with attach(model, *([] if what is None else [what]), Statistics(what=("sink",))) as session:
        found = states(model, items)
        shares = torch.stack([torch.as_tensor(s["sink_score"]) for s in session.results["statistics"].values()])
    stream = torch.stack(found[1:-1])  # before every block but the first
    centred = stream - stream.mean(-1, keepdim=True)
    kurtosis = centred.pow(4).mean(-1) / centred.square().mean(-1).square().clamp_min(1e-12)
    return {
        "loss": float(row_losses(model, found[-1], items)[0].mean()),
        "first token": float(shares.mean()), "heads above half": float((shares > 0.5).sum()),
        "kurtosis": float(kurtosis.mean((1, 2)).max()), "kurtosis, first token": float(kurtosis[..., 0].mean(1).max()),
        "largest entry": float(stream.abs().max()), "largest entry, later tokens": float(stream[:, :, 1:].abs().max()),
    }  # fmt: skip


def tune(model: Any, what: Intervention | None, windows: Sequence[Tensor], lr: float, gate_lr: float) -> None:
    """One step of AdamW on each batch of windows (B, L), of the weights of attention, and of gates."""
    own = list(what.gates.parameters()) if isinstance(what, Gated) else []
    trained = [p for layer in model.model.layers for p in layer.self_attn.parameters()]
    for p in model.parameters():
        p.requires_grad_(False)
    for p in trained:
        p.requires_grad_(True)
    groups = [{"params": trained, "lr": lr}, *([{"params": own, "lr": gate_lr}] if own else [])]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    with contextlib.nullcontext() if what is None else attach(model, what):
        for ids in windows:
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_([*trained, *own], 1.0)
            optimizer.step()


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    name: str = "smollm2-135m",
    steps: int = 24,
    batch: int = 1,
    length: int = 64,
    held: int = 8,
    alpha: float = 4.0,
    lr: float = 1e-4,
    gate_lr: float = 1e-2,
    seeds: Sequence[int] = (0, 1, 2),
    loaded: tuple[Any, Any] | None = None,
) -> dict[str, Any]:
    """Fine-tune the three copies with every seed, which draws the windows and the gates.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``real-remedies-cpu.svg``.
        name: of :mod:`attnlib.bench.models`.
        steps: of training.
        batch, length: windows of a step, and their tokens.
        held: held-out windows of the same length.
        alpha: of the clipped softmax, ``gamma = -alpha / length``.
        lr, gate_lr: of the weights of attention, and of gates.
        seeds: at least two for an interval.
        loaded: ``(model, tokenizer)`` in place of a named one.

    Returns:
        Plain values, for JSON.
    """

    @functools.cache
    def opened() -> tuple[Any, Tensor, Items]:
        """Nothing is loaded where everything is kept."""
        model, tokenizer = models.load(name, dtype=torch.float32) if loaded is None else loaded
        data = files.text()
        some = tokens_of(tokenizer, data.train[: 64 * steps * batch * length])
        return model, some, text_items(tokens_of(tokenizer, data.test), held, length)

    def run(label: str, seed: int) -> dict[str, float]:
        given, some, items = opened()
        model = copy.deepcopy(given)
        torch.manual_seed(seed)
        config = model.config
        what: Intervention | None = {
            PLAIN: lambda: None,
            CLIPPED: lambda: Clipped(-alpha / length),
            GATED: lambda: Gated(config.hidden_size, config.num_attention_heads, config.num_hidden_layers),
        }[label]()
        before = seen(model, items, what)
        draw = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(some) - length, (steps, batch), generator=draw)
        tune(model, what, [some[s[:, None] + torch.arange(length)] for s in starts], lr, gate_lr)
        return {f"{k}, before": v for k, v in before.items()} | seen(model, items, what)

    result: dict[str, Any] = {
        "what": "a pretrained decoder fine-tuned with softmax, with clipped softmax and with gated heads",
        "model": models.MODELS[name].title if loaded is None else "given", "machine": machine(), "steps": steps,
        "batch": batch, "length": length, "held": held, "alpha": alpha, "lr": lr, "gate_lr": gate_lr,
        **study([PLAIN, CLIPPED, GATED], run, "loss", PLAIN, seeds, progress, keep,
                (name, steps, batch, length, held, alpha, lr, gate_lr)),
    }  # fmt: skip
    if pictures is not None:
        rows = {row["name"]: row for row in result["rows"]}
        curves: dict[str, list[tuple[Any, float, float | None]]] = {
            label: [(at, (r := rows[label][f"loss{end}"])["mean"], r["half"])
                    for at, end in ((0, ", before"), (steps, ""))]
            for label in rows
        }  # fmt: skip
        picture(Path(pictures) / "real-remedies-cpu.svg", curves, "steps", "loss on held-out text",
                "SmolLM2-135M fine-tuned with remedies for outliers", (), (PLAIN,))  # fmt: skip
    return result
