"""Grouped queries whose groups follow the keys (Khan et al., 2024): KDGQA, DGQA and PGQA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...checks import readable
from ...types import Plan, Traits, check_choice, check_divides, stats_dtype
from ..frame import HeadCall, HeadFrame, Notes
from ..registry import register
from ..released import PLAIN, Released

KINDS = ("uniform", "key_norm", "difference", "average", "perturbed")


def key_norms(k: Tensor, valid: Tensor | None = None) -> Tensor:
    """(G,) sum over the batch of the Frobenius norms of key heads ``k`` (B, G, N, D)."""
    if valid is not None:
        k = k.masked_fill(~valid[:, None, :, None], 0.0)
    return k.detach().to(stats_dtype(k.dtype)).norm(dim=(2, 3)).sum(0)


def allocate(shares: Tensor, num_heads: int, fix: str = "extreme") -> Tensor:
    """Split ``num_heads`` in proportion to ``shares`` (G,): rounded, then mended until the sum is right.

    ``fix`` says which group gives or takes a head: ``"extreme"`` the largest gives and the smallest takes,
    ``"remainder"`` the one whose rounding was furthest off, ``"random"`` any (from the global generator).
    Shares that do not exist (all norms equal: 0 / 0) give the uniform split.

    >>> allocate(torch.tensor([0.0, 1.0, 2.0]), 6).tolist()
    [0, 2, 4]
    """
    total = shares.sum()
    if not bool(torch.isfinite(shares).all()) or float(total) <= 0:
        shares, total = torch.ones_like(shares), shares.new_tensor(float(len(shares)))
    exact = shares / total * num_heads
    split = exact.round().long()
    while (excess := int(split.sum()) - num_heads) != 0:
        if fix == "random":
            i = int(torch.randint(0, len(split), (1,)))
            if excess > 0 and split[i] == 0:
                continue
        elif fix == "remainder":
            error = split - exact
            i = int(torch.where(split > 0, error, -torch.inf).argmax() if excess > 0 else error.argmin())
        else:
            i = int(split.argmax() if excess > 0 else split.argmin())
        split[i] -= 1 if excess > 0 else -1
    return split


@register("key-driven-gqa", "kdgqa", "dgqa", "pgqa")
class KeyDrivenGQA(HeadFrame[Notes]):
    """Grouped-query attention in which a key head serves as many query heads as its norm deserves.

    ``m_g = sum_b ||k[b, g]||_F``; the split ``n_g`` (integers summing to the query heads) gives neighbouring query
    heads to each key head, and ``o_h = softmax(q_h k_g(h)^T / sqrt(D)) v_g(h)``. The choice is a plan, so it can be
    frozen.

    Args:
        dim, num_heads, num_kv_heads, ...: as in :class:`HeadFrame`; ``num_kv_heads`` is half of ``num_heads`` by
            default, and need not divide it where groups follow the keys.
        kind: how groups are sized. ``"uniform"``: GQA. ``"key_norm"``: KDGQA, from ``(m - min) / (max - min)`` in every
            call. ``"difference"`` and ``"average"``: DGQA, from ``|cache - m|`` or ``beta m + (1 - beta) cache``, where
            the cache follows training. ``"perturbed"``: PGQA, uniform groups, Gaussian-shaped noise subtracted from the
            outputs of heads in training.
        window: DGQA updates its groups and cache every ``window`` training calls.
        beta: weight of the current norms in ``"average"``.
        compat: ``"authors"`` mends the sum of DGQA at random groups, lets evaluation move DGQA's cache and groups (to
            the norms of the call), and perturbs in evaluation too.

    With ``causal=True`` a choice made from all keys would look ahead, so the groups are those of the last training call
    (a buffer, saved with the weights): generation with a cache then equals the full pass.

    What differs from the authors' code: equal norms give the uniform split, where theirs divides by zero; evaluation
    changes the cache under ``compat`` only, since two evaluation calls on one input disagree then; DGQA's groups are
    saved.

    Reference: Khan et al., 2024, arXiv 2408.08454.

    >>> m = KeyDrivenGQA(dim=32, num_heads=8, num_kv_heads=4)
    >>> m.plan(torch.randn(2, 5, 32))["map"].shape
    torch.Size([8])
    """

    head_map: Tensor
    cache: Tensor
    calls: Tensor
    own_state = ("head_map", "calls")
    even_groups = False

    class_traits = HeadFrame.class_traits.but(needs_plan=True, batch_independent=False, gradient="stopped")

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        *,
        kind: str = "key_norm",
        window: int = 300,
        beta: float = 0.9,
        compat: str | None = None,
        **settings: Any,
    ):
        if num_kv_heads is None:
            num_kv_heads = max(1, num_heads // 2)
        check_choice("kind", kind, KINDS)
        if kind in ("uniform", "perturbed") or num_kv_heads > num_heads:
            check_divides("num_kv_heads", num_kv_heads, "num_heads", num_heads)
        super().__init__(dim, num_heads, num_kv_heads, **settings)
        check_choice("compat", compat, (None, "authors"))
        if window < 1:
            raise ValueError(f"window={window} must be at least 1")
        self.kind, self.window, self.beta, self.compat = kind, window, beta, compat
        uniform = torch.arange(num_heads) * num_kv_heads // num_heads
        self.register_buffer("head_map", uniform)
        if kind in ("difference", "average"):
            self.register_buffer("cache", torch.zeros(num_kv_heads))
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    @property
    def _adaptive(self) -> bool:
        return self.kind in ("key_norm", "difference", "average")

    @property
    def traits(self) -> Traits:
        traits = super().traits
        free = not self._adaptive or (self.causal and not self.training)
        changes = dict(
            needs_plan=self._adaptive, batch_independent=free, gradient="stopped" if self._adaptive else "exact"
        )
        if self._adaptive and not self.causal:
            changes["traceable"] = False  # the groups are counted in Python
            changes["mask"] = False  # the groups follow all keys, also those that a row's mask hides
        return traits.but(**changes)

    # ---- the choice

    def split(self, norms: Tensor) -> Tensor:
        """(G,) how many query heads read each key head."""
        if self.kind == "key_norm":
            spread = norms.max() - norms.min()
            return allocate((norms - norms.min()) / spread, self.num_heads)
        shares = (
            (self.cache - norms).abs()
            if self.kind == "difference"
            else self.beta * norms + (1 - self.beta) * self.cache
        )
        return allocate(shares, self.num_heads, "random" if self.compat == "authors" else "remainder")

    def _map(self, norms: Tensor) -> Tensor:
        if torch._C._functorch.is_functorch_wrapped_tensor(norms) and not readable(norms):
            raise ValueError(
                f"{self._name()} counts the heads of each group by numbers that vmap does not let it read; possible: "
                "plan=m.plan(x), made before, or kind='uniform'"
            )
        return torch.repeat_interleave(torch.arange(self.num_kv_heads, device=norms.device), self.split(norms))

    def _choose(self, k: Tensor, valid: Tensor | None) -> Tensor:
        current = self.head_map
        if not self._adaptive:
            return current
        if not self.training and self.causal:
            return current
        norms = key_norms(k, valid)
        if not self.training:
            chosen = self._map(norms)
            if self.compat == "authors" and self.kind != "key_norm":
                self.cache.copy_(norms)
                self.head_map.copy_(chosen)
            return chosen
        if self.kind == "key_norm":
            chosen = self._map(norms)
            self.head_map.copy_(chosen)
        else:
            chosen = current.clone()
            if int(self.calls) % self.window == 0:
                chosen = self._map(norms)
                self.cache.copy_((self.cache + norms) / self.window)
                self.head_map.copy_(chosen)
            self.calls += 1
        # one call behind, so that no token sees a choice made from later ones
        return current.clone() if self.causal else chosen

    def make_plan(  # type: ignore[override]
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        valid: Tensor | None = None,
        context_valid: Tensor | None = None,
    ) -> Plan:
        if not self._adaptive:
            return super().make_plan(x)
        source, exists = (x, valid) if context is None else (context, context_valid)
        k = self.k_norm(self.k(source.flatten(1, -2)).unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2))
        if self.causal:
            return Plan("head-map", {"map": self.head_map.clone()})
        return Plan("head-map", {"map": self._map(key_norms(k, None if exists is None else exists.flatten(1)))})

    def _mix_heads(self, q: Tensor, k: Tensor, v: Tensor, call: HeadCall, notes: Notes) -> Any:
        plan = notes.plan
        if plan is None:
            chosen = self._choose(k, call.valid)
        else:
            chosen = plan.expect("head-map").choices("map", (self.num_heads,), self.num_kv_heads, "key head")
        return super()._mix_heads(q, k.index_select(1, chosen), v.index_select(1, chosen), call, notes)

    # ---- PGQA

    def _gate(self, out: Tensor, notes: Notes) -> Tensor:
        if self.kind != "perturbed" or not (self.training or self.compat == "authors"):
            return out
        group = self.num_heads // self.num_kv_heads
        return torch.cat([part - self._noise(part) for part in out.split(group, 1)], 1)

    @staticmethod
    def _noise(out: Tensor) -> Tensor:
        """Noise with zero diagonal and every row's mean and deviation; rows are the heads of ``out`` (B, n, N, D)."""
        rows = out.flatten(2)
        noise = torch.rand(rows.shape[1:], device=out.device, dtype=out.dtype)
        noise.fill_diagonal_(0)
        spread = noise.std(-1, keepdim=True)
        spread = torch.where(spread == 0, torch.ones_like(spread), spread)
        noise = (noise - noise.mean(-1, keepdim=True)) / spread
        return (noise * rows.std(-1, keepdim=True) + rows.mean(-1, keepdim=True)).view_as(out)

    @staticmethod
    def convert_state_dict(
        state_dict: Mapping[str, Tensor],
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        kind: str = "key_norm",
    ) -> dict[str, Tensor]:
        """The authors' classes; or, given head counts, a dense ``qkv`` checkpoint mean-pooled per group for a kind.

        Where groups follow the keys and do not divide the heads, ``num_heads // num_kv_heads`` heads are pooled into
        each, and the last heads into none, as in the authors' code.
        """
        check_choice("kind", kind, KINDS)
        theirs = Released(state_dict, "the authors' GQA, KDGQA, DGQA or PGQA, or a dense attention with qkv")
        dense = "qkv.weight" in theirs
        out = theirs.renamed({"cache": "cache"} | PLAIN)
        if dense:
            if num_heads is None or num_kv_heads is None:
                raise ValueError("a dense checkpoint needs num_heads and num_kv_heads to be pooled into groups")
            if kind in ("uniform", "perturbed") or num_kv_heads > num_heads:
                check_divides("num_kv_heads", num_kv_heads, "num_heads", num_heads)
            group = num_heads // num_kv_heads
            for key in [key for key in out if key[:2] in ("k.", "v.")]:
                if out[key].shape[0] % num_heads:
                    raise ValueError(f"{key} has {out[key].shape[0]} rows, which num_heads={num_heads} does not divide")
                heads = out[key].unflatten(0, (num_heads, -1))[: num_kv_heads * group]
                out[key] = heads.unflatten(0, (num_kv_heads, group)).mean(1).flatten(0, 1)
            if kind in ("difference", "average"):
                out["cache"] = torch.zeros(num_kv_heads)
        return theirs.close(out)
