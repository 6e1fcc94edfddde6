"""Personalisation of whole pipelines: what is trained, held to diffusers' own processors, and what diffusers loads."""

import copy

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers.models.attention_processor import CustomDiffusionAttnProcessor  # noqa: E402

import attnlib  # noqa: E402
from attnlib.steer import AStar, Personalize, load_personalized  # noqa: E402
from attnlib.steer.diffusion import personalize  # noqa: E402
from attnlib.steer.diffusion.personalize import Draws, Example, OfMaps, Seen, Term, noise_loss  # noqa: E402
from hooks import pipes  # noqa: E402

PROMPT = "a photo of <new1> cat"


def make(folder, kind=pipes.stable_diffusion, **settings):
    """A pipeline with tokenizers of its own, which new tokens may be added to."""
    pipe = kind(folder, **settings)
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
    if getattr(pipe, "tokenizer_2", None) is not None:
        pipe.tokenizer_2 = copy.deepcopy(pipe.tokenizer_2)
    return pipe


def image(seed=0, size=16):
    return torch.rand(3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def examples(mask=True):
    half = torch.zeros(16, 16)
    half[:, :8] = 1
    return [
        Example(image(), PROMPT, half if mask else None), Example(image(1), "a cat and a <new1> cat"),
        Example(image(2), "a cat", prior=True),
    ]  # fmt: skip


def state(pipe):
    parts = (pipe.unet, pipe.text_encoder, getattr(pipe, "text_encoder_2", None))
    return [{k: v.clone() for k, v in part.state_dict().items()} for part in parts if part is not None]


def same(a, b):
    return all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True))


# ---- the loss


def test_noise_loss_is_the_equation():
    torch.manual_seed(0)
    a, b, mask = torch.randn(2, 3, 4, 5).double(), torch.randn(2, 3, 4, 5).double(), torch.rand(2, 4, 5).double()
    inside = (torch.rand(2, 4, 5) > 0.5).double()
    for n in range(2):
        places = [(i, j) for i in range(4) for j in range(5)]
        errors = {p: sum((a[n, c][p] - b[n, c][p]).item() ** 2 for c in range(3)) for p in places}
        total = mask[n].sum().item()
        plain = sum(errors.values()) / 60
        masked = sum(mask[n][p].item() * errors[p] for p in places) / total
        within = sum(mask[n][p].item() * inside[n][p].item() ** 2 * errors[p] for p in places) / total
        assert noise_loss(a, b)[n].item() == pytest.approx(plain, abs=1e-12)
        assert noise_loss(a, b, mask)[n].item() == pytest.approx(masked / 3, abs=1e-12)
        assert noise_loss(a, b, mask, inside)[n].item() == pytest.approx(within / 3, abs=1e-12)
        assert noise_loss(a, b, mask, inside, channels="sum")[n].item() == pytest.approx(within, abs=1e-12)
    with pytest.raises(ValueError, match="mask leaves nothing of an example"):
        noise_loss(a, b, torch.zeros(2, 4, 5))
    with pytest.raises(ValueError, match=r"target must have shape \(B=2, C=3, h=4, w=5\)"):
        noise_loss(a, b[..., :2])


# ---- the loop, held to one by hand


def first_token_detached(module, args, out):
    return torch.cat([out[:, :1].detach(), out[:, 1:]], 1)


