"""The protocol of task models: default step, turns, what gets gradients, and what is refused."""

import ast
import copy
import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

import attnlib
from attnlib.models.protocol import (
    Optimizers,
    Step,
    TaskModel,
    answering,
    evaluating,
    split_batch,
    total_loss,
    train_batch,
    trained,
    updating,
)
from attnlib.models.tiles import tiled


class Line(TaskModel):
    def __init__(self):
        super().__init__()
        self.map = nn.Linear(2, 1)

    def forward(self, x, more=None):
        return self.map(x) if more is None else self.map(x) + more

    def loss(self, prediction, target):
        return {"square": (prediction - target).square().mean()}


class Adversaries(TaskModel):
    """Two that train in turns, the second against what the first has become."""

    def __init__(self):
        super().__init__()
        self.maker, self.judge = nn.Linear(2, 2), nn.Linear(2, 1)
        self.seen = []

    def forward(self, x):
        return self.maker(x)

    def steps(self, batch):
        inputs, target = split_batch(self, batch)

        def fool():
            self.seen.append(self.maker.weight.detach().clone())
            return {"fool": -self.judge(self(**inputs)).mean()}

        def tell():
            self.seen.append(self.maker.weight.detach().clone())
            made = self(**inputs).detach()
            assert not self.maker.weight.requires_grad and self.judge.weight.requires_grad
            return {"real": -self.judge(target).mean(), "made": self.judge(made).mean()}

        yield Step("maker", trained(self.maker), fool)
        yield Step("judge", trained(self.judge), tell)


def sgd():
    return Optimizers(lambda name, params: torch.optim.SGD(params, 0.1, momentum=0.9))


