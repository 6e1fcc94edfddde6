import pytest
import torch
import torch.nn.functional as F
from parity import Fixture
from torch.utils.flop_counter import FlopCounterMode

import attnlib
from attnlib.models.tsm2 import TSM2
from attnlib.nn.scan.mambamixer import Averages, ChannelMixer, MambaMixer

FIXTURE = Fixture("mambamixer")


def tsm2(**settings):
    return TSM2(**{**dict(num_series=3, seq_len=24, pred_len=5, patch_len=8, stride=4, dim=8, depth=2, d_state=3,
                          drop=0.0), **settings})  # fmt: skip


def test_time_series_model_equals_the_replication():
    model = TSM2(**FIXTURE.config["tsm2"])
    model.load_state_dict(TSM2.convert_state_dict(FIXTURE.under("tsm2/sd")))
    x = FIXTURE.tensors["tsm2/x/x"].clone().requires_grad_()
    y = model(x)
    torch.testing.assert_close(y, FIXTURE.tensors["tsm2/y"], atol=1e-5, rtol=1e-5)
    (y * FIXTURE.tensors["tsm2/g"]).sum().backward()
    torch.testing.assert_close(x.grad, FIXTURE.tensors["tsm2/dx/x"], atol=1e-4, rtol=1e-4)
    theirs = TSM2.convert_state_dict(FIXTURE.under("tsm2/dw"))
    ours = {n: p.grad for n, p in model.named_parameters()}
    assert set(ours) == set(theirs)
    largest = max(float(t.abs().max()) for t in theirs.values())
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, atol=1e-5 * largest, rtol=1e-5)


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_number_of_averages(blocks):
    m = MambaMixer(dim=4, blocks=blocks, group=4)
    assert sum(p.numel() for p in m.averages.parameters()) == sum(4 * i + 1 for i in range(1, blocks + 1))


def test_averages_are_the_equations():
    torch.manual_seed(0)
    m = MambaMixer(dim=4, blocks=3, norm=False, group=2, d_state=2)
    with torch.no_grad():
        for p in m.averages.parameters():
            p.normal_()
    x = torch.randn(2, 5, 4)
    t, c = [x], [x]
    for i, a in enumerate(m.averages):
        read = sum(a.alpha[j] * t[j] for j in range(i + 1)) + sum(a.beta[j] * c[j] for j in range(i + 1))
        t.append(m.tokens[i][0]["inner"](read))
        read = sum(a.theta[j] * t[j] for j in range(i + 2)) + sum(a.gamma[j] * c[j] for j in range(i + 1))
        c.append(m.channels[i]["inner"](read))
    torch.testing.assert_close(m(x), c[-1], atol=1e-5, rtol=1e-5)


def test_softmax_averages_sum_to_one():
    a = Averages(3, "softmax")
    x = torch.randn(2, 4)
    torch.testing.assert_close(a.tokens([x] * 3, [x] * 3), 2 * x)
    torch.testing.assert_close(a.channels([x] * 4, [x] * 3), 2 * x)


@pytest.mark.parametrize("token", ["bimamba", "ss2d"])
def test_without_channels_it_is_a_plain_stack(token):
    """With the starting averages and no channel mixer: mixers one behind the other, without residuals."""
    m = MambaMixer(dim=6, blocks=3, channel=False, token=token, norm=False)
    x = torch.randn(2, 4, 5, 6)
    y = x
    for block in m.tokens:
        y = block[0]["inner"](y)
    torch.testing.assert_close(m(x), y)


@pytest.mark.parametrize("maps", ["dense", "shared"])
def test_channels_mix_inside_a_token_alone(maps):
    m, x = ChannelMixer(dim=6, maps=maps, group=2, d_state=3), torch.randn(1, 4, 6)
    support = torch.autograd.functional.jacobian(m, x)[0, :, :, 0].abs().amax((1, 3)) > 0
    assert torch.equal(support, torch.eye(4, dtype=torch.bool))
    inside = torch.autograd.functional.jacobian(lambda t: m(t)[0, 0], x)[:, 0, 0].abs() > 0
    assert inside.all()  # from every channel to every other, both ways
    order = torch.randperm(4)
    torch.testing.assert_close(m(x[:, order]), m(x)[:, order])


def test_tokens_mix_along_tokens_alone():
    """Through one channel's scan: what a token mixer reads of another token stays in its channel."""
    scan = attnlib.create("bimamba", dim=4, d_conv=2).scan
    u = torch.randn(1, 5, 8)
    dt = torch.rand(1, 5, 8)
    b, c = torch.randn(2, 1, 5, 16)

    def run(t):
        return attnlib.ops.selective_scan(t, dt, scan.A, b, c, scan.D)

    across = torch.autograd.functional.jacobian(run, u)[0, 4, :, 0].abs() > 0  # (to channel, from token, from channel)
    assert torch.equal(across.any(1), torch.eye(8, dtype=torch.bool)) and across.any(2).all()


