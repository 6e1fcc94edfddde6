"""Heads by what they look at, overlaps, silenced heads, attention put elsewhere, and few dimensions."""

import pytest
import torch
from hooks.models import language_model, prompt

import attnlib
from attnlib.hooks import Capture, Node, Nodes, Patch, Record
from attnlib.look import (
    AttendTo,
    LowRank,
    ablated,
    answer_attention,
    choice_logit,
    head_classes,
    logit_attribution,
    overlap,
    patch,
    subspace,
    subspaces,
    token_scores,
)

IDS = prompt(length=9, pad=(2, 0))


def weights_of(model, inputs=IDS, *interventions):
    record = Record(rows="all")
    with torch.no_grad(), attnlib.attach(model, *interventions, record):
        logits = model(**inputs, use_cache=False).logits
    return torch.stack([record.results()[n]["weights"][-1] for n in range(3)]), logits


def test_attention_of_the_answer():
    model = language_model()
    whole, _ = weights_of(model)
    torch.testing.assert_close(answer_attention(model, IDS), whole[:, :, :, -1])
    torch.testing.assert_close(answer_attention(model, IDS, answer=4), whole[:, :, :, 4])
    with pytest.raises(ValueError, match="answer must be"):
        answer_attention(model, IDS, answer=99)


def test_heads_are_classed_by_what_they_look_at():
    """Five hand-made heads over ten tokens with labels at 1, 3, 5."""
    labels, correct = torch.tensor([[1, 3, 5]] * 3), torch.tensor([0, 1, 2])
    a = torch.full((1, 3, 5, 10), 1e-6)
    for row in range(3):
        a[0, row, 0, labels[row, correct[row]]] = 1  # the right label
        a[0, row, 1, labels[row, 1]] = 1  # always the second
        a[0, row, 2, labels[row]] = 1 / 3  # all labels alike
        a[0, row, 3, -1] = 1  # the end
        a[0, row, 4, 7] = 1  # something else
    found = head_classes(a, labels, correct)
    assert list(found.values()) == ["correct", "single", "uniform", "amplification", "other"]
    assert list(found)[2] == Node("z", 0, 2)
    for wrong in (labels + 9, labels - 2):
        with pytest.raises(ValueError, match="labels must be positions"):
            head_classes(a, wrong, correct)
    with pytest.raises(ValueError, match="correct points at label 4"):
        head_classes(a, labels, correct + 2)
    with pytest.raises(ValueError, match="threshold"):
        head_classes(a, labels, correct, threshold=1.0)


def test_scores_by_tokens():
    ids = torch.tensor([[5, 6, 7, 5, 6]])
    a = torch.zeros(1, 3, 5, 5)
    for i in range(1, 5):
        a[0, 0, i, i - 1] = 1  # the token before
    a[0, 1, 3, 0] = a[0, 1, 4, 1] = 1  # the same token
    a[0, 2, 3, 1] = a[0, 2, 4, 2] = 1  # the one behind it
    found = token_scores(a, ids)
    assert found["previous"].tolist() == [1, 0, 0]
    assert found["duplicate"].tolist() == [0, 1, 0] and found["induction"].tolist() == [0, 0, 1]
    none = token_scores(a, torch.arange(5)[None])
    assert none["duplicate"].tolist() == [0, 0, 0]


