"""VHR: amplify the heads that look at the image.

With ``A[l, i]`` the output of head ``i`` of layer ``l`` at the last position of the prompt, before the output
projection, and ``A'[l, i]`` the same after the image tokens are taken out of the prompt, the divergence of a head is

    ``VHD[l, i] = |A[l, i] - A'[l, i]|_2``.

Heads whose divergence is an outlier because they are loud without the image do not count:
``VHD[l, i] = 0`` if ``VHD[l, i] > mean + std`` and ``|A'[l, i]|^2 > mean + std``, over the heads of the layer. Heads
above the median of their layer are multiplied by ``alpha``, at the whole prompt and at all new tokens.

Heads are chosen per sample, once per prompt, layer by layer: at a layer both prompts have earlier layers reinforced
already (``selection="layers"``, which reads the prompt without image twice); ``selection="passes"`` compares the two
untouched prompts and takes one more forward pass of the full prompt. Positions of the prompt without image are counted
anew.

No code of the authors is available; this follows the paper. It does not say whether ``std`` divides by ``H`` or by
``H - 1``: by ``H - correction``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import check_float, check_int, shaped
from ..hooks.branches import BlockPass, NoImage, Prompt, check_branches
from ..hooks.intervention import Intervention, implements
from ..hooks.session import Session
from ..hooks.site import Site
from ..hooks.tokens import IMAGE
from ..types import check_choice, stats_dtype, to_list
from .contrastive import ContrastiveDecoding


@shaped(with_image="float (B, H, D)", without="float (B, H, D)")
def head_divergence(with_image: Tensor, without: Tensor, outliers: bool = True, correction: int = 1) -> Tensor:
    """How much each head's output changes when the image is taken away.

    Args:
        with_image: (B, H, D) A.
        without: (B, H, D) A'.
        outliers: set heads to 0 that stand out and are loud without the image.
        correction: the standard deviations of that rule divide by ``H - correction``, 1 or 0.

    Returns:
        (B, H).

    >>> head_divergence(torch.tensor([[[3.0, 4.0], [1.0, 0.0]]]), torch.zeros(1, 2, 2)).tolist()
    [[5.0, 1.0]]
    """
    check_int("correction", correction, least=0, most=1)
    dtype = stats_dtype(with_image.dtype)
    divergence = (with_image.to(dtype) - without.to(dtype)).norm(dim=-1)
    if not outliers or divergence.shape[1] < 2:
        return divergence
    loud = without.to(dtype).square().sum(-1)

    def above(x: Tensor) -> Tensor:
        return x > x.mean(1, keepdim=True) + x.std(1, correction=correction, keepdim=True)

    return divergence.masked_fill(above(divergence) & above(loud), 0.0)


@shaped(divergence="float (B, H)")
def sensitive_heads(divergence: Tensor) -> Tensor:
    """(B, H) boolean: heads above the median of their layer; half of them, where all differ.

    >>> sensitive_heads(torch.tensor([[1.0, 4.0, 3.0, 2.0]])).tolist()
    [[False, True, True, False]]
    """
    if not divergence.shape[1]:
        raise ValueError(f"divergence must be that of at least one head, got {tuple(divergence.shape)}")
    return divergence > divergence.median(1, keepdim=True).values


@shaped()
def token_divergence(divergences: Mapping[int, Tensor], k: int) -> Tensor:
    """T-VHD: how much a token relies on the image, the sum over layers of their ``k`` largest divergences.

    Args:
        divergences: ``{layer: (B, H)}``.
        k: heads of each layer.

    Returns:
        (B,).

    >>> token_divergence({0: torch.tensor([[1.0, 2.0, 4.0]])}, 2).tolist()
    [6.0]
    """
    if not divergences:
        raise ValueError("divergences is empty")
    check_int("k", k, least=1)
    for layer, d in divergences.items():
        check_float(f"divergences[{layer!r}]", d)
        if d.dim() != 2 or d.shape[1] < k:
            raise ValueError(f"divergences[{layer!r}] must be (B, H) with at least k={k} heads, got {tuple(d.shape)}")
    return torch.stack([d.topk(k, 1).values.sum(1) for d in divergences.values()]).sum(0)


class HeadDivergence(ContrastiveDecoding):
    """Measure, token by token, how much each head and each token relies on the image; nothing is changed.

    The prompt without image is decoded beside the full one and reads the same new tokens. Results, a row per token:
    ``"divergence"``: ``{layer: (steps, B, H)}``, ``"reliance"``: T-VHD, (steps, B). Rows without image are 0.

    Args:
        k: heads of each layer that count for T-VHD.
        layers: layers to look at; ``None`` for all.
        outliers: see :func:`head_divergence`.
        correction: see :func:`head_divergence`.

    Reference: He et al., 2024, arXiv 2412.13949, section 3.

    >>> HeadDivergence(k=4).k
    4
    """

    name: ClassVar[str] = "head-divergence"
    always: ClassVar[bool] = True

    def __init__(
        self, k: int = 1, layers: Sequence[int | str] | None = None, outliers: bool = False, correction: int = 1
    ):
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        check_int("correction", correction, least=0, most=1)
        super().__init__(NoImage(), 1.0, 0.0)
        self.k, self.outliers, self.correction = k, outliers, correction
        self.layers = to_list("layers", layers)

    @property
    def identity(self) -> bool:
        return False

    def reset(self) -> None:
        super().reset()
        self._last: dict[tuple[str | None, int], Tensor] = {}
        self._steps: list[dict[int, Tensor]] = []

    def wants(self, site: Site) -> bool:
        if self.k > site.heads:
            raise ValueError(f"k={self.k}, but layer {site.layer} ({site.name}) has {site.heads} heads")
        return True

    def on_output(self, site: Site, out: Tensor) -> Tensor:
        if site.branch in (None, self._branch_name):
            self._last[site.branch, site.layer] = out[:, :, -1].detach()
        return out

    def on_logits(self, ids: Tensor, logits: Tensor) -> Tensor:
        if self.session.branch is not None:
            return logits
        read = self.session.notes.total
        if read is not None and self.session.prompt.get("input_ids") is not None and ids.shape[1] < read:
            raise ValueError(
                f"HeadDivergence looks at the last token that the model read, but it read {read - ids.shape[1]} drafts "
                "after it (assistant_model, prompt_lookup_num_tokens), which are not served"
            )
        before = self.forwards
        state = self._follow(ids, logits)
        if state is not None and self.forwards > before:
            if ids.shape[1] == state.start:
                self._steps.clear()
            layers = sorted(layer for branch, layer in self._last if branch is None)
            found = {n: (self._last[None, n], self._last[self._branch_name, n]) for n in layers}
            self._steps.append(
                {
                    n: head_divergence(a, b, self.outliers, self.correction) * state.image[:, None]
                    for n, (a, b) in found.items()
                }
            )
        return logits

    def results(self) -> dict[str, Any]:
        """Of the last prompt and its new tokens, see the class."""
        if not self._steps:
            return {"divergence": {}, "reliance": None}
        table = {layer: torch.stack([step[layer] for step in self._steps]) for layer in self._steps[0]}
        return {
            "divergence": table,
            "reliance": torch.stack([token_divergence(step, self.k) for step in self._steps]),
        }


class HeadReinforcement(Intervention):
    """Amplify, per sample, the heads whose output depends most on the image.

    Token types come from ``attach(..., token_types=...)``. Prompts and rows without image are left alone.

    Args:
        alpha: factor of the chosen heads.
        layers: layers to reinforce; by default the second one and the last 14 (LLaVA-1.5 and LLaVA-NeXT with 32
            layers), as far as the model has them.
        outliers: leave out heads that stand out and are loud without the image.
        selection: ``"layers"`` or ``"passes"``, see the module.
        correction: see :func:`head_divergence`.

    Raises:
        ValueError: a factor that is not positive, layers that do not exist.

    Reference: He et al., 2024, arXiv 2412.13949, sections 3 and 4.

    >>> HeadReinforcement(alpha=2.0, layers=[1, -1]).layers
    [1, -1]
    """

    name: ClassVar[str] = "head-reinforcement"
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    needs_types: ClassVar[bool] = True

    #: Branches of the passes that only look.
    TEXT, LOOK = "vhr-text", "vhr-look"

    def __init__(
        self,
        alpha: float = 2.0,
        layers: Sequence[int | str] | None = None,
        outliers: bool = True,
        selection: str = "layers",
        correction: int = 1,
    ):
        if not 0 < alpha < float("inf"):
            raise ValueError(f"alpha must be positive, got {alpha}")
        check_choice("selection", selection, ("layers", "passes"))
        check_int("correction", correction, least=0, most=1)
        self.alpha, self.outliers, self.selection, self.correction = float(alpha), outliers, selection, correction
        self.layers = to_list("layers", layers)
        self.reset()

    @property
    def identity(self) -> bool:
        return self.alpha == 1.0

    def reset(self) -> None:
        self._heads: dict[int, Tensor] = {}
        self._divergence: dict[int, Tensor] = {}
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_text": None}  # a copy reads its own prompt

    def _forget(self) -> None:
        self._text: BlockPass | None = None
        self._image: Tensor | None = None
        self._last: dict[tuple[str, int], Tensor] = {}

    def results(self) -> dict[str, Any]:
        """Of the last prompt: ``{layer: (B, H)}`` divergences, and which heads were chosen."""
        return {"divergence": dict(self._divergence), "heads": dict(self._heads)}

    def wants(self, site: Site) -> bool:
        if self.layers is not None:
            return True
        count = getattr(getattr(site.module, "config", None), "num_hidden_layers", None)
        return not isinstance(count, int) or site.layer == 1 or site.layer >= count - 14

    # ---- the prompt without image

    def on_attach(self, session: Session) -> None:
        model: Any = session.model
        check_branches(model, "HeadReinforcement", "the prompt without image")
        others = [i for i in session.interventions if i is not self and not i.identity]
        if any(isinstance(i, HeadReinforcement) for i in others):
            raise ValueError("two HeadReinforcements cannot both act on a model; name all layers in one")
        if self.selection == "layers" and (remover := next((i for i in others if implements(i, "on_tokens")), None)):
            raise ValueError(
                f"HeadReinforcement and {type(remover).__name__} cannot both act on this model: the prompt without "
                "image is read block by block beside the full one, where tokens cannot be removed; "
                "selection='passes' composes"
            )
        session.undo(self._forget)

    def on_step(self, step: int) -> None:
        if step:
            return
        self.reset()
        session = self.session
        assert session.tracker is not None and session.tracker.types is not None
        types, given = session.tracker.types, session.prompt
        image = (types == IMAGE).any(1)
        if not bool(image.any()):
            return
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        read = ids if embeds is None else embeds
        assert isinstance(read, Tensor)
        if (session.notes.prompt_length or 0) > read.shape[1]:
            raise ValueError(
                "HeadReinforcement compares the whole prompt with and without image, but it is read in chunks; leave "
                "prefill_chunk_size out"
            )
        self._image = image
        with torch.no_grad():
            reading = NoImage().read(Prompt(session, ids, embeds, types, given))
            self._text = BlockPass(session, reading, self.TEXT)
            if self.selection == "passes":
                with session.at(branch=self.LOOK):
                    session.model(**{**given, "use_cache": True})
                for branch, layer in list(self._last):
                    if branch == self.LOOK:
                        self._choose(layer, self._last[self.LOOK, layer], self._last[self.TEXT, layer])
                self._text, self._last = None, {}

    def _choose(self, layer: int, with_image: Tensor, without: Tensor) -> None:
        assert self._image is not None
        divergence = head_divergence(with_image, without, self.outliers, self.correction)
        self._divergence[layer] = divergence
        self._heads[layer] = sensitive_heads(divergence) & self._image[:, None].to(divergence.device)

    # ---- stages

    def on_output(self, site: Site, out: Tensor) -> Tensor:
        layer, last = site.layer, out[:, :, -1].detach()
        if site.branch in (self.TEXT, self.LOOK):
            self._last[str(site.branch), layer] = last
            if self._text is None or not self._text.stepping:
                return out
            self._choose(layer, self._last["main", layer], last)
            return self._scaled(layer, out)
        if site.branch is not None:
            return out
        if self._text is not None and layer not in self._heads:
            self._last["main", layer] = last
            with torch.no_grad():
                self._text.advance(layer)
        return self._scaled(layer, out)

    def _scaled(self, layer: int, out: Tensor) -> Tensor:
        heads = self._heads.get(layer)
        if heads is None:
            return out
        factor = out.new_ones(heads.shape).masked_fill(heads.to(out.device), self.alpha)
        return out * factor[:, :, None, None]
