"""Stages around layers and around decoding: sublayers, logits, steps, and branches that run beside each other."""

import copy

import pytest
import torch

from hooks.models import language_model, prompt, scores

transformers = pytest.importorskip("transformers")

import attnlib  # noqa: E402
from attnlib.cache import SnapKV  # noqa: E402
from attnlib.hooks import Intervention, Probe, TokenTypes  # noqa: E402
from attnlib.hooks import session as hooks_session  # noqa: E402

MODES = [
    pytest.param({}, id="greedy"),
    pytest.param({"num_beams": 3}, id="beams"),
    pytest.param({"cache_implementation": "static"}, id="static-cache"),
    pytest.param({"use_cache": False}, id="no-cache"),
]


@pytest.fixture(scope="module")
def llama():
    return language_model("llama")


# ---- around_sublayer


class Sublayer(Intervention):
    def __init__(self, fn, layers=None):
        self.fn, self.layers, self.sites = fn, layers, []

    def around_sublayer(self, site, hidden, call):
        self.sites.append(site)
        return self.fn(hidden, call)


@pytest.mark.parametrize("mode", MODES)
def test_a_sublayer_that_only_calls_gives_the_same_bits(llama, mode):
    inputs = prompt()
    before, ids = scores(llama, inputs, **mode)
    same = Sublayer(lambda x, call: call(x), [1])
    with attnlib.attach(llama, same):
        attn = llama.model.layers[1].self_attn
        assert attn.config is llama.config  # the attention function is not touched for it
        inside, inside_ids = scores(llama, inputs, **mode)
    assert torch.equal(inside, before) and torch.equal(inside_ids, ids)
    assert "forward" not in attn.__dict__ and torch.equal(scores(llama, inputs, **mode)[0], before)
    if mode.get("use_cache", True):
        assert [(s.phase, s.offset, s.n_queries) for s in same.sites[:2]] == [("prefill", 0, 20), ("decode", 20, 1)]


@pytest.mark.parametrize("mode", MODES)
def test_what_the_module_reads_and_gives_is_edited(llama, mode):
    """Half the input of the attention module and thrice its output are other norm and output weights."""
    other = copy.deepcopy(llama)
    with torch.no_grad():
        for layer in other.model.layers:
            layer.input_layernorm.weight *= 0.5
            layer.self_attn.o_proj.weight *= 3
    want, _ = scores(other, prompt(), **mode)
    with attnlib.attach(llama, Sublayer(lambda x, call: 3 * call(x * 0.5))):
        got, _ = scores(llama, prompt(), **mode)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_several_calls_leave_the_cache_of_the_first(llama, mode):
    """The second call reads the same keys before this call; what it writes is forgotten."""
    inputs = prompt()
    before, _ = scores(llama, inputs, **mode)
    twice = Sublayer(lambda x, call: 2 * call(x) - call(x))
    with attnlib.attach(llama, twice):
        torch.testing.assert_close(scores(llama, inputs, **mode)[0], before, atol=2e-5, rtol=1e-5)
    first = Sublayer(lambda x, call: (call(x), call(-x), call(x * 7))[0])
    with attnlib.attach(llama, first):
        assert torch.equal(scores(llama, inputs, **mode)[0], before)

    # The other order of the same two runs: what the second one gives is what it gives alone.
    grabbed = []

    def grab(x, call):
        a, b = call(x), call(-x)
        grabbed.append(b)
        return a

    alone = []
    if mode == {}:
        layer = llama.model.layers[0].self_attn
        with torch.no_grad(), attnlib.attach(llama, Sublayer(grab, [0])):
            llama(**inputs)
        with torch.no_grad(), attnlib.attach(llama, Sublayer(lambda x, call: alone.append(call(-x)) or x, [0])):
            llama(**inputs)
        assert torch.equal(grabbed[0], alone[0]) and layer._forward_hooks == {}


def test_several_calls_compose_with_edited_and_evicted_keys(llama):
    class Shift(Intervention):
        def on_qkv(self, site, q, k, v):
            return q, k, v + 0.25

    inputs = prompt(length=24)
    first = Sublayer(lambda x, call: (call(x), call(-x))[0])
    for others in ([Shift()], [SnapKV(cap=10, window_size=4, kernel_size=3)]):
        with attnlib.attach(llama, *others) as session:
            want, _ = scores(llama, inputs)
            results = session.results
        with attnlib.attach(llama, *others, first) as session:
            got, _ = scores(llama, inputs)
            assert torch.equal(got, want)
            if "snapkv" in results:
                for layer, kept in results["snapkv"].items():
                    assert torch.equal(session.results["snapkv"][layer]["kept"], kept["kept"])


