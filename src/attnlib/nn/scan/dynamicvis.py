"""Dynamic region scan: a router lets few tokens through a two-way Mamba, the others are scaled and stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_flag, check_int, check_real
from ...types import Output, Plan, Traits, stats_dtype
from ..base import Mechanism
from ..layers import masked_mean
from ..registry import register
from ..released import Released, Rule
from .mamba import Mamba

PATHS = ("forward", "mean", "gate")
PLACES = ("none", "head", "middle", "ends")
ORDERS = ("score", "place")
COMPAT = (None, "authors")


class TwoWayMamba(nn.Module):
    """``x + m(norm(x))``, where m is one Mamba that walks the sequence forwards, or forwards and backwards.

    Args:
        dim: width.
        path: ``"forward"``; ``"mean"`` of both ways; ``"gate"``: weights of both ways from their mean tokens.
        state_dim, kernel_size, expand: of the Mamba.
        eps: of the norm.
    """

    def __init__(self, dim: int, path: str, state_dim: int, kernel_size: int, expand: float, eps: float):
        super().__init__()
        check_choice("path", path, PATHS)
        self.path = path
        self.norm = nn.RMSNorm(dim, eps=eps)
        self.mamba = Mamba(dim, state_dim, kernel_size, expand)
        self.mamba.scan.dt_proj.reset_parameters()  # as any linear map, as it starts within transformers
        self.gate = nn.Linear(2 * dim, 2, bias=False) if path == "gate" else None

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, N, dim) -> what is added to it."""
        u = self.norm(x)
        if self.path == "forward":
            return self.mamba(u, valid=valid)
        both = torch.cat([u, u.flip(1)])
        ahead, back = self.mamba(both, valid=None if valid is None else torch.cat([valid, valid.flip(1)])).chunk(2)
        back = back.flip(1)
        if self.gate is None:
            return (ahead + back) / 2
        means = torch.cat([masked_mean(ahead, valid), masked_mean(back, valid)], -1)
        weight = self.gate(means).softmax(-1)
        return weight[:, :1, None] * ahead + weight[:, 1:, None] * back


