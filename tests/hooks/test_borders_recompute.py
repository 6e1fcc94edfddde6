"""Gradient checkpointing: gradients are those of the forward as it ran, and what is stateful acts once."""

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import attnlib
from attnlib.hooks import Intervention
from hooks.families import FAMILIES, Family
from hooks.models import language_model, prompt

pytest.importorskip("transformers")
pytest.importorskip("diffusers")


class Grows(Intervention):
    """Every call is scaled by a count of calls; keeps numbers, tensors written in place, and objects."""

    class Kept:
        calls = 0

    def reset(self):
        self.kept, self.total, self.by_layer = self.Kept(), torch.zeros(()), {}

    def around_attention(self, site, q, k, v, call):
        self.kept.calls += 1
        self.total += 1
        self.by_layer.setdefault(site.layer, []).append(site.pass_name)
        return call(q, k, v) * (0.5 + 0.1 * self.kept.calls)


class Named(Intervention):
    """What the user says about the call decides."""

    def on_output(self, site, out):
        return out * {None: 1.0, "one": 0.5, "two": 2.0}[site.pass_name]


class Sublayer(Intervention):
    def around_sublayer(self, site, hidden, call):
        return call(hidden) + 0.3 * call(hidden * 2)


class BlockInput(Intervention):
    def on_block_input(self, site, hidden):
        return hidden * 1.1


class Sources(Intervention):
    def on_context(self, site, k_source, v_source):
        return k_source * 1.3, v_source


class Weights(Intervention):
    def on_weights(self, site, weights, rows):
        return weights * 0.7


class NewKeys(Intervention):
    def on_qkv(self, site, q, k, v):
        return q, k * 1.2, v


def checkpointed(model, blocks, reentrant):
    """Every block runs inside torch.utils.checkpoint."""
    for block in blocks:
        forward = block.forward

        def again(*args, forward=forward, **kwargs):
            return checkpoint(functools.partial(forward, **kwargs), *args, use_reentrant=reentrant)

        block.forward = again


def gradients(family, make, reentrant=None, when="before", backward="inside"):
    model = family.make().train()
    intervention = make()
    blocks = family.blocks(model)
    assert blocks
    if when == "before" and reentrant is not None:
        checkpointed(model, blocks, reentrant)
    with attnlib.attach(model, intervention) as session:
        if when == "inside" and reentrant is not None:
            checkpointed(model, blocks, reentrant)
        losses = []
        for name in (None, "one"):
            with session.at(pass_name=name):
                losses.append(family.call(model).square().mean())
        if backward == "inside":
            with session.at(pass_name="two"):
                sum(losses).backward()
    if backward == "after":
        sum(losses).backward()
    elif backward == "another":
        with attnlib.attach(model, Weights()):
            sum(losses).backward()
    assert not any("_mix_heads" in m.__dict__ for m in model.modules())
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, vars(intervention)


@functools.cache
def expected(family, make):
    return gradients(family, make)


CASES = [(False, "before", "after"), (False, "inside", "inside"), (False, "before", "another"),
         (True, "before", "after"), (True, "inside", "inside"), (True, "before", "another")]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{'reentrant' if c[0] else 'plain'}-{c[1]}-{c[2]}")
@pytest.mark.parametrize("make", [Grows, Named])
@pytest.mark.parametrize("family", FAMILIES, ids=repr)
def test_gradients_are_those_of_the_forward_as_it_ran(family, make, case):
    if case[0] and family.name in ("multihead", "timm", "native"):
        family = _with_gradient(family)  # as reentrant checkpoints need it
    wanted, kept = expected(family, make)
    got, after = gradients(family, make, *case)
    assert got.keys() == wanted.keys() and got
    for name in wanted:
        scale = wanted[name].abs().max()
        assert (got[name] - wanted[name]).abs().max() <= 1e-5 * max(scale, 1e-6), name
    if make is Grows:
        assert after["kept"].calls == kept["kept"].calls and torch.equal(after["total"], kept["total"])
        assert after["by_layer"] == kept["by_layer"]


@functools.cache
def _with_gradient(family):
    """The same, called with an input that asks for a gradient."""

    def call(model):
        torch.manual_seed(1)
        return model(torch.randn(2, 6, 16, requires_grad=True))

    return Family(family.name, family.make, call, family.blocks)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make", [Sublayer, BlockInput, Sources, Weights, NewKeys])
def test_every_stage_of_transformers_own_checkpoints(make, reentrant):
    inputs = prompt(length=9, pad=(2, 0))

    def run(on, backward):
        model = language_model().train()
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with attnlib.attach(model, make()):
            loss = model(**inputs, use_cache=False).logits.square().mean()
            if backward == "inside":
                loss.backward()
        if backward == "after":
            loss.backward()
        return {n: p.grad for n, p in model.named_parameters()}

    wanted = run(False, "inside")
    for backward in ("inside", "after"):
        got = run(True, backward)
        for name in wanted:
            scale = wanted[name].abs().max()
            assert (got[name] - wanted[name]).abs().max() <= 1e-5 * scale, name


def test_the_whole_model_in_one_checkpoint_and_checkpoints_in_it():
    inputs = prompt(length=9, pad=(2, 0))
    wanted, kept = None, None
    for outer, inner in ((None, None), (False, None), (False, False), (True, True), (True, False)):
        model, grows = language_model().train(), Grows()
        if inner is not None:
            model.gradient_checkpointing_enable({"use_reentrant": inner})
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        mask = inputs["attention_mask"]
        with attnlib.attach(model, grows):

            def call(x, model=model, mask=mask):
                return model(inputs_embeds=x, attention_mask=mask, use_cache=False).logits

            out = call(embeds) if outer is None else checkpoint(call, embeds, use_reentrant=outer)
        out.square().mean().backward()
        got = torch.cat([p.grad.flatten() for p in model.parameters()])
        wanted = got if wanted is None else wanted
        kept = grows.kept.calls if kept is None else kept
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max() and grows.kept.calls == kept


def test_twice_through_one_graph():
    model, inputs = language_model().train(), prompt(length=9, pad=(2, 0))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with attnlib.attach(model, Grows()):
        loss = model(**inputs, use_cache=False).logits.square().mean()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_forward_before_the_session_is_refused_by_name():
    model, inputs = language_model().train(), prompt(length=9, pad=(2, 0))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = model(**inputs, use_cache=False).logits.square().mean()
    with attnlib.attach(model, Weights()):
        with pytest.raises(RuntimeError, match="did not run in this session under torch.utils.checkpoint"):
            loss.backward(retain_graph=True)
    model.zero_grad()
    loss = model(**inputs, use_cache=False).logits.square().mean()
    loss.backward()


def test_a_large_tensor_that_was_written_to_is_named():
    class Writes(Intervention):
        def reset(self):
            self.sums = torch.zeros(1 << 17)

        def on_output(self, site, out):
            self.sums += out.detach().mean()
            return out * 0.5

    model, inputs = language_model().train(), prompt(length=9, pad=(2, 0))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with attnlib.attach(model, Writes()):
        loss = model(**inputs, use_cache=False).logits.square().mean()
    with pytest.raises(RuntimeError, match=r"wrote into a tensor \(131072,\)"):
        loss.backward()
