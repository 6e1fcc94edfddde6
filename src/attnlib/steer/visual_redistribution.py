"""Visual attention redistribution (VAR): take weight from attention sinks, give it to the rest of the image.

At prefill, the sinks of a layer are the tokens with massive activations in a few fixed dimensions of the residual
stream entering it,

    ``phi(x_j) = max_{d in D} |x_j[d]| / sqrt(mean_c x_j[c]^2 + 1e-6) > tau``.

For a query and head with weights ``A``, let ``vis`` be the weight on image keys and ``portion`` the part of it on
visual sinks. Where ``vis >= summ`` and ``portion <= rho`` (an image-centric head), all sinks keep the share ``p`` of
their weight and the rest goes to the image keys that are no sinks, in proportion to their weights. Rows keep their
sums. Text after the image is eligible at prefill, every new token at decoding.

What differs from the authors' code: sinks and image spans are kept per sample, padding is never a sink, all query rows
are computed at once; ``portion`` divides by ``vis`` (they add 1e-6 per image token: ``compat="authors"``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_ints, check_real, shaped
from ..hooks.attach import attach
from ..hooks.intervention import Intervention
from ..hooks.site import Site
from ..hooks.tokens import IMAGE, PAD
from ..types import check_choice, to_list

#: Sink dimensions of known language models.
SINK_DIMS: dict[str, tuple[int, ...]] = {"llama-2-7b": (1415, 2533), "llama-2-13b": (2100, 4743)}


@shaped(hidden="float (B, N, C)")
def sink_tokens(hidden: Tensor, sink_dims: Sequence[int], tau: float = 20.0) -> Tensor:
    """Which tokens carry massive activations.

    Args:
        hidden: (B, N, C) residual stream entering a layer.
        sink_dims: D, the dimensions to look at.
        tau: threshold in units of the token's root mean square.

    Returns:
        (B, N) boolean.

    >>> x = torch.ones(1, 2, 64); x[0, 1, 3] = 1000.0
    >>> sink_tokens(x, (3,), tau=5.0).tolist()
    [[False, True]]
    """
    dims = check_ints("sink_dims", sink_dims, least=0, most=hidden.shape[-1] - 1)
    if not dims:
        raise ValueError("sink_dims must name at least one dimension, got none")
    wide = hidden.float() if hidden.dtype != torch.float64 else hidden
    scale = torch.rsqrt(wide.pow(2).mean(-1) + 1e-6)
    return wide[..., list(dims)].abs().amax(-1) * scale > tau


@shaped(
    weights="float (B, H, N, M)",
    image="bool (B or 1, H or 1, M)",
    sinks="bool (B or 1, H or 1, M)",
    eligible="bool (B or 1, N)",
)
def redistribute(
    weights: Tensor,
    image: Tensor,
    sinks: Tensor,
    eligible: Tensor,
    p: float = 0.6,
    rho: float = 0.5,
    summ: float = 0.2,
    compat: str | None = None,
) -> Tensor:
    """Move weight from sinks to the other image keys in image-centric heads.

    Args:
        weights: (B, H, N, M) attention weights.
        image: (B or 1, H or 1, M) boolean, image keys.
        sinks: (B or 1, H or 1, M) boolean, sinks among all keys.
        eligible: (B or 1, N) boolean, queries to consider.
        p: share of their weight that sinks keep.
        rho: largest part of the image weight on sinks.
        summ: smallest weight on the image.
        compat: ``"authors"`` adds 1e-6 per image key to the denominator of the part.

    Returns:
        (B, H, N, M) with the same row sums; rows that are not chosen are the same numbers.
    """
    check_choice("compat", compat, (None, "authors"))
    for name, part in (("p", p), ("rho", rho), ("summ", summ)):
        check_real(name, part, least=0, most=1)
    image, sinks = image.unsqueeze(-2), sinks.unsqueeze(-2)
    visual, rest = image & sinks, image & ~sinks
    zero = torch.zeros_like(weights)
    vis = torch.where(image, weights, zero).sum(-1, keepdim=True)
    on_sinks = torch.where(visual, weights, zero).sum(-1, keepdim=True)
    share = torch.where(rest, weights, zero)
    total = share.sum(-1, keepdim=True)
    extra = 1e-6 * image.sum(-1, keepdim=True) if compat == "authors" else 0.0
    chosen = (vis >= summ) & (on_sinks <= rho * (vis + extra)) & (total > 0)
    chosen = chosen & eligible[:, None, :, None] & visual.any(-1, keepdim=True)
    budget = (1 - p) * torch.where(sinks, weights, zero).sum(-1, keepdim=True)
    moved = torch.where(sinks, weights * p, weights) + budget * share / torch.where(total > 0, total, 1.0)
    return torch.where(chosen, moved, weights)


class VisualRedistribution(Intervention):
    """Recalibrate attention of a vision-language model away from sinks, towards the image.

    Token types come from ``attach(..., token_types=...)``. A prompt without image, or a layer without visual sink, is
    left alone.

    Args:
        sink_dims: dimensions of massive activations: numbers, the name of a model in :data:`SINK_DIMS`, or ``"auto"``
            to find the two strongest by reading the beginning-of-sequence token.
        p: share of their weight that sinks keep; 1 changes nothing.
        rho: a head whose image weight lies on sinks by more than this is left alone.
        summ: a head that gives the image less than this is left alone.
        tau: threshold of massive activations.
        first_layer: no sinks are looked for before this layer.
        layers: layers to change; ``None`` for all from ``first_layer`` on.
        compat: ``"authors"``, see :func:`redistribute`.

    Raises:
        ValueError: ``sink_dims`` missing or unknown, shares outside [0, 1].

    Reference: Kang et al., 2025, arXiv 2503.03321 (visual attention sink, VAR).

    >>> VisualRedistribution("llama-2-7b").sink_dims
    (1415, 2533)
    """

    name: ClassVar[str] = "visual-redistribution"
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    needs_types: ClassVar[bool] = True
    whole_prompt = True

    def __init__(
        self,
        sink_dims: Sequence[int] | str | None = None,
        p: float = 0.6,
        rho: float = 0.5,
        summ: float = 0.2,
        tau: float = 20.0,
        first_layer: int = 2,
        layers: Sequence[int | str] | None = None,
        compat: str | None = None,
    ):
        if sink_dims is None:
            raise ValueError(
                "sink_dims is needed: the dimensions of massive activations belong to a model. Give numbers, "
                f"one of {sorted(SINK_DIMS)}, or 'auto' to find them"
            )
        if isinstance(sink_dims, str) and sink_dims != "auto":
            check_choice("sink_dims", sink_dims, [*SINK_DIMS, "auto"])
            sink_dims = SINK_DIMS[sink_dims]
        for name, value in (("p", p), ("rho", rho), ("summ", summ)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], got {value}")
        check_choice("compat", compat, (None, "authors"))
        self.automatic = sink_dims == "auto"
        self.sink_dims: tuple[int, ...] = () if isinstance(sink_dims, str) else tuple(sink_dims)
        if not self.automatic and not self.sink_dims:
            raise ValueError("sink_dims is empty")
        self.p, self.rho, self.summ, self.tau, self.first_layer, self.compat = p, rho, summ, tau, first_layer, compat
        self.layers = to_list("layers", layers)
        self.reset()

    @property
    def identity(self) -> bool:
        return self.p == 1.0

    def reset(self) -> None:
        self._sinks: dict[tuple[str | None, int], Tensor] = {}
        self._moved: dict[tuple[str | None, int], int] = {}

    def wants(self, site: Site) -> bool:
        return site.layer >= self.first_layer

    def prepare(self, model: nn.Module, sites: Sequence[Site]) -> None:
        config: Any = getattr(model, "config", None)
        width = getattr(config.get_text_config() if hasattr(config, "get_text_config") else config, "hidden_size", None)
        if self.automatic:
            self.sink_dims = find_sink_dims(model, layer=min(site.layer for site in sites))
        elif width is not None and max(self.sink_dims) >= width:
            raise ValueError(f"sink_dims={self.sink_dims} are outside this model's hidden size {width}")

    # ---- stages

    def on_block_input(self, site: Site, hidden: Tensor) -> None:
        if site.phase != "prefill":
            return
        assert site.q_types is not None
        sinks = sink_tokens(hidden.detach(), self.sink_dims, self.tau) & (site.q_types != PAD)
        self._sinks[site.branch, site.layer] = site.by_slot(sinks)
        self._moved[site.branch, site.layer] = 0

    def edit_rows(self, site: Site) -> Tensor | None:
        sinks = self._sinks.get((site.branch, site.layer))
        device = None if site.q_pos is None else site.q_pos.device
        if sinks is None or not bool((sinks & self._image_slots(site, sinks.shape[1])).any()):
            return torch.zeros(0, dtype=torch.long, device=device)
        return self._eligible(site).any(0).nonzero().squeeze(1)

    def on_weights(self, site: Site, weights: Tensor, rows: Tensor) -> Tensor:
        sinks = self._sinks[site.branch, site.layer]
        length = int(site.offset) + site.n_queries
        by_slot = F.pad(sinks, (0, max(0, max(length, self._top(site)) - sinks.shape[1])))
        image, sink = site.key_types() == IMAGE, site.per_key(by_slot)
        new = redistribute(
            weights, image, sink, self._eligible(site)[:, rows], self.p, self.rho, self.summ, self.compat
        )
        key = (site.branch, site.layer)
        self._moved[key] = self._moved.get(key, 0) + int((new != weights).any(-1).sum())
        return new

    @staticmethod
    def _top(site: Site) -> int:
        assert site.k_pos is not None
        return int(site.k_pos.max()) + 1 if site.k_pos.dim() == 1 else 0

    @staticmethod
    def _image_slots(site: Site, length: int) -> Tensor:
        """(B, length) boolean; while decoding the prompt's image keys may be fewer, which the edit itself sees."""
        if site.phase == "prefill":
            assert site.q_types is not None
            return site.by_slot(site.q_types == IMAGE)
        return torch.ones(1, length, dtype=torch.bool, device=None if site.k_pos is None else site.k_pos.device)

    @staticmethod
    def _eligible(site: Site) -> Tensor:
        """(B, N) boolean: text after the image at prefill, every token at decoding."""
        assert site.q_types is not None
        types = site.q_types
        if site.phase != "prefill":
            return types != PAD
        image = types == IMAGE
        last = torch.where(image, torch.arange(types.shape[1], device=types.device), -1).amax(1, keepdim=True)
        after = torch.arange(types.shape[1], device=types.device) > last
        return after & (types != PAD) & (last >= 0)

    def results(self) -> dict[str, object]:
        """The dimensions, and of the main branch the sinks (B, N) of each layer in the last prompt, and rows edited."""
        sinks, moved = (
            {layer: value for (branch, layer), value in kept.items() if branch is None}
            for kept in (self._sinks, self._moved)
        )
        return {"sink_dims": self.sink_dims, "sinks": sinks, "edited": moved}


