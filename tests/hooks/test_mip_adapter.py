"""MIP-Adapter: references weighted by where their names are."""

import json

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")
from diffusers import DDPMScheduler  # noqa: E402
from diffusers.models.attention_processor import Attention  # noqa: E402
from parity import HERE  # noqa: E402
from safetensors import safe_open  # noqa: E402

import attnlib  # noqa: E402
from attnlib.hooks import Intervention  # noqa: E402
from attnlib.steer.diffusion.mip_adapter import GatedReferenceMaps, MIPAdapter, dropped, shares  # noqa: E402
from attnlib.steer.diffusion.references import ReferenceBranches  # noqa: E402
from hooks import pipes  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    pipe = pipes.stable_diffusion(str(tmp_path_factory.mktemp("words")), model=pipes.unet(size=8))
    with torch.no_grad():  # names that differ
        for p in pipe.text_encoder.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(5)) * 0.3)
    return pipe


def image(pipe, prompt="a red cat and a blue hat", batch=2, seed=3, **given):
    count = batch * (1 if isinstance(prompt, str) else len(prompt))
    latents = torch.randn((count, 4, 8, 8), generator=torch.Generator().manual_seed(seed)).to(pipe.unet.dtype)
    settings = dict(num_inference_steps=2, output_type="latent", guidance_scale=3.0, num_images_per_prompt=batch)
    return pipe(prompt=prompt, latents=latents, **{**settings, **given}).images


# ---- the authors' class


def recorded():
    with safe_open(HERE / "mip-adapter.safetensors", "pt") as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        return tensors, json.loads(f.metadata()["config"])


