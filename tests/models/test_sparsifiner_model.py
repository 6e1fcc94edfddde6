"""Sparsifiner: what its card asks of the backbone, and the losses of its two phases."""

import json

import pytest
import torch
from parity import HERE, synthetic
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

import attnlib
from attnlib.models.backbones.sparsifiner import training_losses
from attnlib.models.build import load_pretrained
from tests.parity import Models

TINY = dict(
    patch_size=4, embed_dim=16, num_heads=2, depth=3, num_classes=5, mlp_ratio=2.0, img_size=16, reduce_n=4, coef_topk=3
)


def tiny(**settings):
    torch.manual_seed(0)
    return attnlib.create_model("sparsifiner_deit_small", **{**TINY, **settings}).eval()


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def deit(**settings):
    torch.manual_seed(3)
    own = {k: v for k, v in TINY.items() if k not in ("reduce_n", "coef_topk")}
    return attnlib.create_model("deit_small_patch16_224", **{**own, **settings}).eval()


@pytest.mark.parametrize("case", ["fitting", "whole", "dropping"])
def test_losses_equal_the_authors(case):
    with safe_open(HERE / "sparsifiner-losses.safetensors", "pt") as f:
        held, meta = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()  # noqa: SIM118
    teacher = deit()
    load_pretrained(teacher, {k: 0.9 * v for k, v in synthetic(json.loads(meta["teacher"])).items()})
    more = dict(drop_blocks=[0, 1], compat="authors") if case == "dropping" else {}
    student = tiny(keep_rate=0.5, recon_share=0.1, **more).train()
    load_pretrained(student, Models("sparsifiner").weights("released"))
    if case != "fitting":
        student.set_progress(0.1)
    x = images(2, 3, 16, 16, seed=3).requires_grad_()
    losses = training_losses(student, teacher, x, torch.tensor([1, 4]))
    names = {"reconstruction": "attn_recon_loss", "classes": "cls_loss", "logits": "cls_distill_loss",
             "tokens": "token_distill_loss"}  # fmt: skip
    assert set(losses) == ({"reconstruction"} if case == "fitting" else set(names) - {"reconstruction"})
    for name, value in losses.items():
        torch.testing.assert_close(value, held[f"{case}/loss/{names[name]}"], atol=1e-5, rtol=1e-5)
    sum(losses.values()).backward()
    torch.testing.assert_close(x.grad, held[f"{case}/dx"], atol=1e-5, rtol=1e-4)
    inner = student.stages[1].mixer.inner
    if case == "fitting":
        torch.testing.assert_close(inner.cheap_q.weight.grad, held["fitting/dw"], atol=1e-5, rtol=1e-4)
    else:
        ours = torch.cat([inner.q.weight.grad, inner.k.weight.grad, inner.v.weight.grad])
        torch.testing.assert_close(ours, held[f"{case}/dw"], atol=1e-5, rtol=1e-4)


def test_it_starts_from_a_deit():
    teacher = deit()
    student = tiny(keep_rate=1.0)
    before = student.stages[0].mixer.inner.reduce.clone()
    load_pretrained(student, _as_released(teacher))
    x = images(2, 3, 16, 16)
    torch.testing.assert_close(student(x), teacher(x))
    assert student.stages[0].mixer.inner.reduce.equal(before)


