"""PLS-Net against the class that lies beside AGUNet, any size, and what it learns."""

import pytest
import torch

import attnlib
from attnlib.models.build import load_pretrained
from attnlib.models.dense.plsnet import DenseDilated, PLSNet, convert
from attnlib.models.protocol import Optimizers, train_batch
from tests.whole import Whole, renamer


def test_the_release():
    """Their PLS in training: before and behind its softmax, all gradients, running statistics."""
    whole = Whole("plsnet")
    model = attnlib.create_model("plsnet")
    assert sum(p.numel() for p in model.parameters()) == 250_714

    def rule(state):
        return convert(state, model)

    def call(model, inputs):
        logits = model(inputs["x"])
        return {"logits": logits, "shares": logits.softmax(1)}

    whole.holds("release", model, rule, call, renamer(rule, whole.state("release")))
    state = {f"module.{k}": v.float() for k, v in whole.state("release").items()}
    load_pretrained(model.float(), state)
    with pytest.raises(ValueError, match="mine"):
        load_pretrained(model, {**state, "module.mine": torch.ones(1)})


@pytest.mark.parametrize(("rank", "grid"), [(3, (9, 12, 7)), (3, (1, 2, 3)), (2, (17, 10))])
def test_any_grid(rank, grid):
    torch.manual_seed(0)
    model = PLSNet(2, 3, (4, 6), (1, 2), growth=2, rank=rank).eval()
    x = torch.randn(2, 2, *grid)
    assert model(x).shape == (2, 3, *grid) and model.predict(x).shape == (2, *grid)
    torch.testing.assert_close(model(x[:1]), model(x)[:1])
    assert model(x[:0]).shape == (0, 3, *grid)


def test_blocks_reach_as_far_as_they_dilate():
    torch.manual_seed(0)
    block = DenseDilated(2, 3, 2).double().eval()
    x = torch.randn(1, 3, 41, 41, dtype=torch.float64, requires_grad=True)
    block(x)[..., 20, 20].sum().backward()
    seen = x.grad.abs().sum((0, 1)) > 0
    rows = seen.any(1).nonzero().flatten()
    assert (int(rows[0]), int(rows[-1])) == (20 - 10, 20 + 10)  # 1 + 2 + 3 + 4


def test_it_learns_balls_and_refuses_what_it_cannot():
    torch.manual_seed(0)
    model = PLSNet(1, 2, (6, 12), (1, 1), growth=4)
    at = torch.stack(torch.meshgrid(*[torch.arange(16.0)] * 3, indexing="ij"), -1)

    def draw(count, seed):
        g = torch.Generator().manual_seed(seed)
        middle = 5 + 6 * torch.rand(count, 1, 1, 1, 3, generator=g)
        target = ((at - middle).norm(dim=-1) < 4).long()
        x = target[:, None] + 0.3 * torch.randn(count, 1, 16, 16, 16, generator=g)
        return {"x": x, "target": target}

    optimizers = Optimizers(lambda name, params: torch.optim.Adam(params, 2e-2))
    for i in range(25):
        train_batch(model, draw(4, i), optimizers)
    test = draw(4, 100)
    found = model.eval().predict(test["x"])
    both = 2 * (found & test["target"]).sum() / (found.sum() + test["target"].sum())
    assert both > 0.85
    for bad, match in ((torch.zeros(1, 2, 8, 8, 8), "x must be"), (torch.zeros(1, 1, 0, 8, 8), "at least one pixel")):
        with pytest.raises(ValueError, match=match):
            model(bad)
    with pytest.raises(ValueError, match="depths must hold one"):
        PLSNet(dims=(4, 8))
    with pytest.raises(ValueError, match="num_classes"):
        PLSNet(num_classes=1)
