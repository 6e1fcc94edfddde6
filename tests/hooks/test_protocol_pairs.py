"""Any pair of techniques composes, or refuses with a reason: every one that the packages export, on one model."""

import importlib
import inspect

import pytest
import torch

pytest.importorskip("transformers")

import attnlib  # noqa: E402
from attnlib import cache, look, reduce, steer  # noqa: E402
from attnlib.hooks import (  # noqa: E402
    Intervention,
    MaskByType,
    Record,
    TokenTypes,
    modality_mutual,
)
from attnlib.models.multimodal.chatrex import KnownObjects  # noqa: E402
from attnlib.models.multimodal.task_tokens import TaskTokens, UseTaskTokens  # noqa: E402
from attnlib.nn.multimodal.p_adapter import PLaplacianAdapter  # noqa: E402
from attnlib.nn.multimodal.wings_lorra import LayerWings  # noqa: E402
from hooks.pictures import IMAGE_ID, TOKENS, picture_inputs, picture_model  # noqa: E402

LAYERS, NEW, ANSWER, SEG = 4, 3, 61, 60


def random(modules):
    """The same modules with small random weights: those that start as nothing would do nothing."""
    with torch.no_grad():
        for p in modules.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
    return modules


def learners(textual):
    return random(torch.nn.ModuleList(LayerWings(32, 4, 2, textual=textual, max_keys=64) for _ in range(LAYERS)))


def atp(model):
    torch.manual_seed(0)
    gates = reduce.atp_gates(model, (2,), 0.0625)
    with torch.no_grad():
        for gate in gates.values():
            gate.redundant_threshold_head.bias.fill_(-0.5)
            gate.spatial_threshold_head.bias.fill_(-0.5)
    return reduce.ATP(gates)


def no(f):
    return torch.tensor([[1.0, 0.0]]).expand(len(f), 2)


def yes(f):
    return torch.tensor([[0.0, 1.0]]).expand(len(f), 2)


def task_tokens(whole=False):
    tokens = TaskTokens({"box": ANSWER, "seg": SEG}, 32, {"box": torch.nn.Linear(32, 4), "seg": None}, outputs=True)
    return UseTaskTokens(tokens, whole=whole)


def flipped(pixels):
    return pixels.flip(-1)


