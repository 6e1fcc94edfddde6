"""HarmoniCa: training and sampling held to the authors' DiT, files, what is refused."""

import argparse
import json
import math

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from doubles import doubles  # noqa: E402
from parity import Fixture  # noqa: E402

import attnlib  # noqa: E402
from attnlib.cache import HarmoniCa, Router, RouterTraining, image_error_weights, train_router  # noqa: E402
from hooks import pipes  # noqa: E402


class Their(Fixture):
    def __init__(self):
        super().__init__("harmonica")
        self.pipe = self.pipeline()

    def pipeline(self):
        """A ``DiTPipeline`` with their weights, schedule and embedding of timesteps, in float64."""
        from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

        cfg, sd, new = self.config, self.under("sd"), {}
        model = DiTTransformer2DModel(
            sample_size=cfg["input_size"], in_channels=3, out_channels=6, num_layers=cfg["depth"],
            num_attention_heads=cfg["num_heads"], attention_head_dim=cfg["hidden_size"] // cfg["num_heads"],
            patch_size=cfg["patch_size"], num_embeds_ada_norm=cfg["num_classes"], norm_eps=1e-6,
        )  # fmt: skip
        table = torch.zeros(1001, cfg["hidden_size"], dtype=torch.float64)
        table[[*cfg["labels"], 1000]] = sd["y_embedder.embedding_table.weight"]
        for kind in ("weight", "bias"):
            new[f"pos_embed.proj.{kind}"] = sd[f"x_embedder.proj.{kind}"]
            new[f"proj_out_1.{kind}"] = sd[f"final_layer.adaLN_modulation.1.{kind}"]
            new[f"proj_out_2.{kind}"] = sd[f"final_layer.linear.{kind}"]
            for b in range(cfg["depth"]):
                theirs, ours = f"blocks.{b}", f"transformer_blocks.{b}"
                for n in (0, 2):
                    name = f"{ours}.norm1.emb.timestep_embedder.linear_{1 + n // 2}.{kind}"
                    new[name] = sd[f"t_embedder.mlp.{n}.{kind}"]
                new[f"{ours}.norm1.linear.{kind}"] = sd[f"{theirs}.adaLN_modulation.1.{kind}"]
                for name, part in zip("qkv", sd[f"{theirs}.attn.qkv.{kind}"].chunk(3), strict=True):
                    new[f"{ours}.attn1.to_{name}.{kind}"] = part
                new[f"{ours}.attn1.to_out.0.{kind}"] = sd[f"{theirs}.attn.proj.{kind}"]
                new[f"{ours}.ff.net.0.proj.{kind}"] = sd[f"{theirs}.mlp.fc1.{kind}"]
                new[f"{ours}.ff.net.2.{kind}"] = sd[f"{theirs}.mlp.fc2.{kind}"]
                new[f"{ours}.norm1.emb.class_embedder.embedding_table.weight"] = table
        model = model.double().eval()
        model.load_state_dict(new)
        assert torch.allclose(model.pos_embed.pos_embed.double(), sd["pos_embed"], atol=1e-6)
        model.pos_embed.pos_embed = sd["pos_embed"]

        class Time(torch.nn.Module):  # theirs; diffusers' frequencies end one earlier
            def forward(self, t):
                args = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(128.0) / 128)
                return torch.cat([args.cos(), args.sin()], -1).double()

        for block in model.transformer_blocks:
            block.norm1.emb.time_proj = Time()

        class Consecutive(DDIMScheduler):
            """Steps to the next timestep of its list, as theirs; diffusers' DDIM steps by an even stride."""

            def step(self, model_output, timestep, sample, **kwargs):
                alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
                later = self.timesteps[self.timesteps < timestep]
                now, then = alphas[timestep], alphas[later[0]] if len(later) else torch.tensor(1.0)
                start = (sample - (1 - now).sqrt() * model_output) / now.sqrt()
                return (then.sqrt() * start + (1 - then).sqrt() * model_output, start)

        class Out(tuple):
            prev_sample = property(lambda self: self[0])

        step = Consecutive.step
        Consecutive.step = lambda self, *args, **kwargs: Out(step(self, *args, **kwargs))
        plan = Consecutive(beta_start=1e-4, beta_end=0.02, timestep_spacing="linspace", clip_sample=False)
        vae = pipes.vae().double()
        vae.decode = lambda z: (vae.seen.append(z), argparse.Namespace(sample=z))[1]
        vae.seen = []
        return pipes.quiet(DiTPipeline(transformer=model, vae=vae, scheduler=plan))

    def router(self, which, **said):
        cfg = self.config
        router = Router(cfg["steps"], 4, cfg["threshold"], **{"timesteps": cfg["timesteps"], **said}).double()
        router.load_state_dict(self.under(which))
        return router


