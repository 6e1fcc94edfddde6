"""Point clouds: sliced Wasserstein distances with directions that a small attention network predicts, and PointNet.

Nguyen, Nguyen and Ho (2023): the sliced distance of two clouds is largest along few directions. Instead of searching
them anew for every pair, a network that is symmetric in the clouds and blind to the order of their points says around
which direction to look, and directions are drawn around it by a von Mises-Fisher law.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_choice, check_dtype, check_float, check_int, check_rank, check_real, check_valid, check_width
from ..ops import attention, linear_attention

__all__ = [
    "MAPS",
    "AmortizedSlicedWasserstein",
    "DirectionMap",
    "PointNetAutoencoder",
    "best_directions",
    "random_directions",
    "sliced_wasserstein",
    "von_mises_fisher",
]

MAPS = ("linear", "non-linear", "generalized-linear", "attention", "efficient", "linformer")


# --------------------------------------------------------------------------------------------------------------------
# Directions


def random_directions(
    batch: int, num: int, dim: int, *, like: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """(B, L, d) directions, uniform on the sphere.

    >>> random_directions(2, 4, 3).norm(dim=-1).round(decimals=4).unique().tolist()
    [1.0]
    """
    where: dict[str, Any] = {} if like is None else dict(dtype=like.dtype, device=like.device)
    return F.normalize(torch.randn(batch, num, dim, generator=generator, **where), dim=-1)


def von_mises_fisher(
    mean: Tensor,
    kappa: float,
    num: int,
    *,
    generator: torch.Generator | None = None,
    method: str = "auto",
    compat: str | None = None,
) -> Tensor:
    """(B, L, d) directions around ``mean`` (B, d), of density proportional to ``exp(kappa mean . theta)``.

    ``theta = R (w, sqrt(1 - w^2) v)`` with ``v`` uniform on the sphere of one dimension less and ``R`` the reflection
    that takes the first axis to ``mean``; gradients flow through it. In three dimensions
    ``w = 1 + log(u + (1 - u) exp(-2 kappa)) / kappa`` with ``u`` uniform; elsewhere ``w`` is drawn by rejection.

    Args:
        mean: unit vectors.
        kappa: concentration, above 0; the larger, the closer to the mean.
        num: directions L of each.
        method: ``"closed"`` (three dimensions only), ``"rejection"``, or ``"auto"``: closed where that is possible.
        compat: ``"authors"`` adds 1e-5 to the length that the reflection divides by.

    Reference: Ulrich, 1984; Wood, 1994; Davidson et al., 2018, arXiv 1804.00891.

    >>> mean = torch.tensor([[0.0, 0.0, 1.0]])
    >>> von_mises_fisher(mean, 1e4, 5)[..., 2].min() > 0.99
    tensor(True)
    """
    check_float("mean", mean)
    check_rank("mean", mean, 2, "(B, d)")
    kappa = check_real("kappa", kappa, above=0)
    check_int("num", num, least=1)
    check_choice("method", method, ("auto", "closed", "rejection"))
    check_choice("compat", compat, (None, "authors"))
    batch, dim = mean.shape
    if dim < 2:
        raise ValueError(f"mean must have at least 2 dimensions, got {dim}")
    if method == "closed" and dim != 3:
        raise ValueError(f"method='closed' serves 3 dimensions, got {dim}; use 'rejection'")
    if dim == 3 and method != "rejection":
        u = torch.rand(num, batch, 1, generator=generator, dtype=mean.dtype, device=mean.device)
        tiny = torch.finfo(u.dtype).tiny
        parts = torch.stack([u.clamp(min=tiny).log(), (1 - u).clamp(min=tiny).log() - 2 * kappa])
        w = 1 + parts.logsumexp(0) / kappa
    else:
        w = _rejected(mean, kappa, num, generator)
    v = torch.randn(num, batch, dim, generator=generator, dtype=mean.dtype, device=mean.device)[..., 1:]
    v = v / v.norm(dim=-1, keepdim=True)
    x = torch.cat([w, (1 - w.square()).clamp(min=1e-10).sqrt() * v], -1)
    axis = F.one_hot(torch.zeros((), dtype=torch.long, device=mean.device), dim).to(mean.dtype)
    u = axis - mean
    if compat == "authors":
        u = u / (u.norm(dim=-1, keepdim=True) + 1e-5)
        out = x - 2 * (x * u).sum(-1, keepdim=True) * u
    else:
        size = u.square().sum(-1, keepdim=True)
        out = x - 2 * (x * u).sum(-1, keepdim=True) * u / torch.where(size == 0, 1, size)
    return out.transpose(0, 1)


def _rejected(mean: Tensor, kappa: float, num: int, generator: torch.Generator | None) -> Tensor:
    """(L, B, 1) cosines between a direction and its mean, by Wood's rejection."""
    batch, dim = mean.shape
    m = dim - 1
    # b in the form that loses nothing where kappa is large
    b = m / (2 * kappa + math.sqrt(4 * kappa**2 + m**2))
    top = (1 - b) / (1 + b)
    bound = kappa * top + m * math.log(1 - top**2)
    w = mean.new_empty(num * batch)
    open_ = torch.arange(num * batch, device=mean.device)
    while len(open_):
        # Beta(m/2, m/2) from two chi-squares, so that a generator can be given
        normal = torch.randn(2, len(open_), m, generator=generator, dtype=mean.dtype, device=mean.device)
        a, c = normal.square().sum(-1)
        z = a / (a + c)
        u = torch.rand(len(open_), generator=generator, dtype=mean.dtype, device=mean.device)
        tried = (1 - (1 + b) * z) / (1 - (1 - b) * z)
        taken = kappa * tried + m * (1 - top * tried).log() - bound >= u.clamp(min=torch.finfo(u.dtype).tiny).log()
        w[open_[taken]] = tried[taken]
        open_ = open_[~taken]
    return w.view(num, batch, 1)


