"""Reversed attention: what every sender sends is given, and the map that sends it is held whole or never."""

import math

import pytest
import torch

import attnlib
from attnlib import masks, ops

BACKENDS = ("passes", "eager")


def problem(receivers=5, senders=7, heads=3, grad=False):
    g = torch.Generator().manual_seed(0)
    shapes = ((2, heads, senders, 4), (2, heads, receivers, 4), (2, heads, senders, 6), (2, heads, senders))
    return [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_(grad) for s in shapes]


def oracle(q, k, v, message, allowed):
    """Sender by sender: softmax over the receivers that it may reach, times its message."""
    weights = torch.zeros(*k.shape[:3], q.shape[2], dtype=torch.float64)
    for b, h, i in torch.cartesian_prod(*[torch.arange(n) for n in q.shape[:3]]).tolist():
        reached = allowed[b, h, :, i].nonzero().flatten()
        if len(reached):
            scores = torch.stack([q[b, h, i] @ k[b, h, j] for j in reached]) / math.sqrt(q.shape[-1])
            weights[b, h, reached, i] = torch.softmax(scores, 0) * message[b, h, i].exp()
    return weights @ v, weights


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_the_definition_with_gradients(backend):
    q, k, v, message = inputs = problem(grad=True)
    g = torch.Generator().manual_seed(1)
    mask = torch.rand(2, 3, 5, 7, generator=g) > 0.4
    mask[0, 0, :, 1] = mask[1, :, 2] = False  # a sender that reaches nobody, a receiver that nobody reaches
    valid, there = torch.rand(2, 7, generator=g) > 0.2, torch.rand(2, 5, generator=g) > 0.2
    want, _ = oracle(q, k, v, message, mask & valid[:, None, None] & there[:, None, :, None])
    got = ops.reversed_attention(
        q, k, v, log_message=message, mask=mask, valid=valid, receiver_valid=there, backend=backend
    )
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(y.cos().sum(), inputs) for y in (got, want)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_columns_of_the_weights_are_the_messages():
    q, k, v, message = problem()
    out, weights = ops.reversed_attention(q, k, v, log_message=message, return_weights=True)
    torch.testing.assert_close(weights.sum(-2), message.exp())
    torch.testing.assert_close(out, weights @ v)
    torch.testing.assert_close(weights, oracle(q, k, v, message, torch.ones(2, 3, 5, 7))[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_and_positions_are_those_of_receivers_and_senders(backend):
    q, k, v, message = problem(6, 6)
    mask = masks.causal() & ~masks.strided(3)
    want, _ = oracle(q, k, v, message, mask.dense(6).expand(2, 3, 6, 6))
    torch.testing.assert_close(ops.reversed_attention(q, k, v, log_message=message, mask=mask, backend=backend), want)
    rows, columns = torch.tensor([5, 1, 3, 0, 4, 2]), torch.tensor([2, 0, 1, 5, 3, 4])
    want, _ = oracle(q, k, v, message, mask.at(rows, columns).expand(2, 3, 6, 6))
    got = ops.reversed_attention(q, k, v, log_message=message, mask=mask, q_pos=columns, k_pos=rows, backend=backend)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_absent_tokens_reach_nothing(backend):
    q, k, v, message = problem(grad=True)
    valid = torch.tensor([[True] * 6 + [False]] * 2)
    there = torch.tensor([[False] + [True] * 4] * 2)
    bad = [t.detach().clone() for t in (q, k, v, message)]
    bad[0][:, :, 6], bad[1][:, :, 0], bad[2][:, :, 6] = float("nan"), float("inf"), float("nan")
    for t in bad:
        t.requires_grad_()
    given = dict(valid=valid, receiver_valid=there, backend=backend)
    want = ops.reversed_attention(q, k, v, log_message=message, **given)
    got = ops.reversed_attention(*bad[:3], log_message=bad[3], **given)
    torch.testing.assert_close(got, want)
    for ours, theirs in zip(
        torch.autograd.grad(got.sum(), bad), torch.autograd.grad(want.sum(), (q, k, v, message)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    assert not got[:, :, 0].any()


def test_messages_of_nothing_and_far_below_one():
    q, k, v, message = problem()
    silent = message.clone()
    silent[:, :, 2] = float("-inf")
    for backend in BACKENDS:
        out = ops.reversed_attention(q, k, v, log_message=silent, backend=backend)
        other = v.clone()
        other[:, :, 2] = 7.0
        torch.testing.assert_close(ops.reversed_attention(q, k, other, log_message=silent, backend=backend), out)
        # The product of many gates leaves float16 and is still a number here.
        half = [t.half() for t in (q * 8, k * 8, v)]
        faint = ops.reversed_attention(*half, log_message=message.float() - 12, backend=backend)
        assert faint.dtype == torch.float16 and faint.abs().max() > 0


def test_small_maps_are_held_whole_large_ones_never():
    q, k, v, _ = problem()
    assert attnlib.explain("reversed_attention", q, k, v).startswith("runs: eager\npassed over: passes: N * M = 35")
    large = [t.new_zeros(1, 1, 256, 4) for t in (q, k, v)]
    assert attnlib.explain("reversed_attention", *large).startswith("runs: passes")
    assert "cannot return them" in attnlib.explain("reversed_attention", *large, return_weights=True)
    torch.manual_seed(0)
    dropped, weights = ops.reversed_attention(q, k, v, dropout_p=0.5, return_weights=True)
    assert not torch.allclose(dropped, weights @ v)


def test_bad_arguments_are_named():
    q, k, v, message = problem()
    for given, words in (
        (dict(v=v[:, :, 1:]), r"v must be \(B, H, M, Dv\)"), (dict(v=v.float()), "share one floating dtype"),
        (dict(log_message=message[:, :1]), "log_message must be"), (dict(valid=torch.ones(2, 5).bool()), "valid"),
        (dict(receiver_valid=torch.ones(2, 7).bool()), "valid"), (dict(mask=torch.ones(7, 5).bool()), "mask"),
        (dict(backend="tiled"), "possible: .'passes', 'eager'"), (dict(dropout_p=0.5, backend="passes"), "dropout"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=words):
            ops.reversed_attention(**{**dict(q=q, k=k, v=v), **given})
