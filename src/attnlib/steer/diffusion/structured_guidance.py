"""Structured diffusion guidance: noun phrases are encoded by themselves and read beside the whole prompt.

A text encoder mixes the words of a prompt, so that "red" tinges what it does not belong to. Let ``c_0`` be the
embedding of the prompt, and ``c_j`` the same with the rows of phrase j taken from the embedding of that phrase alone.
Cross-attention of conditional rows becomes

    ``softmax(q W_k c_0) W_v mean_j c_j``                       (``"phrases"``: keys of the prompt, values of all),
    ``mean_j softmax(q W_k c_j) W_v c_all``                      (``"conjunction"``: keys of all, values of one),

``c_all`` with every phrase pasted. The authors average the outputs for each ``W_v c_j``; weights are the same for all
of them and the projection is linear, so values of the mean embedding give the same, on the fused kernel. Rows without
guidance are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...checks import check_choice, check_ints, shaped
from ...hooks.denoiser import CallSite, rows_of_guidance, step_of
from ...hooks.intervention import Intervention
from ...hooks.site import Site
from .prompts import encoded, noun_phrases, per_prompt, text_streams, token_spans

MODES = ("phrases", "conjunction")


@shaped(full="float (L, D)", phrase="float (M, D)")
def paste(full: Tensor, phrase: Tensor, to: Sequence[int], at: Sequence[int]) -> Tensor:
    """The embedding of a prompt with the rows ``to`` of a phrase in it taken from rows ``at`` of the phrase's own.

    >>> paste(torch.zeros(4, 1), torch.ones(4, 1), [2], [1]).flatten().tolist()
    [0.0, 0.0, 1.0, 0.0]
    """
    if len(to) != len(at):
        raise ValueError(f"to and at must name as many tokens, got {len(to)} and {len(at)}")
    index = torch.as_tensor(check_ints("to", to, least=0, most=len(full) - 1), device=full.device)
    return full.index_copy(0, index, phrase[list(check_ints("at", at, least=0, most=len(phrase) - 1))].to(full))


class StructuredGuidance(Intervention):
    """Cross-attention that reads each noun phrase as it is by itself.

    ::

        with attnlib.attach(pipe, StructuredGuidance(["a red circle", "a blue square"])):
            pipe("a red circle and a blue square")

    Args:
        phrases: phrases of the prompt, nested ones too; a list for each prompt where they differ. A phrase that is the
            whole prompt is left out.
        parser: in their place a function from a prompt to its phrases, or a spaCy pipeline, whose noun chunks of more
            than one word are taken.
        mode: ``"phrases"``, or ``"conjunction"`` for prompts of the form "A and B", which runs attention once for
            each phrase and once more.
        layers: numbers or name patterns; ``None`` for all cross-attention.
        compat: ``"authors"`` for the keys that their code has in conjunction mode: pasting writes into the embedding
            of the prompt itself, so that the first keys are those of all phrases.

    Raises:
        ValueError: at attach, a model outside a pipeline or without cross-attention; when the pipeline is called, a
            phrase that is not in its prompt or is cut off, or that has other tokens in it than by itself.

    Their parsers (stanza's constituency trees, scene graphs) are left to ``parser``.

    Reference: Feng et al., 2022, arXiv 2212.05032.

    >>> StructuredGuidance(["a red circle"]).kinds
    ('cross',)
    """

    name: ClassVar[str] = "structured-diffusion-guidance"
    kinds: ClassVar[tuple[str, ...]] = ("cross",)

    def __init__(
        self,
        phrases: Sequence[Any] | None = None,
        parser: Callable[[str], Any] | None = None,
        mode: str = "phrases",
        layers: Sequence[int | str] | None = None,
        compat: str | None = None,
    ):
        check_choice("mode", mode, MODES)
        check_choice("compat", compat, (None, "authors"))
        if (phrases is None) == (parser is None):
            raise ValueError("give either phrases of the prompt, or a parser that finds them")
        if isinstance(phrases, str):
            raise TypeError(f"phrases must be a sequence of phrases, got the string {phrases!r}; write [{phrases!r}]")
        self.phrases = None if phrases is None else list(phrases)
        self.parser, self.mode, self.layers, self.compat = parser, mode, layers, compat
        self.uses = ("around_denoiser", "on_context" if mode == "phrases" else "around_attention")

    @property
    def identity(self) -> bool:
        return self.phrases == []

    def on_attach(self, session: Any) -> None:
        if session.sampling is None:
            raise ValueError(
                f"StructuredGuidance encodes phrases with the text encoder of a pipeline, and "
                f"{type(session.model).__name__} was attached to by itself; attach to the pipeline: attach(pipe, ...)"
            )

    # ---- embeddings

    def around_denoiser(
        self, site: CallSite, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Tensor]
    ) -> Tensor:
        notes = self.session.notes
        if self not in notes and step_of(site, self) >= 0 and "cond" in rows_of_guidance(site, self):
            context = inputs.get("encoder_hidden_states")
            if not isinstance(context, Tensor) or context.dim() != 3 or site.prompts is None:
                raise ValueError(
                    f"StructuredGuidance reads the text embeddings (B, L, D) that {type(site.module).__name__} is "
                    f"called with as encoder_hidden_states, got {type(context).__name__}"
                )
            notes[self] = self._variants(site, context.detach())
        return call(inputs)

    def _variants(self, site: CallSite, context: Tensor) -> tuple[Tensor, ...]:
        """``(mean or c_all (P, L, D), keys (J, P, L, D))`` of each prompt."""
        assert site.rows is not None and site.prompts is not None
        pipe, prompts = site.sampling.pipe, site.sampling.prompts
        if prompts is None:
            raise ValueError(
                "StructuredGuidance looks for phrases in the prompt, but the pipeline was given embeddings and no "
                "prompt"
            )
        longest = site.sampling.arguments.get("max_sequence_length")
        tokenizer, _, limit = text_streams(pipe, longest)[0]
        if self.phrases is not None:
            every = per_prompt(self.phrases, len(prompts))
        else:
            every = [list(noun_phrases(prompt, self.parser)) for prompt in prompts]
        values, keys = [], []
        for number, (prompt, phrases) in enumerate(zip(prompts, every, strict=True)):
            named = list(zip(site.prompts, site.rows, strict=True))
            full = context[named.index((number, "cond"))]
            wanted = [p for p in phrases if not isinstance(p, str) or p.strip().lower() != prompt.strip().lower()]
            pasted, whole = [full], full
            for phrase in wanted:
                if not isinstance(phrase, str):
                    raise TypeError(f"phrases holds {phrase!r:.60}; a phrase is a part of the prompt (str)")
                (to,) = token_spans(tokenizer, prompt, [phrase], limit)
                (at,) = token_spans(tokenizer, phrase, [phrase], limit)
                if len(to) != len(at):
                    raise ValueError(
                        f"the phrase {phrase!r} has {len(to)} tokens in the prompt and {len(at)} by itself; give a "
                        "phrase that ends between words"
                    )
                (alone,) = encoded(site.sampling, [phrase], full)
                pasted.append(paste(full, alone, to, at))
                whole = paste(whole, alone, to, at)
            if self.mode == "phrases":
                values.append(torch.stack(pasted).mean(0) if wanted else full)
            else:
                if self.compat == "authors":
                    pasted[0] = whole
                values.append(whole)
                keys.append(torch.stack(pasted))
        if keys and len({len(k) for k in keys}) > 1:
            raise ValueError(
                f"conjunction needs as many phrases of every prompt, got {[len(k) - 1 for k in keys]}; call the "
                "pipeline once for each prompt"
            )
        return (torch.stack(values), torch.stack(keys, 1)) if keys else (torch.stack(values),)

    def variants(self, site: Site) -> tuple[Tensor, ...] | None:
        """Of each row of this call, ``(values (B, L, D), keys (J, B, L, D))``; ``None`` where nothing was encoded."""
        found = self.session.notes.get(self)
        if found is None or site.prompts is None:
            return None
        index = torch.as_tensor(site.prompts, device=found[0].device)
        return tuple(t.index_select(-3, index) for t in found)

    # ---- attention

    def on_context(self, site: Site, k_source: Tensor, v_source: Tensor) -> tuple[Tensor, Tensor]:
        found = self.variants(site)
        if found is None:
            return k_source, v_source
        self._check(site, found[0], v_source.shape[-1])
        rows = site.rows_named(("cond",), v_source.device).view(-1, 1, 1)
        return k_source, torch.where(rows, found[0].to(v_source), v_source)

    def around_attention(self, site: Site, q: Tensor, k: Tensor, v: Tensor, call: Callable[..., Tensor]) -> Tensor:
        found = self.variants(site)
        if found is None:
            return call(q, k, v)
        module: Any = site.module
        self._check(site, found[0], module.to_k.in_features)
        if found[0].shape[-2] != k.shape[2]:
            raise ValueError(
                f"layer {site.layer} ({site.name}) reads {k.shape[2]} tokens, phrases have {found[0].shape[-2]}"
            )
        rows = site.rows_named(("cond",), q.device).view(-1, 1, 1, 1)

        def heads(projected: Tensor, norm: Any) -> Tensor:
            split = projected.unflatten(-1, (site.kv_heads, -1)).transpose(1, 2)
            return split if norm is None else norm(split)

        dtype = next(module.to_k.parameters()).dtype
        v = torch.where(rows, heads(module.to_v(found[0].to(q.device, dtype)), None).to(v), v)
        outs = []
        for c in found[1]:
            projected = heads(module.to_k(c.to(q.device, dtype)), getattr(module, "norm_k", None))
            outs.append(call(q, torch.where(rows, projected.to(k), k), v))
        mean = torch.stack(outs).mean(0)
        # Rows that read the same each time are not averaged, so that their bits stay.
        return torch.where(rows, mean, outs[0])

    @staticmethod
    def _check(site: Site, variants: Tensor, width: int) -> None:
        if variants.shape[-1] != width:
            raise ValueError(
                f"layer {site.layer} ({site.name}) reads text of width {width}, phrases have {variants.shape[-1]}: the "
                "model changes text embeddings before it reads them"
            )
