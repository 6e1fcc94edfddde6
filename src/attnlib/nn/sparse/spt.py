"""SPT: attention to the keys whose codes match the query's, and MLPs of which every token uses some blocks.

Gui et al., 2023, "SPT: Fine-Tuning Transformer-based Language Models Efficiently with Sparsification", arXiv
2312.10365. Queries and keys of a head are cut into M parts of d' channels, each coded by the nearest of E codewords (in
L1), ``c_m(z) = argmin_e |z_m - w_me|``. Query i reads, of the keys j <= i, the K = N // 8 that match best:

    match(i, j) = #{m : c_m(q_i) = c_m(k_j)},  in four steps, earlier keys first where steps are equal,
    y_i = softmax_{j in S_i}(q_i . k_j / sqrt(D)) v_j

No gradient passes the choice. Codebooks learn from ``codebook``, the mean squares of ``softmax_e(-log |z_m - w_me|) w``
and of ``z`` from the nearest codeword, for queries and keys.

:class:`RoutedMlp` cuts the hidden width into blocks; a router takes the best half of them for every token.

Differs from the authors' code, CUDA kernels: any length; rows with fewer than K keys read these, where theirs fill up
with further copies of key 0; one ranking of all keys, where theirs ranks those of equal ``j mod 4`` apart and takes
K / 4 of each; scores are clamped to +-10 with ``clamp=10`` alone, since without that attention is our executor's, whose
memory is linear in N.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import masks
from ...checks import check_divides, check_flag, check_int, check_real
from ...ops import attention
from ...ops.block_sparse import BlockPlan, block_sparse_attention, gather_blocks
from ...positions import rotary_angles, rotate
from ...types import Output, Plan, State, Traits
from ..base import Mechanism
from ..layers import head_dim_of, merge_heads, split_heads
from ..linear.heads import HeadMixer, softmax_map
from ..registry import register
from ..released import PLAIN, Released

#: Pairs of one piece of the map of matches.
HELD = 1 << 22


class Codebook(nn.Module):
    """Product quantization: ``parts`` times ``codewords`` vectors of ``width`` channels.

    >>> book = Codebook(2, 4, 3)
    >>> book.codes(torch.zeros(5, 6)).shape
    torch.Size([5, 2])
    """

    def __init__(self, parts: int, codewords: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(parts, codewords, width))

    def distances(self, z: Tensor) -> Tensor:
        """(.., parts * width) -> (.., parts, codewords), in L1."""
        parts, _, width = self.weight.shape
        flat = z.reshape(-1, parts, width).transpose(0, 1)
        dtype = torch.promote_types(z.dtype, torch.float32)
        found = torch.cdist(flat.to(dtype), self.weight.to(dtype), p=1.0)
        return found.transpose(0, 1).unflatten(0, z.shape[:-1]).to(z.dtype)

    @torch.no_grad()
    def codes(self, z: Tensor) -> Tensor:
        """(.., parts * width) -> (.., parts) numbers of the nearest codewords."""
        return self.distances(z).argmin(-1)

    def loss(self, z: Tensor, exists: Tensor | None = None) -> Tensor:
        """Of vectors (.., parts * width): soft codewords to the nearest one, and vectors to it.

        Args:
            z: the vectors.
            exists: (..) boolean, broadcast: which count.
        """
        parts, _, width = self.weight.shape
        distances = self.distances(z)
        nearest = distances.argmin(-1)
        hard = self.weight[torch.arange(parts, device=z.device), nearest]
        soft = torch.einsum("...me,mew->...mw", (-distances.clamp(min=1e-5).log()).softmax(-1), self.weight)
        own = z.unflatten(-1, (parts, width))
        error = (soft - hard).square() + (own - hard).square()
        if exists is None:
            return error.mean()
        error = error.flatten(-2).mean(-1)
        exists = exists.expand(error.shape)
        return error.masked_fill(~exists, 0.0).sum() / exists.sum().clamp(min=1)


@torch.no_grad()
def matching_keys(
    q: Tensor,
    k: Tensor,
    codewords: int,
    keep: int,
    steps: int = 4,
    valid: Tensor | None = None,
    limit: Tensor | None = None,
) -> BlockPlan:
    """The keys that match best for every query, none later than it.

    Args:
        q, k: (B, H, N, M) codes.
        codewords: of a part.
        keep: keys of a query.
        steps: matches count in so many steps; keys of one step go by position.
        valid: (B, N) boolean, which keys exist.
        limit: (B,) keys of a query, where samples have fewer.

    >>> q = torch.tensor([[0, 1], [0, 1], [1, 1]])[None, None]
    >>> matching_keys(q, q, 2, 1).index.flatten().tolist()
    [0, 0, 2]
    """
    batch, heads, n, parts = q.shape
    ones = F.one_hot(k, codewords).flatten(-2).to(torch.float32).transpose(-2, -1)
    size, keep = max(1, parts // steps), min(keep, n)
    at = torch.arange(n, device=q.device)
    per = n if torch.compiler.is_compiling() else max(1, HELD // max(1, batch * heads * n))
    index, count = [], []
    for start in range(0, n, per):
        rows = at[start : start + per]
        matches = F.one_hot(q[:, :, rows], codewords).flatten(-2).to(torch.float32) @ ones
        step = (matches / size).floor().clamp(max=steps - 1).long()
        allowed = at <= rows[:, None]
        if valid is not None:
            allowed = allowed & valid[:, None, None]
        score = (step * n + (n - 1 - at)).masked_fill(~allowed, -1)
        best = score.topk(keep, -1)
        index.append(best.indices)
        count.append((best.values >= 0).sum(-1))
    counts = torch.cat(count, 2)
    if limit is not None:
        counts = torch.minimum(counts, limit[:, None, None])
    return BlockPlan(torch.cat(index, 2), 1, 1, n, count=counts)


def choose_keys(
    book: Codebook, q: Tensor, k: Tensor, coeff: int, steps: int = 4, valid: Tensor | None = None
) -> BlockPlan:
    """The ``N // coeff`` keys, at least one, whose codes match best, for every query.

    Args:
        book: codes queries (B, H, N, D) and keys (B, Hk, N, D).
        q, k: with their positions.
        coeff, steps: of :class:`SPTAttention`.
        valid: (B, N) boolean, which tokens exist; a sample's own count decides how many keys its queries read.
    """
    codes = book.codes(k).repeat_interleave(q.shape[1] // k.shape[1], 1)
    limit = None if valid is None else valid.sum(1).div(coeff, rounding_mode="floor").clamp(min=1)
    keep = max(1, q.shape[2] // coeff)
    return matching_keys(book.codes(q), codes, book.weight.shape[1], keep, steps, valid, limit)


def read_keys(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, clamp: float | None = None,
    valid: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(B, H, N, Dv): softmax over the keys of a plan; with ``clamp``, keys and values are copied out for every pair."""
    if clamp is None:
        return block_sparse_attention(q, k, v, plan, valid=valid, scale=scale)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    keys, values = (gather_blocks(t, plan).squeeze(-2) for t in (k, v))
    scores = torch.einsum("bhnd,bhnkd->bhnk", q, keys).mul(scale).clamp(-clamp, clamp)
    kept = plan.slots()
    weights = scores.masked_fill(~kept, float("-inf")).softmax(-1)
    weights = weights.masked_fill(~kept, 0.0)  # a row of none
    return torch.einsum("bhnk,bhnkd->bhnd", weights, values)


