"""Relevance through transformers: attention, norms, gates and activations each hand down what they got.

Every rule is a change of a derivative, so that relevance is *input times changed gradient*, one forward and one
backward whatever the depth. Of a layer that computes ``y = f(x)``:

=============  ==================  =============================================================================
``attention``  ``"constant"``      the weights ``p = softmax(q k)`` count as constants, ``R_v = v sum_i p_ij R_i / y_i``
                                   (Ali et al., 2022, "AH"); relevance is conserved
               ``"attnlrp"``       products ``p v`` and ``q k`` give half to either side, softmax is its first-order
                                   term, ``R_i = x_i (R_i - p_i sum_j R_j)`` (Achtibat et al., 2024, AttnLRP)
               ``"gradient"``      as it is
``norm``       ``"constant"``      standard deviations count as constants (both papers)
               ``"gradient"``      as it is
``activation`` ``"identity"``      ``R_x = R_y``: the derivative becomes ``f(x) / x``
               ``"gradient"``      as it is
=============  ==================  =============================================================================

A product of two branches, such as a gated feed-forward's, gives half to either where ``activation="identity"``. Linear
layers follow a rule of :mod:`attnlib.look.attribution.relevance`, ``"0"`` unless said otherwise, and so do the
projections of ``torch.nn.MultiheadAttention``: those of queries, keys and values by the module's name or class, the
last by that of its ``out_proj``. What biases bring is theirs: without biases, and with ``attention="constant"``,
``sum(R) = logit``.

Nothing has to be traceable: functions of torch are met as they are called, in any model, and one without a rule is
refused by its name; where everything is ``"gradient"`` and linear layers follow rule 0, no function needs one.

Reference: Ali et al., 2022, "XAI for Transformers: Better Explanations through Conservative Propagation"
(https://arxiv.org/abs/2202.07304); Achtibat et al., 2024, "AttnLRP: Attention-Aware Layer-Wise Relevance Propagation
for Transformers" (https://arxiv.org/abs/2402.05602).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...checks import check_choice, check_int, check_type
from ...hooks.tape import Target, quantized, score_of
from .integrated import Place
from .relevance import LINEAR, RULES, Rule, check_rules, linear_relevance, rule_for, runner

ATTENTION = ("constant", "attnlrp", "gradient")
NORM = ("constant", "gradient")
ACTIVATION = ("identity", "gradient")

#: What is linear, moves or picks numbers: its derivative is its rule.
_PLAIN = frozenset(
    "linear conv1d conv2d conv3d batch_norm add radd iadd sub rsub isub neg cat concat stack sum mean nanmean "
    "reshape view view_as reshape_as transpose permute flatten unflatten unsqueeze squeeze expand expand_as "
    "repeat repeat_interleave contiguous clone to float double half bfloat16 type type_as getitem setitem select "
    "index_select gather take_along_dim narrow chunk split split_with_sizes tensor_split unbind movedim moveaxis "
    "swapaxes swapdims roll flip pad masked_fill masked_scatter where dropout dropout1d dropout2d interpolate "
    "avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d max_pool2d amax max t adjoint broadcast_to "
    "unfold fold cumsum tril triu diagonal index_add scatter scatter_add pixel_shuffle pixel_unshuffle checkpoint "
    "requires_grad copy get atleast_2d lerp".split()
)
_GATES = frozenset("mul rmul imul multiply".split())
_PRODUCTS = frozenset("matmul rmatmul bmm mm mv einsum".split())
_AFFINE = frozenset(("addmm", "baddbmm", "addbmm"))
_QUOTIENTS = frozenset("div truediv true_divide rtruediv rdiv itruediv divide".split())
_SCALES = frozenset("rsqrt sqrt var std norm vector_norm reciprocal".split())
#: 0 at 0, so that ``f(x) / x`` is bounded.
_ACTIVATIONS = frozenset("relu relu6 gelu silu elu selu celu leaky_relu tanh hardtanh hardswish mish".split())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for v in value:
            yield from _tensors(v)
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))


def _live(value: Any) -> bool:
    return any(t.requires_grad for t in _tensors(value))


def _weaker(y: Tensor, share: float) -> Tensor:
    """``y`` whose gradient counts by a share."""
    part = y * share
    return part + (y - part).detach()


def _identity(x: Tensor, y: Tensor) -> Tensor:
    """``y`` as a multiple of ``x``."""
    zero = x == 0
    return x * torch.where(zero, 0, y / torch.where(zero, 1, x)).detach()


class _Rules(TorchFunctionMode):
    """Meets every function of torch that is called on what the varied tensor reaches."""

    def __init__(self, attention: str, norm: str, activation: str):
        super().__init__()
        self.attention, self.norm, self.activation = attention, norm, activation
        #: Rules of linear maps that no module of theirs runs, by the identity of the weight.
        self.by_weight: dict[int, Rule] = {}

    @property
    def plain(self) -> bool:
        """Whether every derivative is left as it is, so that no function has to be met."""
        return self.attention == self.norm == self.activation == "gradient"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled() or not _live((args, kwargs)):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func)).strip("_")
        rule = getattr(self, f"_{name}", None)
        if rule is not None:
            return rule(*args, **kwargs)
        if name in _PLAIN:
            return func(*args, **kwargs)
        if name in _GATES or name in _PRODUCTS:
            out = func(*args, **kwargs)
            halves = self.activation == "identity" if name in _GATES else self.attention != "gradient"
            return _weaker(out, 0.5) if halves and self._both(args, kwargs) else out
        if name in _AFFINE:
            if sum(_live(a) for a in (*args, *kwargs.values())) > 1:
                raise self._refused(func, "more than one of its arguments depends on what is varied")
            return func(*args, **kwargs)
        if name in _QUOTIENTS:
            return self._quotient(func, name, args, kwargs)
        if name in _SCALES:
            return self._constant(func(*args, **kwargs))
        if name in _ACTIVATIONS:
            y = func(*args, **kwargs)
            x = args[0] if args else kwargs["input"]
            return y if self.activation == "gradient" else _identity(x, y)
        out = func(*args, **kwargs)
        if _live(out):
            raise self._refused(func, "it has no rule")
        return out

    @staticmethod
    def _refused(func: Any, why: str) -> ValueError:
        where = getattr(func, "__module__", None) or "torch"
        return ValueError(
            f"{where}.{getattr(func, '__name__', func)} cannot hand relevance down: {why}; rules are there for linear "
            "layers, attention written as softmax of products or as scaled_dot_product_attention, layer and RMS norms, "
            f"products, {', '.join(sorted(_ACTIVATIONS))} and what moves numbers"
        )

    @staticmethod
    def _both(args: Any, kwargs: Any) -> bool:
        return sum(t.requires_grad for t in _tensors((args, kwargs))) > 1

    def _constant(self, value: Any) -> Any:
        return value.detach() if self.norm == "constant" else value

    def _quotient(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        if name.startswith("r"):  # other / self
            return func(self._constant(args[0]), *args[1:], **kwargs)
        if len(args) > 1 and isinstance(args[1], Tensor):
            args = args[0], self._constant(args[1]), *args[2:]
        return func(*args, **kwargs)

    def _pow(self, x: Tensor, exponent: Any, **kwargs: Any) -> Tensor:
        """A power by a number is a product of so many factors; one of -1/2 is a scale."""
        if isinstance(exponent, Tensor) and exponent.dim():
            raise self._refused(torch.pow, "its exponent is a tensor")
        e = float(exponent)
        y = torch.pow(x, exponent)
        if e < 1:
            return self._constant(y)
        return _weaker(y, 1 / e) if self.norm == "constant" and self.activation == "identity" else y

    _ipow = _pow

    def _square(self, x: Tensor) -> Tensor:
        return self._pow(x, 2)

    def _sigmoid(self, x: Tensor) -> Tensor:
        """What sigmoids give are gates: constants, as ``x sigmoid(x)`` is then ``x f(x) / x``."""
        y = torch.sigmoid(x)
        return y if self.activation == "gradient" else y.detach()

    def _var_mean(self, *args: Any, **kwargs: Any) -> Any:
        var, mean = torch.var_mean(*args, **kwargs)
        return self._constant(var), mean

    def _softmax(self, input: Tensor, dim: int | None = None, *_: Any, dtype: Any = None, **__: Any) -> Tensor:
        p = torch.softmax(input, -1 if dim is None else dim, dtype=dtype)
        return p.detach() if self.attention == "constant" else p

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        y = a @ b
        return _weaker(y, 0.5) if self.attention == "attnlrp" and a.requires_grad and b.requires_grad else y

    def _scaled_dot_product_attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
        return self._attended(query, key, value, attn_mask, is_causal, scale)[0]

    def _attended(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        """What heads give, and their weights; rows that read nothing are zeros."""
        scores = self._product(query, key.transpose(-1, -2)) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        weights = self._softmax(scores, -1)
        if mask is not None:
            weights = weights.masked_fill(weights.isnan(), 0)
        return self._product(weights, value), weights

    def _multi_head_attention_forward(
        self, query: Tensor, key: Tensor, value: Tensor, embed_dim_to_check: int, num_heads: int,
        in_proj_weight: Tensor | None, in_proj_bias: Tensor | None, bias_k: Tensor | None, bias_v: Tensor | None,
        add_zero_attn: bool, dropout_p: float, out_proj_weight: Tensor, out_proj_bias: Tensor | None,
        training: bool = True, key_padding_mask: Tensor | None = None, need_weights: bool = True,
        attn_mask: Tensor | None = None, use_separate_proj_weight: bool = False,
        q_proj_weight: Tensor | None = None, k_proj_weight: Tensor | None = None,
        v_proj_weight: Tensor | None = None, static_k: Tensor | None = None, static_v: Tensor | None = None,
        average_attn_weights: bool = True, is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """``torch.nn.MultiheadAttention``: its linear maps by their rules, its heads as attention everywhere else."""
        if static_k is not None or static_v is not None:
            raise self._refused(F.multi_head_attention_forward, "static_k and static_v replace keys and values")
        single = query.dim() == 2
        rows = [t[:, None] if single else t for t in (query, key, value)]  # (N, B, C)
        biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        if use_separate_proj_weight:
            each: Any = (q_proj_weight, k_proj_weight, v_proj_weight)
            rules = [self.by_weight.get(id(w)) for w in each]
        else:
            assert in_proj_weight is not None
            each, rules = in_proj_weight.chunk(3), [self.by_weight.get(id(in_proj_weight))] * 3
        q, k, v = (_by_rule(x, w, b, r) for x, w, b, r in zip(rows, each, biases, rules, strict=True))
        batch = q.shape[1]
        if bias_k is not None and bias_v is not None:
            k, v = (torch.cat([t, extra.expand(1, batch, -1)]) for t, extra in ((k, bias_k), (v, bias_v)))
        if add_zero_attn:
            k, v = (torch.cat([t, t.new_zeros(1, batch, t.shape[-1])]) for t in (k, v))
        q, k, v = (t.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3) for t in (q, k, v))
        mask = _hidden(attn_mask, key_padding_mask, batch, num_heads, key.shape[0], k.shape[2] - key.shape[0], q)
        y, weights = self._attended(q, k, v, mask, False, None)
        out = _by_rule(
            y.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias, self.by_weight.get(id(out_proj_weight))
        )
        given: Tensor | None = None
        if need_weights:
            given = weights.mean(1) if average_attn_weights else weights
            given = given[0] if single else given
        return (out[:, 0] if single else out), given

    def _layer_norm(
        self, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None,
        eps: float = 1e-5, *_: Any,
    ) -> Tensor:  # fmt: skip
        axes = tuple(range(-len(tuple(normalized_shape)), 0))
        wide = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        centred = wide - wide.mean(axes, keepdim=True)
        return self._scaled(input, centred, centred, axes, weight, bias, eps)

    def _rms_norm(
        self, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        axes = tuple(range(-len(tuple(normalized_shape)), 0))
        eps = torch.finfo(input.dtype).eps if eps is None else eps
        wide = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        return self._scaled(input, wide, wide, axes, weight, None, eps)

    def _scaled(
        self, x: Tensor, top: Tensor, spread: Tensor, axes: tuple[int, ...], weight: Tensor | None,
        bias: Tensor | None, eps: float,
    ) -> Tensor:  # fmt: skip
        y = top * self._constant((spread.square().mean(axes, keepdim=True) + eps).rsqrt())
        if weight is not None:
            y = y * weight
        return (y if bias is None else y + bias).to(x.dtype)


class _ByRule(torch.autograd.Function):
    """A linear layer whose gradient is its relevance by a rule, over its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, run: Callable[..., Tensor], w: Tensor, b: Any, rule: Rule) -> Tensor:
        ctx.save_for_backward(x, y)
        ctx.settings = run, w, b, rule
        return y.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        x, y = ctx.saved_tensors
        run, w, b, rule = ctx.settings
        r = linear_relevance(run, x, w, b, g * y, rule)
        return torch.where(x == 0, 0, r / torch.where(x == 0, 1, x)), None, None, None, None, None