def test_overlap_against_random_sets():
    every = [Node("z", layer, head) for layer in range(4) for head in range(5)]
    a, b = every[:6], every[3:7]
    found = overlap(a, b, every, "first", draws=20000)
    assert found.shared == 3 and found.value == 0.5
    assert overlap(a, b, every, "smaller", draws=10).value == 0.75 == 3 / 4
    assert overlap(a, b, every, draws=10).value == 3 / 7
    assert overlap(a, b, every, "smaller", draws=10).value == overlap(b, a, every, "smaller", draws=10).value
    # Random sets share a hypergeometric number: mean 6 * 4 / 20, P(>= 3) = 285/4845 = (20*14 + 15)/4845.
    assert abs(found.expected - 6 * 4 / 20 / 6) < 0.01
    assert abs(found.p - (20 * 14 + 15) / 4845) < 0.006
    layered = overlap(a, b, every, "first", by_layer=True, draws=20000)
    # Two of layer 0 (all in a) and two of layer 1 (one of five in a): expected 2 + 2 / 5 shared of 6.
    assert abs(layered.expected - 2.4 / 6) < 0.01
    for wrong, says in ((([], b, every), "a is empty"), ((a, [Node("z", 9, 0)], every), "not among")):
        with pytest.raises(ValueError, match=says):
            overlap(*wrong)
    with pytest.raises(ValueError, match="how"):
        overlap(a, b, every, "largest")


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_attention_is_put_elsewhere(weight):
    model, targets = language_model(), torch.tensor([[3, 4], [0, 0]])
    before, plain = weights_of(model)
    edited, logits = weights_of(model, IDS, AttendTo([Node("z", 0, 1), Node("z", 0, 3)], targets, weight=weight))
    expected = before[0].clone()
    for head in (1, 3):
        for row, places in enumerate(((3, 4), (0,))):
            expected[row, head, -1] *= 1 - weight
            for at in places:
                expected[row, head, -1, at] += weight / len(places)
    torch.testing.assert_close(edited[0], expected)
    assert not torch.equal(logits[:, -1], plain[:, -1]) and torch.equal(logits[:, :-1], plain[:, :-1])


def test_attention_elsewhere_that_does_nothing_or_cannot_be():
    model, head = language_model(), [Node("z", 1, 2)]
    plain = model(**IDS, use_cache=False).logits
    with attnlib.attach(model, AttendTo(head, torch.tensor([[3], [4]]), weight=0.0)):
        assert torch.equal(model(**IDS, use_cache=False).logits, plain)
    for edit, says in (
        (AttendTo(head, torch.tensor([[8], [8]]), positions=4), "may not read"),
        (AttendTo(head, torch.tensor([[0], [3]])), "may not read"),  # padding
        (AttendTo(head, torch.tensor([[3]])), "targets are for 1"),
        (AttendTo(head, torch.tensor([[9], [9]])), "targets must be below"),
    ):
        with pytest.raises(ValueError, match=says), torch.no_grad(), attnlib.attach(model, edit):
            model(**IDS, use_cache=False)
    for make, says in (
        (lambda: AttendTo([], torch.tensor([[3]])), "heads is empty"),
        (lambda: AttendTo([Node("mlp", 1)], torch.tensor([[3]])), "heads must be"),
        (lambda: AttendTo(head, torch.tensor([3])), "targets must be"),
        (lambda: AttendTo(head, torch.tensor([[-1]])), "counted from the first key"),
        (lambda: AttendTo(head, torch.tensor([[3]]), weight=1.5), "weight"),
    ):
        with pytest.raises(ValueError, match=says):
            make()


def test_silenced_heads():
    model = language_model()
    nodes = [Node("z", 0, 1), Node("mlp", 2), Node("z", 1)]
    capture = Capture(("z", "mlp"))
    with torch.no_grad(), attnlib.attach(model, capture):
        model(**IDS)
    exists = IDS["attention_mask"].bool()
    means = {
        nodes[0]: capture.value(nodes[0])[exists].mean(0)[None, None],
        nodes[1]: capture.value(nodes[1])[exists].mean(0)[None, None],
        nodes[2]: capture.value(nodes[2]).transpose(1, 2)[exists].mean(0)[None, :, None],
    }
    for how, values in (("mean", means), ("zero", {n: v * 0 for n, v in means.items()})):
        with torch.no_grad(), attnlib.attach(model, Patch(values)):
            expected = model(**IDS).logits
        with torch.no_grad(), attnlib.attach(model, ablated(model, nodes, IDS, how)):
            torch.testing.assert_close(model(**IDS).logits, expected)
    with pytest.raises(ValueError, match="inputs must be"):
        ablated(model, nodes)
    with pytest.raises(ValueError, match="nodes is empty"):
        ablated(model, [], IDS)


