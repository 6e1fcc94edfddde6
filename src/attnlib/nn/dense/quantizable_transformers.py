"""Clipped softmax and gated attention (Bondarenko et al., 2023): heads that can do nothing without outliers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...normalizers import ClippedSoftmax
from ...positions import as_bias
from ...types import Traits, check_choice, stats_dtype
from ..frame import HeadCall, HeadFrame, Notes
from ..registry import register
from ..released import Released, stacked

RELATIVE = ("none", "key", "key_query")
GATES = ("none", "unconditional_per_head", "conditional_per_head", "conditional_per_token")


class HeadGate(nn.Module):
    """``sigmoid(G_h(x))``, one number per head and token (or per head): how much of a head's output passes.

    ``G_h`` reads only its own ``head_dim`` slice of the layer's input, through a linear map or a two-layer MLP, unless
    ``all_features``, which gate every token, whichever conditional kind is asked for, as in the authors' code. Shapes:
    ``x (B, N, C) -> (B, H, N, 1)``, with ``N = 1`` for the per-head kind.

    Weights and biases start as those of ``nn.Linear``; of a linear gate ``init`` sets the bias, and ``tune`` draws the
    weights from ``N(0, std^2)``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kind: str,
        hidden: int | None,
        all_features: bool,
        init: float | None,
        tune: bool,
        std: float,
    ):
        super().__init__()
        self.kind, self.num_heads, self.all_features = kind, num_heads, all_features
        width = dim // num_heads
        # A tuned gate starts as the identity: sigmoid(bias) = init, and the output is divided by init.
        self.scaling = 1.0 / init if tune and init is not None else 1.0
        if kind == "unconditional_per_head":
            self.alpha = nn.Parameter(torch.zeros(num_heads))
        elif all_features:
            self.linear = nn.Linear(dim, num_heads)
        else:
            if hidden is not None:
                self.w1, self.b1 = _linear(width, num_heads, hidden, width), _linear(width, num_heads, hidden)
            last = width if hidden is None else hidden
            self.w2, self.b2 = _linear(last, num_heads, last), _linear(last, num_heads)
            if hidden is None and init is not None:
                nn.init.constant_(self.b2, -math.log(1.0 / init - 1.0))
            if hidden is None and tune:
                nn.init.normal_(self.w2, std=std)
        self.hidden = hidden

    @property
    def pools(self) -> bool:
        """Whether one gate speaks for all tokens of a sample, so that every token is read."""
        return self.kind == "conditional_per_head" and not self.all_features

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        if self.kind == "unconditional_per_head":
            return self.alpha.sigmoid()[:, None, None]
        if self.all_features:
            return self.linear(x).transpose(1, 2).unsqueeze(-1).sigmoid() * self.scaling
        z = x.unflatten(-1, (self.num_heads, -1))  # (B, N, H, D)
        if self.hidden is not None:
            z = torch.relu(torch.einsum("bnhd,hkd->bnhk", z, self.w1) + self.b1)
        score = (torch.einsum("bnhk,hk->bhn", z, self.w2) + self.b2[:, None]).unsqueeze(-1)
        if self.pools:
            if valid is None:
                score = score.mean(2, keepdim=True)
            else:
                real = valid[:, None, :, None].to(score.dtype)
                score = (score * real).sum(2, keepdim=True) / real.sum(2, keepdim=True).clamp(min=1)
        return score.sigmoid() * self.scaling


def _linear(fan_in: int, *shape: int) -> nn.Parameter:
    """Weights or biases drawn as those of ``nn.Linear(fan_in, ..)``."""
    return nn.Parameter(torch.empty(shape).uniform_(-(fan_in**-0.5), fan_in**-0.5))


@dataclass
class GateNotes(Notes):
    """(B, H, N or 1, 1) how much of a head's output passes."""

    gate: Tensor | None = None


