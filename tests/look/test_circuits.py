"""Circuits: effects of nodes against forwards with hooks, and against the authors' path patching."""

import json
from pathlib import Path

import pytest
import torch
from hooks.models import language_model
from hooks.test_nodes import FAMILIES, bert, gpt2
from safetensors import safe_open

import attnlib
from attnlib.hooks import Capture, Node, Nodes, Patch
from attnlib.look.circuits import (
    Mean,
    Resampled,
    agreement,
    choice_logit,
    choice_loss,
    direct,
    first_order,
    logit_attribution,
    logit_difference,
    patch,
    paths,
    single_tokens,
)

LENGTH = 9


def prompts(seed, rows=2, padded=2):
    torch.manual_seed(seed)
    ids = torch.randint(3, 60, (rows, LENGTH))
    ids[0, :padded] = 0
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


CLEAN, OTHER = prompts(1), prompts(2)
ANSWERS = [4, 5], [9, 10]
METRIC = logit_difference(*ANSWERS)
PER_SAMPLE = torch.tensor([[3], [5]])


def measured(model, inputs=CLEAN, rows=2):
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1]
    index = torch.arange(rows)
    return logits[index, ANSWERS[0]] - logits[index, ANSWERS[1]]


def one_by_one(model, nodes, positions, kind, source=OTHER, clean=CLEAN):
    """The loop over forwards: each node patched alone in a whole pass of the model."""
    capture = Capture((kind,), positions=positions)
    with torch.no_grad(), attnlib.attach(model, capture):
        model(**source)
    found = []
    for node in nodes:
        with attnlib.attach(model, Patch({node: capture.value(node)}, positions=positions)):
            found.append(measured(model, clean))
    return torch.stack(found)


@pytest.mark.parametrize(
    ("kind", "positions"),
    [("z", -1), ("z", [3, -2]), ("z", None), ("q", PER_SAMPLE), ("k", None), ("v", [3, -2]), ("mlp", None),
     ("residual", PER_SAMPLE)],
)  # fmt: skip
def test_total_effects_are_those_of_whole_passes(kind, positions):
    model = language_model().double()
    effects = patch(model, CLEAN, OTHER, METRIC, kind, positions)
    torch.testing.assert_close(effects.patched, one_by_one(model, effects.nodes, positions, kind), rtol=0, atol=1e-12)
    torch.testing.assert_close(effects.clean, measured(model))
    torch.testing.assert_close(effects.corrupted, measured(model, OTHER))
    small = patch(model, CLEAN, OTHER, METRIC, kind, positions, chunk=40)
    torch.testing.assert_close(small.patched, effects.patched, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "bert", "gemma2", "opt", "olmo2", "decoder"])
@pytest.mark.parametrize("positions", [-1, None])
def test_every_family_of_language_models(family, positions):
    model = FAMILIES[family][0]().double()
    clean, other = prompts(1, padded=0), prompts(2, padded=0)
    for kind in ("z", "mlp"):
        effects = patch(model, clean, other, METRIC, kind, positions)
        slow = one_by_one(model, effects.nodes, positions, kind, other, clean)
        # Gemma's norms compute in float32 whatever comes in.
        torch.testing.assert_close(effects.patched, slow, atol=1e-5 if family == "gemma2" else 1e-7, rtol=0)
        assert float(effects.change.abs().max()) > 1e-4


@pytest.mark.parametrize("family", ["encoder", "timm-like"])
def test_models_of_tokens_and_classes(family):
    model = FAMILIES[family][0]().double()

    class Classes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.top = model, torch.nn.Linear(16, 5)

        def forward(self, x):
            return self.top(self.body(x).mean(1))

    torch.manual_seed(3)
    whole, x, y = Classes().double().eval(), torch.randn(3, 6, 16).double(), torch.randn(3, 6, 16).double()
    metric = logit_difference([0, 1, 2], [3, 4, 4])
    effects = patch(whole, x, y, metric, "z", None)
    capture = Capture(("z",))
    with torch.no_grad(), attnlib.attach(whole, capture):
        whole(y)
    for node, row in zip(effects.nodes, effects.patched, strict=True):
        with torch.no_grad(), attnlib.attach(whole, Patch({node: capture.value(node)})):
            out = whole(x)
        torch.testing.assert_close(row, out[[0, 1, 2], [0, 1, 2]] - out[[0, 1, 2], [3, 4, 4]], atol=1e-10, rtol=0)


