"""PEMF-VVTO: matched points steer where frames read a garment, tracks join frames over time."""

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import attnlib  # noqa: E402
from attnlib.hooks import Intervention, Record  # noqa: E402
from attnlib.steer import PointSpatialAttention, PointTemporalAttention  # noqa: E402
from attnlib.steer.diffusion.pemf_vvto import TrackBlock, cells, spread  # noqa: E402
from hooks import pipes  # noqa: E402

PROMPTS = ["a glass", "a cat", "a cat", "a cat"]  # the garment, and three frames
POINTS = torch.tensor([[0.1, 0.1], [0.6, 0.3]]) + 0.12 * torch.arange(3.0)[:, None, None]
CLOTH = torch.tensor([[0.3, 0.9], [0.7, 0.2]])


@pytest.fixture(scope="module")
def pipe(folder):
    return pipes.stable_diffusion(folder, model=pipes.unet(size=8))


def trained(module, std=0.5):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "to_q.weight" in name or "to_k.weight" in name or "proj.weight" in name:
                p.normal_(std=std)
    return module.eval().requires_grad_(False)


def test_cells_and_what_is_put_on_them():
    grid = (3, 5)
    for x in (0.0, 0.19, 0.2, 0.999):
        for y in (0.0, 0.33, 0.34, 0.999):
            assert cells(torch.tensor([x, y]), grid) == int(y * 3) * 5 + int(x * 5)
    values = torch.randn(4, 2, dtype=torch.float64)
    got = spread(values, torch.tensor([3, 3, 0, 3]), 5, torch.tensor([True, True, True, False]))
    assert torch.equal(got[3], (values[0] + values[1]) / 2) and torch.equal(got[0], values[2])
    assert not got[[1, 2, 4]].any()


def test_without_points_it_is_reference_attention(pipe):
    """Frames read their own keys and the garment's under one softmax; the garment reads itself."""
    psa = trained(PointSpatialAttention.of(pipe, 8, frames=3))
    psa.layers = [0]
    torch.manual_seed(2)
    x, text = torch.randn(4, 4, 8, 8), torch.randn(1, 5, 16).expand(4, -1, -1)
    seen = {}

    class See(Intervention):
        layers = (0,)

        def __init__(self, name):
            self.key = name

        def around_attention(self, site, q, k, v, call):
            seen[self.key] = out = call(q, k, v)
            seen["qkv"] = q, k, v
            return out

    with torch.no_grad(), attnlib.attach(pipe.unet, See("out"), psa):
        pipe.unet(x, 7, encoder_hidden_states=text)
    q, k, v = (t.double() for t in seen["qkv"])
    for row in range(4):
        keys, values = (t[row] if row == 0 else torch.cat([t[row], t[0]], 1) for t in (k, v))
        want = (q[row] @ keys.mT / q.shape[-1] ** 0.5).softmax(-1) @ values
        torch.testing.assert_close(seen["out"][row].double(), want, rtol=0, atol=1e-5)
    without = seen["out"]
    psa.match(POINTS, CLOTH, torch.zeros(3, 2, dtype=torch.bool))
    with torch.no_grad(), attnlib.attach(pipe.unet, See("out"), psa):
        pipe.unet(x, 7, encoder_hidden_states=text)
    assert torch.equal(seen["out"], without)


def test_a_strong_match_makes_the_frame_look_at_the_garment_s_place(pipe):
    psa = trained(PointSpatialAttention.of(pipe, 8, frames=3))
    for maps in psa.maps:  # one direction for both ends
        maps.to_k.weight.copy_(maps.to_q.weight)
    psa.strength = 30.0
    psa.match(POINTS[:, :1], CLOTH[:1], torch.tensor([[True], [True], [False]]))
    record = Record(what=("weights",), rows="all", layers=[0])
    torch.manual_seed(2)
    with torch.no_grad(), attnlib.attach(pipe.unet, psa, record) as session:
        pipe.unet(torch.randn(4, 4, 8, 8), 7, encoder_hidden_states=torch.randn(4, 5, 16))
    weights = session.results["record"][0]["weights"][0]
    there = 64 + int(cells(CLOTH[0], (8, 8)))
    for frame, peaks in ((0, True), (1, True), (2, False)):
        row = weights[1 + frame].mean(0)[int(cells(POINTS[frame, 0], (8, 8)))]
        assert (row[there] > 0.9) == peaks
    assert float(weights[0, :, :, 64:].abs().max()) == 0  # the garment does not read itself twice


