"""LSceneLLM's scene magnifier: what a text token looks at is offered to it once more, in detail, by the next layer.

Zhi et al., 2024, "LSceneLLM: Enhancing Large 3D Scene Understanding Using Adaptive Visual Preferences", arXiv
2412.01292. A prompt holds V coarse tokens; behind each stand G detail tokens ``D`` that are in no prompt and no cache.
From layer ``start`` on, with ``A`` the weights over the model's own keys, a row t of the text behind them selects

    a_j = sum over heads of A[t, j],    n = (a - min a) / (max a - min a),    j is selected where 255 n > 96,

without gradient, and the next layer reads ``K_d = rope(W_k D)``, ``V_d = W_v D`` of what was selected beside its own
keys. The detail of j stands at j's position. With ``O`` the layer's own output and ``O_sel`` that with detail,

    O[t] = (1 - alpha) O[t] + alpha O_sel[t],

``alpha`` rising from 0 to 1 in training. Rows of other tokens stay as they are, bit for bit.

The engine knows no scene: coarse tokens are those of the type ``IMAGE``, of a picture or of a point cloud
(:func:`detail_of_points` makes details of either).

Differs from the authors' code: grouped queries; coarse tokens stand anywhere, in each row of a batch where its padding
leaves them, where theirs slices all rows by the first; a row that attends to all coarse tokens alike selects none of
them (0/0 there); keys and values of details are computed once per prompt; the first layer, which only selects, has no
projections (dead there; see :func:`magnifier_layers`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checks import (
    check_axes,
    check_choice,
    check_float,
    check_int,
    check_real,
    check_size,
    check_type,
    check_valid,
    check_width,
    check_within,
    describe,
    shaped,
)
from ..hooks import IMAGE, Intervention, Probe, Site, with_keys
from ..hooks.call import row_blocks, score_rows, weights_of
from ..hooks.intervention import implements
from ..hooks.tokens import is_text
from ..nn.released import Released
from ..ops.points import min_max
from ..types import stats_dtype


class DetailProjection(nn.Module):
    """Keys and values of details in one layer.

    Args:
        dim: of a detail, the width of the language model.
        num_kv_heads, head_dim: of the layer.
        bias: as its own projections have one.
    """

    def __init__(self, dim: int, num_kv_heads: int, head_dim: int, bias: bool = False):
        super().__init__()
        for name, value in (("dim", dim), ("num_kv_heads", num_kv_heads), ("head_dim", head_dim)):
            check_int(name, value, least=1)
        self.dim, self.num_kv_heads, self.head_dim = dim, num_kv_heads, head_dim
        self.k = nn.Linear(dim, num_kv_heads * head_dim, bias=bias)
        self.v = nn.Linear(dim, num_kv_heads * head_dim, bias=bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, P, dim) -> twice (B, num_kv_heads, P, head_dim)."""
        check_width("x", x, self.dim)
        x = x.to(self.k.weight)
        heads = (self.num_kv_heads, self.head_dim)
        k, v = (m(x).unflatten(-1, heads).transpose(1, 2) for m in (self.k, self.v))
        return k, v


def magnifier_layers(model: nn.Module, start: int = 8, compat: str | None = None) -> nn.ModuleDict:
    """Untrained projections for all layers of a transformers model behind ``start``, which only selects.

    Args:
        model: a causal language model, or one with images.
        start: the first layer that selects; the next ones read.
        compat: ``"authors"`` makes projections for ``start`` too, which nothing reads.
    """
    check_choice("compat", compat, (None, "authors"))
    config: Any = getattr(model, "config", None)
    if config is None:
        raise TypeError(f"model must be a transformers model, got {describe(model)}")
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers, heads, dim = config.num_hidden_layers, config.num_attention_heads, config.hidden_size
    check_int("start", start, least=0, most=layers - 2)
    width = getattr(config, "head_dim", None) or dim // heads
    some = next(model.parameters())
    made = {
        str(n): DetailProjection(dim, getattr(config, "num_key_value_heads", None) or heads, width)
        for n in range(start + (compat is None), layers)
    }
    return nn.ModuleDict(made).to(device=some.device, dtype=some.dtype)