def test_the_same_prompt_scores_nothing_and_all_nodes_are_the_other_prompt():
    model = language_model().double()
    same = patch(model, CLEAN, CLEAN, METRIC, ["z", "mlp"])
    assert float(same.change.abs().max()) < 1e-12 and not bool(same.share.any())
    assert float(paths(model, CLEAN, CLEAN, METRIC).change.abs().max()) < 1e-12
    every = tuple(Nodes(model).of("z", "mlp")) + (Node("residual", 0),)
    together = patch(model, CLEAN, OTHER, METRIC, [every], positions=None)
    torch.testing.assert_close(together.patched[0], together.corrupted, rtol=0, atol=1e-12)
    torch.testing.assert_close(together.share, torch.ones(1).double())


def test_sets_are_patched_together():
    model = language_model().double()
    pair = (Node("z", 0, 1), Node("mlp", 1))
    capture = Capture(("z", "mlp"), positions=-1)
    with torch.no_grad(), attnlib.attach(model, capture):
        model(**OTHER)
    with attnlib.attach(model, Patch(capture.values(pair), positions=-1)):
        expected = measured(model)
    found = patch(model, CLEAN, OTHER, METRIC, [pair, Node("z", 2, 0), (Node("z", 1), Node("k", 2, 0))])
    torch.testing.assert_close(found.patched[0], expected, rtol=0, atol=1e-12)
    assert found.nodes[1] == Node("z", 2, 0)


