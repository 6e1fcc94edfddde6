import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from attnlib import masks as M
from attnlib.grids import Layout
from attnlib.nn.heads.s2_attention_dkernel import sharded_context

N = 24  # tokens of every mask below
INF, NAN = float("inf"), float("nan")
IDS = torch.zeros(3, dtype=torch.long)
LAYOUT = Layout((("text", 2), ("image", (3, 3))))


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _kinds() -> dict[str, M.Mask]:
    g = _generator()
    ids = torch.sort(torch.randint(0, 5, (N,), generator=g)).values
    ids2 = torch.randint(0, 4, (2, N), generator=g)
    types = torch.randint(0, 3, (N,), generator=g)
    rule = [[True, False, True], [False, True, False], [True, True, True]]
    layout = Layout((("text", 4), ("image", (4, 4)), ("cls", 4)))
    return {
        "causal": M.causal(),
        "sliding_odd": M.sliding_window(7),
        "sliding_even": M.sliding_window(4),
        "recent": M.recent(5),
        "terraced": M.terraced(6, 1),
        "prefix": M.prefix_lm(9),
        "prefix_batch": M.prefix_lm(torch.tensor([2, 11])),
        "document": M.document([0, 5, 5, 14, N]),
        "documents": M.documents(ids),
        "documents_batch": M.documents(ids2),
        "strided": M.strided(5, offset=2, local=3),
        "strided_heads": M.strided(4, local=1, per_head=1, num_heads=3),
        "everything": M.Everything(),
        "explicit": M.explicit(torch.rand(N, N, generator=g) > 0.5),
        "explicit_batch": M.explicit(torch.rand(2, N, N, generator=g) > 0.5),
        "explicit_heads": M.explicit(torch.rand(2, 3, N, N, generator=g) > 0.5),
        "blocks": M.blocks(torch.rand(6, 4, generator=g) > 0.6, 4, 6),
        "blocks_heads": M.blocks(torch.rand(2, 3, 6, 4, generator=g) > 0.4, 4, 6),
        "neighborhood_1d": M.neighborhood((N,), 5),
        "neighborhood_2d": M.neighborhood((4, 6), (3, 4)),
        "neighborhood_dilated": M.neighborhood((4, 6), (2, 3), (2, 2)),
        "neighborhood_causal": M.neighborhood((2, 3, 4), 2, 1, 1, (True, False, True)),
        "neighborhood_strided": M.neighborhood((4, 6), (4, 4), 1, (2, 3)),
        "circle": M.circular_window((4, 6), 2.3),
        "modality": M.modality(types, rule),
        "modality_batch": M.modality(torch.randint(0, 3, (2, N), generator=g), rule),
        "on_segment": M.on_segment(layout, "image", M.neighborhood((4, 4), 3)),
        "causal_frames": M.causal_frames(N, 5, 6),
        "causal_frames_batch": M.causal_frames(N, torch.tensor([2, 7]), 3),
        "causal_frames_many": M.causal_frames(N, 31, 1),
        "sharded": sharded_context(2, 1, 3, num_heads=3),
        "and": M.causal() & M.strided(3, local=2),
        "or": M.sliding_window(3) | M.documents(ids),
        "not": ~M.terraced(5),
        "transposed": M.Transposed(M.causal() & M.strided(3, local=2)),
        "transposed_batch": M.Transposed(M.explicit(torch.rand(2, N, N, generator=g) > 0.5)),
        "deep": ~(M.causal() & ~M.sliding_window(5)) | M.prefix_lm(3),
    }


KINDS = _kinds()


@pytest.fixture(params=list(KINDS))
def mask(request: pytest.FixtureRequest) -> M.Mask:
    return KINDS[request.param]


# ---- one definition, many realisations


