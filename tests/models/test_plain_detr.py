"""Plain DETR: the authors' decoder and matcher, recorded; what its card asks; a detector that learns."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from attnlib.models.detect import boxes as B
from attnlib.models.detect.plain_detr import Decoder, PlainDETR, decoder_state, focal_loss, matching_cost
from attnlib.nn.dense.plain_detr import BoxAttention

FIXTURE = Path(__file__).parents[1] / "fixtures" / "plain-detr.safetensors"
with safe_open(FIXTURE, "pt") as f:
    T = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    META = f.metadata()
CONFIG = json.loads(META["config"])
GRID, SIZE = (3, 4), (24, 32)


def under(prefix):
    return {k[len(prefix) + 1 :]: v for k, v in T.items() if k.startswith(prefix + "/")}


def close(a, b, what=""):
    assert a.shape == b.shape and float((a.detach() - b.detach()).abs().max()) <= 1e-5 * max(
        1.0, float(b.detach().abs().max())
    ), what


@pytest.mark.parametrize("case", CONFIG)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_decoder_equals_the_authors(case, dtype):
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in under(case).items() if "/" not in k}
    m = Decoder(**CONFIG[case])
    m.load_state_dict(decoder_state(under(f"{case}/sd")))
    m = m.to(dtype)
    pixels = torch.tensor([SIZE[1], SIZE[0]] * 2, dtype=dtype)
    x, context = given["x"].requires_grad_(), given["m"].unflatten(1, GRID).requires_grad_()
    first = B.to_corners(given["centres"] * pixels)
    out = m(
        x, first, context, SIZE, given["pos"], given["mp"].unflatten(1, GRID), ~given["pad"].unflatten(1, GRID),
        given["apart"],
    )  # fmt: skip
    close(torch.stack(out.hidden), given["hs"], "hidden")
    close(B.to_centres(torch.stack(out.boxes)), given["refs"], "boxes")
    loss = (torch.stack(out.hidden) * given["gy"]).sum()
    if CONFIG[case]["look_twice"]:  # theirs hands out what the next layer starts from, with this layer's gradient
        starts = [*out.before[1:], m.move(out.before[-1].detach(), out.deltas[-1], SIZE)]
        loss = loss + (B.to_centres(torch.stack(starts)) * given["gr"]).sum()
    loss.backward()
    if dtype == torch.float64:
        close(x.grad, given["dx"], "dx")
        close(context.grad.flatten(1, 2), given["dm"], "dm")
        theirs = {k: v for k, v in under(f"{case}/dw").items()}
        every = {k: theirs.get(k, torch.zeros_like(v)) for k, v in under(f"{case}/sd").items()}
        for name, grad in decoder_state(every).items():
            own = dict(m.named_parameters())[name].grad
            close(torch.zeros_like(grad) if own is None else own, grad.to(dtype), name)


@pytest.mark.parametrize("kind", ["l1", "reparam"])
def test_the_matching_cost_equals_the_authors(kind):
    one = torch.ones(4)
    boxes, truth = B.to_corners(T["match/centres"]), B.to_corners(T["match/truth"])
    moved = (boxes, T["match/deltas"]) if kind == "reparam" else None
    cost = matching_cost(T["match/logits"], boxes, T["match/labels"], truth, one, moved)
    close(cost, T[f"match/{kind}"][0] if T[f"match/{kind}"].dim() == 3 else T[f"match/{kind}"])


def attention(**settings):
    torch.manual_seed(0)
    return BoxAttention(16, 2, **{"hidden": 8, "stride": 8, **settings}).double()


def inputs(seed=1):
    g = torch.Generator().manual_seed(seed)
    first = torch.rand(2, 5, 2, generator=g, dtype=torch.float64) * 20
    boxes = torch.cat([first, first + torch.rand(2, 5, 2, generator=g, dtype=torch.float64) * 12], -1)
    return (
        torch.randn(2, 5, 16, generator=g, dtype=torch.float64),
        boxes,
        torch.randn(2, 3, 4, 16, generator=g, dtype=torch.float64),
    )


def test_without_a_bias_it_is_plain_cross_attention():
    m, (x, boxes, context) = attention(hidden=0), inputs()
    flat = context.flatten(1, 2)
    q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in (m.q(x), m.k(flat), m.v(flat)))
    weights = (q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1)
    assert torch.allclose(m(x, boxes, context), m.proj((weights @ v).transpose(1, 2).flatten(2)))
    assert not torch.allclose(attention()(x, boxes, context), m(x, boxes, context))


@pytest.mark.parametrize("distance", ["linear", "log"])
def test_the_bias_is_a_sum_over_axes_and_moves_with_the_boxes(distance):
    m, (_, boxes, _) = attention(distance=distance), inputs()
    bias = m.axis_bias(boxes, (3, 4)).dense().unflatten(-1, (3, 4))
    gaps = bias - bias[..., :1]
    assert torch.allclose(gaps, gaps[..., :1, :].expand_as(gaps))  # B(r, c) - B(r, 0) does not depend on r
    shifted = m.axis_bias(boxes + 8.0, (4, 5)).dense().unflatten(-1, (4, 5))
    assert torch.allclose(shifted[..., 1:, 1:], bias)


def test_padding_is_left_out_or_keeps_a_trace():
    x, boxes, context = inputs()
    valid = torch.ones(2, 3, 4, dtype=torch.bool)
    valid[:, 2:] = False
    m = attention()
    cut = m(x, boxes, context[:, :2])
    assert torch.allclose(m(x, boxes, context, context_valid=valid), cut)
    near = attention(compat="authors")(x, boxes, context, context_valid=valid)
    assert torch.allclose(near, cut) and not torch.equal(near, cut)
    none = torch.zeros(2, 3, 4, dtype=torch.bool)
    assert torch.equal(m(x, boxes, context, context_valid=none), m.proj(torch.zeros_like(x)))


def test_boxes():
    _, boxes, _ = inputs()
    assert torch.allclose(B.to_corners(B.to_centres(boxes)), boxes)
    assert torch.allclose(B.apply_deltas(B.to_centres(boxes), torch.zeros_like(boxes)), boxes)
    g = torch.Generator().manual_seed(0)
    wild = B.apply_deltas(B.to_centres(boxes), 20 * torch.randn(boxes.shape, generator=g, dtype=boxes.dtype))
    assert (wild[..., 2:] > wild[..., :2]).all()
    kept = B.apply_deltas(B.to_centres(boxes), 20 * torch.ones_like(boxes), (24.0, 32.0))
    assert (kept >= 0).all() and (kept[..., 0::2] <= 32).all() and (kept[..., 1::2] <= 24).all()
    deltas = B.deltas_between(B.to_centres(boxes), B.to_centres(boxes.flip(1)), margin=0.0)
    assert torch.allclose(B.apply_deltas(B.to_centres(boxes), deltas), boxes.flip(1))
    iou, generalized = B.overlaps(boxes[0], boxes[0])
    assert torch.allclose(iou.diagonal(), torch.ones(5, dtype=torch.float64))
    assert (generalized <= iou + 1e-12).all() and (generalized >= -1).all()
    apart = torch.tensor([[0.0, 0.0, 1.0, 1.0], [3.0, 0.0, 4.0, 1.0]])
    assert B.overlaps(apart, apart)[1][0, 1] == pytest.approx(-0.5)
    assert [t.tolist() for t in B.match(torch.tensor([[1.0, 5.0], [0.0, 9.0], [2.0, 2.0]]))] == [[1, 2], [0, 1]]


class Encoder(nn.Module):
    feature_info = [{"num_chs": 16, "reduction": 8}]

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.ReLU(), nn.Conv2d(16, 16, 2, 2))

    def forward(self, x):
        return [self.conv(x)]


def detector(**settings):
    torch.manual_seed(0)
    return PlainDETR(
        Encoder(), 2, **{**dict(dim=32, num_heads=4, hidden=32, depth=2, queries=4, box_hidden=16), **settings}
    )


def picture():
    images = torch.zeros(2, 3, 32, 40)
    images[0, 0, 4:20, 8:24], images[1, 1, 10:30, 2:12] = 1.0, 1.0
    truth = [[8.0, 4.0, 24.0, 20.0], [2.0, 10.0, 12.0, 30.0]]
    return images, [dict(boxes=torch.tensor([t]), labels=torch.tensor([i])) for i, t in enumerate(truth)]


@pytest.mark.parametrize("settings", [dict(many=6, repeats=2), dict(reparam=False, norm="post", look_twice=True)])
def test_a_detector_learns_two_pictures(settings):
    m, (images, targets) = detector(**settings), picture()
    optimizer = torch.optim.AdamW(m.parameters(), lr=3e-3)
    for _ in range(120):
        loss = sum(m.loss(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    m.eval()
    for found, target in zip(m.predict(images, top=1), targets, strict=True):
        assert found.labels.tolist() == target["labels"].tolist()
        assert float(B.overlaps(found.boxes, target["boxes"])[0]) > 0.7


def test_further_queries_do_not_see_the_others():
    m, (images, _) = detector(many=5).train(), picture()
    logits = m.decode(images).logits
    with torch.no_grad():
        m.query[4:] = m.query[4:].flip(-1)
        after = m.decode(images).logits
    assert logits[-1].shape[1] == 9
    assert torch.allclose(logits[-1][:, :4], after[-1][:, :4]) and not torch.allclose(
        logits[-1][:, 4:], after[-1][:, 4:]
    )
    assert m.eval().decode(images).logits[-1].shape[1] == 4


def test_focal_loss_is_the_formula():
    x, t = torch.randn(5, 3, dtype=torch.float64), torch.tensor([[1.0, 0.0, 1.0]] * 5, dtype=torch.float64)
    p = x.sigmoid()
    expected = -t * 0.25 * (1 - p) ** 2 * p.log() - (1 - t) * 0.75 * p**2 * (1 - p).log()
    assert torch.allclose(focal_loss(x, t), expected)


def told(box, label):
    return detector().loss(picture()[0], [dict(boxes=torch.tensor([box]), labels=torch.tensor([label]))] * 2)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: attention()(inputs()[0], inputs()[1].flip(-1), inputs()[2]), "second corner lies before its first"),
        (lambda: attention()(inputs()[0], inputs()[1][:, :2], inputs()[2]), "boxes must be"),
        (lambda: attention()(inputs()[0], inputs()[1], inputs()[2].flatten(1, 2)), "context"),
        (lambda: attention(distance="square"), "distance"),
        (lambda: BoxAttention(16, 3), "num_heads"),
        (lambda: detector().loss(picture()[0], picture()[1][:1]), "targets must be one for each"),
        (lambda: told([0.0, 0, 50, 5], 0), "outside the image"),
        (lambda: told([9.0, 0, 5, 5], 0), "turned over"),
        (lambda: told([0.0, 0, 5, 5], 2), "possible: 0 to 1"),
        (lambda: detector(dim=30), "dim=30 must be a multiple of 4"),
        (lambda: PlainDETR(nn.Linear(2, 2), 3), "feature_info"),
        (lambda: B.match(torch.tensor([[float("nan")]])), "finite"),
        (lambda: decoder_state({"layers.0.wrong": torch.zeros(1)}), "wrong"),
    ],
)  # fmt: skip
def test_bad_input(call, says):
    with pytest.raises((TypeError, ValueError), match=says):
        call()
