"""A sparse video denoiser learns from the dense one: every sublayer, the prediction, and nothing of the teacher."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from hooks.test_protocol_video import MODELS  # noqa: E402

import attnlib  # noqa: E402
from attnlib.convert.sublayers import SublayerDistillation  # noqa: E402
from attnlib.steer.diffusion.video import BlockSparse, FrameTiles  # noqa: E402


def pair(name="wan"):
    make, inputs, _ = MODELS[name]
    torch.manual_seed(0)
    teacher = make()
    torch.manual_seed(1)
    return copy.deepcopy(teacher), teacher, inputs()


@pytest.mark.parametrize("name", ["wan", "ltx", "cogvideox"])
def test_the_same_model_has_nothing_to_learn(name):
    student, teacher, inputs = pair(name)
    student.eval()
    terms = SublayerDistillation(student, teacher).loss(**inputs)
    assert not bool(terms.total)
    with attnlib.attach(student, BlockSparse(FrameTiles(0, block=1))):
        sparse = SublayerDistillation(student, teacher).loss(**inputs)
    assert all(bool(t > 0) for t in sparse) and sparse.total.requires_grad


def test_terms_are_mean_squares_of_what_sublayers_give():
    student, teacher, inputs = pair()
    distil = SublayerDistillation(student.eval(), teacher, weights=(2, 3, 5))
    assert distil.attention == ["blocks.0.attn1", "blocks.1.attn1"]
    assert distil.feedforward == ["blocks.0.ffn", "blocks.1.ffn"]
    seen = {}

    def hear(model, which):
        for layer in distil.attention + distil.feedforward:
            model.get_submodule(layer).register_forward_hook(
                lambda m, i, o, at=(which, layer): seen.setdefault(at, o.detach())
            )

    with attnlib.attach(student, BlockSparse(FrameTiles(0, block=1))):
        hear(student, "student")
        hear(teacher, "teacher")
        target = torch.randn_like(inputs["hidden_states"])
        terms = distil.loss(**inputs, target=target)
        made = student(**inputs).sample

    def between(names):
        return torch.stack([(seen["student", n] - seen["teacher", n]).square().mean() for n in names]).mean()

    torch.testing.assert_close(terms.attention, 2 * between(distil.attention))
    torch.testing.assert_close(terms.feedforward, 3 * between(distil.feedforward))
    torch.testing.assert_close(terms.prediction, 5 * (made - target).square().mean())
    torch.testing.assert_close(terms.total, sum(terms[1:]))


def test_the_student_comes_nearer_and_the_teacher_stays():
    student, teacher, inputs = pair()
    before = copy.deepcopy(teacher.state_dict())
    distil = SublayerDistillation(student, teacher, relative=True)
    optimizer = torch.optim.Adam(student.parameters(), lr=2e-3)
    totals = []
    with attnlib.attach(student, BlockSparse(FrameTiles(0, block=1))):
        for _ in range(25):
            terms = distil.loss(**inputs)
            optimizer.zero_grad()
            terms.total.backward()
            optimizer.step()
            totals.append([float(t) for t in terms])
    assert totals[-1][0] < 0.5 * totals[0][0] and totals[-1][3] < totals[0][3]
    assert all(torch.equal(t, before[n]) for n, t in teacher.state_dict().items())
    assert teacher.training and all(p.grad is None for p in teacher.parameters())
    assert not any(m._forward_hooks for model in (student, teacher) for m in model.modules())


def test_terms_of_weight_zero_are_not_asked_for():
    student, teacher, inputs = pair()
    terms = SublayerDistillation(student, teacher, feedforward=(), weights=(1, 0, 0)).loss(**inputs)
    assert float(terms.feedforward) == float(terms.prediction) == 0


def test_bad_input_is_refused():
    student, teacher, inputs = pair()
    with pytest.raises(ValueError, match="teacher must be another model"):
        SublayerDistillation(student, student)
    with pytest.raises(ValueError, match="three numbers"):
        SublayerDistillation(student, teacher, weights=(1, 1))
    with pytest.raises(ValueError, match="weights"):
        SublayerDistillation(student, teacher, weights=(1, -1, 1))
    with pytest.raises(ValueError, match="attention holds 'attn9'"):
        SublayerDistillation(student, teacher, attention=("attn9",))
    with pytest.raises(TypeError, match="sequence of patterns"):
        SublayerDistillation(student, teacher, feedforward="*.ffn")
    with pytest.raises(ValueError, match="teacher has no 'blocks.0.attn1'"):
        SublayerDistillation(student, nn.Linear(2, 2))
    with pytest.raises(ValueError, match="give feedforward=patterns"):
        SublayerDistillation(student, teacher, feedforward=())
    with pytest.raises(ValueError, match="target must be"):
        SublayerDistillation(student, teacher).loss(**inputs, target=torch.zeros(3))