@pytest.mark.parametrize("mode", MODES)
def test_without_a_call_the_attention_is_left_out(llama, mode):
    inputs = prompt()
    other = copy.deepcopy(llama)
    with torch.no_grad():
        other.model.layers[0].self_attn.o_proj.weight.zero_()
    want, _ = scores(other, inputs, **mode)
    with attnlib.attach(llama, Sublayer(lambda x, call: torch.zeros_like(x), [0])):
        torch.testing.assert_close(scores(llama, inputs, **mode)[0], want, atol=1e-6, rtol=1e-5)


def test_sublayers_see_positions_masks_and_types(llama):
    inputs = prompt()
    seen = []

    class See(Intervention):
        layers = [1]

        def around_sublayer(self, site, hidden, call):
            seen.append(("sublayer", site))
            return call(hidden)

        def around_attention(self, site, q, k, v, call):
            seen.append(("attention", site))
            return call(q, k, v)

    for others in ((), (SnapKV(cap=10, window_size=4, kernel_size=3),)):
        seen.clear()
        with attnlib.attach(llama, See(), *others, token_types=TokenTypes(image=61)):
            scores(llama, inputs, new=3)
        assert len(seen) == 6
        for (name, a), (_, b) in zip(seen[::2], seen[1::2], strict=True):
            assert name == "sublayer"
            assert torch.equal(a.q_pos, b.q_pos) and torch.equal(a.k_pos, b.k_pos)
            assert torch.equal(a.q_types, b.q_types) and torch.equal(a.k_types, b.k_types)
            assert torch.equal(*torch.broadcast_tensors(a.mask.dense(), b.mask.dense()))


def test_a_sublayer_of_another_shape_is_refused_and_leaves_nothing(llama):
    before, _ = scores(llama, prompt())
    with (
        attnlib.attach(llama, Sublayer(lambda x, call: call(x)[:, 1:])),
        pytest.raises(ValueError, match="must return"),
    ):
        llama(**prompt())
    with attnlib.attach(llama, Sublayer(lambda x, call: 1 / 0)) as session:
        with pytest.raises(ZeroDivisionError):
            llama(**prompt())
        with pytest.raises(ZeroDivisionError):  # nothing of the failed call is in the way
            llama(**prompt())
        assert session.active
    assert torch.equal(scores(llama, prompt())[0], before)


def test_sublayers_of_cross_attention_and_vision():
    from hooks.llava import llava, llava_inputs

    model = llava()
    inputs = llava_inputs(model)
    with torch.no_grad():
        before = model(**inputs).logits
        with attnlib.attach(model, Sublayer(lambda x, call: 2 * call(x) - call(x)), part="model.vision_tower"):
            torch.testing.assert_close(model(**inputs).logits, before, atol=1e-5, rtol=1e-5)
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64,
        pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    bart = transformers.BartForConditionalGeneration(config).eval()
    ids = torch.randint(3, 40, (2, 7))
    for mode in ({}, {"num_beams": 2}):
        before, _ = scores(bart, {"input_ids": ids}, **mode)
        with attnlib.attach(bart, Sublayer(lambda x, call: (call(x), call(-x))[0])):
            assert torch.equal(scores(bart, {"input_ids": ids}, **mode)[0], before)


# ---- on_logits


