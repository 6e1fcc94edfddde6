"""DATR: what its card asks of the model and of its loss."""

import pytest
import torch
from safetensors.torch import load_file

import attnlib
from attnlib.models.dense.datr import Centres, class_centre_loss, class_means, datr_encoder
from attnlib.nn.local.dinat import DilatedNeighborhoodAttention
from attnlib.nn.reduced.spatial_reduction import SpatialReductionAttention
from tests.parity import HERE

TINY = dict(
    embed_dims=(8, 8, 12, 16), num_heads=(1, 2, 2, 4), depths=(1, 2, 1, 2), mlp_ratio=2.0, head_dim=16, num_classes=5,
    drop_path_rate=0.0,
)  # fmt: skip


def rand(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny(name="datr_m", **settings):
    torch.manual_seed(0)
    return attnlib.create_model(name, **{**TINY, **settings}).eval()


# ---- the model


def test_parameters_of_the_encoders():
    counts = []
    for settings in (dict(embed_dims=(32, 64, 160, 256)), {}, dict(depths=(3, 4, 6, 3))):
        with torch.device("meta"):
            counts.append(sum(p.numel() for p in datr_encoder(**settings).parameters()))
    assert counts == [3_329_392, 13_161_424, 24_211_288]


def test_the_last_stage_reads_neighbours_and_the_others_a_small_map():
    m = tiny().encoder.model
    kinds = [{type(b.mixer.inner) for b in stage.blocks} for stage in m.stages]
    assert kinds == [{SpatialReductionAttention}] * 3 + [{DilatedNeighborhoodAttention}]
    assert [s.blocks[0].mixer.inner.sr_ratio for s in m.stages[:3]] == [8, 4, 2]
    assert m.stages[3].blocks[0].mixer.inner.kernel_size == 13


def test_a_map_as_high_as_the_neighborhood_is_read_from_top_to_bottom():
    """400 x 2048 pixels leave 13 rows: attention is global in height and local in width."""
    m = DilatedNeighborhoodAttention(8, 2, 13)
    x = rand(1, 13, 40, 8).requires_grad_()
    read = torch.autograd.grad(m(x)[0, 2, 20].square().sum(), x)[0][0].abs().sum(-1) > 0
    assert read[:, 14:27].all() and not read[:, :14].any() and not read[:, 27:].any()


@pytest.mark.parametrize("grid", [(13, 13), (5, 9)])
def test_a_neighborhood_over_the_map_is_full_attention_with_a_table(grid):
    torch.manual_seed(0)
    m = DilatedNeighborhoodAttention(8, 2, 13).double()
    x = rand(1, *grid, 8).double()
    q, k, v = (t.view(-1, 2, 4).transpose(0, 1) for t in m.qkv(x.view(-1, 8)).chunk(3, -1))
    i = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1]))
    gap = i[None] - i[:, None] + 12
    weights = (q @ k.mT / 2 + m.rpb[:, gap[..., 0], gap[..., 1]]).softmax(-1)
    expected = m.proj((weights @ v).transpose(0, 1).reshape(1, *grid, 8))
    torch.testing.assert_close(m(x), expected)


@pytest.mark.parametrize("compat", [None, "authors"])
@pytest.mark.parametrize("size", [(1, 1), (37, 70), (64, 9)])
def test_any_size(size, compat):
    y = tiny(compat=compat)(rand(2, 3, *size))
    assert y.shape == (2, 5, *size) and y.isfinite().all()


def test_pixels_that_do_not_exist_change_nothing():
    m, x = tiny(compat=None), rand(2, 3, 64, 80)
    valid = torch.zeros(2, 64, 80, dtype=torch.bool)
    valid[0, :32, :48] = valid[1] = True
    other = x.masked_fill(~valid[:, None], float("nan"))
    torch.testing.assert_close(m(other, valid), m(x, valid))


