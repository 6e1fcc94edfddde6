"""Prompts for a frozen vision transformer: learned tokens that stand beside the patches, layer by layer.

The model is attnlib's ``VisionTransformer`` or one of the shape of timm's (``blocks`` of ``attn`` and ``mlp``, a
``norm``). Prompts enter in front of a block and leave behind it; the model itself is not changed, its weights get no
gradient, and what was learned is saved without them (:meth:`Prompted.trained_state`).

- :class:`PromptCam` (Chowdhury et al., 2025, "Prompt-CAM", arXiv 2501.09333): one prompt per class and one scoring
  vector for all, so that the maps of a class's prompt show what tells the class.
- :class:`TokenPrompts` (Liu et al., 2025, "Token Coordinated Prompt Attention is Needed for Visual Prompting", arXiv
  2505.02406): pools of prompts, of which every token reads those whose keys it resembles. With every prompt for every
  token it is VPT-deep, and with ``fourier=True`` VFPT.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_choice, check_flag, check_int, check_real, checked, describe
from ..grids import Layout
from ..hooks import Intervention, attach
from ..hooks.site import Site

DEPTHS = ("all", "shallow", "deep")
MASKS = ("weights", "scores")


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a vision transformer, in order."""
    for name in ("stages", "blocks"):
        found = getattr(model, name, None)
        if isinstance(found, (nn.ModuleList, nn.Sequential)) and len(found) and hasattr(model, "norm"):
            return list(found)
    raise TypeError(
        f"model must be a vision transformer with blocks and a norm (attnlib's or timm's), got {describe(model)}"
    )


