"""PAINT: raise the scores of chosen image tokens at the position being generated.

The scaled scores of the newest query get, on two sets of image tokens,

    ``S~ = S + alpha |S|`` on the local set,  ``S~ = S + beta |S|`` on the summary set,

and the softmax follows. So weight on the sets never falls, whatever the sign of ``S``. With what the class token of
the vision encoder reads, summed over heads, *local* are the top quarter of the patches in its first layer, *summary*
are the outliers of its last layer but one (``t > Q3 + 1.5 (Q3 - Q1)``, a box plot's rule), which leave the local set.
At prefill only the last row of the prompt is edited; while decoding, every new one. One gain on all image tokens is
PAI (``sets="all"``).

What differs from the authors' code: sets are kept per image and per sample (theirs come from the first image of the
batch), grouped queries are served, an image without outliers is legal, and the mask stays what it is (they add ``|S|``
of masked entries, which is harmless only because image tokens are visible). The paper announces a gain per head, its
code has none: ``head_gain`` multiplies both gains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import check_real, shaped
from ..hooks.branches import NoImage
from ..hooks.hf.follow import watch_prompts
from ..hooks.intervention import Intervention
from ..hooks.session import Session
from ..hooks.site import Site
from ..hooks.tokens import IMAGE, PAD
from ..hooks.vision import VisionTower
from ..types import check_choice, stats_dtype, to_list
from ._watch import at_keys, image_slots, prompt_types
from .contrastive import ContrastiveDecoding


@shaped(first="float (B, N)", late="float (B, N)", spatial="float (B, K)")
def boost_sets(
    first: Tensor,
    late: Tensor,
    ratio: float = 0.25,
    spatial: Tensor | None = None,
    spatial_ratio: float = 0.0,
    compat: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Which patches are local and which are summary.

    Args:
        first: (B, N) what the class token reads of each patch in the first layer.
        late: (B, N) the same in the last layer but one.
        ratio: share of patches that are local.
        spatial: (B, N) another worth of each patch, whose best are local too. The authors take the row sums of the
            first layer's map, class token included (its N + 1 entries count as patches from there, the last as none);
            rows of a softmax sum to one, so that rounding decides.
        spatial_ratio: share of patches for which ``spatial`` speaks; 0 in the authors' code.
        compat: ``"authors"`` keeps ``int(N (k / N))`` of k outliers, which in floating point may be one fewer.

    Returns:
        Two (B, N) booleans without a common element.

    >>> late = torch.tensor([[0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 9.0]])
    >>> local, summary = boost_sets(torch.arange(8.0)[None], late, 0.25)
    >>> local[0].nonzero().flatten().tolist(), summary[0].nonzero().flatten().tolist()
    ([6], [7])
    """
    check_choice("compat", compat, (None, "authors"))
    check_real("ratio", ratio, least=0, most=1)
    check_real("spatial_ratio", spatial_ratio, least=0, most=1)
    count = first.shape[-1]
    wide = late.to(stats_dtype(late.dtype))
    at = torch.tensor([0.25, 0.75], dtype=wide.dtype, device=wide.device)
    q1, q3 = torch.quantile(wide, at, dim=-1, keepdim=True)
    summary = wide > q3 + 1.5 * (q3 - q1)
    if compat == "authors":
        for row, worth in zip(summary, wide, strict=True):
            stays = int(count * (int(row.sum()) / count))
            row[worth.masked_fill(~row, float("-inf")).argsort(descending=True)[stays:]] = False
    local = torch.zeros_like(summary).scatter(-1, first.topk(int(ratio * count), -1).indices, True)
    if spatial is not None:
        if spatial.shape[-1] not in (count, count + 1):
            raise ValueError(f"spatial must be (B, {count}) or (B, {count + 1}), got {tuple(spatial.shape)}")
        top = spatial.topk(int(spatial_ratio * count), -1).indices
        more = torch.zeros(*local.shape[:-1], spatial.shape[-1], dtype=torch.bool, device=local.device)
        local = local | more.scatter(-1, top, True)[..., :count]
    return local & ~summary, summary