#: How each technique is made for the model, at settings that do something there.
MAKE = {
    # Nodes of one prompt, at places of it: tests/hooks/test_nodes.py and tests/look hold these.
    "Capture": None,
    "Patch": None,
    "AttendTo": None,
    "LowRank": None,
    "UniformHeads": None,
    # Of whole maps of encoders, whose tokens stay the same: tests/convert/test_dual_cross_attention.py.
    "Rollout": None,
    "Flow": None,
    # Of the maps between the patches of an image: tests/look/test_patterns.py.
    "CollectMaps": None,
    "DistanceProfile": None,
    "MaskByType": lambda model: MaskByType(modality_mutual()),
    "Record": lambda model: Record(rows="all", what=("weights", "entropy", "received", "sink")),
    "KVCompression": lambda model: cache.KVCompression(cache.KeyNorm(), cache.Cap(7)),
    "SnapKV": lambda model: cache.SnapKV(cap=7, window_size=3, kernel_size=3),
    "SnapKVByHead": lambda model: cache.SnapKVByHead(cap=7, window_size=3, kernel_size=3),
    "AGLA": lambda model: steer.AGLA(flipped, 1.0, 0.1),
    "DAMRO": lambda model: steer.DAMRO(1.0, 3, 0.1),
    "ContrastiveDecoding": lambda model: steer.ContrastiveDecoding(steer.NoImage(), 1.5, -0.5, 0.1),
    "DualAttention": lambda model: steer.DualAttention(),
    "HeadReinforcement": lambda model: steer.HeadReinforcement(2.0, [1, 2]),
    "HeadScale": lambda model: steer.HeadScale({1: [0.5, 1, 2, 1]}),
    "SceneMagnifier": lambda model: steer.SceneMagnifier(
        random(steer.magnifier_layers(model, 1)), torch.ones(1, TOKENS, 2, 32)
    ),
    "SinkCalibration": lambda model: steer.SinkCalibration({2: [0, 3]}, beta=0.4),
    "SoftImageGuidance": lambda model: steer.SoftImageGuidance(torch.zeros(TOKENS, 32), 1.5),
    "SoftPAG": None,  # guides denoisers: an identity map has as many queries as keys
    "UniformMaps": None,  # acts on cross-attention, which this model has not
    "Maps": None,  # of denoisers: tests/hooks/test_maps.py
    # Of pipelines that denoise: tests/hooks/test_pairs_of_denoisers.py.
    "AStar": None,
    "FeatureInheritance": None,
    "HarmoniCa": None,
    "RouterTraining": None,
    "StepCache": None,
    "DiffusersCache": None,
    "AttendExcite": None,
    "FlowAttention": None,
    "PointSpatialAttention": None,
    "PointTemporalAttention": None,
    "DimensionReduction": None,  # acts on videos
    "IRDiffusion": None,
    "HiDiffusion": None,
    "JointModalities": None,
    "Anagram": None,
    "CUpscale": None,
    "PromptMaps": None,
    "TiledDenoiser": None,
    "AutoStudio": None,
    "SubjectLatents": None,
    "RealCustom": None,
    "DynamicPrompt": None,
    "LocatedPrompt": None,
    "TokenUpdate": None,
    "LearntPrompt": None,
    "NullText": None,
    "PrimeComposer": None,
    "TextCenGen": None,
    "ViMAEdit": None,
    "PromptToPrompt": None,
    "StructuredGuidance": None,
    "KeepKeys": None,
    "AnyMaker": None,
    "MIPAdapter": None,
    "CustomContrast": None,
    "ReferenceBranches": None,
    "SharedKeys": None,
    "VariableSizeScale": None,
    "BlockSparse": None,  # acts on videos
    "Clear": None,  # acts on images beside text, in denoisers
    "LinFusion": None,  # stands in denoisers
    "VisualBoost": lambda model: steer.VisualBoost(0.7, 0.3, sets="all"),
    "VisualRedistribution": lambda model: steer.VisualRedistribution((3, 17), rho=0.9, summ=0.01, tau=1.0),
    "HeadDivergence": lambda model: steer.HeadDivergence(k=1),
    "PLaplacian": lambda model: steer.PLaplacian(random(torch.nn.ModuleList([PLaplacianAdapter(32, 4)]))),
    "VisualWings": lambda model: steer.VisualWings(learners(False)),
    "Wings": lambda model: steer.Wings(learners(True)),
    "ATP": atp,
    "CMAI": lambda model: reduce.CMAI(0.2),
    "VMTC": lambda model: reduce.VMTC(4, 2),
    "VTCCLS": lambda model: reduce.VTCCLS(5, start=1),
    "CompositeLayers": lambda model: reduce.CompositeLayers([1, 2]),
    "DyVTE": lambda model: reduce.DyVTE(exit_layer=2),
    "DyVTEByAttention": lambda model: reduce.DyVTEByAttention([no, no, yes, no]),
    "Reduce": lambda model: reduce.Reduce(reduce.Learned(torch.nn.Linear(32, 1)), {2: 6}),
    "ReduceByAttention": lambda model: reduce.ReduceByAttention({2: 6}),
    "ScheduledPruning": lambda model: reduce.ScheduledPruning(counts=[16, 16, 8, 4]),
    "Statistics": lambda model: look.Statistics(),
    "UseTaskTokens": lambda model: task_tokens(),
    "KnownObjects": lambda model: KnownObjects(range(10, 40), [4]),
}

#: Exported, but nothing to attach by themselves: bases to derive from.
BASES = {"Intervention", "LatentUpdate", "Probe", "Reduction"}

#: Those that take image tokens away: where one has been, another may find nothing left to do.
REDUCES = {"ATP", "VMTC", "VTCCLS", "DyVTE", "DyVTEByAttention", "Reduce", "ReduceByAttention", "ScheduledPruning"}

#: Those that only look.
LOOKS = {"Record", "Statistics", "HeadDivergence"}

#: Modules of models that bring techniques along.
MODELS = ("models.multimodal.task_tokens", "models.multimodal.chatrex")

#: Those that need every token of the prompt, in every layer.
WHOLE = {
    "Flow": look.Flow,
    "Rollout": look.Rollout,
    "UseTaskTokens": lambda: task_tokens(whole=True),
}

#: Those that do twice what they do once: what is ruled out stays so.
ONCE = {"KnownObjects"}

NAMES = [name for name, make in MAKE.items() if make is not None]


def make(name, model):
    torch.manual_seed(7)
    return MAKE[name](model)


