"""Calls of ``scaled_dot_product_attention`` caught where they are made, and what a layer's stages make of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .call import WholeMap, only_map, run_attention
from .intervention import Stages
from .site import PairMask, Site, read_mask


class Intercept(TorchFunctionMode):
    """Hands the attention call inside it to ``run``, or each of the ``calls`` that are known (``None``: any number).

    What computes weights with a function of its own, and multiplies them with values by ``torch.bmm``, is served where
    that function is :meth:`scores`: ``by_product(query, key, value, mask)`` takes its place.
    """

    by_product: Callable[..., Tensor]

    def __init__(self, run: Callable[..., Tensor], where: str, what: str, calls: int | None = 1):
        super().__init__()
        self.run, self.where, self.what, self.calls = run, where, what, calls
        self.count = 0
        self._waiting: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []

    def scores(self, query: Tensor, key: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Stands for the weights (B H, N, M) that a module would compute now; only ``torch.bmm`` may read it."""
        stand_in = torch.empty(len(query), query.shape[1], key.shape[1], dtype=query.dtype, device="meta")
        self._waiting.append((stand_in, query, key, attention_mask))
        return stand_in

    def _counted(self) -> None:
        self.count += 1
        if self.calls is not None and self.count > self.calls:
            times = "once" if self.calls == 1 else f"{self.calls} times"
            raise ValueError(
                f"{self.where}: {self.what} computes attention more than {times} per call; a description of its "
                "branches is missing"
            )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self._counted()
            return self.run(*args, **(kwargs or {}))
        for at, (stand_in, query, key, mask) in enumerate(self._waiting):
            if any(a is stand_in for a in args):
                if func is not torch.bmm or args[0] is not stand_in:
                    raise ValueError(
                        f"{self.where}: {self.what} does something to its weights before it multiplies them with "
                        "values, so nothing could act there"
                    )
                del self._waiting[at]
                self._counted()
                return self.by_product(query, key, args[1], mask)
        if func is F.multi_head_attention_forward:
            # It would hide the call inside it: a function mode is off while it handles a function. This is the same
            # code with another function under that name.
            names = {**func.__globals__, "has_torch_function": _never, "scaled_dot_product_attention": self._attend}
            func = FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
        return func(*args, **(kwargs or {}))

    def _attend(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.__torch_function__(F.scaled_dot_product_attention, (), args, kwargs)

    def around(self, call: Callable[[], Any], instead: str = "") -> Any:
        """The result of ``call``, which must attend; ``instead`` says what would."""
        with self:
            result = call()
        if not self.count:
            raise ValueError(
                f"{self.where}: {self.what} did not call torch's scaled_dot_product_attention, so nothing could act "
                f"there{instead}"
            )
        return result


@dataclass
class Seen:
    """A call as the stages left it.

    Args:
        site: of the call.
        stages: of its layer.
        maps: the maps that were computed in it.
        changed: whether anything differs from the call without stages.
    """

    site: Site
    stages: Stages
    maps: list[WholeMap]
    changed: bool

    def weights(self) -> Tensor:
        """(B, H, N, M) weights that were used."""
        return only_map(self.site, self.maps, self.stages)


def staged(
    where: str,
    what: str,
    stages: Stages,
    describe: Callable[..., Site],
    seen: list[Seen] | None = None,
    own: Callable[..., Tensor] = F.scaled_dot_product_attention,
) -> Callable[..., Tensor]:
    """What takes the place of ``scaled_dot_product_attention``: the same call through the stages of a layer.

    Args:
        where, what: the layer and what attends in it, for messages.
        describe: ``describe(q, k, pair, heads=, kv_heads=, head_dim=, scale=)`` gives the site of the call.
        seen: gets what became of each call.
        own: what computes the call, of the same arguments.
    """

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        q, k, v = query, key, value
        if q.dim() != 4:
            raise ValueError(f"{where}: {what} attends over tensors of rank {q.dim()}, not (B, H, N, D)")
        if dropout_p and (stages.edits or stages["around_attention"]):
            raise ValueError(f"{where}: attention dropout {dropout_p} is active; call model.eval()")
        pair = pair_mask(attn_mask, q.shape[2], k.shape[2], is_causal)
        site = describe(
            q, k, pair, heads=q.shape[1], kv_heads=k.shape[1], head_dim=q.shape[3],
            scale=float(q.shape[3] ** -0.5 if scale is None else scale),
        )  # fmt: skip
        for i in stages["on_qkv"]:
            q, k, v = i.on_qkv(site, q, k, v)
        calls = []

        def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            fits = not pair.free or (q.shape[2], k.shape[2]) == (pair.n_queries, pair.n_keys)
            out = own(
                q, k, v, attn_mask=attn_mask if fits else None, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
                enable_gqa=enable_gqa,
            )  # fmt: skip
            calls.append((q, k, v, out))
            return out

        maps: list[WholeMap] | None = None if seen is None else []
        out = run_attention(site, q, k, v, stages, kernel, random=bool(dropout_p), maps=maps, resizes=True)
        if seen is not None and maps is not None:
            same = len(calls) == 1 and all(a is b for a, b in zip(calls[0], (query, key, value, out), strict=True))
            seen.append(Seen(site, stages, maps, not same))
        return out

    return attend


def _never(tensors: Any) -> bool:
    return False


def pair_mask(mask: Tensor | None, n: int, m: int, causal: bool) -> PairMask:
    """What a mask given to ``scaled_dot_product_attention`` says."""
    if mask is None:
        return PairMask(n, m, causal=causal)
    mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    allowed, bias = read_mask(mask.expand(*mask.shape[:2], n, m))
    return PairMask(n, m, None if bool(allowed.all()) else allowed, bias)
