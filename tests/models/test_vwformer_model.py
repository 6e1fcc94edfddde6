"""VWFormer's head: the authors' outputs and gradients, and what its card asks."""

import json

import pytest
import torch
from safetensors import safe_open

import attnlib
from attnlib.models.dense.heads import Segmenter, UPerHead
from attnlib.models.dense.vwformer import VWFormerHead
from tests.parity import HERE, Fixture, synthetic

PATH = HERE / "vwformer-head.safetensors"
with safe_open(PATH, "pt") as f:
    CASES = json.loads(f.metadata()["config"])
    TENSORS = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118


def rand(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(**settings):
    torch.manual_seed(0)
    return VWFormerHead([8, 16, 24, 32], **{"dim": 16, "num_classes": 3, "ratios": (2, 4), **settings}).eval()


def maps(size=(32, 32), batch=2):
    return [rand(batch, c, -(-size[0] // 2**i), -(-size[1] // 2**i)) for i, c in enumerate((8, 16, 24, 32))]


@pytest.mark.parametrize("case", CASES)
def test_the_authors_head(case):
    config, prefix = CASES[case], f"{case}/"
    held = {k[len(prefix) :]: v for k, v in TENSORS.items() if k.startswith(prefix)}
    m = VWFormerHead(**config["settings"])
    m.load_state_dict(VWFormerHead.convert_state_dict(synthetic(config["shapes"])))
    m.train(config["train"])
    x = [held[f"x/{i}"].clone().requires_grad_() for i in range(4)]
    y = m(x)
    Fixture._close(y.detach(), held["y"], 1e-5, "y")
    (y * held["g"]).sum().backward()
    for i, t in enumerate(x):
        Fixture._close(t.grad, held[f"dx/{i}"], 1e-5, f"dx/{i}")
    known = {k[3:]: v for k, v in held.items() if k.startswith("dw/")}
    blank = {k: torch.full(s, torch.nan) for k, s in config["shapes"].items()}
    theirs = VWFormerHead.convert_state_dict({**blank, **known})
    ours = dict(m.named_parameters())
    largest = max(float(v.abs().max()) for v in known.values())
    compared = 0
    for name, expected in theirs.items():
        there = ~expected.isnan()
        if there.any():
            compared += 1
            Fixture._close(ours[name].grad[there], expected[there], 1e-5, name, 3e-2 * largest)
    assert compared >= len(known) - 1  # phi and g of one attention become one map


def test_entries_are_accounted_for():
    state = synthetic(CASES["ade"]["shapes"])
    with pytest.raises(ValueError, match="one_of_mine"):
        VWFormerHead.convert_state_dict({**state, "one_of_mine": torch.zeros(1)})
    del state["attn.0.theta.conv.weight"]
    with pytest.raises(ValueError, match="theta"):
        VWFormerHead.convert_state_dict(state)


#: (channels of the maps, settings, parameters).
COUNTS = [
    ([128, 256, 512, 1024], dict(num_classes=150), 7_855_638),
    ([96, 192, 384, 768], dict(num_classes=19, num_heads=16, variant="city", short_cut=False), 7_032_259),
    ([192, 384, 768, 1536], dict(num_classes=150, short_cut=False), 8_317_462),
]


def test_parameters_of_the_authors_heads():
    """Of their classes on the maps of Swin and ConvNeXt: base on ADE20K, tiny on Cityscapes, large on ADE20K."""
    with torch.device("meta"):
        for dims, settings, count in COUNTS:
            assert sum(p.numel() for p in VWFormerHead(dims, **settings).parameters()) == count


@pytest.mark.parametrize("size", [(1, 1), (9, 40), (37, 22)])
@pytest.mark.parametrize("settings", [dict(), dict(variant="city"), dict(window_size=2), dict(ratios=(1,))])
def test_any_size(size, settings):
    y = small(**settings)(maps(size))
    assert y.shape == (2, 3, *size) and y.isfinite().all()


def test_it_starts_from_the_map_itself():
    """Attention contributes nothing before the first step, as theirs."""
    m = small().train()
    torch.manual_seed(0)
    assert all(not a(rand(1, 16, 16, 16)).any() for a in m.attn)
    assert m.classifier.weight.std() < 0.02


def test_in_a_segmenter_with_pixels_that_do_not_exist():
    torch.manual_seed(0)
    encoder = attnlib.create_model(
        "dinat_mini", features_only=True, embed_dim=8, depths=(1, 1, 1), num_heads=(1, 1, 1), kernel_size=3,
        dilations=None, drop_path_rate=0.0,
    )  # fmt: skip
    head = VWFormerHead(encoder.feature_info.channels(), 16, num_classes=3, ratios=(2,), num_windows=2, drop=0.0)
    m, x = Segmenter(encoder, head), rand(2, 3, 40, 48)
    valid = torch.zeros(2, 40, 48, dtype=torch.bool)
    valid[0, :32, :24] = valid[1] = True
    other = x.masked_fill(~valid[:, None], float("nan"))
    for training in (False, True):
        torch.testing.assert_close(m.train(training)(other, valid), m(x, valid))


def test_it_costs_less_than_upernet():
    """The paper's claim of about half the cost, by counted FLOPs at equal width on one image of 512 x 512."""
    from torch.utils.flop_counter import FlopCounterMode

    def flops(head):
        with FlopCounterMode(display=False) as counter:
            head.eval()([torch.empty(1, c, 128 // 2**i, 128 // 2**i, device="meta") for i, c in enumerate(DIMS)])
        return counter.get_total_flops()

    DIMS = [96, 192, 384, 768]
    with torch.device("meta"):
        ours, theirs = VWFormerHead(DIMS, 512, 150), UPerHead(DIMS, 512, 150)
    assert flops(ours) < 0.5 * flops(theirs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(variant="coco"), "variant"),
        (dict(ratios=(0,)), r"ratios\[0\]"),
        (dict(ratios=(8,)), r"ratio \*\* 2"),
        (dict(low_dim=0), "low_dim"),
        (dict(num_heads=5), "num_heads=5"),
        (dict(short_cut=2), "short_cut"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        small(**settings)


def test_one_map_is_too_few():
    with pytest.raises(ValueError, match="at least two maps"):
        VWFormerHead([8], 16, 3)
