import bench_stubs
import pytest
import torch

from attnlib.bench.data.tasks import TASKS
from attnlib.bench.specs import Spec
from attnlib.bench.training import Settings, build
from attnlib.models import tiny

SMALL = Settings(dim=16, depth=2, num_heads=2)


def _shared(model):
    return {k: v for k, v in model.state_dict().items() if ".mixer." not in k}


@pytest.mark.parametrize("name", ["digits", "superres"])
def test_everything_but_the_mechanism_is_equal(name):
    task = TASKS[name]()
    a = build(task, Spec("bench_stubs:Identity"), 3, SMALL)
    b = build(task, Spec("bench_stubs:Identity", {"draws": 5}), 3, SMALL)
    c = build(task, Spec("softmax-attention"), 3, SMALL)
    other = build(task, Spec("bench_stubs:Identity"), 4, SMALL)
    for model in (b, c):
        assert _shared(model).keys() == _shared(a).keys()
        for key, value in _shared(a).items():
            assert torch.equal(value, _shared(model)[key]), key
    assert any(not torch.equal(v, _shared(other)[k]) for k, v in _shared(a).items())
    assert a.parameter_counts()["shared"] == c.parameter_counts()["shared"]
    assert a.parameter_counts()["mechanism"] == 2 * (16 * 16 + 16)


def test_building_leaves_the_random_stream_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build(TASKS["digits"](), Spec("softmax-attention"), 0, SMALL)
    assert torch.equal(torch.rand(3), expected)


def test_a_sequence_mechanism_gets_the_flattened_grid():
    x = torch.randn(2, 4, 6, 8)
    y, carry, losses = tiny.mix(bench_stubs.Identity(8), x)
    assert y.shape == x.shape and carry is None and losses == {}
    y, _, _ = tiny.mix(bench_stubs.GridOnly(8), x)
    assert y.shape == x.shape
    with pytest.raises(ValueError, match=r"grid of rank 1, but the mechanism takes ranks \[2\]"):
        tiny.mix(bench_stubs.GridOnly(8), x.flatten(1, 2))


def test_carry_goes_from_block_to_block_and_losses_add_up():
    body = tiny.TinyBackbone(8, 3, lambda: bench_stubs.Carrying(8))
    out = body(torch.randn(2, 5, 8))
    assert [block.mixer.seen for block in body.blocks] == [1, 2, 3]
    assert float(out.losses["ones"]) == 3.0
    body(torch.randn(2, 5, 8))
    assert [block.mixer.seen for block in body.blocks] == [1, 2, 3]


@pytest.mark.parametrize("name", ["superres", "upsample"])
def test_photo_models_start_at_bicubic(name):
    task = TASKS[name]()
    model = build(task, Spec("softmax-attention"), 0, SMALL)
    low, bicubic, high = task.batch(torch.Generator().manual_seed(0))
    out = model(low, bicubic).y
    assert out.shape == high.shape and torch.equal(out, bicubic)


def test_forecaster_does_not_look_ahead_and_does_read_the_past():
    task = TASKS["forecast"]()
    model = build(task, Spec("softmax-attention"), 0, SMALL).eval()
    torch.nn.init.normal_(model.head.weight)
    past, recent, _ = task.batch(torch.Generator().manual_seed(0))
    base = model(past, recent).y
    assert base.shape == (16, 16, 16, 1)
    changed = recent.clone()
    changed[:, 8 * task.patch :] += 1.0
    ahead = model(past, changed).y
    assert torch.equal(base[:, :8], ahead[:, :8]) and not torch.allclose(base[:, 8:], ahead[:, 8:])
    assert (model(past + 1.0, recent).y - base).abs().amin((0, 2, 3)).min() > 0


def test_language_model_does_not_look_ahead():
    model = build(TASKS["text"](), Spec("softmax-attention"), 0, SMALL).eval()
    tokens = torch.randint(256, (1, 20))
    changed = tokens.clone()
    changed[:, 10:] = 0
    assert torch.allclose(model(tokens).y[:, :10], model(changed).y[:, :10], atol=1e-6)
    with pytest.raises(ValueError, match="tokens must have shape"):
        model(tokens[0])


def test_progress_reaches_the_mechanisms():
    model = build(TASKS["digits"](), Spec("softmax-attention"), 0, SMALL)
    seen = []
    for mechanism in model.mechanisms():
        mechanism.set_progress = seen.append
    model.set_progress(0.25)
    assert seen == [0.25, 0.25]
