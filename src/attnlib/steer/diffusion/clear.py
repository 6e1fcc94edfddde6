"""CLEAR in a diffusion transformer: joint attention that reads circles, attached to FLUX and its relatives.

What it is taught by are :func:`attnlib.steer.diffusion.linfusion.distillation_losses`, with the weighting of noise
levels and the attention outputs of every fourth single block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...checks import check_flag, check_int, check_real
from ...hooks.intervention import Intervention
from ...hooks.site import Site
from ...nn.local.clear import TRAINED, clear_attention


class Clear(Intervention, nn.Module):
    """Image tokens of joint attention read a circle, text and pooled keys; text reads everything.

    Args:
        window_size: radius of the circle, its boundary excluded.
        down_factor: side of the cells that make pooled keys; 1 for none.
        num_layers: layers with weights of their own for these, as released; needed with ``down_factor``.
        proportional: scores grow with the number of keys.
        trained_tokens: keys at training, for that.
        layers: numbers or name patterns; ``None`` for all joint attention.

    Reference: Liu et al., 2024, arXiv 2412.16112.
    """

    name: ClassVar[str] = "clear"
    kinds: ClassVar[tuple[str, ...]] = ("joint",)

    def __init__(
        self,
        window_size: float = 16,
        down_factor: int = 1,
        num_layers: int | None = None,
        proportional: bool = False,
        trained_tokens: int = TRAINED,
        layers: Sequence[int | str] | None = None,
    ):
        nn.Module.__init__(self)
        self.window_size = check_real("window_size", window_size, above=0)
        self.down_factor = check_int("down_factor", down_factor, least=1)
        self.proportional = check_flag("proportional", proportional)
        self.trained_tokens = check_int("trained_tokens", trained_tokens, least=2)
        self.layers = layers
        self.spatial_weights = nn.ParameterList()
        if down_factor > 1:
            if num_layers is None:
                raise ValueError(f"down_factor={down_factor} needs num_layers, the number of attention layers")
            cell = torch.full((down_factor, down_factor), 1 / down_factor**2)
            self.spatial_weights.extend(nn.Parameter(cell.clone()) for _ in range(num_layers))

    def around_attention(self, site: Site, q: Tensor, k: Tensor, v: Tensor, call: Callable[..., Tensor]) -> Tensor:
        layout = site.q_layout
        if layout is None or "image" not in layout.names or len(layout.grid("image")) != 2:
            raise ValueError(
                f"layer {site.layer} ({site.name}): it is not known where height and width of the image are; call the "
                "model with img_ids, or its latents as a map"
            )
        weight: Any = None
        if self.down_factor > 1:
            if site.layer >= len(self.spatial_weights):
                raise ValueError(f"layer {site.layer} is beyond num_layers={len(self.spatial_weights)}")
            weight = self.spatial_weights[site.layer]
        out: Tensor = clear_attention(
            q, k, v, layout, self.window_size, weight, scale=site.scale, proportional=self.proportional,
            trained_tokens=self.trained_tokens,
        )  # fmt: skip
        return out

    def load_authors(self, state_dict: Mapping[str, Tensor], names: Sequence[str]) -> None:
        """Load the released weights of pooled keys; ``names`` are those of the attention modules, in order.

        Raises:
            ValueError: one that is missing, or of another factor.
        """
        for i, name in enumerate(names):
            key = f"{name}.processor.spatial_weight"
            if key not in state_dict or state_dict[key].numel() != self.down_factor**2:
                raise ValueError(f"state_dict has no {key!r} of {self.down_factor} x {self.down_factor} numbers")
            with torch.no_grad():
                self.spatial_weights[i].copy_(state_dict[key].reshape(self.down_factor, self.down_factor))
