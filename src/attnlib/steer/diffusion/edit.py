"""Prompt-to-prompt: an image and its edits are sampled side by side, and the edits look where the first one looks.

A pipeline is called with several prompts, the source first. At first steps the cross-attention of the others becomes
that of the source, carried over from its tokens to theirs (:func:`replacement`, :func:`refinement`) and weighed word by
word, and their self-attention the source's own; where the edited words do not look, their latents become the source's
(:func:`blend_mask`). Weights are changed after the softmax and not normalised again.

::

    prompts = ["a cat on a bench", "a dog on a bench"]
    with attnlib.attach(pipe, PromptToPrompt("replace", blend=[["cat"], ["dog"]])):
        source, edited = pipe(prompts).images

For a real image, give its inversion as ``latents`` (:mod:`attnlib.steer.diffusion.invert`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import check_choice, check_flag, check_int, check_real, check_type, shaped
from ...hooks.denoiser import CallSite
from ...hooks.intervention import Intervention
from ...hooks.maps import Maps
from ...hooks.pipelines import Stepped, repeated
from ...hooks.site import Site
from .maps import normalize
from .prompts import find, holds, spans_of, text_streams, token_spans
from .tiles import InParts

MODES = ("replace", "refine", None)

#: A share of the steps from the first, or shares from which and up to which.
Share = float | Sequence[float]


# ---- from the tokens of one prompt to those of another


def word_tokens(tokenizer: Any, prompt: str) -> list[list[int]]:
    """The tokens of each word of a prompt, words being what spaces separate."""
    words = [match.span() for match in re.finditer(r"\S+", prompt)]
    written = tokenizer(prompt, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)
    tokens = [
        (i, a, b)
        for i, ((a, b), s) in enumerate(zip(written["offset_mapping"], written["special_tokens_mask"], strict=True))
        if not s
    ]
    return [[i for i, a, b in tokens if a < stop and b > start] for start, stop in words]


def replacement(tokenizer: Any, source: str, target: str, length: int = 77, compat: str | None = None) -> Tensor:
    """How much of each source token's weight each target token gets, where words were replaced by others: (L, L).

    Words stand for each other one by one; a word of other length shares its weight evenly. Every source token gives all
    of its weight away.

    Args:
        tokenizer: of transformers, one that gives offsets.
        source: a prompt.
        target: a prompt of as many words.
        length: L, tokens that the denoiser reads.
        compat: ``"authors"`` for their matrix: behind the last replaced word, target token j takes from source token j,
            also where a word of other length before them has moved them.

    Raises:
        ValueError: prompts of unlike length.
    """
    check_choice("compat", compat, (None, "authors"))
    before, after = source.split(), target.split()
    if len(before) != len(after):
        raise ValueError(
            f"prompts must have as many words for replacement; the source {source!r} has {len(before)}, {target!r} has "
            f"{len(after)}; edit='refine' serves prompts of unlike length"
        )
    changed = [n for n, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    tokens = [word_tokens(tokenizer, source), word_tokens(tokenizer, target)]
    waiting = [(tokens[0][n], tokens[1][n]) for n in changed]
    matrix, i, j = torch.zeros(length, length), 0, 0
    while i < length and j < length:
        if waiting and waiting[0][0][0] == i:
            a, b = waiting.pop(0)
            if max(a) >= length or max(b) >= length:
                raise ValueError(f"a replaced word lies beyond the {length} tokens that the text encoder reads")
            if len(a) == len(b):
                matrix[a, b] = 1.0
            else:
                matrix[torch.tensor(a)[:, None], torch.tensor(b)[None]] = 1.0 / len(b)
            i, j = i + len(a), j + len(b)
        else:
            matrix[i if waiting or compat is None else j, j] = 1.0
            i, j = i + 1, j + 1
    if compat is None:
        matrix[i:, -1] += 1.0  # source padding for which there is no room
    return matrix


def refinement(tokenizer: Any, source: str, target: str, length: int = 77) -> tuple[Tensor, Tensor]:
    """Which source token each target token is, (L,), and whether it is one, (L,), where a prompt was changed at will.

    Tokens are aligned as sequences are (1 for each pair that agrees, -1 for one that does not, 0 for a gap).

    Args:
        tokenizer: of transformers.
        source, target: prompts.
        length: L, tokens that the denoiser reads.
    """
    x, y = (tokenizer(prompt, verbose=False)["input_ids"][:length] for prompt in (source, target))
    best = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    for i, a in enumerate(x, 1):
        for j, b in enumerate(y, 1):
            best[i][j] = max(best[i][j - 1], best[i - 1][j], best[i - 1][j - 1] + (1 if a == b else -1))
    index, found = torch.arange(length), torch.ones(length)
    i, j = len(x), len(y)
    while j:
        if i and best[i][j] not in (best[i][j - 1], best[i - 1][j]):
            i, j = i - 1, j - 1
            index[j] = i
        elif not i or best[i][j] == best[i][j - 1]:
            j -= 1
            index[j], found[j] = 0, 0.0
        else:
            i -= 1
    return index, found


# ---- where the edit may act


@shaped(maps="float (B, h, w)")
def blend_mask(maps: Tensor, size: Sequence[int], threshold: float = 0.3, pool: int = 1, how: str = "max") -> Tensor:
    """Where a word looks: (B, H, W) boolean.

    Args:
        maps: (B, h, w) weights of the word.
        size: (H, W) of the latents; the nearest place of the map is taken.
        threshold: of the map divided by its maximum (``how="max"``) or stretched over [0, 1] (``"range"``).
        pool: places around it that a maximum is taken over first; 0 for none.
        how: see :func:`attnlib.steer.diffusion.maps.normalize`.

    >>> blend_mask(torch.tensor([[[0.0, 1.0]]]), (1, 4), pool=0).tolist()
    [[[False, False, True, True]]]
    """
    if pool:
        maps = F.max_pool2d(maps[:, None], 2 * pool + 1, stride=1, padding=pool)[:, 0]
    wide = F.interpolate(maps[:, None], size=tuple(size))[:, 0]
    return normalize(wide, how) > threshold


# ---- rows of a batch


@dataclass(frozen=True)
class Edited:
    """The conditional rows of a batch, and of which row each is an edit.

    Args:
        index: rows of the batch.
        prompts: number of the prompt of each.
        source: for each the position, in ``index``, of the same image of the first prompt.
    """

    index: tuple[int, ...]
    prompts: tuple[int, ...]
    source: tuple[int, ...]

    @classmethod
    def of(cls, rows: Sequence[str], prompts: Sequence[int], who: str) -> Edited:
        """
        Raises:
            ValueError: an edit whose source is not in the batch.
        """
        index = tuple(i for i, row in enumerate(rows) if row == "cond")
        numbers = tuple(prompts[i] for i in index)
        first = [k for k, p in enumerate(numbers) if p == 0]
        source = []
        for k, p in enumerate(numbers):
            image = numbers[:k].count(p)
            if image >= len(first):
                raise ValueError(
                    f"{who} edits images beside their source, but the batch of rows {list(rows)} does not hold the "
                    "source of all of them"
                )
            source.append(first[image])
        return cls(index, numbers, tuple(source))

    @property
    def edits(self) -> list[tuple[int, int, int]]:
        """``(row, row of its source, number of its prompt)`` of each edit."""
        return [
            (self.index[k], self.index[s], p)
            for k, (p, s) in enumerate(zip(self.prompts, self.source, strict=True))
            if p
        ]


def bounds(share: Share, steps: int) -> tuple[int, int]:
    """The steps that a share of them means.

    >>> bounds(0.4, 50), bounds((0.1, 0.5), 10)
    ((0, 20), (1, 5))
    """
    low, high = (0.0, share) if isinstance(share, (int, float)) else share
    return int(low * steps), int(high * steps)


def check_share(name: str, share: Any) -> Share:
    if isinstance(share, (list, tuple)):
        if len(share) != 2:
            raise ValueError(f"{name} must be a share of the steps or two of them, got {share!r}")
        low, high = (check_real(name, s, least=0, most=1) for s in share)
        if low > high:
            raise ValueError(f"{name} must be two shares in order, got {share!r}")
        return (low, high)
    return check_real(name, share, least=0, most=1)


class PromptToPrompt(Intervention):
    """Edits of an image by edits of its prompt.

    The first prompt of the pipeline's call is the source, the others are edits of it, all from the source's noise.

    Args:
        edit: ``"replace"`` for words that stand for others, ``"refine"`` for prompts changed at will (tokens that are
            in both keep the source's weights), ``None`` to take the source's weights column by column.
        cross: share of the steps at which cross-attention is edited, or shares from which and up to which; with
            ``{word: share}`` other shares for some words of the edits (``None`` is the key of all others; without it,
            all steps).
        self_maps: share of the steps at which self-attention is the source's.
        weights: ``{word of the edits: factor}`` of its edited weights.
        blend: words, one list of them or a list for each prompt (the source's first), outside of whose places the edits
            keep the source's latents.
        subtract: words at whose places they keep them, too.
        thresholds: of the maps of ``blend`` and ``subtract``.
        blend_from: share of the steps from which on latents are blended.
        resolution: of the maps that are looked at for it.
        layers: names or numbers of layers whose attention is edited; ``None`` for all.
        self_resolution: self-attention over more than its square of tokens is left.
        share_noise: the edits begin with the source's noise, whatever the pipeline drew.
        compat: see :func:`replacement`.

    Raises:
        ValueError: at attach, a model outside a pipeline or without cross-attention; when the pipeline is called, fewer
            than two prompts, prompts of unlike length for replacement, a word that is in none.

    Sums of maps that their code keeps are means here, which masks do not tell apart. Layers whose maps are looked at
    are chosen by resolution, in place of places in their list.

    Reference: Hertz et al., 2022, arXiv 2208.01626.

    >>> PromptToPrompt("refine", cross=0.6, weights={"red": 2.0}).kinds
    ('cross', 'self')
    """

    name: ClassVar[str] = "prompt-to-prompt"
    kinds: ClassVar[tuple[str, ...]] = ("cross", "self")

    def __init__(
        self,
        edit: str | None = "replace",
        cross: Share | Mapping[str | None, Share] = 0.8,
        self_maps: Share = 0.4,
        weights: Mapping[str, float] | None = None,
        blend: Sequence[Any] | None = None,
        subtract: Sequence[Any] | None = None,
        thresholds: Sequence[float] = (0.3, 0.3),
        blend_from: float = 0.2,
        resolution: int | Sequence[int] = 16,
        layers: Sequence[int | str] | None = None,
        self_resolution: int = 32,
        share_noise: bool = True,
        compat: str | None = None,
    ):
        check_choice("edit", edit, MODES)
        check_choice("compat", compat, (None, "authors"))
        self.edit, self.compat, self.layers = edit, compat, layers
        self.cross: dict[str | None, Share]
        if isinstance(cross, Mapping):
            self.cross = {None: 1.0}
            self.cross.update({word: check_share("cross", share) for word, share in cross.items()})
        else:
            self.cross = {None: check_share("cross", cross)}
        self.self_maps = check_share("self_maps", self_maps)
        for word in weights or {}:
            check_type("weights", word, str, "of words (str)")
        self.weights = {word: check_real("weights", w) for word, w in (weights or {}).items()}
        for name, words in (("blend", blend), ("subtract", subtract)):
            if isinstance(words, str):
                raise TypeError(f"{name} must be a sequence of words, got the string {words!r}; write [{words!r}]")
            if words is not None and not len(words):
                raise ValueError(f"{name} must hold words; None leaves it out")
        if subtract is not None and blend is None:
            raise ValueError("subtract takes places from those of blend; name its words")
        self.blend = None if blend is None else list(blend)
        self.subtract = None if subtract is None else list(subtract)
        if len(thresholds) != 2:
            raise ValueError(f"thresholds must be two numbers, of blend and subtract, got {thresholds!r}")
        self.thresholds = tuple(check_real("thresholds", t) for t in thresholds)
        self.blend_from = check_real("blend_from", blend_from, least=0, most=1)
        self.self_resolution = check_int("self_resolution", self_resolution, least=0)
        self.share_noise = check_flag("share_noise", share_noise)
        self.moves_latents = share_noise or blend is not None
        self.maps = Maps(resolution, gradient=False)

    # ---- attaching

    @property
    def companions(self) -> Sequence[Intervention]:
        return () if self.blend is None else (self.maps,)

    def conflicts(self, other: Intervention) -> str | None:
        if self.companions and other.reuses_features:
            return f"{type(self).__name__} looks at maps at every step, which are not there where features are reused"
        if isinstance(other, InParts):
            return "edits are held to their source's whole picture, and tiles cut it"
        return None

    def on_attach(self, session: Any) -> None:
        if session.sampling is None:
            raise ValueError(
                f"{type(self).__name__} edits the prompts of a pipeline, and {type(session.model).__name__} was "
                "attached to by itself; attach to the pipeline: attach(pipe, ...)"
            )

    # ---- what the prompts say

    def around_denoiser(
        self, site: CallSite, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Tensor]
    ) -> Tensor:
        if site.step is None:
            return call(inputs)
        if site.rows is None or site.prompts is None:
            raise ValueError(
                f"{type(self).__name__} edits conditional rows, and which these are is not known in "
                f"{type(site.sampling.pipe).__name__}; say it: attach(pipe, ..., rows=('uncond', 'cond'))"
            )
        notes = self.session.notes
        if (self, "plan") not in notes:
            notes[self, "plan"] = self._plan(site, inputs)
        if self.share_noise and site.step == 0:
            inputs = self._shared(site, inputs)
        if "cond" not in site.rows:
            return call(inputs)
        return self._run(site, inputs, call)

    def _run(self, site: CallSite, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Tensor]) -> Tensor:
        """The step itself, once the plan is made."""
        out = call(inputs)
        if self.blend is not None:
            self._look(site)
        return out

    def _shared(self, site: CallSite, inputs: dict[str, Any]) -> dict[str, Any]:
        """The noise of the source for all."""
        assert site.prompts is not None
        sampling, main = site.sampling, inputs[site.main]
        each = sampling.prompt_count * sampling.images_per_prompt
        z = main[:each]
        rows = [n % sampling.images_per_prompt for n in range(each)]
        delta = z[rows] - z
        channels = getattr(getattr(site.module, "config", None), "out_channels", None)
        if isinstance(channels, int) and z.dim() == 4 and channels < z.shape[1]:
            delta = delta[:, :channels]
        if not bool(delta.any()):
            return inputs
        moved = repeated(delta, len(main))
        beside = [(0, m - d) for m, d in zip(main.shape, moved.shape, strict=True)]
        if (self, "shared") not in self.session.notes:  # another one may run the step several times
            self.session.notes[self, "shared"] = True
            sampling.shift(delta / sampling.scale)
        return {**inputs, site.main: main + F.pad(moved, [size for pair in reversed(beside) for size in pair])}

    def _plan(self, site: CallSite, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the prompts say, once for each call of the pipeline."""
        sampling, name = site.sampling, type(self).__name__
        prompts, steps = sampling.prompts, site.steps
        if prompts is None:
            raise ValueError(f"{name} compares prompts, but the pipeline was given embeddings and no prompt")
        if len(prompts) < 2:
            raise ValueError(f"{name} needs the source's prompt and at least one edit of it, got 1 prompt")
        context = inputs.get("encoder_hidden_states")
        if not isinstance(context, Tensor) or context.dim() != 3:
            raise ValueError(
                f"{name} edits the weights of text tokens (B, L, D), but {type(site.module).__name__} is called with "
                f"encoder_hidden_states of type {type(context).__name__}"
            )
        assert steps is not None
        length, longest = context.shape[1], sampling.arguments.get("max_sequence_length")
        tokenizer, _, limit = text_streams(sampling.pipe, longest)[0]
        plan: dict[str, Any] = {"steps": steps, "self": bounds(self.self_maps, steps)}
        source, edits = prompts[0], prompts[1:]
        if self.edit == "replace":
            every = [replacement(tokenizer, source, edit, length, self.compat) for edit in edits]
            plan["matrix"] = torch.stack(every)
        elif self.edit == "refine":
            pairs = [refinement(tokenizer, source, edit, length) for edit in edits]
            plan["index"], plan["found"] = (torch.stack(part) for part in zip(*pairs, strict=True))

        def columns(word: str) -> list[tuple[int, list[int]]]:
            """Of each edit that has a word, its tokens."""
            found = []
            for number, edit in enumerate(edits):
                if holds(edit, word):
                    found.append((number, token_spans(tokenizer, edit, [word], limit)[0]))
            if not found:
                find(edits[-1], word)  # which says that it is not there
            return found

        share = torch.zeros(steps + 1, len(edits), length)
        low, high = bounds(self.cross[None], steps + 1)
        share[low:high] = 1.0
        for word, some in self.cross.items():
            if word is None:
                continue
            low, high = bounds(some, steps + 1)
            for number, span in columns(word):
                share[:, number, span] = 0.0
                share[low:high, number, span] = 1.0
        plan["share"] = share
        if self.weights:
            plan["weights"] = torch.ones(len(edits), length)
            for word, factor in self.weights.items():
                for number, span in columns(word):
                    plan["weights"][number, span] = factor
        for key, words in (("blend", self.blend), ("subtract", self.subtract)):
            if words is not None:
                plan[key] = torch.zeros(len(prompts), length)
                for number, spans in enumerate(spans_of(sampling, words)):
                    for span in spans:
                        plan[key][number, span] = 1.0
        return plan

    # ---- maps

    def _edited(self, site: Site) -> Edited | None:
        """The rows of a call; ``None`` where nothing is to be edited."""
        if site.step is None or site.rows is None or site.prompts is None or (self, "plan") not in self.session.notes:
            return None
        notes, key = self.session.notes, (self, "rows", site.rows, site.prompts)
        if key not in notes:
            notes[key] = Edited.of(site.rows, site.prompts, type(self).__name__)
        found = notes[key]
        return found if found.edits else None

    def _acts(self, site: Site) -> bool:
        """Whether a layer's weights are edited at this step."""
        plan = self.session.notes[self, "plan"]
        if site.kind == "self":
            low, high = plan["self"]
            return low <= site.step < high and site.n_keys <= self.self_resolution**2  # type: ignore[operator]
        return bool(plan["share"][site.step].any()) and self._of_text(site)

    @staticmethod
    def _of_text(site: Site) -> bool:
        return site.k_layout is None or site.k_layout.names == ("text",)

    def edit_rows(self, site: Site) -> Tensor | None:
        if self._edited(site) is None or not self._acts(site):
            return torch.zeros(0, dtype=torch.long, device=None if site.q_pos is None else site.q_pos.device)
        return None

    def on_weights(self, site: Site, weights: Tensor, rows: Tensor) -> Tensor:
        edited = self._edited(site)
        if edited is None or not self._acts(site):
            return weights
        new = list(weights.unbind(0))
        for row, source, prompt in edited.edits:
            if site.kind == "self":
                new[row] = weights[source]
            else:
                new[row] = self.carried(site, weights[source], weights[row], prompt - 1)
        return torch.stack(new)

    def carried(self, site: Site, source: Tensor, own: Tensor, number: int) -> Tensor:
        """Cross-attention (H, r, L) of an edit from the source's and its own."""
        plan = self.session.notes[self, "plan"]
        share = plan["share"][site.step, number].to(own)
        if len(share) != own.shape[-1]:
            raise ValueError(
                f"layer {site.layer} ({site.name}) reads {own.shape[-1]} tokens, the denoiser {len(share)} of text"
            )
        new = source
        if self.edit == "replace":
            new = source @ plan["matrix"][number].to(own)
        elif self.edit == "refine":
            found = plan["found"][number].to(own)
            new = source[..., plan["index"][number].to(own.device)] * found + own * (1 - found)
        if self.weights:
            new = new * plan["weights"][number].to(own)
        return new * share + own * (1 - share)

    # ---- latents

    def _look(self, site: CallSite) -> None:
        """Add this step's maps, and blend the latents after it."""
        assert site.rows is not None and site.prompts is not None and site.step is not None
        notes = self.session.notes
        edited = Edited.of(site.rows, site.prompts, type(self).__name__)
        plan = notes[self, "plan"]
        seen = self.maps.take()[list(edited.index)].float()
        total = self._added(site.step, seen)
        if site.step < int(self.blend_from * plan["steps"]):
            return
        blend = self._of_words(total, plan["blend"], edited)
        minus = self._of_words(total, plan["subtract"], edited) if self.subtract is not None else None

        def keep(stepped: Stepped) -> Tensor:
            x = stepped.after
            size, source = x.shape[-2:], list(edited.source)
            mask = blend_mask(blend, size, self.thresholds[0])
            mask = mask | mask[source]
            if minus is not None:
                away = blend_mask(minus, size, self.thresholds[1], pool=0)
                mask = mask & ~(away | away[source])
            return torch.where(mask[:, None], x, x[source])

        self._amend(site, keep)

    def _added(self, step: int, seen: Tensor) -> Tensor:
        """Maps of this step on top of those of earlier ones; a step that is run again is counted once."""
        notes = self.session.notes
        of, before = notes.get((self, "before"), (None, None))
        if of != step:
            before = notes.get((self, "maps"))
            notes[self, "before"] = step, before
        notes[self, "maps"] = seen if before is None else before + seen
        return notes[self, "maps"]

    def _amend(self, site: CallSite, function: Callable[[Stepped], Tensor]) -> None:
        """What is to become of the latents after this step, as the last run of it says."""
        notes = self.session.notes
        notes[self, "after"] = function
        if notes.get((self, "amended")) != site.step:
            notes[self, "amended"] = site.step
            site.sampling.amend(lambda stepped: notes[self, "after"](stepped))

    @staticmethod
    def _of_words(maps: Tensor, chosen: Tensor, edited: Edited) -> Tensor:
        """(n, h, w) the sum of the maps of the chosen tokens (P, L) of each row's prompt."""
        return torch.einsum("nthw,nt->nhw", maps, chosen[list(edited.prompts)].to(maps))
