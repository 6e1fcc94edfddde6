"""VSC: fusion, prototypes and localisation by their equations, and a whole training and sampling."""

import copy

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from attnlib.steer import VSC, Personalize, PrototypeFusion, Prototypes, fused_prompt  # noqa: E402
from attnlib.steer.diffusion.personalize import Example  # noqa: E402
from attnlib.steer.diffusion.vsc import clip_embedding, localization  # noqa: E402
from hooks import pipes  # noqa: E402
from hooks.test_personalize import image, make  # noqa: E402

PROMPT = "a red circle and a blue square"
PHRASES = ["red circle", "blue square"]


def trained(form="mlp", width=16, image_dim=3):
    torch.manual_seed(0)
    fusion = PrototypeFusion(width, image_dim, form=form).double()
    with torch.no_grad():
        for p in fusion.parameters():
            p.copy_(torch.randn(p.shape))
    return fusion


KNOWN = {"red circle": torch.tensor([1.0, 0, 2]), "blue square": torch.tensor([0.5, -1, 0])}


# ---- equations


@pytest.mark.parametrize("form", ["mlp", "gate"])
def test_fusion_is_the_equation_and_touches_its_tokens_alone(form):
    fusion = trained(form)
    embeds, prototypes = torch.randn(2, 9, 16).double(), torch.randn(2, 3).double()
    spans = [[[2, 3], [6]], [[4]]]
    out = fusion(embeds, [prototypes, prototypes[1:]], spans)
    truth = embeds.clone()
    for row, m, token in ((0, 0, 2), (0, 0, 3), (0, 1, 6), (1, 1, 4)):
        seen = fusion.project.weight @ prototypes[m] + fusion.project.bias
        if form == "gate":
            change = torch.tanh(fusion.gate) * seen
        else:
            first, _, last = fusion.mlp
            inner = first.weight @ torch.cat([embeds[row, token], seen]) + first.bias
            change = last.weight @ torch.nn.functional.gelu(inner) + last.bias
        truth[row, token] += change
    torch.testing.assert_close(out, truth, atol=1e-9, rtol=1e-9)
    untouched = torch.ones(2, 9, dtype=torch.bool)
    untouched[0, [2, 3, 6]] = untouched[1, 4] = False
    assert torch.equal(out[untouched], embeds[untouched]) and out.shape == embeds.shape
    fresh = PrototypeFusion(16, 3, form=form).double()
    same = fresh(embeds, [prototypes, prototypes[1:]], spans)
    assert torch.equal(same, embeds)
    same.sum().backward()
    learns = fresh.gate if form == "gate" else fresh.mlp[2].weight
    assert learns.grad.abs().max() > 0  # zero at the start, and not stuck there
    assert fusion(embeds, [prototypes[:0]] * 2, [[], []]) is embeds


def test_localization_has_its_ends_at_the_region_and_outside():
    torch.manual_seed(0)
    regions = (torch.rand(3, 6, 7) > 0.6).double()
    assert localization(regions, regions).item() == -1 and localization(1 - regions, regions).item() == 1
    assert localization(regions, regions, "bce").item() == 0 and localization(1 - regions, regions, "bce").item() > 90
    for _ in range(20):
        maps = torch.rand(3, 6, 7).double()
        by_hand = 0.0
        for m in range(3):
            inside = [maps[m, i, j].item() for i in range(6) for j in range(7) if regions[m, i, j]]
            outside = [maps[m, i, j].item() for i in range(6) for j in range(7) if not regions[m, i, j]]
            by_hand += sum(outside) / len(outside) - sum(inside) / len(inside)
        assert localization(maps, regions).item() == pytest.approx(by_hand / 3, abs=1e-12)
        assert -1 < localization(maps, regions).item() < 1
        bce = -(regions * maps.log() + (1 - regions) * (1 - maps).log()).mean()
        assert localization(maps, regions, "bce").item() == pytest.approx(bce.item(), abs=1e-12)
    whole = torch.ones(1, 2, 2)
    assert localization(whole, whole).item() == -1  # nothing is outside
    with pytest.raises(ValueError, match="an empty one"):
        localization(whole, 0 * whole)


# ---- prototypes


def test_prototypes_are_means_of_images_drawn_alone_and_once(folder):
    pipe, asked = make(folder), []

    def embed(images):
        asked.append(images)
        return images.flatten(2).mean(2)

    some = Prototypes(pipe, embed, count=2, seed=4, unit=False, template="a {}", num_inference_steps=1)
    found = some.of(["red circle", "blue square"])
    one = [
        pipe("a red circle", num_inference_steps=1, output_type="pt", generator=torch.Generator().manual_seed(s)).images
        for s in (4, 5)
    ]
    torch.testing.assert_close(found[0], torch.cat(one).flatten(2).mean(2).mean(0))
    assert len(asked) == 4 and torch.equal(some.of(["blue square"])[0], found[1]) and len(asked) == 4
    kept = Prototypes(None, known=some.known)
    assert torch.equal(kept.of(["red circle", "blue square"]), found)
    with pytest.raises(ValueError, match="no prototype of 'a dog' and no pipeline"):
        kept.of(["a dog"])
    with pytest.raises(ValueError, match="both a pipeline and embed"):
        Prototypes(pipe)


