"""Global context: one attended mean of a whole map, added to every place of it.

Cao et al., 2019, "GCNet", arXiv 1904.11492. With ``a = softmax_n(w . x_n)`` over all places n,

    ``c = sum_n a_n x_n``,  ``y_n = x_n + W_2 relu(norm(W_1 c))``.

W_2 starts as zeros, so that the block starts as the identity. Instead of this, or before it, every place may be
multiplied by a gate, ``x_n * sigmoid(W_2' relu(norm(W_1' c)))``; c may be the plain mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...checks import check_choice, check_int, check_valid, describe
from ...types import stats_dtype
from ..layers import masked_mean, zero_invalid
from ..released import Released, Rule


class GlobalContext(nn.Module):
    """``x + W_2 relu(LayerNorm(W_1 c))`` with c the attended mean, on (B, *grid, dim).

    Args:
        dim: channels.
        hidden: of the middle layer; ``dim // 16`` by default, at least 4, as a norm of one number is a constant.
        pool: ``"attention"``, or ``"mean"`` over all places.
        fusion: of ``"multiply"`` and ``"add"``: what the context does to every place, in this order.

    >>> x = torch.randn(2, 4, 5, 32)
    >>> GlobalContext(32)(x).equal(x)
    True
    """

    def __init__(self, dim: int, hidden: int | None = None, pool: str = "attention", fusion: Sequence[str] = ("add",)):
        super().__init__()
        self.dim = check_int("dim", dim, least=1)
        hidden = max(4, dim // 16) if hidden is None else check_int("hidden", hidden, least=1)
        check_choice("pool", pool, ("attention", "mean"))
        if isinstance(fusion, str) or not fusion:
            raise ValueError(f"fusion must be a sequence of 'multiply' and 'add', one at least, got {fusion!r}")
        for i, way in enumerate(fusion):
            check_choice(f"fusion[{i}]", way, ("multiply", "add"))
        self.score = nn.Linear(dim, 1) if pool == "attention" else None
        self.change = self._change(dim, hidden) if "add" in fusion else None
        self.gate = self._change(dim, hidden) if "multiply" in fusion else None
        if self.score is not None:
            nn.init.kaiming_normal_(self.score.weight, mode="fan_in", nonlinearity="relu")
            nn.init.zeros_(self.score.bias)

    @staticmethod
    def _change(dim: int, hidden: int) -> nn.Sequential:
        last = nn.Linear(hidden, dim)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        return nn.Sequential(nn.Linear(dim, hidden), nn.LayerNorm(hidden), nn.ReLU(), last)

    def context(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """c (B, dim); zeros where nothing exists."""
        if not isinstance(x, Tensor) or x.dim() < 3 or x.shape[-1] != self.dim or not x.is_floating_point():
            raise ValueError(f"x must be a map (B, *grid, {self.dim}) of floating point, got {describe(x)}")
        check_valid("valid", valid, x.shape[:-1])
        x = zero_invalid(x, valid).flatten(1, -2)
        if self.score is None:
            return masked_mean(x, None if valid is None else valid.flatten(1))
        score = self.score(x).squeeze(-1).to(stats_dtype(x.dtype))
        if valid is not None:
            exists = valid.flatten(1)
            score = score.masked_fill(~exists, torch.finfo(score.dtype).min)
            share = score.softmax(1) * exists
        else:
            share = score.softmax(1)
        return (share.to(x.dtype).unsqueeze(1) @ x).squeeze(1)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, *grid, dim) -> the same; places outside ``valid`` are zeros."""
        c = self.context(x, valid).view(len(x), *[1] * (x.dim() - 2), self.dim)
        if self.gate is not None:
            x = x * self.gate(c).sigmoid()
        return zero_invalid(x if self.change is None else x + self.change(c), valid)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From mmdetection's ``ContextBlock``."""
        theirs = Released(state_dict, "mmdetection's ContextBlock")

        def flat(name: str) -> Rule:
            def found(match: object, value: Tensor) -> dict[str, Tensor]:
                at = match.expand(name)  # type: ignore[attr-defined]
                return {
                    at: value.flatten() if at.split(".")[-2] == "1" else value.flatten(1) if value.dim() > 1 else value
                }

            return found

        rules: dict[str, Rule] = {
            r"conv_mask\.(weight|bias)": flat(r"score.\1"),
            r"channel_add_conv\.([013])\.(weight|bias)": flat(r"change.\1.\2"),
            r"channel_mul_conv\.([013])\.(weight|bias)": flat(r"gate.\1.\2"),
        }
        return theirs.close(theirs.renamed(rules))


__all__ = ["GlobalContext"]
