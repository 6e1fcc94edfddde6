"""The protocol on transformers models under ``generate()``: nothing touched that need not be, everything put back."""

import copy
import sys

import pytest
import torch

from hooks.models import NoOp, dense_attention, language_model, prompt, scores

transformers = pytest.importorskip("transformers")

import attnlib  # noqa: E402
from attnlib import masks  # noqa: E402
from attnlib.cache import SnapKV  # noqa: E402
from attnlib.hooks import Intervention, Record, TokenTypes  # noqa: E402
from attnlib.hooks import call as hooks_call  # noqa: E402
from attnlib.hooks import session as hooks_session  # noqa: E402
from attnlib.hooks.hf import adapter as adapter  # noqa: E402
from attnlib.steer import SoftPAG  # noqa: E402


def fingerprint(model):
    """Everything a session might leave behind."""
    return [
        (name, id(getattr(m, "config", None)), sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    ]


@pytest.fixture(scope="module", params=["llama", "qwen2", "mistral"])
def model(request):
    return language_model(request.param)


@pytest.fixture(scope="module")
def llama():
    return language_model("llama")


MODES = [
    pytest.param({}, id="greedy"),
    pytest.param({"num_beams": 3}, id="beams"),
    pytest.param({"cache_implementation": "static"}, id="static-cache"),
    pytest.param({"use_cache": False}, id="no-cache"),
]


@pytest.mark.parametrize("mode", MODES)
def test_no_op_gives_the_same_bits_under_generate_with_left_padding(model, mode):
    inputs = prompt()
    before, ids = scores(model, inputs, **mode)
    mark, no_op = fingerprint(model), NoOp([1])
    with attnlib.attach(model, no_op):
        inside, inside_ids = scores(model, inputs, **mode)
    after, _ = scores(model, inputs, **mode)
    assert torch.equal(inside, before) and torch.equal(inside_ids, ids) and torch.equal(after, before)
    assert fingerprint(model) == mark
    assert {s.layer for s in no_op.sites} == {1}
    if mode.get("use_cache", True):
        phases = [(s.phase, s.offset, s.n_queries) for s in no_op.sites[:3]]
        assert phases == [("prefill", 0, 20), ("decode", 20, 1), ("decode", 21, 1)]


def test_sampling_gives_the_same_tokens(llama):
    inputs = prompt()
    torch.manual_seed(3)
    before = llama.generate(**inputs, do_sample=True, max_new_tokens=6)
    with attnlib.attach(llama, NoOp()):
        torch.manual_seed(3)
        assert torch.equal(llama.generate(**inputs, do_sample=True, max_new_tokens=6), before)


def test_layers_without_stages_keep_config_and_function(llama):
    layers = llama.model.layers
    functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    sdpa = functions["sdpa"]
    with attnlib.attach(llama, NoOp([1])):
        for i in (0, 2):
            attn = layers[i].self_attn
            assert attn.config is llama.config and not attn._forward_hooks and not attn._forward_pre_hooks
            assert functions.get_interface(attn.config._attn_implementation, None) is sdpa
        assert layers[1].self_attn.config._attn_implementation == "attnlib_sdpa"
        assert llama.config._attn_implementation == "sdpa"
    assert layers[1].self_attn.config is llama.config


def test_name_is_registered_in_both_interfaces_and_stays_causal(llama):
    inputs = prompt()
    before = scores(llama, inputs)[0]
    name = adapter.register("sdpa")
    assert name in transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    assert name in transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    llama.set_attn_implementation(name)
    try:
        assert torch.equal(scores(llama, inputs)[0], before)
        changed = {k: v.clone() for k, v in inputs.items()}
        changed["input_ids"][:, -1] = 7
        a, b = (llama(**i).logits[:, 5:-1] for i in (inputs, changed))
        assert torch.equal(a, b)
    finally:
        llama.set_attn_implementation("sdpa")
    # What happens to a name that only AttentionInterface knows: padding becomes visible.
    plain = transformers.AttentionInterface
    plain.register("attnlib_test_no_mask", transformers.integrations.sdpa_attention.sdpa_attention_forward)
    llama.set_attn_implementation("attnlib_test_no_mask")
    try:
        assert not torch.allclose(scores(llama, inputs)[0][:, 0], before[:, 0], atol=1e-4)
    finally:
        llama.set_attn_implementation("sdpa")
        plain._global_mapping.pop("attnlib_test_no_mask")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_recorded_weights_are_the_models_own(implementation):
    model = language_model(attn_implementation=implementation)
    inputs = prompt()
    with torch.no_grad():
        with attnlib.attach(model, Record(rows="all")) as session:
            model(**inputs)
        model.set_attn_implementation("eager")
        truth = model(**inputs, output_attentions=True).attentions
    real = inputs["attention_mask"].bool()
    for layer, weights in enumerate(truth):
        mine = session.results["record"][layer]["weights"][0]
        torch.testing.assert_close(mine.transpose(1, 2)[real], weights.transpose(1, 2)[real], atol=1e-5, rtol=1e-5)


class Halve(Intervention):
    """Score edit: halve the scores of one head, by rows."""

    name = "halve"

    def __init__(self, whole=False):
        self.whole = whole

    @property
    def whole_map(self):  # type: ignore[override]
        return self.whole

    def on_scores(self, site, scores, rows):
        assert scores.shape[2] == len(rows) and (not self.whole or len(rows) == site.n_queries)
        return torch.cat([scores[:, :1] * 0.5, scores[:, 1:]], 1)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_score_edits_equal_scaled_queries_whatever_the_blocks(implementation, monkeypatch):
    model = language_model(attn_implementation=implementation)
    inputs = prompt()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer in other.model.layers:
            layer.self_attn.q_proj.weight[: layer.self_attn.head_dim] *= 0.5
    want, _ = scores(other, inputs)
    for elements, whole in ((1 << 22, False), (200, False), (200, True)):
        monkeypatch.setattr(hooks_call, "BLOCK_ELEMENTS", elements)
        with attnlib.attach(model, Halve(whole)):
            got, _ = scores(model, inputs)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_edits_that_write_in_place_or_reshape_are_refused(llama):
    class InPlace(Intervention):
        def on_weights(self, site, weights, rows):
            return weights.mul_(2)

    class Short(Intervention):
        def on_scores(self, site, scores, rows):
            return scores[..., 1:]

    for bad, match in ((InPlace(), "wrote into its input"), (Short(), "returned shape")):
        with attnlib.attach(llama, bad), pytest.raises(ValueError, match=match):
            llama(**prompt())


def test_only_changed_rows_leave_the_kernel(llama):
    class OneRow(Intervention):
        def on_weights(self, site, weights, rows):
            here = (rows == 12).view(1, 1, -1, 1) & (torch.arange(4) == 1).view(1, -1, 1, 1)
            return torch.where(here, weights.flip(-1), weights)

    class Grab(Intervention):
        name = "grab"

        def __init__(self):
            self.layers = [0]

        def on_output(self, site, out):
            self.out = out
            return out

    grabs = []
    for extra in ((), (OneRow(),)):
        grab = Grab()
        with torch.no_grad(), attnlib.attach(llama, *extra, grab):
            llama(**prompt())
        grabs.append(grab.out)
    differ = (grabs[0] != grabs[1]).any(-1)
    assert differ[:, 1, 12].all() and differ.sum() == 2


def test_new_keys_are_edited_before_they_are_cached(llama):
    class Shift(Intervention):
        def on_qkv(self, site, q, k, v):
            assert site.rotary and k.shape[2] == site.n_queries
            return q * 0.5, k, v + 0.25

    inputs = prompt()
    other = copy.deepcopy(llama)
    with torch.no_grad():
        for layer in other.model.layers:
            attn = layer.self_attn
            attn.q_proj.weight *= 0.5
            attn.v_proj.bias = torch.nn.Parameter(torch.full((attn.v_proj.out_features,), 0.25))
    want, _ = scores(other, inputs)
    for mode in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        with attnlib.attach(llama, Shift()):
            torch.testing.assert_close(scores(llama, inputs, **mode)[0], want, atol=1e-5, rtol=1e-5)


def test_a_cache_under_another_name():
    """GPT-NeoX passes its cache as layer_past: positions, edits of new keys and evictions know it."""
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        eos_token_id=None,
    )  # fmt: skip
    model, inputs = transformers.GPTNeoXForCausalLM(config).eval(), prompt()
    length = inputs["input_ids"].shape[1]

    class Shift(Intervention):
        def __init__(self):
            self.seen = []

        def on_qkv(self, site, q, k, v):
            self.seen.append((site.phase, site.q_pos.tolist()))
            return q, k, v + 0.25

    class Twice(Intervention):
        def around_sublayer(self, site, hidden, call):
            return (call(hidden) + call(hidden)) / 2

    class Keep(Intervention):
        def on_cache(self, site, q, k, v):
            return torch.arange(8, k.shape[2]).expand(*k.shape[:2], -1)

    class Hide(Intervention):
        def around_attention(self, site, q, k, v, call):
            old = site.query_slots() >= length
            allowed = site.mask.dense(q.device) & ~(old & (site.key_slots() < 8))
            return call(q, k, v, mask=allowed)

    plain, _ = scores(model, inputs)
    shift = Shift()
    with attnlib.attach(model, shift):
        edited, _ = scores(model, inputs)
    assert shift.seen[-1] == ("decode", [length + 3]) and shift.seen[0] == ("prefill", list(range(length)))
    with attnlib.attach(model, Shift()):
        again, _ = scores(model, inputs, use_cache=False)
    torch.testing.assert_close(edited, again, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(edited, plain, atol=1e-3)
    with attnlib.attach(model, Twice()):
        torch.testing.assert_close(scores(model, inputs)[0], plain, atol=1e-5, rtol=1e-5)
    with attnlib.attach(model, Keep()):
        evicted, _ = scores(model, inputs)
    with attnlib.attach(model, Hide()):
        hidden, _ = scores(model, inputs)
    torch.testing.assert_close(evicted, hidden, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(evicted, plain, atol=1e-4)


def test_read_keys_are_edited_without_changing_the_cache(llama):
    class NoValues(Intervention):
        def on_kv_read(self, site, k, v):
            return k, torch.zeros_like(v)

    class NoOutput(Intervention):
        def on_output(self, site, out):
            return torch.zeros_like(out)

    with attnlib.attach(llama, NoValues()):
        a, _ = scores(llama, prompt())
    with attnlib.attach(llama, NoOutput()):
        b, _ = scores(llama, prompt())
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_keys_and_values_from_different_sources(llama):
    class ValuesFromZero(Intervention):
        layers = [1]

        def on_context(self, site, k_source, v_source):
            return k_source, torch.zeros_like(v_source)

    class NoOutput(Intervention):
        layers = [1]

        def on_output(self, site, out):
            return torch.zeros_like(out)

    with attnlib.attach(llama, ValuesFromZero()):
        a, _ = scores(llama, prompt())
    with attnlib.attach(llama, NoOutput()):
        b, _ = scores(llama, prompt())
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_block_input_reads_the_residual_stream_and_may_change_it(llama):
    class Look(Intervention):
        kinds = ("self",)

        def __init__(self, change=False):
            self.change, self.seen = change, {}

        def on_block_input(self, site, hidden):
            self.seen[site.layer] = hidden
            return torch.zeros_like(hidden) if self.change else None

    look = Look()
    with torch.no_grad(), attnlib.attach(llama, look):
        states = llama(**prompt(), output_hidden_states=True).hidden_states
    assert all(torch.equal(look.seen[i], states[i]) for i in range(3))
    with torch.no_grad(), attnlib.attach(llama, Look(change=True)):
        assert llama(**prompt()).logits.abs().max() == 0


def test_masks_of_the_library_replace_the_models(llama):
    class Window(Intervention):
        def around_attention(self, site, q, k, v, call):
            return call(q, k, v, mask=masks.recent(4))

    class Oracle(Intervention):
        def around_attention(self, site, q, k, v, call):
            distance = site.q_pos[:, None] - site.k_pos
            return dense_attention(q, k, v, (distance >= 0) & (distance < 4))[0]

    inputs = prompt(pad=(0, 0))
    with attnlib.attach(llama, Window()):
        a, _ = scores(llama, inputs)
    with attnlib.attach(llama, Oracle()):
        b, _ = scores(llama, inputs)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_interventions_compose_in_order(llama):
    class Add(Intervention):
        def __init__(self, name, log):
            self.label, self.log, self.layers = name, log, [0]

        def around_attention(self, site, q, k, v, call):
            self.log.append(f"{self.label} in")
            out = call(q, k, v)
            self.log.append(f"{self.label} out")
            return out

        def on_kv_read(self, site, k, v):
            self.log.append(f"{self.label} read")
            return k, v

    log = []
    with attnlib.attach(llama, Add("a", log), Add("b", log)):
        llama(**prompt())
    assert log == ["a read", "b read", "a in", "b in", "b out", "a out"]


def test_an_exception_inside_restores_the_model(llama):
    class Breaks(Intervention):
        def on_output(self, site, out):
            if site.phase == "decode" and site.layer == 1:
                raise ZeroDivisionError
            return out * 2

        def on_qkv(self, site, q, k, v):
            return q, k, v

    inputs = prompt()
    before, _ = scores(llama, inputs)
    mark = fingerprint(llama)
    with pytest.raises(ZeroDivisionError), attnlib.attach(llama, Breaks()):
        scores(llama, inputs)
    assert fingerprint(llama) == mark and torch.equal(scores(llama, inputs)[0], before)


def test_a_failed_attach_leaves_nothing(llama):
    class Missing(Intervention):
        def on_context(self, site, k_source, v_source):
            return k_source, v_source

    odd = language_model()
    attn = odd.model.layers[2].self_attn
    attn.key_projection, attn.k_proj = attn.k_proj, None
    mark = fingerprint(odd)
    with pytest.raises(ValueError, match="k_proj"):
        attnlib.attach(odd, Missing())
    assert fingerprint(odd) == mark and not hooks_session._sessions.get(odd)


def test_gradients_pass(llama):
    embeds = torch.randn(1, 6, 32, requires_grad=True)
    plain = torch.autograd.grad(llama(inputs_embeds=embeds).logits.sum(), embeds)[0]
    with attnlib.attach(llama, NoOp()):
        assert torch.equal(torch.autograd.grad(llama(inputs_embeds=embeds).logits.sum(), embeds)[0], plain)
    with attnlib.attach(llama, Halve()):
        assert not torch.allclose(torch.autograd.grad(llama(inputs_embeds=embeds).logits.sum(), embeds)[0], plain)


def test_cross_attention_of_an_encoder_decoder():
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64,
        pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config).eval()
    ids = torch.randint(3, 40, (2, 7))
    before = model.generate(ids, max_new_tokens=4, min_new_tokens=4)
    with attnlib.attach(model, Record(rows="all")) as session:
        assert {(s.layer, s.kind) for s in session.sites} == {(0, "self"), (0, "cross"), (1, "self"), (1, "cross")}
        assert torch.equal(model.generate(ids, max_new_tokens=4, min_new_tokens=4), before)
    with pytest.raises(ValueError, match="on_qkv is missing for cross-attention"):
        attnlib.attach(model, NoOp())
    assert torch.equal(model.generate(ids, max_new_tokens=4, min_new_tokens=4), before)
    cross = session.results["record"]["0 cross"]["weights"]
    assert all(w.shape[-1] == 7 for w in cross)
    torch.testing.assert_close(cross[0].sum(-1), torch.ones_like(cross[0].sum(-1)))


def test_only_the_decoder_of_a_vision_language_model_is_numbered():
    from hooks.llava import llava, llava_inputs

    model = llava()
    inputs = llava_inputs(model)
    with attnlib.attach(model, Record()) as session:
        assert [s.layer for s in session.sites] == [0, 1, 2]
        assert all("vision" not in s.name for s in session.sites)
        model(**inputs)
    with attnlib.attach(model, Record(rows="all"), part="model.vision_tower") as session:
        assert all("vision" in s.name for s in session.sites)
        model(**inputs)
    weights = session.results["record"][0]["weights"][0]
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))


