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
from itertools import permutations
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...checks import check_choice, check_int, check_ints, check_real, check_type
from ...grids import Layout, axis_order, inverse_order, inverse_permutation
from ...hooks.intervention import Intervention
from ...hooks.site import Site
from ...nn.sparse.vmoba import Cut, cut_order, moba_plan
from ...ops.block_mass import (
    adapted_sparsity,
    block_mass,
    block_profile,
    frame_tiles,
    heaviest_blocks,
    plan_recall,
)
from ...ops.block_policies import SCOPES
from ...ops.block_sparse import BlockPlan, block_sparse_attention
from ...ops.quantized import quantized_attention


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

    def attend(self, look: Look, v: Tensor, plan: BlockPlan, dense: Callable[[], Tensor]) -> Tensor:
        """(B, H, N, Dv): attention over the blocks of the plan. ``dense()`` gives the model's own."""
        return block_sparse_attention(look.q, look.k, v, plan, valid=look.valid, scale=look.site.scale)


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
        ValueError: a layer whose tokens are not known to be a video; a mask that is not one of absent keys; weights
            that are not a plain softmax; a given grid that a layer does not have; steps that were not said; another
            grid than before.
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
        if layout is None or "image" in layout.names:
            what = "is not said" if layout is None else f"is {layout.segments}"
            raise ValueError(
                f"{self._where(site)}: what its tokens are {what}, which is no video; give grid=(frames, height, "
                "width), or the layers to act on"
            )
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
            others = torch.cat([torch.arange(a, b, device=q.device) for a, b in ((0, first), (first + count, n))])
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

        def dense() -> Tensor:
            return _taken(call(q, k, v), index, site.heads)

        out = self.policy.attend(look, v_in, plan, dense)
        return _taken(out, None if index is None else _inverse(index, n), site.heads)


def _inverse(index: Tensor, n: int) -> Tensor:
    """Where every token went."""
    return inverse_permutation(index) if index.dim() == 2 else inverse_order(index, n)


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


#: Orders of (frames, height, width), the slowest axis first.
ORDERS = tuple(permutations(range(3)))


