"""What a click costs in InterFormer, against encoding the image, which is done once.

``attnlib bench --suite interformer --out benchmarks/results`` measures again what ``interformer-cpu.json`` holds. A
click is all that follows it: painting the reference label, I-MSA and the head over the maps that were kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...models.build import create_model
from ...models.dense.clicks import clicked, unknown
from ..clock import interleave, machine
from ..small import Progress


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    models: tuple[str, ...] = ("interformer_light", "interformer_tiny"),
    side: int = 512,
    repeats: int = 3,
    **settings: Any,
) -> dict[str, Any]:
    """Time both halves of every model by turns.

    Args:
        progress: told of every model.
        keep, pictures: as of other studies; not used here.
        models: names.
        side: pixels a side of the image.
        repeats: rounds, of which the fastest counts.
        settings: of the models, to make them smaller.

    Returns:
        Plain values, for JSON: seconds of ``encode`` and ``click``, ``share`` of the second in the first, and
        ``without_cache``: how many times as long a click would take if the image were encoded again.
    """
    result: dict[str, Any] = {
        "what": "a click against encoding the image once", "machine": machine(), "side": side, "models": {},
    }  # fmt: skip
    for name in models:
        torch.manual_seed(0)
        model = create_model(name, **settings).eval()
        image, label = torch.rand(1, model.in_chans, side, side), unknown((side, side))
        with torch.no_grad():
            held = model.encode(image)

            def encode(model: Any = model, image: Any = image) -> None:
                model.encode(image)

            def click(model: Any = model, held: Any = held, label: Any = label) -> None:
                model.decode(held, clicked(label, [(side // 2, side // 3, True)])[None]).argmax(1)

            times = interleave({"encode": encode, "click": click}, repeats)
        seconds = {part: times[part].minimum for part in ("encode", "click")}
        share = seconds["click"] / seconds["encode"]
        result["models"][name] = {
            **{f"{part}_seconds": value for part, value in seconds.items()}, "share": share,
            "without_cache": 1 + 1 / share, "parameters": sum(p.numel() for p in model.parameters()),
        }  # fmt: skip
        if progress is not None:
            progress(f"{name}: encode {seconds['encode']:.2f} s, click {seconds['click']:.3f} s, share {share:.3f}")
        del model
    return result
