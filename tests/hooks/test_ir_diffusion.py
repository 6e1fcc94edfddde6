"""IR-Diffusion: isolation and reposition against the equations written out, and whole pipelines."""

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import attnlib  # noqa: E402
from attnlib.hooks import Maps  # noqa: E402
from attnlib.steer import IRDiffusion  # noqa: E402
from attnlib.steer.diffusion.ir_diffusion import _placed  # noqa: E402
from attnlib.steer.diffusion.regions import box_masks, moved  # noqa: E402
from hooks import pipes  # noqa: E402

PROMPTS = ["a red circle and a blue square", "a blue square and a red circle"]
#: Two subjects in halves of the reference; in the other picture the first is small and overlaps the second.
BOXES = [[(0, 0, 0.5, 1), (0.5, 0, 1, 1)], [(0.5, 0.5, 0.75, 1), (0.25, 0, 1, 0.75)]]
UP = ["up_blocks.0.attentions.0*"]


class Outer(attnlib.hooks.Intervention):
    """Keeps what the layers of :data:`UP` give after all that is attached behind it."""

    kinds, layers = ("self",), UP

    def __init__(self):
        self.calls = []

    def around_attention(self, site, q, k, v, call):
        self.calls.append((site, q, k, v, call(q, k, v)))
        return self.calls[-1][-1]


def watched(pipe, *company, prompts=PROMPTS, **given):
    """(site, q, k, v, output) of the first layer, at the first step, in the run of all rows."""
    outer = Outer()
    with attnlib.attach(pipe, outer, *company):
        pipes.sample(pipe, prompts, steps=1, **given)
    return outer.calls[-1]


def labels_of(side, boxes):
    """0, or 1 + the number of the subject; the smaller box has what both want."""
    found = torch.zeros(side, side, dtype=torch.long)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in boxes]
    for s in sorted(range(len(boxes)), key=lambda s: -areas[s]):
        left, top, right, bottom = (round(x * side) for x in boxes[s])
        found[top:bottom, left:right] = s + 1
    return found.flatten()


def attend(q, k, v, allowed):
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~allowed, float("-inf"))
    return scores.softmax(-1) @ v


def test_isolation_is_the_equation(pipe):
    """Two pictures of each of two prompts: image m of the second reads image m of the first, in both halves."""
    given = dict(num_images_per_prompt=2)
    it = IRDiffusion(masks=BOXES, reposition=False, layers=UP)
    site, q, k, v, out = watched(pipe, it, **given)
    side = int(q.shape[2] ** 0.5)
    ref, tgt = (labels_of(side, boxes) for boxes in BOXES)
    assert side == 8 and sorted(set(tgt.tolist())) == [0, 1, 2] and site.rows == ("uncond",) * 4 + ("cond",) * 4
    n = len(tgt)
    allowed = torch.zeros(n, 2 * n, dtype=torch.bool)
    for i in range(n):
        for j in range(n):
            allowed[i, j] = tgt[i] != 0 and ref[j] == tgt[i]
            allowed[i, n + j] = tgt[i] == 0 or tgt[j] in (0, tgt[i])
    for group in (0, 4):
        for m in range(2):
            r, t = group + m, group + 2 + m
            truth = attend(q[t], torch.cat([k[r], k[t]], 1), torch.cat([v[r], v[t]], 1), allowed)
            torch.testing.assert_close(out[t], truth, atol=1e-5, rtol=1e-5)
            assert torch.equal(out[r], attend_kernel(q[r], k[r], v[r]))
    # Without isolation a subject reads all of its picture; the background may read that of the reference.
    _, q, k, v, out = watched(
        pipe, IRDiffusion(masks=BOXES, reposition=False, isolation=False, background="both", layers=UP)
    )
    wide = torch.cat([((tgt[:, None] == ref) & (tgt[:, None] >= 0)), torch.ones(n, n, dtype=torch.bool)], 1)
    for r, t in ((0, 1), (2, 3)):
        truth = attend(q[t], torch.cat([k[r], k[t]], 1), torch.cat([v[r], v[t]], 1), wide)
        torch.testing.assert_close(out[t], truth, atol=1e-5, rtol=1e-5)


def attend_kernel(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None])[0]


def test_one_subject_without_reference_is_plain_attention(pipe):
    whole = torch.ones(2, 1, 4, 4)
    plain = pipes.sample(pipe, PROMPTS, steps=2)
    with attnlib.attach(pipe, IRDiffusion(masks=whole, references=())):
        torch.testing.assert_close(pipes.sample(pipe, PROMPTS, steps=2), plain, atol=1e-5, rtol=1e-5)
    for it in (IRDiffusion(masks=whole, references=(), isolation=False), IRDiffusion(masks=whole, steps=0)):
        with attnlib.attach(pipe, it) as session:
            assert not session.attached and torch.equal(pipes.sample(pipe, PROMPTS, steps=2), plain)


