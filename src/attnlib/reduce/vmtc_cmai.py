"""VMTC and CMAI: fewer and merged image tokens before the decoder, and text that looks only at what text looks at.

VMTC. The importance ``p_j`` of patch j is the attention that the vision tower's class token gives it (head mean). The K
most important tokens of an image stay. The others are clustered by direction into M clusters, and each cluster becomes
one token,

    ``sum_j p_j x_j / sum_j p_j``,

in the space of the vision features, before they are projected. K + M tokens go on.

CMAI. With ``A`` the attention weights of a layer of the decoder, averaged over heads, ``A_tt`` its block from text to
text and ``A_ti`` its block from text to image, the focus of text row t on image token j is

    ``F = A_tt A_ti``,

what the tokens that t attends to, itself included, see of j. Pairs of low focus are forbidden, and attention is
computed again without them. Image rows are untouched, and a text row always keeps its own key.

The paper's code is not released, and what is known of it comes from reviews. They do not say K, M, which layers, how
low is low, and whether the mask acts in the layer it was made in; here those are settings, and it does. Two choices are
ours: the normalised mean, and that a merged token stands where its most important member stood.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import shaped
from ..hooks.call import row_blocks, score_rows, weights_of
from ..hooks.choose import pack
from ..hooks.intervention import Intervention, implements
from ..hooks.session import Session
from ..hooks.site import Site
from ..hooks.tokens import IMAGE, is_text
from ..types import check_choice, to_list
from .base import Selector
from .mergers import cluster_rest
from .vision import spread
from .vtc_cls import VTCCLS

#: Names under which models keep what projects vision features into the decoder.
PROJECTORS = ("multi_modal_projector", "mm_projector", "projector", "connector")


class VMTC(VTCCLS):
    """Keep the most important tokens of each image and merge the others into clusters.

    Args:
        keep: K, tokens of each image that stay as they are: a number, a share or a selector.
        merge: M, clusters that the others are merged into; 0 drops them.
        start: first layer of the vision tower whose class token is asked.
        end: the layer after the last one; by default only the layer before the last, whose output are the features.
        space: ``"vision"``: clusters and merges features before they are projected; ``"decoder"``: afterwards.
        iterations: of the clustering.
        positions: ``"contiguous"`` or ``"original"``.
        what: ``"class"``, or ``"received"`` for towers without class token.
        tower: dotted path of the vision tower; found by its usual names otherwise.
        projector: dotted path of the module that projects features; found by its usual names otherwise.

    Raises:
        ValueError: a share outside [0, 1], a negative ``merge``; when run, K + M larger than an image.

    Reference: Yang et al., 2024, arXiv 2411.15453 (visual-modality token compression).

    >>> VMTC(keep=32, merge=8).merge
    8
    """

    name: ClassVar[str] = "vmtc"

    def __init__(
        self,
        keep: int | float | Selector,
        merge: int,
        start: int = -2,
        end: int | None = -1,
        space: str = "vision",
        iterations: int = 10,
        positions: str = "contiguous",
        what: str = "class",
        tower: str | None = None,
        projector: str | None = None,
    ):
        check_choice("space", space, ("vision", "decoder"))
        if isinstance(merge, bool) or not isinstance(merge, int) or merge < 0:
            raise ValueError(f"merge must be a non-negative integer: how many clusters; got {merge!r}")
        if iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {iterations}")
        super().__init__(keep, start, end, positions=positions, what=what, tower=tower)
        self.merge, self.space, self.iterations, self.projector = merge, space, iterations, projector

    @property
    def identity(self) -> bool:
        return super().identity and not self.merge

    def reset(self) -> None:
        super().reset()
        self._features: dict[str | None, list[Tensor]] = {}
        self._projecting = False

    def on_attach(self, session: Session) -> None:
        super().on_attach(session)
        if self.space == "vision" and self.merge:
            self._project = self._find_projector(session.model)
            session.hook(self._project.register_forward_pre_hook(self._take))

    def _find_projector(self, model: nn.Module) -> nn.Module:
        if self.projector is not None:
            try:
                return model.get_submodule(self.projector)
            except AttributeError as error:
                names = [n for n, _ in model.named_modules() if n and n.count(".") < 2]
                raise ValueError(
                    f"projector={self.projector!r} is not in {type(model).__name__}; it has {names}"
                ) from error
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in PROJECTORS:
                return module
        raise ValueError(
            f"{type(model).__name__} has no projector under the names {list(PROJECTORS)}; give its path, "
            "projector='...', or merge behind it: space='decoder'"
        )

    def _take(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not self._projecting and args:
            # One entry per run of the vision tower, which came just before.
            branch = self.session.branch
            self._features[branch] = [*self._features.get(branch, [])[: self.scorer.runs - 1], args[0]]

    def reduce(self, site: Site, hidden: Tensor, image: Tensor, selector: Selector) -> tuple[Tensor, Tensor] | None:
        everywhere = self.all_types(site) == IMAGE
        if self.elsewhere(site, everywhere):
            return None
        if int(everywhere.sum()) != int(image.sum()):
            raise ValueError(f"layer {site.layer}: tokens of images were removed before; give VMTC first")
        scores, source = self.scorer.of_prompt(everywhere)
        if site.branch is None:
            self._scores = scores
        count, n = scores.shape
        keep = self.chosen(scores, everywhere.sum(1) // n, selector)
        most = int(keep.sum(1).max()) + self.merge
        if most > n:
            raise ValueError(f"keep and merge ask for {most} tokens of images that have {n}")
        if not self.merge:
            return self.go_on(hidden, site, site.per_query(spread(keep, everywhere)))
        states = hidden[image].reshape(count, n, -1)
        features = states if self.space == "decoder" else self._vision_features(source, n)
        pieces = [
            cluster_rest(x, p, k, self.merge, self.iterations) for x, p, k in zip(features, scores, keep, strict=True)
        ]
        merged = torch.stack([piece[2] for piece in pieces])
        if self.space == "vision":
            self._projecting = True
            try:
                merged = self._project(merged)
            finally:
                self._projecting = False
        places = torch.stack([piece[1] for piece in pieces])
        states = states.scatter(1, places.unsqueeze(-1).expand_as(merged), merged.to(states.dtype))
        hidden = hidden.clone()
        hidden[image] = states.reshape(-1, hidden.shape[-1])
        stays = torch.stack([piece[0] for piece in pieces])
        return self.go_on(hidden, site, site.per_query(spread(stays, everywhere)))

    def _vision_features(self, source: Tensor, n: int) -> Tensor:
        found = self._features.get(self.scorer.source())
        features = torch.cat(found) if found else None
        if features is None or features.dim() != 3 or features.shape[1] != n or len(features) <= int(source.max()):
            shape = None if features is None else tuple(features.shape)
            raise ValueError(
                f"the projector read features of shape {shape}, not (images, {n}, C); merge behind it: space='decoder'"
            )
        return features[source]


# --------------------------------------------------------------------------------------------------------------------


@shaped(text_to_text="alike (..., R, T)", text_to_image="alike (..., T, I)")
def focus(text_to_text: Tensor, text_to_image: Tensor) -> Tensor:
    """``F = A_tt A_ti``: weights (..., R, T) of some rows of text and (..., T, I) -> (..., R, I).

    >>> focus(torch.eye(2), torch.tensor([[0.1], [0.4]])).flatten().tolist()
    [0.10000000149011612, 0.4000000059604645]
    """
    return text_to_text @ text_to_image


def low(values: Tensor, visible: Tensor, threshold: float, rule: str = "quantile") -> Tensor:
    """Which values of a row are low among those that are visible.

    Args:
        values: (..., I).
        visible: (..., I) boolean; others are never low.
        threshold: of the rule.
        rule: ``"quantile"``: below that quantile of the row; ``"mean"``: below so many times its mean; ``"value"``.

    Returns:
        (..., I) boolean.

    >>> low(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, True, True]), 1.0, "mean").tolist()
    [True, False, False]
    """
    check_choice("rule", rule, ("quantile", "mean", "value"))
    if not values.shape[-1]:
        return visible
    if rule == "value":
        limit = torch.full_like(values[..., :1], threshold)
    else:
        seen = values.masked_fill(~visible, float("nan"))
        if rule == "quantile":
            limit = seen.nanquantile(threshold, -1, keepdim=True)
        else:
            limit = threshold * seen.nanmean(-1, keepdim=True)
    return (values < limit) & visible


class CMAI(Intervention):
    """Keep text from attending to image tokens that the text as a whole hardly looks at.

    Args:
        threshold: how low a focus is low; 0 changes nothing.
        rule: ``"quantile"`` of the row, ``"mean"``: so many times the mean of the row, or ``"value"``.
        layers: layers to act on; ``None`` for all.
        per_head: every head has its own focus, instead of one from weights averaged over heads.

    Raises:
        ValueError: a negative threshold, a quantile above 1.

    Reference: Yang et al., 2024, arXiv 2411.15453 (cross-modality attention inhibition).

    >>> CMAI(0.3).rule
    'quantile'
    """

    name: ClassVar[str] = "cmai"
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    needs_types: ClassVar[bool] = True
    whole_prompt = True
    reads_weights = True

    def __init__(
        self,
        threshold: float = 0.2,
        rule: str = "quantile",
        layers: Sequence[int | str] | None = None,
        per_head: bool = False,
    ):
        check_choice("rule", rule, ("quantile", "mean", "value"))
        if not threshold >= 0 or (rule == "quantile" and threshold > 1):
            raise ValueError(f"threshold must not be negative, and at most 1 as a quantile; got {threshold}")
        self.threshold, self.rule, self.per_head = threshold, rule, per_head
        self.layers = to_list("layers", layers)
        self.reset()

    @property
    def identity(self) -> bool:
        return self.threshold == 0

    def reset(self) -> None:
        self._past: dict[tuple[str | None, int], tuple[Tensor, Tensor]] = {}
        self._counts: dict[int, tuple[int, int]] = {}

    def conflicts(self, other: Intervention) -> str | None:
        if implements(other, "on_cache"):
            return "the focus of a new token needs all keys of the text before it, and a compressed cache lost some"
        if other.splits_softmax:
            return "image and text keys are normalised apart, so there is no map in which the focus could be found"
        return None

    def around_attention(self, site: Site, q: Tensor, k: Tensor, v: Tensor, call: Callable[..., Tensor]) -> Tensor:
        where = (site.branch, site.layer)
        if site.phase == "prefill":
            self._past.pop(where, None)
            if site.branch is None:
                self._counts[site.layer] = (0, 0)
        assert site.q_types is not None and site.mask is not None
        key_types = site.key_types()[:, 0].expand(q.shape[0], -1)
        columns = pack(key_types == IMAGE)
        if not columns.shape[1]:
            return call(q, k, v)
        rows = is_text(site.q_types).any(0).nonzero().squeeze(1)
        if not len(rows):
            return call(q, k, v)
        weights, visible = self._weights(site, q, k, rows, columns)
        weights = weights * is_text(site.q_types)[:, None, rows, None]
        seen = self._read(weights, columns)
        past = self._remember(site, where, k, rows, seen)
        slots = site.key_slots()[:, 0, 0].expand(q.shape[0], -1)
        at = slots.clamp(min=0)[:, None, :, None].expand(-1, past.shape[1], -1, past.shape[-1])
        values = focus(weights * is_text(key_types)[:, None, None], past.gather(2, at))
        inhibited = low(values, visible & is_text(site.q_types)[:, None, rows, None], self.threshold, self.rule)
        if site.branch is None:
            done, of = self._counts.get(site.layer, (0, 0))
            self._counts[site.layer] = (done + int(inhibited.sum()), of + int(visible.sum()) * inhibited.shape[1])
        if not bool(inhibited.any()):
            return call(q, k, v)
        m = k.shape[2]
        index = columns.masked_fill(columns < 0, m)[:, None, None].expand(inhibited.shape)
        blocked = torch.zeros(*inhibited.shape[:3], m + 1, dtype=torch.bool, device=q.device)
        blocked = blocked.scatter(3, index, inhibited)[..., :m]
        allowed = site.mask.dense(q.device)
        allowed = allowed.expand(q.shape[0], max(allowed.shape[1], blocked.shape[1]), -1, -1).clone()
        allowed[:, :, rows] &= ~blocked
        return call(q, k, v, mask=allowed)

    def _weights(self, site: Site, q: Tensor, k: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (B, 1 or H, T, M) of the rows, and which image keys (B, 1, T, I) they may read."""
        assert site.mask is not None
        parts, seen = [], []
        for block in row_blocks(rows, q.shape[0] * q.shape[1] * k.shape[2]):
            scores, allowed = score_rows(site, q, k, block, site.mask)
            part = weights_of(site, scores, block)
            parts.append(part if self.per_head else part.mean(1, keepdim=True))
            if allowed is None:
                allowed = torch.ones(1, 1, len(block), k.shape[2], dtype=torch.bool, device=q.device)
            seen.append(self._read(allowed[:, :1].expand(q.shape[0], -1, -1, -1), columns))
        return torch.cat(parts, 2), torch.cat(seen, 2)

    @staticmethod
    def _read(values: Tensor, columns: Tensor) -> Tensor:
        """(B, h, T, M) at the image keys (B, I): (B, h, T, I), nothing where a sample has fewer."""
        index = columns.clamp(min=0)[:, None, None].expand(*values.shape[:3], -1)
        return values.gather(3, index).masked_fill((columns < 0)[:, None, None], 0)

    def _remember(self, site: Site, where: tuple[str | None, int], k: Tensor, rows: Tensor, seen: Tensor) -> Tensor:
        """What each token so far sees of the image, by slot (B, h, L, I), with the rows of this call."""
        slots = site.key_slots()[:, 0, 0].expand(k.shape[0], -1)
        length = int(slots.max()) + 1
        # Beams change places from step to step; the cached keys show which row went where.
        marks = slots.new_zeros(k.shape[0], length + 1, dtype=torch.float32)
        own_marks = k.detach().float().sum((1, 3)).nan_to_num()  # padding may hold anything
        marks = marks.scatter(1, slots.masked_fill(slots < 0, length), own_marks)[:, :length]
        if where in self._past:
            past, before = self._past[where]
            known = min(before.shape[1], int(site.offset))
            same = (marks[:, None, :known] == before[None, :, :known]).all(-1)
            if same.shape[0] != same.shape[1] or not bool(same.any(1).all()):
                raise ValueError(
                    f"layer {site.layer} ({site.name}): the cache is not the one of the prompt that was read before; "
                    "read the prompt inside the session"
                )
            own = torch.arange(len(same), device=k.device)
            past = past[torch.where(same.diagonal(), own, same.to(torch.int8).argmax(1))]
            past = F.pad(past, (0, 0, 0, max(0, length - past.shape[2])))
        elif site.offset:
            raise ValueError(
                f"layer {site.layer} ({site.name}): the prompt was not read inside the session, so what its text saw "
                "of the image is not known"
            )
        else:
            past = seen.new_zeros(k.shape[0], seen.shape[1], length + 1, seen.shape[3])[:, :, :length]
        assert site.q_pos is not None
        new = (site.q_pos if site.q_pos.dim() == 2 else site.q_pos.expand(k.shape[0], -1))[:, rows]
        wide = F.pad(past, (0, 0, 0, 1))
        index = new.masked_fill(new < 0, wide.shape[2] - 1)[:, None, :, None].expand(seen.shape)
        past = wide.scatter(2, index, seen)[:, :, :-1]
        self._past[where] = (past.detach(), marks)
        return past

    def results(self) -> dict[str, Any]:
        """``blocked``: share of the pairs of text and image that were forbidden, by layer, since the last prompt."""
        return {"blocked": {n: done / of if of else 0.0 for n, (done, of) in sorted(self._counts.items())}}
