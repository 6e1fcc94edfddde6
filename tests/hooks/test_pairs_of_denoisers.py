"""Any pair of techniques for denoisers composes, in both orders, or refuses with a reason: on one whole pipeline."""

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import hooks as caches  # noqa: E402

import attnlib  # noqa: E402
from attnlib import cache, steer  # noqa: E402
from attnlib.convert.a_sdm import GlobalRegionalAttention  # noqa: E402
from attnlib.hooks import Maps, Record  # noqa: E402
from attnlib.steer.diffusion import (
    hidiffusion,  # noqa: E402
    tiles,  # noqa: E402
)
from attnlib.steer.diffusion.anymaker import IdentityEncoder  # noqa: E402
from attnlib.steer.diffusion.idol import JointBlock  # noqa: E402
from attnlib.steer.diffusion.pemf_vvto import PointMaps, TrackBlock  # noqa: E402
from hooks import pipes  # noqa: E402

WORDS = ("circle", "square")


def joint():
    torch.manual_seed(0)
    block = JointBlock(32, 2)
    torch.nn.init.normal_(block.attention.proj.weight)
    return steer.JointModalities({"mid_block": block}, torch.randn(2, 64)).requires_grad_(False)


def matched():
    torch.manual_seed(0)
    maps = PointMaps(8, 16)
    torch.nn.init.normal_(maps.to_q.weight)
    torch.nn.init.normal_(maps.to_k.weight)
    made = steer.PointSpatialAttention({"down_blocks.0.attentions.0.transformer_blocks.0.attn1": maps}, 8)
    return made.requires_grad_(False).match(torch.full((1, 1, 2), 0.3), torch.full((1, 2), 0.7))


def tracked():
    torch.manual_seed(0)
    block = TrackBlock(16, 2)
    torch.nn.init.normal_(block.attention.proj.weight)
    made = steer.PointTemporalAttention({"down_blocks.0.attentions.0": block}, frames=2).requires_grad_(False)
    return made.track(torch.full((2, 1, 2), 0.3))


def any_maker():
    torch.manual_seed(0)
    encoder = IdentityEncoder([5], 16, dim=8, id_tokens=2, non_tokens=2, depth=1, heads=2)
    return steer.AnyMaker.of(pipes.unet(size=8), encoder).refer([torch.ones(1, 1, 4, 5)], words=["circle"])


