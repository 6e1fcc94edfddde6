"""``attnlib look``: pages and runs from the command line, on a small model in place of a fetched one."""

from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from attnlib.bench import looking
from attnlib.cli import app
from attnlib.look import Run

pytest.importorskip("transformers")
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402


def invoke(*args):
    return CliRunner().invoke(app, list(args))


def test_look_writes_a_page_and_a_run(tmp_path, monkeypatch):
    class Tokenizer:
        def __call__(self, text):
            return {"input_ids": [ord(c) % 40 for c in text]}

        def convert_ids_to_tokens(self, ids):
            return [str(i) for i in ids]

        def decode(self, ids, **_):
            return " ".join(map(str, ids))

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    monkeypatch.setattr(looking, "_open", lambda name, sees: (model, SimpleNamespace() if sees else Tokenizer()))
    out, kept = str(tmp_path / "page.html"), str(tmp_path / "run.safetensors")
    ask = ["look", "smollm2", "--text", "abcdef", "--out", out]
    result = invoke(*ask, "--save", kept, "--attribute", "logits", "--attribute", "gradient")
    assert result.exit_code == 0, result.exception
    run = Run.load(kept)
    assert set(run.overlays) == {"logits", "gradient"} and len(run.layers) == 2
    # Gradient x input of a logit, by finite differences along one token's embedding.
    ids = torch.tensor([Tokenizer()("abcdef")["input_ids"]])
    rows = model.get_input_embeddings()(ids).detach()
    best = int(model(ids).logits[0, -1].argmax())
    step = torch.zeros_like(rows)
    step[0, 2] = 1e-2 * rows[0, 2]
    up, down = (model(inputs_embeds=rows + s).logits[0, -1, best].item() for s in (step, -step))
    assert float(run.overlays["gradient"][2]) == pytest.approx((up - down) / 2e-2, abs=2e-3)
    tokenwise = [m for m in looking.TOKENWISE if m != "gradient"]
    result = invoke(*ask, "--save", kept, *(a for m in tokenwise for a in ("--attribute", m)), "--layers", "0")
    assert result.exit_code == 0, result.exception
    run = Run.load(kept)
    assert set(run.overlays) == set(tokenwise) and all(v.shape == (6,) for v in run.overlays.values())
    assert all(torch.isfinite(v).all() and v.any() for v in run.overlays.values())
    held = looking._by_token(model, {"input_ids": ids}, "relevance", best)
    torch.testing.assert_close(held, run.overlays["relevance"])
    torch.testing.assert_close(held.sum(), model(ids).logits[0, -1, best].detach(), rtol=1e-3, atol=1e-4)
    assert invoke(*ask, "--save", kept).exit_code == 0
    result = invoke(*ask, "--with", "SinkCalibration,beta=0.4", "--diff", "plain", "--layers", "1")
    assert result.exit_code == 0, result.exception
    assert invoke("look", "smollm2", "--text", "abcdeh", "--diff", kept, "--out", out).exit_code == 0
    for wrong, error in (
        (["--ids", "1,40"], "ids points at token 40"),
        ([], "give one of --text"),
        (["--ids", "1,2", "--text", "a"], "give one of --text"),
        (["--text", "ab", "--diff", "plain"], "no technique acts"),
        (["--text", "ab", "--attribute", "patch"], "give --corrupted"),
        (["--text", "ab", "--attribute", "patch", "--corrupted", "abc"], "needs as many"),
        (["--text", "ab", "--attribute", "mine"], "attribute"),
        (["--text", "ab", "--diff", str(tmp_path / "none")], "there is no run"),
        (["--text", "ab" * 33], "the text has 66 tokens, more than the 64 of smollm2"),
        (["--text", "ab", "--save", str(tmp_path)], "is a folder"),
        (["--text", "ab", "--with", "SnapKV"], "either ratio or cap"),
        (["--text", "ab", "--with", "SnapKV,ratio"], "with: 'SnapKV,ratio' has the setting 'ratio'"),
        (["--text", "abcd", "--with", "KeyNorm,ratio=0.5", "--diff", "plain"], "no map changes; what evicts keys"),
        (["--text", "ab", "--with", "snapKv,ratio=0.5"], "did you mean 'SnapKV'?"),
        (["--text", "ab", "--attribute", "logit"], "did you mean 'logits'?"),
    ):
        assert error in str(invoke("look", "smollm2", *wrong, "--out", out).exception)
    assert "there is no folder" in str(invoke(*ask[:-1], str(tmp_path / "none" / "page.html")).exception)
    monkeypatch.setattr(looking, "MOST", 600)  # two layers of two heads take 576 bytes for six tokens
    assert invoke(*ask).exit_code == 0
    told = str(invoke("look", "smollm2", "--text", "abcdefg", "--out", out).exception)
    assert "the maps of 7 tokens in 4 heads take" in told and "some of the 2 --layers" in told
    assert invoke("look", "smollm2", "--text", "abcdefg", "--out", out, "--layers", "1").exit_code == 0


@pytest.mark.parametrize("method", looking.TOKENWISE)
def test_maps_of_a_picture(method):
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16, patch_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = ViTForImageClassification(config).eval()
    pixels = torch.rand(1, 3, 16, 16)
    found = looking._by_token(model, {"pixel_values": pixels}, method, 1)
    assert found.shape == ((5,) if method in ("saliency", "grad-cam") else (16, 16)) and torch.isfinite(found).all()
    if method == "gradient":
        x = pixels.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(pixel_values=x).logits[0, 1], x)
        torch.testing.assert_close(found, (slope * x)[0].sum(0).detach())
