"""Techniques for models that exist: their constructors, ``attach`` and what it is given; models' settings."""

from __future__ import annotations

import functools
import importlib
import random
from typing import Any

import torch
from torch import Tensor

import attnlib
from attnlib import cache, reduce, steer
from attnlib.hooks import MaskByType, Record, TokenTypes, modality_mutual

from .engine import REFUSALS, Call, Either, deliberate, target

IMAGE = 62


@functools.cache
def helpers() -> Any:
    return importlib.import_module(f"{__package__.rpartition('.')[0]}.hooks.models".lstrip("."))


@functools.cache
def model() -> Any:
    return helpers().language_model(num_hidden_layers=2)


def inputs(rng: random.Random) -> dict[str, Tensor]:
    out = helpers().prompt(2, 8, (2, 0), seed=rng.randrange(99))
    out["input_ids"][:, 3:5] = IMAGE
    return out


#: constructor and valid settings; numbers and words are spoilt, tensors and functions only replaced by junk
MAKE: dict[str, tuple[Any, dict[str, Any]]] = {
    "Record": (Record, dict(layers=[0], rows="last", what=("weights", "entropy"), heads=None)),
    "KVCompression": (
        cache.KVCompression,
        dict(scorer=Either(cache.KeyNorm()), budget=Either(cache.Cap(5)), layers=None),
    ),
    "SnapKV": (cache.SnapKV, dict(ratio=None, cap=6, window_size=2, kernel_size=3)),
    "Cap": (cache.Cap, dict(cap=5)),
    "Ratio": (cache.Ratio, dict(ratio=0.5)),
    "Recency": (cache.Recency, dict()),
    "KeyNorm": (cache.KeyNorm, dict()),
    "ExpectedAttention": (cache.ExpectedAttention, dict()),
    "SnapKVVotes": (cache.SnapKVVotes, dict()),
    "HeadScale": (steer.HeadScale, dict(factors=Either({1: [0.5, 1, 2, 1]}), layers=None)),
    "SinkCalibration": (steer.SinkCalibration, dict(heads=Either({1: [0, 3]}), beta=0.4)),
    "HeadReinforcement": (steer.HeadReinforcement, dict(alpha=2.0, layers=[1])),
    "DualAttention": (steer.DualAttention, dict(image_mask="full", layers=None)),
    "VisualBoost": (steer.VisualBoost, dict(alpha=0.7, beta=0.3)),
    "DAMRO": (steer.DAMRO, dict(alpha=1.0, k=3)),
    "ContrastiveDecoding": (steer.ContrastiveDecoding, dict(branch=Either(steer.NoImage()), a=1.5, b=-0.5, cutoff=0.1)),
    "VisualRedistribution": (steer.VisualRedistribution, dict(sink_dims=(3, 17), p=0.6)),
    "SoftPAG": (steer.SoftPAG, dict(strength=1.0)),
    "VMTC": (reduce.VMTC, dict(keep=4, merge=2)),
    "CMAI": (reduce.CMAI, dict(threshold=0.2)),
    "DyVTE": (reduce.DyVTE, dict(exit_layer=1)),
    "ReduceByAttention": (reduce.ReduceByAttention, dict(keep=Either({1: 1}))),
    "MaskByType": (MaskByType, dict(rule=Either(modality_mutual()), layers=None)),
    "TokenTypes": (TokenTypes, dict(image=Either(IMAGE), pad=None)),
}


@target("techniques.init", weight=5)
def init(rng: random.Random) -> Call:
    name = rng.choice(list(MAKE))
    make, settings = MAKE[name]

    def sane(made: Any, given: dict[str, Any]) -> None:
        if not isinstance(made, attnlib.hooks.Intervention) or made.needs_types or name in ("SoftPAG", "DAMRO"):
            return
        try:
            with attnlib.attach(model(), made, token_types=TokenTypes(IMAGE)) as session, torch.no_grad():
                out = model()(**inputs(rng), use_cache=True).logits
                session.results  # noqa: B018
        except REFUSALS as error:
            if deliberate(error):
                return
            raise
        assert bool(torch.isfinite(out).all()), "the logits are not finite"

    return Call(make, dict(settings), sane=sane, names=("layers", "heads", "rate", "k"))


