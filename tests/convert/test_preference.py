"""Preference losses: held to trl, to the authors of Re-Align and OPA-DPO, and to what the papers say."""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from parity import HERE
from safetensors import safe_open

from attnlib.convert import preference
from attnlib.convert.preference import Anchor, Imitation, Read, Recipe, Side, Term, dpo, opa_dpo, rdpo

LOG2 = math.log(2)
EXACT = dict(rtol=1e-10, atol=1e-12)


def held(slug):
    with safe_open(HERE / f"{slug}.safetensors", "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, f.metadata()  # noqa: SIM118


def under(tensors, prefix):
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_logs(recipe, valid, seed=0):
    return {r: -numbers(*valid[r.response].shape, seed=seed + i).abs() for i, r in enumerate(recipe.reads)}


VALID = {
    "chosen": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool(),
    "rejected": torch.tensor([[1, 1, 0], [1, 0, 0]]).bool(),
    "standard": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool(),
}
NAMED = [dpo(), dpo(reduction="token"), rdpo(), opa_dpo(), opa_dpo(reduction="sequence"), opa_dpo(compat="authors")]


# --------------------------------------------------------------------------------------------------------------------
# Held to others


def test_dpo_equals_trl():
    hf = pytest.importorskip("transformers")
    tensors, meta = held("trl-dpo")
    models = []
    for name in ("policy/", "reference/"):
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**json.loads(meta["config"])))
        model.load_state_dict(under(tensors, name))
        models.append(model.double())
    ids, mask, answer = (tensors[k] for k in ("input_ids", "attention_mask", "completion_mask"))
    half = len(ids) // 2
    pairs = []
    for i in range(half):
        rows = [(ids[k][mask[k].bool()], answer[k][mask[k].bool()].bool()) for k in (i, half + i)]
        assert rows[0][0][~rows[0][1]].equal(rows[1][0][~rows[1][1]])
        pairs.append({"input_ids": rows[0][0][~rows[0][1]], "chosen": rows[0][0][rows[0][1]],
                      "rejected": rows[1][0][rows[1][1]]})  # fmt: skip
    policy, reference = models
    made, recipe = preference.to_pairs(pairs, dpo(0.1))
    batch = preference.Collator(recipe, pad=28)(made)
    with torch.no_grad():
        frozen = preference.read_batch(reference, recipe, batch)
    loss = recipe.loss(preference.read_batch(policy, recipe, batch), frozen, batch["valid"]).total
    loss.backward()
    torch.testing.assert_close(loss.detach(), tensors["loss"], rtol=1e-7, atol=1e-7)
    found = dict(policy.named_parameters())
    for name, grad in under(tensors, "grad/").items():
        torch.testing.assert_close(found[name].grad, grad, rtol=1e-7, atol=1e-7)
    # Re-Align without its second term is the same.
    with torch.no_grad():
        again, short = preference.to_pairs(pairs, rdpo(0.1).without("image"))
        batch = preference.Collator(short, pad=28)(again)
        both = [preference.read_batch(m, short, batch) for m in models]
        torch.testing.assert_close(short.loss(*both, batch["valid"]).total, tensors["loss"], rtol=1e-7, atol=1e-7)


class Toy(torch.nn.Module):
    """The recorded toy model: every logit depends on the image, or on none of it."""

    def __init__(self, weights):
        super().__init__()
        for name, value in weights.items():
            setattr(self, name, torch.nn.Parameter(value.clone()))

    def forward(self, input_ids, attention_mask=None, pixel_values=None, use_cache=None):
        h = self.emb[input_ids] * (1 + pixel_values @ self.see)[:, None]
        return type("Out", (), {"logits": h.cumsum(1) @ self.out})


def toy_pairs(t):
    made = []
    for i in range(3):
        spoken = {}
        for name in ("chosen", "rejected"):
            here = t[f"{name}/labels"][i] != -100
            prompt = t[f"{name}/ids"][i][: int(here.nonzero()[0])]
            spoken[name] = t[f"{name}/ids"][i][here]
        made.append({"input_ids": prompt, "pixel_values": t["images"][i : i + 1],
                     "retrieved": t["retrieved"][i : i + 1],
                     **spoken})  # fmt: skip
    return made


