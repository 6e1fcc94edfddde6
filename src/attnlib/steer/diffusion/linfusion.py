"""LinFusion in a denoiser: linear attention in the place of its self-attention, and the losses that teach it.

::

    student = LinFusion.of(unet)
    with attnlib.attach(unet, student, Record(...)):
        ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ...checks import check_type, describe
from ...hooks.intervention import Intervention
from ...hooks.site import Site
from ...nn.linear.linfusion import LinFusionAttention
from ...nn.released import Released


def distillation_losses(
    prediction: Tensor,
    target: Tensor,
    teacher: Tensor,
    features: Sequence[Tensor] = (),
    teacher_features: Sequence[Tensor] = (),
    weighting: Tensor | None = None,
) -> dict[str, Tensor]:
    """What a linearized denoiser learns from: its task, its teacher's prediction and its teacher's features.

    Args:
        prediction: of the student.
        target: what the scheduler says is right, of the same shape.
        teacher: prediction of the teacher.
        features: of the student's chosen layers.
        teacher_features: of the teacher's, one for each.
        weighting: of the squared errors, broadcast from the first axis (CLEAR's weighting of noise levels).

    Returns:
        ``{"task", "prediction", "features"}``, means of squares; the sum to minimise is
        ``task + 0.5 prediction + 0.5 features``, in LinFusion (arXiv 2409.02097) and in CLEAR (arXiv 2412.16112).

    >>> import torch
    >>> one, two = torch.ones(1, 4), torch.zeros(1, 4)
    >>> {k: v.item() for k, v in distillation_losses(one, two, one, [one], [two]).items()}
    {'task': 1.0, 'prediction': 0.0, 'features': 1.0}
    """
    if len(features) != len(teacher_features):
        raise ValueError(f"features are {len(features)}, teacher_features are {len(teacher_features)}; one for each")

    def error(name: str, a: Tensor, b: Tensor) -> Tensor:
        if a.shape != b.shape:
            raise ValueError(f"{name}: {describe(a)} does not fit {describe(b)}")
        squares = (a.float() - b.float()).square()
        if weighting is not None:
            squares = squares * weighting.float().reshape(-1, *[1] * (squares.dim() - 1))
        return squares.mean()

    out = {"task": error("target", prediction, target), "prediction": error("teacher", prediction, teacher)}
    if features:
        pairs = zip(features, teacher_features, strict=True)
        errors = [error("features", a, b) for a, b in pairs]
        out["features"] = sum(errors[1:], errors[0]) / len(errors)
    return out


class LinFusion(Intervention, nn.Module):
    """Linear attention in every self-attention (``attn1``) of a denoiser; detached, the model is what it was.

    The layers are modules of this one, so that they train, move and save like any others. They begin with the model's
    own projections and new networks before them.

    Args:
        layers: from the name of a self-attention module to what takes its place.

    Reference: Liu et al., 2024, arXiv 2409.02097.
    """

    name: ClassVar[str] = "linfusion"
    kinds: ClassVar[tuple[str, ...]] = ("self",)

    def __init__(self, layers: Mapping[str, LinFusionAttention]):
        nn.Module.__init__(self)
        if not layers:
            raise ValueError("layers is empty: the model has no self-attention (attn1) that could be replaced")
        for name, layer in layers.items():
            check_type(f"layers[{name!r}]", layer, LinFusionAttention)
        self.names = tuple(layers)
        self.replacements = nn.ModuleList(layers.values())
        self.layers = [f"*{name}" for name in layers]

    @classmethod
    def of(cls, model: nn.Module, mid_dim: int | None = None, pattern: str = "attn1") -> LinFusion:
        """For a denoiser: one layer for each attention module whose name holds ``pattern``, with its projections.

        Raises:
            ValueError: the model has none.
        """
        layers: dict[str, LinFusionAttention] = {}
        for name, module in model.named_modules():
            if pattern not in name or not hasattr(module, "to_q") or not hasattr(module, "heads"):
                continue
            theirs: Any = module
            dim = theirs.to_q.in_features
            layer = LinFusionAttention(
                dim, theirs.heads, mid_dim=mid_dim, qkv_bias=theirs.to_q.bias is not None,
                proj_bias=theirs.to_out[0].bias is not None,
            )  # fmt: skip
            own = layer.state_dict()
            own.update(LinFusionAttention.convert_state_dict(dict(theirs.state_dict())))
            layer.load_state_dict(own)
            layers[name] = layer.to(theirs.to_q.weight.device, theirs.to_q.weight.dtype)
        return cls(layers)

    def around_sublayer(self, site: Site, hidden: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        layer: Any = self.replacements[self._at(site)]
        out: Tensor = layer(hidden)
        return out

    def _at(self, site: Site) -> int:
        for i, name in enumerate(self.names):
            if site.name == name or site.name.endswith("." + name):
                return i
        raise ValueError(f"layer {site.layer} ({site.name}) is none of those that LinFusion was made for")

    def load_authors(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load the authors' ``LinFusion``: its layers are numbered in the order of the model's self-attention.

        Raises:
            ValueError: entries that are missing or left over.
        """
        theirs = Released(state_dict, "LinFusion")
        out = theirs.parts(r"(\d+)\.(.+)", r"replacements.\1", LinFusionAttention.convert_state_dict)
        out = theirs.close(out)
        if missing := sorted(set(self.state_dict()) - set(out)):
            raise ValueError(f"state_dict lacks {missing[:4]} of LinFusion with {len(self.names)} layers")
        self.load_state_dict(out)