# --------------------------------------------------------------------------------------------------------------------
# Distances


def _check_clouds(x: Tensor, y: Tensor, x_valid: Tensor | None, y_valid: Tensor | None) -> None:
    for name, cloud, valid in (("x", x, x_valid), ("y", y, y_valid)):
        check_float(name, cloud)
        check_rank(name, cloud, 3, "(B, m, d)")
        check_valid(f"{name}_valid", valid, cloud.shape[:2])
        if cloud.shape[1] == 0:
            raise ValueError(f"{name} has no points")
    check_dtype(x=x, y=y)
    if x.shape[0] != y.shape[0] or x.shape[2] != y.shape[2]:
        raise ValueError(
            f"x and y must be batches of as many clouds of one dimension, got {tuple(x.shape)} and {tuple(y.shape)}"
        )


def _quantiles_apart(x: Tensor, y: Tensor, nx: Tensor, ny: Tensor, p: float) -> Tensor:
    """(B, L): the p-th power of the distance of two sorted samples, the mean over quantiles, exactly.

    Args:
        x, y: (B, L, m), (B, L, n) ascending; what does not exist stands at the end.
        nx, ny: (B,) points that exist.
    """
    m, n = x.shape[-1], y.shape[-1]

    def ends(count: Tensor, size: int) -> Tensor:
        steps = torch.arange(1, size + 1, device=x.device)
        return torch.minimum(steps / count[:, None].to(x.dtype), torch.ones((), dtype=x.dtype, device=x.device))

    # Between two neighbouring steps of either staircase both are constant.
    of_x, of_y = ends(nx, m), ends(ny, n)
    steps = torch.cat([of_x, of_y], 1).sort(1).values
    low = F.pad(steps, (1, 0))[:, :-1]
    middle = (steps + low) / 2
    at_x = (middle * nx[:, None]).long().clamp(min=0).minimum(nx[:, None] - 1)
    at_y = (middle * ny[:, None]).long().clamp(min=0).minimum(ny[:, None] - 1)
    apart = x.gather(2, at_x[:, None].expand(-1, x.shape[1], -1)) - y.gather(
        2, at_y[:, None].expand(-1, y.shape[1], -1)
    )
    return (apart.abs() ** p * (steps - low)[:, None]).sum(-1)


