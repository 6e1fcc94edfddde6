"""Pairs as a model reads them: one prompt with its responses, batches of rows, and log-probabilities per token."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...checks import check_type, describe
from ...types import stats_dtype
from .recipes import GIVEN, Read, Recipe, Term
from .variants import About, Variant

#: Inputs that hold one number per token of the prompt, and what continues them over a response.
SEQUENCES = {"input_ids": 0, "attention_mask": 1, "token_type_ids": 0, "mm_token_type_ids": 0}

#: What a text pair may hold besides its responses and images.
TEXT = ("prompt", "image", "images", "weights")


@dataclass
class Preference:
    """A prompt, its responses, and what else is known of them.

    Args:
        inputs: model inputs of *one* prompt as a processor gives them: ``input_ids`` (1, N) or (N,), perhaps padded,
            ``pixel_values`` and so on.
        responses: token ids by name, without padding: ``{"chosen": [...], "rejected": [...]}``. The end of sequence
            belongs to them.
        images: model inputs under other images, by name; what one does not hold is taken from ``inputs``. A tensor is
            ``pixel_values``.
        weights: per token, by name and response: ``{"severity": {"chosen": [...]}}``.
    """

    inputs: Mapping[str, Any]
    responses: Mapping[str, Any]
    images: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def encode(processor: Any, example: Mapping[str, Any], end: bool = True) -> Preference:
    """A pair of texts through a processor.

    Args:
        processor: of transformers, ``processor(text=, images=)`` with a ``tokenizer``; for text alone the tokenizer.
        example: ``{"prompt": str, "image": ..., "chosen": str, "rejected": str}``; other strings are responses too, and
            other images, such as ``"retrieved"``, are variants. The prompt is given to the processor as it is, so it
            holds the image's placeholder. ``"weights"`` as in :class:`Preference`.
        end: put the tokenizer's end of sequence behind responses.

    Raises:
        ValueError: no prompt, or a response without text.
    """
    check_type("example", example, Mapping)
    prompt = example.get("prompt")
    check_type("prompt", prompt, str, "a string")
    tokenizer = getattr(processor, "tokenizer", processor)
    image = example.get("image", example.get("images"))

    def read(image: Any) -> dict[str, Any]:
        more = {} if image is None else {"images": image}
        return dict(processor(text=prompt, return_tensors="pt", **more))

    responses, images = {}, {}
    for name, value in example.items():
        if name in TEXT or value is None:
            continue
        if isinstance(value, str):
            if not value.strip():
                raise ValueError(f"response {name!r} is empty")
            ids = list(tokenizer(value, add_special_tokens=False)["input_ids"])
            if end and tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
                ids.append(tokenizer.eos_token_id)
            responses[name] = ids
        else:
            images[name] = read(value)
    return Preference(read(image), responses, images, example.get("weights") or {})


def _row(inputs: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Inputs of one prompt: sequences as (N,) without padding, all else as it is."""
    if "input_ids" not in inputs:
        raise ValueError(f"{where} holds no input_ids, got {sorted(inputs)}")
    ids = torch.as_tensor(inputs["input_ids"])
    if ids.dim() == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.dim() != 1 or not ids.numel() or ids.is_floating_point():
        raise ValueError(f"input_ids of {where} must be those of one prompt, (N,) or (1, N), got {describe(ids)}")
    length = len(ids)
    out: dict[str, Any] = {}
    for name, value in inputs.items():
        if value is None:
            continue
        if name in SEQUENCES:
            row = torch.as_tensor(value).reshape(-1)
            if len(row) != length:
                raise ValueError(f"{name} of {where} must be as long as input_ids, {length}, got {len(row)}")
            out[name] = row
        else:
            out[name] = value if isinstance(value, Tensor) else torch.as_tensor(value)
    keep = out.get("attention_mask", torch.ones_like(ids)).bool()
    if not keep.any():
        raise ValueError(f"attention_mask of {where} leaves no token of the prompt")
    for name in [n for n in out if n in SEQUENCES]:
        out[name] = out[name][keep]
    out["attention_mask"] = torch.ones_like(out["input_ids"])
    return out


