"""What users of comparable projects report, one kind after the other: right here, or refused by name."""

import copy
import warnings

import pytest
import torch
from torch import nn

import attnlib
from attnlib.cache import Cap, KeyNorm, KVCompression, SnapKV, ValueNorm
from attnlib.hooks import Intervention, Record, TokenTypes
from attnlib.hooks.site import PairMask, read_mask
from attnlib.look import Statistics
from hooks.models import SIZES, NoOp, call_site, language_model, prompt, scores

transformers = pytest.importorskip("transformers")


def evict(scorer=None, keep=7, **settings):
    return KVCompression(scorer or ValueNorm(), Cap(keep), **settings)


class Roll(Intervention):
    """The heads change places."""

    name = "roll"

    def on_weights(self, site, weights, rows):
        return weights.roll(1, 1)


class Forbid(Intervention):
    """No query but the first reads the first key."""

    name = "forbid"
    replaces_mask = True

    def around_attention(self, site, q, k, v, call):
        allowed = site.mask.dense(q.device).expand(q.shape[0], q.shape[1], -1, -1).clone()
        allowed[:, :, 1:, 0] = False
        return call(q, k, v, mask=allowed)


class Twice(Intervention):
    name = "twice"

    def around_attention(self, site, q, k, v, call):
        return (call(q, k, v) + call(q, k, v)) / 2


class Quiet(Intervention):
    """Goes through the call and the weights; new keys stay what they are."""

    name = "quiet"

    def around_attention(self, site, q, k, v, call):
        return call(q, k, v)

    def on_weights(self, site, weights, rows):
        return weights * 1.0


class Halve(Intervention):
    name = "halve"

    def on_output(self, site, out):
        return out / 2


# ---- padding that reads


def padded_on_the_right():
    ids = prompt(pad=(0, 0))["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, 13:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def encoder():
    torch.manual_seed(0)
    return nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 1, enable_nested_tensor=False
    ).eval()


def bert():
    torch.manual_seed(0)
    sizes = {k: SIZES[k] for k in SIZES if k != "num_key_value_heads"}
    return transformers.BertModel(transformers.BertConfig(**{**sizes, "num_hidden_layers": 1})).eval()


@pytest.mark.parametrize("family", ["decoder", "bert", "torch"])
def test_padding_on_the_right_is_not_counted_among_those_who_read(family):
    """It reads what came before it, and what it reads is nobody's."""
    given = padded_on_the_right()
    if family == "torch":
        torch.manual_seed(1)
        model, x = encoder(), torch.randn(2, 20, 16)
        together = lambda: model(x, src_key_padding_mask=given["attention_mask"] == 0)  # noqa: E731
        alone = lambda: model(x[:1, :13])  # noqa: E731
    else:
        model = language_model() if family == "decoder" else bert()
        together = lambda: model(**given)  # noqa: E731
        alone = lambda: model(input_ids=given["input_ids"][:1, :13])  # noqa: E731
    found = []
    for call in (together, alone):
        record, numbers = Record(rows="all", what=("received", "sink")), Statistics()
        with torch.no_grad(), attnlib.attach(model, record, numbers):
            call()
        found.append((record.results()[0], numbers.results()[0]))
    (got, many), (want, few) = found
    for name in ("received", "seen"):
        torch.testing.assert_close(got[name][:1, :, :13], want[name], atol=1e-5, rtol=1e-5)
        assert not got[name][0, :, 13:].any()
    assert int(many["rows"][0]) == 13 + 20 and int(few["rows"][0]) == 13


