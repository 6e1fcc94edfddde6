"""What spans are searched with and chosen by: answers of the model itself, and the loss at a length nobody profiled.

Fu et al., 2024, "MoA", arXiv 2406.14909, section 4.2. A profile (:func:`attnlib.convert.spans.influence`) is taken of
what the dense model itself says about long inputs, so that it measures what the model would no longer say; of the plans
that no other beats, the one with the lowest loss at a longer length is kept. ::

    prompts = [{"input_ids": tokenizer(text + question, return_tensors="pt")["input_ids"][:, -448:]} for text in texts]
    batches = {512: answered(model, prompts, tokens=64), 1024: [...]}
    found = mixture(model, batches, {512: 0.5, 1024: 0.5, 2048: 0.5}, held=longer, block=64)
    found.conversion.restore()

Texts themselves, with the loss of the next token, serve as well as answers: ``{"input_ids": ids}``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import check_int
from .agreement import task_loss
from .conversion import Conversion
from .spans import Plan, influence, put, rules, search

Loss = Callable[[nn.Module, Any], Tensor]


@torch.no_grad()
def answered(
    model: nn.Module, prompts: Iterable[Mapping[str, Tensor]], tokens: int, **options: Any
) -> list[dict[str, Tensor]]:
    """Prompts followed by what the model answers, with labels on the answers alone.

    Args:
        model: of transformers, or ours, that generates.
        prompts: arguments of the model, ``input_ids`` (B, N) among them; padded on the left, if at all.
        tokens: of every answer, neither more nor fewer, so that batches keep one length.
        **options: of ``generate``, such as ``do_sample``; greedy by default.

    Returns:
        Batches for :func:`attnlib.convert.spans.influence`, N + ``tokens`` long.

    Raises:
        ValueError: a prompt without tokens, or no prompt.
    """
    check_int("tokens", tokens, least=1)
    generate: Any = getattr(model, "generate", None)
    if generate is None:
        raise ValueError(f"model must generate, and {type(model).__name__} has no generate()")
    found = []
    for i, prompt in enumerate(prompts):
        if "input_ids" not in prompt:
            raise ValueError(f"prompts[{i}] has no input_ids")
        ids = prompt["input_ids"]
        mask = prompt.get("attention_mask", torch.ones_like(ids))
        call: dict[str, Any] = {"do_sample": False, **options}
        whole = generate(input_ids=ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, **call)
        labels = whole.clone()
        labels[:, : ids.shape[1]] = -100
        batch = {"input_ids": whole, "labels": labels}
        if not bool(mask.all()):
            batch["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), tokens)], 1)
        found.append(batch)
    if not found:
        raise ValueError("prompts holds none; a calibration needs at least one")
    return found


@torch.no_grad()
def losses_of(
    model: nn.Module, plans: Sequence[Plan], batches: Sequence[Any], block: int = 64, sinks: int = 1,
    loss: Loss = task_loss, layers: Sequence[int | str] | None = None,
) -> list[float]:  # fmt: skip
    """The mean loss of a model under each of several plans; the model is given back as it was.

    Args:
        model, block, sinks, layers: as of :func:`attnlib.convert.spans.put`.
        plans: to try.
        batches: read once for every plan; the authors take inputs longer than all that were profiled.
        loss: ``loss(model, batch)``; the model's own by default.
    """
    if not len(plans) or not len(batches):
        raise ValueError(f"plans and batches must hold at least one each, got {len(plans)} and {len(batches)}")
    found = []
    for plan in plans:
        with put(model, plan, block, sinks, layers=layers):
            found.append(sum(float(loss(model, batch)) for batch in batches) / len(batches))
    return found


class Mixture(NamedTuple):
    """What :func:`mixture` found: the plan, the model converted by it, all plans and the loss of each."""

    plan: Plan
    conversion: Conversion
    plans: list[Plan]
    losses: list[float]


def mixture(
    model: nn.Module,
    batches: Mapping[int, Sequence[Any]],
    bounds: Mapping[int, float],
    held: Sequence[Any] | None = None,
    block: int = 64,
    sinks: int = 1,
    length: int | None = None,
    choices: Sequence[tuple[float, float]] | None = None,
    maps: Mapping[int, Tensor] | None = None,
    loss: Loss = task_loss,
    **options: Any,
) -> Mixture:
    """Profile a model, search plans under bounds of density, choose one, and give the model its spans, in place.

    Args:
        model: causal, of transformers or ours, all of whose layers can be converted.
        batches: by length, inputs of that length: :func:`answered`, or texts.
        bounds: length -> mean density of all heads, in (0, 1]; lengths without batches too.
        held: inputs by whose loss one plan is chosen; needed where several plans are found.
        block, sinks, length: of :class:`attnlib.nn.sparse.moa_spans.SpanHeads`.
        choices: rules, of :func:`attnlib.convert.spans.rules`; a grid of 8 alphas and 9 betas by default.
        maps: profiles that were taken before, instead of ``batches``.
        loss: of profile and choice.
        **options: of :func:`attnlib.convert.spans.search`.

    Raises:
        ValueError: bounds that cannot be met, inputs of other lengths than said, or several plans and nothing held.
    """
    if maps is None:
        maps = {}
        for n, given in batches.items():
            wrong = {batch["input_ids"].shape[-1] for batch in given if isinstance(batch, Mapping)} - {n}
            if wrong:
                raise ValueError(f"batches[{n}] holds inputs of length {sorted(wrong)[0]}")
            maps[n] = influence(model, given, block, loss)
    if choices is None:
        least, most, longest = min(bounds), max(maps), max([*bounds, *maps])
        choices = rules(-least, most, least, longest, max(block, (least + most) // 8), profiled=most)
    plans = search(maps, choices, bounds, block, sinks, **options)
    if len(plans) > 1 and held is None:
        raise ValueError(f"{len(plans)} plans were found that no other beats; hand over held inputs to choose by")
    found = [float("nan")] if held is None else losses_of(model, plans, held, block, sinks, loss)
    plan = plans[min(range(len(plans)), key=found.__getitem__)]
    return Mixture(plan, put(model, plan, block, sinks, length), plans, found)
