"""IR-Diffusion: subjects of a series of pictures read themselves in the reference, and no other subject.

The pictures of a series are denoised side by side, and those of ``references`` are read by the others. With masks of
subject i in the target (T) and in the reference (R), self-attention of the target becomes

    ``O_i  = Attn(Q_i^T, [K_i^R, K_i^T, K_bg^T], [V_i^R, V_i^T, V_bg^T])``      (isolation),
    ``O_bg = Attn(Q_bg, K^T, V^T)``,

each with its keys gathered. Features know where they are, so that a subject that stands elsewhere in the reference is
found less easily: reposition takes K_i^R and V_i^R from the box of the subject in the reference, between its cells, to
its box in the target (or both to one box ``to``, and the result back), and exchanges the share of the features that
comes from the place. That share is what the same layer makes of a blank latent.

There is no released code. The equations are the paper's; our reading is all that the text leaves open: the share of the
place, masks from the words' maps of the step before, who has a cell that two subjects want, which layers and steps, and
that references are drawn as they are by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...checks import check_choice, check_flag, check_int, check_real
from ...hooks.denoiser import CallSite, rows_of, step_of
from ...hooks.intervention import ATTENTION_STAGES, Intervention, Probe, implements
from ...hooks.maps import Maps
from ...hooks.site import Site
from ...ops import attention
from .maps import normalize, of_spans
from .prompts import context_spans, per_prompt
from .regions import (
    PRIORITIES,
    against_tiles,
    attention_by_label,
    box_masks,
    check_box,
    image_grid,
    images_of,
    label_map,
    mask_box,
    moved,
    resized,
)

BACKGROUND = ("target", "both")
POSITIONS = ("blank", None)

Source = tuple[Tensor, Tensor, Tensor]


class IRDiffusion(Intervention):
    """Isolation and reposition in the self-attention of a series of pictures.

    ::

        with attnlib.attach(pipe, IRDiffusion(["circle", "square"])):
            pipe(["a red circle and a blue square", "a blue square on a red circle"])

    Args:
        subjects: words of the subjects, the same for every prompt or a list for each, ``None`` where a prompt lacks
            one. Their masks are made of the maps of the step before; the first step is plain.
        masks: in their place (P, S, H, W), what is not zero belongs to subject s of prompt p (or of image p, where
            prompts have several); or for each prompt S boxes ``(left, top, right, bottom)`` in shares of the sides,
            ``None`` where it lacks one.
        references: numbers of the prompts whose pictures the others read; image m of a prompt reads image m of them.
            Empty for isolation alone, in every picture.
        isolation: subjects read no other subject; without it they read all of their picture.
        reposition: what is read in the reference is moved to where the subject is.
        to: box to which both are moved, ``(left, top, right, bottom)`` in shares of the sides; ``None`` for the
            subject's own in the target.
        position: ``"blank"`` exchanges the share of the place, which costs one more row per step; ``None`` does not.
        background: places without a subject read the ``"target"``, or ``"both"`` it and such places of the reference.
        priority: who has a place that several subjects want: ``"first"`` or ``"last"``, the ``"smallest"`` or
            ``"largest"``, or their numbers in the order in which they are served.
        threshold: share of the maximum of a word's map from which on a place belongs to its subject.
        resolution: of those maps, as in :class:`attnlib.hooks.Maps`.
        steps: how many first steps it acts at, or their numbers; ``None`` for all.
        layers: numbers or name patterns of self-attention layers; ``None`` for all.

    Raises:
        ValueError: at attach, a model outside a pipeline, or company that runs some pictures by themselves; when the
            pipeline is called, masks for other prompts than there are, a subject that no reference has, and a word
            that is not in its prompt.

    Reference: He et al., 2024, arXiv 2411.19261.

    >>> IRDiffusion(["cat", "dog"]).layers
    ['up_blocks*']
    """

    name: ClassVar[str] = "ir-diffusion"
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    replaces_mask: ClassVar[bool] = True

    def __init__(
        self,
        subjects: Sequence[Any] | None = None,
        masks: Tensor | Sequence[Sequence[Any]] | None = None,
        references: Sequence[int] = (0,),
        isolation: bool = True,
        reposition: bool = True,
        to: Sequence[float] | None = None,
        position: str | None = "blank",
        background: str = "target",
        priority: str | Sequence[int] = "smallest",
        threshold: float = 0.5,
        resolution: int | Sequence[int] | None = 16,
        steps: int | Collection[int] | None = None,
        layers: Sequence[int | str] | None = ("up_blocks*",),
    ):
        if (subjects is None) == (masks is None):
            raise ValueError("give either subjects, words whose maps say where they are, or masks")
        if isinstance(subjects, str):
            raise TypeError(f"subjects must be a sequence of words, got the string {subjects!r}; write [{subjects!r}]")
        if subjects is not None and not len(subjects):
            raise ValueError("subjects are empty; give the word of at least one")
        if isinstance(priority, str):
            check_choice("priority", priority, PRIORITIES)
        check_choice("background", background, BACKGROUND)
        check_choice("position", position, POSITIONS)
        self.subjects = None if subjects is None else list(subjects)
        self.masks = masks if masks is None or isinstance(masks, Tensor) else _check_boxes(masks)
        if isinstance(self.masks, Tensor) and self.masks.dim() != 4:
            raise ValueError(
                f"masks must be (P, S, H, W), subjects of each prompt, got {tuple(self.masks.shape)}; or boxes"
            )
        self.references = [check_int("references", number, least=0) for number in references]
        self.isolation = check_flag("isolation", isolation)
        self.reposition = check_flag("reposition", reposition)
        self.to = None if to is None else check_box("to", to)
        self.position, self.background, self.priority = position, background, priority
        self.threshold = check_real("threshold", threshold, above=0, below=1)
        if isinstance(steps, int):
            check_int("steps", steps, least=0)
        elif steps is not None:
            steps = frozenset(check_int("steps", s, least=0) for s in steps)
        self.steps = steps
        self.layers = None if layers is None else list(layers)
        self._maps = None if subjects is None else Maps(resolution, gradient=False)
        self._alone, self._blank = False, None  # type: bool, dict[int, tuple[Tensor, ...]] | None

    # ---- attaching

    @property
    def companions(self) -> Sequence[Intervention]:
        return () if self._maps is None else (self._maps,)

    @property
    def identity(self) -> bool:
        return self.steps in (0, frozenset()) or not (self.references or self.isolation)

    @property
    def _looks_at_blank(self) -> bool:
        return bool(self.reposition and self.references and self.position == "blank")

    def conflicts(self, other: Intervention) -> str | None:
        if other.differentiates:
            return f"{type(other).__name__} runs some pictures by themselves, and they read each other here"
        if other.reuses_features and self._looks_at_blank:
            return f"{type(other).__name__} would keep what the model makes of the blank latent; give position=None"
        if other.moves_latents and self._looks_at_blank:
            return f"{type(other).__name__} would move the blank latent; give position=None"
        return against_tiles(other)

    def on_attach(self, session: Any) -> None:
        if session.sampling is None:
            raise ValueError(
                f"IRDiffusion acts between the pictures of a pipeline, and {type(session.model).__name__} was attached "
                "to by itself; attach to the pipeline: attach(pipe, ...)"
            )
        self._alone = not any(
            i is not self and not i.identity and "self" in i.kinds
            and (isinstance(i, Probe) or any(implements(i, stage) for stage in ATTENTION_STAGES))
            for i in session.interventions
        )  # fmt: skip

    # ---- who is where

    def around_denoiser(
        self, site: CallSite, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Tensor]
    ) -> Tensor:
        step, notes = step_of(site, self), self.session.notes
        acts = self.steps is None or (step < self.steps if isinstance(self.steps, int) else step in self.steps)
        if site.rows is None or site.prompts is None:
            raise ValueError(
                f"IRDiffusion reads other rows of the batch, and what they are is not known in "
                f"{type(site.sampling.pipe).__name__}; say it: attach(pipe, ..., rows=('uncond', 'cond'))"
            )
        images = site.sampling.prompt_count * site.sampling.images_per_prompt
        if (self, "masks") not in notes and self.masks is not None:
            notes[self, "masks"] = self._given(site, images)
        found = notes.get((self, "masks"))
        notes[self, "now"] = {"masks": found} if acts and found is not None else None
        main = inputs[site.main]
        looking = nullcontext() if self._maps is None else self._maps.paused()
        if notes[self, "now"] is not None and self._looks_at_blank:
            self._blank = {}
            one = rows_of(inputs, [0], len(main))
            try:
                with looking, self.session.some_rows([0]):
                    call({**one, site.main: torch.zeros_like(one[site.main])})
                notes[self, "now"]["places"] = self._blank
            finally:
                self._blank = None
        out = call(inputs)
        cond = [i for i, row in enumerate(site.rows) if row == "cond"]
        if self._maps is not None and cond and (self.steps is None or acts or found is None):
            notes[self, "masks"] = self._seen(site, cond)
        return out

    def _given(self, site: CallSite, images: int) -> Tensor:
        """(images, S, H, W) boolean masks as they were given."""
        prompts, each = site.sampling.prompt_count, site.sampling.images_per_prompt
        masks: Any = self.masks
        if not isinstance(masks, Tensor):
            empty = (0.0, 0.0, 1.0, 1.0)
            sides = (64, 64)
            masks = torch.stack(
                [
                    box_masks([box or empty for box in boxes], sides)
                    & torch.tensor([box is not None for box in boxes]).view(-1, 1, 1)
                    for boxes in masks
                ]
            )
        if len(masks) not in (prompts, images):
            raise ValueError(
                f"masks are for {len(masks)} prompts, but the pipeline was called with {prompts} prompts and {each} "
                "images of each"
            )
        masks = masks != 0
        if len(masks) == prompts:
            masks = masks.repeat_interleave(each, 0)
        return self._checked(masks, site)

    def _checked(self, masks: Tensor, site: CallSite) -> Tensor:
        prompts, each = site.sampling.prompt_count, site.sampling.images_per_prompt
        beyond = [r for r in self.references if r >= prompts]
        if beyond:
            raise ValueError(f"references names prompt {beyond[0]}, but the pipeline was called with {prompts}")
        there = masks.flatten(2).any(-1).unflatten(0, (prompts, each))
        for s in range(masks.shape[1]):
            if self.references and bool(there[:, :, s].any()) and not bool(there[self.references, :, s].any(0).all()):
                raise ValueError(
                    f"subject {s} is in a picture, but in none of the references {self.references}; its mask there is "
                    "empty"
                )
        return masks

    def _seen(self, site: CallSite, cond: list[int]) -> Tensor:
        """(images, S, h, w) boolean masks of the words' maps of the run that just ended."""
        assert self._maps is not None and self.subjects is not None and site.prompts is not None
        sampling, notes = site.sampling, self.session.notes
        spans = notes.get((self, "spans"))
        if spans is None:
            lists = _per_prompt(self.subjects, sampling.prompt_count)
            texts, longest = sampling.prompts, sampling.arguments.get("max_sequence_length")
            spans = []
            for p, words in enumerate(lists):
                some = [word for word in words if word is not None]
                found = iter(context_spans(sampling.pipe, None if texts is None else texts[p], some, longest))
                spans.append([None if word is None else next(found) for word in words])
            notes[self, "spans"] = spans
        maps = self._maps.take()[cond]
        masks = []
        for i, one in zip(cond, maps, strict=True):
            mine = spans[site.prompts[i]]
            named = normalize(of_spans(one, [span or [0] for span in mine]), "max") > self.threshold
            masks.append(named & torch.tensor([span is not None for span in mine], device=one.device).view(-1, 1, 1))
        return self._checked(torch.stack(masks), site)

    # ---- attention

    def around_attention(self, site: Site, q: Tensor, k: Tensor, v: Tensor, call: Callable[..., Tensor]) -> Tensor:
        if self._blank is not None:
            self._blank[site.layer] = tuple(_as_map(t, image_grid(site))[0] for t in (q, k, v))
            return call(q, k, v)
        now = self.session.notes.get((self, "now"))
        if now is None or site.prompts is None or site.rows is None:
            return call(q, k, v)
        if site.mask is not None and site.mask.allowed is not None:
            raise ValueError(f"layer {site.layer} ({site.name}) has a mask of its own, which isolation cannot keep")
        grid = image_grid(site)
        labels = now.get(grid)
        if labels is None:
            labels = now[grid] = label_map(resized(now["masks"], grid, "any"), self.priority).to(q.device)
        rows: dict[int, list[int]] = {}
        for row, image in enumerate(images_of(site.rows)):
            rows.setdefault(image, []).append(row)
        each = len(rows) // (max(site.prompts) + 1)
        refs = {r * each + m for r in self.references for m in range(each)}
        targets = [image for image in rows if image not in refs]
        plain = sorted(row for image in rows if image in refs for row in rows[image])
        if self._alone and targets:
            out = q.new_empty(*q.shape[:3], v.shape[-1])
            if plain:
                own = attention(q[plain], k[plain], v[plain], scale=site.scale)
                out = out.index_copy(0, torch.tensor(plain, device=q.device), own)
        else:
            out = call(q, k, v)
        places = now.get("places", {}).get(site.layer)
        for image in targets:
            mine = rows[image]
            sources = [(k[mine], v[mine], labels[image])]
            for r in self.references:
                other = r * each + image % each
                sources.append((k[rows[other]], v[rows[other]], labels[other]))
            new = self._picture(q[mine], sources, places, site.scale)
            out = out.index_copy(0, torch.tensor(mine, device=q.device), new.to(out.dtype))
        return out

    def _picture(self, q: Tensor, sources: list[Source], places: tuple[Tensor, ...] | None, scale: float) -> Tensor:
        """Attention of one target: (B, H, N, Dv), B its rows.

        Args:
            sources: keys, values and labels (h, w) of the target, then of its references.
            places: (heads, D, h, w) shares of the place in queries, keys and values; ``None`` for none.
        """
        mine = sources[0][2]
        count = int(max(int(labels.max()) for _, _, labels in sources))
        k, v, kinds = self._gathered(sources, count, places)
        # Kinds of keys: the target's 0 to S, S + s for subject s of a reference, then the rest of references.
        reads = torch.zeros(count + 1, 2 * count + 2, dtype=torch.bool, device=q.device)
        reads[:, 0] = reads[0, : count + 1] = reads[0, 2 * count + 1] = True
        for s in range(1, count + 1):
            reads[s, s] = reads[s, count + s] = True
            if not self.isolation:
                reads[s, : count + 1] = True
        asking, kind = mine.flatten().expand(len(q), -1), kinds.expand(len(q), -1)
        own = torch.arange(q.shape[2], device=q.device)
        if self.to is None or not self.reposition:
            return attention_by_label(q, k, v, asking, kind, reads, own, scale)
        first = reads.clone()
        first[1:] = False
        out = attention_by_label(q, k, v, asking, kind, first, own, scale)
        for s in range(1, count + 1):
            if bool((mine == s).any()):
                others = reads[s].clone()
                others[s] = False
                rest = others[kinds].nonzero().flatten()
                target = (q, *sources[0][:2])
                out = self._in_box(out, target, mine == s, (k[:, :, rest], v[:, :, rest]), places, scale)
        return out

    def _gathered(
        self, sources: list[Source], count: int, places: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values (B, Hk, M, D) of the target and of its references, these moved, and their kinds (M,)."""
        k, v, mine = sources[0]
        grid, keys, values, kinds = tuple(mine.shape), [k], [v], [mine.flatten()]
        for rk, rv, theirs in sources[1:]:
            if self.background == "both":
                at = (theirs.flatten() == 0).nonzero().flatten()
                keys.append(rk[:, :, at])
                values.append(rv[:, :, at])
                kinds.append(torch.full_like(at, 2 * count + 1))
            for s in range(1, count + 1):
                there, here = mask_box(theirs == s), mask_box(mine == s)
                if there is None or here is None:
                    continue
                if self.reposition:
                    box, mask = here if self.to is None else _cells(self.to, grid), theirs == s
                    shares = places or (None, None, None)
                    some = [_placed(t, grid, there, box, shares[n], mask) for n, t in ((1, rk), (2, rv))]
                    inside = _inside(mask, there, box)
                else:
                    some, inside = [rk, rv], (theirs == s).flatten()
                keys.append(some[0][:, :, inside].to(k.dtype))
                values.append(some[1][:, :, inside].to(v.dtype))
                kinds.append(torch.full((int(inside.sum()),), count + s, device=k.device))
        return torch.cat(keys, 2), torch.cat(values, 2), torch.cat(kinds)

    def _in_box(
        self,
        out: Tensor,
        target: tuple[Tensor, Tensor, Tensor],
        mask: Tensor,
        rest: tuple[Tensor, Tensor],
        places: tuple[Tensor, ...] | None,
        scale: float,
    ) -> Tensor:
        """The output with one subject (h, w) computed in the common box and put back.

        Args:
            target: its queries, keys and values.
            rest: the other keys and values that it reads.
        """
        grid, here = tuple(mask.shape), mask_box(mask)
        assert here is not None and self.to is not None
        box = _cells(self.to, grid)
        shares = places or (None, None, None)
        q, k, v = (_placed(t, grid, here, box, shares[n], mask).to(t.dtype) for n, t in enumerate(target))
        inside = _inside(mask, here, box)
        new = attention(
            q, torch.cat([rest[0], k[:, :, inside]], 2), torch.cat([rest[1], v[:, :, inside]], 2), scale=scale
        )
        share = None if places is None else places[2].repeat_interleave(new.shape[1] // places[2].shape[0], 0)
        picture = new.new_zeros(*new.shape[:2], new.shape[-1], *grid)
        picture[..., box[0] : box[2], box[1] : box[3]] = new.transpose(-2, -1).unflatten(-1, _sides(box))
        whole = box_masks([self.to], grid)[0].to(mask.device)
        back = _placed(picture.flatten(-2).transpose(-2, -1), grid, box, here, share, whole)
        top, left, bottom, right = here
        at = mask.flatten().nonzero().flatten()
        return out.index_copy(2, at, back[:, :, mask[top:bottom, left:right].flatten()].to(out.dtype))


def _check_boxes(boxes: Sequence[Sequence[Any]]) -> list[list[Any]]:
    lists = [[None if box is None else check_box("masks", box) for box in some] for some in boxes]
    if not lists or len({len(some) for some in lists}) != 1 or not lists[0]:
        raise ValueError(
            f"masks must hold as many boxes for every prompt, None for a subject that it lacks; got "
            f"{[len(some) for some in lists]}"
        )
    return lists


def _per_prompt(subjects: list[Any], prompts: int) -> list[list[Any]]:
    """Words of each subject for every prompt."""
    lists = per_prompt(subjects, prompts, "subjects")
    if len({len(some) for some in lists}) != 1:
        raise ValueError(
            f"subjects must be as many for each of {prompts} prompts, None for one that it lacks; got {subjects!r:.80}"
        )
    return lists


def _as_map(t: Tensor, grid: Sequence[int]) -> Tensor:
    """(B, H, N, D) as (B, H, D, h, w)."""
    return t.transpose(-2, -1).unflatten(-1, tuple(grid))


def _cells(box: Sequence[float], grid: Sequence[int]) -> tuple[int, int, int, int]:
    found = mask_box(box_masks([box], grid)[0])
    assert found is not None
    return found


def _sides(box: Sequence[int]) -> tuple[int, int]:
    return box[2] - box[0], box[3] - box[1]


def _inside(mask: Tensor, box: Sequence[int], to: Sequence[int]) -> Tensor:
    """Which cells of ``to``, flat, a mask (h, w) covers when its box is moved there."""
    share = moved(mask.double(), box, to, inside=True)
    return (share >= min(0.5, float(share.max()))).flatten()


def _placed(
    t: Tensor, grid: Sequence[int], box: Sequence[int], to: Sequence[int], share: Tensor | None, mask: Tensor
) -> Tensor:
    """(B, H, n, D) of the cells of ``to``: what (B, H, N, D) has in a box, with the share of the place (H, D, h, w).

    Only cells of the mask (h, w) are looked at.
    """
    maps = _as_map(t, grid)
    if share is not None:
        maps = maps - share.to(maps.dtype)
    weight = moved(mask.to(maps.dtype), box, to, inside=True)
    found = moved(torch.where(mask, maps, 0), box, to, inside=True) / torch.where(weight > 0, weight, 1)
    if share is not None:
        found = found + share[..., to[0] : to[2], to[1] : to[3]].to(found.dtype)
    return found.flatten(-2).transpose(-2, -1)
