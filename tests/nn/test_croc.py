"""Croc: pool of prompt tokens, mixed mask, reconstruction head and objective, held to the authors' lines."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from parity import Fixture
from safetensors.torch import load_file

from attnlib.nn.multimodal.croc import CrocPretraining, PromptTokenPool, ReconstructionHead, mixed_mask

sys.path.insert(0, str(Path(__file__).parents[1]))
RECORDED = load_file(Path(__file__).parents[1] / "fixtures" / "croc.safetensors")
OPTIONS = Fixture("croc-options")


def _pool(**settings):
    pool = PromptTokenPool(16, 7, **settings)
    with torch.no_grad():
        pool.entries.copy_(RECORDED["pool/entries"])
    return pool


def test_replacement_equals_the_authors():
    out = _pool()(RECORDED["pool/x"], RECORDED["pool/chosen"])
    assert torch.equal(out.tokens, RECORDED["pool/y"])


def test_reconstruction_head_equals_the_authors():
    head = ReconstructionHead(16, 9, head_dim=8).eval()
    theirs = {k[8:]: v for k, v in RECORDED.items() if k.startswith("head/sd/")}
    head.load_state_dict(ReconstructionHead.convert_state_dict(theirs))
    x = RECORDED["head/x"].clone().requires_grad_()
    y = head(x)
    torch.testing.assert_close(y, RECORDED["head/y"], rtol=1e-5, atol=1e-5)
    (y * RECORDED["head/g"]).sum().backward()
    torch.testing.assert_close(x.grad, RECORDED["head/dx"], rtol=1e-5, atol=1e-5)
    for name, grad in (
        ("resize.weight", head.out.weight.grad),
        ("query", head.layers.layers[0].self_attn.in_proj_weight.grad[:16]),
        ("pos", head.positions.weight.grad),
    ):
        torch.testing.assert_close(grad, RECORDED[f"head/dw/{name}"], rtol=1e-5, atol=2e-5)


def test_two_layers_and_another_width_equal_the_authors():
    head = ReconstructionHead(**OPTIONS.config["deep"]).eval()
    head.load_state_dict(ReconstructionHead.convert_state_dict(OPTIONS.under("deep/sd")))
    x = OPTIONS.tensors["deep/x/x"].clone().requires_grad_()
    y = head(x)
    torch.testing.assert_close(y, OPTIONS.tensors["deep/y"], rtol=1e-5, atol=1e-5)
    (y * OPTIONS.tensors["deep/g"]).sum().backward()
    torch.testing.assert_close(x.grad, OPTIONS.tensors["deep/dx/x"], rtol=1e-5, atol=1e-5)
    theirs = ReconstructionHead.convert_state_dict(OPTIONS.under("deep/dw"))
    assert set(theirs) == {name for name, _ in head.named_parameters()}
    for name, expected in theirs.items():
        torch.testing.assert_close(head.get_parameter(name).grad, expected, rtol=1e-5, atol=1e-5)


def test_the_authors_mask_opens_padding_and_samples_without_labels():
    labels, valid = OPTIONS.tensors["mask/labels"], OPTIONS.tensors["mask/valid"].bool()
    theirs = OPTIONS.tensors["mask/allowed"]
    assert torch.equal(mixed_mask(labels, valid, compat="authors"), theirs)
    ours = mixed_mask(labels, valid)
    assert not bool((ours & ~valid[:, None, None]).any()) and bool((theirs & ~valid[:, None, None]).any())
    assert torch.equal(ours[3], theirs[3]) and torch.equal(ours[1], theirs[1])  # padding on the right, and none


def test_as_many_tokens_are_replaced_as_by_the_authors():
    for key, count in OPTIONS.tensors.items():
        if key.startswith("count/"):
            n = int(key[6:])
            assert PromptTokenPool(4, 3).choose(torch.zeros(3, n, 4)).sum(1).tolist() == [int(count)] * 3
    assert PromptTokenPool(4, 3, keep=0.29).choose(torch.zeros(1, 100, 4)).sum() == 71


def test_mask_and_reconstruction_loss_equal_the_authors():
    labels, valid = RECORDED["mask/labels"], RECORDED["mask/valid"]
    assert torch.equal(mixed_mask(labels, valid), RECORDED["mask/allowed"])
    loss = F.smooth_l1_loss(RECORDED["loss/a"], RECORDED["loss/b"], beta=0.01) * 10
    torch.testing.assert_close(loss, RECORDED["loss/y"])


def test_mask_pair_by_pair_hides_padding_and_keeps_samples_without_labels_causal():
    labels = torch.full((3, 7), -100)
    labels[0, 4:6], labels[1, 2:] = 1, 1
    valid = torch.ones(3, 7, dtype=torch.bool)
    valid[0, :2] = False
    got = mixed_mask(labels, valid)
    for b, first in enumerate((4, 2, 0)):
        for q in range(7):
            for k in range(7):
                assert bool(got[b, 0, q, k]) == (bool(valid[b, k]) and (k < first or k <= q)), (b, q, k)


def test_three_quarters_are_replaced_by_rows_of_the_pool():
    pool, x = PromptTokenPool(8, 50), torch.randn(3, 576, 8)
    out = pool(x, generator=torch.Generator().manual_seed(0))
    assert out.chosen.sum(1).tolist() == [432] * 3
    assert torch.equal(out.tokens[~out.chosen], x[~out.chosen])
    assert torch.equal(out.tokens[out.chosen], pool.entries[out.entries.flatten()])
    assert not torch.equal(out.chosen[0], out.chosen[1])
    again = pool(x, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.chosen, out.chosen)


def test_hungarian_assignment_is_distinct_and_best():
    pytest.importorskip("scipy")
    pool, nearest = _pool(assignment="hungarian"), _pool()
    x, chosen = RECORDED["pool/x"], RECORDED["pool/chosen"]
    best = pool(x, chosen).entries
    assert all(len(set(row.tolist())) == 6 for row in best)

    def cost(entries):
        return [float((x[b][chosen[b]] - pool.entries[entries[b]].detach()).norm(dim=1).sum()) for b in range(2)]

    greedy = torch.stack([_first_free(x[b][chosen[b]], pool.entries) for b in range(2)])
    assert all(a <= b + 1e-6 for a, b in zip(cost(best), cost(greedy), strict=True))
    near = pool.entries[[3, 0, 5, 1, 6, 2]].detach() + 1e-3
    tokens = torch.zeros(1, 9, 16)
    tokens[0, :6] = near
    six = (torch.arange(9) < 6)[None]
    assert pool(tokens, six).entries.tolist() == nearest(tokens, six).entries.tolist() == [[3, 0, 5, 1, 6, 2]]


def _first_free(x, entries):
    taken = []
    for row in torch.cdist(x, entries.detach()):
        taken.append(next(int(i) for i in row.argsort() if int(i) not in taken))
    return torch.tensor(taken)


def test_gradients_reach_chosen_entries_and_tokens_that_stay():
    pool, x = _pool(), RECORDED["pool/x"].clone().requires_grad_()
    out = pool(x, RECORDED["pool/chosen"])
    out.tokens.square().sum().backward()
    used = torch.zeros(7, dtype=torch.bool)
    used[out.entries.flatten()] = True
    assert torch.equal((pool.entries.grad != 0).any(1), used) and not bool(used.all())
    assert torch.equal((x.grad != 0).any(-1), ~RECORDED["pool/chosen"])


def _language_model():
    pytest.importorskip("transformers")
    from hooks.models import language_model

    return language_model("llama")


def _batch(model, batch=2):
    g = torch.Generator().manual_seed(3)
    n = 16
    image = torch.zeros(batch, n, dtype=torch.bool)
    image[:, 2:10] = True
    labels = torch.full((batch, n), -100)
    labels[:, 12:] = torch.randint(3, 60, (batch, 4), generator=g)
    ids = torch.where(labels > 0, labels, 5)
    embeds = model.get_input_embeddings()(ids).detach()
    embeds[image] = torch.randn(int(image.sum()), embeds.shape[-1], generator=g)
    return embeds, image, labels


def test_prefix_reads_both_ways_and_answers_stay_hidden():
    model = _language_model()
    embeds, _, labels = _batch(model)
    allowed = mixed_mask(labels)
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)

    def states(x):
        with torch.no_grad():
            return model(inputs_embeds=x, attention_mask=mask, output_hidden_states=True).hidden_states[-1]

    base, later, answer = states(embeds), embeds.clone(), embeds.clone()
    later[:, 8] += 1
    answer[:, 14] += 1
    assert bool(((states(later) - base).abs().amax(-1)[:, :8] > 1e-6).all())
    assert torch.equal(states(answer)[:, :14], base[:, :14])


def test_objective_adds_up_and_keep_one_is_a_plain_prefix_model():
    model = _language_model()
    embeds, image, labels = _batch(model)
    croc = CrocPretraining(model, 32, 8, 20, keep=1.0, head_dim=16).eval()
    loss = croc(embeds, image, labels)
    torch.testing.assert_close(loss.total, loss.caption + 10 * loss.reconstruction)
    allowed = mixed_mask(labels)
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    out = model(inputs_embeds=embeds, attention_mask=mask, output_hidden_states=True)
    torch.testing.assert_close(loss.caption, F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))
    back = croc.head(out.hidden_states[-1][image].view(2, 8, 32))
    torch.testing.assert_close(loss.reconstruction, F.smooth_l1_loss(back, embeds[image].view(2, 8, 32), beta=0.01))


def test_image_tokens_of_unit_length_and_the_authors_mask():
    model = _language_model()
    embeds, image, labels = _batch(model)
    valid = torch.ones(labels.shape, dtype=torch.bool)
    valid[0, :2] = False
    croc = CrocPretraining(model, 32, 8, 20, keep=1.0, head_dim=16, normalize=True, compat="authors").eval()
    loss = croc(embeds, image, labels, valid)
    unit = torch.where(image[..., None], F.normalize(embeds, dim=-1), embeds)
    allowed = mixed_mask(labels, valid, compat="authors")
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    out = model(inputs_embeds=unit, attention_mask=mask, output_hidden_states=True)
    torch.testing.assert_close(loss.caption, F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))
    back = croc.head(out.hidden_states[-1][image].view(2, 8, 32))
    torch.testing.assert_close(loss.reconstruction, F.smooth_l1_loss(back, unit[image].view(2, 8, 32), beta=0.01))


def test_a_short_run_reconstructs_better_than_the_mean():
    """Image tokens of few kinds; what was replaced can be told from what stays."""
    torch.manual_seed(0)
    model = _language_model()
    croc = CrocPretraining(model, 32, 8, 20, keep=0.5, head_dim=16, weight=1.0)
    kinds = torch.randn(4, 8, 32)
    embeds, image, labels = _batch(model, batch=16)
    optimizer = torch.optim.AdamW(croc.parameters(), 3e-3)
    g = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(60):
        picture = kinds[torch.randint(0, 4, (16,), generator=g)]
        x = embeds.masked_scatter(image.unsqueeze(-1), picture)
        loss = croc(x, image, labels, generator=g)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(float(loss.reconstruction.detach()))
    spread = float(F.smooth_l1_loss(kinds.mean(0).expand_as(kinds), kinds, beta=0.01))
    assert sum(losses[-5:]) / 5 < 0.7 * spread < losses[0]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: PromptTokenPool(8, keep=1.5), "keep"),
        (lambda: PromptTokenPool(8, 0), "num_entries"),
        (lambda: PromptTokenPool(8, assignment="best"), "assignment"),
        (lambda: mixed_mask(torch.zeros(1, 2).long(), compat="paper"), "compat"),
        (lambda: PromptTokenPool(8, 3, assignment="hungarian")(torch.randn(1, 9, 8)), "the pool has 3"),
        (lambda: PromptTokenPool(8)(torch.randn(1, 9, 7)), "dim"),
        (lambda: PromptTokenPool(8)(torch.randn(2, 3, 8), torch.tensor([[True] * 3, [False] * 3])), "as many"),
        (lambda: ReconstructionHead(30), "head_dim"),
        (lambda: ReconstructionHead(64, 4)(torch.randn(1, 5, 64)), "max_tokens=4"),
        (
            lambda: CrocPretraining(torch.nn.Identity(), 64)(torch.randn(1, 3, 64), torch.zeros(1, 3).bool(), None),
            "image",
        ),
        (
            lambda: CrocPretraining(torch.nn.Identity(), 64)(
                torch.randn(1, 3, 64), torch.ones(1, 3).bool(), torch.full((1, 3), -100)
            ),
            "labels",
        ),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