def convert_magnifier(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``k_proj_hd`` and ``v_proj_hd`` of the authors' language model, alone or among all its weights, as ours.

    Those of the first layer that has them are left out: it only selects.
    """
    theirs = Released(state_dict, "the authors' LlamaForCausalLM", wrappers=("llm.",))
    rules = {r"(?:llm\.)?(?:model\.)?layers\.(\d+)\.self_attn\.([kv])_proj_hd\.(weight|bias)": r"\1.\2.\3"}
    out = theirs.renamed(dict(rules))
    theirs.leave(r".+", because="the language model and encoders, which are loaded by their own libraries")
    if not out:
        raise ValueError("state_dict has no k_proj_hd, v_proj_hd of self_attn, which the authors' model has")
    first = min(int(name.split(".")[0]) for name in out)
    return theirs.close({name: value for name, value in out.items() if int(name.split(".")[0]) != first})


@shaped(weights="float (B, H, N, M)", coarse="whole (B, V)")
def select_coarse(weights: Tensor, coarse: Tensor, threshold: float = 96.0) -> Tensor:
    """Which coarse tokens each row looks at.

    Args:
        weights: (B, H, N, M) attention weights.
        coarse: (B, V) places of the coarse tokens among the keys.
        threshold: what 255 times the share between a row's least and most has to exceed.

    Returns:
        (B, N, V) boolean; a row that looks at all alike has a share of 0 everywhere.

    >>> select_coarse(torch.tensor([[[[0.5, 0.3, 0.2]]]]), torch.tensor([[0, 1, 2]])).tolist()
    [[[True, False, False]]]
    """
    check_real("threshold", threshold)
    check_within("coarse", coarse, weights.shape[-1], "key")
    with torch.no_grad():
        total = weights.sum(1)
        seen = total.gather(-1, coarse[:, None].expand(-1, total.shape[1], -1))
        if not seen.numel():
            return torch.zeros_like(seen, dtype=torch.bool)
        return 255 * min_max(seen) > threshold


class SceneMagnifier(Intervention):
    """Offer details of the coarse tokens that a row looks at, layer by layer.

    Coarse tokens are those of type ``IMAGE``: ``attach(..., token_types=TokenTypes(image=...))``. Every row of a batch
    has V of them, read in one call of the model. Details are replaced by ``magnifier.detail = ...`` between prompts.

    Args:
        layers: projections by number of the layer, see :func:`magnifier_layers`; the layer before the first of them
            begins to select.
        detail: (B, V, G, C) of the coarse tokens, in their order; ``None`` does nothing. Beams share them.
        threshold: see :func:`select_coarse`; 255 or more selects nothing, below 0 everything.
        rows: (B, L) which tokens of a prompt magnify; by default text behind the last coarse token. Tokens that are
            written do.
        warm_up: in training, ``alpha = min(1, warm_up * progress)``; ``None`` for 1. See :meth:`set_progress`.

    Raises:
        ValueError: layers that are no neighbours, details of another number or width than the coarse tokens.

    >>> SceneMagnifier({3: DetailProjection(8, 2, 4)}, torch.zeros(1, 5, 2, 8)).acting
    [2, 3]
    """

    name: ClassVar[str] = "scene-magnifier"
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    needs_types: ClassVar[bool] = True
    whole_prompt = True
    replaces_mask: ClassVar[bool] = True
    splits_softmax: ClassVar[bool] = True
    reads_weights = True
    adds_keys = True
    own_keys = True

    def __init__(
        self, layers: Mapping[int, DetailProjection] | nn.ModuleDict, detail: Tensor | None = None,
        threshold: float = 96.0, rows: Tensor | None = None, warm_up: float | None = None,
    ):  # fmt: skip
        check_type("layers", layers, (Mapping, nn.ModuleDict), "a mapping from layers to DetailProjection")
        self.projections: dict[int, DetailProjection] = {}
        for key, one in layers.items():
            if not str(key).isdigit():
                raise ValueError(f"layers must be numbered, from 1 on, got {key!r}")
            check_type(f"layers[{key}]", one, DetailProjection)
            assert isinstance(one, DetailProjection)
            self.projections[int(key)] = one
        numbers = sorted(self.projections)
        if not numbers or numbers[0] < 1 or numbers != list(range(numbers[0], numbers[-1] + 1)):
            raise ValueError(
                f"layers must be neighbours, from 1 on: each reads what the one before selects; got {numbers}"
            )
        self.acting = [numbers[0] - 1, *numbers]
        self.layers = self.acting
        self.threshold = check_real("threshold", threshold)
        self.warm_up = None if warm_up is None else check_real("warm_up", warm_up, above=0)
        self.detail, self.rows, self.progress = detail, rows, 0.0
        self._check()

    def _check(self) -> None:
        if self.detail is not None:
            dim = self.projections[self.acting[-1]].dim
            check_axes("detail", self.detail, B=None, V=None, G=None, C=dim)
            check_float("detail", self.detail)
        if self.rows is not None:
            check_axes("rows", self.rows, B=None, L=None)
            check_valid("rows", self.rows, self.rows.shape)

    @property
    def identity(self) -> bool:
        return self.detail is None or self.threshold >= 255 or not self.detail.numel()

    def conflicts(self, other: Intervention) -> str | None:
        if isinstance(other, Probe) or implements(other, "on_scores") or implements(other, "on_weights"):
            return "it adds keys that are no tokens of the text, and the other one reads or edits scores by token"
        return None

    def set_progress(self, progress: float) -> None:
        """How far training is, from 0 to 1."""
        self.progress = check_real("progress", progress, least=0, most=1)

    def alpha(self, training: bool) -> float:
        """Share of the magnified output."""
        return 1.0 if self.warm_up is None or not training else min(1.0, self.warm_up * self.progress)

    def prepare(self, model: nn.Module, sites: Sequence[Site]) -> None:
        if len(missing := set(self.acting) - {site.layer for site in sites}):
            raise ValueError(f"the model has no self-attention at layers {sorted(missing)}, which layers name")
        for site in sites:
            own = self.projections.get(site.layer)
            if own is not None and (own.num_kv_heads != site.kv_heads or own.head_dim != site.head_dim):
                raise ValueError(
                    f"layers[{site.layer}] makes {own.num_kv_heads} heads of {own.head_dim}, the layer has "
                    f"{site.kv_heads} of {site.head_dim} (key heads)"
                )

    # ---- stages

    def around_attention(self, site: Site, q: Tensor, k: Tensor, v: Tensor, call: Any) -> Tensor:
        notes = self.session.notes
        if site.layer == self.acting[0]:
            self._look(site, q)
        place = notes.get((self, "places"))
        if place is None:  # no coarse token was read
            return call(q, k, v)
        rows = notes[self, "rows"]
        index = place.to(q.device)
        if site.layer != self.acting[-1]:
            notes[self, site.layer] = self._select(site, q, k, index, rows)
        if site.layer == self.acting[0]:
            return call(q, k, v)
        more_k, more_v = self._details(site, q, index)
        chosen = notes[self, site.layer - 1]
        alpha = self.alpha(site.training)
        any_ = chosen.any(-1) & rows
        if alpha == 0 or not bool(any_.any()):
            return call(q, k, v)
        each = more_k.shape[2] // index.shape[1]
        allowed = (chosen & rows[..., None]).repeat_interleave(each, -1)[:, None]
        whole = bool(any_.all())
        some = None if whole or not self._alone(site) else any_.any(0).nonzero()[:, 0]
        if some is None:
            magnified = with_keys(site, call, q, k, v, more_k, more_v, allowed)
        else:
            magnified = with_keys(site, call, q[:, :, some], k, v, more_k, more_v, allowed[:, :, some], some)
        if alpha == 1 and whole:
            return magnified
        own = call(q, k, v)
        before = own if some is None else own[:, :, some]
        mixed = magnified if alpha == 1 else (1 - alpha) * before + alpha * magnified
        mixed = torch.where((any_ if some is None else any_[:, some])[:, None, :, None], mixed, before)
        return mixed if some is None else own.index_copy(2, some, mixed)

    def _alone(self, site: Site) -> bool:
        """Whether rows may be left out of a call: nobody further in, nor the kernel, knows them by their number."""
        others = (i for i in self.session.interventions if i is not self)
        return site.weighting.plain and not any(implements(i, "around_attention") for i in others)

    def _look(self, site: Site, q: Tensor) -> None:
        """Where the coarse tokens are, and which rows of this call magnify."""
        notes, types = self.session.notes, site.q_types
        assert types is not None and site.q_pos is not None
        coarse = types == IMAGE
        batch, n = types.shape
        if bool(coarse.any()):
            detail = self._of_rows(batch)
            counts = coarse.sum(1)
            if bool((counts != detail.shape[1]).any()):
                raise ValueError(
                    f"detail is of {detail.shape[1]} coarse tokens, but the rows of this call hold {counts.tolist()}; "
                    "all of them are read in one call"
                )
            if site.q_pos.dim() != 1:
                raise ValueError("the magnifier needs every coarse token; tokens were removed from this prompt")
            notes[self, "places"] = coarse.nonzero()[:, 1].reshape(batch, -1) + site.offset
        place = notes.get((self, "places"))
        if place is None:
            return
        if len(place) != batch:
            raise ValueError(f"coarse tokens of {len(place)} rows were read, and this call has {batch}")
        slots = site.q_pos if site.q_pos.dim() == 2 else site.q_pos[None]
        rows = is_text(types) & (slots > place[:, -1:].to(slots.device))
        if self.rows is not None:
            given = self.rows.to(slots.device)
            if batch % max(1, len(given)):
                raise ValueError(f"rows is of {len(given)} rows, but the model reads {batch}")
            given = given.repeat_interleave(batch // len(given), 0)
            inside = slots.expand(batch, -1) < given.shape[1]
            asked = given.gather(1, slots.expand(batch, -1).clamp(0, given.shape[1] - 1))
            rows = torch.where(inside, asked, rows)
        notes[self, "rows"] = rows

    def _of_rows(self, batch: int) -> Tensor:
        assert self.detail is not None
        self._check()
        if not len(self.detail) or batch % len(self.detail):
            raise ValueError(f"detail is of {len(self.detail)} rows, but the model reads {batch}")
        # Beams repeat every row, one after another.
        return self.detail.repeat_interleave(batch // len(self.detail), 0)

    def _details(self, site: Site, q: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, turned to where their coarse tokens stand, and values; made while a prompt is read, kept for later."""
        notes, key = self.session.notes, (self, "keys", site.layer)
        reads = site.q_types is not None and bool((site.q_types == IMAGE).any())
        if not reads and key in notes:
            return notes[key]
        detail = self._of_rows(len(q)).to(q.device)
        k, v = self.projections[site.layer](detail.flatten(1, 2))
        if site.rotary:
            if site.rotation is None:
                raise ValueError(
                    f"layer {site.layer} ({site.name}): it is not known how this model applies its rotary positions, "
                    "so that details cannot be put at those of their coarse tokens"
                )
            k = site.rotation.turn(k, place.repeat_interleave(detail.shape[2], 1))
        notes[key] = (k.detach(), v.detach())
        return k.to(q.dtype), v.to(q.dtype)

    @torch.no_grad()
    def _select(self, site: Site, q: Tensor, k: Tensor, place: Tensor, rows: Tensor) -> Tensor:
        """(B, N, V) boolean, from the weights over the model's own keys."""
        assert site.mask is not None and site.k_pos is not None
        out = torch.zeros(*q.shape[::2], place.shape[1], dtype=torch.bool, device=q.device)[: len(q)]
        index = place - (site.k_pos[0] if site.k_pos.dim() == 1 else 0)
        if site.k_pos.dim() != 1 or bool((index < 0).any()):
            raise ValueError(
                f"layer {site.layer} ({site.name}): coarse tokens left its cache, so that nobody knows which of them "
                "are looked at"
            )
        asked = rows.any(0).nonzero()[:, 0]
        q, k = q.detach(), k.detach()
        for block in row_blocks(asked, q.shape[0] * q.shape[1] * k.shape[2]):
            scores, _ = score_rows(site, q, k, block, site.mask)
            out[:, block] = select_coarse(weights_of(site, scores, block), index, self.threshold)
        return out


def detail_of_points(points: Tensor, features: Tensor, centres: Tensor, count: int = 4, group: int = 1500) -> Tensor:
    """Details behind coarse tokens: of the points nearest to each, the mean features around some far from one another.

    Args:
        points: (B, P, d) places, in space or in a picture.
        features: (B, P, C) of the points.
        centres: (B, V, d) of the coarse tokens.
        count: G details each.
        group: points that belong to a coarse token, nearest first; each detail is the mean of ``group // count`` of
            them.

    Returns:
        (B, V, G, C).

    >>> points = torch.tensor([[[0.0], [1.0], [10.0], [11.0]]])
    >>> detail_of_points(points, points, torch.tensor([[[0.4], [10.4]]]), count=2, group=2).flatten().tolist()
    [0.0, 1.0, 10.0, 11.0]
    """
    check_axes("points", points, B=None, P=None, d=None)
    check_axes("features", features, B=len(points), P=points.shape[1], C=None)
    check_axes("centres", centres, B=len(points), V=None, d=points.shape[2])
    check_int("count", count, least=1)
    check_int("group", group, least=count, most=points.shape[1])
    high = stats_dtype(points.dtype)
    places = points.to(high)
    near = torch.cdist(centres.to(high), places).topk(group, -1, largest=False).indices  # (B, V, group)
    batch = torch.arange(len(points), device=points.device)[:, None, None]
    here, held = places[batch, near], features[batch, near]
    chosen = torch.zeros(*near.shape[:2], count, dtype=torch.long, device=points.device)
    far = torch.full(near.shape, torch.inf, dtype=high, device=points.device)
    for i in range(1, count):
        last = here.gather(2, chosen[..., i - 1, None, None].expand(-1, -1, 1, here.shape[-1]))
        far = torch.minimum(far, (here - last).square().sum(-1))
        chosen[..., i] = far.argmax(-1)
    heads = here.gather(2, chosen[..., None].expand(-1, -1, -1, here.shape[-1]))
    members = torch.cdist(heads, here).topk(group // count, -1, largest=False).indices  # (B, V, G, group // G)
    flat = members.flatten(2)[..., None].expand(-1, -1, -1, held.shape[-1])
    return held.gather(2, flat).unflatten(2, members.shape[2:]).mean(3)


def detail_of_grid(fine: Tensor, grid: tuple[int, int]) -> Tensor:
    """The cells of a finer grid behind each token of a coarse one.

    Args:
        fine: (B, H, W, C), with sides that are multiples of the coarse ones.
        grid: (rows, columns) of coarse tokens.

    Returns:
        (B, rows * columns, G, C), row by row.

    >>> detail_of_grid(torch.arange(8.0).view(1, 2, 4, 1), (1, 2)).squeeze(-1).tolist()
    [[[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]]]
    """
    check_axes("fine", fine, B=None, H=None, W=None, C=None)
    rows, cols = check_size("grid", grid)
    if fine.shape[1] % rows or fine.shape[2] % cols:
        raise ValueError(f"fine is {fine.shape[1]} x {fine.shape[2]}, which are no multiples of grid={tuple(grid)}")
    cells = fine.unflatten(2, (cols, -1)).unflatten(1, (rows, -1)).transpose(2, 3)
    return cells.flatten(3, 4).flatten(1, 2)