def test_queries_that_exist_at_sites_of_every_kind():
    q, k = torch.zeros(2, 2, 4, 8), torch.zeros(2, 1, 4, 8)
    allowed = torch.ones(2, 1, 4, 4, dtype=torch.bool).tril()
    allowed[0, ..., 3] = False
    site = call_site(q, k, allowed=allowed)
    assert site.existing_queries().tolist() == [[True, True, True, False], [True] * 4]
    assert call_site(q, k, causal=False).existing_queries() is None
    assert call_site(q, k, allowed=allowed, kind="cross").existing_queries() is None
    late = call_site(q[:, :, :1], k, allowed=allowed[:, :, 3:], offset=3)
    assert late.existing_queries().tolist() == [[False], [True]]
    gone = site.but(q_pos=torch.tensor([[-1, 0, 1, 3], [0, 1, 2, 3]]), k_pos=torch.zeros(2, 1, 4))
    assert gone.existing_queries().tolist() == [[False, True, True, False], [True] * 4]


def test_a_sample_that_is_nothing_but_padding():
    model, inputs = language_model(), prompt(pad=(20, 0))
    one = {name: t[1:] for name, t in inputs.items()}
    for make in (evict, lambda: SnapKV(cap=8, window_size=4), lambda: evict(keep=6, every=2)):
        with attnlib.attach(model, make()):
            got, _ = scores(model, inputs)
            want, _ = scores(model, one)
        torch.testing.assert_close(got[:, 1:], want, atol=1e-6, rtol=1e-5)
        assert not got.isnan().any()
    with attnlib.attach(model, Record(rows="all", what=("sink",))) as session, torch.no_grad():
        model(**inputs)
        both = session.results["record"][0]["sink"]
    with attnlib.attach(model, Record(rows="all", what=("sink",))) as session, torch.no_grad():
        model(**one)
        assert torch.equal(session.results["record"][0]["sink"], both)


# ---- "no", however it is written


@pytest.mark.parametrize("no", [float("-inf"), torch.finfo(torch.float32).min, -1e9, -10000.0])
def test_masks_that_are_added_say_no_in_many_ways(no):
    for dtype in (torch.float32, torch.bfloat16):
        allowed, bias = read_mask(torch.tensor([0.0, no, -3.0]).to(dtype))
        assert allowed.tolist() == [True, False, True] and bias.tolist() == [0.0, 0.0, -3.0]
    model, inputs = language_model(), prompt(pad=(6, 0))
    exists = inputs["attention_mask"].bool()
    pairs = torch.ones(20, 20, dtype=torch.bool).tril() & exists[:, None, None]
    given = torch.where(pairs, 0.0, no)
    given[0, 0].diagonal().masked_fill_(~exists[0], 0.0)  # rows that may read nothing differ from kernel to kernel
    place = (exists.cumsum(1) - 1).clamp(min=0)
    kept = []
    for mask in (inputs["attention_mask"], given):
        record = Record(rows="all", what=("received",))
        with torch.no_grad(), attnlib.attach(model, evict(KeyNorm()), record) as session:
            model(inputs["input_ids"], attention_mask=mask, position_ids=place)
            kept.append(session.results["kv-compression"][0]["kept"])
        assert record.results()[0]["seen"][1, 0].tolist() == list(range(20, 0, -1))
    assert torch.equal(kept[0], kept[1])


def test_text_that_a_denoiser_masks_is_not_seen():
    processors = pytest.importorskip("diffusers.models.attention_processor")
    torch.manual_seed(0)
    attn = processors.Attention(query_dim=8, cross_attention_dim=6, heads=2, dim_head=4)
    holder = processors.Attention(query_dim=8)
    holder.attn2 = attn
    mask = torch.zeros(1, 1, 5)
    mask[..., 3:] = -10000.0
    record = Record(["attn2"], rows="all", what=("received",))
    with torch.no_grad(), attnlib.attach(holder, record):
        attn(torch.randn(1, 4, 8), torch.randn(1, 5, 6), attention_mask=mask)
    assert record.results()[1]["seen"][0, 0].tolist() == [4, 4, 4, 0, 0]


# ---- weights that the model gives back


