"""What every mechanism is: one ``forward``, explicit state, carry and losses, and claims that a machine checks."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import (
    REAL,
    check_dense,
    check_device,
    check_dtype,
    check_float,
    check_int,
    check_rank,
    check_real,
    check_type,
    check_valid,
    check_width,
    checked,
    describe,
    extremes,
    plain,
    to_tuple,
)
from ..grids import Layout, crop_grid
from ..masks import Mask, Padded, as_mask
from ..types import EXTRAS, PATTERNS, Output, Plan, State, Traits, traced_as_constant
from .layers import zero_invalid
from .recompute import buffers_once

Extras = Sequence[str]

#: What :attr:`Mechanism.pad` can be.
PADS = ("mask", "zeros", "refuse")

#: What :meth:`Mechanism.forward` can hand to :meth:`Mechanism.mix` beside ``x``.
CALL = ("context", "layout", "valid", "context_valid", "mask", "plan", "state", "carry", "returns")

_SELF, _CROSS = (frozenset(p for p in PATTERNS if p.endswith(end)) for end in ("self", "cross"))


def _named(function: Callable[..., Any]) -> tuple[str, ...]:
    """Those of :data:`CALL` that a function takes."""
    parameters = inspect.signature(function).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return tuple(name for name in CALL if anything or name in parameters)


def _in_range(name: str, value: float, off: bool = False) -> None:
    """Raise unless a number lies where the name of the setting says that such numbers lie; 0 if it switches it off."""
    if name == "drop" or name.endswith("_drop"):
        check_real(name, value, least=0, below=1)
    elif name in ("rotary", "scale") or name.endswith("_ratio"):
        check_real(name, value, least=0 if off else None, above=None if off else 0)
    elif name == "eps" or name.endswith("_std"):
        check_real(name, value, least=0)
    elif name == "layer":
        check_int(name, value, least=0)
    elif (
        name in ("dim", "kernel_size", "patch_size", "block_size", "chunk", "rank")
        or name.endswith(("_dim", "hidden"))
        or (name.startswith("num_") and name.endswith(("heads", "experts", "points", "levels", "layers", "features")))
    ):
        check_int(name, value, least=0 if off else 1)


def _sized(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor whose widths, counts, scales and dropouts are checked by their names."""
    names = list(inspect.signature(init).parameters)

    @functools.wraps(init)
    def door(self: Any, *args: Any, **settings: Any) -> None:
        # Numbers of numpy do not go on into shapes, comparisons and traits.
        args = tuple([plain(a) for a in args])
        settings = {name: plain(value) for name, value in settings.items()}
        for name, value in (*zip(names[1:], args, strict=False), *settings.items()):
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                _in_range(name, value, name in self.zero_is_off)
        init(self, *args, **settings)

    return door


