"""Pruning without data: which weights of a trained model are set to zero (DIMAP, Li et al., 2024, arXiv 2404.13648).

Magnitudes of unlike layers do not compare: what matters is how much of the energy that is still there a weight takes
with it. In a scope of weights, sorted by magnitude, weight j is worth

    I_j = w_j^2 / sum_{i: |w_i| >= |w_j|} w_i^2,

the share of what is left when all smaller ones are gone. The least of all scopes together are dropped, so the scopes
decide how many weights each of them keeps. One layer each is LAMP (Lee et al., 2021); layers of one function together,
queries with keys and values, output projections, MLPs, are DIMAP's modules; everything together is plain magnitude.

No code of DIMAP was released: that modules are pooled before they are scored is our reading, and the paper's summary
leaves the order of the sum open, which only this one makes grow with the magnitude.

>>> net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
>>> prune(net, 0.75, kinds={"0": "mlp", "1": "mlp"}).dropped
96
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from ..checks import check_choice, check_float, check_real, check_type
from ..nn.layers import DepthwiseConv

SCOPES = ("layer", "module", "global")

#: What a layer is for, by the end of its name; the first that fits. Other layers are left alone.
KINDS: tuple[tuple[str, str], ...] = (
    ("mlp", r"(?:.*\.)?(?:mlp|ffn|feed_forward|intermediate)\.(?:.*\.)?\w+|(?:.*\.)?layers?\.\d+\.output\.dense"),
    ("qkv", r"(?:.*\.)?(?:qkv|kv|[qkv]|(?:q|k|v|qkv|kv)_proj|(?:in|q|k|v)_proj_weight|to_(?:q|k|v|qkv|kv)"
            r"|query|key|value|c_attn)"),
    ("mlp", r"(?:.*\.)?(?:fc1|fc2|c_fc|(?:gate|up|down)_proj|linear1|linear2|lin1|lin2)"),
    ("proj", r"(?:.*\.)?(?:attn\d*|attention|self_attn|mixer(?:\.inner)?)\.(?:.*\.)?"
             r"(?:proj|c_proj|o_proj|out_proj|to_out(?:\.0)?|dense)"),
)  # fmt: skip


def kind_of(name: str) -> str | None:
    """``"qkv"``, ``"proj"`` or ``"mlp"``, by the name of a layer; ``None`` for embeddings, merging and heads.

    >>> [kind_of(n) for n in ("blocks.0.attn.qkv", "layers.3.self_attn.o_proj", "stages.1.mlp.fc2", "head")]
    ['qkv', 'proj', 'mlp', None]
    """
    return next((kind for kind, pattern in KINDS if re.fullmatch(pattern, name)), None)


def importance(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``I_j`` of all weights of one scope, float64 in [0, 1]; the largest is worth 1.

    Args:
        weights: by name, of any shapes. Equal magnitudes are told apart by where they stand.

    >>> importance({"w": torch.tensor([1.0, -2.0, 2.0])})["w"].tolist()
    [0.1111111111111111, 0.5, 1.0]
    """
    check_type("weights", weights, Mapping, "tensors by name")
    for name, weight in weights.items():
        check_float(f"weights[{name!r}]", weight)
    if not weights:
        return {}
    flat = torch.cat([w.detach().double().flatten() for w in weights.values()]).square()
    order = flat.argsort(stable=True)
    sorted_ = flat[order]
    left = sorted_.flip(0).cumsum(0).flip(0)
    scores = torch.empty_like(flat)
    scores[order] = torch.where(left > 0, sorted_ / torch.where(left > 0, left, 1), 0)
    parts = scores.split([w.numel() for w in weights.values()])
    return {name: part.view(w.shape) for part, (name, w) in zip(parts, weights.items(), strict=True)}


@dataclass(frozen=True)
class Pruned:
    """What :func:`prune` dropped.

    Args:
        kept, of: by layer, how many weights are left of how many.
        kinds: by layer, what it is for.
    """

    kept: Mapping[str, int]
    of: Mapping[str, int]
    kinds: Mapping[str, str]

    @property
    def dropped(self) -> int:
        """Weights that are zero now."""
        return sum(self.of.values()) - sum(self.kept.values())

    def by_kind(self) -> dict[str, float]:
        """Share that is left of every kind of layers."""
        groups = {kind: [n for n, k in self.kinds.items() if k == kind] for kind in dict.fromkeys(self.kinds.values())}
        return {kind: sum(self.kept[n] for n in names) / sum(self.of[n] for n in names)
                for kind, names in groups.items()}  # fmt: skip

    def __str__(self) -> str:
        total = sum(self.of.values())
        parts = ", ".join(f"{kind} {share:.1%}" for kind, share in self.by_kind().items())
        return f"{self.dropped} of {total} weights dropped ({self.dropped / total:.1%}); kept: {parts}"


_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, DepthwiseConv)
_PACKED = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")

#: A module and the name of its weight.
Place = tuple[nn.Module, str]


