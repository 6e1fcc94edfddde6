"""SoftPAG: push the attention maps of chosen heads towards the identity, by a chosen amount.

For a head with strength ``u`` in [0, 1],

    ``A~ = (1 - u) A + u I``,  hence  ``A~ V = (1 - u) A V + u V``:

no map is needed, the model's kernel runs and its output is blended with the values. ``u = 1`` on all heads of a layer
is perturbed-attention guidance. Run the denoiser twice, with and without, and :func:`guide` the prediction away from
the perturbed one.

In joint attention the identity acts on image queries. ``joint="full"`` replaces their map by the identity (output
``v``); ``joint="image"`` forbids the other image keys only and leaves text keys in the same softmax, as diffusers'
perturbed attention for joint blocks does. The paper's text does not settle which of both it means, and the authors'
code is not public; ``"full"`` is the default.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ...checks import check_int, check_real, shaped
from ...hooks.intervention import Intervention, check_heads
from ...hooks.site import Site
from ...types import check_choice, to_list

Head = TypeVar("Head", bound=Hashable)


class SoftPAG(Intervention):
    """Blend chosen heads of self or joint attention with the identity.

    Args:
        strength: u, 0 leaves the model as it is, 1 replaces the map by the identity.
        heads: heads per layer, ``{layer: [head, ...]}``; or heads in every layer of ``layers``; ``None`` for all heads.
        layers: numbers or name patterns, when ``heads`` does not name them.
        rows: names of the batch rows to perturb; ``None`` for all.
        pass_name: perturb only in the pass of this name (see ``session.at``); ``None`` for every pass.
        joint: ``"full"`` or ``"image"``, see the module.

    Raises:
        ValueError: a strength outside [0, 1], heads that do not exist, a call with different numbers of queries and
            keys.

    Reference: Ahn et al., 2025, arXiv 2506.10978 (SoftPAG); Ahn et al., 2024, arXiv 2403.17377 (PAG).

    >>> SoftPAG(0.5, heads={3: [0, 2]}).layers
    [3]
    """

    name: ClassVar[str] = "softpag"
    kinds: ClassVar[tuple[str, ...]] = ("self", "joint")
    own_keys = True

    def __init__(
        self,
        strength: float = 1.0,
        heads: Mapping[int, Sequence[int]] | Sequence[int] | None = None,
        layers: Sequence[int | str] | None = None,
        rows: Sequence[str] | None = None,
        pass_name: str | None = None,
        joint: str = "full",
    ):
        if not 0.0 <= strength <= 1.0:
            raise ValueError(f"strength must lie in [0, 1], got {strength}")
        check_choice("joint", joint, ("full", "image"))
        if isinstance(rows, str):
            raise TypeError(f"rows must be a sequence of names, got the string {rows!r}; write rows=({rows!r},)")
        if isinstance(heads, Mapping):
            if layers is not None:
                raise ValueError("heads names its layers already; leave layers out")
            layers = sorted(heads)
        self.strength, self.heads, self.pass_name, self.joint = strength, heads, pass_name, joint
        self.rows = None if rows is None else tuple(rows)
        self.layers = None if heads == {} else to_list("layers", layers)

    @property
    def identity(self) -> bool:
        return self.strength == 0.0 or (self.heads is not None and not self._any_head())

    def _any_head(self) -> bool:
        assert self.heads is not None
        return any(self.heads.values()) if isinstance(self.heads, Mapping) else bool(len(self.heads))

    def _chosen(self, site: Site) -> Sequence[int]:
        if self.heads is None:
            return range(site.heads)
        return self.heads.get(site.layer, ()) if isinstance(self.heads, Mapping) else self.heads

    def wants(self, site: Site) -> bool:
        check_heads(self, self._chosen(site), site)
        return True

    def around_attention(self, site: Site, q: Tensor, k: Tensor, v: Tensor, call: Callable[..., Tensor]) -> Tensor:
        out = call(q, k, v)
        heads = self._chosen(site)
        if not len(heads) or (self.pass_name is not None and site.pass_name != self.pass_name):
            return out
        if q.shape[2] != k.shape[2]:
            raise ValueError(
                f"SoftPAG: layer {site.layer} ({site.name}) has {q.shape[2]} queries and {k.shape[2]} keys; the "
                "identity map needs as many of both"
            )
        where = torch.zeros(1, q.shape[1], 1, 1, dtype=torch.bool, device=q.device)
        where[:, list(heads)] = True
        if self.rows is not None:
            where = where & site.rows_named(self.rows, q.device).view(-1, 1, 1, 1)
        denoises = any(cls.__module__.startswith("diffusers.") for cls in type(site.module).__mro__)
        if site.kind == "joint" or (denoises and site.q_layout is None):
            image = self._image(site, q.device)
            where = where & image.view(1, 1, -1, 1)
            if self.joint == "image":
                same = torch.eye(len(image), dtype=torch.bool, device=q.device)
                target = call(q, k, v, mask=~(image[:, None] & image & ~same))
                return torch.where(where, (1 - self.strength) * out + self.strength * target, out)
        target = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        return torch.where(where, (1 - self.strength) * out + self.strength * target, out)

    @staticmethod
    def _image(site: Site, device: torch.device) -> Tensor:
        """(N,) boolean: image tokens of joint attention."""
        if site.q_layout is None or "image" not in site.q_layout.names:
            raise ValueError(
                f"SoftPAG: which tokens of the {site.kind} attention of layer {site.layer} ({site.name}) are image "
                "tokens is not known; a description of this processor's order of streams is missing"
            )
        start, stop = site.q_layout.span("image")
        slots = torch.arange(len(site.q_layout), device=device)
        return (slots >= start) & (slots < stop)


@shaped(pred="float (...)", perturbed="float (...)", uncond="float (...)")
def guide(
    pred: Tensor, perturbed: Tensor, weight: float = 3.0, uncond: Tensor | None = None, cfg: float = 1.0
) -> Tensor:
    """The prediction guided away from the perturbed one, ``e_u + g (e - e_u) + w (e - e_pert)``.

    Args:
        pred: conditional prediction (noise or velocity).
        perturbed: the same with heads perturbed.
        weight: w, 0 leaves the rest.
        uncond: unconditional prediction, for classifier-free guidance.
        cfg: g, used with ``uncond``.

    Returns:
        A prediction of the same shape.

    >>> guide(torch.ones(2), torch.zeros(2), weight=2.0).tolist()
    [3.0, 3.0]
    """
    base = pred if uncond is None else uncond + cfg * (pred - uncond)
    return base if weight == 0 else base + weight * (pred - perturbed)


def adaptive_weight(weight: float, slope: float, timestep: float | Tensor, timesteps: int = 1000) -> float:
    """A weight for :func:`guide` that falls as denoising goes on: ``max(0, w - slope (timesteps - t))``.

    Args:
        weight: w at the start.
        slope: by how much it falls with every timestep; 0 keeps it.
        timestep: t, from ``timesteps`` down to 0; a scheduler's, a tensor of one number, too.
        timesteps: of training.

    >>> round(adaptive_weight(3.0, 0.004, 500), 6), adaptive_weight(3.0, 0.01, 500)
    (1.0, 0.0)
    """
    weight, slope = check_real("weight", weight), check_real("slope", slope, least=0.0)
    t = check_real("timestep", timestep.item() if isinstance(timestep, Tensor) and timestep.numel() == 1 else timestep)
    return max(0.0, weight - slope * (check_int("timesteps", timesteps, least=1) - t))


@shaped()
def hunt_heads(
    candidates: Sequence[Head], objective: Callable[[list[Head]], float], rounds: int, per_round: int = 1
) -> list[Head]:
    """HeadHunter: grow a set of heads greedily, ``per_round`` at a time, by an objective to be maximised.

    Args:
        candidates: heads to choose from, e.g. ``(layer, head)`` pairs.
        objective: score of generating with a set of heads perturbed.
        rounds: R.
        per_round: k, heads added in each round.

    Returns:
        The chosen heads, in order of choice, without repeats.

    Raises:
        ValueError: more heads asked for than there are.

    >>> hunt_heads([(0, 0), (0, 1), (0, 2)], lambda s: sum(h for _, h in s), rounds=2)
    [(0, 2), (0, 1)]
    """
    if rounds < 0 or per_round < 1 or rounds * per_round > len(candidates):
        raise ValueError(
            f"rounds={rounds} of per_round={per_round} need {rounds * per_round} heads, but there are {len(candidates)}"
        )
    chosen: list[Any] = []
    for _ in range(rounds):
        left = [h for h in candidates if h not in chosen]
        scores = {h: objective([*chosen, h]) for h in left}
        chosen += sorted(left, key=lambda h: -scores[h])[:per_round]  # noqa: B023 - used at once
    return chosen
