"""The rotation at a site, and keys that a technique adds at given positions: two families, padding, generation."""

import pytest
import torch

pytest.importorskip("transformers")

import attnlib  # noqa: E402
from attnlib.hooks import Intervention, Rotation, with_keys  # noqa: E402
from hooks.models import call_site, dense_attention, language_model  # noqa: E402

FAMILIES = ["llama", "qwen2"]


def batch(seed=0, length=9, pad=3):
    torch.manual_seed(seed)
    ids = torch.randint(3, 60, (2, length))
    mask = torch.ones_like(ids)
    ids[0, :pad], mask[0, :pad] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


class Again(Intervention):
    """Makes the keys of some tokens once more from what the layer reads, at their own slots, and looks."""

    name = "again"
    kinds = ("self",)
    adds_keys = True
    replaces_mask = True

    def __init__(self, weight=1.0, at=None):
        self.weight, self.at, self.hidden, self.apart, self.seen = weight, at, {}, [], 0

    def around_sublayer(self, site, hidden, call):
        self.hidden[site.layer] = hidden
        return call(hidden)

    def around_attention(self, site, q, k, v, call):
        key = (site.branch, site.layer)
        if site.phase == "prefill":
            module, hidden = site.module, self.hidden[site.layer]
            fresh = module.k_proj(hidden).unflatten(-1, (-1, site.head_dim)).transpose(1, 2)
            values = module.v_proj(hidden).unflatten(-1, (-1, site.head_dim)).transpose(1, 2)
            turned = site.rotation.turn(fresh, site.q_pos)
            self.apart.append(float((turned - k[:, :, site.offset :]).detach().abs().max()))
            if self.at is None:
                return call(q, k, v)
            self.session.notes[key] = (turned[:, :, self.at], values[:, :, self.at])
        if self.at is None:
            return call(q, k, v)
        more_k, more_v = self.session.notes[key]
        last = site.mask.dense(q.device)[..., -1:].expand(len(q), 1, -1, 1)
        chosen = last & torch.ones(len(self.at), dtype=torch.bool, device=q.device)
        self.seen += 1
        return with_keys(site, call, q, k, v, more_k, more_v, chosen)


OTHERS = {
    "Phi": dict(partial_rotary_factor=0.5, num_key_value_heads=2),  # cuts heads before it turns them
    "StableLm": dict(partial_rotary_factor=0.5, num_key_value_heads=2),
    "Glm": dict(num_key_value_heads=2, head_dim=8, pad_token_id=0),  # neighbours in pairs, half a head
    "Cohere": dict(num_key_value_heads=2),  # neighbours in pairs
    "GptOss": dict(num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1),  # half of the angles
    "Gemma2": dict(num_key_value_heads=2, head_dim=8),
}


def other(family):
    import transformers

    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **(sizes | OTHERS.get(family, dict(num_key_value_heads=2, pad_token_id=0)))
    )
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_turned_keys_are_those_that_the_model_caches(family):
    model = language_model(family) if family in FAMILIES else other(family)
    look = Again()
    with torch.no_grad(), attnlib.attach(model, look):
        model(**batch())
    assert look.apart and max(look.apart) < 1e-5


@pytest.mark.parametrize("family", ["SmolLM3", "Cohere2"])
def test_no_rotation_where_only_some_layers_turn(family):
    found = []

    class Look(Intervention):
        def on_output(self, site, out):
            found.append(site.rotation)
            return out

    model = other(family)
    with torch.no_grad(), attnlib.attach(model, Look()):
        model(**batch())
    assert found and all(r is None for r in found)


def test_turned_keys_of_three_axes():
    from hooks.qwen_vl import needs_turn, qwen_vl, qwen_vl_inputs

    needs_turn()
    look = Again()
    model = qwen_vl()
    with torch.no_grad(), attnlib.attach(model, look):
        model(**qwen_vl_inputs())
    assert look.apart and max(look.apart) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_keys_given_again_weigh_twice_while_generating(family, implementation):
    """The oracle counts the keys of three tokens twice, for rows that see the newest token, by a bias of log 2."""
    model = language_model(family, attn_implementation=implementation)
    inputs = batch()
    twice = torch.tensor([4, 5, 6])

    class Heavier(Intervention):
        def around_attention(self, site, q, k, v, call):
            bias = torch.zeros(1, 1, q.shape[2], k.shape[2])
            bias[:, :, -1, twice] = torch.log(torch.tensor(2.0))
            return call(q, k, v, bias=bias)

    def answers(technique, inputs, **more):
        with torch.no_grad(), attnlib.attach(model, technique):
            return model.generate(
                **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True, **more
            )

    again = Again(at=twice)
    ours, theirs = answers(again, inputs), answers(Heavier(), inputs)
    assert again.seen > len(model.model.layers)
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    # A padded row answers as it does alone.
    alone = {k: v[:1, 3:] for k, v in inputs.items()}
    one = answers(Again(at=twice - 3), alone)
    assert torch.equal(one.sequences[0, -4:], ours.sequences[0, -4:])
    beams = answers(Again(at=twice), inputs, num_beams=2)
    assert torch.equal(beams.sequences, answers(Heavier(), inputs, num_beams=2).sequences)


