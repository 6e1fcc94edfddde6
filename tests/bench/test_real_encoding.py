"""The line of evidence on encoding models, on features that are no network's."""

import json

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from attnlib.bench.studies.real import encoding  # noqa: E402
from attnlib.look.encoding import Fold, noise_ceiling, pearson  # noqa: E402


def see(pixels):
    """Colours of patches, their squares and differences."""
    small = F.adaptive_avg_pool2d(pixels, 8).permute(0, 2, 3, 1)
    return torch.cat([small, small.square(), small.roll(1, -1) * small, small.amax(-1, keepdim=True)], -1)


def read(captions):
    distinct = sorted({w for c in captions for w in c.split()})
    return torch.stack([torch.tensor([float(w in c.split()) for w in distinct]) for c in captions])


def test_sources_are_the_cells_that_areas_answer_to():
    seen = encoding.scenes(see, 30, 0, 6)
    assert seen.patches.shape == (30, 8, 8, 6) and float(seen.patches.std()) == pytest.approx(1, abs=1e-4)
    assert all(len(set(row)) == 4 for row in seen.cells.tolist())
    whole = seen.patches.unflatten(1, (4, 2)).unflatten(3, (4, 2)).mean((2, 4)).flatten(1, 2)
    for i, row in enumerate(seen.cells.tolist()):
        assert torch.allclose(encoding.at_cells(seen.patches, seen.cells)[i], whole[i, row], atol=1e-5)
    routed, fixed = (encoding.answers(seen, w, 0) for w in encoding.WORLDS)
    assert torch.allclose(routed.signal.std(0), torch.ones(32), atol=1e-4) and routed.repeats.shape == (3, 30, 32)
    assert not torch.allclose(routed.signal, fixed.signal)
    assert torch.equal(encoding.answers(seen, "fixed", 0).repeats, fixed.repeats)


def test_captions_agree_where_it_says_so():
    seen = encoding.scenes(see, 200, 0, 6)
    texts = []

    def kept(captions):
        texts.extend(captions)
        return read(captions)

    made = encoding.events(seen, kept, 0)
    assert len(texts) == 20 and made.words.shape[0] == 200 and 0.3 < float(made.agree.mean()) < 0.7
    y = encoding.site_responses(made, seen.patches.mean((1, 2)), 0, noise=0.0).unflatten(1, (-1, encoding.BINS))
    r = pearson(y[..., 0], made.agree[:, None].expand(-1, y.shape[1])).abs()
    assert r[: encoding.SITES].min() > 0.5 and r[encoding.SITES :].max() < 0.35
    assert torch.allclose(y.std(0), torch.ones(()), atol=0.01)


def test_the_whole_line(tmp_path):
    call = dict(
        keep=tmp_path / "kept.jsonl", pictures=tmp_path, seeds=(0, 1), see=see, read=read, count=120, width=8,
        epochs=2, rows=2, steps=5,
    )  # fmt: skip
    found = encoding.measure(**call)
    json.dumps(found)
    assert [row["name"] for row in found["routed"]] == [f"{how}: routed" for how in encoding.READOUTS]
    by_name = {row["name"]: row["share of the ceiling"]["mean"] for w in encoding.WORLDS for row in found[w]}
    assert by_name["true cell: routed"] > max(by_name["ridge, mean patch: routed"], 0.8)
    assert {k for k in found["sites"][0] if "concat" in k} == {
        f"{t}, concat: {k}" for t in ("resamples", "bins") for k in ("planted", "absent")
    }
    assert (tmp_path / "real-encoding-cpu.svg").exists() and (tmp_path / "real-encoding-sites-cpu.svg").exists()
    lines = (tmp_path / "kept.jsonl").read_text()
    assert encoding.measure(**call)["routed"] == found["routed"]
    assert (tmp_path / "kept.jsonl").read_text() == lines  # nothing was run twice
    seen = encoding.scenes(see, 120, 0, 8)
    told = encoding.answers(seen, "fixed", 0)
    split = Fold(torch.arange(80), torch.arange(80, 100), torch.arange(100, 120))
    one = encoding.read_out("true cell", seen, told, split, 0, 1)
    assert one["share of the ceiling"] == pytest.approx(one["r"] / float(noise_ceiling(told.repeats).mean()), rel=0.1)
