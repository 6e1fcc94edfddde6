"""Fourteen awkward mechanisms, each a page long. If one of them needs a workaround, the types of floor 0 are wrong."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from attnlib import Layout, attention, deploy, masks
from attnlib.types import Plan
from contracts.block_plan import MixtureOfBlocks
from contracts.carry import HybridScale, SelfGuided
from contracts.circular import Clear
from contracts.dual_softmax import IMAGE, TEXT, DualAttention
from contracts.fusion import CrossViTFusion
from contracts.halo import Halo
from contracts.head_map import KeyDrivenGQA
from contracts.losses import MixtureOfHeads
from contracts.metric_cache import PowerLawGraphAttention
from contracts.partial_channels import SingleHead
from contracts.sampled_keys import Deformable3D
from contracts.segments import ScatteredLinear, window_plan
from contracts.two_contexts import StructuredGuidance
from contracts.window_plus_linear import WindowPlusLinear


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


def test_crossvit_touches_only_class_tokens_and_swaps():
    fusion = CrossViTFusion((8, 12), 2)
    a, b = torch.randn(2, 5, 8), torch.randn(2, 7, 12)
    ya, yb = fusion(a, b)
    assert torch.equal(ya[:, 1:], a[:, 1:]) and torch.equal(yb[:, 1:], b[:, 1:])
    other = CrossViTFusion((12, 8), 2)
    for name in ("there", "norm", "q", "k", "v", "proj", "back"):
        mine, theirs = getattr(fusion, name), getattr(other, name)
        theirs[0].load_state_dict(mine[1].state_dict())
        theirs[1].load_state_dict(mine[0].state_dict())
    swapped = other(b, a)
    close(swapped[1], ya)
    close(swapped[0], yb)


def test_sg_former_carry_reaches_the_next_block_as_a_plan():
    one, two = HybridScale(8, 4), SelfGuided(8, 2)
    x = torch.randn(2, 8, 8, 8)
    y, _, carry, *_ = one(x, returns=("carry",))
    assert carry.shape == (2, 8, 8) and not carry.requires_grad
    plan = two.plan(y, carry=carry)
    torch.testing.assert_close(two(y, plan=plan), two(y, carry=carry))
    with pytest.raises(ValueError, match="carry"):
        two(y)
    with pytest.raises(ValueError, match="N=64"):
        two(y[:, :4], plan=plan)


def test_moh_returns_its_loss_and_keeps_it_under_checkpointing():
    m, x = MixtureOfHeads(16, 4, shared=1, active=2), torch.randn(2, 6, 16)
    torch.nn.init.zeros_(m.routed.weight)
    out = m(x, returns=("losses",))
    close(out.losses["balance"], torch.tensor(2.0))  # uniform router: the loss is the number of active heads
    again = checkpoint(lambda t: m(t, returns=("losses",)).losses["balance"], x, use_reentrant=False)
    close(again, out.losses["balance"])


def test_key_driven_gqa_freezes_its_head_map():
    m, x = KeyDrivenGQA(16, 8, 4), torch.randn(2, 6, 16)
    plan = m.plan(x)
    assert plan["map"].shape == (8,) and bool((plan["map"].diff() >= 0).all())
    close(m(x), m(x, plan=plan))
    other = torch.randn(3, 9, 16)
    assert not torch.equal(m(other), m(other, plan=Plan("head-map", {"map": torch.zeros(8, dtype=torch.long)})))


def test_plga_is_causal_only_with_its_cached_metric():
    m, x = PowerLawGraphAttention(8, 2), torch.randn(1, 6, 8)
    changed = x.clone()
    changed[:, -1] += 3
    assert not torch.allclose(m(x)[:, :5], m(changed)[:, :5])
    _, state, *_ = m(x[:, :3], returns=("state",))
    full = m(x[:, 3:], state=state)
    close(m(changed[:, 3:], state=state)[:, :2], full[:, :2])
    for t in range(3, 6):
        y, state = m.step(x[:, t : t + 1], state)
        close(y[:, 0], full[:, t - 3])


def test_vmoba_merges_blocks_exactly():
    m, x = MixtureOfBlocks(8, 2, block=4, tau=0.4), torch.randn(2, 16, 8)
    plan = m.plan(x)
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in m.qkv(x).chunk(3, -1))
    union = masks.blocks(plan["chosen"], 1, 4) | masks.documents(torch.arange(16) // 4)
    dense = attention(q, k, v, mask=union, backend="eager").transpose(1, 2).flatten(2)
    close(m(x, plan=plan), dense)
    everything = MixtureOfBlocks(8, 2, block=4, tau=1.0)
    assert bool((everything.plan(x)["chosen"].sum(-1) >= 2).all())


@pytest.mark.parametrize("pad_mode", ["zero", "masked"])
def test_halonet_equals_dense_attention_with_a_box_mask(pad_mode):
    m, x = Halo(8, 2, block=4, halo=4, pad_mode=pad_mode), torch.randn(1, 8, 8, 8)
    y = m(x)
    if pad_mode == "masked":  # halo 4 on an 8 x 8 map: every block sees every pixel
        constant = m(torch.ones(1, 8, 8, 8))
        close(constant, constant[:, :1, :1].expand_as(constant))
    far = torch.randn(1, 16, 16, 8)
    other = far.clone()
    other[:, 12:] += 1
    m = Halo(8, 2, block=4, halo=1, pad_mode=pad_mode)
    close(m(far)[:, :8], m(other)[:, :8])
    assert y.shape == x.shape


def test_clear_text_reads_everything_and_images_read_circles():
    layout, x = Layout((("text", 3), ("image", (5, 5)))), torch.randn(1, 28, 8)
    m, wide = Clear(8, 2, radius=1.0), Clear(8, 2, radius=10.0)
    wide.load_state_dict(m.state_dict())
    close(m(x, layout=layout)[:, :3], wide(x, layout=layout)[:, :3])
    other = x.clone()
    other[:, 3 + 24] += 1  # the last pixel is outside the circle of the first
    close(m(x, layout=layout)[:, 3], m(other, layout=layout)[:, 3])
    assert int(masks.circular_window((33, 33), 8).dense(33 * 33)[16 * 33 + 16].sum()) == 193
    with pytest.raises(ValueError, match="28"):
        m(x[:, :27], layout=layout)


def test_lolcats_short_sequences_are_exact_softmax():
    m, x = WindowPlusLinear(8, 2, window_size=8), torch.randn(2, 8, 8)
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in m.qkv(x).chunk(3, -1))
    soft = attention(q, k, v, mask=masks.causal()).transpose(1, 2).flatten(2)
    close(m(x), m.proj(soft))
    longer = torch.randn(2, 20, 8)
    changed = longer.clone()
    changed[:, 15:] += 2
    close(m(longer)[:, :15], m(changed)[:, :15])


def test_scatterformer_segments_do_not_mix():
    m = ScatteredLinear(8, 2)
    coords = torch.randint(0, 6, (2, 20, 3))
    x, plan = torch.randn(2, 20, 8), window_plan(coords, 3)
    y, ids = m(x, plan=plan), plan["ids"]
    for i in range(int(plan["count"])):
        where = ids == i
        alone = Plan("segments", {"ids": torch.zeros(1, int(where.sum()), dtype=torch.long), "count": torch.tensor(1)})
        close(m(x[where][None], plan=alone)[0], y[where])
    empty = window_plan(coords[:, :0], 3)
    assert m(x[:, :0], plan=empty).shape == (2, 0, 8)


def test_shvit_folds_its_norms():
    m, x = SingleHead(12, partial=4, qk_dim=3), torch.randn(2, 4, 4, 12)
    for _ in range(3):
        m(x)
    m.eval()
    folded = deploy(m)
    assert not any(isinstance(c, torch.nn.BatchNorm1d) for c in folded.modules())
    close(folded(x), m(x), 1e-4)
    assert any(isinstance(c, torch.nn.BatchNorm1d) for c in m.modules())


def test_dfa3d_with_uniform_depth_is_a_fraction_of_two_dimensions():
    depth = 4
    m = Deformable3D(8, 2, depth)
    with torch.no_grad():  # sample well inside the depth range
        m.where.weight.view(2, 4, 3, 8)[:, :, 2] = 0
        m.where.bias.view(2, 4, 3)[:, :, 2] = 0
    x, features = torch.randn(2, 5, 8), torch.randn(2, 6, 6, 8)
    uniform = torch.full((2, 6, 6, depth), 1 / depth)
    y = m(x, torch.cat([features, uniform], -1)) - m.proj.bias
    doubled = m(x, torch.cat([features, 2 * uniform], -1)) - m.proj.bias
    close(doubled, 2 * y)
    with pytest.raises(ValueError, match="context_dim=12"):
        m(x, features)
    with pytest.raises(ValueError, match="needs a context"):
        m(x)


def test_lacing_normalises_twice():
    q, k, v = torch.randn(3, 2, 2, 6, 4)
    types = torch.tensor([[1, 2, 2, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    call = partial(attention, backend="eager")
    out = DualAttention(types).around_attention(None, q, k, v, call)
    ones = DualAttention(types).around_attention(None, q, k, torch.ones_like(v), call)
    assert torch.allclose(ones[0], torch.full_like(ones[0], 2.0))  # with an image, rows sum to two
    text_only = (types[1] == TEXT) & ~(types[1] == IMAGE)
    close(out[1], attention(q, k, v, mask=masks.causal(), valid=text_only.expand(2, -1))[1])


def test_structured_guidance_equals_the_loop_over_variants():
    torch.manual_seed(0)
    wk, wv, q = torch.randn(2, 8, 8).unbind() + (torch.randn(2, 2, 5, 4),)
    context, variants = torch.randn(2, 7, 8), torch.randn(3, 2, 7, 8)
    heads = lambda t: t.unflatten(-1, (2, 4)).transpose(1, 2)  # noqa: E731
    site = SimpleNamespace(rows=("uncond", "cond"))
    k_source, v_source = StructuredGuidance(variants).on_context(site, context, context)
    out = attention(q, heads(k_source @ wk), heads(v_source @ wv))
    loop = torch.stack([attention(q, heads(context @ wk), heads(c @ wv)) for c in (context, *variants)]).mean(0)
    close(out[1], loop[1])
    assert torch.equal(out[0], attention(q, heads(context @ wk), heads(context @ wv))[0])
