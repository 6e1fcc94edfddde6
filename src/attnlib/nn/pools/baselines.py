"""The thirteen poolings that efficient probing is compared with, each as its release defines it for frozen tokens.

They are those of the authors' probes (billpsomas/efficient-probing, ``probe_heads.py``), with its settings as defaults.
What a release computes and throws away is not computed: further queries, rows of a map of which one is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_int
from ...ops import attention
from ...ops.modulation import pool as grid_pool
from ...ops.modulation import weighted_pool
from ...types import Traits
from ..layers import ConvNorm, LayerScale, Mlp, head_dim_of, masked_batch_norm, merge_heads, split_heads, zero_invalid
from ..registry import register
from ..released import Released, Rule
from .base import Pool, read

Pooled = tuple[Tensor, Tensor | None]


def _mean(x: Tensor, valid: Tensor | None) -> Tensor:
    return grid_pool(x, valid=valid)  # (B, 1, C)


def _learned(dim: int, std: float) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=std))


def _flat(name: str) -> Rule:
    """1 x 1 convolutions as linear maps."""
    return lambda match, value: {match.expand(name): value.flatten(1) if value.dim() == 4 else value}


def _heads_of_three(match_to: str, parts: str) -> Rule:
    """Fused projections, by their parts."""

    def rule(match: object, value: Tensor) -> dict[str, Tensor]:
        kind = match[1]  # type: ignore[index]
        split = zip(parts, value.chunk(len(parts)), strict=True)
        return {match_to.format(name) + "." + kind: part for name, part in split}

    return rule


@register("mean-pool", kind="pool")
class MeanPool(Pool):
    """The mean of the tokens that exist, ``y = mean_n x_n``: no parameters. The yardstick of pools.

    >>> MeanPool(dim=1)(torch.tensor([[[1.0], [3.0]]])).tolist()
    [[2.0]]
    """

    class_traits = Pool.class_traits.but(weights=False)

    def pool(self, x: Tensor, valid: Tensor | None, weights: bool) -> Pooled:
        return _mean(x, valid).squeeze(1), None


@register("abmilp", kind="pool")
class AbmilpPool(Pool):
    """Scores by a small network, ``y = sum_n softmax_n(mlp(x_n)) x_n`` (Przewięźlikowski et al., 2024, 2412.03215).

    Args:
        dim: width C.
        depth: linear maps of the network; the last gives one number.
        activation: between them, ``"tanh"`` or ``"relu"``.

    What differs from the release: its self-attention before the scores and its positions, which its probes leave out,
    do not exist.
    """

    def __init__(self, dim: int, depth: int = 2, activation: str = "tanh"):
        super().__init__(dim)
        check_int("depth", depth, least=1)
        check_choice("activation", activation, ("tanh", "relu"))
        self.layers = nn.ModuleList(nn.Linear(dim, dim if i < depth - 1 else 1) for i in range(depth))
        self.act: Callable[[Tensor], Tensor] = torch.tanh if activation == "tanh" else torch.relu

    def pool(self, x: Tensor, valid: Tensor | None, weights: bool) -> Pooled:
        scores = x
        for i, layer in enumerate(self.layers):
            scores = layer(scores if i == 0 else self.act(scores))
        y = weighted_pool(x, scores, valid=valid).squeeze(1)
        if not weights:
            return y, None
        hidden = scores if valid is None else scores.masked_fill(~valid.unsqueeze(-1), float("-inf"))
        return y, hidden.softmax(1).transpose(1, 2).unsqueeze(1)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the release's ``ABMILPHead``."""
        theirs = Released(state_dict, "ABMILPHead")
        rules: dict[str, Rule] = {
            r"attention_predictor\.(\d+)\.(weight|bias)": lambda match, value: {
                f"layers.{int(match[1]) // 2}.{match[2]}": value
            }
        }
        return theirs.close(theirs.renamed(rules))


