"""Soft mixture of attention experts, upcycled from dense models (BAM, Zhang et al., 2024).

One seed model is copied, each copy is trained further on a domain of its own, and the copies become the experts of one
mixture: their attention a *soft* mixture (every expert computes, weighted by a router), their feed-forward networks a
top-1 mixture, side by side in a parallel block. Everything that is no expert is averaged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...types import Output, Plan, State, Traits, check_choice, check_divides, check_int, stats_dtype
from ..dense.softmax_attention import SoftmaxAttention
from ..frame import HeadCall, HeadFrame, Notes
from ..layers import plain, zero_invalid
from ..registry import register


def _probabilities(logits: Tensor) -> Tensor:
    return logits.to(stats_dtype(logits.dtype)).softmax(-1)


def router_losses(logits: Tensor, chosen: Tensor, valid: Tensor | None = None) -> dict[str, Tensor]:
    """Losses that keep a router balanced and its logits small.

    ``balance = E sum_e f_e P_e`` with ``f_e`` the fraction of choices that went to expert ``e`` and ``P_e`` its mean
    probability (1 when balanced); ``z = mean_t logsumexp(logits_t)^2``. Both are in float32.

    Args:
        logits: (..., E) of the router.
        chosen: (..., E) zeros and ones, which experts each token took.
        valid: (...) boolean, which tokens exist.

    >>> losses = router_losses(torch.zeros(4, 2), torch.eye(2).repeat(2, 1))
    >>> round(float(losses["balance"]), 4)
    1.0
    """
    logits = zero_invalid(logits.to(stats_dtype(logits.dtype)), valid)
    real = torch.ones_like(logits[..., :1]) if valid is None else valid.unsqueeze(-1).to(logits.dtype)
    count = real.sum().clamp(min=1)
    axes = tuple(range(logits.dim() - 1))
    taken = (chosen.to(logits.dtype) * real).sum(axes)
    mean = (logits.softmax(-1) * real).sum(axes) / count
    balance = logits.shape[-1] * (taken / taken.sum().clamp(min=1) * mean).sum()
    return {"balance": balance, "z": (logits.logsumexp(-1, keepdim=True).square() * real).sum() / count}


@dataclass
class ExpertNotes(Notes):
    """(B, N, E) weights of the experts."""

    gates: Tensor | None = None


@register("bam-soft-moa-upcycling", "bam", "soft-moa")
class SoftMixtureOfAttention(HeadFrame[ExpertNotes]):
    """``y = sum_e g_e MHA_e(x)`` with ``g = softmax(x W_r)``: every attention expert computes, every token weighs them.

    Each expert has its own queries and output projection, and (``shared_kv=False``) its own keys and values. All
    experts run as the heads of one attention: head outputs are multiplied by their expert's gate, and the concatenated
    output projections add up.

    Args:
        dim, head_dim, qkv_bias, proj_bias, causal, rotary, ...: as in :class:`HeadFrame`.
        num_heads: query heads of one expert.
        num_kv_heads: key/value heads of one expert.
        num_experts: experts ``E``.
        shared_kv: one set of keys and values for all experts (one cache instead of ``E``).
        top_k: experts per token; ``None`` for all of them, softly, which is the paper's choice. With fewer, the gates
            of the others are zero (the paper's ablation); nothing is skipped.
        renormalize: gates of the chosen experts sum to one. Without it they keep their probabilities, as in the paper.

    Losses, with ``top_k`` only (a soft mixture needs none): ``balance`` and ``z``, see :func:`router_losses`.

    The authors released no code. With ``E`` identical experts the mixture is the dense attention, whatever the router.

    Reference: Zhang et al., 2024, arXiv 2408.08274, section 3.

    >>> SoftMixtureOfAttention(dim=16, num_heads=2, num_experts=3)(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    class_traits = HeadFrame.class_traits.but(
        needs_plan=True, losses=("balance", "z"), work={"N": 2, "experts": 1}, memory={"N": 1, "experts": 1}
    )
    notes_type = ExpertNotes

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        *,
        num_experts: int = 4,
        shared_kv: bool = False,
        top_k: int | None = None,
        renormalize: bool = False,
        head_dim: int | None = None,
        proj_bias: bool = True,
        **settings: Any,
    ):
        if num_experts < 1:
            raise ValueError(f"num_experts={num_experts} must be at least 1")
        if top_k is not None and not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k} active experts must lie between 1 and num_experts={num_experts}")
        if settings.get("alibi"):
            raise ValueError("alibi=True is not possible here: its slopes are per head, and heads repeat per expert")
        groups = num_heads if num_kv_heads is None else num_kv_heads
        check_divides("num_kv_heads", groups, "num_heads", num_heads)
        if head_dim is None:
            check_divides("num_heads", num_heads, "dim", dim)
            head_dim = dim // num_heads
        super().__init__(
            dim, num_experts * num_heads, groups if shared_kv else num_experts * groups, head_dim, proj_bias=False,
            **settings,
        )  # fmt: skip
        self.num_experts, self.shared_kv, self.top_k, self.renormalize = num_experts, shared_kv, top_k, renormalize
        self.router = nn.Linear(dim, num_experts, bias=False)
        self.proj_bias = nn.Parameter(torch.zeros(num_experts, dim)) if proj_bias else None

    @property
    def _routed(self) -> bool:
        return self.top_k is not None

    @property
    def traits(self) -> Traits:
        traits = super().traits
        return traits if self._routed else traits.but(needs_plan=False, losses=())

    # ---- routing

    def _choose(self, logits: Tensor) -> Plan:
        assert self.top_k is not None
        return Plan("experts", {"index": logits.topk(self.top_k, -1).indices}, (("N", logits.shape[1]),))

    def make_plan(self, x: Tensor) -> Plan:  # type: ignore[override]
        if not self._routed:
            return super().make_plan(x)
        return self._choose(self.router(x.flatten(1, -2)))

    def _chosen(self, logits: Tensor, plan: Plan | None) -> Tensor | None:
        """(B, N, E) zeros and ones; ``None`` when all experts are on."""
        if not self._routed:
            return None
        made = self._choose(logits.detach()) if plan is None else plan
        made.expect("experts", N=logits.shape[1])
        index = made.choices("index", (*logits.shape[:2], self.top_k or 0), self.num_experts, "expert")
        return torch.zeros_like(logits).scatter(-1, index, 1.0)

    def _gates(self, logits: Tensor, chosen: Tensor | None) -> Tensor:
        """(B, N, E) weight of each expert."""
        p = _probabilities(logits)
        if chosen is not None:
            p = p * chosen
            if self.renormalize:
                p = p / p.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
        return p

    def _begin(self, x: Tensor, q: Tensor, notes: ExpertNotes) -> None:
        logits = self.router(x)
        chosen = self._chosen(logits, notes.plan)
        notes.gates = self._gates(logits, chosen).to(q.dtype)
        if "losses" in notes.returns and chosen is not None:
            notes.losses = router_losses(logits, chosen, notes.valid)

    # ---- attention

    def _mix_heads(self, q: Tensor, k: Tensor, v: Tensor, call: HeadCall, notes: ExpertNotes) -> Any:
        experts, groups = self.num_experts, k.shape[1]
        if not self.shared_kv or experts == 1:
            return super()._mix_heads(q, k, v, call, notes)
        if call.mask is not None and call.mask.heads() > 1:
            k, v = k.repeat(1, experts, 1, 1), v.repeat(1, experts, 1, 1)
            return super()._mix_heads(q, k, v, call, notes)
        # The operator gives neighbouring query heads one key head: bring the experts' heads of a group together.
        q = q.unflatten(1, (experts, groups, -1)).transpose(1, 2).flatten(1, 3)
        result = super()._mix_heads(q, k, v, call, notes)
        back = [
            t.unflatten(1, (groups, experts, -1)).transpose(1, 2).flatten(1, 3)
            for t in (result if isinstance(result, tuple) else (result,))
        ]
        return tuple(back) if isinstance(result, tuple) else back[0]

    def _gate(self, out: Tensor, notes: ExpertNotes) -> Tensor:
        assert notes.gates is not None
        gates = notes.gates.transpose(1, 2)  # (B, E, N)
        return (out.unflatten(1, (self.num_experts, -1)) * gates[:, :, None, :, None]).flatten(1, 2)

    def _project(self, out: Tensor, notes: ExpertNotes, grid: torch.Size) -> Tensor:
        y = super()._project(out, notes, grid)
        if self.proj_bias is None:
            return y
        assert notes.gates is not None
        return y + (notes.gates.to(y.dtype) @ self.proj_bias).view_as(y)

    @staticmethod
    def convert_state_dict(
        state_dict: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]],
        num_heads: int | None = None,
        num_experts: int | None = None,
        shared_kv: bool = False,
        **options: Any,
    ) -> dict[str, Tensor]:
        """Upcycle dense attention checkpoints, one per expert, or one that ``num_experts`` experts start from.

        Ours, timm's (``qkv``) and ``torch.nn.MultiheadAttention``'s names are understood.
        """
        if num_heads is None:
            raise ValueError("dense attention checkpoints do not say how many heads they have; give num_heads")
        check_int("num_heads", num_heads, least=1)
        if num_experts is not None:
            check_int("num_experts", num_experts, least=1)
        if isinstance(state_dict, Mapping):
            state_dict = [state_dict] * (1 if num_experts is None else num_experts)
        elif num_experts is not None and num_experts != len(state_dict):
            raise ValueError(f"num_experts={num_experts}, but {len(state_dict)} checkpoints were given")
        dense = [SoftmaxAttention.convert_state_dict(dict(one)) for one in state_dict]
        return upcycle(dense, num_heads, shared_kv=shared_kv, **options)


