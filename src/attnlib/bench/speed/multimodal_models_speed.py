"""What techniques on multimodal models cost, and what they save against the plain way: ratios of interleaved runs.

``attnlib bench --suite multimodal-models-speed --out benchmarks/results`` writes ``multimodal-models-speed-cpu.json``,
of which ``docs/multimodal-models.md`` shows the table. Models have random weights: what is measured is arithmetic and
bookkeeping, and who answers together must answer the same. Beside each stands the plain way, on one thread:

- the magnifier of LSceneLLM: the same layers without it; what a layer that selects *and* reads adds, over a layer;
- information-sensitive crops of Iris: every window's sum by itself;
- ZoomEye: prompts read one by one, nothing remembered;
- task tokens: the decoding step of the untouched model;
- rDPO: the step of DPO; attention flow: the same at a quarter of the depth (in bytes, not seconds);
- READ's points that move: a loop over points and all pixels, with its gradient; MapSAM: a loop over images.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...convert.preference import Preference, get_recipe
from ...convert.preference.batches import Collator, read_batch, to_pairs, weights_of
from ...extras import need
from ...hooks import TokenTypes, attach
from ...hooks.hf.names import cache_argument, cache_out
from ...look.flow import Flow
from ...look.speak import Speaker
from ...look.zoom import InformationCrops, ZoomEye, ZoomPrompts, information_windows
from ...models.multimodal.mapsam import MapSAM
from ...models.multimodal.task_tokens import TaskTokens, UseTaskTokens
from ...ops.points import continuous_points
from ...steer.magnifier import SceneMagnifier, magnifier_layers
from ..clock import interleave, limit_threads, machine, now, peak_bytes, ratio

Say = Callable[[str], None]
Record = dict[str, Any]
#: Token of the picture in the models made here.
IMAGE_ID = 6


def _cost(case: str, against: str, bar: float, ours: float, plain: float, times: float, **more: Any) -> Record:
    """A record of what something costs: ``times`` as much as the plain way, which must be at most ``bar``."""
    return {
        "case": case, "against": against, "kind": "cost", "bar": bar, "ours": ours, "plain": plain, "times": times,
        "met": times <= bar, **more,
    }  # fmt: skip


def _gain(case: str, against: str, bar: float, taken: Any, **more: Any) -> Record:
    """A record of what something saves: the plain way takes ``times`` as long, which must be at least ``bar``."""
    times = ratio(taken["plain"], taken["ours"])["ratio"]
    return {
        "case": case, "against": against, "kind": "gain", "bar": bar, "ours": taken["ours"].median,
        "plain": taken["plain"].median, "times": times, "met": times >= bar, **more,
    }  # fmt: skip


def _llama(width: int, layers: int, head_dim: int = 64, causal: bool = False) -> Any:
    hf = need("transformers", "the speed of multimodal techniques")
    torch.manual_seed(0)
    heads = max(1, width // head_dim)
    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads,
    )  # fmt: skip
    return (hf.LlamaForCausalLM if causal else hf.LlamaModel)(config).eval()


# ---------------------------------------------------------------------------------------------------------------------
# LSceneLLM's magnifier


@torch.no_grad()
def magnifier(rounds: int, clock: str, small: bool) -> Iterator[Record]:
    """Prompts of 128 coarse tokens with four details each, and decoding behind one."""
    coarse, each, layers = (4, 2, 3) if small else (128, 4, 3)
    for width, text in ((32, 8),) if small else ((512, 128), (1024, 512)):
        plain = _llama(width, layers, 16 if small else 64)
        looking = copy.deepcopy(plain, {id(p): p for p in plain.parameters()})
        ids = torch.full((1, coarse + text), 5)
        ids[:, :coarse] = IMAGE_ID
        made = SceneMagnifier(magnifier_layers(looking, 0), torch.randn(1, coarse, each, width))
        against = f"{width} wide, {coarse} coarse and {text} text tokens"
        with attach(looking, made, token_types=TokenTypes(image=IMAGE_ID)):
            both = {"plain": lambda p=plain, i=ids: p(i, use_cache=False),
                    "ours": lambda p=looking, i=ids: p(i, use_cache=False)}  # fmt: skip
            taken = interleave(both, rounds, clock)
            yield _cost(
                "magnifier of LSceneLLM, prompt", f"a layer, {against}", 1.3, taken["ours"].median,
                taken["plain"].median, _a_layer(taken, layers),
                # What the projections of details take in multiplications, whoever selects.
                products=2 * coarse * each * width**2 / (ids.shape[1] * sum(
                    p.numel() for p in plain.layers[0].parameters() if p.dim() == 2)),
            )  # fmt: skip
            if text > 128 or small:
                bursts = {
                    "plain": _bursts(plain, ids, 2 if small else 8),
                    "ours": _bursts(looking, ids, 2 if small else 8),
                }
                found = interleave({name: burst.__next__ for name, burst in bursts.items()}, rounds, clock)
                yield _cost(
                    "magnifier of LSceneLLM, step", f"a layer, {against} read", 1.3, found["ours"].median,
                    found["plain"].median, _a_layer(found, layers),
                )  # fmt: skip


def _a_layer(taken: Any, layers: int) -> float:
    """How many times a layer takes that selects and reads, from models of so many layers.

    The first selects and the last reads, so that all but one of the layers' worth of either is added.
    """
    pairs = zip(taken["ours"].seconds, taken["plain"].seconds, strict=True)
    return statistics.median(1 + (ours - plain) / plain * layers / (layers - 1) for ours, plain in pairs)


def _bursts(model: Any, ids: Tensor, steps: int) -> Iterator[None]:
    """Reads so many tokens behind a prompt each time."""
    held = cache_argument(model, cache_out(model(ids, use_cache=True)))
    while True:
        for _ in range(steps):
            model(ids[:, -1:], **held, use_cache=True)
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Iris


def direct_windows(
    edges: np.ndarray, k_min: int = 64, rho_min: float = 0.15, alpha: float = 1.5, max_crops: int = 50
) -> list[tuple[int, int, int, int]]:
    """Boxes of :func:`attnlib.look.zoom.information_windows` without strips at the boundary, sum by sum."""
    left, found, k = edges.copy(), [], k_min
    while k <= min(edges.shape):
        step = max(k // 4, 32)
        for y in range(0, edges.shape[0] - k + 1, step):
            for x in range(0, edges.shape[1] - k + 1, step):
                if left[y : y + k, x : x + k].sum() >= rho_min * k_min**2:
                    found.append((x, y, x + k, y + k))
                    left[y : y + k, x : x + k] = False
                    if len(found) == max_crops:
                        return found
        k = math.ceil(alpha * k)
    return found


def _page(side: int, lines: int, noise: float, seed: int = 0) -> np.ndarray:
    """Edges of a screen with short lines of text on a ground of noise."""
    random = np.random.default_rng(seed)
    edges = random.random((side, side)) < noise
    high, wide = max(2, side // 80), max(4, side // 16)
    for _ in range(lines):
        y, x = int(random.integers(0, side - high)), int(random.integers(0, side - wide))
        edges[y : y + high, x : x + wide] |= random.random((high, wide)) < 0.4
    return edges


def crops(rounds: int, clock: str, small: bool) -> Iterator[Record]:
    """Windows of screens of a megapixel, from one that is searched to its end to one that is full at once."""
    side = 96 if small else 1000
    for name, lines, noise in (("blank", 0, 0.0), ("few lines", 40, 0.0), ("many lines", 60, 0.02), ("full", 0, 0.2)):
        edges = _page(side, lines, noise)
        found = [window.box for window in information_windows(edges, boundary=False)]
        if found != direct_windows(edges):
            raise AssertionError(f"windows of the screen {name!r} are not those of the direct sums")
        both = {
            "ours": lambda e=edges: information_windows(e, boundary=False),
            "plain": lambda e=edges: direct_windows(e),
        }
        taken = interleave(both, rounds, clock)
        yield _gain(f"crops of Iris, a {name} screen", "direct sums", 10.0, taken, windows=len(found))
    picture = np.where(_page(side, 60, 0.0)[..., None], 20, 240).astype(np.uint8).repeat(3, -1)
    cut = InformationCrops()
    whole = interleave({"ours": lambda: cut(picture)}, rounds, clock)["ours"].median
    yield _cost("crops of Iris with edges and resizing", "0.1 s", 1.0, whole, 0.1, whole / 0.1)


# ---------------------------------------------------------------------------------------------------------------------
# ZoomEye and preferences, on a LLaVA of random weights


def _llava(small: bool) -> tuple[Any, Any]:
    hf, tokenizers = need("transformers", "the speed of ZoomEye"), need("tokenizers", "the speed of ZoomEye")
    words = ["<pad>", "<s>", "</s>", "<unk>", "Yes", "No", "<image>"]
    asked = ZoomPrompts()
    for text in (asked.exists, asked.latent, asked.answerable, "What is next to the red circle"):
        words += [w for w in text.replace("?", " ?").replace(".", " .").split() if w not in words and "{" not in w]
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    read = hf.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    side, width, layers = (28, 32, 1) if small else (224, 256, 2)
    torch.manual_seed(0)
    vision = hf.CLIPVisionConfig(
        hidden_size=width // 2, intermediate_size=width, num_hidden_layers=2, num_attention_heads=2, image_size=side,
        patch_size=14,
    )  # fmt: skip
    text = hf.LlamaConfig(
        vocab_size=max(1000, len(words)), hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = hf.LlavaConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE_ID, image_seq_length=(side // 14) ** 2,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    model = hf.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():  # random models hardly look: what they see is made to count
        model.get_output_embeddings().weight.mul_(3)
        for p in model.model.multi_modal_projector.parameters():
            p.mul_(20)
    reader = hf.CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor = hf.LlavaProcessor(
        reader, read, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return model, processor


def zoom_eye(rounds: int, clock: str, small: bool) -> Iterator[Record]:
    """The first question about a picture of which every box is looked at, and a second one about the same thing."""
    model, processor = _llava(small)
    side = 28 if small else 224
    picture = np.random.default_rng(0).integers(0, 255, (4 * side, 4 * side, 3), np.uint8)
    asked = ("What is next to the red circle", "Can the red circle be seen in the image")
    held: dict[str, Any] = {}
    said: dict[tuple[str, int], Any] = {}

    def eye(**settings: Any) -> ZoomEye:
        speaker = Speaker(model, processor, max_new_tokens=4, **settings)
        return ZoomEye(
            speaker, "llava", cues=lambda question: ["red circle"], max_depth=2, leaf=side, upper=0.95, pops=21
        )

    def ask(who: str, number: int) -> None:
        if not number:  # nothing is known of the picture yet
            held[who] = eye(batch_size=1, cache=0) if who == "plain" else eye(share_prompts=True, keep_prompts=32)
        said[who, number] = held[who].answer(picture, asked[number])

    order = [(number, who) for number in (0, 1) for who in ("plain", "ours")]
    taken = interleave({(who, n): partial(ask, who, n) for n, who in order}, rounds, clock)
    for n, name in enumerate(("first question", "second question")):
        ours, plain = said["ours", n], said["plain", n]
        opened = [[[node.box for node in search.opened] for search in of.searches] for of in (ours, plain)]
        if (str(ours), ours.boxes) != (str(plain), plain.boxes) or opened[0] != opened[1]:
            raise AssertionError(
                f"ZoomEye answers {ours!r} about {ours.boxes}, the plain loop {plain!r}, {plain.boxes}"
            )
        both = {who: taken[who, n] for who in ("ours", "plain")}
        yield _gain(f"ZoomEye, {name}", "one prompt at a time", 2.0, both, calls=sum(plain.calls.values()))


def preferences(rounds: int, clock: str, small: bool) -> Iterator[Record]:
    """A step of rDPO beside one of DPO: collation, policy and frozen reference, loss, gradients."""
    model, _ = _llava(small)
    frozen = copy.deepcopy(model).requires_grad_(False)
    side, length, count = (28, 4, 2) if small else (224, 32, 4)
    tokens = (side // 14) ** 2
    random = torch.Generator().manual_seed(0)
    pairs = []
    for _ in range(count):
        ids = torch.cat(
            [torch.tensor([1]), torch.full((tokens,), IMAGE_ID), torch.randint(7, 40, (12,), generator=random)]
        )
        views = torch.randn(2, 1, 3, side, side, generator=random)
        said = {n: torch.randint(7, 40, (length,), generator=random) for n in ("chosen", "rejected")}
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": views[0]}
        pairs.append(Preference(given, said, {"retrieved": {"pixel_values": views[1]}}))

    def step(name: str) -> Callable[[], None]:
        made, recipe = to_pairs(pairs, get_recipe(name), None, model.get_output_embeddings().weight.shape[0])
        collate = Collator(recipe)

        def run() -> None:
            batch = collate(made)
            with torch.no_grad():
                before = read_batch(frozen, recipe, batch)
            losses = recipe.loss(read_batch(model, recipe, batch), before, batch["valid"], weights_of(batch))
            model.zero_grad(set_to_none=True)
            losses.total.backward()

        return run

    taken = interleave({"plain": step("dpo"), "ours": step("rdpo")}, rounds, clock)
    yield _cost(
        "a step of rDPO", "a step of DPO", 1.6, taken["ours"].median, taken["plain"].median,
        ratio(taken["ours"], taken["plain"])["ratio"],
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Task tokens, flow


@torch.no_grad()
def task_tokens(rounds: int, clock: str, small: bool) -> Iterator[Record]:
    """Decoding steps with task tokens attached, none of which is there."""
    width, layers, context = (32, 1, 8) if small else (1024, 8, 256)
    model = _llama(width, layers, 16 if small else 64, causal=True)
    tokens = TaskTokens({"box": 60, "mask": 61}, width, {"box": nn.Linear(width, 4), "mask": nn.Linear(width, 8)})
    ids = torch.randint(0, 50, (1, context))
    cache, steps = cache_out(model(ids, use_cache=True)), 4
    held = cache_argument(model, cache)

    def run() -> tuple[float, Tensor]:
        start = 0.0
        for done in range(steps + 1):
            if done == 1:  # the step right after attaching finds cold caches
                start = now(clock)
            logits = model(ids[:, :1], **held, use_cache=True).logits
        taken = (now(clock) - start) / steps
        cache.crop(-steps - 1)
        return taken, logits

    found: list[tuple[float, float]] = []
    for _ in range(4 * rounds + 1):
        plain, before = run()
        with attach(model, UseTaskTokens(tokens)):
            ours, after = run()
        if not torch.equal(before, after):
            raise AssertionError("task tokens that are not there change the logits")
        found.append((ours, plain))
    ours, plain = (statistics.median(column) for column in zip(*found[1:], strict=True))
    yield _cost(
        "task tokens, none there", f"a decoding step, {width} wide, {layers} layers", 1.03, ours, plain,
        statistics.median(o / p for o, p in found[1:]),
    )  # fmt: skip


@torch.no_grad()
def flow(rounds: int, clock: str, small: bool) -> Iterator[Record]:
    """Most bytes at once while a model runs with its flow attached, at two depths."""
    n, shallow = (24, 2) if small else (256, 4)
    ids, peaks = torch.randint(0, 50, (1, n)), {}
    for layers in (shallow, 4 * shallow):
        model, probe = _llama(32, layers, 8), Flow(heads="mean-max", regulariser="linear")
        with attach(model, probe):
            model(ids, use_cache=False)  # what is made once is made
            peaks[layers] = peak_bytes(partial(model, ids, use_cache=False))
    yield _cost(
        "attention flow, bytes", f"a quarter of its {4 * shallow} layers, {n} tokens", 1.1, peaks[4 * shallow],
        peaks[shallow], peaks[4 * shallow] / peaks[shallow], unit="bytes", maps=4 * n * n * 4 * 4 * shallow,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# READ and MapSAM


def loop_points(scores: Tensor, points: Tensor) -> Tensor:
    """:func:`attnlib.ops.points.continuous_points`, point by point over all pixels of a map (H, W)."""
    height, width = scores.shape
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    shares, moved = scores.flatten().softmax(0).view(height, width), []
    for x, y in points:
        weights = (-((xs - x) ** 2) - (ys - y) ** 2).exp() * shares
        moved.append(torch.stack([(weights * xs).sum(), (weights * ys).sum()]) / weights.sum())
    return torch.stack(moved)


def points(rounds: int, clock: str, small: bool) -> Iterator[Record]:
    """Thirty points that move with their map, with the gradient to it."""
    for height, width in ((24, 24),) if small else ((336, 336), (480, 640)):
        torch.manual_seed(0)
        scores = torch.rand(height, width, requires_grad=True)
        places = torch.rand(30, 2) * torch.tensor([width - 1.0, height - 1.0])

        def ours(s: Tensor = scores, p: Tensor = places) -> Tensor:
            out = continuous_points(s[None], p[None])[0]
            return torch.cat([out.detach().flatten(), torch.autograd.grad(out.square().sum(), s)[0].flatten()])

        def plain(s: Tensor = scores, p: Tensor = places) -> Tensor:
            out = loop_points(s, p)
            return torch.cat([out.detach().flatten(), torch.autograd.grad(out.square().sum(), s)[0].flatten()])

        apart = float((ours() - plain()).abs().max())
        taken = interleave({"ours": ours, "plain": plain}, rounds, clock)
        yield _gain(
            f"READ's points, {width} × {height}, with gradient", "a loop over points and all pixels", 5.0, taken,
            apart=apart,
        )  # fmt: skip


@torch.no_grad()
def mapsam(rounds: int, clock: str, small: bool) -> Iterator[Record]:
    """Eight images at once: the decoder, as the release loops over it, and the whole model."""
    hf = need("transformers", "the speed of MapSAM")
    side, count, width = (64, 2, 16) if small else (256, 8, 32)
    torch.manual_seed(0)
    sam = hf.SamModel(hf.SamConfig(
        vision_config=dict(hidden_size=width, num_attention_heads=2, num_hidden_layers=4, mlp_dim=2 * width,
                           image_size=side, patch_size=16, output_channels=width, num_pos_feats=width // 2,
                           global_attn_indexes=[1, 3], window_size=4),
        mask_decoder_config=dict(hidden_size=width, mlp_dim=2 * width, num_attention_heads=2,
                                 iou_head_hidden_dim=width),
        prompt_encoder_config=dict(hidden_size=width, image_size=side, patch_size=16),
    ))  # fmt: skip
    model: Any = MapSAM(sam).eval()
    images, decode, given = torch.rand(count, side, side, 3), model._decode, []

    def kept(*tensors: Tensor) -> Any:
        given.append(tensors)
        return decode(*tensors)

    model._decode = kept
    together = model(images).masks
    del model._decode
    parts = [tuple(t if len(t) != count else t[i : i + 1] for t in given[0]) for i in range(count)]
    one_by_one = torch.cat([model(image[None]).masks for image in images])
    apart = float((together - one_by_one).abs().max())
    for name, both in (
        ("decoder", {"ours": lambda: decode(*given[0]), "plain": lambda: [decode(*part) for part in parts]}),
        ("whole", {"ours": lambda: model(images), "plain": lambda: [model(image[None]) for image in images]}),
    ):
        yield _gain(
            f"MapSAM, {count} images, {name}", "one image at a time", 2.0, interleave(both, rounds, clock), apart=apart
        )


#: Every part, in the order of the table.
PARTS: dict[str, Callable[[int, str, bool], Iterator[Record]]] = {
    "magnifier": magnifier, "crops": crops, "ZoomEye": zoom_eye, "task tokens": task_tokens,
    "preferences": preferences, "flow": flow, "points": points, "MapSAM": mapsam,
}  # fmt: skip


def measure(rounds: int = 5, progress: Say | None = None, clock: str = "cpu", small: bool = False) -> dict[str, Any]:
    """Ratios of interleaved runs on one thread, and whether each keeps its bar.

    Args:
        rounds: of each pair, after one that does not count.
        progress: told what is being measured.
        clock: one of :data:`attnlib.bench.clock.CLOCKS`; processor time is fairer on a machine that does other work.
        small: tiny models and pictures, to see that all runs.

    Returns:
        Settings, machine with its load, and a record per pair.

    Raises:
        AssertionError: somebody who must give what the plain way gives does not.
    """
    records: list[Record] = []
    with limit_threads(1):
        told = machine()
        for name, part in PARTS.items():
            if progress is not None:
                progress(name)
            records += part(rounds, clock, small)
    settings = {"threads": 1, "clock": clock, "rounds": rounds, "dtype": "float32", "small": small}
    return {
        "what": "techniques on multimodal models beside the plain way: medians of ratios of interleaved runs",
        "settings": settings, "machine": told, "records": records,
    }  # fmt: skip


def table(records: list[Record]) -> str:
    """Rows of the page, from :func:`measure`'s records."""
    rows = ["| | beside | bar | measured | kept |", "|---|---|---|---|---|"]
    for r in records:
        cost = r["kind"] == "cost"
        rows.append(
            f"| {r['case']} | {r['against']} | {'≤' if cost else '≥'} {r['bar']:g} × | "
            f"{r['times']:.{2 if cost else 1}f} × | {'yes' if r['met'] else 'no'} |"
        )
    return "\n".join(rows)