#: Every technique for pipelines with cross-attention, at settings that do something to a tiny one.
MAKE = {
    "AStar": lambda: steer.AStar(WORDS, step_size=60.0, targets=None, resolution=8),
    "Anagram": lambda: steer.Anagram(
        [tiles.identity_view(), tiles.rotated()], ["a red circle and a blue square", "a dog"], step_size=0, latent=True
    ),
    "AttendExcite": lambda: steer.AttendExcite(WORDS, step_size=60.0, targets=None, resolution=8),
    "CUpscale": lambda: steer.CUpscale(tile=(8, 6), captions=lambda tile: "a dog"),
    "TiledDenoiser": lambda: steer.TiledDenoiser(tile=(6, 8)),
    "AutoStudio": lambda: studio(),
    "DynamicPrompt": lambda: steer.DynamicPrompt(WORDS, inner=1, lr=0.1, beta=(-1.0, 0.7, 0.9), resolution=8),
    "CustomContrast": lambda: contrasted(),
    "FeatureInheritance": lambda: cache.FeatureInheritance("block", cache.steps.every(2)),
    "FlowAttention": lambda: steer.FlowAttention(torch.full((1, 2, 8, 8), 2.0), weight=0.2),
    "IRDiffusion": lambda: steer.IRDiffusion(masks=[[(0, 0, 0.5, 1), (0.5, 0, 1, 1)]], references=()),
    "HiDiffusion": lambda: steer.HiDiffusion(TABLE, ratios=(1.0, 0.0)),
    "HarmoniCa": lambda: routed(),
    "JointModalities": joint,
    "GlobalRegionalAttention": lambda: GlobalRegionalAttention(4, 4, layers=["down_blocks.1*attn1"]),
    "LearntPrompt": lambda: steer.LearntPrompt(("circle",), [[torch.arange(16.0).view(1, 1, 16)]] * 2),
    "AnyMaker": lambda: any_maker(),
    "MIPAdapter": lambda: steer.MIPAdapter.of(pipes.unet(size=8)).refer(torch.ones(1, 2, 3, 16), names=["red", "dog"]),
    "Maps": lambda: Maps(8),
    "PointSpatialAttention": matched,
    "PointTemporalAttention": tracked,
    "RealCustom": lambda: custom(),
    "NullText": lambda: steer.NullText([torch.arange(1232.0).sin().view(1, 77, 16)] * 2),
    "PromptToPrompt": lambda: steer.PromptToPrompt("refine", blend=["circle"], resolution=8),
    "PrimeComposer": lambda: compose(),
    "Record": lambda: Record(what=("entropy",), rows="all"),
    "ReferenceBranches": lambda: steer.ReferenceBranches.of(pipes.unet()).refer(torch.ones(1, 1, 3, 16)),
    "SharedKeys": lambda: steer.SharedKeys({0: [0]}, where=lambda site: torch.arange(3)),
    "SoftPAG": lambda: steer.SoftPAG(0.5, rows=("cond",), layers=["mid_block*"]),
    "StepCache": lambda: cache.StepCache(cache.steps.every(2)),
    "StructuredGuidance": lambda: steer.StructuredGuidance(["a red circle", "a blue square"]),
    "SubjectLatents": lambda: steer.SubjectLatents(torch.ones(4, 8, 8), torch.ones(8, 8).triu()),
    "TextCenGen": lambda: steer.TextCenGen((0.25, 0.25, 0.75, 0.75), theta=0.05, sharpness=10.0),
    "UniformMaps": lambda: steer.UniformMaps(rows=("uncond",), steps=[0]),
    "VariableSizeScale": lambda: steer.VariableSizeScale(trained_size=4),
    "ViMAEdit": lambda: steer.ViMAEdit(
        torch.arange(256.0).sin().view(1, 4, 8, 8),
        blend=["circle"],
        thresholds=(0.3, 0.5),
        blend_from=0.0,
        resolution=8,
        between_resolution=8,
    ),
}

#: Maps that are pooled in the deep stage only, so that some of the others find theirs at the resolution of 8.
TABLE = hidiffusion.Table(2, hidiffusion.Place("pool", 1), windows=("down_blocks.0.*.attn1",))


#: Of diffusers, where its release lets them stand beside ours.
if hasattr(caches.HookRegistry, "invalidate_child_registries_cache"):
    MAKE["DiffusersCache"] = lambda: cache.DiffusersCache(
        caches.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001)
        )
    )


def routed():
    torch.manual_seed(0)
    router = cache.Router(2, 21, threshold=0.5)
    return cache.HarmoniCa(router)


def studio():
    torch.manual_seed(0)
    boxes = ((0, 0, 0.5, 1), (0.5, 0, 1, 1))
    scene = steer.Scene("a photo", [steer.Subject(p, b) for p, b in zip(("a red circle", "a dog"), boxes, strict=True)])
    it = steer.AutoStudio.of(pipes.unet()).stage(scene)
    return it.refer(torch.randn(1, 2, 3, 16))


def compose():
    paths = [[torch.arange(256.0).add(n * i).sin().view(1, 4, 8, 8) for i in range(3)] for n in (1, 7)]
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[1:5, 2:6] = True
    return steer.PrimeComposer(*paths, mask, shift=(1, 1), words=["circle"], inject=1.0)


def custom():
    torch.manual_seed(0)
    it = steer.RealCustom.of(pipes.unet(), words=["circle"], scale=3.0)
    return it.refer(torch.randn(1, 1, 3, 16))


def contrasted():
    torch.manual_seed(0)
    small = {"depth": 1, "num_heads": 2, "head_dim": 4}
    it = steer.CustomContrast.of(pipes.unet(), features=16, encoder=small, words=["circle"])
    return it.requires_grad_(False).refer(torch.randn(1, 1, 3, 16))


LOOKS = {"Maps", "Record"}

#: What needs a second prompt, an edit of the first.
EDITS = {"PromptToPrompt", "ViMAEdit"}

