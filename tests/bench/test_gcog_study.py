"""The study of gCOG's models, as small as it goes."""

from attnlib.bench.studies import gcog


def test_the_study_runs(tmp_path):
    names = (gcog.BASELINE, "cross")
    found = gcog.measure(
        pictures=tmp_path,
        keep=tmp_path / "kept",
        steps=1,
        batch=2,
        dim=8,
        count=12,
        tested=12,
        seeds=(0, 1),
        names=names,
    )
    assert [r["name"] for r in found["rows"]] == list(names) and (tmp_path / "gcog-cpu.svg").exists()
    for row in found["rows"]:
        assert 0 <= row[gcog.METRIC]["mean"] <= 100 and row["against"]["n"] == 2
        assert set(gcog.TESTS) < set(row)
    assert len(gcog.asked("train", 40, 0, (0, 5)).answer) < 30  # sums and products are left out
