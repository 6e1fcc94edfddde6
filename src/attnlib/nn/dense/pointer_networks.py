"""Pointer attention: additive scores whose softmax over the inputs is the answer (Vinyals et al., 2015)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ... import masks
from ...types import Output, Traits, check_rank, check_width, stats_dtype
from ..base import Mechanism
from ..registry import register
from ..released import Released, Rule


@register("pointer-networks", "pointer-attention", "additive-attention")
class PointerAttention(Mechanism):
    """``u_ij = v^T tanh(W_1 e_j + W_2 d_i)``, ``P(C_i = j) = softmax_j(u_ij)``.

    In a pointer network the distribution over the inputs ``e_j`` is the output: :meth:`log_probs`. As a mechanism it
    blends what it points to, ``y_i = sum_j P(C_i = j) e_j`` (the paper's baseline, Bahdanau's attention), and gives the
    distribution as weights. No parameter depends on the number of inputs.

    Args:
        dim: width of the readers ``d`` (B, N, dim) and of what they read, ``e`` (B, M, dim).
        hidden: width of the sum inside tanh; ``dim`` by default.
        glimpse: as a much used implementation has it (shirgur/PointerNet): both projections have biases, ``v`` starts
            within 1 of zero, and what is blended is ``W_1 e + b``, which needs ``hidden == dim``.

    Reference: Vinyals, Fortunato, Jaitly, 2015, arXiv 1506.03134, equations 3 and 4. No code was released.

    >>> m = PointerAttention(dim=8)
    >>> m.log_probs(torch.randn(2, 3, 8), torch.randn(2, 5, 8)).exp().sum(-1).shape
    torch.Size([2, 3])
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self", "noncausal-cross"}),
        mask=True,
        work={"N": 2},
        memory={"N": 2},
        permutation_equivariant=True,
        weights=True,
    )

    def __init__(self, dim: int, hidden: int | None = None, glimpse: bool = False):
        super().__init__(dim)
        self.hidden = dim if hidden is None else hidden
        if self.hidden < 1:
            raise ValueError(f"hidden={hidden} must be at least 1")
        if glimpse and self.hidden != dim:
            raise ValueError(f"glimpse=True blends {self.hidden} channels, so hidden must be dim={dim}")
        self.glimpse = glimpse
        self.w1 = nn.Linear(dim, self.hidden, bias=glimpse)
        self.w2 = nn.Linear(dim, self.hidden, bias=glimpse)
        self.v = nn.Linear(self.hidden, 1, bias=False)
        if glimpse:
            nn.init.uniform_(self.v.weight, -1, 1)

    def scores(self, d: Tensor, keys: Tensor) -> Tensor:
        """(B, N, M) scores of readers ``d`` (B, N, dim) for ``keys = w1(e)`` (B, M, hidden)."""
        return self.v(torch.tanh(keys[:, None] + self.w2(d)[:, :, None])).squeeze(-1)

    def log_probs(self, d: Tensor, e: Tensor, allowed: Tensor | None = None, *, projected: bool = False) -> Tensor:
        """(B, N, M) logarithms of the pointer distribution.

        Args:
            d: (B, N, dim) readers.
            e: (B, M, dim) what is pointed to; ``w1(e)`` when ``projected``, to compute it once.
            allowed: boolean, broadcast to (B, N, M): where a reader may point.

        Raises:
            ValueError: a reader that may point nowhere has no distribution.
        """
        check_rank("d", d, 3, "(B, N, dim)")
        check_rank("e", e, 3, "(B, M, dim)")
        check_width("d", d, self.dim)
        check_width("e", e, self.hidden if projected else self.dim, "hidden" if projected else "dim")
        u = self.scores(d, e if projected else self.w1(e))
        if allowed is not None:
            if not bool(allowed.any(-1).all()):
                raise ValueError("allowed leaves a reader nothing to point at")
            u = u.masked_fill(~allowed, float("-inf"))
        return u.to(stats_dtype(u.dtype)).log_softmax(-1)

    def mix(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        valid: Tensor | None = None,
        context_valid: Tensor | None = None,
        mask: masks.Mask | None = None,
    ) -> Output:
        source, exists = (x, valid) if context is None else (context, context_valid)
        keys = self.w1(source)
        u = self.scores(x, keys)
        u = u.to(stats_dtype(u.dtype))
        allowed = None if exists is None else exists[:, None, :]
        if mask is not None:
            pairs = mask.dense(u.shape[1], u.shape[2], u.device)
            if pairs.dim() == 4:
                if pairs.shape[1] > 1:
                    raise ValueError(f"mask distinguishes {pairs.shape[1]} heads, but pointers have one")
                pairs = pairs[:, 0]
            allowed = pairs if allowed is None else pairs & allowed
        if allowed is None:
            weights = u.softmax(-1)
        else:
            seen = allowed.any(-1, keepdim=True)
            u = u.masked_fill(~(allowed | ~seen), float("-inf"))  # a row that may read nothing reads all, and is zeroed
            weights = u.softmax(-1) * seen
        read = keys if self.glimpse else source
        y = (weights.to(read.dtype) @ read).to(x.dtype)
        return Output(y, weights=weights.unsqueeze(1))

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From ``Attention`` of shirgur/PointerNet, for ``glimpse=True``."""
        theirs = Released(state_dict, "Attention of shirgur/PointerNet")
        theirs.leave(r"_inf", because="the number that hides a key")
        rules: dict[str, Rule] = {
            r"context_linear\.weight": lambda match, value: {"w1.weight": value.flatten(1)},
            r"context_linear\.bias": "w1.bias",
            r"input_linear\.(weight|bias)": r"w2.\1",
            r"V": lambda match, value: {"v.weight": value[None]},
        }
        return theirs.close(theirs.renamed(rules))
