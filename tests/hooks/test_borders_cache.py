"""Caches at their borders: what the prompt is, drafts, snapshots, hybrid and latent layers, saving and loading."""

import copy
import io
import pickle
import warnings

import pytest
import torch

import attnlib
from attnlib.cache import Cap, KVCompression, SnapKV, ValueNorm
from attnlib.hooks import Intervention
from attnlib.hooks.hf.names import cache_parameter, parameters_of
from hooks.models import SIZES, NoOp, language_model, prompt, scores

transformers = pytest.importorskip("transformers")


def snapkv():
    return SnapKV(ratio=0.5, window_size=6)


def by_value():
    return KVCompression(ValueNorm(), Cap(9))


MADE = [snapkv, by_value]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))


def kept(session):
    return next(iter(session.results.values()))


def distinct():
    """A prompt in which no token is read twice, so that no two values are alike but for rounding."""
    inputs = prompt()
    for row, one in enumerate(inputs["input_ids"]):
        one[one != 0] = torch.randperm(56, generator=torch.Generator().manual_seed(row))[: int((one != 0).sum())] + 4
    return inputs


# ---- what the prompt is


@pytest.mark.parametrize("make", MADE)
@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_a_prompt_in_chunks_is_compressed_as_one(make, mode):
    model, inputs = language_model(), distinct()
    with attnlib.attach(model, make()) as session:
        want, tokens = scores(model, inputs, **mode)
    whole = kept(session)
    for size in (4, 19, 30):
        with attnlib.attach(model, make()) as session:
            got, same = scores(model, inputs, prefill_chunk_size=size, **mode)
        assert torch.equal(same, tokens)
        close(got, want)
        assert all(torch.equal(whole[n]["kept"], kept(session)[n]["kept"]) for n in range(3))


def test_every_chunk_of_a_prompt_is_prefill():
    model, inputs, seen = language_model(), prompt(), NoOp([0])
    with attnlib.attach(model, seen):
        scores(model, inputs, new=3, prefill_chunk_size=8)
    assert [s.phase for s in seen.sites] == ["prefill"] * 3 + ["decode"] * 2


def test_a_prompt_in_chunks_by_hand():
    model, inputs = language_model(), prompt(pad=(0, 0))
    ids = inputs["input_ids"]
    with torch.no_grad():
        with attnlib.attach(model, snapkv()):
            cache = model(**inputs).past_key_values
            want = model(input_ids=ids[:, :1], past_key_values=cache).logits
        with attnlib.attach(model, snapkv()) as session:
            cache = transformers.DynamicCache()
            with session.at(prompt_length=20):
                for part in ids.split(7, 1):
                    assert cache.get_seq_length() == 0 or cache.layers[0].keys.shape[2] == cache.get_seq_length()
                    model(input_ids=part, past_key_values=cache)
            assert cache.layers[0].keys.shape[2] == 10
            close(model(input_ids=ids[:, :1], past_key_values=cache).logits, want)
            with pytest.raises(ValueError, match="prompt_length"), session.at(prompt_length=0):
                pass


def test_a_promise_of_generate_is_not_kept_for_others():
    """A shorter prompt read by hand after generate() is a prompt of its own."""
    model, inputs = language_model(), prompt(pad=(0, 0))
    with torch.no_grad(), attnlib.attach(model, snapkv()):
        scores(model, inputs)
        cache = model(input_ids=inputs["input_ids"][:, :12]).past_key_values
        assert cache.layers[0].keys.shape[2] == 6


@pytest.mark.parametrize("make", MADE)
@pytest.mark.parametrize("draft", ["same", "other", "lookup"])
def test_drafts_are_no_part_of_the_prompt_and_roll_back(make, draft):
    model, inputs = language_model(), prompt(batch=1, pad=(0,))
    mode = {
        "same": {"assistant_model": language_model()},
        "other": {"assistant_model": language_model(seed=5, num_hidden_layers=1)},
        "lookup": {"prompt_lookup_num_tokens": 3},
    }[draft]
    with attnlib.attach(model, make()) as session:
        want, tokens = scores(model, inputs, new=14)
    whole = kept(session)
    with attnlib.attach(model, make()) as session:
        got, same = scores(model, inputs, new=14, **mode)
    assert torch.equal(same, tokens)
    close(got, want)
    assert all(torch.equal(whole[n]["kept"], kept(session)[n]["kept"]) for n in range(3))


