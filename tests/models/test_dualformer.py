"""Dualformer's encoder-decoder against the authors', and its modes."""

import pytest
import torch
from parity import Fixture, synthetic

from attnlib.models.dualformer import MODES, SIZES, Dualformer, Words, convert_state_dict, dualformer

RUN = Fixture("dualformer")
THEIRS = {n: s for n, s in RUN.config["shapes"].items() if "rope" not in n}


def built(compat="authors"):
    rope = {n: torch.zeros(s) for n, s in RUN.config["shapes"].items() if "rope" in n}
    model = Dualformer(**RUN.config["settings"], compat=compat)
    model.load_state_dict(convert_state_dict({**synthetic(THEIRS), **rope}))
    return model


def test_logits_and_gradients_are_the_authors_also_with_padded_prompts():
    model = built().double()
    valid = RUN.tensors["valid"].bool()
    y = model(RUN.tensors["prompt"], RUN.tensors["response"], valid)
    Fixture._close(y.detach(), RUN.tensors["y"], 1e-6, "y")
    (y * RUN.tensors["g"]).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    along = []
    for i in range(3):
        ways = synthetic({f"{i}/{n}": s for n, s in THEIRS.items()})
        ways = convert_state_dict({n: ways[f"{i}/{n}"] for n in THEIRS})
        assert set(ways) == set(grads)
        along.append(sum(float((grads[n] * ways[n]).sum()) for n in grads))
    Fixture._close(torch.tensor(along), RUN.tensors["along"], 1e-6, "weights")


def test_cached_greedy_responses_are_the_authors():
    said = built().generate(RUN.tensors["prompt"][:1], prefix=[5], max_len=19)[0]
    theirs = RUN.tensors["rollout"][0].tolist()
    assert theirs[0] == 0 and theirs[1] == 5 and said == theirs[1:]


def test_parameters_are_the_authors():
    assert sum(p.numel() for p in built().parameters()) == RUN.config["parameters"]
    for size in SIZES:
        with torch.device("meta"):
            own = sum(p.numel() for p in dualformer(size, 100).parameters())
        assert own == RUN.config["sizes"][size]


def test_padding_of_a_prompt_changes_nothing_unlike_the_release():
    torch.manual_seed(0)
    prompt, response = torch.randint(12, (2, 5)), torch.randint(12, (2, 4))
    padded = torch.cat([prompt, torch.randint(12, (2, 3))], 1)
    valid = torch.arange(8).expand(2, 8) < 5
    own, theirs = built(None).double(), built().double()
    assert torch.allclose(own(padded, response, valid), own(prompt, response), atol=1e-10)
    assert not torch.allclose(theirs(padded, response, valid), theirs(prompt, response), atol=1e-4)
    assert torch.allclose(theirs(prompt, response), own(prompt, response), atol=1e-12)


@torch.no_grad()
def test_decoding_step_by_step_equals_at_once():
    model = built(None).double().eval()
    prompt, response = RUN.tensors["prompt"], RUN.tensors["response"]
    valid = RUN.tensors["valid"].bool()
    features = model.encode(prompt, valid)
    whole, _ = model.decode(response, features, valid)
    states, steps = None, []
    for i in range(response.shape[1]):
        logits, states = model.decode(response[:, i : i + 1], features, valid, states, True)
        steps.append(logits)
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-10)


def test_later_words_change_nothing_before():
    model = built(None).double()
    prompt, response = RUN.tensors["prompt"], RUN.tensors["response"]
    other = response.clone()
    other[:, 6:] = 3
    assert torch.allclose(model(prompt, other)[:, :6], model(prompt, response)[:, :6], atol=1e-12)


def test_forced_modes():
    words = Words(["plan", "create", "close", "0", "1"])
    torch.manual_seed(0)
    model = Dualformer(len(words), dim=16, depth=1, num_heads=2, multiple_of=8)
    prompt = torch.randint(len(words), (4, 6))
    said = {m: [words.decode(r) for r in model.generate(prompt, words.prefix(m), max_len=8)] for m in MODES}
    assert all(r[0] == "plan" for r in said["fast"]) and all(r[0] == "create" for r in said["slow"])
    assert all(len(r) <= 8 for rows in said.values() for r in rows)
    sampled = [
        model.generate(prompt, temperature=1.0, max_len=8, generator=torch.Generator().manual_seed(s))
        for s in (0, 0, 1)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_loss_is_a_mean_per_response():
    model = built(None).double()
    prompt, response = RUN.tensors["prompt"], RUN.tensors["response"]
    valid = torch.arange(11) < torch.tensor([[11], [5], [2]])
    each = [model.loss(prompt[i : i + 1], response[i : i + 1, :n])["words"] for i, n in enumerate((11, 5, 2))]
    assert torch.allclose(model.loss(prompt, response, None, valid)["words"], torch.stack(each).mean(), atol=1e-10)


def test_bad_input():
    with pytest.raises(ValueError, match="size='xxl'"):
        dualformer("xxl", 10)
    with pytest.raises(ValueError, match="mode='slowly'"):
        Words(["plan"]).prefix("slowly")
    with pytest.raises(ValueError, match="words has .'wall'"):
        Words(["plan"]).encode(["wall"])
    with pytest.raises(ValueError, match="already"):
        Words(["bos"])
    model = built()
    with pytest.raises(ValueError, match="vocab_size"):
        model(torch.tensor([[12]]), torch.tensor([[0]]))
    with pytest.raises(ValueError, match="max_len=2"):
        model.generate(torch.tensor([[1]]), prefix=[1, 2, 3], max_len=2)
    with pytest.raises(ValueError, match="strange"):
        convert_state_dict({**synthetic(THEIRS), "strange": torch.zeros(1)})
