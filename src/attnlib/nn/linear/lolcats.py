"""LoLCATs (Zhang et al., 2024): softmax over a short window and linear attention before it, one denominator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import masks
from ...ops import attention
from ...ops._call import expand_heads
from ...ops.linear import linear_partial
from ...positions import rotary_angles, rotate
from ...types import Output, Partial, State, Traits, check_divides, stats_dtype
from ..base import Mechanism
from ..layers import flat_valid, head_dim_of, merge_heads, split_heads
from ..registry import register
from ..released import Released, Rule
from .feature_maps import HedgehogFeatures


def window_part(q: Tensor, k: Tensor, v: Tensor, exists: Tensor, consistent: bool) -> Partial:
    """Softmax attention of each query to itself and the ``W - 1`` keys before it, as a part.

    Args:
        q: (B, H, n, D) scaled queries.
        k: (B, H, W + n, D) keys; query ``j`` stands at key ``W + j`` and reads keys ``j + 1`` to ``j + W``.
        v: (B, H, W + n, Dv) values.
        exists: (B, W + n) which keys exist.
        consistent: give the logarithm of the scale, so that a linear part is in the same units; otherwise the weights
            are ``exp(score - largest score of the window)`` as they stand.
    """
    n, window = q.shape[2], k.shape[2] - q.shape[2]
    # Blocks of queries, each with the keys its window reaches: blocks longer than the window would waste products.
    block = max(min(n, max(window, 16), 128), 1)
    count = max(-(-n // block), 1)
    pad = count * block - n
    reach = torch.arange(block + window, device=q.device) - torch.arange(block, device=q.device)[:, None]
    near = (reach >= 1) & (reach <= window)
    q = F.pad(q, (0, 0, 0, pad)).unflatten(2, (count, block))
    k, v = (F.pad(t, (0, 0, 0, pad)).unfold(2, block + window, block) for t in (k, v))  # (B, H, T, D, block + W)
    seen = F.pad(exists, (0, pad)).unfold(1, block + window, block)  # (B, T, block + W)
    allowed = near & seen[:, None, :, None, :]
    scores = (q @ k).masked_fill(~allowed, float("-inf"))
    # A row without keys has no largest score; any finite number will do.
    top = scores.amax(-1, keepdim=True)
    top = torch.where(allowed.any(-1, keepdim=True), top, torch.zeros_like(top))
    e = torch.exp(scores - top)
    scale = top if consistent else torch.zeros_like(top)
    parts = (scale.squeeze(-1), e.sum(-1), e @ v.transpose(-2, -1))
    return Partial(*(t.flatten(2, 3)[:, :, :n] for t in parts))


@register("lolcats", "lolcats-attention")
class LoLCATs(Mechanism):
    """Causal attention that a pretrained softmax layer can be turned into: a softmax window and Hedgehog features.

    ``y_i = (gamma sum_win e_ij v_j + beta sum_old l_ij v_j) / (gamma sum_win e_ij + beta sum_old l_ij)`` with
    ``e_ij = exp(q_i . k_j / sqrt(D) - m_i)`` for the last ``window_size`` keys, ``m_i`` the largest score among them,
    and ``l_ij = phi_q(q_i) . phi_k(k_j)`` for all older ones. ``gamma = sigmoid(g_h)`` is learned, ``beta`` is 1.

    ``m_i`` scales the window but not the linear part, so that their balance depends on it, as in the authors' code;
    ``consistent=True`` weighs both in the same units instead (another function, with the same special cases).

    With ``attention_transfer`` on, the layer gives plain softmax attention, so that hidden states follow the teacher,
    and returns the losses of its own attention against it: ``transfer_mse`` between head outputs before the output
    projection (the authors multiply it by 1000) and ``transfer_xent`` between maps. They reach the feature maps and
    ``g`` only: queries, keys and values enter detached. The teacher is quadratic.

    Decoding keeps the last ``window_size`` keys and values and, for all older ones, a state that does not grow.

    Differs from the authors' code: cost linear in N in training too (theirs builds the whole map); padding (windows
    and positions count the tokens that exist); states in float32; the "sliding" window only, not the "terraced" one; a
    rotary base only, without the scaling rules of Llama 3.1.

    Args:
        dim: width of ``x``.
        num_heads: query heads.
        num_kv_heads: key/value heads; must divide ``num_heads``. Defaults to ``num_heads``.
        head_dim: width D of a head; ``dim / num_heads`` by default.
        window_size: keys under softmax, the query's own included; 0 leaves linear attention alone.
        feature_dim: columns of each feature matrix; ``head_dim`` by default.
        features: how features are made, see :class:`attnlib.nn.linear.feature_maps.HedgehogFeatures`.
        rotary: base of the rotary positions that queries and keys have before the maps; ``None`` for none.
        window_factor: start of ``g``; -2.1972 makes ``gamma`` 0.1.
        affine: ``beta = 1 - gamma`` instead of 1.
        consistent: weigh window and linear part in the same units.
        attention_transfer: start as its own teacher, see above; the attribute of that name turns it on and off.
        qkv_bias: biases of the query, key and value projections.
        proj_bias: bias of the output projection.
        chunk: tokens per chunk of the linear part; changes speed, not the result.
        causal: must be True.

    Reference: Zhang et al., 2024, arXiv 2410.10254, equations 5 to 7.

    >>> import torch
    >>> LoLCATs(dim=16, num_heads=4, window_size=4)(torch.randn(2, 9, 16)).shape
    torch.Size([2, 9, 16])
    """

    class_traits = Traits(
        patterns=frozenset({"causal-self"}),
        grid_ranks=frozenset({1}),
        streaming=True,
        work={"N": 2},
        memory={"N": 2},
        losses=("transfer_mse", "transfer_xent"),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        window_size: int = 64,
        feature_dim: int | None = None,
        features: str = "softmax",
        rotary: float | None = 10000.0,
        window_factor: float = -2.1972245773362196,
        affine: bool = False,
        consistent: bool = False,
        attention_transfer: bool = False,
        qkv_bias: bool = False,
        proj_bias: bool = False,
        chunk: int = 128,
        causal: bool = True,
    ):
        super().__init__(dim)
        if not causal:
            raise ValueError("causal=False is not possible: its window looks back; pass causal=True")
        if window_size < 0:
            raise ValueError(f"window_size must be at least 0, got {window_size}")
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_divides("num_kv_heads", self.num_kv_heads, "num_heads", num_heads)
        self.head_dim = head_dim_of(dim, num_heads) if head_dim is None else head_dim
        self.window_size, self.rotary, self.affine, self.consistent = window_size, rotary, affine, consistent
        self.attention_transfer, self.chunk, self.scale = attention_transfer, chunk, self.head_dim**-0.5
        self.q = nn.Linear(dim, num_heads * self.head_dim, bias=qkv_bias)
        self.k = nn.Linear(dim, self.num_kv_heads * self.head_dim, bias=qkv_bias)
        self.v = nn.Linear(dim, self.num_kv_heads * self.head_dim, bias=qkv_bias)
        self.proj = nn.Linear(num_heads * self.head_dim, dim, bias=proj_bias)
        self.phi_q = HedgehogFeatures(num_heads, self.head_dim, feature_dim, features)
        self.phi_k = HedgehogFeatures(num_heads, self.head_dim, feature_dim, features)
        self.window_factor = nn.Parameter(torch.full((num_heads,), float(window_factor)))

    @property
    def traits(self) -> Traits:
        if self.attention_transfer:
            return self.class_traits.but(streaming=False)
        return self.class_traits.but(work={"N": 1}, memory={"N": 1}, losses=())

    def feature_parameters(self) -> list[nn.Parameter]:
        """What attention transfer trains; everything else stays as it is."""
        return [*self.phi_q.parameters(), *self.phi_k.parameters(), self.window_factor]

    # ---- the hybrid, on sequences whose tokens all come first

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Logarithms of gamma and beta, (1, H, 1) each."""
        g = self.window_factor.to(dtype).view(1, -1, 1)
        return F.logsigmoid(g), F.logsigmoid(-g) if self.affine else torch.zeros_like(g)

    def _hybrid(self, q: Tensor, k: Tensor, v: Tensor, exists: Tensor, state: State | None) -> tuple[Tensor, State]:
        """(B, H, n, D) outputs and the state of the linear part.

        ``k`` and ``v`` begin with the ``window_size`` tokens before the first query; ``exists`` says which there are.
        """
        n, window = q.shape[2], self.window_size
        high = stats_dtype(q.dtype)
        k, v = expand_heads(k, self.num_heads), expand_heads(v, self.num_heads)
        log_gamma, log_beta = self._factors(high)
        # Each query moves the window on by one token: the key that falls out of it joins the linear part.
        old = exists[:, :n] & exists[:, window:]
        linear, final = linear_partial(
            self.phi_q(q), self.phi_k(k[:, :, :n]), v[:, :, :n], valid=old, state=state, chunk=self.chunk,
            return_state=True,
        )  # fmt: skip
        total = linear.shift(log_beta)
        if window:
            soft = window_part((q * self.scale).to(high), k.to(high), v.to(high), exists, self.consistent)
            total = soft.shift(log_gamma).merge(total)
        return total.finish().to(v.dtype), final

    def _map(self, q: Tensor, k: Tensor, exists: Tensor) -> Tensor:
        """(B, H, N, N) weights of the hybrid, for the loss between maps."""
        high = stats_dtype(q.dtype)
        n = q.shape[2]
        k = expand_heads(k, self.num_heads)
        age = torch.arange(n, device=q.device)[:, None] - torch.arange(n, device=q.device)
        near, old = (age >= 0) & (age < self.window_size), age >= self.window_size
        near, old = (m & exists[:, None, None, :] for m in (near, old))
        log_gamma, log_beta = (f.unsqueeze(-1) for f in self._factors(high))
        scores = (q.to(high) @ k.to(high).transpose(-2, -1) * self.scale).masked_fill(~near, float("-inf"))
        top = scores.amax(-1, keepdim=True)
        top = torch.where(torch.isinf(top), torch.zeros_like(top), top)
        soft = torch.exp(scores - top + log_gamma)
        linear = (self.phi_q(q) @ self.phi_k(k).transpose(-2, -1)).to(high) * torch.exp(log_beta)
        weights = soft + linear.masked_fill(~old, 0.0) * (torch.exp(-top) if self.consistent else 1.0)
        total = weights.sum(-1, keepdim=True)
        return weights / torch.where(total == 0, torch.ones_like(total), total)

    def _transfer(self, q: Tensor, k: Tensor, v: Tensor, exists: Tensor, wanted: bool) -> tuple[Tensor, dict | None]:
        """The teacher's (B, H, N, D) outputs and the losses of the hybrid against it."""
        call: dict[str, Any] = dict(mask=masks.causal(), valid=exists, scale=self.scale)
        if not wanted:
            return attention(q, k, v, **call), None
        truth, target = attention(q, k, v, return_weights=True, **call)
        q, k, v, truth_, target = (t.detach() for t in (q, k, v, truth, target))
        pad = (0, 0, self.window_size, 0)
        out, _ = self._hybrid(q, F.pad(k, pad), F.pad(v, pad), F.pad(exists, (self.window_size, 0)), None)
        rows = exists[:, None].expand(-1, self.num_heads, -1)
        entropy = -(target * self._map(q, k, exists).clamp(min=1e-12).log()).sum(-1)
        count = rows.sum().clamp(min=1)
        mse = (out - truth_).float().square().mean(-1)
        return truth, {
            "transfer_mse": mse.masked_fill(~rows, 0.0).sum() / count,
            "transfer_xent": entropy.masked_fill(~rows, 0.0).sum() / count,
        }

    def mix(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        valid: Tensor | None = None,
        state: State | None = None,
        returns: tuple[str, ...] = (),
    ) -> Output:
        batch, n, _c = x.shape
        window = self.window_size
        exists = flat_valid(valid)
        order = None
        if exists is not None:
            # Tokens that exist move to the front, so that windows are runs of tokens that exist.
            order = torch.argsort((~exists).to(torch.int8), dim=1, stable=True)
            x = torch.gather(x, 1, order[..., None].expand_as(x))
            x = x.masked_fill(~torch.gather(exists, 1, order)[..., None], 0.0)
        many = torch.full((batch,), n, device=x.device) if exists is None else exists.sum(1)
        q = split_heads(self.q(x), self.num_heads)
        k, v = split_heads(self.k(x), self.num_kv_heads), split_heads(self.v(x), self.num_kv_heads)
        past = torch.zeros_like(many) if state is None else state["tokens"]
        if self.rotary is not None:
            angles = rotary_angles(past[:, None] + torch.arange(n, device=x.device), self.head_dim, self.rotary)
            q, k = rotate(q, angles), rotate(k, angles)
        now = torch.arange(n, device=x.device) < many[:, None]
        if self.attention_transfer:
            out, losses = self._transfer(q, k, v, now, "losses" in returns)
            return Output(self._finish(out, order), losses=losses)
        if state is None:
            k, v = (F.pad(t, (0, 0, window, 0)) for t in (k, v))
        else:
            if tuple(state["k"].shape) != (batch, self.num_kv_heads, window, self.head_dim):
                raise ValueError(
                    f"state k must be {(batch, self.num_kv_heads, window, self.head_dim)}, "
                    f"got {tuple(state['k'].shape)}; it was made by another mechanism or for another batch"
                )
            k, v = torch.cat([state["k"].to(k.dtype), k], 2), torch.cat([state["v"].to(v.dtype), v], 2)
        before = torch.arange(window, device=x.device) >= window - past[:, None]
        out, final = self._hybrid(q, k, v, torch.cat([before, now], 1), state)
        new_state = None
        if "state" in returns:
            # The window of each sample ends at its own last token.
            keep = (many[:, None] + torch.arange(window, device=x.device))[:, None, :, None]
            k, v = (torch.gather(t, 2, keep.expand(-1, t.shape[1], -1, t.shape[3])) for t in (k, v))
            new_state = final.replace(k=k, v=v, tokens=past + many)
        return Output(self._finish(out, order), state=new_state)

    def _finish(self, out: Tensor, order: Tensor | None) -> Tensor:
        y = self.proj(merge_heads(out))
        if order is None:
            return y
        return torch.zeros_like(y).scatter(1, order[..., None].expand_as(y), y)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From ``LolcatsSlidingWindowAttention`` (``q_proj``, ``feature_map_q.mlp.layer``, ``window_factors``)."""
        theirs = Released(state_dict, "LolcatsSlidingWindowAttention")
        theirs.leave(r"rotary_emb\.inv_freq", because="a setting here: the rotary base")
        rules: dict[str, Rule] = {
            r"window_factors": lambda match, value: {"window_factor": value.flatten()},
            r"feature_map_([qk])\.mlp\.layer": r"phi_\1.weight",
            r"([qkv])_proj\.(weight|bias)": r"\1.\2",
            r"o_proj\.(weight|bias)": r"proj.\1",
        }
        return theirs.close(theirs.renamed(rules))
