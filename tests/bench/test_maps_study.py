"""The line on ten labelled maps, small: it runs and goes on, and what learns is what each row says."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from attnlib.bench.studies.multimodal_models import maps  # noqa: E402

SMALL = dict(seeds=(0,), part="dev", tests=2, shots=2, steps=1)


def test_the_line_runs_and_goes_on(tmp_path):
    keep = tmp_path / "kept.jsonl"
    names = (maps.MAPSAM, maps.HEADS, maps.NONE)
    found = maps.measure(keep=keep, pictures=tmp_path, names=names, **SMALL)
    assert (tmp_path / "multimodal-models-maps-cpu.svg").exists() and json.dumps(found)
    assert (tmp_path / "multimodal-models-maps-cpu.png").stat().st_size < 60_000
    told = []
    again = maps.measure(keep=keep, progress=told.append, names=names, **SMALL)
    assert not told and again["rows"] == found["rows"]
    rows = {row["name"]: row for row in found["rows"]}
    assert rows[maps.MAPSAM]["against"]["mean"] == 0 and rows[maps.NONE]["parameters"]["mean"] == 0
    assert maps.table(found["rows"]).count("\n") == len(names) + 1


def test_how_many_numbers_of_the_encoder_learn():
    """Ranks of 4 at width 64, of queries and values in three layers; DoRA has a norm per input column besides."""
    counts = {name: maps.learnt(maps.made(name, 0)) for name in maps.LEARNING}
    low = 3 * 2 * 4 * (64 + 64)
    assert counts[maps.LORA] == low and counts[maps.MAPSAM] == low + 3 * 2 * 64 and counts[maps.HEADS] == 0
    assert counts[maps.FULL] > 100_000


@pytest.mark.parametrize("name", maps.LEARNING)
def test_what_is_frozen_stays_and_the_rest_learns(name):
    model = maps.made(name, 0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    data = maps.drawn(0, 2, "dev")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):  # the first update of a low-rank change moves one of its two factors
        optimizer.zero_grad()
        torch.stack(list(model.loss(model(data.images), data.masks).values())).sum().backward()
        optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    encoder = {n for n in moved if "vision_encoder" in n}
    learns = {n for n, p in model.named_parameters() if p.requires_grad and "vision_encoder" in n}
    assert moved <= {n for n, p in model.named_parameters() if p.requires_grad} and bool(encoder) == bool(learns)
    assert any(n.startswith("heads.") for n in moved) and any("mask_decoder" in n for n in moved)
    assert not any("prompt_encoder" in n for n in moved)


def test_an_untrained_change_is_the_encoder_as_it_was():
    x = maps.drawn(0, 2, "dev").images.permute(0, 3, 1, 2)
    with torch.no_grad():
        encoders = [maps.made(name, 0).sam.vision_encoder for name in (maps.HEADS, maps.MAPSAM, maps.LORA)]
        plain, dora, lora = (encoder(x).last_hidden_state for encoder in encoders)
    torch.testing.assert_close(dora, plain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lora, plain, atol=1e-4, rtol=1e-4)


def test_every_map_shows_what_is_asked_for():
    data = maps.drawn(0, 3, "dev")
    assert bool(data.masks.flatten(1).any(1).all()) and not bool(data.masks.flatten(1).all(1).any())
    assert not torch.equal(data.images, maps.drawn(0, 3, "train").images)
