"""Train the small multimodal model on generated scenes: its sight first, then what it answers.

    python examples/multimodal/train.py --out examples/multimodal/weights

First the vision tower (CLIP's, from transformers) and the projector learn to name what fills each patch, and which
patch it is, in the language model's own word vectors; the class token learns which things are there. Then the decoder
learns to answer, twenty-two questions to a picture: they share the picture's tokens and do not see each other, so that
each is read as it is when the model is used; the tower goes on at a tenth of the rate. Of an answer the words that tell
count, those of its template hardly.

Both stages stop on scenes of the part "dev", show their progress, and go on from their checkpoint when started again
with the same --work folder.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from attnlib.bench.data import scenes
from attnlib.steer import NullImage

VISION = dict(
    hidden_size=96, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, image_size=scenes.SIDE,
    patch_size=scenes.PATCH, projection_dim=96,
)  # fmt: skip
TEXT = dict(
    hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4,
    max_position_embeddings=512, tie_word_embeddings=False, initializer_range=0.06,
)  # fmt: skip
FEATURE_LAYER = -2
#: Tokens before the questions; questions besides the list of everything; room for a list and for any other question.
PREFIX, QUESTIONS = 1 + scenes.PATCHES, 21
LIST_ROOM, ROOM = 22, 11
#: Weight of the words that every answer of its kind has.
TEMPLATE = {"it": 0.1, "is": 0.1, "in": 0.1, "there": 0.1, "are": 0.1, ",": 0.3, "</s>": 0.3}
#: A list tells as much as several other answers; where a thing is, is learnt last.
KIND_WEIGHTS = {"list": 3.0, "position": 2.0}
#: Kinds in turn until the easy ones are learnt, then how many of each are asked first; the rest is filled up.
EVEN_UNTIL = 500
MIX = {"list": 1, "digit": 1, "colour": 1, "count": 2, "presence": 4, "position": 6, "content": 9}
FIRST_WORDS = (*scenes.COLOURS, "digit", "nothing")
SECOND_WORDS = (*scenes.SHAPES, *map(str, range(10)), "nothing")


# --------------------------------------------------------------------------------------------------------------------
# Examples


def fills(scene: scenes.Scene) -> tuple[Tensor, Tensor]:
    """Numbers of the first and second word of what fills each patch, both (64,); a digit fills one of its cell."""
    side, per = scenes.SIDE // scenes.PATCH, scenes.CELL // scenes.PATCH
    first = torch.full((side, side), FIRST_WORDS.index("nothing"))
    second = torch.full((side, side), SECOND_WORDS.index("nothing"))
    for thing in scene.things:
        a, b = thing.name.split()
        top, left = thing.cell // scenes.GRID * per, thing.cell % scenes.GRID * per
        rows, columns = slice(top, top + per), slice(left, left + per)
        if a == "digit":
            top, left = top + thing.sample // 2 % 2, left + thing.sample % 2
            rows, columns = slice(top, top + 1), slice(left, left + 1)
        first[rows, columns], second[rows, columns] = FIRST_WORDS.index(a), SECOND_WORDS.index(b)
    return first.flatten(), second.flatten()


def pictures(drawn: list[scenes.Scene]) -> dict[str, Tensor]:
    """Pictures, what fills their patches, and which things they hold."""
    first, second = zip(*map(fills, drawn), strict=True)
    held = [[float(name in scene.names) for name in scenes.NAMES] for scene in drawn]
    return {
        "pixel_values": scenes.pixel_values(drawn), "first": torch.stack(first), "second": torch.stack(second),
        "held": torch.tensor(held),
    }  # fmt: skip


class Words:
    """Conversations as numbers: the list of everything, then :data:`QUESTIONS` others, each in its own room."""

    def __init__(self, tokenizer: Any):
        self.ids = tokenizer.get_vocab()
        self.weights = torch.ones(len(self.ids))
        for word, weight in TEMPLATE.items():
            self.weights[self.ids[word]] = weight

    def _rows(self, asked: list[scenes.Question], room: int) -> tuple[Tensor, Tensor, Tensor]:
        given = torch.zeros(len(asked), room, dtype=torch.long)
        wanted, weights = given.clone(), torch.zeros(len(asked), room)
        for i, question in enumerate(asked):
            before = [self.ids[word] for word in f"<q> {question.text} <a>".split()]
            row = torch.tensor(before + [self.ids[word] for word in f"{question.answer} </s>".split()])
            given[i, : len(row) - 1], wanted[i, : len(row) - 1] = row[:-1], row[1:]
            weights[i, len(before) - 1 : len(row) - 1] = self.weights[row[len(before) :]]
        each = torch.tensor([KIND_WEIGHTS.get(question.kind, 1.0) for question in asked])
        return given, wanted, each[:, None] * weights / weights.sum(-1, keepdim=True)

    def __call__(
        self, drawn: list[scenes.Scene], rngs: Iterable[np.random.Generator], even: bool = True
    ) -> dict[str, Any]:
        given, wanted, weights, kinds = [], [], [], []
        for scene, rng in zip(drawn, rngs, strict=True):
            asked = scenes.ask(scene, rng, (1 if even else 2) * (QUESTIONS + 1))
            if not even:
                left = dict(MIX)
                first: list[scenes.Question] = []
                for question in asked:
                    left[question.kind] -= 1
                    if left[question.kind] >= 0:
                        first.append(question)
                asked = [*first, *(q for q in asked if q not in first)][: QUESTIONS + 1]
            lists = [q for q in asked if q.kind == "list"]
            others = [q for q in asked if q.kind != "list"]
            pairs = zip(self._rows(lists, LIST_ROOM), self._rows(others, ROOM), strict=True)
            a, b, c = (torch.cat([x.flatten(), y.flatten()]) for x, y in pairs)
            given.append(a)
            wanted.append(b)
            weights.append(c)
            kinds.append([q.kind for q in others])
        return {
            "given": torch.stack(given), "wanted": torch.stack(wanted), "weights": torch.stack(weights), "kinds": kinds
        }  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Attention of a picture and questions that do not see each other


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None,
    scaling: float | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention where a question reads the picture and itself: a quarter of the scores of one long sequence."""
    groups, scale = key.shape[1], query.shape[-1] ** -0.5 if scaling is None else scaling
    k0, v0 = key[:, :, :PREFIX], value[:, :, :PREFIX]
    out = [
        F.scaled_dot_product_attention(query[:, :, :PREFIX], k0, v0, is_causal=True, scale=scale, enable_gqa=True)
    ]  # fmt: skip
    start = PREFIX
    for count, room in ((1, LIST_ROOM), (QUESTIONS, ROOM)):
        here = slice(start, start + count * room)
        start += count * room
        q = (query[:, :, here] * scale).unflatten(1, (groups, -1)).unflatten(3, (count, room))  # B G R n l D
        k, v = (t[:, :, here].unflatten(2, (count, room)) for t in (key, value))  # B G n l D
        far = (q.flatten(2, 4) @ k0.mT).unflatten(2, q.shape[2:5])
        near = (q.transpose(2, 3).flatten(3, 4) @ k.mT).unflatten(3, (q.shape[2], room)).transpose(2, 3)
        later = torch.full((room, room), -1e9, dtype=near.dtype).triu(1)
        weights = torch.cat([far, near + later], -1).softmax(-1)
        a, b = weights[..., :PREFIX], weights[..., PREFIX:]
        from_picture = (a.flatten(2, 4) @ v0).unflatten(2, q.shape[2:5])
        from_question = (b.transpose(2, 3).flatten(3, 4) @ v).unflatten(3, (q.shape[2], room)).transpose(2, 3)
        out.append((from_picture + from_question).flatten(1, 2).flatten(2, 3))
    return torch.cat(out, 2).transpose(1, 2), None


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", lambda *args, **kwargs: None)
POSITIONS = torch.cat(
    [torch.arange(PREFIX), PREFIX + torch.arange(LIST_ROOM), (PREFIX + torch.arange(ROOM)).repeat(QUESTIONS)]
)


