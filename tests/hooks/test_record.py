"""Recording: weights and statistics equal those of the full map, whatever the blocks; the sink metric on known maps."""

import math

import pytest
import torch

import attnlib
from attnlib.hooks import Record
from attnlib.hooks import call as hooks_call
from attnlib.hooks.probes import sink_rate
from hooks.models import call_site, dense_attention, language_model, prompt, run, scores


def look(record, weights):
    """Feed a causal map (B, H, T, T) to a record through its own interface."""
    n = weights.shape[2]
    q = torch.zeros(*weights.shape[:2], n, 2)
    site = call_site(q, q)
    record.wants(site)
    rows, _ = record.probe(site)
    for block in rows.split(3):
        allowed, _ = site.mask.rows(block)
        record.observe(site, weights[:, :, block], block, allowed)
    return record.results()[2]


def test_sink_metric_on_known_maps():
    t = 10
    first = torch.zeros(1, 2, t, t)
    first[..., 0] = 1.0
    assert look(Record(rows="all", what=("sink",)), first)["sink"].tolist() == [1.0]
    identity = torch.eye(t).expand(1, 2, t, t)
    entry = look(Record(rows="all", what=("received", "sink"), sinks=t), identity)
    alpha = entry["received"] / entry["seen"]
    torch.testing.assert_close(alpha[0, 0], 1 / (t - torch.arange(t, dtype=torch.float32)))
    assert entry["sink"].tolist() == [float(1 / (t - k) > 0.3) for k in range(t)]
    uniform = torch.tril(torch.ones(t, t)) / torch.arange(1, t + 1)[:, None]
    entry = look(Record(rows="all", what=("received",)), uniform.expand(1, 1, t, t))
    harmonic = sum(1 / i for i in range(1, t + 1)) / t
    assert math.isclose(float(entry["received"][0, 0, 0] / entry["seen"][0, 0, 0]), harmonic, rel_tol=1e-6)


def test_sink_rate_counts_from_the_first_token_that_exists():
    received = torch.tensor([[[0.0, 0.0, 4.0, 1.0]], [[4.0, 0.0, 0.0, 0.0]]])
    seen = torch.tensor([[[0.0, 0.0, 4.0, 3.0]], [[4.0, 3.0, 2.0, 1.0]]])
    assert sink_rate(received, seen, sinks=3).tolist() == [1.0, 0.5, 0.0]


@pytest.mark.parametrize("elements", [1 << 22, 60])
def test_statistics_equal_those_of_the_map_whatever_the_blocks(elements, monkeypatch):
    monkeypatch.setattr(hooks_call, "BLOCK_ELEMENTS", elements)
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 11, 8), torch.randn(2, 2, 11, 8), torch.randn(2, 2, 11, 8)
    site = call_site(q, k)
    record = Record(heads=[1, 3], rows="all", what=("weights", "entropy", "received"))
    record.wants(site)
    out = run(record, site, q, k, v)
    plain, weights = dense_attention(q, k, v, site.mask.allowed)
    assert torch.equal(out, plain)
    weights = weights[:, [1, 3]]
    entry = record.results()[2]
    torch.testing.assert_close(entry["weights"][0], weights, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(entry["entropy"][0], torch.special.entr(weights).sum(-1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entry["received"], weights.sum(2), atol=1e-5, rtol=1e-5)
    assert torch.equal(entry["seen"][0, 0], torch.arange(11, 0, -1.0))


def test_maps_are_never_whole_unless_asked(monkeypatch):
    """Statistics of a long sequence touch only blocks of rows."""
    monkeypatch.setattr(hooks_call, "BLOCK_ELEMENTS", 2000)
    largest = []
    plain = hooks_call.score_rows

    def spy(*args):
        out = plain(*args)
        largest.append(out[0].numel())
        return out

    monkeypatch.setattr(hooks_call, "score_rows", spy)
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 300, 4), torch.randn(1, 1, 300, 4)
    record = Record(rows="all", what=("entropy", "sink"))
    site = call_site(q, k)
    record.wants(site)
    run(record, site, q, k, k)
    # One call more, of the rows that are compared with the kernel.
    assert max(largest) <= 2000 and len(largest) == 101 and "weights" not in record.results()[2]


# ---- in a model

pytest.importorskip("transformers")


def test_rows_heads_phases_and_last_calls():
    model = language_model()
    inputs = prompt()
    records = [
        Record(layers=[-1]),
        Record(layers=["model.layers.1.*"], rows=[0, -1], heads=[2]),
        Record(phase="decode", rows="all", what=("weights", "sink")),
        Record(layers=[0], calls=2),
    ]
    before, _ = scores(model, inputs, new=4)
    with attnlib.attach(model, *records) as session:
        assert torch.equal(scores(model, inputs, new=4)[0], before)
        assert list(session.results) == ["record", "record-2", "record-3", "record-4"]
    last, some, decode, short = (r.results() for r in records)
    assert list(last) == [2] and [tuple(w.shape) for w in last[2]["weights"]] == [(2, 4, 1, 20 + i) for i in range(4)]
    assert [r.tolist() for r in last[2]["rows"]] == [[19], [20], [21], [22]]
    assert list(some) == [1] and some[1]["weights"][0].shape == (2, 1, 2, 20)
    assert some[1]["rows"][0].tolist() == [0, 19] and some[1]["weights"][1].shape == (2, 1, 2, 21)
    assert all(len(decode[i]["weights"]) == 3 for i in range(3))
    assert len(short[0]["weights"]) == 2 and short[0]["weights"][-1].shape[-1] == 23


def test_received_weight_goes_on_while_decoding_and_starts_anew_with_a_prompt():
    model = language_model()
    inputs = prompt()
    record = Record(layers=[1], rows="all", what=("weights", "received", "sink"), sinks=2)
    with attnlib.attach(model, record):
        for _ in range(2):
            scores(model, inputs, new=4)
    entry = record.results()[1]
    total = torch.zeros(2, 4, 23)
    for w in entry["weights"][-4:]:
        total[..., : w.shape[-1]] += w.sum(2)
    torch.testing.assert_close(entry["received"], total, atol=1e-5, rtol=1e-5)
    assert entry["seen"][0, 0, :6].tolist() == [0.0] * 5 + [18.0] and entry["seen"][1, 0, 0] == 23.0
    alpha = total / entry["seen"].clamp_min(1)
    first = torch.stack([alpha[0, :, 5], alpha[1, :, 0]])
    torch.testing.assert_close(entry["sink"][0], (first > 0.3).float().mean())


@pytest.mark.parametrize(
    "kwargs, error, match",
    [
        ({"what": "weights"}, TypeError, "sequence of names"),
        ({"what": ("maps",)}, ValueError, "what='maps'"),
        ({"what": ()}, ValueError, "empty"),
        ({"rows": "first"}, ValueError, "rows='first'"),
        ({"phase": "training"}, ValueError, "phase='training'"),
        ({"epsilon": 0.0}, ValueError, "epsilon"),
        ({"sinks": 0}, ValueError, "sinks"),
    ],
)
def test_bad_settings(kwargs, error, match):
    with pytest.raises(error, match=match):
        Record(**kwargs)
