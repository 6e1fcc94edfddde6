"""Whether explanations in words are faithful, and whether a reader who sees nothing else guesses the answer.

``attnlib bench --suite real-readers --out benchmarks/results`` measures again what ``real-readers-cpu.json`` holds. A
classifier tells the first sentences of docstrings apart by the part of scipy they come from: MiniLM, the mean of its
states, and a linear layer trained on as many docstrings as ``shots`` per topic. On held-out ones the relevance of
every word for the predicted topic is put into words (:func:`attnlib.look.attribution.verbalize`). Beside these stand as
many of the words with the largest scores, as many words at random, the whole text, and nothing at all.

- *coverage*: the share of all positive evidence that the words hold;
- *deletion*: by how much the classifier's log-probability falls without them;
- *guessed*: SmolLM2-135M reads the words, not the text, and names a topic; how often it is the classifier's. What it
  would name anyway, having read nothing, is subtracted.

After Feldhus et al., 2023, arXiv 2210.07222, whose readers are people and GPT-3.5.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ....look.attribution import coverage, merge_pieces, transformer_relevance, verbalize
from ... import models
from ...clock import machine
from ...small import Progress, picture, study

QUESTION = "are explanations in words faithful, and can a reader guess the answer from them?"
MODELS = ("minilm-l6", "smollm2-135m")

#: What a reader may answer, and where docstrings about it are.
TOPICS = {
    "statistics": "scipy/stats", "signals": "scipy/signal", "optimization": "scipy/optimize", "images": "scipy/ndimage",
}  # fmt: skip
ARMS = ("verbalization", "top words", "random words", "whole text", "nothing")


@functools.cache
def docstrings(least: int = 10, most: int = 45) -> dict[str, list[str]]:
    """First paragraphs of docstrings by topic, without the words that name the topic, no paragraph twice."""
    spec = importlib.util.find_spec("scipy")
    assert spec is not None and spec.origin is not None
    root, seen, out = Path(spec.origin).parent.parent, set(), {}
    for topic, place in TOPICS.items():
        found = []
        for file in sorted((root / place).rglob("*.py")):
            if "tests" in file.parts:
                continue
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    continue
                parts = (ast.get_docstring(node) or "").split("\n\n")[:2]
                text = " ".join(" ".join(p for p in parts if "---" not in p).split())
                text = re.sub(r"[`*:]|\s\.\.\s.*", "", text)
                words = text.split()[:most]
                if len(words) >= least and (text := " ".join(words)) not in seen:
                    seen.add(text)
                    found.append(text)
        out[topic] = found
    return out


class Classifier(nn.Module):
    """Mean of an encoder's states, a linear layer."""

    def __init__(self, encoder: Any, classes: int):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, classes)

    def means(self, input_ids: Tensor) -> Tensor:
        return self.encoder(input_ids=input_ids).last_hidden_state.mean(1)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.means(input_ids))


def trained(encoder: Any, tokenizer: Any, texts: Sequence[str], labels: Sequence[int], classes: int) -> Classifier:
    """Logistic regression on the means; the encoder stays as it is."""
    from sklearn.linear_model import LogisticRegression

    model = Classifier(encoder, classes).eval()
    with torch.no_grad():
        rows = torch.cat([model.means(tokenizer([t], return_tensors="pt")["input_ids"]) for t in texts])
        fit = LogisticRegression(C=10.0, max_iter=1000).fit(rows.double().numpy(), np.asarray(labels))
        model.head.weight.copy_(torch.from_numpy(fit.coef_))
        model.head.bias.copy_(torch.from_numpy(fit.intercept_))
    return model.requires_grad_(False)


class Reader:
    """A language model that names a topic after some words; what it says after none is subtracted."""

    def __init__(self, model: Any, tokenizer: Any, topics: Sequence[str]):
        self.model, self.tokenizer, self.topics = model, tokenizer, list(topics)
        self.first = [tokenizer(" " + t, add_special_tokens=False)["input_ids"][0] for t in topics]
        if len(set(self.first)) < len(self.first):
            raise ValueError(f"topics {self.topics} must begin with different tokens, got {self.first}")
        self.read: dict[str, Tensor] = {}
        self.alone = self.scores("...")

    @torch.no_grad()
    def scores(self, said: str) -> Tensor:
        """(topics,) log-probabilities of their first tokens."""
        if said not in self.read:
            listed = ", ".join(self.topics[:-1]) + " or " + self.topics[-1]
            prompt = f"A text is about {listed}. Its most important words are: {said}\nThe text is about"
            ids = torch.tensor([self.tokenizer(prompt)["input_ids"]])
            logits = self.model(input_ids=ids, logits_to_keep=1).logits[0, -1]
            self.read[said] = logits.float().log_softmax(-1)[self.first]
        return self.read[said]

    def guess(self, said: str) -> int:
        return int((self.scores(said) - self.alone).argmax())


