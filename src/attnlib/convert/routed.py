"""MLPs of a model that exists become routed ones: frozen, with a router and low-rank maps that are trained.

Gui et al., 2023, "SPT", arXiv 2312.10365; see :class:`attnlib.nn.sparse.spt.RoutedMlp`. ::

    routed = route_mlps(model, block=256, rank=16)
    optimizer = torch.optim.AdamW(routed.trained(), lr=1e-4)
    ...
    routed.restore()
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..checks import check_int
from ..nn.sparse.spt import RoutedMlp

#: Names of the maps of an MLP: hidden, output, gate.
NAMES = (("up_proj", "down_proj", "gate_proj"), ("up", "down", "gate"), ("fc1", "fc2", None), ("c_fc", "c_proj", None))
#: Names of its activation.
ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation")


class Routed:
    """What :func:`route_mlps` put into a model.

    Attributes:
        mlps: by the path of the MLP that each stands for.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.mlps: dict[str, RoutedMlp] = {}
        self._before: dict[str, nn.Module] = {}
        self._grads: list[tuple[nn.Parameter, bool]] = []

    def trained(self) -> list[nn.Parameter]:
        """Routers and low-rank maps, and all of an MLP without any."""
        return [p for mlp in self.mlps.values() for p in mlp.parameters() if p.requires_grad]

    def restore(self) -> None:
        """The model as it was, bit for bit where its own maps stayed frozen."""
        for path, module in self._before.items():
            self.model.set_submodule(path, module)
        for p, wanted in self._grads:
            p.requires_grad_(wanted)
        self._before, self._grads = {}, []

    def __repr__(self) -> str:
        return f"Routed({len(self.mlps)} MLPs of {type(self.model).__name__})"


def _maps(module: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear | None, nn.Module] | None:
    """The maps and the activation of a module that is a plain MLP."""
    parts = dict(module.named_children())
    for up, down, gate in NAMES:
        if not {up, down, *([gate] if gate else [])} <= set(parts):
            continue
        act = next(
            (getattr(module, name) for name in ACTIVATIONS if isinstance(getattr(module, name, None), nn.Module)), None
        )
        found: list[Any] = [parts[up], parts[down], parts[gate] if gate else None]
        plain = all(type(m) is nn.Linear for m in found if m is not None)
        biased = [m.bias is not None for m in found if isinstance(m, nn.Linear)]
        if act is None or not plain or any(biased) != (gate is None) or getattr(module, "gated", False):
            return None
        if gate is None and getattr(module, "gate", None) is None and getattr(module, "dwconv", None) is not None:
            return None
        return found[0], found[1], found[2], act
    return None


def route_mlps(
    model: nn.Module,
    block: int = 256,
    rank: int = 16,
    share: float = 0.5,
    layers: Sequence[str] | None = None,
) -> Routed:
    """Replace the MLPs of a model, in place.

    Args:
        model: of transformers or ours, with MLPs of two maps and biases, or three maps and none.
        block: hidden channels per block; must divide hidden widths.
        rank: of the low-rank maps; 0 trains the maps themselves.
        share: of blocks that a token uses, at least one.
        layers: paths of the MLPs; all that are known by default.

    Raises:
        ValueError: no MLP that is known, or one that the blocks do not divide.
    """
    check_int("block", block, least=1)
    if not 0 < share <= 1:
        raise ValueError(f"share={share} must lie above 0 and be at most 1")
    found = {name: maps for name, module in model.named_modules() if (maps := _maps(module)) is not None}
    if layers is not None:
        wrong = [name for name in layers if name not in found]
        if wrong:
            raise ValueError(f"layers holds {wrong[0]!r}, which is no MLP that is known; possible: {list(found)}")
        found = {name: found[name] for name in layers}
    if not found:
        raise ValueError(f"{type(model).__name__} has no MLP that can be routed")
    for name, (fc1, *_) in found.items():
        if fc1.out_features % block:
            raise ValueError(f"block={block} does not divide the {fc1.out_features} hidden channels of {name!r}")
    out = Routed(model)
    for name, (fc1, fc2, gate, act) in found.items():
        out._before[name] = model.get_submodule(name)
        out._grads += [(p, p.requires_grad) for m in (fc1, fc2, gate) if m is not None for p in m.parameters()]
        blocks = fc1.out_features // block
        active = max(1, round(blocks * share))
        mlp = RoutedMlp.of(fc1, fc2, gate, act, blocks=blocks, active=active, rank=rank)
        mlp.train(model.training)
        out.mlps[name] = mlp
        model.set_submodule(name, mlp)
    return out


def load_of_blocks(mlp: RoutedMlp, x: Tensor) -> Tensor:
    """(blocks,) share of the tokens (.., dim) that use each block.

    >>> import torch
    >>> load_of_blocks(RoutedMlp(4, 8, 2, active=2), torch.zeros(3, 4)).tolist()
    [1.0, 1.0]
    """
    chosen, prob = mlp.route(x.reshape(-1, x.shape[-1]))
    return prob.new_zeros(mlp.blocks).index_add(0, chosen.flatten(), prob.new_ones(chosen.numel())) / max(1, len(prob))