def test_drafts_among_the_tokens_that_choose_are_refused():
    model, inputs = language_model(), prompt(batch=1, pad=(0,))
    with attnlib.attach(model, KVCompression(ValueNorm(), Cap(9), every=2)):
        with pytest.raises(ValueError, match="drafts"):
            scores(model, inputs, new=14, assistant_model=language_model(seed=5, num_hidden_layers=1))


@pytest.mark.parametrize("make", MADE)
def test_a_second_turn_goes_on_with_a_compressed_cache(make):
    """At once, in chunks, and token by token are the same; nothing of the first turn is chosen again."""
    model, inputs = language_model(), prompt(batch=1, pad=(0,))
    results = []
    for how in ("generate", "chunks", "tokens"):
        with torch.no_grad(), attnlib.attach(model, make()) as session:
            cache = transformers.DynamicCache()
            first = model.generate(**inputs, max_new_tokens=4, do_sample=False, past_key_values=cache)
            chosen = kept(session)[0]["kept"]
            ids = torch.cat([first, torch.arange(5, 12)[None]], 1)
            if how == "tokens":
                for i in range(cache.get_seq_length(), ids.shape[1]):
                    out = model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits[:, -1]
            else:
                mode = {"prefill_chunk_size": 3} if how == "chunks" else {}
                out = scores(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, new=1,
                             past_key_values=cache, **mode)[0][0]  # fmt: skip
            if how == "chunks" and cache.get_seq_length() > ids.shape[1]:
                continue  # old releases of transformers read the whole conversation again, attached or not
            results.append(out)
            assert torch.equal(kept(session)[0]["kept"], chosen)
    for other in results[1:]:
        close(other, results[0])


def test_generate_twice_with_the_same_cache_is_what_the_model_does():
    model, inputs = language_model(), prompt(batch=1, pad=(0,))

    def twice():
        cache = transformers.DynamicCache()
        return [scores(model, inputs, past_key_values=cache)[0] for _ in range(2)]

    plain = twice()
    with attnlib.attach(model, NoOp()):
        for a, b in zip(twice(), plain, strict=True):
            assert torch.equal(a, b)


# ---- snapshots


class Twice(Intervention):
    """Runs the module several times; what it returns is what one run gives."""

    def __init__(self, which):
        self.which = which

    def around_sublayer(self, site, hidden, call):
        outs = [call(hidden), call(hidden * 2), call(hidden)]
        return outs[self.which]


SLIDING = {"sliding_window": 8}
CACHES = {
    "dynamic": ("llama", {}, {}),
    "static": ("llama", {}, {"cache_implementation": "static"}),
    "sliding": ("mistral", SLIDING, {}),
    "static-sliding": ("mistral", SLIDING, {"cache_implementation": "static"}),
    "hybrid": ("qwen2", {**SLIDING, "use_sliding_window": True, "max_window_layers": 1}, {}),
    "static-hybrid": (
        "qwen2", {**SLIDING, "use_sliding_window": True, "max_window_layers": 1}, {"cache_implementation": "static"},
    ),
    "drafts": ("llama", {}, {"prompt_lookup_num_tokens": 2}),
}  # fmt: skip


@pytest.mark.parametrize("which", [0, 2])
@pytest.mark.parametrize("cache", CACHES)
def test_several_runs_share_nothing_that_is_written_in_place(cache, which):
    family, changes, mode = CACHES[cache]
    model = language_model(family, **changes)
    inputs = prompt(batch=1, pad=(0,)) if cache == "drafts" else prompt()
    want, tokens = scores(model, inputs, new=14, **mode)
    with attnlib.attach(model, Twice(which)):
        got, same = scores(model, inputs, new=14, **mode)
    assert torch.equal(tokens, same)
    close(got, want)


def by_place(module, args, kwargs):
    """All arguments up to the cache by place, as a model may call its attention."""
    first = parameters_of(module)[: parameters_of(module).index(cache_parameter(module)) + 1]
    return tuple(kwargs.pop(n, None) for n in first), kwargs


@pytest.mark.parametrize("mode", [{}, {"cache_implementation": "static"}], ids=str)
def test_several_runs_of_a_module_that_gets_its_cache_by_place(mode):
    model, inputs = language_model(), prompt()
    want, tokens = scores(model, inputs, new=4, **mode)
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(by_place, with_kwargs=True)
    with attnlib.attach(model, Twice(2)):
        got, same = scores(model, inputs, new=4, **mode)
    assert torch.equal(tokens, same)
    close(got, want)


