"""Whole pipelines of diffusers: what they say about steps and rows, runs of the whole denoiser, and moved latents."""

import copy

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import attnlib  # noqa: E402
from attnlib.hooks import Intervention, Record, rows_of, with_gradient  # noqa: E402
from hooks import pipes  # noqa: E402
from hooks.models import Watch  # noqa: E402


class Whole(Intervention):
    """Looks at every call of the denoiser; ``change`` may answer instead."""

    name = "whole"

    def __init__(self, change=None):
        self.change, self.sites = change, []

    def around_denoiser(self, site, inputs, call):
        self.sites.append(site)
        return call(inputs) if self.change is None else self.change(site, inputs, call)


class Modules(Intervention):
    name = "modules"

    def __init__(self, modules, change=None):
        self.acts_on, self.change, self.sites = modules, change, []

    def around_module(self, site, inputs, call):
        self.sites.append(site)
        return call(inputs) if self.change is None else self.change(site, inputs, call)


# ---- what is known


@pytest.mark.parametrize(
    "name", ["DDIM", "PNDM", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "UniPCMultistep"]
)
def test_steps_and_rows_of_every_scheduler_and_nothing_is_changed(folder, name):
    settings = {"skip_prk_steps": True} if name == "PNDM" else {}
    pipe = pipes.stable_diffusion(folder, plan=pipes.scheduler(name + "Scheduler", **settings))
    torch.manual_seed(5)
    before, state = pipes.sample(pipe, steps=3, generator=None), torch.get_rng_state()
    timesteps, watch, whole = [int(t) for t in pipe.scheduler.timesteps], Watch([1, 8]), Whole()
    cls = type(pipe), type(pipe.scheduler)
    torch.manual_seed(5)
    with attnlib.attach(
        pipe, whole, watch, Modules(["resnet", "feed-forward", "stage", "block", "attention"])
    ) as session:
        assert isinstance(pipe, cls[0]) and session.model is pipe.unet
        assert torch.equal(pipes.sample(pipe, steps=3, generator=None), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert (type(pipe), type(pipe.scheduler)) == cls and "step" not in pipe.scheduler.__dict__
    assert [int(s.timestep) for s in whole.sites] == timesteps
    assert [(s.step, s.steps) for s in whole.sites] == [(i, len(timesteps)) for i in range(len(timesteps))]
    assert {s.rows for s in whole.sites} == {("uncond", "cond")}
    seen = [s for s, *_ in watch.calls]
    assert {(s.step, s.steps, s.rows, s.prompts) for s in seen} == {
        (i, len(timesteps), ("uncond", "cond"), (0, 0)) for i in range(len(timesteps))
    }
    torch.manual_seed(5)
    assert torch.equal(pipes.sample(pipe, steps=3, generator=None), before)


def test_rows_of_several_prompts_and_images(pipe):
    whole = Whole()
    prompts = ["a red circle", "a dog"]
    with attnlib.attach(pipe, whole) as session:
        found = {}

        def look(site, inputs, call):
            found.update(count=site.sampling.prompt_count, prompts=site.sampling.prompts, call=site.sampling.call)
            return call(inputs)

        whole.change = look
        pipes.sample(pipe, prompts, steps=1, num_images_per_prompt=2)
        assert whole.sites[-1].rows == ("uncond",) * 4 + ("cond",) * 4
        assert whole.sites[-1].prompts == (0, 0, 1, 1) * 2
        assert found == {"count": 2, "prompts": prompts, "call": 0}
        pipes.sample(pipe, "a cat", steps=1, num_images_per_prompt=3, guidance_scale=1.0)
        assert whole.sites[-1].rows == ("cond",) * 3 and whole.sites[-1].prompts == (0,) * 3
        assert found["call"] == 1
        text = torch.randn(2, 77, 16)
        pipes.sample(pipe, None, steps=1, prompt_embeds=text, negative_prompt_embeds=text)
        assert whole.sites[-1].rows == ("uncond",) * 2 + ("cond",) * 2 and found["prompts"] is None
        assert not session.sampling.running and session.step is None
        pipe.unet(torch.randn(1, 4, 16, 16), 7, text[:1])  # by hand: nothing is known but the timestep
    assert (whole.sites[-1].rows, whole.sites[-1].step, whole.sites[-1].timestep) == (None, None, 7)


def test_a_session_names_rows_itself_where_the_user_does(pipe):
    whole = Whole()
    with attnlib.attach(pipe, whole, rows=("a", "b")):
        pipes.sample(pipe, steps=1)
    assert whole.sites[0].rows == ("a", "b") and whole.sites[0].step == 0


def test_transformers_with_joint_attention(folder):
    pipe, given = pipes.sd3()
    before = pipes.sample(pipe, None, **given)
    watch, whole = Watch(), Whole()
    with attnlib.attach(pipe, watch, whole):
        assert torch.equal(pipes.sample(pipe, None, num_images_per_prompt=1, **given), before)
    assert [(s.step, s.steps, s.rows, s.main) for s in whole.sites] == [
        (i, 4, ("uncond", "cond"), "hidden_states") for i in range(4)
    ]
    assert {s.rows for s, *_ in watch.calls} == {("uncond", "cond")}

    pipe, given = pipes.flux()
    before = pipes.sample(pipe, None, steps=2, **given)
    whole = Whole()
    with attnlib.attach(pipe, whole):
        assert torch.equal(pipes.sample(pipe, None, steps=2, **given), before)
    # Guidance in passes of their own, which the pipeline names.
    assert [(s.step, s.pass_name, s.rows) for s in whole.sites] == [
        (0, "cond", ("cond",)), (0, "uncond", ("uncond",)), (1, "cond", ("cond",)), (1, "uncond", ("uncond",))
    ]  # fmt: skip


def test_a_class_conditional_transformer_puts_its_conditions_first():
    pipe, whole = pipes.dit(), Whole()

    def draw():
        return pipe(
            class_labels=[1, 2], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np"
        ).images

    before = draw()
    with attnlib.attach(pipe, whole):
        assert (draw() == before).all()
    assert {s.rows for s in whole.sites} == {("cond",) * 2 + ("uncond",) * 2}
    assert {s.prompts for s in whole.sites} == {(0, 1, 0, 1)} and [s.step for s in whole.sites] == [0, 1]


def test_image_to_image_counts_the_steps_that_are_taken(folder):
    pipe, whole = pipes.stable_diffusion(folder, "StableDiffusionImg2ImgPipeline"), Whole()
    image = torch.rand(1, 3, 16, 16)
    with attnlib.attach(pipe, whole):
        pipes.sample(pipe, steps=4, image=image, strength=0.5)
    assert [(s.step, s.steps) for s in whole.sites] == [(0, 2), (1, 2)]
    assert [int(s.timestep) for s in whole.sites] == [int(t) for t in pipe.scheduler.timesteps[-2:]]


def test_guidance_of_three_rows(folder):
    pipe, whole = pipes.stable_diffusion(folder, "StableDiffusionPAGPipeline", pag_applied_layers="mid"), Whole()
    with attnlib.attach(pipe, whole):
        pipes.sample(pipe, steps=1, pag_scale=2.0)
        pipes.sample(pipe, steps=1, pag_scale=2.0, guidance_scale=0.0)
    assert [s.rows for s in whole.sites] == [("uncond", "cond", "perturbed"), ("cond", "perturbed")]
    pipe = pipes.stable_diffusion(folder, "StableDiffusionInstructPix2PixPipeline", model=pipes.unet(in_channels=8))
    whole = Whole()
    with attnlib.attach(pipe, whole):
        pipes.sample(pipe, steps=1, image=torch.rand(1, 3, 16, 16))
    assert whole.sites[0].rows == ("cond", "image", "uncond")


def test_a_scheduler_put_in_its_place_is_followed(folder):
    pipe, whole = pipes.stable_diffusion(folder), Whole()
    with attnlib.attach(pipe, whole):
        pipe.scheduler = pipes.scheduler("EulerDiscreteScheduler")
        pipes.sample(pipe, steps=2)
        assert [s.step for s in whole.sites] == [0, 1]
        other = copy.deepcopy(pipe)
    assert type(other) is type(pipe) and pipe.scheduler.step.__func__ is type(pipe.scheduler).step
    assert not other.unet._forward_pre_hooks and "forward" not in other.unet.__dict__


def test_copies_made_inside_a_call_are_plain(pipe):
    found = []

    def look(site, inputs, call):
        scheduler = site.sampling.pipe.scheduler
        found.append((copy.deepcopy(scheduler), copy.copy(site.sampling.pipe), type(scheduler)))
        return call(inputs)

    with attnlib.attach(pipe, Whole(look)):
        pipes.sample(pipe, steps=1)
    scheduler, other, inside = found[0]
    assert type(scheduler) is type(pipe.scheduler) is not inside and type(other) is type(pipe)
    assert issubclass(inside, type(pipe.scheduler)) and inside.__name__ == "DDIMScheduler"


def test_an_exception_in_mid_step_leaves_everything_as_it_was(pipe):
    before, cls = pipes.sample(pipe), (type(pipe), type(pipe.scheduler))
    marks = {n: sorted(m.__dict__) for n, m in pipe.unet.named_modules()}

    def breaks(site, inputs, call):
        out = call(inputs)
        site.sampling.shift(torch.ones(1, 4, 16, 16))
        if site.step == 2:
            raise ZeroDivisionError
        return out

    with attnlib.attach(pipe, Whole(breaks), Modules(["block"]), Watch([2])) as session:
        with pytest.raises(ZeroDivisionError):
            pipes.sample(pipe)
        assert not session.sampling.running and type(pipe.scheduler) is cls[1]
        with pytest.raises(ZeroDivisionError):
            pipes.sample(pipe)
    assert (type(pipe), type(pipe.scheduler)) == cls and torch.equal(pipes.sample(pipe), before)
    assert marks == {n: sorted(m.__dict__) for n, m in pipe.unet.named_modules()}
    with pytest.raises(ZeroDivisionError), attnlib.attach(pipe, Whole(breaks)):
        pipes.sample(pipe)
    assert (type(pipe), type(pipe.scheduler)) == cls and torch.equal(pipes.sample(pipe), before)


# ---- runs of the whole model


def test_no_run_one_run_and_several(pipe):
    plain = pipes.sample(pipe, steps=3)
    kept = {}

    def reuse(site, inputs, call):
        if site.step == 1:
            return kept["last"]
        kept["last"] = call(inputs)
        return kept["last"]

    outer, inner = Whole(), Whole(reuse)
    with attnlib.attach(pipe, outer, inner, Record()) as session:
        got = pipes.sample(pipe, steps=3)
        runs = session._now.run
    assert len(outer.sites) == len(inner.sites) == 3 and not torch.equal(got, plain)
    # By hand: the second step goes on with the prediction of the first.
    pipe.scheduler.set_timesteps(3)
    text, empty = pipe.encode_prompt("a red circle and a blue square", "cpu", 1, True)
    z, noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3)), None
    with torch.no_grad():
        for i, t in enumerate(pipe.scheduler.timesteps):
            if i != 1:
                u, c = pipe.unet(torch.cat([z, z]), t, torch.cat([empty, text])).sample.chunk(2)
                noise = u + 7.5 * (c - u)
            z = pipe.scheduler.step(noise, t, z).prev_sample
    torch.testing.assert_close(got, z, atol=1e-6, rtol=1e-5)

    def average(site, inputs, call):
        return (call(inputs) + call({**inputs, "sample": inputs["sample"].flip(-1)}).flip(-1)) / 2

    with attnlib.attach(pipe, Whole(average)) as session:
        assert not torch.allclose(pipes.sample(pipe, steps=3), plain, atol=1e-5)
        assert session._now.run > runs


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_inside_a_pipeline(pipe, mode):
    """Of the whole model with respect to what it denoises, under the pipeline's own no_grad, for some rows."""
    found = []

    def slope(site, inputs, call):
        index = [i for i, row in enumerate(site.rows) if row == "cond"]
        some = rows_of(inputs, index, len(site.rows))
        with with_gradient(), site.sampling.session.some_rows(index):
            z = some["sample"].clone().requires_grad_()
            out = call({**some, "sample": z})
            found.append((some, torch.autograd.grad(out.square().sum(), z)[0], site))
        return call(inputs)

    watch = Watch([0])
    plain = pipes.sample(pipe, steps=1, num_images_per_prompt=2)
    with mode(), attnlib.attach(pipe, Whole(slope), watch):
        assert torch.equal(pipes.sample(pipe, steps=1, num_images_per_prompt=2), plain)
    some, got, _ = found[0]
    z = some["sample"].clone().requires_grad_()
    out = pipe.unet(z, some["timestep"], some["encoder_hidden_states"].clone()).sample
    torch.testing.assert_close(got, torch.autograd.grad(out.square().sum(), z)[0], atol=1e-5, rtol=1e-5)
    assert got.shape == (2, 4, 16, 16) and [s.rows for s, *_ in watch.calls] == [
        ("cond",) * 2,
        ("uncond",) * 2 + ("cond",) * 2,
    ]
    assert all(p.grad is None for p in pipe.unet.parameters())


