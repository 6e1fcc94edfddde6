"""Cached equals uncached under ``generate()``, whatever mixture of states the layers keep."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache  # noqa: E402

import attnlib  # noqa: E402
from attnlib.hooks.hf.state import StateLayer, state_cache  # noqa: E402
from attnlib.models.language import DecoderConfig, DecoderForCausalLM, build_mixer  # noqa: E402
from attnlib.nn.registry import find  # noqa: E402

SOFTMAX = {"name": "softmax-attention", "num_kv_heads": 2}
WINDOW = {"name": "lolcats", "num_kv_heads": 2, "window_size": 3}
LINEAR = "lightning-attention-2"
MIXES = {
    "softmax": [SOFTMAX],
    "hybrid": [SOFTMAX, WINDOW, LINEAR],
    "linear-first": [LINEAR, {"name": "lolcats", "window_size": 0, "rotary": None}, SOFTMAX],
    "all-linear": [LINEAR, {"name": LINEAR, "lrpe": True}],
    "all-lolcats": [WINDOW],
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model(mix: str | list, **settings) -> DecoderForCausalLM:
    torch.manual_seed(0)
    mechanisms = MIXES[mix] if isinstance(mix, str) else mix
    config = DecoderConfig(
        vocab_size=41, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, mechanisms=mechanisms,
        pad_token_id=0, initializer_range=0.5, **settings,
    )  # fmt: skip
    return DecoderForCausalLM(config).eval()


def padded_prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of 3, 8 and 5 tokens, padded on the left."""
    gen = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 41, (3, 8), generator=gen)
    mask = torch.arange(8) >= torch.tensor([[5], [0], [3]])
    return ids * mask, mask.long()


