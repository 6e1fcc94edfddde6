"""Latents moved down the slope of a loss of attention maps, before the denoiser reads them.

At step i of N of a pipeline, with the conditional rows of what the denoiser is about to read,

    ``z <- z - s_i dL(maps(z)) / dz,    s_i = step_size sqrt(r_0 + (r_1 - r_0) i / (N - 1))``,

once at each of the first steps, and at some steps again and again until the loss falls to a target. The step then goes
on from the moved latents, in the denoiser and in the scheduler. Each image has its own loss and stops by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...checks import check_int, check_real
from ...hooks.denoiser import CallSite, rows_of, step_of, with_gradient
from ...hooks.intervention import Intervention
from ...hooks.maps import Maps
from .prompts import context_spans, per_prompt


class LatentUpdate(Intervention):
    """The engine; a subclass says what the loss is (:meth:`loss`).

    Args:
        words: words of the prompt, or numbers of their tokens; one list for all prompts, or a list for each.
        step_size: s, in units of the latents; 0 leaves the model as it is.
        step_range: what the square of the size is multiplied by at the first and the last step.
        steps: how many first steps latents are moved at, or their numbers; ``None`` for all.
        targets: ``{step: loss}`` at which latents are moved until the loss is at most so much, and once more.
        inner: at most so many moves there.
        resolution: of the maps; 16 is the one of Stable Diffusion at 512 pixels.
        layers: numbers or name patterns of the layers whose maps are taken; ``None`` for all at that resolution.
        loss_scale: what the loss is multiplied by for the backward pass, for half precision.

    Raises:
        ValueError: at attach, a model outside a pipeline; when the pipeline is called, a word that is not in its
            prompt or is cut off, no conditional rows, a loss or a slope that is not finite.
    """

    name: ClassVar[str] = "latent-update"
    moves_latents = True
    differentiates = True
    #: Which maps the loss reads, see :class:`attnlib.hooks.Maps`.
    reads: ClassVar[tuple[str, ...]] = ("text",)
    #: Maps of the step as it is taken, rather than of the last look before the move, are handed to :meth:`remember`.
    looks_after: bool = False

    def __init__(
        self,
        words: Sequence[Any],
        step_size: float = 20.0,
        step_range: Sequence[float] = (1.0, 0.5),
        steps: int | Collection[int] | None = 25,
        targets: Mapping[int, float] | None = None,
        inner: int = 20,
        resolution: int | Sequence[int] = 16,
        layers: Sequence[int | str] | None = None,
        loss_scale: float = 1.0,
    ):
        if isinstance(words, str) or not isinstance(words, Sequence) or not len(words):
            raise TypeError(f"words must be a sequence of words of the prompt, e.g. ('cat', 'dog'); got {words!r:.80}")
        if any(isinstance(word, bool) or isinstance(word, int) for word in words):
            raise TypeError(
                f"words holds a number; the tokens of a word are a sequence of them: [[2], [5]], got {words!r:.80}"
            )
        self.words = list(words)
        self.step_size = check_real("step_size", step_size, least=0)
        if len(step_range) != 2:
            raise ValueError(f"step_range must be two numbers, of the first and the last step, got {step_range!r}")
        self.step_range = tuple(check_real("step_range", r, least=0) for r in step_range)
        if isinstance(steps, int):
            check_int("steps", steps, least=0)
        elif steps is not None:
            steps = frozenset(check_int("steps", s, least=0) for s in steps)
        self.steps = steps
        self.targets = {check_int("targets", s, least=0): float(value) for s, value in (targets or {}).items()}
        self.inner = check_int("inner", inner, least=0)
        self.loss_scale = check_real("loss_scale", loss_scale, above=0)
        self.maps = {of: Maps(resolution, of=of, layers=layers) for of in self.reads}
        for probe in self.maps.values():
            probe.looking = False

    # ---- what a subclass says

    def loss(self, maps: dict[str, Tensor], spans: list[list[int]], memory: dict[str, Any], step: int) -> Tensor:
        """The loss of one image, a number.

        Args:
            maps: ``"text"`` (T, h, w), ``"image"`` (h w, h, w), whatever the class reads.
            spans: the tokens of each word.
            memory: of this image, from step to step of one call of the pipeline; see :meth:`remember`.
            step: denoising step.
        """
        raise NotImplementedError

    def score(self, loss: float, spans: list[list[int]], memory: dict[str, Any], step: int) -> float:
        """What ``targets`` are compared with; the loss itself by default."""
        return loss

    def remember(self, maps: dict[str, Tensor], spans: list[list[int]], memory: dict[str, Any], step: int) -> None:
        """After the moves of a step: keep of the maps (without gradient) what later steps need."""

    # ---- attaching

    @property
    def companions(self) -> Sequence[Intervention]:
        return tuple(self.maps.values())

    @property
    def identity(self) -> bool:
        return self.step_size == 0 or (self.steps in (0, frozenset()) and not self.targets)

    def on_attach(self, session: Any) -> None:
        if session.sampling is None:
            raise ValueError(
                f"{type(self).__name__} moves the latents of a pipeline, and {type(session.model).__name__} was "
                "attached to by itself; attach to the pipeline: attach(pipe, ...)"
            )

    # ---- one step

    def _moves(self, step: int) -> bool:
        if self.steps is None:
            return True
        return step < self.steps if isinstance(self.steps, int) else step in self.steps

    def around_denoiser(
        self, site: CallSite, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Tensor]
    ) -> Tensor:
        step, sampling = step_of(site, self), site.sampling
        if not (self._moves(step) or step in self.targets):
            return call(inputs)
        notes = self.session.notes
        rows = site.rows
        if rows is None or site.prompts is None:
            raise ValueError(
                f"{type(self).__name__} moves the latents of conditional rows, and which these are is not known in "
                f"{type(sampling.pipe).__name__}; say it: attach(pipe, ..., rows=('uncond', 'cond'))"
            )
        if "perturbed" in rows:
            raise ValueError(
                f"{type(self).__name__} runs conditional rows by themselves, and the processors of perturbed-attention "
                f"guidance cut every batch by three; call the pipeline with pag_scale=0"
            )
        if inputs[site.main].dim() > 4:
            raise ValueError(
                f"{type(self).__name__} reads maps of images, and {type(site.module).__name__} denoises videos: "
                f"{site.main} has shape {tuple(inputs[site.main].shape)}, possible are (B, C, h, w) and (B, N, C)"
            )
        index = [i for i, row in enumerate(rows) if row == "cond"]
        key = (self, "moved")
        if not index or notes.get(key) == step:
            notes[self, "passed"] = step if not index else None
            return call(inputs)
        if notes.get((self, "passed")) == step and notes.get(key) != step:
            raise ValueError(
                f"{type(self).__name__}: {type(sampling.pipe).__name__} runs its unconditional pass before the "
                f"conditional one, so that latents would be moved between the two"
            )
        notes[key] = step
        move = _Move(self, site, inputs, call, index)
        new = move.run()
        if new is not None:
            delta = new - move.z
            sampling.shift(delta)
            inputs = {**inputs, site.main: move.put(inputs[site.main], new)}
        if not self.looks_after:
            return call(inputs)
        for probe in self.maps.values():
            probe.looking = True
        try:
            out = call(inputs)
            seen = {of: probe.take()[index].detach() for of, probe in self.maps.items()}
        finally:
            for probe in self.maps.values():
                probe.looking = False
        move.keep(seen)
        return out


class _Move:
    """The moves of one step."""

    def __init__(
        self, owner: LatentUpdate, site: CallSite, inputs: dict[str, Any], call: Callable[..., Tensor], index: list[int]
    ):
        self.owner, self.site, self.call, self.index = owner, site, call, index
        assert site.rows is not None and site.step is not None and site.prompts is not None
        self.step: int = site.step
        main = inputs[site.main]
        self.channels = _channels(site.module, main)
        self.rows = rows_of(inputs, index, len(main))
        self.scale = site.sampling.scale
        self.z = self._latents(self.rows[site.main]) / self.scale
        sampling, session = site.sampling, owner.session
        prompts, arguments = sampling.prompts, sampling.arguments
        words = per_prompt(owner.words, sampling.prompt_count)
        longest = arguments.get("max_sequence_length")
        cache = session.notes.get((owner, "spans"))
        if cache is None:
            cache = [
                context_spans(sampling.pipe, None if prompts is None else prompts[p], some, longest)
                for p, some in enumerate(words)
            ]
            session.notes[owner, "spans"] = cache
        self.spans = [cache[site.prompts[i]] for i in index]
        memory = session.notes.get((owner, "memory"))
        if memory is None or len(memory) != len(index):
            memory = session.notes[owner, "memory"] = [{} for _ in index]
        self.memory: list[dict[str, Any]] = memory

    def _latents(self, main: Tensor) -> Tensor:
        return main if self.channels is None else main[:, : self.channels]

    def put(self, main: Tensor, latents: Tensor) -> Tensor:
        """What the denoiser reads, with other latents in all rows."""
        groups = len(main) // len(latents)
        new = (latents * self.scale).to(main).repeat(groups, *([1] * (latents.dim() - 1)))
        return new if self.channels is None else torch.cat([new, main[:, self.channels :]], 1)

    def slopes(self, z: Tensor, some: list[int]) -> tuple[list[float], Tensor]:
        """Losses of some of the images at latents ``z`` (m, ...), and their slopes (m, ...)."""
        owner, site, session = self.owner, self.site, self.owner.session
        batch = len(self.index)
        inputs = self.rows if len(some) == batch else rows_of(self.rows, some, batch)
        for probe in owner.maps.values():
            probe.looking = True
        try:
            with with_gradient(), session.some_rows([self.index[i] for i in some]):
                leaf = z.detach().clone().requires_grad_()
                self.call({**inputs, site.main: self.put(inputs[site.main].detach().clone(), leaf)})
                maps = {of: probe.take() for of, probe in owner.maps.items()}
                each = [
                    owner.loss({of: m[n] for of, m in maps.items()}, self.spans[i], self.memory[i], self.step)
                    for n, i in enumerate(some)
                ]
                losses = torch.stack([torch.as_tensor(one, device=z.device) for one in each])
                slope = None
                if losses.requires_grad:
                    (slope,) = torch.autograd.grad(losses.sum() * owner.loss_scale, leaf, allow_unused=True)
                slope = torch.zeros_like(leaf) if slope is None else slope / owner.loss_scale
        finally:
            for probe in owner.maps.values():
                probe.looking = False
        for what, value in (("loss", losses), ("slope of its loss", slope)):
            if not bool(value.isfinite().all()):
                raise ValueError(
                    f"{type(owner).__name__}: at step {self.step} the {what} is not finite, so latents cannot be "
                    "moved; run the pipeline in float32 or bfloat16, or give loss_scale a power of two (for slopes that"
                    " vanish or overflow in half precision)"
                )
        self.seen = {of: m.detach() for of, m in maps.items()}
        return losses.detach().double().tolist(), slope.detach()

    def run(self) -> Tensor | None:
        """The latents after the moves, ``None`` where nothing moved."""
        owner, z, every = self.owner, self.z, list(range(len(self.index)))
        low, high = owner.step_range
        total = max(1, (self.site.steps or 1) - 1)
        size = owner.step_size * (low + (high - low) * self.step / total) ** 0.5
        losses, slope = self.slopes(z, every)
        seen, moved = self.seen, False

        def score(i: int, loss: float) -> float:
            return owner.score(loss, self.spans[i], self.memory[i], self.step)

        target = owner.targets.get(self.step)
        waiting = [] if target is None else [i for i in every if score(i, losses[i]) > target]
        refined, tries = list(waiting), 0
        while waiting and tries < owner.inner:
            tries += 1
            if tries > 1:
                some, part = self.slopes(z[waiting], waiting)
            else:
                some, part = [losses[i] for i in waiting], slope[waiting]
            new = z.clone()
            new[waiting] = z[waiting] - (size * part).to(z)
            z, moved = new, True
            waiting = [i for i, loss in zip(waiting, some, strict=True) if score(i, loss) > target]  # type: ignore[operator]
        if tries:
            _, part = self.slopes(z[refined], refined)
            slope = slope.clone()
            slope[refined] = part
            at = torch.as_tensor(refined, device=z.device)
            seen = {of: m.index_copy(0, at, self.seen[of]) for of, m in seen.items()}
        if owner._moves(self.step) and bool(slope.any()):
            z, moved = z - (size * slope).to(z), True
        if not owner.looks_after:
            self.keep(seen)
        if moved and not bool(z.isfinite().all()):
            raise ValueError(
                f"{type(owner).__name__}: at step {self.step} the moved latents are not finite; step_size="
                f"{owner.step_size} is too large for the model's precision"
            )
        return z if moved else None

    def keep(self, seen: dict[str, Tensor]) -> None:
        for i in range(len(self.index)):
            self.owner.remember({of: m[i] for of, m in seen.items()}, self.spans[i], self.memory[i], self.step)


def _channels(model: Any, main: Tensor) -> int | None:
    """How many channels of (B, C, ...) are latents, where conditions stand behind them; ``None`` for all."""
    config = getattr(model, "config", None)
    out = getattr(config, "out_channels", None)
    if main.dim() != 4 or not isinstance(out, int) or out >= main.shape[1]:
        return None
    return out
