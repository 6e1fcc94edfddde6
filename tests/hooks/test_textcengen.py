"""TextCenGen: the authors' function from a fixture, forces with clear signs, metrics, and whole pipelines."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import attnlib  # noqa: E402
from attnlib.hooks import Maps  # noqa: E402
from attnlib.steer import TextCenGen  # noqa: E402
from attnlib.steer.diffusion.maps import soft_threshold  # noqa: E402
from attnlib.steer.diffusion.textcengen import (  # noqa: E402
    centroid,
    conflicts,
    forces,
    free_region,
    saliency,
    shifted,
    variation,
    vtcm,
)
from hooks import pipes  # noqa: E402

RECORDED = load_file(Path(__file__).parent.parent / "fixtures" / "textcengen.safetensors")
PROMPT, BOX = "a red circle and a blue square", (0.25, 0.25, 0.75, 0.75)
Y, X = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")


def blob(y, x, s=1.5):
    return torch.exp(-((Y - y) ** 2 + (X - x) ** 2) / (2 * s * s))


def tokens_of(*blobs):
    """(2 heads, L, 16, 16)."""
    return torch.stack([torch.stack(blobs), 0.5 * torch.stack(blobs)])


@pytest.fixture(scope="module")
def pipe(folder):
    return pipes.stable_diffusion(folder, model=pipes.unet(size=8))


def editor(**changes):
    return TextCenGen(**{**dict(region=BOX, theta=0.05, sharpness=10.0), **changes})


# ---- the authors' function


def test_released_maps_are_the_authors():
    maps = RECORDED["maps"].transpose(1, 2).unflatten(2, (8, 8))
    for case, clamp, theta, xi in (("whole", 1.0, 0.25, 14.0), ("gentle", 0.2, 0.4, 0.15)):
        got = free_region(maps, RECORDED["region"], range(5), clamp=clamp, theta=theta, repulsion=xi, compat="authors")
        torch.testing.assert_close(got.flatten(2).transpose(1, 2), RECORDED[case], atol=1e-6, rtol=1e-5)
        ours = free_region(maps, RECORDED["region"], range(5), clamp=clamp, theta=theta, repulsion=xi)
        assert (ours - got).abs().max() > 1e-3
    soft = soft_threshold(maps.mean(0), 0.5, 1.0)
    torch.testing.assert_close(soft, RECORDED["soft"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(centroid(soft), RECORDED["centroid"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(centroid(RECORDED["region"]), RECORDED["centre"][0], atol=1e-5, rtol=1e-5)
    assert torch.equal(conflicts(soft, RECORDED["region"], 0.25), RECORDED["conflict"].bool())
    # Walls push outwards in theirs.
    walls = forces(RECORDED["centroid"], RECORDED["centre"][0], (8, 8), 0.0, 0.4, 0.0)
    torch.testing.assert_close(walls, -RECORDED["margin"], atol=1e-5, rtol=1e-5)


# ---- the paper's signs


def test_forces_push_away_from_the_region_and_the_walls():
    centre, size = torch.tensor([8.0, 8.0]), (16, 16)
    places = torch.tensor([[8.0, 11.0], [5.0, 8.0], [1.0, 8.0], [8.0, 8.0]], dtype=torch.float64)
    away = forces(places, centre.double(), size, 0.5, 0.0, 0.0)
    expected = torch.tensor([[0.0, 0.25 / 3], [-0.25 / 3, 0.0], [-0.25 / 7, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(away[:3], expected, atol=1e-9, rtol=1e-9)
    assert away[3, 0] < 0 and away[3, 1] == 0  # on the centre: up
    walls = forces(places, centre.double(), size, 0.0, 0.4, 0.0)
    by_hand = torch.tensor([0.4 / 64 - 0.4 / 64, 0.4 / 121 - 0.4 / 25], dtype=torch.float64)
    torch.testing.assert_close(walls[0], by_hand, atol=1e-9, rtol=1e-9)
    assert walls[2, 0] > 0  # near the top: down
    assert forces(places, centre.double(), size, 50.0, 9.0, 0.3).abs().max() <= 0.6


def test_what_lies_in_the_region_leaves_it_and_stays_in_the_picture():
    region = torch.zeros(16, 16)
    region[5:11, 5:11] = 1
    maps = tokens_of(torch.ones(16, 16), blob(7, 9), blob(2, 2), blob(8, 8))
    before = maps.clone()
    got = free_region(maps, region, [1, 2, 3], sharpness=10.0, repulsion=1.0)
    assert torch.equal(maps, before)
    centre = centroid(region)
    for token in (1, 3):
        start, end = centroid(before[0, token]), centroid(got[0, token])
        assert (end - centre).norm() > (start - centre).norm() + 1
        assert (got[0, token] * region).sum() < 0.75 * (before[0, token] * region).sum()
        assert bool((end >= 0).all()) and bool((end <= 15).all())
        torch.testing.assert_close(got[1, token], 0.5 * got[0, token])  # every head its own map
    for token in (0, 2):  # not named, and not in the region
        assert torch.equal(got[:, token], before[:, token])
    # However strong, what is seen as the word stays in the frame.
    far = free_region(maps, region, [1], sharpness=10.0, repulsion=50.0, damping=1.0)
    assert far[0, 1].sum() > 0.2 * before[0, 1].sum()
    assert free_region(maps, region, [2], sharpness=10.0) is maps
    still = free_region(maps, region, [1], sharpness=10.0, repulsion=0.0, margin=0.0, damping=1.0)
    torch.testing.assert_close(still, before, atol=1e-5, rtol=1e-5)


def test_shifts_are_whole_places():
    maps = torch.randn(2, 3, 5, 6)
    got = shifted(maps, torch.tensor([[1.0, 0.0], [0.0, -2.0]]))
    torch.testing.assert_close(got[0, :, 1:], maps[0, :, :-1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[1, :, :, :-2], maps[1, :, :, 2:], atol=1e-5, rtol=1e-5)
    assert got[0, :, 0].abs().max() < 1e-5 and got[1, :, :, -2:].abs().max() < 1e-5


# ---- metrics


def test_saliency_is_the_spectral_residual():
    torch.manual_seed(0)
    image = 0.5 + 0.05 * torch.rand(1, 3, 64, 64)
    image[:, :, 20:28, 40:50] = 1.0
    got = saliency(image)[0].numpy()
    grey = (image[0].numpy() * np.array([0.299, 0.587, 0.114])[:, None, None]).sum(0).astype(np.float64) * 255
    spectrum = np.fft.fft2(grey)
    logs = np.log(np.abs(spectrum))
    padded = np.pad(logs, 1, mode="reflect")
    mean = sum(padded[i : i + 64, j : j + 64] for i in range(3) for j in range(3)) / 9
    back = np.abs(np.fft.ifft2(np.exp(logs - mean) * np.exp(1j * np.angle(spectrum))))
    k = np.exp(-((np.arange(5) - 2.0) ** 2) / 128)
    k = np.outer(k, k) / k.sum() ** 2
    padded = np.pad(back, 2, mode="reflect")
    blurred = sum(k[i, j] * padded[i : i + 64, j : j + 64] for i in range(5) for j in range(5)) ** 2
    np.testing.assert_allclose(got, blurred / blurred.max(), atol=1e-5)
    assert got[18:30, 38:52].mean() > 5 * got[40:60, 5:25].mean()
    assert saliency(torch.rand(2, 3, 40, 90)).shape == (2, 40, 90)


def test_variation_and_the_metric_of_both():
    image = torch.zeros(1, 3, 8, 8)
    image[..., ::2] = 1.0
    # Of 4 x 4 pixels, 12 neighbours to the right differ by 255 and none below.
    torch.testing.assert_close(variation(image, (0, 0, 4, 4)), torch.tensor([12 * 255 / 16.0]))
    assert variation(torch.ones(1, 3, 8, 8), (2, 2, 6, 6)) == 0
    with pytest.raises(ValueError, match="at least 2 x 2 pixels"):
        variation(image, (0, 0, 1, 4))
    c, s, v = torch.tensor(0.3), torch.tensor(0.1), torch.tensor(4.0)
    torch.testing.assert_close(vtcm(c, s, v), torch.tensor(0.3 * 10.25))
    torch.testing.assert_close(vtcm(c, s, v, "product"), torch.tensor(0.75))
    with pytest.raises(ValueError, match="form="):
        vtcm(c, s, v, "mean")


# ---- whole pipelines


@pytest.mark.parametrize("compat", [None, "authors"])
def test_a_pipelines_maps_are_those_of_the_function(compat, pipe):
    """Conditional rows only, all words of the prompt; the release takes both halves and misses the last word."""
    seen = []

    class Look(attnlib.hooks.Probe):
        kinds = ("cross",)

        def probe(self, site):
            return (torch.arange(site.n_queries), None) if site.layer == 1 else None

        def observe(self, site, weights, rows, allowed):
            seen.append(weights)

    settings = dict(theta=0.05, sharpness=10.0, repulsion=14.0, margin=0.4, clamp=1.0, damping=0.75)
    state = torch.get_rng_state()
    for it in ((), (editor(compat=compat),)):
        with attnlib.attach(pipe, *it, Look()):
            pipes.sample(pipe, PROMPT, steps=1, num_images_per_prompt=2)
    assert torch.equal(torch.get_rng_state(), state)
    plain, got = (w.transpose(2, 3).unflatten(3, (8, 8)) for w in seen)
    region = torch.zeros(8, 8)
    region[2:6, 2:6] = 1
    last = len(pipe.tokenizer(PROMPT).input_ids) - 2
    changed = False
    for n in range(2):
        if compat is None:
            truth = free_region(plain[2 + n], region, range(1, last + 1), **settings)
            torch.testing.assert_close(got[2 + n], truth, atol=1e-6, rtol=1e-5)
            assert torch.equal(got[n], plain[n])
            changed = changed or not torch.equal(got[2 + n], plain[2 + n])
        else:
            both = torch.cat([plain[n], plain[2 + n]])
            truth = free_region(both, region, range(last), **settings, compat="authors")
            torch.testing.assert_close(torch.cat([got[n], got[2 + n]]), truth, atol=1e-6, rtol=1e-5)
            assert torch.equal(got[2 + n][:, last], plain[2 + n][:, last])
            changed = changed or not torch.equal(got[n], plain[n])
    assert changed


def test_no_conflict_is_the_pipeline(pipe):
    plain = pipes.sample(pipe, PROMPT, steps=2)
    for it in (editor(theta=2.0), editor(steps=[7]), editor(words=[[70]], theta=2.0)):
        with attnlib.attach(pipe, it):
            assert torch.equal(pipes.sample(pipe, PROMPT, steps=2), plain)
    with attnlib.attach(pipe, editor(steps=0)) as session:
        assert not session.attached and torch.equal(pipes.sample(pipe, PROMPT, steps=2), plain)
    with attnlib.attach(pipe, editor()):
        assert not torch.equal(pipes.sample(pipe, PROMPT, steps=2), plain)
    assert torch.equal(pipes.sample(pipe, PROMPT, steps=2), plain)


def test_the_words_look_less_into_the_region(pipe):
    """What reaches the region, mean over layers, falls for the prompt's words."""
    region, found = torch.zeros(8, 8), []
    region[2:6, 2:6] = 1
    for it in ((), (editor(),)):
        maps = Maps(8)
        with attnlib.attach(pipe, *it, maps):
            pipes.sample(pipe, PROMPT, steps=1)
            found.append((maps.take()[1, 1:8] * region).sum())
    assert found[1] < 0.9 * found[0]


