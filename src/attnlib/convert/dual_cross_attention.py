"""DCAL: two companions that a vision transformer is trained beside, for classes that differ in details.

- Global-local: a block more, in which the class token and the R patches that it is made of most (attention rollout) are
  the queries, and all tokens of the last layer keys and values; the other tokens stay.
- Pair-wise: the same model reads a batch once more, the queries of a sample attending to its own tokens and to those of
  another sample side by side (:class:`PairedContext`), through one softmax over 2 N keys; never in evaluation.

With a learned w per branch, ``L = 1/2 sum_k (exp(-w_k) L_k + w_k)`` over the plain, global-local and pair-wise branch
(Zhu et al., 2022, arXiv 2205.02151). No code was released. Where the paper is silent, our reading: the class token is a
query of the global-local block; the other sample is taken as it stands in the pair-wise branch at the same layer.

With one global-local block and the class token alone read (``read="token"``), which patches are queries changes
nothing: the class token's row does not depend on other rows. ``read="selected"`` (the mean of the class token and the
selected patches), or two blocks, make it count.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_choice, check_int, check_real, checked, describe
from ..hooks import Intervention, attach
from ..hooks.site import Site
from ..look.rollout import Rollout
from ..models.backbones.vit import VisionTransformer
from ..models.blocks import Block
from ..nn.dense.softmax_attention import SoftmaxAttention

Criterion = Callable[[Tensor, Tensor, Tensor], Tensor]


def derangement(count: int, generator: torch.Generator | None = None) -> Tensor:
    """(count,) another number for each: one random cycle through all.

    Raises:
        ValueError: fewer than two, of which one has no partner.
    """
    if count < 2:
        raise ValueError(f"a batch of {count} holds no pair; pair-wise cross-attention needs at least two samples")
    order = torch.randperm(count, generator=generator)
    return torch.empty_like(order).scatter_(0, order, order.roll(1))


class PairedContext(Intervention):
    """Pair-wise cross-attention: keys and values are projected from a sample's tokens and its partner's side by side.

    ``o_1 = softmax(Q_1 [K_1; K_2]^T / sqrt(D)) [V_1; V_2]``, with the layer's own weights. With itself as partner it is
    plain attention. Partners are drawn anew, one for all layers, in every call of the model.

    Args:
        layers: layers to act on; ``None`` for all.
        partners: (B,) samples, in place of drawn ones.
        generator: of the draw; the global one by default.

    Raises:
        ValueError: in the call, a batch of one, partners that are not there.
    """

    name: ClassVar[str] = "paired context"
    kinds: ClassVar[tuple[str, ...]] = ("self",)

    def __init__(
        self,
        layers: Sequence[int | str] | None = None,
        partners: Tensor | None = None,
        generator: torch.Generator | None = None,
    ):
        self.layers, self.given, self.generator = layers, partners, generator
        self.partners: Tensor | None = partners
        self._first = ""

    def prepare(self, model: nn.Module, sites: Sequence[Site]) -> None:
        self._first = sites[0].name

    def on_context(self, site: Site, k_source: Tensor, v_source: Tensor) -> tuple[Tensor, Tensor]:
        count = k_source.shape[0]
        if self.given is None and site.name == self._first:
            self.partners = derangement(count, self.generator)
        at = self.partners
        if at is None or len(at) != count or not bool(((at >= 0) & (at < count)).all()):
            raise ValueError(f"partners must be one of {count} samples for each, got {at}")
        at = at.to(k_source.device)
        if k_source is v_source:
            both = torch.cat([k_source, k_source[at]], 1)
            return both, both
        return torch.cat([k_source, k_source[at]], 1), torch.cat([v_source, v_source[at]], 1)


class DualCrossAttention(nn.Module):
    """A vision transformer with both companions: ``loss`` to train by, and both rules of inference.

    More than the model it has: the blocks, a norm, a head and three numbers. The model itself is not changed; what was
    learned serves without them too.

    Args:
        model: a vision transformer of attnlib with a class token, softmax attention and norms before sublayers.
        top: share of the patches that are queries; 0.1 for fine classes, 0.3 for re-identification.
        num_blocks: global-local blocks, shaped as the model's last and started anew.
        read: ``"token"`` or ``"selected"``; see the module.
        bound: keep w in [-bound, bound], so that no weight grows without end; ``None`` as in the paper.
        criterion: ``f(features, logits, labels)``; the cross-entropy by default.

    Raises:
        TypeError: another model.
        ValueError: in ``loss``, a batch of one.

    Reference: Zhu et al., 2022, arXiv 2205.02151.
    """

    @checked
    def __init__(
        self,
        model: nn.Module,
        top: float = 0.1,
        num_blocks: int = 1,
        read: str = "token",
        bound: float | None = None,
        criterion: Criterion | None = None,
    ):
        super().__init__()
        last = model.stages[-1] if isinstance(model, VisionTransformer) and model.has_class_token else None
        inner = getattr(getattr(last, "mixer", None), "inner", None)
        if not isinstance(last, Block) or not isinstance(inner, SoftmaxAttention) or last.mixer.post_norm:
            raise TypeError(
                "model must be a vision transformer of attnlib with a class token, softmax attention and norms before "
                f"sublayers, got {describe(model)}"
            )
        self.top = check_real("top", top, above=0, most=1)
        check_choice("read", read, ("token", "selected"))
        self.read, self.bound, self.criterion = read, bound, criterion
        self.model: Any = model
        parts: Any = model
        made = [copy.deepcopy(last) for _ in range(check_int("num_blocks", num_blocks, least=1))]
        self.blocks = nn.ModuleList(made)
        self.norm: nn.Module = copy.deepcopy(parts.norm)
        self.head: nn.Module = copy.deepcopy(parts.head)
        for module in (*self.blocks.modules(), *self.norm.modules(), *self.head.modules()):
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        self.log_variances = nn.Parameter(torch.zeros(3))

    def selected(self, rollout: Tensor) -> Tensor:
        """(B, N, N) -> (B, 1 + R): the class token, and the R patches of the highest weight in its row."""
        prefix = self.model.num_prefix_tokens
        row = rollout[:, 0, prefix:]
        best = row.topk(max(1, int(self.top * row.shape[1])), dim=1).indices + prefix
        return F.pad(best, (1, 0))

    def branches(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features (B, C) and logits (B, K) of the plain branch, then of the global-local one."""
        rollout = Rollout()
        with attach(self.model, rollout):
            final, ((patches, prefix),) = self.model.forward_intermediates(
                images, [-1], output_fmt="NLC", return_prefix_tokens=True
            )
            product = rollout.results()
        assert product is not None
        x, index = torch.cat([prefix, patches], 1), self.selected(product)
        for block in self.blocks:
            x = global_local(block, x, index)  # type: ignore[arg-type]
        y = self.norm(x)
        if self.read == "selected":
            y = _rows(y, index).mean(1, keepdim=True)
        features = self.model.forward_head(final, pre_logits=True)
        return features, self.model.forward_head(final), self.head(y, pre_logits=True), self.head(y)

    def forward(self, images: Tensor, rule: str = "sum") -> Tensor:
        """(B, K) sums of the class probabilities of both branches, or with ``rule="concat"`` (B, 2 C) features."""
        check_choice("rule", rule, ("sum", "concat"))
        features, logits, local_features, local_logits = self.branches(images)
        if rule == "concat":
            return torch.cat([features, local_features], 1)
        return logits.softmax(-1) + local_logits.softmax(-1)

    def loss(self, images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """``"plain"``, ``"global-local"`` and ``"pair-wise"`` losses, and the weighted ``"total"``."""
        features, logits, local_features, local_logits = self.branches(images)
        with attach(self.model, PairedContext(generator=generator)):
            tokens = self.model.forward_features(images)
        paired = self.model.forward_head(tokens, pre_logits=True), self.model.forward_head(tokens)
        judge = self.criterion or (lambda f, y, t: F.cross_entropy(y, t))
        rows = {"plain": (features, logits), "global-local": (local_features, local_logits), "pair-wise": paired}
        found = {name: judge(f, y, labels) for name, (f, y) in rows.items()}
        w = self.log_variances if self.bound is None else self.log_variances.clamp(-self.bound, self.bound)
        total = 0.5 * ((-w).exp() * torch.stack(list(found.values())) + w).sum()
        return {**found, "total": total}


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def global_local(block: Block, x: Tensor, index: Tensor) -> Tensor:
    """A block whose queries are the tokens at ``index`` (B, R) of x (B, N, C) alone; the others stay as they are."""
    y = block.mixer.norm(x)
    chosen = _rows(x, index) + block.mixer.drop_path(block.mixer.scale(block.mixer.inner(_rows(y, index), context=y)))
    if block.mlp is not None:
        chosen, _ = block.mlp(chosen)
    return x.scatter(1, index[..., None].expand_as(chosen), chosen)
