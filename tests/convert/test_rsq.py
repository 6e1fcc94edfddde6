"""RSQ: grids, GPTQ and weights of tokens against the authors' classes; rotations; whole models; bad input."""

import json

import pytest
import torch
from parity import HERE
from safetensors import safe_open
from safetensors.torch import load_file

from attnlib.convert.quantize import Grid, Moments, gptq
from attnlib.convert.rotation import hadamard, orthogonal, rotate
from attnlib.convert.rsq import WEIGHTINGS, Weighting, expand, quantize

PATH = HERE / "rsq-token-weighted-gptq.safetensors"
RECORDED = load_file(PATH)
with safe_open(PATH, "pt") as f:
    META = f.metadata()
GRIDS, RUNS, WEIGHTS = (json.loads(META[k]) for k in ("grids", "runs", "weights"))
KINDS = {
    "OriginalAttentionWeighting": "attncon", "MagnitudeWeighting": "actnorm", "MaxDiffWeighting": "actdiff",
    "TokenFreqWeighting": "tokenfreq", "MaxDistWeighting": "tokensim", "AdhocMaskingWeighting": "chunks",
}  # fmt: skip


def close(a, b, **more):
    torch.testing.assert_close(a, b, **{"atol": 1e-5, "rtol": 1e-5, **more})


@pytest.mark.parametrize("name", GRIDS)
def test_grids_equal_the_authors(name):
    grid = Grid(**GRIDS[name])
    scale = grid.fit(RECORDED["w"])
    close(scale.step, RECORDED[f"grid/{name}/scale"].expand(6, 1))
    close(scale.zero, RECORDED[f"grid/{name}/zero"].expand(6, 1))
    close(grid(RECORDED["w"]), RECORDED[f"grid/{name}/q"])


@pytest.mark.parametrize("name", RUNS)
def test_gptq_equals_the_authors(name):
    run = RUNS[name]
    moments = Moments(10)
    for i in range(3):
        moments.add(RECORDED[f"x/{i}"], RECORDED[f"r/{i}"] if run["weighted"] else None)
    close(moments.value, RECORDED[f"gptq/{name}/H"])
    got = gptq(
        RECORDED["w"], moments.value, Grid(3, symmetric=not run["asym"], clip=True), block=run.get("blocksize", 128),
        order="activity" if run.get("actorder") else "given", group=run.get("groupsize"),
        static=run.get("static_groups", False),
    )  # fmt: skip
    close(got, RECORDED[f"gptq/{name}/q"])


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_tokens_equal_the_authors(name):
    said = dict(WEIGHTS[name])
    kind = KINDS[said.pop("cls")]
    names = {"min_value": "low", "max_value": "high", "num_bins": "bins", "masking": "mask_least",
             "truncate": "drop_least", "quantile_value": "quantile", "input_or_output": "of"}  # fmt: skip
    settings = {names.get(k, k): v for k, v in said.items()}
    normalize = settings.pop("normalize", "default")
    settings |= {"per_reader": normalize if normalize in ("linear", "sqrt") else None, "spread": normalize is not None}
    if method := settings.pop("method_type", None):
        *parts, total = (int(n) for n in method.split("_"))
        settings["chunks"] = (tuple(parts), total)
    got = Weighting(kind, **settings)(
        received=RECORDED["maps"][0].sum((0, 1)), before=RECORDED["before"][0], after=RECORDED["after"][0],
        counts=RECORDED["counts"],
    )  # fmt: skip
    close(got, RECORDED[f"weights/{name}"])


def test_equal_weights_are_gptq_and_a_factor_or_an_absent_token_changes_nothing():
    x, w, r = torch.randn(2, 6, 5), torch.randn(4, 5), torch.rand(2, 6)

    def of(weights, x=x):
        moments = Moments(5)
        moments.add(x, weights)
        return moments.value

    assert torch.equal(of(torch.full((6,), 0.5)), of(None))
    assert torch.equal(gptq(w, of(torch.ones(6)), Grid()), gptq(w, of(None), Grid()))
    close(of(3 * r), of(r))
    none = torch.tensor([1.0, 1, 1, 1, 1, 0])
    close(of(none) * 5 / 6, of(None, x[:, :5]))
    split = Moments(5)
    split.add(x[:1], r[:1])
    split.add(x[1:], r[1:])
    close(split.value, of(r))
    paper = Moments(5, power=1.0)
    paper.add(x, r)
    scaled = x * (r / r.mean(1, keepdim=True))[..., None]
    close(paper.value, 2 / 2 * torch.einsum("bnc,bnd->cd", scaled, scaled))


