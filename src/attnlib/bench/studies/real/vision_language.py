"""Can a small vision-language model be trained here? A vision tower, a projector and a decoder with low-rank adapters.

``attnlib bench --suite real-vision-language --out benchmarks/results`` says what a step costs and how the loss falls in
one short run on generated scenes (:mod:`attnlib.bench.data.scenes`). It says nothing about what such a model can do:
that takes a run of hours. The model is an ordinary Llava of transformers: DINOv2 stays as it is, a projector of two
layers is new, and adapters of queries and values are all that is trained of the decoder.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ....extras import need
from ... import models
from ...clock import machine, now, peak_bytes
from ...data import scenes
from ...small import Progress, picture
from ._kept import Kept

QUESTION = "What does a training step of a small vision-language model cost, and does its loss fall?"
MODELS = ("dinov2-small", "smollm2-135m")

#: Pixels of a picture's side: a patch of a scene is a patch of the tower.
PATCH = 14


def build(vision: Any, decoder: Any, image_token: int, rank: int = 8, seed: int = 0) -> Any:
    """A Llava of a tower and a decoder, whose projector and adapters alone ask for gradients."""
    transformers: Any = need("transformers", "a vision-language model")
    peft: Any = need("peft", "low-rank adapters")
    config = transformers.LlavaConfig(
        vision_config=vision.config, text_config=decoder.config, image_token_id=image_token,
        image_token_index=image_token, vision_feature_layer=-1, vision_feature_select_strategy="default",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.LlavaForConditionalGeneration(config)
        model.model.vision_tower.load_state_dict(vision.state_dict())
        model.model.language_model.load_state_dict(decoder.base_model.state_dict())
        model.lm_head.load_state_dict(decoder.get_output_embeddings().state_dict())
        model.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(True)
        settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"])
        peft.inject_adapter_in_model(settings, model.model.language_model)
    return model


def batches(tokenizer: Any, image_token: int, size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Questions on scenes without end, padded on the right; only answers are labels."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    rng, number = np.random.default_rng(seed), 0

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    while True:
        pictures: list[scenes.Scene] = []
        rows: list[list[int]] = []
        answers: list[int] = []
        while len(rows) < size:
            scene = scenes.make_scene(seed * 100_000 + number)
            number += 1
            for question in scenes.ask(scene, rng, 1):  # there may be nothing of the kind to ask
                asked = [*[image_token] * scenes.PATCHES, *ids(f"{question.text}\n")]
                said = ids(question.answer + "\n")
                pictures.append(scene)
                rows.append(asked + said)
                answers.append(len(said))
        longest = max(map(len, rows))
        tokens = torch.full((size, longest), pad)
        labels, there = torch.full_like(tokens, -100), torch.zeros_like(tokens)
        for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
            tokens[i, : len(row)], there[i, : len(row)] = torch.tensor(row), 1
            labels[i, len(row) - answer : len(row)] = torch.tensor(row[-answer:])
        side = scenes.SIDE // scenes.PATCH * PATCH
        pixels = nn.functional.interpolate(scenes.pixel_values(pictures), (side, side), mode="bilinear")
        yield {"input_ids": tokens, "attention_mask": there, "labels": labels, "pixel_values": pixels}


def run(model: Any, given: Iterator[dict[str, Tensor]], steps: int, lr: float) -> dict[str, Any]:
    """Losses, processor seconds of a step, and the most bytes that live at once in one."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    losses, seconds = [], []
    model.train()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**next(given)).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))

    for _ in range(steps):
        start = now("cpu")
        step()
        seconds.append(now("cpu") - start)
    peak = peak_bytes(step)
    return {
        "losses": losses[:steps], "step_s": sorted(seconds)[len(seconds) // 2], "step_peak_bytes": peak,
        "trained": sum(p.numel() for p in trained), "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 30,
    size: int = 4,
    rank: int = 8,
    lr: float = 1e-3,
    seeds: Sequence[int] = (0,),
) -> dict[str, Any]:
    """Cost of a step, and one short run's curve per seed.

    Args:
        progress: told of every run.
        keep: a file that takes every run, and from which a later call goes on.
        pictures: folder for ``real-vision-language-cpu.svg``.
        steps: of a run.
        size: questions of a step.
        rank: of the adapters.
        lr: learning rate.
        seeds: of scenes and of what is new.

    Returns:
        Plain values, for JSON.
    """
    kept = Kept(keep, (steps, size, rank, lr), progress)

    def one(seed: int) -> dict[str, Any]:
        vision, _ = models.load("dinov2-small")
        decoder, tokenizer = models.load("smollm2-135m")
        token = decoder.config.vocab_size - 1  # of no meaning in what is asked here
        model = build(vision, decoder, token, rank, seed)
        return run(model, batches(tokenizer, token, size, seed), steps, lr)

    runs = {str(seed): kept(f"seed {seed}", functools.partial(one, seed)) for seed in seeds}
    result = {
        "what": QUESTION, "machine": machine(), "models": [models.title(name) for name in MODELS], "steps": steps,
        "questions of a step": size, "rank": rank, "lr": lr, "clock": "cpu", "seeds of runs": runs,
    }  # fmt: skip
    if pictures is not None:
        curves = {f"seed {s}": [(i + 1, loss, None) for i, loss in enumerate(r["losses"])] for s, r in runs.items()}
        picture(Path(pictures) / "real-vision-language-cpu.svg", curves, "step", "loss of the answer, nats per token",
                "DINOv2-small, projector, SmolLM2 with adapters: one short run")  # fmt: skip
    return result
