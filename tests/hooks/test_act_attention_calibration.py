"""ACT: the authors' functions on recorded maps, an oracle, the head search, and life under ``generate()``."""

from pathlib import Path

import pytest
import torch
from parity import Fixture
from safetensors.torch import load_file

import attnlib
from attnlib.cache import SnapKV
from attnlib.hooks import Record
from attnlib.steer import SinkCalibration, VisualRedistribution, calibrate, label_accuracy, search_heads
from attnlib.steer.sink_calibration import HEADS, column_scores, find_sinks
from hooks.models import call_site, dense_attention, language_model, prompt, run, scores

FIXTURE = Path(__file__).parents[1] / "fixtures" / "act-attention-calibration.safetensors"
CAUSAL = torch.ones(14, 14).tril().bool()[None, None]


@pytest.fixture(scope="module")
def recorded():
    return load_file(FIXTURE)


def oracle(weights, heads, beta, threshold, real):
    """Head by head and row by row; ``real`` (B, N) are tokens that are no padding."""
    out, found = weights.clone(), torch.zeros(weights.shape[0], weights.shape[1], weights.shape[3], dtype=torch.bool)
    for b in range(weights.shape[0]):
        tokens = real[b].nonzero().flatten().tolist()
        for h in heads:
            rows = {j: [i for i in tokens if i >= j] for j in tokens}
            c = {j: sum(float(weights[b, h, i, j]) for i in rows[j]) / len(rows[j]) for j in tokens}
            sinks = [j for j in tokens[1:] if c[j] > threshold]
            found[b, h, sinks] = True
            others = [j for j in range(weights.shape[3]) if j not in sinks]
            for i in tokens:
                row = weights[b, h, i]
                taken, left = (1 - beta) * row[sinks].sum(), row[others].sum()
                if sinks and left > 0:
                    out[b, h, i, sinks] = beta * row[sinks]
                    out[b, h, i, others] = row[others] + taken * row[others] / left
    return out, found


# ---- equations


def test_edited_maps_equal_the_authors(recorded):
    weights = recorded["weights"]
    first = torch.zeros(1, dtype=torch.long)
    c = column_scores(weights, CAUSAL)
    for name, heads in (("one", [1]), ("listed", [1, 2, 3])):
        for compat in (None, "authors"):
            sinks = find_sinks(c, 0.1, first, compat)
            sinks[:, [h for h in range(4) if h not in heads]] = False
            mine = calibrate(weights, sinks, 0.4)
            # Head 2 does not attend to the first token, so the authors spare a sink inside the prompt there.
            same = [0, 1, 3] if compat is None else [0, 1, 2, 3]
            torch.testing.assert_close(mine[:, same], recorded[name][:, same], atol=1e-6, rtol=1e-5)
            if compat is None and 2 in heads:
                assert int(sinks[0, 2].sum()) == int(find_sinks(c, 0.1, first, "authors")[0, 2].sum()) + 1
    assert not torch.equal(recorded["weights"], recorded["one"])


OPTIONS = Fixture("act-options")


@pytest.mark.parametrize("case", OPTIONS.config)
def test_other_settings_and_a_batch_equal_the_authors(case):
    """Theirs edits the first sample of a batch."""
    settings = dict(OPTIONS.config[case])
    heads, weights = settings.pop("heads"), OPTIONS.tensors["weights"]
    site, rows = call_site(torch.zeros(3, 3, 7, 4), torch.zeros(3, 3, 7, 4)), torch.arange(7)
    edited = SinkCalibration({2: heads}, compat="authors", **settings).on_weights(site, weights, rows)
    torch.testing.assert_close(edited, OPTIONS.tensors[case], atol=1e-6, rtol=1e-5)
    assert not torch.equal(edited[0], weights[0]) and torch.equal(edited[1:], weights[1:])
    every = SinkCalibration({2: heads}, **settings).on_weights(site, weights, rows)
    assert all(not torch.equal(a, b) for a, b in zip(every, weights, strict=True))


