"""Attention as an SVM: solutions against independent solvers, training against the authors' runs."""

import cvxpy as cp
import pytest
import torch
from parity import HERE
from safetensors.torch import load_file
from torch.nn.functional import softplus

from attnlib.theory import svm
from attnlib.theory.svm import Infeasible, Samples, attention_svm, correlation, margins, read, several_svm, train

DOUBLE = torch.float64


@pytest.fixture(scope="module")
def theirs():
    return load_file(HERE / "transformers-as-svm.safetensors")


def test_outputs_weights_and_gradients_are_the_authors(theirs):
    x, y, z, v = (theirs[k] for k in ("x", "y", "z", "v"))
    w = theirs["w.start0"].mT.clone().requires_grad_()  # a linear layer keeps its matrix transposed
    out, p = read(x, z, w, v)
    loss = softplus(-y * out).mean()
    loss.backward()
    for mine, key in ((out, "w.out"), (loss[None], "w.loss"), (p, "w.weights"), (w.grad.mT, "w.grad0")):
        assert torch.allclose(mine, theirs[key], atol=1e-12)
    k, q = (theirs[f"kq.start{i}"].clone().requires_grad_() for i in (0, 1))
    out, _ = read(x, z, k.mT @ q, v)
    softplus(-y * out).mean().backward()
    assert torch.allclose(out, theirs["kq.out"], atol=1e-12)
    assert torch.allclose(k.grad, theirs["kq.grad0"], atol=1e-12)
    assert torch.allclose(q.grad, theirs["kq.grad1"], atol=1e-12)
    out, _ = read(x, x[:, 0], theirs["self.start"].mT, v)  # self-attention: the query is a token
    assert torch.allclose(out, theirs["self.out"], atol=1e-12)
    w = theirs["relu.start"].mT.clone().requires_grad_()
    out, _ = read(x, z, w, torch.ones(5, dtype=DOUBLE), theirs["relu.value"])
    softplus(-y * out).mean().backward()
    assert torch.allclose(out, theirs["relu.out"], atol=1e-12)
    assert torch.allclose(w.grad.mT, theirs["relu.grad"], atol=1e-12)


def test_training_is_the_authors_step_by_step(theirs):
    data = Samples(*(theirs[k] for k in ("x", "z", "y", "v")))
    assert torch.equal(data.best(), theirs["ids"])
    assert torch.allclose(train(data, 200, start=theirs["w.start0"].mT).w, theirs["w.trained"], atol=1e-8)
    factors = (theirs["kq.start0"], theirs["kq.start1"])
    assert torch.allclose(train(data, 200, start=factors).w, theirs["kq.trained"], atol=1e-8)


def test_solutions_are_the_authors(theirs):
    x, z, ids = theirs["x"], theirs["z"], theirs["ids"]
    fro, nuc = (attention_svm(x, z, ids, norm) for norm in ("fro", "nuc"))
    assert torch.allclose(fro, theirs["svm.fro"], atol=1e-4)  # to their solver's tolerance
    sizes = [float(torch.linalg.matrix_norm(w, "nuc")) for w in (nuc, theirs["svm.nuc"])]
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-4)
    for norm in ("fro", "nuc"):
        found = several_svm(x, z, theirs["several.p"], norm)
        assert correlation(found.direction, theirs[f"several.{norm}.direction"]) > 1 - 1e-4
        assert torch.allclose(found.nearest(theirs["several.near"]), theirs[f"several.{norm}.nearest"], atol=2e-3)


@pytest.mark.parametrize("norm", svm.NORMS)
@pytest.mark.parametrize("seed", range(3))
def test_margins_hold_and_a_long_matrix_selects_the_token(seed, norm):
    data = svm.samples(seed, n=4, tokens=5, dim=6)
    w = attention_svm(data.x, data.z, data.best(), norm)
    gaps = margins(w, data.x, data.z, data.best())
    assert float(gaps.min()) >= 1 - 1e-6 and float(gaps.min()) == pytest.approx(1.0, abs=1e-6)
    p = read(data.x, data.z, 50 * w, data.head)[1]
    assert float(p.gather(1, data.best()[:, None]).min()) > 1 - 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_the_least_distance_is_that_of_a_general_solver(seed):
    data = svm.samples(seed, n=4, tokens=5, dim=6)
    w, chosen = cp.Variable((6, 6)), data.best()
    bounds = [
        (data.x[i, chosen[i]] - data.x[i, t]).numpy() @ w @ data.z[i].numpy() >= 1
        for i in range(4) for t in range(5) if t != chosen[i]
    ]  # fmt: skip
    cp.Problem(cp.Minimize(cp.sum_squares(w)), bounds).solve(solver="CLARABEL")
    assert torch.allclose(attention_svm(data.x, data.z, chosen), torch.from_numpy(w.value), atol=1e-5)