@pytest.mark.parametrize("which", [0, 2])
@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_several_runs_on_a_compressed_cache(mode, which):
    model, inputs = language_model(), prompt()
    for make in MADE:
        with attnlib.attach(model, make()):
            want, tokens = scores(model, inputs, new=24, **mode)
        with attnlib.attach(model, make(), Twice(which)):
            got, same = scores(model, inputs, new=24, **mode)
        assert torch.equal(tokens, same)
        close(got, want)


def test_copies_of_a_compressed_layer_write_behind_their_own_keys():
    model, inputs = language_model(), prompt(pad=(0, 0))
    ids = inputs["input_ids"]
    with torch.no_grad(), attnlib.attach(model, snapkv()):
        cache = model(**inputs).past_key_values
        model(input_ids=ids[:, :1], past_key_values=cache)
        for shallow in (copy.copy(cache.layers[0]), copy.deepcopy(cache.layers[0])):
            held, layer = shallow.keys.clone(), cache.layers[0]
            shallow.belong(layer.session())
            keys = layer.keys
            layer.crop(-1)
            layer.update(torch.ones_like(held[:, :, :1]), torch.ones_like(held[:, :, :1]))
            assert torch.equal(shallow.keys, held) and torch.equal(keys, held)
            shallow.update(torch.zeros_like(held[:, :, :1]), torch.zeros_like(held[:, :, :1]))
            assert bool((layer.keys[:, :, -1] == 1).all())
            layer.crop(-1)
            layer.update(held[:, :, -1:], held[:, :, -1:])


# ---- saving and loading


def saved(cache):
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("through", [copy.deepcopy, saved, lambda c: pickle.loads(pickle.dumps(c))])
def test_a_compressed_cache_is_saved_and_loaded(through):
    model, inputs = language_model(), prompt()
    ids = inputs["input_ids"]
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 2, dtype=torch.long)], 1)

    def on(cache):
        steps = [(ids[:, i : i + 1], mask[:, : 21 + i]) for i in range(2)]
        return torch.cat(
            [model(input_ids=i, attention_mask=m, past_key_values=cache).logits for i, m in steps], 1
        )  # fmt: skip

    with torch.no_grad():
        with attnlib.attach(model, snapkv()):
            cache = model(**inputs).past_key_values
            before = through(cache)
            want = on(cache)
            assert torch.equal(on(through(before)), want)
        with pytest.raises(RuntimeError, match="session that is over"):
            on(through(before))
        with attnlib.attach(model, snapkv()):
            assert torch.equal(on(through(before)), want)
            # Another prompt in between changes nothing.
            model(**prompt(seed=7))
            assert torch.equal(on(through(before)), want)


# ---- hybrid and latent layers


def hybrid(name):
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": 4}
    alternating = ["sliding_attention", "full_attention"] * 2
    moe = {"num_local_experts": 2, "num_experts_per_tok": 1}
    config = {
        "gemma2": lambda: transformers.Gemma2Config(**sizes, head_dim=8, sliding_window=8, query_pre_attn_scalar=8,
                                                    attn_logit_softcapping=1.0),
        "gemma3": lambda: transformers.Gemma3TextConfig(**sizes, head_dim=8, sliding_window=8,
                                                        query_pre_attn_scalar=8, layer_types=alternating),
        "mistral": lambda: transformers.MistralConfig(**sizes, sliding_window=8),
        "qwen2": lambda: transformers.Qwen2Config(**sizes, use_sliding_window=True, sliding_window=8,
                                                  max_window_layers=2),
        "gpt-oss": lambda: transformers.GptOssConfig(**sizes, head_dim=8, sliding_window=8, **moe),
        "deepseek": lambda: transformers.DeepseekV3Config(
            **{**sizes, "num_key_value_heads": 4}, q_lora_rank=8, kv_lora_rank=16, qk_rope_head_dim=8,
            qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=2, num_experts_per_tok=1, first_k_dense_replace=4,
            n_group=1, topk_group=1),
        "qwen3-next": lambda: transformers.Qwen3NextConfig(
            **sizes, head_dim=8, linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8,
            linear_value_head_dim=8, num_experts=0, layer_types=["linear_attention", "full_attention"] * 2),
        "jamba": lambda: transformers.JambaConfig(**sizes, attn_layer_period=2, attn_layer_offset=1, num_experts=1,
                                                  num_experts_per_tok=1, use_mamba_kernels=False, mamba_d_state=4),
        "bamba": lambda: transformers.BambaConfig(**sizes, attn_layer_indices=[1, 3], mamba_n_heads=8, mamba_d_head=8,
                                                  mamba_d_state=4, mamba_n_groups=1, mamba_expand=2),
        "falcon-h1": lambda: transformers.FalconH1Config(**sizes, head_dim=8, mamba_n_heads=8, mamba_d_head=8,
                                                         mamba_d_ssm=64, mamba_d_state=4, mamba_n_groups=1),
    }[name]()  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