@pytest.mark.parametrize("beta", [0.0, 0.4, 0.9])
def test_one_call_equals_the_equations_with_padding_and_grouped_heads(recorded, beta):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 14, 8), torch.randn(2, 2, 14, 8), torch.randn(2, 2, 14, 8)
    k[:, :, 0], k[:, 0, 6], k[:, 1, 9], k[0, :, 4] = 3.0, 4.0, 4.0, 3.5
    q = q + 1.0
    real = torch.ones(2, 14, dtype=torch.bool)
    real[0, :3] = False
    allowed = CAUSAL & real[:, None, None]
    site = call_site(q, k, allowed=allowed)
    act = SinkCalibration({2: [0, 3]}, beta=beta)
    out = run(act, site, q, k, v)
    plain, weights = dense_attention(q, k, v, allowed)
    want, found = oracle(weights, [0, 3], beta, 0.1, real)
    assert torch.equal(act.results()["sinks"][2], found) and found[:, 0].any() and found[:, 3].any()
    rows = real[:, None, :, None].expand_as(out)
    torch.testing.assert_close(out[rows], (want @ v.repeat_interleave(2, 1))[rows], atol=1e-5, rtol=1e-5)
    assert torch.equal(out[:, 1:3], plain[:, 1:3]) and not torch.equal(out[:, 0], plain[:, 0])
    # New tokens read the same sinks.
    new = torch.randn(2, 4, 1, 8) + 1.0
    k2, v2 = (torch.cat([t, torch.randn(2, 2, 1, 8)], 2) for t in (k, v))
    seen = torch.nn.functional.pad(real, (0, 1), value=True)[:, None, None]
    step = call_site(new, k2, allowed=seen, offset=14, phase="decode")
    _, w = dense_attention(new, k2, v2, seen)
    sinks = torch.nn.functional.pad(found, (0, 1))
    want = calibrate(w, sinks, beta)
    torch.testing.assert_close(run(act, step, new, k2, v2), want @ v2.repeat_interleave(2, 1), atol=1e-5, rtol=1e-5)
    assert not torch.equal(want, w)
    act.decode = False
    assert torch.equal(run(act, step, new, k2, v2), dense_attention(new, k2, v2, seen)[0])


def test_rows_keep_their_sums_and_ratios():
    torch.manual_seed(0)
    weights = torch.softmax(torch.randn(2, 3, 9, 9).masked_fill(~CAUSAL[..., :9, :9], float("-inf")), -1)
    sinks = torch.zeros(2, 3, 9, dtype=torch.bool)
    sinks[..., [3, 5]] = True
    out = calibrate(weights, sinks, 0.0)
    torch.testing.assert_close(out.sum(-1), weights.sum(-1), atol=1e-6, rtol=0)
    assert (out >= 0).all() and (out[..., [3, 5]] == 0).all() and (out.triu(1) == 0).all()
    torch.testing.assert_close(
        out[..., 6:, 0] / out[..., 6:, 4], weights[..., 6:, 0] / weights[..., 6:, 4], atol=1e-5, rtol=1e-5
    )
    assert torch.equal(out[..., :3, :], weights[..., :3, :])
    assert torch.equal(calibrate(weights, torch.zeros_like(sinks), 0.4), weights)


def test_a_row_whose_weight_lies_on_sinks_stays():
    weights = torch.tensor([[[[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]]]])
    out = calibrate(weights, torch.tensor([[[False, True, False]]]), 0.4)
    torch.testing.assert_close(out, torch.tensor([[[[0.0, 1.0, 0.0], [0.8, 0.2, 0.0]]]]))


def test_threshold_relative_to_the_length(recorded):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 14, 8) + 1.0, torch.randn(1, 4, 14, 8), torch.randn(1, 4, 14, 8)
    k[:, 1, 6] = 2.0
    site = call_site(q, k)
    a, b = SinkCalibration({2: [1]}, threshold=3.0, relative=True), SinkCalibration({2: [1]}, threshold=3.0 / 14)
    assert torch.equal(run(a, site, q, k, v), run(b, site, q, k, v))
    assert torch.equal(a.results()["sinks"][2], b.results()["sinks"][2]) and a.results()["sinks"][2].any()
    # A batch without padding shares one mask, and every sample has the same length.
    q, k, v = (torch.cat([t, t.flip(1)]) for t in (q, k, v))
    both = run(a, call_site(q, k), q, k, v)
    assert torch.equal(both, run(b, call_site(q, k), q, k, v)) and a.results()["sinks"][2].shape[0] == 2


def test_lists_of_the_authors():
    lists = HEADS["llama-2-7b-chat/classification"]
    assert lists[2] == (2, 8, 12, 13, 16, 17, 20, 25) and lists[30] == (2,) and 28 not in lists
    assert SinkCalibration("llama-2-7b-chat/multiple-choice").layers[:2] == [2, 3]
    assert HEADS["mistral-7b/classification"] == {
        2: (5, 10), 3: (23,), 5: (3,), 6: (8, 13), 9: (16, 24), 10: (14,), 11: (31,), 12: (9,), 13: (0, 13, 27),
        14: (0, 9),
    }  # fmt: skip
    assert HEADS["llama-2-7b-chat/all"][31] == (4,) and HEADS["mistral-7b/multiple-choice"][22] == (13, 23)
    assert all(2 <= n < 32 and all(0 <= h < 32 for h in some) for t in HEADS.values() for n, some in t.items())
    with pytest.raises(ValueError, match="layer 3 does not exist"):
        attnlib.attach(
            language_model(num_attention_heads=32, num_key_value_heads=32), SinkCalibration(next(iter(HEADS)))
        )


