"""BioFusionNet: the risk of a patient from patches of a slide, expressions of genes and a few clinical numbers.

Patches attend to each other, ``S = softmax(q k^T) v``; patches and genes attend to each other (co-attention, without
biases), then in two stages each to the other's answer and to its own side; the means of both sides go through a
transformer encoder and an MLP, the clinical numbers join, and one number, the log risk, comes out.

A gene is a token here: of the map ``W g`` from all genes its part is ``W_j g_j``, which adds up to what the release
computes, with the same weights. In the release patients are single vectors and every softmax runs over the patients of
the batch, so that a risk depends on who else is there; ``compat="authors"`` does so, with a warning. How patches become
one vector (their sum, in the release, in front of the co-attention) is our reading: the mean, behind all attention.

Trained by Cox's partial likelihood in which events weigh more. The release sorts patients by the risk that it predicts
instead of by time: ``compat="authors"`` again.

Reference: Mondol et al., 2024, "BioFusionNet: Deep Learning-Based Survival Risk Stratification in ER+ Breast Cancer
Through Multifeature and Multimodal Data Fusion", arXiv 2402.10717; code: raktim-mondol/BioFusionNet.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import (
    check_axes,
    check_choice,
    check_divides,
    check_float,
    check_int,
    check_ints,
    check_real,
    check_valid,
    describe,
    readable,
)
from ...nn.layers import masked_mean
from ...nn.released import Released
from ...ops import attention
from ...types import stats_dtype
from ..build import register_models
from ..losses import cox_loss
from ..protocol import TaskModel, Terms


class Survival(NamedTuple):
    """What is known of patients.

    Args:
        time: (B,) at least 0, of the event or of the last that was heard.
        event: (B,) boolean or of 0 and 1.
    """

    time: Tensor
    event: Tensor


def weighted_cox_loss(
    risk: Tensor, time: Tensor, event: Tensor, weights: Tensor, *, ties: str = "breslow", compat: str | None = None
) -> Tensor:
    """Cox's loss in which patients weigh ``w``, in the terms of events and in the sets at risk:

    ``- sum_i w_i e_i (r_i - log sum_{t_j >= t_i} w_j exp r_j) / sum_i w_i e_i``.

    Args:
        risk: (N,) log hazards.
        time, event: as of :func:`attnlib.models.losses.cox_loss`, whose refusals hold here.
        weights: (N,) above 0.
        ties: ``"breslow"`` or ``"efron"``.
        compat: ``"authors"`` ranks patients by risk instead of by time: ``time`` says nothing then.

    >>> risk, time, event = torch.zeros(2), torch.tensor([1.0, 2.0]), torch.tensor([1, 0])
    >>> float(weighted_cox_loss(risk, time, event, torch.tensor([5.0, 1.0])).exp())
    6.0
    """
    check_choice("compat", compat, (None, "authors"))
    check_float("risk", risk)
    if not isinstance(weights, Tensor) or weights.shape != risk.shape:
        raise ValueError(f"weights must be {tuple(risk.shape)} as risk, got {describe(weights)}")
    if readable(risk) and not bool(risk.isfinite().all()):
        raise ValueError("risk must be finite")
    if readable(weights) and not bool(((weights > 0) & weights.isfinite()).all()):
        raise ValueError("weights must be finite and above 0: they stand in the sets at risk, too")
    if compat == "authors" and risk.dim() == 1:
        time = risk.detach().argsort(stable=True).argsort()
    w = weights.to(stats_dtype(risk.dtype))
    # Weights in the sets are shifts of risks; what they shift in the terms of events is taken off again.
    loss = cox_loss(risk.to(w.dtype) + w.log(), time, event, ties=ties, weights=w)
    e = w * event.to(w.dtype)
    return loss + (e * w.log()).sum() / e.sum()


class _Attend(nn.Module):
    """One head with maps of its own.

    Args:
        dim: width of queries, keys and values.
        scaled: scores over the root of the width.
    """

    def __init__(self, dim: int, scaled: bool = True):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.scale = dim**-0.5 if scaled else 1.0

    def forward(self, x: Tensor, context: Tensor, valid: Tensor | None = None) -> Tensor:
        """x (B, N, C) reads context (B, M, C)."""
        return read(self.query(x), self.key(context), self.value(context), self.scale, valid)


def read(q: Tensor, k: Tensor, v: Tensor, scale: float, valid: Tensor | None = None) -> Tensor:
    """(B, N, C): one head."""
    return attention(q[:, None], k[:, None], v[:, None], scale=scale, valid=valid).squeeze(1)


def gene_tokens(genes: Tensor, layer: nn.Linear) -> Tensor:
    """(B, J, C): of ``layer`` on all genes the part of each; a bias belongs to every one."""
    tokens = genes.unsqueeze(-1) * layer.weight.T
    return tokens if layer.bias is None else tokens + layer.bias


class CoAttention(nn.Module):
    """Patches read genes and genes read patches, without biases and scale.

    Args:
        dim: width of patches.
        num_genes: genes.
    """

    def __init__(self, dim: int, num_genes: int):
        super().__init__()
        self.img_query, self.img_key, self.img_value = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.gene_query, self.gene_key, self.gene_value = (nn.Linear(num_genes, dim, bias=False) for _ in range(3))

    def forward(
        self, image: Tensor, genes: Tensor, valid: Tensor | None = None, across: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Image tokens (B, P, C) and genes (B, J) to (B, P, C) and (B, J, C); ``across``: (1, B, C) of both."""
        sides = (self.gene_query, self.gene_key, self.gene_value)
        q, k, v = (layer(genes)[None] if across else gene_tokens(genes, layer) for layer in sides)
        return (
            read(self.img_query(image), k, v, 1.0),
            read(q, self.img_key(image), self.img_value(image), 1.0, valid),
        )


