"""PrimeComposer: an object of one picture is put into another, and attention is steered so that it fits in.

Both pictures are inverted (:mod:`attnlib.steer.diffusion.invert`); only the box around the object is generated. Let J
be the places of the object where it is to stand, and g where it stands in its own picture. At first steps

- a pass on the background with the object pasted in, whose self-attention reads the object's places g of the reference
  alone, gives the logits ``L = scale Q K[g]^T`` of each layer;
- in the pass that generates, logits of conditional rows become ``L`` in the columns J, then ``L^T`` in the rows J.

Words of the object may be read at the places of the object only. Outside the box the latents are the background's own
for a share of the steps, and the object the reference's for a smaller share.

::

    path, reference = (dpm_invert(predict, pipe.scheduler, z, 20) for z in (background, object))
    compose = PrimeComposer(path, reference, mask, shift=(10, -4), words=("corgi",))
    with attnlib.attach(pipe, compose):
        image = pipe("a corgi on a sofa", latents=compose.start(), num_inference_steps=20, guidance_scale=2.5).images
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...checks import check_choice, check_flag, check_int, check_ints, check_real, check_tensor, check_tensors, shaped
from ...hooks.denoiser import CallSite, rows_of
from ...hooks.intervention import Intervention, Probe, implements
from ...hooks.pipelines import Stepped
from ...hooks.site import Site
from .losses import check_words
from .prompts import spans_of
from .realcustom import RealCustom
from .tiles import TiledDenoiser


@shaped(mask="bool (h, w)")
def places(mask: Tensor, grid: Sequence[int], shift: Sequence[int] = (0, 0)) -> tuple[list[int], list[int]]:
    """An object's places on a grid, ``(in its own picture, where it is to stand)``, those that stand in the frame.

    Args:
        mask: (h, w) where the object is, at the resolution of the latents.
        grid: of a layer; every so many places of the mask are taken, so that thin objects may vanish.
        shift: (down, right) from its own picture to the other, in places of the mask.

    >>> places(torch.tensor([[True, True, False, False]] * 4), (2, 2), (2, 0))
    ([0], [2])
    """
    h, w = grid
    steps = [-(-side // size) for side, size in zip(mask.shape, (h, w), strict=True)]
    some = mask[:: steps[0], :: steps[1]]
    if tuple(some.shape) != (h, w):
        raise ValueError(f"mask {tuple(mask.shape)} has no sides that a grid of {h} x {w} divides")
    down, right = (int(by / step) for by, step in zip(shift, steps, strict=True))
    own, other = [], []
    for y, x in some.nonzero().tolist():
        if 0 <= y + down < h and 0 <= x + right < w:
            own.append(y * w + x)
            other.append((y + down) * w + x + right)
    return own, other


@shaped(scores="float (..., N, N)", logits="float (..., N, J)")
def inject(scores: Tensor, logits: Tensor, at: Sequence[int]) -> Tensor:
    """Logits (..., N, N) with given ones in the columns ``at`` and, after them, transposed in the rows.

    >>> inject(torch.zeros(2, 2), torch.tensor([[1.0], [2.0]]), [1]).tolist()
    [[0.0, 1.0], [1.0, 2.0]]
    """
    if logits.shape[-1] != len(at):
        raise ValueError(f"logits are of {logits.shape[-1]} places, but {len(at)} are named")
    index = torch.as_tensor(check_ints("at", at, least=0, most=scores.shape[-1] - 1), device=scores.device)
    new = scores.index_copy(-1, index, logits)
    return new.index_copy(-2, index, logits.transpose(-1, -2))


@shaped(scores="float (..., N, T)")
def confine(scores: Tensor, inside: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """Logits (..., N, T) where the places outside ``inside`` may not read ``tokens``.

    >>> confine(torch.zeros(2, 2), [1], [0]).tolist()
    [[-inf, 0.0], [0.0, 0.0]]
    """
    outside = torch.ones(scores.shape[-2], dtype=torch.bool, device=scores.device)
    outside[list(check_ints("inside", inside, least=0, most=len(outside) - 1))] = False
    named = torch.zeros(scores.shape[-1], dtype=torch.bool, device=scores.device)
    named[list(check_ints("tokens", tokens, least=0, most=len(named) - 1))] = True
    return scores.masked_fill(outside[:, None] & named, float("-inf"))


class PrimeComposer(Intervention):
    """Composition of an object of one picture with another, along inversions of both.

    Args:
        background: latents of an inversion of the background, the clean ones first, (1, C, h, w) each.
        reference: of an inversion of the object's picture, as many.
        mask: (h, w) where the object is in its picture, at the resolution of the latents.
        shift: (down, right) to where it is to stand.
        box: (top, left, bottom, right) in latents, what is generated; that of the shifted mask by default.
        words: words of the prompt, or numbers of their tokens, that only the object's places may read.
        inject: share of the steps at which logits are injected (tau_a).
        paste: share at which the rest is the background's own (tau_b).
        keep: share at which the object is the reference's own (tau_c).
        refresh: the reference whose keys are read has, from the second step on, the object as it is generated.
        blend: at injected steps the denoiser runs once more without injection, and what injection changes is amplified
            as guidance is: ``e_u + s (e_i - e_ui) + s (e_i - e)``, with e and e_u what it predicts without injection,
            e_i and e_ui with it.
        order: of the solver, which the shares are counted by: up to step ``share steps + 1 - order``; the scheduler's
            own by default.
        layers: numbers or name patterns; ``None`` for all.
        compat: ``"authors"`` for queries of the reference, not of the composite, as in the released code.

    Raises:
        ValueError: at attach, a model outside a pipeline; when the pipeline is called, paths of other steps or shapes,
            a word that is not in the prompt; an empty mask, an object wholly outside the frame.

    Steps count runs of the denoiser. The region constraint of the words, inactive in the release, works here.

    Reference: Wang et al., 2024, arXiv 2403.05053.

    >>> PrimeComposer([torch.zeros(1, 4, 4, 4)] * 2, [torch.zeros(1, 4, 4, 4)] * 2, torch.eye(4).bool()).box
    (0, 0, 4, 4)
    """

    name: ClassVar[str] = "primecomposer"
    kinds: ClassVar[tuple[str, ...]] = ("self", "cross")
    whole_map: ClassVar[bool] = True
    moves_latents = True

    def __init__(
        self,
        background: Sequence[Tensor],
        reference: Sequence[Tensor],
        mask: Tensor,
        shift: Sequence[int] = (0, 0),
        box: Sequence[int] | None = None,
        words: Sequence[Any] | None = None,
        inject: float = 0.4,
        paste: float = 0.8,
        keep: float = 0.2,
        refresh: bool = True,
        blend: bool = False,
        order: int | None = None,
        layers: Sequence[int | str] | None = None,
        compat: str | None = None,
    ):
        check_choice("compat", compat, (None, "authors"))
        check_tensor("mask", mask)
        self.background = check_tensors("background", background, least=2)
        self.reference = check_tensors("reference", reference, least=2)
        if len(self.background) != len(self.reference):
            raise ValueError(
                f"background and reference must have as many steps, got {len(background)} and {len(reference)} latents"
            )
        shape = self.background[0].shape
        for name, path in (("background", self.background), ("reference", self.reference)):
            for z in path:
                if z.dim() != 4 or len(z) != 1 or z.shape != shape:
                    raise ValueError(f"{name} must hold latents {tuple(shape)}, one picture each, got {tuple(z.shape)}")
        if mask.shape != shape[-2:] or not bool(mask.any()):
            raise ValueError(f"mask must be {tuple(shape[-2:])} as the latents and not empty, got {tuple(mask.shape)}")
        if len(shift) != 2:
            raise ValueError(f"shift must be (down, right), got {shift!r}")
        self.mask, self.shift = mask.bool(), (check_int("shift", shift[0]), check_int("shift", shift[1]))
        self.target = torch.zeros_like(self.mask)
        _, there = places(self.mask, self.mask.shape, self.shift)
        if not there:
            raise ValueError(f"shift {self.shift} moves the object out of the picture")
        self.target.view(-1)[there] = True
        rows, columns = self.target.any(1).nonzero().flatten(), self.target.any(0).nonzero().flatten()
        if box is None:
            box = (int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1)
        if len(box) != 4 or not (0 <= box[0] < box[2] <= shape[-2] and 0 <= box[1] < box[3] <= shape[-1]):
            raise ValueError(f"box must be (top, left, bottom, right) within {tuple(shape[-2:])}, got {tuple(box)}")
        self.box = tuple(box)
        self.words = None if words is None else check_words(words)
        self.inject = check_real("inject", inject, least=0, most=1)
        self.paste = check_real("paste", paste, least=0, most=1)
        self.keep = check_real("keep", keep, least=0, most=1)
        self.refresh = check_flag("refresh", refresh)
        self.blend = check_flag("blend", blend)
        self.order = None if order is None else check_int("order", order, least=1)
        self.layers, self.compat = layers, compat

    def start(self, seed: int = 0) -> Tensor:
        """Latents to begin with: the background's noise, in the box the reference's where the object is, fresh noise
        around it."""
        last = self.background[-1]
        drawn = torch.randn(last.shape, generator=torch.Generator().manual_seed(seed)).to(last)
        inside = torch.where(self.target.to(last.device), self._there(self.reference[-1]), drawn)
        return torch.where(self._box(last), inside, last)

    # ---- pictures

    def _box(self, like: Tensor) -> Tensor:
        mask = torch.zeros(self.mask.shape, dtype=torch.bool, device=like.device)
        top, left, bottom, right = self.box
        mask[top:bottom, left:right] = True
        return mask

    def _there(self, latents: Tensor, back: bool = False) -> Tensor:
        """The object's picture with the object where it is to stand, or (``back``) the other way round."""
        own, there = places(self.mask, self.mask.shape, self.shift)
        to, at = (own, there) if back else (there, own)
        flat = latents.flatten(-2)
        new = flat.clone()
        new[..., to] = flat[..., at]
        return new.unflatten(-1, self.mask.shape)

    # ---- attaching

    def conflicts(self, other: Intervention) -> str | None:
        if other.reuses_features:
            return f"PrimeComposer runs the model on two pictures, and {type(other).__name__} would mix what it keeps"
        if isinstance(other, TiledDenoiser):
            return "the object's places are those of the whole picture, and tiles cut it"
        stages = ("on_kv_read", "around_attention", "on_scores", "on_weights")
        inside = "self" in other.kinds and any(implements(other, stage) for stage in stages)
        if other.differentiates or isinstance(other, RealCustom) or (inside and not isinstance(other, Probe)):
            return f"{type(other).__name__} knows the pictures of a batch, and PrimeComposer runs two other ones"
        return None

    def on_attach(self, session: Any) -> None:
        if session.sampling is None:
            raise ValueError(
                f"PrimeComposer follows the steps of a pipeline, and {type(session.model).__name__} was attached to by "
                "itself; attach to the pipeline: attach(pipe, ...)"
            )

    # ---- one step

    def _limit(self, share: float, site: CallSite) -> int:
        config = site.sampling.pipe.scheduler.config
        order: int = self.order or config.get("solver_order", 1)
        assert site.steps is not None
        return int(share * site.steps + 1 - order)

    def around_denoiser(
        self, site: CallSite, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Tensor]
    ) -> Tensor:
        step, notes = site.step, self.session.notes
        if step is None:
            return call(inputs)
        if site.rows is None or site.prompts is None:
            raise ValueError(
                "PrimeComposer steers conditional rows, and which these are is not known in "
                f"{type(site.sampling.pipe).__name__}; say it: attach(pipe, ..., rows=('uncond', 'cond'))"
            )
        main = inputs[site.main]
        if site.steps != len(self.background) - 1:
            raise ValueError(f"paths have {len(self.background) - 1} steps, the pipeline takes {site.steps}")
        if main.shape[1:] != self.background[0].shape[1:]:
            raise ValueError(
                f"paths hold latents {tuple(self.background[0].shape[1:])}, the denoiser reads {tuple(main.shape[1:])}"
            )
        index = [i for i, row in enumerate(site.rows) if row == "cond"]
        self._amend(site)
        if self.words is not None and index and (self, "tokens") not in notes:
            spans = spans_of(site.sampling, self.words)
            notes[self, "tokens"] = [sorted({t for span in some for t in span}) for some in spans]
        notes[self, "logits"] = None
        if index and self.inject and step < max(1, self._limit(self.inject, site)):
            notes[self, "logits"] = self._correlate(site, inputs, call, index)
        try:
            found = call(inputs)
        finally:
            blend, notes[self, "logits"] = self.blend and notes[self, "logits"] is not None, None
        return self._blended(site, found, call(inputs)) if blend else found

    @staticmethod
    def _blended(site: CallSite, injected: Tensor, plain: Tensor) -> Tensor:
        """Rows whose guidance by any scale is that of the plain ones plus so much of what injection changed."""
        assert site.rows is not None
        cond, free = ([i for i, row in enumerate(site.rows) if row == of] for of in ("cond", "uncond"))
        if not free:
            return injected
        if len(cond) != len(free):
            raise ValueError(f"blend needs a row without the prompt for each with it, got rows {list(site.rows)}")
        new = plain.clone()
        new[cond] = plain[free] + (injected[cond] - injected[free]) + (injected[cond] - plain[cond])
        return new

    def _correlate(
        self, site: CallSite, inputs: dict[str, Any], call: Callable[..., Tensor], index: list[int]
    ) -> dict[int, Tensor]:
        """Logits of each self-attention layer between the composite and the object of the reference."""
        assert site.step is not None
        notes, main, scale = self.session.notes, inputs[site.main], site.sampling.scale
        here, there = (path[-1 - site.step].to(main) for path in (self.background, self.reference))
        composite = torch.where(self.target.to(main.device), self._there(there), here).expand(len(index), -1, -1, -1)
        reference = there.expand(len(index), -1, -1, -1)
        if self.refresh and site.step:
            now = main[index] / scale
            reference = torch.where(self.mask.to(main.device), self._there(now, back=True), reference)
        twice = rows_of(inputs, index + index, len(main))
        twice[site.main] = (torch.cat([composite, reference]) * scale).to(main)
        logits: dict[int, Tensor] = {}
        notes[self, "record"] = logits
        try:
            with torch.no_grad(), self.session.some_rows(index + index):
                call(twice)
        finally:
            notes[self, "record"] = None
        return logits

    def _amend(self, site: CallSite) -> None:
        notes = self.session.notes
        if notes.get((self, "amended")) == site.step:
            return
        notes[self, "amended"] = site.step
        assert site.step is not None
        after = site.step + 1
        keep, paste = after < self._limit(self.keep, site), after < self._limit(self.paste, site)
        if not (keep or paste):
            return

        def step(stepped: Stepped) -> Tensor:
            x = stepped.after
            here, there = (path[-1 - after].to(x) for path in (self.background, self.reference))
            if keep:
                return torch.where(self.target.to(x.device), self._there(there), here).expand_as(x)
            return torch.where(self._box(x), x, here)

        site.sampling.amend(step)

    # ---- attention

    def _grid(self, site: Site) -> tuple[list[int], list[int]]:
        layout = site.q_layout
        if layout is None or "image" not in layout.names or len(layout.grid("image")) != 2:
            raise ValueError(f"layer {site.layer} ({site.name}): the grid of its {site.n_queries} places is not known")
        grid = layout.grid("image")
        notes, key = self.session.notes, (self, "places", grid)
        if key not in notes:
            notes[key] = places(self.mask, grid, self.shift)
        return notes[key]

    def around_attention(self, site: Site, q: Tensor, k: Tensor, v: Tensor, call: Callable[..., Tensor]) -> Tensor:
        record = self.session.notes.get((self, "record"))
        if record is None or site.kind != "self":
            return call(q, k, v)
        own, _ = self._grid(site)
        if not own:  # too thin for this layer
            return call(q, k, v)
        half = len(q) // 2
        k, v = (t[half:, :, own].repeat(2, 1, 1, 1) for t in (k, v))
        if self.compat == "authors":
            q = q[half:].repeat(2, 1, 1, 1)
        keys = k[:half].repeat_interleave(site.heads // k.shape[1], 1)
        record[site.layer] = (q[:half].float() @ keys.float().transpose(-1, -2)) * site.scale
        every = torch.ones(1, 1, q.shape[2], len(own), dtype=torch.bool, device=q.device)
        return call(q, k, v, mask=every)

    def edit_rows(self, site: Site) -> Tensor | None:
        notes = self.session.notes
        idle = notes.get((self, "record")) is not None
        if site.kind == "self":
            idle = idle or not notes.get((self, "logits"))
        else:
            idle = idle or (self, "tokens") not in notes
        if idle:
            return torch.zeros(0, dtype=torch.long, device=None if site.q_pos is None else site.q_pos.device)
        return None

    def on_scores(self, site: Site, scores: Tensor, rows: Tensor) -> Tensor:
        notes = self.session.notes
        if notes.get((self, "record")) is not None or site.rows is None or site.prompts is None:
            return scores
        own, there = self._grid(site)
        new, index = list(scores.unbind(0)), [i for i, row in enumerate(site.rows) if row == "cond"]
        if site.kind == "self":
            logits = (notes.get((self, "logits")) or {}).get(site.layer)
            if logits is None or len(logits) != len(index):
                return scores
            for n, i in enumerate(index):
                new[i] = inject(scores[i], logits[n].to(scores), there)
            return torch.stack(new)
        tokens = notes.get((self, "tokens"))
        if tokens is None or not there or (site.k_layout is not None and site.k_layout.names != ("text",)):
            return scores
        for i in index:
            if tokens[site.prompts[i]]:
                new[i] = confine(scores[i], there, tokens[site.prompts[i]])
        return torch.stack(new)