@pytest.mark.parametrize("name", ["DDIM", "EulerDiscrete"])
def test_moved_latents_are_what_the_scheduler_steps_on_from(folder, name):
    pipe = pipes.stable_diffusion(folder, plan=pipes.scheduler(name + "Scheduler"))
    delta = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(9))

    def move(site, inputs, call):
        if site.step != 1:
            return call(inputs)
        site.sampling.shift(delta)
        return call({**inputs, "sample": inputs["sample"] + delta * site.sampling.scale})

    with attnlib.attach(pipe, Whole(move)):
        got = pipes.sample(pipe)

    def nudge(pipe, i, t, given):
        return {"latents": given["latents"] + delta} if i == 0 else {}

    # The same, moved between the steps.
    torch.testing.assert_close(got, pipes.sample(pipe, callback_on_step_end=nudge), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got, pipes.sample(pipe), atol=1e-3)


def test_later_passes_of_a_step_read_moved_latents():
    pipe, given = pipes.flux()
    seen = []

    def move(site, inputs, call):
        if site.pass_name == "cond":
            delta = torch.ones_like(inputs["hidden_states"])
            site.sampling.shift(delta)
            inputs = {**inputs, "hidden_states": inputs["hidden_states"] + delta}
        seen.append(inputs["hidden_states"])
        return call(inputs)

    with attnlib.attach(pipe, Whole(move)) as session:
        pipes.sample(pipe, None, steps=2, **given)
        with pytest.raises(RuntimeError, match="while a pipeline runs only"):
            session.sampling.shift(torch.ones(1))
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3]) and not torch.equal(seen[1], seen[2])


