"""C-Upscale: an image made large in overlapping tiles, under priors of the whole and of each tile.

The small image is resized and noised, and denoised by an image-to-image pipeline whose denoiser runs on tiles
(:class:`attnlib.steer.diffusion.tiles.TiledDenoiser`). Three priors, each of which may be left out:

* *structure*: low frequencies of the estimate of the clean latents are drawn to those of the resized image,
  ``z_0 <- z_0 + w_t (LP(z_L) - LP(z_0))``, w falling as denoising goes on;
* *regions of the prompt*: maps that the small image's own cross-attention gave to the words of the prompt are cut out
  for each tile, m_n in [0, 1], and screen the prompt there, ``A_n <- A_n m_n`` renormalised, so that a tile without an
  object does not paint it again;
* *captions of tiles*: each tile reads a text of its own beside the prompt,
  ``O = a Attn(q, K_p, V_p) + (1 - a) Attn(q, K_r, V_r)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import check_choice, check_rank, check_real, shaped
from ...hooks.denoiser import CallSite
from ...hooks.intervention import Probe
from ...hooks.pipelines import repeated
from ...hooks.site import Site
from ...ops import attention
from .prompts import encode_alone
from .regions import resized
from .tiles import Tile, TiledDenoiser, low_pass

FILTERS = ("ideal", "gaussian")
WHERE = ("estimate", "latents")
SCREENS = ("renormalized", "plain")

#: What a caption is made of: a function of a tile, in shares of the picture, or of its row and column in a table.
Caption = Callable[[Tile], str]


class PromptMaps(Probe):
    """Where in an image each token of the prompt is read, layer by layer: the mean over heads, steps and rows.

    Attach it while the small image is made; :class:`CUpscale` takes it as ``maps``.

    Args:
        layers: numbers or name patterns; ``None`` for all cross-attention.
    """

    name: ClassVar[str] = "prompt-maps"
    kinds: ClassVar[tuple[str, ...]] = ("cross",)

    def __init__(self, layers: Sequence[int | str] | None = None):
        self.layers = layers
        self.reset()

    def reset(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._counts: dict[int, int] = {}
        self._blocks: list[Tensor] = []

    def probe(self, site: Site) -> tuple[Tensor, None] | None:
        layout = site.q_layout
        if layout is None or "image" not in layout.names or len(layout.grid("image")) != 2:
            return None
        self._blocks = []
        return torch.arange(site.n_queries), None

    def observe(self, site: Site, weights: Tensor, rows: Tensor, allowed: Tensor | None) -> None:
        assert site.q_layout is not None
        cond = site.rows_named(("cond",), weights.device)
        if site.prompts is not None and len(set(site.prompts)) > 1:
            raise ValueError("PromptMaps are of one prompt; call the pipeline once for each")
        self._blocks.append(weights[cond].mean((0, 1)))
        if sum(len(block) for block in self._blocks) < site.n_queries:
            return
        whole = torch.cat(self._blocks).T.unflatten(1, site.q_layout.grid("image"))
        self._blocks = []
        if not bool(cond.any()):
            return
        seen = self._sums.get(site.layer)
        self._sums[site.layer] = whole if seen is None else seen + whole
        self._counts[site.layer] = self._counts.get(site.layer, 0) + 1

    def results(self) -> dict[int, Tensor]:
        """``{layer: (L, h, w)}``, each token's map divided by its maximum."""
        means = {layer: total / self._counts[layer] for layer, total in self._sums.items()}
        return {layer: m / m.amax((1, 2), keepdim=True).clamp(min=1e-12) for layer, m in means.items()}


@shaped(estimate="float (B, C, H, W)", structure="float (B or 1, C, H, W)")
def drawn(estimate: Tensor, structure: Tensor, weight: float, cutoff: float = 0.25, how: str = "ideal") -> Tensor:
    """Clean latents with their low frequencies moved by ``weight`` to those of ``structure``.

    >>> x, y = torch.randn(2, 1, 1, 8, 8)
    >>> torch.allclose(drawn(x, y, 1.0, 1.0), y, atol=1e-5)
    True
    """
    return estimate + weight * low_pass(structure - estimate, cutoff, how)


