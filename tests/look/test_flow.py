"""Attention flow: its equation, what a causal mask does to it, and the same streamed beside a model."""

import pytest
import torch

import attnlib
from attnlib.look.flow import Flow, attention_flow, column_regulariser, flow_map, mean_max
from attnlib.look.rollout import Rollout

F64 = torch.float64


def random_maps(layers=4, batch=2, heads=3, n=9, causal=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(layers, batch, heads, n, n, dtype=F64, generator=g)
    if causal:
        scores = scores.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), float("-inf"))
    return scores.softmax(-1)


def by_hand(maps, residual, regulariser):
    flow = torch.eye(maps.shape[-1], dtype=F64).expand(maps.shape[1], -1, -1)
    for layer in maps:
        weight = layer.amax(-1).mean(-1)
        mean = (weight[..., None, None] * layer).sum(1) / weight.sum(1)[:, None, None]
        flow = regulariser.double() * (((1 - residual) * mean + residual * torch.eye(maps.shape[-1])) @ flow)
    return flow


@pytest.mark.parametrize("how", ["none", "linear", "column"])
def test_the_equation(how):
    maps = random_maps()
    ours = attention_flow(iter(maps), "mean-max", 0.5, how)
    torch.testing.assert_close(ours, by_hand(maps, 0.5, column_regulariser(9, how)), rtol=1e-7, atol=1e-8)


def test_identities_stay_and_rows_sum_to_one():
    eye = torch.eye(5, dtype=F64).expand(1, 2, 5, 5)
    assert attention_flow([eye] * 6, "mean-max").equal(eye[:, 0])
    for residual in (0.0, 0.5):
        sums = attention_flow(random_maps(), "mean-max", residual).sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums))


@pytest.mark.parametrize("how", ["linear", "column"])
def test_uniform_causal_attention_ends_in_the_first_column_unless_it_is_held_back(how):
    n = 24
    uniform = torch.ones(n, n, dtype=F64).tril()
    uniform = (uniform / uniform.sum(-1, keepdim=True)).expand(1, 1, n, n)
    share = lambda flow: float(flow[0, -1, 0] / flow[0, -1].sum())  # noqa: E731
    depths = (1, 4, 8, 24)
    plain = [share(attention_flow([uniform] * layers)) for layers in depths]
    assert plain == sorted(plain) and plain[-1] > 0.9  # it gathers there
    held = [share(attention_flow([uniform] * layers, regulariser=how)) for layers in depths]
    deep = 4 if how == "column" else 3  # the linear one does not hold for ever
    assert all(h < 0.8 * p for h, p in zip(held[:deep], plain[:deep], strict=True))


def test_a_head_that_looks_at_one_block_shows_it():
    n, grid = 26, (5, 5)
    block = torch.zeros(5, 5, dtype=torch.bool)
    block[1:3, 2:5] = True
    maps = torch.ones(1, 4, n, n, dtype=F64).tril()
    maps[0, 0, -1] = 0
    maps[0, 0, -1, :25] = block.flatten().double()
    maps[0, 0, :25] = torch.eye(26, dtype=F64)[:25]
    g = torch.Generator().manual_seed(0)
    maps[0, 1:, -1, :25] = torch.rand(3, 25, dtype=F64, generator=g) ** 3
    maps = maps / maps.sum(-1, keepdim=True)
    overlap = {}
    for how in ("mean", "mean-max"):
        found = flow_map(attention_flow([maps], how), torch.tensor([25]), torch.arange(25), grid)[0] > 0.5
        overlap[how] = float((found & block).sum() / (found | block).sum())
    assert overlap["mean-max"] > overlap["mean"] and overlap["mean-max"] == 1


