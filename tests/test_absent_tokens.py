"""Tokens that do not exist may hold anything, NaN and inf included: nothing of it reaches values or gradients."""

import pytest
import torch
from table import rows
from torch.utils._pytree import tree_leaves, tree_map

from attnlib.check.subject import Subject
from attnlib.nn.dense.pldr_llm_plga import PowerLawGraphAttention
from attnlib.nn.heads.bam_soft_moa_upcycling import ExpertFeedForward, ParallelBlock, router_losses
from attnlib.nn.heads.key_driven_gqa import key_norms
from attnlib.nn.layers import zero_invalid
from attnlib.nn.modulation.activator_geglu import ActivatorBlock
from attnlib.nn.modulation.focalnet import FocalModulation
from attnlib.nn.modulation.gaussian_adaptive_attention import GaussianBlock
from attnlib.nn.multimodal.ee_mllm import CompositeBlock
from attnlib.nn.multimodal.p_adapter import pool_nodes
from attnlib.nn.multimodal.wings_lorra import LowRankResidualAttention
from attnlib.types import EXTRAS, Output


def filthy(held: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The same tokens with NaN, inf and -inf in those that do not exist."""
    dirt = torch.tensor([float("nan"), float("inf"), float("-inf")], dtype=held.dtype)
    dirt = dirt.repeat(-(-held.numel() // 3))[: held.numel()].view(held.shape)
    return torch.where(valid.reshape(valid.shape + (1,) * (held.dim() - valid.dim())), held, dirt)


def answer(s: Subject, m, x, context, scene, returns, **call):
    """Everything that a call gives, and the gradients of its inputs and parameters."""
    m.zero_grad()
    x, context = x.clone().requires_grad_(), None if context is None else context.clone().requires_grad_()
    torch.manual_seed(0)
    out = s.run(m, x, context, scene, **call, **({"returns": returns} if returns else {}))
    leaves = tree_leaves(out if isinstance(out, Output) else Output(out))
    made = [t for t in leaves if isinstance(t, torch.Tensor)]
    total = sum((t.double() * s.noise(t, 4)).sum() for t in made if t.requires_grad)
    if isinstance(total, torch.Tensor):
        total.backward()
    inputs = [x] if context is None else [x, context]
    return made + [t.grad for t in [*inputs, *m.parameters()] if t.grad is not None]


@pytest.mark.parametrize("case", rows(), ids=lambda case: case.id)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_what_absent_tokens_hold_reaches_nothing(case, train):
    s = Subject(case)
    for scene in s.scenes:
        x, context = s.x(), s.context(scene)
        claims = s.claims
        possible = {"state": claims.streaming and not scene.cross, "carry": claims.carries, "losses": claims.losses}
        returns = [tuple(extra for extra in EXTRAS if possible.get(extra))] + [("weights",)] * claims.weights
        for argument, held in (("valid", x), ("context_valid", context)):
            if held is None:
                continue
            valid = s.holes(held)
            clean = torch.where(valid.unsqueeze(-1), held, 0.0)
            extras = {} if case.extras is None else dict(case.extras(x))
            own = argument == "valid"  # what is carried beside tokens, and not by them, is clean
            dirty = tree_map(
                lambda t, v=valid, own=own: filthy(t, v) if own and t.shape[: v.dim()] == v.shape else t, extras
            )
            answers = []
            for tokens, more in ((clean, extras), (filthy(held, valid), dirty)):
                m = s.fresh(train=train)
                pair = (tokens, context) if argument == "valid" else (x, tokens)
                call = {**more, argument: valid}
                answers.append([t for asked in returns for t in answer(s, m, *pair, scene, asked, **call)])
            for first, second in zip(*answers, strict=True):
                assert not torch.isnan(first).any()
                torch.testing.assert_close(second, first, rtol=1e-9, atol=1e-12)


def _experts():
    ffn = ExpertFeedForward(16, num_experts=2)
    return ffn, lambda x, valid: (lambda y, losses: (zero_invalid(y, valid), *losses.values()))(*ffn(x, valid))


def _learner():
    learner = LowRankResidualAttention(16, 2)
    return learner, lambda x, valid: learner.attend(torch.ones(len(x), 3, 16), x, valid=valid)


def _metric():
    m = PowerLawGraphAttention(16, 2, metric_hidden=8, residual_units=1)
    return m, m.deductive_outputs


def _modulator():
    m = FocalModulation(16, focal_level=1, grid_rank=1)
    return m, lambda x, valid: tuple(zero_invalid(t, valid) for t in m.modulator(x, valid))


def _block(block):
    return block, lambda x, valid: zero_invalid(block(x, valid=valid), valid)


#: What takes ``valid`` around mechanisms: a module (for its parameters) and a call.
AROUND = {
    "activator block": lambda: _block(ActivatorBlock(16, drop=0.0)),
    "gaussian block": lambda: _block(GaussianBlock(16)),
    "parallel block": lambda: _block(ParallelBlock(16, 2, num_experts=2)),
    "composite block": lambda: _block(CompositeBlock(16, 2, hidden=8)),
    "feed-forward of experts": _experts,
    "focal modulator": _modulator,
    "low-rank learner": _learner,
    "metric": _metric,
    "router losses": lambda: (None, lambda x, v: tuple(router_losses(x, torch.ones_like(x), v).values())),
    "key norms": lambda: (None, lambda x, v: key_norms(x.unsqueeze(1), v)),
    "pooled nodes": lambda: (None, lambda x, v: pool_nodes(x.new_ones(len(x), 1, 1, x.shape[1]), x, 2, v)[1]),
}


@pytest.mark.parametrize("name", AROUND)
def test_nor_through_what_stands_around_mechanisms(name):
    torch.manual_seed(0)
    module, call = AROUND[name]()
    held, valid = torch.randn(2, 6, 16), torch.tensor([[1, 1, 0, 1, 0, 1], [0, 0, 1, 1, 1, 1]], dtype=torch.bool)
    answers = []
    for x in (held, filthy(held, valid)):
        x = x.clone().requires_grad_()
        out = [t for t in tree_leaves(call(x, valid))]
        parameters = [] if module is None else list(module.parameters())
        leaves = [x, *parameters]
        total = sum(t.square().sum() for t in out if t.requires_grad)
        grads = torch.autograd.grad(total, leaves, allow_unused=True) if isinstance(total, torch.Tensor) else ()
        answers.append(out + [g for g in grads if g is not None])
    for first, second in zip(*answers, strict=True):
        torch.testing.assert_close(second, first)
        assert not torch.isnan(first).any()