@register("simpool", kind="pool")
class SimPool(Pool):
    """The mean token asks normed tokens: ``y = softmax(W_q mean(x) (W_k LN(x))^T / sqrt(d)) LN(x)`` (2309.06891).

    Psomas et al., 2023, "Keep It SimPool".

    Args:
        dim: width C.
        num_heads: heads.
        linears: False is the release's ``SimPool_nolinears`` (``esimpool``): queries are normed means, keys normed
            tokens, values the tokens; only the norm has parameters.

    What differs from the release: its powers of values (``gamma``), which its probes leave out, do not exist.
    """

    def __init__(self, dim: int, num_heads: int = 1, linears: bool = True):
        super().__init__(dim)
        head_dim_of(dim, num_heads)
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.q = nn.Linear(dim, dim, bias=False) if linears else None
        self.k = nn.Linear(dim, dim, bias=False) if linears else None

    def pool(self, x: Tensor, valid: Tensor | None, weights: bool) -> Pooled:
        query, normed = _mean(x, valid), self.norm(x)
        if self.q is None or self.k is None:
            return read(self.norm(query), normed, x, self.num_heads, valid, weights)
        return read(self.q(query), self.k(normed), normed, self.num_heads, valid, weights)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the release's ``SimPool`` and ``SimPool_nolinears``."""
        theirs = Released(state_dict, "SimPool")
        rules: dict[str, Rule] = {r"norm_patches\.(weight|bias)": r"norm.\1", r"w([qk])\.weight": r"\1.weight"}
        return theirs.close(theirs.renamed(rules))


@register("esimpool", kind="pool")
class ESimPool(SimPool):
    """:class:`SimPool` without linear maps: ``y_h = softmax(LN(mean(x))_h LN(x)_h^T / sqrt(d)) x_h``.

    Args:
        dim: width C.
        num_heads: heads.
    """

    def __init__(self, dim: int, num_heads: int = 12):
        super().__init__(dim, num_heads, linears=False)


class QueryPool(Pool):
    """Base of pools with one learned query: ``y = heads(query, keys, values)``, and what a release puts around it.

    Args:
        dim: width C.
        num_heads: heads.
        std: of the learned query at the start; zero: it starts as zeros.
        bias: of the projections of queries, keys and values.
        project_query: linear map of the query.
        project_out: linear map of what was read.
        mlp: a feed-forward behind it.
    """

    def __init__(
        self, dim: int, num_heads: int, std: float, bias: bool, project_query: bool = True, project_out: bool = True,
        mlp: bool = False,
    ):  # fmt: skip
        super().__init__(dim)
        head_dim_of(dim, num_heads)
        self.num_heads = num_heads
        self.query = _learned(dim, std) if std else nn.Parameter(torch.zeros(1, 1, dim))
        self.q = nn.Linear(dim, dim, bias=bias) if project_query else nn.Identity()
        self.k, self.v = nn.Linear(dim, dim, bias=bias), nn.Linear(dim, dim, bias=bias)
        self.proj = nn.Linear(dim, dim) if project_out else nn.Identity()
        self.mlp = Mlp(dim) if mlp else None

    def ask(self, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None, weights: bool) -> Pooled:
        """Projections, attention and output projection: (B, C), and the weights."""
        y, maps = read(self.q(query), self.k(keys), self.v(values), self.num_heads, valid, weights)
        return self.proj(y), maps