# --------------------------------------------------------------------------------------------------------------------
# Losses


class Learner(nn.Module):
    """The model, what is learnt beside it, and its losses."""

    def __init__(self, llava: LlavaForConditionalGeneration, tokenizer: Any):
        super().__init__()
        self.llava, self.null = llava, NullImage(scenes.PATCHES, TEXT["hidden_size"], prob=0.06)
        self.from_class = nn.Linear(VISION["hidden_size"], len(scenes.NAMES))
        self.words = {
            name: torch.tensor([tokenizer.convert_tokens_to_ids(word) for word in words])
            for name, words in (("first", FIRST_WORDS), ("second", SECOND_WORDS), ("place", scenes.PLACES))
        }
        side, per = scenes.SIDE // scenes.PATCH, scenes.CELL // scenes.PATCH
        grid = torch.arange(side) // per
        self.register_buffer("place", (grid[:, None] * scenes.GRID + grid).flatten(), persistent=False)
        self.bos = tokenizer.bos_token_id

    def look(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Projected patches (B, 64, C) and the class token."""
        out = self.llava.model.vision_tower(pixel_values, output_hidden_states=True)
        features = out.hidden_states[FEATURE_LAYER][:, 1:]
        return self.llava.model.multi_modal_projector(features), out.pooler_output

    def naming(self, seen: Tensor, first: Tensor, second: Tensor, **_: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Each projected patch lies near the words for what fills it and near the name of its place."""
        table = F.normalize(self.llava.get_input_embeddings().weight.float(), dim=-1)
        patch = F.normalize(seen.float(), dim=-1)
        total, right = torch.zeros(()), {}
        for name, wanted in (("first", first), ("second", second), ("place", self.place.expand(len(seen), -1))):
            logits = 16 * patch @ table[self.words[name]].T
            weight = torch.ones(logits.shape[-1])
            if name != "place":
                weight[-1] = 0.2  # most patches hold nothing
            total = total + F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), weight=weight)
            right[name] = (logits.argmax(-1) == wanted).float()
        return total, right

    def sight(self, batch: dict[str, Any]) -> Tensor:
        """The loss of the first stage."""
        seen, pooled = self.look(batch["pixel_values"])
        whole = F.binary_cross_entropy_with_logits(self.from_class(pooled).float(), batch["held"])
        return self.naming(seen, **batch)[0] + 3 * whole

    def logits(self, seen: Tensor, given: Tensor) -> Tensor:
        """(B, N, words) of the questions' tokens after projected pictures."""
        embed = self.llava.get_input_embeddings()
        first = embed(torch.full((len(seen), 1), self.bos))
        x = torch.cat([first, seen.to(first.dtype), embed(given)], 1)
        text = self.llava.model.language_model
        out = text(inputs_embeds=x, position_ids=POSITIONS[None].expand(len(x), -1), use_cache=False)
        return self.llava.lm_head(out.last_hidden_state[:, PREFIX:]).float()

    def answers(self, batch: dict[str, Any]) -> Tensor:
        """The loss of the second stage, averaged per answer."""
        seen = self.look(batch["pixel_values"])[0]
        named = self.naming(seen, **batch)[0]
        logits = self.logits(self.null(seen), batch["given"])
        each = F.cross_entropy(logits.flatten(0, 1), batch["wanted"].flatten(), reduction="none")
        weights = batch["weights"]
        return (each * weights.flatten()).sum() / weights.sum() + 0.1 * named


