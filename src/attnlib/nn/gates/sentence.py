"""Sentence attention: an embedding says how much every channel counts.

Khoshsirat and Kambhamettu, 2023, "Sentence Attention Blocks for Answer Grounding", arXiv 2309.11593. For a map ``x`` of
C channels and the embedding ``s`` of a sentence,

    ``g = softmax_C(W_2 relu(LN(W_1 s + b_1)) + b_2)``,    ``y = x * g``,

one gate for all places. A softmax over C channels divides a map by about C: what follows has to bring it back, and
``"softmax*C"`` does so at once. The gate of the released code reads the sentence alone (``source="sentence"``); the
form that the abstract describes reads the mean of the map beside it (``"concat"``), which with a sigmoid, no norm and
no weight on the sentence is squeeze-and-excitation. The later embedding attention block reads several embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...checks import check_choice, check_flag, check_int, check_ints, check_valid, describe
from ..layers import masked_mean, zero_invalid
from ..released import Released

GATES = ("softmax", "sigmoid", "softmax*C")
SOURCES = ("sentence", "concat")


class SentenceGate(nn.Module):
    """``x * gate(text)``.

    Args:
        dim: channels C of the map.
        text_dim: width of the embedding, or of each of several that are set side by side.
        hidden: width inside over that of what the gate reads; 4 as released, 2 in embedding attention blocks.
        gate: ``"softmax"``, ``"sigmoid"`` or ``"softmax*C"``.
        source: ``"sentence"``, or ``"concat"`` for the mean of the map beside it.
        norm: the LayerNorm.

    Raises:
        ValueError: embeddings of another width or batch.

    >>> SentenceGate(8, 6)(torch.randn(2, 4, 5, 8), torch.randn(2, 6)).shape
    torch.Size([2, 4, 5, 8])
    """

    def __init__(
        self, dim: int, text_dim: int | Sequence[int] = 384, hidden: int = 4, gate: str = "softmax",
        source: str = "sentence", norm: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.dim = check_int("dim", dim, least=1)
        self.text_dims = check_ints("text_dim", (text_dim,) if isinstance(text_dim, int) else text_dim, least=1)
        if not self.text_dims:
            raise ValueError("text_dim must name at least one embedding, got none")
        check_int("hidden", hidden, least=1)
        check_choice("gate", gate, GATES)
        check_choice("source", source, SOURCES)
        check_flag("norm", norm)
        self.kind, self.source = gate, source
        read = sum(self.text_dims) + (dim if source == "concat" else 0)
        self.fc1, self.fc2 = nn.Linear(read, hidden * read), nn.Linear(hidden * read, dim)
        self.norm = nn.LayerNorm(hidden * read) if norm else nn.Identity()

    def embedding(self, text: Tensor | Sequence[Tensor], batch: int) -> Tensor:
        """Checked: (batch, sum of ``text_dim``)."""
        parts = (text,) if isinstance(text, Tensor) else tuple(text)
        for t in parts:
            if not isinstance(t, Tensor) or t.dim() != 2 or not t.is_floating_point():
                raise ValueError(f"text must be embeddings (B, E) of floating point, got {describe(t)}")
        given = [tuple(t.shape) for t in parts]
        if len(parts) == 1 and given[0] == (batch, sum(self.text_dims)):
            return parts[0]
        if given != [(batch, e) for e in self.text_dims]:
            raise ValueError(f"text must be embeddings {[(batch, e) for e in self.text_dims]}, got {given}")
        return torch.cat(parts, 1)

    def gate(
        self, x: Tensor, text: Tensor | Sequence[Tensor], valid: Tensor | None = None, has_text: Tensor | None = None
    ) -> Tensor:
        """(B, C), to look at; arguments as of :meth:`forward`."""
        if not isinstance(x, Tensor) or x.dim() < 3 or x.shape[-1] != self.dim or not x.is_floating_point():
            raise ValueError(f"x must be a map (B, *grid, {self.dim}) of floating point, got {describe(x)}")
        check_valid("valid", valid, x.shape[:-1])
        check_valid("has_text", has_text, x.shape[:1])
        s = zero_invalid(self.embedding(text, x.shape[0]), has_text).to(self.fc1.weight.dtype)
        if self.source == "concat":
            s = torch.cat([s, masked_mean(x, valid).to(s.dtype)], 1)
        y = self.fc2(self.norm(self.fc1(s)).relu())
        # Without a sentence: the gate of a last layer that says nothing.
        y = zero_invalid(y, has_text)
        if self.kind == "sigmoid":
            return y.sigmoid()
        g = y.softmax(-1)
        return g * self.dim if self.kind == "softmax*C" else g

    def forward(
        self, x: Tensor, text: Tensor | Sequence[Tensor], valid: Tensor | None = None, has_text: Tensor | None = None
    ) -> Tensor:
        """(B, *grid, C) and (B, E) -> (B, *grid, C).

        Args:
            x: the map.
            text: one embedding, or a sequence of them.
            valid: (B, *grid) boolean, which places exist; the others are zeros.
            has_text: (B,) boolean, for which there is a sentence; the others get a gate alike for all channels.
        """
        g = self.gate(x, text, valid, has_text)
        g = g.view(g.shape[0], *[1] * (x.dim() - 2), self.dim)
        return (zero_invalid(x, valid) * g).to(x.dtype)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``SentenceAttention``, and from ``EAB``."""
        theirs = Released(state_dict, "the authors' SentenceAttention")
        names = {"0": "fc1", "1": "norm", "3": "fc2"}
        return theirs.close(
            theirs.renamed({r"attention\.(0|1|3)\.(weight|bias)": lambda m, value: {f"{names[m[1]]}.{m[2]}": value}})
        )
