"""What the class token of a vision encoder reads, from the queries and keys of one of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..types import check_choice, stats_dtype
from .session import Session


def class_row(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """Weights of the patches in the class token's row, which is the first.

    Args:
        q: (B, H, 1 or more, D) queries.
        k: (B, H, 1 + N, D) keys.
        scale: of the scores; ``D ** -0.5`` by default.

    Returns:
        (B, H, N) in the statistics dtype; the class token's own share is left out, so rows sum to less than 1.

    >>> import torch
    >>> class_row(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 5, 4)).tolist()
    [[[0.20000000298023224, 0.20000000298023224, 0.20000000298023224, 0.20000000298023224]]]
    """
    dtype = stats_dtype(q.dtype)
    scores = q[:, :, :1].to(dtype) @ k.to(dtype).transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return scores.softmax(-1)[:, :, 0, 1:]


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