def test_sources():
    model = language_model().double()
    pool = prompts(7, rows=5, padded=0)
    capture = Capture(("z",), positions=-1)
    with torch.no_grad(), attnlib.attach(model, capture):
        model(**pool)
    node = Node("z", 1, 2)
    values = capture.value(node)

    def patched(value):
        with attnlib.attach(model, Patch({node: value}, positions=-1)):
            return measured(model)

    zero = patch(model, CLEAN, "zero", METRIC, [node])
    torch.testing.assert_close(zero.patched[0], patched(torch.zeros(1, 1, 8).double()), rtol=0, atol=1e-12)
    mean = patch(model, CLEAN, Mean(pool), METRIC, [node])
    torch.testing.assert_close(mean.patched[0], patched(values.mean(0, keepdim=True)), rtol=0, atol=1e-12)
    drawn = patch(model, CLEAN, Resampled(pool, draws=3, seed=5), METRIC, [node])
    index = torch.randint(5, (3, 2), generator=torch.Generator().manual_seed(5))
    expected = torch.stack([patched(values[one]) for one in index])
    torch.testing.assert_close(drawn.draws[:, 0], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(drawn.patched[0], expected.mean(0), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="no share"):
        _ = mean.share


def test_direct_effects_are_the_writes_through_norm_and_unembedding():
    model = gpt2().double()
    nodes = Nodes(model)
    kept, other = (Capture(("z", "mlp", "residual"), positions=-1) for _ in range(2))
    for capture, inputs in ((kept, CLEAN), (other, OTHER)):
        with torch.no_grad(), attnlib.attach(model, capture):
            model(**inputs)
    effects = direct(model, CLEAN, OTHER, METRIC, ["z", "mlp"])
    last = kept.value(Node("residual", 3))
    rows = torch.arange(2)
    for node, got in zip(effects.nodes, effects.patched, strict=True):
        moved = other.value(node) - kept.value(node)
        if node.kind == "z":
            moved = moved @ nodes.output_weight(node.layer)[node.head]
        logits = model.lm_head(model.transformer.ln_f(last + moved))[:, 0]
        torch.testing.assert_close(got, (logits[rows, ANSWERS[0]] - logits[rows, ANSWERS[1]]).detach())
    total = patch(model, CLEAN, OTHER, METRIC, ["z", "mlp"])
    at = effects.nodes.index(Node("mlp", 2))  # nothing lies behind the last feed-forward
    torch.testing.assert_close(effects.patched[at], total.patched[at], rtol=0, atol=1e-12)
    frozen = direct(model, CLEAN, OTHER, METRIC, ["z", "mlp"], norm="frozen")
    pair = direct(model, CLEAN, OTHER, METRIC, [(Node("z", 0, 0), Node("mlp", 1))], norm="frozen")
    one = frozen.change[frozen.nodes.index(Node("z", 0, 0))] + frozen.change[frozen.nodes.index(Node("mlp", 1))]
    torch.testing.assert_close(pair.change[0], one)  # with the norm frozen effects add up


@pytest.mark.parametrize("make", [language_model, gpt2, FAMILIES["decoder"][0]], ids=["llama", "gpt2", "ours"])
def test_attributions_add_up_to_the_logit(make):
    model = make().double()
    found = logit_attribution(model, CLEAN, ANSWERS[0])
    with torch.no_grad():
        logits = model(**CLEAN).logits[:, -1]
    torch.testing.assert_close(found.logit, logits[torch.arange(2), ANSWERS[0]], rtol=0, atol=1e-7)
    torch.testing.assert_close(found.values.sum(0) + found.embedding + found.rest, found.logit, rtol=0, atol=1e-7)
    choices = torch.tensor([[4, 9, 7], [5, 10, 8]])
    against = logit_attribution(model, CLEAN, ANSWERS[0], choices)
    picked = logits.gather(1, choices)
    torch.testing.assert_close(against.logit, picked[:, 0] - picked.mean(1), rtol=0, atol=1e-7)
    torch.testing.assert_close(
        against.values.sum(0) + against.embedding + against.rest, against.logit, rtol=0, atol=1e-7
    )
    assert found.grid().shape == (len(Nodes(model)), Nodes(model).layers[0].site.heads)


def test_first_order_is_the_slope():
    model = gpt2().double()
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        embedding[4] = embedding[3] + 1e-5 * torch.randn(24).double()
    clean, other = ({**CLEAN, "input_ids": CLEAN["input_ids"].clone()} for _ in range(2))
    clean["input_ids"][:, -1], other["input_ids"][:, -1] = 3, 4
    exact, slope = patch(model, clean, other, METRIC), first_order(model, clean, other, METRIC)
    torch.testing.assert_close(slope.change, exact.change, rtol=1e-3, atol=1e-12)
    assert agreement(slope, exact) > 0.99
    model = language_model().double()
    whole = first_order(model, CLEAN, OTHER, METRIC, ["z", "mlp", "q"], positions=None)
    assert len(whole.nodes) == 3 * (4 + 1 + 4) and float(whole.change.abs().max()) > 0
    with pytest.raises(ValueError, match="different nodes"):
        agreement(slope, whole)
    with torch.inference_mode():
        made = [{k: v.clone() for k, v in one.items()} for one in (CLEAN, OTHER)]
        again = first_order(model, *made, METRIC, ["z", "mlp", "q"], positions=None)
    torch.testing.assert_close(again.patched, whole.patched)


# ---- paths

FIXTURE = Path(__file__).parents[1] / "fixtures" / "circuit-component-reuse.safetensors"


def recorded():
    import transformers

    with safe_open(FIXTURE, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        meta = file.metadata()
    config = transformers.GPT2Config(**json.loads(meta["config"]), bos_token_id=None, eos_token_id=None,
                                     tie_word_embeddings=False)  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    weights = {name[6:]: t for name, t in tensors.items() if name.startswith("model.")}
    left = model.load_state_dict(weights, strict=False)
    assert not left.unexpected_keys and not left.missing_keys
    return model, tensors, json.loads(meta["cases"])


@pytest.mark.parametrize("case", range(10))
def test_paths_are_those_of_the_authors(case):
    model, tensors, cases = recorded()
    name, receivers, kind, position, freeze = cases[case]
    if kind == "z" and receivers[0][1] is not None:
        assert not bool(tensors[f"score.{name}"].any())  # overwritten in place before they are used: always 0
        return
    goals = "logits" if receivers[0][1] is None else [Node(kind, layer, head) for layer, head in receivers]
    answers = tensors["answers"]
    metric = logit_difference(answers[:, 0], answers[:, 1])
    found = paths(
        model, tensors["clean"], tensors["corrupted"], metric, goals, positions=position, freeze_mlps=freeze
    )  # fmt: skip
    expected, table = tensors[f"score.{name}"], torch.zeros(3, 2)
    ours = found.grid("share")
    table[: ours.shape[0], : ours.shape[1]] = ours
    torch.testing.assert_close(table, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(tensors["clean"]).logits, tensors["logits"], rtol=1e-5, atol=1e-5)


GOALS = {
    "logits": "logits",
    "q": [Node("q", 2, 1)],
    "k and v": [Node("k", 2, 1), Node("v", 1, 0)],
    "stream": [Node("residual", 2)],
    "head": [Node("z", 2, 3)],
    "all heads": [Node("q", 2)],
}


@pytest.mark.parametrize("positions", [-1, None, [4, -1]], ids=["last", "all", "two"])
@pytest.mark.parametrize("goals", GOALS)
def test_the_sum_is_what_the_passes_give(goals, positions, monkeypatch):
    """With feed-forwards frozen nothing has to be run for the second pass."""
    model = language_model().double()
    short = paths(model, CLEAN, OTHER, METRIC, GOALS[goals], positions=positions, freeze_mlps=True)
    monkeypatch.setitem(paths.__wrapped__.__globals__, "_straight", lambda *_: False)
    long = paths(model, CLEAN, OTHER, METRIC, GOALS[goals], positions=positions, freeze_mlps=True)
    torch.testing.assert_close(short.patched, long.patched, rtol=0, atol=1e-10)
    other = paths(model, CLEAN, OTHER, METRIC, GOALS[goals], positions=positions)
    if positions is None:
        assert not torch.allclose(other.patched, short.patched, atol=1e-9)


def test_what_a_head_reads_changes_through_tokens_that_are_not_held():
    """A receiver's output looks at tokens between the patched ones, which carry on what the sender changed."""
    model, places, goal = language_model().double(), [2, -1], Node("z", 2, 3)
    own, other = (Capture(("z", "mlp"), positions=places) for _ in range(2))
    for capture, inputs in ((own, CLEAN), (other, OTHER)):
        with torch.no_grad(), attnlib.attach(model, capture):
            model(**inputs)
    senders = [Node("z", 0, 1), Node("z", 1, 2)]
    held = own.values(Nodes(model).of("z", "mlp"))
    expected = []
    for sender in senders:
        reached = Capture(("z",), positions=places)  # before what is held is written
        with (
            torch.no_grad(),
            attnlib.attach(model, reached, Patch({**held, sender: other.value(sender)}, positions=places)),
        ):
            model(**CLEAN)
        with attnlib.attach(model, Patch({goal: reached.value(goal)}, positions=places)):
            expected.append(measured(model))
    found = paths(model, CLEAN, OTHER, METRIC, [goal], senders, positions=places, freeze_mlps=True)
    torch.testing.assert_close(found.patched, torch.stack(expected), rtol=0, atol=1e-12)
    kept = paths(model, CLEAN, OTHER, METRIC, [goal], senders, positions=places, freeze_mlps=True, freeze="everywhere")
    assert not torch.allclose(kept.patched[0], found.patched[0], atol=1e-6)


def test_paths_into_logits_are_direct_effects():
    model = language_model().double()
    torch.testing.assert_close(
        paths(model, CLEAN, OTHER, METRIC, freeze_mlps=True).patched, direct(model, CLEAN, OTHER, METRIC).patched
    )


def test_freezing_everywhere_stops_leaks_through_other_tokens():
    """From token 3 to queries at the answer there is a way only through heads at later tokens, if they are not held."""
    model = language_model().double()
    places = torch.tensor([[3, 8], [3, 8]])
    goals = [Node("k", 2, 0), Node("k", 2, 1)]
    kept = paths(model, CLEAN, OTHER, METRIC, goals, positions=places, freeze="everywhere", freeze_mlps=True)
    here = paths(model, CLEAN, OTHER, METRIC, goals, positions=places, freeze="position", freeze_mlps=True)
    # What is read at patched tokens never leaks: later tokens cannot reach them through heads that are held.
    torch.testing.assert_close(kept.patched, here.patched, rtol=0, atol=1e-12)
    loose = bert().double()  # there every token reads every other one
    a = paths(loose, CLEAN, OTHER, METRIC, [Node("residual", 1)], positions=[-1], freeze="position")
    b = paths(loose, CLEAN, OTHER, METRIC, [Node("residual", 1)], positions=[-1], freeze="everywhere")
    torch.testing.assert_close(a.patched, b.patched, rtol=0, atol=1e-12)
    assert float(a.change.abs().max()) > 1e-6


def planted():
    """A GPT-2 without feed-forwards in which only head (0, 1) writes what the query of (1, 0) reads."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=20, n_embd=12, n_layer=2, n_head=2, n_positions=16, n_inner=4,
                                     bos_token_id=None, eos_token_id=None)  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).double().eval()
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.c_proj.weight.zero_()
            block.attn.c_attn.weight.mul_(20)
            block.attn.c_proj.weight.mul_(20)
        model.transformer.h[0].attn.c_proj.weight[:6] = 0  # head (0, 0) says nothing
        model.transformer.h[1].attn.c_proj.weight[6:] = 0  # head (1, 1) says nothing
        model.transformer.wte.weight.mul_(20)
    return model


def test_only_the_planted_sender_has_an_effect():
    model = planted()
    clean, other = (torch.randint(0, 20, (2, 7), generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    metric = logit_difference([1, 2], [3, 4])
    grid = paths(model, clean, other, metric, [Node("q", 1, 0)]).grid()
    assert abs(float(grid[0, 0])) < 1e-14 and abs(float(grid[0, 1])) > 1e-6
    total = patch(model, clean, other, metric).grid()
    assert abs(float(total[0, 0])) < 1e-14 and abs(float(total[1, 1])) < 1e-14 and abs(float(total[1, 0])) > 1e-6


# ---- doors

BAD = {
    "length": (lambda m: patch(m, CLEAN, {"input_ids": OTHER["input_ids"][:, 1:]}, METRIC), "equal length"),
    "padding": (lambda m: patch(m, CLEAN, prompts(2, padded=3), METRIC), "equal length"),
    "rows": (lambda m: patch(m, CLEAN, prompts(2, rows=3), METRIC), "3 prompts for 2"),
    "answers": (lambda m: logit_difference([[1, 2], [3, 4]], [1, 2]), "several tokens"),
    "metric": (lambda m: patch(m, CLEAN, OTHER, logit_difference([1], [2])), "metric is for 1"),
    "no metric": (lambda m: patch(m, CLEAN, OTHER, "difference"), "metric"),
    "source": (lambda m: patch(m, CLEAN, "one", METRIC), "source"),
    "positions": (lambda m: patch(m, CLEAN, OTHER, METRIC, positions=9), "positions must lie"),
    "nodes": (lambda m: patch(m, CLEAN, OTHER, METRIC, [Node("z", 5)]), "layers 0 to 2"),
    "kind": (lambda m: patch(m, CLEAN, OTHER, METRIC, "w"), "nodes"),
    "empty": (lambda m: patch(m, CLEAN, OTHER, METRIC, [()]), "empty set"),
    "below": (lambda m: paths(m, CLEAN, OTHER, METRIC, [Node("q", 1, 0)], [Node("z", 2, 0)]), "must lie above"),
    "receivers": (lambda m: paths(m, CLEAN, OTHER, METRIC, [Node("mlp", 1)]), "receivers must be"),
    "senders": (lambda m: paths(m, CLEAN, OTHER, METRIC, senders=[Node("mlp", 1)]), "senders must be"),
    "freeze": (lambda m: paths(m, CLEAN, OTHER, METRIC, freeze="some"), "freeze"),
    "training": (lambda m: patch(m.train(), CLEAN, OTHER, METRIC), "training mode"),
    "direct": (lambda m: direct(bert(), CLEAN, OTHER, METRIC), "by addition"),
    "gemma": (lambda m: direct(FAMILIES["gemma2"][0](), CLEAN, OTHER, METRIC), "more than a norm|stands behind"),
    "choices": (lambda m: choice_logit([3], torch.tensor([[1, 2]])), "numbers of choices"),
    "frozen": (lambda m: first_order(m.requires_grad_(False), CLEAN, OTHER, METRIC), "has a gradient"),
    "vocabulary": (lambda m: patch(m, CLEAN, OTHER, logit_difference([1, 99], [2, 3])), "tokens points at logit 99"),
    "counts": (lambda m: logit_difference([1, 2], [3]), "correct and wrong"),
    "against": (lambda m: logit_attribution(m, CLEAN, [1, 2], [[1, 2]]), "against must be"),
    "share": (lambda m: patch(m, CLEAN, OTHER, METRIC).grid("sum"), "what"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    run, says = BAD[case]
    with pytest.raises((TypeError, ValueError), match=says):
        run(language_model())


def test_quantized_weights_have_no_first_order():
    model = language_model()
    model.model.layers[0].mlp.down_proj = torch.ao.nn.quantized.dynamic.Linear(48, 32)
    with pytest.raises(ValueError, match="is quantized; use patch"):
        first_order(model, CLEAN, OTHER, METRIC)


def test_choices():
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 3.0]])
    samples = torch.arange(2)
    choices = torch.tensor([[5, 6, 7], [5, 6, 7]])
    torch.testing.assert_close(choice_logit([1, 2], choices)(logits, samples), torch.tensor([1.0, 2.0]))
    expected = -torch.nn.functional.cross_entropy(logits, torch.tensor([1, 2]), reduction="none")
    torch.testing.assert_close(choice_loss([1, 2], choices)(logits, samples), expected)


def test_answers_of_several_tokens_are_named():
    def tokenizer(word, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [7] * (1 if len(word) < 5 else 2)}

    assert single_tokens(tokenizer, ["Mary", "John"]).tolist() == [7, 7]
    with pytest.raises(ValueError, match=r"several tokens are \['Gregory'\]"):
        single_tokens(tokenizer, ["Mary", "Gregory"])


def test_effects_are_ranked():
    model = language_model().double()
    effects = patch(model, CLEAN, OTHER, METRIC)
    means = effects.grid()
    best = effects.ranked()[0]
    assert float(means[best.layer, best.head]) == float(means.max())
    assert effects.ranked(by_size=True)[0] in (effects.ranked()[0], effects.ranked(largest=False)[0])
    assert effects.grid("share").shape == (3, 4)
