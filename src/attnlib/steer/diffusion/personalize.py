"""Personalisation: a denoiser learns new words for what a few images show.

Of the denoiser only the key and value projections of cross-attention are trained (Custom Diffusion), or low-rank
adapters on them; of the text encoders only the rows of new tokens. With latents z of an image, noise and a timestep t,

    ``L = sum M (f(z_t, t, c) - y)^2 / sum M + w_prior L_prior + sum_k w_k T_k``

where M is where noise is compared, y what the scheduler's kind of prediction aims at, ``L_prior`` the same without a
mask for images of the class as the model draws it, and ``T_k`` further terms: functions of the attention maps of the
very run whose noise was compared (:class:`Term`).

Nothing of the pipeline is overwritten while it learns: trained weights stand beside its own, in float32, and
:meth:`Personalize.close` leaves it as it was, :meth:`Personalize.merge` with what was learnt.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...checks import check_choice, check_flag, check_int, check_ints, check_real, check_type, checked, shaped
from ...extras import need
from ...files import read_file
from ...hooks.attach import attach
from ...hooks.intervention import Intervention
from ...hooks.maps import Maps
from ...hooks.pipelines import is_pipeline
from ...optim import shown
from ...types import stats_dtype
from .prompts import Word, context_spans, encoder_of, holds

#: Projections that are trained as whole matrices, by their letters.
PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
TRAIN = (
    *("".join(some) for n in range(1, 5) for some in itertools.combinations(PROJECTIONS, n)), "lora", "none",
)  # fmt: skip
CHANNELS = ("mean", "sum")

#: Files that :meth:`Personalize.save` writes, under the names that loaders of diffusers look for.
KV_FILE = "pytorch_custom_diffusion_weights.safetensors"
INDEX = "personalized.json"
ADAPTER = "personal"

#: Tokenizers and text encoders of pipelines, and what their part of a learnt token is called in a file of two.
ENCODERS = (("tokenizer", "text_encoder", "clip_l"), ("tokenizer_2", "text_encoder_2", "clip_g"))


@checked
@dataclass(frozen=True, eq=False)
class Example:
    """An image and what it is called.

    Args:
        image: (C, H, W) in [-1, 1], what the pipeline's autoencoder takes.
        prompt: the text; new tokens are written as they are.
        mask: (h, w) in [0, 1], where noise is compared; any size. ``None`` for everywhere.
        prior: an image of the class, which is kept as it is: no mask, no terms.
        spans: token numbers of words, for a :class:`Term` that names them, in place of looking them up in the prompt.
        regions: where words or phrases of the prompt are in the image, (h, w) in [0, 1] of any size, for a
            :class:`Term` that reads it.
    """

    image: Tensor
    prompt: str
    mask: Tensor | None = None
    prior: bool = False
    spans: Mapping[str, Sequence[int]] = field(default_factory=dict)
    regions: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_type("prompt", self.prompt, str)
        if not isinstance(self.image, Tensor) or self.image.dim() != 3 or not self.image.is_floating_point():
            raise ValueError(f"image must be (C, H, W), floating point in [-1, 1], got {type(self.image).__name__}"
                             f"{tuple(self.image.shape) if isinstance(self.image, Tensor) else ''}")  # fmt: skip
        if self.mask is not None:
            if not isinstance(self.mask, Tensor) or self.mask.dim() != 2:
                raise ValueError(f"mask must be (h, w), got {getattr(self.mask, 'shape', type(self.mask).__name__)}")
            if not bool((self.mask > 0).any()):
                raise ValueError("mask leaves nothing of the image to compare")
        for phrase, region in self.regions.items():
            if not isinstance(region, Tensor) or region.dim() != 2 or not bool((region > 0).any()):
                raise ValueError(f"regions: that of {phrase!r} must be (h, w) and not empty")


@dataclass(frozen=True, eq=False)
class Seen:
    """What a term of the loss sees of one run: the rows of examples that are no priors.

    Args:
        maps: of this run, (B, T, h, w) for ``"text"`` and (B, h w, h, w) for ``"image"``, see
            :class:`attnlib.hooks.Maps`.
        examples: of each row.
        step: of the training.
        pipe: the pipeline.
        layers: of how many layers each of the maps is the mean; 1 where it is not said.
    """

    maps: dict[str, Tensor]
    examples: Sequence[Example]
    step: int
    pipe: Any = None
    layers: Mapping[str, int] = field(default_factory=dict)

    def span(self, row: int, word: Word) -> list[int] | None:
        """The tokens of a word in the prompt of a row; ``None`` if it is not in it.

        Token numbers are taken as they are; of words, :attr:`Example.spans` goes first.
        """
        example = self.examples[row]
        if not isinstance(word, str):
            return [check_int("word", t, least=0) for t in word]
        if word in example.spans:
            return list(example.spans[word])
        return context_spans(self.pipe, example.prompt, [word])[0] if holds(example.prompt, word) else None


class Term:
    """A term of the loss, and what it asks of the training. A subclass overrides what it needs.

    Attributes:
        reads: which maps it reads, and at which resolution: ``{"text": 16, "image": 32}``. Of several resolutions a
            name behind an ``@`` tells them apart: ``{"text@16": 16, "text@32": 32}``.
        detached: which of them it reads without gradient, which saves what a backward pass would keep.
        layers: whose maps, see :class:`attnlib.hooks.Maps`.
        weight: what it counts.
    """

    name: ClassVar[str] = "term"
    reads: Mapping[str, Any] = {}
    detached: Collection[str] = ()
    layers: Sequence[int | str] | None = None
    weight: float = 1.0

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        if "__init__" in cls.__dict__ and cls.__module__.startswith("attnlib."):
            cls.__init__ = checked(cls.__init__)  # type: ignore[method-assign]

    def __call__(self, seen: Seen) -> Tensor:
        """The term, a number with gradient."""
        raise NotImplementedError

    def looks(self, step: int) -> Collection[str]:
        """Which of the maps it needs at a step; all by default."""
        return tuple(self.reads)

    def begin(self, learner: Personalize, examples: list[Example], generator: torch.Generator) -> None:
        """Before the first step (not when training goes on from a checkpoint), with the examples of some batch."""

    def choose(self, examples: list[Example], step: int, generator: torch.Generator) -> list[Example]:
        """The examples of a step, with other prompts, say."""
        return examples

    def inside(self, examples: Sequence[Example], size: tuple[int, int]) -> Tensor | None:
        """(B, h, w) what predictions and targets of examples that are no priors are multiplied by."""
        return None

    def context(self, embeds: Tensor, seen: Seen) -> Tensor:
        """Text embeddings (B, T, D) as the denoiser is to read them; ``seen`` has no maps, and priors too."""
        return embeds

    def interventions(self) -> Sequence[Intervention]:
        """What is attached to the denoiser while it learns."""
        return ()

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What is trained besides."""
        return {}

    def after(self, seen: Seen) -> None:
        """After the gradient of a step, without gradient."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it; tensors, numbers, strings and containers of these."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""


class OfMaps(Term):
    """A function of maps as a term: ``function(seen)`` gives a number.

    >>> OfMaps(lambda seen: seen.maps["text"][:, 2].mean(), {"text": 8}, weight=0.5).weight
    0.5
    """

    name: ClassVar[str] = "maps"

    def __init__(
        self,
        function: Callable[[Seen], Tensor],
        reads: Mapping[str, Any] | None = None,
        layers: Sequence[int | str] | None = None,
        weight: float = 1.0,
    ):
        if not callable(function):
            raise TypeError(f"function must be callable, got {function!r:.60}")
        self.function, self.layers = function, layers
        self.reads = {"text": 16} if reads is None else dict(reads)
        self.weight = check_real("weight", weight)

    def __call__(self, seen: Seen) -> Tensor:
        return self.function(seen)


@checked
class Draws:
    """Examples of a step: ``batch`` of some images, and as many priors, drawn anew each time.

    Args:
        examples: what is learnt.
        priors: images of the class, see :func:`prior_examples`.
        batch: how many of each.
    """

    def __init__(self, examples: Sequence[Example], priors: Sequence[Example] = (), batch: int = 1):
        self.examples, self.priors, self.batch = list(examples), list(priors), check_int("batch", batch, least=1)
        if not self.examples:
            raise ValueError("examples is empty")
        for name, some, prior in (("examples", self.examples, False), ("priors", self.priors, True)):
            for one in some:
                check_type(name, one, Example)
                if one.prior is not prior:
                    raise ValueError(f"{name} holds an Example with prior={one.prior}")

    def __call__(self, step: int, generator: torch.Generator) -> list[Example]:
        def some(of: Sequence[Example]) -> list[Example]:
            return [of[i] for i in torch.randint(len(of), (self.batch,), generator=generator).tolist()] if of else []

        return some(self.examples) + some(self.priors)


@shaped(prediction="float (B, C, h, w)", target="float (B, C, h, w)", mask="float (B, h, w)", inside="float (B, h, w)")
def noise_loss(
    prediction: Tensor, target: Tensor, mask: Tensor | None = None, inside: Tensor | None = None, channels: str = "mean"
) -> Tensor:
    """(B,) squared error of predictions (B, C, h, w), the mean over the places of a mask.

    Args:
        prediction, target: (B, C, h, w).
        mask: where; weights of the mean.
        inside: what both are multiplied by before; places that it leaves out still count in the mean.
        channels: their mean, or their sum as in the code that Custom Diffusion released, whose masked loss is C times
            as large as the one without a mask.

    Raises:
        ValueError: a mask that leaves nothing of a row.

    >>> noise_loss(torch.zeros(1, 4, 1, 2), torch.ones(1, 4, 1, 2), torch.tensor([[[1.0, 0.0]]])).item()
    1.0
    """
    check_choice("channels", channels, CHANNELS)
    error = _fine(prediction) - _fine(target)
    if inside is not None:
        error = error * inside.to(error)[:, None]
    error = error.square()
    error = error.mean(1) if channels == "mean" else error.sum(1)
    if mask is None:
        return error.mean((1, 2))
    mask = mask.to(error)
    total = mask.sum((1, 2))
    if bool((total <= 0).any()):
        raise ValueError("mask leaves nothing of an example to compare")
    return (error * mask).sum((1, 2)) / total


def prior_examples(pipe: Any, prompt: str, count: int, seed: int = 0, **call: Any) -> list[Example]:
    """Images of a class as the pipeline draws it now, which training is to keep.

    Args:
        pipe: the pipeline.
        prompt: of the class, such as ``"a cat"``.
        count: how many.
        seed: of the first; each has its own.
        call: further arguments of the pipeline.
    """
    if not is_pipeline(pipe):
        raise TypeError(f"pipe must be a diffusers pipeline, got {type(pipe).__name__}")
    check_int("count", count, least=1)
    images = []
    for number in range(count):
        generator = torch.Generator().manual_seed(seed + number)
        images.append(pipe(prompt=prompt, generator=generator, output_type="pt", **call).images[0])
    return [Example(image.float().cpu() * 2 - 1, prompt, prior=True) for image in images]


class _Rows:
    """Rows of new tokens of one text encoder, trained beside its table."""

    def __init__(self, tokenizer: Any, encoder: Any, tokens: Mapping[str, str | None], shared: bool = False):
        for token in () if shared else tokens:
            if len(tokenizer(token, add_special_tokens=False)["input_ids"]) == 1:
                raise ValueError(f"tokens holds {token!r}, which {type(tokenizer).__name__} knows already")
        starts = {}
        for token, word in tokens.items():
            if word is not None:
                ids = tokenizer(word, add_special_tokens=False)["input_ids"]
                if not ids:
                    raise ValueError(f"tokens: the tokenizer gives no token for {word!r}, which {token!r} starts from")
                starts[token] = ids
        weight = encoder.get_input_embeddings().weight.detach()
        before = len(weight)
        mean = _fine(weight).mean(0)
        rows = [_fine(weight[starts[token]]).mean(0) if token in starts else mean for token in tokens]
        tokenizer.add_tokens(list(tokens))
        self.ids = tokenizer.convert_tokens_to_ids(list(tokens))
        if max(self.ids) >= before:
            with torch.random.fork_rng(devices=[]):
                encoder.resize_token_embeddings(max(self.ids) + 1, mean_resizing=False)
        self.table: nn.Embedding = encoder.get_input_embeddings()
        self.rows = nn.Parameter(torch.stack(rows))
        self.write()
        self.first = self.rows.detach().clone()
        index = torch.full((max(self.ids) + 1,), -1)
        index[self.ids] = torch.arange(len(self.ids))
        self.index = index
        self._handle = self.table.register_forward_hook(self._forward)

    def _forward(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        ids = args[0]
        index = self.index.to(ids.device)
        at = torch.where(ids < len(index), index[ids.clamp(max=len(index) - 1)], -1)
        new = self.rows.to(out)[at.clamp(min=0)]
        return torch.where((at >= 0)[..., None], new, out)

    @torch.no_grad()
    def write(self, rows: Tensor | None = None) -> None:
        """Put the rows into the table itself."""
        weight = self.table.weight
        weight[torch.as_tensor(self.ids, device=weight.device)] = (self.rows if rows is None else rows).to(weight)

    def close(self) -> None:
        self._handle.remove()


@checked
class Personalize:
    """New words for what images show, learnt by a Stable Diffusion or SDXL pipeline.

    ::

        with Personalize(pipe, {"<new1>": "cat"}) as learner:
            learner.fit([Example(image, "a photo of <new1> cat")], steps=250, checkpoint="run.pt", progress=True)
            learner.save("my-cat")
        load_personalized(pipe, "my-cat")

    What is saved is loaded by diffusers, too: ``pipe.unet.load_attn_procs(folder,
    weight_name="pytorch_custom_diffusion_weights.safetensors", _pipeline=pipe)`` (without ``_pipeline`` diffusers 0.42
    reads the file and sets nothing), or ``pipe.load_lora_weights(folder,
    weight_name="pytorch_lora_weights.safetensors")``, and ``pipe.load_textual_inversion(file)``.

    Args:
        pipe: a pipeline with a conditional U-Net, an autoencoder and CLIP text encoders.
        tokens: new tokens, each with the word that it starts from: the mean of the word's rows; ``None`` for the mean
            of all rows.
        train: of the denoiser ``"kv"``, ``to_k`` and ``to_v`` of cross-attention as whole matrices, or others of
            ``"qkvo"``, in that order, ``o`` for ``to_out`` and its bias; ``"lora"``, adapters of PEFT on ``to_k`` and
            ``to_v``; ``"none"``, the new tokens (and what terms train) alone.
        self_attention: the same projections of self-attention are trained, too.
        rank, alpha: of the adapters.
        layers: number or name patterns of the attention that is trained; ``None`` for all.
        terms: further terms of the loss; plain functions are taken as :class:`OfMaps`.
        prior_weight: what images of the class count.
        detach_first: keys and values of the token that begins the text get no gradient; where whole matrices are
            trained by default, as Custom Diffusion does.
        channels: of the squared error, see :func:`noise_loss`.

    Raises:
        TypeError: not such a pipeline.
        ValueError: a flow model or another scheduler without noise levels, a token that the tokenizer knows already,
            nothing to train.

    Reference: Kumari et al., 2023, arXiv 2212.04488.
    """

    def __init__(
        self,
        pipe: Any,
        tokens: Mapping[str, str | None] | None = None,
        train: str = "kv",
        *,
        rank: int = 4,
        alpha: float | None = None,
        layers: Sequence[int | str] | None = None,
        terms: Sequence[Term | Callable[[Seen], Tensor]] = (),
        prior_weight: float = 1.0,
        detach_first: bool | None = None,
        channels: str = "mean",
        self_attention: bool = False,
    ):
        check_choice("train", train, TRAIN)
        check_choice("channels", channels, CHANNELS)
        self.prior_weight = check_real("prior_weight", prior_weight, least=0)
        whole = train not in ("lora", "none")
        self.detach_first = whole if detach_first is None else check_flag("detach_first", detach_first)
        self.parts = [PROJECTIONS[letter] for letter in (train if whole else "kv")]
        if isinstance(tokens, str) or (tokens is not None and not isinstance(tokens, Mapping)):
            raise TypeError(f"tokens must say from which word each starts: {{'<new1>': 'cat'}}, got {tokens!r:.60}")
        for token in tokens or {}:
            if not token or re.search(r"\s", token):
                raise ValueError(f"tokens holds {token!r}; a token is one word, such as '<new1>'")
        self.pipe, self.train, self.channels = pipe, train, channels
        self.terms = [term if isinstance(term, Term) else OfMaps(term) for term in terms]
        self.plan = _noise_plan(pipe)
        unet = self.unet = pipe.unet
        self.tokens = dict(tokens or {})
        sites = _sites(unet, layers, ("self", "cross") if check_flag("self_attention", self_attention) else ("cross",))
        if train != "none" and not sites:
            raise ValueError(f"{type(unet).__name__} has no cross-attention to train")
        if self_attention and train == "none":
            raise ValueError("self_attention says what is trained of the denoiser, and train='none' trains nothing")
        if not self.tokens and train == "none" and not any(term.parameters() for term in self.terms):
            raise ValueError("there is nothing to train: give tokens, train='kv' or 'lora', or a term with parameters")
        self.rank = check_int("rank", rank, least=1)
        self.alpha = float(rank if alpha is None else check_real("alpha", alpha, above=0))
        self._undo: list[Callable[[], Any]] = []
        self._kv: dict[str, nn.Parameter] = {}
        self.names = [site.name for site in sites] if train != "none" else []
        self.reading = [site.name for site in sites if site.kind == "cross"] if train != "none" else []
        self.rows: dict[str, _Rows] = {}
        self.open = True
        self._probes: dict[tuple[Any, ...], Maps] = {}
        self._begun = False
        self._last: list[Seen] = []
        try:
            if whole:
                self._train_whole()
            elif train == "lora":
                self._train_lora()
            known: list[Any] = []  # tokenizers that were told
            for tokenizer, encoder, key in ENCODERS:
                if self.tokens and getattr(pipe, encoder, None) is not None:
                    words = getattr(pipe, tokenizer)
                    shared = any(words is one for one in known)
                    self.rows[key] = rows = _Rows(words, getattr(pipe, encoder), self.tokens, shared)
                    known.append(words)
                    self._undo += [functools.partial(rows.write, rows.first), rows.close]
            if self.detach_first:
                for name in self.reading:
                    for which in ("to_k", "to_v"):
                        handle = unet.get_submodule(f"{name}.{which}").register_forward_hook(_detached_first)
                        self._undo.append(handle.remove)
        except BaseException:
            self.close()
            raise
        self.history: list[dict[str, float]] = []

    # ---- what is trained

    def _train_whole(self) -> None:
        for name in self.names:
            for which in self.parts:
                path = f"{name}.{which}"
                linear = self.unet.get_submodule(path)
                if type(linear) is not nn.Linear:
                    raise ValueError(
                        f"{path} is a {type(linear).__name__}; train={self.train!r} takes plain linear layers, so "
                        "unload adapters first or use train='lora'"
                    )
                own = self._kv[path] = nn.Parameter(_fine(linear.weight.detach()).clone())
                bias: Tensor | None = linear.bias
                if which == PROJECTIONS["o"] and bias is not None:
                    bias = self._kv[f"{path}.bias"] = nn.Parameter(_fine(bias.detach()).clone())
                linear.forward = functools.partial(_linear, linear, own, bias)  # type: ignore[method-assign]
                self._undo.append(functools.partial(linear.__dict__.pop, "forward"))

    def _train_lora(self) -> None:
        peft = need("peft", "train='lora'")
        if getattr(self.unet, "peft_config", None):
            raise ValueError(
                f"{type(self.unet).__name__} has adapters already ({', '.join(self.unet.peft_config)}); fuse or unload "
                "them first"
            )
        targets = [f"{name}.{which}" for name in self.names for which in self.parts]
        flags = {id(p): p.requires_grad for p in self.unet.parameters()}
        config = peft.LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=targets)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.unet.add_adapter(config, adapter_name=ADAPTER)
        self._undo.append(self.unet.unload_lora)
        for name, p in self.unet.named_parameters():
            if id(p) in flags:
                p.requires_grad_(flags[id(p)])
            else:
                p.data = _fine(p.data)
                self._kv[name] = p

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name: projections or adapters, new rows, what terms bring."""
        own = {f"unet.{name}": p for name, p in self._kv.items()}
        own |= {f"tokens.{key}": rows.rows for key, rows in self.rows.items()}
        for number, term in enumerate(self.terms):
            own |= {f"terms.{number}.{name}": p for name, p in term.parameters().items()}
        return own

    # ---- one run

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    def latents(self, images: Sequence[Tensor], generator: torch.Generator | None = None) -> Tensor:
        """(B, C, h, w) of images, drawn from what the autoencoder gives; its mean without a generator."""
        sizes = {tuple(image.shape) for image in images}
        if len(sizes) > 1:
            raise ValueError(f"images of a step must be of one size, got {sorted(sizes)}")
        vae = self.pipe.vae
        batch = torch.stack(list(images)).to(self.device, vae.dtype)
        with torch.no_grad():
            found = vae.encode(batch).latent_dist
            z = found.mode() if generator is None else found.mean + found.std * _randn(found.mean, generator)
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        return (z - shift) * vae.config.scaling_factor

    def encode(self, prompts: Sequence[str], size: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Embeddings (B, T, D) of prompts, with gradient to new rows, and what the U-Net takes besides.

        Args:
            prompts: texts.
            size: (H, W) of the images, which SDXL is told.
        """
        given = {"prompt": list(prompts), "device": self.device, "num_images_per_prompt": 1}
        given |= {"do_classifier_free_guidance": False}
        with torch.enable_grad() if self.rows else torch.no_grad():
            found = self.pipe.encode_prompt(**given)
        embeds = found[0]
        if getattr(self.unet.config, "addition_embed_type", None) != "text_time":
            return embeds.to(self.dtype), {}
        ids = torch.tensor([*size, 0, 0, *size], dtype=self.dtype, device=self.device).repeat(len(prompts), 1)
        return embeds.to(self.dtype), {"text_embeds": found[2].to(self.dtype), "time_ids": ids}

    def noised(self, z: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Noised latents and what the model aims at there."""
        levels = self.plan.alphas_cumprod.to(z.device, stats_dtype(z.dtype))[timesteps]
        signal, rest = (level.sqrt().view(-1, 1, 1, 1) for level in (levels, 1 - levels))
        noisy = (signal * z + rest * noise).to(z.dtype)
        kind = self.plan.config.prediction_type
        target = noise if kind == "epsilon" else z if kind == "sample" else signal * noise - rest * z
        return noisy, target

    def run(
        self, examples: Sequence[Example], timesteps: Tensor, generator: torch.Generator, step: int = 0
    ) -> tuple[Tensor, Tensor, list[Seen]]:
        """One run of the denoiser inside a session: predictions, targets, and what each term sees.

        Args:
            examples: priors last.
            timesteps: (B,) of each.
            generator: of latents and noise, on the CPU.
            step: of the training.
        """
        z = self.latents([e.image for e in examples], generator)
        noise = _randn(z, generator)
        noisy, target = self.noised(z, noise, timesteps.to(z.device))
        size = tuple(examples[0].image.shape[-2:])
        embeds, more = self.encode([e.prompt for e in examples], (size[0], size[1]))
        for term in self.terms:
            changed = term.context(embeds, Seen({}, examples, step, self.pipe))
            if changed.shape != embeds.shape:
                raise ValueError(
                    f"{type(term).__name__}.context must keep the shape {tuple(embeds.shape)}, got "
                    f"{tuple(changed.shape)}"
                )
            embeds = changed
        wanted = {self._key(term, of) for term in self.terms for of in term.looks(step)}
        for key, probe in self._probes.items():
            probe.looking = key in wanted
        extra = {"added_cond_kwargs": more} if more else {}
        out = self.unet(
            noisy.to(self.dtype), timesteps.to(z.device), encoder_hidden_states=embeds, return_dict=False, **extra
        )[0]
        count = sum(not e.prior for e in examples)
        taken = {key: self._probes[key].take()[:count] for key in wanted}
        seen = []
        for term in self.terms:
            keys = {of: self._key(term, of) for of in term.looks(step)}
            maps, layers = (
                {of: taken[k] for of, k in keys.items()},
                {of: self._probes[k].taken for of, k in keys.items()},
            )
            seen.append(Seen(maps, examples[:count], step, self.pipe, layers))
        return out, target, seen

    @staticmethod
    def _key(term: Term, of: str) -> tuple[Any, ...]:
        size = term.reads[of]
        layers = None if term.layers is None else tuple(term.layers)
        kind = of.partition("@")[0]
        return kind, tuple(size) if isinstance(size, (list, tuple)) else size, layers, of in term.detached

    @contextmanager
    def _training(self) -> Iterator[None]:
        """Only what is trained gets gradients, modules are in the mode of inference, maps are looked at."""
        if not self.open:
            raise ValueError("this Personalize was closed; make another")
        modules = [m for m in (self.unet, *(getattr(self.pipe, e, None) for _, e, _ in ENCODERS)) if m is not None]
        flags = [(p, p.requires_grad) for m in modules for p in m.parameters()]
        modes = [(m, m.training) for part in modules for m in part.modules()]
        chosen = {id(p) for p in self.parameters().values()}
        self._probes = {}
        for term in self.terms:
            for of in term.reads:
                key = self._key(term, of)
                self._probes.setdefault(key, Maps(term.reads[of], of=key[0], layers=term.layers, gradient=not key[-1]))
        acting = [i for term in self.terms for i in term.interventions()]
        try:
            for p, _ in flags:
                p.requires_grad_(id(p) in chosen)
            for part in modules:
                part.eval()
            attached = [*acting, *self._probes.values()]
            with attach(self.unet, *attached) if attached else nullcontext():
                yield
        finally:
            for p, flag in flags:
                p.requires_grad_(flag)
            for m, mode in modes:
                m.training = mode

    def look(
        self, examples: Sequence[Example], timesteps: Tensor | Sequence[int], generator: torch.Generator
    ) -> list[Seen]:
        """What each term would see of examples, without gradient; terms call it before training."""
        at = torch.as_tensor(timesteps)
        with torch.no_grad():
            return self.run(examples, at, generator)[2]

    def losses(
        self, examples: Sequence[Example], timesteps: Tensor, generator: torch.Generator, step: int = 0
    ) -> dict[str, Tensor]:
        """``{"noise", "prior", name of each term, "loss"}`` of one run, with gradient.

        Args:
            examples, timesteps, generator, step: see :meth:`run`; priors may stand anywhere.
        """
        order = sorted(range(len(examples)), key=lambda i: examples[i].prior)
        examples = [examples[i] for i in order]
        timesteps = timesteps[order]
        count = sum(not e.prior for e in examples)
        if not count:
            raise ValueError("examples of a step are all priors; there is nothing to learn from")
        out, target, seen = self.run(examples, timesteps, generator, step)
        size = (out.shape[-2], out.shape[-1])
        masks = _masks(examples[:count], size, out.device)
        inside: Tensor | None = None
        for term in self.terms:
            one = term.inside(examples[:count], size)
            if one is not None:
                inside = one.to(out.device) if inside is None else inside * one.to(out.device)
        found = {"noise": noise_loss(out[:count], target[:count], masks, inside, self.channels).mean()}
        if count < len(examples):
            found["prior"] = noise_loss(out[count:], target[count:]).mean()
        total = found["noise"] + self.prior_weight * found.get("prior", torch.zeros_like(found["noise"]))
        for term, what in zip(self.terms, seen, strict=True):
            one = term(what)
            name = term.name if term.name not in found else f"{term.name}-{sum(n.startswith(term.name) for n in found)}"
            found[name] = one
            total = total + term.weight * one
        found["loss"] = total
        self._last = seen
        return found

    # ---- the loop

    def fit(
        self,
        examples: Sequence[Example] | Callable[[int, torch.Generator], Sequence[Example]],
        steps: int,
        *,
        lr: float = 1e-5,
        token_lr: float | None = None,
        weight_decay: float = 1e-2,
        accumulate: int = 1,
        clip: float | None = 1.0,
        timesteps: tuple[int, int] | None = None,
        loss_scale: float = 1.0,
        seed: int = 0,
        checkpoint: str | Path | None = None,
        every: int = 50,
        progress: bool | Callable[[int, float], None] = False,
    ) -> list[dict[str, float]]:
        """Train; what each step draws depends on ``seed`` and its number alone, so that training that was interrupted
        goes on to the very same weights.

        Args:
            examples: those of every step (:class:`Draws` of one by one where they are a sequence), or a function from
                the number of a batch and a generator to its examples, of which priors may be some.
            steps: steps in all, those of a checkpoint included.
            lr, weight_decay: of AdamW.
            token_lr: of new rows; ``lr`` by default.
            accumulate: batches per step.
            clip: largest norm of the gradient; ``None`` for any.
            timesteps: from, and up to but without; ``None`` for all.
            loss_scale: what the loss is multiplied by for the backward pass, for float16.
            seed: of everything that is drawn.
            checkpoint: a file; training goes on from it when it exists.
            every: steps between two writes of it.
            progress: draw a bar; or called with step and loss.

        Returns:
            The losses of every step, by name.

        Raises:
            ValueError: a checkpoint of another training, a loss or gradient that is not finite.
        """
        check_int("steps", steps, least=1)
        check_int("accumulate", accumulate, least=1)
        check_int("every", every, least=1)
        check_int("seed", seed)
        check_real("lr", lr, above=0)
        check_real("weight_decay", weight_decay, least=0)
        check_real("loss_scale", loss_scale, above=0)
        for name, value in (("token_lr", token_lr), ("clip", clip)):
            if value is not None:
                check_real(name, value, above=0)
        draw = examples if callable(examples) else _drawn(examples)
        last = int(self.plan.config.num_train_timesteps)
        span = (0, last) if timesteps is None else check_ints("timesteps", timesteps)
        if len(span) != 2 or not 0 <= span[0] < span[1] <= last:
            raise ValueError(f"timesteps must be two numbers, 0 <= from < to <= {last}, got {timesteps}")
        low, high = span
        parameters = self.parameters()
        rows = [p for name, p in parameters.items() if name.startswith("tokens.")]
        rest = [p for name, p in parameters.items() if not name.startswith("tokens.")]
        groups = [{"params": rest, "lr": lr}, {"params": rows, "lr": lr if token_lr is None else token_lr}]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=weight_decay)
        signature = {
            "shapes": {name: list(p.shape) for name, p in parameters.items()}, "train": self.train, "lr": lr,
            "token_lr": token_lr, "weight_decay": weight_decay, "accumulate": accumulate, "clip": clip, "seed": seed,
            "tokens": list(self.tokens), "terms": [term.name for term in self.terms],
            "weights": [term.weight for term in self.terms], "prior_weight": self.prior_weight,
            "detach_first": self.detach_first, "channels": self.channels, "timesteps": [low, high],
        }  # fmt: skip
        history = self._resume(checkpoint, signature, parameters, optimizer)
        with self._training(), shown(progress, steps) as tell:
            if not history and not self._begun:
                for number, term in enumerate(self.terms):
                    first = _generator(seed, -1 - number)
                    term.begin(self, list(draw(0, first)), first)
            self._begun = True
            for step in range(len(history), steps):
                optimizer.zero_grad(set_to_none=True)
                sums: dict[str, float] = {}
                for part in range(accumulate):
                    number = step * accumulate + part
                    generator = _generator(seed, number)
                    batch = list(draw(number, generator))
                    for term in self.terms:
                        batch = term.choose(batch, step, generator)
                    at = torch.randint(low, high, (len(batch),), generator=generator)
                    found = self.losses(batch, at, generator, step)
                    if not bool(found["loss"].isfinite()):
                        raise ValueError(f"at step {step} the loss is not finite: {_numbers(found)}")
                    (found["loss"] * loss_scale / accumulate).backward()
                    for name, value in _numbers(found).items():
                        sums[name] = sums.get(name, 0.0) + value / accumulate
                    with torch.no_grad():
                        for term, seen in zip(self.terms, self._last, strict=True):
                            term.after(seen)
                self._check_gradients(parameters, loss_scale, clip, step)
                optimizer.step()
                history.append(sums)
                tell(step + 1, sums["loss"])
                if checkpoint is not None and ((step + 1) % every == 0 or step + 1 == steps):
                    self._keep(Path(checkpoint), signature, parameters, optimizer, history)
        self._last = []
        for p in parameters.values():
            p.grad = None
        for one in self.rows.values():
            one.write()
        self.history = history
        return history

    @staticmethod
    def _check_gradients(parameters: Mapping[str, nn.Parameter], scale: float, clip: float | None, step: int) -> None:
        there = [p for p in parameters.values() if p.grad is not None]
        slopes = [p.grad for p in there if p.grad is not None]
        if scale != 1:
            for slope in slopes:
                slope /= scale
        if not all(bool(slope.isfinite().all()) for slope in slopes):
            raise ValueError(
                f"at step {step} a gradient is not finite; train in float32 or bfloat16, or give loss_scale another "
                "power of two"
            )
        if clip is not None:
            nn.utils.clip_grad_norm_(there, clip)

    def _resume(
        self, checkpoint: str | Path | None, signature: dict[str, Any], parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> list[dict[str, float]]:  # fmt: skip
        if checkpoint is None or not Path(checkpoint).exists():
            return []
        kept = read_file(checkpoint, "checkpoint")
        if not isinstance(kept, Mapping) or "signature" not in kept:
            raise ValueError(f"checkpoint={str(checkpoint)!r} was not written by a training of this kind")
        if kept["signature"] != signature:
            unlike = [key for key in signature if kept["signature"].get(key) != signature[key]]
            raise ValueError(f"checkpoint={str(checkpoint)!r} was written by another training: {', '.join(unlike)}")
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(kept["parameters"][name])
        optimizer.load_state_dict(kept["optimizer"])
        for term, state in zip(self.terms, kept["terms"], strict=True):
            term.load_state_dict(state)
        return list(kept["history"])

    def _keep(
        self, path: Path, signature: dict[str, Any], parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer, history: list[dict[str, float]],
    ) -> None:  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        torch.save(
            {
                "signature": signature,
                "parameters": {name: p.detach() for name, p in parameters.items()},
                "optimizer": optimizer.state_dict(),
                "terms": [term.state_dict() for term in self.terms],
                "history": history,
            },
            part,
        )
        os.replace(part, path)

    # ---- what becomes of it

    def save(self, folder: str | Path) -> list[Path]:
        """Write what was learnt as diffusers loads it: projections or adapters, a file per token, and an index.

        Returns:
            The files.
        """
        if not self.open:
            raise ValueError("this Personalize was closed; save before that")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = []
        if self.train not in ("lora", "none"):
            files.append(folder / KV_FILE)
            save_file(self._custom_diffusion(), files[0], metadata={"format": "pt"})
        elif self.train == "lora":
            from diffusers.utils import convert_state_dict_to_diffusers
            from peft.utils import get_peft_model_state_dict

            state = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.unet, adapter_name=ADAPTER))
            settings = self.unet.peft_config[ADAPTER].to_dict()
            said = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")
            kept = {key: settings[key] for key in said}
            kept["target_modules"] = sorted(kept["target_modules"])
            type(self.pipe).save_lora_weights(folder, unet_lora_layers=state, unet_lora_adapter_metadata=kept)
            files.append(folder / "pytorch_lora_weights.safetensors")
        names = {}
        for number, token in enumerate(self.tokens):
            names[token] = f"{re.sub(r'[^A-Za-z0-9_-]', '', token) or 'token'}-{number}.safetensors"
            found = {key: rows.rows[number].detach().clone() for key, rows in self.rows.items()}
            if len(found) == 1:
                found = {token: next(iter(found.values()))}
            files.append(folder / names[token])
            save_file(found, files[-1], metadata={"format": "pt"})
        index = folder / INDEX
        index.write_text(json.dumps({"train": self.train, "tokens": names}, indent=1) + "\n", encoding="utf-8")
        return [*files, index]

    def _custom_diffusion(self) -> dict[str, Tensor]:
        """Weights by processor; processors without any are named by an empty tensor, as the loader wants each."""
        for path in self._kv:
            linear = self.unet.get_submodule(path.removesuffix(".bias"))
            if linear.bias is not None and not path.removesuffix(".bias").endswith(PROJECTIONS["o"]):
                raise ValueError(
                    f"{path} has a bias, for which Custom Diffusion's processors of diffusers have no place"
                )
        state: dict[str, Tensor] = {}
        for processor in self.unet.attn_processors:
            name = processor.removesuffix(".processor")
            if name not in self.names:
                state[processor] = torch.empty(0)
                continue
            for which in self.parts:
                head, dot, number = which.partition(".")
                for path, kind in ((f"{name}.{which}", "weight"), (f"{name}.{which}.bias", "bias")):
                    if path in self._kv:
                        theirs = f"{processor}.{head}_custom_diffusion{dot}{number}.{kind}"
                        state[theirs] = self._kv[path].detach().clone()
        return state

    def close(self) -> None:
        """Take everything off: the pipeline's weights are what they were, and new tokens have the rows they began with
        (``pipe.unload_textual_inversion()`` forgets them)."""
        while self._undo:
            self._undo.pop()()
        self.open = False

    def merge(self) -> None:
        """Write what was learnt into the pipeline's own weights, and close."""
        if not self.open:
            raise ValueError("this Personalize was closed; merge before that")
        learnt = {key: rows.rows.detach().clone() for key, rows in self.rows.items()}
        if self.train == "lora":
            self.unet.fuse_lora(adapter_names=[ADAPTER])
        own = {} if self.train == "lora" else {path: p.detach() for path, p in self._kv.items()}
        self.close()
        with torch.no_grad():
            for path, value in own.items():
                linear = self.unet.get_submodule(path.removesuffix(".bias"))
                (linear.bias if path.endswith(".bias") else linear.weight).copy_(value)
        for key, value in learnt.items():
            self.rows[key].write(value)

    def __enter__(self) -> Personalize:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