def test_dense_channel_scan_is_its_equation():
    m, x = ChannelMixer(dim=6, width=4, d_state=2, d_conv=2), torch.randn(3, 6)
    u, z = m.in_proj(x).chunk(2, -1)
    total = 0
    for scan, turned in ((m.scan, False), (m.back, True)):
        seq = (u.flip(1) if turned else u).unsqueeze(-1)
        w = scan.conv1d.weight[0, 0]
        before = F.pad(seq, (0, 0, 1, 0))[:, :-1]
        v = F.silu(seq * w[1] + before * w[0] + scan.conv1d.bias)
        dt, b, c = scan.x_proj(v).split([1, 2, 2], -1)
        step, h, outs = F.softplus(scan.dt_proj(dt)), 0, []
        for t in range(4):
            h = (step[:, t, :, None] * scan.A).exp() * h + step[:, t, :, None] * b[:, t, None] * v[:, t, :, None]
            outs.append((h * c[:, t, None]).sum(-1) + scan.D * v[:, t])
        y = torch.stack(outs, 1)[..., 0]
        total = total + (y.flip(1) if turned else y) * F.silu(z)
    torch.testing.assert_close(m(x[None])[0], m.out_proj(total), atol=1e-5, rtol=1e-4)


def test_work_is_linear_in_tokens_and_in_channels():
    def work(n, dim):
        m = ChannelMixer(dim, maps="shared", group=4, d_state=2).requires_grad_(False)
        with FlopCounterMode(display=False) as counter:
            m(torch.randn(1, n, dim))
        return counter.get_total_flops()

    assert work(8, 64) == 2 * work(4, 64) == 2 * work(8, 32)


def test_time_is_causal_and_series_are_not():
    m = tsm2().eval()
    y = torch.randn(1, 4, 8)
    moved = y.clone()
    moved[:, 3] += 1.0
    assert torch.equal(m.time_mixers[0](y)[:, :3], m.time_mixers[0](moved)[:, :3])
    assert not torch.equal(m.series_mixers[0](y)[:, :3], m.series_mixers[0](moved)[:, :3])


@pytest.mark.parametrize("joint", [True, False])
def test_known_series_and_futures(joint):
    m = tsm2(static_dim=2, future_len=4, future_dim=3, joint=joint)
    x, static, future = torch.randn(2, 24, 3), torch.randn(2, 3, 2), torch.randn(2, 3, 4, 3)
    y = m(x, static, future)
    assert y.shape == (2, 5, 3) and not torch.allclose(y, m(x, static + 1, future), atol=1e-6)
    assert not torch.allclose(y, m(x, static, future + 1), atol=1e-6)
    m.loss(y, torch.zeros_like(y))["mse"].backward()
    assert all(p.grad is not None for p in m.parameters())
    with pytest.raises(ValueError, match="as the model was built"):
        m(x)
    with pytest.raises(ValueError, match="future must be"):
        m(x, static, future[:, :, :3])
    with pytest.raises(ValueError, match="static must be"):
        m(x, static[..., :1], future)


def test_forecasts_move_with_level_and_scale():
    m = tsm2().eval()
    x = torch.randn(1, 24, 3)
    torch.testing.assert_close(m.predict(5 + 3 * x), 5 + 3 * m.predict(x), atol=1e-3, rtol=1e-4)


def test_generation_state():
    m = attnlib.create("mambamixer", dim=8, causal=True, blocks=2, per_block=2, group=4, d_state=2)
    x, state, pieces = torch.randn(2, 9, 8), None, []
    for part in x.split([4, 1, 1, 3], 1):
        y, state = m.step(part, state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), m(x), atol=1e-5, rtol=1e-4)


def test_vision_models():
    m = attnlib.create_model("vim2_tiny", embed_dims=(8, 16), token_mixers=(2, 2), channel_mixers=(1, 2), widths=(4, 8),
                             num_classes=3, d_state=2)  # fmt: skip
    assert m(torch.randn(1, 3, 20, 28)).shape == (1, 3)
    assert [len(stage.blocks[0].mixer.tokens) for stage in m.stages] == [1, 2]
    assert [len(stage.blocks[0].mixer.tokens[0]) for stage in m.stages] == [2, 1]
    m(torch.randn(2, 3, 16, 16)).sum().backward()
    unread = {n for n, p in m.named_parameters() if p.grad is None}
    assert not unread
    for name, millions in (("tiny", 24.0), ("small", 43.7), ("base", 75.6)):
        with torch.device("meta"):
            whole = attnlib.create_model(f"vim2_{name}")
        assert sum(p.numel() for p in whole.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ChannelMixer(6, group=4), "group=4 does not divide"),
        (lambda: ChannelMixer(6, width=4, maps="shared"), "needs maps='dense'"),
        (lambda: ChannelMixer(6, maps="wide"), "maps='wide'"),
        (lambda: MambaMixer(6, causal=True, token="ss2d"), "causal=True"),
        (lambda: MambaMixer(6, averaging="mean"), "averaging='mean'"),
        (lambda: MambaMixer(6, drop_path=0.1), "needs residual=True"),
        (lambda: MambaMixer(6, blocks=0), "blocks must be"),
        (lambda: tsm2(seq_len=6), "holds no patch"),
        (lambda: tsm2(future_len=2), "must both be 0"),
        (lambda: tsm2()(torch.randn(1, 23, 3)), "x must be"),
        (lambda: tsm2().loss(torch.zeros(1, 5, 3), torch.zeros(1, 4, 3)), "target must be"),
        (lambda: attnlib.create_model("vim2_tiny", channel_mixers=(1, 1, 4, 1)), "must divide"),
        (lambda: attnlib.create_model("vim2_tiny", widths=(1, 1)), "one number for each"),
        (lambda: attnlib.create_model("vim2_tiny", drop_path_rate=0.1), "needs residual=True"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
