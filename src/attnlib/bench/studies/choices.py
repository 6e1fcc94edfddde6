"""Circuits of small decoders trained on several tasks: what they share, and what heads say and see of multiple choice.

``attnlib bench --suite choices --out benchmarks/results`` writes ``choices-cpu.json`` and draws it.
A decoder is trained per seed on tasks over one vocabulary: multiple choice (a value, four labelled values, the
label of the right one), coloured objects (four labelled objects, one of them, its label) and indirect objects (two
names, one of them again, the other). Then, per task, the effect of every head at the answer, and

- whether the heads of two tasks overlap more than random sets of as many heads, by permutation, by layer or not;
- whether heads ranked by their direct attribution are those ranked by patching;
- what is lost when queries, keys and values of the letter heads keep few dimensions where choices are read, under
  mutations of the questions that move no token, against random directions of as many dimensions.

After Merullo et al., 2023, arXiv 2310.08744, and Lieberum et al., 2023, arXiv 2307.09458, whose models are larger.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...hooks import Node, Nodes, attach
from ...look import (
    Effects,
    LowRank,
    answer_attention,
    choice_logit,
    head_classes,
    logit_attribution,
    logit_difference,
    overlap,
    patch,
    subspaces,
)
from ..clock import machine
from ..data.circuits import MUTATIONS, ChoiceWorld, Questions
from ..small import Progress, fit, interval, picture, study
from ..stats import mean_interval

TASKS = ("choices", "objects", "names")


def prompts(
    task: str, world: ChoiceWorld, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clean and corrupted prompts (B, N) of one task, and their answers (B,).

    >>> world = ChoiceWorld()
    >>> clean, other, right, wrong = prompts("names", world, 3, torch.Generator().manual_seed(0))
    >>> ((clean != other).sum(1)).tolist(), clean.shape[1] == world.length
    ([1, 1, 1], True)
    """
    if task == "choices":
        q = world.draw(count, generator)
        turned = q.asking((q.correct + torch.randint(1, world.choices, (count,), generator=generator)) % world.choices)
        return q.ids, turned.ids, q.answers, turned.answers
    length, k, rows = world.length, world.choices, torch.arange(count)
    value = world.vocabulary - world.facts
    ids = torch.zeros(count, length, dtype=torch.long)
    ids[:, 0], ids[:, 1], ids[:, -1] = 1, 2, 7
    ids[:, 2] = world.vocabulary + TASKS.index(task) - 1
    picked = value + torch.rand(count, world.facts, generator=generator).argsort(1)[:, :k]
    if task == "names":
        at = torch.rand(count, length - 4, generator=generator).argsort(1)[:, :3].sort(1).values + 3
        repeated = torch.randint(2, (count,), generator=generator)
        ids[rows[:, None], at[:, :2]] = picked[:, :2]
        other = ids.clone()
        ids[rows, at[:, 2]], other[rows, at[:, 2]] = picked[rows, repeated], picked[rows, 1 - repeated]
        return ids, other, picked[rows, 1 - repeated], picked[rows, repeated]
    labels = 8 + torch.rand(count, world.letters, generator=generator).argsort(1)[:, :k]
    first = 3 + 3 * torch.arange(k)
    ids[:, first], ids[:, first + 1], ids[:, first + 2] = 4, labels, picked
    asked = torch.randint(k, (count,), generator=generator)
    instead = (asked + torch.randint(1, k, (count,), generator=generator)) % k
    other = ids.clone()
    ids[:, -1], other[:, -1] = picked[rows, asked], picked[rows, instead]
    return ids, other, labels[rows, asked], labels[rows, instead]


def labelled(ids: Tensor, answers: Tensor, world: ChoiceWorld) -> Tensor:
    """(B, N) what is to be said at each token: the answer at the end, and at a value behind a label that label, without
    which small decoders stay at chance for thousands of steps; -100 where nothing is asked."""
    value = world.vocabulary - world.facts
    is_value = (ids >= value) & (ids < world.vocabulary)
    is_label = (ids >= 8) & (ids < value)
    wanted = torch.full_like(ids, -100)
    for back in (1, 2):  # objects follow their label, choices its dot
        before = F.pad(ids, (back, 0))[:, :-back]
        there = is_value & F.pad(is_label, (back, 0))[:, :-back]
        wanted = torch.where(there, before, wanted)
    wanted[:, -1] = answers
    return wanted