@shaped(scores="float", gain="float")
def boost(scores: Tensor, gain: Tensor) -> Tensor:
    """``S + gain |S|`` where scores are finite.

    Args:
        scores: (B, H, r, M).
        gain: broadcastable to it.

    >>> boost(torch.tensor([-2.0, 2.0, float("-inf")]), torch.tensor([0.5, 0.5, 0.5])).tolist()
    [-1.0, 3.0, -inf]
    """
    if gain.dim() > scores.dim() or any(
        a not in (1, b) for a, b in zip(reversed(gain.shape), reversed(scores.shape), strict=False)
    ):
        raise ValueError(f"gain must broadcast to scores {tuple(scores.shape)}, got {tuple(gain.shape)}")
    size = scores.abs()
    return torch.where(size < float("inf"), torch.addcmul(scores, gain, size), scores)


class VisualBoost(Intervention):
    """Raise the scores of image tokens at the position being generated.

    Token types come from ``attach(..., token_types=...)``. A prompt without image is left alone.

    Args:
        alpha: gain of the local set.
        beta: gain of the summary set.
        local_ratio: share of an image's patches in the local set.
        sets: ``"vision"`` to read them off the vision encoder; ``"all"`` for one set of all image tokens with gain
            ``alpha`` (PAI); or two booleans ``(local, summary)``, (B, N) each, over the tokens of the prompt.
        head_gain: (H,) numbers that multiply both gains, or ``{layer: (H,)}``.
        first_layer: no layer before it is changed.
        layers: layers to change; ``None`` for all from ``first_layer`` on.
        vision: dotted path of the vision encoder, when it is not found by itself.
        branches: names of the decoding branches to act in; the default is the main one only.
        compat: of :func:`boost_sets`.

    Raises:
        ValueError: negative gains, a ratio outside [0, 1], no vision encoder with a class token, sets of tokens that
            are no image tokens.

    Reference: Arif et al., 2025, arXiv 2501.12206 (PAINT); Liu et al., 2024, arXiv 2407.21771 (PAI).

    >>> VisualBoost(alpha=0.5, sets="all").alpha
    0.5
    """

    name: ClassVar[str] = "visual-boost"
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    needs_types: ClassVar[bool] = True

    def __init__(
        self,
        alpha: float = 0.7,
        beta: float = 0.3,
        local_ratio: float = 0.25,
        sets: str | tuple[Tensor, Tensor] = "vision",
        head_gain: Tensor | Sequence[float] | Mapping[int, Sequence[float]] | None = None,
        first_layer: int = 2,
        layers: Sequence[int | str] | None = None,
        vision: str | None = None,
        branches: Sequence[str | None] = (None,),
        compat: str | None = None,
    ):
        check_choice("compat", compat, (None, "authors"))
        for name, value in (("alpha", alpha), ("beta", beta)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must not be negative, got {value}")
        if not 0.0 <= local_ratio <= 1.0:
            raise ValueError(f"local_ratio must lie in [0, 1], got {local_ratio}")
        if isinstance(sets, str):
            check_choice("sets", sets, ("vision", "all"))
        elif len(sets) != 2 or any(s.dim() != 2 or s.dtype != torch.bool for s in sets):
            raise ValueError("sets must be 'vision', 'all' or two (B, N) boolean tensors (local, summary)")
        self.alpha, self.beta, self.local_ratio, self.sets = alpha, beta, local_ratio, sets
        self.head_gain, self.first_layer, self.vision, self.compat = head_gain, first_layer, vision, compat
        self.branches = tuple(branches)
        self.layers = to_list("layers", layers)
        self.encoder: VisionTower | None = None
        self.reset()

    @property
    def identity(self) -> bool:
        return self.alpha == 0 and (self.beta == 0 or self.sets == "all")

    def reset(self) -> None:
        self._gain: dict[str | None, Tensor] = {}

    def wants(self, site: Site) -> bool:
        self._heads(site)
        return site.layer >= self.first_layer

    def on_attach(self, session: Session) -> None:
        if self.sets == "vision":
            self.encoder = VisionTower(session.model, (0, -2), "class", self.vision, "vision")
            self.encoder.watch(session)

        def started(given: dict[str, Any]) -> None:
            self._gain.pop(session.branch, None)

        watch_prompts(session, started)

    # ---- sets

    def _heads(self, site: Site) -> Tensor | None:
        gain = self.head_gain
        if isinstance(gain, Mapping):
            gain = gain.get(site.layer)
        if gain is None:
            return None
        gain = torch.as_tensor(gain, dtype=None if isinstance(gain, Tensor) else torch.float64)
        if gain.shape != (site.heads,):
            raise ValueError(
                f"VisualBoost: head_gain of layer {site.layer} ({site.name}) must be ({site.heads},), got "
                f"{tuple(gain.shape)}"
            )
        return gain

    def _by_slot(self, site: Site) -> Tensor:
        """(B, L) gain of each token of the prompt."""
        types = prompt_types(self._owner, site)
        image = types == IMAGE
        if self.sets == "all":
            return image.double() * self.alpha
        if not isinstance(self.sets, str):
            return self._given(types)
        assert self.encoder is not None
        first = self.encoder.scores(0, site.branch, "sum")
        late = self.encoder.scores(-2, site.branch, "sum")
        if not bool(image.any()):
            return torch.zeros(types.shape, dtype=torch.float64, device=types.device)
        if first is None or late is None:
            raise ValueError(
                "VisualBoost: the prompt has image tokens, but the vision encoder did not run for it, so there is "
                "nothing to choose them by; give sets='all' or two boolean tensors"
            )
        local, summary = boost_sets(first, late, self.local_ratio, compat=self.compat)
        gain = local.double() * self.alpha + summary.double() * self.beta
        return image_slots(types, gain, 0.0, self.encoder.class_token)

    def _given(self, types: Tensor) -> Tensor:
        rows = types.shape[0]
        sets = []
        for name, chosen in zip(("local", "summary"), self.sets, strict=True):
            assert isinstance(chosen, Tensor)
            if chosen.shape[1] > types.shape[1] or rows % chosen.shape[0]:
                raise ValueError(
                    f"VisualBoost: the {name} set is {tuple(chosen.shape)}, the prompt has {rows} rows of "
                    f"{types.shape[1]} tokens"
                )
            chosen = chosen.to(types.device).repeat_interleave(rows // chosen.shape[0], 0)
            if bool((chosen & (types[:, : chosen.shape[1]] != IMAGE)).any()):
                raise ValueError(f"VisualBoost: the {name} set holds tokens that are no image tokens")
            sets.append(chosen)
        if sets[0].shape != sets[1].shape:
            raise ValueError("VisualBoost: the local and the summary set must have the same shape")
        local, summary = sets
        return (local & ~summary).double() * self.alpha + summary.double() * self.beta

    # ---- stages

    def edit_rows(self, site: Site) -> Tensor:
        rows = self._newest(site).any(0).nonzero().squeeze(1)
        return rows[:0] if site.branch not in self.branches else rows

    def _newest(self, site: Site) -> Tensor:
        """(B, N) boolean: positions being generated, the last of the prompt and whatever comes after it.

        Several tokens at once are drafts, or a sequence that is read without a cache.
        """
        assert site.q_types is not None
        there = site.q_types != PAD
        prompt = None if self._owner is None else self._owner.notes.prompt_length
        if site.phase == "decode":
            return there
        if prompt is not None and site.q_pos is not None and site.branch is None:
            return there & (site.q_pos >= prompt - 1)
        place = torch.arange(there.shape[1], device=there.device)
        return there & (place == torch.where(there, place, 0).amax(1, keepdim=True))

    def on_scores(self, site: Site, scores: Tensor, rows: Tensor) -> Tensor:
        if site.branch not in self.branches:
            return scores
        if site.branch not in self._gain:
            self._gain[site.branch] = self._by_slot(site)
        by_slot = self._gain[site.branch]
        if not bool(by_slot.any()):
            return scores
        gain = at_keys(site, by_slot)[:, :, None]
        newest = self._newest(site).to(rows.device)[:, rows]
        gain = gain * newest[:, None, :, None]
        heads = self._heads(site)
        if heads is not None:
            gain = gain * heads.to(gain)[:, None, None]
        return boost(scores, gain.to(scores.dtype))

    def results(self) -> dict[str, object]:
        """The gain (B, L) of each token of the last prompt, by branch."""
        return {"gain": dict(self._gain)}


@shaped()
def image_guidance(scale: float = 2.0, cutoff: float = 0.1) -> ContrastiveDecoding:
    """PAI's guidance, to be attached beside a boost: ``scale (c - u) + u`` on log-probabilities.

    ``u`` is a branch without image, which is not boosted.

    Args:
        scale: 1 leaves the model's log-probabilities, without a cut-off.
        cutoff: share of the largest probability that a token needs.

    Reference: Liu et al., 2024, arXiv 2407.21771.

    >>> image_guidance(2.0).b
    -1.0
    """
    return ContrastiveDecoding(NoImage(), scale, 1 - scale, 0.0 if scale == 1 else cutoff, normalize=True)
