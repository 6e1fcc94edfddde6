"""MIP-Adapter: several reference images, each weighed per place by how much the place belongs to its name.

A branch of IP-Adapter acts on all places alike, so that two references mix. Here the branch of reference r counts at
place p as much as the name of its object does there, in the model's own frozen cross attention read the other way
round, and how much image there is at all at p is a trained gate on what the text gave::

    R_r(p) = mean over heads and tokens of the name of softmax_p (k_name q_p / sqrt(d))
    w_r(p) = R_r(p) / sum_s R_s(p)                      # sums to one over references
    u(p)   = sigmoid(g . O_text(p)),  u <- u / mean_p u  # mean one over places
    O(p)   = O_text(p) + s sum_r w_r(p) u(p) A(q_p, W_k e_r, W_v e_r)

``R`` carries no gradient. One reference has weight one, and with ``g = 0`` is IP-Adapter. Rows under guidance read
empty names and empty images.

What is trained in the released code is ``W_k``, ``W_v`` and ``g``; the projection of the images stays as it was, though
it would get gradients. Images and text are left out in training by :func:`dropped`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...checks import check_int, check_rank, check_real, describe, shaped
from ...hooks.denoiser import CallSite
from ...hooks.site import Site
from .prompts import encoded, text_streams, token_spans
from .references import ReferenceBranches, ReferenceMaps


class GatedReferenceMaps(ReferenceMaps):
    """Keys and values of a reference, and the gate on what the text gave.

    Args:
        width: of the tokens.
        dim: of all heads together.
    """

    def __init__(self, width: int, dim: int):
        super().__init__(width, dim)
        self.text_to_weight = nn.Linear(dim, 1, bias=False)


@shaped(relevance="float (B, R, N)")
def shares(relevance: Tensor) -> Tensor:
    """Weights (B, R, N) of references that sum to one at each place; equal ones where none is relevant.

    >>> shares(torch.tensor([[[3.0, 0.0], [1.0, 0.0]]])).tolist()
    [[[0.75, 0.5], [0.25, 0.5]]]
    """
    total = relevance.sum(1, keepdim=True)
    return torch.where(total > 0, relevance / total.masked_fill(total <= 0, 1), 1 / relevance.shape[1])


def dropped(
    count: int,
    image: float = 0.05,
    text: float = 0.05,
    both: float = 0.05,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Which of ``count`` training samples lose their images, and which their text: booleans (count,) each.

    Args:
        image, text, both: shares of samples that lose images alone, text alone, and both.
    """
    for name, share in (("image", image), ("text", text), ("both", both)):
        check_real(name, share, least=0, most=1)
    if image + text + both > 1:
        raise ValueError(f"image, text and both are shares of all samples, but add up to {image + text + both}")
    drawn = torch.rand(count, generator=generator)
    lost_both = (drawn >= image + text) & (drawn < image + text + both)
    return (drawn < image) | lost_both, ((drawn >= image) & (drawn < image + text)) | lost_both


