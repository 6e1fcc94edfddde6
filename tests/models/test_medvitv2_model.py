"""MedViTV2: what its card asks of the backbone."""

import pytest
import torch
from torch import nn

import attnlib
from attnlib.models.backbones.medvitv2 import GlobalBlock, LocalBlock, convert, restored, scrambled
from attnlib.models.build import load_pretrained
from attnlib.nn.local.dinat import DilatedNeighborhoodAttention
from attnlib.nn.reduced.medvitv2 import EfficientSelfAttention

TINY = dict(
    embed_dims=(32, 128, 128, 128), depths=(1, 2, 3, 1), stem_dims=(8, 8, 8), kernel_size=3, num_classes=5,
    drop_path_rate=0.0,
)  # fmt: skip


def tiny(**settings):
    torch.manual_seed(0)
    return attnlib.create_model("medvitv2_tiny", **{**TINY, **settings}).eval()


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_layout_of_the_smallest():
    with torch.device("meta"):
        m = attnlib.create_model("medvitv2_tiny")
    kinds = ["".join("L" if isinstance(b, LocalBlock) else "G" for b in s.blocks) for s in m.stages]
    assert kinds == ["LL", "LG", "LLGLLG", "G"]
    inner = [[b.mixer for b in s.blocks] for s in m.stages]
    assert [a.dilation for a in inner[2] if isinstance(a, DilatedNeighborhoodAttention)] == [2] * 4
    assert inner[0][0].dilation == 8 and inner[1][0].dilation == 4 and inner[0][0].kernel_size == 7
    assert [(a.dim, a.num_heads, a.sr_ratio) for a in (inner[1][1], inner[2][2], inner[3][0])] == [
        (96, 3, 4), (160, 5, 2), (288, 9, 1),
    ]  # fmt: skip
    depthwise = [s.blocks[0].mlp.depthwise.conv.kernel_size[0] for s in m.stages[:3]]
    assert depthwise == [7, 3, 3] and m.stages[0].downsample is None
    with torch.device("meta"):
        legacy = attnlib.create_model("medvitv2_tiny", legacy_layout=True)
    assert {a.dilation for a in legacy.modules() if isinstance(a, DilatedNeighborhoodAttention)} == {1}


def test_the_idle_layer_may_be_left_out():
    whole, lean = tiny(), tiny(idle=False)
    lean.load_state_dict({k: v for k, v in whole.state_dict().items() if ".idle." not in k})
    x = images(2, 3, 40, 40)
    torch.testing.assert_close(lean(x), whole(x))
    whole(x).sum().backward()
    assert all((p.grad is None) == (".idle." in n) for n, p in whole.named_parameters() if not n.endswith("grid"))


def test_rows_of_one_channel():
    x = images(2, 3, 4, 6)
    nchw = x.permute(0, 3, 1, 2).contiguous()
    assert scrambled(x).equal(nchw.view(2, 3, 4, 6)) and restored(scrambled(x)).equal(x)
    assert scrambled(x)[0, 0, 0].equal(x[0, :, :, 0].flatten()[:6])


def test_blocks_read_tokens_unless_they_are_to_read_rows():
    """The update of a block moves with its tokens, or is that of the tokens moved there and back."""
    torch.manual_seed(0)
    ours, theirs = tiny(), tiny(legacy_layout=True)
    block = ours.stages[2].blocks[2]
    assert isinstance(block, GlobalBlock)
    x = images(1, 3, 4, 128)
    turned = block.mlp(block.mlp_norm(x).flip(1, 2)).flip(1, 2)
    torch.testing.assert_close(block.mlp(block.mlp_norm(x)), turned)
    local = theirs.stages[0].blocks[0]
    y = images(1, 8, 7, 32)
    seen = []
    local.mixer.register_forward_hook(lambda f, args, out: seen.append((args[0], out)))
    z, _ = local(y)
    read, given = seen[0]
    torch.testing.assert_close(read, scrambled(local.norm(y)))
    middle = y + restored(given)
    torch.testing.assert_close(z, middle + local.mlp(local.mlp_norm(middle)))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("chans", "size", "classes"), [(1, (28, 28), 2), (3, (28, 28), 14), (1, (1, 1), 5), (3, (45, 38), 9)]
)
def test_medical_images_of_any_size(legacy, chans, size, classes):
    y = tiny(legacy_layout=legacy, in_chans=chans, num_classes=classes)(images(2, chans, *size))
    assert y.shape == (2, classes) and y.isfinite().all()


@pytest.mark.parametrize("training", [False, True])
def test_pixels_that_do_not_exist_change_nothing(training):
    m, x = tiny().train(training), images(2, 3, 40, 40)
    valid = torch.zeros(2, 40, 40, dtype=torch.bool)
    valid[0, :24, :16] = valid[1] = True
    other = x.masked_fill(~valid[:, None], float("nan"))
    torch.testing.assert_close(m(other, valid), m(x, valid))


def test_maps_of_all_stages():
    f = attnlib.create_model("medvitv2_tiny", **TINY, features_only=True)
    maps = [tuple(t.shape) for t in f(images(1, 3, 33, 40))]
    assert maps == [(1, 32, 9, 10), (1, 128, 5, 5), (1, 128, 3, 3), (1, 128, 2, 2)]
    assert f.feature_info.reduction() == [4, 8, 16, 32]


def test_released_weights_need_the_layout_they_were_trained_with():
    names = {"features.0.attn.rpb": torch.zeros(2, 13, 13)}
    with pytest.raises(ValueError, match="legacy_layout=True"):
        load_pretrained(tiny(), names)
    assert list(convert(names)) == ["stages.0.blocks.0.mixer.rpb"]


def test_another_mechanism_takes_both_places():
    m = tiny(mechanism="softmax-attention")
    own = (DilatedNeighborhoodAttention, EfficientSelfAttention)
    assert not any(isinstance(a, own) for a in m.modules())
    assert m(images(1, 3, 16, 16)).shape == (1, 5)


def test_it_starts_as_the_authors_whole_model():
    m = tiny()
    for module in m.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.weight.numel() > 4000:
            assert 0.018 < module.weight.std() < 0.022
            assert module.bias is None or not module.bias.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(depths=(1, 2, 4, 1)), "depths="),
        (dict(embed_dims=(32, 128, 128)), "embed_dims="),
        (dict(sr_ratios=(2, 1)), "sr_ratios="),
        (dict(dilations=(1, 1, 1, 1, 1)), "dilations="),
        (dict(stem_dims=(8, 8)), "stem_dims="),
        (dict(embed_dims=(32, 64, 128, 128)), "embed_dims has 64"),
        (dict(embed_dims=(48, 128, 128, 128)), "head_dim=32 does not divide embed_dims=48"),
        (dict(dilations=(0, 1, 1, 1)), "dilations"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(**settings)


def test_rows_have_no_pixels_that_do_not_exist():
    with pytest.raises(ValueError, match="valid is not possible with legacy_layout=True"):
        tiny(legacy_layout=True)(images(1, 3, 8, 8), torch.ones(1, 8, 8, dtype=torch.bool))
