"""Calls of converters of released weights, on recorded state dicts, whole and broken."""

from __future__ import annotations

import functools
import importlib
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attnlib

from .engine import REFUSALS, Call, deliberate, family, target
from .mutate import Junk


@functools.cache
def released() -> Any:
    """The table of recorded state dicts that the tests of converters have."""
    tests = str(Path(__file__).parents[1])
    if tests not in sys.path:
        sys.path.append(tests)
    return importlib.import_module("nn.test_released" if __package__ == "fuzz" else "tests.nn.test_released")


def _rotten(t: Tensor, rng: random.Random) -> tuple[str, Any]:
    """One entry, spoilt so that no module can hold it."""
    kinds: dict[str, Callable[[], Any]] = {
        "a row more": lambda: torch.cat([t, t[:1]]), "an axis more": lambda: t[None, None],
        "a number": lambda: 1.0, "a list": t.tolist, "None": lambda: None, "junk": Junk, "empty": lambda: t[:0],
        "a string": lambda: "weight", "a dictionary": lambda: {"weight": t}, "numpy": lambda: t.numpy(),
    }  # fmt: skip
    if t.dim() > 1:
        kinds |= {"flat": t.flatten, "a column more": lambda: torch.cat([t, t[:, :1]], 1)}
        kinds |= {"an axis less": lambda: t[..., 0]}
    if not t.dim():
        kinds = {k: v for k, v in kinds.items() if k not in ("a row more", "empty")}
    name = rng.choice(list(kinds))
    return name, kinds[name]()


def _broken(theirs: dict[str, Any], rng: random.Random) -> tuple[str, Any, str]:
    """``(what, broken state dict, the entry that is concerned)``."""
    key = rng.choice(list(theirs))
    what = rng.choice(["spoilt", "spoilt", "spoilt", "dropped", "unknown", "moved", "twice", "other", "whole"])
    rest = {k: v for k, v in theirs.items() if k != key}
    if what == "spoilt":
        how, value = _rotten(theirs[key], rng)
        return f"{key}: {how}", {**theirs, key: value}, key
    if what == "dropped":
        return f"without {key}", rest, key
    if what == "unknown":
        return "an unknown entry", {**theirs, "surprise.weight": torch.zeros(2)}, ""
    if what == "moved":
        return f"{key} under another name", {**rest, f"{key}_": theirs[key]}, key
    if what == "twice":
        return f"{key} twice", {**theirs, f"deeper.{key}": theirs[key]}, ""
    if what == "other":
        return "numbers for names", dict(enumerate(theirs.values())), ""
    return rng.choice(
        [("empty", {}, ""), ("nested", {"state_dict": theirs}, ""), ("a list", list(theirs.items()), ""),
         ("None", None, ""), ("a string", "weights.pt", ""), ("keys", list(theirs), ""), ("junk", Junk(), "")]
    )  # fmt: skip


@target("nn.convert.released", weight=3)
def convert(rng: random.Random) -> Call:
    table = released()
    row = rng.choice(list(table.ROWS))
    make, theirs, build = table.ROWS[row]
    what, given, key = ("valid", dict(theirs), "") if rng.random() < 0.2 else _broken(dict(theirs), rng)

    def run(state_dict: Any) -> Tensor:
        try:
            ours = make(state_dict)
        except REFUSALS as error:
            if not deliberate(error):
                raise RuntimeError(f"inside, {type(error).__name__}: {error}") from error
            if what == "valid":
                raise
            text = str(error)
            words = {"state_dict", "state dict", "entr", key or "state_dict", key.rpartition(".")[0] or "state_dict"}
            if not any(w in text for w in words):
                raise RuntimeError(f"{what}: a refusal that names nothing: {text}") from error
            return torch.zeros(1)
        try:
            build().load_state_dict(ours)
        except (RuntimeError, TypeError) as error:  # what torch says of entries that the module does not have
            if "loading state_dict" not in str(error) or what == "valid":
                raise
            return torch.zeros(1)
        unused = bool(key) and table.constant(key) or table._left_out(row, key)
        left_out = row.startswith(("maxvit", "p-adapter")) and unused or bool(key) and table.constant(key)
        if what != "valid" and not (key and left_out):
            right = make(theirs)
            # Another shape of the same numbers may mean the same.
            same = key in given and set(right) == set(ours) and all(torch.equal(right[k], v) for k, v in ours.items())
            if not same:
                raise RuntimeError(f"{what}: is loaded")
        return torch.zeros(1)

    return Call(run, dict(state_dict=given), fixed=("state_dict",), label=f"{row}: {what}")


@family("nn.convert")
def by_name(rng: random.Random) -> Call:
    """Of a layer inside a whole model, by a name and a prefix."""
    mha = torch.nn.MultiheadAttention(8, 2).state_dict()
    whole = {f"blocks.{i}.attn.{k}": v for i in range(2) for k, v in mha.items()}

    def run(name: Any, prefix: Any) -> Any:
        return attnlib.convert_state_dict(name, whole, prefix=prefix)["proj.bias"]

    def oracle(name: Any, prefix: Any) -> Any:
        assert name == "softmax-attention" and prefix.rstrip(".") == "blocks.1.attn"
        return mha["out_proj.bias"]

    return Call(
        run, dict(name="softmax-attention", prefix=rng.choice(["blocks.1.attn", "blocks.1.attn."])), oracle,
        names=("mechanism", "state_dict"),
    )  # fmt: skip


@family("nn.convert")
def options(rng: random.Random) -> Call:
    table = released()
    rows = [row for row, (make, *_) in table.ROWS.items() if getattr(make, "keywords", None) and make.args]
    row = rng.choice(rows)
    make, theirs, _ = table.ROWS[row]

    def run(**given: Any) -> Tensor:
        out = attnlib.convert_state_dict(make.args[0], theirs, **given)
        assert all(isinstance(v, Tensor) for v in out.values())
        return torch.zeros(1)

    return Call(run, dict(make.keywords), names=("state_dict", "num_kv_heads"), label=row)
