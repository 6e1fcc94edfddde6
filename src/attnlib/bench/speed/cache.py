"""Time of a decoding step and memory of the cache against the share of keys that is evicted.

``python -m attnlib.bench.speed.cache benchmarks/results/cache-cpu.json`` measures again what that file holds. With
``--kvpress FOLDER --commit SHA``, the folder of a checkout of NVIDIA/kvpress, its SnapKV takes part; without, what the
file holds about it stays.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import statistics
import sys
import types
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...cache import SnapKV
from ...hooks import attach
from ...ops.split_decoding import split_decoding
from ..clock import interleave, machine, now, ratio

WINDOW, KERNEL = 32, 5


def model_of(layers: int, heads: int, kv_heads: int, head_dim: int) -> Any:
    """A Llama of random weights; what decoding costs does not depend on them."""
    import transformers

    width = heads * head_dim
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, max_position_embeddings=1 << 17,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def cache_bytes(cache: Any) -> int:
    """Bytes of memory behind keys, values and, in a compressed cache, positions; room for more tokens included."""
    total = 0
    for layer in cache.layers:
        for name in ("keys", "values", "positions"):
            t = getattr(layer, name, None)
            total += 0 if t is None else t.untyped_storage().nbytes()
    return total


def _kvpress(folder: str | Path) -> Any:
    """kvpress's SnapKVPress, without the rest of the package, which wants a dozen others."""
    root = Path(folder)
    if not (root / "kvpress" / "presses" / "snapkv_press.py").exists():
        raise ValueError(f"kvpress={str(folder)!r} has no kvpress/presses/snapkv_press.py; give a checkout's folder")
    for name, path in (("kvpress", root / "kvpress"), ("kvpress.presses", root / "kvpress" / "presses")):
        package = types.ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules.setdefault(name, package)
    return importlib.import_module("kvpress.presses.snapkv_press").SnapKVPress


class Contender:
    """A model with its own cache, filled with the prompt; copies share their weights."""

    def __init__(self, name: str, ratio: float, model: Any, prompt: Tensor, press: Any = None, ours: bool = False):
        import transformers

        self.name, self.ratio, self.length = name, ratio, prompt.shape[1]
        self.model = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        self.cache = transformers.DynamicCache(config=model.config)
        self.session = attach(self.model, SnapKV(ratio=ratio, window_size=WINDOW, kernel_size=KERNEL)) if ours else None
        slots = torch.arange(self.length)
        inputs = dict(past_key_values=self.cache, position_ids=slots[None], logits_to_keep=1)
        start = now()
        if press is None:
            self.model(prompt, **inputs)
        else:
            # It looks for an argument that newer versions of transformers do not pass by themselves.
            with press(compression_ratio=ratio, window_size=WINDOW, kernel_size=KERNEL)(self.model):
                self.model(prompt, cache_position=slots, **inputs)
        self.prefill = now() - start
        self.bytes = 0
        self.keys = [int(layer.keys.shape[2]) for layer in self.cache.layers]

    def decode(self, ids: Tensor, clock: str = "wall") -> tuple[float, Tensor]:
        """Seconds per token, and the last logits; memory is read at the end, then the cache is put back."""
        out = None
        start = now(clock)
        for t in range(ids.shape[1]):
            where = torch.tensor([[self.length + t]])
            out = self.model(ids[:, t : t + 1], past_key_values=self.cache, position_ids=where).logits
        seconds = (now(clock) - start) / ids.shape[1]
        self.bytes = cache_bytes(self.cache)
        self.cache.crop(-ids.shape[1])
        assert out is not None
        return seconds, out[:, -1]


