"""DMMI against the authors' whole network in float64, and what its card promises."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

import attnlib
from attnlib.models.build import load_pretrained, model_entry
from attnlib.models.dense.dmmi import DEAD, DMMI, DMMIPrediction, convert, referring_scores
from tests.parity import by_name

FOLDER = Path(__file__).parents[1] / "fixtures" / "models"


def recorded(name):
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as held:
        return json.loads(held.metadata()["shapes"]), {k: held.get_tensor(k) for k in held.keys()}  # noqa: SIM118


META, WANT = recorded("dmmi")
SMALL = dict(embed_dim=12, depths=(2, 1, 1, 1), num_heads=(2, 2, 4, 4), window_size=3, text_dim=24, drop_path_rate=0.0)


def close(a, b, rtol=1e-8):
    torch.testing.assert_close(a, b, rtol=rtol, atol=1e-9)


RESNET = dict(trunk="resnet", embed_dim=4, depths=(2, 1, 1, 1), text_dim=24)


def authors(meta, settings):
    model = DMMI(**settings, compat="authors").double()
    model.load_state_dict(convert({k: by_name(k, s) for k, s in meta["model"].items()}, model), strict=True)
    g = torch.Generator().manual_seed(5)
    x = torch.rand(2, 3, 40, 40, generator=g, dtype=torch.float64)
    text, erased = (torch.randn(2, 24, 5, generator=g, dtype=torch.float64).mT.contiguous() for _ in range(2))
    target = torch.randint(0, 2, (2, 40, 40), generator=g)
    return model.eval(), x, text, erased, target


VALID = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)


@pytest.mark.parametrize(("name", "settings"), [("dmmi", SMALL), ("dmmi-resnet", RESNET)])
def test_the_authors_whole_network(name, settings):
    meta, want = recorded(name)
    model, x, text, erased, target = authors(meta, settings)
    x.requires_grad_(True)
    text.requires_grad_(True)
    words, maps = model.backbone(x, text, VALID)
    close(words.mT, want["l1"])
    for i, m in enumerate(maps):
        close(m[:, ::6, ::2, ::2], want[f"c{i}"])
    made = model.everything(x, text, VALID, erased)
    close(made.logits[:, :, ::4, ::4], want["y"])
    terms = model.loss(made, target)
    close(terms["cross_entropy"], want["ce"])
    close(terms["contrast"] / 0.01, want["one.con"])
    close(terms["similarity"] / 0.01, want["one.sim"])
    nothing = target.clone()
    nothing[1] = 0  # the second sample names nothing
    flagged = model.loss(made, nothing)
    close(flagged["contrast"] / 0.01, want["zero.con"])
    close(flagged["similarity"] / 0.01, want["zero.sim"])
    (terms["cross_entropy"] + flagged["contrast"] + flagged["similarity"]).backward()
    torch.testing.assert_close(x.grad[:, :, ::4, ::4], want["gx"], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(text.grad.mT, want["gl"], rtol=1e-7, atol=1e-9)
    marks = {n: torch.full(tuple(s), -1.0) for n, s in meta["model"].items()}
    marks |= {n: torch.full(tuple(meta["model"][n]), float(i)) for i, n in enumerate(meta["names"])}
    params, seen = dict(model.named_parameters()), set()
    for name, mark in convert(marks, model).items():
        i = int(mark.flatten()[0])
        if name not in params:
            continue
        assert i >= 0
        seen.add(i)
        grad = params[name].grad
        torch.testing.assert_close(grad.norm(), want["norms"][i], rtol=1e-6, atol=1e-9)
        if not name.endswith("rel_bias"):  # ours is laid out otherwise
            wave = torch.cos(torch.arange(grad.numel(), dtype=torch.float64)).view_as(grad)
            torch.testing.assert_close((grad * wave).sum(), want["sums"][i], rtol=1e-6, atol=1e-8)
    assert len(seen) == len(meta["names"]) == len(params)


def test_named_models_and_what_never_runs():
    dead = [n for n in META["model"] if n.startswith(("classifier.", "backbone.")) and "decoder_layer" in n]
    assert len(dead) == 3 * 18 and len(DEAD) == 2
    with torch.device("meta"):
        model = attnlib.create_model("dmmi_swin_base")
    assert model.compat == "authors" and model.stages[2].blocks[1].mixer.inner.shift == (6, 6)
    for name in attnlib.list_models(family="dmmi-ris"):
        with torch.device("meta"):
            held = sum(p.numel() for p in attnlib.create_model(name).parameters())
        assert held == model_entry(name).params


def test_checkpoints_of_their_training():
    meta, _ = recorded("dmmi-resnet")
    state = {k: by_name(k, s) for k, s in meta["model"].items()}
    model = attnlib.create_model("dmmi_resnet101", **RESNET, compat=None).double()
    load_pretrained(model, {"model": {f"module.{k}": v for k, v in state.items()}, "bert_model": {}, "epoch": 3})
    other = DMMI(**RESNET).double()
    other.load_state_dict(convert(state, other))
    assert all(a.equal(b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match="is of trunk='resnet', the model has trunk='swin'"):
        convert(state, DMMI(**SMALL))


def test_a_resnet():
    torch.manual_seed(0)
    model, (x, text) = DMMI(**RESNET).eval(), sample()
    y = model(x, text, VALID)
    assert y.shape == (2, 2, 40, 33) and y.isfinite().all()
    torch.testing.assert_close(model(x[1:], text[1:, :3]), y[1:], rtol=1e-4, atol=1e-5)
    norms = [m.weight for m in model.stages.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 3 * 5 + 4 and all(w.eq(1).all() for w in norms)  # as torchvision's ResNet starts
    for conv in (m for m in model.stages.modules() if isinstance(m, nn.Conv2d)):
        fan = conv.out_channels * conv.kernel_size[0] ** 2
        assert float(conv.weight.detach().std()) == pytest.approx((2 / fan) ** 0.5, rel=0.3)
    words, maps = model.backbone(x, text)
    assert [m.shape[1] for m in maps] == [16, 32, 64, 128] and words.shape == text.shape
    made = model.train()(x, text, VALID, text.flip(0))
    sum(model.loss(made, torch.ones(2, 40, 33, dtype=torch.long)).values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    for name, value in (("num_heads", (1, 1, 1, 1)), ("window_size", 7)):
        with pytest.raises(ValueError, match=f"{name}=.* of a Swin"):
            DMMI(**RESNET, **{name: value})


# ---- words


def small(**settings):
    torch.manual_seed(0)
    return DMMI(**{**SMALL, **settings})


def sample(batch=2, size=(40, 33), words=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, *size, generator=g), torch.randn(batch, words, 24, generator=g)


def test_padding_is_masked_and_compat_attends_to_it():
    model, (x, text) = small().double().eval(), sample()
    x, text = x.double(), text.double()
    holes = text.masked_fill(~VALID[..., None], float("nan"))
    erased = text.flip(0).masked_fill(~VALID[..., None], float("nan"))
    made = model.everything(x, holes, VALID, erased)
    short = model.everything(x[1:], text[1:, :3], None, text.flip(0)[1:, :3])
    close(made.logits[1:], short.logits)
    close(made.rebuilt[1:, :3], short.rebuilt)
    close(made.words[1:, :3], short.words)
    target = torch.ones(2, 40, 33, dtype=torch.long)
    far = made._replace(words=made.words.masked_fill(~VALID[..., None], 9.0))
    close(model.loss(far, target)["contrast"], model.loss(made, target)["contrast"])
    far = made._replace(rebuilt=made.rebuilt.masked_fill(~VALID[..., None], 9.0))
    close(model.loss(far, target)["similarity"], model.loss(made, target)["similarity"])
    left = model(x, text.flip(1), VALID.flip(1))  # padding on the left
    close(left[1:], model(x[1:], text[1:, :3].flip(1)))
    theirs = small(compat="authors").double().eval()
    theirs.load_state_dict(model.state_dict())
    assert not theirs(x, text, VALID)[1:].allclose(theirs(x[1:], text[1:, :3]))


def test_flags():
    model, (x, text) = small().train(), sample()
    made = model(x, text, VALID, text.flip(0))
    assert isinstance(made, DMMIPrediction)
    nothing = torch.zeros(2, 40, 33, dtype=torch.long)
    terms = model.loss(made, nothing)
    grads = torch.autograd.grad(terms["contrast"] + terms["similarity"], made.seen, retain_graph=True)
    assert not grads[0].any() and terms["similarity"].item() == pytest.approx(0.01)
    some = nothing.clone()
    some[0, :5] = 1
    leaf = made._replace(
        words=made.words.detach().requires_grad_(True), rebuilt=made.rebuilt.detach().requires_grad_(True)
    )
    terms = model.loss(leaf, some)
    words, rebuilt = torch.autograd.grad(terms["similarity"], [leaf.words, leaf.rebuilt], allow_unused=True)
    assert words is None and rebuilt[0].any() and not rebuilt[1].any()  # the words are no part of what is trained
    (model.loss(model(x, text), some)["cross_entropy"]).backward()
    assert model.word_conv.weight.grad is None  # without an erased sentence, a segmenter of two stages
    assert sorted(model.loss(model(x, text), some)) == ["contrast", "cross_entropy"]


def test_cross_entropy_is_weighted():
    model, logits = small(), torch.randn(2, 2, 4, 5)
    target = torch.randint(0, 2, (2, 4, 5))
    got = model.loss(logits, target)["cross_entropy"]
    torch.testing.assert_close(got, F.cross_entropy(logits, target, torch.tensor([0.9, 1.1])))
    assert model.loss(logits, torch.full((2, 4, 5), 255))["cross_entropy"] == 0
    target[0] = -1
    got = small(ignore_index=-1).loss(logits, target)["cross_entropy"]
    torch.testing.assert_close(got, F.cross_entropy(logits[1:], target[1:], torch.tensor([0.9, 1.1])))


def test_scores():
    truth = torch.zeros(4, 4, 4, dtype=torch.bool)
    truth[0, :2] = truth[1, 0] = True
    found = torch.zeros_like(truth)
    found[0, :2], found[1, :2], found[3, 0, 0] = True, True, True
    scores = referring_scores(found, truth)
    assert scores["oIoU"] == pytest.approx(12 / 16) and scores["mIoU"] == pytest.approx(0.75)
    assert scores["P@0.5"] == 1 and scores["P@0.6"] == 0.5 and scores["empty"] == 0.5
    assert list(referring_scores(found[2:], truth[2:])) == ["empty"]
    with pytest.raises(ValueError, match="at must be"):
        referring_scores(found, truth, (float("nan"),))
    with pytest.raises(TypeError, match="at must be thresholds"):
        referring_scores(found, truth, 0.5)
    with pytest.raises(ValueError, match="boolean masks"):
        referring_scores(found.long(), truth)
    with pytest.raises(ValueError, match="one shape"):
        referring_scores(found[:1], truth)


# ---- use


class Bert(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 24)

    def forward(self, ids, attention_mask):
        assert attention_mask.shape == ids.shape
        return type("Out", (), {"last_hidden_state": self.table(ids)})()


def test_ids_and_encoders():
    model, (x, _) = small(text_encoder=Bert()).eval(), sample()
    ids = torch.randint(0, 9, (2, 5))
    assert model(x, ids, VALID).equal(model(x, model.text_encoder.table(ids), VALID))
    y = model.train()(x, ids, VALID, ids.flip(1))
    sum(model.loss(y, torch.ones(2, 40, 33, dtype=torch.long)).values()).backward()
    assert model.text_encoder.table.weight.grad.any()
    with pytest.raises(ValueError, match="no text_encoder is bound"):
        small()(x, ids)


@pytest.mark.parametrize("size", [(40, 40), (33, 65), (20, 9)])
def test_any_size(size):
    model, (x, text) = small().eval(), sample(size=size)
    y = model(x, text, VALID)
    assert y.shape == (2, 2, *size) and y.isfinite().all()
    torch.testing.assert_close(model(x[:1], text[:1]), y[:1], rtol=1e-4, atol=1e-5)
    found = model.predict(x, text, VALID)
    assert model.train().predict(x, text, VALID).equal(found) and model.training
    assert found.dtype == torch.bool and found.shape == (2, *size)


def test_copies_and_types():
    model, (x, text) = small().eval(), sample(size=(24, 20))
    y = model(x, text, VALID)
    assert copy.deepcopy(model)(x, text, VALID).equal(y)
    assert copy.deepcopy(model).bfloat16()(x.bfloat16(), text.bfloat16(), VALID).isfinite().all()
    assert model(x[:0], text[:0]).shape == (0, 2, 24, 20)


def test_bad_input():
    model, (x, text) = small().eval(), sample()
    with pytest.raises(ValueError, match=r"empty in samples \[1\]"):
        model(x, text, VALID & torch.tensor([[True], [False]]))
    with pytest.raises(ValueError, match="no words"):
        model(x, text[:, :0])
    with pytest.raises(ValueError, match="one for each image"):
        model(x, text[:1])
    with pytest.raises(ValueError, match="text must be words"):
        model(x, text[..., :5])
    with pytest.raises(ValueError, match="x must be images"):
        model(x[:, :1], text)
    with pytest.raises(ValueError, match="valid"):
        model(x, text, VALID[:, :3])
    with pytest.raises(ValueError, match="erased must have the shape"):
        model(x, text, None, text[:, :3])
    y = model(x, text)
    with pytest.raises(ValueError, match="class 2"):
        model.loss(y, torch.full((2, 40, 33), 2))
    with pytest.raises(ValueError, match="target must be"):
        model.loss(y, torch.zeros(2, 40, 33))
    with pytest.raises(ValueError, match="four stages"):
        small(depths=(1, 1))
    with pytest.raises(ValueError, match="does not have"):
        convert({"classifier.strange.weight": torch.zeros(1)}, model)
