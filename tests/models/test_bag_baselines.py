"""What ACMIL is compared with in its release: every model against its class there, and bags alone or in batches."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from whole import Whole, drawn, renamer

import attnlib
from attnlib.models.bags import baselines
from attnlib.models.build import counted_params, load_pretrained, model_entry
from attnlib.models.protocol import Optimizers, train_batch

WHOLE = Whole("acmil-baselines")
NAMES = ("mean_mil", "max_mil", "dsmil", "clam_sb", "clam_mb", "transmil", "ilra", "ibmil", "lbmil")


def built(case):
    note = dict(WHOLE.cases[case]["note"])
    make = getattr(baselines, note.pop("cls"))
    if make is baselines.IBMIL and "merge" in note:
        note["confounders"] = torch.zeros(5, 16)
    torch.manual_seed(0)
    model = make(12, note.pop("num_classes", 3), **note)
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    return model


@pytest.mark.parametrize("case", WHOLE.cases)
def test_the_authors_classes(case):
    model, state = built(case), WHOLE.state(case)
    label = torch.tensor([1 if case == "clam_two" else 2])

    def call(model, inputs):
        found = model(inputs["bags"])
        out = {"logits": found.logits}
        if isinstance(model, (baselines.DSMIL, baselines.CLAM)):
            out["loss"] = sum(model.loss(found, label).values())
        if isinstance(model, baselines.DSMIL):
            out["instances"] = found.instances
        if case == "ibmil_first":
            out["vector"] = model.vectors(inputs["bags"])
        return out

    marked = {k: torch.full_like(v, float(i), dtype=torch.float64) for i, (k, v) in enumerate(state.items())}
    if case.startswith("clam_mb"):  # rows of one map here, maps of their own there
        ours = model.convert_state_dict(marked)["head.weight"]
        assert len(ours[:, 0].unique()) == len(ours) == 3

        def rename(name):
            row = name.split(".")[1] if name.startswith("classifiers.") else ""
            return f"{name}!" if row else held(name)

        held = renamer(model.convert_state_dict, state)
        grads_by_row(model, state, call, rename)
        return
    rename = renamer(model.convert_state_dict, state)
    WHOLE.holds(case, model, model.convert_state_dict, call, rename)


def grads_by_row(model, state, call, rename):
    """As :meth:`Whole.holds`, of a model whose heads are rows of one map."""
    case = "clam_mb" if model.u is not None else "clam_mb_plain"

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def named_parameters(self, *args, **kwargs):
            for name, p in model.named_parameters():
                if name.startswith("head."):
                    for row in range(len(p)):
                        yield f"classifiers.{row}.{name[5:]}!", rows[name][row]
                else:
                    yield name, p

    model.double().eval()
    model.load_state_dict(model.convert_state_dict(state), strict=True)
    rows = {
        name: [p.detach()[i : i + 1].clone().requires_grad_() for i in range(len(p))]
        for name, p in model.named_parameters()
        if name.startswith("head.")
    }

    def run(_, inputs):
        whole = {name: torch.cat(parts) for name, parts in rows.items()}
        used = {**dict(model.named_parameters()), **whole}
        found = torch.func.functional_call(model, used, (inputs["bags"],))
        return {"logits": found.logits, "loss": sum(model.loss(found, torch.tensor([2])).values())}

    wrapped = Rows()
    wrapped.load_state_dict = lambda *args, **kwargs: None
    WHOLE.holds(case, wrapped, model.convert_state_dict, run, rename)


@pytest.mark.parametrize("name", NAMES)
def test_bags_of_a_batch_are_bags_alone(name):
    torch.manual_seed(0)
    small = {"ilra": dict(num_heads=2), "transmil": dict(num_heads=2, num_landmarks=4)}.get(name, {})
    model = attnlib.create_model(name, in_chans=6, num_classes=3, dim=8, **small).eval()
    x = torch.randn(3, 9, 6)
    valid = torch.ones(3, 9, dtype=torch.bool)
    valid[0, 4:] = False
    valid[2, :2] = False
    x[~valid] = math.nan
    x.requires_grad_()
    both = model(x, valid)
    for b in range(3):
        alone = model(x[b : b + 1, valid[b]])
        torch.testing.assert_close(both.logits[b], alone.logits[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(both.weights[b][:, valid[b]], alone.weights[0], rtol=1e-5, atol=1e-6)
        assert not both.weights[b][:, ~valid[b]].any()
        if alone.instances.shape[-1]:
            torch.testing.assert_close(both.instances[b][valid[b]], alone.instances[0], rtol=1e-5, atol=1e-6)
            assert both.instances[b][~valid[b]].isneginf().all()
    target = torch.tensor([2, 0, 1])
    losses = model.loss(both, target)
    sum(losses.values()).backward()
    assert bool(x.grad[valid].isfinite().all()) and not x.grad[~valid].any()
    torch.testing.assert_close(model.predict(x.detach(), valid).sum(-1), torch.ones(3))
    empty = model(torch.zeros(0, 4, 6))
    assert empty.logits.shape == (0, 3)
    for bad, match in (
        (dict(bags=torch.zeros(2, 0, 6)), "at least one instance"),
        (dict(bags=torch.zeros(2, 3, 5)), "bags"),
        (dict(bags=torch.zeros(2, 3, 6), valid=torch.zeros(2, 3, dtype=torch.bool)), "empty"),
    ):
        with pytest.raises(ValueError, match=match):
            model(**bad)
    with pytest.raises(ValueError, match="target"):
        model.loss(both, target[:2])
    with pytest.raises(ValueError, match="class"):
        model.loss(both, target + 1)


@pytest.mark.parametrize("case", ["maxmin", "max", "vector"])
def test_both_tiers_of_pseudo_bags(case):
    """One step of the release's training, of instances dealt out in the same order."""
    whole = Whole("acmil-dtfd")
    model = baselines.DTFD(12, 3, 16, **whole.cases[case]["note"])
    noise = drawn("noise", (1, whole.cases[case]["inputs"]["bags"][1]))

    def call(model, inputs):
        found = model(inputs["bags"], noise=noise)
        loss = sum(model.loss(found, torch.tensor([2])).values())
        return {"logits": found.logits, "groups": found.groups, "loss": loss}

    whole.holds(case, model, model.convert_state_dict, call, renamer(model.convert_state_dict, whole.state(case)))


