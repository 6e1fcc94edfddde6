"""Train a small language model with any mechanism in any layer, in transformers' Trainer.

    python examples/language/train.py --out run
    python examples/language/train.py --out run --layers lightning-attention-2 softplus-attention-lssar,power=15
    python examples/language/train.py --out run --tokenizer bpe --vocab 1024 --layers softmax-attention,num_kv_heads=2
    python examples/language/train.py --out run --model pldr

Layers are registry names with settings, ``name,key=value``; a list shorter than ``--depth`` is repeated. The text is
the documentation inside Python's standard library, or ``--text FILE``. Started again with the same ``--out``, training
goes on from the last checkpoint. At the end ``--out`` holds model and tokenizer for ``from_pretrained``, and a sample
is printed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from attnlib.bench.data import files as data
from attnlib.bench.specs import Spec
from attnlib.models.language import DecoderConfig, DecoderForCausalLM
from attnlib.models.pldr import PLDRConfig, PLDRForCausalLM

PAD, END = "<pad>", "<end>"


def make_tokenizer(kind: str, text: str, vocab: int = 1024) -> PreTrainedTokenizerFast:
    """Bytes, or byte pairs learned from ``text``; both give back every byte they were given.

    Args:
        kind: ``"byte"`` or ``"bpe"``.
        text: what to learn pairs from.
        vocab: symbols of ``"bpe"``, at least 258: 256 bytes and two special tokens.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if kind == "byte":
        symbols = {symbol: i for i, symbol in enumerate([PAD, END, *alphabet])}
        tokenizer = Tokenizer(models.BPE(vocab=symbols, merges=[]))
        tokenizer.add_special_tokens([PAD, END])
    elif kind == "bpe":
        if vocab < len(alphabet) + 2:
            raise ValueError(f"vocab={vocab} must be at least {len(alphabet) + 2}: all bytes and two special tokens")
        tokenizer = Tokenizer(models.BPE())
    else:
        raise ValueError(f"kind must be one of ['byte', 'bpe'], got {kind!r}")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "bpe":
        trainer = trainers.BpeTrainer(
            vocab_size=vocab, special_tokens=[PAD, END], initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


class Windows(torch.utils.data.Dataset):
    """Neighbouring windows of ``length`` tokens."""

    def __init__(self, ids: Sequence[int], length: int):
        if len(ids) < length:
            raise ValueError(f"the text has {len(ids)} tokens; windows of {length} need at least as many")
        self.windows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


class Schedules(TrainerCallback):
    """Tells mechanisms with a schedule how far training is."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        model.set_progress(min(1.0, state.global_step / max(1, state.max_steps)))


def make_model(given: argparse.Namespace, vocab: int, pad: int, end: int) -> PreTrainedModel:
    """The model that the command line asks for."""
    shared = dict(
        vocab_size=vocab, hidden_size=given.dim, num_hidden_layers=given.depth, num_attention_heads=given.heads,
        initializer_range=given.dim**-0.5, pad_token_id=pad, eos_token_id=end, bos_token_id=None,
    )  # fmt: skip
    if given.model == "pldr":
        return PLDRForCausalLM(PLDRConfig(**shared, metric_hidden=given.metric_hidden, residual_units=2))
    specs = [Spec.parse(layer) for layer in given.layers]
    layers = [{"name": spec.name, **spec.config} for spec in specs]
    return DecoderForCausalLM(DecoderConfig(**shared, mechanisms=layers, loss_weights={"balance": given.balance}))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of checkpoints, and of the model at the end")
    add("--text", type=Path, help="a text file; the documentation of Python by default")
    add("--tokenizer", choices=("byte", "bpe"), default="byte")
    add("--vocab", type=int, default=1024, help="symbols of bpe")
    add("--model", choices=("decoder", "pldr"), default="decoder")
    add("--layers", nargs="+", default=["softmax-attention"], metavar="NAME,KEY=VALUE", help="mechanism of each layer")
    add("--metric-hidden", type=int, default=32, help="width of pldr's metric learner")
    add("--balance", type=float, default=0.01, help="weight of the balance loss of routed heads")
    add("--dim", type=int, default=128)
    add("--depth", type=int, default=4)
    add("--heads", type=int, default=8)
    add("--length", type=int, default=256, help="tokens of a window")
    add("--batch", type=int, default=16)
    add("--steps", type=int, default=1000)
    add("--learning-rate", type=float, default=3e-3)
    add("--save-steps", type=int, default=200)
    add("--log-steps", type=int, default=20)
    add("--seed", type=int, default=0)
    add("--prompt", default="The ")
    add("--sample", type=int, default=120, help="tokens to generate at the end")
    return parser.parse_args(argv)


def prepare(given: argparse.Namespace) -> tuple[PreTrainedTokenizerFast, Windows, Windows, float]:
    """Tokenizer, training windows, test windows, and bytes per token of the test part."""
    text = data.text(given.text)
    train, test = (bytes(part.tolist()).decode("utf-8", "replace") for part in (text.train, text.test))
    saved = given.out / "tokenizer"
    if saved.exists():
        tokenizer = AutoTokenizer.from_pretrained(saved)
    else:
        tokenizer = make_tokenizer(given.tokenizer, train, given.vocab)
        tokenizer.save_pretrained(saved)
    ids = [tokenizer(part)["input_ids"] for part in (train, test)]
    return tokenizer, Windows(ids[0], given.length), Windows(ids[1], given.length), len(test.encode()) / len(ids[1])


def make_trainer(given: argparse.Namespace, model: PreTrainedModel, train: Windows, test: Windows) -> Trainer:
    """transformers' Trainer with what the command line says."""
    settings = TrainingArguments(
        output_dir=str(given.out / "checkpoints"), max_steps=given.steps, per_device_train_batch_size=given.batch,
        per_device_eval_batch_size=given.batch, learning_rate=given.learning_rate, lr_scheduler_type="cosine",
        warmup_steps=max(1, given.steps // 20), adam_beta2=0.98, weight_decay=0.01, logging_steps=given.log_steps,
        save_steps=given.save_steps, save_total_limit=2, eval_strategy="steps", eval_steps=given.save_steps,
        prediction_loss_only=True, remove_unused_columns=False, report_to=[], seed=given.seed, data_seed=given.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    return Trainer(model, settings, train_dataset=train, eval_dataset=test, callbacks=[Schedules()])


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, evaluate, save, load, generate.

    Returns:
        ``loss`` of the last log, ``bits_per_byte`` of the test part, ``history`` of the logs and the ``sample``.
    """
    given = parse(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    tokenizer, train, test, bytes_per_token = prepare(given)
    set_seed(given.seed)
    model = make_model(given, len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id)
    model.config.use_cache = False
    trainer = make_trainer(given, model, train, test)
    checkpoints = given.out / "checkpoints"
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.exists() else None
    if last is not None:
        print(f"going on from {last}")
    trainer.train(resume_from_checkpoint=last)
    found: dict[str, Any] = {}
    model.eval()
    if isinstance(model, PLDRForCausalLM):
        found["bits_per_byte_looking_ahead"] = trainer.evaluate()["eval_loss"] / math.log(2) / bytes_per_token
        model.freeze_metric(train.windows[: given.batch].to(model.device))
    found["bits_per_byte"] = trainer.evaluate()["eval_loss"] / math.log(2) / bytes_per_token
    model.config.use_cache = True
    model.save_pretrained(given.out / "model")
    tokenizer.save_pretrained(given.out / "model")

    again = AutoModelForCausalLM.from_pretrained(given.out / "model").eval()
    prompt = tokenizer(given.prompt, return_tensors="pt", return_token_type_ids=False)
    set_seed(given.seed)
    tokens = again.generate(**prompt, max_new_tokens=given.sample, do_sample=True, temperature=0.7)
    found["sample"] = tokenizer.decode(tokens[0])
    found["history"] = [entry for entry in trainer.state.log_history if "loss" in entry]
    found["loss"] = found["history"][-1]["loss"] if found["history"] else None
    shown = {k: v for k, v in found.items() if k not in ("history", "sample")}
    (given.out / "result.json").write_text(json.dumps(shown, indent=1) + "\n")
    print(json.dumps(shown), found["sample"], sep="\n")
    return found


if __name__ == "__main__":
    main()
