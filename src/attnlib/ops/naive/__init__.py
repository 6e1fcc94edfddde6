"""The oracle of each operator: its specification in float64, whatever the inputs.

Everything here has the arguments and the name of the operator it is the oracle of, runs its backend ``"eager"`` on
float64 copies of the inputs, and gives float64 back, with derivatives of any order. It is short, obviously right, as
slow and as large as the definition, and what every backend is held to.

>>> import torch
>>> from attnlib import ops
>>> q, k, v = torch.randn(3, 1, 2, 80, 8)
>>> float((ops.attention(q, k, v, backend="tiled") - ops.naive.attention(q, k, v)).abs().max()) < 1e-6
True
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from ...types import exactly
from ..attention import attention as _attention
from ..attention import attention_partial as _attention_partial
from ..block_sparse import block_sparse_attention as _block_sparse_attention
from ..block_sparse import block_sparse_partial as _block_sparse_partial
from ..halo import halo_attention as _halo_attention
from ..late_interaction import late_interaction as _late_interaction
from ..linear import linear_attention as _linear_attention
from ..linear import linear_partial as _linear_partial
from ..modulation import channel_attention as _channel_attention
from ..modulation import depthwise as _depthwise
from ..neighborhood import neighborhood_attention as _neighborhood_attention
from ..neighborhood import neighborhood_partial as _neighborhood_partial
from ..partition import partition_attention as _partition_attention
from ..partition import window_attention as _window_attention
from ..reduced import agent_attention as _agent_attention
from ..reduced import reduced_attention as _reduced_attention
from ..reversed import reversed_attention as _reversed_attention
from ..sampled import deformable_attention as _deformable_attention
from ..sampled import deformable_attention_3d as _deformable_attention_3d
from ..scan import selective_scan as _selective_scan
from ..split_decoding import split_decoding as _split_decoding
from ..split_decoding import split_partial as _split_partial
from ..toeplitz import toeplitz_attention as _toeplitz_attention
from ..window_weights import neighborhood_av as _neighborhood_av


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _oracle(operator: Callable[..., Any], argument: str = "backend") -> Callable[..., Any]:
    """``operator`` by its specification, in float64."""

    @functools.wraps(operator)
    def run(*args: Any, **kwargs: Any) -> Any:
        if argument in kwargs:
            raise TypeError(f"{operator.__name__} of naive takes no {argument}: it is always the specification")
        args, kwargs = pytree.tree_map(_double, (args, kwargs))
        first = next(t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        with exactly(first):
            return operator(*args, **kwargs, **{argument: "eager"})

    run.__doc__ = (
        f"Oracle of :func:`attnlib.ops.{operator.__name__}`: its specification in float64; arguments as there."
    )
    return run


attention = _oracle(_attention)
attention_partial = _oracle(_attention_partial)
agent_attention = _oracle(_agent_attention)
block_sparse_attention = _oracle(_block_sparse_attention)
block_sparse_partial = _oracle(_block_sparse_partial)
channel_attention = _oracle(_channel_attention)
deformable_attention = _oracle(_deformable_attention)
deformable_attention_3d = _oracle(_deformable_attention_3d)
depthwise = _oracle(_depthwise)
halo_attention = _oracle(_halo_attention)
late_interaction = _oracle(_late_interaction)
linear_attention = _oracle(_linear_attention, "form")
linear_partial = _oracle(_linear_partial, "form")
neighborhood_attention = _oracle(_neighborhood_attention)
neighborhood_av = _oracle(_neighborhood_av)
neighborhood_partial = _oracle(_neighborhood_partial)
partition_attention = _oracle(_partition_attention)
reduced_attention = _oracle(_reduced_attention)
reversed_attention = _oracle(_reversed_attention)
selective_scan = _oracle(_selective_scan)
split_decoding = _oracle(_split_decoding)
split_partial = _oracle(_split_partial)
toeplitz_attention = _oracle(_toeplitz_attention, "form")
window_attention = _oracle(_window_attention)