# ---- in a model

pytest.importorskip("transformers")

SETTINGS = dict(beta=0.3, threshold=0.1)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_weights_under_generate(family, mode):
    model = language_model(family)
    inputs = prompt()
    act = SinkCalibration({1: [0, 2], 2: [3]}, **SETTINGS)
    before, after = Record(layers=[1], rows="all"), Record(layers=[1], rows="all")
    plain, _ = scores(model, inputs, **mode)
    with attnlib.attach(model, before, act, after):
        got, _ = scores(model, inputs, **mode)
    assert not torch.allclose(got, plain, atol=1e-4)
    real = (inputs["attention_mask"] == 1).repeat_interleave(mode.get("num_beams", 1), 0)
    sinks = act.results()["sinks"][1]
    assert sinks[:, [0, 2]].any() and not sinks[:, [1, 3]].any()
    for step, (w, edited) in enumerate(zip(before.results()[1]["weights"], after.results()[1]["weights"], strict=True)):
        if step:
            want = calibrate(w, torch.nn.functional.pad(sinks, (0, w.shape[-1] - sinks.shape[-1])), 0.3)
        else:
            w, edited = w[..., :20], edited[..., :20]
            want, found = oracle(w, [0, 2], 0.3, 0.1, real)
            assert torch.equal(found, sinks[..., :20])
            rows = real[:, None, :, None].expand_as(w)
            want, edited = torch.where(rows, want, 0), torch.where(rows, edited, 0)
        torch.testing.assert_close(edited, want, atol=1e-6, rtol=1e-5)


def test_somebody_who_looks_at_a_few_rows_sees_them_edited():
    model = language_model()
    inputs = prompt()
    act = SinkCalibration({1: [0, 2]}, **SETTINGS)
    whole, last = Record(layers=[1], rows="all"), Record(layers=[1], rows="last")
    with attnlib.attach(model, act, whole, last), torch.no_grad():
        model(**inputs)
    torch.testing.assert_close(last.results()[1]["weights"][0], whole.results()[1]["weights"][0][:, :, -1:])


def test_batch_with_padding_equals_single_prompts():
    model = language_model()
    inputs = prompt()
    together, alone = None, []
    for row, start in ((None, 0), (0, 5), (1, 0)):
        some = inputs if row is None else {n: t[row : row + 1, start:] for n, t in inputs.items()}
        with attnlib.attach(model, SinkCalibration(layers=[1, 2], **SETTINGS)):
            got, _ = scores(model, some)
        together, alone = (got, alone) if row is None else (together, [*alone, got])
    torch.testing.assert_close(together, torch.cat(alone, 1), atol=1e-5, rtol=1e-5)


def test_identities_are_the_model():
    model = language_model()
    inputs = prompt()
    plain, _ = scores(model, inputs)
    cases = (SinkCalibration(beta=1.0), SinkCalibration({}), SinkCalibration({1: []}), SinkCalibration(threshold=1.0))
    for act in cases:
        with attnlib.attach(model, act) as session:
            assert torch.equal(scores(model, inputs)[0], plain)
            assert bool(session.attached) != act.identity
    assert [act.identity for act in cases] == [True, True, True, False]


def test_it_composes_with_a_compressed_cache_and_sampling_is_reproducible():
    model = language_model()
    inputs = prompt()
    act = SinkCalibration({1: [0, 2]}, **SETTINGS)
    before, after = Record(layers=[1], phase="decode"), Record(layers=[1], phase="decode")
    with attnlib.attach(model, SnapKV(cap=16, window_size=3, kernel_size=3), before, act, after):
        runs = []
        for _ in range(2):
            torch.manual_seed(1)
            runs.append(model.generate(**inputs, max_new_tokens=4, do_sample=True))
    assert torch.equal(*runs)
    sinks, changed = act.results()["sinks"][1], 0
    records = (before.results()[1]["weights"], after.results()[1]["weights"], before.results()[1]["keys"])
    for w, edited, keys in zip(*records, strict=True):
        by_slot = torch.nn.functional.pad(sinks, (0, int(keys.max()) + 1 - sinks.shape[-1]))
        here = by_slot.gather(-1, keys.clamp(min=0)) & (keys >= 0)
        torch.testing.assert_close(edited, calibrate(w, here, 0.3), atol=1e-6, rtol=1e-5)
        changed += int((edited != w).sum())
    assert changed


