"""Block-sparse policies on video denoisers of diffusers, held to dense attention under the same mask."""

import pytest
import torch

from hooks.models import dense_attention, predict

pytest.importorskip("diffusers")

import attnlib  # noqa: E402
from attnlib.hooks import Intervention  # noqa: E402
from attnlib.ops.block_mass import block_mass  # noqa: E402
from attnlib.ops.block_sparse import BlockPlan  # noqa: E402
from attnlib.steer.diffusion.video import AdaSpa, BlockSparse, FrameTiles, MixtureOfBlocks, Policy  # noqa: E402
from hooks.test_protocol_video import MODELS  # noqa: E402

VIDEOS = ("wan", "ltx", "cogvideox", "hunyuan")


def made(name):
    make, inputs, _ = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    torch.manual_seed(1)
    return model, inputs()


class Everything(Policy):
    def choose(self, look):
        n = look.q.shape[2]
        return BlockPlan(torch.arange(-(-n // 4)).expand(-(-n // 4), -1), 4, 4, n)


class Backwards(Everything):
    """Another order for every head."""

    def order(self, site, grid, memory):
        n = grid[0] * grid[1] * grid[2]
        return torch.stack([torch.randperm(n, generator=torch.Generator().manual_seed(h)) for h in range(site.heads)])


@pytest.mark.parametrize("name", VIDEOS)
@pytest.mark.parametrize(
    "policy",
    [Everything(), Backwards(), FrameTiles(2, block=4), MixtureOfBlocks(((2, 1), (2, 2, 2), 0.5), threshold=1.0),
     AdaSpa(0.0, searches=(0,), block=4)],
    ids=["all", "orders", "tiles", "moba", "adaspa"],
)  # fmt: skip
def test_reading_every_block_is_dense_attention(name, policy):
    """Text tokens, orders per head, blocks that divide nothing, and both orders of streams."""
    model, inputs = made(name)
    before = predict(model, inputs)
    with attnlib.attach(model, BlockSparse(policy)) as session:
        for step in (0, 1):
            with session.at(step=step):
                assert torch.allclose(predict(model, inputs), before, atol=1e-5)
        densities = session.results["block-sparse"].values()  # less where blocks are filled up with what nobody reads
        assert densities and (set(densities) == {1.0} or isinstance(policy, MixtureOfBlocks))
    assert torch.equal(predict(model, inputs), before)


class Seen(Intervention):
    """Outermost: what attention gives, beside the oracle under a mask that the test makes."""

    kinds = ("self", "joint")

    def __init__(self, allowed):
        self.allowed, self.seen = allowed, 0

    def wants(self, site):
        return "refiner" not in site.name

    def around_attention(self, site, q, k, v, call):
        out = call(q, k, v)
        expected = dense_attention(q, k, v, self.allowed(site, q, k))[0]
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        self.seen += 1
        return out


def span(site):
    start, stop = site.q_layout.span("image")
    return start, stop, site.q_layout.grid("image")


@pytest.mark.parametrize("name", VIDEOS)
def test_frame_tiles_read_themselves_and_the_text(name):
    model, inputs = made(name)

    def allowed(site, q, k):
        start, stop, grid = span(site)
        slot = torch.arange(q.shape[2])
        inside = (slot >= start) & (slot < stop)
        frame = torch.where(inside, (slot - start) // (grid[1] * grid[2]), -1)
        return (frame[:, None] == frame) | ~inside[:, None] | ~inside

    seen = Seen(allowed)
    with attnlib.attach(model, seen, BlockSparse(FrameTiles(0, block=1))) as session:
        predict(model, inputs)
        density = next(iter(session.results["block-sparse"].values()))
    assert seen.seen == 2 and density < 1


@pytest.mark.parametrize("name", ("wan", "cogvideox"))
def test_own_blocks_of_a_cut(name):
    """The best block of every query is its own: columns of 1 x 2 tokens over all frames."""
    model, inputs = made(name)

    def allowed(site, q, k):
        start, stop, (_, height, width) = span(site)
        slot = torch.arange(q.shape[2])
        inside = (slot >= start) & (slot < stop)
        at = (slot - start) % (height * width)
        column = torch.where(inside, at // width * width + at % width // 2, -1)
        return (column[:, None] == column) | ~inside[:, None] | ~inside

    seen = Seen(allowed)
    policy = MixtureOfBlocks(((1, 2),), topk=1, per="row")
    with attnlib.attach(model, seen, BlockSparse(policy)):
        predict(model, inputs)
    assert seen.seen == 2


def test_adaspa_searches_exactly_then_from_the_kept_sums():
    model, inputs = made("wan")
    calls = []

    class Watch(Intervention):
        kinds = ("self",)

        def around_attention(self, site, q, k, v, call):
            calls.append((site.step, q, k, v, call(q, k, v)))
            return calls[-1][-1]

    policy = BlockSparse(AdaSpa(0.5, searches=(1, 3), block=4, adapt=False))
    plain = predict(model, inputs)
    with attnlib.attach(model, Watch(), policy) as session:
        for step in range(5):
            with session.at(step=step):
                out = predict(model, inputs)
            assert torch.equal(out, plain) == (step <= 1)
        memory = next(iter(policy.memories.values()))
        assert memory["searched"] == 3 and float(memory["plan"].density) < 0.7
        kept = memory["plan"]
        with session.at(step=0):  # the next generation
            assert torch.equal(predict(model, inputs), plain)
        assert "plan" not in next(iter(policy.memories.values()))
    # what was read in the step behind the search is the heaviest half of every row in the search's own map
    ((q0, k0),) = [(q, k) for step, q, k, v, out in calls if step == 1][:1]
    rows = block_mass(q0, k0, 4, 4).mass
    best = rows.topk(round(0.5 * rows.shape[-1]), -1).indices
    chosen = torch.zeros_like(rows, dtype=torch.bool).scatter(-1, best, True)
    ((q, k, v, out),) = [(q, k, v, out) for step, q, k, v, out in calls if step == 2][:1]
    allowed = chosen.repeat_interleave(4, 2).repeat_interleave(4, 3)[..., : q.shape[2], : k.shape[2]]
    torch.testing.assert_close(out, dense_attention(q, k, v, allowed)[0], atol=1e-5, rtol=1e-5)
    assert kept.expect("blocks", N=12) is kept


@pytest.mark.parametrize(
    ("policy", "step", "says"),
    [
        (AdaSpa(), None, "denoising steps"),
        (FrameTiles(3), 0, "references=3, but the video has 2 frames"),
    ],
)
def test_what_cannot_be_done_is_said(policy, step, says):
    model, inputs = made("wan")
    with (
        attnlib.attach(model, BlockSparse(policy)) as session,
        session.at(step=step),
        pytest.raises(ValueError, match=says),
    ):
        predict(model, inputs)


def test_another_grid_in_the_same_generation_is_refused():
    model, inputs = made("wan")
    with attnlib.attach(model, BlockSparse(AdaSpa(0.5, searches=(0,), block=4))) as session:
        with session.at(step=0):
            predict(model, inputs)
        larger = {**inputs, "hidden_states": torch.randn(2, 4, 2, 8, 4)}
        with session.at(step=1), pytest.raises(ValueError, match="was .* in the step before"):
            predict(model, larger)
        with session.at(step=0):
            predict(model, larger)
        with session.at(step=1), pytest.raises(ValueError, match="batch has 1 rows"):
            predict(model, {k: v[:1] for k, v in larger.items()})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: AdaSpa(1.0), "sparsity"),
        (lambda: AdaSpa(searches=(3, 1)), "searches"),
        (lambda: AdaSpa(per="all"), "per="),
        (lambda: FrameTiles(-1), "references"),
        (lambda: MixtureOfBlocks(cuts=4), "cuts"),
        (lambda: MixtureOfBlocks(cuts=((1, 2, 3, 4),)), "cut="),
        (lambda: MixtureOfBlocks(threshold=0.0), "threshold"),
        (lambda: BlockSparse("adaspa"), "policy"),
        (lambda: BlockSparse(AdaSpa(), steps=3), "steps"),
        (lambda: BlockSparse(AdaSpa(), grid=(0, 2, 2)), "grid"),
    ],
)
def test_bad_settings(make, says):
    with pytest.raises((TypeError, ValueError), match=says):
        make()


def test_layers_that_are_no_video_are_named():
    make, inputs, _ = MODELS["sd3"]
    model = make().eval()
    with attnlib.attach(model, BlockSparse(Everything())), pytest.raises(ValueError, match="no video; give grid="):
        predict(model, inputs())
