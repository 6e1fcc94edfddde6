"""LoLCATs (Zhang et al., 2024): softmax over a short window and linear attention before it, one denominator."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import masks
from ...ops import _shards, attention
from ...ops._call import expand_heads
from ...ops.linear import linear_partial
from ...positions import check_rotary_scaling, rotary_angles, rotate
from ...types import Output, Partial, State, Traits, check_choice, check_divides, exactly, stats_dtype
from ..base import Mechanism
from ..layers import flat_valid, head_dim_of, merge_heads, split_heads, tokens_first
from ..registry import register
from ..released import Released, Rule
from .feature_maps import KINDS, OPTIONS, HedgehogFeatures
from .heads import HeadMixer, map_cross_entropy, output_error, softmax_map


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


def in_order(x: Tensor, order: Tensor) -> Tensor:
    """(B, H, N, D) with its tokens in another order (B, N)."""
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


class Hybrid(nn.Module):
    """What a window and learned features make of queries, keys and values; whoever has heads can be one.

    The class needs ``num_heads``, ``num_kv_heads`` and ``head_dim`` before :meth:`_set_up`.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int

    def _set_up(
        self,
        window_size: int = 64,
        feature_dim: int | None = None,
        features: str = "softmax",
        feature_options: Mapping[str, Any] | None = None,
        tie_features: bool = False,
        window: str = "sliding",
        window_factor: float = -2.1972245773362196,
        train_window_factor: bool = True,
        train_window: bool = True,
        affine: bool = False,
        consistent: bool = False,
        eps: float = 0.0,
        chunk: int = 128,
        compat: str | None = None,
    ) -> None:
        """Feature maps and settings; those of :class:`LoLCATs`."""
        if window_size < 0:
            raise ValueError(f"window_size must be at least 0, got {window_size}")
        check_choice("window", window, ("sliding", "terraced"))
        check_choice("features", features, KINDS)
        for option in feature_options or {}:
            check_choice("feature_options", option, OPTIONS)
        check_choice("compat", compat, (None, "authors"))
        if window == "terraced" and not window_size:
            raise ValueError("window='terraced' needs a window_size of at least 1")
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        if eps and window_size:
            raise ValueError(f"eps={eps} belongs to linear attention alone; it needs window_size=0, got {window_size}")
        if not train_window and (window == "terraced" or not window_size):
            raise ValueError("train_window=False needs window='sliding' and a window_size of at least 1")
        self.window_size, self.affine, self.consistent = window_size, affine, consistent
        self.chunk, self.scale = chunk, self.head_dim**-0.5
        self.window, self.compat, self.train_window, self.eps = window, compat, train_window, eps
        options = dict(feature_options or {})
        self.phi_q = HedgehogFeatures(self.num_heads, self.head_dim, feature_dim, features, **options)
        self.phi_k = self.phi_q if tie_features else copy.deepcopy(self.phi_q)  # both start alike
        self.window_factor: nn.Parameter | None = None
        if window_size:
            factor = torch.full((self.num_heads,), float(window_factor))
            self.window_factor = nn.Parameter(factor, requires_grad=train_window_factor)

    def feature_parameters(self) -> list[nn.Parameter]:
        """What attention transfer trains; everything else stays as it is."""
        maps = [*self.phi_q.parameters(), *(self.phi_k.parameters() if self.phi_k is not self.phi_q else ())]
        free = self.window_factor is not None and self.window_factor.requires_grad
        return [*maps, self.window_factor] if free else maps  # type: ignore[list-item]

    # ---- the hybrid, on sequences whose tokens all come first

    def _factors(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """Logarithms of gamma and beta, (1, H, 1) each."""
        if self.window_factor is None:
            none = torch.zeros(1, self.num_heads, 1, dtype=dtype, device=device)
            return none, none
        g = self.window_factor.to(dtype).view(1, -1, 1)
        return F.logsigmoid(g), F.logsigmoid(-g) if self.affine else torch.zeros_like(g)

    def _hybrid(
        self, q: Tensor, k: Tensor, v: Tensor, exists: Tensor, state: State | None, sums: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """(B, H, n, D) outputs and the state of the linear part.

        ``k`` and ``v`` begin with the ``window_size`` tokens before the first query; ``exists`` says which there are.
        ``sums`` (B, H, F, D + 1) of tokens before those that every query reads, whatever left its window.
        """
        n, window = q.shape[2], self.window_size
        high = stats_dtype(q.dtype)
        k, v = expand_heads(k, self.num_heads), expand_heads(v, self.num_heads)
        log_gamma, log_beta = self._factors(high, q.device)
        # Each query moves the window on by one token: the key that falls out of it joins the linear part.
        old = exists[:, :n] & exists[:, window:]
        f_q = self.phi_q(q)
        linear, final = linear_partial(
            f_q, self.phi_k(k[:, :, :n]), v[:, :, :n], valid=old, state=state, chunk=self.chunk, return_state=True
        )
        if sums is not None:
            with exactly(q):
                num, den = (f_q.to(high) @ sums.to(high)).split([v.shape[-1], 1], -1)
            linear = linear._replace(den=linear.den + den.squeeze(-1), num=linear.num + num)
        if self.eps:
            linear = linear._replace(den=linear.den + self.eps)
        total = linear.shift(log_beta)
        if window:
            # statistics keep their precision under autocast
            with exactly(q), nullcontext() if self.train_window else torch.no_grad():
                soft = window_part((q * self.scale).to(high), k.to(high), v.to(high), exists, self.consistent)
                soft = soft.shift(log_gamma)
            total = soft.merge(total)
        return total.finish().to(v.dtype), final

    def _terraces(self, many: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) empty places before the first token, so that blocks begin where they should; and (B,) boolean, where the
        authors' slip adds a linear part inside the window."""
        if self.compat == "authors":
            return -many % self.window_size, many <= self.window_size
        return torch.zeros_like(many), torch.zeros_like(many, dtype=torch.bool)

    def _terraced(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        exists: Tensor,
        state: State | None = None,
        keep: bool = False,
        sums: Tensor | None = None,
    ) -> tuple[Tensor, State | None]:
        """(B, H, n, D) outputs with a window of this block and the one before, and the state behind them.

        ``sums`` (B, H, F, D + 1) of tokens before the first that are only read linearly.
        """
        n, size, high = q.shape[2], self.window_size, stats_dtype(q.dtype)
        many = exists.sum(1)
        before, slip = self._terraces(many)
        past = torch.zeros_like(many) if state is None else state["tokens"]
        if state is None:
            blocks = (n + 2 * size - 2) // size if self.compat == "authors" else -(-n // size)
            at = torch.arange(blocks * size, device=q.device) - before[:, None]
            there, index, back = (at >= 0) & (at < many[:, None]), at.clamp(0, max(n - 1, 0)), before
        else:
            # Places count from the block before the one that is being filled; the state holds those two.
            k, v = torch.cat([state["k"].to(k.dtype), k], 2), torch.cat([state["v"].to(v.dtype), v], 2)
            q = F.pad(q, (0, 0, 2 * size, 0))
            blocks = -(-(2 * size - 1 + n) // size)
            at, back = torch.arange(blocks * size, device=q.device), size + past % size
            new = at - back[:, None]
            index = torch.where(new < 0, at, (2 * size + new).clamp(max=2 * size + n - 1))
            there = torch.where(new < 0, (at >= size) | (past[:, None] >= size), new < many[:, None])

        def place(t: Tensor) -> Tensor:
            """(B, H, places, D), zeros where no token is."""
            t = t.gather(2, index[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3]))
            return t.masked_fill(~there[:, None, :, None], 0.0)

        def in_blocks(t: Tensor) -> Tensor:
            return expand_heads(t, self.num_heads).unflatten(2, (blocks, size))

        def pair(t: Tensor, axis: int) -> Tensor:
            """Every block (axis) behind the one before it."""
            earlier = torch.cat([torch.zeros_like(t.narrow(axis, 0, 1)), t.narrow(axis, 0, t.shape[axis] - 1)], axis)
            return torch.cat([earlier, t], axis + 1)

        held_k, held_v = place(k), place(v)
        q, k, v = in_blocks(place(q)), in_blocks(held_k), in_blocks(held_v)
        seen = there.unflatten(1, (blocks, size))
        with exactly(q):  # statistics keep their precision under autocast
            keys, values = pair(k, 2).to(high), pair(v, 2).to(high)
            reach = torch.arange(2 * size, device=q.device) <= torch.arange(size, 2 * size, device=q.device)[:, None]
            allowed = reach & pair(seen, 1)[:, None, :, None, :]
            scores = ((q * self.scale).to(high) @ keys.mT).masked_fill(~allowed, float("-inf"))
            top = scores.amax(-1, keepdim=True)
            top = torch.where(allowed.any(-1, keepdim=True), top, torch.zeros_like(top))
            e = torch.exp(scores - top)
            read = e @ values
            scale = top.squeeze(-1) if self.consistent else torch.zeros_like(top.squeeze(-1))
        log_gamma, log_beta = (f.unsqueeze(-1) for f in self._factors(high, q.device))
        soft = Partial(scale, e.sum(-1), read).shift(log_gamma)
        f_q = self.phi_q(q.flatten(2, 3)).unflatten(2, (blocks, size)).to(high)
        f_k = self.phi_k(k.flatten(2, 3)).unflatten(2, (blocks, size)).to(high)
        with exactly(q):
            f_k = f_k.masked_fill(~seen[:, None, :, :, None], 0.0)
            # What ends two blocks before: sums over the blocks, moved on by two.
            of_block = torch.cat([f_k.mT @ v.to(high), f_k.sum(3).unsqueeze(-1)], -1)
            sums = state["sums"] if state is not None else sums
            first = torch.zeros_like(of_block[:, :, :1]) if sums is None else sums.unsqueeze(2).to(high)
            older = torch.cat([first, first, first + of_block.cumsum(2)], 2)  # older[:, :, r]: all before block r - 1
            num, den = (f_q @ older[:, :, :blocks]).split([v.shape[-1], 1], -1)
            if self.compat == "authors":
                inside = (f_q @ f_k.mT).masked_fill(~(slip[:, None, None, None, None] & reach[:, size:]), 0.0)
                num, den = num + inside @ v.to(high), den + inside.sum(-1, keepdim=True)
        old = Partial(torch.zeros_like(scale), den.squeeze(-1), num).shift(log_beta)
        out = soft.merge(old).finish().flatten(2, 3)
        back = (torch.arange(n, device=q.device) + back[:, None])[:, None, :, None]
        out = out.gather(2, back.expand(-1, out.shape[1], -1, out.shape[3])).to(v.dtype)
        if not keep:
            return out, None
        # The block that comes next, counted from the first place; the one before it may lie before all places.
        tokens = past + many
        block = tokens // size - (0 if state is None else past // size - 1)
        held = (block[:, None] - 1) * size + torch.arange(2 * size, device=q.device)
        pad = (0, 0, size, size)
        held_k, held_v = (
            F.pad(t, pad).gather(2, (held + size)[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3]))
            for t in (held_k, held_v)
        )
        where = block[:, None, None, None, None].expand(-1, older.shape[1], 1, *older.shape[3:])
        return out, State({"sums": older.gather(2, where).squeeze(2), "k": held_k, "v": held_v, "tokens": tokens})

    def _map(self, q: Tensor, k: Tensor, exists: Tensor) -> Tensor:
        """(B, H, N, N) weights of the hybrid, for the loss between maps."""
        high = stats_dtype(q.dtype)
        n = q.shape[2]
        k = expand_heads(k, self.num_heads)
        age = torch.arange(n, device=q.device)[:, None] - torch.arange(n, device=q.device)
        if self.window == "sliding":
            near, old = (age >= 0) & (age < self.window_size), age >= self.window_size
        else:
            before, slip = self._terraces(exists.sum(1))
            block = (torch.arange(n, device=q.device) + before[:, None]) // self.window_size
            apart = (block[:, :, None] - block[:, None, :]).unsqueeze(1)
            near, old = (age >= 0) & (apart <= 1), (age >= 0) & ((apart > 1) | slip[:, None, None, None])
        near, old = (m & exists[:, None, None, :] for m in (near, old))
        log_gamma, log_beta = (f.unsqueeze(-1) for f in self._factors(high, q.device))
        scores = (q.to(high) @ k.to(high).transpose(-2, -1) * self.scale).masked_fill(~near, float("-inf"))
        top = scores.amax(-1, keepdim=True)
        top = torch.where(torch.isinf(top), torch.zeros_like(top), top)
        soft = torch.exp(scores - top + log_gamma)
        linear = (self.phi_q(q) @ self.phi_k(k).transpose(-2, -1)).to(high) * torch.exp(log_beta)
        weights = soft + linear.masked_fill(~old, 0.0) * (torch.exp(-top) if self.consistent else 1.0)
        total = weights.sum(-1, keepdim=True)
        return weights / torch.where(total == 0, torch.ones_like(total), total)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        now: Tensor,
        state: State | None,
        keep: bool,
        past: Tensor | None = None,
    ) -> tuple[Tensor, State | None]:
        """(B, H, n, D) outputs of new tokens, those that exist (``now``, (B, n)) first, and the state behind them.

        ``past`` (B,) counts the tokens before them where no state does.
        """
        window, many = self.window_size, now.sum(1)
        if self.window == "terraced":
            self._check_state(state, q, 2 * window)
            return self._terraced(q, k, v, now, state, keep)
        if past is None:
            past = torch.zeros_like(many) if state is None else state["tokens"]
        if state is None:
            k, v = (_shards.behind(t, window, 2) for t in (k, v))
        else:
            self._check_state(state, q, window)
            k, v = torch.cat([state["k"].to(k.dtype), k], 2), torch.cat([state["v"].to(v.dtype), v], 2)
        before = torch.arange(window, device=q.device) >= window - past[:, None]
        out, final = self._hybrid(q, k, v, torch.cat([before, now], 1), state)
        if not keep:
            return out, None
        # The window of each sample ends at its own last token.
        at = (many[:, None] + torch.arange(window, device=q.device))[:, None, :, None]
        k, v = (torch.gather(t, 2, at.expand(-1, t.shape[1], -1, t.shape[3])) for t in (k, v))
        return out, final.replace(k=k, v=v, tokens=past + many)

    def _check_state(self, state: State | None, q: Tensor, slots: int) -> None:
        shape = (q.shape[0], self.num_kv_heads, slots, self.head_dim)
        if state is not None and tuple(state["k"].shape) != shape:
            raise ValueError(
                f"state k must be {shape}, got {tuple(state['k'].shape)}; it was made by another mechanism or for "
                "another batch"
            )