@register("dynamicvis", "sparse-scan")
class SparseScan(Mechanism):
    """Sparse mixer of DynamicVis: what is added to the tokens, most of which no scan reads.

    ``p = softmax over tokens (w . x)``. The K = N // reduction tokens of the largest logits, in training with Gumbel
    noise that carries no gradient, are scanned together with ``global_tokens`` means of runs of all tokens:
    ``s = u + mamba(norm(u))`` with ``u = [means, x[chosen]]``, both ways with the same parameters. The answer is
    ``p_i s_i`` for a chosen token and ``p_i x_i`` for another. The router learns through p alone. With ``reduction=0``
    there is no router and the answer is that of the Mamba for every token. What a block adds to its input is this
    answer, so that there is no norm outside.

    Shapes: x and y (B, *grid, dim), grids of rank 1 to 3 read row by row; the Mamba reads N / reduction +
    ``global_tokens`` tokens. Defaults are those of the paper.

    Differs from the authors' code: at least one token is chosen; tokens outside ``valid`` have no share in p, are not
    chosen, counted or averaged; their random walks (``shuffle``) are left out; means that stand in the middle are taken
    out from where they were put, unless ``compat="authors"``; the balance loss, which refers to what is not there in
    their heads, is computed.

    Args:
        dim: width.
        reduction: one in how many tokens is chosen; 0 for no router.
        order: chosen tokens are scanned by ``"score"``, the largest first, as released, or by their ``"place"``.
        keep_rest: tokens that were not chosen are scaled; otherwise they get nothing.
        normalize: the p of the chosen are divided by their sum.
        noise: scale of the Gumbel noise.
        noise_decay: the noise falls linearly to 1e-4 with ``set_progress``.
        global_tokens: means of all tokens that are scanned too; 0 for none, -1 for as many as the grid has rows.
        global_place: ``"head"``, ``"middle"`` or at both ``"ends"`` of the sequence; ``"none"``.
        path: ``"mean"`` of both ways, ``"gate"`` or ``"forward"``.
        state_dim, kernel_size, expand: of the Mamba.
        norm_eps: of the norm before it.
        compat: ``"authors"`` for their slip.

    Losses: ``balance``, the sum over places of the share of samples that chose one times the mean p there, when asked
    for.

    Reference: Chen et al., 2025, arXiv 2503.16426.

    >>> SparseScan(dim=8, reduction=4)(torch.randn(2, 4, 4, 8)).shape
    torch.Size([2, 4, 4, 8])
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self"}), grid_ranks=frozenset({1, 2, 3}), work={"N": 1}, memory={"N": 1},
        needs_plan=True, losses=("balance",),
    )  # fmt: skip
    zero_is_off = ("reduction", "noise", "global_tokens")
    progress: float
    reads_length = True  # how many are chosen, and which runs are averaged

    def __init__(
        self,
        dim: int,
        reduction: int = 1,
        order: str = "score",
        keep_rest: bool = True,
        normalize: bool = False,
        noise: float = 0.1,
        noise_decay: bool = False,
        global_tokens: int = -1,
        global_place: str = "head",
        path: str = "mean",
        state_dim: int = 16,
        kernel_size: int = 4,
        expand: float = 2.0,
        norm_eps: float = 1e-5,
        compat: str | None = None,
    ):
        super().__init__(dim)
        check_choice("order", order, ORDERS)
        check_choice("global_place", global_place, PLACES)
        check_choice("compat", compat, COMPAT)
        for name, flag in dict(keep_rest=keep_rest, normalize=normalize, noise_decay=noise_decay).items():
            check_flag(name, flag)
        self.reduction = check_int("reduction", reduction, least=0)
        self.order, self.keep_rest, self.normalize, self.compat = order, keep_rest, normalize, compat
        self.noise, self.noise_decay = check_real("noise", noise, least=0), noise_decay
        self.global_tokens, self.global_place = check_int("global_tokens", global_tokens, least=-1), global_place
        self.progress = 0.0  # of training, told at every step: no part of released weights
        self.router = nn.Linear(dim, 1, bias=False) if reduction else None
        eps = check_real("norm_eps", norm_eps, least=0)
        self.inner = TwoWayMamba(dim, path, state_dim, kernel_size, expand, eps)

    @property
    def traits(self) -> Traits:
        if not self.reduction:
            return self.class_traits.but(needs_plan=False, losses=())
        return self.class_traits

    def set_progress(self, progress: float) -> None:
        """How far training is, from 0 to 1: noise falls with it."""
        self.progress = check_real("progress", progress, least=0, most=1)

    def chosen(self, tokens: int) -> int:
        """How many of ``tokens`` are scanned.

        >>> SparseScan(dim=4, reduction=8).chosen(100)
        12
        """
        return tokens if not self.reduction else min(tokens, max(1, tokens // self.reduction))

    # ---- choices

    def _logits(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """(B, N), very low where there is no token."""
        assert self.router is not None
        logits = self.router(x).squeeze(-1).to(stats_dtype(x.dtype))
        return logits if valid is None else logits.masked_fill(~valid, torch.finfo(logits.dtype).min)

    def _choose(self, logits: Tensor, valid: Tensor | None) -> Plan:
        logits = logits.detach()
        if self.training and self.noise:
            scale: Tensor | float = self.noise
            if self.noise_decay:
                scale = (self.noise - 1e-4) * (1 - self.progress) + 1e-4
            uniform = torch.rand_like(logits).clamp(min=torch.finfo(logits.dtype).tiny)
            logits = logits - scale * (-uniform.log()).clamp(min=torch.finfo(logits.dtype).tiny).log()
        count = self.chosen(logits.shape[1])
        index = logits.topk(count, -1).indices
        if valid is None:
            keep = torch.ones_like(index, dtype=torch.bool)
        else:  # as many as the tokens that exist allow, which have the largest logits
            several = (valid.sum(1) // max(1, self.reduction)).clamp(min=1).minimum(valid.sum(1))
            keep = torch.arange(count, device=index.device) < several[:, None]
        if self.order == "place":
            index, at = index.masked_fill(~keep, logits.shape[1]).sort(-1)
            keep, index = keep.gather(1, at), index.clamp(max=logits.shape[1] - 1)
        return Plan("tokens", {"index": index, "keep": keep.long()}, (("N", logits.shape[1]),))

    def make_plan(self, x: Tensor, *, valid: Tensor | None = None) -> Plan:  # type: ignore[override]
        if self.router is None:
            return super().make_plan(x)
        flat, valid = x.flatten(1, -2), None if valid is None else valid.flatten(1)
        return self._choose(self._logits(flat, valid), valid)

    # ---- the call

    def _means(self, x: Tensor, valid: Tensor | None, rows: int) -> tuple[Tensor | None, Tensor | None]:
        """Means of runs of tokens (B, n, dim), and which of these have any."""
        count = rows if self.global_tokens == -1 else self.global_tokens
        if not count or self.global_place == "none":
            return None, None

        def pooled(t: Tensor) -> Tensor:
            return F.adaptive_avg_pool1d(t.transpose(1, 2), count).transpose(1, 2)

        if valid is None:
            return pooled(x), None
        share = pooled(valid.unsqueeze(-1).to(x.dtype))
        return pooled(x) / torch.where(share == 0, 1, share), share.squeeze(-1) > 0

    def _scanned(self, u: Tensor, keep: Tensor | None, means: Tensor | None, exist: Tensor | None) -> Tensor:
        """What the Mamba adds to the tokens ``u`` (B, K, dim) beside the means."""
        if means is None:
            return self.inner(u, keep)
        k, n, middle = u.shape[1], means.shape[1], u.shape[1] // 2

        def joined(a: Tensor, b: Tensor) -> Tensor:
            parts = {"head": [b, a], "middle": [a[:, :middle], b, a[:, middle:]], "ends": [b, a, b]}
            return torch.cat(parts[self.global_place], 1)

        valid = None
        if keep is not None or exist is not None:
            keep = torch.ones_like(u[..., 0], dtype=torch.bool) if keep is None else keep
            exist = torch.ones_like(means[..., 0], dtype=torch.bool) if exist is None else exist
            valid = joined(keep, exist)
        whole = joined(u, means)
        y = self.inner(whole, valid)
        if self.global_place != "middle":
            return y[:, n : n + k]
        at = (k + n) // 2 if self.compat == "authors" else middle
        if self.compat == "authors":  # theirs takes out another run, and with it tokens of the sequence
            y = y + whole
            return torch.cat([y[:, :at], y[:, at + n :]], 1) - u
        return torch.cat([y[:, :at], y[:, at + n :]], 1)

    def mix(  # type: ignore[override]
        self, x: Tensor, *, valid: Tensor | None = None, plan: Plan | None = None, returns: tuple[str, ...] = ()
    ) -> Output:
        grid, rows = x.shape[1:-1], x.shape[1]
        x, valid = x.flatten(1, -2), None if valid is None else valid.flatten(1)
        means, exist = self._means(x, valid, rows)
        if self.router is None:
            return Output(self._scanned(x, valid, means, exist).unflatten(1, grid))
        logits = self._logits(x, valid)
        p = logits.softmax(-1)
        p = p if valid is None else p.masked_fill(~valid, 0.0)
        if plan is None:
            plan = self._choose(logits, valid)
        else:
            plan = plan.expect("tokens", N=x.shape[1])
        index = plan.choices("index", (x.shape[0], None), x.shape[1], "tokens")
        keep = plan.choices("keep", tuple(index.shape), 2, "ways to treat a token (left out, kept)").bool()
        at = index.unsqueeze(-1).expand(-1, -1, self.dim)
        u = x.gather(1, at).masked_fill(~keep.unsqueeze(-1), 0.0)
        weight = p.gather(1, index).masked_fill(~keep, 0.0)
        if self.normalize:
            total = weight.sum(-1, keepdim=True)
            weight = weight / torch.where(total == 0, 1, total)
        s = (u + self._scanned(u, None if valid is None else keep, means, exist)) * weight.unsqueeze(-1).to(x.dtype)
        scaled = x * p.unsqueeze(-1).to(x.dtype)
        rest = scaled if self.keep_rest else torch.zeros_like(x)
        s = torch.where(keep.unsqueeze(-1), s, rest.gather(1, at))  # a slot without a token changes nothing
        y = rest.scatter(1, at, s.to(rest.dtype)).unflatten(1, grid)
        losses = None
        if "losses" in returns:
            counted = torch.zeros_like(p).scatter(1, index, keep.to(p.dtype))
            losses = {"balance": (counted.mean(0) * p.mean(0)).sum()}
        return Output(y, losses=losses)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        """From the authors' ``SpatialSparseMixer``."""
        theirs = Released(state_dict, "the authors' SpatialSparseMixer")
        rules: dict[str, Rule] = {
            r"spatial_gate\.weight": "router.weight",
            r"spatial_mamba_mixer\.mamba_layer\.(in_proj|out_proj)\.(weight|bias)": r"inner.mamba.\1.\2",
            r"spatial_mamba_mixer\.mamba_layer\.(conv1d|x_proj|dt_proj)\.(weight|bias)": r"inner.mamba.scan.\1.\2",
            r"spatial_mamba_mixer\.mamba_layer\.(A_log|D)": r"inner.mamba.scan.\1",
            r"spatial_mamba_mixer\.pre_norm\.weight": "inner.norm.weight",
            r"spatial_mamba_mixer\.gate_layer\.0\.weight": "inner.gate.weight",
        }
        return theirs.close(theirs.renamed(rules))
