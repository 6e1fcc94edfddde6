"""Outside the releases of transformers that are tested, a model is looked at before anything is attached to it.

Two short calls, a prompt and one token more, run untouched and then watched. What watches has to see cache, phase and
positions as they are, in every layer, and an edit that changes nothing has to give the untouched output. Nothing runs
blind: where this fails, or no such call can be made, attaching is refused by version.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..intervention import Intervention
from ..site import Site
from .names import (
    BEYOND,
    OLDEST,
    READABLE,
    cache_argument,
    cache_in,
    cache_out,
    implementation_of,
    installed,
    parameters_of,
)

PROMPT = 5

_checked: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
_inside = threading.local()


class _Watch(Intervention):
    """Sees where calls are, and changes nothing."""

    name = "self-check"
    kinds = ("self",)

    def __init__(self) -> None:
        self.seen: list[tuple[int, str | None, int, list[int]]] = []

    def around_attention(self, site: Site, q: Tensor, k: Tensor, v: Tensor, call: Callable[..., Tensor]) -> Tensor:
        slots = [] if site.q_pos is None else site.q_pos.reshape(-1, site.n_queries)[0].tolist()
        self.seen.append((site.layer, site.phase, site.offset, slots))
        return call(q, k, v)


class _WatchMaps(_Watch):
    """Reads the maps besides, as an edit would."""

    def on_weights(self, site: Site, weights: Tensor, rows: Tensor) -> Tensor:
        return weights.clone()


def _first(output: Any) -> Tensor:
    tensors = [t for t in dict(output).values() if isinstance(t, Tensor)]
    if not tensors:
        raise ValueError(f"{type(output).__name__} holds no tensor")
    return tensors[0]


def _calls(model: nn.Module) -> tuple[Callable[[], list[Tensor]], bool]:
    """A function that makes the calls and gives their outputs, and whether they go through a cache."""
    takes, where = parameters_of(model), next(model.parameters()).device
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if "input_ids" in takes:
        size = int(getattr(text, "vocab_size", 0) or 0)
        if size < 2:
            raise ValueError(f"{type(config).__name__} has no vocab_size")
        ids = (torch.arange(3, 4 + PROMPT, device=where) % (size - 1))[None] + 1
        if config.is_encoder_decoder:
            return lambda: [_first(model(input_ids=ids, decoder_input_ids=ids))], False
        generates = model.can_generate()  # type: ignore[operator]
        with torch.no_grad():
            kept = {"use_cache": True} if "use_cache" in takes else {}
            if not generates and cache_in(dict(model(input_ids=ids, **kept))) is None:
                return lambda: [_first(model(input_ids=ids))], False

        def both() -> list[Tensor]:
            prompt = model(input_ids=ids[:, :PROMPT], use_cache=True)
            rest = cache_argument(model, cache_out(prompt))
            return [_first(prompt), _first(model(input_ids=ids[:, PROMPT:], use_cache=True, **rest))]

        return both, True
    if "pixel_values" in takes:
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        pixels = torch.linspace(-1, 1, config.num_channels * height * width, device=where)
        pixels = pixels.view(1, -1, height, width).to(next(model.parameters()).dtype)
        return lambda: [_first(model(pixel_values=pixels))], False
    raise ValueError(f"its forward takes neither input_ids nor pixel_values but {takes}")


def _fault(model: nn.Module, sites: list[Site], attach: Callable[..., Any]) -> str | None:
    """What is wrong, ``None`` when nothing is."""
    run, cached = _calls(model)
    readable = all(implementation_of(site.module) in READABLE for site in sites)
    watch = _WatchMaps() if readable else _Watch()
    with torch.no_grad():
        before = run()
        with attach(model, watch):
            after = run()
    own = sorted({site.layer for site in sites if site.kind == "self"})
    if cached:
        for number, (phase, offset, slots) in enumerate(
            [("prefill", 0, list(range(PROMPT))), ("decode", PROMPT, [PROMPT])]
        ):
            mine = watch.seen[number * len(own) : (number + 1) * len(own)]
            if sorted(layer for layer, *_ in mine) != own:
                return f"layers {own} have attention, of which {[layer for layer, *_ in mine]} were seen"
            for layer, *told in mine:
                if told != [phase, offset, slots]:
                    return (
                        f"layer {layer} was told (phase, tokens before, positions) = {tuple(told)} in place of "
                        f"{(phase, offset, slots)}; its cache was not seen"
                    )
    elif not watch.seen:
        return "no attention was seen"
    for b, a in zip(before, after, strict=True):
        if not torch.allclose(a, b, atol=1e-4 * float(b.abs().max().clamp(min=1e-6)), rtol=0):
            return f"an edit that changes nothing changed the output by {float((a - b).abs().max()):.2g}"
    return None


def ensure(model: nn.Module, sites: list[Site], attach: Callable[..., Any]) -> None:
    """Refuse a model under a release of transformers that is not tested, unless it behaves.

    Args:
        model: to be attached to.
        sites: its attention.
        attach: ``attach(model, intervention)``, a context manager.

    Raises:
        RuntimeError: the release is outside the tested range, and the self-check failed or cannot be made.
    """
    version, tested = installed()
    if tested or getattr(_inside, "running", False) or _checked.get(model) == version:
        return
    modes = [(m, m.training) for m in model.modules()]
    devices = list({p.device for p in model.parameters() if p.device.type != "cpu"})
    _inside.running = True
    try:
        model.eval()
        with torch.random.fork_rng(devices):
            fault = _fault(model, sites, attach)
    except Exception as error:  # noqa: BLE001 - whatever it is, the release is what does not fit
        fault = f"it could not be made: {type(error).__name__}: {error}"
    finally:
        _inside.running = False
        for module, training in modes:
            module.training = training
    needs = f"transformers {version} is outside the tested range ({OLDEST} to below {BEYOND})"
    if fault is not None:
        raise RuntimeError(
            f"{needs}, and a self-check of {type(model).__name__} failed: {fault}; "
            f"pip install 'transformers>={OLDEST},<{BEYOND}'"
        )
    warnings.warn(f"{needs}; a self-check of {type(model).__name__} passed", stacklevel=3)
    _checked[model] = version