def run_toy(recipe, t, pairs=None):
    policy, reference = Toy(under(t, "policy/")), Toy(under(t, "reference/"))
    made, recipe = preference.to_pairs(pairs or toy_pairs(t), recipe)
    batch = preference.Collator(recipe)(made)
    with torch.no_grad():
        frozen = preference.read_batch(reference, recipe, batch)
    losses = recipe.loss(preference.read_batch(policy, recipe, batch), frozen, batch["valid"])
    losses.total.backward()
    return losses, policy


@pytest.mark.parametrize(("rejected", "prefix"), [("argmax_other", ""), ("label", "labels/")])
def test_rdpo_equals_the_authors(rejected, prefix):
    t, _ = held("re-align-rdpo")
    losses, policy = run_toy(rdpo(rejected=rejected), t)
    torch.testing.assert_close(losses.total.detach(), t[f"{prefix}loss"], **EXACT)
    for name, grad in under(t, f"{prefix}grad/").items():
        torch.testing.assert_close(getattr(policy, name).grad, grad, **EXACT)
    if rejected == "argmax_other":
        for name, read in {
            "chosen": Read("chosen"), "rejected": Read("rejected", tokens=rejected),
            "imageless_chosen": Read("chosen", "retrieved", rejected),
        }.items():  # fmt: skip
            torch.testing.assert_close(losses.rewards[read].mean(), t[f"rewards/{name}"], **EXACT)


OPA = {
    "release": {}, "plain-weights": {}, "no-copo": dict(image_coefficient=0.0),
    "no-anchor": dict(anchor_coefficient=0.0),
    "square": dict(anchor_kind="square", anchor=0.1), "shifted": dict(anchor=0.2, label_smoothing=0.1),
    "js": dict(divergence="js"), "alpha": dict(divergence="alpha"), "free": {},
}  # fmt: skip


@pytest.mark.parametrize("case", OPA)
def test_opa_dpo_equals_the_authors(case):
    t, _ = held("opa-dpo")
    recipe = opa_dpo(image="masked", compat="authors", padded_to=7, **OPA[case])
    if case == "free":
        recipe = dataclasses.replace(recipe, reference_free=True)
    names = {Read("standard"): "standard", Read("chosen"): "revised", Read("rejected"): "original",
             Read("standard", "masked"): "standard_masked", Read("chosen", "masked"): "revised_masked"}  # fmt: skip
    names = {read: name for read, name in names.items() if read in recipe.reads}
    leaf = {name: t[f"policy/{name}"].clone().requires_grad_() for name in names.values()}
    valid = {"standard": t["valid/standard"], "chosen": t["valid/revised"], "rejected": t["valid/original"]}
    weights = {("severity", "chosen"): t["weights/severity/revised"], ("image", "chosen"): t["weights/image/revised"],
               ("severity", "rejected"): t["weights/severity/original"]}  # fmt: skip
    losses = recipe.loss(
        {read: leaf[name] for read, name in names.items()}, {r: t[f"reference/{n}"] for r, n in names.items()}, valid,
        {} if case == "plain-weights" else weights,
    )  # fmt: skip
    losses.total.backward()
    # Without masked images the release still adds the anchors of their rewards, which are zero.
    constant = 2 * LOG2 if case == "no-copo" else 0.0
    torch.testing.assert_close(losses.total.detach() + constant, t[f"{case}/loss"], **EXACT)
    for name, grad in under(t, f"{case}/grad/").items():
        exists = t[f"valid/{name.split('_')[0]}"]  # their policy multiplies by the mask, which was not recorded
        torch.testing.assert_close(leaf[name].grad, grad * exists, **EXACT)
    for ours, theirs in {"standard": "stand_gen", "revised": "AI_gen", "standard-image": "stand_mask",
                         "revised-image": "AI_mask"}.items():  # fmt: skip
        if ours in losses.parts:
            torch.testing.assert_close(losses.parts[ours].detach(), t[f"{case}/loss/{theirs}"], **EXACT)


