"""GILL: maps around a frozen language model against the authors' class; drawing, looking up, writing; bad input."""

import json

import pytest
import torch
import torch.nn.functional as F
from parity import HERE, synthetic
from safetensors import safe_open

from attnlib.models.diffusion.gill import DECISIONS, GILL, GILLMapper
from tests.hooks.pipes import scheduler, stable_diffusion, unet

transformers = pytest.importorskip("transformers")
with safe_open(HERE / "gill.safetensors", "pt") as f:
    HELD = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    SAID = {k: json.loads(f.metadata()[k]) for k in ("shapes", "lm", "opt", "runs")}
with safe_open(HERE / "gill-modes.safetensors", "pt") as f:
    MODES = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    MODES_SAID = {"shapes": json.loads(f.metadata()["shapes"])}
PAD = 1
TOKENS = (40, 41, 42)


def language_model(**more):
    torch.manual_seed(0)
    return transformers.OPTForCausalLM(transformers.OPTConfig(**SAID["opt"] | more)).eval()


def small(lm=None, **more):
    settings = dict(vision_dim=12, num_tokens=4, retrieval_dim=6, visual_tokens=2, hidden=32)
    torch.manual_seed(1)
    return GILL(language_model() if lm is None else lm, TOKENS, **settings | more)


@pytest.fixture(scope="module")
def released():
    """With the authors' weights, in float64."""
    lm = language_model()
    weights = synthetic(SAID["lm"])
    lm.load_state_dict(weights | {"lm_head.weight": weights["model.decoder.embed_tokens.weight"]})
    made = small(lm)
    theirs = synthetic(SAID["shapes"]) | {"logit_scale": torch.tensor(2.3)}
    held = GILL.convert_state_dict({f"module.model.{k}": v for k, v in theirs.items()}, 3)
    own = {k: v for k, v in made.state_dict().items() if k.startswith("decision")}  # trained and kept apart
    made.load_state_dict(held | own)
    lm.double()
    return made.double().train()


def test_the_mappers_size_is_the_papers():
    with torch.device("meta"):
        made = GILLMapper(4096)
    assert sum(p.numel() for p in made.parameters()) == 31_958_784
    with torch.device("meta"):
        lm = transformers.OPTForCausalLM(
            transformers.OPTConfig(vocab_size=50, hidden_size=4096, word_embed_proj_dim=4096, ffn_dim=8,
                                   num_hidden_layers=1, num_attention_heads=32)
        )  # fmt: skip
        lm.tie_weights()
        whole = GILL(lm, range(50, 58))
    sizes = {
        n: sum(p.numel() for p in getattr(whole, n).parameters()) for n in ("retrieval", "visual", "visual_retrieval")
    }  # noqa: E501
    assert sizes == {"retrieval": 1_048_832, "visual": 16_793_600, "visual_retrieval": 262_400}
    assert whole.image_tokens.numel() == 8 * 4096 and whole.image_outputs is None


@pytest.mark.parametrize("mode", ["caption", "retrieval", "generation"])
def test_losses_and_gradients_equal_the_authors(mode, released):
    close = dict(atol=1e-9, rtol=1e-9)
    # transformers computes the loss over tokens in float32, whose sums differ by processor: what comes through it does.
    single = dict(atol=1e-7, rtol=1e-6)
    released.zero_grad()
    ids, features = HELD["ids"], HELD["features"]
    if mode == "caption":
        total = released.caption_loss(features, ids, PAD)
        torch.testing.assert_close(total.reshape(1), HELD["caption/tokens"], **single)
    else:
        given = {"features": features} if mode == "retrieval" else {"target": HELD["target"]}
        found = released.losses(ids, PAD, **given)
        assert found.keys() == {"tokens", mode}
        torch.testing.assert_close(found["tokens"].reshape(1), 0.5 * HELD[f"{mode}/tokens"], **single)
        torch.testing.assert_close(found[mode].reshape(1), HELD[f"{mode}/loss"], **close)
        total = sum(found.values())
    total.backward()
    torch.testing.assert_close(released.image_tokens.grad, HELD[f"{mode}/tokens_grad"], **single)
    names = {"visual_embeddings": "visual", "visual_fc": "visual_retrieval"}
    for name in (k for k in HELD if k.startswith(f"{mode}/dw/")):
        path = name.removeprefix(f"{mode}/dw/").replace("ret_text_hidden_fcs.0.model", "retrieval")
        path = path.replace("gen_text_hidden_fcs.0", "mapper")
        head = path.partition(".")[0]
        own = released.get_parameter(path.replace(head, names.get(head, head), 1))
        torch.testing.assert_close(own.grad, HELD[name], **(single if mode == "caption" else close))
    assert all(p.grad is None for p in released.lm.parameters())


