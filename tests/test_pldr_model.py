"""The PLDR-LLM model: the authors' numbers, its caches, and what they refuse."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")

from parity import HERE, Fixture  # noqa: E402
from safetensors import safe_open  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

import attnlib  # noqa: E402
from attnlib.models.pldr import GCache, PLDRConfig, PLDRForCausalLM  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recording() -> tuple[dict[str, torch.Tensor], dict]:
    with safe_open(HERE / "pldr-llm-model.safetensors", "pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, json.loads(file.metadata()["config"])  # noqa: SIM118


def under(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k[len(prefix) + 1 :]: v for k, v in tensors.items() if k.startswith(prefix + "/")}


def theirs() -> tuple[PLDRForCausalLM, dict[str, torch.Tensor]]:
    """Our model with the authors' weights, and what they recorded."""
    tensors, config = recording()
    m = PLDRForCausalLM(PLDRConfig(**config)).eval()
    m.load_state_dict(m.convert_state_dict(under(tensors, "sd")))
    return m, tensors


def their_cache(tensors: dict[str, torch.Tensor]) -> list[list[torch.Tensor]]:
    cache = under(tensors, "cached")
    return [[cache[f"{i}.A_LM"], cache[f"{i}.G"]] for i in range(2)]


def small(seed: int = 0, lift: float = 2.0, **settings) -> PLDRForCausalLM:
    torch.manual_seed(seed)
    config = PLDRConfig(**{
        "vocab_size": 41, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "metric_hidden": 6,
        "residual_units": 2, "pad_token_id": 0, **settings,
    })  # fmt: skip
    m = PLDRForCausalLM(config).eval()
    with torch.no_grad():
        for mixer in m._mixers():
            mixer.learner.b.add_(lift)  # away from the floor of A_LM, where powers lose their digits
    return m


def padded_prompts() -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 41, (3, 8), generator=gen)
    mask = torch.arange(8) >= torch.tensor([[5], [0], [3]])
    return ids * mask, mask.long()


def greedy(m, ids, mask=None, **settings):
    return m.generate(
        ids, attention_mask=torch.ones_like(ids) if mask is None else mask, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **{"max_new_tokens": 6, **settings},
    )  # fmt: skip


# ---- the authors' numbers


def test_the_paper_s_model_has_109_689_362_parameters():
    with torch.device("meta"):
        m = PLDRForCausalLM(PLDRConfig())
    assert sum(p.numel() for p in m.parameters()) == 109_689_362
    assert PLDRConfig().intermediate_size == 2389


