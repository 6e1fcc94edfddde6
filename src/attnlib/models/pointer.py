"""Pointer networks (Vinyals et al., 2015): an LSTM reads a set of points, another answers by pointing at them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checks import check_int, checked
from ..nn.dense.pointer_networks import PointerAttention
from ..nn.layers import LSTM, zero_invalid
from ..types import check_rank, check_valid, check_width

State = tuple[Tensor, Tensor]


class PointerNetwork(nn.Module):
    """Encoder LSTM, decoder LSTM, and pointer attention as the decoder's output layer.

    The decoder starts from the encoder's last state and a learned start symbol; afterwards its input is the point that
    was pointed at. No context vector is fed. With ``stop`` a learned end symbol is one more thing to point at, so that
    answers have any length. No parameter depends on the number of points.

    Args:
        input_dim: coordinates of a point.
        hidden: width of both LSTMs.
        stop: answers end with the end symbol; otherwise they are as long as the set (tours, orders).

    Reference: Vinyals, Fortunato, Jaitly, 2015, arXiv 1506.03134.

    >>> net = PointerNetwork(hidden=16)
    >>> points, answers = torch.rand(3, 5, 2), torch.stack([torch.randperm(5) for _ in range(3)])
    >>> net(points, answers).shape, net.decode(points, tour=True)[0].shape
    (torch.Size([3, 5, 5]), torch.Size([3, 5]))
    """

    @checked
    def __init__(self, input_dim: int = 2, hidden: int = 128, stop: bool = False):
        super().__init__()
        input_dim, hidden = check_int("input_dim", input_dim, least=1), check_int("hidden", hidden, least=1)
        self.input_dim, self.hidden = input_dim, hidden
        self.encoder = LSTM(input_dim, hidden, batch_first=True)
        self.decoder = LSTM(input_dim, hidden, batch_first=True)
        self.pointer = PointerAttention(hidden)
        self.start = nn.Parameter(torch.empty(input_dim))
        self.stop = nn.Parameter(torch.empty(hidden)) if stop else None
        for p in self.parameters():
            nn.init.uniform_(p, -0.08, 0.08)

    def encode(self, points: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor, State]:
        """What can be pointed at, projected (B, M, hidden), where it exists (B, M), and the decoder's first state.

        ``M`` is the number of points, plus one for the end symbol, which comes last. ``valid`` (B, N) says which
        points exist; missing ones must stand at the end of their row.
        """
        check_rank("points", points, 3, "(B, N, input_dim)")
        check_width("points", points, self.input_dim, "input_dim")
        check_valid("valid", valid, points.shape[:2])
        if points.shape[1] == 0:
            raise ValueError("points has no point; a pointer network needs at least one")
        points = zero_invalid(points, valid)
        if valid is None:
            memory, (h, c) = self.encoder(points)
            exists = torch.ones(points.shape[:2], dtype=torch.bool, device=points.device)
        else:
            lengths = valid.sum(1)
            if not bool((valid == (torch.arange(valid.shape[1], device=valid.device) < lengths[:, None])).all()):
                raise ValueError("valid must have the points that exist first and the padding at the end of each row")
            if int(lengths.min()) == 0:
                raise ValueError("valid leaves a sample without points")
            packed = nn.utils.rnn.pack_padded_sequence(points, lengths.cpu(), batch_first=True, enforce_sorted=False)
            out, (h, c) = self.encoder(packed)
            memory, _ = nn.utils.rnn.pad_packed_sequence(out, batch_first=True, total_length=points.shape[1])
            exists = valid
        if self.stop is not None:
            memory = torch.cat([memory, self.stop.expand(len(memory), 1, -1)], 1)
            exists = torch.cat([exists, exists.new_ones(len(exists), 1)], 1)
        return self.pointer.w1(memory), exists, (h, c)

    def forward(self, points: Tensor, answers: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, L, M) log-probabilities of every pointer, the true earlier ones given.

        Args:
            points: (B, N, input_dim).
            answers: (B, L) indices of points, -1 after the end. With ``stop``, L must leave room for one -1.
            valid: (B, N) boolean, which points exist; padding at the end of rows.

        Raises:
            ValueError: indices outside the set, or shapes that do not fit.
        """
        check_rank("answers", answers, 2, "(B, L)")
        if answers.shape[0] != points.shape[0]:
            raise ValueError(f"answers has batch {answers.shape[0]}, points has batch {points.shape[0]}")
        n = points.shape[1]
        if answers.numel() and not -1 <= int(answers.min()) <= int(answers.max()) < n:
            raise ValueError(
                f"answers holds indices from {int(answers.min())} to {int(answers.max())}; possible: 0 to {n - 1}, "
                "and -1 after the end"
            )
        keys, exists, state = self.encode(points, valid)
        given = points.gather(1, answers[:, :-1].clamp(min=0).unsqueeze(-1).expand(-1, -1, self.input_dim))
        d, _ = self.decoder(torch.cat([self.start.expand(len(points), 1, -1), given], 1), state)
        return self.pointer.log_probs(d, keys, exists[:, None], projected=True)

    def loss(self, points: Tensor, answers: Tensor, valid: Tensor | None = None) -> Tensor:
        """Mean of ``-log P(C_i)`` over all pointers, the end symbol's included. Arguments as in :meth:`forward`."""
        return self.targets_loss(self(points, answers, valid), answers)

    def targets_loss(self, log_probs: Tensor, answers: Tensor) -> Tensor:
        """The same, from ``log_probs`` (B, L, M) computed before."""
        if self.stop is None:
            targets, counted = answers, answers >= 0
        else:
            ended = answers < 0
            targets = answers.masked_fill(ended, log_probs.shape[-1] - 1)
            counted = ~ended | (ended.long().cumsum(1) == 1)  # the first -1 is the end symbol, the others padding
        picked = log_probs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        # where, not a product: what is left out may be -inf
        return -torch.where(counted, picked, 0.0).sum() / counted.sum().clamp(min=1)

    @torch.no_grad()
    def decode(
        self,
        points: Tensor,
        valid: Tensor | None = None,
        *,
        beams: int = 1,
        tour: bool = False,
        max_length: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The most probable answers that beam search finds.

        Args:
            points: (B, N, input_dim).
            valid: (B, N) boolean, which points exist.
            beams: hypotheses kept; 1 is greedy.
            tour: only answers that visit every point once; their length is the number of points.
            max_length: longest answer; ``N`` without ``stop`` and ``3 N`` with it by default.

        Returns:
            (B, L) indices, -1 after the end, and (B,) their log-probabilities (under the distribution restricted to
            what was allowed).

        Raises:
            ValueError: a beam width below one.
        """
        if beams < 1:
            raise ValueError(f"beams={beams} must be at least 1")
        keys, exists, (h, c) = self.encode(points, valid)
        batch, choices = exists.shape
        n = points.shape[1]
        steps = (n if tour or self.stop is None else 3 * n) if max_length is None else max_length
        if tour:
            steps = min(steps, n)
        rows = torch.arange(batch, device=points.device)
        width = 1
        score = points.new_zeros(batch, 1)
        free = exists.unsqueeze(1)  # (B, beam, M)
        if tour and self.stop is not None:
            free = free & (torch.arange(choices, device=points.device) < n)
        done = torch.zeros(batch, 1, dtype=torch.bool, device=points.device)
        taken = torch.empty(batch, 1, 0, dtype=torch.long, device=points.device)
        fed = self.start.expand(batch, 1, -1)
        for _ in range(steps):
            if bool(done.all()):
                break
            d, (h, c) = self.decoder(fed.reshape(batch * width, 1, -1), (h, c))
            readers = d.view(batch, width, -1)
            # a beam that has ended may point anywhere; what it says is not used
            log_p = self.pointer.log_probs(readers, keys, free | done.unsqueeze(-1), projected=True).to(score.dtype)
            ended = torch.full_like(log_p, float("-inf"))
            ended[..., 0] = 0.0
            total = score.unsqueeze(-1) + torch.where(done.unsqueeze(-1), ended, log_p)
            score, flat = total.flatten(1).topk(min(beams, total[0].numel()), -1)
            width = score.shape[1]
            parent, choice = flat // choices, flat % choices
            at = (rows[:, None], parent)
            before = done[at]
            choice = torch.where(before, -1, choice)
            done = before | (choice == n)  # n is the end symbol; no point has that index
            choice = choice.masked_fill(choice == n, -1)
            taken = torch.cat([taken[at], choice.unsqueeze(-1)], -1)
            free = free[at]
            picked = choice.clamp(min=0)
            if tour:
                hit = torch.zeros_like(free).scatter(-1, picked.unsqueeze(-1), True) & (choice >= 0).unsqueeze(-1)
                free = free & ~hit
                done = done | ~free.any(-1)
            fed = points[rows[:, None], picked]
            h, c = (s.view(batch, -1, self.hidden)[at].flatten(0, 1).unsqueeze(0) for s in (h[0], c[0]))
        best = score.argmax(1)
        return taken[rows, best], score[rows, best]