def by_hand(pipe, drawn, steps, lr, kind, train="kv", self_attention=False):
    """Training with diffusers' processors and the whole table of embeddings, of which other rows get no gradient.

    They know keys and values, alone or with queries and outputs; others are the model's own parameters by their names,
    as in DisenDiff's and AttenCraft's settings.
    """
    unet, encoder, tokenizer = pipe.unet, pipe.text_encoder, pipe.tokenizer
    tokenizer.add_tokens("<new1>")
    new = tokenizer.convert_tokens_to_ids("<new1>")
    encoder.resize_token_embeddings(new + 1, mean_resizing=False)
    table = encoder.get_input_embeddings().weight
    with torch.no_grad():
        table[new] = table[tokenizer("cat", add_special_tokens=False)["input_ids"]].mean(0)
    processors, plain = {}, train not in ("kv", "qkvo") or self_attention
    if plain:
        unet.requires_grad_(False)
        parts = {"q": "to_q.", "k": "to_k.", "v": "to_v.", "o": "to_out."}
        for name, p in unet.named_parameters():
            block, _, rest = name.partition(".attn2." if ".attn2." in name else ".attn1.")
            if rest and (self_attention or ".attn2." in name) and rest.startswith(tuple(parts[w] for w in train)):
                key = f"{block}.{'attn2' if '.attn2.' in name else 'attn1'}.processor"
                part, _, last = rest.rpartition(".")
                head, dot, number = part.partition(".")
                processors.setdefault(key, {})[f"{head}_custom_diffusion{dot}{number}.{last}"] = p.requires_grad_()
        for name, module in unet.named_modules():
            if name.endswith((".attn2.to_k", ".attn2.to_v")):
                module.register_forward_hook(first_token_detached)
    for name in () if plain else unet.attn_processors:
        attn = unet.get_submodule(name.removesuffix(".processor"))
        if not attn.is_cross_attention:
            processors[name] = CustomDiffusionAttnProcessor(train_kv=False, train_q_out=False)
            continue
        width, dim = attn.to_k.weight.shape
        processors[name] = one = CustomDiffusionAttnProcessor(True, train == "qkvo", width, dim).double()
        one.to_k_custom_diffusion.weight.data = attn.to_k.weight.data.clone()
        one.to_v_custom_diffusion.weight.data = attn.to_v.weight.data.clone()
        if train == "qkvo":
            one.to_q_custom_diffusion.weight.data = attn.to_q.weight.data.clone()
            one.to_out_custom_diffusion[0].weight.data = attn.to_out[0].weight.data.clone()
            one.to_out_custom_diffusion[0].bias.data = attn.to_out[0].bias.data.clone()
    if not plain:
        unet.set_attn_processor(dict(processors))  # which empties it
    named = processors if plain else {name: dict(one.named_parameters()) for name, one in processors.items()}
    own = [p for one in named.values() for p in one.values()]
    optimizer = torch.optim.AdamW([{"params": own}, {"params": [table], "lr": 3 * lr}], lr=lr, weight_decay=0)
    levels = personalize._noise_plan(pipe).alphas_cumprod.double()
    for step in range(steps):
        generator = torch.Generator().manual_seed(7 * 1_000_003 + step)
        batch = drawn(step, generator)
        t = torch.randint(0, 1000, (len(batch),), generator=generator)
        found = pipe.vae.encode(torch.stack([e.image for e in batch]).double()).latent_dist
        z = found.mean + found.std * torch.randn(found.mean.shape, generator=generator).double()
        z = z.detach() * pipe.vae.config.scaling_factor
        noise = torch.randn(z.shape, generator=generator).double()
        a, b = levels[t].sqrt().view(-1, 1, 1, 1), (1 - levels[t]).sqrt().view(-1, 1, 1, 1)
        target = {"epsilon": noise, "sample": z, "v_prediction": a * noise - b * z}[kind]
        tokens = tokenizer([e.prompt for e in batch], padding="max_length", max_length=77, return_tensors="pt")
        out = unet(a * z + b * noise, t, encoder(tokens["input_ids"])[0]).sample
        error = (out - target).square().mean(1)
        losses = []
        for e, one in zip(batch, error, strict=True):
            mask = torch.ones(16, 16) if e.mask is None else e.mask
            losses.append((one * mask).sum() / mask.sum())
        count = sum(not e.prior for e in batch)
        loss = torch.stack(losses[:count]).mean() + 0.5 * torch.stack(losses[count:]).mean()
        optimizer.zero_grad()
        loss.backward()
        table.grad[:new] = 0
        torch.nn.utils.clip_grad_norm_([*own, table], 1.0)
        optimizer.step()
    return {name: one for name, one in named.items() if one}, table.detach()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_training_is_that_of_diffusers_processors(folder, kind):
    plan = pipes.scheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=kind)
    pipe, other = make(folder, plan=plan), make(folder, plan=plan)
    for p in (pipe, other):
        for part in (p.unet, p.text_encoder, p.vae):
            part.double()
    some, steps = examples(mask=kind == "epsilon"), 3 if kind == "epsilon" else 1
    drawn = Draws(some[:2], some[2:], batch=2)
    learner = Personalize(pipe, {"<new1>": "cat"}, prior_weight=0.5)
    told: list[tuple[int, float]] = []
    history = learner.fit(
        drawn,
        steps,
        lr=1e-2,
        token_lr=3e-2,
        weight_decay=0,
        seed=7,
        progress=lambda step, loss: told.append((step, loss)),
    )
    assert [step for step, _ in told] == list(range(1, steps + 1)) and told[-1][1] == history[-1]["loss"]
    assert set(history[0]) == {"noise", "prior", "loss"}
    processors, table = by_hand(other, drawn, steps, 1e-2, kind)
    assert len(processors) == 7
    ours = learner._custom_diffusion()
    for name, weights in processors.items():
        for key, value in weights.items():
            start = pipe.unet.get_submodule(f"{name.removesuffix('.processor')}.{key[:4]}").weight
            assert (value - start).abs().max() > 1e-3
            torch.testing.assert_close(ours[f"{name}.{key}"], value, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(learner.rows["clip_l"].rows[0], table[-1], atol=1e-9, rtol=1e-9)
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[:-1], table[:-1])


