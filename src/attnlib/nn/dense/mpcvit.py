"""MPCViT: heads without exponentials, each ReLU attention or plain products, and MLPs whose GELU can be let go.

Zeng et al., 2022, "MPCViT: Searching for Accurate and Efficient MPC-Friendly Vision Transformer with Heterogeneous
Attention", arXiv 2211.13955. Where several parties compute on shared secrets, exponentials, divisions and comparisons
are what costs. With scores ``s = q k^T / sqrt(D)`` a head mixes

    ReLU-softmax:  relu(s) / (sum_j relu(s)_j + eps),      scaling:  s / N,

    a = alpha_h ReLU-softmax + (1 - alpha_h) scaling,  alpha_h in [0, 1],

(or one alpha for a layer, or one for every query, which are comments in the release), where the second is
``q (k^T v) / (N sqrt(D))``, linear in N. A search learns alpha under a cost (``losses``), then
:func:`choose_heads` makes exactly ``round(mu heads)`` of them 1 and all others 0, and ``deployed()`` computes only what
is left of each.

Differs from the authors' code: mixtures are what the paper says, where the released loop leaves the scores of heads as
they are whose alpha is neither 0 nor 1; N counts the keys that exist; scaling is computed in its linear form wherever
no dropout of weights asks for the map.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_int, check_real
from ...normalizers import Relu
from ...ops import attention
from ...types import Output, Traits
from ..base import Mechanism
from ..layers import flat_valid, head_dim_of, merge_heads, split_heads, through, zero_invalid
from ..registry import register
from ..released import Released, Rule

#: Whom one alpha serves.
PER = ("head", "layer", "row")


@register("mpcvit", "mpc-attention")
class MPCAttention(Mechanism):
    """Heads between ReLU-softmax and scaling attention.

    Args:
        dim: width of ``x``.
        num_heads: heads; must divide ``dim``.
        alpha: shares of ReLU-softmax at the start.
        per: ``"head"``: one alpha for every head; ``"layer"``: one for all; ``"row"``: one for every query, whatever
            the head.
        tokens: of every sequence, for ``"row"``.
        qkv_bias: bias of the query, key and value projections.
        scale: of the scores; ``head_dim ** -0.5`` by default.
        eps: added to the sums of ReLU-softmax.
        attn_drop: dropout of attention weights in training; the authors' default is 0.1.
        proj_drop: dropout of the output in training.

    Reference: Zeng et al., 2022, arXiv 2211.13955, sections 4.1 and 4.2.

    >>> MPCAttention(dim=16, num_heads=4)(torch.randn(2, 9, 16)).shape
    torch.Size([2, 9, 16])
    """

    class_traits = Traits(
        grid_ranks=frozenset({1, 2, 3}), layout=True, work={"N": 2}, memory={"N": 1}, permutation_equivariant=True,
        losses=("cost",),
    )  # fmt: skip

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        alpha: float = 1.0,
        per: str = "head",
        qkv_bias: bool = False,
        scale: float | None = None,
        eps: float = 1e-5,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        tokens: int | None = None,
    ):
        super().__init__(dim)
        check_choice("per", per, PER)
        if (tokens is not None) != (per == "row"):
            raise ValueError(f"tokens={tokens} with per={per!r}: alphas of queries need their number, others none")
        self.per, self.tokens = per, None if tokens is None else check_int("tokens", tokens, least=1)
        self.num_heads, self.head_dim = num_heads, head_dim_of(dim, num_heads)
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.eps, self.attn_drop = eps, attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        start = check_real("alpha", alpha, least=0, most=1)
        count = {"head": num_heads, "layer": 1, "row": self.tokens}[per]
        self.alpha = nn.Parameter(torch.full((count or 1,), float(start)))
        #: Heads, or queries, of either kind once alpha is decided, see :meth:`deployed`.
        self.kinds: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def traits(self) -> Traits:
        if self.per == "row":
            return self.class_traits.but(permutation_equivariant=False, resolution_free=False)
        return self.class_traits

    def shares(self) -> Tensor:
        """(heads,) shares of ReLU-softmax; (tokens,) of queries where these have their own."""
        return self.alpha if self.per == "row" else self.alpha.expand(self.num_heads)

    def _mixing(self) -> Tensor:
        """The same, to multiply (B, H, N, ..)."""
        return self.alpha[:, None] if self.per == "row" else self.shares()[:, None, None]

    def relu_part(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """(B, H, N, D) of ReLU-softmax: sums over keys of values and of ones, divided."""
        both = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        made = attention(q, k, both, valid=valid, scale=self.scale, normalizer=Relu(1.0))
        return made[..., :-1] / (made[..., -1:] + self.eps)

    def scaled_part(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """(B, H, N, D) of scaling attention, in its linear form."""
        if valid is None:
            return q @ ((k.transpose(-2, -1) @ v) * (self.scale / max(1, k.shape[2])))
        count = valid.sum(1).clamp(min=1)[:, None, None, None].to(q.dtype)
        k = k.masked_fill(~valid[:, None, :, None], 0.0)
        return q @ ((k.transpose(-2, -1) @ v) * (self.scale / count))

    def _maps(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """(B, H, N, D) by the whole map, whose weights are dropped in training."""
        scores = q @ k.transpose(-2, -1) * self.scale
        count: Any = k.shape[2]
        if valid is not None:
            scores = scores.masked_fill(~valid[:, None, None], 0.0)
            count = valid.sum(1).clamp(min=1)[:, None, None, None]
        positive = scores.relu()
        share = self._mixing()
        weights = share * positive / (positive.sum(-1, keepdim=True) + self.eps) + (1 - share) * scores / count
        return F.dropout(weights, self.attn_drop) @ v

    def mix(  # type: ignore[override]
        self, x: Tensor, *, layout: Any = None, valid: Tensor | None = None, returns: tuple[str, ...] = ()
    ) -> Output:
        flat, exists = x.flatten(1, -2), flat_valid(valid)
        if self.tokens not in (None, flat.shape[1]):
            raise ValueError(f"x must hold {self.tokens} tokens, one for each alpha, got {flat.shape[1]}")
        q, k, v = (split_heads(t, self.num_heads) for t in self.qkv(flat).chunk(3, -1))
        v = (
            v
            if exists is None
            else zero_invalid(v.transpose(1, 2).flatten(2), exists).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        )
        if self.kinds is not None:
            out = self._decided(q, k, v, exists)
        elif self.training and self.attn_drop:
            out = self._maps(q, k, v, exists)
        else:
            share = self._mixing()
            out = share * self.relu_part(q, k, v, exists) + (1 - share) * self.scaled_part(q, k, v, exists)
        y = through(self.proj_drop, self.proj(merge_heads(out))).reshape(x.shape)
        # As many heads as are paid for, whomever an alpha serves.
        cost = self.shares().mean() * self.num_heads if self.per == "row" else self.shares().sum()
        return Output(y, losses={"cost": cost} if "losses" in returns else None)

    def _decided(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """(B, H, N, D), of every head or query its own kind only."""
        assert self.kinds is not None
        axis, made = 2 if self.per == "row" else 1, []
        for chosen, part in zip(self.kinds, (self.relu_part, self.scaled_part), strict=True):
            if chosen:
                at = torch.tensor(chosen, device=q.device)
                keys = (k, v) if axis == 2 else (k.index_select(1, at), v.index_select(1, at))
                made.append(part(q.index_select(axis, at), *keys, valid))
        order = torch.tensor([*self.kinds[0], *self.kinds[1]], device=q.device)
        return torch.cat(made, axis).index_select(axis, order.argsort())

    @torch.no_grad()
    def deployed(self) -> nn.Module:
        """The same where every alpha is 0 or 1: heads, or queries, compute their own kind only; otherwise itself."""
        shares = self.shares().tolist()
        if self.kinds is not None or any(s not in (0.0, 1.0) for s in shares):
            return self
        out = copy.deepcopy(self).eval()
        out.kinds = (
            tuple(h for h, s in enumerate(shares) if s == 1), tuple(h for h, s in enumerate(shares) if s == 0)
        )  # fmt: skip
        return out

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``Attention``: ``qkv.weight``, ``proj.*``, ``alpha`` (1, heads, 1, 1) or (1, 1, N, 1)."""
        theirs = Released(state_dict, "MPCViT's Attention")
        rules: dict[str, Rule] = {
            r"(qkv|proj)\.(weight|bias)": r"\1.\2",
            r"alpha": lambda match, value: {"alpha": value.flatten()},
        }
        return theirs.close(theirs.renamed(rules))


