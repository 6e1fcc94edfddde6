"""Everything on a GPU, in one command: right against the float64 specification, forward and backward, then timed.

Every operator on every backend and every mechanism of the registry runs in float32, bfloat16 and float16; what it is
held to is the specification in float64, on the CPU, of the same rounded numbers. What rounding may cost is a bound, or,
where a mechanism amplifies rounding, what moving its weights and inputs by one rounding changes. Then the operators are
timed beside others' kernels, where these are installed.

Nothing is dropped silently: what a backend refuses is listed with its reason, and so is what the time did not suffice
for. ``device="cpu"`` with ``small=True`` tries the harness where there is no GPU; such times say nothing about one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

import attnlib

from ... import masks, ops
from ...check.kit import subject_makers
from ...check.subject import Scene, Subject, unserved
from ...extras import installed
from ...grids import window_partition
from ...nn.registry import list_mechanisms
from ...types import Partial
from ..clock import interleave, machine, now, ratio

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Bounds of the relative error of outputs, as a norm; gradients may have :data:`BACK` times as much.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
BACK = 4.0
#: One rounding of each type, and how many times its effect an error may be.
UNITS, TIMES = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}, 4.0
#: Seconds for all, of which so many for the checks.
SECONDS, CHECKING = 480.0, 330.0

Say = Callable[[str], None]


def why_not() -> str | None:
    """Why the suite cannot run here; ``None`` when it can."""
    if torch.cuda.is_available():
        return None
    return "it needs a CUDA device, and PyTorch sees none here"


# --------------------------------------------------------------------------------------------------------------------
# Operators


class Problem(NamedTuple):
    """A call of an operator: sizes of its inputs, and the call on them and on an odd length."""

    op: str
    shapes: tuple[tuple[int, ...], ...]
    call: Callable[..., Any]


def _logs(x: Tensor) -> Tensor:
    """Log-decays of any numbers."""
    return -x.square() * 0.3


def _some(x: Tensor, n: int) -> Tensor:
    """(B, n) which tokens exist, on the device of ``x``: a gap and an end that differ by sample."""
    at = torch.arange(n, device=x.device)
    sample = torch.arange(x.shape[0], device=x.device)[:, None]
    return (at >= sample) & (at < n - 3 * sample) & (at % 7 != 3)


def problems(n: int) -> dict[str, Problem]:
    """Every operator on ``n`` tokens (an odd number), or on a grid of about as many."""
    side = max(6, math.isqrt(n) // 2 * 2)
    qkv = ((2, 4, n, 32), (2, 2, n, 32), (2, 2, n, 32))
    grid, flat = ((2, 2, side, side, 16),) * 3, ((2, 2, side * side, 16),) * 3
    token, channel = (2, 4, n), (2, 4, n, 32)
    scan = ((2, n, 8), (2, n, 8), (8, 4), (2, n, 4), (2, n, 4))
    return {
        "attention": Problem("attention", qkv, ops.attention),
        "attention, causal": Problem("attention", qkv, lambda q, k, v: ops.attention(q, k, v, mask=masks.causal())),
        "attention, window": Problem(
            "attention", qkv, lambda q, k, v: ops.attention(q, k, v, mask=masks.recent(9), valid=_some(q, n))
        ),
        "attention, bias": Problem("attention", (*qkv, (4, n, n)), lambda q, k, v, b: ops.attention(q, k, v, bias=b)),
        **{
            f"attention, {name}": Problem(
                "attention",
                qkv,
                lambda q, k, v, name=name: ops.attention(
                    q, k, v, normalizer=name, mask=masks.causal(), valid=_some(q, n)
                ),
            )
            for name in ("sigmoid", "relu", "softplus_l1", "clipped_softmax")
        },
        "attention, partial": Problem(
            "attention", qkv, lambda q, k, v: ops.attention_partial(q, k, v, mask=masks.sliding_window(8))
        ),
        "split decoding": Problem(
            "split_decoding",
            ((2, 4, 1, 32), *qkv[1:]),
            lambda q, k, v: ops.split_decoding(q, k, v, lengths=[n, n // 3]),
        ),
        "blocks": Problem(
            "block_sparse_attention",
            ((2, 4, 32, 32), (2, 2, 32, 32), (2, 2, 32, 32)),
            lambda q, k, v: ops.block_sparse_attention(
                q, k, v, ops.BlockPlan(torch.tensor([[0, 1], [1, 2], [0, 3], [2, 3]], device=q.device), 8, 8, 32)
            ),
        ),
        "neighborhood": Problem(
            "neighborhood_attention",
            grid,
            lambda q, k, v: ops.neighborhood_attention(q, k, v, kernel_size=(3, 5), dilation=(2, 1)),
        ),
        "neighborhood, table": Problem(
            "neighborhood_attention",
            (*grid, (2, 5, 5)),
            lambda q, k, v, t: ops.neighborhood_attention(
                q, k, v, kernel_size=3, bias_table=t, stride=2, causal=(True, False)
            ),
        ),
        "windows": Problem("window_attention", flat, lambda q, k, v: ops.window_attention(q, k, v, (side, side), 2)),
        "groups": Problem(
            "partition_attention",
            flat,
            lambda q, k, v: ops.partition_attention(q, k, v, window_partition((side, side), 2)),
        ),
        "halo": Problem("halo_attention", flat, lambda q, k, v: ops.halo_attention(q, k, v, (side, side), 2, 1)),
        "agents": Problem(
            "agent_attention",
            (qkv[0], (2, 4, 5, 32), *qkv[1:]),
            lambda q, a, k, v: ops.agent_attention(q, a, k, v, valid=_some(q, n)),
        ),
        "reduced": Problem("reduced_attention", qkv, lambda q, k, v: ops.reduced_attention(q, k, v, 2)),
        "channels": Problem("channel_attention", flat, lambda q, k, v: ops.channel_attention(q, k, v, l2=True)),
        "depthwise": Problem(
            "depthwise", ((2, side, side, 8), (8, 1, 3, 3), (8,)), lambda x, w, b: ops.depthwise(x, w, b, dilation=2)
        ),
        "linear": Problem(
            "linear_attention", qkv, lambda q, k, v: ops.linear_attention(q * 0.2, k, v, valid=_some(q, n))
        ),
        "linear, sum": Problem(
            "linear_attention",
            qkv,
            lambda q, k, v: ops.linear_attention(
                q.sigmoid(), k.sigmoid(), v, normalizer="sum", causal=False, cu_seqlens=[0, n // 3, n]
            ),
        ),
        "linear, decay of heads": Problem(
            "linear_attention", (*qkv, (4,)), lambda q, k, v, g: ops.linear_attention(q, k, v, decay=_logs(g))
        ),
        "linear, decay of tokens": Problem(
            "linear_attention",
            (*qkv, token),
            lambda q, k, v, g: ops.linear_attention(q, k, v, decay=_logs(g), cu_seqlens=[0, n // 3, n]),
        ),
        "linear, decay of channels": Problem(
            "linear_attention", (*qkv, channel), lambda q, k, v, g: ops.linear_attention(q, k, v, decay=_logs(g))
        ),
        "scan": Problem(
            "selective_scan",
            (*scan, (8,), (2, n, 8)),
            lambda u, d, a, b, c, skip, z: ops.selective_scan(u, d, _logs(a), b, c, skip, z, delta_softplus=True),
        ),
        "toeplitz": Problem(
            "toeplitz_attention",
            (*qkv, (4, 2 * n - 1)),
            lambda q, k, v, b: ops.toeplitz_attention(q.sigmoid(), k.sigmoid(), v, b),
        ),
        "sampled": Problem(
            "deformable_attention",
            ((1, 2, 40, 8), (1, 2, n, 2, 2, 2), (1, 2, n, 2, 2)),
            lambda v, at, w: ops.deformable_attention(v, [(4, 8), (2, 4)], at.abs(), w),
        ),
        "sampled, 3d": Problem(
            "deformable_attention_3d",
            ((1, 2, 40, 8), (1, 1, 40, 4), (1, 2, n, 2, 2, 3), (1, 2, n, 2, 2)),
            lambda v, d, at, w: ops.deformable_attention_3d(v, d, [(4, 8), (2, 4)], at.abs(), w),
        ),
    }


def _numbers(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shapes))
    return [torch.randn(s, generator=generator, dtype=torch.float64, device="cpu").to(dtype) for s in shapes]


def _outcome(result: Any) -> Tensor:
    """One tensor of whatever an operator gives."""
    if isinstance(result, Partial):
        result = result.finish()
    return result[0] if isinstance(result, tuple) else result


def _error(a: Tensor, b: Tensor) -> float:
    """Relative to the size of ``b``, as a norm; infinite where something is not finite."""
    a, b = (t.detach().to("cpu", torch.float64) for t in (a, b))
    error = float((a - b).norm() / b.norm().clamp_min(1e-6))
    return error if math.isfinite(error) else math.inf


def _joint(found: list[Tensor | None], expected: list[Tensor | None]) -> float:
    """The same of several tensors as one."""
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if b is not None]
    if not pairs:
        return 0.0
    if any(a is None for a, _ in pairs):
        return math.inf
    sides = ([p[0] for p in pairs], [p[1] for p in pairs])
    a, b = (torch.cat([t.detach().flatten().to("cpu", torch.float64) for t in side if t is not None]) for side in sides)
    return _error(a, b)


def check_operator(problem: Problem, backend: str, device: str | torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """One operator on one backend: errors of output and gradients, or why it was refused.

    The specification runs in float64 on the same rounded numbers.
    """
    numbers = _numbers(problem.shapes, dtype)

    def specified(inputs: list[Tensor], grad: Tensor | None = None) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        exact = [t.double().requires_grad_() for t in inputs]
        with ops.use_backend("eager"):
            out = _outcome(problem.call(*exact))
        if grad is None:
            generator = torch.Generator().manual_seed(1)
            grad = torch.randn(out.shape, generator=generator, dtype=torch.float64, device="cpu")
        return out, grad, list(torch.autograd.grad(out, exact, grad))

    expected, grad, wanted = specified(numbers)
    given = [t.to(device).requires_grad_() for t in numbers]
    back = True
    try:
        with ops.use_backend(backend):
            try:
                out = _outcome(problem.call(*given))
            except ValueError as error:
                if "no backward" not in str(error):
                    raise
                back = False
                with torch.no_grad():
                    out = _outcome(problem.call(*given))
            got = torch.autograd.grad(out, given, grad.to(out), allow_unused=True) if back else []
    except ValueError as error:
        if "cannot serve this call" not in str(error):
            raise
        return {"status": "refused", "why": str(error).partition("cannot serve this call: ")[2]}
    limits = LIMITS[dtype], BACK * LIMITS[dtype]
    row = {"output": _error(out, expected), "gradient": _joint(list(got), wanted) if back else 0.0}
    if row["output"] > limits[0] or row["gradient"] > limits[1]:  # unless rounding alone does as much
        generator = torch.Generator().manual_seed(2)
        steps = [torch.randn(t.shape, generator=generator, dtype=torch.float64, device="cpu") for t in numbers]
        near, _, bent = specified(
            [t.double() * (1 + UNITS[dtype] * r) for t, r in zip(numbers, steps, strict=True)], grad
        )
        limits = max(limits[0], TIMES * _error(near, expected)), max(limits[1], TIMES * _joint(bent, wanted))
    right = row["output"] <= limits[0] and row["gradient"] <= limits[1] and out.device == given[0].device
    return {"status": "ok" if right else "failed", **row, "limit": limits[0], "gradient_limit": limits[1]}


# --------------------------------------------------------------------------------------------------------------------
# Mechanisms


def _answer(
    s: Subject, m: torch.nn.Module, scene: Scene, x: Tensor, context: Tensor | None, plan: dict[str, Any], grad: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """Output, and gradients of the tokens and all parameters."""
    x = x.detach().requires_grad_()
    out = s.y(m, x, context, scene, **plan)
    wanted = [x, *(p for p in m.parameters() if p.requires_grad)]
    return out, list(torch.autograd.grad(out, wanted, grad.to(out), allow_unused=True))


def _there(value: Any, device: str | torch.device) -> Any:
    return tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, value)


def check_mechanism(s: Subject, device: str | torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """One mechanism under every pattern that it claims: the worst errors of output and gradients, and their bounds."""
    worst: dict[str, Any] = {"status": "ok", "output": 0.0, "gradient": 0.0, "limit": LIMITS[dtype]}
    for scene in s.scenes:
        exact = s.fresh(dtype).double()
        given = s.x(dtype=dtype), s.context(scene, dtype=dtype)
        x, context = (None if t is None else t.double() for t in given)
        assert x is not None
        plan = s.plan(exact, x, context)
        with torch.no_grad():
            shape = s.y(exact, x, context, scene, **plan).shape
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64, device="cpu")
        expected, wanted = _answer(s, exact, scene, x, context, plan, grad)
        try:
            there, (tokens, others) = s.fresh(dtype).to(device), _there(given, device)
            out, got = _answer(s, there, scene, tokens, others, _there(plan, device), grad.to(device))
        except Exception as error:
            if unserved(error, dtype):
                return {"status": "refused", "why": " ".join(str(error).split())[:200]}
            return {"status": "failed", "why": f"{scene.name}: {type(error).__name__}: {str(error)[:300]}"}
        errors = _error(out, expected), _joint(got, wanted)
        limits = LIMITS[dtype], BACK * LIMITS[dtype]
        if errors[0] > limits[0] or errors[1] > limits[1]:  # unless rounding alone does as much
            moved = copy.deepcopy(exact)
            with torch.no_grad():
                for i, p in enumerate(moved.parameters()):
                    p.mul_(1 + s.noise(p, 50 + i, UNITS[dtype]))
            x = x * (1 + s.noise(x, 48, UNITS[dtype]))
            near, bent = _answer(s, moved, scene, x, context, plan, grad)
            limits = max(limits[0], TIMES * _error(near, expected)), max(limits[1], TIMES * _joint(bent, wanted))
        if out.device != torch.device(device) and out.device.type != torch.device(device).type:
            return {"status": "failed", "why": f"{scene.name}: the answer lies on {out.device}"}
        if errors[0] > limits[0] or errors[1] > limits[1] or out.dtype != dtype:
            worst.update(status="failed", why=f"{scene.name}: errors {errors}, bounds {limits}, {out.dtype}")
        worst.update(
            output=max(worst["output"], errors[0]), gradient=max(worst["gradient"], errors[1]),
            limit=max(worst["limit"], limits[0]),
        )  # fmt: skip
    return worst


# --------------------------------------------------------------------------------------------------------------------
# Times


Race = tuple[list[Tensor], dict[str, Any]]


def races(small: bool, device: str | torch.device, dtype: torch.dtype) -> dict[str, Race]:
    """What is timed: by case its inputs, and functions of them by name. The first is what others are held against."""
    n, b, h, d = (64, 1, 2, 16) if small else (4096, 4, 16, 64)
    side = 8 if small else 64

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    q, k, v = (made(b, h, n, d) for _ in range(3))
    plane = [made(b, h, side, side, d) for _ in range(3)]
    token = -torch.rand(b, h, n, device=device)
    window, causal = masks.recent(n // 16), masks.causal()
    sdpa = F.scaled_dot_product_attention

    def attention(*backends: str | None, **settings: Any) -> dict[str, Any]:
        return {
            f"attnlib {name or 'by itself'}": lambda q, k, v, name=name: ops.attention(
                q, k, v, backend=name, **settings
            )
            for name in backends
        }

    def linear(*forms: str | None) -> dict[str, Any]:
        return {
            f"attnlib {form or 'by itself'}": lambda q, k, v, g, form=form: ops.linear_attention(
                q, k, v, decay=g, form=form
            )
            for form in forms
        }

    def local(*backends: str | None) -> dict[str, Any]:
        return {
            f"attnlib {name or 'by itself'}": lambda q, k, v, name=name: ops.neighborhood_attention(
                q, k, v, kernel_size=7, backend=name
            )
            for name in backends
        }

    one = q[:, :, :1].contiguous()
    lengths = [n - i * (n // (2 * b)) for i in range(b)]
    scan = [made(b, n, h * d), made(b, n, h * d), -torch.rand(h * d, 16, device=device), made(b, n, 16), made(b, n, 16)]
    cases: dict[str, Race] = {
        "causal": (
            [q, k, v],
            {"sdpa": lambda q, k, v: sdpa(q, k, v, is_causal=True), **attention(None, "tiled", mask=causal)},
        ),
        "window": (
            [q, k, v],
            {"sdpa causal": lambda q, k, v: sdpa(q, k, v, is_causal=True), **attention(None, "tiled", mask=window)},
        ),
        "sigmoid": (
            [q, k, v],
            {
                "sdpa causal": lambda q, k, v: sdpa(q, k, v, is_causal=True),
                **attention(None, "tiled", normalizer="sigmoid", mask=causal),
            },
        ),
        "linear, decay of tokens": (
            [q, k, v, token],
            {"sdpa causal": lambda q, k, v, g: sdpa(q, k, v, is_causal=True), **linear(None, "chunkwise")},
        ),
        "neighborhood": (
            plane,
            {
                "sdpa dense": lambda q, k, v: sdpa(*(t.flatten(2, 3) for t in (q, k, v))).unflatten(2, (side, side)),
                **local(None, "tiles"),
            },
        ),
        "scan": (
            scan,
            {"attnlib by itself": lambda u, s, a, b, c: ops.selective_scan(u, s, a, b, c, delta_softplus=True)},
        ),
        "decoding": (
            [one, k, v],
            {
                "sdpa padded": lambda q, k, v: sdpa(q, k, v),
                "attnlib by itself": lambda q, k, v: ops.split_decoding(q, k, v, lengths=lengths),
            },
        ),
    }
    if torch.device(device).type == "cuda":
        cases["window"][1].update(attention("flex", mask=window))
        if installed("fla"):
            cases["linear, decay of tokens"][1].update(linear("fla"))
        if installed("natten"):
            cases["neighborhood"][1].update(local("natten"))
        if installed("triton"):
            cases["sigmoid"][1].update(attention("triton", normalizer="sigmoid", mask=causal))
    return cases


def time_case(
    inputs: list[Tensor], functions: dict[str, Any], device: str | torch.device, repeats: int, back: bool
) -> list[dict[str, Any]]:
    """Medians of interleaved rounds, each until the device has ended, and ratios to the first."""

    def candidate(fn: Callable[..., Any]) -> Callable[[], None]:
        def run() -> None:
            given = [t.detach().requires_grad_(back) for t in inputs]
            if back:
                out = fn(*given)
                torch.autograd.grad(out, given, torch.ones_like(out), allow_unused=True)
            else:
                with torch.no_grad():
                    fn(*given)
            if torch.device(device).type != "cpu":
                torch.accelerator.synchronize(torch.device(device))

        return run

    times = interleave({name: candidate(fn) for name, fn in functions.items()}, repeats)
    first = next(iter(times.values()))
    return [
        {"candidate": name, "what": "both" if back else "forward", "median_s": t.median, **ratio(t, first)}
        for name, t in times.items()
    ]


# --------------------------------------------------------------------------------------------------------------------
# The whole


Check = tuple[str, str, Callable[[], dict[str, Any]]]


def _checks(device: str | torch.device, n: int, names: list[str] | None) -> Iterator[Check]:
    """What is checked, as (name, type, check). FlexAttention comes last: every kernel of its is compiled first."""
    late: list[Check] = []
    for dtype in DTYPES:
        short = str(dtype).removeprefix("torch.")
        for name, problem in problems(n).items():
            for backend in ops.derivatives(problem.op) if names is None or problem.op in names else ():
                check = f"{name} on {backend}", short, partial(check_operator, problem, backend, device, dtype)
                if backend != "flex":
                    yield check
                elif problem.op == "attention" and torch.device(device).type != "cpu":
                    late.append(check)
    for dtype in DTYPES:
        short = str(dtype).removeprefix("torch.")
        for kind in ("mechanism", "fusion"):
            for name in list_mechanisms(kind):
                if names is None or name in names:
                    yield name, short, partial(_check_registered, name, kind, device, dtype)
    yield from late


def _check_registered(name: str, kind: str, device: str | torch.device, dtype: torch.dtype) -> dict[str, Any]:
    makers = subject_makers(name, None, kind, None, None, {})
    return _worst([check_mechanism(make(None), device, dtype) for make in makers])


def _worst(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the streams of a fusion."""
    order = {"failed": 2, "refused": 1, "ok": 0}
    return max(rows, key=lambda r: (order[r["status"]], r.get("output", 0.0)))