def test_prompts_regions_and_words_of_their_own(pipe):
    noise, other = torch.randn(2, 4, 8, 8), (0.0, 0.0, 0.5, 1.0)
    with attnlib.attach(pipe, editor(region=[BOX, other], words=[["circle"], ["cat"]])):
        both = pipes.sample(pipe, [PROMPT, "a cat"], steps=2, latents=noise)
    for n, (prompt, region, word) in enumerate(((PROMPT, BOX, "circle"), ("a cat", other, "cat"))):
        with attnlib.attach(pipe, editor(region=region, words=[word])):
            alone = pipes.sample(pipe, prompt, steps=2, latents=noise[n : n + 1])
        torch.testing.assert_close(both[n : n + 1], alone, atol=1e-4, rtol=1e-4)


def test_sdxl_other_schedulers_sizes_and_half_precision(tmp_path):
    xl = pipes.sdxl(str(tmp_path))
    euler = pipes.stable_diffusion(
        str(tmp_path), model=pipes.unet(size=8), plan=pipes.scheduler("EulerDiscreteScheduler")
    )
    half = pipes.stable_diffusion(str(tmp_path), model=pipes.unet(size=8)).to(torch.bfloat16)
    for pipe, given in ((xl, dict(height=16, width=16)), (euler, dict(height=8, width=16)), (half, {})):
        plain = pipes.sample(pipe, PROMPT, steps=1, **given)
        mask = torch.zeros(4, 4)
        mask[1:3, 1:3] = 1
        with attnlib.attach(pipe, editor(region=mask, theta=0.0)):
            got = pipes.sample(pipe, PROMPT, steps=1, **given)
        assert got.isfinite().all() and got.dtype == plain.dtype and not torch.equal(got, plain)


