"""Pruning without data: importance against a loop and LAMP's own code, exact counts, scopes, bad input."""

import copy

import pytest
import torch
from parity import HERE
from safetensors.torch import load_file
from torch import nn

from attnlib.convert.prune import finish, importance, kind_of, prune


def oracle(w):
    """By its definition, weight by weight."""
    flat = w.double().flatten()
    return torch.stack([x**2 / (flat[flat.abs() >= x.abs()] ** 2).sum() for x in flat]).view(w.shape)


class Block(nn.Module):
    def __init__(self, dim=12):
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x):
        q, k, v = self.attn["qkv"](x).chunk(3, -1)
        x = x + self.attn["proj"](nn.functional.scaled_dot_product_attention(q, k, v))
        return x + self.mlp["fc2"](self.mlp["fc1"](x).relu())


def net(seed=0):
    torch.manual_seed(seed)
    return nn.ModuleDict({"blocks": nn.Sequential(Block(), Block()), "head": nn.Linear(12, 4)})


def test_importance_is_the_share_of_what_is_left():
    w = {"a": torch.randn(5, 3, dtype=torch.float64), "b": torch.randn(4, dtype=torch.float64)}
    found = importance(w)
    both = oracle(torch.cat([t.flatten() for t in w.values()]))
    torch.testing.assert_close(torch.cat([t.flatten() for t in found.values()]), both)
    assert both.max() == 1
    order = torch.cat([t.abs().flatten() for t in w.values()]).argsort()
    assert (both[order].diff() > 0).all()  # monotone in the magnitude
    for scale in (1e-3, 7.0):
        for name, value in importance({k: scale * t for k, t in w.items()}).items():
            torch.testing.assert_close(value, found[name])
    assert importance({"z": torch.zeros(3)})["z"].tolist() == [0, 0, 0]


