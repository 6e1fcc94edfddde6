"""CustomContrast: contrasts by their equation, injection held to plain processors, and training by views."""

import copy
import math

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import attnlib  # noqa: E402
from attnlib.steer import CustomContrast, MultilevelContrast, Personalize, SubjectEncoder  # noqa: E402
from attnlib.steer.diffusion.customcontrast import contrast, info_nce  # noqa: E402
from attnlib.steer.diffusion.personalize import Example  # noqa: E402
from hooks import pipes  # noqa: E402
from hooks.test_personalize import image, make  # noqa: E402

SMALL = {"depth": 1, "num_heads": 2, "head_dim": 4}
PROMPT = "a red circle and a blue square"


def made(model, words=("circle",), seed=0, **settings):
    torch.manual_seed(seed)
    return CustomContrast.of(model, features=8, tokens=2, encoder=SMALL, words=list(words), **settings).requires_grad_(
        False
    )


def features(prompts=1, references=1, seed=1):
    return torch.randn(prompts, references, 5, 8, generator=torch.Generator().manual_seed(seed))


# ---- contrasts


def test_info_nce_is_the_equation():
    torch.manual_seed(0)
    z, subjects, t = torch.randn(6, 5).double(), torch.tensor([0, 0, 1, 1, 1, 2]), 0.3
    text = torch.randn(6, 5).double()

    def cos(a, b):
        return (a @ b / (a.norm() * b.norm())).item()

    def by_hand(with_text):
        terms = []
        for i in range(6):
            negatives = [math.exp(cos(z[i], z[j]) / t) for j in range(6) if subjects[j] != subjects[i]]
            positives = [z[j] for j in range(6) if j != i and subjects[j] == subjects[i]]
            positives += [text[i]] if with_text else []
            for other in positives:
                top = math.exp(cos(z[i], other) / t)
                terms.append(-math.log(top / (top + sum(negatives))))
        return sum(terms) / len(terms)

    assert contrast(z, subjects, None, t).item() == pytest.approx(by_hand(False), abs=1e-12)
    assert contrast(z, subjects, text, t).item() == pytest.approx(by_hand(True), abs=1e-12)
    # Subject 2 has one view, which has no positive without text.
    assert contrast(z[5:], subjects[5:], None, t).item() == 0


def test_ends_of_info_nce():
    subjects = torch.tensor([0, 0, 1, 1, 2, 2])
    assert contrast(torch.ones(6, 4), subjects).item() == pytest.approx(math.log(5), abs=1e-6)  # 1 + 4 negatives
    apart = torch.eye(3).repeat_interleave(2, 0)
    for t, most in ((1.0, 1.0), (0.1, 3e-4), (0.02, 1e-12)):
        assert contrast(apart, subjects, None, t).item() < most
    half = torch.randn(6, 4).half()
    assert contrast(half, subjects).dtype == torch.float32
    with pytest.raises(ValueError, match="share a pair"):
        yes = torch.ones(1, 1, dtype=torch.bool)
        info_nce(torch.ones(1, 2), torch.ones(1, 2), yes, yes)
    with pytest.raises(ValueError, match="temperature"):
        contrast(torch.ones(6, 4), subjects, None, 0.0)