def test_tracks_attend_over_frames_and_leave_the_rest(pipe):
    torch.manual_seed(3)
    block = trained(TrackBlock(6, 2)).double()
    x = torch.randn(2, 3, 6, 4, 5, dtype=torch.float64)
    points = torch.tensor([[[0.1, 0.1], [0.5, 0.6]], [[0.3, 0.1], [0.5, 0.6]], [[0.5, 0.1], [0.9, 0.9]]])
    visible = torch.tensor([[True, True], [True, False], [True, True]])
    got = block(x, points, visible)
    want = torch.zeros_like(x)
    for n in range(2):
        for t in range(2):
            there = [(f, int(points[f, t, 1] * 4), int(points[f, t, 0] * 5)) for f in range(3) if visible[f, t]]
            z = torch.stack([x[n, f, :, r, c] for f, r, c in there])
            new = block.attention(block.norm(z)[None])[0]
            for (f, r, c), value in zip(there, new, strict=True):
                want[n, f, :, r, c] += value
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)
    assert not got[:, 1, :, 2, 2].any()  # hidden there: it receives nothing
    other = x.clone()
    other[:, 1, :, 2, 2] += 5.0  # and gives nothing
    assert torch.equal(block(other, points, visible), got)
    order = [1, 0]
    torch.testing.assert_close(block(x, points[:, order], visible[:, order]), got, rtol=0, atol=1e-12)
    both = block(x, points[:, :1].expand(-1, 2, -1), visible[:, :1].expand(-1, 2))  # two tracks in one cell: their mean
    torch.testing.assert_close(both, block(x, points[:, :1], visible[:, :1]), rtol=0, atol=1e-12)


def test_in_a_pipeline_it_starts_as_the_plain_model(pipe):
    frames = dict(prompt=PROMPTS[1:], steps=2)
    plain = pipes.sample(pipe, **frames)
    pta = PointTemporalAttention.of(pipe, 3, num_heads=2)
    with attnlib.attach(pipe, pta.track(POINTS)):
        assert torch.equal(pipes.sample(pipe, **frames), plain)
    trained(pta)
    with attnlib.attach(pipe, pta):
        moved = pipes.sample(pipe, **frames)
        assert (moved - plain).abs().max() > 1e-4
        pta.track(POINTS, torch.zeros(3, 2, dtype=torch.bool))
        assert torch.equal(pipes.sample(pipe, **frames), plain)
        pta.track(POINTS).strength = 0.0
        assert torch.equal(pipes.sample(pipe, **frames), plain)
    one = trained(PointTemporalAttention.of(pipe, 1, num_heads=2)).track(POINTS[:1])
    with attnlib.attach(pipe, one):  # a single frame has no track
        assert torch.equal(pipes.sample(pipe, **frames), plain)
    again = PointTemporalAttention.of(pipe, 3, num_heads=2)
    again.load_state_dict(pta.state_dict())


def test_both_together_with_two_images_and_half_precision(pipe):
    psa = trained(PointSpatialAttention.of(pipe, 8, frames=3)).match(POINTS, CLOTH)
    pta = trained(PointTemporalAttention.of(pipe, 3, num_heads=2, cloth=True)).track(POINTS)
    with attnlib.attach(pipe, psa, pta):
        first = pipes.sample(pipe, PROMPTS, steps=1)
        with pytest.raises(ValueError, match=r"\(8 of a kind\) is not a garment and 3 frames"):
            pipes.sample(pipe, PROMPTS, steps=1, num_images_per_prompt=2)
    with attnlib.attach(pipe, psa):
        assert not torch.equal(pipes.sample(pipe, PROMPTS, steps=1), first)
    half = pipes.unet(size=8).bfloat16()
    with torch.no_grad(), attnlib.attach(half, psa.bfloat16(), pta.bfloat16()):
        out = half(torch.randn(4, 4, 8, 8).bfloat16(), 7, encoder_hidden_states=torch.randn(4, 5, 16).bfloat16())
    assert out.sample.dtype == torch.bfloat16 and bool(out.sample.isfinite().all())


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda m: m.match(POINTS + 1, CLOTH), ValueError, "point 0 of frame 0 lies at .* outside the frame"),
        (lambda m: m.match(POINTS, CLOTH - 1), ValueError, "outside the frame"),
        (lambda m: m.match(POINTS, CLOTH[:1]), ValueError, "cloth has 1 points, and the frames have 2"),
        (lambda m: m.match(POINTS[:2], CLOTH), ValueError, "points are of 2 frames"),
        (lambda m: m.match(POINTS, CLOTH, torch.ones(3, 2)), ValueError, "visible must be boolean"),
        (lambda m: m.match(POINTS.long(), CLOTH), TypeError, "points must be"),
        (lambda m: PointSpatialAttention({}), ValueError, "maps is empty"),
        (lambda m: PointTemporalAttention({}, 3), ValueError, "blocks is empty"),
        (lambda m: PointTemporalAttention({"a": TrackBlock(4, 2)}, 0), ValueError, "frames"),
    ],
)
def test_bad_input(pipe, call, error, match):
    with pytest.raises(error, match=match):
        call(PointSpatialAttention.of(pipe, 8, frames=3))