def test_what_a_denoiser_gives_keeps_its_form(pipe):
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

    x, text = torch.randn(1, 4, 16, 16), torch.randn(1, 5, 16)
    zero = Whole(lambda site, inputs, call: torch.zeros_like(inputs["sample"]))
    with torch.no_grad(), attnlib.attach(pipe.unet, zero):
        out = pipe.unet(x, 3, text)
        assert isinstance(out, UNet2DConditionOutput) and not out.sample.any()
        assert not pipe.unet(x, 3, text, return_dict=False)[0].any()
    double = Whole(lambda site, inputs, call: call(inputs) * 2)
    plain = pipe.unet(x, 3, text)
    with attnlib.attach(pipe.unet, double):
        out = pipe.unet(x, 3, encoder_hidden_states=text)
    assert isinstance(out, UNet2DConditionOutput) and torch.equal(out.sample, plain.sample * 2)


# ---- modules


def test_modules_are_known_by_kind_and_name(pipe):
    every = Modules(
        ["attention", "feed-forward", "resnet", "downsampler", "upsampler", "block", "transformer", "stage"]
    )
    with attnlib.attach(pipe, every):
        pipes.sample(pipe, steps=1)
    names = {kind: [s.name for s in every.sites if s.kind == kind] for kind in {s.kind for s in every.sites}}
    assert len(names["attention"]) == 14 and len(names["feed-forward"]) == len(names["block"]) == 7
    assert len(names["resnet"]) == 8 and names["downsampler"] == ["down_blocks.0.downsamplers.0"]
    assert names["stage"] == ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    assert names["upsampler"] == ["up_blocks.0.upsamplers.0"] and len(names["transformer"]) == 7
    assert names["transformer"][0] == "down_blocks.0.attentions.0"
    assert {(s.step, s.rows) for s in every.sites} == {(0, ("uncond", "cond"))}
    one = Modules(["up_blocks.*.resnets.1"])
    with attnlib.attach(pipe, one):
        pipes.sample(pipe, steps=1)
    assert [s.name for s in one.sites] == ["up_blocks.0.resnets.1", "up_blocks.1.resnets.1"]
    assert [s.number for s in one.sites] == [3, 5]