class PARO(Policy):
    """Axes reordered per head so that its map lies in blocks, then static blocks and few bits (Zhao et al., 2025).

    First calibrated on a prompt or two: while :attr:`frozen` is False attention is dense, and every call is scored
    under the six orders of the axes. :meth:`freeze` then chooses, per layer and head, the order with the smallest

        alpha (1 - M_s) / sum (1 - M_s) + (1 - alpha) M_q / sum M_q,

    ``M_s`` the share of nearly empty blocks and ``M_q`` the mean incoherence of blocks, and keeps the heaviest blocks
    of the mean map, the first half of the steps apart from the second. (The paper prints M_s itself, of which more is
    better, in a score that is minimised: the sign is taken as meant.) ::

        paro = PARO(density=0.3)
        with attnlib.attach(transformer, BlockSparse(paro)) as session:
            sample(session)          # calibration, dense
        paro.freeze()
        with attnlib.attach(transformer, BlockSparse(paro)) as session:
            sample(session)

    Args:
        density: share of blocks that is read, in (0, 1].
        block: tokens per block.
        alpha: weight of sparsity against incoherence in the choice of orders; the paper does not say its own.
        small, share: what a nearly empty block is; see :func:`attnlib.ops.block_mass.block_profile`.
        half: step from which the second half's blocks are read; ``None`` for one set of blocks for all steps.
        bits: of operands, ``(queries and keys, weights and values)``; ``None`` for none.
        orders: among which to choose.

    There is no released code: equations and defaults are the paper's. Text tokens are not reordered and stay dense. The
    model's rotary positions are on queries and keys before they are reordered.
    """

    def __init__(
        self,
        density: float = 0.5,
        block: int = 64,
        alpha: float = 0.5,
        small: float = 1e-3,
        share: float = 0.9,
        half: int | None = None,
        bits: tuple[int | None, int | None] | None = None,
        orders: Sequence[Sequence[int]] = ORDERS,
    ):
        self.density = check_real("density", density, above=0, most=1)
        self.block = check_int("block", block, least=1)
        self.alpha = check_real("alpha", alpha, least=0, most=1)
        self.small, self.share = check_real("small", small, above=0), check_real("share", share, above=0, most=1)
        self.half = None if half is None else check_int("half", half, least=1)
        if bits is not None:
            if not isinstance(bits, (tuple, list)) or len(bits) != 2:
                raise TypeError(f"bits must be (of queries and keys, of weights and values), got {bits!r}")
            for b in bits:
                if b is not None:
                    check_int("bits", b, least=2, most=8)
        self.bits = bits
        self.orders = tuple(tuple(o) for o in orders)
        for o in self.orders:
            if sorted(o) != [0, 1, 2]:
                raise ValueError(f"orders holds {o}, which is no permutation of the axes (0, 1, 2)")
        if not self.orders:
            raise ValueError("orders must hold at least one order")
        self.frozen = False
        self.layers: dict[str, dict[str, Any]] = {}

    @property
    def needs_steps(self) -> bool:  # type: ignore[override]
        return self.half is not None

    def _late(self, site: Site) -> int:
        return int(self.half is not None and site.step is not None and site.step >= self.half)

    def _calibrate(self, look: Look) -> None:
        held = self.layers.setdefault(look.site.name, {"grid": look.grid, "beside": look.beside, "seen": {}})
        self._same(look, held)
        for number, axes in enumerate(self.orders):
            at = axis_order(look.grid, axes).to(look.q.device)
            at = torch.cat([at, torch.arange(look.places, look.places + look.beside, device=look.q.device)])
            found = block_profile(
                look.q[:, :, at],
                look.k[:, :, at],
                self.block,
                scale=look.site.scale,
                small=self.small,
                share=self.share,
            )
            key = (self._late(look.site), number)
            sparse, uneven, mass = found.sparse.mean(0), found.incoherence.mean(0), found.mass.mean(0)
            if key in held["seen"]:
                old = held["seen"][key]
                held["seen"][key] = (old[0] + sparse, old[1] + uneven, old[2] + mass, old[3] + 1)
            else:
                held["seen"][key] = (sparse, uneven, mass, 1)

    def _same(self, look: Look, held: dict[str, Any]) -> None:
        if (held["grid"], held["beside"]) != (look.grid, look.beside):
            raise ValueError(
                f"layer {look.site.layer} ({look.site.name}): its video is {look.grid} beside {look.beside} tokens, "
                f"but blocks are those of {held['grid']} beside {held['beside']}"
            )

    def freeze(self) -> PARO:
        """Choose orders and blocks from what was seen.

        Raises:
            ValueError: nothing was seen, or only one half of the steps.
        """
        if not self.layers:
            raise ValueError("nothing was calibrated: run the model once with this policy attached before freeze()")
        for name, held in self.layers.items():
            seen = held["seen"]
            for late in range(2 if self.half is not None else 1):
                if (late, 0) not in seen:
                    which = "from" if late else "before"
                    raise ValueError(f"{name}: no step {which} half={self.half} was seen while calibrating")
            lates = sorted({late for late, _ in seen})
            numbers = range(len(self.orders))
            sparse, uneven = (
                torch.stack([sum(seen[late, i][j] / seen[late, i][3] for late in lates) for i in numbers])
                for j in (0, 1)
            )  # (orders, H)
            empty = len(lates) - sparse
            score = self.alpha * empty / empty.sum(0).clamp(min=1e-12) + (1 - self.alpha) * uneven / uneven.sum(0)
            held["order"] = score.argmin(0)  # (H,)
            heads = torch.arange(score.shape[1], device=score.device)
            held["plans"] = {}
            n = math.prod(held["grid"]) + held["beside"]
            for late in lates:
                mass = torch.stack([seen[late, i][2] / seen[late, i][3] for i in numbers])[held["order"], heads]
                count = mass.shape[-1]
                forced = torch.eye(count, dtype=torch.bool, device="cpu")
                if held["beside"]:
                    touched = torch.arange(count, device="cpu") >= math.prod(held["grid"]) // self.block
                    forced = forced | touched[:, None] | touched
                sparsity = min(1 - self.density, 1 - 1e-9)
                held["plans"][late] = heaviest_blocks(
                    mass[None].cpu(), sparsity, self.block, self.block, n, forced=forced
                )
        self.frozen = True
        return self

    def order(self, site: Site, grid: tuple[int, ...], memory: dict[str, Any]) -> Tensor | None:
        if not self.frozen or site.name not in self.layers:
            return None
        held = self.layers[site.name]
        if held["grid"] != grid:
            raise ValueError(
                f"layer {site.layer} ({site.name}): its video is {grid}, but orders are those of {held['grid']}"
            )
        if "index" not in held:
            every = torch.stack([axis_order(grid, axes) for axes in self.orders])
            held["index"] = every[held["order"].cpu()]
        return held["index"]

    def choose(self, look: Look) -> BlockPlan | None:
        if not self.frozen:
            self._calibrate(look)
            return None
        held = self.layers.get(look.site.name)
        if held is None:
            raise ValueError(f"layer {look.site.layer} ({look.site.name}) was not calibrated: it did not run then")
        self._same(look, held)
        plan: BlockPlan = held["plans"][self._late(look.site)]
        return plan

    def attend(self, look: Look, v: Tensor, plan: BlockPlan, dense: Callable[[], Tensor]) -> Tensor:
        if self.bits is None:
            return super().attend(look, v, plan, dense)
        qk, pv = self.bits
        return quantized_attention(
            look.q, look.k, v, qk_bits=qk, pv_bits=pv, block=self.block, plan=plan, valid=look.valid,
            scale=look.site.scale,
        )  # fmt: skip