def _ids(value: Any, name: str, where: str, vocabulary: int | None) -> Tensor:
    if isinstance(value, str):
        raise TypeError(f"response {name!r} of {where} is text, which needs processor=; or give its token ids")
    try:
        ids = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"response {name!r} of {where} must be token ids (T,), got {describe(value)}") from None
    ids = ids[0] if ids.dim() == 2 and ids.shape[0] == 1 else ids
    if ids.dim() != 1 or (ids.numel() and (ids.is_floating_point() or ids.dtype == torch.bool)):
        raise ValueError(f"response {name!r} of {where} must be token ids (T,), got {describe(value)}")
    if not ids.numel():
        raise ValueError(f"response {name!r} of {where} is empty; a response has at least one token")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        most = "" if vocabulary is None else f" below {vocabulary}, the size of the vocabulary"
        raise ValueError(f"response {name!r} of {where} has the ids {low} to {high}; they must be at least 0{most}")
    return ids.long()


def to_pairs(
    pairs: Iterable[Any], recipe: Recipe, processor: Any = None, vocabulary: int | None = None
) -> tuple[list[Preference], Recipe]:
    """What the user gave as checked :class:`Preference` s, and the recipe without optional responses that none has.

    Args:
        pairs: :class:`Preference` s; mappings of text (with ``processor``); or flat mappings of model inputs in which
            what the recipe calls a response, an image or ``weights`` stands beside the inputs.
        recipe: says what is needed.
        processor: for text.
        vocabulary: size, to check ids against.

    Raises:
        ValueError: no pairs, a response that is missing, empty, or equal to what it is preferred to.
    """
    check_type("recipe", recipe, Recipe)
    if isinstance(pairs, (str, Mapping, Preference)) or not isinstance(pairs, Iterable):
        raise TypeError(f"pairs must be a list of Preference or of mappings, got {describe(pairs)}")
    listed = list(pairs)
    if not listed:
        raise ValueError("pairs is empty; there must be at least one")
    named = {*recipe.responses, *recipe.alignment}
    asked = {read.image for read in recipe.reads if isinstance(read.image, str)} - {GIVEN}
    made = [_coerce(p, i, named, asked, processor, vocabulary) for i, p in enumerate(listed)]
    recipe = recipe.for_responses({name for p in made for name in p.responses})
    for i, pair in enumerate(made):
        _check(pair, f"pairs[{i}]", recipe, asked)
    return made, recipe


def _coerce(
    pair: Any, index: int, named: set[str], asked: set[str], processor: Any, vocabulary: int | None
) -> Preference:
    where = f"pairs[{index}]"
    if isinstance(pair, Mapping):
        if "prompt" in pair:
            if processor is None:
                raise ValueError(f"{where} is text, which needs processor=")
            pair = encode(processor, pair)
        else:
            responses = {k: v for k, v in pair.items() if k in named or k in ("chosen", "rejected", "standard")}
            images = {k: v for k, v in pair.items() if k in asked}
            rest = {k: v for k, v in pair.items() if k not in responses and k not in images and k != "weights"}
            pair = Preference(rest, responses, images, pair.get("weights") or {})
    check_type(where, pair, Preference, "a Preference or a mapping")
    check_type(f"responses of {where}", pair.responses, Mapping, "a mapping from names to token ids")
    responses = {name: _ids(value, name, where, vocabulary) for name, value in pair.responses.items()}
    inputs = _row(pair.inputs, where)
    images = {}
    for name, given in pair.images.items():
        given = {"pixel_values": given} if isinstance(given, Tensor) else given
        check_type(
            f"image {name!r} of {where}", given, Mapping, "a tensor of pixel_values or a mapping of model inputs"
        )
        base = {k: v for k, v in inputs.items() if not ("input_ids" in given and k in SEQUENCES)}
        images[name] = _row({**base, **given}, f"image {name!r} of {where}")
    weights: dict[str, dict[str, Tensor]] = {}
    for name, of in pair.weights.items():
        check_type(f"weights {name!r} of {where}", of, Mapping, "a mapping from responses to numbers per token")
        weights[name] = {}
        for response, value in of.items():
            numbers = torch.as_tensor(value, dtype=torch.get_default_dtype()).reshape(-1)
            if response not in responses or len(numbers) != len(responses[response]):
                have = {k: len(v) for k, v in responses.items()}
                raise ValueError(
                    f"weights {name!r} of {where} hold {len(numbers)} numbers for {response!r}; responses have {have}"
                )
            if not bool(torch.isfinite(numbers).all()):
                raise ValueError(f"weights {name!r} of {where} must be finite")
            weights[name][response] = numbers
    return Preference(inputs, responses, images, weights)


