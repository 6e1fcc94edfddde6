"""Features of one step at others: the table against loops by hand, what runs, what is kept, diffusers' own caches."""

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers  # noqa: E402
from diffusers import hooks as caches  # noqa: E402

import attnlib  # noqa: E402
from attnlib.cache import DiffusersCache, StepCache  # noqa: E402
from attnlib.cache.steps import around, every  # noqa: E402
from attnlib.hooks import Intervention  # noqa: E402
from hooks import pipes  # noqa: E402


@pytest.fixture(scope="module")
def sd(folder):
    return pipes.stable_diffusion(folder)


@pytest.fixture(scope="module")
def dit():
    return pipes.dit()


def classes(pipe, steps=5, seed=0, **given):
    settings = {"class_labels": [3, 5], "output_type": "np", **given}
    out = pipe(num_inference_steps=steps, generator=torch.Generator().manual_seed(seed), **settings)
    return torch.as_tensor(out.images)


def calls_of(modules):
    """How often each of some modules runs, counted inside of it."""
    counts = dict.fromkeys(modules, 0)

    def count(name):
        def hook(*_):
            counts[name] += 1

        return hook

    handles = [m.register_forward_hook(count(n)) for n, m in modules.items()]
    return counts, lambda: [h.remove() for h in handles]


TABLE = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0]]).bool()