class SPTHeads(HeadMixer):
    """Heads that read the keys whose codes match, as a mixer for models that exist.

    Their codebook, one for all heads of a layer, learns from :meth:`own_losses`; nothing else is trained. The release
    keeps no cache, and how many keys a query reads depends on the whole length, so that there is none here.

    Args:
        num_heads, head_dim, num_kv_heads, causal, scale: as of :class:`attnlib.nn.linear.heads.HeadMixer`; always
            causal.
        coeff, codeword_dim, num_codewords, steps, clamp, dense: of :class:`SPTAttention`.

    >>> heads = SPTHeads(4, 16, 2)
    >>> q, k = torch.randn(1, 4, 20, 16), torch.randn(1, 2, 20, 16)
    >>> heads(q, k, k)[0].shape, list(heads.own_losses(q, k))
    (torch.Size([1, 4, 20, 16]), ['codebook'])
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None = None,
        causal: bool = True,
        scale: float | None = None,
        coeff: int = 8,
        codeword_dim: int = 8,
        num_codewords: int = 16,
        steps: int = 4,
        clamp: float | None = None,
        dense: bool = False,
    ):
        super().__init__(num_heads, head_dim, num_kv_heads, causal, scale)
        if not causal:
            raise ValueError("causal=False is not possible: keys are chosen among those before the query")
        check_divides("codeword_dim", check_int("codeword_dim", codeword_dim, least=1), "head_dim", head_dim)
        self.coeff, self.steps = check_int("coeff", coeff, least=1), check_int("steps", steps, least=1)
        self.clamp = None if clamp is None else check_real("clamp", clamp, above=0)
        self.dense = check_flag("dense", dense)
        check_int("num_codewords", num_codewords, least=1)
        self.codebook = Codebook(head_dim // codeword_dim, num_codewords, codeword_dim)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, valid: Tensor | None = None, state: State | None = None,
        keep: bool = False,
    ) -> tuple[Tensor, State | None]:  # fmt: skip
        if keep or state is not None:
            raise ValueError("SPT's attention keeps no state: call the model with use_cache=False")
        if self.dense:
            return attention(q, k, v, mask=masks.causal(), valid=valid, scale=self.scale), None
        plan = choose_keys(self.codebook, q, k, self.coeff, self.steps, valid)
        return read_keys(q, k, v, plan, self.scale, self.clamp, valid), None

    def weights(self, q: Tensor, k: Tensor, *, valid: Tensor | None = None) -> Tensor:
        """The (B, H, N, N) map; quadratic, for reports."""
        if self.dense:
            return softmax_map(q, k, k, self.scale, True, valid)[1]
        plan = choose_keys(self.codebook, q, k, self.coeff, self.steps, valid)
        unit = torch.eye(k.shape[2], dtype=q.dtype, device=q.device).expand(*k.shape[:2], -1, -1)
        return read_keys(q, k, unit, plan, self.scale, self.clamp, valid)

    def own_losses(self, q: Tensor, k: Tensor, valid: Tensor | None = None) -> dict[str, Tensor]:
        exists = None if valid is None else valid[:, None]
        return {"codebook": self.codebook.loss(q, exists) + self.codebook.loss(k, exists)}


@register("spt-sparse-finetuning", "spt")
class SPTAttention(Mechanism):
    """Causal attention to the keys whose product-quantized codes match the query's.

    Args:
        dim: width of ``x``.
        num_heads: heads.
        coeff: queries read one of so many keys, N // coeff of them and at least one; 1 is dense attention.
        codeword_dim: channels of a codeword; must divide the width of a head.
        num_codewords: codewords of a part.
        steps: matches count in so many steps.
        clamp: scores stay within +-clamp; the authors have 10. ``None`` for any.
        dense: attention is dense while codebooks learn, as the authors' first phase; the attribute can be changed.
        rotary: base of the rotary positions; ``None`` for none.
        qkv_bias, proj_bias: biases of the projections.
        scale: of the scores; ``head_dim ** -0.5`` by default.

    Reference: Gui et al., 2023, arXiv 2312.10365, section 3.1.

    >>> m = SPTAttention(dim=16, num_heads=2, codeword_dim=4)
    >>> m(torch.randn(1, 20, 16)).shape, m.plan(torch.randn(1, 20, 16)).index.shape
    (torch.Size([1, 20, 16]), torch.Size([1, 2, 20, 2]))
    """

    class_traits = Traits(
        patterns=frozenset({"causal-self"}), work={"N": 2}, memory={"N": 2}, gradient="stopped", needs_plan=True,
        losses=("codebook",),
    )  # fmt: skip

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        coeff: int = 8,
        codeword_dim: int = 8,
        num_codewords: int = 16,
        steps: int = 4,
        clamp: float | None = None,
        dense: bool = False,
        rotary: float | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        scale: float | None = None,
    ):
        super().__init__(dim)
        self.num_heads, self.head_dim = num_heads, head_dim_of(dim, num_heads)
        check_divides("codeword_dim", codeword_dim, "head_dim", self.head_dim)
        self.coeff, self.steps = check_int("coeff", coeff, least=1), check_int("steps", steps, least=1)
        self.num_codewords = check_int("num_codewords", num_codewords, least=1)
        self.clamp = None if clamp is None else check_real("clamp", clamp, above=0)
        self.dense, self.rotary = check_flag("dense", dense), rotary
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.k = nn.Linear(dim, dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.codebook = Codebook(self.head_dim // codeword_dim, num_codewords, codeword_dim)

    @property
    def traits(self) -> Traits:
        return self.class_traits.but(needs_plan=False, gradient="exact") if self.dense else self.class_traits

    def _heads(self, x: Tensor, valid: Tensor | None) -> list[Tensor]:
        q, k, v = (split_heads(f(x), self.num_heads) for f in (self.q, self.k, self.v))
        if self.rotary is None:
            return [q, k, v]
        at = torch.arange(x.shape[1], device=x.device) if valid is None else valid.long().cumsum(1) - 1
        angles = rotary_angles(at if at.dim() > 1 else at[None], self.head_dim, self.rotary)
        return [rotate(q, angles), rotate(k, angles), v]

    def _choose(self, q: Tensor, k: Tensor, valid: Tensor | None) -> BlockPlan:
        return choose_keys(self.codebook, q, k, self.coeff, self.steps, valid)

    def make_plan(self, x: Tensor, *, valid: Tensor | None = None) -> Plan:  # type: ignore[override]
        if self.dense:
            raise ValueError(f"{self._name()} is dense, so it has no plan")
        q, k, _ = self._heads(x, valid)
        return self._choose(q, k, valid)

    def mix(  # type: ignore[override]
        self, x: Tensor, *, valid: Tensor | None = None, plan: Plan | None = None, returns: tuple[str, ...] = ()
    ) -> Output:
        q, k, v = self._heads(x, valid)
        losses = None
        if "losses" in returns:
            exists = None if valid is None else valid[:, None]
            losses = {"codebook": self.codebook.loss(q, exists) + self.codebook.loss(k, exists)}
        if self.dense:
            out = attention(q, k, v, mask=masks.causal(), valid=valid, scale=self.scale)
            return Output(self.proj(merge_heads(out)), losses=losses)
        chosen = self._choose(q, k, valid) if plan is None else plan
        if not isinstance(chosen, BlockPlan):
            raise TypeError(f"plan must be a BlockPlan made by m.plan(x), got {type(chosen).__name__}")
        chosen.expect("blocks", N=q.shape[2], M=k.shape[2], q_block=1, k_block=1)
        out = read_keys(q, k, v, chosen, self.scale, self.clamp, valid)
        return Output(self.proj(merge_heads(out)), losses=losses)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From ``quantizer.weight`` of the authors' attention, beside projections of this module's names."""
        theirs = Released(state_dict, "SPT's attention")
        theirs.leave(r"(?:.*\.)?trigger", because="it says when codebooks are refreshed")
        return theirs.close(theirs.renamed({r"quantizer\.weight": "codebook.weight"} | PLAIN))


