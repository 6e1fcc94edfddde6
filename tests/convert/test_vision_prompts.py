"""Prompts for frozen vision transformers: held to the authors' models, and to what the cards say."""

import json

import pytest
import torch
import torch.nn.functional as F
from parity import HERE, synthetic
from safetensors import safe_open
from torch import nn

from attnlib.convert.prompts import PromptCam, TokenPrompts
from attnlib.models.build import create_model, load_pretrained


def vit(**settings):
    given = dict(patch_size=4, img_size=16, embed_dim=24, depth=2, num_heads=2, num_classes=5)
    torch.manual_seed(0)
    return create_model("vit_tiny_patch16_224", **{**given, **settings})


def images(n=2, side=16):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1))


def recorded(slug):
    with safe_open(HERE / f"{slug}.safetensors", "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["shapes"])  # noqa: SIM118


def near(ours, theirs):
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-4, atol=1e-5)


# ---- Prompt-CAM


def theirs_cam():
    tensors, shapes = recorded("prompt-cam")
    weights = synthetic(shapes)
    plain = {k: v for k, v in weights.items() if not k.startswith(("vpt", "head"))}
    model = vit(qkv_bias="blocks.0.attn.qkv.bias" in weights)
    head = {k: v for k, v in load_names(model).items() if k.startswith("head")}
    load_pretrained(model, {**plain, **head})
    cam = PromptCam(model, 5)
    cam.load_trained(PromptCam.convert_state_dict(weights))
    return cam.double(), tensors


def load_names(model):
    return {k.replace("head.fc.", "head."): v for k, v in model.state_dict().items() if k.startswith("head.")}


def test_prompt_cam_equals_the_authors():
    cam, tensors = theirs_cam()
    x = tensors["x"].double()
    y = cam(x)
    near(y, tensors["y"])
    y.square().sum().backward()
    near(cam.class_prompts.grad, tensors["dw/vpt.prompt_embeddings"])
    near(cam.score.weight.grad, tensors["dw/head.weight"])
    near(cam.maps(x), tensors["maps"][..., 6:])
    near(cam(x, blurred=[1], target=3), tensors["blurred"])


@pytest.mark.parametrize("depth", ["all", "shallow", "deep"])
def test_prompt_cam_trains_prompts_and_the_score_alone(depth):
    cam = PromptCam(vit(), 6, depth=depth, num_agnostic=3)
    learned = {n: p for n, p in cam.named_parameters() if p.requires_grad}
    counts = {"all": 2 * 6, "shallow": 6, "deep": 6 + 3}
    assert sum(p.numel() for p in learned.values()) == counts[depth] * 24 + 24 + 1
    before = {n: p.clone() for n, p in cam.model.named_parameters()}
    x = images()
    plain = cam.model(x)
    cam.train()(x).square().sum().backward()
    assert not cam.model.training
    assert all(p.grad is None for p in cam.model.parameters()) and all(p.grad is not None for p in learned.values())
    torch.optim.SGD(learned.values(), lr=0.1).step()
    assert all(torch.equal(before[n], p) for n, p in cam.model.named_parameters())
    torch.testing.assert_close(cam.model(x), plain)  # the model is as it was
    other = PromptCam(vit(), 6, depth=depth, num_agnostic=3)
    other.load_trained(cam.trained_state())
    torch.testing.assert_close(other(x), cam.eval()(x))
    assert set(cam.trained_state()) == set(learned)


def test_the_count_of_the_paper():
    model = create_model("vit_base_patch16_224", num_classes=0)
    cam = PromptCam(model, 200)
    assert sum(p.numel() for p in cam.parameters() if p.requires_grad) == 1_843_969


def test_prompts_that_change_places_change_places_in_the_logits():
    cam, x, order = PromptCam(vit(), 5).double().eval(), images().double(), torch.tensor([2, 0, 4, 1, 3])
    y = cam(x)
    with torch.no_grad():
        cam.class_prompts.copy_(cam.class_prompts[:, order])
    torch.testing.assert_close(cam(x), y[:, order])


