"""DEYOLO against the authors' classes: fusions, focused blocks, whole model, every term of the loss, all gradients."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

import attnlib
from attnlib.check import Case, check
from attnlib.models.build import load_pretrained, model_entry
from attnlib.models.detect.boxes import overlaps
from attnlib.models.detect.deyolo import DEYOLO, FocusedBlock, _focused, convert
from attnlib.nn.multimodal.deyolo import BiFocus, DualEnhancement, Focus, checkerboard, from_checkerboard
from attnlib.nn.released import Released
from tests.parity import synthetic
from tests.whole import Whole, renamer

PATH = Path(__file__).parents[1] / "fixtures" / "models" / "deyolo.safetensors"
with safe_open(PATH, "pt") as held:
    RUNS = json.loads(held.metadata()["runs"])
    WANT = {k: held.get_tensor(k) for k in held.keys()}  # noqa: SIM118
STEPS = 40
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
CLAIMS = ("validity", "batch", "gradient", "bfloat16", "copies", "inputs untouched", "no hidden state")
SIZES = {
    "deyolo_n": (6_154_300, 6_154_284), "deyolo_s": (22_972_636, 22_972_620), "deyolo_m": (48_817_468, 48_817_452),
    "deyolo_l": (78_428_060, 78_428_044), "deyolo_x": (122_412_476, 122_412_460),
}  # fmt: skip


def waves(*shape, seed=0.0):
    """Inputs of the recording."""
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(n * 0.37 + n**2 * 0.0113 + seed).view(shape)


def weights(case):
    state = {k: v.double() if v.is_floating_point() else v for k, v in synthetic(RUNS[case]["shapes"]).items()}
    for name in state:
        if "dfl" in name:
            state[name] = torch.arange(16, dtype=torch.float64).view(1, 16, 1, 1)
    return state


def gradients_hold(case, prefix, module, convert_names):
    """Norm and one projection of every gradient, under their names."""
    shapes = RUNS[case]["shapes"]
    names = [n for n in shapes if n.rpartition(".")[2] not in BUFFERS and n not in RUNS[case]["without"]]
    numbered = convert_names({n: torch.full(s, float(i)) for i, (n, s) in enumerate(shapes.items())})
    known = list(shapes)
    into = {known[int(v.flatten()[0])]: n for n, v in numbered.items()}
    ours = dict(module.named_parameters())
    assert set(into.values()) == set(module.state_dict())
    for i, name in enumerate(names):
        grad = ours[into[name]].grad
        torch.testing.assert_close(grad.norm(), WANT[f"{prefix}/norms"][i], rtol=1e-9, atol=1e-9)
        wave = torch.cos(torch.arange(grad.numel(), dtype=torch.float64)).view_as(grad)
        torch.testing.assert_close((grad * wave).sum(), WANT[f"{prefix}/sums"][i], rtol=1e-9, atol=1e-8)
    for name in RUNS[case]["without"]:
        assert ours[into[name]].grad is None


# ---- the parts


@pytest.mark.parametrize("case", ["bifocus", "c2f", "c2f_eval", "dea"])
def test_parts_of_other_widths_groups_and_sides(case):
    """Their BiFocus(8, 12), C2f_BiFocus(8, 12, 2, True, 2, .7) and (8, 16, 1, False, 4, .25), DEA of other kernels."""
    module = {
        "bifocus": lambda: BiFocus(8, out_dim=12),
        "c2f": lambda: FocusedBlock(8, 2, True, out_dim=12, groups=2, expansion=0.7),
        "c2f_eval": lambda: FocusedBlock(8, 1, out_dim=16, groups=4, expansion=0.25),
        "dea": lambda: DualEnhancement(8, 12, 4, first=(3, 2), sides=(5, 3)),
    }[case]()
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.eps, part.momentum = 1e-5, 0.1

    def call(module, inputs):
        out = module(*(x.permute(0, 2, 3, 1) for x in inputs.values()))
        y = DualEnhancement.merge(*out) if len(inputs) == 2 else out
        return {"y": y.permute(0, 3, 1, 2).contiguous()}

    whole, rule = Whole("deyolo-forms"), module.convert_state_dict
    whole.holds(case, module, rule, call, renamer(rule, whole.state(case)))


def test_blocks_need_channels_in_between():
    with pytest.raises(ValueError, match="leaves no channels"):
        FocusedBlock(4, expansion=0.1)
    with pytest.raises(ValueError, match="groups"):
        FocusedBlock(6, groups=2)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("case", ["dea", "dea small", "dea 30", "bifocus", "c2f"])
def test_parts_are_the_authors(case, mode):
    dim, size = RUNS[case]["dim"], RUNS[case]["size"]
    if case.startswith("dea"):
        module = DualEnhancement(dim, 30 if "30" in case else 20, reduction=4 if "30" in case else 16)
        rename = DualEnhancement.convert_state_dict
        xs = [waves(2, dim, *size, seed=float(i)).requires_grad_() for i in range(2)]
    else:
        focus = BiFocus(dim) if case == "bifocus" else None
        module = focus or attnlib.models.detect.deyolo.FocusedBlock(dim)
        for part in module.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.eps, part.momentum = 1e-5, 0.1

        def rename(state):
            if focus is not None:
                theirs = Released(state, "BiFocus")
                return theirs.close(theirs.renamed(BiFocus.rules()))
            theirs = Released({f"2.{k}": v for k, v in state.items()}, "C2f_BiFocus", wrappers=())
            made = theirs.close(theirs.renamed(_focused("2", "b")))
            return {k.removeprefix("b.0."): v for k, v in made.items()}

        xs = [waves(2, dim, *size).requires_grad_()]
    module = module.double().train(mode == "train")
    module.load_state_dict(rename(weights(case)), strict=True)
    out = module(*(x.permute(0, 2, 3, 1) for x in xs))
    y = (DualEnhancement.merge(*out) if len(xs) == 2 else out).permute(0, 3, 1, 2)
    torch.testing.assert_close(y[:, ::3, ::3, ::2], WANT[f"{case}/{mode}/y"], rtol=0, atol=1e-9)
    (y * waves(*y.shape, seed=5.0)).sum().backward()
    for i, x in enumerate(xs):
        torch.testing.assert_close(x.grad[:, ::3, ::3, ::2], WANT[f"{case}/{mode}/gx{i}"], rtol=0, atol=1e-9)
    gradients_hold(case, f"{case}/{mode}", module, rename)


@pytest.mark.parametrize(("dim", "size", "count"), [(64, 80, 86_900), (256, 80, 1_238_132), (512, 40, 4_845_684),
                                                    (1024, 20, 19_190_900)])  # fmt: skip
def test_parameters_of_fusions(dim, size, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in DualEnhancement(dim, size).parameters()) == count
    convs = DualEnhancement(16, 20).pyramid.convs
    assert all(c.bias is not None and c.groups == 16 for c in convs) and [c.stride[0] for c in convs] == [5, 4, 1]


def test_parameters_of_bifocus():
    assert sum(p.numel() for p in BiFocus(64).parameters()) == 162_496


def test_swapped_streams_with_swapped_weights_swap_the_gates():
    torch.manual_seed(0)
    m = DualEnhancement(16, 20).double().eval()
    v, i = torch.randn(2, 1, 9, 7, 16, dtype=torch.float64)
    other = copy.deepcopy(m)
    for name in ("near", "far", "place", "shared"):
        getattr(other, name).load_state_dict(
            {f"{1 - int(k[0])}{k[1:]}": t for k, t in getattr(m, name).state_dict().items()}
        )
    w = m.joint.conv.weight.data
    other.joint.conv.weight.data = torch.cat([w[:, 16:], w[:, :16]], 1)
    for a, b in zip(m(v, i), other(i, v)[::-1], strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(m.channel_gates(v, i), other.channel_gates(i, v)[::-1], strict=True):
        torch.testing.assert_close(a, b)


def test_nothing_visible_stays_nothing_and_merged_maps_lie_in_0_to_1():
    torch.manual_seed(0)
    m = DualEnhancement(16, 20).eval()
    v, i = torch.rand(2, 2, 21, 22, 16)
    assert m(torch.zeros_like(v), i)[0].eq(0).all()
    merged = m.merge(*m(v, i))
    assert merged.ge(0.5).all() and merged.lt(1).all()
    merged = m.merge(*m(v - 0.5, i - 0.5))
    assert merged.gt(0).all() and merged.lt(1).all()


def test_the_pyramid_takes_larger_maps_unless_the_authors_way_is_asked_for():
    torch.manual_seed(0)
    m = DualEnhancement(16, 20).eval()
    x = torch.randn(1, 40, 45, 16)
    assert m(x, x)[0].shape == x.shape
    cells = m.pyramid(x)
    assert cells.shape == (1, 2, 2, 16)
    torch.testing.assert_close(m._summary(x, None), cells.mean((1, 2), keepdim=True))
    torch.testing.assert_close(m._summary(x[:, :19], None), x[:, :19].mean((1, 2), keepdim=True))
    theirs = DualEnhancement(16, 20, compat="authors").eval()
    with pytest.raises(ValueError, match=r"fewer than 40 pixels a side where size=20, got \(40, 45\)"):
        theirs(x, x)
    before = DualEnhancement(16, 20, pooling="before").eval()
    before.load_state_dict(m.state_dict())
    same = x[:, :20, :20]
    torch.testing.assert_close(before(same, same), m(same, same))
    before.train()(x[:, :5, :4], x[:, :5, :4])[0].sum().backward()
    assert all(p.grad is not None for p in before.pyramid.parameters())  # small maps train it, too


@pytest.mark.parametrize("axis", [1, 2])
def test_checkerboards_come_back(axis):
    x = torch.arange(2 * 4 * 6 * 3.0).view(2, 4, 6, 3)
    first, second = checkerboard(x, axis)
    assert from_checkerboard(first, second, axis).equal(x)
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    even = ((rows + columns) % 2 == 0)[None, :, :, None].expand_as(x)
    assert set(first.flatten().tolist()) == set(x[even].tolist())
    focus = Focus(3, axis, 1, activation=torch.nn.Identity).eval()
    for conv in focus.convs:
        torch.nn.init.dirac_(conv.conv.weight)
        conv.norm.eps = 0.0
    for size in ((4, 6), (5, 7), (1, 1)):
        y = torch.randn(2, *size, 3)
        assert focus(y).equal(y)


def test_claims():
    case = Case("deyolo", dict(dim=16, size=20), (4, 5), streams=((4, 5, 16), (4, 5, 16)))
    report = check(case, kind="fusion", brief=True, select=CLAIMS)
    assert report.ok, str(report)


def test_pixels_that_do_not_exist_change_nothing():
    torch.manual_seed(0)
    m = DualEnhancement(16, 20).train()
    a, b = torch.randn(2, 2, 6, 5, 16)
    valid = [torch.rand(2, 6, 5) > 0.3 for _ in range(2)]
    other = [x.masked_fill(~v[..., None], float("nan")) for x, v in zip((a, b), valid, strict=True)]
    torch.testing.assert_close(m(*other, valid=valid), m(a, b, valid=valid))


def test_cost_is_linear_in_pixels():
    m = DualEnhancement(16, 20).eval()

    def flops(n):
        with FlopCounterMode(display=False) as counter:
            m(torch.zeros(1, n, 40, 16), torch.zeros(1, n, 40, 16))
        return counter.get_total_flops()

    assert flops(80) / flops(40) == pytest.approx(2, rel=0.01)


def test_bad_input_of_fusions():
    m, x = DualEnhancement(16, 20), torch.zeros(1, 4, 5, 16)
    with pytest.raises(ValueError, match=r"one batch and one grid \(B, H, W\), got \(1, 4, 5\) and \(1, 5, 4\)"):
        m(x, x.mT.reshape(1, 5, 4, 16))
    for wrong in (x[..., :3], x[0], x.long()):
        with pytest.raises(ValueError, match=r"infrared must be a map \(B, H, W, 16\)"):
            m(x, wrong)
    with pytest.raises(ValueError, match="visible and infrared are needed"):
        m(x)
    with pytest.raises(ValueError, match="first must be two sides"):
        DualEnhancement(16, 10)
    with pytest.raises(ValueError, match="pools nothing before"):
        DualEnhancement(16, 20, pooling="before", compat="authors")
    with pytest.raises(ValueError, match="two odd numbers"):
        DualEnhancement(16, 20, sides=(3, 4))
    for call, said in (
        (lambda: checkerboard(x[:, :3], 1), "even side along axis=1"),
        (lambda: checkerboard(x, 3), "axis=3"),
        (lambda: checkerboard(x[0], 1), r"x must have shape \(B, H, W, C\)"),
        (lambda: from_checkerboard(x, x[:, :3], 1), "first and second must be of one shape"),
        (lambda: Focus(0, 1), "dim must be"),
    ):
        with pytest.raises(ValueError, match=said):
            call()


# ---- the model


@pytest.mark.parametrize("case", ["single", "double"])
def test_the_authors_model(case):
    run = RUNS[case]
    model = DEYOLO(5, 0.0625, run["depth"], sides=(20, 20, 20)).double()
    for i, bias in enumerate(run["bias"]):
        assert model.head.classes[i][-1].bias[0].item() == pytest.approx(bias, rel=1e-6)
    assert all(m.eps == 1e-3 and m.momentum == 0.03 for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))

    def rename(state):
        return convert(state, model)

    model.load_state_dict(rename(weights(case)), strict=True)
    x, infrared = ((0.5 + 0.5 * waves(2, 3, 160, 192, seed=s)).requires_grad_() for s in (0.0, 1.0))
    made = model.eval()(x, infrared)
    boxes = torch.cat([(made.boxes[..., :2] + made.boxes[..., 2:]) / 2, made.boxes[..., 2:] - made.boxes[..., :2]], -1)
    y = torch.cat([boxes, made.logits.sigmoid()], -1).mT[:, :, ::17]
    torch.testing.assert_close(y, WANT[f"{case}/eval"], rtol=0, atol=1e-9)
    batch, size = run["batch"], torch.tensor([192.0, 160, 192, 160], dtype=torch.float64)
    target = []
    for i in range(2):
        own = [j for j, which in enumerate(batch["batch_idx"]) if which == i]
        c = torch.tensor([batch["bboxes"][j] for j in own], dtype=torch.float64).view(-1, 4) * size
        corners = torch.cat([c[:, :2] - c[:, 2:] / 2, c[:, :2] + c[:, 2:] / 2], -1)
        target.append({"boxes": corners, "labels": torch.tensor([int(batch["cls"][j]) for j in own]).long()})
    if case == "double":
        assert len(target[0]["labels"]) == 0  # an image without objects
    model.train()
    terms = model.loss(model(x, infrared), target)
    for name, want in zip(("box", "class", "distribution"), WANT[f"{case}/items"], strict=True):
        torch.testing.assert_close(terms[name], want, rtol=1e-9, atol=1e-9)
    (2 * sum(terms.values())).backward()  # theirs is times the number of images
    for image, name in ((x, "gx"), (infrared, "gx2")):
        torch.testing.assert_close(image.grad[:, :, ::37, ::41], WANT[f"{case}/{name}"], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(model.fusions[0].joint.norm.running_mean, WANT[f"{case}/mean"], rtol=0, atol=1e-9)
    gradients_hold(case, case, model, rename)


@pytest.mark.parametrize("name", SIZES)
def test_parameters_of_the_published_configurations(name):
    with torch.device("meta"):
        model = attnlib.create_model(name)
    total = sum(p.numel() for p in model.parameters())
    assert (total, sum(p.numel() for p in model.parameters() if p.requires_grad)) == SIZES[name]
    assert model_entry(name).params == total and model_entry(name).task == "detect"


def small(**settings):
    torch.manual_seed(0)
    return attnlib.create_model("deyolo_n", **{**dict(width=0.125, num_classes=3, sides=(20, 20, 20)), **settings})


def images(*size, count=2, **kind):
    g = torch.Generator().manual_seed(1)
    return [torch.rand(count, 3, *size, generator=g).to(**kind) for _ in range(2)]


@pytest.mark.parametrize("size", [(33, 47), (64, 32), (1, 1), (161, 330)])
def test_any_size(size):
    model = small().eval()
    made = model(*images(*size))
    rows = [(-(-size[0] // s), -(-size[1] // s)) for s in (8, 16, 32)]
    assert made.logits.shape == (2, sum(a * b for a, b in rows), 3) and made.boxes.isfinite().all()
    one = model(*(x[:1] for x in images(*size)))
    torch.testing.assert_close(one.logits, made.logits[:1], rtol=1e-4, atol=1e-4)
    found = model.train().predict(*images(*size), threshold=0.0, most=5)
    assert model.training and len(found) == 2 and all(len(f.boxes) <= 5 for f in found)
    for f in found:
        assert f.boxes.ge(0).all() and f.boxes[:, 2].le(size[1]).all() and f.boxes[:, 3].le(size[0]).all()
        assert f.scores.diff().le(0).all()


def test_states_copies_precision_and_export():
    model = small().eval()
    x = images(40, 56)
    again = small().eval()
    load_pretrained(again, copy.deepcopy(model).state_dict())
    torch.testing.assert_close(again(*x).logits, model(*x).logits)
    half = copy.deepcopy(model).to(torch.bfloat16)(*(t.bfloat16() for t in x))
    assert half.logits.dtype == torch.bfloat16 and half.boxes.dtype == torch.float32
    target = [{"boxes": torch.tensor([[3.0, 5.0, 30.0, 21.0]]), "labels": torch.tensor([2])}] * 2
    assert all(t.isfinite() and t.dtype == torch.float32 for t in model.loss(half, target).values())
    assert model(*(t[:0] for t in x)).logits.shape[0] == 0 and model.predict(*(t[:0] for t in x)) == []
    assert model.loss(model(*(t[:0] for t in x)), [])["class"] == 0
    torch.testing.assert_close(
        model(*(t.contiguous(memory_format=torch.channels_last) for t in x)).logits, model(*x).logits,
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip
    other = small(in_chans=3, infrared_chans=1).eval()
    assert other(x[0], x[1][:, :1]).logits.shape == model(*x).logits.shape
    torch.testing.assert_close(attnlib.deploy(model)(*x).logits, model(*x).logits, rtol=1e-4, atol=1e-4)


def test_bad_input():
    model, x = small(), images(32, 32)
    with pytest.raises(ValueError, match="x and infrared must be of one batch and size"):
        model(x[0], x[1][..., :16])
    with pytest.raises(ValueError, match=r"infrared must be images \(B, 3, H, W\)"):
        model(x[0], x[1][:, :1])
    with pytest.raises(ValueError, match="a pixel at least"):
        model(x[0][..., :0], x[1][..., :0])
    with pytest.raises(ValueError, match="sides must be three"):
        small(sides=(20, 20))
    with pytest.raises(ValueError, match="width must be a finite number above 0, got -1"):
        small(width=-1)
    state = weights("single")
    with pytest.raises(ValueError, match=r"one\.of\.mine"):
        convert({**state, "model.one.of.mine": torch.zeros(1)}, model)
    with pytest.raises(TypeError, match="mapping"):
        convert(3, model)


def test_it_learns_what_only_one_of_the_images_shows():
    """Trained a few seconds: an object shows in one image of two, and is found in pairs that were not trained on."""
    torch.manual_seed(0)
    model = DEYOLO(2, 0.0625, 0.1, sides=(20, 20, 20), assignment={"beta": 1.0}).train()
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.momentum = 0.2  # a few steps have to do
    g = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)

    def batch(count):
        pair = 0.2 * torch.rand(2, count, 3, 32, 32, generator=g)
        target = []
        for i in range(count):
            x, y = (int(v) for v in torch.randint(0, 17, (2,), generator=g))
            pair[i % 2, i, :, y : y + 16, x : x + 16] += 0.8
            target.append({"boxes": torch.tensor([[x, y, x + 16.0, y + 16.0]]), "labels": torch.tensor([i % 2])})
        return pair, target

    for _ in range(STEPS):
        pair, target = batch(8)
        optimizer.zero_grad()
        sum(model.loss(model(*pair), target).values()).backward()
        optimizer.step()
    pair, target = batch(32)
    hits = [0, 0]
    for found, want in zip(model.predict(*pair, threshold=0.01, most=1), target, strict=True):
        kind = int(want["labels"])
        good = len(found.boxes) and overlaps(found.boxes, want["boxes"])[0].max() > 0.4
        hits[kind] += bool(good) and int(found.labels) == kind
    assert min(hits) >= 5, hits  # of 16
