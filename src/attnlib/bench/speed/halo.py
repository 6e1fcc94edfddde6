"""Time and memory of halo attention beside windows unfolded over the whole map, and what folding norms saves.

``attnlib bench --suite halo`` measures it again. The other way is timm's: queries, keys and values by convolutions of
channels-first maps, windows of all blocks at once by ``unfold``, position terms by shifting rows, one softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnlib

from ...nn.local.halonet import HaloAttention
from ..clock import interleave, machine, peak_bytes, ratio

#: Batch, side of the map, width, heads, block, halo: the stages of halonet_h1 at 256 pixels, and of halonet26t.
SHAPES = ((1, 64, 64, 8, 8, 3), (1, 32, 128, 8, 8, 3), (4, 32, 128, 8, 8, 3), (1, 64, 256, 8, 8, 3),
          (1, 16, 256, 8, 8, 2), (8, 16, 256, 8, 8, 2))  # fmt: skip
#: Models whose norms fold.
MODELS = ("resnet18", "resnet50", "efficientnet_b0", "halonet26t")


def _shifted(scores: Tensor, window: int) -> Tensor:
    """(..., n, 2 w - 1) by displacement -> (..., n, w) by place in the window."""
    n, length = scores.shape[-2:]
    flat = F.pad(F.pad(scores, (0, 1)).flatten(-2), (0, length - n))
    return flat.unflatten(-1, (n + 1, length))[..., :n, window - 1 :]


def unfolded(m: nn.Module, x: Tensor) -> Tensor:
    """The same attention with keys of zeros at the border: (B, C, H, W) -> (B, C, H, W)."""
    h: Any = m.halo
    batch, _, height, width = x.shape
    b, w, heads = h.block_size, h.block_size + 2 * h.halo_size, h.num_heads
    rows, cols = height // b, width // b
    kv = torch.cat([h.k.weight.unflatten(0, (heads, -1)), h.v.weight.unflatten(0, (heads, -1))], 1).flatten(0, 1)
    q = F.conv2d(x, h.q.weight[..., None, None]).reshape(batch * heads, -1, rows, b, cols, b)
    q = q.permute(0, 2, 4, 3, 5, 1).reshape(batch * heads, rows * cols, b * b, -1)
    windows = F.pad(F.conv2d(x, kv[..., None, None]), (h.halo_size,) * 4).unfold(2, w, b).unfold(3, w, b)
    windows = windows.reshape(batch * heads, -1, rows * cols, w * w).permute(0, 2, 3, 1)
    k, v = windows.split([h.head_dim, h.value_dim], -1)
    split = q.unflatten(2, (b, b))
    across = _shifted(split @ h.width_rel.T, w)[..., None, :]
    down = _shifted(split.transpose(2, 3) @ h.height_rel.T, w).transpose(2, 3)[..., None]
    place = (across + down).reshape(batch * heads, rows * cols, b * b, w * w)
    out = ((q @ k.transpose(-1, -2)) * h.scale + place).softmax(-1) @ v
    out = out.reshape(batch, heads, rows, cols, b, b, -1).permute(0, 1, 6, 2, 4, 3, 5)
    return out.reshape(batch, -1, height, width)


def _train(run: Callable[[Tensor], Tensor], x: Tensor, leaves: Sequence[Tensor]) -> None:
    torch.autograd.grad(run(x).sum(), (x, *leaves))


def _infer(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with torch.no_grad():
        run(x)


def attention_record(
    shape: Sequence[int], rounds: int, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Seconds, ratios and peak bytes of one shape of :data:`SHAPES`."""
    batch, side, dim, heads, block, halo = shape
    torch.manual_seed(0)
    ours = {pad: HaloAttention(dim, heads, block, halo, pad_mode=pad) for pad in ("zero", "masked")}
    ours["masked"].load_state_dict(ours["zero"].state_dict())
    x = torch.randn(batch, side, side, dim)
    first = x.permute(0, 3, 1, 2).contiguous()
    with torch.no_grad():
        error = float((unfolded(ours["zero"], first).permute(0, 2, 3, 1) - ours["zero"](x)).abs().max())
    if not error < 1e-4:
        raise AssertionError(f"windows unfolded over the map compute something else: they differ by {error:.1e}")
    runs: dict[str, tuple[Callable[[Tensor], Tensor], Tensor, nn.Module]] = {
        "unfolded": (partial(unfolded, ours["zero"]), first, ours["zero"])
    }
    runs |= {pad: (m, x, m) for pad, m in ours.items()}
    record: dict[str, Any] = dict(
        zip(("batch", "side", "dim", "heads", "block_size", "halo_size"), shape, strict=True)
    )  # fmt: skip
    for what in ("forward", "training"):
        jobs: dict[str, Callable[[], Any]] = {}
        for name, (run, image, m) in runs.items():
            if what == "forward":
                jobs[name] = partial(_infer, run, image)
            else:
                jobs[name] = partial(_train, run, image.clone().requires_grad_(), tuple(m.parameters()))
        times = interleave(jobs, rounds, clock="cpu", progress=progress)
        bytes_of = {name: peak_bytes(job) for name, job in jobs.items()}
        record[what] = {
            name: {
                "seconds": times[name].minimum,
                "times_as_fast": ratio(times["unfolded"], times[name])["ratio_of_minima"],
                "peak_bytes": bytes_of[name],
                "share_of_bytes": bytes_of[name] / bytes_of["unfolded"],
            }
            for name in jobs
        }
    return record


def deploy_record(name: str, batch: int, side: int, rounds: int, progress: Any = None) -> dict[str, Any]:
    """Seconds of a model in evaluation, with norms where they stand and folded into convolutions."""
    torch.manual_seed(0)
    model = attnlib.create_model(name, num_classes=10).eval()
    deployed = attnlib.deploy(model)
    x = torch.randn(batch, 3, side, side)
    times = interleave(
        {"model": partial(_infer, model, x), "deployed": partial(_infer, deployed, x)}, rounds, clock="cpu",
        progress=progress,
    )  # fmt: skip
    return {
        "model": name, "batch": batch, "side": side, "seconds": times["model"].minimum,
        "deployed_seconds": times["deployed"].minimum,
        "times_as_fast": ratio(times["model"], times["deployed"])["ratio_of_minima"],
    }  # fmt: skip


def measure(
    shapes: Sequence[Sequence[int]] = SHAPES,
    models: Sequence[str] = MODELS,
    side: int = 128,
    batches: Sequence[int] = (1, 8),
    rounds: int = 9,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Processor time of interleaved runs (the fastest of each), and peak memory, on one thread.

    Args:
        shapes: of the attention, as :data:`SHAPES`.
        models: whose norms are folded.
        side: of their images, in pixels.
        batches: of their images.
        rounds: measurements per contender.
        progress: told what is being measured.

    Returns:
        A dict of plain values: machine, one record per shape and one per model and batch.

    >>> found = measure([(1, 4, 8, 2, 2, 1)], [], rounds=1)
    >>> sorted(found["attention"][0]["forward"])
    ['masked', 'unfolded', 'zero']
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        attention = [attention_record(shape, rounds, progress) for shape in shapes]
        deploy = [deploy_record(name, b, side, rounds, progress) for name in models for b in batches]
        return {
            "settings": {"dtype": "float32", "clock": "cpu", "rounds": rounds}, "machine": machine(),
            "attention": attention, "deploy": deploy,
        }  # fmt: skip
    finally:
        torch.set_num_threads(threads)
