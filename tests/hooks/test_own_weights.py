"""The model's own attention weights, whatever its kernel adds: recorded, scored by, edited, and refused where unknown.

Oracle: the maps that eager attention of transformers gives (``output_attentions``); where it has none, the outputs.
"""

import pytest
import torch

transformers = pytest.importorskip("transformers")

import attnlib  # noqa: E402
from attnlib import cache, look, reduce, steer  # noqa: E402
from attnlib.hooks import Intervention, MaskByType, Record, TokenTypes, bidirectional  # noqa: E402
from attnlib.hooks.call import weights_of  # noqa: E402
from attnlib.hooks.hf.names import reachable  # noqa: E402
from attnlib.hooks.site import Weighting  # noqa: E402
from attnlib.hooks.vision import VisionTower  # noqa: E402
from hooks.models import NoOp, predict  # noqa: E402
from hooks.test_protocol_torch import CALLS, SETTINGS, mha, tokens  # noqa: E402
from hooks.test_protocol_torch import run as run_mha  # noqa: E402

TINY = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, head_dim=8,
)  # fmt: skip
NARROW = {k: v for k, v in TINY.items() if k not in ("num_key_value_heads", "head_dim", "intermediate_size")}

#: What is called, how its tiny config is made, and which of its parts is looked at.
FAMILIES = {
    "llama": ("LlamaForCausalLM", TINY),
    "qwen2": ("Qwen2ForCausalLM", TINY),
    "qwen3": ("Qwen3ForCausalLM", TINY),
    "mistral": ("MistralForCausalLM", {**TINY, "sliding_window": 5}),
    "gemma2": ("Gemma2ForCausalLM", {**TINY, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 5,
                                    "sliding_window": 5}),
    "gemma3": ("Gemma3ForCausalLM", {**TINY, "sliding_window": 5, "query_pre_attn_scalar": 3,
                                    "layer_types": ["sliding_attention", "full_attention"]}),
    "gpt-oss": ("GptOssForCausalLM", {**TINY, "sliding_window": 5, "num_local_experts": 2,
                                     "num_experts_per_tok": 1}),
    "granite": ("GraniteForCausalLM", {**TINY, "attention_multiplier": 0.7}),
    "cohere": ("CohereForCausalLM", TINY),
    "gpt2": ("GPT2LMHeadModel", dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64,
                                    scale_attn_by_inverse_layer_idx=True, bos_token_id=1, eos_token_id=2)),
    "gpt-neox": ("GPTNeoXForCausalLM", {**NARROW, "intermediate_size": 48}),
    "phi": ("PhiForCausalLM", {**TINY, "partial_rotary_factor": 0.5}),
    "opt": ("OPTForCausalLM", {**NARROW, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bert": ("BertModel", {**NARROW, "intermediate_size": 48}),
    "t5-decoder": ("T5ForConditionalGeneration", dict(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2,
                                                     num_heads=4, pad_token_id=0, decoder_start_token_id=0)),
    "t5-encoder": ("T5EncoderModel", dict(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)),
}  # fmt: skip

#: Models that no adapter reaches: they call no function that could be replaced.
UNREACHABLE = {
    "bloom": ("BloomForCausalLM", dict(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)),
    "mpt": ("MptForCausalLM", dict(vocab_size=64, d_model=32, n_layers=2, n_heads=4, max_seq_len=64)),
    "gpt-neo": ("GPTNeoForCausalLM", dict(vocab_size=64, hidden_size=32, num_layers=2, num_heads=4,
                                          attention_types=[[["global", "local"], 1]], max_position_embeddings=64)),
}  # fmt: skip

#: Decoders with a layer that has no window, whose keys may be evicted.
DECODERS = [f for f in FAMILIES if f not in ("mistral", "bert", "t5-decoder", "t5-encoder")]


LARGE = ("q_proj.w", "k_proj.w", "c_attn.w", "query", "relative_attention", "Attention.q.", "Attention.k.", "sinks")


def build(family, implementation="eager"):
    name, settings = {**FAMILIES, **UNREACHABLE}[family]
    cls = getattr(transformers, name)
    torch.manual_seed(3)
    config = cls.config_class(**settings)
    config._attn_implementation = implementation
    model = cls(config).eval()
    if family.startswith("t5") and not any(reachable(m) for m in model.modules()):
        pytest.skip("T5 does not look its attention up in AttentionInterface in this release of transformers")
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            # Large enough for scores that caps bend, biases tell apart and sinks compete with.
            if any(word in parameter_name for word in LARGE):
                p.copy_(torch.randn_like(p) * 0.7)
    return model


def inputs(family, length=12):
    torch.manual_seed(5)
    ids = torch.randint(3, 60, (2, length))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    if family == "t5-decoder":
        given["decoder_input_ids"] = torch.randint(3, 60, (2, length))
    return given


def eager_maps(family, model, given):
    with torch.no_grad():
        out = model(**given, output_attentions=True)
    return out.decoder_attentions if family == "t5-decoder" else out.attentions


def decoders_self(kind):
    return [0, 1] if kind != "t5-decoder" else ["*SelfAttention"]


@pytest.fixture(scope="module")
def models():
    made = {}

    def get(family):
        if family not in made:
            made[family] = build(family)
        return made[family]

    return get


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_weights_are_those_of_the_model(family, models):
    model, given = models(family), inputs(family)
    own = eager_maps(family, model, given)
    record = Record(decoders_self(family), rows="all")
    with torch.no_grad(), attnlib.attach(model, record):
        model(**given)
    exists = given["attention_mask"].bool() if family != "t5-decoder" else torch.ones(2, 12, dtype=torch.bool)
    assert len(record.results()) == 2
    for layer, entry in record.results().items():
        weights = entry["weights"][0]
        rows = exists[:, None, :, None]  # rows of padding are whatever the kernel makes of them
        torch.testing.assert_close(weights * rows, own[layer].float() * rows, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_edits_that_change_nothing_leave_the_bits(family, implementation, models):
    try:
        model = models(family) if implementation == "eager" else build(family, "sdpa")
        with torch.no_grad():
            before = model(**inputs(family)).last_hidden_state if "Model" in FAMILIES[family][0] and family != "gpt2" \
                else model(**inputs(family)).logits  # fmt: skip
    except (ValueError, AttributeError) as error:
        pytest.skip(f"transformers itself: {error}"[:90])
    scores = ScoresAsTheyAre(decoders_self(family))
    with torch.no_grad(), attnlib.attach(model, NoOp(decoders_self(family)), scores):
        out = model(**inputs(family))
    assert torch.equal(out.logits if hasattr(out, "logits") else out.last_hidden_state, before)


class ScoresAsTheyAre(Intervention):
    name = "scores"

    def __init__(self, layers=None):
        self.layers = layers

    def on_scores(self, site, scores, rows):
        return scores + 0.0


class Again(Intervention):
    """The model's own mask, given as another one: the same numbers on another path."""

    name = "again"
    kinds = ("self",)

    def around_attention(self, site, q, k, v, call):
        return call(q, k, v, mask=site.mask.dense(q.device))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mask_in_place_of_the_models_keeps_caps_sinks_and_biases(family, models):
    model, given = models(family), inputs(family)
    given["attention_mask"][:] = 1
    with torch.no_grad():
        before = model(**given)[0]
        with attnlib.attach(model, Again()):
            after = model(**given)[0]
    torch.testing.assert_close(after, before, atol=1e-5 * float(before.abs().max()), rtol=1e-5)


#: What a scorer makes of the maps of a layer (B, H, N, N) alone.
RANKINGS = {
    "last-query": (lambda: cache.LastQuery(), lambda maps: maps[:, :, -1].mean(1, keepdim=True)),
    "last-query-per-head": (
        lambda: cache.LastQuery(per_head=True), lambda maps: maps[:, :, -1].unflatten(1, (HK, -1)).mean(2)
    ),
    "observed": (
        lambda: cache.ObservedAttention(),
        lambda maps: (maps.sum(2) / torch.arange(maps.shape[-1], 0, -1)).unflatten(1, (HK, -1)).mean(2),
    ),
    "snapkv": (
        lambda: cache.SnapKVVotes(3, 1), lambda maps: maps[:, :, -3:, :-3].sum(2).unflatten(1, (HK, -1)).mean(2)
    ),
}  # fmt: skip
HK = 2


class Seen(cache.Scorer):
    """What another scorer says, kept."""

    def __init__(self, inner):
        self.inner, self.queries, self.protected = inner, inner.queries, inner.protected
        self.reads_weights, self.scores = inner.reads_weights, {}

    def score(self, view):
        self.scores[view.site.layer] = self.inner.score(view).expand(view.k.shape[:3])
        return self.scores[view.site.layer]


@pytest.mark.parametrize("name", RANKINGS)
@pytest.mark.parametrize("family", DECODERS)
def test_scorers_read_the_models_own_weights(family, name, models, monkeypatch):
    model, given = models(family), inputs(family)
    given["attention_mask"][:] = 1
    sites = attnlib.attach(model, Record())
    full = [s.layer for s in sites.sites if getattr(s.module, "sliding_window", None) is None]
    heads = sites.sites[0].kv_heads
    sites.detach()
    monkeypatch.setattr(__import__(__name__, fromlist=["HK"]), "HK", heads)
    scorer = Seen(RANKINGS[name][0]())
    own = eager_maps(family, model, given)
    with torch.no_grad(), attnlib.attach(model, cache.KVCompression(scorer, cache.Cap(6), layers=full)):
        model(**given, use_cache=True)
    assert sorted(scorer.scores) == full
    for layer, found in scorer.scores.items():
        want = RANKINGS[name][1](own[layer].float()).expand(-1, heads, -1)
        torch.testing.assert_close(found[..., : want.shape[-1]], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", UNREACHABLE)
def test_models_that_cannot_be_reached_are_refused_by_name(family):
    with pytest.raises(TypeError, match="no attention that can be reached"):
        attnlib.attach(build(family), Record())


# ---- a kernel that does more than is known: whoever needs its weights is refused, in the same words


@pytest.fixture
def strange(monkeypatch):
    """A llama whose eager kernel doubles its scores and says so to nobody."""
    from transformers.models.llama import modeling_llama

    real = modeling_llama.eager_attention_forward

    def kernel(module, query, key, value, attention_mask, scaling, **kwargs):
        return real(module, query, key, value, attention_mask, scaling=scaling * 2, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", kernel)
    return build("llama")


TYPES = TokenTypes(image=7)

NEED = {
    "Record": lambda: Record(),
    "Statistics": lambda: look.Statistics(),
    "on_weights": lambda: NoOp(),
    "on_scores": lambda: ScoresAsTheyAre(),
    "a mask": lambda: Again(),
    "SnapKV": lambda: cache.SnapKV(cap=8, window_size=3, kernel_size=3),
    "LastQuery": lambda: cache.KVCompression(cache.LastQuery() * cache.ValueNorm(), cache.Cap(5)),
    "ObservedAttention": lambda: cache.KVCompression(cache.ObservedAttention(), cache.Cap(5)),
    "ExpectedAttention": lambda: cache.KVCompression(cache.ExpectedAttention(4, 1), cache.Cap(5)),
    "SinkCalibration": lambda: steer.SinkCalibration({1: [0]}),
    "CMAI": lambda: reduce.CMAI(0.5),
    "ReduceByAttention": lambda: reduce.ReduceByAttention({1: 2}),
    "MaskByType": lambda: MaskByType(bidirectional()),
    "DualAttention": lambda: steer.DualAttention(),
    "CompositeLayers": lambda: reduce.CompositeLayers(),
    "VisualBoost": lambda: steer.VisualBoost(sets="all", first_layer=0),
}  # fmt: skip

NEED_NOT = {
    "KeyNorm": lambda: cache.KVCompression(cache.KeyNorm(), cache.Cap(5)),
    "Recency": lambda: cache.KVCompression(cache.Recency(1), cache.Cap(5)),
    "HeadScale": lambda: steer.HeadScale({1: {0: 0.5}}),
    "DyVTE": lambda: reduce.DyVTE(exit_layer=0),
}


def with_image():
    given = inputs("llama")
    given["input_ids"][:, 4:8] = 7
    return given


@pytest.mark.parametrize("name", NEED)
def test_whoever_needs_weights_that_are_not_known_is_refused(name, strange):
    with torch.no_grad(), attnlib.attach(strange, NEED[name](), token_types=TYPES):
        with pytest.raises(ValueError, match="weights cannot be computed beside it"):
            strange(**with_image(), use_cache=True)


@pytest.mark.parametrize("name", NEED_NOT)
def test_whoever_needs_no_weights_is_served_there_too(name, strange):
    with torch.no_grad(), attnlib.attach(strange, NEED_NOT[name](), token_types=TYPES):
        assert strange(**with_image(), use_cache=True).logits.isfinite().all()


def test_expected_attention_refuses_what_is_not_linear(models):
    for family, why in (("gemma2", "caps its scores"), ("gpt-oss", None)):
        given = inputs(family)
        technique = cache.KVCompression(cache.ExpectedAttention(4, 1), cache.Cap(6), layers=[1])
        with torch.no_grad(), attnlib.attach(models(family), technique):
            if why is None:
                models(family)(**given, use_cache=True)
                continue
            with pytest.raises(ValueError, match=why):
                models(family)(**given, use_cache=True)


def test_sinks_take_their_share_and_nothing_else():
    site = attnlib.hooks.Site(0, "none", torch.nn.Identity(), "self", 2, 2, 4, weighting=Weighting(
        sinks=torch.tensor([0.0, float("-inf")])))  # fmt: skip
    scores = torch.tensor([0.0, float("-inf"), 0.0]).expand(1, 2, 1, 3)
    got = weights_of(site, scores, torch.tensor([0]))
    assert torch.allclose(got[0, :, 0], torch.tensor([[1 / 3, 0, 1 / 3], [0.5, 0, 0.5]]))
    empty = weights_of(site, torch.full((1, 2, 1, 3), float("-inf")), torch.tensor([0]))
    assert torch.equal(empty, torch.zeros(1, 2, 1, 3))


# ---- the same through torch's own attention and through diffusers


FITTING = [(s, c) for s in SETTINGS for c in CALLS if (s, c) != ("odd-heads", "per-head")]


@pytest.mark.parametrize("settings, call", FITTING)
def test_multihead_attention_records_what_it_returns(settings, call):
    module = mha(**SETTINGS[settings])
    given = {**CALLS[call], "need_weights": True, "average_attn_weights": False}
    record = Record(rows="all")
    with torch.no_grad():
        before, own = run_mha(module, tokens(), **given)
        with attnlib.attach(module, record, Again()):
            after, _ = run_mha(module, tokens(), **given)
    torch.testing.assert_close(record.results()[0]["weights"][0], own, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(after, before, atol=1e-6, rtol=1e-5)


UNETS = {
    "plain": {},
    "upcast": dict(upcast_attention=True),
    "norm-cross": dict(cross_attention_norm="layer_norm"),
    "linear": dict(use_linear_projection=True),
}


@pytest.mark.parametrize("name", UNETS)
def test_denoisers_of_every_kind_keep_bits_and_weights(name):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12, attention_head_dim=(2, 4), norm_num_groups=4, **UNETS[name],
    ).eval()  # fmt: skip
    mask = torch.ones(2, 5)
    mask[0, 3:] = 0
    given = dict(sample=torch.randn(2, 4, 8, 8), timestep=3, encoder_hidden_states=torch.randn(2, 5, 12),
                 encoder_attention_mask=mask)  # fmt: skip
    before, record = predict(model, given), Record(rows="all")
    with attnlib.attach(model, NoOp(), record):
        assert torch.equal(predict(model, given), before)
    crossed = [e["weights"][0] for e in record.results().values() if e["weights"][0].shape[-1] == 5]
    assert crossed and all(float(w[0, ..., 3:].max()) == 0 and float(w[1].min()) > 0 for w in crossed)
    with attnlib.attach(model, Everywhere()):
        torch.testing.assert_close(predict(model, given), before, atol=1e-5 * float(before.abs().max()), rtol=1e-5)


class Everywhere(Again):
    kinds = ("self", "cross", "joint")


def test_added_keys_are_read():
    processors = pytest.importorskip("diffusers.models.attention_processor")
    attn = processors.Attention(query_dim=16, heads=2, dim_head=8, added_kv_proj_dim=16, norm_num_groups=4,
                                processor=processors.AttnAddedKVProcessor2_0())  # fmt: skip
    image, text = torch.randn(1, 16, 2, 2), torch.randn(1, 3, 16)
    with torch.no_grad(), attnlib.attach(attn, Record(rows="all")) as session:
        attn(image, encoder_hidden_states=text)
    (weights,) = session.results["record"][0]["weights"]
    assert weights.shape == (1, 2, 4, 3 + 4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 4))
    with torch.no_grad():  # the weights are those of the module's own maps, text first
        tokens = attn.group_norm(image.flatten(2)).transpose(1, 2)
        key = torch.cat([attn.add_k_proj(text), attn.to_k(tokens)], 1).unflatten(-1, (2, 8)).transpose(1, 2)
        query = attn.to_q(tokens).unflatten(-1, (2, 8)).transpose(1, 2)
    torch.testing.assert_close(weights, (query @ key.mT * attn.scale).softmax(-1))


class Reads(Intervention):
    """The tower's own weights, read beside a technique that acts on nothing there."""

    name = "reads"

    def __init__(self, what):
        self.what = what

    def on_attach(self, session):
        self.tower = VisionTower(session.model, slice(0, None), self.what, "")
        self.tower.watch(session)
        session.undo(lambda: setattr(self, "read", self.tower.runs(None)))

    def on_step(self, step):
        pass


@pytest.mark.parametrize("what", ["class", "received"])
def test_towers_with_rotary_positions_are_read_after_them(what):
    torch.manual_seed(0)
    config = transformers.DINOv3ViTConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4,
        num_register_tokens=0,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = transformers.DINOv3ViTModel(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                p.copy_(torch.randn_like(p))
        pixels = torch.randn(2, 3, 16, 16)
        maps = model(pixels, output_attentions=True).attentions
        reads = Reads(what)
        with attnlib.attach(model, reads):
            model(pixels)
    (run,) = reads.read
    for layer, own in enumerate(maps):
        want = own[:, :, 0, 1:] if what == "class" else own.mean((1, 2))
        torch.testing.assert_close(run[layer], want, atol=1e-5, rtol=1e-5)