@pytest.mark.parametrize("case", ["two", "three-plus", "one"])
def test_it_is_the_authors_processor(case):
    tensors, config = recorded()
    t = {name[len(case) + 1 :]: value for name, value in tensors.items() if name.startswith(case + "/")}
    settings = config[case]
    attn = Attention(
        query_dim=12, cross_attention_dim=10, heads=2, dim_head=6,
        cross_attention_norm="layer_norm" if settings["norm"] else None,
    ).double()  # fmt: skip
    attn.load_state_dict({name[5:]: value for name, value in t.items() if name.startswith("attn/")})
    adapter = MIPAdapter({"": GatedReferenceMaps(10, 12).double()}, scale=settings["scale"])
    adapter.maps[0].load_state_dict({name[3:]: value for name, value in t.items() if name.startswith("sd/")})
    x, ip = t["x"].requires_grad_(), t["ip"].requires_grad_()
    adapter.refer(ip, entities=t["entities"], lengths=settings["lengths"])
    with attnlib.attach(attn, adapter):
        y = attn(x, encoder_hidden_states=t["text"])
        torch.testing.assert_close(y, t["y"], atol=1e-9, rtol=1e-9)
        y.backward(t["g"])
    torch.testing.assert_close(x.grad, t["dx"], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(ip.grad, t["dip"], atol=1e-9, rtol=1e-9)
    for name, p in adapter.maps[0].named_parameters():
        torch.testing.assert_close(p.grad, t[f"dw/{name}"], atol=1e-9, rtol=1e-9)


# ---- what it is


def oracle(q, names, text, keys, values, gate, scale):
    """Place by place, in float64: q (H, N, d), names list of (H, len, d), text (H, N, d)."""
    heads, n, d = q.shape
    relevance = []
    for name in names:
        maps = [
            torch.softmax(torch.stack([name[h, t] @ q[h, p] for p in range(n)]) * d**-0.5, 0)
            for h in range(heads) for t in range(name.shape[1])
        ]  # fmt: skip
        relevance.append(sum(maps) / len(maps))
    total = sum(relevance)
    u = torch.sigmoid(torch.stack([gate @ text[:, p].flatten() for p in range(n)]))
    u = u / u.mean()
    out = text.clone()
    for r, (k, v) in enumerate(zip(keys, values, strict=True)):
        for p in range(n):
            for h in range(heads):
                a = torch.softmax(k[h] @ q[h, p] * d**-0.5, 0) @ v[h]
                out[h, p] += scale * relevance[r][p] / total[p] * u[p] * a
    return out


class Watch(Intervention):
    kinds = ("cross",)

    def __init__(self):
        self.seen = []

    def around_attention(self, site, q, k, v, call):
        out = call(q, k, v)
        self.seen.append((site, q, out))
        return out


def test_a_pipeline_with_names_of_its_own_per_prompt(pipe):
    prompts = ["a cat and a hat", "a dog in a park"]
    torch.manual_seed(0)
    tokens = torch.randn(2, 2, 3, 16)
    adapter = MIPAdapter.of(pipe, scale=0.8).refer(tokens, names=[["cat", "hat"], ["dog", "green park"]])
    outer, inner = Watch(), Watch()
    with attnlib.attach(pipe, outer, adapter, inner), torch.no_grad():
        out = image(pipe, prompts)
        site, q, got = outer.seen[1]
        _, _, text = inner.seen[1]
        weights, gate = shares(adapter.relevance(site, q)), adapter.gate(site, text)
    assert out.isfinite().all() and site.rows == ("uncond",) * 4 + ("cond",) * 4
    torch.testing.assert_close(weights.sum(1), torch.ones(8, q.shape[2]))
    torch.testing.assert_close(gate.mean(1), torch.ones(8))
    # Under guidance both names are empty, and so both weigh the same where they have as many tokens.
    torch.testing.assert_close(adapter.relevance(site, q).sum(-1), torch.ones(8, 2))
    module, maps = site.module, adapter.at(site)

    def of_name(name):
        ids = pipe.tokenizer(name, padding="max_length", max_length=77, return_tensors="pt").input_ids
        count = len(pipe.tokenizer(name).input_ids) - 2
        states = pipe.text_encoder(ids)[0]
        return module.to_k(states[0, 1 : 1 + count]).unflatten(-1, (site.heads, -1)).transpose(0, 1).double()

    with torch.no_grad():
        for row, prompt, names in ((4, 0, ["cat", "hat"]), (7, 1, ["dog", "green park"])):
            k, v = (
                [f(tokens[prompt, r]).unflatten(-1, (site.heads, -1)).transpose(0, 1).double() for r in range(2)]
                for f in (maps.to_k_ip, maps.to_v_ip)
            )
            want = oracle(
                q[row].double(), [of_name(n) for n in names], text[row].double(), k, v,
                maps.text_to_weight.weight[0].double(), 0.8,
            )  # fmt: skip
            torch.testing.assert_close(got[row].double(), want, atol=2e-5, rtol=1e-4)
    # Zeros of tokens have no values, so rows under guidance are the text's.
    torch.testing.assert_close(got[:4], text[:4])


def test_one_reference_without_gate_is_ip_adapter(pipe):
    torch.manual_seed(0)
    tokens = torch.randn(1, 1, 3, 16)
    ip = ReferenceBranches.of(pipe).refer(tokens)
    mip = MIPAdapter.of(pipe).refer(tokens, names=["cat"])
    with torch.no_grad():
        for maps in mip.maps:
            maps.text_to_weight.weight.zero_()
    with attnlib.attach(pipe, ip):
        want = image(pipe)
    with attnlib.attach(pipe, mip):
        torch.testing.assert_close(image(pipe), want, atol=1e-6, rtol=1e-5)
    # Two of equal names have halves.
    two = MIPAdapter.of(pipe).refer(tokens.expand(-1, 2, -1, -1), names=["cat", "cat"])
    two.maps.load_state_dict(mip.maps.state_dict())
    with attnlib.attach(pipe, two):
        torch.testing.assert_close(image(pipe), want, atol=1e-5, rtol=1e-4)


def test_a_reference_rules_where_queries_are_like_its_name():
    torch.manual_seed(0)
    attn = Attention(query_dim=16, cross_attention_dim=16, heads=2, dim_head=8).eval()
    adapter = MIPAdapter({"": GatedReferenceMaps(16, 16)})
    entities = torch.randn(1, 2, 4, 16)
    adapter.refer(torch.randn(1, 2, 3, 16), entities=entities, lengths=[1, 1])
    watch = Watch()
    with torch.no_grad(), attnlib.attach(attn, watch, adapter):
        keys = [attn.to_k(entities[0, r, 1]) for r in range(2)]
        x = torch.zeros(1, 16, 16)
        x[0, :8], x[0, 8:] = (
            3 * torch.linalg.solve(attn.to_q.weight, keys[0]),
            3 * torch.linalg.solve(attn.to_q.weight, keys[1]),
        )
        attn(x, encoder_hidden_states=torch.randn(1, 5, 16))
        site, q, _ = watch.seen[0]
        weights = shares(adapter.relevance(site, q))
    assert (weights[0, 0, :8] > 0.8).all() and (weights[0, 1, 8:] > 0.8).all()
    nothing = shares(torch.zeros(1, 2, 3))
    assert torch.equal(nothing, torch.full((1, 2, 3), 0.5))


def test_scale_zero_exceptions_and_other_schedulers(pipe, tmp_path_factory):
    plain = image(pipe)
    off = MIPAdapter.of(pipe, scale=0.0)
    with attnlib.attach(pipe, off):
        assert torch.equal(image(pipe), plain)

    class Breaks(Intervention):
        kinds = ("cross",)

        def on_output(self, site, out):
            return out * (1 / (site.step - 1))  # breaks at the second step

    adapter = MIPAdapter.of(pipe).refer(torch.randn(1, 2, 3, 16), names=["cat", "hat"])
    with pytest.raises(ZeroDivisionError), attnlib.attach(pipe, adapter, Breaks()):
        image(pipe)
    assert torch.equal(image(pipe), plain)
    half = pipes.stable_diffusion(
        str(tmp_path_factory.mktemp("words")), model=pipes.unet(size=8),
        plan=pipes.scheduler("EulerDiscreteScheduler"),
    )  # fmt: skip
    for dtype in (torch.float16, torch.bfloat16):
        half.unet.to(dtype)
        half.text_encoder.to(dtype)
        adapter = MIPAdapter.of(half).refer(torch.randn(1, 2, 3, 16), names=["cat", "hat"])
        with attnlib.attach(half, adapter):
            out = image(half)
        assert out.dtype == dtype and out.isfinite().all()


def test_sdxl_reads_names_through_both_encoders(tmp_path_factory):
    pipe = pipes.sdxl(str(tmp_path_factory.mktemp("words")))
    latents = torch.randn((2, 4, 16, 16), generator=torch.Generator().manual_seed(0))

    def run():
        return pipe(
            "a cat and a hat", latents=latents, num_inference_steps=2, output_type="latent", num_images_per_prompt=2,
            height=16, width=16,
        ).images  # fmt: skip

    plain = run()
    adapter = MIPAdapter.of(pipe).refer(torch.randn(1, 2, 3, 32), names=["cat", "hat"])
    with attnlib.attach(pipe, adapter):
        out = run()
    assert out.isfinite().all() and not torch.allclose(out, plain, atol=1e-4)
    assert adapter._entities[0].shape == (1, 2, 77, 32) and adapter._entities[1] == [[1, 3]]
    assert torch.equal(run(), plain)


# ---- weights and training


def test_released_weights_load_strictly(pipe):
    adapter, other = MIPAdapter.of(pipe), MIPAdapter.of(pipe)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p))
    released = adapter.released()["ip_adapter"]
    assert sorted(released)[:3] == ["1.text_to_weight.weight", "1.to_k_ip.weight", "1.to_v_ip.weight"]
    assert len(released) == 3 * len(adapter.names)
    other.load_released({"ip_adapter": released})
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), other.parameters(), strict=True))
    # An IP-Adapter to begin with has no gate.
    without = {name: value for name, value in released.items() if "text_to_weight" not in name}
    with pytest.raises(ValueError, match="lacks"):
        other.load_released({"ip_adapter": without})
    gate = other.maps[0].text_to_weight.weight.clone()
    other.load_released({"ip_adapter": without}, leave=["text_to_weight.weight"])
    assert torch.equal(other.maps[0].text_to_weight.weight, gate)
    with pytest.raises(ValueError, match="too many|left|not known|does not"):
        other.load_released({"ip_adapter": {**released, "1.strange.weight": torch.zeros(1)}})


