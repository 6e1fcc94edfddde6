"""HarmoniCa: which parts of a diffusion transformer run at which step, learnt along the sampling itself.

HarmoniCa (Huang et al., 2025) keeps a number for every step and every attention and feed-forward,
``r = sigmoid(theta)`` of shape (steps, modules). While it is learnt, every module runs, and what it hands on is a blend
with the kept output,

    ``y~ = r y + (1 - r) c,    c <- y~ where r > tau``  (without gradient; the first step fills c with y),

so that what is written is the blend, and the threshold decides about writing only. Learning goes along one trajectory
(*step-wise denoising training*): the first step runs in full; then at each step the model by itself is the teacher, the
model with its cache the student, and the student's prediction is the step that is taken,

    ``L_t = lambda_t mean (e - e~)^2 + beta sum_m r[t, m]``,

one step of AdamW on row t, whose entries stay within [-5, 5]. ``lambda_t`` says what row t does to the image (*image
error proxy*): over the whole sampling from the same noise, rows learnt from the first step down to t, the rest one,

    ``lambda_t = mean (x_0(rows up to t) - x_0(rows up to the step before t))^2``.

Sampling blends nothing: a module runs where ``r > tau`` and otherwise is not called, :class:`attnlib.cache.StepCache`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checks import check_axes, check_int, check_ints, check_real, check_type, plain, to_list
from ..files import read_file
from ..hooks.attach import attach
from ..hooks.denoiser import CallSite, with_gradient
from ..hooks.site import Site
from .steps import SUBLAYERS, StepCache, _Counted

#: Of the row of the first step, which is not learnt: every module runs there.
ALWAYS = 5.0

#: Entries stay within so much of 0.
BOUND = 5.0


class _Row(nn.Module):
    """The logits of one step."""

    def __init__(self, modules: int, first: bool):
        super().__init__()
        self.prob = nn.Parameter(torch.full((modules,), ALWAYS) if first else torch.randn(modules), not first)


class Router(nn.ModuleList):
    """Which module runs at which step: a row of logits for each step.

    Rows of the state dict are in the authors' order, ``"0.prob"`` that of the last step, so that their files load;
    :meth:`scores` and :meth:`table` are in the order of sampling. The row of the first step is not learnt.

    Args:
        steps: S, of sampling.
        modules: M: attention and feed-forward of every block, in the order of the model.
        threshold: tau; a module runs where its score is above.
        timesteps: that it is for, from the first step to the last; ``None`` for not said.
        layout: groups of rows of the batch, ``("cond", "uncond")``; ``None`` for not said.
        size: (C, H, W) of what is denoised; ``None`` for not said.

    >>> router = Router(10, 56)
    >>> router.table().shape, bool(router.table()[0].all()), sorted(router.state_dict())[0]
    (torch.Size([10, 56]), True, '0.prob')
    """

    def __init__(
        self,
        steps: int,
        modules: int,
        threshold: float = 0.1,
        timesteps: Sequence[float] | None = None,
        layout: Sequence[str] | None = None,
        size: Sequence[int] | None = None,
    ):
        check_int("steps", steps, least=1)
        check_int("modules", modules, least=1)
        super().__init__(_Row(modules, i == steps - 1) for i in range(steps))
        self.threshold = check_real("threshold", threshold, least=0, below=1)
        at, groups = to_list("timesteps", timesteps), to_list("layout", layout, "['cond', 'uncond']")
        if at is not None and len(at) != steps:
            raise ValueError(f"timesteps has {len(at)} entries for steps={steps}")
        self.timesteps = None if at is None else tuple(float(check_real("timesteps", plain(t), least=0)) for t in at)
        self.layout = None if groups is None else tuple(groups)
        self.size = None if size is None else check_ints("size", size, least=1)

    @property
    def modules_count(self) -> int:
        return len(self.row(0))

    def row(self, step: int) -> nn.Parameter:
        """(M,) logits of a step of sampling."""
        check_int("step", step, least=0, most=len(self) - 1)
        row: nn.Parameter = self[len(self) - 1 - step].prob  # type: ignore[assignment]
        return row

    def scores(self) -> Tensor:
        """(S, M) r, from the first step of sampling to the last."""
        return torch.stack([self.row(step) for step in range(len(self))]).sigmoid()

    def table(self) -> Tensor:
        """(S, M) bool: what runs, from the first step of sampling to the last."""
        return self.scores().detach() > self.threshold

    def extra_state(self) -> dict[str, Any]:
        """What it is for, as plain values."""
        said = {"threshold": self.threshold, "timesteps": self.timesteps, "layout": self.layout, "size": self.size}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in said.items()}

    def save(self, path: str | Path) -> None:
        """To a ``.safetensors`` file, with what it is for; to any other as the authors' script keeps it."""
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        if Path(path).suffix == ".safetensors":
            save_file(state, str(path), {"router": json.dumps(self.extra_state())})
        else:
            torch.save({"routers": state, "args": self.extra_state()}, path)

    @classmethod
    def load(cls, path: str | Path, **said: Any) -> Router:
        """From a file of :meth:`save`, or of the authors' ``train_router.py``.

        Theirs says how many steps and modules there are, the threshold and nothing else: its timesteps are those of the
        script, evenly from 999 to 0, unless they are given.

        Args:
            path: of the file.
            said: ``threshold``, ``timesteps``, ``layout``, ``size`` where the file does not say them, or otherwise.

        Raises:
            ValueError: a file without the rows of a router.
        """
        if Path(path).suffix == ".safetensors":
            from safetensors import safe_open

            state = read_file(path)
            with safe_open(str(path), "pt") as file:
                known = json.loads((file.metadata() or {}).get("router", "{}"))
        else:
            found = read_file(path)
            state = found.get("routers", found) if isinstance(found, Mapping) else {}
            known = found.get("args", {}) if isinstance(found, Mapping) else {}
            if not isinstance(known, Mapping):  # the options of their script
                known = {"threshold": getattr(known, "ste_threshold", None)}
        names = {f"{i}.prob" for i in range(len(state))}
        if not state or set(state) != names or len({value.shape for value in state.values()}) != 1:
            raise ValueError(f"{path} holds no router, rows '0.prob', '1.prob', ... of one length: {sorted(state)[:4]}")
        steps, modules = len(state), len(state["0.prob"])
        if "timesteps" not in known:
            known["timesteps"] = [float(round(999 * i / max(1, steps - 1))) for i in range(steps)][::-1]
        settings = {name: value for name, value in {**known, **said}.items() if value is not None}
        router = cls(steps, modules, **settings).to(state["0.prob"].dtype)
        router.load_state_dict(state)
        return router


