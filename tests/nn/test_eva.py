"""EVA-01's attention: oracle, relative tables of any grid and of tokens beside it, the authors' state dict."""

import pytest
import torch

import attnlib
from attnlib.grids import Layout
from attnlib.nn.dense.eva import EvaAttention, RelativeTable


def made(**settings):
    torch.manual_seed(0)
    m = EvaAttention(**{**dict(dim=16, num_heads=2), **settings}).double()
    for p in m.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return m


def oracle(m, x, bias):
    """The equation, head by head."""
    out = []
    for h in range(m.num_heads):
        rows = slice(h * m.head_dim, (h + 1) * m.head_dim)
        q, k, v = x @ m.q.weight[rows].T + m.q.bias[rows], x @ m.k.weight[rows].T, x @ m.v.weight[rows].T
        w = torch.softmax(q @ k.transpose(1, 2) / m.head_dim**0.5 + bias[h], -1)
        out.append(w @ (v + m.v.bias[rows]))
    return torch.cat(out, -1) @ m.proj.weight.T + m.proj.bias


def pair_bias(relative, height, width, before, after):
    """(H, N, N), pair by pair."""
    places = [None] * before + [(i, j) for i in range(height) for j in range(width)] + [None] * after
    rows = []
    for q in places:
        for k in places:
            if q is not None and k is not None:
                dy, dx = k[0] - q[0] + height - 1, k[1] - q[1] + width - 1
                rows.append(
                    relative.rows[:, dy] + relative.columns[:, dx] if relative.axes else relative.table[:, dy, dx]
                )
                continue
            kind = 2 if q is None and k is None else 0 if q is None else 1
            beside = relative.beside_rows + relative.beside_columns if relative.axes else relative.beside
            rows.append(beside[:, kind])
    return torch.stack(rows, -1).unflatten(-1, (len(places), -1))


@pytest.mark.parametrize("kind", ["table", "axes"])
@pytest.mark.parametrize("beside", [(0, 0), (1, 0), (2, 1)])
def test_it_is_the_equation(kind, beside):
    m = made(relative=kind, grid=(3, 4))
    x = torch.randn(2, sum(beside) + 12, 16, dtype=torch.float64)
    layout = Layout((("cls", beside[0]), ("image", (3, 4)), ("text", beside[1])))
    y = m(x, layout=layout)
    torch.testing.assert_close(y, oracle(m, x, pair_bias(m.relative, 3, 4, *beside)))
    if beside == (0, 0):
        torch.testing.assert_close(m(x.view(2, 3, 4, 16)).flatten(1, 2), y)


def turned(z, grid, stretched, before, base):
    """Pairs of neighbouring channels as complex numbers, turned by row in the first half of a head, then by column."""
    dim = z.shape[-1]
    pairs = torch.view_as_complex(z.unflatten(-1, (-1, 2)).contiguous())
    for n in range(grid[0] * grid[1]):
        place = [at / side * to for at, side, to in zip(divmod(n, grid[1]), grid, stretched, strict=True)]
        for i in range(dim // 2):
            axis, band = divmod(i, dim // 4)
            angle = torch.tensor(place[axis] * base ** (-band / (dim // 4)), dtype=torch.float64)
            pairs[..., before + n, i] = pairs[..., before + n, i] * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(pairs).flatten(-2)


@pytest.mark.parametrize("beside", [(0, 0), (1, 0), (2, 1)])
@pytest.mark.parametrize("stretched", [None, (6, 5)])
def test_rotary_positions_and_the_inner_norm_are_the_equation(beside, stretched):
    m = made(rotary=100.0, rotary_grid=stretched, inner_norm=True)
    x = torch.randn(2, sum(beside) + 12, 16, dtype=torch.float64)
    layout = Layout((("cls", beside[0]), ("image", (3, 4)), ("text", beside[1])))
    out = []
    for h in range(2):
        rows = slice(8 * h, 8 * h + 8)
        q, k, v = x @ m.q.weight[rows].T + m.q.bias[rows], x @ m.k.weight[rows].T, x @ m.v.weight[rows].T
        q, k = (turned(z, (3, 4), stretched or (3, 4), beside[0], 100.0) for z in (q, k))
        out.append(torch.softmax(q @ k.transpose(1, 2) / 8**0.5, -1) @ (v + m.v.bias[rows]))
    z = torch.cat(out, -1)
    z = (z - z.mean(-1, keepdim=True)) / (z.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    expected = (z * m.norm.weight + m.norm.bias) @ m.proj.weight.T + m.proj.bias
    torch.testing.assert_close(m(x, layout=layout), expected, atol=1e-5, rtol=1e-5)  # angles are float32
    if beside == (0, 0):
        torch.testing.assert_close(m(x.view(2, 3, 4, 16)).flatten(1, 2), m(x, layout=layout))


def test_bad_rotary_positions():
    with pytest.raises(ValueError, match="multiple of 4"):
        EvaAttention(12, 2, rotary=10000.0)
    with pytest.raises(ValueError, match="rotary_grid was given without rotary"):
        EvaAttention(16, 2, rotary_grid=(3, 3))
    with pytest.raises(ValueError, match="rotary"):
        EvaAttention(16, 2, rotary=-1.0)


def test_without_tables_it_is_attention_without_a_key_bias():
    m = made()
    plain = attnlib.create("softmax-attention", dim=16, num_heads=2).double()
    plain.load_state_dict(m.state_dict() | {"k.bias": torch.zeros(16)})
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(m(x), plain(x))
    assert m.k.bias is None and made(qkv_bias=False).q.bias is None


def test_a_linear_table_stays_linear_on_another_grid():
    relative = RelativeTable(1, (4, 4)).double()
    at = torch.arange(7.0).double()
    relative.table.data = (at[:, None] * 0 + 2.5)[None].expand(1, 7, 7).clone()
    torch.testing.assert_close(relative((5, 6)), torch.full((1, 30, 30), 2.5).double())
    axes = RelativeTable(2, (4, 3), axes=True).double()
    assert axes((2, 9), before=1).shape == (2, 19, 19)


def test_bad_input():
    with pytest.raises(ValueError, match="relative="):
        EvaAttention(16, 2, relative="shared")
    with pytest.raises(ValueError, match="num_heads=3"):
        EvaAttention(16, 3)
    with pytest.raises(ValueError, match="grid"):
        EvaAttention(16, 2, relative="table", grid=(3,))
    with pytest.raises(ValueError, match="x must"):
        EvaAttention(16, 2, relative="table")(torch.randn(1, 9, 16))
    with pytest.raises(ValueError, match="displacements"):
        attnlib.convert_state_dict("eva", {"relative_position_bias_table": torch.zeros(11, 2)})
    with pytest.raises(ValueError, match="k_bias"):
        attnlib.convert_state_dict("eva", {"k_bias": torch.zeros(11)})