def sliced_wasserstein(
    x: Tensor,
    y: Tensor,
    directions: Tensor,
    *,
    p: float = 2.0,
    x_valid: Tensor | None = None,
    y_valid: Tensor | None = None,
    quantiles: bool = False,
) -> Tensor:
    """(B,): the mean over directions of ``sum_i |sort(x . theta)_i - sort(y . theta)_i|^p``.

    The authors sum over points, so that the distance grows with their number. Clouds of unequal number are compared by
    their quantiles: the sum becomes the mean over quantiles, times the mean number of points (with equal numbers it is
    the same).

    Args:
        x, y: (B, m, d) and (B, n, d) points.
        directions: (B, L, d) unit vectors; gradients reach them.
        p: power.
        x_valid, y_valid: (B, m), (B, n) boolean, which points exist.
        quantiles: compare clouds of unequal number; without it they raise.

    >>> x = torch.randn(2, 5, 3)
    >>> sliced_wasserstein(x, x.flip(1), random_directions(2, 7, 3)).abs().max() < 1e-9
    tensor(True)
    """
    _check_clouds(x, y, x_valid, y_valid)
    check_rank("directions", directions, 3, "(B, L, d)")
    if directions.shape[0] != x.shape[0] or directions.shape[2] != x.shape[2]:
        raise ValueError(
            f"directions must be (B, L, d) with B={x.shape[0]} and d={x.shape[2]}, got {tuple(directions.shape)}"
        )
    check_real("p", p, least=1)
    masked = x_valid is not None or y_valid is not None
    if (x.shape[1] != y.shape[1] or masked) and not quantiles:
        what = "valid was given" if masked else f"x has {x.shape[1]} points and y {y.shape[1]}"
        raise ValueError(f"{what}: points are paired by their order, one to one; pass quantiles=True to compare others")
    of_x, of_y = (cloud @ directions.transpose(1, 2) for cloud in (x, y))
    if not quantiles:
        apart = of_x.transpose(1, 2).sort(-1).values - of_y.transpose(1, 2).sort(-1).values
        return (apart.abs() ** p).sum(-1).mean(1)
    counts, sorted_ = [], []
    for cloud, values, valid in ((x, of_x, x_valid), (y, of_y, y_valid)):
        count = torch.full(cloud.shape[:1], cloud.shape[1], device=x.device)
        if valid is not None:
            count = valid.sum(1)
            if bool((count == 0).any()):
                raise ValueError("x_valid and y_valid must leave at least one point of every cloud")
            values = values.masked_fill(~valid.unsqueeze(-1), float("inf"))
        counts.append(count)
        sorted_.append(values.transpose(1, 2).sort(-1).values)
    mean = _quantiles_apart(sorted_[0], sorted_[1], counts[0], counts[1], p)
    return mean.mean(1) * (counts[0] + counts[1]) / 2


def best_directions(
    x: Tensor,
    y: Tensor,
    start: Tensor,
    steps: int,
    lr: float,
    *,
    kappa: float | None = None,
    num: int = 100,
    p: float = 2.0,
    squared: bool = True,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    generator: torch.Generator | None = None,
    compat: str | None = None,
    **clouds: Any,
) -> Tensor:
    """(B, 1, d) directions that part each pair most, by gradient steps that stay on the sphere.

    Without ``kappa`` this is Max-SW's search, with it v-DSW's: the distance is then that along ``num`` directions
    around the one sought. The clouds get no gradient.

    Args:
        x, y: clouds, as :func:`sliced_wasserstein` takes them; further arguments go there.
        start: (B, 1, d) unit vectors to begin with.
        steps, lr, optimizer: of the search.
        squared: maximise the distance itself, and not its square root.
        compat: ``"authors"`` takes gradients as they are, not along the sphere; see also :func:`von_mises_fisher`.
    """
    check_int("steps", steps, least=0)
    x, y = x.detach(), y.detach()
    at = start.detach().clone().requires_grad_()
    search = optimizer([at], lr=lr)
    for _ in range(steps):
        drawn = at if kappa is None else von_mises_fisher(at.squeeze(1), kappa, num, generator=generator, compat=compat)
        apart = sliced_wasserstein(x, y, drawn, p=p, **clouds)
        loss = -(apart if squared else apart.sqrt()).mean()
        (grad,) = torch.autograd.grad(loss, at)
        if compat is None:
            # Longer vectors part clouds more, whatever their direction: optimizers that scale coordinates heed that.
            grad = grad - (grad * at.detach()).sum(-1, keepdim=True) * at.detach()
        at.grad = grad
        search.step()
        with torch.no_grad():
            at.copy_(at / at.norm(dim=-1, keepdim=True))
    return at.detach()


