"""Weights out of an ONNX file: a small file written here, and DINOv2's held to its graph's recorded output."""

import pytest
import torch
from safetensors.torch import load_file

from attnlib.bench import models
from attnlib.bench.onnx import dinov2_weights, load_dinov2, read
from tests.parity import HERE


def varint(n):
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def initialiser(name, t, packed=False):
    dims = field(1, b"".join(map(varint, t.shape))) if packed else b"".join(field(1, n) for n in t.shape)
    return field(5, dims + field(2, 1) + field(8, name) + field(9, t.float().contiguous().numpy().tobytes()))


def node(name, *inputs):
    return field(1, b"".join(field(1, i) for i in inputs) + field(2, "out") + field(3, name) + field(4, "Any"))


def onnx_file(path, *parts):
    path.write_bytes(field(1, 7) + field(2, "pytorch") + field(7, b"".join(parts)))
    return path


@pytest.fixture
def tiny(tmp_path):
    """A DINOv2 of a few numbers as its exporter writes it, and the same model."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=1, mlp_ratio=2, image_size=28, patch_size=14
    )
    model = transformers.Dinov2Model(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) / 8)
    parts = []
    names = {"attention.q_proj": "attention.attention.query", "attention.k_proj": "attention.attention.key",
             "attention.v_proj": "attention.attention.value", "attention.o_proj": "attention.output.dense"}  # fmt: skip
    for i, (name, p) in enumerate(model.state_dict().items()):
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if "mask_token" in name:
            continue
        if "position" in name:
            parts += [initialiser("onnx::Concat_1", p[:, :1]), initialiser("onnx::Reshape_2", p[:, 1:], packed=True)]
            parts += [node("/backbone/embeddings/Reshape_1", "onnx::Reshape_2", "shape")]
            parts += [node("/backbone/embeddings/Concat_6", "onnx::Concat_1", "grid")]
        elif p.dim() == 2 and name.startswith("encoder."):
            _, _, layer, rest = name.removesuffix(".weight").split(".", 3)
            module = f"encoder/layer.{layer}/{rest.replace('.', '/')}"
            parts += [initialiser(f"onnx::MatMul_{i}", p.t())]
            parts += [node(f"/backbone/{module}/MatMul", "hidden", f"onnx::MatMul_{i}")]
        else:
            parts += [initialiser(f"backbone.{name}", p)]
    parts += [initialiser("decoder.final_conv.weight", torch.randn(1, 2, 1, 1))]
    return onnx_file(tmp_path / "tiny.onnx", *parts), model


def test_a_small_file_gives_the_model_it_was_written_from(tiny):
    path, model = tiny
    found, processor = load_dinov2(path)
    assert not found.training and found.config.num_hidden_layers == 2
    for name, p in model.state_dict().items():
        if "mask_token" not in name:
            assert torch.equal(found.state_dict()[name], p), name
    picture = torch.randint(0, 255, (30, 40, 3), dtype=torch.uint8).numpy()
    pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(found(pixels).last_hidden_state, model(pixels).last_hidden_state)
    assert load_dinov2(path, torch.bfloat16)[0].dtype == torch.bfloat16


def test_files_that_are_cut_or_something_else(tiny, tmp_path):
    path, _ = tiny
    whole = path.read_bytes()
    for size in (len(whole) // 2, len(whole) - 1, 3):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="no ONNX file"):
            read(path)
    path.write_text("something else entirely")
    with pytest.raises(ValueError, match="no ONNX file"):
        read(path)
    other = onnx_file(tmp_path / "other.onnx", initialiser("head.weight", torch.ones(2, 3)), node("/head/MatMul", "x"))
    tensors, nodes = read(other)
    assert torch.equal(tensors["head.weight"], torch.ones(2, 3)) and nodes == {"/head/MatMul": ["x"]}
    with pytest.raises(ValueError, match="no DINOv2 under 'backbone'"):
        dinov2_weights(other)
    wrong = initialiser("w", torch.ones(2)).replace(torch.ones(2).numpy().tobytes(), b"\0" * 8)
    assert read(onnx_file(tmp_path / "zeros.onnx", wrong))[0]["w"].tolist() == [0, 0]
    short = field(5, field(1, 3) + field(2, 1) + field(8, "w") + field(9, b"\0" * 8))
    with pytest.raises(ValueError, match=r"tensor 'w' of shape \[3\] has 8 bytes"):
        read(onnx_file(tmp_path / "short.onnx", short))


def made_image():
    i = torch.arange(224.0)
    planes = [torch.sin(i[:, None] / 7 + i[None] / 11 * c) + (i[None] - 112) * (i[:, None] - 100) / 12544
              for c in (1, 2, 3)]  # fmt: skip
    return torch.stack(planes)[None]


@pytest.mark.skipif(not models.is_here("dinov2-small"), reason="make models")
def test_dinov2_small_gives_what_its_graph_gives():
    model, _ = models.load("dinov2-small")
    assert model.config.num_attention_heads == 6 and sum(p.numel() for p in model.parameters()) == 22056576
    with torch.no_grad():
        found = model(made_image()).last_hidden_state
    recorded = load_file(HERE / "dinov2-small.safetensors")["y"]
    torch.testing.assert_close(found[0, ::16, ::8], recorded, atol=1e-4, rtol=1e-5)
