"""A decoder for language with any mechanism in any layer, as an ordinary transformers model.

Needs ``transformers``. Importing this module registers it with ``AutoConfig`` and ``AutoModelForCausalLM``.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..extras import missing

try:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
    from transformers import initialization as init
    from transformers.cache_utils import Cache
    from transformers.generation import GenerationMixin
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.modeling_outputs import ModelOutput
except ImportError as error:
    raise missing(__name__, error) from error

from ..checks import check_float, check_int, check_rank, check_real, check_whole
from ..hooks.hf.names import cache_in, output_field
from ..hooks.hf.state import StateLayer, counting_layer, state_cache, state_layers
from ..nn.base import Mechanism
from ..nn.layers import zero_invalid
from ..nn.registry import create, find
from .packing import Packing, exists_by, read_documents, rows_alone

MechanismSpec = str | dict[str, Any]


class DecoderConfig(PreTrainedConfig):
    """Settings of :class:`DecoderForCausalLM`.

    Args:
        vocab_size: symbols.
        hidden_size: width.
        intermediate_size: hidden width of the feed-forward; 8/3 of ``hidden_size``, rounded up to 16, by default.
        num_hidden_layers: layers.
        num_attention_heads: heads of every layer that does not say otherwise.
        mechanisms: registry names, or ``{"name": .., **settings}``, one per layer; a shorter list is repeated. Settings
            that a mechanism takes and its entry leaves out come from here: ``num_heads``, ``causal=True``, ``rotary``
            (``rope_theta``), ``layer`` and ``num_layers``.
        rope_theta: base of rotary positions; ``None`` for none.
        rms_norm_eps: epsilon of the norms.
        initializer_range: standard deviation of embeddings and feed-forward; mechanisms initialise themselves.
        tie_word_embeddings: share the embedding with the output.
        loss_weights: weight of each named mechanism loss in the training loss; unnamed ones are only reported, and a
            layer all of whose losses have weight 0 does not compute them.
        allow_lookahead: accept layers that read later tokens in training, as power-law graph attention does until its
            metric is frozen. Their training loss flatters them, and they generate only without a cache.

    >>> DecoderConfig(num_hidden_layers=3, mechanisms=["softmax-attention", "lightning-attention-2"]).layer_spec(2)
    {'name': 'softmax-attention'}
    """

    model_type = "attnlib-decoder"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int | None = None
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    mechanisms: list | None = None
    rope_theta: float | None = 10000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    loss_weights: dict | None = None
    allow_lookahead: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.mechanisms is None:
            self.mechanisms = ["softmax-attention"]
        if not self.mechanisms or not isinstance(self.mechanisms, (list, tuple)):
            raise ValueError(f"mechanisms must be a list with at least one entry, got {self.mechanisms!r}")
        for spec in self.mechanisms:
            if not isinstance(spec, str) and not (isinstance(spec, dict) and isinstance(spec.get("name"), str)):
                raise ValueError(f"mechanisms holds names or dicts with a 'name', got {spec!r}")
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            if name != "intermediate_size" or self.intermediate_size is not None:
                check_int(name, getattr(self, name), least=1)
        if self.rope_theta is not None:
            check_real("rope_theta", self.rope_theta, above=0)
        check_real("rms_norm_eps", self.rms_norm_eps, least=0)
        check_real("initializer_range", self.initializer_range, least=0)
        if self.intermediate_size is None:
            self.intermediate_size = -(-self.hidden_size * 8 // 3 // 16) * 16
        super().__post_init__(**kwargs)

    def layer_spec(self, index: int) -> dict[str, Any]:
        """The entry of ``mechanisms`` for one layer."""
        assert self.mechanisms is not None
        spec = self.mechanisms[index % len(self.mechanisms)]
        return {"name": spec} if isinstance(spec, str) else dict(spec)


def _settings(cls: Any) -> set[str]:
    """Names of the keyword arguments that ``cls`` takes, those included that ``**settings`` hands to a base class."""
    names: set[str] = set()
    for base in inspect.getmro(cls) if inspect.isclass(cls) else (cls,):
        if inspect.isclass(base) and "__init__" not in vars(base):
            continue
        parameters = inspect.signature(base).parameters.values()
        names |= {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names


def build_mixer(config: DecoderConfig, index: int) -> Mechanism:
    """The mechanism of one layer.

    Raises:
        ValueError: unknown name, or a mechanism that is not causal.
    """
    spec = config.layer_spec(index)
    name = spec.pop("name")
    known = _settings(find(name))
    defaults = {
        "num_heads": config.num_attention_heads,
        "causal": True,
        "rotary": config.rope_theta,
        "layer": index,
        "num_layers": config.num_hidden_layers,
    }
    settings = {**{key: value for key, value in defaults.items() if key in known}, **spec}
    try:
        mixer = create(name, dim=config.hidden_size, **settings)
    except ValueError:
        # A relative of a mechanism with this setting may be causal by itself and refuse to be told.
        if "causal" in spec or settings.pop("causal", None) is None:
            raise
        mixer = create(name, dim=config.hidden_size, **settings)
    patterns = mixer.traits.patterns
    if "causal-self" not in patterns and not (config.allow_lookahead and "noncausal-self" in patterns):
        raise ValueError(
            f"layer {index}: {name!r} is not causal (it does {sorted(patterns)}), so it cannot be in a decoder"
        )
    return mixer


class SwiGLU(nn.Module):
    """``W_down (silu(W_gate x) * W_up x)``."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class DecoderLayer(GradientCheckpointingLayer):
    """``x + mixer(norm(x))``, then ``x + swiglu(norm(x))``."""

    def __init__(self, config: DecoderConfig, index: int):
        super().__init__()
        self.index = index
        self.make_rest(config)
        self.mixer = build_mixer(config, index)
        self.unwanted = {name for name, weight in (config.loss_weights or {}).items() if weight == 0}
        self.ready = not any(t.is_meta for t in (*self.mixer.parameters(), *self.mixer.buffers()))
        if self.ready:
            # The mechanism has initialised itself: keep the model-wide initialisation away from it.
            for module in self.mixer.modules():
                module._is_hf_initialized = True  # type: ignore[assignment]

    def make_rest(self, config: DecoderConfig) -> None:
        """Norms and feed-forward."""
        assert config.intermediate_size is not None
        self.mixer_norm: nn.Module = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp_norm: nn.Module = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp: nn.Module = SwiGLU(config.hidden_size, config.intermediate_size)

    def mix(self, x: Tensor, valid: Tensor | None, layer: StateLayer | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The mechanism's output and losses; reads and moves on this layer's state when there is one."""
        returns: tuple[str, ...] = ("losses",) if set(self.mixer._claims().losses) - self.unwanted else ()
        call: dict[str, Any] = {"valid": valid}
        if layer is not None:
            returns = (*returns, "state")
            call["state"] = layer.state
        out = self.mixer(x, returns=returns, **call)
        if not returns:
            return out, {}
        if layer is not None:
            layer.advance(out.state, x.shape[1])
        return out.y, out.losses or {}

    def mix_documents(
        self, x: Tensor, valid: Tensor | None, layer: StateLayer | None, packing: Packing | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """:meth:`mix`, each packed document a sample of its own."""
        if packing is None and valid is not None and layer is None and self.mixer.reads_length:
            packing = rows_alone(valid)
        if packing is None:
            return self.mix(x, valid, layer)
        losses: dict[str, Tensor] = {}

        def call(documents: Tensor, exists: Tensor | None) -> Tensor:
            y, own = self.mix(documents, exists, layer)
            losses.update(own)
            return y

        traits = self.mixer._claims()
        # Losses are means over all documents, and a mechanism may look across its batch.
        together = not traits.batch_independent or bool(set(traits.losses) - self.unwanted)
        how = "late" if layer is not None else "whole" if together else "exact" if self.mixer.reads_length else "alike"
        return packing.each(x, call, how), losses

    def forward(
        self,
        hidden_states: Tensor,
        valid: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool = False,
        packing: Packing | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, N, C) tokens and the mechanism's losses."""
        layer: StateLayer | None = None
        if use_cache and cache is not None:
            layer = cache.layers[self.index]  # type: ignore[assignment]
            assert isinstance(layer, StateLayer)
        return self.combine(hidden_states, valid, layer, packing)

    def combine(
        self, x: Tensor, valid: Tensor | None, layer: StateLayer | None, packing: Packing | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mechanism, feed-forward, norms and residuals."""
        out, losses = self.mix_documents(self.mixer_norm(x), valid, layer, packing)
        x = x + out
        return x + self.mlp(self.mlp_norm(x)), losses


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache that a model was given under either name; ``ValueError`` when it was given two."""
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one argument; give one of them")
    return past_key_values if cache is None else cache


@dataclass
class DecoderOutput(ModelOutput):
    """Output of :class:`DecoderModel` and :class:`DecoderForCausalLM`; what does not apply is ``None``.

    Args:
        loss: () language modelling loss plus weighted mechanism losses, when ``labels`` were given.
        logits: (B, N, vocab_size).
        last_hidden_state: (B, N, hidden_size) after the last norm.
        cache: of states; ``past_key_values`` is its older name, and where generation of the installed transformers
            looks for that one it is what the field is called.
        hidden_states: input of each layer, and the last one normed, when asked for.
        mechanism_losses: each mechanism's own losses, summed over layers.
        document_starts: (B, N) boolean, first tokens of documents, when several were packed into a row.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    if output_field() == "cache":
        cache: Cache | None = None
    else:
        past_key_values: Cache | None = None

        @property
        def cache(self) -> Cache | None:
            return self.past_key_values

    hidden_states: tuple[Tensor, ...] | None = None
    mechanism_losses: dict[str, Tensor] | None = None
    document_starts: Tensor | None = None


class DecoderPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and saving."""

    config_class = DecoderConfig
    config: DecoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _is_stateful = True  # a state cannot be rolled back, as assisted generation would need

    def initialize_weights(self) -> None:
        """What transformers initialises, and the mechanisms of a model that was built without storage, for loading.

        Their buffers that are not saved, and weights that the checkpoint lacks, come from a mechanism built anew.
        """
        super().initialize_weights()
        for layer in self.modules():
            if isinstance(layer, DecoderLayer) and not layer.ready:
                with torch.device("cpu"):
                    source = build_mixer(self.config, layer.index)
                values = dict([*source.named_parameters(), *source.named_buffers()])
                for name, tensor in (*layer.mixer.named_parameters(), *layer.mixer.named_buffers()):
                    if name in values:  # a converted layer has more, which its checkpoint holds
                        init.copy_(tensor, values[name].to(tensor))  # leaves alone what was loaded
                layer.ready = True

    def set_progress(self, progress: float) -> None:
        """Advance the schedules of all mechanisms to ``progress`` in [0, 1]."""
        for module in self.modules():
            if isinstance(module, DecoderLayer):
                module.mixer.set_progress(progress)  # type: ignore[operator]


class DecoderModel(DecoderPreTrainedModel):
    """Embedding, layers, norm. Positions count valid tokens; each mechanism makes its own."""

    layer_class: type[DecoderLayer] = DecoderLayer

    def __init__(self, config: DecoderConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([self.layer_class(config, i) for i in range(config.num_hidden_layers)])
        self.norm = self.make_norm()
        self.gradient_checkpointing = False
        self.post_init()

    def make_norm(self) -> nn.Module:
        """The norm after the last layer."""
        return nn.RMSNorm(self.config.hidden_size, eps=self.config.rms_norm_eps)

    def embed(self, embedded: Tensor) -> Tensor:
        """What the first layer gets, from the embedded tokens."""
        return embedded

    def close(self, x: Tensor) -> Tensor:
        """What the head gets, from the last layer's output."""
        return self.norm(x)

    def check_streaming(self) -> None:
        """Raise ``ValueError`` when a layer cannot decode step by step."""
        for layer in self.layers:
            if not layer.mixer.traits.streaming:  # type: ignore[union-attr]
                name = self.config.layer_spec(layer.index)["name"]  # type: ignore[arg-type]
                raise ValueError(
                    f"layer {layer.index}: {name!r} cannot decode step by step (trait streaming is False); "
                    "pass use_cache=False"
                )

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        past_key_values: Cache | None = None,
        position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: Tensor | None = None,
    ) -> DecoderOutput:
        """Hidden states of the new tokens.

        Several documents may lie in one row, one after another. Any of ``position_ids``, ``attention_mask``,
        ``cu_seq_lens_*`` and ``seq_idx`` may say so, in the forms of transformers' ``DataCollatorWithFlattening`` and
        others; each document then is as if it were alone, for every mechanism. With a cache, every document becomes
        one of its samples, in order, so that all of them can be continued, as a batch.

        Args:
            input_ids: (B, N) tokens, those that the cache has not seen.
            attention_mask: (B, M) with M >= N, nonzero for tokens that exist; its last N columns are these tokens.
                Numbers above one number documents. Or (B, 1, N, N), pairs that may meet (boolean, or 0 and -inf to
                add), which must be causal inside documents and empty between them.
            cache: made by an earlier call.
            past_key_values: the older name of ``cache``.
            inputs_embeds: (B, N, hidden_size) instead of ``input_ids``.
            use_cache: return a cache; by default what the configuration says, except in training.
            output_hidden_states: return the input of every layer.
            position_ids: (B, N), (1, N) or (N,) positions, which count the tokens of a document from 0 (behind a cache,
                on from what it has seen). Mechanisms count for themselves, so other positions are not possible.
            cu_seq_lens_q, cu_seq_lens_k: (D + 1,) where documents begin, over all rows laid out flat, and their end.
            max_length_q, max_length_k: tokens of the longest document; only checked.
            seq_idx: (B, N), (1, N) or (N,) the document of every token.

        Raises:
            ValueError: neither or both inputs, a mask of another shape, a cache for a layer that cannot stream or of
                another batch, or arguments that do not say documents as above.
        """
        cache = one_cache(cache, past_key_values)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            check_whole("input_ids", input_ids)
            check_rank("input_ids", input_ids, 2, "(B, N)")
        else:
            check_float("inputs_embeds", inputs_embeds)
            check_rank("inputs_embeds", inputs_embeds, 3, "(B, N, hidden_size)")
        embedded = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache:
            self.check_streaming()
            if cache is None:
                cache = state_cache(len(self.layers))
            state_layers(cache, len(self.layers))
        elif cache is not None:
            raise ValueError("cache was given with use_cache=False")
        given = dict(
            position_ids=position_ids, cu_seq_lens_q=cu_seq_lens_q, cu_seq_lens_k=cu_seq_lens_k,
            max_length_q=max_length_q, max_length_k=max_length_k, seq_idx=seq_idx,
        )  # fmt: skip
        given = {name: value for name, value in given.items() if value is not None}
        valid, packing = self._documents(attention_mask, embedded, cache, given)
        x = self.embed(embedded if inputs_embeds is None else zero_invalid(embedded, valid))
        hidden: list[Tensor] = []
        losses: dict[str, Tensor] = {}
        for layer in self.layers:
            if output_hidden_states:
                hidden.append(x)
            x, own = layer(x, valid=valid, cache=cache, use_cache=use_cache, packing=packing)
            for name, loss in own.items():
                losses[name] = losses[name] + loss if name in losses else loss
        x = self.close(x)
        return DecoderOutput(
            last_hidden_state=x,
            hidden_states=(*hidden, x) if output_hidden_states else None,
            mechanism_losses=losses or None,
            document_starts=None if packing is None else packing.starts,
            **{output_field(): cache},  # type: ignore[arg-type]
        )

    @staticmethod
    def _documents(
        attention_mask: Tensor | None, x: Tensor, cache: Cache | None, given: dict[str, Any]
    ) -> tuple[Tensor | None, Packing | None]:
        """Which tokens of ``x`` exist, ``None`` for all, so that mechanisms take their short way; and the documents."""
        batch, n = x.shape[:2]
        layer = None if cache is None else counting_layer(cache)
        seen, past = (0, None) if layer is None else (layer.seen, layer.tokens)
        if past is not None and len(past) != batch:
            raise ValueError(
                f"cache holds {len(past)} samples, the new tokens are of {batch}; a cache that was filled by packed "
                "documents holds one sample for each document"
            )
        if attention_mask is None and not given:
            return None, None
        if torch.compiler.is_compiling() and not given and attention_mask is not None and attention_mask.dim() == 2:
            return exists_by(attention_mask, batch, n), None
        return read_documents(
            attention_mask, batch, n, x.new_zeros(batch, dtype=torch.long) if past is None else past, seen, given
        )


class DecoderForCausalLM(DecoderPreTrainedModel, GenerationMixin):
    """:class:`DecoderModel` with a head over the vocabulary; ``generate`` works, cached or not.

    >>> config = DecoderConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    >>> DecoderForCausalLM(config)(torch.tensor([[1, 2, 3]])).logits.shape
    torch.Size([1, 3, 50])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    model_class: type[DecoderModel] = DecoderModel
    head_bias = False
    accepts_loss_kwargs = True  # num_items_in_batch

    def __init__(self, config: DecoderConfig):
        super().__init__(config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=self.head_bias)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the model makes its own cache of states

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """A prompt that is read in chunks needs the states before its first one."""
        done = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        chunked = getattr(generation_config, "prefill_chunk_size", None) is not None
        if chunked and generation_config.use_cache is not False and cache_in(model_kwargs) is None:
            model_kwargs[output_field()] = state_cache(self.config.num_hidden_layers)
        return done

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        past_key_values: Cache | None = None,
        position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        output_attentions: bool | None = None,
    ) -> DecoderOutput | tuple[Any, ...]:
        """Logits of the token after each; arguments as in :meth:`DecoderModel.forward`.

        Args:
            labels: (B, N) tokens to predict, -100 to leave out; shifted here. The first token of a packed document is
                left out, as it is when a document is alone.
            logits_to_keep: only the last so many positions, or those indexed.
            num_items_in_batch: divide the loss by this number instead of by the tokens predicted, as a trainer asks
                that accumulates gradients.
            output_attentions: not possible; :mod:`attnlib.hooks` records weights of layers that have them.
        """
        if output_attentions:
            raise ValueError(
                "output_attentions=True is not possible: not every mechanism has weights; attach "
                "attnlib.hooks.Record for those that do"
            )
        out = self.model(
            input_ids, attention_mask, one_cache(cache, past_key_values), inputs_embeds, use_cache,
            output_hidden_states, position_ids=position_ids, cu_seq_lens_q=cu_seq_lens_q, cu_seq_lens_k=cu_seq_lens_k,
            max_length_q=max_length_q, max_length_k=max_length_k, seq_idx=seq_idx,
        )  # fmt: skip
        kept: Any = logits_to_keep
        if isinstance(logits_to_keep, Tensor):
            check_whole("logits_to_keep", logits_to_keep)
        else:
            kept = slice(-check_int("logits_to_keep", logits_to_keep, least=0, also="or a tensor of places"), None)
        out.logits = self.lm_head(out.last_hidden_state[:, kept])
        if labels is not None:
            if out.document_starts is not None:
                labels = labels.masked_fill(out.document_starts, -100)
            out.loss = self.loss_function(
                logits=out.logits, labels=labels, vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )  # fmt: skip
            for name, weight in (self.config.loss_weights or {}).items():
                if out.mechanism_losses and name in out.mechanism_losses:
                    out.loss = out.loss + weight * out.mechanism_losses[name]
        if return_dict is None:
            return_dict = self.config.return_dict
        return out if return_dict else out.to_tuple()


AutoConfig.register(DecoderConfig.model_type, DecoderConfig)
AutoModel.register(DecoderConfig, DecoderModel)
AutoModelForCausalLM.register(DecoderConfig, DecoderForCausalLM)

__all__: Sequence[str] = ("DecoderConfig", "DecoderForCausalLM", "DecoderModel", "DecoderOutput", "build_mixer")
