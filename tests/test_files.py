"""Checkpoints as people have them: whatever stands beside the tensors, and files that are none."""

import argparse
import math
import os
import pathlib
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

import attnlib
from attnlib.files import read_file, state_dict_in
from attnlib.models.build import load_pretrained
from attnlib.nn.released import unwrapped

TINY = {"depths": (1, 1, 1, 1), "embed_dim": 8, "num_heads": (1, 2, 4, 8), "num_classes": 5}


def model(**settings):
    torch.manual_seed(settings.pop("seed", 0))
    return attnlib.create_model("nat_mini", **{**TINY, **settings}).eval()


def named(prefix, state):
    return {prefix + key: value for key, value in state.items()}


class Options(dict):
    """Settings as config packages pickle them: a dictionary with attributes."""


class Evil:
    """Runs what it likes when a pickle of it is read."""

    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL"],)


SAVED = {
    "bare": lambda m, sd: sd,
    "ordered": lambda m, sd: OrderedDict(sd),
    "parameters": lambda m, sd: {k: nn.Parameter(v) for k, v in sd.items()},
    "numpy": lambda m, sd: {k: v.numpy() for k, v in sd.items()},
    "numpy inside": lambda m, sd: {"model": {k: v.numpy() for k, v in sd.items()}, "epoch": 3},
    "namespace": lambda m, sd: {"model": sd, "optimizer": {}, "args": argparse.Namespace(lr=0.1, d={"a": 1})},
    "numpy's numbers": lambda m, sd: {"state_dict": sd, "best": np.float64(0.5), "epoch": np.int64(3)},
    "paths": lambda m, sd: {"state_dict": sd, "out": pathlib.Path("run")},
    "settings": lambda m, sd: {"state_dict": sd, "config": Options(lr=0.1, betas=Options(a=1))},
    "function": lambda m, sd: {"state_dict": sd, "act": torch.nn.functional.gelu},
    "scheduler": lambda m, sd: {"state_dict": sd, "s": LambdaLR(SGD(m.parameters(), 0.1), math.fabs)},
    "module": lambda m, sd: m,
    "module inside": lambda m, sd: {"model": m, "epoch": 3},
    "averaged module first": lambda m, sd: {"model": model(seed=1), "ema": m},
    "averaged first": lambda m, sd: {"model": {k: 0 * v for k, v in sd.items()}, "model_ema": sd},
    "no average yet": lambda m, sd: {"model_ema": None, "ema": None, "model": sd},
    "ema_state_dict": lambda m, sd: {"ema_state_dict": sd, "scaler": {"scale": torch.ones(())}},
    "net": lambda m, sd: {"net": sd, "epoch": 3},
    "a name of its own": lambda m, sd: {"my_weights": sd, "optimizer": {"state": {}}},
    "two deep": lambda m, sd: {"model": {"state_dict": sd, "config": {}}, "scaler": {"scale": torch.ones(())}},
    "compiled in parallel": lambda m, sd: {"state_dict": named("_orig_mod.module.", sd)},
    "lightning": lambda m, sd: {"state_dict": named("model.", sd), "hyper_parameters": Options(a=1), "loops": {}},
    "beside a loss": lambda m, sd: {"state_dict": {**named("model.", sd), "criterion.weight": torch.ones(5)}},
    "mean of models": lambda m, sd: torch.optim.swa_utils.AveragedModel(m).state_dict(),
    "counted by thop": lambda m, sd: {**sd, "total_ops": torch.ones(1), "levels.0.total_params": torch.ones(1)},
    "half": lambda m, sd: {k: v.half() for k, v in sd.items()},
}  # fmt: skip


@pytest.mark.parametrize(
    "kind, legacy", [*((kind, False) for kind in SAVED), *((kind, True) for kind in ("bare", "namespace", "numpy"))]
)
def test_weights_are_found_in_what_people_save(kind, legacy, tmp_path):
    m = model()
    torch.save(SAVED[kind](m, m.state_dict()), path := tmp_path / "c.pth", _use_new_zipfile_serialization=not legacy)
    again = model(pretrained=path, seed=2).state_dict()
    for name, value in m.state_dict().items():
        torch.testing.assert_close(again[name], value, atol=2e-3 if kind == "half" else 0, rtol=0)


