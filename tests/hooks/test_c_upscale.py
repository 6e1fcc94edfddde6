"""Tiled denoisers, and C-Upscale's three priors on them."""

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from doubles import doubles  # noqa: E402

import attnlib  # noqa: E402
from attnlib.hooks import Intervention, Maps  # noqa: E402
from attnlib.steer import AStar, CUpscale, PromptMaps, TiledDenoiser  # noqa: E402
from attnlib.steer.diffusion import c_upscale, tiles  # noqa: E402
from attnlib.steer.diffusion.tiles import Tile  # noqa: E402
from hooks import pipes  # noqa: E402
from hooks.models import Watch  # noqa: E402

PROMPT = "a red circle and a blue square"


@pytest.fixture(scope="module")
def large(folder):
    """Image to image."""
    return pipes.stable_diffusion(folder, "StableDiffusionImg2ImgPipeline")


def again(pipe, size=(24, 32), steps=4, **given):
    picture = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1))
    return pipes.sample(pipe, PROMPT, steps, image=picture, strength=0.5, **given)


# ---- tiles


def test_tiles_cover_and_weights_sum_to_one():
    for sides, tile, stride, offset in (((20, 33), (8, 16), (6, 9), (0, 0)), ((16, 16), (16, 16), (5, 5), (3, 2)),
                                        ((17, 40), (8, 8), (8, 3), (7, 1))):  # fmt: skip
        some = tiles.tiles_of(sides, tile, stride, offset)
        assert all((t.height, t.width) == tile and t.top + tile[0] <= sides[0] for t in some)
        for how in tiles.WEIGHTS:
            picture = torch.randn(2, 3, *sides, dtype=torch.float64)
            parts = torch.stack([t.of(picture) for t in some])
            torch.testing.assert_close(tiles.fuse(parts, some, sides, how), picture, atol=1e-12, rtol=1e-12)
    # The oracle, place by place.
    some = tiles.tiles_of((3, 5), (3, 3), (1, 2))
    parts = torch.randn(len(some), 3, 3, dtype=torch.float64)
    weights, got = tiles.tile_weights((3, 3), "gaussian", parts), tiles.fuse(parts, some, (3, 5))
    for y in range(3):
        for x in range(5):
            at = [(p[y, x - int(t.left)], weights[y, x - int(t.left)]) for p, t in zip(parts, some, strict=True)
                  if t.left <= x < t.left + 3]  # fmt: skip
            assert got[y, x].item() == pytest.approx((sum(p * w for p, w in at) / sum(w for _, w in at)).item())
    assert (weights > 0).all()
    with pytest.raises(ValueError, match="uncovered"):
        tiles.fuse(parts[:1], some[:1], (3, 5))


class Same(Intervention):
    """A denoiser that predicts what it reads."""

    def __init__(self):
        self.seen = []

    def around_denoiser(self, site, inputs, call):
        self.seen.append(tuple(inputs[site.main].shape))
        return inputs[site.main]


@pytest.mark.parametrize("settings", [{}, {"batch": 3, "weights": "even"}, {"jitter": True, "stride": (5, 11)}])
def test_an_identity_in_tiles_is_one(pipe, settings):
    whole, parts = Same(), Same()
    with attnlib.attach(pipe, whole):
        plain = pipes.sample(pipe, steps=2, height=24, width=40)
    with attnlib.attach(pipe, TiledDenoiser(**settings), parts):
        torch.testing.assert_close(pipes.sample(pipe, steps=2, height=24, width=40), plain, atol=1e-5, rtol=1e-5)
    assert {shape[2:] for shape in parts.seen} == {(16, 16)} and len(parts.seen) > 2
    assert {shape[0] for shape in parts.seen} <= {2, 4, 6}