def test_at_is_pair_at_every_single_pair(mask):
    full = mask.dense(N).reshape((1,) * (4 - mask.dense(N).dim()) + tuple(mask.dense(N).shape))
    full = full.expand(mask.batch(), mask.heads(), N, N)
    g = _generator(3)
    for b, h in itertools.product(range(mask.batch()), range(mask.heads())):
        for _ in range(20):
            q, k = torch.randint(0, N, (2,), generator=g)
            assert bool(mask.pair(torch.tensor(b), torch.tensor(h), q, k)) == bool(full[b, h, q, k])


def test_positions_permute_rows_and_columns(mask):
    g = _generator(4)
    q, k = torch.randperm(N, generator=g), torch.randperm(N, generator=g)[:10]
    assert torch.equal(mask.at(q, k), mask.dense(N)[..., q, :][..., k])


def test_block_is_a_part_of_dense(mask):
    assert torch.equal(mask.block((3, 17), (5, 22)), mask.dense(N)[..., 3:17, 5:22])


def test_positions_by_sample_and_head(mask):
    g = _generator(5)
    q = torch.stack([torch.randperm(N, generator=g)[:6] for _ in range(6)]).reshape(2, 3, 6)
    full = mask.dense(N)
    full = full.reshape((1,) * (4 - full.dim()) + tuple(full.shape)).expand(2, 3, N, N)
    expected = full.gather(2, q[..., None].expand(2, 3, 6, N))
    assert torch.equal(mask.at(q, torch.arange(N)).expand(2, 3, 6, N), expected)


def test_count_is_visible_keys_per_row(mask):
    assert torch.equal(mask.count(N, chunk=7), mask.dense(N).sum(-1))


def test_plane_is_one_sample_and_head(mask):
    full = mask.dense(N)
    full = full.reshape((1,) * (4 - full.dim()) + tuple(full.shape)).expand(mask.batch(), mask.heads(), N, N)
    for b, h in itertools.product(range(mask.batch()), range(mask.heads())):
        plane = mask.plane(b, h)
        assert (plane.batch(), plane.heads()) == (1, 1)
        assert torch.equal(plane.dense(N).reshape(N, N), full[b, h])


def test_lower_and_raise_round_trip(mask):
    spec, tensors = mask.lower()
    assert isinstance(spec, str)
    back = M.raise_mask(spec, tensors)
    assert back == mask and back.lower()[0] == spec
    assert torch.equal(back.dense(N), mask.dense(N))


def test_is_a_pytree(mask):
    leaves, tree = pytree.tree_flatten(mask)
    assert all(isinstance(x, torch.Tensor) for x in leaves)
    assert torch.equal(pytree.tree_unflatten(leaves, tree).dense(N), mask.dense(N))


def test_mask_mod_serves_flex_attention(mask):
    from torch.nn.attention.flex_attention import create_mask

    dense = create_mask(mask.mask_mod(), mask.batch(), mask.heads(), N, N, device="cpu")
    assert torch.equal(dense, mask.dense(N).expand(mask.batch(), mask.heads(), N, N))


def test_picture_shows_the_pairs(mask):
    grid = mask.dense(N)
    while grid.dim() > 2:
        grid = grid[0]
    assert mask.picture(N) == "\n".join("".join("#" if x else "." for x in row) for row in grid.tolist())


def test_picture_of_cells():
    assert M.causal().picture(64, width=4) == "+...\n#+..\n##+.\n###+"


# ---- bounds of tiles never contradict the pairs


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("name", list(KINDS))
def test_tile_bounds_never_contradict_pairs(name, data):
    mask = KINDS[name]
    full = mask.dense(N).reshape(-1, N, N)
    ends = [sorted(data.draw(st.tuples(st.integers(0, N - 1), st.integers(0, N - 1)))) for _ in range(8)]
    q, k = torch.tensor(ends[:4]), torch.tensor(ends[4:])
    some, every = mask.tile(q[:, :1], q[:, 1:], k[None, :, 0], k[None, :, 1])
    some, every = some.expand(4, 4), every.expand(4, 4)
    for i, j in itertools.product(range(4), range(4)):
        part = full[:, q[i, 0] : q[i, 1] + 1, k[j, 0] : k[j, 1] + 1]
        assert bool(some[i, j]) or not bool(part.any())
        assert not bool(every[i, j]) or bool(part.all())


