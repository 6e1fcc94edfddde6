"""MEDUSA: one body attends to the whole image once; a light head for every scale of a backbone gates its features.

Aboutalebi et al., 2021, "MEDUSA: Multi-scale Encoder-Decoder Self-Attention Deep Neural Network Architecture for
Medical Image Analysis", arXiv 2110.06063. With ``G = body(image)``, an encoder and decoder, and ``F_j`` of stages j:

    ``a_j = head_j([resize(G), F_j])``,    ``F_j <- F_j * 2 sigmoid(a_j)``    or    ``F_j * sigmoid(a_j)``,

and the next stage reads the gated features. Our reading: no architecture was released (a frozen graph, and how images
are prepared: the body sees a grey copy of its own size), the paper's text names the body and the heads, not their
layers. With ``form="residual"`` (the first) and heads that start at zero the network starts as the backbone, bit for
bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_choice, check_int, check_type, describe
from .dense.context import resized_maps
from .dense.unet import UNet
from .protocol import TaskModel

FORMS, HEADS, LAYOUTS = ("residual", "multiply"), ("channel", "pixel"), ("NHWC", "NCHW")


class SharedAttention(TaskModel):
    """A backbone whose stages are gated from one map of the whole image.

    The backbone stays as it is: what it is called by itself gives what it gave.

    Args:
        model: the backbone, or a model with one inside: called with images, it runs its stages in turn.
        stages: names of modules within it that give the maps to gate (the first of what they give, where that is a
            tuple); those of its ``feature_info`` by default.
        dims: channels of these maps; those of its ``feature_info`` by default.
        layout: of these maps, ``"NHWC"`` or ``"NCHW"``; the former for the models of this library.
        body: from a copy of the images (B, body_chans, h, w) to a map (B, global_dim, h', w'); a U-Net by default.
        global_dim: channels of G.
        body_chans: channels of the body's copy; 1 for the mean over channels, else those of the images.
        body_size: side of the body's copy; ``None`` for the size of the images.
        form: ``"residual"`` or ``"multiply"``.
        head: ``"channel"`` for a gate of every channel, ``"pixel"`` for one of all.
        kernel_size: of the heads' convolution.
        zero_heads: heads start at zero; with ``"residual"`` by default.

    Raises:
        ValueError: stages that are not there, or as many channels as stages.

    >>> import attnlib
    >>> net = attnlib.create_model("resnet18", num_classes=2)
    >>> SharedAttention(net, global_dim=4, body_size=32)(torch.randn(1, 3, 64, 48)).shape
    torch.Size([1, 2])
    """

    def __init__(
        self,
        model: nn.Module,
        stages: Sequence[str] | None = None,
        dims: Sequence[int] | None = None,
        layout: str | None = None,
        body: nn.Module | None = None,
        global_dim: int = 16,
        body_chans: int = 1,
        body_size: int | None = 256,
        form: str = "residual",
        head: str = "channel",
        kernel_size: int = 1,
        zero_heads: bool | None = None,
    ):
        super().__init__()
        check_type("model", model, nn.Module)
        info: Any = getattr(model, "feature_info", None)
        if (stages is None or dims is None) and not info:
            raise ValueError("model has no feature_info, so stages and dims must be given")
        names = [f["module"] for f in info] if stages is None else list(stages)
        widths = [int(f["num_chs"]) for f in info] if dims is None else list(dims)
        known = dict(model.named_modules())
        if missing := [n for n in names if n not in known]:
            raise ValueError(f"stages {missing} are no modules of the model, which has {list(known)[1:6]} and more")
        if not names or len(names) != len(widths):
            raise ValueError(f"stages={names} and dims={widths} must be as many, and one at least")
        if layout is None:
            layout = "NHWC" if hasattr(model, "forward_intermediates") and hasattr(model, "stages") else "NCHW"
        check_choice("layout", layout, LAYOUTS)
        check_choice("form", form, FORMS)
        check_choice("head", head, HEADS)
        if check_int("kernel_size", kernel_size, least=1) % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} must be odd")
        self.layout, self.form, self.stage_names = layout, form, names
        self.body_chans = check_int("body_chans", body_chans, least=1)
        if body is not None:
            check_type("body", body, nn.Module)
        self.body_size = None if body_size is None else check_int("body_size", body_size, least=1)
        check_int("global_dim", global_dim, least=1)
        self.model = model
        self.body = UNet(body_chans, global_dim, (8, 16, 32, 64), rank=2, upsample="resize") if body is None else body
        self.heads = nn.ModuleList(
            nn.Conv2d(global_dim + c, c if head == "channel" else 1, kernel_size, padding=kernel_size // 2)
            for c in map(partial(check_int, "dims"), widths)
        )
        if form == "residual" if zero_heads is None else zero_heads:
            for conv in self.heads:
                nn.init.zeros_(conv.weight)  # type: ignore[arg-type]
                nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        self._shared: Tensor | None = None
        self._seen: dict[str, Tensor] | None = None
        for j, name in enumerate(names):
            known[name].register_forward_hook(partial(self._gated, j))

    def attention(self, x: Tensor, body_x: Tensor | None = None) -> Tensor:
        """G of images."""
        if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
            raise ValueError(f"x must be images (B, C, H, W) of floating point, got {describe(x)}")
        if body_x is None:
            body_x = x.mean(1, keepdim=True) if self.body_chans == 1 else x
            if self.body_size is not None:
                body_x = resized_maps(body_x, (self.body_size, self.body_size))
        if not isinstance(body_x, Tensor) or body_x.dim() != 4 or body_x.shape[:2] != (x.shape[0], self.body_chans):
            raise ValueError(
                f"body_x must be ({x.shape[0]}, {self.body_chans}, h, w), a copy of the images, got {describe(body_x)}"
            )
        return self.body(body_x)

    def _gated(self, j: int, module: nn.Module, args: Any, out: Any) -> Any:
        if self._shared is None:
            return out
        several = isinstance(out, tuple)
        y = out[0] if several else out
        maps = y.permute(0, 3, 1, 2) if self.layout == "NHWC" else y
        a = self.heads[j](torch.cat([resized_maps(self._shared, maps.shape[2:]).to(maps.dtype), maps], 1))
        gate = a.sigmoid()
        if self._seen is not None:
            self._seen[self.stage_names[j]] = gate
        maps = maps * (2 * gate if self.form == "residual" else gate)
        y = maps.permute(0, 2, 3, 1) if self.layout == "NHWC" else maps
        return (y, *out[1:]) if several else y

    def forward(self, x: Tensor, body_x: Tensor | None = None) -> Any:
        """What the model gives for images, its stages being gated.

        Args:
            x: (B, C, H, W).
            body_x: the copy that the body sees, of the same part of the image; made of ``x`` by default.
        """
        self._shared = self.attention(x, body_x)
        try:
            return self.model(x)
        finally:
            self._shared = None

    @torch.no_grad()
    def gates(self, x: Tensor, body_x: Tensor | None = None) -> dict[str, Tensor]:
        """Gates between 0 and 1 by the name of their stage, (B, C_j or 1, h_j, w_j), to look at."""
        seen: dict[str, Tensor] = {}
        self._seen = seen
        try:
            self(x, body_x)
        finally:
            self._seen = None
        return seen

    def loss(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Cross entropy of classes: logits (B, K) and whole numbers (B,).

        Raises:
            ValueError: a class that is none.
        """
        whole = isinstance(target, Tensor) and not target.is_floating_point()
        if not whole or target.shape != prediction.shape[:1]:
            raise ValueError(f"target must be whole numbers ({prediction.shape[0]},), got {describe(target)}")
        wrong = target[(target < 0) | (target >= prediction.shape[1])]
        if wrong.numel():
            raise ValueError(f"target holds the class {int(wrong[0])}; possible: 0 to {prediction.shape[1] - 1}")
        return {"cross_entropy": F.cross_entropy(prediction, target.long())}

    def predict(self, x: Tensor, body_x: Tensor | None = None) -> Tensor:
        """Classes (B,)."""
        return self(x, body_x).argmax(1)