#: What acts on several images of one prompt, so that no call serves both.
APART = {
    ("IRDiffusion", "PromptToPrompt"),
    ("IRDiffusion", "ViMAEdit"),
    ("AutoStudio", "PromptToPrompt"),
    ("AutoStudio", "ViMAEdit"),
}

#: What cannot meet, and why.
REFUSED = {
    ("FlowAttention", "PointSpatialAttention"),
    ("HiDiffusion", "PointSpatialAttention"),
    ("PointSpatialAttention", "PointSpatialAttention"),
    ("PointSpatialAttention", "SharedKeys"),
    ("AStar", "JointModalities"),
    ("AttendExcite", "JointModalities"),
    ("AStar", "AStar"),
    ("AStar", "Anagram"),
    ("Anagram", "Anagram"),
    ("Anagram", "IRDiffusion"),
    ("Anagram", "RealCustom"),
    ("Anagram", "LearntPrompt"),
    ("Anagram", "AutoStudio"),
    ("Anagram", "SubjectLatents"),
    ("Anagram", "DynamicPrompt"),
    ("Anagram", "PromptToPrompt"),
    ("Anagram", "ViMAEdit"),
    ("Anagram", "AttendExcite"),
    ("Anagram", "CUpscale"),
    ("Anagram", "StepCache"),
    ("Anagram", "TiledDenoiser"),
    ("AStar", "AttendExcite"),
    ("AStar", "CUpscale"),
    ("AStar", "TiledDenoiser"),
    ("AStar", "IRDiffusion"),
    ("AutoStudio", "AutoStudio"),
    ("AStar", "SubjectLatents"),
    ("AttendExcite", "SubjectLatents"),
    ("SubjectLatents", "SubjectLatents"),
    ("PromptToPrompt", "SubjectLatents"),
    ("SubjectLatents", "ViMAEdit"),
    ("AttendExcite", "TiledDenoiser"),
    ("CUpscale", "TiledDenoiser"),
    ("TiledDenoiser", "StepCache"),
    ("TiledDenoiser", "TiledDenoiser"),
    ("AttendExcite", "CUpscale"),
    ("CUpscale", "CUpscale"),
    ("CUpscale", "AutoStudio"),
    ("CUpscale", "IRDiffusion"),
    ("CUpscale", "RealCustom"),
    ("CUpscale", "SubjectLatents"),
    ("TiledDenoiser", "AutoStudio"),
    ("TiledDenoiser", "IRDiffusion"),
    ("TiledDenoiser", "RealCustom"),
    ("TiledDenoiser", "SubjectLatents"),
    ("CUpscale", "StepCache"),
    ("AttendExcite", "IRDiffusion"),
    ("AStar", "RealCustom"),
    ("AttendExcite", "RealCustom"),
    ("RealCustom", "RealCustom"),
    ("RealCustom", "StepCache"),
    ("IRDiffusion", "IRDiffusion"),
    ("AttendExcite", "AttendExcite"),
    ("AStar", "StepCache"),
    ("AttendExcite", "StepCache"),
    ("FlowAttention", "SharedKeys"),
    ("IRDiffusion", "SharedKeys"),
    ("SharedKeys", "SharedKeys"),
    ("SharedKeys", "SoftPAG"),
    ("StepCache", "StepCache"),
    ("GlobalRegionalAttention", "GlobalRegionalAttention"),
    ("GlobalRegionalAttention", "SharedKeys"),
    ("HiDiffusion", "HiDiffusion"),
    ("HiDiffusion", "StepCache"),
    ("DynamicPrompt", "StepCache"),
    ("DynamicPrompt", "RealCustom"),
    ("CUpscale", "DynamicPrompt"),
    ("TiledDenoiser", "DynamicPrompt"),
    ("CUpscale", "PromptToPrompt"),
    ("TiledDenoiser", "PromptToPrompt"),
    ("CUpscale", "ViMAEdit"),
    ("TiledDenoiser", "ViMAEdit"),
    ("AStar", "JointModalities"),
    ("AttendExcite", "JointModalities"),
    ("DynamicPrompt", "JointModalities"),
    ("DynamicPrompt", "IRDiffusion"),
    ("AStar", "DynamicPrompt"),
    ("AttendExcite", "DynamicPrompt"),
    ("DynamicPrompt", "DynamicPrompt"),
    ("DynamicPrompt", "LearntPrompt"),
    ("LearntPrompt", "LearntPrompt"),
    ("AStar", "PromptToPrompt"),
    ("AttendExcite", "PromptToPrompt"),
    ("PromptToPrompt", "PromptToPrompt"),
    ("PromptToPrompt", "StepCache"),
    ("AStar", "PrimeComposer"),
    ("AttendExcite", "PrimeComposer"),
    ("CUpscale", "PrimeComposer"),
    ("TiledDenoiser", "PrimeComposer"),
    ("PromptToPrompt", "PrimeComposer"),
    ("PrimeComposer", "PrimeComposer"),
    ("PointSpatialAttention", "PrimeComposer"),
    ("DynamicPrompt", "PrimeComposer"),
    ("FlowAttention", "PrimeComposer"),
    ("IRDiffusion", "PrimeComposer"),
    ("GlobalRegionalAttention", "PrimeComposer"),
    ("RealCustom", "PrimeComposer"),
    ("PrimeComposer", "SharedKeys"),
    ("PrimeComposer", "SoftPAG"),
    ("PrimeComposer", "SubjectLatents"),
    ("PrimeComposer", "StepCache"),
    ("PrimeComposer", "ViMAEdit"),
    ("AStar", "ViMAEdit"),
    ("AttendExcite", "ViMAEdit"),
    ("PromptToPrompt", "ViMAEdit"),
    ("StepCache", "ViMAEdit"),
    ("ViMAEdit", "ViMAEdit"),
    ("VariableSizeScale", "VariableSizeScale"),
}

