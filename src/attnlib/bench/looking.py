"""``attnlib look``: a model by its name reads something once, and the page of it is written."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_within
from ..extras import need
from ..hooks import Record, attach
from ..look import (
    Axis,
    Part,
    Run,
    first_order,
    grad_cam,
    integrated_gradients,
    logit_attribution,
    logit_difference,
    patch,
    read,
    saliency,
    transformer_relevance,
)
from ..look import page as write_page
from ..look.viewer.runs import writable
from . import models
from .beside import Technique, technique
from .converting import open_model

#: What ``attribute`` names, of the predicted logit: its share by head; by token or pixel, gradient times input,
#: NormGrad of the embedding (of a picture: of the middle block), Grad-CAM of the middle block, relevance with attention
#: held constant, integrated gradients from the mean embedding (of a picture: from grey); and patching of heads from
#: another text. Each is a forward and a backward or two, integrated gradients ``STEPS`` of them, one by one; patching
#: is one climb of all heads together.
TOKENWISE = ("gradient", "saliency", "grad-cam", "relevance", "integrated-gradients")
PATCHING = ("patch", "first-order")
METHODS = ("logits", *TOKENWISE, *PATCHING)
STEPS = 16

#: Bytes up to which maps are kept: all weights of all heads, before a page keeps the largest of them.
MOST = 4 * 2**30

PLAIN = "plain"


def look_at(
    model: str,
    *,
    text: str | None = None,
    image: str | Path | None = None,
    ids: Sequence[int] | None = None,
    techniques: Sequence[str] = (),
    attribute: Sequence[str] = (),
    corrupted: str | None = None,
    diff: str | None = None,
    out: str | Path = "look.html",
    save: str | Path | None = None,
    layers: Sequence[int] | None = None,
) -> Path:
    """Write the page of what a model reads.

    Args:
        model: of :mod:`attnlib.bench.models`, a folder of a transformers model, or its name on the hub.
        text, image, ids: what it reads, one of them.
        techniques: that act, as :func:`attnlib.bench.beside.technique` reads them.
        attribute: of :data:`METHODS`, each an overlay.
        corrupted: another text of as many tokens, for ``"patch"`` and ``"first-order"``.
        diff: a run that was saved, or ``"plain"`` for the same without techniques: shown too, and the difference to it.
        out: the page.
        save: keep the run in this file, for ``diff``.
        layers: only these.

    Raises:
        ValueError: nothing to read or several things, an unknown technique or method, a difference of unlike models or
            of a technique that changes no map, a model without logits asked for what made them, more tokens than the
            model reads or maps can be kept of.
        FileNotFoundError: no such model, picture or run, no folder for the page.
    """
    for name, path in (("out", out), ("save", save)):
        if path is not None and writable(path).is_dir():
            raise ValueError(f"--{name} {str(path)!r} is a folder; name a file in it")
    given = [name for name, value in (("text", text), ("image", image), ("ids", ids)) if value is not None]
    if len(given) != 1:
        raise ValueError(f"give one of --text, --image and --ids, got {given or 'none'}")
    for method in attribute:
        check_choice("attribute", method, METHODS)
        if method in PATCHING and corrupted is None:
            raise ValueError(f"attribute: {method!r} takes values from another text; give --corrupted")
    acting = [technique(one) for one in techniques]
    if diff == PLAIN and not acting:
        raise ValueError("--diff plain compares with the untouched model, but no technique acts; give --with")
    other = None if diff in (None, PLAIN) else Run.load(str(diff))
    loaded, reader = _open(model, image is not None)
    if image is not None:
        inputs, tokens = _picture(loaded, reader, Path(image))
    else:
        inputs, tokens = _words(loaded, reader, text, ids), reader
        limit = getattr(loaded.config, "max_position_embeddings", None)
        if limit is not None and inputs["input_ids"].shape[1] > limit:
            raise ValueError(f"the text has {inputs['input_ids'].shape[1]} tokens, more than the {limit} of {model}")
    _can_be_kept(loaded, len(tokens) if isinstance(tokens, Axis) else inputs["input_ids"].shape[1], layers)
    name = models.title(model)
    changed = ", ".join(t.label for t in acting)
    runs = []
    if diff == PLAIN:
        runs.append(_read(loaded, inputs, tokens, f"{name}, untouched", [], layers, attribute, corrupted, reader))
    elif other is not None:
        runs.append(other)
    title = f"{name} with {changed}" if changed else name
    runs.append(_read(loaded, inputs, tokens, title, acting, layers, attribute, corrupted, reader))
    if diff == PLAIN and _same(runs[0], runs[1]):
        raise ValueError(f"--diff plain: with {changed} no map changes; what evicts keys acts on what is read after it")
    if save is not None:
        runs[-1].save(save)
    return write_page(runs, out)


def _can_be_kept(model: Any, tokens: int, layers: Sequence[int] | None) -> None:
    with attach(model, Record(layers=layers, rows="all")) as session:
        heads = [site.heads for site in session.sites if layers is None or site.layer in layers]
    size = 4 * tokens**2 * sum(heads)
    if size > MOST:
        raise ValueError(
            f"the maps of {tokens} tokens in {sum(heads)} heads take {size / 2**30:.1f} GiB, more than the "
            f"{MOST / 2**30:g} that are kept; give less to read, or name some of the {len(heads)} --layers"
        )


def _same(one: Run, other: Run) -> bool:
    pairs = zip(one.layers, other.layers, strict=False)
    return len(one.layers) == len(other.layers) and all(torch.equal(a.weights, b.weights) for a, b in pairs)


def _open(name: str, sees: bool) -> tuple[Any, Any]:
    if name in models.MODELS or name in models.ALIASES or not Path(name).expanduser().is_dir():
        return open_model(name)
    transformers: Any = need("transformers", "attnlib look")
    config = transformers.AutoConfig.from_pretrained(name)
    architecture = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModel)
    reader = transformers.AutoImageProcessor if sees else transformers.AutoTokenizer
    return architecture.from_pretrained(name).eval(), reader.from_pretrained(name)


def _words(model: Any, tokenizer: Any, text: str | None, ids: Sequence[int] | None) -> dict[str, Tensor]:
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise ValueError(f"{type(model).__name__} reads pictures; give --image")
    found = tokenizer(text)["input_ids"] if ids is None else list(ids)
    if not found:
        raise ValueError(f"text={text!r} has no token")
    rows = torch.tensor([found])
    check_within("ids", rows, model.get_input_embeddings().num_embeddings, "token")
    return {"input_ids": rows}


def _picture(model: Any, processor: Any, path: Path) -> tuple[dict[str, Tensor], Axis]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no picture {str(path)!r}")
    if hasattr(processor, "convert_ids_to_tokens"):
        raise ValueError(f"{type(model).__name__} reads texts; give --text or --ids")
    with need("PIL.Image", "a picture").open(path) as opened:
        pixels = processor(opened.convert("RGB"), return_tensors="pt")["pixel_values"]
    size = model.config.patch_size
    rows, columns = (int(s) // (size if isinstance(size, int) else size[0]) for s in pixels.shape[-2:])
    extra = _extra_tokens(model)
    names = ["[CLS]", *(f"[register {i}]" for i in range(extra - 1))][:extra]
    labels = names + [f"patch {r},{c}" for r in range(rows) for c in range(columns)]
    mean, std = (torch.tensor(getattr(processor, key, None) or default)[:, None, None]
                 for key, default in (("image_mean", [0.0] * 3), ("image_std", [1.0] * 3)))  # fmt: skip
    parts = (Part("special", 0, extra), Part("image", extra, len(labels), (rows, columns)))
    picture = (pixels[0] * std + mean).clamp(0, 1)
    return {"pixel_values": pixels}, Axis(labels, parts=parts if extra else parts[1:], picture=picture)


def _extra_tokens(model: nn.Module) -> int:
    """Tokens in front of the patches: a class token and registers, by the embeddings' own names."""
    shapes = {name.rpartition(".")[2]: p.shape for name, p in model.named_parameters()}
    fixed = sum(1 for name in ("cls_token", "distillation_token") if name in shapes)
    return fixed + (shapes["register_tokens"][1] if "register_tokens" in shapes else 0)