def test_masked_images_equal_the_authors():
    t, _ = held("opa-dpo")
    image = t["image"].float()

    def drawn():
        return torch.Generator().manual_seed(5)

    assert preference.mask_pixels(image, 0.3, drawn()).equal(t["masked/random"])
    assert preference.mask_blocks(image, 0.3, 14, drawn()).equal(t["masked/blockwise"])
    about, generator = preference.About((7,)), drawn()
    prompt = {"input_ids": torch.full((16,), 7), "attention_mask": torch.ones(16, dtype=torch.long)}
    rows = [preference.MaskedAttention(0.3)(prompt, about, generator)["attention_mask"] for _ in range(2)]
    assert torch.stack(rows).bool().equal(t["masked/attention"])


# --------------------------------------------------------------------------------------------------------------------
# What the papers say


@pytest.mark.parametrize("recipe", NAMED)
def test_policy_equal_to_reference_gives_log_2_per_term(recipe):
    logs = random_logs(recipe, VALID)
    losses = recipe.loss(logs, logs, VALID)
    for part in (*recipe.terms, *recipe.anchors):
        assert losses.parts[part.name] == pytest.approx(LOG2, abs=1e-15)
    assert float(losses.total) == pytest.approx(LOG2 * sum(p.coefficient for p in recipe.parts), abs=1e-12)
    single = {r: v.float() for r, v in logs.items()}
    assert recipe.loss(single, single, VALID).parts[recipe.terms[0].name] == -F.logsigmoid(torch.zeros(()))
    assert all(not r.any() for r in losses.rewards.values())


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_swapping_sides_negates_and_gradients_point_the_right_way(reduction):
    a, b = Side("chosen"), Side("rejected")
    forth, back = (Recipe((Term("t", *s),), reduction=reduction) for s in ((a, b), (b, a)))
    logs, frozen = random_logs(forth, VALID), random_logs(forth, VALID, 9)
    if reduction == "sequence":
        for i in range(2):  # softplus(-x) - softplus(x) = -x
            one = [{r: v[i : i + 1] for r, v in d.items()} for d in (logs, frozen)]
            valid = {k: v[i : i + 1] for k, v in VALID.items()}
            ratio = {r: ((one[0][r] - one[1][r]) * valid[r.response]).sum() for r in forth.reads}
            margin = 0.1 * (ratio[a.read] - ratio[b.read])
            torch.testing.assert_close(forth.loss(*one, valid).total - back.loss(*one, valid).total, -margin)
    leaf = {r: v.clone().requires_grad_() for r, v in logs.items()}
    forth.loss(leaf, frozen, VALID).total.backward()
    assert (leaf[a.read].grad[VALID["chosen"]] < 0).all() and (leaf[b.read].grad[VALID["rejected"]] > 0).all()


@pytest.mark.parametrize("recipe", NAMED)
def test_padding_has_no_gradient_and_no_value(recipe):
    frozen = random_logs(recipe, VALID, 5)
    leaf = {r: v.clone().requires_grad_() for r, v in random_logs(recipe, VALID).items()}
    losses = recipe.loss(leaf, frozen, VALID)
    losses.total.backward()
    for read, value in leaf.items():
        assert not value.grad[~VALID[read.response]].any() and value.grad[VALID[read.response]].all()
    junk = {r: v.detach().masked_fill(~VALID[r.response], float("nan")) for r, v in leaf.items()}
    assert recipe.loss(junk, frozen, VALID).total.equal(losses.total.detach())


def test_reductions_agree_for_one_token():
    valid = {
        "chosen": torch.ones(3, 1).bool(),
        "rejected": torch.ones(3, 1).bool(),
        "standard": torch.ones(3, 1).bool(),
    }
    for make in (dpo, opa_dpo):
        one, other = make(reduction="sequence"), make(reduction="token")
        logs, frozen = random_logs(one, valid), random_logs(one, valid, 9)
        torch.testing.assert_close(one.loss(logs, frozen, valid).total, other.loss(logs, frozen, valid).total)


