"""A pretrained language model converted on text: what ``attnlib convert`` does, and what studies of it share."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_int
from ..extras import need
from .data import files
from .store import writable


def tokens_of(tokenizer: Any, data: Tensor) -> Tensor:
    """(N,) token ids of bytes (n,), read as UTF-8."""
    text = bytes(data.to(torch.uint8).tolist()).decode("utf-8", errors="ignore")
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def batches_of(
    ids: Tensor, length: int, batch: int = 1, most: int | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """Windows of ``length`` tokens that share none, in an order drawn by ``seed``, ``batch`` at a time."""
    rows = ids[: ids.numel() // length * length].view(-1, length)
    if not rows.shape[0]:
        raise files.DataError(f"the text has {ids.numel()} tokens, fewer than one window of {length}")
    order = torch.randperm(rows.shape[0], generator=torch.Generator().manual_seed(seed))
    found = [{"input_ids": rows[part]} for part in order.split(batch)]
    return found if most is None else found[:most]


@torch.no_grad()
def bits_per_byte(model: nn.Module, tokenizer: Any, batches: list[dict[str, Any]]) -> float:
    """Mean bits that a language model needs for each byte of the text behind the first token of every window."""
    bits = size = 0.0
    for given in batches:
        ids = given["input_ids"]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        bits += float(loss) / math.log(2)
        size += sum(len(tokenizer.decode(row[1:]).encode()) for row in ids)
    return bits / max(size, 1.0)


class Bytes:
    """A tokenizer whose tokens are the bytes of ASCII text.

    >>> Bytes()("ab", add_special_tokens=False), Bytes().decode(torch.tensor([97, 98]))
    ({'input_ids': [97, 98]}, 'ab')
    """

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode("ascii", errors="ignore"))}

    def decode(self, ids: Tensor) -> str:
        return bytes(ids.tolist()).decode("ascii", errors="ignore")


def our_decoder(
    ids: Tensor, steps: int, seed: int = 0, dim: int = 96, layers: int = 3, heads: int = 4, length: int = 128,
    batch: int = 16, lr: float = 4e-3,
) -> Any:  # fmt: skip
    """A decoder of this library with softmax attention, trained on the next byte of a text for a minute.

    Args:
        ids: (N,) of :class:`Bytes`.
        steps: of training; 400 give a loss far from chance.
        seed: of initial weights and batches.
        dim, layers, heads: of the model.
        length, batch: of what it is trained on.
        lr: the highest learning rate.
    """
    from ..convert.agreement import task_loss
    from ..models.language import DecoderConfig, DecoderForCausalLM
    from .small import fit

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = DecoderConfig(vocab_size=128, hidden_size=dim, num_hidden_layers=layers, num_attention_heads=heads)
        model = DecoderForCausalLM(config)

    def draw(generator: torch.Generator) -> dict[str, Tensor]:
        at = torch.randint(ids.numel() - length, (batch, 1), generator=generator)
        return {"input_ids": ids[at + torch.arange(length)]}

    fit(model, draw, task_loss, steps, lr, seed)
    return model.eval()


def open_model(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """``(model, tokenizer)`` by a name of :mod:`attnlib.bench.models`, or from a folder or the hub."""
    from . import models

    if name in models.MODELS or name in models.ALIASES:
        return models.load(name, dtype)
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).expanduser().is_dir():
        raise FileNotFoundError(f"model={name!r}: there is no such folder; possible are also {sorted(models.MODELS)}")
    transformers: Any = need("transformers", "attnlib convert")
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval()
        return model, transformers.AutoTokenizer.from_pretrained(name)
    except OSError as error:
        if Path(name).expanduser().is_dir():
            raise
        known = sorted([*models.MODELS, *models.ALIASES])
        raise FileNotFoundError(
            f"model={name!r} is none of {known}, no folder, and transformers cannot fetch it: {error}"
        ) from error


def needs_head(model: Any) -> None:
    """Refuse a model that predicts no tokens."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None or getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"the model is a {type(model).__name__}, which predicts no next token; this needs a causal language model"
        )


def convert_model(
    name: str,
    to: str,
    out: Path | None = None,
    text: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    layers: list[int] | None = None,
    steps: int = 100,
    adapter_steps: int = 0,
    length: int = 256,
    batch: int = 1,
    loss: str = "mse",
    lr: float = 1e-2,
    progress: bool = False,
) -> dict[str, Any]:
    """Convert a causal language model, train it on text, say how close it stayed, and save it.

    Args:
        name: of :mod:`attnlib.bench.models`, a folder of a transformers model, or its name on the hub.
        to: what attention becomes, see :func:`attnlib.convert.linearize`.
        out: folder of the converted model, its tokenizer and ``report.json``; training resumes from there.
        text: a file; text inside installed packages by default.
        settings: of the mixers.
        layers: which; all by default.
        steps: of attention transfer.
        adapter_steps: of low-rank adapters on the next token afterwards, which are merged.
        length, batch: tokens of a window, and windows of a step.
        loss, lr: of the transfer.
        progress: draw bars.

    Returns:
        The report, with bits per byte before and after.
    """
    from .. import convert

    for what, number, least in (("steps", steps, 0), ("adapter_steps", adapter_steps, 0), ("length", length, 2)):
        check_int(what, number, least=least)
    # Before anything is read or fetched.
    check_int("batch", batch, least=1)
    check_choice("to", to, tuple(convert.targets.TARGETS))
    check_choice("loss", loss, convert.agreement.LOSSES)
    files_of = None if out is None else writable(out)
    data = files.text(text)
    model, tokenizer = open_model(name)
    train = batches_of(tokens_of(tokenizer, data.train), length, batch)
    held = batches_of(tokens_of(tokenizer, data.test), length, batch, most=max(8 // batch, 1))
    before = bits_per_byte(model, tokenizer, held)
    conversion = convert.linearize(model, to, layers=layers, **dict(settings or {}))
    if steps and conversion.trained():
        kept = None if files_of is None else files_of / "transfer.pt"
        conversion.fit(train, loss=loss, steps=steps, lr=lr, checkpoint=kept, progress=progress)
    if adapter_steps:
        conversion.lora()
        kept = None if files_of is None else files_of / "adapters.pt"
        conversion.fit(train, loss="task", steps=adapter_steps, lr=1e-4, checkpoint=kept, progress=progress)
        conversion.merge()
    report = conversion.report(held).to_dict()
    report["bits_per_byte"] = {"original": before, "converted": bits_per_byte(model, tokenizer, held)}
    report |= {"text": data.source, "steps": steps, "adapter_steps": adapter_steps, "length": length}
    if files_of is not None:
        conversion.save(files_of)
        tokenizer.save_pretrained(files_of)
        (files_of / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report