class Prompted(nn.Module):
    """Base: a frozen model with prompts in front of its tokens.

    Args:
        model: the vision transformer; frozen, and kept in evaluation.
        dim: width of its tokens; found where the model says it (``embed_dim`` or ``num_features``).
    """

    def __init__(self, model: nn.Module, dim: int | None = None):
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.depth = len(_blocks(model))
        found = dim if dim is not None else getattr(model, "embed_dim", getattr(model, "num_features", None))
        self.dim = check_int("dim", found, least=1)

    def train(self, mode: bool = True) -> Prompted:
        super().train(mode)
        self.model.eval()
        return self

    def trained_state(self) -> dict[str, Tensor]:
        """What was learned, without the frozen weights; :meth:`load_trained` reads it."""
        learned = {name for name, p in self.named_parameters() if p.requires_grad}
        return {name: value for name, value in self.state_dict().items() if name in learned}

    def load_trained(self, state: Mapping[str, Tensor]) -> None:
        """Read what :meth:`trained_state` gave; ``ValueError`` unless every entry is there and known."""
        own = self.trained_state().keys()
        if state.keys() != own:
            raise ValueError(f"state must hold {sorted(own)}, got {sorted(state)}")
        self.load_state_dict(dict(state), strict=False)

    def prompts(self, layer: int, tokens: Tensor) -> Tensor | None:
        """(B, P, C) prompts in front of the tokens (B, N, C) of a layer; ``None``: what stands there stays."""
        raise NotImplementedError

    def leave(self, layer: int) -> bool:
        """Whether the prompts of a layer leave behind it."""
        return True

    def run(self, images: Tensor, *acting: Intervention) -> tuple[Any, Tensor | None]:
        """The model's answer, and what became of the prompts in the last block (B, P, C)."""
        held: dict[str, Any] = {"count": 0, "last": None}

        def enter(layer: int) -> Any:
            def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                x, rest = args[0], list(args[1:])
                held["grid"] = x.shape[1:-1]
                x = x.flatten(1, -2)
                new = self.prompts(layer, x[:, held["count"] :])
                if new is not None:
                    x = torch.cat([new.to(x.dtype), x[:, held["count"] :]], 1)
                    held["count"] = new.shape[1]
                if len(rest) == 4:  # of attnlib's blocks: valid, carry, losses, layout
                    count, valid, layout = held["count"], rest[0], rest[3]
                    extra = 0 if valid is None else x.shape[1] - valid.flatten(1).shape[1]
                    rest[0] = None if valid is None else F.pad(valid.flatten(1), (extra, 0), value=True)
                    before = () if layout is None else tuple(s for s in layout.segments if s[0] != "prompts")
                    rest[3] = Layout((("prompts", count), *before)) if before else None
                return (x, *rest), kwargs

            return hook

        def go(layer: int) -> Any:
            def hook(block: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
                y = out[0] if isinstance(out, tuple) else out
                count = held["count"]
                if layer == self.depth - 1:
                    held["last"] = y[:, :count]
                if self.leave(layer) or layer == self.depth - 1:
                    y, held["count"] = y[:, count:], 0
                    y = y.unflatten(1, held["grid"]) if len(held["grid"]) > 1 else y
                return (y, *out[1:]) if isinstance(out, tuple) else y

            return hook

        with ExitStack() as stack:
            if acting:
                stack.enter_context(attach(self.model, *acting))
            for layer, block in enumerate(_blocks(self.model)):
                for handle in (
                    block.register_forward_pre_hook(enter(layer), with_kwargs=True),
                    block.register_forward_hook(go(layer), with_kwargs=True),
                ):
                    stack.callback(handle.remove)
            return self.model(images), held["last"]


class _Maps(Intervention):
    """Keep the weights of the last layer's first rows."""

    name = "prompt maps"
    layers = (-1,)
    whole_map = True

    def __init__(self, rows: int):
        self.rows = rows
        self.found: Tensor | None = None

    def on_weights(self, site: Site, weights: Tensor, rows: Tensor) -> Tensor:
        self.found = weights[:, :, : self.rows]
        return weights


class _Blur(Intervention):
    """Scores of one row become zero in some heads of the last layer, so that it reads everything alike."""

    name = "blurred heads"
    layers = (-1,)
    whole_map = True

    def __init__(self, heads: Sequence[int], row: int):
        self.heads, self.row = list(heads), row

    def on_scores(self, site: Site, scores: Tensor, rows: Tensor) -> Tensor:
        hidden = torch.zeros(scores.shape[1:3], dtype=torch.bool, device=scores.device)
        hidden[self.heads, self.row] = True
        return scores.masked_fill(hidden[None, :, :, None], 0.0)


class _Apart(Intervention):
    """Nobody reads a prompt but itself."""

    name = "prompts apart"
    whole_map = True

    def __init__(self, owner: PromptCam):
        self.owner = owner

    def on_scores(self, site: Site, scores: Tensor, rows: Tensor) -> Tensor:
        count = self.owner.count(int(site.layer))
        other = torch.zeros(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        other[:, :count] = True
        other[:count, :count] = ~torch.eye(count, dtype=torch.bool, device=scores.device)
        return scores.masked_fill(other, float("-inf"))


class PromptCam(Prompted):
    """Prompt-CAM: ``logit_c = w LN(z_c) + b`` with ``z_c`` what the prompt of class c has become behind the last block.

    Trained: ``depth * C * D + D + 1`` numbers with prompts in all layers (CUB-200 on ViT-B: 1,843,969).

    Args:
        model: the vision transformer; frozen.
        num_classes: C.
        depth: ``"all"``: prompts of classes in front of every block, those of the block before leave (the release);
            ``"shallow"``: in front of the first, from where they go through all; ``"deep"``: in front of the last,
            with ``num_agnostic`` prompts of no class before it (our reading of the paper).
        num_agnostic: prompts in front of the other blocks, with ``depth="deep"``.
        apart: nobody reads a prompt but itself, so that the score of a class does not depend on which others exist. The
            release has no such mask: False.
        drop: dropout of prompts in training.
        patch_size: of the model's patches, for the start of the prompts; found where the model says it.
        dim: width of tokens, where the model does not say it.

    Reference: Chowdhury et al., 2025, arXiv 2501.09333.
    """

    @checked
    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        depth: str = "all",
        num_agnostic: int = 10,
        apart: bool = False,
        drop: float = 0.0,
        patch_size: int | None = None,
        dim: int | None = None,
    ):
        super().__init__(model, dim)
        check_choice("depth", depth, DEPTHS)
        self.num_classes = check_int("num_classes", num_classes, least=1)
        self.where, self.apart = depth, check_flag("apart", apart)
        agnostic = check_int("num_agnostic", num_agnostic, least=0) if depth == "deep" else 0
        layers = self.depth if depth == "all" else 1
        self.class_prompts = nn.Parameter(torch.empty(layers, num_classes, self.dim))
        self.agnostic = nn.Parameter(torch.empty(self.depth - 1, agnostic, self.dim)) if agnostic else None
        side = _patch_size(model) if patch_size is None else patch_size
        bound = math.sqrt(6.0 / (3 * side * side + self.dim))
        for p in (self.class_prompts, self.agnostic):
            if p is not None:
                nn.init.uniform_(p, -bound, bound)
        self.drop, self.score = nn.Dropout(drop), nn.Linear(self.dim, 1)

    def count(self, layer: int) -> int:
        """Prompts in front of a block."""
        if self.where == "deep" and layer < self.depth - 1:
            return 0 if self.agnostic is None else self.agnostic.shape[1]
        return self.num_classes

    def prompts(self, layer: int, tokens: Tensor) -> Tensor | None:
        own: Tensor | None
        if self.where == "all":
            own = self.class_prompts[layer]
        elif self.where == "shallow":
            own = self.class_prompts[0] if layer == 0 else None
        else:
            own = self.class_prompts[0] if layer == self.depth - 1 else None
            own = self.agnostic[layer] if own is None and self.agnostic is not None else own
        return None if own is None else self.drop(own).expand(len(tokens), -1, -1)

    def leave(self, layer: int) -> bool:
        return self.where != "shallow"

    def forward(self, images: Tensor, blurred: Sequence[int] = (), target: int = 0) -> Tensor:
        """(B, C) logits.

        Args:
            images: what the model takes.
            blurred: heads of the last block in which the prompt of ``target`` reads all tokens alike.
            target: a class.
        """
        return self._scored(images, *([_Blur(blurred, self._class(target))] if len(blurred) else []))

    def _class(self, target: int) -> int:
        return check_int("target", target, least=0, most=self.num_classes - 1)

    def _scored(self, images: Tensor, *acting: Intervention) -> Tensor:
        _, z = self.run(images, *([_Apart(self)] if self.apart else []), *acting)
        norm: Any = self.model.norm
        return self.score(norm(z)).squeeze(-1)

    @torch.no_grad()
    def maps(self, images: Tensor) -> Tensor:
        """(B, heads, C, N): how much the prompt of every class reads of the patches, in the last block.

        A row sums to less than one: prompts and class token are read, too.
        """
        kept = _Maps(self.num_classes)
        self._scored(images, kept)
        assert kept.found is not None
        return kept.found[..., self.num_classes + _prefix(self.model) :]

    @torch.no_grad()
    def rank_heads(self, image: Tensor, target: int) -> list[int]:
        """Heads of the last block, the most important for a class first.

        Greedily: the head whose blurring leaves the class most probable is blurred first, until all are; the order is
        the reverse of that.

        Args:
            image: (1, ...) one image.
            target: the class.
        """
        if len(image) != 1:
            raise ValueError(f"image must be one image, got {describe(image)}")
        left = list(range(self.maps(image).shape[1]))
        gone: list[int] = []
        while left:
            kept = [float(self(image, [*gone, head], target).softmax(-1)[0, target]) for head in left]
            gone.append(left.pop(max(range(len(left)), key=kept.__getitem__)))
        return gone[::-1]

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' prompts and head (``vpt.prompt_embeddings``, ``vpt_cls_head.*`` or ``head.*``), for
        :meth:`Prompted.load_trained`; entries of the backbone are left out.
        """
        if "vpt.prompt_embeddings" not in state_dict:
            raise ValueError("state_dict has no 'vpt.prompt_embeddings', which the authors' models have")
        head = next((h for h in ("vpt_cls_head", "prompt_cam_head", "head") if f"{h}.weight" in state_dict), None)
        if head is None or state_dict[f"{head}.weight"].shape[0] != 1:
            raise ValueError("state_dict has no head of one score, which the authors' Prompt-CAM models have")
        out = {"class_prompts": state_dict["vpt.prompt_embeddings"]}
        return out | {f"score.{kind}": state_dict[f"{head}.{kind}"] for kind in ("weight", "bias")}


def _patch_size(model: Any) -> int:
    found = getattr(model, "patch_size", getattr(getattr(model, "patch_embed", None), "patch_size", 16))
    return int(found[0] if isinstance(found, (tuple, list)) else found)


def _prefix(model: Any) -> int:
    return int(getattr(model, "num_prefix_tokens", 1))


class _Chosen(Intervention):
    """Tokens read the prompts that were chosen for them."""

    name = "chosen prompts"
    whole_map = True

    def __init__(self, owner: TokenPrompts):
        self.owner = owner

    def _hidden(self, weights: Tensor) -> Tensor:
        """(B, 1, N, M): prompts that a token does not read; prompts themselves read all."""
        allowed = self.owner.allowed
        assert allowed is not None
        count = allowed.shape[-1]
        return F.pad(~allowed, (0, weights.shape[-1] - count, count, 0), value=False).unsqueeze(1)

    def on_weights(self, site: Site, weights: Tensor, rows: Tensor) -> Tensor:
        return weights.masked_fill(self._hidden(weights), 0.0) if self.owner.mask == "weights" else weights

    def on_scores(self, site: Site, scores: Tensor, rows: Tensor) -> Tensor:
        return scores.masked_fill(self._hidden(scores), float("-inf")) if self.owner.mask == "scores" else scores


class TokenPrompts(Prompted):
    """TCPA: the class token reads its own pool of prompts, a patch another one, each the k whose keys it resembles.

    In front of every block stand ``n_c t_c + n_i t_i`` prompts, which leave behind it. With ``sim`` the cosine of a
    token of the block's input and a key, a token reads the prompts of the ``topk`` largest; its weights for the others
    become zero behind the softmax, as released (rows then sum to less than one, and the others' keys still count in its
    denominator), or their scores ``-inf``. Choices have no gradient: keys learn by the distance loss,
    ``sum_layers mean(1 - sim)`` over what was chosen, of class token and patches. Trained, beside the head: ``(n t + n)
    C`` numbers per pool and layer.

    Args:
        model: the vision transformer with a class token; frozen but for its head.
        pool_size: prompts to choose from, of the class token and of patches; 0 for no pool.
        num_tokens: tokens of a prompt, of either.
        topk: how many a token reads, of either.
        mask: ``"weights"``: behind the softmax, as released; ``"scores"``: before it.
        cross: class token and patches also read all of the other's pool. With ``topk=pool_size`` this is VPT-deep.
        fourier: prompts are the real part of their Fourier transform over channels and prompts (VFPT).
        drop: dropout of prompts in training.
        dim: width of tokens, where the model does not say it.

    What differs from the authors' code: any depth, width, head and token count; the mask is not repeated over heads;
    its switches for random prompts, affine values, pixel prompts and SimAM, which its recipe leaves off, do not exist.

    Reference: Liu et al., 2025, arXiv 2505.02406.
    """

    @checked
    def __init__(
        self,
        model: nn.Module,
        pool_size: tuple[int, int] = (20, 20),
        num_tokens: tuple[int, int] = (4, 4),
        topk: tuple[int, int] = (3, 3),
        mask: str = "weights",
        cross: bool = False,
        fourier: bool = False,
        drop: float = 0.1,
        dim: int | None = None,
    ):
        super().__init__(model, dim)
        check_choice("mask", mask, MASKS)
        if _prefix(model) != 1:
            raise ValueError(f"model must have one token beside its patches, the class token, got {_prefix(model)}")
        for name, pair in (("pool_size", pool_size), ("num_tokens", num_tokens), ("topk", topk)):
            if len(pair) != 2:
                raise ValueError(f"{name} must be a pair, of the class token and of patches, got {pair}")
        for size, tokens, k in zip(pool_size, num_tokens, topk, strict=True):
            check_int("pool_size", size, least=0)
            check_int("num_tokens", tokens, least=1)
            if not 0 <= k <= size:
                raise ValueError(f"topk={topk} chooses more prompts than pool_size={pool_size} has")
        self.topk, self.num_tokens, self.mask = tuple(topk), tuple(num_tokens), mask
        self.cross, self.fourier = check_flag("cross", cross), check_flag("fourier", fourier)
        self.keys = nn.ParameterList(torch.empty(self.depth, n, self.dim).uniform_(-1, 1) for n in pool_size)
        self.pools = nn.ParameterList(
            torch.empty(self.depth, n, t, self.dim).uniform_(-1, 1)
            for n, t in zip(pool_size, num_tokens, strict=True)
        )  # fmt: skip
        self.drop = nn.Dropout(check_real("drop", drop, least=0, below=1))
        head: Any = getattr(model, "head", None)
        if isinstance(head, nn.Module):
            head.requires_grad_(True)
        self.allowed: Tensor | None = None
        self._random, self._distances = False, []  # type: ignore[var-annotated]

    def _choose(self, which: int, layer: int, tokens: Tensor) -> Tensor:
        """(B, N, n t): the prompts of a pool that tokens (B, N, C) read."""
        keys, k = self.keys[which][layer], self.topk[which]
        sim = F.normalize(tokens, dim=-1) @ F.normalize(keys, dim=-1).T
        index = (torch.rand_like(sim) if self._random else sim).topk(k, -1).indices
        if k:
            self._distances.append((1 - sim.gather(-1, index)).mean())
        chosen = torch.zeros_like(sim, dtype=torch.bool).scatter(-1, index, True)
        return chosen.repeat_interleave(self.num_tokens[which], -1)

    def prompts(self, layer: int, tokens: Tensor) -> Tensor | None:
        own = [self._choose(which, layer, part) for which, part in enumerate((tokens[:, :1], tokens[:, 1:]))]
        sizes = [o.shape[-1] for o in own]
        rows = []
        for which, chosen in enumerate(own):
            other = chosen.new_full((*chosen.shape[:2], sizes[1 - which]), self.cross)
            rows.append(torch.cat([chosen, other] if which == 0 else [other, chosen], -1))
        self.allowed = torch.cat(rows, 1)
        made = self.drop(torch.cat([pool[layer].flatten(0, 1) for pool in self.pools]).expand(len(tokens), -1, -1))
        if self.fourier:
            high = made.float()
            made = torch.fft.fft(torch.fft.fft(high, dim=-1), dim=-2).real.to(made.dtype)
        return made

    def forward(self, images: Tensor, random: bool = False) -> tuple[Tensor, Tensor]:
        """The model's logits, and the distance loss to be weighed and added (10 in the authors' recipe).

        Args:
            images: what the model takes.
            random: choose prompts at random, as in the first epochs.
        """
        self._random, self._distances = check_flag("random", random), []
        try:
            logits, _ = self.run(images, _Chosen(self))
            loss = sum(self._distances) if self._distances else logits.new_zeros(())
        finally:
            self.allowed, self._distances, self._random = None, [], False
        return logits, loss  # type: ignore[return-value]
