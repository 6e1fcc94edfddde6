"""Nystromformer: softmax attention through landmarks, means of segments of the sequence.

Xiong et al., 2021, "Nystromformer: A Nystrom-based Algorithm for Approximating Self-Attention", arXiv 2102.03902. With
the means ``q~`` and ``k~`` of m segments of the queries and keys,

    ``o = softmax(q k~^T) softmax(q~ k~^T)^+ softmax(q~ k^T) v + conv(v)``,

scores being multiplied by ``scale``; the pseudo-inverse is found by six steps of products
(:func:`attnlib.ops.landmarks.cubic_inverse`), and ``conv`` is a convolution along the sequence with one filter per
head. A sequence of no more than m tokens has softmax attention itself.

Differs from the authors' code: the pseudo-inverse starts from each matrix alone, where theirs takes the largest sum of
the whole batch (``compat="authors"``); any number of tokens, where theirs needs segments of one length; segments are
those of the tokens that exist. The class of the Comprehensive Attention Benchmark (arXiv 2210.07661) divides queries
and keys by ``sqrt(D)`` each: ``scale=1 / D``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...checks import check_choice, check_int, check_real
from ...ops.landmarks import cubic_inverse, segment_means, segment_weights
from ...types import State, Traits, exactly, stats_dtype
from ..linear.projected import Projected
from ..registry import register
from ..released import PLAIN, Released


@register("nystromformer", "nystrom-attention")
class NystromAttention(Projected):
    """Softmax attention through the means of segments.

    Args:
        dim, num_heads, qkv_bias, proj_bias: as of :class:`attnlib.nn.linear.projected.Projected`.
        num_landmarks: m, segments.
        conv_size: tokens that the convolution of values reads, odd; 0 for none.
        steps: of the pseudo-inverse.
        scale: of the scores; ``1 / sqrt(head_dim)`` by default.
        compat: ``"authors"``: see above; samples then depend on one another.

    Shapes: x and y (B, N, C). Cost: O(N m D + m^3).

    >>> NystromAttention(dim=16, num_heads=2, num_landmarks=4)(torch.randn(2, 10, 16)).shape
    torch.Size([2, 10, 16])
    """

    source = "NystromAttention"
    class_traits = Traits(
        patterns=frozenset({"noncausal-self"}), work={"N": 1}, memory={"N": 1}, batch_independent=True, weights=True
    )

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_landmarks: int = 64,
        conv_size: int = 0,
        steps: int = 6,
        scale: float | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        compat: str | None = None,
    ):
        super().__init__(dim, num_heads, None, qkv_bias, proj_bias)
        check_choice("compat", compat, (None, "authors"))
        if check_int("conv_size", conv_size, least=0) and conv_size % 2 == 0:
            raise ValueError(f"conv_size must be odd, or 0 for no convolution, got {conv_size}")
        self.num_landmarks = check_int("num_landmarks", num_landmarks, least=1)
        self.steps, self.compat = check_int("steps", steps, least=0), compat
        self.scale = self.head_dim**-0.5 if scale is None else check_real("scale", scale, above=0)
        self.conv = (
            nn.Conv2d(
                num_heads, num_heads, (conv_size, 1), padding=(conv_size // 2, 0), bias=False, groups=num_heads
            )
            if conv_size
            else None
        )  # fmt: skip

    @property
    def traits(self) -> Traits:
        return self.class_traits.but(batch_independent=self.compat is None)

    def mix_heads(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, ordered: bool, state: State | None, wanted: bool
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        m = self.num_landmarks
        none = None if valid is None else ~valid[:, None, None]
        if none is not None:
            v = v.masked_fill(none.mT, 0.0)
        with exactly(q):
            high = stats_dtype(q.dtype)
            q_, k_, v_ = (t.to(high) for t in (q, k, v))
            weights = None
            if q.shape[2] <= m:
                scores = (q_ * self.scale) @ k_.mT
                out, weights = self._read(scores, v_, none, wanted)
            else:
                q_land, _ = segment_means(q_ * self.scale, m, valid)
                cells, some = segment_weights(k.shape[2], m, valid, k_)
                k_land = cells.unsqueeze(1) @ (k_ if none is None else k_.masked_fill(none.mT, 0.0))
                few = ~some[:, None, None]
                first = ((q_ * self.scale) @ k_land.mT).masked_fill(few, -torch.inf)
                last = q_land @ k_.mT
                last = last if none is None else last.masked_fill(none, -torch.inf)
                between = torch.softmax(q_land @ k_land.mT, -1)
                whole = _softmax(first)
                left = whole @ cubic_inverse(between, self.steps, self.compat is not None)
                right = _softmax(last)
                out = left @ (right @ v_)
                weights = left @ right if wanted else None
                if valid is not None:  # where every token is a landmark, softmax attention is at hand
                    exact = (valid.sum(1) <= m)[:, None, None, None]
                    out = torch.where(exact, whole @ (cells.unsqueeze(1) @ v_), out)
                    if weights is not None:
                        weights = torch.where(exact, whole @ cells.unsqueeze(1), weights)
            out = out.to(v.dtype)
        return out if self.conv is None else out + self.conv(v), weights, {}

    @staticmethod
    def _read(scores: Tensor, v: Tensor, none: Tensor | None, wanted: bool) -> tuple[Tensor, Tensor | None]:
        weights = _softmax(scores if none is None else scores.masked_fill(none, -torch.inf))
        return weights @ v, weights if wanted else None

    @classmethod
    def convert_state_dict(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the benchmark's ``NystromAttention``, or transformers' ``NystromformerSelfAttention``.

        The latter has no output projection, which lies behind it as ``output.dense``.
        """
        theirs = Released(state_dict, cls.source)
        rules: dict[str, Any] = {
            r"(?:self\.)?(query|key|value)\.(weight|bias)": lambda match, value: {f"{match[1][0]}.{match[2]}": value},
            r"output\.dense\.(weight|bias)": r"proj.\1",
            r"([qkv])_proj\.(weight|bias)": r"\1.\2",
            r"(?:self\.)?conv\.weight": "conv.weight",
            **PLAIN,
        }
        return theirs.close(theirs.renamed(rules))


def _softmax(scores: Tensor) -> Tensor:
    """Rows without a key give zeros."""
    nothing = scores.isneginf().all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(nothing, 0.0), -1).masked_fill(nothing, 0.0)
