"""What attention can be converted to, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..hooks.site import Site
from ..nn.linear.heads import HeadMixer
from ..nn.linear.hedgehog import HedgehogHeads
from ..nn.linear.lolcats import LoLCATsHeads
from ..nn.sparse.moa_spans import SpanHeads
from ..nn.sparse.spt import SPTHeads
from ..types import check_choice
from .swap import Socket, is_causal, window_of

TARGETS: dict[str, Callable[..., HeadMixer]] = {
    "hedgehog": HedgehogHeads,
    "lolcats": LoLCATsHeads,
    "moa-spans": SpanHeads,
    "spt": SPTHeads,
}


def target(name: str) -> Callable[[Any], Any]:
    """Register a :class:`attnlib.nn.linear.heads.HeadMixer` class under a name that models can be converted to.

    It is made with ``num_heads``, ``head_dim``, ``num_kv_heads``, ``causal``, ``scale`` and the settings of the
    conversion, which are saved with the model and therefore plain values.
    """

    def register(make: Any) -> Any:
        if name in TARGETS and TARGETS[name] is not make:
            raise ValueError(f"the name {name!r} is taken by {TARGETS[name]!r}")
        TARGETS[name] = make
        return make

    return register


@target("elu1")
class Elu1Heads(HedgehogHeads):
    """Linear attention of ``1 + elu`` features (Katharopoulos et al., 2020, arXiv 2006.16236); nothing is trained."""

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None = None,
        causal: bool = True,
        scale: float | None = None,
        eps: float = 1e-12,
        chunk: int = 128,
    ):
        super().__init__(num_heads, head_dim, num_kv_heads, causal, scale, features="elu1", eps=eps, chunk=chunk)

    def trained(self) -> list[nn.Parameter]:
        return []


@target("window")
class WindowHeads(LoLCATsHeads):
    """The softmax window of LoLCATs alone, the linear part weighed with zero; nothing is trained."""

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None = None,
        causal: bool = True,
        scale: float | None = None,
        window_size: int = 64,
        chunk: int = 128,
    ):
        super().__init__(
            num_heads, head_dim, num_kv_heads, causal, scale, window_size=window_size, chunk=chunk, affine=True,
            window_factor=float("inf"), train_window_factor=False,
        )  # fmt: skip
        self.reach = window_size

    def trained(self) -> list[nn.Parameter]:
        return []


def make_socket(site: Site, name: str, settings: Mapping[str, Any] | None = None) -> Socket:
    """The mixer of one layer with what it was made of, so that it can be made again."""
    check_choice("to", name, tuple(TARGETS))
    mixer = TARGETS[name](
        num_heads=site.heads, head_dim=site.head_dim, num_kv_heads=site.kv_heads, causal=is_causal(site),
        scale=site.scale, **dict(settings or {}),
    )  # fmt: skip
    return Socket(mixer, name, dict(settings or {}), site.kind == "cross", window_of(site))
