"""Weights out of an ONNX file, without a runtime: a reader of what a graph holds, and DINOv2 from such a graph.

An ONNX file is a protocol buffer: fields of a number and a kind, nested by length. Only what names a weight is read:
the initialisers of the graph and, of each node, its name and inputs, because an exporter folds the transposed weight of
a linear layer into an initialiser without a name that says whose it is, while the node that multiplies by it is called
after its module.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..extras import need

_TYPES = {1: torch.float32, 7: torch.int64, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16}


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """``(number, value)``: whole numbers, or the bytes of what is nested."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of kind {kind}")
        if at + size > len(data):
            raise IndexError
        yield number, data[at : at + size]
        at += size


def _text(value: memoryview) -> str:
    return bytes(value).decode()


def _tensor(data: memoryview) -> tuple[str, Tensor | None]:
    """Name and value; ``None`` for a type that no weight has, or numbers that stand elsewhere."""
    name, dims, kind, raw = "", [], 0, None
    for number, value in _fields(data):
        if number == 1 and isinstance(value, int):
            dims.append(value)
        elif number == 1:
            at = 0
            while at < len(value):
                size, at = _varint(value, at)
                dims.append(size)
        elif number == 2:
            kind = value
        elif number == 8:
            name = _text(value)
        elif number in (4, 9):
            raw = value
    if kind not in _TYPES or raw is None:
        return name, None
    dtype = _TYPES[kind]
    if len(raw) != math.prod(dims) * dtype.itemsize:
        raise ValueError(f"the tensor {name!r} of shape {dims} has {len(raw)} bytes")
    return name, torch.frombuffer(bytearray(raw), dtype=dtype).view(dims)


def read(path: Path | str) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Initialisers by name, and the inputs of each node by the node's name.

    Raises:
        ValueError: not an ONNX file, or not the whole of it.
    """
    tensors: dict[str, Tensor] = {}
    nodes: dict[str, list[str]] = {}
    try:
        graphs = [value for number, value in _fields(memoryview(Path(path).read_bytes())) if number == 7]
        for number, value in (pair for graph in graphs for pair in _fields(graph)):
            if number == 5:
                name, tensor = _tensor(value)
                if tensor is not None:
                    tensors[name] = tensor
            elif number == 1:
                inner = list(_fields(value))
                called = next((_text(v) for n, v in inner if n == 3), "")
                nodes[called] = [_text(v) for n, v in inner if n == 1]
    except (IndexError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is no ONNX file, or not the whole of it ({error or 'it ends too early'})") from error
    if not tensors:
        raise ValueError(f"{path} is no ONNX file with weights in it")
    return tensors, nodes


def dinov2_weights(path: Path | str, prefix: str = "backbone") -> dict[str, Tensor]:
    """The state dict of transformers' ``Dinov2Model`` under ``prefix`` of an exported graph, without what follows it.

    Raises:
        ValueError: the graph holds no such model.
    """
    tensors, nodes = read(path)
    found = {name[len(prefix) + 1 :]: t for name, t in tensors.items() if name.startswith(f"{prefix}.")}
    for name, inputs in nodes.items():
        if name.startswith(f"/{prefix}/encoder/") and name.endswith("/MatMul") and inputs[-1] in tensors:
            module = name[len(prefix) + 2 : -len("/MatMul")].replace("/", ".")
            found[f"{module}.weight"] = tensors[inputs[-1]].t().contiguous()
    try:
        first = tensors[nodes[f"/{prefix}/embeddings/Concat_6"][0]]
        others = tensors[nodes[f"/{prefix}/embeddings/Reshape_1"][0]]
        found["embeddings.position_embeddings"] = torch.cat([first, others], 1)
        width = found["embeddings.cls_token"].shape[-1]
    except KeyError as error:
        raise ValueError(f"{path} holds no DINOv2 under {prefix!r}: {error.args[0]} is missing") from error
    found["embeddings.mask_token"] = torch.zeros(1, width)  # of pretraining only
    return found


def load_dinov2(path: Path | str, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[Any, Any]:
    """``(Dinov2Model, image processor)`` from an exported graph; sizes are read off the weights, heads are 64 wide."""
    transformers: Any = need("transformers", "a model in an ONNX file")
    weights = dinov2_weights(path)
    width, _, patch, _ = weights["embeddings.patch_embeddings.projection.weight"].shape
    side = math.isqrt(weights["embeddings.position_embeddings"].shape[1] - 1)
    layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layer."))
    inner = weights["encoder.layer.0.mlp.fc1.weight"].shape[0]
    config = transformers.Dinov2Config(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=max(width // 64, 1),
        mlp_ratio=inner // width, patch_size=patch, image_size=side * patch,
    )  # fmt: skip
    # Through from_pretrained: names of parameters differ between releases, and it knows how.
    model, notes = transformers.Dinov2Model.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True, **settings
    )
    wrong = {what: sorted(notes[what]) for what in ("missing_keys", "unexpected_keys") if notes.get(what)}
    if wrong:
        raise ValueError(f"{path} does not hold the weights of a Dinov2Model: {wrong}")
    plain = getattr(transformers, "BitImageProcessorPil", None) or transformers.BitImageProcessor
    processor = plain(
        do_resize=True, size={"shortest_edge": 256}, resample=3, do_center_crop=True,
        crop_size={"height": 224, "width": 224}, do_rescale=True, do_normalize=True, do_convert_rgb=True,
        image_mean=(0.485, 0.456, 0.406), image_std=(0.229, 0.224, 0.225),
    )  # fmt: skip
    return model.eval(), processor
