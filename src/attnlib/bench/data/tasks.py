"""The five tasks of a comparison: real data, one small model each, one number that says how good it is."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models import tiny
from . import files as data
from .files import Dataset

Make = Callable[[], nn.Module]
Plain = Callable[[bool], nn.Module]
Batch = tuple[Tensor, ...]


class Task:
    """What is trained on what, and how it is judged.

    A task loads its data once; every run then draws its batches from a generator seeded by the run's seed alone, so
    that all mechanisms see the same batches in the same order.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    pattern: ClassVar[str]
    kind: ClassVar[str]  # of data: text, images, series, digits
    metric: ClassVar[str]
    unit: ClassVar[str]
    higher_is_better: ClassVar[bool]
    grid: ClassVar[tuple[int, ...]]  # of the tokens the mechanism mixes
    context: ClassVar[tuple[int, ...] | None] = None
    batch_size: ClassVar[int]
    steps: ClassVar[int]  # of the optimiser, by which softmax attention has learned the task
    learning_rate: ClassVar[float] = 3e-3
    data: Dataset

    def __init__(self, path: Path | None = None) -> None:
        self.data = self.load(path)

    def load(self, path: Path | None) -> Dataset:
        raise NotImplementedError

    def build(self, make: Make, plain: Plain, dim: int, depth: int) -> tiny.TinyModel:
        """The model around the mechanism that ``make`` makes; ``plain(causal)`` is what all competitors share."""
        raise NotImplementedError

    def batch(self, generator: torch.Generator) -> Batch:
        """A training batch."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss and the mechanisms' own losses."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Measurements on the test part; ``metric`` is one of them."""
        raise NotImplementedError

    def references(self) -> dict[str, float]:
        """``metric`` of methods without a mechanism, to hold the runs against."""
        return {}

    def exhibit(self) -> dict[str, Any]:
        """The input and the truth of :meth:`sample`, for the report."""
        return {}

    def sample(self, model: nn.Module) -> dict[str, Any]:
        """Something of the trained model to look at."""
        return {}

    def describe(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "name": self.name,
            "title": self.title,
            "pattern": self.pattern,
            "metric": self.metric,
            "unit": self.unit,
            "higher_is_better": self.higher_is_better,
            "grid": list(self.grid),
            "context": list(self.context) if self.context else None,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "data": {
                "source": self.data.source,
                "split": self.data.split,
                "fingerprint": self.data.fingerprint,
                "facts": dict(self.data.facts),
            },
            "references": self.references(),
            "exhibit": self.exhibit(),
        }


# --------------------------------------------------------------------------------------------------------------------