def test_streamed_beside_a_model_it_is_that_of_the_maps():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 40, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0  # left padding
    maps = model(ids, attention_mask=mask, output_attentions=True).attentions
    for kind in (
        dict(heads="mean-max", regulariser="linear"),
        dict(heads="mean"),
        dict(heads=lambda m: m[:, :, -1, 0]),
    ):
        probe = Flow(**kind)
        with attnlib.attach(model, probe) as session:
            for _ in range(2):  # the last call counts
                model(ids, attention_mask=mask)
        got = session.results["flow"]
        exists = mask.bool()[:, :, None]  # rows of padding are whatever the model makes of nothing
        want = attention_flow([m * exists[:, None] for m in maps], **kind)
        if kind["heads"] == "mean":
            rollout = Rollout()
            with attnlib.attach(model, rollout):
                model(ids, attention_mask=mask)
            torch.testing.assert_close(rollout.results(), got)
        torch.testing.assert_close(got * exists, want * exists, atol=2e-6, rtol=1e-5)
        assert got.shape == (2, 12, 12)


def test_it_keeps_one_matrix_whatever_the_depth():
    probe = Flow(heads="mean-max")
    alive = []

    class Site:
        n_queries = n_keys = 8

        def __init__(self, layer):
            self.layer, self.name = layer, str(layer)

    probe._first = "0"
    for layer in range(6):
        probe.probe(Site(layer))
        probe.observe(Site(layer), torch.rand(1, 2, 8, 8), torch.arange(8), None)
        alive.append(sum(t.numel() for t in [*probe._rows, probe._flow] if t is not None))
    assert set(alive[1:]) == {2 * 64 + 64}


def test_generated_tokens_are_refused_where_their_keys_were_read_before():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with attnlib.attach(model, Flow()), pytest.raises(ValueError, match="call the model once on all tokens"):
        model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=3, do_sample=False, pad_token_id=0)


def test_halves_are_multiplied_in_float():
    maps = random_maps(n=16).to(torch.bfloat16)
    assert attention_flow(maps).dtype == torch.float32
    assert mean_max(torch.zeros(1, 2, 0, 0)).shape == (1, 2)


def test_bad_input_is_refused_by_name():
    with pytest.raises(ValueError, match="maps must hold at least one layer"):
        attention_flow([])
    with pytest.raises(ValueError, match=r"maps\[1\] must be \(B, H, N, N\)"):
        attention_flow([torch.rand(1, 1, 3, 3), torch.rand(1, 1, 4, 4)])
    with pytest.raises(ValueError, match=r"maps\[1\] must be \(B, H, N, N\)"):
        attention_flow([torch.rand(1, 1, 3, 3), torch.rand(2, 1, 3, 3)])
    with pytest.raises(TypeError, match="maps must be maps"):
        attention_flow(3)
    with pytest.raises(ValueError, match=r"grid must be \(height, width\), got \(2, 2, 1\)"):
        flow_map(torch.rand(1, 5, 5), torch.tensor([1]), torch.arange(4), (2, 2, 1))
    with pytest.raises(ValueError, match="regulariser"):
        Flow(regulariser="quadratic")
    with pytest.raises(ValueError, match="heads"):
        Flow(heads="max")
    with pytest.raises(ValueError, match="residual"):
        Flow(residual=1.0)
    with pytest.raises(ValueError, match="heads must give weights"):
        attention_flow([torch.rand(1, 2, 3, 3)], heads=lambda m: m[:, :, 0])
    with pytest.raises(ValueError, match="regulariser must give"):
        attention_flow([torch.rand(1, 2, 3, 3)], regulariser=lambda n: torch.ones(2))
    flow = torch.rand(1, 6, 6)
    with pytest.raises(ValueError, match=r"grid=\(2, 2\) has 4 cells, but image names 5"):
        flow_map(flow, torch.tensor([5]), torch.arange(5), (2, 2))
    with pytest.raises(ValueError, match="tokens must name at least one"):
        flow_map(flow, torch.zeros(0, dtype=torch.long), torch.arange(4), (2, 2))
    with pytest.raises(ValueError, match=r"image must lie in 0..5"):
        flow_map(flow, torch.tensor([5]), torch.arange(4) + 4, (2, 2))