class ExpertFeedForward(nn.Module):
    """SwiGLU feed-forward, or a top-1 mixture of them: ``y = p_e FFN_e(x)`` for the most probable expert ``e``.

    Args:
        dim: width.
        hidden: hidden width of one expert; 8/3 of ``dim`` by default.
        num_experts: experts; 1 is the dense network, without router.
        renormalize: weigh the chosen expert by one instead of its probability. The paper's weight is the probability,
            so a fresh router scales the output down to about ``1 / num_experts``.

    >>> y, losses = ExpertFeedForward(8, 16, num_experts=3)(torch.randn(2, 5, 8))
    >>> y.shape, sorted(losses)
    (torch.Size([2, 5, 8]), ['balance', 'z'])
    """

    def __init__(self, dim: int, hidden: int | None = None, num_experts: int = 1, renormalize: bool = False):
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts={num_experts} must be at least 1")
        self.hidden = -(-dim * 8 // 3) if hidden is None else hidden
        self.num_experts, self.renormalize = num_experts, renormalize
        self.gate = nn.Linear(dim, num_experts * self.hidden, bias=False)
        self.up = nn.Linear(dim, num_experts * self.hidden, bias=False)
        self.down = nn.Linear(num_experts * self.hidden, dim, bias=False)
        self.router = nn.Linear(dim, num_experts, bias=False) if num_experts > 1 else None

    def _by_expert(self, tokens: Tensor, top: Tensor) -> Tensor:
        """(T, C) tokens through the expert ``top`` (T,) of each."""
        if not plain(self.gate, self.up, self.down):  # what they are now does not come apart
            hidden = (F.silu(self.gate(tokens)) * self.up(tokens)).unflatten(-1, (self.num_experts, -1))
            own = F.one_hot(top, self.num_experts).bool().unsqueeze(-1)
            return self.down(hidden.masked_fill(~own, 0.0).flatten(-2))
        gates, ups = self.gate.weight.chunk(self.num_experts), self.up.weight.chunk(self.num_experts)
        downs = self.down.weight.chunk(self.num_experts, 1)
        order = top.argsort()
        parts = tokens[order].split(top.bincount(minlength=self.num_experts).tolist())
        mixed = torch.cat(
            [F.linear(F.silu(F.linear(t, g)) * F.linear(t, u), d) for t, g, u, d in zip(parts, gates, ups, downs)]  # noqa: B905
        )
        return torch.empty_like(mixed).index_copy(0, order, mixed)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, N, C) tokens and the router's losses (none when dense)."""
        x = zero_invalid(x, valid)
        if self.router is None:
            return self.down(F.silu(self.gate(x)) * self.up(x)), {}
        tokens = x.flatten(0, -2)
        logits = self.router(tokens)
        p, top = _probabilities(logits).max(-1)
        weight = torch.ones_like(p) if self.renormalize else p
        out = self._by_expert(tokens, top) * weight.to(tokens.dtype).unsqueeze(-1)
        chosen = F.one_hot(top, self.num_experts)
        exists = None if valid is None else valid.flatten()
        return out.view_as(x), router_losses(logits, chosen, exists)


