"""Nothing is frozen at attach that the user may change: followed or refused by name, in every family; copies too."""

import copy
import io
import threading

import pytest
import torch
from torch import nn

import attnlib
from attnlib.hooks import Intervention
from attnlib.hooks import session as hooks_session
from hooks.families import FAMILIES
from hooks.models import NoOp, language_model, prompt, scores

pytest.importorskip("transformers")
pytest.importorskip("diffusers")


class Halve(Intervention):
    def on_output(self, site, out):
        return out * 0.5


class Weights(Intervention):
    def on_weights(self, site, weights, rows):
        return weights * 0.7


class Everywhere(Intervention):
    """In every stage that puts something on a module."""

    def on_output(self, site, out):
        return out * 0.5

    def around_sublayer(self, site, hidden, call):
        return call(hidden)


@pytest.fixture(params=FAMILIES, ids=repr)
def family(request):
    return request.param


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def averaged(model):
    return torch.optim.swa_utils.AveragedModel(model).module


def attention_of(session):
    return session.attached[0].module


COPIES = [copy.deepcopy, saved, averaged, lambda m: copy.deepcopy(nn.ModuleList([m, m]))[1]]


@pytest.mark.parametrize("made", COPIES, ids=["deepcopy", "pickle", "average", "inside"])
def test_a_copy_is_a_plain_model_with_its_own_weights(family, made):
    model = family.make()
    with torch.no_grad():
        plain = family.call(model)
        with attnlib.attach(model, Everywhere()):
            inside = family.call(model)
            new = made(model)
            assert torch.equal(family.call(new), plain) and torch.equal(family.call(model), inside)
            assert not any(
                m._forward_pre_hooks or m._forward_hooks or "forward" in m.__dict__ or "_mix_heads" in m.__dict__
                for m in new.modules()
            )
            other = family.make()
            for p in other.parameters():
                p.mul_(1.3)
            new.load_state_dict(other.state_dict())
            assert torch.equal(family.call(new), family.call(other))
        assert torch.equal(family.call(new), family.call(other)) and torch.equal(family.call(model), plain)
        with attnlib.attach(new, Everywhere()):
            assert not torch.equal(family.call(new), family.call(other))


def test_replicas_are_refused(family):
    model = family.make()
    with attnlib.attach(model, Halve()) as session:
        module = attention_of(session)
        with pytest.raises(RuntimeError, match=r"replica of it .*DataParallel"):
            module._replicate_for_data_parallel()
    assert type(module._replicate_for_data_parallel()) is type(module)


