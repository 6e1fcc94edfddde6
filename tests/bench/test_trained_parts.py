"""The trained parts that the repository holds do what docs/diffusion.md says; its figures are those of the results."""

import json
from pathlib import Path

import pytest
import torch

from attnlib.bench.store import fill
from attnlib.bench.studies.diffusion.generators import reconstruction
from attnlib.bench.worlds import judge as judging
from attnlib.bench.worlds import models, painter
from attnlib.bench.worlds.prompts import draw, prompts

pytest.importorskip("diffusers")
ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "examples" / "diffusion" / "weights"
PAGE = ROOT / "docs" / "diffusion.md"


def results(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"diffusion-{name}-cpu.json").read_text(encoding="utf-8"))


def test_pictures_come_through_the_autoencoder_and_the_judge_reads_them():
    found = reconstruction(models.part("vae", WEIGHTS), judging.load(WEIGHTS), 24)
    assert found["psnr"]["mean"] > 28 and found["originals"]["mean"] > 0.9 and found["copies"]["mean"] > 0.75


@torch.no_grad()
def test_clip_finds_the_picture_of_a_caption_and_the_caption_of_a_picture():
    scenes = painter.sample(32, "test")
    ids = models.token_numbers([p.text for p in painter.captions(scenes)])
    out = models.part("clip", WEIGHTS)(input_ids=ids, pixel_values=painter.paint(scenes, "test").images * 2 - 1)
    for logits in (out.logits_per_text, out.logits_per_image):  # by chance 1 of 32
        assert (logits.argmax(1) == torch.arange(32)).float().mean() > 0.6


def test_the_unet_draws_what_is_recognised():
    """It was trained to draw one thing rightly in more than half of its pictures."""
    asked = prompts("one", 6, "dev")
    images = draw(models.pipeline("unet", WEIGHTS), asked, num_inference_steps=12, guidance_scale=4.0)
    said = judging.load(WEIGHTS).judge(images, asked)
    assert sum(v.recognisable for v in said) >= 5 and sum(v.counted for v in said) >= 4
    assert sum(v.right for v in said) >= 2


def test_figures_of_the_page_are_those_of_the_results(diffusion_figures):
    figures = diffusion_figures
    text = PAGE.read_text(encoding="utf-8")
    assert figures.judge_table(results("judge")) in text
    assert figures.generators_table(results("generators")) in text
    assert figures.resolutions_table(results("resolutions")) in text
    held = results("autoencoder")
    psnr, gap = held["reconstruction"]["psnr"], held["reconstruction"]["gap"]
    said = " ".join(text.split())
    assert f"{psnr['mean']:.1f} ± {psnr['half']:.1f} dB" in said
    assert f"{-100 * gap['mean']:.1f} ± {100 * gap['half']:.1f} points fewer" in said
    assert held["bars"]["psnr"]["met"] is (psnr["mean"] >= held["bars"]["psnr"]["bar"])
    assert held["bars"]["gap"]["met"] is (gap["mean"] >= held["bars"]["gap"]["bar"])
    enlarged = json.loads((ROOT / "benchmarks" / "results" / "enlarged-cpu.json").read_text(encoding="utf-8"))
    four, sixteen = (row["sampling_times_as_fast"] for row in enlarged["records"])
    assert f"{four:.2f} times as fast" in said and f"and {sixteen:.2f} times at sixteen" in said
    steps = json.loads((ROOT / "benchmarks" / "results" / "steps-cpu.json").read_text(encoding="utf-8"))
    assert all(f"{row['times as fast']:.2f} times" in said for row in steps["records"] if row["executed"] < 1)
    references = json.loads((ROOT / "benchmarks" / "results" / "references-cpu.json").read_text(encoding="utf-8"))
    for name in ("diffusers", "diffusers, masks"):
        assert f"{references['mip-adapter to'][name]['ratio']:.2f} times" in said


def test_pages_are_filled_between_their_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- one -->\nold\n<!-- end one -->\nb\n", encoding="utf-8")
    fill(page, "one", "new \\1")
    fill(page, "one", "new \\1")
    assert page.read_text(encoding="utf-8") == "a\n<!-- one -->\nnew \\1\n<!-- end one -->\nb\n"
    with pytest.raises(ValueError, match="page.md has no markers for two"):
        fill(page, "two", "")
