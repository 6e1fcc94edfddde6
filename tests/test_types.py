import pickle

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from attnlib import Partial, Plan, State, Traits


def test_state_follows_the_batch():
    state = State({"k": torch.arange(6).reshape(3, 2), "inner": State({"n": torch.tensor([1, 2, 3])})})
    assert state.select(torch.tensor([2, 0]))["inner"]["n"].tolist() == [3, 1]
    assert state.repeat(2)["k"].shape == (6, 2) and state.repeat(2)["inner"]["n"].tolist() == [1, 1, 2, 2, 3, 3]
    assert state.numel() == 9
    with pytest.raises(KeyError, match="holds"):
        state["v"]


@pytest.mark.parametrize(
    "value",
    [State({"a": torch.ones(2), "b": State({"c": torch.ones(1)})}), Plan("p", {"i": torch.ones(2)}, (("N", 2),))],
)
def test_values_are_pytrees(value):
    leaves, spec = tree_flatten(value)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    again = tree_unflatten(leaves, spec)
    assert type(again) is type(value) and list(again) == list(value)
    doubled = tree_map(lambda t: t * 2, value)
    assert float(doubled[next(iter(value))].max()) == 2


def test_plan_says_what_it_was_made_for():
    plan = Plan("topk", {"i": torch.zeros(1)}, (("N", 4), ("k", 2)))
    assert plan.expect("topk", N=4) is plan
    with pytest.raises(ValueError, match="N=4, but the input has N=5"):
        plan.expect("topk", N=5)
    with pytest.raises(ValueError, match="kind 'topk'"):
        plan.expect("buckets")


def test_variants_of_traits_are_made_once_and_checked():
    bound = Traits(patterns={"causal-self"}, work={"N": 2})
    once = bound.but(mask=True, work={"N": 1})
    assert bound.but(mask=True, work={"N": 1}) is once and bound.but(mask=True) is not once
    assert once.work == {"N": 1} and bound.work == {"N": 2} and not bound.mask
    assert bound.but(losses=["a"]).losses == ["a"]  # what has no hash is made every time
    assert bound.but(grid_multiple=1).grid_multiple == 1
    with pytest.raises(TypeError, match="grid_multiple"):
        bound.but(grid_multiple=True)
    copied = pickle.loads(pickle.dumps(bound))
    assert copied == bound and copied.but(mask=True) == bound.but(mask=True) and copied.but(mask=True).mask
    for _ in range(2):
        with pytest.raises(ValueError, match="patterns"):
            bound.but(patterns=frozenset({"sideways"}))


def test_traits_bound():
    bound = Traits(patterns={"causal-self", "noncausal-self"}, mask=False)
    assert bound.but(patterns=frozenset({"causal-self"})).within(bound) == []
    assert set(bound.but(patterns=frozenset({"causal-cross"}), mask=True).within(bound)) == {"patterns", "mask"}
    assert bound.to_dict()["patterns"] == ["causal-self", "noncausal-self"]
    with pytest.raises(ValueError, match="sideways"):
        Traits(patterns={"sideways"})


# ---- bad arguments


def _partial(*shape, dtype=torch.float32, dv=4):
    return Partial(
        torch.zeros(shape, dtype=dtype), torch.ones(shape, dtype=dtype), torch.ones((*shape, dv), dtype=dtype)
    )


