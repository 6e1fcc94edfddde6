"""What a module that claims nothing seems to keep: every claim is tried, and those that hold are written down."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch

from ..types import Traits
from .growth import exponent
from .subject import CLAIMS, SILENT, Subject


def _holds(s: Subject, *names: str) -> bool:
    try:
        for name in names:
            CLAIMS[name].test(s)
    except Exception:  # whatever it is, the claim cannot be made
        return False
    return True


def _power(s: Subject, kind: str) -> dict[str, float]:
    """The largest exponent that was measured, as one would claim it."""
    try:
        CLAIMS[kind].test(s)
    except Exception:
        return {}
    measured = max(exponent(both[0 if kind == "work" else 1]) for both in s._growth["N"].values())
    near = round(measured)
    return {"N": near if abs(measured - near) < 0.12 else round(measured + 0.05, 1)}


def infer(make: Callable[[Traits | None], Subject]) -> Traits:
    """The claims that hold on what was tried.

    Args:
        make: builds the subject with given claims.
    """
    bare = make(None)
    takes = inspect.signature((bare.base.inner if bare.pool else bare.base).forward).parameters
    found = SILENT.but(grid_ranks={len(bare.grid)})
    causal = found.but(patterns={"causal-self"})
    if not bare.pool and bare.grid[0] > 1 and _holds(make(causal), "causality"):
        found = causal
    for changes, names in (
        (dict(resolution_free=True), ("resolution",)),
        (dict(batch_independent=True), ("batch", "batch sizes")),
        (dict(permutation_equivariant=True), ("permutation",)),
        (dict(valid=True), ("validity",)),
        (dict(mask=True), ("mask",)),
        (dict(gradient="exact"), ("gradient",)),
        (dict(traceable=True), ("compile", "export")),
    ):
        argument = next(iter(changes))
        if argument in ("valid", "mask") and argument not in takes:
            continue
        more = found.but(**changes)  # type: ignore[arg-type]
        if _holds(make(more), *names):
            found = more
        elif argument == "gradient":
            found = found.but(gradient="surrogate")
    for rank in {1, 2, 3} - found.grid_ranks:
        try:
            with torch.no_grad():
                x = bare.x(grid=(4, 5, 6)[:rank])
                if bare.fits(bare.y(bare.fresh(), x), x):
                    found = found.but(grid_ranks=found.grid_ranks | {rank})
        except Exception:
            continue
    if len(found.grid_ranks) > 1 and not _holds(make(found), "causality" if found != SILENT else "patterns"):
        found = found.but(grid_ranks={len(bare.grid)})
    counted = make(found)
    return found.but(work=_power(counted, "work"), memory=_power(counted, "memory"))


def spelled(claims: Traits) -> str:
    """As one would write it, defaults left out."""
    default, said = Traits(), []
    for name in claims.to_dict():
        value = getattr(claims, name)
        if value != getattr(default, name):
            text = f"{{{', '.join(map(repr, sorted(value)))}}}" if isinstance(value, frozenset) else repr(value)
            said.append(f"{name}={text}")
    return f"Traits({', '.join(said)})"