def test_a_training_step_teaches_maps_and_gate_alone(pipe):
    unet, plan = pipe.unet, DDPMScheduler()
    torch.manual_seed(0)
    project = torch.nn.Linear(6, 16)
    adapter = MIPAdapter.of(unet, project=project)
    trained = adapter.trained()
    assert len(trained) == 3 * len(adapter.maps) and all(p is not q for p in trained for q in project.parameters())
    frozen = [p.clone() for p in (*unet.parameters(), *project.parameters())]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    latents, noise, text = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8), torch.randn(4, 5, 16)
    features, entities = torch.randn(4, 2, 3, 6), torch.randn(4, 2, 5, 16)
    lost, _ = dropped(4, 0.25, 0.25, 0.25, torch.Generator().manual_seed(0))
    features[lost] = 0
    times = torch.tensor([10, 300, 600, 900])
    unet.requires_grad_(False)
    losses = []
    try:
        with attnlib.attach(unet, adapter):
            for _ in range(6):
                adapter.refer(features, entities=entities, lengths=[[1, 2]] * 4)
                loss = F.mse_loss(unet(plan.add_noise(latents, noise, times), times, text).sample, noise)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(loss))
    finally:
        unet.requires_grad_(True)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    assert losses[-1] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(frozen, (*unet.parameters(), *project.parameters()), strict=True))


