"""Sites of transformers models.

Attention modules of transformers look their function up by name in ``AttentionInterface`` at every call. A layer with
stages gets a copy of its config under the name ``attnlib_<implementation>``; the others keep config and function. The
same name is registered in ``AttentionMaskInterface`` with the mask function of the implementation it stands for: a name
that is registered only in the first gets no mask at all, and attention silently turns non-causal. The masks of a model
are built by the model, before its layers, so unattached layers see exactly the mask they always saw.

A cache layer that lost keys (:func:`evicted_layer_class`) goes on counting every token it ever saw, so positions and
masks keep the true length; the mask of an attached layer is then read at the slots of the keys that are left.

Steps are counted by the cache; without one, by the tokens that a call reads beyond those of the call before. The score
of the next token is handed to ``on_logits`` by the first of the processors that ``generate`` makes for itself, so that
the user's own processors stay what and where they are. Nothing is kept by the number of calls: what a layer knows of
its current call lives on a stack, and what must survive a call belongs to a branch of the session. A second branch may
therefore be run at any time, also from within ``on_logits``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from ..blocks import AfterFeedForward, block_of, swap_sources
from ..intervention import Intervention, Stages, implements
from ..session import Adapter, Session, part_of
from ..site import Site
from . import removal
from .cache import mask_unwritten, why_evict_alone, why_not_evictable
from .follow import _Follow, follow_generate
from .layer import LayerRuntime, intercept, register
from .names import (
    READABLE,
    _need,
    cache_in,
    cache_layer,
    cache_parameter,
    implementation_of,
    kernel_of,
    reachable,
)
from .reading import TokenRuntime
from .selfcheck import ensure


class TransformersAdapter(Adapter):
    """Interception by name in both interfaces; token types from the ids that the model reads."""

    name = "transformers"
    stages: ClassVar[frozenset[str]] = frozenset(
        "on_block_input on_tokens around_sublayer on_context on_qkv on_kv_read around_attention on_scores on_weights "
        "on_output on_mlp_output on_cache on_embeddings on_states on_logits on_step".split()
    )

    def sites(self, model: nn.Module, part: str | None) -> list[Site]:
        hf = _need()
        root, prefix = part_of(model, part)
        if part is None and isinstance(model, hf.model):
            decoder = model.get_decoder()
            paths = {module: name for name, module in model.named_modules()}
            # What a model calls its decoder may be its head.
            known = isinstance(decoder, nn.Module) and decoder is not model and paths.get(decoder)
            if known and any(reachable(m) for m in decoder.modules()):
                root, prefix = decoder, paths[decoder] + "."
        found = [(prefix + name, m) for name, m in root.named_modules() if name and reachable(m)]
        if not found:
            raise TypeError(
                f"{type(model).__name__} has no attention that can be reached: none of its modules looks its function "
                "up in "
                "transformers' AttentionInterface (ALL_ATTENTION_FUNCTIONS)"
            )
        sites = []
        for number, (name, module) in enumerate(found):
            config: Any = module.config
            index = getattr(module, "layer_idx", None)
            own = (getattr(module, name, None) for name in ("num_heads", "num_attention_heads"))
            heads = next((n for n in own if isinstance(n, int)), getattr(config, "num_attention_heads", None))
            if not isinstance(heads, int):
                raise TypeError(f"{type(module).__name__} ({name}) does not say how many heads it has")
            groups = getattr(module, "num_key_value_groups", 1)
            cross = bool(getattr(module, "is_cross_attention", False)) or any(
                word in name.rsplit(".", 1)[-1].lower() for word in ("cross", "encoder_attn", "encdec")
            )
            sites.append(
                Site(
                    layer=index if isinstance(index, int) else number,
                    name=name,
                    module=module,
                    kind="cross" if cross else "self",
                    heads=heads,
                    kv_heads=heads // groups,
                    head_dim=getattr(module, "head_dim", 0),
                    scale=float(getattr(module, "scaling", 1.0)),
                )
            )
        return sites

    def trust(self, model: nn.Module, sites: list[Site], attach: Callable[..., Session]) -> None:
        cache_parameter(model)
        ensure(model, sites, attach)

    def cannot(self, intervention: Intervention, site: Site) -> str | None:
        if site.kind != "self" or not implements(intervention, "on_cache"):
            return None
        layer = cache_layer(site.module.config, site.layer)
        return why_evict_alone(site.module) or (None if layer is None else why_not_evictable(layer))

    def install(self, session: Session, plan: list[tuple[Site, Stages]]) -> None:
        session.counts_steps = True
        watched = ("on_logits", "on_step", "on_tokens", "on_embeddings", "on_states")
        follows = [i for stage in watched for i in session.acting(stage)]
        follow = _Follow(session, bool(follows))
        session.hook(session.model.register_forward_pre_hook(follow, with_kwargs=True))
        session.hook(session.model.register_forward_hook(follow.after))
        TokenRuntime.install(session)
        follow_generate(session)
        runtimes = []
        for site, stages in plan:
            module = site.module
            implementation = implementation_of(module)
            runtime = LayerRuntime(session, site, stages, kernel_of(module, implementation), implementation)
            if stages["on_qkv"] and site.kind == "cross":
                raise ValueError(
                    f"{runtime.where}: on_qkv is missing for cross-attention, whose keys are projected once per "
                    "prompt; use "
                    "on_kv_read, or on_context for what they are projected from"
                )
            if stages.reads_map and implementation not in READABLE:
                raise ValueError(runtime.pairs(None, 0, 0, False).opaque)
            runtimes.append(runtime)
            if stages.in_attention:
                register(implementation)
                intercept(session, runtime)
            if stages.in_attention or stages["around_sublayer"] or stages["on_context"]:
                session.set_attribute(module, "forward", runtime.wrap(module.forward))
            if stages["on_block_input"]:
                block = block_of(session.model, site)
                session.hook(block.register_forward_pre_hook(runtime.before_block, with_kwargs=True))
            if stages["on_context"]:
                self._swap_sources(session, runtime)
        AfterFeedForward.install(session, runtimes)
        if any(stages["on_cache"] for _, stages in plan):
            for site in session.sites:
                if site.kind == "self":
                    hide = functools.partial(_hide_unwritten, site)
                    session.hook(block_of(session.model, site).register_forward_pre_hook(hide, with_kwargs=True))
        if any(stages["on_tokens"] for _, stages in plan):
            removal.install(session, runtimes)

    @staticmethod
    def _swap_sources(session: Session, runtime: LayerRuntime) -> None:
        module = runtime.module
        missing = [name for name in ("k_proj", "v_proj") if not isinstance(getattr(module, name, None), nn.Module)]
        if missing:
            raise ValueError(
                f"{runtime.where}: on_context needs separate projections of keys and values; {missing} are missing in "
                f"{type(module).__name__}"
            )

        def site(source: Tensor) -> Site:
            return session.described(runtime.site, source.shape[0], offset=runtime.call.offset, n_keys=source.shape[1])

        swap_sources(session, runtime.stages, site, module.k_proj, module.v_proj)  # type: ignore[arg-type]


def _hide_unwritten(site: Site, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    layers = getattr(cache_in(kwargs), "layers", ())
    if site.layer >= len(layers) or type(layers[site.layer]) is not _need().cache.StaticLayer:
        return None
    if not layers[site.layer].get_seq_length():
        return None
    hidden = args[0] if args else kwargs["hidden_states"]
    mask = kwargs.get("attention_mask")
    return args, {**kwargs, "attention_mask": mask_unwritten(site, layers[site.layer], hidden, mask)}
