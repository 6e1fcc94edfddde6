"""Neighborhood attention through NATTEN, on CUDA.

``natten.na1d``, ``na2d`` and ``na3d`` mean the same windows as :func:`attnlib.ops.neighborhood_attention` with
``border="clamp"``, on tensors (B, *grid, heads, D). A scale of 0 would be taken for none there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...extras import need
from .._call import expand_heads
from .._dispatch import Operator, twice
from . import absent, exact

Spec = Callable[[Any], "list[Tensor]"]


def register(operator: Operator, spec: Spec) -> None:
    """
    Args:
        spec: computes a call by plain operations, for second derivatives.
    """
    operator.register(
        "natten", lambda call: run(call, spec), supports=supports, prefers=prefers, second="the specification",
        transforms="its kernels' backward is written by hand",
    )  # fmt: skip


def supports(call: Any) -> str | None:
    """Why NATTEN cannot serve the call; ``None`` when it can."""
    if why := absent("natten", call.q, "its kernels break graphs"):
        return why
    rest, border = call.rest, call.rules[0].border
    if border != "clamp":
        return f"its windows are clamped to the grid, border={border!r} is not possible"
    if rest["partial"]:
        return "its row statistics have no gradient"
    for what, given in (
        ("bias_table", rest["table"]), ("axis_bias", call.axis_bias), ("valid", call.valid), ("mask", rest["mask"])
    ):  # fmt: skip
        if given is not None:
            return f"it takes no {what}"
    if rest["extra"] is not None and rest["extra"][2] is not None:
        return "it takes no extra_valid"
    if rest["options"]["dropout_p"]:
        return "it has no dropout"
    if rest["options"]["scale"] == 0:
        return "it takes a scale of 0 for none"
    if call.q.dtype == torch.float64:
        return "it has no float64 kernel"
    width, v_width = call.q.shape[-1], call.v.shape[-1]
    if width != v_width or width % 8:
        return f"it takes heads of one width that is a multiple of 8, got D={width} and Dv={v_width}"
    if call.q.numel() == 0:
        return "it takes no empty tensors"
    return None


def prefers(call: Any) -> str | None:
    """Why the automatic choice passes over NATTEN although it could serve."""
    return exact(call.q.dtype)


def run(call: Any, spec: Spec) -> list[Tensor]:
    """The field (B, H, *grid, Dv) of the output, or (B, H, N, Dv) where the call is flat."""
    natten = need("natten", "the backend 'natten'")
    rules, heads = call.rules, call.k.shape[1]
    v, extra = call.v, call.rest["extra"]
    k = call.k
    if v.shape[1] != heads:
        heads = call.q.shape[1]
        k, v = expand_heads(k, heads), expand_heads(v, heads)
    q, k, v = (t.movedim(1, -2).contiguous() for t in (call.q, k, v))
    more = {}
    if extra is not None:
        keys, values = (expand_heads(t, heads).to(q.dtype).transpose(1, 2).contiguous() for t in extra[:2])
        more = dict(additional_keys=keys, additional_values=values)
    settings: dict[str, Sequence[Any]] = {
        name: tuple(getattr(r, ours) for r in rules)
        for name, ours in (("kernel_size", "kernel"), ("stride", "stride"), ("dilation", "dilation"),
                           ("is_causal", "causal"))
    }  # fmt: skip
    operator = (natten.na1d, natten.na2d, natten.na3d)[len(rules) - 1]
    out = operator(q, k, v, **settings, scale=call.rest["options"]["scale"], **more)
    fields = call.finish([out.movedim(-2, 1).flatten(2, -2)])
    inputs = call.inputs()
    return list(twice(tuple(fields), inputs, lambda *tensors: tuple(spec(call.replaced(tensors)))))
