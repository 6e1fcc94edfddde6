"""A diffusers pipeline around a denoiser: what its own calls say about steps, passes and rows.

While a pipeline that was attached to runs, the session knows from it which step the denoiser is called for, how many
there are and what the rows of the batch are. The step counts what the scheduler was asked to do: it goes on when the
pipeline calls ``scheduler.step``, however often the denoiser was called for it. Rows are named by how the pipeline lays
out guidance, ``("uncond", "cond")`` nearly everywhere and each as often as there are images; a pass that the pipeline
names (``cache_context("cond")``) names its rows.

The pipeline and, while it runs, its scheduler become objects of subclasses of their classes, of the same name; copies
of them are plain. The scheduler that is there when the pipeline is called is the one that is followed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .recompute import Shared
from .session import Session

#: Names under which pipelines keep what denoises.
DENOISERS = ("unet", "transformer", "prior", "decoder", "transformer_2")

#: Pipelines that put the conditional rows first.
COND_FIRST = ("DiTPipeline", "LuminaPipeline", "LuminaText2ImgPipeline", "StableCascadePriorPipeline",
              "StableCascadeDecoderPipeline")  # fmt: skip

#: Pipelines with guidance by an image, too: rows under text and image, under the image alone, under neither.
BY_IMAGE = ("StableDiffusionInstructPix2PixPipeline", "StableDiffusionXLInstructPix2PixPipeline")

#: Arguments of pipelines that say how many prompts, and how many results of each, there are.
PROMPTS = ("prompt", "prompt_embeds", "class_labels")
IMAGES = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")


def is_pipeline(model: Any) -> bool:
    """Whether something is a pipeline of diffusers."""
    classes = {(cls.__module__.split(".")[0], cls.__name__) for cls in type(model).__mro__}
    return ("diffusers", "DiffusionPipeline") in classes


def denoiser_of(pipe: Any, part: str | None = None) -> tuple[nn.Module, str | None]:
    """What denoises in a pipeline, and what is left of ``part``, whose first name may say which of several it is.

    Raises:
        TypeError: it has none, or several of which none is named.
    """
    found = {name: model for name in DENOISERS if isinstance(model := getattr(pipe, name, None), nn.Module)}
    first, _, rest = (part or "").partition(".")
    if first in found:
        return found[first], rest or None
    if len(found) > 1:
        names = list(found)
        raise TypeError(
            f"{type(pipe).__name__} has several denoisers ({', '.join('pipe.' + name for name in names)}); say which "
            f"with attach(pipe, ..., part={names[0]!r})"
        )
    if not found:
        raise TypeError(
            f"{type(pipe).__name__} has no denoiser, pipe.unet or pipe.transformer, that could be attached to"
        )
    return next(iter(found.values())), part


def variant(cls: Any, **methods: Any) -> Any:
    """A subclass that passes for ``cls``, with other methods; copies of its objects are plain ones."""

    def reduce(self: Any, protocol: Any) -> Any:
        made = object.__reduce_ex__(self, protocol)
        return (made[0], (cls, *made[1][1:]), *made[2:])

    names = {**methods, "__reduce_ex__": reduce, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), {**names, "__doc__": cls.__doc__})


@dataclass(frozen=True, eq=False)
class Stepped:
    """What a scheduler did at a step.

    Args:
        after: (n, ...) the latents that it gave.
        before: (n, ...) those that it was given, moved as they were.
        output: what the denoiser said of them, guidance done.
        timestep: of the step.
        scheduler: the scheduler, which has gone on already.
    """

    after: Tensor
    before: Tensor
    output: Tensor
    timestep: Any
    scheduler: Any


def _amended(result: Any, amendments: list[Callable[[Stepped], Tensor]], scheduler: Any, given: dict[str, Any]) -> Any:
    """What ``scheduler.step`` gave, with other latents in it."""
    latents = before = result[0] if isinstance(result, tuple) else result.prev_sample
    for function in amendments:
        stepped = Stepped(latents, given["sample"], given["model_output"], given["timestep"], scheduler)
        latents = function(stepped)
        if not isinstance(latents, Tensor) or latents.shape != before.shape:
            got = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            raise ValueError(f"an amendment of a step must return latents {tuple(before.shape)}, got {got}")
    if latents is before:
        return result
    latents = latents.to(before)
    if isinstance(result, tuple):
        return (latents, *result[1:])
    result.prev_sample = latents
    return result


class Sampling(Shared):
    """A call of an attached pipeline, as far as it is known from the pipeline's own calls.

    Attributes:
        pipe: the pipeline.
        arguments: of the running call by name, defaults included; empty outside.
        call: how many calls came before in this session.
        step: denoising step that runs, from 0; ``None`` outside.
        scale: what the scheduler multiplied the latents by before the denoiser read them, at this step.
        shifted: what was added to the latents of this step, ``None`` for nothing.
        latents: what the last step of the scheduler gave, kept after the call; ``None`` before any.
    """

    def __init__(self, session: Session, pipe: Any):
        self.session, self.pipe = session, pipe
        self.arguments: dict[str, Any] = {}
        self.call = -1
        self.step: Any = None
        self.scale: float | Tensor = 1.0
        self.shifted: Tensor | None = None
        self.latents: Tensor | None = None
        self.scheduler: Any = None
        self._amendments: list[Callable[[Stepped], Tensor]] = []

    # ---- what is known

    @property
    def running(self) -> bool:
        return self.step is not None

    @property
    def timesteps(self) -> Any:
        """The scheduler's timesteps; a pipeline may use the last of them only."""
        return getattr(self.pipe.scheduler, "timesteps", None)

    @property
    def steps(self) -> int | None:
        """How many denoising steps the running call takes."""
        said = getattr(self.pipe, "_num_timesteps", None)
        if isinstance(said, int) and said:
            return said
        return None if self.timesteps is None else len(self.timesteps)

    @property
    def prompt_count(self) -> int | None:
        """How many prompts, or classes, the pipeline was called with; ``None`` where it does not say."""
        for name in PROMPTS:
            value = self.arguments.get(name)
            if value is not None:
                return 1 if isinstance(value, (str, int)) else len(value)
        return None

    @property
    def images_per_prompt(self) -> int:
        """How many results each prompt has."""
        return next((self.arguments[name] for name in IMAGES if self.arguments.get(name)), 1)

    @property
    def prompts(self) -> list[str] | None:
        """The prompts as text; ``None`` where the pipeline was given embeddings or classes."""
        prompt = self.arguments.get("prompt")
        if prompt is None:
            return None
        return [prompt] if isinstance(prompt, str) else list(prompt)

    def rows(self, batch: int) -> tuple[tuple[str, ...] | None, tuple[int, ...] | None]:
        """Names of the rows of a batch, and which prompt each belongs to; ``None`` where they are not known."""
        prompts = self.prompt_count
        each = 0 if prompts is None else prompts * self.images_per_prompt
        if not each or batch % each:
            return None, None
        numbers = tuple(p for p in range(prompts or 0) for _ in range(self.images_per_prompt))
        names = self._groups(batch // each)
        if names is None and each != prompts and self.arguments.get("num_videos_per_prompt"):
            # Pipelines of videos that have the argument and make one video whatever it says.
            each, numbers = prompts or 0, tuple(range(prompts or 0))
            names = self._groups(batch // each)
        return None if names is None else tuple(n for n in names for _ in range(each)), numbers * (batch // each)

    def _groups(self, count: int) -> tuple[str, ...] | None:
        pipe, said = self.pipe, self.session.pass_name
        guided = bool(getattr(pipe, "do_classifier_free_guidance", False))
        name = type(pipe).__name__
        perturbed = bool(getattr(pipe, "do_perturbed_attention_guidance", False))
        if count == 1:
            if said in ("cond", "uncond"):
                return (said,)
            return None if guided else ("cond",)
        if count == 2:
            if perturbed and not guided:
                return ("cond", "perturbed")
            return ("cond", "uncond") if name in COND_FIRST else ("uncond", "cond")
        if count == 3 and name in BY_IMAGE:
            return ("cond", "image", "uncond")
        return ("uncond", "cond", "perturbed") if count == 3 and perturbed else None

    # ---- what may be changed

    def shift(self, delta: Tensor) -> None:
        """Move the latents of this step: the scheduler will step on from them so, and passes of the denoiser that
        follow at this step read them so. What is denoised in the pass that runs is for the caller to move, too.

        Args:
            delta: (n, ...) to be added to the pipeline's latents, before the scheduler's scaling.

        Raises:
            RuntimeError: no step runs.
        """
        if not self.running:
            raise RuntimeError("latents can be moved while a pipeline runs only: attach(pipe, ...), and call pipe(...)")
        self.shifted = delta if self.shifted is None else self.shifted + delta

    def amend(self, function: Callable[[Stepped], Tensor]) -> None:
        """Have what the scheduler makes of the latents at this step changed.

        Args:
            function: from a :class:`Stepped` to the latents that the pipeline goes on with; several follow one another,
                each on what the one before gave.

        Raises:
            RuntimeError: no step runs.
        """
        if not self.running:
            raise RuntimeError("steps can be changed while a pipeline runs only: attach(pipe, ...), and call pipe(...)")
        self._amendments.append(function)

    def moved(self, main: Tensor) -> Tensor:
        """What the denoiser is about to read, with the latents moved as they were earlier in this step."""
        if self.shifted is None:
            return main
        delta = (repeated(self.shifted, len(main)) * self.scale).to(main)
        # Conditions may lie behind the latents, along any axis.
        beside = [(0, m - d) for m, d in zip(main.shape, delta.shape, strict=True)]
        return main + F.pad(delta, [size for pair in reversed(beside) for size in pair])

    # ---- following

    def install(self) -> None:
        """Follow the calls of the pipeline until the session is over."""
        pipe, cls, sampling = self.pipe, type(self.pipe), self

        @functools.wraps(cls.__call__)
        def call(own: Any, *args: Any, **kwargs: Any) -> Any:
            plain = functools.partial(cls.__call__, own)
            if own is not pipe or not sampling.session.active or sampling.running:
                return plain(*args, **kwargs)
            sampling._begin(inspect.signature(cls.__call__).bind(own, *args, **kwargs))
            try:
                return plain(*args, **kwargs)
            finally:
                sampling._end()

        attached = variant(cls, __call__=call)
        _set_class(pipe, attached)
        self.session.undo(
            functools.partial(_unset_class, pipe, attached, cls), functools.partial(_set_class, pipe, attached)
        )

    def _begin(self, bound: inspect.BoundArguments) -> None:
        own = self.session.model
        parts = {name: part for name in DENOISERS if isinstance(part := getattr(self.pipe, name, None), nn.Module)}
        if not any(own is module for part in parts.values() for module in part.modules()):
            raise RuntimeError(
                f"{type(self.pipe).__name__} denoises with another model than the {type(own).__name__} that was "
                f"attached to ({', '.join('pipe.' + name for name in parts)} was replaced meanwhile); attach again"
            )
        bound.apply_defaults()
        self.arguments = {name: value for name, value in list(bound.arguments.items())[1:] if name != "kwargs"}
        self.call, self.step, self.latents = self.call + 1, 0, None
        self.session._now.notes.clear()
        self.session._now.announced = None
        self._follow(self.pipe.scheduler)

    def _end(self) -> None:
        cls = type(self.scheduler)
        _unset_class(self.scheduler, cls, cls.__mro__[1])
        self.arguments, self.scheduler, self.step, self.shifted, self.scale = {}, None, None, None, 1.0
        self._amendments = []
        now = self.session._now
        now.step = now.steps = now.told = now.prompts = None

    def _follow(self, scheduler: Any) -> None:
        cls, sampling = type(scheduler), self
        self.scheduler = scheduler

        @functools.wraps(cls.step)
        def step(own: Any, *args: Any, **kwargs: Any) -> Any:
            if own is not sampling.scheduler:
                return cls.step(own, *args, **kwargs)
            if sampling.shifted is not None:
                sample = kwargs["sample"] if "sample" in kwargs else args[2]
                new = sample + repeated(sampling.shifted, len(sample)).to(sample)
                if "sample" in kwargs:
                    kwargs["sample"] = new
                else:
                    args = (*args[:2], new, *args[3:])
            amendments, sampling._amendments = sampling._amendments, []
            result = cls.step(own, *args, **kwargs)
            if amendments:
                given = dict(zip(("model_output", "timestep", "sample"), args, strict=False)) | kwargs
                result = _amended(result, amendments, own, given)
            sampling.latents = result[0]
            sampling.step += 1
            sampling.shifted, sampling.scale = None, 1.0
            return result

        methods: dict[str, Callable[..., Any]] = {"step": step}
        if hasattr(cls, "scale_model_input"):

            @functools.wraps(cls.scale_model_input)
            def scale_model_input(own: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
                result = cls.scale_model_input(own, sample, *args, **kwargs)
                if own is sampling.scheduler and result is not sample:
                    one = torch.ones((), dtype=sample.dtype, device=sample.device)
                    sampling.scale = cls.scale_model_input(own, one, *args, **kwargs)
                return result

            methods["scale_model_input"] = scale_model_input
        _set_class(scheduler, variant(cls, **methods))

    def tell(self, batch: int) -> None:
        """For the adapter: the pipeline is about to call its denoiser with so many rows."""
        if not self.running:
            return
        now = self.session._now
        now.step, now.steps = self.step, self.steps
        now.told, now.prompts = self.rows(batch)
        self.session.announce(self.step)


def repeated(delta: Tensor, batch: int) -> Tensor:
    """(n, ...) of one group of guidance for all rows of a batch.

    >>> repeated(torch.tensor([1, 2]), 4).tolist()
    [1, 2, 1, 2]
    """
    if batch % len(delta):
        raise ValueError(f"{len(delta)} latents do not belong evenly to a batch of {batch} rows")
    return delta.repeat(batch // len(delta), *([1] * (delta.dim() - 1)))


def _set_class(thing: Any, cls: Any) -> None:
    object.__setattr__(thing, "__class__", cls)


def _unset_class(thing: Any, attached: Any, before: Any) -> None:
    if type(thing) is attached:  # what the user put in its place meanwhile stays
        _set_class(thing, before)