# --------------------------------------------------------------------------------------------------------------------
# Maps from two clouds to a direction


class _CloudAttention(nn.Module):
    """The mean over points of single-head attention among the raw points of one cloud."""

    def __init__(self, kind: str, dim: int, key_dim: int, points: int | None, length: int, sharing: bool, drop: float):
        super().__init__()
        self.kind, self.drop = kind, drop
        self.toqueries, self.tokeys = nn.Linear(dim, key_dim), nn.Linear(dim, key_dim)
        self.tovalues = nn.Linear(dim, dim)
        if kind == "linformer":
            assert points is not None
            self.Kproj = nn.Linear(points, length)
            nn.init.xavier_normal_(self.Kproj.weight)
            self.Vproj = self.Kproj
            if not sharing:
                self.Vproj = nn.Linear(points, length)
                nn.init.xavier_normal_(self.Vproj.weight)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        q, k, v = self.toqueries(x), self.tokeys(x), self.tovalues(x)
        if self.kind == "efficient":
            if valid is not None:
                k = k.masked_fill(~valid.unsqueeze(-1), float("-inf"))
            q, k = q.softmax(-1), k.softmax(1)
            out = linear_attention(q[:, None], k[:, None], v[:, None], causal=False)
        else:
            if self.kind == "linformer":
                k, v = self.Kproj(k.transpose(1, 2)).transpose(1, 2), self.Vproj(v.transpose(1, 2)).transpose(1, 2)
            out = attention(
                q[:, None], k[:, None], v[:, None], valid=valid, dropout_p=self.drop if self.training else 0.0
            )
        out = out[:, 0]
        if valid is None:
            return out.mean(1, keepdim=True)
        return out.masked_fill(~valid.unsqueeze(-1), 0.0).sum(1, keepdim=True) / valid.sum(1)[:, None, None]


