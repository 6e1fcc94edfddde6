"""DyVTE: all image tokens leave the decoder as soon as the text has taken from them what it needs.

After layer l, with ``h_t`` the mean state of the text after the image but its last token, and ``h_last`` the state of
the last token of the prompt, a small network says whether they may leave,

    ``g_l = W2 GELU(W1 [h_t ; h_last])``,  exit at the first l with ``g_l[1] > g_l[0]``.

Every sample leaves where it is ready, once, while its prompt is read; what is left keeps its positions. Caches of the
layers up to the exit still hold the image.

Only these networks are trained, on labels that the model gives itself: image tokens could have left after layer l if
the answer's tokens come out the same (``accuracy`` of them) and their loss grows by less than ``ratio``.

The authors' repository also has gates that read attention instead of states, see :class:`DyVTEByAttention`.

What differs from the authors' code: any number of images anywhere in the prompt, and any batch (theirs knows one image
at tokens 35 to 611, one sample); a prompt with one token of text after the image uses its state twice (theirs averages
an empty set); labels of token id 0 count (``compat="authors"`` leaves them out).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_within, shaped
from ..hooks.attach import attach
from ..hooks.choose import ask
from ..hooks.intervention import Intervention, Probe
from ..hooks.session import Session
from ..hooks.site import Site
from ..hooks.tokens import IMAGE, PAD
from ..types import check_choice
from .base import Reduction, after_image

#: What gates read, in units of what they are told to be wide.
FEATURES = {"states": 2, "attention": 3}


class ExitGate(nn.Module):
    """``W2 GELU(W1 f)``: whether image tokens may leave (the second number is the larger one).

    Args:
        dim: width of f, twice the decoder's.
        hidden: width between.

    >>> sum(p.numel() for p in ExitGate(2 * 4096).parameters())
    16781312
    """

    def __init__(self, dim: int, hidden: int = 2048):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, 2, bias=False)
        for layer in (self.w1, self.w2):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, f: Tensor) -> Tensor:
        """(B, dim) -> (B, 2)."""
        return self.w2(F.gelu(self.w1(f)))


class ExitGates(nn.ModuleList):
    """A gate for every layer of a decoder.

    Args:
        layers: L.
        dim: width of the decoder; with ``features="attention"``, image tokens of a prompt.
        hidden: width inside the gates (288 in the authors' gates that read attention).
        features: what they read: ``"states"``, 2 ``dim`` wide, or ``"attention"``, 3 ``dim`` wide.

    >>> len(ExitGates(32, 8, hidden=16))
    32
    """

    def __init__(self, layers: int, dim: int, hidden: int = 2048, features: str = "states"):
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}")
        check_choice("features", features, FEATURES)
        super().__init__(ExitGate(FEATURES[features] * dim, hidden) for _ in range(layers))

    def __getitem__(self, index: Any) -> Any:
        return nn.ModuleList(list(self)[index]) if isinstance(index, slice) else super().__getitem__(index)

    @classmethod
    def of(cls, model: nn.Module, hidden: int = 2048) -> ExitGates:
        """Untrained gates for a transformers model."""
        config: Any = model.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        return cls(config.num_hidden_layers, config.hidden_size, hidden)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The gates in the authors' state dict of a whole model (``visual_gates_router``).

        Raises:
            ValueError: there are none.
        """
        found = {}
        for name, tensor in state_dict.items():
            match = re.search(r"visual_gates_router\.(\d+\.w[12]\.weight)$", name)
            if match:
                found[match.group(1)] = tensor
        if not found:
            raise ValueError("the state dict has no visual_gates_router, the authors' name of the gates")
        return found


@shaped(hidden="float (B, N, C)", types="whole (B, N)")
def exit_features(hidden: Tensor, types: Tensor) -> Tensor:
    """What a gate reads.

    Args:
        hidden: (B, N, C) states of a prompt, padded on the left.
        types: (B, N) token types.

    Returns:
        (B, 2C): mean state of the text after the image without the last token, and state of the last token.

    >>> exit_features(torch.arange(4.0).reshape(1, 4, 1), torch.tensor([[2, 1, 1, 1]])).tolist()
    [[1.5, 3.0]]
    """
    after = after_image(types)
    last = torch.arange(types.shape[1], device=types.device) == types.shape[1] - 1
    body = after & ~last
    # One token of text after the image: there is nothing before it to average.
    body = torch.where(body.any(1, keepdim=True), body, last.expand_as(body))
    start = int(body.any(0).to(torch.uint8).argmax())  # what comes before is the image and need not be read
    weight = body[:, start:].to(hidden.dtype).unsqueeze(-1)
    return torch.cat([(hidden[:, start:] * weight).sum(1) / weight.sum(1), hidden[:, -1]], -1)


@shaped(image_row="float (B, N)", last_row="float (B, N)", types="whole (B, N)")
def attention_exit_features(image_row: Tensor, last_row: Tensor, types: Tensor) -> Tensor:
    """What a gate reads of attention weights, the largest over heads.

    Args:
        image_row: (B, N) the row of the last image token.
        last_row: (B, N) the row of the last token of the prompt.
        types: (B, N) token types; padding after the prompt counts as none of it.

    Returns:
        (B, 3n) for prompts of n image tokens: what the last image token takes from each, what the last token takes from
        each, and what the last token takes from the text after the image, stretched linearly to n numbers. Zeros for
        samples without image.

    Raises:
        ValueError: samples with other numbers of image tokens, or without text after the image.

    >>> rows = torch.tensor([[0.6, 0.4, 0.0, 0.0]]), torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    >>> attention_exit_features(*rows, torch.tensor([[2, 2, 1, 1]])).tolist()[0][2:]
    [0.10000000149011612, 0.20000000298023224, 0.30000001192092896, 0.4000000059604645]
    """
    image, after = types == IMAGE, after_image(types)
    counts = image.sum(1)
    n = int(counts.max()) if len(counts) else 0
    if bool(((counts != n) & (counts > 0)).any()):
        raise ValueError(f"gates that read attention need as many image tokens in each sample, got {counts.tolist()}")
    out = last_row.new_zeros(len(types), 3 * n)
    for b in counts.nonzero().flatten().tolist():
        if not bool(after[b].any()):
            raise ValueError(f"sample {b} has no text after the image, which gates that read attention look at")
        text = F.interpolate(last_row[b, after[b]][None, None], size=n, mode="linear", align_corners=True)[0, 0]
        out[b] = torch.cat([image_row[b, image[b]], last_row[b, image[b]], text])
    return out


def _last(chosen: Tensor) -> Tensor:
    """(B,) index of the last of (B, N) that is chosen; 0 where none is."""
    return torch.where(chosen, torch.arange(chosen.shape[1], device=chosen.device), 0).amax(1)


def _peaks(site: Site, weights: Tensor, rows: Tensor, at: Tensor) -> Tensor:
    """Of (B, h, r, M) weights of the queries ``rows`` (r,), the largest over heads at rows ``at`` (B, 2), by slot:
    (B, 2, L); zero for rows that are not among them."""
    hit = (rows == at[:, :, None]).to(weights.dtype)
    got = torch.einsum("brm,bir->bim", weights.amax(1), hit)
    slots = site.key_slots()[:, 0, 0].expand(got.shape[0], -1)
    count = int(slots.max()) + 1
    there = got.new_zeros(*got.shape[:2], count + 1)
    index = slots.masked_fill(slots < 0, count)[:, None].expand_as(got)
    return there.scatter_add(2, index, got)[..., :count]


@shaped(full="float (B, N, V)", left="float (B, N, V)", labels="whole (B, N)", ratio="infinite")
def exit_labels(
    full: Tensor,
    left: Tensor,
    labels: Tensor,
    accuracy: float = 0.99,
    ratio: float = 1.03,
    compat: str | None = None,
) -> Tensor:
    """Whether image tokens could have left.

    Args:
        full: (B, N, V) logits with the image everywhere.
        left: (B, N, V) logits without it from some layer on.
        labels: (B, N) ids, -100 where nothing is predicted.
        accuracy: more than this share of the answer's tokens must come out the same.
        ratio: the loss must be less than so many times that with the image.
        compat: ``"authors"`` leaves labels of token id 0 out of the comparison of tokens.

    Returns:
        (B,) 1 or 0.

    >>> logits = torch.randn(1, 4, 5)
    >>> exit_labels(logits, logits, torch.tensor([[1, 2, 3, 4]])).tolist()
    [1]
    """
    check_choice("compat", compat, (None, "authors"))
    asked = labels[labels != -100]
    check_within("labels", asked, full.shape[-1], "token id")
    goal = labels[:, 1:]
    answer = goal > 0 if compat == "authors" else goal != -100
    same = (full[:, :-1].argmax(-1) == left[:, :-1].argmax(-1)) & answer
    share = same.sum(1) / answer.sum(1)
    losses = [
        F.cross_entropy(z[:, :-1].transpose(1, 2).float(), goal, ignore_index=-100, reduction="none").sum(1)
        for z in (full, left)
    ]
    return ((share > accuracy) & (losses[1] < ratio * losses[0])).long()


class DyVTE(Reduction):
    """Image tokens leave all at once, after the layer where a gate says so, sample by sample.

    Args:
        gates: one per layer of the decoder; the last is not asked, since nothing comes after its layer.
        exit_layer: leave after this layer instead of asking the gates; needs none then.
        layers: layers whose gates are asked; ``None`` for all.

    Raises:
        ValueError: neither ``gates`` nor ``exit_layer``, or both.

    Reference: Wu et al., 2024, arXiv 2411.19628.

    >>> DyVTE(exit_layer=15).layers
    [16]
    """

    name: ClassVar[str] = "dyvte"

    def __init__(
        self,
        gates: Sequence[Callable[[Tensor], Tensor]] | nn.ModuleList | None = None,
        exit_layer: int | None = None,
        layers: Sequence[int] | None = None,
    ):
        if (gates is None) == (exit_layer is None):
            raise ValueError("give either gates, or an exit_layer that is the same for every prompt")
        if exit_layer is not None and (layers is not None or exit_layer < 0):
            raise ValueError(f"exit_layer must be the number of a layer, without layers; got {exit_layer}, {layers}")
        if layers is not None and any(n < 0 for n in layers):
            raise ValueError(f"layers must be numbers from 0, got {list(layers)}")
        self.gates, self.exit_layer = gates, exit_layer
        self.layers: list[int | str] | None = None
        self._asked: set[int] | None = None if layers is None else set(layers)
        if exit_layer is not None:
            self._asked = {exit_layer}
        if self._asked is not None:
            self.layers = [n + 1 for n in sorted(self._asked)]
        self.reset()

    def reset(self) -> None:
        super().reset()
        self._decided: dict[str | None, tuple[Tensor, dict[int, Tensor]]] = {}

    def wants(self, site: Site) -> bool:
        return site.layer > 0

    def prepare(self, model: nn.Module, sites: Sequence[Site]) -> None:
        self._first, last = min(site.layer for site in sites), max(site.layer for site in sites)
        if self.gates is not None and len(self.gates) <= last - 1:
            raise ValueError(
                f"gates must be one per layer; got {len(self.gates)}, the model asks up to layer {last - 1}"
            )

    def features(self, site: Site, hidden: Tensor) -> Tensor:
        """What the gate of the layer before this block reads."""
        assert site.q_types is not None
        return exit_features(hidden, site.q_types)

    def on_tokens(self, site: Site, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        assert site.q_types is not None
        image = site.q_types == IMAGE
        there = image.any(1)
        layer = site.layer - 1
        if site.layer == self._first:
            self._decided[site.branch] = (torch.full_like(there, -1, dtype=torch.long), {})
        left, said = self._decided[site.branch]
        if not bool(there.any()):
            return None
        leave = there
        if self.gates is not None:
            with torch.no_grad():
                said[layer] = gate = ask(self.gates[layer], self.features(site, hidden))
            leave = there & (gate[:, 1] > gate[:, 0])
        self._decided[site.branch] = (torch.where(leave, layer, left), said)
        return self.go_on(hidden, site, image & ~leave[:, None])

    def results(self) -> dict[str, Any]:
        """What every reduction reports, ``exit`` (B,) the layer after which each sample left (-1: never), and
        ``gates``: what each gate said, by layer."""
        if None not in self._decided:
            return super().results()
        left, said = self._decided[None]
        return {**super().results(), "exit": left, "gates": dict(sorted(said.items()))}


class DyVTEByAttention(DyVTE, Probe):
    """The same, by gates that read the layer's attention: :func:`attention_exit_features`.

    So train the gates of ``modeling_llama_attn.py`` in the authors' repository, for LLaVA's 576 image tokens and 288
    hidden numbers; its forward pass for inference still feeds them states, which do not fit, and is not followed here.
    Two rows of weights are computed beside the kernel. All prompts have as many image tokens.

    Args:
        gates, layers: as in :class:`DyVTE`.

    >>> DyVTEByAttention(ExitGates(3, 16, 8, features="attention"), layers=[1]).layers
    [1, 2]
    """

    name: ClassVar[str] = "dyvte-by-attention"

    def __init__(
        self, gates: Sequence[Callable[[Tensor], Tensor]] | nn.ModuleList, layers: Sequence[int] | None = None
    ):
        super().__init__(gates, layers=layers)
        if self._asked is not None:
            self.layers = sorted({n + i for n in self._asked for i in (0, 1)})

    def reset(self) -> None:
        super().reset()
        self._rows: dict[tuple[str | None, int], Tensor] = {}

    def wants(self, site: Site) -> bool:
        return True

    def prepare(self, model: nn.Module, sites: Sequence[Site]) -> None:
        super().prepare(model, sites)
        self._first += 1  # nothing leaves before the first layer that is looked at

    def on_attach(self, session: Session) -> None:
        super().on_attach(session)
        self._last_layer = max(s.layer for s in session.sites)

    def _reads(self, layer: int) -> bool:
        return layer < self._last_layer and (self._asked is None or layer in self._asked)

    @staticmethod
    def _at(site: Site) -> Tensor:
        """(B, 2) rows of the last image token and of the last token."""
        assert site.q_types is not None
        last = torch.full((len(site.q_types),), site.n_queries - 1, device=site.q_types.device)
        return torch.stack([_last(site.q_types == IMAGE), last], 1)

    def probe(self, site: Site) -> tuple[Tensor, Sequence[int] | None] | None:
        self._rows.pop((site.branch, site.layer), None)
        assert site.q_types is not None
        if site.phase != "prefill" or not self._reads(site.layer) or not bool((site.q_types == IMAGE).any()):
            return None
        return self._at(site).unique(), None

    def observe(self, site: Site, weights: Tensor, rows: Tensor, allowed: Tensor | None) -> None:
        key, more = (site.branch, site.layer), _peaks(site, weights, rows, self._at(site))
        self._rows[key] = self._rows[key] + more if key in self._rows else more

    def features(self, site: Site, hidden: Tensor) -> Tensor:
        assert site.q_types is not None
        image, last = (site.per_query(row) for row in self._rows[site.branch, site.layer - 1].unbind(1))
        return attention_exit_features(image, last, site.q_types)

    def on_tokens(self, site: Site, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        return super().on_tokens(site, hidden) if site.layer and self._reads(site.layer - 1) else None


class _StateAt(Intervention):
    """Keeps the states after one layer."""

    name: ClassVar[str] = "state-at"
    kinds: ClassVar[tuple[str, ...]] = ("self",)

    def __init__(self, layer: int):
        self.layers = [layer + 1]
        self.hidden: Tensor | None = None

    def on_block_input(self, site: Site, hidden: Tensor) -> None:
        self.hidden = hidden.detach()


class _RowsAt(Probe):
    """Keeps two rows of a layer's attention: of the last image token, and of token ``last`` (B,) of each sample."""

    name: ClassVar[str] = "rows-at"
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    needs_types: ClassVar[bool] = True

    def __init__(self, layer: int, last: Tensor):
        self.layers = [layer]
        self.last = last
        self.rows: Tensor | None = None

    def _at(self, site: Site) -> Tensor:
        assert site.q_types is not None
        return torch.stack([_last(site.q_types == IMAGE), self.last.to(site.q_types.device)], 1)

    def probe(self, site: Site) -> tuple[Tensor, Sequence[int] | None] | None:
        return self._at(site).unique(), None

    def observe(self, site: Site, weights: Tensor, rows: Tensor, allowed: Tensor | None) -> None:
        more = _peaks(site, weights, rows, self._at(site))
        self.rows = more if self.rows is None else self.rows + more


def gate_loss(
    model: nn.Module,
    gates: nn.ModuleList,
    inputs: Mapping[str, Any],
    labels: Tensor,
    token_types: Tensor | Callable[[Tensor], Tensor],
    layer: int,
    accuracy: float = 0.99,
    ratio: float = 1.03,
    compat: str | None = None,
    features: str = "states",
) -> tuple[Tensor, Tensor]:
    """One step of training the gate of a layer; the model itself is only read.

    The prompt with its answer is read twice, with the image everywhere and without it after ``layer``. The gate sees
    the prompt only.

    Args:
        model: a transformers model, frozen.
        gates: one per layer.
        inputs: what the model reads: prompt and answer.
        labels: (B, N) ids of the answer, -100 before it; the answer stands at the end.
        token_types: as for ``attach``.
        layer: which gate, drawn at random from 0 to L - 2 in the paper's training.
        accuracy: see :func:`exit_labels`.
        ratio: see :func:`exit_labels`.
        compat: see :func:`exit_labels`; with ``features="attention"`` also where the text ends in samples that are
            padded on the right.
        features: what the gate reads, see :class:`ExitGates`.

    Returns:
        ``loss``, the cross-entropy of the gate, and the labels (B,).

    Raises:
        ValueError: a sample without answer.
    """
    answer = labels != -100
    if not bool(answer.any(1).all()):
        raise ValueError("labels must have an answer in every sample")
    check_choice("features", features, FEATURES)
    first = answer.to(torch.int8).argmax(1)
    state = _StateAt(layer) if features == "states" else _RowsAt(layer, first - 1)
    with torch.no_grad():
        with attach(model, state, token_types=token_types) as session:
            full = model(**inputs, use_cache=False).logits
            assert session.tracker is not None and session.tracker.types is not None
            types = session.tracker.types.to(full.device)
        with attach(model, DyVTE(exit_layer=layer), token_types=token_types):
            left = model(**inputs, use_cache=False).logits
    target = exit_labels(full, left, labels, accuracy, ratio, compat)
    n = labels.shape[1]
    if isinstance(state, _RowsAt):
        assert state.rows is not None
        # The authors count answers from the end of the row, so that padding behind them makes the text longer.
        end = n - answer.sum(1) if compat == "authors" else first
        prompt = types.masked_fill(torch.arange(n, device=types.device) >= end[:, None], PAD)
        image, last = state.rows.unbind(1)
        read = attention_exit_features(image, last, prompt)
    else:
        assert state.hidden is not None
        # The prompt of each sample, moved to the right end of its row.
        source = torch.arange(n, device=labels.device) - (n - first)[:, None]
        moved = types.gather(1, source.clamp(min=0)).masked_fill(source < 0, PAD)
        hidden = state.hidden.gather(1, source.clamp(min=0).unsqueeze(-1).expand(-1, -1, state.hidden.shape[-1]))
        read = exit_features(hidden, moved)
    gate = ask(gates[layer], read)
    return F.cross_entropy(gate, target), target
