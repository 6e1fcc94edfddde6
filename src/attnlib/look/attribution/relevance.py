"""Layer-wise relevance propagation by a table of rules: what each part of the input brings of a logit.

A layer that computes ``y = sum_i w_i x_i`` hands the relevance ``R`` of its outputs down in proportion to what each
input brought, ``R_i = x_i sum_j w_ij R_j / y_j``. Rules differ in which products count:

==============  ======================================================================================
``"0"``         all, ``x_i w_ij``
``"epsilon"``   all, with ``epsilon sign(y_j)`` added to ``y_j``, which takes relevance away
``"z+"``        the positive products
``"alphabeta"`` ``alpha`` times the positive ones minus ``beta = alpha - 1`` times the negative ones
``"gamma"``     all, those of the output's sign weighing ``1 + gamma``: between rule 0 and ``"z+"``
``"zB"``        ``x w - l max(w, 0) - h min(w, 0)`` for inputs within ``l .. h``: pixels
``"flat"``      every input that is reached alike
==============  ======================================================================================

Activations hand relevance on as it is; maximum pooling to where the maximum was; means as what they are, linear; a sum
of branches in proportion to its terms. A bias takes its share of relevance, and what of it is handed on is that much
less (rule 0): without biases, and where nothing is stabilised, ``sum(R) = logit``. Batch norms are folded into the
layer before them.

Reference: Bach et al., 2015 (layer-wise relevance propagation); Montavon et al., 2017 (z^B) and 2019 (gamma; for inputs
and outputs of any sign as zennit 0.5 has it, https://github.com/chr5tphr/zennit); Li, Tian, Mueller and
Chen, 2019, "Beyond saliency: understanding convolutional neural networks from saliency prediction on layer-wise
relevance propagation" (https://arxiv.org/abs/1712.08268).
"""

from __future__ import annotations

import copy
import fnmatch
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.grad import conv1d_input, conv2d_input, conv3d_input

from ...checks import check_real, check_type, describe
from ...hooks.tape import quantized, score_of
from .integrated import laid_out

LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
MAXIMA = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
#: Layers that hand relevance on as it is.
PASSES = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.ReLU, nn.ReLU6,
    nn.LeakyReLU, nn.GELU, nn.SiLU, nn.ELU, nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Softplus,
)  # fmt: skip
#: Layers that only move numbers.
SHAPES = (nn.Flatten, nn.Unflatten)
RULES = ("0", "epsilon", "z+", "alphabeta", "gamma", "zB", "flat")


@dataclass(frozen=True)
class Rule:
    """A rule and its numbers.

    Args:
        name: one of ``RULES``.
        epsilon: added to denominators, with their sign; 0 is +.
        alpha: weight of the positive products in ``"alphabeta"``, at least 1.
        gamma: additional weight, in ``"gamma"``, of the products that have their output's sign.
        low, high: of the inputs in ``"zB"``: numbers, or tensors of the shape of one input (or (C, 1, 1)).
        signed: add ``epsilon`` with the sign of the denominator; the release does not.
        inputs: ``"z+"`` counts positive products (``"products"``), or inputs times positive weights whatever the
            input's sign (``"weights"``), as the release does.
        biases: whether they are in the denominator. ``None``: for rules 0, epsilon and gamma only.
    """

    name: str = "epsilon"
    epsilon: float = 1e-9
    alpha: float = 2.0
    low: Any = None
    high: Any = None
    signed: bool = True
    inputs: str = "products"
    biases: bool | None = None
    gamma: float = 0.25

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise ValueError(f"rule {self.name!r} is not possible; choose one of {list(RULES)}")
        check_real("epsilon", self.epsilon, least=0.0)
        check_real("alpha", self.alpha, least=1.0)
        check_real("gamma", self.gamma, least=0.0)
        if self.inputs not in ("products", "weights"):
            raise ValueError(f"inputs={self.inputs!r} is not possible; choose one of ['products', 'weights']")
        if self.name == "zB" and (self.low is None or self.high is None):
            raise ValueError("rule 'zB' needs low= and high=, the least and the largest value of an input")