def test_transformers_give_the_weights_that_were_used():
    model, inputs = language_model(), prompt(pad=(0, 0))
    model.set_attn_implementation("eager")

    def maps(*interventions):
        with torch.no_grad():
            if not interventions:
                return model(**inputs, output_attentions=True).attentions
            with attnlib.attach(model, *interventions):
                return model(**inputs, output_attentions=True).attentions

    plain = maps()
    assert all(torch.equal(a, b) for a, b in zip(maps(Quiet()), plain, strict=True))
    torch.testing.assert_close(maps(Roll())[0], plain[0].roll(1, 1), atol=1e-6, rtol=1e-5)
    without = plain[0].clone()
    without[:, :, 1:, 0] = 0
    torch.testing.assert_close(maps(Forbid())[0], without / without.sum(-1, keepdim=True), atol=1e-6, rtol=1e-5)
    with attnlib.attach(model, Twice()), torch.no_grad():
        model(**inputs)
        with pytest.raises(ValueError, match="Twice computes attention 2 times"):
            model(**inputs, output_attentions=True)
    with attnlib.attach(model, Roll()):
        out = model.generate(**inputs, max_new_tokens=3, output_attentions=True, return_dict_in_generate=True)
    assert [step[0].shape[-1] for step in out.attentions] == [20, 21, 22]


@pytest.mark.parametrize("family", ["torch", "native"])
def test_modules_give_the_weights_that_were_used(family):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 16)
    if family == "torch":
        module = nn.Sequential(nn.MultiheadAttention(16, 4, batch_first=True)).eval()
        run = lambda: module[0](x, x, x, average_attn_weights=False)  # noqa: E731
    else:
        module = attnlib.create("softmax-attention", dim=16, num_heads=4).eval()

        def run():
            out = module(x, returns=("weights",))
            return out.y, out.weights

    with torch.no_grad():
        plain = run()[1]
        with attnlib.attach(module, Quiet()):
            torch.testing.assert_close(run()[1], plain)
        with attnlib.attach(module, Forbid()):
            without = plain.clone()
            without[:, :, 1:, 0] = 0
            torch.testing.assert_close(run()[1], without / without.sum(-1, keepdim=True), atol=1e-6, rtol=1e-5)
        with attnlib.attach(module, Twice()), pytest.raises(ValueError, match="Twice computes attention 2 times"):
            run()


# ---- caches that hold something else than what is read


def tiny(name, **changes):
    torch.manual_seed(0)
    parts = name if isinstance(name, tuple) else (f"{name}Config", f"{name}ForCausalLM")
    if not all(hasattr(transformers, part) for part in parts):
        pytest.skip(f"this release of transformers has no {parts[1]}")
    return getattr(transformers, parts[1])(getattr(transformers, parts[0])(**{**SIZES, **changes})).eval()