@pytest.fixture(scope="module")
def recorded():
    with doubles():
        return Their()


@pytest.fixture
def their(recorded):
    with doubles():
        yield recorded


def test_training_is_the_authors(their):
    """Four samplings from their noise, lambda measured twice: losses, lambda, router and trajectory."""
    cfg, router, progress = their.config, their.router("start", layout=("cond", "uncond"), size=(3, 4, 4)), []
    plain = {n: p.clone() for n, p in their.pipe.transformer.named_parameters()}
    lambdas, measured = [], image_error_weights

    def draw(epoch):
        if epoch in (0, 2):
            lambdas.append(measured(their.pipe, router, given, seed=epoch))
        return given

    given = {"class_labels": cfg["labels"], "guidance_scale": cfg["train_scale"]}
    history = train_router(
        their.pipe, router, draw, 4, lr=cfg["lr"], beta=cfg["l1"], refresh=cfg["refresh"],
        progress=lambda epoch, losses: progress.append(len(losses)),
    )  # fmt: skip
    assert torch.allclose(torch.tensor(lambdas, dtype=torch.float64), their.tensors["lambdas"], rtol=1e-9, atol=0)
    got = torch.tensor([[h["loss"], h["data"], h["scores"]] for h in history], dtype=torch.float64)
    assert torch.allclose(got, their.tensors["losses"], rtol=1e-9, atol=1e-12)
    for name, value in their.under("end").items():
        assert torch.allclose(router.state_dict()[name], value, rtol=0, atol=1e-9), name
    assert torch.equal(router.row(0), torch.full((4,), 5.0).double())  # the first step is not learnt
    assert progress == [3] * 4 and [h["step"] for h in history[:3]] == [1, 2, 3]
    assert all(torch.equal(p, plain[n]) and p.grad is None for n, p in their.pipe.transformer.named_parameters())