class MPCMlp(nn.Module):
    """An MLP whose GELU is kept for some tokens and let go for others, which get a ReLU behind the second map.

    ``z = W1 x``, ``y = W2 (beta GELU(z) + (1 - beta) z)``, and with ``relu`` ``beta y + (1 - beta) ReLU(y)``.

    Args:
        dim: width of ``x``.
        hidden: hidden width.
        tokens: of a sequence, one beta each; 0 for a plain MLP.
        relu: the ReLU behind the second map, for tokens without GELU.
        drop: dropout in training, of the hidden layer and of the output.
        learned: whether beta is trained; the authors' class keeps it as it is.

    >>> MPCMlp(8, 16, tokens=5)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    gated = False

    def __init__(
        self, dim: int, hidden: int, tokens: int = 0, relu: bool = True, drop: float = 0.0, learned: bool = False
    ):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.tokens, self.relu = check_int("tokens", tokens, least=0), relu
        self.beta = nn.Parameter(torch.ones(1, tokens, 1), requires_grad=learned) if tokens else None
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, N, dim) -> the same; ``ValueError`` for another number of tokens than there are betas."""
        z = self.fc1(x)
        if self.beta is None:
            return self.drop(self.fc2(self.drop(F.gelu(z))))
        if x.shape[-2] != self.tokens:
            raise ValueError(f"x must hold {self.tokens} tokens, one for each gate of the GELU, got {x.shape[-2]}")
        beta = self.beta.clamp(0, 1)
        y = self.fc2(self.drop(beta * F.gelu(z) + (1 - beta) * z))
        return self.drop(beta * y + (1 - beta) * y.relu() if self.relu else y)