#: Other caches over steps cannot meet each other, nor what a table of steps cannot.
CACHES = ("StepCache", "FeatureInheritance", "HarmoniCa", "DiffusersCache")
REFUSED |= {tuple(new if name == "StepCache" else name for name in pair) for pair in REFUSED for new in CACHES}
REFUSED |= {(one, other) for one in CACHES for other in CACHES}


@pytest.fixture(scope="module")
def pipe(folder):
    return pipes.stable_diffusion(folder, model=pipes.unet(size=8))


def draw(pipe, *names):
    prompt = "a red circle and a blue square"
    if EDITS.intersection(names):
        return pipes.sample(pipe, [prompt, prompt + " on a bench"], steps=2)
    return pipes.sample(pipe, prompt, steps=2, num_images_per_prompt=2)


@pytest.fixture(scope="module")
def alone(pipe):
    found = {}

    def draws(name, *beside):
        """What a technique gives alone, with the prompts that both need."""
        key = name, bool(EDITS.intersection((name, *beside)))
        if key not in found:
            with attnlib.attach(pipe, MAKE[name]()):
                found[key] = draw(pipe, name, *beside)
        return found[key]

    return draws


def test_each_does_something_alone(pipe, alone):
    plain = {edits: draw(pipe, *edits) for edits in ((), tuple(EDITS))}
    nothing = {name for name in MAKE if torch.equal(alone(name), plain[tuple(EDITS) if name in EDITS else ()])}
    assert nothing == LOOKS


@pytest.mark.parametrize("first", MAKE)
def test_pairs(first, pipe, alone):
    names = list(MAKE)
    for number, second in enumerate(names[names.index(first) :]):
        orders = ((first, second), (second, first))
        if (first, second) in APART:
            continue
        if REFUSED.intersection(orders):
            for order in orders:
                with pytest.raises(ValueError, match="cannot both act on "):
                    attnlib.attach(pipe, *[MAKE[name]() for name in order])
            continue
        # Drawing takes its time: both orders attach, and every second pair is drawn in the other order.
        drawn = orders[number % 2]
        with attnlib.attach(pipe, *[MAKE[name]() for name in drawn[::-1]]):
            pass
        with attnlib.attach(pipe, *[MAKE[name]() for name in drawn]):
            got = draw(pipe, first, second)
        assert got.isfinite().all()
        for one, other in ((first, second), (second, first)):
            if one in LOOKS:
                assert torch.equal(got, alone(other, one)), f"{one} changed what {other} does"
            elif first != second:
                assert not torch.equal(got, alone(other, one)), f"{one} did nothing beside {other}"