def layout_of(rows: Sequence[str] | None) -> tuple[str, ...] | None:
    """The groups of rows of a batch.

    >>> layout_of(("cond", "cond", "uncond", "uncond"))
    ('cond', 'uncond')
    """
    return None if rows is None else tuple(row for n, row in enumerate(rows) if n == 0 or rows[n - 1] != row)


class HarmoniCa(StepCache):
    """Modules run where a router's score is above its threshold, and hand on their last output otherwise.

    ::

        router = Router.load("router.safetensors")
        with attnlib.attach(pipe, HarmoniCa(router)):
            pipe(class_labels=[207], num_inference_steps=len(router), guidance_scale=4.0)

    Args:
        router: learnt by :func:`train_router`, or loaded.
        acts_on: what its columns are.

    Raises:
        ValueError: at attach, a router with another number of modules; when the pipeline runs, another schedule, size
            or layout of the batch than the router says, or one that changes in mid-call.

    Reference: Huang et al., 2025, arXiv 2410.01723; held to its code.

    >>> HarmoniCa(Router(10, 56)).reuses_features
    True
    """

    name: ClassVar[str] = "harmonica"

    def __init__(self, router: Router, acts_on: Sequence[str] = SUBLAYERS):
        if not isinstance(router, Router):
            raise TypeError(f"router must be an attnlib.cache.Router, got {type(router).__name__}")
        self.router = router
        super().__init__(router.table(), acts_on)

    @property
    def identity(self) -> bool:
        return False  # one that runs everything refuses another schedule all the same

    def reset(self) -> None:
        super().reset()
        self._given: Any = None

    def _begin(self, steps: int | None) -> None:
        given = self._given
        super()._begin(steps)
        self._given = given

    def around_denoiser(
        self, site: CallSite, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Tensor]
    ) -> Tensor:
        check_router(self.router, site, inputs)
        now = (layout_of(site.rows), tuple(inputs[site.main].shape))
        if site.step and self._given is not None and self._given != now:
            raise ValueError(
                f"HarmoniCa: the batch was {self._given[0]} of shape {self._given[1]} at the first step, and is "
                f"{now[0]} of shape {now[1]} at step {site.step}; what is kept cannot be used again"
            )
        self._given = now
        return call(inputs)


