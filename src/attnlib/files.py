"""Files of weights as people have them: what is read of a checkpoint, and what a file is that cannot be read.

No code of a checkpoint runs. Objects of other classes than tensors and plain values (the settings of a training, its
scheduler, a whole module) are read as what they hold, so that they do not stand in the way of the tensors beside them.
"""

from __future__ import annotations

import io
import pickle
import types
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

#: Where training scripts keep weights; averaged ones come first.
PLACES = (
    "state_dict_ema", "model_ema", "ema_state_dict", "params_ema", "ema", "state_dict", "model", "model_state_dict",
    "model_state", "params", "net", "network", "weights",
)  # fmt: skip

_TORCH = "Size device Tensor strided sparse_coo sparse_csr per_tensor_affine".split()
_DTYPES = [name for name in vars(torch) if isinstance(getattr(torch, name), torch.dtype)]
_REBUILD = "_rebuild_tensor _rebuild_tensor_v2 _rebuild_parameter _rebuild_parameter_with_state".split()
#: What may be made while a checkpoint is read.
_KNOWN = {
    *(("torch", name) for name in (*_TORCH, *_DTYPES)),
    *(("torch._utils", name) for name in _REBUILD),
    ("torch._tensor", "_rebuild_from_type_v2"), ("torch.nn.parameter", "Parameter"), ("torch.nn.parameter", "Buffer"),
    ("collections", "OrderedDict"), ("_codecs", "encode"), ("numpy", "ndarray"), ("numpy", "dtype"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *(("builtins", name) for name in "set frozenset bytearray complex slice list dict tuple".split()),
    *(("builtins", name) for name in "int float bool str".split()),
}  # fmt: skip


class Opaque:
    """Stands for an object of a class that is not made: it keeps the values of the object and does nothing."""

    dump_patches = False

    def __new__(cls, *args: Any, **kwargs: Any) -> Opaque:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, Mapping):
                self.__dict__.update({key: value for key, value in part.items() if isinstance(key, str)})

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...

    def add(self, value: Any) -> None: ...


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module  # of protocol 2
        if (module, name) in _KNOWN:
            return super().find_class(module, name)
        return type(name, (Opaque,), {"__module__": module})


def _load(file: Any, **kwargs: Any) -> Any:
    return _Unpickler(file, **kwargs).load()


_PICKLE: Any = types.ModuleType("attnlib.files.pickle")
_PICKLE.__dict__.update(vars(pickle), Unpickler=_Unpickler, load=_load, loads=lambda b, **k: _load(io.BytesIO(b), **k))


def read_file(path: str | Path, argument: str = "path") -> Any:
    """What a file of tensors holds: ``.safetensors``, or anything that ``torch.save`` wrote.

    Args:
        path: of the file; ``~`` is the home.
        argument: whose value the path is, for errors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, one that is cut short, or a pointer to one.
    """
    place = Path(path).expanduser()
    if not place.is_file():
        kind = " but a folder: name a file in it" if place.is_dir() else ""
        raise FileNotFoundError(f"{argument}={str(path)!r} is no file{kind}")
    try:
        if place.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(place)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of modules whose source is not at hand, and of TorchScript
            try:
                return torch.load(place, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError:
                return torch.load(place, map_location="cpu", weights_only=False, pickle_module=_PICKLE)
    except Exception as error:
        why = _trouble(place, error)
        raise ValueError(f"{argument}={str(path)!r} cannot be read as tensors: {why}") from error


def _trouble(path: Path, error: Exception) -> str:
    """What a file is that is no checkpoint."""
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, not the file itself; `git lfs pull` fetches that"
    if start.lstrip()[:1] == b"<":
        return "it is a page of the web, not the file that was to be downloaded"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith(".npy") for name in names):
            return "it is an archive of numpy"
        if any(name.endswith("constants.pkl") for name in names):
            return "it is a TorchScript archive; save the state_dict() of the module that torch.jit.load gives"
        if not any(name.endswith("data.pkl") for name in names):
            return "it is an archive that torch.save did not write"
    elif start.startswith(b"PK"):
        return "it is cut short"
    about = str(error).strip().partition("\n")[0] or type(error).__name__
    kinds = "a file of torch.save or .safetensors was expected"
    return f"it is cut short, or of another kind ({kinds}): {about[:160]}"


def _state_of(module: Any) -> dict[str, Tensor]:
    """The state dict of a module that was read without its class."""
    held = vars(module)
    found: dict[str, Tensor] = {}
    beside = held.get("_non_persistent_buffers_set", ())
    for group, left in (("_parameters", ()), ("_buffers", beside)):
        found |= {name: t for name, t in held[group].items() if isinstance(t, Tensor) and name not in left}
    for name, part in held["_modules"].items():
        if part is not None:
            found |= {f"{name}.{key}": value for key, value in _state_of(part).items()}
    return found


def _tensors(held: Any) -> dict[str, Tensor] | None:
    """``held`` as a state dict, where it is one or a module."""
    if isinstance(held, nn.Module):
        return dict(held.state_dict())
    if isinstance(held, Opaque) and {"_parameters", "_buffers", "_modules"} <= vars(held).keys():
        return _state_of(held)
    if not isinstance(held, Mapping) or not held or not all(isinstance(key, str) for key in held):
        return None
    if not all(isinstance(value, (Tensor, np.ndarray)) for value in held.values()):
        return None
    return {key: value if isinstance(value, Tensor) else torch.from_numpy(value) for key, value in held.items()}


def _found(held: Any, source: str) -> dict[str, Tensor] | None:
    if (whole := _tensors(held)) is not None or not isinstance(held, Mapping):
        return whole
    for key in PLACES:
        if (named := _found(held.get(key), source)) is not None:
            return named
    states = {key: state for key, value in held.items() if (state := _tensors(value)) is not None}
    if len(states) > 1:
        raise ValueError(
            f"{source} holds several state dicts, {', '.join(map(repr, states))}, and none by a usual name; hand one "
            "of them to load_pretrained"
        )
    return next(iter(states.values()), None)


def state_dict_in(held: Any, source: str = "checkpoint") -> dict[str, Tensor]:
    """The state dict within what a file holds: itself, one of :data:`PLACES`, or the only one there is.

    Args:
        held: a state dict, a training checkpoint with one, or a module.
        source: what holds it, for errors.

    Raises:
        ValueError: there is none, or there are several of which nothing says which one is meant.

    >>> state_dict_in({"epoch": 3, "model": {"weight": torch.ones(2)}})
    {'weight': tensor([1., 1.])}
    """
    found = _found(held, source)
    if found is None:
        what = f"its entries are {', '.join(map(repr, list(held)[:6]))}" if isinstance(held, Mapping) and held else (
            f"it is {type(held).__name__}"
        )  # fmt: skip
        raise ValueError(f"{source} holds no state dict: a mapping from names to tensors was expected; {what}")
    return found


__all__ = ["PLACES", "Opaque", "read_file", "state_dict_in"]
