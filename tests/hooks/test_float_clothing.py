"""FloAt: maps of a frame blended with those of the frame before, carried along by the flow."""

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import attnlib  # noqa: E402
from attnlib.hooks import Intervention  # noqa: E402
from attnlib.steer import FlowAttention  # noqa: E402
from attnlib.steer.diffusion.float_clothing import flow_on_grid, warp_maps  # noqa: E402
from hooks import pipes  # noqa: E402

GRID = (3, 4)


def maps(*shape, seed=0):
    n = GRID[0] * GRID[1]
    return torch.randn(*shape, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(-1)


def oracle(before, flow, over, border):
    """The warp, entry by entry: W[p] = sum over corners of the place that p came from."""
    h, w = GRID
    n = h * w
    s = torch.zeros(n, n, dtype=torch.float64)
    for row in range(h):
        for column in range(w):
            x, y = column + flow[0, row, column].item(), row + flow[1, row, column].item()
            for r in (int(y // 1), int(y // 1) + 1):
                for c in (int(x // 1), int(x // 1) + 1):
                    weight = max(0, 1 - abs(x - c)) * max(0, 1 - abs(y - r))
                    if border == "zeros" and not (0 <= r < h and 0 <= c < w):
                        continue
                    at = (r % h, c % w) if border == "circular" else (min(max(r, 0), h - 1), min(max(c, 0), w - 1))
                    s[row * w + column, at[0] * w + at[1]] += weight
    return s @ before if over == "queries" else s @ before @ s.T


@pytest.mark.parametrize("border", ["zeros", "edge", "circular"])
@pytest.mark.parametrize("over", ["queries", "both"])
def test_the_warp_is_bilinear_in_queries_and_keys(over, border):
    flow = 3 * torch.randn(2, *GRID, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = warp_maps(maps(2, 3), flow, over, border)
    torch.testing.assert_close(got, oracle(maps(2, 3), flow, over, border), rtol=0, atol=1e-12)


def test_no_flow_is_the_identity_and_whole_steps_permute():
    still = torch.zeros(2, *GRID, dtype=torch.float64)
    assert torch.equal(warp_maps(maps(2), still, "both"), maps(2))
    whole = still + torch.tensor([1.0, 2.0])[:, None, None]
    places = torch.arange(12).view(GRID).roll((-2, -1), (0, 1)).flatten()  # one to the right, two down
    assert torch.equal(warp_maps(maps(2), whole, "queries", "circular"), maps(2)[:, places])
    assert torch.equal(warp_maps(maps(2), whole, "both", "circular"), maps(2)[:, places][:, :, places])


def test_flow_on_other_grids_keeps_where_it_leads():
    flow = torch.tensor([8.0, 4.0])[:, None, None].expand(2, 16, 32)
    assert flow_on_grid(flow, (4, 8))[:, 1, 1].tolist() == [2.0, 1.0]
    assert flow_on_grid(flow, (32, 32))[:, 0, 0].tolist() == [8.0, 8.0]


class See(Intervention):
    """Keeps the maps that pass."""

    kinds = ("self",)
    whole_map = True

    def __init__(self):
        self.seen = []

    def on_weights(self, site, weights, rows):
        self.seen.append(weights.clone())
        return weights


FLOW = 6 * torch.randn(2, 2, 16, 16, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("source", ["raw", "blended"])
def test_frames_of_a_batch_are_blended_as_the_equation_says(pipe, source):
    before, after = See(), See()
    with attnlib.attach(pipe, before, FlowAttention(FLOW, weight=0.3, threshold=4.0, source=source), after):
        pipes.sample(pipe, steps=1, num_images_per_prompt=3)
    a, b = before.seen[0].double(), after.seen[0].double()
    assert (a - b).abs().max() > 1e-3
    side = int(a.shape[-1] ** 0.5)
    for group in (0, 3):
        own = a[group : group + 3]
        done = [own[0]]
        for f in (1, 2):
            flow = flow_on_grid(FLOW[f - 1], (side, side)).double()
            past = done[-1] if source == "blended" else own[f - 1]
            moves = ((flow * 16 / side).norm(dim=0) > 4.0).flatten()[:, None]
            row = torch.where(moves, warp_maps(past, flow), past)
            mass = row.sum(-1, keepdim=True)
            row = torch.where(mass > 1e-6, row / mass.clamp(min=1e-6), own[f])
            done.append(0.3 * own[f] + 0.7 * row)
        torch.testing.assert_close(b[group : group + 3], torch.stack(done), rtol=0, atol=1e-5)
    assert bool((b >= 0).all())
    torch.testing.assert_close(b.sum(-1), torch.ones_like(b.sum(-1)), rtol=0, atol=1e-5)


def test_the_first_frame_and_full_weight_are_the_plain_model(pipe):
    plain = pipes.sample(pipe, steps=2, num_images_per_prompt=3)
    with attnlib.attach(pipe, FlowAttention(FLOW, weight=1.0)):
        assert torch.equal(pipes.sample(pipe, steps=2, num_images_per_prompt=3), plain)
    with attnlib.attach(pipe, FlowAttention(FLOW, weight=0.2)):
        got = pipes.sample(pipe, steps=2, num_images_per_prompt=3)
    torch.testing.assert_close(got[0], plain[0], rtol=0, atol=1e-4)
    assert all((got[f] - plain[f]).abs().max() > 1e-3 for f in (1, 2))
    assert torch.equal(pipes.sample(pipe, steps=2, num_images_per_prompt=3), plain)


@pytest.mark.parametrize("source", ["raw", "blended"])
def test_frames_in_calls_are_frames_in_a_batch(pipe, source):
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    settings = dict(weight=0.4, source=source, steps=[0])
    with attnlib.attach(pipe, FlowAttention(FLOW, **settings)):
        together = pipes.sample(pipe, steps=2, num_images_per_prompt=3, latents=noise.expand(3, -1, -1, -1))
    warp = FlowAttention(FLOW, frames="calls", **settings)
    with attnlib.attach(pipe, warp):
        apart = torch.cat([pipes.sample(pipe, steps=2, latents=noise) for _ in range(3)])
        torch.testing.assert_close(apart, together, rtol=0, atol=2e-4)
        with pytest.raises(ValueError, match=r"flow is of 3 frames, and this is one more call; begin a clip"):
            pipes.sample(pipe, steps=2, latents=noise)
        warp.reset()
        assert torch.equal(pipes.sample(pipe, steps=2, latents=noise), apart[:1])
        with pytest.raises(ValueError, match="call the pipeline alike for every frame"):
            pipes.sample(pipe, steps=2, guidance_scale=1.0, latents=noise)


def test_with_a_controlnet_other_schedulers_and_half_precision(tmp_path):
    from diffusers import ControlNetModel

    model = pipes.unet()
    torch.manual_seed(1)
    control = ControlNetModel.from_unet(model, conditioning_embedding_out_channels=(4,))
    pipe = pipes.stable_diffusion(
        str(tmp_path), "StableDiffusionControlNetPipeline", model, pipes.scheduler("EulerDiscreteScheduler"),
        controlnet=control,
    ).to(torch.bfloat16)  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    normals = list(torch.rand(3, 3, 16, 16))
    prompts = ["a red circle"] * 3
    with attnlib.attach(pipe, FlowAttention(FLOW, threshold=0.0, over="both", border="edge")):
        got = pipes.sample(pipe, prompts, steps=2, image=normals, height=16, width=16)
    assert got.shape == (3, 4, 16, 16) and bool(got.isfinite().all())


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        (dict(flow=[0.0]), TypeError, "flow must be"),
        (dict(flow=torch.zeros(2, 8, 8)), ValueError, "flow must have"),
        (dict(flow=torch.zeros(0, 2, 8, 8)), ValueError, "at least two frames"),
        (dict(flow=torch.full((1, 2, 8, 8), float("inf"))), ValueError, "flow must be finite"),
        (dict(weight=1.5), ValueError, "weight"),
        (dict(threshold=-1.0), ValueError, "threshold"),
        (dict(over="keys"), ValueError, "over"),
        (dict(source="noise"), ValueError, "source"),
        (dict(border="wrap"), ValueError, "border"),
        (dict(frames="clip"), ValueError, "frames"),
        (dict(steps=[-1]), ValueError, "steps"),
    ],
)
def test_bad_settings(settings, error, match):
    with pytest.raises(error, match=match):
        FlowAttention(**{"flow": FLOW, **settings})


def test_bad_batches_and_models(pipe):
    with attnlib.attach(pipe, FlowAttention(FLOW[:1])), pytest.raises(ValueError, match=r"6 rows \(3 of a kind\)"):
        pipes.sample(pipe, ["a red circle", "a blue square", "a cat"], steps=1)  # uncond and cond are no clip of six
    with pytest.raises(ValueError, match="counts calls of a pipeline"):
        attnlib.attach(pipe.unet, FlowAttention(FLOW, frames="calls"))
    with pytest.raises(ValueError, match="maps are of 12 places"):
        warp_maps(maps(), torch.zeros(2, 2, 3, dtype=torch.float64))