def compare_gradients(m, recorded: dict[str, torch.Tensor], count: int) -> None:
    grads = {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
    wanted = m.convert_state_dict(recorded)
    assert len(wanted) == count and set(wanted) <= set(grads)
    for name, expected in wanted.items():
        Fixture._close(grads[name], expected, 1e-5, name)


@pytest.mark.parametrize("way", ["learned", "their G-cache"])
def test_logits_and_gradients_equal_the_authors(way):
    m, tensors = theirs()
    learned = way == "learned"
    if not learned:
        m.use_g_cache(their_cache(tensors), any_source=True)
    logits = m(tensors["ids"], use_cache=False).logits
    Fixture._close(logits.detach(), tensors["y" if learned else "cached/y"], 1e-5, "logits")
    (logits * tensors["g"]).sum().backward()
    recorded = under(tensors, "dw" if learned else "cached/dw")
    assert any("reslayerAs" in name for name in recorded) == learned
    compare_gradients(m, recorded, len(recorded))


def test_deductive_outputs_equal_the_authors():
    m, tensors = theirs()
    for i, found in enumerate(m.deductive_outputs(tensors["ids"])):
        for name in ("A_LM", "G"):
            Fixture._close(getattr(found, name), tensors[f"deduced/{i}.{name}"], 1e-5, f"{i}.{name}")
    for (a_lm, g), their in zip(m.g_cache(tensors["ids"][:1]).layers, their_cache(tensors), strict=True):
        Fixture._close(a_lm[None], their[0], 1e-5, "A_LM")
        Fixture._close(g[None], their[1], 1e-5, "G")


def test_generation_equals_the_authors_with_their_kv_and_g_cache():
    m, tensors = theirs()
    out = greedy(m, tensors["generate/ids"][:, :3], max_new_tokens=5)
    assert torch.equal(out.sequences, tensors["generate/ids"])
    Fixture._close(torch.stack(out.logits, 1), tensors["generate/logits"], 1e-5, "logits")


def test_what_is_not_theirs_is_refused():
    tensors, _ = recording()
    sd = under(tensors, "sd")
    for name in ("decoder.dec_layers.0.mha2.wq.weight", "encoder.embedding.weight"):
        with pytest.raises(ValueError, match="not a weight of PLDR_Model"):
            PLDRForCausalLM.convert_state_dict({**sd, name: torch.zeros(1)})


# ---- caches


def test_the_uncached_model_looks_ahead_and_the_frozen_one_does_not():
    m, ids = small(), torch.randint(1, 41, (1, 9))
    other = ids.clone()
    other[0, -1] = ids[0, -1] % 40 + 1
    change = (m(other, use_cache=False).logits - m(ids, use_cache=False).logits)[:, :-1].abs().max()
    assert change > 1e-3
    m.freeze_metric(ids)
    assert torch.equal(m(other, use_cache=False).logits[:, :-1], m(ids, use_cache=False).logits[:, :-1])


def test_the_prompt_s_metric_is_kept():
    """Generation with the cache equals full passes whose metric is frozen to the prompt's."""
    m, ids = small(), torch.randint(1, 41, (1, 7))
    cached = greedy(m, ids)
    plain = greedy(m.freeze_metric(ids), ids, use_cache=False)
    assert torch.equal(cached.sequences, plain.sequences)
    for a, b in zip(cached.logits, plain.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_frozen_cached_equals_uncached_with_left_padding(settings):
    m = small().freeze_metric(torch.randint(1, 41, (4, 12)))
    ids, mask = padded_prompts()
    cached, plain = greedy(m, ids, mask, **settings), greedy(m, ids, mask, use_cache=False, **settings)
    assert torch.equal(cached.sequences, plain.sequences)


@pytest.mark.parametrize("frozen", [False, True])
def test_padding_does_not_change_what_a_prompt_gives(frozen):
    m = small()
    if frozen:
        m.freeze_metric(torch.randint(1, 41, (4, 12)))
    ids, mask = padded_prompts()
    together = greedy(m, ids, mask).sequences[:, 8:]
    for row in range(3):
        alone = greedy(m, ids[row : row + 1, mask[row].bool()]).sequences[:, -6:]
        assert torch.equal(together[row : row + 1], alone)


def test_freezing_to_its_own_prompt_changes_nothing_and_thawing_undoes_it():
    m, ids = small().double(), torch.randint(1, 41, (1, 7))
    before = m(ids, use_cache=False).logits
    torch.testing.assert_close(m.freeze_metric(ids)(ids, use_cache=False).logits, before, atol=1e-10, rtol=1e-10)
    elsewhere = torch.randint(1, 41, (1, 7))
    m.thaw_metric().freeze_metric(elsewhere)
    assert not torch.allclose(m(ids, use_cache=False).logits, before, atol=1e-6)
    assert torch.equal(m.thaw_metric()(ids, use_cache=False).logits, before)


def test_save_and_load_keep_the_metric(tmp_path):
    m, ids = small().freeze_metric(torch.randint(1, 41, (2, 9))), torch.randint(1, 41, (2, 7))
    m.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), PLDRConfig)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, PLDRForCausalLM) and again.config.metric == "cached"
    assert torch.equal(again(ids).logits, m(ids).logits)
    assert torch.equal(greedy(again.thaw_metric(), ids).sequences, greedy(m.thaw_metric(), ids).sequences)


def test_a_g_cache_is_saved_and_belongs_to_one_model(tmp_path):
    m, ids = small(), torch.randint(1, 41, (1, 7))
    cache = m.g_cache(ids)
    cache.save(tmp_path / "g.safetensors")
    again = GCache.load(tmp_path / "g.safetensors")
    assert again.source == cache.source == m.fingerprint()
    want = m(ids, use_cache=False).logits
    torch.testing.assert_close(m.use_g_cache(again)(ids).logits, want, atol=1e-5, rtol=1e-5)
    twin = small(seed=1)
    before = twin(ids, use_cache=False).logits
    with pytest.raises(ValueError, match="G-cache of another model"):
        twin.use_g_cache(again)
    assert twin.config.metric == "learned" and torch.equal(twin(ids, use_cache=False).logits, before)
    assert twin.use_g_cache(again, any_source=True).config.metric == "cached"
    with pytest.raises(ValueError, match="2 layers, the model has 3"):
        small(num_hidden_layers=3).use_g_cache(again)
    with pytest.raises(ValueError, match=r"must be \(H, D, D\)=\(4, 4, 4\).* another model"):
        small(num_attention_heads=4).use_g_cache(again)
    with pytest.raises(ValueError, match="no learner"):
        attnlib.deploy(m).use_g_cache(again)


