"""DCAL against float64 oracles written from its equations (no code of the authors exists), and rollout."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import attnlib
from attnlib.convert import DualCrossAttention
from attnlib.convert.dual_cross_attention import PairedContext, derangement, global_local
from attnlib.hooks import Intervention, attach
from attnlib.look import Rollout


def vit(seed=0, **settings):
    given = dict(patch_size=4, img_size=16, embed_dim=12, depth=2, num_heads=3, num_classes=5, layer_scale=0.5)
    torch.manual_seed(seed)
    model = attnlib.create_model("vit_tiny_patch16_224", **{**given, **settings}).double()
    with torch.no_grad():
        for block in model.stages:  # maps that are far from uniform
            block.mixer.inner.q.weight.mul_(40)
            block.mixer.inner.k.weight.mul_(40)
    return model


def images(n=4):
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()


def attend(inner, queries, keys):
    """(N, C), (M, C) -> (N, C) and maps (H, N, M), head by head."""
    heads, width = inner.num_heads, inner.head_dim
    q, k, v = inner.q(queries), inner.k(keys), inner.v(keys)
    parts = [slice(h * width, (h + 1) * width) for h in range(heads)]
    maps = torch.stack([(q[:, s] @ k[:, s].T / math.sqrt(width)).softmax(-1) for s in parts])
    return inner.proj(torch.cat([maps[h] @ v[:, s] for h, s in enumerate(parts)], -1)), maps


def oracle(block, queries, keys):
    y, maps = attend(block.mixer.inner, block.mixer.norm(queries), block.mixer.norm(keys))
    x = queries + 0.5 * y
    z = block.mlp.norm(x)
    return x + 0.5 * block.mlp.inner.fc2(F.gelu(block.mlp.inner.fc1(z))), maps


def embedded(model, x):
    y = model.stem(x.permute(0, 2, 3, 1), None)[0] + model.positions((4, 4))
    return torch.cat([model._prefix().expand(len(x), -1, -1), y.flatten(1, 2)], 1)


@torch.no_grad()
def test_pair_wise_attention_is_one_softmax_over_both_samples():
    model, x = vit().eval(), images(3)
    partners = torch.tensor([2, 0, 1])
    tokens = embedded(model, x)
    for block in model.stages:
        tokens = torch.stack(
            [oracle(block, t, torch.cat([t, tokens[j]]))[0] for t, j in zip(tokens, partners, strict=True)]
        )
    with attach(model, PairedContext(partners=partners)):
        found = model.forward_features(x)
    torch.testing.assert_close(found, model.norm(tokens), rtol=1e-10, atol=1e-12)
    with attach(model, PairedContext(partners=torch.arange(3))):
        itself = model.forward_features(x)
    torch.testing.assert_close(itself, model.forward_features(x), rtol=1e-10, atol=1e-12)
    assert (found - itself).abs().max() > 1e-3


def test_every_sample_has_another_as_partner_and_one_for_all_layers():
    for count in (2, 3, 7):
        partners = derangement(count, torch.Generator().manual_seed(count))
        assert sorted(partners.tolist()) == list(range(count)) and not (partners == torch.arange(count)).any()
    act = PairedContext(generator=torch.Generator().manual_seed(3))
    model, seen = vit(), []

    class Watch(Intervention):
        name = "watch"

        def on_context(self, site, k, v):
            seen.append((site.layer, act.partners.tolist(), k.shape[1]))
            return k, v

    with attach(model, act, Watch()):
        for _ in range(6):
            model(images())
    assert all(n == 2 * 17 for *_, n in seen)
    assert all(seen[i][1] == seen[i + 1][1] for i in range(0, 12, 2)) and len({str(p) for _, p, _ in seen}) > 1
    with attach(model, PairedContext()), pytest.raises(ValueError, match="a batch of 1 holds no pair"):
        model(images(1))
    with attach(model, PairedContext(partners=torch.tensor([0, 9, 1, 2]))), pytest.raises(ValueError, match="partners"):
        model(images())


@torch.no_grad()
def test_rollout_is_the_product_of_the_maps():
    model, x = vit(depth=3).eval(), images(2)
    tokens, wanted = embedded(model, x), torch.eye(17, dtype=torch.float64).expand(2, -1, -1)
    for block in model.stages:
        made = [oracle(block, t, t) for t in tokens]
        tokens = torch.stack([y for y, _ in made])
        means = torch.stack([m.mean(0) for _, m in made])
        wanted = (0.5 * means + 0.5 * torch.eye(17)) @ wanted
    look = Rollout()
    with attach(model, look) as session:
        for part in (x.flip(0), x):  # the last call counts
            model(part)
        found = session.results["rollout"]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]))
    swapped = copy.deepcopy(model)
    for block in swapped.stages:  # heads in another order
        for linear in (block.mixer.inner.q, block.mixer.inner.k, block.mixer.inner.v):
            linear.weight.copy_(linear.weight.unflatten(0, (3, 4)).flip(0).flatten(0, 1))
            linear.bias.copy_(linear.bias.unflatten(0, (3, 4)).flip(0).flatten(0, 1))
        proj = block.mixer.inner.proj.weight
        proj.copy_(proj.unflatten(1, (3, 4)).flip(1).flatten(1, 2))
    with attach(swapped, look):
        swapped(x)
        again = look.results()
    pick = DualCrossAttention(model, top=0.5).selected
    assert torch.equal(pick(again), pick(found))
    with pytest.raises(ValueError, match="residual"):
        Rollout(residual=1.0)


@torch.no_grad()
def test_rollout_of_identity_attention_is_the_identity():
    class Itself(Intervention):
        name = "itself"
        whole_map = True

        def on_weights(self, site, weights, rows):
            return torch.eye(weights.shape[-1], dtype=weights.dtype).expand_as(weights)

    model, look = vit().eval(), Rollout()
    with attach(model, Itself(), look):
        model(images(2))
        found = look.results()
    torch.testing.assert_close(found, torch.eye(17, dtype=found.dtype).expand(2, -1, -1))


@torch.no_grad()
def test_global_local_attention_reads_all_and_writes_the_selected():
    block = vit().stages[-1]
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    index = torch.tensor([[0, 4, 7], [0, 8, 2]])
    found = global_local(block, x, index)
    for b in range(2):
        rows = oracle(block, x[b, index[b]], x[b])[0]
        torch.testing.assert_close(found[b, index[b]], rows, rtol=1e-10, atol=1e-12)
        others = [i for i in range(9) if i not in index[b].tolist()]
        assert torch.equal(found[b, others], x[b, others])
    torch.testing.assert_close(
        global_local(block, x, torch.arange(9).expand(2, -1)), block(x)[0], rtol=1e-10, atol=1e-12
    )


@torch.no_grad()
def test_the_class_token_alone_does_not_see_which_patches_are_selected():
    model, x = vit().eval(), images(2)
    torch.manual_seed(5)
    made = DualCrossAttention(model, top=0.1)
    few, many = made(x), None
    made.top = 0.9
    many = made(x)
    torch.testing.assert_close(few, many, rtol=1e-10, atol=1e-12)
    made.read = "selected"
    many = made(x)
    made.top = 0.1
    assert (made(x) - many).abs().max() > 1e-6


def test_losses_weights_and_what_is_added():
    model, x, labels = vit(), images(), torch.tensor([0, 1, 2, 3])
    torch.manual_seed(5)
    made = DualCrossAttention(model.train(), top=0.25).double()
    block, head = model.stages[-1], model.head
    grown = sum(p.numel() for p in made.parameters()) - sum(p.numel() for p in model.parameters())
    assert grown == sum(p.numel() for m in (block, model.norm, head) for p in m.parameters()) + 3
    with torch.no_grad():
        made.log_variances.copy_(torch.tensor([0.3, -0.2, 0.1]))
    found = made.loss(x, labels, torch.Generator().manual_seed(7))
    _, logits, _, local = made.branches(x)
    with attach(model, PairedContext(partners=derangement(4, torch.Generator().manual_seed(7)))):
        paired = model(x)
    plain, near, pair = (F.cross_entropy(y, labels) for y in (logits, local, paired))
    torch.testing.assert_close(logits, model(x))
    wanted = 0.5 * (plain * math.exp(-0.3) + 0.3 + near * math.exp(0.2) - 0.2 + pair * math.exp(-0.1) + 0.1)
    torch.testing.assert_close(found["total"], wanted)
    found["total"].backward()
    assert all(p.grad is not None for n, p in made.named_parameters())
    made.bound = 0.1
    bounded = made.loss(x, labels, torch.Generator().manual_seed(7))["total"]
    torch.testing.assert_close(
        bounded, 0.5 * (plain * math.exp(-0.1) + 0.1 + near * math.exp(0.1) - 0.1 + pair * math.exp(-0.1) + 0.1)
    )
    tripled = DualCrossAttention(model, criterion=lambda f, y, t: f.square().mean() + F.cross_entropy(y, t)).double()
    assert float(tripled.loss(x, labels)["plain"]) > float(found["plain"])


@torch.no_grad()
def test_both_rules_of_inference_and_no_pairs_in_evaluation():
    model, x = vit().eval(), images(1)  # one sample has no partner, and needs none
    made = DualCrossAttention(model).double().eval()
    features, logits, local_features, local_logits = made.branches(x)
    torch.testing.assert_close(made(x), logits.softmax(-1) + local_logits.softmax(-1))
    torch.testing.assert_close(made(x, rule="concat"), torch.cat([features, local_features], 1))
    torch.testing.assert_close(features, model.forward_features(x)[:, 0])
    with pytest.raises(ValueError, match="rule"):
        made(x, rule="mean")


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="a batch of 1"):
        DualCrossAttention(vit()).double().loss(images(1), torch.tensor([0]))
    for bad in (vit(class_token=False, global_pool="avg"), vit(post_norm=True), torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="class token, softmax attention"):
            DualCrossAttention(bad)
    with pytest.raises(ValueError, match="top"):
        DualCrossAttention(vit(), top=0.0)
    with pytest.raises(ValueError, match="read"):
        DualCrossAttention(vit(), read="all")
