"""AutoStudio: every subject of a scene has its own text, its own reference and its own place.

Cross-attention has branches b: 0 the whole prompt, 1 the background, 2 and on the subjects. With weights T_b and I_b at
each place and one query for all of them,

    ``O = sum_b T_b Attn(Q, K(c_b), V(c_b)) + s (sum_{b >= 2} r_b I_b Attn(Q, W_k e_b, W_v e_b) + I_1 H_1)``,

c_b the texts, e_b the references' tokens, r_b whether subject b has a reference, H_1 what the background's text gave.
Unconditional rows read the negative prompt in every branch and empty references.

Subjects may be drawn alone before; their latents then lead the first steps (:class:`SubjectLatents`),

    ``z_i <- z_i (1 - m) + m ((1 - a) z_i + a z^s_i)``.

Who makes a scene of what a user says, and who looks over it, are functions for :class:`Studio`; no language model is
built in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_int, check_real, check_tensors, check_type, shaped
from ...hooks.attach import attach
from ...hooks.denoiser import CallSite, step_of
from ...hooks.intervention import Intervention
from ...hooks.pipelines import repeated
from ...hooks.site import Site
from ...ops import attention
from .prompts import encoded
from .references import ReferenceBranches
from .regions import Box, against_tiles, box_masks, check_box, image_grid, mask_box, mixed_branches, resized, shares


@dataclass(frozen=True)
class Subject:
    """One subject of a scene.

    Args:
        prompt: what it looks like.
        box: where it is, ``(left, top, right, bottom)`` in shares of the sides.
        name: under which its reference is kept from turn to turn.
    """

    prompt: str
    box: Box
    name: str | None = None

    def __post_init__(self) -> None:
        check_type("prompt", self.prompt, str)
        check_box("box", self.box)


@dataclass(frozen=True)
class Scene:
    """A background and subjects in it.

    >>> Scene("a meadow", [Subject("a red cat", (0, 0, 0.5, 1)), Subject("a dog", (0.5, 0, 1, 1))]).prompt
    'a meadow with a red cat, a dog'
    """

    background: str
    subjects: Sequence[Subject] = ()

    def __post_init__(self) -> None:
        check_type("background", self.background, str)
        for number, subject in enumerate(self.subjects):
            check_type(f"subjects[{number}]", subject, Subject)

    @property
    def prompt(self) -> str:
        """The whole prompt, with which the pipeline is called."""
        some = ", ".join(subject.prompt for subject in self.subjects)
        return f"{self.background} with {some}" if some else self.background


def layout_weights(
    boxes: Sequence[Box] | Tensor,
    size: Sequence[int],
    subject: float = 1.2,
    whole: float = 0.3,
    background: float = 0.0,
    compat: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Weights of the branches at each place, of texts and of images: twice (2 + S, h, w).

    Args:
        boxes: S of ``(left, top, right, bottom)`` in shares of the sides, or masks (S, h, w).
        size: (h, w).
        subject: of a subject's text in its box; several that overlap share it.
        whole: of the whole prompt, in boxes.
        background: of the background's text among images, where no box is.
        compat: ``"authors"`` gives the background what is left to one, even where the others sum to more and it turns
            negative (-0.5 in boxes at their settings). By default it is at least 0, and texts sum to one.

    >>> text, image = layout_weights([(0, 0, 0.5, 1)], (1, 2))
    >>> [[round(x, 3) for x in row] for row in text[:, 0].tolist()], image[2, 0].tolist()
    ([[0.2, 0.0], [0.0, 1.0], [0.8, 0.0]], [1.0, 0.0])
    """
    check_choice("compat", compat, (None, "authors"))
    subject, whole = check_real("subject", subject, least=0), check_real("whole", whole, least=0)
    background = check_real("background", background, least=0)
    masks = (resized(boxes, size) if isinstance(boxes, Tensor) else box_masks(boxes, size)).float()
    each = shares(masks)
    covered = (masks > 0).any(0, keepdim=True)
    text = torch.cat([whole * covered, torch.zeros_like(covered).float(), subject * each])
    left = 1 - text.sum(0)
    text[1] = left if compat == "authors" else left.clamp(min=0)
    image = torch.cat([torch.zeros(1, *size), (1 - each.sum(0, keepdim=True)) * background, each])
    return (text if compat == "authors" else shares(text)), image