def _read(
    model: Any, inputs: dict[str, Tensor], tokens: Any, name: str, acting: Sequence[Technique],
    layers: Sequence[int] | None, attribute: Sequence[str], corrupted: str | None, reader: Any,
) -> Run:  # fmt: skip
    with ExitStack() as stack:
        for one in acting:
            if one.make is None:
                stack.enter_context(one.act(model))
        made = [one.make() for one in acting if one.make is not None]
        run = read(model, inputs, tokens, name=name, layers=layers, interventions=made)
    if attribute:  # of the untouched model: what acts and what is measured cannot both be attached
        best = _answer(model, inputs)
        overlays = {method: _attributed(model, inputs, method, best, corrupted, reader) for method in attribute}
        if layers is not None:
            overlays = {n: v if n in TOKENWISE else v[list(layers)] for n, v in overlays.items()}
        run = Run(run.name, run.layers, run.axes, overlays)
    return run


def _answer(model: Any, inputs: dict[str, Tensor]) -> int:
    """What the model predicts: a class, or the next token."""
    with torch.no_grad():
        logits = getattr(model(**inputs), "logits", None)
    if logits is None:
        raise ValueError(f"attribute: {type(model).__name__} gives no logits, so nothing can be said to make one")
    return int((logits[0, -1] if logits.dim() == 3 else logits[0]).argmax())