def test_another_subject_changes_no_bit(pipe):
    class Other(attnlib.hooks.Intervention):
        kinds, layers = ("self",), UP

        def on_qkv(self, site, q, k, v):
            side = int(v.shape[2] ** 0.5)
            v = v.clone()
            for row, boxes in enumerate(BOXES * 2 if len(v) == 4 else ()):  # the blank latent stays
                v[row, :, labels_of(side, boxes) == 2] += 3.0
            return q, k, v

    outs = [watched(pipe, *company, IRDiffusion(masks=BOXES, layers=UP))[-1] for company in ((), (Other(),))]
    one, two = (labels_of(8, BOXES[1]) == s for s in (1, 2))
    assert torch.equal(outs[0][3][:, one], outs[1][3][:, one])
    assert (outs[0][3][:, two] - outs[1][3][:, two]).abs().max() > 0.1


@pytest.mark.parametrize("to", [None, (0.25, 0.25, 0.75, 0.75)])
def test_reposition_is_the_equation(pipe, to):
    """The reference's keys between cells at the subject's box, with the share of the place of a blank latent."""
    it = IRDiffusion(masks=BOXES, to=to, layers=UP)
    site, q, k, v, out = watched(pipe, it)
    blank = Outer()
    with attnlib.attach(pipe, blank, _Blank()):
        pipes.sample(pipe, PROMPTS, steps=1)
    share = [picture(t[:1])[0] for t in blank.calls[0][1:4]]
    ref, tgt = (labels_of(8, boxes).view(8, 8) for boxes in BOXES)
    for r, t in ((0, 1), (2, 3)):
        reads = []
        for s in (1, 2):
            there, here = bounds(ref == s), bounds(tgt == s)
            box = here if to is None else (2, 2, 6, 6)
            sample = lambda m, a=there, b=box, c=ref == s: between(m, c, a, b)  # noqa: E731
            inside = moved((ref == s).float(), there, box, inside=True) >= 0.5
            new = [
                sample(picture(x[r])) + share[n][..., box[0] : box[2], box[1] : box[3]] - sample(share[n])
                for n, x in ((1, k), (2, v))
            ]
            reads.append([x[..., inside].transpose(-1, -2) for x in new])
        for s in (0, 1, 2):
            mine, rest = (tgt == s).flatten(), ((tgt == 0) | (tgt == s) | (s == 0)).flatten()
            if s == 0:
                truth = attend(q[t][:, mine], k[t], v[t], torch.ones(1, dtype=torch.bool))
            elif to is None:
                keys, values = (torch.cat([n, x[t][:, rest]], 1) for n, x in zip(reads[s - 1], (k, v), strict=True))
                truth = attend(q[t][:, mine], keys, values, torch.ones(1, dtype=torch.bool))
            else:
                here, box = bounds(tgt == s), (2, 2, 6, 6)
                places = [
                    between(picture(x[t]) - share[n], tgt == s, here, box) + share[n][..., 2:6, 2:6]
                    for n, x in enumerate((q, k, v))
                ]
                inside = moved((tgt == s).double(), here, box, inside=True) >= 0.5
                background = (tgt == 0).flatten()
                keys = torch.cat([k[t][:, background], reads[s - 1][0], places[1][..., inside].transpose(-1, -2)], 1)
                values = torch.cat([v[t][:, background], reads[s - 1][1], places[2][..., inside].transpose(-1, -2)], 1)
                asked = places[0].flatten(-2).transpose(-1, -2)
                got = (
                    attend(asked, keys, values, torch.ones(1, dtype=torch.bool)).transpose(-1, -2).unflatten(-1, (4, 4))
                )
                got = got - share[2][..., 2:6, 2:6]
                back = moved(got, (0, 0, 4, 4), here, inside=True) + share[2][..., here[0] : here[2], here[1] : here[3]]
                truth = back[..., (tgt == s)[here[0] : here[2], here[1] : here[3]]].transpose(-1, -2)
            torch.testing.assert_close(out[t][:, mine], truth, atol=1e-5, rtol=1e-5)


class _Blank(attnlib.hooks.Intervention):
    """Runs the model on a blank latent in place of the first row."""

    def around_denoiser(self, site, inputs, call):
        with self.session.some_rows([0]):
            one = attnlib.hooks.rows_of(inputs, [0], len(inputs["sample"]))
            call({**one, "sample": one["sample"] * 0})
        return call(inputs)