@pytest.mark.parametrize(
    "mask",
    [M.causal(), M.sliding_window(9), M.recent(8), M.terraced(8), M.document([0, 64, 128]), M.prefix_lm(4)],
    ids=str,
)
def test_tile_bounds_rule_most_of_a_sparse_mask_out(mask):
    """A bound that always says "maybe" would be right and useless."""
    start = torch.arange(0, 128, 8)
    some, every = mask.tile(start[:, None], start[:, None] + 7, start[None], start[None] + 7)
    exact = mask.dense(128).reshape(16, 8, 16, 8)
    assert torch.equal(some, exact.any(3).any(1))
    assert torch.equal(every, exact.all(3).all(1))


def test_grid_bounds_rule_distant_rows_out():
    for mask in (M.neighborhood((16, 8), 3), M.circular_window((16, 8), 2.0)):
        start = torch.arange(0, 128, 8)
        some, _ = mask.tile(start[:, None], start[:, None] + 7, start[None], start[None] + 7)
        exact = mask.dense(128).reshape(16, 8, 16, 8).any(3).any(1)
        assert some.sum() <= 1.7 * exact.sum()


# ---- what each rule means


def _window(i: int, length: int, kernel: int, stride: int, causal: bool) -> range:
    """Neighborhood attention's window of one axis, by search instead of arithmetic.

    The leader of the query's group picks, of all windows of ``kernel`` tokens inside the axis, the one centred nearest
    to it (an even window has one more token on the left).
    """
    leader = min(i // stride * stride + (stride - 1 if causal else stride // 2), length - 1)
    if causal:
        return range(max(0, leader - kernel + 1), i + 1)
    starts = range(0, length - kernel + 1)
    best = min(starts, key=lambda s: abs(s + kernel // 2 - leader))
    return range(best, best + kernel)


@pytest.mark.parametrize(
    "grid,kernel,dilation,stride,causal",
    [
        ((11,), (5,), (1,), (1,), (False,)),
        ((11,), (4,), (2,), (1,), (False,)),
        ((13,), (3,), (3,), (1,), (True,)),
        ((10,), (5,), (1,), (3,), (False,)),
        ((10,), (4,), (1,), (4,), (True,)),
        ((5, 7), (3, 5), (1, 1), (1, 1), (False, False)),
        ((6, 9), (3, 3), (2, 3), (1, 1), (False, False)),
        ((6, 7), (2, 3), (3, 2), (2, 1), (True, False)),
        ((3, 4, 5), (2, 3, 2), (1, 1, 2), (1, 2, 1), (True, False, False)),
    ],
)
def test_neighborhood_rule_against_brute_force(grid, kernel, dilation, stride, causal):
    cells = list(itertools.product(*[range(s) for s in grid]))
    expected = torch.zeros(len(cells), len(cells), dtype=torch.bool)
    for a, q in enumerate(cells):
        windows = []
        for axis, i in enumerate(q):
            group = [p for p in range(grid[axis]) if p % dilation[axis] == i % dilation[axis]]
            window = _window(group.index(i), len(group), kernel[axis], stride[axis], causal[axis])
            windows.append({group[j] for j in window})
        for b, k in enumerate(cells):
            expected[a, b] = all(x in w for x, w in zip(k, windows, strict=True))
    assert torch.equal(M.neighborhood(grid, kernel, dilation, stride, causal).dense(len(cells)), expected)


def test_neighborhood_always_sees_the_kernel_and_itself():
    mask = M.neighborhood((6, 9), (3, 4))
    assert mask.count(54).unique().tolist() == [12]
    assert bool(mask.dense(54).diagonal().all())


def test_sliding_window_leans_left_when_even():
    assert M.sliding_window(4).dense(9)[4].nonzero().flatten().tolist() == [2, 3, 4, 5]
    assert M.sliding_window(5).dense(9)[4].nonzero().flatten().tolist() == [2, 3, 4, 5, 6]


def test_recent_and_terraced():
    assert M.recent(3).dense(9)[5].nonzero().flatten().tolist() == [3, 4, 5]
    assert M.terraced(3, 1).dense(9)[7].nonzero().flatten().tolist() == [3, 4, 5, 6, 7]


def test_document_meets_only_within():
    assert torch.equal(M.document([0, 2, 5]).dense(5), torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).bool())


def test_circle_excludes_its_boundary():
    row = M.circular_window((5, 5), 2.0).dense(25)[12].reshape(5, 5)
    assert row.sum() == 9 and not bool(row[0, 2]) and bool(row[1, 1])


def test_on_segment_leaves_the_rest_global():
    layout = Layout((("text", 2), ("image", (2, 3)), ("cls", 1)))
    full = M.on_segment(layout, "image", M.causal()).dense(9)
    assert bool(full[:2].all()) and bool(full[8].all()) and bool(full[:, :2].all()) and bool(full[:, 8].all())
    assert torch.equal(full[2:8, 2:8], M.causal().dense(6))


def test_algebra():
    a, b = M.causal().dense(N), M.sliding_window(5).dense(N)
    assert torch.equal((M.causal() & M.sliding_window(5)).dense(N), a & b)
    assert torch.equal((M.causal() | M.sliding_window(5)).dense(N), a | b)
    assert torch.equal((~M.causal()).dense(N), ~a)
    assert ~~M.causal() == M.causal()


def test_value_semantics():
    assert M.sliding_window(5) == M.sliding_window(5) != M.sliding_window(7)
    assert len({M.causal(), M.causal(), M.recent(3)}) == 2
    tensor = torch.zeros(3, dtype=torch.long)
    assert M.documents(tensor) == M.documents(tensor.clone()) != M.documents(tensor + 1)
    assert hash(M.documents(tensor)) == hash(M.documents(tensor.clone()))


# ---- bad arguments


@pytest.mark.parametrize(
    "make,error,words",
    [
        (lambda: M.sliding_window(0), ValueError, "window"),
        (lambda: M.recent(2.5), TypeError, "window"),
        (lambda: M.terraced(0), ValueError, "window"),
        (lambda: M.strided(0), ValueError, "stride"),
        (lambda: M.neighborhood((4, 4), 5), ValueError, "larger than the grid"),
        (lambda: M.neighborhood((4, 4), 1), ValueError, "at least 2"),
        (lambda: M.neighborhood((8, 8), 3, 3), ValueError, "dilation from 1 to 2"),
        (lambda: M.neighborhood((8, 8), 3, 1, 4), ValueError, "stride"),
        (lambda: M.neighborhood((8, 8), (3, 3, 3)), ValueError, "3 axes"),
        (lambda: M.circular_window((4, 4), 0.0), ValueError, "radius"),
        (lambda: M.document([1, 3]), ValueError, "start at 0"),
        (lambda: M.documents(torch.zeros(3)), TypeError, "integer"),
        (lambda: M.modality(torch.zeros(3, dtype=torch.long), [[True, False]]), ValueError, "square"),
        (lambda: M.explicit(torch.zeros(3, 3)), TypeError, "boolean"),
        (lambda: M.explicit(torch.zeros(3, dtype=torch.bool)), ValueError, "mask tensor"),
        (lambda: M.explicit(torch.zeros(3, 3, dtype=torch.bool)).dense(4), ValueError, "queries 0 to 2"),
        (lambda: M.as_mask([1]), TypeError, "mask"),
        (lambda: M.sliding_window(True), TypeError, "window.*True"),
        (lambda: M.recent(INF), TypeError, "window.*inf"),
        (lambda: M.terraced(2, -1), ValueError, "previous.*-1"),
        (lambda: M.prefix_lm(-1), ValueError, "prefix.*-1"),
        (lambda: M.prefix_lm(2.0), TypeError, "prefix.*2.0"),
        (lambda: M.prefix_lm(torch.tensor([2, -3])), ValueError, "prefix.*-3"),
        (lambda: M.prefix_lm(torch.tensor([2.0])), TypeError, "prefix.*float32"),
        (lambda: M.prefix_lm(torch.tensor(3)), ValueError, "prefix"),
        (lambda: M.strided(3, local=-1), ValueError, "local.*-1"),
        (lambda: M.strided(3, num_heads=0), ValueError, "num_heads.*0"),
        (lambda: M.strided(3, offset=0.5), TypeError, "offset.*0.5"),
        (lambda: M.document([0, 3, 2]), ValueError, r"cu_seqlens.*\[0, 3, 2\]"),
        (lambda: M.document([0]), ValueError, r"cu_seqlens.*\[0\]"),
        (lambda: M.document([0, 1.5]), TypeError, "cu_seqlens.*1.5"),
        (lambda: M.document(torch.tensor([0.0, 2.0])), TypeError, "cu_seqlens.*float32"),
        (lambda: M.document(torch.zeros(2, 2, dtype=torch.long)), ValueError, "cu_seqlens"),
        (lambda: M.document("02"), TypeError, "cu_seqlens"),
        (lambda: M.documents(torch.zeros(3, dtype=torch.bool)), TypeError, "ids.*bool"),
        (lambda: M.documents([0, 0, 1]), TypeError, r"ids.*\[0, 0, 1\]"),
        (lambda: M.documents(torch.zeros(1, 1, 3, dtype=torch.long)), ValueError, "ids"),
        (lambda: M.modality(IDS - 1, [[True]]), ValueError, "types holds -1"),
        (lambda: M.modality(IDS + 1, [[True]]), ValueError, "types holds 1.*0 to 0"),
        (lambda: M.modality(IDS.float(), [[True]]), TypeError, "types.*float32"),
        (lambda: M.modality(IDS, [[0.5]]), TypeError, "rule.*0.5"),
        (lambda: M.modality(IDS, []), TypeError, "rule"),
        (lambda: M.circular_window((4, 4), INF), ValueError, "radius.*inf"),
        (lambda: M.circular_window((4, 4), NAN), ValueError, "radius.*nan"),
        (lambda: M.circular_window((4, 4), -1.0), ValueError, "radius.*-1.0"),
        (lambda: M.circular_window((4, 4), True), TypeError, "radius.*True"),
        (lambda: M.circular_window((4, -4), 1.0), ValueError, "grid.*-4"),
        (lambda: M.circular_window(4, 1.0), TypeError, "grid.*4"),
        (lambda: M.neighborhood((4.0, 4), 3), TypeError, "grid.*4.0"),
        (lambda: M.neighborhood((4, 4), 3.0), TypeError, "kernel_size.*3.0"),
        (lambda: M.neighborhood((4, 4), 3, causal=2), TypeError, "causal.*2"),
        (lambda: M.neighborhood((4, 4, 4, 4), 3), ValueError, "grid"),
        (lambda: M.causal_frames(0, 2, 2), ValueError, "queries.*0"),
        (lambda: M.causal_frames(2, torch.tensor([2, 0]), 2), ValueError, "frames.*0"),
        (lambda: M.blocks(torch.ones(2, 2, dtype=torch.bool), 0, 1), ValueError, "q_block.*0"),
        (lambda: M.blocks(torch.ones(2, 2), 1, 1), TypeError, "chosen.*float32"),
        (lambda: M.on_segment(LAYOUT, "video", M.causal()), ValueError, "video.*image"),
        (lambda: M.on_segment(LAYOUT, "image", M.neighborhood((2, 2), 2)), ValueError, "knows 4 positions"),
        (lambda: M.on_segment(LAYOUT, "image", IDS), TypeError, "inner"),
        (lambda: M.on_segment(None, "image", M.causal()), TypeError, "layout.*None"),
        # indexed beyond what it knows
        (lambda: M.documents(IDS).dense(4), ValueError, "queries 0 to 2.*0 to 3"),
        (lambda: M.documents(IDS).dense(3, 4), ValueError, "keys 0 to 2"),
        (lambda: M.documents(IDS).at(IDS + 3, IDS), ValueError, "position 3"),
        (lambda: M.documents(IDS).at(IDS - 1, IDS), ValueError, "position -1"),
        (lambda: (M.causal() & M.documents(IDS)).dense(4), ValueError, "0 to 2"),
        (lambda: (~M.modality(IDS, [[True]])).count(4), ValueError, "0 to 2"),
        (lambda: M.neighborhood((4, 4), 3).dense(17), ValueError, "0 to 15"),
        (lambda: M.circular_window((4, 4), 2.0).at(IDS + 16, IDS), ValueError, "position 16"),
        (lambda: M.blocks(torch.ones(2, 2, dtype=torch.bool), 2, 2).picture(5), ValueError, "0 to 3"),
        (lambda: M.causal().dense(-1), ValueError, "start"),
        (lambda: M.causal().dense(2.0), TypeError, "2.0"),
        (lambda: M.causal().block((3, 1), (0, 4)), ValueError, "start"),
        # positions that are none
        (lambda: M.causal().at(IDS.float(), IDS), TypeError, "q_pos.*float32"),
        (lambda: M.causal().at(IDS, IDS[0]), ValueError, "k_pos"),
        (lambda: M.causal().at(IDS, [1]), TypeError, r"k_pos.*\[1\]"),
        (lambda: M.causal().at(IDS.expand(2, 3), IDS.expand(3, 3)), ValueError, "k_pos is for 3 samples.*2"),
        (lambda: M.documents(IDS.expand(2, 3)).at(IDS.expand(3, 3), IDS), ValueError, "q_pos is for 3.*for 2"),
        # other devices
        (lambda: M.documents(IDS).dense(3, device="meta"), ValueError, "lies on cpu.*meta"),
        (lambda: M.documents(IDS.to("meta")).at(IDS, IDS), ValueError, "lies on meta.*cpu"),
        (lambda: M.documents(IDS.to("meta")) & M.documents(IDS), ValueError, "lies on meta.*on cpu"),
        # compositions
        (lambda: M.causal() & 3, TypeError, "&.*3"),
        (lambda: 3 | M.causal(), TypeError, r"\|.*3"),
        (lambda: M.causal() & None, TypeError, "&.*None"),
        (lambda: M.causal() | torch.ones(3, 3), TypeError, "boolean.*float32"),
        (lambda: M.documents(IDS.expand(2, 3)) & M.prefix_lm(IDS), ValueError, "for 2 samples.*for 3"),
        (lambda: M.And(M.causal(), 3), TypeError, "right.*3"),
        (lambda: M.Not(None), TypeError, "inner.*None"),
    ],
)
def test_bad_arguments_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(
    "kw, words",
    [
        (dict(n=5, m=3), "queries 0 to 2, but there are 5"),
        (dict(n=3, m=5), "keys 0 to 2, but there are 5"),
        (dict(n=3, m=3, batch=3), "for 2 samples.*3"),
        (dict(n=3, m=3, device=torch.device("meta")), "lies on cpu.*meta"),
        (dict(n=3, m=3, q_pos=IDS + 1, k_pos=IDS + 4), "position 4"),
    ],
)
def test_a_call_that_the_mask_does_not_serve(kw, words):
    mask = M.causal() & M.documents(IDS.expand(2, 3))
    mask.check(3, 3, batch=2, heads=7, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=words):
        mask.check(**kw)
    with pytest.raises(ValueError, match="for N=2 queries"):
        (M.causal() | torch.ones(3, 3, dtype=torch.bool)).check(2, 2)


# ---- frozen


@pytest.mark.parametrize("name", list(KINDS))
def test_nothing_changes_a_mask(name):
    mask = _kinds()[name]
    before, number = mask.dense(N).clone(), hash(mask)
    for field in (*mask.fields, "new"):
        with pytest.raises(AttributeError, match="frozen"):
            setattr(mask, field, 1)
        with pytest.raises(AttributeError, match="frozen"):
            delattr(mask, field)
    for field in mask.fields:
        value = getattr(mask, field)
        if isinstance(value, torch.Tensor):
            value.fill_(1)
    assert torch.equal(mask.dense(N), before) and hash(mask) == number
    assert mask == KINDS[name] and hash(KINDS[name]) == number
    for copied in (copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask)), mask.to("cpu")):
        assert copied == mask and hash(copied) == number and torch.equal(copied.dense(N), before)


