"""Position attention of DANet: every place reads every other, added to the map in a measure that is learned.

Fu et al., 2019, "Dual Attention Network for Scene Segmentation", arXiv 1809.02983, section 3.2:

    ``A = softmax(q k^T)`` without a scale, over keys,  ``y = gamma A v + x``,

q and k with an eighth of the channels, gamma one number that starts at 0: the layer starts as the identity. The map A
is never built: the engine that streams it has memory linear in the number of places, also where values are wider than
keys. The channel half is :class:`attnlib.nn.modulation.danet.ChannelAttention`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...checks import check_flag, check_int
from ...ops import attention
from ...types import Traits
from ..base import Mechanism
from ..layers import flat_valid
from ..registry import register
from ..released import Released


@register("danet-position-attention")
class PositionAttention(Mechanism):
    """``y = gamma softmax(q k^T) v + x``; shapes x and y (B, *grid, C).

    Args:
        dim: width C.
        qk_dim: width of queries and keys; an eighth of ``dim`` by default, at least 1.
        bias: of the three linear maps; the volumes of DAUNet have none.

    Reference: Fu et al., 2019, arXiv 1809.02983, section 3.2.

    >>> layer = PositionAttention(dim=16)
    >>> x = torch.randn(2, 5, 6, 16)
    >>> layer(x).equal(x)
    True
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self"}),
        grid_ranks=frozenset({1, 2, 3}),
        work={"N": 2},
        memory={"N": 1},
        permutation_equivariant=True,
    )

    def __init__(self, dim: int, qk_dim: int | None = None, bias: bool = True):
        super().__init__(dim)
        qk_dim = max(dim // 8, 1) if qk_dim is None else check_int("qk_dim", qk_dim, least=1)
        check_flag("bias", bias)
        self.q, self.k = nn.Linear(dim, qk_dim, bias=bias), nn.Linear(dim, qk_dim, bias=bias)
        self.v = nn.Linear(dim, dim, bias=bias)
        self.gamma = nn.Parameter(torch.zeros(1))

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        tokens, exists = x.flatten(1, -2), flat_valid(valid)
        q, k, v = (f(tokens).unsqueeze(1) for f in (self.q, self.k, self.v))
        y = attention(q, k, v, scale=1.0, valid=exists)
        return (self.gamma * y.squeeze(1).reshape(x.shape) + x).to(x.dtype)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From ``PAM_Module`` of DANet and of what copied it: ``query_conv.*`` and so on, ``gamma``."""
        theirs = Released(state_dict, "DANet's PAM_Module")
        names = {rf"{long}_conv\.(weight|bias)": _linear(short) for short, long in
                 (("q", "query"), ("k", "key"), ("v", "value"))}  # fmt: skip
        return theirs.close(theirs.renamed({**names, r"gamma": "gamma"}))


def _linear(name: str):  # type: ignore[no-untyped-def]
    return lambda m, t: {f"{name}.{m[1]}": t.flatten(1) if m[1] == "weight" else t}
