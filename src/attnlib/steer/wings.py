"""Wings on a model that exists: learners beside every self-attention (Zhang et al., 2024)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..hooks import IMAGE, PAD, SYSTEM, Intervention
from ..hooks.choose import ask, pack, take
from ..hooks.hf.names import cached_tokens
from ..hooks.recompute import refuse_reentrant
from ..hooks.session import Session
from ..hooks.site import Site
from ..nn.multimodal.wings_lorra import LayerWings
from ._watch import by_layer


class VisualWings(Intervention):
    """The first stage: a visual learner beside each self-attention, whose queries are the states after it.

    Image features are the model's own input embeddings at image tokens, as the first layer reads them; they are kept
    for decoding. A prompt without image, and a sample without image in a batch, is left as it is.

    Args:
        learners: :class:`~attnlib.nn.multimodal.wings_lorra.LayerWings` by number of the layer; a ``ModuleList`` or
            sequence for the layers from 0 on. Train them as any module: gradients flow.

    Raises:
        TypeError: something that is no ``LayerWings``.
        ValueError: when attached: a layer that does not exist, or learners of another width.

    Reference: Zhang et al., 2024, arXiv 2406.03496.

    >>> VisualWings([LayerWings(16, 2, rank=2, textual=False)]).layers
    [0]
    """

    name: ClassVar[str] = "wings"
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    needs_types: ClassVar[bool] = True
    whole_prompt = True

    def __init__(self, learners: Mapping[int, LayerWings] | Sequence[LayerWings] | nn.ModuleList):
        self.learners = by_layer("learners", learners, LayerWings)
        self.layers = sorted(self.learners)
        self.reset()

    def reset(self) -> None:
        self._residual: dict[tuple[str | None, int], Tensor] = {}

    def prepare(self, model: nn.Module, sites: Sequence[Site]) -> None:
        width = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
        for layer, one in self.learners.items():
            if one.dim != width:
                raise ValueError(f"learners[{layer}] are {one.dim} wide, the model's states {width}")

    def on_attach(self, session: Session) -> None:
        decoder: Any = session.model.get_decoder()  # type: ignore[operator]

        def embedded(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if cached_tokens(kwargs):
                return
            embeds = kwargs.get("inputs_embeds")
            if embeds is None:
                ids = kwargs.get("input_ids", args[0] if args else None)
                embeds = decoder.get_input_embeddings()(ids)
            session.notes["wings"] = self._features(session, embeds)

        session.hook(decoder.register_forward_pre_hook(embedded, with_kwargs=True))

    def _features(self, session: Session, embeds: Tensor) -> dict[str, Any]:
        """Features of the prompt by kind: ``(features, positions, which exist)``, or ``None`` where there are none."""
        assert session.tracker is not None
        types = session.tracker.upto(embeds.shape[1], embeds.shape[0], embeds.device)
        padded = (types == PAD).long().cumprod(1).sum(1, keepdim=True)
        found: dict[str, Any] = {"padded": padded}
        text = (types != IMAGE) & (types != PAD) & (types != SYSTEM)
        for kind, keep in (("image", types == IMAGE), ("text", text)):
            if not bool(keep.any()):
                found[kind] = None
                continue
            slots = pack(keep)
            found[kind] = (take(embeds, slots, 1), (slots - padded).clamp(min=0), slots >= 0)
        return found

    def on_block_input(self, site: Site, hidden: Tensor) -> None:
        self._residual[site.branch, site.layer] = hidden

    def around_sublayer(self, site: Site, hidden: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        out = call(hidden)
        residual = self._residual.pop((site.branch, site.layer))
        found = self.session.notes.get("wings")
        if found is None:
            raise RuntimeError(
                f"layer {site.layer} ({site.name}): the prompt of this sequence was not read in the session"
            )
        kinds = [kind for kind in ("image", "text") if found[kind] is not None and found[kind][0].requires_grad]
        if kinds:
            refuse_reentrant(type(self).__name__, f"what its learners read of the {kinds[0]}")
        added = self._added(site, residual + out, found)
        return out if added is None else out + added.to(out.dtype)

    def _positions(self, site: Site, found: dict[str, Any]) -> Tensor:
        """(B, N) positions of the queries, counted from the first token that is no padding."""
        assert site.q_pos is not None
        q_pos = site.q_pos if site.q_pos.dim() == 2 else site.q_pos[None]
        return (q_pos - found["padded"]).clamp(min=0)

    def _added(self, site: Site, h: Tensor, found: dict[str, Any]) -> Tensor | None:
        if found["image"] is None:
            return None
        image, at, exists = found["image"]
        q_pos = self._positions(site, found)
        return ask(self.learners[site.layer], h, image, q_pos=q_pos, image_pos=at, image_valid=exists)


class Wings(VisualWings):
    """Both learners, weighed per token by a router on the layer's own attention weights.

    Text features are the input embeddings of the prompt's text, without the system prompt where token types tell it
    apart; text reads earlier text only. Where a sample has no image, the textual learner acts alone. The router's
    inputs are attention weights by position, so padding on the left is counted out.

    Args:
        learners: as for :class:`VisualWings`, with ``textual=True``.

    Reference: Zhang et al., 2024, arXiv 2406.03496.

    >>> Wings({3: LayerWings(16, 2, rank=2)}).layers
    [3]
    """

    def __init__(self, learners: Mapping[int, LayerWings] | Sequence[LayerWings] | nn.ModuleList):
        super().__init__(learners)
        for layer, one in self.learners.items():
            if one.textual is None:
                raise ValueError(f"learners[{layer}] has no textual learner; use VisualWings, or textual=True")

    def reset(self) -> None:
        super().reset()
        self._attended: dict[tuple[str | None, int], list[Tensor]] = {}

    def on_weights(self, site: Site, weights: Tensor, rows: Tensor) -> Tensor:
        if self.session.notes.get("wings", {}).get("image") is not None:
            pieces = self._attended.setdefault((site.branch, site.layer), [])
            if sum(a.shape[1] for a in pieces) < site.n_queries:  # later ones are for probes that look on
                pieces.append(weights.sum(1))
        return weights

    def _added(self, site: Site, h: Tensor, found: dict[str, Any]) -> Tensor | None:
        if found["text"] is None:
            return super()._added(site, h, found)
        image, image_pos, image_valid = (None, None, None) if found["image"] is None else found["image"]
        text, text_pos, text_valid = found["text"]
        attended = None
        pieces = self._attended.pop((site.branch, site.layer), None)
        if pieces is not None:
            attended = torch.cat(pieces, 1)
            # Column j becomes the j-th token that is no padding.
            count = attended.shape[-1]
            index = torch.arange(count, device=h.device) + found["padded"]
            attended = attended.gather(-1, index.clamp(max=count - 1)[:, None].expand_as(attended))
            attended = attended.masked_fill((index >= count)[:, None], 0.0)
        return ask(
            self.learners[site.layer], h, image, text, attended, q_pos=self._positions(site, found),
            image_pos=image_pos, text_pos=text_pos, image_valid=image_valid, text_valid=text_valid,
        )  # fmt: skip
