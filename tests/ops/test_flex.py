"""FlexAttention behind the same door; it compiles, so few calls are made and all but the refusals are marked slow."""

import pytest
import torch
from reference import generator, qkv

from attnlib import masks as M
from attnlib.ops import attention, explain, flex


def _compiler_works() -> bool:
    try:
        return torch.compile(lambda x: x + 1)(torch.zeros(1)).item() == 1.0
    except Exception:
        return False


@pytest.mark.slow
def test_flex_is_eager_on_structured_masks():
    if not _compiler_works():
        pytest.skip("torch.compile has no working C++ compiler here")
    torch._dynamo.reset()
    g = generator(1)
    q, k, v = qkv(heads=(4, 2, 2), n=100, m=100, d=16, dv=24, dtype=torch.float32, grad=False)
    valid = torch.rand(2, 100, generator=g) > 0.3
    valid[0] = False
    calls = [
        dict(mask=M.documents(torch.sort(torch.randint(0, 4, (2, 100), generator=g)).values), valid=valid),
        dict(mask=M.neighborhood((10, 13), 3) | M.prefix_lm(4), q_pos=torch.arange(30, 130), scale=0.3),
    ]
    for call in calls:
        with torch.no_grad():
            ours = attention(q, k.clone().requires_grad_(), v, backend="flex", **call)
        torch.testing.assert_close(ours, attention(q, k, v, backend="eager", **call), rtol=1e-4, atol=1e-5)
    assert not bool(attention(q, k, v, backend="flex", **calls[0])[0].any())


def test_block_masks_of_plain_values_are_remembered():
    flex._known_blocks.cache_clear()
    first = flex._known_blocks(M.recent(9), 300, 300, None, torch.device("cpu"))
    assert flex._known_blocks(M.recent(9), 300, 300, None, torch.device("cpu")) is first
    assert first.kv_num_blocks.flatten().tolist() == [1, 2, 2]


@pytest.mark.parametrize(
    "words,call",
    [
        ("only knows softmax", {"normalizer": "sigmoid"}),
        ("does not return weights", {"return_weights": True}),
        ("no dropout", {"dropout_p": 0.1}),
        ("biases are not lowered", {"bias": torch.zeros(24, 24)}),
        ("no backward pass on the CPU", {}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refusals_give_the_reason(words, call):
    q, k, v = qkv(dtype=torch.float32)
    with pytest.raises(ValueError, match=words):
        attention(q, k, v, backend="flex", **call)
    assert words in explain(q, k, v, **call)


def test_more_refusals():
    with pytest.raises(ValueError, match="no float64"):
        attention(*qkv(grad=False), backend="flex")
    with pytest.raises(ValueError, match="empty tensors"):
        attention(*qkv(n=0, dtype=torch.float32, grad=False), backend="flex")


def test_never_chosen_by_itself():
    q, k, v = qkv(n=1024, m=1024, dtype=torch.float32, grad=False)
    text = explain(q, k, v, mask=M.recent(9))
    assert text.startswith("runs: tiled") and "runs only when forced" in text
