"""iLLaMA: a vision transformer that is a LLaMA decoder (Wang et al., 2024).

Patches, then the class token; RMSNorm, SwiGLU, rotary attention under a mask that hardens to causal in training
(:mod:`attnlib.nn.dense.illama`), learned positions; the head reads the last token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_int, check_real, checked
from ..nn.dense.illama import SoftMaskedAttention, select_weights
from ..positions import resized
from ..types import check_choice, check_divides, to_tuple


class SwiGLU(nn.Module):
    """``W2 (silu(W1 x) * W3 x)``, 2/3 of ``ratio * dim`` wide, rounded up to ``multiple_of``."""

    def __init__(self, dim: int, ratio: float = 4.0, multiple_of: int = 256):
        super().__init__()
        hidden = -(-int(2 * int(dim * ratio) / 3) // multiple_of) * multiple_of
        self.fc1 = nn.Linear(dim, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, dim, bias=False)
        self.fc3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)) * self.fc3(x))


class Block(nn.Module):
    """``x + attn(norm(x))``, ``x + mlp(norm(x))``, each branch of a sample dropped with ``drop_path`` in training."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, multiple_of: int, drop_path: float, **attention: Any
    ):
        super().__init__()
        self.norm1 = nn.RMSNorm(dim, eps=1e-6)
        self.attn = SoftMaskedAttention(dim, num_heads, **attention)
        self.norm2 = nn.RMSNorm(dim, eps=1e-6)
        self.mlp = SwiGLU(dim, mlp_ratio, multiple_of)
        self.drop_path = drop_path

    def _kept(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0.0:
            return branch
        keep = 1.0 - self.drop_path
        return branch * branch.new_empty(branch.shape[0], 1, 1).bernoulli_(keep) / keep

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._kept(self.attn(self.norm1(x)))
        return x + self._kept(self.mlp(self.norm2(x)))


class ILlama(nn.Module):
    """Image classifier ``(B, H, W, C) -> (B, num_classes)``.

    Args:
        img_size: side of the images, or (H, W).
        patch_size: side of a patch.
        in_chans: channels of the images.
        num_classes: classes; 0 gives the class token's features.
        dim, depth, num_heads: width, blocks, heads.
        mlp_ratio, multiple_of: see :class:`SwiGLU`.
        qkv_bias: biases of queries, keys and values.
        scale: of the scores; ``1 / sqrt(head_dim)`` by default.
        drop_rate: dropout after the embedding.
        drop_path: largest rate of dropped branches, reached in the last block.
        cls_position: ``"end"``, or ``"start"`` to see attention collapse: the first token of a causal mask sees itself.
        mask_mode, soft_rate, cutoff, schedule: see :class:`SoftMaskedAttention`.

    Reference: Wang et al., 2024, arXiv 2404.06773.

    >>> model = ILlama(img_size=8, patch_size=4, num_classes=3, dim=8, depth=1, num_heads=2)
    >>> model(torch.randn(2, 8, 8, 3)).shape
    torch.Size([2, 3])
    """

    @checked
    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        multiple_of: int = 256,
        qkv_bias: bool = True,
        scale: float | None = None,
        drop_rate: float = 0.0,
        drop_path: float = 0.0,
        cls_position: str = "end",
        mask_mode: str = "post",
        soft_rate: float = 1.0,
        cutoff: float = 1 / 6,
        schedule: str = "constant",
    ):
        super().__init__()
        check_choice("cls_position", cls_position, ("end", "start"))
        for name, count in (("patch_size", patch_size), ("in_chans", in_chans), ("dim", dim), ("depth", depth)):
            check_int(name, count, least=1)
        check_int("num_classes", num_classes, least=0)
        check_int("multiple_of", multiple_of, least=1)
        check_real("mlp_ratio", mlp_ratio, above=0)
        self.img_size = to_tuple("img_size", img_size, 2)
        for side in self.img_size:
            check_divides("patch_size", patch_size, "img_size", side)
        self.grid = (self.img_size[0] // patch_size, self.img_size[1] // patch_size)
        self.in_chans, self.cls_position = in_chans, cls_position
        self.patch_embed = nn.Conv2d(in_chans, dim, patch_size, patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid[0] * self.grid[1] + 1, dim))
        self.pos_drop = nn.Dropout(drop_rate)
        attention = dict(
            qkv_bias=qkv_bias, scale=scale, mask_mode=mask_mode, soft_rate=soft_rate, cutoff=cutoff, schedule=schedule
        )  # fmt: skip
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, mlp_ratio, multiple_of, drop_path * i / max(1, depth - 1), **attention)
            for i in range(depth)
        )
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        for p in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(p, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def set_progress(self, progress: float) -> None:
        """Advance the soft mask of every block to this fraction of training."""
        for block in self.blocks:
            block.attn.set_progress(progress)  # type: ignore[union-attr,operator]

    def tokens(self, images: Tensor) -> Tensor:
        """(B, H, W, C) images to (B, N + 1, dim) embedded tokens, with positions."""
        if images.dim() != 4 or tuple(images.shape[1:]) != (*self.img_size, self.in_chans):
            raise ValueError(
                f"images must be (B, {self.img_size[0]}, {self.img_size[1]}, {self.in_chans}), channels last, "
                f"got {tuple(images.shape)}"
            )
        patches = self.patch_embed(images.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        cls = self.cls_token.expand(len(patches), -1, -1)
        order = [patches, cls] if self.cls_position == "end" else [cls, patches]
        return self.pos_drop(torch.cat(order, 1) + self.pos_embed)

    def features(self, images: Tensor) -> Tensor:
        """(B, dim) of the class token."""
        x = self.tokens(images)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, -1 if self.cls_position == "end" else 0]

    def forward(self, images: Tensor) -> Tensor:
        """(B, num_classes) scores of ``images`` (B, H, W, C)."""
        return self.head(self.features(images))

    # ---- weights from elsewhere

    def load_authors(self, state_dict: Mapping[str, Any]) -> None:
        """Load a released checkpoint (``{"model": ..}`` or a bare state dict); positions follow the image size."""
        sd = SoftMaskedAttention.convert_state_dict(dict(state_dict.get("model", state_dict)))
        pos = sd["pos_embed"]
        if pos.shape[1] != self.pos_embed.shape[1]:
            sd["pos_embed"] = resize_positions(pos, self.grid)
        # their soft mask rate is an attribute of the model, 0 after training
        sd |= {name: torch.zeros(()) for name, _ in self.named_buffers() if name.endswith(".attn.rate")}
        self.load_state_dict(sd)

    def load_llama(self, state_dict: Mapping[str, Tensor]) -> None:
        """Start from a LLaMA (transformers' names): evenly selected elements of its first layers.

        Norms, attention (not biases) and feed-forward are taken; embeddings, final norm and head stay.

        Raises:
            ValueError: the LLaMA has fewer layers, or is narrower somewhere.
        """
        own = self.state_dict()
        for i in range(len(self.blocks)):
            there, here = f"model.layers.{i}.", f"blocks.{i}."
            if there + "input_layernorm.weight" not in state_dict:
                raise ValueError(f"the LLaMA has no layer {i}, but this model has {len(self.blocks)} blocks")
            qkv = torch.cat([state_dict[f"{there}self_attn.{n}_proj.weight"] for n in "qkv"])
            dim = own[here + "attn.q.weight"].shape[1]
            for n, part in zip("qkv", select_weights(qkv, (3 * dim, dim)).chunk(3), strict=True):
                own[f"{here}attn.{n}.weight"].copy_(part)
            for ours, theirs in (
                ("norm1", "input_layernorm"),
                ("norm2", "post_attention_layernorm"),
                ("attn.proj", "self_attn.o_proj"),
                ("mlp.fc1", "mlp.gate_proj"),
                ("mlp.fc2", "mlp.down_proj"),
                ("mlp.fc3", "mlp.up_proj"),
            ):
                target = own[f"{here}{ours}.weight"]
                target.copy_(select_weights(state_dict[f"{there}{theirs}.weight"], target.shape))


def resize_positions(pos: Tensor, grid: tuple[int, int]) -> Tensor:
    """Positions (1, n * n + 1, C) of a square grid and the class token after it, for another grid (bicubic).

    >>> resize_positions(torch.zeros(1, 5, 8), (4, 3)).shape
    torch.Size([1, 13, 8])
    """
    side = round((pos.shape[1] - 1) ** 0.5)
    if side * side + 1 != pos.shape[1]:
        raise ValueError(f"pos has {pos.shape[1]} positions, which is no square grid and a class token")
    patches = resized(pos[:, :-1].unflatten(1, (side, side)).permute(0, 3, 1, 2), grid)
    return torch.cat([patches.permute(0, 2, 3, 1).flatten(1, 2), pos[:, -1:]], 1)


def illama_tiny(**settings: Any) -> ILlama:
    """5.7 M parameters; top-1 75.0 % on ImageNet-1k with the authors' weights."""
    return ILlama(**{**dict(dim=192, depth=12, num_heads=3), **settings})


def illama_small(**settings: Any) -> ILlama:
    """22.0 M parameters; top-1 79.9 % on ImageNet-1k with the authors' weights."""
    return ILlama(**{**dict(dim=384, depth=12, num_heads=6), **settings})


def illama_base(**settings: Any) -> ILlama:
    """86.5 M parameters; top-1 81.6 % on ImageNet-1k with the authors' weights."""
    return ILlama(**{**dict(dim=768, depth=12, num_heads=12), **settings})


def illama_large(**settings: Any) -> ILlama:
    """310.4 M parameters; top-1 84.8 % with the authors' weights, pretrained on ImageNet-21k."""
    return ILlama(**{**dict(dim=1024, depth=24, num_heads=16), **settings})
