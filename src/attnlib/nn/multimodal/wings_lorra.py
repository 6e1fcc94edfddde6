"""Low-rank residual attention beside a model's own: visual and textual learners (Wings, Zhang et al., 2024)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_real
from ...masks import Mask
from ...ops import attention
from ...positions import rotary_angles, rotate
from ...types import Output, Traits, check_choice, check_rank, check_width
from ..base import Mechanism
from ..layers import QuickGELU, flat_valid, head_dim_of, merge_heads, plain, split_heads, zero_invalid
from ..registry import register
from ..released import Released, Rule


def _low_rank(dim: int, rank: int) -> nn.Sequential:
    pair = nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, dim, bias=False))
    nn.init.trunc_normal_(pair[0].weight, std=0.02)  # type: ignore[arg-type]
    nn.init.zeros_(pair[1].weight)  # type: ignore[arg-type]
    return pair


@register("wings-lorra", "lorra", "low-rank-residual-attention")
class LowRankResidualAttention(Mechanism):
    """Cross-attention whose projections are the identity plus a low-rank map.

    ``q = h + h A_q B_q``, ``k = E + E A_k B_k``, ``v = E + E A_v B_v``, ``y = softmax(q k^T / sqrt(D)) v A_o B_o`` for
    states ``h`` and features ``E`` of the same width. Every ``B`` starts at zero, so a fresh learner adds nothing, and
    ``B_o`` gets the first gradient. Rotary positions are those that queries and features had in the sequence; as a
    mechanism of its own both count from zero.

    Args:
        dim: width of states and of features.
        num_heads: heads. Queries, keys and values have the same number: features are added to keys as they are.
        num_kv_heads: refused unless equal to ``num_heads``.
        rank: ``r`` (8 in the authors' class, 64 in their training).
        rotary: base of rotary positions; ``None`` for none.
        attn_drop: dropout of the weights in training.

    Without projections the products of a deep layer's states can be large; weights are computed in float32.

    Reference: Zhang et al., 2024, arXiv 2406.03496, section 3.2.

    >>> learner = LowRankResidualAttention(dim=16, num_heads=2, rank=4)
    >>> float(learner(torch.randn(1, 3, 16), torch.randn(1, 5, 16)).detach().abs().max())
    0.0
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-cross"}),
        grid_ranks=frozenset({1, 2, 3}),
        mask=True,
        work={"N": 2},
        memory={"N": 1},
        permutation_equivariant=True,
        weights=True,
    )

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        rank: int = 8,
        rotary: float | None = None,
        attn_drop: float = 0.0,
    ):
        super().__init__(dim)
        self.num_heads, self.head_dim = num_heads, head_dim_of(dim, num_heads)
        if num_kv_heads is not None and num_kv_heads != num_heads:
            raise ValueError(
                f"num_kv_heads={num_kv_heads} must equal num_heads={num_heads}: a low-rank map is added to features of "
                "the full width, so keys cannot have fewer heads"
            )
        if rank < 1:
            raise ValueError(f"rank={rank} must be at least 1")
        self.rotary, self.attn_drop = rotary, check_real("attn_drop", attn_drop, least=0.0, most=1.0)
        self.q, self.k, self.v, self.proj = (_low_rank(dim, rank) for _ in range(4))

    @property
    def traits(self) -> Traits:
        if self.rotary is None:
            return self.class_traits
        return self.class_traits.but(permutation_equivariant=False, grid_ranks=frozenset({1}))

    def attend(
        self,
        h: Tensor,
        features: Tensor,
        q_pos: Tensor | None = None,
        k_pos: Tensor | None = None,
        *,
        valid: Tensor | None = None,
        mask: Mask | Tensor | None = None,
        bias: Tensor | None = None,
        return_weights: bool = False,
    ) -> Any:
        """The learner on states of a sequence.

        Args:
            h: (B, N, C).
            features: (B, M, C).
            q_pos: (N,) or (B, N) positions of the states; from zero by default.
            k_pos: (M,) or (B, M) positions of the features.
            valid: (B, M) boolean, which features exist; a sample without any gets zeros.
            mask: which pairs meet: a mask compares positions, a boolean (B or 1, H or 1, N, M) speaks of indices.
            bias: (B or 1, H or 1, N, M) added to the scaled scores, in the eager backend.
            return_weights: also return (B, H, N, M).
        """
        features = zero_invalid(features, valid)
        q, k, v = (
            split_heads(t + f(t), self.num_heads) for t, f in ((h, self.q), (features, self.k), (features, self.v))
        )
        if self.rotary is not None:
            q_pos = torch.arange(h.shape[1], device=h.device) if q_pos is None else q_pos
            k_pos = torch.arange(features.shape[1], device=h.device) if k_pos is None else k_pos
            q = rotate(q, rotary_angles(q_pos, self.head_dim, self.rotary))
            k = rotate(k, rotary_angles(k_pos, self.head_dim, self.rotary))
        call: dict[str, Any] = dict(mask=mask, valid=valid, bias=bias)
        if bias is not None:
            # Where all scores of a row are lowered out of reach, torch's CPU kernel has a wrong gradient.
            call["backend"] = "eager"
        if self.training and self.attn_drop:
            call["dropout_p"] = self.attn_drop
        if isinstance(mask, Mask):
            call |= dict(q_pos=q_pos, k_pos=k_pos)
        weights = None
        if return_weights:
            out, weights = attention(q, k, v, return_weights=True, **call)
        else:
            out = attention(q, k, v, **call)
        y = self.proj(merge_heads(out))
        return (y, weights) if return_weights else y

    def mix(  # type: ignore[override]
        self,
        x: Tensor,
        context: Tensor,
        *,
        context_valid: Tensor | None = None,
        mask: Mask | None = None,
        returns: tuple[str, ...] = (),
    ) -> Output:
        asked = "weights" in returns
        result = self.attend(
            x.flatten(1, -2), context.flatten(1, -2), valid=flat_valid(context_valid), mask=mask, return_weights=asked
        )
        y, weights = result if asked else (result, None)
        return Output(y.view(x.shape), weights=weights)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``WingsAttention`` (``q_proj.0.weight`` and so on)."""
        theirs = Released(state_dict, "WingsAttention")
        theirs.leave(r"(?:\w+\.)?rotary_emb\.\w+", because="a setting here: the rotary base")
        return theirs.close(theirs.renamed(_learner_rules("", "")))


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


#: By transformers' names, from which the authors' router chooses.
ROUTER_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "swish": F.silu, "relu": F.relu, "relu2": lambda x: F.relu(x).square(), "relu6": F.relu6,
    "leaky_relu": F.leaky_relu, "gelu": F.gelu, "gelu_new": _gelu_tanh, "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": QuickGELU(), "mish": F.mish, "sigmoid": torch.sigmoid, "tanh": torch.tanh,
    "linear": lambda x: x,
}  # fmt: skip


class LearnerRouter(nn.Module):
    """Weighs two learners per token by what the layer's own attention looks at.

    ``w = softmax(silu(a W + b))`` with ``a`` (N, keys) the attention weights summed over heads; the first ``keys`` rows
    of ``W`` are used, so the router knows absolute positions up to ``max_keys``.

    Args:
        max_keys: longest sequence.
        activation: ``"silu"``, as above, or another of :data:`ROUTER_ACTIVATIONS`.

    >>> LearnerRouter(8)(torch.rand(2, 3, 4)).sum(-1).allclose(torch.ones(2, 3))
    True
    """

    def __init__(self, max_keys: int = 4096, activation: str = "silu"):
        super().__init__()
        check_choice("activation", activation, ROUTER_ACTIVATIONS)
        self.activation = activation
        if max_keys < 1:
            raise ValueError(f"max_keys={max_keys} must be at least 1")
        self.max_keys = max_keys
        self.linear = nn.Linear(max_keys, 2)

    def forward(self, attended: Tensor) -> Tensor:
        """(B, N, M) weights summed over heads to (B, N, 2) weights of the visual and the textual learner."""
        count = attended.shape[-1]
        if count > self.max_keys:
            raise ValueError(f"the router knows {self.max_keys} keys (max_keys), this layer attends to {count}")
        if plain(self.linear):
            weight = self.linear.weight[:, :count]
            logits = F.linear(attended.to(weight.dtype), weight, self.linear.bias)
        else:
            logits = self.linear(F.pad(attended, (0, self.max_keys - count)))
        return ROUTER_ACTIVATIONS[self.activation](logits).softmax(-1)


class LayerWings(nn.Module):
    """The learners of one decoder layer, and their router.

    Args:
        dim, num_heads, rank, rotary: of :class:`LowRankResidualAttention`.
        textual: a textual learner and a router beside the visual learner (the second stage of training).
        max_keys, activation: of :class:`LearnerRouter`.
        attn_drop: of :class:`LowRankResidualAttention`.
        compat: ``"authors"`` adds both learners twice, as the authors' released layer does, and gives the textual
            learner their mask: state at slot i reads the first i + 1 tokens of the text, wherever they stand, so that
            behind an image it reads text that follows, and a state that may read nothing reads all of it alike.

    >>> sum(p.numel() for p in LayerWings(32, 4, rank=2, textual=False).parameters()) == 8 * 32 * 2
    True
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        rank: int = 64,
        rotary: float | None = 10000.0,
        textual: bool = True,
        max_keys: int = 4096,
        compat: str | None = None,
        activation: str = "silu",
        attn_drop: float = 0.0,
    ):
        super().__init__()
        check_choice("compat", compat, (None, "authors"))
        self.dim, self.compat = dim, compat
        settings: dict[str, Any] = dict(rank=rank, rotary=rotary, attn_drop=attn_drop)
        self.visual = LowRankResidualAttention(dim, num_heads, **settings)
        self.textual = LowRankResidualAttention(dim, num_heads, **settings) if textual else None
        self.router = LearnerRouter(max_keys, activation) if textual else None

    def forward(
        self,
        h: Tensor,
        image: Tensor | None = None,
        text: Tensor | None = None,
        attended: Tensor | None = None,
        *,
        q_pos: Tensor | None = None,
        image_pos: Tensor | None = None,
        text_pos: Tensor | None = None,
        image_valid: Tensor | None = None,
        text_valid: Tensor | None = None,
        mask: Tensor | None = None,
        text_padding: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """What is added to the states after attention.

        Args:
            h: (B, N, C) residual plus attention.
            image: (B, P, C) projected image features, ``None`` without an image.
            text: (B, M, C) input embeddings of the text.
            attended: (B, N, keys) attention weights summed over heads; needed when both learners act.
            q_pos, image_pos, text_pos: (.., N), (.., P), (.., M) slots in the sequence; text reads earlier text only.
            image_valid, text_valid: which features exist.
            mask: (B or 1, N, L) boolean, which slots of the sequence each state may read; by default those up to its
                own. The textual learner goes by it.
            text_padding: with ``compat="authors"`` only, how many of the M text tokens of each sample fill up the
                batch, as their layer is told: so many of the last states read all text alike, and samples without
                such tokens get the visual learner once instead of twice.

        Returns:
            (B, N, C); samples without an image get the textual learner alone, and those without text the visual one,
            not weighed by the router, whatever is in the batch beside them (with ``compat="authors"``: weighed).
        """
        check_width("h", h, self.dim)
        seen = None
        if image is not None:
            seen = self.visual.attend(h, image, q_pos, image_pos, valid=image_valid)
        if self.textual is None or text is None:
            return torch.zeros_like(h) if seen is None else seen
        q_pos = torch.arange(h.shape[1], device=h.device) if q_pos is None else q_pos
        text_pos = torch.arange(text.shape[1], device=h.device) if text_pos is None else text_pos
        before = self._before(h, text, q_pos, text_pos, mask)
        twice: float | Tensor = 1.0
        if text_padding is not None:
            if self.compat is None:
                raise ValueError("text_padding is a slip of the authors' layer; it needs compat='authors'")
            fill = torch.as_tensor(text_padding, device=h.device)
            if fill.shape != h.shape[:1]:
                raise ValueError(
                    f"text_padding must be one number for each of {h.shape[0]} samples, got {text_padding}"
                )
            twice = (fill > 0).to(h.dtype)[:, None, None]
            rows = torch.arange(h.shape[1], device=h.device)
            before = before & (rows < h.shape[1] - fill[:, None])[:, None, :, None]
        if self.compat == "authors":
            # Their mask is a number, so that a state without anything to read does not see what it hides.
            low = torch.zeros(before.shape, dtype=h.dtype, device=h.device)
            low = low.masked_fill(~before, torch.finfo(h.dtype).min)
            read = self.textual.attend(h, text, q_pos, text_pos, valid=text_valid, bias=low)
        else:
            read = self.textual.attend(h, text, q_pos, text_pos, valid=text_valid, mask=before)
        if seen is None:
            return read
        if attended is None:
            raise ValueError("attended is needed when both learners act: the layer's weights, summed over heads")
        assert self.router is not None
        weigh = self.router(attended).to(h.dtype)
        if self.compat is None:  # whoever has one kind of features alone is told by its learner alone, in any batch
            for valid, other in ((image_valid, (0.0, 1.0)), (text_valid, (1.0, 0.0))):
                if valid is not None:
                    has = valid.any(-1).view(-1, 1, 1)
                    weigh = torch.where(has, weigh, torch.tensor(other, dtype=h.dtype, device=h.device))
        seen, read = weigh[..., :1] * seen, weigh[..., 1:] * read
        return (1 + twice) * seen + 2 * read if self.compat == "authors" else seen + read

    def _before(self, h: Tensor, text: Tensor, q_pos: Tensor, text_pos: Tensor, mask: Tensor | None) -> Tensor:
        """(B, 1, N, M) boolean: which text tokens each state may read."""
        count = text.shape[1]
        if mask is None:
            last = torch.arange(count, device=h.device) if self.compat == "authors" else text_pos
            return (last.unsqueeze(-2) <= q_pos.unsqueeze(-1)).expand(h.shape[0], -1, -1)[:, None]
        check_rank("mask", mask, 3, "(B or 1, N, L)")
        if mask.dtype != torch.bool or mask.shape[1] != h.shape[1] or mask.shape[0] not in (1, h.shape[0]):
            raise ValueError(
                f"mask must be boolean ({h.shape[0]} or 1, {h.shape[1]}, slots), got {mask.dtype} {tuple(mask.shape)}"
            )
        mask = mask.expand(h.shape[0], -1, -1)
        if self.compat == "authors":
            if mask.shape[-1] < count:
                raise ValueError(f"mask tells of {mask.shape[-1]} slots, the text has {count} tokens")
            return mask[:, None, :, :count]
        if text_pos.numel() and int(text_pos.max()) >= mask.shape[-1]:
            raise ValueError(f"mask tells of {mask.shape[-1]} slots, text_pos goes up to {int(text_pos.max())}")
        at = text_pos.expand(h.shape[0], -1)[:, None].expand(-1, h.shape[1], -1)
        return mask.gather(-1, at)[:, None]

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From a decoder layer of the authors' model: ``attn_pool.*``, ``attn_t_pool.*``, ``reweight_module.*``."""
        theirs = Released(state_dict, "the learners of a Wings decoder layer")
        theirs.leave(r"(?:\w+\.)?rotary_emb\.\w+", because="a setting here: the rotary base")
        rules = _learner_rules(r"attn_pool\.", "visual.") | _learner_rules(r"attn_t_pool\.", "textual.")
        rules[r"reweight_module\.linear\.(weight|bias)"] = r"router.linear.\1"
        return theirs.close(theirs.renamed(rules))


def _learner_rules(theirs: str, ours: str) -> dict[str, Rule]:
    """Names of a learner behind ``theirs``, ours behind ``ours``."""
    return {
        rf"{theirs}([qkv])_proj\.([01])\.weight": rf"{ours}\1.\2.weight",
        rf"{theirs}o_proj\.([01])\.weight": rf"{ours}proj.\1.weight",
    }