def test_weighted_errors_are_least_with_the_weights():
    """Half of the tokens count, and lie elsewhere than the others."""
    g = torch.Generator().manual_seed(0)
    sums = dict.fromkeys(("nearest", "plain", "weighted"), 0.0)
    for _ in range(5):
        x = torch.cat([torch.randn(100, 16, generator=g) @ torch.randn(16, 16, generator=g) for _ in range(2)])[None]
        r, w, grid = torch.ones(200), torch.randn(8, 16, generator=g), Grid(3)
        r[:100] = 0.01
        plain, weighted = Moments(16), Moments(16)
        plain.add(x)
        weighted.add(x, r)
        tried = {"nearest": grid(w), "plain": gptq(w, plain.value, grid), "weighted": gptq(w, weighted.value, grid)}
        for name, q in tried.items():
            sums[name] += float((r * ((w - q) @ x[0].T).square().sum(0)).sum())
    assert sums["weighted"] < 0.9 * sums["plain"] < 0.9 * sums["nearest"]


@pytest.mark.parametrize("n", [1, 2, 8, 12, 20, 28, 36, 24, 60, 108, 576])
def test_hadamard_matrices_are_orthogonal(n):
    h = hadamard(n)
    close(h @ h.T, torch.eye(n, dtype=torch.float64))
    close(h.abs(), torch.full_like(h, n**-0.5))


def test_where_no_hadamard_matrix_is_known_a_random_rotation_stands_and_says_so():
    assert [hadamard(n) for n in (3, 6, 52, 10)] == [None] * 4
    for n, kind in ((12, "hadamard"), (10, "random")):
        q, became = orthogonal(n)
        assert became == kind
        close(q.T @ q, torch.eye(n, dtype=torch.float64))
    assert not torch.equal(orthogonal(8, seed=1)[0], orthogonal(8, seed=2)[0])


def model(kind="llama", tied=True, seed=0, dtype=torch.float32, **more):
    import transformers as T

    base = dict(num_hidden_layers=2, hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
                intermediate_size=36, vocab_size=31, tie_word_embeddings=tied, max_position_embeddings=64)  # fmt: skip
    torch.manual_seed(seed)
    config, cls = {
        "llama": (T.LlamaConfig, T.LlamaForCausalLM), "qwen2": (T.Qwen2Config, T.Qwen2ForCausalLM),
        "qwen3": (T.Qwen3Config, T.Qwen3ForCausalLM), "mistral": (T.MistralConfig, T.MistralForCausalLM),
        "gemma2": (T.Gemma2Config, T.Gemma2ForCausalLM), "gemma": (T.GemmaConfig, T.GemmaForCausalLM),
    }[kind]  # fmt: skip
    made = cls(config(**(base | more))).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (1 if p.dim() == 1 else 0))
    return made.to(dtype)