@register("aim-pool", "multi-head-pool", kind="pool")
class AimPool(QueryPool):
    """Multi-head attentive pooling: a learned query, keys and values of batch-normed tokens.

    El-Nouby et al., 2024, "Scalable Pre-training of Large Autoregressive Image Models", arXiv 2401.08541.
    ``y_h = softmax(u_h (W_k x)_h^T / sqrt(d)) (W_v x)_h`` with x normed over batch and tokens, without parameters.
    ``2 C^2 + C`` parameters.

    Args:
        dim: width C.
        num_heads: heads.
        norm: the BatchNorm before keys and values.
    """

    def __init__(self, dim: int, num_heads: int = 12, norm: bool = True):
        super().__init__(dim, num_heads, 0.02, False, project_query=False, project_out=False)
        nn.init.normal_(self.query, std=0.02)
        self.norm = nn.BatchNorm2d(dim, affine=False, eps=1e-6) if norm else None

    @property
    def traits(self) -> Traits:
        return self.class_traits.but(batch_independent=self.norm is None or not self.training)

    def pool(self, x: Tensor, valid: Tensor | None, weights: bool) -> Pooled:
        if self.norm is not None:
            x = zero_invalid(masked_batch_norm(self.norm, x, valid), valid)
        return self.ask(self.query, x, x, valid, weights)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the release's ``AttentionPoolingClassifier``."""
        theirs = Released(state_dict, "AttentionPoolingClassifier")
        rules: dict[str, Rule] = {
            r"cls_token": "query",
            r"([kv])\.weight": r"\1.weight",
            r"bn\.(running_mean|running_var|num_batches_tracked)": r"norm.\1",
        }
        return theirs.close(theirs.renamed(rules))


@register("siglip-pool", kind="pool")
class SiglipPool(QueryPool):
    """A latent query, all projections, and a feed-forward: ``z = W_o heads(...)``, ``y = z + mlp(z)`` (2303.15343).

    Args:
        dim: width C.
        num_heads: heads.
    """

    def __init__(self, dim: int, num_heads: int = 8):
        super().__init__(dim, num_heads, dim**-0.5, True, mlp=True)

    def pool(self, x: Tensor, valid: Tensor | None, weights: bool) -> Pooled:
        z, maps = self.ask(self.query, x, x, valid, weights)
        assert self.mlp is not None
        return z + self.mlp(z), maps

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From timm's ``AttentionPoolLatent``, as the release has it."""
        theirs = Released(state_dict, "AttentionPoolLatent")
        rules: dict[str, Rule] = {
            r"latent": "query",
            r"kv\.(weight|bias)": _heads_of_three("{}", "kv"),
            r"(q|proj|mlp\.fc[12])\.(weight|bias)": r"\1.\2",
        }
        return theirs.close(theirs.renamed(rules))


@register("jepa-pool", kind="pool")
class JepaPool(QueryPool):
    """The cross-attention block of V-JEPA's probes (Bardes et al., 2024, 2404.08471).

    ``q = u + W_o heads(u, LN(x))``, ``y = q + mlp(LN(q))`` with a learned query u.

    Args:
        dim: width C.
        num_heads: heads.
    """

    def __init__(self, dim: int, num_heads: int = 12):
        super().__init__(dim, num_heads, 0.02, True, mlp=True)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)
        assert self.mlp is not None and isinstance(self.proj, nn.Linear)
        with torch.no_grad():  # as the first of the blocks of a transformer
            self.proj.weight.div_(2**0.5)
            self.mlp.fc2.weight.div_(2**0.5)

    def pool(self, x: Tensor, valid: Tensor | None, weights: bool) -> Pooled:
        x = self.norm1(x)
        read_, maps = self.ask(self.query, x, x, valid, weights)
        q = self.query.squeeze(1) + read_
        assert self.mlp is not None
        return q + self.mlp(self.norm2(q)), maps

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the release's ``AttentivePooler`` of one query and one block."""
        theirs = Released(state_dict, "AttentivePooler")
        block = r"cross_attention_block\."
        rules: dict[str, Rule] = {
            r"query_tokens": "query",
            block + r"xattn\.kv\.(weight|bias)": _heads_of_three("{}", "kv"),
            block + r"(?:xattn\.)?(q|proj|norm[12]|mlp\.fc[12])\.(weight|bias)": r"\1.\2",
        }
        return theirs.close(theirs.renamed(rules))