def of_mode(mode, **settings):
    """With the authors' weights, in float64: of a recording of other heads and language models."""
    shapes, narrow = MODES_SAID["shapes"], mode == "narrow"
    torch.manual_seed(0)
    lm = transformers.OPTForCausalLM(transformers.OPTConfig(**(shapes["narrow_opt"] if narrow else SAID["opt"]))).eval()
    weights = synthetic(shapes["narrow_lm" if narrow else "lm"])
    weights["model.decoder.embed_tokens.weight"] = weights["model.decoder.embed_tokens.weight"][:40]
    lm.load_state_dict(weights | {"lm_head.weight": weights["model.decoder.embed_tokens.weight"]})
    made = small(lm, out_dim=8, **{"num_tokens": 6} | settings)
    held = GILL.convert_state_dict(synthetic(shapes[mode]) | {"logit_scale": torch.tensor(2.3)}, 3)
    made.load_state_dict(held | {k: v for k, v in made.state_dict().items() if k.startswith("decision")})
    lm.double()
    return made.double().train()


@pytest.mark.parametrize(
    ("case", "heads", "options"),
    [
        ("swapped/generation", {"head": "linear", "retrieval_head": "transformer"}, {}),
        ("swapped/retrieval", {"head": "linear", "retrieval_head": "transformer"}, {}),
        ("narrow/captioning", {}, {}), ("narrow/generation", {}, {}),
        ("layers/generation", {"layers": (-1, 1)}, {}), ("layers/retrieval", {"layers": (-1, 1)}, {}),
        *((f"plain/{how}/{what}", {}, {how: True}) for how in ("pairs", "prefix")
          for what in ("captioning", "retrieval", "generation")),
    ],
)  # fmt: skip
def test_heads_pairs_and_prefixes_equal_the_authors(case, heads, options):
    """Either head linear or a transformer, captions two by two, words before, states narrower than layers."""
    made = of_mode(case.partition("/")[0], **heads)
    what = case.rpartition("/")[2]
    single = dict(atol=1e-6, rtol=1e-6)  # through transformers' loss in float32
    options = {k: torch.tensor([7, 8]) if k == "prefix" else True for k in options}
    ids, features = MODES["ids"], MODES["features"]
    if what == "captioning":
        total = made.caption_loss(features, ids, PAD, **options)
        torch.testing.assert_close(total.reshape(1), MODES[f"{case}/tokens"], **single)
    else:
        given = {"features": features} if what == "retrieval" else {"target": MODES["target"]}
        found = made.losses(ids, PAD, **given, **options)
        torch.testing.assert_close(found["tokens"].reshape(1), 0.5 * MODES[f"{case}/tokens"], **single)
        torch.testing.assert_close(found[what].reshape(1), MODES[f"{case}/loss"], atol=1e-9, rtol=1e-9)
        total = sum(found.values())
    total.backward()
    torch.testing.assert_close(made.image_tokens.grad, MODES[f"{case}/tokens_grad"], **single)
    theirs = {k.removeprefix(f"{case}/dw/"): v for k, v in MODES.items() if k.startswith(f"{case}/dw/")}
    deep = "retrieval_head" in heads
    alone = {"ret_text_hidden_fcs.0.query_embs": torch.zeros(0)} if deep else {}  # tells the converter which head
    named = GILL.convert_state_dict(alone | theirs, 3)
    assert len(theirs)
    for name, wanted in named.items():
        if wanted.numel():
            torch.testing.assert_close(made.get_parameter(name).grad, wanted, atol=1e-7, rtol=1e-6)


def test_likelihood_of_texts_and_images_equals_the_authors():
    made, features = of_mode("plain"), MODES["features"]
    parts = [features[:1], torch.tensor([[2, 5, 9]]), features[1:2], torch.tensor([[11, 4]])]
    torch.testing.assert_close(made.likelihood(parts).reshape(1), MODES["likelihood"], atol=1e-6, rtol=1e-6)


