"""VMTC's clusters and merged tokens, CMAI's focus and mask: independent oracles, decoding, and their limits."""

import numpy as np
import pytest
import torch

from hooks.models import call_site, dense_attention, language_model, prompt, run, scores

pytest.importorskip("transformers")

import attnlib  # noqa: E402
from attnlib.cache import SnapKV  # noqa: E402
from attnlib.hooks import IMAGE, PAD, TEXT, Intervention, TokenTypes  # noqa: E402
from attnlib.reduce import CMAI, VMTC, VTCCLS, cosine_kmeans, focus, merge_clusters  # noqa: E402
from attnlib.reduce.mergers import cluster_rest  # noqa: E402
from hooks.pictures import COPIES, IMAGE_ID, TOKENS, image_slots, picture_inputs, picture_model, shorter  # noqa: E402

TYPES = TokenTypes(IMAGE_ID)


@pytest.fixture(scope="module")
def model():
    return picture_model()


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


# ---- VMTC


def kmeans_oracle(x, clusters, iterations, first):
    """Plain numpy, token by token, in float64."""
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    centres = [first]
    while len(centres) < clusters:
        best = None
        for j in range(len(x)):
            if j in centres:
                continue
            nearest = max(float(unit[j] @ unit[c]) for c in centres)
            if best is None or nearest < best[0]:
                best = (nearest, j)
        centres.append(best[1])
    centre = unit[centres]
    labels = None
    for _ in range(iterations):
        labels = [int(np.argmax([float(u @ c) for c in centre])) for u in unit]
        centre = np.stack(
            [np.sum([u for u, b in zip(unit, labels, strict=True) if b == c], 0) for c in range(clusters)]
        )
        centre = centre / np.linalg.norm(centre, axis=1, keepdims=True)
    return labels


@pytest.mark.parametrize("clusters", [1, 2, 4])
def test_clusters_equal_an_oracle(clusters):
    torch.manual_seed(clusters)
    x = torch.randn(14, 6, dtype=torch.float64)
    want = kmeans_oracle(x.numpy(), clusters, 10, 3)
    assert cosine_kmeans(x, clusters, 10, 3).tolist() == want
    p = torch.rand(14, dtype=torch.float64)
    merged = merge_clusters(x, torch.tensor(want), p, clusters)
    for c in range(clusters):
        members = [j for j in range(14) if want[j] == c]
        oracle = sum(p[j] * x[j] for j in members) / sum(p[j] for j in members)
        torch.testing.assert_close(merged[c], oracle)


def test_clusters_are_found_where_they_are_planted():
    torch.manual_seed(0)
    directions = torch.eye(3, 8)
    x = directions[[0, 1, 2, 0, 0, 2, 1]] * torch.rand(7, 1).add(0.5) + 0.01 * torch.randn(7, 8)
    labels = cosine_kmeans(x, 3).tolist()
    groups = {tuple(j for j in range(7) if labels[j] == c) for c in range(3)}
    assert groups == {(0, 3, 4), (1, 6), (2, 5)}


def test_identical_tokens_fill_every_cluster_and_merge_to_themselves():
    x = torch.randn(1, 5).expand(9, -1)
    labels = cosine_kmeans(x, 4)
    assert sorted(set(labels.tolist())) == [0, 1, 2, 3]
    stays, places, merged = cluster_rest(x, torch.rand(9), torch.zeros(9, dtype=torch.bool), 4)
    assert stays.sum() == 4 and len(places) == 4
    close(merged, x[:4])
    close(merge_clusters(x, labels, torch.zeros(9), 4), x[:4])


def test_a_merged_token_stands_where_its_most_important_member_stood():
    x = torch.eye(2)[[0, 0, 1, 1, 1]]
    p = torch.tensor([0.1, 0.3, 0.2, 0.5, 0.4])
    stays, places, merged = cluster_rest(x, p, torch.tensor([False, False, False, False, False]), 2)
    assert stays.nonzero().flatten().tolist() == places.tolist() == [1, 3]
    close(merged, torch.eye(2))