@register("cae-pool", kind="pool")
class CaePool(QueryPool):
    """Queries, keys and values normed by themselves, no residual (Chen et al., 2022, 2202.03026).

    ``y = W_o heads(LN_q(u), LN_k(x), LN_v(x))`` with a learned query u.

    Args:
        dim: width C.
        num_heads: heads.
    """

    def __init__(self, dim: int, num_heads: int = 8):
        super().__init__(dim, num_heads, 0.0, False)
        self.q_norm, self.k_norm, self.v_norm = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def pool(self, x: Tensor, valid: Tensor | None, weights: bool) -> Pooled:
        return self.ask(self.q_norm(self.query), self.k_norm(x), self.v_norm(x), valid, weights)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the release's ``CAEAttentiveBlock``."""
        theirs = Released(state_dict, "CAEAttentiveBlock")
        theirs.leave(r"norm2_cross\.(weight|bias)", because="the release never applies it")
        rules: dict[str, Rule] = {
            r"query_token": "query",
            r"norm1_([qkv])\.(weight|bias)": r"\1_norm.\2",
            r"cross_attn\.(q|k|v|proj)\.(weight|bias)": r"\1.\2",
        }
        return theirs.close(theirs.renamed(rules))


@register("coca-pool", kind="pool")
class CocaPool(Pool):
    """A learned query of many heads, one head of keys and values (Yu et al., 2022, 2205.01917).

    ``y = W_o concat_h softmax((W_q LN(u))_h (W_k x)^T / sqrt(d)) W_v x``.

    Args:
        dim: width C.
        num_heads: heads of the query.
        head_dim: d, whatever C is.

    What differs from the release: of its 196 queries it returns the first; only that exists here.
    """

    def __init__(self, dim: int, num_heads: int = 8, head_dim: int = 64):
        super().__init__(dim)
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.randn(1, 1, dim))
        self.norm = nn.LayerNorm(dim, bias=False)
        self.q = nn.Linear(dim, num_heads * head_dim, bias=False)
        self.k, self.v = nn.Linear(dim, head_dim, bias=False), nn.Linear(dim, head_dim, bias=False)
        self.proj = nn.Linear(num_heads * head_dim, dim, bias=False)

    def pool(self, x: Tensor, valid: Tensor | None, weights: bool) -> Pooled:
        y, maps = read(self.q(self.norm(self.query)), self.k(x), self.v(x), self.num_heads, valid, weights)
        return self.proj(y), maps

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the release's ``CrossAttention`` of ``coca_pytorch``; queries after the first are left out."""
        theirs = Released(state_dict, "CrossAttention of coca_pytorch")
        theirs.leave(r"norm\.beta", because="a buffer of zeros")
        rules: dict[str, Rule] = {
            r"img_queries": lambda match, value: {"query": value[None, :1]},
            r"norm\.gamma": "norm.weight",
            r"to_q\.weight": "q.weight",
            r"to_kv\.(weight)": _heads_of_three("{}", "kv"),
            r"to_out\.weight": "proj.weight",
        }
        return theirs.close(theirs.renamed(rules))


@register("cait-pool", kind="pool")
class CaitPool(QueryPool):
    """Class attention with learned scales (Touvron et al., 2021, 2103.17239).

    The query is a class token among the keys: ``c = u + g_1 W_o heads(LN(u), LN([u, x]))``,
    ``y = LN(c + g_2 mlp(LN(c)))`` with one norm for all of ``[u, x]``.

    Args:
        dim: width C.
        num_heads: heads.
        init_scale: of ``g_1`` and ``g_2``.
    """

    def __init__(self, dim: int, num_heads: int = 4, init_scale: float = 1e-5):
        super().__init__(dim, num_heads, 0.02, True, mlp=True)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.norm = nn.LayerNorm(dim)
        self.scale1, self.scale2 = LayerScale(dim, init_scale), LayerScale(dim, init_scale)

    def pool(self, x: Tensor, valid: Tensor | None, weights: bool) -> Pooled:
        among = self.norm1(torch.cat([self.query.expand(len(x), -1, -1).to(x.dtype), x], 1))
        exists = None if valid is None else F.pad(valid, (1, 0), value=True)
        read_, maps = self.ask(among[:, :1], among, among, exists, weights)
        c = self.query.squeeze(1) + self.scale1(read_)
        assert self.mlp is not None
        y = self.norm(c + self.scale2(self.mlp(self.norm2(c))))
        return y, None if maps is None else maps[..., 1:]

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the release's ``CAPooling`` of one block."""
        theirs = Released(state_dict, "CAPooling")
        block = r"blocks_token_only\.0\."
        rules: dict[str, Rule] = {
            r"cls_token": "query",
            r"norm\.(weight|bias)": r"norm.\1",
            block + r"gamma_([12])": r"scale\1.gamma",
            block + r"(?:attn\.)?(q|k|v|proj|norm[12]|mlp\.fc[12])\.(weight|bias)": r"\1.\2",
        }
        return theirs.close(theirs.renamed(rules))