def test_what_an_intervention_acts_on_may_be_the_models_to_say(pipe):
    class Last(Modules):
        def meet(self, model):
            self.acts_on = [f"up_blocks.{len(model.up_blocks) - 1}"]

    it = Last([])
    with attnlib.attach(pipe, it):
        pipes.sample(pipe, steps=1)
    assert {s.name for s in it.sites} == {"up_blocks.1"}


def test_a_module_may_be_skipped_or_changed(pipe):
    """A feed-forward that is not called adds nothing; one called twice adds twice as much."""
    x, text = torch.randn(1, 4, 16, 16), torch.randn(1, 5, 16)
    ff = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].ff
    calls = []
    handle = ff.net[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        zero = Modules(["feed-forward"], lambda site, inputs, call: torch.zeros_like(inputs["hidden_states"]))
        twice = Modules(["feed-forward"], lambda site, inputs, call: call(inputs) + call(inputs))
        with attnlib.attach(pipe.unet, zero):
            without = pipe.unet(x, 3, text).sample
            assert not calls
        with attnlib.attach(pipe.unet, twice):
            doubled = pipe.unet(x, 3, text).sample
            assert len(calls) == 2
        handle.remove()
        hooks = [
            m.register_forward_hook(lambda m, args, out: out * 0)
            for n, m in pipe.unet.named_modules() if n.endswith(".ff")
        ]  # fmt: skip
        truth = pipe.unet(x, 3, text).sample
        for hook in hooks:
            hook.remove()
        hooks = [
            m.register_forward_hook(lambda m, args, out: out * 2)
            for n, m in pipe.unet.named_modules() if n.endswith(".ff")
        ]  # fmt: skip
        truth_twice = pipe.unet(x, 3, text).sample
        for hook in hooks:
            hook.remove()
    torch.testing.assert_close(without, truth, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(doubled, truth_twice, atol=1e-6, rtol=1e-6)


def test_two_streams_of_a_block():
    pipe, given = pipes.sd3()
    plain = pipes.sample(pipe, None, steps=1, **given)

    def stand_still(site, inputs, call):
        text, image = call(inputs)
        return (text, inputs["hidden_states"]) if text is not None else (text, image)

    one = Modules(["block"], stand_still)
    with attnlib.attach(pipe, one):
        assert not torch.allclose(pipes.sample(pipe, None, steps=1, **given), plain, atol=1e-4)
    assert [s.name for s in one.sites] == ["transformer_blocks.0", "transformer_blocks.1"]
    attention = Modules(["attention"])
    with attnlib.attach(pipe, attention):
        assert torch.equal(pipes.sample(pipe, None, steps=1, **given), plain)
    assert len(attention.sites) == 2 and attention.sites[0].main == "hidden_states"


def test_those_behind_see_the_rows_that_are_run(pipe):
    def some(site, inputs, call):
        index = [i for i, row in enumerate(site.rows) if row == "cond"]
        with site.sampling.session.some_rows(index):
            call(rows_of(inputs, index, len(site.rows)))
        return call(inputs)

    outer, inner, blocks = Whole(some), Whole(), Modules(["mid_block"])
    with attnlib.attach(pipe, outer, inner, blocks):
        pipes.sample(pipe, ["a dog", "a cat"], steps=1)
    rows = [("cond",) * 2, ("uncond",) * 2 + ("cond",) * 2]
    assert [s.rows for s in inner.sites] == [s.rows for s in blocks.sites] == rows
    assert [s.prompts for s in inner.sites] == [(0, 1), (0, 1, 0, 1)] and [s.rows for s in outer.sites] == rows[1:]


# ---- companions, and what is refused


def test_companions_are_attached_behind_their_owner(pipe):
    class Leader(Whole):
        @property
        def companions(self):
            return (self.probe,)

    leader = Leader()
    leader.probe = Record(rows="all", what=("entropy",))
    with attnlib.attach(pipe, leader) as session:
        pipes.sample(pipe, steps=1)
        assert session.interventions == (leader, leader.probe)
        assert len(session.results["record"]) == 14
    with attnlib.attach(pipe, leader, Whole()):
        pass  # let go of, so that both may be attached once more


def test_pairs_that_cannot_meet(pipe):
    class Mover(Whole):
        moves_latents = differentiates = True

    class Cache(Whole):
        reuses_features = True

    with pytest.raises(ValueError, match="cannot both act on this model: both move the latents"):
        attnlib.attach(pipe, Mover(), Mover())
    for pair in ((Mover(), Cache()), (Cache(), Mover())):
        with pytest.raises(ValueError, match="Mover needs gradients of the whole model, and Cache puts in"):
            attnlib.attach(pipe, *pair)


def test_bad_input_of_pipelines(pipe, folder):
    import diffusers

    with attnlib.attach(pipe, Whole()), pytest.raises(ValueError, match="has a session already"):
        attnlib.attach(pipe, Whole())
    with attnlib.attach(pipe.unet, Whole()), pytest.raises(ValueError, match="has a session already"):
        attnlib.attach(pipe, Whole())
    with pytest.raises(TypeError, match=r"has no denoiser, pipe\.unet or pipe\.transformer"):
        attnlib.attach(diffusers.DDPMPipeline(unet=None, scheduler=None), Whole())
    with pytest.raises(ValueError, match="has no module 'router'; its modules are of kinds"):
        attnlib.attach(pipe, Modules(["router"]))
    with pytest.raises(TypeError, match="acts_on must be a sequence"):
        attnlib.attach(pipe, Modules("resnet"))
    with (
        attnlib.attach(pipe, Whole(lambda site, inputs, call: None)),
        pytest.raises(TypeError, match="Whole must return"),
    ):
        pipes.sample(pipe, steps=1)
    with (
        attnlib.attach(pipe, Whole(lambda site, inputs, call: call(inputs["sample"]))),
        pytest.raises(TypeError, match="named arguments as a dict"),
    ):
        pipes.sample(pipe, steps=1)
    with (
        attnlib.attach(pipe, Modules(["block"], lambda site, inputs, call: None)),
        pytest.raises(TypeError, match="block 0"),
    ):
        pipes.sample(pipe, steps=1)
    with pytest.raises(ValueError, match="around_denoiser, which is missing for PyTorch models"):
        attnlib.attach(torch.nn.MultiheadAttention(8, 2), Whole())

    class Two(diffusers.DiffusionPipeline):
        def __init__(self, transformer, transformer_2):
            super().__init__()
            self.register_modules(transformer=transformer, transformer_2=transformer_2)

    both = Two(pipes.dit().transformer, pipes.dit(1).transformer)
    with pytest.raises(TypeError, match="has several denoisers"):
        attnlib.attach(both, Whole())
    with attnlib.attach(both, Whole(), part="transformer_2") as session:
        assert session.model is both.transformer_2


def test_what_denoises_must_be_what_was_attached_to(folder):
    import diffusers

    from attnlib.steer.diffusion.a_star import AttendExcite

    pipe = pipes.stable_diffusion(folder)
    shares = pipes.quiet(diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe))
    image = torch.rand(1, 3, 16, 16)
    with attnlib.attach(pipe, AttendExcite(("circle", "square"))):
        with pytest.raises(RuntimeError, match="acts at steps.* something else than the StableDiffusionP"):
            pipes.sample(shares, image=image, strength=0.5)
        whole = pipe.unet
        pipe.unet = torch.compile(whole, backend="eager")  # still the model that was attached to
        pipes.sample(pipe, steps=1)
        pipe.unet = pipes.unet(seed=7)
        with pytest.raises(RuntimeError, match=r"pipe\.unet was replaced meanwhile"):
            pipes.sample(pipe, steps=1)
        pipe.unet = whole
        pipes.sample(pipe, steps=1)
    with attnlib.attach(pipe, Whole()):  # what needs no step goes on
        pipes.sample(shares, image=image, strength=0.5)


def test_interventions_that_are_modules_keep_what_modules_have():
    from attnlib.steer import Clear, LinFusion

    for cls in (Clear, LinFusion):
        for name in dir(torch.nn.Module):
            if name.startswith("_") or name not in Intervention.__dict__:
                continue
            raise AssertionError(f"{cls.__name__} loses {name} of torch.nn.Module")


@pytest.mark.parametrize("name", ["DDIM", "EulerDiscrete", "DPMSolverMultistep"])
def test_a_step_of_the_scheduler_may_be_amended(folder, name):
    """Each step's latents as the functions say, one after the other; the same as by a callback of the pipeline."""
    pipe = pipes.stable_diffusion(folder, plan=pipes.scheduler(name + "Scheduler"))
    seen = []

    def change(site, inputs, call):
        sampling = site.sampling
        sampling.amend(lambda s: (seen.append((site.step, s)), s.after * 0.9)[1])
        sampling.amend(lambda s: s.after + 0.1)
        return call(inputs)

    with attnlib.attach(pipe, Whole(change)) as session:
        got = pipes.sample(pipe, steps=3)
        with pytest.raises(RuntimeError, match="while a pipeline runs only"):
            session.sampling.amend(lambda s: s.after)

    def callback(pipe, step, timestep, values):
        return {"latents": values["latents"] * 0.9 + 0.1}

    assert torch.equal(got, pipes.sample(pipe, steps=3, callback_on_step_end=callback))
    assert [step for step, _ in seen] == [0, 1, 2] and seen[1][1].before.shape == got.shape
    assert all(s.scheduler is pipe.scheduler and s.output.shape == got.shape for _, s in seen)
    torch.testing.assert_close(seen[2][1].before, seen[1][1].after * 0.9 + 0.1)
    plain = pipes.sample(pipe, steps=2)

    def amended(function):
        return Whole(lambda site, inputs, call: (site.sampling.amend(function), call(inputs))[1])

    with attnlib.attach(pipe, amended(lambda s: s.after)):
        assert torch.equal(pipes.sample(pipe, steps=2), plain)
    with attnlib.attach(pipe, amended(lambda s: None)), pytest.raises(ValueError, match="must return latents"):
        pipes.sample(pipe, steps=2)
    assert torch.equal(pipes.sample(pipe, steps=2), plain)
