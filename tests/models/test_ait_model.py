"""AiT: quantizer, VQ-VAE, solver and heads against the authors' classes; soft against hard; losses; bad input."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from parity import HERE, synthetic
from safetensors import safe_open
from torch import nn

from attnlib.models.multimodal.ait import AiT, ObjectTokens, dice, noise_boxes, paste_masks, silog
from attnlib.models.multimodal.soft_tokens import Solver, Vocabulary
from attnlib.models.multimodal.vqvae import VQVAE, hide_patches
from attnlib.models.sampling import nucleus
from attnlib.nn.quantizer import VectorQuantizer

with safe_open(HERE / "ait-soft-token.safetensors", "pt") as f:
    HELD = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    SAID = {k: json.loads(f.metadata()[k]) for k in ("shapes", "settings", "counts")}
CLOSE = dict(atol=1e-9, rtol=1e-9)
WORDS = Vocabulary(20, 3, 5, 6)


def same(ours, theirs, what="", **more):
    torch.testing.assert_close(ours, theirs, **(CLOSE | more), msg=lambda m: f"{what}: {m}")


def weights(name):
    held = {k: v.double() for k, v in synthetic(SAID["shapes"][name]).items()}
    return {k: v.abs() + 0.5 if "cluster" in k else v for k, v in held.items()}


def last(x):
    """(B, 1, H, W) of theirs in our order."""
    return x.permute(0, 2, 3, 1)


def vae(name, **more):
    said = SAID["settings"][name]
    if "token_length" in said:
        ratio = said["mask_size"] // math.isqrt(said["token_length"])
        settings = dict(num_codes=said["num_embeddings"], ratio=ratio, tau=said.get("tau", 1.0))
        settings |= dict(hidden_dim=said["hidden_dim"] // (ratio // 2), dim=said["embedding_dim"])
    else:
        settings = dict(num_codes=said["num_tokens"], ratio=said["downsample_ratio"], max_value=said["max_value"])
        settings |= dict(hidden_dim=said["hidden_dim"], dim=said["codebook_dim"])
        settings |= dict(block="norm" if said.get("residul_type") == "v2" else "plain")
    made = VQVAE(normalize=said["use_norm"], compat="authors", **settings | more).double()
    made.load_state_dict(VQVAE.convert_state_dict(weights(name)))
    return made.eval()


def solver(name):
    said = SAID["settings"][name]
    made = Solver(
        said["in_chans"], WORDS, said["d_model"], said["nhead"], said["dim_feedforward"], said["num_encoder_layers"],
        said["num_decoder_layers"], (said["n_rows"], said["n_cols"]), said["dec_length"], drop=0.0, drop_path=0.0,
        positions=said.get("pos_enc", "sine"), parallel=said.get("parallel", False),
    )  # fmt: skip
    made.load_state_dict(Solver.convert_state_dict(weights(name)))
    return made.double().eval()


class Given(nn.Module):
    """A backbone that gives what it is given."""

    def forward(self, images):
        return [images]


def ait(name, **more):
    return AiT(Given(), solver(name), vae("vae_depth"), vae("vae_mask"), mask_size=8, norm_val=32, **more)


# ---- the quantizer


def test_learned_codes_equal_the_authors():
    q = VectorQuantizer(5, 4, decay=0).double()
    q.load_state_dict({"codebook": weights("learned")["_embedding.weight"]})
    x = last(HELD["learned/x"]).requires_grad_()
    out = q(x)
    same(out.y, last(HELD["learned/y"]))
    same(out.loss[None], HELD["learned/loss"])
    same(out.perplexity[None], HELD["learned/perplexity"])
    (out.loss * 3 + (out.y * last(HELD["learned/w"])).sum()).backward()
    same(x.grad, last(HELD["learned/dx"]))
    same(q.codebook.grad, HELD["learned/dw"])


@pytest.mark.parametrize("compat", [None, "authors"])
def test_codes_move_to_the_means_of_what_chose_them(compat):
    torch.manual_seed(0)
    q = VectorQuantizer(2, 2, decay=0.9, compat=compat)
    q.codebook.copy_(torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
    q.sums.copy_(q.codebook)
    points = torch.cat([torch.randn(200, 2) * 0.1 + 2, torch.randn(100, 2) * 0.1 - 3])[None]
    for _ in range(150):
        out = q(points)
    same(q.codebook, torch.stack([points[0, 200:].mean(0), points[0, :200].mean(0)]), atol=1e-3, rtol=1e-3)
    assert 1 <= out.perplexity <= 2
    before = q.codebook.clone()
    q.eval()(points)
    assert torch.equal(q.codebook, before)


def test_a_code_that_nothing_chose_stays():
    torch.manual_seed(0)
    held = {}
    for compat in (None, "authors"):
        q = VectorQuantizer(3, 2, compat=compat)
        q.codebook.copy_(torch.tensor([[0.0, 0.0], [5.0, 5.0], [9.0, -9.0]]))
        q.sums.copy_(q.codebook if compat is None else torch.ones(3, 2))
        q(torch.randn(1, 50, 2) * 0.1)
        held[compat] = q.codebook[1:].clone()
    assert (held[None] - torch.tensor([[5.0, 5.0], [9.0, -9.0]])).abs().max() < 1e-3
    assert held["authors"].abs().max() > 1e2  # what the release does


def test_absent_tokens_move_nothing_whatever_they_hold():
    torch.manual_seed(0)
    q = VectorQuantizer(4, 3)
    r = copy.deepcopy(q)
    x = torch.randn(2, 6, 3)
    valid = torch.arange(6) < torch.tensor([[4], [6]])
    bad = x.masked_fill(~valid[..., None], float("nan")).requires_grad_()
    out = q(bad, valid)
    plain = r(x[valid][None])
    same(out.loss, plain.loss, atol=1e-6)
    same(out.perplexity, plain.perplexity, atol=1e-5)
    same(q.codebook, r.codebook, atol=1e-5, rtol=1e-5)
    (out.y.sum() + out.loss).backward()
    assert bad.grad.isfinite().all() and (bad.grad[~valid] == 0).all()
    assert (out.indices[~valid] == -1).all() and (out.y[~valid] == 0).all()
    assert q(torch.zeros(0, 6, 3)).loss == 0
    half = q(torch.randn(1, 6, 3, dtype=torch.bfloat16))
    assert half.y.dtype == torch.bfloat16 and half.loss.dtype == torch.float32


# ---- the VQ-VAE


@pytest.mark.parametrize("name", ["vae_plain", "vae_norm"])
def test_vqvae_equals_the_authors_in_training(name):
    said = SAID["settings"][name]
    made = vae(name, ignore_zero=said["loss_type"] == "mse_ignore_zero").train()
    d = last(HELD[f"{name}/d"])
    state = {k: v.clone() for k, v in made.state_dict().items()}
    assert torch.equal(made.encode(d), HELD[f"{name}/indices"]) and made.training
    assert all(torch.equal(v, state[k]) for k, v in made.state_dict().items())
    masked = last(HELD[f"{name}/masked"])
    with torch.no_grad():
        y = copy.deepcopy(made)(masked)[0]
    same(y, last(HELD[f"{name}/y"]))
    x = masked.clone().requires_grad_()
    found = made.loss(x, d)
    same(found["recon"][None], HELD[f"{name}/recon"])
    same(sum(found.values())[None], HELD[f"{name}/total"])
    sum(found.values()).backward()
    same(x.grad, last(HELD[f"{name}/dx"]))
    grads = {n: p.grad for n, p in made.named_parameters()}
    for key in ("encoder.0.weight", "decoder.0.weight"):
        same(grads[key], HELD[f"{name}/dw/{key}"], key)
    after = {k.removeprefix(f"{name}/after/"): v for k, v in HELD.items() if k.startswith(f"{name}/after/")}
    converted = VQVAE.convert_state_dict(weights(name) | after)
    for key in ("codebook", "counts", "sums"):
        same(made.state_dict()[f"quantizer.{key}"], converted[f"quantizer.{key}"], key)
    same(made.eval().decode(HELD[f"{name}/indices"]), last(HELD[f"{name}/decoded"]))


def test_sizes_are_the_authors():
    with torch.device("meta"):
        made = VQVAE(hidden_dim=16, ratio=32)
        joint = Solver(1024, Vocabulary(other_codes=128))
        parallel = Solver(1024, Vocabulary(), parallel=True, grid=(15, 15))
    for name, module in (("vae_depth", made), ("joint", joint), ("parallel", parallel)):
        assert sum(p.numel() for p in module.parameters()) == SAID["counts"][name], name
    with torch.device("meta"):
        assert made.encode(torch.empty(1, 480, 480, 1)).shape == (1, 15, 15)  # 225 tokens of a map of 480 x 480


def test_soft_decoding_of_one_hots_is_hard_decoding():
    made = vae("vae_depth")
    codes = torch.randint(6, (2, 2, 3))
    hot = F.one_hot(codes, 6).double()
    assert torch.equal(made.render(made.quantizer.soft(hot)), made.decode(codes))
    near = [(made.decode_soft(hot * s) - made.decode(codes)).abs().max() for s in (1, 4, 16, 64)]
    assert near[0] > near[1] > near[2] > near[3] and near[3] < 1e-9


def test_hidden_patches_are_counted():
    x = torch.rand(3, 48, 32, 2) + 0.1
    for ratio in (0.1, 0.5, 1.0):
        y = hide_patches(x, ratio, 16, torch.Generator().manual_seed(1))
        cells = (y == 0).unflatten(1, (3, 16)).unflatten(3, (2, 16)).permute(0, 1, 3, 2, 4, 5).flatten(3)
        assert (cells.all(-1) == cells.any(-1)).all()
        assert (cells.all(-1).sum((1, 2)) == math.ceil(6 * ratio)).all()
    assert hide_patches(x, 0.0) is x


def test_vqvae_learns_depth_it_does_not_see():
    torch.manual_seed(0)
    made = VQVAE(num_codes=16, dim=8, hidden_dim=8, ratio=4, depth=1, ignore_zero=True)
    grid = torch.linspace(0.5, 1.5, 16)
    maps = (torch.rand(8, 1, 1, 1) + 0.5) * grid[:, None, None] + 0.2 * grid[None, :, None]
    optimizer = torch.optim.AdamW(made.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    first = None
    for _ in range(60):
        loss = sum(made.loss(hide_patches(maps, 0.5, 4, generator), maps).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first = loss.item() if first is None else first
    assert loss.item() < 0.2 * first


# ---- the vocabulary and the solver


def test_ranges_come_from_one_table():
    v = Vocabulary(other_codes=128)
    assert [list(v.ranges[n])[0] for n in ("box", "class", "special", "mask", "depth", "other")] == [
        0, 2001, 2081, 2083, 2211, 2339,
    ]  # fmt: skip
    assert v.noise == 2082 and len(v) == 2467
    joined = [i for span in v.ranges.values() for i in span]
    assert joined == list(range(len(v)))
    assert torch.equal(v.own("depth", torch.arange(len(v))), torch.arange(2211, 2339))


@pytest.mark.parametrize("name", ["soft", "hard", "parallel", "learned_pos"])
def test_depth_equals_the_authors(name):
    made = ait(name, soft_feed=name == "soft").train()
    depth = HELD["depth"][:, 0]
    tokens = made.depth_tokens(depth)
    assert torch.equal(tokens, HELD[f"{name}/target"])
    x = HELD["src"].permute(0, 2, 3, 1).clone().requires_grad_()
    valid = ~HELD["pad"] if name == "soft" else None
    logits = made.solver(x, "depth", tokens[:, :-1], valid)
    theirs = HELD[f"{name}/logits"]
    same(logits, theirs)
    found = made.depth_loss(logits, depth)
    same(found["silog"][None], HELD[f"{name}/silog"])
    same(found["tokens"][None], HELD[f"{name}/ce"])
    total = sum(found.values()) * tokens.numel()  # theirs is a sum over tokens
    same(total[None], HELD[f"{name}/loss"])
    total.backward()
    dx = HELD[f"{name}/dx"].permute(0, 2, 3, 1)
    same(x.grad, dx, "dx")
    known = {k.removeprefix(f"{name}/dw/"): v for k, v in HELD.items() if k.startswith(f"{name}/dw/")}
    grads = {n: p.grad for n, p in made.solver.named_parameters()}
    for key, value in known.items():
        if key == "dec_embed":
            same(grads[key][2, :5], value, key)
        else:
            same(grads[key.replace(".blocks", "")], value, key)
    assert len(known) >= 8
    made.eval()
    soft = ("depth",) if name == "soft" else ()
    written = made.solver.write(x.detach(), "depth", ["depth"] * 4, soft, valid=valid)
    same(written.logits["depth"], HELD[f"{name}/gen_logits"])
    assert torch.equal(written.tokens - WORDS.ranges["depth"].start, HELD[f"{name}/gen_tokens"])
    drawn = made.depth_vae.decode_soft(written.logits["depth"].unflatten(1, (2, 2)))
    same(drawn[..., 0], HELD[f"{name}/soft"])
    if valid is None:
        got = made.predict(HELD["src"], "depth", size=(16, 16))
        same(got, HELD[f"{name}/soft"])
        made.soft = False
        same(made.predict(HELD["src"], "depth", size=(16, 16)), HELD[f"{name}/hard"])


@pytest.mark.parametrize("name", ["objects_soft", "objects_hard", "objects_mask_first"])
def test_objects_equal_the_authors(name):
    said = SAID["settings"][name]
    first = said.get("mask_before_label", False)
    made = ait(
        name, soft=said.get("soft_vae", False), soft_feed=said.get("soft_transformer", False), mask_first=first
    ).train()
    held = {k.removeprefix(f"{name}/"): v for k, v in HELD.items() if k.startswith(f"{name}/")}
    codes = made.mask_codes(held["masks"])
    assert torch.equal(codes, held["tokens"])
    seq = made.objects.pack(held["boxes"], held["labels"], codes)
    assert torch.equal(seq.flatten()[None], held["seq"])
    for target, real in (("target", [True, False]), ("target2", [True, True])):
        assert torch.equal(made.objects.targets(seq, torch.tensor(real)).flatten()[None], held[target])
    boxes, labels, again = made.objects.unpack(seq)
    assert torch.equal(labels, held["labels"]) and torch.equal(again, codes)
    assert (boxes - held["boxes"]).abs().max() <= 32 / 20 / 2
    x = HELD["src"][:1].clone().requires_grad_()
    logits = made(x, "objects", held["seq"][:, :-1])
    same(logits, held["logits"])
    if not first:
        for target, loss, crops in (("target", "loss", 1), ("target2", "loss2", 2)):
            found = made.object_loss(logits, held[target], held["masks"][:crops])
            count = (held[target] != -100).sum()
            same(sum(found.values())[None] * count, held[loss])
        same(found["render"][None] * count / (5 * 8 * 0.2), held["aux2"])
        (sum(found.values()) * count).backward()
        same(x.grad, held["dx"])
    made.eval()
    found = made.predict(HELD["src"], "objects", size=(40, 36), count=2)
    for i in range(2):
        soft = ("mask",) if made.soft_feed else ()
        written = made.solver.write(HELD["src"].permute(0, 2, 3, 1), "objects", made.objects.plan * 2, soft)
        boxes, labels, codes = made.objects.unpack(written.tokens[i].unflatten(0, (2, 9)))
        theirs = held[f"gen{i}/tokens"].unflatten(0, (2, 9))
        assert torch.equal(labels, theirs[:, -1 if first else 4])
        assert torch.equal(codes, theirs[:, 4:8] if first else theirs[:, 5:])
        same(boxes, theirs[:, :4] * 32 / 20)
        same(written.scores[i], held[f"gen{i}/scores"])
        assert found[i]["masks"].shape == (2, 40, 36) and torch.equal(found[i]["labels"], labels)
        if made.soft:
            own = written.logits["mask"][i].unflatten(0, (2, 4))
            same(own, held[f"gen{i}/mask_logits"])
            drawn = made.mask_vae.decode_soft(own.unflatten(1, (2, 2)))
        else:
            drawn = made.mask_vae.decode(codes.unflatten(1, (2, 2)))
        assert torch.equal(paste_masks(drawn[..., 0], held["boxes"], (40, 36)), held[f"gen{i}/pasted"])


def test_boxes_equal_the_authors():
    made = ait("boxes").eval()
    found = made.predict(HELD["src"], "boxes", count=2)
    for i, one in enumerate(found):
        theirs = HELD[f"boxes/gen{i}/tokens"].unflatten(0, (2, 5))
        assert torch.equal(one["labels"], theirs[:, 4]) and "masks" not in one
        same(one["boxes"], theirs[:, :4] * 32 / 20)
        same(one["scores"], HELD[f"boxes/gen{i}/scores"])


def test_soft_feeding_of_one_hots_is_hard_feeding():
    made = solver("soft")
    codes = torch.randint(6, (3,))
    fed = made.feed("depth", F.one_hot(codes, 6).double())
    assert torch.equal(fed, made.voc_embed[codes + WORDS.ranges["depth"].start])
    # With probabilities near one, what is written softly is what is written hard.
    sharp = copy.deepcopy(made)
    sharp.voc_embed.data.mul_(200)
    x = HELD["src"].permute(0, 2, 3, 1)
    a, b = (sharp.write(x, "depth", ["depth"] * 6, soft) for soft in (("depth",), ()))
    assert torch.equal(a.tokens, b.tokens)


def test_writing_equals_reading_what_was_written():
    """The cache: logits of a step are those of the whole sequence at once."""
    made = solver("hard")
    x = HELD["src"].permute(0, 2, 3, 1)
    plan = ["box"] * 4 + ["class"] + ["mask"] * 4
    written = made.write(x, "objects", plan, soft=())
    logits = made(x, "objects", written.tokens[:, :-1])
    for name in ("box", "class", "mask"):
        at = [i for i, n in enumerate(plan) if n == name]
        same(WORDS.own(name, logits[:, at]), written.logits[name])


def test_only_soft_tokens_carry_a_gradient_of_the_map():
    made = ait("soft").train()
    depth = HELD["depth"][:, 0]
    tokens = made.depth_tokens(depth)
    logits = made(HELD["src"], "depth", tokens[:, :-1])
    made.depth_loss(logits, depth)["silog"].backward()
    assert made.solver.voc_embed.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in made.depth_vae.parameters())
    hard = logits.argmax(-1).clamp(0, 5)
    assert not made.depth_vae.decode(hard.unflatten(1, (2, 2))).requires_grad
    assert not made.depth_vae.training and made.solver.training


def test_scores_outside_a_range_change_nothing_inside():
    made = solver("hard")
    x = HELD["src"].permute(0, 2, 3, 1)
    a = made.write(x, "depth", ["depth"] * 3)
    with torch.no_grad():
        made.outp_bias[: WORDS.ranges["depth"].start] += 100
    b = made.write(x, "depth", ["depth"] * 3)
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.logits["depth"], b.logits["depth"])
    assert (a.tokens >= WORDS.ranges["depth"].start).all()


def test_nucleus_draws_from_the_smallest_set():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(400, 4)
    generator = torch.Generator().manual_seed(0)
    assert set(nucleus(logits, 0.4, generator).tolist()) == {0}
    assert set(nucleus(logits, 0.7, generator).tolist()) == {0, 1}
    state = torch.get_rng_state()
    assert set(nucleus(logits, 0.0).tolist()) == {0}
    assert torch.equal(state, torch.get_rng_state())


# ---- losses and sequences


def test_silog_knows_its_ends():
    d = torch.tensor([[[1.0, 2.0, 0.0]]])
    p = torch.tensor([[[1.0, 1.0, 7.0]]], requires_grad=True)
    expected = math.sqrt(math.log(2) ** 2 / 2 - 0.5 * (math.log(2) / 2) ** 2)
    assert abs(silog(p, d).item() - expected) < 1e-6
    for given, target in ((d.clone(), d), (p, torch.zeros_like(d)), (torch.zeros_like(d), d)):
        q = given.detach().clone().requires_grad_()
        silog(q, target).backward()
        assert q.grad.isfinite().all()
    assert float(dice(torch.ones(2, 3, 3), torch.ones(2, 3, 3))) == 0


def scene(n, labels=True):
    boxes = torch.tensor([[2.0, 2.0, 20.0, 18.0], [8.0, 9.0, 30.0, 30.0]])[:n]
    masks = torch.zeros(n, 32, 32)
    for i, (x1, y1, x2, y2) in enumerate(boxes.int()):
        masks[i, y1:y2, x1:x2] = 1
    return {"boxes": boxes, "labels": torch.tensor([0, 2])[:n], "masks": masks}


def test_sequences_are_filled_with_noise():
    masks = VQVAE(num_codes=5, dim=4, hidden_dim=2, ratio=4)
    made = AiT(Given(), Solver(5, WORDS, 16, 2, 12, 1, 1, (3, 4), 60), None, masks, mask_size=8, norm_val=32)
    generator = torch.Generator().manual_seed(0)
    state = torch.get_rng_state()
    fed, wanted, crops = made.sequences("objects", [scene(2), scene(0)], (32, 32), 6, generator)
    assert torch.equal(state, torch.get_rng_state())
    assert fed.shape == wanted.shape == (2, 54) and crops.shape == (2, 8, 8) and (crops == 1).all()
    objects = wanted.unflatten(1, (6, 9))
    assert (objects[0, :2] != -100).all() and (objects[0, 2:, :4] == -100).all()
    assert (objects[0, 2:, 4] == WORDS.noise).all() and (objects[1, :, 4] == WORDS.noise).all()
    assert sorted((objects[0, :2, 4] - WORDS.ranges["class"].start).tolist()) == [0, 2]
    classes = fed.unflatten(1, (6, 9))[..., 4]
    assert ((classes == WORDS.noise) | ((classes >= 21) & (classes < 24))).all()
    images = torch.randn(2, 5, 2, 3)
    losses = made.loss(images, "objects", [scene(2), scene(0)], 6, torch.Generator().manual_seed(0))
    assert losses.keys() == {"tokens", "render"} and all(v.isfinite() for v in losses.values())
    empty = made.loss(images, "objects", [scene(0), scene(0)], 6)
    assert empty["render"] == 0
    boxes = made.loss(images, "boxes", [scene(1), scene(2)], 4)
    sum(boxes.values()).backward()
    assert boxes.keys() == {"tokens"}


def test_noise_boxes_stay_inside():
    for n in (0, 2):
        boxes, of = noise_boxes(scene(n)["boxes"], (32, 40), 30, torch.Generator().manual_seed(0))
        assert boxes.shape == (30, 4) and (boxes >= 0).all() and (boxes[:, ::2] <= 40).all()
        assert (boxes[:, 1::2] <= 32).all() and (of < max(n, 1)).all() and (n > 0 or (of == -1).all())
        near = boxes[of >= 0] - scene(n)["boxes"][of[of >= 0]] if n else boxes[:0]
        assert (near.abs() <= 0.1 * 22 + 1e-4).all()


def test_boxes_without_an_area_have_no_mask():
    masks = paste_masks(torch.ones(3, 4, 4), torch.tensor([[1.0, 1, 3, 3], [3, 3, 1, 1], [2, 2, 2, 2]]), (5, 6))
    assert masks.flatten(1).sum(1).tolist() == [4, 0, 0]


def test_views_of_depth():
    made = ait("hard").eval()
    made.solver.grid = (3, 4)
    images = HELD["src"][:, :, :, :2]
    plain = made.predict(images, "depth", size=(16, 16))
    flipped = made.predict(images.flip(-1), "depth", size=(16, 16)).flip(-1)
    same(made.predict(images, "depth", size=(16, 16), flip=True), (plain + flipped) / 2)

    class Wide(nn.Module):
        def forward(self, x):
            return F.adaptive_avg_pool2d(x, 2)

    made.backbone = Wide()
    wide = torch.randn(1, 5, 16, 24, dtype=torch.float64)
    both = made.predict(wide, "depth", windows=2)
    left, right = (made.predict(wide[..., s : s + 16], "depth") for s in (0, 8))
    same(both[..., :8], left[..., :8])
    same(both[..., 8:16], (left[..., 8:] + right[..., :8]) / 2)
    same(both[..., 16:], right[..., 8:])


# ---- what users do


def test_copies_modes_and_compilation():
    made = ait("soft").float()
    twin = copy.deepcopy(made)
    made.load_state_dict(twin.state_dict())
    tokens = torch.full((2, 3), 33)
    x = HELD["src"].float()
    plain = made(x, "depth", tokens)
    assert torch.equal(plain, twin(x, "depth", tokens))
    compiled = torch.compile(made.depth_vae, backend="eager")
    maps = HELD["depth"].permute(0, 2, 3, 1).float()
    same(compiled(maps)[0], made.depth_vae(maps)[0], atol=1e-5, rtol=1e-4)
    half = made.bfloat16()
    assert half(x.bfloat16(), "depth", tokens).dtype == torch.bfloat16
    assert half.predict(x.bfloat16(), "depth", size=(16, 16)).dtype == torch.bfloat16
    assert half.predict(x[:0].bfloat16(), "depth", size=(16, 16)).shape == (0, 16, 16)


def test_export_of_the_vqvae_and_the_solver():
    v = vae("vae_depth").float()

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.v = v

        def forward(self, logits):
            return self.v.decode_soft(logits)

    logits = torch.randn(2, 2, 2, 6)
    same(torch.export.export(Both(), (logits,)).module()(logits), v.decode_soft(logits), atol=1e-5)


def test_features_that_are_padding_change_nothing():
    made = solver("soft")
    x = HELD["src"].permute(0, 2, 3, 1).clone()
    valid = ~HELD["pad"]
    tokens = torch.full((2, 3), 33)
    expected = made(x, "depth", tokens, valid)
    x[~valid] = float("nan")
    assert torch.equal(made(x, "depth", tokens, valid), expected)


BAD = [
    (lambda: VQVAE(ratio=6), ValueError, "ratio=6 must be a power of two"),
    (
        lambda: VQVAE(ratio=8).encode(torch.zeros(1, 12, 16, 1)),
        ValueError,
        "x is 12 x 16; its sides must be multiples of ratio=8",
    ),
    (
        lambda: VQVAE(ratio=2).loss(torch.zeros(1, 4, 4, 1), torch.zeros(1, 8, 4, 1)),
        ValueError,
        "target must have the shape of x",
    ),
    (lambda: VQVAE(block="big"), ValueError, "block='big'"),
    (lambda: vae("vae_mask").decode(torch.full((1, 2, 2), 5)), (ValueError, IndexError), "indices.*5"),
    (lambda: nucleus(torch.zeros(3), 0.5), ValueError, r"logits must be .* \(B, K\)"),
    (lambda: nucleus(torch.zeros(1, 3), 1.5), ValueError, "top_p must be"),
    (lambda: hide_patches(torch.zeros(1, 20, 32, 1)), ValueError, "patch=16 must divide both sides"),
    (lambda: VectorQuantizer(4, 3)(torch.zeros(2, 4)), ValueError, "x has 4 channels in its last axis"),
    (lambda: VectorQuantizer(4, 3, decay=1.0), ValueError, "decay"),
    (lambda: VectorQuantizer(4, 3).soft(torch.zeros(2, 3)), ValueError, "num_codes=4"),
    (lambda: Vocabulary(num_bins=0), ValueError, "num_bins"),
    (lambda: Solver(5, WORDS, 18, 2), ValueError, "dim=18 must be a multiple of 4"),
    (lambda: Solver(5, WORDS, 16, 2, grid=5), TypeError, "grid must be a sequence of integers"),
    (lambda: Solver(5, WORDS, 16, 2, grid=(4, 4, 4)), ValueError, r"grid must be \(height, width\)"),
    (lambda: Solver(5, WORDS, 16, 2, grid=(0, 4)), ValueError, r"grid\[0\] must be an integer of at least 1, got 0"),
    (lambda: Solver(5, WORDS, 16, 2, grid=(4, 2.5)), TypeError, r"grid\[1\] must be an integer of at least 1, got 2.5"),
    (lambda: Solver(0, WORDS, 16, 2), ValueError, "in_dim must be an integer of at least 1, got 0"),
    (lambda: Solver(5, WORDS, 16, 2, -1), ValueError, "hidden must be an integer of at least 1, got -1"),
    (lambda: Solver(5, WORDS, 16, 2, 8, -1), ValueError, "encoder_depth must be an integer of at least 0, got -1"),
    (lambda: Solver(5, WORDS, 16, 2, 8, 1, 1.5), TypeError, "decoder_depth must be an integer of at least 0, got 1.5"),
    (lambda: Solver(5, WORDS, 16, 2, drop=2), ValueError, "drop must be .*below 1, got 2"),
    (
        lambda: solver("hard")(torch.zeros(1, 4, 4, 5).double(), "depth", torch.zeros(1, 2).long()),
        ValueError,
        "4 x 4 features, but this solver has places for",
    ),
    (
        lambda: solver("hard")(torch.zeros(1, 2, 2, 5).double(), "deep", torch.zeros(1, 2).long()),
        ValueError,
        "task='deep'",
    ),
    (
        lambda: solver("hard")(torch.zeros(1, 2, 2, 5).double(), "depth", torch.zeros(1, 50).long()),
        ValueError,
        "51 tokens are more than max_length=40",
    ),
    (
        lambda: solver("hard")(torch.zeros(1, 2, 2, 5).double(), "depth", torch.full((1, 2), 99)),
        (ValueError, IndexError),
        "tokens",
    ),
    (lambda: solver("hard").write(torch.zeros(1, 2, 2, 5).double(), "depth", []), ValueError, "plan is empty"),
    (
        lambda: solver("hard").write(torch.zeros(1, 2, 2, 5).double(), "depth", ["deep"]),
        ValueError,
        r"plan\[0\]='deep'",
    ),
    (lambda: AiT(Given(), solver("hard"), vae("vae_mask")), ValueError, "depth_vae has 5 codes"),
    (
        lambda: AiT(Given(), solver("hard"), mask_vae=vae("vae_mask"), mask_size=10),
        ValueError,
        "mask_size=10 must be a multiple",
    ),
    (lambda: AiT(Given(), solver("hard")).predict(HELD["src"], "depth"), ValueError, "has no depth_vae"),
    (lambda: ait("hard").predict(HELD["src"], "depth", size=(20, 16)), ValueError, "size must be of multiples of 8"),
    (
        lambda: ait("hard").loss(HELD["src"], "objects", [{"boxes": torch.zeros(0, 4)}] * 2),
        ValueError,
        r"targets\[0\] has no 'labels'",
    ),
    (
        lambda: ait("hard").loss(HELD["src"], "objects", [scene(2)] * 2, count=1),
        ValueError,
        "2 objects, but a sequence has count=1",
    ),
    (lambda: ObjectTokens(WORDS, 0, 32).pack(torch.zeros(1, 4), torch.tensor([7])), (ValueError, IndexError), "labels"),
    (lambda: silog(torch.ones(1, 2, 2), torch.ones(1, 2, 3)), ValueError, "one shape"),
    (lambda: Solver.convert_state_dict({"foo": torch.zeros(1)}), ValueError, "foo"),
]


@pytest.mark.parametrize("call, kind, says", BAD, ids=range(len(BAD)))
def test_bad_input_is_refused_by_name(call, kind, says):
    with pytest.raises(kind, match=says):
        call()