@torch.no_grad()
def seen_right(learner: Learner, batches: list[dict[str, Any]]) -> dict[str, float]:
    """Shares of patches named right: shapes and digits by both words, what is nothing, places."""
    sums: dict[str, list[float]] = {}
    for batch in batches:
        right = learner.naming(learner.look(batch["pixel_values"])[0], **batch)[1]
        both = right["first"] * right["second"]
        digit, nothing = (batch["first"] == FIRST_WORDS.index(word) for word in ("digit", "nothing"))
        for name, where, value in (
            ("digit", digit, both), ("shape", ~digit & ~nothing, both), ("nothing", nothing, both),
            ("place", nothing | ~nothing, right["place"]),
        ):  # fmt: skip
            sums.setdefault(name, []).extend(value[where].tolist())
    return {name: round(float(np.mean(values)), 3) for name, values in sums.items()}


@torch.no_grad()
def answered_right(learner: Learner, batches: list[dict[str, Any]]) -> dict[str, float]:
    """Shares of answers that are right as a whole, by kind: what greedy decoding says, without decoding."""
    found: dict[str, list[float]] = {}
    for batch in batches:
        logits = learner.logits(learner.look(batch["pixel_values"])[0], batch["given"])
        right = (logits.argmax(-1) == batch["wanted"]) | (batch["weights"] == 0)
        found.setdefault("list", []).extend(right[:, :LIST_ROOM].all(-1).float().tolist())
        others = right[:, LIST_ROOM:].unflatten(1, (QUESTIONS, ROOM)).all(-1).float().tolist()
        for row, kinds in zip(others, batch["kinds"], strict=True):
            for value, kind in zip(row, kinds, strict=True):
                found.setdefault(kind, []).append(value)
    return {kind: round(float(np.mean(values)), 3) for kind, values in sorted(found.items())}


# --------------------------------------------------------------------------------------------------------------------
# Training


