"""SDANet's neck against the authors' modules of all five levels, and in a detector."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from attnlib.models.detect.anchor_free import AnchorFreeDetector, DecoupledHead
from attnlib.models.detect.pan import PAN, CSPBackbone
from attnlib.models.detect.sdanet import SelectiveAttention, SelectiveNeck
from attnlib.nn.gates.global_context import GlobalContext
from tests.parity import synthetic
from tests.whole import Whole, renamer

PATH = Path(__file__).parents[1] / "fixtures" / "models" / "sdanet-pidray.safetensors"
with safe_open(PATH, "pt") as held:
    META = {k: json.loads(held.metadata()[k]) for k in ("shapes", "names", "sizes")}
    WANT = {k: held.get_tensor(k) for k in held.keys()}  # noqa: SIM118


def waves(*shape, seed=0.0):
    """Inputs of the recording."""
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(n * 0.37 + n**2 * 0.0113 + seed).view(shape)


def levels(*sizes, dim=8, count=2, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(count, *size, dim, generator=g, dtype=dtype) for size in sizes]


def small(level=1, dim=8, count=3):
    torch.manual_seed(0)
    return SelectiveAttention(level, dim, count, hidden=6, ratio=4).double().eval()


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_authors_modules(mode):
    neck = SelectiveNeck().double().train(mode == "train")
    state = {k: v.double() if v.is_floating_point() else v for k, v in synthetic(META["shapes"]).items()}
    neck.load_state_dict(SelectiveNeck.convert_state_dict(state), strict=True)
    xs = [waves(2, 256, *s, seed=float(i)).requires_grad_() for i, s in enumerate(META["sizes"])]
    ys = [y.permute(0, 3, 1, 2) for y in neck([x.permute(0, 2, 3, 1) for x in xs])]
    for i, y in enumerate(ys):
        torch.testing.assert_close(y[:, ::29], WANT[f"{mode}/y{i}"], rtol=1e-9, atol=1e-9)
    sum((y * waves(*y.shape, seed=5.0)).sum() for y in ys).backward()
    for i, x in enumerate(xs):
        torch.testing.assert_close(x.grad[:, ::29], WANT[f"{mode}/gx{i}"], rtol=1e-9, atol=1e-9)
    numbers = {n: float(i) for i, n in enumerate(META["names"])}
    named = {k: torch.full(s, numbers.get(k, -1.0)) for k, s in META["shapes"].items()}
    theirs = SelectiveNeck.convert_state_dict(named)
    for name, p in neck.named_parameters():
        i = int(theirs[name].flatten()[0])
        torch.testing.assert_close(p.grad.norm(), WANT[f"{mode}/norms"][i], rtol=1e-8, atol=1e-9)
        wave = torch.cos(torch.arange(p.numel(), dtype=torch.float64)).view_as(p)
        torch.testing.assert_close((p.grad * wave).sum(), WANT[f"{mode}/sums"][i], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(neck.refine[1].norm.running_mean, WANT[f"{mode}/mean"], rtol=0, atol=1e-9)


def test_parameters():
    with torch.device("meta"):
        neck = SelectiveNeck()
    assert sum(p.numel() for p in neck.refine[3].parameters()) == 207_387
    assert sum(p.numel() for p in neck.parameters()) == 1_036_935


def test_weights_over_levels_sum_to_1():
    m, maps = small(), levels((6, 5), (3, 3), (2, 1))
    channel, place = m.weights(m.gathered(maps))
    assert channel.shape == (2, 3, 1, 1, 8) and place.shape == (2, 3, 3, 3, 1)
    for w in (channel, place):
        torch.testing.assert_close(w.sum(1), torch.ones_like(w[:, 0]))
    for part in (*m.channel, *m.place):
        for p in part.parameters():
            nn.init.zeros_(p)
    gathered = m.gathered(maps)
    channel, place = m.weights(gathered)
    torch.testing.assert_close((gathered * channel).sum(1), gathered.mean(1))
    torch.testing.assert_close((gathered * place).sum(1), gathered.mean(1))


def test_levels_that_are_alike_stay_as_they_are():
    m, x = small(), levels((4, 5))[0]
    gathered = m.gathered([x, x, x])
    for w in m.weights(gathered):
        torch.testing.assert_close((gathered * w).sum(1), x)
    torch.testing.assert_close(m([x, x, x]), 3 * x)  # the context starts as the identity


def test_finer_levels_by_their_largest_and_coarser_ones_by_the_nearest():
    m, maps = small(), levels((7, 5), (3, 3), (2, 1))
    got = m.gathered(maps).permute(0, 1, 4, 2, 3)
    first = maps[0].permute(0, 3, 1, 2)
    torch.testing.assert_close(got[:, 0], F.adaptive_max_pool2d(first, (3, 3)))
    assert got[:, 1].equal(maps[1].permute(0, 3, 1, 2))
    assert got[:, 2, :, 0].equal(maps[2].permute(0, 3, 1, 2)[:, :, 0].expand(-1, -1, 3))


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_any_number_of_levels_keeps_their_grids(count):
    torch.manual_seed(0)
    maps = levels(*[(max(1, 17 >> i), max(1, 11 >> i)) for i in range(count)])
    neck = SelectiveNeck(8, count, hidden=6, ratio=4).double()
    made = neck(maps)
    assert [y.shape for y in made] == [x.shape for x in maps]
    sum(y.square().sum() for y in made).backward()
    last = neck.refine[-1].context.change[-1]
    assert last.weight.grad.any() and all(y.isfinite().all() for y in made)
    assert [y.shape[0] for y in neck.eval()([x[:0] for x in maps])] == [0] * count
    one = neck([x[:1] for x in maps])
    torch.testing.assert_close(one, [y[:1] for y in neck(maps)])


@pytest.mark.parametrize("case", ["att_both", "avg_mul", "avg_add"])
def test_contexts_that_multiply_and_plain_means(case):
    """mmdetection's ContextBlock, of which their neck has attention and addition."""
    whole = Whole("sdanet-context")
    note = whole.cases[case]["note"]
    model, rule = GlobalContext(16, 4, **note), GlobalContext.convert_state_dict

    def call(model, inputs):
        return {"y": model(inputs["x"].permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()}

    whole.holds(case, model, rule, call, renamer(rule, whole.state(case)))
    fresh, x = GlobalContext(16, 4, **note), torch.randn(2, 4, 5, 16)
    gain = 0.5 if "multiply" in note.get("fusion", ()) else 1.0
    torch.testing.assert_close(fresh(x), gain * x)
    valid = torch.ones(2, 4, 5, dtype=torch.bool)
    valid[:, 2:] = False
    x[:, 2:] = torch.nan
    trained = model.float()
    torch.testing.assert_close(trained(x, valid)[:, :2], trained(x[:, :2]))
    for wrong in ("add", (), ("sum",)):
        with pytest.raises(ValueError, match="fusion"):
            GlobalContext(16, fusion=wrong)


def test_global_context():
    torch.manual_seed(0)
    m, x = GlobalContext(8, 4).double(), levels((3, 4))[0]
    assert m(x).equal(x)
    for p in m.parameters():
        nn.init.normal_(p, std=0.5)
    a = torch.softmax(torch.einsum("bhwc,c->bhw", x, m.score.weight[0]).flatten(1), 1)
    c = torch.einsum("bn,bnc->bc", a, x.flatten(1, 2))
    torch.testing.assert_close(m(x), x + m.change(c)[:, None, None])
    valid = torch.rand(2, 3, 4) > 0.4
    valid[1] = False
    broken = x.masked_fill(~valid[..., None], float("nan")).requires_grad_()
    y = m(broken, valid)
    few = x[0][valid[0]][None]
    torch.testing.assert_close(y[0][valid[0]], m(few)[0])
    y.sum().backward()
    assert y[1].eq(0).all() and broken.grad.isfinite().all()
    with pytest.raises(ValueError, match=r"x must be a map \(B, \*grid, 8\)"):
        m(x[..., :3])


def test_work_is_linear_in_pixels():
    neck = SelectiveNeck(8, 3, hidden=6, ratio=4).eval()

    def flops(n):
        with FlopCounterMode(display=False) as counter:
            neck([torch.zeros(1, n // s, 32 // s, 8) for s in (1, 2, 4)])
        return counter.get_total_flops()

    assert flops(128) / flops(64) == pytest.approx(2, rel=0.05)


def test_in_a_detector():
    torch.manual_seed(0)
    dims = (8, 8, 16, 16, 16)
    neck = nn.Sequential(PAN(dims[2:]), SelectiveNeck(16, 3, hidden=8))
    model = AnchorFreeDetector(CSPBackbone(dims, (1, 1, 1, 1)), neck, DecoupledHead(dims[2:], 2))
    x = torch.rand(2, 3, 70, 45)
    target = [{"boxes": torch.tensor([[4.0, 4, 40, 36]]), "labels": torch.tensor([1])}] * 2
    sum(model.loss(model(x), target).values()).backward()
    for refine in neck[1].refine:
        assert refine.squeeze.weight.grad is not None and refine.context.change[-1].weight.grad.any()
    assert len(model.predict(x)) == 2
    again = copy.deepcopy(model).eval()
    torch.testing.assert_close(again(x).logits, model.eval()(x).logits)
    assert copy.deepcopy(model).bfloat16().eval()(x.bfloat16()).logits.isfinite().all()


def test_bad_input():
    m, maps = small(), levels((6, 5), (3, 3), (2, 1))
    with pytest.raises(ValueError, match="maps must be 3 maps"):
        m(maps[:2])
    with pytest.raises(ValueError, match="finest first"):
        m(maps[::-1])
    with pytest.raises(ValueError, match=r"maps\[1\] must be \(B, H, W, 8\)"):
        m([maps[0], maps[1][..., :3], maps[2]])
    with pytest.raises(ValueError, match="of one batch"):
        m([maps[0], maps[1][:1], maps[2]])
    with pytest.raises(ValueError, match="a pixel at least"):
        m([maps[0], maps[1][:, :0], maps[2]])
    with pytest.raises(ValueError, match="train on several images"):
        m.train()([x[:1] for x in maps])
    with pytest.raises(ValueError, match="level"):
        SelectiveAttention(5)
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        SelectiveAttention(0, kernel_size=4)
    with pytest.raises(ValueError, match="other"):
        SelectiveNeck.convert_state_dict({"selective_attention_0.other.weight": torch.zeros(1)})
