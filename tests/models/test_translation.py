"""Translation models with a kind of attention per layer: hardware-aware transformers from a recording, and mixtures."""

import functools
import json
import random

import pytest
import torch
from parity import HERE, synthetic
from safetensors import safe_open
from torch import nn

from attnlib.convert.architecture import KINDS, SharedWeights, Space, evolve, network_cost, translation_space
from attnlib.models.translation import TranslationModel

SOFTMAX, LINEAR = KINDS


@pytest.fixture(scope="module")
def recorded():
    with safe_open(HERE / "translation.safetensors", "pt") as f:
        held = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        return held, {k: json.loads(v) for k, v in f.metadata().items() if k in ("shapes", "genes", "source", "target")}


def space(layers=3, kinds=(SOFTMAX,)):
    """That of the recording."""
    out = {"encoder_dim": (24, 16), "decoder_dim": (24, 16), "decoder_layers": tuple(range(1, layers + 1))}
    for i in range(layers):
        out |= {f"encoder{i}_ffn": (20, 12), f"encoder{i}_heads": (4, 2), f"encoder{i}_kind": kinds}
        out |= {f"decoder{i}_ffn": (20, 8), f"decoder{i}_reads": (1, 2, 3)[:layers]}
        for part in ("self", "cross"):
            out |= {f"decoder{i}_{part}_heads": (4, 2), f"decoder{i}_{part}_kind": kinds}
    return Space(out)


def build(gene, **settings):
    return TranslationModel(gene, **{**dict(vocab_size=13, inner_dim=16, position_dim=24, max_length=16), **settings})


@pytest.mark.parametrize("case", ["largest", "mixed", "narrow", "pre-norm"])
def test_equals_the_authors_with_shared_weights(recorded, case):
    held, meta = recorded
    source, target, gene = torch.tensor(meta["source"]), torch.tensor(meta["target"]), meta["genes"][case]
    shared = SharedWeights(space(), functools.partial(build, pre_norm=case == "pre-norm"))
    convert = TranslationModel.convert_state_dict
    shared.largest.load_state_dict(convert(synthetic(meta["shapes"][case])))
    shared = shared.double()
    y = shared(gene, source, target)
    theirs = held[f"{case}/y"]
    assert y.shape == theirs.shape
    assert float((y.detach() - theirs).abs().max()) < 1e-5 * float(theirs.abs().max())
    torch.testing.assert_close(shared.inherit(gene).double()(source, target), y)
    (y * held[f"{case}/g"]).sum().backward()
    known = {k.removeprefix(f"{case}/dw/"): v for k, v in held.items() if k.startswith(f"{case}/dw/")}
    unknown = {k: torch.full(s, torch.nan) for k, s in meta["shapes"][case].items()}
    grads, compared = convert({**unknown, **known}), 0
    largest = max(float(v.abs().max()) for v in known.values())
    for name, p in shared.largest.named_parameters():
        if not grads[name].isnan().any():
            compared += 1
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            assert float((grad - grads[name]).abs().max()) < 1e-5 * max(float(grads[name].abs().max()), 3e-2 * largest)
    assert compared >= len(known) > 10


def test_the_released_size_and_the_counted_cost():
    """The widest network of the released space; costs are counted on what is built."""
    many = translation_space(2)
    gene = {n: max(m) if isinstance(m[0], int) else SOFTMAX for n, m in many.choices.items()} | {"decoder_layers": 2}
    gene |= {"decoder0_reads": 1, "decoder1_reads": 1}
    attention, ffn, norm = 4 * 640 * 512 + 3 * 512 + 640, 2 * 640 * 3072 + 3072 + 640, 2 * 640
    blocks = 2 * (attention + ffn + 2 * norm) + 2 * (2 * attention + ffn + 3 * norm)
    linear = {n: LINEAR if n.endswith("kind") else v for n, v in gene.items()}

    def cost(gene, n):
        return network_cost(lambda: TranslationModel(gene, 64, max_length=n), (1, n), (1, n))

    short, long = ([cost(g, n) for g in (gene, linear)] for n in (16, 4096))
    assert {c["params"] for c in (*short, *long)} == {64 * 640 + blocks}
    assert short[1]["flops"] > short[0]["flops"] and long[1]["flops"] < 0.7 * long[0]["flops"]