def _places(model: nn.Module) -> dict[str, Place]:
    """All weights that may be pruned: of layers by their names, of torch's own attention by the weight's."""
    found: dict[str, Place] = {}
    for name, m in model.named_modules():
        if isinstance(m, _LAYERS) or type(m).__name__ == "Conv1D":
            found[name] = (m, "weight")
        elif isinstance(m, nn.MultiheadAttention):
            found.update({f"{name}.{w}".lstrip("."): (m, w) for w in _PACKED if getattr(m, w, None) is not None})
    return found


def _chosen(places: Mapping[str, Place], kinds: Mapping[str, str] | Callable[[str], str | None]) -> dict[str, str]:
    """Kinds by name, of those that have one."""
    if isinstance(kinds, Mapping):
        if unknown := sorted(kinds.keys() - places.keys()):
            raise ValueError(f"kinds names {unknown[:5]}, which are no linear or convolutional layers of the model")
        found = dict(kinds)
    else:
        found = {name: kind for name in places if (kind := kinds(name)) is not None}
    if not found:
        raise ValueError(
            "no layer of the model has a kind by its name; say kinds={name: kind}, with names such as "
            f"{list(places)[:5] or 'none: there is no linear or convolutional layer'}"
        )
    return found


def _trained(place: Place) -> Tensor:
    """The weight as it is trained, also behind a mask."""
    layer, name = place
    weight: Tensor = getattr(layer, f"{name}_orig") if hasattr(layer, f"{name}_orig") else getattr(layer, name)
    return weight


def _check_own(model: nn.Module, places: Mapping[str, Place]) -> None:
    """Every weight is a parameter that nothing else uses."""
    holders: dict[int, list[str]] = {}
    for name, m in model.named_modules():
        for p in m.parameters(recurse=False):
            holders.setdefault(id(p), []).append(name)
    for name, place in places.items():
        weight = _trained(place)
        if not isinstance(weight, nn.Parameter):
            raise ValueError(f"the weight of {name!r} is made from others by {type(place[0]).__name__}; leave it out")
        if len(shared := holders[id(weight)]) > 1:
            raise ValueError(f"the weight of {name!r} is also that of one of {shared}; leave it out")


def prune(
    model: nn.Module, sparsity: float, scope: str = "module",
    kinds: Mapping[str, str] | Callable[[str], str | None] = kind_of,
) -> Pruned:  # fmt: skip
    """Set the least important weights to zero, by masks of ``torch.nn.utils.prune``: training goes on around them.

    Args:
        model: any; changed in place.
        sparsity: share of the weights of all layers that have a kind, at least 0 and below 1: exactly
            ``floor(sparsity * N)`` of them are zero afterwards. What earlier masks dropped stays and counts.
        scope: ``"layer"`` (LAMP), ``"module"`` (DIMAP) or ``"global"`` (magnitude).
        kinds: by name of a layer, or a function of the name, which module it belongs to; ``None`` leaves it alone.

    Returns:
        What is left of every layer. :func:`finish` makes the zeros permanent.

    Raises:
        ValueError: a sparsity that would leave a scope without a weight, no layer with a kind, a shared weight.
    """
    check_type("model", model, nn.Module)
    check_real("sparsity", sparsity, least=0, below=1)
    check_choice("scope", scope, SCOPES)
    every = _places(model)
    found = _chosen(every, kinds)
    places = {name: every[name] for name in found}
    _check_own(model, places)
    weights = {name: getattr(*place) for name, place in places.items()}
    scopes: dict[str, dict[str, Tensor]] = {}
    for name, kind in found.items():
        scopes.setdefault({"layer": name, "module": kind, "global": ""}[scope], {})[name] = weights[name]
    scores: dict[str, Tensor] = {}
    for held in scopes.values():
        scores.update(importance(held))
        largest = max(held, key=lambda name: float(scores[name].max()) if scores[name].numel() else -1.0)
        if scores[largest].numel():  # the largest is never dropped, and stays apart from others that round to 1
            scores[largest].view(-1)[scores[largest].flatten().argmax()] = math.inf
    flat = torch.cat([scores[name].flatten() for name in found])
    many, most = math.floor(sparsity * len(flat)), len(flat) - len(scopes)
    if many > most:
        raise ValueError(
            f"sparsity={sparsity} drops {many} of {len(flat)} weights, but each of {len(scopes)} scopes keeps one: at "
            f"most {most / len(flat):.6g}"
        )
    keep = torch.ones_like(flat, dtype=torch.bool)
    keep[flat.argsort(stable=True)[:many]] = False
    masks = dict(zip(found, keep.split([w.numel() for w in weights.values()]), strict=True))
    for name, (layer, weight) in places.items():
        torch_prune.custom_from_mask(layer, weight, masks[name].view_as(weights[name]))
    kept = {name: int(mask.sum()) for name, mask in masks.items()}
    return Pruned(kept, {name: len(mask) for name, mask in masks.items()}, found)


def finish(model: nn.Module) -> int:
    """Make the zeros permanent: ordinary weights again, without masks. The number of layers that had one."""
    check_type("model", model, nn.Module)
    masked = [(layer, name) for layer, name in _places(model).values() if hasattr(layer, f"{name}_mask")]
    for layer, name in masked:
        torch_prune.remove(layer, name)
    return len(masked)


__all__ = ["KINDS", "SCOPES", "Pruned", "finish", "importance", "kind_of", "prune"]
