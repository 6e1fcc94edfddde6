"""DisenDiff: the authors' p_losses from a fixture, what each part moves, and a whole training."""

import json

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from parity import Fixture  # noqa: E402

from attnlib.steer import DisenDiff, Personalize  # noqa: E402
from attnlib.steer.diffusion.disendiff import SIGMA, binding, separation, soft_iou  # noqa: E402
from attnlib.steer.diffusion.maps import smooth  # noqa: E402
from attnlib.steer.diffusion.personalize import Example, Seen  # noqa: E402
from hooks.test_personalize import image, make  # noqa: E402

RECORDED = Fixture("disendiff")
PAIRS = [("<new1>", "cat"), ("<new2>", "dog")]
SETTINGS = {
    "full": {}, "twice": {"squared": 2}, "product": {"apart": "product", "apart_weight": 100.0},
    "plain": {"sigma": None, "squared": 0, "apart": None}, "resized": {"size": 64}, "three": {},
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_the_term_is_the_authors(case):
    theirs = RECORDED.under(case)
    logits = theirs["logits"].clone().requires_grad_()  # layers, rows, heads, places, tokens
    maps = logits.softmax(-1).mean((0, 2)).transpose(1, 2).unflatten(2, (8, 8))
    ids = RECORDED.config[case]["ids"]
    rows = []
    for prompt, tokens in zip(RECORDED.config[case]["prompts"], ids, strict=True):
        # The class is the token behind the modifier.
        spans = {f"<new{n}>": [tokens.index(89 + n)] for n in (1, 2, 3) if 89 + n in tokens}
        spans |= {f"class {n}": [tokens.index(89 + n) + 1] for n in (1, 2, 3) if 89 + n in tokens}
        rows.append(Example(image(), prompt, spans=spans))
    count = 3 if case == "three" else 2
    term = DisenDiff([(f"<new{n}>", f"class {n}") for n in range(1, count + 1)], **SETTINGS[case])
    loss = term.weight * term(Seen({"text": maps}, rows, 0))
    assert loss.item() == pytest.approx(theirs["loss"].item(), abs=1e-9)
    (slope,) = torch.autograd.grad(loss, logits)
    assert theirs["grad"].abs().max() > 1e-6
    torch.testing.assert_close(slope, theirs["grad"], atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize(("case", "more"), [("several", {}), ("plainseveral", SETTINGS["plain"])])
def test_layers_of_several_resolutions_are_the_authors(case, more):
    """The release without attn16: maps of two layers of 6 x 6 and of one of 4 x 4, resized and averaged over layers."""
    theirs = Fixture("disendiff-sides")
    ids = torch.tensor(json.loads(theirs.meta["ids"])).tolist()
    logits = [
        theirs.tensors[f"logits/{i}"].clone().requires_grad_() for i in range(3)
    ]  # rows and heads, places, tokens
    maps = [t.softmax(-1).unflatten(0, (2, 2)).mean(1).transpose(1, 2) for t in logits]
    maps = {"text@6": ((maps[0] + maps[1]) / 2).unflatten(2, (6, 6)), "text@4": maps[2].unflatten(2, (4, 4))}
    rows = []
    for prompt, tokens in zip(("<new1> cat and <new2> dog", "a cat"), ids, strict=True):
        spans = {f"<new{n}>": [tokens.index(89 + n)] for n in (1, 2) if 89 + n in tokens}
        spans |= {f"class {n}": [tokens.index(89 + n) + 1] for n in (1, 2) if 89 + n in tokens}
        rows.append(Example(image(), prompt, spans=spans))
    term = DisenDiff([("<new1>", "class 1"), ("<new2>", "class 2")], resolution=(6, 4), size=64, **more)
    assert term.reads == {"text@6": 6, "text@4": 4}
    loss = term.weight * term(Seen(maps, rows, 0, layers={"text@6": 2, "text@4": 1}))
    assert loss.item() == pytest.approx(theirs.tensors[f"{case}/loss"].item(), abs=1e-9)
    for i, slope in enumerate(torch.autograd.grad(loss, logits)):
        torch.testing.assert_close(slope, theirs.tensors[f"{case}/grad/{i}"], atol=1e-9, rtol=1e-6)


def test_maps_of_several_resolutions_reach_the_term(folder):
    pipe, seen = make(folder), []

    class Looks(DisenDiff):
        def __call__(self, given):
            seen.append(given)
            return super().__call__(given)

    term = Looks(PAIRS, resolution=(16, 8), size=16)
    with Personalize(pipe, {"<new1>": None, "<new2>": None}, terms=[term]) as learner:
        losses = learner.fit([Example(image(), "<new1> cat and <new2> dog")], 1)
    (given,) = seen
    assert {name: tuple(t.shape[-2:]) for name, t in given.maps.items()} == {"text@16": (16, 16), "text@8": (8, 8)}
    cross = [n for n in pipe.unet.attn_processors if ".attn2." in n]
    assert sum(given.layers.values()) == len(cross) and min(given.layers.values()) > 0
    assert losses[0]["disendiff"] > 0


def test_the_blur_is_the_authors():
    point = torch.zeros(1, 5, 5).double()
    point[0, 2, 2] = 1
    torch.testing.assert_close(smooth(point, SIGMA)[0, 1:4, 1:4].float(), RECORDED.tensors["kernel"])


def test_ends_of_the_soft_intersection():
    torch.manual_seed(0)
    a = (torch.rand(8, 8) > 0.5).double()
    assert soft_iou(a, a).item() == 1
    assert soft_iou(a, 1 - a).item() == pytest.approx(1 / 65)  # 1 / (sum + 1)
    b, c = torch.rand(2, 8, 8).double()
    assert soft_iou(b, c).item() == soft_iou(c, b).item()
    both = (b * c).sum()
    assert soft_iou(b, c, 0.0).item() == pytest.approx((both / (b.sum() + c.sum() - both)).item())


def test_binding_moves_modifiers_alone():
    torch.manual_seed(0)
    modifiers, classes = (torch.rand(2, 8, 8).double().requires_grad_() for _ in range(2))
    one, other = torch.autograd.grad(binding(modifiers, classes), [modifiers, classes], allow_unused=True)
    assert one.abs().max() > 0 and other is None
    (slope,) = torch.autograd.grad(separation(classes), classes)
    assert (slope.flatten(1).abs().amax(1) > 0).all()  # both classes
    assert separation(classes[:1]).item() == 0


def test_descent_binds_and_separates():
    """Two overlapping class maps and modifiers elsewhere, as logits of a toy attention over five tokens."""
    at = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij"), -1).double()
    centres = torch.tensor([[1.0, 6], [3, 3], [6, 1], [4, 4]])  # <new1>, cat, <new2>, dog
    bumps = [-(at - c).square().sum(-1) / 6 for c in centres]
    logits = torch.stack([torch.zeros(8, 8).double(), *bumps]).requires_grad_()
    term = DisenDiff([([1], [2]), ([3], [4])])
    row = [Example(image(), "x")]

    def parts():
        maps = logits.softmax(0)
        pictures = term.pictures([(maps, 1.0)], [[1], [3], [2], [4]])
        classes = pictures[2:].square()
        return binding(pictures[:2], classes).item(), separation(classes).item(), maps

    before = parts()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(40):
        optimizer.zero_grad()
        term(Seen({"text": logits.softmax(0)[None]}, row, 0)).backward()
        optimizer.step()
    after = parts()
    assert after[0] < before[0] - 0.1 and after[1] < before[1] - 0.1


def test_words_are_sets_of_tokens_and_rows_may_name_some(folder):
    pipe = make(folder)
    torch.manual_seed(0)
    maps = torch.rand(3, 77, 8, 8).double()
    # "corgi" has five pieces; the second prompt names one pair, the third none.
    rows = [
        Example(image(), "<new1> corgi and <new2> dog"), Example(image(), "a <new2> dog"), Example(image(), "a frog")
    ]  # fmt: skip
    pipe.tokenizer.add_tokens(["<new1>", "<new2>"])
    term = DisenDiff([("<new1>", "corgi"), ("<new2>", "dog")])
    seen = Seen({"text": maps}, rows, 0, pipe)
    assert seen.span(0, "corgi") == [2, 3, 4, 5, 6] and seen.span(0, "dog") == [9]
    first = DisenDiff([([1], [2, 3, 4, 5, 6]), ([8], [9])])(Seen({"text": maps[:1]}, rows[:1], 0))
    second = DisenDiff([([2], [3])])(Seen({"text": maps[1:2]}, rows[1:2], 0))
    assert term(seen).item() == pytest.approx(((first + second) / 2).item(), abs=1e-12)
    none = term(Seen({"text": maps[2:].requires_grad_()}, rows[2:], 0, pipe))
    assert none.item() == 0 and none.requires_grad


def test_a_pipeline_learns_two_concepts_and_weight_0_is_custom_diffusion(folder):
    def run(terms):
        learner = Personalize(make(folder), {"<new1>": None, "<new2>": None}, terms=terms)
        history = learner.fit([Example(image(), "<new1> cat and <new2> dog")], 3, lr=1e-2, accumulate=2)
        return history, {n: p.detach().clone() for n, p in learner.parameters().items()}

    history, learnt = run([DisenDiff(PAIRS, weight=1.0, resolution=8)])
    assert set(history[0]) == {"noise", "disendiff", "loss"}
    _, nothing = run([DisenDiff(PAIRS, weight=0.0, resolution=8)])
    _, plain = run([])
    for name, p in plain.items():
        assert torch.equal(nothing[name], p), name
    assert any(not torch.equal(learnt[name], p) for name, p in plain.items())


def test_bad_settings_are_refused():
    for error, message, call in [
        (TypeError, "pairs must be", lambda: DisenDiff("<new1>")),
        (TypeError, "pairs must be", lambda: DisenDiff(["<new1>", "cat"])),
        (TypeError, "pairs must be", lambda: DisenDiff([])),
        (ValueError, "apart='both' is not possible", lambda: DisenDiff(PAIRS, apart="both")),
        (ValueError, "sigma", lambda: DisenDiff(PAIRS, sigma=0.0)),
    ]:
        with pytest.raises(error, match=message):
            call()
