"""Small models of all tasks, and generated data for each: the table that `train.py` chooses from.

A row is a model, a batch for it (`forward`'s inputs by name, and the `target` of its loss) and what is told of it at
the end. Rows stand in the order of their names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import attnlib
from attnlib.bench.data.actions import clips as action_clips
from attnlib.bench.data.blobs import blobs
from attnlib.bench.data.lanes import REACH, lanes, recovered
from attnlib.bench.worlds.pairs import make_pair
from attnlib.models.backbones.resnet import resnet
from attnlib.models.backbones.stages import Features
from attnlib.models.bags.acmil import ACMIL
from attnlib.models.bags.biofusionnet import BioFusionNet, Survival
from attnlib.models.dense.daf import DAF
from attnlib.models.dense.dmmi import DMMI, referring_scores
from attnlib.models.dense.fod import FOD
from attnlib.models.dense.grounding import SentenceSegmenter
from attnlib.models.dense.heads import FPNHead, Segmenter
from attnlib.models.dense.resunet import ResUNet
from attnlib.models.dense.scaledepth import ScaleDepth
from attnlib.models.dense.segmif import SegMiF, segmif
from attnlib.models.dense.taskexpert import DenseTask, TaskExpert
from attnlib.models.detect.anchor_free import AnchorFreeDetector, DecoupledHead
from attnlib.models.detect.boxes import overlaps
from attnlib.models.detect.cace import CACENet
from attnlib.models.detect.featenhancer import Enhanced
from attnlib.models.detect.pan import PAN, CSPBackbone
from attnlib.models.detect.sdanet import SelectiveNeck
from attnlib.models.detect.temporal import BoundaryDetector, average_precision
from attnlib.models.diffusion.scale_distillation import OneStepUpscaler, smaller, zero_terminal_snr
from attnlib.models.losses import concordance
from attnlib.models.maps.standard import MappedLanes
from attnlib.models.medusa import SharedAttention
from attnlib.models.meta import Rated
from attnlib.models.pdmer import PDMER
from attnlib.models.pdmer import scores as following
from attnlib.models.perception.oat import OAT
from attnlib.models.perception.scanpaths import sequence_score
from attnlib.models.pretrain.croco import CroCo
from attnlib.models.pretrain.masks import random_mask
from attnlib.models.pretrain.uni4eye import Uni4Eye
from attnlib.models.restore.adversarial import PatchDiscriminator
from attnlib.models.restore.degrade import Degradation
from attnlib.models.restore.masks import square_masks
from attnlib.models.restore.pepsi import PEPSI, REDDiscriminator
from attnlib.models.restore.pmaa import PMAA
from attnlib.models.restore.restoreformer import RestoreFormer
from attnlib.models.restore.topiq import TOPIQ
from attnlib.models.retrieval.conditional import ConditionalCrossAttention
from attnlib.models.retrieval.contrast import recall
from attnlib.models.retrieval.filip import FILIP
from attnlib.models.retrieval.scale_invariant import Known, MemoryBank, ScaleInvariantSearch
from attnlib.models.retrieval.subspaces import SubspaceEmbedding
from attnlib.models.retrieval.tefal import TEFAL

Batch = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One row.

    Args:
        build: makes the model, without arguments; its first numbers come from the seed of the run.
        batch: of so many samples, drawn from a generator.
        score: of a trained model (in evaluation) and a batch that was not trained on: numbers by name.
        odd: a batch of other, awkward sizes, for `predict`; ``None`` where a model takes one size only.
        export: whether `torch.export` is to take the model.
        lr, batch_size, weight_decay, clip: of the training.
    """

    build: Callable[[], Any]
    batch: Callable[[int, torch.Generator], Batch]
    score: Callable[[Any, Batch], Mapping[str, float]] | None = None
    odd: Callable[[torch.Generator], Batch] | None = None
    export: bool = True
    lr: float = 2e-3
    batch_size: int = 8
    weight_decay: float = 0.0
    clip: float | None = 1.0


def balls(*grid: int, **settings: Any) -> Callable[[int, torch.Generator], Batch]:
    """Batches of balls in noise; one sample of it is `lambda g: balls(...)(1, g)`."""

    def batch(count: int, generator: torch.Generator) -> Batch:
        images, labels = blobs(count, grid, generator=generator, **settings)
        return {"x": images, "target": labels}

    return batch


def inputs_of(batch: Batch) -> Batch:
    """What `forward` and `predict` take of a batch."""
    return {name: value for name, value in batch.items() if name != "target"}


def dice(model: Any, batch: Batch) -> dict[str, float]:
    """Overlap of what is not background, over a whole batch."""
    found, truth = model.predict(**inputs_of(batch)) > 0, batch["target"] > 0
    return {"dice": float(2 * (found & truth).sum() / (found.sum() + truth.sum()).clamp(min=1))}


def small_resunet() -> ResUNet:
    trunk = resnet((4, 4, 8, 8), (1, 1, 1, 1), stem_dim=4, num_classes=0, in_chans=1)
    return ResUNet(1, 3, (4,) * 5, "eca", encoder=Features(trunk), rates=(1, 2))


def small_daf() -> DAF:
    trunk = resnet((4, 4, 8, 8), (1, 1, 1, 1), stem_dim=4, num_classes=0, in_chans=1)
    return DAF(3, 1, 8, encoder=Features(trunk, (1, 2, 3, 4)))