@register("clip-pool", kind="pool")
class ClipPool(Pool):
    """The mean token attends among itself and all, with learned positions (Radford et al., 2021, 2103.00020).

    With ``z = [mean(LN(x)), LN(x)] + positions``: ``y = W_o heads(z_0, z, z)``.

    Args:
        dim: width C.
        num_tokens: N, of which there must be as many in every call.
        num_heads: heads.
    """

    class_traits = Pool.class_traits.but(permutation_equivariant=False, resolution_free=False)

    def __init__(self, dim: int, num_tokens: int, num_heads: int = 4):
        super().__init__(dim)
        head_dim_of(dim, num_heads)
        self.num_heads = num_heads
        self.num_tokens = check_int("num_tokens", num_tokens, least=1)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_tokens + 1, dim), std=dim**-0.5))
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        for layer in (self.q, self.k, self.v):
            nn.init.trunc_normal_(layer.weight, std=dim**-0.5)
            nn.init.zeros_(layer.bias)
        self.proj = nn.Linear(dim, dim)

    def pool(self, x: Tensor, valid: Tensor | None, weights: bool) -> Pooled:
        if x.shape[1] != self.num_tokens:
            raise ValueError(f"x has {x.shape[1]} tokens, but there are positions for num_tokens={self.num_tokens}")
        x = zero_invalid(self.norm(x), valid)
        z = torch.cat([_mean(x, valid), x], 1) + self.pos_embed
        exists = None if valid is None else F.pad(valid, (1, 0), value=True)
        y, maps = read(self.q(z[:, :1]), self.k(z), self.v(z), self.num_heads, exists, weights)
        return self.proj(y), None if maps is None else maps[..., 1:]

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From timm's ``AttentionPool2d``, as the release has it."""
        theirs = Released(state_dict, "AttentionPool2d")
        rules: dict[str, Rule] = {
            r"qkv\.(weight|bias)": _heads_of_three("{}", "qkv"),
            r"(norm|proj)\.(weight|bias)": r"\1.\2",
            r"pos_embed": "pos_embed",
        }
        return theirs.close(theirs.renamed(rules))


