"""Structured diffusion guidance, Feng et al. 2022 (2212.05032): keys and values from different contexts."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class StructuredGuidance:
    """Keys from the full prompt, values from the mean of the prompt's variants; only rows that were conditioned."""

    variants: Tensor  # (M, B, N, C) embeddings with one phrase each pasted back

    def on_context(self, site: Any, k_source: Tensor, v_source: Tensor) -> tuple[Tensor, Tensor]:
        mean = torch.cat([k_source[None], self.variants]).mean(0)
        rows = torch.tensor([row == "cond" for row in site.rows]).view(-1, 1, 1)
        return k_source, torch.where(rows, mean, v_source)
