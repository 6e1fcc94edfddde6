"""Linear layers that are no longer what they were: adapters, quantized layers and hooks act wherever a layer acts."""

import copy
import warnings

import pytest
import torch
from table import rows
from torch import Tensor, nn

import attnlib
from attnlib.check import Case
from attnlib.check.subject import Subject
from attnlib.nn.layers import ConvNorm, DepthwiseConv

CASES = [pytest.param(row, id=row.id) for row in rows()]

#: Parts that a setting has switched off: a cached metric is not deduced again.
UNUSED = {
    "pldr-llm-plga-cached": "learner.", "sparsifiner-dense": "cheap_",
    "dual-token-vit": "token_mlp.", "dual-token-vit-steps": "token_mlp.",  # read what a block before hands on
}  # fmt: skip
#: What chooses keys, without a gradient; a loss of its own trains it.
CHOOSING = {"sparsifiner": "cheap_"}


class Adapted(nn.Module):
    """As PEFT wraps a layer: no ``nn.Linear`` itself, and ``weight`` is that of the layer inside, adapter left out."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.b = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


def linears(m: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    return [(parent, name, f) for parent in m.modules() for name, f in parent.named_children() if type(f) is nn.Linear]


@pytest.mark.parametrize("case", CASES)
def test_adapters_and_hooks_act(case: Case) -> None:
    """Merged into the weights they give the same answer, and each of them gets a gradient."""
    s = Subject(case)
    x, context = s.x(), s.context(s.scene)
    m = s.fresh()
    heard: set[str] = set()
    names = {f: name for name, f in m.named_modules() if type(f) is nn.Linear}
    handles = [f.register_forward_hook(lambda f, args, y: heard.add(names[f])) for f in names]
    unused = UNUSED.get(case.id, " ")
    plan = s.plan(m, x, context)
    y = s.y(m, x, context, s.scene, **plan)
    silent = {name for name in names.values() if name not in heard and not name.startswith(unused)}
    assert not silent, f"hooks on {sorted(silent)} are not called"
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(s.y(m, x, context, s.scene, **plan), y)

    wrapped, merged = copy.deepcopy(m), copy.deepcopy(m)
    torch.manual_seed(1)
    for (parent, name, f), (_, _, twin) in zip(linears(wrapped), linears(merged), strict=True):
        adapter = Adapted(f)
        setattr(parent, name, adapter)
        with torch.no_grad():
            twin.weight += adapter.b.weight @ adapter.a.weight
    if not any(isinstance(f, Adapted) for f in wrapped.modules()):
        return
    y = s.y(wrapped, x, context, s.scene, **plan)
    torch.testing.assert_close(y, s.y(merged, x, context, s.scene, **plan), rtol=1e-6, atol=1e-6)
    y.square().sum().backward()
    for name, p in wrapped.named_parameters():
        if name.endswith("b.weight") and not name.startswith((unused, CHOOSING.get(case.name, " "))):
            assert p.grad is not None, name


@pytest.mark.parametrize("case", CASES)
def test_dynamic_quantization_runs(case: Case) -> None:
    s = Subject(case)
    m, x, context = s.fresh(torch.float32), s.x(dtype=torch.float32), s.context(s.scene, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, dtype=torch.qint8)
    y = s.y(small, x, context, s.scene)
    assert y.shape == x.shape and bool(y.isfinite().all())


def test_what_cannot_be_read_through_a_wrapper_is_refused() -> None:
    m = attnlib.create("shvit", dim=16, partial_dim=8).eval()
    m.qkv.linear = Adapted(m.qkv.linear)
    with pytest.raises(TypeError, match="folding a norm reads the weights of a layer whose place Adapted has taken"):
        attnlib.deploy(m)
    stem = ConvNorm(3, 8, 3, 2)
    stem.conv = DepthwiseConv(3, 3)
    with pytest.raises((TypeError, AttributeError), match="DepthwiseConv"):
        stem(torch.randn(1, 8, 8, 3))
