"""SPT's attention inside models that exist: keys by codes, codebooks that learn, MLPs and adapters beside them."""

import pytest
import torch

from attnlib import convert
from attnlib.convert.agreement import listening
from attnlib.convert.routed import route_mlps
from attnlib.nn.sparse.spt import SPTAttention, SPTHeads, choose_keys

transformers = pytest.importorskip("transformers")
SETTINGS = dict(coeff=2, codeword_dim=2, num_codewords=4)


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                p.mul_(10)
    return model


def batch(pad=0):
    ids = torch.randint(3, 60, (2, 16), generator=torch.Generator().manual_seed(1))
    ids[0, :pad] = 0
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.mark.parametrize("clamp", [None, 1.0])
@pytest.mark.parametrize("pad", [0, 5])
def test_grouped_heads_equal_a_loop(clamp, pad):
    torch.manual_seed(0)
    heads = SPTHeads(4, 8, 2, clamp=clamp, **SETTINGS).double()
    q, k, v = (torch.randn(2, h, 12, 8, dtype=torch.float64) for h in (4, 2, 2))
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[0, :pad] = False
    out = heads(q, k, v, valid=valid if pad else None)[0]
    book = heads.codebook.weight.detach()

    def code(z):
        return [int((z[2 * m : 2 * m + 2] - book[m]).abs().sum(-1).argmin()) for m in range(4)]

    for b in range(2):
        kept = max(1, int(valid[b].sum()) // 2)
        for h in range(4):
            for i in range(12):
                if not valid[b, i]:
                    continue
                mine = code(q[b, h, i])
                known = [j for j in range(i + 1) if valid[b, j]]
                match = {j: sum(a == c for a, c in zip(mine, code(k[b, h // 2, j]), strict=True)) for j in known}
                best = sorted(known, key=lambda j: (-min(match[j], 3), j))[:kept]  # noqa: B023
                scores = (k[b, h // 2, best] @ q[b, h, i]) * 8**-0.5
                scores = scores if clamp is None else scores.clamp(-clamp, clamp)
                torch.testing.assert_close(out[b, h, i], scores.softmax(0) @ v[b, h // 2, best])
    mixed = heads.weights(q, k, valid=valid if pad else None) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(mixed[:, :, pad:], out[:, :, pad:])


def test_heads_are_the_mechanism_between_its_projections():
    torch.manual_seed(0)
    whole = SPTAttention(32, 4, **SETTINGS)
    heads = SPTHeads(4, 8, **SETTINGS)
    heads.codebook.load_state_dict(whole.codebook.state_dict())
    x = torch.randn(2, 12, 32)
    q, k, v = (f(x).unflatten(-1, (4, 8)).transpose(1, 2) for f in (whole.q, whole.k, whole.v))
    out = heads(q, k, v)[0]
    torch.testing.assert_close(whole.proj(out.transpose(1, 2).flatten(2)), whole(x))
    plan = choose_keys(heads.codebook, q, k, 2)
    assert plan.index.equal(whole.plan(x).index)
    losses = whole(x, returns=("losses",)).losses
    torch.testing.assert_close(heads.own_losses(q, k), losses)


def test_reading_every_key_leaves_a_model_as_it_was():
    model = llama()
    before = model(**batch(), use_cache=False).logits
    for settings in ({**SETTINGS, "coeff": 1}, {**SETTINGS, "dense": True}):
        with convert.linearize(model, "spt", **settings):
            torch.testing.assert_close(model(**batch(), use_cache=False).logits, before, atol=1e-5, rtol=1e-4)
    assert model(**batch(), use_cache=False).logits.equal(before)


def test_the_three_phases_of_a_fine_tuning(tmp_path):
    pytest.importorskip("peft")
    model = llama()
    before, state = model(**batch(3)).logits, {name: t.clone() for name, t in model.state_dict().items()}
    routed = route_mlps(model, block=12, rank=2)
    conversion = convert.linearize(model, "spt", **SETTINGS)
    for socket in conversion.swap.sockets.values():  # the authors' first phase: codebooks learn from dense attention
        socket.inner.dense = True
    books = [p.clone() for p in conversion.trained()]
    history = conversion.fit([batch(3)], "own", steps=40, lr=0.05)
    assert history[-1] < 0.7 * history[0]
    assert all(not p.equal(old) for p, old in zip(conversion.trained(), books, strict=True))
    for socket in conversion.swap.sockets.values():
        socket.inner.dense = False
    conversion.lora(rank=2)
    given = [*conversion.trained(), *conversion.trained("adapters"), *routed.trained()]
    learned = [p.clone() for p in given]
    losses = conversion.fit([batch(3)], {"task": 1.0, "own": 0.01}, train=given, steps=12, lr=1e-2)
    assert losses[-1] < losses[0]
    # The right factor of a pair starts from zero, so every trained number has moved by now.
    assert all(not p.equal(old) for p, old in zip(given, learned, strict=True))
    conversion.restore()
    routed.restore()
    assert model(**batch(3)).logits.equal(before)
    assert all(t.equal(state[name]) for name, t in model.state_dict().items())


def test_saved_and_loaded_it_reads_the_same_keys(tmp_path):
    model = llama()
    conversion = convert.linearize(model, "spt", **SETTINGS)
    logits = model(**batch(3), use_cache=False).logits
    conversion.save(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**batch(3), use_cache=False).logits, logits)


def test_bad_input_is_refused():
    model = llama()
    with pytest.raises(ValueError, match="codeword_dim"):
        convert.linearize(model, "spt", codeword_dim=3)
    with pytest.raises(ValueError, match="coeff"):
        convert.linearize(model, "spt", coeff=0)
    with pytest.raises(ValueError, match="causal=False is not possible"):
        SPTHeads(2, 8, causal=False)
    with convert.linearize(model, "hedgehog") as conversion:
        with pytest.raises(ValueError, match="'own' is not possible"):
            conversion.fit([batch()], "own")
        with listening(conversion.swap) as own:
            model(**batch())
        assert own == {}
    with convert.linearize(model, "spt", **SETTINGS), pytest.raises(ValueError, match="use_cache=False"):
        model(**batch(), use_cache=True)