def test_apart_a_class_does_not_know_the_others():
    cam, x = PromptCam(vit(), 5, apart=True).double().eval(), images().double()
    few = PromptCam(vit(), 3, apart=True).double().eval()
    with torch.no_grad():
        few.class_prompts.copy_(cam.class_prompts[:, :3])
        few.score.load_state_dict(cam.score.state_dict())
    torch.testing.assert_close(few(x), cam(x)[:, :3])
    free, mixed = PromptCam(vit(), 5).double().eval(), PromptCam(vit(), 3).double().eval()
    with torch.no_grad():
        for other in (free, mixed):
            other.class_prompts.copy_(cam.class_prompts[:, : other.num_classes])
            other.score.load_state_dict(cam.score.state_dict())
    assert not torch.allclose(mixed(x), free(x)[:, :3])


def test_a_blurred_head_reads_all_alike_and_other_prompts_as_before():
    from attnlib.convert.prompts import _Blur, _Maps

    cam, x = PromptCam(vit(), 5).eval(), images()
    found = []
    for acting in ([], [_Blur([1], 2)]):
        kept = _Maps(5)
        cam._scored(x, *acting, kept)
        found.append(kept.found)
    torch.testing.assert_close(found[1][:, 1, 2], torch.full((2, 22), 1 / 22))
    rest = torch.ones(2, 5, dtype=torch.bool)
    rest[1, 2] = False
    torch.testing.assert_close(found[1][:, rest], found[0][:, rest])


def test_heads_are_ranked():
    cam, x = PromptCam(vit(num_heads=4), 5).eval(), images(1)
    ranked = cam.rank_heads(x, 2)
    assert sorted(ranked) == [0, 1, 2, 3] and ranked == cam.rank_heads(x, 2)
    kept = [float(cam(x, [h], 2).softmax(-1)[0, 2]) for h in range(4)]
    assert ranked[-1] == max(range(4), key=kept.__getitem__)  # blurred first: the class needs it least


# ---- a model of timm's shape


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.num_heads, self.fused_attn, self.scale = heads, True, (dim // heads) ** -0.5
        self.qkv, self.proj, self.attn_drop = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.Dropout(0.0)

    def forward(self, x, attn_mask=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.fused_attn:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        else:
            y = (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads), nn.LayerNorm(dim, 1e-6)
        self.mlp = nn.Sequential()
        self.mlp.fc1, self.mlp.act, self.mlp.fc2 = nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    """What timm's VisionTransformer is, with its names."""

    def __init__(self):
        super().__init__()
        self.embed_dim, self.num_prefix_tokens = 24, 1
        self.patch_embed = nn.Module()
        self.patch_embed.proj, self.patch_embed.patch_size = nn.Conv2d(3, 24, 4, 4), (4, 4)
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, 24)), nn.Parameter(torch.zeros(1, 17, 24))
        self.blocks, self.norm = nn.Sequential(Block(24, 2), Block(24, 2)), nn.LayerNorm(24, eps=1e-6)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


def test_models_of_timms_shape_take_prompts_too():
    theirs, ours, x = Vit(), vit(), images()
    weights = {k: v for k, v in synthetic({k: list(v.shape) for k, v in theirs.state_dict().items()}).items()}
    theirs.load_state_dict(weights)
    load_pretrained(ours, weights)
    torch.testing.assert_close(theirs(x), ours.eval()(x), rtol=1e-4, atol=1e-5)
    cams = [PromptCam(m, 5, apart=True).eval() for m in (theirs, ours)]
    cams[1].load_trained(cams[0].trained_state())
    near(cams[0](x), cams[1](x).detach())
    near(cams[0].maps(x), cams[1].maps(x))
    for mask in ("weights", "scores"):
        pair = [TokenPrompts(m, (3, 4), (2, 1), (2, 2), mask=mask).eval() for m in (theirs, ours)]
        for a, b in zip((*pair[0].keys, *pair[0].pools), (*pair[1].keys, *pair[1].pools), strict=True):
            b.data.copy_(a)
        near(pair[0](x)[0], pair[1](x)[0].detach())


# ---- TCPA


def test_tcpa_equals_the_authors():
    tensors, shapes = recorded("tcpa")
    weights = synthetic(shapes)
    model = create_model("vit_base_patch16_224", depth=1, num_classes=5)
    load_pretrained(model, {k[9:]: v for k, v in weights.items() if k.startswith("backbone.")})
    pools = [{k: weights[f"Pool.Pool_{w}.{k}"] for k in ("keys", "prompts")} for w in ("cls", "image")]
    ours = TokenPrompts(model, (4, 5), (2, 1), (2, 3), fourier=True, drop=0.0)
    with torch.no_grad():
        for i, theirs in enumerate(pools):
            ours.keys[i].copy_(theirs["keys"][:1])
            ours.pools[i].copy_(theirs["prompts"][:1])
    ours = ours.double().eval()
    x = torch.sin(torch.arange(2 * 3 * 224 * 224).double() * 0.37).view(2, 3, 224, 224).float().double()
    y, distance = ours(x)
    near(y, tensors["y"])
    near(distance.view(1), tensors["dist"])
    (y.square().sum() + distance).backward()
    for i, which in enumerate(("cls", "image")):
        near(ours.keys[i].grad[..., :48], tensors[f"dw/Pool.Pool_{which}.keys"])
        near(ours.pools[i].grad[..., :48], tensors[f"dw/Pool.Pool_{which}.prompts"])