class Only(Intervention):
    """While decoding, keys of the prompt that are not among the chosen ones are masked."""

    def __init__(self, chosen):
        self.chosen, self.layers = chosen, list(chosen)

    def around_attention(self, site, q, k, v, call):
        if site.offset == 0:
            return call(q, k, v)
        slots = self.chosen[site.layer]
        allowed = torch.zeros(*slots.shape[:2], site.n_keys, dtype=torch.bool).scatter(-1, slots, True)
        allowed[..., 20:] = True
        allowed = allowed.repeat_interleave(site.heads // site.kv_heads, 1)[:, :, None] & site.mask.dense()
        return call(q, k, v, mask=allowed)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "qwen2", "gpt-oss", "qwen3-next", "jamba", "bamba"])
def test_compression_acts_on_the_full_layers_and_reports_the_rest(name):
    model, inputs = hybrid(name), prompt(pad=(0, 0))
    full = [0, 1] if name == "qwen2" else [1, 3]
    slides = name in ("gemma2", "gemma3", "qwen2", "gpt-oss")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with attnlib.attach(model, by_value()) as session:
            got, _ = scores(model, inputs, new=6)
    told = [str(w.message) for w in seen if "acts on what it can" in str(w.message)]
    assert sorted(kept(session)) == full and len(told) == slides
    if slides:
        rest = [n for n in range(4) if n not in full]
        assert list(session.report) == ["kv-compression"] and sorted(session.report["kv-compression"]) == rest
        assert f"layers {rest}: a DynamicSlidingWindowLayer" in told[0]
        layer = by_value()
        layer.layers = [rest[0], full[0]]
        with pytest.raises(ValueError, match=rf"layers \[{rest[0]}\]: a DynamicSliding.*possible: \[{full[0]}\]"):
            attnlib.attach(model, layer)
    else:
        assert session.report == {}
    with attnlib.attach(model, Only({n: one["kept"] for n, one in kept(session).items()})):
        want, _ = scores(model, inputs, new=6)
    close(got, want)
    assert not torch.allclose(want, scores(model, inputs, new=6)[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "said"),
    [("mistral", "DynamicSlidingWindowLayer holds its last tokens only"), ("falcon-h1", "recurrent state"),
     ("deepseek", "holds latents")],
)  # fmt: skip
def test_caches_that_cannot_lose_keys_are_named(name, said):
    model, inputs = hybrid(name), prompt(pad=(0, 0))
    if name == "deepseek" and model(**inputs).past_key_values.layers[0].keys.shape[1] > 1:
        pytest.skip("this release of transformers caches the keys of all heads")
    with pytest.raises(ValueError, match=said):
        with attnlib.attach(model, by_value()):
            scores(model, inputs, new=2)
    assert not model._forward_pre_hooks


def test_a_cache_of_another_kind_than_generate_makes_is_what_counts():
    model, inputs = hybrid("mistral"), prompt(pad=(0, 0))
    with torch.no_grad(), attnlib.attach(model, by_value()) as session:
        cache = transformers.DynamicCache()
        model(**inputs, past_key_values=cache)
        got = model(input_ids=inputs["input_ids"][:, :1], past_key_values=cache).logits
    assert cache.layers[0].keys.shape[2] == 8 + 1  # what the window still shows, within the cap
    with torch.no_grad(), attnlib.attach(model, Only({n: one["kept"] for n, one in kept(session).items()})):
        cache = transformers.DynamicCache()
        model(**inputs, past_key_values=cache)
        close(got, model(input_ids=inputs["input_ids"][:, :1], past_key_values=cache).logits)