@pytest.mark.parametrize(
    ("train", "self_attention", "layers", "values"),
    [("qkvo", False, 7, 5), ("k", False, 7, 1), ("qkv", False, 7, 3), ("qkv", True, 14, 3), ("vo", False, 7, 3)],
)
def test_other_projections_are_trained_by_their_letters(folder, tmp_path, train, self_attention, layers, values):
    """Settings of DisenDiff (k, kv, qkv, qkv of both kinds, all) and of AttenCraft (any of them), saved and merged."""
    pipe, other, third = make(folder), make(folder), make(folder)
    for p in (pipe, other, third):
        for part in (p.unet, p.text_encoder, p.vae):
            part.double()
    some = examples(mask=False)
    drawn = Draws(some[:2], some[2:], batch=2)
    learner = Personalize(pipe, {"<new1>": "cat"}, train, prior_weight=0.5, self_attention=self_attention)
    learner.fit(drawn, 1, lr=1e-2, token_lr=3e-2, weight_decay=0, seed=7)
    processors, table = by_hand(other, drawn, 1, 1e-2, "epsilon", train, self_attention)
    ours = learner._custom_diffusion()
    assert len(processors) == layers and sum(v.numel() > 0 for v in ours.values()) == layers * values
    for name, weights in processors.items():
        assert len(weights) == values
        for key, value in weights.items():
            torch.testing.assert_close(ours[f"{name}.{key}"], value.detach(), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(learner.rows["clip_l"].rows[0], table[-1], atol=1e-9, rtol=1e-9)
    learner.save(tmp_path)
    learner.merge()
    load_personalized(third, tmp_path)
    assert same([third.unet.state_dict()], [pipe.unet.state_dict()])
    assert not same([make(folder).unet.double().state_dict()], [pipe.unet.state_dict()])
    if train == "qkvo":
        fourth = make(folder)
        fourth.unet.double().load_attn_procs(str(tmp_path), weight_name=personalize.KV_FILE, _pipeline=fourth)
        given = dict(encoder_hidden_states=torch.randn(1, 5, 16).double(), timestep=torch.tensor(3))
        z = torch.randn(1, 4, 16, 16).double()
        torch.testing.assert_close(
            fourth.unet.double()(z, **given).sample, pipe.unet(z, **given).sample, atol=1e-5, rtol=1e-5
        )


def test_only_what_is_new_changes_and_closing_takes_it_off(folder):
    pipe = make(folder)
    before, plain = state(pipe), pipes.sample(pipe, steps=1)
    for train in ("kv", "lora", "none"):
        random = torch.get_rng_state()
        with Personalize(pipe, {"<new1>": "cat"}, train) as learner:
            assert torch.equal(pipes.sample(pipe, steps=1), plain)  # nothing is learnt yet
            learner.fit(examples()[:1], 1, lr=1e-2)
            assert torch.equal(random, torch.get_rng_state())
            table = pipe.text_encoder.get_input_embeddings().weight
            assert torch.equal(table[:-1], before[1]["embeddings.token_embedding.weight"]) and table.requires_grad
            moved = pipes.sample(pipe, "a <new1> square", steps=1)
            assert torch.equal(pipes.sample(pipe, steps=1), plain) is (train == "none")
            assert not any(p.grad is not None for p in pipe.text_encoder.parameters())
        assert torch.equal(pipes.sample(pipe, steps=1), plain)
        assert not torch.equal(pipes.sample(pipe, "a <new1> square", steps=1), moved)
        pipe.unload_textual_inversion("<new1>")
        assert same(state(pipe), before)
        with pytest.raises(ValueError, match="closed"):
            learner.fit(examples(), 1)


# ---- what diffusers loads


@pytest.mark.parametrize("kind", ["stable_diffusion", "sdxl"])
@pytest.mark.parametrize("train", ["kv", "lora"])
def test_diffusers_loads_what_was_saved(folder, tmp_path, kind, train):
    builder = getattr(pipes, kind)
    pipe = make(folder, builder)
    prompt, given = "a <new1> and a square", {"steps": 1}
    plain = pipes.sample(pipe, "a cat and a square", **given)
    size = 16 if kind == "stable_diffusion" else pipe.unet.config.sample_size * pipe.vae_scale_factor
    some = [Example(image(size=size), PROMPT), Example(image(1, size), "a cat", prior=True)]
    learner = Personalize(pipe, {"<new1>": "cat"}, train, rank=2, alpha=3)
    learner.fit(some, 1, lr=3e-2)
    names = [file.name for file in learner.save(tmp_path)]
    first = personalize.KV_FILE if train == "kv" else "pytorch_lora_weights.safetensors"
    assert names == [first, "new1-0.safetensors", "personalized.json"]
    learnt = pipes.sample(pipe, prompt, **given)
    assert (learnt - plain).abs().max() > 2e-3

    ours = make(folder, builder)
    random = torch.get_rng_state()
    assert load_personalized(ours, tmp_path) == ["<new1>"]
    if train == "kv":
        assert torch.equal(random, torch.get_rng_state())
    torch.testing.assert_close(pipes.sample(ours, prompt, **given), learnt, atol=1e-5, rtol=1e-5)

    theirs = make(folder, builder)
    if train == "kv":
        theirs.unet.load_attn_procs(str(tmp_path), weight_name=personalize.KV_FILE, _pipeline=theirs)
        assert {type(p) for p in theirs.unet.attn_processors.values()} == {CustomDiffusionAttnProcessor}
    else:
        theirs.load_lora_weights(str(tmp_path), weight_name="pytorch_lora_weights.safetensors")
    file = tmp_path / "new1-0.safetensors"
    if kind == "sdxl":
        from safetensors.torch import load_file

        found = load_file(file)
        assert set(found) == {"clip_l", "clip_g"}
        for key, end in (("clip_l", ""), ("clip_g", "_2")):
            parts = {"tokenizer": getattr(theirs, "tokenizer" + end)}
            parts["text_encoder"] = getattr(theirs, "text_encoder" + end)
            theirs.load_textual_inversion(found[key], token="<new1>", **parts)
    else:
        theirs.load_textual_inversion(str(file))
    torch.testing.assert_close(pipes.sample(theirs, prompt, **given), learnt, atol=2e-4, rtol=1e-4)

    learner.merge()
    assert not getattr(pipe.unet, "peft_config", None)
    torch.testing.assert_close(pipes.sample(pipe, prompt, **given), learnt, atol=2e-4, rtol=1e-4)


def test_loading_refuses_what_does_not_fit(folder, tmp_path):
    with pytest.raises(ValueError, match="holds nothing that Personalize"):
        load_personalized(make(folder), tmp_path)
    learner = Personalize(make(folder), {"<new1>": "cat"})
    learner.save(tmp_path)
    with pytest.raises(ValueError, match="another U-Net"):
        load_personalized(make(folder, model=pipes.unet(block_out_channels=(16, 64))), tmp_path)


def test_what_was_learnt_serves_whatever_attaches(folder, tmp_path):
    pipe = make(folder, plan=pipes.scheduler("EulerDiscreteScheduler"))
    with Personalize(pipe, {"<new1>": "cat"}) as learner:
        learner.fit(examples(), 1, lr=1e-2)
        learner.save(tmp_path)
    pipe.unload_textual_inversion("<new1>")
    load_personalized(pipe, tmp_path)
    prompt, given = "a <new1> cat and a blue square", {"num_images_per_prompt": 2, "steps": 2}
    plain = pipes.sample(pipe, prompt, **given)
    with attnlib.attach(pipe, AStar(("<new1>", "square"), step_size=60.0, targets=None, resolution=8)):
        moved = pipes.sample(pipe, prompt, **given)
    assert plain.shape == moved.shape and len(plain) == 2 and not torch.equal(plain, moved)


# ---- going on


def test_interrupted_training_goes_on_to_the_same_weights(folder, tmp_path):
    class Counts(Term):
        """A term that keeps something."""

        name = "counts"
        count = 0

        def begin(self, learner, examples, generator):
            self.count = 100

        def __call__(self, seen):
            return torch.zeros(())

        def after(self, seen):
            self.count += len(seen.examples)

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state):
            self.count = state["count"]

    def run(steps, file, stop=None):
        learner = Personalize(make(folder), {"<new1>": "cat"}, terms=[Counts()])
        some = [Example(image(), PROMPT), Example(image(1), "a <new1>")]

        def tell(step, loss):
            if step == stop:
                raise KeyboardInterrupt

        error = None
        try:
            learner.fit(some, steps, lr=1e-2, accumulate=2, checkpoint=file, every=1, progress=tell)
        except KeyboardInterrupt as e:
            error = e
        assert (error is not None) is (stop is not None)
        return learner

    whole = run(3, tmp_path / "whole.pt")
    run(3, tmp_path / "part.pt", stop=2)
    assert len(torch.load(tmp_path / "part.pt")["history"]) == 1
    part = run(3, tmp_path / "part.pt")
    assert whole.history == part.history and len(part.history) == 3
    for name, p in whole.parameters().items():
        assert torch.equal(p, part.parameters()[name]), name
    assert part.terms[0].count == whole.terms[0].count == 106
    other = Counts()
    other.weight = 2.0
    for what, settings, given in (
        ("lr", {}, {"lr": 2e-2}),
        ("weight_decay", {}, {"weight_decay": 0.0}),
        ("clip", {}, {"clip": None}),
        ("prior_weight", {"prior_weight": 0.5}, {}),
        ("detach_first", {"detach_first": False}, {}),
        ("weights", {"terms": [other]}, {}),
    ):
        learner = Personalize(make(folder), {"<new1>": "cat"}, **{"terms": [Counts()], **settings})
        with pytest.raises(ValueError, match=f"written by another training: {what}$"):
            learner.fit(examples(), 3, **{"lr": 1e-2, "accumulate": 2, "checkpoint": tmp_path / "part.pt", **given})


