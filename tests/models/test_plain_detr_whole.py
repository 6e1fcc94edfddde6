"""Plain DETR with proposed boxes: the authors' whole detector and its training loss, recorded; padding; bad input."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from attnlib.models.detect import boxes as B
from attnlib.models.detect.plain_detr import PlainDETR, Proposals, detector_state, waves
from tests.parity import synthetic

FIXTURE = Path(__file__).parents[1] / "fixtures" / "plain-detr-whole.safetensors"
with safe_open(FIXTURE, "pt") as f:
    T = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    CONFIG = json.loads(f.metadata()["config"])


class Net(nn.Module):
    """The encoder of the recordings: means of cells, a 1 x 1 convolution, tanh."""

    def __init__(self, stride, width):
        super().__init__()
        self.feature_info = [{"num_chs": width, "reduction": stride}]
        self.conv = nn.Conv2d(3, width, 1)

    def forward(self, x):
        return [self.conv(F.avg_pool2d(x, self.feature_info[0]["reduction"])).tanh()]


def encoder_state(held):
    return {f"conv.{name}": value for name, value in held.items()}


def weights(case):
    out = synthetic(CONFIG[case]["shapes"])
    for name in out:
        if "bbox_embed" in name:
            out[name] = out[name] * 0.4
        if name.startswith("class_embed") and name.endswith("bias"):
            out[name] = out[name] - 2
    return out


def build(case, **changes):
    config = CONFIG[case]
    m = PlainDETR(Net(config["stride"], config["width"]), 3, **{**config["settings"], **changes})
    m.load_state_dict(detector_state(weights(case), m, encoder_state))
    return m


def close(a, b, what):
    scale = max(1.0, float(b.abs().max()))
    assert a.shape == b.shape and float((a.detach().double() - b.double()).abs().max()) <= 1e-5 * scale, what


@pytest.mark.parametrize("case", CONFIG)
def test_the_whole_detector_and_its_loss_equal_the_authors(case):
    m, (height, width) = build(case).double().train(), CONFIG[case]["size"]
    images = F.interpolate(T[f"{case}/x"].double(), (height, width)).requires_grad_()
    valid = ~F.interpolate(T[f"{case}/mask"].unsqueeze(1).double(), (height, width))[:, 0].bool()
    found = m.decode(images, valid)
    many = m.queries + m.many
    assert found.logits[0].shape[1] == many
    pixels = B.spans(torch.stack([valid[:, :, 0].sum(1), valid[:, 0].sum(1)], -1), images)
    scale = 1.0 if m.decoder.reparam else pixels
    for i, (logits, boxes) in enumerate(zip(found.logits, found.decoded.boxes, strict=True)):
        close(logits[:, : m.queries], T[f"{case}/logits/{i}"], f"logits {i}")
        close((B.to_centres(boxes) / scale)[:, : m.queries], T[f"{case}/at/{i}"], f"boxes {i}")
    close(found.proposed.logits, T[f"{case}/first/logits"], "proposed logits")
    close(B.to_centres(found.proposed.boxes) / scale, T[f"{case}/first/at"], "proposed boxes")
    targets = [dict(boxes=T[f"{case}/boxes/{i}"].double(), labels=T[f"{case}/labels/{i}"]) for i in range(2)]
    loss = m.loss(images, targets, valid)
    for name, value in loss.items():
        close(value, T[f"{case}/loss/{name}"], name)
    sum(loss.values()).backward()
    step = CONFIG[case]["stride"]
    there = ~T[f"{case}/mask"].unsqueeze(1).bool()  # padding is zeros here, and has no gradient
    close(F.avg_pool2d(images.grad, step) * step**2, T[f"{case}/dx"] * there, "dx")
    recorded = {k.removeprefix(f"{case}/dw/"): v for k, v in T.items() if k.startswith(f"{case}/dw/")}
    unknown = {k: torch.full(s, torch.nan) for k, s in CONFIG[case]["shapes"].items()}
    converted = detector_state({**unknown, **recorded}, m, encoder_state)
    own = {name: p.grad for name, p in m.named_parameters()}
    compared = 0
    for name, expected in converted.items():
        if not expected.isnan().any():
            compared += 1
            close(own[name], expected, name)
    assert compared == len(recorded) >= 6


@pytest.mark.parametrize("case", CONFIG)
def test_pixels_that_do_not_exist_change_nothing(case):
    m, (height, width) = build(case, compat=None).eval(), CONFIG[case]["size"]
    images = F.interpolate(T[f"{case}/x"], (height, width))
    valid = ~F.interpolate(T[f"{case}/mask"].unsqueeze(1).float(), (height, width))[:, 0].bool()
    expected = m(images, valid)
    for junk in (7.0, torch.nan):
        for a, b in zip(m(images.masked_fill(~valid.unsqueeze(1), junk), valid), expected, strict=True):
            assert torch.equal(a, b)
    whole = m(images[:1])
    assert torch.allclose(whole[1], expected[1][:1], atol=1e-3)
    assert bool((expected[1] >= 0).all()) or not m.decoder.reparam


@pytest.mark.parametrize("case", ["reparam", "sigmoid"])
def test_without_changes_the_best_proposals_stand_around_tokens(case):
    torch.manual_seed(0)
    reparam = case == "reparam"
    m = Proposals(8, 2, 16, (8, 16, 32), reparam).double()
    found = m(torch.randn(1, 6, 8, 8, dtype=torch.float64), (96, 128))
    assert found.logits.shape == (1, 12 * 16 + 6 * 8 + 3 * 4, 2) and bool((found.deltas == 0).all())
    inside = found.before[0, 16 * 6 + 8]  # of the finest map: row 6, column 8
    side = torch.tensor([50.0, 50.0] if reparam else [0.05 * 128, 0.05 * 96]).double()
    centre = torch.tensor([(8 + 0.5) * 8, (6 + 0.5) * 8]).double()
    assert torch.allclose(inside, torch.cat([centre - side / 2, centre + side / 2]))
    assert torch.allclose(found.boxes[0, 16 * 6 + 8], inside.clamp(min=0))


def test_waves_are_the_formula():
    x = torch.tensor([[0.25, 3.0]], dtype=torch.float64)
    made = waves(x, 4)
    angles = [2 * torch.pi * v / p for v in x[0] for p in (1.0, 100.0)]
    expected = torch.stack([f(a) for a in angles for f in (torch.sin, torch.cos)])
    assert torch.allclose(made[0], expected)


def test_a_detector_with_proposals_learns_two_pictures():
    torch.manual_seed(0)
    m = PlainDETR(
        Net(8, 16), 2, dim=32, num_heads=4, hidden=32, depth=1, queries=4, box_hidden=16, two_stage=True,
        mixed_selection=True, reparam=False, position_embedding="sine",
    )  # fmt: skip
    images = torch.zeros(2, 3, 32, 40)
    images[0, 0, 4:20, 8:24], images[1, 1, 10:30, 2:12] = 1.0, 1.0
    truth = [[8.0, 4.0, 24.0, 20.0], [2.0, 10.0, 12.0, 30.0]]
    targets = [dict(boxes=torch.tensor([t]), labels=torch.tensor([i])) for i, t in enumerate(truth)]
    optimizer = torch.optim.AdamW(m.parameters(), lr=6e-3)
    for _ in range(100):
        loss = sum(m.loss(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for found, target in zip(m.eval().predict(images, top=1), targets, strict=True):
        assert found.labels.tolist() == target["labels"].tolist()
        assert float(B.overlaps(found.boxes, target["boxes"])[0]) > 0.7


def made(**settings):
    base = dict(dim=16, num_heads=2, hidden=16, depth=1, queries=4, box_hidden=8)
    return PlainDETR(Net(8, 16), 2, **{**base, **settings})


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: made(mixed_selection=True), "two_stage"),
        (lambda: made(proposal_strides=(8,)), "two_stage"),
        (lambda: made(two_stage=True, proposal_strides=(12,)), "proposal_strides=12"),
        (lambda: made(two_stage=True, proposal_strides=()), "at least one"),
        (lambda: made(upsample=16), "upsample=16"),
        (lambda: made(upsample=3), "upsample=3"),
        (lambda: made(position_embedding="cosine"), "position_embedding"),
        (lambda: made(loss_weights=(1, 2)), "loss_weights"),
        (lambda: made(compat="theirs"), "compat"),
        (lambda: made(two_stage=True, queries=20)(torch.zeros(1, 3, 16, 16)), "must be at most 4"),
        (lambda: made()(torch.zeros(1, 3, 16, 16), torch.ones(1, 8, 8, dtype=torch.bool)), "valid"),
        (lambda: detector_state({"transformer.wrong": torch.zeros(1)}, made(two_stage=True)), "wrong"),
    ],
)  # fmt: skip
def test_bad_input(call, says):
    with pytest.raises((TypeError, ValueError), match=says):
        call()


def test_learned_positions_serve_long_sides():
    m = made(position_embedding="learned")
    assert m.places(torch.zeros(1, 3, 60, 16)).shape == (1, 3, 60, 16)
