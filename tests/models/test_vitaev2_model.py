"""ViTAEv2 with varied-size windows: what its card asks of the backbone."""

import pytest
import torch
from torch import nn

import attnlib
from attnlib.models.backbones.vitaev2 import DilatedPyramid, NormalCell
from attnlib.models.build import load_pretrained
from attnlib.nn.layers import DropPath
from attnlib.nn.sampled.vsa_varied_size_window import VariedSizeWindowAttention

TINY = dict(
    embed_dims=(8, 16), depths=(1, 2), num_heads=(2, 4), pyramid_dims=(4, 4), reduction_heads=(1, 2), ratios=(4, 2),
    kernel_sizes=(7, 3), dilations=((1, 2, 3, 4), (1, 2, 3)), groups=(1, 8), reduction_groups=(1, 4), window_size=3,
    mlp_ratio=2.0, num_classes=5, drop_path_rate=0.0,
)  # fmt: skip


def tiny(**settings):
    torch.manual_seed(0)
    m = attnlib.create_model("vitaev2_vsa_s", **{**TINY, "zero_init": False, **settings})
    for part in m.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean, std=0.3)
            nn.init.uniform_(part.running_var, 0.5, 2)
    return m.eval()


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(1, 1), (4, 9), (45, 37)])
def test_any_size(size):
    m, x = tiny(), images(2, 3, *size)
    assert m(x).shape == (2, 5) and m(x).isfinite().all()
    maps = m.forward_intermediates(x, intermediates_only=True)
    for stride, t in zip((4, 8), maps, strict=True):
        assert t.shape[2:] == (-(-size[0] // stride), -(-size[1] // stride))


def test_a_pyramid_has_each_dilation_side_by_side():
    torch.manual_seed(0)
    p, x = DilatedPyramid(3, 2, 7, 4, (1, 4)), images(1, 16, 20, 3)
    y = p(x)
    assert y.shape == (1, 4, 5, 4) and [c.padding for c in p.convs] == [(2, 2), (11, 11)]
    one = nn.functional.gelu(p.convs[1](x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
    torch.testing.assert_close(y[..., 2:], one)


def test_a_normal_cell_adds_attention_and_convolutions_of_what_it_is_given():
    m, x = tiny(), images(2, 5, 7, 16)
    cell = m.stages[1].blocks[0]
    z = x + cell.mixer(cell.norm(cell.position(x))) + cell.convs(x)[0]
    torch.testing.assert_close(cell(x)[0], z + cell.mlp.inner(cell.mlp.norm(z)))


def rates(m):
    cells = [c for s in m.stages for c in s.blocks]
    return [c.drop_path.p if isinstance(c.drop_path, DropPath) else 0.0 for c in cells]


def test_where_rates_of_stochastic_depth_start():
    four = dict(
        embed_dims=(8,) * 4, depths=(1, 2, 3, 1), num_heads=(1,) * 4, pyramid_dims=(4,) * 4, reduction_heads=(1,) * 4,
        ratios=(4, 2, 2, 2), kernel_sizes=(7, 3, 3, 3), dilations=((1,),) * 4, groups=(1,) * 4,
        reduction_groups=(1,) * 4, drop_path_rate=0.6,
    )  # fmt: skip
    torch.testing.assert_close(rates(tiny(**four)), [0.0, 0.1, 0.2, 0.2, 0.3, 0.4, 0.3])
    torch.testing.assert_close(rates(tiny(**four, drop_path_start="depth")), [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])


def test_wide_cells_and_regressors_that_start_at_zero():
    assert [tiny(wide=w).stem.convs[0].conv.out_channels for w in (False, True)] == [4, 16]
    for zero in (True, False):
        found = [p for p in tiny(zero_init=zero).modules() if isinstance(p, VariedSizeWindowAttention)]
        assert len(found) == 5 and all((p.offsets.weight == 0).all() == zero for p in found)


def test_another_mechanism_stands_in_normal_cells():
    m = tiny(mechanism="softmax-attention")
    assert m(images(1, 3, 20, 16)).shape == (1, 5)
    inside = [p for c in m.modules() if isinstance(c, NormalCell) for p in c.modules()]
    assert not any(isinstance(p, VariedSizeWindowAttention) for p in inside)
    assert isinstance(m.stem.attention, VariedSizeWindowAttention)


def test_every_convolution_of_the_image_is_adapted_to_other_channels():
    m, x = tiny(), images(2, 1, 32, 32)
    one = tiny(in_chans=1)
    done = load_pretrained(one, m.state_dict())
    assert sorted(done.adapted) == sorted((m.input_name, *m.more_inputs)) and len(done.adapted) == 5
    torch.testing.assert_close(one(x), m(x.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize("border", ["zeros", "mask"])
def test_pixels_that_do_not_exist_change_nothing(border):
    m, x = tiny(border=border), images(2, 3, 48, 48)
    valid = torch.zeros(2, 48, 48, dtype=torch.bool)
    valid[0, :24, :40] = valid[1] = True
    other = x.masked_fill(~valid[:, None], float("nan"))
    torch.testing.assert_close(m(other, valid), m(x, valid))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(ratios=(4, 3)), "ratios"),
        (dict(ratios=(4,)), "ratios"),
        (dict(groups=(1, 7)), "groups"),
        (dict(groups=(1, 0)), "groups"),
        (dict(dilations=((1,),)), "dilations"),
        (dict(dilations=((1,), (0,))), "dilations"),
        (dict(pyramid_dims=(4, 4, 4)), "pyramid_dims"),
        (dict(window_size=0), "window_size"),
        (dict(num_heads=(2, 5)), "num_heads"),
        (dict(reduction_heads=(1, 5)), "num_heads"),
        (dict(drop_path_start="block"), "drop_path_start"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(**settings)