@target("techniques.attach", weight=5)
def attach(rng: random.Random) -> Call:
    given = inputs(rng)
    rows = rng.choice([None, ("cond", "uncond")])
    types = rng.choice([None, TokenTypes(IMAGE), (given["input_ids"] == IMAGE).long()])
    layers = rng.choice([None, [0], [-1], [0, 1]])
    heads = rng.choice([None, [0, 3]])
    kind = rng.choice(["record", "scale", "compress"])

    def run(layers: Any, heads: Any, rows: Any, token_types: Any, part: Any) -> Any:
        made: Any = {
            "record": lambda: Record(layers=layers, heads=heads),
            "scale": lambda: steer.HeadScale([1.0, 0.5, 1.0, 2.0], layers=layers),
            "compress": lambda: cache.SnapKV(cap=6, window_size=2, kernel_size=3),
        }[kind]()
        with attnlib.attach(model(), made, rows=rows, token_types=token_types, part=part) as session:
            with torch.no_grad():
                out = model()(**given, use_cache=True).logits
            session.results  # noqa: B018
        return out

    def oracle(layers: Any, heads: Any, rows: Any, token_types: Any, part: Any) -> Any:
        assert rows is None or len(rows) == 2
        assert part is None or part in dict(model().named_modules())
        if isinstance(token_types, Tensor):
            # Those of a prompt of which this call reads a part may be longer.
            assert len(token_types) == 2 and token_types.shape[1] >= 8 and int(token_types.min()) >= 0
        if kind == "scale":
            return run(layers, heads, None, None, None)
        with torch.no_grad():
            return model()(**given).logits

    kwargs = dict(layers=layers, heads=heads, rows=rows, token_types=types, part=rng.choice([None, "model"]))
    if not isinstance(types, Tensor) and types is not None:
        kwargs["token_types"] = Either(types)
    fixed = {"record": (), "scale": ("heads",), "compress": ("heads", "layers")}[kind]
    return Call(
        run, kwargs, oracle, names=("layers", "heads", "rows", "token_types", "part", "layer", "head"), fixed=fixed,
        tolerance=1e-4,
    )  # fmt: skip


def _decoder(**settings: Any) -> Tensor:
    from attnlib.models.language import DecoderConfig, DecoderForCausalLM

    with torch.no_grad():
        return DecoderForCausalLM(DecoderConfig(**settings)).eval()(torch.arange(6)[None] + 3).logits


def _illama(**settings: Any) -> Tensor:
    from attnlib.models.illama import ILlama

    with torch.no_grad():
        return ILlama(**settings).eval()(torch.randn(1, 16, 16, 3))


def _pointer(**settings: Any) -> Tensor:
    from attnlib.models.pointer import PointerNetwork

    return PointerNetwork(**settings).state_dict()["start"]


@target("models.init", weight=3)
def models(rng: random.Random) -> Call:
    run, settings = rng.choice(
        [
            (
                _decoder,
                dict(
                    mechanisms=[rng.choice(["softmax-attention", "lightning-attention-2"])], num_attention_heads=2,
                    vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                ),
            ),
            (
                _illama,
                dict(img_size=16, patch_size=8, in_chans=3, num_classes=5, dim=16, depth=1, num_heads=2, mlp_ratio=2.0),
            ),
            (_pointer, dict(input_dim=2, hidden=4, stop=False)),
        ]
    )  # fmt: skip

    def sane(out: Tensor, given: dict[str, Any]) -> None:
        assert bool(torch.isfinite(out).all()), "what the model gives is not finite"

    # A config of transformers keeps settings that it does not know; a picture has the size of the model.
    return Call(
        run,
        settings,
        sane=sane,
        names=("num_heads", "mechanism"),
        allows=("an unknown argument",),
        fixed=("img_size", "in_chans"),
    )