class ParallelBlock(nn.Module):
    """``u = norm(x)``, ``y = x + attention(u) + feed_forward(u)``: the block of BAM's seeds and of its mixtures.

    Args:
        dim, num_heads, num_kv_heads: as in :class:`HeadFrame`; heads of one expert.
        hidden: hidden width of the feed-forward of one expert.
        num_experts: 1 for a dense seed, more for a mixture.
        shared_kv, top_k: see :class:`SoftMixtureOfAttention`.
        renormalize: gates of chosen experts sum to one, see :class:`ExpertFeedForward`.
        moa: make attention a mixture too; without it only the feed-forward is one (Branch-Train-MiX).
        **settings: further settings of the attention, the same for seeds and mixtures.

    >>> block = ParallelBlock(16, 2, num_experts=3, causal=True)
    >>> sorted(block(torch.randn(2, 5, 16), returns=("losses",)).losses)
    ['balance', 'z']
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        hidden: int | None = None,
        *,
        num_experts: int = 1,
        shared_kv: bool = False,
        top_k: int | None = None,
        renormalize: bool = False,
        moa: bool = True,
        **settings: Any,
    ):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        if num_experts > 1 and moa:
            settings |= dict(num_experts=num_experts, shared_kv=shared_kv, top_k=top_k, renormalize=renormalize)
            self.attn: HeadFrame = SoftMixtureOfAttention(dim, num_heads, num_kv_heads, **settings)
        else:
            self.attn = SoftmaxAttention(dim, num_heads, num_kv_heads, **settings)
        self.ffn = ExpertFeedForward(dim, hidden, num_experts, renormalize)

    def forward(
        self, x: Tensor, *, valid: Tensor | None = None, state: State | None = None, returns: tuple[str, ...] = ()
    ) -> Any:
        """(B, N, C), or an :class:`attnlib.types.Output` with the state and the sum of both routers' losses."""
        for extra in returns:
            check_choice("returns", extra, ("state", "losses"))
        x = zero_invalid(x, valid)
        u = self.norm(x)
        asked = tuple(r for r in returns if r == "state" or self.attn.traits.losses)
        attended = self.attn(u, valid=valid, state=state, returns=asked) if asked else self.attn(u, valid=valid)
        own = attended if isinstance(attended, Output) else Output(attended)
        y, losses = self.ffn(u, valid)
        if own.losses:
            losses = {name: loss + own.losses[name] for name, loss in losses.items()}
        y = x + own.y + y
        return Output(y, state=own.state, losses=losses) if returns else y


