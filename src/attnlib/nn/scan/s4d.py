"""S4D (Gu et al., 2022) as the Comprehensive Attention Benchmark runs it: a diagonal state space per channel."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...types import Output, State, Traits, check_choice, exactly, stats_dtype
from ..base import Mechanism
from ..frame import Stream
from ..layers import flat_valid, to_front, to_places
from ..registry import register
from ..released import Released, Rule

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "identity": nn.Identity, "tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
}  # fmt: skip
SCALINGS = ("inverse", "linear", "random")


@register("s4d")
class S4D(Mechanism):
    """``y_t = W [act(sum_{j <= t} K_c(t - j) u_j + D_c u_t)]_c``, with ``K_c(l) = 2 Re(sum_n C'_cn exp(dt w_n l))``.

    Every channel runs its own linear system with a diagonal, complex state of ``d_state / 2`` numbers;
    ``C' = C (exp(dt w) - 1) / w`` (zero-order hold). At once it is a convolution by FFT, in O(N log N); decoding keeps
    the states. ``num_heads`` systems read every channel. With ``bidirectional`` as many more read what comes after:
    ``+ sum_{j > t} K~_c(j - t - 1) u_j``.

    Differs from the authors' code: tokens that do not exist let no time pass; decoding starts from the states of a
    prompt.

    Args:
        dim: width of ``x``.
        d_state: twice the complex numbers per channel and head.
        num_heads: systems that read each channel.
        bidirectional: read later tokens, too; otherwise causal.
        activation: between the system and the output map: ``"gelu"``, ``"silu"``, ``"relu"``, ``"tanh"``,
            ``"sigmoid"`` or ``"identity"``.
        postact: after the output map, one of the same, or ``"glu"``.
        dropout: of the activation, in training.
        scaling: imaginary parts at the start: ``"inverse"`` (S4D-Inv), ``"linear"`` (S4D-Lin) or ``"random"``.
        dt_min, dt_max: range of the steps at the start.

    Reference: Gu et al., 2022, arXiv 2206.11893; Zhang et al., 2022, arXiv 2210.07661 (the benchmark).

    >>> S4D(dim=8, num_heads=2)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self", "causal-self"}),
        grid_ranks=frozenset({1}),
        streaming=True,
        work={"N": 1},
        memory={"N": 1},
    )

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        num_heads: int = 1,
        bidirectional: bool = False,
        activation: str = "gelu",
        postact: str | None = None,
        dropout: float = 0.0,
        scaling: str = "inverse",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
    ):
        super().__init__(dim)
        check_choice("activation", activation, tuple(ACTIVATIONS))
        check_choice("postact", postact, (None, "glu", *ACTIVATIONS))
        check_choice("scaling", scaling, SCALINGS)
        if d_state < 2 or d_state % 2:
            raise ValueError(f"d_state must be even and at least 2, got {d_state}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        if not 0 < dt_min < dt_max:
            raise ValueError(f"dt_min and dt_max must be positive and ascending, got {dt_min} and {dt_max}")
        self.d_state, self.num_heads, self.bidirectional = d_state, num_heads, bidirectional
        half, systems = d_state // 2, num_heads * (2 if bidirectional else 1)
        self.D = nn.Parameter(torch.randn(num_heads, dim))
        span = math.log(dt_max) - math.log(dt_min)
        self.log_dt = nn.Parameter(torch.rand(dim) * span + math.log(dt_min))
        kept = self.log_dt.dtype
        steps = torch.arange(half, dtype=stats_dtype(kept))
        imaginary = {
            "linear": lambda: math.pi * steps,
            "inverse": lambda: d_state / math.pi * (d_state / (1 + 2 * steps) - 1),
            "random": lambda: torch.randn(1, half, dtype=steps.dtype)[0],
        }[scaling]()
        w = torch.complex(torch.full_like(imaginary, -0.5), imaginary)
        self.log_w_real = nn.Parameter(torch.log(-w.real + 1e-4)[None].to(kept))
        self.w_imag = nn.Parameter(imaginary[None].to(kept, copy=True))
        b = torch.randn(1, half, dtype=w.dtype)
        # Unit variance of the response to a constant, for a random C
        b = b / (2 * (b / w).abs().square().sum(-1, keepdim=True)).sqrt()
        c = torch.randn(systems, dim, half, dtype=w.dtype) * b
        self.C = nn.Parameter(torch.view_as_real(c.conj().resolve_conj()).to(kept, copy=True))
        self.activation = ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.proj = nn.Linear(dim * num_heads, dim * (2 if postact == "glu" else 1))
        self.postact: nn.Module = nn.Identity()
        if postact is not None:
            self.postact = nn.GLU(-1) if postact == "glu" else ACTIVATIONS[postact]()

    @property
    def traits(self) -> Traits:
        pattern = "noncausal-self" if self.bidirectional else "causal-self"
        return self.class_traits.but(patterns=frozenset({pattern}), streaming=not self.bidirectional)

    def _systems(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``dt w`` (H, N / 2) and ``C'`` (C, H, N / 2), complex."""
        w = torch.complex(-self.log_w_real.to(dtype).exp(), self.w_imag.to(dtype))
        step = w * self.log_dt.to(dtype).exp()[:, None]
        return step, torch.view_as_complex(self.C.to(dtype)) * (step.exp() - 1) / w

    def mix(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        valid: Tensor | None = None,
        state: State | None = None,
        returns: tuple[str, ...] = (),
    ) -> Output:
        stream = Stream(x, flat_valid(valid), state, "state" in returns)
        tokens, now, order = to_front(x, flat_valid(valid))
        n, dtype = x.shape[1], stats_dtype(x.dtype)
        u = tokens.transpose(1, 2).to(dtype)  # (B, H, L)
        with exactly(x):
            step, c = self._systems(dtype)
            powers = torch.exp(step.unsqueeze(-1) * torch.arange(n + 1, device=x.device))  # (H, N / 2, L + 1)
            y = self._convolved(u, 2 * torch.einsum("chn,hnl->chl", c, powers[..., :-1]).real)
            held = None if state is None else torch.view_as_complex(state["h"])  # (B, H, N / 2)
            if held is not None:
                y = y + 2 * torch.einsum("bchn,hnl->bchl", c * held.unsqueeze(1), powers[..., 1:]).real
            y = y + u.unsqueeze(1) * self.D.to(dtype).unsqueeze(-1)
            new = stream.next(h=self._end(u, step, powers, held, now)) if stream.keep else None
        y = self.dropout(self.activation(y.flatten(1, 2))).transpose(1, 2).to(x.dtype)
        return Output(to_places(self.postact(self.proj(y)), order), state=new)

    def _convolved(self, u: Tensor, k: Tensor) -> Tensor:
        """(B, H, L) by kernels (C, H, L), or (2 C, H, L) whose second half looks ahead: (B, C, H, L)."""
        n = u.shape[-1]
        if not torch.compiler.is_compiling() and 0 in u.shape:  # there is no transform of nothing
            return u.unsqueeze(1) * k[: self.num_heads].sum(-1, keepdim=True)
        if self.bidirectional:
            back, ahead = k.chunk(2)
            k = F.pad(back, (0, n)) + F.pad(ahead.flip(-1), (n, 0))
        spectrum = torch.fft.rfft(u, n=2 * n).unsqueeze(1) * torch.fft.rfft(k, n=2 * n)
        return torch.fft.irfft(spectrum, n=2 * n)[..., :n]

    @staticmethod
    def _end(u: Tensor, step: Tensor, powers: Tensor, held: Tensor | None, now: Tensor | None) -> Tensor:
        """(B, H, N / 2, 2) states after the last token that exists."""
        n = u.shape[-1]
        back = u.flip(-1)
        many = torch.full(u.shape[:1], n, device=u.device)
        if now is not None:
            # What exists stands in front; turned round it has to begin at the last that does.
            many = now.sum(1)
            at = (many[:, None] - 1 - torch.arange(n, device=u.device)).clamp(min=0)
            back = u.gather(2, at[:, None].expand_as(u)) * now[:, None]
        end = torch.einsum("bhl,hnl->bhn", back.to(powers.dtype), powers[..., :-1])
        if held is not None:
            end = end + torch.exp(step * many[:, None, None]) * held
        return torch.view_as_real(end.resolve_conj())

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the benchmark's ``S4D``: ``kernel.kernel.*``, ``D`` and ``output_linear``, transposed or not."""
        theirs = Released(state_dict, "S4D of the Comprehensive Attention Benchmark")

        def linear(match: object, value: Tensor) -> dict[str, Tensor]:
            return {"proj.weight": value.squeeze(-1) if value.dim() == 3 else value}

        rules: dict[str, Rule] = {
            r"kernel\.kernel\.(C|log_dt|log_w_real|w_imag)": r"\1",
            r"D": "D",
            r"output_linear\.(?:0\.)?weight": linear,
            r"output_linear\.(?:0\.)?bias": "proj.bias",
        }
        return theirs.close(theirs.renamed(rules))
