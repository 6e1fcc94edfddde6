"""Scaling attention heads, and taking them out.

The output of head ``i`` of layer ``l``, before the output projection, is multiplied by a factor:
``O~[l, i] = f[l, i] O[l, i]``. It is the same as scaling the columns of the output projection that read the head, but
nothing is written into weights, kernels without weight maps go on running, and factors may depend on the site.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..hooks.intervention import Intervention
from ..hooks.site import Site
from ..types import to_list

Factors = Tensor | Sequence[float] | Mapping[int, float]


class HeadScale(Intervention):
    """Multiply outputs of heads by factors.

    Args:
        factors: per layer ``{layer: factors}``; or factors for every layer of ``layers``; or a function of the site
            that gives factors or ``None``, for what depends on phase, branch, step or pass. Factors are one number per
            head, or ``{head: factor}`` with 1 for the others; a tensor may be (H,) or (B, H).
        layers: numbers or name patterns, when ``factors`` does not name them.

    Raises:
        ValueError: heads that do not exist, factors that do not fit the heads or the batch.

    >>> HeadScale({2: {0: 0.0, 3: 1.5}}).layers
    [2]
    """

    name: ClassVar[str] = "head-scale"

    def __init__(
        self,
        factors: Mapping[int, Factors] | Factors | Callable[[Site], Factors | None],
        layers: Sequence[int | str] | None = None,
    ):
        self.function = factors if callable(factors) else None
        self.table: Mapping[int, Factors] | None = None
        self.everywhere: Any = {}
        if isinstance(factors, Mapping) and any(not isinstance(f, (int, float)) for f in factors.values()):
            if layers is not None:
                raise ValueError("factors names its layers already; leave layers out")
            self.table = {n: f for n, f in factors.items() if not self._ones(f)}  # type: ignore[misc]
            layers = sorted(self.table) or None
        elif not callable(factors):
            self.everywhere = factors
        self.layers = to_list("layers", layers)
        self.reset()

    @classmethod
    def ablate(cls, heads: Mapping[int, Sequence[int]]) -> HeadScale:
        """Take heads out: ``{layer: [head, ...]}`` get the factor 0.

        >>> HeadScale.ablate({1: [0, 2]}).layers
        [1]
        """
        if not isinstance(heads, Mapping):
            raise TypeError(f"heads must be {{layer: [head, ...]}}, got {heads!r}")
        return cls({layer: {head: 0.0 for head in some} for layer, some in heads.items()})

    @staticmethod
    def _ones(factors: Any) -> bool:
        values = factors.values() if isinstance(factors, Mapping) else factors
        return all(bool((torch.as_tensor(f) == 1).all()) for f in values)

    @property
    def identity(self) -> bool:
        if self.function is not None:
            return False
        return not self.table if self.table is not None else self._ones(self.everywhere)

    def reset(self) -> None:
        self._rows: dict[int, Tensor] = {}  # of fixed factors, made once

    def _factors(self, site: Site) -> Factors | None:
        if self.function is not None:
            return self.function(site)
        if self.table is None:
            return self.everywhere
        return self.table.get(site.layer)

    def wants(self, site: Site) -> bool:
        if self.function is None and (factors := self._factors(site)) is not None:
            self._row(site, factors)
        return True

    def _row(self, site: Site, factors: Factors) -> Tensor:
        where = f"HeadScale: layer {site.layer} ({site.name})"
        if isinstance(factors, Mapping):
            row = torch.ones(site.heads, dtype=torch.float64)
            for head, factor in factors.items():
                if not 0 <= head < site.heads:
                    raise ValueError(f"{where}: head {head} does not exist; possible: 0 to {site.heads - 1}")
                row[head] = factor
            return row
        row = torch.as_tensor(factors, dtype=None if isinstance(factors, Tensor) else torch.float64)
        if row.dim() not in (1, 2) or row.shape[-1] != site.heads:
            raise ValueError(f"{where} has {site.heads} heads; factors of shape {tuple(row.shape)} do not fit")
        return row

    def on_output(self, site: Site, out: Tensor) -> Tensor:
        row = self._rows.get(site.layer) if self.function is None else None
        if row is None or row.dtype != out.dtype or row.device != out.device:
            factors = self._factors(site)
            if factors is None:
                return out
            row = self._row(site, factors).to(out)
            row = (row if row.dim() == 2 else row[None])[:, :, None, None]
            self._rows[site.layer] = row
        if len(row) not in (1, len(out)):
            raise ValueError(f"HeadScale: factors have {len(row)} rows, the batch of layer {site.layer} has {len(out)}")
        return out * row
