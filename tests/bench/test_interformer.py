"""The cost of a click, as small as it goes."""

from attnlib.bench.studies import interformer


def test_the_study_runs():
    small = dict(embed_dim=16, depth=1, num_heads=2, dims=(8, 8, 16, 16), imsa_heads=(1, 1, 2, 2), width=8, img_size=64)
    said = []
    found = interformer.measure(said.append, models=("interformer_light",), side=64, repeats=1, **small)
    row = found["models"]["interformer_light"]
    assert row["share"] == row["click_seconds"] / row["encode_seconds"] and len(said) == 1
    assert row["without_cache"] == 1 + 1 / row["share"] and row["parameters"] > 0
