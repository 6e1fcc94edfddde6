"""sparsifiner: predicted sparse attention, one test per acceptance criterion of its card that concerns the module."""

import math

import pytest
import torch
from parity import Options

import attnlib
from attnlib.grids import Layout
from attnlib.nn.layers import merge_heads, split_heads
from attnlib.ops.block_sparse import BlockPlan, block_recall, block_sparse_attention

FIXTURE = Options("sparsifiner")
SETTINGS = dict(dim=8, num_heads=2, grid=(3, 4), reduce_n=3, keep_rate=0.4)


def make(**settings):
    torch.manual_seed(0)
    module = attnlib.create("sparsifiner", **{**SETTINGS, **settings}).double().eval()
    for name, p in module.named_parameters():
        torch.nn.init.normal_(p, 0, 0.05 if name == "expand" else 0.4)
    return module


def tokens(n=13, batch=2, dim=8, seed=1):
    return torch.randn(batch, n, dim, generator=torch.Generator().manual_seed(seed)).double()


def parts(module, x):
    return tuple(split_heads(f(x), module.num_heads) for f in (module.q, module.k, module.v))


def oracle(m, x):
    """The equation, with all products computed and the chosen ones kept; one class token."""
    q, k, v = parts(m, x)
    n = x.shape[1]
    few = m.reduce.T @ m.cheap_k(k)
    coef = (m.cheap_q(q[:, :, 1:]) @ few.transpose(-2, -1) * m.num_heads**-0.5).softmax(-1)
    best = coef >= coef.topk(min(m.coef_topk, coef.shape[-1])).values[..., -1:]
    basis = torch.where(m.expand.abs() > m.basis_threshold, m.expand.abs(), 0.0)
    scores = (coef * best) @ basis.T
    keep = scores.topk(math.ceil(m.keep_rate * n)).indices
    mask = torch.ones(*scores.shape[:2], n, n, dtype=torch.bool)
    mask[:, :, 1:] = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, keep, True)
    weights = (q @ k.transpose(-2, -1) * m.head_dim**-0.5).masked_fill(~mask, float("-inf")).softmax(-1)
    return m.proj(merge_heads(weights @ v)), mask


def test_equals_the_equation():
    m, x = make(basis_threshold=0.01), tokens()
    y, mask = oracle(m, x)
    torch.testing.assert_close(m(x), y)
    assert m.plan(x).chosen().equal(mask[:, :, 1:])
    torch.testing.assert_close(m(x, returns=("weights",)).y, y)


@pytest.mark.parametrize("case", sorted(FIXTURE.config))
def test_maps_masks_and_losses_equal_the_authors(case):
    m, held = FIXTURE.build(case), FIXTURE.under(case)
    x, kept = held["x/x"].clone().requires_grad_(), held.get("x/carry")
    q, k, _ = parts(m, x if kept is None else x.gather(1, kept[..., None].expand(-1, -1, 8)))
    approx, mask = held["approx"], held["mask"][:, :, 1:]
    if kept is not None:  # what they compute of dropped tokens is read by nobody
        here = kept[:, None, 1:, None].expand(-1, 2, -1, 13) - 1
        approx, mask = (t.gather(2, here).gather(3, kept[:, None, None].expand(-1, 2, here.shape[2], -1))
                        for t in (approx, mask))  # fmt: skip
    ours = m._approximation(q, k, 1, m.grid, None, kept, m._fits)
    torch.testing.assert_close(ours, approx, atol=1e-5, rtol=0)
    if not m.dense and not m.training:
        assert m.plan(x.detach(), carry=kept).chosen().equal(mask)
    if kept is None:
        loss = m(x, returns=("losses",)).losses["reconstruction"]
        torch.testing.assert_close(loss, held["loss"], atol=1e-5, rtol=1e-5)
        loss.backward()
        for name, grad in (("x", x.grad), ("cheap_q", m.cheap_q.weight.grad)):
            torch.testing.assert_close(grad, held[f"dloss/{name}"], atol=1e-4, rtol=1e-4)
    if "left" in held:
        left = m(x, carry=kept, returns=("carry",)).carry
        chosen = torch.zeros(2, 13, dtype=torch.bool).scatter(1, left, True)
        if m.token_keep_rate is not None:
            assert chosen[:, 1:].equal(held["left"]) and bool(chosen[:, 0].all())


