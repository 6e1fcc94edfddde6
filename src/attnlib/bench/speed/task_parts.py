"""What attention of task models costs beside the plain way of computing it: time, and bytes that live at once.

``attnlib bench --suite task-parts`` measures it again. Position attention beside one that builds its map; late
interaction beside the products of all pairs; patch attention beside a loop over samples that cuts patches; the codes of
places of :class:`attnlib.models.perception.oat.OAT` beside a loop over objects. Both ways give the same, which is
checked before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.perception.oat import OAT
from ...nn.dense.danet import PositionAttention
from ...ops.late_interaction import late_interaction
from ...ops.patches import patch_attention
from ..clock import interleave, limit_threads, machine, peak_bytes, ratio

Run = Callable[..., Tensor]


class Contest(NamedTuple):
    """Both ways, and what they are given; gradients are of what asks for them, and of ``weights``."""

    size: str
    ours: Run
    plain: Run
    given: Sequence[Tensor]
    weights: Sequence[Tensor] = ()


def position(side: int = 64, dim: int = 64) -> Contest:
    """Position attention of one map, beside one that builds the map of all places."""
    layer = PositionAttention(dim)
    layer.gamma.data.fill_(0.5)

    def plain(x: Tensor) -> Tensor:
        tokens = x.flatten(1, -2)
        weights = (layer.q(tokens) @ layer.k(tokens).mT).softmax(-1)
        return (layer.gamma * (weights @ layer.v(tokens)).view(x.shape)) + x

    x = torch.randn(1, side, side, dim, requires_grad=True)
    return Contest(f"{side} x {side} places, width {dim}", layer, plain, [x], list(layer.parameters()))


def late(pairs: int = 64, tokens: tuple[int, int] = (196, 77), dim: int = 256) -> Contest:
    """Every picture with every text, beside the products of all tokens."""
    given = [F.normalize(torch.randn(pairs, n, dim), dim=-1).requires_grad_() for n in tokens]
    size = f"{pairs} pairs, {tokens[0]} x {tokens[1]} tokens of width {dim}"
    return Contest(size, late_interaction, partial(late_interaction, backend="eager"), given)


def patches(count: int = 4, side: int = 32, dim: int = 256, kernel: int = 3) -> Contest:
    """Distances of patches, beside a loop over samples that cuts them and lays them over each other."""

    def plain(x: Tensor, known: Tensor) -> Tensor:
        found, half = [], kernel // 2
        for one, exists in zip(x, known, strict=True):
            image = one.permute(2, 0, 1)[None]
            queries = F.unfold(image, kernel, padding=half)[0].mT
            keys = F.unfold(image * exists, kernel)[0].mT
            d = queries.square().sum(1)[:, None] + keys.square().sum(1) - 2 * queries @ keys.mT
            s = -torch.tanh((d - d.mean(1, keepdim=True)) / d.std(1, keepdim=True, correction=0))
            filters = keys.view(-1, dim, kernel, kernel)
            weights = (50 * s).softmax(1).mT.reshape(1, -1, side, side)
            found.append(F.conv_transpose2d(weights, filters, padding=half)[0] / kernel**2)
        return torch.stack(found).permute(0, 2, 3, 1)

    def ours(x: Tensor, known: Tensor) -> Tensor:
        y = patch_attention(x, x, known=known, kernel=kernel)
        assert isinstance(y, Tensor)
        return y

    x = torch.randn(count, side, side, dim, requires_grad=True)
    known = torch.ones(count, side, side, dtype=torch.bool)
    known[:, side // 4 : side // 2, side // 4 : side // 2] = False
    return Contest(f"{count} maps of {side} x {side} places, width {dim}", ours, plain, [x, known])


def places(count: int = 32, objects: int = 28, dim: int = 512) -> Contest:
    """Codes of places, beside a loop over shelves and objects."""
    model = OAT(dim, 4, 16, (1, 1), compat="authors")
    table: Tensor = model.table

    def plain(at: Tensor, flag: Tensor) -> Tensor:
        out = torch.zeros(count, objects, dim // 2)
        for i in range(count):
            for j in range(objects):
                row, column = at[i, j].long()
                out[i, j] = torch.cat([table[row], table[column], table[flag[i, j].long()]])[: dim // 2]
        return out

    at = torch.stack([torch.arange(objects) // 9, torch.arange(objects) % 9], -1).float().expand(count, -1, -1)
    flag = torch.zeros(count, objects)
    flag[:, 3] = 1
    return Contest(f"{count} shelves of {objects} objects", model.codes, plain, [at, flag])


#: What is measured.
CONTESTS: dict[str, Callable[..., Contest]] = {
    "position attention": position, "late interaction": late, "patch attention": patches, "codes of places": places,
}  # fmt: skip


def record(name: str, rounds: int, progress: Callable[[str], None] | None = None, **sizes: Any) -> dict[str, Any]:
    """Seconds, ratios and peak bytes of one of :data:`CONTESTS`.

    Args:
        name: which.
        rounds: measurements of each way.
        progress: told of every round.
        sizes: of the contest.

    Raises:
        AssertionError: both ways give something else.
    """
    torch.manual_seed(0)
    contest = CONTESTS[name](**sizes)
    leaves = [t for t in (*contest.given, *contest.weights) if t.requires_grad]

    def infer(run: Run) -> None:
        with torch.no_grad():
            run(*contest.given)

    def train(run: Run) -> None:
        torch.autograd.grad(run(*contest.given).square().sum(), leaves)

    with torch.no_grad():
        a, b = contest.ours(*contest.given), contest.plain(*contest.given)
    difference = float((a - b).abs().max() / b.abs().max())
    if not difference < 1e-4:
        raise AssertionError(f"{name}: both ways differ by {difference:.1e} of the largest entry")
    found: dict[str, Any] = {"part": name, "size": contest.size, "difference": difference}
    for what, job in (("forward", infer), ("training", train)):
        if what == "training" and not leaves:
            continue
        jobs = {"ours": partial(job, contest.ours), "plain": partial(job, contest.plain)}
        times = interleave(jobs, rounds, clock="cpu", progress=progress)
        bytes_of = {k: peak_bytes(run) for k, run in jobs.items()}
        found[what] = {
            "seconds": {k: t.median for k, t in times.items()}, "peak_bytes": bytes_of,
            "times_as_fast": ratio(times["plain"], times["ours"])["ratio"],
            "share_of_memory": bytes_of["ours"] / bytes_of["plain"],
        }  # fmt: skip
    return found


def measure(progress: Callable[[str], None] | None = None, rounds: int = 5) -> dict[str, Any]:
    """All of :data:`CONTESTS` at their sizes, one thread.

    Args:
        progress: told of every round.
        rounds: measurements of each way.

    Returns:
        Plain values, for JSON.
    """
    with limit_threads(1):
        records = [record(name, rounds, progress) for name in CONTESTS]
        return {
            "what": "attention of task models beside the plain way of computing it", "machine": machine(),
            "rounds": rounds, "records": records,
        }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """Rows of the page."""
    lines = ["| part | size | times as fast | with gradients | memory | with gradients |", "|---|---|---|---|---|---|"]
    for row in found["records"]:
        cells = [
            f"{row[what][key]:.{digits}f}" if what in row else ""
            for key, digits in (("times_as_fast", 2), ("share_of_memory", 3))
            for what in ("forward", "training")
        ]
        lines.append(f"| {row['part']} | {row['size']} | {' | '.join(cells)} |")
    return "\n".join(lines)
