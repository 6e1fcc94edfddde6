"""Attention of TransNormerLLM: linear attention with decay per head and layer, normed instead of divided, gated.

Qin et al., 2023, "TransNormerLLM", arXiv 2307.14995; 2024, "Various Lengths, Constant Speed", arXiv 2405.17381. It is
:class:`attnlib.nn.linear.lightning_attention_2.LightningAttention2` with the settings that its two modules have:

- ``form="released"``: that of the released models. ``[q, k, v, u] = W x``, ``q`` and ``k`` through silu, in the first
  layer with linearized relative positions ``x -> [x cos(theta t), x sin(theta t)]``;
  ``y = W_o (u * SRMSNorm(o))``.
- ``form="example"``: the later module beside the kernels: silu of ``v`` too, LayerNorm, and a sigmoid gate through one
  head's width. Which of the two the paper of 2024 reports is not said.

Slopes fall with the layer, ``s_h (1 - l / (L - 1) + 1e-5)``, so that the last one hardly forgets. Positions live in the
state: where a sequence is, is no matter of the module.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ...checks import check_choice, check_real
from ..registry import register
from .lightning_attention_2 import LightningAttention2

FORMS: dict[str, dict[str, Any]] = {
    "released": {},
    "example": dict(value_activation="silu", norm="layer", gate="low-rank"),
}


@register("lightning-attention-tnl", "transnormer-attention", "norm-linear-attention")
class TransNormerAttention(LightningAttention2):
    """The attention of a TransNormerLLM layer.

    Args:
        dim: width of ``x``.
        num_heads: heads.
        layer: number of this layer, from 0.
        num_layers: layers of the model; ``None`` uses the slopes of ALiBi unchanged.
        form: ``"released"`` or ``"example"``, see above.
        lrpe: linearized relative positions; by default in layer 0 of the released form.
        init_std: deviation of normal weights at the start; as torch's linear maps start by default.
        settings: of :class:`attnlib.nn.linear.lightning_attention_2.LightningAttention2`.

    Reference: Qin et al., 2024, arXiv 2405.17381.

    >>> import torch
    >>> TransNormerAttention(dim=16, num_heads=4, layer=1, num_layers=2)(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        layer: int = 0,
        num_layers: int | None = None,
        form: str = "released",
        lrpe: bool | None = None,
        init_std: float | None = None,
        **settings: Any,
    ):
        check_choice("form", form, tuple(FORMS))
        lrpe = (form == "released" and layer == 0) if lrpe is None else lrpe
        super().__init__(dim, num_heads, layer, num_layers, lrpe=lrpe, **{**FORMS[form], **settings})
        self.form = form
        if init_std is not None:
            check_real("init_std", init_std, least=0)
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=init_std)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
