"""CLIP surgery: maps of what a text says over an image, from a CLIP that was never trained for maps.

In the last layers of the image tower a second path runs beside the first: its attention compares keys with keys
(``"kk"``, GenSAM) or values with values (``"vv"``, CLIP surgery), reads what the first path's layer reads, and adds up
without feed-forwards. The patches come from the second path, the class token from the first. A map is then
``x (t - r)^T`` for text features ``t`` and those of an empty string ``r``, which all texts share.

Sources: Li et al., 2023, arXiv 2304.05653; Hu et al., 2023, arXiv 2312.07374 (kk, consensus).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_choice, check_flag, check_int, check_template, check_type, describe, shaped
from ..ops import attention
from ..ops.points import min_max

PATHS = ("kk", "vv", "qq", "qk")

#: What CLIP's images are normalised with.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def surgery_features(
    clip: nn.Module, pixel_values: Tensor, layers: int = 6, path: str = "kk", project: bool = True
) -> Tensor:
    """Features of an image's class token and patches by CLIP surgery.

    Args:
        clip: transformers' ``CLIPModel``.
        pixel_values: (B, 3, H, W) normalised pixels.
        layers: how many of the last layers the second path runs in.
        path: what is compared in it: ``"kk"``, ``"vv"``, ``"qq"``; ``"qk"`` is plain attention.
        project: into the space of texts.

    Returns:
        (B, 1 + P, C), differentiable.

    Raises:
        TypeError: a model without such an image tower.
        ValueError: more layers than there are.
    """
    check_choice("path", path, PATHS)
    tower: Any = getattr(clip, "vision_model", None)
    blocks: Any = getattr(getattr(tower, "encoder", None), "layers", None)
    if not isinstance(blocks, nn.ModuleList) or not hasattr(tower, "post_layernorm"):
        raise TypeError(f"clip must be transformers' CLIPModel, got {describe(clip)}, which has no such image tower")
    check_int("layers", layers, least=1, most=len(blocks))
    check_type("pixel_values", pixel_values, Tensor, "a tensor (B, 3, H, W)")
    out = tower(pixel_values=pixel_values, output_hidden_states=True)
    states = out.hidden_states
    new = states[-1 - layers]
    block: Any
    for block, state in zip(blocks[-layers:], states[-1 - layers : -1], strict=True):
        mine, normed = block.self_attn, block.layer_norm1(state)
        heads = lambda x: x.unflatten(-1, (mine.num_heads, -1)).transpose(1, 2)  # noqa: B023, E731
        v = heads(mine.v_proj(normed))
        q = v if path[0] == "v" else heads((mine.q_proj if path[0] == "q" else mine.k_proj)(normed))
        k = v if path[1] == "v" else heads((mine.q_proj if path == "qq" else mine.k_proj)(normed))
        new = new + mine.out_proj(attention(q, k, v).transpose(1, 2).flatten(2))
    new = torch.cat([states[-1][:, :1], new[:, 1:]], 1)
    new = tower.post_layernorm(new)
    return clip.visual_projection(new) if project else new  # type: ignore[operator, no-any-return]


@shaped(features="alike (B, N, C)", texts="alike (T, C)", empty="alike (T or 1, C)")
def surgery_maps(
    features: Tensor, texts: Tensor, empty: Tensor | None = None, compat: str | None = None, temperature: float = 2.0
) -> Tensor:
    """How much each patch looks like each text, less what all texts share.

    Args:
        features: (B, 1 + P, C) as of :func:`surgery_features`.
        texts: (T, C) normalised text features.
        empty: (1, C) of the empty string, which all texts share; without it, the mean over the texts is taken away,
            weighed by what the class token makes of them (CLIP surgery for many classes).
        compat: ``"authors"`` normalises features over tokens, as both releases do; the default over channels.
        temperature: of the class token's weights.

    Returns:
        (B, P, T).

    >>> x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]])
    >>> surgery_maps(x, torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2)).tolist()
    [[[1.0], [0.0]]]
    """
    check_choice("compat", compat, (None, "authors"))
    features = F.normalize(features, dim=1 if compat == "authors" else -1)
    if empty is not None:
        return (features @ (texts - empty).T)[:, 1:]
    share = (features[:, :1] @ texts.T * temperature).softmax(-1)
    weights = share / share.mean(-1, keepdim=True)  # (B, 1, T)
    joint = features[:, :, None] * texts * weights[..., None]
    return (joint - joint.mean(2, keepdim=True)).sum(-1)[:, 1:]


@shaped(foreground="float (B, P, T)", background="float (B, P, S)")
def consensus(foreground: Tensor, background: Tensor | None = None, clamp: bool = False) -> Tensor:
    """One map of several texts: each scaled to [0, 1], their mean, less that of the background, scaled again.

    Args:
        foreground: (B, P, T) maps of names of the thing.
        background: (B, P, S) maps of names of what is around it.
        clamp: cut at zero first.

    Returns:
        (B, P); zeros where nothing is left to tell patches apart.

    >>> consensus(torch.tensor([[[0.0], [2.0], [1.0]]]), torch.tensor([[[1.0], [0.0], [0.0]]])).tolist()
    [[0.0, 1.0, 0.75]]
    """
    check_flag("clamp", clamp)
    for name, maps in (("foreground", foreground), ("background", background)):
        if maps is not None and not maps.shape[2]:
            raise ValueError(f"{name} must hold the map of at least one text, got none")
    found = min_max(foreground, 1).mean(-1)
    if background is None:
        return found
    found = found - min_max(background, 1).mean(-1)
    return min_max(found.clamp(0, 1) if clamp else found, 1)


class SurgeryMaps:
    """A map over an image for names of a thing and of what is around it; texts are read once.

    Args:
        clip: transformers' ``CLIPModel``.
        tokenize: from a list of strings to the inputs of its text tower, as a tokenizer called with
            ``padding=True, return_tensors="pt"``.
        layers, path: see :func:`surgery_features`.
        templates: sentences with ``{}`` in place of the name, whose features are averaged.
        clamp: see :func:`consensus`.
        compat: see :func:`surgery_maps`.
        shared: what all texts share, the empty string by default.
    """

    def __init__(
        self,
        clip: nn.Module,
        tokenize: Any,
        layers: int = 6,
        path: str = "kk",
        templates: Sequence[str] = ("a photo of a {}.", "a photo of the {}.", "there is a {} in the scene."),
        clamp: bool = False,
        compat: str | None = None,
        shared: str = "",
    ):
        check_choice("path", path, PATHS)
        check_type("shared", shared, str, "a name")
        check_choice("compat", compat, (None, "authors"))
        templates = (templates,) if isinstance(templates, str) else tuple(templates)
        if not templates:
            raise ValueError("templates must be sentences with {} for the name, got none")
        for i, template in enumerate(templates):
            check_template(f"templates[{i}]", template, ("",), needed=("",))
        if not callable(tokenize):
            raise TypeError(f"tokenize must be callable on a list of strings, got {describe(tokenize)}")
        self.clip: Any = clip
        self.tokenize, self.layers, self.path = tokenize, layers, path
        self.templates, self.clamp, self.compat = templates, check_flag("clamp", clamp), compat
        self.shared = shared
        self._texts: dict[str, Tensor] = {}

    @torch.no_grad()
    def text(self, names: Sequence[str]) -> Tensor:
        """(T, C) normalised features of names, each the mean over the templates."""
        for name in names:
            if name not in self._texts:
                given = dict(self.tokenize([t.format(name) for t in self.templates]))
                found = self.clip.get_text_features(**given)
                found = F.normalize(getattr(found, "pooler_output", found), dim=-1).mean(0)
                self._texts[name] = F.normalize(found, dim=-1)
        return torch.stack([self._texts[name] for name in names])

    def pixels(self, image: Tensor) -> Tensor:
        """(1, 3, S, S) what the tower reads of an image (H, W, 3) in [0, 1]."""
        side = int(self.clip.config.vision_config.image_size)
        like = next(self.clip.parameters())
        small = F.interpolate(
            image.permute(2, 0, 1)[None].to(like), (side, side), mode="bicubic", antialias=True
        ).clamp(0, 1)
        mean, std = (like.new_tensor(value)[:, None, None] for value in (MEAN, STD))
        return (small - mean) / std

    @torch.no_grad()
    def __call__(self, image: Tensor, foreground: Sequence[str], background: Sequence[str] = ()) -> Tensor:
        """(h, w) in [0, 1] of an image (H, W, 3) in [0, 1]; zeros where the names tell no patches apart."""
        if isinstance(foreground, str) or isinstance(background, str):
            raise TypeError("foreground and background must be lists of names, got a string")
        if not foreground:
            raise ValueError("foreground must hold at least one name, got none")
        features = surgery_features(self.clip, self.pixels(image), self.layers, self.path)
        empty = self.text([self.shared])
        maps = [
            surgery_maps(features, self.text(n), empty, self.compat) if n else None for n in (foreground, background)
        ]
        assert maps[0] is not None
        found = consensus(maps[0], maps[1], self.clamp)[0]
        side = math.isqrt(len(found))
        return found.unflatten(0, (side, side)).float()
