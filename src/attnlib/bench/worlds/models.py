"""Small generators trained on painted scenes, as ordinary pipelines of diffusers.

``examples/diffusion/train.py`` trains them and keeps them in ``examples/diffusion/weights``; :func:`pipeline` loads
them from there, from the folder that the environment variable ``ATTNLIB_DIFFUSION_WEIGHTS`` names, or from ``folder``.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...checks import check_choice
from ...extras import need
from . import painter

#: Longest text, start and end included, and places that the text tower has, as CLIP's; ``IFPipeline`` reads as many.
TOKENS, POSITIONS = 32, 77
WIDTH = 96
#: Of noise, for the U-Nets and the DiT; velocities are predicted.
NOISE: dict[str, Any] = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
    rescale_betas_zero_snr=False, steps_offset=1,
)  # fmt: skip
#: Classes of the DiT: colour and shape of one thing.
CLASSES = tuple(f"{colour} {shape}" for shape in painter.GEOMETRIC for colour in painter.COLOURS)

#: What can be loaded, and the class of the pipeline.
PIPELINES = {
    "unet": "StableDiffusionPipeline", "dit": "DiTPipeline", "sd3": "StableDiffusion3Pipeline", "pixel": "IFPipeline",
}  # fmt: skip
#: By name, the library and class of every trained part.
PARTS = {
    "clip": ("transformers", "CLIPModel"), "vae": ("diffusers", "AutoencoderKL"),
    "unet": ("diffusers", "UNet2DConditionModel"), "text": ("transformers", "CLIPTextModel"),
    "dit": ("diffusers", "DiTTransformer2DModel"),
    "sd3": ("diffusers", "SD3Transformer2DModel"), "pixel": ("diffusers", "UNet2DConditionModel"),
}  # fmt: skip


@functools.cache
def tokenizer() -> Any:
    """A ``CLIPTokenizer`` that has every word of a caption as one token, and spells all others."""
    letters = [*map(chr, range(ord("a"), ord("z") + 1)), *"0123456789,."]
    vocab = {piece: n for n, piece in enumerate([*letters, *(c + "</w>" for c in letters)])}
    ranks: dict[tuple[str, str], int] = {}
    for word in painter.WORDS:  # merges that earlier words need come first, so that they stay whole
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pairs = list(itertools.pairwise(pieces))
            known = [p for p in pairs if p in ranks]
            pair = min(known, key=ranks.__getitem__) if known else pairs[0]
            ranks.setdefault(pair, len(ranks))
            vocab.setdefault("".join(pair), len(vocab))
            at, joined = 0, []
            while at < len(pieces):
                both = tuple(pieces[at : at + 2]) == pair
                joined.append("".join(pieces[at : at + 2]) if both else pieces[at])
                at += 2 if both else 1
            pieces = joined
    merges = [" ".join(pair) for pair in ranks]
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    cls = need("transformers", "small generators").CLIPTokenizer
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps(vocab))
        (Path(folder) / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
        made = cls(
            str(Path(folder) / "vocab.json"), str(Path(folder) / "merges.txt"), model_max_length=TOKENS,
            pad_token="<|endoftext|>",
        )  # fmt: skip
    spelt = [w for w in painter.WORDS if len(made(w)["input_ids"]) != 3]
    if spelt:
        raise RuntimeError(f"words of more than one token: {spelt}")
    return made


def token_numbers(texts: list[str], length: int = TOKENS) -> Tensor:
    """(B, length) tokens of texts, filled up with the end."""
    return tokenizer()(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")[
        "input_ids"
    ]


def build(name: str, **changes: Any) -> nn.Module:
    """An untrained part, by name of :data:`PARTS`.

    Args:
        name: of the part.
        changes: settings of its class, or, for ``"clip"``, of both towers.
    """
    check_choice("name", name, tuple(PARTS))
    library, cls = PARTS[name]
    made = getattr(need(library, "small generators"), cls)
    if name == "text":
        clip: Any = build("clip", **changes)
        return made(clip.config.text_config)
    if name == "clip":
        tokens = tokenizer()
        tower = dict(hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_attention_heads=4, projection_dim=WIDTH)
        tower |= changes
        text = dict(
            vocab_size=len(tokens), max_position_embeddings=POSITIONS, num_hidden_layers=3,
            bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id,
        )  # fmt: skip
        vision = dict(image_size=painter.SIDE, patch_size=8, num_hidden_layers=4)
        config = need("transformers", "small generators").CLIPConfig(
            text_config={**tower, **text}, vision_config={**tower, **vision}, projection_dim=tower["projection_dim"]
        )
        return made(config)
    settings: dict[str, dict[str, Any]] = {
        "vae": dict(
            block_out_channels=(16, 32, 64), down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, norm_num_groups=8, layers_per_block=1,
            sample_size=painter.SIDE, mid_block_add_attention=False, shift_factor=0.0,
        ),
        "unet": dict(
            sample_size=16, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=WIDTH,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D",) * 2,
            attention_head_dim=(2, 4), norm_num_groups=8,
        ),
        "dit": dict(
            sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=6, num_attention_heads=4,
            attention_head_dim=24, num_embeds_ada_norm=1000, norm_num_groups=8,
        ),
        "sd3": dict(
            sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=6, num_attention_heads=4,
            attention_head_dim=24, joint_attention_dim=2 * WIDTH, caption_projection_dim=96,
            pooled_projection_dim=2 * WIDTH, pos_embed_max_size=16,
        ),
        "pixel": dict(
            sample_size=32, in_channels=3, out_channels=6, block_out_channels=(16, 48, 80), layers_per_block=1,
            cross_attention_dim=WIDTH, down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(1, 2, 4),
            norm_num_groups=8,
        ),
    }  # fmt: skip
    return made(**{**settings[name], **changes})


def weights(folder: str | Path | None = None) -> Path:
    """The folder of trained parts.

    Raises:
        FileNotFoundError: there is none; the message says where was looked and how to make one.
    """
    given = folder or os.environ.get("ATTNLIB_DIFFUSION_WEIGHTS")
    here = [Path(given)] if given else [p / "examples" / "diffusion" / "weights" for p in _roots()]
    for place in here:
        if place.is_dir():
            return place
    raise FileNotFoundError(
        f"no trained generators in {', '.join(map(str, here))}: they lie in examples/diffusion/weights of the "
        "repository; name a folder by ATTNLIB_DIFFUSION_WEIGHTS, or make one with examples/diffusion/train.py"
    )


def _roots() -> list[Path]:
    return [Path(__file__).resolve().parents[4], Path.cwd()]


def missing_parts(names: Sequence[str], folder: str | Path | None = None) -> list[str]:
    """Those of some parts, ``"judge"`` among them, that are not trained yet."""
    try:
        place = weights(folder)
    except FileNotFoundError:
        return list(names)
    return [n for n in names if not any((place / n).glob("*.safetensors"))]


def part(name: str, folder: str | Path | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """A trained part, in evaluation mode.

    Args:
        name: of :data:`PARTS`.
        folder: of all parts; see :func:`weights`.
        dtype: of its weights.

    Raises:
        FileNotFoundError: it is not there.
    """
    check_choice("name", name, tuple(PARTS))
    place = weights(folder) / name
    if not (place / "config.json").exists():
        raise FileNotFoundError(f"{place} holds no trained {name!r}: make it with examples/diffusion/train.py {name}")
    library, cls = PARTS[name]
    key = "dtype" if library == "transformers" else "torch_dtype"
    quiet = {} if library == "transformers" else {"low_cpu_mem_usage": False}
    made = getattr(need(library, "small generators"), cls).from_pretrained(str(place), **{key: dtype}, **quiet)
    return made.eval()


def text_encoder(folder: str | Path | None = None, projected: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """The text tower of the trained CLIP, as ``CLIPTextModel`` or ``CLIPTextModelWithProjection``."""
    library = need("transformers", "small generators")
    cls = library.CLIPTextModelWithProjection if projected else library.CLIPTextModel
    return _tower(cls, "text", folder, dtype)


def image_encoder(folder: str | Path | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """The image tower of the trained CLIP, as ``CLIPVisionModelWithProjection``, for adapters."""
    return _tower(need("transformers", "small generators").CLIPVisionModelWithProjection, "vision", folder, dtype)


def feature_extractor() -> Any:
    """What brings pictures to the image tower: 64 pixels a side, in [-1, 1]."""
    side = painter.SIDE
    return need("transformers", "small generators").CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def _tower(cls: Any, name: str, folder: str | Path | None, dtype: torch.dtype) -> Any:
    clip = part("clip", folder, dtype)
    made = cls(getattr(clip.config, f"{name}_config"))
    ends = "visual" if name == "vision" else name
    held = {k: v for k, v in clip.state_dict().items() if k.startswith((f"{name}_model.", f"{ends}_projection."))}
    wanted = set(made.state_dict())
    if not wanted <= set(held):  # the tower alone has no prefix in some versions
        held = {k.removeprefix(f"{name}_model."): v for k, v in held.items()}
    made.load_state_dict({k: v for k, v in held.items() if k in wanted})
    return made.to(dtype).eval()


def pipeline(name: str, folder: str | Path | None = None, dtype: torch.dtype = torch.float32, **parts: Any) -> Any:
    """A trained generator as an ordinary pipeline, its progress bar off.

    Args:
        name: ``"unet"`` (``StableDiffusionPipeline``), ``"sd3"`` (``StableDiffusion3Pipeline``), ``"dit"``
            (``DiTPipeline``, class-conditional) or ``"pixel"`` (``IFPipeline``, 32 × 32 pixels).
        folder: of trained parts; see :func:`weights`.
        dtype: of weights.
        parts: other parts of the pipeline instead of the trained ones, such as ``scheduler``.

    Raises:
        FileNotFoundError: a part is not there.
    """
    check_choice("name", name, tuple(PIPELINES))
    diffusers = need("diffusers", "small generators")
    ddim: Callable[[], Any] = lambda: diffusers.DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False)  # noqa: E731
    own: Callable[[str], Callable[[], Any]] = lambda which: lambda: part(which, folder, dtype)  # noqa: E731
    nothing: Callable[[], None] = lambda: None  # noqa: E731
    text: Callable[[], Any] = lambda: text_encoder(folder, dtype=dtype)  # noqa: E731
    cls: Any
    if name == "unet":
        cls = diffusers.StableDiffusionPipeline
        makers: dict[str, Callable[[], Any]] = {
            "vae": own("vae"), "text_encoder": own("text"), "tokenizer": tokenizer, "unet": own("unet"),
            "safety_checker": nothing, "scheduler": ddim, "feature_extractor": nothing,
            "requires_safety_checker": lambda: False,
        }  # fmt: skip
    elif name == "dit":
        cls = diffusers.DiTPipeline
        makers = {
            "transformer": own("dit"), "vae": own("vae"), "scheduler": ddim,
            "id2label": lambda: dict(enumerate(CLASSES)),
        }  # fmt: skip
    elif name == "sd3":
        cls = _sd3()
        tower = functools.cache(lambda: text_encoder(folder, projected=True, dtype=dtype))
        makers = {
            "transformer": own("sd3"), "vae": own("vae"), "text_encoder": tower, "tokenizer": tokenizer,
            "text_encoder_2": tower, "tokenizer_2": tokenizer, "text_encoder_3": nothing, "tokenizer_3": nothing,
            "scheduler": diffusers.FlowMatchEulerDiscreteScheduler,
        }  # fmt: skip
    else:
        cls = diffusers.IFPipeline
        makers = {
            "tokenizer": tokenizer, "text_encoder": text, "unet": own("pixel"), "safety_checker": nothing,
            "feature_extractor": nothing, "watermarker": nothing, "requires_safety_checker": lambda: False,
            "scheduler": lambda: diffusers.DDPMScheduler(
                beta_schedule="squaredcos_cap_v2", variance_type="learned_range", clip_sample=True
            ),
        }  # fmt: skip
    # What is given is not looked for: a part of one's own stands in for one that is not trained.
    made = cls(**{k: make() for k, make in makers.items() if k not in parts}, **parts)
    made.set_progress_bar_config(disable=True)
    return made


@functools.cache
def _sd3() -> type:
    base = need("diffusers", "small generators").StableDiffusion3Pipeline

    class SmallStableDiffusion3Pipeline(base):  # type: ignore[misc, valid-type]
        """``StableDiffusion3Pipeline`` whose absent tower of T5 is one row of zeros and not 256."""

        def _get_t5_prompt_embeds(self, *args: Any, **kwargs: Any) -> Tensor:
            kwargs["max_sequence_length"] = 1
            return super()._get_t5_prompt_embeds(*args, **kwargs)

    return SmallStableDiffusion3Pipeline