def test_trajectories_are_the_authors(their):
    router, cfg = their.router("start"), their.config
    optimizer = torch.optim.AdamW(router.parameters(), lr=cfg["lr"], weight_decay=0)
    for epoch in range(4):
        training = RouterTraining(router, optimizer, their.tensors["lambdas"][epoch // 2].tolist(), cfg["l1"])
        with attnlib.attach(their.pipe, training) as session:
            their.pipe(
                cfg["labels"], guidance_scale=cfg["train_scale"], num_inference_steps=4, output_type="latent",
                generator=torch.Generator().manual_seed(epoch),
            )  # fmt: skip
            assert torch.allclose(session.sampling.latents, their.tensors[f"x/{epoch}"], rtol=0, atol=1e-9)


def test_sampling_is_the_authors(their, tmp_path):
    """Their file, their threshold, their sampler."""
    cfg, end = their.config, their.under("end")
    args = argparse.Namespace(ste_threshold=cfg["threshold"], l1=cfg["l1"])
    torch.save({"routers": {n: v.float() for n, v in end.items()}, "opt": {}, "args": args}, tmp_path / "0020000.pt")
    router = Router.load(tmp_path / "0020000.pt")
    assert router.threshold == cfg["threshold"] and list(router.timesteps) == cfg["timesteps"]
    assert torch.equal(router.table(), their.tensors["table"].flip(0))
    attention = [b.attn1.to_q for b in their.pipe.transformer.transformer_blocks]
    called, handles = [], [m.register_forward_hook(lambda *_: called.append(1)) for m in attention]
    with attnlib.attach(their.pipe, HarmoniCa(router)) as session:
        their.pipe(
            cfg["labels"], guidance_scale=cfg["sample_scale"], num_inference_steps=4, output_type="latent",
            generator=torch.Generator().manual_seed(9),
        )  # fmt: skip
        assert torch.allclose(session.sampling.latents, their.tensors["sampled"], rtol=0, atol=1e-9)
        executed = session.results["harmonica"]["executed"]
    for handle in handles:
        handle.remove()
    assert torch.equal(executed, router.table().long())  # as often as r > tau, in all
    assert len(called) == router.table()[:, ::2].sum()  # what is skipped is not called


def classes(pipe, steps=4, **given):
    settings = {"class_labels": [3, 5], "output_type": "np", "generator": torch.Generator().manual_seed(0), **given}
    return torch.as_tensor(pipe(num_inference_steps=steps, **settings).images)


def filled(steps=4, modules=4, value=9.0, **said):
    router = Router(steps, modules, **said)
    with torch.no_grad():
        for step in range(1, steps):
            router.row(step).fill_(value)
    return router


def test_ends():
    pipe = pipes.dit()
    plain = classes(pipe)
    with attnlib.attach(pipe, HarmoniCa(filled())):
        assert torch.equal(classes(pipe), plain)
    with attnlib.attach(pipe, HarmoniCa(filled(value=-9.0))) as session:
        frozen = classes(pipe)
        assert session.results["harmonica"]["executed"].tolist() == [[1] * 4] + [[0] * 4] * 3
    with attnlib.attach(pipe, attnlib.cache.StepCache(torch.tensor([True, False, False, False]))):
        assert torch.equal(classes(pipe), frozen)
    assert torch.equal(classes(pipe), plain)
    # Rows of ones blend nothing: no row does anything to the image.
    given = {"class_labels": [3], "guidance_scale": 1.5}
    ones = filled(value=40.0)
    assert image_error_weights(pipe, ones, given) == [0.0] * 4
    assert all(w > 0 for w in image_error_weights(pipe, filled(value=-1.0), given)[1:])


def test_beta_decides_how_much_runs():
    pipe = pipes.dit()
    with torch.no_grad():
        for p in pipe.transformer.parameters():
            p.mul_(3)
    given = {"class_labels": [3, 5], "guidance_scale": 1.5}

    def train(beta, value):
        torch.manual_seed(0)
        router = filled(value=value)
        history = train_router(pipe, router, lambda epoch: given, 5, lr=0.5, beta=beta, refresh=32)
        return router.scores(), [h["data"] for h in history]

    cheap, _ = train(1e5, 0.0)
    dear, data = train(0.0, 0.0)
    assert cheap[1:].mean() < 0.25 and dear[1:].mean() > 0.5  # from 1/2
    assert sum(data[-3:]) < sum(data[:3])
    assert cheap[0].min() > 0.99


def test_files(tmp_path):
    torch.manual_seed(0)
    router = Router(4, 6, 0.2, [9, 6, 3, 0], ("uncond", "cond"), (4, 8, 8))
    for name in ("router.safetensors", "router.pt"):
        router.save(tmp_path / name)
        back = Router.load(tmp_path / name)
        assert back.extra_state() == router.extra_state() and torch.equal(back.scores(), router.scores())
        assert not back.row(0).requires_grad and back.row(1).requires_grad
    assert list(router.state_dict()) == [f"{i}.prob" for i in range(4)]
    assert Router.load(tmp_path / "router.pt", threshold=0.5).threshold == 0.5
    torch.save({"routers": {"a": torch.ones(2)}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="holds no router, rows '0.prob'"):
        Router.load(tmp_path / "other.pt")
    assert json.loads(json.dumps(router.extra_state()))["size"] == [4, 8, 8]


def test_other_pipelines():
    """PixArt (three columns a block), guidance or none, two images per prompt, other schedulers, half precision."""
    pipe, given = pipes.pixart()
    given = {**given, "output_type": "latent", "num_inference_steps": 4}
    torch.manual_seed(0)
    router = Router(4, 6, 0.5)
    for more in ({}, {"guidance_scale": 1.0}, {"num_images_per_prompt": 2}):
        with attnlib.attach(pipe, HarmoniCa(router)) as session:
            assert pipe(**given, **more).images.isfinite().all()
            assert torch.equal(session.results["harmonica"]["executed"], router.table().long())
            names = [n.rpartition(".")[2] for n in session.interventions[0].columns]
            assert names == ["attn1", "attn2", "ff"] * 2
    draw = {name: value for name, value in given.items() if name != "num_inference_steps"}
    before = router.scores().detach()
    history = train_router(pipe, router, lambda epoch: draw, 2, refresh=8, lr=0.1)
    assert len(history) == 6 and not torch.equal(router.scores(), before)
    pipe = pipes.dit()
    for dtype in (torch.bfloat16, torch.float16):
        pipe.transformer.to(dtype), pipe.vae.to(dtype)
        with attnlib.attach(pipe, HarmoniCa(Router(4, 4))):
            assert classes(pipe).isfinite().all()
    pipe = pipes.dit()
    for name in ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler"):
        pipe.scheduler = pipes.scheduler(name)
        with attnlib.attach(pipe, HarmoniCa(Router(4, 4))):
            assert classes(pipe).isfinite().all()


def test_refusals():
    pipe = pipes.dit()

    def run(router, **given):
        with attnlib.attach(pipe, HarmoniCa(router)):
            return classes(pipe, **given)

    at = [750, 500, 250, 0]
    run(Router(4, 4, timesteps=at, layout=("cond", "uncond"), size=(4, 8, 8)))
    with pytest.raises(ValueError, match=r"for timesteps \[999, 666, 333, 0\], and the pipeline takes \[750, 500"):
        run(Router(4, 4, timesteps=[999, 666, 333, 0]))
    with pytest.raises(ValueError, match=r"for timesteps \[750, 500, 250, 0\], and the pipeline takes \[800, 600"):
        run(Router(4, 4, timesteps=at), steps=5)
    with pytest.raises(ValueError, match="table has 4 steps, and the pipeline takes 5"):
        run(Router(4, 4), steps=5)
    with pytest.raises(ValueError, match=r"for batches of rows \('cond', 'uncond'\), .* with \('cond',\)"):
        run(Router(4, 4, layout=("cond", "uncond")), guidance_scale=1.0)
    with pytest.raises(ValueError, match=r"for inputs of size \(4, 16, 16\), .* with \(4, 8, 8\)"):
        run(Router(4, 4, size=(4, 16, 16)))
    with pytest.raises(ValueError, match="table must be"):
        run(Router(4, 5))
    with pytest.raises(ValueError, match="router has 5 columns, and DiTTransformer2DModel has 4 modules"):
        train_router(pipe, Router(4, 5), lambda epoch: {"class_labels": [3]}, 1, refresh=4)
    with pytest.raises(ValueError, match="refresh=6 must be a multiple of the 4 steps"):
        train_router(pipe, Router(4, 4), lambda epoch: {}, 1, refresh=6)
    with pytest.raises(ValueError, match="weights must say lambda"):
        RouterTraining(Router(4, 4), torch.optim.SGD([torch.ones(1, requires_grad=True)]))
    for wrong, message in (
        (lambda: RouterTraining(3), "router must be Router"),
        (lambda: RouterTraining(Router(4, 4), scores=torch.ones(4, 3)), r"scores must be .*steps=4, modules=4"),
        (lambda: RouterTraining(Router(4, 4), guided_channels=0), "guided_channels"),
        (lambda: train_router(pipe, Router(4, 4), {}, 1), "draw must be a function"),
        (lambda: train_router(pipe, 4, dict, 1), "router must be Router"),
        (lambda: image_error_weights(pipe, Router(4, 4), 3), "given must be Mapping"),
        (lambda: Router(4, 4).row(4), "step must be an integer"),
        (lambda: Router(4, 4, layout="cond"), "layout must be a sequence"),
        (lambda: Router(4, 4, size=8), "size must be a sequence"),
        (lambda: Router(4, 4, timesteps=["a"] * 4), "timesteps"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            wrong()
    with pytest.raises(ValueError, match=r"weights must say lambda of each of 4 steps.*got 2"):
        RouterTraining(Router(4, 4), torch.optim.SGD([torch.ones(1, requires_grad=True)]), [0.0, 1.0])
    with pytest.raises(ValueError, match="timesteps has 2 entries for steps=4"):
        Router(4, 4, timesteps=[1, 0])
    with pytest.raises(TypeError, match=r"router must be an attnlib.cache.Router"):
        HarmoniCa(torch.ones(4, 4))
    with pytest.raises(ValueError, match="both keep features from step to step"):
        attnlib.attach(pipe, HarmoniCa(Router(4, 4, 0.9)), attnlib.cache.StepCache(attnlib.cache.steps.every(2)))
    flux, given = pipes.flux()
    with pytest.raises(ValueError, match="FluxPipeline runs its passes one after the other"):
        train_router(flux, Router(4, 5), lambda epoch: given, 1, refresh=4)
    model, x = pipe.transformer, torch.randn(4, 4, 8, 8)
    with torch.no_grad(), attnlib.attach(model, HarmoniCa(filled(value=-9.0))) as session:
        labels = torch.ones(4).long()
        with session.at(step=0, rows=("cond", "cond", "uncond", "uncond")):
            model(x, torch.full((4,), 9), labels)
        with session.at(step=1, rows=("cond", "cond")), pytest.raises(ValueError, match="is kept cannot be used again"):
            model(x[:2], torch.full((2,), 9), labels[:2])
    assert classes(pipe).isfinite().all()
