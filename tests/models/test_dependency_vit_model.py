"""DependencyViT: the whole model against its equations, its Lite form against absent tokens."""

import pytest
import torch
from torch import nn

import attnlib
from attnlib.models.build import counted_params, model_entry

TINY = dict(patch_size=4, embed_dim=12, depth=3, num_heads=2, num_classes=5, img_size=24, layer_scale=None)


def model(name="dependency_vit_ti", **settings):
    torch.manual_seed(0)
    m = attnlib.create_model(name, **{**TINY, **settings}).eval()
    for p in m.parameters():
        nn.init.normal_(p, 0, 0.3)
    return m


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lite(**settings):
    return model("dependency_vit_lite_ti", **{"prune_blocks": (0, 1), "prune_ratio": 0.3, **settings})


@pytest.mark.parametrize(("name", "dim"), [("ti", 192), ("s", 384)])
def test_counts_are_deits_and_what_the_card_adds(name, dim):
    deit = counted_params(model_entry({"ti": "deit_tiny", "s": "deit_small"}[name] + "_patch16_224"))
    more = 12 * dim + dim * dim // 2 + dim // 2  # selector, controller
    expected = deit - 2 * dim - 12 * 3 * dim + 12 * more + 12 * 2 * dim  # class token, qkv biases, layer scales
    assert counted_params(model_entry(f"dependency_vit_{name}")) == expected
    assert counted_params(model_entry(f"dependency_vit_lite_{name}")) == expected
    assert {"ti": 5_964_712, "s": 22_987_624}[name] == expected


def test_it_is_its_equations():
    m, x = model().double(), images(2, 3, 24, 24).double()

    def norm(t, layer):
        return nn.functional.layer_norm(t, (12,), layer.weight, layer.bias, 1e-6)

    y = nn.functional.conv2d(x, m.stem.proj.weight, m.stem.proj.bias, stride=4) + m.pos_embed
    y, message = y.flatten(2).mT, torch.ones(2, 36, dtype=torch.float64)
    for block in m.stages:
        inner, z = block.mixer.inner, norm(y, block.mixer.norm)
        q, k, v = (f(z).unflatten(2, (2, 6)).transpose(1, 2) for f in (inner.q, inner.k, inner.v))
        head = torch.softmax(z @ inner.selector.weight.T / 0.1, -1).mT
        gate = nn.functional.gelu(z @ inner.controller.fc1.weight.T) @ inner.controller.fc2.weight.T
        message = message * torch.sigmoid(gate[..., 0])
        a = torch.softmax(q @ k.mT * 6**-0.5, -1).mT * head[:, :, None] * message[:, None, None]
        y = y + inner.proj((a @ v).transpose(1, 2).flatten(2))
        z = norm(y, block.mlp.norm)
        y = (
            y
            + nn.functional.gelu(z @ block.mlp.inner.fc1.weight.T + block.mlp.inner.fc1.bias)
            @ (block.mlp.inner.fc2.weight.T)
            + block.mlp.inner.fc2.bias
        )
    y = norm(y, m.norm)
    logits = (y * message[..., None]).mean(1) @ m.head.fc.weight.T + m.head.fc.bias
    torch.testing.assert_close(m(x), logits, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(m.forward_head(m.forward_features(x)), logits)
    m.message_pool = "plain"
    torch.testing.assert_close(m(x), m.head.fc(y.mean(1)))
    m.message_pool = "weighted"
    torch.testing.assert_close(m(x), m.head.fc((y * message[..., None]).sum(1) / message.sum(1, keepdim=True)))


def test_dependencies_are_kept_messages():
    m, x = lite(), images(2, 3, 24, 24)
    found = m.dependencies(x)
    assert found.masks.shape == (3, 2, 36, 36) and found.messages.shape == (3, 2, 36)
    torch.testing.assert_close(found.masks.sum(-2), found.messages)
    active = (found.messages > 0).sum(-1)
    assert active.tolist() == [[36, 36], [25, 25], [14, 14]]  # 1 - 0.3 t of 36
    # What is left in a block is what received the most in the block before.
    kept = found.masks[0].sum(-1).topk(25).indices.sort(-1).values
    assert torch.equal((found.messages[1] > 0).nonzero()[:, 1].view(2, 25), kept)
    assert not m.stages[0].mixer.inner._forward_hooks


def test_pruning_is_exact():
    """The Lite model computes what the same weights compute with the tokens that were let go marked absent."""
    m, x = lite().double(), images(2, 3, 24, 24).double()
    whole = model().double()
    whole.load_state_dict(m.state_dict())
    found = m.dependencies(x)
    y = whole.stem(x.permute(0, 2, 3, 1))[0] + whole.positions((6, 6))
    carry = None
    for number, block in enumerate(whole.stages):
        exists = (found.messages[number] > 0).view(2, 6, 6)
        new, carry = block.mixer(y, exists, carry)
        y = torch.where(exists[..., None], new, y)
        behind = found.messages[number + 1] > 0 if number < 2 else found.messages[2] > 0
        y = torch.where(behind.view(2, 6, 6, 1), block.mlp(y)[0], y)
        torch.testing.assert_close(
            m.forward_intermediates(x, [number], intermediates_only=True)[0], y.permute(0, 3, 1, 2)
        )
    last = (found.messages[2] > 0).view(2, 6, 6, 1)
    pooled = torch.where(last, whole.norm(y) * carry.log.exp().view(2, 6, 6, 1), 0).mean((1, 2))
    torch.testing.assert_close(m(x), m.head.fc(pooled))


def test_features_only_any_size_and_absent_pixels():
    f = lite(features_only=True)
    maps = f(images(1, 3, 33, 50))
    assert [tuple(t.shape) for t in maps] == [(1, 12, 9, 13)] * 3 and all(t.isfinite().all() for t in maps)
    first = model()(images(1, 3, 24, 24))
    valid = torch.zeros(1, 32, 40, dtype=torch.bool)
    valid[:, :24, :24] = True
    for pool in ("messages", "weighted", "plain"):
        m = model(message_pool=pool, img_size=24)
        nn.init.zeros_(m.pos_embed)  # a table for another grid would be another model
        wide = torch.full((1, 3, 32, 40), float("nan"))
        wide[:, :, :24, :24] = images(1, 3, 24, 24)
        torch.testing.assert_close(m(wide, valid), m(images(1, 3, 24, 24)))
    assert first.shape == (1, 5)


def test_training_reaches_every_parameter():
    m = lite().train()
    m(images(2, 3, 24, 24)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in m.named_parameters())


def test_another_mechanism_and_bad_settings():
    m = model(mechanism="softmax-attention")
    assert m(images(1, 3, 24, 24)).shape == (1, 5)
    with pytest.raises(ValueError, match="another mechanism"):
        m.dependencies(images(1, 3, 24, 24))
    for settings, words in (
        (dict(prune_blocks=(3,)), "prune_blocks"), (dict(prune_blocks=(0, 1, 2), prune_ratio=0.4), "prune_ratio"),
        (dict(message_pool="mean"), "message_pool"), (dict(num_heads=5), "num_heads"),
        (dict(temperature=-1), "temperature"),
        (dict(global_pool="token"), "global_pool"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=words):
            model(**settings)
