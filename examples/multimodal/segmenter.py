"""Train the small promptable segmenter, transformers' ``SamModel``, on generated pictures.

    python examples/multimodal/segmenter.py --out examples/multimodal/segmenter --minutes 10

Prompts in turn: one click, a box, clicks on and off the thing, many of them with a box, a click with a rough mask. Of
the three masks that answer a prompt the best learns most; what each is worth is learnt beside. Half of the pictures are
painted scenes, half those of the small multimodal model.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlib.bench.worlds.segmenter import MEAN, SIDE, STD, Sight, box_of, build, load, sights
from attnlib.look.segment import Segmenter

KINDS = ("click", "box", "click", "both", "many", "mask")


def draw(mask: Tensor, count: int, g: torch.Generator) -> Tensor:
    """(count, 2) x, y of pixels of a mask."""
    cells = mask.flatten().nonzero()[:, 0]
    picked = cells[torch.randint(len(cells), (count,), generator=g)]
    return torch.stack([picked % SIDE, picked // SIDE], 1) + 0.5


def prompts(masks: Tensor, kind: str, g: torch.Generator) -> dict[str, Tensor]:
    """Prompts of one kind for masks (B, P, 64, 64)."""
    flat = masks.flatten(0, 1)
    shape = masks.shape[:2]
    on, off = {"click": (1, 0), "box": (0, 0), "both": (1, 1), "many": (4, 4), "mask": (1, 1)}[kind]
    given: dict[str, Tensor] = {}
    if on:
        points = [torch.cat([draw(m, on, g), draw(~m, off, g)]) if off else draw(m, on, g) for m in flat]
        given["input_points"] = torch.stack(points).unflatten(0, shape)
        given["input_labels"] = torch.tensor([1] * on + [0] * off).expand(*shape, on + off)
    if kind in ("box", "many"):
        boxes = torch.stack([box_of(m) for m in flat])
        jitter = 3.0 * torch.rand(boxes.shape, generator=g) - 1.5
        given["input_boxes"] = (boxes + jitter).clamp(0, SIDE).unflatten(0, shape)
    return given


def rough(masks: Tensor, g: torch.Generator) -> Tensor:
    """Masks (B, 64, 64) as a decoder might have given them: moved, and grown or not."""
    moved = torch.stack(
        [torch.roll(m, torch.randint(-2, 3, (2,), generator=g).tolist(), (0, 1)) for m in masks.float()]
    )
    if torch.rand((), generator=g) < 0.5:
        moved = F.max_pool2d(moved[:, None], 3, 1, 1)[:, 0]
    return (moved - 0.5) * 12


def losses(logits: Tensor, scores: Tensor, masks: Tensor) -> Tensor:
    """Of masks (B, P, M, 64, 64) and what the model says of them (B, P, M)."""
    true = masks[:, :, None].float().expand_as(logits)
    bce = F.binary_cross_entropy_with_logits(logits, true, reduction="none").mean((-2, -1))
    p = logits.sigmoid()
    dice = 1 - (2 * (p * true).sum((-2, -1)) + 1) / (p.sum((-2, -1)) + true.sum((-2, -1)) + 1)
    each = 10 * bce + dice
    with torch.no_grad():
        inside = logits > 0
        union = (inside | (true > 0)).sum((-2, -1)).clamp(min=1)
        iou = (inside & (true > 0)).sum((-2, -1)) / union
    return each.amin(-1).mean() + 0.2 * each.mean() + 0.5 * F.mse_loss(scores, iou)


@torch.no_grad()
def judged(model: torch.nn.Module, some: list[Sight], g: torch.Generator) -> dict[str, float]:
    """Mean overlap from one click and from a box."""
    segmenter, found = Segmenter(model, MEAN, STD), {"click": 0.0, "box": 0.0}
    total = 0
    for sight in some:
        predict = segmenter(sight.image.permute(1, 2, 0))
        for mask in sight.masks:
            for kind in found:
                out = predict(draw(mask, 1, g), torch.ones(1)) if kind == "click" else predict(box=box_of(mask))
                best = out.logits[int(out.scores.argmax())] > 0
                found[kind] += float((best & mask).sum() / (best | mask).sum())
            total += 1
    return {kind: value / total for kind, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("segmenter"))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--pictures", type=int, default=3000, help="of each world")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="folder of a trained one to go on from")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    g = torch.Generator().manual_seed(args.seed)
    pool = [s for world in ("painted", "scenes") for s in sights(world, range(args.pictures)) if len(s.masks)]
    images = torch.stack([s.image for s in pool])
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    images = (images - mean) / std
    dev = [s for world in ("painted", "scenes") for s in sights(world, range(30), "dev") if len(s.masks)]
    model = (build(args.seed) if args.start is None else load(args.start)).train()
    for part in (model.shared_image_embedding, model.prompt_encoder.shared_embedding):
        part.positional_embedding.requires_grad_(False)
    print(sum(p.numel() for p in model.parameters()), "parameters,", len(pool), "pictures", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    began, spent, step = time.time(), 0.0, 0
    while step < args.steps and spent < 1:
        # The rate falls with what is used up sooner: steps or time.
        spent = max(step / args.steps, (time.time() - began) / (60 * args.minutes))
        rate = args.lr * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * min(spent, 1.0)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = torch.randint(len(pool), (args.batch,), generator=g).tolist()
        picked = [[int(i) for i in torch.randint(len(pool[r].masks), (2,), generator=g)] for r in rows]
        masks = torch.stack([pool[r].masks[p] for r, p in zip(rows, picked, strict=True)])
        flip = bool(torch.rand((), generator=g) < 0.5)
        pixels = images[rows].flip(-1) if flip else images[rows]
        masks = masks.flip(-1) if flip else masks
        kind = KINDS[step % len(KINDS)]
        if kind == "mask":
            masks = masks[:, :1]
        given = prompts(masks, kind, g)
        if kind == "mask":
            given["input_masks"] = rough(masks[:, 0], g)[:, None]
        out = model(pixel_values=pixels, multimask_output=True, **given)
        loss = losses(out.pred_masks, out.iou_scores, masks)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            said = ""
            if step % 400 == 0:
                said = str({k: round(v, 3) for k, v in judged(model.eval(), dev, g).items()})
                model.train()
            print(f"{step} {float(loss.detach()):.3f} {time.time() - began:.0f} s {said}", flush=True)
    print(step, judged(model.eval(), dev, g), f"{time.time() - began:.0f} s", flush=True)
    model.half().save_pretrained(args.out)


if __name__ == "__main__":
    main()