def optimizers(learner: Learner, rate: float, tower: float) -> list[torch.optim.Optimizer]:
    """Muon for the decoder's matrices, AdamW for all else; the tower at its own share of the rate."""
    text = learner.llava.model.language_model.layers
    matrices = [p for p in text.parameters() if p.ndim == 2]
    taken = {id(p) for p in matrices}
    seeing = list(learner.llava.model.vision_tower.parameters())
    taken |= {id(p) for p in seeing}
    rest = [p for p in learner.parameters() if id(p) not in taken]
    groups: list[dict[str, Any]] = [{"params": rest, "lr": rate}]
    if tower:
        groups.append({"params": seeing, "lr": rate * tower})
    for p in seeing:
        p.requires_grad_(bool(tower))
    return [
        torch.optim.Muon(matrices, lr=5 * rate, weight_decay=0.01),
        torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def train(
    learner: Learner,
    loss: Callable[[dict[str, Any]], Tensor],
    make: Callable[[int], dict[str, Any]],
    judge: Callable[[], dict[str, float]],
    file: Path,
    steps: int,
    rate: float,
    tower: float,
    every: int,
    patience: int = 10,
) -> None:
    """Until ``steps``, or until the mean of what ``judge`` says was not better ``patience`` times; the best is kept."""
    made = optimizers(learner, rate, tower)
    base = [[group["lr"] for group in optimizer.param_groups] for optimizer in made]
    step, best, since, kept = 0, -1.0, 0, None
    if file.exists():
        state = torch.load(file, weights_only=False)
        learner.load_state_dict(state["learner"])
        step, best, since, kept = state["step"], state["best"], state["since"], state["kept"]
        for optimizer, saved in zip(made, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(state["rng"])
    started, losses = time.time(), []
    while step < steps and since < patience:
        share = min(1.0, (step + 1) / max(1, steps // 25)) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for optimizer, rates in zip(made, base, strict=True):
            for group, value in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = value * max(share, 0.02)
        batch = make(step)
        learner.train()
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(batch)
        value.backward()
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        for optimizer in made:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(float(value.detach()))
        step += 1
        if step % every == 0 or step == steps:
            learner.eval()
            found = judge()
            score = float(np.mean(list(found.values())))
            if score > best:
                best, since, kept = score, 0, {k: v.clone() for k, v in learner.state_dict().items()}
            else:
                since += 1
            line = {"step": step, "loss": round(float(np.mean(losses)), 4), "seconds": round(time.time() - started, 1)}
            print(json.dumps({**line, **found}), flush=True)
            losses = []
            state = {"learner": learner.state_dict(), "step": step, "best": best, "since": since, "kept": kept,
                     "optimizers": [o.state_dict() for o in made], "rng": torch.get_rng_state()}  # fmt: skip
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, file.with_suffix(".new"))
            file.with_suffix(".new").replace(file)
    if kept is not None:
        learner.load_state_dict(kept)
    learner.eval()


def new_model(tokenizer: Any) -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(
            **TEXT, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=scenes.PATCHES,
        vision_feature_layer=FEATURE_LAYER, vision_feature_select_strategy="default", tie_word_embeddings=False,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--work", type=Path, default=Path("multimodal-checkpoints"), help="folder for checkpoints")
    parser.add_argument("--tower", type=Path, help="a trained model whose vision tower to begin with")
    parser.add_argument("--sight-steps", type=int, default=800, help="of 64 pictures each")
    parser.add_argument("--steps", type=int, default=2000, help="of the decoder, of --batch pictures each")
    parser.add_argument(
        "--last-steps", type=int, default=0, help="of tower and decoder together, at a tenth of the rate"
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--every", type=int, default=100, help="steps between looks at the scenes to stop by")
    parser.add_argument("--dev", type=int, default=96, help="scenes to stop by")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    tokenizer = scenes.make_tokenizer()
    learner = Learner(new_model(tokenizer), tokenizer)
    if args.tower is not None:
        begun = scenes.load_model(args.tower)[0].model.vision_tower.state_dict()
        learner.llava.model.vision_tower.load_state_dict(begun)
    learner.llava.model.language_model.config._attn_implementation = "packed"
    words, size = Words(tokenizer), args.batch

    def show(first: int, count: int, part: str = "train") -> list[scenes.Scene]:
        return [scenes.make_scene(number, part) for number in range(first, first + count)]

    def talk(drawn: list[scenes.Scene], first: int, even: bool = True) -> dict[str, Any]:
        rngs = [np.random.default_rng([first + i, 99]) for i in range(len(drawn))]
        return {**pictures(drawn), **words(drawn, rngs, even)}

    dev = [talk(show(first, 32, "dev"), first) for first in range(0, args.dev, 32)]
    train(
        learner, learner.sight, lambda step: pictures(show(64 * step, 64)), lambda: seen_right(learner, dev),
        args.work / "sight.pt", args.sight_steps, args.rate, tower=0.5, every=args.every,
    )  # fmt: skip
    begin = 10_000_000  # other scenes than those of the first stage

    def conversations(step: int) -> dict[str, Any]:
        first = begin + size * step
        return talk(show(first, size), first, even=step < EVEN_UNTIL)

    train(
        learner, learner.answers, conversations, lambda: answered_right(learner, dev), args.work / "answers.pt",
        args.steps, args.rate, tower=0.1, every=args.every,
    )  # fmt: skip
    learner.llava.model.language_model.config._attn_implementation = "sdpa"
    learner.llava.to(torch.float16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    save_file({"embedding": learner.null.embedding.detach().contiguous()}, args.out / "null_image.safetensors")


if __name__ == "__main__":
    main()