def test_a_table_is_the_loop_by_hand(dit):
    """A loop of sampling in float64 in which the two halves of each block are replaced from outside."""
    pipe = pipes.dit()
    pipe.transformer.double(), pipe.vae.double()
    names, kept = [f"transformer_blocks.{b}.{part}" for b in (0, 1) for part in ("attn1", "ff")], {}
    with attnlib.attach(pipe, StepCache(TABLE)) as session:
        got = classes(pipe)
        assert session.interventions[0].columns == names
        assert torch.equal(session.results["step-cache"]["executed"], TABLE.long())
        assert session.results["step-cache"]["possible"].sum() == 20
    model, plain = pipe.transformer, {}
    for column, name in enumerate(names):
        module = model.get_submodule(name)
        plain[module] = module.forward

        def forward(*args, column=column, module=module, **kwargs):
            if TABLE[now[0], column]:
                kept[column] = plain[module](*args, **kwargs)
            return kept[column]

        module.forward = forward
    now, t = [0], pipe.scheduler
    t.set_timesteps(5)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        for i, step in enumerate(t.timesteps):
            now[0] = i
            labels = torch.tensor([3, 5, 1000, 1000])
            c, u = model(torch.cat([z, z]), step.expand(4), labels).sample[:, :4].chunk(2)
            z = t.step(u + 4 * (c - u), step, z).prev_sample
        want = (pipe.vae.decode(z / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(got.permute(0, 3, 1, 2).double(), want, rtol=0, atol=1e-6)  # pixels leave as float32


def test_uneven_steps_lie_around_one():
    for count, center, power in ((5, 6, 1.4), (10, 0, 2.0), (4, 25, 1.0)):
        table = around(count, center, power)(20, 3)
        low, high = -(center ** (1 / power)), (20 - center if center <= 20 else center - 20) ** (1 / power)
        high = high if center <= 20 else -high
        us = [low + n * (high - low) / count for n in range(count)]
        at = {min(19, max(0, int((center + (abs(u) ** power) * (-1 if u < 0 else 1)) // 1))) for u in us} | {0}
        assert set(table[:, 0].nonzero().flatten().tolist()) == at and table.eq(table[:, :1]).all()
    gaps = around(6, 10, 2.0)(20, 1).flatten().nonzero().flatten().diff()
    assert gaps.min() < gaps[0] and gaps.min() < gaps[-1]  # densest in the middle


def test_ends_of_a_table(dit):
    plain = classes(dit)
    ones, first = torch.ones(5, dtype=torch.bool), torch.tensor([True, False, False, False, False])
    with attnlib.attach(dit, StepCache(ones)):
        assert torch.equal(classes(dit), plain)
        assert "forward" not in dit.transformer.transformer_blocks[0].attn1.__dict__  # nothing is touched for it
    with attnlib.attach(dit, StepCache(lambda steps, modules: torch.ones(steps, modules).bool())) as session:
        assert torch.equal(classes(dit), plain)
        assert session.results["step-cache"]["executed"].sum() == 20
    queries = {n: b.attn1.to_q for n, b in enumerate(dit.transformer.transformer_blocks)}
    counts, remove = calls_of(queries)
    with attnlib.attach(dit, StepCache(first)) as session:
        once = classes(dit)
        assert counts == {0: 1, 1: 1} and session.results["step-cache"]["executed"].sum() == 4
        assert torch.equal(classes(dit), once) and counts == {0: 2, 1: 2}  # a new call computes anew
    remove()
    assert not torch.equal(once, plain) and torch.equal(classes(dit), plain)


def test_skipped_resolutions_of_a_u_net(folder):
    """Only the outer resolution runs, on what the inner ones gave: the U-Net taken apart by hand."""
    pipe = pipes.stable_diffusion(folder)
    pipe.unet.double(), pipe.vae.double(), pipe.text_encoder.double()
    inner = ["down_blocks.1", "mid_block", "up_blocks.0"]
    with attnlib.attach(pipe, StepCache(every(2), inner)) as session:
        got = pipes.sample(pipe)
        assert session.results["step-cache"]["executed"].tolist() == [[1] * 3, [0] * 3] * 2
    unet, plan = pipe.unet, pipe.scheduler
    plan.set_timesteps(4)
    text, empty = pipe.encode_prompt("a red circle and a blue square", "cpu", 1, True)
    context = torch.cat([empty, text])
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        for i, t in enumerate(plan.timesteps):
            x = torch.cat([z, z])
            emb = unet.time_embedding(unet.time_proj(t.expand(2)).double())
            x = unet.conv_in(x)
            h, skips = unet.down_blocks[0](x, emb, context)
            if i % 2 == 0:
                deep, more = unet.down_blocks[1](h, emb, context)
                deep = unet.mid_block(deep, emb, encoder_hidden_states=context)
                kept = unet.up_blocks[0](deep, (skips[-1], *more), emb, encoder_hidden_states=context)
            y = unet.up_blocks[1](kept, (x, *skips[:-1]), emb, encoder_hidden_states=context)
            u, c = unet.conv_out(unet.conv_act(unet.conv_norm_out(y))).chunk(2)
            z = plan.step(u + 7.5 * (c - u), t, z).prev_sample
    assert torch.allclose(got, z, rtol=0, atol=1e-9)


def test_two_images_passes_and_schedulers(sd, dit):
    pair, alone = dict(num_images_per_prompt=2), dict(guidance_scale=1.0)
    for given in ({}, pair, alone, {"prompt": ["a red circle", "a cat"]}):
        with attnlib.attach(sd, StepCache(every(2), ["attention", "resnet"])) as session:
            assert pipes.sample(sd, **given).isfinite().all()
            executed = session.results["step-cache"]["executed"]
        assert executed[::2].eq(1).all() and executed[1::2].eq(0).all()
    pipe, given = pipes.flux()  # two passes, one after the other
    with attnlib.attach(pipe, StepCache(every(2))) as session:
        pipe(**given, num_inference_steps=4, output_type="latent")
        executed = session.results["step-cache"]["executed"]
        assert executed[::2].eq(2).all() and executed[1::2].eq(0).all()
    before = dit.scheduler
    try:
        for name in ("EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler"):
            dit.scheduler = pipes.scheduler(name)
            with attnlib.attach(dit, StepCache(every(2))) as session:
                assert classes(dit).isfinite().all()
                steps = len(dit.scheduler.timesteps)  # Heun's has two for each
                assert session.results["step-cache"]["executed"].shape == (steps, 4)
    finally:
        dit.scheduler = before


def test_a_pass_has_its_own_features(dit):
    """Two runs of the model at each step, on other rows and on the same ones, do not take each other's."""

    class Twice(Intervention):
        def around_denoiser(self, site, inputs, call):
            call({**inputs, site.main: torch.zeros_like(inputs[site.main])})
            with self.session.some_rows([1, 0, 3, 2]):
                call({**inputs, site.main: torch.ones_like(inputs[site.main])})
            return call(inputs)

    with attnlib.attach(dit, StepCache(every(2))) as session:
        want = classes(dit)
    with attnlib.attach(dit, Twice(), StepCache(every(2))) as session:
        assert torch.equal(classes(dit), want)
        assert session.results["step-cache"]["executed"].flatten().tolist() == ([3] * 4 + [0] * 4) * 2 + [3] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_inference_mode(dtype):
    pipe = pipes.dit()
    pipe.transformer.to(dtype), pipe.vae.to(dtype)
    with attnlib.attach(pipe, StepCache(every(2))), torch.inference_mode():
        assert classes(pipe).isfinite().all()


def test_memory_is_given_back(dit):
    cache = StepCache(every(3))
    with attnlib.attach(dit, cache):
        classes(dit, steps=7)
        assert not cache._kept  # step 6 is the last, and what it gave is of no use


def test_detaching_after_an_exception(dit):
    plain = classes(dit)
    forwards = [dict(m.__dict__) for m in dit.transformer.modules()]

    class Stop(Intervention):
        def around_denoiser(self, site, inputs, call):
            if site.step == 2:
                raise KeyError("stop")
            return call(inputs)

    with pytest.raises(KeyError), attnlib.attach(dit, Stop(), StepCache(every(2))):
        classes(dit)
    assert [dict(m.__dict__).keys() for m in dit.transformer.modules()] == [f.keys() for f in forwards]
    assert torch.equal(classes(dit), plain)


def test_bad_tables(dit):
    def attach(*args):
        return attnlib.attach(dit, StepCache(*args))

    with pytest.raises(TypeError, match="table must be boolean, True where a module runs, got torch.float32"):
        attach(torch.ones(3, 4))
    with pytest.raises(TypeError, match="a boolean tensor or a rule"):
        StepCache([[True]])
    with pytest.raises(ValueError, match=r"\(steps, 4\), a column for each module, got \(5, 3\)"):
        attach(TABLE[:, :3])
    with pytest.raises(ValueError, match=r"every module must run at the first step.*not \[0, 2, 3\]"):
        attach(TABLE[1:])
    with pytest.raises(ValueError, match="attn1 lies inside transformer_blocks.0"):
        attach(every(2), ["block", "attention"])
    with pytest.raises(ValueError, match="DiTTransformer2DModel has no module 'resnet'"):
        attach(every(2), ["resnet"])
    with attach(lambda steps, modules: [[True]]), pytest.raises(TypeError, match="table must be boolean.*got \\["):
        classes(dit)
    with attach(TABLE), pytest.raises(ValueError, match="table has 5 steps, and the pipeline takes 6"):
        classes(dit, steps=6)
    with pytest.raises(ValueError, match="count=9 steps are to run, and there are 5"), attach(around(9, 2)):
        classes(dit)
    with pytest.raises(ValueError, match="cannot both act on this model: both keep features"):
        attnlib.attach(dit, StepCache(every(2)), StepCache(every(3), ["*ff"]))


def test_a_model_by_itself(dit):
    model, x = dit.transformer, torch.randn(2, 4, 8, 8)

    def run(session, step, x=x):
        with session.at(step=step):
            return model(x, torch.full((len(x),), 10 - step), torch.ones(len(x)).long()).sample

    with torch.no_grad(), attnlib.attach(model, StepCache(TABLE)) as session:
        with pytest.raises(ValueError, match="which one runs is not known"):
            model(x, torch.tensor([3, 3]), torch.tensor([1, 1]))
        first = run(session, 0)
        run(session, 1)
        assert torch.equal(run(session, 0), first)  # begins anew
        with pytest.raises(ValueError, match=r"read \(2, 16, 16\) at step 0 and reads \(1, 16, 16\) at step 1"):
            run(session, 1, x[:1])
        run(session, 0)
        session.interventions[0]._kept[next(iter(session.interventions[0]._kept))].output.add_(1)
        with pytest.raises(RuntimeError, match="was changed in place since"):
            run(session, 1)
        with pytest.raises(ValueError, match="table has 5 steps, and step 7 runs"):
            run(session, 7)
    with attnlib.attach(model, StepCache(every(2))) as session, pytest.raises(ValueError, match="how many steps"):
        run(session, 0)


# ---- diffusers' own

newer = pytest.mark.skipif(
    not hasattr(caches.HookRegistry, "invalidate_child_registries_cache"),
    reason="this diffusers lets no hook of its own stand beside ours",
)


def test_a_diffusers_that_is_too_old_is_told(dit, monkeypatch):
    monkeypatch.delattr(caches.HookRegistry, "invalidate_child_registries_cache", raising=False)
    with pytest.raises(RuntimeError, match=f"which diffusers {diffusers.__version__} does not allow; use a newer one"):
        attnlib.attach(dit, DiffusersCache(caches.FirstBlockCacheConfig(threshold=0.1)))
    with attnlib.attach(dit, StepCache(every(2))):  # nothing is left behind
        pass


@newer
def test_pyramid_broadcast_is_a_table(dit):
    """All attentions at every second step: the same numbers from diffusers and from the table."""
    config = caches.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001)
    )
    with attnlib.attach(dit, DiffusersCache(config)) as session:
        theirs = classes(dit)
        again = classes(dit)
        count = session.results["diffusers-cache"]
    with attnlib.attach(dit, StepCache(every(2), ["attention"])):
        ours = classes(dit)
    assert torch.equal(theirs, ours) and torch.equal(again, ours)
    assert count["executed"].tolist() == [[1] * 4, [0, 1, 0, 1]] * 2 + [[1] * 4]
    assert count["possible"].tolist() == [[1] * 4] * 5


CONFIGS = {
    "first block": lambda: caches.FirstBlockCacheConfig(threshold=0.5),
    "taylor": lambda: caches.TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=1, cache_identifiers=[".*attn1"], max_order=1,
        taylor_factors_dtype=torch.float32,
    ),
    "magnitudes": lambda: caches.MagCacheConfig(mag_ratios=[1.0] * 5, num_inference_steps=5, threshold=0.1),
}  # fmt: skip


@newer
@pytest.mark.parametrize("name", CONFIGS)
def test_other_caches_of_diffusers(name, dit):
    plain = classes(dit)
    before = [m.__dict__.keys() for m in dit.transformer.modules()]
    before = [set(keys) for keys in before]
    queries = {n: b.attn1.to_q for n, b in enumerate(dit.transformer.transformer_blocks)}
    counts, remove = calls_of(queries)
    with attnlib.attach(dit, DiffusersCache(CONFIGS[name]())) as session:
        got = classes(dit)
        executed = session.results["diffusers-cache"]["executed"]
        assert executed[:, ::2].sum() == sum(counts.values()) < 10  # counted where it runs
        assert torch.equal(classes(dit), got)
    remove()
    assert not torch.equal(got, plain) and torch.equal(classes(dit), plain)
    assert [set(m.__dict__) for m in dit.transformer.modules()] == before


@newer
def test_a_cache_of_diffusers_by_itself():
    """In Flux, whose pipeline sets contexts: the same as ``enable_cache``; FasterCache with it."""
    pipe, given = pipes.flux()
    given = {**given, "num_inference_steps": 4, "output_type": "latent"}

    def run():
        return pipe(**given, generator=torch.Generator().manual_seed(0)).images

    plain = run()
    config = caches.FirstBlockCacheConfig(threshold=0.9)
    pipe.transformer.enable_cache(config)
    want = run()
    with pytest.raises(ValueError, match="has a cache of diffusers already"):
        attnlib.attach(pipe, DiffusersCache(config))
    pipe.transformer.disable_cache()
    with attnlib.attach(pipe, DiffusersCache(config)):
        assert torch.equal(run(), want)
    assert torch.equal(run(), plain) and not torch.equal(want, plain)
    faster = caches.FasterCacheConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 900),
        spatial_attention_block_identifiers=("transformer_blocks.*attn", "single_transformer_blocks.*attn"),
        is_guidance_distilled=True, tensor_format="BCHW",
    )  # fmt: skip
    with attnlib.attach(pipe, DiffusersCache(faster)) as session:
        assert run().isfinite().all()
        found = session.results["diffusers-cache"]
        assert found["executed"].sum() < found["possible"].sum()


@newer
def test_refusals_of_diffusers_caches(dit):
    with pytest.raises(TypeError, match="config must be one of diffusers.hooks"):
        DiffusersCache("first")
    with pytest.raises(ValueError, match="TaylorSeerCacheConfig finds no module in DiTTransformer2DModel"):
        attnlib.attach(dit, DiffusersCache(caches.TaylorSeerCacheConfig()))
    with pytest.raises(ValueError, match="FasterCache reads unconditional rows first"):
        attnlib.attach(dit, DiffusersCache(caches.FasterCacheConfig()))
    with pytest.raises(ValueError, match="both keep features"):
        attnlib.attach(dit, DiffusersCache(CONFIGS["taylor"]()), StepCache(every(2)))
    assert classes(dit).isfinite().all() and not hasattr(dit.transformer, "_diffusers_hook")
    assert diffusers.DiTPipeline is type(dit)