def forbidden(model, inputs, hidden_at, keep):
    """The oracle of a merger: new states at the input of the first block, and nobody reads what left."""

    class Edited(Intervention):
        kinds = ("self",)

        def on_block_input(self, site, hidden):
            if site.layer == 0 and site.phase == "prefill":
                return hidden_at(hidden)

        def around_attention(self, site, q, k, v, call):
            stays = torch.ones(len(keep), site.n_keys, dtype=torch.bool)
            stays[:, : keep.shape[1]] = keep
            return call(q, k, v, mask=site.mask.dense() & stays[:, None, None])

    return Edited()


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("space", ["vision", "decoder"])
def test_decoding_equals_merged_states_with_the_rest_forbidden(family, space):
    model = picture_model(family)
    inputs = picture_inputs((1, 2))
    caught = {}
    handle = model.model.multi_modal_projector.register_forward_pre_hook(lambda m, a: caught.update(x=a[0]))
    vmtc = VMTC(keep=4, merge=3, space=space, positions="original")
    with attnlib.attach(model, vmtc, token_types=TYPES) as session:
        got, ids = scores(model, inputs)
    handle.remove()
    p, slots = session.results["vmtc"]["scores"], session.results["vmtc"]["slots"]
    with torch.no_grad():
        tower = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
        projected = model.model.multi_modal_projector(tower)
    image = image_slots(inputs)
    keep, states = ~image, projected.clone()
    stay = torch.zeros(3, TOKENS, dtype=torch.bool)
    for i in range(3):
        order = sorted(range(TOKENS), key=lambda j: -float(p[i, j]))
        stay[i, order[:4]] = True
        rest = [j for j in range(TOKENS) if j not in order[:4]]
        x = (tower if space == "vision" else projected)[i, rest].double()
        labels = kmeans_oracle(x.numpy(), 3, 10, rest.index(order[4]))
        for c in range(3):
            members = [n for n in range(len(rest)) if labels[n] == c]
            w = p[i, [rest[n] for n in members]].double()
            merged = ((w[:, None] * x[members]).sum(0) / w.sum()).float()
            if space == "vision":
                with torch.no_grad():
                    merged = model.model.multi_modal_projector(merged)
            leader = max((rest[n] for n in members), key=lambda j: float(p[i, j]))
            states[i, leader] = merged
            stay[i, leader] = True
    assert (stay.sum(1) == 7).all()
    keep[image] = stay.flatten()

    def put(hidden):
        hidden = hidden.clone()
        hidden[image] = states.reshape(-1, 32)
        return hidden

    with attnlib.attach(model, forbidden(model, inputs, put, keep)):
        want, mine = scores(model, inputs)
    close(got, want)
    assert torch.equal(ids, mine)
    for b in range(2):
        assert [s for s in slots[b].tolist() if s >= 0 and inputs["attention_mask"][b, s]] == (
            (keep[b] & (inputs["attention_mask"][b] == 1)).nonzero().flatten().tolist()
        )


@pytest.mark.parametrize(
    "mode", [pytest.param({"num_beams": 3}, marks=COPIES), {"cache_implementation": "static"}, {"use_cache": False}]
)
def test_every_way_of_decoding(model, mode):
    """Contiguous positions, so the number of tokens is all that the model sees of the removal."""
    inputs = picture_inputs((2, 1))
    with attnlib.attach(model, VMTC(4, 2), token_types=TYPES) as session:
        want, _ = scores(model, inputs)
        got, _ = scores(model, inputs, **mode)
    if "num_beams" in mode:
        close(got[0].log_softmax(-1), want[0].log_softmax(-1).repeat_interleave(3, 0))
    else:
        close(got, want)
    text = int((inputs["attention_mask"][0] == 1).sum()) - 2 * TOKENS
    new = 4 if "use_cache" in mode else 0  # then the prompt was read again with every new token
    assert int(session.results["vmtc"]["tokens"][0, 0]) == text + 2 * 6 + new