def test_drawings_are_ranked_and_prompts_are_lengthened():
    made = of_mode("plain").eval()
    states, features = torch.randn(1, 3, 16).double(), torch.randn(5, 12).double()
    order, cosines = made.best_of(states, features)
    wanted = F.cosine_similarity(made.retrieval(states[:, 0]), made.visual_retrieval(features), dim=-1)
    torch.testing.assert_close(cosines, wanted[order])
    assert bool((cosines[1:] <= cosines[:-1]).all()) and sorted(order.tolist()) == [0, 1, 2, 3, 4]
    both = of_mode("layers", layers=(-1, 1)).eval()
    written = both.write([torch.tensor([[2, 5, 9]])], 1, scale=1e6)
    assert written.states.shape == (1, 3, 32) and both.prompt_embeds(written.states).shape == (1, 6, 8)
    assert both.decide(written.states).shape == (1, 2)
    longer = made.prompt_embeds(states, 9)
    assert longer.shape == (1, 9, 8) and torch.equal(longer[:, :6], made.prompt_embeds(states))
    assert not bool(longer[:, 6:].any())


def test_states_and_prompts_equal_the_authors(released):
    states, _ = released.states_at(HELD["ids"])
    torch.testing.assert_close(states, HELD["states"], atol=1e-9, rtol=1e-9)
    prompt = released.prompt_embeds(states)
    torch.testing.assert_close(prompt.float(), HELD["generation/prompt"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("run", list(SAID["runs"]))
def test_writing_equals_the_authors(run, released):
    said = SAID["runs"][run]
    made = released.write(
        [HELD["features"][:1], torch.tensor([[2, 5, 9]])], said["max_len"], said.get("min_word_tokens", 0),
        said.get("gen_scale_factor", 1.0),
    )  # fmt: skip
    assert torch.equal(made.ids, HELD[f"write/{run}/ids"])
    images = int((made.ids == TOKENS[0]).sum())
    assert len(made.states) == images
    for i in torch.nonzero(made.ids == TOKENS[0]).flatten().tolist():  # forced, in order
        assert made.ids[i : i + 3].tolist() == list(TOKENS)
    if images:  # theirs has not read what its last step wrote
        theirs = HELD[f"write/{run}/states"]
        torch.testing.assert_close(made.states[: len(theirs)], theirs, atol=1e-9, rtol=1e-9)
        assert len(theirs) == images - 1


def test_drawing_and_stopping(released):
    g = torch.Generator().manual_seed(0)
    start = [torch.tensor([[2, 5, 9]])]
    drawn = released.write(start, 6, temperature=1.5, top_p=0.9, generator=g)
    again = released.write(start, 6, temperature=1.5, top_p=0.9, generator=g.manual_seed(0))
    assert torch.equal(drawn.ids, again.ids)
    greedy = released.write(start, 6).ids
    assert torch.equal(released.write(start, 6, temperature=5.0, top_p=1e-6).ids, greedy)
    stopped = released.write(start, 6, stop=int(greedy[2])).ids
    assert torch.equal(stopped, greedy[: greedy.tolist().index(int(greedy[2]))])


@pytest.mark.parametrize("width", [16, 24])
def test_prompts_of_any_width_in_a_pipeline(width, tmp_path):
    made = small(out_dim=width).eval()
    written = made.write([torch.tensor([[2, 5, 9]])], 1, scale=1e6)
    assert written.ids.tolist() == list(TOKENS)
    for plan in (None, scheduler("EulerDiscreteScheduler")):
        pipe = stable_diffusion(tmp_path, model=unet(cross=width), plan=plan)
        with torch.no_grad():
            prompt = made.prompt_embeds(written.states)
        given = dict(prompt_embeds=prompt, negative_prompt_embeds=torch.zeros_like(prompt), output_type="latent")
        images = pipe(num_inference_steps=2, num_images_per_prompt=2, **given).images
        assert images.shape[0] == 2 and bool(images.isfinite().all())


def test_looking_up_and_deciding():
    made = small().eval()
    states, features = torch.randn(3, 3, 16), torch.randn(5, 12)
    scores = made.scores(states, made.key(features))
    torch.testing.assert_close(scores.detach() * 0.07, F.cosine_similarity(
        made.retrieval(states[:, 0])[:, None], made.visual_retrieval(features)[None], dim=-1).detach())  # fmt: skip
    shares = made.decide(states)
    assert shares.shape == (3, len(DECISIONS)) and torch.allclose(shares.sum(1), torch.ones(3))


def test_it_learns_prompts_and_leaves_the_language_model():
    """Ten captions, each with a prompt of its own."""
    torch.manual_seed(0)
    made = small(language_model(init_std=0.5), out_dim=8, num_tokens=2, depth=1).train()
    before = {k: v.clone() for k, v in made.lm.state_dict().items()}
    words = torch.arange(10)[:, None] * torch.tensor([1, 3]) % 36 + 4
    ids = torch.cat([torch.full((10, 1), 2), words, torch.tensor(TOKENS).expand(10, 3)], 1)
    target = torch.randn(10, 2, 8)
    optimizer = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], 2e-3)
    losses = []
    for _ in range(160):
        found = made.losses(ids, PAD, target=target)
        optimizer.zero_grad()
        sum(found.values()).backward()
        optimizer.step()
        losses.append(float(found["generation"].detach()))
    assert losses[-1] < 0.1 * losses[0]
    assert all(torch.equal(v, before[k]) for k, v in made.lm.state_dict().items())
    assert not any(name.startswith("lm") for name in made.state_dict())