class TileSearch(Policy):
    """Find how many reference frames each layer needs: dense attention, and beside it what tiles would have given.

    For every candidate k, the mean squared difference of the sparse output from the dense one over the dense one's mean
    square, averaged over calls. :meth:`references` then takes, layer by layer, the smallest k whose error is below a
    bound (Ding et al., 2025, arXiv 2502.06155, stage 2): a smaller bound never gives fewer reference frames. ::

        search = TileSearch((0, 1, 2, 4))
        with attnlib.attach(transformer, BlockSparse(search)): ...
        attnlib.attach(transformer, BlockSparse(FrameTiles(search.references(0.01))))

    Args:
        candidates: numbers of reference frames, rising.
        block: tokens per block.
    """

    def __init__(self, candidates: Sequence[int], block: int = 64):
        self.candidates = check_ints("candidates", candidates, least=0)
        if not self.candidates or list(self.candidates) != sorted(set(self.candidates)):
            raise ValueError(f"candidates={tuple(candidates)} must be numbers of frames that rise, at least one")
        self.block = check_int("block", block, least=1)
        self.errors: dict[int, list[list[float]]] = {}

    def choose(self, look: Look) -> BlockPlan | None:
        frames = look.grid[0]
        if max(self.candidates) > frames:
            raise ValueError(f"candidates={self.candidates}, but the video has {frames} frames")
        return BlockPlan.full(look.q.shape[2], look.k.shape[2], self.block, self.block)

    def attend(self, look: Look, v: Tensor, plan: BlockPlan, dense: Callable[[], Tensor]) -> Tensor:
        truth = dense()
        size = float(truth.square().mean())
        row = []
        for k in self.candidates:
            plan = frame_tiles(
                look.grid[0], look.places // look.grid[0], k, self.block, self.block, dense=look.beside,
                device=look.q.device,
            )  # fmt: skip
            out = block_sparse_attention(look.q, look.k, v, plan, valid=look.valid, scale=look.site.scale)
            row.append(float((out - truth).square().mean()) / max(size, 1e-30))
        self.errors.setdefault(look.site.layer, []).append(row)
        return truth

    def references(self, bound: float) -> dict[int, int]:
        """Layer -> the smallest candidate whose error is below the bound, the largest candidate where none is.

        Raises:
            ValueError: nothing was measured.
        """
        check_real("bound", bound, above=0)
        if not self.errors:
            raise ValueError("nothing was measured: run the model once with this policy attached")
        out = {}
        for layer, rows in self.errors.items():
            means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
            # An error may rise by chance where more is read: what is enough, everything larger has to be, too.
            enough = [max(means[i:]) < bound for i in range(len(means))]
            out[layer] = self.candidates[enough.index(True) if True in enough else -1]
        return out
