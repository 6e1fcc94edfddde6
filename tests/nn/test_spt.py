"""SPT: codes and codebook as the authors', choice by matches, routed MLPs against dense ones, bad input."""

import pytest
import torch
import torch.nn.functional as F
from parity import HERE
from safetensors.torch import load_file
from torch import nn

import attnlib
from attnlib.nn.sparse.spt import Codebook, RoutedMlp, SPTAttention, matching_keys

RECORDED = load_file(HERE / "spt-codebook.safetensors")


def make(**settings):
    torch.manual_seed(0)
    m = SPTAttention(**{"dim": 16, "num_heads": 2, "codeword_dim": 2, "num_codewords": 4, "coeff": 4, **settings})
    return m.double()


def data(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_codes_and_loss_equal_the_authors():
    book = Codebook(3, 5, 4)
    book.load_state_dict({"weight": RECORDED["weight"]})
    z = RECORDED["z"].clone().requires_grad_()
    assert book.codes(z).equal(RECORDED["codes"].long())
    loss = book.loss(z)
    torch.testing.assert_close(loss.reshape(1), RECORDED["loss"], rtol=1e-5, atol=1e-6)
    dz, dw = torch.autograd.grad(loss, [z, book.weight])
    torch.testing.assert_close(dz, RECORDED["dz"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dw, RECORDED["dw"], rtol=1e-5, atol=1e-6)
    some = torch.ones(2, 6, dtype=torch.bool)
    some[:, 4:] = False
    torch.testing.assert_close(book.loss(z, some), book.loss(z[:, :4]))


def oracle(m, x):
    """Every query ranks the keys before it by steps of matches, then by position."""
    n = x.shape[1]
    q, k, v = (t(x).unflatten(-1, (2, 8)).transpose(1, 2) for t in (m.q, m.k, m.v))
    w = m.codebook.weight
    codes = [
        (z.unflatten(-1, (-1, w.shape[2])).unsqueeze(-2) - w).abs().sum(-1).argmin(-1) for z in (q, k)
    ]  # fmt: skip
    out = torch.zeros_like(v)
    for b in range(x.shape[0]):
        for h in range(2):
            for i in range(n):
                match = (codes[0][b, h, i] == codes[1][b, h, : i + 1]).sum(-1)
                step = (match // max(1, w.shape[0] // m.steps)).clamp(max=m.steps - 1)
                ranked = sorted(range(i + 1), key=lambda j: (-int(step[j]), j))[: max(1, n // m.coeff)]
                s = k[b, h, ranked] @ q[b, h, i] * m.scale
                s = s if m.clamp is None else s.clamp(-m.clamp, m.clamp)
                out[b, h, i] = s.softmax(0) @ v[b, h, ranked]
    return m.proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("settings", [{}, {"clamp": 0.3}, {"codeword_dim": 1, "steps": 3}, {"codeword_dim": 8}])
def test_it_equals_attention_to_the_keys_that_match(settings):
    m, x = make(**settings), data(2, 14, 16)
    torch.testing.assert_close(m(x), oracle(m, x))
    g = data(2, 14, 16, seed=2)
    leaves = [x.requires_grad_(), m.q.weight, m.k.weight, m.v.weight]
    ours, theirs = (torch.autograd.grad(y, leaves, g) for y in (m(x), oracle(m, x)))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_all_keys_are_causal_attention_and_equal_codes_the_earliest():
    x = data(1, 10, 16)
    full, dense = make(coeff=1), make(dense=True)
    torch.testing.assert_close(full(x), dense(x))
    same = torch.zeros(1, 1, 10, 4, dtype=torch.long)
    plan = matching_keys(same, same, 3, 4)
    assert plan.index[0, 0, 9].tolist() == [0, 1, 2, 3] and plan.count[0, 0].tolist() == [1, 2, 3, 4, 4, 4, 4, 4, 4, 4]


def clustered(n=96, width=16):
    """Vectors around a few centres, which their codes can tell apart."""
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(6, width, generator=g) * 2
    return centres[torch.randint(0, 6, (n,), generator=g)] + 0.3 * torch.randn(n, width, generator=g)


def recall(book, z):
    """Share of the causal map's K heaviest keys that are chosen."""
    n, keep = z.shape[0], 12
    codes = book.codes(z)[None, None]
    plan = matching_keys(codes, codes, book.weight.shape[1], keep)
    scores = (z @ z.T).masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf"))
    chosen = plan.chosen()[0, 0].gather(1, scores.topk(keep, -1).indices)[48:]
    return float(chosen.float().mean())


def test_recall_lies_above_chance_and_grows_with_the_codebook():
    torch.manual_seed(0)
    z, book = clustered(), Codebook(4, 8, 4)
    with torch.no_grad():  # codewords far from all vectors tell nothing apart
        book.weight.mul_(0.3).add_(3)
    before = recall(book, z)
    optimizer = torch.optim.Adam(book.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        book.loss(z).backward()
        optimizer.step()
    assert recall(book, z) > max(before + 0.1, 2 * 12 / 72)


def test_losses_come_out_and_the_choice_has_no_gradient():
    m, x = make(), data(2, 12, 16)
    out = m(x, returns=("losses",))
    assert set(out.losses) == {"codebook"} and torch.autograd.grad(out.losses["codebook"], m.codebook.weight)
    assert torch.autograd.grad(m(x).sum(), m.codebook.weight, allow_unused=True) == (None,)
    plan = m.plan(x)
    assert plan.index.shape == (2, 2, 12, 3)
    torch.testing.assert_close(m(x, plan=plan), m(x))
    with pytest.raises(ValueError, match="has no plan"):
        make(dense=True).make_plan(x)


# ---- routed MLPs


@pytest.mark.parametrize("gated", [False, True])
def test_all_blocks_and_half_a_router_are_the_dense_mlp(gated):
    torch.manual_seed(0)
    m = RoutedMlp(6, 12, 4, active=4, rank=2, gated=gated).double()
    nn.init.zeros_(m.router.weight)
    nn.init.zeros_(m.router.bias)
    x = data(2, 5, 6)
    hidden = F.linear(x, m.fc1.weight, m.fc1.bias)
    hidden = F.relu(hidden) if not gated else F.relu(F.linear(x, m.gate.weight)) * hidden
    torch.testing.assert_close(m(x), F.linear(hidden, m.fc2.weight, m.fc2.bias))


def test_tokens_use_their_blocks_alone():
    torch.manual_seed(0)
    m = RoutedMlp(6, 12, 4, rank=0).double()
    x = data(7, 6)
    chosen, _ = m.route(x)
    for t in range(7):
        rows = torch.cat([torch.arange(3 * g, 3 * g + 3) for g in chosen[t].tolist()])
        hidden = F.relu(m.fc1.weight[rows] @ x[t] + m.fc1.bias[rows])
        torch.testing.assert_close(m(x)[t], m.fc2.weight[:, rows] @ hidden + m.fc2.bias)


def test_only_routers_and_low_rank_maps_learn():
    m, x = RoutedMlp(6, 12, 4, rank=2, gated=True), torch.randn(5, 6)
    m(x).square().sum().backward()
    learned = {name for name, p in m.named_parameters() if p.grad is not None}
    assert learned >= {"router.weight", "lora1.right", "lora2.right"}
    assert not learned & {"fc1.weight", "fc2.weight", "gate.weight"}
    assert m.lora1.right.eq(0).all()


def test_bad_settings_are_refused():
    for settings, words in (
        (dict(coeff=0), "coeff"),
        (dict(codeword_dim=3), "codeword_dim"),
        (dict(num_codewords=0), "num_codewords"),
        (dict(steps=0), "steps"),
        (dict(clamp=0), "clamp"),
        (dict(num_heads=3), "num_heads"),
    ):
        with pytest.raises(ValueError, match=words):
            make(**settings)
    for settings, words in ((dict(blocks=5), "blocks"), (dict(active=5), "active"), (dict(rank=-1), "rank")):
        with pytest.raises(ValueError, match=words):
            RoutedMlp(**{"dim": 6, "hidden": 12, "blocks": 4, **settings})
    with pytest.raises(TypeError, match="plan must be"):
        make()(data(1, 8, 16), plan=attnlib.types.Plan("blocks", {}))