# --------------------------------------------------------------------------------------------------------------------
# Upcycling


def _prefixes(keys: Iterable[str], leaves: Sequence[str]) -> list[str]:
    keys = set(keys)
    first = leaves[0] + ".weight"
    found = [k[: -len(first)] for k in keys if k == first or k.endswith("." + first)]
    return sorted(p for p in found if all(f"{p}{leaf}.weight" in keys for leaf in leaves))


def _mean(parts: Sequence[Tensor]) -> Tensor:
    """The mean in float64, so that the mean of copies is the copy."""
    return torch.stack([p.double() for p in parts]).mean(0).to(parts[0].dtype)


def _check_alike(state_dicts: Sequence[Mapping[str, Tensor]]) -> None:
    if not state_dicts:
        raise ValueError("state_dicts is empty; give one dense checkpoint per expert")
    first = state_dicts[0]
    for i, other in enumerate(state_dicts[1:], 1):
        if apart := sorted(set(first) ^ set(other)):
            raise ValueError(f"checkpoint {i} and checkpoint 0 are no relatives: they differ in the names {apart[:6]}")
        for key, value in first.items():
            if other[key].shape != value.shape:
                raise ValueError(
                    f"checkpoint {i} and checkpoint 0 are no relatives: {key} is {tuple(other[key].shape)} and "
                    f"{tuple(value.shape)}"
                )
            if not value.is_floating_point() and not torch.equal(other[key], value):
                raise ValueError(f"{key} of checkpoint {i} differs from checkpoint 0, and whole numbers have no mean")


