"""The study of heavy entries, as small as it goes."""

import pytest
import torch

from attnlib.bench.studies import heavy


def world(causal: bool, n: int = 64) -> heavy.World:
    q, k, v = torch.randn(3, 1, 2, n, 8, generator=torch.Generator().manual_seed(1))
    return heavy.World(q, k, v, torch.zeros(1, 2, 1, 8), causal, 8**-0.5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", heavy.READS)
def test_as_many_keys_are_read_and_none_that_come_later(name, causal):
    given, directions = world(causal), torch.randn(8, heavy.DIRECTIONS, generator=torch.Generator().manual_seed(2))
    counts = heavy.read_by_hash(given, 16, directions).sum(-1)
    read = heavy.READS[name](given, counts, 16, directions, 0)
    assert read.shape == given.weights.shape
    if causal:
        assert not read.triu(1 + 32).any() and read.diagonal(32, -2, -1).float().mean() > 0.1
    if name not in ("blocks by rank, as released", "blocks by hash, keys centered", heavy.SAMPLED):
        assert torch.equal(read.sum(-1), counts)


def test_windows_hold_the_nearest_keys_and_the_first_ones():
    given, counts = world(True), torch.full((1, 2, 32), 10)
    near, both = heavy._near(given, counts), heavy._near(given, counts, heavy.FIRST)
    assert near[0, 0, 8].nonzero().flatten().tolist() == list(range(31, 41))
    assert both[0, 1, 8].nonzero().flatten().tolist() == [0, 1, 2, 3, *range(35, 41)]


def test_nothing_has_more_recall_than_the_largest_weights_and_hashes_find_what_was_planted():
    rows = {name: heavy.numbers([heavy.planted(0, 128, 2)], name, 0, (16, 32)) for name in heavy.READS}
    most = rows.pop("largest weights, the most there is")
    for row in rows.values():
        assert row["recall at blocks of 16"] <= most["recall at blocks of 16"] + 1e-3
    assert rows[heavy.HASH]["recall at blocks of 16"] > rows["random keys (sampling)"]["recall at blocks of 16"] + 5


def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_what_is_captured_is_what_the_model_attends_by():
    net = llama()
    windows = [torch.randint(64, (1, 24), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    rows = heavy.trained(net, windows, (1,))
    net.set_attn_implementation("eager")
    for (world,), ids in zip(rows, windows[1:], strict=True):
        exact = net(input_ids=ids, output_attentions=True).attentions[1]
        torch.testing.assert_close(world.weights, exact[:, :, 12:])
        assert world.k.shape == (1, 4, 24, 8) and torch.equal(world.mean, rows[0][0].mean)


def test_the_study_runs(tmp_path):
    net = llama()

    def tokenizer(text, **_):
        return {"input_ids": [ord(c) % 64 for c in text[:600]]}

    names = (heavy.HASH, heavy.WINDOW)
    found = heavy.measure(
        pictures=tmp_path, n=64, layers=(0, 1), seeds=(0, 1), names=names, blocks=(16, 32), model=(net, tokenizer)
    )
    assert set(found["worlds"]) == {"planted pairs", "trained maps"} and len(list(tmp_path.glob("heavy-*.svg"))) == 2
    for rows in found["worlds"].values():
        assert [r["name"] for r in rows["rows"]] == list(names) and rows["rows"][0]["against"]["n"] == 2
        assert rows["rows"][0]["keys at blocks of 32"]["mean"] == rows["rows"][1]["keys at blocks of 32"]["mean"]