def test_two_tokens_are_a_linear_svm():
    data = svm.samples(5, n=8, tokens=2, dim=4)
    chosen = data.best()
    at = torch.arange(8)
    points = ((data.x[at, chosen] - data.x[at, 1 - chosen])[:, :, None] * data.z[:, None]).flatten(1).numpy()
    w = cp.Variable(16)
    cp.Problem(cp.Minimize(cp.sum_squares(w)), [points @ w >= 1]).solve(solver="CLARABEL")
    assert torch.allclose(attention_svm(data.x, data.z, chosen).flatten(), torch.from_numpy(w.value), atol=1e-5)


def test_ranks_of_solutions():
    """Both at most min(n, d), and the nuclear norm's no higher."""
    for seed in range(3):
        data = svm.samples(seed, n=3, tokens=4, dim=8)
        fro, nuc = (
            torch.linalg.matrix_rank(attention_svm(data.x, data.z, data.best(), n), rtol=1e-5) for n in svm.NORMS
        )
        assert nuc <= fro <= 3


@pytest.mark.parametrize("norm", svm.NORMS)
def test_contradictory_margins_are_refused(norm):
    x = torch.randn(1, 3, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1)
    z = torch.ones(2, 4, dtype=DOUBLE)
    with pytest.raises(Infeasible, match="no matrix keeps all 4 margins"):
        attention_svm(x, z, torch.tensor([0, 1]), norm)
    inside = torch.stack([x[0, 0], x[0, 1], (x[0, 0] + x[0, 1]) / 2])[None]  # a token between two others
    with pytest.raises(Infeasible):
        attention_svm(inside, z[:1], torch.tensor([2]), norm)


def demo():
    """The authors' two samples of three tokens in the plane."""
    g = torch.Generator().manual_seed(1)
    v = torch.randn(2, generator=g)
    x = 0.3 * torch.randn(2, 3, 2, generator=g) + torch.tensor([[[-1.0, 0.0]], [[1.0, 0.0]]])
    z = torch.randn(2, 2, generator=g)
    return Samples(
        x.double(), (z / z.norm(dim=-1, keepdim=True)).double(), torch.ones(2).double(), (v / v.norm()).double()
    )


def test_training_points_at_the_svm():
    data = demo()
    fro, nuc = (attention_svm(data.x, data.z, data.best(), norm) for norm in svm.NORMS)
    w = train(data, 2000)
    assert correlation(w.w, fro) > 0.99 and float(w.probabilities.max(-1).values.min()) > 0.999
    assert w.path.shape == (20, 2, 2) and torch.equal(w.path[-1], w.w)
    key = 0.1 * torch.randn(2, 2, generator=torch.Generator().manual_seed(0))
    factors = train(data, 2000, start=(key, torch.zeros(2, 2))).w
    assert correlation(factors, nuc) > 0.99 and correlation(factors, nuc) > correlation(factors, fro)


def test_several_tokens_keep_their_ratio():
    data = svm.samples(4, n=3, tokens=4, dim=6)
    p = torch.tensor([[0.7, 0.3, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.2, 0.5, 0.3]], dtype=DOUBLE)
    for norm in svm.NORMS:
        found = several_svm(data.x, data.z, p, norm)
        reached = read(data.x, data.z, found.finite + 60 * found.direction, data.head)[1]
        assert torch.allclose(reached, p, atol=1e-5)


def test_one_token_that_stays_is_the_plain_problem():
    data = svm.samples(1, n=3, tokens=4, dim=6)
    p = torch.nn.functional.one_hot(data.best(), 4).double()
    found = several_svm(data.x, data.z, p)
    assert torch.allclose(found.direction, attention_svm(data.x, data.z, data.best()), atol=1e-8)
    assert not found.finite.any()


def test_what_makes_no_sense_is_refused():
    data = svm.samples(0, n=2, tokens=3, dim=4)
    with pytest.raises(ValueError, match="norm"):
        attention_svm(data.x, data.z, data.best(), "l2")
    with pytest.raises(ValueError, match="chosen"):
        attention_svm(data.x, data.z, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="z"):
        attention_svm(data.x, data.z[:1], data.best())
    with pytest.raises(ValueError, match="two tokens"):
        attention_svm(data.x[:, :1], data.z, torch.tensor([0, 0]))
    with pytest.raises(Infeasible, match="nothing is driven out"):
        several_svm(data.x, data.z, torch.full((2, 3), 1 / 3))
    with pytest.raises(ValueError, match="optimizer"):
        train(data, 1, optimizer="sgd")


def test_the_experiment_runs_and_has_an_outside():
    inside = svm.AttentionSVM(steps=5, n=2, tokens=3, dim=4)
    assert set(inside.predict()) <= set(inside.run(0))
    assert inside.outside().setting() == inside.setting() | {"optimizer": "adam"}