class BioFusionNet(TaskModel):
    """Log risks of patients.

    Args:
        in_chans: width of the features of a patch.
        num_genes, num_clinical: numbers of each patient.
        num_heads, depth, ff_dim: of the transformer encoder.
        hidden: widths of the MLP; the clinical numbers join in front of the last.
        drop: dropout, as in the release: of the encoder and the first two layers.
        event_weight: of a patient with an event, in the loss; the others weigh 1.
        ties: of the loss, ``"breslow"`` or ``"efron"``.
        compat: ``"authors"``: attention over the patients of a batch, and a loss that sorts by risk. It warns.

    Shape:
        patches: (B, P, in_chans), genes: (B, num_genes), clinical: (B, num_clinical), ``valid`` (B, P) boolean: which
        patches exist, one of every patient at least. Returns (B,) log risks.

    >>> model = BioFusionNet(in_chans=8, num_genes=5, num_clinical=2, num_heads=2, hidden=(16, 8, 8, 4)).eval()
    >>> model(torch.randn(3, 7, 8), torch.randn(3, 5), torch.randn(3, 2)).shape
    torch.Size([3])
    """

    def __init__(
        self, in_chans: int = 256, num_genes: int = 138, num_clinical: int = 4, num_heads: int = 8, depth: int = 3,
        ff_dim: int = 512, hidden: Sequence[int] = (512, 256, 128, 32), drop: float = 0.1, event_weight: float = 5.0,
        ties: str = "breslow", compat: str | None = None,
    ):  # fmt: skip
        super().__init__()
        dim = self.in_chans = check_int("in_chans", in_chans, least=1)
        self.num_genes = check_int("num_genes", num_genes, least=1)
        self.num_clinical = check_int("num_clinical", num_clinical, least=0)
        self.event_weight = check_real("event_weight", event_weight, above=0)
        check_divides("num_heads", check_int("num_heads", num_heads, least=1), "2 * in_chans", 2 * dim)
        check_choice("ties", ties, ("breslow", "efron"))
        check_choice("compat", compat, (None, "authors"))
        widths = check_ints("hidden", hidden, least=1)
        if len(widths) != 4:
            raise ValueError(f"hidden must be four widths, got {widths}")
        check_real("drop", drop, least=0, below=1)
        self.ties, self.compat = ties, compat
        if compat == "authors":
            warnings.warn(
                'compat="authors": every softmax runs over the patients of a batch, so that a risk depends on the '
                "others in it, and the loss sorts by predicted risk instead of by time",
                UserWarning,
                stacklevel=2,
            )
        self.self_attention = _Attend(dim, scaled=False)
        self.co_attention = CoAttention(dim, num_genes)
        self.image_cross, self.gene_cross, self.image_back, self.gene_back = (_Attend(dim) for _ in range(4))
        self.gene_adjust = nn.Linear(num_genes, dim)
        layer = nn.TransformerEncoderLayer(2 * dim, num_heads, ff_dim, drop, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, check_int("depth", depth, least=1), enable_nested_tensor=False)
        first, second, third, last = widths

        def stage(before: int, after: int, share: float) -> nn.Sequential:
            return nn.Sequential(nn.Linear(before, after), nn.LayerNorm(after), nn.ReLU(), nn.Dropout(share))

        self.mlp = nn.Sequential(
            stage(2 * dim, first, drop), stage(first, second, drop), stage(second, third, drop / 10)
        )
        self.join = stage(third + num_clinical, last, drop / 10)
        self.head = nn.Linear(last, 1, bias=False)

    def forward(self, patches: Tensor, genes: Tensor, clinical: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B,) log risks.

        Raises:
            ValueError: another shape, numbers that are not finite, a patient without a patch.
        """
        check_axes("patches", patches, B=None, P=None, C=self.in_chans)
        check_float("patches", patches)
        check_axes("genes", genes, B=len(patches), J=self.num_genes)
        check_axes("clinical", clinical, B=len(patches), K=self.num_clinical)
        check_valid("valid", valid, patches.shape[:2])
        if not patches.shape[1]:
            raise ValueError(f"patches must hold at least one patch of every patient, got {tuple(patches.shape)}")
        check_float("genes", genes)
        check_float("clinical", clinical)
        if valid is not None:
            if readable(valid) and not bool(valid.any(1).all()):
                bare = (~valid.any(1)).nonzero().flatten().tolist()
                raise ValueError(f"valid leaves the patients {bare[:8]} without a patch")
            patches = patches.masked_fill(~valid.unsqueeze(-1), 0.0)
        for name, numbers in (("patches", patches), ("genes", genes), ("clinical", clinical)):
            if readable(numbers) and not bool(numbers.isfinite().all()):
                rows = (~numbers.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
                raise ValueError(f"{name} must be finite; those of the patients {rows[:8]} are not: fill them first")
        image = self.self_attention(patches, patches, valid)
        across = self.compat == "authors"
        if across:
            seen = image if valid is None else image * valid.unsqueeze(-1)
            image, valid = seen.sum(1)[None], None
        co_image, co_genes = self.co_attention(image, genes, valid, across)
        a, b = self.image_cross(co_image, co_genes), self.gene_cross(co_genes, co_image, valid)
        own = self.gene_adjust(genes)[None] if across else gene_tokens(genes, self.gene_adjust)
        a, b = self.image_back(a, image, valid), self.gene_back(b, own)
        both = torch.cat([a, b], -1)[0] if across else torch.cat([masked_mean(a, valid), masked_mean(b)], -1)
        x = self.mlp(self.encoder(both.unsqueeze(1)).squeeze(1)) if len(both) else self.mlp(both)
        return self.head(self.join(torch.cat([x, clinical.to(x.dtype)], 1))).squeeze(1)

    def loss(self, prediction: Tensor, target: Survival | Sequence[Tensor]) -> Terms:
        """``cox``, weighted.

        Args:
            prediction: (B,) log risks.
            target: time and event, (B,) each.

        Raises:
            ValueError: times below 0, no event in the batch.
        """
        if not isinstance(target, (tuple, list)) or len(target) != 2:
            raise TypeError(f"target must be Survival(time, event), got {describe(target)}")
        time, event = target
        if not isinstance(event, Tensor) or event.shape != prediction.shape:
            raise ValueError(f"event must be {tuple(prediction.shape)}, got {describe(event)}")
        weights = torch.where(event.bool(), self.event_weight, 1.0).to(stats_dtype(prediction.dtype))
        loss = weighted_cox_loss(prediction, time, event, weights, ties=self.ties, compat=self.compat)
        return {"cox": loss}


class FeatureVAE(TaskModel):
    """The autoencoder that fuses three features of a patch into one.

    Args:
        in_chans: width of the features beside each other.
        hidden: width between.
        dim: width of the code.
        beta: weight of the divergence.

    Shape:
        features: (..., in_chans). Returns ``(reconstruction, mean, log variance)``; the code is drawn in training, and
        is the mean in evaluation. :meth:`predict` gives the means (..., dim).
    """

    def __init__(self, in_chans: int = 1152, hidden: int = 512, dim: int = 256, beta: float = 1.0):
        super().__init__()
        for name, width in (("in_chans", in_chans), ("hidden", hidden), ("dim", dim)):
            check_int(name, width, least=1)
        self.beta = check_real("beta", beta, least=0)
        self.encoder = nn.Linear(in_chans, hidden)
        self.mean, self.log_var = nn.Linear(hidden, dim), nn.Linear(hidden, dim)
        self.decoder, self.out = nn.Linear(dim, hidden), nn.Linear(hidden, in_chans)

    def forward(self, features: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        self._check(features)
        h = F.relu(self.encoder(features))
        mean, log_var = self.mean(h), self.log_var(h)
        z = mean
        if self.training or noise is not None:
            z = mean + (torch.randn_like(mean) if noise is None else noise) * (0.5 * log_var).exp()
        return self.out(F.relu(self.decoder(z))), mean, log_var

    def loss(self, prediction: tuple[Tensor, Tensor, Tensor], target: Tensor) -> Terms:
        """``reconstruction``, a sum of squares, and ``divergence`` from a normal distribution, times ``beta``."""
        found, mean, log_var = prediction
        if not isinstance(target, Tensor) or target.shape != found.shape:
            raise ValueError(f"target must be {tuple(found.shape)}, got {describe(target)}")
        divergence = -0.5 * (1 + log_var - mean.square() - log_var.exp()).sum()
        return {"reconstruction": (found - target).square().sum(), "divergence": self.beta * divergence}

    def predict(self, features: Tensor) -> Tensor:  # type: ignore[override]
        """(..., dim), the means."""
        self._check(features)
        return self.mean(F.relu(self.encoder(features)))

    def _check(self, features: Tensor) -> None:
        check_float("features", features)
        width = self.encoder.in_features
        if not features.dim() or features.shape[-1] != width:
            raise ValueError(f"features must be (..., {width}), got {describe(features)}")


def convert(state_dict: Any, model: nn.Module) -> dict[str, Tensor]:
    """From the authors' ``MultimodalModel``.

    The layer that its encoder was copied from never runs and is left out.
    """
    theirs = Released(state_dict, "the authors' MultimodalModel")
    theirs.leave(r"comodel\.transformer_encoder\..*", "the pattern of the encoder's layers, which does not run")
    out = theirs.renamed(
        {
            r"(self_attention\..*)": r"\1",
            r"comodel\.(co_attention\..*)": r"\1",
            r"comodel\.dual_cross_attention\.attention1\.(.*)": r"image_cross.\1",
            r"comodel\.dual_cross_attention\.attention2\.(.*)": r"gene_cross.\1",
            r"comodel\.dual_cross_attention2\.attention1\.(.*)": r"image_back.\1",
            r"comodel\.dual_cross_attention2\.attention2\.(.*)": r"gene_back.\1",
            r"comodel\.dual_cross_attention2\.adjust_gene_dim\.(.*)": r"gene_adjust.\1",
            r"comodel\.(encoder\..*)": r"\1",
            r"fc4\.(.*)": r"join.\1",
            r"final_layer\.0\.(.*)": r"head.\1",
        }
    )
    for match, value in theirs.matching(r"fc([123])\.(.*)"):
        out[f"mlp.{int(match[1]) - 1}.{match[2]}"] = value
    return theirs.close(out)


def convert_vae(state_dict: Any) -> dict[str, Tensor]:
    """From the authors' ``VAE``."""
    theirs = Released(state_dict, "the authors' VAE")
    names = {"fc1": "encoder", "fc21": "mean", "fc22": "log_var", "fc3": "decoder", "fc4": "out"}
    return theirs.close(theirs.renamed({rf"{a}\.(weight|bias)": rf"{b}.\1" for a, b in names.items()}))


register_models(
    "biofusionnet",
    BioFusionNet,
    {"biofusionnet": dict(in_chans=256)},
    params={"biofusionnet": 6_492_032},  # the released class has 8,070,016, 1,577,984 of which never run
    source="raktim-mondol/BioFusionNet",
    convert=convert,
    task="bags",
)
