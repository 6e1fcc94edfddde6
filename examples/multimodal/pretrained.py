"""Is a small vision-language model of pretrained parts within reach of a CPU? DINOv2 looks, SmolLM2 answers.

    make models
    python examples/multimodal/pretrained.py --steps 150 --out benchmarks/results/pretrained-multimodal-cpu.json

DINOv2-small stays as it is; blocks of 2 x 2 of its patches become one token each through a small network, which is
learned, and SmolLM2-135M reads them before a question, with low-rank adapters in its attention. Questions are about
colours in generated scenes. What is measured is feasibility: seconds per step, memory, the curve of one short run, and
answers on scenes that were held out, beside answers to the same questions with the pictures of other scenes.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from attnlib.bench import models
from attnlib.bench.clock import machine
from attnlib.bench.data import scenes

SIDE, PATCH, BLOCK = 112, 14, 2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Pretrained(nn.Module):
    """A frozen vision tower, a projector, a language model with adapters.

    Args:
        tower: DINOv2.
        decoder: a causal language model.
        rank: of the adapters.
    """

    def __init__(self, tower: Any, decoder: Any, rank: int = 8):
        super().__init__()
        self.tower = tower.requires_grad_(False)
        wide, width = tower.config.hidden_size * BLOCK**2, decoder.config.hidden_size
        self.projector = nn.Sequential(nn.LayerNorm(wide), nn.Linear(wide, width), nn.GELU(), nn.Linear(width, width))
        self.scale = float(decoder.get_input_embeddings().weight.detach().float().std())
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        self.decoder = get_peft_model(decoder, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))

    def look(self, pixels: Tensor) -> Tensor:
        """(B, 3, SIDE, SIDE) to visual tokens (B, n, C) as the decoder reads them."""
        with torch.no_grad():
            patches = self.tower(pixel_values=pixels.to(self.tower.dtype)).last_hidden_state[:, 1:].float()
        side = SIDE // PATCH // BLOCK
        grid = patches.unflatten(1, (side, BLOCK, side, BLOCK)).permute(0, 1, 3, 2, 4, 5)
        tokens = self.projector(grid.flatten(1, 2).flatten(2))
        return F.layer_norm(tokens, tokens.shape[-1:]) * self.scale  # as large as words are

    def forward(self, pixels: Tensor, ids: Tensor, at: Tensor) -> Tensor:
        """(B, V) scores behind the token at place ``at`` (B,) of each row of ``ids`` (B, L), the picture before it."""
        visual = self.look(pixels)
        words = self.decoder.get_input_embeddings()(ids)
        whole = self.decoder.get_base_model()
        states = whole.model(inputs_embeds=torch.cat([visual.to(words), words], 1), use_cache=False).last_hidden_state
        return whole.lm_head(states[torch.arange(len(ids)), visual.shape[1] + at]).float()


def pictures(some: list[scenes.Scene]) -> Tensor:
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    images = torch.stack([s.image for s in some])
    images = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return (images - mean) / std


def drawn(first: int, count: int, part: str) -> list[tuple[scenes.Scene, scenes.Question]]:
    """Scenes with a question about a colour."""
    found: list[tuple[scenes.Scene, scenes.Question]] = []
    number = first
    while len(found) < count:
        scene = scenes.make_scene(number, part)
        asked = scenes.questions(scene, "colour")
        if asked:
            found.append((scene, asked[int(np.random.default_rng([number, 5]).integers(len(asked)))]))
        number += 1
    return found


def batch(tokenizer: Any, items: list[tuple[scenes.Scene, scenes.Question]]) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels, tokens padded on the right, and the place of each answer, a single token."""
    rows = []
    for _, question in items:
        text = f"Question: {question.text}\nAnswer: it is"
        answer = tokenizer(" " + question.answer.split()[-1], add_special_tokens=False)["input_ids"][:1]
        rows.append(tokenizer(text, add_special_tokens=False)["input_ids"] + answer)
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return pictures([scene for scene, _ in items]), ids, torch.tensor([len(row) - 1 for row in rows])


def answer_loss(model: Pretrained, given: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The loss of the answers, and which are right."""
    pixels, ids, at = given
    scores = model(pixels, ids, at - 1)
    wanted = ids[torch.arange(len(ids)), at]
    return F.cross_entropy(scores, wanted), scores.argmax(-1) == wanted


@torch.no_grad()
def right(model: Pretrained, tokenizer: Any, items: list[Any], size: int = 32) -> float:
    """Share of right answers."""
    model.eval()
    found = [answer_loss(model, batch(tokenizer, items[i : i + size]))[1] for i in range(0, len(items), size)]
    model.train()
    return float(torch.cat(found).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tested", type=int, default=128)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    decoder, tokenizer = models.load("smollm2-135m", dtype=torch.bfloat16)
    tower, _ = models.load("dinov2-small", dtype=torch.bfloat16)
    model = Pretrained(tower, decoder).train()
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=args.steps, pct_start=0.1)
    tested = drawn(0, args.tested, "test")
    before, losses, seconds = right(model, tokenizer, tested), [], []
    items = drawn(0, args.steps * args.batch, "train")
    for step in range(args.steps):
        started = time.perf_counter()
        loss, _ = answer_loss(model, batch(tokenizer, items[step * args.batch : (step + 1) * args.batch]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - started)
        if step % 10 == 9:
            print(f"step {step + 1}: loss {np.mean(losses[-10:]):.3f}, {np.median(seconds):.2f} s a step", flush=True)
    others = [(scene, question) for (scene, _), (_, question) in zip(tested[1:] + tested[:1], tested, strict=True)]
    result = {
        "what": "feasibility of a small vision-language model of pretrained parts on a CPU", "machine": machine(),
        "parts": [models.MODELS[n].title for n in ("dinov2-small", "smollm2-135m")], "steps": args.steps,
        "batch": args.batch, "visual_tokens": (SIDE // PATCH // BLOCK) ** 2, "learned": sum(p.numel() for p in learned),
        "seconds_per_step": round(float(np.median(seconds)), 3),
        "peak_MiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "loss_by_ten_steps": [round(float(np.mean(losses[i : i + 10])), 3) for i in range(0, args.steps, 10)],
        "right_before": before, "right": right(model, tokenizer, tested),
        "right_with_other_pictures": right(model, tokenizer, others), "tested": len(tested),
        "chance": 1 / len(scenes.COLOURS),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