def test_shares_of_samples_without_images_or_text():
    images, text = dropped(20000, 0.1, 0.2, 0.3, torch.Generator().manual_seed(0))
    both = images & text
    for got, want in ((images & ~text, 0.1), (text & ~images, 0.2), (both, 0.3)):
        assert abs(got.float().mean() - want) < 0.02
    with pytest.raises(ValueError, match="add up to"):
        dropped(3, 0.5, 0.5, 0.5)


def test_what_is_refused(pipe):
    adapter = MIPAdapter.of(pipe)
    tokens = torch.randn(1, 2, 3, 16)
    for names in (["cat"], [["cat", "hat"], ["dog"]], [1, 2]):
        with pytest.raises((ValueError, TypeError), match="names must hold"):
            adapter.refer(tokens, names=names)
    with pytest.raises(TypeError, match="got the string"):
        adapter.refer(tokens, names="cat")
    with pytest.raises(ValueError, match="give either names"):
        adapter.refer(tokens)
    with pytest.raises(ValueError, match="need lengths"):
        adapter.refer(tokens, entities=torch.zeros(1, 2, 5, 16))
    with pytest.raises(ValueError, match="lengths"):
        adapter.refer(tokens, entities=torch.zeros(1, 2, 5, 16), lengths=[1, 5])
    adapter.refer(tokens, names=["cat", " ".join(["apple"] * 90)])
    with attnlib.attach(pipe, adapter), pytest.raises(ValueError, match="77|tokens|cut off"):
        image(pipe)
    adapter.refer(tokens, names=["cat", "hat"])
    with attnlib.attach(pipe.unet, adapter), pytest.raises(ValueError, match="attach to the pipeline"):
        pipe.unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 5, 16))
    adapter.refer(tokens, entities=torch.zeros(1, 2, 5, 16), lengths=[1, 2])
    with attnlib.attach(pipe, adapter), pytest.raises(ValueError, match="empty_entities"):
        image(pipe)
    adapter.refer(tokens, entities=torch.zeros(1, 2, 5, 12), lengths=[1, 2], empty_entities=torch.zeros(5, 12))
    with attnlib.attach(pipe, adapter), pytest.raises(ValueError, match="reads text of width 16, names have 12"):
        image(pipe)
