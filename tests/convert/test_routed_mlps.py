"""MLPs of models become routed: only routers and low-rank maps learn, and the model comes back bit for bit."""

import pytest
import torch

from attnlib.convert.routed import route_mlps

transformers = pytest.importorskip("transformers")


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config).eval()


def phi():
    torch.manual_seed(0)
    config = transformers.PhiConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.PhiForCausalLM(config).eval()


def ours():
    from attnlib.models.language import DecoderConfig, DecoderForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    return DecoderForCausalLM(DecoderConfig(**sizes)).eval()


IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("make", [llama, phi, ours])
def test_all_blocks_start_near_the_model_and_learning_leaves_it_as_it_was(make):
    model = make()
    before, state = model(IDS).logits, {n: p.clone() for n, p in model.state_dict().items()}
    grads = {n: p.requires_grad for n, p in model.named_parameters()}
    routed = route_mlps(model, block=8, rank=2, share=1.0)
    assert len(routed.mlps) == 2
    for mlp in routed.mlps.values():
        torch.nn.init.zeros_(mlp.router.weight)
        torch.nn.init.zeros_(mlp.router.bias)
    torch.testing.assert_close(model(IDS).logits, before, atol=1e-5, rtol=1e-4)
    optimizer = torch.optim.Adam(routed.trained(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    routed.restore()
    assert model(IDS).logits.equal(before)
    assert all(p.equal(state[n]) for n, p in model.state_dict().items())
    assert grads == {n: p.requires_grad for n, p in model.named_parameters()}


def test_half_of_the_blocks_are_used():
    model = llama()
    routed = route_mlps(model, block=8, layers=["model.layers.1.mlp"])
    (mlp,) = routed.mlps.values()
    assert (mlp.blocks, mlp.active) == (4, 2) and model(IDS).logits.isfinite().all()


def test_bad_input_is_refused():
    for settings, words in (
        (dict(block=5), "block=5 does not divide the 32"),
        (dict(block=0), "block"),
        (dict(share=0), "share=0"),
        (dict(layers=["lm_head"]), "no MLP that is known"),
    ):
        with pytest.raises(ValueError, match=words):
            route_mlps(llama(), **{"block": 8, **settings})
    with pytest.raises(ValueError, match="no MLP that can be routed"):
        route_mlps(torch.nn.Linear(2, 2), block=1)
