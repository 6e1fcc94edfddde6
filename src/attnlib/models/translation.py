"""Encoders and decoders for translation whose layers choose their kind of attention (Liu et al., 2022).

The network of hardware-aware transformers (Wang et al., 2020, arXiv 2005.14187), widths, heads and depth chosen per
layer, with a kind of attention of the registry for every encoder, decoder and cross attention on top, as "Neural
Architecture Search on Efficient Transformers and Beyond", arXiv 2207.13955, mixes softmax attention and cosFormer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_int, check_rank, check_real, check_whole
from ..nn.registry import create
from ..nn.released import Released, Rule

#: How many tokens the kinds are told of that must know it, beside those of one sequence.
_LONG = {"cosformer": "max_length"}


class _Layer(nn.Module):
    """Self-attention, cross-attention where there is a context, and an MLP; each residual, with a norm after or before.

    ``cross`` is ``(num_heads, kind, context_dim)``.
    """

    def __init__(
        self, dim: int, inner: int, ffn: int, own: tuple[int, str], cross: tuple[int, str, int] | None, length: int,
        reach: int, dropout: float, pre_norm: bool,
    ):  # fmt: skip
        super().__init__()

        def attention(num_heads: int, kind: str, length: int, **settings: Any) -> nn.Module:
            if inner % num_heads:
                raise ValueError(f"heads must divide inner_dim={inner}, got {num_heads}")
            if kind in _LONG:
                settings[_LONG[kind]] = length
            return create(kind, dim=dim, num_heads=num_heads, head_dim=inner // num_heads, **settings)

        self.attn = attention(*own, length, causal=cross is not None)
        self.norm = nn.LayerNorm(dim)
        if cross is not None:
            self.cross = attention(*cross[:2], reach, context_dim=cross[2])
            self.cross_norm = nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, ffn), nn.Linear(ffn, dim)
        self.mlp_norm = nn.LayerNorm(dim)
        self.dropout, self.pre_norm = dropout, pre_norm

    def _around(self, norm: nn.Module, x: Tensor, part: Any) -> Tensor:
        y = F.dropout(part(norm(x) if self.pre_norm else x), self.dropout, self.training)
        return x + y if self.pre_norm else norm(x + y)

    def forward(
        self, x: Tensor, valid: Tensor, context: Tensor | None = None, context_valid: Tensor | None = None
    ) -> Tensor:
        x = self._around(self.norm, x, lambda x: self.attn(x, valid=valid))
        if context is not None:
            x = self._around(
                self.cross_norm, x, lambda x: self.cross(x, context, valid=valid, context_valid=context_valid)
            )
        return self._around(self.mlp_norm, x, lambda x: self.fc2(self.fc1(x).relu()))


class TranslationModel(nn.Module):
    """A translation model with the choices of :func:`attnlib.convert.architecture.translation_space`.

    Every decoder layer reads the last one, two or three layers of the encoder, one behind the other. Encoder, decoder
    and output share one embedding, of which a narrower side reads the first channels. Position ``n`` counts tokens
    that exist; a token is ``sqrt(dim)`` times its embedding plus sines and cosines of its position.

    With all kinds ``"softmax-attention"`` and equal widths it is the transformer of Vaswani et al., 2017. Positions of
    cosFormer in cross attention run on from one layer of the encoder to the next.

    Args:
        gene: ``encoder_dim``, ``decoder_dim``, ``decoder_layers`` and, of layer ``i``, ``encoder<i>_ffn``, ``_heads``,
            ``_kind``; ``decoder<i>_ffn``, ``_reads``, ``_self_heads``, ``_self_kind``, ``_cross_heads``,
            ``_cross_kind``. Further decoder layers are not built.
        vocab_size: of both languages together.
        inner_dim: width of queries, keys and values of all heads together.
        position_dim: channels of the position's sines and cosines, of which a narrower side reads the first; the wider
            side's by default.
        max_length: tokens of the longest sequence.
        padding_idx: the token that stands for none.
        dropout: of embeddings and of every residual.
        pre_norm: norms before attention and MLP, and one at the end of either side.

    Reference: Liu et al., 2022, arXiv 2207.13955; Wang et al., 2020, arXiv 2005.14187.

    >>> gene = dict(encoder_dim=16, decoder_dim=8, decoder_layers=1, encoder0_ffn=32, encoder0_heads=2)
    >>> gene |= dict(encoder0_kind="cosformer", decoder0_ffn=16, decoder0_reads=1, decoder0_self_heads=4)
    >>> gene |= dict(decoder0_self_kind="softmax-attention", decoder0_cross_heads=2, decoder0_cross_kind="cosformer")
    >>> model = TranslationModel(gene, vocab_size=11, inner_dim=16)
    >>> model(torch.tensor([[3, 4, 5]]), torch.tensor([[2, 3]])).shape
    torch.Size([1, 2, 11])
    """

    def __init__(
        self,
        gene: Mapping[str, Any],
        vocab_size: int,
        inner_dim: int = 512,
        position_dim: int | None = None,
        max_length: int = 1024,
        padding_idx: int = 1,
        dropout: float = 0.0,
        pre_norm: bool = False,
    ):
        super().__init__()
        check_int("vocab_size", vocab_size, least=2)
        check_int("padding_idx", padding_idx, least=0, most=vocab_size - 1)
        check_int("inner_dim", inner_dim, least=1)
        self.max_length = check_int("max_length", max_length, least=1)
        self.dropout = check_real("dropout", dropout, least=0, below=1)

        def chosen(name: str) -> Any:
            if name not in gene:
                raise ValueError(f"gene must choose {name!r}; it chooses {sorted(gene)}")
            return gene[name]

        self.encoder_dim, self.decoder_dim = chosen("encoder_dim"), chosen("decoder_dim")
        wide = max(self.encoder_dim, self.decoder_dim)
        self.position_dim = wide if position_dim is None else check_int("position_dim", position_dim, least=wide)
        self.padding_idx = padding_idx
        self.embed = nn.Embedding(vocab_size, wide, padding_idx)
        depth = len([name for name in gene if re.fullmatch(r"encoder\d+_kind", name)])
        common = (max_length, 3 * max_length, dropout, pre_norm)
        self.encoder = nn.ModuleList()
        for i in range(depth):
            own = (chosen(f"encoder{i}_heads"), chosen(f"encoder{i}_kind"))
            self.encoder.append(_Layer(self.encoder_dim, inner_dim, chosen(f"encoder{i}_ffn"), own, None, *common))
        self.decoder, self.reads = nn.ModuleList(), []
        for i in range(check_int("decoder_layers", chosen("decoder_layers"), least=1)):
            own = (chosen(f"decoder{i}_self_heads"), chosen(f"decoder{i}_self_kind"))
            cross = (chosen(f"decoder{i}_cross_heads"), chosen(f"decoder{i}_cross_kind"), self.encoder_dim)
            self.decoder.append(_Layer(self.decoder_dim, inner_dim, chosen(f"decoder{i}_ffn"), own, cross, *common))
            self.reads.append(check_int(f"decoder{i}_reads", chosen(f"decoder{i}_reads"), least=1, most=3))
        if max(self.reads) > depth:
            raise ValueError(f"a decoder layer reads {max(self.reads)} layers of an encoder that has {depth}")
        self.encoder_norm = nn.LayerNorm(self.encoder_dim) if pre_norm else None
        self.decoder_norm = nn.LayerNorm(self.decoder_dim) if pre_norm else None
        self._start()

    def _start(self) -> None:
        """Xavier's uniform weights, queries, keys and values as one matrix, as released."""
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)
        for name, part in self.named_modules():
            if name.endswith((".q", ".k", ".v")) and isinstance(part, nn.Linear):
                bound = math.sqrt(6 / (part.in_features + 3 * part.out_features))
                nn.init.uniform_(part.weight, -bound, bound)
        nn.init.normal_(self.embed.weight, std=self.embed.embedding_dim**-0.5)
        with torch.no_grad():
            self.embed.weight[self.padding_idx] = 0

    def _tokens(self, name: str, tokens: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """(B, N, dim) and (B, N) which exist."""
        check_whole(name, tokens)
        check_rank(name, tokens, 2, "(B, N)")
        if tokens.shape[1] > self.max_length:
            raise ValueError(f"{name} has {tokens.shape[1]} tokens, more than max_length={self.max_length}")
        valid = tokens != self.padding_idx
        weight = self.embed.weight[:, :dim]
        half = self.position_dim // 2
        at = (valid.cumsum(1) + self.padding_idx).to(weight.dtype)
        rates = torch.exp(torch.arange(half, device=at.device) * (-math.log(10000) / max(half - 1, 1)))
        angles = at.unsqueeze(-1) * rates.to(weight.dtype)
        sines = F.pad(torch.cat([angles.sin(), angles.cos()], -1), [0, self.position_dim % 2])[..., :dim]
        x = math.sqrt(dim) * F.embedding(tokens, weight) + sines * valid.unsqueeze(-1)
        return F.dropout(x, self.dropout, self.training), valid

    def encode(self, source: Tensor) -> tuple[list[Tensor], Tensor]:
        """What every layer of the encoder gives (B, N, encoder_dim), the last first, and which tokens exist (B, N)."""
        x, valid = self._tokens("source", source, self.encoder_dim)
        seen = []
        for layer in self.encoder:
            x = layer(x, valid)
            seen.append(x)
        last = x if self.encoder_norm is None else self.encoder_norm(x)
        return [last, *seen[-2::-1]], valid

    def decode(self, target: Tensor, encoded: tuple[list[Tensor], Tensor]) -> Tensor:
        """(B, T, vocab_size) logits of what follows each token of ``target`` (B, T)."""
        x, valid = self._tokens("target", target, self.decoder_dim)
        seen, there = encoded
        for layer, reads in zip(self.decoder, self.reads, strict=True):
            x = layer(x, valid, torch.cat(seen[:reads], 1), there.repeat(1, reads))
        if self.decoder_norm is not None:
            x = self.decoder_norm(x)
        return F.linear(x, self.embed.weight[:, : self.decoder_dim])

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """(B, T, vocab_size) logits.

        Args:
            source: (B, N) tokens, ``padding_idx`` where there is none.
            target: (B, T) tokens so far, from the one that begins every translation on.
        """
        return self.decode(target, self.encode(source))

    @torch.no_grad()
    def translate(self, source: Tensor, begin: int, end: int, most: int = 64) -> Tensor:
        """(B, <= most) the likeliest next token again and again, ``padding_idx`` after ``end``.

        Args:
            source: (B, N) tokens.
            begin: the token before the first.
            end: the token after the last.
            most: tokens.
        """
        check_int("most", most, least=1, most=self.max_length)
        encoded = self.encode(source)
        target = source.new_full((len(source), 1), begin)
        done = torch.zeros(len(source), dtype=torch.bool, device=source.device)
        for _ in range(most):
            token = self.decode(target, encoded)[:, -1].argmax(-1).masked_fill(done, self.padding_idx)
            target = torch.cat([target, token[:, None]], 1)
            done |= token == end
            if bool(done.all()):
                break
        return target[:, 1:]

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From ``TransformerSuperModel`` of hardware-aware transformers with all embeddings shared."""
        theirs = Released(state_dict, "TransformerSuperModel")
        theirs.leave(r"(encoder|decoder)\.(version|embed_positions\._float_tensor)", because="not weights")
        theirs.leave(r"decoder\.embed_tokens\.weight", because="the encoder's")

        def joint(match: Any, t: Tensor) -> dict[str, Tensor]:
            side, i, part, what = match.groups()
            to = f"{side}.{i}.{'cross' if part == 'encoder' else 'attn'}"
            return {f"{to}.{n}.{what}": w for n, w in zip("qkv", t.chunk(3), strict=True)}

        layer = r"(encoder|decoder)\.layers\.(\d+)"
        rules: dict[str, Rule] = {
            r"encoder\.embed_tokens\.weight": "embed.weight",
            layer + r"\.(self|encoder)_attn\.in_proj_(weight|bias)": joint,
            layer + r"\.encoder_attn\.([qkv])_proj_weight": r"\1.\2.cross.\3.weight",
            layer + r"\.self_attn\.out_proj\.(weight|bias)": r"\1.\2.attn.proj.\3",
            layer + r"\.encoder_attn\.out_proj\.(weight|bias)": r"\1.\2.cross.proj.\3",
            layer + r"\.self_attn_layer_norm\.(weight|bias)": r"\1.\2.norm.\3",
            layer + r"\.encoder_attn_layer_norm\.(weight|bias)": r"\1.\2.cross_norm.\3",
            layer + r"\.final_layer_norm\.(weight|bias)": r"\1.\2.mlp_norm.\3",
            layer + r"\.(fc[12])\.(weight|bias)": r"\1.\2.\3.\4",
            r"(encoder|decoder)\.layer_norm\.(weight|bias)": r"\1_norm.\2",
        }
        return theirs.close(theirs.renamed(rules))


__all__ = ["TranslationModel"]
