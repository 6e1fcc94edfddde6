"""soft-softmax-free-transformer: a Gaussian kernel through landmarks, a test per acceptance criterion of the card."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import attnlib
from attnlib import ops
from attnlib.nn.reduced.soft_softmax_free_transformer import SoftmaxFreeAttention

F64 = torch.float64


def make(**settings):
    torch.manual_seed(0)
    m = SoftmaxFreeAttention(**{"dim": 8, "num_heads": 2, "ratio": 2, "conv_size": 3, **settings}).double().eval()
    for p in m.parameters():
        torch.nn.init.normal_(p, 0, 0.5)
    return m


def noise(*shape, seed=1, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def kernel(a, b):
    return torch.exp(-(torch.cdist(a, b) ** 2) / 2)


def inverse(a, steps, norm):
    """Newton's steps on one (m, m) matrix, or on all heads (H, m, m) of a sample at once."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype)
    if not norm:
        guess = 1.8 / a.sum(-1).amax(-1)[:, None, None] ** 2
        a = a + 0.01 * eye
        v = guess * a
    else:
        guess = 2 / a.sum(-1).max() ** 2
        for _ in range(10):
            if (eye - guess * a @ a).abs().sum(-2).max() > 1.01:
                guess = guess / 2
        v = guess * a
    for _ in range(steps):
        v = 2 * v - v @ a @ v
    return v