def between(maps, mask, box, to):
    """What the cells of a mask hold, moved: cells of others have no weight."""
    weight = moved(mask.float(), box, to, inside=True)
    return moved(maps * mask, box, to, inside=True) / weight.clamp(min=1e-9)


def picture(t):
    return t.transpose(-1, -2).unflatten(-1, (8, 8))


def bounds(mask):
    y, x = mask.any(1).nonzero(), mask.any(0).nonzero()
    return int(y[0]), int(x[0]), int(y[-1]) + 1, int(x[-1]) + 1


def test_equal_boxes_are_not_moved(pipe):
    boxes = [BOXES[0], BOXES[0]]
    with attnlib.attach(pipe, IRDiffusion(masks=boxes, reposition=False)):
        still = pipes.sample(pipe, PROMPTS, steps=2)
    with attnlib.attach(pipe, IRDiffusion(masks=boxes)):
        torch.testing.assert_close(pipes.sample(pipe, PROMPTS, steps=2), still, atol=1e-5, rtol=1e-5)


def test_what_moved_is_found_again():
    """Features with a tint of their place: the same subject elsewhere is more alike once it is moved."""
    generator = torch.Generator().manual_seed(0)
    content, tint = torch.randn(6, 4, 4, generator=generator), torch.randn(6, 12, 12, generator=generator)
    there, here = (0, 1, 4, 5), (7, 6, 11, 10)
    reference, target = tint.clone(), tint.clone()
    reference[:, 0:4, 1:5] += content
    target[:, 7:11, 6:10] += content
    flat = reference.flatten(1).t()[None, None]
    same = target[:, 7:11, 6:10].flatten(1)
    alike = {}
    for name, share in (("moved", tint[None]), ("unmoved", None)):
        mask = box_masks([(1 / 12, 0, 5 / 12, 4 / 12)], (12, 12))[0]
        found = _placed(flat, (12, 12), there, here, share, mask)[0, 0].t()
        alike[name] = torch.nn.functional.cosine_similarity(found, same, dim=0).mean().item()
    torch.testing.assert_close(alike["moved"], 1.0, atol=1e-5, rtol=0)
    assert alike["unmoved"] < 0.8


def test_masks_of_words_are_those_of_the_step_before(pipe):
    """The first step is plain; at the second, places above half of the maximum belong to a word."""
    seen = {}

    class Look(attnlib.hooks.Intervention):
        def around_denoiser(self, site, inputs, call):
            it = self.session.interventions[0]
            out = call(inputs)
            seen[site.step] = (self.session.notes.get((it, "masks")), looks.take() if site.step == 0 else None)
            return out

    looks = Maps(8, gradient=False)
    it = IRDiffusion(["circle", "square"], resolution=8)
    with attnlib.attach(pipe, it, Look(), looks):
        got = pipes.sample(pipe, PROMPTS, steps=2)
    assert seen[0][0] is None
    maps = seen[0][1][2:]  # cond rows
    for p, tokens in enumerate(([3, 7], [7, 3])):
        some = maps[p][tokens]
        assert torch.equal(seen[1][0][p], some / some.amax((1, 2), keepdim=True) > 0.5)
    with attnlib.attach(pipe, IRDiffusion([["circle", "square"], ["circle", "square"]], resolution=8)):
        assert torch.equal(pipes.sample(pipe, PROMPTS, steps=2), got)
    plain = pipes.sample(pipe, PROMPTS, steps=2)
    assert torch.equal(got[0], plain[0]) and (got[1] - plain[1]).abs().max() > 1e-4
    with attnlib.attach(pipe, IRDiffusion([["circle", "square"], ["circle", None]], resolution=8)):
        assert (pipes.sample(pipe, PROMPTS, steps=2) - got).abs().max() > 1e-5