def load_personalized(pipe: Any, folder: str | Path) -> list[str]:
    """What :meth:`Personalize.save` wrote into a pipeline: projections are written over its own, so that everything
    that attaches to it serves; adapters are loaded as adapters (``pipe.fuse_lora()`` merges them).

    Args:
        pipe: a pipeline like the one that learnt.
        folder: where it was saved.

    Returns:
        The new tokens.

    Raises:
        ValueError: no such folder, or projections of another U-Net.
    """
    if not is_pipeline(pipe):
        raise TypeError(f"pipe must be a diffusers pipeline, got {type(pipe).__name__}")
    folder = Path(folder)
    if not (folder / INDEX).exists():
        raise ValueError(f"folder={str(folder)!r} holds nothing that Personalize.save() wrote")
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    if index["train"] not in ("lora", "none"):
        with torch.no_grad():
            for key, value in load_file(folder / KV_FILE).items():
                if not value.numel():
                    continue
                name, _, rest = key.rpartition(".processor.")
                which, _, kind = rest.replace("_custom_diffusion", "").rpartition(".")
                try:
                    weight = getattr(pipe.unet.get_submodule(f"{name}.{which}"), kind)
                except AttributeError as error:
                    raise ValueError(f"folder={str(folder)!r} is of another U-Net: this one has no {name}") from error
                if weight.shape != value.shape:
                    raise ValueError(
                        f"folder={str(folder)!r} is of another U-Net: {name}.{which} is {tuple(value.shape)}, here "
                        f"{tuple(weight.shape)}"
                    )
                weight.copy_(value)
    elif index["train"] == "lora":
        pipe.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
    for token, file in index["tokens"].items():
        found = load_file(folder / file)
        for tokenizer, encoder, key in ENCODERS:
            row = found.get(key, found.get(token) if key == "clip_l" else None)
            if row is not None:
                parts = {"tokenizer": getattr(pipe, tokenizer), "text_encoder": getattr(pipe, encoder)}
                with torch.random.fork_rng(devices=[]):
                    pipe.load_textual_inversion({token: row}, token=token, **parts)
    return list(index["tokens"])


