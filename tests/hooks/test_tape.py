"""Activations and gradients of named modules."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnlib import Layout
from attnlib.hooks import Tape, to_grid, to_tokens
from hooks.models import language_model, prompt


class Net(nn.Module):
    """A convolution used twice, with ReLUs in place behind it and an addition in place."""

    def __init__(self):
        super().__init__()
        self.first, self.conv = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(3, 4)

    def forward(self, x):
        x = self.relu(self.first(x))
        y = self.conv(x)
        y += x
        y = self.relu(self.conv(self.relu(y)))
        return self.head(y.mean((2, 3)))


def net():
    torch.manual_seed(0)
    return Net().double().eval()


IMAGES = torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(1)).double()
LABELS = torch.tensor([0, 3, 1, 1, 2])


def oracle(model, x, label):
    """Each convolution by hand, nothing in place: activations and gradients of one sample."""
    kept = {}

    def keep(name, t):
        kept[name] = t.detach().requires_grad_() if not t.requires_grad else t
        kept[name].retain_grad()
        return kept[name]

    a = keep("first", F.conv2d(x, model.first.weight, model.first.bias, padding=1))
    u = keep("conv0.in", F.relu(a))
    b = keep("conv0", F.conv2d(u, model.conv.weight, model.conv.bias, padding=1))
    v = keep("conv1.in", F.relu(b + u))
    c = keep("conv1", F.conv2d(v, model.conv.weight, model.conv.bias, padding=1))
    out = model.head(F.relu(c).mean((2, 3)))
    out[0, label].backward()
    return kept


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("chunk", [None, 2, 1])
def test_tape_against_modules_by_hand(frozen, chunk):
    model = net().requires_grad_(not frozen)
    taped = Tape(model, ["first", "conv"], keep=("input", "output")).run(IMAGES, target=LABELS, chunk=chunk)
    assert [(e.name, e.call) for e in taped.entries] == [("first", 0), ("conv", 0), ("conv", 1)]
    free = net()
    for row in range(5):
        kept = oracle(free, IMAGES[row : row + 1], LABELS[row])
        for name, entry in (
            ("first", taped["first"]),
            ("conv0", taped.all("conv")[0]),
            ("conv1", taped.all("conv")[1]),
        ):
            torch.testing.assert_close(entry.output[row], kept[name][0].detach())
            if name == "conv0":  # what is added to it in place afterwards reads the same tensor
                torch.testing.assert_close(entry.input[row], kept["conv0.in"][0].detach())
            if name == "conv1":
                torch.testing.assert_close(entry.input_gradient[row], kept["conv1.in"].grad[0])
            torch.testing.assert_close(entry.output_gradient[row], kept[name].grad[0])
    torch.testing.assert_close(taped.score, free(IMAGES).gather(1, LABELS[:, None])[:, 0].detach())
    torch.testing.assert_close(taped.output, free(IMAGES).detach())
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="called 2 times"):
        taped["conv"]
    with pytest.raises(KeyError, match="was not taped"):
        taped["head"]


def test_all_is_restored_after_an_exception():
    model = net()
    before = {name: dict(m.__dict__) for name, m in model.named_modules()}

    def breaks(output):
        raise ZeroDivisionError

    for target in (None, breaks):
        broken = IMAGES if target else IMAGES[:, :, 0]
        with pytest.raises((ZeroDivisionError, RuntimeError)):
            Tape(model, ["*"]).run(broken if target else torch.zeros(1, 2, 6, 6).double(), target=target)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert {name: m.training for name, m in model.named_modules()} == {n: d["training"] for n, d in before.items()}


def test_models_of_transformers_whose_layers_give_tuples_and_outputs():
    model, inputs = language_model(), prompt(length=6, pad=(2, 0))
    tape = Tape(model, ["model.layers.*.self_attn", "model.layers.1", "lm_head", ""], keep=("input", "output"))
    taped = tape.run(**inputs, use_cache=False, target=torch.tensor([5, 9]), chunk=1)
    assert taped["model.layers.2.self_attn"].output_gradient.shape == (2, 6, 32)
    logits = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(taped.output.logits, logits.detach())
    assert taped["lm_head"].output_gradient[0, -1, 5] == 1 and taped["lm_head"].output_gradient.sum() == 2
    hidden = taped["model.layers.1"].input.clone().requires_grad_()  # by hand from there on
    with torch.enable_grad():
        score = taped.score
    assert score.shape == (2,) and hidden.shape == (2, 6, 32)
    step = 1e-3 * torch.randn_like(hidden)

    def moved(sign):
        def change(module, args):
            return (args[0] + sign * step, *args[1:])

        handle = model.model.layers[1].register_forward_pre_hook(change)
        with torch.no_grad():
            out = model(**inputs, use_cache=False).logits[:, -1].gather(1, torch.tensor([[5], [9]]))[:, 0]
        handle.remove()
        return out

    slope = (moved(1) - moved(-1)) / 2
    torch.testing.assert_close((taped["model.layers.1"].input_gradient * step).sum((1, 2)), slope, rtol=2e-2, atol=2e-6)


def test_activations_alone_need_no_gradients():
    model = net()
    with torch.inference_mode():
        taped = Tape(model, ["conv"]).run(IMAGES)
    assert taped.score is None and taped.all("conv")[0].output_gradient is None
    with torch.no_grad():  # gradients are asked for by target, whatever is around it
        assert Tape(model, ["head"]).run(IMAGES, target=1)["head"].output_gradient.sum() == 5


def test_reduce_keeps_only_what_it_says():
    model = net()
    taped = Tape(model, ["conv"]).run(
        IMAGES, target=LABELS, chunk=2, reduce=lambda e: (e.output * e.output_gradient).sum((1, 2, 3))
    )
    whole = Tape(model, ["conv"]).run(IMAGES, target=LABELS)
    assert not taped.entries and len(taped.reduced) == 2
    for value, entry in zip(taped.reduced, whole.entries, strict=True):
        torch.testing.assert_close(value, (entry.output * entry.output_gradient).sum((1, 2, 3)))


def test_targets_may_be_functions_that_know_their_rows():
    model, weights = net(), torch.arange(5).double()
    taped = Tape(model, ["head"]).run(IMAGES, target=lambda out, rows: weights[rows] * out[:, 0], chunk=2)
    torch.testing.assert_close(taped["head"].output_gradient[:, 0], weights)


def test_tokens_and_grids_by_layout():
    layout = Layout.image(2, 3, cls=1)
    tokens = torch.randn(2, 7, 4)
    grid = to_grid(tokens, layout)
    assert grid.shape == (2, 2, 3, 4) and torch.equal(grid[:, 1, 2], tokens[:, 6])
    back = to_tokens(grid, layout)
    assert torch.equal(back[:, 1:], tokens[:, 1:]) and not back[:, 0].any()
    with pytest.raises(ValueError, match="grid must be"):
        to_tokens(grid[:, :1], layout)
    with pytest.raises(ValueError, match="layout adds up to 7"):
        to_grid(tokens[:, :5], layout)


def test_empty_batches():
    taped = Tape(net(), ["conv"]).run(IMAGES[:0], target=LABELS[:0], chunk=3)
    assert taped.all("conv")[1].output_gradient.shape == (0, 3, 6, 6)


def test_quantized_weights_have_no_gradients():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    packed = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert Tape(packed, ["0"]).run(torch.ones(1, 4))["0"].output.shape == (1, 4)
    with pytest.raises(ValueError, match="is quantized"):
        Tape(packed, ["0"]).run(torch.ones(1, 4), target=0)


BAD = {
    "no module": (lambda: Tape(net(), ["nothing"]), "modules"),
    "none": (lambda: Tape(net(), []), "modules is empty"),
    "string": (lambda: Tape(net(), "conv"), "modules"),
    "keep": (lambda: Tape(net(), ["conv"], keep=("weights",)), "keep"),
    "target": (lambda: Tape(net(), ["conv"]).run(IMAGES, target=4), "target must lie"),
    "targets": (lambda: Tape(net(), ["conv"]).run(IMAGES, target=[1, 2]), "target names 2"),
    "float": (lambda: Tape(net(), ["conv"]).run(IMAGES, target=torch.ones(5)), "target must be a class"),
    "score": (lambda: Tape(net(), ["conv"]).run(IMAGES, target=lambda out: out), "per sample"),
    "chunk": (lambda: Tape(net(), ["conv"]).run(IMAGES, chunk=0), "chunk"),
    "constant": (lambda: Tape(net(), ["conv"]).run(IMAGES, target=lambda out: torch.ones(5)), "score does not depend"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    make, says = BAD[case]
    with pytest.raises((TypeError, ValueError), match=says):
        make()


def test_inputs_made_in_inference_mode():
    model = net()
    with torch.inference_mode():
        images = IMAGES * 1
        tape = Tape(model, ["first"]).run(images, target=LABELS)
    expected = Tape(model, ["first"]).run(IMAGES, target=LABELS)
    torch.testing.assert_close(tape["first"].output_gradient, expected["first"].output_gradient)


def test_layers_whose_states_the_model_records_itself():
    """A tower's layer is read through a hook of transformers, which was there before the tape."""
    from hooks.llava import llava, llava_inputs

    model = llava()
    given = llava_inputs(model)
    name = next(n for n, _ in model.named_modules() if n.endswith("encoder.layers.0"))
    model(**given)  # transformers puts its hooks at the first call
    model.requires_grad_(False)
    taped = Tape(model, [name]).run(**given, target=5)
    gradient = taped[name].output_gradient
    eps, step = 1e-3, torch.randn_like(taped[name].output)
    scores = []

    def moved(sign):
        handle = model.get_submodule(name).register_forward_hook(
            lambda m, a, y: y + sign * eps * step if torch.is_tensor(y) else (y[0] + sign * eps * step, *y[1:]),
            prepend=True,
        )
        with torch.no_grad():
            scores.append(model(**given).logits[:, -1, 5].double().sum())
        handle.remove()

    moved(1), moved(-1)
    measured = float((scores[0] - scores[1]) / (2 * eps))
    assert abs(measured) > 1e-4
    assert abs(float((gradient * step).sum()) - measured) < 0.02 * abs(measured) + 1e-4