EXPERTS = dict(n_routed_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, n_group=1, topk_group=1)
LATENT = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=6, **EXPERTS)
OTHERS = {
    "latent": (lambda: tiny("DeepseekV3", **LATENT, first_k_dense_replace=3, num_key_value_heads=4),
               "makes what its attention reads", "holds latents"),
    "differential": (lambda: tiny("DiffLlama"), "makes what its attention reads", "made from those that its cache"),
    "dynamic mask": (lambda: tiny("Doge"), "makes its mask from", "makes a mask for each head"),
    "shared": (lambda: tiny(("Gemma3nTextConfig", "Gemma3nForCausalLM"), head_dim=8, sliding_window=6,
                            num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2,
                            num_kv_shared_layers=2, hidden_size_per_layer_input=8, vocab_size_per_layer_input=64,
                            laurel_rank=4, intermediate_size=[48] * 4, activation_sparsity_pattern=[0.0] * 4),
               "other layers read its keys", "other layers read its keys"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_caches_that_hold_something_else_than_what_is_read(name):
    make, on_new, on_cache = OTHERS[name]
    model, inputs = make(), prompt()
    if name == "latent" and model(**inputs).past_key_values.layers[0].keys.shape[1] > 1:
        pytest.skip("this release of transformers caches the keys of all heads")
    plain, _ = scores(model, inputs, new=3)
    with attnlib.attach(model, Quiet()):
        assert torch.equal(scores(model, inputs, new=3)[0], plain)
    with pytest.raises(ValueError, match=on_new), attnlib.attach(model, NoOp()):
        scores(model, inputs, new=3)
    with pytest.raises(ValueError, match=on_cache), attnlib.attach(model, evict()):
        scores(model, inputs, new=3)
    assert torch.equal(scores(model, inputs, new=3)[0], plain)


def test_a_module_that_stands_at_several_depths():
    model = tiny("Zamba2", hybrid_layer_ids=[1], num_mem_blocks=1, layers_block_type=["mamba", "hybrid", "mamba"],
                 mamba_d_state=4, mamba_ngroups=1, n_mamba_heads=4, chunk_size=8, use_mem_rope=False,
                 num_key_value_heads=4)  # fmt: skip
    with pytest.raises(ValueError, match="stands at several depths"):
        attnlib.attach(model, Quiet())


def test_linear_layers_whose_masks_have_one_column():
    model = tiny("MiniMax", head_dim=8, layer_types=["linear_attention", "full_attention", "full_attention"],
                 num_local_experts=2, block_size=8)  # fmt: skip
    with attnlib.attach(model, evict()) as session:
        scores(model, prompt(pad=(0, 0)))
        assert sorted(session.results["kv-compression"]) == [1, 2]


def test_what_a_model_calls_its_decoder_may_be_its_head():
    model = tiny("ModernBertDecoder", local_attention=8, cls_token_id=1, sep_token_id=2)
    assert isinstance(model.get_decoder(), nn.Linear)
    plain, _ = scores(model, prompt())
    with attnlib.attach(model, NoOp()) as session:
        assert torch.equal(scores(model, prompt())[0], plain)
    assert len(session.sites) == 3


def t5():
    sizes = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4, decoder_start_token_id=0)
    model = tiny(("T5Config", "T5ForConditionalGeneration"), **sizes)
    from attnlib.hooks.hf.names import reachable

    if not any(reachable(m) for m in model.modules()):
        pytest.skip("T5 does not look its attention up in AttentionInterface in this release of transformers")
    return model


def test_a_layer_that_makes_the_bias_of_positions_keeps_its_keys():
    """T5's first layer makes it for all, from the number of keys it reads; the other layers may lose keys."""
    model = t5()
    given = {**prompt(), "decoder_input_ids": torch.randint(3, 60, (2, 15))}
    with pytest.warns(UserWarning, match="bias of positions"), attnlib.attach(model, evict(keep=5)) as session:
        got, _ = scores(model, given)
        kept = session.results["kv-compression"]
    assert sorted(kept) == [1]

    class Only(Intervention):
        """The same keys forbidden, in a cache that keeps all."""

        layers = ["*block.1.layer.0*"]

        def around_attention(self, site, q, k, v, call):
            if not site.offset:
                return call(q, k, v)
            there = torch.zeros(*k.shape[:3], dtype=torch.bool).scatter(2, kept[1]["kept"], True)
            there[..., kept[1]["of"] :] = True
            return call(q, k, v, mask=site.mask.dense() & there[:, :, None])

    with attnlib.attach(model, Only()):
        want, _ = scores(model, given)
    torch.testing.assert_close(got, want, atol=1e-5 * float(want.abs().max()), rtol=1e-4)
    with pytest.raises(ValueError, match="bias of positions"), attnlib.attach(model, evict(keep=5, layers=[0])):
        scores(model, given)


# ---- caches that are stored otherwise


def quantized_layer():
    base = transformers.cache_utils.QuantizedLayer

    class Rounded(base):
        def _quantize(self, tensor, axis):
            return (tensor * 64).round()

        def _dequantize(self, q_tensor):
            return q_tensor / 64

    return lambda: Rounded(nbits=4, axis_key=0, axis_value=0, q_group_size=8, residual_length=4)


def test_quantized_caches_are_read_and_never_lose_keys():
    model, inputs = language_model(), prompt()
    make = quantized_layer()
    new = lambda: transformers.Cache(layers=[make() for _ in range(3)])  # noqa: E731
    plain, _ = scores(model, inputs, past_key_values=new())
    assert not torch.equal(plain, scores(model, inputs)[0])
    with attnlib.attach(model, Quiet(), Record(rows="all")):
        assert torch.equal(scores(model, inputs, past_key_values=new())[0], plain)
    with pytest.raises(ValueError, match="a Rounded does not hold keys as they are read"):
        with attnlib.attach(model, evict()):
            scores(model, inputs, past_key_values=new())


class Away(transformers.DynamicCache):
    """Offloads as on a GPU: a layer comes back before it is written to and leaves right after, as of ``moved_away``."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        while len(self.layers) <= layer_idx:
            self.layers.append(self.layer_class_to_replicate())
        self.layers[layer_idx].prefetch()
        out = self.layers[layer_idx].update(key_states, value_states)
        self.layers[layer_idx].offload()
        return out


@pytest.fixture
def moved_away(monkeypatch):
    """What is left behind of a layer that was moved away is not a number."""
    layer = transformers.cache_utils.DynamicLayer
    start = layer.lazy_initialization

    def begin(self, *states):
        start(self, *states)
        self.device = torch.device("meta")  # never where the keys are

    def offload(self):
        self.store = self.keys, self.values
        self.keys, self.values = (torch.full_like(t, torch.nan) for t in self.store)

    def prefetch(self):
        if getattr(self, "store", None) is not None:
            (self.keys, self.values), self.store = self.store, None

    for name, function in (("lazy_initialization", begin), ("offload", offload), ("prefetch", prefetch)):
        monkeypatch.setattr(layer, name, function)


@pytest.mark.parametrize("make", [evict, lambda: SnapKV(cap=8, window_size=4)])
def test_offloaded_caches_are_brought_back_before_keys_leave_them(make, moved_away):
    model, inputs = language_model(), prompt()
    with attnlib.attach(model, make()):
        want, _ = scores(model, inputs)
        got, _ = scores(model, inputs, past_key_values=Away())
    assert torch.equal(got, want)

    class Again(Intervention):
        name = "again"

        def around_sublayer(self, site, hidden, call):
            call(hidden)
            return call(hidden)

    plain, _ = scores(model, inputs)
    with attnlib.attach(model, Again()):
        assert torch.equal(scores(model, inputs, past_key_values=Away())[0], plain)


def test_room_behind_compressed_keys_is_not_kept_when_they_are_moved_away():
    model, inputs = language_model(), prompt(pad=(0, 0))
    with torch.no_grad(), attnlib.attach(model, evict()):
        cache = model(**inputs).past_key_values
        other = copy.deepcopy(cache)
        want = model(input_ids=inputs["input_ids"][:, :1], past_key_values=cache)
        assert cache.layers[0]._places
        cache.layers[0].offload()
        assert not cache.layers[0]._places
        got = model(input_ids=inputs["input_ids"][:, :1], past_key_values=other)
        assert torch.equal(got.logits, want.logits)


# ---- wrappers, parts and neighbours


def test_wrappers_that_only_pass_calls_on_are_seen_through():
    inputs = prompt()
    model = language_model()
    with attnlib.attach(model, Halve()), torch.no_grad():
        want = model(**inputs).logits
    parallel = nn.DataParallel(model)
    with attnlib.attach(parallel, Halve()) as session, torch.no_grad():
        assert session.model is model and torch.equal(parallel(**inputs).logits, want)

    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm = model

    with pytest.raises(TypeError, match=r"attach to the one inside it: lm \(LlamaForCausalLM\)"):
        attnlib.attach(Mine(), Halve())


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_adapted_models_generate_as_the_model_inside(task):
    """PEFT's generate() never runs the forward of the adapted model itself, only that of the model inside."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type=task)
    torch.manual_seed(0)
    model, inputs = peft.get_peft_model(language_model(), settings).eval(), prompt()
    with attnlib.attach(model.get_base_model(), evict()):
        want, _ = scores(model, inputs)

    class Count(Intervention):
        name = "count"

        def __init__(self):
            self.asked, self.steps = 0, []

        def on_logits(self, ids, logits):
            self.asked += 1
            return logits

        def on_step(self, step):
            self.steps.append(step)

    count = Count()
    with attnlib.attach(model, evict(), count):
        assert torch.equal(scores(model, inputs)[0], want)
        torch.testing.assert_close(scores(model, inputs, prefill_chunk_size=6)[0], want, atol=1e-5, rtol=1e-4)
    assert count.asked == 10 and count.steps[:5] == [0, 1, 2, 3, 4]
    with attnlib.attach(model, Halve(), token_types=TokenTypes(5)):
        scores(model, inputs)


def test_a_part_learns_of_the_prompt_that_the_whole_generates_from():
    model, inputs = language_model(), prompt()
    with attnlib.attach(model, evict()):
        want, _ = scores(model, inputs)
    with attnlib.attach(model.model, evict()):
        got, _ = scores(model, inputs, prefill_chunk_size=6)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)

    class Asked(Intervention):
        def on_logits(self, ids, logits):
            return logits

    with pytest.warns(UserWarning, match=r"LlamaModel has none, so it acts in session\.logits"):
        attnlib.attach(model.model, Asked()).detach()