#: Rules of the release: convolutions 0, with their biases; fully connected layers z+ by weights; epsilon unsigned.
COMPAT: dict[Any, Rule] = {
    nn.Linear: Rule("z+", signed=False, inputs="weights"),
    nn.Conv2d: Rule("0", signed=False),
}


def _over(relevance: Tensor, by: Tensor, rule: Rule) -> Tensor:
    """``relevance / by``, stabilised; where nothing was brought, nothing is handed on."""
    if rule.signed:
        if rule.epsilon > 0:
            away = torch.copysign(by.new_tensor(rule.epsilon), by + 0.0)  # -0.0 counts as 0, whose sign is +
            return relevance / away.add_(by)
        return torch.where(by == 0, 0, relevance / torch.where(by == 0, 1, by))
    return relevance / (by + rule.epsilon)


def linear_relevance(
    run: Callable[..., Tensor], x: Tensor, w: Tensor, b: Tensor | None, r: Tensor, rule: Rule
) -> Tensor:
    """Relevance of ``x`` from ``r`` of ``y = run(x, w, b)``, which is linear in ``x`` and ``w``."""
    biased = rule.name in ("0", "epsilon", "gamma") if rule.biases is None else rule.biases

    def hand_down(parts: list[tuple[Tensor, Tensor]], bias: Tensor | None, r: Tensor) -> Tensor:
        with torch.enable_grad():
            xs = [p.detach().requires_grad_() for p, _ in parts]
            z = run(xs[0], parts[0][1], bias)
            for p, (_, weight) in zip(xs[1:], parts[1:], strict=True):
                z = z + run(p, weight, None)
            s = _over(r, z.detach(), rule)
            grads = torch.autograd.grad(z, xs, s)
        return sum(p.detach() * g for p, g in zip(xs, grads, strict=True))  # type: ignore[return-value]

    bias = b if biased else None
    if rule.name in ("0", "epsilon"):
        return hand_down([(x, w)], bias, r)
    if rule.name == "flat":
        return hand_down([(torch.ones_like(x), torch.ones_like(w))], None, r)
    plus, minus = w.clamp(min=0), w.clamp(max=0)
    up, down = x.clamp(min=0), x.clamp(max=0)
    if rule.name == "zB":
        low, high = (torch.as_tensor(v, dtype=x.dtype, device=x.device).expand_as(x) for v in (rule.low, rule.high))
        return hand_down([(x, w), (low, -plus), (high, -minus)], bias, r)
    if rule.name == "z+":
        parts = [(x, plus)] if rule.inputs == "weights" else [(up, plus), (down, minus)]
        return hand_down(parts, None if bias is None else bias.clamp(min=0), r)
    if rule.name == "gamma":
        y = run(x, w, bias)
        more, less = w + rule.gamma * plus, w + rule.gamma * minus
        biases = [None if bias is None else bias + rule.gamma * part for part in _signs(bias)]
        risen = hand_down([(up, more), (down, less)], biases[0], torch.where(y > 0, r, 0))
        return risen + hand_down([(up, less), (down, more)], biases[1], torch.where(y < 0, r, 0))
    first = hand_down([(up, plus), (down, minus)], None if bias is None else bias.clamp(min=0), r * rule.alpha)
    if rule.alpha == 1:
        return first
    last = hand_down([(up, minus), (down, plus)], None if bias is None else bias.clamp(max=0), r * (1 - rule.alpha))
    return first + last


def _signs(b: Tensor | None) -> tuple[Any, Any]:
    """What is positive and what is negative."""
    return (None, None) if b is None else (b.clamp(min=0), b.clamp(max=0))


_CONVOLVE = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