def _by_rule(x: Tensor, w: Tensor, b: Tensor | None, rule: Rule | None) -> Tensor:
    """A linear map with the derivative that its rule asks for; rule 0 is its own."""
    if rule is None or not x.requires_grad:
        return F.linear(x, w, b)
    with torch.no_grad():
        y = F.linear(x, w, b)
    return _ByRule.apply(x, y, F.linear, w.detach(), b, rule)  # type: ignore[no-any-return]


def _hidden(
    mask: Tensor | None, padding: Tensor | None, batch: int, heads: int, keys: int, more: int, like: Tensor
) -> Tensor | None:
    """One additive mask (B, H, N, M + more) of ``MultiheadAttention``'s two, in which ``True`` means hidden; ``None``
    where neither is given."""
    if mask is None and padding is None:
        return None

    def added(m: Tensor) -> Tensor:
        if m.dtype == torch.bool:
            return torch.zeros(m.shape, dtype=like.dtype, device=m.device).masked_fill(m, -math.inf)
        return m.to(like.dtype)

    out = like.new_zeros(batch, 1, 1, keys)
    if mask is not None:
        m = added(mask)
        out = out + (m.unflatten(0, (batch, heads)) if m.dim() == 3 else m)
    if padding is not None:
        out = out + added(padding).view(batch, 1, 1, keys)
    return F.pad(out, (0, more))