def test_a_prompt_that_was_begun_elsewhere_is_not_compressed_in_silence():
    model, inputs = language_model(), prompt(batch=1, pad=(0,))
    with torch.no_grad():
        cache = model(input_ids=inputs["input_ids"][:, :12]).past_key_values
    with attnlib.attach(model, evict()) as session:
        with pytest.warns(UserWarning, match="12 tokens that were read elsewhere, so nothing leaves it"):
            scores(model, inputs, past_key_values=cache)
        assert not session.results["kv-compression"]
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            out = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
            longer = torch.cat([out.sequences, inputs["input_ids"][:, :4]], 1)
            model.generate(longer, past_key_values=out.past_key_values, max_new_tokens=2)


def test_models_that_share_modules_have_one_session():
    model = language_model()
    other = copy.copy(model)
    other._modules = dict(model._modules)
    with attnlib.attach(model, Halve()), pytest.raises(ValueError, match="has a session already"):
        attnlib.attach(other, Halve())


def test_continuous_batching_is_refused_where_it_is_asked_for():
    model = language_model()
    with attnlib.attach(model, Halve()):
        for name in ("generate_batch", "init_continuous_batching"):
            with pytest.raises(RuntimeError, match=rf"{name}\(\) packs tokens of several requests"):
                getattr(model, name)([[3, 4]])