def test_an_error_in_mid_step_leaves_everything(folder):
    pipe = make(folder)
    plain, flags = pipes.sample(pipe, steps=1), [p.requires_grad for p in pipe.unet.parameters()]

    def broken(seen):
        raise RuntimeError("in mid-step")

    with Personalize(pipe, {"<new1>": "cat"}, terms=[broken]) as learner, pytest.raises(RuntimeError, match="mid-step"):
        pipe.unet.train()
        learner.fit(examples(), 1)
    assert pipe.unet.training and [p.requires_grad for p in pipe.unet.parameters()] == flags
    pipe.unet.eval()
    assert torch.equal(pipes.sample(pipe, steps=1), plain)
    with attnlib.attach(pipe, attnlib.hooks.Maps(8)):
        pass  # no session was left behind


# ---- terms


def test_terms_read_maps_with_gradient(folder):
    pipe, gradients = make(folder), {}
    term = OfMaps(lambda seen: (seen.maps["text"][:, 2:5] ** 2).sum() * 50, {"text": 8, "image": 8}, weight=2.0)
    for first in (True, False):
        with Personalize(pipe, {"<new1>": "cat"}, terms=[term], detach_first=first) as learner:
            with learner._training():
                generator = torch.Generator().manual_seed(0)
                found = learner.losses(examples(), torch.tensor([5, 300, 700]), generator)
                assert torch.equal(found["loss"], found["noise"] + found["prior"] + 2 * found["maps"])
                names = list(learner.parameters())
                gradients[first] = dict(
                    zip(names, torch.autograd.grad(found["maps"], learner.parameters().values(), allow_unused=True),
                        strict=True)
                )  # fmt: skip
        pipe.unload_textual_inversion("<new1>")
    deepest = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    assert gradients[True][deepest].abs().max() > 0 and gradients[True]["tokens.clip_l"].abs().max() > 0
    assert not torch.equal(gradients[True][deepest], gradients[False][deepest])
    last = [n for n in gradients[True] if n.startswith("unet.up_blocks.1") and n.endswith("to_v")][-1]
    assert gradients[True][last] is None  # the last values are behind all maps at 8


