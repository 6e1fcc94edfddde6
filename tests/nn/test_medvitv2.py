"""medvitv2: attention to means of tokens, one test per acceptance criterion that concerns the layer."""

import pytest
import torch

import attnlib
from attnlib.nn.dense.softmax_attention import SoftmaxAttention

F64 = torch.float64


def make(train=False, **config):
    torch.manual_seed(0)
    module = attnlib.create("medvitv2", **{"dim": 12, "num_heads": 3, "sr_ratio": 2, **config}).double()
    for p in module.parameters():
        torch.nn.init.normal_(p, 0, 0.4)
    return module.train(train)


def oracle(m, x, runs):
    """One sequence (N, C): keys are means over ``runs`` of tokens."""
    keys = torch.stack([x[run].mean(0) for run in runs])
    keys = m.norm.norm(keys[..., None, None])[..., 0, 0]
    out = []
    for q, k, v in zip(*(f(t).chunk(3, -1) for f, t in ((m.q, x), (m.k, keys), (m.v, keys))), strict=True):
        out.append((q @ k.T * q.shape[-1] ** -0.5).softmax(-1) @ v)
    return m.proj(torch.cat(out, -1))


@pytest.mark.parametrize(("count", "compat"), [(12, None), (14, None), (14, "authors"), (3, "authors")])
def test_output_equals_means_of_runs(count, compat):
    m, x = make(compat=compat), torch.randn(2, count, 12, dtype=F64)
    last = count // 4 * 4 if compat and count >= 4 else count
    runs = [range(i, min(i + 4, last)) for i in range(0, last, 4)]
    torch.testing.assert_close(m(x), torch.stack([oracle(m, one, [list(r) for r in runs]) for one in x]))


def test_runs_follow_the_rows_of_a_map_and_cells_do_not():
    x = torch.randn(2, 4, 6, 12, dtype=F64)
    rows, cells = make(), make(pool="grid")
    torch.testing.assert_close(rows(x), rows(x.flatten(1, 2)).view(x.shape))
    at = torch.arange(24).view(4, 6)
    runs = [at[i : i + 2, j : j + 2].flatten().tolist() for i in (0, 2) for j in (0, 2, 4)]
    expected = torch.stack([oracle(cells, one.flatten(0, 1), runs) for one in x])
    torch.testing.assert_close(cells(x).flatten(1, 2), expected)


def test_a_ratio_of_one_is_plain_attention():
    m, plain = make(sr_ratio=1), SoftmaxAttention(12, 3).double()
    plain.load_state_dict(m.state_dict())
    x, mask = torch.randn(2, 3, 4, 12, dtype=F64), torch.rand(12, 12) < 0.7
    torch.testing.assert_close(m(x, mask=mask), plain(x, mask=mask))
    torch.testing.assert_close(m(x, returns=("weights",)).weights, plain(x, returns=("weights",)).weights)


def test_statistics_are_those_of_means_that_exist():
    x = torch.randn(2, 8, 12, dtype=F64)
    valid = torch.ones(2, 8, dtype=torch.bool)
    valid[1, 4:] = False
    a, b = make(train=True), make(train=True)
    a(x, valid=valid)
    b(x.masked_fill(~valid[..., None], 7.0), valid=valid)
    torch.testing.assert_close(a.norm.norm.running_mean, b.norm.norm.running_mean)
    means = torch.stack([x[0, :4].mean(0), x[0, 4:].mean(0), x[1, :4].mean(0)])
    torch.testing.assert_close(a.norm.norm.running_mean, 0.1 * means.mean(0))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(sr_ratio=0), "sr_ratio"),
        (dict(pool="max"), "pool='max' is not possible"),
        (dict(compat="paper"), "compat='paper' is not possible"),
        (dict(num_heads=5), "num_heads=5 does not divide dim=12"),
    ],
)
def test_bad_settings_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        make(**config)


def test_bad_calls_are_refused():
    x = torch.randn(1, 8, 12, dtype=F64)
    with pytest.raises(ValueError, match="takes no mask"):
        make()(x, mask=torch.ones(8, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="cannot return 'weights'"):
        make()(x, returns=("weights",))
