"""Train the small multimodal model on generated scenes, as LLaVA is trained: a vision tower first, then the decoder.

    python examples/multimodal/train.py --out examples/multimodal/weights

The vision tower (CLIP's, from transformers) learns which things are in the picture from its class token, and what each
patch belongs to and where it is from the features that the language model will read. It is then frozen; projector and
decoder learn to answer questions. Both stages run in transformers' Trainer, show their progress, and go on from the
last checkpoint when started again with the same --work folder.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainingArguments,
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


class Pictures(torch.utils.data.Dataset):
    """Pictures, which things they hold, and what stands at each patch."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        scene = scenes.make_scene(index)
        held = torch.zeros(len(scenes.NAMES))
        cells = torch.full((scenes.GRID, scenes.GRID), len(scenes.NAMES))
        for thing in scene.things:
            number = scenes.NAMES.index(thing.name)
            held[number] = 1.0
            cells[thing.cell // scenes.GRID, thing.cell % scenes.GRID] = number
        per = scenes.CELL // scenes.PATCH
        patches = cells.repeat_interleave(per, 0).repeat_interleave(per, 1).flatten()
        return {"pixel_values": scenes.pixel_values([scene])[0], "held": held, "patches": patches}


class Seeing(nn.Module):
    """The vision tower with linear heads: things from the class token, thing and place from each patch."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = CLIPVisionModel._from_config(CLIPVisionConfig(**VISION), attn_implementation="eager")
        self.from_class = nn.Linear(VISION["hidden_size"], len(scenes.NAMES))
        self.from_patch = nn.Linear(VISION["hidden_size"], len(scenes.NAMES) + 1)
        self.place = nn.Linear(VISION["hidden_size"], scenes.PATCHES)

    def forward(self, pixel_values: Tensor, held: Tensor, patches: Tensor) -> dict[str, Tensor]:
        out = self.tower(pixel_values, output_hidden_states=True)
        whole = nn.functional.binary_cross_entropy_with_logits(self.from_class(out.pooler_output), held)
        features = out.hidden_states[FEATURE_LAYER][:, 1:].flatten(0, 1)
        what = nn.functional.cross_entropy(self.from_patch(features), patches.flatten())
        places = torch.arange(scenes.PATCHES).repeat(len(patches))
        where = nn.functional.cross_entropy(self.place(features), places)
        return {"loss": 5 * whole + what + where}


class Answering(nn.Module):
    """The model, and a learned image of nothing that takes the place of one picture in ten (as LACING trains)."""

    def __init__(self, llava: LlavaForConditionalGeneration):
        super().__init__()
        self.llava, self.null = llava, NullImage(scenes.PATCHES, TEXT["hidden_size"], prob=0.1)
        llava.model.multi_modal_projector.register_forward_hook(self.null.hook)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return {"loss": self.llava(**inputs).loss}


class Conversations(torch.utils.data.Dataset):
    """A picture and several questions with their answers, one after another; only answers are learnt."""

    def __init__(self, count: int, tokenizer):
        self.count, self.tokenizer = count, tokenizer

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        scene = scenes.make_scene(index)
        ids = self.tokenizer("<s> " + "<image> " * scenes.PATCHES)["input_ids"]
        labels = [-100] * len(ids)
        for question in scenes.ask(scene, np.random.default_rng([index, 99])):
            asked = self.tokenizer(f"<q> {question.text} <a>")["input_ids"]
            said = self.tokenizer(f"{question.answer} </s>")["input_ids"]
            ids += asked + said
            labels += [-100] * len(asked) + said
        return {
            "pixel_values": scenes.pixel_values([scene])[0],
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
        }


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Padding on the right, where nothing after it reads."""
    pad = nn.utils.rnn.pad_sequence
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "input_ids": pad([row["input_ids"] for row in rows], batch_first=True, padding_value=0),
        "attention_mask": pad([torch.ones_like(row["input_ids"]) for row in rows], batch_first=True),
        "labels": pad([row["labels"] for row in rows], batch_first=True, padding_value=-100),
    }


def train(model: nn.Module, data: torch.utils.data.Dataset, folder: Path, batch: int, rate: float, **kwargs) -> None:
    """transformers' Trainer, going on from the last checkpoint in ``folder``."""
    steps = len(data) // batch
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=batch, learning_rate=rate, max_steps=steps,
        lr_scheduler_type="cosine", warmup_steps=max(1, steps // 20), weight_decay=0.01, adam_beta2=0.98,
        logging_steps=25, save_steps=200, save_total_limit=2, report_to=[], remove_unused_columns=False,
        dataloader_num_workers=0, use_cpu=True, seed=0, bf16=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=data, **kwargs)
    found = any(folder.glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=True if found else None)


def report(model: LlavaForConditionalGeneration, tokenizer, count: int = 200) -> dict[str, float]:
    """Accuracy per kind of question on test scenes, exact match."""
    items = []
    for number in range(count):
        scene = scenes.make_scene(number, "test")
        items += [scenes.Item(scene, q) for q in scenes.ask(scene, np.random.default_rng([number, 7]))]
    said = scenes.answer(model.eval(), tokenizer, items)
    right: dict[str, list[bool]] = {}
    for item, text in zip(items, said, strict=True):
        right.setdefault(item.question.kind, []).append(text == item.question.answer)
    return {kind: sum(values) / len(values) for kind, values in sorted(right.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--work", type=Path, default=Path("multimodal-checkpoints"), help="folder for checkpoints")
    parser.add_argument("--pictures", type=int, default=48_000, help="pictures the vision tower sees")
    parser.add_argument("--conversations", type=int, default=64_000, help="conversations the decoder sees")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    torch.manual_seed(0)
    seeing = Seeing()
    tower = args.work / "tower.pt"
    if tower.exists():
        seeing.load_state_dict(torch.load(tower))
    else:
        train(seeing, Pictures(args.pictures), args.work / "vision", batch=64, rate=2e-3)
        torch.save(seeing.state_dict(), tower)

    tokenizer = scenes.make_tokenizer()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(
            **TEXT, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=scenes.PATCHES,
        vision_feature_layer=FEATURE_LAYER, vision_feature_select_strategy="default", tie_word_embeddings=False,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(seeing.tower.state_dict())
    model.model.vision_tower.requires_grad_(False)
    model.set_attn_implementation("eager")  # faster than sdpa at this size, with bfloat16 on a CPU
    answering = Answering(model)
    train(
        answering, Conversations(args.conversations, tokenizer), args.work / "decoder", batch=16, rate=2e-3,
        data_collator=collate,
    )  # fmt: skip
    answering.eval()
    model.to(torch.float16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    save_file({"embedding": answering.null.embedding.detach()}, args.out / "null_image.safetensors")
    for kind, share in report(*scenes.load_model(args.out)).items():
        print(f"{kind:10} {share:.3f}")


if __name__ == "__main__":
    main()
