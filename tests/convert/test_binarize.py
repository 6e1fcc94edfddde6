"""Vision transformers of one bit: against the authors' classes in every block, against oracles, saved, trained."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from parity import Fixture
from torch import nn

import attnlib
from attnlib.convert.binarize import PARTS, binarize, load, plan_of, save
from attnlib.models.backbones.vit import convert
from attnlib.nn.binary import BinaryLinear

FIXTURE = Fixture("bivit-models")
TINY = dict(embed_dim=16, depth=2, num_heads=2, patch_size=8, img_size=16, num_classes=3, mlp_ratio=2)
#: How each of the authors' classes is said here.
SAID = {
    "BiAttention_SAB": {}, "BiAttention_baseline": dict(normalizer="step", scale="mean"),
    "BiMlp": dict(scale="mean"), "BiMlp_1w32a": dict(scale="mean", mlp_input=False),
    "BiMlp_adapscaling_1w32a": dict(mlp_input=False),
}  # fmt: skip


def ours(**settings):
    return attnlib.create_model("vit_tiny_patch16_224", **{**TINY, **settings})


def swin_v2():
    model = attnlib.create_model(
        "swinv2_tiny_window8_256", embed_dim=8, depths=(2, 1), num_heads=(1, 2), img_size=32, window_size=4,
        num_classes=3, pretrained_windows=(0, 0), global_blocks=((), ()),
    )  # fmt: skip
    for p in model.parameters():
        if p.dim() == 1:  # norms of its blocks start at zero
            nn.init.normal_(p, std=0.5)
    return model


def deit():
    from transformers import DeiTConfig, DeiTForImageClassification

    return DeiTForImageClassification(
        DeiTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16,
            patch_size=8, initializer_range=0.3,
        )
    )  # fmt: skip


def swin():
    from transformers import SwinConfig, SwinForImageClassification

    return SwinForImageClassification(
        SwinConfig(
            depths=[2, 1], num_heads=[1, 2], embed_dim=8, image_size=32, patch_size=4, window_size=4,
            initializer_range=0.3,
        )
    )  # fmt: skip


MAKE = {"vit": ours, "deit": deit, "swin": swin, "swin v2": swin_v2}


def images(model, batch=2):
    torch.manual_seed(1)
    side = 32 if any("downsample" in name for name, _ in model.named_modules()) else 16
    return torch.randn(batch, 3, side, side)


def logits(model, x):
    y = model(x)
    return getattr(y, "logits", y)


# ---- the authors


@pytest.mark.parametrize("case", list(FIXTURE.config))
def test_a_model_equals_one_of_the_authors_classes(case):
    attention, mlp = FIXTURE.config[case]["classes"]
    model = ours()
    model.load_state_dict(convert(FIXTURE.under(f"{case}/sd"), model))
    binarize(model, "attention", compat="authors", **SAID[attention])
    binarize(model, "mlp", compat="authors", **SAID[mlp])
    x = FIXTURE.tensors[f"{case}/x/x"].clone().requires_grad_()
    y = model(x)
    torch.testing.assert_close(y, FIXTURE.tensors[f"{case}/y"], atol=1e-5, rtol=1e-5)
    y.backward(FIXTURE.tensors[f"{case}/g"])
    torch.testing.assert_close(x.grad, FIXTURE.tensors[f"{case}/dx/x"], atol=1e-5, rtol=1e-5)
    theirs = FIXTURE.under(f"{case}/dw")
    scales = {k: theirs.pop(k) for k in list(theirs) if "scaling" in k}
    expected = convert(theirs, model)
    for name, value in scales.items():
        place = name.replace("blocks.", "stages.").replace(".scaling_factor", "")
        if place.endswith("qkv"):
            parts = zip("qkv", value.chunk(3), strict=True)
            expected |= {place.replace("attn.qkv", f"mixer.inner.{n}.scale"): part for n, part in parts}
        else:
            expected[place.replace("attn.", "mixer.inner.").replace("mlp.", "mlp.inner.") + ".scale"] = value
    assert expected.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


# ---- oracles, in float64


def one_bit(layer, x, inputs=True):
    """By counting bits where inputs are signs."""
    w = layer.weight - layer.weight.mean(1, keepdim=True) >= 0
    if not inputs:
        return x @ (layer.weight.abs().mean(1, keepdim=True) * (2.0 * w - 1)).mT + layer.bias
    agree = ((x >= 0)[..., None, :] == w).sum(-1)
    return layer.weight.abs().mean(1) * (2 * agree - w.shape[1]) + layer.bias


def signs(t):
    return torch.where(t < 0, -1.0, 1.0).to(t)


def kept(scores):
    return (scores >= scores.amax(-1, keepdim=True) + math.log(0.25)).to(scores)


def attended(module, x, heads, bias=0.0):
    q, k, v = (
        signs(one_bit(getattr(module, f"{n}_proj"), x)).unflatten(-1, (heads, -1)).transpose(-2, -3) for n in "qkv"
    )
    width = q.shape[-1]
    agree = ((q > 0)[..., :, None, :] == (k > 0)[..., None, :, :]).sum(-1)
    out = kept((2 * agree - width).to(v) / math.sqrt(width) + bias) @ v
    return one_bit(module.o_proj, out.transpose(-2, -3).flatten(-2))


@pytest.mark.parametrize("mlp_input", [True, False])
def test_deit_equals_an_oracle_that_counts_bits(mlp_input):
    torch.manual_seed(0)
    whole = deit().double().eval()
    for p in whole.parameters():
        if p.dim() == 1:
            nn.init.normal_(p, std=0.3)
    x = images(whole).double()
    made = copy.deepcopy(whole)
    told = binarize(made, mlp_input=mlp_input)
    assert len(told.attention) == 2 and len(told.linear) == 12 and "12 linear" in told.bits
    base = whole.deit
    h = base.embeddings(x)
    for layer in base.layers:
        h = h + attended(layer.attention, layer.layernorm_before(h), 2)
        inner = F.gelu(one_bit(layer.mlp.fc1, layer.layernorm_after(h), mlp_input))
        h = h + one_bit(layer.mlp.fc2, inner, mlp_input)
    expected = whole.classifier(base.layernorm(h)[:, 0])
    torch.testing.assert_close(made(x).logits, expected, atol=1e-9, rtol=1e-9)


def test_swins_attention_adds_positions_and_hides_before_it_compares():
    torch.manual_seed(0)
    whole = swin().double().eval()
    for name, p in whole.named_parameters():
        if p.dim() == 1 or "position" in name:
            nn.init.normal_(p, std=0.5)
    made = copy.deepcopy(whole)
    binarize(made)
    before = whole.swin.encoder.layers[0].blocks[1]
    after = made.swin.encoder.layers[0].blocks[1]
    x = torch.randn(8, 16, 8, dtype=torch.float64)  # two images of four windows
    mask = before.get_attn_mask(8, 8, x.dtype, x.device)
    assert mask is not None and bool((mask < 0).any())
    bias = before.attention.relative_position_bias() + mask.repeat(2, 1, 1)[:, None]
    expected = attended(before.attention, x, 1, bias)
    torch.testing.assert_close(after.attention(x, mask)[0], expected, atol=1e-9, rtol=1e-9)
    assert not torch.equal(expected, attended(before.attention, x, 1))


def test_swin_v2_compares_cosines_of_signs_with_their_positions():
    torch.manual_seed(0)
    model = swin_v2().double().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.4)
    whole = copy.deepcopy(model.stages[1].blocks[0].mixer.inner)
    binarize(model)
    made = model.stages[1].blocks[0].mixer.inner
    x = torch.randn(2, 4, 4, 16, dtype=torch.float64)
    bias = torch.cat([whole.q_bias, torch.zeros_like(whole.q_bias), whole.v_bias])
    whole.qkv.bias = nn.Parameter(bias)
    q, k, v = signs(one_bit(whole.qkv, x.flatten(1, 2))).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    scores = whole.logit_scale.exp().clamp(max=100) * (q @ k.mT) / 8 + whole._bias()
    out = (kept(scores) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(made(x).flatten(1, 2), one_bit(whole.proj, out), atol=1e-9, rtol=1e-9)


# ---- what stays, what is trained, what is saved


@pytest.mark.parametrize("name", list(MAKE))
def test_two_phases_reach_all_maps_of_blocks_and_no_others(name):
    torch.manual_seed(0)
    model = MAKE[name]().eval()
    x = images(model)
    before = logits(model, x)
    names = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for order in (PARTS, PARTS[::-1]):
        made = copy.deepcopy(model)
        first, second = (binarize(made, part) for part in order)
        assert not set(first.linear) & set(second.linear)
        left = names - set(first.linear) - set(second.linear)
        assert left and not any(part in n for n in left for part in ("proj", "qkv", "fc1", "fc2") if "head" not in n)
        both = copy.deepcopy(model)
        binarize(both)
        assert torch.equal(logits(made, x), logits(both, x)) and not torch.equal(logits(made, x), before)
        logits(made, x).sum().backward()
        assert all(p.grad is not None for p in made.parameters())
        assert plan_of(made)["attention"].keys() == plan_of(both)["attention"].keys() != set()


@pytest.mark.parametrize("name", list(MAKE))
def test_saved_and_loaded_strictly(name, tmp_path):
    torch.manual_seed(0)
    model = MAKE[name]().eval()
    whole = copy.deepcopy(model)
    binarize(model, "attention", share=0.5)
    binarize(model, "mlp", scale="mean", mlp_input=False)
    for p in model.parameters():
        p.data.add_(0.01 * torch.randn_like(p))
    save(model, tmp_path)
    x = images(model)
    again = load(tmp_path, copy.deepcopy(whole)).eval()
    assert torch.equal(logits(again, x), logits(model, x)) and plan_of(again) == plan_of(model)
    if name in ("deit", "swin"):
        assert torch.equal(logits(load(tmp_path).eval(), x), logits(model, x))
    else:
        with pytest.raises(ValueError, match="model="):
            load(tmp_path)
    with pytest.raises(ValueError, match="binary already"):
        load(tmp_path, again)
    other = copy.deepcopy(whole)
    other.extra = nn.Parameter(torch.zeros(1))
    with pytest.raises(RuntimeError, match="extra"):
        load(tmp_path, other)
    with pytest.raises(ValueError, match="which was saved"):
        load(tmp_path, nn.Linear(2, 2))


def test_maps_are_given_where_they_are_asked_for_and_copies_are_apart():
    torch.manual_seed(0)
    model = deit().eval()
    binarize(model, "attention")
    x = images(model)
    before = model(x).logits
    model.set_attn_implementation("eager")
    made = model(x, output_attentions=True)
    torch.testing.assert_close(made.logits, before)
    assert set(torch.stack(made.attentions).unique().tolist()) == {0.0, 1.0}
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x).logits, model(x).logits)
    plain = deit().eval()
    plain.set_attn_implementation("eager")
    assert plain(x, output_attentions=True).attentions[0].sum().item() == pytest.approx(2 * 2 * 6)


def test_binary_models_learn_in_two_phases():
    torch.manual_seed(0)
    model = ours(embed_dim=32)
    x = torch.randn(24, 3, 16, 16)
    y = (x[:, 0, :8, :8].mean((1, 2)) > 0).long()

    def train(steps):
        optimizer = torch.optim.Adam([p for p in model.parameters()], 3e-3)
        for _ in range(steps):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    binarize(model, "attention")
    train(20)
    binarize(model, "mlp")
    assert train(60) < 0.4


def test_bad_input(tmp_path):
    model = ours()
    for call, message in (
        (dict(parts="embed"), "parts"), (dict(parts=()), "parts"), (dict(parts=("mlp", "mlp")), "parts"),
        (dict(normalizer="softmax"), "normalizer"), (dict(share=0.0), "share"), (dict(scale="max"), "scale"),
        (dict(compat="paper"), "compat"), (dict(mlp_input=1), "mlp_input"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=message):
            binarize(model, **call)
    assert not plan_of(model)["linear"]
    with pytest.raises(ValueError, match="nothing that is binary"):
        save(model, tmp_path)
    with pytest.raises(FileNotFoundError, match="attnlib_binary.json"):
        load(tmp_path, model)
    binarize(model, "mlp")
    with pytest.raises(ValueError, match="binary already"):
        binarize(model)
    with pytest.raises(ValueError, match="qk_norm|q_norm"):
        binarize(attnlib.create_model("vit_tiny_patch16_224", **TINY, qk_norm=True))
    with pytest.raises(TypeError, match="cannot be reached"):
        binarize(nn.Sequential(nn.Linear(3, 3)))
    from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel

    small = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError, match="causal"):
        binarize(LlamaModel(LlamaConfig(**small)))
    with pytest.raises(ValueError, match="causal|plain nn.Linear|known names"):
        binarize(GPT2Model(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2)))


def test_settings_of_a_map_are_its_own():
    layer = BinaryLinear(4, 3, scale="mean", binary_input=False, binary_output=True)
    assert json.loads(json.dumps(layer.settings)) == layer.settings
    again = BinaryLinear.of(nn.Linear(4, 3), **layer.settings)
    assert again.settings == layer.settings and set(layer(torch.randn(5, 4)).unique().tolist()) <= {-1.0, 1.0}
