"""PDMER against the authors' model, loss, windows and adaptation; meta-learning on lines."""

import copy
import math
import pickle

import pytest
import torch
from parity import HERE, Fixture, synthetic
from torch import nn
from whole import Whole, renamer

from attnlib.models.meta import MetaLearner, Rated, fast_weights
from attnlib.models.pdmer import PDMER, BandAttention, Felt, band, scores
from attnlib.models.protocol import Optimizers, total_loss, train_batch


class Models(Fixture):
    folder = HERE / "models"


THEIRS = Models("pdmer-dsaml")


def wave(*shape, k):
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * k).reshape(shape)


def released(case="relative", **settings):
    model = PDMER(16, 4, 2, local=2, wide=5, max_distance=90, relative=case != "absolute", **settings)
    state = synthetic(THEIRS.config[case]["shapes"])
    last = "multi_scale_attention.multi_scale_attention.local_attention."  # the name of three that they load last
    state |= {k.replace(last, "multi_scale_attention.encoder."): v for k, v in state.items() if k.startswith(last)}
    model.load_state_dict(PDMER.convert_state_dict(state))
    return model.double().eval()


def holds_gradients(model, case, shapes):
    """Recorded gradients of weights; both scales share theirs, so that its copies by other names are left out."""
    spread = {n: torch.full(s, torch.nan, dtype=torch.float64) for n, s in shapes.items()}
    recorded = THEIRS.under(f"{case}/dw")
    for name, some in recorded.items():
        flat = spread[name].view(-1)
        flat[torch.arange(len(flat))[:: max(1, len(flat) // 7)][:7]] = some
    held, seen = dict(model.named_parameters()), 0
    for name, expected in PDMER.convert_state_dict(spread).items():
        known = ~expected.isnan()
        if name in held:
            torch.testing.assert_close(held[name].grad[known], expected[known], rtol=1e-7, atol=1e-10)
            seen += int(known.sum())
    assert seen == sum(len(some) for some in recorded.values()) and len(recorded) == len(held)


@pytest.mark.parametrize("case", ["relative", "absolute"])
def test_outputs_loss_and_gradients_are_the_authors(case):
    model = released(case)
    mel, song = wave(2, 8, 51, 128, k=0.377).requires_grad_(), wave(2, 16, k=0.73).requires_grad_()
    found = model(mel, song)
    for ours, name in zip(found, ("y", "local", "global"), strict=True):
        torch.testing.assert_close(ours, THEIRS.tensors[f"{case}/{name}"], rtol=1e-9, atol=1e-9)
    loss = total_loss(model.loss(found, torch.stack([wave(2, 8, k=0.9), wave(2, 8, k=0.6)], -1)))
    torch.testing.assert_close(loss, THEIRS.tensors[f"{case}/loss"], rtol=1e-9, atol=1e-9)
    loss.backward()
    torch.testing.assert_close(mel.grad.sum(-1), THEIRS.tensors[f"{case}/dx/mel"], rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(song.grad, THEIRS.tensors[f"{case}/dx/song"], rtol=1e-7, atol=1e-10)
    holds_gradients(model, case, THEIRS.config[case]["shapes"])


@pytest.mark.parametrize("case", ["key_query", "local", "wide", "none"])
def test_other_scales_and_keys_are_the_authors(case):
    """Keys that read distances, too; one scale alone; ReLU; and attention to all."""
    whole = Whole("pdmer-forms")
    note = whole.cases[case]["note"]
    model = PDMER(16, 4, 2, local=2, wide=5, max_distance=90, **note)
    last = "multi_scale_attention.multi_scale_attention.local_attention."  # of three names what is loaded last counts

    def rule(state):
        held = {k.replace(last, "multi_scale_attention.encoder."): v for k, v in state.items() if k.startswith(last)}
        return PDMER.convert_state_dict({**state, **held})

    def call(model, inputs):
        found = model(inputs["mel"], inputs["song"])
        return {"y": found.values} | ({"local": found.local, "wide": found.wide} if case == "key_query" else {})

    whole.holds(case, model, rule, call, renamer(PDMER.convert_state_dict, whole.state(case)))
    x = model.float().train()
    terms = x.loss(x(torch.randn(2, 8, 51, 128), torch.randn(2, 16)), torch.rand(2, 8, 2))
    assert set(terms) == {"score"} | {"key_query": {"local", "wide"}, "none": set()}.get(case, {case})
    assert x(torch.randn(0, 8, 51, 128), torch.randn(0, 16)).values.shape == (0, 8, 2)


def annotators():
    mel, song, values, who = [], [], [], []
    for t in range(2):
        for k, n in ((0.31 + 0.1 * t, 1), (0.17 + 0.1 * t, 2)):
            mel.append(wave(n, 8, 51, 128, k=k))
            song.append(wave(n, 16, k=2 * k))
            values.append(torch.stack([wave(n, 8, k=3 * k), wave(n, 8, k=4 * k)], -1))
            who += [7 - t] * n
    return {"mel": torch.cat(mel), "song": torch.cat(song), "target": Rated(torch.cat(values), torch.tensor(who))}


def test_meta_gradients_are_those_of_copies_that_descend():
    """Theirs: a copy per annotator, SGD on its support, the gradient of its query at the copy."""
    model = released(inner_steps=3, inner_lr=0.05)
    before = copy.deepcopy(model.state_dict())
    (step,) = model.steps(annotators())
    loss = total_loss(step.terms())
    torch.testing.assert_close(loss, THEIRS.tensors["maml/loss"].mean(), rtol=1e-9, atol=1e-9)
    loss.backward()
    holds_gradients(model, "maml", THEIRS.config["relative"]["shapes"])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("length", [61, 65, 66, 70, 71, 73])
def test_windows_are_the_authors(length, monkeypatch):
    """Of a stand-in for the model, which says what a frame holds and where it stands in its window."""

    def stand_in(model, mel, song):
        x, at = mel.mean((2, 3)), torch.arange(mel.shape[1])
        return Felt(torch.stack([x + at, 2 * x - at], -1), x, x)

    monkeypatch.setattr(PDMER, "forward", stand_in)
    model = PDMER(16, 4, 1, 8, mel_size=(3, 4))
    mel, song = wave(1, length, 12, k=0.377).reshape(1, length, 3, 4), torch.zeros(1, 16)
    theirs = THEIRS.tensors[f"slide/{length}"]
    for chunk in (4, 100):
        found = model.predict(mel, song, chunk=chunk, compat="authors")
        torch.testing.assert_close(found, theirs, rtol=1e-12, atol=1e-12)
    ours, x = model.predict(mel, song), mel.mean((2, 3))[0]
    torch.testing.assert_close(ours[..., 1], theirs[..., 1])
    for t in range(length):  # a frame of arousal comes from the window that ends with its block of five
        end = 60 if t < 60 else min(60 + 5 * ((t - 60) // 5 + 1), length)
        torch.testing.assert_close(ours[0, t, 0], x[t] + t - (end - 60))


def test_scores_and_count():
    p, y = wave(9, k=0.4), wave(9, k=0.45)
    got = scores(p.reshape(1, 9, 1), y.reshape(1, 9, 1))
    torch.testing.assert_close(torch.stack(got).flatten(), THEIRS.tensors["score"], rtol=1e-9, atol=1e-9)
    same = scores(p.reshape(1, 9, 1), p.reshape(1, 9, 1))
    assert same.ccc.item() == pytest.approx(1) and same.pcc.item() == pytest.approx(1) and same.rmse.item() == 0
    with torch.device("meta"):
        assert sum(p.numel() for p in PDMER().parameters()) == THEIRS.config["full"]["count"] == 29692723
        assert PDMER().mel_map.in_features == 476


@pytest.mark.parametrize("which", ["prediction", "truth", "both", "equal"])
def test_series_that_do_not_vary_have_scores_and_gradients(which):
    level, moving = torch.full((1, 6, 2), 0.5), torch.rand(1, 6, 2)
    p = (moving if which == "truth" else level).clone().requires_grad_()
    y = {"prediction": moving, "truth": level, "both": level + 1, "equal": level}[which]
    got = scores(p, y)
    sum(t.sum() for t in got).backward()
    assert all(t.isfinite().all() for t in got) and bool(p.grad.isfinite().all())
    torch.testing.assert_close(got.pcc, torch.zeros(1, 2))


def given(count=3, length=8):
    g = torch.Generator().manual_seed(0)
    make = lambda *s: torch.randn(*s, generator=g)  # noqa: E731
    return {"mel": make(count, length, 9, 12), "song": make(count, 16), "target": make(count, length, 2)}


def small(**settings):
    torch.manual_seed(0)
    return PDMER(16, 4, 2, 32, **{"local": 1, "wide": 3, "mel_size": (9, 12), **settings}).eval()


def test_equal_scales_are_one_scale_twice():
    model, batch = small(local=8, wide=8), given()
    fused = model.fuse(batch["mel"], batch["song"])
    one = fused
    for layer in model.layers:
        one, _ = layer(one, torch.ones(1, 8, 8, dtype=torch.bool), False)
    y = model.fc2(model.fc1(model.rnn((2 * one).sigmoid())[0]))
    torch.testing.assert_close(model(batch["mel"], batch["song"]).values, y)


def test_nothing_outside_the_band_is_read():
    module = BandAttention(8, 2, max_distance=12).eval()
    x = torch.randn(1, 10, 8, requires_grad=True)
    y, own = module(x, band(10, 2)[None], True)
    y[0, 5].sum().backward()
    read = x.grad[0].abs().sum(1) > 0
    assert read.tolist() == [abs(i - 5) <= 2 for i in range(10)]
    assert bool((own > 0).all() and (own <= 1).all())
    alone, own = module(x, band(10, 0)[None], True)
    torch.testing.assert_close(own, torch.ones(1, 10))
    torch.testing.assert_close(alone, module.proj(module.value(x)))


def test_attention_is_pulled_to_nine_tenths_and_one():
    model, batch = small(), given()
    found = model(batch["mel"], batch["song"])
    terms = model.loss(found, batch["target"])
    torch.testing.assert_close(terms["local"], (found.local.mean(0) - 0.9).square().mean())
    torch.testing.assert_close(terms["wide"], (found.wide.mean(0) - 0.1).square().mean())


def test_an_inner_rate_of_zero_changes_nothing():
    model, batch = small(), given()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    still = model.adapt(batch, inner_lr=0.0)
    assert torch.equal(still.predict(batch["mel"], batch["song"]), model.predict(batch["mel"], batch["song"]))
    moved = model.train().adapt(batch, inner_steps=2, inner_lr=0.1)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert any(not torch.equal(v, before[k]) for k, v in moved.state_dict().items() if k.startswith("rnn.weight"))
    assert all(p.is_leaf and p.requires_grad and p.grad is None for p in moved.parameters())


class Line(MetaLearner):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.map = nn.Linear(1, 1, bias=False)

    def forward(self, x):
        return self.map(x)

    def loss(self, prediction, target):
        return {"square": (prediction - (target.values if isinstance(target, Rated) else target)).square().mean()}


def test_a_family_of_lines_is_met_by_one_sample():
    """y = a_k x: what was trained to adapt is nearer after one sample than what was trained on all together."""
    g = torch.Generator().manual_seed(0)

    def batch(people):
        slopes = 1 + torch.randn(people, 1, 1, generator=g)
        x = torch.randn(people, 5, 1, generator=g).sign() * (0.5 + torch.rand(people, 5, 1, generator=g))
        who = torch.arange(people).repeat_interleave(5)
        return {"x": x.flatten(0, 1), "target": Rated((slopes * x).flatten(0, 1), who)}

    torch.manual_seed(0)
    meta, plain = Line(inner_steps=4, inner_lr=0.2), Line(inner_steps=4, inner_lr=0.2)
    for model, told in ((meta, True), (plain, False)):
        optimizers = Optimizers(lambda name, params: torch.optim.Adam(params, 3e-2))
        for _ in range(80):
            some = batch(8)
            train_batch(model, some if told else {**some, "target": some["target"].values}, optimizers)
    test = batch(40)
    x, y = test["x"].reshape(40, 5, 1), test["target"].values.reshape(40, 5, 1)
    shot = [meta.adapt({"x": x[i, :1], "target": y[i, :1]})(x[i, 1:]) - y[i, 1:] for i in range(40)]
    error = torch.stack(shot).square().mean()
    assert error < 0.2 * (plain(x[:, 1:]) - y[:, 1:]).square().mean()


def test_bad_input():
    model, batch = small(max_distance=10, window=10), given()
    mel, song, said = batch.values()
    for call, match in (
        (lambda: model(mel[..., :5], song), "mel"),
        (lambda: model(mel, song[:2]), "song"),
        (lambda: model(mel[:, :0], song), "at least one frame"),
        (lambda: model(mel.repeat(1, 2, 1, 1), song), "max_distance=10"),
        (lambda: model.loss(model(mel, song), said[:, :4]), "target"),
        (lambda: model.predict(mel, song, hops=(5,)), "hops"),
        (lambda: model.predict(mel, song, hops=(0, 1)), "hops"),
        (lambda: model.predict(mel, song, hops=(5, 11)), r"hops\[1\] must be .* at most 10, got 11"),
        (lambda: scores(said, said[..., :1]), r"truth must be a tensor of shape \(B=3, S=8, K=2\)"),
        (lambda: scores(said[:, :0], said[:, :0]), "prediction must hold at least one moment"),
        (lambda: BandAttention(8, 3), "num_heads=3 does not divide dim=8"),
        (lambda: BandAttention(8, 2, 4)(torch.zeros(1, 9, 8), band(9, 2)[None]), "max_distance=4"),
        (lambda: fast_weights(model, dict, -1, 0.1), "steps must be"),
        (
            lambda: list(model.steps({**batch, "target": Rated(said[:2], torch.tensor([1, 1]))})),
            "must share the batch, but target.annotator has 2",
        ),
        (
            lambda: list(model.steps({**batch, "target": Rated(said, torch.tensor([1, 1, 2]))})),
            "annotator 2 has 1 sample",
        ),
        (lambda: list(model.steps({**batch, "target": Rated(said, torch.tensor([1, 1]))})), "annotator"),
        (lambda: list(model.steps({"mel": mel, "target": said})), "forward"),
        (lambda: small(window=600), "window"),
        (lambda: small(local=-1), "local"),
        (lambda: PDMER(18, 3), "halvings"),
        (lambda: model.adapt(batch, inner_lr=-1.0), "inner_lr"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(TypeError, match="hops must be a sequence"):
        model.predict(mel, song, hops=5)
    with pytest.raises(ValueError, match="must be finite"):
        broken = copy.deepcopy(model)
        broken.fc2.bias.data.fill_(float("nan"))
        broken.adapt(batch)
    for name, value in (("scales", "far"), ("activation", "tanh"), ("relative", "query")):
        with pytest.raises(ValueError, match=name):
            PDMER(16, 4, 2, 32, **{name: value})


def test_songs_stand_for_themselves_and_everything_copies():
    model, batch = small(), given()
    mel, song = batch["mel"], batch["song"]
    whole = model(mel, song)
    torch.testing.assert_close(whole.values[1:2], model(mel[1:2], song[1:2]).values)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.train().predict(mel, song), model.predict(mel, song)) and other.training
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in other.state_dict().items())  # statistics, too
    assert model.predict(mel[:0], song[:0]).shape == (0, 8, 2)
    run = torch.compile(model, backend="eager")
    torch.testing.assert_close(run(mel, song).values, whole.values)
    half = model.bfloat16()
    found = half(mel.bfloat16(), song.bfloat16())
    assert found.values.dtype == torch.bfloat16
    assert all(t.isfinite() for t in half.loss(found, batch["target"].bfloat16()).values())