@shaped(maps="float (L, H, W)")
def of_tile(maps: Tensor, tile: Tile, sides: Sequence[int]) -> Tensor:
    """(L, h, w) maps of a whole picture as a tile of it, in shares, sees them, at its own resolution.

    Args:
        maps: of the whole.
        tile: in shares of height and width.
        sides: h and w.
    """
    ys = tile.top + tile.height * (torch.arange(sides[0], device=maps.device) + 0.5) / sides[0]
    xs = tile.left + tile.width * (torch.arange(sides[1], device=maps.device) + 0.5) / sides[1]
    at = torch.stack([xs[None].expand(*sides), ys[:, None].expand(*sides)], -1) * 2 - 1
    found = F.grid_sample(maps[None], at[None].to(maps), padding_mode="border", align_corners=False)
    return found[0].clamp(0, 1)


class CUpscale(TiledDenoiser):
    """A denoiser on tiles under priors of the small image and its prompt.

    ::

        with attnlib.attach(pipe, maps := PromptMaps()):
            small = pipe(prompt).images[0]
        large = StableDiffusionImg2ImgPipeline(**pipe.components)
        structure = CUpscale.encode(large, small, (1024, 1024))
        with attnlib.attach(large, CUpscale(structure=structure, maps=maps, captions=caption)):
            large(prompt, image=small.resize((1024, 1024)), strength=0.7)

    Args:
        structure: (1 or B, C, h, w) clean latents of the small image, resized to the picture's where they differ;
            ``None`` leaves the prior out.
        maps: :class:`PromptMaps` of the small image, or ``{layer: (L, h, w)}`` in [0, 1]; ``None`` leaves it out.
        captions: ``captions(tile) -> str``, the tile in shares of the picture; ``None`` leaves it out.
        weight: w at the first and the last step.
        cutoff, filter: low frequencies, see :func:`attnlib.steer.diffusion.tiles.low_pass`.
        on: the prior of structure acts on the ``"estimate"`` of the clean latents, or on the noisy ``"latents"``,
            against the structure under noise of the seed.
        screen: weights are ``"renormalized"`` after maps were multiplied to them, or left as they are, ``"plain"``.
        share: a, of the prompt beside a caption; a number, or (h, w) shares over the picture.
        tiles: settings of :class:`attnlib.steer.diffusion.tiles.TiledDenoiser`.

    Raises:
        ValueError: at attach, a model outside a pipeline; when it is called, what :class:`TiledDenoiser` refuses, a
            flow model where the prior of structure needs a model of noise, maps of other layers.

    There is no released code and this is our reading of the paper: what the filter is, its cutoff and w, on what it
    acts, that maps are normalised by their maxima, and a are named above and are ours.

    Reference: Qian et al., 2025, arXiv 2505.16976.

    >>> CUpscale(tile=64).running is None
    True
    """

    name: ClassVar[str] = "c-upscale"

    def __init__(
        self,
        structure: Tensor | None = None,
        maps: PromptMaps | Mapping[int, Tensor] | None = None,
        captions: Caption | None = None,
        weight: Sequence[float] = (1.0, 0.0),
        cutoff: float = 0.25,
        filter: str = "gaussian",
        on: str = "estimate",
        screen: str = "renormalized",
        share: float | Tensor = 0.5,
        **tiles: Any,
    ):
        super().__init__(**tiles)
        for name, value, possible in (("filter", filter, FILTERS), ("on", on, WHERE), ("screen", screen, SCREENS)):
            check_choice(name, value, possible)
        if len(weight) != 2:
            raise ValueError(f"weight must be two numbers, of the first and the last step, got {weight!r}")
        self.weight = tuple(check_real("weight", w, least=0, most=1) for w in weight)
        if structure is not None:
            check_rank("structure", structure, 4, "(1 or B, C, h, w)")
        if isinstance(share, Tensor):
            check_rank("share", share, 2, "(h, w)")
        self.structure, self.captions, self.filter, self.on, self.screen = structure, captions, filter, on, screen
        self.cutoff = check_real("cutoff", cutoff, above=0, most=1)
        self.share = share if isinstance(share, Tensor) else check_real("share", share, least=0, most=1)
        found = maps.results() if isinstance(maps, PromptMaps) else maps
        if found is not None and not found:
            raise ValueError("maps are empty: attach PromptMaps while the small image is made")
        for layer, one in (found or {}).items():
            check_rank(f"maps[{layer}]", one, 3, "(L, h, w)")
        self.maps = None if found is None else dict(found)
        self.moves_latents = structure is not None and on == "latents" and any(self.weight)
        uses = {"around_denoiser"}
        if self.captions is not None:
            uses.add("around_attention")
        if self.maps is not None:
            uses.add("on_scores" if screen == "renormalized" else "on_weights")
        self.uses = uses
        if len(uses) > 1:
            self.kinds = ("cross",)  # type: ignore[misc]

    @staticmethod
    def encode(pipe: Any, image: Any, sides: Sequence[int]) -> Tensor:
        """(1, C, h, w) clean latents of an image, resized to ``sides`` in pixels, for ``structure``."""
        pixels = resized(pipe.image_processor.preprocess(image), sides, "bicubic")
        with torch.no_grad():
            latents = pipe.vae.encode(pixels.to(pipe.vae.device, pipe.vae.dtype)).latent_dist.mode()
        return (latents - (getattr(pipe.vae.config, "shift_factor", None) or 0.0)) * pipe.vae.config.scaling_factor

    def on_attach(self, session: Any) -> None:
        if session.sampling is None:
            raise ValueError(
                f"CUpscale acts in a pipeline, and {type(session.model).__name__} was attached to by itself; attach to "
                "the pipeline: attach(pipe, ...)"
            )

    # ---- structure

    def _signal(self, site: CallSite) -> float:
        """abar_t, also between the timesteps of training, as samplers interpolate them."""
        plan = site.sampling.pipe.scheduler
        every = getattr(plan, "alphas_cumprod", None)
        if every is None:
            raise ValueError(
                f"CUpscale draws estimates of clean latents to a structure, for which it needs a model of noise; "
                f"{type(plan).__name__} is of a flow. Leave structure out"
            )
        t = float(torch.as_tensor(site.timestep).flatten()[0])
        low = min(int(t), len(every) - 1)
        sigmas = [float((1 - every[n]) / every[n]) ** 0.5 for n in (low, min(low + 1, len(every) - 1))]
        sigma = sigmas[0] + (sigmas[1] - sigmas[0]) * (t - low)
        return 1 / (1 + sigma**2)

    def around_denoiser(
        self, site: CallSite, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Tensor]
    ) -> Tensor:
        steps = max(1, (site.steps or 1) - 1)
        weight = self.weight[0] + (self.weight[1] - self.weight[0]) * (site.step or 0) / steps
        if self.structure is None or not weight:
            return super().around_denoiser(site, inputs, call)
        main = inputs[site.main]
        channels = self.structure.shape[1]
        noisy = main[:, :channels]
        signal = self._signal(site)
        structure = self._structure(noisy)
        if self.on == "latents":
            if self.session.notes.get((self, "moved")) != site.step:
                self.session.notes[self, "moved"] = site.step
                images = (site.sampling.prompt_count or 1) * site.sampling.images_per_prompt
                noise = torch.randn(structure.shape, generator=torch.Generator().manual_seed(self.seed)).to(structure)
                target = signal**0.5 * structure + (1 - signal) ** 0.5 * noise
                some = noisy[:images] if len(noisy) >= images else noisy
                delta = drawn(some, target[: len(some)], weight, self.cutoff, self.filter) - some
                site.sampling.shift(delta / site.sampling.scale)
                moved = noisy + repeated(delta, len(noisy))
                inputs = {**inputs, site.main: torch.cat([moved, main[:, channels:]], 1)}
            return super().around_denoiser(site, inputs, call)
        out = super().around_denoiser(site, inputs, call)
        kind = getattr(site.sampling.pipe.scheduler.config, "prediction_type", "epsilon")
        found = out[:, :channels]
        a, b = signal**0.5, (1 - signal) ** 0.5
        if kind == "epsilon":
            clean = (noisy - b * found) / a
            new = (noisy - a * drawn(clean, structure, weight, self.cutoff, self.filter)) / b
        elif kind == "v_prediction":
            clean = a * noisy - b * found
            new = (a * noisy - drawn(clean, structure, weight, self.cutoff, self.filter)) / b
        elif kind == "sample":
            new = drawn(found, structure, weight, self.cutoff, self.filter)
        else:
            raise ValueError(f"CUpscale knows no clean latents in predictions of type {kind!r}; leave structure out")
        return torch.cat([new.to(out), out[:, channels:]], 1)

    def _structure(self, like: Tensor) -> Tensor:
        assert self.structure is not None
        found = resized(self.structure.to(like.device, torch.float32), like.shape[-2:], "bicubic").to(like)
        if len(found) > 1 and len(like) % len(found):
            raise ValueError(f"structure is of {len(found)} images, the denoiser reads {len(like)} rows")
        return found.repeat(len(like) // len(found), 1, 1, 1)

    # ---- regions of the prompt

    def _screens(self, site: Site, like: Tensor) -> Tensor | None:
        """(B, 1, N, L) maps of the tiles of a call, 1 in rows that are not conditional; ``None`` outside tiles."""
        assert self.maps is not None
        if self.running is None:
            return None
        if site.layer not in self.maps:
            raise ValueError(
                f"maps are of layers {sorted(self.maps)}, and layer {site.layer} ({site.name}) has none; record "
                "PromptMaps() of all cross-attention, in the same model"
            )
        tiles, sides = self.running
        assert site.q_layout is not None
        grid = site.q_layout.grid("image")
        maps = self.maps[site.layer].to(like)
        if maps.shape[0] != like.shape[-1]:
            raise ValueError(f"maps are of {maps.shape[0]} tokens, layer {site.layer} reads {like.shape[-1]}")
        each = torch.stack([of_tile(maps, tile.shares(sides), grid).flatten(1).T for tile in tiles])
        screens = each.repeat_interleave(len(like) // len(tiles), 0)[:, None]
        rows = site.rows_named(("cond",), like.device).view(-1, 1, 1, 1)
        return torch.where(rows, screens, 1.0)

    def on_scores(self, site: Site, scores: Tensor, rows: Tensor) -> Tensor:
        screens = self._screens(site, scores)
        return scores if screens is None else scores + screens[:, :, rows].log()

    def on_weights(self, site: Site, weights: Tensor, rows: Tensor) -> Tensor:
        screens = self._screens(site, weights)
        return weights if screens is None else weights * screens[:, :, rows]

    # ---- captions of tiles

    def around_attention(self, site: Site, q: Tensor, k: Tensor, v: Tensor, call: Callable[..., Tensor]) -> Tensor:
        out = call(q, k, v)
        if self.running is None:
            return out
        tiles, sides = self.running
        module: Any = site.module
        texts = torch.stack([self._text(tile.shares(sides), k.shape[2], module) for tile in tiles])
        texts = texts.repeat_interleave(len(q) // len(tiles), 0).to(q)
        own_k, own_v = (p(texts).unflatten(-1, (site.kv_heads, -1)).transpose(1, 2) for p in (module.to_k, module.to_v))
        norm = getattr(module, "norm_k", None)
        local = attention(q, own_k if norm is None else norm(own_k), own_v, scale=site.scale)
        share: Any = self.share
        if isinstance(share, Tensor):
            assert site.q_layout is not None
            grid = site.q_layout.grid("image")
            each = [of_tile(share[None].to(q), tile.shares(sides), grid).flatten() for tile in tiles]
            share = torch.stack(each).repeat_interleave(len(q) // len(tiles), 0)[:, None, :, None]
        rows = site.rows_named(("cond",), q.device).view(-1, 1, 1, 1)
        return torch.where(rows, share * out + (1 - share) * local, out)

    def _text(self, tile: Tile, length: int, module: Any) -> Tensor:
        """(L, D) of the caption of a tile; each is asked for and encoded once in a call of the pipeline."""
        assert self.captions is not None
        notes = self.session.notes
        if (self, tile) not in notes:
            caption = self.captions(tile)
            if not isinstance(caption, str):
                raise TypeError(f"captions(tile) must give a text (str), got {type(caption).__name__}")
            like = torch.empty(length, module.to_k.in_features, device=module.to_k.weight.device)
            notes[self, tile] = encode_alone(self.session.sampling, caption, like.to(module.to_k.weight.dtype))
        return notes[self, tile]