def check_router(router: Router, site: CallSite, inputs: dict[str, Any]) -> None:
    """Refuse a call of a denoiser that a router is not for."""
    timesteps = None if site.sampling is None else site.sampling.timesteps
    if router.timesteps is not None and timesteps is not None and site.step == 0:
        now = [float(t) for t in timesteps][-(site.steps or len(timesteps)) :]
        if len(now) != len(router) or any(abs(a - b) > 1e-3 for a, b in zip(now, router.timesteps, strict=True)):
            raise ValueError(
                f"this router is for timesteps {_short(router.timesteps)}, and the pipeline takes {_short(now)}; one "
                "router serves one schedule"
            )
    groups = layout_of(site.rows)
    if router.layout is not None and groups != router.layout:
        raise ValueError(f"this router is for batches of rows {router.layout}, and the model is called with {groups}")
    shape = tuple(inputs[site.main].shape[1:])
    if router.size is not None and shape != router.size:
        raise ValueError(f"this router is for inputs of size {router.size}, and the model is called with {shape}")


def _short(numbers: Sequence[float]) -> str:
    said = [f"{n:g}" for n in numbers]
    return "[" + ", ".join(said if len(said) < 9 else [*said[:4], "...", *said[-2:]]) + "]"


class RouterTraining(_Counted):
    """Step-wise denoising training of a router while a pipeline samples; :func:`train_router` drives it.

    Args:
        router: to be learnt.
        optimizer: of its parameters; ``None`` runs with blended outputs and learns nothing.
        weights: ``lambda`` of each step of sampling; the first is not used.
        beta: of the sum of scores.
        scores: (S, M) blend with these instead, and learn nothing.
        guided_channels: channels of the prediction that guidance acts on; ``None`` for as many as are denoised. The
            authors' code has 3.
        acts_on: what columns are.
    """

    name: ClassVar[str] = "router-training"
    differentiates = True
    reuses_features = True

    def __init__(
        self,
        router: Router,
        optimizer: torch.optim.Optimizer | None = None,
        weights: Sequence[float] | None = None,
        beta: float = 7e-8,
        scores: Tensor | None = None,
        guided_channels: int | None = None,
        acts_on: Sequence[str] = SUBLAYERS,
    ):
        check_type("router", router, Router)
        self.router, self.optimizer, self.weights = router, optimizer, weights
        self.beta = check_real("beta", beta, least=0)
        self.scores, self.guided_channels = scores, guided_channels
        if scores is not None:
            check_axes("scores", scores, steps=len(router), modules=router.modules_count)
        if guided_channels is not None:
            check_int("guided_channels", guided_channels, least=1)
        if optimizer is not None and (weights is None or len(weights) != len(router)):
            count = "none" if weights is None else len(weights)
            raise ValueError(
                f"weights must say lambda of each of {len(router)} steps where there is an optimizer, got {count}"
            )
        super().__init__(acts_on)

    def reset(self) -> None:
        super().reset()
        self._features: dict[int, Tensor] = {}
        self._row: Tensor | None = None
        self.losses: list[dict[str, float]] = []

    def prepare(self, model: nn.Module, sites: Sequence[Site]) -> None:
        super().prepare(model, sites)
        if len(self.columns) != self.router.modules_count:
            raise ValueError(
                f"the router has {self.router.modules_count} columns, and {type(model).__name__} has "
                f"{len(self.columns)} modules {self.acts_on}"
            )

    def around_module(self, site: CallSite, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Any]) -> Any:
        y = call(inputs)
        row, column = self._row, self._column[site.name]
        if row is None:
            return y
        kept = self._features.get(column)
        if kept is not None:
            reuse = 1 - row[column]
            y = kept * reuse + y * (1 - reuse)
        if kept is None or bool(row[column] > self.router.threshold):
            self._features[column] = y.detach()
        return y

    def around_denoiser(
        self, site: CallSite, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Tensor]
    ) -> Tensor:
        step, router = site.step, self.router
        if step is None or site.sampling is None:
            raise ValueError("a router is learnt along a pipeline's own sampling: attach to the pipeline")
        if site.pass_name is not None:
            raise ValueError(
                f"{type(site.sampling.pipe).__name__} runs its passes one after the other, and a router is learnt on "
                "guided predictions, from one batch of all of them"
            )
        check_router(router, site, inputs)
        if step == 0:
            self._features = {}
        if step == 0 or self.optimizer is None:
            given = router.scores().detach() if self.scores is None else self.scores
            return self._run(call, inputs, given[step])
        assert self.weights is not None
        row = router.row(step)
        teacher = self._run(call, inputs, None)
        with with_gradient():
            scores = row.sigmoid()
            student = self._run(call, inputs, scores)
            data = self._guided(student - teacher.clone(), site, inputs[site.main].shape[1]).square().mean()
            total = scores.sum()
            loss = data * self.weights[step] + self.beta * total
            (row.grad,) = torch.autograd.grad(loss, row)
        if not bool(row.grad.isfinite().all()):
            raise ValueError(f"the slope of the router's row of step {step} is not finite; run the model in float32")
        self.optimizer.step()
        row.grad = None
        with torch.no_grad():
            row.clamp_(-BOUND, BOUND)
        self.losses.append({"step": step, "loss": float(loss), "data": float(data), "scores": float(total)})
        return student.detach()

    def _run(self, call: Callable[..., Tensor], inputs: dict[str, Any], row: Tensor | None) -> Tensor:
        self._row = row
        try:
            return call(inputs)
        finally:
            self._row = None

    def _guided(self, difference: Tensor, site: CallSite, channels: int) -> Tensor:
        """What becomes of a difference of two predictions under guidance, which is linear."""
        rows = layout_of(site.rows)
        if rows not in (("cond", "uncond"), ("uncond", "cond")):
            return difference
        scale = site.sampling.arguments.get("guidance_scale", getattr(site.sampling.pipe, "guidance_scale", None))
        if scale is None:
            raise ValueError(f"the guidance scale of {type(site.sampling.pipe).__name__} is not known; give it")
        channels = channels if self.guided_channels is None else self.guided_channels
        eps, rest = difference[:, :channels], difference[:, channels:]
        halves = eps.chunk(2)
        cond, uncond = halves if rows[0] == "cond" else halves[::-1]
        guided = uncond + scale * (cond - uncond)
        return torch.cat([torch.cat([guided, guided]), rest], 1)