TOKENS = torch.randint(31, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_rotated_model_computes_the_same_and_is_an_ordinary_checkpoint(kind, tied, tmp_path):
    m = model(kind, tied, **({"attention_bias": True} if kind == "llama" else {}))
    y = m(TOKENS).logits
    found = rotate(m)
    close(m(TOKENS).logits, y, atol=1e-4, rtol=1e-4)
    assert (found.stream, found.heads, found.untied) == ("hadamard", "random", tied)
    assert float(m.model.norm.weight.detach().std()) == 0
    m.save_pretrained(tmp_path)
    close(type(m).from_pretrained(tmp_path)(TOKENS).logits, y, atol=1e-4, rtol=1e-4)


def test_rotation_spreads_what_stands_out():
    m = model(hidden_size=32, head_dim=8)
    with torch.no_grad():
        m.model.embed_tokens.weight[:, 3] *= 30
    peak = lambda w: float((w.abs().amax(1) / w.square().mean(1).sqrt()).mean().detach())  # noqa: E731
    before = peak(m.model.embed_tokens.weight)
    rotate(m)
    assert peak(m.model.embed_tokens.weight) < 0.6 * before


@pytest.mark.parametrize("kind", WEIGHTINGS)
def test_whole_models_take_few_values(kind, tmp_path):
    m = model()
    y = m(TOKENS).logits
    rotate(m)
    done = []
    told = quantize(m, TOKENS, 4, Weighting(kind, clusters=4), progress=lambda i, of: done.append((i, of)))
    assert done == [(1, 2), (2, 2)] and len(told.errors) == 14 and all(0 < e < 0.2 for e in told.errors.values())
    for layer in m.model.layers:
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
            assert max(len(row.unique()) for row in layer.get_submodule(name).weight) <= 16
    assert float((m(TOKENS).logits - y).detach().square().mean() / y.detach().square().mean()) < 0.2
    m.save_pretrained(tmp_path)
    again = type(m).from_pretrained(tmp_path)
    assert torch.equal(again(TOKENS).logits, m(TOKENS).logits)
    assert not again.model.layers[0]._forward_pre_hooks and not m.model.layers[0].mlp.up_proj._forward_pre_hooks


def test_gptq_loses_less_than_nearest_and_bits_help():
    y = model()(TOKENS).logits.detach()

    def gap(**settings):
        m = model()
        return quantize(m, TOKENS, **settings), float((m(TOKENS).logits - y).detach().square().mean())

    errors = {k: sum(gap(bits=3, **s)[0].errors.values()) for k, s in
              (("gptq", dict(weighting="uniform")), ("nearest", dict(method="nearest")))}  # fmt: skip
    assert errors["gptq"] < errors["nearest"]
    assert gap(bits=6)[1] < gap(bits=4)[1] < gap(bits=2)[1]


def test_layers_read_what_quantized_ones_give_and_received_attention_sums_to_heads_times_queries(monkeypatch):
    """By hand for the first layer's keys; sums of weights before they are spread."""
    import attnlib.convert.rsq as rsq

    seen = []
    raw = Weighting._raw
    monkeypatch.setattr(Weighting, "_raw", lambda self, *a: seen.append(raw(self, *a)) or seen[-1])
    m, untouched = model(), model()
    rsq.quantize(m, TOKENS, 3)
    assert len(seen) == 6
    for got in seen:
        close(got.sum(), torch.tensor(4 * 9.0))
    layer = untouched.model.layers[0]
    x = [layer.input_layernorm(untouched.model.embed_tokens(t[None])) for t in TOKENS]
    moments = Moments(24)
    for rows, received in zip(x, seen, strict=False):
        moments.add(rows.detach(), Weighting()._spread(received))
    close(m.model.layers[0].self_attn.k_proj.weight,
          gptq(layer.self_attn.k_proj.weight.detach(), moments.value, Grid(3, clip=True)))  # fmt: skip


def test_what_was_begun_is_gone_on_with(tmp_path):
    whole, begun = model(), model()
    told = quantize(whole, TOKENS, 3)

    def stop(done, of):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(begun, TOKENS, 3, resume=tmp_path, progress=stop)
    again = model()
    assert quantize(again, TOKENS, 3, resume=tmp_path).errors == told.errors
    assert torch.equal(again(TOKENS).logits, whole(TOKENS).logits)
    with pytest.raises(ValueError, match="other settings"):
        quantize(model(), TOKENS, 4, resume=tmp_path)


def test_expansion_rolls_by_parts_and_bfloat16_is_kept():
    assert expand(torch.arange(4)[None], 4).tolist() == [[0, 1, 2, 3], [3, 0, 1, 2], [2, 3, 0, 1], [1, 2, 3, 0]]
    m = model(dtype=torch.bfloat16)
    rotate(m)
    quantize(m, expand(TOKENS, 3), 4)
    assert m.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16 and torch.isfinite(m(TOKENS).logits).all()


def test_bad_input():
    import transformers as T

    for bits in (1, 9, 2.5):
        with pytest.raises((TypeError, ValueError), match="bits"):
            quantize(model(), TOKENS, bits)
    for tokens in (TOKENS[:0], TOKENS[:, :1]):
        with pytest.raises(ValueError, match="at least one sequence of two tokens"):
            quantize(model(), tokens)
    with pytest.raises(ValueError, match="kind"):
        quantize(model(), TOKENS, weighting="attention")
    with pytest.raises(ValueError, match="eval"):
        quantize(model().train(), TOKENS)
    gpt2 = T.GPT2LMHeadModel(T.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11))
    for act in (rotate, lambda m: quantize(m, TOKENS)):
        with pytest.raises(ValueError, match="model.layers"):
            act(gpt2)
        with pytest.raises(ValueError, match="which Llama's has not"):
            act(model("gemma2"))
    with pytest.raises(ValueError, match="not gain"):
        rotate(model("gemma"))
    with pytest.raises(ValueError, match="symmetric"):
        Grid(values="normal", symmetric=False)
    with pytest.raises(TypeError, match="chunks must be"):
        Weighting("chunks", chunks=3)
    with pytest.raises(TypeError, match="grid"):
        gptq(torch.ones(2, 2), torch.eye(2), 3)
    with pytest.raises(ValueError, match="exclude"):
        Weighting(bins=2, mask_least=0.5)
    with pytest.raises(ValueError, match="needs received"):
        Weighting()(before=torch.ones(3, 2))
    with pytest.raises(ValueError, match="positive"):
        gptq(torch.ones(2, 2), torch.tensor([[1.0, 2.0], [2.0, 1.0]]), Grid(), retries=0)
    with pytest.raises(ValueError, match="above 0"):
        Moments(2).add(torch.ones(1, 3, 2), torch.zeros(3))
    with pytest.raises(ValueError, match="group"):
        gptq(torch.ones(2, 2), torch.eye(2), Grid(), static=True)
    assert Weighting()(received=torch.ones(4)).tolist() == [1.0] * 4  # all alike: no 0 / 0
