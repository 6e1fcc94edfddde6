"""Hedgehog (Zhang et al., 2024): linear attention whose feature maps are trained to reproduce softmax maps."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...checks import check_flag, check_int, check_real
from ...ops._call import expand_heads
from ...ops.linear import linear_attention
from ...types import State, check_choice, stats_dtype
from ..frame import Notes
from ..registry import register
from ..released import Released, Rule
from .feature_maps import EPS, KINDS, OPTIONS, HedgehogFeatures
from .heads import HeadMixer, MixedHeads, normalized, pairs


class HedgehogHeads(HeadMixer):
    """``y_i = phi_q(q_i) S_i / (phi_q(q_i) . n_i + eps)``, ``S_i = sum_j phi_k(k_j) v_j``, ``n_i = sum_j phi_k(k_j)``.

    Maps are one per query head; under grouped queries the shared keys are mapped once for every head that reads them.

    Args:
        num_heads, head_dim, num_kv_heads, causal, scale: see :class:`attnlib.nn.linear.heads.HeadMixer`.
        feature_dim: columns of each feature matrix; ``head_dim`` by default.
        features: ``kind`` of :class:`attnlib.nn.linear.feature_maps.HedgehogFeatures`.
        feature_options: its other settings; they start from the identity unless they say otherwise.
        tie_features: one map for queries and keys.
        share_features: one map for all heads, as in flash-linear-attention.
        normalize: divide by the sum of weights; otherwise multiply by one over the square root of the features' width.
        eps: added to the denominator.
        chunk: tokens per chunk; changes speed, not the result.

    >>> import torch
    >>> HedgehogHeads(num_heads=2, head_dim=4)(*torch.randn(3, 1, 2, 5, 4))[0].shape
    torch.Size([1, 2, 5, 4])
    """

    cuts_sequence = True

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
        share_features: bool = False,
        normalize: bool = True,
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
        self.normalize = check_flag("normalize", normalize)
        maps = 1 if check_flag("share_features", share_features) else num_heads
        self.phi_q = HedgehogFeatures(maps, head_dim, feature_dim, features, **options)
        self.phi_k = self.phi_q if tie_features else copy.deepcopy(self.phi_q)  # both start alike

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, valid: Tensor | None = None, state: State | None = None,
        keep: bool = False,
    ) -> tuple[Tensor, State | None]:  # fmt: skip
        f_q, f_k = self.phi_q(q), self.phi_k(expand_heads(k, self.num_heads))
        out, final = linear_attention(
            f_q if self.normalize else f_q * f_q.shape[-1] ** -0.5, f_k, v,
            normalizer="sum" if self.normalize else "none", causal=self.causal, valid=valid, state=state,
            chunk=self.chunk, eps=self.eps if self.normalize else 0.0, return_state=True,
        )  # fmt: skip
        if not keep:
            return out, None
        new = valid.sum(1) if valid is not None else torch.full((k.shape[0],), k.shape[2], device=k.device)
        return out, final.replace(tokens=new if state is None else state["tokens"] + new)

    def weights(self, q: Tensor, k: Tensor, *, valid: Tensor | None = None) -> Tensor:
        high = stats_dtype(q.dtype)
        f_q, f_k = self.phi_q(q).to(high), self.phi_k(expand_heads(k, self.num_heads)).to(high)
        allowed = pairs(q, k, self.causal, valid)
        if not self.normalize:
            return (f_q @ f_k.mT).masked_fill(~allowed, 0.0) * f_q.shape[-1] ** -0.5
        return normalized(f_q @ f_k.mT, allowed, self.eps)


@register("hedgehog", "hedgehog-attention")
class Hedgehog(MixedHeads):
    """Linear attention with learned features ``phi(x) = [f(x W), f(-x W)]`` that mimic the maps of softmax attention.

    ``y_i = phi_q(q_i) S_i / (phi_q(q_i) . n_i + eps)`` with ``S_i = sum_j phi_k(k_j) v_j`` and
    ``n_i = sum_j phi_k(k_j)``, over ``j <= i`` when causal; ``f`` is a softmax over the features by default. There is
    no ``1 / sqrt(D)``: the matrices learn it. They start from the identity, one per query head, and are trained with
    the layer, or alone, so that the layer agrees with softmax attention on the same queries and keys::

        m = Hedgehog(dim, attention_transfer=True)             # gives softmax attention ...
        losses = m(x, returns=("losses",)).losses              # ... and the losses of its own against it
        losses["transfer_xent"].backward()                     # the paper's; reaches m.feature_parameters() only
        m.attention_transfer = False                           # linear from now on

    Models of transformers and diffusers are converted by ``attnlib.convert.linearize(model, "hedgehog")``.

    Three realisations of ``f`` are three functions: ``features="exp-unstable"`` is the paper's ``exp``, which overflows
    in half precision; ``"exp"`` subtracts each token's largest feature first, which on the side of the keys changes
    their relative weights; ``"softmax"`` (LoLCATs) and ``"joint-softmax"`` (flash-linear-attention, over both halves,
    of twice ``x W``) divide by a sum. A ``bias`` that is one number per head cancels in ``"softmax"`` and ``"exp"``,
    whose halves are divided or shifted by what holds it as well.

    The layer of flash-linear-attention with this map is ``features="joint-softmax"``, ``share_features=True``,
    ``feature_options=dict(bias="features")``, by its defaults with ``normalize=False`` and ``output_norm="rms"``.

    Differs from the authors' code: linear in N in training too; padding; states in float32; also noncausal, on images
    and videos, and across two sequences.

    Args:
        dim: width of ``x``.
        num_heads: query heads.
        feature_dim: columns of each feature matrix; ``head_dim`` by default. The features are twice as wide.
        features: how features are made, the ``kind`` of :class:`attnlib.nn.linear.feature_maps.HedgehogFeatures`.
        feature_options: the other settings of that class: ``fullspace``, ``identity`` (the default start), ``normal``,
            ``skip``, ``bias``, ``hidden``, ``eps``.
        tie_features: one map for queries and keys.
        share_features: one map for all heads.
        normalize: divide by the sum of weights; otherwise multiply by one over the square root of the features' width.
        output_norm: ``"rms"`` for RMSNorm of every head's output before the output projection.
        attention_transfer: start as its own teacher, see above; the attribute of that name turns it on and off.
        eps: added to the denominator.
        chunk: tokens per chunk; changes speed, not the result.
        causal: every token reads itself and earlier ones.
        **frame: ``num_kv_heads``, ``head_dim``, ``context_dim``, ``qkv_bias``, ``proj_bias``, ``qk_norm``, ``rotary``
            and so on, see :class:`attnlib.nn.frame.HeadFrame`; rotary positions come before the feature maps.

    Reference: Zhang et al., 2024, arXiv 2402.04347, equations 5 to 8.

    >>> import torch
    >>> Hedgehog(dim=16, num_heads=4)(torch.randn(2, 9, 16)).shape
    torch.Size([2, 9, 16])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        feature_dim: int | None = None,
        features: str = "softmax",
        feature_options: Mapping[str, Any] | None = None,
        tie_features: bool = False,
        share_features: bool = False,
        normalize: bool = True,
        output_norm: str | None = None,
        attention_transfer: bool = False,
        eps: float = EPS,
        chunk: int = 128,
        causal: bool = False,
        **frame: Any,
    ):
        for name in ("alibi", "attn_drop", "normalizer"):
            if frame.get(name):
                raise ValueError(f"{name}={frame[name]!r} belongs to softmax attention; features have no scores")
        super().__init__(dim, num_heads, causal=causal, **frame)
        self.attention_transfer = attention_transfer
        self.heads = HedgehogHeads(
            num_heads, self.head_dim, self.num_kv_heads, causal, self.scale, feature_dim, features, feature_options,
            tie_features, share_features, normalize, eps, chunk,
        )  # fmt: skip
        check_choice("output_norm", output_norm, (None, "rms"))
        self.norm = nn.RMSNorm(self.head_dim, eps=1e-5) if output_norm else None

    def _gate(self, out: Tensor, notes: Notes) -> Tensor:
        return out if self.norm is None else self.norm(out)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From LoLCATs' ``LolcatsLinearAttention`` (``feature_map_q.mlp.layer``) or ``LinearAttention`` of
        flash-linear-attention with ``feature_map="hedgehog"`` (``feature_map_q.layer.weight``)."""
        theirs = Released(state_dict, "LolcatsLinearAttention or fla's LinearAttention")
        theirs.leave(r"(?:base_attn\.)?rotary_emb\..*", because="a setting here: the rotary base")
        theirs.leave(r"base_attn\..*", because="the same projections once more, kept with remove_base_attn=False")
        rules: dict[str, Rule] = {
            r"feature_map_([qk])\.mlp\.layer": r"heads.phi_\1.weight",
            r"feature_map_([qk])\.mlp\.bias": r"heads.phi_\1.bias",
            r"feature_map_([qk])\.mlp\.(layer|bias)([01])": r"heads.phi_\1.\2\3",
            r"feature_map_([qk])\.layer\.weight": lambda m, w: {f"heads.phi_{m[1]}.weight": w.mT[None]},
            r"feature_map_([qk])\.layer\.bias": lambda m, b: {f"heads.phi_{m[1]}.bias": b[None, None, None]},
            r"norm\.weight": "norm.weight",
            r"([qkv])_proj\.(weight|bias)": r"\1.\2",
            r"o_proj\.(weight|bias)": r"proj.\1",
        }
        return theirs.close(theirs.renamed(rules))
