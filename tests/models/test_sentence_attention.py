"""Sentence attention: the gate, and the whole network against the authors' over a small EfficientNet."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import attnlib
from attnlib.models.backbones.efficientnet import efficientnet
from attnlib.models.backbones.resnet import resnet
from attnlib.models.backbones.stages import FeatureInfo, Features
from attnlib.models.build import model_entry
from attnlib.models.dense.grounding import SentenceSegmenter, convert
from attnlib.nn.gates.sentence import SentenceGate
from attnlib.nn.gates.squeeze_excite import SqueezeExciteGate
from tests.parity import by_name

PATH = Path(__file__).parents[1] / "fixtures" / "models" / "sentence_attention.safetensors"
with safe_open(PATH, "pt") as held:
    META = json.loads(held.metadata()["shapes"])
    WANT = {k: held.get_tensor(k) for k in held.keys()}  # noqa: SIM118


def weights(tag):
    return {k: by_name(k, s) for k, s in META[tag].items()}


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


class Given(nn.Module):
    """A trunk that hands on the maps it is given."""

    def __init__(self, dims):
        super().__init__()
        self.dims, self.held = dims, None
        self.feature_info = FeatureInfo({"num_chs": c, "reduction": 1, "index": i} for i, c in enumerate(dims))

    def forward(self, x):
        return self.held


def small(**settings):
    torch.manual_seed(0)
    trunk = Features(resnet((8, 8, 8, 8), (1, 1, 1, 1), stem_dim=8, num_classes=0), (0, 1, 2, 3))
    return SentenceSegmenter(trunk, text_dim=2, **{"drop": 0.0, **settings})


# ---- parity


def authors():
    trunk = Features(efficientnet(0.5, 0.3, "same", 1e-3, 0.0))
    model = SentenceSegmenter(trunk, 3, text_dim=6, drop=0.0).double()
    model.load_state_dict(convert(weights("model"), model), strict=True)
    g = torch.Generator().manual_seed(5)
    x = torch.rand(2, 3, 45, 63, generator=g, dtype=torch.float64)
    return model, x, torch.randn(2, 6, generator=g, dtype=torch.float64)


def test_the_authors_whole_model():
    model, x, text = authors()
    close(model.eval()(x, text)[:, :, ::4, ::4], WANT["eval"])
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    x.requires_grad_(True)
    text.requires_grad_(True)
    y = model(x, text)
    close(y[:, :, ::4, ::4], WANT["train"])
    close(model.input_norm.running_mean, WANT["running_mean"])
    y.sin().sum().backward()
    torch.testing.assert_close(x.grad[:, :, ::4, ::4], WANT["gx"], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(text.grad, WANT["gt"], rtol=1e-8, atol=1e-9)
    names = META["names"]
    marks = {n: torch.full(tuple(s), -1.0) for n, s in META["model"].items()}
    marks |= {n: torch.full(tuple(META["model"][n]), float(i)) for i, n in enumerate(names)}
    params = dict(model.named_parameters())
    seen = set()
    for name, mark in convert(marks, model).items():
        i = int(mark.flatten()[0])
        if i < 0:
            continue
        seen.add(i)
        grad = params[name].grad
        wave = torch.cos(torch.arange(grad.numel(), dtype=torch.float64)).view_as(grad)
        torch.testing.assert_close(grad.norm(), WANT["norms"][i], rtol=1e-7, atol=1e-8)
        torch.testing.assert_close((grad * wave).sum(), WANT["sums"][i], rtol=1e-7, atol=1e-7)
    assert len(seen) == len(names) == len(params)


def test_embedding_attention_blocks():
    single = SentenceSegmenter(
        Given((3, 5)), 2, text_dim=(4, 3, 3), hidden=2, levels="last", drop=0.0, input_norm=False
    ).double()  # fmt: skip
    single.load_state_dict(convert(weights("single"), single), strict=True)
    single.encoder.held = [None, WANT["single.x"]]
    image = torch.zeros(2, 3, 6, 7, dtype=torch.float64)
    parts = WANT["single.t"].split((4, 3, 3), 1)
    close(single(image, parts), WANT["single.y"])
    close(single(image, WANT["single.t"]), WANT["single.y"])
    several = SentenceSegmenter(Given((3, 5, 4)), 2, text_dim=(4, 3, 3), hidden=2, input_norm=False).double().eval()
    several.load_state_dict(convert(weights("multi"), several), strict=True)
    several.encoder.held = [WANT[f"multi.x{i}"] for i in range(3)]
    before = [m.clone() for m in several.encoder.held]
    y = several(torch.zeros(2, 3, 9, 11, dtype=torch.float64), WANT["multi.t"].split((4, 3, 3), 1))
    close(y, WANT["multi.y"])
    assert all(a.equal(b) for a, b in zip(before, several.encoder.held, strict=True)) and len(before) == 3


def test_parameters():
    with torch.device("meta"):
        model = attnlib.create_model("sentence_attention_efficientnet_b7")
        low = SentenceSegmenter("tf_efficientnet_b0")  # the released table of channels does not fit it
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert [count(g) for g in model.gates] == [643_616, 668_208, 717_392, 938_720, 1_578_112]
    assert count(model.merges) == 167_424 and count(model.classifier) == 66
    assert count(model) - count(model.encoder) == 4_713_538
    assert [g.dim for g in low.gates] == [16, 24, 40, 112, 320]
    for size in range(3, 8):
        entry = model_entry(f"sentence_attention_efficientnet_b{size}")
        with torch.device("meta"):
            assert count(attnlib.create_model(entry.name)) == entry.params, entry.name


# ---- the gate


def test_softmax_gate():
    gate, x = SentenceGate(8, 6), torch.randn(2, 4, 5, 8)
    text = torch.randn(2, 6)
    g = gate.gate(x, text)
    assert g.shape == (2, 8) and (g > 0).all()
    torch.testing.assert_close(g.sum(1), torch.ones(2))
    torch.testing.assert_close(gate(x, text), x * g[:, None, None])
    assert g.equal(gate.gate(torch.randn(2, 3, 3, 8), text))  # the map is not read
    nn.init.zeros_(gate.fc2.weight)
    nn.init.zeros_(gate.fc2.bias)
    assert gate(x, text).equal(x / 8)
    many = SentenceGate(8, 6, gate="softmax*C")
    many.load_state_dict(gate.state_dict())
    assert many(x, text).equal(x)


def test_concat_without_sentence_is_squeeze_and_excitation():
    torch.manual_seed(0)
    gate = SentenceGate(8, 6, 1, "sigmoid", "concat", norm=False)
    se = SqueezeExciteGate(8, reduction=8 / 14)
    with torch.no_grad():
        gate.fc1.weight[:, :6] = 0
        se.se.fc1.weight.copy_(gate.fc1.weight[:, 6:])
        se.se.fc1.bias.copy_(gate.fc1.bias)
        se.se.fc2.weight.copy_(gate.fc2.weight)
        se.se.fc2.bias.copy_(gate.fc2.bias)
    x, text = torch.randn(2, 4, 5, 8), torch.randn(2, 6)
    torch.testing.assert_close(gate(x, text), se(x))
    valid = torch.rand(2, 4, 5) > 0.4
    holes = x.masked_fill(~valid[..., None], float("nan"))
    torch.testing.assert_close(gate(holes, text, valid), se(x, valid=valid))


def test_images_without_a_question():
    gate, x = SentenceGate(8, 6), torch.randn(3, 4, 5, 8)
    text = torch.randn(3, 6)
    text[1] = float("nan")
    has = torch.tensor([True, False, True])
    y = gate(x, text, has_text=has)
    assert y[1].equal(x[1] / 8)
    torch.testing.assert_close(y[has], gate(x[has], text[has]))
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in gate.parameters())


def test_bad_embeddings():
    gate, x = SentenceGate(8, (4, 2)), torch.zeros(2, 3, 3, 8)
    for text in (torch.zeros(2, 5), torch.zeros(1, 6), [torch.zeros(2, 4)], [torch.zeros(2, 2), torch.zeros(2, 4)]):
        with pytest.raises(ValueError, match="text must be embeddings"):
            gate(x, text)
    with pytest.raises(ValueError, match="floating point"):
        gate(x, torch.zeros(2, 6, dtype=torch.long))
    with pytest.raises(ValueError, match=r"x must be a map"):
        gate(x[..., :3], torch.zeros(2, 6))
    with pytest.raises(ValueError, match="has_text"):
        gate(x, torch.zeros(2, 6), has_text=torch.ones(3, dtype=torch.bool))
    for settings in (dict(gate="tanh"), dict(source="image"), dict(text_dim=()), dict(hidden=0)):
        with pytest.raises(ValueError, match=next(iter(settings))):
            SentenceGate(8, **settings)


# ---- the model


def test_two_questions_of_one_image():
    model = small().eval()
    x = torch.rand(1, 3, 33, 47)
    maps = model.maps(x)
    a, b = (model.decode(maps, t, (33, 47)) for t in (torch.tensor([[1.0, 0]]), torch.tensor([[0, 1.0]])))
    assert a.shape == (1, 2, 33, 47) and not a.allclose(b)
    torch.testing.assert_close(a, model(x, torch.tensor([[1.0, 0]])))


@pytest.mark.parametrize("size", [(225, 319), (17, 5)])
def test_any_size(size):
    model = small().eval()
    x, text = torch.rand(2, 3, *size), torch.randn(2, 2)
    y = model(x, text)
    assert y.shape == (2, 2, *size) and y.isfinite().all() and model.predict(x, text).shape == (2, *size)
    assert model(x[:0], text[:0]).shape == (0, 2, *size)


def test_copies_and_types():
    model, x, text = small().eval(), torch.rand(2, 3, 24, 17), torch.randn(2, 2)
    y = model(x, text)
    assert copy.deepcopy(model)(x, text).equal(y) and pickle.loads(pickle.dumps(model))(x, text).equal(y)
    assert copy.deepcopy(model).bfloat16()(x.bfloat16(), text.bfloat16()).isfinite().all()
    plain = small(gate=None).eval()
    assert plain(x, text).equal(plain(x, -text)) and not len(plain.gates)


def named_blobs(count, seed):
    """A red and a blue square, and which of them is named."""
    g = torch.Generator().manual_seed(seed)
    x, target = 0.1 * torch.randn(count, 3, 24, 24, generator=g), torch.zeros(count, 24, 24, dtype=torch.long)
    named = torch.randint(0, 2, (count,), generator=g)
    for i in range(count):
        for k, left in ((0, i % 2 * 12), (1, 12 - i % 2 * 12)):
            t, s = (int(torch.randint(0, 6, (), generator=g)) for _ in range(2))
            x[i, 2 * k, t : t + 10, left + s // 2 : left + s // 2 + 8] += 1
            if named[i] == k:
                target[i, t : t + 10, left + s // 2 : left + s // 2 + 8] = 1
    return x, nn.functional.one_hot(named, 2).float(), target


def test_the_sentence_chooses_the_mask():
    def overlap(gate):
        model = small(gate=gate, input_norm=False)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for step in range(60):
            x, text, target = named_blobs(8, step)
            optimizer.zero_grad()
            sum(model.loss(model(x, text), target).values()).backward()
            optimizer.step()
        x, text, target = named_blobs(32, 999)
        found = model.eval().predict(x, text) > 0
        return float((found & (target > 0)).sum() / (found | (target > 0)).sum())

    assert overlap("softmax*C") > 0.6 and overlap(None) < 0.5


def test_questions_in_words():
    x = torch.rand(2, 3, 24, 17)
    model = small(text_encoder=lambda qs: torch.tensor([[float(len(q)), 1.0] for q in qs])).eval()
    got = model.ask(x, ["where", "what is it"])
    assert got.equal(model.predict(x, torch.tensor([[5.0, 1.0], [10.0, 1.0]])))
    with pytest.raises(ValueError, match=r"empty text at \[1\]"):
        model.ask(x, ["where", "  "])
    with pytest.raises(ValueError, match="one for each of 2"):
        model.ask(x, ["where"])
    with pytest.raises(TypeError, match="list of strings"):
        model.ask(x, "where")
    with pytest.raises(ValueError, match="text_encoder"):
        small().ask(x, ["a", "b"])


def test_bad_input():
    model, x = small().eval(), torch.rand(1, 3, 16, 16)
    with pytest.raises(ValueError, match="x must be images"):
        model(x[:, :2], torch.zeros(1, 2))
    with pytest.raises(ValueError, match="text must be"):
        model(x, torch.zeros(1, 3))
    with pytest.raises(ValueError, match="target holds the class 2"):
        model.loss(model(x, torch.zeros(1, 2)), torch.full((1, 16, 16), 2))
    with pytest.raises(ValueError, match="feature_info"):
        SentenceSegmenter(nn.Identity())
    with pytest.raises(ValueError, match="levels"):
        small(levels="first")
    with pytest.raises(ValueError, match="does not have"):
        convert({"backbone.strange": torch.zeros(1)}, model)
    with pytest.raises(TypeError, match="text_encoder"):
        small(text_encoder="minilm")