def test_subspaces_by_singular_values():
    torch.manual_seed(0)
    x = torch.randn(40, 6).double()
    mean, directions = subspace(x, 2)
    centred = x - x.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    torch.testing.assert_close(mean, x.mean(0))
    torch.testing.assert_close(directions.T @ directions, vectors[:, -2:] @ vectors[:, -2:].T)
    groups = torch.arange(40) % 3
    _, of_groups = subspace(x, 6, groups)
    assert len(of_groups) == 2  # three groups, and their means lie around the mean of all
    spread = torch.stack([centred[groups == g].mean(0) for g in range(3)])
    torch.testing.assert_close(spread @ of_groups.T @ of_groups, spread)
    with pytest.raises(ValueError, match="rank"):
        subspace(x, 7)
    with pytest.raises(ValueError, match="vectors is empty"):
        subspace(x[:0], 1)


def test_full_rank_changes_nothing_and_none_leaves_the_mean():
    model = language_model().double()
    labels = torch.tensor([[3, 5], [4, 6]])
    heads, places = [Node("z", 1, 2), Node("z", 1, 0)], {"q": [-1], "k": labels, "v": labels}
    plain = model(**IDS, use_cache=False).logits
    whole = subspaces(model, {k: v.repeat(8, 1) for k, v in IDS.items()}, heads, 8, keys=labels.repeat(8, 1))
    full = {node: (mean, torch.eye(8).double()) for node, (mean, _) in whole.items()}
    with torch.no_grad(), attnlib.attach(model, LowRank(full, places)):
        torch.testing.assert_close(model(**IDS, use_cache=False).logits, plain)
    assert sorted(whole) == sorted([Node("q", 1, 2), Node("q", 1, 0), Node("k", 1, 1), Node("k", 1, 0),
                                    Node("v", 1, 1), Node("v", 1, 0)])  # fmt: skip
    none = subspaces(model, IDS, heads, 0, keys=labels, what=("k",))
    capture = Capture(("k",), positions=labels)
    with torch.no_grad(), attnlib.attach(model, LowRank(none, places), capture):
        model(**IDS, use_cache=False)
    mean = none[Node("k", 1, 1)][0]
    torch.testing.assert_close(capture.value(Node("k", 1, 1)), mean.expand(2, 2, 8))


def test_without_the_keys_directions_all_labels_are_read_alike():
    """Without rotary positions, keys at their mean are one key: a query gives every label the same weight."""
    from hooks.test_nodes import gpt2

    model, labels = gpt2(), torch.tensor([[3, 5], [4, 6]])
    nothing = subspaces(model, IDS, [Node("z", 0, 1)], 0, keys=labels, what=("k",))
    record = Record(layers=[0], rows=[-1])
    with torch.no_grad(), attnlib.attach(model, LowRank(nothing, {"k": labels}), record):
        model(**IDS, use_cache=False)
    row = record.results()[0]["weights"][-1][:, 1, 0]
    picked = row.gather(1, labels)
    torch.testing.assert_close(picked[:, 0], picked[:, 1])


def test_low_rank_is_only_at_the_labels():
    model = language_model()
    labels = torch.tensor([[3, 5], [4, 6]])
    nothing = subspaces(model, IDS, [Node("z", 1, 2)], 0, keys=labels)
    capture = Capture(("q", "k", "v"))
    plain = Capture(("q", "k", "v"))
    for kept, more in ((plain, ()), (capture, (LowRank(nothing, {"q": [-1], "k": labels, "v": labels}),))):
        with torch.no_grad(), attnlib.attach(model, *more, kept):
            model(**IDS, use_cache=False)
    a, b = plain.results(), capture.results()
    moved = (a["k"][1] != b["k"][1]).any(-1)  # (B, Hk, N)
    expected = torch.zeros(2, 2, 9, dtype=torch.bool)
    expected[0, 1, [3, 5]] = expected[1, 1, [4, 6]] = True
    assert torch.equal(moved, expected)
    assert torch.equal((a["q"][1] != b["q"][1]).any(-1).nonzero()[:, 1:].unique(dim=0), torch.tensor([[2, 8]]))


