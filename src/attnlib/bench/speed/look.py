"""What circuits cost on SmolLM2-135M: all heads patched, paths with feed-forwards frozen, values captured.

``attnlib bench --suite look`` measures it again; ``make models`` fetches the model. Beside each is the loop over
forwards that one would write: a forward of the model per head, the head's columns of what the output projection reads
replaced by a hook, the logits of the last token alone; for paths, two forwards per head with hooks on every output
projection and every feed-forward, as in the release of Merullo et al. (arXiv 2310.08744). Loops run one head in
``every``, spread over the layers, and count ``every`` times; runs are interleaved.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...hooks import Capture, Node, Nodes, attach
from ...look import logit_difference, patch, paths
from .. import models
from ..clock import interleave, machine, ratio
from ..data.circuits import NAMES, indirect_objects, one_token

Hook = Callable[[Any, Any], Any]


def _reads(kept: list[Tensor], module: Any, args: Any) -> None:
    kept.append(args[0])


def _gives(kept: list[Tensor], module: Any, args: Any, output: Tensor) -> None:
    kept.append(output)


class Loop:
    """Whole forwards of a model with hooks, one head at a time."""

    def __init__(self, model: Any, clean: dict[str, Tensor], other: dict[str, Tensor], answers: tuple[Tensor, Tensor]):
        self.model, self.clean, self.answers = model, clean, answers
        self.layers: list[Any] = [(layer.projection, layer.feed_forward) for layer in Nodes(model).layers]
        self.width = model.config.head_dim
        self.heads = model.config.num_attention_heads
        self.kept, self.other = self._values(clean), self._values(other)

    def _values(self, inputs: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        found: list[list[Tensor]] = [[] for _ in self.layers]
        with ExitStack() as stack:
            for number, (projection, feed) in enumerate(self.layers):
                stack.callback(projection.register_forward_pre_hook(partial(_reads, found[number])).remove)
                stack.callback(feed.register_forward_hook(partial(_gives, found[number])).remove)
            self._run(inputs)
        return [(z, mlp) for z, mlp in found]

    def _run(self, inputs: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            logits = self.model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
        rows = torch.arange(len(logits))
        return logits[rows, self.answers[0]] - logits[rows, self.answers[1]]

    def _columns(self, head: int) -> slice:
        return slice(head * self.width, (head + 1) * self.width)

    def patched(self, node: Node, where: slice) -> Tensor:
        """One head's value of the other prompt."""
        columns, value = self._columns(node.head or 0), self.other[node.layer][0]

        def hook(module: Any, args: Any) -> Any:
            x = args[0].clone()
            x[:, where, columns] = value[:, where, columns]
            return (x, *args[1:])

        with ExitStack() as stack:
            stack.callback(self.layers[node.layer][0].register_forward_pre_hook(hook).remove)
            return self._run(self.clean)

    def path(self, node: Node) -> Tensor:
        """One head's path into the logits: heads and feed-forwards held at the last token, the last stream taken."""
        columns, last = self._columns(node.head or 0), []

        def hold(number: int) -> Hook:
            def hook(module: Any, args: Any) -> Any:
                x = args[0].clone()
                x[:, -1] = self.kept[number][0][:, -1]
                if number == node.layer:
                    x[:, -1, columns] = self.other[number][0][:, -1, columns]
                return (x, *args[1:])

            return hook

        def still(number: int) -> Any:
            def hook(module: Any, args: Any, output: Tensor) -> Tensor:
                output = output.clone()
                output[:, -1] = self.kept[number][1][:, -1]
                return output

            return hook

        norm = Nodes(self.model).norm
        assert norm is not None
        with ExitStack() as stack:
            for number, (projection, feed) in enumerate(self.layers):
                stack.callback(projection.register_forward_pre_hook(hold(number)).remove)
                stack.callback(feed.register_forward_hook(still(number)).remove)
            stack.callback(norm.register_forward_pre_hook(lambda m, a: last.append(a[0])).remove)
            self._run(self.clean)

        def put(module: Any, args: Any) -> Any:
            x = args[0].clone()
            x[:, -1] = last[0][:, -1]
            return (x, *args[1:])

        with ExitStack() as stack:
            stack.callback(norm.register_forward_pre_hook(put).remove)
            return self._run(self.clean)


def measure(
    prompts: int = 4,
    every: int = 9,
    rounds: int = 3,
    progress: Callable[[str], None] | None = None,
    clock: str = "wall",
    decoder: str = "smollm2-135m",
) -> dict[str, Any]:
    """Medians of interleaved runs, ratios to the loops, and how far results are apart.

    Args:
        prompts: in a batch.
        every: one head in so many is run by the loops.
        rounds: measurements per contender.
        progress: told what is being measured.
        clock: one of :data:`attnlib.bench.clock.CLOCKS`; on a machine that does other work, too, ``"cpu"`` is fairer.
        decoder: name in :mod:`attnlib.bench.models`.
    """
    model, tokenizer = models.load(decoder)
    pairs = indirect_objects(prompts, one_token(tokenizer, NAMES), seed=0, opening=0)
    clean, other, *answers = pairs.tokens(tokenizer)
    metric = logit_difference(*answers)
    loop = Loop(model, clean, other, (answers[0], answers[1]))
    every_head = Nodes(model).of("z")
    some = every_head[every // 2 :: every]
    factor = len(every_head) / len(some)
    whole, last = slice(None), slice(-1, None)
    records = []
    cases: list[tuple[str, Callable[[], Any], Callable[[], Any], float]] = [
        ("all heads at the last token", lambda: patch(model, clean, other, metric).patched,
         lambda: torch.stack([loop.patched(n, last) for n in some]), factor),
        ("all heads at all tokens", lambda: patch(model, clean, other, metric, positions=None).patched,
         lambda: torch.stack([loop.patched(n, whole) for n in some]), factor),
        ("paths into the logits, feed-forwards frozen",
         lambda: paths(model, clean, other, metric, freeze_mlps=True).patched,
         lambda: torch.stack([loop.path(n) for n in some]), factor),
    ]  # fmt: skip
    for name, ours, theirs, times in cases:
        if progress is not None:
            progress(name)
        taken = interleave({"ours": ours, "loop": theirs}, rounds, clock, progress)
        apart = float((ours()[every // 2 :: every] - theirs()).abs().max())
        gain = ratio(taken["loop"], taken["ours"])
        records.append({
            "case": name, "ours_s": taken["ours"].median, "loop_s": taken["loop"].median * times,
            **{key: value * times for key, value in gain.items()}, "apart": apart,
        })  # fmt: skip
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})

    def run(which: Any) -> None:
        with torch.no_grad():
            which(**clean, use_cache=False, logits_to_keep=1)

    with attach(twin, Capture(("z",))):
        taken = interleave({"forward": lambda: run(model), "capture": lambda: run(twin)}, 7 * rounds, clock)
    records.append({"case": "all z captured", "ours_s": taken["capture"].median, "forward_s": taken["forward"].median,
                    **ratio(taken["capture"], taken["forward"])})  # fmt: skip
    return {"machine": machine(), "clock": clock, "model": decoder, "prompts": prompts,
            "tokens": clean["input_ids"].shape[1], "heads": len(every_head), "every": every,
            "records": records}  # fmt: skip
