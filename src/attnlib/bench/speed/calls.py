"""Small calls, mostly what stands around the arithmetic: the rows of :mod:`attnlib.bench.speed.revisions`.

A script of its own, ``python calls.py``, that knows nothing but the public interface, so that it runs beside any source
tree: it answers one line of JSON on its input by one on its output.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

import attnlib

Run = Callable[[], Any]

CONTEXT = 64  # tokens that a decoding step remembers


def _module(slug: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    return attnlib.create(slug, **settings).eval()


def _step(slug: str, dim: int = 256, **settings: Any) -> Run:
    """One token after :data:`CONTEXT` others, always the same one."""
    module = _module(slug, dim=dim, **settings)
    x, token = torch.randn(1, CONTEXT, dim), torch.randn(1, 1, dim)
    with torch.no_grad():
        _, state = module.step(x)

    def run() -> None:
        with torch.no_grad():
            module.step(token, state)

    return run


def _forward(slug: str, shape: tuple[int, ...], dim: int, mask: Any = None, **settings: Any) -> Run:
    module = _module(slug, dim=dim, **settings)
    x, more = torch.randn(1, *shape, dim), {} if mask is None else {"mask": mask}

    def run() -> None:
        with torch.no_grad():
            module(x, **more)

    return run


def _training(slug: str, grid: tuple[int, ...], dim: int, **settings: Any) -> Run:
    module = _module(slug, dim=dim, **settings).train()
    x = torch.randn(1, *grid, dim)
    return lambda: module(x).sum().backward()


def _operator(name: str, *args: Any, heads: int = 4, n: int = 64, width: int = 32, **options: Any) -> Run:
    q, k, v = torch.randn(3, 1, heads, n, width)
    function = getattr(attnlib.ops, name)

    def run() -> None:
        with torch.no_grad():
            function(q, k, v, *args, **options)

    return run


def _query() -> Run:
    q, k, v = torch.randn(1, 8, 1, 32), torch.randn(1, 8, CONTEXT, 32), torch.randn(1, 8, CONTEXT, 32)
    valid, at = torch.ones(1, CONTEXT, dtype=torch.bool), torch.tensor([CONTEXT - 1])

    def run() -> None:
        with torch.no_grad():
            attnlib.attention(q, k, v, mask=attnlib.masks.causal(), valid=valid, q_pos=at)

    return run


def _decoder(layers: list[int] | None, attached: bool) -> Run:
    """A decoding step of a small Llama model, untouched or with an intervention that does nothing."""
    import transformers

    from attnlib.hooks import Intervention

    class Idle(Intervention):
        name = "idle"

        def __init__(self) -> None:
            self.layers = layers

        def around_attention(self, site: Any, q: Any, k: Any, v: Any, call: Any) -> Any:
            return call(q, k, v)

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        cache = model(torch.randint(0, 128, (1, CONTEXT)), use_cache=True).past_key_values
    token = torch.randint(0, 128, (1, 1))
    if attached:
        attnlib.attach(model, Idle()).__enter__()  # for as long as the process lives

    def run() -> None:
        with torch.no_grad():
            model(token, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return run


_HEADS = {"num_heads": 8}
_CAUSAL = {"num_heads": 8, "causal": True}

#: Rows by name; each makes what is timed.
ROWS: dict[str, Callable[[], Run]] = {
    "step softmax-attention": partial(_step, "softmax-attention", **_CAUSAL),
    "step softmax-attention, rotary": partial(_step, "softmax-attention", rotary=10000.0, **_CAUSAL),
    "step softmax-attention, grouped": partial(_step, "softmax-attention", num_kv_heads=2, **_CAUSAL),
    "step sigmoid-attention": partial(_step, "sigmoid-attention", **_CAUSAL),
    "step diffqkv-sigma": partial(_step, "diffqkv-sigma", **_CAUSAL),
    "step lightning-attention-2": partial(_step, "lightning-attention-2", **_HEADS),
    "step lolcats": partial(_step, "lolcats", window_size=16, **_HEADS),
    "step nprf-rpe-fft-attention": partial(_step, "nprf-rpe-fft-attention", max_distance=128, **_CAUSAL),
}
for _n, _side in ((16, 4), (64, 8), (128, 0)):
    for _dim in (64, 256):
        _at = f"N={_n}, dim={_dim}"
        for _label, _slug, _more in (
            ("softmax-attention", "softmax-attention", _HEADS),
            ("softmax-attention, causal", "softmax-attention", _CAUSAL),
            ("sigmoid-attention", "sigmoid-attention", _HEADS),
            ("lightning-attention-2", "lightning-attention-2", _HEADS),
            ("lolcats", "lolcats", {"window_size": 16, **_HEADS}),
        ):
            ROWS[f"forward {_label}, {_at}"] = partial(_forward, _slug, (_n,), _dim, **_more)
        ROWS[f"forward softmax-attention, sliding window, {_at}"] = partial(
            _forward, "softmax-attention", (_n,), _dim, mask=attnlib.masks.sliding_window(8), **_HEADS
        )
        if _side:
            for _slug, _more in (
                ("fused-neighborhood-attention", {"kernel_size": 3, **_HEADS}),
                ("dinat", {"kernel_size": 3, **_HEADS}),
                ("maxvit", {"window_size": 4, **_HEADS}),
                ("biformer", {"n_win": 4, "topk": 2, **_HEADS}),
                ("agent-attention", {"num_agents": 4, "grid": _side, **_HEADS}),
                ("focalnet", {}),
                ("deformable-attention", _HEADS),
            ):
                ROWS[f"forward {_slug}, {_at}"] = partial(_forward, _slug, (_side, _side), _dim, **_more)
for _slug, _more in (("softmax-attention", _CAUSAL), ("lightning-attention-2", _HEADS)):
    ROWS[f"training {_slug}, N=64, dim=128"] = partial(_training, _slug, (64,), 128, **_more)
ROWS |= {
    "attention": partial(_operator, "attention"),
    "attention, causal": partial(_operator, "attention", mask=attnlib.masks.causal()),
    "attention, one query": _query,
    "attention, sliding window": partial(_operator, "attention", mask=attnlib.masks.sliding_window(8)),
    "attention, sliding window, tiled": partial(
        _operator, "attention", mask=attnlib.masks.sliding_window(8), backend="tiled"
    ),
    "attention, sigmoid": partial(_operator, "attention", normalizer="sigmoid"),
    "linear_attention": partial(_operator, "linear_attention"),
    "neighborhood_attention": partial(_operator, "neighborhood_attention", (8, 8), 3),
    "decoder step, untouched": partial(_decoder, None, False),
    "decoder step, idle hook in every layer": partial(_decoder, None, True),
    "decoder step, idle hook in one of eight layers": partial(_decoder, [0], True),
}


@contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def seconds(run: Run, calls: int, clock: str) -> float:
    """Of one call, the mean of ``calls`` in a row."""
    clocks = {"wall": time.perf_counter, "cpu": time.process_time}
    with _no_collection():
        start = clocks[clock]()
        for _ in range(calls):
            run()
        return (clocks[clock]() - start) / calls


def python_calls(run: Run) -> int:
    """Calls of Python and of C functions inside one call: what no other program on the machine disturbs."""
    count = 0

    def tell(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    run()
    sys.setprofile(tell)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def answer(asked: dict[str, Any], made: dict[str, Run]) -> Any:
    """What one line asks for: ``rows``, ``make`` a row, ``count`` its calls, or ``time`` it."""
    row = asked.get("row", "")
    if asked["ask"] == "rows":
        return {"rows": list(ROWS), "source": attnlib.__file__, "torch": torch.__version__}
    if asked["ask"] == "make":
        made.clear()
        made[row] = ROWS[row]()
        for _ in range(3):
            made[row]()
        return None
    if asked["ask"] == "count":
        return python_calls(made[row])
    return seconds(made[row], asked["calls"], asked["clock"])


def serve() -> None:
    """Answer until the input ends."""
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    made: dict[str, Run] = {}
    out = sys.stdout
    sys.stdout = sys.stderr  # what others print is no answer
    for line in sys.stdin:
        try:
            reply = {"is": answer(json.loads(line), made)}
        except Exception as error:  # a row that this tree does not know
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=out, flush=True)


if __name__ == "__main__":
    serve()
