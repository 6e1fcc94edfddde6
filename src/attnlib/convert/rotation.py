"""Rotating the residual stream of a language model, so that no channel stands out (QuaRot; Ashkboos et al., 2024).

RMS norms do not see a rotation, so one can be folded into the weights on both sides of the stream: their gains go into
the maps that follow, every map that reads turns what it reads back, every map that writes turns what it writes. Heads
get one of their own between values and output. The model computes the same, in the same classes: it is saved and loaded
as before. Rotations that would have to act between maps while the model runs are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_int, check_type

KINDS = ("hadamard", "random")


def _prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _paley(n: int) -> Tensor | None:
    """By quadratic residues of a prime: n = q + 1 with q = 3 mod 4, or n = 2 (q + 1) with q = 1 mod 4."""
    for q, kind in ((n - 1, 3), (n // 2 - 1, 1)):
        if n % 4 or not _prime(q) or q % 4 != kind:
            continue
        squares = {i * i % q for i in range(1, q)}
        at = torch.arange(q)
        character = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)], dtype=torch.float64)
        core = torch.zeros(q + 1, q + 1, dtype=torch.float64)
        core[0, 1:], core[1:, 0] = 1, 1 if kind == 1 else -1
        core[1:, 1:] = character[(at[:, None] - at) % q]
        eye = torch.eye(q + 1, dtype=torch.float64)
        if kind == 3:
            return core + eye
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(core, plus) + torch.kron(eye, minus)
    return None


def hadamard(n: int) -> Tensor | None:
    """(n, n) float64 of ``+-1 / sqrt(n)`` with orthogonal rows, or ``None`` where none is known here.

    Powers of two by Sylvester, and these times a size that quadratic residues of a prime give (12, 20, 28, 36, ...).

    >>> hadamard(2) * 2**0.5
    tensor([[ 1.,  1.],
            [ 1., -1.]], dtype=torch.float64)
    >>> hadamard(6) is None
    True
    """
    check_int("n", n, least=1)
    core, rest = torch.ones(1, 1, dtype=torch.float64), n
    while rest > 1:
        if rest % 2:
            return None
        made = _paley(rest) if rest & (rest - 1) else None
        if made is not None:
            core, rest = torch.kron(core, made), 1
        else:
            core = torch.kron(core, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
            rest //= 2
    return core / n**0.5


def orthogonal(n: int, kind: str = "hadamard", seed: int = 0) -> tuple[Tensor, str]:
    """A random rotation (n, n) in float64, and which kind it became.

    Args:
        n: size.
        kind: ``"hadamard"``: one of these with random signs of its rows; where none is known, ``"random"``: uniform
            among the orthogonal ones.
        seed: of the draws.
    """
    check_choice("kind", kind, KINDS)
    generator = torch.Generator().manual_seed(seed)
    if kind == "hadamard" and (fixed := hadamard(n)) is not None:
        signs = torch.randint(2, (n, 1), generator=generator) * 2 - 1
        return signs * fixed, "hadamard"
    q, r = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    return q * r.diagonal().sign(), "random"


@dataclass(frozen=True)
class Rotation:
    """What :func:`rotate` turned.

    Args:
        stream: kind of the rotation of the residual stream.
        heads: kind of that of values, the same for all heads.
        untied: whether embedding and unembedding, which were one, are two now.
    """

    stream: str
    heads: str
    untied: bool


_MAPS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
_NORMS = ("input_layernorm", "post_attention_layernorm")


def llama_layers(model: Any) -> list[Any]:
    """The layers of a language model of transformers that is built as Llama is.

    Raises:
        ValueError: it is not, and what is other.
    """
    check_type("model", model, nn.Module)
    layers = getattr(getattr(model, "model", None), "layers", None)
    if layers is None or not len(layers) or not hasattr(model, "lm_head"):
        raise ValueError(
            f"model must be a causal language model with model.layers and lm_head, as Llama has, got "
            f"{type(model).__name__}"
        )
    for i, layer in enumerate(layers):
        for name in _MAPS:
            try:
                found = layer.get_submodule(name)
            except AttributeError:
                raise ValueError(f"layer {i} of {type(model).__name__} has no {name}") from None
            if type(found) is not nn.Linear:
                raise ValueError(f"{name} of layer {i} must be a plain nn.Linear, got {type(found).__name__}")
        if extra := sorted({name for name, _ in layer.named_children()} - {"self_attn", "mlp", *_NORMS}):
            raise ValueError(f"layer {i} of {type(model).__name__} has {extra}, which Llama's has not")
        if missing := sorted(set(_NORMS) - {name for name, _ in layer.named_children()}):
            raise ValueError(f"layer {i} of {type(model).__name__} has no {missing}")
    return list(layers)


def _gain(norm: Any, name: str) -> Tensor:
    """The gain of an RMS norm, which is ``gain * x / rms(x)``."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-6)) or 0.0
    weight = norm.weight
    x = torch.linspace(-1, 2, len(weight)).to(weight)[None]
    expected = weight.double() * x.double() * torch.rsqrt(x.double().square().mean() + eps)
    got = norm(x).double()
    if got.shape != expected.shape or float((got - expected).abs().max()) > 2e-2 * float(expected.abs().max() + 1e-6):
        raise ValueError(f"{name} ({type(norm).__name__}) is not gain * x / rms(x), so that no rotation passes it")
    return weight.detach().double()


