"""Dualformer: one encoder-decoder that answers fast, slowly or as it likes (Su et al., 2024, arXiv 2410.09918).

The encoder reads a problem, the decoder writes a trace of search and then a plan. Training thins traces out at random
(:mod:`attnlib.bench.data.mazes`), up to none at all, so that the first word decides: after ``plan`` comes the plan
alone (fast), after ``create`` a trace before it (slow); left alone, the model chooses (auto).

``h = x + SA(RMS(x))``, ``h = h + CA(RMS(h), enc)`` (decoder), ``y = h + W_2 (silu(W_1 RMS(h)) * W_3 RMS(h))``

without biases; self-attention has rotary positions on neighbouring channels, cross-attention has none, and the encoder
ends in a norm and a linear map to the decoder's width.

Ours differs from the released code: padding of a prompt is not read by the encoder either, so that it changes nothing;
``compat="authors"`` lets the encoder read it as theirs does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_axes, check_choice, check_int, check_real, check_valid, check_whole, check_within, checked
from ..nn.dense.softmax_attention import SoftmaxAttention
from ..nn.released import Released
from ..types import State
from .illama import SwiGLU

#: Size -> width, layers, heads, of encoder and decoder alike.
SIZES = {"s": (192, 6, 3), "m-s": (384, 8, 4), "l": (768, 9, 4), "xl-2": (1152, 16, 12)}

#: Mode -> the words that a response is made to start with.
MODES: dict[str, tuple[str, ...]] = {"auto": (), "slow": ("create",), "fast": ("plan",)}


class Words:
    """Numbers of words: ``bos``, ``eos``, then the others in order of the alphabet.

    >>> words = Words(["plan", "create", "0"])
    >>> words.encode(["bos", "plan", "0", "eos"]), words.prefix("fast")
    ([0, 4, 2, 1], [4])
    """

    bos, eos = 0, 1

    def __init__(self, words: Sequence[str]):
        if {"bos", "eos"} & set(words):
            raise ValueError("words must not hold 'bos' and 'eos', which are there already")
        self.words = ("bos", "eos", *sorted(set(words)))
        self._number = {word: i for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, words: Sequence[str]) -> list[int]:
        """Words to numbers."""
        if unknown := sorted({w for w in words if w not in self._number}):
            raise ValueError(f"words has {unknown[:5]}, which this vocabulary of {len(self)} does not")
        return [self._number[word] for word in words]

    def decode(self, numbers: Sequence[int]) -> list[str]:
        """Numbers to words."""
        return [self.words[i] for i in numbers]

    def prefix(self, mode: str) -> list[int]:
        """Numbers of the words that a response of this mode starts with."""
        check_choice("mode", mode, MODES)
        return self.encode(MODES[mode])


class _Layer(nn.Module):
    """Self-attention, cross-attention in a decoder, SwiGLU; a norm before each."""

    def __init__(self, dim: int, num_heads: int, multiple_of: int, causal: bool):
        super().__init__()
        plain: dict[str, Any] = dict(qkv_bias=False, proj_bias=False)
        self.norm1 = nn.RMSNorm(dim, eps=1e-5)
        self.attention = SoftmaxAttention(
            dim, num_heads, causal=causal, rotary=10000.0, rotary_interleaved=True, **plain
        )
        self.cross_norm = nn.RMSNorm(dim, eps=1e-5) if causal else None
        self.cross = SoftmaxAttention(dim, num_heads, **plain) if causal else None
        self.norm2 = nn.RMSNorm(dim, eps=1e-5)
        self.mlp = SwiGLU(dim, 4.0, multiple_of)

    def forward(
        self, x: Tensor, valid: Tensor | None = None, features: Tensor | None = None,
        features_valid: Tensor | None = None, state: State | None = None, keep: bool = False,
    ) -> tuple[Tensor, State | None]:  # fmt: skip
        y = self.attention(self.norm1(x), valid=valid, state=state, returns=("state",) if keep else ())
        y, state = (y.y, y.state) if keep else (y, None)
        x = x + y
        if self.cross is not None:
            assert self.cross_norm is not None
            x = x + self.cross(self.cross_norm(x), features, context_valid=features_valid)
        return x + self.mlp(self.norm2(x)), state


class Dualformer(nn.Module):
    """Encoder and decoder with embeddings of their own.

    Args:
        vocab_size: words.
        dim, depth, num_heads: of the encoder and of the decoder.
        multiple_of: what the hidden width of the SwiGLU, 8/3 of ``dim``, is rounded up to.
        compat: ``"authors"``: the encoder reads padding, as in the released code.

    >>> model = Dualformer(20, dim=16, depth=1, num_heads=2, multiple_of=8)
    >>> model(torch.randint(20, (2, 7)), torch.randint(20, (2, 5))).shape
    torch.Size([2, 5, 20])
    """

    @checked
    def __init__(
        self, vocab_size: int, dim: int = 192, depth: int = 6, num_heads: int = 3, multiple_of: int = 256,
        compat: str | None = None,
    ):  # fmt: skip
        super().__init__()
        sizes = (("vocab_size", vocab_size), ("dim", dim), ("depth", depth), ("multiple_of", multiple_of))
        for name, value in sizes:
            check_int(name, value, least=1)
        check_choice("compat", compat, (None, "authors"))
        self.vocab_size, self.compat = vocab_size, compat
        self.encoder_embed, self.decoder_embed = nn.Embedding(vocab_size, dim), nn.Embedding(vocab_size, dim)
        self.encoder = nn.ModuleList(_Layer(dim, num_heads, multiple_of, False) for _ in range(depth))
        self.decoder = nn.ModuleList(_Layer(dim, num_heads, multiple_of, True) for _ in range(depth))
        self.encoder_norm, self.decoder_norm = nn.RMSNorm(dim, eps=1e-5), nn.RMSNorm(dim, eps=1e-5)
        self.encoder_out = nn.Linear(dim, dim, bias=False)
        self.head = nn.Linear(dim, vocab_size, bias=False)

    def encode(self, prompt: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, P) words to (B, P, dim); ``valid`` (B, P) says which exist."""
        check_axes("prompt", prompt, B=None, P=None)
        check_whole("prompt", prompt)
        check_within("prompt", prompt, self.vocab_size, "vocab_size")
        check_valid("valid", valid, prompt.shape)
        x = self.encoder_embed(prompt)
        for layer in self.encoder:
            x, _ = layer(x, None if self.compat == "authors" else valid)
        return self.encoder_out(self.encoder_norm(x))

    def decode(
        self, response: Tensor, features: Tensor, valid: Tensor | None = None,
        states: Sequence[State | None] | None = None, keep: bool = False,
    ) -> tuple[Tensor, list[State | None]]:  # fmt: skip
        """Logits (B, R, vocab_size) of the words that follow those of ``response`` (B, R), and the layers' states.

        Args:
            response: words, behind those that ``states`` remember.
            features: (B, P, dim) of :meth:`encode`.
            valid: (B, P) boolean, which words of the prompt exist.
            states: of the last call.
            keep: whether the next states are asked for.
        """
        x, new = self.decoder_embed(response), []
        for i, layer in enumerate(self.decoder):
            x, state = layer(x, None, features, valid, None if states is None else states[i], keep)
            new.append(state)
        return self.head(self.decoder_norm(x)), new

    def forward(self, prompt: Tensor, response: Tensor, prompt_valid: Tensor | None = None) -> Tensor:
        """Logits (B, R, vocab_size) of the words after each of ``response`` (B, R); padding stands behind."""
        check_axes("response", response, B=len(prompt), R=None)
        check_whole("response", response)
        check_within("response", response, self.vocab_size, "vocab_size")
        return self.decode(response, self.encode(prompt, prompt_valid), prompt_valid)[0]

    def loss(
        self, prompt: Tensor, response: Tensor, prompt_valid: Tensor | None = None,
        response_valid: Tensor | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """``{"words": ...}``: cross-entropy of all words behind the first, a mean per response and then over these.

        A word of a short response so weighs more than one of a long response, as released.
        """
        check_valid("response_valid", response_valid, response.shape)
        logits = self(prompt, response[:, :-1], prompt_valid)
        every = F.cross_entropy(logits.transpose(1, 2), response[:, 1:], reduction="none")
        if response_valid is None:
            return {"words": every.mean()}
        counted = response_valid[:, 1:]
        return {"words": ((every * counted).sum(1) / counted.sum(1).clamp(min=1)).mean()}

    @torch.no_grad()
    def generate(
        self, prompt: Tensor, prefix: Sequence[int] = (), prompt_valid: Tensor | None = None, max_len: int = 1000,
        temperature: float = 0.0, generator: torch.Generator | None = None, bos: int = Words.bos, eos: int = Words.eos,
    ) -> list[list[int]]:  # fmt: skip
        """Responses, without ``bos`` and up to ``eos``.

        Args:
            prompt: (B, P) words.
            prefix: words that every response starts with: :meth:`Words.prefix` of a mode.
            prompt_valid: (B, P) boolean.
            max_len: words of a response, at most, the prefix and ``eos`` included.
            temperature: of sampling; 0 takes the likeliest word.
            generator: of samples.
            bos, eos: numbers of these words.

        Raises:
            ValueError: a prefix longer than ``max_len``.
        """
        check_real("temperature", temperature, least=0)
        check_int("max_len", max_len, least=1)
        if len(prefix) > max_len:
            raise ValueError(f"prefix has {len(prefix)} words; max_len={max_len} are possible")
        features = self.encode(prompt, prompt_valid)
        given = torch.tensor([bos, *prefix], device=prompt.device).expand(len(prompt), -1)
        check_within("prefix", given, self.vocab_size, "vocab_size")
        logits, states = self.decode(given, features, prompt_valid, None, True)
        written = [given[:, 1:]]
        ended = (given[:, 1:] == eos).any(1)
        for _ in range(max_len - len(prefix)):
            if bool(ended.all()):
                break
            last = logits[:, -1]
            if temperature:
                word = torch.multinomial((last / temperature).softmax(-1), 1, generator=generator)
            else:
                word = last.argmax(-1, keepdim=True)
            written.append(word)
            ended = ended | (word[:, 0] == eos)
            logits, states = self.decode(word, features, prompt_valid, states, True)
        rows = torch.cat(written, 1).tolist()
        return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def dualformer(size: str, vocab_size: int, **settings: Any) -> Dualformer:
    """A model of one of :data:`SIZES`."""
    check_choice("size", size, SIZES)
    dim, depth, num_heads = SIZES[size]
    return Dualformer(vocab_size, **{"dim": dim, "depth": depth, "num_heads": num_heads, **settings})


def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """From facebookresearch/dualformer's ``EncoderDecoder`` with encoder and decoder of one size."""
    theirs = Released(state_dict, "Dualformer's EncoderDecoder")
    layer = r"(encoder|decoder)\.layers\.(\d+)\."
    letters = {"q": "q", "k": "k", "v": "v", "o": "proj"}
    out = theirs.renamed(
        {
            r"(encoder|decoder)\.embedding\.weight": r"\1_embed.weight",
            r"(encoder|decoder)\.output\.0\.weight": r"\1_norm.weight",
            r"encoder\.output\.1\.weight": r"encoder_out.weight",
            r"decoder\.output\.1\.weight": r"head.weight",
            layer + r"attention\.w([qkvo])\.weight": lambda m, t: {
                f"{m[1]}.{m[2]}.attention.{letters[m[3]]}.weight": t
            },
            layer + r"attention_feat\.w([qkvo])\.weight": lambda m, t: {
                f"{m[1]}.{m[2]}.cross.{letters[m[3]]}.weight": t
            },
            layer + r"feed_forward\.w(\d)\.weight": r"\1.\2.mlp.fc\3.weight",
            layer + r"attention_norm\.weight": r"\1.\2.norm1.weight",
            layer + r"attention_feat_norm\.weight": r"\1.\2.cross_norm.weight",
            layer + r"ffn_norm\.weight": r"\1.\2.norm2.weight",
        }
    )
    theirs.leave(r".*rope\.(cos|sin)_param", because="rotary angles are computed")
    return theirs.close(out)
