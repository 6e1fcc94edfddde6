"""OAT: which object the gaze goes to next, pointed at among however many there are.

Tokens are objects: what a small convolutional net sees of one, beside a code of its place. An encoder reads all objects
and, once more, the one that is sought; a causal decoder reads the objects fixated so far. Where the decoder points,

    ``logits_ln = W_o [ (W_e^h enc_n) . (W_d^h dec_l) / sqrt(d) ]_h``,

the gaze goes; pointing at the object that is sought, in its second token, is to stop. There is no output vocabulary.

A place (row, column, flag) is coded by three rows of one table, cut to length; the flag says whether it is that of the
object sought. The table is fitted beforehand so that the cosine of two rows falls off like a Gaussian of their distance
(:func:`gaussian_table`, :func:`fit_table`).

For one shelf whose objects stand in one order, ``classes`` instead answers by a map of what the decoder gives.

Reference: Fang et al., 2024, "OAT: Object-Level Attention Transformer for Gaze Scanpath Prediction", arXiv 2407.13335;
``Seq2SeqTransformer`` and ``positionalEncodingLearned.py`` of HKUST-NISL/oat_eccv24.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import (
    check_axes,
    check_choice,
    check_divides,
    check_float,
    check_grid,
    check_int,
    check_ints,
    check_real,
    check_valid,
    check_whole,
    check_width,
    check_within,
    extremes,
    readable,
)
from ...nn.released import Released
from ...types import stats_dtype
from ..protocol import TaskModel, Terms


def gaussian(count: int, sigma: float = 2.0) -> Tensor:
    """(count, count) ``exp(-(i - j)^2 / (2 sigma^2))``, in float64."""
    at = torch.arange(check_int("count", count, least=1), dtype=torch.float64)
    return torch.exp(-(at[:, None] - at).square() / (2 * check_real("sigma", sigma, above=0) ** 2))


def gaussian_table(count: int, dim: int, sigma: float = 2.0, seed: int = 0) -> Tensor:
    """(count, dim) rows of length ``sqrt(dim)`` whose cosines are Gaussian of their distance: exactly, where they can.

    The square root of the matrix of cosines, turned at random. With fewer dimensions than rows, its strongest ones.

    >>> table = gaussian_table(9, 16)
    >>> torch.allclose(torch.cosine_similarity(table[:, None], table[None], -1), gaussian(9).float(), atol=1e-5)
    True
    """
    check_int("dim", dim, least=1)
    values, vectors = torch.linalg.eigh(gaussian(count, sigma))
    root = vectors[:, -dim:] * values[-dim:].clamp(min=0).sqrt()
    root = F.pad(root, (0, dim - root.shape[1]))
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q
    return (F.normalize(root @ turn, dim=1) * math.sqrt(dim)).float()


def sinusoid_table(count: int, dim: int, kind: str = "geometric", alpha: float = 0.9, step: float = 1.0) -> Tensor:
    """(count, dim) sines and cosines in turn, the codes that the release compares its fitted table with.

    Args:
        count, dim: rows and their width, which is even.
        kind: rates of pair i of d / 2, with j = 2 i: ``"geometric"``: ``10000 ** (-j / d)`` ("original" there);
            ``"linear"``: ``alpha j / d``; ``"power"``: ``j ** alpha / d`` ("exp1"); ``"share-power"``:
            ``(j / d) ** alpha`` ("exp2").
        alpha: of the latter three.
        step: how far apart rows are; the release has 1.6 for the rows of a shelf alone ("changeX").

    >>> sinusoid_table(3, 4)[0].tolist()
    [0.0, 1.0, 0.0, 1.0]
    """
    check_choice("kind", kind, ("geometric", "linear", "power", "share-power"))
    check_divides("2 (sines and cosines)", 2, "dim", check_int("dim", dim, least=2))
    check_real("alpha", alpha)
    at = check_real("step", step) * torch.arange(check_int("count", count, least=1), dtype=torch.float64)[:, None]
    j = torch.arange(0, dim, 2, dtype=torch.float64)
    rates = {
        "geometric": 10000 ** (-j / dim), "linear": alpha * j / dim, "power": j**alpha / dim,
        "share-power": (j / dim) ** alpha,
    }[kind]  # fmt: skip
    return torch.stack([(at * rates).sin(), (at * rates).cos()], -1).flatten(1).float()


def sharpened_places(places: Tensor, centre: tuple[int, int], order: float = 15.0) -> Tensor:
    """Codes of whole places, turned away from that of the centre until the square of the cosine is its power.

    With c the cosine of a code and the centre's, both of one flag, the code is turned in the plane of the two, its
    length kept, to the cosine ``sqrt(c ** order)``; where that power is negative, to 0. There
    ``(cos ** 2 - c ** order) ** 2`` is least, which the release looks for by BFGS from the code itself
    ("original_update"); its search in float32 ends where it begins, and leaves codes as they are.

    Args:
        places: (rows, columns, flags, D).
        centre: its row and column.
        order: of the power; odd whole numbers where cosines are negative.

    >>> table = sinusoid_table(5, 6)
    >>> codes = torch.cat([table[:3, None, None].expand(3, 5, 2, 6), table[:5, None].expand(3, 5, 2, 6)], -1)
    >>> new = sharpened_places(codes, (1, 2))
    >>> cosine = lambda x: float(torch.cosine_similarity(x[0, 2, 0], x[1, 2, 0], 0))
    >>> abs(cosine(new) ** 2 - cosine(codes) ** 15) < 1e-6
    True
    """
    check_float("places", places)
    check_axes("places", places, rows=None, columns=None, flags=None, D=None)
    at = check_ints("centre", centre, least=0)
    if len(at) != 2:
        raise ValueError(f"centre must be a row and a column, got {centre}")
    row, column = at
    if row >= places.shape[0] or column >= places.shape[1]:
        raise ValueError(f"centre must be a place of {places.shape[0]} x {places.shape[1]}, got {row}, {column}")
    check_real("order", order, above=0)
    x = places.double()
    middle = F.normalize(x[row, column], dim=-1)
    length = x.norm(dim=-1, keepdim=True)
    unit = F.normalize(x, dim=-1)
    cosine = (unit * middle).sum(-1, keepdim=True)
    power = cosine.clamp(-1, 1) ** order
    if bool(power.isnan().any()):
        raise ValueError(f"order must be a whole number, where cosines are negative, got {order}")
    wanted = power.clamp(min=0).sqrt() * cosine.sign()
    beside = unit - cosine * middle
    apart = beside.norm(dim=-1, keepdim=True)
    turned = wanted * middle + (1 - wanted.square()).clamp(min=0).sqrt() * beside / torch.where(apart > 0, apart, 1)
    # A code along the centre's has no plane, and its cosine is a power of itself.
    return torch.where(apart > 1e-12, length * turned, x).to(places.dtype)


def table_loss(table: Tensor, sigma: float = 2.0) -> Tensor:
    """What the release fits: squared errors of cosines, and the spread of lengths, over n (n - 1)."""
    check_float("table", table)
    check_axes("table", table, R=None, W=None)
    count = len(table)
    unit = F.normalize(table, dim=1)
    wrong = (unit @ unit.mT - gaussian(count, sigma).to(table)).square().sum()
    lengths = table.norm(dim=1)
    return (wrong + (lengths - lengths.mean()).square().mean()) / max(count * (count - 1), 1)


def fit_table(count: int, dim: int, sigma: float = 2.0, steps: int = 10_000, lr: float = 0.01, seed: int = 0) -> Tensor:
    """The table as the release makes it: Adam on :func:`table_loss`, from noise.

    Args:
        count, dim: rows and their width.
        sigma: how far cosines reach.
        steps, lr: of Adam.
        seed: of the noise.
    """
    check_int("dim", dim, least=1)
    noise = torch.randn(check_int("count", count, least=1), dim, generator=torch.Generator().manual_seed(seed))
    table = nn.Parameter(noise)
    optimizer = torch.optim.Adam([table], lr=check_real("lr", lr, above=0))
    with torch.enable_grad():
        for _ in range(check_int("steps", steps, least=0)):
            optimizer.zero_grad()
            table_loss(table, sigma).backward()
            optimizer.step()
    return table.detach()


class Pointed(NamedTuple):
    """Logits (B, 1 + L, N + 1) of the next object, the last one to stop; and what theirs gives padding: one number, or
    (B, 1 + L, 1) of a model with ``classes``."""

    logits: Tensor
    blank: Tensor


class PatchNet(nn.Module):
    """Images of objects (..., H, W, 3) to vectors.

    Args:
        dim: of the vectors.
        patch_size: the one height and width it takes; or ``None``: any, by pooling.
        levels: of that pooling: cells of 1 x 1, 2 x 2, 4 x 4 and so on.
    """

    def __init__(self, dim: int, patch_size: tuple[int, int] | None = None, levels: int = 2):
        super().__init__()
        self.patch_size, self.levels = patch_size, check_int("levels", levels, least=1)
        check_int("dim", dim, least=1)
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 5), nn.Conv2d(16, 32, 3)
        cells = sum(4**i for i in range(levels))
        if patch_size is not None:
            h, w = check_grid("patch_size", patch_size, (2,))
            cells = (((h - 4) // 5 - 2) // 3) * (((w - 4) // 5 - 2) // 3) if min(h, w) >= 29 else 0
            if not cells:
                raise ValueError(
                    f"patch_size must be at least 29 x 29, of which the net leaves one cell, got {h} x {w}"
                )
        self.fc = nn.Linear(32 * cells, dim)

    def forward(self, images: Tensor) -> Tensor:
        check_width("images", images, 3, "3 colours")
        h, w = images.shape[-3:-1]
        if self.patch_size is not None and (h, w) != tuple(self.patch_size):
            raise ValueError(
                f"images must be {self.patch_size[0]} x {self.patch_size[1]}, as patch_size says, got {h} x {w}; "
                "patch_size=None takes any"
            )
        if min(h, w) < 19:
            raise ValueError(f"images must be at least 19 x 19, of which the net leaves one cell, got {h} x {w}")
        flat = images.reshape(-1, h, w, 3).permute(0, 3, 1, 2)
        x = self.conv2(F.max_pool2d(self.conv1(flat).relu(), 5)).relu()
        if self.patch_size is not None:
            pooled = F.max_pool2d(x, 3).flatten(1)
        else:
            pooled = torch.cat([_pooled(x, 2**i) for i in range(self.levels)], 1)
        return self.fc(pooled).reshape(*images.shape[:-3], self.fc.out_features)


def _pooled(x: Tensor, cells: int) -> Tensor:
    """Maxima of ``cells`` x ``cells`` windows of one size, zeros around what does not fill them."""
    (h, w), pad = x.shape[-2:], []
    window = [-(-side // cells) for side in (h, w)]
    for side, size in ((w, window[1]), (h, window[0])):
        missing = size * cells - side
        pad += [missing // 2, missing - missing // 2]
    return F.max_pool2d(F.pad(x, pad), window).flatten(1)


class OAT(TaskModel):
    """Predicts paths of gaze over objects.

    Args:
        dim: of tokens, half of it what is seen and half the place; even.
        num_heads, hidden, depth: of the Transformer: heads, width of feed-forwards, layers of (encoder, decoder).
        pointer_heads: heads that point, mixed by one map.
        scale: of pointing; ``dim ** -0.5`` by default.
        patch_size: of images of objects; ``None`` takes any, by pooling of ``levels``.
        levels: see :class:`PatchNet`.
        table: (R, W) codes of rows, columns and flags with ``3 W >= dim / 2``; :func:`gaussian_table` by default,
            :func:`fit_table` or :func:`sinusoid_table`. Or (3, R, W): a table for each of the three. Or
            (rows, columns, 2, W) with ``W >= dim / 2``: codes of whole places, as of :func:`sharpened_places`.
        table_size: R of that default: places lie between 0 and R - 1.
        drop: dropout.
        classes: instead of pointing, one linear map to the logits of so many objects, of stopping and of padding:
            for a shelf whose objects always stand in one order (``CA_version`` 0 of the release). Objects are told
            by their number alone, and images must hold all of them.
        max_steps: fixations of an answer, at most.
        compat: ``"authors"``: places are cut to whole numbers, and a path begins at (rows / 2, columns / 2) cut
            likewise. By default places between rows of the table are interpolated, and it begins in the middle.

    Shape:
        images: (B, N, H, W, 3), one an object. places: (B, N, 2) row and column, of any arrangement. sought: (B,) the
        number of the object to find. path: (B, L) numbers of objects, -1 behind its end. ``valid`` (B, N) boolean,
        which objects exist; ``start`` (B, 2) where the gaze begins. Returns :class:`Pointed`: for the objects that come
        after none, after the first, and so on. ``target``: the path.

    >>> model = OAT(24, 2, 16, (1, 1), table_size=8).eval()
    >>> images, places = torch.rand(2, 6, 20, 20, 3), torch.rand(2, 6, 2) * 4
    >>> model(images, places, torch.tensor([1, 4]), torch.tensor([[0, 1], [4, -1]])).logits.shape
    torch.Size([2, 3, 7])
    >>> model.predict(images, places, torch.tensor([1, 4]), max_steps=5).shape
    torch.Size([2, 5])
    """

    table: Tensor

    def __init__(
        self, dim: int = 512, num_heads: int = 4, hidden: int = 512, depth: tuple[int, int] = (4, 4),
        pointer_heads: int = 2, scale: float | None = None, patch_size: tuple[int, int] | None = None, levels: int = 2,
        table: Tensor | None = None, table_size: int = 14, drop: float = 0.1, max_steps: int = 32,
        compat: str | None = None, classes: int | None = None,
    ):  # fmt: skip
        super().__init__()
        check_divides("2 (what is seen, and where)", 2, "dim", check_int("dim", dim, least=2))
        check_divides("num_heads", check_int("num_heads", num_heads, least=1), "dim", dim)
        check_choice("compat", compat, (None, "authors"))
        self.dim, self.compat, self.max_steps = dim, compat, check_int("max_steps", max_steps, least=1)
        self.pointer_heads = check_int("pointer_heads", pointer_heads, least=1)
        self.scale = dim**-0.5 if scale is None else check_real("scale", scale)
        if table is None:
            table = gaussian_table(check_int("table_size", table_size, least=2), -(-dim // 6))
        check_float("table", table)
        whole = table.dim() == 4
        least = (2, 2, 2, dim // 2) if whole else (2, -(-(dim // 2) // 3))
        good = table.dim() == 2 or (table.dim() == 3 and len(table) == 3) or (whole and table.shape[2] == 2)
        if not good or any(n < m for n, m in zip(table.shape[-len(least) :], least, strict=True)):
            raise ValueError(
                f"table must be (R, W) or (3, R, W) with R >= 2 and 3 W >= dim / 2 = {dim // 2}, or (rows, columns, "
                f"2, W) with at least two of both and W >= {dim // 2}, got {tuple(table.shape)}"
            )
        self.register_buffer("table", table.detach().clone())
        self.patches = PatchNet(dim // 2, patch_size, levels)
        drop = check_real("drop", drop, least=0, below=1)
        more = dict(dim_feedforward=check_int("hidden", hidden, least=1), dropout=drop, batch_first=True)
        layers = check_ints("depth", depth, least=1)
        if len(layers) != 2:
            raise ValueError(f"depth must be two numbers of layers, of encoder and decoder, got {depth}")
        self.encoder = nn.ModuleList(nn.TransformerEncoderLayer(dim, num_heads, **more) for _ in range(layers[0]))  # type: ignore[arg-type]
        self.decoder = nn.ModuleList(nn.TransformerDecoderLayer(dim, num_heads, **more) for _ in range(layers[1]))  # type: ignore[arg-type]
        self.dropout = nn.Dropout(drop)
        self.classes = None if classes is None else check_int("classes", classes, least=1)
        if classes is None:
            self.point_from, self.point_at = (nn.Linear(dim, pointer_heads * dim) for _ in range(2))
            self.mix = nn.Linear(pointer_heads, 1) if pointer_heads > 1 else nn.Identity()
        else:
            self.answer = nn.Linear(dim, classes + 2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot's uniform numbers for all that is no vector, each pointing head for itself."""
        for name, p in self.named_parameters():
            if p.dim() > 1:
                parts = p.chunk(self.pointer_heads) if name.startswith("point_") else (p,)
                for part in parts:
                    nn.init.xavier_uniform_(part)

    def codes(self, places: Tensor, flag: Tensor) -> Tensor:
        """(..., 2) rows and columns and (...) flags to (..., dim / 2)."""
        places = places.to(self.table.dtype)
        whole = self.table.dim() == 4
        last = torch.tensor(self._reach(), device=places.device)
        if self.compat == "authors":
            low, share = places.long(), torch.zeros_like(places)
        else:
            low = torch.minimum(places.detach().long(), last - 1)
            share = places - low
        if whole:
            row, column, flag = low[..., 0], low[..., 1], flag.long()
            across, down = share[..., 1:], share[..., :1]

            def along(row: Tensor) -> Tensor:
                near = self.table[row, column, flag]
                return near if self.compat else near + across * (self.table[row, column + 1, flag] - near)

            near = along(row)
            return (near if self.compat else near + down * (along(row + 1) - near))[..., : self.dim // 2]
        rows, columns, flags = self.table if self.table.dim() == 3 else (self.table,) * 3

        def read(table: Tensor, axis: int) -> Tensor:
            near = table[low[..., axis]]
            return near if self.compat else near + share[..., axis, None] * (table[low[..., axis] + 1] - near)

        return torch.cat([read(rows, 0), read(columns, 1), flags[flag.long()]], -1)[..., : self.dim // 2]

    def _reach(self) -> tuple[int, int]:
        """The last row and column that the table holds."""
        rows, columns = self.table.shape[:2] if self.table.dim() == 4 else (self.table.shape[-2],) * 2
        return rows - 1, columns - 1

    def _check(
        self, images: Tensor, places: Tensor, sought: Tensor, valid: Tensor | None, start: Tensor | None
    ) -> None:
        check_float("images", images)
        check_float("places", places)
        check_axes("images", images, B=None, N=None, H=None, W=None, C=3)
        batch, count = images.shape[:2]
        check_axes("places", places, B=batch, N=count, rc=2)
        check_whole("sought", sought)
        check_axes("sought", sought, B=batch)
        if not count:
            raise ValueError(f"images must hold at least one object, got {tuple(images.shape)}")
        check_within("sought", sought, count, "object")
        if self.classes is not None and count != self.classes:
            raise ValueError(f"images must hold the {self.classes} objects that classes says, got {count}")
        check_valid("valid", valid, (batch, count))
        if start is not None:
            check_axes("start", start, B=batch, rc=2)
        if not readable(places) or not places.numel():
            return
        if valid is not None:
            there = valid.gather(1, sought[:, None])
            if not bool(there.all()):
                raise ValueError(
                    f"sought must exist by valid, but it does not in sample {there.logical_not().nonzero()[0, 0]}"
                )
        known = places if valid is None else places.masked_fill(~valid.unsqueeze(-1), 0)
        reach = self._reach()
        last = torch.tensor(reach, device=places.device)
        for name, at in (("places", known), ("start", start)):
            if at is not None and not bool(((at >= 0) & (at <= last)).all()):
                high = f"{reach[0]}" if reach[0] == reach[1] else f"{reach[0]} (rows) and {reach[1]} (columns)"
                raise ValueError(
                    f"{name} must lie between 0 and {high}, which the table holds, got "
                    f"{float(at.min())} to {float(at.max())}; a larger table_size holds more"
                )

    def read(
        self, images: Tensor, places: Tensor, sought: Tensor, valid: Tensor | None = None, start: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All objects and the one that is sought, encoded, (B, N + 1, dim); and what the decoder gets of a start, a
        fixation on each object: (B, 1 + N, dim). The third: which of the former exist."""
        self._check(images, places, sought, valid, start)
        batch, count = images.shape[:2]
        if valid is None:
            valid = torch.ones(batch, count, dtype=torch.bool, device=images.device)
        images = images.masked_fill(~valid[:, :, None, None, None], 0)
        places = places.masked_fill(~valid.unsqueeze(-1), 0)
        if start is None and self.compat == "authors":
            start = (places.amax(1) + 1) / 2
        elif start is None:
            high, low = places.amax(1), places.masked_fill(~valid.unsqueeze(-1), torch.inf).amin(1)
            start = (low + high) / 2
        seen = self.patches(torch.cat([torch.ones_like(images[:, :1]), images], 1))
        target = sought[:, None] == torch.arange(count, device=sought.device)
        where = torch.cat([start.unsqueeze(1).to(places.dtype), places], 1)
        given = torch.cat([seen, self.codes(where, F.pad(target, (1, 0))).to(seen.dtype)], -1)
        # Among all objects none is marked: the token of the one that is sought stands behind them, and is.
        plain = torch.cat([seen[:, 1:], self.codes(places, torch.zeros_like(target)).to(seen.dtype)], -1)
        row = (sought + 1)[:, None, None].expand(-1, 1, self.dim)
        tokens, there = torch.cat([plain, given.gather(1, row)], 1), F.pad(valid, (0, 1), value=True)
        for layer in self.encoder if batch else ():  # torch's layers take no empty batch with a mask
            tokens = layer(tokens, src_key_padding_mask=~there)
        return tokens, given, there

    def point(self, tokens: Tensor, given: Tensor, there: Tensor, path: Tensor) -> Pointed:
        """Logits after every beginning of a path, from what :meth:`read` gave."""
        at = F.pad(path.clamp(min=-1) + 1, (1, 0))  # 0: the start; padding reads it too, and nothing reads padding
        x = given.gather(1, at.unsqueeze(-1).expand(-1, -1, self.dim))
        length = x.shape[1]
        x = self.dropout(x + _waves(length, self.dim, x.device).to(x.dtype))
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        for layer in self.decoder if len(x) else ():
            x = layer(x, tokens, tgt_mask=future, memory_key_padding_mask=~there)
        if self.classes is not None:
            logits = self.answer(x)
            return Pointed(logits[..., :-1].masked_fill(~there.unsqueeze(1), float("-inf")), logits[..., -1:])
        q, k = (
            m(t).unflatten(-1, (self.pointer_heads, -1)) for m, t in ((self.point_from, x), (self.point_at, tokens))
        )
        logits = self.mix(torch.einsum("blhd,bnhd->blnh", q, k) * self.scale).squeeze(-1)
        blank = self.mix.bias.reshape(()) if isinstance(self.mix, nn.Linear) else logits.new_zeros(())
        return Pointed(logits.masked_fill(~there.unsqueeze(1), float("-inf")), blank)

    def forward(
        self, images: Tensor, places: Tensor, sought: Tensor, path: Tensor, valid: Tensor | None = None,
        start: Tensor | None = None,
    ) -> Pointed:  # fmt: skip
        read = self.read(images, places, sought, valid, start)
        self._check_path("path", path, *images.shape[:2])
        return self.point(*read, path)

    @staticmethod
    def _check_path(name: str, path: Tensor, batch: int, count: int) -> None:
        check_whole(name, path)
        check_axes(name, path, B=batch, L=None)
        low, high = extremes(path, (0, 0))
        if low < -1 or high >= count:
            raise ValueError(
                f"{name} points at object {low if low < -1 else high}; possible: 0 to {count - 1}, "
                "and -1 behind its end"
            )
        if readable(path) and bool(((path[:, :-1] < 0) & (path[:, 1:] >= 0)).any()):
            raise ValueError(f"{name} goes on behind its end, which -1 marks")

    def loss(self, prediction: Pointed, target: Tensor, compat: str | None = None) -> Terms:
        """Cross-entropy of each fixation of the path ``target`` (B, L), and of stopping behind it.

        Args:
            prediction: of ``forward`` on the same path.
            target: the path.
            compat: ``"authors"``: padding is one more thing to point at, which is never right.
        """
        check_choice("compat", compat, (None, "authors"))
        logits, blank = prediction
        batch, length, count = logits.shape[0], logits.shape[1] - 1, logits.shape[2] - 1
        self._check_path("target", target, batch, count)
        check_axes("target", target, B=batch, L=length)
        if not batch:
            raise ValueError("target is empty: there is nothing to learn from")
        wanted = F.pad(target, (0, 1), value=-1)
        before = F.pad(wanted, (1, 0), value=0)[:, :-1]
        wanted = wanted.masked_fill((wanted < 0) & (before >= 0), count)  # the first behind a path: stop
        logits = logits.to(stats_dtype(logits.dtype))
        if compat == "authors":
            logits = torch.cat([logits, blank.to(logits.dtype).expand(batch, length + 1, 1)], -1)
        return {"next": F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-1)}

    def predict(
        self, images: Tensor, places: Tensor, sought: Tensor, path: Tensor | None = None, valid: Tensor | None = None,
        start: Tensor | None = None, max_steps: int | None = None, samples: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """Paths, -1 behind where they stop; never before the first fixation.

        Args:
            images, places, sought, valid, start: as in ``forward``.
            path: not looked at; batches for training hold one.
            max_steps: fixations at most; those of the model by default.
            samples: draw so many paths for each sample; ``None`` takes the likeliest object each time.
            generator: to draw with.

        Returns:
            (B, max_steps), or (B, samples, max_steps).
        """
        steps = self.max_steps if max_steps is None else check_int("max_steps", max_steps, least=1)
        many = 1 if samples is None else check_int("samples", samples, least=1)
        tokens, given, there = (t.repeat_interleave(many, 0) for t in self.read(images, places, sought, valid, start))
        batch, count = len(tokens), images.shape[1]
        path = torch.full((batch, 0), -1, dtype=torch.long, device=images.device)
        going = torch.ones(batch, dtype=torch.bool, device=images.device)
        for step in range(steps):
            logits = self.point(tokens, given, there, path).logits[:, -1].float()
            if not step:
                logits = logits[:, :-1]
            if samples is None or not batch:
                chosen = logits.argmax(-1)
            else:
                chosen = logits.softmax(-1).multinomial(1, generator=generator).squeeze(1)
            going = going & (chosen < count)
            path = torch.cat([path, chosen.masked_fill(~going, -1).unsqueeze(1)], 1)
            if not bool(going.any()):
                break
        path = F.pad(path, (0, steps - path.shape[1]), value=-1)
        return path if samples is None else path.unflatten(0, (-1, many) if batch else (0, many))

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor], table: Tensor) -> dict[str, Tensor]:
        """From the authors' ``Seq2SeqTransformer``, with object attention or (``CA_version`` 0, ``classes`` here)
        without; ``table`` is in a file of its own there."""
        theirs = Released(state_dict, "the authors' Seq2SeqTransformer")
        theirs.leave(r"LinearEmbedding\..*", because="it is never called")
        theirs.leave(r"onedpositional_encoding\.pos_embedding", because="it is computed")
        out = theirs.renamed(
            {
                r"transformer_(en|de)coder\.layers\.(.*)": r"\1coder.\2",
                r"cnn_embedding\.cnn([12])\.0\.(weight|bias)": r"patches.conv\1.\2",
                r"cnn_embedding\.fc\.(weight|bias)": r"patches.fc.\1",
            }
        )
        if "readout.weight" not in theirs:
            out |= theirs.renamed({r"generator\.(weight|bias)": r"answer.\1"})
            return theirs.close(out | {"table": table.clone()})
        theirs.leave(r"generator\..*", because="it is never called where objects are pointed at")
        heads = theirs.matching(r"cross_attentions\.(\d+)\.(en|de)code_fc\.(weight|bias)")
        one = max((int(m[1]) for m, _ in heads), default=0) == 0
        for side, name in (("en", "point_at"), ("de", "point_from")):
            for kind in ("weight", "bias"):
                parts = sorted((int(m[1]), v) for m, v in heads if (m[2], m[3]) == (side, kind))  # by head
                if not parts:
                    raise ValueError(f"state_dict has no cross_attentions.0.{side}code_fc.{kind}; CAVersion must be 3")
                out[f"{name}.{kind}"] = torch.cat([v for _, v in parts])
        if one:
            theirs.leave(r"readout\..*", because="one head is not mixed")
        out |= theirs.renamed({r"readout\.(weight|bias)": r"mix.\1"})
        return theirs.close(out | {"table": table.clone()})


def _waves(length: int, dim: int, device: torch.device) -> Tensor:
    """(length, dim) sines and cosines of the number of a fixation, in turn."""
    at = torch.arange(length, device=device, dtype=torch.float32)[:, None]
    rate = torch.exp(-torch.arange(0, dim, 2, device=device, dtype=torch.float32) * math.log(10000) / dim)
    return torch.stack([(at * rate).sin(), (at * rate).cos()], -1).flatten(1)[:, :dim]
