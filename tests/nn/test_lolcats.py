import itertools

import pytest
import torch
from parity import Fixture
from torch import nn

import attnlib
from attnlib import masks
from attnlib.nn.linear.feature_maps import HedgehogFeatures
from attnlib.ops.linear import linear_attention
from attnlib.positions import rotary_angles, rotate

FIXTURE = Fixture("lolcats")


def make(**config):
    torch.manual_seed(0)
    return attnlib.create("lolcats", **{"dim": 16, "num_heads": 4, "window_size": 4, "chunk": 4, **config})


@pytest.mark.parametrize("case", FIXTURE.config)
def test_equals_the_authors(case):
    module = FIXTURE.build(case)
    FIXTURE.holds(case, module, lambda m, xs: m(xs["x"]))


@pytest.mark.parametrize("case", [case for case in FIXTURE.config if f"{case}/transfer/mse" in FIXTURE.tensors])
def test_attention_transfer_equals_the_authors(case):
    module = FIXTURE.build(case, attention_transfer=True)
    want = FIXTURE.under(f"{case}/transfer")
    losses = module(FIXTURE.under(f"{case}/x")["x"], returns=("losses",)).losses
    torch.testing.assert_close(losses["transfer_mse"], want["mse"][0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(losses["transfer_xent"], want["xent"][0], atol=1e-6, rtol=1e-5)
    losses["transfer_mse"].backward()
    for phi, grad in ((module.phi_q, want["dq"]), (module.phi_k, want["dk"])):
        torch.testing.assert_close(next(phi.parameters()).grad, grad, atol=1e-6, rtol=1e-4)
    if "dg" in want:
        torch.testing.assert_close(module.window_factor.grad, want["dg"], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("factor", [-5.0, 0.0, 5.0])
@pytest.mark.parametrize("consistent", [False, True])
def test_short_sequences_are_exact_softmax(factor, consistent):
    m = make(window_size=9, window_factor=factor, consistent=consistent)
    plain = attnlib.create(
        "softmax-attention", dim=16, num_heads=4, qkv_bias=False, proj_bias=False, causal=True, rotary=10000.0
    )
    plain.load_state_dict({k: v for k, v in m.state_dict().items() if k.split(".")[0] in ("q", "k", "v", "proj")})
    x = torch.randn(2, 9, 16)
    torch.testing.assert_close(m(x), plain(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n", [5, 40, 200])
def test_without_linear_part_it_is_sliding_window_softmax(n):
    m = make(affine=True, window_factor=200.0, rotary=None, window_size=5)
    x = torch.randn(2, n, 16)
    q, k, v = (proj(x).unflatten(-1, (4, 4)).transpose(1, 2) for proj in (m.q, m.k, m.v))
    want = attnlib.attention(q, k, v, mask=masks.Recent(5)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(m(x), m.proj(want), atol=1e-5, rtol=1e-5)


def test_window_of_nothing_is_linear_attention():
    m = make(window_size=0, rotary=None)
    x = torch.randn(2, 13, 16)
    q, k, v = (proj(x).unflatten(-1, (4, 4)).transpose(1, 2) for proj in (m.q, m.k, m.v))
    want = linear_attention(m.phi_q(q), m.phi_k(k), v, normalizer="sum", form="parallel").transpose(1, 2).flatten(2)
    torch.testing.assert_close(m(x), m.proj(want), atol=1e-5, rtol=1e-5)


def test_consistent_units_do_not_depend_on_the_largest_score():
    # Subtracting the largest score is a change of units: in consistent units, plain exponentials give the same.
    m = make(consistent=True, rotary=None)
    x = torch.randn(1, 12, 16)
    q, k, v = (proj(x).unflatten(-1, (4, 4)).transpose(1, 2) for proj in (m.q, m.k, m.v))
    age = torch.arange(12)[:, None] - torch.arange(12)
    gamma = torch.sigmoid(m.window_factor).view(1, 4, 1, 1)
    soft = gamma * torch.exp(q @ k.transpose(-2, -1) * 0.5) * ((age >= 0) & (age < 4))
    w = soft + (m.phi_q(q) @ m.phi_k(k).transpose(-2, -1)) * (age >= 4)
    want = (w @ v / w.sum(-1, keepdim=True)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(m(x), m.proj(want), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [0, 1, 4, 30])
@pytest.mark.parametrize("first", [1, 3, 6])
def test_decoding_token_by_token_equals_at_once(window, first):
    m = make(window_size=window, num_kv_heads=2)
    x, pieces = torch.randn(2, 17, 16), []
    y, state = m.step(x[:, :first])
    assert state["k"].shape == (2, 2, window, 4)
    if first <= window:
        assert bool((state["S"] == 0).all())
    pieces.append(y)
    for t in range(first, 17):
        y, state = m.step(x[:, t : t + 1], state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), m(x), atol=1e-5, rtol=1e-4)


def test_left_padding_and_holes_change_nothing():
    m = make()
    x = torch.randn(3, 15, 16)
    valid = torch.ones(3, 15, dtype=torch.bool)
    valid[0, :6] = False
    valid[1, [2, 3, 7, 14]] = False
    whole = m(x.masked_fill(~valid[..., None], 9.0), valid=valid)
    pieces, state = [], None
    for part, there in zip(x.split([4, 5, 6], 1), valid.split([4, 5, 6], 1), strict=True):
        y, state = m.step(part, state, valid=there)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=1e-4)
    for b in range(3):
        torch.testing.assert_close(whole[b, valid[b]], m(x[b : b + 1, valid[b]])[0], atol=1e-5, rtol=1e-4)
    assert bool((whole[~valid] == 0).all())


def test_attention_transfer_learns_the_teacher_and_leaves_it_alone():
    torch.manual_seed(0)
    m = make(dim=32, num_heads=2, window_size=4, attention_transfer=True)
    with torch.no_grad():
        m.q.weight.mul_(4)
        m.k.weight.mul_(4)
    x = torch.randn(4, 48, 32)
    optimizer = torch.optim.AdamW(m.feature_parameters(), lr=1e-2, weight_decay=0.0)
    teacher = m(x).detach()
    curve = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = m(x, returns=("losses",)).losses["transfer_mse"]
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    assert all(p.grad is None for part in (m.q, m.k, m.v, m.proj) for p in part.parameters())
    torch.testing.assert_close(m(x), teacher)  # hidden states follow the teacher, which did not move
    assert curve[-1] < 0.7 * curve[0]
    m.attention_transfer = False
    learned = (m(x) - teacher).square().mean()
    q, k, v = (proj(x).unflatten(-1, (2, 16)).transpose(1, 2) for proj in (m.q, m.k, m.v))
    from attnlib.ops.feature_maps import elu1

    fixed = linear_attention(elu1(q), elu1(k), v, normalizer="sum").transpose(1, 2).flatten(2)
    assert learned < 0.5 * (m.proj(fixed) - teacher).square().mean()


def test_traits_follow_the_mode():
    m = make()
    assert m.traits.work == {"N": 1} and m.traits.streaming and not m.traits.losses
    m.attention_transfer = True
    assert m.traits.work == {"N": 2} and not m.traits.streaming
    with pytest.raises(ValueError, match="streaming"):
        m.step(torch.randn(1, 3, 16))


def test_only_adapters_train_with_lora():
    peft = pytest.importorskip("peft")
    model = nn.Sequential()
    model.add_module("attention", make())
    config = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["q", "k", "v", "proj"])
    adapted = peft.get_peft_model(model, config)
    trained = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert len(trained) == 8 and all("lora_" in n for n in trained)
    x = torch.randn(1, 11, 16)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    before = adapted(x)
    torch.testing.assert_close(adapted.merge_and_unload()(x), before, atol=1e-4, rtol=1e-4)


def test_hedgehog_features():
    x = torch.randn(2, 3, 5, 4)
    paper = HedgehogFeatures(3, 4, kind="exp-unstable", fullspace=False, identity=True)
    torch.testing.assert_close(paper(x), x.exp())
    for kind in ("softmax", "exp", "exp-unstable", "joint-softmax"):
        assert HedgehogFeatures(3, 4, 6, kind=kind)(x).shape == (2, 3, 5, 12)
        assert bool((HedgehogFeatures(3, 4, 6, kind=kind)(x) > 0).all())
    torch.testing.assert_close(HedgehogFeatures(3, 4, skip=True, identity=True)(x)[..., :4], torch.softmax(x, -1))
    with pytest.raises(ValueError, match="skip needs feature_dim == head_dim"):
        HedgehogFeatures(3, 4, 6, skip=True)
    with pytest.raises(ValueError, match="fullspace=False is not possible"):
        HedgehogFeatures(3, 4, kind="joint-softmax", fullspace=False)


def test_empty_inputs():
    m = make()
    assert m(torch.zeros(0, 5, 16)).shape == (0, 5, 16)
    assert m(torch.zeros(2, 0, 16)).shape == (2, 0, 16)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(causal=False), "causal=False is not possible"),
        (dict(window_size=-1), "window_size must be at least 0"),
        (dict(num_kv_heads=3), "num_kv_heads=3 does not divide num_heads=4"),
        (dict(features="tanh"), "features='tanh'"),
        (dict(feature_options={"kind": "relu"}), "feature_options='kind' is not possible"),
        (dict(chunk=0), "chunk must be an integer of at least 1"),
        (dict(eps=0.1), "needs window_size=0"),
        (dict(decode_window_size=0), "decode_window_size must be at least 1"),
        (dict(train_window=False, window="terraced"), "train_window=False needs window='sliding'"),
        (dict(rotary=None, rotary_scaling={"rope_type": "linear", "factor": 2.0}), "needs a rotary base"),
        (dict(feature_options={"normal": True, "identity": True}), "two starts"),
    ],
)
def test_bad_settings(config, message):
    with pytest.raises(ValueError, match=message):
        make(**config)


@pytest.mark.parametrize("case", [case for case in FIXTURE.config if f"{case}/decode/y" in FIXTURE.tensors])
def test_decoding_equals_the_authors(case):
    """The prompt through the layer, then token by token through the one that decodes."""
    m, theirs = FIXTURE.build(case).eval(), FIXTURE.under(f"{case}/decode")
    x, prompt = theirs["x"], int(theirs["prompt"])
    decoder = m.decoding()
    pieces, state = [m(x[:, :prompt])], decoder(x[:, :prompt], returns=("state",)).state
    for t in range(prompt, x.shape[1]):
        y, state = decoder.step(x[:, t : t + 1], state)
        pieces.append(y)
    FIXTURE._close(torch.cat(pieces, 1).detach(), theirs["y"], 1e-5, "y")


@pytest.mark.parametrize("case", [case for case in FIXTURE.config if f"{case}/chunks/y" in FIXTURE.tensors])
def test_training_in_chunks_equals_the_authors(case):
    m, theirs = FIXTURE.build(case), FIXTURE.under(f"{case}/chunks")
    x, pieces, state = theirs["x"].requires_grad_(), [], None
    for lo, hi in itertools.pairwise((0, *theirs["cuts"].tolist())):
        y, state = m.train_chunk(x[:, lo:hi], state)
        pieces.append(y)
    y = torch.cat(pieces, 1)
    FIXTURE._close(y.detach(), theirs["y"], 1e-5, "y")
    (y * theirs["g"]).sum().backward()
    FIXTURE._close(x.grad, theirs["dx"], 1e-5, "dx")
    FIXTURE._close(m.phi_k.weight.grad, theirs["dphi_k"], 1e-5, "the features of keys")


def test_one_chunk_is_the_layer_and_later_chunks_have_no_gradient_in_earlier_ones():
    m, x = make(), torch.randn(2, 10, 16, requires_grad=True)
    whole, state = m.train_chunk(x[:, :6])
    torch.testing.assert_close(whole, m(x[:, :6]))
    later, _ = m.train_chunk(x[:, 6:], state)
    assert float(torch.autograd.grad(later.sum(), x)[0][:, :6].abs().max()) == 0.0
    for settings in (dict(window_size=0), dict(attention_transfer=True)):
        with pytest.raises(ValueError, match="train_chunk is for"):
            make(**settings).train_chunk(x)
    with pytest.raises(ValueError, match="state holds 'sums' of 2 samples"):
        m.train_chunk(x[:1], state)


def test_a_state_of_another_window_is_refused():
    _, state = make(window_size=3).step(torch.randn(1, 5, 16))
    with pytest.raises(ValueError, match="state k must be"):
        make().step(torch.randn(1, 1, 16), state)


def test_the_factor_under_both_of_its_names():
    theirs = FIXTURE.under("terraced/sd")
    factor = theirs["window_factors"]
    ours = attnlib.convert_state_dict("lolcats", theirs)
    both = attnlib.convert_state_dict("lolcats", {**theirs, "window_factor": factor})
    old = {k: v for k, v in theirs.items() if k != "window_factors"} | {"window_factor": factor}
    assert ours.keys() == both.keys() == attnlib.convert_state_dict("lolcats", old).keys()


def terraced(m, x, first):
    """The window written out in float64: blocks of four tokens, the first one ``first`` tokens long."""
    q, k, v = (p(x).unflatten(-1, (4, 4)).transpose(1, 2) for p in (m.q, m.k, m.v))
    n = x.shape[1]
    block = (torch.arange(n) + (-first) % 4) // 4
    apart, later = block[:, None] - block, torch.arange(n)[None] > torch.arange(n)[:, None]
    e = (q @ k.mT / 2).masked_fill(later | (apart > 1), float("-inf"))
    e = torch.exp(e - e.amax(-1, keepdim=True)) * m.window_factor.sigmoid()[:, None, None]
    linear = (m.phi_q(q) @ m.phi_k(k).mT).masked_fill(apart < 2, 0.0)
    weights = e + linear
    out = weights @ v / weights.sum(-1, keepdim=True)
    return m.proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("n", [1, 4, 7, 12, 19])
@pytest.mark.parametrize("compat", [None, "authors"])
def test_terraces_begin_with_the_sequence_or_end_with_it(n, compat):
    m = make(window="terraced", compat=compat, rotary=None).double()
    x = torch.randn(2, n, 16, dtype=torch.float64)
    if compat is None or n > 4:  # their slip, in a sequence of one block, is held by a recording
        torch.testing.assert_close(m(x), terraced(m, x, 4 if compat is None else n % 4 or 4))
    valid = torch.ones(2, n + 3, dtype=torch.bool)
    valid[0, :3], valid[1, n // 2 : n // 2 + 3] = False, False
    holes = torch.full((2, n + 3, 16), float("nan"), dtype=torch.float64)
    holes[valid] = x.flatten(0, 1)
    assert m.traits.streaming is (compat is None)
    torch.testing.assert_close(m(holes, valid=valid)[valid].unflatten(0, (2, n)), m(x))


@pytest.mark.parametrize("consistent", [False, True])
@pytest.mark.parametrize("cuts", [(1, 2, 3, 4, 5, 6), (4, 8), (3, 11), (9,), (13, 14)])
def test_terraces_that_begin_with_the_sequence_decode(cuts, consistent):
    """Pieces that end anywhere in a block, samples of which some tokens are missing."""
    m = make(window="terraced", num_kv_heads=2, consistent=consistent).double()
    x = torch.randn(2, 15, 16, dtype=torch.float64)
    valid = torch.ones(2, 15, dtype=torch.bool)
    valid[0, :2] = valid[1, 6:9] = False
    whole, state, pieces = m(x, valid=valid), None, []
    for lo, hi in itertools.pairwise((0, *cuts, 15)):
        y, state = m.step(x[:, lo:hi], state, valid=valid[:, lo:hi])
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    assert state["tokens"].tolist() == [13, 12]
    with pytest.raises(ValueError, match="state k must be"):
        make(window="terraced", num_kv_heads=2, window_size=3).double().step(x[:, :1], state)


def test_the_layer_that_decodes_has_a_window_of_its_own():
    m = make(window="terraced", compat="authors", decode_window_size=3)
    decoder = m.decoding()
    assert (decoder.window, decoder.window_size, decoder.compat) == ("sliding", 3, None)
    assert decoder.q is m.q and decoder.window_factor is m.window_factor and m.window == "terraced"
    plain = make(window_size=3)
    plain.load_state_dict(m.state_dict())
    x = torch.randn(2, 7, 16)
    torch.testing.assert_close(decoder(x), plain(x))
    with pytest.raises(ValueError, match="decodes as it is"):
        make(window_size=0).decoding()


def test_a_window_that_passes_no_gradient():
    m, x = make(train_window=False, affine=True), torch.randn(1, 9, 16)
    assert m.traits.gradient == "surrogate"
    whole = make(affine=True)
    whole.load_state_dict(m.state_dict())
    torch.testing.assert_close(m(x), whole(x))
    # inside the first window there is nothing else, and all that is left is the values' and the projection's
    m(x[:, :4]).sum().backward()
    assert float(m.q.weight.grad.abs().max()) == 0.0 and float(m.v.weight.grad.abs().max()) == 0.0
    m(x).sum().backward()
    assert float(m.phi_q.weight.grad.abs().max()) > 0.0


def test_features_and_denominators_have_lower_bounds():
    m = make(window_size=0, eps=0.5, feature_options={"eps": 0.1}).double()
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    plain = make(window_size=0, feature_options={"eps": 0.1}).double()
    plain.load_state_dict(m.state_dict())
    assert float(m.phi_q(torch.randn(1, 4, 6, 4, dtype=torch.float64)).min()) >= 0.1
    m.proj.weight.data.copy_(torch.eye(16))
    plain.proj.weight.data.copy_(torch.eye(16))
    q, k = (p(x).unflatten(-1, (4, 4)).transpose(1, 2) for p in (m.q, m.k))
    angles = rotary_angles(torch.arange(6), 4)
    sums = (m.phi_q(rotate(q, angles)) @ m.phi_k(rotate(k, angles)).mT).tril().sum(-1)  # (1, 4, 6)
    shrunk = plain(x).unflatten(-1, (4, 4)) * (sums / (sums + 0.5)).transpose(1, 2)[..., None]
    # float32 angles
    torch.testing.assert_close(m(x), shrunk.flatten(2), atol=1e-6, rtol=1e-6)


def test_queries_and_keys_start_with_the_same_features():
    m = make(feature_options={"normal": True})
    assert torch.equal(m.phi_q.weight, m.phi_k.weight) and m.phi_q.weight is not m.phi_k.weight
    assert 0.7 < float(m.phi_q.weight.std()) < 1.3