def test_contrast_tells_subjects_apart_where_reconstruction_does_not():
    """Codes of subjects beside louder codes of views, mixed; views that training did not see."""
    torch.manual_seed(0)
    count, views, width = 12, 6, 4
    subjects = torch.arange(count).repeat_interleave(views)
    codes = torch.randn(count, 4)
    mixing = torch.linalg.qr(torch.randn(16, 16))[0]

    def draw():
        return torch.cat([codes[subjects], 3 * torch.randn(count * views, 12)], 1) @ mixing

    train, test = draw(), draw()

    def accuracy(weight):
        torch.manual_seed(1)
        encoder, decoder = torch.nn.Linear(16, width), torch.nn.Linear(width, 16)
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=2e-2)
        for _ in range(250):
            z = encoder(train)
            loss = (decoder(z) - train).square().mean() + weight * contrast(z, subjects, None, 0.2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            a, b = (torch.nn.functional.normalize(encoder(x), dim=1) for x in (test, train))
        near = (a @ b.T).argmax(1)
        return (subjects[near] == subjects).float().mean().item()

    assert accuracy(10.0) > accuracy(0.0) + 0.2


# ---- the injection


class ByHand:
    """A plain processor of cross-attention: a token of the context is another, and a branch is added."""

    def __init__(self, number, name, custom, span):
        self.number, self.name, self.custom, self.span = number, name, custom, span

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        custom, given = self.custom, self.custom._images
        context = encoder_hidden_states.clone()
        empty, both = torch.zeros_like(given), []
        for row, some in enumerate((empty, given)):  # the unconditional row, then the other
            if row and custom.strength:
                meaning = custom.encoder.semantic(given[0])[0, self.number]
                context[row, self.span] = torch.lerp(context[row, self.span], meaning, custom.strength)
            look = custom.encoder(some[0])[0].unflatten(0, (custom.encoder.scales, -1))[custom.levels[self.name]]
            maps = custom.maps[self.number]

            def heads(x, attn=attn):
                return x.unflatten(-1, (attn.heads, -1)).transpose(0, 1)

            q = heads(attn.to_q(hidden_states[row]))
            k, v = heads(attn.to_k(context[row])), heads(attn.to_v(context[row]))
            out = (q @ k.mT * attn.scale).softmax(-1) @ v
            branch = (q @ heads(maps.to_k_ip(look)).mT * attn.scale).softmax(-1) @ heads(maps.to_v_ip(look))
            both.append((out + custom.scale * branch).transpose(0, 1).flatten(1))
        return attn.to_out[1](attn.to_out[0](torch.stack(both))) / attn.rescale_output_factor


@pytest.mark.parametrize(("scale", "strength"), [(0.7, 1.0), (0.0, 0.5), (1.5, 0.0)])
def test_the_injection_is_that_of_plain_processors(folder, scale, strength):
    pipe, other = pipes.stable_diffusion(folder), pipes.stable_diffusion(folder)
    for p in (pipe, other):
        p.unet.double(), p.text_encoder.double(), p.vae.double()
    custom = made(pipe, scale=scale, strength=strength).double()
    custom.refer(features().double())
    assert sorted(set(custom.levels.values())) == [0, 1] and custom.levels[custom.names[0]] == 0
    mid = next(name for name in custom.names if name.startswith("mid"))
    assert custom.levels[mid] == 1
    with attnlib.attach(pipe, custom):
        got = pipes.sample(pipe, PROMPT, steps=2)
    processors = dict(other.unet.attn_processors)
    for number, name in enumerate(custom.names):
        processors[f"{name}.processor"] = ByHand(number, name, custom, [3])
    other.unet.set_attn_processor(processors)
    torch.testing.assert_close(got, pipes.sample(other, PROMPT, steps=2), atol=1e-9, rtol=1e-9)


def test_nothing_is_injected_at_strength_0(pipe):
    plain = pipes.sample(pipe, PROMPT, steps=2)
    custom = made(pipe, scale=0.0, strength=0.0).refer(features())
    assert custom.identity
    with attnlib.attach(pipe, custom):
        assert torch.equal(pipes.sample(pipe, PROMPT, steps=2), plain)
    custom = made(pipe).refer(features())
    with attnlib.attach(pipe, custom):
        moved = pipes.sample(pipe, PROMPT, steps=2)
        custom.scale = custom.strength = 0.0
        assert torch.equal(pipes.sample(pipe, PROMPT, steps=2), plain)
    assert not torch.equal(moved, plain) and torch.equal(pipes.sample(pipe, PROMPT, steps=2), plain)


def test_each_prompt_has_its_subjects_and_words(pipe):
    two = features(2, 2)
    prompts = [PROMPT, "a dog and a cat"]
    words = [["circle", "square"], ["dog", "cat"]]
    given = {"steps": 2, "num_images_per_prompt": 2}
    custom = made(pipe, words).refer(two)

    def starts(seed):
        return torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(seed))

    with attnlib.attach(pipe, custom):
        both = pipes.sample(pipe, prompts, latents=starts(0), **given)
    for n in range(2):
        alone = made(pipe, words[n]).refer(two[n : n + 1])
        with attnlib.attach(pipe, alone):
            one = pipes.sample(pipe, prompts[n], latents=starts(0)[2 * n : 2 * n + 2], **given)
        torch.testing.assert_close(both[2 * n : 2 * n + 2], one, atol=1e-4, rtol=1e-4)


def test_sdxl_euler_and_bfloat16(folder):
    pipe = pipes.sdxl(folder)
    pipe.scheduler = pipes.scheduler("EulerDiscreteScheduler")
    for part in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2):
        part.to(torch.bfloat16)
    custom = made(pipe).refer(features(), text=torch.randn(1, 1, 2, 32))
    plain = pipes.sample(pipe, PROMPT, steps=1)
    with attnlib.attach(pipe, custom):
        moved = pipes.sample(pipe, PROMPT, steps=1)
    assert moved.isfinite().all() and not torch.equal(plain, moved)


# ---- training


def views():
    return [Example(image(seed), "a photo of two") for seed in range(4)]