def test_the_whole_budget_is_dense_attention():
    m, x = make(keep_rate=1.0), tokens()
    dense = attnlib.create("softmax-attention", dim=8, num_heads=2).double()
    dense.load_state_dict({k: v for k, v in m.state_dict().items() if k in dense.state_dict()})
    torch.testing.assert_close(m(x), dense(x))
    every = BlockPlan.full(12, 13, 1, 1)
    q, k, v = parts(m, x)
    torch.testing.assert_close(m.proj(merge_heads(block_sparse_attention(q[:, :, 1:], k, v, every))), dense(x)[:, 1:])
    with pytest.raises(ValueError, match="no plan|has no plan|no discrete"):
        m.plan(x)


def test_rows_have_the_budget_and_masks_differ_between_images():
    m, x = make(), tokens()
    plan = m.plan(x)
    assert plan.index.shape == (2, 2, 12, math.ceil(0.4 * 13)) and plan.count is None
    chosen = plan.chosen()
    assert bool((chosen.sum(-1) == 6).all()) and not chosen[0].equal(chosen[1]) and not chosen[:, 0].equal(chosen[:, 1])
    first = m(x, returns=("weights",)).weights[:, :, 0]
    assert bool((first > 0).all())  # the class token reads everything


def test_rows_that_reach_no_threshold_give_zeros():
    m, x = make(threshold=5.0), tokens()
    y = m(x.requires_grad_())
    assert m.plan(x).index.shape[-1] == 0
    torch.testing.assert_close(y[:, 1:], m.proj.bias.expand(2, 12, -1))
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert grad.isfinite().all()


def test_the_predictor_fits_attention_of_low_rank():
    """Fitting drives the distance to a map of as few basis maps as the predictor has to almost nothing."""
    torch.manual_seed(0)
    m = make(recon_share=0.5, reduce_c=1).train()
    x = tokens(batch=4)
    rank = m.reduce.shape[1]
    basis = torch.rand(rank, 13, dtype=torch.double)
    target = torch.randn(4, 2, 12, rank, dtype=torch.double).softmax(-1) @ (basis / basis.sum(-1, keepdim=True))
    lone = torch.nn.Parameter(torch.randn(4, 13, 8, dtype=torch.double))  # queries and keys may be whatever they like
    optimizer = torch.optim.Adam([lone, *m.parameters()], lr=0.03)
    before = None
    for _ in range(400):
        loss = (m.approximation(lone) - target).square().sum()
        before = float(loss.detach()) if before is None else before
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 1e-3 * before
    assert m(x).shape == x.shape


def test_fitting_is_dense_and_ends_with_its_share_of_training():
    m, x = make(recon_share=0.1).train(), tokens()
    dense = make(keep_rate=1.0)
    dense.load_state_dict(m.state_dict())
    torch.testing.assert_close(m(x), dense(x))
    m.set_progress(0.1)
    assert not torch.allclose(m(x), dense(x))
    m.set_progress(0.0)
    torch.testing.assert_close(m.eval()(x), make()(x))  # evaluation is sparse whatever the phase


def test_dropped_tokens_are_those_the_class_token_reads_least():
    m, x = make(token_keep_rate=0.5), tokens()
    out = m(x, returns=("carry", "weights"))
    score = out.weights[:, :, 0, 1:].mean(1)
    expected = score.topk(6, -1).indices.sort(-1).values + 1
    assert out.carry[:, 1:].equal(expected) and not out.carry[:, 0].any()
    after = make(token_keep_rate=0.25)
    again = after(x, carry=out.carry, returns=("carry",))
    assert again.carry.shape == (2, 4)
    inside = torch.zeros(2, 13, dtype=torch.bool).scatter(1, out.carry, True)
    assert bool(inside.gather(1, again.carry).all()) and not again.y[~inside].any()
    other = torch.where(inside[..., None], x, torch.randn_like(x) * 100)
    torch.testing.assert_close(after(other, carry=out.carry), again.y)