@register("dino-vit-pool", kind="pool")
class BlockPool(Pool):
    """A whole transformer block over the tokens, then their mean; quadratic in the tokens (Oquab et al., 2304.07193).

    ``z = x + W_o heads(LN(x))``, ``y = mean(z + mlp(LN(z)))``.

    Args:
        dim: width C.
        num_heads: heads.
    """

    class_traits = Pool.class_traits.but(weights=False, work={"N": 2})

    def __init__(self, dim: int, num_heads: int = 8):
        super().__init__(dim)
        head_dim_of(dim, num_heads)
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.mlp = Mlp(dim)

    def pool(self, x: Tensor, valid: Tensor | None, weights: bool) -> Pooled:
        q, k, v = (split_heads(t, self.num_heads) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.proj(merge_heads(attention(q, k, v, valid=valid)))
        return _mean(x + self.mlp(self.norm2(x)), valid).squeeze(1), None

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the release's ``DinoViTBlockPooling``."""
        theirs = Released(state_dict, "DinoViTBlockPooling")
        rules: dict[str, Rule] = {r"dino_block\.(?:attn\.)?(qkv|proj|norm[12]|mlp\.fc[12])\.(weight|bias)": r"\1.\2"}
        return theirs.close(theirs.renamed(rules))


@register("dolg-pool", kind="pool")
class DolgPool(Pool):
    """Softplus scores times unit vectors, averaged (Yang et al., 2021, 2108.02927).

    With ``z = BatchNorm(W_1 x)``: ``y = mean_n softplus(w_2 relu(z_n)) z_n / |z_n|``.

    Args:
        dim: width C.
    """

    class_traits = Pool.class_traits.but(weights=False)

    def __init__(self, dim: int):
        super().__init__(dim)
        self.fc1, self.fc2 = nn.Linear(dim, dim), nn.Linear(dim, 1)
        self.norm = nn.BatchNorm2d(dim)
        for layer in (self.fc1, self.fc2):
            nn.init.normal_(layer.weight, std=(2 / layer.out_features) ** 0.5)

    @property
    def traits(self) -> Traits:
        return self.class_traits.but(batch_independent=not self.training)

    def pool(self, x: Tensor, valid: Tensor | None, weights: bool) -> Pooled:
        z = masked_batch_norm(self.norm, zero_invalid(self.fc1(x), valid), valid)
        scores = F.softplus(self.fc2(z.relu()))
        return _mean(scores * F.normalize(z, dim=-1), valid).squeeze(1), None

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the release's ``SpatialAttention2d``, whose linear maps are 1 x 1 convolutions."""
        theirs = Released(state_dict, "SpatialAttention2d")
        rules: dict[str, Rule] = {
            r"conv([12])\.(weight|bias)": _flat(r"fc\1.\2"),
            r"bn\.(weight|bias|running_mean|running_var|num_batches_tracked)": r"norm.\1",
        }
        return theirs.close(theirs.renamed(rules))


@register("cbam-pool", kind="pool")
class CbamPool(Pool):
    """Channel gate, then spatial gate of a square map, a residual, and the mean (Woo et al., 2018, 1807.06521).

    ``u = x sigmoid(f(mean x) + f(max x))``, ``v = u sigmoid(BatchNorm(conv_k([mean_c u, max_c u])))``,
    ``y = mean relu(v + x)`` with f of two linear maps through C / 16 channels.

    Args:
        dim: width C.
        kernel_size: k of the convolution, odd.
        reduction: C over the hidden width of f.
    """

    class_traits = Pool.class_traits.but(weights=False, permutation_equivariant=False)

    def __init__(self, dim: int, kernel_size: int = 7, reduction: int = 16):
        super().__init__(dim)
        check_int("reduction", reduction, least=1)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        hidden = max(int(dim / reduction + 0.5), 1)
        self.fc1, self.fc2 = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False)
        self.conv = ConvNorm(2, 1, kernel_size)

    @property
    def traits(self) -> Traits:
        return self.class_traits.but(batch_independent=not self.training)

    def pool(self, x: Tensor, valid: Tensor | None, weights: bool) -> Pooled:
        side = int(x.shape[1] ** 0.5)
        if side * side != x.shape[1]:
            raise ValueError(f"x must hold the tokens of a square map, got {x.shape[1]} tokens")
        top = x if valid is None else x.masked_fill(~valid.unsqueeze(-1), torch.finfo(x.dtype).min)
        pooled = torch.cat([_mean(x, valid), top.amax(1, keepdim=True)], 1)
        u = x * self.fc2(self.fc1(pooled).relu()).sum(1, keepdim=True).sigmoid()
        summary = torch.stack([u.mean(-1), u.amax(-1)], -1).unflatten(1, (side, side))
        exists = None if valid is None else valid.unflatten(1, (side, side))
        gate = self.conv(summary, exists).flatten(1, 2).sigmoid()
        return _mean((u * gate + x).relu(), valid).squeeze(1), None

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the release's ``CbamPooling``."""
        theirs = Released(state_dict, "CbamPooling")
        rules: dict[str, Rule] = {
            r"channel\.fc([12])\.weight": _flat(r"fc\1.weight"),
            r"spatial\.conv\.conv\.weight": "conv.conv.weight",
            r"spatial\.conv\.bn\.(weight|bias|running_mean|running_var|num_batches_tracked)": r"conv.norm.\1",
        }
        return theirs.close(theirs.renamed(rules))
