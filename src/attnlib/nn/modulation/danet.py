"""Channel attention of DANet: every channel reads every other, added to the map in a measure that is learned.

Fu et al., 2019, arXiv 1809.02983, section 3.3. With X the N x C map, without projections and without a scale,

    ``E = X^T X`` of C x C,  ``A = softmax(-E)`` or ``softmax(E)`` over its rows,  ``y = gamma X A^T + x``.

The released code of DANet has ``softmax(max(E) - E)``, which is ``softmax(-E)``: channels attend to those unlike them.
The paper, and DAUNet, have ``softmax(E)``. gamma starts at 0. E grows with the number of places, so that the softmax is
close to a choice of one channel on large maps. DAUNet puts ``X A`` where the paper has ``X A^T``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...checks import check_choice, check_flag
from ...ops import channel_attention
from ...types import Traits
from ..base import Mechanism
from ..layers import flat_valid
from ..registry import register
from ..released import Released

SIGNS = ("unlike", "alike")


@register("danet-channel-attention")
class ChannelAttention(Mechanism):
    """``y = gamma X softmax(-+ X^T X)^T + x``; shapes x and y (B, *grid, C).

    Args:
        dim: width C.
        sign: ``"unlike"``: ``softmax(-E)``, as DANet's code; ``"alike"``: ``softmax(E)``, as its paper.
        transposed: ``X A`` instead of ``X A^T``, as DAUNet: a channel gives itself away by the weights of its own row,
            and what it receives does not sum to one.

    Reference: Fu et al., 2019, arXiv 1809.02983, section 3.3.

    >>> layer = ChannelAttention(dim=16)
    >>> x = torch.randn(2, 5, 6, 16)
    >>> layer(x).equal(x)
    True
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self"}),
        grid_ranks=frozenset({1, 2, 3}),
        work={"N": 1},
        memory={"N": 1},
        permutation_equivariant=True,
    )

    def __init__(self, dim: int, sign: str = "unlike", transposed: bool = False):
        super().__init__(dim)
        check_choice("sign", sign, SIGNS)
        self.sign, self.transposed = sign, check_flag("transposed", transposed)
        self.gamma = nn.Parameter(torch.zeros(1))

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        tokens = x.flatten(1, -2).unsqueeze(1)
        scale = -1.0 if self.sign == "unlike" else 1.0
        if self.transposed:
            # Features without tokens give the weights alone: the product is in the other order than the operator's.
            weights = channel_attention(
                tokens, tokens, tokens, scale=scale, valid=flat_valid(valid), return_weights=True
            )[1]
            y = tokens @ weights.to(tokens.dtype)
        else:
            y = channel_attention(tokens, tokens, tokens, scale=scale, valid=flat_valid(valid))
        return (self.gamma * y.squeeze(1).reshape(x.shape) + x).to(x.dtype)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From ``CAM_Module`` of DANet and of what copied it: ``gamma``."""
        theirs = Released(state_dict, "DANet's CAM_Module")
        return theirs.close(theirs.renamed({r"gamma": "gamma"}))