def test_one_step_is_plain_training():
    torch.manual_seed(0)
    model = Line()
    twin, x, y = copy.deepcopy(model), torch.randn(4, 2), torch.randn(4, 1)
    optimizers, plain = sgd(), torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        terms = train_batch(model, {"x": x, "target": y}, optimizers)
        plain.zero_grad()
        loss = (twin(x) - y).square().mean()
        loss.backward()
        plain.step()
        assert terms == {"all": {"square": float(loss.detach())}}
    assert all(a.equal(b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert model.predict(x).equal(twin(x)) and not model.predict(x).requires_grad


def test_turns_see_what_came_before_and_update_only_theirs():
    torch.manual_seed(0)
    model, optimizers = Adversaries(), sgd()
    judge = model.judge.weight.detach().clone()
    batch = {"x": torch.randn(4, 2), "target": torch.randn(4, 2)}
    terms = train_batch(model, batch, optimizers)
    assert list(terms) == ["maker", "judge"] and list(terms["judge"]) == ["real", "made"]
    assert not model.seen[0].equal(model.seen[1]) and model.seen[1].equal(model.maker.weight)
    assert not judge.equal(model.judge.weight)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_optimizers_go_on_where_they_stopped():
    torch.manual_seed(0)
    model, optimizers = Adversaries(), sgd()
    batch = {"x": torch.randn(4, 2), "target": torch.randn(4, 2)}
    train_batch(model, batch, optimizers)
    twin, again = copy.deepcopy(model), sgd()
    again.load_state_dict(optimizers.state_dict())
    assert again.state_dict().keys() == {"maker", "judge"}  # before any was made
    for m, o in ((model, optimizers), (twin, again)):
        train_batch(m, batch, o)
    assert all(a.equal(b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_what_is_frozen_stays_so_also_after_an_exception():
    model = Adversaries()
    model.judge.bias.requires_grad_(False)
    with pytest.raises(KeyError), updating(model, [model.maker.weight]):
        assert [p.requires_grad for p in model.parameters()] == [True, False, False, False]
        raise KeyError
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False]
    assert len(trained(model.judge, model)) == 3


def test_what_is_frozen_in_evaluation_stays_so():
    model = Adversaries()
    model.judge.eval()
    for _ in range(2):
        with pytest.raises(KeyError), evaluating(model):
            assert not any(m.training for m in model.modules())
            raise KeyError
        assert model.training and model.maker.training and not model.judge.training
    with evaluating(model.eval()):
        pass
    assert not any(m.training for m in model.modules())


class Dropping(Line):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.map(self.drop(x))


class Noisy(Dropping):
    """Answers by a method of its own, and says in which modes it was asked."""

    def __init__(self):
        super().__init__()
        self.norm, self.frozen = nn.BatchNorm1d(1), nn.BatchNorm1d(1).eval()

    def predict(self, x: torch.Tensor, *, sign: float = 1.0) -> torch.Tensor:
        """The sign of it."""
        self.seen = [m.training for m in self.modules()], torch.is_grad_enabled()
        if not sign:
            raise KeyError("sign")
        return sign * self.frozen(self.norm(self(x)))


class Signs:
    def predict(self, x):
        return self(x).sign()


class Mixed(Signs, Dropping):
    pass


class Louder(Noisy):
    def predict(self, x, **settings):
        return 2 * super().predict(x, **settings)


@pytest.mark.parametrize("cls", [Dropping, Noisy, Mixed, Louder])
def test_answers_are_those_of_evaluation_without_gradient(cls):
    torch.manual_seed(0)
    model, x = cls(), torch.randn(64, 2)
    answer = model.predict(x)
    assert answer.equal(model.predict(x)) and not answer.requires_grad  # no dropout
    assert model.training and not model(x).equal(model(x))  # outside there is
    assert answer.equal(model.eval().predict(x)) and not model.training


def test_an_answer_leaves_modes_and_buffers_as_they_were():
    model = Noisy()
    before = {n: b.clone() for n, b in model.named_buffers()}
    for sign in (1.0, 0.0):
        for mode in (True, False):
            model.norm.train(mode)  # one part of a model that trains, frozen or not
            if sign:
                model.predict(torch.randn(8, 2), sign=sign)
            else:
                with pytest.raises(KeyError, match="sign"):
                    model.predict(torch.randn(8, 2), sign=sign)
            assert model.seen == ([False] * 5, False)
            assert model.training and model.drop.training and not model.frozen.training
            assert model.norm.training == mode and torch.is_grad_enabled()
    assert all(b.equal(before[n]) for n, b in model.named_buffers())
    model.train().predict(torch.randn(8, 2))
    assert not model.seen[0][0] and model.frozen.training


def test_an_answer_keeps_its_signature_and_its_docstring():
    assert inspect.getdoc(Noisy.predict) == "The sign of it." and Noisy.predict.__name__ == "predict"
    signature = inspect.signature(Noisy.predict)
    assert list(signature.parameters) == ["self", "x", "sign"]
    assert signature.parameters["sign"].kind is inspect.Parameter.KEYWORD_ONLY
    assert Noisy.predict.__qualname__ == "Noisy.predict" and Noisy.predict.__module__ == __name__
    assert "inputs of any size" in TaskModel.predict.__doc__

    class Teacher(nn.Module):
        @answering
        def taught(self, x: int) -> bool:
            """What it says."""
            return self.training

    teacher = Teacher()
    assert teacher.taught(0) is False and teacher.training and Teacher.taught.__doc__ == "What it says."


def test_no_model_sees_to_modes_by_itself():
    """``answering`` and ``evaluating`` give every part its mode back, after an error too."""
    found = []
    folder = Path(attnlib.__file__).parent
    for path in sorted((*(folder / "models").rglob("*.py"), *(folder / "bench" / "worlds").rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            given = [ast.unparse(a) for a in node.args] if isinstance(node, ast.Call) else []
            if given == ["training"] and ast.unparse(node.func).endswith(".train") and path.name != "protocol.py":
                found.append(f"{path.relative_to(folder)}:{node.lineno}")
            if isinstance(node, ast.FunctionDef) and node.name == "predict":
                marks = [ast.unparse(d) for d in node.decorator_list]
                own = "torch.no_grad()" in marks or "evaluating(self)" in ast.unparse(node)
                if own and path.name != "exits.py":  # which refuses to answer in training
                    found.append(f"{path.relative_to(folder)}:{node.lineno}")
    assert not found, "use answering or evaluating of attnlib.models.protocol"


@pytest.mark.parametrize(
    ("batch", "kind", "message"),
    [
        ([1], TypeError, "batch must be a mapping"),
        ({"x": torch.zeros(1, 2)}, ValueError, r"batch has no 'target', got \['x'\]"),
        ({"target": 0}, ValueError, "missing a required argument: 'x'"),
        ({"x": 0, "y": 1, "target": 0}, ValueError, "unexpected keyword argument 'y'"),
        ({"x": torch.full((1, 2), torch.nan), "target": torch.zeros(1, 1)}, ValueError, r"'all'\['square'\] is nan"),
    ],
)
def test_bad_batches(batch, kind, message):
    with pytest.raises(kind, match=message):
        train_batch(Line(), batch, sgd())


def test_bad_steps_and_terms():
    for terms, kind, message in (
        (torch.zeros(()), TypeError, "terms of the loss by name"),
        ({}, ValueError, "no terms"),
        ({"a": 1.0}, TypeError, r"loss\['a'\]"),
        ({"a": torch.zeros(2)}, ValueError, "must be one number"),
    ):
        with pytest.raises(kind, match=message):
            total_loss(terms)
    with pytest.raises(TypeError, match="make must give an optimizer"):
        Optimizers(torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1))
    with pytest.raises(TypeError, match="terms must be a function"):
        Step("a", [], {})
    with pytest.raises(TypeError, match="params"):
        Step("a", [torch.zeros(1)], dict)
    with pytest.raises(NotImplementedError, match="TaskModel has no loss"):
        TaskModel().loss(0, 0)
    model, optimizers = Line(), sgd()
    with pytest.raises(ValueError, match="no parameters"):
        optimizers.of(Step("empty", [], dict))
    optimizers.of(Step("a", model.parameters(), dict))
    with pytest.raises(ValueError, match="other parameters than before"):
        optimizers.of(Step("a", [model.map.weight], dict))
    model.steps = lambda batch: iter(())
    with pytest.raises(ValueError, match="yielded no step"):
        train_batch(model, {}, optimizers)


@pytest.mark.parametrize("grid", [(23,), (13, 10), (7, 12, 9)])
def test_tiles_are_the_whole_where_context_is_enough(grid):
    torch.manual_seed(0)
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(grid) - 1](2, 3, 3, padding=1).double()
    x = torch.randn(2, 2, *grid, dtype=torch.float64)
    for tile, overlap, blend in ((4, 3, 2), (5, 1, 0), (64, 2, 1), ([3] * len(grid), 4, None)):
        torch.testing.assert_close(tiled(conv, x, tile, overlap=overlap, blend=blend), conv(x))


def test_bad_tiles():
    for x, settings, message in (
        (torch.zeros(1, 2), dict(tile=2), "x must be"),
        (torch.zeros(1, 2, 0), dict(tile=2), "at least one pixel"),
        (torch.zeros(1, 2, 4, 4), dict(tile=(2,)), "tile"),
        (torch.zeros(1, 2, 4, 4), dict(tile=2, overlap=1, blend=2), "blend"),
        (torch.zeros(1, 2, 4, 4), dict(tile=2, scale=2), "should become"),
        (torch.zeros(1, 2, 4, 4), dict(tile=2, align=0), "align must be an integer of at least 1"),
        (torch.zeros(1, 2, 4, 4), dict(tile=2.5), r"tile.* must be an integer"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            tiled(lambda t: t, x, **settings)