def _heads_of(sd: Mapping[str, Tensor], prefix: str, num_heads: int) -> None:
    """Raise unless the checkpoint's attention can have this many heads."""
    rows = sd[prefix + "q.weight"].shape[0]
    check_divides("num_heads", num_heads, f"rows of {prefix}q.weight", rows)
    width = rows // num_heads
    for name in ("k", "v"):
        keys = sd[f"{prefix}{name}.weight"].shape[0]
        if keys % width or num_heads % (keys // width):
            raise ValueError(
                f"{prefix}{name}.weight has {keys} rows: with num_heads={num_heads} heads are {width} wide, and "
                f"{keys / width:g} key/value heads do not divide {num_heads} query heads"
            )


def upcycle(
    state_dicts: Sequence[Mapping[str, Tensor]],
    num_heads: int,
    *,
    shared_kv: bool = False,
    ffn_experts: bool = False,
    attention_experts: bool = True,
    router_std: float = 0.02,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Dense checkpoints, one per expert (the seed included), as the state dict of a mixture.

    Every attention module (``q, k, v, proj``) becomes a :class:`SoftMixtureOfAttention`, its experts copied; with
    ``ffn_experts`` every feed-forward (``gate, up, down``) becomes an :class:`ExpertFeedForward`; every other tensor
    (norms, embeddings, shared keys and values) is the mean of all checkpoints; routers are random.

    Args:
        state_dicts: of modules or whole models with the same names and shapes.
        num_heads: query heads of one dense attention.
        shared_kv: the mixture shares keys and values: their projections are means.
        ffn_experts: make feed-forward experts too. Needs parallel blocks, like :class:`ParallelBlock`.
        attention_experts: ``False`` averages attention (Branch-Train-MiX).
        router_std: standard deviation of router weights.
        generator: for the routers.

    Raises:
        ValueError: checkpoints that are no relatives, heads that do not divide, no attention to upcycle, or sequential
            blocks with ``ffn_experts`` (they cannot give the parallel block).

    >>> dense = SoftmaxAttention(dim=16, num_heads=2)
    >>> mixture = SoftMixtureOfAttention(dim=16, num_heads=2, num_experts=3)
    >>> mixture.load_state_dict(upcycle([dense.state_dict()] * 3, num_heads=2))
    <All keys matched successfully>
    """
    _check_alike(state_dicts)
    first, experts = state_dicts[0], len(state_dicts)
    attentions = _prefixes(first, ("q", "k", "v", "proj")) if attention_experts else []
    ffns = _prefixes(first, ("gate", "up", "down")) if ffn_experts else []
    if attention_experts and not attentions:
        raise ValueError(f"no attention (q, k, v, proj) among the names of the state dicts: {sorted(first)[:6]}")
    if ffn_experts and not ffns:
        raise ValueError(f"no feed-forward (gate, up, down) among the names of the state dicts: {sorted(first)[:6]}")
    for prefix in ffns:
        parent = prefix[:-1].rpartition(".")[0]
        norms = [k for k in first if k.endswith(".weight") and k[: -len(".weight")].rpartition(".")[0] == parent]
        norms = [k for k in norms if first[k].dim() == 1]
        if len(norms) > 1:
            raise ValueError(
                f"{parent} is a sequential block, with the norms {norms}: its attention and feed-forward read "
                "different tokens, so it cannot become a parallel block of experts; use ffn_experts=False"
            )

    out: dict[str, Tensor] = {}

    def take(key: str) -> list[Tensor]:
        done.add(key)
        return [sd[key] for sd in state_dicts]

    def router(prefix: str, like: Tensor) -> None:
        weight = torch.randn(experts, like.shape[1], generator=generator) * router_std
        out[prefix + "router.weight"] = weight.to(like)

    done: set[str] = set()
    for prefix in attentions:
        _heads_of(first, prefix, num_heads)
        for name in ("q", "k", "v"):
            for kind in ("weight", "bias"):
                if (key := f"{prefix}{name}.{kind}") in first:
                    out[key] = _mean(take(key)) if shared_kv and name != "q" else torch.cat(take(key))
        out[prefix + "proj.weight"] = torch.cat(take(prefix + "proj.weight"), 1)
        if prefix + "proj.bias" in first:
            out[prefix + "proj_bias"] = torch.stack(take(prefix + "proj.bias"))
        router(prefix, first[prefix + "q.weight"])
    for prefix in ffns:
        for name, axis in (("gate", 0), ("up", 0), ("down", 1)):
            out[f"{prefix}{name}.weight"] = torch.cat(take(f"{prefix}{name}.weight"), axis)
        if experts > 1:
            router(prefix, first[prefix + "gate.weight"])
    for key, value in first.items():
        if key not in done:
            out[key] = _mean([sd[key] for sd in state_dicts]) if value.is_floating_point() else value.clone()
    return out