def test_maps_of_the_encoder():
    f = attnlib.create_model("datr_m", **TINY, features_only=True)
    assert [tuple(t.shape) for t in f(rand(1, 3, 64, 33))] == [
        (1, 8, 16, 9),
        (1, 8, 8, 5),
        (1, 12, 4, 3),
        (1, 16, 2, 2),
    ]
    last = attnlib.create_model("datr_m", **TINY, features_only=True, out_indices=(3,))
    assert last.feature_info.channels() == [16]


def test_another_number_of_classes_and_of_channels(tmp_path):
    m = tiny()
    torch.save(m.state_dict(), path := tmp_path / "w.pth")
    other = attnlib.create_model("datr_m", path, **{**TINY, "num_classes": 7}, in_chans=1).eval()
    x = rand(1, 1, 32, 32)
    assert other(x).shape == (1, 7, 32, 32)
    for a, b in zip(other.encoder(x), m.encoder(x.expand(1, 3, 32, 32)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_mechanism_of_ones_own():
    m = tiny(mechanism="softmax-attention")
    assert m.encoder.model.stages[3].blocks[0].mixer.inner.slug == "softmax-attention"
    assert m(rand(1, 3, 32, 32)).isfinite().all()


def test_it_starts_as_the_authors():
    m = datr_encoder()
    for linear in (m.stages[2].blocks[0].mixer.inner.kv, m.stages[3].blocks[0].mixer.inner.qkv):
        assert abs(linear.weight.std() / 0.02 - 1) < 0.05 and not linear.bias.any()
    conv = m.stages[1].downsample.proj
    assert abs(conv.weight.std() / (2 / (9 * 128)) ** 0.5 - 1) < 0.05 and not conv.bias.any()
    depthwise = m.stages[3].blocks[0].mlp.inner.dwconv
    assert abs(depthwise.weight.std() / (2 / 9) ** 0.5 - 1) < 0.05


# ---- the loss


def test_the_authors_loss_over_three_steps():
    held = load_file(HERE / "datr-ifv.safetensors")
    memory = None
    for step, epoch in enumerate((1, 1, 2)):
        t = {k.partition("/")[2]: v for k, v in held.items() if k.startswith(f"{step}/")}
        source, target = t["source"].requires_grad_(), t["target"].requires_grad_()
        found = class_centre_loss(
            source, target, t["source_labels"], t["target_labels"], epoch, 19, memory, compat="authors"
        )
        found.loss.backward()
        torch.testing.assert_close(found.loss.detach(), t["loss"], rtol=1e-5, atol=1e-7)
        for ours, name in ((source.grad, "d_source"), (target.grad, "d_target")):
            torch.testing.assert_close(ours, t[name], rtol=1e-5, atol=1e-8)
        for ours, name in ((found.source, "source_memory"), (found.target, "target_memory")):
            torch.testing.assert_close(ours.vectors, t[name], rtol=1e-5, atol=1e-6)
        memory = (found.source, found.target)


def labels(*shape, classes=3, seed=0):
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def test_no_loss_where_both_domains_agree():
    f, y = rand(2, 6, 4, 5), labels(2, 8, 10)
    assert class_centre_loss(f, f, y, y, 1, 3).loss == 0
    assert class_centre_loss(f, f + 1, y, y, 1, 3).loss > 0


def test_centres_are_class_means():
    f, y = rand(2, 6, 4, 5), labels(2, 4, 5)
    y[0, 0] = 255
    means, counts = class_means(f, y, 4)
    for k in range(3):
        torch.testing.assert_close(means[k], f.movedim(1, -1)[y == k].mean(0))
    assert counts.tolist() == [int((y == k).sum()) for k in range(4)] and not means[3].any()
    found = class_centre_loss(f, f, y, y, 1, 4)
    torch.testing.assert_close(found.source.vectors, means)
    assert found.source.seen.tolist() == [True, True, True, False]


def test_the_memory_becomes_the_running_mean():
    y, memory, seen = labels(1, 4, 5), None, []
    for epoch in range(1, 400):
        f = rand(1, 6, 4, 5, seed=epoch) + 2
        seen.append(class_means(f, y, 3)[0])
        found = class_centre_loss(f, f, y, y, epoch, 3, memory)
        memory = (found.source, found.target)
    torch.testing.assert_close(memory[0].vectors, torch.stack(seen).mean(0), rtol=1e-2, atol=1e-2)


def test_a_class_keeps_its_centre_where_it_is_not_seen():
    y = labels(1, 4, 5, classes=2)
    first = class_centre_loss(rand(1, 6, 4, 5), rand(1, 6, 4, 5), y, y, 1, 3)
    memory = (first.source, first.target)
    again = class_centre_loss(rand(1, 6, 4, 5, seed=3), rand(1, 6, 4, 5), torch.full_like(y, 2), y, 2, 3, memory)
    torch.testing.assert_close(again.source.vectors[:2], first.source.vectors[:2])
    assert again.source.seen.all() and not first.source.seen[2]


def test_pixels_without_a_class_take_no_part():
    y = labels(1, 4, 5)
    z = y.clone()
    z[:, 2:] = 255
    a, b = rand(1, 6, 4, 5), rand(1, 6, 4, 5, seed=2)
    half = class_centre_loss(a[:, :, :2], b[:, :, :2], y[:, :2], y[:, :2], 1, 3).loss
    torch.testing.assert_close(class_centre_loss(a, b, z, z, 1, 3).loss, half)
    none = torch.full_like(y, 255)
    a.requires_grad_()
    loss = class_centre_loss(a, b, none, none, 1, 3).loss
    loss.backward()
    assert loss == 0 and not a.grad.any()


def test_minimising_it_draws_the_domains_together():
    y = labels(2, 4, 5)
    a, b = rand(2, 6, 4, 5), rand(2, 6, 4, 5, seed=2).requires_grad_()
    optimizer, memory, losses = torch.optim.SGD([b], 5.0), None, []
    for _ in range(20):
        found = class_centre_loss(a, b, y, y, 1, 3, memory)
        memory = (found.source, found.target)
        optimizer.zero_grad()
        found.loss.backward()
        optimizer.step()
        losses.append(float(found.loss.detach()))
    assert losses[-1] < 0.2 * losses[0]


# ---- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: datr_encoder(sr_ratios=(8, 4)), "sr_ratios"),
        (lambda: datr_encoder(num_heads=(3, 2, 5, 8)), "num_heads=3"),
        (lambda: datr_encoder(compat="theirs"), "compat"),
        (lambda: tiny(head_dim=0), "dim"),
        (lambda: class_centre_loss(rand(1, 6, 4, 5), rand(1, 6, 4, 4), *[labels(1, 4, 5)] * 2, 1, 3), "one shape"),
        (lambda: class_centre_loss(*[rand(6, 4, 5)] * 2, *[labels(1, 4, 5)] * 2, 1, 3), "source must be"),
        (lambda: class_centre_loss(*[rand(1, 6, 4, 5)] * 2, labels(2, 4, 5), labels(1, 4, 5), 1, 3), "source_labels"),
        (lambda: class_centre_loss(*[rand(1, 6, 4, 5)] * 2, *[labels(1, 4, 5)] * 2, 0, 3), "epoch"),
        (lambda: class_centre_loss(*[rand(1, 6, 4, 5)] * 2, *[labels(1, 4, 5)] * 2, 1, 0), "num_classes"),
        (lambda: class_centre_loss(*[rand(1, 6, 4, 5)] * 2, *[labels(1, 4, 5)] * 2, 1, 3, compat="mine"), "compat"),
        (
            lambda: class_centre_loss(
                *[rand(1, 6, 4, 5)] * 2, *[labels(1, 4, 5)] * 2, 1, 3,
                (Centres(torch.zeros(4, 6), torch.ones(4, dtype=torch.bool)),) * 2,
            ),
            r"memory holds vectors of shape \(4, 6\)",
        ),
    ],
)  # fmt: skip
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
