"""The stream between nodes and logits: whether writes add up, and the linear part of the norm at its end."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...hooks import Nodes
from .replay import Replay


class FrozenNorm:
    """The linear part of a norm at the statistics of given vectors.

    Args:
        norm: a layer norm or an RMS norm, with gains ``w`` or ``1 + w``.
        at: (B, C) what it reads.

    Raises:
        ValueError: a norm of another kind: its output is not reproduced.
    """

    @torch.no_grad()
    def __init__(self, norm: nn.Module, at: Tensor):
        wanted = norm(at[:, None])[:, 0]
        weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        w = torch.ones(at.shape[-1], dtype=at.dtype, device=at.device) if weight is None else weight.to(at)
        eps = next(
            (getattr(norm, n) for n in ("eps", "variance_epsilon") if isinstance(getattr(norm, n, None), float)), 0.0
        )
        self.bias = torch.zeros_like(w) if bias is None else bias.to(at)
        for centred in (isinstance(norm, nn.LayerNorm), not isinstance(norm, nn.LayerNorm)):
            for gain in (w, 1 + w):
                x = at - at.mean(-1, keepdim=True) if centred else at
                self.gain, self.centred = gain, centred
                self.scale = (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
                if torch.allclose(self(at) + self.bias, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max())):
                    return
        raise ValueError(
            f"the final norm, a {type(norm).__name__}, is neither a layer norm nor an RMS norm, so it has no frozen "
            "linear part"
        )

    def __call__(self, x: Tensor) -> Tensor:
        """(..., B, C) -> the same."""
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        return x * self.scale * self.gain


def need_stream(replay: Replay) -> None:
    """Raise unless blocks only add to the stream and a norm reads it at the end."""
    if replay.nodes.norm is None or not replay.short:
        raise ValueError(
            f"what a node of {type(replay.model).__name__} writes does not reach the logits by addition: its blocks "
            "end in norms, or more than a norm and an unembedding follows them; use patch, which recomputes"
        )
    for number, layer in enumerate(replay.nodes.layers):
        z, mlp = replay.values["z"][number], replay.values.get("mlp", {}).get(number)
        if mlp is None:
            continue
        written = torch.einsum("bhnd,hdc->bnc", z[:, :, -1:], replay.nodes.output_weight(number).to(z))
        total = replay.hidden[number][:, -1:] + written + mlp[:, -1:] + projection_bias(replay.nodes, number)
        if not torch.allclose(
            total, replay.hidden[number + 1][:, -1:], rtol=1e-2, atol=1e-2 * float(total.abs().max())
        ):
            raise ValueError(
                f"layer {number} ({layer.site.name}) does more than add heads and feed-forward to the stream, so "
                "effects do not add up; use patch, which recomputes"
            )


@torch.no_grad()
def projection_bias(nodes: Nodes, layer: int) -> Tensor:
    """(C,) what an output projection adds whatever its heads say."""
    this = nodes.layers[layer]
    weight = next(this.projection.parameters())
    zero = torch.zeros(1, 1, nodes._width(this.projection), device=weight.device, dtype=weight.dtype)
    bias = this.projection(zero)
    return (bias if this.behind is None else this.behind(bias))[0, 0]
