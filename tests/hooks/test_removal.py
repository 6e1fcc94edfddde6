"""Tokens that leave the sequence: decoding as the same model whose later layers may not read the removed keys."""

import pytest
import torch

from hooks.models import SIZES, language_model, prompt, release, scores

transformers = pytest.importorskip("transformers")

import attnlib  # noqa: E402
from attnlib.cache import SnapKV  # noqa: E402
from attnlib.hooks import Intervention, Record, TokenTypes  # noqa: E402
from attnlib.hooks.choose import pack, take  # noqa: E402
from attnlib.hooks.hf.removal import decode_mask, prompt_mask  # noqa: E402
from hooks.llava import IMAGE_ID, llava, llava_inputs  # noqa: E402
from hooks.pictures import image_slots, picture_inputs, picture_model  # noqa: E402


class Drop(Intervention):
    """Removes given slots: ``{layer: (B, N) boolean, True stays}``."""

    name = "drop"
    kinds = ("self",)

    def __init__(self, keep, compact=False):
        self.keep, self.layers, self.compact_positions = keep, sorted(keep), compact
        self.sites, self.lengths = [], []

    def on_tokens(self, site, hidden):
        self.sites.append(site)
        keep = self.keep[site.layer]
        keep = keep.repeat_interleave(hidden.shape[0] // keep.shape[0], 0)
        if keep.shape[1] < site.q_pos.max() + 1:  # a prompt that is read again with new tokens
            keep = torch.nn.functional.pad(keep, (0, int(site.q_pos.max()) + 1 - keep.shape[1]), value=True)
        here = site.per_query(keep)
        if site.q_pos.dim() == 2:
            here = here & (site.q_pos >= 0)
        index = pack(here)
        return hidden.gather(1, index.clamp(min=0).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])), index

    def on_removed(self, lengths):
        self.lengths.append(lengths)


