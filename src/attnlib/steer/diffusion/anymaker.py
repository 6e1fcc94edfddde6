"""AnyMaker: an object from one image, its identity put into the text and into cross attention, apart from its pose.

Features of several encoders are brought together; two sets of learned queries read them, one for what the object is
(``f_id``), one for how it stands there (``f_non``)::

    F = [W_1 F_1 ; ... ; W_E F_E]
    f_id = Resampler_id(F),  f_non = Resampler_non(F_target)
    c_k <- c_k + W_g mean(f_id)                                    # the class word k of the prompt, globally
    O = A(Q, K_text, V_text) + s A(Q, W_k f, W_v f)                # locally; f = [f_id ; f_non] while training
    L = noise + a L_id + b L_orth

``f_non`` comes from the *target* image and is given in training alone, so that ``f_id`` need not carry the pose; at
inference it is left out. There is no released code and the forms of the losses are not given where we could read them:
all of this is our reading, and what could be otherwise is an argument (``combine``, ``merge``, ``form`` of the identity
loss, numbers of tokens, weights of losses).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_int, check_real, check_tensors, check_type, describe, shaped
from ...hooks.denoiser import CallSite, check_pictures
from .prompts import Word, context_spans, per_prompt
from .references import ReferenceBranches

COMBINE = ("tokens", "channels")
MERGE = ("add", "mlp")
FORMS = ("contrastive", "cosine")


def on_grid(features: Tensor, side: int) -> Tensor:
    """Patch features (n, g g, d) of a square grid on another, (n, side side, d), bilinearly.

    >>> on_grid(torch.ones(1, 4, 3), 3).shape
    torch.Size([1, 9, 3])
    """
    grid = math.isqrt(features.shape[1])
    if grid * grid != features.shape[1]:
        raise ValueError(
            f"features have {features.shape[1]} tokens, which are no square grid; leave class and register tokens out"
        )
    if grid == side:
        return features
    picture = features.transpose(1, 2).unflatten(2, (grid, grid))
    return F.interpolate(picture, (side, side), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)


@shaped(identity="float (B, N, C)", other="float (B, M, C)")
def orthogonality(identity: Tensor, other: Tensor) -> Tensor:
    """Mean squared cosine between tokens of two sets, 0 where each of one is orthogonal to each of the other.

    >>> orthogonality(torch.eye(2)[None, :1], torch.eye(2)[None]).item()
    0.5
    """
    cosines = F.normalize(identity, dim=-1) @ F.normalize(other, dim=-1).transpose(-2, -1)
    return cosines.square().mean()


@shaped(identity="float (B, N, C)", partner="float (B, N, C)")
def identity_loss(identity: Tensor, partner: Tensor, form: str = "contrastive", temperature: float = 0.07) -> Tensor:
    """How far apart two images of the same objects are in what says who they are.

    Args:
        identity: of one image of each of B objects.
        partner: of another image of each.
        form: ``"contrastive"``: each must find its partner among the batch (InfoNCE, both ways); ``"cosine"``: one
            minus the cosine of partners.
        temperature: of the contrastive form.
    """
    check_choice("form", form, FORMS)
    a, b = (F.normalize(t.flatten(1), dim=-1) for t in (identity, partner))
    if form == "cosine":
        return 1 - (a * b).sum(-1).mean()
    check_real("temperature", temperature, above=0)
    if len(a) < 2:
        raise ValueError("the contrastive form needs at least two objects in a batch, got 1; use form='cosine'")
    logits = a @ b.T / temperature
    right = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


class IdentityEncoder(nn.Module):
    """What an object is, and how it stands there, from the features of several image encoders.

    Args:
        widths: of each encoder's features.
        out_dim: width of the tokens, that of the text.
        dim: width inside.
        id_tokens, non_tokens: tokens that say who, and how.
        depth, heads: of both resamplers.
        combine: ``"tokens"`` side by side, or ``"channels"``, on one grid.
        side: of the grid that all features are brought to; that of the first encoder by default where channels are
            combined, and each as it is otherwise.
    """

    def __init__(
        self,
        widths: Sequence[int],
        out_dim: int,
        dim: int = 768,
        id_tokens: int = 16,
        non_tokens: int = 16,
        depth: int = 4,
        heads: int = 12,
        combine: str = "tokens",
        side: int | None = None,
    ):
        super().__init__()
        from diffusers.models.embeddings import IPAdapterPlusImageProjection

        self.widths = tuple(check_int("widths", w, least=1) for w in widths)
        if not self.widths:
            raise ValueError("widths must name at least one encoder")
        check_choice("combine", combine, COMBINE)
        self.combine, self.side = combine, side
        if combine == "tokens":
            self.proj = nn.ModuleList(nn.Linear(width, dim) for width in self.widths)
        else:
            self.proj = nn.ModuleList([nn.Linear(sum(self.widths), dim)])

        def resampler(tokens: int) -> nn.Module:
            return IPAdapterPlusImageProjection(
                embed_dims=dim, output_dims=out_dim, hidden_dims=dim, depth=depth, dim_head=dim // heads, heads=heads,
                num_queries=tokens,
            )  # fmt: skip

        self.identity, self.other = resampler(id_tokens), resampler(non_tokens)

    def combined(self, features: Sequence[Tensor]) -> Tensor:
        """(n, L, dim) of features (n, L_e, d_e) of each encoder."""
        if len(features) != len(self.widths) or any(
            f.dim() != 3 or f.shape[-1] != w for f, w in zip(features, self.widths, strict=False)
        ):
            raise ValueError(
                f"features must be one (n, tokens, width) for each of widths {self.widths}, got "
                f"{[tuple(f.shape) for f in features]}"
            )
        if self.combine == "channels":
            side = math.isqrt(features[0].shape[1]) if self.side is None else self.side
            return self.proj[0](torch.cat([on_grid(f, side) for f in features], -1))
        given = features if self.side is None else [on_grid(f, self.side) for f in features]
        return torch.cat([proj(f) for proj, f in zip(self.proj, given, strict=True)], 1)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """``(f_id, f_non)``, (n, id_tokens, out_dim) and (n, non_tokens, out_dim)."""
        both = self.combined(features)
        return self.identity(both), self.other(both)


class Merge(nn.Module):
    """How an identity goes into the embedding of its class word; as made, it changes nothing.

    Args:
        dim: of the text.
        merge: ``"add"``: a linear map of the identity; ``"mlp"``: two layers on word and identity, beside the word.
    """

    def __init__(self, dim: int, merge: str = "add"):
        super().__init__()
        check_choice("merge", merge, MERGE)
        self.merge = merge
        self.hidden = nn.Linear(2 * dim, dim) if merge == "mlp" else None
        self.out = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, word: Tensor, identity: Tensor) -> Tensor:
        if self.hidden is None:
            return word + self.out(identity)
        return word + self.out(F.gelu(self.hidden(torch.cat([word, identity.expand_as(word)], -1))))


class AnyMaker(ReferenceBranches):
    """Identity of an object in the text and in every cross attention.

    ::

        maker = AnyMaker.of(pipe, IdentityEncoder([1024, 768], out_dim=768))
        maker.refer([dino, mae], words=["dog"])
        with attnlib.attach(pipe, maker):
            pipe("a dog on the beach")

    Args:
        maps, scale, step_range: see :class:`attnlib.steer.ReferenceBranches`; ``scale`` is of the local level.
        project: an :class:`IdentityEncoder`.
        merge: how the identity goes into the class word, see :class:`Merge`.
        strength: of the global level: 0 leaves the text as it is.

    Reference: Kong et al., 2024, arXiv 2406.11643, read without code.
    """

    name: ClassVar[str] = "anymaker"

    def __init__(
        self,
        maps: Mapping[str, nn.Module],
        project: nn.Module | None = None,
        scale: float | Sequence[float] | Mapping[str, Any] = 1.0,
        step_range: Sequence[float] = (0.0, 1.0),
        merge: str = "add",
        strength: float = 1.0,
    ):
        check_type("project", project, IdentityEncoder)
        super().__init__(maps, project, scale, step_range)
        first: Any = next(iter(maps.values()))
        self.merge = Merge(first.to_k_ip.in_features, merge).to(first.to_k_ip.weight)
        self.strength = check_real("strength", strength, least=0)

    @property
    def identity(self) -> bool:
        return super().identity and not self.strength

    def trained(self) -> list[nn.Parameter]:
        """The maps of all layers, the merging and the encoder of the identity."""
        assert self.project is not None
        return [*self.maps.parameters(), *self.merge.parameters(), *self.project.parameters()]

    def refer(  # type: ignore[override]
        self, features: Sequence[Tensor], words: Sequence[Any], targets: Sequence[Tensor] | None = None
    ) -> Any:
        """Say what the objects are, and which words of the prompt they are.

        Args:
            features: of each encoder (P or 1, R, L_e, d_e), the objects alone, cut out by their masks.
            words: R class words of the prompt (or numbers of their tokens), or for each prompt R.
            targets: the same of the images that are to be predicted, in training alone.

        Returns:
            itself.
        """

        def read(name: str, given: Any) -> list[Tensor]:
            found = check_tensors(name, given, least=1)
            if any(f.dim() != 4 or f.shape[:2] != found[0].shape[:2] or not all(f.shape[:2]) for f in found):
                raise ValueError(
                    f"{name} must be (prompts or 1, objects, tokens, width) of each encoder, got "
                    f"{[tuple(f.shape) for f in found]}"
                )
            return found

        self._features = read("features", features)
        self._targets = None if targets is None else read("targets", targets)
        first = self._features[0]
        if self._targets is not None and self._targets[0].shape[:2] != first.shape[:2]:
            raise ValueError(f"targets are {describe(self._targets[0])}, features {describe(first)}; one of each")
        self._words = words
        # What counts prompts and objects; the tokens are made of the features.
        self._images = first
        self._empty = first
        self._kept.clear()
        return self

    def encoded(self) -> tuple[Tensor, Tensor | None]:
        """``f_id`` (P, R, N, C) of the objects, and ``f_non`` of the targets, where there are any."""
        if self._images is None:
            raise RuntimeError("AnyMaker has no objects; say what they are with refer(features, words)")
        encoder: Any = self.project
        like = next(encoder.parameters())

        def made(given: list[Tensor], which: int) -> Tensor:
            out: Tensor = encoder([f.flatten(0, 1).to(like) for f in given])[which]
            return out.unflatten(0, given[0].shape[:2])

        return made(self._features, 0), None if self._targets is None else made(self._targets, 1)

    def tokens(self) -> tuple[Tensor, Tensor]:
        def made() -> tuple[Tensor, Tensor]:
            identity, other = self.encoded()
            both = identity if other is None else torch.cat([identity, other], 2)
            return both, torch.zeros_like(both[:1])

        found: tuple[Tensor, Tensor] = self._remembered("tokens", [self.project], made)
        return found

    def losses(
        self, partner: Sequence[Tensor] | None = None, form: str = "contrastive", temperature: float = 0.07
    ) -> dict[str, Tensor]:
        """``{"identity", "orthogonality"}``: what is added to the error of the noise, each with a weight.

        Args:
            partner: features of other images of the same objects; the targets by default.
            form, temperature: see :func:`identity_loss`.
        """
        identity, other = self.encoded()
        given = self._targets if partner is None else list(partner)
        if given is None or other is None:
            raise ValueError("losses need the targets: refer(features, words, targets=...)")
        encoder: Any = self.project
        found = encoder([f.flatten(0, 1).to(identity) for f in given])[0]
        flat = identity.flatten(0, 1)
        return {
            "identity": identity_loss(flat, found, form, temperature),
            "orthogonality": orthogonality(flat, other.flatten(0, 1)),
        }

    # ---- the text

    def around_denoiser(
        self, site: CallSite, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Tensor]
    ) -> Tensor:
        if not self.strength:
            return call(inputs)
        check_pictures(site, inputs, self)
        context = inputs.get("encoder_hidden_states")
        if not isinstance(context, Tensor) or context.dim() != 3:
            raise ValueError(
                f"AnyMaker changes the text embeddings (B, L, D) that {type(site.module).__name__} is called with as "
                f"encoder_hidden_states, got {describe(context)}"
            )
        identity = self.tokens()[0][:, :, : self._id_tokens].mean(2)  # (P, R, C)
        if identity.shape[-1] != context.shape[-1]:
            raise ValueError(
                f"identities have width {identity.shape[-1]}, the text {context.shape[-1]}; give "
                f"IdentityEncoder(..., out_dim={context.shape[-1]})"
            )
        batch = len(context)
        prompts = site.prompts or (tuple(range(batch)) if len(identity) == batch else (0,) * batch)
        rows = site.rows or ("cond",) * batch
        spans = self._spans(site, max(prompts) + 1)
        merged = []
        for row, (name, number) in enumerate(zip(rows, prompts, strict=True)):
            text = context[row]
            if name != "uncond":
                who = identity[number if len(identity) > 1 else 0]
                for span, one in zip(spans[number], who, strict=True):
                    at = torch.tensor(span, device=text.device)
                    words = text.index_select(0, at)
                    like = self.merge.out.weight
                    new = self.merge(words.to(like), one.to(like).unsqueeze(0)).to(words)
                    text = text.index_copy(0, at, words + self.strength * (new - words))
            merged.append(text)
        return call({**inputs, "encoder_hidden_states": torch.stack(merged)})

    @property
    def _id_tokens(self) -> int:
        encoder: Any = self.project
        return int(encoder.identity.latents.shape[1])

    def _spans(self, site: CallSite, prompts: int) -> list[list[list[int]]]:
        """Tokens of the word of each object, by prompt."""
        words: Sequence[Word]
        found = []
        sampling = site.sampling
        for number, words in enumerate(per_prompt(self._words, prompts)):
            if len(words) != self.references:
                raise ValueError(f"words must name one for each of the {self.references} objects, got {words!r}")
            texts = None if sampling is None else sampling.prompts
            if sampling is None and any(isinstance(word, str) for word in words):
                raise ValueError(
                    "words are found in the prompt of a pipeline; attach to the pipeline, or give the numbers of "
                    "their tokens"
                )
            found.append(context_spans(None if sampling is None else sampling.pipe, texts and texts[number], words))
        return found
