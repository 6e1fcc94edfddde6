"""Releases of transformers: what is private stands in one file, and nothing runs blind outside the tested range."""

import re
import sys
from pathlib import Path

import pytest
import torch

hf = pytest.importorskip("transformers")

import attnlib  # noqa: E402
from attnlib.cache import SnapKV  # noqa: E402
from attnlib.hooks import Record  # noqa: E402
from attnlib.hooks.hf import names  # noqa: E402
from hooks.models import language_model  # noqa: E402

SOURCE = Path(attnlib.__file__).parent

#: What is not public in transformers, as it would be written in code.
PRIVATE = re.compile(
    r"""["'.](past_key_values|layer_past|_get_logits_processor|_attn_implementation\w*|rotary_emb|position_embeddings"""
    r"""|apply_rotary_pos_emb|vision_tower|mm_encoder_outputs|ALL_ATTENTION_FUNCTIONS|eager_attention_forward)\b"""
    r"""|\b(cache_utils|masking_utils|modeling_utils)\b"""
)

#: Files that may say some: our own transformers models, whose arguments and cache layers are transformers' own.
OURS = {"models/language.py", "models/pldr.py", "hooks/hf/state.py"}

#: Keys of authors' state dicts, arguments of diffusers, models that benchmarks build.
ELSEWHERE = (
    "hooks/hf/names.py", "hooks/diffusers_adapter.py", "nn/", "models/backbones/", "models/diffusion/", "bench/",
)  # fmt: skip


def test_private_names_stand_in_one_file():
    said = []
    for path in sorted(SOURCE.rglob("*.py")):
        place = path.relative_to(SOURCE).as_posix()
        if place in OURS or place.startswith(ELSEWHERE):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if PRIVATE.search(line):
                said.append(f"{place}:{number}: {line.strip()}")
    assert not said, "\n".join(said)
    assert PRIVATE.search('x.get("past_key_values")') and PRIVATE.search("from transformers import cache_utils")


def release(monkeypatch, version):
    """Say that another release is installed; the module in ``sys.modules`` is another one after its first use."""
    hf.AutoModel  # noqa: B018
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)


@pytest.fixture
def model():
    return language_model("llama").eval()


@pytest.mark.parametrize("version", ["5.99.0", "6.0.0.dev0", "5.2.0", "4.57.1"])
def test_outside_the_range_a_model_is_looked_at_first(model, version, monkeypatch):
    release(monkeypatch, version)
    with pytest.warns(UserWarning, match=f"{version} is outside the tested range .* passed"):
        session = attnlib.attach(model, Record(layers=[0]))
    session.detach()


@pytest.mark.parametrize("version", [names.OLDEST + ".0", hf.__version__])
def test_inside_the_range_nothing_is_run_before(model, version, monkeypatch):
    release(monkeypatch, version)
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    attnlib.attach(model, Record(layers=[0])).detach()
    handle.remove()
    assert not calls


def test_the_self_check_leaves_modes_and_random_state(model, monkeypatch):
    release(monkeypatch, "5.99.0")
    model.train()
    model.model.layers[0].eval()
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match="outside the tested range"):
        attnlib.attach(model, Record(layers=[0])).detach()
    assert torch.equal(state, torch.get_rng_state())
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training


@pytest.mark.parametrize(
    "make",
    [
        lambda: hf.BertModel(hf.BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=30,
                                           intermediate_size=16)),
        lambda: hf.ViTModel(hf.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8,
                                         patch_size=4, intermediate_size=16)),
        lambda: hf.BartForConditionalGeneration(hf.BartConfig(
            d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
            vocab_size=30, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=40)),
    ],
    ids=["bert", "vit", "bart"],
)  # fmt: skip
def test_models_of_other_kinds_are_looked_at_too(make, monkeypatch):
    model = make().eval()
    release(monkeypatch, "5.99.0")
    with pytest.warns(UserWarning, match="passed"):
        attnlib.attach(model, Record()).detach()


def test_a_cache_that_is_not_seen_is_refused_by_version(model, monkeypatch):
    """What 5.24 did to code written for 5.23: the cache came under another name, and went unseen."""
    release(monkeypatch, "5.99.0")
    monkeypatch.setattr("attnlib.hooks.hf.layer.cache_in", lambda given: None)
    with pytest.raises(RuntimeError, match=r"transformers 5\.99\.0 is outside .*'decode', 5, \[5\].*cache was not"):
        attnlib.attach(model, Record(layers=[0]))
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_a_kernel_that_changed_is_refused_by_version(model, monkeypatch):
    from attnlib.hooks.hf import layer

    release(monkeypatch, "5.99.0")
    right = layer.LayerRuntime.run

    def wrong(self, *args, **kwargs):
        out, weights = right(self, *args, **kwargs)
        return out * 1.01, weights

    monkeypatch.setattr(layer.LayerRuntime, "run", wrong)
    with pytest.raises(RuntimeError, match="changes nothing changed the output"):
        attnlib.attach(model, Record(layers=[0]))


def test_a_cache_under_a_name_nobody_told_us_is_followed(model):
    """Caches are known by type: a model that renames the argument again is followed all the same."""
    given = {"hidden_states": torch.zeros(1), "kv_store": hf.DynamicCache()}
    assert names.cache_name(given) == "kv_store" and names.cached_tokens(given) == 0
    assert names.without_cache(given).keys() == {"hidden_states"}


def test_forwards_that_hide_their_cache_are_refused(model):
    class Hidden(type(model)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model.__class__ = Hidden
    with pytest.raises(ValueError, match=r"Hidden.forward\(args, kwargs\) hides its arguments"):
        attnlib.attach(model, SnapKV(ratio=0.5))


def test_a_cache_updated_under_no_known_name_is_refused():
    class Attention(torch.nn.Module):
        layer_idx = 0

        def forward(self, hidden_states, memory=None):
            return memory.update(hidden_states, hidden_states, self.layer_idx)

    with pytest.raises(ValueError, match=r"under none of the names \['cache', .* arguments are \['hidden_states', 'me"):
        names.cache_parameter(Attention())


def test_crop_means_the_same_in_every_release(model):
    cache = model(torch.arange(3, 9)[None], use_cache=True)
    cache = names.cache_out(cache)
    names.crop(cache, 2)
    assert cache.get_seq_length() == 4
    assert names.tokens_to_remove(-3, 10) == 3