class _BlockInput(Intervention):
    """Keeps the residual stream entering one layer."""

    name: ClassVar[str] = "block-input"
    kinds: ClassVar[tuple[str, ...]] = ("self",)

    def __init__(self, layer: int):
        self.layers = [layer]
        self.hidden: Tensor | None = None

    def on_block_input(self, site: Site, hidden: Tensor) -> None:
        self.hidden = hidden.detach()


def find_sink_dims(model: nn.Module, layer: int = 2, count: int = 2, token: int | None = None) -> tuple[int, ...]:
    """The dimensions of massive activations of a causal language model.

    The residual stream of the beginning-of-sequence token alone is read where it enters ``layer``; its ``count``
    strongest dimensions are the answer.

    Args:
        model: a transformers model that reads ``input_ids``.
        layer: where to look.
        count: how many dimensions.
        token: id to read; the config's ``bos_token_id`` by default.

    Returns:
        Ascending dimensions.

    Raises:
        ValueError: the model has no beginning-of-sequence token and none was given.
    """
    if token is None:
        config: Any = getattr(model, "config", None)
        token = getattr(config, "bos_token_id", None)
        if token is None and hasattr(config, "get_text_config"):
            token = getattr(config.get_text_config(), "bos_token_id", None)  # type: ignore[union-attr, operator]
    if token is None:
        raise ValueError("this model names no bos_token_id; give sink_dims as numbers")
    look = _BlockInput(layer)
    device = next(model.parameters()).device
    with torch.no_grad(), attach(model, look):
        model(input_ids=torch.tensor([[token]], device=device))
    assert look.hidden is not None
    return tuple(sorted(look.hidden[0, -1].abs().float().topk(count).indices.tolist()))
