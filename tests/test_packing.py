"""Packed documents are what they are alone, for every causal mechanism; what says something else is refused."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from test_generation_all import ROWS, decoder, streams  # noqa: E402
from transformers import DataCollatorWithFlattening  # noqa: E402

from attnlib.hooks.hf.names import cache_out  # noqa: E402
from attnlib.models.pldr import PLDRConfig, PLDRForCausalLM  # noqa: E402

each = pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in ROWS])
LENGTHS = (5, 1, 9, 3, 4, 2)
DOCUMENTS = [
    torch.randint(1, 31, (n,), generator=torch.Generator().manual_seed(i)) for i, n in enumerate(LENGTHS)
]  # fmt: skip


def flattened(documents=DOCUMENTS) -> dict[str, torch.Tensor]:
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    return dict(collate([{"input_ids": d.tolist()} for d in documents]))


def documents_for(row) -> list[torch.Tensor]:
    """A window that moves in strides does not fit into a sequence shorter than itself."""
    return [torch.cat([d, DOCUMENTS[2][:5]]) for d in DOCUMENTS] if row.name.startswith("generalized") else DOCUMENTS


def numbers() -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(1, len(LENGTHS) + 1), torch.tensor(LENGTHS))[None]


def pairs() -> torch.Tensor:
    n = sum(LENGTHS)
    return (numbers()[:, :, None] == numbers()[:, None])[:, None] & torch.ones(n, n, dtype=torch.bool).tril()


def forms() -> dict[str, dict]:
    """All ways to say which documents lie in a row."""
    made = flattened()
    added = torch.zeros(pairs().shape).masked_fill(~pairs(), torch.finfo(torch.float32).min)
    return {
        "position_ids": {"position_ids": made["position_ids"]},
        "one row of positions": {"position_ids": made["position_ids"][0]},
        "cu_seq_lens": {k: made[k] for k in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")},
        "seq_idx": {"seq_idx": made["seq_idx"]},
        "everything": {k: v for k, v in made.items() if k not in ("input_ids", "labels")},
        "numbered mask": {"attention_mask": numbers()},
        "pairs": {"attention_mask": pairs()},
        "pairs, added": {"attention_mask": added},
        "mask and positions": {"attention_mask": torch.ones_like(numbers()), "position_ids": made["position_ids"]},
    }


def alone(model, documents=DOCUMENTS) -> torch.Tensor:
    return torch.cat([model(d[None], use_cache=False).logits for d in documents], 1)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5 * max(1.0, float(b.detach().abs().max())), rtol=1e-5)


@each
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_packed_documents_are_what_they_are_alone(row, train):
    model = decoder(row).train(train)
    for module in model.modules():  # a random choice of weights is another one for every call
        for name in ("attn_drop", "p"):
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)
    if not all(layer.mixer.traits.batch_independent for layer in model.model.layers):
        pytest.skip("it changes with every call in training")
    documents = documents_for(row)
    got = model(**flattened(documents), use_cache=False)
    want = alone(model, documents)
    close(got.logits, want)
    lengths = [len(d) for d in documents]
    count = sum(lengths) - len(lengths)
    loss = sum(
        torch.nn.functional.cross_entropy(part[0, :-1], d[1:], reduction="sum")
        for part, d in zip(want.split(lengths, 1), documents, strict=True)
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    whole = got.loss
    for name, value in (got.mechanism_losses or {}).items():
        assert name in model.model.layers[0].mixer.traits.losses and value.isfinite()
    for a, b in zip(
        torch.autograd.grad(whole, parameters, allow_unused=True),
        torch.autograd.grad(loss / count, parameters, allow_unused=True),
        strict=True,
    ):
        assert (a is None) == (b is None)
        if a is not None:
            close(a, b)


@pytest.mark.parametrize("form", forms())
def test_every_way_of_saying_it(form):
    """Two rows with padding where the form allows, for a mechanism that keeps keys and one that keeps a matrix."""
    for name in ("softmax-attention", "lightning-attention-2", "rcmha"):
        model = decoder(next(row for row in ROWS if row.name == name))
        close(model(torch.cat(DOCUMENTS)[None], use_cache=False, **forms()[form]).logits, alone(model))


def test_rows_of_documents_with_padding():
    model = decoder(next(row for row in ROWS if row.name == "softmax-attention"))
    ids = torch.zeros(2, 16, dtype=torch.long)
    ids[0, 1:6], ids[0, 6:15] = DOCUMENTS[0], DOCUMENTS[2]
    ids[1, :3], ids[1, 3:7] = DOCUMENTS[3], DOCUMENTS[4]
    mask = torch.zeros(2, 16, dtype=torch.long)
    mask[0, 1:6], mask[0, 6:15], mask[1, :3], mask[1, 3:7] = 1, 2, 1, 2
    position = torch.tensor([[9, *range(5), *range(9), 9], [*range(3), *range(4), *[0] * 9]])
    for call in ({"attention_mask": mask}, {"attention_mask": (mask > 0).long(), "position_ids": position}):
        got = model(ids, use_cache=False, **call).logits
        for row, start, d in ((0, 1, 0), (0, 6, 2), (1, 0, 3), (1, 3, 4)):
            want = model(DOCUMENTS[d][None], use_cache=False).logits[0]
            close(got[row, start : start + LENGTHS[d]], want)
    assert torch.equal(model(ids, use_cache=False, attention_mask=mask).document_starts.nonzero(), torch.tensor(
        [[0, 1], [0, 6], [1, 0], [1, 3]]))  # fmt: skip


@pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in ROWS if streams(row)])
def test_a_packed_prompt_is_kept_document_by_document(row):
    """Not the state of the last one only: all go on as a batch."""
    model = decoder(row)
    with torch.no_grad():
        out = model(**flattened(), use_cache=True)
        more = torch.randint(1, 31, (len(LENGTHS), 3), generator=torch.Generator().manual_seed(9))
        got = model(more, cache=cache_out(out), use_cache=True).logits
        for i, d in enumerate(DOCUMENTS):
            want = model(torch.cat([d, more[i]])[None], use_cache=False).logits[:, -3:]
            close(got[i : i + 1], want)
        with pytest.raises(ValueError, match="cache holds 6 samples, the new tokens are of 1"):
            model(more[:1], cache=cache_out(out), use_cache=True)


def test_each_packed_document_has_its_own_metric():
    torch.manual_seed(0)
    config = PLDRConfig(
        vocab_size=31,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        metric_hidden=4,
        residual_units=1,
        loss_weights={"dag_g": 1.0},
    )
    model = PLDRForCausalLM(config).eval()
    got = model(**flattened(), use_cache=False)
    close(got.logits, alone(model))
    mean = torch.stack([model(d[None], use_cache=False).mechanism_losses["dag_g"] for d in DOCUMENTS]).mean()
    close(got.mechanism_losses["dag_g"], mean)
    with torch.no_grad():
        out = model(**flattened(), use_cache=True)
        close(out.logits, alone(model))


def test_documents_under_gradient_checkpointing():
    model = decoder(next(row for row in ROWS if row.name == "rcmha")).train()
    for layer in model.model.layers:
        layer.mixer.attn_drop = 0.0
    want = torch.autograd.grad(model(**flattened()).loss, list(model.parameters()), allow_unused=True)
    for reentrant in (True, False):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(**flattened()).loss.backward()
        for p, grad in zip(model.parameters(), want, strict=True):
            if grad is not None:
                close(p.grad, grad)


def test_positions_that_say_nothing_new_change_nothing():
    model = decoder(next(row for row in ROWS if row.name == "lightning-attention-2"))
    ids = torch.randint(1, 31, (2, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    with torch.no_grad():
        want = model(ids, attention_mask=mask, use_cache=False).logits
        position = (mask.cumsum(1) - 1).clamp(min=0)
        close(model(ids, attention_mask=mask, position_ids=position, use_cache=False).logits, want)
        first = model(ids[:, :4], attention_mask=mask[:, :4], position_ids=position[:, :4], use_cache=True)
        for given in ({}, {"attention_mask": mask}):
            copy = first if not given else model(ids[:, :4], attention_mask=mask[:, :4], use_cache=True)
            rest = model(ids[:, 4:], position_ids=position[:, 4:], cache=cache_out(copy), use_cache=True, **given)
            close(rest.logits, want[:, 4:])


WRONG = {
    "a jump": ({"position_ids": torch.tensor([[0, 1, 2, 7, 8, 9]])}, "jump at token 3 with 7; possible"),
    "a start": ({"position_ids": torch.arange(3, 9)}, "begin or jump at token 0 with 3"),
    "its shape": ({"position_ids": torch.zeros(2, 6).long()}, "position_ids must be"),
    "another type": ({"position_ids": torch.zeros(1, 6)}, "position_ids must hold integers"),
    "no tensor": ({"position_ids": [0, 1, 2, 0, 1, 2]}, "position_ids must be"),
    "an end": ({"cu_seq_lens_q": torch.tensor([0, 3, 5])}, "must rise from 0 to the 6 tokens"),
    "two ends": (
        {"cu_seq_lens_q": torch.tensor([0, 3, 6]), "cu_seq_lens_k": torch.tensor([0, 2, 6])},
        "cu_seq_lens_q and cu_seq_lens_k name different documents",
    ),
    "the longest": ({"cu_seq_lens_q": torch.tensor([0, 2, 6]), "max_length_q": 3}, "max_length_q=3 is less than the 4"),
    "only the longest": ({"max_length_k": 3}, "max_length_k was given without cu_seq_lens_k"),
    "two sources": (
        {"seq_idx": torch.tensor([0, 0, 0, 1, 1, 1]), "position_ids": torch.arange(6)[None]},
        "position_ids and seq_idx name different documents",
    ),
    "a torn document": ({"attention_mask": torch.tensor([[1, 1, 2, 2, 1, 1]])}, "torn apart"),
    "a negative number": ({"attention_mask": torch.tensor([[1, 1, -2, 1, 1, 1]])}, "must hold 0 for tokens"),
    "later tokens": ({"attention_mask": torch.ones(1, 1, 6, 6, dtype=torch.bool)}, "must be causal inside documents"),
    "a window": (
        {"attention_mask": torch.ones(1, 1, 6, 6, dtype=torch.bool).tril().triu(-2)},
        "token 3 may not read token 0",
    ),
    "a bias": ({"attention_mask": torch.full((1, 1, 6, 6), -0.5)}, "a bias is not possible"),
    "other tokens": ({"attention_mask": torch.ones(1, 1, 5, 5, dtype=torch.bool)}, "must be (B, 1, N, N)"),
    "weights": ({"output_attentions": True}, "output_attentions=True is not possible"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(case):
    model = decoder(next(row for row in ROWS if row.name == "softmax-attention"))
    given, says = WRONG[case]
    with pytest.raises((TypeError, ValueError)) as raised:
        model(torch.ones(1, 6, dtype=torch.long), use_cache=False, **given)
    assert says in str(raised.value)


def test_unknown_arguments_are_refused_by_name():
    model = decoder(next(row for row in ROWS if row.name == "softmax-attention"))
    ids = torch.ones(1, 4, dtype=torch.long)
    for call in (model, model.model):
        with pytest.raises(TypeError, match="unexpected keyword argument 'positon_ids'"):
            call(ids, positon_ids=torch.arange(4))
    with pytest.raises(ValueError, match="begins a document, but a cache goes on"):
        cache = cache_out(model(ids, use_cache=True))
        model(ids, cache=cache, position_ids=torch.tensor([[4, 5, 0, 1]]), use_cache=True)


def test_absent_embeddings_may_hold_anything():
    model = decoder(next(row for row in ROWS if row.name == "softmax-attention"))
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    embedded = model.get_input_embeddings()(torch.tensor([[3, 4, 5, 6, 7]])).detach()
    want = None
    for dirt in (0.0, float("nan"), float("inf")):
        x = embedded.masked_fill(mask.unsqueeze(-1) == 0, dirt).requires_grad_()
        model.zero_grad()
        model(inputs_embeds=x, attention_mask=mask, labels=torch.tensor([[-100, -100, 5, 6, 7]])).loss.backward()
        grads = [x.grad, *(p.grad for p in model.model.layers.parameters())]
        want = grads if want is None else want
        for a, b in zip(grads, want, strict=True):
            torch.testing.assert_close(a, b)
