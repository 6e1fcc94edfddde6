"""What each node says for a token by itself: the logit as a sum over all that was written into the stream.

With the final norm frozen at the statistics of the prompt, ``logit = b + sum_c (G c) . W_U`` over embedding, heads,
biases and feed-forwards ``c``, with ``G c = gain * c / rms(x_L)``, or ``gain * (c - mean(c)) / std(x_L)`` of a layer
norm.

Reference: Elhage et al., 2021, "A mathematical framework for transformer circuits"; Lieberum et al., 2023, arXiv
2307.09458, section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...checks import check_int, checked
from ...hooks import Node
from .effects import table_of
from .metrics import Metric
from .replay import Inputs, Replay
from .stream import FrozenNorm, need_stream, projection_bias


@dataclass
class LogitAttribution:
    """A logit as a sum.

    Args:
        nodes: heads and feed-forwards.
        values: (V, B) what each says.
        embedding: (B,) the stream before the first block.
        rest: (B,) biases of output projections, of the norm and of the unembedding.
        logit: (B,) what the model gives; ``values.sum(0) + embedding + rest``.
    """

    nodes: list[Node]
    values: Tensor
    embedding: Tensor
    rest: Tensor
    logit: Tensor

    def grid(self) -> Tensor:
        """(layers, heads) means over samples of the heads."""
        return table_of([(n, v) for n, v in zip(self.nodes, self.values.mean(1), strict=True) if n.head is not None])

    def ranked(self, largest: bool = True) -> list[Node]:
        """The nodes by their mean, largest or smallest first."""
        order = self.values.mean(1).argsort(descending=largest, stable=True)
        return [self.nodes[i] for i in order.tolist()]


@checked
@torch.no_grad()
def logit_attribution(
    model: nn.Module,
    inputs: Inputs,
    tokens: Tensor | Sequence[int],
    against: Tensor | Sequence[Sequence[int]] | None = None,
    answer: int = -1,
) -> LogitAttribution:
    """The logit of a token as a sum over nodes, with the final norm frozen.

    Args:
        model, inputs: as for :func:`attnlib.look.patch`.
        tokens: (B,) token ids.
        against: (B, K) token ids whose mean logit is subtracted, as the paper does with all choices; ``None`` for none.
        answer: position of the logits.

    Raises:
        ValueError: a model whose nodes do not add up to its logits; ids that do not fit.
    """
    check_int("answer", answer)
    ids = torch.as_tensor(tokens)
    if ids.dim() != 1 or ids.is_floating_point():
        raise ValueError(f"tokens must be one token id per sample (B,), got {ids.dtype} {tuple(ids.shape)}")
    asked = ids[:, None]
    if against is not None:
        against = torch.as_tensor(against)
        if against.dim() != 2 or len(against) != len(ids):
            raise ValueError(f"against must be (B, K) for {len(ids)} samples, got {tuple(against.shape)}")
        asked = torch.cat([asked, against.to(ids)], 1)

    def score(logits: Tensor) -> Tensor:
        return logits[..., 0] - (logits[..., 1:].mean(-1) if against is not None else 0)

    replay = Replay(model, inputs, Metric(lambda logits, samples: score(logits), asked), answer, answer)
    need_stream(replay)
    nodes, at = replay.nodes, replay.read
    assert nodes.norm is not None
    linear = FrozenNorm(nodes.norm, replay.hidden[-1][:, at])
    weight, bias = nodes.rows(asked.to(replay.device))
    weight = weight.to(replay.hidden[-1])

    def says(written: Tensor) -> Tensor:
        """(..., B, C) -> (..., B)."""
        return score(torch.einsum("...bc,bkc->...bk", linear(written), weight))

    found: list[Node] = []
    values: list[Tensor] = []
    rest = torch.einsum("c,bkc->bk", linear.bias, weight)
    rest = score(rest if bias is None else rest + bias.to(rest))
    for number in range(len(nodes)):
        z = replay.values["z"][number][:, :, at]
        by_head = torch.einsum("bhd,hdc->hbc", z, nodes.output_weight(number).to(z))
        found += [Node("z", number, head) for head in range(len(by_head))]
        values += list(says(by_head))
        rest = rest + says(projection_bias(nodes, number).expand(replay.batch, -1))
        if "mlp" in replay.values:
            found.append(Node("mlp", number))
            values.append(says(replay.values["mlp"][number][:, at]))
    embedding = says(replay.hidden[0][:, at])
    return LogitAttribution(found, torch.stack(values), embedding, rest, replay.clean)