@torch.no_grad()
def clamp_shares(model: nn.Module) -> None:
    """Take every alpha of a model back into [0, 1]; after every step of a search."""
    for m in model.modules():
        if isinstance(m, MPCAttention):
            m.alpha.clamp_(0, 1)


@torch.no_grad()
def choose_heads(model: nn.Module, share: float) -> dict[str, list[int]]:
    """Decide every alpha of a model: exactly ``round(share * heads)`` of all become 1, the largest ones, the rest 0.

    With ``per="row"`` queries are chosen instead of heads.

    Returns:
        Per mechanism, by its path, the heads (or queries) that stay ReLU-softmax.

    Raises:
        ValueError: a model without such heads, or with one alpha for a layer; a share outside [0, 1].
    """
    check_real("share", share, least=0, most=1)
    found = {name: m for name, m in model.named_modules() if isinstance(m, MPCAttention)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no heads between ReLU-softmax and scaling attention")
    if any(m.per == "layer" for m in found.values()):
        raise ValueError("choose_heads needs one alpha for every head, per='head', or every query, per='row'")
    ranked = torch.cat([m.alpha for m in found.values()]).argsort(descending=True, stable=True)
    kept = set(ranked[: round(share * len(ranked))].tolist())
    out, at = {}, 0
    for name, m in found.items():
        count = m.alpha.numel()
        out[name] = [i for i in range(count) if at + i in kept]
        m.alpha.copy_(torch.tensor([float(at + i in kept) for i in range(count)]))
        at += count
    return out


def head_operations(kind: str, n: int, head_dim: int) -> dict[str, int]:
    """What one head computes of n tokens beyond its projections: products and what secure computation pays for.

    Args:
        kind: ``"softmax"``, ``"relu"`` or ``"scaling"``.
        n: tokens.
        head_dim: width of the head.

    >>> head_operations("scaling", 65, 64)["exp"], head_operations("softmax", 65, 64)["exp"]
    (0, 4225)
    """
    check_choice("kind", kind, ("softmax", "relu", "scaling"))
    pairs = n * n
    if kind == "scaling":
        return {"products": 2 * n * head_dim**2, "exp": 0, "div": 0, "max": 0, "compare": 0}
    dense = {"products": 2 * pairs * head_dim, "div": n}
    if kind == "relu":
        return {**dense, "exp": 0, "max": 0, "compare": pairs}
    return {**dense, "exp": pairs, "max": n * (n - 1), "compare": 0}


def token_distillation(
    logits: Tensor, tokens: Tensor, teacher_logits: Tensor, teacher_tokens: Tensor, weight: float = 0.5
) -> Tensor:
    """Cross entropy with the teacher's classes, and ``weight`` times the mean square between last tokens.

    Args:
        logits, teacher_logits: (B, classes).
        tokens, teacher_tokens: (B, N, C) behind the last norm; the student's last ones count where it has more.
        weight: of the second term.
    """
    soft = -(teacher_logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    return soft + weight * F.mse_loss(tokens[:, -teacher_tokens.shape[1] :], teacher_tokens)
