"""Clipped softmax and gated attention (Bondarenko et al., 2023): heads that can do nothing without outliers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ...normalizers import ClippedSoftmax
from ...types import Traits, check_choice
from ..registry import register
from .softmax_attention import SoftmaxAttention

GATES = ("none", "unconditional_per_head", "conditional_per_head", "conditional_per_token")


class HeadGate(nn.Module):
    """``sigmoid(G_h(x))``, one number per head and token (or per head): how much of a head's output passes.

    ``G_h`` reads only its own ``head_dim`` slice of the layer's input, through a linear map or a two-layer MLP, unless
    ``all_features``. Shapes: ``x (B, N, C) -> (B, H, N, 1)``, with ``N = 1`` for the per-head kind.
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
    ):
        super().__init__()
        self.kind, self.num_heads, self.all_features = kind, num_heads, all_features
        width = dim // num_heads
        # A tuned gate starts as the identity: sigmoid(bias) = init, and the output is divided by init.
        self.scaling = 1.0 / init if tune and init is not None else 1.0
        bias = 0.0 if init is None else -math.log(1.0 / init - 1.0)
        if kind == "unconditional_per_head":
            self.alpha = nn.Parameter(torch.zeros(num_heads))
        elif all_features:
            self.linear = nn.Linear(dim, num_heads)
        else:
            if hidden is not None:
                self.w1 = nn.Parameter(torch.empty(num_heads, hidden, width).uniform_(-1, 1) * width**-0.5)
                self.b1 = nn.Parameter(torch.empty(num_heads, hidden).uniform_(-1, 1) * width**-0.5)
            last = width if hidden is None else hidden
            std = torch.empty(num_heads, last).uniform_(-1, 1) * last**-0.5
            self.w2 = nn.Parameter(torch.randn(num_heads, last) * 0.01 if tune and hidden is None else std)
            self.b2 = nn.Parameter(torch.full((num_heads,), bias))
        self.hidden = hidden

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        if self.kind == "unconditional_per_head":
            return self.alpha.sigmoid()[:, None, None]
        if self.all_features:
            return self.linear(x).transpose(1, 2).unsqueeze(-1).sigmoid() * self.scaling
        z = x.unflatten(-1, (self.num_heads, -1))  # (B, N, H, D)
        if self.hidden is not None:
            z = torch.relu(torch.einsum("bnhd,hkd->bnhk", z, self.w1) + self.b1)
        score = (torch.einsum("bnhk,hk->bhn", z, self.w2) + self.b2[:, None]).unsqueeze(-1)
        if self.kind == "conditional_per_head":
            if valid is None:
                score = score.mean(2, keepdim=True)
            else:
                real = valid[:, None, :, None].to(score.dtype)
                score = (score * real).sum(2, keepdim=True) / real.sum(2, keepdim=True).clamp(min=1)
        return score.sigmoid() * self.scaling


@register("quantizable-transformers", "clipped-softmax-attention", "gated-attention")
class QuantizableAttention(SoftmaxAttention):
    """Softmax attention that can write exact zeros, or gate a head off, so that no logit has to explode.

    ``A = clip((zeta - gamma) softmax(s) + gamma, 0, 1)`` and ``o_h <- sigmoid(G_h(x)) o_h``: two independent remedies
    for the outliers that no-op heads grow.

    Args:
        dim, num_heads, ...: as in :class:`SoftmaxAttention`; ``dim`` must equal ``num_heads * head_dim`` with a gate.
        gamma, zeta: stretch of the clipped softmax; ``gamma=0, zeta=1`` is plain softmax.
        alpha, max_length: the length-robust form ``gamma = -alpha / max_length``; ``max_length`` is the longest
            sequence of training, never the current one.
        gate: one of ``GATES``.
        gate_hidden: width of the gate's hidden layer (the authors use ``head_dim // 4``); ``None`` for a linear gate.
        gate_all_features: a gate reads the whole input instead of its head's slice.
        gate_init: initial opening of the gate.
        fine_tuning: start as the ungated layer: output divided by ``gate_init``.

    What differs from the authors' code: this module has the output projection; their slip
    ``"clipped(-.005:1.005)" -> gamma=-0.003`` is not reproduced; a row that sees nothing gives zeros; the mean of
    ``conditional_per_head`` counts only tokens that exist.

    Reference: Bondarenko, Nagel, Blankevoort, 2023, arXiv 2306.12929, equations 4 and 5.

    >>> m = QuantizableAttention(dim=16, num_heads=4, gamma=-0.03, gate="conditional_per_token")
    >>> m(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

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
        **settings: Any,
    ):
        if (alpha is None) != (max_length is None):
            raise ValueError(f"alpha and max_length come together, got alpha={alpha}, max_length={max_length}")
        if alpha is not None and max_length is not None:
            if gamma:
                raise ValueError(f"give gamma={gamma} or alpha={alpha}, not both")
            gamma = -alpha / max_length
        check_choice("gate", gate, GATES)
        if gate_init is not None and not 0 < gate_init < 1:
            raise ValueError(f"gate_init must lie strictly between 0 and 1, got {gate_init}")
        plain = gamma == 0 and zeta == 1
        super().__init__(dim, num_heads, normalizer="softmax" if plain else ClippedSoftmax(gamma, zeta), **settings)
        if gate != "none" and self.head_dim * num_heads != dim:
            raise ValueError(
                f"a gate reads head_dim={self.head_dim} slices of the input, so num_heads * head_dim must be dim={dim}"
            )
        self.gate = (
            HeadGate(dim, num_heads, gate, gate_hidden, gate_all_features, gate_init, fine_tuning)
            if gate != "none"
            else None
        )

    @property
    def traits(self) -> Traits:
        traits = super().traits
        if self.gate is not None and self.gate.kind == "conditional_per_head":  # reads the mean over all tokens
            return traits.but(
                patterns=frozenset(p for p in traits.patterns if p.startswith("noncausal")), streaming=False, mask=False
            )
        return traits

    def _begin(self, x: Tensor, q: Tensor, **call: Any) -> dict[str, Any]:
        return {} if self.gate is None else {"gate": self.gate(x, call["valid"])}

    def _gate(self, out: Tensor, shared: dict[str, Any]) -> Tensor:
        return out * shared["gate"] if "gate" in shared else out

    @staticmethod
    def convert_state_dict(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """From ``BertSelfAttentionWithExtras`` (``query`` .. ``alpha``); ``output.dense`` becomes ``proj``."""
        names = {"query": "q", "key": "k", "value": "v", "output.dense": "proj", "dense": "proj"}
        out: dict[str, Tensor] = {}
        heads: dict[str, dict[int, Tensor]] = {}
        for key, tensor in state_dict.items():
            module, _, kind = key.rpartition(".")
            if module in names:
                out[f"{names[module]}.{kind}"] = tensor
            elif key == "alpha":
                out["gate.alpha"] = tensor
            elif module == "alpha":
                out[f"gate.linear.{kind}"] = tensor
            elif module.startswith("alpha."):
                _, head, *layer = module.split(".")
                first = bool(layer) and layer[0] == "0"
                heads.setdefault(("w" if kind == "weight" else "b") + ("1" if first else "2"), {})[int(head)] = tensor
        for name, parts in heads.items():
            stacked = torch.stack([parts[i] for i in range(len(parts))])
            out[f"gate.{name}"] = stacked.squeeze(1) if name.endswith("2") else stacked
        return out


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