class AutoStudio(ReferenceBranches):
    """A text branch and an image branch for each subject of a scene, each where its weights are.

    ::

        studio = AutoStudio.of(pipe.unet, project=projection, scale=0.7).stage(scene)
        studio.refer(embeds)                          # (1, subjects, ...), as of an IP-Adapter
        with attnlib.attach(pipe, studio):
            pipe(scene.prompt)

    Args:
        maps: see :class:`attnlib.steer.diffusion.references.ReferenceBranches`; use :meth:`of`.
        subject, whole, background: see :func:`layout_weights`.
        compat: ``"authors"`` for its weights, and for unconditional rows as released: in them subjects without a
            reference read the empty one, and the background of images is an empty reference's, not H_1.
        settings: ``project``, ``scale`` and ``step_range`` of the branches; ``(0, 2/3)`` is the release's (20 of 30).

    Raises:
        ValueError: at attach, a model outside a pipeline; when the pipeline is called, several prompts, or another
            number of references than of subjects.

    Reference: Cheng et al., 2024, arXiv 2406.01388.
    """

    name: ClassVar[str] = "autostudio"

    def __init__(
        self,
        maps: Mapping[str, nn.Module],
        subject: float = 1.2,
        whole: float = 0.3,
        background: float = 0.0,
        compat: str | None = None,
        **settings: Any,
    ):
        super().__init__(maps, **settings)
        check_choice("compat", compat, (None, "authors"))
        self.subject, self.whole = check_real("subject", subject, least=0), check_real("whole", whole, least=0)
        self.background, self.compat = check_real("background", background, least=0), compat
        self.scene: Scene | None = None
        self.weights: tuple[Tensor, Tensor] | None = None
        self.have: list[bool] | None = None

    # ---- what is drawn

    def stage(self, scene: Scene, weights: tuple[Tensor, Tensor] | None = None) -> AutoStudio:
        """Say what the scene is, and forget the references of another.

        Args:
            scene: background and subjects.
            weights: of texts and of images, (2 + S, H, W) each, in place of those of the boxes; taken as they are.
        """
        check_type("scene", scene, Scene)
        if not scene.subjects:
            raise ValueError("scene has no subjects; call the pipeline without AutoStudio")
        if weights is not None:
            if len(check_tensors("weights", weights)) != 2:
                raise ValueError(f"weights must be two, of texts and of images, got {len(weights)}")
            for one in weights:
                if one.dim() != 3 or len(one) != 2 + len(scene.subjects):
                    raise ValueError(
                        f"weights must be (2 + {len(scene.subjects)}, H, W): whole prompt, background, subjects; got "
                        f"{tuple(one.shape)}"
                    )
        self.scene, self.weights, self.have, self._images = scene, weights, None, None
        return self

    def refer(self, images: Any, empty: Tensor | None = None, have: Sequence[bool] | None = None) -> Any:
        """Say what the references of the subjects are.

        Args:
            images: (1, S, ...), see the base.
            empty: see the base.
            have: which subjects have one; all by default. What stands in ``images`` for the others is not read.
        """
        found = super().refer(images, empty)
        count = self.references
        if have is not None and len(have) != count:
            raise ValueError(f"have must say it of each of {count} references, got {list(have)}")
        self.have = [True] * count if have is None else [bool(h) for h in have]
        return found

    @property
    def identity(self) -> bool:
        return False

    def on_attach(self, session: Any) -> None:
        if session.sampling is None:
            raise ValueError(
                f"AutoStudio encodes texts with the encoder of a pipeline, and {type(session.model).__name__} was "
                "attached to by itself; attach to the pipeline: attach(pipe, ...)"
            )

    def conflicts(self, other: Intervention) -> str | None:
        if isinstance(other, AutoStudio):
            return "each has texts in place of the prompt's; stage one scene"
        return against_tiles(other) or super().conflicts(other)

    def around_denoiser(
        self, site: CallSite, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Tensor]
    ) -> Tensor:
        step_of(site, self)
        notes = self.session.notes
        if (self, "texts") not in notes:
            if self.scene is None:
                raise RuntimeError("AutoStudio has no scene; say what it is with stage(scene)")
            if self.references not in (0, len(self.scene.subjects)):
                raise ValueError(
                    f"refer(...) was given {self.references} references for {len(self.scene.subjects)} subjects"
                )
            if site.sampling.prompt_count != 1 or site.rows is None:
                raise ValueError(
                    f"AutoStudio draws one scene, with the rows of guidance known; the pipeline was called with "
                    f"{site.sampling.prompt_count} prompts and rows {site.rows}"
                )
            context = inputs.get("encoder_hidden_states")
            if not isinstance(context, Tensor) or context.dim() != 3:
                raise ValueError(
                    f"AutoStudio reads text embeddings (B, L, D), but {type(site.module).__name__} was called with "
                    f"{type(context).__name__}"
                )
            texts = [self.scene.background, *(subject.prompt for subject in self.scene.subjects)]
            like = context[0].detach()
            notes[self, "texts"] = encoded(site.sampling, texts, like)
        return call(inputs)

    def texts(self) -> Tensor:
        """(1 + S, L, D) embeddings of background and subjects."""
        found: Tensor = self.session.notes[self, "texts"]
        return found

    def layout(self, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Weights of texts and images at a grid."""
        if self.weights is not None:
            text, image = (resized(one, grid) for one in self.weights)
            return text, image
        assert self.scene is not None
        boxes = [subject.box for subject in self.scene.subjects]
        fine = [max(side, side * (-(-256 // side))) for side in grid]  # as of pixels, then between them
        text, image = layout_weights(boxes, fine, self.subject, self.whole, self.background, self.compat)
        return resized(text, grid), resized(image, grid)

    # ---- attention

    def around_attention(self, site: Site, q: Tensor, k: Tensor, v: Tensor, call: Callable[..., Tensor]) -> Tensor:
        out = call(q, k, v)
        if not self.acts(site) or site.rows is None:
            return out
        grid, notes = image_grid(site), self.session.notes
        if (self, grid) not in notes:
            notes[self, grid] = [w.flatten(1).to(q.device) for w in self.layout(grid)]
        text, image = notes[self, grid]
        cond = site.rows_named(("cond",), q.device).nonzero().flatten()
        rest = site.rows_named(("uncond",), q.device).nonzero().flatten()
        module: Any = site.module
        dtype = next(module.to_k.parameters()).dtype
        texts = self.texts().to(q.device, dtype)
        heads = [f(texts).unflatten(-1, (site.kv_heads, -1)).transpose(1, 2) for f in (module.to_k, module.to_v)]
        if getattr(module, "norm_k", None) is not None:
            heads[0] = module.norm_k(heads[0])
        asking = q.index_select(0, cond)
        read = functools.partial(attention, scale=site.scale)
        keys_of, values_of = (t[:, None].expand(-1, len(cond), -1, -1, -1).to(q) for t in heads)
        branches = [functools.partial(read, k=a, v=b) for a, b in zip(keys_of, values_of, strict=True)]
        first = out.index_select(0, cond)
        mixed = first * text[0, :, None].to(first.dtype) + mixed_branches(asking, branches, _rows(text[1:], cond))
        scales = self.scales(site, len(text) - 2)
        pictures: dict[str, Tensor] = {}
        if self.references and any(scales):
            keys, values = self.keys_values(site, len(q))
            have = torch.tensor(self.have, device=q.device)[:, None]
            w = image[2:] * torch.tensor(scales, device=q.device)[:, None]
            for name, rows in (("cond", cond), ("uncond", rest)):
                some = [
                    functools.partial(read, k=keys[r][rows].to(q), v=values[r][rows].to(q)) for r in range(len(scales))
                ]
                weights = w if name == "uncond" and self.compat == "authors" else w * have
                pictures[name] = mixed_branches(q[rows], some, _rows(weights, rows))
        strength = max(scales, default=0.0)
        if strength and bool(image[1].any()):
            beside = strength * image[1][:, None]
            for name, rows in (("cond", cond), ("uncond", rest)):
                if name == "cond":
                    own = branches[0](asking)
                elif self.compat != "authors":
                    own = out[rows]
                elif self.references:
                    own = read(q[rows], k=keys[0][rows].to(q), v=values[0][rows].to(q))
                else:
                    continue
                pictures[name] = pictures.get(name, 0) + own * beside.to(own.dtype)
        if self.weights is not None:  # they need not sum to one
            out = out.index_copy(0, rest, out.index_select(0, rest) * text.sum(0)[:, None].to(out.dtype))
        out = out.index_copy(0, cond, mixed.to(out.dtype))
        for name, rows in (("cond", cond), ("uncond", rest)):
            if name in pictures and len(rows):
                out = out.index_add(0, rows, pictures[name].to(out.dtype))
        return out


def _rows(weights: Tensor, rows: Tensor) -> Tensor:
    """(R, N) for every row."""
    return weights.expand(len(rows), -1, -1)


# ---- subjects' latents


@shaped(pictures="float (S, C, H, W)", masks="tensor (S, H, W)")
def compose(pictures: Tensor, masks: Tensor, boxes: Sequence[Box], size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Subjects cut out of pictures of their own, fitted into boxes of a common one: (C, h, w), and its mask (h, w).

    Args:
        pictures: of each subject.
        masks: where it is.
        boxes: S of ``(left, top, right, bottom)`` in shares of the sides; a subject keeps its proportions and stands in
            the corner at the left and top. Where two overlap the first stays.
        size: (h, w).

    Raises:
        ValueError: an empty mask.
    """
    if len(boxes) != len(pictures):
        raise ValueError(f"boxes must be one for each of {len(pictures)} pictures, got {len(boxes)}")
    out, taken = pictures.new_zeros(pictures.shape[1], *size), torch.zeros(*size, dtype=torch.bool)
    for picture, mask, box in zip(pictures, masks, boxes, strict=True):
        found, to = mask_box(mask), mask_box(box_masks([box], size)[0])
        if found is None:
            raise ValueError("masks holds an empty one: nothing is cut out")
        assert to is not None
        top, left, bottom, right = found
        ratio = min((to[2] - to[0]) / (bottom - top), (to[3] - to[1]) / (right - left))
        sides = [max(1, int((bottom - top) * ratio)), max(1, int((right - left) * ratio))]
        cut = torch.cat([picture, (mask != 0)[None].to(picture.dtype)])[None, :, top:bottom, left:right]
        small = F.interpolate(cut, sides, mode="bilinear", align_corners=False)[0]
        area = (slice(to[0], to[0] + sides[0]), slice(to[1], to[1] + sides[1]))
        new = (small[-1] > 0) & ~taken[area]
        out[:, area[0], area[1]] = torch.where(new, small[:-1], out[:, area[0], area[1]])
        taken[area] |= new
    return out, taken


class SubjectLatents(Intervention):
    """The first steps are led by clean latents of subjects, with as much noise as the step has.

    Args:
        latents: (C, h, w) or (n, C, h, w) without noise, in the pipeline's scale.
        mask: (h, w) where they lead.
        steps: first steps, 10 as released.
        share: a, 0.8 as released; 0 leaves the pipeline as it is.
        seed: of the noise, one for all steps, from a generator of its own.
    """

    name: ClassVar[str] = "subject-latents"
    moves_latents = True

    def __init__(self, latents: Tensor, mask: Tensor, steps: int = 10, share: float = 0.8, seed: int = 0):
        if latents.dim() not in (3, 4) or mask.shape != latents.shape[-2:]:
            raise ValueError(
                f"latents must be (C, h, w) or (n, C, h, w) and mask (h, w), got {tuple(latents.shape)} and "
                f"{tuple(mask.shape)}"
            )
        self.latents, self.mask = latents if latents.dim() == 4 else latents[None], mask
        self.steps, self.seed = check_int("steps", steps, least=0), seed
        self.share = check_real("share", share, least=0, most=1)

    @property
    def identity(self) -> bool:
        return not self.steps or not self.share

    def conflicts(self, other: Intervention) -> str | None:
        return against_tiles(other)

    def around_denoiser(
        self, site: CallSite, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Tensor]
    ) -> Tensor:
        step, sampling, notes = step_of(site, self), site.sampling, self.session.notes
        if step >= self.steps:
            return call(inputs)
        main, images = inputs[site.main], sampling.prompt_count * sampling.images_per_prompt
        if self.latents.shape[1:] != main.shape[1:] or images % len(self.latents):
            raise ValueError(
                f"latents are {tuple(self.latents.shape)}, but the pipeline denoises {images} of "
                f"{tuple(main.shape[1:])}"
            )
        before, delta = notes.get((self, step), (None, None))
        if before is None:
            before = main[:images]
            delta = self._delta(site, before / sampling.scale, images)
            notes[self, step] = before, delta
            sampling.shift(delta)
        elif not torch.equal(before, main[:images]):
            return call(inputs)  # a later pass of this step, which reads them moved already
        return call({**inputs, site.main: main + (repeated(delta, len(main)) * sampling.scale).to(main)})

    def _delta(self, site: CallSite, now: Tensor, images: int) -> Tensor:
        """By how much the latents of all images are moved."""
        scheduler = site.sampling.pipe.scheduler
        if not hasattr(scheduler, "add_noise"):
            raise ValueError(f"SubjectLatents adds noise to latents, which {type(scheduler).__name__} does not do")
        noise = torch.randn(self.latents.shape, generator=torch.Generator().manual_seed(self.seed)).to(now)
        clean = self.latents.to(now)
        at = torch.as_tensor(site.timestep).reshape(-1)[:1].expand(len(clean))
        led = repeated(scheduler.add_noise(clean, noise, at), images)
        return self.share * self.mask.to(now) * (led - now)


