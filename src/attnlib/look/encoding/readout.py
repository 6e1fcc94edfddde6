"""Read-outs from a map of features to the responses of brain areas: routed by content, fixed in space, or linear.

Every area ``r`` has a learned query ``Q_r``. One layer lets it read the patches ``F`` (positions ``P``), and the token
it becomes is mapped to the responses of its units by a map that all areas of a group (a hemisphere) share::

    t_r = softmax_heads(W_q Q_r . W_k (F + P)) (W_v F)  through W_o
    t_r <- t_r + W_2 relu(W_1 LN(t_r))
    y_v = sum over r that hold v of (U LN(t_r))_v

Areas do not read each other, so that a query moves the responses of its own units only. :class:`SpatialReadout` has a
learned map over places instead of the attention, the same for every picture; :class:`LinearReadout` none at all.

Reference: Adeli, Sun and Kriegeskorte, 2025, "Transformer brain encoders explain human high-level visual responses"
(https://arxiv.org/abs/2505.17329). Written from its equations; the release is under the GPL, and none of it is here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_divides, check_flag, check_grid, check_int, check_rank, check_real, shaped
from ...nn.released import Released, split_rule
from ...ops import attention

#: What has a query of its own: an area of a group, a unit, or a group.
RESOLUTIONS = ("area", "unit", "group")
Resolution = Literal["area", "unit", "group"]


class Read(NamedTuple):
    """What a read-out gives.

    Args:
        responses: per group (B, V).
        tokens: (B, Q, C) of the queries; ``None`` without queries.
        weights: (B, H, Q, N) of patches, each row adding up to 1 (H is 1 where the map is fixed); only where they were
            asked for.
    """

    responses: tuple[Tensor, ...]
    tokens: Tensor | None = None
    weights: Tensor | None = None


def with_rest(areas: Tensor) -> Tensor:
    """(R, V) -> (R, V), or (R + 1, V) with an area for the units that are in none.

    >>> with_rest(torch.tensor([[True, False, False]])).tolist()
    [[True, False, False], [False, True, True]]
    """
    check_rank("areas", areas, 2, "(R, V)")
    rest = ~areas.bool().any(0)
    return torch.cat([areas.bool(), rest[None]]) if bool(rest.any()) else areas.bool()


def detr_positions(height: int, width: int, dim: int) -> Tensor:
    """(height * width, dim): sines and cosines in turn of rows, then of columns, whose last one is at 2 pi.

    >>> detr_positions(2, 3, 8).shape
    torch.Size([6, 8])
    """
    check_divides("4", 4, "dim", dim)
    half = dim // 2
    period = 10000.0 ** (2 * (torch.arange(half) // 2) / half)

    def waves(n: int) -> Tensor:
        angle = (torch.arange(1, n + 1) / (n + 1e-6) * 2 * math.pi)[:, None] / period
        return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], -1).flatten(1)

    rows, columns = waves(height), waves(width)
    return torch.cat([rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], -1).flatten(0, 1)


class _Readout(nn.Module):
    """Queries of areas, units or groups, and how their tokens become responses."""

    def __init__(self, areas: Sequence[Tensor], resolution: str, width: int):
        super().__init__()
        check_choice("resolution", resolution, RESOLUTIONS)
        if isinstance(areas, Tensor) or not len(areas):
            raise TypeError("areas must be a sequence of (R, V) masks, one per group such as a hemisphere")
        self.resolution = resolution
        self.masks: list[Tensor] = []  # as given: no buffers, since they are told and not learned
        for i, mask in enumerate(areas):
            check_rank(f"areas[{i}]", mask, 2, "(R, V)")
            if not mask.numel():
                raise ValueError(f"areas[{i}] must hold an area and a unit at least, got {tuple(mask.shape)}")
            free = (~mask.bool().any(0)).nonzero()[:, 0].tolist()
            if free:
                raise ValueError(
                    f"areas[{i}]: units {free[:10]} are in no area, so that nothing predicts them; leave them out, or "
                    "give them one with with_rest(areas)"
                )
            self.masks.append(mask.bool())
        self.units = [int(mask.shape[1]) for mask in areas]
        per = {"area": lambda m: m.shape[0], "unit": lambda m: m.shape[1], "group": lambda m: 1}[resolution]
        self.queries = [int(per(mask)) for mask in areas]
        self.read = nn.ModuleList(nn.Linear(width, units) for units in self.units)

    def _responses(self, tokens: Tensor) -> tuple[Tensor, ...]:
        out = []
        for own, read, mask in zip(tokens.split(self.queries, 1), self.read, self.masks, strict=True):
            assert isinstance(read, nn.Linear)
            if self.resolution == "unit":
                out.append((own * read.weight).sum(-1) + read.bias)
            elif self.resolution == "group":
                out.append(read(own[:, 0]))
            else:
                out.append((read(own) * mask.to(own.device)).sum(1))
        return tuple(out)


class AttentionReadout(_Readout):
    """Responses routed by what is in the picture.

    Args:
        dim: width of features.
        areas: per group (a hemisphere) a boolean (R, V): which units an area holds. Areas may overlap: the response
            of a unit is then the sum over its areas.
        resolution: ``"area"``: a query per area, ``"unit"``: per unit, ``"group"``: per group.
        num_heads: heads.
        hidden: width of the MLP.
        v_proj: map features to values; without it the patches themselves are mixed, head by head.
        final_norm: LayerNorm before the read-out. The two released layers have both, or neither.
        dropout: of weights, MLP and its output, in training.

    Shape:
        features (B, h, w, C) -> per group (B, V).

    >>> areas = torch.eye(2, dtype=torch.bool).repeat_interleave(3, 1)  # two areas of three units
    >>> model = AttentionReadout(16, [areas, areas], num_heads=2)
    >>> [y.shape for y in model(torch.randn(4, 5, 5, 16)).responses]
    [torch.Size([4, 6]), torch.Size([4, 6])]
    """

    def __init__(
        self,
        dim: int,
        areas: Sequence[Tensor],
        *,
        resolution: Resolution = "area",
        num_heads: int = 16,
        hidden: int = 1024,
        v_proj: bool = True,
        final_norm: bool = True,
        dropout: float = 0.1,
    ):
        check_divides("num_heads", num_heads, "dim", check_int("dim", dim, least=1))
        check_divides("4", 4, "dim", dim)
        super().__init__(areas, resolution, dim)
        self.dim, self.num_heads = dim, num_heads
        self.drop = nn.Dropout(check_real("dropout", dropout, least=0, below=1))
        self.query = nn.Embedding(sum(self.queries), dim)
        self.q, self.k, self.proj = (nn.Linear(dim, dim) for _ in range(3))
        self.v = nn.Linear(dim, dim) if check_flag("v_proj", v_proj) else None
        self.norm_mlp = nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, check_int("hidden", hidden, least=1)), nn.Linear(hidden, dim)
        self.norm = nn.LayerNorm(dim) if check_flag("final_norm", final_norm) else nn.Identity()
        for linear in (self.q, self.k, self.v, self.proj, self.fc1, self.fc2):
            if linear is not None:  # q, k and v of one matrix, where there is a v
                gain = 0.5**0.5 if v_proj and linear in (self.q, self.k, self.v) else 1.0
                nn.init.xavier_uniform_(linear.weight, gain)
        if v_proj:
            for linear in (self.q, self.k, self.v, self.proj):
                assert linear is not None
                nn.init.zeros_(linear.bias)

    @staticmethod
    def count(
        dim: int, queries: int, units: int, hidden: int = 1024, v_proj: bool = True, final_norm: bool = True
    ) -> int:
        """Parameters, by formula: queries, attention, MLP with its norm, final norm, read-out.

        >>> areas = torch.eye(2, dtype=torch.bool)
        >>> model = AttentionReadout(8, [areas], num_heads=2, hidden=12)
        >>> sum(p.numel() for p in model.parameters()) == AttentionReadout.count(8, 2, 2, 12)
        True
        """
        maps = (4 if v_proj else 3) * (dim * dim + dim)
        mlp = 2 * dim * hidden + hidden + dim + 2 * dim
        return queries * dim + maps + mlp + 2 * dim * final_norm + units * (dim + 1)

    def forward(self, features: Tensor, *, valid: Tensor | None = None, weights: bool = False) -> Read:
        """Read a picture.

        Args:
            features: (B, h, w, C).
            valid: (B, h, w), which patches exist; the others are not read.
            weights: also give the maps of every head.
        """
        check_rank("features", features, 4, "(B, h, w, C)")
        if features.shape[-1] != self.dim:
            raise ValueError(f"features must have dim={self.dim} channels last, got {tuple(features.shape)}")
        batch, height, width, dim = features.shape
        flat = features.flatten(1, 2)
        if valid is not None:
            if valid.shape != features.shape[:3] or valid.dtype != torch.bool:
                raise ValueError(f"valid must be boolean {tuple(features.shape[:3])}, got {tuple(valid.shape)}")
            valid = valid.flatten(1)
            flat = torch.where(valid[..., None], flat, 0)
        keys = flat + detr_positions(height, width, dim).to(flat)

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        q = heads(self.q(self.query.weight)[None]).expand(batch, -1, -1, -1)
        v = heads(flat if self.v is None else self.v(flat))
        dropout = self.drop.p if self.training else 0.0
        out = attention(q, heads(self.k(keys)), v, valid=valid, dropout_p=dropout, return_weights=weights)
        mixed, seen = out if weights else (out, None)
        t = self.drop(self.proj(mixed.transpose(1, 2).flatten(2)))
        t = t + self.drop(self.fc2(self.drop(F.relu(self.fc1(self.norm_mlp(t))))))
        tokens = self.norm(t)
        return Read(self._responses(tokens), tokens, seen)


class SpatialReadout(_Readout):
    """Responses from a map over places that is learned once for all pictures: where an area looks, and what it reads.

    Args:
        dim: width of features.
        areas, resolution: as of :class:`AttentionReadout`.
        grid: height and width of features.
    """

    def __init__(self, dim: int, areas: Sequence[Tensor], grid: tuple[int, int], *, resolution: Resolution = "area"):
        super().__init__(areas, resolution, check_int("dim", dim, least=1))
        self.grid = check_grid("grid", grid, (2,))
        self.map = nn.Embedding(sum(self.queries), math.prod(self.grid))

    def forward(self, features: Tensor, *, weights: bool = False) -> Read:
        """(B, h, w, C), and whether to give the maps too."""
        _check_map(features, self.grid)
        seen = self.map.weight.softmax(-1)
        tokens = seen @ features.flatten(1, 2)
        maps = seen.expand(len(features), 1, -1, -1) if weights else None
        return Read(self._responses(tokens), tokens, maps)


class LinearReadout(nn.Module):
    """Responses from all features of all places: a convolution that makes the map smaller, then one linear map.

    Ridge regression on all features (:func:`attnlib.look.encode`) is the same without the convolution, and solved.

    Args:
        dim: width of features.
        units: responses per group.
        grid: height and width of features.
        hidden, stride: of the 3 x 3 convolution.
    """

    def __init__(self, dim: int, units: Sequence[int], grid: tuple[int, int], *, hidden: int = 256, stride: int = 3):
        super().__init__()
        self.grid = check_grid("grid", grid, (2,))
        self.reduce = nn.Conv2d(dim, check_int("hidden", hidden, least=1), 3, check_int("stride", stride, least=1), 1)
        places = math.prod((side - 1) // stride + 1 for side in self.grid)
        self.read = nn.ModuleList(nn.Linear(hidden * places, check_int("units", n, least=1)) for n in units)

    def forward(self, features: Tensor) -> Read:
        """(B, h, w, C)."""
        _check_map(features, self.grid)
        flat = self.reduce(features.permute(0, 3, 1, 2)).flatten(1)
        return Read(tuple(read(flat) for read in self.read))

    def penalty(self) -> Tensor:
        """Sum of the Euclidean norms of the read-outs' weights and biases; the paper adds 0.02 of it to the loss."""
        return torch.stack([p.norm() for p in self.read.parameters()]).sum()


