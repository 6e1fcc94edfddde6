"""Train the small generators of painted scenes; each is planned for at most two hours of one core.

    python examples/diffusion/train.py scenes clip vae unet dit sd3 pixel --work diffusion-checkpoints

Parts are trained in the order in which they are named: ``clip`` on captions, whose text tower conditions the others;
``vae``; on its latents ``unet``, ``sd3`` and the class-conditional ``dit``; ``pixel`` on pictures of 32 x 32 pixels.
``scenes`` paints what clip and vae see; the generators see plain scenes, one or two large geometric things without
texture on paper or slate (``painter.sample(..., plain=True)``). Started again, training goes on from the last
checkpoint. Trained parts go to ``--out`` in half precision, where ``attnlib.bench.worlds.models.pipeline`` finds them.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from attnlib.bench.worlds import models, painter

OMIT = 1 / 3  # of training captions leave out an attribute
DROP = 0.1  # of captions are left out, for guidance
#: Steps, batch, learning rate.
PLANS = {
    "clip": (1300, 128, 2e-3), "vae": (3000, 8, 2e-3), "unet": (4100, 64, 1.5e-3), "dit": (3000, 32, 1e-3),
    "sd3": (5000, 32, 1e-3), "pixel": (3000, 32, 1.5e-3),
}  # fmt: skip


class Pictures:
    """Painted training scenes on disk: (n, 64, 64, 4) bytes, red, green, blue and what things cover.

    Args:
        folder: where they are kept.
        count: how many.
        plain: of the plain world, which generators see.
    """

    def __init__(self, folder: Path, count: int, plain: bool = False) -> None:
        self.path, self.count = folder / f"{'plain' if plain else 'scenes'}.npy", count
        self.scenes = painter.sample(count, plain=plain)

    def paint(self) -> None:
        """Paint those that are not there yet."""
        made = self.path.with_suffix(".done")
        if made.exists() and int(made.read_text()) == self.count:
            return
        out = np.lib.format.open_memmap(self.path, "w+", np.uint8, (self.count, painter.SIDE, painter.SIDE, 4))
        began = time.time()
        for i in range(0, self.count, 1024):
            done = painter.paint(self.scenes[i : i + 1024])
            both = torch.cat([done.images, done.masks.sum(1, keepdim=True)], 1)
            out[i : i + 1024] = (both * 255).round().byte().permute(0, 2, 3, 1).numpy()
            print(f"scenes: {i + len(both)} of {self.count}, {time.time() - began:.0f} s", flush=True)
        out.flush()
        made.write_text(str(self.count))

    def read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, 64, 64) in [-1, 1] and covers (B, 1, 64, 64)."""
        held = np.load(self.path, mmap_mode="r")
        both = torch.from_numpy(held[rows.numpy()]).permute(0, 3, 1, 2).float() / 255
        return both[:, :3] * 2 - 1, both[:, 3:]

    def texts(self, rows: Tensor, epoch: int, drop: float = 0.0, generator: torch.Generator | None = None) -> list[str]:
        """Captions, other ones in every epoch."""
        said = painter.captions(self.scenes[rows], OMIT, epoch, rows)
        silent = torch.rand(len(rows), generator=generator) < drop
        return ["" if s else p.text for p, s in zip(said, silent.tolist(), strict=True)]


