"""Doors of the vocabulary and of the operators' helpers: what cannot be is refused by the argument's name."""

import pytest
import torch

from attnlib import grids, masks, normalizers, positions
from attnlib.ops import BlockPlan, block_policies, block_sparse, feature_maps, modulation, neighborhood_sim, reduced
from attnlib.ops.split_decoding import fixed_split, flash_decoding_splits, lean_launch, stream_k
from attnlib.types import Output, Partial, Plan, State, Traits

META = torch.device("meta")
Z = torch.zeros
LONG = torch.zeros(2, 3, dtype=torch.long)
PREFIX = masks.prefix_lm(torch.tensor([1, 2]))
SUMS = Partial(Z(1, 2, 3), torch.ones(1, 2, 3), Z(1, 2, 3, 4))
X, SCORES = torch.randn(1, 2, 6, 3), Z(1, 1, 3, 2)
PLAN = BlockPlan.full(6, 6, 2, 3)

CALLS = {
    # masks
    "raise_mask/text": (lambda: masks.raise_mask("causal"), "spec"),
    "raise_mask/junk": (lambda: masks.raise_mask(3), "spec"),
    "raise_mask/other": (lambda: masks.raise_mask('{"mask":"nobody","args":[]}'), "spec"),
    "raise_mask/number": (lambda: masks.raise_mask("3"), "spec"),
    "raise_mask/tensors": (lambda: masks.raise_mask(masks.causal().lower()[0], [Z(1)]), "tensors"),
    "raise_mask/missing": (lambda: masks.raise_mask(PREFIX.lower()[0], []), "spec"),
    "block/one": (lambda: masks.causal().block(3, (0, 2)), "rows"),
    "block/three": (lambda: masks.causal().block((0, 2), (0, 1, 2)), "cols"),
    "dense/device": (lambda: masks.causal().dense(2, device="nowhere"), "device"),
    "to/device": (lambda: PREFIX.to("nowhere"), "device"),
    "to/number": (lambda: masks.causal().to(3), "device"),
    "plane/sample": (lambda: PREFIX.plane(2, 0), "b must be"),
    "plane/negative": (lambda: masks.causal().plane(0, -1), "h must be"),
    "check/n": (lambda: masks.causal().check("3", 3), "n must be"),
    "check/batch": (lambda: masks.causal().check(3, 3, batch=2.0), "batch must be"),
    "visible_keys/m": (lambda: masks.visible_keys(None, 3, float("inf")), "m must be"),
    "visible_keys/valid": (lambda: masks.visible_keys(masks.causal(), 3, 3, torch.ones(1, 4).bool()), "valid must"),
    "visible_keys/batch": (lambda: masks.visible_keys(PREFIX, 3, 3, torch.ones(3, 3).bool()), "mask is for 2 samples"),
    "visible_keys/q_pos": (lambda: masks.visible_keys(masks.causal(), 3, 3, q_pos=torch.arange(4)), "q_pos must"),
    "visible_keys/meta": (
        lambda: masks.visible_keys(PREFIX, 3, 3, torch.ones(2, 3).bool().to(META), torch.arange(3)), "one device"
    ),
    # grids
    "layout/empty name": (lambda: grids.Layout((("", 3),)), "name of a segment must not be empty"),
    "coordinates/device": (lambda: grids.coordinates((2,), "nowhere"), "device"),
    "types/device": (lambda: grids.Layout((("a", 3),)).types([]), "device"),
    "pad/value": (lambda: grids.pad_to_multiple(Z(1, 3, 2), 2, "0"), "value must be"),
    # positions and normalizers
    "raise_bias/text": (lambda: positions.raise_bias("nothing", [Z(1)]), "spec"),
    "raise_bias/tensors": (lambda: positions.raise_bias('["dense",[]]', Z(1)), "tensors"),
    "raise_normalizer": (lambda: normalizers.raise_normalizer("{}"), "spec"),
    "raise_normalizer/list": (lambda: normalizers.raise_normalizer(["softmax"]), "spec"),
    "alibi/span": (lambda: positions.alibi(1, torch.arange(4), torch.arange(4), span=(-2, 2)), "does not hold k - q"),
    "alibi/one": (lambda: positions.alibi(1, torch.arange(4), torch.arange(4), span=3), "span"),
    "offsets/even": (lambda: positions.relative_offsets(Z(1, 4), (0,), (2,)), "odd on every axis"),
    "offsets/axes": (lambda: positions.relative_offsets(Z(1, 3), (0, 1), (2,)), "starts and sizes"),
    "spectrum/queries": (lambda: positions.toeplitz_spectrum(Z(3), ()), "queries"),
    "spectrum/many": (lambda: positions.toeplitz_spectrum(Z(3), (4,)), "queries"),
    "spectrum/c": (lambda: positions.toeplitz_spectrum([1.0], (1,)), "c must be"),
    "rotary/grid": (lambda: positions.rotary_angles(Z(3, 2).long(), 8, grid="ab"), "grid must be"),
    "rotary/no axis": (lambda: positions.rotary_angles(Z(3, 0).long(), 8, grid=()), "grid must have"),
    # types
    "plan/shape": (lambda: Plan("topk", {}, "N"), "shape must hold"),
    "plan/missing": (lambda: Plan("topk", {}).choices("index", (2,), 3, "key"), "plan holds"),
    "plan/rank": (lambda: Plan("topk", {"index": LONG}).choices("index", (2, None, 1), 3, "key"), "plan's index"),
    "plan/beyond": (lambda: Plan("topk", {"index": LONG + 3}).choices("index", (2, None), 3, "key"), "plan's index"),
    "plan/floats": (lambda: Plan("topk", {"index": Z(2, 3)}).choices("index", (2, None), 3, "key"), "plan's index"),
    "state/list": (lambda: State({"k": [1.0]}).map(lambda t: t), "state's k"),
    "partial/den": (lambda: Partial(Z(1, 2, 3), Z(1, 2, 2), Z(1, 2, 3, 4)).finish(), "partial must hold"),
    "partial/num": (lambda: Partial(Z(1, 2, 3), Z(1, 2, 3), Z(1, 2, 3)).lse(), "partial must hold"),
    "partial/list": (lambda: SUMS._replace(den=[1.0]).merge(), "partial's den"),
    "partial/whole": (lambda: SUMS._replace(num=LONG).shift(0.0), "partial's num"),
    "partial/identity": (lambda: Partial.identity_like(Output(Z(1))), "other must be"),
    "traits/flag": (lambda: Traits(needs_plan=2), "needs_plan must be"),
    "traits/patterns": (lambda: Traits(patterns="causal-self"), "patterns must be"),
    "traits/ranks": (lambda: Traits(grid_ranks=2), "grid_ranks must be"),
    "traits/work": (lambda: Traits(work={"N": float("nan")}), "work"),
    "traits/memory": (lambda: Traits(memory=[("N", 1)]), "memory must be"),
    "traits/losses": (lambda: Traits(losses="balance"), "losses must be"),
    # blocks
    "from_csr/falls": (lambda: BlockPlan.from_csr(torch.tensor([0, 2, 1]), torch.tensor([0]), 4, 4, 8), "row_ptr"),
    "from_csr/empty": (lambda: BlockPlan.from_csr(torch.tensor([]).long(), torch.tensor([0]), 4, 4, 8), "row_ptr"),
    "from_csr/cols": (lambda: BlockPlan.from_csr(torch.tensor([0, 1, 1]), torch.tensor([2]), 4, 4, 8), "cols points"),
    "full/block": (lambda: BlockPlan.full(8, 8, 0, 4), "q_block must be"),
    "gather/tokens": (lambda: block_sparse.gather_blocks(X[:, :, :5], PLAN), "x holds 5 tokens"),
    "gather/plan": (lambda: block_sparse.gather_blocks(X, Plan("blocks", {})), "plan must be a BlockPlan"),
    "gather/samples": (
        lambda: block_sparse.gather_blocks(X, BlockPlan(PLAN.index.expand(3, 1, -1, -1), 2, 3, 6)),
        "plan is for 3 samples",
    ),
    "recall/plan": (lambda: block_sparse.block_recall(X, X, "plan"), "plan must be a BlockPlan"),
    "pool_blocks/block": (lambda: block_policies.pool_blocks(X, 0), "block must be"),
    "pool_blocks/valid": (lambda: block_policies.pool_blocks(X, 2, torch.ones(1, 5).bool()), "valid must have shape"),
    "affinity/width": (lambda: block_policies.block_affinity(X, X[..., :2], 2, 2), "k has 2 channels"),
    "affinity/heads": (lambda: block_policies.block_affinity(X[:, :1], X, 2, 2), "heads of k"),
    "own_blocks/n": (lambda: block_policies.own_blocks(-1, 2, 2), "n must be"),
    "topk/blocks": (lambda: block_policies.topk_blocks(SCORES, 1, 2, 2, 6, 6), "scores must be"),
    "topk/whole": (lambda: block_policies.topk_blocks(SCORES.long(), 1, 2, 3, 6), "scores must be"),
    "topk/none": (lambda: block_policies.topk_blocks(SCORES, 0, 2, 3, 6), "topk must be"),
    "topk/forced": (lambda: block_policies.topk_blocks(SCORES, 1, 2, 3, 6, forced=SCORES), "forced must be boolean"),
    "threshold/nan": (lambda: block_policies.threshold_blocks(SCORES, float("nan"), 2, 3, 6), "threshold must be"),
    "threshold/allowed": (
        lambda: block_policies.threshold_blocks(SCORES, 0.5, 2, 3, 6, allowed=torch.ones(5).bool()), "allowed must be"
    ),
    # schedules
    "stream_k/workers": (lambda: stream_k([1], True), "workers must be"),
    "stream_k/tiles": (lambda: stream_k([1.5], 2), "tiles"),
    "fixed/splits": (lambda: fixed_split([1], 2, 0), "splits must be"),
    "splits/workers": (lambda: flash_decoding_splits(1, 0, 1), "workers must be"),
    "launch/tiles": (lambda: lean_launch(1, 1.5, 1), "tiles must be"),
    "tiles/size": (lambda: neighborhood_sim.visited_tiles((8,), 3, q_tile=1.5), "q_tile"),
    "tiles/grid": (lambda: neighborhood_sim.visited_tiles((8.5,), 3), "grid"),
    # features and modulation
    "elu1/whole": (lambda: feature_maps.elu1(LONG), "x must be"),
    "features/none": (lambda: feature_maps.softmax_features(Z(2, 0)), "z must be"),
    "features/eps": (lambda: feature_maps.exp_features(Z(2, 3), eps=float("nan")), "eps must be"),
    "directions/width": (lambda: feature_maps.positive_random_features(Z(2, 3), Z(4, 2)), "directions must be"),
    "directions/none": (lambda: feature_maps.trigonometric_random_features(Z(2, 3), Z(0, 3)), "directions must be"),
    "random/count": (lambda: feature_maps.random_directions(-1, 2), "count must be"),
    "random/generator": (lambda: feature_maps.random_directions(1, 2, generator=0), "generator must be"),
    "pyramid/weights": (lambda: modulation.pyramid(X[0], Z(3, 1, 3)), "weights must be"),
    "pyramid/activation": (lambda: modulation.pyramid(X[0], [Z(3, 1, 3)], activation="relu"), "activation must be"),
    "mixed/weights": (lambda: modulation.mixed_depthwise(X[0], []), "weights must hold"),
    "pool/keep": (lambda: modulation.pool(X[0], keep=1), "keep must be"),
    "pool/whole": (lambda: modulation.pool(X[0].long()), "x must be"),
    "gates/number": (lambda: modulation.gated_sum([X[0]], Z(2, 6, 2)), "gates must have"),
    "gates/contexts": (lambda: modulation.gated_sum([X[0][:, :3]], Z(2, 6, 1)), "contexts"),
    "modulate/factor": (lambda: modulation.modulate(X[0], "factor"), "factor must be"),
    "modulate/activation": (lambda: modulation.modulate(X[0], X[0], activation=3), "activation must be"),
    "adaptive/size": (lambda: reduced.adaptive_pool_tokens(X[0], 0), "size"),
    "adaptive/empty": (lambda: reduced.adaptive_pool_tokens(X[0][:, :0], 1), "x must hold"),
    "strided/stride": (lambda: reduced.strided_tokens(X[0], 0), "stride"),
    "strided/offset": (lambda: reduced.strided_tokens(X[0], 1, offset=-1), "offset must be"),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_what_cannot_be_is_refused_by_name(call):
    make, words = CALLS[call]
    with pytest.raises((TypeError, ValueError, KeyError), match=words):
        make()


def test_counts_of_no_rows_know_samples_and_heads():
    assert PREFIX.count(0, 3).shape == (2, 1, 0)
    assert masks.causal().count(0, 3).shape == (0,)


def test_a_plan_by_rows_may_be_empty():
    plan = BlockPlan.from_csr(torch.zeros(3, dtype=torch.long), torch.zeros(0, dtype=torch.long), 4, 4, 8)
    assert not plan.chosen().any() and plan.chosen().shape == (1, 1, 2, 2)


def test_spectra_of_halves_and_of_nothing():
    full, sizes = positions.toeplitz_spectrum(torch.randn(2, 5), (3,))
    half, _ = positions.toeplitz_spectrum(torch.randn(2, 5).half(), (3,))
    none, _ = positions.toeplitz_spectrum(torch.randn(0, 5), (3,))
    assert half.dtype == full.dtype and none.shape == (0, sizes[0] // 2 + 1)
