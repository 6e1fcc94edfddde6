"""Lightning Attention-2 (Qin et al., 2024): causal linear attention with a constant decay per head, tile by tile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.feature_maps import feature_map
from ...ops.linear import linear_attention
from ...positions import alibi_slopes
from ...types import Output, State, Traits, check_choice, stats_dtype
from ..base import Mechanism
from ..frame import Stream
from ..layers import flat_valid, head_dim_of, merge_heads, split_heads
from ..registry import register
from ..released import Released, Rule, split_rule


def decay_slopes(num_heads: int, layer: int = 0, num_layers: int | None = None) -> Tensor:
    """(H,) slopes ``s`` of the decay ``exp(-s)`` per token.

    ``s_h = 2^(-8 h / H)`` as in ALiBi, times ``1 - layer / (num_layers - 1) + 1e-5`` when the number of layers is
    known: the first layer forgets fast, the last one hardly at all.

    >>> decay_slopes(8)[:3].tolist()
    [0.5, 0.25, 0.125]
    """
    slopes = alibi_slopes(num_heads).float()
    if num_layers is None:
        return slopes
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer={layer} is not possible with num_layers={num_layers}; choose 0 to {num_layers - 1}")
    return slopes * (1 - layer / max(num_layers - 1, 1) + 1e-5)


class LinearizedRotary(nn.Module):
    """``x -> [x cos(theta t), x sin(theta t)]`` with learned ``theta``: positions that survive a linear product.

    Args:
        num_heads: heads.
        head_dim: width of a head; the output is twice as wide.

    Reference: Qin et al., 2023, "Linearized relative positional encoding", arXiv 2307.09270.
    """

    def __init__(self, num_heads: int, head_dim: int):
        super().__init__()
        dim = num_heads * head_dim
        self.theta = nn.Parameter(10000 ** (-2 / dim * torch.arange(dim)).reshape(num_heads, 1, head_dim))

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        """(B, H, N, D) and positions (B, N) to (B, H, N, 2 D)."""
        theta = self.theta.to(stats_dtype(self.theta.dtype))
        angle = theta * pos[:, None, :, None].to(theta.dtype)
        return torch.cat([x * angle.cos().to(x.dtype), x * angle.sin().to(x.dtype)], -1)


@register("lightning-attention-2", "lightning-attention", "tnl")
class LightningAttention2(Mechanism):
    """Causal linear attention with decay, in the layer of TransNormerLLM.

    ``o_t = sum_{j <= t} lambda^(t - j) (q_t . k_j) v_j`` with ``lambda = exp(-s_h)``, ``q = silu(x W_q)``,
    ``k = silu(x W_k)``: no denominator and no ``1 / sqrt(D)``. Then ``y = W_o (gate(x) * norm([o_1 .. o_H]))``. Inside
    a tile the map is computed as such, between tiles a (D, Dv) state in float32 carries on, in forward and backward
    (:func:`attnlib.ops.linear.linear_attention`); that state is also what decoding keeps, whatever the length.

    Defaults are the released TransNormerLLM (``gate="full"``: ``u = x W_u``, no activation; ``norm="rms"`` without
    gain). The authors' later example layer is ``value_activation="silu", norm="layer", gate="low-rank"``.

    Differs from the authors' code: any length and any head width; a token that does not exist takes no step of the
    decay (they zero its value only); the position of ``lrpe`` lives in the state, not on the module.

    Args:
        dim: width of ``x``.
        num_heads: heads.
        layer: number of this layer, from 0, for the slopes.
        num_layers: layers of the model; ``None`` uses the slopes of ALiBi unchanged (see :func:`decay_slopes`).
        slopes: (H,) slopes instead of those; 0 for a head that never forgets (the authors' kernel without decay).
        activation: of queries and keys, ``"silu"``, ``"relu"``, ``"elu1"`` or ``"identity"``.
        value_activation: of values, one of the same.
        norm: ``"rms"`` (no gain), ``"layer"`` (LayerNorm) or ``"none"``, over the concatenated heads.
        gate: ``"full"``, ``"low-rank"`` (sigmoid, through one head's width) or ``"none"``.
        lrpe: linearized rotary positions on queries and keys; TransNormerLLM has them in its first layers.
        qkv_bias: biases of the query, key, value and gate projections.
        proj_bias: bias of the output projection.
        chunk: tokens per tile; changes speed, not the result.
        causal: must be True; the operator has a direction.
        inner_dim: width of all heads together; ``dim`` by default.

    Reference: Qin et al., 2024, arXiv 2401.04658, algorithms 1 and 2; the layer: Qin et al., 2024, arXiv 2405.17381.

    >>> import torch
    >>> LightningAttention2(dim=16, num_heads=4)(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    class_traits = Traits(
        patterns=frozenset({"causal-self"}),
        grid_ranks=frozenset({1}),
        streaming=True,
        work={"N": 1},
        memory={"N": 1},
    )
    cuts_sequence = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        layer: int = 0,
        num_layers: int | None = None,
        slopes: Tensor | Sequence[float] | None = None,
        activation: str = "silu",
        value_activation: str = "identity",
        norm: str = "rms",
        gate: str = "full",
        lrpe: bool = False,
        qkv_bias: bool = False,
        proj_bias: bool = False,
        chunk: int = 128,
        causal: bool = True,
        inner_dim: int | None = None,
    ):
        super().__init__(dim)
        inner = dim if inner_dim is None else inner_dim
        if not causal:
            raise ValueError("causal=False is not possible: lightning attention is causal; pass causal=True")
        for name, choice in (("activation", activation), ("value_activation", value_activation)):
            check_choice(name, choice, ("silu", "relu", "elu1", "identity"))
        check_choice("norm", norm, ("rms", "layer", "none"))
        check_choice("gate", gate, ("full", "low-rank", "none"))
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        self.num_heads, self.head_dim = num_heads, head_dim_of(inner, num_heads)
        self.activation, self.value_activation, self.chunk = activation, value_activation, chunk
        if slopes is None:
            with torch.device("cpu"):  # also where a model is built without storage
                slopes = decay_slopes(num_heads, layer, num_layers)
        else:
            slopes = torch.as_tensor(slopes, dtype=torch.float32)
            if tuple(slopes.shape) != (num_heads,) or bool((slopes < 0).any()):
                raise ValueError(f"slopes must be ({num_heads},) and at least 0, got {slopes.tolist()}")
        # Numbers, not a buffer: no released state dict holds them, and neither a change of type nor memory that was
        # only set aside for the weights may change them.
        self._slopes = tuple(slopes.float().tolist())
        self.q = nn.Linear(dim, inner, bias=qkv_bias)
        self.k = nn.Linear(dim, inner, bias=qkv_bias)
        self.v = nn.Linear(dim, inner, bias=qkv_bias)
        self.gate: nn.Module | None = None
        if gate == "full":
            self.gate = nn.Linear(dim, inner, bias=qkv_bias)
        elif gate == "low-rank":
            self.gate = nn.Sequential(
                nn.Linear(dim, self.head_dim, bias=qkv_bias),
                nn.Linear(self.head_dim, inner, bias=qkv_bias),
                nn.Sigmoid(),
            )
        norms: dict[str, Any] = {
            "rms": lambda: nn.RMSNorm(inner, eps=1e-6, elementwise_affine=False),
            "layer": lambda: nn.LayerNorm(inner),
            "none": nn.Identity,
        }
        self.norm = norms[norm]()
        self.lrpe = LinearizedRotary(num_heads, self.head_dim) if lrpe else None
        self.proj = nn.Linear(inner, dim, bias=proj_bias)

    @property
    def slopes(self) -> Tensor:
        """(H,) float32 slopes of the decay."""
        return self._decay(next(self.parameters()).device)

    def _decay(self, device: torch.device) -> Tensor:
        return torch.tensor(self._slopes, dtype=torch.float32, device=device)

    def mix(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        valid: Tensor | None = None,
        state: State | None = None,
        returns: tuple[str, ...] = (),
    ) -> Output:
        act, act_v = feature_map(self.activation), feature_map(self.value_activation)
        q, k, v = (split_heads(t, self.num_heads) for t in (act(self.q(x)), act(self.k(x)), act_v(self.v(x))))
        exists = flat_valid(valid)
        stream = Stream(x, exists, state, "state" in returns)
        if self.lrpe is not None:
            q, k = self.lrpe(q, stream.positions), self.lrpe(k, stream.positions)
        out, final = linear_attention(
            q, k, v, decay=-self._decay(x.device), valid=exists, state=state, chunk=self.chunk, return_state=True
        )
        y = self.norm(merge_heads(out))
        if self.gate is not None:
            y = self.gate(x) * y
        return Output(self.proj(y), state=stream.next(**final.tensors))

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From ``NormLinearAttention`` of TransNormerLLM (with ``qkvu_proj``) or ``TnlAttention`` (with ``q_proj``)."""
        theirs = Released(state_dict, "NormLinearAttention or TnlAttention")
        rules: dict[str, Rule] = {
            r"qkvu_proj\.(weight|bias)": split_rule("q", "k", "v", "gate"),
            r"([qkv])_proj\.(weight|bias)": r"\1.\2",
            r"(?:out_proj|o_proj)\.(weight|bias)": r"proj.\1",
            r"output_gate\.(\d+)\.(weight|bias)": r"gate.\1.\2",
            r"norm\.(weight|bias)": r"norm.\1",
            r"lrpe\.theta": "lrpe.theta",
        }
        theirs.leave(r"slopes|.*\.slopes", because="a setting here, the same numbers")
        return theirs.close(theirs.renamed(rules))
