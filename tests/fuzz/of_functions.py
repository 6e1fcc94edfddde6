"""Calls of the techniques' functions: what steering, reduction, caches and pictures compute from tensors."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlib import cache, look, reduce, steer
from attnlib.hooks.tokens import IMAGE, TEXT
from attnlib.steer import sink_calibration
from attnlib.steer.diffusion import uniform_maps

from .engine import Call, Either, family
from .mutate import Name

META = ("on meta",)


def sizes(rng: random.Random, *most: int) -> list[int]:
    return [rng.randint(1, m) for m in most]


def weights(*shape: int) -> Tensor:
    return torch.rand(shape).softmax(-1)


# ---- steering


@family("steer.functions")
def contrast(rng: random.Random) -> Call:
    b, v = sizes(rng, 3, 6)

    def oracle(logits, other, a, b, cutoff, normalize):
        assert logits.shape == other.shape and logits.dim() == 2 and 0 <= cutoff <= 1
        z, u = logits.double(), other.double()
        if normalize:
            z, u = z.log_softmax(-1), u.log_softmax(-1)
        out = a * z + b * u
        p = z.softmax(-1)
        return out.masked_fill(p < cutoff * p.amax(-1, keepdim=True), -math.inf) if z.numel() else out

    def sane(out: Tensor, given: dict[str, Any]) -> None:
        assert not bool(out.isnan().any()), "NaN"

    return Call(
        lambda **kw: steer.contrast(**kw).double().nan_to_num(neginf=-1e9), dict(
            logits=torch.randn(b, v), other=torch.randn(b, v), a=rng.choice([1.0, 2.0]), b=rng.choice([0.0, -1.0]),
            cutoff=rng.choice([0.0, 0.1]), normalize=rng.random() < 0.5,
        ), lambda **kw: oracle(**kw).nan_to_num(neginf=-1e9), sane=sane, allows=(*META, "another precision"),
    )  # fmt: skip


@family("steer.functions")
def select_outliers(rng: random.Random) -> Call:
    b, n, c = sizes(rng, 2, 6, 3)
    extra = rng.randint(0, 1)

    def oracle(features, attention, k, compat):
        extra = features.shape[1] - attention.shape[1]
        assert extra in (0, 1) and 1 <= k <= attention.shape[1] and features.shape[0] == attention.shape[0]
        order = attention.topk(int(k), 1).indices + (0 if compat == "authors" else extra)
        return torch.stack([f[i] for f, i in zip(features, order, strict=True)]) if len(features) else features[:, :k]

    kwargs = dict(features=torch.randn(b, n + extra, c), attention=torch.rand(b, n), k=rng.randint(1, n), compat=None)
    return Call(steer.select_outliers, kwargs, oracle, allows=META)


@family("steer.functions")
def head_divergence(rng: random.Random) -> Call:
    b, h, d = sizes(rng, 2, 5, 3)

    def oracle(with_image, without, outliers, correction):
        assert not isinstance(correction, (bool, float)) and correction in (0, 1)
        correction = int(correction)
        assert with_image.shape == without.shape and with_image.dim() == 3
        a, c = with_image.double(), without.double()
        out = (a - c).norm(dim=-1)
        if not outliers or out.shape[1] < 2:
            return out
        loud = c.square().sum(-1)
        stands = [x > x.mean(1, keepdim=True) + x.std(1, correction=correction, keepdim=True) for x in (out, loud)]
        return out.masked_fill(stands[0] & stands[1], 0.0)

    kwargs = dict(
        with_image=torch.randn(b, h, d), without=torch.randn(b, h, d), outliers=rng.random() < 0.5,
        correction=rng.randint(0, 1),
    )  # fmt: skip
    return Call(steer.head_divergence, kwargs, oracle, allows=META)


@family("steer.functions")
def sensitive_heads(rng: random.Random) -> Call:
    b, h = sizes(rng, 2, 5)

    def oracle(divergence):
        middle = divergence.sort(1).values[:, (divergence.shape[1] - 1) // 2, None]
        return divergence > middle

    return Call(steer.sensitive_heads, dict(divergence=torch.rand(b, h)), oracle, allows=META)


@family("steer.functions")
def token_divergence(rng: random.Random) -> Call:
    b, h = sizes(rng, 2, 5)

    def oracle(divergences, k):
        assert divergences and k >= 1
        return sum(d.double().sort(1, descending=True).values[:, : int(k)].sum(1) for d in divergences.values())

    def sane(out: Tensor, given: dict[str, Any]) -> None:
        assert all(given["k"] <= d.shape[1] for d in given["divergences"].values()), "more heads than there are"

    kwargs = dict(divergences={i: torch.rand(b, h) for i in range(2)}, k=rng.randint(1, h))
    return Call(steer.token_divergence, kwargs, oracle, sane=sane)


@family("steer.functions")
def column_scores(rng: random.Random) -> Call:
    b, h, n, m = sizes(rng, 2, 3, 4, 4)

    def oracle(weights, seen):
        assert seen.dtype == torch.bool and torch.broadcast_shapes(weights.shape, seen.shape) == weights.shape
        assert seen.dim() == 4 == weights.dim()
        return (weights.double() * seen).sum(-2) / seen.sum(-2).clamp(min=1)

    kwargs = dict(weights=weights(b, h, n, m), seen=torch.rand(rng.choice([1, b]), rng.choice([1, h]), n, m) > 0.3)
    return Call(sink_calibration.column_scores, kwargs, oracle, allows=META)


@family("steer.functions")
def find_sinks(rng: random.Random) -> Call:
    b, h, m = sizes(rng, 2, 3, 6)

    def oracle(scores, threshold, first, compat):
        above = scores.double() > threshold
        if compat == "authors":
            return above & (above.cumsum(-1) > 1)
        assert first.shape == scores.shape[:1] and (not first.numel() or 0 <= first.min() <= first.max() < 6)
        return above & (torch.arange(scores.shape[-1]) != first[:, None])[:, None]

    kwargs = dict(
        scores=torch.rand(b, h, m), threshold=rng.choice([0.3, 0.9]), first=torch.randint(0, m, (b,)),
        compat=rng.choice([None, "authors"]),
    )  # fmt: skip
    return Call(sink_calibration.find_sinks, kwargs, oracle, allows=META)


@family("steer.functions")
def calibrate(rng: random.Random) -> Call:
    b, h, n, m = sizes(rng, 2, 3, 4, 5)

    def oracle(weights, sinks, beta):
        assert sinks.dtype == torch.bool and sinks.dim() == 3 and math.isfinite(beta)
        w = weights.double()
        on = (w * sinks[:, :, None]).sum(-1, keepdim=True)
        off = (w * ~sinks[:, :, None]).sum(-1, keepdim=True)
        moves = (on > 0) & (off > 0)
        out = torch.where(sinks[:, :, None], w * beta, w * (1 + (1 - beta) * on / off.clamp(min=1e-300)))
        return torch.where(moves, out, w)

    kwargs = dict(
        weights=weights(b, h, n, m), sinks=torch.rand(rng.choice([1, b]), rng.choice([1, h]), m) > 0.7,
        beta=rng.choice([0.4, 0.0, 1.0]),
    )  # fmt: skip
    return Call(steer.calibrate, kwargs, oracle, allows=META)


@family("steer.functions")
def boost_sets(rng: random.Random) -> Call:
    b, n = rng.randint(1, 2), rng.randint(4, 12)

    def sane(out: Any, given: dict[str, Any]) -> None:
        local, summary = out
        assert local.shape == summary.shape == given["late"].shape and not (local & summary).any(), "common patches"
        assert 0 <= given["ratio"] <= 1 and 0 <= given["spatial_ratio"] <= 1

    kwargs = dict(
        first=torch.rand(b, n), late=torch.rand(b, n), ratio=rng.choice([0.25, 0.5]), spatial=None,
        spatial_ratio=0.0, compat=rng.choice([None, "authors"]),
    )  # fmt: skip
    return Call(steer.boost_sets, kwargs, sane=sane, allows=META)


@family("steer.functions")
def boost(rng: random.Random) -> Call:
    b, h, r, m = sizes(rng, 2, 2, 3, 4)

    def oracle(scores, gain):
        s = scores.double()
        assert torch.broadcast_shapes(s.shape, gain.shape) == s.shape
        return s + gain.double() * s.abs()

    kwargs = dict(scores=torch.randn(b, h, r, m), gain=torch.rand(rng.choice([(m,), (b, 1, 1, m)])))
    return Call(steer.boost, kwargs, oracle, allows=META)


@family("steer.functions")
def image_guidance(rng: random.Random) -> Call:
    def sane(out: Any, given: dict[str, Any]) -> None:
        assert out.a + out.b == 1 and 0 <= out.cutoff <= 1

    return Call(steer.image_guidance, dict(scale=rng.choice([1.0, 2.0]), cutoff=0.1), sane=sane, names=("a", "b"))


@family("steer.functions")
def sink_tokens(rng: random.Random) -> Call:
    b, n, c = rng.randint(1, 2), rng.randint(1, 4), 8

    def oracle(hidden, sink_dims, tau):
        x = hidden.double()
        assert x.dim() == 3 and math.isfinite(tau)
        assert sink_dims and all(not isinstance(d, bool) and 0 <= d < x.shape[-1] for d in sink_dims)
        scale = (x.pow(2).mean(-1) + 1e-6).rsqrt()
        return x[..., [int(d) for d in sink_dims]].abs().amax(-1) * scale > tau

    kwargs = dict(hidden=torch.randn(b, n, c), sink_dims=(1, 5), tau=rng.choice([1.0, 1.5]))
    return Call(steer.sink_tokens, kwargs, oracle, allows=META)


@family("steer.functions")
def redistribute(rng: random.Random) -> Call:
    b, h, n, m = sizes(rng, 2, 3, 3, 6)

    def sane(out: Tensor, given: dict[str, Any]) -> None:
        w = given["weights"]
        assert out.shape == w.shape and torch.allclose(out.sum(-1), w.sum(-1), atol=1e-3), "row sums change"
        dead = ~given["eligible"][:, None, :].expand(w.shape[:3])
        assert torch.equal(out[dead], w[dead]), "a row that is not considered changes"

    kwargs = dict(
        weights=weights(b, h, n, m), image=torch.rand(b, 1, m) > 0.5, sinks=torch.rand(b, 1, m) > 0.6,
        eligible=torch.rand(b, n) > 0.3, p=0.6, rho=0.5, summ=0.2, compat=rng.choice([None, "authors"]),
    )  # fmt: skip
    return Call(steer.redistribute, kwargs, sane=sane, allows=META)


@family("steer.functions")
def guide(rng: random.Random) -> Call:
    shape = (2, 3)

    def oracle(pred, perturbed, weight, uncond, cfg):
        assert pred.shape == perturbed.shape and (uncond is None or uncond.shape == pred.shape)
        base = pred.double() if uncond is None else uncond.double() + cfg * (pred.double() - uncond.double())
        return base + weight * (pred.double() - perturbed.double())

    kwargs = dict(
        pred=torch.randn(shape), perturbed=torch.randn(shape), weight=rng.choice([0.0, 3.0]),
        uncond=rng.choice([None, torch.randn(shape)]), cfg=rng.choice([1.0, 7.5]),
    )  # fmt: skip
    return Call(steer.guide, kwargs, oracle, allows=META)


@family("steer.functions")
def adaptive_weight(rng: random.Random) -> Call:
    def oracle(weight, slope, timestep, timesteps):
        assert slope >= 0
        return torch.tensor(max(0.0, weight - slope * (timesteps - timestep)))

    kwargs = dict(weight=rng.uniform(0, 7), slope=rng.choice([0.0, 0.01]), timestep=rng.uniform(0, 1000),
                  timesteps=rng.choice([1000, 500]))  # fmt: skip
    return Call(lambda **given: torch.tensor(steer.adaptive_weight(**given)), kwargs, oracle)


@family("steer.functions")
def hunt_heads(rng: random.Random) -> Call:
    heads = [(i, j) for i in range(2) for j in range(3)]

    def sane(out: Any, given: dict[str, Any]) -> None:
        assert len(out) == given["rounds"] * given["per_round"] == len(set(out))
        best = sorted(given["candidates"], key=lambda h: -(h[0] * 3 + h[1]))
        assert out == best[: len(out)], "other heads"

    kwargs = dict(
        candidates=Either(heads), objective=Either(lambda s: sum(a * 3 + b for a, b in s)), rounds=rng.randint(0, 2),
        per_round=rng.randint(1, 2),
    )  # fmt: skip
    return Call(steer.hunt_heads, kwargs, sane=sane)


@family("steer.functions")
def spread_relevance(rng: random.Random) -> Call:
    b, h, w = sizes(rng, 2, 4, 4)

    def sane(out: Tensor, given: dict[str, Any]) -> None:
        assert out.shape == (len(given["relevance"]), *given["size"]) and out.dtype == torch.float64
        assert 0 <= out.min() and out.max() <= 1, "not between 0 and 1"

    kwargs = dict(relevance=torch.rand(b, h, w), size=(12, 10), blur=rng.choice([0.0, 0.05]))
    return Call(steer.spread_relevance, kwargs, sane=sane)


@family("steer.functions")
def relevance_mask(rng: random.Random) -> Call:
    b, h, w = sizes(rng, 2, 4, 4)

    def sane(out: Tensor, given: dict[str, Any]) -> None:
        assert out.shape == (len(given["relevance"]), *given["size"]) and out.dtype == torch.bool
        assert out.flatten(1).any(1).all(), "an image is black"

    score = rng.choice([0.7, torch.rand(b) * 2])
    kwargs = dict(relevance=torch.rand(b, h, w), score=score, size=(12, 10), blur=0.02)
    return Call(steer.relevance_mask, kwargs, sane=sane, allows=("integers",))


@family("steer.functions")
def mask_pixels(rng: random.Random) -> Call:
    b, h = sizes(rng, 2, 4)

    def oracle(pixels, mask, mean, std):
        assert mask.dtype == torch.bool and mask.shape == (len(pixels), *pixels.shape[2:]) and len(mean) == len(std)
        assert len(mean) in (1, pixels.shape[1]) and all(s != 0 for s in std)
        black = torch.tensor([-a / c for a, c in zip(mean, std, strict=True)], dtype=torch.float64)
        return torch.where(mask[:, None], pixels.double(), black[:, None, None])

    kwargs = dict(pixels=torch.randn(b, 3, h, h), mask=torch.rand(b, h, h) > 0.5, mean=(0.5,) * 3, std=(0.25,) * 3)
    # A mask of another size is resized.
    resized = [f"axis {i} {how}" for i in (1, 2, 3) for how in ("shorter", "longer")]
    return Call(steer.mask_pixels, kwargs, oracle, allows=(*META, *resized))


@family("steer.functions")
def grad_cam(rng: random.Random) -> Call:
    b, h, t = sizes(rng, 2, 2, 5)
    grid = (2, 3)
    extra = rng.randint(0, 1)

    def oracle(attention, gradient, valid, grid, average):
        a, g = attention.double(), gradient.double()
        assert len(grid) == 2 and min(grid) >= 1 and a.shape == g.shape and valid.dtype == torch.bool
        p = int(grid[0]) * int(grid[1])
        assert a.shape[-1] in (p, p + 1) and valid.shape == (a.shape[0], a.shape[2])
        cam = (a * g.clamp(min=0))[..., -p:].mean(1) * valid[..., None]
        if not average:
            return cam.reshape(*cam.shape[:2], *map(int, grid))
        out = torch.zeros(len(cam), p, dtype=torch.float64)
        for i in range(len(cam)):
            inner = valid[i].nonzero().flatten()[1:-1]
            out[i] = cam[i, inner].mean(0) if len(inner) else 0
        return out.reshape(-1, *map(int, grid))

    kwargs = dict(
        attention=torch.rand(b, h, t, 6 + extra), gradient=torch.randn(b, h, t, 6 + extra),
        valid=torch.rand(b, t) > 0.2, grid=grid, average=rng.random() < 0.5,
    )  # fmt: skip
    return Call(steer.grad_cam, kwargs, oracle, allows=META)


@family("steer.functions")
def quantile(rng: random.Random) -> Call:
    def oracle(x, q):
        assert 0 <= q <= 1 and x.numel()
        return torch.quantile(x.double().flatten(), float(q))

    return Call(uniform_maps.quantile, dict(x=torch.randn(3, 4), q=rng.random()), oracle, allows=META)


@family("steer.functions")
def edit_mask(rng: random.Random) -> Call:
    shape = (2, 4, 4)

    def oracle(source, target, q, radius, twice):
        assert source.shape == target.shape and source.dim() == 3 and 0 <= q <= 1 and radius >= 0
        d = (source.double() - target.double()).abs()
        t = torch.quantile(d.flatten(), float(q))
        mask = ((d - t).clamp(min=0) if twice else d) > t
        return F.max_pool2d(mask.double(), 2 * radius + 1, 1, radius) > 0 if radius else mask

    kwargs = dict(
        source=torch.randn(shape).double(), target=torch.randn(shape).double(), q=rng.choice([0.5, 0.8]),
        radius=rng.randint(0, 1), twice=rng.random() < 0.5,
    )  # fmt: skip
    return Call(uniform_maps.edit_mask, kwargs, oracle, allows=(*META, "another precision"))


@family("steer.functions")
def blend(rng: random.Random) -> Call:
    shape = (2, 3, 3)
    images = {name: torch.randn(shape) for name in ("source", "target", "uniform")}
    return Call(
        uniform_maps.blend, {**images, "mask": torch.rand(shape) > 0.5},
        lambda source, target, uniform, mask: (torch.where(mask, uniform, source), torch.where(mask, target, uniform)),
        allows=META,
    )  # fmt: skip


# ---- reduction


@family("reduce.functions")
def spatial_scores(rng: random.Random) -> Call:
    h, w = sizes(rng, 4, 4)

    def oracle(place, size, rate, weight):
        h, w = map(int, size)
        assert h >= 1 and w >= 1 and 0 < rate <= 1 and math.isfinite(weight) and weight >= 0
        stride = max(1, round((1 / float(rate)) ** 0.5))
        assert not place.numel() or 0 <= place.min()
        on = (place // w % stride == 0) & (place % w % stride == 0)
        return on.double() * max(0.0, 1 - float(rate) * float(weight))

    kwargs = dict(place=torch.arange(h * w), size=(h, w), rate=rng.choice([0.25, 0.0625]), weight=3.0)
    return Call(reduce.spatial_scores, kwargs, oracle, allows=META)


@family("reduce.functions")
def adaptive_rate(rng: random.Random) -> Call:
    def oracle(layer, layers):
        assert 0 <= layer < layers
        depth = layer / layers
        return torch.tensor(0.5 if depth < 0.3 else 0.25 if depth < 0.65 else 0.0625)

    kwargs = dict(layer=rng.randint(0, 7), layers=8)
    return Call(lambda layer, layers: torch.tensor(reduce.adaptive_rate(layer, layers)), kwargs, oracle)


@family("reduce.functions")
def atp_losses(rng: random.Random) -> Call:
    b = rng.randint(1, 3)

    def oracle(kept, layers, of, target, weights):
        assert len(kept) == len(layers) >= 1 and len(weights) == 2 and all(k.shape == of.shape for k in kept)
        assert target >= 0
        k = torch.stack([t.double() for t in kept])
        atp = sum((t / of.clamp(min=1)).mean() * n for t, n in zip(k, layers, strict=True))
        goal = target * of.double().mean() if target < 1 else target
        distance = (k.mean() - goal).abs()
        return dict(atp=atp, target=distance, total=weights[0] * atp + weights[1] * distance)

    kwargs = dict(
        kept=[torch.rand(b) * 100 for _ in range(2)], layers=[2, 5], of=torch.randint(1, 200, (b,)),
        target=rng.choice([144.0, 0.25]), weights=(0.05, 0.2),
    )  # fmt: skip
    return Call(reduce.atp_losses, kwargs, oracle, allows=(*META, "floats"), tolerance=2e-3)


@family("reduce.functions")
def exit_features(rng: random.Random) -> Call:
    b, n, c = rng.randint(1, 2), rng.randint(3, 6), 2
    types = torch.full((b, n), TEXT)
    types[:, 0] = IMAGE

    def oracle(hidden, types):
        assert types.shape == hidden.shape[:2] and hidden.dim() == 3 and types.shape[1]
        out = []
        for x, t in zip(hidden.double(), types.tolist(), strict=True):
            last = max([i for i, k in enumerate(t) if k == IMAGE], default=-1)
            inside = [i for i in range(last + 1, len(t) - 1) if t[i] not in (IMAGE, 0)]
            out.append(torch.cat([x[inside or [len(t) - 1]].mean(0), x[-1]]))
        return torch.stack(out) if out else hidden.new_zeros(0, 2 * hidden.shape[2])

    kwargs = dict(hidden=torch.randn(b, n, c), types=types)
    return Call(reduce.exit_features, kwargs, oracle, allows=(*META, "far beyond", "negative"))


@family("reduce.functions")
def attention_exit_features(rng: random.Random) -> Call:
    b, n = rng.randint(1, 2), rng.randint(3, 6)
    types = torch.full((b, n), TEXT)
    types[:, 0] = IMAGE
    types[:, 1] = rng.choice([IMAGE, TEXT])

    def oracle(image_row, last_row, types):
        assert image_row.shape == last_row.shape == types.shape
        out, kinds = [], types.tolist()
        width = max([row.count(IMAGE) for row in kinds], default=0)
        for a, z, row in zip(image_row.double(), last_row.double(), kinds, strict=True):
            image = [i for i, k in enumerate(row) if k == IMAGE]
            assert len(image) in (0, width)
            if not image:
                out.append(z.new_zeros(3 * width))
                continue
            text = [z[i] for i in range(image[-1] + 1, len(row)) if row[i] not in (IMAGE, 0)]
            spread = []
            for j in range(width):
                at = j * (len(text) - 1) / (width - 1) if width > 1 else 0.0
                low = min(int(at), len(text) - 1)
                spread.append(text[low] + (at - low) * (text[min(low + 1, len(text) - 1)] - text[low]))
            out.append(torch.cat([a[image], z[image], torch.stack(spread)]))
        return torch.stack(out) if out else last_row.new_zeros(0, 3 * width)

    kwargs = dict(image_row=torch.rand(b, n), last_row=torch.rand(b, n), types=types)
    return Call(reduce.attention_exit_features, kwargs, oracle, allows=(*META, "far beyond", "negative"))


@family("reduce.functions")
def exit_labels(rng: random.Random) -> Call:
    b, n, v = rng.randint(1, 2), rng.randint(2, 5), 6
    full = torch.randn(b, n, v)

    def sane(out: Tensor, given: dict[str, Any]) -> None:
        assert out.shape == (len(given["full"]),) and set(out.tolist()) <= {0, 1}
        labels = given["labels"]
        assert not labels.numel() or (labels[labels != -100] >= 0).all() and labels.max() < given["full"].shape[-1]

    kwargs = dict(
        full=full, left=full + 0.01 * torch.randn(b, n, v), labels=torch.randint(0, v, (b, n)), accuracy=0.9,
        ratio=1.1, compat=rng.choice([None, "authors"]),
    )  # fmt: skip
    return Call(reduce.exit_labels, kwargs, sane=sane)


@family("reduce.functions")
def prefill_flops(rng: random.Random) -> Call:
    costs = [reduce.BlockCost(2, 3) for _ in range(3)]

    def oracle(costs, lengths, batch):
        assert len(costs) == len(lengths) and batch >= 0 and min(lengths, default=0) >= 0
        return torch.tensor(batch * sum(c.flops(int(n)) for c, n in zip(costs, lengths, strict=True)))

    kwargs = dict(costs=Either(costs), lengths=[rng.randint(0, 9) for _ in costs], batch=rng.randint(1, 3))
    return Call(lambda **kw: torch.tensor(reduce.prefill_flops(**kw)), kwargs, oracle)


@family("reduce.functions")
def block_cost(rng: random.Random) -> Call:
    def sane(out: Any, given: dict[str, Any]) -> None:
        assert out.flops(0) == 0 and out.flops(3) >= 0, "a negative cost"

    return Call(reduce.BlockCost, dict(per_token=5, per_pair=2), sane=sane)


@family("reduce.functions")
def cosine_kmeans(rng: random.Random) -> Call:
    n, c = rng.randint(1, 7), rng.randint(1, 3)

    def sane(out: Tensor, given: dict[str, Any]) -> None:
        m = given["clusters"]
        assert out.shape == (len(given["x"]),) and sorted(set(out.tolist())) == list(range(m)), "an empty cluster"
        assert given["iterations"] >= 0

    kwargs = dict(x=torch.randn(n, c), clusters=rng.randint(1, n), iterations=rng.randint(1, 3), first=0)
    return Call(reduce.cosine_kmeans, kwargs, sane=sane)


@family("reduce.functions")
def merge_clusters(rng: random.Random) -> Call:
    n, c = rng.randint(1, 7), rng.randint(1, 3)
    m = rng.randint(1, n)
    labels = torch.cat([torch.arange(m), torch.randint(0, m, (n - m,))])

    def oracle(x, labels, weights, clusters):
        assert labels.shape == weights.shape == (len(x),) and clusters >= 1
        out = []
        for j in range(int(clusters)):
            mine = (labels == j).nonzero().flatten()
            assert len(mine), "an empty cluster"
            p = weights[mine].double()
            assert (p >= 0).all()
            p = torch.ones_like(p) if p.sum() == 0 else p
            out.append((p[:, None] * x[mine].double()).sum(0) / p.sum())
        assert not labels.numel() or 0 <= labels.min() and labels.max() < clusters
        return torch.stack(out)

    kwargs = dict(x=torch.randn(n, c), labels=labels, weights=torch.rand(n), clusters=m)
    return Call(reduce.merge_clusters, kwargs, oracle)


@family("reduce.functions")
def ensemble(rng: random.Random) -> Call:
    def oracle(layers, how):
        assert layers
        s = torch.stack(list(layers)).double()
        return {"sum": s.sum(0), "min": s.amin(0), "max": s.amax(0)}[how]

    kwargs = dict(layers=[torch.randn(2, 3) for _ in range(2)], how=rng.choice(["sum", "min", "max"]))
    return Call(reduce.ensemble, kwargs, oracle, names=("ensemble",), allows=META)


@family("reduce.functions")
def focus(rng: random.Random) -> Call:
    t, i = sizes(rng, 4, 4)
    return Call(
        reduce.focus, dict(text_to_text=torch.rand(2, t, t), text_to_image=torch.rand(2, t, i)),
        lambda text_to_text, text_to_image: text_to_text.double() @ text_to_image.double(), allows=META,
    )  # fmt: skip


@family("reduce.functions")
def received_attention(rng: random.Random) -> Call:
    b, h, n, d = sizes(rng, 2, 2, 5, 3)

    def oracle(q, k, scale):
        assert q.shape == k.shape and q.dim() == 4
        s = q.double() @ k.double().mT * (q.shape[-1] ** -0.5 if scale is None else float(scale))
        return s.softmax(-1).mean((1, 2))

    kwargs = dict(q=torch.randn(b, h, n, d), k=torch.randn(b, h, n, d), scale=rng.choice([None, 0.5]))
    return Call(reduce.received_attention, kwargs, oracle, allows=META)


@family("reduce.functions")
def rank_consistency(rng: random.Random) -> Call:
    layers, n = rng.randint(1, 3), rng.randint(2, 5)

    def sane(out: Tensor, given: dict[str, Any]) -> None:
        assert out.shape == (len(given["scores"]),) * 2 and bool((out.abs() <= 1 + 1e-6).all()), "no correlations"
        assert torch.allclose(out, out.mT, atol=1e-6), "not symmetric"

    shape = rng.choice([(layers, n), (layers, 2, n)])
    return Call(reduce.rank_consistency, dict(scores=torch.randn(shape)), sane=sane, allows=(*META, "integers"))


def rewarded(counts: Any) -> float:
    return float(sum(counts))


@family("reduce.functions")
def searches(rng: random.Random) -> Call:
    layers, n = rng.randint(1, 3), rng.randint(2, 8)

    def sane(out: Any, given: dict[str, Any]) -> None:
        counts = out.counts
        assert len(counts) == given["layers"] and all(0 <= c <= given["n"] for c in counts), "no counts"
        assert all(a >= b for a, b in zip(counts, counts[1:], strict=False)), "counts grow"

    if rng.random() < 0.5:
        kwargs = dict(
            score=Either(rewarded), layers=layers, n=n, tolerance=rng.choice([0.0, 2.0]), minimum=rng.randint(0, 1),
            first_layer=0,
        )  # fmt: skip
        return Call(reduce.greedy_search, kwargs, sane=sane, label="greedy")
    kwargs = dict(
        score=Either(rewarded), layers=layers, n=n, budget=0.5, evaluations=rng.randint(1, 4), first_layer=0, seed=1
    )
    return Call(reduce.sigmoid_search, kwargs, sane=sane, label="sigmoid")


@family("reduce.functions")
def bayesian_search(rng: random.Random) -> Call:
    def sane(out: Any, given: dict[str, Any]) -> None:
        best, value, history = out
        assert len(history) == given["evaluations"], f"{len(history)} evaluations"
        assert all(a <= x <= b for x, (a, b) in zip(best, given["bounds"], strict=True)), "out of bounds"

    kwargs = dict(
        score=Either(lambda p: -sum((x - 0.3) ** 2 for x in p)), bounds=Either([(0.0, 1.0)] * rng.randint(1, 2)),
        evaluations=rng.randint(1, 5), explore=2, noise=1e-6, seed=0,
    )  # fmt: skip
    return Call(reduce.bayesian_search, kwargs, sane=sane)


# ---- caches


@family("cache.functions")
def snapkv_votes(rng: random.Random) -> Call:
    b, hk, g, m, d = *sizes(rng, 2, 2, 2), rng.randint(4, 7), 3
    w = rng.randint(1, 3)

    def oracle(q, k, window_size, kernel_size, pooling, scale, valid, reduce, compat):
        assert q.dim() == k.dim() == 4 and q.shape[0] == k.shape[0] and q.shape[-1] == k.shape[-1]
        assert q.shape[1] % k.shape[1] == 0 and compat is None
        w, m = int(window_size), k.shape[2]
        assert 1 <= w < m and q.shape[2] >= w and kernel_size % 2 == 1 and kernel_size >= 1
        full = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
        s = q.double()[:, :, -w:] @ full.mT * (q.shape[-1] ** -0.5 if scale is None else float(scale))
        s = s.masked_fill(torch.arange(m) > torch.arange(m - w, m)[:, None], -math.inf)
        if valid is not None:
            valid = valid[:, 0] if valid.dim() == 3 else valid
            assert valid.dtype == torch.bool and valid.shape[1] == m and valid.shape[0] in (1, q.shape[0])
            s = s.masked_fill(~valid[:, None, None], -math.inf)
        a = s.softmax(-1).nan_to_num(0.0)[..., : m - w]
        a = a.sum(-2) if reduce == "sum" else a.mean(-2)
        pool = F.avg_pool1d if pooling == "avg" else F.max_pool1d
        votes = pool(a, int(kernel_size), 1, int(kernel_size) // 2).unflatten(1, (k.shape[1], -1)).mean(2)
        return votes if valid is None else votes.masked_fill(~valid[:, None, : m - w], -1e9)

    kwargs = dict(
        q=torch.randn(b, hk * g, m, d), k=torch.randn(b, hk, m, d), window_size=w, kernel_size=rng.choice([1, 3]),
        pooling=rng.choice(["avg", "max"]), scale=rng.choice([None, 0.5]),
        valid=rng.choice([None, torch.rand(b, m) > 0.2]), reduce=rng.choice(["sum", "mean"]), compat=None,
    )  # fmt: skip
    return Call(
        lambda **kw: cache.snapkv_votes(**kw).nan_to_num(neginf=-1e9), kwargs, oracle, allows=META, tolerance=1e-4
    )  # fmt: skip


@family("cache.functions")
def select_keys(rng: random.Random) -> Call:
    b, h, m = sizes(rng, 2, 2, 7)

    def run(scores, counts, kernel_size, pooling, sinks, recent):
        return cache.TopK(kernel_size, pooling, sinks, recent)(scores, counts)

    def sane(out: Tensor, given: dict[str, Any]) -> None:
        counts = given["counts"]
        assert out.shape[:2] == counts.shape
        for row, c in zip(out.flatten(0, 1).tolist(), counts.flatten().tolist(), strict=True):
            kept = [i for i in row if i >= 0]
            assert len(kept) == c and kept == sorted(set(kept)) and all(i < given["scores"].shape[-1] for i in kept)

    kwargs = dict(
        scores=torch.randn(b, h, m), counts=torch.randint(1, m + 1, (b, h)), kernel_size=rng.choice([1, 3]),
        pooling=rng.choice(["max", "avg"]), sinks=rng.randint(0, 1), recent=rng.randint(0, 1),
    )  # fmt: skip
    return Call(run, kwargs, sane=sane)


@family("cache.functions")
def budgets(rng: random.Random) -> Call:
    simple = rng.choice([cache.Ratio(0.5), cache.Cap(4)])
    kinds: list[tuple[Any, dict[str, Any]]] = [
        (cache.Ratio, dict(ratio=rng.random())), (cache.Cap, dict(cap=rng.randint(1, 9))),
        (cache.Pyramid, dict(budget=Either(simple), beta=4.0, window_size=2)),
        (cache.PerLayer, dict(budgets=Either([simple, cache.Cap(3)]))),
        (cache.AcrossHeads, dict(budget=Either(simple), minimum=0.2)),
        (cache.AcrossLayers, dict(budget=Either(simple), minimum=0.5)),
    ]  # fmt: skip
    make, kwargs = rng.choice(kinds)

    def sane(made: Any, given: dict[str, Any]) -> None:
        kept = [made.keep(10, layer, 2) for layer in range(2)]
        assert all(isinstance(k, int) and 0 <= k <= 10 for k in kept), f"keeps {kept} of 10"

    return Call(make, kwargs, sane=sane, label=make.__name__)


@family("cache.functions")
def scorers(rng: random.Random) -> Call:
    kinds: list[tuple[Any, dict[str, Any]]] = [
        (cache.SnapKVVotes, dict(window_size=3, kernel_size=3, pooling="avg", compat=None)),
        (cache.Recency, dict(sinks=2)), (cache.KeyNorm, dict(keep="low")), (cache.RandomScores, dict(seed=3)),
        (cache.LastQuery, dict(per_head=False)), (cache.ObservedAttention, dict(queries=4)),
        (cache.TopK, dict(kernel_size=3, pooling="max", sinks=1, recent=0)),
    ]  # fmt: skip
    make, kwargs = rng.choice(kinds)

    def sane(made: Any, given: dict[str, Any]) -> None:
        for name, value in given.items():
            if isinstance(value, int) and not isinstance(value, bool):
                assert value >= 0 or name == "seed", f"{name}={value}"
        repr(made)

    return Call(make, kwargs, sane=sane, label=make.__name__)


# ---- looking


@family("look.functions")
def sink_rate(rng: random.Random) -> Call:
    b, h, n = sizes(rng, 2, 2, 5)

    def oracle(received, seen, epsilon, sinks):
        assert received.shape == seen.shape and received.dim() == 3 and sinks >= 1 and math.isfinite(epsilon)
        alpha, out = received.double() / seen.double().clamp(min=1), []
        for s in range(int(sinks)):
            hits = []
            for a, c in zip(alpha.flatten(0, 1), seen.flatten(0, 1), strict=True):
                first = next((i for i, k in enumerate(c.tolist()) if k > 0), None)
                if first is not None:  # where there are no tokens, none can be a sink
                    hits.append(first + s < len(a) and bool(a[first + s] > epsilon))
            assert hits, "no tokens at all"
            out.append(sum(hits) / len(hits))
        return torch.tensor(out, dtype=torch.float64)

    kwargs = dict(
        received=torch.rand(b, h, n) * 3, seen=torch.randint(0, 4, (b, h, n)).float(), epsilon=0.3,
        sinks=rng.randint(1, n),
    )  # fmt: skip
    kwargs["seen"][0, 0, -1] = 1.0  # somebody reads something
    return Call(look.sink_rate, kwargs, oracle, allows=(*META, "integers"))


@family("look.functions")
def effective_rank(rng: random.Random) -> Call:
    n, m = sizes(rng, 4, 4)

    def oracle(a):
        s = torch.linalg.svdvals(a.double())
        p = s / s.sum(-1, keepdim=True).clamp(min=1e-300)
        h = -(p * p.clamp(min=1e-300).log()).sum(-1)
        return torch.where(s.sum(-1) > 0, h.exp(), 0.0) if s.shape[-1] else s.sum(-1)

    return Call(look.effective_rank, dict(a=torch.randn(2, n, m)), oracle, allows=META, tolerance=1e-4)


@family("look.functions")
def image_map(rng: random.Random) -> Call:
    b, h, q, grid = rng.randint(1, 2), 2, 2, (2, 2)
    types = torch.full((b, 7), TEXT)
    types[:, 2:6] = IMAGE
    entry = {"weights": [weights(b, h, q, 7)], "keys": [torch.arange(7)]}

    def oracle(entry, types, grid, call, row, normalise):
        assert tuple(grid) == (2, 2) or tuple(grid) in ((1, 4), (4, 1))
        w = entry["weights"][call][:, :, row, 2:6].double()
        w = w / w.sum(-1, keepdim=True) if normalise else w
        return w.reshape(*w.shape[:2], *map(int, grid))

    kwargs = dict(
        entry=Either(entry), types=Either(types), grid=grid, call=0, row=rng.choice([0, -1]),
        normalise=rng.random() < 0.5,
    )  # fmt: skip
    return Call(look.image_map, kwargs, oracle)


@family("look.functions")
def pictures(rng: random.Random) -> Call:
    maps, picture = torch.rand(2, 3, 3), torch.rand(3, 6, 6)
    results = {i: {"entropy": torch.rand(2), "sink_score": torch.rand(2)} for i in range(2)}
    kinds: list[tuple[Any, dict[str, Any]]] = [
        (look.map_over_image, dict(weights=maps, image=picture, titles=("a", "b"), opacity=0.5)),
        (look.head_grid, dict(maps=maps[None], labels=["first"], image=rng.choice([None, picture]))),
        (look.profile, dict(results=results, statistic="entropy", ylabel=Name(None))),
        (look.sink_profile, dict(results=results)),
    ]
    make, kwargs = rng.choice(kinds)

    def run(**given: Any) -> Any:
        import matplotlib.pyplot as plt

        figure = make(**given)
        plt.close(figure)
        return figure.get_size_inches().tolist()

    return Call(run, kwargs, label=make.__name__, names=("statistic",), allows=("empty", "integers"))