def _sample(pipe: Any, training: RouterTraining, given: Mapping[str, Any], seed: int) -> Tensor:
    """Latents at the end of a call of a pipeline under a training intervention."""
    arguments: dict[str, Any] = {"num_inference_steps": len(training.router), **given}
    names = inspect.signature(type(pipe).__call__).parameters
    if "output_type" in names:
        arguments.setdefault("output_type", "latent")
    device = getattr(pipe, "_execution_device", torch.device("cpu"))
    arguments["generator"] = torch.Generator(device).manual_seed(seed)
    with attach(pipe, training) as session:
        pipe(**arguments)
        latents: Tensor = session.sampling.latents
    return latents


def image_error_weights(
    pipe: Any, router: Router, given: Mapping[str, Any], seed: int = 0, **settings: Any
) -> list[float]:
    """``lambda`` of each step of sampling: what the router's row of that step does to the latents at the end.

    One sampling in full, and one more for each further row that blends, from the same noise.

    Args:
        pipe: a pipeline with one batch for all rows of guidance.
        router: as learnt so far.
        given: arguments of the pipeline.
        seed: of its noise.
        settings: ``acts_on`` of :class:`RouterTraining`.

    Returns:
        S numbers, the first 0.
    """
    check_type("router", router, Router)
    check_type("given", given, Mapping)
    learnt = router.scores().detach()
    scores = torch.ones_like(learnt)
    found = [0.0]
    before = _sample(pipe, RouterTraining(router, scores=scores, **settings), given, seed)
    for step in range(1, len(router)):
        scores[step] = learnt[step]
        now = _sample(pipe, RouterTraining(router, scores=scores, **settings), given, seed)
        found.append(float((now - before).square().mean()))
        before = now
    return found