def test_clip_embeds_images():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=12, patch_size=6,
        projection_dim=5,
    )  # fmt: skip
    model = CLIPVisionModelWithProjection(config).eval()
    images = torch.rand(2, 3, 12, 12)
    found = clip_embedding(model)(images)
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    truth = model((images - mean[:, None, None]) / std[:, None, None]).image_embeds
    torch.testing.assert_close(found, truth)
    assert clip_embedding(model)(torch.rand(1, 3, 20, 20)).shape == (1, 5)


# ---- whole pipelines


@pytest.mark.parametrize("kind", ["stable_diffusion", "sdxl"])
def test_an_untrained_fusion_and_no_pair_leave_the_pipeline(folder, kind):
    pipe = make(folder, getattr(pipes, kind))
    width = 16 if kind == "stable_diffusion" else 32
    known = Prototypes(None, known=KNOWN)
    plain = pipes.sample(pipe, PROMPT, steps=1)
    fresh = PrototypeFusion(width, 3)
    assert torch.equal(pipes.sample(pipe, None, steps=1, **fused_prompt(pipe, PROMPT, fresh, known, PHRASES)), plain)
    learnt = trained(width=width).float()
    assert torch.equal(pipes.sample(pipe, None, steps=1, **fused_prompt(pipe, PROMPT, learnt, known, [])), plain)

    def parser(prompt):
        return PHRASES

    given = fused_prompt(pipe, PROMPT, learnt, known, parser=parser)
    before = fused_prompt(pipe, PROMPT, learnt, known, [])
    changed = (given["prompt_embeds"] != before["prompt_embeds"]).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [2, 3, 6, 7]
    assert all(torch.equal(given[name], before[name]) for name in given if name != "prompt_embeds")
    moved = pipes.sample(pipe, None, steps=1, num_images_per_prompt=2, **given)
    assert len(moved) == 2 and not torch.equal(moved[:1], plain)
    with pytest.raises(ValueError, match="either phrases"):
        fused_prompt(pipe, PROMPT, learnt, known)
    with pytest.raises(ValueError, match="'a dog' is not in the prompt"):
        fused_prompt(pipe, PROMPT, learnt, known, ["a dog"])


def regions():
    left = torch.zeros(16, 16)
    left[:, :6] = 1
    return {"red circle": left, "blue square": left.flip(1)}


@pytest.mark.parametrize("loss", ["contrast", "bce"])
def test_training_brings_maps_to_their_regions(folder, loss):
    pipe = make(folder)
    some = [Example(image(), PROMPT, regions=regions())]
    plain = [Example(image(), PROMPT), Example(image(1), "a cat", prior=True)]
    term = VSC(PrototypeFusion(16, 3), Prototypes(None, known=KNOWN), loss, weight=20.0, scale="max", resolution=8)

    def now(learner):
        with learner._training():
            return float(learner.losses(some, torch.tensor([100]), torch.Generator().manual_seed(0))["vsc"].detach())

    with Personalize(pipe, train="kv", terms=[term]) as learner:
        before = now(learner)
        start = copy.deepcopy(term.fusion.state_dict())
        history = learner.fit(lambda step, generator: some + plain, 4, lr=2e-2)
        assert set(history[0]) == {"noise", "prior", "vsc", "loss"}
        assert now(learner) < before - 1e-3
    moved = [name for name, p in term.fusion.state_dict().items() if not torch.equal(p, start[name])]
    assert len(moved) == len(start)
    # The fusion alone.
    with Personalize(pipe, train="none", terms=[term]) as learner:
        assert list(learner.parameters()) == [f"terms.0.{name}" for name in start]
        learner.fit(some, 1)


def test_bad_input_is_refused(folder):
    fusion, known = PrototypeFusion(16, 3), Prototypes(None, known=KNOWN)
    embeds, one = torch.randn(1, 5, 16), torch.randn(1, 3)
    for error, message, call in [
        (ValueError, "must be of 1 rows", lambda: fusion(embeds, [one, one], [[[1]], [[1]]])),
        (ValueError, "row 0 has 1 prototypes and 2 spans", lambda: fusion(embeds, [one], [[[1], [2]]])),
        (ValueError, "share a token", lambda: fusion(embeds, [torch.cat([one, one])], [[[1, 2], [2]]])),
        (ValueError, "beyond 0 to 4", lambda: fusion(embeds, [one], [[[5]]])),
        (ValueError, "embeds must be", lambda: fusion(embeds[..., :8], [one], [[[1]]])),
        (ValueError, r"prototypes\[0\] must be", lambda: fusion(embeds, [one[:, :2]], [[[1]]])),
        (TypeError, "int has no encode_prompt", lambda: fused_prompt(3, PROMPT, fusion, known, ["red circle"])),
        (ValueError, "template must hold", lambda: Prototypes(None, template="a photo")),
        (TypeError, "known must be", lambda: Prototypes(None, known=[one])),
        (ValueError, "form='sum' is not possible", lambda: PrototypeFusion(4, 3, form="sum")),
        (ValueError, "loss='l2' is not possible", lambda: VSC(fusion, known, loss="l2")),
        (TypeError, "must be a PrototypeFusion", lambda: VSC(known, fusion)),
        (ValueError, "that of 'red circle' must be", lambda: Example(
            image(), PROMPT, regions={"red circle": torch.zeros(4, 4)})),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            call()
    with Personalize(make(folder), terms=[VSC(fusion, known, resolution=8)]) as learner:
        wrong = Example(image(), "a cat", regions={"red circle": torch.ones(4, 4)})
        with pytest.raises(ValueError, match="'red circle', which is not in the prompt 'a cat'"):
            learner.fit([wrong], 1)
