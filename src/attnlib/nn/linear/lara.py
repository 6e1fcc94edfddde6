"""LARA: linear randomized attention, softmax attention estimated from a few proposals made of the sequence itself.

Zheng et al., 2022, "Linear Complexity Randomized Self-attention Mechanism", arXiv 2204.04667. Random features estimate
softmax attention from one distribution of directions for all queries; here every segment of the sequence proposes its
own, with mean ``mu_c = q_c + k_c``, the means of its queries and keys, and proposals are weighted for each query by
self-normalised importance sampling. With ``w_c = mu_c + noise`` (without noise in evaluation) and
``l(w, x) = (w . x - |x|^2 / 2) / sqrt(D)``,

    ``v_c = sum_j softmax_j(l(w_c, k_j)) v_j``,
    ``o_i = sum_c softmax_c(mu_c . q_i / sqrt(D) + l(w_c, q_i) + log sum_j exp(l(w_c, k_j)) - l(w_c, mu_c)) v_c``.

Differs from the code of the Comprehensive Attention Benchmark (arXiv 2210.07661), after which it is modelled: tokens
that do not exist are in no segment and in no sum, where theirs counts them in both; a sample's mask is its own, where
theirs mixes those of a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...checks import check_choice, check_flag, check_int
from ...ops.landmarks import segment_means
from ...types import State, Traits, exactly, stats_dtype
from ..layers import computes_in
from ..registry import register
from .projected import Projected

#: How proposals are made of the means of segments: as they are, or through a linear map of each.
PROPOSALS = ("segments", "adaptive")


@register("lara", "linear-randomized-attention")
class LinearRandomizedAttention(Projected):
    """Randomized attention with proposals from segments.

    Args:
        dim, num_heads, qkv_bias, proj_bias: as of :class:`attnlib.nn.linear.projected.Projected`.
        num_landmarks: segments, which make one proposal each.
        proposal: ``"segments"``, or ``"adaptive"``: means of queries and of keys pass a linear map first.
        antithetic: in training every proposal is sampled twice, with opposite noise.
        value_norms: weights of proposals count the norms of the values of the queries' tokens.
        noise: sample in training; otherwise proposals are their means, as in evaluation.

    Shapes: x and y (B, N, C). Cost: O(N m D).

    >>> LinearRandomizedAttention(dim=16, num_heads=2, num_landmarks=4)(torch.randn(2, 9, 16)).shape
    torch.Size([2, 9, 16])
    """

    source = "Lara"
    class_traits = Traits(patterns=frozenset({"noncausal-self"}), work={"N": 1}, memory={"N": 1}, weights=True)

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_landmarks: int = 16,
        proposal: str = "segments",
        antithetic: bool = False,
        value_norms: bool = False,
        noise: bool = True,
        qkv_bias: bool = True,
        proj_bias: bool = True,
    ):
        super().__init__(dim, num_heads, None, qkv_bias, proj_bias)
        check_choice("proposal", proposal, PROPOSALS)
        self.num_landmarks = check_int("num_landmarks", num_landmarks, least=1)
        self.antithetic, self.value_norms = check_flag("antithetic", antithetic), check_flag("value_norms", value_norms)
        self.noise = check_flag("noise", noise)
        self.q_bar: nn.Linear | None = None
        self.k_bar: nn.Linear | None = None
        if proposal == "adaptive":
            self.q_bar, self.k_bar = (nn.Linear(self.head_dim, self.head_dim) for _ in range(2))

    def _proposals(self, q: Tensor, k: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Means and samples (B, H, m, D), and which exist (1 or B, m)."""
        (q_mean, some), (k_mean, _) = (segment_means(t, self.num_landmarks, valid) for t in (q, k))
        if self.q_bar is not None and self.k_bar is not None:
            kind = computes_in(self.q_bar)
            q_mean, k_mean = self.q_bar(q_mean.to(kind)), self.k_bar(k_mean.to(kind))
        mean = (q_mean + k_mean).to(q.dtype)
        if not (self.training and self.noise):
            return mean, mean, some
        noise = torch.randn_like(mean)
        if self.antithetic:
            mean, noise, some = torch.cat([mean, mean], 2), torch.cat([noise, -noise], 2), torch.cat([some, some], 1)
        return mean, mean + noise, some

    def mix_heads(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, ordered: bool, state: State | None, wanted: bool
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        root = self.head_dim**-0.5
        with exactly(q):
            high = stats_dtype(q.dtype)
            q_, k_, v_ = (t.to(high) for t in (q, k, v))
            mean, sample, some = self._proposals(q_, k_, valid)

            def log(x: Tensor) -> Tensor:
                """(B, H, m, N)."""
                return root * (sample @ x.mT - x.square().sum(-1).unsqueeze(-2) / 2)

            of_keys = log(k_)
            if valid is not None:
                empty = ~valid.any(1)[:, None, None, None]
                of_keys = of_keys.masked_fill(~valid[:, None, None] & ~empty, -torch.inf)
                v_ = v_.masked_fill(~valid[:, None, :, None], 0.0)
            shares = torch.softmax(of_keys, -1)
            own = root * ((sample * mean).sum(-1) - mean.square().sum(-1) / 2)
            ratio = root * (mean @ q_.mT) + log(q_) + of_keys.logsumexp(-1, keepdim=True) - own.unsqueeze(-1)
            if self.value_norms:
                ratio = ratio + (torch.linalg.vector_norm(v_, dim=-1) + 1e-10).log().unsqueeze(-2)
            lost = ~(some | ~some.any(1, keepdim=True))
            weights = torch.softmax(ratio.masked_fill(lost[:, None, :, None], -torch.inf), 2).mT  # (B, H, N, m)
            out = weights @ (shares @ v_)
            seen = shares if valid is None else shares * valid[:, None, None]
        return out.to(v.dtype), weights @ seen if wanted else None, {}

    @classmethod
    def _more_rules(cls) -> dict[str, str]:
        return {r"lara\.([qk])_bar_proj\.(weight|bias)": r"\1_bar.\2"}