def test_spans_are_found_given_or_absent(folder):
    pipe = make(folder)
    rows = [
        Example(image(), "a cat and a blue square"), Example(image(), "a photo of two", spans={"subject": [2, 3]})
    ]  # fmt: skip
    seen = Seen({}, rows, 0, pipe)
    assert seen.span(0, "blue square") == [5, 6] and seen.span(1, "cat") is None
    assert seen.span(1, "subject") == [2, 3] and seen.span(0, "subject") is None and seen.span(0, [4]) == [4]
    with pytest.raises(ValueError, match="'a' is 2 times in the prompt"):
        seen.span(0, "a")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("train", ["kv", "lora"])
def test_half_precision_learns_in_single(folder, dtype, train):
    pipe = make(folder)
    pipe.unet.to(dtype), pipe.text_encoder.to(dtype), pipe.vae.to(dtype)
    term = OfMaps(lambda seen: seen.maps["text"].square().mean(), {"text": 8})
    with Personalize(pipe, {"<new1>": "cat"}, train, terms=[term]) as learner:
        learner.fit(examples(), 1, lr=1e-2, loss_scale=8.0)
        assert {p.dtype for p in learner.parameters().values()} == {torch.float32}
        assert pipes.sample(pipe, "a <new1> square", steps=1).isfinite().all()


