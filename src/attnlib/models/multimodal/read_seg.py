"""READ: a token that asks for a mask shows where by what it looks like (Qian et al., 2024, arXiv 2412.17741).

In models that segment what a ``<SEG>`` token asks for, its last hidden state, times those of the image tokens, is a map
that is bright on the target. The map becomes points, on it and off it, which prompt the segmenter beside the token:

``prompt = [points(X s), W_2 relu(W_1 s)]``, ``loss = CE + 2 BCE + 0.5 Dice``

with ``X`` the image tokens' and ``s`` the token's last hidden states. The points move with their map
(:func:`attnlib.ops.points.continuous_points`), so that the mask teaches where to look.

Differs from the authors' code: any number of tokens per sample, each with points of its own (theirs leaves samples with
more than one out); the image tokens are those of each sample (theirs takes the places of the first); the row of the
token is learned, and not the whole table and head; points are not cut to whole pixels (``compat="authors"``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...checks import (
    check_axes,
    check_choice,
    check_flag,
    check_float,
    check_int,
    check_real,
    check_type,
    check_whole,
    readable,
)
from ...nn.released import Released
from ...ops.points import similarity_points, square_grid
from .losses import mask_loss
from .segmenter import PromptedMasks, check_sizes
from .task_tokens import TaskTokens, UseTaskTokens


class Segmented(NamedTuple):
    """Masks that the tokens of one sample asked for.

    Args:
        masks: (K, height, width) logits.
        points: (K, P, 2) ``x, y`` in pixels of the image.
        labels: (K, P): 1 on it, 0 off it, -1 says nothing.
        slots: (K,) places of the tokens in the sequence.
    """

    masks: Tensor
    points: Tensor
    labels: Tensor
    slots: Tensor


class READ(nn.Module):
    """Masks of segmentation tokens of any transformers model, by transformers' SAM.

    ::

        read = READ(segmenter, seg_token=32000, image_token=32001, dim=4096)
        with attnlib.attach(model, use := read.use()):
            text = model(**inputs, labels=labels).loss
            found = read(*use.last, sizes, pixel_values=pixels)
            loss = text + sum(read.loss(found, masks).values())

    The state dict holds the row of the token, its projection and the mask decoder, not the two models.

    Args:
        segmenter: transformers' ``SamModel``; all of it is frozen but the mask decoder.
        seg_token: id of the token that asks for a mask.
        image_token: id of the placeholders of the image.
        dim: width of the language model.
        count, positive, negative, downsample, side: of :func:`attnlib.ops.points.similarity_points`. READ-13B: 60, 0.6,
            0.2, 1.
        points: prompt with points beside the token; without them it is LISA's.
        continuous: points move with their map, and pass gradients.
        train_decoder: the mask decoder learns.
        outputs: the token's row of the head is learned as well.
        compat: ``"authors"`` cuts points to whole pixels before they move.

    >>> import transformers
    >>> small = dict(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, mlp_dim=16, image_size=64,
    ...     patch_size=8, output_channels=16, num_pos_feats=8)
    >>> sam = transformers.SamModel(transformers.SamConfig(
    ...     vision_config=small, mask_decoder_config=dict(hidden_size=16, mlp_dim=16, num_attention_heads=2,
    ...     iou_head_hidden_dim=16), prompt_encoder_config=dict(hidden_size=16, image_size=64, patch_size=8)))
    >>> read = READ(sam, seg_token=5, image_token=6, dim=12)
    >>> ids, states = torch.tensor([[6] * 16 + [5]]), torch.randn(1, 17, 12)
    >>> read(ids, states, [(40, 50)], pixel_values=torch.randn(1, 3, 64, 64))[0].masks.shape
    torch.Size([1, 40, 50])
    """

    def __init__(
        self,
        segmenter: nn.Module,
        seg_token: int,
        image_token: int,
        dim: int,
        count: int = 30,
        positive: float = 0.8,
        negative: float = 0.2,
        downsample: int = 2,
        side: int = 336,
        points: bool = True,
        continuous: bool = True,
        train_decoder: bool = True,
        outputs: bool = False,
        compat: str | None = None,
    ):
        super().__init__()
        self.masks = PromptedMasks(segmenter, train_decoder)
        self.dim = check_int("dim", dim, least=1)
        self.seg_token = check_int("seg_token", seg_token, least=0)
        self.image_token = check_int("image_token", image_token, least=0)
        if seg_token == image_token:
            raise ValueError(f"seg_token and image_token are both {seg_token}")
        self.count = check_int("count", count, least=1)
        self.positive, self.negative = check_real("positive", positive), check_real("negative", negative)
        if not negative < positive:
            raise ValueError(f"negative must be below positive={positive}, got {negative}")
        self.downsample = check_int("downsample", downsample, least=1)
        self.side = check_int("side", side, least=1)
        self.points, self.continuous = check_flag("points", points), check_flag("continuous", continuous)
        check_choice("compat", compat, (None, "authors"))
        self.compat = compat
        out = self.masks.prompt_dim
        head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, out))
        self.tokens = TaskTokens({"seg": seg_token}, dim, {"seg": head}, outputs=outputs, std=0.02)

    def use(self) -> UseTaskTokens:
        """What to attach: the token's row and states. It refuses company that removes image tokens."""
        return UseTaskTokens(self.tokens, whole=True)

    def image_states(self, ids: Tensor, states: Tensor) -> list[Tensor]:
        """Of every sample, the (P, C) last states of its image tokens."""
        check_whole("ids", ids)
        check_axes("ids", ids, B=None, N=None)
        check_axes("states", states, B=ids.shape[0], N=ids.shape[1], C=self.dim)
        check_float("states", states)
        if readable(states) and not bool(states[(ids == self.image_token) | (ids == self.seg_token)].isfinite().all()):
            raise ValueError("states must be finite where image tokens and mask tokens stand, got NaN or infinity")
        return [s[i == self.image_token] for i, s in zip(ids, states, strict=True)]

    def similarity(self, image: Tensor, asked: Tensor) -> Tensor:
        """(K, h, w) maps of tokens (K, C) over image tokens (P, C)."""
        check_axes("image", image, P=None, C=self.dim)
        check_axes("asked", asked, K=None, C=self.dim)
        grid = square_grid(len(image), "image")
        return (asked.float() @ image.float().T).unflatten(1, grid)

    def forward(
        self,
        ids: Tensor,
        states: Tensor,
        sizes: Sequence[Sequence[int]],
        pixel_values: Tensor | None = None,
        embeddings: Tensor | None = None,
    ) -> list[Segmented]:
        """Masks of every sample of one call of the model.

        Args:
            ids: (B, N) tokens.
            states: (B, N, C) their last hidden states.
            sizes: (height, width) of every image.
            pixel_values: (B, 3, side, side) images as the segmenter reads them, their longer side resized.
            embeddings: instead, (B, C', h, w) that the segmenter made of them.

        Raises:
            ValueError: neither or both of ``pixel_values`` and ``embeddings``; image tokens that fill no square.
        """
        image = self.image_states(ids, states)
        sample, slots = (ids == self.seg_token).nonzero(as_tuple=True)
        return self.segment(states[sample, slots], sample, slots, image, sizes, pixel_values, embeddings)

    def answer(
        self,
        use: UseTaskTokens,
        sequences: Tensor,
        sizes: Sequence[Sequence[int]],
        pixel_values: Tensor | None = None,
        embeddings: Tensor | None = None,
    ) -> list[Segmented]:
        """Masks of sequences (R, L) that ``generate`` gave; sizes and images are those of the R / copies samples."""
        check_type("use", use, UseTaskTokens, "what use() of this READ gave")
        if use.tokens is not self.tokens:
            raise ValueError("use must be what use() of this READ gave, got that of other tokens")
        found = use.found(sequences, ["seg"])
        prompt_ids, prompt_states = use.prompt
        rows = len(sequences)
        if not len(sizes) or rows % len(sizes):
            raise ValueError(f"sizes holds {len(sizes)} images, and there are {rows} sequences")
        if len(prompt_ids) % len(sizes):
            raise ValueError(f"sizes holds {len(sizes)} images, and {len(prompt_ids)} rows of prompts were read")
        copies, beams = rows // len(sizes), len(prompt_ids) // len(sizes)
        image = self.image_states(prompt_ids[::beams], prompt_states[::beams])
        if embeddings is None and pixel_values is not None:
            embeddings = self.masks.encode(pixel_values)
            pixel_values = None
        repeated = [i for i in range(len(sizes)) for _ in range(copies)]
        embeddings = None if embeddings is None else embeddings[repeated]
        sizes = [sizes[i] for i in repeated]
        spread = [image[i] for i in repeated]
        if "seg" not in found:
            none = torch.zeros(0, dtype=torch.long, device=sequences.device)
            return self.segment(prompt_states.new_zeros(0, self.dim), none, none, spread, sizes, None, embeddings)
        seg = found["seg"]
        return self.segment(seg.states, seg.sample, seg.slot, spread, sizes, None, embeddings)

    def segment(
        self,
        asked: Tensor,
        sample: Tensor,
        slots: Tensor,
        image: Sequence[Tensor],
        sizes: Sequence[Sequence[int]],
        pixel_values: Tensor | None = None,
        embeddings: Tensor | None = None,
    ) -> list[Segmented]:
        """Masks of tokens (K, C) of samples (K,) over image tokens, one (P, C) for each sample."""
        if (pixel_values is None) == (embeddings is None):
            raise ValueError("give either pixel_values or embeddings, which the segmenter made of them")
        batch = len(image)
        check_axes("asked", asked, K=None, C=self.dim)
        for name, numbers in (("sample", sample), ("slots", slots)):
            check_axes(name, numbers, K=len(asked))
            check_whole(name, numbers)
        for b, states in enumerate(image):
            check_axes(f"image[{b}]", states, P=None, C=self.dim)
        known = check_sizes("sizes", sizes, batch)
        if embeddings is None:
            assert pixel_values is not None
            embeddings = self.masks.encode(pixel_values)
        check_axes("embeddings", embeddings, B=batch, C=None, h=None, w=None)
        out = []
        for b, size in enumerate(known):
            mine = (sample == b).nonzero()[:, 0]
            if not len(mine):
                nothing = asked.new_zeros(0, dtype=torch.float32)
                labels = torch.zeros(0, 0, dtype=torch.long, device=asked.device)
                out.append(Segmented(nothing.view(0, 1, 1).expand(0, *size), nothing.view(0, 0, 2), labels, mine))
                continue
            out.append(self._one(asked[mine], slots[mine], image[b], size, embeddings[b]))
        return out

    def _one(self, asked: Tensor, slots: Tensor, image: Tensor, size: tuple[int, int], embedding: Tensor) -> Segmented:
        prompts = self.tokens.heads["seg"](asked).unsqueeze(1).to(embedding.dtype)
        points = asked.new_zeros(len(asked), 0, 2, dtype=torch.float32)
        labels = torch.zeros(len(asked), 0, dtype=torch.long, device=asked.device)
        if self.points:
            features = image.unsqueeze(0).expand(len(asked), -1, -1)
            points, labels = similarity_points(
                features, asked, size, self.count, self.positive, self.negative, self.downsample, None, self.side,
                self.continuous, self.compat,
            )  # fmt: skip
            shown = self.masks.point_prompts(points.to(embedding.dtype), labels, size)
            prompts = torch.cat([shown, prompts], 1)
        low = self.masks.decode(embedding, prompts)
        return Segmented(self.masks.full_size(low, size), points, labels, slots)

    def loss(
        self, prediction: Sequence[Segmented], target: Sequence[Tensor], bce: float = 2.0, dice: float = 0.5
    ) -> dict[str, Tensor]:
        """Terms of the loss by name, means over all masks; the model's own text loss goes beside them.

        Args:
            prediction: of :meth:`forward`.
            target: for each sample (K, height, width) of 0 and 1, in the order of its tokens.
            bce, dice: weights.

        Raises:
            ValueError: numbers of masks that differ.
        """
        for name, given in (("prediction", prediction), ("target", target)):
            check_type(name, given, Sequence, "a sequence, one for each sample")
        if len(prediction) != len(target):
            raise ValueError(f"target holds masks of {len(target)} samples, prediction of {len(prediction)}")
        total: dict[str, Tensor] = {}
        count = 0
        for b, (found, truth) in enumerate(zip(prediction, target, strict=True)):
            if found.masks.shape != truth.shape:
                raise ValueError(
                    f"target[{b}] must hold {len(found.masks)} masks of {tuple(found.masks.shape[1:])}, one for each "
                    f"token, got {tuple(truth.shape)}"
                )
            if len(truth):
                count += len(truth)
                for name, term in mask_loss(found.masks, truth, bce, dice).items():
                    total[name] = total.get(name, term.new_zeros(())) + term * len(truth)
        if not count:
            zero = self.tokens.rows.new_zeros(())
            return {"mask_bce": zero, "mask_dice": zero}
        return {name: term / count for name, term in total.items()}

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor], seg_token: int) -> dict[str, Tensor]:
        """From READ's checkpoint, whose language model and encoders are loaded elsewhere.

        Their ``text_hidden_fcs`` and mask decoder are renamed, and the row of ``seg_token`` is taken out of their
        table.
        """
        ours = ("model.text_hidden_fcs.", "model.visual_model.mask_decoder.")
        table = state_dict["model.embed_tokens.weight"]
        kept = {k.removeprefix("model."): v for k, v in state_dict.items() if k.startswith(ours)}
        theirs = Released(kept, "READForCausalLM")
        prefix, to = r"visual_model\.mask_decoder\.", "masks.mask_decoder."
        heads = r"(iou_prediction_head|output_hypernetworks_mlps\.\d+)\.layers"
        out = theirs.renamed(
            {
                r"text_hidden_fcs\.0\.(0|2)\.(weight|bias)": r"tokens.heads.seg.\1.\2",
                prefix + heads + r"\.0\.(weight|bias)": to + r"\1.proj_in.\2",
                prefix + heads + r"\.1\.(weight|bias)": to + r"\1.layers.0.\2",
                prefix + heads + r"\.2\.(weight|bias)": to + r"\1.proj_out.\2",
                prefix + r"output_upscaling\.0\.(weight|bias)": to + r"upscale_conv1.\1",
                prefix + r"output_upscaling\.1\.(weight|bias)": to + r"upscale_layer_norm.\1",
                prefix + r"output_upscaling\.3\.(weight|bias)": to + r"upscale_conv2.\1",
                prefix + r"transformer\.norm_final_attn\.(weight|bias)": to + r"transformer.layer_norm_final_attn.\1",
                prefix + r"(transformer\.layers\.\d+)\.norm(\d)\.(weight|bias)": to + r"\1.layer_norm\2.\3",
                prefix + r"((?:iou_token|mask_tokens)\.weight)": to + r"\1",
                prefix + r"(transformer\..*)": to + r"\1",
            }
        )
        return {**theirs.close(out), "tokens.rows": table[seg_token : seg_token + 1].clone()}