def trained(
    world: ChoiceWorld, seed: int, steps: int, batch: int, width: int, layers: int, heads: int,
    tasks: Sequence[str] = TASKS,
) -> nn.Module:  # fmt: skip
    """A decoder of softmax attention that answers these tasks."""
    from ...models.language import DecoderConfig, DecoderForCausalLM

    torch.manual_seed(seed)
    config = DecoderConfig(
        vocab_size=world.vocabulary + len(TASKS) - 1, hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=heads,
    )  # fmt: skip
    model: nn.Module = DecoderForCausalLM(config)

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        parts = [prompts(task, world, batch // len(tasks), generator) for task in tasks]
        return torch.cat([p[0] for p in parts]), torch.cat([labelled(p[0], p[2], world) for p in parts])

    def loss(model: nn.Module, drawn: tuple[Tensor, Tensor]) -> Tensor:
        logits = model(drawn[0], use_cache=False).logits
        last = F.cross_entropy(logits[:, -1], drawn[1][:, -1])
        return last + F.cross_entropy(logits[:, :-1].flatten(0, 1), drawn[1][:, :-1].flatten(), ignore_index=-100)

    fit(model, draw, loss, steps, lr=3e-3, seed=seed)
    return model.eval()


def circuit(effects: Effects, size: int) -> list[Node]:
    """The heads that change the answer most when they are patched."""
    return effects.ranked(largest=False)[:size]


@torch.no_grad()
def right(model: nn.Module, questions: Questions, low: LowRank | None = None) -> tuple[float, float]:
    """Accuracy in percent and loss, among the choices."""
    if low is None:
        logits = model(questions.ids, use_cache=False).logits[:, -1]
    else:
        with attach(model, low):
            logits = model(questions.ids, use_cache=False).logits[:, -1]
    among = logits.gather(1, questions.choices)
    loss = F.cross_entropy(among, questions.correct)
    return float((among.argmax(1) == questions.correct).float().mean()) * 100, float(loss)


def rank_agreement(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's correlation."""
    from scipy import stats

    return float(stats.spearmanr(a, b).statistic)


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    tasks: Sequence[str] = ("choices", "names"),
    steps: int = 1000,
    batch: int = 64,
    width: int = 96,
    layers: int = 2,
    heads: int = 6,
    size: int = 2,
    ranks: Sequence[int] = (0, 1, 2, 4, 8),
    count: int = 64,
) -> dict[str, Any]:
    """Train, patch and compress, with every seed.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``choices-cpu.svg``.
        seeds: of weights, batches and prompts.
        tasks: any of :data:`TASKS`; coloured objects take small decoders longer than the steps here.
        steps, batch: of training; its accuracies say whether the tasks were learnt; without that the rest is void. With
            ``width=64, heads=4, steps=700`` it is, for two of three seeds, which then are at chance in multiple choice.
        width, layers, heads: of the decoder.
        size: heads of a circuit.
        ranks: dimensions that letter heads keep.
        count: prompts.

    Returns:
        Plain values, for JSON.
    """
    world = ChoiceWorld(letters=8, numbers=4, facts=8)
    settings = {"steps": steps, "batch": batch, "width": width, "layers": layers, "heads": heads, "size": size,
                "count": count, "ranks": list(ranks), "tasks": list(tasks)}  # fmt: skip

    @functools.cache
    def decoder(seed: int) -> nn.Module:
        return trained(world, seed, steps, batch, width, layers, heads, tasks)

    @functools.cache
    def effects(seed: int, task: str) -> Effects:
        clean, other, correct, wrong = prompts(task, world, count, torch.Generator().manual_seed(1000 + seed))
        return patch(decoder(seed), clean, other, logit_difference(correct, wrong), positions=None)

    def answered(name: str, seed: int) -> dict[str, float]:
        clean, other, correct, wrong = prompts(name, world, 512, torch.Generator().manual_seed(2000 + seed))
        model = decoder(seed)
        with torch.no_grad():
            logits = model(clean, use_cache=False).logits[:, -1]
        found = effects(seed, name)
        mine = [found.nodes.index(node) for node in circuit(found, size)]
        return {"accuracy": float((logits.argmax(1) == correct).float().mean()) * 100,
                "share of the circuit": float(found.share[mine].sum())}  # fmt: skip

    def pairs(name: str, seed: int) -> dict[str, float]:
        a, b = (circuit(effects(seed, task), size) for task in name.split(" and "))
        every = Nodes(decoder(seed)).of("z")
        found, layered = (overlap(a, b, every, "first", by_layer=by, draws=20000) for by in (False, True))
        agree = rank_agreement(*(effects(seed, task).mean.tolist() for task in name.split(" and ")))
        return {"overlap": found.value, "expected": found.expected, "p": found.p, "p by layer": layered.p,
                "expected by layer": layered.expected, "rank agreement": agree}  # fmt: skip

    def choice_places(seed: int, q: Questions) -> Tensor:
        """Where the answer reads a choice: at its label, or at the value behind it, which more attention goes to."""
        looks = answer_attention(decoder(seed), q.ids).mean(0)
        labels, values = (
            float(looks.gather(-1, at[:, None].expand(-1, looks.shape[1], -1)).sum()) for at in (q.labels, q.values)
        )
        return q.labels if labels > values else q.values

    def letters(seed: int, total: Effects) -> list[Node]:
        """Heads that look at the right choice, the most important first; all heads where none does."""
        q = world.draw(count, torch.Generator().manual_seed(3000 + seed))
        classes = head_classes(answer_attention(decoder(seed), q.ids), choice_places(seed, q), q.correct)
        order = total.ranked(largest=False)
        return ([node for node in order if classes[node] == "correct"] or order)[: max(1, size // 2)]

    @functools.cache
    def choosing(seed: int) -> tuple[Effects, list[Node], dict[str, float]]:
        model, q = decoder(seed), world.draw(count, torch.Generator().manual_seed(1000 + seed))
        turned = q.asking((q.correct + 1) % world.choices)
        metric = choice_logit(q.correct, q.choices)
        total = patch(model, q.ids, turned.ids, metric, ["z", "mlp"])
        said = logit_attribution(model, q.ids, q.answers, q.choices)
        other = logit_attribution(model, turned.ids, q.answers, q.choices)
        difference = {n: float(v) for n, v in zip(said.nodes, (said.values - other.values).mean(1), strict=True)}
        alone = [n for n in total.nodes if n.kind == "z"]
        by_patch = dict(zip(total.nodes, (-total.mean).tolist(), strict=True))
        mine = letters(seed, patch(model, q.ids, turned.ids, metric))
        top = max(alone, key=lambda n: by_patch[n])
        order = sorted(alone, key=lambda n: -difference[n])
        found = {
            "rank agreement": rank_agreement([difference[n] for n in total.nodes], [by_patch[n] for n in total.nodes]),
            "place of patching's first head": float(order.index(top) + 1),
            "letter heads": float(len(mine)),
        }
        return total, mine, found

    def compressed(name: str, seed: int) -> dict[str, float]:
        """``"<what>, <rank>"``: loss and accuracy under every mutation."""
        what, rank = name.rsplit(", ", 1)
        model, mine = decoder(seed), choosing(seed)[1]
        low: Any = None
        asked = world.draw(count, torch.Generator().manual_seed(3000 + seed))
        at = "values" if torch.equal(choice_places(seed, asked), asked.values) else "labels"
        if what != "full":
            fitting = world.draw(256, torch.Generator().manual_seed(4000 + seed))
            low = subspaces(
                model, fitting.ids, mine, int(rank), keys=getattr(fitting, at), by_place=what == "means of places"
            )
            if what == "random directions":
                maker = torch.Generator().manual_seed(seed)
                low = {n: (m, torch.linalg.qr(torch.randn(len(m), len(m), generator=maker))[0][: int(rank)])
                        for n, (m, _) in low.items()}  # fmt: skip
        found = {}
        for mutation in MUTATIONS:
            q = world.draw(256, torch.Generator().manual_seed(5000 + seed), mutation)
            edit = None if low is None else LowRank(low, {"q": [-1], "k": getattr(q, at), "v": getattr(q, at)})
            found[f"{mutation}: accuracy"], found[f"{mutation}: loss"] = right(model, q, edit)
        found["loss"] = found["random letters: loss"]
        return found

    def run(names: Sequence[str], what: Any, metric: str, baseline: str | None = None) -> dict[str, Any]:
        return study(names, what, metric, baseline, seeds, progress, keep, {**settings, "what": what.__name__})

    found = {
        "tasks": run(tasks, answered, "accuracy"),
        "pairs": run([" and ".join(p) for p in itertools.combinations(tasks, 2)], pairs, "overlap"),
        "measures": run(["choices"], lambda name, seed: choosing(seed)[2], "rank agreement"),
    }
    ways = ("directions", "means of places", "random directions")
    names = ["full, 0", *(f"{way}, {rank}" for rank in ranks for way in ways)]
    found["compression"] = run(names, compressed, "loss", "full, 0")
    if pictures is not None:
        rows = {row["name"]: row for row in found["compression"]["rows"]}
        curves: dict[str, list[tuple[Any, float, float | None]]] = {
            way: [(rank, (r := rows[f"{way}, {rank}"])["loss"]["mean"], r["loss"]["half"]) for rank in ranks]
            for way in ways
        }
        full = rows["full, 0"]["loss"]
        curves["whole heads"] = [(rank, full["mean"], full["half"]) for rank in ranks]
        picture(Path(pictures) / "choices-cpu.svg", curves, "dimensions kept of each letter head",
                "loss among the choices", "Letter heads of a small decoder in few dimensions", (),
                ["whole heads"])  # fmt: skip
    return {"machine": machine(), **settings, "chance": interval(mean_interval([100.0 / world.choices])), **found}
