"""What a patched node gets in place of its own value: another prompt's, a mean, zero, or those of drawn prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...checks import check_choice, check_int, checked, describe
from ...hooks import Capture, Node, attach
from ...hooks.nodes import at_positions
from ...hooks.tape import logits_of
from .replay import Inputs, Replay, call, check_alike, first_tensor, named_inputs

Values = Mapping[str, Mapping[int, Tensor]]


class Mean:
    """The mean of a node over prompts, position by position.

    Args:
        inputs: named inputs of M prompts as long as the clean ones.
    """

    @checked
    def __init__(self, inputs: Inputs):
        self.inputs = named_inputs("inputs", inputs)


class Resampled:
    """Other prompts, drawn anew several times: effects are means over the draws.

    Args:
        inputs: named inputs of M prompts as long as the clean ones.
        draws: how often each sample is paired with a prompt drawn at random.
        seed: of the draws.
    """

    @checked
    def __init__(self, inputs: Inputs, draws: int = 4, seed: int = 0):
        self.inputs = named_inputs("inputs", inputs)
        self.draws, self.seed = check_int("draws", draws, least=1), check_int("seed", seed)


Source = Inputs | Mean | Resampled | str


class Sources:
    """The values that nodes get, per draw, at the positions of a :class:`Replay`.

    Attributes:
        corrupted: (B,) the metric of the prompts that values are taken from, where there is one per sample.
    """

    def __init__(self, replay: Replay, source: Any, kinds: Sequence[str]):
        self.replay, self.draws = replay, 1
        self.corrupted: Tensor | None = None
        self.given = source
        if isinstance(source, str):
            check_choice("source", source, ("zero",))
            return
        if not isinstance(source, (Mean, Resampled, Mapping, Tensor)):
            raise TypeError(
                f"source must be named inputs of other prompts, 'zero', Mean(...) or Resampled(...), got "
                f"{describe(source)}"
            )
        inputs = named_inputs("source", source.inputs if hasattr(source, "inputs") else source, replay.model)
        plain = not isinstance(source, (Mean, Resampled))
        rows = len(first_tensor(inputs))
        if plain and rows != replay.batch:
            raise ValueError(
                f"source has {rows} prompts for {replay.batch} clean ones; give one each, or Mean, Resampled"
            )
        if plain:
            check_alike(replay.inputs, inputs)
        elif first_tensor(inputs).shape[1:2] != first_tensor(replay.inputs).shape[1:2]:
            check_alike(replay.inputs, inputs, "source")
        places = replay.places + replay.start
        if not plain and len(places) > 1 and not torch.equal(places, places[:1].expand_as(places)):
            raise ValueError("positions differ between samples, so a source of other prompts must have one for each")
        capture = Capture(list(kinds), positions=places if plain else places[0])
        with torch.no_grad(), attach(replay.model, capture):
            output = call(replay.model, replay._uncached(inputs) if "" not in inputs else inputs)
        self.values: Values = capture.results()
        if plain:
            logits = logits_of(output)
            logits = logits[:, replay.answer] if logits.dim() == 3 else logits
            samples = replay._samples(1)
            self.corrupted = replay.metric(replay._picked(logits, samples), samples)
        if isinstance(source, Resampled):
            self.draws = source.draws
            maker = torch.Generator().manual_seed(source.seed)
            self._drawn = torch.randint(rows, (source.draws, replay.batch), generator=maker)

    def value(self, node: Node, draw: int = 0) -> Tensor:
        """(B, P, D) of a head, (B, H, P, D) of all heads of a layer, (B, P, C) of a layer."""
        if isinstance(self.given, str):
            return torch.zeros_like(self.clean(node))
        value = self.values[node.kind][node.layer]
        if node.head is not None:
            value = value[:, node.head]
        if isinstance(self.given, Mean):
            return value.mean(0, keepdim=True).expand(self.replay.batch, *value.shape[1:])
        if isinstance(self.given, Resampled):
            return value[self._drawn[draw].to(value.device)]
        return value

    def clean(self, node: Node) -> Tensor:
        """The clean value, of the same shape."""
        replay = self.replay
        x = replay.values[node.kind][node.layer]
        if node.head is not None:
            x = x[:, node.head]
        return at_positions(x, replay.places, x.dim() - 2, str(node))