def test_the_same_image_twice_gives_a_constant_and_a_model_that_ignores_it_no_gradient():
    t, _ = held("re-align-rdpo")
    same = [{**p, "retrieved": p["pixel_values"]} for p in toy_pairs(t)]
    losses, policy = run_toy(rdpo().without("text"), t, same)
    assert losses.total.item() == pytest.approx(LOG2, abs=1e-14)
    assert all(p.grad.abs().max() < 1e-12 for p in policy.parameters())
    blind = {
        **t,
        "policy/see": torch.zeros_like(t["policy/see"]),
        "reference/see": torch.zeros_like(t["reference/see"]),
    }
    losses, policy = run_toy(rdpo().without("text"), blind)
    assert losses.total.item() == pytest.approx(LOG2, abs=1e-14) and policy.out.grad.abs().max() < 1e-12


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_masked_pixels_are_so_many_and_the_rest_is_untouched(ratio):
    image = torch.randn(2, 3, 10, 11)
    before = image.clone()
    out = preference.mask_pixels(image, ratio, torch.Generator().manual_seed(0))
    assert image.equal(before)
    for x, y in zip(image, out, strict=True):
        changed = (x != y).any(0)
        assert int(changed.sum()) == int(ratio * 110) and (y[:, changed] == x.mean()).all()
    blocks = preference.mask_blocks(image, ratio, 5, torch.Generator().manual_seed(0))
    assert int((blocks != image).any(1)[0].sum()) == int(ratio * 4) * 25
    assert blocks[..., 10:].equal(image[..., 10:])
    patches = torch.randn(6, 3 * 2 * 4 * 4)
    pixels = preference.mask_patches(patches, (3, 2, 4, 4), ratio, False, torch.Generator().manual_seed(0))
    assert (
        int((pixels != patches).view(6, 6, 16).all(1).sum()) == int(ratio * 96) == int((pixels != patches).sum()) // 6
    )
    whole = preference.mask_patches(patches, (3, 2, 4, 4), ratio, True, torch.Generator().manual_seed(0))
    assert int((whole != patches).all(1).sum()) == int(ratio * 6)


def test_a_likely_answer_is_learned_and_an_unlikely_one_is_not():
    """The paper's claim on a bigram policy: the reference holds an answer at 1e-8 down, imitation lifts it first."""
    V, chosen, rejected = 6, [1, 2, 3], [1, 4, 5]

    def logs(table, ids):
        rows = table.log_softmax(-1)
        return torch.stack([rows[a, b] for a, b in zip([0, *ids[:-1]], ids, strict=True)])[None]

    def after(table, reference):
        table = table.clone().requires_grad_()
        optim = torch.optim.SGD([table], lr=0.5)
        recipe = dpo()
        valid = {"chosen": torch.ones(1, 3).bool(), "rejected": torch.ones(1, 3).bool()}
        frozen = {Read("chosen"): logs(reference, chosen), Read("rejected"): logs(reference, rejected)}
        start = logs(table, chosen).sum().exp().item()
        for _ in range(60):
            optim.zero_grad()
            now = {Read("chosen"): logs(table, chosen), Read("rejected"): logs(table, rejected)}
            recipe.loss(now, frozen, valid).total.backward()
            optim.step()
        return logs(table, chosen).sum().exp().item() - start

    off = torch.zeros(V, V, dtype=torch.float64)
    off[1, 2], off[0, 1], off[1, 4], off[4, 5] = -18.0, 4.0, 4.0, 4.0
    assert logs(off, chosen).sum().exp() < 1e-8
    learned = off.clone().requires_grad_()
    optim = torch.optim.SGD([learned], lr=1.0)
    for _ in range(25):
        optim.zero_grad()
        (-logs(learned, chosen).mean()).backward()
        optim.step()
    learned = learned.detach()
    assert after(learned, learned) > 1000 * max(after(off, off), 1e-12)


def test_anchors_have_the_sign_that_is_asked():
    for sign in (1, -1):
        recipe = Recipe(anchors=[Anchor("a", Side("chosen"), sign)])
        leaf = {Read("chosen"): torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)}
        recipe.loss(leaf, random_logs(recipe, VALID), VALID).total.backward()
        assert (leaf[Read("chosen")].grad[VALID["chosen"]] * -sign > 0).all()
    signs = [a.sign for a in opa_dpo(anchor_signs=(1, 1, 1, 1)).anchors]
    assert signs == [1, 1, 1, 1] and [a.sign for a in opa_dpo().anchors] == [1, -1, 1, -1]


