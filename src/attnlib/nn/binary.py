"""Linear maps and MLPs of one bit: weights, and inputs too if wanted, are signs times a scale."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_choice, check_flag, check_float, check_type
from .released import Released, Rule

SCALES = ("learned", "mean")
COMPAT = (None, "authors")


def binary_sign(x: Tensor, compat: str | None = None) -> Tensor:
    """The sign of every number; gradients pass where it lies between -1 and 1.

    Args:
        x: any shape.
        compat: ``"authors"``: the sign of 0 is 0. By default it is 1, so that there are two values.

    >>> binary_sign(torch.tensor([-0.3, 0.0, 2.0])).tolist()
    [-1.0, 1.0, 1.0]
    """
    check_float("x", x)
    hard = torch.where(x.detach() < 0, -1.0, 1.0).to(x.dtype) if compat is None else x.detach().sign()
    near = torch.where(x.abs() < 1, x, 0)
    return hard + (near - near.detach())


class BinaryLinear(nn.Linear):
    """``y = W^ b(x) + bias`` with ``W^ = s * sign(W - mean of its row)`` and ``b`` the sign.

    Args:
        in_features, out_features, bias: as in ``nn.Linear``.
        scale: ``s`` of every output: ``"learned"``, at first ``mean |W|`` of its row, where W starts uniform within
            0.015; or ``"mean"``: always that, without gradient.
        binary_input: whether inputs are signs too.
        binary_weight: whether weights are.
        binary_output: whether outputs are, bias and all.
        compat: of the signs of zeros, see :func:`binary_sign`.

    >>> BinaryLinear(8, 4)(torch.randn(2, 8)).shape
    torch.Size([2, 4])
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, scale: str = "learned",
        binary_input: bool = True, binary_weight: bool = True, compat: str | None = None, binary_output: bool = False,
    ):  # fmt: skip
        super().__init__(in_features, out_features, bias=bias)
        check_choice("scale", scale, SCALES)
        check_choice("compat", compat, COMPAT)
        self.binary_input, self.binary_weight, self.compat = binary_input, binary_weight, compat
        self.binary_output = check_flag("binary_output", binary_output)
        self.scale: nn.Parameter | None = None
        if scale == "learned" or not binary_weight:
            nn.init.uniform_(self.weight, -0.015, 0.015)
        if scale == "learned" and binary_weight:
            self.scale = nn.Parameter(self.mean_size())

    @classmethod
    def of(cls, linear: nn.Linear, **settings: object) -> BinaryLinear:
        """From a trained layer, whose weights and bias it has; the scales follow from them."""
        check_type("linear", linear, nn.Linear)
        made = cls(linear.in_features, linear.out_features, linear.bias is not None, **settings).to(linear.weight)  # type: ignore[arg-type]
        with torch.no_grad():
            made.weight.copy_(linear.weight)
            if linear.bias is not None:
                made.bias.copy_(linear.bias)
            made.reset_scale()
        return made

    def mean_size(self) -> Tensor:
        """(out, 1) mean of ``|W|`` in every row, without gradient."""
        return self.weight.detach().abs().mean(1, keepdim=True)

    @property
    def settings(self) -> dict[str, object]:
        """What it was made with, beside widths and bias."""
        named = {n: getattr(self, n) for n in ("binary_input", "binary_weight", "compat", "binary_output")}
        return {"scale": "mean" if self.scale is None else "learned", **named}

    @torch.no_grad()
    def reset_scale(self) -> None:
        """Learned scales become the mean size of the weights as they are; after these were loaded."""
        if self.scale is not None:
            self.scale.copy_(self.mean_size())

    def signs(self) -> Tensor:
        """(out, in) signs of the weights less the mean of their row."""
        return binary_sign(self.weight - self.weight.mean(1, keepdim=True), self.compat)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = self._mapped(binary_sign(x, self.compat) if self.binary_input else x)
        return binary_sign(y, self.compat) if self.binary_output else y

    def _mapped(self, x: Tensor) -> Tensor:
        if not self.binary_weight:
            return F.linear(x, self.weight, self.bias)
        # Signs are multiplied first: their sums are whole numbers, exact, so that a sum of 0 is one.
        y = F.linear(x, self.signs()) * (self.mean_size() if self.scale is None else self.scale).mT
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        kind = "mean" if self.scale is None else "learned"
        bits = f"binary_input={self.binary_input}, binary_output={self.binary_output}"
        return f"{super().extra_repr()}, scale={kind}, {bits}"


class BinaryMlp(nn.Module):
    """``Linear -> GELU -> Linear`` of :class:`BinaryLinear`.

    Args:
        dim: width of ``x``.
        hidden: hidden width; ``dim`` by default.
        out: width of the output; ``dim`` by default.
        drop: dropout in training, behind both maps.
        scale, binary_input, compat: of both maps. Released are ``("mean", True)``, ``("mean", False)`` and
            ``("learned", False)``.

    >>> BinaryMlp(8, 16)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(
        self, dim: int, hidden: int | None = None, out: int | None = None, drop: float = 0.0, scale: str = "learned",
        binary_input: bool = True, compat: str | None = None,
    ):  # fmt: skip
        super().__init__()
        hidden = dim if hidden is None else hidden
        settings = dict(scale=scale, binary_input=binary_input, compat=compat)
        self.fc1 = BinaryLinear(dim, hidden, **settings)  # type: ignore[arg-type]
        self.fc2 = BinaryLinear(hidden, dim if out is None else out, **settings)  # type: ignore[arg-type]
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., out)."""
        check_float("x", x)
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``BiMlp``, ``BiMlp_1w32a`` or ``BiMlp_adapscaling_1w32a``."""
        theirs = Released(state_dict, "BiViT's BiMlp")
        rules: dict[str, Rule] = {r"(fc[12])\.(weight|bias)": r"\1.\2", r"(fc[12])\.scaling_factor": r"\1.scale"}
        return started(theirs.close(theirs.renamed(rules)))


def started(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scales that are all 0, which the release makes ``mean |W|`` in its first call, are that already."""
    for name, scale in state_dict.items():
        weight = state_dict.get(name.removesuffix("scale") + "weight")
        if name.endswith("scale") and weight is not None and weight.dim() == 2:
            size = weight.abs().mean(1, keepdim=True)
            if scale.shape == size.shape and not bool(scale.any()):
                state_dict[name] = size
    return state_dict


__all__ = ["BinaryLinear", "BinaryMlp", "binary_sign", "started"]
