"""What surrounds a mechanism does not change its answer: default types and devices, storage that was only set aside."""

import pathlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from table import rows
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attnlib
from attnlib.check import Case
from attnlib.check.subject import Subject

CASES = [pytest.param(row, id=row.id) for row in rows()]


@contextmanager
def default(dtype: torch.dtype = torch.float32, device: str | None = None) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def answers(s: Subject, m: nn.Module, x: Tensor, context: Tensor | None) -> list[Tensor]:
    """Of all tokens, of some of them, and step by step."""
    found = [s.y(m, x, context, s.scene)]
    if s.claims.valid:
        valid = torch.ones(x.shape[:-1], dtype=torch.bool, device="cpu")
        valid.view(len(valid), -1)[0, -1] = False
        found.append(s.y(m, x, context, s.scene, valid=valid))
    if s.claims.streaming:
        y, state = m.step(x[:, :3])
        found += [y, m.step(x[:, 3:5], state)[0]]
    return found


def same(found: list[Tensor], expected: list[Tensor], atol: float) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=atol, atol=atol)


@pytest.mark.parametrize("case", CASES)
def test_built_without_storage_and_loaded(case: Case) -> None:
    s = Subject(case)
    m = s.fresh(torch.float32)
    given = s.x(dtype=torch.float32), s.context(s.scene, dtype=torch.float32)
    expected, saved = answers(s, m, *given), {k: v.clone() for k, v in m.state_dict().items()}
    with torch.device("meta"):
        aside, bare = s.build(), s.build()
    aside.to_empty(device="cpu")
    with torch.no_grad():
        for t in (*aside.parameters(), *aside.buffers()):
            t.fill_(float("nan") if t.is_floating_point() else 0)
    aside.load_state_dict(saved)
    bare.load_state_dict(saved, assign=True)
    for twin in (aside, bare):
        same(answers(s, twin.eval(), *given), expected, 1e-6)


@pytest.mark.parametrize("case", CASES)
def test_default_types_and_devices(case: Case) -> None:
    s = Subject(case)
    m = s.fresh(torch.float32)
    given = s.x(dtype=torch.float32), s.context(s.scene, dtype=torch.float32)
    expected = answers(s, m, *given)
    for dtype, device in ((torch.bfloat16, None), (torch.float64, None), (torch.float32, "meta")):
        with default(dtype, device):
            found = answers(s, m, *given)
        same(found, expected, 1e-6)
    double = s.x(), s.context(s.scene)
    exact = answers(s, s.fresh(), *double)
    with default(torch.float64):
        wide = s.build().eval()
    assert {p.dtype for p in wide.parameters()} <= {torch.float64}
    wide.load_state_dict(s.fresh().state_dict())
    same(answers(s, wide, *double), exact, 1e-9)
    with default(torch.bfloat16):
        narrow = s.build().eval()
    narrow.float().load_state_dict(m.state_dict())
    same(answers(s, narrow, *given), expected, 1e-6)


def test_what_is_not_saved_is_no_buffer() -> None:
    """Such a buffer holds anything after ``to_empty``, and is rounded when a model changes its type."""
    root = pathlib.Path(attnlib.__file__).parent
    assert not [p for p in root.rglob("*.py") if "persistent=False" in p.read_text()]


@pytest.mark.parametrize("name", attnlib.normalizers.normalizer_names())
def test_normalizers_keep_the_type_of_the_scores(name: str) -> None:
    scores = torch.randn(2, 5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    sharp = attnlib.normalizers.Activated(power=3.0, offset=0.3)
    for normalizer in (attnlib.normalizers.as_normalizer(name), sharp):
        expected = normalizer.weights(scores)
        for dtype in (torch.bfloat16, torch.float64):
            with default(dtype):
                found = normalizer.weights(scores)
            assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_slopes_are_never_coarse() -> None:
    expected = attnlib.positions.alibi_slopes(12)
    with default(torch.bfloat16):
        assert torch.equal(attnlib.positions.alibi_slopes(12), expected)
    with default(device="meta"):
        at = torch.arange(5, device="cpu")
        assert attnlib.positions.alibi(12, at, at).dense().device.type == "cpu"


@pytest.mark.parametrize("case", CASES)
def test_under_checkpoints_of_both_kinds_buffers_change_once(case: Case) -> None:
    s = Subject(case)
    found = []
    for reentrant in (None, False, True):
        m = s.fresh(train=True)
        x, context = s.x().requires_grad_(), s.context(s.scene)
        torch.manual_seed(0)
        for _ in range(2):  # the second time on what the first left
            y = (
                s.y(m, x, context, s.scene)
                if reentrant is None
                else checkpoint(lambda x, m=m, context=context: s.y(m, x, context, s.scene), x, use_reentrant=reentrant)
            )
            y.square().sum().backward()
        assert x.grad is not None
        found.append((y, x.grad, *(b for _, b in sorted(m.named_buffers()))))
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


class Counter(attnlib.nn.Mechanism):
    """Adds how often it ran, and counts it."""

    def __init__(self, dim: int):
        super().__init__(dim)
        self.register_buffer("calls", torch.zeros(()))

    def mix(self, x: Tensor) -> Tensor:  # type: ignore[override]
        calls = self.calls + 1
        if self.training:
            self.calls.copy_(calls)
        return x * calls


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_runs_again_finds_its_buffers(reentrant: bool) -> None:
    m = Counter(1)
    x = torch.ones(1, 1, 1, requires_grad=True)

    def run(f, *args):
        return checkpoint(f, *args, use_reentrant=reentrant)

    # by itself, twice in one checkpoint, in a checkpoint within one, and in one of two that are both recomputed later
    y = run(m, x)
    y = run(lambda x: m(m(x)), y)
    y = run(lambda x: run(m, x) * 1, y)
    assert m.calls == 4
    y.sum().backward()
    assert x.grad is not None and float(x.grad) == 1 * 2 * 3 * 4 and m.calls == 4
    m.eval()
    run(m, x).sum().backward()
    assert m.calls == 4