def _check(pair: Preference, where: str, recipe: Recipe, asked: set[str]) -> None:
    missing = [name for name in (*recipe.responses, *recipe.alignment) if name not in pair.responses]
    if missing:
        raise ValueError(
            f"{where} lacks the response {missing[0]!r} that the recipe compares; it has {sorted(pair.responses)}"
        )
    for name in sorted(asked):
        if name not in pair.images:
            raise ValueError(f"{where} lacks the image {name!r} that the recipe compares; it has {sorted(pair.images)}")
    for part in recipe.parts:
        if isinstance(part, Term):
            a, b = part.sides
            same = pair.responses[a.response].equal(pair.responses[b.response])
            if same and a.response != b.response and (a.image, a.tokens) == (b.image, b.tokens):
                raise ValueError(
                    f"{where}: the {a.response} response equals the {b.response} one, so there is nothing to prefer"
                )


def _stack(name: str, parts: Sequence[Tensor]) -> Tensor:
    """Along the first axis; images cut into unequal numbers of crops are filled up with zeros behind."""
    shapes = [p.shape[1:] for p in parts]
    if len({p.dim() for p in parts}) > 1:
        raise ValueError(f"{name} differ in rank from pair to pair: {[tuple(p.shape) for p in parts]}")
    if len(set(shapes)) > 1:
        wide = [max(s[i] for s in shapes) for i in range(len(shapes[0]))]
        filled = []
        for p in parts:
            new = p.new_zeros(p.shape[0], *wide)
            new[(slice(None), *(slice(n) for n in p.shape[1:]))] = p
            filled.append(new)
        parts = filled
    return torch.cat(list(parts))


