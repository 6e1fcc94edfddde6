"""Tokens with rows and heads of their own, beside a model that stays as it is.

A task token is one of the vocabulary whose row of the embedding is learned anew, and whose last hidden state a head
reads: boxes, masks, moments. Rows are put in place of the looked-up ones (no parameter of the model is written to), so
that all other rows are the same bits, and rows and heads are saved without the model.

>>> tokens = TaskTokens({"box": 60}, dim=32, heads={"box": nn.Linear(32, 4)})
>>> ids, states = torch.tensor([[1, 60, 60], [2, 3, 60]]), torch.randn(2, 3, 32)
>>> taken = tokens(ids, states)["box"]
>>> taken.output.shape, taken.sample.tolist(), taken.slot.tolist()
(torch.Size([3, 4]), [0, 0, 1], [1, 2, 2])
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_axes, check_flag, check_int, check_real, check_whole, describe
from ...hooks import Intervention, Reading


class Taken(NamedTuple):
    """What one task token said, in the order of samples and places.

    Args:
        output: (K, ...) of its head; ``None`` for a token that only has a row.
        states: (K, C) last hidden states.
        sample: (K,) row of the batch.
        slot: (K,) place in the sequence.
    """

    output: Any
    states: Tensor
    sample: Tensor
    slot: Tensor


class TaskTokens(nn.Module):
    """Learned rows of chosen tokens, and the heads that read their last hidden states.

    Args:
        tokens: ``{name: id}`` of tokens that are in the model's vocabulary.
        dim: width of the model.
        heads: ``{name: module}``, (K, C) -> what the task needs, for every token; ``None`` for one that only has a row,
            such as a word that announces another.
        outputs: rows of the model's head are learned as well, so that tokens can be told apart when they are chosen.
        std: of the rows at the beginning.
        start: (V, C) table of embeddings whose rows of these tokens are where learning starts.

    Raises:
        ValueError: a token without a head, a head without a token, an id twice.
    """

    def __init__(
        self,
        tokens: Mapping[str, int],
        dim: int,
        heads: Mapping[str, nn.Module | None],
        outputs: bool = False,
        std: float = 1.0,
        start: Tensor | None = None,
    ):
        super().__init__()
        if not isinstance(tokens, Mapping) or not tokens or not all(isinstance(n, str) and n for n in tokens):
            raise ValueError(f"tokens must be {{name: id}} of at least one token, got {tokens!r:.200}")
        self.tokens = {name: check_int(f"tokens[{name!r}]", i, least=0) for name, i in tokens.items()}
        if len(set(self.tokens.values())) != len(self.tokens):
            raise ValueError(f"tokens gives one id to two names: {self.tokens}")
        without = [n for n in tokens if n not in heads]
        if without:
            raise ValueError(
                f"token {without[0]!r} has no head; give heads={{{without[0]!r}: module}}, or None for a token that "
                "only has a row"
            )
        foreign = [n for n in heads if n not in tokens]
        if foreign:
            raise ValueError(f"heads names {foreign[0]!r}, which is none of the tokens {sorted(tokens)}")
        for name, head in heads.items():
            if head is not None and not isinstance(head, nn.Module):
                raise TypeError(f"heads[{name!r}] must be a module or None, got {type(head).__name__}")
        self.dim = check_int("dim", dim, least=1)
        check_real("std", std, least=0)
        check_flag("outputs", outputs)
        self.heads = nn.ModuleDict({n: h for n, h in heads.items() if h is not None})
        self.rows = nn.Parameter(torch.empty(len(self.tokens), dim))
        self.out_rows = nn.Parameter(torch.empty(len(self.tokens), dim)) if outputs else None
        if start is None:
            nn.init.normal_(self.rows, std=std)
        else:
            self._check_start(start)
            with torch.no_grad():
                self.rows.copy_(start.detach()[list(self.tokens.values())])
        if self.out_rows is not None:
            nn.init.normal_(self.out_rows, std=0.02)

    def _check_start(self, start: Tensor) -> None:
        if not isinstance(start, Tensor) or start.dim() != 2 or start.shape[1] != self.dim:
            raise ValueError(f"start must be a table (V, {self.dim}), got {describe(start)}")
        beyond = {n: i for n, i in self.tokens.items() if i >= len(start)}
        if beyond:
            raise ValueError(f"start has {len(start)} rows, and tokens names {beyond}")

    def extra_repr(self) -> str:
        return f"{self.tokens}, dim={self.dim}, outputs={self.out_rows is not None}"

    def numbers(self, device: torch.device | None = None) -> Tensor:
        """Of the tokens in the vocabulary, in their order."""
        return torch.tensor(list(self.tokens.values()), device=device)

    def where(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Which of ``ids`` are task tokens, and which of them (zero elsewhere); two tensors of their shape."""
        same = ids.unsqueeze(-1) == self.numbers(ids.device)
        return same.any(-1), same.int().argmax(-1)

    def embed(
        self,
        ids: Tensor,
        embeds: Tensor,
        features: Mapping[str, Sequence[Tensor]] | None = None,
        before: Mapping[str, Tensor] | None = None,
        whole: bool = True,
    ) -> Tensor:
        """(B, N, C) embeddings with learned rows, or features, in place of task tokens; a new tensor.

        Args:
            ids: (B, N).
            embeds: (B, N, C) that the model looked up.
            features: ``{name: one (K, C) for each sample}``: the first K of these tokens of a sample get its features
                in place of the learned row. Rows of the batch that are copies of a sample (beams) get the sample's.
            before: ``{name: (B,)}`` how many of these tokens stood before, where ``ids`` goes on.
            whole: ``ids`` is the end of the prompt, so that as many tokens as features must have stood there.

        Raises:
            ValueError: numbers of tokens and features that differ.
        """
        check_whole("ids", ids)
        check_axes("embeds", embeds, B=ids.shape[0], N=ids.shape[1], C=self.dim)
        is_task, which = self.where(ids)
        rows = self.rows.to(embeds.dtype)
        out = torch.where(is_task.unsqueeze(-1), rows[which], embeds)
        for name, given in (features or {}).items():
            out = self._put(name, given, ids, out, None if before is None else before.get(name), whole)
        return out

    def _put(
        self, name: str, given: Sequence[Tensor], ids: Tensor, out: Tensor, before: Tensor | None, whole: bool
    ) -> Tensor:
        if name not in self.tokens:
            raise ValueError(f"features names {name!r}, which is none of the tokens {sorted(self.tokens)}")
        batch = len(ids)
        if not len(given) or batch % len(given):
            raise ValueError(
                f"features[{name!r}] holds features of {len(given)} samples, and the batch has {batch} rows"
            )
        for f in given:
            check_axes(f"features[{name!r}]", f, K=None, C=self.dim)
        copies = batch // len(given)
        counts = torch.tensor([len(f) for f in given], device=ids.device)
        starts = (counts.cumsum(0) - counts).repeat_interleave(copies)
        counts = counts.repeat_interleave(copies)
        here = ids == self.tokens[name]
        order = here.cumsum(1) - 1
        if before is not None:
            order = order + before.unsqueeze(1)
        seen = here.sum(1) + (0 if before is None else before)
        if whole and bool((seen != counts).any()):
            row = int((seen != counts).nonzero()[0])
            raise ValueError(
                f"sample {row // copies} has {int(seen[row])} tokens {name!r} ({self.tokens[name]}) and "
                f"{int(counts[row])} features; give one feature for each token"
            )
        if not int(counts.sum()):
            return out
        flat = torch.cat([f.to(out) for f in given])
        mine = here & (order < counts.unsqueeze(1))
        index = (starts.unsqueeze(1) + order).clamp(0, len(flat) - 1)
        return torch.where(mine.unsqueeze(-1), flat[index], out)

    def logits(self, states: Tensor, logits: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., V) scores with those of task tokens by the learned rows of the head; a new tensor.

        Args:
            states: (..., C) that the head read.
            logits: (..., V).
            bias: (V,) of the head.
        """
        if self.out_rows is None:
            return logits
        known = self.numbers(logits.device)
        new = F.linear(states, self.out_rows.to(states.dtype), None if bias is None else bias[known].detach())
        return logits.index_copy(-1, known, new.to(logits.dtype))

    def forward(self, ids: Tensor, states: Tensor, names: Sequence[str] | None = None) -> dict[str, Taken]:
        """What the heads say of the task tokens in ``ids`` (B, N) from last hidden states (B, N, C).

        Tokens that are not there are left out, and their heads are not called.

        Args:
            names: of which tokens; all that have a head by default.

        Raises:
            ValueError: a name without a head.
        """
        check_whole("ids", ids)
        check_axes("states", states, B=ids.shape[0], N=ids.shape[1], C=self.dim)
        out = {}
        for name in self.heads if names is None else names:
            self.check_head(name)
            sample, slot = (ids == self.tokens[name]).nonzero(as_tuple=True)
            if len(sample):
                taken = states[sample, slot]
                out[name] = Taken(self.heads[name](taken), taken, sample, slot)
        return out

    def check_head(self, name: str) -> nn.Module:
        """The head of a token.

        Raises:
            ValueError: it has none.
        """
        if name not in self.heads:
            what = "has a row, but no head" if name in self.tokens else f"is none of the tokens {sorted(self.tokens)}"
            raise ValueError(f"token {name!r} {what}; tokens with heads: {sorted(self.heads)}")
        return self.heads[name]


class UseTaskTokens(Intervention):
    """Task tokens in a transformers model: their rows where it reads them, their states where it has read them.

    In training, :meth:`read` gives what the heads say of the last call; behind ``generate``, :meth:`found` what they
    say of the sequences that came out, whatever beams did on the way.

    Args:
        tokens: rows and heads.
        features: see :meth:`TaskTokens.embed`; of the next prompt.
        whole: states of all tokens of the prompt are needed, so that company that removes some is refused.

    >>> # with attnlib.attach(model, use := UseTaskTokens(tokens)):
    >>> #     sequences = model.generate(**inputs)
    >>> # use.found(sequences)["box"].output
    """

    name = "task-tokens"
    follows_sequence = False

    def __init__(self, tokens: TaskTokens, features: Mapping[str, Sequence[Tensor]] | None = None, whole: bool = False):
        if not isinstance(tokens, TaskTokens):
            raise TypeError(f"tokens must be TaskTokens, got {type(tokens).__name__}")
        self.tokens, self.features, self.all_tokens = tokens, features, check_flag("whole", whole)
        self.last: tuple[Tensor, Tensor] | None = None
        self._prompt: tuple[Tensor, Tensor] | None = None
        self._kept: dict[tuple[int, ...], Tensor] = {}
        self._samples = 0
        self._call: tuple[Reading, Tensor] | None = None
        self._asked: tuple[Tensor, bool] | None = None

    def reset(self) -> None:
        self.last, self._prompt, self._call, self._kept, self._samples = None, None, None, {}, 0
        self._asked = None

    def results(self) -> Any:
        """``{name: how many were read}`` of the last call."""
        if self.last is None:
            return {}
        ids, _ = self.last
        return {name: int((ids == i).sum()) for name, i in self.tokens.tokens.items()}

    def conflicts(self, other: Intervention) -> str | None:
        if not isinstance(other, UseTaskTokens):
            return None
        both = sorted(set(self.tokens.tokens.values()) & set(other.tokens.tokens.values()))
        return f"both put a learned row in place of tokens {both}; keep them in one TaskTokens" if both else None

    def meet(self, model: nn.Module) -> None:
        any_model: Any = model
        table = any_model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
        weight = getattr(table, "weight", None)
        if not isinstance(weight, Tensor):
            return
        beyond = {n: i for n, i in self.tokens.tokens.items() if i >= len(weight)}
        if beyond:
            raise ValueError(
                f"tokens names {beyond}, and {type(model).__name__} knows {len(weight)} tokens; make room first: "
                f"model.resize_token_embeddings({max(beyond.values()) + 1})"
            )
        if weight.shape[1] != self.tokens.dim:
            raise ValueError(
                f"task tokens have dim={self.tokens.dim}, and {type(model).__name__} embeds in {weight.shape[1]}"
            )

    def on_attach(self, session: Any) -> None:
        if self.tokens.out_rows is None:
            return
        head = session.model.get_output_embeddings()
        if head is None:
            raise ValueError(
                f"outputs=True learns rows of the head, and {type(session.model).__name__} has none; attach to the "
                "model with its language head"
            )

        def scored(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return self.tokens.logits(args[0], output, getattr(module, "bias", None))

        session.hook(head.register_forward_hook(scored))

    def on_embeddings(self, reading: Reading, embeds: Tensor) -> Tensor:
        self._asked = None
        if not self._has(reading.ids) and (self.features is None or reading.phase == "decode"):
            return embeds
        if self.features is None:
            return self.tokens.embed(reading.ids, embeds)
        notes = self.session.notes
        length = notes.prompt_length or 0
        here = reading.offset + reading.ids.shape[1]
        if reading.offset and reading.phase == "decode":
            return self.tokens.embed(reading.ids, embeds)
        key = ("task-tokens", id(self))
        before = notes.get(key) if reading.offset else None
        notes[key] = {
            name: (reading.ids == self.tokens.tokens.get(name, -1)).sum(1) + (before[name] if before else 0)
            for name in self.features
        }
        # Without a cache a prompt is read again with new tokens, which have no features.
        whole = here >= length and not reading.step
        return self.tokens.embed(reading.ids, embeds, self.features, before, whole)

    def _has(self, ids: Tensor) -> bool:
        """Whether one of the tokens is there; most steps of decoding read none, and ask twice."""
        if self._asked is None or self._asked[0] is not ids:
            known = set(self.tokens.tokens.values())
            self._asked = ids, not known.isdisjoint(itertools.chain.from_iterable(ids.tolist()))
        return self._asked[1]

    def on_states(self, reading: Reading, states: Tensor) -> Tensor:
        if self.session.branch is not None:
            return states  # others run the model from within a step, and the step goes on behind it
        self.last, self._call = (reading.ids, states), (reading, states)
        if not reading.step:
            ids, held = reading.ids, states
            if reading.offset and self._prompt is not None:
                ids, held = torch.cat([self._prompt[0], ids], 1), torch.cat([self._prompt[1], held], 1)
            self._prompt = ids, held
        return states

    def on_logits(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Nothing is changed; the tokens so far say which sequence a state belongs to."""
        if self._call is None or self.session.branch is not None:
            return logits
        reading, states = self._call
        beams = max(1, reading.beams)
        if not reading.offset and not reading.step:
            self._kept, self._samples = {}, len(ids) // beams
        if not self._has(reading.ids):
            return logits
        if ids.shape[1] <= int(reading.slots.max()):  # drafts of a step are asked about one by one
            reading = reading.but(ids=reading.ids.masked_fill(reading.slots >= ids.shape[1], -1))
        is_task, _ = self.tokens.where(reading.ids)
        for row, at in is_task.nonzero().tolist():
            slot = int(reading.slots[row, at])
            prefix = ids[row, : slot + 1].tolist()
            self._kept[(row // beams, *prefix)] = states[row, at]
        return logits

    @property
    def prompt(self) -> tuple[Tensor, Tensor]:
        """(B, N) tokens and (B, N, C) last states of the last prompt, copied for beams as ``generate`` does.

        Raises:
            RuntimeError: no prompt was read.
        """
        if self._prompt is None:
            raise RuntimeError("no prompt was read yet: call the attached model first")
        return self._prompt

    def read(self, names: Sequence[str] | None = None) -> dict[str, Taken]:
        """What the heads say of the tokens of the last call, with gradient where it ran with it.

        Raises:
            RuntimeError: the model was not called.
        """
        if self.last is None:
            raise RuntimeError("no tokens were read yet: call the attached model first")
        return self.tokens(*self.last, names=names)

    def found(self, sequences: Tensor, names: Sequence[str] | None = None) -> dict[str, Taken]:
        """What the heads say of task tokens in sequences (R, L) that ``generate`` gave, prompts included.

        A token that ended its sequence was never read, and says nothing.

        Args:
            sequences: several of one sample stand side by side.
        """
        check_whole("sequences", sequences)
        if not self._samples or len(sequences) % self._samples:
            raise ValueError(
                f"sequences has {len(sequences)} rows, and the last generate() answered {self._samples} prompts"
            )
        for name in names or ():
            self.tokens.check_head(name)
        copies = len(sequences) // self._samples
        out = {}
        for name in self.tokens.heads if names is None else names:
            states, sample, slot = [], [], []
            for row, at in (sequences == self.tokens.tokens[name]).nonzero().tolist():
                state = self._kept.get((row // copies, *sequences[row, : at + 1].tolist()))
                if state is not None:
                    states.append(state)
                    sample.append(row)
                    slot.append(at)
            if states:
                where = sequences.device
                held = torch.stack(states)
                said = self.tokens.heads[name](held)
                out[name] = Taken(said, held, torch.tensor(sample, device=where), torch.tensor(slot, device=where))
        return out