class LowRank(nn.Module):
    """``x -> (x L) R^T`` from zero: what is learned beside a frozen map."""

    def __init__(self, dim: int, out_dim: int, rank: int):
        super().__init__()
        self.left = nn.Parameter(torch.randn(dim, rank))
        self.right = nn.Parameter(torch.zeros(out_dim, rank))


class RoutedMlp(nn.Module):
    """An MLP of which every token uses the blocks of the hidden width that a router likes best.

    With ``r = sigmoid(router(x))`` and the ``active`` largest of the blocks g::

        h_g = act(2 r_g (W1_g x + b1_g) + LoRA1_g x),   y = sum_g (2 r_g W2_g h_g + LoRA2_g h_g) + b2,

    and gated, ``h_g = act(2 r_g Wg_g x + LoRAg_g x) * (2 r_g W1_g x + LoRA1_g x)``. Without a rank there is no factor
    ``2 r_g``, so that the router gets no gradient, as the authors' class has it; ``scaled`` says otherwise.

    Args:
        dim: width of ``x``.
        hidden: hidden width.
        blocks: that it is cut into; must divide it.
        active: blocks of a token; half of them by default.
        rank: of what is learned beside the frozen maps; 0 for none, and maps that are trained themselves.
        gated: with a gate, and no biases, as in LLaMA.
        activation: makes the activation.
        scaled: the factor ``2 r_g``; with a rank by default.

    Reference: Gui et al., 2023, arXiv 2312.10365, section 3.2.

    >>> RoutedMlp(8, 32, 4)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        blocks: int,
        active: int | None = None,
        rank: int = 16,
        gated: bool = False,
        activation: Callable[[], nn.Module] = nn.ReLU,
        scaled: bool | None = None,
    ):
        super().__init__()
        check_divides("blocks", check_int("blocks", blocks, least=1), "hidden", check_int("hidden", hidden, least=1))
        self.blocks = blocks
        self.active = check_int("active", max(1, blocks // 2) if active is None else active, least=1, most=blocks)
        self.rank = check_int("rank", rank, least=0)
        self.scaled = bool(rank) if scaled is None else check_flag("scaled", scaled)
        bias = not gated
        self.gate = nn.Linear(dim, hidden, bias=False) if gated else None
        self.fc1, self.fc2 = nn.Linear(dim, hidden, bias=bias), nn.Linear(hidden, dim, bias=bias)
        self.router = nn.Linear(dim, blocks)
        self.act = activation()
        self.lora_gate = LowRank(dim, hidden, rank) if rank and gated else None
        self.lora1 = LowRank(dim, hidden, rank) if rank else None
        self.lora2 = LowRank(hidden, dim, rank) if rank else None
        if rank:
            for base in (self.gate, self.fc1, self.fc2):
                if base is not None:
                    base.requires_grad_(False)

    @classmethod
    def of(
        cls, fc1: nn.Linear, fc2: nn.Linear, gate: nn.Linear | None = None, activation: nn.Module | None = None,
        **options: Any,
    ) -> RoutedMlp:  # fmt: skip
        """From the maps of an MLP that exists, which it holds, frozen where ``rank`` is not 0."""
        act = nn.ReLU() if activation is None else activation
        out = cls(fc1.in_features, fc1.out_features, gated=gate is not None, activation=lambda: act, **options)
        like = fc1.weight
        out.to(like.device, like.dtype)
        out.fc1, out.fc2, out.gate = fc1, fc2, gate
        if out.rank:
            for base in (fc1, fc2, gate):
                if base is not None:
                    base.requires_grad_(False)
        return out

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(T, dim) -> numbers of the blocks of every token (T, active), and what the router thinks of all."""
        prob = self.router(x).sigmoid()
        return prob.topk(self.active, -1).indices, prob

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(.., dim) -> the same."""
        flat = x.reshape(-1, x.shape[-1])
        chosen, prob = self.route(flat)
        used = torch.zeros_like(prob, dtype=torch.bool).scatter(1, chosen, True)
        size = self.fc1.out_features // self.blocks
        shared = [None if lora is None else flat @ lora.left for lora in (self.lora_gate, self.lora1)]
        out = torch.zeros_like(flat)
        for g in range(self.blocks):
            rows = used[:, g].nonzero().squeeze(-1)
            if not rows.numel():
                continue
            part = slice(g * size, (g + 1) * size)
            some, factor = flat[rows], 2 * prob[rows, g, None] if self.scaled else None

            def up(layer: nn.Linear, lora: LowRank | None, low: Tensor | None) -> Tensor:
                made = F.linear(some, layer.weight[part], None if layer.bias is None else layer.bias[part])  # noqa: B023
                made = made if factor is None else factor * made  # noqa: B023
                return made if lora is None or low is None else made + low[rows] @ lora.right[part].T  # noqa: B023

            hidden = up(self.fc1, self.lora1, shared[1])
            hidden = (
                self.act(hidden) if self.gate is None else self.act(up(self.gate, self.lora_gate, shared[0])) * hidden
            )
            down = F.linear(hidden, self.fc2.weight[:, part])
            down = down if factor is None else factor * down
            if self.lora2 is not None:
                down = down + (hidden @ self.lora2.left[part]) @ self.lora2.right.T
            out = out.index_add(0, rows, down)
        if self.fc2.bias is not None:
            out = out + self.fc2.bias
        return out.reshape(x.shape)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``RoutedFFN``, ``RoutedLLaMaFFN`` and their LoRA forms."""
        theirs = Released(state_dict, "SPT's routed feed-forward")
        gated = any(name.startswith("gate.") for name in theirs)
        names = {"gate": "gate", "side": "fc1", "down": "fc2"} if gated else {"fc1": "fc1", "fc2": "fc2"}
        loras = {"gate": "lora_gate", "fc1": "lora1", "fc2": "lora2"}
        rules: dict[str, Any] = {r"router\.0\.(weight|bias)": r"router.\1"}
        for old, new in names.items():
            rules[rf"{old}\.(weight|bias)"] = rf"{new}.\1"
            rules[rf"{old}\.lora\.(left|right)\.weight"] = rf"{loras[new]}.\1"
        return theirs.close(theirs.renamed(rules))