def test_the_tensor_that_was_given_does_not_change_the_mask():
    ids, allowed, frames = torch.zeros(4, dtype=torch.long), torch.ones(4, 4, dtype=torch.bool), torch.tensor([1, 2])
    masks = [M.documents(ids), M.explicit(allowed), M.causal_frames(4, frames, 2), M.causal() & allowed]
    before = [m.dense(4) for m in masks]
    ids[2:] = 1
    allowed[1:] = False
    frames += 5
    assert all(torch.equal(m.dense(4), b) for m, b in zip(masks, before, strict=True))


def test_tensors_join_the_algebra_from_both_sides():
    allowed = torch.rand(4, 4) > 0.5
    for mask in (M.causal() & allowed, allowed & M.causal()):
        assert torch.equal(mask.dense(4), M.causal().dense(4) & allowed)
    for mask in (M.causal() | allowed, allowed | M.causal()):
        assert torch.equal(mask.dense(4), M.causal().dense(4) | allowed)


def test_an_empty_segment_changes_nothing():
    layout = Layout((("text", 3), ("image", (0, 4))))
    assert bool(M.on_segment(layout, "image", M.causal()).dense(3).all())


def test_masks_are_built_composed_and_read_inside_a_graph():
    def f(x, ids):
        mask = M.causal() & (M.documents(ids) | M.sliding_window(2))
        mask.check(x.shape[0], x.shape[0], device=x.device)
        at = torch.arange(x.shape[0])
        return x.masked_fill(~mask.at(at, at), 0) + mask.dense(x.shape[0])

    compiled = torch.compile(f, fullgraph=True, backend="eager", dynamic=True)
    for n in (4, 6, 9):
        x, ids = torch.randn(n, n), torch.arange(n) // 2
        assert torch.equal(compiled(x, ids), f(x, ids))
    size = torch.export.Dim("n", min=2, max=64)
    ids = torch.arange(4) // 2
    program = torch.export.export(
        Module(f), (torch.randn(4, 4), ids), dynamic_shapes=({0: size, 1: size}, {0: size}), strict=False
    )
    x, ids = torch.randn(7, 7), torch.arange(7) // 2
    assert torch.equal(program.module()(x, ids), f(x, ids))


class Module(torch.nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x, ids):
        return self.fn(x, ids)


def test_a_mask_enters_a_graph_as_an_argument():
    def f(x, mask):
        return x.masked_fill(~mask.dense(x.shape[0]), 0)

    compiled = torch.compile(f, fullgraph=True, backend="eager")
    x = torch.randn(N, N)
    for name in ("documents", "modality", "prefix", "and", "neighborhood_2d", "blocks"):
        assert torch.equal(compiled(x, KINDS[name]), f(x, KINDS[name]))


def test_a_mask_keeps_its_numbers_on_a_padded_grid():
    allowed = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    padded = M.Padded(M.as_mask(allowed), (2, 3), (4, 5))
    places = torch.arange(20).view(4, 5)[:2, :3].flatten()
    expected = torch.zeros(2, 1, 20, 20, dtype=torch.bool)
    expected[:, :, places[:, None], places] = allowed
    assert torch.equal(padded.dense(20), expected)
    assert padded.extent() == (20, 20)