def runner(module: nn.Module) -> Callable[..., Tensor]:
    if isinstance(module, nn.Linear):
        return F.linear
    kind = next(k for k in _CONVOLVE if isinstance(module, k))
    if module.padding_mode != "zeros":  # type: ignore[union-attr]
        raise ValueError(f"a convolution padded by {module.padding_mode!r} has no rule; possible is 'zeros'")  # type: ignore[union-attr]

    def run(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return _CONVOLVE[kind](x, w, b, module.stride, module.padding, module.dilation, module.groups)  # type: ignore

    return run


def _input_gradient(module: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor] | None:
    """From a gradient of what a linear layer gives to one of what it read; ``None`` where that needs another run."""
    runner(module)  # refuses padding without a rule
    w: Any = module.weight
    if isinstance(module, nn.Linear):
        return lambda s: s @ w
    settings: Any = module.stride, module.padding, module.dilation, module.groups
    if isinstance(module.padding, str):
        return None
    back = {nn.Conv1d: conv1d_input, nn.Conv2d: conv2d_input, nn.Conv3d: conv3d_input}
    kind = next(k for k in back if isinstance(module, k))
    return lambda s: back[kind](x.shape, w, s, *settings)


def _moved(function: Callable[[Tensor], Tensor], x: Tensor, r: Tensor) -> Tensor:
    """Relevance carried back along what only moves or picks numbers: the gradient of it."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(function(x), x, r)[0]


def _proportional(function: Callable[[Tensor], Tensor], x: Tensor, r: Tensor, rule: Rule) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = function(x)
        s = _over(r, y.detach(), rule)
        return x.detach() * torch.autograd.grad(y, x, s)[0]


def fold_norms(graph: fx.GraphModule) -> fx.GraphModule:
    """Batch norms put into the linear layers before them; one whose layer is used elsewhere too is refused later."""
    modules = dict(graph.named_modules())
    calls: dict[str, int] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            calls[node.target] = calls.get(node.target, 0) + 1
    for node in list(graph.graph.nodes):
        if node.op != "call_module" or not isinstance(norm := modules[node.target], NORMS):
            continue
        before = node.args[0]
        if before.op != "call_module" or len(before.users) != 1 or calls[before.target] > 1 or calls[node.target] > 1:
            continue
        layer = modules[before.target]
        if not isinstance(layer, LINEAR) or norm.running_var is None or norm.running_mean is None:
            continue
        scale = (norm.running_var + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight
        shift = -norm.running_mean if layer.bias is None else layer.bias - norm.running_mean
        bias = shift * scale if norm.bias is None else shift * scale + norm.bias
        layer.weight = nn.Parameter((layer.weight * scale.view(-1, *[1] * (layer.weight.dim() - 1))).detach())
        layer.bias = nn.Parameter(bias.detach())
        node.replace_all_uses_with(before)
        graph.graph.erase_node(node)
    graph.graph.lint()
    graph.recompile()
    return graph


class _Keep(fx.Interpreter):
    """Runs a graph and keeps what every node read and gave, safe from what works in place."""

    def __init__(self, graph: fx.GraphModule):
        super().__init__(graph)
        self.given: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        self.given[n] = out.clone() if isinstance(out, Tensor) else out
        return out


_MOVES = {torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, torch.permute, torch.transpose}
_MOVE_METHODS = {"flatten", "view", "reshape", "squeeze", "unsqueeze", "permute", "transpose", "contiguous"}
_ADDS = {operator.add, operator.iadd, torch.add}
_PASS_FUNCTIONS = {F.relu, torch.relu, F.relu_, torch.relu_, F.gelu, F.silu, F.dropout, torch.tanh, torch.sigmoid}
_PASS_METHODS = {"relu", "relu_", "tanh", "sigmoid"}


def rule_for(rules: Mapping[Any, Rule | str], name: str, module: nn.Module | None, default: Rule) -> Rule:
    """By name first, exact before pattern, then by class, the nearest one."""
    found: Rule | str | None = rules.get(name)
    if found is None:
        found = next((r for k, r in rules.items() if isinstance(k, str) and fnmatch.fnmatchcase(name, k)), None)
    if found is None and module is not None:
        found = next((rules[k] for k in type(module).__mro__ if k in rules), None)
    if found is None:
        return default
    return Rule(found) if isinstance(found, str) else found


def check_rules(rules: Mapping[Any, Any], modules: Mapping[str, nn.Module]) -> None:
    for key, rule in rules.items():
        if not isinstance(rule, (Rule, str)):
            raise TypeError(f"rules[{key!r}] must be a Rule or one of {list(RULES)}, got {describe(rule)}")
        if isinstance(key, str) and not any(fnmatch.fnmatchcase(name, key) for name in modules):
            raise ValueError(f"rules: no module is called {key!r}; there are {list(modules)[:40]}")


@torch.inference_mode(False)
@torch.no_grad()
def relevance(
    model: nn.Module,
    x: Tensor,
    target: int | Sequence[int] | Tensor | None = None,
    rules: Mapping[Any, Rule | str] | None = None,
    default: Rule | str = "epsilon",
    compat: bool = False,
) -> Tensor:
    """The relevance of every number of the input for a logit of each sample.

    Args:
        model: a network that ``torch.fx`` can trace, in evaluation mode, of linear layers and convolutions, batch norms
            behind them, activations, pools, sums of branches, and what moves numbers.
        x: (B, ...) its input.
        target: class, one or one per sample; the most likely one by default.
        rules: by path, pattern of paths, or class of module; a :class:`Rule`, or its name.
        default: the rule of layers without one in ``rules``, and of means and sums.
        compat: as the authors' code: ``COMPAT`` for rules, biases in convolutions' denominators, pools as it has them.

    Returns:
        of the shape of ``x``; a map is the sum over its channels, ``relevance(...).sum(1)``.

    Raises:
        ValueError: a module or function without a rule, by its name; quantized weights; training mode.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[1.0, -2.0]])
    >>> bool(torch.allclose(relevance(model, x, 0), x * model.weight))
    True
    """
    if (where := quantized(model)) is not None:
        raise ValueError(f"{where} is quantized, and no gradient passes through it; load floating-point weights")
    if any(m.training for m in model.modules() if isinstance(m, (*NORMS, nn.Dropout))):
        raise ValueError("the model is in training mode, where norms and dropout depend on the batch; call eval()")
    try:
        whole = copy.deepcopy(model)
        graph = fx.symbolic_trace(whole if next(whole.children(), None) is not None else nn.Sequential(whole))
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot be traced by torch.fx: {error}; transformer_relevance() needs no trace"
        ) from error
    graph = fold_norms(graph)
    modules = {n: m for n, m in graph.named_modules() if n}  # of a layer alone: "0"
    check_type("rules", rules, (Mapping, type(None)), "a dictionary of rules by module path, pattern or class")
    check_type("default", default, (Rule, str), f"a Rule or one of {list(RULES)}")
    table: dict[Any, Rule | str] = {**(COMPAT if compat else {}), **(rules or {})}
    check_rules(table, modules)
    base = Rule(default) if isinstance(default, str) else default

    def handed_down(x: Tensor) -> Tensor:
        keep = _Keep(graph)
        logits = keep.run(x.clone())  # a plain tensor, also where the caller is in inference mode
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            raise ValueError(f"the model must give classes (B, K), got {describe(logits)}")
        seed = _seed(logits, target)
        flow: dict[fx.Node, Tensor] = {}

        def give(node: Any, r: Tensor) -> None:
            flow[node] = flow[node] + r if node in flow else r

        for node in reversed(list(graph.graph.nodes)):
            if node.op == "output":
                give(node.args[0], seed)
            elif node.op == "placeholder":
                return flow.get(node, torch.zeros_like(x))
            elif node in flow:
                _back(node, flow.pop(node), keep.given, modules, table, base, compat, give)
        raise ValueError("the model has no input that the logits depend on")

    return laid_out(handed_down, x)[0].contiguous()


def _seed(logits: Tensor, target: int | Sequence[int] | Tensor | None) -> Tensor:
    if target is None:
        index = logits.argmax(1)
    else:
        score_of(logits, target)  # refuses what is no class
        index = torch.as_tensor(target, device=logits.device).expand(len(logits))
    return torch.zeros_like(logits).scatter(1, index[:, None], logits.gather(1, index[:, None]))


def _back(
    node: fx.Node, r: Tensor, given: dict[fx.Node, Any], modules: Mapping[str, nn.Module],
    table: Mapping[Any, Rule | str], base: Rule, compat: bool, give: Callable[[Any, Tensor], None],
) -> None:  # fmt: skip
    """Hand the relevance of one node down to what it read."""
    source: Any = node.args[0] if node.args else None
    name = str(node.target)
    if node.op == "call_module":
        module = modules[name]
        x, rule = given[source], rule_for(table, name, module, base)
        if isinstance(module, LINEAR):
            weights = module.weight, module.bias
            back = _input_gradient(module, x) if rule.name in ("0", "epsilon") and rule.biases is not False else None
            if back is not None:  # what the layer gave is at hand, so it need not run again
                return give(source, x * back(_over(r, given[node], rule)))
            return give(source, linear_relevance(runner(module), x, *weights, r, rule))  # type: ignore[arg-type]
        if isinstance(module, PASSES):
            return give(source, r)
        if isinstance(module, MAXIMA):
            if compat and isinstance(module, nn.MaxPool2d):
                return give(source, _released_pool(module, x, given[node], r))
            return give(source, _moved(module, x, r))
        if isinstance(module, POOLS):
            return give(source, _proportional(module, x, r, rule))
        if isinstance(module, SHAPES):
            return give(source, r.reshape(x.shape))
        raise ValueError(
            f"module {name!r} ({type(module).__name__}) has no rule; there are rules for linear layers, convolutions, "
            "batch norms right behind them, activations, pools and Flatten; transformer_relevance() has others, for "
            "attention and for layer norms"
        )
    rest, kwargs = _values(node.args[1:], given), _values(node.kwargs, given)
    if node.op == "call_function":
        function = node.target
        if function in _ADDS and len(node.args) == 2 and not node.kwargs:
            terms = [a for a in node.args if isinstance(a, fx.Node)]
            values: list[Any] = [given[a] if isinstance(a, fx.Node) else a for a in node.args]
            s = _over(r, values[0] + values[1], base)
            for term in terms:
                give(term, _like(given[term] * s, given[term]))
            return None
        if function in _PASS_FUNCTIONS:
            return give(source, r)
        if function in _MOVES or function is F.max_pool2d or function is F.adaptive_max_pool2d:
            return give(source, _moved(lambda t: function(t, *rest, **kwargs), given[source], r))  # type: ignore[operator]
        if function in (F.avg_pool2d, F.adaptive_avg_pool2d, torch.mean):
            call = lambda t: function(t, *rest, **kwargs)  # type: ignore[operator]  # noqa: E731
            return give(source, _proportional(call, given[source], r, base))
        if function in (getattr, operator.getitem) and not isinstance(given[node], Tensor):
            return None
    elif node.op == "call_method":
        if name in _PASS_METHODS:
            return give(source, r)
        if name in _MOVE_METHODS:
            return give(source, _moved(lambda t: getattr(t, name)(*rest, **kwargs), given[source], r))
        if name == "mean":
            return give(source, _proportional(lambda t: t.mean(*rest, **kwargs), given[source], r, base))
    elif node.op == "get_attr":
        return None  # a constant keeps the relevance that it took
    called = getattr(node.target, "__name__", name)
    raise ValueError(f"{called!r} (node {node.name!r}) has no rule; write it as one of the layers that have")


def _values(value: Any, given: dict[fx.Node, Any]) -> Any:
    return fx.node.map_arg(value, lambda n: given[n])


def _like(r: Tensor, x: Tensor) -> Tensor:
    """Relevance of a term that was spread over axes, added up again."""
    return r.sum_to_size(x.shape) if r.shape != x.shape else r


def _released_pool(pool: nn.MaxPool2d, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Unpooling writes: where windows overlap and one place is the maximum of several, one window's share stays."""
    settings = pool.kernel_size, pool.stride, pool.padding
    indices = F.max_pool2d(x, *settings, pool.dilation, pool.ceil_mode, True)[1]
    s = (r / (y + 1e-9)).flatten(2)
    flat = x.new_zeros(*x.shape[:2], x.shape[2] * x.shape[3]).scatter(2, indices.flatten(2), s)
    return x * flat.view_as(x)
