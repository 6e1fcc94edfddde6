"""Time of super token attention beside the same equation by convolutions with unit kernels, and beside dense attention.

Nine neighbours of every cell can be read by a convolution with nine unit kernels, one map per channel, and written by
its transpose, as the authors of STViT do on channels-first maps. Ours reads and writes rows.

``attnlib bench --suite super-token --out benchmarks/results`` writes ``super-token-cpu.json``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...nn.dense.softmax_attention import SoftmaxAttention
from ...nn.reduced.stvit_super_token import SuperTokenAttention
from ..clock import interleave, machine, ratio

#: (width, heads, side of a cell, side of the map): both stages of the small and of the base model at 224 pixels, and
#: the first of the small one at 384.
SHAPES = ((64, 1, 8, 56), (128, 2, 4, 28), (96, 2, 8, 56), (192, 3, 4, 28), (64, 1, 8, 96))


def by_convolutions(m: SuperTokenAttention, x: Tensor) -> Tensor:
    """One association of ``m`` on a channels-first map (B, C, H, W) that its cells divide."""
    batch, dim, height, width = x.shape
    h, w = m.stoken_size
    rows, columns = height // h, width // w
    unit = torch.eye(9, dtype=x.dtype).view(9, 1, 3, 3)

    def read(s: Tensor) -> Tensor:
        around = F.conv2d(s.reshape(batch * dim, 1, rows, columns), unit, padding=1)
        return around.view(batch, dim * 9, rows * columns).transpose(1, 2).reshape(batch, rows * columns, dim, 9)

    def write(t: Tensor) -> Tensor:  # (batch * channels, 9, rows * columns)
        return F.conv_transpose2d(t.reshape(-1, 9, rows, columns), unit, padding=1)

    cells = x.view(batch, dim, rows, h, columns, w).permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, h * w, dim)
    with torch.no_grad():
        weights = (cells @ read(F.avg_pool2d(x, (h, w))) * dim**-0.5).softmax(-1)
        mass = write(weights.sum(2).transpose(1, 2))
    s = write((cells.mT @ weights).permute(0, 2, 3, 1)).view(batch, dim, rows, columns) / (mass + 1e-12)
    tokens = s.flatten(2).transpose(1, 2)
    q, k, v = (t.unflatten(-1, (m.num_heads, -1)).transpose(1, 2) for t in m.qkv(tokens).chunk(3, -1))
    out = m.proj((((q @ k.mT) * m.scale).softmax(-1) @ v).transpose(1, 2).flatten(2))
    y = read(out.transpose(1, 2)) @ weights.mT  # (batch, cells, dim, tokens)
    return y.view(batch, rows, columns, dim, h, w).permute(0, 3, 1, 4, 2, 5).reshape(batch, dim, height, width)


def measure(
    shapes: Sequence[tuple[int, int, int, int]] = SHAPES,
    batches: Sequence[int] = (1, 8),
    rounds: int = 15,
    dense: bool = True,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Interleaved runs, forward and forward with backward.

    Args:
        shapes: (width, heads, side of a cell, side of the map).
        batches: batch sizes.
        rounds: measurements per contender.
        dense: time dense attention to all tokens, too, of single maps.
        progress: told what is being measured.

    Returns:
        Settings, machine and a record per shape and batch; ``*_speedup`` is how many times as long the other takes, by
        minima.

    >>> measure([(8, 1, 2, 4)], [1], rounds=1, dense=False)["records"][0]["shape"]
    [1, 4, 4, 8]
    """
    torch.manual_seed(0)
    records = []
    for dim, heads, cell, side in shapes:
        ours = SuperTokenAttention(dim, heads, cell)
        plain = SoftmaxAttention(dim, heads)
        for batch in batches:
            x = torch.randn(batch, side, side, dim)
            first = x.permute(0, 3, 1, 2).contiguous()
            runs: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
                "ours": (ours, x), "convolutions": (partial(by_convolutions, ours), first),
            }  # fmt: skip
            if dense and batch == 1:
                runs["dense"] = (plain, x.flatten(1, 2))
            jobs = {}
            for name, (run, given) in runs.items():
                leaf = given.clone().requires_grad_()
                module = plain if name == "dense" else ours
                jobs[name, "forward"] = partial(_forward, run, given)
                jobs[name, "both"] = partial(_both, run, [leaf, *module.parameters()])
            times = interleave(jobs, rounds, "cpu", progress)
            record: dict[str, Any] = {"shape": [batch, side, side, dim], "heads": heads, "stoken_size": cell}
            for what in ("forward", "both"):
                record[f"{what}_seconds"] = times["ours", what].minimum
                for name in list(runs)[1:]:
                    speedup = ratio(times[name, what], times["ours", what])["ratio_of_minima"]
                    record[f"{what}_speedup_over_{name}"] = speedup
            records.append(record)
    settings = {"dtype": "float32", "rounds": rounds, "clock": "cpu"}
    return {"what": "super token attention", "settings": settings, "machine": machine(), "records": records}


@torch.no_grad()
def _forward(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    run(x)


def _both(run: Callable[[Tensor], Tensor], leaves: list[Tensor]) -> None:
    torch.autograd.grad(run(leaves[0]).sum(), leaves)