def generate(m, ids, mask, cached=True, tokens=10, **settings):
    return m.generate(
        ids, attention_mask=mask, max_new_tokens=tokens, use_cache=cached, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("mix", MIXES)
def test_cached_equals_uncached_token_by_token(mix):
    m = model(mix)
    ids = torch.randint(1, 41, (2, 17))
    want = m(ids, use_cache=False).logits
    cache, got = None, []
    for part in ids.split([5, 1, 1, 4, 1, 5], 1):
        out = m(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        got.append(out.logits)
    torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-5, rtol=1e-5)
    assert [layer.get_seq_length() for layer in cache.layers] == [17] * 3


@pytest.mark.parametrize("mix", MIXES)
def test_greedy_with_left_padding(mix):
    m = model(mix)
    ids, mask = padded_prompts()
    cached, plain = generate(m, ids, mask), generate(m, ids, mask, cached=False)
    assert torch.equal(cached.sequences, plain.sequences)
    for a, b in zip(cached.logits, plain.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mix", MIXES)
def test_padding_does_not_change_what_a_prompt_gives(mix):
    m = model(mix)
    ids, mask = padded_prompts()
    together = generate(m, ids, mask).sequences[:, 8:]
    for row in range(3):
        alone = generate(m, ids[row : row + 1, mask[row].bool()], None).sequences[:, -10:]
        assert torch.equal(together[row : row + 1], alone)


@pytest.mark.parametrize("mix", MIXES)
def test_beams(mix):
    m = model(mix)
    ids, mask = padded_prompts()
    settings = dict(num_beams=3, num_return_sequences=2, tokens=8, output_scores=True)
    cached, plain = generate(m, ids, mask, **settings), generate(m, ids, mask, cached=False, **settings)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(cached.sequences_scores, plain.sequences_scores, atol=1e-5, rtol=1e-5)


def test_beams_do_reorder():
    # Without reordering, cached beams go wrong: the test above would notice.
    m = model("hybrid")
    ids, mask = padded_prompts()
    settings = dict(num_beams=3, tokens=8, output_scores=True)
    want = generate(m, ids, mask, **settings).sequences_scores
    before = StateLayer.reorder_cache
    StateLayer.reorder_cache = lambda self, beams: None
    try:
        wrong = generate(m, ids, mask, **settings).sequences_scores
    finally:
        StateLayer.reorder_cache = before
    assert not torch.allclose(want, wrong, atol=1e-3)


def test_sampling_continues_a_cache():
    m = model("hybrid")
    ids = torch.randint(1, 41, (2, 6))
    first = generate(m, ids, None, tokens=4)
    again = m.generate(
        first.sequences, past_key_values=first.past_key_values, max_new_tokens=5, do_sample=False, use_cache=True
    )
    assert torch.equal(again, generate(m, ids, None, tokens=9).sequences)


def test_a_state_layer_counts_tokens_and_knows_key_positions():
    m = model("hybrid")
    ids, mask = padded_prompts()
    cache = m(ids, attention_mask=mask, use_cache=True).past_key_values
    softmax, window, linear = cache.layers
    assert softmax.key_positions().tolist()[0] == [-1] * 5 + [0, 1, 2]
    assert window.key_positions().tolist() == [[0, 1, 2], [5, 6, 7], [2, 3, 4]]
    assert linear.key_positions() is None
    assert cache.get_seq_length() == 8 and cache.get_mask_sizes(4, 1) == (12, 0) and cache.batch_size == 3
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    assert window.key_positions().tolist() == [[2, 3, 4]] * 2 + [[0, 1, 2]] * 2
    with pytest.raises(ValueError, match="cannot forget"):
        cache.crop(-1)
    with pytest.raises(TypeError, match="advance"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)
    linear.offload()
    linear.prefetch()
    assert linear.state["S"].shape[0] == 4
    cache.reset()
    assert cache.get_seq_length() == 0 and window.state is None


def test_linear_cache_does_not_grow():
    m = model("all-linear")
    sizes = [sum(la.state.numel() for la in m(torch.ones(1, n).long()).past_key_values.layers) for n in (2, 50)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("mix", ["hybrid", "all-linear"])
def test_save_load_and_auto_classes(mix, tmp_path):
    m = model(mix)
    ids, mask = padded_prompts()
    m.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), DecoderConfig)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.lm_head.weight is again.model.embed_tokens.weight
    for (name, a), (_, b) in zip(m.named_buffers(), again.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(again(ids, attention_mask=mask).logits, m(ids, attention_mask=mask).logits)


def test_mechanisms_keep_their_own_initialisation():
    m = model("hybrid")
    torch.manual_seed(0)
    lolcats = m.model.layers[1].mixer
    assert float(lolcats.window_factor.detach()[0]) == pytest.approx(-2.1972246)
    bound = 32**-0.5  # of nn.Linear(32, ..): a normal of deviation 0.5 would not stay inside
    assert float(lolcats.q.weight.detach().abs().max()) <= bound
    assert 0.4 < float(m.model.layers[1].mlp.up.weight.detach().std()) < 0.6


def test_training_and_gradient_checkpointing():
    m = model("hybrid").train()
    ids, mask = padded_prompts()
    labels = ids.masked_fill(mask == 0, -100)
    loss = m(ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    want = {n: p.grad.clone() for n, p in m.named_parameters()}
    m.zero_grad()
    m.gradient_checkpointing_enable()
    again = m(ids, attention_mask=mask, labels=labels).loss
    again.backward()
    torch.testing.assert_close(again, loss)
    for n, p in m.named_parameters():
        torch.testing.assert_close(p.grad, want[n], atol=1e-5, rtol=1e-5)


def test_it_learns():
    m = model("hybrid").train()
    ids = torch.arange(1, 41).repeat(2, 1)[:, :24]
    optimizer = torch.optim.AdamW(m.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = m(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_losses_of_mechanisms_are_reported_and_weighted():
    spec = [{"name": "lolcats", "window_size": 3, "attention_transfer": True}]
    m = model(spec, loss_weights={"transfer_mse": 100.0}).train()
    ids = torch.randint(1, 41, (2, 12))
    out = m(ids, labels=ids)
    bare = model(spec).train()
    bare.load_state_dict(m.state_dict())
    extra = 100.0 * out.mechanism_losses["transfer_mse"]
    torch.testing.assert_close(out.loss, bare(ids, labels=ids).loss + extra)
    assert float(extra.detach()) > 0


def test_hidden_states_and_last_logits():
    m = model("hybrid")
    ids = torch.randint(1, 41, (2, 7))
    out = m(ids, output_hidden_states=True, logits_to_keep=2)
    assert len(out.hidden_states) == 4 and out.logits.shape == (2, 2, 41)
    torch.testing.assert_close(m(inputs_embeds=m.get_input_embeddings()(ids)).logits[:, -2:], out.logits)


def test_bad_input():
    m = model("hybrid")
    ids = torch.ones(2, 5).long()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        m()
    with pytest.raises(ValueError, match="attention_mask must be"):
        m(ids, attention_mask=torch.ones(2, 5, 5))
    with pytest.raises(TypeError, match="cache must be made by"):
        m(ids, past_key_values=DynamicCache(), use_cache=True)
    with pytest.raises(TypeError, match="cache must be made by"):
        m(ids, past_key_values=state_cache(2), use_cache=True)
    with pytest.raises(ValueError, match="unknown mechanism 'softmax-atention'"):
        model(["softmax-atention"])
    with pytest.raises(ValueError, match="mechanisms holds names"):
        DecoderConfig(mechanisms=[3])
    with pytest.raises(ValueError, match="mechanisms must be a list"):
        DecoderConfig(mechanisms=[])
    with pytest.raises(ValueError, match="is not causal"):
        build_mixer(DecoderConfig(mechanisms=[{"name": "softmax-attention", "causal": False}]), 0)
    teacher = model([{"name": "lolcats", "attention_transfer": True}])
    with pytest.raises(ValueError, match="cannot decode step by step"):
        teacher(ids, use_cache=True)
    assert teacher(ids, use_cache=False).logits.shape == (2, 5, 41)


def test_assisted_generation_is_refused():
    m = model("hybrid")
    with pytest.raises(ValueError, match="stateful"):
        m.generate(torch.ones(1, 4).long(), assistant_model=model("softmax"), max_new_tokens=2)


SETTINGS = {
    "attention-sink-empirical": {"k_bias": True, "v_bias": True},
    "moh-mixture-of-heads": {"shared_heads": 1, "active_heads": 1},
    "quantizable-transformers": {"alpha": 2.0, "max_length": 16, "gate": "conditional_per_token"},
    "s2-attention-dkernel": {"block_size": 2, "local_blocks": 2, "stride": 2},
    "illama": {"mask_mode": "pre"},
    "pldr-llm-plga": {"metric_hidden": 6, "residual_units": 1, "metric": "cached"},
    "rcmha": {"attn_drop": 0.0},
    "softplus-attention-lssar": {"power": 3.0},
}


@pytest.mark.parametrize("name", attnlib.list_mechanisms())
def test_every_causal_mechanism_generates_the_same_with_and_without_a_cache(name):
    spec = {"name": name, **SETTINGS.get(name, {})}
    if "causal-self" not in find(name).class_traits.patterns:
        with pytest.raises(ValueError):
            model([spec])
        return
    m = model([spec])
    with torch.no_grad():
        for p in m.parameters():  # what starts at zero takes part
            if not bool(p.any()):
                p.normal_(std=0.3)
    ids, mask = padded_prompts()
    if not m.model.layers[0].mixer.traits.streaming:
        with pytest.raises(ValueError, match="cannot decode step by step"):
            generate(m, ids, mask)
        return
    cached, plain = generate(m, ids, mask), generate(m, ids, mask, cached=False)
    assert torch.equal(cached.sequences, plain.sequences)
    for a, b in zip(cached.logits, plain.logits, strict=True):
        assert float((a - b).abs().max()) <= 1e-5 * max(1.0, float(b.abs().max()))


def test_settings_reach_a_mechanism_that_hands_them_to_its_base():
    mixer = build_mixer(
        DecoderConfig(hidden_size=32, num_attention_heads=4, mechanisms=["selective-self-attention"]), 0
    )
    assert (mixer.causal, mixer.rotary, mixer.num_heads) == (True, 10000.0, 4)


def test_layers_that_look_ahead_need_leave():
    spec = {"name": "pldr-llm-plga", "metric_hidden": 6, "residual_units": 1}
    with pytest.raises(ValueError, match="is not causal"):
        model([spec])
    m = model([spec], allow_lookahead=True)
    ids = torch.randint(1, 41, (1, 6))
    assert m(ids, use_cache=False).logits.shape == (1, 6, 41)
    with pytest.raises(ValueError, match="cannot decode step by step"):
        m(ids, use_cache=True)
    with pytest.raises(ValueError, match="is not causal"):
        model(["illama"])
    with pytest.raises(ValueError, match="is not causal"):
        model(["dfa3d"], allow_lookahead=True)


def test_a_weight_of_zero_leaves_losses_out():
    spec = [{"name": "moh-mixture-of-heads", "shared_heads": 1, "active_heads": 1}]
    ids = torch.randint(1, 41, (2, 6))
    assert model(spec)(ids).mechanism_losses["balance"] > 0
    assert model(spec, loss_weights={"balance": 0.0})(ids).mechanism_losses is None


@pytest.mark.parametrize("name", ["softmax-attention", "moh-mixture-of-heads", "lightning-attention-2", "rcmha"])
def test_compiles_whole(name):
    m = model([{"name": name, **SETTINGS.get(name, {})}]).train()
    ids = torch.randint(1, 41, (2, 9))
    want = m(ids, labels=ids).loss
    want.backward()
    grads = {n: p.grad.clone() for n, p in m.named_parameters()}
    m.zero_grad()
    torch._dynamo.reset()
    loss = torch.compile(m, backend="aot_eager", fullgraph=True)(ids, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(loss, want, atol=1e-5, rtol=1e-5)
    for n, p in m.named_parameters():
        torch.testing.assert_close(p.grad, grads[n], atol=1e-5, rtol=1e-5, msg=n)


@pytest.mark.parametrize(
    "ids, error, words",
    [
        (torch.tensor([1, 2, 3]), ValueError, r"input_ids must have shape \(B, N\)"),
        (torch.ones(1, 3), TypeError, "input_ids must be an integer tensor.*float32"),
        ([[1, 2]], TypeError, "input_ids must be an integer tensor"),
    ],
)
def test_tokens_that_are_none_are_refused_by_name(ids, error, words):
    model = DecoderForCausalLM(DecoderConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(error, match=words):
        model(ids)
    with pytest.raises(ValueError, match=r"inputs_embeds must have shape \(B, N, hidden_size\)"):
        model(inputs_embeds=torch.zeros(3, 8))


def test_logits_to_keep_is_a_number_whatever_its_kind():
    import numpy as np

    m = model(next(iter(MIXES)))
    ids = torch.randint(1, 41, (2, 6))
    whole = m(ids).logits
    for kept, expected in (
        (0, whole),
        (np.int64(0), whole),
        (np.int64(2), whole[:, -2:]),
        (torch.tensor([1]), whole[:, [1]]),
    ):
        torch.testing.assert_close(m(ids, logits_to_keep=kept).logits, expected)
    for wrong in (-1, 0.5, "all", torch.tensor([0.5])):
        with pytest.raises((TypeError, ValueError), match="logits_to_keep"):
            m(ids, logits_to_keep=wrong)
