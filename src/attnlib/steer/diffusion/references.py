"""Keys and values that come from elsewhere: image prompts in branches of their own, other rows, other images.

Two shapes of the same idea. A **branch** attends with the model's own queries to a reference's keys and values, made by
maps of its own, and what comes out is added to the text's with a weight per reference and per place::

    O(p) = A(q_p, K_text, V_text) + sum_r s_r w_r(p) A(q_p, W_k e_r, W_v e_r)

which is IP-Adapter where ``w`` is one. **Shared** keys stand beside the model's own under one softmax: those of other
prompts of the batch, or those that a :class:`KeyStore` kept from another image.

::

    branches = ReferenceBranches.of(pipe.unet, project=projection)
    branches.refer(embeds)                       # (prompts or 1, references, ...)
    with attnlib.attach(pipe, branches):
        pipe("a dog and a hat")
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_named, check_rank, check_real, check_tensors, check_type, describe
from ...hooks.intervention import Intervention
from ...hooks.pipelines import denoiser_of, is_pipeline
from ...hooks.site import Site
from ...nn.released import Released

#: Up to so many tokens of references, all branches are computed at once, by their maps.
FEW = 64

#: A weight of all references, or of each.
Scale = float | Sequence[float]


class ReferenceMaps(nn.Module):
    """Keys and values of a reference's tokens for one cross attention.

    Args:
        width: of the tokens.
        dim: of all heads together.
    """

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.to_k_ip = nn.Linear(width, dim, bias=False)
        self.to_v_ip = nn.Linear(width, dim, bias=False)

    def begin(self, attention: Any) -> None:
        """Start as the maps of the text, where they are as wide."""
        for mine, theirs in ((self.to_k_ip, attention.to_k), (self.to_v_ip, attention.to_v)):
            if isinstance(theirs, nn.Linear) and theirs.weight.shape == mine.weight.shape:
                with torch.no_grad():
                    mine.weight.copy_(theirs.weight)


class ReferenceBranches(Intervention, nn.Module):
    """A branch of cross attention for each reference, beside that of the text.

    The maps are modules of this one: they train, move and save like any others. Rows under guidance (``"uncond"``) read
    the empty reference. Keys and values are kept over the steps of a sampling run, where no gradient is wanted.

    Args:
        maps: from the name of a cross attention to its :class:`ReferenceMaps`.
        project: what makes tokens (n, T, C) of a reference's features (n, ...); ``None`` where tokens are given.
        scale: strength of the branches, one for all or one per reference; or by name pattern of the layer, and then 0
            where none fits.
        step_range: ``(first, last)`` fractions of the steps at which the branches act.

    Reference: Ye et al., 2023, arXiv 2308.06721.
    """

    name: ClassVar[str] = "references"
    kinds: ClassVar[tuple[str, ...]] = ("cross",)
    #: What the maps of one layer are.
    maps_class: ClassVar[type[ReferenceMaps]] = ReferenceMaps

    def __init__(
        self,
        maps: Mapping[str, nn.Module],
        project: nn.Module | None = None,
        scale: float | Sequence[float] | Mapping[str, Any] = 1.0,
        step_range: Sequence[float] = (0.0, 1.0),
    ):
        nn.Module.__init__(self)
        check_named("maps", maps, ReferenceMaps, "the model has no cross attention that a reference could stand beside")
        self.names = tuple(maps)
        self.maps = nn.ModuleList(maps.values())
        self.project = project
        self.layers = list(self.names)
        self.scale = scale
        low, high = (check_real("step_range", value, least=0, most=1) for value in step_range)
        if low > high:
            raise ValueError(f"step_range must be (first, last) fractions in order, got {tuple(step_range)}")
        self.step_range = (low, high)
        self._numbers: dict[str, int] = {}
        self._images: Tensor | None = None
        self._empty: Tensor | None = None
        self._counts: list[list[int]] | None = None
        self._kept: dict[Any, tuple[Any, Any]] = {}

    @classmethod
    def of(cls, model: Any, project: nn.Module | None = None, width: int | None = None, **settings: Any) -> Any:
        """For all cross attention of a U-Net (or of a pipeline's), with maps that begin as those of the text.

        Args:
            model: the denoiser, or a pipeline.
            project: see the class.
            width: of the references' tokens; that of the text by default.
            settings: of the class.

        Raises:
            ValueError: a model without cross attention.
        """
        if is_pipeline(model):
            model = denoiser_of(model)[0]
        maps: dict[str, nn.Module] = {}
        numbers: dict[str, int] = {}
        for number, (name, module) in enumerate(attentions_of(model)):
            if not getattr(module, "is_cross_attention", False) or getattr(module, "add_k_proj", None) is not None:
                continue
            made = cls.maps_class(width or module.to_k.in_features, module.to_q.out_features)
            made.begin(module)
            like = next(module.to_k.parameters())
            maps[name], numbers[name] = made.to(like.device, like.dtype), number
        if not maps:
            raise ValueError(f"{type(model).__name__} has no cross attention that a reference could stand beside")
        branches = cls(maps, project=project, **settings)
        branches._numbers = numbers
        return branches

    # ---- settings

    @property
    def identity(self) -> bool:
        every = self.scale.values() if isinstance(self.scale, Mapping) else [self.scale]
        return not any(any(_listed(scale)) for scale in every)

    def scales(self, site: Site, references: int) -> list[float]:
        """The strength of each reference at a layer."""
        scale = self.scale
        if isinstance(scale, Mapping):
            fitting = [value for pattern, value in scale.items() if fnmatch.fnmatchcase(site.name, pattern)]
            scale = fitting[0] if fitting else 0.0
        found = _listed(scale)
        if len(found) == 1:
            found = found * references
        if len(found) != references:
            raise ValueError(f"scale names {len(found)} references, but {references} were given to refer(...)")
        return found

    def acts(self, site: Site) -> bool:
        """Whether the branches act at the step of a call."""
        return within(site, self.step_range)

    def refer(self, images: Any, empty: Tensor | None = None) -> Any:
        """Say what the references are; this stands until it is said anew.

        Args:
            images: (P or 1, R, ...): of each prompt its R references, as ``project`` reads them, or as tokens
                (P or 1, R, T, C) without it. Where references have several images: a list of P lists of R tensors
                (images, ...), whose tokens are averaged.
            empty: (P or 1, R or 1, ...) for rows under guidance; zeros by default.

        Returns:
            itself.

        Raises:
            ValueError: no references, or an ``empty`` of another shape.
        """
        counts = None
        if isinstance(images, (list, tuple)) and images:
            if any(not one or len(one) != len(images[0]) for one in images):
                raise ValueError("images must list as many references, at least one, for each prompt")
            every = [check_tensors("images", one, least=1) for one in images]
            counts = [[len(image) for image in one] for one in every]
            if not all(min(one) for one in counts):
                raise ValueError("images holds a reference without an image")
            most = max(max(one) for one in counts)
            # Side by side with room for the most; what fills it up is left out of the mean.
            images = torch.stack(
                [torch.stack([F.pad(i, [0, 0] * (i.dim() - 1) + [0, most - len(i)]) for i in one]) for one in every]
            )
        if not isinstance(images, Tensor) or images.dim() < 3 or not images.shape[0] or not images.shape[1]:
            raise ValueError(
                f"images must be (prompts or 1, references, ...) with at least one reference, got {describe(images)}"
            )
        one = images if counts is None else images[:, :, 0]
        if self.project is None:
            check_rank("images", one, 4, "(prompts or 1, references, tokens, width)")
        if empty is None:
            empty = torch.zeros_like(one[:1])
        fits = empty.dim() == one.dim() and empty.shape[2:] == one.shape[2:]
        if not fits or empty.shape[0] not in (1, len(images)) or empty.shape[1] not in (1, images.shape[1]):
            raise ValueError(
                f"empty must be like images {tuple(one.shape)}, with one or as many prompts and references, got "
                f"{tuple(empty.shape)}"
            )
        self._images, self._empty, self._counts = images, empty, counts
        self._kept.clear()
        return self

    @property
    def references(self) -> int:
        """How many references each prompt has; 0 before :meth:`refer`."""
        return 0 if self._images is None else self._images.shape[1]

    # ---- tokens, keys and values

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Tokens (P, R, T, C) of the references, and (P or 1, R, T, C) of the empty ones."""
        if self._images is None or self._empty is None:
            raise RuntimeError(f"{type(self).__name__} has no references; say what they are with refer(images)")
        project = self.project

        def made(images: Tensor) -> Tensor:
            if project is None:
                return images
            like = next(project.parameters(), None)
            flat = images.flatten(0, 1)
            flat = flat if like is None else flat.to(like.device, like.dtype)
            out: Tensor = project(flat)
            if out.dim() != 3:
                raise ValueError(f"project must give tokens (n, T, C) of {describe(flat)}, got {tuple(out.shape)}")
            return out.unflatten(0, images.shape[:2])

        given, without, counts = self._images, self._empty, self._counts

        def both() -> tuple[Tensor, Tensor]:
            if counts is None:
                return made(given), made(without)
            tokens = made(given.flatten(1, 2)).unflatten(1, given.shape[1:3])
            numbers = torch.tensor(counts, device=tokens.device)[..., None]
            share = (torch.arange(given.shape[2], device=tokens.device) < numbers) / numbers
            return (tokens * share[..., None, None].to(tokens.dtype)).sum(2), made(without)

        images, empty = self._remembered("tokens", [project], both)
        return images, empty.expand(-1, images.shape[1], -1, -1)

    def row_numbers(self, site: Site, batch: int, prompts: int, empties: int) -> list[int]:
        """Which reference set each row reads: ``0 .. prompts - 1``, and behind them the empty ones.

        Raises:
            ValueError: which prompt a row belongs to is not known, or has no references.
        """
        numbers = site.prompts
        if numbers is None:
            if prompts not in (1, batch):
                raise ValueError(
                    f"layer {site.layer} ({site.name}): references are of {prompts} prompts, the batch has {batch} "
                    "rows, and which row is of which prompt is not known; attach to the pipeline, or give one per row"
                )
            numbers = tuple(range(batch)) if prompts > 1 else (0,) * batch
        if prompts > 1 and max(numbers) >= prompts:
            raise ValueError(f"references were given for {prompts} prompts, but there is a prompt {max(numbers)}")
        rows = site.rows or ("cond",) * batch
        found = []
        for row, number in zip(rows, numbers, strict=True):
            if row == "uncond":
                found.append(prompts + (number if empties > 1 else 0))
            else:
                found.append(number if prompts > 1 else 0)
        return found

    def keys_values(self, site: Site, batch: int) -> tuple[Tensor, Tensor]:
        """Keys and values (R, B, H, T, d) of the references of each row."""
        maps: Any = self.at(site)

        def made() -> tuple[Tensor, Tensor]:
            images, empty = self.tokens()
            both = torch.cat([images, empty.to(images)])
            both = both.to(maps.to_k_ip.weight)
            rows = torch.tensor(self.row_numbers(site, batch, len(images), len(empty)), device=both.device)
            k, v = (
                f(both).unflatten(-1, (site.kv_heads, -1)).index_select(0, rows).permute(1, 0, 3, 2, 4)
                for f in (maps.to_k_ip, maps.to_v_ip)
            )
            return k.contiguous(), v.contiguous()

        found: tuple[Tensor, Tensor] = self._remembered(
            ("keys", site.name, batch, site.rows, site.prompts), [maps, self.project], made
        )
        return found

    def at(self, site: Site) -> nn.Module:
        """The maps of a layer."""
        for name, maps in zip(self.names, self.maps, strict=True):
            if site.name == name or site.name.endswith("." + name):
                return maps
        raise ValueError(f"layer {site.layer} ({site.name}) is none of those that {type(self).__name__} was made for")

    def _remembered(self, what: Any, modules: Sequence[nn.Module | None], make: Callable[[], Any]) -> Any:
        """Made once and kept, until a gradient is wanted or a weight of ``modules`` changed."""
        if torch.is_grad_enabled():
            return make()
        weights = [p for module in modules if module is not None for p in module.parameters()]
        state = [(id(p), p.data_ptr(), None if p.is_inference() else p._version, p.dtype) for p in weights]
        before, found = self._kept.get(what, (None, None))
        if before != state:
            found = make()
            self._kept[what] = (state, found)
        return found

    # ---- acting

    def weigh(self, site: Site, q: Tensor, out: Tensor) -> Tensor | None:
        """Weights (B, R, N) of the branches at each place, on top of the scales; ``None`` for ones.

        Args:
            q: (B, H, N, d) queries.
            out: (B, H, N, d) what the text gave.
        """
        return None

    def around_attention(self, site: Site, q: Tensor, k: Tensor, v: Tensor, call: Callable[..., Tensor]) -> Tensor:
        out = call(q, k, v)
        if not self.acts(site):
            return out
        if self._images is None:
            self.tokens()  # says what is missing
        scales = self.scales(site, self.references)
        if not any(scales):
            return out
        weights = self.weigh(site, q, out)
        keys, values = self.keys_values(site, q.shape[0])
        acting = tuple(r for r, scale in enumerate(scales) if scale)
        if len(acting) * keys.shape[3] <= FEW:
            return out + self._by_maps(site, q, scales, acting, weights)
        for r in acting:
            scale = scales[r]
            branch = F.scaled_dot_product_attention(q, keys[r].to(q), values[r].to(q), scale=site.scale)
            if weights is None:
                out = out + scale * branch
            else:
                out = torch.addcmul(out, weights[:, r, None, :, None].to(out.dtype), branch, value=scale)
        return out

    def _by_maps(
        self, site: Site, q: Tensor, scales: list[float], acting: tuple[int, ...], weights: Tensor | None
    ) -> Tensor:
        """The branches of some references at once by their maps, which are small: (B, H, N, R T)."""
        b = q.shape[0]

        def side_by_side() -> tuple[Tensor, Tensor]:
            k, v = (t[list(acting)].permute(1, 2, 0, 3, 4).flatten(2, 3) for t in self.keys_values(site, b))
            return (k * site.scale).transpose(-2, -1).to(q).contiguous(), v.to(q).contiguous()

        maps: Any = self.at(site)
        k, v = self._remembered(
            ("beside", site.name, b, site.rows, site.prompts, q.dtype, acting), [maps, self.project], side_by_side
        )
        scores = (q @ k).unflatten(-1, (len(acting), -1))
        probabilities = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
        by = probabilities.new_tensor([scales[r] for r in acting])
        if weights is not None:
            by = by * weights[:, list(acting)].transpose(1, 2)[:, None].to(probabilities.dtype)  # (B, 1, N, R)
        return (probabilities * by.unsqueeze(-1)).flatten(-2).to(q.dtype) @ v

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kept": {}}

    # ---- training, and released weights

    def trained(self) -> list[nn.Parameter]:
        """What is trained: the maps of all layers. What makes tokens is not among it."""
        return list(self.maps.parameters())

    def load_released(self, state_dict: Mapping[str, Any], leave: Sequence[str] = ()) -> None:
        """Load ``{"image_proj": ..., "ip_adapter": ...}`` as IP-Adapters are released, or either part.

        Layers are numbered as the U-Net lists its processors.

        Args:
            leave: names of entries of a layer that the release may lack, which then stay as they are.

        Raises:
            ValueError: entries that are missing or left over, or numbers of layers of another U-Net.
        """
        if not self._numbers:
            raise ValueError(f"{type(self).__name__} was not made for a model: use {type(self).__name__}.of(unet)")
        parts = dict(state_dict)
        if not {"image_proj", "ip_adapter"} & parts.keys():  # flat, as safetensors hold it
            parts = {
                part: {key[len(part) + 1 :]: value for key, value in state_dict.items() if key.startswith(part + ".")}
                for part in ("image_proj", "ip_adapter")
            }
            parts = {part: entries for part, entries in parts.items() if entries}
            over = [key for key in state_dict if key.split(".")[0] not in ("image_proj", "ip_adapter")]
            if over or not parts:
                raise ValueError(f"state_dict must have the parts image_proj and ip_adapter, got {over[:4]}")
        if over := sorted(parts.keys() - {"image_proj", "ip_adapter"}):
            raise ValueError(f"state_dict has parts {over} beside image_proj and ip_adapter")
        if "ip_adapter" in parts:
            theirs = Released(parts["ip_adapter"], f"an IP-Adapter of {len(self.names)} layers")
            position = {number: at for at, number in enumerate(self._numbers[name] for name in self.names)}
            found: dict[str, Tensor] = {}
            for match, value in theirs.matching(r"(\d+)\.(.+)"):
                if int(match[1]) not in position:
                    raise ValueError(
                        f"state_dict has {match.string!r}, but the cross attention of this U-Net has numbers "
                        f"{sorted(position)}"
                    )
                found[f"{position[int(match[1])]}.{match[2]}"] = value
            found = theirs.close(found)
            own = self.maps.state_dict()
            missing = sorted(name for name in own.keys() - found.keys() if name.partition(".")[2] not in leave)
            if missing or found.keys() - own.keys():
                raise ValueError(
                    f"state_dict lacks {missing[:4]} and has {sorted(found.keys() - own.keys())[:4]} too many, counted "
                    "by layer"
                )
            self.maps.load_state_dict({**own, **found})
        if "image_proj" in parts:
            if self.project is None:
                raise ValueError("state_dict has an image_proj, but this was made without project")
            self.project.load_state_dict(parts["image_proj"])

    def released(self) -> dict[str, dict[str, Tensor]]:
        """The weights as IP-Adapters are released, which diffusers' ``load_ip_adapter`` reads."""
        layers = {
            f"{self._numbers[name]}.{key}": value
            for name, maps in zip(self.names, self.maps, strict=True)
            for key, value in maps.state_dict().items()
        }
        return {"image_proj": {} if self.project is None else dict(self.project.state_dict()), "ip_adapter": layers}


def within(site: Site, step_range: Sequence[float]) -> bool:
    """Whether the step of a call lies in ``(first, last)`` fractions of the steps; so do calls of no step."""
    if tuple(step_range) == (0.0, 1.0) or site.step is None or not site.steps:
        return True
    low, high = step_range
    return low <= site.step / site.steps < high or (high == 1.0 and site.step / site.steps >= low)


def _listed(scale: Any) -> list[float]:
    return [float(s) for s in scale] if isinstance(scale, (list, tuple)) else [float(scale)]


def attentions_of(model: Any) -> list[tuple[str, Any]]:
    """Names and modules of a denoiser's attention, numbered as its processors are."""
    names = getattr(model, "attn_processors", None)
    if names is None:
        raise ValueError(f"{type(model).__name__} is no denoiser of diffusers: it has no attn_processors")
    return [(name.rpartition(".")[0], model.get_submodule(name.rpartition(".")[0])) for name in names]


# ---- under one softmax


def other_rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Keys or values of other rows side by side: (B, H, M, d) and (B, S) row numbers -> (B, H, S M, d).

    >>> other_rows(torch.arange(2.0).view(2, 1, 1, 1), torch.tensor([[1, 0], [1, 1]])).flatten(1).tolist()
    [[1.0, 0.0], [1.0, 1.0]]
    """
    b, s = index.shape
    picked = tensor.index_select(0, index.flatten().to(tensor.device)).unflatten(0, (b, s))
    return picked.transpose(1, 2).flatten(2, 3)


def rows_of_prompts(site: Site, sources: Mapping[int, Sequence[int]] | str) -> list[list[int]]:
    """For each row of a batch the rows it looks at: those of other prompts, under the same guidance, of the same image.

    Args:
        site: of an attached pipeline.
        sources: prompts that each prompt looks at, by number; ``"all"`` for all others, ``"first"`` for the first.

    Raises:
        ValueError: rows or prompts are not known, or a prompt that is not there.
    """
    if site.rows is None or site.prompts is None:
        raise ValueError(
            f"layer {site.layer} ({site.name}): which row is of which prompt is not known; attach to the pipeline"
        )
    count = max(site.prompts) + 1
    if isinstance(sources, str):
        if sources not in ("all", "first"):
            raise ValueError(f"sources must be 'all', 'first' or a mapping from prompt to prompts, got {sources!r}")
        wanted = {p: [o for o in (range(count) if sources == "all" else [0]) if o != p] for p in range(count)}
    else:
        wanted = {int(p): [int(o) for o in others] for p, others in sources.items()}
        strange = [o for p, others in wanted.items() for o in (p, *others) if not 0 <= o < count]
        if strange:
            raise ValueError(f"sources names prompt {strange[0]}, but there are {count} prompts")
    seen: dict[tuple[str, int], int] = {}
    places: dict[tuple[str, int, int], int] = {}
    keys = []
    for row, (name, prompt) in enumerate(zip(site.rows, site.prompts, strict=True)):
        image = seen.get((name, prompt), 0)
        seen[name, prompt] = image + 1
        places[name, prompt, image] = row
        keys.append((name, prompt, image))
    return [[places[name, other, image] for other in wanted.get(prompt, [])] for name, prompt, image in keys]


class KeyStore:
    """Keys and values of self-attention by step and layer, kept from one image for others.

    Args:
        device: where they are kept; where they were made by default.
    """

    def __init__(self, device: str | torch.device | None = None):
        self.device = device
        self.kept: dict[tuple[int | None, str], tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.kept)

    def keep(self, site: Site, k: Tensor, v: Tensor) -> None:
        device = k.device if self.device is None else self.device
        self.kept[site.step, site.name] = (k.detach().to(device), v.detach().to(device))

    def read(self, site: Site, like: Tensor) -> tuple[Tensor, Tensor]:
        """What was kept at this step and layer, for as many rows.

        Raises:
            RuntimeError: nothing was.
        """
        found = self.kept.get((site.step, site.name))
        if found is None:
            raise RuntimeError(
                f"layer {site.layer} ({site.name}): nothing was kept at step {site.step}; run the pipeline with "
                "KeepKeys(store) and as many steps first"
            )
        batch = like.shape[0]
        if batch % len(found[0]):
            raise RuntimeError(f"{len(found[0])} rows were kept, which do not belong evenly to a batch of {batch}")
        if len(found[0]) == batch:
            k, v = found
        else:  # each half of guidance by itself
            groups = len(set(site.rows or ("cond",)))
            each = max(1, len(found[0]) // groups)
            k, v = (t.unflatten(0, (-1, each)).repeat_interleave(batch // len(t), 0).flatten(0, 1) for t in found)
        return k.to(like), v.to(like)


class KeepKeys(Intervention):
    """Writes keys and values of self-attention into a store.

    Args:
        store: where.
        layers: numbers or name patterns; ``None`` for all self-attention.
    """

    name: ClassVar[str] = "keep_keys"
    kinds: ClassVar[tuple[str, ...]] = ("self",)

    def __init__(self, store: KeyStore, layers: Sequence[int | str] | None = None):
        check_type("store", store, KeyStore)
        self.store, self.layers = store, layers

    def around_attention(self, site: Site, q: Tensor, k: Tensor, v: Tensor, call: Callable[..., Tensor]) -> Tensor:
        self.store.keep(site, k, v)
        return call(q, k, v)


class SharedKeys(Intervention):
    """Self-attention that also reads keys and values of other prompts of the batch, or of kept images.

    Args:
        sources: prompts that each prompt looks at (``{1: [0]}``), ``"all"`` others, the ``"first"``; or a
            :class:`KeyStore`.
        strength: factor on the exponentials of the others' scores; 1 treats them as own keys, 0 leaves them out.
        own: its own keys stay; without them rows read the others alone.
        where: ``where(site) -> (K,)`` numbers of the keys of each other row that are offered, ``None`` for all.
        step_range: ``(first, last)`` fractions of the steps at which it acts.
        layers: numbers or name patterns; ``None`` for all self-attention.

    >>> SharedKeys("first", strength=0.0).identity
    True
    """

    name: ClassVar[str] = "shared_keys"
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    replaces_mask: ClassVar[bool] = True
    adds_keys = True

    def __init__(
        self,
        sources: Mapping[int, Sequence[int]] | str | KeyStore = "all",
        strength: float = 1.0,
        own: bool = True,
        where: Callable[[Site], Tensor | None] | None = None,
        step_range: Sequence[float] = (0.0, 1.0),
        layers: Sequence[int | str] | None = None,
    ):
        self.sources = sources
        self.strength = check_real("strength", strength, least=0)
        if not own and not self.strength:
            raise ValueError("strength=0 without own keys leaves nothing to read")
        self.own, self.where, self.layers = own, where, layers
        low, high = (check_real("step_range", value, least=0, most=1) for value in step_range)
        self.step_range = (low, high)

    @property
    def identity(self) -> bool:
        return not self.strength

    def around_attention(self, site: Site, q: Tensor, k: Tensor, v: Tensor, call: Callable[..., Tensor]) -> Tensor:
        if not within(site, self.step_range):
            return call(q, k, v)
        where = None if self.where is None else self.where(site)
        if where is not None and len(where) and not 0 <= int(where.min()) <= int(where.max()) < k.shape[2]:
            raise ValueError(
                f"layer {site.layer} ({site.name}): where names keys {int(where.min())} to {int(where.max())}, and "
                f"each row has {k.shape[2]} of them; name layers with layers=..., or keys by the layer"
            )
        if isinstance(self.sources, KeyStore):
            other_k, other_v = self.sources.read(site, k)
            if where is not None:
                other_k, other_v = (t.index_select(2, where.to(t.device)) for t in (other_k, other_v))
            return self._call(q, k, v, other_k, other_v, call)
        rows = rows_of_prompts(site, self.sources)
        most = max(len(r) for r in rows)
        if not most:
            return call(q, k, v)
        index = torch.tensor([r + [i] * (most - len(r)) for i, r in enumerate(rows)], device=k.device)
        if where is not None:
            where = where.to(k.device)
        other_k, other_v = (other_rows(t if where is None else t.index_select(2, where), index) for t in (k, v))
        mask = None
        if any(len(r) < most for r in rows):  # rows that look at fewer do not read what fills them up
            there = torch.tensor([[n < len(r) for n in range(most)] for r in rows], device=k.device)
            if not self.own and not bool(there.any(1).all()):
                raise ValueError("own=False leaves a prompt without sources nothing to read; name some for each")
            there = there.repeat_interleave(other_k.shape[2] // most, 1)
            if self.own:
                there = torch.cat([there.new_ones(len(there), k.shape[2]), there], 1)
            mask = there[:, None, None].expand(-1, -1, q.shape[2], -1)
        return self._call(q, k, v, other_k, other_v, call, mask)

    def _bias(self, own: Tensor, others: Tensor) -> Tensor | None:
        if self.strength == 1 or not self.own:
            return None
        bias = own.new_zeros(1, 1, 1, own.shape[2] + others.shape[2])
        bias[..., own.shape[2] :] = math.log(self.strength)
        return bias

    def _call(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        other_k: Tensor,
        other_v: Tensor,
        call: Callable[..., Tensor],
        mask: Tensor | None = None,
    ) -> Tensor:
        bias = self._bias(k, other_k)
        keys = torch.cat([k, other_k], 2) if self.own else other_k
        values = torch.cat([v, other_v], 2) if self.own else other_v
        if mask is None and bias is None:
            return call(q, keys, values)
        return call(q, keys, values, mask=mask, bias=bias)