def test_no_key_that_a_row_may_read_changes_nothing():
    model = language_model("llama")
    inputs = batch()

    class Unread(Intervention):
        adds_keys = True

        def around_attention(self, site, q, k, v, call):
            none = torch.zeros(1, 1, q.shape[2], 2, dtype=torch.bool)
            return with_keys(site, call, q, k, v, k[:, :, :2] * float("inf"), v[:, :, :2], none)

    with torch.no_grad():
        plain = model(**inputs).logits
        with attnlib.attach(model, Unread()):
            other = model(**inputs)
        exists = inputs["attention_mask"].bool()
        torch.testing.assert_close(other.logits[exists], plain[exists], atol=1e-5, rtol=1e-5)
        assert other.past_key_values.get_seq_length() == inputs["input_ids"].shape[1]  # cached nowhere
        assert torch.equal(model(**inputs).logits, plain)


def test_with_keys_against_the_oracle_and_its_bias():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    more_k, more_v = torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 8)
    allowed = torch.rand(2, 4, 5, 3) > 0.5
    site = call_site(q, k, offset=2)
    found = {}

    def call(q, k, v, mask=None, bias=None):
        found.update(bias=bias)
        return dense_attention(q, k, v, mask)[0]

    out = with_keys(site, call, q, k, v, more_k, more_v, allowed)
    own = site.mask.dense().expand(2, 4, -1, -1)
    expected = dense_attention(q, torch.cat([k, more_k], 2), torch.cat([v, more_v], 2), torch.cat([own, allowed], -1))[
        0
    ]
    torch.testing.assert_close(out, expected)
    assert found["bias"] is None


def rotation(slots=None):
    torch.manual_seed(0)
    angle = torch.rand(1, 5, 4)
    slots = torch.arange(3, 8) if slots is None else slots
    return Rotation(angle.cos(), angle.sin(), slots, lambda x, c, s: x * c[:, None])


def test_slots_of_a_call():
    r = rotation()
    assert torch.equal(r.angles(torch.tensor([4, 3]))[0], r.cos[:, [1, 0]])
    rows = rotation(torch.tensor([[-1, 2, 4, 5, 9], [0, 1, 2, 3, 4]]))
    cos, _ = rows.angles(torch.tensor([[9, 2], [0, 4]]))
    assert torch.equal(cos, torch.stack([rows.cos[0, [4, 1]], rows.cos[0, [0, 4]]]))
    assert r.turn(torch.ones(2, 3, 2, 4), torch.tensor([4, 3])).shape == (2, 3, 2, 4)
    for at, says in (([2], "slot 2"), ([8], "slot 8")):
        with pytest.raises(ValueError, match=says):
            r.angles(torch.tensor(at))
    with pytest.raises(ValueError, match="slot 3"):
        rows.angles(torch.tensor([[2, 3], [0, 1]]))
    with pytest.raises(ValueError, match="at must be whole slots"):
        r.angles(torch.tensor([0.5]))


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(more_k=torch.zeros(2, 4, 3, 8)), "more_k"),
        (dict(more_v=torch.zeros(2, 2, 4, 8)), "more_v"),
        (dict(allowed=torch.ones(2, 4, 5, 2, dtype=torch.bool)), "allowed"),
        (dict(allowed=torch.ones(2, 4, 5, 3)), "allowed must be boolean"),
        (dict(allowed=torch.ones(2, 3, 5, 3, dtype=torch.bool)), "allowed must be boolean"),
    ],
)
def test_bad_input_is_refused_by_name(change, says):
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    given = dict(more_k=torch.zeros(2, 2, 3, 8), more_v=torch.zeros(2, 2, 3, 8))
    given["allowed"] = torch.ones(2, 4, 5, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=says):
        with_keys(call_site(q, k, offset=2), None, q, k, v, **(given | change))
