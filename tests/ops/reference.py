"""Attention written a second time, with loops over pairs, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from attnlib import masks as M
from attnlib import positions as P
from attnlib.grids import Layout, coordinates


def naive_softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """(B, Hq, N, Dv), one row at a time."""
    batch, heads, n, d = q.shape
    out = torch.zeros(batch, heads, n, v.shape[3], dtype=q.dtype)
    scale = d**-0.5 if scale is None else scale
    for b in range(batch):
        for h in range(heads):
            keys, values = k[b, h * k.shape[1] // heads], v[b, h * v.shape[1] // heads]
            for i in range(n):
                seen = torch.arange(k.shape[2]) if allowed is None else allowed[b, h, i].nonzero().flatten()
                if len(seen) == 0:
                    continue
                scores = keys[seen] @ q[b, h, i] * scale
                if bias is not None:
                    scores = scores + bias[b, h, i, seen]
                e = (scores - scores.max()).exp()
                out[b, h, i] = (e / e.sum()) @ values[seen]
    return out


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def qkv(
    batch: int = 2, heads: tuple[int, int, int] = (4, 4, 4), n: int = 24, m: int = 24, d: int = 8, dv: int = 8,
    dtype: torch.dtype = torch.float64, seed: int = 0, grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Random q, k, v that want gradients."""
    g = generator(seed)
    shapes = ((heads[0], n, d), (heads[1], m, d), (heads[2], m, dv))
    return tuple(torch.randn(batch, *s, dtype=dtype, generator=g).requires_grad_(grad) for s in shapes)  # type: ignore


def mask_cases(n: int = 24, batch: int = 2, heads: int = 4) -> dict[str, M.Mask]:
    """Masks of every kind, some with rows that see nothing. ``n`` is a multiple of 12."""
    g = generator(1)
    ids = torch.sort(torch.randint(0, 4, (batch, n), generator=g)).values
    rule = [[True, False], [True, True]]
    explicit = torch.rand(batch, heads, n, n, generator=g) > 0.6
    explicit[0, 1, : n // 2] = False
    grid = (4, n // 4)
    return {
        "causal": M.causal(),
        "window": M.sliding_window(7),
        "recent": M.recent(5),
        "terraced": M.terraced(6),
        "prefix": M.prefix_lm(torch.tensor([3, n // 2])),
        "documents": M.documents(ids),
        "strided": M.strided(4, local=2, per_head=1, num_heads=heads),
        "neighborhood": M.neighborhood(grid, 3, (1, 2), 1, (True, False)),
        "circle": M.circular_window(grid, 2.0),
        "modality": M.modality((torch.arange(n) > n // 3).long(), rule),
        "explicit": M.explicit(explicit),
        "blocks": M.blocks(torch.rand(4, n // 12, generator=g) > 0.5, n // 4, 12),
        "on_segment": M.on_segment(Layout((("a", 4), ("b", n - 8), ("c", 4))), "b", M.recent(3)),
        "some_empty_rows": M.causal() & ~M.sliding_window(n),
        "nothing": ~M.Everything(),
        "everything": M.Everything(),
    }


def bias_cases(n: int = 24, m: int = 24, batch: int = 2, heads: int = 4, dtype: torch.dtype = torch.float64) -> dict:
    """Biases of every form, as functions of nothing that make leaf tensors and the bias on them."""
    g = generator(2)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, generator=g).requires_grad_()

    q_coords, k_coords = coordinates((4, n // 4)), coordinates((2, m // 2))

    def relative() -> tuple[P.Bias, list[Tensor]]:
        table = leaf(heads, 5 * 9)
        return P.RelativeBias(table, q_coords, k_coords, (2, 4), (5, 9)), [table]

    def axis() -> tuple[P.Bias, list[Tensor]]:
        factors = [leaf(batch, heads, n, 2), leaf(1, heads, n, m // 2)]
        return P.AxisBias(factors), factors

    def dense(*shape: int):
        def make() -> tuple[P.Bias, list[Tensor]]:
            tensor = leaf(*shape)
            return P.DenseBias(tensor), [tensor]

        return make

    return {
        "dense": dense(n, m),
        "dense_heads": dense(heads, n, m),
        "dense_batch": dense(batch, 1, n, m),
        "relative": relative,
        "axis": axis,
    }


def gradients(out: Tensor, wrt: list[Tensor], seed: int = 9) -> list[Tensor]:
    """Gradients of a random projection of ``out``."""
    grad = torch.randn(out.shape, dtype=out.dtype, generator=generator(seed))
    return list(torch.autograd.grad(out, wrt, grad))
