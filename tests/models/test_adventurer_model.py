import pytest
import torch

import attnlib
from attnlib.models.backbones.adventurer import adventurer
from attnlib.models.build import model_entry


def tiny(**settings):
    config = dict(patch_size=4, embed_dim=8, depth=4, d_state=3, head_dim=4, img_size=16, num_classes=3)
    return adventurer(**{**config, **settings}).eval()


IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_counts_are_the_authors():
    for name in attnlib.list_models("adventurer_*"):
        with torch.device("meta"):
            model = attnlib.create_model(name)
        assert sum(p.numel() for p in model.parameters()) == model_entry(name).params, name


def test_which_blocks_read_in_reverse():
    assert [b.reverse for b in tiny(depth=6).stages] == [False, True] * 3
    assert [b.reverse for b in tiny(depth=6, compat="authors").stages] == [False, False, True, True, False, False]


def test_a_block_is_its_equation():
    m = tiny()
    x = torch.randn(2, 17, 8)
    for block in m.stages[:2]:
        y = block.mixer.norm(x)
        y = torch.cat([y[:, :16].flip(1), y[:, 16:]], 1) if block.reverse else y
        y = block.mixer.inner(torch.cat([y.mean(1, keepdim=True), y], 1))[:, 1:]
        y = torch.cat([y[:, :16].flip(1), y[:, 16:]], 1) if block.reverse else y
        want = x + y
        want = want + block.mlp.inner(block.mlp.norm(want))
        torch.testing.assert_close(block(x)[0], want)


def test_patches_down_to_pixels_and_any_size():
    m = tiny()
    assert m(torch.randn(1, 3, 20, 28)).shape == (1, 3)
    fine = m.with_patches(1)
    assert fine.forward_features(IMAGES).shape == (2, 257, 8)


def test_absent_pixels_change_nothing():
    m = tiny()
    valid = torch.ones(2, 16, 16, dtype=torch.bool)
    valid[1, 8:] = False
    found = [m(torch.where(valid[:, None], IMAGES, other), valid) for other in (torch.nan, 5.0)]
    torch.testing.assert_close(*found)
    m.set_grad_checkpointing()
    m(IMAGES).sum().backward()
    assert all(p.grad is not None for p in m.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [(dict(compat="paper"), "compat='paper'"), (dict(norm="batch"), "norm='batch'"), (dict(head_dim=5), "head_dim")],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(**settings)
