"""Latents moved down the slope of a loss of attention maps, before the denoiser reads them.

At step i of N of a pipeline, with the conditional rows of what the denoiser is about to read,

    ``z <- z - s_i dL(maps(z)) / dz,    s_i = step_size sqrt(r_0 + (r_1 - r_0) i / (N - 1))``,

once at each of the first steps, and at some steps again and again until the loss falls to a target. The step then goes
on from the moved latents, in the denoiser and in the scheduler. Each image has its own loss and stops by itself.

:class:`TokenUpdate` moves the embeddings of the prompt's words in their place, and leaves the latents.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...checks import check_int, check_real
from ...hooks.denoiser import CallSite, check_pictures, rows_of, rows_of_guidance, step_of, with_gradient
from ...hooks.intervention import Intervention
from ...hooks.maps import Maps
from .prompts import encoder_of, spans_of


def check_words(words: Any) -> list[Any]:
    """Words of prompts, or numbers of their tokens.

    Raises:
        TypeError: something else.
    """
    if isinstance(words, str) or not isinstance(words, Sequence) or not len(words):
        raise TypeError(f"words must be a sequence of words of the prompt, e.g. ('cat', 'dog'); got {words!r:.80}")
    if any(isinstance(word, bool) or isinstance(word, int) for word in words):
        raise TypeError(
            f"words holds a number; the tokens of a word are a sequence of them: [[2], [5]], got {words!r:.80}"
        )
    return list(words)


def check_first(name: str, steps: int | Collection[int] | None) -> int | frozenset[int] | None:
    """How many first steps, or their numbers; ``None`` for all."""
    if steps is None or isinstance(steps, int):
        return None if steps is None else check_int(name, steps, least=0)
    return frozenset(check_int(name, step, least=0) for step in steps)


def acts_at(steps: int | Collection[int] | None, step: int) -> bool:
    """Whether a step is one of those that :func:`check_first` gave.

    >>> acts_at(2, 1), acts_at(frozenset({0}), 1), acts_at(None, 9)
    (True, False, True)
    """
    return steps is None or (step < steps if isinstance(steps, int) else step in steps)


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
        self.words = check_words(words)
        self.step_size = check_real("step_size", step_size, least=0)
        if len(step_range) != 2:
            raise ValueError(f"step_range must be two numbers, of the first and the last step, got {step_range!r}")
        self.step_range = tuple(check_real("step_range", r, least=0) for r in step_range)
        self.steps = check_first("steps", steps)
        goals = (targets or {}).items()
        self.targets = {check_int("targets", s, least=0): check_real("targets", value) for s, value in goals}
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

    def around_denoiser(
        self, site: CallSite, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Tensor]
    ) -> Tensor:
        step, sampling = step_of(site, self), site.sampling
        if not (acts_at(self.steps, step) or step in self.targets):
            return call(inputs)
        notes = self.session.notes
        rows = site.rows
        if rows is None or site.prompts is None:
            raise ValueError(
                f"{type(self).__name__} moves the latents of conditional rows, and which these are is not known in "
                f"{type(sampling.pipe).__name__}; say it: attach(pipe, ..., rows=('uncond', 'cond'))"
            )
        check_pictures(site, inputs, self)
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
        if (owner, "spans") not in session.notes:
            session.notes[owner, "spans"] = spans_of(sampling, owner.words)
        self.spans = [session.notes[owner, "spans"][site.prompts[i]] for i in index]
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
        if acts_at(owner.steps, self.step) and bool(slope.any()):
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


class TokenUpdate(Intervention):
    """Embeddings of words learnt anew at each step, so that losses of their maps fall below a schedule.

    Before the denoiser runs at a step, AdamW (begun anew) moves what the text encoder's embedding table holds for the
    words of each image's prompt, until every loss is below its threshold for this step, at most ``inner`` times; the
    prompt is encoded again with them, and they are where the next step begins. The table itself is never written to.

    A subclass says what the losses are (:meth:`losses`) and how low they must be (:meth:`thresholds`).

    Args:
        words: words of the prompt, or numbers of their tokens; one list for all prompts, or a list for each.
        inner: at most so many moves at a step; 0 leaves the model as it is.
        lr: rate of AdamW.
        weight_decay: of AdamW.
        steps: how many first steps they are moved at, or their numbers; ``None`` for all.
        resolution: of the maps; 16 is the one of Stable Diffusion at 512 pixels.
        layers: numbers or name patterns of the layers whose maps are taken; ``None`` for all at that resolution.

    Raises:
        ValueError: at attach, a model outside a pipeline, or one without a text encoder; when the pipeline is called,
            a word that is not in its prompt or is cut off, no conditional rows, a loss or a slope that is not finite.
    """

    name: ClassVar[str] = "token-update"
    differentiates = True

    def __init__(
        self,
        words: Sequence[Any],
        inner: int = 20,
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
        steps: int | Collection[int] | None = None,
        resolution: int | Sequence[int] = 16,
        layers: Sequence[int | str] | None = None,
    ):
        self.words = check_words(words)
        self.inner = check_int("inner", inner, least=0)
        self.lr = check_real("lr", lr, above=0)
        self.weight_decay = check_real("weight_decay", weight_decay, least=0)
        self.steps = check_first("steps", steps)
        self.maps = Maps(resolution, layers=layers)
        self.maps.looking = False
        self.embeddings: list[list[Tensor]] = []

    # ---- what a subclass says

    def losses(self, maps: Tensor, spans: list[list[int]], step: int, prompt: int) -> dict[str, tuple[float, Tensor]]:
        """Losses of one image by name, each with its weight.

        Args:
            maps: (T, h, w) of the conditional row.
            spans: the tokens of each word.
            step: denoising step.
            prompt: number of its prompt.
        """
        raise NotImplementedError

    def thresholds(self, step: int) -> dict[str, float]:
        """Below what each loss must be at a step, so that no move is made."""
        raise NotImplementedError

    # ---- attaching

    @property
    def companions(self) -> Sequence[Intervention]:
        return (self.maps,)

    @property
    def identity(self) -> bool:
        return self.inner == 0 or self.steps in (0, frozenset())

    def conflicts(self, other: Intervention) -> str | None:
        if other.differentiates:
            return "each of them looks for what lowers its losses at a step, and would do so within the other's search"
        return None

    def on_attach(self, session: Any) -> None:
        if session.sampling is None:
            raise ValueError(
                f"{type(self).__name__} learns tokens of a pipeline's prompt, and {type(session.model).__name__} was "
                "attached to by itself; attach to the pipeline: attach(pipe, ...)"
            )
        if not _text_encoders(session.sampling.pipe):
            raise ValueError(f"{type(session.sampling.pipe).__name__} has no text encoder whose tokens could be learnt")

    def results(self) -> list[list[Tensor]]:
        """Of each step of the last call, the learnt embeddings (images, tokens, D) of each text encoder."""
        return self.embeddings

    # ---- one step

    def around_denoiser(
        self, site: CallSite, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Tensor]
    ) -> Tensor:
        index = [i for i, row in enumerate(rows_of_guidance(site, self)) if row == "cond"]
        if not index:
            return call(inputs)
        check_pictures(site, inputs, self)
        notes = self.session.notes
        if (self, "tokens") not in notes:
            notes[self, "tokens"] = _Tokens(site, self.words, index, type(self).__name__)
            self.embeddings = []
        tokens: _Tokens = notes[self, "tokens"]
        step = step_of(site, self)
        if acts_at(self.steps, step) and notes.get((self, "done")) != step:
            self._learn(site, inputs, call, tokens, index)
        if notes.get((self, "done")) != step:
            self.embeddings.append([t.detach().clone() for t in tokens.learnt])
        notes[self, "done"] = step
        context = inputs["encoder_hidden_states"]
        at = torch.as_tensor(index, device=context.device)
        with torch.no_grad():
            text = tokens.encode(tokens.learnt).to(context)
        return self.finish(site, {**inputs, "encoder_hidden_states": context.index_copy(0, at, text)}, call)

    def finish(self, site: CallSite, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Tensor]) -> Tensor:
        """The step itself, with the learnt tokens in its text."""
        return call(inputs)

    def _learn(
        self, site: CallSite, inputs: dict[str, Any], call: Callable[..., Tensor], tokens: _Tokens, index: list[int]
    ) -> None:
        assert site.step is not None
        name, limits = type(self).__name__, self.thresholds(site.step)
        main, waiting = inputs[site.main], list(range(len(index)))
        self.maps.looking = True
        try:
            with with_gradient(), self.session.some_rows(index):
                rows = rows_of(inputs, index, len(main))
                own = [[t[n : n + 1].detach().clone().requires_grad_() for t in tokens.learnt] for n in waiting]
                optimizers = [torch.optim.AdamW(one, lr=self.lr, weight_decay=self.weight_decay) for one in own]
                for _ in range(self.inner):
                    text = tokens.encode([torch.cat(parts) for parts in zip(*own, strict=True)])
                    call({**rows, "encoder_hidden_states": text.to(rows["encoder_hidden_states"])})
                    maps, totals = self.maps.take(), {}
                    for n in waiting:
                        found = self.losses(maps[n], tokens.spans[n], site.step, tokens.numbers[n])
                        if not all(float(loss.detach()) < limits[key] for key, (_, loss) in found.items()):
                            totals[n] = torch.stack([weight * loss for weight, loss in found.values()]).sum()
                    waiting = list(totals)
                    if not waiting:
                        break
                    leaves = [t for n in waiting for t in own[n]]
                    total = torch.stack(list(totals.values())).sum()
                    slopes = torch.autograd.grad(total, leaves, allow_unused=True)
                    if not bool(total.isfinite()) or not all(s is None or bool(s.isfinite().all()) for s in slopes):
                        raise ValueError(
                            f"{name}: at step {site.step} the loss or its slope is not finite, so tokens cannot be "
                            "learnt; run the pipeline in float32 or bfloat16"
                        )
                    for leaf, slope in zip(leaves, slopes, strict=True):
                        leaf.grad = slope
                    for n in waiting:
                        optimizers[n].step()
                for number, every in enumerate(tokens.learnt):
                    every.copy_(torch.cat([one[number].detach() for one in own]))
        finally:
            self.maps.looking = False


def _text_encoders(pipe: Any) -> list[Any]:
    """The text encoders of a pipeline that read the tokens of its first tokenizer."""
    names = ("text_encoder", "text_encoder_2")
    return [e for name in names if (e := getattr(pipe, name, None)) is not None and hasattr(e, "get_input_embeddings")]


class _Tokens:
    """What is learnt of each image's prompt, and the prompt encoded with it.

    Attributes:
        spans: of each image, the columns of each word.
        learnt: of each text encoder, (images, tokens, D) float32.
    """

    def __init__(self, site: CallSite, words: Sequence[Any], index: list[int], who: str):
        sampling = site.sampling
        pipe, prompts = sampling.pipe, sampling.prompts
        if prompts is None:
            raise ValueError(f"{who} encodes the prompt anew, but the pipeline was given embeddings and no prompt")
        assert site.prompts is not None
        if getattr(pipe, "tokenizer_3", None) is not None:
            raise ValueError(f"{who} serves one tokenizer, {type(pipe).__name__} reads tokens of several side by side")
        self.pipe, self.settings = pipe, sampling.arguments
        spans = spans_of(sampling, words)
        self.numbers = [site.prompts[i] for i in index]
        self.prompts = [prompts[n] for n in self.numbers]
        self.spans = [spans[n] for n in self.numbers]
        self.at = [[t for span in some for t in span] for some in self.spans]
        counts = {len(at) for at in self.at}
        self.width = max(counts)
        self.encoders = _text_encoders(pipe)
        self.learnt: list[Tensor] = []
        for number, encoder in enumerate(self.encoders):
            tokenizer = pipe.tokenizer if number == 0 else pipe.tokenizer_2
            length = tokenizer.model_max_length
            given = tokenizer(
                self.prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            )
            table = encoder.get_input_embeddings().weight
            with torch.inference_mode(False):  # what is learnt is written to
                padded = [at + (at[:1] or [0]) * (self.width - len(at)) for at in self.at]
                rows = torch.stack([ids[at] for ids, at in zip(given.input_ids.clone(), padded, strict=True)])
                self.learnt.append(table.detach()[rows.to(table.device)].float().clone())

    def encode(self, learnt: Sequence[Tensor]) -> Tensor:
        """(n, L, D) of the prompts of all images, with learnt embeddings in place of the table's."""
        handles = [
            encoder.get_input_embeddings().register_forward_hook(functools.partial(self._put, new))
            for encoder, new in zip(self.encoders, learnt, strict=True)
        ]
        try:
            encode = encoder_of(self.pipe)
            known = inspect.signature(encode).parameters
            device = self.encoders[0].get_input_embeddings().weight.device
            settings = {
                "prompt": self.prompts, "device": device, "num_images_per_prompt": 1,
                "do_classifier_free_guidance": False, "clip_skip": self.settings.get("clip_skip"),
            }  # fmt: skip
            found = encode(**{name: value for name, value in settings.items() if name in known})
        finally:
            for handle in handles:
                handle.remove()
        return found[0] if isinstance(found, (tuple, list)) else found

    def _put(self, new: Tensor, module: Any, args: Any, out: Tensor) -> Tensor:
        """The output of an embedding table, (n, L, D), with the learnt rows in their places."""
        rows = []
        for one, at, some in zip(out, self.at, new, strict=True):
            rows.append(one.index_copy(0, torch.as_tensor(at, device=out.device), some[: len(at)].to(out)))
        return torch.stack(rows)
