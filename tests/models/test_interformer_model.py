"""InterFormer: the image once, clicks over what was kept."""

import pytest
import torch

import attnlib
from attnlib.models.dense.clicks import UNKNOWN, interact, unknown
from attnlib.models.dense.interformer import IMSA, WholeNorm, normalized_focal_loss

TINY = dict(
    embed_dim=16, depth=1, num_heads=2, mlp_ratio=2.0, dims=(8, 8, 16, 16), imsa_heads=(1, 1, 2, 2),
    imsa_mlp_ratio=(2, 2, 1, 1), width=8, img_size=64, drop_path_rate=0.0, drop_rate=0.0,
)  # fmt: skip


def tiny(name="interformer_light", **settings):
    torch.manual_seed(0)
    return attnlib.create_model(name, **{**TINY, **settings}).eval()


def images(*shape, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_encoder_runs_once_per_image_however_many_clicks():
    m, calls = tiny(), []
    m.encoder.stem.register_forward_hook(lambda *_: calls.append("encoder"))
    m.imsa.register_forward_hook(lambda *_: calls.append("clicks"))
    session = m.session(images(3, 50, 40))
    for y, x, positive in ((10, 10, True), (40, 30, False), (0, 0, False)):
        assert session.click(y, x, positive).shape == (50, 40)
    assert calls == ["encoder", "clicks", "clicks", "clicks"] and len(session.clicks) == 3


def test_a_session_is_the_whole_model():
    m, x = tiny(), images(3, 50, 40)
    session = m.session(x, radius=3)
    first = session.click(20, 10)
    torch.testing.assert_close(first, m.predict(x[None], _label((50, 40), (20, 10), 3)[None])[0])
    before = session.label.clone()
    second = session.click(5, 30, positive=False)
    label = attnlib.models.dense.clicks.clicked(before, [(5, 30, False)], 3)
    torch.testing.assert_close(second, m.predict(x[None], label[None])[0])
    session.reset()
    assert not session.clicks and (session.label == UNKNOWN).all()
    torch.testing.assert_close(session.click(20, 10), first)


def _label(size, at, radius):
    return attnlib.models.dense.clicks.clicked(unknown(size), [(*at, True)], radius)


def test_what_is_kept_of_an_image_does_not_depend_on_clicks():
    m, x = tiny(), images(2, 3, 64, 64)
    held = m.encode(x)
    assert [tuple(t.shape[1:]) for t in held.maps] == [(16, 16, 8), (8, 8, 8), (4, 4, 16), (2, 2, 16)]
    kept = [t.clone() for t in held.maps]
    one, other = (m.decode(held, torch.full((2, 64, 64), v)) for v in (2, 4))
    assert not torch.allclose(one, other) and all(a.equal(b) for a, b in zip(kept, held.maps, strict=True))
    torch.testing.assert_close(m(x, torch.full((2, 64, 64), 2)), one)


@pytest.mark.parametrize("size", [(1, 1), (33, 70), (64, 20)])
def test_any_size(size):
    m = tiny()
    y = m(images(1, 3, *size), unknown(size)[None])
    assert y.shape == (1, 2, *size) and y.isfinite().all()


def test_the_norm_of_a_whole_map():
    torch.manual_seed(0)
    norm, x = WholeNorm(6), torch.randn(2, 4, 5, 6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    expected = torch.nn.functional.group_norm(x.movedim(-1, 1), 1, norm.weight, norm.bias).movedim(1, -1)
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("global_keys", [False, True])
def test_blocks_confined_to_a_box(global_keys):
    m = tiny(imsa_depths=(3, 1, 2, 1), refine_from=(1, 1, 2, 1), global_keys=global_keys)
    x, label = images(2, 3, 64, 64), torch.full((2, 64, 64), 3)
    held = m.encode(x)
    boxes = [(0, 0, 32, 32), (32, 0, 64, 64)]
    torch.testing.assert_close(m.decode(held, label, [(0, 0, 64, 64)] * 2), m.decode(held, label))
    made = m.imsa(held.maps, label, boxes)
    torch.testing.assert_close(made[1], m.imsa(held.maps, label)[1])  # there is no such block in stage 1
    one = m.imsa([t[1:] for t in held.maps], label[1:], boxes[1:])
    torch.testing.assert_close(made[0][1:], one[0])
    # outside the box nothing but the norm at the end has happened, inside keys lie in the box or everywhere
    stage, seen = m.imsa.stages[0], []
    stage[1].register_forward_hook(lambda module, given, out: seen.append([t.shape[1:3] for t in given]))
    m.imsa([t[1:] for t in held.maps], label[1:], boxes[1:])
    assert seen == [[(16, 8), (16, 16) if global_keys else (16, 8)]]


def test_training_clicks():
    m = tiny().train()
    target = torch.zeros(2, 64, 64, dtype=torch.long)
    target[:, 10:40, 20:50] = 1
    x, g = images(2, 3, 64, 64), torch.Generator().manual_seed(3)
    counts = []
    for _ in range(8):
        labels = m.clicked_labels(x, target, g, most=3, radius=2)
        counts.append(sum(int((labels[0] == v).sum()) for v in (0, 4)))
        assert labels.shape == target.shape and labels[0, 25, 35] in (3, 4, 2, 0)
    assert m.training and min(counts) == 13 and max(counts) > 13  # one disk of radius 2, or more
    prediction, truth = m.steps({"images": x, "target": target, "generator": g})
    terms = m.loss(prediction, truth)
    assert set(terms) == {"focal", "auxiliary"}
    sum(terms.values()).backward()
    # of what is there only for other inputs: keys' biases do nothing, one reference mode may not occur
    silent = {n for n, p in m.named_parameters() if p.grad is None}
    assert silent == set() or all("mixer.inner.k" in n for n in silent)
    assert set(tiny(auxiliary=False).loss(torch.zeros(1, 2, 4, 4), torch.ones(1, 4, 4).long())) == {"focal"}


def test_the_focal_loss_one_pixel_at_a_time():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 2, 3, 4).double(), torch.randint(0, 2, (2, 3, 4))
    target[0, 0] = 255
    losses = []
    for z, t in zip(logits, target, strict=True):
        p = [float((z[1, i, j] - z[0, i, j]).sigmoid()) for i, j in (t != 255).nonzero().tolist()]
        true = [int(t[i, j]) for i, j in (t != 255).nonzero().tolist()]
        right = torch.tensor([a if b else 1 - a for a, b in zip(p, true, strict=True)], dtype=torch.float64)
        weights = (1 - right) ** 2
        weights = weights * len(p) / weights.sum()
        losses.append(-(0.5 * weights * right.log()).mean())
    torch.testing.assert_close(normalized_focal_loss(logits, target), torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)


def test_the_protocol_runs_with_a_session():
    m, target = tiny(), torch.zeros(40, 40, dtype=torch.bool)
    target[8:30, 8:30] = True
    session = m.session(images(3, 40, 40))
    done = interact(session.answer, target, most=3)
    assert len(done.overlaps) == 3 and 0 <= min(done.overlaps) <= max(done.overlaps) <= 1


def test_another_mechanism_reads_the_image():
    m = tiny(mechanism=lambda place: attnlib.create("interformer-imsa", dim=place.dim, num_heads=1, pool_ratios=(2,)))
    assert m(images(1, 3, 64, 64), torch.full((1, 64, 64), 2)).isfinite().all()


def test_the_start_of_the_authors():
    torch.manual_seed(0)
    modes = IMSA().modes.detach()
    assert abs(float(modes.std()) - (2 / 37) ** 0.5) < 0.05
    block = tiny().encoder.stages[0]
    assert (block.mixer.scale.gamma == 1).all() and not block.mixer.inner.relative.table.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.session(images(3, 40, 50)).click(40, 0), "y=40, x=0 lies outside the image of 40 x 50 pixels"),
        (lambda m: m.session(images(3, 40, 50)).click(0, -1), "lies outside"),
        (lambda m: m.session(images(1, 3, 40, 50)), "image must be"),
        (lambda m: m.encode(images(1, 1, 40, 50)), "images must be"),
        (lambda m: m(images(1, 3, 40, 50), unknown((40, 40))[None]), "label must be reference labels"),
        (lambda m: m(images(1, 3, 64, 64), unknown((64, 64))[None], [(0, 0, 96, 32)]), "inside 64 x 64"),
        (lambda m: m(images(1, 3, 64, 64), unknown((64, 64))[None], [(32, 0, 32, 32)]), "left < right"),
        (lambda m: m(images(1, 3, 64, 64), unknown((64, 64))[None], [(0, 0, 30, 32)]), "multiples of 32"),
        (lambda m: m(images(1, 3, 64, 64), unknown((64, 64))[None], []), "boxes must be one for each"),
        (lambda m: normalized_focal_loss(torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4)), "logits"),
        (lambda m: tiny(refine_from=(2, 1, 2, 1)), "refine_from="),
        (lambda m: tiny(imsa_heads=(3, 1, 2, 2)), "num_heads"),
        (lambda m: tiny(dims=(8, 8, 16)), "dims="),
        (lambda m: tiny(patch_size=8), "patch_size="),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny())