def test_pseudo_bags():
    torch.manual_seed(0)
    model = attnlib.create_model("dtfd", in_chans=6, num_classes=3, dim=8)
    assert counted_params(model_entry("dtfd")) == model_entry("dtfd").params
    x, valid = torch.randn(2, 11, 6), torch.ones(2, 11, dtype=torch.bool)
    valid[0, 5:] = False
    x[~valid] = math.nan
    assert not model(x, valid).logits.equal(model(x, valid).logits)  # dealt out anew
    model.eval()
    both = model(x, valid)
    alone = [model(x[:1, :5]), model(x[1:])]
    torch.testing.assert_close(both.logits, torch.cat([a.logits for a in alone]))
    torch.testing.assert_close(both.groups, torch.cat([a.groups for a in alone]))
    terms = model.loss(both, torch.tensor([0, 2]))
    terms["bag"].backward()
    moved = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert moved == {"pool", "head"}  # nothing reaches the first tier
    torch.testing.assert_close(model.predict(x, valid).sum(-1), torch.ones(2))
    assert model(torch.zeros(0, 4, 6)).groups.shape == (0, 4, 3)
    for bad, match in (
        (dict(bags=torch.zeros(1, 3, 6)), "must hold 4 instances"),
        (dict(bags=torch.zeros(1, 5, 6), noise=torch.zeros(1, 4)), "noise must be"),
    ):
        with pytest.raises(ValueError, match=match):
            model(**bad)
    with pytest.raises(ValueError, match="target"):
        model.loss(both, torch.tensor([0]))


def test_counts_and_checkpoints():
    for name in NAMES:
        assert counted_params(model_entry(name)) == model_entry(name).params, name
    model = attnlib.create_model("clam_sb", in_chans=12, num_classes=3, dim=16)
    theirs = {f"module.{k}": v.float() for k, v in WHOLE.state("clam_sb").items()}
    load_pretrained(model, theirs)
    assert model.score.bias.equal(theirs["module.attention_net.3.attention_c.bias"])


def test_instances_of_bags_smaller_than_k():
    torch.manual_seed(0)
    model = attnlib.create_model("clam_mb", in_chans=6, num_classes=3, dim=8, bag_weight=0.25).eval()
    x = torch.randn(1, 3, 6)
    found = model(x)
    h = found.features[0]
    wanted = []
    for c, judge in enumerate(model.judges):
        answers = judge(h) if c != 1 else judge(torch.cat([h, h]))
        right = torch.zeros(3, dtype=torch.long) if c != 1 else torch.tensor([1, 1, 1, 0, 0, 0])
        wanted.append(F.cross_entropy(answers, right))
    terms = model.loss(found, torch.tensor([1]))
    torch.testing.assert_close(terms["instances"], 0.75 * sum(wanted) / 3)
    torch.testing.assert_close(terms["bag"], 0.25 * F.cross_entropy(found.logits, torch.tensor([1])))
    assert float(found.weights.detach().sum(-1).max()) < 1  # the branch of a class may look at nothing


def test_initial_values():
    torch.manual_seed(0)
    model = attnlib.create_model("clam_mb", in_chans=64, num_classes=40, dim=512)
    assert not model.embed.bias.any() and not model.head.bias.any()
    assert model.embed.weight.std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.05)
    assert model.head.weight.std().item() == pytest.approx((2 / 513) ** 0.5, rel=0.05)
    ilra = attnlib.create_model("ilra", in_chans=64)
    weight = ilra.layers[0]["down"].attention.out_proj.weight
    assert weight.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.05)
    assert ilra.layers[0]["down"].k.bias.any()
    assert attnlib.create_model("transmil").cls_token.std().item() == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("name", ["dsmil", "clam_sb"])
def test_they_find_the_instance_that_matters(name):
    torch.manual_seed(0)
    model = attnlib.create_model(name, in_chans=6, num_classes=2, dim=16)
    g = torch.Generator().manual_seed(0)

    def draw(count):
        x, target = torch.randn(count, 12, 6, generator=g), torch.arange(count) % 2
        x[target == 1, 3, 0] += 6.0
        return {"bags": x, "target": target}

    optimizers = Optimizers(lambda name, params: torch.optim.Adam(params, 1e-2))
    for _ in range(60):
        train_batch(model, draw(16), optimizers)
    model.eval()
    test = draw(64)
    assert (model.predict(test["bags"]).argmax(-1) == test["target"]).double().mean() > 0.9
