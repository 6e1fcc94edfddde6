"""CHMNet: where each place of one image lies in another, by votes over shifts and sizes.

Min, Kang and Cho, 2021, "Convolutional Hough Matching Networks" (https://arxiv.org/abs/2109.05221), as released with
CHM-Corr. Two ResNets, one per image, give maps of 16 pixels per token, ``a`` and ``b``. Each is resized by ``sqrt(s)``
for s in 1/2, 1, 2 and passed through a 3 x 3 convolution of its own; cosines of all pairs of places, at all nine pairs
of sizes, resized to one grid, are a correlation with six axes, two of sizes and four of places, that is not negative::

    c = sigmoid(conv6d(correlation));  c = max over sizes;  c resized to twice the side
    c = softplus(conv4d(c));           c_st^3 / (max_t c_st  max_s c_st)

Kernels are 3 x 3 x 5 x 5 x 5 x 5 and 5 x 5 x 5 x 5. ``kernel="full"`` learns every number; ``"iso"`` one per distance
between the two ends of a vote, ``"psi"`` one per the distance and those of both ends from the middle, and each kind of
pair of sizes, shared evenly.

:func:`transfer` moves points: a Gaussian around each place's best match, softmax, the mean place, and of those the
mean around the point.

>>> net = CHMNet(embed_dims=(4, 4, 4), depths=(1, 1, 1), stem_dim=4).eval()
>>> confidence = net(torch.rand(1, 3, 48, 48), torch.rand(1, 3, 48, 48))
>>> confidence.shape, transfer(confidence, torch.zeros(1, 2)).shape
(torch.Size([1, 36, 36]), torch.Size([1, 1, 2]))

Differs from the release: images may be of any size and need not be square; the two ResNets are modules of their own in
place of one with every convolution in two groups; the fourth stage and the classifier, which nothing reads, are left
out of the model and of its weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_choice, check_ints, check_real, check_tensor, checked
from ..nn.released import Released
from .backbones.resnet import convert as convert_resnet
from .backbones.resnet import resnet

KERNELS = ("psi", "iso", "full")
SCALES = (0.5, 1.0, 2.0)
SIDE, SIZES = 5, 3


def conv4d(x: Tensor, weight: Tensor) -> Tensor:
    """Convolution over four axes, zeros around: (B, C, h, w, h', w') by (D, C, k, k, k, k) to (B, D, h, w, h', w')."""
    k = weight.shape[-1]
    rows, edge = x.shape[2], k // 2
    flat = x.transpose(1, 2).flatten(0, 1)
    out = x.new_zeros(len(x), rows, len(weight), *x.shape[3:])
    for i in range(k):
        part = F.conv3d(flat, weight[:, :, i], padding=edge).view_as(out)
        shift = i - edge
        to, of = (slice(max(0, -s), rows - max(0, s)) for s in (shift, -shift))
        out[:, to] += part[:, of]
    return out.transpose(1, 2)


def conv6d(x: Tensor, weight: Tensor) -> Tensor:
    """Convolution over two axes of sizes and four of places, zeros around: (B, s, s, h, w, h', w') to the same."""
    batch, s = x.shape[:2]
    k = weight.shape[0]
    all_ = conv4d(x.flatten(0, 2)[:, None], weight.flatten(0, 1)[:, None]).view(batch, s, s, k * k, *x.shape[3:])
    out = torch.zeros_like(x)
    for number, (i, j) in enumerate(product(range(k), repeat=2)):
        a, b = i - k // 2, j - k // 2
        to, of = ([slice(max(0, -t * f), s - max(0, t * f)) for t in (a, b)] for f in (1, -1))
        out[:, to[0], to[1]] += all_[:, of[0], of[1], number]
    return out


def _groups(kind: str) -> tuple[Tensor, list[int]]:
    """Which of the shared numbers each of the 5^4 places of a kernel has, and how many have each."""

    def key(a: int, b: int, c: int, d: int) -> tuple[int, ...]:
        middle = SIDE // 2
        tail, head = (a - middle) ** 2 + (b - middle) ** 2, (c - middle) ** 2 + (d - middle) ** 2
        between = (a - c) ** 2 + (b - d) ** 2
        return (between,) if kind == "iso" else (max(tail, head), min(tail, head), between)

    found: dict[tuple[int, ...], int] = {}
    numbers = [found.setdefault(key(*at), len(found)) for at in product(range(SIDE), repeat=4)]
    return torch.tensor(numbers, device="cpu"), [numbers.count(i) for i in range(len(found))]


class HoughKernel(nn.Module):
    """The kernel of a vote, from numbers that its places share.

    Args:
        kind: one of :data:`KERNELS`.
        sizes: whether it spans sizes too: (3, 3, 5, 5, 5, 5), else (5, 5, 5, 5).
    """

    def __init__(self, kind: str, sizes: bool):
        super().__init__()
        check_choice("kernel", kind, KERNELS)
        self.shape = (SIZES,) * (2 if sizes else 0) + (SIDE,) * 4
        entries = SIDE**4 * (SIZES**2 if sizes else 1)
        bound = entries**-0.5
        self.bias = nn.Parameter(torch.empty(1).uniform_(-bound, bound))
        if kind == "full":
            self.weight = nn.Parameter(torch.empty(self.shape).uniform_(-bound, bound).abs() * (1e-3 if sizes else 1))
            if not sizes:
                nn.init.zeros_(self.bias)
            self.where: Tensor | None = None
            self.share: Tensor | None = None
            return
        places, counts = _groups(kind)
        # Pairs of sizes, numbered in rows: the same size twice, neighbours, ends; "psi" sets the middle one apart.
        pairs = [1, 3, 2, 3, 0, 3, 2, 3, 1] if kind == "psi" else [0, 2, 1, 2, 0, 2, 1, 2, 0]
        pairs = pairs if sizes else [0]
        weight = torch.randn(max(pairs) + 1, len(counts))
        many = torch.tensor([[pairs.count(i) * count for count in counts] for i in range(len(weight))], device="cpu")
        self.weight = nn.Parameter(
            weight.abs() * 1e-3 * (many.to(weight) if sizes else 1)
        )  # 4-D ones are not multiplied
        # Told by the arguments alone, so that they are no buffers: neither saved nor rounded, and filled on "meta" too.
        self.where = torch.tensor(pairs, device="cpu")[:, None] * len(counts) + places
        self.share = 1.0 / many

    def forward(self) -> Tensor:
        if self.where is None:
            return self.weight
        assert self.share is not None
        shared = self.weight * self.share.to(self.weight)
        return shared.flatten()[self.where.to(self.weight.device)].view(self.shape)


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=True)


def resize4d(x: Tensor, first: Sequence[int], last: Sequence[int]) -> Tensor:
    """(B, h, w, h', w') with both grids resized, bilinear with corners kept."""
    batch, h, w, i, j = x.shape
    x = _resized(x.reshape(batch, h, w, i * j).permute(0, 3, 1, 2), first).permute(0, 2, 3, 1)
    x = _resized(x.reshape(batch, -1, i, j), last)
    return x.view(batch, *first, *last)


class CHMNet(nn.Module):
    """Confidence that each place of one image is each place of another.

    Args:
        kernel: ``"psi"``, ``"iso"`` or ``"full"``.
        embed_dims, depths, stem_dim: of the ResNets; those of ResNet-101 up to its third stage by default.
    """

    @checked
    def __init__(
        self,
        kernel: str = "psi",
        embed_dims: Sequence[int] = (64, 128, 256),
        depths: Sequence[int] = (3, 4, 23),
        stem_dim: int = 64,
    ):
        super().__init__()
        make = lambda: resnet(embed_dims, depths, stem_dim=stem_dim, num_classes=0)  # noqa: E731
        self.source, self.target = make(), make()
        dim = 4 * embed_dims[-1]
        self.convs = nn.ModuleList(nn.Conv2d(dim, dim // 4, 3, padding=1, bias=False) for _ in SCALES)
        self.sizes, self.places = HoughKernel(kernel, True), HoughKernel(kernel, False)

    def correlation(self, a: Tensor, b: Tensor) -> Tensor:
        """(B, 3, 3, h, w, i, j) cosines at all pairs of sizes, none negative, of maps (B, C, h, w) and (B, C, i, j)."""
        sizes = [s**0.5 for s in SCALES]
        sides = []
        for maps in (a, b):
            scaled = ([max(1, round(n * s)) for n in maps.shape[2:]] for s in sizes)
            sides.append([conv(_resized(maps, to)) for conv, to in zip(self.convs, scaled, strict=True)])
        rows = []
        for x, y in product(*sides):
            c = torch.einsum("bchw,bcij->bhwij", *(F.normalize(t, dim=1) for t in (x, y)))
            rows.append(resize4d(c, a.shape[2:], b.shape[2:]))
        return torch.stack(rows, 1).unflatten(1, (SIZES, SIZES)).clamp(min=0)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """(B, S, T) confidence for the S = 2h 2w places of ``source`` and those of ``target``.

        Args:
            source, target: (B, 3, H, W) images, normed as ImageNet's.
        """
        a, b = (t.permute(0, 3, 1, 2) for t in (self.source.forward_features(source),
                                                self.target.forward_features(target)))  # fmt: skip
        c = torch.sigmoid(conv6d(self.correlation(a, b), self.sizes()) + self.sizes.bias)
        c = resize4d(c.flatten(1, 2).amax(1), *([2 * n for n in t.shape[2:]] for t in (a, b)))
        c = F.softplus(conv4d(c[:, None], self.places()[None, None])[:, 0] + self.places.bias)
        c = c.flatten(3).flatten(1, 2)
        return mutual(c)

    def convert_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The released state dict in our names; every entry is used but those of the parts that nothing reads."""
        theirs = Released(state_dict, "the released CHMNet")
        theirs.matching(r"backbone\.(layer4\.|fc\.).*")
        out: dict[str, Tensor] = {}
        trunk = {m[1]: v for m, v in theirs.matching(r"backbone\.(.*)")}
        for number, name in enumerate(("source", "target")):
            half = {k: v.chunk(2)[number] if v.dim() else v for k, v in trunk.items()}
            out |= {f"{name}.{k}": v for k, v in convert_resnet(half, getattr(self, name)).items()}
        out |= theirs.renamed({r"learner\.conv2ds\.(\d)\.weight": r"convs.\1.weight"})
        for ours, name in (("sizes", "chm6d"), ("places", "chm4d")):
            shape = getattr(self, ours).weight.shape
            rows = sorted(theirs.matching(rf"learner\.{name}\.param\.(\d)"), key=lambda row: int(row[0][1]))
            weight = torch.stack([v for _, v in rows]) if rows else theirs.take(
                f"learner.{name}." + ("param" if ours == "sizes" else "weight"))  # fmt: skip
            if weight.numel() != shape.numel():
                raise ValueError(
                    f"state_dict has {weight.numel()} numbers for the kernel {name}, this model {shape.numel()}; "
                    f"choose kernel= among {list(KERNELS)}"
                )
            out[f"{ours}.weight"] = weight.view(shape)
            out[f"{ours}.bias"] = theirs.take(f"learner.{name}.bias").view(1)
        return theirs.close(out)