def test_shared_reads_are_asked_once():
    assert len(rdpo().reads) == 3 and len(opa_dpo().reads) == 5 and len(dpo().reads) == 2
    calls = []
    t, _ = held("re-align-rdpo")
    made, recipe = preference.to_pairs(toy_pairs(t), rdpo())
    model = Toy(under(t, "policy/"))
    model.register_forward_pre_hook(lambda m, a, k: calls.append(len(k["input_ids"])), with_kwargs=True)
    preference.read_batch(model, recipe, preference.Collator(recipe)(made))
    assert calls == [6, 3]  # chosen and rejected under the image, chosen under the other


def test_imitation_is_cross_entropy():
    recipe = Recipe(imitations=[Imitation("chosen", 2.0)])
    logs = random_logs(recipe, VALID)
    losses = recipe.loss(logs, None, VALID)
    torch.testing.assert_close(losses.total, -2 * logs[Read("chosen")][VALID["chosen"]].mean())


def test_half_precision_is_compared_in_single():
    recipe = dpo()
    logs = {r: v.bfloat16() for r, v in random_logs(recipe, VALID).items()}
    assert recipe.loss(logs, {r: v * 2 for r, v in logs.items()}, VALID).total.dtype == torch.float32


# --------------------------------------------------------------------------------------------------------------------
# Refused


def text(**more):
    return {"input_ids": [3, 4], "chosen": [5, 6], "rejected": [7], **more}


@pytest.mark.parametrize(
    ("pairs", "recipe", "message"),
    [
        ([], "dpo", "pairs is empty"),
        ([text(chosen=[7])], "dpo", "equals the rejected one"),
        ([text(chosen=[])], "dpo", "'chosen' of pairs.0. is empty"),
        ([text(chosen=[64])], "dpo", "below 64"),
        ([text(chosen=[-100, 5])], "dpo", "at least 0"),
        ([{"input_ids": [3], "chosen": [4]}], "dpo", "lacks the response 'rejected'"),
        ([text()], "rdpo", "lacks the image 'retrieved'"),
        ([text(standard=[4]), text()], "opa-dpo", "pairs.1. lacks the response 'standard'"),
        ([text(weights={"severity": {"chosen": [1.0]}})], "opa-dpo", "hold 1 numbers for 'chosen'"),
        ([text(weights={"severity": {"chosen": [1.0, float("nan")]}})], "opa-dpo", "must be finite"),
        ([text(input_ids=[[3], [4]])], "dpo", "one prompt"),
        ([text(attention_mask=[0, 0])], "dpo", "leaves no token"),
        ([{"chosen": [4], "rejected": [5]}], "dpo", "holds no input_ids"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "dpo", "needs processor="),
    ],
)
def test_bad_pairs_are_refused(pairs, recipe, message):
    with pytest.raises(ValueError, match=message):
        preference.to_pairs(pairs, preference.get_recipe(recipe), vocabulary=64)


def test_bad_recipes_are_refused():
    with pytest.raises(ValueError, match="opa-dpo"):
        preference.get_recipe("opa")
    with pytest.raises(ValueError, match="read the same"):
        Term("t", Side("chosen"), Side("chosen"))
    with pytest.raises(ValueError, match="names of their own"):
        Recipe(terms=[*dpo().terms, *dpo().terms])
    with pytest.raises(ValueError, match="needs a term"):
        Recipe()
    with pytest.raises(ValueError, match="four signs"):
        opa_dpo(anchor_signs=(1, 1))
    with pytest.raises(ValueError, match="sign=0"):
        opa_dpo(anchor_signs=(1, 0, 1, 1))
    for name, value in {"beta": 0.0, "label_smoothing": 0.5, "reduction": "mean"}.items():
        with pytest.raises(ValueError, match=name):
            dpo(**{name: value})
    with pytest.raises(ValueError, match="padded_to=2"):
        recipe = opa_dpo(compat="authors", padded_to=2)
        recipe.loss(random_logs(recipe, VALID), random_logs(recipe, VALID), VALID)
    with pytest.raises(ValueError, match="reference"):
        dpo().loss(random_logs(dpo(), VALID), None, VALID)
    with pytest.raises(ValueError, match="lacks the log-prob"):
        dpo().loss({}, {}, VALID)
    with pytest.raises(TypeError, match="text, which needs processor"):
        preference.to_pairs([text(chosen="a")], dpo())
    with pytest.raises(TypeError, match="pairs must be a list"):
        preference.to_pairs(text(), dpo())