def test_priors_are_what_the_pipeline_draws(folder):
    pipe = make(folder)
    some = personalize.prior_examples(pipe, "a cat", 2, seed=5, num_inference_steps=1)
    assert len(some) == 2 and all(e.prior and e.prompt == "a cat" for e in some)
    assert not torch.equal(some[0].image, some[1].image) and some[0].image.abs().max() <= 1
    again = personalize.prior_examples(pipe, "a cat", 1, seed=6, num_inference_steps=1)
    assert torch.equal(again[0].image, some[1].image)


# ---- bad input


def test_bad_input_is_refused(folder):
    pipe = make(folder)
    before = len(pipe.tokenizer)
    cases = [
        (TypeError, "must be a diffusers pipeline", lambda: Personalize(pipe.unet)),
        (ValueError, "predicts a flow", lambda: Personalize(pipes.sd3()[0])),
        (TypeError, "no conditional U-Net", lambda: Personalize(pipes.dit())),
        (ValueError, "nothing to train", lambda: Personalize(pipe, train="none")),
        (ValueError, "train='vk' is not possible", lambda: Personalize(pipe, train="vk")),
        (
            ValueError,
            "train='none' trains nothing",
            lambda: Personalize(pipe, {"<n>": None}, "none", self_attention=True),
        ),
        (ValueError, "'cat', which .* knows already", lambda: Personalize(pipe, {"cat": None})),
        (ValueError, "a token is one word", lambda: Personalize(pipe, {"two words": None})),
        (TypeError, "from which word each starts", lambda: Personalize(pipe, "<new1>")),
        (ValueError, "layer 'nowhere", lambda: Personalize(pipe, layers=["nowhere*"])),
        (ValueError, "mask leaves nothing", lambda: Example(image(), "a cat", torch.zeros(4, 4))),
        (ValueError, r"mask must be \(h, w\)", lambda: Example(image(), "a cat", torch.ones(1, 4, 4))),
        (ValueError, r"image must be \(C, H, W\)", lambda: Example(image()[0], "a cat")),
        (ValueError, "examples is empty", lambda: Draws([])),
        (ValueError, "prior=True", lambda: Draws([examples()[2]])),
        (TypeError, "function must be callable", lambda: OfMaps(3)),
        (TypeError, "reads must be Mapping", lambda: OfMaps(len, reads=16)),
        (TypeError, "examples must be", lambda: Draws(5)),
        (TypeError, "terms must be", lambda: Personalize(pipe, terms=5)),
        (TypeError, "regions must be", lambda: Example(image(), "a cat", regions=torch.ones(4, 4))),
        (TypeError, "pipe must be", lambda: personalize.prior_examples(pipe.unet, "a cat", 1)),
        (TypeError, "pipe must be", lambda: load_personalized(pipe.unet, "nowhere")),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
    assert len(pipe.tokenizer) == before
    with Personalize(pipe, {"<new1>": "cat"}) as learner:
        with pytest.raises(TypeError, match="examples must be a sequence of Example"):
            learner.fit([image()], 1)
        with pytest.raises(ValueError, match="all priors"):
            learner.fit(lambda step, generator: examples()[2:], 1)
        with pytest.raises(ValueError, match="of one size"):
            learner.fit(lambda step, generator: [examples()[0], Example(image(size=32), "a cat")], 1)
        for span in ((500, 2000), (500,)):
            with pytest.raises(ValueError, match="timesteps must be two numbers"):
                learner.fit(examples(), 1, timesteps=span)
        for name, value in (("weight_decay", -1.0), ("token_lr", 0.0), ("clip", 0.0)):
            with pytest.raises(ValueError, match=f"{name} must be"):
                learner.fit(examples(), 1, **{name: value})
        learner.terms = [OfMaps(lambda seen: seen.maps["text"].sum() * float("nan"), {"text": 8})]
        with pytest.raises(ValueError, match="at step 0 the loss is not finite"):
            learner.fit(examples(), 1)
        learner.terms = [OfMaps(lambda seen: seen.maps["text"].sum(), {"text": 5})]
        with pytest.raises(RuntimeError, match="no attention to the text was seen at resolution 5"):
            learner.fit(examples(), 1)
    pipe.unet.add_adapter(__import__("peft").LoraConfig(target_modules=["to_k"]), "other")
    with pytest.raises(ValueError, match="has adapters already"):
        Personalize(pipe, train="lora")
    with pytest.raises(ValueError, match="takes plain linear layers"):
        Personalize(pipe)