def test_low_rank_refuses_what_it_cannot_do():
    model = language_model()
    eye = (torch.zeros(8), torch.eye(8))
    for make, says in (
        (lambda: LowRank({}), "subspaces is empty"),
        (lambda: LowRank({Node("z", 0, 0): eye}), "subspaces must be of"),
        (lambda: LowRank({Node("q", 0, 0): (torch.zeros(8), torch.eye(7))}), "must be"),
        (lambda: LowRank({Node("q", 0, 0): eye}, {"z": [1]}), "positions"),
        (lambda: subspaces(model, IDS, [Node("q", 0, 0)], 2), "heads must be"),
    ):
        with pytest.raises(ValueError, match=says):
            make()
    narrow = LowRank({Node("q", 0, 0): (torch.zeros(4), torch.eye(4))})
    with pytest.raises(ValueError, match="has 4 dimensions"), torch.no_grad(), attnlib.attach(model, narrow):
        model(**IDS, use_cache=False)


# ---- a planted head


def planted():
    """A GPT-2 of attention alone whose head (1, 2) looks from the end at the label that carries a mark, and says it.

    Tokens 0 to 3 are labels, 4 to 7 the same labels marked, 8 the end, 9 what fills. The other heads are random and
    small.
    """
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=10, n_embd=16, n_layer=2, n_head=4, n_positions=16, n_inner=4,
                                     bos_token_id=None, eos_token_id=None, tie_word_embeddings=False)  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.c_proj.weight.zero_()
        table = model.transformer.wte.weight.zero_()
        for label in range(4):
            table[label, label] = table[4 + label, label] = 4.0
            table[4 + label, 4] = 4.0  # the mark
        table[8, 5], table[9, 6] = 4.0, 4.0
        model.transformer.wpe.weight.mul_(0.1)
        model.lm_head.weight.zero_()[:4, :4] = torch.eye(4)
        attention = model.transformer.h[1].attn
        qkv, out = attention.c_attn.weight, attention.c_proj.weight
        at = slice(8, 12)  # head 2 of width 4
        qkv[:, 8:12] = qkv[:, 16 + 8 : 16 + 12] = qkv[:, 32 + 8 : 32 + 12] = 0
        qkv[5, 8], qkv[4, 16 + 8] = 6.0, 6.0  # the end asks, the mark answers
        for label in range(4):
            qkv[label, 32 + 8 + label] = 1.0
        out[at] = 0
        out[at, :4] = 4 * torch.eye(4)
    return model


def marked(count, seed):
    generator = torch.Generator().manual_seed(seed)
    correct = torch.randint(4, (count,), generator=generator)
    ids = torch.full((count, 10), 9)
    labels = torch.tensor([1, 3, 5, 7]).expand(count, 4)
    order = torch.rand(count, 4, generator=generator).argsort(1)
    ids = ids.scatter(1, labels, order + 4 * (torch.arange(4) == correct[:, None]))
    ids[:, -1] = 8
    return ids, order, labels, correct


def test_a_planted_letter_head_is_first_by_both_measures():
    model = planted()
    ids, order, labels, correct = marked(24, 1)
    other = ids.clone()
    wrong = (correct + 1) % 4
    other.scatter_(1, labels.gather(1, correct[:, None]), order.gather(1, correct[:, None]))
    other.scatter_(1, labels.gather(1, wrong[:, None]), order.gather(1, wrong[:, None]) + 4)
    answers = order.gather(1, correct[:, None])[:, 0]
    with torch.no_grad():
        assert bool((model(ids).logits[:, -1, :4].argmax(1) == answers).all())
    head = Node("z", 1, 2)
    assert logit_attribution(model, ids, answers, order).ranked()[0] == head
    effects = patch(model, ids, other, choice_logit(correct, order))
    assert effects.ranked(largest=False)[0] == head
    classes = head_classes(answer_attention(model, ids), labels, correct)
    assert classes[head] == "correct" and list(classes.values()).count("correct") == 1
    assert len(Nodes(model)) == 2
