"""What steering needs to see besides attention: where prompts begin, and which image tokens the class token reads."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..hooks.core import Session, Site
from ..hooks.tokens import IMAGE
from ..hooks.vision import class_row
from ..types import check_choice

M = TypeVar("M", bound=nn.Module)


def by_layer(name: str, given: Any, kind: type[M]) -> dict[int, M]:
    """Modules by number of the layer, from a mapping, or from a sequence for the layers from 0 on."""
    modules = dict(given.items() if isinstance(given, Mapping) else enumerate(given))
    if not modules:
        raise ValueError(f"{name} is empty; give at least one {kind.__name__}")
    for layer, one in modules.items():
        if not isinstance(one, kind):
            raise TypeError(f"{name}[{layer}] is a {type(one).__name__}, not a {kind.__name__}")
    return modules


def reader(model: nn.Module) -> Callable[[tuple[Any, ...], dict[str, Any]], dict[str, Any]]:
    """A function from the arguments of a call of ``model`` to the same by name."""
    names = list(inspect.signature(model.forward).parameters)
    return lambda args, kwargs: {**dict(zip(names, args, strict=False)), **kwargs} if args else kwargs


def cached_tokens(given: dict[str, Any]) -> int:
    """Tokens that the cache of a call holds before it."""
    cache: Any = given.get("past_key_values")
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0


def watch_prompts(session: Session, started: Callable[[dict[str, Any]], None]) -> None:
    """Call ``started(inputs by name)`` before every call of the model that begins a sequence."""

    named = reader(session.model)

    def before(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = named(args, kwargs)
        if cached_tokens(given) == 0:
            started(given)

    session.hook(session.model.register_forward_pre_hook(before, with_kwargs=True))


def prompt_types(session: Session | None, site: Site) -> Tensor:
    """(B, L) types of the tokens seen so far, removed ones included."""
    if session is not None and session.tracker is not None and session.tracker.types is not None:
        return session.tracker.types
    if site.q_types is None:
        raise ValueError(f"layer {site.layer} ({site.name}): no token types; give attach(..., token_types=...)")
    return site.q_types


def at_keys(site: Site, by_slot: Tensor) -> Tensor:
    """Values by slot of the prompt (B, L) as values by key, (B, 1, M) or (B, heads, M); zero for later tokens."""
    assert site.k_pos is not None
    top = int(site.k_pos.max()) + 1 if site.k_pos.numel() else 0
    return site.per_key(F.pad(by_slot, (0, max(0, top - by_slot.shape[1]))))


def reads_images(given: dict[str, Any]) -> bool:
    """Whether a call of the model comes with images, to be encoded or already encoded."""
    return given.get("pixel_values") is not None or bool(given.get("mm_encoder_outputs"))


def image_slots(types: Tensor, values: Tensor, fill: float | bool, class_token: bool = False) -> Tensor:
    """Values of patches, image after image, at the image tokens of a batch.

    Args:
        types: (B, L) token types.
        values: (images, patches) of the batch, or of the samples whose rows are repeated in it (beams).
        fill: for tokens that are no patch: text, and class tokens.
        class_token: the first token of each image stands for the class token.

    Returns:
        (B, L).

    Raises:
        ValueError: as many image tokens as there are patches are not there.

    >>> image_slots(torch.tensor([[1, 2, 2, 1]]), torch.tensor([[5.0, 7.0]]), 0.0).tolist()
    [[0.0, 5.0, 7.0, 0.0]]
    """
    image = types == IMAGE
    if class_token:
        values = F.pad(values, (1, 0), value=fill)  # type: ignore[arg-type]
    count, repeats = int(image.sum()), max(1, int(image.sum()) // values.numel())
    first = types[::repeats]
    if count != repeats * values.numel() or not torch.equal(first.repeat_interleave(repeats, 0)[: len(types)], types):
        raise ValueError(
            f"the vision encoder saw {values.shape[0]} images of {values.shape[1]} tokens, but {count} tokens of the "
            "prompt are image tokens; tokens that are not one per patch (a Q-Former's, or those of several crops with "
            "line breaks) cannot be told apart"
        )
    out = torch.full(first.shape, fill, dtype=values.dtype, device=types.device)
    out = out.masked_scatter(image[::repeats], values.reshape(-1).to(types.device))
    return out.repeat_interleave(repeats, 0)


def class_attention(q: Tensor, k: Tensor, num_heads: int, scale: float, head_merge: str = "heads") -> Tensor:
    """What the class token of a vision encoder reads of each patch, from projections of one layer.

    Args:
        q: (B, 1 + N, C), or its first row (B, 1, C), before heads are split; the class token is first.
        k: (B, 1 + N, C).
        num_heads: H.
        scale: of scores of split heads.
        head_merge: ``"heads"`` for (B, H, N); ``"mean"`` and ``"sum"`` over heads; ``"concat"`` treats all heads as
            one of width C with scale ``C ** -0.5``, as DAMRO's code does.

    Returns:
        (B, N), or (B, H, N).

    >>> class_attention(torch.ones(1, 1, 4), torch.zeros(1, 3, 4), 2, 1.0, "sum").tolist()
    [[0.6666666865348816, 0.6666666865348816]]
    """
    check_choice("head_merge", head_merge, ("heads", "mean", "sum", "concat"))
    q = q[:, :1]
    if head_merge == "concat":
        return class_row(q[:, None], k[:, None])[:, 0]
    q, k = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k))
    row = class_row(q, k, scale)
    return row if head_merge == "heads" else row.mean(1) if head_merge == "mean" else row.sum(1)


class VisionEncoder:
    """Reads what the class token attends to in some layers of a model's vision encoder, from its projections.

    Args:
        model: with a vision encoder outside its text decoder.
        layers: numbers of its layers, negative from the end.
        part: dotted path of the encoder; found by itself when only one has separate projections of queries and keys.

    Raises:
        ValueError: no such encoder or layer, or an encoder without a class token.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int], part: str | None = None):
        decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else None  # type: ignore[operator]
        inside = set(decoder.modules()) if isinstance(decoder, nn.Module) and decoder is not model else set()
        found = [
            (name, m)
            for name, m in model.named_modules()
            if isinstance(getattr(m, "q_proj", None), nn.Module)
            and isinstance(getattr(m, "k_proj", None), nn.Module)
            and (name.startswith(part + ".") if part else m not in inside and "vision" in name)
        ]
        if not found:
            raise ValueError(
                f"{type(model).__name__} has no vision encoder with q_proj and k_proj"
                + (f" under {part!r}" if part else "; name it with vision=..., or choose another source of scores")
            )
        root = part or found[0][0].split(".layers.")[0].rsplit(".", 1)[0]
        names = [n for n, _ in model.get_submodule(root).named_parameters()]
        if not any(n.rsplit(".", 1)[-1] in ("class_embedding", "cls_token") for n in names):
            raise ValueError(
                f"the vision encoder {root!r} has no class token, so nothing says what it attends to; choose another "
                "source of scores"
            )
        self.layers = tuple(layers)
        config: Any = getattr(model, "config", None)
        #: Whether the class token is among the image tokens.
        self.class_token = getattr(config, "vision_feature_select_strategy", "default") == "full"
        self.modules: dict[int, nn.Module] = {}
        for layer in self.layers:
            if not -len(found) <= layer < len(found):
                raise ValueError(f"layer {layer} of the vision encoder does not exist; it has {len(found)}")
            self.modules[layer] = found[layer][1]
        self.seen: dict[Any, dict[tuple[int, str], Tensor]] = {}

    def watch(self, session: Session) -> None:
        """Keep projections of the images that each branch of ``session`` reads."""
        for layer, module in self.modules.items():
            for which in ("q_proj", "k_proj"):

                def keep(_: nn.Module, __: Any, out: Tensor, key: tuple[int, str] = (layer, which)) -> None:
                    out = out.detach()
                    self.seen.setdefault(session.branch, {})[key] = out[:, :1] if key[1] == "q_proj" else out

                session.hook(getattr(module, which).register_forward_hook(keep))
        session.undo(self.seen.clear)

    def forget(self, branch: str | None) -> None:
        """Drop what was kept of a branch."""
        self.seen.pop(branch, None)

    def scores(self, layer: int, branch: str | None, head_merge: str) -> Tensor | None:
        """(images, N), ``None`` when no image was read; see :func:`class_attention`."""
        seen = self.seen.get(branch)
        if not seen:
            return None
        module: Any = self.modules[layer]
        heads = int(module.num_heads)
        q, k = seen[layer, "q_proj"], seen[layer, "k_proj"]
        scale = getattr(module, "scale", None)
        return class_attention(q, k, heads, float(scale or (q.shape[-1] // heads) ** -0.5), head_merge)