def _check_map(features: Tensor, grid: Sequence[int]) -> None:
    check_rank("features", features, 4, "(B, h, w, C)")
    if tuple(features.shape[1:3]) != tuple(grid):
        raise ValueError(f"features must have the grid {tuple(grid)} of the read-out, got {tuple(features.shape[1:3])}")


def readout_loss(read: Read, responses: Sequence[Tensor]) -> Tensor:
    """Mean squared error of each group, added up."""
    if len(read.responses) != len(responses):
        raise ValueError(f"responses must hold a tensor for each of {len(read.responses)} groups, got {len(responses)}")
    return torch.stack([F.mse_loss(y, t) for y, t in zip(read.responses, responses, strict=True)]).sum()


def fit_readout(
    model: nn.Module,
    features: Tensor,
    responses: Sequence[Tensor],
    *,
    epochs: int = 15,
    batch: int = 16,
    lr: float = 5e-4,
    weight_decay: float = 1e-4,
    clip: float = 0.1,
    penalty: float = 0.02,
    seed: int = 0,
) -> list[float]:
    """Train a read-out as the paper does: AdamW, gradients clipped to a norm, the linear one with its penalty.

    Args:
        model: a read-out, trained in place and left in evaluation mode.
        features: (N, h, w, C).
        responses: per group (N, V).
        epochs, batch, lr, weight_decay, clip: of the training.
        penalty: of :meth:`LinearReadout.penalty`; the others have none.
        seed: of the order of batches.

    Returns:
        the mean loss of every epoch.
    """
    check_int("epochs", epochs, least=0)
    check_int("batch", batch, least=1)
    if any(len(r) != len(features) for r in responses) or not len(features):
        raise ValueError(
            f"responses must hold the {len(features)} events of features, got {[len(r) for r in responses]}"
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    told = []
    for _ in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(features), generator=generator).split(batch):
            loss = readout_loss(model(features[rows]), [r[rows] for r in responses])
            whole = loss + penalty * model.penalty() if isinstance(model, LinearReadout) else loss
            optimizer.zero_grad()
            whole.backward()
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            total += loss.item() * len(rows)
        told.append(total / len(features))
    model.eval()
    return told