def measure_decoding(
    length: int = 4096,
    ratios: Sequence[float] = (0.25, 0.5, 0.75, 0.9),
    steps: int = 16,
    layers: int = 4,
    heads: int = 8,
    kv_heads: int = 4,
    head_dim: int = 64,
    rounds: int = 7,
    kvpress: str | Path | None = None,
    commit: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Medians of interleaved runs: ``steps`` tokens decoded by each contender in turn.

    Args:
        length: tokens of the prompt.
        ratios: shares of the keys that SnapKV evicts.
        steps: tokens decoded per run.
        layers: of the model, a Llama of random weights.
        heads: query heads.
        kv_heads: key heads.
        head_dim: width of a head.
        rounds: measurements per contender.
        kvpress: folder of a checkout of NVIDIA/kvpress, whose SnapKV then takes part.
        commit: of that checkout.
        progress: told what is being measured.

    Returns:
        A dict of plain values: settings, machine and one record per contender. ``speedup`` is the median, over rounds,
        of the time of a step on the whole cache by this one in the same round.

    Raises:
        ValueError: a folder without kvpress.

    >>> r = measure_decoding(64, (0.5,), steps=1, layers=1, heads=2, kv_heads=1, head_dim=8, rounds=1)["records"]
    >>> [(x["contender"], x["keys"]) for x in r]
    [('whole cache', 64), ('attnlib, ratio 0.5', 32)]
    """
    press = None if kvpress is None else _kvpress(kvpress)
    torch.manual_seed(1)
    prompt, more = torch.randint(3, 512, (1, length)), torch.randint(3, 512, (1, steps))
    model = model_of(layers, heads, kv_heads, head_dim)
    with torch.no_grad():
        contenders = []
        for ratio in (0.0, *ratios):
            if progress:
                progress(f"prompt of {length} tokens, ratio {ratio}")
            if not ratio:
                contenders.append(Contender("whole cache", ratio, model, prompt))
                continue
            contenders.append(Contender(f"attnlib, ratio {ratio}", ratio, model, prompt, ours=True))
            if press is not None:
                contenders.append(Contender(f"kvpress, ratio {ratio}", ratio, model, prompt, press))
        times: dict[str, list[float]] = {c.name: [] for c in contenders}
        logits = {}
        for done in range(rounds + 1):  # the first round warms up
            for c in contenders:
                if progress:
                    progress(f"round {done} of {rounds}: {c.name}")
                seconds, logits[c.name] = c.decode(more)
                if done:
                    times[c.name].append(seconds)
    for c in contenders:
        twin = logits.get(f"attnlib, ratio {c.ratio}")
        if c.name.startswith("kvpress") and twin is not None:
            error = float((logits[c.name] - twin).abs().max())
            if not error < 1e-3:
                raise AssertionError(f"{c.name} computes something else: it differs by {error:.1e}")
    base = contenders[0]
    records = []
    for c in contenders:
        records.append(
            {
                "contender": c.name,
                "ratio": c.ratio,
                "keys": max(c.keys),
                "cache_bytes": c.bytes,
                "memory": c.bytes / base.bytes,
                "prefill_seconds": c.prefill,
                "step_seconds": statistics.median(times[c.name]),
                "speedup": statistics.median(b / own for b, own in zip(times[base.name], times[c.name], strict=True)),
            }
        )
        if c.session is not None:
            c.session.detach()
    settings: dict[str, Any] = {
        "prompt": length, "steps": steps, "layers": layers, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim,
        "dtype": "float32", "window_size": WINDOW, "kernel_size": KERNEL, "rounds": rounds,
    }  # fmt: skip
    if press is not None:
        settings["kvpress"] = commit or "unknown"
    return {"what": "decoding on a compressed cache", "settings": settings, "machine": machine(), "records": records}


def measure_split(
    lengths: Sequence[int] = (4096, 8192),
    shares: Sequence[float] = (0.1, 0.5, 1.0),
    batch: int = 8,
    heads: int = 8,
    kv_heads: int = 8,
    head_dim: int = 64,
    rounds: int = 9,
) -> list[dict[str, Any]]:
    """One query per sample over samples of unlike length: split decoding beside SDPA under a mask.

    Args:
        lengths: keys of the longest sample.
        shares: length of the shortest by the longest; the others lie evenly between.
        batch: samples.
        heads: query heads.
        kv_heads: key heads.
        head_dim: width of a head.
        rounds: measurements per contender, interleaved.

    Returns:
        One record per problem; ``speedup`` as in :func:`measure_decoding`.

    >>> measure_split((64,), (0.5,), 2, 2, 2, 8, rounds=1)[0]["keys"]
    96
    """
    records = []
    torch.manual_seed(0)
    with torch.no_grad():
        for m in lengths:
            q = torch.randn(batch, heads, 1, head_dim)
            k, v = (torch.randn(batch, kv_heads, m, head_dim) for _ in range(2))
            for share in shares:
                each = torch.linspace(m * share, m, batch).round().long()
                mask = (torch.arange(m) < each[:, None])[:, None, None]
                sdpa = torch.nn.functional.scaled_dot_product_attention
                jobs: dict[str, Callable[[], Tensor]] = {
                    "sdpa": partial(sdpa, q, k, v, attn_mask=mask, enable_gqa=heads != kv_heads),
                    "split": partial(split_decoding, q, k, v, lengths=each, workers=1),
                }
                torch.testing.assert_close(jobs["split"](), jobs["sdpa"](), atol=1e-4, rtol=1e-4)
                times = interleave(jobs, rounds)
                records.append(
                    {
                        "longest": m,
                        "shortest": int(each[0]),
                        "keys": int(each.sum()),
                        "batch": batch,
                        "sdpa_seconds": times["sdpa"].median,
                        "split_seconds": times["split"].median,
                        "speedup": ratio(times["sdpa"], times["split"])["ratio"],
                    }
                )
    return records


def measure(progress: Callable[[str], None] | None = None, **settings: Any) -> dict[str, Any]:
    """Both measurements, as the file of results holds them; settings are those of :func:`measure_decoding`."""
    return {**measure_decoding(progress=progress, **settings), "split_decoding": measure_split()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", nargs="?", default="benchmarks/results/cache-cpu.json")
    parser.add_argument("--kvpress", help="folder of a checkout of NVIDIA/kvpress")
    parser.add_argument("--commit", help="of that checkout")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=16)
    given = parser.parse_args(arguments)
    target = Path(given.target)
    held = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
    result = measure(
        length=given.length, steps=given.steps, rounds=given.rounds, kvpress=given.kvpress, commit=given.commit,
        progress=lambda line: print(line, file=sys.stderr),
    )  # fmt: skip
    if given.kvpress is None and "kvpress" in held:
        result["kvpress"] = held["kvpress"]
    elif given.kvpress is not None:
        result = {
            **result,
            "records": [r for r in result["records"] if not r["contender"].startswith("kvpress")],
            "kvpress": {"settings": result["settings"], "machine": result["machine"], "records": result["records"]},
        }
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
