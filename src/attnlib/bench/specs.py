"""What takes part in a comparison: a mechanism, its settings, and whether its traits let it into a task."""

from __future__ import annotations

import ast
import importlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from attnlib.types import PATTERNS, Traits

#: Name of the contestant whose blocks mix nothing: what the rest of the model can do by itself.
CONTROL = "without a mechanism"


class Nothing(nn.Module):
    """Stands where a mechanism would and adds zero, so that every token is on its own."""

    class_traits = Traits(patterns=frozenset(PATTERNS), grid_ranks=frozenset({1, 2, 3}))

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.traits = self.class_traits

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return torch.zeros_like(x)


@dataclass(frozen=True)
class Spec:
    """One contestant: a registered name or ``module:Class``, and settings beyond ``dim``, ``num_heads``, ``causal``.

    Args:
        name: registry name, or ``package.module:Class`` of a user's own mechanism.
        config: keyword arguments for its constructor.
        alias: what reports call it; name and settings when ``None``.

    >>> Spec.parse("softmax-attention,num_kv_heads=2").config
    {'num_kv_heads': 2}
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    alias: str | None = field(default=None, compare=False)

    @classmethod
    def parse(cls, given: str | Spec | tuple[str, Mapping[str, Any]], what: str = "mechanisms") -> Spec:
        """Read ``"name"``, ``"name,key=value,key=value"`` or ``("name", {...})``; errors call it ``what``.

        Raises:
            ValueError: when a setting is not ``key=value``.
        """
        if isinstance(given, Spec):
            return given
        if not isinstance(given, str):
            name, config = given
            return cls(name, dict(config))
        name, *pairs = _split(given)
        config = {}
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not equals or not key.strip().isidentifier():
                raise ValueError(f"{what}: {given!r} has the setting {pair!r}; write NAME,key=value,key=value")
            try:
                config[key.strip()] = ast.literal_eval(value.strip())
            except (ValueError, SyntaxError):
                config[key.strip()] = value.strip()
        return cls(name.strip(), config)

    @property
    def short(self) -> str:
        """The name without settings and module."""
        return self.name.rpartition(":")[2]

    @property
    def settings(self) -> str:
        """The settings as one line, empty when there are none."""
        return ", ".join(f"{k}={v}" for k, v in self.config.items())

    @property
    def full(self) -> str:
        """Name and settings: the same in every comparison, so that files are named by it."""
        return f"{self.short} ({self.settings})" if self.config else self.short

    @property
    def label(self) -> str:
        """What the report calls it."""
        return self.alias or self.full

    def find(self, what: str = "mechanisms") -> type:
        """The class; raises ``ValueError`` for a name that does not exist (the nearest is suggested)."""
        if self.name == CONTROL:
            return Nothing
        if ":" in self.name:
            module, _, attribute = self.name.partition(":")
            try:
                return getattr(importlib.import_module(module), attribute)
            except (ImportError, AttributeError) as error:
                raise ValueError(f"{what}: {self.name!r} cannot be imported ({error})") from error
        from attnlib.nn.registry import find

        return find(self.name)

    def make(self, causal: bool, dim: int, num_heads: int) -> nn.Module:
        """Build it for a task."""
        config: dict[str, Any] = {"dim": dim, "num_heads": num_heads, **self.config}
        cls = self.find()
        # Without such a switch a mechanism is always causal or never; its traits say which.
        if causal and _takes(cls, "causal"):
            config["causal"] = True
        if "num_heads" not in self.config and not _takes(cls, "num_heads"):
            del config["num_heads"]
        return cls(**config)

    def why_not(
        self, pattern: str, grid: Sequence[int], dim: int, num_heads: int, context: Sequence[int] | None = None
    ) -> str | None:
        """The trait that keeps it out of a task of this pattern and grid, or ``None`` when it may take part."""
        cls = self.find()
        upper = getattr(cls, "class_traits", None)
        if not isinstance(upper, Traits):
            return f"{cls.__name__} is not a Mechanism: it has no class_traits to say what it supports"
        if pattern not in upper.patterns:
            return f"trait patterns = {{{', '.join(sorted(upper.patterns))}}}: {pattern} is not among them"
        rank = len(grid)
        ranks = upper.grid_ranks
        if rank not in ranks and 1 not in ranks:
            return f"trait grid_ranks = {sorted(ranks)}: this task has a grid of rank {rank}"
        try:
            traits: Any = self.make(pattern.startswith("causal"), dim, num_heads).traits
        except (TypeError, ValueError) as error:
            return f"cannot be built for this task: {error}"
        if pattern not in traits.patterns:
            return f"trait patterns, configured so, = {{{', '.join(sorted(traits.patterns))}}}: no {pattern}"
        if rank not in traits.grid_ranks and 1 not in traits.grid_ranks:
            return f"trait grid_ranks, configured so, = {sorted(traits.grid_ranks)}: this task has rank {rank}"
        sides = [*grid, *(context or ())] if rank in traits.grid_ranks else [_product(grid), _product(context or (1,))]
        if any(s % traits.grid_multiple for s in sides if s > 1):
            return f"trait grid_multiple = {traits.grid_multiple}: the grid here is {' × '.join(map(str, grid))}"
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"name": self.name, "config": dict(self.config), "settings": self.settings, "label": self.label}


def shorten(specs: Sequence[Spec]) -> list[Spec]:
    """The same specs, called by their bare name where that is unambiguous.

    >>> [s.label for s in shorten([Spec("a", {"k": 1}), Spec("b", {"k": 1}), Spec("b", {"k": 2})])]
    ['a', 'b (k=1)', 'b (k=2)']
    """
    counts = Counter(s.short for s in specs)
    return [replace(s, alias=s.short) if counts[s.short] == 1 else replace(s, alias=None) for s in specs]


def _split(text: str) -> list[str]:
    """Split at commas outside brackets and quotes."""
    parts, depth, quote, start = [], 0, "", 0
    for i, c in enumerate(text):
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        elif c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]


def _takes(cls: type, argument: str) -> bool:
    import inspect

    parameters = inspect.signature(cls).parameters.values()
    return any(p.name == argument or p.kind is p.VAR_KEYWORD for p in parameters)


def _product(values: Sequence[int]) -> int:
    out = 1
    for v in values:
        out *= v
    return out
