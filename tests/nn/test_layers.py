import pytest
import torch
from torch import nn

import attnlib
from attnlib.nn.layers import merge_heads, split_heads, through


@pytest.mark.parametrize("grid", [(6,), (2, 3), (2, 3, 2)])
def test_heads_of_a_grid(grid):
    x = torch.randn(2, *grid, 12)
    heads = split_heads(x, 3)
    assert heads.shape == (2, 3, x[0, ..., 0].numel(), 4)
    assert torch.equal(heads[:, 1, -1], x.flatten(1, -2)[:, -1, 4:8])
    assert torch.equal(merge_heads(heads, grid), x) and torch.equal(merge_heads(heads), x.flatten(1, -2))


def test_idle_modules_are_called_only_where_somebody_listens():
    x, heard = torch.randn(2, 3), []
    for idle in (nn.Identity(), nn.Dropout(0.5).eval(), nn.Dropout(0.0)):
        assert through(idle, x) is x
        handle = idle.register_forward_hook(lambda module, args, out: heard.append(out))
        assert torch.equal(through(idle, x), x) and len(heard) == 1
        handle.remove()
        idle.forward = lambda x: x + 1  # as wrappers do that move weights
        assert torch.equal(through(idle, x), x + 1)
        heard.clear()
    torch.manual_seed(0)
    assert (through(nn.Dropout(0.5), torch.ones(100)) == 0).any()
    assert torch.equal(through(nn.Linear(3, 3, bias=False), torch.zeros(1, 3)), torch.zeros(1, 3))


def test_scores_of_a_frame_are_scaled_as_asked():
    m = attnlib.create("softmax-attention", dim=16, num_heads=2, scale=0.7)
    plain = attnlib.create("softmax-attention", dim=16, num_heads=2)
    plain.load_state_dict(m.state_dict())
    plain.q.weight.data *= 0.7 * 8**0.5
    plain.q.bias.data *= 0.7 * 8**0.5
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(m(x), plain(x), atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="scale"):
        attnlib.create("softmax-attention", dim=16, num_heads=2, scale=0.0)
