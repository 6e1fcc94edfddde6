"""Task tokens: rows beside a frozen model, heads at their last states, also behind generate() with beams."""

import copy
import pickle

import pytest
import torch
from torch import nn

from attnlib.models.multimodal.task_tokens import TaskTokens, UseTaskTokens

transformers = pytest.importorskip("transformers")

from hooks.models import language_model, prompt  # noqa: E402
from hooks.qwen_vl import qwen_vl, qwen_vl_inputs  # noqa: E402
from hooks.test_reading import padded_llava  # noqa: E402

import attnlib  # noqa: E402

BOX, MASK, BEGIN = 55, 56, 57
FAMILIES = {
    "llama": lambda: (language_model(), prompt()),
    "llava": padded_llava,
    "qwen2-vl": lambda: (qwen_vl(), qwen_vl_inputs()),
}


def tokens(**changes):
    torch.manual_seed(3)
    heads = {"box": nn.Linear(32, 4), "mask": nn.Linear(32, 6), "begin": None}
    return TaskTokens({"box": BOX, "mask": MASK, "begin": BEGIN}, **{"dim": 32, "heads": heads, **changes})


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request):
    model, inputs = FAMILIES[request.param]()
    ids = inputs["input_ids"]
    ids[ids >= 55] = torch.where((ids[ids >= 55] < 58), 5, ids[ids >= 55])
    ids[:, -4], ids[0, -2], ids[1, -1] = BOX, BOX, MASK
    return model, inputs


def test_rows_are_put_and_all_others_are_the_same_bits(family):
    model, inputs = family
    t, other = tokens(), copy.deepcopy(model)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    with torch.no_grad():
        for name, i in t.tokens.items():
            other.get_input_embeddings().weight[i] = t.rows[list(t.tokens).index(name)]
        want = other(**inputs).logits
    with attnlib.attach(model, use := UseTaskTokens(t)) as session:
        got = model(**inputs).logits
        assert session.results["task-tokens"] == {"box": 3, "mask": 1, "begin": 0}
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    said = use.read()
    assert said["box"].output.shape == (3, 4) and said["box"].sample.tolist() == [0, 0, 1]
    length = inputs["input_ids"].shape[1]
    assert said["box"].slot.tolist() == [length - 4, length - 2, length - 4] and said["mask"].output.shape == (1, 6)
    said["box"].output.sum().backward()
    assert float(t.rows.grad[0].abs().sum()) > 0 and not t.rows.grad[2].any()
    assert t.heads["mask"].weight.grad is None  # absent from the loss: no gradient
    torch.optim.SGD(t.parameters(), 0.1).step()
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    model.zero_grad()


def test_a_sample_without_task_tokens_has_the_plain_loss(family):
    model, inputs = family
    inputs = {**inputs, "input_ids": inputs["input_ids"].clone()}
    ids = inputs["input_ids"]
    ids[(ids >= 55) & (ids < 58)] = 5
    with torch.no_grad():
        want = model(**inputs, labels=ids).loss
        with attnlib.attach(model, use := UseTaskTokens(tokens())):
            got = model(**inputs, labels=ids).loss
    assert torch.equal(got, want) and use.read() == {}


