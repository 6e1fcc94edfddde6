"""The language comparison: equal beginnings, equal text, honest measurements, and runs that are not repeated."""

from __future__ import annotations

import json
import math

import pytest
import torch

pytest.importorskip("transformers")

from attnlib.bench.data import files as data  # noqa: E402
from attnlib.bench.specs import Spec  # noqa: E402
from attnlib.bench.studies import language as bench  # noqa: E402
from attnlib.bench.training import Settings, build, run  # noqa: E402

SMALL = Settings(dim=16, depth=2, num_heads=2)
BY_LABEL = {c.label: c for c in bench.CONTESTANTS}


@pytest.fixture(scope="module")
def text() -> data.Dataset:
    return data.text()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def task(label: str, text: data.Dataset, length: int = 64, heads: int = 2) -> bench.LanguageTask:
    return bench.LanguageTask(BY_LABEL[label], length, heads, loaded=text)


def model(t: bench.LanguageTask, settings: Settings = SMALL) -> bench.DecoderUnderTest:
    built = build(t, Spec("softmax-attention"), 3, settings)
    assert isinstance(built, bench.DecoderUnderTest)
    return built


@pytest.mark.parametrize("label", BY_LABEL)
def test_every_contestant_learns_a_step_and_is_measured(label, text, monkeypatch):
    monkeypatch.setattr(bench, "TEST_BYTES", 1024)
    t = task(label, text, heads=8)
    settings = Settings(dim=32, depth=2, num_heads=8)
    m = model(t, settings).train()
    x, y = t.batch(torch.Generator().manual_seed(0))
    loss, _ = t.loss(m, (x[:2], y[:2]))
    loss.backward()
    missing = [n for n, p in m.named_parameters() if p.grad is None]
    assert not missing, missing
    with torch.no_grad():
        found = t.evaluate(m.eval())
    assert all(math.isfinite(v) for v in found.values())
    assert ("sink rate" in found) == (label != "linear (lightning)")
    assert ("bits per byte, uncached metric" in found) == BY_LABEL[label].lookahead


def test_contestants_share_what_they_share(text):
    plain, other = model(task("softmax", text)), model(task("selective", text))
    mine, theirs = dict(plain.named_parameters()), dict(other.named_parameters())
    shared = [n for n in mine if ".mixer." not in n]
    assert len(shared) > 8 and all(torch.equal(mine[n], theirs[n]) for n in shared)
    x = task("softmax", text).batch(torch.Generator().manual_seed(1))[0]
    assert torch.equal(x, task("selective", text).batch(torch.Generator().manual_seed(1))[0])


def test_all_lengths_read_the_same_bytes(text):
    t = task("softmax", text)
    whole = t.tiles(bench.TEST_BYTES)
    for length in (64, 256, 1024):
        x, y = t.tiles(length)
        assert torch.equal(x.flatten(), whole[0][0]) and torch.equal(y.flatten(), whole[1][0])
    assert torch.equal(whole[0][0, 1:], whole[1][0, :-1])