def test_single_layers_are_scored_as_lamp_does():
    recorded = load_file(HERE / "lamp.safetensors")
    torch.testing.assert_close(importance({"w": recorded["w"]})["w"].float(), recorded["scores"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("scope", ["layer", "module", "global"])
@pytest.mark.parametrize("sparsity", [0.0, 0.333, 0.9])
def test_exactly_as_many_are_dropped_as_were_asked_for(scope, sparsity):
    model = net()
    before = copy.deepcopy(model)
    found = prune(model, sparsity, scope)
    total = sum(found.of.values())
    zero = sum(int((model.get_submodule(n).weight == 0).sum()) for n in found.of)
    assert found.dropped == zero == int(sparsity * total) and total == 2 * 12 * 144
    assert set(found.kinds.values()) == {"qkv", "proj", "mlp"} and "head" not in found.of
    assert all(n > 0 for n in (found.kept.values() if scope == "layer" else found.by_kind().values()))
    assert f"{found.dropped} of {total}" in str(found)
    if not sparsity:
        x = torch.randn(1, 5, 12)
        assert torch.equal(model["blocks"](x), before["blocks"](x))


def test_the_least_are_dropped_of_each_scope_by_itself():
    model = net()
    kept = prune(model, 0.5, "module")
    for kind in ("qkv", "proj", "mlp"):
        names = [n for n, k in kept.kinds.items() if k == kind]
        sizes = torch.cat([model.get_submodule(n).weight_orig.abs().flatten() for n in names])
        masks = torch.cat([model.get_submodule(n).weight_mask.flatten() for n in names]).bool()
        assert sizes[~masks].max() <= sizes[masks].min()
    plain = net()
    prune(plain, 0.5, "global")
    sizes = torch.cat([plain.get_submodule(n).weight_orig.abs().flatten() for n in kept.of])
    masks = torch.cat([plain.get_submodule(n).weight_mask.flatten() for n in kept.of]).bool()
    assert sizes[~masks].max() <= sizes[masks].min()


def test_scales_of_layers_change_nothing_but_for_plain_magnitude():
    """On layers of badly unlike scales, which cancel, the loss is lower than that of magnitude."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 32, bias=False), nn.ReLU(), nn.Linear(32, 4, bias=False))
    with torch.no_grad():
        model[0].weight.mul_(50)
        model[2].weight.div_(50)
    x = torch.randn(256, 16)
    expected, kinds = model(x).detach(), {"0": "in", "2": "out"}
    gaps = {}
    for scope in ("layer", "module", "global"):
        other = copy.deepcopy(model)
        prune(other, 0.7, scope, kinds)
        gaps[scope] = float((other(x) - expected).detach().square().mean() / expected.square().mean())
    assert gaps["module"] == gaps["layer"] < 0.8 * gaps["global"]


def test_masks_hold_in_training_add_up_and_become_zeros():
    model = net()
    prune(model, 0.5)
    layer = model["blocks"][0].mlp["fc1"]
    first = layer.weight_mask.clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model["blocks"](torch.randn(2, 5, 12)).square().mean().backward()
    optimizer.step()
    found = prune(model, 0.8)
    assert found.dropped == int(0.8 * sum(found.of.values()))
    assert (layer.weight_mask <= first).all()
    x = torch.randn(1, 5, 12)
    y = model["blocks"](x)
    assert finish(model) == 8 and isinstance(layer.weight, nn.Parameter) and not hasattr(layer, "weight_mask")
    assert torch.equal(model["blocks"](x), y) and finish(model) == 0
    fresh = net()
    fresh.load_state_dict(model.state_dict())


def test_no_forward_is_made_and_models_of_transformers_are_grouped(monkeypatch):
    from transformers import GPT2Config, GPT2Model, SwinConfig, SwinModel

    models = [
        net(),
        SwinModel(SwinConfig(depths=[1, 1], num_heads=[1, 2], embed_dim=8, image_size=32, window_size=4)),
        GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=11, n_positions=8)),
    ]
    monkeypatch.setattr(nn.Module, "__call__", lambda *a, **k: pytest.fail("a forward pass"))
    for model in models:
        found = prune(model, 0.5)
        assert set(found.kinds.values()) == {"qkv", "proj", "mlp"}
    names = [n for n, m in models[1].named_modules() if isinstance(m, nn.Linear)]
    assert {kind_of(n) for n in names if "downsample" in n or "pooler" in n} <= {None}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("blocks.0.attn.qkv", "qkv"), ("h.0.attn.c_attn", "qkv"), ("h.0.attn.c_proj", "proj"),
        ("h.0.mlp.c_proj", "mlp"), ("encoder.layer.1.attention.self.query", "qkv"),
        ("encoder.layer.1.attention.output.dense", "proj"), ("encoder.layer.1.output.dense", "mlp"),
        ("encoder.layer.1.intermediate.dense", "mlp"), ("layers.0.downsample.reduction", None),
        ("patch_embed.proj", None),
        ("stages.0.blocks.1.mixer.inner.proj", "proj"), ("stem.proj", None), ("lm_head", None), ("pooler.dense", None),
        ("layers.0.self_attn.out_proj", "proj"), ("layers.0.linear1", "mlp"), ("down_blocks.0.attn1.to_out.0", "proj"),
    ],
)  # fmt: skip
def test_kinds_of_names(name, kind):
    assert kind_of(name) == kind


def test_the_packed_weights_of_torchs_attention_are_pruned_too():
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    found = prune(model, 0.5, "layer")
    assert found.kinds["self_attn.in_proj_weight"] == "qkv" and found.kinds["self_attn.out_proj"] == "proj"
    x = torch.randn(2, 5, 16)
    y = model(x)
    assert finish(model) == 4 and found.dropped == int((16 * 48 + 16 * 16 + 2 * 16 * 32) / 2)
    torch.testing.assert_close(model(x), y)
    assert int((model.self_attn.in_proj_weight == 0).sum()) == 16 * 48 - found.kept["self_attn.in_proj_weight"]
    single = nn.MultiheadAttention(8, 2)
    assert list(prune(single, 0.5).of) == ["in_proj_weight"]


def test_bad_input():
    for bad in (1.0, -0.1, "half"):
        with pytest.raises((TypeError, ValueError), match="sparsity"):
            prune(net(), bad)
    with pytest.raises(ValueError, match="scope"):
        prune(net(), 0.5, "block")
    with pytest.raises(ValueError, match="each of 8 scopes keeps one"):
        prune(net(), 0.9999, "layer")
    with pytest.raises(ValueError, match=r"kinds=\{name: kind\}"):
        prune(nn.Sequential(nn.Linear(2, 2)), 0.5)
    with pytest.raises(ValueError, match="no linear"):
        prune(net(), 0.5, kinds={"blocks": "mlp"})
    with pytest.raises(TypeError, match="weights"):
        importance([torch.ones(2)])
    with pytest.raises(TypeError, match="model"):
        prune(torch.ones(3), 0.5)
    tied = nn.ModuleDict({"fc1": nn.Linear(4, 4), "fc2": nn.Linear(4, 4)})
    tied["fc2"].weight = tied["fc1"].weight
    with pytest.raises(ValueError, match="also that of"):
        prune(tied, 0.5)
