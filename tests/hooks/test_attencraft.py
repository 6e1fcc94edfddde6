"""AttenCraft: the authors' functions from a fixture, its masks and prompts, and a whole training."""

import math

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from parity import Fixture  # noqa: E402

from attnlib.steer import AttenCraft, Personalize  # noqa: E402
from attnlib.steer.diffusion import attencraft  # noqa: E402
from attnlib.steer.diffusion.attencraft import assign, match, pull, refined, ssim  # noqa: E402
from attnlib.steer.diffusion.personalize import Example, Seen  # noqa: E402
from hooks.test_personalize import image, make  # noqa: E402

RECORDED = Fixture("attencraft")


# ---- the authors' functions


@pytest.fixture(scope="module")
def between():
    """The self map of the recordings, as ``Maps`` would give it: (key, query place)."""
    at = torch.stack(torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij"), -1).double()
    flat = at.view(-1, 2)
    region = torch.zeros(32, 32, dtype=torch.long)
    for n, centre in enumerate(((9, 9), (20, 23))):
        region[(at - torch.tensor(centre)).square().sum(-1) < 49] = n + 1
    same = (region.view(-1, 1) == region.view(1, -1)).double()
    apart = (flat[:, None] - flat[None]).square().sum(-1)
    return (2 * same - apart / 40).softmax(-1).T.unflatten(1, (32, 32))


def text(logits):
    """(T, 16, 16), the mean over two layers of one head each."""
    return logits.softmax(-1).mean(0).T.unflatten(1, (16, 16))


CASES = {
    "bare": ({"<new1>": "<new1>", "<new2>": "<new2>"}, [[4], [6]], [[4], [6]]),
    "described": ({"<new1>": "<new1> cat", "<new2>": "<new2>"}, [[4], [7]], [[4, 5], [7]]),
}


@pytest.mark.parametrize("case", CASES)
def test_maps_masks_and_term_are_the_authors(case, between):
    theirs = RECORDED.under(case)
    concepts, modifiers, phrases = CASES[case]
    logits = theirs["logits"].clone().requires_grad_()
    maps = text(logits)
    tokens = [span[0] for span in modifiers] + [0]
    torch.testing.assert_close(refined(maps[tokens], between).float(), theirs["refined"], atol=1e-6, rtol=1e-5)
    if case == "described":
        largest = maps[phrases[0]].amax(0, keepdim=True)
        torch.testing.assert_close(refined(largest, between).float()[0], theirs["described"][0], atol=1e-6, rtol=1e-5)
    craft = AttenCraft(concepts)
    masks = craft.segment(maps.detach(), between, modifiers, phrases)
    assert torch.equal(masks, theirs["masks"].double()) and theirs["tokens"].tolist() == [0, 1, 2]
    assert all(mask.sum() > 100 for mask in masks)

    craft.masks = masks
    spans = dict(zip(concepts, modifiers, strict=True))
    row = Example(image(), "a photo of <new1> and <new2>", spans=spans)
    loss = craft(Seen({"text": maps[None]}, [row], 0))
    assert loss.item() == pytest.approx(theirs["loss"].item(), abs=1e-8) and loss.item() > 5e-3
    (slope,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(slope, theirs["grad"], atol=1e-9, rtol=1e-6)

    # A prompt that names the second alone.
    maps = text(theirs["second/logits"])
    row = Example(image(), "a photo of <new2>", spans={"<new2>": [4]})
    loss = craft(Seen({"text": maps[None]}, [row], 3))
    assert loss.item() == pytest.approx(theirs["second/loss"].item(), abs=1e-8)


def test_divergence_and_similarity_are_the_authors():
    maps = RECORDED.tensors["js/maps"].double()
    assert pull(maps[:1], maps[1:]).item() == pytest.approx(RECORDED.tensors["js"].item(), abs=1e-9)
    first, *others = RECORDED.tensors["ssim/masks"].double()
    values = [ssim(first, other) for other in (first, *others)]
    assert values == pytest.approx(RECORDED.tensors["ssim"].tolist(), abs=1e-6)


# ---- what holds of any maps


def test_divergence_is_symmetric_and_at_most_ln_2():
    torch.manual_seed(0)
    for temperature in (1.0, 0.1, 0.01, 1e-3):
        a, b = torch.rand(5, 6, 7).double(), torch.rand(5, 6, 7).double()
        value = pull(a, b, temperature)
        torch.testing.assert_close(value, pull(b, a, temperature))
        assert (value >= 0).all() and (value <= math.log(2) + 1e-12).all()
        assert pull(a, a, temperature).abs().max() < 1e-12
    blob = torch.zeros(1, 32, 32)
    blob[0, :8] = 1
    # Nearly flat as released: even disjoint masks are 0.11 apart; a lower temperature tells them apart.
    assert pull(blob, 1 - blob).item() < 0.12 and pull(blob, 1 - blob, 0.02).item() > 0.69


@pytest.mark.parametrize("concepts", [2, 3])
def test_blobs_are_recovered_through_a_diffuse_self_map(concepts):
    torch.manual_seed(0)
    size, centres = 16, [(3, 3), (11, 12), (4, 12)][:concepts]
    at = torch.stack(torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij"), -1)
    truth = torch.stack([(at - torch.tensor(c)).square().sum(-1) <= 9 for c in centres])
    labels = (truth * torch.arange(1, concepts + 1)[:, None, None]).sum(0).flatten()
    logits = 2.5 * (labels[:, None] == labels[None]) + 0.3 * torch.randn(256, 256)
    between = logits.softmax(-1).T.unflatten(1, (size, size))
    peaks = torch.stack([torch.exp(-(at - torch.tensor(c)).square().sum(-1) / 3) for c in centres])
    maps = torch.cat([peaks, 1 - truth.any(0)[None].float()]) + 0.15 * torch.rand(concepts + 1, 16, 16)
    found = assign(refined(maps, between))
    assert match(refined(maps, between), found) == list(range(concepts + 1))
    for mask, true in zip(found, truth, strict=False):
        assert (mask & true).sum() / (mask | true).sum() > 0.9
    # Oracle of one place: above all others by more than the threshold.
    some = torch.rand(3, 5, 5)
    for p in range(25):
        values = some.flatten(1)[:, p]
        for k in range(3):
            wins = all(values[k] - values[j] > 0.1 for j in range(3) if j != k)
            assert bool(assign(some).flatten(1)[k, p]) is wins


def test_masks_that_change_too_much_or_are_confused_are_not_taken(between):
    concepts, modifiers, _ = CASES["bare"]
    craft = AttenCraft(concepts)
    maps = text(RECORDED.under("bare")["logits"])
    masks = craft.masks = craft.segment(maps, between, modifiers, modifiers)
    spans = dict(zip(concepts, modifiers, strict=True))
    row = Example(image(), "a photo of <new1> and <new2>", spans=spans)

    def after(maps, step=0):
        craft.after(Seen({"text": maps[None], "image": between[None]}, [row], step))
        return craft.masks

    shifted = maps.clone()
    shifted[4] = maps[4].roll(8, 0)  # the first concept jumps
    assert after(shifted) is masks
    equal = maps.clone()
    equal[6] = maps[4]  # both at one place
    assert craft.segment(equal, between, modifiers, modifiers) is None and after(equal) is masks
    slightly = maps + 1e-4 * torch.rand(maps.shape).double()
    assert after(slightly, step=7) is masks  # at every 20th step only
    assert after(slightly) is not masks and craft.masks.shape == masks.shape
    kept = AttenCraft(concepts)
    kept.load_state_dict(craft.state_dict())
    assert torch.equal(kept.masks, craft.masks)


def test_prompts_name_concepts_as_often_as_they_should():
    craft = AttenCraft({"<a>": "<a> cat", "<b>": "<b>", "<c>": "<c> dog"})
    some, generator = [Example(image(), craft.prompt()), Example(image(1), "a cat", prior=True)], torch.Generator()
    counts = {}
    for step in range(400):
        one, prior = craft.choose(some, step, generator.manual_seed(step))
        assert prior is some[1] and (step % 20 or one.prompt == craft.prompt())
        named = tuple(craft._named(one))
        assert one.prompt.count(" and ") == len(named) - 1
        counts[named] = counts.get(named, 0) + 1
    assert len(counts) == 7 and min(counts.values()) > 25
    only = AttenCraft({"<a>": "<a> cat", "<b>": "<b>"}, subsets={(1,): 1.0})
    assert only.choose(some, 3, generator)[0].prompt == "a photo of <b>"
    masks = torch.zeros(4, 32, 32)
    masks[0, :16], masks[1, :, :16], masks[3] = 1, 1, 1
    craft.masks = masks
    rows = [Example(image(), "a photo of <b> and <a> cat"), Example(image(), "a photo of <b>")]
    assert torch.equal(craft.inside(rows, (32, 32)), torch.stack([masks[:2].amax(0), masks[1]]))
    assert craft.inside(rows, (64, 64)).shape == (2, 64, 64)


# ---- a whole training


def test_a_pipeline_learns_two_concepts(folder, tmp_path):
    concepts = {"<new1>": "<new1> cat", "<new2>": "<new2>"}

    class Sure(AttenCraft):
        """The masks of a random model mean nothing; these stand."""

        def segment(self, text, between, modifiers, phrases):
            assert text.shape[1:] == (16, 16) and between.shape == (256, 16, 16)
            assert modifiers == [[4], [7]] and phrases == [[4, 5], [7]]
            if not hasattr(self, "first"):
                self.first = torch.zeros(3, 16, 16)
                self.first[0, :, :6], self.first[1, :, 6:12], self.first[2, :, 12:] = 1, 1, 1
            return self.first

    def run(weight, checkpoint=None):
        craft = Sure(concepts, resolution=(16, 16), temperature=0.1, weight=weight)
        learner = Personalize(make(folder), {"<new1>": "cat", "<new2>": "dog"}, terms=[craft])
        some = [Example(image(), craft.prompt()), Example(image(1), "a cat and a dog", prior=True)]
        history = learner.fit(some, 3, lr=1e-2, checkpoint=checkpoint)
        return learner, craft, history

    def now(learner):
        with learner._training():
            at = torch.tensor([100])
            some = [Example(image(), craft.prompt())]
            return learner.losses(some, at, torch.Generator().manual_seed(0))["attencraft"]

    learner, craft, history = run(5.0, tmp_path / "run.pt")
    assert set(history[0]) == {"noise", "prior", "attencraft", "loss"} and 0 < history[0]["attencraft"] < math.log(2)
    untrained = Personalize(make(folder), {"<new1>": "cat", "<new2>": "dog"}, terms=[craft])
    assert now(learner) < now(untrained) - 1e-3
    for one in history:
        assert one["loss"] == pytest.approx(one["noise"] + one["prior"] + 5 * one["attencraft"], rel=1e-5)
    again, kept, resumed = run(5.0, tmp_path / "run.pt")
    assert resumed == history and torch.equal(kept.masks, craft.masks)

    # Keys and tokens get the gradient of the term; values of the last layer that is read do not.
    with learner._training():
        some = [Example(image(), craft.prompt())]
        found = learner.losses(some, torch.tensor([100]), torch.Generator().manual_seed(0))
        names, own = zip(*learner.parameters().items(), strict=True)
        slopes = dict(zip(names, torch.autograd.grad(found["attencraft"], own, allow_unused=True), strict=True))
        assert set(learner._last[0].maps) == {"text", "image"} and not learner._last[0].maps["image"].requires_grad
        learner.losses(some, torch.tensor([100]), torch.Generator().manual_seed(0), step=7)
        assert set(learner._last[0].maps) == {"text"}  # masks are not made anew
    assert slopes["tokens.clip_l"].abs().max() > 0
    reached = [n for n, s in slopes.items() if s is not None and s.abs().max() > 0]
    last = "unet.up_blocks.1.attentions.1.transformer_blocks.0.attn2."
    assert last + "to_k" in reached and last + "to_v" not in reached


def test_a_single_map_has_no_gradient_to_values(folder):
    """Of one layer alone: its own keys move the term, its values never do."""
    pipe = make(folder)
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    craft = AttenCraft({"<new1>": "<new1>"}, resolution=(16, 16), layers=["down_blocks.0.attentions.0*"])
    craft.masks = torch.zeros(2, 16, 16)
    craft.masks[0, :8], craft.masks[1, 8:] = 1, 1
    learner = Personalize(pipe, {"<new1>": "cat"}, terms=[craft], layers=[layer])
    with learner._training():
        found = learner.losses(
            [Example(image(), craft.prompt())], torch.tensor([100]), torch.Generator().manual_seed(0)
        )
        own = learner.parameters()
        k, v, rows = torch.autograd.grad(found["attencraft"], own.values(), allow_unused=True)
    assert list(own)[:2] == [f"unet.{layer}.to_k", f"unet.{layer}.to_v"]
    assert k.abs().max() > 0 and rows.abs().max() > 0 and v is None


def test_bad_settings_are_refused(folder):
    cases = [
        (TypeError, "concepts must give each modifier its phrase", lambda: AttenCraft("<a>")),
        (ValueError, "'<a>' is not in the prompt 'cat'", lambda: AttenCraft({"<a>": "cat"})),
        (ValueError, "template must hold", lambda: AttenCraft({"<a>": "<a>"}, template="a photo")),
        (ValueError, "concepts are numbered 0 to 0", lambda: AttenCraft({"<a>": "<a>"}, subsets={(1,): 1.0})),
        (ValueError, "no tuple of numbers", lambda: AttenCraft({"<a>": "<a>"}, subsets={0: 1.0})),
        (TypeError, "resolution must be", lambda: AttenCraft({"<a>": "<a>"}, resolution=16)),
        (ValueError, "warmup must be", lambda: AttenCraft({"<a>": "<a>"}, warmup=(300, 0))),
        (ValueError, "some\\[0\\] must be", lambda: AttenCraft({"<a>": "<a>"}).prompt([4])),
        (ValueError, "a weight above 0", lambda: AttenCraft({"<a>": "<a>"}, subsets={(0,): 0.0})),
        (ValueError, "temperature", lambda: AttenCraft({"<a>": "<a>"}, temperature=0.0)),
        (ValueError, "of two things at least", lambda: assign(torch.rand(1, 2, 2))),
        (ValueError, "between must hold 4 places", lambda: attencraft.affinity(torch.rand(3, 2, 2))),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
    pipe = make(folder)
    tokens = {"<new1>": "cat", "<new2>": "dog"}
    craft = AttenCraft({"<new1>": "<new1>", "<new2>": "<new2>"}, resolution=(8, 8), threshold=1.0)
    with Personalize(pipe, tokens, terms=[craft]) as learner:
        with pytest.raises(ValueError, match="cannot tell the concepts"):
            learner.fit([Example(image(), craft.prompt())], 1)
        craft.masks = torch.ones(3, 8, 8)
        learner._begun = True
        two = [Example(image(), craft.prompt()), Example(image(1), craft.prompt())]
        with pytest.raises(ValueError, match="learns from one image"):
            learner.fit(lambda step, generator: two, 1)
