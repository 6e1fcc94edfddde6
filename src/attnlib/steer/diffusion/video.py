"""Block-sparse attention for video denoisers that exist: one intervention, any policy.

::

    with attnlib.attach(transformer, BlockSparse(AdaSpa(sparsity=0.8))) as session:
        for i, t in enumerate(scheduler.timesteps):
            with session.at(step=i):
                noise = transformer(latents, t, ...)

:class:`BlockSparse` finds the video among the tokens of a layer (its grid comes from the denoiser's inputs), puts it in
the order that the policy wants, asks the policy which blocks to read, and reads them. Tokens beside the video, those of
a text, read and are read by all. What a policy remembers belongs to one layer, branch and pass; it is forgotten when
the steps begin anew, and refuses another grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...checks import check_choice, check_int, check_ints, check_real, check_type
from ...grids import Layout, inverse_permutation
from ...hooks.intervention import Intervention
from ...hooks.site import Site
from ...nn.sparse.vmoba import Cut, cut_order, moba_plan
from ...ops.block_mass import adapted_sparsity, block_mass, frame_tiles, heaviest_blocks, plan_recall
from ...ops.block_policies import SCOPES
from ...ops.block_sparse import BlockPlan, block_sparse_attention


@dataclass
class Look:
    """What a policy sees of a call.

    Args:
        site: where.
        q: (B, H, N, D) queries, the video first and in the policy's order, other tokens behind it.
        k: (B, Hk, N, D) keys, likewise.
        valid: (B, N) boolean, which keys exist; ``None`` for all.
        grid: (frames, height, width) of the video.
        places: of the video's tokens in this order: as many as there are, and more where blocks were filled up.
        beside: tokens behind them.
        memory: what the policy keeps for this layer, branch and pass.
    """

    site: Site
    q: Tensor
    k: Tensor
    valid: Tensor | None
    grid: tuple[int, ...]
    places: int
    beside: int
    memory: dict[str, Any]

    def beside_blocks(self, block: int) -> Tensor:
        """(blocks, blocks) boolean: pairs of blocks of which one holds a token beside the video."""
        count = -(-(self.places + self.beside) // block)
        touches = torch.zeros(count, dtype=torch.bool, device=self.q.device)
        if self.beside:
            touches[self.places // block :] = True
        return touches[:, None] | touches


class Policy:
    """Which blocks are read. A subclass overrides :meth:`choose`, and :meth:`order` where it wants another order."""

    #: Whether the policy has to be told denoising steps.
    needs_steps: ClassVar[bool] = False

    def order(self, site: Site, grid: tuple[int, ...], memory: dict[str, Any]) -> Tensor | None:
        """(N,) or (H, N): numbers of the video's tokens in the order in which blocks are cut; ``None`` as they are.

        An order for all heads may leave places without a token (-1), so that blocks stay whole.
        """
        return None

    def choose(self, look: Look) -> BlockPlan | None:
        """A plan over all N tokens, or ``None`` for dense attention in this call."""
        raise NotImplementedError


class BlockSparse(Intervention):
    """Let self-attention over a video read only the blocks that a policy chooses.

    Args:
        policy: one of this room, or your own :class:`Policy`.
        steps: denoising steps at which to act (numbers, a ``range``); ``None`` for every call. Outside them attention
            is dense and the policy sees nothing.
        layers: numbers or name patterns; ``None`` for all that attend to a video.
        grid: ``(frames, height, width)`` where the model does not say it, as one whose input is flat.

    ``session.results`` shows the density of the latest plan by layer.

    Raises:
        ValueError: a mask that is not one of absent keys; weights that are not a plain softmax; a
            given grid that a layer does not have; steps that were not said; another grid than before.
    """

    name: ClassVar[str] = "block-sparse"
    kinds: ClassVar[tuple[str, ...]] = ("self", "joint")

    def __init__(
        self,
        policy: Policy,
        steps: Any = None,
        layers: Sequence[int | str] | None = None,
        grid: Sequence[int] | None = None,
    ):
        check_type("policy", policy, Policy, "a Policy such as AdaSpa()")
        self.policy = policy
        if isinstance(steps, (int, str)):
            raise TypeError(f"steps must be a collection of numbers, got {steps!r}; write steps=({steps!r},)")
        self.steps = None if steps is None else frozenset(steps)
        self.layers = layers
        self.given_grid = None if grid is None else check_ints("grid", grid, least=1)
        self.memories: dict[tuple[Any, ...], dict[str, Any]] = {}
        self.densities: dict[str, float] = {}

    def reset(self) -> None:
        self.memories.clear()
        self.densities.clear()

    def results(self) -> Any:
        return dict(self.densities)

    def _where(self, site: Site) -> str:
        return f"layer {site.layer} ({site.name})"

    def _video(self, site: Site) -> tuple[int, tuple[int, ...]] | None:
        """Where the video begins and its grid; ``None`` for a layer that has none, such as attention along one axis."""
        if self.given_grid is not None:
            if site.n_queries < math.prod(self.given_grid) or site.kind == "joint":
                raise ValueError(
                    f"{self._where(site)}: grid={self.given_grid} was given, but it has {site.n_queries} tokens"
                    + (", of two streams" if site.kind == "joint" else "")
                )
            return 0, self.given_grid
        layout = site.q_layout
        if isinstance(layout, Layout) and layout == site.k_layout:
            for name, size in layout.segments:
                if isinstance(size, tuple) and len(size) == 3:
                    return layout.span(name)[0], size
        return None

    def _valid(self, site: Site, k: Tensor) -> Tensor | None:
        pair = site.mask
        if not site.weighting.plain:
            raise ValueError(f"{self._where(site)}: its weights are not a plain softmax, which blocks are made of")
        if pair is None or (pair.allowed is None and pair.bias is None and not pair.causal and pair.opaque is None):
            return None
        allowed = pair.allowed
        simple = allowed is not None and pair.bias is None and not pair.causal and pair.opaque is None
        if simple and allowed is not None and bool((allowed == allowed[:, :1, :1]).all()):
            return allowed[:, 0, 0].expand(k.shape[0], k.shape[2])
        raise ValueError(
            f"{self._where(site)}: it has a mask between queries and keys or a bias; block-sparse attention knows only "
            "keys that are absent for all queries"
        )

    def _memory(self, site: Site, grid: tuple[int, ...]) -> dict[str, Any]:
        memory = self.memories.setdefault((site.name, site.branch, site.pass_name), {})
        step = site.step
        if step is not None and memory.get("step") is not None and step <= memory["step"]:
            memory.clear()  # a new generation
        if self.policy.needs_steps and step is None:
            raise ValueError(
                f"{self._where(site)}: {type(self.policy).__name__} acts by denoising steps, but is not told the step "
                "of this call; run the denoiser inside `with session.at(step=i)`"
            )
        if memory.setdefault("grid", grid) != grid:
            raise ValueError(
                f"{self._where(site)}: its video is {grid}, but was {memory['grid']} in the step before; what was "
                "chosen then does not fit"
            )
        memory["step"] = step
        return memory

    def around_attention(self, site: Site, q: Tensor, k: Tensor, v: Tensor, call: Callable[..., Tensor]) -> Tensor:
        found = self._video(site)
        if found is None:
            return call(q, k, v)
        if self.steps is not None:
            if site.step is None:
                raise ValueError(f"{self._where(site)}: steps were given, but it is not told the step of this call")
            if site.step not in self.steps:
                return call(q, k, v)
        first, grid = found
        valid = self._valid(site, k)
        memory = self._memory(site, grid)
        count, n = math.prod(grid), q.shape[2]
        order = self.policy.order(site, grid, memory)
        index: Tensor | None = None
        places = count
        if order is not None or first:
            video = torch.arange(count, device=q.device) if order is None else order.to(q.device)
            others = torch.cat([torch.arange(first), torch.arange(first + count, n)]).to(q.device)
            video = torch.where(video < 0, video, video + first)
            index, places = torch.cat([video, others.expand(*video.shape[:-1], -1)], -1), video.shape[-1]
        if index is not None and index.dim() == 2 and valid is not None:
            if not bool(valid[:, first : first + count].all()):
                raise ValueError(
                    f"{self._where(site)}: tokens of the video are absent, which an order per head cannot follow"
                )
            valid = valid[:, index[0]]
        elif index is not None and (valid is not None or places > count):
            here = (index >= 0).expand(q.shape[0], -1)
            valid = here if valid is None else here & valid[:, index.clamp(min=0)]
        q_in, k_in, v_in = (_taken(t, index, site.heads) for t in (q, k, v))
        look = Look(site, q_in, k_in, valid, grid, places, n - count, memory)
        plan = self.policy.choose(look)
        if plan is None:
            self.densities[site.name] = 1.0
            return call(q, k, v)
        self.densities[site.name] = float(plan.density)
        out = block_sparse_attention(q_in, k_in, v_in, plan, valid=valid, scale=site.scale)
        return _taken(out, None if index is None else _inverse(index, n), site.heads)


def _inverse(index: Tensor, n: int) -> Tensor:
    """Where every token went."""
    if index.dim() == 2:
        return index.argsort(-1)
    if index.shape[0] == n:
        return inverse_permutation(index)
    real = index >= 0
    out = torch.empty(n, dtype=torch.long, device=index.device)
    out[index[real]] = torch.arange(index.shape[0], device=index.device)[real]
    return out


def _taken(x: Tensor, index: Tensor | None, heads: int) -> Tensor:
    """Tokens of (B, h, N, D) in another order, (N,) for all heads or (H, N); anything where there is none."""
    if index is None:
        return x
    index = index.clamp(min=0)
    if index.dim() == 1:
        return x.index_select(2, index)
    if x.shape[1] != heads:  # heads that share keys want them in orders of their own
        x = x.repeat_interleave(heads // x.shape[1], 1)
    return x.gather(2, index[None, :, :, None].expand(x.shape[0], -1, -1, x.shape[3]))


class AdaSpa(Policy):
    """The heaviest blocks, found exactly at a few steps and kept until the next (Xia et al., 2025, arXiv 2502.21079).

    Before the first search attention is dense. The first search is exact: the mass of every block under the softmax of
    this step, whose output stays dense. Later searches take the log-sum-exp of the first one, one product instead of
    two passes. Heads of which a plan of the wanted sparsity keeps more than ``threshold`` of the mass give up blocks
    for as many heads of which it keeps the least.

    Args:
        sparsity: in [0, 1): blocks that are not read, on average over heads.
        searches: steps at which blocks are looked for, rising; the authors take (10, 30) of 50.
        block: tokens per block.
        per: ``"row"``: as many blocks for every row of blocks; ``"head"``: the heaviest of a head.
        adapt: move the budget between heads.
        threshold: recall above which a head gives up blocks.
        cached: take the log-sum-exp of the first search in later ones; otherwise all are exact.

    There is no released code: equations and defaults are the paper's.
    """

    needs_steps: ClassVar[bool] = True

    def __init__(
        self,
        sparsity: float = 0.8,
        searches: Sequence[int] = (10, 30),
        block: int = 64,
        per: str = "row",
        adapt: bool = True,
        threshold: float = 0.8,
        cached: bool = True,
    ):
        self.sparsity = check_real("sparsity", sparsity, least=0, below=1)
        self.searches = check_ints("searches", searches, least=0)
        if not self.searches or list(self.searches) != sorted(set(self.searches)):
            raise ValueError(f"searches={tuple(searches)} must be steps that rise, at least one")
        self.block = check_int("block", block, least=1)
        if per not in ("row", "head"):
            raise ValueError(f"per={per!r} is not possible; possible: 'row', 'head'")
        self.per, self.adapt, self.cached = per, adapt, cached
        self.threshold = check_real("threshold", threshold, least=0, most=1)

    def plan_of(self, mass: Tensor, n: int, forced: Tensor | None = None) -> BlockPlan:
        """The plan for a mass (B, H, blocks, blocks) over n tokens."""
        kept: dict[str, Any] = dict(q_block=self.block, k_block=self.block, n=n, forced=forced, per=self.per)
        plan = heaviest_blocks(mass, self.sparsity, **kept)
        if not self.adapt:
            return plan
        return heaviest_blocks(mass, adapted_sparsity(plan_recall(mass, plan), self.sparsity, self.threshold), **kept)

    def choose(self, look: Look) -> BlockPlan | None:
        step, memory = look.site.step, look.memory
        assert step is not None
        due = [s for s in self.searches if s <= step]
        if not due:
            return None
        if memory.get("searched") != due[-1]:
            before = memory.get("lse") if self.cached else None
            found = block_mass(
                look.q, look.k, self.block, self.block, scale=look.site.scale, lse=before, valid=look.valid
            )
            forced = look.beside_blocks(self.block) if look.beside else None
            memory["plan"] = self.plan_of(found.mass, look.q.shape[2], forced)
            memory["searched"] = due[-1]
            if before is None:
                memory["lse"] = found.lse
                return None  # of an exact search, dense attention came along
        plan: BlockPlan = memory["plan"]
        if plan.index.shape[0] not in (1, look.q.shape[0]):
            raise ValueError(
                f"layer {look.site.layer} ({look.site.name}): its batch has {look.q.shape[0]} rows, but blocks were "
                f"chosen for {plan.index.shape[0]}"
            )
        return plan


class FrameTiles(Policy):
    """Every frame reads itself and k reference frames, which read all (Ding et al., 2025, arXiv 2502.06155).

    Args:
        references: k, for all layers, or by the number of the layer (what is not named stays dense).
        block: tokens per block; a block on the border of a kept tile is read whole.

    There is no released code; which frames are references, evenly spaced from the first, and the count of kept tiles
    ``F^2 - (F - k)(F - k - 1)`` are reconstructed.
    """

    def __init__(self, references: int | Mapping[int, int], block: int = 64):
        many = references.values() if isinstance(references, Mapping) else (references,)
        for k in many:
            check_int("references", k, least=0)
        self.references = dict(references) if isinstance(references, Mapping) else references
        self.block = check_int("block", block, least=1)

    def choose(self, look: Look) -> BlockPlan | None:
        k = self.references.get(look.site.layer) if isinstance(self.references, dict) else self.references
        if k is None:
            return None
        frames = look.grid[0]
        if k > frames:
            raise ValueError(
                f"layer {look.site.layer} ({look.site.name}): references={k}, but the video has {frames} frames"
            )
        if "plan" not in look.memory:
            look.memory["plan"] = frame_tiles(
                frames, look.places // frames, k, self.block, self.block, dense=look.beside, device=look.q.device
            )
        return look.memory["plan"]


class MixtureOfBlocks(Policy):
    """Every query chooses blocks by their mean keys, cut in turn along 1, 2 and 3 axes (Wu et al., 2025, 2506.23858).

    VMoBA on a model that exists; :class:`attnlib.nn.sparse.vmoba.VMoBA` is the same as a module to train with.

    Args:
        cuts: of the layers in turn, as of :func:`attnlib.nn.sparse.vmoba.cut_order`: a number of frames, ``(h, w)``
            over all frames, ``(t, h, w)``.
        threshold: share of the min-max normalised scores that is read, in (0, 1]; 1 is dense.
        topk: blocks per query, the own one among them, instead of the threshold.
        per: scope of the choice: ``"row"``, ``"block"``, ``"head"`` or ``"all"``.
        at_least: blocks that are chosen in a scope even where own blocks meet the threshold.
    """

    def __init__(
        self,
        cuts: Sequence[Cut] = (1, (8, 8), (4, 4, 4)),
        threshold: float = 0.25,
        topk: int | None = None,
        per: str = "head",
        at_least: int = 1,
    ):
        if isinstance(cuts, (int, float, str)) or not len(cuts):
            raise TypeError(f"cuts must be a sequence with a cut for every layer in turn, got {cuts!r}")
        self.cuts = tuple(cut if isinstance(cut, (int, float)) else tuple(cut) for cut in cuts)
        for cut in self.cuts:
            cut_order((1, 1, 1), cut)
        self.threshold = check_real("threshold", threshold, above=0, most=1)
        self.topk = None if topk is None else check_int("topk", topk, least=1)
        check_choice("per", per, SCOPES)
        self.per, self.at_least = per, check_int("at_least", at_least, least=0)

    def order(self, site: Site, grid: tuple[int, ...], memory: dict[str, Any]) -> Tensor | None:
        if "block" not in memory:
            memory["order"], memory["block"] = cut_order(grid, self.cuts[site.layer % len(self.cuts)])
        return memory["order"]

    def choose(self, look: Look) -> BlockPlan | None:
        block, forced = look.memory["block"], None
        if look.beside:
            n = look.places + look.beside
            rows = torch.arange(n, device=look.q.device) >= look.places
            columns = torch.arange(-(-n // block), device=look.q.device) >= look.places // block
            forced = rows[:, None] | columns
        return moba_plan(look.q, look.k, block, self.threshold, self.topk, self.per, self.at_least, look.valid, forced)