def test_keeping_everything_is_the_untouched_model(model):
    inputs = picture_inputs()
    before = scores(model, inputs)
    for keep in (TOKENS, 1.0):
        with attnlib.attach(model, VMTC(keep, 0), token_types=TYPES):
            after = scores(model, inputs)
        assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


def test_a_constant_image_is_one_token(model):
    """All patches alike: whatever is merged equals any of them."""
    inputs = picture_inputs((1,))
    image = image_slots(inputs)

    vmtc = VMTC(0, 1, space="decoder")
    seen = []
    original = vmtc.reduce
    vmtc.reduce = lambda site, hidden, *a: seen.append(
        original(site, hidden.masked_fill(image.unsqueeze(-1), 0.5), *a)
    ) or seen[-1]  # fmt: skip
    with attnlib.attach(model, vmtc, token_types=TYPES), torch.no_grad():
        model(**inputs)
    new, index = seen[0]
    assert index.shape[1] == image.shape[1] - TOKENS + 1
    at = [n for n, s in enumerate(index[0].tolist()) if image[0, s]]
    assert len(at) == 1
    close(new[0, at[0]], torch.full((32,), 0.5))


def test_vmtc_bad_settings_and_use(model):
    with pytest.raises(ValueError, match="merge must be a non-negative integer"):
        VMTC(4, -1)
    with pytest.raises(ValueError, match="space"):
        VMTC(4, 1, space="text")
    with pytest.raises(ValueError, match="iterations"):
        VMTC(4, 1, iterations=0)
    with pytest.raises(ValueError, match="projector='x' is not in"):
        attnlib.attach(model, VMTC(4, 1, projector="x"), token_types=TYPES)
    inputs = picture_inputs()
    with attnlib.attach(model, VMTC(14, 3), token_types=TYPES), pytest.raises(ValueError, match="ask for 17 tokens"):
        model(**inputs)
    with attnlib.attach(model, VTCCLS(8, start=1), VMTC(4, 3), token_types=TYPES):
        with pytest.raises(ValueError, match="give VMTC first"):
            model(**inputs)
    with pytest.raises(ValueError, match="clusters must lie between 1 and the 3 tokens"):
        cosine_kmeans(torch.randn(3, 2), 4)


# ---- CMAI