@torch.no_grad()
def rotate(model: Any, kind: str = "hadamard", seed: int = 0) -> Rotation:
    """Turn the residual stream and the values of a Llama-shaped model of transformers, in place; it computes the same.

    Args:
        model: with ``model.layers`` of the usual names and ``lm_head``; on any device, in any floating type. Products
            are taken in float64.
        kind: see :func:`orthogonal`; the result says what it became where no Hadamard matrix of a size is known.
        seed: of both rotations.

    Raises:
        ValueError: another architecture, a norm that is none of root mean squares.
    """
    layers = llama_layers(model)
    check_choice("kind", kind, KINDS)
    first = layers[0].self_attn
    head_dim = first.head_dim
    turn, stream = orthogonal(first.q_proj.in_features, kind, seed)
    small, heads = orthogonal(head_dim, kind, seed + 1)
    embedding, head, final = model.get_input_embeddings(), model.lm_head, model.model.norm
    gains = [[_gain(getattr(layer, name), f"{name} of layer {i}") for name in _NORMS] for i, layer in enumerate(layers)]
    last = _gain(final, "model.norm")
    untied = head.weight is embedding.weight
    if untied:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
        model.config.tie_word_embeddings = False

    def put(weight: Tensor, value: Tensor) -> None:
        weight.copy_(value.to(weight))

    def reads(linear: nn.Linear, gain: Tensor) -> None:
        put(linear.weight, (linear.weight.double() * gain) @ turn.to(linear.weight.device))

    def writes(linear: nn.Linear) -> None:
        back = turn.to(linear.weight.device)
        put(linear.weight, back.T @ linear.weight.double())
        if linear.bias is not None:
            put(linear.bias, linear.bias.double() @ back)

    put(embedding.weight, embedding.weight.double() @ turn.to(embedding.weight.device))
    for layer, (before, between) in zip(layers, gains, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            reads(linear, before)
        for linear in (mlp.gate_proj, mlp.up_proj):
            reads(linear, between)
        v, o, within = attention.v_proj, attention.o_proj, small.to(attention.v_proj.weight.device)
        put(v.weight, torch.einsum("hdc,de->hec", v.weight.double().unflatten(0, (-1, head_dim)), within).flatten(0, 1))
        if v.bias is not None:
            put(v.bias, (v.bias.double().unflatten(0, (-1, head_dim)) @ within).flatten())
        put(o.weight, (o.weight.double().unflatten(1, (-1, head_dim)) @ within).flatten(1))
        writes(o)
        writes(mlp.down_proj)
        for name in _NORMS:
            getattr(layer, name).weight.fill_(1)
    reads(head, last)
    final.weight.fill_(1)
    return Rotation(stream, heads, untied)


__all__ = ["KINDS", "Rotation", "hadamard", "llama_layers", "orthogonal", "rotate"]