def _attributed(
    model: Any, inputs: dict[str, Tensor], method: str, best: int, corrupted: str | None, reader: Any
) -> Tensor:
    if method in TOKENWISE:
        return _by_token(model, inputs, method, best)
    if method == "logits":
        return logit_attribution(model, inputs, [best]).grid()
    other = _words(model, reader, corrupted, None)
    if other["input_ids"].shape != inputs["input_ids"].shape:
        raise ValueError(
            f"--corrupted has {other['input_ids'].shape[1]} tokens and the text {inputs['input_ids'].shape[1]}; "
            "patching needs as many"
        )
    wrong = _answer(model, other)
    if wrong == best:
        raise ValueError("--corrupted gets the same answer as the text, so there is no difference to explain")
    metric = logit_difference([best], [wrong])
    return (patch if method == "patch" else first_order)(model, inputs, other, metric).grid("share")


def _by_token(model: Any, inputs: dict[str, Any], method: str, target: int) -> Tensor:
    """A map over tokens (tokens,), or over pixels (H, W)."""
    sees = "pixel_values" in inputs
    embedding = "" if sees else _name_of(model, model.get_input_embeddings())
    if method == "grad-cam" or (method == "saliency" and sees):
        at = _middle_block(model)
        return (grad_cam if method == "grad-cam" else saliency)(model, **inputs, modules=[at], target=target)[at][0]
    if method == "saliency":
        return saliency(model, **inputs, modules=[embedding], target=target)[embedding][0]
    settings: dict[str, Any] = {"module": embedding, "target": target, **inputs}
    if method == "integrated-gradients":
        start = 0.0 if sees else model.get_input_embeddings().weight.detach().mean(0)  # zeros have no direction to norm
        found = integrated_gradients(model, steps=STEPS, baseline=start, **settings)
    else:  # gradient times input is relevance that follows no rule
        plain: dict[str, Any] = {"attention": "gradient", "norm": "gradient", "activation": "gradient"}
        found = transformer_relevance(model, **settings, **({} if method == "relevance" else plain))
    return found[0].sum(0 if sees else -1)


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, one in model.named_modules() if one is module)


def _middle_block(model: nn.Module) -> str:
    """The block half-way through the longest row of blocks."""
    rows = [(name, one) for name, one in model.named_modules() if isinstance(one, nn.ModuleList)]
    if not rows:
        raise ValueError(f"attribute: {type(model).__name__} has no row of blocks to take a map of")
    name, blocks = max(rows, key=lambda row: len(row[1]))
    return f"{name}.{len(blocks) // 2}"
