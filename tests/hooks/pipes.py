"""Tiny random pipelines of diffusers, tokenizers included, for tests of what is attached to them."""

import functools
import json

import torch

WORDS = (
    "a an and the of on in photo red blue green circle square cat dog frog crown wearing glass apple bench two".split()
)


@functools.cache
def clip_tokenizer(folder, length=77):
    """A CLIP tokenizer that knows some words as one piece and all else by letters."""
    import pathlib

    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + [",", "."]
    vocab, merges = {}, ["#version: 0.2"]
    for letter in letters:
        vocab[letter] = len(vocab)
    for letter in letters:
        vocab[letter + "</w>"] = len(vocab)
    done = set()
    for word in WORDS:
        for end in range(2, len(word) + 1):
            left, right = word[: end - 1], word[end - 1] + ("</w>" if end == len(word) else "")
            if (left, right) not in done:
                done.add((left, right))
                merges.append(f"{left} {right}")
            if left + right not in vocab:
                vocab[left + right] = len(vocab)
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    folder = pathlib.Path(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(merges) + "\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=length, pad_token="<|endoftext|>"
    )


def unet(size=16, seed=0, cross=16, **changes):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    settings = dict(
        sample_size=size, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=cross,
        attention_head_dim=(2, 4), norm_num_groups=4,
    )  # fmt: skip
    model = UNet2DConditionModel(**{**settings, **changes}).eval()
    with torch.no_grad():  # maps that are not flat, so that losses of them have slopes
        for name, p in model.named_parameters():
            if "attn2.to_q" in name or "attn2.to_k" in name:
                p.mul_(6)
    return model


def vae(seed=1):
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        latent_channels=4, norm_num_groups=4, sample_size=16,
    ).eval()  # fmt: skip


def text_encoder(vocab, width=16, seed=2, projected=False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=width, num_hidden_layers=1, num_attention_heads=2,
        projection_dim=width, eos_token_id=vocab - 1, bos_token_id=vocab - 2, pad_token_id=vocab - 1,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def scheduler(name="DDIMScheduler", **settings):
    import diffusers

    return getattr(diffusers, name)(
        **{"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", **settings}
    )


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion(folder, cls="StableDiffusionPipeline", model=None, plan=None, **extra):
    """A tiny ``StableDiffusionPipeline``, or another class of the same parts."""
    import diffusers

    tokens = clip_tokenizer(folder)
    plan = plan or scheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return quiet(
        getattr(diffusers, cls)(
            vae=vae(), text_encoder=text_encoder(len(tokens)), tokenizer=tokens, unet=model or unet(),
            scheduler=plan, safety_checker=None, feature_extractor=None, requires_safety_checker=False, **extra,
        )
    )  # fmt: skip


def sample(pipe, prompt="a red circle and a blue square", steps=4, seed=3, **given):
    """Latents of a call of a pipeline, from a seeded start."""
    settings = dict(num_inference_steps=steps, output_type="latent", generator=torch.Generator().manual_seed(seed))
    out = pipe(prompt=prompt, **{**settings, **given})
    return out.images if hasattr(out, "images") else out.frames


def sd3(seed=0):
    """A tiny ``StableDiffusion3Pipeline`` without text encoders, and the embeddings to call it with."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(seed)
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=8, out_channels=4,
        pos_embed_max_size=16,
    ).eval()  # fmt: skip
    none = dict.fromkeys(
        ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    )
    pipe = quiet(
        StableDiffusion3Pipeline(
            transformer=model, vae=vae(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **none
        )
    )
    given = {
        "prompt_embeds": torch.randn(1, 5, 12), "negative_prompt_embeds": torch.randn(1, 5, 12),
        "pooled_prompt_embeds": torch.randn(1, 8), "negative_pooled_prompt_embeds": torch.randn(1, 8),
        "height": 8, "width": 8,
    }  # fmt: skip
    return pipe, given


def flux(seed=0):
    """A tiny ``FluxPipeline`` without text encoders, and the embeddings to call it with."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(seed)
    model = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    none = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = quiet(FluxPipeline(transformer=model, vae=vae(), scheduler=FlowMatchEulerDiscreteScheduler(), **none))
    given = {
        "prompt_embeds": torch.randn(1, 5, 12), "negative_prompt_embeds": torch.randn(1, 5, 12),
        "pooled_prompt_embeds": torch.randn(1, 8), "negative_pooled_prompt_embeds": torch.randn(1, 8),
        "height": 8, "width": 8, "true_cfg_scale": 2.0,
    }  # fmt: skip
    return pipe, given


def dit(seed=0):
    from diffusers import DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        sample_size=8, in_channels=4, out_channels=8, num_layers=2, num_attention_heads=2, attention_head_dim=8,
        patch_size=2, num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip
    return quiet(DiTPipeline(transformer=model, vae=vae(), scheduler=scheduler()))


def pixart(seed=0):
    """A tiny ``PixArtSigmaPipeline`` without text encoder, and the embeddings to call it with."""
    from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel

    torch.manual_seed(seed)
    model = PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, caption_channels=12,
        in_channels=4, cross_attention_dim=16, out_channels=8, attention_bias=True, use_additional_conditions=False,
    ).eval()  # fmt: skip
    pipe = quiet(
        PixArtSigmaPipeline(tokenizer=None, text_encoder=None, vae=vae(), transformer=model, scheduler=scheduler())
    )
    given = {
        "prompt": None, "negative_prompt": None, "prompt_embeds": torch.randn(1, 5, 12),
        "negative_prompt_embeds": torch.randn(1, 5, 12), "prompt_attention_mask": torch.ones(1, 5),
        "negative_prompt_attention_mask": torch.ones(1, 5), "height": 8, "width": 8, "use_resolution_binning": False,
    }  # fmt: skip
    return pipe, given