def test_one_tile_is_the_pipeline_and_more_are_not(pipe, folder):
    state, plain = torch.get_rng_state(), pipes.sample(pipe, steps=2)
    with attnlib.attach(pipe, TiledDenoiser()):
        assert torch.equal(pipes.sample(pipe, steps=2), plain)
        with pytest.raises(ValueError, match="a tile of 16 is larger than the picture, 8"):
            pipes.sample(pipe, steps=1, height=8, width=16)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(pipes.sample(pipe, steps=2), plain)

    def both(made):
        return pipes.sample(made, ["a cat", "a dog"], steps=2, height=16, width=32, num_images_per_prompt=2)

    with doubles():
        fine = pipes.stable_diffusion(folder)
        state, wide, outs = torch.get_rng_state(), both(fine), []
        for settings in ({}, {"batch": 4}, {"jitter": True}):
            watch = Watch([0])
            with attnlib.attach(fine, TiledDenoiser(**settings), watch):
                outs.append(both(fine))
    call = watch.calls[0][0]
    assert call.rows == ("uncond",) * 4 + ("cond",) * 4 and call.prompts == (0, 0, 1, 1) * 2
    assert outs[0].dtype == torch.float64
    torch.testing.assert_close(outs[0], outs[1], atol=1e-9, rtol=1e-9)
    assert not torch.equal(outs[0], wide) and not torch.equal(outs[0], outs[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_sdxl_is_told_where_its_tile_lies(tmp_path):
    xl, seen = pipes.sdxl(str(tmp_path)).to(torch.bfloat16), []

    class Ids(Intervention):
        def around_denoiser(self, site, inputs, call):
            seen.append(inputs["added_cond_kwargs"]["time_ids"][:, 2:4].tolist())
            return call(inputs)

    with attnlib.attach(xl, TiledDenoiser(stride=16), Ids()):
        out = pipes.sample(xl, steps=1, height=16, width=32)
    assert out.isfinite().all() and seen == [[[0, 0]] * 2, [[0, 16]] * 2]


# ---- the priors


def test_one_tile_without_priors_is_image_to_image(large):
    plain = again(large, (16, 16))
    with attnlib.attach(large, CUpscale()):
        assert torch.equal(again(large, (16, 16)), plain)
    with attnlib.attach(large, CUpscale(structure=torch.randn(1, 4, 8, 8), weight=(0.0, 0.0))):
        assert torch.equal(again(large, (16, 16)), plain)


@pytest.mark.parametrize(("kind", "plan"), [("epsilon", "DDIMScheduler"), ("v_prediction", "EulerDiscreteScheduler")])
def test_low_frequencies_become_those_of_the_structure(folder, kind, plan):
    """With w = 1 those of the result are the structure's within 1e-5; the others are not touched."""
    changes = dict(clip_sample=False, set_alpha_to_one=True) if plan.startswith("DDIM") else {}
    made = pipes.stable_diffusion(
        folder, "StableDiffusionImg2ImgPipeline", plan=pipes.scheduler(plan, prediction_type=kind, **changes)
    )
    structure = torch.randn(1, 4, 24, 32, generator=torch.Generator().manual_seed(4))
    with attnlib.attach(made, CUpscale(structure, weight=(1.0, 1.0), filter="ideal", stride=8)):
        out = again(made)
    low = [tiles.low_pass(x, 0.25) for x in (out, structure)]
    torch.testing.assert_close(*low, atol=1e-5, rtol=1e-5)
    assert (out - structure).abs().max() > 0.1
    with attnlib.attach(made, CUpscale(structure, weight=(1.0, 0.0), on="latents", stride=8)):
        other = again(made)
    assert other.isfinite().all() and not torch.equal(other, out)


def test_the_low_pass_is_one():
    x = torch.randn(2, 3, 10, 13, dtype=torch.float64)
    once = tiles.low_pass(x, 0.4)
    torch.testing.assert_close(tiles.low_pass(once, 0.4), once)  # a projection
    torch.testing.assert_close(tiles.low_pass(x, 1.0), x)
    truth = torch.fft.fft2(x)
    fy, fx = torch.fft.fftfreq(10).abs() * 2, torch.fft.fftfreq(13).abs() * 2
    truth[..., ((fy[:, None] > 0.4) | (fx > 0.4))] = 0
    torch.testing.assert_close(once, torch.fft.ifft2(truth).real)
    y = torch.randn(1, 3, 10, 13, dtype=torch.float64)
    got = c_upscale.drawn(x, y, 0.3, 0.5, "gaussian")
    torch.testing.assert_close(got - x, 0.3 * tiles.low_pass(y - x, 0.5, "gaussian"))


@pytest.fixture(scope="module")
def maps(pipe):
    probe = PromptMaps()
    with attnlib.attach(pipe, probe):
        pipes.sample(pipe, PROMPT, 2)
    return probe.results()


def test_maps_of_a_small_image_are_its_attention(pipe, maps):
    assert len(maps) == 7 and all(m.shape[0] == 77 and m.amax() == 1 for m in maps.values())
    seen, one = Maps(8, layers=["mid_block*"]), PromptMaps(["mid_block*"])
    with attnlib.attach(pipe, seen, one):
        pipes.sample(pipe, PROMPT, 1)
        truth = seen.take()[1]
    (got,) = one.results().values()
    torch.testing.assert_close(got, truth / truth.amax((1, 2), keepdim=True))
    ramp = torch.arange(8.0).expand(1, 4, 8) / 8
    torch.testing.assert_close(c_upscale.of_tile(ramp, Tile(0, 0.5, 1, 0.5), (4, 4)), ramp[:, :, 4:])


@pytest.mark.parametrize("screen", ["renormalized", "plain"])
def test_words_without_a_map_in_a_tile_are_not_read_there(large, maps, screen):
    """Maps of ones change nothing; a map that is zero on the left leaves the tile on the left without."""
    given = {layer: torch.ones_like(m) for layer, m in maps.items()}
    with attnlib.attach(large, TiledDenoiser()):
        plain = again(large, (16, 32), 2)
    with attnlib.attach(large, CUpscale(maps=given, screen=screen)):
        torch.testing.assert_close(again(large, (16, 32), 2), plain, atol=1e-5, rtol=1e-5)
    for m in given.values():
        m[3, :, : m.shape[2] // 2 + 1] = 0  # one more, since maps are interpolated

    class Weights(Intervention):
        kinds, seen = ("cross",), []

        def on_weights(self, site, weights, rows):
            self.seen.append((weights[..., 3].mean((1, 2)), weights.sum(-1).mean((1, 2))))
            return weights

    watch = Weights()
    watch.seen.clear()
    with attnlib.attach(large, CUpscale(maps=given, screen=screen, stride=16), watch):
        again(large, (16, 32), 2)
    half = len(watch.seen) // 2
    for word, total in watch.seen[:half]:  # the tile on the left
        assert word[0] > 0 and word[1] == 0
        assert (total[1] < 0.9999) == (screen == "plain")
    assert all(word[1] > 0 for word, _ in watch.seen[half:])


def test_captions_are_read_beside_the_prompt(large):
    asked = []

    def caption(tile):
        asked.append(tile)
        return "a dog" if tile.left == 0 else "a green cat"

    with attnlib.attach(large, TiledDenoiser(stride=16)):
        plain = again(large, (16, 32), 2)
    with attnlib.attach(large, CUpscale(captions=caption, share=1.0, stride=16)):
        torch.testing.assert_close(again(large, (16, 32), 2), plain, atol=1e-6, rtol=1e-6)
    assert asked == [Tile(0, 0, 1, 0.5), Tile(0, 0.5, 1, 0.5)]
    outs = []
    for settings in ({}, {"batch": 2}, {"share": torch.full((4, 4), 0.5)}):
        with attnlib.attach(large, CUpscale(captions=caption, stride=16, **settings)):
            outs.append(again(large, (16, 32), 2))
    torch.testing.assert_close(outs[0], outs[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outs[0], outs[2], atol=1e-5, rtol=1e-5)
    assert (outs[0] - plain).abs().max() > 1e-3
    # a = 0: what the pipeline does in each tile under its caption as the prompt, in unconditional rows the same.
    with attnlib.attach(large, CUpscale(captions=lambda tile: PROMPT, share=0.0, stride=16)):
        same = again(large, (16, 32), 2)
    torch.testing.assert_close(same, plain, atol=1e-5, rtol=1e-5)


def test_structure_of_an_image_and_all_priors_at_once(large, maps):
    picture = torch.rand(1, 3, 16, 16)
    structure = CUpscale.encode(large, picture, (24, 32))
    assert structure.shape == (1, 4, 24, 32)
    it = CUpscale(structure, maps, lambda tile: "a dog", jitter=True, stride=8)
    plain = again(large)
    with attnlib.attach(large, it), pytest.raises(RuntimeError, match="in the middle"):
        handle = large.unet.mid_block.register_forward_hook(broken)
        try:
            again(large)
        finally:
            handle.remove()
    assert it.running is None and torch.equal(again(large), plain)
    with attnlib.attach(large, CUpscale(structure, maps, lambda tile: "a dog", jitter=True, stride=8)):
        one, two = again(large, num_images_per_prompt=2), again(large, num_images_per_prompt=2)
    assert torch.equal(one, two) and one.shape == (2, 4, 24, 32) and not torch.equal(one[:1], plain)


def broken(*args):
    raise RuntimeError("in the middle")


@pytest.mark.parametrize(("on", "screen"), [("estimate", "renormalized"), ("latents", "plain")])
def test_all_priors_in_half_precision(folder, on, screen):
    """Maps that a bfloat16 pipeline gave, its structure, and captions; two images, a batch of tiles."""
    small = pipes.stable_diffusion(folder).to(torch.bfloat16)
    with attnlib.attach(small, probe := PromptMaps()):
        pipes.sample(small, PROMPT, 1)
    half = pipes.stable_diffusion(folder, "StableDiffusionImg2ImgPipeline").to(torch.bfloat16)
    structure = CUpscale.encode(half, torch.rand(1, 3, 16, 16), (24, 32))
    it = CUpscale(structure, probe, lambda tile: "a dog", on=on, screen=screen, batch=2, share=torch.full((4, 4), 0.5))
    plain = again(half, steps=2, num_images_per_prompt=2)
    with attnlib.attach(half, it):
        out = again(half, steps=2, num_images_per_prompt=2)
    assert structure.dtype == out.dtype == torch.bfloat16 and out.shape == (2, 4, 24, 32)
    assert out.isfinite().all() and not torch.equal(out, plain)


def test_bad_input(large, pipe, maps):
    sd3, given = pipes.sd3()
    with attnlib.attach(sd3, CUpscale(torch.randn(1, 4, 8, 8), tile=8)), pytest.raises(ValueError, match="of a flow"):
        pipes.sample(sd3, None, 1, **given)
    with attnlib.attach(large, CUpscale(maps={1: maps[1]})), pytest.raises(ValueError, match="maps are of layers"):
        again(large, (16, 16), 2)
    with attnlib.attach(large, CUpscale(captions=lambda tile: 3)), pytest.raises(TypeError, match="must give a text"):
        again(large, (16, 16), 2)
    with pytest.raises(ValueError, match="attach to the pipeline"):
        attnlib.attach(pipe.unet, CUpscale())
    with pytest.raises(ValueError, match="on parts of a picture"):
        attnlib.attach(pipe, TiledDenoiser(), CUpscale())
    with pytest.raises(ValueError, match="tiles take several"):
        attnlib.attach(pipe, TiledDenoiser(), AStar(("circle", "square"), resolution=8))
    with pytest.raises(ValueError, match="maps are empty"):
        CUpscale(maps=PromptMaps())
    for bad in ({"structure": torch.ones(4, 8, 8)}, {"maps": {1: torch.ones(8, 8)}}, {"share": torch.ones(3)}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}.* must have shape"):
            CUpscale(**bad)
    with pytest.raises(ValueError, match="parts must be of the size of Tile"):
        tiles.fuse(torch.ones(2, 1, 3, 3), tiles.tiles_of((4, 6), (4, 4), (2, 2)), (4, 6))
    for bad in ({"filter": "box"}, {"weight": (1.0,)}, {"cutoff": 0.0}, {"on": "noise"}, {"share": 2.0}, {"stride": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            CUpscale(**bad)