class DirectionMap(nn.Module):
    """Two clouds (B, m, d) to the direction (B, 1, d) around which they differ most: one of the six released maps.

    The attention maps give ``normalise((A(x) + A(y)) / 2)`` with ``A`` the mean over points of single-head attention:
    ``"attention"`` (softmax), ``"efficient"`` (``softmax_channels(Q) (softmax_points(K)^T V)``, linear in the number of
    points) and ``"linformer"`` (keys and values mixed down to ``length`` by learned matrices). They are symmetric in
    the clouds; the first two do not see the order of points. The older maps are neither: ``"linear"`` is a weighted
    mean of the ``2 m`` points, ``"non-linear"`` sends it through a small network, ``"generalized-linear"`` the points
    before.

    Parameters have the names of the authors' classes, whose state dicts load as they are.

    Args:
        kind: one of :data:`MAPS`.
        dim: coordinates d of a point.
        points: points m of each cloud, for all but ``"attention"`` and ``"efficient"``, which take any number.
        key_dim: width of queries and keys.
        length: rows that ``"linformer"`` keeps.
        sharing: ``"linformer"``: one matrix for keys and values.
        dropout: of the weights of ``"attention"`` and ``"linformer"``.

    Reference: Nguyen et al., 2023, arXiv 2301.04791; the linear maps are those of arXiv 2203.13417.

    >>> DirectionMap("efficient")(torch.randn(2, 9, 3), torch.randn(2, 9, 3)).shape
    torch.Size([2, 1, 3])
    """

    def __init__(
        self,
        kind: str = "attention",
        dim: int = 3,
        points: int | None = None,
        key_dim: int = 64,
        length: int = 64,
        sharing: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        check_choice("kind", kind, MAPS)
        for name, value in (("dim", dim), ("key_dim", key_dim), ("length", length)):
            check_int(name, value, least=1)
        check_real("dropout", dropout, least=0, below=1)
        if kind not in ("attention", "efficient"):
            if points is None:
                raise ValueError(f"points must be given for kind={kind!r}, which has a weight for every point")
            check_int("points", points, least=1)
        self.kind, self.dim, self.points = kind, dim, points
        if kind in MAPS[3:]:
            self.attn = _CloudAttention(kind, dim, key_dim, points, length, sharing, dropout)
            return
        self.f = nn.Sequential(nn.Linear(2 * (points or 0), 1))
        if kind != "linear":
            inner = nn.Sequential(nn.Linear(dim, dim), nn.Sigmoid(), nn.Linear(dim, dim))
            self.add_module("h" if kind == "non-linear" else "g", inner)

    def forward(self, x: Tensor, y: Tensor, x_valid: Tensor | None = None, y_valid: Tensor | None = None) -> Tensor:
        _check_clouds(x, y, x_valid, y_valid)
        check_width("x", x, self.dim)
        if self.kind in MAPS[:3] or self.kind == "linformer":
            if x_valid is not None or y_valid is not None:
                raise ValueError(
                    f"x_valid and y_valid are not possible with kind={self.kind!r}: every point has a weight"
                )
            for name, cloud in (("x", x), ("y", y)):
                if cloud.shape[1] != self.points:
                    raise ValueError(f"{name} has {cloud.shape[1]} points, this map was built for points={self.points}")
        if self.kind in MAPS[3:]:
            out = (self.attn(x, x_valid) + self.attn(y, y_valid)) / 2
        else:
            both = torch.cat([x, y], 1)
            if self.kind == "generalized-linear":
                both = self.get_submodule("g")(both)
            out = self.f(both.transpose(1, 2)).transpose(1, 2)
            if self.kind == "non-linear":
                out = self.get_submodule("h")(out)
        return out / out.norm(dim=-1, keepdim=True)


class AmortizedSlicedWasserstein(nn.Module):
    """The loss between clouds whose directions a map predicts: amortized v-DSW, or amortized Max-SW without ``kappa``.

    One step of training is :meth:`train_map`, which moves the map's weights towards directions along which the clouds
    (without gradient) lie farther apart, and then the call itself, whose gradient reaches the clouds only::

        loss_of = AmortizedSlicedWasserstein(DirectionMap("efficient"))
        moving = torch.optim.Adam(loss_of.map.parameters(), lr=1e-3, betas=(0.0, 0.9))
        loss_of.train_map(x, reconstructed, moving)
        loss_of(x, reconstructed).backward()

    Args:
        map: a :class:`DirectionMap`, or any module of two clouds that gives unit vectors (B, 1, d).
        num_projections: directions drawn around the predicted one.
        kappa: concentration of the draw; ``None`` takes the predicted direction alone.
        p: power of the distance.
        squared: maximise the distance itself, and not its square root.
        refine: gradient steps on the predicted direction in every call, at learning rate ``refine_lr``.
        compat: ``"authors"``, see :func:`von_mises_fisher`.

    Reference: Nguyen et al., 2023, arXiv 2301.04791, algorithms 1 and 2.
    """

    def __init__(
        self,
        map: nn.Module,
        num_projections: int = 100,
        kappa: float | None = 1.0,
        p: float = 2.0,
        squared: bool = True,
        refine: int = 0,
        refine_lr: float = 1e-4,
        compat: str | None = None,
    ):
        super().__init__()
        check_int("num_projections", num_projections, least=1)
        if kappa is not None:
            check_real("kappa", kappa, above=0)
        check_real("p", p, least=1)
        check_int("refine", refine, least=0)
        check_choice("compat", compat, (None, "authors"))
        self.map, self.num_projections, self.kappa, self.p, self.squared = map, num_projections, kappa, p, squared
        self.refine, self.refine_lr, self.compat = refine, refine_lr, compat

    def _around(self, center: Tensor, generator: torch.Generator | None) -> Tensor:
        if self.kappa is None:
            return center
        return von_mises_fisher(
            center.squeeze(1), self.kappa, self.num_projections, generator=generator, compat=self.compat
        )

    def _center(self, x: Tensor, y: Tensor, clouds: dict[str, Any]) -> Tensor:
        known = {k: v for k, v in clouds.items() if k.endswith("valid") and v is not None}
        return self.map(x.detach(), y.detach(), **known)

    def objective(self, x: Tensor, y: Tensor, generator: torch.Generator | None = None, **clouds: Any) -> Tensor:
        """What the map is trained to make small: minus the distance along its directions. Clouds get no gradient."""
        drawn = self._around(self._center(x, y, clouds), generator)
        apart = sliced_wasserstein(x.detach(), y.detach(), drawn, p=self.p, **clouds)
        return -(apart if self.squared else apart.sqrt()).mean()

    def train_map(
        self, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer, steps: int = 1,
        generator: torch.Generator | None = None, **clouds: Any,
    ) -> float:  # fmt: skip
        """``steps`` of the optimizer of the map's weights; the last objective."""
        check_int("steps", steps, least=1)
        for _ in range(steps):
            loss = self.objective(x, y, generator, **clouds)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    def forward(self, x: Tensor, y: Tensor, generator: torch.Generator | None = None, **clouds: Any) -> Tensor:
        """The mean distance of a batch; ``x_valid``, ``y_valid`` and ``quantiles`` as :func:`sliced_wasserstein`."""
        with torch.no_grad():
            center = self._center(x, y, clouds)
        if self.refine:
            center = best_directions(
                x, y, center, self.refine, self.refine_lr, kappa=self.kappa, num=self.num_projections, p=self.p,
                squared=self.squared, generator=generator, compat=self.compat, **clouds,
            )  # fmt: skip
        return sliced_wasserstein(x, y, self._around(center.detach(), generator), p=self.p, **clouds).mean()


# --------------------------------------------------------------------------------------------------------------------
# PointNet


class _Encoder(nn.Module):
    def __init__(self, latent: int, dim: int):
        super().__init__()

        def block(*widths: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for a, b in zip(widths[:-1], widths[1:], strict=True):
                layers += [nn.Conv1d(a, b, 1), nn.BatchNorm1d(b), nn.ReLU()]
            return nn.Sequential(*layers)

        self.mlp1, self.mlp2 = block(dim, 64, 64), block(64, 64, 128, 1024)
        self.fc_mu = nn.Linear(1024, latent)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc_mu(self.mlp2(self.mlp1(x.transpose(1, 2))).amax(2))


class _Decoder(nn.Module):
    def __init__(self, latent: int, dim: int, points: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(latent, 1024), nn.Linear(1024, 1024)
        self.bn1, self.bn2 = nn.BatchNorm1d(1024), nn.BatchNorm1d(1024)
        self.fc3 = nn.Linear(1024, points * dim)
        self.points, self.dim = points, dim

    def forward(self, z: Tensor) -> Tensor:
        z = F.relu(self.bn2(self.fc2(F.relu(self.bn1(self.fc1(z))))))
        return self.fc3(z).tanh().unflatten(1, (self.points, self.dim))


class PointNetAutoencoder(nn.Module):
    """Clouds (B, m, d) in the cube of side 2 to a unit vector (B, latent), and back to (B, points, d).

    Args:
        latent: width of the code.
        dim: coordinates of a point.
        points: points of what is decoded.
        normalize: codes have unit length.

    Reference: the autoencoder of arXiv 2301.04791; Qi et al., 2017, arXiv 1612.00593.

    >>> sum(p.numel() for p in PointNetAutoencoder(points=2048).parameters())
    8028544
    """

    def __init__(self, latent: int = 256, dim: int = 3, points: int = 1024, normalize: bool = True):
        super().__init__()
        for name, value in (("latent", latent), ("dim", dim), ("points", points)):
            check_int(name, value, least=1)
        self.normalize = normalize
        self.encoder, self.decoder = _Encoder(latent, dim), _Decoder(latent, dim, points)

    def encode(self, x: Tensor) -> Tensor:
        check_float("x", x)
        check_rank("x", x, 3, "(B, m, d)")
        z = self.encoder(x)
        return F.normalize(z) if self.normalize else z

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))