def sdxl(folder):
    """A tiny ``StableDiffusionXLPipeline``."""
    from diffusers import StableDiffusionXLPipeline

    tokens = clip_tokenizer(folder)
    model = unet(
        cross=32, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=4 * 6 + 16,
    )  # fmt: skip
    return quiet(
        StableDiffusionXLPipeline(
            vae=vae(), text_encoder=text_encoder(len(tokens)), text_encoder_2=text_encoder(len(tokens), 16, 4, True),
            tokenizer=tokens, tokenizer_2=tokens, unet=model, scheduler=scheduler(), add_watermarker=False,
        )
    )  # fmt: skip


def ip_state(model, width=6, tokens=4, seed=7):
    """Random weights of an IP-Adapter for a U-Net, as released ones are laid out."""
    torch.manual_seed(seed)
    cross = model.config.cross_attention_dim
    state = {
        "image_proj": {
            "proj.weight": torch.randn(tokens * cross, width), "proj.bias": torch.randn(tokens * cross),
            "norm.weight": torch.ones(cross), "norm.bias": torch.zeros(cross),
        },
        "ip_adapter": {},
    }  # fmt: skip
    for number, (name, _) in enumerate(model.attn_processors.items()):
        if "attn2" in name:
            hidden = model.get_submodule(name.rpartition(".")[0]).to_q.out_features
            for what in ("to_k_ip", "to_v_ip"):
                state["ip_adapter"][f"{number}.{what}.weight"] = torch.randn(hidden, cross) / 4
    return state


def deepfloyd(seed=0):
    """A tiny ``IFPipeline`` without a text encoder, and the embeddings to call it with."""
    from diffusers import DDPMScheduler, IFPipeline, UNet2DConditionModel

    torch.manual_seed(seed)
    model = UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=6, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), cross_attention_dim=12,
        encoder_hid_dim=10, encoder_hid_dim_type="text_proj", attention_head_dim=4, norm_num_groups=4,
        resnet_time_scale_shift="scale_shift",
    ).eval()  # fmt: skip
    pipe = IFPipeline(
        tokenizer=None, text_encoder=None, unet=model, safety_checker=None, feature_extractor=None, watermarker=None,
        scheduler=DDPMScheduler(variance_type="learned_range"), requires_safety_checker=False,
    )  # fmt: skip
    given = {"prompt_embeds": torch.randn(1, 5, 10), "negative_prompt_embeds": torch.randn(1, 5, 10)}
    return quiet(pipe), given


def animatediff(pipe):
    """A tiny ``AnimateDiffPipeline`` of the parts of a :func:`stable_diffusion`."""
    import diffusers

    motion = diffusers.MotionAdapter(
        block_out_channels=(16, 32), motion_layers_per_block=1, motion_num_attention_heads=2,
        motion_norm_num_groups=4, motion_max_seq_length=8, use_motion_mid_block=False,
    )  # fmt: skip
    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    return quiet(diffusers.AnimateDiffPipeline(**parts, unet=unet(size=8), motion_adapter=motion))
