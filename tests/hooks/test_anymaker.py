"""AnyMaker, read without code: identity of an object in the text and in cross attention, apart from its pose."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")

import attnlib  # noqa: E402
from attnlib.hooks import Intervention  # noqa: E402
from attnlib.steer.diffusion.anymaker import (  # noqa: E402
    AnyMaker,
    IdentityEncoder,
    Merge,
    identity_loss,
    on_grid,
    orthogonality,
)
from hooks import pipes  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def pipe(folder):
    return pipes.stable_diffusion(folder, model=pipes.unet(size=8))


def encoder(out_dim=16, **settings):
    torch.manual_seed(0)
    return IdentityEncoder([5, 3], out_dim, dim=8, id_tokens=2, non_tokens=3, depth=1, heads=2, **settings)


def features(prompts=1, objects=1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(prompts, objects, n, d, generator=generator) for n, d in ((9, 5), (4, 3))]


def image(pipe, prompt="a red dog", batch=2, **given):
    count = batch * (1 if isinstance(prompt, str) else len(prompt))
    latents = torch.randn((count, 4, 8, 8), generator=torch.Generator().manual_seed(3)).to(pipe.unet.dtype)
    settings = dict(num_inference_steps=2, output_type="latent", guidance_scale=3.0, num_images_per_prompt=batch)
    return pipe(prompt=prompt, latents=latents, **{**settings, **given}).images


def learnt(maker, seed=4):
    torch.manual_seed(seed)
    with torch.no_grad():
        maker.merge.out.weight.copy_(torch.randn_like(maker.merge.out.weight))
    return maker


class Watch(Intervention):
    kinds = ("cross",)

    def __init__(self):
        self.seen = []

    def around_attention(self, site, q, k, v, call):
        out = call(q, k, v)
        self.seen.append((site, q, k, v, out))
        return out


@pytest.mark.parametrize("merge", ["add", "mlp"])
def test_both_levels_are_the_equations_in_float64(pipe, merge):
    prompts = ["a red dog", "a cat and an apple"]
    maker = learnt(AnyMaker.of(pipe, encoder(), scale=0.7, merge=merge, strength=0.9))
    maker.refer(features(2), words=[["dog"], ["apple"]])
    outer, inner = Watch(), Watch()
    with attnlib.attach(pipe, inner), torch.no_grad():
        image(pipe, prompts)
    plain, inner.seen = inner.seen, []
    with attnlib.attach(pipe, outer, maker, inner), torch.no_grad():
        image(pipe, prompts)
        identity, other = maker.encoded()
    assert identity.shape == (2, 1, 2, 16) and other is None
    (site, q, k, v, out), (_, _, k_plain, v_plain, _) = outer.seen[0], plain[0]
    tokens = {4: 3, 6: 5}  # the words, behind the token that begins the text
    maps, like = maker.at(site), dict(atol=2e-5, rtol=1e-4)
    for row, at in tokens.items():
        prompt = (row - 4) // 2
        who = identity[prompt, 0].double()
        text = pipe.text_encoder(
            pipe.tokenizer(prompts[prompt], padding="max_length", max_length=77, return_tensors="pt").input_ids
        )[0][0].double()
        word, pooled, w = text[at], who.mean(0), maker.merge.out.weight.double()
        if merge == "mlp":
            hidden = maker.merge.hidden
            pooled = F.gelu(hidden.weight.double() @ torch.cat([word, pooled]) + hidden.bias.double())
        text[at] = word + 0.9 * (w @ pooled)
        heads = lambda x: x.unflatten(-1, (site.heads, -1)).transpose(0, 1)  # noqa: E731
        keys, values = (heads(text @ f.weight.double().T) for f in (site.module.to_k, site.module.to_v))
        torch.testing.assert_close(k[row].double(), keys, **like)
        branch = [heads(who @ f.weight.double().T) for f in (maps.to_k_ip, maps.to_v_ip)]
        own = q[row].double()
        want = sum(
            share * torch.softmax(own @ a.transpose(-2, -1) * own.shape[-1] ** -0.5, -1) @ b
            for share, (a, b) in ((1.0, (keys, values)), (0.7, branch))
        )
        torch.testing.assert_close(out[row].double(), want, **like)
        changed = (k[row] != k_plain[row]).any(-1).any(0).nonzero().flatten()
        assert changed.tolist() == [at]
    # Rows under guidance are the model's.
    assert torch.equal(k[:4], k_plain[:4]) and torch.equal(v[:4], v_plain[:4])


def test_nothing_injected_is_the_base_model(pipe):
    plain = image(pipe)
    off = AnyMaker.of(pipe, encoder(), scale=0.0, strength=0.0)
    assert off.identity
    untrained = AnyMaker.of(pipe, encoder(), scale=0.0).refer(features(), words=["dog"])
    for maker in (off, untrained):  # as made, the map of the global level is zero
        with attnlib.attach(pipe, maker):
            assert torch.equal(image(pipe), plain)
    local = AnyMaker.of(pipe, encoder()).refer(features(), words=["dog"])
    with attnlib.attach(pipe, local):
        assert not torch.allclose(image(pipe), plain, atol=1e-4)
    everywhere = learnt(AnyMaker.of(pipe, encoder(), scale=0.0)).refer(features(), words=["dog"])
    with attnlib.attach(pipe, everywhere):
        assert not torch.allclose(image(pipe), plain, atol=1e-4)

    class Breaks(Intervention):
        kinds = ("cross",)

        def on_output(self, site, out):
            return out * (1 / (site.step - 1))

    with pytest.raises(ZeroDivisionError), attnlib.attach(pipe, local, Breaks()):
        image(pipe)
    assert torch.equal(image(pipe), plain)


def test_what_it_gives_does_not_depend_on_the_pose_queries(pipe):
    maker = learnt(AnyMaker.of(pipe, encoder())).refer(features(), words=["dog"])
    with attnlib.attach(pipe, maker):
        before = image(pipe)
        with torch.no_grad():
            for p in maker.project.other.parameters():
                p.add_(1)
        assert torch.equal(image(pipe), before)
        # In training the target's pose stands beside, and does matter.
        maker.refer(features(), words=["dog"], targets=features(seed=2))
        assert maker.tokens()[0].shape == (1, 1, 5, 16)
        assert not torch.allclose(image(pipe), before, atol=1e-5)


def test_losses():
    eye = torch.eye(8)
    assert orthogonality(eye[None, :3], eye[None, 3:]) == 0
    assert orthogonality(eye[None, :1], eye[None, :1]) == 1
    a = torch.randn(4, 2, 6)
    assert abs(identity_loss(a, a, "cosine")) < 1e-6
    flat = F.normalize(a.flatten(1).double(), dim=-1)
    other = F.normalize(torch.randn(4, 12, dtype=torch.double), dim=-1)
    logits = flat @ other.T / 0.1
    want = -sum(logits.log_softmax(d).diagonal().mean() for d in (0, 1)) / 2
    torch.testing.assert_close(identity_loss(a, other.unflatten(1, (2, 6)).float(), temperature=0.1).double(), want)
    with pytest.raises(ValueError, match="at least two objects"):
        identity_loss(a[:1], a[:1])
    with pytest.raises(ValueError, match="form"):
        identity_loss(a, a, "triplet")


def explained(x, y):
    """Share of y that a linear map of x explains, on samples it was not fitted to."""
    x = torch.cat([x, torch.ones(len(x), 1)], 1)
    half = len(x) // 2
    w = torch.linalg.solve(x[:half].T @ x[:half] + 1e-2 * torch.eye(x.shape[1]), x[:half].T @ y[:half])
    return 1 - float((y[half:] - x[half:] @ w).square().sum() / (y[half:] - y[half:].mean(0)).square().sum())


def test_identity_is_kept_and_pose_is_lost():
    """Features that mix a code of the object and one of its pose."""
    torch.manual_seed(0)
    mix_id, mix_pose = torch.randn(4, 3, 10), torch.randn(4, 3, 10)
    made = IdentityEncoder([10], 16, dim=16, id_tokens=1, non_tokens=1, depth=1, heads=2)
    optimizer = torch.optim.Adam(made.parameters(), 1e-2)

    def views(who, pose):
        return [torch.einsum("bi,lid->bld", who, mix_id) + torch.einsum("bi,lid->bld", pose, mix_pose)]

    def probe():
        with torch.no_grad():
            who, pose = torch.randn(400, 3), torch.randn(400, 3)
            found = made(views(who, pose))[0].flatten(1)
        return explained(found, who), explained(found, pose)

    before = probe()
    for _ in range(150):
        who = torch.randn(32, 3)
        identity, _ = made(views(who, torch.randn(32, 3)))
        partner, other = made(views(who, torch.randn(32, 3)))
        loss = identity_loss(identity, partner, temperature=0.2) + 0.1 * orthogonality(identity, other)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    kept, lost = probe()
    assert kept > before[0] and lost < before[1] / 2, (before, kept, lost)


def test_a_training_step_reaches_everything(pipe):
    unet = pipe.unet
    maker = learnt(AnyMaker.of(unet, encoder()))
    maker.refer(features(2), words=[[2]], targets=features(2, seed=2))
    unet.requires_grad_(False)
    try:
        with attnlib.attach(unet, maker):
            out = unet(torch.randn(2, 4, 8, 8), 10, torch.randn(2, 5, 16)).sample
            found = maker.losses()
            (out.square().mean() + found["identity"] + found["orthogonality"]).backward()
    finally:
        unet.requires_grad_(True)
    assert all(p.grad is not None for p in maker.trained())
    assert set(found) == {"identity", "orthogonality"}


def test_sdxl_half_precision_and_another_scheduler(tmp_path_factory):
    pipe = pipes.sdxl(str(tmp_path_factory.mktemp("words")))
    maker = learnt(AnyMaker.of(pipe, encoder(32, combine="channels"))).refer(features(), words=["dog"])
    with attnlib.attach(pipe, maker):
        out = pipe("a red dog", num_inference_steps=2, output_type="latent", height=16, width=16).images
    assert out.isfinite().all()
    half = pipes.stable_diffusion(
        str(tmp_path_factory.mktemp("words")), model=pipes.unet(size=8),
        plan=pipes.scheduler("EulerDiscreteScheduler"),
    )  # fmt: skip
    half.unet.to(torch.bfloat16)
    half.text_encoder.to(torch.bfloat16)
    maker = learnt(AnyMaker.of(half, encoder())).refer(features(), words=["dog"])
    with attnlib.attach(half, maker):
        out = image(half)
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


def test_what_is_refused(pipe):
    with pytest.raises(TypeError, match="IdentityEncoder"):
        AnyMaker.of(pipe)
    maker = AnyMaker.of(pipe, encoder())
    with attnlib.attach(pipe, maker), pytest.raises(RuntimeError, match="has no objects"):
        image(pipe)
    with pytest.raises(ValueError, match="features must be"):
        maker.refer([features()[0][0]], words=["dog"])
    maker.refer(features()[:1], words=["dog"])
    with attnlib.attach(pipe, maker), pytest.raises(ValueError, match="one \\(n, tokens, width\\) for each"):
        image(pipe)
    maker.refer(features(), words=["bench"])
    with attnlib.attach(pipe, maker), pytest.raises(ValueError, match="'bench' is not in the prompt"):
        image(pipe)
    maker.refer(features(), words=["red", "dog"])
    with attnlib.attach(pipe, maker), pytest.raises(ValueError, match="one for each of the 1 objects"):
        image(pipe)
    maker.refer(features(), words=["dog"])
    with attnlib.attach(pipe.unet, maker), pytest.raises(ValueError, match="attach to the pipeline"):
        pipe.unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 5, 16))
    with pytest.raises(ValueError, match="need the targets"):
        maker.losses()
    with pytest.raises(ValueError, match="no square grid"):
        on_grid(torch.zeros(1, 5, 2), 2)
    wide = AnyMaker.of(pipe, encoder(12), width=12).refer(features(), words=["dog"])
    with attnlib.attach(pipe, wide), pytest.raises(ValueError, match="give IdentityEncoder"):
        image(pipe)
    assert Merge(4)(torch.ones(2, 4), torch.ones(1, 4)).eq(1).all()