def describe(examples):
    subjects = torch.tensor([0, 0, 1, 1])[: len(examples)]
    looks = torch.stack([e.image[:, :5, :8].mean(0) for e in examples])
    return {"features": looks, "subjects": subjects, "text": torch.ones(len(examples), 1, 16)}


def test_views_of_subjects_are_drawn_together(folder, tmp_path):
    pipe = make(folder)
    custom = made(pipe, [[4]]).requires_grad_()
    start = {name: p.detach().clone() for name, p in custom.state_dict().items()}
    term = MultilevelContrast(custom, describe, scales=[1.0, 0.5], weight=0.3)

    def now(learner):
        with learner._training():
            learner.losses(views(), torch.tensor([5, 200, 500, 900]), torch.Generator().manual_seed(0))
            return {name: value.detach() for name, value in term.levels().items()}

    with Personalize(pipe, train="none", terms=[term]) as learner:
        before = now(learner)
        subjects = torch.tensor([0, 0, 1, 1])
        each = [contrast(look, subjects) for look in custom.appearance()]
        torch.testing.assert_close(before["appearance"], each[0] + 0.5 * each[1])
        history = learner.fit(lambda step, generator: views(), 6, lr=1e-2)
        after = now(learner)
    assert set(history[0]) == {"noise", "contrast", "loss"}
    assert all(after[name] < before[name] - 0.01 for name in before)
    # All parts learn, those that only the noise reaches as well.
    assert [name for name, p in custom.state_dict().items() if torch.equal(p, start[name])] == []
    assert torch.equal(copy.deepcopy(custom).encoder.look.latents, custom.encoder.look.latents)
    torch.save(custom.state_dict(), tmp_path / "custom.pt")
    kept = made(pipe, [[4]], seed=9)
    kept.load_state_dict(torch.load(tmp_path / "custom.pt"))
    outs = []
    for one in (custom, kept):
        with attnlib.attach(pipe, one.requires_grad_(False).refer(features())):
            outs.append(pipes.sample(pipe, "a photo of two", steps=1))
    assert torch.equal(*outs)


def test_bad_input_is_refused(pipe, folder):
    encoder = SubjectEncoder(8, 16, layers=7, scales=2, **SMALL)
    custom = made(pipe)
    for error, message, call in [
        (ValueError, "give features", lambda: CustomContrast.of(pipe)),
        (TypeError, "words must name the word of each", lambda: CustomContrast.of(pipe, encoder, words="circle")),
        (TypeError, "project", lambda: CustomContrast.of(pipe, torch.nn.Linear(8, 16))),
        (ValueError, "strength", lambda: CustomContrast.of(pipe, encoder, strength=1.5)),
        (ValueError, "no attn_processors", lambda: CustomContrast.of(pipes.dit(), features=8)),
        (ValueError, "text must be", lambda: custom.refer(features(), text=torch.zeros(1, 2, 1, 16))),
        (ValueError, "images must be a tensor", lambda: custom.refer([list(features()[0])])),
        (ValueError, "weight to each of 2 scales", lambda: MultilevelContrast(custom, describe, scales=[1.0])),
        (TypeError, "describe must be a function", lambda: MultilevelContrast(custom, None)),
    ]:
        with pytest.raises(error, match=message):
            call()
    with attnlib.attach(pipe, made(pipe)), pytest.raises(RuntimeError, match="has no references"):
        pipes.sample(pipe, PROMPT, steps=1)
    with attnlib.attach(pipe, made(pipe).refer(features())), pytest.raises(ValueError, match="is not in the prompt"):
        pipes.sample(pipe, "a dog", steps=1)
    with attnlib.attach(pipe, made(pipe).refer(features(1, 2))), pytest.raises(ValueError, match="names 1 references"):
        pipes.sample(pipe, PROMPT, steps=1)
    unet = pipe.unet
    with attnlib.attach(unet, made(unet).refer(features())), pytest.raises(ValueError, match="prompts that are not"):
        unet(torch.randn(1, 4, 16, 16), 3, torch.randn(1, 7, 16))
    with attnlib.attach(pipe, made(pipe, [[99]]).refer(features())), pytest.raises(ValueError, match="names token 99"):
        pipes.sample(pipe, PROMPT, steps=1)
    term = MultilevelContrast(made(pipe, [[4]]).requires_grad_(), lambda examples: describe(examples[:1]))
    with Personalize(make(folder), train="none", terms=[term]) as learner:
        with pytest.raises(ValueError, match="features and subjects of 4 examples, got 1"):
            learner.fit(lambda step, generator: views(), 1)
        with pytest.raises(ValueError, match="leave priors out"):
            learner.fit([*views(), Example(image(), "a cat", prior=True)], 1)