class Mechanism(nn.Module):
    """Base of all single-stream mechanisms: ``x (B, *grid, C) -> y (B, *grid, C)``.

    A subclass sets ``class_traits``, builds itself with ``dim`` and its own settings, and implements :meth:`mix`, which
    names those arguments of :meth:`forward` that it takes; they were checked against the traits before. Tokens that do
    not exist come in as zeros, whatever they held, and whatever :meth:`mix` returns, tensor or :class:`Output`, they
    come out as zeros.
    """

    class_traits: ClassVar[Traits] = Traits()
    slug: ClassVar[str]
    #: Buffers that are ours alone, so that no released state dict holds them: one that lacks them leaves them as they
    #: are, also when it is loaded strictly.
    own_state: ClassVar[tuple[str, ...]] = ()
    #: Settings of which 0 means that there is no such part.
    zero_is_off: ClassVar[tuple[str, ...]] = ()
    #: Tokens meet nowhere but in operators that serve a sequence cut over processes, so that every process may hold a
    #: chunk of it (:mod:`attnlib.parallel`).
    cuts_sequence: bool = False
    #: Its answer depends on how many slots there are and where, so that padding changes it.
    reads_length: bool = False
    #: What becomes of a grid that :meth:`mix` cannot take: ``"mask"`` adds tokens that do not exist, ``"zeros"`` adds
    #: zeros that are tokens like any other, as most released models do (in both cases what was added is cut off
    #: again); with ``"refuse"`` :meth:`mix` raises.
    pad: str = "mask"
    _mix_takes: ClassVar[tuple[str, ...]] = CALL
    _plan_takes: ClassVar[tuple[str, ...]] = CALL
    _fits_grid: ClassVar[bool] = False

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        if "__init__" in cls.__dict__ and cls.__module__.startswith("attnlib."):
            cls.__init__ = _sized(checked(cls.__init__))  # type: ignore[method-assign]
        cls._mix_takes, cls._plan_takes = _named(cls.mix), _named(cls.make_plan)
        cls._fits_grid = (cls.grid_step, cls._full_grid) != (Mechanism.grid_step, Mechanism._full_grid)

    def __init__(self, dim: int, context_dim: int | None = None):
        super().__init__()
        self.dim = check_int("dim", dim, least=1)
        self.context_dim = dim if context_dim is None else check_int("context_dim", context_dim, least=1)

    # ---- claims

    @property
    def traits(self) -> Traits:
        """What this instance, configured so and in this mode, supports."""
        return self.class_traits

    @property
    def grid_step(self) -> int | tuple[int, ...]:
        """What :meth:`mix` needs the sides of the grid to be multiples of; one number, or one per axis."""
        return 1

    def _full_grid(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """The smallest grid that holds ``grid`` and that :meth:`mix` can take."""
        step = self.grid_step
        if step == 1:
            return grid
        return tuple(-(-n // s) * s for n, s in zip(grid, to_tuple("grid_step", step, len(grid)), strict=True))

    @property
    def _grid_multiple(self) -> int:
        """The trait ``grid_multiple``: what is padded takes any size."""
        step = self.grid_step
        return 1 if self.pad != "refuse" else step if isinstance(step, int) else math.lcm(*step)

    def _fit_grid(
        self, x: Tensor, valid: Tensor | None, mask: Mask | None
    ) -> tuple[Tensor, Tensor | None, Mask | None]:
        """``x``, ``valid`` and ``mask`` on a grid that :meth:`mix` can take."""
        grid = tuple(x.shape[1:-1])
        full = self._full_grid(grid)
        if full == grid or self.pad == "refuse" or not math.prod(grid):
            return x, valid, mask
        pads = [end for n, m in zip(reversed(grid), reversed(full), strict=True) for end in (0, m - n)]
        if valid is None and self.pad == "mask":
            valid = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
        if valid is not None:
            valid = F.pad(valid, pads, value=self.pad == "zeros")
        return F.pad(x, [0, 0, *pads]), valid, None if mask is None else Padded(mask, grid, full)

    def _cut_grid(self, output: Output, grid: Sequence[int], full: Sequence[int]) -> Output:
        """What :meth:`_fit_grid` added is taken off again, in outputs and in weights."""
        weights, count = output.weights, math.prod(full)
        if weights is not None and tuple(weights.shape[-2:]) == (count, count):
            kept = crop_grid(torch.arange(count, device=weights.device).view(1, *full, 1), grid).flatten()
            output = output._replace(weights=weights.index_select(-2, kept).index_select(-1, kept))
        return output._replace(y=crop_grid(output.y, grid))

    # ---- the call

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        layout: Layout | None = None,
        valid: Tensor | None = None,
        context_valid: Tensor | None = None,
        mask: Mask | Tensor | None = None,
        plan: Plan | None = None,
        state: State | None = None,
        carry: Any = None,
        returns: Extras = (),
    ) -> Any:
        """Mix tokens.

        Args:
            x: (B, *grid, C) tokens, or (B, N, C) with a ``layout``.
            context: (B, *grid', C') tokens to read instead of ``x``.
            layout: what the flat tokens are, when some lie beside the grid.
            valid: (B, *grid) boolean, which tokens exist.
            context_valid: the same for ``context``.
            mask: which pairs may meet.
            plan: discrete choices made earlier by :meth:`plan`.
            state: what the last call returned, to continue a sequence.
            carry: what the previous block returned in this same forward.
            returns: any of ``"state"``, ``"carry"``, ``"weights"``, ``"losses"``.

        Returns:
            (B, *grid, C), or an :class:`Output` when ``returns`` is not empty.

        Raises:
            ValueError: shapes that do not fit, or an argument this mechanism does not support (the trait is named).
        """
        mask = self._mask_of(mask, x, context, state)
        if context is not None:
            x, context = self._of_one_type(x, context)
        self._check_call(x, context, layout, valid, context_valid, mask, plan, state, carry, returns)
        x, context = zero_invalid(x, valid), context if context is None else zero_invalid(context, context_valid)
        grid, exists = x.shape[1:-1], valid
        fitted = self._fits_grid and layout is None
        if fitted:
            x, valid, mask = self._fit_grid(x, valid, mask)
        call = dict(
            context=context, layout=layout, valid=valid, context_valid=context_valid, mask=mask, plan=plan, state=state,
            carry=carry, returns=tuple(returns),
        )  # fmt: skip
        if self.training and not torch.compiler.is_compiling():
            buffers_once(self)
        result = self._mixed(x, {name: call[name] for name in self._mix_takes})
        output = result if isinstance(result, Output) else Output(result)
        if fitted and x.shape[1:-1] != grid:
            output, valid = self._cut_grid(output, grid, x.shape[1:-1]), exists
        if output.state is not None and not output.state.kind:
            output = output._replace(state=output.state.owned(self._name(), x.dtype))
        if valid is not None:
            output = output._replace(y=output.y.masked_fill(~valid.unsqueeze(-1), 0.0))
        return output if returns else output.y

    def _mixed(self, x: Tensor, call: dict[str, Any]) -> Tensor | Output:
        """:meth:`mix`; an error of the arithmetic is laid to a state or a plan that does not fit, or to no tokens."""
        given = [name for name in ("state", "plan") if call.get(name) is not None]
        if not (given or 0 in x.shape[1:-1]) or torch.compiler.is_compiling():
            return self.mix(x, **call)
        try:
            return self.mix(x, **call)
        except (RuntimeError, IndexError, AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            if 0 in x.shape[1:-1]:
                shape = tuple(x.shape)
                raise ValueError(f"{self._name()}: x must hold at least one token, got shape {shape}") from error
            if isinstance(error, (TypeError, ValueError)) and any(name in str(error) for name in given):
                raise  # it says so itself
            for name in given:
                if why := self._misfit(name, x, call):
                    raise ValueError(why) from error
            raise

    def _misfit(self, name: str, x: Tensor, call: dict[str, Any], shapes: bool = True) -> str | None:
        """How the state or plan of a call differs from what this mechanism makes for it; ``None`` if it does not."""
        try:
            with torch.no_grad():
                made = self._made(name, x, call)
        except (RuntimeError, IndexError, AttributeError, KeyError, TypeError, ValueError):
            return None  # nothing to compare with
        if not made:
            return None
        forms = [dict(m._named()) for m in made]
        given = dict(call[name]._named())
        if set(given) != set(forms[0]):
            return f"{name} holds {sorted(given)}, but {self._name()!r} keeps {sorted(forms[0])}"
        for key, t in given.items() if shapes else ():
            like = [form[key] for form in forms]
            # What one token more makes longer may have any length.
            open_axes = {i for i, (a, b) in enumerate(zip(like[0].shape, like[-1].shape, strict=True)) if a != b}
            shape = [None if i in open_axes else size for i, size in enumerate(like[0].shape)]
            fits = t.dim() == len(shape) and all(w in (None, g) for w, g in zip(shape, t.shape, strict=True))
            if not fits or t.dtype != like[0].dtype:
                spelled = ", ".join("any" if size is None else str(size) for size in shape)
                return (
                    f"{name} holds {key!r} as {describe(t)}, but {self._name()!r} keeps {like[0].dtype} of shape "
                    f"({spelled}); it was made for other settings or inputs"
                )
            if name == "plan" and t.numel() and t.dtype != torch.bool:
                low, high = extremes(t, (0, 0))
                if low < min(0, *extremes(like[0], (0, 0))):
                    return f"plan holds {low} in {key!r}, which is no choice"
        return None

    def _made(self, name: str, x: Tensor, call: dict[str, Any]) -> list[Plan] | list[State]:
        """The plan that this mechanism makes for a call, or its states after one token and after two."""
        if name == "plan":
            asked = {k: v for k, v in call.items() if k in self._plan_takes and k in ("context", "valid", "layout")}
            return [self.make_plan(x, **asked)]
        fresh = {**call, "state": None, "valid": None, "mask": None, "plan": None, "returns": ("state",)}
        fresh = {k: v for k, v in fresh.items() if k in call}
        one = x[:, :1]
        outs = [self.mix(t, **fresh) for t in (one, torch.cat([one, one], 1))]
        return [out.state for out in outs if isinstance(out, Output) and out.state is not None]

    def mix(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | Output:
        """The mechanism itself. A subclass names what it takes of the arguments of :meth:`forward`, and no more."""
        raise NotImplementedError

    def make_plan(self, x: Tensor, *args: Any, **kwargs: Any) -> Plan:
        """Subclasses with discrete choices implement this; called by :meth:`plan` without gradient.

        It names those arguments of :meth:`plan` that its choices depend on.
        """
        raise ValueError(f"{self._name()} makes no discrete choices, so it has no plan (trait needs_plan is False)")

    def plan(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        layout: Layout | None = None,
        valid: Tensor | None = None,
        context_valid: Tensor | None = None,
        mask: Mask | Tensor | None = None,
        state: State | None = None,
        carry: Any = None,
    ) -> Plan:
        """The choices that ``forward`` would make for these inputs; hand it back as ``plan=`` to freeze them."""
        mask = self._mask_of(mask, x, context, state)
        self._check_call(x, context, layout, valid, context_valid, mask, None, state, carry, ())
        x, context = zero_invalid(x, valid), context if context is None else zero_invalid(context, context_valid)
        if layout is None:
            x, valid, mask = self._fit_grid(x, valid, mask)
        call = dict(
            context=context, layout=layout, valid=valid, context_valid=context_valid, mask=mask, state=state,
            carry=carry,
        )  # fmt: skip
        with torch.no_grad():
            return self.make_plan(x, **{name: call[name] for name in self._plan_takes if name in call})

    def step(
        self,
        x_t: Tensor,
        state: State | None = None,
        *,
        layout: Layout | None = None,
        valid: Tensor | None = None,
        mask: Mask | Tensor | None = None,
        plan: Plan | None = None,
    ) -> tuple[Tensor, State]:
        """Continue a sequence by the tokens ``x_t`` (B, n, C); returns ``(y_t, state)``. ``state=None`` starts one."""
        if not self.traits.streaming:
            raise ValueError(f"{self._name()} cannot decode step by step (trait streaming is False)")
        out = self.forward(x_t, layout=layout, valid=valid, mask=mask, plan=plan, state=state, returns=("state",))
        assert out.state is not None
        return out.y, out.state

    # ---- training schedules and deployment

    def set_progress(self, progress: float) -> None:
        """Advance schedules to ``progress`` in [0, 1]. Nothing else advances them."""
        check_real("progress", progress, least=0, most=1)

    def deployed(self) -> nn.Module:
        """The equivalent module for inference, norms folded and branches merged; ``self`` when nothing folds."""
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self.own_state:
            if (kept := self._buffers.get(name)) is not None:
                state_dict.setdefault(prefix + name, kept)
        super()._load_from_state_dict(state_dict, prefix, *args)

    # ---- checks

    def _name(self) -> str:
        return getattr(self, "slug", type(self).__name__)

    @traced_as_constant  # a subclass may compute its traits in ways that the compiler cannot trace
    def _claims(self) -> Traits:
        return self.traits

    def _check_call(
        self,
        x: Tensor,
        context: Tensor | None,
        layout: Layout | None,
        valid: Tensor | None,
        context_valid: Tensor | None,
        mask: Mask | None,
        plan: Plan | None,
        state: State | None,
        carry: Any,
        returns: Extras,
    ) -> None:
        # Before every call of every layer: what passes is only compared, the words are made for what does not.
        traits, name = self._claims(), self._name()
        if layout is not None:
            check_type("layout", layout, Layout)
            if not traits.layout:
                raise ValueError(f"{name} takes no layout (trait layout is False)")
            check_rank("x", x, 3, "(B, N, C) when a layout is given")
            layout.check(x.shape[1])
        elif not isinstance(x, Tensor) or x.dim() - 2 not in (
            *traits.grid_ranks,
        ):  # a tuple: compilers cannot guard a set
            ranks = [r + 2 for r in sorted(traits.grid_ranks)]
            shapes = {1: "(B, N, C)", 2: "(B, H, W, C)", 3: "(B, T, H, W, C)"}
            check_rank("x", x, ranks, " or ".join(shapes[r - 2] for r in ranks))
        if x.dtype not in REAL:
            check_float("x", x)
        if x.layout is not torch.strided or x.is_nested:
            check_dense("x", x)
        if x.shape[-1] != self.dim:
            check_width("x", x, self.dim)
        if valid is not None:
            if not traits.valid:
                raise ValueError(f"{name} takes no valid (trait valid is False)")
            check_valid("valid", valid, x.shape[:-1])
            check_device(x=x, valid=valid)
        if context is not None:
            if _CROSS.isdisjoint(traits.patterns):
                raise ValueError(f"{name} takes no context (traits patterns are {sorted(traits.patterns)})")
            check_rank("context", context, (3, 4, 5), "(B, M, C), (B, H, W, C) or (B, T, H, W, C)")
            check_width("context", context, self.context_dim, "context_dim")
            check_dtype(x=x, context=context)
            check_device(x=x, context=context)
            if context.shape[0] != x.shape[0]:
                raise ValueError(f"context has batch {context.shape[0]}, x has batch {x.shape[0]}; they must agree")
            check_valid("context_valid", context_valid, context.shape[:-1])
            check_device(x=x, context_valid=context_valid)
        elif context_valid is not None:
            raise ValueError("context_valid was given without a context")
        elif _SELF.isdisjoint(traits.patterns):
            raise ValueError(f"{name} needs a context (traits patterns are {sorted(traits.patterns)})")
        if mask is not None or plan is not None or state is not None or carry is not None:
            for argument, value, trait in (
                ("mask", mask, "mask"),
                ("plan", plan, "needs_plan"),
                ("state", state, "streaming"),
                ("carry", carry, "carries"),
            ):
                if value is not None and not getattr(traits, trait):
                    raise ValueError(f"{name} takes no {argument} (trait {trait} is False)")
        if plan is not None:
            check_type("plan", plan, Plan)
            for key, t in plan._named():
                check_device(x=x, **{f"plan's {key}": t})
        if state is not None:
            check_type("state", state, State, "an attnlib State, as returns=('state',) gives it")
            if context is not None:
                raise ValueError("state was given with a context; it continues the tokens that x itself reads")
            state.expect(name, x.shape[0], x.device, x.dtype)
            if not state.kind and not self.training and not torch.compiler.is_compiling():
                # Whose it is is not known, and a mechanism that does not read it in this call would not notice.
                given = {"state": state, "layout": layout, "carry": carry, "returns": ()}
                given = {k: v for k, v in given.items() if k in self._mix_takes}
                if why := self._misfit("state", x, given, shapes=False):  # lengths may grow at any number of tokens
                    raise ValueError(why)
        if mask is not None and state is None:
            source = x if context is None else context
            mask.check(math.prod(x.shape[1:-1]), math.prod(source.shape[1:-1]), batch=x.shape[0], device=x.device)
        if type(returns) is not tuple:
            if isinstance(returns, str):
                raise TypeError(
                    f"returns must be a tuple of names, got the string {returns!r}; write returns=({returns!r},)"
                )
            check_type("returns", returns, (tuple, list, set, frozenset), "a tuple of names")
        if returns:
            supported = {
                "state": traits.streaming and context is None,
                "carry": traits.carries,
                "weights": traits.weights,
                "losses": bool(traits.losses),
            }
            for extra in returns:
                if extra not in EXTRAS:
                    raise ValueError(f"returns contains {extra!r}; possible: {list(EXTRAS)}")
                if not supported[extra]:
                    possible = [e for e in EXTRAS if supported[e]]
                    raise ValueError(f"{name} cannot return {extra!r}; possible: {possible}")
        self._check_weights(x)

    @staticmethod
    def _mask_of(mask: Mask | Tensor | None, x: Any, context: Any, state: State | None) -> Mask | None:
        """A tensor for a call without a state may have sides of 1, which serve all."""
        source = x if context is None else context
        if isinstance(mask, Tensor) and state is None and isinstance(x, Tensor) and isinstance(source, Tensor):
            return as_mask(mask, math.prod(x.shape[1:-1]), math.prod(source.shape[1:-1]))
        return as_mask(mask)

    @staticmethod
    def _of_one_type(x: Any, context: Any) -> tuple[Any, Any]:
        """Under autocast a norm gives float32 and a projection half precision: both in the wider of their types."""
        if isinstance(x, Tensor) and isinstance(context, Tensor) and x.dtype != context.dtype:
            device = x.device.type
            on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
            if on and x.is_floating_point() and context.is_floating_point():
                wide = torch.promote_types(x.dtype, context.dtype)
                return x.to(wide), context.to(wide)
        return x, context

    def _check_weights(self, x: Tensor) -> None:
        check_weights(self, getattr(self, "slug", type(self).__name__), {"x": x})


def check_weights(module: nn.Module, name: str, inputs: Mapping[str, Any]) -> None:
    """Raise unless the tensors among ``inputs`` lie where the parameters lie, in a type that one of them has.

    Args:
        module: whose parameters they meet.
        name: of the module.
        inputs: by their names; integers and what is no tensor may be anything.
    """
    first = next(module.parameters(), None) if torch.compiler.is_compiling() else _first_parameter(module)
    for argument, x in inputs.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            continue
        if first is None or (first.is_meta and not x.is_meta):  # weights that are brought in when they are needed
            return
        if first.device != x.device:
            check_device(**{argument: x, "the parameters": first})
        if first.dtype == x.dtype:
            continue
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            continue
        if all(p.dtype != x.dtype for p in module.parameters()):
            raise TypeError(
                f"{argument} has {x.dtype}, but the parameters of {name} have {first.dtype}; convert one of them, or "
                "use torch.autocast"
            )


def _first_parameter(module: nn.Module) -> Tensor | None:
    """``next(module.parameters(), None)``, without what makes the names of all modules for it."""
    for own in module._parameters.values():
        if own is not None:
            return own
    for child in module._modules.values():
        if child is not None and (found := _first_parameter(child)) is not None:
            return found
    return None


class Fusion(nn.Module):
    """Base of modules with two or more streams: ``forward(*streams, ...) -> tuple`` of tensors of the same shapes."""

    slug: ClassVar[str]

    def forward(self, *streams: Tensor, valid: Sequence[Tensor | None] | None = None) -> tuple[Tensor, ...]:
        raise NotImplementedError


def deploy(module: nn.Module) -> nn.Module:
    """A copy of ``module`` for inference in which every part that has a deployed form is replaced by it.

    That is every module with a method ``deployed()``: mechanisms, convolutions with norms, stems and mergings. Where a
    module's own form is itself, what lies inside it is visited.

    >>> import attnlib
    >>> attnlib.deploy(attnlib.create("softmax-attention", dim=8, num_heads=2)).training
    False
    """
    result = copy.deepcopy(module).eval()

    def visit(parent: nn.Module) -> None:
        for name, child in list(parent.named_children()):
            new = _deployed(child)
            if new is child:
                visit(child)
            else:
                setattr(parent, name, new.eval())

    visit(result)
    return _deployed(result).eval()


def _deployed(module: nn.Module) -> nn.Module:
    form = getattr(module, "deployed", None)
    return module if form is None else form()
