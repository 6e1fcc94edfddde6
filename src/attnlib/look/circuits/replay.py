"""The part of a forward pass that a change reaches, run for many changes at once.

A change of a node at position ``p`` of layer ``l`` reaches the tokens from ``p`` on in the layers from ``l`` on, and
nothing else. So the tokens before ``p`` are read once, into a cache that is frozen; the layers below ``l`` are not run
again; and all changes climb through the layers together: a layer is run once for every change at or below it, each a
row of the batch beside the others. At the top, the answer's few logits are computed instead of the vocabulary's.

A model is taken as it is: its blocks are called with the very arguments that it gave them, rows repeated. Where the
norm and the unembedding behind them are not all that follows, the rest of the model is run by the model itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...checks import check_int, check_within, describe
from ...hooks import Capture, Intervention, Nodes, Site, attach
from ...hooks.hf.frozen import frozen
from ...hooks.hf.names import cache_in, cache_name, cache_parameter
from ...hooks.nodes import OF_HEADS, check_positions
from ...hooks.tape import logits_of
from .metrics import Metric

Inputs = Mapping[str, Any] | Tensor

#: Tokens that are run at once, over all changes, where nobody says.
CHUNK = 16384


def named_inputs(name: str, inputs: Any, model: nn.Module | None = None) -> dict[str, Any]:
    """The arguments of a model by name; a tensor is its main one, named ``""`` where a model does not say which."""
    if isinstance(inputs, Mapping) and set(inputs) == {""}:
        inputs = inputs[""]
    if isinstance(inputs, Tensor):
        main = getattr(model, "main_input_name", "")
        return {main if isinstance(main, str) else "": inputs}
    if not isinstance(inputs, Mapping) or not any(isinstance(v, Tensor) for v in inputs.values()):
        raise TypeError(f"{name} must be a tensor or named inputs of the model, got {describe(inputs)}")
    return dict(inputs)


def first_tensor(inputs: Mapping[str, Any]) -> Tensor:
    for name in ("input_ids", "inputs_embeds", "pixel_values", ""):
        if isinstance(inputs.get(name), Tensor):
            return inputs[name]
    return next(v for v in inputs.values() if isinstance(v, Tensor))


def call(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """The model on named inputs, or on the one tensor that stands for its first."""
    return model(inputs[""]) if "" in inputs else model(**inputs)


def check_alike(clean: Mapping[str, Any], corrupted: Mapping[str, Any], name: str = "corrupted") -> None:
    """Raise unless two batches of prompts have the same lengths, padding included.

    Raises:
        ValueError: they are of unequal length.
    """
    a, b = first_tensor(clean), first_tensor(corrupted)
    if a.shape[1:2] != b.shape[1:2]:
        raise ValueError(
            f"clean and {name} prompts must be of equal length, so that positions mean the same in both; got "
            f"{a.shape[1]} and {b.shape[1]} tokens"
        )
    masks = clean.get("attention_mask"), corrupted.get("attention_mask")
    if all(isinstance(m, Tensor) and m.dim() == 2 for m in masks) and masks[0].shape == masks[1].shape:  # type: ignore[union-attr]
        unlike = (masks[0] != masks[1]).any(1).nonzero()[:, 0].tolist()  # type: ignore[index, operator, union-attr]
        if unlike:
            raise ValueError(
                f"clean and {name} prompts must be of equal length, so that positions mean the same in both; samples "
                f"{unlike[:10]} are padded differently"
            )


@dataclass
class Edit:
    """Values to be written into nodes: of variants ``rows`` (E,), heads ``heads`` (E,) or ``None``, (E, B, P, D)."""

    kind: str
    layer: int
    rows: Tensor
    heads: Tensor | None
    values: Tensor


@dataclass
class Hold:
    """Nodes that keep their clean value in every variant: (B, H, P, D) or (B, P, C), but for the edits behind it."""

    kind: str
    layer: int
    values: Tensor


@dataclass
class _Now:
    variants: int = 1
    held: list[Hold] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    record: dict[tuple[str, int], Tensor] | None = None
    wanted: frozenset[tuple[str, int]] = frozenset()


class _Writer(Intervention):
    """What the replayed layers get instead of their own values."""

    name = "replay"
    kinds = ("self",)
    follows_sequence = False

    def __init__(self, numbers: dict[str, int], uses: set[str]):
        self.numbers, self.uses = numbers, uses
        self.now = _Now()
        self.places: Tensor | None = None  # (B, P) positions that edits and holds are written at
        self.hold_places: Tensor | None = None

    def write(self, kind: str, layer: int, x: Tensor) -> Tensor:
        """(V * B, H, n, D) or (V * B, n, C) with what is held and edited in this layer."""
        now = self.now
        held = [h for h in now.held if (h.kind, h.layer) == (kind, layer)]
        edits = [e for e in now.edits if (e.kind, e.layer) == (kind, layer)]
        if now.record is not None and (kind, layer) in now.wanted:
            now.record[kind, layer] = x
        if not held and not edits:
            return x
        new = x.clone().unflatten(0, (now.variants, -1))
        batch = torch.arange(new.shape[1], device=x.device)[:, None]
        for hold in held:
            at = self.hold_places
            assert at is not None
            if kind in OF_HEADS:
                # Indices on both sides of the heads bring the positions in front: (B, P, V, H, D).
                new[:, batch, :, at] = hold.values.transpose(1, 2).unsqueeze(2).to(new)
            else:
                new[:, batch, at] = hold.values.to(new)
        at = self.places
        for edit in edits:
            assert at is not None
            rows = edit.rows[:, None, None]
            if edit.heads is None:
                new[rows, batch, at] = edit.values.to(new)
            else:
                new[rows, batch, edit.heads[:, None, None], at] = edit.values.to(new)
        return new.flatten(0, 1)

    def on_output(self, site: Site, out: Tensor) -> Tensor:
        return self.write("z", self.numbers[site.name], out)

    def on_qkv(self, site: Site, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        number = self.numbers[site.name]
        return self.write("q", number, q), self.write("k", number, k), self.write("v", number, v)

    def on_mlp_output(self, site: Site, out: Tensor) -> Tensor:
        return self.write("mlp", self.numbers[site.name], out)


@dataclass
class _Block:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str | None  # of the argument that is the stream, None where it is the first by place
    tuple_: bool


class Replay:
    """A clean pass, and what is needed to run parts of it again.

    Args:
        model: any with self-attention in numbered blocks that follow each other.
        inputs: named inputs (B, N), or a tensor.
        metric: what is measured at ``answer``.
        positions: where nodes are changed: numbers, or (B, P); ``None`` for all tokens.
        answer: position of the token whose logits are measured; of models that give (B, K) it does not matter.
        chunk: tokens that are run at once, over all changes.

    Raises:
        ValueError: blocks that do not follow each other, positions outside the prompt, a metric for another batch.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        metric: Metric,
        positions: Any = -1,
        answer: int = -1,
        chunk: int | None = None,
    ):
        if not isinstance(metric, Metric):
            raise TypeError(f"metric must be an attnlib.look.Metric such as logit_difference, got {describe(metric)}")
        self.nodes = nodes = Nodes(model)
        self.model, self.metric = nodes.model, metric
        if self.model.training:
            raise ValueError("the model is in training mode, where two passes differ by dropout; call model.eval()")
        self.inputs = named_inputs("inputs", inputs, self.model)
        first = first_tensor(self.inputs)
        self.batch = len(first)
        self.device = first.device
        if metric.tokens is not None and len(metric.tokens) != self.batch:
            raise ValueError(f"the metric is for {len(metric.tokens)} samples, but the prompts are {self.batch}")
        self.chunk = CHUNK if chunk is None else check_int("chunk", chunk, least=1)
        self.answer = check_int("answer", answer)
        self.given = check_positions(positions)
        self.blocks: list[_Block] = []
        self.start, self._cache = 0, None
        self._read(first)

    # ---- the clean pass

    def _read(self, first: Tensor) -> None:
        """Run the prompt once: up to the first changed token into a cache, and from there with all arguments kept."""
        given = self.inputs
        tokens = first.shape[1] if first.dim() == 2 and not first.is_floating_point() else None
        if tokens is not None:
            places = self._absolute(self.given, tokens)
            answer = self.answer % tokens if -tokens <= self.answer < tokens else None
            if answer is None:
                raise ValueError(f"answer must lie in [-{tokens}, {tokens}), got {self.answer}")
            start = min(int(places.min()) if places.numel() else 0, answer)
            if start > 0:
                self._cache = self._prefix(first, start)
                if self._cache is not None:
                    self.start = start
                    given = self._behind(first, start)
        if self._cache is None and "" not in given:
            given = self._uncached(given)
        self.given_now = given
        what = ["z", "residual"] + (
            ["mlp"] if all(layer.feed_forward is not None for layer in self.nodes.layers) else []
        )
        capture = Capture(what)
        with self._recorded() as record, torch.no_grad(), attach(self.model, capture):
            output = call(self.model, given)
        self.values = capture.results()
        self._keep(record)
        self.length = self.hidden[0].shape[1]
        whole = self.length + self.start
        self.places = (self._absolute(self.given, whole) - self.start).to(self.device)
        logits = logits_of(output)
        self.tokens_out = logits.dim() == 3
        self.read = self.answer % whole - self.start if self.tokens_out else 0
        if self.metric.tokens is not None:
            check_within("metric.tokens", self.metric.tokens, logits.shape[-1], "logit")
        self.clean_logits = self._picked(logits[:, self.read] if self.tokens_out else logits, self._samples(1))
        if not bool(self.clean_logits.isfinite().all()):
            raise ValueError(f"{type(self.model).__name__} gives logits that are not finite for the clean prompts")
        self.clean = self.metric(self.clean_logits, self._samples(1))
        self.short = self._may_read_out()

    def _absolute(self, positions: Any, count: int) -> Tensor:
        """(B, P) positions from the first token."""
        index = torch.arange(count) if positions is None else torch.as_tensor(positions, dtype=torch.long).cpu()
        if index.numel() and (int(index.max()) >= count or int(index.min()) < -count):
            raise ValueError(f"positions must lie in [-{count}, {count}) of the {count} tokens, got {positions!r:.80}")
        if index.dim() == 2 and len(index) != self.batch:
            raise ValueError(f"positions are for {len(index)} samples, but the prompts are {self.batch}")
        return (index % count).expand(self.batch, -1) if index.dim() == 1 else index % count

    def _prefix(self, ids: Tensor, start: int) -> Any:
        """A frozen cache of the tokens before ``start``; ``None`` where the model keeps none that says all."""
        if "input_ids" not in self.inputs or set(self.inputs) - {"input_ids", "attention_mask", "use_cache"}:
            return None
        name = cache_parameter(self.model)
        if name is None:
            return None
        self._cached_as = name
        given: dict[str, Any] = {"input_ids": ids[:, :start], "use_cache": True}
        if isinstance(mask := self.inputs.get("attention_mask"), Tensor):
            given["attention_mask"] = mask[:, :start]
        try:
            with torch.no_grad():
                output = self.model(**given)
        except TypeError:  # it knows no caches
            return None
        return frozen(cache_in(dict(output)) if isinstance(output, Mapping) else None, start)

    def _behind(self, ids: Tensor, start: int) -> dict[str, Any]:
        given: dict[str, Any] = {"input_ids": ids[:, start:], "use_cache": True, self._cached_as: self._cache}
        if isinstance(mask := self.inputs.get("attention_mask"), Tensor):
            given["attention_mask"] = mask
        return given

    def _uncached(self, given: Mapping[str, Any]) -> dict[str, Any]:
        takes = "use_cache" in inspect.signature(self.model.forward).parameters
        return {**given, "use_cache": False} if takes else dict(given)

    @contextmanager
    def _recorded(self) -> Any:
        """What every block is called with while the model runs, in order."""
        record: list[tuple[int, tuple[Any, ...], dict[str, Any], Any]] = []

        def after(number: int) -> Any:
            def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                record.append((number, args, kwargs, output))

            return hook

        with ExitStack() as stack:
            for number, layer in enumerate(self.nodes.layers):
                handle = layer.block.register_forward_hook(after(number), with_kwargs=True)
                stack.callback(handle.remove)
            yield record

    def _keep(self, record: list[tuple[int, tuple[Any, ...], dict[str, Any], Any]]) -> None:
        numbers = [number for number, *_ in record]
        if numbers != list(range(len(self.nodes))):
            raise ValueError(f"the blocks of {type(self.model).__name__} do not follow each other once each: {numbers}")
        self.hidden: list[Tensor] = []
        before: Tensor | None = None
        for _, args, kwargs, output in record:
            name = (
                None if args else next((k for k, v in kwargs.items() if isinstance(v, Tensor) and v.dim() >= 3), None)
            )
            hidden = args[0] if args else kwargs.get(name or "")
            if not isinstance(hidden, Tensor) or hidden.dim() != 3 or len(hidden) != self.batch:
                got = tuple(hidden.shape) if isinstance(hidden, Tensor) else describe(hidden)
                raise ValueError(f"a block of {type(self.model).__name__} reads {got}, not tokens (B, N, C)")
            # Padding may hold NaN, which is equal to nothing.
            if before is not None and not torch.equal(hidden.nan_to_num(), before.nan_to_num()):
                raise ValueError(
                    f"the blocks of {type(self.model).__name__} do not read what the one before gave, so a pass cannot "
                    "be taken up in the middle"
                )
            self.hidden.append(hidden)
            if self._cache is None and (name_ := cache_name(kwargs)) is not None:
                kwargs = {**kwargs, name_: None}  # it would go on growing
            self.blocks.append(_Block(args, kwargs, name, isinstance(output, tuple)))
            before = output[0] if isinstance(output, tuple) else output
        assert before is not None
        self.hidden.append(before)

    # ---- behind the blocks

    def _samples(self, variants: int) -> Tensor:
        return torch.arange(self.batch, device=self.device).repeat(variants)

    def _picked(self, logits: Tensor, samples: Tensor) -> Tensor:
        if self.metric.tokens is None:
            return logits
        return logits.gather(1, self.metric.tokens.to(logits.device)[samples])

    def _may_read_out(self) -> bool:
        """Whether final norm and unembedding are all there is behind the blocks."""
        if not self.tokens_out or self.nodes.norm is None:
            return False
        try:
            found = self._read_out(self.hidden[-1][:, self.read], self._samples(1))
        except (ValueError, RuntimeError):
            return False
        return torch.allclose(found, self.clean_logits, rtol=1e-4, atol=1e-4 * float(self.clean_logits.abs().max() + 1))

    @torch.no_grad()
    def _read_out(self, stream: Tensor, samples: Tensor) -> Tensor:
        """(rows, K) logits of streams (rows, C) at the answer."""
        assert self.nodes.norm is not None
        normed = self.nodes.norm(stream[:, None])[:, 0]
        if self.metric.tokens is None:
            return self.nodes.unembedding(normed[:, None])[:, 0]  # type: ignore[misc]
        weight, bias = self.nodes.rows(self.metric.tokens.to(stream.device)[samples])
        logits = torch.einsum("rc,rkc->rk", normed, weight.to(normed))
        return logits if bias is None else logits + bias

    @torch.no_grad()
    def measure(self, last: Tensor) -> Tensor:
        """(V, B) the metric of streams behind the last block: (V, B, n, C), or (V, B, C) at the answer alone."""
        variants = len(last)
        samples = self._samples(variants)
        if self.short:
            rows = last.flatten(0, 1) if last.dim() == 3 else last[:, :, self.read].flatten(0, 1)
            return self.metric(self._read_out(rows, samples), samples).unflatten(0, (variants, -1))
        if last.dim() == 3:
            full = self.hidden[-1].expand(variants, *self.hidden[-1].shape).clone()
            full[:, :, self.read] = last
            last = full
        logits = self._through_rest(last.flatten(0, 1), variants)
        return self.metric(self._picked(logits, samples), samples).unflatten(0, (variants, -1))

    def _through_rest(self, hidden: Tensor, variants: int) -> Tensor:
        """What the model makes of streams behind its last block: it is called with blocks that hand them on."""
        given = {k: self._rows(v, variants) for k, v in self.given_now.items()}
        with ExitStack() as stack:
            for number, layer in enumerate(self.nodes.layers):
                replace = _Instead(self.blocks[number], hidden)
                stack.enter_context(_forward_of(layer.block, replace))
            output = call(self.model, given)
        logits = logits_of(output)
        return logits[:, self.read] if self.tokens_out else logits

    # ---- again

    def _rows(self, value: Any, variants: int) -> Any:
        """An argument for a batch of variants: what has the batch first is repeated."""
        if variants == 1:
            return value
        if isinstance(value, Tensor):
            per_sample = value.dim() >= 2 and len(value) == self.batch
            return value.repeat(variants, *[1] * (value.dim() - 1)) if per_sample else value
        if isinstance(value, tuple) and not hasattr(value, "_fields"):
            return tuple(self._rows(v, variants) for v in value)
        return [self._rows(v, variants) for v in value] if isinstance(value, list) else value

    def block(self, number: int, hidden: Tensor, variants: int) -> Tensor:
        """One block on (V * B, n, C)."""
        kept = self.blocks[number]
        kwargs = {k: self._rows(v, variants) for k, v in kept.kwargs.items()}
        args = tuple(self._rows(a, variants) for a in kept.args)
        if kept.name is None:
            args = (hidden, *args[1:])
        else:
            kwargs[kept.name] = hidden
        output = self.nodes.layers[number].block(*args, **kwargs)
        return output[0] if kept.tuple_ else output

    @contextmanager
    def writing(self, kinds: set[str]) -> Any:
        """The model with what writes into these kinds of nodes attached."""
        stages = {"z": "on_output", "mlp": "on_mlp_output", "q": "on_qkv", "k": "on_qkv", "v": "on_qkv"}
        uses = {stages[kind] for kind in kinds if kind in stages}
        numbers = {layer.site.name: number for number, layer in enumerate(self.nodes.layers)}
        writer = _Writer(numbers, uses)
        writer.places, writer.hold_places = self.places, self.places
        if not uses:
            yield writer
            return
        with attach(self.model, writer):
            yield writer

    @torch.no_grad()
    def climb(
        self,
        writer: _Writer,
        starts: Sequence[int],
        edits: Sequence[Edit],
        holds: Sequence[Hold] = (),
        record: Mapping[tuple[str, int], Any] | None = None,
        stop: int | None = None,
    ) -> Tensor:
        """Run variants through the layers, each from its first changed one on.

        Args:
            writer: from :meth:`writing`.
            starts: (V,) layer at which each variant begins to differ, ascending.
            edits: what is written, ``rows`` numbering the variants.
            holds: what keeps its clean value in all variants.
            record: ``{(kind, layer): function of (V, B, ...)}`` called with the values of nodes before they are edited.
            stop: layer before which to end.

        Returns:
            (V, B, n, C) the streams behind the last layer run.
        """
        depth = len(self.nodes) if stop is None else stop
        count = len(starts)
        stream = self.hidden[min(starts)].expand(0, *self.hidden[0].shape)
        for number in range(min(starts), depth):
            active = sum(s <= number for s in starts)
            if active > len(stream):
                new = self.hidden[number].expand(active - len(stream), *self.hidden[number].shape)
                stream = torch.cat([stream, new])
            writer.now = _Now(
                active, [h for h in holds if h.layer == number],
                [_first(e, active) for e in edits if e.layer == number and e.kind != "residual"],
                {} if record else None, frozenset(record or ()),
            )  # fmt: skip
            if record and ("residual", number) in record:
                record["residual", number](stream)
            stream = self._with_residual(stream, number, edits)
            out = self.block(number, stream.flatten(0, 1), active)
            for place, value in (writer.now.record or {}).items():
                assert record is not None
                record[place](value.unflatten(0, (active, -1)))
            stream = out.unflatten(0, (active, -1))
        if len(stream) < count:  # variants that begin behind the last layer
            new = self.hidden[depth].expand(count - len(stream), *self.hidden[depth].shape)
            stream = torch.cat([stream, new])
        return self._with_residual(stream, depth, edits)

    def _with_residual(self, stream: Tensor, number: int, edits: Sequence[Edit]) -> Tensor:
        mine = [_first(e, len(stream)) for e in edits if e.kind == "residual" and e.layer == number]
        mine = [e for e in mine if len(e.rows)]
        if not mine:
            return stream
        stream = stream.clone()
        batch = torch.arange(self.batch, device=stream.device)[:, None]
        for edit in mine:
            stream[edit.rows[:, None, None], batch, self.places] = edit.values.to(stream)
        return stream


def _first(edit: Edit, active: int) -> Edit:
    """An edit of the variants below ``active`` only."""
    if not len(edit.rows) or int(edit.rows.max()) < active:
        return edit
    keep = edit.rows < active
    heads = None if edit.heads is None else edit.heads[keep]
    return Edit(edit.kind, edit.layer, edit.rows[keep], heads, edit.values[keep])


class _Instead:
    """A forward that hands on the stream it was given, in the shape that the block gives."""

    def __init__(self, kept: _Block, hidden: Tensor):
        self.kept, self.hidden = kept, hidden

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.hidden,) if self.kept.tuple_ else self.hidden


@contextmanager
def _forward_of(block: nn.Module, forward: Any) -> Any:
    before = block.__dict__.get("forward")
    block.forward = forward
    try:
        yield
    finally:
        if before is None:
            del block.forward
        else:
            block.forward = before
