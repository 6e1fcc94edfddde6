import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from attnlib import Plan, State, Traits


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


def test_traits_bound():
    bound = Traits(patterns={"causal-self", "noncausal-self"}, mask=False)
    assert bound.but(patterns=frozenset({"causal-self"})).within(bound) == []
    assert set(bound.but(patterns=frozenset({"causal-cross"}), mask=True).within(bound)) == {"patterns", "mask"}
    assert bound.to_dict()["patterns"] == ["causal-self", "noncausal-self"]
    with pytest.raises(ValueError, match="sideways"):
        Traits(patterns={"sideways"})