class Both(nn.Module):
    """A U-Net and the tower that reads its prompts."""

    def __init__(self, unet: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.unet, self.text = unet, text


class Average(nn.Module):
    """Moving average of weights, kept in checkpoints."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay, self.held = decay, {k: v.detach().clone().float() for k, v in model.state_dict().items()}
        self.taken = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.taken += 1
        decay = min(self.decay, (1 + self.taken) / (10 + self.taken))
        state = model.state_dict()
        torch._foreach_lerp_(list(self.held.values()), [state[k].float() for k in self.held], 1 - decay)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return {"held": self.held, "taken": self.taken}

    def load_state_dict(self, state: dict[str, Any], *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        self.held, self.taken = state["held"], state["taken"]


def keep(name: str, model: Any, out: Path) -> None:
    """Write a part in half precision."""
    import copy

    half = copy.deepcopy(model).eval().half()
    half.save_pretrained(str(out / name))
    config = out / name / "config.json"
    kept = json.loads(config.read_text(encoding="utf-8"))
    kept.pop("_name_or_path", None)  # where it was loaded from
    config.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def train(
    name: str,
    model: Any,
    loss: Callable[[Any, Tensor, int, torch.Generator, float], Tensor],
    count: int,
    work: Path,
    out: Path,
    plan: tuple[int, int, float],
    seed: int = 0,
    decay: float = 0.998,
    every: int = 250,
    snapshots: bool = False,
) -> None:
    """Train one part with AdamW, a short warm-up and a cosine.

    Args:
        name: of the part.
        model: what is trained.
        loss: of the model, numbers of scenes, the epoch, a generator and the share of steps taken.
        count: scenes.
        work: folder of checkpoints.
        out: folder of finished parts.
        plan: steps, batch, learning rate.
        seed: of weights and batches.
        decay: of the average of weights that is kept.
        every: steps between checkpoints.
        snapshots: also keep the average at every checkpoint in ``work/snapshots``.
    """
    steps, batch, rate = plan
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    model = model.to(memory_format=torch.channels_last).train()
    groups = []
    for part, share in ((model.unet, 1.0), (model.text, 0.2)) if isinstance(model, Both) else ((model, 1.0),):
        trained = [p for p in part.parameters() if p.requires_grad]
        groups += [
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0, "lr": share * rate},
            {"params": [p for p in trained if p.dim() >= 2], "weight_decay": 0.01, "lr": share * rate},
        ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    warm = max(1, min(200, steps // 10))

    def slope(step: int) -> float:
        return min(1.0, (step + 1) / warm) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1, step / steps))))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, slope)
    average = Average(model, decay)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    accelerator.register_for_checkpointing(average)
    folder, taken = work / name, 0
    if (folder / "taken.json").exists():
        accelerator.load_state(str(folder))
        taken = json.loads((folder / "taken.json").read_text())["steps"]
        accelerator.print(f"{name}: going on from step {taken}")
    told, began, first = 0.0, time.time(), taken
    while taken < steps:
        generator = torch.Generator().manual_seed(1_000_003 * seed + 97 * taken + accelerator.process_index)
        rows = torch.randint(count, (batch,), generator=generator)
        value = loss(model, rows, taken * batch // count, generator, taken / steps)
        accelerator.backward(value)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(accelerator.unwrap_model(model))
        taken += 1
        told = float(value.detach()) if not told else 0.97 * told + 0.03 * float(value.detach())
        if taken % 50 == 0 or taken == steps:
            each = (time.time() - began) / (taken - first)
            left = each * (steps - taken) / 60
            line = f"{name}: step {taken} of {steps}, loss {told:.4f}, {each:.3f} s each, {left:.1f} min left"
            accelerator.print(line, flush=True)
        if taken % every == 0 or taken == steps:
            accelerator.save_state(str(folder))
            if accelerator.is_main_process:
                (folder / "taken.json").write_text(json.dumps({"steps": taken}))
                plain = accelerator.unwrap_model(model)
                last = {k: v.clone() for k, v in plain.state_dict().items()}
                plain.load_state_dict(average.held)
                for part, of in (("unet", plain.unet), ("text", plain.text)) if name == "unet" else ((name, plain),):
                    if snapshots or taken == steps:
                        keep(part, of, out if taken == steps else work / "snapshots")
                plain.load_state_dict(last)


# --------------------------------------------------------------------------------------------------------------------
# Losses


def clip_loss(pictures: Pictures) -> Callable[..., Tensor]:
    def loss(model: Any, rows: Tensor, epoch: int, g: torch.Generator, share: float) -> Tensor:
        images, _ = pictures.read(rows)
        ids = models.token_numbers(pictures.texts(rows, epoch, generator=g), 28)
        out = model(input_ids=ids, pixel_values=images)
        same = (ids[:, None] == ids[None]).all(-1).float()  # the same words are right for each other's pictures
        same = same / same.sum(1, keepdim=True)
        return (F.cross_entropy(out.logits_per_text, same) + F.cross_entropy(out.logits_per_image, same)) / 2

    return loss


def vae_loss(pictures: Pictures) -> Callable[..., Tensor]:
    """Three quarters of the time on quarters of pictures around a thing, then on whole ones."""
    scenes, half = pictures.scenes, painter.SIDE // 2

    def loss(model: Any, rows: Tensor, epoch: int, g: torch.Generator, share: float) -> Tensor:
        if share < 0.75:
            rows = torch.randint(pictures.count, (4 * len(rows),), generator=g)
        images, covers = pictures.read(rows)
        if share < 0.75:
            slot = (torch.rand(len(rows), generator=g) * scenes.count[rows]).long()
            at = torch.stack([scenes.y[rows, slot], scenes.x[rows, slot]], -1)
            at = (at - half / 2 + 16 * (torch.rand(len(rows), 2, generator=g) - 0.5)).long().clamp(0, half)
            both = torch.cat([images, covers], 1)
            both = torch.stack([p[:, y : y + half, x : x + half] for p, (y, x) in zip(both, at.tolist(), strict=True)])
            images, covers = both[:, :3], both[:, 3:]
        images = images.contiguous(memory_format=torch.channels_last)
        found = model.encode(images).latent_dist
        off = model.decode(found.sample(generator=g)).sample - images
        weight = 1 + 2 * covers
        return (
            (weight * off.abs()).mean()
            + 2 * (weight * off.square()).mean()
            + 1e-3 * found.kl().mean() / found.mean[0].numel()
        )

    return loss


@torch.no_grad()
def latents(pictures: Pictures, vae: Any, work: Path) -> Tensor:
    """(n, 4, 16, 16) means of every scene's latents, half precision, scaled to a standard deviation of one."""
    path = work / f"latents-{pictures.path.stem}-{pictures.count}.pt"
    if not path.exists():
        parts = []
        for i in range(0, pictures.count, 256):
            images = painter.paint(pictures.scenes[i : i + 256]).images * 2 - 1
            parts.append(vae.encode(images.contiguous(memory_format=torch.channels_last)).latent_dist.mean.half())
            if i % 5120 == 0:
                print(f"latents: {i} of {pictures.count}", flush=True)
        torch.save(torch.cat(parts), path)
    return torch.load(path) * vae.config.scaling_factor


def noised(x: Tensor, g: torch.Generator, schedule: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noised x, times, velocities and the weight of each row: min-SNR with 5, for velocities."""
    import diffusers

    if schedule == "latent":
        plan = diffusers.DDIMScheduler(**models.NOISE)
    else:
        plan = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    b = len(x)
    t = (torch.rand(b, generator=g) + torch.arange(b)) / b  # spread over the batch
    t = (t * 1000).long().clamp(max=999)
    noise = torch.randn(x.shape, generator=g)
    a = plan.alphas_cumprod[t].view(-1, 1, 1, 1)
    snr = a / (1 - a)
    weight = snr.clamp(max=5.0) / (snr + 1)
    if schedule == "pixel":  # the noise is predicted
        weight = snr.clamp(max=5.0) / snr
        return a.sqrt() * x + (1 - a).sqrt() * noise, t, noise, weight
    return a.sqrt() * x + (1 - a).sqrt() * noise, t, a.sqrt() * noise - (1 - a).sqrt() * x, weight


def unet_loss(pictures: Pictures, held: Tensor) -> Callable[..., Tensor]:
    """First shapes are learnt, then what of them the text says, at last the tower reads for its U-Net alone.

    The CLIP's tower tells colours apart, but circles hardly from squares.
    """

    def loss(model: Any, rows: Tensor, epoch: int, g: torch.Generator, share: float) -> Tensor:
        with torch.set_grad_enabled(share >= 0.549):
            states = model.text(models.token_numbers(pictures.texts(rows, epoch, DROP, g)))[0]
        x, t, wanted, weight = noised(held[rows].float(), g, "latent")
        if share >= 0.427:  # where little of a picture shows, what is drawn is up to the text
            weight = torch.full_like(weight, 0.5)
        x = x.contiguous(memory_format=torch.channels_last)
        return (weight * (model.unet(x, t, states).sample - wanted).square()).mean() / 0.5

    return loss


def pixel_loss(pictures: Pictures, text: Any) -> Callable[..., Tensor]:
    def loss(model: Any, rows: Tensor, epoch: int, g: torch.Generator, share: float) -> Tensor:
        with torch.no_grad():
            states = text(models.token_numbers(pictures.texts(rows, epoch, DROP, g), models.POSITIONS))[0]
        images = F.avg_pool2d(painter.paint(pictures.scenes[rows]).images * 2 - 1, 2)
        x, t, wanted, weight = noised(images, g, "pixel")
        out = model(x.contiguous(memory_format=torch.channels_last), t, states).sample
        # The second half says nothing of variances: it is held at -1, the smaller of the two that are possible.
        return (weight * (out[:, :3] - wanted).square()).mean() + 0.01 * (out[:, 3:] + 1).square().mean()

    return loss


def dit_loss(held: Tensor, labels: Tensor) -> Callable[..., Tensor]:
    def loss(model: Any, rows: Tensor, epoch: int, g: torch.Generator, share: float) -> Tensor:
        x, t, wanted, weight = noised(held[rows].float(), g, "latent")
        silent = torch.rand(len(rows), generator=g) < DROP
        of = labels[rows].masked_fill(silent, model.config.num_embeds_ada_norm)
        return (weight * (model(x, t, of).sample - wanted).square()).mean() / 0.5

    return loss


def sd3_states(texts: list[str], tower: Any) -> tuple[Tensor, Tensor]:
    """What the pipeline gives: both towers side by side and one row of zeros, and both pooled."""
    out = tower(models.token_numbers(texts), output_hidden_states=True)
    states = torch.cat([out.hidden_states[-2]] * 2, -1)
    return torch.cat([states, torch.zeros_like(states[:, :1])], 1), torch.cat([out.text_embeds] * 2, -1)


def sd3_loss(pictures: Pictures, held: Tensor, tower: Any) -> Callable[..., Tensor]:
    def loss(model: Any, rows: Tensor, epoch: int, g: torch.Generator, share: float) -> Tensor:
        with torch.no_grad():
            states, pooled = sd3_states(pictures.texts(rows, epoch, DROP, g), tower)
        x = held[rows].float()
        s = torch.sigmoid(torch.randn(len(x), generator=g)).view(-1, 1, 1, 1)
        noise = torch.randn(x.shape, generator=g)
        out = model((1 - s) * x + s * noise, states, pooled, 1000 * s.flatten()).sample
        return (out - (noise - x)).square().mean()

    return loss


# --------------------------------------------------------------------------------------------------------------------


def run(name: str, args: argparse.Namespace) -> None:
    """Train one part."""
    pictures = Pictures(args.work, args.scenes, plain=name not in ("scenes", "clip", "vae"))
    if name == "scenes":
        return pictures.paint()
    plan = PLANS[name]
    if args.steps:
        plan = (args.steps, *plan[1:])
    if args.batch:
        plan = (plan[0], args.batch, plan[2])
    set_seed(args.seed)
    model: Any = models.build(name)
    print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    common: dict[str, Any] = dict(work=args.work, out=args.out, plan=plan, seed=args.seed, snapshots=args.snapshots)
    if name == "clip":
        train(name, model, clip_loss(pictures), args.scenes, **common)
    elif name == "vae":
        train(name, model, vae_loss(pictures), args.scenes, **common)
        vae = models.part("vae", args.out)
        with torch.no_grad():
            images, _ = pictures.read(torch.arange(min(256, pictures.count)))
            spread = float(vae.encode(images).latent_dist.mean.std())
        vae.register_to_config(scaling_factor=round(1 / spread, 4))
        keep(name, vae, args.out)
    elif name == "pixel":
        text = models.text_encoder(args.out)
        train(name, model, pixel_loss(pictures, text), args.scenes, **common)
    else:
        held = latents(pictures, models.part("vae", args.out), args.work)
        if name == "unet":
            both = Both(model, models.text_encoder(args.out))
            train(name, both, unet_loss(pictures, held), args.scenes, **common)
        elif name == "sd3":
            tower = models.text_encoder(args.out, projected=True)
            train(name, model, sd3_loss(pictures, held, tower), args.scenes, **common)
        else:
            s = pictures.scenes
            alone = (s.count == 1) & (s.shape[:, 0] < painter.CREATURE)
            held, labels = held[alone], (8 * s.shape[:, 0] + s.colour[:, 0])[alone]
            train(name, model, dit_loss(held, labels), len(held), **common)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=("scenes", *PLANS), help="what to make, in this order")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "weights", help="folder of trained parts")
    parser.add_argument("--work", type=Path, default=Path("diffusion-checkpoints"), help="scenes and checkpoints")
    parser.add_argument("--scenes", type=int, default=60_000)
    parser.add_argument("--steps", type=int, help="instead of each part's own number")
    parser.add_argument("--batch", type=int, help="instead of each part's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--snapshots", action="store_true", help="keep the averaged weights at every checkpoint")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    for name in args.parts:
        run(name, args)


if __name__ == "__main__":
    main()