def oracle(m, x):
    """(h, w, C): head by head, landmark by landmark."""
    h, w, _ = x.shape
    r, s = m.ratio
    q = (x @ m.q.weight.T + m.q.bias) / m.head_dim**0.25
    v = x @ m.v.weight.T + m.v.bias
    split = lambda t: t.view(h, w, m.num_heads, m.head_dim).permute(2, 0, 1, 3)  # noqa: E731
    q, v = split(q), split(v)
    marks = torch.stack(
        [
            torch.einsum("hijd,cdij->hc", q[:, r * i : r * i + r, s * j : s * j + s], m.landmark.weight)
            for i in range(h // r)
            for j in range(w // s)
        ],
        1,
    )
    marks = torch.nn.functional.gelu(m.landmark_norm(marks))
    q, flat = q.flatten(1, 2), v.flatten(1, 2)
    among, read = kernel(marks, marks), kernel(q, marks)
    inner = inverse(among, m.max_iter, m.normalized)
    if m.normalized:
        root = among.sum(-1) ** -0.5
        inner = root[:, :, None] * inner * root[:, None]
    out = (read @ inner @ read.mT @ flat).view(m.num_heads, h, w, -1)
    if m.local is not None:
        near = torch.nn.functional.conv2d(v.permute(3, 0, 1, 2), m.local.weight, padding=m.local.padding, groups=len(v))
        out = out + near.permute(1, 2, 3, 0)
    return out.permute(1, 2, 0, 3).flatten(2) @ m.proj.weight.T + m.proj.bias


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("ratio", "conv"), [(2, 3), ((3, 2), 0), (1, 5)])
def test_output_equals_the_equation(ratio, conv, norm):
    m = make(ratio=ratio, conv_size=conv, norm=norm, max_iter=8)
    x = noise(2, 6, 4, 8)
    if ratio == 1:
        return torch.testing.assert_close(m.kernel(x), kernel(*[m._read(x, None)[1]] * 2))
    torch.testing.assert_close(m(x), torch.stack([oracle(m, one) for one in x]))


def test_as_many_landmarks_as_tokens_give_the_whole_kernel():
    q, v = noise(1, 2, 12, 6, scale=2.0), noise(1, 2, 12, 4, seed=2)
    plain = torch.linalg.inv(kernel(q, q) + 0.01 * torch.eye(12, dtype=F64))
    torch.testing.assert_close(ops.nystrom_attention(q, q, v), kernel(q, q) @ plain @ kernel(q, q) @ v)
    # What the jitter takes away is a hundredth of an eigenvalue near one.
    assert (ops.nystrom_attention(q, q, v) - kernel(q, q) @ v).abs().max() < 0.05
    exact = kernel(q, q) @ ops.newton_inverse(kernel(q, q), 40, jitter=0.0) @ kernel(q, q) @ v
    torch.testing.assert_close(exact, kernel(q, q) @ v, rtol=1e-6, atol=1e-8)


def test_newton_finds_the_inverse_and_its_gradient():
    a = kernel(*[noise(3, 5, 4, scale=2.0)] * 2)
    eye = torch.eye(5, dtype=F64)
    errors = [(ops.newton_inverse(a, n, jitter=0.0) @ a - eye).abs().max().item() for n in range(1, 14)]
    assert all(later <= earlier or later < 1e-12 for earlier, later in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 1e-12
    one, two = (a.clone().requires_grad_() for _ in range(2))
    g = noise(3, 5, 5, seed=4)
    ops.newton_inverse(one, 20, check=False).backward(g)
    torch.linalg.inv(two + 0.01 * eye).backward(g)
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-6, atol=1e-8)
    assert torch.autograd.gradgradcheck(
        lambda t: ops.newton_inverse(t @ t.mT + torch.eye(3, dtype=F64), 30, check=False),
        noise(2, 3, 3, seed=5).requires_grad_(),
    )
    unrolled = kernel(*[noise(2, 4, 4, scale=0.7)] * 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: ops.newton_inverse(t, 4, closed=False, check=False), unrolled)


def test_the_kernel_is_symmetric():
    for m in (make(), make(norm=True), make(ratio=1)):
        k = m.kernel(noise(1, 6, 4, 8))
        torch.testing.assert_close(k, k.mT, rtol=1e-8, atol=1e-8)


def test_cost_is_linear_in_the_tokens_for_as_many_landmarks():
    counts = []
    for height, ratio in ((8, (4, 4)), (16, (8, 4)), (32, (16, 4))):
        m = make(ratio=ratio, conv_size=0)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            m(noise(1, height, 8, 8))
        fixed = 20 * 2 * 2 * 2 * 4**3  # Newton's steps: two products, two heads, four landmarks
        counts.append(counter.get_total_flops() - fixed)
    assert counts[2] - counts[1] == pytest.approx(2 * (counts[1] - counts[0]), rel=0.02)
    assert counts[1] / counts[0] == pytest.approx(2, rel=0.05)


def test_the_normalized_kernel_does_not_grow_with_the_tokens():
    sizes, norms = (4, 8, 12), {}
    for norm in (False, True):
        m = make(norm=norm, num_heads=1, max_iter=30)
        norms[norm] = [torch.linalg.matrix_norm(m.kernel(noise(1, n, n, 8, scale=0.3)), 2).max().item() for n in sizes]
    assert norms[False][2] > 3 * norms[False][0]
    grown = norms[True][2] / norms[True][0]
    assert grown < 0.5 * norms[False][2] / norms[False][0]
    q = noise(1, 1, 40, 4)
    among = kernel(q, q)
    root = among.sum(-1) ** -0.5
    # With every token as its own landmark the normalized kernel is D^-1/2 K D^-1/2, whose norm is at most one.
    assert torch.linalg.matrix_norm(root[..., None] * among * root[..., None, :], 2).max() <= 1 + 1e-9


def test_guesses_of_samples_depend_on_the_batch_only_as_the_authors_have_them():
    x = noise(2, 4, 4, 8) * torch.tensor([1.0, 4.0], dtype=F64).view(2, 1, 1, 1)
    for compat, same in ((None, True), ("authors", False)):
        m = make(norm=True, max_iter=3, compat=compat)
        alone = torch.cat([m(x[:1]), m(x[1:])])
        assert torch.allclose(m(x), alone, atol=1e-9) is same


def test_rows_behind_the_last_whole_cell():
    ours, theirs, x = make(), make(compat="authors"), noise(1, 5, 4, 8)
    assert ours._read(x, None)[1].shape[2] == 6 and theirs._read(x, None)[1].shape[2] == 4
    torch.testing.assert_close(theirs.kernel(x)[..., :16, :16], theirs.kernel(x[:, :4]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(ratio=0), "ratio"),
        (dict(ratio=(2, 2, 2)), "ratio"),
        (dict(conv_size=4), "conv_size must be odd"),
        (dict(max_iter=0), "max_iter must be an integer of at least 1"),
        (dict(num_heads=3), "num_heads=3 does not divide dim=8"),
        (dict(compat="theirs"), "compat='theirs' is not possible"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_bad_calls_are_refused():
    m, x = make(), noise(1, 4, 4, 8)
    with pytest.raises(ValueError, match="takes no mask"):
        m(x, mask=torch.ones(16, 16, dtype=torch.bool))
    with pytest.raises(ValueError, match="takes no context"):
        m(x, noise(1, 3, 8))
    with pytest.raises(ValueError, match="must be positive definite"):
        ops.newton_inverse(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    with pytest.raises(ValueError, match="must be symmetric"):
        ops.newton_inverse(torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="must be square"):
        ops.newton_inverse(torch.ones(2, 3))
    with pytest.raises(ValueError, match="finite"):
        ops.newton_inverse(torch.full((2, 2), torch.nan))
    with pytest.raises(ValueError, match="landmarks must have"):
        ops.nystrom_attention(noise(1, 2, 4, 3), noise(1, 2, 4, 2), noise(1, 2, 4, 3))
    assert attnlib.create("soft", dim=8, num_heads=2).traits.mask is False


def test_no_steps_are_the_first_guess_and_widths_must_agree():
    matrix = torch.eye(3, dtype=torch.float64)[None] * 2
    guess = ops.newton_inverse(matrix.requires_grad_(), steps=0, jitter=0.0)
    torch.testing.assert_close(guess, 1.8 / 4 * matrix)
    guess.sum().backward()
    assert matrix.grad.isfinite().all()
    with pytest.raises(ValueError, match=r"a and b must be \(..., N, D\)"):
        ops.gaussian_kernel(torch.zeros(1, 2, 4), torch.zeros(1, 2, 3))