def test_weights_given_for_one_call_are_used(family):
    model = family.make()
    other = {name: p * 1.3 for name, p in model.named_parameters()}
    with torch.no_grad(), attnlib.attach(model, Halve()):

        class Call(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = model

            def forward(self):
                return family.call(self.inner)

        got = torch.func.functional_call(Call(), {f"inner.{k}": v for k, v in other.items()}, ())
        for name, p in model.named_parameters():
            p.copy_(other[name])
        assert torch.equal(got, family.call(model))


@pytest.mark.parametrize("what", ["forward", "module", "hooks"])
def test_what_the_user_puts_in_its_place_is_refused_by_name_and_stays(family, what):
    if what == "forward" and family.name == "diffusers":
        pytest.skip("forwards of its modules are not touched")
    model = family.make()
    with torch.no_grad(), attnlib.attach(model, Everywhere()) as session:
        site = session.attached[0]
        if what == "forward":
            mine = site.module.forward = lambda *args, **kwargs: None
        elif what == "module":
            parent = model.get_submodule(site.name.rpartition(".")[0])
            mine = copy.deepcopy(site.module)
            parent._modules[site.name.rpartition(".")[2]] = mine
        else:
            model._forward_pre_hooks.clear()
            model._forward_hooks.clear()
            model._forward_hooks_always_called.clear()
        if what == "hooks":
            with pytest.raises(RuntimeError, match="hooks were removed"):
                session.audit()
        else:
            said = {"forward": r"its forward was replaced", "module": r"another module was put in its place"}[what]
            with pytest.raises(RuntimeError, match=rf"is attached, but {said} .*inside the session"):
                family.call(model)
    if what == "forward":
        assert site.module.__dict__["forward"] is mine
    elif what == "module":
        assert model.get_submodule(site.name) is mine and "forward" not in site.module.__dict__


def test_wrappers_around_an_attached_module_are_followed_and_stay(family):
    """As libraries that move weights between devices do."""
    if family.name == "diffusers":
        pytest.skip("forwards of its modules are not touched")
    model = family.make()
    with torch.no_grad():
        plain = family.call(model)
        with attnlib.attach(model, Everywhere()) as session:
            inside, calls = family.call(model), []
            module = session.attached[0].module
            old = module._old_forward = module.forward

            def moved(*args, **kwargs):
                calls.append(1)
                return old(*args, **kwargs)

            module.forward = moved
            assert torch.equal(family.call(model), inside) and len(calls) == 1
        assert module.forward is moved and torch.equal(family.call(model), plain)


# ---- transformers


@pytest.mark.parametrize("how", ["set", "config", "dict"])
@pytest.mark.parametrize("kind", [Halve, Weights])
def test_another_implementation_inside_is_followed_and_stays(kind, how):
    model, inputs = language_model(), prompt(pad=(0, 0))
    with torch.no_grad():
        eager = language_model(attn_implementation="eager")
        plain = eager(**inputs).logits
        with attnlib.attach(eager, kind()):
            wanted = eager(**inputs).logits
        with attnlib.attach(model, kind()) as session:
            module = session.attached[1].module
            sdpa = model(**inputs).logits
            if how == "set":
                model.set_attn_implementation("eager")
            elif how == "dict":
                model.set_attn_implementation({"": "eager"})
            else:
                model.config._attn_implementation = "eager"
            got = model(**inputs)
            assert torch.equal(got.logits, wanted)
            changed = {k: v.clone() for k, v in inputs.items()}
            changed["input_ids"][:, -1] = 7
            assert torch.equal(model(**changed).logits[:, :-1], got.logits[:, :-1])
            model.set_attn_implementation("sdpa")
            assert torch.equal(model(**inputs).logits, sdpa)
            model.set_attn_implementation("eager")
            assert module.config._attn_implementation == "attnlib_eager" and module.config is not model.config
        assert module.config is model.config and model.config._attn_implementation == "eager"
        assert torch.equal(model(**inputs).logits, plain)


def test_another_implementation_in_the_middle_of_generate():
    model, inputs = language_model(), prompt()
    wanted = scores(model, inputs)[0]

    class Switch(NoOp):
        def on_step(self, step):
            model.set_attn_implementation("eager" if step % 2 else "sdpa")

    with attnlib.attach(model, Switch()):
        torch.testing.assert_close(scores(model, inputs)[0], wanted, rtol=0, atol=1e-4)


def test_an_implementation_whose_masks_cannot_be_read_is_refused_when_it_comes():
    model, inputs = language_model(), prompt()
    with torch.no_grad(), attnlib.attach(model, Weights()):
        model.config._attn_implementation = "flash_attention_2"
        with pytest.raises(ValueError, match="flash_attention_2"):
            model(**inputs)


def test_what_is_set_on_a_configuration_inside_stays():
    model = language_model()
    with attnlib.attach(model, Halve()) as session:
        module = session.attached[0].module
        module.config.mine = 1
        model.config.other = 2
        assert module.config.other == 2 and isinstance(module.config, type(model.config))
    assert model.config.mine == 1 and "mine" in model.config.to_dict()


def test_adapters_of_peft_inside_a_session():
    peft = pytest.importorskip("peft")
    inputs = prompt()
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    with torch.no_grad():
        model, other = language_model(), language_model()
        torch.manual_seed(3)
        other = peft.get_peft_model(other, settings).base_model.model
        with attnlib.attach(other, Halve()):
            wanted = other(**inputs).logits
        with attnlib.attach(model, Halve()):
            torch.manual_seed(3)
            adapted = peft.get_peft_model(model, settings)
            assert torch.equal(adapted(**inputs).logits, wanted)

    class Sources(Intervention):
        def on_context(self, site, k_source, v_source):
            return k_source * 2, v_source

    model = language_model()
    with torch.no_grad(), attnlib.attach(model, Sources()):
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["k_proj"]))
        with pytest.raises(RuntimeError, match="another module was put in its place"):
            model(**inputs)


def test_two_threads_generate_at_once():
    model, inputs = language_model(), prompt()
    alone = scores(model, inputs)[0]
    started, go = threading.Event(), threading.Event()
    errors = []

    class Wait(NoOp):
        def on_step(self, step):
            started.set()
            go.wait(10)

    with attnlib.attach(model, Wait()):
        got = []
        thread = threading.Thread(target=lambda: got.append(scores(model, inputs)[0]), name="first")
        thread.start()
        started.wait(10)
        try:
            for call in (lambda: model.generate(**inputs, max_new_tokens=2), lambda: model(**inputs)):
                with pytest.raises(RuntimeError, match=r"in the thread 'first'|two threads call") as error:
                    call()
                errors.append(str(error.value))
        finally:
            go.set()
            thread.join()
        assert "generate() already runs" in errors[0] and "two threads" in errors[1]
        assert torch.equal(got[0], alone) and torch.equal(scores(model, inputs)[0], alone)


