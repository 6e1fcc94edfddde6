"""DRA-Ctrl: a video transformer as a generator of images under a condition image.

The first frame is the condition, the last one the wanted image, those between a transition. Attention goes by segments
``C`` (condition), ``G`` (generated frames), ``T`` (prompt), and ``T_c`` (prompt of the condition, where there is one)::

    C reads C (and T_c),   G reads C, G, T,   T reads G, T,   T_c reads C, T_c

so that the condition never sees what is generated; frames lie ``frame_gap`` apart on the temporal axis of the rotary
positions; adapters (LoRA) act on the condition and on texts, never on generated frames; where a subject is given, the
keys that G reads of its prompt are shifted by a share of their mean size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...checks import check_choice, check_float, check_int, check_rank, check_real, shaped, to_list
from ...hooks.denoiser import CallSite
from ...hooks.eager import eagerly
from ...hooks.intervention import Intervention
from ...hooks.site import Site

#: Which segments (columns C, G, T, T_c) each segment reads.
READS = ((1, 0, 0, 1), (1, 1, 1, 0), (0, 1, 1, 0), (1, 0, 0, 1))
#: Share of the shift in the released task that is given a subject; the others shift nothing.
SUBJECT = 0.6
_TEXT = ("add_", "_context", "context_")


@shaped(condition="float (B, C, 1, h, w)", target="float (B, C, 1, h, w)")
def mixup_frames(condition: Tensor, target: Tensor, count: int = 2) -> Tensor:
    """The clip of a training pair: the condition, ``count`` mixtures of it with the target, the target.

    Args:
        condition, target: latents of both images.
        count: frames between; frame k holds a share ``k / (count + 1)`` of the target.

    Returns:
        (B, C, count + 2, h, w).

    >>> mixup_frames(torch.zeros(1, 1, 1, 1, 1), torch.ones(1, 1, 1, 1, 1), 1).flatten().tolist()
    [0.0, 0.5, 1.0]
    """
    check_int("count", count, least=0)
    shares = torch.linspace(0, 1, count + 2, dtype=condition.dtype, device=condition.device).view(1, 1, -1, 1, 1)
    return torch.lerp(condition, target, shares)


class DimensionReduction(Intervention):
    """A HunyuanVideo transformer of diffusers as a conditional image generator; see the module.

    Call the image-to-video pipeline with the condition as its image and ``num_frames`` for two latent frames and the
    transition (13 with a temporal compression of 4 and two frames between); the image is the last latent frame.

    Args:
        frame_gap: how many video frames two latent frames are apart on the temporal axis; ``None`` for 1 latent frame,
            the plain model's positions.
        compression: video frames per latent frame.
        condition: ``(embeds (B or 1, T_c, C), mask (B or 1, T_c))``, the condition's own prompt, encoded as the other.
        shift: share of the mean size of the prompt's keys by which these are shifted where G reads them:
            :data:`SUBJECT` where a subject is given, 0 for none.
        shift_from: first token of the prompt that is shifted, counted among those that are there; tokens before it
            hold the image.
        adapters: LoRA layers of peft act on the condition and on texts alone, and not on what is one vector a sample.
        compat: ``"authors"`` puts tokens of attention's output side by side and fills up behind them, as the release
            does, which shifts those of the second prompt where the first is padded.
        layers: numbers or name patterns; ``None`` for all joint attention.

    Raises:
        ValueError: fewer than two latent frames, a model of another make, prompts that do not fit.

    Reference: Cao et al., 2025, arXiv 2505.23325.

    >>> DimensionReduction(shift=SUBJECT).stretch
    12
    """

    name: ClassVar[str] = "dra-ctrl"
    kinds: ClassVar[tuple[str, ...]] = ("joint",)
    replaces_mask: ClassVar[bool] = True

    def __init__(
        self,
        frame_gap: int | None = 48,
        compression: int = 4,
        condition: tuple[Tensor, Tensor] | None = None,
        shift: float = 0.0,
        shift_from: int = 144,
        adapters: bool = True,
        compat: str | None = None,
        layers: Sequence[int | str] | None = None,
    ):
        self.compression = check_int("compression", compression, least=1)
        self.frame_gap = None if frame_gap is None else check_int("frame_gap", frame_gap, least=1)
        self.shift = check_real("shift", shift, least=0)
        self.shift_from = check_int("shift_from", shift_from, least=0)
        check_choice("compat", compat, (None, "authors"))
        self.adapters, self.compat, self.layers = adapters, compat, to_list("layers", layers)
        if condition is not None:
            if not isinstance(condition, (tuple, list)) or len(condition) != 2:
                raise TypeError("condition must be (embeds (B or 1, T_c, C), mask (B or 1, T_c)) of its prompt")
            embeds, mask = condition
            check_float("condition", embeds)
            check_rank("condition", embeds, 3, "(B or 1, T_c, C)")
            if not isinstance(mask, Tensor) or mask.shape != embeds.shape[:2]:
                raise ValueError(
                    f"condition: its mask must be {tuple(embeds.shape[:2])} as its embeds, got "
                    f"{tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}"
                )
            condition = embeds, mask
        self.condition = condition
        self._text = self._frame = self._images = 0
        self._there: Tensor | None = None

    @property
    def stretch(self) -> int:
        """How far apart neighbouring latent frames are, in latent frames."""
        return 1 if self.frame_gap is None else self.frame_gap // self.compression

    # ---- attaching

    def on_attach(self, session: Any) -> None:
        model = session.model
        missing = [name for name in ("rope", "context_embedder", "x_embedder") if not hasattr(model, name)]
        if missing or not hasattr(model.rope, "rope_dim"):
            raise ValueError(
                f"{type(model).__name__} is no HunyuanVideo transformer of diffusers: it lacks "
                f"{missing or ['rope.rope_dim']}"
            )
        if self.frame_gap is not None and not self.stretch:
            raise ValueError(
                f"frame_gap={self.frame_gap} is less than one latent frame of compression={self.compression}"
            )
        if self.stretch != 1:
            session.hook(model.rope.register_forward_hook(self._stretched))
        if self.condition is not None:
            plain = model.context_embedder.forward

            def forward(hidden: Tensor, timestep: Tensor, mask: Tensor | None = None) -> Tensor:
                if not session.active or hidden.shape[1] == self._text or mask is None:
                    return plain(hidden, timestep, mask)
                text = plain(hidden[:, : self._text], timestep, mask[:, : self._text])
                own = plain(hidden[:, self._text :], torch.zeros_like(timestep), mask[:, self._text :])
                return torch.cat([text, own], 1)

            session.set_attribute(model.context_embedder, "forward", eagerly(forward))
        if self.adapters:
            for name, module in model.named_modules():
                if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
                    self._by_segment(session, name, module)

    def _stretched(self, module: nn.Module, args: tuple[Any, ...], out: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        from diffusers.models.embeddings import get_1d_rotary_pos_embed

        rope: Any = module
        frames = args[0].shape[2] // rope.patch_size_t
        at = torch.arange(frames, device=out[0].device, dtype=torch.float32).mul(self.stretch)
        new = get_1d_rotary_pos_embed(
            rope.rope_dim[0], at.repeat_interleave(len(out[0]) // frames), rope.theta, use_real=True
        )
        width = new[0].shape[1]
        cos, sin = (torch.cat([part.to(whole), whole[:, width:]], 1) for part, whole in zip(new, out, strict=True))
        return cos, sin

    def _by_segment(self, session: Any, name: str, module: Any) -> None:
        """An adapter that acts on the condition and on texts."""
        adapted, base = module.forward, module.base_layer
        text = any(part in name for part in _TEXT)

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not session.active:
                return adapted(x, *args, **kwargs)
            if x.dim() == 2:
                return base(x)
            if text:
                return adapted(x, *args, **kwargs)
            stop = self._images
            if x.shape[1] not in (stop, stop + (0 if self._there is None else self._there.shape[1])):
                raise ValueError(f"{name} reads {x.shape[1]} tokens, not the {stop} of the frames (and the texts)")
            parts = [adapted(x[:, : self._frame], *args, **kwargs), base(x[:, self._frame : stop])]
            if x.shape[1] > stop:
                parts.append(adapted(x[:, stop:], *args, **kwargs))
            return torch.cat(parts, 1)

        session.set_attribute(module, "forward", eagerly(forward))

    # ---- acting

    def around_denoiser(
        self, site: CallSite, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Tensor]
    ) -> Tensor:
        main, text = inputs[site.main], inputs["encoder_hidden_states"]
        config: Any = site.module.config
        frames = main.shape[2] // config.patch_size_t if main.dim() == 5 else 0
        if frames < 2:
            raise ValueError(
                f"{site.main} of shape {tuple(main.shape)} holds no condition and target: two latent frames at least, "
                "(B, C, frames, h, w)"
            )
        self._frame = (main.shape[3] // config.patch_size) * (main.shape[4] // config.patch_size)
        self._images, self._text = frames * self._frame, text.shape[1]
        mask = inputs.get("encoder_attention_mask")
        mask = text.new_ones(text.shape[:2]) if mask is None else mask
        if self.condition is not None:
            embeds, own = self.condition
            if embeds.shape[-1] != text.shape[-1] or len(embeds) not in (1, len(text)):
                raise ValueError(
                    f"condition's embeds {tuple(embeds.shape)} do not fit the prompt's {tuple(text.shape)}: "
                    "(B or 1, T_c, C)"
                )
            text = torch.cat([text, embeds.to(text).expand(len(text), -1, -1)], 1)
            mask = torch.cat([mask, own.to(mask).expand(len(mask), -1)], 1)
        self._there = mask.bool()
        return call({**inputs, "encoder_hidden_states": text, "encoder_attention_mask": mask})

    def around_attention(self, site: Site, q: Tensor, k: Tensor, v: Tensor, call: Callable[..., Tensor]) -> Tensor:
        there = self._there
        if there is None or q.shape[2] != self._images + there.shape[1] or len(there) != len(q):
            raise ValueError(
                f"layer {site.layer} ({site.name}) attends over {q.shape[2]} tokens, which are not {self._images} of "
                "frames beside the texts"
            )
        there = torch.cat([there.new_ones(len(there), self._images), there], 1).to(q.device)
        numbers = torch.full((q.shape[2],), 1, device=q.device)
        numbers[: self._frame] = 0
        numbers[self._images :] = 2
        numbers[self._images + self._text :] = 3
        reads = torch.tensor(READS, dtype=torch.bool, device=q.device)[numbers][:, numbers]
        mask = (reads & there[:, None])[:, None]
        out = call(q, k, v, mask=mask)
        if self.shift:
            seen = there & (numbers == 2)
            after = (seen & (seen.cumsum(1) > self.shift_from))[:, None, :, None]
            sizes = k.float().abs() if k.dtype in (torch.float16, torch.bfloat16) else k.abs()
            count = after.sum((1, 2, 3), keepdim=True) * (k.shape[1] * k.shape[3])
            mean = (sizes * after).sum((1, 2, 3), keepdim=True) / count.clamp(min=1)
            shifted = call(q, k + (self.shift * mean).to(k.dtype) * after, v, mask=mask)
            out = torch.where((numbers == 1)[:, None], shifted, out)
        out = out * there[:, None, :, None]
        if self.compat is None:
            return out
        order = (~there).to(torch.int8).argsort(dim=1, stable=True)[:, None, :, None].expand_as(out)
        return out.gather(2, order)