def train_router(
    pipe: Any,
    router: Router,
    draw: Callable[[int], Mapping[str, Any]],
    epochs: int,
    *,
    lr: float = 0.01,
    beta: float = 7e-8,
    refresh: int = 500,
    seed: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
    start: int = 0,
    progress: Callable[[int, list[dict[str, float]]], None] | None = None,
    **settings: Any,
) -> list[dict[str, float]]:
    """Learn a router without images: each epoch is one sampling of the pipeline.

    Args:
        pipe: a pipeline whose guidance is one batch (DiT, PixArt, Stable Diffusion); its weights are not changed.
        router: to be learnt in place.
        draw: arguments of the pipeline for an epoch (classes or prompts, ``guidance_scale``), its number given; what it
            gives decides the size of the batch.
        epochs: samplings, each with S - 1 steps of AdamW.
        lr: learning rate.
        beta: of the sum of scores; the larger, the less runs.
        refresh: iterations, S in each epoch, after which ``lambda`` is measured again; a multiple of S.
        seed: of the noise; epoch e starts from that of ``seed + e``.
        optimizer: to go on with; AdamW without weight decay otherwise.
        start: epoch to go on from.
        progress: called after each epoch with its number and its losses.
        settings: ``guided_channels`` and ``acts_on`` of :class:`RouterTraining`.

    Returns:
        Losses of every iteration: ``epoch``, ``step``, ``loss``, ``data`` (before lambda) and ``scores`` (their sum).

    Raises:
        ValueError: ``refresh`` is no multiple of S, or a slope is not finite.

    Defaults are those of the authors' README for DiT-XL/2. In their script the first step after ``lambda`` was measured
    blends in, by 1 - sigmoid(5), features that the measurement left behind; here every sampling begins with none.
    """
    check_type("router", router, Router)
    if not callable(draw):
        raise TypeError(f"draw must be a function of the number of an epoch, got {type(draw).__name__}")
    check_int("epochs", epochs, least=0)
    check_int("start", start, least=0)
    check_int("refresh", refresh, least=1)
    if refresh % len(router):
        raise ValueError(f"refresh={refresh} must be a multiple of the {len(router)} steps of a sampling")
    optimizer = optimizer or torch.optim.AdamW(router.parameters(), lr=check_real("lr", lr, above=0), weight_decay=0)
    plain = {name: value for name, value in settings.items() if name == "acts_on"}
    history: list[dict[str, float]] = []
    weights: list[float] | None = None
    for epoch in range(start, start + epochs):
        given = draw(epoch)
        if weights is None or epoch * len(router) % refresh == 0:
            weights = image_error_weights(pipe, router, given, seed + epoch, **plain)
        training = RouterTraining(router, optimizer, weights, beta, **settings)
        _sample(pipe, training, given, seed + epoch)
        losses = [{"epoch": epoch, **one} for one in training.losses]
        history += losses
        if progress is not None:
            progress(epoch, losses)
    return history