def small_unet(name: str, **settings: Any) -> Callable[[], Any]:
    return lambda: attnlib.create_model(name, dims=(4, 8, 8), momentum=0.1, **settings)


def small_fpn() -> Segmenter:
    small: dict[str, Any] = dict(embed_dim=16, depths=(1, 1), num_heads=(1, 2), kernel_size=3, dilations=None)
    encoder = attnlib.create_model("dinat_mini", features_only=True, in_chans=1, **small)
    return Segmenter(encoder, FPNHead(encoder.feature_info.channels(), 16, num_classes=3))


class Embedded(torch.nn.Module):
    """Tokens of numbers, or of values of some width."""

    def __init__(self, count: int, dim: int):
        super().__init__()
        self.table = torch.nn.Embedding(count, dim)

    def forward(self, ids: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        return self.table(ids)


def small_filip() -> FILIP:
    patches = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 16))
    return FILIP(patches, Embedded(9, 16), 16, 16, dim=8, image_skip=0, text_skip=0)


def things(count: int, generator: torch.Generator) -> Batch:
    """Four patches, two of which show things out of eight; two words that name them, in any order."""
    named = torch.rand(count, 8, generator=generator).argsort(1)[:, :2]
    images = 0.1 * torch.randn(count, 4, 8, generator=generator)
    at = torch.rand(count, 4, generator=generator).argsort(1)[:, :2]
    images[torch.arange(count)[:, None], at, named] += 1
    order = torch.rand(count, 2, generator=generator).argsort(1)
    same = (named.sort(1).values[:, None] == named.sort(1).values[None]).all(-1)
    return {"images": images, "texts": named.gather(1, order) + 1, "target": same}


def found(model: Any, batch: Batch) -> dict[str, float]:
    """How often the text of an image comes first, and the image of a text."""
    scores = model.predict(**inputs_of(batch))
    return {"texts": float(recall(scores, batch["target"])), "images": float(recall(scores.mT, batch["target"].mT))}