class Forbid(Intervention):
    """The oracle: nothing is removed, but from each layer on nobody reads the slots that have left."""

    name = "forbid"
    kinds = ("self",)

    def __init__(self, keep):
        self.keep = keep

    def around_attention(self, site, q, k, v, call):
        allowed = site.mask.dense(q.device)
        for layer, keep in self.keep.items():
            if site.layer >= layer:
                stays = torch.ones(keep.shape[0], site.n_keys, dtype=torch.bool)
                stays[:, : keep.shape[1]] = keep
                stays = stays.repeat_interleave(q.shape[0] // keep.shape[0], 0)
                allowed = allowed & stays[:, None, None]
        return call(q, k, v, mask=allowed)


def keeps(inputs, layers=(1,), seed=0, ragged=True):
    """Random tokens that stay, fewer in each later layer; the last one always stays."""
    torch.manual_seed(seed)
    batch, n = inputs["input_ids"].shape
    out, stay = {}, torch.ones(batch, n, dtype=torch.bool)
    for layer in layers:
        order = torch.rand(batch, n).masked_fill(~stay, 2.0).argsort(1)
        for row in range(batch):
            stay[row, order[row, : 4 + (2 * row if ragged else 0)]] = False
        stay[:, -1] = True
        out[layer] = stay.clone()
    return out


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static": {"cache_implementation": "static"},
    "none": {"use_cache": False},
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("layers", [(0,), (1,), (1, 2), (0, 2)])
def test_decoding_equals_forbidden_keys(family, implementation, layers):
    model = language_model(family, attn_implementation=implementation)
    inputs = prompt(pad=(5, 0))
    keep = keeps(inputs, layers)
    with attnlib.attach(model, Forbid(keep)):
        want, ids = scores(model, inputs)
    with attnlib.attach(model, Drop(keep)):
        got, mine = scores(model, inputs)
    close(got, want)
    assert torch.equal(ids, mine)
    assert not torch.allclose(scores(model, inputs)[0][0], got[0], atol=1e-3)


@pytest.mark.parametrize(
    "name, settings",
    [
        ("Qwen3", {"head_dim": 8}),
        ("Phi3", {}),
        ("GPTNeoX", {}),
        ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
        ("Gemma", {"head_dim": 8}),
        ("Mixtral", {"num_local_experts": 2}),
    ],
)
def test_other_families(name, settings):
    """Other blocks, names of arguments and kinds of positions."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **settings})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    inputs = prompt()
    keep = keeps(inputs, (1, 2))
    with torch.no_grad():
        want = model(**inputs).logits[:, -1]
    with attnlib.attach(model, Drop(keep)):
        again, _ = scores(model, inputs, use_cache=False)
        got, _ = scores(model, inputs)
    close(got, again)
    assert not torch.allclose(got[0], want, atol=1e-3)
    with attnlib.attach(model, Forbid(keep)):
        want, _ = scores(model, inputs)
    close(got, want)


@pytest.mark.parametrize("mode", sorted(MODES))
@pytest.mark.parametrize("pad", [(0, 0), (5, 0)])
def test_every_way_of_decoding(mode, pad):
    model, inputs = language_model(), prompt(pad=pad)
    keep = keeps(inputs, (1, 2), ragged=bool(pad[0]))
    with attnlib.attach(model, Forbid(keep)):
        want, ids = scores(model, inputs, **MODES[mode])
    with attnlib.attach(model, Drop(keep)):
        got, mine = scores(model, inputs, **MODES[mode])
    close(got, want)
    assert torch.equal(ids, mine)


def test_sampling_and_several_answers():
    model, inputs = language_model(), prompt()
    keep = keeps(inputs)
    outs = []
    for i in (Forbid(keep), Drop(keep)):
        with attnlib.attach(model, i):
            torch.manual_seed(3)
            outs.append(model.generate(**inputs, max_new_tokens=6, do_sample=True, num_return_sequences=2))
    assert torch.equal(*outs)


def test_nothing_removed_is_bit_exact():
    model, inputs = language_model(), prompt()
    before = scores(model, inputs)

    class Nothing(Drop):
        def on_tokens(self, site, hidden):
            return None

    with attnlib.attach(model, Nothing({1: None})):
        after = scores(model, inputs)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


def test_attached_and_unattached_layers_behind_are_alike():
    model, inputs = language_model(), prompt()
    keep = keeps(inputs, (1,))
    with attnlib.attach(model, Drop(keep)):
        want, _ = scores(model, inputs)
    for stage in ("around_attention", "around_sublayer", "on_block_input", "on_qkv"):

        class Sees(Intervention):
            kinds = ("self",)

            def __init__(self):
                self.shapes = []

        def around_attention(self, site, q, k, v, call):
            self.shapes.append((site.layer, site.phase, q.shape[2], k.shape[2], site.mask.dense().shape[-1]))
            return call(q, k, v)

        def around_sublayer(self, site, hidden, call):
            self.shapes.append((site.layer, site.phase, hidden.shape[1], site.n_keys, site.mask.dense().shape[-1]))
            return call(hidden)

        def on_block_input(self, site, hidden):
            self.shapes.append((site.layer, site.phase, hidden.shape[1], site.n_keys, site.mask.dense().shape[-1]))

        def on_qkv(self, site, q, k, v):
            return q, k, v

        setattr(Sees, stage, locals()[stage])
        sees = Sees()
        with attnlib.attach(model, Drop(keep), sees):
            got, _ = scores(model, inputs)
        close(got, want)
        if stage != "on_qkv":
            count = int(keep[1].sum(1).max())
            assert {m for layer, phase, n, m, _ in sees.shapes if phase == "decode"} == {
                *range(21, 25), *range(count + 1, count + 5)
            }  # fmt: skip
            for layer, phase, n, m, width in sees.shapes:
                if phase == "prefill":
                    assert (n, m, width) == ((20,) * 3 if layer == 0 else (count,) * 3)
                else:
                    assert n == 1 and m == width


def test_sites_behind_a_removal_know_true_slots():
    model, inputs = language_model(), prompt()
    inputs["input_ids"][:, 8:12] = 61
    keep = keeps(inputs, (1,))

    class Look(Intervention):
        needs_types = True
        kinds = ("self",)
        layers = (2,)

        def __init__(self):
            self.sites = []

        def on_output(self, site, out):
            self.sites.append(site)
            return out

    look = Look()
    with attnlib.attach(model, Drop(keep), look, token_types=TokenTypes(61)):
        scores(model, inputs, new=3)
    first, last = look.sites[0], look.sites[-1]
    slots = pack(keep[1])
    assert torch.equal(first.q_pos, slots)
    assert torch.equal(first.k_pos, slots[:, None].expand(-1, 2, -1))
    types = TokenTypes(61)(inputs["input_ids"]).masked_fill(inputs["attention_mask"] == 0, 0)
    want = types.gather(1, slots.clamp(min=0)).masked_fill(slots < 0, 0)
    assert torch.equal(first.q_types, want) and torch.equal(first.k_types[:, 0], want)
    assert torch.equal(last.k_pos[:, 0], torch.cat([slots, torch.tensor([[20, 21]]).expand(2, -1)], 1))
    assert last.q_pos.tolist() == [21] and (last.k_types[..., -2:] == 5).all()
    # Masks name exactly the tokens that are left and exist.
    allowed = last.mask.dense()[:, 0, 0]
    real = (slots >= 0) & (types.gather(1, slots.clamp(min=0)) != 0)
    assert torch.equal(allowed[:, :-2], real)


def test_caches_are_shorter_and_count_every_token():
    model, inputs = language_model(), prompt()
    keep = keeps(inputs, (1, 2))
    with attnlib.attach(model, Drop(keep)):
        out = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True)
    counts = [20, int(keep[1].sum(1).max()), int(keep[2].sum(1).max())]
    cache = out.past_key_values
    assert [layer.keys.shape[2] for layer in cache.layers] == [c + 2 for c in counts]
    assert [layer.get_seq_length() for layer in cache.layers] == [22] * 3
    with pytest.raises(RuntimeError, match="session that is over"):
        model(input_ids=out.sequences[:, -1:], past_key_values=cache)


def test_several_tokens_at_once_while_decoding():
    """A second turn: nothing more is removed, and all new tokens read what is left."""
    model, inputs = language_model(), prompt()
    more = torch.randint(3, 60, (2, 4))
    keep = keeps(inputs, (1,))
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 4, dtype=torch.long)], 1)
    got = []
    for i in (Forbid(keep), Drop(keep)):
        with attnlib.attach(model, i), torch.no_grad():
            first = model(**inputs, use_cache=True)
            got.append(model(input_ids=more, attention_mask=mask, past_key_values=first.past_key_values).logits)
    close(*got)


def test_outputs_keep_their_length_and_states_of_kept_tokens():
    model, inputs = language_model(), prompt()
    keep = keeps(inputs, (1,))
    with torch.no_grad():
        with attnlib.attach(model, Forbid(keep)):
            want = model(**inputs).logits
        with attnlib.attach(model, Drop(keep)):
            got = model(**inputs).logits
    assert got.shape == want.shape
    real = keep[1] & (inputs["attention_mask"] == 1)
    close(got[real], want[real])
    # A removed token shows the state with which it left: the one entering block 1.
    with torch.no_grad():
        entering = model(**inputs, output_hidden_states=True).hidden_states[1]
        frozen = model.lm_head(model.model.norm(entering))
    close(got[~keep[1]], frozen[~keep[1]])


def test_training_behind_a_removal():
    model, inputs = language_model(), prompt(pad=(0, 0))
    keep = keeps(inputs, (1,), ragged=False)
    gone = ~keep[1]
    follows = torch.nn.functional.pad(gone, (1, 0))[:, :-1]
    labels = inputs["input_ids"].masked_fill(follows, -100)
    grads = []
    for i in (Forbid(keep), Drop(keep)):
        model.zero_grad()
        with attnlib.attach(model, i):
            model(**inputs, labels=labels, use_cache=False).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        close(a, b)
    with attnlib.attach(model, Drop(keep)), pytest.raises(ValueError, match="labels ask for the prediction at token"):
        model(**inputs, labels=inputs["input_ids"])


def test_gradients_of_ragged_batches_are_finite():
    model, inputs = language_model(), prompt()
    keep = keeps(inputs, (1, 2))
    model.zero_grad()
    with attnlib.attach(model, Drop(keep)):
        model(**inputs).logits[:, -1].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_gradient_checkpointing():
    model, inputs = language_model(), prompt(pad=(0, 0))
    keep = keeps(inputs, (1,))
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    grads = []
    model.train()
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        with attnlib.attach(model, Drop(keep)):
            grads.append(torch.autograd.grad(model(inputs_embeds=embeds).logits[:, -1].sum(), embeds)[0])
    close(*grads)


def test_contiguous_positions_equal_a_shorter_prompt():
    """Removed before the first block, with positions counted anew: the same as never having written those tokens."""
    model, inputs = language_model(), prompt(pad=(0, 0))
    for pad in ((0, 0), (5, 0)):
        inputs = prompt(pad=pad)
        keep = keeps(inputs, (0,), ragged=False) if not pad[0] else keeps(inputs, (0,))
        keep[0] = keep[0] | (inputs["input_ids"] == 0)
        index = pack(keep[0])
        short = inputs["input_ids"].gather(1, index.clamp(min=0)).masked_fill(index < 0, 0)
        shorter = {"input_ids": short, "attention_mask": (short != 0).long()}
        for mode in ({}, {"num_beams": 2}):
            want, ids = scores(model, shorter, **mode)
            with attnlib.attach(model, Drop(keep, compact=True)):
                got, mine = scores(model, inputs, **mode)
            close(got, want)
            assert torch.equal(ids[:, -5:], mine[:, -5:])
            with attnlib.attach(model, Drop(keep)):
                assert not torch.allclose(scores(model, inputs, **mode)[0], want, atol=1e-3)


def test_contiguous_positions_survive_a_later_removal():
    """The second removal keeps the positions of the first; it equals forbidding keys in the shorter prompt."""
    model, inputs = language_model(), prompt(pad=(0, 0))
    keep = keeps(inputs, (0,), ragged=False)[0]
    index = pack(keep)
    shorter = {"input_ids": inputs["input_ids"].gather(1, index), "attention_mask": torch.ones_like(index)}
    later = keeps(shorter, (2,), ragged=False, seed=4)[2]
    with attnlib.attach(model, Forbid({2: later})):
        want, _ = scores(model, shorter)
    whole = torch.zeros_like(keep).scatter(1, index, later)
    with attnlib.attach(model, Drop({0: keep}, compact=True), Drop({2: whole})):
        got, _ = scores(model, inputs)
    close(got, want)


def test_a_cache_compressed_behind_a_removal():
    """SnapKV chooses among what is left; the oracle reads only those slots."""
    model, inputs = language_model(), prompt()
    keep = keeps(inputs, (1,))

    class Oracle(Forbid):
        def __init__(self, keep, chosen):
            super().__init__(keep)
            self.chosen = chosen

        def around_attention(self, site, q, k, v, call):
            if site.phase == "prefill" or site.layer not in self.chosen:
                return super().around_attention(site, q, k, v, call)
            kept = self.chosen[site.layer]
            allowed = torch.zeros(*kept.shape[:2], site.n_keys + 1, dtype=torch.bool)
            allowed.scatter_(-1, kept.masked_fill(kept < 0, site.n_keys), True)
            allowed = allowed[..., :-1]
            allowed[..., 20:] = True
            allowed = allowed.repeat_interleave(2, 1)[:, :, None] & site.mask.dense()
            return call(q, k, v, mask=allowed)

    for order in (0, 1):
        both = [Drop(keep), SnapKV(ratio=0.4, window_size=3)]
        with attnlib.attach(model, *(both[::-1] if order else both)) as session:
            got, _ = scores(model, inputs)
        chosen = {layer: entry["kept"] for layer, entry in session.results["snapkv"].items()}
        assert len(chosen) == 3
        with attnlib.attach(model, Oracle(keep, chosen)):
            want, _ = scores(model, inputs)
        close(got, want)


def test_in_a_vision_language_model_with_types_and_records():
    model = llava()
    inputs = llava_inputs(model)
    inputs["input_ids"][0, :2] = 0
    inputs["attention_mask"][0, :2] = 0
    keep = torch.ones(2, 14, dtype=torch.bool)
    keep[0, 3:7], keep[1, 4:6] = False, False
    with attnlib.attach(model, Forbid({2: keep})):
        want, _ = scores(model, inputs)
    record = Record(layers=[2], rows="all", what=("weights", "received"))
    with attnlib.attach(model, Drop({2: keep}), record, token_types=TokenTypes(IMAGE_ID)):
        got, _ = scores(model, inputs)
    close(got, want)


@pytest.mark.parametrize("technique", ["boost", "scale", "record"])
def test_other_techniques_behind_a_removal(technique):
    """They see what is left; the oracle forbids the rest to the untouched sequence."""
    from attnlib.steer import HeadScale, VisualBoost

    model = picture_model(num_hidden_layers=4)
    inputs = picture_inputs((1, 2))
    torch.manual_seed(0)
    keep = ~image_slots(inputs) | (torch.rand(inputs["input_ids"].shape) > 0.5)
    make = {
        "boost": lambda: VisualBoost(first_layer=2),
        "scale": lambda: HeadScale({2: [0.5, 1.0, 1.0, 2.0]}),
        "record": lambda: Record(layers=[2], rows="all", what=("received",)),
    }[technique]
    types = TokenTypes(IMAGE_ID)
    with attnlib.attach(model, make(), Forbid({2: keep}), token_types=types) as session:
        want, _ = scores(model, inputs)
        theirs = session.results
    with attnlib.attach(model, Drop({2: keep}), make(), token_types=types) as session:
        got, _ = scores(model, inputs)
        mine = session.results
    close(got, want)
    if technique == "record":
        # Queries that left give nothing, so only what generated tokens and kept text give can be compared.
        received = mine["record"][2]["received"]
        assert received.shape == theirs["record"][2]["received"].shape
        gone = ~keep | (inputs["attention_mask"] == 0)
        assert (received[:, :, : keep.shape[1]].transpose(1, 2)[gone] == 0).all()
        assert (received[:, :, : keep.shape[1]].transpose(1, 2)[~gone] > 0).all()
    else:
        with attnlib.attach(model, Drop({2: keep}), token_types=types):
            assert not torch.allclose(scores(model, inputs)[0], got, atol=1e-3)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        pytest.param(
            "lookup",
            marks=pytest.mark.skipif(release() < (5, 18), reason="drafts overshoot the length there"),
        ),
        "cache",
        "chunks",
    ],
)
def test_other_ways_through_generate(how, compact):
    """Drafts that are taken back, a cache of the user's own, and a limit on how much of a prompt is read at once."""
    model, inputs = language_model(), prompt(batch=1, pad=(0,))
    inputs["input_ids"][0, 5:10] = inputs["input_ids"][0, 12:17]
    keep = keeps(inputs, (1, 2))
    settings = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
    extra = {
        "lookup": lambda: {"prompt_lookup_num_tokens": 3},
        "cache": lambda: {"past_key_values": transformers.DynamicCache()},
        "chunks": lambda: {"prefill_chunk_size": 64},
    }[how]
    with attnlib.attach(model, Drop(keep, compact)):
        want = model.generate(**inputs, **settings)
        got = model.generate(**inputs, **settings, **extra())
    assert torch.equal(got, want)


def test_half_precision():
    model, inputs = language_model().to(torch.bfloat16), prompt()
    keep = keeps(inputs, (1, 2))
    with attnlib.attach(model, Forbid(keep)):
        want, _ = scores(model, inputs, new=1)
    with attnlib.attach(model, Drop(keep)):
        got, _ = scores(model, inputs, new=1)
    torch.testing.assert_close(got, want, atol=3e-2, rtol=3e-2)


def test_merged_tokens_go_on_with_new_states():
    """What on_tokens returns as hidden is what the block reads."""
    model, inputs = language_model(), prompt(pad=(0, 0))

    class Merge(Intervention):
        kinds = ("self",)
        layers = (1,)

        def on_tokens(self, site, hidden):
            index = torch.cat([torch.arange(3), torch.arange(8, 20)]).expand(2, -1)
            new = hidden[:, index[0]].clone()
            new[:, 2] = hidden[:, 2:8].mean(1)
            return new, index

    class Same(Intervention):
        kinds = ("self",)
        layers = (1, 2)

        def on_block_input(self, site, hidden):
            if site.layer == 1:
                hidden = hidden.clone()
                hidden[:, 2] = hidden[:, 2:8].mean(1)
                return hidden

        def around_attention(self, site, q, k, v, call):
            allowed = site.mask.dense().clone()
            allowed[..., 3:8] = False
            return call(q, k, v, mask=allowed)

    with torch.no_grad():
        with attnlib.attach(model, Same()):
            want = model(**inputs).logits[:, -1]
        with attnlib.attach(model, Merge()):
            close(model(**inputs).logits[:, -1], want)


def test_lengths_are_reported():
    model, inputs = language_model(), prompt(pad=(5, 0))
    keep = keeps(inputs, (1, 2))
    drop = Drop(keep)
    with attnlib.attach(model, drop):
        scores(model, inputs)
    (lengths,) = drop.lengths
    real = inputs["attention_mask"] == 1
    assert lengths.total == 20 and lengths.layers == (0, 1, 2)
    assert lengths.lengths == (20, int(keep[1].sum(1).max()), int(keep[2].sum(1).max()))
    assert torch.equal(lengths.tokens, torch.stack([real.sum(1), (keep[1] & real).sum(1), (keep[2] & real).sum(1)]))
    assert lengths.slots[0] is None and torch.equal(lengths.slots[2], pack(keep[2]))


def test_detaching_leaves_nothing():
    model, inputs = language_model(), prompt()
    before = scores(model, inputs)
    hooks = [(n, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()]

    class Breaks(Drop):
        def on_tokens(self, site, hidden):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), attnlib.attach(model, Breaks({1: None})):
        scores(model, inputs)
    with attnlib.attach(model, Drop(keeps(inputs))):
        scores(model, inputs)
    assert hooks == [(n, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()]
    after = scores(model, inputs)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


# ---- bad answers


@pytest.mark.parametrize(
    "answer, error, match",
    [
        (lambda h: h, TypeError, "must return None or"),
        (lambda h: (h[:, :4], torch.arange(5).expand(2, -1)), ValueError, r"must be \(2, K, 32\)"),
        (lambda h: (h[:, :2], torch.tensor([[0.0, 19.0]] * 2)), TypeError, "must be integers"),
        (lambda h: (h[:, :2], torch.tensor([[3, 1]] * 2)), ValueError, "must ascend"),
        (lambda h: (h[:, :2], torch.tensor([[3, 20]] * 2)), ValueError, "must ascend within 0 to 19"),
        (lambda h: (h[:, :2], torch.tensor([[3, -1]] * 2)), ValueError, "must ascend"),
        (lambda h: (h[:, :2], torch.tensor([[3, 18]] * 2)), ValueError, "last token of the prompt must go on"),
        (lambda h: (h[:, :0], torch.zeros(2, 0, dtype=torch.long)), ValueError, "0 tokens"),
    ],
)
def test_wrong_answers_are_refused(answer, error, match):
    class Wrong(Intervention):
        kinds = ("self",)
        layers = (1,)

        def on_tokens(self, site, hidden):
            return answer(hidden)

    model = language_model()
    with attnlib.attach(model, Wrong()), pytest.raises(error, match=match):
        model(**prompt())


def test_padding_of_an_earlier_removal_cannot_go_on():
    class Wrong(Drop):
        def on_tokens(self, site, hidden):
            if site.layer == 1:
                return super().on_tokens(site, hidden)
            return hidden, torch.arange(hidden.shape[1]).expand(2, -1)

    model, inputs = language_model(), prompt()
    keep = keeps(inputs, (1,))
    with (
        attnlib.attach(model, Wrong({1: keep[1], 2: None})),
        pytest.raises(ValueError, match="padding that stands for"),
    ):
        model(**inputs)


def test_models_that_cannot_lose_tokens_say_why():
    keep = {1: torch.ones(1, 6, dtype=torch.bool)}
    with pytest.raises(ValueError, match="attn_implementation='flex_attention'"):
        attnlib.attach(language_model(attn_implementation="flex_attention"), Drop(keep))
    sliding = language_model("mistral", sliding_window=4)
    keep[1][:, 1] = False
    inputs = prompt(batch=1, length=6, pad=())
    with attnlib.attach(sliding, Drop(keep)), pytest.raises(ValueError, match="DynamicSlidingWindowLayer"):
        sliding.generate(**inputs, max_new_tokens=2)
    with attnlib.attach(sliding, Drop(keep)), torch.no_grad():
        assert sliding(**inputs, use_cache=False).logits.shape == (1, 6, 64)


# ---- pieces


def test_masks_are_read_at_what_is_left():
    slots = torch.tensor([[-1, 0, 3], [1, 2, 3]])
    full = torch.rand(2, 1, 4, 6) > 0.3
    made = prompt_mask(full, slots, True, True)
    for b in range(2):
        for i in range(3):
            for j in range(3):
                qs, ks = int(slots[b, i]), int(slots[b, j])
                assert bool(made[b, 0, i, j]) == (qs >= 0 and ks >= 0 and bool(full[b, 0, qs, ks]))
    assert prompt_mask(None, slots[1:], False, True) is None
    causal = prompt_mask(None, slots, True, True)[:, 0]
    assert causal.tolist() == [
        [[False] * 3, [False, True, False], [False, True, True]],
        [[True, False, False], [True, True, False], [True] * 3],
    ]
    floats = prompt_mask(torch.zeros(1, 1, 4, 4), slots, True, True)
    assert floats.min() == torch.finfo(torch.float32).min and (floats[1] == 0).all()
    new = torch.cat([slots, torch.tensor([[4, 5]] * 2)], 1)[:, None]
    assert decode_mask(None, new, 2, 4, 4, True).tolist() == [
        [[[False, True, True, True, False], [False, True, True, True, True]]],
        [[[True, True, True, True, False], [True] * 5]],
    ]
    assert decode_mask(None, new[:, :, :-1], 1, 4, 4, False) is None


def test_values_are_taken_along_any_axis():
    slots = torch.tensor([[0, 2], [1, 3]])
    x = torch.randn(1, 4, 5)
    assert torch.equal(take(x, slots, 1), torch.stack([x[0, s] for s in slots]))
    x = torch.randn(3, 2, 4)
    assert torch.equal(take(x, slots, 2), torch.stack([x[:, b, slots[b]] for b in range(2)], 1))
    x = torch.randn(3, 2, 4, 5)
    assert torch.equal(take(x, slots, 2), torch.stack([x[:, b, slots[b]] for b in range(2)], 1))
