"""Masks by type of token: which queries read which keys, told by what the tokens are.

All of them are one form on top of a causal mask,

    ``allow(q, k) = (k <= q  and not lock(type q, type k)  or  k == q)  or  unlock(type q, type k)``,

with two small tables. No parameters, no other cost than attention with a mask. Known settings:

* :func:`modality_mutual` (AKI): image tokens also read forward, the question that follows them.
* :func:`bidirectional` (prefix decoders such as PaliGemma, Croc): image tokens read each other in both directions.
* :func:`composite` (EE-MLLM): image tokens read only themselves; text reads everything before it.

:func:`causal_frames` (Video-CCAM) is the one for cross-attention from learned queries to the frames of a video.

A rule is a :class:`TypeRule`; ``rule.mask(types)`` is a mask for our own models, :class:`MaskByType` puts it into a
model that exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..masks import CausalFrames, Mask, causal, causal_frames, modality, recent
from ..types import to_list
from .intervention import Intervention
from .session import Session
from .site import Site
from .tokens import GENERATED, IMAGE, NAMES, QUESTION, SYSTEM, TEXT, TokenTypes

Pairs = frozenset[tuple[int, int]]

#: Types of tokens that exist.
EXISTING = (TEXT, IMAGE, SYSTEM, QUESTION, GENERATED)


def _pairs(name: str, pairs: Iterable[tuple[int, int]]) -> Pairs:
    found = frozenset((int(q), int(k)) for q, k in pairs)
    for pair in found:
        if not all(t in EXISTING for t in pair):
            raise ValueError(
                f"{name} must hold pairs (type of query, type of key) of {[(t, NAMES[t]) for t in EXISTING]}; got "
                f"{pair}: padding is read by nobody"
            )
    return found


@dataclass(frozen=True)
class TypeRule:
    """Which pairs of types meet beside, or against, the order of tokens.

    Args:
        unlock: (type of query, type of key): such pairs meet wherever they stand.
        lock: such pairs do not meet, except a token with itself.

    Raises:
        ValueError: a type that does not exist, or a pair that is both locked and unlocked.

    >>> from attnlib.hooks import IMAGE, QUESTION
    >>> print(TypeRule(unlock={(IMAGE, QUESTION)}).mask(torch.tensor([1, 2, 2, 4, 5])).picture(5))
    #....
    ##.#.
    ####.
    ####.
    #####
    """

    unlock: Pairs = frozenset()
    lock: Pairs = frozenset()

    def __init__(self, unlock: Iterable[tuple[int, int]] = (), lock: Iterable[tuple[int, int]] = ()):
        object.__setattr__(self, "unlock", _pairs("unlock", unlock))
        object.__setattr__(self, "lock", _pairs("lock", lock))
        both = self.unlock & self.lock
        if both:
            q, k = min(both)
            raise ValueError(f"({NAMES[q]}, {NAMES[k]}) is locked and unlocked at once; leave it out of one")

    def __or__(self, other: TypeRule) -> TypeRule:
        """Both rules at once."""
        return TypeRule(self.unlock | other.unlock, self.lock | other.lock)

    @property
    def empty(self) -> bool:
        """It changes nothing."""
        return not self.unlock and not self.lock

    def table(self, pairs: Pairs) -> list[list[bool]]:
        """Square table (type of query, type of key)."""
        return [[(q, k) in pairs for k in range(len(NAMES))] for q in range(len(NAMES))]

    def mask(self, types: Tensor) -> Mask:
        """The rule over causal attention, for tokens of these types.

        Args:
            types: (N,) or (B, N) integers of :mod:`attnlib.hooks.tokens`, by position.

        Returns:
            A mask on positions 0 to N-1. Padding is read by nobody and reads nothing.
        """
        types = types.long()
        exists = frozenset((q, k) for q in EXISTING for k in EXISTING)
        out = causal() & modality(types, self.table(exists - self.lock))
        if self.lock:
            out = out | (recent(1) & modality(types, self.table(exists)))
        return out | modality(types, self.table(self.unlock)) if self.unlock else out

    def apply(self, allowed: Tensor, q_types: Tensor, k_types: Tensor, itself: Tensor) -> Tensor:
        """The rule over a mask that is given.

        Args:
            allowed: (B or 1, H or 1, N, M) boolean, what the model allows.
            q_types: (B, N).
            k_types: (B, H or 1, M).
            itself: boolean, broadcastable: the key is the query's own token.

        Returns:
            (B, H or 1, N, M) boolean.
        """
        q, k = q_types.long()[:, None, :, None], k_types.long()[:, :, None]
        for pairs, unlock in ((self.lock, False), (self.unlock, True)):
            if pairs:
                table = torch.tensor(self.table(pairs), device=q_types.device)
                meet = table[q, k]
                allowed = allowed | meet if unlock else allowed & (~meet | itself)
        return allowed


def modality_mutual(image: int = IMAGE, question: int = QUESTION) -> TypeRule:
    """Image tokens read the question that follows them (modality-mutual attention, AKI).

    Everything else stays causal: image tokens among themselves, text, and above all the answer, which no image token
    reads. Types come from ``TokenTypes(image=..., answer=...)``.

    Reference: Wang et al., 2025, arXiv 2503.02597, section 3.2.

    >>> sorted(modality_mutual().unlock)
    [(2, 4)]
    """
    return TypeRule(unlock={(image, question)})


def bidirectional(types: Sequence[int] = (IMAGE,)) -> TypeRule:
    """Tokens of these types read each other in both directions, all others stay causal.

    With ``(IMAGE,)`` a bidirectional image prefix; with ``(IMAGE, SYSTEM, QUESTION)`` the prefix of a prefix decoder.

    >>> sorted(bidirectional().unlock)
    [(2, 2)]
    """
    return TypeRule(unlock={(q, k) for q in types for k in types})


def composite(image: int = IMAGE, reads_text: bool = False) -> TypeRule:
    """No attention among image tokens: each reads only itself, text reads everything before it (EE-MLLM).

    Attention over a single key gives that key's value, so an image token goes through value and output projection and
    feed-forward of each layer, without a word of its neighbours. As a mask this is exact but saves nothing.

    Args:
        image: type of the image tokens.
        reads_text: image tokens also read the text before them.

    Reference: Ma et al., 2024, arXiv 2408.11795 (composite attention).

    >>> (IMAGE, IMAGE) in composite().lock, (IMAGE, TEXT) in composite(reads_text=True).lock
    (True, False)
    """
    return TypeRule(lock={(image, k) for k in ((image,) if reads_text else EXISTING)})


class MaskByType(Intervention):
    """Put a rule on types of tokens on top of the mask of a model that exists.

    Token types come from ``attach(..., token_types=...)`` and are kept per sample while decoding. Padding stays hidden,
    whatever the rule. Calls in which no query has a type that the rule names, such as decoding steps, keep the model's
    own kernel and give the same bits.

    Args:
        rule: a :class:`TypeRule`, for example :func:`modality_mutual`; ``a | b`` for both of two.
        layers: layers to change; ``None`` for all, as the models were trained.

    Raises:
        TypeError: something that is no rule.
        ValueError: when attached, a rule on types that the given ``TokenTypes`` does not tell apart; while running, a
            prompt read in pieces, so that cached tokens could not read what they should.

    >>> MaskByType(modality_mutual(), layers=[0, 1]).layers
    [0, 1]
    """

    name: ClassVar[str] = "mask-by-type"
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    needs_types: ClassVar[bool] = True
    replaces_mask: ClassVar[bool] = True

    def __init__(self, rule: TypeRule, layers: Sequence[int | str] | None = None):
        if not isinstance(rule, TypeRule):
            hint = "; call it" if callable(rule) else ""
            raise TypeError(f"rule must be a TypeRule, got {rule!r}{hint}")
        self.rule = rule
        self.layers = to_list("layers", layers)

    @property
    def identity(self) -> bool:
        return self.rule.empty

    def on_attach(self, session: Session) -> None:
        source = None if session.tracker is None else session.tracker.source
        if not isinstance(source, TokenTypes) or source.answer is not None:
            return

        def told(t: int) -> int:
            return TEXT if t in (SYSTEM, QUESTION) else t

        for pairs in (self.rule.unlock, self.rule.lock):
            for query, key in sorted(pairs):
                if (told(query), told(key)) not in pairs:
                    raise ValueError(
                        f"MaskByType: the rule speaks of ({NAMES[query]}, {NAMES[key]}), but without an answer marker "
                        "all text is of type 'text' and nothing would happen; give TokenTypes(image=..., answer=...)"
                    )

    def around_attention(self, site: Site, q: Tensor, k: Tensor, v: Tensor, call: Callable[..., Tensor]) -> Tensor:
        assert site.q_types is not None and site.k_types is not None and site.mask is not None
        self._check_pieces(site)
        if not self._named(site.q_types, {query for query, _ in self.rule.lock | self.rule.unlock}):
            return call(q, k, v)
        allowed = site.mask.dense(q.device)
        itself = site.query_slots() == site.key_slots()
        new = self.rule.apply(allowed, site.q_types, site.key_types(), itself)
        if torch.equal(*torch.broadcast_tensors(new, allowed)):
            return call(q, k, v)
        return call(q, k, v, mask=new)

    @staticmethod
    def _named(types: Tensor, names: set[int]) -> bool:
        wanted = torch.tensor(sorted(names), device=types.device, dtype=types.dtype)
        return bool(torch.isin(types, wanted).any())

    def _check_pieces(self, site: Site) -> None:
        """Tokens that were read before can no longer read these."""
        if not site.offset or site.n_queries == 1 or not self.rule.unlock:
            return
        assert site.q_types is not None and site.k_types is not None
        old = site.k_types[..., : site.n_keys - site.n_queries]
        for query, key in sorted(self.rule.unlock):
            if self._named(old, {query}) and self._named(site.q_types, {key}):
                raise ValueError(
                    f"layer {site.layer} ({site.name}): {NAMES[query]} tokens should read {NAMES[key]} tokens, but "
                    "were read, and cached, before them; read both in one call of the model, not in chunks"
                )


__all__ = [
    "CausalFrames",
    "MaskByType",
    "TypeRule",
    "bidirectional",
    "causal_frames",
    "composite",
    "modality_mutual",
]