# ---- bad input


def test_attaching_twice_is_refused(llama):
    with attnlib.attach(llama, NoOp()):
        with pytest.raises(ValueError, match="has a session already"):
            attnlib.attach(llama, NoOp())
        with pytest.raises(ValueError, match="has a session already"):
            attnlib.attach(llama.model, NoOp())
    record = Record()
    with attnlib.attach(llama, record):
        with pytest.raises(ValueError, match="attached already"):
            attnlib.attach(language_model(), record)
    with pytest.raises(ValueError, match="given twice"):
        attnlib.attach(llama, record, record)
    session = attnlib.attach(llama, record)
    session.detach()
    session.detach()


@pytest.mark.parametrize(
    "make, error, match",
    [
        (lambda: Record(layers=[3]), ValueError, r"layer 3 does not exist.*possible: \[0, 1, 2\]"),
        (lambda: Record(layers=[-4]), ValueError, "layer -4 does not exist"),
        (lambda: Record(layers=[]), ValueError, "layers is empty"),
        (lambda: Record(layers=["model.layers.9*"]), ValueError, "model.layers.0.self_attn"),
        (lambda: Record(layers=2), TypeError, "not iterable|sequence"),
        (lambda: Record(heads=[4]), ValueError, "head 4 does not exist.*possible: 0 to 3"),
        (lambda: SoftPAG(1.0, heads={1: [7]}), ValueError, "head 7 does not exist in layer 1"),
        (lambda: SnapKV, TypeError, r"make one: SnapKV\(...\)"),
        (lambda: [Record(), Record()], TypeError, r"give several as attach\(model, a, b\)"),
        (lambda: object(), TypeError, "not an intervention"),
    ],
)
def test_unknown_layers_heads_and_things(llama, make, error, match):
    with pytest.raises(error, match=match):
        attnlib.attach(llama, make())


