"""Power-law graph attention of PLDR-LLM (Gokden, 2025): a metric between queries and keys that the layer deduces."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...grids import Layout
from ...masks import Mask, as_mask
from ...types import Plan, State, Traits, check_choice, exactly, stats_dtype
from ..frame import HeadCall, HeadFrame, Notes, Stream
from ..layers import flat_valid, split_heads, through, zero_invalid
from ..registry import register
from ..released import Released, Rule

METRICS = ("learned", "cached", "fixed")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


class Deductive(NamedTuple):
    """Deductive outputs, (B, H, D, D) each: metric tensor A, A_LM, potential A_P, energy-curvature tensor G."""

    A: Tensor
    A_LM: Tensor
    A_P: Tensor
    G: Tensor


class _SwiGLU(nn.Module):
    """``W3 (silu(W1 x) * W2 x)``, or with another of :data:`ACTIVATIONS`."""

    def __init__(self, dim: int, hidden: int, activation: str = "silu"):
        super().__init__()
        check_choice("activation", activation, ACTIVATIONS)
        self.activation = activation
        self.w1, self.w2, self.w3 = nn.Linear(dim, hidden), nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(ACTIVATIONS[self.activation](self.w1(x)) * self.w2(x))


class _ResidualUnit(nn.Module):
    """``LN(A + f_n(.. f_1(A)))``."""

    def __init__(self, dim: int, hidden: int, depth: int, activation: str = "silu"):
        super().__init__()
        self.layers = nn.Sequential(*(_SwiGLU(dim, hidden, activation) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.layers(x))


class MetricLearner(nn.Module):
    """From the queries' Gram matrix to the energy-curvature tensor; its residual units serve all heads.

    Args:
        num_heads, head_dim: ``H`` and ``D``.
        hidden: hidden width of the SwiGLU layers.
        units: residual units.
        depth: SwiGLU layers in a unit.
        activation: theirs.
    """

    def __init__(self, num_heads: int, head_dim: int, hidden: int, units: int, depth: int, activation: str = "silu"):
        super().__init__()
        self.norm = nn.LayerNorm(head_dim, eps=1e-6)
        self.units = nn.ModuleList(_ResidualUnit(head_dim, hidden, depth, activation) for _ in range(units))
        shape = (num_heads, head_dim, head_dim)
        self.W, self.p, self.a = (nn.Parameter(nn.init.xavier_normal_(torch.empty(shape))) for _ in range(3))
        self.b, self.b_a = (nn.Parameter(torch.zeros(shape)) for _ in range(2))
        _xavier(self)

    def forward(self, q: Tensor, valid: Tensor | None = None) -> Deductive:
        """Deductive outputs from rotated queries ``q`` (B, H, N, D); ``valid`` (B, N)."""
        dtype = stats_dtype(q.dtype)
        if valid is not None:
            q = q.masked_fill(~valid[:, None, :, None], 0.0)
        with exactly(q):
            # A sum over all positions, and powers of numbers near 1e-9: neither survives half precision.
            gram = q.to(dtype).transpose(-2, -1) @ q.to(dtype)
            weight, bias = self.norm.weight.to(dtype), self.norm.bias.to(dtype)
            metric = F.layer_norm(gram, self.norm.normalized_shape, weight, bias, self.norm.eps)
        metric = metric.to(self.norm.weight.dtype)
        for unit in self.units:
            metric = unit(metric)
        with exactly(q):
            metric = metric.to(dtype)
            z = self.W.to(dtype) @ metric + self.b.to(dtype)
            a_lm = z * F.silu(z) + 1e-9
            a_p = a_lm ** self.p.to(dtype)
            return Deductive(metric, a_lm, a_p, self.a.to(dtype) @ a_p + self.b_a.to(dtype))


def _xavier(module: nn.Module) -> None:
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


@register("pldr-llm-plga", "plga", "power-law-graph-attention")
class PowerLawGraphAttention(HeadFrame[Notes]):
    """Bilinear attention ``softmax(q G k^T / sqrt(D)) v`` whose (D, D) metric ``G`` per head comes from the queries.

    With rotated queries and keys, for every sample and head::

        A = LN(q^T q)                        over all positions
        A <- LN(A + f_n(.. f_1(A)))          R residual units of SwiGLU layers f, shared by the heads
        A_LM = iSwiGLU(W A + b) + 1e-9       iSwiGLU(z) = z silu(z) >= 0
        A_P = A_LM ^ p                       element by element
        G = a A_P + b_a

    **The learned metric is not causal**, even with ``causal=True``: the scores of every position depend on later
    queries through ``G``, as in the paper's training; for the same reason it takes no ``mask``. Once trained, ``G``
    hardly depends on the input (see :func:`operator_invariance`), so :meth:`freeze_metric` computes it once: the module
    then skips the learner, is causal, and streams. :meth:`prefill` is the other way to decode: a prompt makes its own
    metric, and :meth:`step` keeps it. ``G = I`` is plain attention.

    Args:
        dim, num_heads, ...: as in :class:`HeadFrame`.
        metric_hidden: hidden width of the learner's SwiGLU layers.
        residual_units: ``R``.
        unit_depth: SwiGLU layers in a residual unit.
        metric: ``"learned"``, or ``"cached"``: from the buffers ``A_LM`` and ``G`` (H, D, D), which start as identity
            and are filled by :meth:`freeze_metric` or by the state dict; ``"fixed"``: the same, and there is no learner
            at all, as in the paper's ablation.
        activation: of the learner's gated layers, one of ``silu``, ``gelu``, ``relu``, ``sigmoid``, ``tanh``.
        compat: ``"authors"``: a learned metric takes masks too, which hide pairs of tokens, and not what the metric
            says of them; value projections start as torch draws them, a slip of theirs.

    Losses (of the learned metric): ``dag_lm``, ``dag_p`` and ``dag_g``, the regulariser :func:`dag_loss` of A_LM, A_P
    and G. What differs from the authors' code: padding that ``valid`` names stays out of ``q^T q``; value projections
    have their Xavier initialisation too; steps from A_LM to G are float32 at least.

    Reference: Gokden, 2025, arXiv 2502.13502.

    >>> m = PowerLawGraphAttention(dim=16, num_heads=2, metric_hidden=8, residual_units=1)
    >>> m.freeze_metric(torch.randn(1, 5, 16)).traits.streaming
    True
    """

    A_LM: Tensor
    G: Tensor
    own_state = ("A_LM", "G")

    class_traits = HeadFrame.class_traits.but(layout=False, losses=("dag_lm", "dag_p", "dag_g"))

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        metric_hidden: int = 170,
        residual_units: int = 8,
        unit_depth: int = 2,
        metric: str = "learned",
        activation: str = "silu",
        compat: str | None = None,
        causal: bool = True,
        rotary: float | None = 10000.0,
        rotary_interleaved: bool = True,
        **settings: Any,
    ):
        super().__init__(
            dim, num_heads, causal=causal, rotary=rotary, rotary_interleaved=rotary_interleaved, **settings
        )
        check_choice("metric", metric, METRICS)
        check_choice("activation", activation, ACTIVATIONS)
        check_choice("compat", compat, (None, "authors"))
        for name, value in (("metric_hidden", metric_hidden), ("unit_depth", unit_depth)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if residual_units < 0:
            raise ValueError(f"residual_units={residual_units} must not be negative")
        self.metric, self.compat = metric, compat
        self.learner: MetricLearner | None = None
        if metric != "fixed":
            self.learner = MetricLearner(
                num_heads, self.head_dim, metric_hidden, residual_units, unit_depth, activation
            )
        for linear in (self.q, self.k, self.proj) if compat == "authors" else (self.q, self.k, self.v, self.proj):
            _xavier(linear)
        eye = torch.eye(self.head_dim).repeat(num_heads, 1, 1)
        self.register_buffer("A_LM", eye)
        self.register_buffer("G", eye.clone())

    cross_positions = True

    @property
    def traits(self) -> Traits:
        traits = super().traits
        learned = self.metric == "learned"
        looks_ahead = learned or not self.causal
        return traits.but(
            patterns=frozenset("non" + p if looks_ahead and p.startswith("causal") else p for p in traits.patterns),
            layout=False,
            mask=not learned or self.compat == "authors",  # a hidden pair still meets through the metric
            streaming=not looks_ahead,
            losses=self.class_traits.losses if learned else (),
        )

    # ---- the metric

    def deductive_outputs(self, x: Tensor, valid: Tensor | None = None) -> Deductive:
        """What the learner deduces from ``x`` (B, *grid, C); ``valid`` (B, *grid)."""
        if self.learner is None:
            raise ValueError("this module has a metric and no learner: it was deployed, or made with metric='fixed'")
        q = through(self.q_norm, split_heads(self.q(zero_invalid(x, valid)), self.num_heads))
        exists = flat_valid(valid)
        if self.rotary is not None:
            q = self._turn(q, self._angles(Stream(x.flatten(1, -2), exists, None, False)))
        return self.learner(q, exists)

    @torch.no_grad()
    def freeze_metric(
        self,
        x: Tensor | None = None,
        *,
        metric: Sequence[Tensor] | None = None,
        valid: Tensor | None = None,
    ) -> PowerLawGraphAttention:
        """Fill the G-cache and use it from now on.

        Args:
            x: (B, *grid, C) a prompt, as this layer sees it; the mean of its samples' deductive outputs is kept.
            metric: instead of ``x``: ``(A_LM, G)``, each (H, D, D) or (1, H, D, D); a third, their A_P, is not needed.
            valid: (B, *grid), with ``x``.

        Returns:
            The module itself, with ``metric="cached"``.

        Raises:
            ValueError: neither or both are given, or a metric of another model's shape.
        """
        if (x is None) == (metric is None):
            raise ValueError("freeze_metric needs either a prompt x or metric=(A_LM, G), one of the two")
        if x is not None:
            made = self.deductive_outputs(x, valid)
            metric = (made.A_LM.mean(0), made.G.mean(0))
        assert metric is not None
        if len(metric) not in (2, 3):
            raise ValueError(f"metric must be the pair (A_LM, G), got {len(metric)} tensors")
        metric = metric[:2]
        shape = tuple(self.G.shape)
        for name, value in zip(("A_LM", "G"), metric, strict=True):
            if tuple(value.shape) not in (shape, (1, *shape)):
                raise ValueError(f"{name} of the cache must be (H, D, D)={shape}, got {tuple(value.shape)}")
        for buffer, value in zip((self.A_LM, self.G), metric, strict=True):
            buffer.copy_(value.view(shape))
        if self.metric == "learned":
            self.metric = "cached"
        return self

    def thaw_metric(self) -> PowerLawGraphAttention:
        """Undo :meth:`freeze_metric`: deduce the metric from every input again."""
        if self.learner is None:
            raise ValueError("this module has a metric and no learner: it was deployed, or made with metric='fixed'")
        self.metric = "learned"
        return self

    def deployed(self) -> nn.Module:
        """With a cached metric, a copy without the learner; otherwise the module itself."""
        if self.metric == "learned" or self.learner is None:
            return self
        twin = copy.deepcopy(self)
        twin.learner = None
        return twin

    # ---- decoding with a prompt's own metric

    def prefill(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, State]:
        """``(y, state)`` of a prompt ``x`` (B, N, C) whose own metric the state keeps for :meth:`step`."""
        if not self.causal:
            raise ValueError("prefill needs causal=True")
        self._check_call(x, None, None, valid, None, None, None, None, None, ())
        return self._go_on(x, None, valid)

    def step(
        self,
        x_t: Tensor,
        state: State | None = None,
        *,
        layout: Layout | None = None,
        valid: Tensor | None = None,
        mask: Mask | Tensor | None = None,
        plan: Plan | None = None,
    ) -> tuple[Tensor, State]:
        """As :meth:`Mechanism.step`; with a learned metric, only from the state of :meth:`prefill`."""
        if self.metric != "learned":
            return super().step(x_t, state, layout=layout, valid=valid, mask=mask, plan=plan)
        if state is None or "G" not in state:
            raise ValueError(
                f"{self._name()} decodes step by step with a metric that no longer changes: call freeze_metric first, "
                "or pass the state of prefill (trait streaming is False while the metric is learned)"
            )
        self._check_call(x_t, None, layout, valid, None, as_mask(mask), plan, None, None, ())
        return self._go_on(x_t, state, valid)

    def _go_on(self, x: Tensor, state: State | None, valid: Tensor | None) -> tuple[Tensor, State]:
        out = self.mix(zero_invalid(x, valid), valid=valid, state=state, returns=("state",))
        assert out.state is not None
        return zero_invalid(out.y, valid), out.state

    # ---- the call

    def _mix_heads(self, q: Tensor, k: Tensor, v: Tensor, call: HeadCall, notes: Notes) -> Any:
        past = notes.state
        if past is not None and "G" in past:
            kept, metric = {"A_LM": past["A_LM"], "G": past["G"]}, past["G"]
            expected = (q.shape[0], *self.G.shape)
            if tuple(metric.shape) != expected:
                raise ValueError(f"the state's G must be (B, H, D, D)={expected}, got {tuple(metric.shape)}")
        elif self.metric != "learned":
            kept, metric = {}, self.G
        else:
            assert self.learner is not None
            made = self.learner(q, notes.valid)
            kept, metric = {"A_LM": made.A_LM, "G": made.G}, made.G
            if "losses" in notes.returns:
                notes.losses = {
                    "dag_lm": dag_loss(made.A_LM),
                    "dag_p": dag_loss(made.A_P),
                    "dag_g": dag_loss(made.G),
                }
        notes.kept = kept
        with exactly(q):
            dtype = torch.promote_types(q.dtype, metric.dtype)
            q = (q.to(dtype) @ metric.to(dtype)).to(q.dtype)
        return super()._mix_heads(q, k, v, call, notes)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``plgMultiHeadAttention``, with learned metric or (``metric="fixed"``) without."""
        theirs = Released(state_dict, "plgMultiHeadAttention")
        heads = {"Wlst": "W", "blst": "b", "pwlst": "p", "alst": "a", "balst": "b_a"}
        rules: dict[str, Rule] = {rf"plgatt_layer\.{name}": f"learner.{ours}" for name, ours in heads.items()}
        names = {"wq": "q", "wk": "k", "wv": "v", "dense": "proj", "layernorm1": "learner.norm"}
        rules |= {rf"{name}\.(weight|bias)": rf"{ours}.\1" for name, ours in names.items()}
        rules |= {
            r"reslayerAs\.(\d+)\.denseAs\.(\d+)\.gluw([123])\.(weight|bias)": r"learner.units.\1.layers.\2.w\3.\4",
            r"reslayerAs\.(\d+)\.layernormA\.(weight|bias)": r"learner.units.\1.norm.\2",
        }
        return theirs.close(theirs.renamed(rules))