class MIPAdapter(ReferenceBranches):
    """Reference images that act where their names do.

    ::

        adapter = MIPAdapter.of(pipe, project=projection)
        adapter.load_released(state_dict)
        adapter.refer(embeds, names=["dog", "hat"])      # embeds (1, 2, ...)
        with attnlib.attach(pipe, adapter):
            pipe("a dog that wears a hat")

    Args:
        maps, project, scale, step_range: see :class:`attnlib.steer.ReferenceBranches`.

    Reference: Huang et al., 2024, arXiv 2409.17920.
    """

    name: ClassVar[str] = "mip_adapter"
    maps_class: ClassVar[type[ReferenceMaps]] = GatedReferenceMaps

    def refer(  # type: ignore[override]
        self,
        images: Any,
        empty: Tensor | None = None,
        *,
        names: Sequence[Any] | None = None,
        entities: Tensor | None = None,
        lengths: Sequence[Sequence[int]] | Sequence[int] | None = None,
        empty_entities: Tensor | None = None,
    ) -> Any:
        """Say what the references are, and what they are called.

        Args:
            images, empty: see :meth:`attnlib.steer.ReferenceBranches.refer`.
            names: R names, or for each prompt R; the attached pipeline encodes them.
            entities: (P or 1, R, L, D) instead: each name by itself as the denoiser reads text, from the token that
                begins it, and
            lengths: R numbers of its tokens, or for each prompt R.
            empty_entities: (L, D) empty text for rows under guidance; needed with ``entities`` where there are any.

        Returns:
            itself.
        """
        super().refer(images, empty)
        if (names is None) == (entities is None):
            raise ValueError("give either names of the references, or entities and lengths")
        many = self.references
        self._names: list[list[str]] | None = None
        self._entities: tuple[Tensor, list[list[int]], Tensor | None] | None = None
        if names is not None:
            if isinstance(names, str):
                raise TypeError(f"names must be a sequence, got the string {names!r}; write [{names!r}]")
            by_prompt = all(isinstance(one, (list, tuple)) for one in names)
            every = [list(one) for one in names] if by_prompt else [list(names)]
            if not every or any(len(one) != many or not all(isinstance(n, str) for n in one) for one in every):
                raise ValueError(f"names must hold a name (str) for each of the {many} references, got {names!r}")
            self._names = every
            return self
        assert entities is not None
        check_rank("entities", entities, 4, "(prompts or 1, references, tokens, width)")
        if lengths is None:
            raise ValueError("entities need lengths, how many tokens each name has")
        every_length: list[Any] = list(lengths)
        nested = all(isinstance(one, (list, tuple)) for one in every_length)
        numbers: list[list[int]] = [list(one) for one in every_length] if nested else [every_length]
        if entities.shape[1] != many or any(len(one) != many for one in numbers):
            raise ValueError(
                f"entities and lengths must be of {many} references, got {describe(entities)} and {lengths!r}"
            )
        for one in numbers:
            for length in one:
                check_int("lengths", length, least=1, most=entities.shape[2] - 1)
        if len(numbers) not in (1, len(entities)):
            raise ValueError(f"lengths are of {len(numbers)} prompts, entities of {len(entities)}")
        self._entities = entities, numbers * (len(entities) // len(numbers)), empty_entities
        return self

    def reset(self) -> None:
        self._kept.clear()

    # ---- names

    def around_denoiser(
        self, site: CallSite, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Tensor]
    ) -> Tensor:
        if self._images is not None and self._names is not None and self._entities is None:
            context = inputs.get("encoder_hidden_states")
            if site.sampling is None or not isinstance(context, Tensor):
                raise ValueError(
                    "MIPAdapter encodes names with the text encoder of a pipeline; attach to the pipeline, or give "
                    "refer(..., entities=..., lengths=...)"
                )
            self._entities = self._encoded_names(site.sampling, context)
        return call(inputs)

    def _encoded_names(self, sampling: Any, context: Tensor) -> tuple[Tensor, list[list[int]], Tensor]:
        assert self._names is not None
        tokenizer, _, limit = text_streams(sampling.pipe, sampling.arguments.get("max_sequence_length"))[0]
        numbers = [[len(token_spans(tokenizer, name, [name], limit)[0]) for name in names] for names in self._names]
        flat = encoded(sampling, ["", *(name for names in self._names for name in names)], context[0])
        return flat[1:].unflatten(0, (len(self._names), -1)), numbers, flat[0]

    def _name_keys(self, site: Site, batch: int) -> tuple[Tensor, Tensor]:
        """Keys (B, H, R S, d) of the tokens of names, and their share (B, R, S) in the mean of a name."""
        assert self._entities is not None
        entities, lengths, empty = self._entities
        module: Any = site.module

        def made() -> tuple[Tensor, Tensor]:
            rows = self.row_numbers(site, batch, len(entities), 1)
            if max(rows) >= len(entities) and empty is None:
                raise ValueError("rows under guidance need refer(..., empty_entities=...), the text of no name")
            longest = max(max(one) for one in lengths)
            names = entities[:, :, 1 : 1 + longest]
            if empty is not None:
                names = torch.cat([names, empty[1 : 1 + longest].to(names).expand(1, names.shape[1], -1, -1)])
            like = next(module.to_k.parameters())
            if names.shape[-1] != module.to_k.in_features:
                raise ValueError(
                    f"layer {site.layer} ({site.name}) reads text of width {module.to_k.in_features}, names have "
                    f"{names.shape[-1]}: the model changes text embeddings before it reads them"
                )
            names = names.to(like.device, like.dtype)
            if getattr(module, "norm_cross", None):
                names = module.norm_encoder_hidden_states(names.flatten(0, 1)).view_as(names)
            index = torch.tensor(rows, device=like.device)
            keys = module.to_k(names.flatten(0, 1)).unflatten(0, names.shape[:2]).index_select(0, index)
            keys = keys.flatten(1, 2).unflatten(-1, (site.kv_heads, -1)).transpose(1, 2)
            # Rows under guidance read as many tokens as the name of their prompt has.
            prompts = [0] * batch if len(lengths) == 1 else list(site.prompts or range(batch))
            counts = torch.tensor([lengths[p] for p in prompts], device=like.device)
            there = torch.arange(longest, device=like.device) < counts.unsqueeze(-1)
            return keys, there.double() / counts.unsqueeze(-1)

        with torch.no_grad():
            found: tuple[Tensor, Tensor] = self._remembered(
                ("names", site.name, batch, site.rows, site.prompts), [module.to_k], made
            )
        return found

    # ---- weights

    def relevance(self, site: Site, q: Tensor) -> Tensor:
        """(B, R, N) how much each place belongs to each name: over places each reference's sums to one."""
        with torch.no_grad():
            keys, parts = self._name_keys(site, q.shape[0])
            high = torch.promote_types(q.dtype, torch.float32)
            scores = (keys.to(q.dtype) @ q.detach().transpose(-2, -1)).to(high) * site.scale
            found = scores.softmax(-1).mean(1).unflatten(1, parts.shape[1:])
            return (found * parts.to(high).unsqueeze(-1)).sum(2)

    def gate(self, site: Site, out: Tensor) -> Tensor:
        """(B, N) how much of the image is wanted at each place, from what the text gave (B, H, N, d); mean one."""
        maps: Any = self.at(site)
        merged = out.transpose(1, 2).flatten(2)
        found = torch.sigmoid(maps.text_to_weight(merged.to(maps.text_to_weight.weight.dtype)).squeeze(-1).to(
            torch.promote_types(out.dtype, torch.float32)
        ))  # fmt: skip
        return found / found.mean(1, keepdim=True)

    def weigh(self, site: Site, q: Tensor, out: Tensor) -> Tensor | None:
        gate = self.gate(site, out).unsqueeze(1)
        if self.references == 1:
            return gate
        return shares(self.relevance(site, q)) * gate