def test_a_thread_that_was_interrupted_inside_blocks_nobody():
    model, inputs = language_model(), prompt()

    class Stop(Intervention):
        stop = True

        def on_output(self, site, out):
            if self.stop:
                raise KeyboardInterrupt
            return out

    stop = Stop()
    with torch.no_grad(), attnlib.attach(model, stop):
        with pytest.raises(KeyboardInterrupt):
            model(**inputs)
        stop.stop, got = False, []
        thread = threading.Thread(target=lambda: got.append(model(**inputs).logits.detach()))
        thread.start()
        thread.join()
    assert torch.equal(got[0], model(**inputs).logits)


def test_calls_of_two_sequences_are_mixed_or_refused():
    """What travels with a cache is right; what follows one sequence says so."""
    model = language_model()
    one, two = prompt(pad=(0, 0)), prompt(pad=(0, 0), seed=5)

    class Still(NoOp):
        follows_sequence = False

    def mixed():
        caches = [model(**i, use_cache=True).past_key_values for i in (one, two)]
        return [
            model(input_ids=i["input_ids"][:, :1], past_key_values=c).logits
            for i, c in zip((one, two, one), (*caches, caches[0]), strict=True)
        ]

    with torch.no_grad():
        plain = mixed()
        still = Still()
        with attnlib.attach(model, still, token_types=lambda ids: 1 + ids % 2):
            for a, b in zip(mixed(), plain, strict=True):
                assert torch.equal(a, b)
        types = still.sites[-1].k_types
        ids = torch.cat([one["input_ids"], one["input_ids"][:, :1]], 1)
        assert torch.equal(types[:, :20], 1 + ids[:, :20] % 2)
        with attnlib.attach(model, NoOp()), pytest.raises(RuntimeError, match=r"NoOp follows one sequence at a time"):
            mixed()
        with attnlib.attach(model, NoOp()) as session:
            cache = model(**one, use_cache=True).past_key_values
            with session.at(branch="other"):
                model(**two)
            copied = copy.deepcopy(cache)
            first = model(input_ids=one["input_ids"][:, :1], past_key_values=cache).logits
            assert torch.equal(first, plain[0])
            assert torch.equal(model(input_ids=one["input_ids"][:, :1], past_key_values=copied).logits, plain[0])


# ---- diffusers


def test_other_processors_inside_are_followed_and_stay():
    processors = pytest.importorskip("diffusers.models.attention_processor")
    unet = next(f for f in FAMILIES if f.name == "diffusers")
    model = unet.make()
    with torch.no_grad():
        with attnlib.attach(model, Halve()):
            wanted = unet.call(model)
        plain = unet.call(model)
        with attnlib.attach(model, Halve()) as session:
            mine = processors.AttnProcessor2_0()
            model.set_attn_processor(mine)
            assert torch.equal(unet.call(model), wanted)
            held = model.attn_processors
            again = dict(held)
            model.set_attn_processor(again)
            assert torch.equal(unet.call(model), wanted)
            model.set_attn_processor(processors.AttnProcessor())  # by scores and a product of its own
            torch.testing.assert_close(unet.call(model), wanted)

            class ByHand:
                def __call__(self, attn, hidden_states, *args, **kwargs):
                    return hidden_states

            model.set_attn_processor(ByHand())
            with pytest.raises(ValueError, match="ByHand"):
                unet.call(model)
            model.set_attn_processor(mine)
            module = session.attached[0].module
        assert module.processor is mine and torch.equal(unet.call(model), plain)
        model.set_attn_processor(dict(held))  # what was read inside a session is plain outside
        assert torch.equal(unet.call(model), plain)
        with attnlib.attach(model, Halve()):
            assert torch.equal(unet.call(model), wanted)


def test_sessions_are_forgotten():
    model = language_model()
    with attnlib.attach(model, Everywhere()):
        assert model in hooks_session._sessions
    assert model not in hooks_session._sessions
    for module in model.modules():
        ours = {"__reduce_ex__", "__deepcopy__", "_replicate_for_data_parallel", "forward", "generate"}
        assert not ours & module.__dict__.keys()
