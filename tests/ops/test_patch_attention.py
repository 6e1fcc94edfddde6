"""Patch attention against patches that are cut out one by one."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from attnlib.ops import patch_attention


def data(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cut(x, at, k):
    """The patch around a place of (H, W, C), zeros beyond the borders."""
    half = k // 2
    wide = F.pad(x, (0, 0, half, half, half, half))
    return wide[at[0] : at[0] + k, at[1] : at[1] + k].flatten()


def oracle(x, context, known, k, similarity, scale, valid_only=False, fuse=False):
    """One sample after the other; distances of patches, a softmax, patches laid over each other."""
    outputs, maps = [], []
    half = k // 2
    for b in range(x.shape[0]):
        c = context[b].masked_fill(~known[b][..., None], 0.0)
        height, width = x.shape[1:3]
        inner = list(itertools.product(range(half, c.shape[0] - half), range(half, c.shape[1] - half)))
        places = list(itertools.product(range(height), range(width)))
        keys = torch.stack([cut(c, at, k) for at in inner])
        whole = torch.tensor([bool(known[b, i - half : i + half + 1, j - half : j + half + 1].all()) for i, j in inner])
        queries = torch.stack([cut(x[b], at, k) for at in places])
        use = whole if valid_only else torch.ones_like(whole)
        if similarity == "distance":
            d = (queries[:, None] - keys[None]).square().sum(-1)
            mean, std = d[:, use].mean(1, keepdim=True), d[:, use].std(1, correction=0, keepdim=True)
            s = -torch.tanh((d - mean) / std)
        else:
            s = (queries / (queries.square().sum(-1, keepdim=True) + 1e-16).sqrt()) @ (
                keys / (keys.square().sum(-1, keepdim=True) + 1e-16).sqrt()
            ).T
        if fuse:
            eye = torch.eye(3, dtype=s.dtype)[None, None]
            rows, cols = c.shape[0] - 2 * half, c.shape[1] - 2 * half
            s = F.conv2d(s[None, None], eye, padding=1)[0, 0].view(height, width, rows, cols)
            s = F.conv2d(s.permute(1, 0, 3, 2).reshape(1, 1, height * width, -1), eye, padding=1)[0, 0]
            s = s.view(width, height, cols, rows).permute(1, 0, 3, 2).reshape(height * width, -1)
        a = (scale * s).masked_fill(~use, -torch.inf).softmax(-1)
        filters = keys.view(-1, k, k, x.shape[-1]).permute(0, 3, 1, 2)
        y = F.conv_transpose2d(a.T.reshape(1, -1, height, width), filters, padding=half)[0] / k**2
        outputs.append(y.permute(1, 2, 0))
        maps.append(a)
    return torch.stack(outputs), torch.stack(maps)


CASES = [
    ("distance", dict()), ("distance", dict(valid_only=True)), ("distance", dict(kernel=5)),
    ("distance", dict(kernel=1)), ("cosine", dict()),
    ("cosine", dict(fuse=True)), ("cosine", dict(kernel=5, valid_only=True, fuse=True)),
]  # fmt: skip


@pytest.mark.parametrize(("similarity", "settings"), CASES)
def test_against_patches_cut_out(similarity, settings):
    x, context = data(2, 6, 7, 3), data(2, 8, 7, 3, seed=1)
    known = torch.ones(2, 8, 7, dtype=torch.bool)
    known[0, 5:7, 5:] = False
    known[1, 7, :2] = False
    scale = 3.0
    results = []
    for run in ("ours", "oracle"):
        a, b = x.clone().requires_grad_(), context.clone().requires_grad_()
        if run == "ours":
            y, w = patch_attention(
                a, b, known=known, similarity=similarity, scale=scale, return_weights=True, **settings
            )
        else:
            rest = {k: v for k, v in settings.items() if k != "kernel"}
            y, w = oracle(a, b, known, settings.get("kernel", 3), similarity, scale, **rest)
        grads = torch.autograd.grad((y * data(*y.shape, seed=3)).sum(), (a, b))
        results.append((y, w, *grads))
    for ours, right in zip(*results, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(results[0][1].sum(-1), torch.ones(2, 42, dtype=torch.float64))


def test_what_is_unknown_may_hold_anything_and_samples_are_apart():
    x, context = data(2, 5, 5, 2), data(2, 5, 5, 2, seed=1)
    known = torch.ones(2, 5, 5, dtype=torch.bool)
    known[:, :2, :2] = False
    want = patch_attention(x, context, known=known)
    dirty = context.clone()
    dirty[:, :2, :2] = torch.nan
    dirty.requires_grad_()
    y = patch_attention(x, dirty, known=known)
    assert y.equal(want)
    (grad,) = torch.autograd.grad(y.sum(), dirty)
    assert grad.isfinite().all() and not grad[:, :2, :2].any()
    torch.testing.assert_close(patch_attention(x[1:], context[1:], known=known[1:]), want[1:])


def test_no_key_gives_zeros_and_flat_maps_are_finite():
    x = data(1, 5, 5, 2).requires_grad_()
    y = patch_attention(x, x, known=torch.zeros(1, 5, 5, dtype=torch.bool), valid_only=True)
    y.sum().backward()
    assert not y.any() and not x.grad.any()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        flat = torch.full((1, 6, 6, 4), 0.7, dtype=dtype, requires_grad=True)
        y = patch_attention(flat, flat)
        y.float().sum().backward()
        assert flat.grad.isfinite().all() and y.dtype == dtype
        torch.testing.assert_close(y[:, 1:-1, 1:-1], flat[:, 1:-1, 1:-1], rtol=1e-2, atol=1e-2)
    assert patch_attention(data(0, 5, 5, 2), data(0, 5, 5, 2)).shape == (0, 5, 5, 2)


def test_gradients_compile_export_and_bfloat16():
    x, context = data(1, 4, 4, 2), data(1, 4, 5, 2, seed=1)
    known = torch.ones(1, 4, 5, dtype=torch.bool)
    known[0, 3, 4] = False

    def run(a, b):
        return patch_attention(a, b, known=known, scale=2.0)

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), context.requires_grad_()))
    x, context = x.detach().float(), context.detach().float()
    torch.testing.assert_close(torch.compile(run, backend="eager", fullgraph=True)(x, context), run(x, context))
    rough = patch_attention(x.bfloat16(), context.bfloat16(), known=known, scale=2.0)
    assert rough.dtype == torch.bfloat16 and float((rough.float() - run(x, context)).abs().max()) < 0.1


def test_bad_arguments():
    x = torch.zeros(1, 4, 4, 2)
    for settings, message in (
        (dict(kernel=2), "kernel must be odd"), (dict(kernel=5), "no patch of 5 x 5"),
        (dict(similarity="dot"), "similarity="), (dict(scale=float("nan")), "scale"),
        (dict(known=torch.ones(1, 3, 4, dtype=torch.bool)), "known must have shape"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            patch_attention(x, x, **settings)
    with pytest.raises(ValueError, match="context must be a tensor of shape"):
        patch_attention(x, torch.zeros(1, 4, 4, 3))
    with pytest.raises(ValueError, match="x must hold at least one place"):
        patch_attention(x[:, :0], x)
    with pytest.raises(TypeError, match="known must be a boolean"):
        patch_attention(x, x, known=torch.ones(1, 4, 4))
