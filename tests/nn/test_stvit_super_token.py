"""stvit-super-token: an oracle, what the card asks for, any size, bad input."""

import pytest
import torch
from torch import nn

import attnlib
from attnlib.grids import block_windows
from attnlib.nn.reduced.stvit_super_token import SuperTokenAttention, gathered, neighbours


def make(**settings):
    torch.manual_seed(0)
    m = SuperTokenAttention(**{"dim": 8, "num_heads": 2, "stoken_size": 2, **settings})
    for p in m.parameters():
        nn.init.normal_(p, std=0.4)
    return m.double()


def data(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attend(m, s):
    """Multi-head attention of tokens (B, n, C)."""
    q, k, v = (t.unflatten(-1, (m.num_heads, -1)).transpose(1, 2) for t in m.qkv(s).chunk(3, -1))
    out = ((q @ k.mT) * m.scale).softmax(-1) @ v
    return m.proj(out.transpose(1, 2).flatten(2))


def oracle(m, x, border="zeros", n_iter=1, refine=attend, detach=True):
    """Token by token: scores with the super tokens of the nine cells around, sums, attention, and back."""
    batch, height, width, dim = x.shape
    h, w = m.stoken_size
    rows, columns = -(-height // h), -(-width // w)
    tokens = [(i, j) for i in range(height) for j in range(width)]
    s = {}
    for a in range(rows):
        for b in range(columns):
            s[a, b] = torch.stack([x[:, i, j] for i, j in tokens if (i // h, j // w) == (a, b)]).mean(0)
    for step in range(n_iter):
        q = {}
        for i, j in tokens:
            places = [(i // h + u, j // w + v) for u in (-1, 0, 1) for v in (-1, 0, 1)]
            if border == "mask":
                places = [p for p in places if p in s]
            scores = torch.stack([(x[:, i, j] * s.get(p, torch.zeros_like(x[:, 0, 0]))).sum(-1) for p in places])
            q[i, j] = dict(zip(places, (scores * dim**-0.5).softmax(0), strict=True))
            if detach:
                q[i, j] = {p: weight.detach() for p, weight in q[i, j].items()}
        new = {}
        for p in s:
            near = [t for t in tokens if p in q[t]]
            mass = sum(q[t][p] for t in near)
            new[p] = sum(q[t][p][:, None] * x[:, t[0], t[1]] for t in near) / mass[:, None]
        s = new if step == n_iter - 1 or not detach else {p: t.detach() for p, t in new.items()}
    said = dict(zip(s, refine(m, torch.stack(list(s.values()), 1)).unbind(1), strict=True))
    y = [sum(weight[:, None] * said[p] for p, weight in q[t].items() if p in said) for t in tokens]
    return torch.stack(y, 1).view(batch, height, width, dim)


@pytest.mark.parametrize("border", ["zeros", "mask"])
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize(
    ("settings", "grid"),
    [(dict(), (4, 6)), (dict(stoken_size=(3, 2)), (7, 5)), (dict(n_iter=3), (5, 4)), (dict(stoken_size=9), (3, 4))],
)
def test_it_equals_the_oracle(settings, grid, border, detach):
    """Also on maps that cells do not divide, and on maps smaller than a cell."""
    m, x = make(border=border, detach=detach, **settings), data(2, *grid, 8).requires_grad_()
    expected = oracle(m, x, border, settings.get("n_iter", 1), detach=detach)
    y = m(x)
    torch.testing.assert_close(y, expected, atol=1e-11, rtol=0)
    g, leaves = data(*y.shape, seed=2), [x, m.qkv.weight, m.proj.weight]
    ours, theirs = (torch.autograd.grad(t, leaves, g) for t in (y, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_reading_and_writing_of_cells_are_transposes():
    a, b = data(2, 3, 4, 5).requires_grad_(), data(2, 3, 4, 9, 5).requires_grad_()
    torch.testing.assert_close((neighbours(a) * b).sum(), (a * gathered(b)).sum())
    assert torch.autograd.gradcheck(neighbours, a) and torch.autograd.gradcheck(gathered, b)
    assert torch.autograd.gradgradcheck(lambda t: neighbours(t.square()), a[:1, :2, :2, :1].detach().requires_grad_())
    jacobian = torch.func.jacrev(gathered)(b[:1, :2, :2, :, :1].detach())
    torch.testing.assert_close(jacobian, torch.func.jacfwd(gathered)(b[:1, :2, :2, :, :1].detach()))


@pytest.mark.parametrize("n_iter", [1, 2])
def test_weights_sum_to_one_and_smooth(n_iter):
    """Constant maps stay as they are where no neighbour is missing, or where missing ones are left out."""
    m, x = make(refine="none", n_iter=n_iter), torch.ones(1, 8, 8, 8, dtype=torch.float64)
    y = m(x)
    torch.testing.assert_close(y[:, 2:-2, 2:-2], x[:, 2:-2, 2:-2])
    assert (y[:, 0] < 0.999).all() and (y[:, :, -1] < 0.999).all()
    torch.testing.assert_close(make(refine="none", n_iter=n_iter, border="mask")(x), x)


def test_cells_of_one_token_are_plain_attention():
    m, x = make(stoken_size=1), data(2, 3, 5, 8)
    torch.testing.assert_close(m(x), attend(m, x.flatten(1, 2)).view_as(x))
    plain = attnlib.create("softmax-attention", dim=8, num_heads=2).double()
    plain.load_state_dict(attnlib.convert_state_dict("softmax-attention", m.state_dict()))
    torch.testing.assert_close(m(x), plain(x.flatten(1, 2)).view_as(x))
    assert m.traits.gradient == "exact" and m.traits.permutation_equivariant


def test_one_cell_is_the_mean_of_the_map():
    m, x = make(stoken_size=6, border="mask"), data(2, 6, 6, 8)
    expected = attend(m, x.mean((1, 2))[:, None])
    torch.testing.assert_close(m(x), expected[:, None].expand_as(x))


def test_a_second_association_fits_clusters_better():
    """The weighted distance of tokens to their super tokens falls, on clusters whose borders are not those of cells."""
    g = torch.Generator().manual_seed(0)
    centres = 3 * torch.nn.functional.normalize(torch.randn(5, 16, generator=g, dtype=torch.float64), dim=-1)
    regions = torch.randint(5, (4, 4), generator=g).repeat_interleave(3, 0).repeat_interleave(3, 1)
    x = centres[regions] + 0.1 * torch.randn(12, 12, 16, generator=g, dtype=torch.float64)
    cells = block_windows(x[None], 4).flatten(3, 4)

    def distortion(n_iter):
        weights, mass = make(dim=16, border="mask", n_iter=n_iter)._associated(cells, None, None)
        s = neighbours(gathered(weights @ cells) / mass)
        return (weights * (s.unsqueeze(-2) - cells.unsqueeze(-3)).square().sum(-1)).sum().item()

    assert distortion(2) < distortion(1)


def test_attention_is_among_super_tokens():
    m, seen = make(stoken_size=(4, 2)), []
    m.qkv.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    m(data(1, 16, 12, 8))
    assert seen == [(1, 4, 6, 8)]


@pytest.mark.parametrize("border", ["zeros", "mask"])
@pytest.mark.parametrize("refine", ["attention", "conv", "none"])
def test_a_padded_image_is_that_image(border, refine):
    m, x = make(border=border, refine=refine, n_iter=2), data(2, 9, 10, 8)
    valid = torch.zeros(2, 9, 10, dtype=torch.bool)
    valid[0, :5, :3] = valid[1] = True
    y = m(x.masked_fill(~valid.unsqueeze(-1), float("nan")), valid=valid)
    torch.testing.assert_close(y[:1, :5, :3], m(x[:1, :5, :3]))
    torch.testing.assert_close(y[1:], m(x[1:]))
    nothing = m(x, valid=torch.zeros_like(valid))
    assert not nothing.any()


def test_padding_takes_part_only_where_it_is_asked_to():
    x = data(1, 5, 7, 8)
    assert not torch.allclose(make(pad="zeros")(x), make()(x))
    torch.testing.assert_close(make(pad="zeros")(x[:, :4, :6]), make()(x[:, :4, :6]))


def test_half_precision_divides_by_no_zero():
    """A super token that nearly nobody belongs to: its mass is nothing in half precision, its mean is not."""
    m = SuperTokenAttention(8, 2, 2, refine="none").half()
    x = torch.zeros(1, 4, 6, 8, dtype=torch.half)
    x[:, :, :3], x[:, :, 3:] = 12.0, -12.0
    assert m(x).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(border="wrap"), "border='wrap' is not possible"),
        (dict(refine="mlp"), "refine='mlp' is not possible"),
        (dict(pad="refuse"), "pad='refuse' is not possible"),
        (dict(stoken_size=0), "stoken_size"),
        (dict(stoken_size=(2, 2, 2)), "stoken_size"),
        (dict(n_iter=0), "n_iter"),
        (dict(num_heads=3), "num_heads"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SuperTokenAttention(**{"dim": 8, "num_heads": 2, **settings})


def test_the_authors_projections_need_the_number_of_heads():
    theirs = {"stoken_refine.qkv.weight": torch.zeros(24, 8, 1, 1)}
    with pytest.raises(ValueError, match="num_heads is needed"):
        SuperTokenAttention.convert_state_dict(theirs)
    with pytest.raises(ValueError, match="stoken_refine.qkv.weight|num_heads"):
        SuperTokenAttention.convert_state_dict(theirs, num_heads=5)
