"""One sequence over several processes: every one holds a chunk, and states or keys travel.

Stands on ``torch.distributed`` and its device meshes alone. :func:`sequence_parallel` runs a model so;
:func:`linear_attention` and :func:`attention` are the operators; :class:`Traffic` counts what is sent.
"""

from .group import Group, Traffic, Transfer, gather, mesh, shard, sum_gradients
from .lasp2 import attention, lasp2_as_released, linear_attention
from .session import check_cuts, sequence_parallel

__all__ = [
    "Group",
    "Traffic",
    "Transfer",
    "attention",
    "check_cuts",
    "gather",
    "lasp2_as_released",
    "linear_attention",
    "mesh",
    "sequence_parallel",
    "shard",
    "sum_gradients",
]