def _as_released(teacher):
    """A DeiT's weights in the names of its release."""
    own = teacher.state_dict()
    out = {
        "cls_token": own["cls_token"],
        "pos_embed": torch.cat([own["prefix_pos_embed"], own["pos_embed"].flatten(1).t()[None]], 1),
        "patch_embed.proj.weight": own["stem.proj.weight"], "patch_embed.proj.bias": own["stem.proj.bias"],
        "norm.weight": own["norm.weight"], "norm.bias": own["norm.bias"],
        "head.weight": own["head.fc.weight"], "head.bias": own["head.fc.bias"],
    }  # fmt: skip
    for i in range(len(teacher.stages)):
        for kind in ("weight", "bias"):
            inner = f"stages.{i}.mixer.inner"
            out[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat([own[f"{inner}.{p}.{kind}"] for p in "qkv"])
            for theirs, ours in (("attn.proj", "mixer.inner.proj"), ("norm1", "mixer.norm"), ("norm2", "mlp.norm"),
                                 ("mlp.fc1", "mlp.inner.fc1"), ("mlp.fc2", "mlp.inner.fc2")):  # fmt: skip
                out[f"blocks.{i}.{theirs}.{kind}"] = own[f"stages.{i}.{ours}.{kind}"]
    return out


def test_blocks_behind_dropping_compute_less():
    def flops(model):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images(1, 3, 32, 32))
        return counter.get_total_flops()

    every, some = tiny(img_size=32), tiny(img_size=32, drop_blocks=[0], token_keep_rate=0.25)
    assert flops(some) < 0.65 * flops(every)
    sparse, dense = tiny(img_size=64, keep_rate=0.1), tiny(img_size=64, keep_rate=1.0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        sparse(images(1, 3, 64, 64))
    pairs = counter.get_flop_counts()["Global"][torch.ops.attnlib.block_sparse]
    assert pairs == 3 * 2 * 2 * 256 * 26 * 16  # blocks, products of both kinds, heads, rows, kept keys, channels
    assert flops(sparse) != flops(dense)


def test_what_is_dropped_stays_zero():
    m = tiny(drop_blocks=[0, 2], token_keep_rate=0.5)
    maps = m.forward_intermediates(images(2, 3, 16, 16), intermediates_only=True, output_fmt="NLC")
    left = [(t.abs().sum(-1) > 0).sum(1).tolist() for t in maps]
    assert left == [[8, 8], [8, 8], [4, 4]]
    assert [b.mixer.inner.token_keep_rate for b in m.stages] == [0.5, None, 0.25]


@pytest.mark.parametrize("size", [(4, 4), (5, 31), (24, 16)])
def test_any_size_from_one_patch_up(size):
    y = tiny(drop_blocks=[1])(images(2, 3, *size))
    assert y.shape == (2, 5) and y.isfinite().all()


def test_pixels_that_do_not_exist_change_nothing():
    m = tiny(drop_blocks=[1])
    x, valid = images(2, 3, 16, 16), torch.zeros(2, 16, 16, dtype=torch.bool)
    valid[0, :8, :12] = valid[1] = True
    other = torch.where(valid[:, None], x, torch.full_like(x, float("nan")))
    torch.testing.assert_close(m(other, valid), m(x, valid))
    assert not torch.allclose(m(x, valid)[0], m(x)[0])


def test_other_mechanisms_stand_in_its_blocks():
    assert tiny(mechanism="softmax-attention")(images(1, 3, 16, 16)).shape == (1, 5)


def test_checkpointing_changes_nothing():
    m, x = tiny(drop_blocks=[0]).train(), images(2, 3, 16, 16)
    grads = []
    for on in (False, True):
        m.set_grad_checkpointing(on)
        m.zero_grad()
        m(x).square().sum().backward()
        grads.append([p.grad.clone() for p in m.parameters() if p.grad is not None])
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(keep_rate=[0.5, 0.5]), "must have one number for each of depth=3"),
        (dict(drop_blocks=[3]), "drop_blocks"),
        (dict(token_keep_rate=1.5, drop_blocks=[0]), "token_keep_rate"),
        (dict(num_heads=3), "num_heads=3 does not divide"),
        (dict(img_size=2), "img_size"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(**settings)


def test_bad_calls():
    with pytest.raises(ValueError, match="x must hold at least one patch"):
        tiny()(images(1, 3, 3, 8))
    with pytest.raises(ValueError, match="teacher has 3 blocks on 65 tokens"):
        training_losses(tiny().train(), deit(patch_size=2), images(1, 3, 16, 16))
    with pytest.raises(ValueError, match="teacher has 2 blocks"):
        training_losses(tiny(recon_share=0.5).train(), deit(depth=2), images(1, 3, 16, 16))
    with pytest.raises(TypeError, match="teacher must be"):
        training_losses(tiny(), torch.nn.Identity(), images(1, 3, 16, 16))
    other = attnlib.create_model(
        "deit_small_patch16_224", embed_dim=24, num_heads=2, depth=3, img_size=16, patch_size=4
    )
    with pytest.raises(ValueError, match="of another shape"):
        load_pretrained(tiny(), _as_released(other))