def scene(batch=2, heads=4, kv_heads=2, n=11, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    q = torch.randn(batch, heads, n, 8, dtype=dtype) * 2
    k, v = (torch.randn(batch, kv_heads, n, 8, dtype=dtype) for _ in range(2))
    types = torch.full((batch, n), TEXT)
    types[:, 3:7] = IMAGE
    types[1, :2] = PAD
    types[1, 5:7] = TEXT
    causal = torch.arange(n) <= torch.arange(n)[:, None]
    allowed = causal & (types != PAD)[:, None, None]
    return q, k, v, types, allowed


def cmai_oracle(q, k, v, types, allowed, threshold, rule, per_head=False):
    """Row by row in float64: F, its low entries, and a second softmax."""
    _, a = dense_attention(q, k, v, allowed)
    groups = [[h] for h in range(q.shape[1])] if per_head else [list(range(q.shape[1]))]
    blocked = torch.zeros(allowed.shape[0], q.shape[1], *allowed.shape[2:], dtype=torch.bool)
    for b in range(q.shape[0]):
        text = [t for t in range(q.shape[2]) if types[b, t] == TEXT]
        image = [j for j in range(q.shape[2]) if types[b, j] == IMAGE]
        for heads in groups:
            m = a[b, heads].mean(0)
            for t in text:
                seen = [j for j in image if j <= t]
                if not seen:
                    continue
                f = np.array([sum(float(m[t, s] * m[s, j]) for s in text if s <= t) for j in seen])
                limit = {"mean": threshold * f.mean(), "value": threshold}.get(rule)
                limit = np.quantile(f, threshold) if limit is None else limit
                for j, value in zip(seen, f, strict=True):
                    if value < limit:
                        blocked[b, heads, t, j] = True
    return dense_attention(q, k, v, allowed & ~blocked)[0], blocked


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("threshold, rule", [(0.5, "quantile"), (0.8, "mean"), (0.05, "value"), (1.0, "quantile")])
def test_focus_mask_and_output_equal_an_oracle(threshold, rule, per_head):
    q, k, v, types, allowed = scene()
    site = call_site(q, k, types=types, allowed=allowed)
    out = run(CMAI(threshold, rule, per_head=per_head), site, q, k, v)
    want, blocked = cmai_oracle(q, k, v, types, allowed, threshold, rule, per_head)
    assert blocked.any() and not blocked[..., types[0] == TEXT, :][0].all()
    real = (types != PAD)[:, None, :, None].expand_as(out)
    torch.testing.assert_close(out[real], want[real], atol=1e-10, rtol=1e-8)


def test_focus_of_the_identity_is_plain_thresholding():
    a = torch.rand(3, 5, 4)
    assert torch.equal(focus(torch.eye(5).expand(3, -1, -1), a), a)


def test_zero_threshold_changes_nothing_and_a_huge_one_hides_the_image():
    q, k, v, types, allowed = scene()
    site = call_site(q, k, types=types, allowed=allowed)
    plain = dense_attention(q, k, v, allowed)[0]
    assert CMAI(0.0).identity and CMAI(0.0, "mean").identity
    for rule in ("quantile", "mean", "value"):
        assert torch.equal(run(CMAI(0.0, rule), site, q, k, v), plain)
    hidden = run(CMAI(9.0, "value"), site, q, k, v)
    text, image = types == TEXT, types == IMAGE
    without = allowed & ~(text[:, None, :, None] & image[:, None, None])
    want = dense_attention(q, k, v, without)[0]
    torch.testing.assert_close(hidden, want, atol=1e-10, rtol=1e-8)


def test_rows_stay_normalised_and_turn_to_text():
    q, k, v, types, allowed = scene()
    site = call_site(q, k, types=types, allowed=allowed)
    eye = torch.eye(11, dtype=torch.float64).expand(2, 2, -1, -1)
    after = run(CMAI(0.5), site, q, k, eye)
    _, before = dense_attention(q, k, eye, allowed)
    real = types != PAD
    torch.testing.assert_close(after.sum(-1)[real[:, None].expand(-1, 4, -1)],
                               torch.ones(int(real.sum()) * 4, dtype=torch.float64))  # fmt: skip
    changed = ((after - before).abs() > 1e-12).any(-1).any(1)
    assert changed.any() and not changed[types == IMAGE].any()
    for b, t in changed.nonzero().tolist():
        text = types[b] == TEXT
        assert (after[b, :, t, text].sum(-1) >= before[b, :, t, text].sum(-1)).all()


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("mode", [{}, pytest.param({"num_beams": 3}, marks=COPIES), {"cache_implementation": "static"}])
def test_decoding_equals_reading_everything_again(family, mode):
    """Without a cache every step recomputes the focus of all rows; with one it is remembered."""
    model = picture_model(family)
    inputs = picture_inputs((1, 2))
    with attnlib.attach(model, CMAI(0.5), token_types=TYPES) as session:
        want, ids = scores(model, inputs, use_cache=False, **{k: v for k, v in mode.items() if k == "num_beams"})
        got, mine = scores(model, inputs, **mode)
    close(got, want)
    assert torch.equal(ids, mine)
    assert all(0.1 < share < 0.6 for share in session.results["cmai"]["blocked"].values())
    assert (
        not torch.allclose(scores(model, inputs)[0], scores(model, inputs, **mode)[0][:, : len(ids)], atol=0)
        or not mode
    )


def test_a_padded_batch_gives_what_its_prompts_give_alone(model):
    inputs = picture_inputs((1, 2))
    with attnlib.attach(model, CMAI(0.5), token_types=TYPES):
        both, _ = scores(model, inputs)
        n = int(inputs["attention_mask"][0].sum())
        alone = {k: v[:1, -n:] for k, v in inputs.items() if k != "pixel_values"}
        one, _ = scores(model, {**alone, "pixel_values": inputs["pixel_values"][:1]})
    close(both[:, 0], one[:, 0], atol=1e-5)


def test_behind_a_removal(model):
    """VMTC and CMAI together, as the paper has them."""
    inputs = picture_inputs((1, 2))
    with attnlib.attach(model, VMTC(5, 2), CMAI(0.5), token_types=TYPES) as session:
        want, _ = scores(model, inputs, use_cache=False)
        got, _ = scores(model, inputs)
    close(got, want)
    assert session.results["vmtc"]["saved"] > 0.2 and all(v > 0 for v in session.results["cmai"]["blocked"].values())


@pytest.mark.parametrize("mode", [{}, pytest.param({"num_beams": 2}, marks=COPIES), {"cache_implementation": "static"}])
def test_behind_a_removal_equals_a_shorter_prompt(model, mode):
    inputs = picture_inputs((1, 2))
    vtc = VTCCLS(6, start=1)
    with attnlib.attach(model, vtc, CMAI(0.5), token_types=TYPES) as session:
        got, _ = scores(model, inputs, **mode)
        with torch.no_grad():
            model(**inputs)
        slots = session.results["vtc-cls"]["slots"]
    keep = torch.zeros_like(image_slots(inputs))
    for b in range(2):
        keep[b, slots[b][slots[b] >= 0]] = True
    short = shorter(model, inputs, keep)
    types = torch.full(short["attention_mask"].shape, PAD)
    whole = TYPES(inputs["input_ids"])
    for b in range(2):
        left = whole[b, keep[b] & (inputs["attention_mask"][b] == 1)]
        types[b, types.shape[1] - len(left) :] = left
    types = types.repeat_interleave(mode.get("num_beams", 1), 0)
    with attnlib.attach(model, CMAI(0.5), token_types=types):
        want, _ = scores(model, short, **mode)
    close(got, want)


def test_identity_and_image_free_prompts(model):
    for inputs, cmai in ((picture_inputs(), CMAI(0.0)), (picture_inputs((0, 0)), CMAI(0.5))):
        before = scores(model, inputs)
        with attnlib.attach(model, cmai, token_types=TYPES):
            after = scores(model, inputs)
        assert torch.equal(before[0], after[0])
    text = language_model()
    before, _ = scores(text, prompt())
    with attnlib.attach(text, CMAI(0.5), token_types=TYPES):
        assert torch.equal(scores(text, prompt())[0], before)


def test_cmai_bad_settings_and_use(model):
    with pytest.raises(ValueError, match="threshold"):
        CMAI(-0.1)
    with pytest.raises(ValueError, match="at most 1 as a quantile"):
        CMAI(1.5)
    with pytest.raises(ValueError, match="rule"):
        CMAI(0.5, "median")
    with pytest.raises(ValueError, match="layer 7 does not exist"):
        attnlib.attach(model, CMAI(0.5, layers=[7]), token_types=TYPES)
    with pytest.raises(ValueError, match="token_types"):
        attnlib.attach(model, CMAI(0.5))
    with pytest.raises(ValueError, match="compressed cache lost some"):
        attnlib.attach(model, CMAI(0.5), SnapKV(ratio=0.5), token_types=TYPES)
    inputs = picture_inputs()
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    types = torch.cat([TYPES(inputs["input_ids"]), torch.full((2, 1), TEXT)], 1)
    with attnlib.attach(model, CMAI(0.5), token_types=types), pytest.raises(ValueError, match="not read inside"):
        model(input_ids=torch.full((2, 1), 5), past_key_values=cache)
