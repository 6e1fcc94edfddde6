"""CustomContrast: a subject's tokens are told apart by contrast, in what they mean and in how they look.

An encoder with learned queries reads features of a subject's image, and gives one semantic token ``e_l`` for each
cross-attention layer l of a U-Net, which stands in the prompt in place of the subject's word, and appearance tokens
``f_s`` for each scale s, which are read in a branch of their own:

    ``O_l = A(q, K(c with e_l), V(c with e_l)) + lambda A(q, W_k f_s(l), W_v f_s(l))``.

Both are trained on several views of several subjects, beside the error of the noise, with

    ``InfoNCE(z, z+) = -log exp(cos(z, z+) / t) / (exp(cos(z, z+) / t) + sum_z- exp(cos(z, z-) / t))``,

on the semantic tokens (other views of the subject, and the text of its class, against other subjects) and on what keys
and values make of the appearance tokens (other views against other subjects), scale by scale.

No code is released, and module shapes and losses are known second-hand only: this is our reading. The guidance by place
and time step that the paper has against redundant features is not in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_int, check_real, check_type, shaped
from ...hooks.denoiser import CallSite
from ...hooks.intervention import Intervention
from ...hooks.pipelines import denoiser_of, is_pipeline
from ...hooks.site import Site
from ...nn.multimodal.perceiver_resampler import PerceiverResampler
from .personalize import Example, Seen, Term
from .prompts import context_spans, per_prompt
from .references import ReferenceBranches, attentions_of


@shaped(anchors="float (N, D)", others="float (M, D)", same="bool (N, M)", apart="bool (N, M)")
def info_nce(anchors: Tensor, others: Tensor, same: Tensor, apart: Tensor, temperature: float = 0.07) -> Tensor:
    """The mean of InfoNCE over all positive pairs, in float32; 0 where there is none.

    Args:
        anchors: z.
        others: candidates.
        same: which of them are positives of an anchor.
        apart: which are its negatives; the rest do not count.
        temperature: t.

    >>> z, same = torch.ones(1, 2), torch.tensor([[True, False, False]])
    >>> round(info_nce(z, torch.ones(3, 2), same, ~same).exp().item(), 4)  # one of 1 + 2 equal ones
    3.0
    """
    check_real("temperature", temperature, above=0)
    if bool((same & apart).any()):
        raise ValueError("same and apart share a pair")
    high = torch.promote_types(anchors.dtype, torch.float32)
    a, b = F.normalize(anchors.to(high), dim=1), F.normalize(others.to(high), dim=1)
    scores = a @ b.T / temperature
    against = scores.masked_fill(~apart, -torch.inf).logsumexp(1, keepdim=True)
    each = torch.logaddexp(scores, against) - scores
    count = same.sum()
    return each.masked_fill(~same, 0).sum() / count.clamp(min=1)


@shaped(features="float (N, D)", subjects="whole (N)", text="float (N, D)")
def contrast(features: Tensor, subjects: Tensor, text: Tensor | None = None, temperature: float = 0.07) -> Tensor:
    """InfoNCE of views: other views of the same subject are positives, other subjects negatives, itself neither.

    Args:
        features: of each view.
        subjects: number of each view's subject.
        text: of each view's class; one more positive.
        temperature: see :func:`info_nce`.
    """
    equal = subjects[:, None] == subjects[None]
    itself = torch.eye(len(subjects), dtype=torch.bool, device=features.device)
    same, apart, others = equal & ~itself, ~equal, features
    if text is not None:
        same = torch.cat([same, itself], 1)
        apart = torch.cat([apart, torch.zeros_like(itself)], 1)
        others = torch.cat([features, text.to(features)])
    return info_nce(features, others, same, apart, temperature)


class SubjectEncoder(nn.Module):
    """Semantic tokens for each layer, and appearance tokens for each scale, of features of an image.

    Args:
        dim: width of the features, (n, N, dim), such as the last hidden states of an image tower.
        text_dim: width of the text that the U-Net reads.
        layers: of cross-attention.
        scales: resolutions of the U-Net that have any.
        tokens: of appearance, for each scale.
        depth, num_heads, head_dim: of both resamplers.

    :meth:`forward` gives appearance, (n, scales * tokens, text_dim), :meth:`semantic` the others.

    >>> encoder = SubjectEncoder(8, 6, layers=3, scales=2, tokens=4, depth=1, num_heads=2, head_dim=4)
    >>> features = torch.randn(5, 9, 8)
    >>> encoder(features).shape, encoder.semantic(features).shape
    (torch.Size([5, 8, 6]), torch.Size([5, 3, 6]))
    """

    def __init__(
        self,
        dim: int,
        text_dim: int,
        layers: int,
        scales: int,
        tokens: int = 4,
        depth: int = 2,
        num_heads: int = 8,
        head_dim: int = 64,
    ):
        super().__init__()
        self.scales, self.tokens = check_int("scales", scales, least=1), check_int("tokens", tokens, least=1)
        shape: dict[str, Any] = {"out_dim": text_dim, "depth": depth, "num_heads": num_heads, "head_dim": head_dim}
        self.meaning = PerceiverResampler(dim, num_latents=check_int("layers", layers, least=1), **shape)
        self.look = PerceiverResampler(dim, num_latents=scales * tokens, **shape)
        self.read = nn.Linear(text_dim, dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.look(features)

    def semantic(self, features: Tensor, text: Tensor | None = None) -> Tensor:
        """(n, layers, text_dim), with text (n, T, text_dim) of the subject, such as its class, read beside."""
        if text is not None:
            features = torch.cat([features, self.read(text.to(features))], 1)
        return self.meaning(features)


class CustomContrast(ReferenceBranches):
    """Subjects in a prompt, by semantic tokens for each layer and appearance in branches.

    ::

        custom = CustomContrast.of(pipe, features=1024, words=["dog"])
        custom.refer(features)                    # (prompts or 1, references, N, 1024)
        with attnlib.attach(pipe, custom):
            pipe("a photo of a dog")

    Args:
        maps, project, scale, step_range: see :class:`attnlib.steer.ReferenceBranches`; ``project`` is a
            :class:`SubjectEncoder`, ``scale`` lambda.
        levels: the scale that each layer reads, by the name of the layer.
        words: of each reference, a word of the prompt, or numbers of its tokens; lists of these where prompts differ.
            All tokens of a word become the semantic one.
        strength: how far they do, 0 to 1; 0 leaves the prompt.

    Rows under guidance keep their text, and read the appearance of the empty reference. ``scale`` and ``strength`` 0
    leave the model as it is.

    Reference: Chen et al., 2024, arXiv 2409.05606; no code is released, see the module.
    """

    name: ClassVar[str] = "customcontrast"

    def __init__(
        self,
        maps: Mapping[str, nn.Module],
        project: nn.Module | None = None,
        scale: float | Sequence[float] | Mapping[str, Any] = 1.0,
        step_range: Sequence[float] = (0.0, 1.0),
        levels: Mapping[str, int] | None = None,
        words: Sequence[Any] = (),
        strength: float = 1.0,
    ):
        super().__init__(maps, project, scale, step_range)
        check_type("project", project, SubjectEncoder)
        if isinstance(words, str):
            raise TypeError(f"words must name the word of each reference: [{words!r}], got {words!r}")
        self.words = list(words)
        self.strength = check_real("strength", strength, least=0, most=1)
        self.levels = {name: 0 for name in maps} if levels is None else dict(levels)
        self._text: Tensor | None = None
        #: Semantic tokens and those of appearance that the run of the denoiser reads: made once, before it.
        self._run: tuple[Tensor, tuple[Tensor, Tensor]] | None = None
        self._length = 0  # of the text that this run reads

    @classmethod
    def of(
        cls,
        model: Any,
        project: nn.Module | None = None,
        width: int | None = None,
        *,
        features: int | None = None,
        tokens: int = 4,
        encoder: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> Any:
        """For all cross-attention of a U-Net (or of a pipeline's).

        Args:
            model: the U-Net, or a pipeline.
            project: a :class:`SubjectEncoder` that there is already.
            width: of its tokens; that of the text by default.
            features: without one, the width of the references' features that a new one reads.
            tokens: of appearance, for each scale.
            encoder: further settings of the new one.
            settings: of the class.
        """
        if is_pipeline(model):
            model = denoiser_of(model)[0]
        names = [name for name, module in attentions_of(model) if getattr(module, "is_cross_attention", False)]
        if not names:
            raise ValueError(f"{type(model).__name__} has no cross attention that a reference could stand beside")
        depths = {name: _depth(model, name) for name in names}
        order = sorted(set(depths.values()))
        if project is None:
            if features is None:
                raise ValueError("give features, the width of what a new encoder reads, or an encoder as project")
            like = next(model.parameters())
            wide = model.get_submodule(names[0]).to_k.in_features
            made = SubjectEncoder(features, wide, len(names), len(order), tokens, **(encoder or {}))
            project = made.to(like.device, like.dtype)
        levels = {name: order.index(depth) for name, depth in depths.items()}
        return super().of(model, project=project, width=width, levels=levels, **settings)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_run": None}

    @property
    def encoder(self) -> SubjectEncoder:
        assert isinstance(self.project, SubjectEncoder)
        return self.project

    @property
    def identity(self) -> bool:
        return super().identity and not (self.strength and self.words)

    def trained(self) -> list[nn.Parameter]:
        """What is trained: the maps of all layers and the encoder."""
        return list(self.parameters())

    def refer(self, images: Any, empty: Tensor | None = None, text: Tensor | None = None) -> Any:
        """Say what the references are; this stands until it is said anew.

        Args:
            images: features (P or 1, R, N, dim) of R references of each prompt.
            empty: see :meth:`attnlib.steer.ReferenceBranches.refer`.
            text: (P or 1, R, T, text_dim) read by the encoder besides, such as the class of each.
        """
        super().refer(images, empty)
        if isinstance(images, (list, tuple)):
            raise ValueError("images must be a tensor (prompts or 1, references, N, dim); give one image per reference")
        if text is not None and (text.dim() != 4 or text.shape[:2] != images.shape[:2]):
            raise ValueError(
                f"text must be (prompts or 1, references, T, width) as images {tuple(images.shape[:2])}, got "
                f"{tuple(text.shape)}"
            )
        self._text, self._run = text, None
        return self

    def around_denoiser(
        self, site: CallSite, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Tensor]
    ) -> Tensor:
        text = inputs.get("encoder_hidden_states")
        self._length = text.shape[1] if isinstance(text, Tensor) else 0
        self._run = self.semantic(), super().tokens()
        width = self._run[0].shape[-1]
        if self.words and isinstance(text, Tensor) and text.shape[-1] != width:
            raise ValueError(
                f"CustomContrast has semantic tokens of width {width}, and {type(site.module).__name__} reads text of "
                f"width {text.shape[-1]}; make it for this model: CustomContrast.of(pipe, ...)"
            )
        return call(inputs)

    def tokens(self) -> tuple[Tensor, Tensor]:
        return super().tokens() if self._run is None else self._run[1]

    # ---- appearance: each layer reads the tokens of its scale

    def keys_values(self, site: Site, batch: int) -> tuple[Tensor, Tensor]:
        level, tokens = self._at(self.levels, site), self.encoder.tokens
        k, v = super().keys_values(site, batch)
        some = slice(level * tokens, (level + 1) * tokens)
        return k[..., some, :], v[..., some, :]

    def _at(self, of: Mapping[str, int], site: Site) -> int:
        for name, value in of.items():
            if site.name == name or site.name.endswith("." + name):
                return value
        raise ValueError(f"layer {site.layer} ({site.name}) is none of those that {type(self).__name__} was made for")

    def appearance(self) -> list[Tensor]:
        """What keys and values make of the references' tokens, the mean over tokens and layers of each scale: of each
        scale (P R, D), D being wider where layers of a scale are."""
        tokens = super().tokens()[0].flatten(0, 1).unflatten(1, (self.encoder.scales, self.encoder.tokens))
        found: list[list[Tensor]] = [[] for _ in range(self.encoder.scales)]
        for name, maps in zip(self.names, self.maps, strict=True):
            own: Any = maps
            level = self.levels[name]
            some = tokens[:, level].to(own.to_k_ip.weight).mean(1)
            found[level].append(torch.cat([own.to_k_ip(some), own.to_v_ip(some)], 1))
        return [torch.stack([F.normalize(one.float(), dim=1) for one in some], 1).flatten(1) for some in found]

    # ---- meaning: a token for each layer in the prompt

    def semantic(self) -> Tensor:
        """(P, R, layers, text_dim) of the references."""
        if self._images is None:
            raise RuntimeError(f"{type(self).__name__} has no references; say what they are with refer(images)")
        given, text = self._images, self._text

        def made() -> Tensor:
            like = next(self.encoder.parameters())
            flat = given.flatten(0, 1).to(like.device, like.dtype)
            return self.encoder.semantic(flat, None if text is None else text.flatten(0, 1)).unflatten(
                0, given.shape[:2]
            )

        found: Tensor = self._remembered("semantic", [self.encoder], made)
        return found

    def _spans(self, site: Site, prompts: int) -> list[list[list[int]]]:
        """The tokens of each word, of each prompt."""
        session: Any = self.session
        sampling = session.sampling
        if sampling is None:
            words = per_prompt(self.words, prompts)
            if any(isinstance(word, str) for some in words for word in some):
                raise ValueError(
                    "words cannot be found in prompts that are not known; attach to the pipeline, or give the numbers "
                    "of their tokens"
                )
            return [[list(word) for word in some] for some in words]  # type: ignore[arg-type]
        found = session.notes.get((self, "spans"))
        if found is None:
            words = per_prompt(self.words, sampling.prompt_count)
            texts = sampling.prompts
            longest = sampling.arguments.get("max_sequence_length")
            found = session.notes[self, "spans"] = [
                context_spans(sampling.pipe, None if texts is None else texts[p], some, longest)
                for p, some in enumerate(words)
            ]
        return found

    def on_context(self, site: Site, k_source: Tensor, v_source: Tensor) -> tuple[Tensor, Tensor]:
        session: Any = self.session
        if not self.words or not self.strength or not self.acts(site):
            return k_source, v_source
        if (session.sampling is not None and site.prompts is None) or k_source.shape[1] != self._length:
            return k_source, v_source  # other texts than the prompts', which another technique reads
        tokens = self.semantic() if self._run is None else self._run[0]
        layer = self._at({name: number for number, name in enumerate(self.names)}, site)
        batch, prompts = len(k_source), len(tokens)
        numbers = self.row_numbers(site, batch, prompts, 1)
        of_row = site.prompts or tuple(range(batch))
        spans = self._spans(site, max(of_row) + 1)
        rows, at, own = [], [], []
        for row, (number, prompt) in enumerate(zip(numbers, of_row, strict=True)):
            if number >= prompts:  # under guidance
                continue
            if len(spans[prompt]) != tokens.shape[1]:
                raise ValueError(
                    f"words names {len(spans[prompt])} references, but {tokens.shape[1]} were given to refer(...)"
                )
            for r, span in enumerate(spans[prompt]):
                if max(span) >= self._length:
                    raise ValueError(f"words names token {max(span)}, but the text has {self._length} tokens")
                for token in span:
                    rows.append(row)
                    at.append(token)
                    own.append(tokens[number, r, layer])
        if not own:
            return k_source, v_source
        new = torch.stack(own).to(k_source)
        if self.strength < 1:
            new = torch.lerp(k_source[rows, at], new, self.strength)
        out = k_source.index_put((torch.tensor(rows, device=new.device), torch.tensor(at, device=new.device)), new)
        if v_source is k_source:
            return out, out
        where = (torch.tensor(rows, device=new.device), torch.tensor(at, device=new.device))
        return out, v_source.index_put(where, new.to(v_source))


class MultilevelContrast(Term):
    """The terms of CustomContrast: what trains the injection, and both contrasts.

    ::

        custom = CustomContrast.of(pipe, features=1024, words=[[5]])
        term = MultilevelContrast(custom, describe)
        learner = Personalize(pipe, train="none", terms=[term])
        learner.fit(views, steps=...)            # a batch: several views of several subjects

    Args:
        custom: the injection; all of it is trained.
        describe: from the examples of a batch to ``{"features": (B, N, dim), "subjects": (B,)}`` and, if there is any,
            ``"text": (B, T, text_dim)`` of classes.
        semantic, appearance: what both levels count, a and b.
        scales: what each scale of appearance counts; 1 by default.
        temperature: see :func:`info_nce`.
        weight: what both count together.

    Negatives are those of the batch alone.
    """

    name: ClassVar[str] = "contrast"

    def __init__(
        self,
        custom: CustomContrast,
        describe: Callable[[Sequence[Example]], Mapping[str, Tensor]],
        semantic: float = 1.0,
        appearance: float = 1.0,
        scales: Sequence[float] | None = None,
        temperature: float = 0.07,
        weight: float = 0.1,
    ):
        check_type("custom", custom, CustomContrast)
        if not callable(describe):
            raise TypeError(f"describe must be a function from examples to features and subjects, got {describe!r:.60}")
        count = custom.encoder.scales
        if scales is not None and len(scales) != count:
            raise ValueError(f"scales must give a weight to each of {count} scales, got {len(scales)}")
        self.custom, self.describe = custom, describe
        self.semantic, self.appearance = check_real("semantic", semantic), check_real("appearance", appearance)
        self.scales = [1.0] * count if scales is None else [check_real("scales", s, least=0) for s in scales]
        self.temperature = check_real("temperature", temperature, above=0)
        self.weight = check_real("weight", weight)
        self._said: Mapping[str, Tensor] = {}

    def parameters(self) -> Mapping[str, nn.Parameter]:
        return dict(self.custom.named_parameters())

    def interventions(self) -> Sequence[Intervention]:
        return [self.custom]

    def context(self, embeds: Tensor, seen: Seen) -> Tensor:
        if any(e.prior for e in seen.examples):
            raise ValueError("MultilevelContrast needs a subject in every example of a batch; leave priors out")
        said = self._said = self.describe(seen.examples)
        features, subjects, text = said["features"], said["subjects"], said.get("text")
        if len(features) != len(seen.examples) or len(subjects) != len(seen.examples):
            raise ValueError(
                f"describe must give features and subjects of {len(seen.examples)} examples, got {len(features)} and "
                f"{len(subjects)}"
            )
        self.custom.refer(features[:, None], text=None if text is None else text[:, None])
        return embeds

    def levels(self) -> dict[str, Tensor]:
        """Both contrasts of the references as they are."""
        subjects, text = self._said["subjects"], self._said.get("text")
        meaning = self.custom.semantic()[:, 0]
        subjects = subjects.to(meaning.device)
        classes = None if text is None else text.mean(1)
        semantic = torch.stack(
            [contrast(meaning[:, layer], subjects, classes, self.temperature) for layer in range(meaning.shape[1])]
        ).mean()
        looks = self.custom.appearance()
        each = [contrast(look, subjects, None, self.temperature) for look in looks]
        appearance = torch.stack([w * one for w, one in zip(self.scales, each, strict=True)]).sum()
        return {"semantic": semantic, "appearance": appearance}

    def __call__(self, seen: Seen) -> Tensor:
        found = self.levels()
        return self.semantic * found["semantic"] + self.appearance * found["appearance"]


def _depth(model: Any, name: str) -> int:
    """How often the picture was halved where a layer of a U-Net is."""
    last = len(model.down_blocks) - 1
    if found := re.match(r"(down|up)_blocks\.(\d+)\.", name):
        return int(found[2]) if found[1] == "down" else last - int(found[2])
    return last