def test_a_loss_of_nothing_has_a_gradient_of_nothing():
    made = small(out_dim=8)
    ids = HELD["ids"]
    with torch.no_grad():
        target = made.prompt_embeds(made.states_at(ids)[0])
    loss = made.losses(ids, PAD, target=target)["generation"]
    loss.backward()
    assert float(loss.detach()) == 0 and all(bool(p.grad.isfinite().all()) for p in made.mapper.parameters())


def test_untied_models_have_outputs_of_their_own():
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    made = small(transformers.LlamaForCausalLM(config).eval())  # tokens inside its table
    found = made.losses(HELD["ids"], PAD, features=torch.randn(3, 12))
    sum(found.values()).backward()
    assert made.image_outputs.grad is not None and bool((made.image_outputs.grad[0] != 0).any())
    assert made.write([torch.tensor([[2, 5]])], 2, scale=1e6).ids.tolist() == [*TOKENS, *TOKENS]


def of_two_widths():
    lm = language_model()
    lm.lm_head = torch.nn.Linear(5, 40)
    return lm


def test_bad_input(released):
    made = small()
    ids = HELD["ids"]
    for call, message in (
        (lambda: small(hidden=30), "num_heads"), (lambda: GILL(language_model(), ()), "tokens"),
        (lambda: GILL(language_model(), (4, 4)), "tokens"), (lambda: GILL(torch.nn.Linear(2, 2), (4,)), "lm"),
        (lambda: GILL(of_two_widths(), (4,)), "several widths"), (lambda: small(head="mlp"), "head='mlp'"),
        (lambda: small(retrieval_head="mlp"), "retrieval_head"), (lambda: small(head="linear", out_dim=7), "count"),
        (lambda: made.losses(ids, PAD, features=torch.randn(3, 12), pairs=True), "even number of captions, got 3"),
        (lambda: made.caption_loss(torch.randn(3, 12), ids, PAD, ids), "prefix"),
        (lambda: small(layers=(5,)), "layers must be numbers from -3 to 2"), (lambda: small(layers=()), "layers"),
        (lambda: small(language_model(word_embed_proj_dim=8), layers=(1,)), "have states of 16, its embeddings 8"),
        (lambda: made.likelihood([]), "parts"), (lambda: made.best_of(torch.randn(2, 3, 16), ids), "states"),
        (lambda: made.prompt_embeds(torch.randn(1, 3, 16), 3), "length must be an integer of at least 4"),
        (lambda: made.embed(torch.tensor([[43]])), "43"), (lambda: made.states_at(ids[:, :6]), "once and in order"),
        (lambda: made.losses(ids, PAD), "target or features"),
        (lambda: made.losses(ids, PAD, target=torch.zeros(3, 5, 768)), "target"),
        (lambda: made.prompt_embeds(torch.randn(1, 2, 16)), "states"),
        (lambda: made.see(torch.randn(1, 5)), "features"), (lambda: made.embed(torch.tensor([[-1]])), "ids holds -1"),
        (lambda: made.query(torch.randn(1, 16)), "states"), (lambda: made.decide(torch.randn(1, 3, 5)), "states"),
        (lambda: made.key(torch.randn(1, 5)), "features"), (lambda: small(vision_dim=0), "vision_dim"),
        (lambda: made.scores(torch.randn(1, 3, 16), torch.randn(2, 5)), "keys"),
        (lambda: made.caption_loss(torch.randn(1, 12), ids, PAD), r"features.*B=3"),
        (lambda: made.losses(ids, PAD, features=torch.randn(1, 12)), r"features.*B=3"),
        (lambda: made.write([ids[:1]], 3, min_words=-1), "min_words"), (lambda: made.write(ids[:1], 3), r"parts\[0\]"),
        (lambda: made.write([], 3), "parts"), (lambda: made.write([ids], 3), "one sample"),
        (lambda: made.write([ids[:1]], 3, top_p=0.5), "temperature"), (lambda: made.write([ids[:1]], 0), "max_steps"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=message):
            call()
