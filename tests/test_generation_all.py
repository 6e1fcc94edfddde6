"""Every causal mechanism of the table, in a language model: cached generation equals uncached, token by token."""

from __future__ import annotations

import pytest
import torch

import attnlib
from attnlib.check import Case
from attnlib.nn.registry import find

pytest.importorskip("transformers")

from table import rows  # noqa: E402

from attnlib.models.language import DecoderConfig, DecoderForCausalLM  # noqa: E402

VOCABULARY, LENGTH, NEW = 31, 9, 8


def causal_rows() -> list[Case]:
    """Rows that claim causal self-attention over sequences, in evaluation."""
    found = []
    for row in rows():
        if ":" in row.name:
            continue
        traits = find(row.name)(**row.config).eval().traits
        if "causal-self" in traits.patterns and 1 in traits.grid_ranks:
            found.append(row)
    return found


ROWS = causal_rows()
each = pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in ROWS])


def decoder(row: Case) -> DecoderForCausalLM:
    torch.manual_seed(0)
    settings = {k: v for k, v in row.config.items() if k != "dim"}
    config = DecoderConfig(
        vocab_size=VOCABULARY, hidden_size=row.config["dim"], num_hidden_layers=2, pad_token_id=0,
        num_attention_heads=row.config.get("num_heads", 2), mechanisms=[{"name": row.name, **settings}],
        initializer_range=0.5,
    )  # fmt: skip
    return DecoderForCausalLM(config).eval()


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of 4, 9 and 6 tokens, padded on the left."""
    ids = torch.randint(1, VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(LENGTH) >= torch.tensor([[5], [0], [3]])
    return ids * mask, mask.long()


def generate(model, ids, mask, cached, **settings):
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, use_cache=cached, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **settings,
    )  # fmt: skip


def streams(row: Case) -> bool:
    return bool(find(row.name)(**row.config).eval().traits.streaming)


def test_every_mechanism_that_can_be_causal_has_a_causal_row():
    ours = [name for name in attnlib.list_mechanisms() if find(name).__module__.startswith("attnlib.")]
    able = {name for name in ours if "causal-self" in find(name).class_traits.patterns}
    assert able == {row.name for row in ROWS}


@each
def test_greedy_with_left_padding(row):
    model = decoder(row)
    ids, mask = prompts()
    plain = generate(model, ids, mask, cached=False)
    assert plain.sequences.shape == (3, LENGTH + NEW)
    if not streams(row):
        with pytest.raises(ValueError, match="cannot decode step by step"):
            generate(model, ids, mask, cached=True)
        return
    cached = generate(model, ids, mask, cached=True)
    assert torch.equal(cached.sequences, plain.sequences)
    for a, b in zip(cached.logits, plain.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@each
def test_padding_does_not_change_what_a_prompt_gives(row):
    model = decoder(row)
    ids, mask = prompts()
    cached = streams(row)
    together = generate(model, ids, mask, cached=cached)
    for i in range(3):
        alone = generate(model, ids[i : i + 1, mask[i].bool()], None, cached=cached)
        for a, b in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(a[i : i + 1], b, atol=1e-5, rtol=1e-5)
        assert torch.equal(together.sequences[i, LENGTH:], alone.sequences[0, -NEW:])


@pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in ROWS if streams(row)])
def test_chunks_of_any_size_equal_the_whole(row):
    model = decoder(row)
    ids = torch.randint(1, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole, cache, parts = model(ids, use_cache=False).logits, None, []
        for part in ids.split([4, 1, 5, 1, 1, 4], 1):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in ROWS if streams(row)])
def test_beams_carry_their_states(row):
    model = decoder(row)
    ids, mask = prompts()
    settings = dict(num_beams=2, output_scores=True)
    cached, plain = (generate(model, ids, mask, cached=c, **settings) for c in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(cached.sequences_scores, plain.sequences_scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "row", [pytest.param(next(r for r in ROWS if r.name == n), id=n) for n in ("softmax-attention", "mamba")]
)
def test_a_prompt_read_in_chunks(row):
    """``prefill_chunk_size`` needs a cache before the first chunk, which the model makes."""
    model = decoder(row)
    ids, mask = prompts()
    chunked, plain = (generate(model, ids, mask, cached=True, **s) for s in (dict(prefill_chunk_size=2), {}))
    assert torch.equal(chunked.sequences, plain.sequences)
    for a, b in zip(chunked.logits, plain.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