# ---- turn by turn


class Studio:
    """Pictures of the same subjects, turn by turn.

    Args:
        pipe: the pipeline.
        branches: what draws the scenes.
        direct: makes a :class:`Scene` of what the user says, ``direct(said, scenes)`` with all scenes before it.
        review: looks over a scene, ``review(scene)``, and gives a better one, or ``None`` when it is good.
        rounds: how often it is asked.
        remember: features (...) of a subject in a picture, ``remember(picture, subject)``, or ``None`` when it is not
            to be found; kept under the subject's name, once.
    """

    def __init__(
        self,
        pipe: Any,
        branches: AutoStudio,
        direct: Callable[[str, list[Scene]], Scene],
        review: Callable[[Scene], Scene | None] | None = None,
        rounds: int = 3,
        remember: Callable[[Any, Subject], Tensor | None] | None = None,
    ):
        check_type("branches", branches, AutoStudio)
        for name, agent in (("direct", direct), ("review", review), ("remember", remember)):
            if agent is not None and not callable(agent):
                raise TypeError(f"{name} must be a function, got {type(agent).__name__}")
        self.pipe, self.branches, self.direct, self.review, self.remember = pipe, branches, direct, review, remember
        self.rounds = check_int("rounds", rounds, least=0)
        self.scenes: list[Scene] = []
        self.references: dict[str, Tensor] = {}

    def turn(self, said: str, *company: Intervention, **settings: Any) -> Any:
        """The picture of one turn, the first that the pipeline gives.

        Args:
            said: what the user says.
            company: interventions to be attached beside the branches, as :class:`SubjectLatents`.
            settings: of the pipeline's call.
        """
        scene = self.direct(said, list(self.scenes))
        check_type("what direct gives", scene, Scene)
        for _ in range(self.rounds if self.review is not None else 0):
            better = self.review(scene)  # type: ignore[misc]
            if better is None:
                break
            check_type("what review gives", better, Scene)
            scene = better
        self.branches.stage(scene)
        known = [self.references.get(subject.name) if subject.name else None for subject in scene.subjects]
        like = next((one for one in known if one is not None), None)
        if like is not None:
            images = torch.stack([torch.zeros_like(like) if one is None else one for one in known])
            self.branches.refer(images[None], have=[one is not None for one in known])
        with attach(self.pipe, self.branches, *company):
            picture = self.pipe(scene.prompt, **settings).images[0]
        self.scenes.append(scene)
        for subject, one in zip(scene.subjects, known, strict=True):
            if one is None and subject.name and self.remember is not None:
                found = self.remember(picture, subject)
                if found is not None:
                    self.references[subject.name] = found
        return picture
