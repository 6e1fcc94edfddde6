"""Composite attention: image tokens are read, and do not attend (EE-MLLM, Ma et al., 2024)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import masks
from ...checks import check_name
from ...grids import Layout
from ...types import Output, State, Traits, check_choice
from ..dense.softmax_attention import SoftmaxAttention
from ..frame import HeadCall, HeadFrame, Notes, Stream
from ..layers import merge_heads, split_heads, through, zero_invalid
from ..registry import register
from ..released import Released, Rule

#: What an image token goes through in a layer: feed-forward alone; its own value too; nothing at all.
VARIANTS = ("ffn", "vo+ffn", "frozen")


@register("ee-mllm", "composite-attention")
class CompositeAttention(HeadFrame[Notes]):
    """Causal attention whose queries are the tokens beside the image alone.

    Text: ``q = t W_Q``, keys and values of image and text, causal, as ever. Image tokens attend to nobody but
    themselves: attention over one key is that key's value, so ``y = z W_V W_O`` (``aligner="vo"``), without queries or
    scores; or nothing comes out for them (``aligner="none"``). Work is ``N_text (N_text + N_image)`` instead of its
    square, and queries and output projection of image tokens are not computed where they are not needed.

    Where the image lies says ``layout=Layout((("text", 5), ("image", (14, 14)), ("question", 20)))``. Without one there
    is no image, and this is causal attention, as while decoding. Keys and values of all tokens are cached.

    Args:
        dim, num_heads, num_kv_heads, head_dim, qkv_bias, proj_bias, qk_norm, rotary, normalizer, attn_drop: as in
            :class:`~attnlib.nn.frame.HeadFrame`.
        aligner: ``"vo"`` or ``"none"``.
        image: segment of the layout; the only one that is a grid by default.

    No code was released, and whether the authors keep the value term is not known: both are offered.

    Reference: Ma et al., 2024, arXiv 2408.11795, section 3.

    >>> attend = CompositeAttention(dim=16, num_heads=2)
    >>> attend(torch.randn(2, 9, 16), layout=Layout((("image", (2, 3)), ("text", 3)))).shape
    torch.Size([2, 9, 16])
    """

    class_traits = HeadFrame.class_traits.but(
        patterns=frozenset({"causal-self"}), grid_ranks=frozenset({1}), permutation_equivariant=False
    )

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        aligner: str = "vo",
        image: str | None = None,
        causal: bool = True,
        **settings: Any,
    ):
        check_choice("aligner", aligner, ("vo", "none"))
        if image is not None:
            check_name("image", image)
        if not causal:
            raise ValueError("causal=False is not possible: text reads the image before it, in order")
        for name, other in (("alibi", False), ("context_dim", dim)):
            if settings.get(name, other) not in (other, None):
                raise ValueError(f"{name}={settings[name]!r} is not possible: composite attention is self-attention")
        super().__init__(dim, num_heads, num_kv_heads, causal=True, **settings)
        self.aligner, self.image = aligner, image

    @property
    def traits(self) -> Traits:
        return self.class_traits

    def mix(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        layout: Layout | None = None,
        valid: Tensor | None = None,
        mask: masks.Mask | None = None,
        state: State | None = None,
        returns: tuple[str, ...] = (),
    ) -> Output:
        if layout is None:
            return super().mix(x, valid=valid, mask=mask, state=state, returns=returns)
        start, stop = self.picture(layout)
        return self._composite(x, start, stop, valid, mask, state, returns)

    convert_state_dict = staticmethod(SoftmaxAttention.convert_state_dict)

    def picture(self, layout: Layout) -> tuple[int, int]:
        """``(start, stop)`` of the image tokens; ``ValueError`` for a layout without them."""
        if self.image is not None and self.image not in layout.names:
            raise ValueError(f"image={self.image!r} is no segment of the layout; it has {list(layout.names)}")
        return layout.span(layout.grid_name() if self.image is None else self.image)

    def _composite(
        self, x: Tensor, start: int, stop: int, valid: Tensor | None, mask: masks.Mask | None, state: State | None,
        returns: tuple[str, ...],
    ) -> Output:  # fmt: skip
        batch, n = x.shape[:2]
        at = torch.arange(n, device=x.device)
        rows = torch.cat([at[:start], at[stop:]])
        text = torch.cat([x[:, :start], x[:, stop:]], 1)
        q = through(self.q_norm, split_heads(self.q(text), self.num_heads))
        k = through(self.k_norm, split_heads(self.k(x), self.num_kv_heads))
        v = own = split_heads(self.v(x), self.num_v_heads)
        stream = Stream(x, valid, state, "state" in returns)
        if self.rotary is not None:
            angles = self._angles(stream)
            q, k = self._rotate(q, k, torch.cat([angles[:, :start], angles[:, stop:]], 1), angles)
        k, v = stream.join(k=k, v=v)
        before, exists, weights = stream.start, stream.exists, None
        call = HeadCall(
            stream.mask(mask), exists, rows + before, dropout_p=self.attn_drop if self.training else 0.0,
            return_weights="weights" in returns,
        )  # fmt: skip
        out = self._mix_heads(q, k, v, call, self._notes(valid, None, state, returns))
        if call.return_weights:
            out, read = out
            weights = read.new_zeros(batch, self.num_heads, n, k.shape[2]).index_copy(2, rows, read)
            if self.aligner == "vo":
                image = at[start:stop]
                weights[:, :, image, image + before] = 1.0
        y = self.proj(merge_heads(out))
        picture = x[:, start:stop]
        if self.aligner == "vo":
            mine = own[:, :, start:stop].repeat_interleave(self.num_heads // self.num_v_heads, 1)
            picture = self.proj(merge_heads(mine))
        else:
            picture = torch.zeros_like(picture, dtype=y.dtype)
        y = torch.cat([y[:, :start], picture, y[:, start:]], 1)
        new = stream.next(k=k, v=v, valid=stream.slots)
        return Output(y, state=new, weights=weights)


class CompositeBlock(nn.Module):
    """Decoder block on composite attention: ``x + attention(norm(x))``, then ``+ SwiGLU(norm(x))``.

    Args:
        dim, num_heads: as in :class:`CompositeAttention`, and further settings of it.
        hidden: hidden width of the feed-forward.
        variant: what image tokens go through, one of :data:`VARIANTS`: ``"ffn"`` the feed-forward, ``"vo+ffn"`` their
            own value and the feed-forward, ``"frozen"`` nothing.
        norm: makes a norm of a width, RMSNorm by default.

    >>> block = CompositeBlock(16, 2, hidden=32, variant="ffn")
    >>> block(torch.randn(2, 9, 16), layout=Layout((("image", (2, 3)), ("text", 3)))).shape
    torch.Size([2, 9, 16])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        hidden: int | None = None,
        variant: str = "vo+ffn",
        norm: Callable[[int], nn.Module] = nn.RMSNorm,
        **settings: Any,
    ):
        super().__init__()
        check_choice("variant", variant, VARIANTS)
        self.variant = variant
        hidden = -(-8 * dim // 3) if hidden is None else hidden
        self.norm1, self.norm2 = norm(dim), norm(dim)
        self.attn = CompositeAttention(dim, num_heads, aligner="vo" if variant == "vo+ffn" else "none", **settings)
        self.gate, self.up = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, dim, bias=False)

    def _feed(self, x: Tensor) -> Tensor:
        u = self.norm2(x)
        return x + self.down(F.silu(self.gate(u)) * self.up(u))

    def forward(self, x: Tensor, layout: Layout | None = None, **call: Any) -> Any:
        """(B, N, C) to (B, N, C), or an :class:`~attnlib.types.Output` when ``returns`` asks for more."""
        x = zero_invalid(x, call.get("valid"))
        result = self.attn(self.norm1(x), layout=layout, **call)
        output = result if isinstance(result, Output) else Output(result)
        if layout is None:
            y = self._feed(x + output.y)
        else:
            start, stop = self.attn.picture(layout)
            moved = x[:, start:stop]
            if self.variant != "frozen":
                # Without the value term the attention's own output for these tokens is zero, or a bias: left out.
                moved = self._feed(moved + output.y[:, start:stop] if self.variant == "vo+ffn" else moved)
            text = self._feed(
                torch.cat([x[:, :start], x[:, stop:]], 1) + torch.cat([output.y[:, :start], output.y[:, stop:]], 1)
            )
            y = torch.cat([text[:, :start], moved, text[:, start:]], 1)
        return output._replace(y=y) if isinstance(result, Output) else y

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From a decoder layer of Llama and its kin (``self_attn.q_proj.weight`` and so on), of which composite
        attention is made."""
        theirs = Released(state_dict, "a Llama decoder layer")
        theirs.leave(r"self_attn\.rotary_emb\.\w+", because="a setting here: the rotary base")
        rules: dict[str, Rule] = {
            r"input_layernorm\.weight": "norm1.weight",
            r"post_attention_layernorm\.weight": "norm2.weight",
            r"self_attn\.([qkv])_proj\.(weight|bias)": r"attn.\1.\2",
            r"self_attn\.o_proj\.(weight|bias)": r"attn.proj.\1",
            r"mlp\.(gate|up|down)_proj\.weight": r"\1.weight",
        }
        return theirs.close(theirs.renamed(rules))


def composite_flops(text: int, image: int, dim: int, hidden: int, variant: str | None = None) -> int:
    """Floating-point operations of one decoder layer, projections, scores, values and a gated feed-forward.

    Counted as in the paper's comparison: two per multiplication, the whole text-by-key rectangle of scores, heads
    together as wide as ``dim``, keys and values as many as queries.

    Args:
        text, image: tokens.
        dim, hidden: widths of the model and of its feed-forward.
        variant: one of :data:`VARIANTS`; ``None`` for the ordinary layer, in which image tokens attend.

    >>> round(1 - composite_flops(64, 2880, 4096, 11008, "ffn") / composite_flops(64, 2880, 4096, 11008), 2)
    0.25
    """
    if variant is None:
        both = text + image
        return 2 * both * (4 * dim**2 + 3 * hidden * dim) + 4 * both**2 * dim
    check_choice("variant", variant, VARIANTS)
    total = 2 * text * (4 * dim**2 + 3 * hidden * dim) + 4 * image * dim**2 + 4 * text * (text + image) * dim
    total += 6 * image * hidden * dim if variant != "frozen" else 0
    return total + (2 * image * dim**2 if variant == "vo+ffn" else 0)