def said_by(arm: str, words: Sequence[str], scores: Sequence[float], seed: int) -> tuple[str, list[int]]:
    """What is said, and which words it names."""
    spoken = verbalize(words, scores)
    named = sorted({i for span in spoken.spans for i in span.words})
    if arm == "verbalization":
        return spoken.text, named
    if arm == "top words":
        named = sorted(np.argsort(-np.asarray(scores), kind="stable")[: len(named)].tolist())
    elif arm == "random words":
        named = sorted(np.random.default_rng(seed).permutation(len(words))[: len(named)].tolist())
    elif arm == "whole text":
        named = list(range(len(words)))
    else:
        named = []
    return " ".join(words[i] for i in named) if named else "...", named


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    shots: int = 32,
    count: int = 4,
    load: Callable[[str], tuple[Any, Any]] = models.load,
) -> dict[str, Any]:
    """Explain, delete and read, with every seed of docstrings.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``real-readers-cpu.svg``.
        seeds: of which docstrings train and which are explained.
        shots: docstrings of each topic that train.
        count: docstrings of each topic that are explained.
        load: gives a model and its tokenizer by a name of :data:`MODELS`.

    Returns:
        Plain values, for JSON.
    """
    topics = list(TOPICS)

    @functools.cache
    def loaded(name: str) -> tuple[Any, Any]:
        return load(name)

    @functools.cache
    def reader() -> Reader:
        return Reader(*loaded(MODELS[1]), topics)

    @functools.cache
    def explained(seed: int) -> tuple[Classifier, list[tuple[list[str], list[float], int, int]]]:
        rng, train, held = np.random.default_rng(seed), [], []
        for number, texts in enumerate(docstrings().values()):
            order = rng.permutation(len(texts))
            train += [(texts[i], number) for i in order[:shots]]
            held += [(texts[i], number) for i in order[shots : shots + count]]
        encoder, tokenizer = loaded(MODELS[0])
        model = trained(encoder, tokenizer, [t for t, _ in train], [n for _, n in train], len(topics))
        rows = []
        for text, label in held:
            ids = tokenizer([text], return_tensors="pt")["input_ids"]
            predicted = int(model(ids).argmax())
            found = transformer_relevance(model, ids, module="encoder.embeddings", target=predicted)[0].sum(-1)
            words, scores, _ = merge_pieces(tokenizer.convert_ids_to_tokens(ids[0].tolist()), found)
            rows.append((words, scores, predicted, label))
        return model, rows

    def run(arm: str, seed: int) -> dict[str, float]:
        model, rows = explained(seed)
        _, tokenizer = loaded(MODELS[0])

        def log(words: Sequence[str], topic: int) -> float:
            ids = tokenizer([" ".join(words)], return_tensors="pt")["input_ids"]
            return float(model(ids).log_softmax(-1)[0, topic])

        found = []
        for number, (words, scores, predicted, label) in enumerate(rows):
            said, named = said_by(arm, words, scores, 1000 * seed + number)
            rest = [w for i, w in enumerate(words) if i not in set(named)]
            evidence = any(s > 0 for s in scores)
            found.append((
                100.0 * (reader().guess(said) == predicted), 100 * coverage(scores, named) if evidence else 0.0,
                log(words, predicted) - log(rest, predicted), float(len(named)), 100.0 * (predicted == label),
            ))  # fmt: skip
        names = ("guessed", "coverage", "deletion", "words", "classifier right")
        return dict(zip(names, np.mean(found, 0).tolist(), strict=True))

    told = study(ARMS, run, "guessed", "random words", seeds, progress, keep, {"shots": shots, "count": count})
    if pictures is not None:
        rows = {r["name"]: r for r in told["rows"]}
        curves = {"": [(arm, rows[arm]["guessed"]["mean"], rows[arm]["guessed"]["half"]) for arm in ARMS]}
        picture(Path(pictures) / "real-readers-cpu.svg", curves, "what the reader sees",
                "reader names the classifier's topic, %", "SmolLM2 reads explanations of MiniLM")  # fmt: skip
    return {
        "question": QUESTION, "machine": machine(), "topics": topics, "shots": shots, "count": count,
        "chance": 100 / len(topics), **told,
    }  # fmt: skip
