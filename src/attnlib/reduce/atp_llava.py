"""ATP: small trained modules between decoder layers say which image tokens stay, and how many.

After chosen layers, with S the attention logits of the layer just computed and A its weights, averaged over heads, an
image token j scores by what it shares with the image and by what the text takes from it,

    ``s_self[j] = mean_{i image} S[j, i]``,  ``s_cross[j] = mean_{t text} A[t, j]``,
    ``S_red = (s_self + s_cross) / 2``,

and by whether it lies on a uniform grid of sampling rate R,

    ``S_spa[j] = 1 - lambda R`` on the grid, 0 elsewhere.

Two thresholds follow from the means of the scores,

    ``z = W1 [mean s_self, mean s_cross]``,  ``theta_r = sigmoid(w_r z)``,  ``theta_s = sigmoid(w_s z)``.

Training keeps all tokens and weighs them, in all later layers,

    ``M = max(sigmoid(T (S_red - theta_r)), sigmoid(T (S_spa - theta_s)))``,

inference removes those with neither ``S_red > theta_r`` nor ``S_spa > theta_s``. What is left keeps its positions. The
loss adds ``0.05 sum_l (kept_l / n) l + 0.2 |mean_l kept_l - target|`` to that of the model, with ``kept_l = sum M``.

There is no authors' code; parity is held to a re-implementation by students (its equations are numbered as the
paper's). What differs from it: means are taken over pairs that may meet (logits of masked pairs are no numbers; its
text stands behind the image, where all may); any number of images and samples that keep different numbers; image grids
need not be square; at least one token of an image prompt stays. The mask multiplies the unnormalised weights, so that
for T to infinity it is the removal (how it is to be applied is not said there). ``scores="sigmoid"`` squashes
``s_self``, which as a mean of logits is not bound to the thresholds' range.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import (
    check_axes,
    check_device,
    check_float,
    check_int,
    check_ints,
    check_real,
    check_tensors,
    extremes,
    shaped,
)
from ..hooks.call import row_blocks, score_rows, weights_of
from ..hooks.recompute import refuse_reentrant
from ..hooks.site import Site
from ..hooks.tokens import IMAGE, is_text
from ..types import check_choice, stats_dtype
from .base import Reduction, best, grid_size


@shaped(place="whole (...)")
def spatial_scores(
    place: Tensor, size: tuple[int, int], rate: float, weight: float = 3.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """``S_spa``: ``1 - weight * rate``, not below 0, on a grid of stride ``round(sqrt(1 / rate))``, and 0 elsewhere.

    Args:
        place: (...) number of each token in its image, row by row.
        size: (h, w) of an image.
        rate: R; 0.5 gives a stride of 1, so that every token is sampled.
        weight: lambda.
        dtype: of the scores.

    Returns:
        (...) scores.

    >>> spatial_scores(torch.arange(4), (2, 2), 0.25).tolist()
    [0.25, 0.0, 0.0, 0.0]
    """
    check_ints("size", size, least=1)
    check_real("rate", rate, above=0, most=1)
    check_real("weight", weight, least=0)
    if extremes(place, (0, 0))[0] < 0:
        raise ValueError("place must hold numbers of tokens, got a negative one")
    stride = max(1, round((1.0 / rate) ** 0.5))
    on = (place // size[1] % stride == 0) & (place % size[1] % stride == 0)
    return on.to(dtype) * max(0.0, 1.0 - rate * weight)


@shaped()
def adaptive_rate(layer: int, layers: int) -> float:
    """The re-implementation's sampling rates: 0.5 in the first 30 % of layers, 0.25 up to 65 %, then 0.0625.

    >>> [adaptive_rate(n, 32) for n in (4, 14, 24)]
    [0.5, 0.25, 0.0625]
    """
    check_int("layers", layers, least=1)
    check_int("layer", layer, least=0, most=layers - 1)
    depth = layer / layers
    return 0.5 if depth < 0.3 else 0.25 if depth < 0.65 else 0.0625


class ATPGate(nn.Module):
    """The two thresholds of a layer, from its scores.

    Args:
        dim: width of ``z``, the decoder's.
        rate: R, the sampling rate of the grid.
        weight: lambda.
        temperature: T.

    >>> sum(p.numel() for p in ATPGate(4096).parameters())
    20482
    """

    def __init__(self, dim: int, rate: float = 0.25, weight: float = 3.0, temperature: float = 10.0):
        super().__init__()
        if not 0.0 < rate <= 1.0:
            raise ValueError(f"rate must lie in (0, 1]: the share of tokens on the grid; got {rate}")
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.rate, self.weight, self.temperature = rate, weight, temperature
        self.score_projection = nn.Linear(2, dim)
        self.redundant_threshold_head = nn.Linear(dim, 1)
        self.spatial_threshold_head = nn.Linear(dim, 1)

    def forward(self, s_self: Tensor, s_cross: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """``theta_r`` and ``theta_s``, (B, 1) each, from scores (B, N) and which tokens are image tokens (B, N)."""
        count = image.sum(1, keepdim=True).clamp(min=1)
        means = [(s * image).sum(1, keepdim=True) / count for s in (s_self, s_cross)]
        z = self.score_projection(torch.cat(means, 1).to(self.score_projection.weight.dtype))
        return torch.sigmoid(self.redundant_threshold_head(z)), torch.sigmoid(self.spatial_threshold_head(z))

    def log_mask(self, red: Tensor, spatial: Tensor, theta_r: Tensor, theta_s: Tensor) -> Tensor:
        """Logarithm of the soft mask M, (B, N)."""
        return torch.maximum(
            F.logsigmoid(self.temperature * (red - theta_r)), F.logsigmoid(self.temperature * (spatial - theta_s))
        )


def atp_gates(model: nn.Module, layers: Sequence[int] = (4, 14, 24), rate: float | str = 0.25) -> nn.ModuleDict:
    """Untrained gates for a transformers model, one after each of ``layers``.

    Args:
        model: the model.
        layers: after which layers tokens may leave.
        rate: R of all, or ``"adaptive"``, see :func:`adaptive_rate`.
    """
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if isinstance(rate, str):
        check_choice("rate", rate, ("adaptive",))
        rates = [adaptive_rate(n, config.num_hidden_layers) for n in layers]
    else:
        rates = [rate] * len(layers)
    return nn.ModuleDict({str(n): ATPGate(config.hidden_size, r) for n, r in zip(layers, rates, strict=True)})


@shaped(of="number (B)")
def atp_losses(
    kept: Sequence[Tensor],
    layers: Sequence[int],
    of: Tensor,
    target: float = 144,
    weights: tuple[float, float] = (0.05, 0.2),
) -> dict[str, Tensor]:
    """The budget's part of the loss.

    Args:
        kept: per layer (B,) soft counts of tokens that stay.
        layers: numbers of these layers.
        of: (B,) image tokens of each sample.
        target: tokens that should stay on average over layers; below 1, their share.
        weights: of the penalty and of the distance from the target.

    Returns:
        ``atp``, ``target`` and their weighted sum ``total``.

    >>> round(float(atp_losses([torch.tensor([144.0])], [4], torch.tensor([576]))["total"]), 4)
    0.05
    """
    kept = check_tensors("kept", kept, least=1)
    if len(layers) != len(kept):
        raise ValueError(f"layers must name {len(kept)} layers, one for each entry of kept, got {list(layers)}")
    for i, k in enumerate(kept):
        check_float(f"kept[{i}]", k)
        check_axes(f"kept[{i}]", k, B=len(of))
        check_device(of=of, **{f"kept[{i}]": k})
    check_real("target", target, least=0)
    penalty = sum((k / of.clamp(min=1)).mean() * n for k, n in zip(kept, layers, strict=True))
    mean = torch.stack([k.mean() for k in kept]).mean()
    goal = target * of.to(mean.dtype).mean() if target < 1 else target
    distance = (mean - goal).abs()
    return {"atp": penalty, "target": distance, "total": weights[0] * penalty + weights[1] * distance}  # type: ignore[dict-item]


class ATP(Reduction):
    """Prune image tokens adaptively: soft and trainable while the model trains, for real while it is evaluated.

    ::

        gates = atp_gates(model)
        model.train()
        with attnlib.attach(model, ATP(gates), token_types=...) as session:
            loss = model(**inputs, labels=labels).loss + session.interventions[0].losses()["total"]

    Args:
        gates: ``{layer: ATPGate}``; tokens leave after these layers.
        size: (h, w) of an image in tokens; square by default.
        target: see :func:`atp_losses`.
        weights: see :func:`atp_losses`.
        scores: ``"logits"`` as the paper, or ``"sigmoid"`` of their mean.
        thresholds: ``(theta_r, theta_s)`` instead of the gates' own; they may be infinite.

    Raises:
        ValueError: no gates, negative layers.

    Reference: Ye et al., 2024, arXiv 2412.00447, equations 3 to 14.

    >>> ATP(nn.ModuleDict({"1": ATPGate(8)})).at
    [1]
    """

    name: ClassVar[str] = "atp"
    reads_weights = True

    def __init__(
        self,
        gates: Mapping[int, ATPGate] | nn.ModuleDict,
        size: tuple[int, int] | None = None,
        target: float = 144,
        weights: tuple[float, float] = (0.05, 0.2),
        scores: str = "logits",
        thresholds: Sequence[Any] | None = None,
    ):
        check_choice("scores", scores, ("logits", "sigmoid"))
        if thresholds is not None:
            if len(thresholds) != 2:
                raise ValueError(f"thresholds must be the two (theta_r, theta_s), got {thresholds!r}")
            for theta in thresholds:  # infinite ones keep everything, or nothing
                check_real("thresholds", theta, finite=False)
        self.gates: dict[int, ATPGate] = {int(n): g for n, g in gates.items()}  # type: ignore[misc]
        self.at = sorted(self.gates)
        if not self.at or self.at[0] < 0:
            raise ValueError(f"gates must name at least one layer, from 0 on; got {self.at}")
        if not target >= 0:
            raise ValueError(f"target must not be negative, got {target}")
        self.size, self.target, self.weights = size, target, weights
        self.scores, self.thresholds = scores, thresholds
        self.reset()

    def reset(self) -> None:
        super().reset()
        self._masks: dict[int, Tensor] = {}
        self._choices: dict[int, Tensor] = {}
        self._thetas: dict[int, tuple[Tensor, Tensor]] = {}
        self._soft: dict[int, Tensor] = {}
        self._of: Tensor | None = None
        self._kept: dict[int, Tensor] = {}

    def wants(self, site: Site) -> bool:
        return site.layer >= self.at[0]

    def prepare(self, model: nn.Module, sites: Sequence[Site]) -> None:
        self._per_image = getattr(model.config, "image_seq_length", None)
        layers = sorted(s.layer for s in sites)
        missing = sorted(set(self.at) - set(layers[:-1]))
        if missing:
            raise ValueError(
                f"gates name layers {missing}; possible: 0 to {layers[-1] - 1}, nothing runs after the last"
            )

    # ---- scores

    def statistics(self, site: Site, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """``s_self`` and ``s_cross`` (B, N) of the tokens of a prompt; 0 where they are no image tokens."""
        assert site.q_types is not None and site.mask is not None
        image, text = site.q_types == IMAGE, is_text(site.q_types)
        batch, heads, n = q.shape[:3]
        # A static cache shows slots that nothing was written to yet.
        mask = site.mask.first_keys(n)
        k, site = k[:, :, :n], site.but(n_keys=n, mask=mask)
        dtype = stats_dtype(q.dtype)
        linear = site.weighting.plain and mask.bias is None
        wide_k = k.to(dtype).masked_fill(~image[:, None, :, None], 0.0)  # whatever other tokens hold
        mean_k = wide_k.repeat_interleave(heads // k.shape[1], 1)
        own = torch.zeros(batch, n, dtype=dtype, device=q.device)
        cross, seen = torch.zeros_like(own), torch.zeros_like(own)
        for rows in row_blocks(image.any(0).nonzero().squeeze(1), batch * heads * n):
            pairs = self._pairs(site, rows, batch, n) & image[:, None]
            count = pairs.sum(-1).clamp(min=1)[:, None]
            if linear:
                # The mean over keys of a product is the product with the mean of the keys.
                keys = pairs.to(dtype)[:, None] @ mean_k / count.unsqueeze(-1)
                own[:, rows] = (q[:, :, rows].to(dtype) * keys).sum(-1).mean(1) * site.scale
            else:
                logits, _ = score_rows(site, q, k, rows, mask)
                own[:, rows] = (logits.masked_fill(~pairs[:, None], 0.0).sum(-1) / count).mean(1)
        for rows in row_blocks(text.any(0).nonzero().squeeze(1), batch * heads * n):
            logits, _ = score_rows(site, q, k, rows, mask)
            weights = weights_of(site, logits, rows).mean(1)
            pairs = self._pairs(site, rows, batch, n) & text[:, rows, None]
            cross = cross + weights.masked_fill(~pairs, 0.0).sum(1)
            seen = seen + pairs.sum(1)
        cross = cross / seen.clamp(min=1)
        own = torch.sigmoid(own) if self.scores == "sigmoid" else own
        return own.masked_fill(~image, 0.0), cross.masked_fill(~image, 0.0)

    @staticmethod
    def _pairs(site: Site, rows: Tensor, batch: int, n: int) -> Tensor:
        assert site.mask is not None
        allowed, _ = site.mask.rows(rows)
        if allowed is None:
            return torch.ones(batch, len(rows), n, dtype=torch.bool, device=rows.device)
        return allowed[:, 0].expand(batch, -1, -1)

    def decide(self, site: Site, q: Tensor, k: Tensor) -> None:
        """Scores and thresholds of a layer with a gate."""
        assert site.q_types is not None
        gate, image = self.gates[site.layer], site.q_types == IMAGE
        own, cross = self.statistics(site, q, k)
        red = (own + cross) / 2
        everywhere = self.all_types(site) == IMAGE
        size = grid_size(everywhere.sum(1), self.size, self._per_image)
        place = site.per_query((everywhere.to(torch.long).cumsum(1) - 1).clamp(min=0) % (size[0] * size[1]))
        spatial = spatial_scores(place, size, gate.rate, gate.weight, red.dtype)
        if self.thresholds is None:
            theta_r, theta_s = gate(own, cross, image)
        else:
            theta_r, theta_s = (red.new_full((len(red), 1), t) for t in self.thresholds)
        if site.branch is None:
            self._thetas[site.layer] = (theta_r.detach(), theta_s.detach())
        if site.training:
            log_mask = gate.log_mask(red, spatial, theta_r, theta_s)
            self._of = everywhere.sum(1)
            self._soft[site.layer] = (log_mask.exp() * image).sum(1)
            self._masks[site.layer] = self._by_slot(site, log_mask * image)
        else:
            margin = torch.maximum(red - theta_r, spatial - theta_s)
            keep = (margin > 0) & image
            one = (image.any(1) & ~keep.any(1)).to(torch.long)
            self._choices[site.layer] = self._by_slot(site, keep | best(margin, image, one))

    @staticmethod
    def _by_slot(site: Site, values: Tensor) -> Tensor:
        assert site.q_pos is not None
        if site.q_pos.dim() == 1:
            return values
        length = int(site.q_pos.max()) + 1
        wide = values.new_zeros(len(values), length + 1)
        return wide.scatter(1, site.q_pos.masked_fill(site.q_pos < 0, length), values)[:, :length]

    # ---- stages

    def around_attention(self, site: Site, q: Tensor, k: Tensor, v: Tensor, call: Callable[..., Tensor]) -> Tensor:
        if site.phase == "prefill":
            if site.layer == self.at[0]:
                self._masks, self._choices = {}, {}
                if site.branch is None:
                    self._thetas, self._soft, self._kept = {}, {}, {}
            if site.layer in self.gates:
                assert site.q_types is not None
                image = site.q_types == IMAGE
                if bool(image.any()):
                    if site.training:
                        if any(p.requires_grad for p in self.gates[site.layer].parameters()):
                            refuse_reentrant("ATP", "the mask of later layers")
                        self.decide(site, q, k)
                    else:
                        with torch.no_grad():
                            self.decide(site, q, k)
        return call(q, k, v)

    def edit_rows(self, site: Site) -> Tensor | None:
        if site.training and any(n < site.layer for n in self._masks):
            return None
        return torch.zeros(0, dtype=torch.long, device=None if site.q_pos is None else site.q_pos.device)

    def on_scores(self, site: Site, scores: Tensor, rows: Tensor) -> Tensor:
        for layer, mask in self._masks.items():
            if layer < site.layer:
                longer = F.pad(mask, (0, max(0, site.offset + site.n_queries - mask.shape[1])))
                scores = scores + site.per_key(longer).unsqueeze(2).to(scores.dtype)
        return scores

    def on_tokens(self, site: Site, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        keep = self._choices.pop(site.layer - 1, None)
        if keep is None:
            return None
        assert site.q_types is not None
        stays = site.per_query(keep)
        if site.branch is None:
            self._kept[site.layer - 1] = (stays & (site.q_types == IMAGE)).sum(1)
        return self.go_on(hidden, site, stays)

    # ---- results

    def losses(self) -> dict[str, Tensor]:
        """The budget's losses of the last training call, to be added to the model's.

        Raises:
            RuntimeError: there was none, or it had no image.
        """
        if not self._soft or self._of is None:
            raise RuntimeError(
                "no prompt with an image was read in training mode yet; call model.train(), then the model, then this"
            )
        layers = sorted(self._soft)
        with_image = self._of > 0
        kept = [self._soft[n][with_image] for n in layers]
        return atp_losses(kept, layers, self._of[with_image], self.target, self.weights)

    def results(self) -> dict[str, Any]:
        """What every reduction reports, and by layer ``kept`` (B,) tokens and ``thresholds`` (B, 1) twice."""
        return {**super().results(), "kept": dict(self._kept), "thresholds": dict(self._thetas)}