def two_attributes(count: int, generator: torch.Generator) -> Batch:
    """Five tokens, of which one shows an image's colour and one its shape, four of each; eight images at least."""
    count = max(count, 8)  # fewer have no triplet
    names = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(0))
    values = torch.stack([torch.arange(count) % 4, torch.arange(count) // 2 % 4], 1)
    images = 0.3 * torch.randn(count, 5, 12, generator=generator)
    for which in range(2):
        images[:, which] += names[which][values[:, which]]
    return {"images": images, "target": values}


def nearest(model: Any, batch: Batch) -> dict[str, float]:
    """How often the nearest image under a question has the same answer."""
    vectors, values = model.predict(batch["images"]).vectors, batch["target"]
    itself = torch.eye(len(values), dtype=torch.bool)
    score = {}
    for c in range(vectors.shape[1]):
        same = (values[:, c, None] == values[None, :, c]) & ~itself
        if same.any():
            score[f"condition {c}"] = float(recall((vectors[:, c] @ vectors[:, c].mT).masked_fill(itself, -2), same))
    return score


def clips(count: int, generator: torch.Generator) -> Batch:
    """Clips that look alike in pairs; sound tells them apart. Every fourth has none."""
    text = torch.randn(count, 8, generator=generator)
    frames = text[:, None, :] * torch.tensor([1.0] * 4 + [0.0] * 4) + 0.3 * torch.randn(
        count, 5, 8, generator=generator
    )
    audio = text[:, None, :] * torch.tensor([0.0] * 4 + [1.0] * 4) + 0.3 * torch.randn(count, 6, 8, generator=generator)
    valid = (torch.arange(count) % 4 != 3)[:, None].expand(count, 6).clone()
    return {"text": text, "frames": frames, "audio": audio, "audio_valid": valid, "target": torch.eye(count).bool()}


def found_clips(model: Any, batch: Batch) -> dict[str, float]:
    """How often the clip of a text comes first."""
    return {"clips": float(recall(model.predict(**inputs_of(batch))))}


def textures(count: int, generator: torch.Generator) -> Batch:
    """Maps of 32 channels of four kinds, two of each at least; every batch is for one of two learners."""
    count = max(count, 8)
    kinds = torch.randn(4, 32, 3, 3, generator=torch.Generator().manual_seed(0))
    target = torch.arange(count) % 4
    images = kinds[target] + torch.randn(count, 32, 3, 3, generator=generator)
    return {"images": images, "learner": int(torch.randint(0, 2, (), generator=generator)), "target": target}


def nearest_class(model: Any, batch: Batch) -> dict[str, float]:
    """How often the nearest sample is of the same class."""
    vectors, target = model.predict(batch["images"]).vectors, batch["target"]
    itself = torch.eye(len(target), dtype=torch.bool)
    same = (target[:, None] == target[None]) & ~itself
    return {"same class": float(recall((vectors @ vectors.mT).masked_fill(itself, -9), same))}


class BoxFeatures(torch.nn.Sequential):
    def __init__(self) -> None:
        conv, relu = torch.nn.Conv2d, torch.nn.ReLU
        super().__init__(conv(3, 16, 5, stride=2, padding=2), relu(), conv(16, 16, 3, stride=2, padding=1))


def small_search() -> ScaleInvariantSearch:
    return ScaleInvariantSearch(BoxFeatures(), 16, MemoryBank(12, 8), 8, size=16)


def one_thing_a_scene(count: int, generator: torch.Generator) -> Batch:
    """Scenes with one of twelve things each, of any side; the number of a box in the bank is that of its thing."""
    count = min(count, 12)
    colour = 2 * torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
    images, boxes = 0.3 * torch.randn(count, 3, 32, 32, generator=generator), torch.zeros(count, 5)
    for i in range(count):
        side = int(torch.randint(6, 24, (), generator=generator))
        x, y = (int(torch.randint(0, 33 - side, (), generator=generator)) for _ in range(2))
        images[i, :, y : y + side, x : x + side] += colour[i][:, None, None]
        boxes[i] = torch.tensor([i, x, y, x + side, y + side])
    return {"images": images, "boxes": boxes, "target": Known(torch.arange(count), 1.0)}


def found_across(model: Any, batch: Batch) -> dict[str, float]:
    """How often the scene of a thing comes first for its crop, at the scale that finds it worst."""
    scene, crops = model(batch["images"], batch["boxes"])
    return {"found": min(float(recall(crops[:, k] @ scene.mT)) for k in range(crops.shape[1]))}


def actions(count: int, generator: torch.Generator, length: int = 40) -> Batch:
    """Features along videos and the actions in them."""
    features, truth = action_clips(count, generator, length)
    return {"features": features, "target": truth}


def localised(model: Any, batch: Batch) -> dict[str, float]:
    """Mean average precision of segments at overlaps of 0.3 to 0.7."""
    found = average_precision(model.predict(batch["features"]), batch["target"])
    return {"mAP": sum(found.values()) / len(found)}


def small_biofusionnet() -> BioFusionNet:
    small: dict[str, Any] = dict(num_heads=2, depth=1, ff_dim=16, hidden=(16, 8, 8, 4), drop=0.0)
    return BioFusionNet(8, 5, 2, **small)


def ill(patches: int) -> Callable[[int, torch.Generator], Batch]:
    """Patients whose risk is seen half in their patches and half in one gene; who outlives the study is censored."""

    def batch(count: int, generator: torch.Generator) -> Batch:
        seen = torch.randn(count, patches, 8, generator=generator)
        genes, clinical = (torch.randn(count, n, generator=generator) for n in (5, 2))
        lifted = torch.randn(count, generator=generator)
        seen[:, :, 0] += lifted[:, None]
        time = torch.empty(count).exponential_(generator=generator) * (-1.5 * (lifted + genes[:, 1])).exp()
        event = (time < 3).float()
        event[:1] = 1.0  # a batch without an event has no likelihood
        return {"patches": seen, "genes": genes, "clinical": clinical, "target": Survival(time.clamp(max=3.0), event)}

    return batch


def by_risk(model: Any, batch: Batch) -> dict[str, float]:
    """How many pairs of patients are in their order."""
    return {"concordance": float(concordance(model.predict(**inputs_of(batch)).double(), *batch["target"]))}


def small_croco() -> CroCo:
    settings: dict[str, Any] = dict(mlp_ratio=2.0, mask_ratio=0.75, positions="rotary", rotary_base=10.0)
    return CroCo(8, 2, 1, 16, 1, 2, 16, 1, 2, **settings)


def two_views(*grid: int) -> Callable[[int, torch.Generator], Batch]:
    """Squares, black or white, and the same moved by one to the right."""

    def batch(count: int, generator: torch.Generator) -> Batch:
        cells = torch.randint(0, 2, (count, 1, *(-(-n // 2) for n in grid)), generator=generator).float()
        first = cells.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, : grid[0], : grid[1]]
        mask = random_mask(count, cells[0].numel(), ratio=0.75, generator=generator)
        return {"image1": first, "image2": first.roll(2, -1), "mask": mask, "target": first}

    return batch


def small_uni4eye() -> Uni4Eye:
    settings: dict[str, Any] = dict(in_chans=1, dim=24, depth=1, num_heads=2, mask_ratio=0.5)
    return Uni4Eye(8, (8, 8, 4), 2, decoder_dim=24, decoder_depth=1, decoder_heads=2, **settings)


def waves(side: int) -> Callable[[int, torch.Generator], Batch]:
    """Pictures, or every other time volumes, of a wave of any phase."""

    def batch(count: int, generator: torch.Generator) -> Batch:
        grid = (side, side) if torch.rand((), generator=generator) < 0.5 else (side, side, -(-side // 2))
        at = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in grid), indexing="ij")).sum(0)
        phase = 6.3 * torch.rand(count, *(1,) * (len(grid) + 1), generator=generator)
        x = (0.7 * at + phase).sin()
        patches = 1
        for n in grid:
            patches *= -(-n // 2)
        return {"x": x, "mask": random_mask(count, patches, ratio=0.5, generator=generator), "target": x}

    return batch


def guessed(model: Any, batch: Batch) -> dict[str, float]:
    """Squared error of what was hidden; 0.25 is chance."""
    with torch.no_grad():
        return {"error": float(model.loss(model(**inputs_of(batch)), batch["target"])["pixels"])}


def slides(count: int, generator: torch.Generator) -> Batch:
    """Bags of thirty instances, or fewer; a third of those of the positive ones are of one kind."""
    target = torch.arange(count) % 2
    bags = torch.randn(count, 30, 8, generator=generator)
    bags[:, :10, 0] += 2.5 * target[:, None]
    order = torch.rand(count, 30, generator=generator).argsort(1)
    sizes = torch.randint(20, 31, (count,), generator=generator)
    valid = torch.arange(30) < sizes[:, None]
    return {"bags": bags.gather(1, order[..., None].expand_as(bags)), "valid": valid, "target": target}


def told_apart(model: Any, batch: Batch) -> dict[str, float]:
    """How often the likeliest class is the right one."""
    found = model.predict(**inputs_of(batch)).argmax(-1)
    return {"accuracy": float((found == batch["target"]).float().mean())}


def hidden_lanes(count: int, generator: torch.Generator) -> Batch:
    """Lanes from above, partly hidden, and coarse maps of them."""
    bev, roads, truth = lanes(count, generator)
    return {"bev": bev, "roads": roads, "target": truth}


def unhidden(model: Any, batch: Batch) -> dict[str, float]:
    """Overlap of lanes where nothing was seen."""
    found = model.predict(batch["bev"], batch["roads"])
    return {"hidden IoU": recovered(found, batch["target"], batch["bev"][:, 1])}


def small_fod() -> FOD:
    trunk = resnet((4, 4), (1, 1), stem_dim=4, num_classes=0)
    model = FOD(Features(trunk, (0, 1)), 32, dims=(8, 8), num_heads=2, depth=1)
    return model.remember(weave(16, torch.Generator().manual_seed(2))["x"])


def weave(count: int, generator: torch.Generator, size: tuple[int, int] = (32, 32)) -> Batch:
    """A woven texture with some noise; nothing is wrong with it."""
    rows, columns = (torch.sin(torch.arange(side) * torch.pi / 2) for side in size)
    x = (rows[:, None] * columns).expand(count, 3, *size) + 0.1 * torch.randn(count, 3, *size, generator=generator)
    return {"x": x, "target": torch.zeros(count, *size)}


def blobs_found(model: Any, batch: Batch) -> dict[str, float]:
    """How often the pixel that looks worst lies in a blob that was put there, or beside it."""
    x = batch["x"].clone()
    x[:, :, 12:20, 8:16] = 1.5
    worst = model.predict(x).pixels.flatten(1).argmax(1)
    row, column = worst // x.shape[3], worst % x.shape[3]
    return {"found": float(((row - 15.5).abs().le(6) & (column - 11.5).abs().le(6)).float().mean())}


def letters(sentences: list[str]) -> torch.Tensor:
    """A stand-in for an encoder of text."""
    return torch.stack([torch.sin(torch.arange(1, 7) * float(sum(map(ord, s)))) for s in sentences])


def small_scaledepth() -> ScaleDepth:
    trunk = resnet((4, 8), (1, 1), stem_dim=4, num_classes=0)
    settings: dict[str, Any] = dict(num_bins=16, num_scales=2, depth=2, scale_depth=1, text_dim=6, range_weight=1.0)
    return ScaleDepth(Features(trunk), 16, 2, **settings).bind(letters, ["room", "street"])


def slopes(count: int, generator: torch.Generator, size: tuple[int, int] = (32, 32)) -> Batch:
    """Ground that rises into the distance: rooms of 10 m and streets of 80 m, which differ in colour."""
    far = torch.arange(count) % 2
    slope = torch.linspace(0.2, 1, size[0]).pow(0.5 + torch.rand(count, 1, generator=generator))
    relative = slope[:, :, None].expand(count, *size)
    noise = torch.rand(count, *size, generator=generator)
    x = torch.stack([relative, far[:, None, None].expand_as(relative).float(), noise], 1)
    depth = relative * torch.where(far > 0, 80.0, 10.0)[:, None, None]
    return {"x": x, "target": {"depth": depth, "scene": far}}


def depth_error(model: Any, batch: Batch) -> dict[str, float]:
    """Mean relative error of depth."""
    depth = batch["target"]["depth"]
    return {"relative error": float(((model.predict(batch["x"]) - depth).abs() / depth).mean())}


def small_taskexpert() -> TaskExpert:
    tasks = {"classes": DenseTask("classes", 3), "edges": DenseTask("edges"), "depth": DenseTask("depth")}
    trunk = resnet((4, 8), (1, 1), stem_dim=4, num_classes=0, in_chans=1)
    return TaskExpert(tasks, Features(trunk), 3, 16)


def balls_three_ways(count: int, generator: torch.Generator, size: tuple[int, int] = (32, 32)) -> Batch:
    """Balls in noise: what they are, where they end, and how near they are, which the smoothed image says."""
    x, classes = blobs(count, size, generator=generator, num_classes=3)
    inside = (classes > 0).float()[:, None]
    around = torch.nn.functional.max_pool2d(inside, 3, 1, 1) - inside
    depth = torch.nn.functional.avg_pool2d(x, 5, 1, 2)
    return {"x": x, "target": {"classes": classes, "edges": around[:, 0].long(), "depth": depth}}


def three_ways(model: Any, batch: Batch) -> dict[str, float]:
    """Overlap of what is not background, and the error of depth over its spread."""
    made, target = model.predict(batch["x"]), batch["target"]
    found, truth = made["classes"] > 0, target["classes"] > 0
    depth = target["depth"][:, 0]
    overlap = float(2 * (found & truth).sum() / (found.sum() + truth.sum()).clamp(min=1))
    return {"dice": overlap, "depth": float((made["depth"] - depth).abs().mean() / depth.std())}


def small_topiq() -> TOPIQ:
    trunk = resnet((4, 4, 8, 8), (1, 1, 1, 1), stem_dim=4, num_classes=0)
    return TOPIQ(dim=16, num_heads=2, drop=0.0, encoder=Features(trunk), freeze_norms=False)


def blurred(count: int, generator: torch.Generator, size: tuple[int, int] = (32, 32)) -> Batch:
    """Images of noise, blurred 0 to 3 times; the target says how often."""
    x, level = torch.rand(count, 3, *size, generator=generator), torch.randint(0, 4, (count,), generator=generator)
    for i, times in enumerate(level.tolist()):
        for _ in range(times):
            x[i] = torch.nn.functional.avg_pool2d(x[i], 3, 1, 1, count_include_pad=False)
    return {"x": x, "target": level.float()}


def ranked(model: Any, batch: Batch) -> dict[str, float]:
    """How the order of scores agrees with that of targets: share of pairs that differ."""
    y, t = model.predict(**inputs_of(batch)), batch["target"]
    pairs = t[:, None] > t[None]
    return {"pairs": float((y[:, None] > y[None])[pairs].float().mean()) if pairs.any() else 0.5}


def pictures(count: int, *sides: int, chans: int, generator: torch.Generator) -> torch.Tensor:
    """Smooth pictures (count, chans, H, W), -1 to 1."""
    coarse = torch.rand(count, chans, 4, 4, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(coarse, sides, mode="bilinear", align_corners=False)


def psnr(image: torch.Tensor, truth: torch.Tensor) -> float:
    """Of images from -1 to 1."""
    return float(-10 * ((image - truth) / 2).square().mean().clamp(min=1e-12).log10())


def cloudy(*sides: int) -> Callable[[int, torch.Generator], Batch]:
    """Two dates of one place, each with white clouds that leave the other date's clear, nearly always."""

    def batch(count: int, generator: torch.Generator) -> Batch:
        target = pictures(count, *sides, chans=4, generator=generator)
        cover = pictures(count, *sides, chans=2, generator=generator)[:, :, None] > 0.1
        return {"x": torch.where(cover, 0.95, target[:, None]), "target": target}

    return batch


def small_pmaa() -> PMAA:
    return PMAA(num_dates=2, dim=8, depth=3, drop_path=0.0, discriminator=PatchDiscriminator(12, (8, 8)))


def holed(*sides: int) -> Callable[[int, torch.Generator], Batch]:
    """Pictures with a square that is missing."""

    def batch(count: int, generator: torch.Generator) -> Batch:
        target = pictures(count, *sides, chans=3, generator=generator)
        known = square_masks(count, sides, min(sides) // 3, generator)
        return {"x": target.masked_fill(~known, 0.0), "known": known, "target": target}

    return batch


def small_pepsi() -> PEPSI:
    return PEPSI(dims=(4, 8, 8, 16), discriminator=REDDiscriminator(3, (8, 8), (24, 24)))


def degraded(*sides: int) -> Callable[[int, torch.Generator], Batch]:
    """Pictures made worse, and what they were."""
    worse = Degradation(down=(1.0, 3.0), grey=0.0, size=max(sides) * 4)

    def batch(count: int, generator: torch.Generator) -> Batch:
        clean = pictures(count, *sides, chans=3, generator=generator) / 2 + 0.5
        pairs = [worse(image, generator) for image in clean]
        x, target = (torch.stack(t) * 2 - 1 for t in zip(*pairs, strict=True))
        return {"x": x, "target": target}

    return batch


def small_restoreformer() -> RestoreFormer:
    settings: dict[str, Any] = dict(dim=8, mults=(1, 2, 2), depth=1, num_codes=16, code_dim=4, num_heads=2, groups=4)
    return RestoreFormer(**settings, frozen=(), discriminator=PatchDiscriminator(3, (8, 8)), gan_weight=0.1)


class SmallDenoiser(torch.nn.Module):
    """Noise and a picture side by side to a picture, over the time."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Conv2d(7, 16, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(16, 3, 3, padding=1)
        )

    def forward(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        time = (t.to(z.dtype) / 20)[:, None, None, None].expand(-1, 1, *z.shape[2:])
        return self.net(torch.cat([z, time], 1))


def small_upscaler() -> OneStepUpscaler:
    return OneStepUpscaler(SmallDenoiser(), zero_terminal_snr(torch.linspace(0.999, 0.01, 20)), 2)


def small_and_large(*sides: int) -> Callable[[int, torch.Generator], Batch]:
    """Pictures, and the same half as large; noise to begin with."""

    def batch(count: int, generator: torch.Generator) -> Batch:
        target = pictures(count, *sides, chans=3, generator=generator)
        noise = torch.randn(target.shape, generator=generator)
        return {"low": smaller(target, 2), "noise": noise, "target": target}

    return batch


def restored(model: Any, batch: Batch) -> dict[str, float]:
    """PSNR of the answer."""
    return {"psnr": psnr(model.predict(**inputs_of(batch)), batch["target"])}


def small_grounding() -> SentenceSegmenter:
    trunk = Features(resnet((8, 8, 8, 8), (1, 1, 1, 1), stem_dim=8, num_classes=0), (0, 1, 2, 3))
    return SentenceSegmenter(trunk, text_dim=2, gate="softmax*C", drop=0.0, input_norm=False)


def named(count: int, generator: torch.Generator, height: int = 32, width: int = 32) -> Batch:
    """Red and blue things, and which colour is meant."""
    _, kinds = blobs(count, (height, width), num_classes=3, generator=generator)
    meant = torch.randint(0, 2, (count,), generator=generator)
    x = 0.1 * torch.randn(count, 3, height, width, generator=generator)
    x[:, 0] += kinds == 1
    x[:, 2] += kinds == 2
    target = (kinds == meant[:, None, None] + 1).long()
    return {"x": x, "text": torch.nn.functional.one_hot(meant, 2).float(), "target": target}


def small_medusa() -> SharedAttention:
    trunk = resnet((4, 4, 8, 8), (1, 1, 1, 1), stem_dim=4, num_classes=2, in_chans=1)
    return SharedAttention(trunk, global_dim=4, body_size=16)


def brightness(count: int, generator: torch.Generator, height: int = 32, width: int = 32) -> Batch:
    """Images of one ball; whether it is a bright one."""
    x, labels = blobs(count, (height, width), num_classes=3, most=1, generator=generator)
    return {"x": x, "target": (labels.flatten(1).amax(1) == 2).long()}


def accuracy_of(model: Any, batch: Batch) -> dict[str, float]:
    """How often the class is right."""
    return {"accuracy": float((model.predict(**inputs_of(batch)) == batch["target"]).float().mean())}


def small_dmmi() -> DMMI:
    sizes: dict[str, Any] = dict(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=4)
    words = dict(text_dim=16, text_heads=2, ff_dim=32, drop=0.0)
    return DMMI(**sizes, **words, text_encoder=Words(), drop_path_rate=0.0)


class Words(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(6, 16)

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.table(ids)


def referred(count: int, generator: torch.Generator, height: int = 32, width: int = 32) -> Batch:
    """Red and blue things; a sentence names red ones (2), blue ones (3) or green ones (4), of which there are none."""
    picture = named(count, generator, height, width)
    colour = torch.where(torch.rand(count, generator=generator) < 0.2, 2, picture["text"].argmax(1))
    target = picture["target"] * (colour < 2)[:, None, None]
    text = torch.tensor([1, 0, 5]).repeat(count, 1)
    erased = text.clone()
    text[:, 1] = colour + 2
    valid = torch.tensor([True, True, False]).repeat(count, 1)
    return {"x": picture["x"], "text": text, "valid": valid, "erased": erased, "target": target}


def referring(model: Any, batch: Batch) -> dict[str, float]:
    """Overlap, and how often a mask is empty that is to be."""
    scores = referring_scores(model.predict(**inputs_of(batch)), batch["target"] == 1)
    return {k: v for k, v in scores.items() if not k.startswith("P@")}


def small_segmif() -> SegMiF:
    encoder = dict(embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))
    return segmif(3, head_dim=16, encoder=encoder, dim=8, growth=4, num_heads=2, drop_path_rate=0.0)


def seen_by_one(count: int, generator: torch.Generator, height: int = 32, width: int = 32) -> Batch:
    """Things of two classes: the first shows in the visible image alone, the second in the infrared one."""
    _, target = blobs(count, (height, width), num_classes=3, generator=generator)
    visible = 0.3 + 0.5 * (target == 1)[:, None] + 0.05 * torch.randn(count, 3, height, width, generator=generator)
    infrared = 0.3 + 0.5 * (target == 2)[:, None] + 0.05 * torch.randn(count, 1, height, width, generator=generator)
    return {"visible": visible.clamp(0, 1), "infrared": infrared.clamp(0, 1), "target": target}


def dice_of_both(model: Any, batch: Batch) -> dict[str, float]:
    """Overlap of each class of things."""
    found, truth = model.predict(**inputs_of(batch)).classes, batch["target"]
    both = {k: ((found == k) & (truth == k)).sum() * 2 / ((found == k).sum() + (truth == k).sum()).clamp(min=1)
            for k in (1, 2)}  # fmt: skip
    return {f"dice {k}": float(v) for k, v in both.items()}


def clips_with_sound(count: int, generator: torch.Generator, length: int = 6) -> Batch:
    """Clips of which a stretch shows one of three things while a tone is heard; 3 is the class of all else."""
    event = torch.randint(0, 3, (count,), generator=generator)
    start = torch.randint(0, length - 2, (count,), generator=generator)[:, None]
    inside = (torch.arange(length) >= start) & (torch.arange(length) < start + 3)
    video = 0.3 * torch.randn(count, length, 2, 2, 8, generator=generator)
    audio = 0.3 * torch.randn(count, length, 6, generator=generator)
    video[:, :, 0, 1, :3] += 2 * torch.eye(3)[event][:, None] * inside[..., None]
    audio[..., 0] += 2 * inside
    return {"video": video, "audio": audio, "target": torch.where(inside, event[:, None], 3)}


def segments_right(model: Any, batch: Batch) -> dict[str, float]:
    """Share of segments whose event, or that there is none, is found."""
    found = model.predict(**inputs_of(batch))
    return {"accuracy": float((found == batch["target"]).float().mean())}


def pairs(count: int, generator: torch.Generator, side: int = 32) -> Batch:
    """Visible and infrared pictures of things that show in either, or in both."""
    start = int(torch.randint(0, 2**31, (), generator=generator))
    made = [make_pair(start + i, side=side) for i in range(count)]
    target = [{"boxes": p.boxes, "labels": p.labels} for p in made]
    x, infrared = (torch.stack([getattr(p, name) for p in made]) for name in ("visible", "infrared"))
    return {"x": x, "infrared": infrared, "target": target}


def boxes_found(model: Any, batch: Batch) -> dict[str, float]:
    """The share of objects that one of the best boxes of their class covers, as many boxes as there are objects."""
    hits = total = 0
    for own, want in zip(model.predict(**inputs_of(batch), threshold=0.01), batch["target"], strict=True):
        best = slice(0, len(want["labels"]))
        same = own.labels[best, None] == want["labels"]
        hits += int(((overlaps(own.boxes[best], want["boxes"])[0] > 0.5) & same).any(0).sum())
        total += len(want["labels"])
    return {"found": hits / max(total, 1)}


def shelves(count: int, generator: torch.Generator, size: int = 6) -> Batch:
    """Shelves of one row, read from its beginning up to the object that is sought."""
    sought = torch.randint(1, size, (count,), generator=generator)
    images = torch.rand(count, size, 1, 1, 3, generator=generator).expand(-1, -1, 20, 20, -1).contiguous()
    places = torch.stack([torch.zeros(size), torch.arange(size).float()], -1).repeat(count, 1, 1)
    path = torch.arange(size).repeat(count, 1)
    path = path.masked_fill(path > sought[:, None], -1)
    return {"images": images, "places": places, "sought": sought, "path": path, "target": path}


def paths_alike(model: Any, batch: Batch) -> dict[str, float]:
    """Mean sequence score of the likeliest paths."""
    found = model.predict(**inputs_of(batch), max_steps=12)
    scores = [sequence_score(a, b) for a, b in zip(found, batch["target"], strict=True)]
    return {"sequence score": sum(scores) / len(scores)}


def small_detector(neck: torch.nn.Module | None = None) -> AnchorFreeDetector:
    dims = (8, 16, 16, 16, 16)
    neck = PAN(dims[2:]) if neck is None else neck
    return AnchorFreeDetector(CSPBackbone(dims, (1, 1, 1, 1)), neck, DecoupledHead(dims[2:], 2))


def small_enhanced() -> Enhanced:
    return Enhanced(small_detector(), attnlib.create_model("featenhancer", dim=8))


def small_selective() -> AnchorFreeDetector:
    return small_detector(torch.nn.Sequential(PAN((16, 16, 16)), SelectiveNeck(16, 3, hidden=16)))


def laid_over(count: int, generator: torch.Generator, side: int = 32) -> Batch:
    """Pictures that let through what lies behind: two laid over each other, the things of the first hidden in it."""
    start = int(torch.randint(0, 2**30, (), generator=generator))
    made = [make_pair(start + i, side=side, seen="visible") for i in range(2 * count)]
    x = torch.stack([0.6 * p.visible + 0.4 * q.infrared for p, q in zip(made[:count], made[count:], strict=True)])
    return {"x": x, "target": [{"boxes": p.boxes, "labels": p.labels} for p in made[:count]]}


def in_the_dark(count: int, generator: torch.Generator, side: int = 32) -> Batch:
    """Visible pictures, dark and noisy."""
    start = int(torch.randint(0, 2**31, (), generator=generator))
    made = [make_pair(start + i, side=side, seen="visible") for i in range(count)]
    x = 0.1 * torch.stack([p.visible for p in made])
    x = x + 0.01 * torch.randn(x.shape, generator=generator)
    return {"x": x, "target": [{"boxes": p.boxes, "labels": p.labels} for p in made]}


def listeners(count: int, generator: torch.Generator, length: int = 12) -> Batch:
    """Songs whose mood sounds in some bands; who listens feels it more or less, or the other way round."""
    who = torch.arange(count) % max(count // 4, 1)
    phase, rate = (torch.rand(count, 2, 1, generator=generator) for _ in range(2))
    mood = torch.sin(6.3 * phase + (0.4 + 0.8 * rate) * torch.arange(length)).mT
    mel = 0.2 * torch.randn(count, length, 9, 12, generator=generator)
    mel[..., :6] += mood[..., :1, None]
    mel[..., 6:] += mood[..., 1:, None]
    gain = torch.tensor([0.7, -0.7])[torch.randint(0, 2, (len(who.unique()),), generator=generator)]
    values = gain[who][:, None, None] * mood
    return {"mel": mel, "song": torch.zeros(count, 16), "target": Rated(values, who)}


def felt_after_one(model: Any, batch: Batch) -> dict[str, float]:
    """Concordance with each listener's ratings, before and after one song of theirs."""
    values, who = batch["target"]
    before, after = [], []
    for i in who.unique():
        mel, song, said = (t[who == i] for t in (batch["mel"], batch["song"], values))
        mine = model.adapt({"mel": mel[:1], "song": song[:1], "target": said[:1]})
        for kept, some in ((before, model), (after, mine)):
            kept.append(following(some.predict(mel[1:], song[1:]), said[1:]).ccc.mean())
    return {"ccc before": float(torch.stack(before).mean()), "ccc after": float(torch.stack(after).mean())}


TASKS: dict[str, Task] = {
    "acmil": Task(lambda: ACMIL(8, 2, 16, hidden_dim=8), slides, told_apart, batch_size=16, lr=5e-3),
    "agunet3d": Task(
        small_unet("agunet3d"), balls(16, 16, 16), dice, odd=lambda g: balls(13, 16, 5)(1, g), lr=1e-2
    ),
    "biofusionnet": Task(small_biofusionnet, ill(6), by_risk, odd=lambda g: ill(1)(1, g), batch_size=32, lr=5e-3),
    "cace": Task(
        lambda: CACENet(3, 8, 6, 16, 2, (8, 32, 16)), clips_with_sound, segments_right,
        odd=lambda g: clips_with_sound(1, g, 9), batch_size=32, lr=5e-3, clip=0.5,
    ),
    "conditional": Task(
        lambda: ConditionalCrossAttention(torch.nn.Identity(), 2, 12, 6, 2), two_attributes, nearest, batch_size=24
    ),
    "croco": Task(small_croco, two_views(8, 8), guessed, odd=lambda g: two_views(7, 10)(1, g), batch_size=32, lr=1e-2),
    "csa": Task(
        lambda: BoundaryDetector(8, 16), actions, localised, odd=lambda g: actions(1, g, 23), batch_size=16, lr=5e-3
    ),
    "daf": Task(small_daf, balls(32, 32, num_classes=3), dice, odd=lambda g: balls(33, 27, num_classes=3)(1, g)),
    "dagunet3d": Task(
        small_unet("dagunet3d"), balls(16, 16, 16), dice, odd=lambda g: balls(13, 16, 5)(1, g), lr=1e-2
    ),
    "daunet3d": Task(
        small_unet("daunet3d"), balls(16, 16, 16), dice, odd=lambda g: balls(13, 16, 5)(1, g), lr=1e-2
    ),
    "deyolo": Task(
        lambda: attnlib.create_model("deyolo_n", width=0.125, num_classes=2, sides=(20, 20, 20)), pairs, boxes_found,
        odd=lambda g: {name: x[..., :37, :51] for name, x in pairs(1, g, 64).items() if name != "target"}, lr=5e-3,
    ),
    "dmmi": Task(small_dmmi, referred, referring, odd=lambda g: referred(1, g, 33, 27), lr=3e-3),
    "featenhancer": Task(
        small_enhanced, in_the_dark, boxes_found, odd=lambda g: {"x": in_the_dark(1, g, 64)["x"][..., :37, :51]},
        lr=5e-3,
    ),
    "filip": Task(small_filip, things, found, batch_size=32, lr=5e-3),
    "fod": Task(small_fod, weave, blobs_found, odd=lambda g: weave(1, g, (27, 38))),
    "fpn": Task(
        small_fpn, balls(32, 32, num_classes=3), dice, odd=lambda g: balls(33, 27, num_classes=3)(1, g)
    ),
    "medusa": Task(small_medusa, brightness, accuracy_of, odd=lambda g: brightness(1, g, 33, 27), lr=5e-3),
    "oat": Task(
        lambda: OAT(48, 4, 48, (1, 1), table_size=10, drop=0.0, levels=1), shelves, paths_alike,
        odd=lambda g: shelves(1, g, 9), batch_size=32, lr=3e-3,
    ),
    "pdmer": Task(
        lambda: PDMER(
            16, 4, 1, 32, local=1, wide=4, mel_size=(9, 12), window=12, drop=0.0, attention_weight=0.1, inner_steps=4,
            inner_lr=0.1,
        ), listeners, felt_after_one, odd=lambda g: listeners(2, g, 17), batch_size=32, lr=5e-3,
    ),
    "pepsi": Task(small_pepsi, holed(24, 24), restored, odd=lambda g: holed(25, 19)(1, g), lr=3e-3),
    "pmaa": Task(small_pmaa, cloudy(16, 16), restored, odd=lambda g: cloudy(17, 13)(1, g), lr=3e-3),
    "restoreformer": Task(
        small_restoreformer, degraded(16, 16), restored, odd=lambda g: degraded(17, 13)(1, g), lr=3e-3
    ),
    "resunet": Task(
        small_resunet, balls(32, 32, num_classes=3), dice, odd=lambda g: balls(33, 27, num_classes=3)(1, g)
    ),
    "scale_invariant": Task(small_search, one_thing_a_scene, found_across, batch_size=12, lr=3e-3, export=False),
    "scaledepth": Task(
        small_scaledepth, slopes, depth_error, odd=lambda g: slopes(1, g, (27, 34)), batch_size=8, lr=1e-2
    ),
    "sdanet": Task(small_selective, laid_over, boxes_found, odd=lambda g: laid_over(1, g, 51), lr=5e-3),
    "segmif": Task(small_segmif, seen_by_one, dice_of_both, odd=lambda g: seen_by_one(1, g, 33, 27), lr=5e-3),
    "sentence": Task(small_grounding, named, dice, odd=lambda g: named(1, g, 33, 27), lr=1e-2),
    "standard_map": Task(
        lambda: MappedLanes(2, 16, "polyline", reach=REACH), hidden_lanes, unhidden, batch_size=12, lr=1e-2,
        export=False,
    ),
    "subspaces": Task(
        lambda: SubspaceEmbedding(torch.nn.Identity(), 32, 24, 2, drop=0.0), textures, nearest_class, export=False
    ),
    "taskexpert": Task(
        small_taskexpert, balls_three_ways, three_ways, odd=lambda g: balls_three_ways(1, g, (33, 27)), lr=5e-3
    ),
    "tefal": Task(lambda: TEFAL(8, drop=0.0), clips, found_clips, batch_size=16, lr=5e-3),
    "topiq": Task(small_topiq, blurred, ranked, odd=lambda g: blurred(1, g, (33, 18)), batch_size=16, lr=5e-3),
    "uni4eye": Task(small_uni4eye, waves(8), guessed, odd=lambda g: waves(7)(1, g), batch_size=16, lr=5e-3),
    "upscaler": Task(
        small_upscaler, small_and_large(16, 16), restored, odd=lambda g: small_and_large(18, 10)(1, g), lr=1e-2
    ),
}  # fmt: skip
