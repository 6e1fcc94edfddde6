"""Denoisers whose tokens are laid out in other ways: every attention is a site, and what its tokens are is right or
not said."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

diffusers = pytest.importorskip("diffusers")

import attnlib  # noqa: E402
from attnlib.grids import Layout  # noqa: E402
from attnlib.hooks import Intervention  # noqa: E402
from attnlib.steer import SoftPAG  # noqa: E402
from hooks.models import dense_attention  # noqa: E402

GRID, TEXT = (4, 4), 5
image, text = ("image", GRID), ("text", TEXT)
ALONE = ((image,), (image,))


def latents():
    return torch.randn(2, 4, 8, 8)


def words(width=12, count=TEXT):
    return torch.randn(2, count, width)


def step():
    return torch.tensor([0.3, 0.3])


def flux2():
    model = diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    return model, dict(
        hidden_states=torch.randn(2, 16, 4), encoder_hidden_states=words(), timestep=step(), guidance=torch.ones(2),
        img_ids=torch.zeros(16, 4), txt_ids=torch.zeros(TEXT, 4),
    )  # fmt: skip


def auraflow():
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=12, out_channels=4,
        pos_embed_max_size=64,
    )  # fmt: skip
    return model, dict(hidden_states=latents(), encoder_hidden_states=words(), timestep=step())


def lumina2():
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1,
        num_attention_heads=3, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 2, 2), axes_lens=(64, 32, 32),
        cap_feat_dim=12,
    )  # fmt: skip
    mask = torch.tensor([[1, 1, 1, 0, 0], [1] * 5]).bool()
    return model, dict(
        hidden_states=latents(), encoder_hidden_states=words(), timestep=step(), encoder_attention_mask=mask
    )


def omnigen():
    model = diffusers.OmniGenTransformer2DModel(
        in_channels=4, patch_size=2, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, intermediate_size=16,
        num_layers=1, pad_token_id=0, vocab_size=32, rope_base=10000, pos_embed_max_size=8, time_step_dim=16,
        rope_scaling={"long_factor": [1, 2, 3, 4], "short_factor": [1, 2, 3, 4]},
    )  # fmt: skip
    n = TEXT + 1 + 16
    return model, dict(
        hidden_states=latents(), timestep=step(), input_ids=torch.randint(1, 30, (2, TEXT)), input_img_latents=[],
        attention_mask=torch.ones(2, n, n), position_ids=torch.arange(n)[None].repeat(2, 1), input_image_sizes={},
    )  # fmt: skip


def zimage():
    model = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, cap_feat_dim=12, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    return model, dict(x=list(torch.randn(2, 4, 1, 8, 8)), t=step(), cap_feats=[torch.randn(5, 12), torch.randn(3, 12)])


def hidream():
    model = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, caption_channels=[12, 12], text_emb_dim=8, num_routed_experts=2,
        num_activated_experts=1, axes_dims_rope=(4, 2, 2), max_resolution=(8, 8), llama_layers=(0, 1),
    )  # fmt: skip
    return model, dict(
        hidden_states=latents(), timesteps=torch.tensor([3, 3]), encoder_hidden_states_t5=words(),
        encoder_hidden_states_llama3=torch.randn(2, 2, TEXT, 12), pooled_embeds=torch.randn(2, 8),
    )  # fmt: skip


def prx():
    model = diffusers.PRXTransformer2DModel(
        in_channels=4, patch_size=2, context_in_dim=12, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=1,
        axes_dim=[4, 4],
    )  # fmt: skip
    return model, dict(hidden_states=latents(), encoder_hidden_states=words(), timestep=step())


def kandinsky5():
    model = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=12, in_text_dim2=8, time_dim=16, patch_size=(1, 2, 2),
        model_dim=16, ff_dim=16, num_text_blocks=1, num_visual_blocks=1, axes_dims=(2, 2, 4),
    )  # fmt: skip
    return model, dict(
        hidden_states=torch.randn(1, 2, 8, 8, 4), encoder_hidden_states=torch.randn(1, TEXT, 12),
        timestep=torch.tensor([3.0]), pooled_projections=torch.randn(1, 8), text_rope_pos=torch.arange(TEXT),
        visual_rope_pos=[torch.arange(2), torch.arange(4), torch.arange(4)],
    )  # fmt: skip


def prior():
    model = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=12, num_embeddings=TEXT
    )
    return model, dict(
        hidden_states=torch.randn(2, 12), timestep=torch.tensor([3, 3]), proj_embedding=torch.randn(2, 12),
        encoder_hidden_states=words(), attention_mask=torch.ones(2, TEXT).bool(),
    )  # fmt: skip


UNKNOWN = (None, None)
WITH_TEXT = ((text, ("image", 16)),) * 2
REGISTERS = ((("text", 8 + TEXT), image),) * 2
CLIP = (("image", (2, *GRID)),)

#: What each attention is, in the order of the calls: its kind, and what its queries and keys are.
DENOISERS = {
    flux2: [("joint", *WITH_TEXT), ("joint", *WITH_TEXT)],
    auraflow: [("joint", *REGISTERS), ("joint", *REGISTERS)],
    lumina2: [("self", (text,), (text,)), ("self", *ALONE), ("self", *UNKNOWN)],
    omnigen: [("self", *UNKNOWN)],
    zimage: [("self", *UNKNOWN), ("self", (("text", 32),), (("text", 32),)), ("self", *UNKNOWN)],
    hidream: [("self", *UNKNOWN), ("self", *UNKNOWN)],
    prx: [("self", (image,), None)],
    kandinsky5: [("self", *UNKNOWN), ("self", CLIP, CLIP), ("cross", CLIP, (text,))],
    prior: [("self", *UNKNOWN)],
}


class See(Intervention):
    name = "see"

    def __init__(self):
        self.calls = []

    def around_attention(self, site, q, k, v, call):
        out = call(q, k, v)
        self.calls.append((site, q, k, v, out))
        return out


class Count(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += func is torch.nn.functional.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def flat(output):
    if isinstance(output, torch.Tensor):
        return output.flatten()
    return torch.cat([flat(part) for part in (output if isinstance(output, (list, tuple)) else output.values())])


@pytest.fixture(scope="module", params=DENOISERS, ids=lambda make: make.__name__)
def case(request):
    torch.manual_seed(0)
    try:
        model, inputs = request.param()
    except AttributeError as error:
        if not str(error).startswith("module diffusers has no attribute"):
            raise
        pytest.skip(f"an older release: {error}")
    return request.param, model.eval(), inputs


@torch.no_grad()
def test_every_attention_is_a_site_and_says_what_its_tokens_are(case):
    make, model, inputs = case
    with Count() as count:
        plain = flat(model(**inputs))
    see = See()
    with attnlib.attach(model, see) as session:
        assert torch.equal(flat(model(**inputs)), plain)
    assert len(see.calls) == count.calls == len(session.sites), "attention that is no site"
    found = [
        (site.kind, *(None if one is None else one.segments for one in (site.q_layout, site.k_layout)))
        for site, *_ in see.calls
    ]
    assert found == [
        (kind, *(None if one is None else Layout(one).segments for one in layouts))
        for kind, *layouts in DENOISERS[make]
    ]
    for site, q, k, v, out in see.calls:
        assert site.heads == q.shape[1] and site.kv_heads == k.shape[1] and site.head_dim == q.shape[3]
        assert site.q_layout is None or len(site.q_layout) == q.shape[2]
        assert site.k_layout is None or len(site.k_layout) == k.shape[2]
        allowed, bias = site.mask.rows(torch.arange(q.shape[2]))
        assert bias is None
        torch.testing.assert_close(out, dense_attention(q, k, v, allowed)[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_asks_for_image_tokens_is_refused_where_they_are_not_known(case):
    make, model, inputs = case
    layers = [n for n, (kind, q, k) in enumerate(DENOISERS[make]) if kind != "cross" and q is None and k is None]
    for layer in layers:
        with (
            attnlib.attach(model, SoftPAG(layers=[layer])),
            pytest.raises(ValueError, match="image tokens is not known"),
        ):
            model(**inputs)


@torch.no_grad()
def test_sources_cannot_be_swapped_where_projections_are_fused():
    torch.manual_seed(0)
    model, _ = flux2()

    class Swap(Intervention):
        layers = (1,)

        def on_context(self, site, keys, values):
            return keys, values

    with pytest.raises(ValueError, match=r"needs separate projections of keys and values; \['to_k', 'to_v'\]"):
        attnlib.attach(model, Swap())