class TextTask(Task):
    """Predict the next byte of English text."""

    name, title, pattern, kind = "text", "Byte-level language modelling", "causal-self", "text"
    metric, unit, higher_is_better = "bits per byte", "bits", False
    grid = (64,)
    # Many small steps: reading other bytes is learned after some hundreds of them, whatever the batch.
    batch_size = 8
    steps = 1000
    learning_rate = 1e-2
    eval_windows = 96

    def load(self, path: Path | None) -> Dataset:
        return data.text(path)

    def build(self, make: Make, plain: Plain, dim: int, depth: int) -> tiny.TinyModel:
        return tiny.TinyLM(make, dim, depth, self.grid[0])

    def _windows(self, source: Tensor, starts: Tensor) -> Batch:
        window = source[starts[:, None] + torch.arange(self.grid[0] + 1)].long()
        return window[:, :-1], window[:, 1:]

    def batch(self, generator: torch.Generator) -> Batch:
        high = len(self.data.train) - self.grid[0]
        return self._windows(self.data.train, torch.randint(high, (self.batch_size,), generator=generator))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        out = model(batch[0])
        return F.cross_entropy(out.y.flatten(0, 1), batch[1].flatten()), out.losses

    def _test(self) -> Batch:
        room = len(self.data.test) - self.grid[0] - 1
        count = max(1, min(self.eval_windows, room // self.grid[0]))
        return self._windows(self.data.test, torch.linspace(0, max(room, 0), count).long())

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        x, y = self._test()
        nats = hits = 0.0
        for a, b in zip(x.split(32), y.split(32), strict=True):
            logits = model(a).y
            nats += float(F.cross_entropy(logits.flatten(0, 1), b.flatten(), reduction="sum"))
            hits += float((logits.argmax(-1) == b).sum())
        return {self.metric: nats / y.numel() / math.log(2), "next byte right": hits / y.numel()}

    def references(self) -> dict[str, float]:
        train = self.data.train.long()
        x, y = self._test()
        single = torch.bincount(train, minlength=256).double() + 1
        pairs = torch.bincount(train[:-1] * 256 + train[1:], minlength=65536).double().view(256, 256)
        order0 = single / single.sum()
        order1 = (pairs + order0) / (pairs.sum(1, keepdim=True) + 1)
        return {
            "byte frequencies": float(-order0[y].log2().mean()),
            "pairs of bytes": float(-order1[x, y].log2().mean()),
        }

    def _prompt(self) -> Tensor:
        raw = bytes(self.data.test[: max(4096, 2 * self.grid[0])].tolist())
        start = raw.find(b"\n\n", 512) + 2 if b"\n\n" in raw[512:] else 0
        prompt = raw[start : start + 96]
        return torch.tensor(list(prompt[: prompt.rfind(b" ") + 1] or prompt))

    def exhibit(self) -> dict[str, Any]:
        return {"kind": "text", "prompt": bytes(self._prompt().tolist()).decode("utf-8", "replace")}

    def sample(self, model: nn.Module) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        tokens = self._prompt().tolist()
        start = len(tokens)
        length = self.grid[0]
        for _ in range(200):
            # Right-padding to the trained length keeps shapes fixed; a causal model does not see the padding.
            window = tokens[-length:]
            padded = torch.tensor([window + [0] * (length - len(window))])
            logits = model(padded).y[0, len(window) - 1]
            tokens.append(int(torch.multinomial((logits / 0.7).softmax(-1), 1, generator=generator)))
        return {"text": bytes(tokens[start:]).decode("utf-8", "replace")}


# --------------------------------------------------------------------------------------------------------------------


class DigitsTask(Task):
    """Name a handwritten digit from its 64 pixels."""

    name, title, pattern, kind = "digits", "Handwritten digits", "noncausal-self", "digits"
    metric, unit, higher_is_better = "accuracy", "%", True
    grid = (8, 8)
    batch_size = 16
    steps = 300
    learning_rate = 5e-3

    def load(self, path: Path | None) -> Dataset:
        return data.digits()

    def build(self, make: Make, plain: Plain, dim: int, depth: int) -> tiny.TinyModel:
        return tiny.TinyClassifier(make, dim, depth, (8, 8))

    def batch(self, generator: torch.Generator) -> Batch:
        images, labels = self.data.train
        index = torch.randint(len(images), (self.batch_size,), generator=generator)
        return images[index], labels[index]

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        out = model(batch[0])
        return F.cross_entropy(out.y, batch[1]), out.losses

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        images, labels = self.data.test
        scores = torch.cat([model(part).y for part in images.split(150)])
        return {
            self.metric: 100 * float((scores.argmax(-1) == labels).float().mean()),
            "cross-entropy": float(F.cross_entropy(scores, labels)),
        }

    def references(self) -> dict[str, float]:
        (a, b), (x, y) = self.data.train, self.data.test
        nearest = torch.cdist(x.flatten(1), a.flatten(1)).argmin(1)
        return {
            "most frequent digit": 100 * float((y == b.mode().values).float().mean()),
            "nearest neighbour": 100 * float((b[nearest] == y).float().mean()),
        }

    def exhibit(self) -> dict[str, Any]:
        images, labels = self.data.test
        return {
            "kind": "digits",
            "images": [png(i.expand(-1, -1, 3)) for i in images[:24]],
            "truth": labels[:24].tolist(),
        }

    def sample(self, model: nn.Module) -> dict[str, Any]:
        images, _ = self.data.test
        return {"guesses": model(images[:24]).y.argmax(-1).tolist()}


# --------------------------------------------------------------------------------------------------------------------


class PhotoTask(Task):
    """Common ground of the two photograph tasks: patches, their reduction, PSNR over held-out photographs."""

    kind = "images"
    metric, unit, higher_is_better = "PSNR", "dB", True
    side: ClassVar[int]
    factor: ClassVar[int]
    tiles: ClassVar[int] = 3
    eval_patches = 48  # per photograph

    def load(self, path: Path | None) -> Dataset:
        return data.photos(path)

    def __init__(self, path: Path | None = None) -> None:
        super().__init__(path)
        self._test = [self._prepare(p) for p in self._test_patches()]

    def _prepare(self, high: Tensor) -> Batch:
        low = data.shrink(high, self.factor)
        return low, data.enlarge(low, self.factor), high

    def _test_patches(self) -> list[Tensor]:
        """Per held-out photograph, patches on an even grid: (n, side, side, 3)."""
        out = []
        for photo in self.data.test:
            height, width = photo.shape[0] - self.side, photo.shape[1] - self.side
            rows = max(1, round(math.sqrt(self.eval_patches * max(height, 1) / max(width, 1))))
            cols = max(1, self.eval_patches // rows)
            tops = torch.linspace(0, height, rows).long().tolist()
            lefts = torch.linspace(0, width, cols).long().tolist()
            out.append(torch.stack([self._cut(photo, t, left) for t in tops for left in lefts]))
        return out

    def _cut(self, photo: Tensor, top: int, left: int) -> Tensor:
        return photo[top : top + self.side, left : left + self.side].float() / 255

    def batch(self, generator: torch.Generator) -> Batch:
        patches = []
        for _ in range(self.batch_size):
            a, b, c, flip = torch.rand(4, generator=generator).tolist()
            photo = self.data.train[int(a * len(self.data.train))]
            top, left = int(b * (photo.shape[0] - self.side + 1)), int(c * (photo.shape[1] - self.side + 1))
            patch = self._cut(photo, top, left)
            patches.append(patch.flip(1) if flip < 0.5 else patch)
        return self._prepare(torch.stack(patches))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        low, bicubic, high = batch
        out = model(low, bicubic)
        # In units of (0.1)**2, so that the gradient norm is of the order of the other tasks' and one threshold fits.
        return 100 * F.mse_loss(out.y, high), out.losses

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        values = []
        for low, bicubic, high in self._test:
            parts = zip(low.split(24), bicubic.split(24), strict=True)
            values.append(psnr(torch.cat([model(a, b).y for a, b in parts]), high))
        return {self.metric: sum(values) / len(values)}

    def references(self) -> dict[str, float]:
        bicubic = [psnr(b, high) for _, b, high in self._test]
        nearest = [psnr(repeat(low, self.factor), high) for low, _, high in self._test]
        return {"bicubic": sum(bicubic) / len(bicubic), "nearest pixel": sum(nearest) / len(nearest)}

    def _showpiece(self) -> Batch:
        """``tiles**2`` adjacent patches of the last held-out photograph, where bicubic loses much detail."""
        photo = self.data.test[-1]
        extent = self.side * self.tiles
        height, width = photo.shape[0] - extent, photo.shape[1] - extent
        if height < 0 or width < 0:
            low, bicubic, high = self._test[-1]
            worst = int((bicubic - high).square().mean((1, 2, 3)).argmax())
            return low[worst : worst + 1], bicubic[worst : worst + 1], high[worst : worst + 1]
        candidates = []
        for top in torch.linspace(0, height, 6).long().tolist():
            for left in torch.linspace(0, width, 6).long().tolist():
                tiles = torch.stack(
                    [
                        self._cut(photo, top + i * self.side, left + j * self.side)
                        for i in range(self.tiles)
                        for j in range(self.tiles)
                    ]
                )
                candidates.append(self._prepare(tiles))
        loss = torch.stack([(c[1] - c[2]).square().mean() for c in candidates])
        return candidates[int(loss.argsort(descending=True)[3])]

    def _mosaic(self, patches: Tensor) -> Tensor:
        """(n, h, w, 3) adjacent patches as one picture."""
        rows = math.isqrt(len(patches))
        return torch.cat([torch.cat(list(row), 1) for row in patches.split(rows)], 0)

    def exhibit(self) -> dict[str, Any]:
        low, bicubic, high = self._showpiece()
        return {
            "kind": "photo",
            "low": png(self._mosaic(low)),
            "bicubic": png(self._mosaic(bicubic)),
            "truth": png(self._mosaic(high)),
            "bicubic_psnr": psnr(bicubic, high),
        }

    def sample(self, model: nn.Module) -> dict[str, Any]:
        low, bicubic, high = self._showpiece()
        out = model(low, bicubic).y
        return {"image": png(self._mosaic(out)), "psnr": psnr(out, high)}


class SuperResolutionTask(PhotoTask):
    """Enlarge a patch of a photograph twofold, mixing its low-resolution pixels."""

    name, title, pattern = "superres", "Super-resolution of photographs", "noncausal-self"
    grid = (16, 16)
    side, factor = 32, 2
    batch_size = 4
    steps = 200

    def build(self, make: Make, plain: Plain, dim: int, depth: int) -> tiny.TinyModel:
        return tiny.TinySuperResolution(make, dim, depth, (16, 16), self.factor)


class CrossUpsamplingTask(PhotoTask):
    """High-resolution positions that read a low-resolution photograph."""

    name, title, pattern = "upsample", "High-resolution queries, low-resolution context", "noncausal-cross"
    grid, context = (24, 24), (8, 8)
    side, factor = 24, 3
    tiles = 4
    batch_size = 4
    steps = 150
    learning_rate = 4e-3

    def build(self, make: Make, plain: Plain, dim: int, depth: int) -> tiny.TinyModel:
        return tiny.TinyCrossUpsampler(make, dim, depth, (8, 8), self.factor)


# --------------------------------------------------------------------------------------------------------------------


class ForecastTask(Task):
    """Forecast a measured series from a long context and the samples so far."""

    name, title, pattern, kind = "forecast", "Encoder-decoder forecasting", "causal-cross", "series"
    metric, unit, higher_is_better = "forecast error", "variance", False
    grid, context = (16,), (48,)
    batch_size = 16
    steps = 250
    learning_rate = 4e-3
    patch, horizon = 4, 16
    eval_windows = 64

    def load(self, path: Path | None) -> Dataset:
        loaded = data.series(path)
        need = self._total()
        if not all(any(len(s) >= need for s in part) for part in (loaded.train, loaded.test)):
            raise data.DataError(
                f"data={str(path)!r} is too short: forecasting needs {need} consecutive samples in the training three "
                f"quarters and in the held-out quarter, got {sum(map(len, loaded.train))} and "
                f"{sum(map(len, loaded.test))}"
            )
        return loaded

    def _past(self) -> int:
        return self.context[0] * self.patch

    def _recent(self) -> int:
        return self.grid[0] * self.patch

    def _total(self) -> int:
        return self._past() + self._recent() + self.horizon

    def build(self, make: Make, plain: Plain, dim: int, depth: int) -> tiny.TinyModel:
        channels = self.data.train[0].shape[1]
        return tiny.TinyForecaster(
            make, plain, dim, depth, self.context[0], self.grid[0], self.patch, self.horizon, channels
        )

    def _windows(self, stretches: Iterable[Tensor]) -> Tensor:
        """(n, total, F): every window that lies inside one stretch."""
        need = self._total()
        return torch.cat([s.unfold(0, need, 1).transpose(1, 2) for s in stretches if len(s) >= need])

    def _split(self, window: Tensor) -> Batch:
        a, b = self._past(), self._past() + self._recent()
        future = window[:, a + self.patch :].unfold(1, self.horizon, self.patch).transpose(2, 3)
        return window[:, :a], window[:, a:b], future

    def batch(self, generator: torch.Generator) -> Batch:
        windows = self._windows(self.data.train)
        return self._split(windows[torch.randint(len(windows), (self.batch_size,), generator=generator)])

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        past, recent, future = batch
        out = model(past, recent)
        return F.mse_loss(out.y, future), out.losses

    def _test(self) -> Batch:
        windows = self._windows(self.data.test)
        return self._split(windows[torch.linspace(0, len(windows) - 1, min(self.eval_windows, len(windows))).long()])

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        past, recent, future = self._test()
        guess = model(past, recent).y
        return {self.metric: float(F.mse_loss(guess, future)), "absolute error": float((guess - future).abs().mean())}

    def references(self) -> dict[str, float]:
        past, recent, future = self._test()
        last = recent[:, self.patch - 1 :: self.patch].unsqueeze(2)
        return {
            "last value": float(F.mse_loss(last.expand_as(future), future)),
            "linear autoregression": float(F.mse_loss(self._linear(past, recent, future), future)),
        }

    def _linear(self, past: Tensor, recent: Tensor, future: Tensor, lags: int = 64) -> Tensor:
        """Ridge regression of the horizon on the last ``lags`` samples, fitted on the training part."""

        def lagged(past: Tensor, recent: Tensor) -> Tensor:
            known = torch.cat([past, recent], 1)
            ends = [past.shape[1] + self.patch * (t + 1) for t in range(self.grid[0])]
            return torch.stack([known[:, e - lags : e].flatten(1) for e in ends], 1)

        windows = self._windows(self.data.train)
        train = self._split(windows[:: max(1, len(windows) // 256)])
        x, y = lagged(*train[:2]).flatten(0, 1).double(), train[2].flatten(2).flatten(0, 1).double()
        gram = x.T @ x + torch.eye(x.shape[1], dtype=torch.float64)
        weights = torch.linalg.solve(gram, x.T @ y)
        return (lagged(past, recent).double() @ weights).float().view_as(future)

    def _example(self) -> tuple[Tensor, Batch]:
        windows = self._windows(self.data.test)
        window = windows[len(windows) // 4][None]
        return window, self._split(window)

    def exhibit(self) -> dict[str, Any]:
        window, _ = self._example()
        mean, std = self.data.facts["mean"][0], self.data.facts["std"][0]
        return {
            "kind": "forecast",
            "truth": (window[0, :, 0] * std + mean).tolist(),
            "start": self._past() + self.patch,
            "horizon": self.horizon,
            "column": self.data.facts["columns"][0],
        }

    def sample(self, model: nn.Module) -> dict[str, Any]:
        _, (past, recent, _) = self._example()
        mean, std = self.data.facts["mean"][0], self.data.facts["std"][0]
        guess = model(past, recent).y[0, :: self.horizon // self.patch, :, 0]
        return {"forecast": (guess.flatten() * std + mean).tolist()}


# --------------------------------------------------------------------------------------------------------------------


def psnr(guess: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1], over all pixels together."""
    return -10 * math.log10(max(float((guess.clamp(0, 1) - truth).square().mean()), 1e-10))


def repeat(images: Tensor, factor: int) -> Tensor:
    """Every pixel ``factor`` times along both axes."""
    return images.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def png(image: Tensor) -> str:
    """A picture (H, W, 3) in [0, 1] as base64 PNG."""
    array = image.detach().clamp(0, 1).mul(255).round().to(torch.uint8).contiguous().numpy()
    buffer = io.BytesIO()
    data.require("PIL.Image").fromarray(array).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


TASKS: dict[str, type[Task]] = {
    t.name: t for t in (TextTask, DigitsTask, SuperResolutionTask, CrossUpsamplingTask, ForecastTask)
}


def task_class(name: str) -> type[Task]:
    """The task of that name.

    Raises:
        ValueError: unknown name; the possible ones are listed.
    """
    if name not in TASKS:
        choices = ", ".join(f"{t.name} ({t.pattern})" for t in TASKS.values())
        raise ValueError(f"tasks: {name!r} is not possible; choose from {choices}, or a pattern")
    return TASKS[name]


def expand(tasks: Iterable[str] | None) -> list[str]:
    """Task names from names and patterns, in the order given and without repeats; all of them for ``None``.

    >>> expand(["noncausal-self"])
    ['digits', 'superres']
    """
    if tasks is None:
        return list(TASKS)
    if isinstance(tasks, str):
        tasks = tasks.split(",")
    out: list[str] = []
    for name in tasks:
        by_pattern = [t.name for t in TASKS.values() if t.pattern == name]
        for found in by_pattern or [task_class(name).name]:
            if found not in out:
                out.append(found)
    if not out:
        raise ValueError(f"tasks is empty; choose from {list(TASKS)}")
    return out
