"""What the Triton kernels share: sizes of tiles to try, and padded widths; importing this imports Triton."""

from __future__ import annotations

import triton

#: Rows, columns, warps and stages of tiles. The first serves where nothing is timed, in the interpreter.
TILES = ((64, 64, 4, 2), (128, 64, 8, 2), (64, 32, 4, 3), (32, 64, 4, 2))


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which has no clock to choose by."""
    return bool(triton.knobs.runtime.interpret)


def configurations() -> list[triton.Config]:
    """Few: a search runs once for every size it has not seen."""
    tiles = ((32, 64, 4, 1),) if interpreted() else TILES
    return [triton.Config(dict(ROWS=r, COLUMNS=c), num_warps=w, num_stages=s) for r, c, w, s in tiles]


def width(d: int) -> int:
    """Columns of a tile that holds heads of ``d``: a power of two that products can take."""
    return max(16, triton.next_power_of_2(d))
