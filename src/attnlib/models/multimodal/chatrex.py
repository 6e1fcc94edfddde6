"""ChatRex: a language model that points at boxes by their number (Jiang et al., 2024, arXiv 2411.18363).

Boxes come from a proposal network (:class:`attnlib.models.multimodal.proposals.UPN`). Each becomes an object token:
features of the image inside the box and an encoding of the box. The prompt lists ``<obj0>``, ``<obj1>`` and so on, each
followed by its object's features; the answer names objects by number, and a table gives the boxes back:

``f = MLP([RoIAlign(maps, b), sin(b)])``, ``<ground>person</ground><objects><obj2><obj5></objects>``

The authors have published UPN; what the language model is told is only described in the paper, so that this side is
our reading and claims no parity. Settings that the paper leaves open are arguments.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_axes, check_choice, check_divides, check_flag, check_int, check_ints
from ...hooks import Intervention
from ...ops.points import square_grid
from ..detect.boxes import to_centres
from ..detect.regions import roi_align
from .losses import UNITS, check_target_boxes
from .proposals import box_sines
from .segmenter import check_size
from .task_tokens import TaskTokens, UseTaskTokens

MERGES = ("concat", "sum")


def to_shares(boxes: Tensor, units: str, size: Sequence[int], name: str = "boxes") -> Tensor:
    """Boxes (..., 4), corners, in shares of an image.

    Args:
        units: ``"pixel"`` or ``"share"``: what they are given in.
        size: (height, width) of the image.

    Raises:
        ValueError: units that are not known, boxes with x2 <= x1, numbers that are no shares.

    >>> to_shares(torch.tensor([[10.0, 10, 50, 20]]), "pixel", (40, 100)).mul(100).round().tolist()
    [[10.0, 25.0, 50.0, 50.0]]
    """
    check_choice("units", units, UNITS)
    height, width = check_size("size", size)
    check_target_boxes(name, boxes, units)
    return boxes / boxes.new_tensor([width, height, width, height]) if units == "pixel" else boxes


class ObjectFeatures(nn.Module):
    """Features of boxes, as a language model reads them.

    Args:
        channels: of the maps that are read, (B, C, h, w) each.
        dim: width of the language model.
        cells: of a box along each side, of which the mean is taken (unsure).
        merge: maps ``"concat"`` along channels, or ``"sum"`` of maps of one width (unsure).
        place_dim: width of the encoding of one number of a box; 0 for none.

    >>> ObjectFeatures((8, 16), 32)([torch.randn(1, 8, 8, 8), torch.randn(1, 16, 4, 4)],
    ...     [torch.tensor([[0.1, 0.1, 0.5, 0.5]])])[0].shape
    torch.Size([1, 32])
    """

    def __init__(self, channels: Sequence[int], dim: int, cells: int = 7, merge: str = "concat", place_dim: int = 64):
        super().__init__()
        self.channels = check_ints("channels", channels, least=1)
        check_int("dim", dim, least=1)
        check_choice("merge", merge, MERGES)
        self.cells, self.merge = check_int("cells", cells, least=1), merge
        self.place_dim = check_int("place_dim", place_dim, least=0)
        check_divides("2", 2, "place_dim", place_dim)
        if merge == "sum" and len(set(self.channels)) != 1:
            raise ValueError(f"merge='sum' needs maps of one width, got channels={self.channels}")
        width = sum(self.channels) if merge == "concat" else self.channels[0]
        self.mlp = nn.Sequential(nn.Linear(width + 4 * place_dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> list[Tensor]:
        """For every image (K, dim) features of its boxes (K, 4), corners in shares of it; K may be 0.

        Raises:
            ValueError: maps that do not fit, boxes with x2 <= x1 or that are no shares.
        """
        if len(maps) != len(self.channels):
            raise ValueError(f"maps must hold {len(self.channels)} maps of channels {self.channels}, got {len(maps)}")
        for i, (m, c) in enumerate(zip(maps, self.channels, strict=True)):
            check_axes(f"maps[{i}]", m, B=len(boxes), C=c, h=None, w=None)
        for i, b in enumerate(boxes):
            check_target_boxes(f"boxes[{i}]", b, "share")
        every = torch.cat([b.to(maps[0]) for b in boxes])
        owner = torch.cat([b.new_full((len(b), 1), i).to(maps[0]) for i, b in enumerate(boxes)])
        found = []
        for m in maps:
            # Boxes are shares, and cells of the map are its pixels.
            size = m.new_tensor([m.shape[3], m.shape[2]] * 2)
            found.append(roi_align(m, torch.cat([owner, every * size], 1), self.cells).mean((2, 3)))
        x = torch.cat(found, 1) if self.merge == "concat" else torch.stack(found).sum(0)
        if self.place_dim:
            x = torch.cat([x, box_sines(to_centres(every), self.place_dim)], 1)
        return list(self.mlp(x).split([len(b) for b in boxes]))


class DualVision(nn.Module):
    """Tokens of a picture from two encoders: one of low and one of high resolution, side by side in channels (unsure).

    Args:
        low_dim: width of the tokens (B, P, C) of the first, which are as many as come out.
        high_dim: channels of the map (B, C', H, W) of the second, pooled to their grid.
        dim: width of the language model.

    >>> DualVision(8, 12, 16)(torch.randn(1, 16, 8), torch.randn(1, 12, 10, 10)).shape
    torch.Size([1, 16, 16])
    """

    def __init__(self, low_dim: int, high_dim: int, dim: int):
        super().__init__()
        for name, value in (("low_dim", low_dim), ("high_dim", high_dim), ("dim", dim)):
            check_int(name, value, least=1)
        self.low_dim, self.high_dim = low_dim, high_dim
        self.mlp = nn.Sequential(nn.Linear(low_dim + high_dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, low: Tensor, high: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        """(B, P, dim); ``grid`` (rows, columns) of the P tokens, a square by default.

        Raises:
            ValueError: tokens that fill no square where no grid is given.
        """
        check_axes("low", low, B=None, P=None, C=self.low_dim)
        check_axes("high", high, B=len(low), C=self.high_dim, H=None, W=None)
        if grid is None:
            grid = square_grid(low.shape[1], "low")
        rows, columns = check_size("grid", grid)
        if rows * columns != low.shape[1]:
            raise ValueError(f"grid={(rows, columns)} has {rows * columns} cells, and low {low.shape[1]} tokens")
        pooled = F.adaptive_avg_pool2d(high, (rows, columns)).flatten(2).transpose(1, 2)
        return self.mlp(torch.cat([low, pooled], -1))


class Grounded(NamedTuple):
    """A phrase of an answer, and the numbers of the objects that it names."""

    phrase: str
    objects: tuple[int, ...]


#: How answers are written, see :class:`ObjectIndex`.
FORMAT: Mapping[str, str] = {
    "object": "<obj{}>", "phrase": "<ground>{}</ground>", "objects": "<objects>{}</objects>", "placeholder": "<object>",
}  # fmt: skip


class ObjectIndex:
    """The words for objects: how a prompt lists them, how an answer names them, and which boxes it means.

    Args:
        count: index tokens there are; the paper's prompts hold about a hundred (unsure).
        words: how they are written, see :data:`FORMAT`; what is not given is as there.

    >>> index = ObjectIndex(8)
    >>> index.listed(2)
    '<obj0><object><obj1><object>'
    >>> text = index.written([Grounded("person", (1, 0))])
    >>> text, index.read(text, 2)
    ('<ground>person</ground><objects><obj1><obj0></objects>', [Grounded(phrase='person', objects=(1, 0))])
    """

    def __init__(self, count: int = 100, words: Mapping[str, str] | None = None):
        self.count = check_int("count", count, least=1)
        if words and (foreign := sorted(set(words) - set(FORMAT))):
            raise ValueError(f"words names {foreign[0]!r}; possible: {sorted(FORMAT)}")
        self.words = {**FORMAT, **(words or {})}
        for name in ("object", "phrase", "objects"):
            if self.words[name].count("{}") != 1:
                raise ValueError(f"words[{name!r}] must have one {{}} in it, got {self.words[name]!r}")
        # Any whole number is read, so that one out of range is told and not passed over.
        number = re.escape(self.words["object"]).replace(r"\{\}", r"(-?\d+)")
        phrase = re.escape(self.words["phrase"]).replace(r"\{\}", "(.*?)")
        objects = re.escape(self.words["objects"]).replace(r"\{\}", f"((?:{number.replace('(', '(?:')})*)")
        self._number, self._pair = re.compile(number), re.compile(phrase + objects, re.DOTALL)

    def names(self) -> list[str]:
        """The index tokens."""
        return [self.words["object"].format(i) for i in range(self.count)]

    def check_objects(self, number: int) -> int:
        """Raise ``ValueError`` where there are more objects than index tokens."""
        check_int("objects", number, least=0)
        if number > self.count:
            raise ValueError(
                f"{number} objects need as many index tokens, and there are {self.count}; keep the best "
                f"{self.count} proposals (chosen(..., most={self.count})) or give ObjectIndex({number})"
            )
        return number

    def listed(self, number: int) -> str:
        """The part of a prompt that lists objects: every index token with the placeholder of its features behind."""
        self.check_objects(number)
        return "".join(self.words["object"].format(i) + self.words["placeholder"] for i in range(number))

    def written(self, found: Sequence[Grounded]) -> str:
        """An answer, as a model is taught to write it."""
        out = []
        for phrase, objects in found:
            for i in objects:
                check_int("objects", i, least=0, most=self.count - 1)
            named = "".join(self.words["object"].format(i) for i in objects)
            out.append(self.words["phrase"].format(phrase) + self.words["objects"].format(named))
        return "".join(out)

    def read(self, text: str, number: int) -> list[Grounded]:
        """What an answer says of ``number`` objects; text beside phrases with objects is passed over.

        Raises:
            ValueError: an index that no object has.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, got {type(text).__name__}")
        self.check_objects(number)
        found = []
        for phrase, objects in self._pair.findall(text):
            numbers = tuple(int(i) for i in self._number.findall(objects))
            for i in numbers:
                if not 0 <= i < number:
                    possible = f"0 to {number - 1}" if number else "none"
                    raise ValueError(f"text names {self.words['object'].format(i)}; possible: {possible}")
            found.append(Grounded(phrase, numbers))
        return found

    def boxes(self, text: str, boxes: Tensor) -> list[tuple[str, Tensor]]:
        """Phrases of an answer with their boxes (k, 4), out of those (K, 4) that the prompt listed."""
        return [(phrase, boxes[list(objects)]) for phrase, objects in self.read(text, len(boxes))]


class KnownObjects(Intervention):
    """Only indices of objects that the prompt lists are ever chosen while decoding.

    Args:
        index_tokens: ids of the index tokens, in order.
        counts: objects of each sample of the prompt; one number for all.

    Raises:
        ValueError: more objects than index tokens.
    """

    name = "known-objects"
    follows_sequence = False

    def __init__(self, index_tokens: Sequence[int], counts: int | Sequence[int]):
        self.index_tokens = check_ints("index_tokens", index_tokens, least=0)
        if not self.index_tokens or len(set(self.index_tokens)) != len(self.index_tokens):
            raise ValueError("index_tokens holds one id twice" if self.index_tokens else "index_tokens is empty")
        most = len(self.index_tokens)
        self.counts = (counts,) if isinstance(counts, int) else tuple(counts)
        for c in self.counts:
            check_int("counts", c, least=0, most=most, also=f"of {most} index tokens")

    def on_logits(self, ids: Tensor, logits: Tensor) -> Tensor:
        counts = torch.tensor(self.counts, device=logits.device)
        if len(logits) % len(counts):
            raise ValueError(f"counts says objects of {len(counts)} samples, and the batch has {len(logits)} rows")
        counts = counts.repeat_interleave(len(logits) // len(counts))
        known = torch.tensor(self.index_tokens, device=logits.device)
        if int(known.max()) >= logits.shape[1]:
            raise ValueError(f"index_tokens holds {int(known.max())}, and there are scores of {logits.shape[1]} tokens")
        absent = torch.arange(len(known), device=logits.device) >= counts[:, None]
        return logits.index_copy(1, known, logits[:, known].masked_fill(absent, float("-inf")))


class ChatRex(nn.Module):
    """Object tokens for any transformers model: rows of the index tokens, features of the objects.

    ::

        rex = ChatRex(index_tokens, placeholder, features=ObjectFeatures((256,), dim), dim=dim)
        with attnlib.attach(model, *rex.use(maps, boxes, units="pixel", sizes=sizes)):
            out = model.generate(**inputs)
        ObjectIndex(len(index_tokens)).boxes(tokenizer.decode(out[0]), boxes[0])

    The state dict holds rows and the network of features, not the model.

    Args:
        index_tokens: ids of ``<obj0>``, ``<obj1>`` ..., in the model's vocabulary.
        placeholder: id of the token whose places the features take.
        features: of boxes.
        dim: width of the model.
        outputs: rows of the model's head for the index tokens are learned as well.
    """

    def __init__(
        self, index_tokens: Sequence[int], placeholder: int, features: nn.Module, dim: int, outputs: bool = True
    ):
        super().__init__()
        self.index_tokens = check_ints("index_tokens", index_tokens, least=0)
        check_int("placeholder", placeholder, least=0)
        check_flag("outputs", outputs)
        self.features = features
        names = {**{f"obj{i}": t for i, t in enumerate(self.index_tokens)}, "object": placeholder}
        self.tokens = TaskTokens(names, dim, dict.fromkeys(names), outputs=outputs, std=0.02)

    def use(
        self, maps: Sequence[Tensor], boxes: Sequence[Tensor], units: str, sizes: Sequence[Sequence[int]]
    ) -> tuple[UseTaskTokens, KnownObjects]:
        """What to attach for a prompt that lists these boxes.

        Args:
            maps: of a vision encoder, for :class:`ObjectFeatures`.
            boxes: for each sample (K, 4) corners; K may be 0, for plain chat.
            units: ``"pixel"`` or ``"share"``.
            sizes: (height, width) of every image.

        Raises:
            ValueError: units that are not known, boxes with x2 <= x1, more objects than index tokens.
        """
        if len(boxes) != len(sizes):
            raise ValueError(f"boxes are given for {len(boxes)} images, sizes for {len(sizes)}")
        limits = ObjectIndex(len(self.index_tokens))
        counts = [limits.check_objects(len(b)) for b in boxes]
        shares = [to_shares(b, units, s, f"boxes[{i}]") for i, (b, s) in enumerate(zip(boxes, sizes, strict=True))]
        placed = self.features(maps, [s.clamp(0, 1) for s in shares])
        return UseTaskTokens(self.tokens, {"object": placed}), KnownObjects(self.index_tokens, counts)
