"""The study of recall by size of state, as small as it goes."""

import pytest
import torch

from attnlib.bench.studies import recall


@pytest.mark.parametrize("number", recall.PAIRS)
def test_every_key_is_asked_for_once_and_its_value_is_the_one_beside_it(number):
    symbols, values = recall.pairs(5, number, generator=torch.Generator().manual_seed(0))
    half = recall.VOCABULARY // 2
    for row, told in zip(symbols, values, strict=True):
        keys, beside = row[: 2 * number : 2], row[1 : 2 * number : 2]
        assert len(set(keys.tolist())) == number and 1 <= int(keys.min()) and int(keys.max()) < half
        assert half <= int(beside.min()) and int(beside.max()) < recall.VOCABULARY
        known = dict(zip(keys.tolist(), beside.tolist(), strict=True))
        asked = told >= 0
        assert not asked[: 2 * number].any() and sorted(row[asked].tolist()) == sorted(known)
        assert [known[k] for k in row[asked].tolist()] == told[asked].tolist()
        assert not row[2 * number :][~asked[2 * number :]].any()


def test_sequences_are_long_enough():
    with pytest.raises(ValueError, match="length=8 must be at least 3"):
        recall.pairs(1, 4, 8)


def test_states_of_linear_mixers_do_not_grow_and_wider_keys_take_more():
    sizes = {name: recall.build(name).state_size(48) for name in recall.CONTESTANTS}
    longer = {name: recall.build(name).state_size(96) for name in recall.CONTESTANTS}
    assert longer.pop(recall.BASELINE) > sizes[recall.BASELINE] and all(longer[n] == sizes[n] for n in longer)
    based = [sizes[f"Based, keys of {f}"] for f in (1, 2, 4, 8)]
    assert based == sorted(based) and based[0] < based[-1] < sizes[recall.BASELINE]
    assert sizes["window of 8"] < sizes["window of 24"]


def test_no_model_sees_what_comes_after():
    symbols, _ = recall.pairs(2, 4, generator=torch.Generator().manual_seed(0))
    later = symbols.clone()
    later[:, 20:] = 0
    for name in recall.CONTESTANTS:
        torch.manual_seed(0)
        model = recall.build(name).eval()
        torch.testing.assert_close(model(later)[:, :20], model(symbols)[:, :20], atol=1e-5, rtol=1e-5)


def test_the_study_runs(tmp_path):
    names = (recall.BASELINE, "Based, keys of 1", "Based, keys of 4", "window of 8")
    found = recall.measure(pictures=tmp_path, steps=1, batch=2, seeds=(0, 1), tested=4, names=names)
    assert [r["name"] for r in found["rows"]] == list(names) and (tmp_path / "recall-cpu.svg").exists()
    for row in found["rows"]:
        assert 0 <= row[recall.METRIC]["mean"] <= 100 and row["against"]["n"] == 2