def test_vision_language_model_beside_another_technique():
    from attnlib.hooks import TokenTypes
    from hooks.llava import IMAGE_ID, llava, llava_inputs

    model = llava()
    inputs = llava_inputs(model)
    plain, _ = scores(model, inputs)
    act = SinkCalibration(layers=[1, 2], beta=0.1, threshold=0.08)
    other = VisualRedistribution((3,), p=0.2, rho=1.0, summ=0.0, tau=1.5, first_layer=1)
    with attnlib.attach(model, act, other, token_types=TokenTypes(IMAGE_ID)):
        got, _ = scores(model, inputs)
    assert act.results()["sinks"][1].any() and not torch.allclose(got, plain, atol=1e-5)
    assert torch.equal(scores(model, inputs)[0], plain)


# ---- which heads

BOS, EVIDENCE, STRONG, WEAK, FILL, LABELS = 0, (1, 2), (3, 4), (5, 6), 7, (14, 15)


def planted():
    """Layer 1: head 0 reports the evidence, head 1 reports the distractor, louder; both are sinks inside the prompt."""
    model = language_model(
        vocab_size=16, hidden_size=16, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12},
    )  # fmt: skip
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name:
                p.zero_()
        embed = model.model.embed_tokens.weight
        embed[torch.arange(10), torch.arange(10)] = 1.0
        embed[:, 10] = 1.0
        a = model.model.layers[1].self_attn
        # Dimension 3 of a head hardly rotates, so scores know contents only.
        for head, tokens, loud in ((0, EVIDENCE, (1.0, 1.0)), (1, STRONG, (1.6, 1.6)), (1, WEAK, (0.7, 0.7))):
            a.q_proj.weight[8 * head + 3, 10] = 2.0
            a.k_proj.weight[8 * head + 3, list(tokens)] = 1.5
            for label in (0, 1):
                a.v_proj.weight[8 * head + label, tokens[label]] = loud[label]
                a.o_proj.weight[12 + label, 8 * head + label] = 1.0
        for label in (0, 1):
            model.lm_head.weight[LABELS[label], 12 + label] = 1.0
    return model


def questions():
    rows, answers = [], []
    for label in (0, 1):
        for distractor in (STRONG[label], STRONG[1 - label], WEAK[1 - label]):
            for place in (3, 5):
                ids = [BOS] + [FILL] * 9
                ids[place], ids[8 - place] = EVIDENCE[label], distractor
                rows.append(ids)
                answers.append(label)
    return [({"input_ids": torch.tensor(rows)}, LABELS, answers)]


def test_the_search_finds_the_harmful_head_and_keeps_the_useful_one():
    model = planted()
    evaluate = label_accuracy(questions())
    search = search_heads(model, evaluate, layers=[1])
    assert search.baseline == pytest.approx(2 / 3)
    assert search.scores[1, 1] == 1.0 and search.scores[1, 0] < search.baseline
    assert search.heads == {1: [1]}
    with attnlib.attach(model, SinkCalibration(search.heads)):
        assert evaluate(model) == 1.0
    assert evaluate(model) == pytest.approx(2 / 3)


def test_the_search_leaves_the_first_two_layers_and_the_last():
    model = language_model(num_hidden_layers=4)
    seen = []
    search = search_heads(model, lambda m: seen.append(1) or 0.0, beta=0.5)
    assert sorted(search.scores) == [(2, h) for h in range(4)] and search.heads == {} and len(seen) == 5
    with pytest.raises(ValueError, match="no layer to search"):
        search_heads(language_model(), lambda m: 0.0)
    with pytest.raises(ValueError, match="head 9"):
        search_heads(model, lambda m: 0.0, heads=[9])
    with pytest.raises(ValueError, match="calibration set is empty"):
        label_accuracy([])(model)


@pytest.mark.parametrize(
    "kwargs, match",
    [
        ({"beta": 1.5}, r"beta must lie in \[0, 1\]"),
        ({"threshold": -0.1}, "threshold must not be negative"),
        ({"heads": "gpt-5"}, "llama-2-7b-chat/classification"),
        ({"heads": {0: [1]}, "layers": [0]}, "names its layers already"),
        ({"compat": "mine"}, "compat"),
    ],
)
def test_bad_settings(kwargs, match):
    with pytest.raises(ValueError, match=match):
        SinkCalibration(**kwargs)


def test_refusals():
    model = language_model()
    for heads in ([0, 1], {0: 1}, 3):
        with pytest.raises(TypeError, match=r"heads must be \{layer: \[head, ...\]\}"):
            SinkCalibration(heads=heads)
    with pytest.raises(ValueError, match="head 4 does not exist"):
        attnlib.attach(model, SinkCalibration({1: [4]}))
    with pytest.raises(ValueError, match="layer 3 does not exist"):
        attnlib.attach(model, SinkCalibration({3: [0]}))
