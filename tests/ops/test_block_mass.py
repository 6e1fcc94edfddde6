"""Masses of blocks: held to the whole map, kept blocks to brute force."""

import itertools

import pytest
import torch

from attnlib.ops import block_mass as M
from attnlib.ops.block_sparse import BlockPlan, block_sparse_attention


def data(b=2, h=4, hk=2, n=50, m=70, d=8, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(b, h, n, d, generator=g, dtype=dtype), torch.randn(b, hk, m, d, generator=g, dtype=dtype)


def dense(q, k, scale=None, valid=None):
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.repeat_interleave(2, 1).transpose(-2, -1)
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None, None], float("-inf"))
    return scores, scores.softmax(-1).nan_to_num(0.0)


def summed(p, qb, kb):
    rows = torch.stack([c.sum(2) for c in p.split(qb, 2)], 2)
    return torch.stack([c.sum(3) for c in rows.split(kb, 3)], 3)


@pytest.mark.parametrize("held", [1, 1000, 1 << 20])
@pytest.mark.parametrize(("qb", "kb"), [(16, 8), (1, 70), (7, 9), (64, 64)])
def test_equals_sums_of_the_dense_map(qb, kb, held, monkeypatch):
    monkeypatch.setattr(M, "HELD", held)
    q, k = data()
    mass, lse = M.block_mass(q, k, qb, kb)
    scores, p = dense(q, k)
    assert torch.allclose(mass, summed(p, qb, kb), atol=1e-12)
    assert torch.allclose(lse, scores.logsumexp(-1))
    again = M.block_mass(q, k, qb, kb, lse=lse)
    assert torch.allclose(again.mass, mass, atol=1e-12)
    sizes = torch.tensor([min(qb, 50 - i) for i in range(0, 50, qb)], dtype=torch.float64)
    assert torch.allclose(mass.sum(-1), sizes.expand(2, 4, -1))


def test_float32_within_1e_5_and_absent_tokens_weigh_nothing():
    q, k = data(dtype=torch.float32)
    valid, q_valid = torch.ones(2, 70, dtype=torch.bool), torch.ones(2, 50, dtype=torch.bool)
    valid[0, 40:], q_valid[1, :7], valid[1] = False, False, False
    k[0, :, 40:] = float("nan")
    mass, lse = M.block_mass(q, k.nan_to_num(5.0), 8, 10, valid=valid, q_valid=q_valid)
    _, p = dense(q.double(), k.nan_to_num(5.0).double(), valid=valid)
    expected = summed(p.masked_fill(~q_valid[:, None, :, None], 0.0), 8, 10)
    assert (mass - expected).abs().max() < 1e-5
    assert (mass[1] == 0).all() and (lse[1] == float("-inf")).all() and not mass.isnan().any()


def test_a_heaviest_plan_has_the_highest_recall_of_its_size():
    g = torch.Generator().manual_seed(2)
    mass = torch.rand(1, 1, 3, 3, generator=g, dtype=torch.float64)
    plan = M.heaviest_blocks(mass, 1 - 5 / 9, 4, 4, 12)
    own = float(M.plan_recall(mass, plan))
    best = 0.0
    for cells in itertools.combinations(range(9), 5):
        chosen = torch.zeros(9, dtype=torch.bool)
        chosen[list(cells)] = True
        chosen = chosen.view(1, 1, 3, 3)
        if chosen.any(-1).all():
            best = max(best, float(M.plan_recall(mass, BlockPlan.from_mask(chosen, 4, 4, 12))))
    assert own == pytest.approx(best, abs=1e-12) and int(plan.chosen().sum()) == 5


def test_rows_forced_blocks_and_density():
    q, k = data(n=64, m=64)
    mass = M.block_mass(q, k, 8, 8).mass
    forced = torch.zeros(8, 8, dtype=torch.bool)
    forced[:, -1] = True
    rows = M.heaviest_blocks(mass, 0.75, 8, 8, 64, per="row", forced=forced)
    assert (rows.chosen().sum(-1) == 2).all() and rows.chosen()[..., -1].all()
    assert (M.heaviest_blocks(mass, 0.99, 8, 8, 64).chosen().sum(-1) >= 1).all()
    whole = M.heaviest_blocks(mass, 0.0, 8, 8, 64)
    assert float(whole.density) == 1.0
    v = torch.randn_like(k)
    out = block_sparse_attention(q, k, v, whole)
    assert torch.allclose(out, dense(q, k)[1] @ v.repeat_interleave(2, 1))
    per_head = M.heaviest_blocks(mass, torch.tensor([0.5, 0.25, 0.0, 0.75]), 8, 8, 64)
    assert per_head.chosen().sum((-2, -1))[0].tolist() == [32, 48, 64, 16]


def test_adapted_sparsity_keeps_its_mean():
    g = torch.Generator().manual_seed(1)
    for s in (0.0, 0.2, 1 / 3, 0.8, 0.95):
        for heads in (1, 5, 8):
            found = M.adapted_sparsity(torch.rand(3, heads, generator=g), s, 0.3)
            assert torch.allclose(found.mean(-1), torch.full((3,), s, dtype=torch.float64))
            assert (found >= 0).all() and (found < 1).all()


