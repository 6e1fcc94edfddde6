"""A map as a short sequence of codes: the VQ-VAE behind AiT's depth maps and masks.

Ning et al., 2023, "All in Tokens", arXiv 2301.02229. A stem and ``log2(ratio) - 1`` convolutions of stride 2 that
double the channels, residual blocks, a 1 x 1 convolution to the width of the codes
(:class:`attnlib.nn.quantizer.VectorQuantizer`), and the same back. In training whole patches of a map are hidden
(:func:`hide_patches`) and are to be told; pixels without a value cost nothing.

Codes are read by number (:meth:`VQVAE.decode`) or softly (:meth:`VQVAE.decode_soft`): the mean of codes by
``softmax(tau z)``, through which a gradient reaches ``z``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import (
    check_axes,
    check_choice,
    check_flag,
    check_float,
    check_int,
    check_real,
    check_valid,
    check_whole,
    check_within,
)
from ...nn.quantizer import Quantized, VectorQuantizer
from ...nn.released import Released
from ..protocol import answering


class ResBlock(nn.Module):
    """``x + convs(x)`` of (B, C, H, W): ``"plain"`` convolutions, or ``"norm"`` with BatchNorm and a ReLU behind."""

    def __init__(self, dim: int, kind: str):
        super().__init__()
        self.kind = kind
        if kind == "plain":
            layers = [nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU(), nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU(),
                      nn.Conv2d(dim, dim, 1)]  # fmt: skip
        else:
            layers = [nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim), nn.ReLU(),
                      nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim)]  # fmt: skip
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x) if self.kind == "plain" else F.relu(x + self.net(x))


class VQVAE(nn.Module):
    """Maps (B, H, W, C) to codes on a grid ``ratio`` times coarser, and back.

    Args:
        in_chans: C.
        num_codes, dim: of the codes.
        hidden_dim: channels behind the stem.
        ratio: pixels along a side that one code stands for; a power of two, at least 2.
        depth: residual blocks on each side.
        block: ``"plain"`` or ``"norm"``.
        max_value: with ``normalize``, maps from 0 to this become -1 to 1 inside.
        tau: what logits are multiplied by before the softmax of :meth:`decode_soft`.
        ignore_zero: pixels of a target that are zero have no value, unless ``valid`` says which have.
        decay, commitment, compat: of the codes, see :class:`attnlib.nn.quantizer.VectorQuantizer`.

    >>> vae = VQVAE(num_codes=8, dim=4, hidden_dim=2, ratio=8).eval()
    >>> codes = vae.encode(torch.rand(2, 16, 24, 1))
    >>> codes.shape, vae.decode(codes).shape
    (torch.Size([2, 2, 3]), torch.Size([2, 16, 24, 1]))
    """

    def __init__(
        self, in_chans: int = 1, num_codes: int = 128, dim: int = 512, hidden_dim: int = 16, ratio: int = 32,
        depth: int = 2, block: str = "plain", normalize: bool = False, max_value: float = 1.0, tau: float = 1.0,
        ignore_zero: bool = False, decay: float = 0.99, commitment: float = 0.25, compat: str | None = None,
    ):  # fmt: skip
        super().__init__()
        check_choice("block", block, ("plain", "norm"))
        check_int("ratio", ratio, least=2)
        if ratio & (ratio - 1):
            raise ValueError(f"ratio={ratio} must be a power of two: every layer halves the map")
        for name, value in (("in_chans", in_chans), ("hidden_dim", hidden_dim)):
            check_int(name, value, least=1)
        check_int("depth", depth, least=0)
        self.in_chans, self.ratio = in_chans, ratio
        self.normalize, self.ignore_zero = check_flag("normalize", normalize), check_flag("ignore_zero", ignore_zero)
        self.max_value = check_real("max_value", max_value, above=0)
        self.tau = check_real("tau", tau, above=0)
        steps = int(math.log2(ratio))
        widths = [hidden_dim * 2**i for i in range(steps)]
        down: list[nn.Module] = []
        for before, after in zip([in_chans, *widths], widths, strict=False):
            down += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
        wide = widths[-1]
        down += [*[ResBlock(wide, block) for _ in range(depth)], nn.Conv2d(wide, dim, 1)]
        up: list[nn.Module] = [nn.Conv2d(dim, wide, 1), nn.ReLU(), *[ResBlock(wide, block) for _ in range(depth)]]
        for before, after in zip([wide, *widths[::-1]], widths[::-1], strict=False):
            up += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
        up.append(nn.Conv2d(hidden_dim, in_chans, 1))
        self.encoder, self.decoder = nn.Sequential(*down), nn.Sequential(*up)
        self.quantizer = VectorQuantizer(num_codes, dim, decay, commitment, compat=compat)

    def _inside(self, x: Tensor) -> Tensor:
        return 2 * (x / self.max_value - 0.5) if self.normalize else x

    def _outside(self, x: Tensor) -> Tensor:
        return (x * 0.5 + 0.5) * self.max_value if self.normalize else x

    def _checked(self, name: str, x: Tensor) -> Tensor:
        check_axes(name, x, B=None, H=None, W=None, in_chans=self.in_chans)
        check_float(name, x)
        if any(side % self.ratio or not side for side in x.shape[1:3]):
            raise ValueError(
                f"{name} is {x.shape[1]} x {x.shape[2]}; its sides must be multiples of ratio={self.ratio}"
            )
        return x

    def features(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H / ratio, W / ratio, dim) before they are quantized."""
        x = self._inside(self._checked("x", x))
        return self.encoder(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    @answering
    def encode(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H / ratio, W / ratio) numbers of codes, as in evaluation; no mode or buffer changes."""
        return self.quantizer.indices(self.features(x))

    def render(self, codes: Tensor) -> Tensor:
        """Vectors (B, h, w, dim) -> the map (B, h * ratio, w * ratio, C)."""
        check_axes("codes", codes, B=None, h=None, w=None, dim=self.quantizer.dim)
        return self._outside(self.decoder(codes.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))

    def decode(self, indices: Tensor) -> Tensor:
        """Numbers (B, h, w) -> the map."""
        check_axes("indices", indices, B=None, h=None, w=None)
        check_whole("indices", indices)
        check_within("indices", indices, self.quantizer.num_codes, "code")
        return self.render(self.quantizer.embed(indices))

    def decode_soft(self, logits: Tensor) -> Tensor:
        """Logits (B, h, w, num_codes) -> the map of the mean codes by ``softmax(tau * logits)``."""
        return self.render(self.quantizer.soft((logits * self.tau).softmax(-1)))

    def forward(self, x: Tensor) -> tuple[Tensor, Quantized]:
        """(B, H, W, C) -> the map again, and what was quantized. In training the codes follow."""
        found = self.quantizer(self.features(x))
        return self.render(found.y), found

    def loss(self, x: Tensor, target: Tensor | None = None, valid: Tensor | None = None) -> dict[str, Tensor]:
        """``recon``, the mean squared error of pixels with a value, and ``codes``.

        Args:
            x: (B, H, W, C) what is encoded.
            target: (B, H, W, C) what is to come out; ``x`` by default.
            valid: (B, H, W) which pixels of the target have a value.
        """
        target = x if target is None else self._checked("target", target)
        if target.shape != x.shape:
            raise ValueError(f"target must have the shape of x, {tuple(x.shape)}, got {tuple(target.shape)}")
        check_valid("valid", valid, target.shape[:3])
        y, found = self(x)
        square = (self._inside(y) - self._inside(target)).square()
        held = target > 0 if valid is None and self.ignore_zero else valid
        if held is None:
            return {"recon": square.mean() if square.numel() else square.sum(), "codes": found.loss}
        held = (held if held.dim() == 4 else held.unsqueeze(-1)).expand_as(square)
        total = square.masked_fill(~held, 0.0).sum()
        return {"recon": total / held.sum().clamp(min=1), "codes": found.loss}

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The authors' VQ-VAE, of either of their folders, with a moving average or without."""
        theirs = Released(state_dict, "the authors' VQVAE")
        rules = {
            r"((?:en|de)coder\..+)": r"\1", r"_vq_vae\._embedding(?:\.weight)?": "quantizer.codebook",
            r"_vq_vae\._ema_cluster_size": "quantizer.counts", r"_vq_vae\._ema_w": "quantizer.sums",
        }  # fmt: skip
        out = theirs.renamed(dict(rules))
        theirs.leave(r"codebook\.weight", because="a copy of the codes in some releases, which their model drops too")
        return theirs.close(out)


def hide_patches(x: Tensor, ratio: float = 0.5, patch: int = 16, generator: torch.Generator | None = None) -> Tensor:
    """(B, H, W, C) with ``ceil(ratio * n)`` of the n patches of every sample set to zero, drawn anew for each.

    Args:
        ratio: share of patches; 0 gives ``x`` as it is.
        patch: side of a patch, which divides both sides.
        generator: of the draw, on the CPU; ``None`` for the global one.
    """
    check_axes("x", x, B=None, H=None, W=None, C=None)
    check_real("ratio", ratio, least=0, most=1)
    check_int("patch", patch, least=1)
    batch, height, width, _ = x.shape
    if height % patch or width % patch:
        raise ValueError(f"patch={patch} must divide both sides of x, which is {height} x {width}")
    if not ratio:
        return x
    rows, cols = height // patch, width // patch
    count = math.ceil(rows * cols * ratio)
    order = torch.rand(batch, rows * cols, generator=generator).argsort(1)
    seen = (order.argsort(1) >= count).reshape(batch, rows, 1, cols, 1).to(x.device)
    seen = seen.expand(-1, -1, patch, -1, patch).reshape(batch, height, width, 1)
    return x.masked_fill(~seen, 0.0)