def test_whole_pipelines(pipe, tmp_path):
    """References keep their bits, also without guidance; steps, bits after an exception, half precision, SDXL."""
    plain, state = pipes.sample(pipe, PROMPTS, steps=2), torch.get_rng_state()
    with attnlib.attach(pipe, IRDiffusion(masks=BOXES)):
        got = pipes.sample(pipe, PROMPTS, steps=2)
        assert torch.equal(pipes.sample(pipe, PROMPTS, steps=2), got)
    torch.testing.assert_close(got[0], plain[0], atol=1e-6, rtol=1e-6)
    assert (got[1] - plain[1]).abs().max() > 1e-4 and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(pipes.sample(pipe, PROMPTS, steps=2), plain)
    with attnlib.attach(pipe, IRDiffusion(masks=BOXES, steps=[1])):
        later = pipes.sample(pipe, PROMPTS, steps=2)
    assert not torch.equal(later[1], got[1]) and not torch.equal(later[1], plain[1])
    alone = pipes.sample(pipe, PROMPTS, steps=1, guidance_scale=1.0)
    with attnlib.attach(pipe, IRDiffusion(masks=BOXES)):
        assert (pipes.sample(pipe, PROMPTS, steps=1, guidance_scale=1.0) - alone)[1].abs().max() > 1e-5

    class Fails(attnlib.hooks.Intervention):
        kinds, layers = ("self",), ["up_blocks.1*"]

        def on_output(self, site, out):
            raise RuntimeError("stop")

    with attnlib.attach(pipe, IRDiffusion(masks=BOXES), Fails()), pytest.raises(RuntimeError, match="stop"):
        pipes.sample(pipe, PROMPTS, steps=2)
    assert torch.equal(pipes.sample(pipe, PROMPTS, steps=2), plain)
    given = dict(steps=1, height=16, width=16)
    for other in (pipes.sdxl(str(tmp_path)), pipes.stable_diffusion(str(tmp_path)).to(torch.bfloat16)):
        with attnlib.attach(other, IRDiffusion(masks=BOXES)):
            got = pipes.sample(other, PROMPTS, **given)
        assert got.isfinite().all() and not torch.equal(got, pipes.sample(other, PROMPTS, **given))


def test_other_schedulers(pipe):
    before = pipe.scheduler
    pipe.scheduler = pipes.scheduler("EulerDiscreteScheduler")
    try:
        plain = pipes.sample(pipe, PROMPTS, steps=2)
        with attnlib.attach(pipe, IRDiffusion(masks=BOXES)):
            got = pipes.sample(pipe, PROMPTS, steps=2)
    finally:
        pipe.scheduler = before
    torch.testing.assert_close(got[0], plain[0], atol=1e-5, rtol=1e-5)
    assert (got[1] - plain[1]).abs().max() > 1e-4


def test_bad_input(pipe):
    def fails(it, match, prompt=PROMPTS, error=ValueError, **given):
        with attnlib.attach(pipe, it), pytest.raises(error, match=match):
            pipes.sample(pipe, prompt, steps=2, **given)

    fails(IRDiffusion(masks=BOXES), "masks are for 2 prompts, but the pipeline was called with 3", [*PROMPTS, "a dog"])
    fails(IRDiffusion(masks=BOXES, references=(2,)), "references names prompt 2")
    empty = [[None, BOXES[0][1]], BOXES[1]]
    fails(IRDiffusion(masks=empty), "subject 0 is in a picture, but in none of the references")
    fails(IRDiffusion(["circle", "cat"], resolution=8), "'cat' is not in the prompt")
    fails(IRDiffusion([["circle"], ["square"], ["cat"]], resolution=8), "for each of 2 prompts")
    fails(
        IRDiffusion(["circle"], resolution=5), "no attention to the text was seen at resolution 5", error=RuntimeError
    )
    with pytest.raises(ValueError, match="attach to the pipeline"):
        attnlib.attach(pipe.unet, IRDiffusion(masks=BOXES))
    with pytest.raises(ValueError, match="AStar runs some pictures by themselves"):
        attnlib.attach(pipe, attnlib.steer.AStar(("circle", "square")), IRDiffusion(masks=BOXES))
    with pytest.raises(ValueError, match="StepCache would keep what the model makes of the blank latent"):
        attnlib.attach(pipe, attnlib.cache.StepCache(attnlib.cache.steps.every(2)), IRDiffusion(masks=BOXES))
    with pytest.raises(ValueError, match="SubjectLatents would move the blank latent"):
        led = attnlib.steer.SubjectLatents(torch.zeros(4, 16, 16), torch.ones(16, 16))
        attnlib.attach(pipe, led, IRDiffusion(masks=BOXES))
    sd3, _ = pipes.sd3()
    with pytest.raises(ValueError, match="acts on self attention, but nothing of this model fits"):
        attnlib.attach(sd3, IRDiffusion(masks=BOXES, layers=None))
    with pytest.raises(ValueError, match="either subjects, words"):
        IRDiffusion()
    with pytest.raises(ValueError, match="subjects are empty"):
        IRDiffusion([])
    with pytest.raises(ValueError, match=r"masks must be \(P, S, H, W\)"):
        IRDiffusion(masks=torch.ones(2, 4, 4))
    with pytest.raises(ValueError, match="as many boxes for every prompt"):
        IRDiffusion(masks=[BOXES[0], BOXES[1][:1]])
    with pytest.raises(TypeError, match="sequence of words"):
        IRDiffusion("circle")
    with pytest.raises(ValueError, match="background='none'"):
        IRDiffusion(masks=BOXES, background="none")
