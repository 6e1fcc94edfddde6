"""Whether maps point at the evidence: the pieces by hand, the study on a few scenes."""

import pytest
import torch

pytest.importorskip("transformers")
from attnlib.bench.data import scenes  # noqa: E402
from attnlib.bench.studies import attribution  # noqa: E402


def test_cells_and_painting():
    patch = torch.arange(64).view(8, 8)
    cells = attribution.cell_of(patch)
    assert cells[0, :4].tolist() == [0, 0, 1, 1] and cells[2].tolist() == [4, 4, 5, 5, 6, 6, 7, 7]
    asked = attribution.Asked(torch.zeros(1, 2), torch.zeros(1), torch.rand(1, 3, 64, 64), torch.zeros(1))
    maps = torch.zeros(1, 8, 8)
    maps[0, 1, 2] = 1
    changed = attribution.painted(asked, maps, 1) != asked.pixels
    assert changed[0, 0].nonzero().amin(0).tolist() == [8, 16] and int(changed[0, 0].sum()) == 64


def test_questions_are_about_one_thing_that_is_there():
    _, tokenizer = scenes.load_model()
    count = 0
    for asked in attribution.questions(tokenizer, 0, 16):
        count += len(asked.ids)
        for pixels, cell in zip(asked.pixels, asked.cells.tolist(), strict=True):
            row, column = cell // 4 * 16, cell % 4 * 16
            inside = pixels[:, row : row + 16, column : column + 16]
            assert inside.std() > 0.12  # noise alone has less
    assert count >= 12


def test_study_on_a_few_scenes(tmp_path):
    names = ["random", "relevance, attention constant", "NormGrad, tower"]
    found = attribution.measure(
        seeds=(0, 1), count=8, steps=2, names=names, keep=tmp_path / "kept.jsonl", pictures=tmp_path
    )
    assert [r["name"] for r in found["rows"]] == names and (tmp_path / "attribution-cpu.svg").is_file()
    assert all(0 <= r["pointing"]["mean"] <= 100 for r in found["rows"])
    again = attribution.measure(seeds=(0, 1), count=8, steps=2, names=names[:1], keep=tmp_path / "kept.jsonl")
    assert again["runs"] == [r for r in found["runs"] if r["name"] == "random"]