@dataclass
class Collator:
    """Pairs -> one batch of rows per image variant, responses behind prompts, padding last.

    Padding behind a causal row changes nothing before it, so positions need no correction in any family.

    Args:
        recipe: whose reads are prepared.
        about: what variants must know.
        pad: id of padding.
        generator: of variants.
    """

    recipe: Recipe
    about: About = field(default_factory=About)
    pad: int = 0
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def __call__(self, pairs: Sequence[Preference]) -> dict[str, Any]:
        needed: dict[str | Variant, list[str]] = {}
        for read in self.recipe.reads:
            of = needed.setdefault(read.image, [])
            if read.response not in of:
                of.append(read.response)
        rows = {}
        for number, (image, responses) in enumerate(needed.items()):
            if image == GIVEN:
                inputs: list[Mapping[str, Any]] = [p.inputs for p in pairs]
            elif isinstance(image, str):
                inputs = [p.images[image] for p in pairs]
            else:
                inputs = [image(p.inputs, self.about, self.generator) for p in pairs]
            rows[str(number)] = self._rows(inputs, [[p.responses[r] for p in pairs] for r in responses])
        valid, weights = {}, {}
        for name in self.recipe.responses:
            lengths = torch.tensor([len(p.responses[name]) for p in pairs])
            valid[name] = torch.arange(int(lengths.max())) < lengths[:, None]
        for part in self.recipe.terms:
            for side in part.sides:
                if side.weights is not None:
                    weights[f"{side.weights}/{side.response}"] = self._weights(pairs, side.weights, side.response)
        return {"rows": rows, "valid": valid, "weights": weights}

    def _weights(self, pairs: Sequence[Preference], name: str, response: str) -> Tensor:
        parts = [p.weights.get(name, {}).get(response, torch.ones(len(p.responses[response]))) for p in pairs]
        return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)

    def _rows(self, inputs: Sequence[Mapping[str, Any]], responses: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
        """Rows (responses * pairs, L), all pairs of the first response first."""
        names = {frozenset(i) for i in inputs}
        if len(names) > 1:
            # A prompt without an image beside one with: what only some have is one block per image anyway.
            common = set.union(*map(set, names))
        else:
            common = set(inputs[0])
        out: dict[str, Tensor] = {}
        sequences = [n for n in SEQUENCES if n in common]
        starts = torch.tensor([len(i["input_ids"]) for _ in responses for i in inputs])
        ends = torch.tensor([len(i["input_ids"]) + len(r) for of in responses for i, r in zip(inputs, of, strict=True)])
        length = int(ends.max())
        for name in sequences:
            table = torch.full((len(starts), length), self.pad if name == "input_ids" else 0, dtype=torch.long)
            k = 0
            for of in responses:
                for given, response in zip(inputs, of, strict=True):
                    prompt = given.get(name, torch.full_like(given["input_ids"], SEQUENCES[name]))
                    table[k, : len(prompt)] = prompt
                    table[k, len(prompt) : len(prompt) + len(response)] = (
                        response if name == "input_ids" else SEQUENCES[name]
                    )
                    k += 1
            out[name] = table
        for name in sorted(common - set(sequences)):
            parts = [i[name] for i in inputs if name in i]
            block = _stack(name, [p if p.dim() else p[None] for p in parts])
            out[name] = block.repeat(len(responses), *[1] * (block.dim() - 1))
        out["exists"] = (torch.arange(length) < ends[:, None]).long()
        out["starts"] = starts
        return out


def _positions(model: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Positions for families that find them from the mask, where the mask hides tokens that exist."""
    if bool((inputs["attention_mask"] == inputs["exists"]).all()):
        return {}
    finder = next((m for m in model.modules() if hasattr(m, "get_rope_index")), None)
    if finder is None:
        return {}
    asked = inspect.signature(finder.get_rope_index).parameters
    given: dict[str, Any] = {k: v for k, v in inputs.items() if k in asked}
    given["attention_mask"] = inputs["exists"]
    return {"position_ids": finder.get_rope_index(**given)[0]}


def log_probs(
    model: Any, rows: Mapping[str, Tensor], tokens: Iterable[str] = ("label",), width: int | None = None
) -> dict[str, Tensor]:
    """Log-probabilities of the responses of rows, (rows, T), one forward.

    Args:
        model: of transformers, perhaps with adapters.
        rows: as :class:`Collator` makes them: model inputs with ``exists`` and ``starts``.
        tokens: ``"label"``, ``"argmax_other"``, or both.
        width: T; by default the longest response.
    """
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    starts = rows["starts"]
    ends = rows["exists"].sum(1)
    inputs: dict[str, Any] = {k: v for k, v in rows.items() if k not in ("exists", "starts")}
    inputs |= _positions(plain, rows)
    length = inputs["input_ids"].shape[1]
    first = int(starts.min()) - 1  # the logits at a token are of the next one
    if "logits_to_keep" in inspect.signature(plain.forward).parameters:
        inputs["logits_to_keep"] = length - first
    logits = model(**inputs, use_cache=False).logits[:, -(length - first) :]
    logits = logits[:, :-1].to(stats_dtype(logits.dtype))
    labels = inputs["input_ids"][:, first + 1 :, None]
    total = logits.logsumexp(-1)
    width = int((ends - starts).max()) if width is None else width
    places = (starts[:, None] - first - 1 + torch.arange(width, device=starts.device)).clamp(max=logits.shape[1] - 1)
    out = {}
    for kind in tokens:
        if kind == "label":
            value = logits.gather(-1, labels).squeeze(-1)
        else:
            best, index = logits.topk(2, -1)
            value = torch.where(index[..., 0] == labels[..., 0], best[..., 1], best[..., 0])
        out[kind] = (value - total).gather(1, places)
    return out


def read_batch(model: Any, recipe: Recipe, batch: Mapping[str, Any]) -> dict[Read, Tensor]:
    """Every log-probability (B, T) that the recipe needs: one forward per image variant, none twice."""
    images = list(dict.fromkeys(read.image for read in recipe.reads))
    out: dict[Read, Tensor] = {}
    for number, image in enumerate(images):
        reads = [r for r in recipe.reads if r.image == image]
        responses = list(dict.fromkeys(r.response for r in reads))
        found = log_probs(model, batch["rows"][str(number)], dict.fromkeys(r.tokens for r in reads))
        for read in reads:
            valid = batch["valid"][read.response]
            at = responses.index(read.response) * len(valid)
            out[read] = found[read.tokens][at : at + len(valid), : valid.shape[1]]
    return out


def weights_of(batch: Mapping[str, Any]) -> dict[tuple[str, str], Tensor]:
    """As :meth:`Recipe.loss` takes them."""
    out = {}
    for key, value in batch["weights"].items():
        name, _, response = key.rpartition("/")
        out[name, response] = value
    return out