def _layer(module: nn.Module) -> tuple[Callable[..., Tensor], Tensor, Tensor | None] | None:
    """How a linear layer runs, its weight and bias; GPT-2's layer holds its weight the other way round."""
    if isinstance(module, LINEAR):
        return runner(module), module.weight, module.bias
    if type(module).__name__ == "Conv1D" and isinstance(getattr(module, "weight", None), Tensor):
        return torch.nn.functional.linear, module.weight.T, module.bias  # type: ignore[union-attr,return-value]
    return None


def _changes(rule: Rule) -> bool:
    """Whether a rule is another derivative than the map's own."""
    return rule.name != "0" or rule.biases is False


@contextmanager
def _ruled(model: nn.Module, table: Mapping[Any, Rule | str], base: Rule, mode: _Rules) -> Iterator[None]:
    """Weights without gradients, linear layers and activations by their rules, while the block runs."""
    needed = {p: p.requires_grad for p in model.parameters()}
    handles = []

    def linear(rule: Rule, found: Any) -> Callable[..., Tensor]:
        run, w, b = found

        def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return _ByRule.apply(args[0], output.detach(), run, w.detach(), b, rule) if _live(args) else output

        return after

    def act(module: nn.Module, args: Any, output: Any) -> Any:
        return _identity(args[0], output) if isinstance(output, Tensor) and _live(args) else output

    try:
        for p in needed:
            p.requires_grad_(False)
        for name, module in model.named_modules():
            found = _layer(module)
            if isinstance(module, nn.MultiheadAttention):
                rule = rule_for(table, name, module, base)
                joint = (module.in_proj_weight, module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
                mode.by_weight |= {id(w): rule for w in joint if w is not None and _changes(rule)}
            if found is not None:
                rule = rule_for(table, name, module, base)
                if _changes(rule):
                    mode.by_weight[id(module.weight)] = rule  # where another module runs it, without its hooks
                    handles.append(module.register_forward_hook(linear(rule, found)))
            elif mode.activation == "identity" and type(module).__module__ == "transformers.activations":
                handles.append(module.register_forward_hook(act))
        with nullcontext() if mode.plain and not handles and not mode.by_weight else mode:
            yield
    finally:
        for handle in handles:
            handle.remove()
        for p, value in needed.items():
            p.requires_grad_(value)


@torch.inference_mode(False)
def transformer_relevance(
    model: nn.Module,
    *inputs: Any,
    module: str = "",
    target: Target | None = None,
    attention: str = "constant",
    norm: str = "constant",
    activation: str = "identity",
    rules: Mapping[Any, Rule | str] | None = None,
    default: Rule | str = "0",
    chunk: int | None = None,
    position: int = -1,
    **named: Any,
) -> Tensor:
    """The relevance of every number of the input, or of a module's output, for a logit of each sample.

    Args:
        model: any module, in evaluation mode: BERT-, Llama-, GPT-2-, ViT-like, or written by hand.
        inputs, named: of the model; every tensor whose first axis is the batch's belongs to the samples.
        module: whose output the relevance is of, such as the embedding of tokens; ``""`` is the first input itself.
        target: class or token, one or one per sample, or ``f(output) -> (B,)``; the most likely one by default.
        attention, norm, activation: rules, see above.
        rules: of linear layers, by path, pattern of paths, or class; a :class:`Rule`, or its name: ``"0"``,
            ``"epsilon"``, ``"z+"``, ``"alphabeta"`` or ``"gamma"``.
        default: the rule of linear layers without one in ``rules``.
        chunk: samples at a time, which bounds memory.
        position: of the token whose logits count.

    Returns:
        of the shape of what is varied; what belongs to a token is the sum over its channels.

    Raises:
        ValueError: a function without a rule, by its name; quantized weights; training mode with dropout.

    >>> model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8, bias=False), nn.GELU(), nn.Linear(8, 2, bias=False))
    >>> x = torch.randn(3, 4)
    >>> bool(torch.allclose(transformer_relevance(model.eval(), x, target=1).sum(1), model(x)[:, 1], atol=1e-5))
    True
    """
    for name, value, choices in (
        ("attention", attention, ATTENTION), ("norm", norm, NORM), ("activation", activation, ACTIVATION)
    ):  # fmt: skip
        check_choice(name, value, choices)
    if (where := quantized(model)) is not None:
        raise ValueError(f"{where} is quantized, and no gradient passes through it; load floating-point weights")
    if any(
        m.training and (m.p if isinstance(m, nn.Dropout) else m.dropout) > 0
        for m in model.modules()
        if isinstance(m, (nn.Dropout, nn.MultiheadAttention))
    ):
        raise ValueError("the model is in training mode, where dropout is at random; call eval()")
    check_type("rules", rules, (Mapping, type(None)), "a dictionary of rules by module path, pattern or class")
    check_type("default", default, (Rule, str), f"a Rule or one of {list(RULES)}")
    table, base = dict(rules or {}), Rule(default) if isinstance(default, str) else default
    check_rules(table, dict(model.named_modules()))
    for rule in (base, *(Rule(r) if isinstance(r, str) else r for r in table.values())):
        if rule.name in ("zB", "flat"):
            raise ValueError(f"rule {rule.name!r} gives relevance to inputs of 0, gradients cannot; use relevance()")
    place = Place(model, module, inputs, named)
    full, wanted = place.floating(), place.target(target, position)
    batch = place.batch
    size = max(batch, 1) if chunk is None else check_int("chunk", chunk, least=1)
    out = torch.zeros_like(full)
    mode = _Rules(attention, norm, activation)
    for first in range(0, batch, size):
        rows = torch.arange(first, min(first + size, batch), device=full.device)

        def gradient(point: Tensor, rows: Tensor = rows) -> Tensor:
            point = point.detach().requires_grad_()
            with torch.enable_grad():
                with _ruled(model, table, base, mode):
                    output = place.run(point, rows)
                score = score_of(output, wanted(rows), position)
                if not score.requires_grad:
                    raise ValueError(
                        f"the score does not depend on {module or 'the input'!r} but through what counts as a constant "
                        f"(attention={attention!r}, norm={norm!r})"
                    )
                return torch.autograd.grad(score.sum(), point)[0]

        out[rows] = full[rows] * place.laid_out(gradient, full[rows])
    return out
