"""CACE-Net against the authors' model and losses, in float64 and float32."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from parity import HERE, Fixture, synthetic
from whole import Whole, renamer

from attnlib.models.detect.cace import CACENet, WeakCACENet, event_contrast
from attnlib.models.protocol import Optimizers, train_batch
from attnlib.models.retrieval.contrast import pooled_contrast
from attnlib.nn.gates.co_guidance import CoGuidance


class Models(Fixture):
    folder = HERE / "models"


F_ = Models("cace-net")
OURS = {"is_event", "event", "gate", "score", "query", "key"}


def wave(*shape, k):
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * k).reshape(shape)


def inputs(dtype=torch.float64):
    video, audio = wave(2, 4, 2, 3, 512, k=0.7391) + 1, wave(2, 4, 128, k=1.13)
    return video.to(dtype).requires_grad_(), audio.to(dtype).requires_grad_()


UNHEARD = [
    f"spatial_channel_att.{name}.{kind}"
    for name in (
        *("video_query2", "video_key2", "video_value2", "v_query", "vaudio_key", "vaudio_value"),
        *("audio_query", "audio_key", "audio_value", "a_norm"),
    )
    for kind in ("weight", "bias")
]  # what their model for sound that guides the picture alone holds for the other direction
TARGET = torch.tensor([[28, 5, 5, 28], [7, 7, 7, 7]])


@pytest.mark.parametrize("case", ["both", "both_plain", "audio", "visual", "none"])
def test_predictions_losses_and_gradients_are_the_authors(case, monkeypatch):
    config = F_.config[case]
    guide = config["guide"]
    state = synthetic(config["shapes"])
    model = CACENet(guide=guide, psi=0.3)
    model.load_state_dict(CACENet.convert_state_dict(state, guide))
    model = model.double().eval()
    if case == "both_plain":
        model.set_progress(0.1)  # before what is contrastive begins
    video, audio = inputs()
    noise = 0.1 * wave(4, 2, 256, k=0.531).transpose(0, 1)
    monkeypatch.setattr(CACENet, "unit_vectors", lambda m, x: F.normalize(m.vectors(x + noise).relu(), dim=-1))
    found = model(video, audio)
    for name in OURS:
        torch.testing.assert_close(getattr(found, name), F_.tensors[f"{case}/y/{name}"], rtol=1e-9, atol=1e-9)
    terms = model.loss(found, TARGET, compat="authors")
    if case == "both_plain":
        assert not terms["contrast"]
        terms["contrast"] = event_contrast(found.query, found.key, TARGET < 28)
    for name, term in terms.items():
        torch.testing.assert_close(term, F_.tensors[f"{case}/loss/{name}"], rtol=1e-9, atol=1e-9)
    sum(terms.values()).backward()
    torch.testing.assert_close(audio.grad, F_.tensors[f"{case}/dx/audio"], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(video.grad[..., ::37], F_.tensors[f"{case}/dx/video"], rtol=1e-8, atol=1e-9)
    spread = {n: torch.full(s, torch.nan, dtype=torch.float64) for n, s in config["shapes"].items()}
    for name, some in F_.under(f"{case}/dw").items():
        flat = spread[name].view(-1)
        flat[torch.arange(len(flat))[:: max(1, len(flat) // 5)][:5]] = some
    held, compared = dict(model.named_parameters()), 0
    for name, expected in CACENet.convert_state_dict(spread, guide).items():
        known = ~expected.isnan()
        if name != "progress":
            torch.testing.assert_close(held[name].grad[known], expected[known], rtol=1e-7, atol=1e-9)
            compared += int(known.any())
    idle = UNHEARD if case == "audio" else []
    assert not any(F_.tensors[f"{case}/dw/{name}"].any() for name in idle)  # it multiplies them by psi = 0
    assert compared == len(F_.under(f"{case}/dw")) - len(idle)


def test_one_direction_alone_and_cells_of_another_width_are_the_authors():
    whole = Whole("cace-net-more")

    def rule(state):
        return CoGuidance.convert_state_dict(state, "audio")

    def sees(module, inputs):
        return {"video": module(inputs["video"], inputs["audio"]).video}

    whole.holds("audio", CoGuidance(guide="audio").eval(), rule, sees, renamer(rule, whole.state("audio")))

    def rule(state):
        return CACENet.convert_state_dict(state, "visual")

    def found(module, inputs):
        made = module(inputs["video"], inputs["audio"])._asdict()
        return {name: made[name] for name in ("is_event", "event", "gate", "score")}

    model = CACENet(**whole.cases["narrow"]["note"])
    whole.holds("narrow", model, rule, found, renamer(rule, whole.state("narrow")))


def test_the_weakly_supervised_model_is_the_authors(monkeypatch):
    whole = Whole("cace-net-more")
    noise = 0.1 * wave(2, 4, 256, k=0.531)
    monkeypatch.setattr(WeakCACENet, "unit_vectors", lambda m, x: F.normalize(m.vectors(x + noise).relu(), dim=-1))

    def found(module, inputs):
        return module(inputs["video"], inputs["audio"])._asdict()

    rule = WeakCACENet.convert_state_dict
    model = WeakCACENet(**whole.cases["weak"]["note"])
    whole.holds("weak", model, rule, found, renamer(rule, whole.state("weak")))


def test_the_weakly_supervised_model_learns_from_clips():
    torch.manual_seed(0)
    model = WeakCACENet(3, 16, 8, 8, 2, (6, 16, 8), contrast_weight=0.1, enhance=0.2)
    g = torch.Generator().manual_seed(0)
    target = torch.arange(16) % 4
    video, audio = 0.3 * torch.randn(16, 6, 2, 2, 16, generator=g), 0.3 * torch.randn(16, 6, 8, generator=g)
    for i, k in enumerate(target.tolist()):
        if k < 3:  # in the second half of the clip
            video[i, 3:, 0, 0, k], audio[i, 3:, k] = 3.0, 3.0
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    first = None
    for _ in range(60):
        terms = model.loss(model(video, audio), target)
        assert set(terms) == {"event", "contrast"}
        first = first or float(terms["event"].detach())
        optimizer.zero_grad()
        sum(terms.values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    assert float(terms["event"].detach()) < 0.5 * first
    found = model.predict(video, audio)
    assert found.shape == (16, 6) and model.training and int(found.max()) <= 3
    assert model.eval()(video, audio).event.argmax(-1).eq(target).float().mean() > 0.7
    for wrong, match in ((torch.tensor([4] * 16), "class 4"), (target[:3], "B=16"), (target.float(), "target")):
        with pytest.raises((TypeError, ValueError), match=match):
            model.loss(model(video, audio), wrong)
    with pytest.raises(ValueError, match="guide"):
        WeakCACENet(guide="visual")


def test_float32_is_near_float64_where_theirs_overflows():
    q = F.normalize(torch.randn(2, 4, 8, dtype=torch.float64), dim=-1)
    here = torch.tensor([[True, True, False, False], [True] * 4])
    exact = event_contrast(q, q, here)
    single = event_contrast(q.float(), q.float(), here)
    assert torch.isfinite(single) and torch.exp(torch.tensor(100.0)).isinf()
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-5)


def test_counts():
    """Theirs has 2,088,962 in the co-guidance: a norm and a map that nothing is computed with, and ours."""
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    with torch.device("meta"):
        assert count(CoGuidance()) + 2 * 512 + 512 * 256 + 256 == 2088962
        for guide, theirs in (("both", 13118681), ("audio", 13118681), ("visual", 12723673), ("none", 11029719)):
            shapes = F_.config[guide]["shapes"]
            assert sum(math.prod(s) for s in shapes.values()) == theirs
            idle = F_.config[guide]["dead"] + (UNHEARD if guide == "audio" else [])
            assert count(CACENet(guide=guide)) == theirs - sum(math.prod(shapes[n]) for n in idle)


def given(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    make = lambda *s: torch.randn(*s, generator=g, dtype=dtype)  # noqa: E731
    return make(2, 5, 3, 2, 16), make(2, 5, 8)


def small(**settings):
    torch.manual_seed(0)
    return CACENet(4, 16, 8, 8, 2, (6, 16, 8), **settings).eval()


def test_a_direction_that_is_off_changes_nothing():
    video, audio = given()
    torch.manual_seed(0)
    module = CoGuidance(16, 8, 6, psi=0.0).eval()
    assert torch.equal(module(video, audio).audio, audio)
    module.beta, module.psi = 0.0, 0.3
    maps = module.maps(video, audio)
    cells = video.flatten(2, 3)
    known = module.video_norm(cells + module.cells(cells.flatten(0, 1)).unflatten(0, (2, 5)))
    both = (module.channel_audio(audio).relu()[:, :, None] * module.channel_video(known).relu()).mean(2)
    gate = module.channel_up(module.channel_down(both).relu()).sigmoid()
    cmran = torch.einsum("btn,btnc->btc", maps.guided.flatten(2), cells * (1 + gate[:, :, None]))
    torch.testing.assert_close(module(video, audio).video, cmran)
    bare = CoGuidance(16, 8, 6, guide="none")(video, audio)
    torch.testing.assert_close(bare.video, video.mean((2, 3)))
    assert bare.audio is audio


def test_spatial_weights_sum_to_one_and_are_never_sharp():
    module, scale = CoGuidance(16, 8, 6).eval(), 1e3
    video, audio = torch.randn(2, 3, 7, 7, 16) * scale, torch.randn(2, 3, 8) * scale
    for weights in module.maps(video, audio):
        torch.testing.assert_close(weights.sum((2, 3)), torch.ones(2, 3))
        assert weights.max() <= math.e / (math.e + 48 / math.e) + 1e-6  # logits are within -1 and 1


def test_answers():
    model = small()
    video, audio = given()
    found, answer = model(video, audio), model.predict(video, audio)
    assert answer.shape == (2, 5)
    for b in range(2):
        for t in range(5):
            there = found.is_event[b, t].sigmoid() > 0.5
            assert answer[b, t] == (found.event[b].argmax() if there else 4)


@pytest.mark.parametrize("events", [0, 1, 2, 5])
def test_the_contrastive_term_of_any_number_of_events(events):
    here = (torch.arange(5) < events).expand(2, 5)
    level = torch.zeros(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(event_contrast(level, level, here), torch.tensor(math.log(9), dtype=torch.float64))
    q = F.normalize(torch.randn(2, 5, 8, dtype=torch.float64), dim=-1).requires_grad_()
    event_contrast(q, q, here).backward()
    assert bool(q.grad.isfinite().all())


def test_pooled_contrast_is_its_formula():
    scores = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    same = torch.rand(3, 4, 6) > 0.6
    same[0, 1] = False
    among = same | (torch.rand(3, 4, 6) > 0.4)
    each = []
    for b in range(3):
        for i in range(4):
            if same[b, i].any():
                row = scores[b, i].exp()
                each.append(-(row[same[b, i]].mean() / row[among[b, i]].sum()).log())
    torch.testing.assert_close(pooled_contrast(scores, same, among), torch.stack(each).mean())
    pooled_contrast(scores, same, among).backward()
    assert bool(scores.grad.isfinite().all()) and not scores.grad[0, 1].any()
    with pytest.raises(ValueError, match="no positive pair"):
        pooled_contrast(scores, torch.zeros_like(same))


def test_targets_without_events_and_wrong_ones():
    model = small()
    found = model(*given())
    none = model.loss(found, torch.full((2, 5), 4))
    assert not none["event"] and not none["score"] and all(t.isfinite() for t in none.values())
    one = torch.tensor([[4, 4, 4, 4, 4], [4, 2, 2, 4, 4]])
    alone = F.cross_entropy(found.event[1:], torch.tensor([2]))
    torch.testing.assert_close(model.loss(found, one)["event"], alone)
    for target, match in (
        (torch.full((2, 5), 5), "class 5"),
        (torch.full((2, 5), -1), "class -1"),
        (torch.tensor([[0, 1, 4, 4, 4]] * 2), "several events"),
        (torch.zeros(2, 4, dtype=torch.long), "target"),
    ):
        with pytest.raises(ValueError, match=match):
            model.loss(found, target)
    with pytest.raises(TypeError, match="target"):
        model.loss(found, torch.zeros(2, 5))
    empty = [t[:0] for t in given()]
    assert model.predict(*empty).shape == (0, 5)
    with pytest.raises(ValueError, match="empty"):
        model.loss(model(*empty), torch.zeros(0, 5, dtype=torch.long))


def test_bad_input():
    model, (video, audio) = small(), given()
    for args, match in (
        ((video, audio[:, :4]), "audio"),
        ((video[..., :8], audio), "video"),
        ((video[:, :, :0], audio), "at least one cell"),
        ((video[:, :0], audio[:, :0]), "at least one cell"),
    ):
        with pytest.raises(ValueError, match=match):
            model(*args)
    unit, here = torch.randn(2, 4, 8), torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"key must be a tensor of shape \(B=2, T=4, D=8\)"):
        event_contrast(unit, unit[..., :7], here)
    with pytest.raises(TypeError, match="here must be a boolean tensor"):
        event_contrast(unit, unit, here.long())
    with pytest.raises(TypeError, match="hidden must be a sequence"):
        CACENet(4, 16, 8, 8, 2, 7)
    for settings, match in (
        (dict(guide="sound"), "guide"),
        (dict(temperature=0.0), "temperature"),
        (dict(top=0), "top"),
    ):
        with pytest.raises(ValueError, match=match):
            small(**settings)
    with pytest.raises(ValueError, match="spatial maps"):
        CoGuidance(16, 8, 6, guide="visual").maps(video, audio)
    with pytest.raises(ValueError, match="does not have"):
        CoGuidance.convert_state_dict({"v_norm.weight": torch.ones(2), "other": torch.ones(2)})


def test_clips_stand_for_themselves_and_everything_copies():
    model, (video, audio) = small(), given()
    whole = model(video, audio)
    for a, b in zip(whole, model(video[1:], audio[1:]), strict=True):
        torch.testing.assert_close(a[1:], b)
    assert model(video[:, :2], audio[:, :2]).is_event.shape == (2, 2)  # fewer than top
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.train().predict(video, audio), model.predict(video, audio)) and other.training
    run = torch.compile(model, backend="eager")
    torch.testing.assert_close(run(video, audio).event, whole.event)
    half = model.bfloat16()
    found = half(video.bfloat16(), audio.bfloat16())
    assert found.event.dtype == torch.bfloat16
    assert all(t.isfinite() for t in half.loss(found, torch.tensor([[0, 0, 4, 4, 4]] * 2)).values())


def test_it_learns_to_localise():
    torch.manual_seed(0)
    model = CACENet(3, 8, 6, 16, 2, (8, 32, 16))
    g = torch.Generator().manual_seed(1)

    def clips(count):
        event = torch.randint(0, 3, (count,), generator=g)
        start = torch.randint(0, 4, (count,), generator=g)
        inside = (torch.arange(6) >= start[:, None]) & (torch.arange(6) < start[:, None] + 3)
        video, audio = (0.3 * torch.randn(count, 6, *s, generator=g) for s in ((2, 2, 8), (6,)))
        video[..., 0, 1, :3] += 2 * (F.one_hot(event, 3)[:, None] * inside[..., None])
        audio[..., 0] += 2 * inside
        return {"video": video, "audio": audio, "target": torch.where(inside, event[:, None], 3)}

    optimizers = Optimizers(lambda name, params: torch.optim.Adam(params, 5e-3))
    for _ in range(60):
        train_batch(model, clips(32), optimizers, clip=0.5)
    model.eval()
    test = clips(64)
    right = (model.predict(test["video"], test["audio"]) == test["target"]).float().mean()
    assert right > 0.8  # background alone is right in half of the segments