def measure(
    progress: Say | None = None,
    device: str | torch.device = "cuda",
    small: bool = False,
    names: list[str] | None = None,
    seconds: float = SECONDS,
    repeats: int = 9,
) -> dict[str, Any]:
    """Check everything on a device, then time the operators.

    Args:
        progress: told what runs.
        device: where; with ``"cpu"`` the harness is tried.
        small: tiny shapes.
        names: only these mechanisms and operators; all of them when ``None``.
        seconds: after so many nothing further starts, and what is left out is listed.
        repeats: rounds of each race.

    Returns:
        ``checks`` and ``times`` as rows, ``failed`` and ``refused`` with their reasons, ``left_out``, and the machine.

    Raises:
        ValueError: there is no such device.
    """
    if torch.device(device).type == "cuda" and (reason := why_not()):
        raise ValueError(f"device={str(device)!r}: {reason}; measure(device='cpu', small=True) tries the harness")
    began, say = now(), progress or (lambda line: None)
    checks: list[dict[str, Any]] = []
    times: list[dict[str, Any]] = []
    left_out: list[str] = []
    kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        for name, dtype, check in _checks(device, 21 if small else 257, names):
            if now() - began > min(CHECKING, seconds):
                left_out.append(f"{name}, {dtype}")
                continue
            say(f"{name}, {dtype}")
            try:
                row = check()
            except Exception as error:
                row = {"status": "failed", "why": f"{type(error).__name__}: {str(error)[:300]}"}
            checks.append({"name": name, "dtype": dtype, **row})
        for case, (inputs, functions) in races(small, device, torch.float32 if small else torch.bfloat16).items():
            for back in (False, True):
                what = f"{case}, {'both' if back else 'forward'}"
                if case == "decoding" and back or names is not None and case not in names:
                    continue
                if now() - began > seconds:
                    left_out.append(what)
                    continue
                say(what)
                try:
                    times += [{"case": case, **row} for row in time_case(inputs, functions, device, repeats, back)]
                except Exception as error:
                    times.append({"case": case, "what": what, "why": f"{type(error).__name__}: {str(error)[:300]}"})
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kept
    return {
        "machine": machine(device),
        "installed": {name: installed(name) for name in ("fla", "natten", "triton")},
        "ok": sum(c["status"] == "ok" for c in checks),
        "failed": [c for c in checks if c["status"] == "failed"],
        "refused": [c for c in checks if c["status"] == "refused"],
        "left_out": left_out,
        "checks": checks,
        "rows": times,
        "seconds": now() - began,
        "attnlib": attnlib.__version__,
    }