class LoLCATsHeads(Hybrid, HeadMixer):
    """:class:`LoLCATs` between projections that are somebody else's.

    Args:
        num_heads, head_dim, num_kv_heads, causal, scale: see :class:`attnlib.nn.linear.heads.HeadMixer`; causal only.
        **settings: of :class:`LoLCATs`: ``window_size``, ``feature_dim``, ``features``, ``feature_options``,
            ``tie_features``, ``window``, ``window_factor``, ``train_window_factor``, ``train_window``, ``affine``,
            ``consistent``, ``eps``, ``chunk``, ``compat``.

    >>> import torch
    >>> LoLCATsHeads(num_heads=2, head_dim=4, window_size=2)(*torch.randn(3, 1, 2, 5, 4))[0].shape
    torch.Size([1, 2, 5, 4])
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None = None,
        causal: bool = True,
        scale: float | None = None,
        **settings: Any,
    ):
        if not causal:
            raise ValueError("causal=False is not possible: the window of LoLCATs looks back; convert to 'hedgehog'")
        super().__init__(num_heads, head_dim, num_kv_heads, causal, scale)
        own = self.scale
        self._set_up(**settings)
        self.scale = own

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, valid: Tensor | None = None, state: State | None = None,
        keep: bool = False,
    ) -> tuple[Tensor, State | None]:  # fmt: skip
        if valid is None:
            now = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)
            return self._attend(q, k, v, now, state, keep)
        order = tokens_first(valid)
        now = valid.gather(1, order)
        q, k, v = (in_order(t, order) for t in (q, k, v))
        k, v = (t.masked_fill(~now[:, None, :, None], 0.0) for t in (k, v))
        out, new = self._attend(q, k, v, now, state, keep)
        return in_order(out, torch.argsort(order, 1)), new

    def weights(self, q: Tensor, k: Tensor, *, valid: Tensor | None = None) -> Tensor:
        if valid is None:
            return self._map(q, k, torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device))
        order = tokens_first(valid)
        back = torch.argsort(order, 1)
        found = self._map(in_order(q, order), in_order(k, order), valid.gather(1, order))
        return in_order(in_order(found, back).mT, back).mT

    def trained(self) -> list[nn.Parameter]:
        return self.feature_parameters()


@register("lolcats", "lolcats-attention")
class LoLCATs(Hybrid, Mechanism):
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

    With ``window="terraced"`` the sequence is cut into blocks of ``window_size`` tokens; a query reads its own block up
    to itself and the block before by softmax, and linearly what is older. ``compat="authors"`` lets the last block end
    with the sequence, as their class does, so that where blocks begin depends on the length; otherwise the first block
    begins with it.

    Decoding keeps the last ``window_size`` keys and values (of terraces, those of this block and the one before) and,
    for all older ones, a state that does not grow. Terraces that end with the sequence cannot be continued; the authors
    decode them by a sliding window, and so does the layer that :meth:`decoding` gives, whose weights are this one's::

        y = m(x)                                                     # the prompt
        decoder = m.decoding()
        state = decoder(x, returns=("state",)).state
        y_t, state = decoder.step(x_t, state)

    The authors also train on a long sequence in chunks, with windows that begin anew: :meth:`train_chunk`.

    Differs from the authors' code: cost linear in N in training too (theirs builds the whole map); padding (windows
    and positions count the tokens that exist); states in float32. A sequence no longer than a terrace is plain softmax;
    in theirs, a slip of its mask adds the linear part there too, which ``compat`` keeps.

    Args:
        dim: width of ``x``.
        num_heads: query heads.
        num_kv_heads: key/value heads; must divide ``num_heads``. Defaults to ``num_heads``.
        head_dim: width D of a head; ``dim / num_heads`` by default.
        window_size: keys under softmax, the query's own included; 0 leaves linear attention alone.
        feature_dim: columns of each feature matrix; ``head_dim`` by default.
        features: how features are made, the ``kind`` of :class:`attnlib.nn.linear.feature_maps.HedgehogFeatures`.
        feature_options: the other settings of that class: ``fullspace``, ``identity``, ``normal``, ``skip``, ``bias``,
            ``hidden``, ``eps``.
        tie_features: one map for queries and keys.
        window: ``"sliding"`` or ``"terraced"``.
        compat: ``"authors"``, see above.
        decode_window_size: window of :meth:`decoding`; ``window_size`` by default.
        rotary: base of the rotary positions that queries and keys have before the maps; ``None`` for none.
        rotary_scaling: how they stretch, see :func:`attnlib.positions.rotary_frequencies`.
        window_factor: start of ``g``; -2.1972 makes ``gamma`` 0.1. Without a window there is no ``g``.
        train_window_factor: whether ``g`` is trained.
        train_window: ``False``: no gradient passes the window, only the linear part, as in the authors' class of linear
            memory; not with terraces.
        affine: ``beta = 1 - gamma`` instead of 1.
        consistent: weigh window and linear part in the same units.
        eps: added to the denominator of linear attention alone, without a window.
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
        feature_options: Mapping[str, Any] | None = None,
        tie_features: bool = False,
        window: str = "sliding",
        decode_window_size: int | None = None,
        rotary: float | None = 10000.0,
        rotary_scaling: Mapping[str, Any] | None = None,
        window_factor: float = -2.1972245773362196,
        train_window_factor: bool = True,
        train_window: bool = True,
        affine: bool = False,
        consistent: bool = False,
        eps: float = 0.0,
        attention_transfer: bool = False,
        qkv_bias: bool = False,
        proj_bias: bool = False,
        chunk: int = 128,
        causal: bool = True,
        compat: str | None = None,
    ):
        super().__init__(dim)
        if not causal:
            raise ValueError("causal=False is not possible: its window looks back; pass causal=True")
        if decode_window_size is not None and decode_window_size < 1:
            raise ValueError(f"decode_window_size must be at least 1, got {decode_window_size}")
        if rotary_scaling is not None and rotary is None:
            raise ValueError(f"rotary_scaling={dict(rotary_scaling)} needs a rotary base, such as rotary=10000.0")
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_divides("num_kv_heads", self.num_kv_heads, "num_heads", num_heads)
        self.head_dim = head_dim_of(dim, num_heads) if head_dim is None else head_dim
        self.rotary, self.attention_transfer = rotary, attention_transfer
        self.q = nn.Linear(dim, num_heads * self.head_dim, bias=qkv_bias)
        self.k = nn.Linear(dim, self.num_kv_heads * self.head_dim, bias=qkv_bias)
        self.v = nn.Linear(dim, self.num_kv_heads * self.head_dim, bias=qkv_bias)
        self.proj = nn.Linear(num_heads * self.head_dim, dim, bias=proj_bias)
        self.decode_window_size = window_size if decode_window_size is None else decode_window_size
        self.rotary_scaling = check_rotary_scaling(rotary_scaling)
        self.reads_length = self._dynamic

        self._set_up(
            window_size, feature_dim, features, feature_options, tie_features, window, window_factor,
            train_window_factor, train_window, affine, consistent, eps, chunk, compat,
        )  # fmt: skip

    @property
    def traits(self) -> Traits:
        if self.attention_transfer:
            return self.class_traits.but(streaming=False)
        streaming = not self._dynamic and (self.window == "sliding" or self.compat != "authors")
        gradient = "exact" if self.train_window else "surrogate"
        return self.class_traits.but(streaming=streaming, work={"N": 1}, memory={"N": 1}, losses=(), gradient=gradient)

    @property
    def cuts_sequence(self) -> bool:  # type: ignore[override]
        """Sliding windows reach into the chunk before; terraces are counted from the end, maps need all of them."""
        return self.window == "sliding" and not self.attention_transfer

    @property
    def _dynamic(self) -> bool:
        """Whether rotary positions depend on the length of the call."""
        return self.rotary_scaling is not None and self.rotary_scaling["rope_type"] == "dynamic"

    def decoding(self) -> LoLCATs:
        """The layer that continues a prompt as the authors do: these weights, and a sliding window of
        ``decode_window_size``, which the prompt's last keys fill."""
        if not self.window_size:
            raise ValueError("window_size=0: linear attention decodes as it is")
        layer = copy.copy(self)
        layer.window, layer.compat, layer.attention_transfer = "sliding", None, False
        layer.window_size = self.decode_window_size
        return layer

    def _transfer(self, q: Tensor, k: Tensor, v: Tensor, exists: Tensor, wanted: bool) -> tuple[Tensor, dict | None]:
        """The teacher's (B, H, N, D) outputs and the losses of the hybrid against it."""
        if not wanted:
            return attention(q, k, v, mask=masks.causal(), valid=exists, scale=self.scale), None
        truth, target = softmax_map(q, k, v, self.scale, True, exists)
        q, k, v, truth_, target = (t.detach() for t in (q, k, v, truth, target))
        return truth, {
            "transfer_mse": output_error(self._attend(q, k, v, exists, None, False)[0], truth_, exists),
            "transfer_xent": map_cross_entropy(self._map(q, k, exists), target, exists),
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
        exists = flat_valid(valid)
        order = None
        if exists is not None:
            # Tokens that exist move to the front, so that windows are runs of tokens that exist.
            order = tokens_first(exists)
            x = torch.gather(x, 1, order[..., None].expand_as(x))
            x = x.masked_fill(~torch.gather(exists, 1, order)[..., None], 0.0)
        many = torch.full((batch,), n, device=x.device) if exists is None else exists.sum(1)
        past = torch.zeros_like(many) if state is None else state["tokens"]
        if (others := _shards.others()) is not None:
            if exists is not None or state is not None or "state" in returns:
                raise ValueError(
                    "valid and state are not possible while the sequence is cut over processes: windows reach back "
                    "over a number of tokens that exist, which may lie with any of them"
                )
            past = others.before(None, batch, n, x.device)
        q, k, v = self._heads(x, past, many)
        now = torch.arange(n, device=x.device) < many[:, None]
        if self.attention_transfer:
            out, losses = self._transfer(q, k, v, now, "losses" in returns)
            return Output(self._finish(out, order), losses=losses)
        out, new_state = self._attend(q, k, v, now, state, "state" in returns, past)
        return Output(self._finish(out, order), state=new_state)

    def _heads(self, x: Tensor, past: Tensor, many: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H or G, n, D) of tokens that follow ``past`` (B,) others, with positions."""
        q = split_heads(self.q(x), self.num_heads)
        k, v = split_heads(self.k(x), self.num_kv_heads), split_heads(self.v(x), self.num_kv_heads)
        if self.rotary is None:
            return q, k, v
        pos, length = past[:, None] + torch.arange(x.shape[1], device=x.device), many if self._dynamic else None
        angles = rotary_angles(pos, self.head_dim, self.rotary, scaling=self.rotary_scaling, length=length)
        return rotate(q, angles), rotate(k, angles), v

    def train_chunk(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """``(y, state)`` of the next chunk (B, n, C) of a long sequence, as the authors train on it in fixed memory.

        The window begins anew with every chunk, all tokens of earlier chunks are read linearly, and no gradient goes
        back to them: this is not what :meth:`step` computes.
        """
        self._check_call(x, None, None, None, None, None, None, None, None, ())
        if self.attention_transfer or not self.window_size:
            raise ValueError("train_chunk is for a layer with a window that does not imitate its teacher any more")
        if state is not None:
            state.expect(self._name(), x.shape[0], x.device)
        now = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        many = now.sum(1)
        past = torch.zeros_like(many) if state is None else state["tokens"]
        q, k, v = self._heads(x, past, past + many)
        sums = None if state is None else state["sums"]
        if self.window == "terraced":
            out, _ = self._terraced(q, k, v, now, sums=sums)
        else:
            pad = (0, 0, self.window_size, 0)
            out, _ = self._hybrid(q, F.pad(k, pad), F.pad(v, pad), F.pad(now, (self.window_size, 0)), None, sums)
        with torch.no_grad(), exactly(q):
            f_k = self.phi_k(expand_heads(k, self.num_heads)).to(stats_dtype(q.dtype))
            read = F.pad(expand_heads(v, self.num_heads), (0, 1), value=1.0).to(f_k.dtype)
            all_ = f_k.mT @ read if sums is None else sums + f_k.mT @ read
        return self._finish(out, None), State({"sums": all_, "tokens": past + many}, self._name())

    def _finish(self, out: Tensor, order: Tensor | None) -> Tensor:
        y = self.proj(merge_heads(out))
        if order is None:
            return y
        return torch.zeros_like(y).scatter(1, order[..., None].expand_as(y), y)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From ``LolcatsSlidingWindowAttention``, ``LolcatsTKWindowAttention`` (terraced) or ``LolcatsLinearAttention``
        (no window): ``q_proj``, ``feature_map_q.mlp.layer``, ``window_factors`` and so on."""

        def factors(match: Any, value: Tensor) -> dict[str, Tensor]:
            if value.dim() not in (1, 4):
                raise ValueError(f"{match.string} of state_dict must be (1, H, 1, 1) or (H,), got {tuple(value.shape)}")
            return {"window_factor": value.flatten()}

        theirs = Released(state_dict, "LolcatsSlidingWindowAttention or its relatives")
        if "window_factors" in theirs:
            theirs.leave(r"window_factor", because="an older name of window_factors, which they keep beside it")
        theirs.leave(r"(?:base_attn\.)?rotary_emb\..*", because="a setting here: the rotary base")
        theirs.leave(r"base_attn\..*", because="the same projections once more, kept with remove_base_attn=False")
        rules: dict[str, Rule] = {
            r"window_factors?": factors,
            r"feature_map_([qk])\.mlp\.layer": r"phi_\1.weight",
            r"feature_map_([qk])\.mlp\.bias": r"phi_\1.bias",
            r"feature_map_([qk])\.mlp\.(layer|bias)([01])": r"phi_\1.\2\3",
            r"([qkv])_proj\.(weight|bias)": r"\1.\2",
            r"o_proj\.(weight|bias)": r"proj.\1",
        }
        return theirs.close(theirs.renamed(rules))