def test_all_softmax_is_the_transformer_of_torch():
    gene = {n: m[0] for n, m in space(1).choices.items()}
    torch.manual_seed(0)
    model = build(gene, inner_dim=24)
    enc, dec = model.encoder[0], model.decoder[0]
    theirs = nn.Transformer(24, 4, 1, 1, 20, 0.0, batch_first=True)
    theirs.encoder.norm = theirs.decoder.norm = None

    def fill(attention, ours):
        weights = [getattr(ours, n) for n in "qkv"]
        attention.in_proj_weight.data = torch.cat([w.weight for w in weights])
        attention.in_proj_bias.data = torch.cat([w.bias for w in weights])
        attention.out_proj.load_state_dict(ours.proj.state_dict())

    for layer, ours, norms in (
        (theirs.encoder.layers[0], enc, ("norm", "mlp_norm")),
        (theirs.decoder.layers[0], dec, ("norm", "cross_norm", "mlp_norm")),
    ):
        fill(layer.self_attn, ours.attn)
        if ours is dec:
            fill(layer.multihead_attn, ours.cross)
        layer.linear1.load_state_dict(ours.fc1.state_dict())
        layer.linear2.load_state_dict(ours.fc2.state_dict())
        for i, name in enumerate(norms, 1):
            getattr(layer, f"norm{i}").load_state_dict(getattr(ours, name).state_dict())
    source, target = torch.randint(2, 13, (2, 6)), torch.randint(2, 13, (2, 5))
    a, b = (model._tokens("t", t, 24)[0] for t in (source, target))
    y = theirs(a, b, tgt_mask=nn.Transformer.generate_square_subsequent_mask(5))
    torch.testing.assert_close(model(source, target), y @ model.embed.weight.T, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_any_mixture_reads_no_later_token_and_no_token_that_is_not_there(seed):
    many = space(3, KINDS)
    gene = many.sample(random.Random(seed))
    if seed == 0:
        gene |= {n: LINEAR for n in gene if n.endswith("kind")}
    torch.manual_seed(seed)
    model = build(gene).double()
    source, target = torch.randint(2, 13, (2, 7)), torch.randint(2, 13, (2, 6))
    y = model(source, target)
    later = target.clone()
    later[:, 4:] = 3
    torch.testing.assert_close(model(source, later)[:, :4], y[:, :4])
    padded = torch.cat([source, torch.ones(2, 2, dtype=torch.long)], 1)
    right = torch.cat([target, torch.ones(2, 2, dtype=torch.long)], 1)
    torch.testing.assert_close(model(padded, right)[:, :6], y)
    left = torch.cat([torch.ones(2, 2, dtype=torch.long), target], 1)
    torch.testing.assert_close(model(source, left)[:, 2:], y)
    assert not torch.allclose(model(source.roll(1, 1), target), y)


def test_shared_weights_learn_to_reverse_and_a_search_finds_a_plan_within_the_bound():
    torch.manual_seed(0)
    rng, many = random.Random(0), space(1, KINDS)
    fixed = {n: m[:1] for n, m in many.choices.items() if not n.endswith(("kind", "encoder0_ffn"))}
    many = Space({**many.choices, **fixed})
    shared = SharedWeights(many, functools.partial(build, inner_dim=24, max_length=8))
    optimizer = torch.optim.Adam(shared.parameters(), 1e-2)

    def pairs(count):
        source = torch.randint(4, 13, (count, 4))
        out = torch.cat([source.flip(1), torch.full((count, 1), 2)], 1)
        return source, torch.cat([torch.full((count, 1), 3), out[:, :-1]], 1), out

    def loss(gene, batch):
        return nn.functional.cross_entropy(shared(gene, *batch[:2]).flatten(0, 1), batch[2].flatten())

    held = pairs(64)
    genes = [many.sample(rng) for _ in range(4)]
    before = [float(loss(g, held).detach()) for g in genes]
    for _ in range(60):
        optimizer.zero_grad()
        loss(many.sample(rng), pairs(32)).backward()
        optimizer.step()
    after = [float(loss(g, held).detach()) for g in genes]
    assert all(b < 0.75 * a for a, b in zip(before, after, strict=True))

    @functools.cache
    def counted(key):
        gene = dict(key)
        return network_cost(lambda: build(gene, inner_dim=24), (1, 8), (1, 8))["flops"]

    def cost(gene):
        return counted(tuple(gene.items()))

    bound = sorted(cost(g) for g in genes)[1]
    with torch.no_grad():
        found = evolve(many, lambda g: float(loss(g, held)), cost, bound, rounds=2, population=6, parents=2, mutants=2)
    assert cost(found.gene) <= bound and found.score == min(s for _, s in found.seen)
    alone = shared.inherit(found.gene).eval()
    said = alone.translate(held[0][:3], begin=3, end=2, most=5)
    assert said.shape[1] <= 5 and bool((said >= 0).all())
    first = alone(held[0][:3], torch.full((3, 1), 3))[:, -1].argmax(-1)
    assert said[:, 0].tolist() == first.tolist()


def test_bad_input():
    gene = space(2).sample(random.Random(0)) | {"decoder0_reads": 1, "decoder1_reads": 1}
    with pytest.raises(ValueError, match="encoder1_heads"):
        build({k: v for k, v in gene.items() if k != "encoder1_heads"})
    with pytest.raises(ValueError, match="reads 3 layers"):
        build(gene | {"decoder0_reads": 3, "decoder_layers": 1})
    with pytest.raises(ValueError, match="heads must divide inner_dim=16"):
        build(gene | {"encoder0_heads": 3})
    with pytest.raises(ValueError, match="max_length=16"):
        build(gene)(torch.full((1, 17), 3), torch.full((1, 2), 3))
    with pytest.raises(TypeError, match="source"):
        build(gene)(torch.zeros(1, 3), torch.full((1, 2), 3))
    with pytest.raises(ValueError, match="no part of the largest"):
        SharedWeights(Space({"a": (1, 2)}), lambda g: nn.Linear(3 - g["a"], 4))({"a": 1}, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="gate"):
        TranslationModel.convert_state_dict({"gate": torch.zeros(1)})