def test_compiled_models_are_refused_and_not_left_changed(llama):
    inputs = {"input_ids": torch.arange(3, 15)[None]}
    compiled = torch.compile(llama, backend="eager")
    with pytest.raises(TypeError, match="attach to the model that it was made of, model._orig_mod"):
        attnlib.attach(compiled, Record())
    with torch.no_grad():
        plain = compiled(**inputs).logits
        with attnlib.attach(compiled._orig_mod, SoftPAG(1.0)):
            assert not torch.allclose(compiled._orig_mod(**inputs).logits, plain, atol=1e-3)
        torch.testing.assert_close(compiled(**inputs).logits, plain, atol=0, rtol=0)


def test_stages_that_are_not_served_are_named(llama, monkeypatch):
    class Sources(Intervention):
        def on_context(self, site, k_source, v_source):
            return k_source, v_source

    served = adapter.TransformersAdapter.stages - {"on_context"}
    monkeypatch.setattr(adapter.TransformersAdapter, "stages", served)
    with pytest.raises(ValueError, match="on_context, which is missing for transformers models"):
        attnlib.attach(llama, Sources())


def test_models_that_cannot_be_reached_say_what_is_missing():
    with pytest.raises(TypeError, match="neither a transformers nor a diffusers model"):
        attnlib.attach(torch.nn.Linear(2, 2), Record())
    with pytest.raises(TypeError, match="must be a torch.nn.Module"):
        attnlib.attach("llama", Record())
    mamba = transformers.MambaModel(transformers.MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=8))
    with pytest.raises(TypeError, match="AttentionInterface"):
        attnlib.attach(mamba, Record())