def test_an_exception_in_mid_step_leaves_the_pipeline(pipe):
    plain = pipes.sample(pipe, PROMPT, steps=1)

    class Fails(TextCenGen):
        def _tokens(self):
            raise RuntimeError("in mid-step")

    with attnlib.attach(pipe, Fails(BOX)), pytest.raises(RuntimeError, match="in mid-step"):
        pipes.sample(pipe, PROMPT, steps=1)
    assert torch.equal(pipes.sample(pipe, PROMPT, steps=1), plain)


def test_bad_input(pipe):
    def fails(it, match, prompt=PROMPT, **given):
        with attnlib.attach(pipe, it), pytest.raises(ValueError, match=match):
            pipes.sample(pipe, prompt, steps=1, **given)

    fails(editor(words=["frog"]), "'frog' is not in the prompt")
    fails(editor(words=["dog"]), "beyond the 77 tokens", prompt="a circle " + "in " * 80 + "of a dog")
    fails(editor(region=[BOX, BOX, BOX]), "3 regions, and there are 1 prompts")
    text = torch.randn(1, 77, 16)
    fails(editor(), "pipeline no prompt", prompt=None, prompt_embeds=text, negative_prompt_embeds=text)
    for region in (torch.zeros(4, 4), torch.ones(4, 4), (0.5, 0.5, 0.5, 0.9), (0, 0, 1, 1)):
        with pytest.raises(ValueError, match="it is empty, or all of it"):
            TextCenGen(region)
    with pytest.raises(ValueError, match="region must be"):
        TextCenGen((0.0, 0.0, 1.5, 1.0))
    for region in ((0.0, 0.0, 1.0), [(0.0, 0.0, 0.5, 0.5), 3]):
        with pytest.raises(ValueError, match="region must be"):
            TextCenGen(region)
    with pytest.raises(ValueError, match="an empty list"):
        TextCenGen([])
    with pytest.raises(ValueError, match=r"tokens\[0\] must be"):
        free_region(torch.zeros(1, 3, 2, 2), torch.eye(2), [9])
    for box in ((0, 3), (-4, 0, 4, 4), (0, 0, 9, 4), (0, 0, 1, 4)):
        with pytest.raises(ValueError, match="box must be"):
            variation(torch.zeros(1, 3, 8, 8), box)
    with pytest.raises(ValueError, match="mask \\(h, w\\)"):
        TextCenGen(torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="attach to the pipeline"):
        attnlib.attach(pipe.unet, editor())
    with pytest.raises(ValueError, match="acts on cross attention, but nothing of this model fits"):
        attnlib.attach(pipes.dit(), editor())
    with pytest.raises(ValueError, match="damping must"):
        TextCenGen(BOX, damping=1.5)