# ---- pieces


def _linear(linear: nn.Linear, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    dtype = linear.weight.dtype
    return F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))


def _fine(t: Tensor) -> Tensor:
    """At least float32, in which small steps are not lost."""
    return t.to(stats_dtype(t.dtype))


def _detached_first(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
    return torch.cat([out[:, :1].detach(), out[:, 1:]], 1) if out.requires_grad else out


def _randn(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like)


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + number) % (1 << 63))


def _numbers(found: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(value.detach()) for name, value in found.items()}


def _drawn(examples: Any) -> Callable[[int, torch.Generator], Sequence[Example]]:
    if not isinstance(examples, Sequence) or not all(isinstance(e, Example) for e in examples):
        raise TypeError(f"examples must be a sequence of Example, or a function that draws some; got {examples!r:.60}")
    return Draws([e for e in examples if not e.prior], [e for e in examples if e.prior])


def _masks(examples: Sequence[Example], size: tuple[int, int], device: torch.device) -> Tensor | None:
    """(B, h, w) masks at the size of latents, means over areas; ``None`` where no example has one."""
    if all(e.mask is None for e in examples):
        return None
    found = []
    for e in examples:
        mask = torch.ones(size) if e.mask is None else e.mask.float()
        found.append(mask if mask.shape == size else F.interpolate(mask[None, None], size, mode="area")[0, 0])
    return torch.stack(found).to(device)