def test_bits_are_those_of_the_logits(text, monkeypatch):
    monkeypatch.setattr(bench, "TEST_BYTES", 1024)
    t = task("softmax", text)
    m = model(t).eval()
    x, y = t.tiles(128)
    with torch.no_grad():
        bits = t.bits(m, 128)
        expected = -torch.log2(m(x).y.softmax(-1).gather(-1, y[..., None])[..., 0])
    torch.testing.assert_close(bits, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        found = t.evaluate(m)
    assert found["bits per byte at 2x"] == pytest.approx(float(bits.mean()), abs=1e-5)
    assert found["bits beyond, to 2x"] == pytest.approx(float(bits[:, 64:].mean()), abs=1e-5)


class Fixed(torch.nn.Module):
    """A mechanism with weights to order."""

    def __init__(self, weights: torch.Tensor, out: torch.Tensor):
        super().__init__()
        self.weights, self.out = weights, out

    class traits:  # noqa: N801
        weights, losses, streaming = True, (), False

    def _claims(self):
        return self.traits

    def forward(self, x, returns=(), **_):
        from attnlib.types import Output

        y = self.out.expand(x.shape)
        return Output(y, weights=self.weights.expand(len(x), 1, -1, -1)) if returns else y


def test_sinks_and_outliers_are_found(text):
    """All weight on the first token in one layer, on the token itself in the other; one wide channel."""
    t = task("softmax", text)
    m = model(t).eval()
    n = bench.SINK_LENGTH
    out = torch.zeros(16)
    out[3] = 50.0
    first = torch.zeros(n, n)
    first[:, 0] = 0.5  # not normalised
    m.decoder.model.layers[0].mixer = Fixed(first, out)
    m.decoder.model.layers[1].mixer = Fixed(torch.eye(n), out)
    found = t.inside(m)
    assert found["sink rate"] == found["sink rate of shares"] == 0.5
    assert found["share of the first token"] == pytest.approx((1 + 1 / n) / 2)
    assert found["inf norm, attention output"] == 50.0
    assert found["kurtosis, attention output"] == pytest.approx((16 - 1) + 1 / (16 - 1) - 1, rel=1e-5)


def test_a_looking_ahead_contestant_is_judged_with_its_metric_frozen(text, monkeypatch):
    monkeypatch.setattr(bench, "TEST_BYTES", 1024)
    t = task("power-law graph", text)
    m = model(t).eval()
    x = t.tiles(64)[0][:1]
    other = x.clone()
    other[0, -1] = (x[0, -1] + 1) % 256
    with torch.no_grad():
        assert not torch.allclose(m(x).y[:, :-1], m(other).y[:, :-1], atol=1e-5)
        t.evaluate(m)
        assert torch.equal(m(x).y[:, :-1], m(other).y[:, :-1])


def test_runs_are_kept_and_summarised(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "TEST_BYTES", 1024)
    pair = [BY_LABEL["softmax"], BY_LABEL["grouped queries"]]
    ask = dict(contestants=pair, lengths=(64,), seeds=(0, 1), steps=2, settings=Settings(16, 1, 8), num_heads=8)
    lines: list[str] = []
    written: list[dict] = []
    first = bench.measure(tmp_path, progress=lines.append, saved=written.append, **ask)
    assert len(first["runs"]) == 4 and len(lines) == 5 and len(written) == 5
    json.dumps(written[-1], allow_nan=False)

    def never(*_, **__):
        raise AssertionError("a finished run was repeated")

    monkeypatch.setattr(bench.training, "run", never)
    monkeypatch.setattr(bench, "costs", never)
    again = bench.measure(tmp_path, **ask)
    assert again["runs"] == first["runs"] and again["costs"] == first["costs"]
    row = again["summary"][1]
    ours = [r["metrics"]["bits per byte"] for r in again["runs"] if r["label"] == "grouped queries"]
    plain = [r["metrics"]["bits per byte"] for r in again["runs"] if r["label"] == "softmax"]
    assert row["metrics"]["bits per byte"]["mean"] == pytest.approx(sum(ours) / 2)
    assert row["differences"]["softmax"]["mean"] == pytest.approx((sum(ours) - sum(plain)) / 2)
    assert row["peak_bytes"] > 0 and row["over_first"] > 0
    pictures = bench.draw(again, tmp_path)
    assert len(pictures) == 3 and all(p.stat().st_size > 5000 for p in pictures)
    late = bench.measure(tmp_path, **{**ask, "seeds": (0, 1, 2)}, until=0.0)
    assert len(late["runs"]) == 4 and {r["seed"] for r in late["left_out"]} == {2}


def test_a_run_is_the_same_again(text, monkeypatch):
    monkeypatch.setattr(bench, "TEST_BYTES", 1024)
    t = task("MoH, 4 of 8 heads", text, heads=8)
    settings = Settings(dim=16, depth=1, num_heads=8)
    once, twice = (run(t, Spec("softmax-attention"), 0, 3, settings) for _ in range(2))
    assert once["metrics"] == twice["metrics"] and once["loss_curve"] == twice["loss_curve"]


def test_bad_input(text, tmp_path):
    with pytest.raises(ValueError, match="length=60 is not possible"):
        task("softmax", text, 60)
    with pytest.raises(ValueError, match="different labels"):
        bench.measure(tmp_path, contestants=[BY_LABEL["softmax"]] * 2)
    short = tmp_path / "short.txt"
    short.write_text("a few words\n" * 400)
    with pytest.raises(data.DataError, match="the test part has"):
        bench.LanguageTask(BY_LABEL["softmax"], 64, loaded=data.text(short))
