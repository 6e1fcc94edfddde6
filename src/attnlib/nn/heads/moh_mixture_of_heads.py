"""Mixture-of-head attention (Jin et al., 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...checks import readable
from ...ops import attention
from ...types import Plan, Traits, check_choice
from ..frame import HeadCall, HeadFrame, Notes
from ..registry import register
from ..released import PLAIN, Released, Rule


@dataclass
class RoutedNotes(Notes):
    """(B, H, N) gates of heads, and (B, N, E) which routed heads are on."""

    gates: Tensor | None = None
    chosen: Tensor | None = None


@register("moh-mixture-of-heads", "moh")
class MixtureOfHeads(HeadFrame[RoutedNotes]):
    """``y = sum_h gate_h o_h W_O^h``: some heads always on, of the others every token picks ``active_heads``.

    With routers ``W_r``, ``W_s``, ``W_0`` (no biases)::

        p = softmax(x W_r),  m = top-k mask of p,  g_r = k p m / sum(p m),  g_s = h_s softmax(x W_s)
        [a_1, a_2] = 2 softmax(x W_0),  gates = [a_1 g_s, a_2 g_r]

    Shared heads come first. With ``router="norm"`` there is no router: a head's score is the norm of its query (before
    rotary), standardised over heads, and gates are 0 or 1 with a straight-through gradient, as in MoH-LLaMA3.

    Only queries are skipped: keys and values of all heads are needed, because every token may be read in any head. In
    evaluation, routed heads attend only with the queries that chose them.

    Args:
        dim, num_heads, ...: as in :class:`HeadFrame`.
        shared_heads: heads that are always on, ``h_s``.
        active_heads: routed heads per token, ``k``; ``None`` for all of them, 0 only when all heads are shared or, with
            ``router="norm"``, for routed heads that are always off.
        router: ``"linear"`` or ``"norm"``.
        straight_through: with ``router="norm"``, gates of 0 and 1 pass gradient to the scores in training. The authors'
            released code, which is for inference, passes none.

    Losses: ``balance = E^2 mean_e(mean_t p_e mean_t m_e)`` over the ``E`` routed heads and the tokens that exist; the
    authors add 0.01 times its mean over layers.

    What differs from the authors' code: the loss is returned instead of appended to a class-level list; one shared
    head works in every variant (theirs crashes in the DiT code); routed heads that are off cost no attention time in
    evaluation.

    Reference: Jin et al., 2024, arXiv 2410.11842, equations 4 to 7.

    >>> MixtureOfHeads(dim=32, num_heads=8, shared_heads=2, active_heads=3)(torch.randn(2, 5, 32)).shape
    torch.Size([2, 5, 32])
    """

    class_traits = HeadFrame.class_traits.but(needs_plan=True, losses=("balance",))
    notes_type = RoutedNotes

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        shared_heads: int = 2,
        active_heads: int | None = None,
        router: str = "linear",
        straight_through: bool = True,
        **settings: Any,
    ):
        super().__init__(dim, num_heads, **settings)
        check_choice("router", router, ("linear", "norm"))
        routed = num_heads - shared_heads
        if not 0 <= shared_heads <= num_heads:
            raise ValueError(f"shared_heads={shared_heads} must lie between 0 and num_heads={num_heads}")
        self.active_heads = routed if active_heads is None else active_heads
        if not (1 <= self.active_heads <= routed or (self.active_heads == 0 and (not routed or router == "norm"))):
            raise ValueError(
                f"active_heads={self.active_heads} must lie between 1 and the {routed} routed heads "
                f"(num_heads={num_heads} less shared_heads={shared_heads})"
            )
        self.shared_heads, self.routed_heads, self.router = shared_heads, routed, router
        self.straight_through = straight_through
        linear = router == "linear"
        self.wg = nn.Linear(dim, routed, bias=False) if linear and routed else None
        self.wg_0 = nn.Linear(dim, 2, bias=False) if linear and routed and shared_heads else None
        self.wg_1 = nn.Linear(dim, shared_heads, bias=False) if linear and shared_heads > 1 else None

    @property
    def traits(self) -> Traits:
        traits = super().traits
        if not self.routed_heads:
            return traits.but(needs_plan=False, losses=())
        hard = "surrogate" if self.straight_through else "stopped"
        return traits.but(gradient=hard if self.router == "norm" else "exact")

    # ---- routing

    def _scores(self, x: Tensor, q: Tensor) -> Tensor:
        """(B, N, E) probabilities over routed heads."""
        if self.wg is not None:
            return self.wg(x).softmax(-1)
        norms = q[:, self.shared_heads :].norm(dim=-1).transpose(1, 2)
        # one routed head has no spread; its probability is one whatever the scale
        return (norms / norms.std(-1, keepdim=True) if self.routed_heads > 1 and len(norms) else norms).softmax(-1)

    def _choose(self, p: Tensor) -> Plan:
        return Plan("routed-heads", {"index": p.topk(self.active_heads, -1).indices}, (("N", p.shape[1]),))

    def make_plan(self, x: Tensor) -> Plan:  # type: ignore[override]
        if not self.routed_heads:
            return super().make_plan(x)
        tokens = x.flatten(1, -2)
        q = self.q_norm(self.q(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2))
        return self._choose(self._scores(tokens, q))

    def _begin(self, x: Tensor, q: Tensor, notes: RoutedNotes) -> None:
        if not self.routed_heads:
            if self.wg_1 is not None:
                notes.gates = (self.shared_heads * self.wg_1(x).softmax(-1)).transpose(1, 2)
            return
        p = self._scores(x, q)
        plan = self._choose(p.detach()) if notes.plan is None else notes.plan
        plan.expect("routed-heads", N=x.shape[1])
        index = plan.choices("index", (*p.shape[:2], self.active_heads), self.routed_heads, "routed head")
        chosen = torch.zeros_like(p).scatter(-1, index, 1.0)
        notes.gates, notes.chosen = self._gates(x, p, chosen).transpose(1, 2), chosen
        if "losses" in notes.returns:
            real = torch.ones_like(p[..., :1]) if notes.valid is None else notes.valid.unsqueeze(-1).to(p.dtype)
            total = real.sum().clamp(min=1)
            load = ((p * real).sum((0, 1)) / total) * ((chosen * real).sum((0, 1)) / total)
            notes.losses = {"balance": self.routed_heads**2 * load.mean()}

    def _gates(self, x: Tensor, p: Tensor, chosen: Tensor) -> Tensor:
        """(B, N, H): shared heads first."""
        ones = torch.ones_like(p[..., :1]).expand(-1, -1, self.shared_heads)
        if self.router == "norm":
            straight = chosen + p - p.detach() if self.training and self.straight_through else chosen
            return torch.cat([ones, straight], -1)
        picked = p * chosen
        routed = self.active_heads * picked / picked.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).eps)
        if not self.shared_heads:
            return routed
        assert self.wg_0 is not None
        always = ones if self.wg_1 is None else self.shared_heads * self.wg_1(x).softmax(-1)
        balance = 2 * self.wg_0(x).softmax(-1)
        return torch.cat([balance[..., :1] * always, balance[..., 1:] * routed], -1)

    def _gate(self, out: Tensor, notes: RoutedNotes) -> Tensor:
        return out if notes.gates is None else out * notes.gates.unsqueeze(-1)

    # ---- attention of the heads that are on

    def _mix_heads(self, q: Tensor, k: Tensor, v: Tensor, call: HeadCall, notes: RoutedNotes) -> Any:
        chosen = notes.chosen if self.active_heads < self.routed_heads and q.shape[2] > 1 else None
        per_head_mask = call.mask is not None and call.mask.heads() > 1
        dense = self.training or per_head_mask or call.return_weights
        if dense or chosen is None or q.numel() == 0 or not self.active_heads or not readable(chosen):
            return super()._mix_heads(q, k, v, call, notes)
        return self._sparse_heads(q, k, v, chosen, call)

    def _sparse_heads(self, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, call: HeadCall) -> Tensor:
        """Attention of routed heads with only the queries that chose them; other outputs are zero."""
        batch, heads, n, _ = q.shape
        repeat = heads // k.shape[1]
        fixed = self.shared_heads
        out = q.new_zeros(batch, heads, n, v.shape[-1])
        settings: dict[str, Any] = dict(
            scale=self.scale, normalizer=self.normalizer, valid=call.valid, dropout_p=call.dropout_p
        )
        keys = torch.arange(heads, device=q.device) // repeat
        k, v = k.index_select(1, keys), v.index_select(1, keys)
        bias = None if call.bias is None else call.bias.dense().expand(-1, heads, -1, -1)
        if fixed:
            out[:, :fixed] = attention(
                q[:, :fixed], k[:, :fixed], v[:, :fixed], mask=call.mask, q_pos=call.q_pos,
                bias=None if bias is None else bias[:, :fixed], **settings,
            )  # fmt: skip
        on = chosen.transpose(1, 2)  # (B, E, N)
        most = int(on.sum(-1).max())
        index = on.argsort(dim=-1, descending=True, stable=True)[..., :most]  # queries that chose the head come first
        rows = index.unsqueeze(-1)
        start = torch.arange(n, device=q.device) if call.q_pos is None else call.q_pos
        if bias is not None:
            bias = bias[:, fixed:].expand(batch, -1, -1, -1).gather(2, rows.expand(-1, -1, -1, bias.shape[-1]))
        part = attention(
            q[:, fixed:].gather(2, rows.expand(-1, -1, -1, q.shape[-1])), k[:, fixed:], v[:, fixed:],
            mask=call.mask, q_pos=start[index] if call.mask is not None else None, bias=bias, **settings,
        )  # fmt: skip
        part = part * on.gather(2, index).unsqueeze(-1)
        out[:, fixed:].scatter_(2, rows.expand_as(part), part)
        return out

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``MoHAttention`` (DiT), and MoH-LLaMA3's ``q_proj`` .. ``o_proj``."""
        theirs = Released(state_dict, "the authors' MoHAttention or MoH-LLaMA3's attention")
        rules: dict[str, Rule] = {
            r"([qkv])_proj\.(weight|bias)": r"\1.\2",
            r"o_proj\.(weight|bias)": r"proj.\1",
            r"(wg(?:_[01])?)\.(weight)": r"\1.\2",
        }
        return theirs.close(theirs.renamed(rules | PLAIN))
