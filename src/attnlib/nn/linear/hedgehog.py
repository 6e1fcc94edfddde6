"""Hedgehog (Zhang et al., 2024): linear attention whose feature maps are trained to reproduce softmax maps."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...checks import check_int, check_real
from ...ops._call import expand_heads
from ...ops.linear import linear_attention
from ...types import State, check_choice, stats_dtype
from .feature_maps import EPS, KINDS, OPTIONS, HedgehogFeatures
from .heads import HeadMixer, normalized, pairs


class HedgehogHeads(HeadMixer):
    """``y_i = phi_q(q_i) S_i / (phi_q(q_i) . n_i + eps)``, ``S_i = sum_j phi_k(k_j) v_j``, ``n_i = sum_j phi_k(k_j)``.

    Maps are one per query head; under grouped queries the shared keys are mapped once for every head that reads them.

    Args:
        num_heads, head_dim, num_kv_heads, causal, scale: see :class:`attnlib.nn.linear.heads.HeadMixer`.
        feature_dim: columns of each feature matrix; ``head_dim`` by default.
        features: ``kind`` of :class:`attnlib.nn.linear.feature_maps.HedgehogFeatures`.
        feature_options: its other settings; they start from the identity unless they say otherwise.
        tie_features: one map for queries and keys.
        eps: added to the denominator.
        chunk: tokens per chunk; changes speed, not the result.

    >>> import torch
    >>> HedgehogHeads(num_heads=2, head_dim=4)(*torch.randn(3, 1, 2, 5, 4))[0].shape
    torch.Size([1, 2, 5, 4])
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None = None,
        causal: bool = True,
        scale: float | None = None,
        feature_dim: int | None = None,
        features: str = "softmax",
        feature_options: Mapping[str, Any] | None = None,
        tie_features: bool = False,
        eps: float = EPS,
        chunk: int = 128,
    ):
        super().__init__(num_heads, head_dim, num_kv_heads, causal, scale)
        check_choice("features", features, KINDS)
        for option in feature_options or {}:
            check_choice("feature_options", option, OPTIONS)
        self.eps, self.chunk = check_real("eps", eps, least=0), check_int("chunk", chunk, least=1)
        options = dict(feature_options or {})
        if not options.keys() & {"identity", "normal", "hidden"}:
            options["identity"] = True
        self.phi_q = HedgehogFeatures(num_heads, head_dim, feature_dim, features, **options)
        self.phi_k = self.phi_q if tie_features else copy.deepcopy(self.phi_q)  # both start alike

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, valid: Tensor | None = None, state: State | None = None,
        keep: bool = False,
    ) -> tuple[Tensor, State | None]:  # fmt: skip
        f_q, f_k = self.phi_q(q), self.phi_k(expand_heads(k, self.num_heads))
        out, final = linear_attention(
            f_q, f_k, v, normalizer="sum", causal=self.causal, valid=valid, state=state, chunk=self.chunk,
            eps=self.eps, return_state=True,
        )  # fmt: skip
        if not keep:
            return out, None
        new = valid.sum(1) if valid is not None else final["z"].new_full((k.shape[0],), k.shape[2]).long()
        return out, final.replace(tokens=new if state is None else state["tokens"] + new)

    def weights(self, q: Tensor, k: Tensor, *, valid: Tensor | None = None) -> Tensor:
        high = stats_dtype(q.dtype)
        f_q, f_k = self.phi_q(q).to(high), self.phi_k(expand_heads(k, self.num_heads)).to(high)
        return normalized(f_q @ f_k.mT, pairs(q, k, self.causal, valid), self.eps)
