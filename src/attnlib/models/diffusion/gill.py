"""GILL: a frozen language model that writes images, through what conditions a denoiser.

Koh et al., 2023, "Generating Images with Multimodal Language Models", arXiv 2305.17216. A language model gets r tokens
more, [IMG0] .. [IMG(r-1)]; with ``h`` its last states at them and ``x`` their embeddings,

    prompt = W_o T(W_i (h + x), Q),    query = W_r h_0 / |W_r h_0|,    decision = softmax(W_d h_0),

where T is an encoder and decoder of 4 blocks each and Q learned queries, one for every token that the denoiser reads;
``query`` looks for an image by its features, and ``decision`` says which of both is shown. Where [IMG0] is written, the
others follow by force. Images are read too: their pooled features become tokens of the language model by a linear map.
Only these maps and the embeddings of the new tokens are trained:

    generation: mean |prompt - prompt of the caption|,    retrieval: cross-entropy of scaled cosines both ways, halved,
    tokens: cross-entropy of the caption and [IMG0], halved,    caption: cross-entropy of the caption behind an image.

Half of the authors' batches read captions in pairs, one behind the other (``pairs=True``). Both heads can be the
transformer or a linear map: of a linear mapper, states of all r tokens side by side are the prompt.

``pipe(prompt_embeds=gill.prompt_embeds(states))`` draws. Differs from the authors' code: any causal language model of
transformers, and prompts of any width; the new tokens are a parameter of their own, beside a table that nothing
touches; generation keeps a cache, and has the states of an image that was written last.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import (
    check_axes,
    check_choice,
    check_flag,
    check_float,
    check_int,
    check_ints,
    check_rank,
    check_real,
    check_type,
    check_whole,
)
from ...hooks.hf.names import cache_argument, cache_out
from ...nn.released import Released
from ...types import check_divides
from ..sampling import in_nucleus

#: What the first two numbers of a decision are for.
DECISIONS = ("generate", "retrieve")

#: What prompts and queries are made by.
HEADS = ("transformer", "linear")


class GILLMapper(nn.Module):
    """From states at image tokens to what a denoiser reads.

    Args:
        dim: of the states.
        out_dim: of a token of the prompt: 768 for Stable Diffusion 1.
        num_tokens: of the prompt.
        hidden, depth, num_heads: of the transformer between.
    """

    def __init__(
        self, dim: int, out_dim: int = 768, num_tokens: int = 77, hidden: int = 512, depth: int = 4, num_heads: int = 4
    ):
        super().__init__()
        check_divides("num_heads", num_heads, "hidden", hidden)
        for name, value in (("dim", dim), ("out_dim", out_dim), ("num_tokens", num_tokens), ("depth", depth)):
            check_int(name, value, least=1)
        self.fc = nn.Linear(dim, hidden)
        settings: Any = dict(dropout=0.0, batch_first=True, norm_first=True)
        layer = nn.TransformerEncoderLayer(hidden, num_heads, 4 * hidden, **settings)
        encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(hidden), enable_nested_tensor=False)
        self.tfm = nn.Transformer(
            hidden, num_heads, depth, depth, 4 * hidden, custom_encoder=encoder, **settings
        )  # fmt: skip
        self.model = nn.Linear(hidden, out_dim)
        self.query_embs = nn.Parameter(torch.randn(1, num_tokens, hidden))

    def forward(self, states: Tensor, embeddings: Tensor) -> Tensor:
        """(B, r, dim) and (r, dim) or (B, r, dim) -> (B, num_tokens, out_dim)."""
        u = self.fc(states + embeddings)
        return self.model(self.tfm(u, self.query_embs.expand(len(u), -1, -1)))


class LinearMapper(nn.Module):
    """From states at image tokens to a prompt by one linear map, whose outputs stand side by side.

    Args:
        dim: of the states.
        out_dim, num_tokens: of the prompt.
        count: of the states; its first ``num_tokens`` are read where it is larger.
    """

    def __init__(self, dim: int, out_dim: int, num_tokens: int, count: int):
        super().__init__()
        self.shape, self.read = (num_tokens, out_dim), min(count, num_tokens)
        check_divides("count", self.read, "num_tokens * out_dim", num_tokens * out_dim)
        self.model = nn.Linear(dim, num_tokens * out_dim // self.read)

    def forward(self, states: Tensor, embeddings: Tensor | None = None) -> Tensor:
        """(B, r, dim) -> (B, num_tokens, out_dim); embeddings are not read."""
        return self.model(states)[:, : self.read].reshape(len(states), *self.shape)


class Written(NamedTuple):
    """What :meth:`GILL.write` wrote: (T,) token numbers, and (n, r, D) states of the images among them."""

    ids: Tensor
    states: Tensor


class GILL(nn.Module):
    """The maps around a language model, which is frozen and no part of the state dict.

    Args:
        lm: a causal language model of transformers.
        tokens: numbers of the new tokens, inside its table or beyond.
        vision_dim: of the pooled features of an image.
        out_dim, num_tokens: of the prompt.
        hidden, depth, num_heads: of :class:`GILLMapper`.
        retrieval_dim: of queries and keys.
        visual_tokens: of an image that is read.
        head: of prompts, one of :data:`HEADS`.
        retrieval_head: of queries.
        layers: whose states are read, by their numbers among the states of the language model; each has heads of its
            own, whose outputs add up. States of several layers stand side by side in the last axis.
    """

    lm: Any

    def __init__(
        self, lm: Any, tokens: Sequence[int], vision_dim: int = 1024, out_dim: int = 768, num_tokens: int = 77,
        retrieval_dim: int = 256, visual_tokens: int = 4, hidden: int = 512, depth: int = 4, num_heads: int = 4,
        head: str = "transformer", retrieval_head: str = "linear", layers: Sequence[int] = (-1,),
    ):  # fmt: skip
        super().__init__()
        check_type("lm", lm, nn.Module)
        if not hasattr(lm, "get_input_embeddings") or lm.get_output_embeddings() is None:
            raise ValueError(f"lm must be a causal language model of transformers, got {type(lm).__name__}")
        self.__dict__["lm"] = lm.requires_grad_(False).eval()
        self.tokens = check_ints("tokens", tokens, least=0)
        check_int("vision_dim", vision_dim, least=1)
        check_int("retrieval_dim", retrieval_dim, least=1)
        if not self.tokens or len(set(self.tokens)) != len(self.tokens):
            raise ValueError(f"tokens must be numbers, each once, got {tuple(tokens)}")
        check_choice("head", head, HEADS)
        check_choice("retrieval_head", retrieval_head, HEADS)
        table, outputs = lm.get_input_embeddings(), lm.get_output_embeddings()
        dim = table.embedding_dim
        if outputs.in_features != dim:
            raise ValueError(
                f"lm has embeddings and last states of several widths, {dim} and {outputs.in_features}; GILL adds both"
            )
        self.dim, self.visual_tokens = dim, check_int("visual_tokens", visual_tokens, least=1)
        mean = table.weight.detach().mean(0)
        spread = table.weight.detach().std() if table.weight.numel() > 1 else mean.new_ones(())
        self.image_tokens = nn.Parameter(mean + spread * torch.randn(len(self.tokens), dim).to(mean))
        tied = outputs.weight is table.weight
        self.image_outputs = None if tied else nn.Parameter(self.image_tokens.detach().clone())
        self.layers, count = check_ints("layers", layers), int(lm.config.num_hidden_layers)
        inner = [n for n in self.layers if n not in (-1, count)]
        if not self.layers or any(not -count - 1 <= n <= count for n in self.layers):
            raise ValueError(f"layers must be numbers from {-count - 1} to {count}, got {tuple(layers)}")
        if inner and getattr(lm.config, "hidden_size", dim) != dim:
            raise ValueError(f"layers {inner} of lm have states of {lm.config.hidden_size}, its embeddings {dim}")

        def of_prompt() -> nn.Module:
            if head == "linear":
                return LinearMapper(dim, out_dim, num_tokens, len(self.tokens))
            return GILLMapper(dim, out_dim, num_tokens, hidden, depth, num_heads)

        def of_query() -> nn.Module:
            if retrieval_head == "linear":
                return nn.Linear(dim, retrieval_dim)
            return GILLMapper(dim, retrieval_dim, 1, hidden, depth, num_heads)

        self.mapper, self.retrieval, self.retrieval_dim = of_prompt(), of_query(), retrieval_dim
        self.more_mappers = nn.ModuleList(of_prompt() for _ in self.layers[1:])
        self.more_retrievals = nn.ModuleList(of_query() for _ in self.layers[1:])
        self.visual = nn.Linear(vision_dim, dim * visual_tokens)
        self.visual_retrieval = nn.Linear(vision_dim, retrieval_dim)
        self.decision = nn.Sequential(nn.Dropout(0.5), nn.Linear(dim, len(DECISIONS)))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    # ---- the language model with its new tokens

    def embed(self, ids: Tensor) -> Tensor:
        """(B, N) -> (B, N, D)."""
        check_rank("ids", ids, 2, "(B, N)")
        check_whole("ids", ids)
        table = self.lm.get_input_embeddings()
        at = self._which(ids)
        unknown = (at < 0) & ((ids >= table.num_embeddings) | (ids < 0))
        if bool(unknown.any()):
            raise ValueError(
                f"ids holds {int(ids[unknown][0])}, which is not below {table.num_embeddings} and none of {self.tokens}"
            )
        old = table(torch.where(at < 0, ids, 0))
        return torch.where(at[..., None] < 0, old, self.image_tokens[at.clamp(min=0)].to(old))

    def _which(self, ids: Tensor) -> Tensor:
        """Number of each image token, -1 for others."""
        hit = ids.unsqueeze(-1) == torch.tensor(self.tokens, device=ids.device)
        return torch.where(hit.any(-1), hit.to(torch.int8).argmax(-1), -1)

    def see(self, features: Tensor) -> Tensor:
        """(B, vision_dim) pooled features -> (B, visual_tokens, D)."""
        check_axes("features", features, B=None, vision_dim=self.visual.in_features)
        return self.visual(features).unflatten(-1, (self.visual_tokens, self.dim))

    def _read(self, embeddings: Tensor, **options: Any) -> tuple[Tensor, Tensor, Any]:
        """States and logits, those of the new tokens among them, and the cache."""
        out = self.lm(inputs_embeds=embeddings, output_hidden_states=True, **options)
        last, logits = out.hidden_states[-1], out.logits
        states = last if self.layers == (-1,) else torch.cat([out.hidden_states[n] for n in self.layers], -1)
        rows = self.image_tokens if self.image_outputs is None else self.image_outputs
        new = F.linear(last, rows.to(last))
        more = max(self.tokens) + 1 - logits.shape[-1]
        if more > 0:
            logits = F.pad(logits, (0, more), value=-math.inf)
        at = torch.tensor(self.tokens, device=logits.device)
        cache = cache_out(out) if options.get("use_cache") else None
        return states, logits.index_copy(-1, at, new.to(logits)), cache

    def states_at(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """States at the image tokens (B, r, D) of texts with one image each, and logits (B, N, V).

        Raises:
            ValueError: a row whose image tokens are not there once, in order.
        """
        states, logits, _ = self._read(self.embed(ids))
        return self._taken(ids, states), logits

    def _taken(self, ids: Tensor, states: Tensor) -> Tensor:
        at = self._which(ids)
        count = len(self.tokens)
        order = torch.arange(count, device=ids.device)
        for i, row in enumerate(at):
            found = row[row >= 0]
            if len(found) != count or not torch.equal(found, order):
                raise ValueError(f"ids[{i}] must hold the image tokens {self.tokens} once and in order")
        return states[at >= 0].view(len(ids), count, -1)

    # ---- what becomes of the states

    def prompt_embeds(self, states: Tensor, length: int | None = None) -> Tensor:
        """(B, r, D) -> (B, num_tokens, out_dim), as pipelines of diffusers take it.

        Args:
            states: of images to draw.
            length: tokens of the prompt, zeros behind those of the mapper.
        """
        each = self._checked(states).chunk(len(self.layers), -1)
        prompt = self.mapper(each[0], self.image_tokens)
        for mapper, one in zip(self.more_mappers, each[1:], strict=True):
            prompt = prompt + mapper(one, self.image_tokens)
        if length is None:
            return prompt
        check_int("length", length, least=prompt.shape[1])
        return F.pad(prompt, (0, 0, 0, length - prompt.shape[1]))

    def _checked(self, states: Tensor) -> Tensor:
        check_float("states", states)
        check_axes("states", states, B=None, r=len(self.tokens), D=self.dim * len(self.layers))
        return states

    def query(self, states: Tensor) -> Tensor:
        """(B, r, D) -> (B, retrieval_dim), of length 1."""
        each = self._checked(states).chunk(len(self.layers), -1)
        heads = (self.retrieval, *self.more_retrievals)
        found = [
            head(one, self.image_tokens)[:, 0] if isinstance(head, GILLMapper) else head(one[:, 0])
            for head, one in zip(heads, each, strict=True)
        ]
        return F.normalize(torch.stack(found).sum(0) if len(found) > 1 else found[0], dim=-1)

    def key(self, features: Tensor) -> Tensor:
        """(B, vision_dim) -> (B, retrieval_dim), of length 1."""
        check_axes("features", features, B=None, vision_dim=self.visual_retrieval.in_features)
        return F.normalize(self.visual_retrieval(features), dim=-1)

    def scores(self, states: Tensor, keys: Tensor) -> Tensor:
        """(B, M) scaled cosines of images to show with (M, retrieval_dim) keys."""
        check_axes("keys", keys, M=None, retrieval_dim=self.retrieval_dim)
        return self.logit_scale.exp() * self.query(states) @ keys.mT

    def best_of(self, states: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Which of several drawings of one image is most like what was asked for.

        Args:
            states: (1, r, D) of the image.
            features: (M, vision_dim) of its drawings.

        Returns:
            (M,) their numbers, the likest first, and (M,) their cosines, in that order.
        """
        check_axes("states", states, B=1, r=len(self.tokens), D=self.dim * len(self.layers))
        found = (self.key(features) @ self.query(states).mT)[:, 0].sort(descending=True)
        return found.indices, found.values

    def decide(self, states: Tensor) -> Tensor:
        """(B, 2) probabilities that an image is better generated, or retrieved, by the first of the layers."""
        return self.decision(self._checked(states)[:, 0, : self.dim]).softmax(-1)

    # ---- losses

    def caption_loss(
        self, features: Tensor, ids: Tensor, pad: int, prefix: Tensor | None = None, pairs: bool = False
    ) -> Tensor:
        """Cross-entropy of a caption behind its image; padding, and image tokens on, count nothing.

        Args:
            features: (B, vision_dim) of images.
            ids: (B, N) captions.
            pad: number of the padding token.
            prefix: (P,) token numbers between image and caption.
            pairs: captions are read two by two; see :meth:`losses`.
        """
        words = self._behind(prefix, self.embed(ids))
        check_axes("features", features, B=len(ids), vision_dim=self.visual.in_features)
        ends = (ids == pad) | (self._which(ids) >= 0)
        return self._language(torch.cat([self.see(features), words], 1), ids, ends, ends, pairs)[0]

    def losses(
        self, ids: Tensor, pad: int, target: Tensor | None = None, features: Tensor | None = None,
        prefix: Tensor | None = None, pairs: bool = False,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Of captions with image tokens behind: ``tokens``, and ``generation`` or ``retrieval``, or both.

        In pairs, an odd row (0, 1, ...) is read behind the row before it, without the token that begins it. Of the
        tokens, the first caption of a pair alone counts here, as in the authors' code; in :meth:`caption_loss`, both.

        Args:
            ids: (B, N).
            pad: number of the padding token.
            target: (B, num_tokens, out_dim) prompts that the denoiser's own encoder makes of the captions.
            features: (B, vision_dim) of their images.
            prefix: (P,) token numbers before each caption; they are not learnt.
            pairs: captions are read two by two.
        """
        if target is None and features is None:
            raise ValueError("target or features must be given")
        loss, states = self._language(
            self._behind(prefix, self.embed(ids)), ids, ids == pad, (ids == pad) | (self._which(ids) > 0), pairs
        )
        given = self._taken(ids, states)
        found = {"tokens": 0.5 * ((target is not None) + (features is not None)) * loss}
        if target is not None:
            prompt = self.prompt_embeds(given)
            check_axes("target", target, B=len(ids), num_tokens=prompt.shape[1], out_dim=prompt.shape[2])
            found["generation"] = torch.linalg.vector_norm(prompt - target, dim=-1).mean()
        if features is not None:
            check_axes("features", features, B=len(ids), vision_dim=self.visual.in_features)
            scores = self.scores(given, self.key(features))
            own = torch.arange(len(ids), device=ids.device)
            found["retrieval"] = (F.cross_entropy(scores, own) + F.cross_entropy(scores.mT, own)) / 2
        return found

    def _behind(self, prefix: Tensor | None, words: Tensor) -> Tensor:
        """(B, N, D) words behind a prefix."""
        if prefix is None:
            return words
        check_axes("prefix", prefix, P=None)
        return torch.cat([self.embed(prefix[None]).expand(len(words), -1, -1), words], 1)

    def _language(
        self, embeddings: Tensor, ids: Tensor, padding: Tensor, ends: Tensor, pairs: bool
    ) -> tuple[Tensor, Tensor]:
        """Loss of next tokens before the first that ends each row (B, N), and states at the words (B, N, D).

        ``padding`` is where a caption is over, and the other one of a pair begins.
        """
        before = embeddings.shape[1] - ids.shape[1]
        labels = F.pad(ids.masked_fill(padding.cummax(1).values, -100), (before, 0), value=-100)
        ends = F.pad(ends, (before, 0))
        if not check_flag("pairs", pairs):
            states, logits, _ = self._read(embeddings)
            return self._next(logits, labels, ends), states[:, before:]
        if len(ids) % 2:
            raise ValueError(f"pairs=True needs an even number of captions, got {len(ids)}")
        order = _two_by_two(padding, before)
        rows, columns = torch.arange(len(order), device=ids.device)[:, None], order
        joined = [t.unflatten(0, (-1, 2)).flatten(1, 2)[rows, columns] for t in (embeddings, labels, ends)]
        states, logits, _ = self._read(joined[0])
        apart = states.new_zeros(len(order), 2 * embeddings.shape[1], states.shape[-1])
        apart = apart.index_put((rows, columns), states).view(len(ids), -1, states.shape[-1])
        return self._next(logits, *joined[1:]), apart[:, before:]

    @staticmethod
    def _next(logits: Tensor, labels: Tensor, ends: Tensor) -> Tensor:
        labels = labels.masked_fill(ends.cummax(1).values, -100)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())

    def likelihood(self, parts: Sequence[Tensor]) -> Tensor:
        """Mean log likelihood of the words of texts and images, each given all before it.

        Args:
            parts: in order: (1, N) token numbers, or (1, vision_dim) features of an image.
        """
        embeddings = self._joined(parts)
        labels = torch.cat(
            [
                p.new_full((1, self.visual_tokens), -100, dtype=torch.long) if p.is_floating_point() else p
                for p in parts
            ],
            1,
        )
        logits = self._read(embeddings)[1]
        return -F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Embeddings (1, N, D) of texts and images."""
        if not len(parts):
            raise ValueError("parts must hold at least one text or image")
        for i, part in enumerate(parts):
            check_rank(f"parts[{i}]", part, 2, "(1, N) or (1, vision_dim)")
        made = torch.cat([self.see(p) if p.is_floating_point() else self.embed(p) for p in parts], 1)
        if made.shape[0] != 1:
            raise ValueError(f"parts must be of one sample, got {made.shape[0]}")
        return made

    # ---- writing

    @torch.no_grad()
    def write(
        self, parts: Sequence[Tensor], max_steps: int = 32, min_words: int = 0, scale: float = 1.0,
        temperature: float = 0.0, top_p: float = 1.0, stop: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Written:  # fmt: skip
        """Go on from texts and images.

        Args:
            parts: in order: (1, N) token numbers, or (1, vision_dim) features of an image.
            max_steps: of the language model; [IMG0] and what it forces are one.
            min_words: steps before the first image may be written.
            scale: above 1 the logit of [IMG0] becomes its size times that.
            temperature: 0 takes the likeliest.
            top_p: with a temperature, the least set of tokens that hold that much.
            stop: a token that ends the text; it is not kept.
            generator: of draws.
        """
        check_int("max_steps", max_steps, least=1)
        check_int("min_words", min_words, least=0)
        check_real("scale", scale, above=0)
        check_real("temperature", temperature, least=0)
        check_real("top_p", top_p, above=0, most=1)
        if top_p < 1 and not temperature:
            raise ValueError(f"top_p={top_p} needs a temperature above 0")
        first, *rest = self.tokens
        new = self._joined(parts)
        cache: Any = None
        ids: list[int] = []
        held: list[Tensor] = []
        waiting = False
        for i in range(max_steps + 1):
            held_before = {} if cache is None else cache_argument(self.lm, cache)
            states, logits, cache = self._read(new, use_cache=True, **held_before)
            if waiting:
                held.append(states[0, -len(self.tokens) :])
                waiting = False
            if i == max_steps:
                break
            row = logits[0, -1].float().clone()
            row[rest] = -math.inf
            if i < min_words:
                row[first] = -math.inf
            elif scale > 1:
                row[first] = row[first].abs() * scale
            token = _drawn(row, temperature, top_p, generator)
            if token == stop:
                break
            added = list(self.tokens) if token == first else [token]
            waiting = token == first
            ids += added
            new = self.embed(torch.tensor([added], device=row.device))
        made = torch.tensor(ids, dtype=torch.long, device=new.device)
        return Written(made, torch.stack(held) if held else new.new_empty(0, len(self.tokens), self.dim))

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
        """From the authors' ``GILLModel`` or ``GILL``, whole or without its frozen parts.

        Args:
            state_dict: theirs.
            count: of the new tokens, the last rows of their table.
        """
        held = {k.removeprefix("module.").removeprefix("model."): v for k, v in state_dict.items()}
        theirs = Released(held, "GILLModel")
        theirs.leave(r"(?:lm|visual_model)\..*", because="frozen")

        def place(name: str, match: re.Match[str]) -> str:
            number = int(match["layer"])
            return name if not number else f"more_{name}s.{number - 1}"

        deep = "ret_text_hidden_fcs.0.query_embs" in theirs

        def prompt(match: re.Match[str], value: Tensor) -> dict[str, Tensor]:
            return {f"{place('mapper', match)}.{match['rest']}": value}

        def query(match: re.Match[str], value: Tensor) -> dict[str, Tensor]:
            rest = match["rest"] if deep else match["rest"].removeprefix("model.")
            return {f"{place('retrieval', match)}.{rest}": value}

        head = r"_text_hidden_fcs\.(?P<layer>\d+)\.(?P<rest>(?:fc|tfm|model)\..+|query_embs)"
        return theirs.close(
            theirs.renamed(
                {
                    "gen" + head: prompt,
                    "ret" + head: query,
                    r"visual_embeddings\.(weight|bias)": r"visual.\1",
                    r"visual_fc\.(weight|bias)": r"visual_retrieval.\1",
                    r"input_embeddings\.weight": lambda match, value: {"image_tokens": value[-count:]},
                    r"(logit_scale)": r"\1",
                }
            )
        )


def _two_by_two(padding: Tensor, before: int) -> Tensor:
    """(B / 2, 2 W - 1) places of two rows of W = before + N, one behind the other, without the second's first word.

    What is behind the end of each comes last.
    """
    b, n = padding.shape
    width = before + n
    lengths = torch.where(padding.any(1), padding.to(torch.int8).argmax(1), n) + before
    place = torch.arange(width, device=padding.device)
    out = []
    for first, second in lengths.view(-1, 2).tolist():
        kept = place[:second][place[:second] != before]
        out.append(torch.cat([place[:first], width + kept, place[first:], width + place[second:]]))
    return torch.stack(out)


def _drawn(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> int:
    if not temperature:
        return int(logits.argmax())
    shares = (logits / temperature).softmax(-1)
    if top_p < 1:
        _, places, kept = in_nucleus(shares, top_p)
        shares = shares.index_fill(0, places[~kept], 0)
    return int(torch.multinomial(shares, 1, generator=generator))


__all__ = ["DECISIONS", "GILL", "HEADS", "GILLMapper", "LinearMapper", "Written"]