STATE = State({"k": torch.zeros(2, 3), "inner": State({"v": torch.zeros(2)})}, kind="mine")
OWNED = STATE.owned("mine", torch.float32)


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: _partial(2, 3, 4).merge(_partial(2, 3, 5)), ValueError, r"\(2, 3, 4\) and \(2, 3, 5\)"),
        (lambda: _partial(2, 3, 4).merge(_partial(2, 3, 4, dv=1)), ValueError, "num"),
        (lambda: _partial(2, 3, 4).merge(_partial(2, 3, 4, dtype=torch.float64)), TypeError, "float64"),
        (lambda: _partial(2, 3, 4).merge(_partial(2, 3, 4)[2]), TypeError, "others"),
        (lambda: _partial(2, 3, 4).shift(torch.zeros(5)), ValueError, r"log_weight.*\(5,\)"),
        (lambda: _partial(2, 3, 4).shift(torch.zeros(7, 2, 3, 4)), ValueError, "log_weight"),
        (lambda: _partial(2, 3, 4).shift(float("nan")), ValueError, "log_weight.*nan"),
        (lambda: _partial(2, 3, 4).shift("1"), TypeError, "log_weight.*'1'"),
        (lambda: STATE.select(torch.tensor([0, 2])), ValueError, "index points at sample 2.*0 to 1"),
        (lambda: STATE.select(torch.tensor([-1])), ValueError, "sample -1"),
        (lambda: STATE.reorder(torch.tensor([True, False])), TypeError, "index.*bool"),
        (lambda: STATE.select([0, 1]), TypeError, r"index.*\[0, 1\]"),
        (lambda: STATE.repeat(0), ValueError, "times.*0"),
        (lambda: STATE.repeat(2.0), TypeError, "times.*2.0"),
        (lambda: STATE.expect("other"), ValueError, "'mine'.*'other'"),
        (lambda: STATE.expect("mine", batch=3), ValueError, "'k' of 2 samples.*3"),
        (lambda: STATE.repeat(2).expect("mine", batch=2), ValueError, "'k' of 4 samples"),
        (lambda: STATE.expect("mine", device=torch.device("meta")), ValueError, "'k' on cpu.*meta"),
        (lambda: OWNED.map(torch.Tensor.double).expect("mine", dtype=torch.float32), TypeError, "float64.*needs.*32"),
        (lambda: OWNED.expect("mine", dtype=torch.float64), TypeError, "'k' in torch.float32.*needs torch.float64"),
        (lambda: OWNED.map(torch.Tensor.half).expect("mine", dtype=torch.bfloat16), TypeError, "'k' in torch.float16"),
        (lambda: STATE.map(torch.Tensor.long), TypeError, "'k' of the state from torch.float32 into torch.int64"),
        (lambda: State({"n": torch.ones(2).long()}).map(torch.Tensor.float), TypeError, "'n'.*floating-point tensors"),
        (lambda: State({}).expect("mine"), ValueError, "holds nothing"),
        (lambda: State([torch.zeros(1)]), TypeError, "tensors"),
        (lambda: Plan(3, {}), TypeError, "kind.*3"),
        (lambda: Plan("topk", {}).expect("buckets"), ValueError, "'topk'.*'buckets'"),
        (lambda: STATE["q"], KeyError, "'inner', 'k'.*'q'"),
        (lambda: Traits(grid_ranks={4}), ValueError, "grid_ranks=4"),
    ],
)
def test_bad_arguments_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_a_state_keeps_the_name_of_its_owner():
    index = torch.tensor([1, 1, 0])
    leaves, tree = tree_flatten(STATE)
    for state in (
        STATE.select(index), STATE.repeat(2), STATE.detach(), STATE.replace(k=torch.zeros(2, 1)),
        tree_unflatten(leaves, tree),
    ):  # fmt: skip
        assert state.kind == "mine" and state.expect("mine") is state
    assert STATE.select(index)["inner"]["v"].shape == (3,)
    assert State({"k": torch.zeros(2)}).expect("whoever", batch=2)["k"].shape == (2,)


def test_a_state_knows_the_types_that_its_owner_made():
    """They need not be those of x: sums may be kept in float64 beside float32."""
    exact = State({"S": torch.zeros(2, dtype=torch.float64), "n": torch.zeros(2).long()}).owned("mine", torch.float32)
    leaves, tree = tree_flatten(exact)
    for state in (exact, exact.select(torch.tensor([1])), exact.repeat(2), tree_unflatten(leaves, tree)):
        assert state.types == ("torch.float32", "torch.float64") and state.expect("mine", dtype=torch.float32) is state
    with pytest.raises(TypeError, match="'S' in torch.float32, but beside x of torch.float32 'mine' needs .*float64"):
        exact.map(lambda t: t.float() if t.is_floating_point() else t).expect("mine", dtype=torch.float32)
    halved = OWNED.map(torch.Tensor.half)  # with its model
    assert halved.expect("mine", dtype=torch.float16) is halved
    assert STATE.expect("mine", dtype=torch.float64) is STATE  # made by hand: not known