def dag_loss(tensor: Tensor) -> Tensor:
    """``mean |log(tr(exp(T * T)) / D)|`` of (..., D, D): zero when T, as a weighted graph, has no cycle.

    Reference: Gokden, 2025, arXiv 2502.13502, after Zheng et al., 2018 (NOTEARS), arXiv 1803.01422.

    >>> float(dag_loss(torch.ones(3, 3).triu(1))) < 1e-6
    True
    """
    with exactly(tensor):
        tensor = tensor.to(stats_dtype(tensor.dtype))
        trace = torch.linalg.matrix_exp(tensor * tensor).diagonal(dim1=-2, dim2=-1).sum(-1)
        return torch.log(trace / tensor.shape[-1]).abs().mean()


def operator_invariance(tensors: Tensor) -> Tensor:
    """How much a deductive output moves from prompt to prompt: RMS deviation from their mean, over the mean's RMS.

    Args:
        tensors: (P, ...) one deductive output for each of P prompts.

    Returns:
        A scalar; 0 for an operator that does not depend on the prompt.

    >>> float(operator_invariance(torch.ones(4, 2, 3, 3)))
    0.0
    """
    if tensors.dim() < 2 or tensors.shape[0] < 2:
        raise ValueError(f"tensors must be (P, ...) with at least two prompts, got {tuple(tensors.shape)}")
    mean = tensors.mean(0, keepdim=True)
    return (tensors - mean).square().mean().sqrt() / mean.square().mean().sqrt()