def mutual(c: Tensor) -> Tensor:
    """(B, S, T) what is best both ways is kept, the rest weakened: ``c^3 / (row's largest, column's largest)``."""
    rows, columns = c.amax(2, keepdim=True), c.amax(1, keepdim=True)
    return c * (c / rows.masked_fill(rows == 0, 1e-30)) * (c / columns.masked_fill(columns == 0, 1e-30))


def _axis(n: int, like: Tensor) -> Tensor:
    return torch.linspace(-1, 1, n, dtype=like.dtype, device=like.device)


def transfer(
    confidence: Tensor,
    points: Tensor,
    grid: Sequence[int] | None = None,
    target_grid: Sequence[int] | None = None,
    sigma: float = 17.0,
    reach: float | None = None,
) -> Tensor:
    """Points of the source in the target.

    Args:
        confidence: (B, S, T) of :class:`CHMNet`.
        points: (P, 2), y and x between -1 and 1.
        grid, target_grid: (rows, columns) of S and T; square by default.
        sigma: of the Gaussian around each place's best match, in cells.
        reach: how far from a point places still count, with a weight that falls to 0; 0.1, or more where the grid is
            so coarse that a point could lie beyond the reach of all.

    Returns:
        (B, P, 2), y and x.

    Raises:
        ValueError: grids that do not fit, a point that no place is near.
    """
    check_tensor("confidence", confidence)
    check_real("sigma", sigma, above=0.0)
    sides = []
    for name, given, size in (("grid", grid, confidence.shape[1]), ("target_grid", target_grid, confidence.shape[2])):
        both = (round(size**0.5),) * 2 if given is None else check_ints(name, given, least=1)
        if len(both) != 2 or both[0] * both[1] != size:
            raise ValueError(f"{name} must be (rows, columns) of {size} places, got {both}")
        sides.append(both)
    (h, w), (i, j) = sides
    best = confidence.argmax(2)
    y, x = (torch.arange(n, device=confidence.device) for n in (i, j))
    far = ((y - (best // j)[..., None]) ** 2)[..., :, None] + ((x - (best % j)[..., None]) ** 2)[..., None, :]
    weight = (confidence * torch.exp(-far.flatten(2).to(confidence.dtype) / (2 * sigma**2))).softmax(2)
    there = torch.cartesian_prod(_axis(i, confidence), _axis(j, confidence))
    here = torch.cartesian_prod(_axis(h, confidence), _axis(w, confidence))
    if reach is None:
        reach = max(0.1, *(2 / (n - 1) if n > 1 else 2.0 for n in (h, w)))
    points = points.to(confidence)
    near = ((points[:, None] - here) ** 2).sum(2) + 1e-5
    near = (reach - near.sqrt()).clamp(min=0)
    if bool((near.sum(1) == 0).any()):
        raise ValueError(f"no place lies within reach={reach} of some point; points must lie between -1 and 1")
    return (near / near.sum(1, keepdim=True)) @ (weight @ there)


def load_chmnet(state_dict: Mapping[str, Tensor], **settings: Any) -> CHMNet:
    """The model of a released state dict (``pas_psi.pt``), in evaluation mode.

    Args:
        state_dict: theirs.
        settings: of :class:`CHMNet`, where they are not those of the release.
    """
    net = CHMNet(**settings)
    net.load_state_dict(net.convert_state_dict(state_dict))
    return net.eval()