@pytest.mark.parametrize(
    "mode", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}]
)
def test_states_behind_generate_are_those_of_the_whole_sequence(family, mode):
    model, inputs = family
    t = tokens(outputs=True)
    with torch.no_grad():
        t.out_rows.copy_(torch.randn_like(t.out_rows) * 3)  # chosen often
    with attnlib.attach(model, use := UseTaskTokens(t)), torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False, **mode)
        found = use.found(out)
    assert len(found["box"].sample) > 3 or len(found["mask"].sample) > 1  # some were generated
    per = len(out) // 2
    rows = [r // per for r in range(len(out))]
    whole = {
        "input_ids": out,
        "attention_mask": torch.cat(
            [inputs["attention_mask"][rows], torch.ones(len(out), out.shape[1] - inputs["input_ids"].shape[1]).long()],
            1,
        ),
    }
    if "image_grid_thw" in inputs:
        whole |= {
            "image_grid_thw": inputs["image_grid_thw"][rows], "mm_token_type_ids": (out == 62).int(),
            "pixel_values": torch.cat([inputs["pixel_values"].view(2, 16, -1)[r] for r in rows]),
        }  # fmt: skip
    elif "pixel_values" in inputs:
        whole["pixel_values"] = inputs["pixel_values"][rows]
    if bool((out[:, inputs["input_ids"].shape[1] :] == 62).any()):
        pytest.skip("an image token was generated")
    with attnlib.attach(model, again := UseTaskTokens(t)), torch.no_grad():
        model(**whole)
        want = again.read()
    for name in found:
        last = out.shape[1] - 1
        keep = want[name].slot != last  # the last token was never read
        assert torch.equal(found[name].sample, want[name].sample[keep])
        assert torch.equal(found[name].slot, want[name].slot[keep])
        torch.testing.assert_close(found[name].output, want[name].output[keep], atol=1e-4, rtol=1e-4)


def test_company_that_runs_the_model_or_evicts_keys_changes_no_state():
    from attnlib.cache import SnapKV
    from attnlib.hooks import Intervention

    class Runs(Intervention):
        """Reads the sequence once more, in a branch, as contrastive decoding does."""

        def on_logits(self, ids, logits):
            with self.session.at(branch="again"), torch.no_grad():
                self.session.model(input_ids=ids.flip(1), use_cache=False)
            return logits

    model, inputs = language_model(), prompt()
    t = tokens(outputs=True)
    with torch.no_grad():
        t.out_rows.copy_(torch.randn_like(t.out_rows) * 3)
    found = {}
    for name, company in {"alone": [], "runs": [Runs()]}.items():
        with torch.no_grad(), attnlib.attach(model, *company, use := UseTaskTokens(t)):
            out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
            found[name] = (out, use.found(out)["box"].states)
    assert torch.equal(found["alone"][0], found["runs"][0]) and torch.equal(found["alone"][1], found["runs"][1])
    with torch.no_grad(), attnlib.attach(model, SnapKV(cap=8, window_size=3, kernel_size=3), use := UseTaskTokens(t)):
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert len(use.found(out)["box"].states)


def test_rows_of_the_head_are_learned_beside_it():
    model, inputs = language_model(), prompt()
    t = tokens(outputs=True, start=model.get_input_embeddings().weight)
    other = copy.deepcopy(model)
    with torch.no_grad():
        t.out_rows.normal_()
        for row, i in zip(t.out_rows, t.tokens.values(), strict=True):
            other.lm_head.weight[i] = row
        want = other(**inputs).logits
    with attnlib.attach(model, UseTaskTokens(t)):
        got = model(**inputs).logits
        got[..., BOX].sum().backward()
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    assert float(t.out_rows.grad[0].abs().sum()) > 0 and not t.out_rows.grad[1].any()


def test_features_take_the_places_of_their_tokens_for_beams_too():
    model, inputs = language_model(), prompt()
    ids = inputs["input_ids"]
    ids[ids >= 55] = 5
    ids[0, 6:8], ids[1, 9] = BEGIN, BEGIN
    features = [torch.randn(2, 32), torch.randn(1, 32)]
    t = tokens()
    embeds = model.get_input_embeddings()(ids).detach().clone()
    embeds[0, 6:8], embeds[1, 9] = features[0], features[1][0]
    mask = inputs["attention_mask"]
    with torch.no_grad():
        want = model(inputs_embeds=embeds, attention_mask=mask).logits
        beams = model.generate(
            inputs_embeds=embeds, attention_mask=mask, max_new_tokens=4, num_beams=3, do_sample=False
        )
        with attnlib.attach(model, UseTaskTokens(t, {"begin": features})):
            got = model(**inputs).logits
            for mode in ({}, {"use_cache": False}):
                mine = model.generate(**inputs, max_new_tokens=4, num_beams=3, do_sample=False, **mode)
                assert torch.equal(mine[:, ids.shape[1] :], beams)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    with attnlib.attach(model, UseTaskTokens(t, {"begin": features[::-1]})):
        with pytest.raises(ValueError, match="sample 0 has 2 tokens 'begin' .57. and 1 features"):
            model(**inputs)
    with attnlib.attach(model, UseTaskTokens(t, {"begin": []})):
        with pytest.raises(ValueError, match="features of 0 samples, and the batch has 2"):
            model(**inputs)


def test_saved_and_loaded_without_the_model(tmp_path):
    from safetensors.torch import load_file, save_file

    t = tokens(outputs=True)
    save_file(t.state_dict(), tmp_path / "tokens.safetensors")
    assert {k.split(".")[0] for k in t.state_dict()} == {"rows", "out_rows", "heads"}
    new = tokens(outputs=True)
    nn.init.zeros_(new.rows)
    new.load_state_dict(load_file(tmp_path / "tokens.safetensors"))
    ids, states = torch.tensor([[BOX, 1, BOX]]), torch.randn(1, 3, 32)
    for other in (new, copy.deepcopy(t), pickle.loads(pickle.dumps(t))):
        assert torch.equal(other(ids, states)["box"].output, t(ids, states)["box"].output)
    assert tokens(start=torch.eye(64, 32)).rows[0].equal(torch.eye(64, 32)[BOX])


def test_bfloat16_empty_batches_and_foreign_heads():
    t = tokens().to(torch.bfloat16)
    ids = torch.tensor([[BOX, 1]])
    assert t.embed(ids, torch.randn(1, 2, 32).bfloat16()).dtype == torch.bfloat16
    assert t(ids[:0], torch.zeros(0, 2, 32).bfloat16()) == {} and t.embed(ids[:0], torch.zeros(0, 2, 32)).shape[0] == 0
    swapped = TaskTokens({"word": 5}, 32, {"word": nn.Sequential(nn.Linear(32, 8), nn.Unflatten(1, (2, 4)))})
    assert swapped(torch.tensor([[5, 5]]), torch.randn(1, 2, 32))["word"].output.shape == (2, 2, 4)


def test_what_does_not_fit_is_told_by_name():
    with pytest.raises(ValueError, match="token 'mask' has no head; give"):
        TaskTokens({"box": 1, "mask": 2}, 8, {"box": nn.Linear(8, 4)})
    with pytest.raises(ValueError, match="heads names 'other', which is none"):
        TaskTokens({"box": 1}, 8, {"box": None, "other": nn.Linear(8, 4)})
    with pytest.raises(ValueError, match="one id to two names"):
        TaskTokens({"box": 1, "mask": 1}, 8, {"box": None, "mask": None})
    with pytest.raises(TypeError, match=r"heads\['box'\] must be a module"):
        TaskTokens({"box": 1}, 8, {"box": lambda x: x})
    with pytest.raises(ValueError, match="start has 4 rows, and tokens names"):
        TaskTokens({"box": 5}, 8, {"box": None}, start=torch.zeros(4, 8))
    t = tokens()
    ids, states = torch.tensor([[BEGIN]]), torch.zeros(1, 1, 32)
    with pytest.raises(ValueError, match="'begin' has a row, but no head"):
        t(ids, states, names=["begin"])
    with pytest.raises(ValueError, match="'nobody' is none of the tokens"):
        t(ids, states, names=["nobody"])
    with pytest.raises(ValueError, match="states"):
        t(ids, states[..., 1:])
    model = language_model()
    with pytest.raises(ValueError, match="knows 64 tokens; make room first: model.resize_token_embeddings.100"):
        attnlib.attach(model, UseTaskTokens(TaskTokens({"box": 99}, 32, {"box": None})))
    with pytest.raises(ValueError, match="dim=8, and LlamaForCausalLM embeds in 32"):
        attnlib.attach(model, UseTaskTokens(TaskTokens({"box": 9}, 8, {"box": None})))
    with pytest.raises(RuntimeError, match="no tokens were read yet"):
        UseTaskTokens(t).read()
    with attnlib.attach(model, use := UseTaskTokens(t)):
        model.generate(**prompt(), max_new_tokens=1)
        with pytest.raises(ValueError, match="sequences has 3 rows, and the last generate.. answered 2 prompts"):
            use.found(torch.zeros(3, 4, dtype=torch.long))