@pytest.mark.parametrize(("frames", "references"), [(8, 4), (8, 0), (8, 8), (24, 3), (1, 0), (5, 1)])
def test_frame_tiles_count(frames, references):
    plan = M.frame_tiles(frames, 4, references, 4, 4)
    kept = int(plan.chosen().sum())
    assert kept == frames**2 - (frames - references) * max(frames - references - 1, 0)
    coarse = M.frame_tiles(frames, 6, references, 4, 4)
    dense_enough = torch.zeros(frames * 6, frames * 6, dtype=torch.bool)
    exact = M.frame_tiles(frames, 6, references, 1, 1).chosen()[0, 0]
    dense_enough |= exact
    grown = coarse.chosen()[0, 0].repeat_interleave(4, 0).repeat_interleave(4, 1)[: frames * 6, : frames * 6]
    assert (grown | ~dense_enough).all()
    text = M.frame_tiles(frames, 4, references, 4, 4, dense=3).chosen()[0, 0]
    assert text[-1].all() and text[:, -1].all()
    if references:
        two = exact.float() @ exact.float()
        assert (two > 0).all()  # any two frames reach each other in two layers


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda q, k: M.block_mass(q, k, 0, 4), "q_block"),
        (lambda q, k: M.block_mass(q, k, 4, 4, lse=torch.zeros(2, 4)), "lse"),
        (lambda q, k: M.heaviest_blocks(torch.zeros(1, 1, 2, 2), 1.0, 4, 4, 8), "sparsity"),
        (lambda q, k: M.heaviest_blocks(torch.zeros(1, 1, 2, 2), 0.5, 4, 4, 100), "mass must be"),
        (lambda q, k: M.heaviest_blocks(torch.zeros(1, 1, 2, 2), 0.5, 4, 4, 8, forced=torch.ones(3, 3) > 0), "forced"),
        (lambda q, k: M.heaviest_blocks(torch.zeros(1, 2, 2, 2), torch.tensor([0.1, -0.1]), 4, 4, 8), "sparsity"),
        (lambda q, k: M.plan_recall(torch.zeros(1, 1, 3, 3), BlockPlan.full(8, 8, 4, 4)), "plan"),
        (lambda q, k: M.frame_tiles(4, 2, 5), "references"),
        (lambda q, k: M.adapted_sparsity(torch.zeros(2), 1.0), "sparsity"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises((TypeError, ValueError), match=says):
        call(*data())


def frames(n=4, tokens=8, d=16, noise=0.1, seed=0):
    """Queries and keys of a head that reads its own frame and the place of its token in others."""
    g = torch.Generator().manual_seed(seed)
    frame, place = torch.randn(n, 1, d, generator=g), torch.randn(1, tokens, d, generator=g)
    x = (3.0 * frame + 1.5 * place).reshape(1, 1, n * tokens, d)
    return x + noise * torch.randn(1, 1, n * tokens, d, generator=g), x + noise * torch.randn(
        1, 1, n * tokens, d, generator=g
    )


def test_a_cached_sum_gives_the_same_blocks_and_nearly_the_same_after_a_step():
    q, k = frames()
    exact = block_mass_of(q, k)
    again = M.block_mass(q, k, 4, 4, lse=exact.lse)
    assert torch.equal(M.heaviest_blocks(again.mass, 0.6, 4, 4, 32).chosen(),
                       M.heaviest_blocks(exact.mass, 0.6, 4, 4, 32).chosen())  # fmt: skip
    g = torch.Generator().manual_seed(9)
    q2, k2 = (t + 0.1 * torch.randn(t.shape, generator=g) for t in (q, k))
    truth = block_mass_of(q2, k2).mass
    stale = M.heaviest_blocks(M.block_mass(q2, k2, 4, 4, lse=exact.lse).mass, 0.6, 4, 4, 32)
    best = M.plan_recall(truth, M.heaviest_blocks(truth, 0.6, 4, 4, 32))
    assert float(best - M.plan_recall(truth, stale)) < 0.03


def block_mass_of(q, k):
    return M.block_mass(q, k, 4, 4)


def test_heavy_blocks_recall_more_than_random_columns_and_diagonals():
    q, k = frames()
    mass = block_mass_of(q, k).mass
    keep = 3
    heavy = float(M.plan_recall(mass, M.heaviest_blocks(mass, 1 - keep / 8, 4, 4, 32, per="row")))
    g = torch.Generator().manual_seed(0)
    random = torch.rand(1, 1, 8, 8, generator=g).argsort(-1) < keep
    columns = (mass.sum(-2, keepdim=True).argsort(-1, descending=True).argsort(-1) < keep).expand(1, 1, 8, 8)
    place = torch.arange(8)
    diagonal = ((place[:, None] - place).abs() <= 1).expand(1, 1, 8, 8)
    others = [float(M.plan_recall(mass, BlockPlan.from_mask(c, 4, 4, 32))) for c in (random, columns, diagonal)]
    assert heavy > others[0] and heavy >= max(others[1:])
