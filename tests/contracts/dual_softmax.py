"""LACING, Zhao et al. 2024 (2411.14279): image keys and text keys normalised apart, as an intervention."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attnlib import masks

TEXT, IMAGE = 1, 2


@dataclass
class DualAttention:
    """O = A_img V + A_txt V: the rest of the call runs twice, on one q, k, v, under two masks."""

    types: Tensor  # (B, M) of {0 pad, 1 text, 2 image}

    def around_attention(self, site: Any, q: Tensor, k: Tensor, v: Tensor, call: Any) -> Tensor:
        image = call(q, k, v, mask=masks.explicit((self.types == IMAGE)[:, None, None].expand(-1, 1, q.shape[2], -1)))
        text = masks.explicit((self.types == TEXT)[:, None, None].expand(-1, 1, q.shape[2], -1))
        return image + call(q, k, v, mask=text & masks.causal())