# ---- training


def test_it_learns_with_the_authors_regulariser():
    m = small(lift=0.5, loss_weights={"dag_lm": 0.01, "dag_p": 0.01, "dag_g": 0.01}).train()
    ids = torch.arange(1, 41).repeat(2, 1)[:, :24]
    out = m(ids, labels=ids)
    bare = m(ids)
    losses = out.mechanism_losses
    assert set(losses) == {"dag_lm", "dag_p", "dag_g"} and all(v.item() > 0 for v in losses.values())
    plain = torch.nn.functional.cross_entropy(bare.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, plain + 0.01 * sum(losses.values()))
    optimizer = torch.optim.AdamW(m.parameters(), lr=3e-3)
    first = out.loss.item()
    for _ in range(25):
        loss = m(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first


def test_initialisation_is_theirs():
    m = small(hidden_size=64, vocab_size=500)
    assert 0.95 < m.model.embed_tokens.weight.std().item() < 1.05
    assert m.lm_head.bias.abs().max().item() == 0
    bound = (6 / (64 + 500)) ** 0.5
    assert 0.95 * bound < m.lm_head.weight.abs().max().item() <= bound


def test_gradient_checkpointing():
    m = small().train()
    ids = torch.randint(1, 41, (2, 9))
    m(ids, labels=ids).loss.backward()
    want = {n: p.grad.clone() for n, p in m.named_parameters()}
    m.zero_grad()
    m.gradient_checkpointing_enable()
    m(ids, labels=ids).loss.backward()
    for n, p in m.named_parameters():
        torch.testing.assert_close(p.grad, want[n], atol=1e-5, rtol=1e-5)


def test_bad_input():
    with pytest.raises(ValueError, match="num_attention_heads=3 must divide hidden_size=16"):
        PLDRConfig(hidden_size=16, num_attention_heads=3)
    m = small().freeze_metric(torch.ones(1, 4).long())
    with pytest.raises(ValueError, match="thaw_metric"):
        m.deductive_outputs(torch.ones(1, 4).long())
    with pytest.raises(ValueError, match="thaw_metric"):
        m.freeze_metric(torch.ones(1, 4).long())


def test_a_file_that_is_no_g_cache(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="not a G-cache"):
        GCache.load(tmp_path / "x.safetensors")


def test_compiles_whole():
    m = small().train()
    ids = torch.randint(1, 41, (2, 9))
    torch._dynamo.reset()
    loss = torch.compile(m, backend="aot_eager", fullgraph=True)(ids, labels=ids).loss
    torch.testing.assert_close(loss, m(ids, labels=ids).loss, atol=1e-5, rtol=1e-5)


def test_a_model_without_metric_learners(tmp_path):
    """The ablation: trained with metrics that are given; the same as a frozen model with those metrics."""
    torch.manual_seed(0)
    settings = dict(vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=9)
    m = PLDRForCausalLM(PLDRConfig(**settings, metric="fixed", activation="gelu")).eval()
    assert not any("learner" in name for name, _ in m.named_parameters())
    metrics = [(torch.rand(1, 2, 4, 4), torch.randn(1, 2, 4, 4)) for _ in range(2)]
    m.use_g_cache(metrics, any_source=True)
    whole = PLDRForCausalLM(PLDRConfig(**settings, metric_hidden=3, residual_units=1, activation="gelu")).eval()
    whole.load_state_dict(m.state_dict(), strict=False)
    ids = torch.randint(0, 30, (2, 6))
    torch.testing.assert_close(m(ids).logits, whole.use_g_cache(metrics, any_source=True)(ids).logits)
    m.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, m(ids).logits)
    with pytest.raises(ValueError, match="no learner"):
        m.fingerprint()
