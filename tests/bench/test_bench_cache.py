"""The bench of compressed caches measures what it says."""

import json

import pytest

pytest.importorskip("transformers")

from attnlib.bench import suites  # noqa: E402
from attnlib.bench.speed import cache  # noqa: E402

SMALL = dict(steps=2, layers=2, heads=2, kv_heads=1, head_dim=8, rounds=2)


def test_records_and_settings():
    result = cache.measure_decoding(96, (0.25, 0.5), **SMALL)
    assert [r["contender"] for r in result["records"]] == ["whole cache", "attnlib, ratio 0.25", "attnlib, ratio 0.5"]
    assert [r["keys"] for r in result["records"]] == [96, 72, 48]
    assert result["records"][0]["speedup"] == 1 and result["settings"]["prompt"] == 96
    # Keys and values of 98 tokens, one head of width 8, two layers; the others: positions, and room for more tokens.
    assert result["records"][0]["cache_bytes"] == 2 * 98 * 8 * 4 * 2
    for r in result["records"][1:]:
        held = r["keys"] + SMALL["steps"]
        assert r["cache_bytes"] >= 2 * held * (2 * 8 * 4 + 8)
        assert r["cache_bytes"] <= 2 * ((held + 16 + held // 16) * 2 * 8 * 4 + held * 8)
        assert r["step_seconds"] > 0 and r["prefill_seconds"] > 0


def test_split_decoding_beside_sdpa():
    (one,) = cache.measure_split((32,), (0.5,), batch=3, heads=2, kv_heads=1, head_dim=8, rounds=1)
    assert one["keys"] == 16 + 24 + 32 and one["shortest"] == 16 and one["speedup"] > 0


def test_what_is_held_about_kvpress_stays(tmp_path, monkeypatch):
    target = tmp_path / "cache-cpu.json"
    target.write_text(json.dumps({"kvpress": {"records": ["of another day"]}}))
    monkeypatch.setattr(cache, "measure_decoding", lambda **settings: {"records": []})
    monkeypatch.setattr(cache, "measure_split", list)
    cache.main([str(target)])
    assert json.loads(target.read_text())["kvpress"] == {"records": ["of another day"]}


def test_a_folder_without_kvpress(tmp_path):
    with pytest.raises(ValueError, match="give a checkout's folder"):
        cache.measure_decoding(96, (0.5,), kvpress=tmp_path, **SMALL)


def test_it_is_a_suite():
    assert "cache" in suites()
