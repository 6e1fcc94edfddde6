import pytest
import torch
import torch.nn.functional as F
from parity import Fixture

import attnlib
from attnlib.nn.modulation.activator_geglu import ActivatorBlock, ActivatorClassifier

SLUG = "activator-geglu"
FIXTURE = Fixture(SLUG)


def test_unit_equals_the_authors():
    module = FIXTURE.build("unit")
    FIXTURE.holds("unit", module, lambda m, xs: m(xs["x"]))


@pytest.mark.parametrize("case, cls", [("block", ActivatorBlock), ("only", ActivatorBlock)])
def test_blocks_equal_the_authors(case, cls):
    module = cls(**FIXTURE.config[case])
    module.load_state_dict(attnlib.convert_state_dict(SLUG, FIXTURE.under(f"{case}/sd")))
    FIXTURE.holds(case, module, lambda m, xs: m(xs["x"]))


def test_classifier_equals_the_authors():
    module = ActivatorClassifier(**FIXTURE.config["classifier"])
    module.load_state_dict(attnlib.convert_state_dict(SLUG, FIXTURE.under("classifier/sd")))
    FIXTURE.holds("classifier", module, lambda m, xs: m(xs["x"].movedim(1, -1)))


@pytest.mark.parametrize("ffn, expected", [(True, 2_650_890), (False, 1_599_242)])
def test_parameter_count_of_the_authors_models(ffn, expected):
    assert sum(p.numel() for p in ActivatorClassifier(10, ffn=ffn).parameters()) == expected


def small(**settings):
    return ActivatorClassifier(5, dim=8, hidden_dim=12, depth=2, **settings).double().eval()


def test_order_of_patches_is_not_seen():
    m, image = small(), torch.randn(2, 8, 12, 3, dtype=torch.double)
    patches = image.unflatten(1, (2, 4)).unflatten(3, (3, 4)).transpose(2, 3).flatten(1, 2)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    moved = patches[:, order].unflatten(1, (2, 3)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    assert not torch.equal(moved, image)
    torch.testing.assert_close(m(moved), m(image))


def test_patches_do_not_meet_before_pooling():
    blocks, x = small().blocks, torch.randn(1, 6, 8, dtype=torch.double)
    other = x.clone()
    other[:, 2] += 1
    difference = (blocks(other) - blocks(x)).abs().amax(-1)[0]
    assert (difference > 1e-6).tolist() == [False, False, True, False, False, False]
    assert not difference[[0, 1, 3, 4, 5]].any()


def test_without_norms_it_is_a_geglu():
    m, x = attnlib.create(SLUG, dim=6, hidden_dim=10, norm=False), torch.randn(2, 5, 6)
    torch.testing.assert_close(m(x), m.proj(F.gelu(m.gate(x)) * m.value(x)))


def test_separate_norms():
    m = attnlib.create(SLUG, dim=6, hidden_dim=10, shared_norm=False).double()
    shared = attnlib.create(SLUG, dim=6, hidden_dim=10).double()
    shared.load_state_dict(m.state_dict(), strict=False)
    x = torch.randn(2, 5, 6, dtype=torch.double)
    torch.testing.assert_close(m(x), shared(x))
    torch.nn.init.constant_(m.value_norm.weight, 2.0)
    torch.testing.assert_close(m(x) - m.proj.bias, 2 * (shared(x) - m.proj.bias))
    extra = sum(p.numel() for p in ActivatorBlock(6, 10, shared_norm=False).parameters())
    assert extra - sum(p.numel() for p in ActivatorBlock(6, 10).parameters()) == 2 * 6 + 2 * 10


def test_bad_input():
    with pytest.raises(ValueError, match="hidden_dim must be an integer of at least 1"):
        attnlib.create(SLUG, dim=6, hidden_dim=0)
    with pytest.raises(ValueError, match="multiples of patch_size=4"):
        small()(torch.randn(1, 8, 10, 3, dtype=torch.double))
    with pytest.raises(ValueError, match="image must have shape"):
        small()(torch.randn(1, 8, 3, dtype=torch.double))
