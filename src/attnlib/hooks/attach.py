"""Attaching: which interventions act where in a model, checked before anything is touched."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..checks import check_choice
from .eager import forget_compiled
from .intervention import MODEL_STAGES, STAGES, Intervention, Probe, Stages, check_layers, implements
from .pipelines import Sampling, denoiser_of, is_pipeline
from .session import Adapter, Session, _row_names, _sessions, part_of
from .site import KINDS, Site
from .tokens import TypeTracker


def _unwrapped(model: Any) -> Any:
    """The model inside what only passes its calls on: adapters of PEFT, and parallel data."""
    while isinstance(model, nn.Module):
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif any(cls.__module__.startswith("peft.") and cls.__name__ == "PeftModel" for cls in type(model).__mro__):
            model = model.get_base_model()  # type: ignore[operator]
        else:
            return model
    return model


def _adapter(model: Any, part: str | None = None) -> Adapter:
    families = {cls.__module__.split(".")[0] for cls in type(model).__mro__}
    if not isinstance(model, nn.Module):
        hint = "; attach to a pipeline, or to its pipe.unet or pipe.transformer" if "diffusers" in families else ""
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}{hint}")
    from .modules.adapter import ModuleAdapter, attention_modules

    if "transformers" in families:
        from .hf.adapter import TransformersAdapter
        from .hf.names import reachable

        # A transformers model may be built of our own mechanisms, and a part of one may look no function up.
        root = part_of(model, part)[0]
        ours = not any(reachable(m) for m in root.modules()) and bool(attention_modules(root))
        return ModuleAdapter() if ours else TransformersAdapter()
    if "diffusers" in families:
        from .diffusers_adapter import DiffusersAdapter

        return DiffusersAdapter()
    if attention_modules(model):
        return ModuleAdapter()
    if hasattr(model, "_orig_mod"):
        raise TypeError(
            f"{type(model).__name__} is a compiled model; attach to the model that it was made of, model._orig_mod, "
            "and run that one"
        )
    inside = _models_inside(model)
    if inside:
        raise TypeError(
            f"{type(model).__name__} is neither a transformers nor a diffusers model itself; attach to the one inside "
            f"it: {', '.join(inside)}"
        )
    raise TypeError(
        f"{type(model).__name__} is neither a transformers nor a diffusers model, and none of its modules is a "
        "mechanism of attnlib, a torch.nn.MultiheadAttention or an attention of timm; its attention cannot be reached: "
        "an adapter that describes its sites is missing"
    )


def _models_inside(model: nn.Module) -> list[str]:
    """Paths of the models of transformers and diffusers in another module, outermost only."""
    bases = {("transformers", "PreTrainedModel"), ("diffusers", "ModelMixin")}
    found: list[str] = []
    for name, module in model.named_modules():
        kinds = {(cls.__module__.split(".")[0], cls.__name__) for cls in type(module).__mro__}
        if kinds & bases and not any(name.startswith(path.split(" ")[0] + ".") for path in found):
            found.append(f"{name} ({type(module).__name__})")
    return found


def _only_model_stages(intervention: Intervention) -> bool:
    """Whether all it does belongs to the model as a whole, so that no layer is touched for it."""
    used = [stage for stage in STAGES if implements(intervention, stage)]
    return bool(used) and not isinstance(intervention, Probe) and all(stage in MODEL_STAGES for stage in used)


def _check_pair(site: Site | None, a: Intervention, b: Intervention) -> None:
    reason = a.conflicts(b) or b.conflicts(a)
    if reason is None and implements(a, "on_cache") and implements(b, "on_cache"):
        reason = "both evict from the same cache; combine their scores in one"
    if reason is None and a.replaces_mask and b.replaces_mask:
        reason = "both say which query reads which key; combine their masks in one"
    if reason is None and a.moves_latents and b.moves_latents:
        reason = "both move the latents of a step; combine their losses in one"
    for one, other in ((a, b), (b, a)):
        if reason is None and one.adds_keys and other.own_keys:
            reason = (
                f"{type(one).__name__} puts other keys beside the model's, and {type(other).__name__} needs those alone"
            )
        if reason is None and one.differentiates and other.reuses_features:
            reason = (
                f"{type(one).__name__} needs gradients of the whole model, and {type(other).__name__} puts in what was "
                "computed at another step"
            )
    if reason:
        where = "this model" if site is None else f"layer {site.layer} ({site.name})"
        raise ValueError(f"{type(a).__name__} and {type(b).__name__} cannot both act on {where}: {reason}")


def _check_removal(a: Intervention, b: Intervention) -> None:
    """Who needs all tokens of the prompt meets nobody who removes some, at whatever layers they act."""
    for one, other in ((a, b), (b, a)):
        if one.all_tokens and implements(other, "on_tokens"):
            raise ValueError(
                f"{type(a).__name__} and {type(b).__name__} cannot both act on this model: {type(other).__name__} "
                f"removes tokens of the prompt, and {type(one).__name__} needs all of them in every layer"
            )


def _spoken(layers: dict[int, str]) -> str:
    by_reason: dict[str, list[int]] = {}
    for layer, why in sorted(layers.items()):
        by_reason.setdefault(why, []).append(layer)
    return "; ".join(f"layers {numbers}: {why}" for why, numbers in by_reason.items())


def _able(adapter: Adapter, i: Intervention, chosen: list[Site], skipped: dict[str, dict[int, str]]) -> list[Site]:
    """The sites where an intervention can act; the others are reported, or refused where the user named them.

    Where nothing would be left, the model is taken at its word: the cache that it is called with may be another one,
    and refuses by itself where it is not.
    """
    why = {site.layer: reason for site in chosen if (reason := adapter.cannot(i, site))}
    left = [site for site in chosen if site.layer not in why]
    if not left:
        return chosen
    if why and i.layers is not None:
        possible = [site.layer for site in left]
        raise ValueError(f"{type(i).__name__} cannot act on {_spoken(why)}; possible: {possible}")
    if why:
        skipped[i.name] = why
    return left


def attach(
    model: nn.Module,
    *interventions: Intervention,
    rows: Sequence[str] | None = None,
    token_types: Tensor | Callable[[Tensor], Tensor] | None = None,
    part: str | None = None,
) -> Session:
    """Attach interventions to a model that exists; leaving the session restores it bit for bit.

    ::

        with attnlib.attach(model, SnapKV(ratio=0.5), Record(layers=[3])) as session:
            model.generate(**inputs)
        session.results["record"][3]["weights"]

    Args:
        model: a transformers or diffusers model, a diffusers pipeline, whose denoiser is attached to and whose calls
            then say step, timestep and rows, or any module with mechanisms of attnlib,
            ``torch.nn.MultiheadAttention`` or timm's attention in it. Of a model with adapters of PEFT, or in
            ``DistributedDataParallel``, it is the model inside that is attached to; the whole may be called.
        interventions: what to do, in order: inputs pass through the first one first.
        rows: name of each row of the batch, for example ``("uncond", "cond")``.
        token_types: (B, N) integer types of the prompt's tokens, or a rule from token ids to types such as
            :class:`attnlib.hooks.TokenTypes`; extended while decoding.
        part: dotted path of the submodule to act on; by default the text decoder of a transformers model, and
            ``"vision_encoder"`` for that of SAM. In a pipeline with several denoisers it begins with the name of one.

    What ``torch.compile`` made before is traced again when a session begins or ends; stages are never traced.

    Returns:
        The :class:`Session`, active at once.

    Raises:
        TypeError: a model whose family is not known, or something that is no intervention.
        ValueError: attaching twice, unknown layers or heads, interventions that do not compose, a stage that this
            family does not serve.
        ImportError: the extra of that family is not installed.
    """
    if not interventions:
        raise ValueError("attach needs at least one intervention")
    for i in interventions:
        if not isinstance(i, Intervention):
            hint = f"; make one: {i.__name__}(...)" if isinstance(i, type) and issubclass(i, Intervention) else ""
            hint = "; give several as attach(model, a, b)" if isinstance(i, (list, tuple)) else hint
            raise TypeError(f"{i!r} is not an intervention{hint}")
        if i._owner is not None:
            raise ValueError(f"this {type(i).__name__} is attached already, to {type(i._owner.model).__name__}")
    interventions = tuple(one for i in interventions for one in (i, *([] if i.identity else i.companions)))
    if len({id(i) for i in interventions}) != len(interventions):
        raise ValueError("the same intervention object is given twice")
    _row_names(rows)
    pipe = model if is_pipeline(model) else None
    if pipe is not None:
        model, part = denoiser_of(pipe, part)
    model = _unwrapped(model)
    adapter = _adapter(model, part)
    mine = set(model.modules())
    for other, session in list(_sessions.items()):
        if other in mine or model in set(other.modules()) or mine & session._touched.keys():
            raise ValueError(
                f"{type(model).__name__} has a session already ({session}); detach it first, or give all "
                "interventions to one attach"
            )
    sites = adapter.sites(model, part)
    adapter.trust(model, sites, attach)
    plan: dict[int, list[Intervention]] = {}
    skipped: dict[str, dict[int, str]] = {}
    for i in interventions:
        i.meet(model)
        for kind in i.kinds:
            check_choice("kinds", kind, KINDS)
        served = [stage for stage in STAGES if implements(i, stage) and stage not in adapter.stages]
        if served:
            raise ValueError(
                f"{type(i).__name__} needs the stage {served[0]}, which is missing for {adapter.name} models; "
                f"they serve {sorted(adapter.stages)}"
            )
        chosen = check_layers(i, sites)
        if i.identity:
            continue
        chosen = _able(adapter, i, chosen, skipped)
        if i.needs_types and token_types is None:
            raise ValueError(
                f"{type(i).__name__} has to know which tokens are image tokens: give attach(..., token_types=...), "
                "a (B, N) tensor or attnlib.hooks.TokenTypes(image=IMAGE_TOKEN_ID)"
            )
        if _only_model_stages(i):
            continue
        for site in chosen:
            plan.setdefault(sites.index(site), []).append(i)
    for index, members in plan.items():
        for a in range(len(members)):
            for b in range(a + 1, len(members)):
                _check_pair(sites[index], members[a], members[b])
    planned = [(n, sites[n]) for n in plan]
    able = [i for i in interventions if not i.identity]
    for number, a_ in enumerate(able):
        for b_ in able[number + 1 :]:
            _check_removal(a_, b_)
            alone = _only_model_stages(a_) or _only_model_stages(b_)
            if alone or (implements(a_, "around_denoiser") and implements(b_, "around_denoiser")):
                _check_pair(None, a_, b_)
    for i in interventions:
        i.reset()
        if not i.identity:
            everywhere = _only_model_stages(i)
            i.prepare(model, check_layers(i, sites) if everywhere else [s for n, s in planned if i in plan[n]])
    tracker = None if token_types is None else TypeTracker(token_types)
    session = Session(model, interventions, rows, tracker)
    session.sites, session.report = sites, skipped
    session.active = True
    try:
        if able:
            session.attached = [sites[n] for n in sorted(plan)]
            forget_compiled()
            session.watch()
            if pipe is not None:
                session.sampling = Sampling(session, pipe)
                session.sampling.install()
            adapter.install(session, [(sites[n], Stages(plan[n])) for n in sorted(plan)])
    except BaseException:
        session.detach()
        raise
    _sessions[model] = session
    for name, layers in skipped.items():
        warnings.warn(
            f"{name} acts on what it can; it leaves out {_spoken(layers)} (session.report)", UserWarning, stacklevel=2
        )
    for i in interventions:
        i._owner = session
    try:
        for i in interventions:
            if not i.identity:
                i.on_attach(session)
        session._know_places()
    except BaseException:
        session.detach()
        raise
    return session