@pytest.fixture(scope="module")
def model():
    return picture_model(num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def inputs():
    inputs = picture_inputs((1, 1))
    inputs["input_ids"][:, -1] = ANSWER
    return inputs


TYPES = TokenTypes(IMAGE_ID, answer=ANSWER)


def answers(model, inputs):
    torch.manual_seed(11)
    out = model.generate(
        **inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, suppress_tokens=[0, ANSWER, IMAGE_ID],
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    return torch.stack(out.scores), out.sequences


@pytest.fixture(scope="module")
def plain(model, inputs):
    return answers(model, inputs)


@pytest.fixture(scope="module")
def alone(model, inputs):
    """What each technique gives by itself."""
    found = {}
    for name in NAMES:
        with attnlib.attach(model, make(name, model), token_types=TYPES):
            found[name] = answers(model, inputs)
    return found


def exported():
    found = {}
    for package in ("hooks", "cache", "steer", "reduce", "look", *MODELS):
        module = importlib.import_module(f"attnlib.{package}")
        for name in getattr(module, "__all__", vars(module)):
            cls = getattr(module, name)
            if package in MODELS and getattr(cls, "__module__", None) != module.__name__:
                continue
            if isinstance(cls, type) and issubclass(cls, Intervention):
                found[name] = cls
    return found


def test_every_technique_stands_in_the_table():
    techniques = {name for name, cls in exported().items() if not inspect.isabstract(cls)} - BASES
    assert techniques == set(MAKE)


def test_each_does_something_alone_and_leaves_nothing(model, inputs, plain, alone):
    same = {name for name in NAMES if torch.equal(alone[name][0], plain[0])}
    assert same == LOOKS
    assert torch.equal(answers(model, inputs)[0], plain[0])


@pytest.mark.parametrize("removing", sorted(REDUCES))
@pytest.mark.parametrize("reading", WHOLE)
def test_removed_tokens_are_refused_by_name_where_all_are_read(reading, removing, model):
    for turned in (False, True):
        pair = [WHOLE[reading](), make(removing, model)]
        with pytest.raises(ValueError, match="cannot both act on this model") as refused:
            attnlib.attach(model, *(reversed(pair) if turned else pair), token_types=TYPES)
        assert f"{type(pair[1]).__name__} removes tokens of the prompt, and {type(pair[0]).__name__} needs" in str(
            refused.value
        )


def test_every_technique_of_a_model_stands_in_the_table():
    """Wherever a model brings a technique along, its module is one of those that the table looks through."""
    import pkgutil

    import attnlib.models

    found = set()
    for module in pkgutil.walk_packages(attnlib.models.__path__, "attnlib.models."):
        for cls in vars(importlib.import_module(module.name)).values():
            if isinstance(cls, type) and issubclass(cls, Intervention) and cls.__module__ == module.name:
                found.add(module.name.removeprefix("attnlib."))
    assert found == set(MODELS)


def outcome(first, second, model, inputs, plain, alone):
    """What is wrong with a pair, or ``None``."""
    refused = []
    for order in ((first, second), (second, first)):
        pair = [make(name, model) for name in order]
        try:
            session = attnlib.attach(model, *pair, token_types=TYPES)
        except ValueError as error:
            refused.append(str(error))
            continue
        refused.append("")
        if order != (first, second):
            session.detach()
            continue
        with session:
            try:
                scores, _ = answers(model, inputs)
            except ValueError as error:
                # What the first leaves over cannot serve the second, and it says why.
                return None if len(str(error)) > 40 else f"refused without a reason: {error}"
        if scores.isnan().any() or not scores.isfinite().any(-1).all():
            return "scores are not finite"
        looks = [name in LOOKS for name in order]
        if any(looks):
            # Who only looks does not change what the other does.
            other = plain[0] if all(looks) else alone[order[looks.index(False)]][0]
            if not torch.equal(scores, other):
                return "looking changed the scores"
        elif {first, second} <= REDUCES:
            if torch.equal(scores, plain[0]):
                return "neither did anything"
        elif first == second and first in ONCE:
            if not torch.equal(scores, alone[first][0]):
                return "twice is not once"
        elif torch.equal(scores, alone[first][0]):
            return f"{second} did nothing"
        elif first != second and torch.equal(scores, alone[second][0]):
            return f"{first} did nothing"
    if bool(refused[0]) != bool(refused[1]):
        return f"refused in one order only: {refused}"
    if refused[0] and ("cannot both act on" not in refused[0] or len(refused[0]) < 60):
        return f"refused without a reason: {refused[0]}"
    return None


@pytest.mark.parametrize("first", NAMES)
def test_pairs(first, model, inputs, plain, alone):
    """Refused in both orders, or generated: finite scores, and those of neither alone where both change something."""
    wrong = {}
    for second in NAMES[NAMES.index(first) :]:
        try:
            found = outcome(first, second, model, inputs, plain, alone)
        except Exception as error:  # noqa: BLE001 - all pairs are tried, and what broke is told together
            found = f"{type(error).__name__}: {error}"
        if found:
            wrong[second] = found
    assert not wrong
    assert torch.equal(answers(model, inputs)[0], plain[0])
