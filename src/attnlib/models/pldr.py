"""PLDR-LLM (Gokden, 2025): a language model on power-law graph attention, with its G-cache, as a transformers model.

Needs ``transformers``. Importing this module registers it with ``AutoConfig`` and ``AutoModelForCausalLM``.

**Without a cache the model looks ahead.** The metric ``G`` of a layer is deduced from the queries of all positions, so
the scores of early positions depend on later tokens: the training loss, and any loss without a cache, is that of a
model that has seen a summary of what it predicts. Judge it with a metric that is frozen
(:meth:`PLDRForCausalLM.freeze_metric`) or kept from the prompt (``generate``).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..extras import missing

try:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    from transformers import initialization as init
except ImportError as error:
    raise missing(__name__, error) from error

from ..hooks.hf.state import StateLayer
from ..nn.dense.pldr_llm_plga import Deductive, PowerLawGraphAttention, _SwiGLU
from .language import DecoderConfig, DecoderForCausalLM, DecoderLayer, DecoderModel
from .packing import Packing


class PLDRConfig(DecoderConfig):
    """Settings of :class:`PLDRForCausalLM`; the defaults are the paper's model of 110 million parameters.

    Args:
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads, rope_theta, loss_weights: as in
            :class:`DecoderConfig`; ``loss_weights`` of ``dag_lm``, ``dag_p`` and ``dag_g`` are the coefficients of the
            paper's regulariser, and 0, as in its base model, by default.
        intermediate_size: hidden width of the feed-forward, ``floor(8/3 hidden_size)`` by default.
        metric_hidden: hidden width of the SwiGLU layers that deduce the metric.
        residual_units: residual units of the metric learner.
        unit_depth: SwiGLU layers in a unit.
        metric: ``"learned"``, or ``"cached"`` once it is frozen; :meth:`PLDRForCausalLM.freeze_metric` sets it.
            ``"fixed"``: no learner, and the metric that :meth:`PLDRForCausalLM.use_g_cache` is given.
        activation: of the gated layers, in the feed-forward and in the metric learner.
        layer_norm_eps: epsilon of the norms.

    >>> PLDRConfig().intermediate_size
    2389
    """

    model_type = "attnlib-pldr"

    vocab_size: int = 32000
    hidden_size: int = 896
    num_hidden_layers: int = 5
    num_attention_heads: int = 14
    metric_hidden: int = 170
    residual_units: int = 8
    unit_depth: int = 2
    metric: str = "learned"
    activation: str = "silu"
    layer_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must divide hidden_size={self.hidden_size}"
            )
        if self.intermediate_size is None:
            self.intermediate_size = self.hidden_size * 8 // 3
        self.loss_weights = {"dag_lm": 0.0, "dag_p": 0.0, "dag_g": 0.0, **(self.loss_weights or {})}
        self.allow_lookahead = True
        self.mechanisms = ["pldr-llm-plga"]
        super().__post_init__(**kwargs)

    def layer_spec(self, index: int) -> dict[str, Any]:
        """Power-law graph attention with these settings, in every layer."""
        return {
            "name": "pldr-llm-plga",
            "metric_hidden": self.metric_hidden,
            "residual_units": self.residual_units,
            "unit_depth": self.unit_depth,
            "metric": self.metric,
            "activation": self.activation,
        }


class PLDRLayer(DecoderLayer):
    """``x <- LN(x + attention(x))``, then ``x <- LN(x + swiglu(x))``: norms come after the sums."""

    mixer: PowerLawGraphAttention

    def make_rest(self, config: DecoderConfig) -> None:
        assert isinstance(config, PLDRConfig) and config.intermediate_size is not None
        self.mixer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = _SwiGLU(config.hidden_size, config.intermediate_size, config.activation)

    def mix(self, x: Tensor, valid: Tensor | None, layer: StateLayer | None) -> tuple[Tensor, dict[str, Tensor]]:
        if layer is None or self.mixer.metric != "learned":
            return super().mix(x, valid, layer)
        if layer.state is None:  # the prompt deduces the metric, which its continuation keeps
            y, state = self.mixer.prefill(x, valid)
        else:
            y, state = self.mixer.step(x, layer.state, valid=valid)
        layer.advance(state, x.shape[1])
        return y, {}

    def combine(
        self, x: Tensor, valid: Tensor | None, layer: StateLayer | None, packing: Packing | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        out, losses = self.mix_documents(x, valid, layer, packing)
        x = self.mixer_norm(x + out)
        return self.mlp_norm(x + self.mlp(x)), losses


@dataclass(frozen=True)
class GCache:
    """The deductive outputs that attention reads, of every layer, and whose they are.

    Args:
        layers: for every layer ``(A_LM, G)``, each (H, D, D).
        source: fingerprint of the model that deduced them; ``None`` when unknown.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    source: str | None = None

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        tensors = {f"{i}.A_LM": layer[0] for i, layer in enumerate(self.layers)}
        tensors |= {f"{i}.G": layer[1] for i, layer in enumerate(self.layers)}
        save_file(
            {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, path,
            metadata={} if self.source is None else {"source": self.source},
        )  # fmt: skip

    @classmethod
    def load(cls, path: str | Path) -> GCache:
        """Read what :meth:`save` wrote."""
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            source = (file.metadata() or {}).get("source")
        count = len(tensors) // 2
        expected = {f"{i}.{n}" for i in range(count) for n in ("A_LM", "G")}
        if set(tensors) != expected:
            raise ValueError(f"{str(path)!r} is not a G-cache: it holds {sorted(tensors)[:4]}, not 0.A_LM, 0.G, ..")
        return cls(tuple((tensors[f"{i}.A_LM"], tensors[f"{i}.G"]) for i in range(count)), source)


class PLDRModel(DecoderModel):
    """Embedding times ``sqrt(C)``, norm, layers; no norm after the last one."""

    config: PLDRConfig
    config_class = PLDRConfig
    layer_class = PLDRLayer

    def make_norm(self) -> nn.Module:
        return nn.LayerNorm(self.config.hidden_size, eps=self.config.layer_norm_eps)

    def embed(self, embedded: Tensor) -> Tensor:
        return self.norm(embedded * math.sqrt(self.config.hidden_size))

    def close(self, x: Tensor) -> Tensor:
        return x

    def check_streaming(self) -> None:
        """Every layer can: the metric of the prompt is kept."""

    def _init_weights(self, module: nn.Module) -> None:
        _init_weights(module)


def _init_weights(module: nn.Module) -> None:
    """The authors' initialisation; the attention layers initialise themselves."""
    if isinstance(module, nn.Linear):
        init.xavier_uniform_(module.weight)
        init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        init.normal_(module.weight)
    elif isinstance(module, nn.LayerNorm):
        init.ones_(module.weight)
        init.zeros_(module.bias)


class PLDRForCausalLM(DecoderForCausalLM):
    """The large language model from power-law decoder representations.

    Post-norm decoder layers around :class:`attnlib.nn.dense.pldr_llm_plga.PowerLawGraphAttention`; untied head with a
    bias. It runs in three ways:

    - training, and ``use_cache=False``: every call deduces the metric from all its positions, later ones too;
    - ``generate``, or ``use_cache=True``: the prompt deduces the metric, the cache keeps it beside keys and values, as
      the authors' KV-cache with G-cache does;
    - after :meth:`freeze_metric` or :meth:`use_g_cache`: one metric for every input. The model is then causal, and
      cached and uncached runs agree.

    What differs from the authors' code: padding is masked wherever it stands, and stays out of the metric; the power
    law runs in float32 at least; the table of their rotary embedding, which bounds the length, is not needed.

    Reference: Gokden, 2025, arXiv 2502.13502.

    >>> config = PLDRConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, metric_hidden=4)
    >>> PLDRForCausalLM(config)(torch.tensor([[1, 2, 3]])).logits.shape
    torch.Size([1, 3, 50])
    """

    config: PLDRConfig
    config_class = PLDRConfig
    model: PLDRModel
    model_class = PLDRModel
    head_bias = True
    _tied_weights_keys = {}  # type: ignore[assignment]
    _no_split_modules = ["PLDRLayer"]

    def _init_weights(self, module: nn.Module) -> None:
        _init_weights(module)

    def _mixers(self) -> list[PowerLawGraphAttention]:
        return [layer.mixer for layer in self.model.layers]  # type: ignore[union-attr,misc]

    # ---- deductive outputs and the G-cache

    @torch.no_grad()
    def deductive_outputs(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[Deductive]:
        """What every layer deduces from ``input_ids`` (B, N), (B, H, D, D) each, with the metric learned there.

        Raises:
            ValueError: the metric is frozen.
        """
        if self.config.metric != "learned":
            raise ValueError("the metric of this model is frozen; call thaw_metric first")
        x = self.model.embed(self.model.embed_tokens(input_ids))
        valid, packing = self.model._documents(attention_mask, x, None, {})
        if packing is not None:
            raise ValueError("attention_mask packs several documents into a row; each has a metric of its own")
        found = []
        for layer in self.model.layers:
            found.append(layer.mixer.deductive_outputs(x, valid))  # type: ignore[union-attr,operator]
            x = layer(x, valid=valid)[0]
        return found

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of what deduces the metric; a G-cache carries them.

        Raises:
            ValueError: the model was deployed, and deduces nothing any more.
        """
        digest = hashlib.sha256()
        for mixer in self._mixers():
            if mixer.learner is None:
                raise ValueError("this model has a metric and no learner: it was deployed, or made with metric='fixed'")
            for parameter in mixer.learner.parameters():
                digest.update(parameter.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def g_cache(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> GCache:
        """The G-cache that a prompt (B, N) makes: the mean over its samples of what each layer deduces."""
        found = self.deductive_outputs(input_ids, attention_mask)
        return GCache(tuple((d.A_LM.mean(0), d.G.mean(0)) for d in found), self.fingerprint())

    def use_g_cache(self, cache: GCache | Sequence[Sequence[Tensor]], any_source: bool = False) -> PLDRForCausalLM:
        """Freeze the metric of every layer to that of ``cache``.

        Args:
            cache: what :meth:`g_cache` made, or the authors' list of ``[A_LM, G]`` (1, H, D, D) with ``any_source``.
            any_source: take a metric that this model has not deduced itself, as the paper's negative tests do.

        Returns:
            The model itself.

        Raises:
            ValueError: a cache of another model, of another number of layers, or of other shapes.
        """
        if not isinstance(cache, GCache):
            cache = GCache(tuple((layer[0], layer[1]) for layer in cache))
        mixers = self._mixers()
        if len(cache.layers) != len(mixers):
            raise ValueError(f"cache has {len(cache.layers)} layers, the model has {len(mixers)}")
        shape = tuple(mixers[0].G.shape)
        for i, pair in enumerate(cache.layers):  # before any layer changes
            for name, tensor in zip(("A_LM", "G"), pair, strict=True):
                if tuple(tensor.shape) not in (shape, (1, *shape)):
                    raise ValueError(
                        f"cache, layer {i}: {name} must be (H, D, D)={shape}, got {tuple(tensor.shape)}: "
                        "it is the G-cache of another model"
                    )
        if not any_source and cache.source != self.fingerprint():
            raise ValueError(
                "cache is the G-cache of another model (the weights that deduced it differ); make one with g_cache, or "
                "pass any_source=True for an experiment"
            )
        for mixer, pair in zip(mixers, cache.layers, strict=True):
            mixer.freeze_metric(metric=pair)
        if self.config.metric == "learned":
            self.config.metric = "cached"
        return self

    def freeze_metric(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> PLDRForCausalLM:
        """:meth:`use_g_cache` of :meth:`g_cache` of a prompt (B, N); saved and loaded with the model."""
        return self.use_g_cache(self.g_cache(input_ids, attention_mask))

    def thaw_metric(self) -> PLDRForCausalLM:
        """Deduce the metric from every input again."""
        for mixer in self._mixers():
            mixer.thaw_metric()
        self.config.metric = "learned"
        return self

    # ---- the authors' weights

    @staticmethod
    def convert_state_dict(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``PLDR_Model``."""
        tops = {
            "decoder.embedding.": "model.embed_tokens.",
            "decoder.layernorm1.": "model.norm.",
            "final_layer.": "lm_head.",
        }
        parts = {"layernorm1": "mixer_norm", "layernorm2": "mlp_norm"}
        out: dict[str, Tensor] = {}
        attention: dict[str, dict[str, Tensor]] = {}
        for key, value in state_dict.items():
            top = next((t for t in tops if key.startswith(t)), None)
            if top is not None:
                out[tops[top] + key[len(top) :]] = value
                continue
            if not key.startswith("decoder.dec_layers."):
                raise ValueError(f"{key!r} is not a weight of PLDR_Model")
            _, _, index, part, rest = key.split(".", 4)
            place = f"model.layers.{index}."
            if part == "mha1":
                attention.setdefault(place, {})[rest] = value
            elif part == "ffn":
                out[f"{place}mlp.{rest.replace('gluw', 'w')}"] = value
            elif part in parts:
                out[f"{place}{parts[part]}.{rest}"] = value
            else:
                raise ValueError(f"{key!r} is not a weight of PLDR_Model")
        for place, weights in attention.items():
            for name, value in PowerLawGraphAttention.convert_state_dict(weights).items():
                out[f"{place}mixer.{name}"] = value
        return out


AutoConfig.register(PLDRConfig.model_type, PLDRConfig)
AutoModel.register(PLDRConfig, PLDRModel)
AutoModelForCausalLM.register(PLDRConfig, PLDRForCausalLM)

__all__: Sequence[str] = ("GCache", "PLDRConfig", "PLDRForCausalLM", "PLDRModel")