def test_graphs_are_not_recorded_inside_a_session():
    model, x = encoder(), torch.randn(1, 3, 16)
    with attnlib.attach(model, Halve()):
        with pytest.raises(RuntimeError, match="recorded into a graph"):
            torch.export.export(model, (x,))
        with pytest.raises(RuntimeError, match="recorded into a graph"):
            torch.jit.trace(model, (x,), check_trace=False)


def test_default_processors_are_put_back_inside_a_session():
    """Past the forward of the model, too: an autoencoder encodes and decodes by itself."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2).eval()
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        plain = model.encode(x).latent_dist.mean
        with attnlib.attach(model, Halve()):
            halved = model.encode(x).latent_dist.mean
            model.set_default_attn_processor()
            torch.testing.assert_close(model.encode(x).latent_dist.mean, halved)
        assert not torch.allclose(halved, plain)
    names = {type(p).__name__ for p in model.attn_processors.values()}
    assert names == {"AttnProcessor"}


def test_a_block_of_a_denoiser_that_was_compiled_before():
    attention = pytest.importorskip("diffusers.models.attention")
    torch.manual_seed(0)
    block, x = attention.BasicTransformerBlock(8, 2, 4).eval(), torch.randn(1, 3, 8)
    compiled = torch.compile(block, backend="eager")
    with torch.no_grad():
        plain = compiled(x)
        with attnlib.attach(block, Halve()):
            halved = block(x)
            assert torch.equal(compiled(x), halved) and not torch.equal(halved, plain)
        assert torch.equal(compiled(x), plain)


# ---- edits that are learned


@pytest.mark.parametrize("stage", ["on_scores", "on_weights"])
def test_an_edit_that_starts_as_nothing_is_learned(stage):
    """Zeros that want a gradient get that of the map, also where they changed nothing yet."""
    model, inputs = language_model(), prompt(pad=(0, 0))
    model.set_attn_implementation("eager")
    maps = model(**inputs, output_attentions=True, use_cache=False)
    (want,) = torch.autograd.grad(maps.logits.sum(), maps.attentions[1])

    class Learn(Intervention):
        layers = [1]

    added = torch.zeros(2, 4, 20, 20, requires_grad=True)
    setattr(Learn, stage, lambda self, site, values, rows: values + added[:, :, rows])
    with attnlib.attach(model, Learn()):
        (got,) = torch.autograd.grad(model(**inputs, use_cache=False).logits.sum(), added)
    if stage == "on_scores":
        a = maps.attentions[1].detach()
        want = a * (want - (a * want).sum(-1, keepdim=True))
    torch.testing.assert_close(got, want, atol=1e-5 * float(want.abs().max()), rtol=1e-4)


# ---- nothing at all


@pytest.mark.parametrize("shape", [(0, 3, 16), (2, 0, 16)])
def test_calls_without_samples_or_queries(shape):
    module = nn.Sequential(nn.MultiheadAttention(16, 4, batch_first=True)).eval()
    x, y = torch.zeros(shape), torch.zeros(shape[0], 3, 16)
    with torch.no_grad():
        want = module[0](x, y, y, need_weights=False)[0]
        with attnlib.attach(module, Quiet(), Record(what=("entropy", "received", "sink"))):
            assert torch.equal(module[0](x, y, y, need_weights=False)[0], want)


def test_a_mask_of_nothing_reads_as_one():
    assert PairMask(2, 2, *read_mask(torch.zeros(1, 1, 2, 2))).dense().all()


# ---- tokens that are gone, and what a decoder adds to them later


def test_images_that_are_added_behind_the_first_blocks():
    """Qwen3-VL adds features of images behind its first blocks, at the slots of all tokens."""
    from attnlib import reduce

    if not hasattr(transformers, "Qwen3VLConfig"):
        pytest.skip("this release of transformers has no Qwen3-VL")
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0, "mrope_interleaved": True}
    tower = dict(depth=2, hidden_size=16, out_hidden_size=32, num_heads=2, patch_size=4, spatial_merge_size=2,
                 temporal_patch_size=2, in_channels=3, intermediate_size=32, deepstack_visual_indexes=[0, 1],
                 num_position_embeddings=16)  # fmt: skip
    config = transformers.Qwen3VLConfig(
        text_config={**SIZES, "head_dim": 8, "num_hidden_layers": 4, "rope_scaling": rope}, vision_config=tower,
        image_token_id=60, video_token_id=61, vision_start_token_id=58, vision_end_token_id=59,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen3VLForConditionalGeneration(config).eval()
    ids = torch.tensor([[5, 6, 58, 60, 60, 60, 60, 59, 7, 8]] * 2)
    given = dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.randn(32, 96),
                 image_grid_thw=torch.tensor([[1, 4, 4]] * 2), mm_token_type_ids=(ids == 60).long())  # fmt: skip
    with attnlib.attach(model, reduce.ReduceByAttention({1: 2}), token_types=TokenTypes(60)):
        with pytest.raises(ValueError, match=r"visual_pos_masks.*from layer 2 on it can"):
            scores(model, given)
    with attnlib.attach(model, reduce.ReduceByAttention({2: 2}), token_types=TokenTypes(60)) as session:
        got, _ = scores(model, given)
        assert session.results["reduce-by-attention"]["lengths"][-1] == 8
    assert got.isfinite().all()