@register("quantizable-transformers", "clipped-softmax-attention", "gated-attention")
class QuantizableAttention(HeadFrame[GateNotes]):
    """Softmax attention that can write exact zeros, or gate a head off, so that no logit has to explode.

    ``A = clip((zeta - gamma) softmax(s) + gamma, 0, 1)`` and ``o_h <- sigmoid(G_h(x)) o_h``: two independent remedies
    for the outliers that no-op heads grow.

    Args:
        dim, num_heads, ...: as in :class:`HeadFrame`; ``dim`` must equal ``num_heads * head_dim`` with a gate.
        gamma, zeta: stretch of the clipped softmax; ``gamma=0, zeta=1`` is plain softmax.
        alpha, max_length: the length-robust form ``gamma = -alpha / max_length``; ``max_length`` is the longest
            sequence of training, never the current one.
        gate: one of ``GATES``.
        gate_hidden: width of the gate's hidden layer (the authors use ``head_dim // 4``); ``None`` for a linear gate.
        gate_all_features: a gate reads the whole input instead of its head's slice.
        gate_init: initial opening of the gate.
        fine_tuning: start near the ungated layer: output divided by ``gate_init``, a linear gate's weights small.
        gate_std: how small; the authors' BERT has 0.01, their OPT 0.001.
        out_proj: the output projection, which in BERT stands in the next module.
        relative: BERT's relative positions, with a learned table E over distances and before the scaling by
            ``1 / sqrt(D)``: ``"key"`` adds ``q_i . E[i - j]`` to a score, ``"key_query"`` also ``k_j . E[i - j]``. The
            map is built then.
        max_distance: P; sequences, remembered tokens included, have at most P tokens. In cross-attention both count
            from zero.
        head_mask: H numbers that the weights of the heads are multiplied by.
        skip_attn: heads put out zeros, whatever they read.
        compat: ``"authors"``: the mean of ``conditional_per_head`` is taken over all tokens, also those that a mask or
            the causal order hides from a row, so that nothing is causal with it; without it such gates take no mask.

    What differs from the authors' code: their slip ``"clipped(-.005:1.005)" -> gamma=-0.003`` is not reproduced; a row
    that sees nothing gives zeros; the mean of ``conditional_per_head`` counts only tokens that exist (and ``valid``
    says which, under ``compat`` too).

    Reference: Bondarenko, Nagel, Blankevoort, 2023, arXiv 2306.12929, equations 4 and 5.

    >>> m = QuantizableAttention(dim=16, num_heads=4, gamma=-0.03, gate="conditional_per_token")
    >>> m(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    class_traits = HeadFrame.class_traits.but(memory={"N": 2})
    notes_type = GateNotes

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        gamma: float = 0.0,
        zeta: float = 1.0,
        alpha: float | None = None,
        max_length: int | None = None,
        gate: str = "none",
        gate_hidden: int | None = None,
        gate_all_features: bool = False,
        gate_init: float | None = None,
        fine_tuning: bool = False,
        gate_std: float = 0.01,
        out_proj: bool = True,
        relative: str = "none",
        max_distance: int = 512,
        head_mask: Sequence[float] | None = None,
        skip_attn: bool = False,
        compat: str | None = None,
        **settings: Any,
    ):
        check_choice("compat", compat, (None, "authors"))
        if (alpha is None) != (max_length is None):
            raise ValueError(f"alpha and max_length come together, got alpha={alpha}, max_length={max_length}")
        if alpha is not None and max_length is not None:
            if gamma:
                raise ValueError(f"give gamma={gamma} or alpha={alpha}, not both")
            gamma = -alpha / max_length
        check_choice("gate", gate, GATES)
        check_choice("relative", relative, RELATIVE)
        if max_distance < 1:
            raise ValueError(f"max_distance must be at least 1, got {max_distance}")
        if gate_init is not None and not 0 < gate_init < 1:
            raise ValueError(f"gate_init must lie strictly between 0 and 1, got {gate_init}")
        plain = gamma == 0 and zeta == 1
        super().__init__(dim, num_heads, normalizer="softmax" if plain else ClippedSoftmax(gamma, zeta), **settings)
        if gate != "none" and self.head_dim * num_heads != dim:
            raise ValueError(
                f"a gate reads head_dim={self.head_dim} slices of the input, so num_heads * head_dim must be dim={dim}"
            )
        if not out_proj:
            if self.head_dim * num_heads != dim:
                raise ValueError(f"out_proj=False needs num_heads * head_dim to be dim={dim}")
            self.proj = nn.Identity()  # type: ignore[assignment]
        self.gate = (
            HeadGate(dim, num_heads, gate, gate_hidden, gate_all_features, gate_init, fine_tuning, gate_std)
            if gate != "none"
            else None
        )

        self.skip_attn, self.compat = skip_attn, compat
        if head_mask is not None and len(head_mask) != num_heads:
            raise ValueError(f"head_mask must hold num_heads={num_heads} numbers, got {len(head_mask)}")
        self.head_mask = None if head_mask is None else tuple(float(f) for f in head_mask)
        self.relative, self.max_distance = relative, max_distance
        table = torch.randn(2 * max_distance - 1, self.head_dim) if relative != "none" else None
        self.distance_keys = None if table is None else nn.Parameter(table)

    @property
    def traits(self) -> Traits:
        traits = super().traits.but(memory={"N": 1})
        if self.distance_keys is not None:
            traits = traits.but(grid_ranks=frozenset({1}), memory={"N": 2}, permutation_equivariant=False)
        if self.gate is not None and self.gate.pools:  # reads the mean over all tokens
            if self.compat == "authors":
                patterns = frozenset("non" + p if p.startswith("causal") else p for p in traits.patterns)
                return traits.but(patterns=patterns, streaming=False)
            return traits.but(
                patterns=frozenset(p for p in traits.patterns if p.startswith("noncausal")), streaming=False, mask=False
            )
        return traits

    def _begin(self, x: Tensor, q: Tensor, notes: GateNotes) -> None:
        if self.gate is not None:
            notes.gate = self.gate(x, notes.valid)

    def _mix_heads(self, q: Tensor, k: Tensor, v: Tensor, call: HeadCall, notes: GateNotes) -> Any:
        if self.skip_attn:
            out = q.masked_fill(q.new_ones((), dtype=torch.bool), 0.0)
            return (out, q.new_zeros(*q.shape[:3], k.shape[2])) if call.return_weights else out
        if self.distance_keys is not None:
            near = self._distances(q, k, call.q_pos) * self.scale
            call = call.but(bias=as_bias(near if call.bias is None else near + call.bias.dense()))
        result = super()._mix_heads(q, k, v, call, notes)
        if self.head_mask is None:
            return result
        factors = torch.tensor(self.head_mask, dtype=stats_dtype(q.dtype), device=q.device)[:, None, None]
        if call.return_weights:
            return tuple(part * factors.to(part.dtype) for part in result)
        return result * factors.to(result.dtype)

    def _distances(self, q: Tensor, k: Tensor, q_pos: Tensor | None) -> Tensor:
        """(B, H, N, M): what distances add to the scores, not scaled."""
        assert self.distance_keys is not None
        n, m, most = q.shape[2], k.shape[2], self.max_distance
        if max(n, m) > most:
            raise ValueError(
                f"max_distance={most} bounds a sequence, remembered tokens included; this one has {max(n, m)}"
            )
        rows = torch.arange(n, device=q.device) if q_pos is None else q_pos
        index = rows[:, None] - torch.arange(m, device=q.device) + most - 1
        table = self.distance_keys.to(q.dtype).t()
        scores = (q @ table).gather(-1, index.expand(*q.shape[:2], n, m))
        if self.relative == "key_query":
            by_key = (k @ table).gather(-1, index.t().expand(*k.shape[:2], m, n)).mT
            scores = scores + by_key.repeat_interleave(q.shape[1] // k.shape[1], 1)
        return scores

    def _gate(self, out: Tensor, notes: GateNotes) -> Tensor:
        return out if notes.gate is None else out * notes.gate

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From ``BertSelfAttentionWithExtras`` (with BERT's ``output.dense``, when it is there) or
        ``OPTAttentionWithExtras``."""
        theirs = Released(state_dict, "BertSelfAttentionWithExtras or OPTAttentionWithExtras")
        out = theirs.renamed(
            {
                r"(q)(?:uery|_proj)\.(weight|bias)": r"\1.\2",
                r"(k)(?:ey|_proj)\.(weight|bias)": r"\1.\2",
                r"(v)(?:alue|_proj)\.(weight|bias)": r"\1.\2",
                r"(?:output\.dense|dense|out_proj)\.(weight|bias)": r"proj.\1",
                r"distance_embedding\.weight": "distance_keys",
                r"alpha": "gate.alpha",
                r"alpha\.(weight|bias)": r"gate.linear.\1",
            }
        )
        # one predictor per head there, a linear map or two with a ReLU; stacked here
        for layer, ours in ((r"", "2"), (r"0\.", "1"), (r"2\.", "2")):
            for kind, letter in (("weight", "w"), ("bias", "b")):
                parts = {int(m[1]): value for m, value in theirs.matching(rf"alpha\.(\d+)\.{layer}{kind}")}
                if not parts:
                    continue
                if sorted(parts) != list(range(len(parts))):
                    raise ValueError(f"state_dict has alpha of the heads {sorted(parts)}; one per head is needed")
                one = stacked(f"gate.{letter}{ours}", [parts[i] for i in range(len(parts))])
                out[f"gate.{letter}{ours}"] = one.squeeze(1) if ours == "2" else one
        return theirs.close(out)


def outlier_metrics(activations: Tensor) -> dict[str, float]:
    """The paper's measures of outliers in a layer's output.

    Args:
        activations: (B, N, C).

    Returns:
        ``inf_norm``: largest magnitude; ``kurtosis``: fourth standardised moment over all entries of a sample,
        averaged over samples (3 for a normal distribution).

    >>> outlier_metrics(torch.tensor([[[1.0, -1.0, 1.0, -1.0]]]))
    {'inf_norm': 1.0, 'kurtosis': 1.0}
    """
    flat = activations.detach().flatten(1).double()
    centred = flat - flat.mean(1, keepdim=True)
    variance = centred.square().mean(1)
    kurtosis = centred.pow(4).mean(1) / variance.square().clamp(min=torch.finfo(torch.float64).tiny)
    return {"inf_norm": float(flat.abs().max()), "kurtosis": float(kurtosis.mean())}