def test_no_code_of_a_checkpoint_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("EVIL", str(tmp_path / "ran"))
    m = model()
    torch.save({"model": m.state_dict(), "args": Evil()}, path := tmp_path / "c.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    model(pretrained=path)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()


def test_modules_keep_out_of_a_state_what_is_not_saved(tmp_path):
    m = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    m[0].register_buffer("beside", torch.ones(2), persistent=False)
    torch.save(m, path := tmp_path / "c.pth")
    found = state_dict_in(read_file(path))
    assert found.keys() == m.state_dict().keys() and all(found[k].equal(v) for k, v in m.state_dict().items())


def test_norms_of_old_files_count_no_batches():
    m = attnlib.create_model("efficientvit_m0", num_classes=5)
    state = {k: v for k, v in m.state_dict().items() if not k.endswith("num_batches_tracked")}
    done = load_pretrained(m, state)
    assert done.uncounted and all(name.endswith("num_batches_tracked") for name in done.uncounted)
    first = done.uncounted[0]
    with pytest.raises(ValueError, match=f"missing: {first}"):
        load_pretrained(m, {**state, **{k: torch.tensor(3) for k in done.uncounted[1:]}})


def test_what_stands_beside_a_model_is_told():
    m = model()
    done = load_pretrained(m, {**named("model.", m.state_dict()), "criterion.weight": torch.ones(5)})
    assert done.beside == ["criterion.weight"]


def test_a_model_without_storage_gets_that_of_the_file(tmp_path, recwarn):
    m, x = model(), torch.randn(1, 3, 32, 32)
    torch.save({k: v.double() for k, v in m.state_dict().items()}, path := tmp_path / "c.pth")
    with torch.device("meta"):
        again = model(pretrained=path)
    torch.testing.assert_close(again(x), m(x))
    assert not [w for w in recwarn if "meta" in str(w.message)]


def test_a_path_may_start_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(model().state_dict(), tmp_path / "c.pth")
    model(pretrained="~/c.pth")


def written(kind, path):
    state = model().state_dict()
    if kind == "cut":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:-5000])
    elif kind == "numpy":
        with path.open("wb") as file:
            np.savez(file, **{k: v.numpy() for k, v in state.items()})
    elif kind == "script":
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), path)
    else:
        path.write_bytes(kind)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "kind, suffix, says",
    [
        (b"", "pth", "it is empty"),
        (b"", "safetensors", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "safetensors", "pointer of Git LFS"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "pth", "pointer of Git LFS"),
        (b"<!DOCTYPE html><html>Quota exceeded</html>", "pth", "page of the web"),
        (b"not a checkpoint", "bin", "cut short, or of another kind"),
        (b"not a checkpoint at all, for sure", "safetensors", "cut short, or of another kind"),
        (pickle.dumps({"a": 1}), "pkl", "cut short, or of another kind"),
        ("cut", "pth", "cut short"),
        ("numpy", "npz", "archive of numpy"),
        ("script", "pt", "TorchScript archive"),
    ],
)
def test_what_is_no_checkpoint_is_told_by_its_kind(kind, suffix, says, tmp_path):
    path = tmp_path / f"c.{suffix}"
    written(kind, path)
    with pytest.raises(ValueError, match=rf"pretrained='.*c\.{suffix}' cannot be read as tensors: .*{says}"):
        model(pretrained=path)


def test_what_holds_no_weights_or_too_many_is_told(tmp_path):
    m = model()
    with pytest.raises(FileNotFoundError, match="no file but a folder"):
        model(pretrained=tmp_path)
    state = m.state_dict()
    for held, says in (
        ({"student": state, "teacher": state}, "several state dicts, 'student', 'teacher'"),
        ({"epoch": 3, "loss": [1.0]}, "its entries are 'epoch', 'loss'"),
        ({}, "it is dict"),
        ([1], "it is list"),
    ):
        torch.save(held, path := tmp_path / "c.pth")
        with pytest.raises(ValueError, match=says):
            model(pretrained=path)
    with pytest.raises(TypeError, match="load_pretrained"):
        model(pretrained=state)
    with pytest.raises(TypeError, match="source must be"):
        load_pretrained(m, m)
    with pytest.raises(ValueError, match="num_classes=0"):
        load_pretrained(m, {k: v for k, v in state.items() if not k.startswith("head.")})
    with pytest.raises(ValueError, match="left over: mine"):
        load_pretrained(m, {**state, "mine": torch.ones(1)})


def test_counts_of_tools_are_no_entries():
    assert unwrapped({"module.a": 1, "n_averaged": 2, "module.b.total_ops": 3}) == {"a": 1}
