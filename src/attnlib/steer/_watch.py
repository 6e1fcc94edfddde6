"""What steering needs to see besides attention: where prompts begin, and which image tokens the class token reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..hooks.branches import image_runs
from ..hooks.session import Session
from ..hooks.site import Site
from ..hooks.tokens import IMAGE

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


def whole_image_slots(types: Tensor, values: Tensor, crops: list[int], fill: float, end: float) -> Tensor:
    """Values of patches at the image tokens of a batch whose images are cut into crops.

    An image's tokens are the patches of the whole image, its first crop, then those of the other crops with a line
    break behind every row.

    Args:
        types: (B, L) token types.
        values: (crops of all images, patches) in order, of the batch, or of the samples whose rows are repeated in it.
        crops: of each image.
        fill: for all other tokens.
        end: for the last token of each image, a line break.

    Returns:
        (B, L).

    Raises:
        ValueError: the images of the prompt are not those that were cut.

    >>> types = torch.tensor([[1, 2, 2, 2, 2, 1]])
    >>> whole_image_slots(types, torch.tensor([[5.0, 7.0], [3.0, 4.0]]), [2], 0.0, -1.0).tolist()
    [[0.0, 5.0, 7.0, 0.0, -1.0, 0.0]]
    """
    first = image_runs(types)
    starts = (first == torch.arange(types.shape[1], device=types.device)).nonzero()
    repeats = max(1, len(starts) // max(1, len(crops)))
    per_row = (first == torch.arange(types.shape[1], device=types.device)).sum(1)
    n, wanted = values.shape[1], types[::repeats].repeat_interleave(repeats, 0)[: len(types)]
    if sum(crops) != len(values) or len(starts) != repeats * len(crops) or not torch.equal(wanted, types):
        raise ValueError(
            f"the vision encoder saw {len(values)} crops of {len(crops)} images ({crops}), but the prompt has "
            f"{len(starts)} runs of image tokens; images that touch cannot be told apart"
        )
    at = [sum(crops[:i]) for i in range(len(crops))]
    # Images of a sample come again with each of its rows.
    order = [i for group in torch.arange(len(crops)).split(per_row[::repeats].tolist()) for i in [group] * repeats]
    out = torch.full(types.shape, fill, dtype=values.dtype, device=types.device)
    for (row, slot), image in zip(starts.tolist(), torch.cat(order).tolist(), strict=True):
        count = int((first[row] == slot).sum())
        if count <= n:
            raise ValueError(f"an image has {count} tokens, its whole view {n} patches and a line break")
        out[row, slot : slot + n] = values[at[image]].to(out.device)
        out[row, slot + count - 1] = end
    return out