@shaped(predicted="float (L, N, V)", scores="float (L, V)")
def blend(predicted: Tensor, scores: Tensor, sharpness: float = 40.0) -> Tensor:
    """Predictions of several models, such as of layers, weighted unit by unit by their validation scores.

    Args:
        predicted: (L, N, V).
        scores: (L, V) correlations.
        sharpness: the weights are ``softmax(sharpness * score)`` over models.

    Returns:
        (N, V).

    >>> blend(torch.tensor([[[1.0]], [[3.0]]]), torch.tensor([[0.2], [0.2]])).tolist()
    [[2.0]]
    """
    return ((sharpness * scores).softmax(0)[:, None] * predicted).sum(0)


def readout_state(state_dict: Mapping[str, Tensor], queries: Sequence[int] | None = None) -> dict[str, Tensor]:
    """From the state dict of a released ``brain_encoder``, of any of its four kinds, to the read-out of that kind.

    Args:
        state_dict: theirs; the backbone's entries are left out.
        queries: how many of each half of their queries are used, where there are more queries than areas.

    Two layers, encoder layers, post-norm and the projection behind a ResNet are refused: they are not here.
    """
    theirs = Released(state_dict, "a brain encoder of one pre-norm decoder layer")
    theirs.leave(r"backbone_model\..+", because="the frozen backbone gives the features")
    layer = r"transformer\.decoder\.layers\.0\."
    theirs.leave(
        rf"transformer\.memory_proj\..+|{layer}self_attn\..+|{layer}norm2\..+", because="they are never called"
    )
    theirs.leave(rf"{layer}norm1\.weight", because="it scales the zeros that the layer starts from")
    theirs.leave(rf"{layer}cross_attn\.(?:c_attn|v_proj)\..+", because="that layer never calls them")
    first = dict((m.string, value) for m, value in theirs.matching(rf"{layer}norm1\.bias"))
    custom = any(key.startswith("transformer.decoder.layers.0.cross_attn.") for key in theirs)
    out = theirs.renamed(
        {
            r"query_embed\.weight": "query.weight",
            r"spatial_embed\.weight": "map.weight",
            r"input_proj\.(weight|bias)": r"reduce.\1",
            r"lh_embed\.0\.(weight|bias)": r"read.0.\1",
            r"rh_embed\.0\.(weight|bias)": r"read.1.\1",
            rf"{layer}multihead_attn\.in_proj_(weight|bias)": split_rule("q", "k", "v"),
            rf"{layer}multihead_attn\.out_proj\.(weight|bias)": r"proj.\1",
            rf"{layer}cross_attn\.([qk])_proj\.(weight|bias)": r"\1.\2",
            rf"{layer}cross_attn\.c_proj\.(weight|bias)": r"proj.\1",
            rf"{layer}linear([12])\.(weight|bias)": r"fc\1.\2",
            rf"{layer}norm3\.(weight|bias)": r"norm_mlp.\1",
            r"transformer\.decoder\.norm\.(weight|bias)": r"norm.\1",
        }
    )
    if not custom and "query.weight" in out:  # the norm of zeros is its bias: it moves all queries alike
        out["query.weight"] = out["query.weight"] + sum(first.values())
    for name in ("query.weight", "map.weight"):
        if queries is not None and name in out:
            halves = out[name].chunk(2)
            out[name] = torch.cat([half[:n] for half, n in zip(halves, queries, strict=True)])
    return theirs.close(out)
