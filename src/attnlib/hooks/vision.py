"""What the tokens of a vision tower attend to, read where its attention runs.

Queries and keys are taken as the tower's own attention function gets them, with whatever norms and positions belong to
them, and weights are those of :mod:`attnlib.hooks.call`, held to the tower's own output like any other layer's. The
tower's kernel stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import shaped
from ..nn.recompute import running_backward
from ..types import check_choice, stats_dtype
from .call import row_blocks, score_rows, verify, weights_of
from .hf.follow import watch_prompts
from .hf.layer import LayerRuntime, intercept, runtime_of
from .hf.names import (
    READABLE,
    VISION_TOWERS,
    encoded_images,
    implementation_of,
    kernel_of,
    reachable,
    vision_towers,
)
from .intervention import Stages
from .recompute import Shared
from .session import Session
from .site import PairMask, Site

#: What can be read of a layer: the class token's weights by head; the same of all heads as one of full width, as
#: DAMRO's code has it; what each token gets from all.
WHAT = ("class", "concat", "received")


def class_row(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """Weights of the patches in the class token's row, which is the first.

    Args:
        q: (B, H, 1 or more, D) queries.
        k: (B, H, 1 + N, D) keys.
        scale: of the scores; ``D ** -0.5`` by default.

    Returns:
        (B, H, N) in the statistics dtype; the class token's own share is left out, so rows sum to less than 1.

    >>> import torch
    >>> class_row(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 5, 4)).tolist()
    [[[0.20000000298023224, 0.20000000298023224, 0.20000000298023224, 0.20000000298023224]]]
    """
    site = _site_of(q, k, scale)
    row = torch.zeros(1, dtype=torch.long, device=q.device)
    scores, _ = score_rows(site, q, k, row, PairMask(q.shape[2], k.shape[2]))
    return weights_of(site, scores, row)[:, :, 0, 1:]


def class_attention(q: Tensor, k: Tensor, num_heads: int, scale: float, head_merge: str = "heads") -> Tensor:
    """What the class token of a vision encoder reads of each patch, from projections of one layer.

    Args:
        q: (B, 1 + N, C), or its first row (B, 1, C), before heads are split; the class token is first.
        k: (B, 1 + N, C).
        num_heads: H.
        scale: of scores of split heads.
        head_merge: ``"heads"`` for (B, H, N); ``"mean"`` and ``"sum"`` over heads; ``"concat"`` treats all heads as
            one of width C with scale ``C ** -0.5``, as DAMRO's code does.

    Returns:
        (B, N), or (B, H, N).

    >>> class_attention(torch.ones(1, 1, 4), torch.zeros(1, 3, 4), 2, 1.0, "sum").tolist()
    [[0.6666666865348816, 0.6666666865348816]]
    """
    check_choice("head_merge", head_merge, ("heads", "mean", "sum", "concat"))
    q = q[:, :1]
    if head_merge == "concat":
        return class_row(q[:, None], k[:, None])[:, 0]
    q, k = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k))
    return merged(class_row(q, k, scale), head_merge)


def merged(rows: Tensor, how: str) -> Tensor:
    """Weights by head (B, H, N) as they are (``"heads"``), their ``"mean"`` or their ``"sum"`` (B, N)."""
    return rows if how == "heads" else rows.mean(1) if how == "mean" else rows.sum(1)


def _site_of(q: Tensor, k: Tensor, scale: float | None) -> Site:
    """The site of tensors without a model."""
    return Site(
        0, "tensors", nn.Identity(), "self", q.shape[1], k.shape[1], q.shape[-1],
        float(q.shape[-1] ** -0.5 if scale is None else scale), q.shape[2], k.shape[2],
    )  # fmt: skip


@shaped(q="float (B, H, N, D)", k="float (B, H, N, D)")
def received_attention(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """How much each token is attended to by all, averaged over queries and heads: (B, H, N, D) twice -> (B, N)."""
    return _received(_site_of(q, k, scale), q, k, PairMask(q.shape[2], k.shape[2]))


def _received(site: Site, q: Tensor, k: Tensor, pair: PairMask) -> Tensor:
    total = torch.zeros(q.shape[0], k.shape[2], dtype=stats_dtype(q.dtype), device=q.device)
    for rows in row_blocks(torch.arange(q.shape[2], device=q.device), q.shape[0] * q.shape[1] * k.shape[2]):
        scores, _ = score_rows(site, q, k, rows, pair)
        total = total + weights_of(site, scores, rows).sum(2).mean(1)
    return total / q.shape[2]


class _TowerLayer(LayerRuntime):
    """One attention of a tower, which is read and left as it is."""

    def __init__(self, session: Session, site: Site):
        implementation = implementation_of(site.module)
        kernel = kernel_of(site.module, implementation)
        super().__init__(session, site, Stages([]), kernel, implementation)
        self.readers: list[Callable[[Site, Tensor, Tensor], None]] = []

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        if implementation_of(self.module) != self.implementation:
            self.follow(implementation_of(self.module))
        result = self.kernel(self.module, q, k, v, mask, *args, **kwargs)
        if running_backward():
            return result  # a checkpoint computes again what was read
        n, m = q.shape[2], k.shape[2]
        unread = mask is None and self.implementation not in READABLE
        pair = PairMask(n, m) if unread else self.pairs_of(mask, n, m, kwargs)
        dropout = kwargs.get("dropout", args[0] if args else 0.0)
        site = self.site.but(n_queries=n, n_keys=m, mask=pair, **self.shape_of(q, k, args, kwargs))
        with torch.no_grad():
            q, k = q.detach(), k.detach()
            if not self.stages.verified and not dropout:
                self.stages.verified = verify(site, q, k, v, pair, result[0].transpose(1, 2))
            for read in self.readers:
                read(site, q, k)
        return result


class VisionTower(Shared):
    """Reads, image after image, what chosen layers of a model's vision tower attend to.

    What was read belongs to the prompt of a branch, until the tower reads the images of another.

    Args:
        model: with a vision tower outside its text decoder.
        layers: numbers of its layers, negative from the end, or a slice of them.
        what: ``"class"``, ``"concat"`` or ``"received"``, see :data:`WHAT`.
        tower: dotted path of the tower; found by its usual names otherwise.
        name: what the argument with its path is called.

    Raises:
        ValueError: no such tower or layer, a tower whose attention cannot be reached, or one without a class token.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[int] | slice,
        what: str = "class",
        tower: str | None = None,
        name: str = "tower",
    ):
        check_choice("what", what, WHAT)
        path, self.tower = self._find(model, tower, name)
        found = [(n, m) for n, m in self.tower.named_modules(prefix=path) if reachable(m)]
        if not found:
            raise ValueError(
                f"the vision tower {path!r} ({type(self.tower).__name__}) has no attention that can be reached, so "
                "nothing says what it attends to; choose another source of scores"
            )
        names = [n.rsplit(".", 1)[-1] for n, _ in self.tower.named_parameters()]
        if what != "received" and not {"class_embedding", "cls_token"} & set(names):
            raise ValueError(
                f"the vision tower {path!r} has no class token, so nothing says what it attends to; what='received' or "
                "another source of scores serves it"
            )
        if isinstance(layers, slice):
            first = layers.start or 0
            chosen = list(range(len(found)))[layers]
            if not chosen or not -len(found) <= first < len(found):
                raise ValueError(
                    f"start={layers.start}, end={layers.stop} name no layer of the vision tower, which has {len(found)}"
                )
            self.layers = {number: number for number in chosen}
        else:
            for layer in layers:
                if not -len(found) <= layer < len(found):
                    raise ValueError(f"layer {layer} of the vision tower does not exist; it has {len(found)}")
            self.layers = {layer: layer % len(found) for layer in layers}
        self.what, self._found = what, found
        config: Any = getattr(model, "config", None)
        #: Whether the class token is among the image tokens.
        self.class_token = getattr(config, "vision_feature_select_strategy", "default") == "full"
        self._runs: dict[str | None, list[dict[int, Tensor]]] = {}
        self._done: set[str | None] = set()
        self._now: dict[int, Tensor] | None = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(None), ()  # a copy of a technique reads no tower until it is attached

    @staticmethod
    def _find(model: nn.Module, path: str | None, name: str) -> tuple[str, nn.Module]:
        if path is not None:
            try:
                return path, model.get_submodule(path)
            except AttributeError as error:
                names = [n for n, _ in model.named_modules() if n and n.count(".") < 2]
                raise ValueError(f"{name}={path!r} is not in {type(model).__name__}; it has {names}") from error
        for found, module in vision_towers(model):
            return found, module
        raise ValueError(
            f"{type(model).__name__} has no vision tower under the names {list(VISION_TOWERS)}; give its path, "
            f"{name}='...', or choose another source of scores"
        )

    # ---- watching

    def watch(self, session: Session) -> None:
        """Read whatever images the branches of ``session`` read."""
        self.session: Session = session
        for number in sorted(set(self.layers.values())):
            name, module = self._found[number]
            runtime = runtime_of(module)
            if runtime is None:
                runtime = _TowerLayer(session, Site(number, name, module, "self", 0, 0, 0))
                intercept(session, runtime)
                session.set_attribute(module, "forward", runtime.wrap(module.forward))
            if not isinstance(runtime, _TowerLayer):
                raise ValueError(
                    f"layer {number} of the vision tower ({name}) is acted on by an intervention; what its tokens "
                    "attend to is read in a tower that nothing acts on"
                )
            runtime.readers.append(self._take)
        session.hook(self.tower.register_forward_pre_hook(self._begin))
        session.hook(self.tower.register_forward_hook(self._end))

        def started(given: dict[str, Any]) -> None:
            if encoded_images(given) is None:
                self.forget(session.branch)  # images of the prompt before

        def after(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._done.add(session.branch)

        watch_prompts(session, started)
        session.hook(session.model.register_forward_hook(after, always_call=True))
        session.undo(self._runs.clear)

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._now = {}

    def _take(self, site: Site, q: Tensor, k: Tensor) -> None:
        if self._now is None:
            return
        if site.layer in self._now:
            raise ValueError(
                f"layer {site.layer} of the vision tower ({site.name}) attends more than once per run, to windows or "
                "sequences of its own; what its tokens attend to is not known"
            )
        assert site.mask is not None
        if self.what == "received":
            self._now[site.layer] = _received(site, q, k, site.mask)
        elif self.what == "concat":
            wide_q, wide_k = (t.transpose(1, 2).flatten(2)[:, None] for t in (q[:, :, :1], k))
            self._now[site.layer] = class_row(wide_q, wide_k)[:, 0]
        else:
            row = torch.zeros(1, dtype=torch.long, device=q.device)
            scores, _ = score_rows(site, q, k, row, site.mask)
            self._now[site.layer] = weights_of(site, scores, row)[:, :, 0, 1:]

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        now, self._now = self._now, None
        if not now:
            return
        branch = self.session.branch
        if branch in self._done:
            # What was read so far belongs to a prompt that is done.
            self.forget(branch)
        self._runs.setdefault(branch, []).append(now)

    # ---- what was read

    def forget(self, branch: str | None) -> None:
        """Drop what was read of a branch."""
        self._runs.pop(branch, None)
        self._done.discard(branch)

    def runs(self, branch: str | None) -> list[dict[int, Tensor]]:
        """Of each run of the tower for the prompt of a branch, what each layer gave: see :data:`WHAT`."""
        return self._runs.get(branch, [])

    def scores(self, layer: int, branch: str | None, head_merge: str = "mean") -> Tensor | None:
        """(images, N) of one of the ``layers``, as it was named; ``None`` when no image was read."""
        runs = self.runs(branch)
        if not runs:
            return None
        read = torch.cat([run[self.layers[layer]] for run in runs])
        return merged(read, head_merge) if self.what == "class" else read