def test_no_call_changes_the_next():
    """The authors' class takes over the number of tokens left in one sample as its budget for good."""
    m, x = make(keep_rate=0.9, compat="authors"), tokens()
    before = m(x)
    few = torch.arange(4).expand(2, -1)
    m(x, carry=few)
    torch.testing.assert_close(m(x), before)


def test_other_grids_interpolate_the_tables():
    m = make()
    for layout in (Layout.image(5, 2, cls=1), Layout.image(6, 8, cls=1), Layout.image(3, 4)):
        n = len(layout)
        assert m(tokens(n), layout=layout).shape == (2, n, 8)
    flat = tokens(12)
    torch.testing.assert_close(m(flat.view(2, 3, 4, 8)).flatten(1, 2), m(flat, layout=Layout.image(3, 4)))
    own = tokens()
    torch.testing.assert_close(m(own, layout=Layout.image(3, 4, cls=1)), m(own))
    # a map twice as fine, of the same content, has nearly the same few keys
    with torch.no_grad():
        m.reduce.copy_(torch.ones_like(m.reduce))
        x = tokens(1).expand(2, 13, 8)
        fine = x[:, :1].expand(2, 49, 8)
        q, k, _ = parts(m, x)
        q2, k2, _ = parts(m, fine)
        coarse = m._coefficients(q, k, 1, (3, 4), None, None)
        finer = m._coefficients(q2, k2, 1, (6, 8), None, None)
    torch.testing.assert_close(finer[:, :, :1], coarse[:, :, :1], atol=1e-2, rtol=0)


def test_tokens_that_do_not_exist_are_never_chosen():
    m, x = make(), tokens()
    valid = torch.ones(2, 13, dtype=torch.bool)
    valid[0, 4:] = False
    chosen = m.plan(x, valid=valid).chosen()
    assert (
        not chosen[0, :, :, 4:].any() and bool((chosen[0].sum(-1) == 4).all()) and bool((chosen[1].sum(-1) == 6).all())
    )
    y = m(x, valid=valid)
    torch.testing.assert_close(m(torch.where(valid[..., None], x, float("nan")), valid=valid), y)
    dropping = make(token_keep_rate=0.5)
    left = dropping(x, valid=valid, returns=("carry",)).carry
    assert {1, 2, 3} <= set(left[0].tolist())


def test_long_sequences_are_chosen_head_by_head(monkeypatch):
    from attnlib.nn.sparse import sparsifiner

    m, x = make(), tokens()
    whole = m.plan(x)
    monkeypatch.setattr(sparsifiner, "PIECE", 20)
    assert m.plan(x).chosen().equal(whole.chosen())


