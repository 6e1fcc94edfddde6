"""CrossFormer: what its card asks of the backbone."""

import pytest
import torch

import attnlib
from attnlib.models.backbones.crossformer import CooledBlock
from attnlib.models.build import load_pretrained
from attnlib.nn.layers import CrossScale

TINY = dict(
    embed_dims=(16, 32), depths=(2, 4), num_heads=(1, 2), group_size=2, interval=2, patch_sizes=(4, 8), num_classes=5,
    drop_path_rate=0.0, mlp_ratio=2.0,
)  # fmt: skip


def tiny(name="crossformer_tiny", **settings):
    torch.manual_seed(0)
    return attnlib.create_model(name, **{**TINY, **settings}).eval()


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_near_and_far_groups_alternate_in_every_stage():
    m = tiny(group_size=(2, 3), interval=(4, 2))
    halves = [[(b.mixer.inner.kind, b.mixer.inner.group_size) for b in stage.blocks] for stage in m.stages]
    assert halves == [[("near", 2), ("far", 2)], [("near", 3), ("far", 3)] * 2]
    assert [s.blocks[1].mixer.inner.interval for s in m.stages] == [4, 2]
    with pytest.raises(ValueError, match="group_size="):
        tiny(group_size=(2, 3, 4))


def test_cooling_layers_stand_behind_every_third_block_but_the_last():
    def cooled(depths):
        stages = tiny("crossformer_pp_small", depths=depths).stages
        return [[i for i, b in enumerate(s.blocks) if isinstance(b, CooledBlock)] for s in stages]

    assert cooled((3, 7)) == [[], [2, 5]] and cooled((4, 6)) == [[2], [2]]
    assert not any(isinstance(m, CooledBlock) for m in tiny(depths=(4, 7)).modules())


def test_patches_of_several_sizes_have_one_centre():
    """Large kernels get few channels, and a kernel's window lies around that of the smallest."""
    torch.manual_seed(0)
    cel = CrossScale(3, 16, (2, 4, 8), norm=None).double()
    assert [conv.out_channels for conv in cel.projs] == [8, 4, 4]
    x = images(1, 6, 10, 3).double().requires_grad_()
    y, _ = cel(x)
    assert y.shape == (1, 3, 5, 16)
    for channel, side in ((0, 2), (8, 4), (12, 8)):
        read = torch.autograd.grad(y[0, 1, 2, channel], x, retain_graph=True)[0].abs().sum((0, 3)) > 0
        rows, columns = read.any(1).nonzero().flatten().tolist(), read.any(0).nonzero().flatten().tolist()
        out = (side - 2) // 2
        assert rows == list(range(max(0, 2 - out), min(6, 4 + out))) and columns == list(
            range(4 - out, min(10, 6 + out))
        )
    for size in ((1, 1), (5, 3)):
        assert cel(images(1, *size, 3).double())[0].shape[1:3] == (-(-size[0] // 2), -(-size[1] // 2))
    with pytest.raises(ValueError, match="kernel_sizes="):
        CrossScale(3, 16, (2, 5))
    with pytest.raises(ValueError, match="out_dim="):
        CrossScale(3, 6, (2, 4, 8))


@pytest.mark.parametrize("size", [(1, 1), (4, 9), (45, 37)])
@pytest.mark.parametrize("name", ["crossformer_tiny", "crossformer_pp_small"])
def test_any_size(name, size):
    y = tiny(name)(images(2, 3, *size))
    assert y.shape == (2, 5) and y.isfinite().all()


def test_pixels_that_do_not_exist_change_nothing():
    m, x = tiny("crossformer_pp_small"), images(2, 3, 48, 48)
    valid = torch.zeros(2, 48, 48, dtype=torch.bool)
    valid[0, :24, :40] = valid[1] = True
    other = x.masked_fill(~valid[:, None], float("nan"))
    torch.testing.assert_close(m(other, valid), m(x, valid))
    # groups follow the map, so that a padded image is that image where its own groups are the same
    torch.testing.assert_close(m(x, valid)[:1], m(x[:1, :, :24, :40]))


def test_maps_of_all_stages():
    f = attnlib.create_model("crossformer_tiny", **TINY, features_only=True)
    assert [tuple(t.shape) for t in f(images(1, 3, 33, 40))] == [(1, 16, 9, 10), (1, 32, 5, 5)]
    assert f.feature_info.reduction() == [4, 8]


def test_linear_maps_start_as_the_authors_whole_model():
    m = attnlib.create_model("crossformer_tiny", embed_dims=(64, 128), depths=(1, 1), num_heads=(1, 2), interval=1)
    for block in m.stages[1].blocks:
        for linear in (block.mixer.inner.qkv, block.mixer.inner.proj, block.mlp.inner.fc1):
            assert 0.019 < linear.weight.std() < 0.021 and not linear.bias.any()


def test_gradients_of_patches_do_not_depend_on_the_order_in_memory():
    """Where gradients are wanted, images are read channel by channel."""
    torch.manual_seed(0)
    cel = CrossScale(3, 16, (2, 4, 8)).double()
    x, weight = images(2, 6, 10, 3).double().requires_grad_(), images(2, 3, 5, 16, seed=2).double()
    y, _ = cel(x)
    maps = [torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), c.weight, c.bias, c.stride, c.padding) for c in cel.projs]
    expected = cel.norm(torch.cat(maps, 1).permute(0, 2, 3, 1))
    torch.testing.assert_close(y, expected)
    leaves = (x, *cel.parameters())
    grads = [torch.autograd.grad((t * weight).sum(), leaves) for t in (y, expected)]
    torch.testing.assert_close(*grads)
    with torch.no_grad():
        torch.testing.assert_close(cel(x)[0], expected.detach())
    assert torch.autograd.gradcheck(lambda t: cel(t)[0], x[:1, :4, :4].detach().requires_grad_())


def test_weights_load_into_a_model_of_other_channels():
    """Every convolution that reads the image is adapted."""
    weights = {k: v.clone() for k, v in tiny().state_dict().items()}
    grey = tiny(in_chans=1)
    done = load_pretrained(grey, weights)
    assert done.adapted == ["stem.projs.0.weight", "stem.projs.1.weight"]
    x = images(1, 1, 32, 32)
    assert grey(x).isfinite().all()
