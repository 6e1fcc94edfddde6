"""Branches for reference images, and keys of other rows or images."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")

import attnlib  # noqa: E402
from attnlib.hooks import Intervention  # noqa: E402
from attnlib.steer.diffusion.references import (  # noqa: E402
    KeepKeys,
    KeyStore,
    ReferenceBranches,
    SharedKeys,
    other_rows,
)
from hooks import pipes  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
TWO = ["a red circle", "a blue square"]


def image(pipe, prompt="a red circle", batch=2, **given):
    settings = dict(num_inference_steps=2, output_type="latent", guidance_scale=3.0, num_images_per_prompt=batch)
    count = batch * (1 if isinstance(prompt, str) else len(prompt))
    latents = torch.randn((count, 4, 16, 16), generator=torch.Generator().manual_seed(3))
    latents = latents.to(pipe.unet.dtype)
    return pipe(prompt=prompt, latents=latents, **{**settings, **given}).images


def projection(state):
    from diffusers.models.embeddings import ImageProjection

    made = ImageProjection(image_embed_dim=6, cross_attention_dim=16, num_image_text_embeds=4)
    made.load_state_dict(
        {
            "image_embeds.weight": state["proj.weight"], "image_embeds.bias": state["proj.bias"],
            "norm.weight": state["norm.weight"], "norm.bias": state["norm.bias"],
        }
    )  # fmt: skip
    return made


def branches_like(pipe, state, **settings):
    made = ReferenceBranches.of(pipe, project=projection(state["image_proj"]), **settings)
    made.load_released({"ip_adapter": state["ip_adapter"]})
    return made


def test_branches_are_those_of_ip_adapter(pipe):
    """Two references of one adapter under masks of ones, and one of each of two adapters."""
    plain = image(pipe)
    states = pipes.ip_state(pipe.unet), pipes.ip_state(pipe.unet, seed=8)
    embeds = torch.randn(2, 2, 6)
    embeds[0] = 0  # without guidance by the image
    ours = branches_like(pipe, states[0], scale=[0.7, 0.4]).refer(embeds[1:])
    with attnlib.attach(pipe, ours):
        both = image(pipe)
    one = branches_like(pipe, states[0], scale=0.7).refer(embeds[1:, :1])
    other = branches_like(pipe, states[1], scale=0.5).refer(embeds[1:, 1:])
    with attnlib.attach(pipe, one, other):
        adapters = image(pipe)
    assert torch.equal(image(pipe), plain)
    held = dict(pipe.unet.attn_processors)
    try:
        pipe.unet._load_ip_adapter_weights([states[0]])
        pipe.set_ip_adapter_scale([[0.7, 0.4]])
        masks = {"ip_adapter_masks": [torch.ones(1, 2, 16, 16)]}
        want = image(pipe, ip_adapter_image_embeds=[embeds], cross_attention_kwargs=masks)
        torch.testing.assert_close(both, want, atol=1e-5, rtol=1e-5)
        pipe.unet._load_ip_adapter_weights(list(states))
        pipe.set_ip_adapter_scale([0.7, 0.5])
        want = image(pipe, ip_adapter_image_embeds=[embeds[:, :1], embeds[:, 1:]])
        torch.testing.assert_close(adapters, want, atol=1e-5, rtol=1e-5)
    finally:
        pipe.unet.set_attn_processor(held)
        pipe.unet.encoder_hid_proj = None
        pipe.unet.config.encoder_hid_dim_type = None
    assert not torch.allclose(both, plain, atol=1e-3)


def test_each_prompt_reads_its_own_references_and_the_uncond_rows_none(pipe):
    tokens = torch.randn(2, 1, 3, 16)
    branches = ReferenceBranches.of(pipe).refer(tokens)
    seen = []

    class Watch(Intervention):
        kinds = ("cross",)

        def around_attention(self, site, q, k, v, call):
            seen.append((site, q, call(q, k, v)))
            return seen[-1][2]

    class Outer(Watch):
        def around_attention(self, site, q, k, v, call):
            out = call(q, k, v)
            seen.append((site, q, out))
            return out

    with attnlib.attach(pipe, Outer(), branches, Watch()):
        both = image(pipe, TWO)
    (site, q, text), (_, _, out) = seen[:2]
    maps = branches.at(site)
    for row, prompt in ((4, 0), (6, 1), (7, 1)):
        k, v = (f(tokens[prompt, 0]).unflatten(-1, (2, -1)).transpose(0, 1) for f in (maps.to_k_ip, maps.to_v_ip))
        want = text[row] + F.scaled_dot_product_attention(q[row], k, v)
        torch.testing.assert_close(out[row], want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out[:4], text[:4])  # zeros
    assert site.rows == ("uncond",) * 4 + ("cond",) * 4
    # Alone, a prompt is what it is beside another.
    branches.refer(tokens[1:])
    with attnlib.attach(pipe, branches):
        latents = torch.randn((4, 4, 16, 16), generator=torch.Generator().manual_seed(3))[2:]
        alone = pipe(
            TWO[1], latents=latents, num_inference_steps=2, output_type="latent", guidance_scale=3.0,
            num_images_per_prompt=2,
        ).images  # fmt: skip
    torch.testing.assert_close(both[2:], alone, atol=1e-5, rtol=1e-4)


def test_scales_steps_and_what_is_kept(pipe, monkeypatch):
    plain = image(pipe)
    tokens = torch.randn(1, 2, 3, 16)
    nothing = ReferenceBranches.of(pipe, scale=0.0)
    assert nothing.identity
    with attnlib.attach(pipe, nothing):
        assert torch.equal(image(pipe), plain)
    named = ReferenceBranches.of(pipe, scale={"up_blocks*": [1.0, 0.5]}).refer(tokens)
    with attnlib.attach(pipe, named):
        up = image(pipe)
    late = ReferenceBranches.of(pipe, step_range=(0.5, 1.0)).refer(tokens)
    calls = []
    for maps in late.maps:
        maps.to_k_ip.register_forward_hook(lambda *a: calls.append(1))
    with attnlib.attach(pipe, late):
        second = image(pipe)
        assert len(calls) == len(late.maps)  # once for both steps, if it acted at both
        with torch.no_grad():
            late.maps[0].to_k_ip.weight.mul_(2)
        changed = image(pipe)
        assert len(calls) == len(late.maps) + 1
    for a, b in ((plain, up), (plain, second), (up, second), (second, changed)):
        assert not torch.allclose(a, b, atol=1e-5)
    half = ReferenceBranches.of(pipe, scale=[1.0]).refer(tokens[:, :1])
    zeroed = ReferenceBranches.of(pipe, scale=[1.0, 0.0]).refer(tokens)
    with attnlib.attach(pipe, half):
        one = image(pipe)
    with attnlib.attach(pipe, zeroed):
        torch.testing.assert_close(image(pipe), one, atol=1e-6, rtol=1e-6)
    tokens[:, 1] = torch.nan  # of strength zero, and not computed
    with attnlib.attach(pipe, zeroed.refer(tokens)):
        torch.testing.assert_close(image(pipe), one, atol=1e-6, rtol=1e-6)


def test_branches_train_by_themselves_and_in_a_denoiser(pipe):
    unet = pipe.unet
    branches = ReferenceBranches.of(unet, project=torch.nn.Linear(6, 16))
    unet.requires_grad_(False)
    try:
        with attnlib.attach(unet, branches.refer(torch.randn(2, 1, 3, 6))):
            out = unet(torch.randn(2, 4, 16, 16), 10, torch.randn(2, 5, 16)).sample
            out.square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in branches.trained())
        assert branches.project.weight.grad.abs().sum() > 0
        assert len(branches.trained()) == 2 * len(branches.maps)
        # They start as the maps of the text.
        attn = unet.get_submodule(branches.names[0])
        assert torch.equal(branches.maps[0].to_k_ip.weight, attn.to_k.weight)
    finally:
        unet.requires_grad_(True)
    again = ReferenceBranches.of(unet, project=torch.nn.Linear(6, 16))
    with torch.no_grad():
        branches.maps[1].to_v_ip.weight.add_(1)
    again.load_released(branches.released())
    for a, b in zip(again.state_dict().values(), branches.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    flat = {f"{part}.{key}": v for part, entries in branches.released().items() for key, v in entries.items()}
    again.load_released(flat)


def test_several_images_of_a_reference_have_the_mean_of_their_tokens(pipe):
    branches = ReferenceBranches.of(pipe, project=projection(pipes.ip_state(pipe.unet)["image_proj"]))
    a, b, c = torch.randn(2, 6), torch.randn(1, 6), torch.randn(3, 6)
    tokens, empty = branches.refer([[a, b], [c, a]]).tokens()
    assert tokens.shape == (2, 2, 4, 16) and empty.shape == (1, 2, 4, 16)
    for got, images in ((tokens[0, 0], a), (tokens[0, 1], b), (tokens[1, 0], c)):
        torch.testing.assert_close(got, branches.project(images).mean(0))
    torch.testing.assert_close(empty[0, 1], branches.project(torch.zeros(1, 6))[0])
    for wrong in ([[a], [a, b]], [[]], [[torch.zeros(0, 6)]]):
        with pytest.raises(ValueError, match="references|without an image"):
            branches.refer(wrong)


def test_what_is_refused(pipe):
    branches = ReferenceBranches.of(pipe)
    with attnlib.attach(pipe, branches), pytest.raises(RuntimeError, match="has no references"):
        image(pipe)
    with pytest.raises(ValueError, match="at least one reference"):
        branches.refer(torch.zeros(1, 0, 3, 16))
    with pytest.raises(ValueError, match="empty must be like images"):
        branches.refer(torch.zeros(1, 1, 3, 16), torch.zeros(1, 1, 2, 16))
    branches.refer(torch.zeros(3, 1, 3, 16))
    with attnlib.attach(pipe.unet, branches), pytest.raises(ValueError, match="which row is of which prompt"):
        pipe.unet(torch.zeros(2, 4, 16, 16), 1, torch.zeros(2, 5, 16))
    branches.refer(torch.zeros(2, 1, 3, 16))
    with attnlib.attach(pipe, branches), pytest.raises(ValueError, match="there is a prompt 2"):
        image(pipe, [*TWO, "a dog"], 1)
    wrong = ReferenceBranches.of(pipe, scale=[1.0, 1.0, 1.0]).refer(torch.zeros(1, 2, 3, 16))
    with attnlib.attach(pipe, wrong), pytest.raises(ValueError, match="scale names 3 references, but 2"):
        image(pipe)
    with pytest.raises(ValueError, match="no cross attention"):
        ReferenceBranches.of(pipes.flux()[0])
    released = branches.released()
    released["ip_adapter"].pop("1.to_v_ip.weight")
    with pytest.raises(ValueError, match=r"lacks \['0.to_v_ip.weight'\]"):
        branches.load_released(released)
    with pytest.raises(ValueError, match="has numbers"):
        branches.load_released({"ip_adapter": {"0.to_k_ip.weight": torch.zeros(1)}})


# ---- one softmax


def test_keys_of_other_prompts_are_read_under_the_same_guidance(pipe):
    plain, seen = image(pipe, TWO), []

    class Inner(Intervention):
        kinds = ("self",)

        def around_attention(self, site, q, k, v, call):
            seen.append((site, q, k, v, call(q, k, v)))
            return seen[-1][-1]

    with attnlib.attach(pipe, SharedKeys("first"), Inner()) as session:
        first = image(pipe, TWO)
        assert session.attached[0].kind == "self"
    torch.testing.assert_close(first[:2], plain[:2], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(first[2:], plain[2:], atol=1e-3)
    site, q, k, v, out = seen[0]
    n = q.shape[2]
    assert k.shape[2] == 2 * n
    # rows: uncond 0 0 1 1, cond 0 0 1 1
    for row, other in ((2, 0), (3, 1), (6, 4), (7, 5)):
        torch.testing.assert_close(k[row, :, n:], k[other, :, :n])
        torch.testing.assert_close(
            out[row], F.scaled_dot_product_attention(q[row], k[row], v[row]), atol=1e-6, rtol=1e-5
        )
    with attnlib.attach(pipe, SharedKeys({1: [0]})):
        torch.testing.assert_close(image(pipe, TWO), first)
    with attnlib.attach(pipe, SharedKeys("all")):
        assert not torch.allclose(image(pipe, TWO)[:2], plain[:2], atol=1e-3)
    for nothing in (SharedKeys("all", strength=0.0), SharedKeys({0: []})):
        with attnlib.attach(pipe, nothing):
            assert torch.equal(image(pipe, TWO), plain)


def test_strength_is_a_factor_and_keys_may_be_chosen(pipe):
    def run(**settings):
        with attnlib.attach(pipe, SharedKeys({1: [0], 0: [1]}, **settings)):
            return image(pipe, TWO)

    plain, full = image(pipe, TWO), run()
    weak = run(strength=1e-7)
    torch.testing.assert_close(weak, plain, atol=1e-4, rtol=1e-3)
    doubled = run(strength=2.0)
    # Each key of the other twice is a strength of two.
    torch.testing.assert_close(
        doubled,
        run(where=lambda site: torch.arange(site.n_keys).repeat(2)),
        atol=1e-5, rtol=1e-4,
    )  # fmt: skip
    assert not torch.allclose(doubled, full, atol=1e-4)
    others = run(own=False)
    swapped = run(own=False, where=lambda site: torch.arange(site.n_keys).flip(0))
    torch.testing.assert_close(others, swapped, atol=1e-5, rtol=1e-4)
    early = run(step_range=(0.0, 0.5))
    assert not torch.allclose(early, full, atol=1e-5) and not torch.allclose(early, plain, atol=1e-5)
    assert other_rows(torch.zeros(2, 3, 4, 5), torch.zeros(6, 2, dtype=torch.long)).shape == (6, 3, 8, 5)


def test_keys_of_a_kept_image(pipe):
    plain = image(pipe)
    store = KeyStore()
    with attnlib.attach(pipe, KeepKeys(store, layers=["up_blocks*attn1"])):
        assert torch.equal(image(pipe), plain)
    assert len(store) == 2 * 4  # steps, layers
    # One's own keys once more change nothing.
    with attnlib.attach(pipe, SharedKeys(store, layers=["up_blocks*attn1"])):
        torch.testing.assert_close(image(pipe), plain, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(image(pipe, "a dog"), image(pipe, "a cat"))
    with attnlib.attach(pipe, SharedKeys(store)), pytest.raises(RuntimeError, match="nothing was kept at step 0"):
        image(pipe)
    # Four images look at one, each half of guidance at its own.
    single = KeyStore("cpu")
    with attnlib.attach(pipe, KeepKeys(single, layers=["up_blocks*attn1"])):
        image(pipe, batch=1)
    got = single.read(*_kept_site(single, ("uncond",) * 2 + ("cond",) * 2))
    held = next(iter(single.kept.values()))[0]
    assert torch.equal(got[0], held[[0, 0, 1, 1]])
    assert torch.equal(image(pipe), plain)


def _kept_site(store, rows):
    from attnlib.hooks import Site

    (step, name), (k, _) = next(iter(store.kept.items()))
    site = Site(0, name, torch.nn.Identity(), "self", 2, 2, 8, rows=rows, step=step)
    return site, torch.zeros(len(rows), *k.shape[1:])


def test_what_shared_keys_refuse(pipe):
    with attnlib.attach(pipe, SharedKeys({0: [2]})), pytest.raises(ValueError, match="names prompt 2, but there are 2"):
        image(pipe, TWO)
    with attnlib.attach(pipe.unet, SharedKeys()), pytest.raises(ValueError, match="which row is of which prompt"):
        pipe.unet(torch.zeros(2, 4, 16, 16), 1, torch.zeros(2, 5, 16))
    with attnlib.attach(pipe, SharedKeys("last")), pytest.raises(ValueError, match="'all', 'first' or a mapping"):
        image(pipe, TWO)
    with pytest.raises(ValueError, match="nothing to read"):
        SharedKeys("all", strength=0.0, own=False)
    with attnlib.attach(pipe, SharedKeys("first", own=False)), pytest.raises(ValueError, match="nothing to read"):
        image(pipe, TWO)


def test_keys_that_a_layer_has_not_are_refused_by_number(pipe):
    shared = SharedKeys("first", where=lambda site: torch.tensor([0, 300]))
    with attnlib.attach(pipe, shared), pytest.raises(ValueError, match="where names keys 0 to 300, and each row"):
        image(pipe, TWO, batch=1)


def test_half_precision_and_another_scheduler(tmp_path_factory):
    pipe = pipes.stable_diffusion(
        tmp_path_factory.mktemp("words"), plan=pipes.scheduler("EulerAncestralDiscreteScheduler")
    )
    pipe.unet.to(torch.bfloat16)
    pipe.text_encoder.to(torch.bfloat16)
    branches = ReferenceBranches.of(pipe).refer(torch.randn(1, 2, 3, 16))

    def run():
        return image(pipe, TWO, 1, generator=torch.Generator().manual_seed(0))

    plain = run()
    with attnlib.attach(pipe, branches, SharedKeys("first")):
        out = run()
    assert out.dtype == torch.bfloat16 and out.isfinite().all() and not torch.equal(out, plain)
    assert torch.equal(run(), plain)


def test_beside_an_adapter_of_diffusers_branches_are_added_once(pipe):
    """They stand beside the text alone, and not beside each image prompt, too."""
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    torch.manual_seed(7)
    before = pipe.unet.attn_processors
    processors = {}
    for name, old in before.items():
        processors[name] = old
        if "attn2" in name:
            module = pipe.unet.get_submodule(name.removesuffix(".processor"))
            processors[name] = IPAdapterAttnProcessor2_0(
                module.to_q.out_features, module.to_k.in_features, num_tokens=(2,), scale=1.0
            )
    branches = ReferenceBranches.of(pipe).refer(torch.randn(1, 2, 3, 16))
    seen = []
    attend = branches.around_attention

    def counted(site, q, k, v, call):
        seen.append(site.reference)
        return attend(site, q, k, v, call)

    branches.around_attention = counted
    pipe.unet.set_attn_processor(processors)
    try:
        given = dict(added_cond_kwargs={"image_embeds": [torch.randn(2, 1, 2, 16)]})
        pipe.unet.encoder_hid_proj, kept = torch.nn.Identity(), pipe.unet.encoder_hid_proj
        pipe.unet.encoder_hid_proj.num_ip_adapters = 1
        pipe.unet.config.encoder_hid_dim_type, dim_type = "ip_image_proj", pipe.unet.config.encoder_hid_dim_type
        with torch.no_grad(), attnlib.attach(pipe.unet, branches):
            pipe.unet(torch.randn(2, 4, 16, 16), 7, encoder_hidden_states=torch.randn(2, 5, 16), **given)
    finally:
        pipe.unet.set_attn_processor(before)
        pipe.unet.encoder_hid_proj = kept
        pipe.unet.config.encoder_hid_dim_type = dim_type
    assert seen == [None] * len(branches.names)