class Logits(Intervention):
    name = "logits"

    def __init__(self, fn=lambda ids, z: z):
        self.fn, self.calls = fn, []

    def on_logits(self, ids, logits):
        self.calls.append((ids.clone(), logits.clone()))
        return self.fn(ids, logits)


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"use_cache": False}, {"do_sample": True, "top_k": 5}])
def test_logits_that_are_left_alone_change_nothing(llama, mode):
    inputs, own = prompt(), Logits()

    def run():
        torch.manual_seed(0)
        return llama.generate(**inputs, **{"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, **mode})

    before, list_before = run(), dict(llama.__dict__)
    with attnlib.attach(llama, own):
        assert torch.equal(run(), before)
        assert all(m.config is llama.config for m in llama.modules() if hasattr(m, "config"))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.model.modules())
    assert llama.__dict__.keys() == list_before.keys() and torch.equal(run(), before)
    rows = 2 * mode.get("num_beams", 1)
    assert [tuple(ids.shape) for ids, _ in own.calls] == [(rows, 20 + i) for i in range(6)]


def test_edited_logits_come_before_the_users_processors(llama):
    inputs, seen = prompt(), []

    class Mine(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(scores.clone())
            return scores

    mine = transformers.LogitsProcessorList([Mine()])
    ban = Logits(lambda ids, z: z.index_fill(1, torch.tensor([7, 9]), float("-inf")) * 2)
    with attnlib.attach(llama, ban):
        llama.generate(
            **inputs, do_sample=False, max_new_tokens=3, min_new_tokens=3, logits_processor=mine, temperature=None
        )
    assert len(mine) == 1
    for (_, z), after in zip(ban.calls, seen, strict=True):
        want = z.clone()
        want[:, [7, 9]] = float("-inf")
        assert torch.equal(after, want * 2)


def test_beams_add_normalised_scores(llama):
    """Halved logits under beams are those of a model whose head has half the weights."""
    other = copy.deepcopy(llama)
    with torch.no_grad():
        other.lm_head.weight *= 20
    settings = dict(num_beams=3, do_sample=False, max_new_tokens=5, min_new_tokens=5, num_return_sequences=3)
    want = other.generate(**prompt(), **settings, return_dict_in_generate=True, output_scores=True)
    with attnlib.attach(llama, Logits(lambda ids, z: z * 20)):
        got = llama.generate(**prompt(), **settings, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(got.sequences_scores, want.sequences_scores, atol=1e-5, rtol=1e-5)


def test_logits_pass_in_order_also_outside_generate(llama):
    ids = prompt()["input_ids"]
    with attnlib.attach(llama, Logits(lambda ids, z: z + 1), Logits(lambda ids, z: z * 2)) as session:
        assert torch.equal(session.logits(ids, torch.ones(2, 4)), torch.full((2, 4), 4.0))
        with pytest.raises(ValueError, match=r"ids must be \(B, L\)"):
            session.logits(ids, torch.ones(3, 4))
        with pytest.raises(RuntimeError, match="no prompt yet"):
            session.prompt  # noqa: B018
    with attnlib.attach(llama, Logits(lambda ids, z: z[:, 1:])), pytest.raises(ValueError, match="must return"):
        llama.generate(**prompt(), max_new_tokens=2)


# ---- branches


class Branch(Intervention):
    """Contrastive decoding with the prompt's first tokens masked in the second branch, its own cache."""

    name = "branch"

    def __init__(self, drop=4, a=1.5, b=-0.5, cache=True):
        self.drop, self.a, self.b, self.cache, self.steps = drop, a, b, cache, []

    def on_step(self, step):
        self.steps.append(step)

    def on_logits(self, ids, logits):
        session = self.session
        mask = session.prompt["attention_mask"].clone()
        assert len(mask) == len(ids)
        mask[:, 5 : 5 + self.drop] = 0
        mask = torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], 1)
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        with session.at(branch="dropped"), torch.no_grad():
            notes = session.notes
            if not self.cache:
                out = session.model(input_ids=ids, attention_mask=mask, position_ids=position_ids, use_cache=False)
                return self.a * logits + self.b * out.logits[:, -1]
            parents = None
            with session_main(session):
                parents = session.parents()
            if parents is None:
                held = transformers.DynamicCache(config=session.model.config)
                new = ids
            else:
                held, new = notes["held"], ids[:, -1:]
                held.reorder_cache(parents)
            out = session.model(
                input_ids=new, attention_mask=mask, position_ids=position_ids[:, -new.shape[1] :],
                past_key_values=held, use_cache=True,
            )  # fmt: skip
            session.notes["held"] = held
        return self.a * logits + self.b * out.logits[:, -1]


class session_main:
    """Look at the main branch for a moment."""

    def __init__(self, session):
        self.session = session

    def __enter__(self):
        self.before, self.session.branch = self.session.branch, None

    def __exit__(self, *_):
        self.session.branch = self.before


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_a_branch_with_its_own_cache_equals_one_without(llama, mode):
    """Positions, types and recorded sites of both branches stay apart, although they run in turn."""
    settings = dict(max_new_tokens=6, min_new_tokens=6, return_dict_in_generate=True, output_scores=True)
    settings |= {"do_sample": False, **mode}
    found = []
    for cache in (False, True):
        torch.manual_seed(0)
        with attnlib.attach(llama, Branch(cache=cache)):
            found.append(llama.generate(**prompt(), **settings))
    assert torch.equal(found[0].sequences, found[1].sequences)
    for a, b in zip(found[0].scores, found[1].scores, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    plain = llama.generate(**prompt(), **settings)
    assert not torch.allclose(plain.scores[0], found[0].scores[0], atol=1e-2)


def test_each_branch_has_its_own_types_phases_and_steps(llama):
    class Watch(Intervention):
        needs_types = True
        layers = [2]

        def __init__(self):
            self.seen = []

        def on_output(self, site, out):
            self.seen.append((site.branch, site.phase, site.offset, tuple(site.k_types.shape), site.k_types.clone()))
            return out

    inputs, watch, branch = prompt(), Watch(), Branch()
    inputs["input_ids"][:, 12:15] = 61
    with attnlib.attach(llama, watch, branch, token_types=TokenTypes(image=61)):
        scores(llama, inputs, new=3)
        scores(llama, inputs, new=2)
    assert branch.steps == [0, 1, 2, 0, 1]
    want = []
    for new in (3, 2):
        for i in range(new):
            for name in (None, "dropped"):
                want.append((name, "decode" if i else "prefill", 20 + i - 1 if i else 0, (2, 20 + i)))
    assert [entry[:4] for entry in watch.seen] == want
    main, dropped = watch.seen[0][-1], watch.seen[1][-1]
    assert (main[1] == torch.tensor([1] * 12 + [2] * 3 + [1] * 5)).all()
    assert (dropped[:, 5:9] == 0).all() and torch.equal(dropped[:, 9:], main[:, 9:])


def test_a_branch_may_have_types_of_its_own(llama):
    inputs = prompt(pad=(0, 0))
    types = torch.ones(2, 20, dtype=torch.long)
    seen = []

    class Watch(Intervention):
        layers = [0]

        def on_output(self, site, out):
            seen.append(site.k_types.clone())
            return out

    with attnlib.attach(llama, Watch(), token_types=types) as session:
        llama(**inputs)
        with session.at(branch="short", token_types=types[:, :3] + 1):
            llama(input_ids=inputs["input_ids"][:, :3])
        llama(**inputs)
        with session.at(branch="other"):
            llama(**inputs)
        with pytest.raises(ValueError, match="name it"):
            with session.at(token_types=types):
                pass
    assert [tuple(t.shape) for t in seen] == [(2, 20), (2, 3), (2, 20), (2, 20)] and (seen[1] == 2).all()


def test_a_model_run_inside_a_layer_does_not_disturb_it(llama):
    """Re-entrance: an attention call that runs the whole model before it goes on."""
    inputs = prompt()
    before, _ = scores(llama, inputs)

    class Inner(Intervention):
        layers = [1]
        depth = 0

        def around_attention(self, site, q, k, v, call):
            if self.depth == 0 and site.branch is None:
                self.depth += 1
                with self.session.at(branch="inner"):
                    self.session.model(input_ids=inputs["input_ids"][:1, 5:11], use_cache=True)
                self.depth -= 1
            return call(q, k, v)

        def on_qkv(self, site, q, k, v):
            return q, k, v

    with attnlib.attach(llama, Inner(), token_types=TokenTypes(image=61)):
        assert torch.equal(scores(llama, inputs)[0], before)


def test_generate_inside_on_logits_is_not_asked_again(llama):
    class Ask(Intervention):
        def __init__(self):
            self.asked = 0

        def on_logits(self, ids, logits):
            self.asked += 1
            with self.session.at(branch="draft"):
                self.session.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
            return logits

    inputs = prompt(pad=(0, 0))
    before, _ = scores(llama, inputs, new=3)
    ask = Ask()
    with attnlib.attach(llama, ask):
        assert torch.equal(scores(llama, inputs, new=3)[0], before)
    assert ask.asked == 3


# ---- on_step


class Steps(Intervention):
    def __init__(self):
        self.steps = []

    def on_step(self, step):
        self.steps.append(step)


@pytest.mark.parametrize(
    "mode", [*MODES, pytest.param({"prompt_lookup_num_tokens": 2}, id="speculative"), pytest.param(
        {"prefill_chunk_size": 7}, id="chunks")],
)  # fmt: skip
def test_steps_are_counted_by_the_cache(llama, mode):
    inputs = prompt()
    if "prompt_lookup_num_tokens" in mode:
        inputs = {k: v[1:] for k, v in inputs.items()}
    steps = Steps()
    with attnlib.attach(llama, steps) as session:
        assert not session.attached
        for _ in range(2):
            scores(llama, inputs, new=5, **mode)
    assert steps.steps.count(0) == 2
    if "prompt_lookup_num_tokens" in mode:
        # Several tokens are tried at once and partly taken back: what counts are those that stayed.
        for run in (steps.steps[: len(steps.steps) // 2], steps.steps[len(steps.steps) // 2 :]):
            assert run[0] == 0 and run == sorted(set(run)) and run[-1] <= 4
    else:
        assert steps.steps == [0, 1, 2, 3, 4] * 2


def test_steps_go_on_with_a_cache_that_was_given(llama):
    ids = prompt(pad=(0, 0))["input_ids"]
    steps = Steps()
    with torch.no_grad(), attnlib.attach(llama, steps) as session:
        out = llama(input_ids=ids, use_cache=True)
        for i in range(3):
            llama(input_ids=ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
        out.past_key_values.crop(-2)
        llama(input_ids=ids[:, :1], past_key_values=out.past_key_values, use_cache=True)
        with session.at(branch="other"):
            llama(input_ids=ids)
        llama(input_ids=ids)
    assert steps.steps == [0, 1, 2, 3, 2, 0]


# ---- attaching


def test_interventions_of_the_whole_model_meet_everyone(llama):
    class Alone(Logits):
        def conflicts(self, other):
            return "there can be only one" if isinstance(other, Logits) else None

    with pytest.raises(ValueError, match="cannot both act on this model: there can be only one"):
        attnlib.attach(llama, Alone(), Logits())
    assert not hooks_session._sessions.get(llama) and "_get_logits_processor" not in llama.__dict__


def test_an_intervention_that_is_not_attached_has_no_session():
    with pytest.raises(RuntimeError, match="not attached"):
        Logits().session  # noqa: B018


def test_a_probe_that_also_reads_logits_still_looks(llama):
    class Both(Probe):
        def __init__(self):
            self.rows = self.logits = 0

        def probe(self, site):
            return torch.tensor([site.n_queries - 1]), None

        def observe(self, site, weights, rows, allowed):
            self.rows += 1

        def on_logits(self, ids, logits):
            self.logits += 1
            return logits

    both = Both()
    with attnlib.attach(llama, both):
        scores(llama, prompt(), new=2)
    assert (both.rows, both.logits) == (6, 2)


# ---- sites after a removal


def test_values_by_slot_follow_queries_and_keys_that_are_left():
    from hooks.models import call_site

    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8)
    values = torch.arange(12.0).view(2, 6)
    left = torch.tensor([[-1, 2, 5], [0, 3, 4]])
    site = call_site(q, k).but(q_pos=left, k_pos=left[:, None].expand(-1, 2, -1))
    assert site.per_query(values)[1].tolist() == [6.0, 9.0, 10.0] and site.per_query(values)[0, 1:].tolist() == [2, 5]
    assert site.per_key(values).shape == (2, 4, 3) and site.per_key(values)[0, 0].tolist() == [0.0, 2.0, 5.0]
    itself = site.query_slots() == site.key_slots()
    assert torch.equal(itself, torch.eye(3, dtype=torch.bool).expand(2, 4, 3, 3))
    plain = call_site(q, k, offset=3)
    assert torch.equal(plain.per_query(values), values[:, 3:]) and plain.query_slots().shape == (1, 1, 3, 1)
    with pytest.raises(TypeError, match="a site has no 'layr'"):
        plain.but(layr=3)
    with pytest.raises(ValueError, match="positions of the queries are not known"):
        plain.but(q_pos=None).per_query(values)


def test_masks_of_the_library_do_not_read_keys_that_are_not_there():
    from attnlib import masks
    from attnlib.hooks.call import realise_mask
    from hooks.models import call_site

    q, k = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    left = torch.tensor([[-1, 2, 5]])
    site = call_site(q, k).but(q_pos=left, k_pos=left[:, None].expand(-1, 2, -1))
    allowed = realise_mask(site, masks.causal())
    assert allowed[0, 0, 1:].tolist() == [[False, True, False], [False, True, True]]
