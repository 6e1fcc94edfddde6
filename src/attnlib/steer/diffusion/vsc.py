"""VSC: what a phrase looks like by itself is fused into its tokens, so that attributes stay with their objects.

For pairs ``s_1 .. s_M`` of attribute and object in a prompt, images ``I_m`` are drawn of each alone, and

    ``v_m = mean_n E(I_mn),    c'_j = c_j + MLP([c_j ; W v_m])`` for the tokens j of pair m,

E an image encoder. While the model is trained (:class:`attnlib.steer.Personalize`), the map ``A_m`` of a pair's tokens
is to cover the segmentation ``G_m`` of its object, attribute tokens included:

    ``mean_m (mean_outside A_m - mean_inside A_m)``    or    ``mean_m BCE(A_m, G_m)``.

There is no released code, and the text leaves open how prototypes are fused, which of both losses is meant and what is
trained: all of it is our reading. The last layer of the fusion starts at zero: an untrained one changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_axes, check_choice, check_flag, check_int, check_real, check_type, checked, shaped
from .maps import normalize, of_spans
from .personalize import Seen, Term
from .prompts import context_spans, encoder_of, noun_phrases

FORMS = ("mlp", "gate")
LOSSES = ("contrast", "bce")


@shaped(maps="float (M, h, w)", regions="tensor (M, h, w)")
def localization(maps: Tensor, regions: Tensor, how: str = "contrast") -> Tensor:
    """How badly maps in [0, 1] cover regions, the mean over M.

    Args:
        maps: of each pair.
        regions: boolean, or 0 to 1.
        how: ``"contrast"``, the mean outside less the mean inside, -1 to 1; ``"bce"``, cross-entropy of each place,
            from 0.

    Raises:
        ValueError: an empty region.

    >>> region = torch.eye(2)[None]
    >>> localization(region, region).item(), localization(1 - region, region).item()
    (-1.0, 1.0)
    """
    check_choice("how", how, LOSSES)
    regions = regions.to(maps)
    size = regions.sum((-2, -1))
    if bool((size <= 0).any()):
        raise ValueError("regions holds an empty one; a pair needs a place")
    if how == "bce":
        return F.binary_cross_entropy(maps.clamp(0, 1), regions)
    inside = (maps * regions).sum((-2, -1)) / size
    rest = (1 - regions).sum((-2, -1))
    outside = (maps * (1 - regions)).sum((-2, -1)) / rest.clamp(min=1e-12)
    return (outside - inside).mean()


@checked
class PrototypeFusion(nn.Module):
    """Visual prototypes into the tokens of their phrases.

    Args:
        text_dim: width of text embeddings, of both encoders together for SDXL.
        image_dim: width of prototypes.
        hidden: of the MLP; ``text_dim`` by default.
        form: ``"mlp"``: ``c + MLP([c ; W v])``; ``"gate"``: ``c + tanh(g) W v``, with one g.

    Both change nothing until they are trained.

    >>> fusion, text = PrototypeFusion(4, 3), torch.randn(1, 5, 4)
    >>> torch.equal(fusion(text, [torch.randn(2, 3)], [[[1, 2], [4]]]), text)
    True
    """

    def __init__(self, text_dim: int, image_dim: int, hidden: int | None = None, form: str = "mlp"):
        super().__init__()
        check_choice("form", form, FORMS)
        self.form = form
        self.project = nn.Linear(check_int("image_dim", image_dim, least=1), check_int("text_dim", text_dim, least=1))
        if form == "mlp":
            inner = text_dim if hidden is None else check_int("hidden", hidden, least=1)
            last = nn.Linear(inner, text_dim)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.mlp = nn.Sequential(nn.Linear(2 * text_dim, inner), nn.GELU(), last)
        else:
            self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, embeds: Tensor, prototypes: Sequence[Tensor], spans: Sequence[Sequence[Sequence[int]]]) -> Tensor:
        """Embeddings (B, T, D) with prototypes (M_b, E) of row b in the tokens ``spans[b][m]``; others keep their bits.

        Raises:
            ValueError: other counts, a token that two pairs share, or one that is not there.
        """
        check_axes("embeds", embeds, B=None, T=None, D=self.project.out_features)
        batch, tokens, _ = embeds.shape
        if not len(prototypes) == len(spans) == batch:
            raise ValueError(f"prototypes and spans must be of {batch} rows, got {len(prototypes)} and {len(spans)}")
        rows, at, own = [], [], []
        for row, (some, places) in enumerate(zip(prototypes, spans, strict=True)):
            if len(some) != len(places):
                raise ValueError(f"row {row} has {len(some)} prototypes and {len(places)} spans")
            if places:
                check_axes(f"prototypes[{row}]", some, M=len(places), E=self.project.in_features)
            flat = [token for span in places for token in span]
            if len(set(flat)) < len(flat):
                raise ValueError(f"spans of row {row} share a token: {[list(span) for span in places]}")
            if flat and not 0 <= min(flat) <= max(flat) < tokens:
                raise ValueError(f"spans of row {row} name tokens beyond 0 to {tokens - 1}: {flat}")
            for prototype, span in zip(some, places, strict=True):
                for token in span:
                    rows.append(row)
                    at.append(token)
                    own.append(prototype)
        if not own:
            return embeds
        weight = self.project.weight
        picked = embeds[rows, at].to(weight.dtype)
        seen = self.project(torch.stack(own).to(weight))
        change = self.mlp(torch.cat([picked, seen], -1)) if self.form == "mlp" else self.gate.tanh() * seen
        out = embeds.clone()
        out[rows, at] = (picked + change).to(embeds.dtype)
        return out


@checked
def clip_embedding(model: Any, size: int | None = None) -> Callable[[Tensor], Tensor]:
    """A function from images (N, 3, H, W) in [0, 1] to embeddings (N, E) of a ``CLIPModel`` or
    ``CLIPVisionModelWithProjection``.

    Args:
        model: of transformers.
        size: side to which images are resized; that of its configuration by default.
    """
    check_type("model", model, nn.Module)
    config = getattr(model.config, "vision_config", model.config)
    side = config.image_size if size is None else check_int("size", size, least=1)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)

    @torch.no_grad()
    def embed(images: Tensor) -> Tensor:
        weight = next(model.parameters())
        if images.shape[-2:] != (side, side):
            images = F.interpolate(images, (side, side), mode="bicubic", antialias=True, align_corners=False)
        pixels = ((images.clamp(0, 1) - mean.to(images)) / std.to(images)).to(weight)
        found = model.get_image_features(pixels) if hasattr(model, "get_image_features") else model(pixels)
        if not isinstance(found, Tensor):
            projected = getattr(found, "image_embeds", None)
            found = found.pooler_output if projected is None else projected
        return found.float()

    return embed


@checked
class Prototypes:
    """What phrases look like to a pipeline: mean embeddings of images that it draws of each alone, drawn once.

    Args:
        pipe: the pipeline; ``None`` where all prototypes are given.
        embed: from images (N, 3, H, W) in [0, 1] to (N, E), see :func:`clip_embedding`.
        count: images of each phrase.
        seed: of the first image; each has its own.
        unit: embeddings are divided by their norm first.
        template: of the prompt that a phrase is drawn with.
        known: prototypes that there are already, by phrase; ``self.known`` to keep them all.
        call: further arguments of the pipeline.
    """

    def __init__(
        self,
        pipe: Any,
        embed: Callable[[Tensor], Tensor] | None = None,
        count: int = 4,
        seed: int = 0,
        unit: bool = True,
        template: str = "{}",
        known: Mapping[str, Tensor] | None = None,
        **call: Any,
    ):
        if (pipe is None) != (embed is None):
            raise ValueError("give both a pipeline and embed, or neither and known prototypes")
        if "{}" not in template:
            raise ValueError(f"template must hold {{}}, where the phrase goes, got {template!r}")
        self.pipe, self.embed, self.call = pipe, embed, call
        self.count = check_int("count", count, least=1)
        self.seed, self.unit, self.template = check_int("seed", seed, least=0), check_flag("unit", unit), template
        self.known = dict(known or {})

    def of(self, phrases: Sequence[str]) -> Tensor:
        """(M, E) of phrases; those that are new are drawn."""
        for phrase in phrases:
            if phrase not in self.known:
                self.known[phrase] = self._draw(phrase)
        return torch.stack([self.known[phrase] for phrase in phrases])

    def _draw(self, phrase: str) -> Tensor:
        if self.pipe is None or self.embed is None:
            raise ValueError(
                f"there is no prototype of {phrase!r} and no pipeline to draw it; known: {list(self.known)}"
            )
        found = []
        for number in range(self.count):
            given = {"generator": torch.Generator().manual_seed(self.seed + number), "output_type": "pt", **self.call}
            images = self.pipe(prompt=self.template.format(phrase), **given).images
            one = self.embed(images.float())
            found.append(F.normalize(one, dim=-1) if self.unit else one)
        return torch.cat(found).mean(0).detach().cpu()


@checked
def fused_prompt(
    pipe: Any,
    prompt: str,
    fusion: PrototypeFusion,
    prototypes: Prototypes,
    phrases: Sequence[str] | None = None,
    parser: Callable[[str], Any] | None = None,
    negative_prompt: str | None = None,
) -> dict[str, Tensor]:
    """Arguments of a pipeline that draw a prompt with its prototypes: ``pipe(**fused_prompt(...))``.

    Args:
        pipe: of Stable Diffusion or SDXL.
        prompt: the text.
        fusion, prototypes: see there.
        phrases: pairs of attribute and object in the prompt, such as ``["red circle", "blue square"]``; none leaves
            the prompt's own embeddings.
        parser: in their place a function from a prompt to its phrases, or a spaCy pipeline.
        negative_prompt: it is left as it is.
    """
    if (phrases is None) == (parser is None):
        raise ValueError("give either phrases of the prompt, or a parser that finds them")
    encode = encoder_of(pipe)
    some = noun_phrases(prompt, parser) if phrases is None else list(phrases)
    given = {
        "prompt": prompt,
        "device": pipe.unet.device,
        "num_images_per_prompt": 1,
        "negative_prompt": negative_prompt,
    }
    with torch.no_grad():
        found = encode(**given, do_classifier_free_guidance=True)
        embeds, negative = found[:2]
        if some:
            spans = context_spans(pipe, prompt, some)
            embeds = fusion(embeds, [prototypes.of(some)], [spans])
    arguments = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    if len(found) > 2:
        arguments |= {"pooled_prompt_embeds": found[2], "negative_pooled_prompt_embeds": found[3]}
    return arguments


class VSC(Term):
    """The terms of VSC: prototypes in the prompts of examples, and maps that cover regions.

    ::

        fusion = PrototypeFusion(pipe.text_encoder.config.hidden_size, 512)
        term = VSC(fusion, Prototypes(pipe, clip_embedding(clip)))
        with Personalize(pipe, train="kv", terms=[term]) as learner:
            learner.fit([Example(image, "a red circle", regions={"red circle": mask}), ...], steps=1000)
            learner.merge()
        pipe(**fused_prompt(pipe, "a red circle and a blue square", fusion, term.prototypes, phrases=[...]))

    ``Example.regions`` says where each pair of attribute and object is; examples without any, priors among them, are
    read as they are.

    Args:
        fusion: what is trained, beside what :class:`attnlib.steer.Personalize` trains.
        prototypes: of the phrases; those of a whole training are best drawn before it.
        loss: see :func:`localization`.
        weight: what the term counts.
        scale: ``"max"`` divides each map by its largest value first; ``None`` takes weights as they are.
        resolution: of the maps.
        layers: whose maps, see :class:`attnlib.hooks.Maps`.

    Reference: Dat et al., 2025, arXiv 2505.01104; no code is released, see the module.
    """

    name: ClassVar[str] = "vsc"

    def __init__(
        self,
        fusion: PrototypeFusion,
        prototypes: Prototypes,
        loss: str = "contrast",
        weight: float = 0.1,
        scale: str | None = None,
        resolution: int = 16,
        layers: Sequence[int | str] | None = None,
    ):
        if not isinstance(fusion, PrototypeFusion) or not isinstance(prototypes, Prototypes):
            raise TypeError("fusion must be a PrototypeFusion and prototypes a Prototypes")
        check_choice("loss", loss, LOSSES)
        check_choice("scale", scale, ("max", None))
        self.fusion, self.prototypes, self.loss, self.scale = fusion, prototypes, loss, scale
        self.weight = check_real("weight", weight)
        self.layers = layers
        self.reads = {"text": resolution}

    def parameters(self) -> Mapping[str, nn.Parameter]:
        return dict(self.fusion.named_parameters())

    def context(self, embeds: Tensor, seen: Seen) -> Tensor:
        prototypes, spans = [], []
        for row, example in enumerate(seen.examples):
            phrases = list(example.regions)
            prototypes.append(self.prototypes.of(phrases) if phrases else embeds.new_zeros(0, 1))
            spans.append([self._span(seen, row, phrase) for phrase in phrases])
        return self.fusion(embeds, prototypes, spans)

    @staticmethod
    def _span(seen: Seen, row: int, phrase: str) -> list[int]:
        span = seen.span(row, phrase)
        if span is None:
            raise ValueError(
                f"regions names {phrase!r}, which is not in the prompt {seen.examples[row].prompt!r} of its example"
            )
        return span

    def __call__(self, seen: Seen) -> Tensor:
        maps = seen.maps["text"]
        losses = []
        for row, example in enumerate(seen.examples):
            if not example.regions:
                continue
            spans = [self._span(seen, row, phrase) for phrase in example.regions]
            some = of_spans(maps[row], spans)
            if self.scale is not None:
                some = normalize(some, self.scale)
            size = (some.shape[-2], some.shape[-1])
            regions = torch.stack([F.interpolate(r.float()[None, None], size, mode="area")[0, 0]
                                   for r in example.regions.values()])  # fmt: skip
            losses.append(localization(some, regions.to(some), self.loss))
        return torch.stack(losses).mean() if losses else maps.sum() * 0