def _sites(unet: nn.Module, layers: Sequence[int | str] | None, kinds: tuple[str, ...]) -> list[Any]:
    from ...hooks.diffusers_adapter import DiffusersAdapter
    from ...hooks.intervention import check_layers

    sites = [site for site in DiffusersAdapter().sites(unet, None) if site.kind in kinds]
    if layers is None:
        return sites

    class Trained(Intervention):
        pass

    wanted = Trained()
    wanted.layers, wanted.kinds = list(layers), kinds  # type: ignore[misc]
    return check_layers(wanted, sites)


def _noise_plan(pipe: Any) -> Any:
    """A scheduler with the noise levels of training; what cannot be trained here is refused."""
    need("diffusers", "Personalize")
    from diffusers import DDPMScheduler, UNet2DConditionModel

    if not is_pipeline(pipe):
        raise TypeError(f"pipe must be a diffusers pipeline, got {type(pipe).__name__}")
    name, scheduler = type(pipe).__name__, getattr(pipe, "scheduler", None)
    if scheduler is None or "beta_schedule" not in scheduler.config:
        raise ValueError(
            f"{name} has a {type(scheduler).__name__}, whose model predicts a flow; Personalize trains models that "
            "predict noise"
        )
    if not isinstance(getattr(pipe, "unet", None), UNet2DConditionModel):
        raise TypeError(f"{name} has no conditional U-Net (pipe.unet); Personalize serves Stable Diffusion and SDXL")
    if any(getattr(pipe, part, None) is None for part in ("vae", "text_encoder", "tokenizer")):
        raise TypeError(f"{name} lacks one of vae, text_encoder and tokenizer, which Personalize trains with")
    if "num_images_per_prompt" not in inspect.signature(encoder_of(pipe)).parameters:
        raise TypeError(f"{name}.encode_prompt is not that of Stable Diffusion or SDXL")
    plan = DDPMScheduler.from_config(scheduler.config)
    kind = plan.config.prediction_type
    if kind not in ("epsilon", "sample", "v_prediction"):
        raise ValueError(f"{name} predicts {kind!r}; Personalize knows 'epsilon', 'sample' and 'v_prediction'")
    return plan