def tokens(**settings):
    torch.manual_seed(3)
    return TokenPrompts(vit(), **{"pool_size": (3, 4), "num_tokens": (2, 1), "topk": (2, 2), "drop": 0.0, **settings})


def test_every_prompt_for_every_token_is_visual_prompt_tuning():
    """Against the blocks by hand: prompts in front of each, gone behind it."""
    ours, x = tokens(topk=(3, 4), cross=True).double().eval(), images().double()
    model = ours.model
    cam = PromptCam(model, 10).double().eval()  # whose prompts enter and leave alike
    with torch.no_grad():
        for layer in range(2):
            cam.class_prompts[layer].copy_(torch.cat([p[layer].flatten(0, 1) for p in ours.pools]))
    expected, _ = cam.run(x)
    torch.testing.assert_close(ours(x)[0], expected)
    for mask in ("weights", "scores"):
        ours.mask = mask
        torch.testing.assert_close(ours(x)[0], expected)


def test_masks_before_and_behind_the_softmax():
    """Behind it, prompts of patches still count in the class token's denominator; before it they do not."""
    x = images().double()
    for mask, independent in (("weights", False), ("scores", True)):
        ours = tokens(mask=mask, topk=(3, 4)).double().eval()
        last = ours.depth - 1
        y = ours(x)[0]
        with torch.no_grad():
            ours.pools[1][last].add_(torch.randn(4, 1, 24))  # what only patches of the last block read
        assert torch.allclose(ours(x)[0], y) == independent


def test_rows_hold_the_chosen_prompts():
    ours = tokens()
    found = []
    before = ours.prompts
    ours.prompts = lambda layer, t: (before(layer, t), found.append(ours.allowed))[0]
    ours(images())
    ours(images(), random=True)
    assert len(found) == 4
    for allowed in found:
        assert allowed.shape == (2, 17, 10)
        assert (allowed[:, 0, :6].sum(-1) == 4).all() and not allowed[:, 0, 6:].any()
        assert (allowed[:, 1:, 6:].sum(-1) == 2).all() and not allowed[:, 1:, :6].any()
    assert not torch.equal(found[0], found[2])


def test_keys_learn_by_the_distance_alone():
    ours, x = tokens(), images()
    y, distance = ours(x)
    y.square().sum().backward(retain_graph=True)
    assert all(k.grad is None or not k.grad.any() for k in ours.keys)
    assert all(p.grad.any() for p in ours.pools)
    distance.backward()
    assert all(k.grad.any() for k in ours.keys)
    inside = [n for n, p in ours.model.named_parameters() if p.grad is not None]
    assert inside and all(n.startswith("head") for n in inside)
    assert sum(p.numel() for p in (*ours.keys, *ours.pools)) == 2 * 24 * (3 * 2 + 3 + 4 + 4)


def test_bad_input():
    with pytest.raises(ValueError, match=r"topk=\(4, 1\) chooses more prompts than pool_size=\(3, 4\)"):
        tokens(topk=(4, 1))
    with pytest.raises(ValueError, match="class token"):
        TokenPrompts(vit(class_token=False, global_pool="avg"))
    with pytest.raises(TypeError, match="vision transformer"):
        PromptCam(torch.nn.Linear(3, 3), 2)
    with pytest.raises(ValueError, match="depth"):
        PromptCam(vit(), 2, depth="none")
    cam = PromptCam(vit(), 2)
    with pytest.raises(ValueError, match="target"):
        cam(images(), [0], target=2)
    with pytest.raises(ValueError, match="one image"):
        cam.rank_heads(images(), 0)
    with pytest.raises(ValueError, match="state must hold"):
        cam.load_trained({})
    with pytest.raises(ValueError, match="prompt_embeddings"):
        PromptCam.convert_state_dict({})