def test_missing_extra_names_the_install(monkeypatch, llama):
    adapter._need.cache_clear()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'attnlib\[hf\]'"):
        attnlib.attach(llama, Record())
    monkeypatch.undo()
    adapter._need.cache_clear()
    with attnlib.attach(llama, Record()):
        pass


def test_import_is_lazy():
    import subprocess

    code = (
        "import sys, attnlib, attnlib.hooks, attnlib.cache, attnlib.steer;"
        "assert not {'transformers', 'diffusers'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_masks_that_cannot_be_read_are_refused(llama, monkeypatch):
    other = language_model(attn_implementation="flex_attention")
    with pytest.raises(ValueError, match="flex_attention.*cannot be read pair by pair"):
        attnlib.attach(other, Record())


def test_rows_are_given_and_checked(llama):
    inputs = prompt()
    with attnlib.attach(llama, NoOp(), rows=("cond",)), pytest.raises(ValueError, match="got a batch of 2"):
        llama(**inputs)
    with pytest.raises(TypeError, match="sequence of names"):
        attnlib.attach(llama, NoOp(), rows="cond")
    no_op = NoOp()
    with attnlib.attach(llama, no_op, rows=("cond", "uncond")) as session:
        with session.at(branch="image", pass_name="second", step=4):
            llama(**inputs)
        llama(**inputs)
    first, last = no_op.sites[0], no_op.sites[-1]
    assert (first.rows, first.branch, first.pass_name, first.step) == (("cond", "uncond"), "image", "second", 4)
    assert (last.branch, last.pass_name, last.step) == (None, None, None)


def test_token_types_that_are_too_few_are_refused(llama):
    inputs = {"input_ids": torch.arange(3, 15)[None], "attention_mask": torch.ones(1, 12, dtype=torch.long)}
    few = torch.ones(1, 9, dtype=torch.long)
    with attnlib.attach(llama, NoOp(), token_types=few), pytest.raises(ValueError, match="tells of 9 tokens.*has 12"):
        scores(llama, inputs)
    with attnlib.attach(llama, NoOp(), token_types=torch.ones(1, 12, dtype=torch.long)):
        scores(llama, inputs, use_cache=False)


def test_token_types_follow_generation(llama):
    class Types(Intervention):
        needs_types = True

        def __init__(self):
            self.seen = []

        def on_output(self, site, out):
            if site.layer == 0:
                self.seen.append((site.q_types.clone(), site.k_types.clone()))
            return out

    inputs = prompt()
    inputs["input_ids"][:, 8:11] = 61
    for mode in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
        types = Types()
        with attnlib.attach(llama, types, token_types=TokenTypes(image=61)):
            scores(llama, inputs, new=3, **mode)
        rows = 2 * mode.get("num_beams", 1)
        want = torch.tensor([[0] * 5 + [1] * 3 + [2] * 3 + [1] * 9, [1] * 8 + [2] * 3 + [1] * 9])
        want = want.repeat_interleave(rows // 2, 0)
        assert torch.equal(types.seen[0][0], want)
        assert torch.equal(types.seen[-1][0], torch.full((rows, 1), 5))
        assert torch.equal(types.seen[-1][1][:, :22], torch.cat([want, torch.full((rows, 2), 5)], 1))
    with pytest.raises(ValueError, match="token_types"):
        attnlib.attach(llama, Types())
    with attnlib.attach(llama, Types(), token_types=want[:1]), pytest.raises(ValueError, match="1 rows"):
        llama(**inputs)
    with (
        attnlib.attach(llama, Types(), token_types=TokenTypes(61)),
        pytest.raises(ValueError, match="without input_ids"),
    ):
        llama(inputs_embeds=torch.zeros(1, 2, 32))
    for bad in (torch.zeros(3, dtype=torch.long), torch.zeros(1, 3), torch.full((1, 3), 9)):
        with pytest.raises(ValueError, match="token_types"):
            attnlib.attach(llama, Types(), token_types=bad)