def test_trained_masks_keep_more_attention_than_random_or_local_ones():
    """Tokens of four kinds, anywhere, read their own kind; the predictor is fitted to that alone."""
    torch.manual_seed(0)
    n, dim = 24, 8
    m = attnlib.create("sparsifiner", dim=dim, num_heads=1, grid=(4, 6), cls_tokens=0, reduce_n=2, reduce_c=1,
                       keep_rate=0.25, recon_share=1.0, basis_threshold=0.0)  # fmt: skip
    with torch.no_grad():
        for linear in (m.q, m.k):
            linear.weight.copy_(torch.eye(dim) * 4)
            linear.bias.zero_()
    learned = [p for name, p in m.named_parameters() if name.startswith(("cheap", "reduce", "expand"))]
    optimizer = torch.optim.Adam(learned, lr=0.02)

    def sample(batch):
        return torch.eye(4)[torch.randint(4, (batch, n))].repeat(1, 1, 2) + 0.1 * torch.randn(batch, n, dim)

    for _ in range(200):
        x = sample(8)
        loss = m(x, returns=("losses",)).losses["reconstruction"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    m.eval()
    with torch.no_grad():
        x = sample(16)
        q, k, _ = parts(m, x)
        kept = block_recall(q, k, m.plan(x)).mean()
        at = torch.arange(n)
        near = (at[:, None] - at).abs().float().topk(6, largest=False).indices
        local = block_recall(q, k, BlockPlan(near, 1, 1, n)).mean()
        chance = block_recall(q, k, BlockPlan(torch.rand(n, n).topk(6).indices, 1, 1, n)).mean()
    assert kept > 1.3 * local and kept > 1.3 * chance, (kept, local, chance)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (dict(num_heads=3), ValueError, "num_heads=3 does not divide"),
        (dict(keep_rate=0.0), ValueError, "keep_rate"),
        (dict(keep_rate=1.5), ValueError, "keep_rate"),
        (dict(threshold=-1.0), ValueError, "threshold"),
        (dict(grid=0), ValueError, "grid"),
        (dict(grid=(3, 4, 5)), ValueError, "grid"),
        (dict(cls_tokens=-1), ValueError, "cls_tokens"),
        (dict(reduce_n=14), ValueError, "reduce_n"),
        (dict(reduce_c=5), ValueError, "reduce_c"),
        (dict(basis_threshold=-0.1), ValueError, "basis_threshold"),
        (dict(coef_topk=0), ValueError, "coef_topk"),
        (dict(coef_threshold=2.0), ValueError, "coef_threshold"),
        (dict(token_keep_rate=0.0), ValueError, "token_keep_rate"),
        (dict(token_keep_rate=0.5, cls_tokens=0), ValueError, "token_keep_rate needs a class token"),
        (dict(recon_share=2.0), ValueError, "recon_share"),
        (dict(share_basis=1), TypeError, "share_basis"),
        (dict(compat="paper"), ValueError, "compat"),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        make(**settings)


def test_bad_calls():
    m, x = make(), tokens()
    for carry, error, message in (
        ([1], TypeError, "carry must be"),
        (torch.zeros(2, 3), TypeError, "carry must be"),
        (torch.zeros(1, 3, dtype=torch.long), ValueError, "carry names 3 slots for 1 samples"),
        (torch.full((2, 3), 13), ValueError, "carry"),
    ):
        with pytest.raises(error, match=message):
            m(x, carry=carry)
    with pytest.raises(ValueError, match="layout .* is not possible here"):
        m(x, layout=Layout((("image", (3, 4)), ("cls", 1))))
    with pytest.raises(ValueError, match="layout .* is not possible here"):
        m(tokens(14), layout=Layout.image(3, 4, cls=1, distilled=1))
    with pytest.raises(TypeError, match="plan must be a BlockPlan"):
        m(x, plan=attnlib.Plan("blocks", {}))
    plan = m.plan(x)
    with pytest.raises(ValueError, match="plan was made for"):
        m(tokens(10), plan=plan)
    with pytest.raises(ValueError, match="plan was made for"):
        m(x, plan=BlockPlan(plan.index[:, :1, :, :1], 1, 1, 12, 13).__class__.full(12, 13, 2, 1))
    with pytest.raises(ValueError, match="token_keep_rate needs a class token"):
        make(token_keep_rate=0.5)(tokens(12), layout=Layout.image(3, 4))


def test_state_of_a_plain_transformer_gives_all_but_the_predictor():
    own = make().state_dict()
    plain = {k: v for k, v in attnlib.create("softmax-attention", dim=8, num_heads=2).state_dict().items()}
    found = attnlib.convert_state_dict("sparsifiner", plain)
    assert set(own) - set(found) == {
        "reduce", "expand", "cheap_q.weight", "cheap_q.bias", "cheap_k.weight", "cheap_k.bias", "fitting",
    }  # fmt: skip


def test_a_shared_basis_is_one_table():
    theirs = dict(FIXTURE.under("all-coefficients/sd"))
    twice = {**theirs, "mask_predictor.proj_back_n": theirs["mask_predictor.proj_n"]}  # as their class saves it
    assert set(attnlib.convert_state_dict("sparsifiner", twice)) == set(
        FIXTURE.build("all-coefficients").state_dict()
    ) - {"fitting"}
    other = {**twice, "mask_predictor.proj_back_n": theirs["mask_predictor.proj_n"] + 1}
    assert "expand" in attnlib.convert_state_dict("sparsifiner", other)
