"""maxvit: parity with timm's partition attention, what the card asks for, validity, bad input."""

from functools import partial
from pathlib import Path

import pytest
import torch
from parity import Fixture
from safetensors.torch import load_file
from torch import nn

import attnlib
from attnlib import grids, masks
from attnlib.models.blocks import Block
from attnlib.nn.partition.maxvit import MaxSA, PartitionAttention
from attnlib.ops import attention

DATA = load_file(Path(__file__).parents[1] / "fixtures" / "maxvit.safetensors")
# timm's two ways of ordering heads and of storing the relative table.
VARIANTS = {"tf": dict(head_first=False), "rw": dict(head_first=True)}


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def state_of(variant, prefix=""):
    prefix = f"{variant}.sd.{prefix}"
    return {k.removeprefix(prefix): v for k, v in DATA.items() if k.startswith(prefix)}


def make(kind="block", cls=PartitionAttention, **config):
    torch.manual_seed(0)
    extra = {} if cls is MaxSA else {"kind": kind}
    module = cls(**{"dim": 8, "num_heads": 2, "window_size": 2, **extra, **config}).double()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return module


def data(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["block", "grid"])
def test_each_half_equals_timm(kind, variant):
    """Output, and gradients of input, qkv weights and relative table."""
    sd = PartitionAttention.convert_state_dict(state_of(variant, f"attn_{kind}.attn."), **VARIANTS[variant])
    m = PartitionAttention(8, 2, 2, kind)
    m.load_state_dict(sd)
    x = DATA["x"].clone().requires_grad_()
    y = m(x)
    close(y, DATA[f"{variant}.{kind}.y"])
    (y * DATA["g"]).sum().backward()
    close(x.grad, DATA[f"{variant}.{kind}.dx"])
    theirs = PartitionAttention.convert_state_dict(
        {
            "qkv.weight": DATA[f"{variant}.{kind}.dqkv"],
            "rel_pos.relative_position_bias_table": DATA[f"{variant}.{kind}.dtable"],
        },
        **VARIANTS[variant],
    )
    close(m.qkv.weight.grad, theirs["qkv.weight"])
    close(m.rel_bias.grad, theirs["rel_bias"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_pair_equals_timm(variant):
    m = attnlib.create("maxvit", dim=8, num_heads=2, window_size=2)
    m.load_state_dict(attnlib.convert_state_dict("maxvit", state_of(variant), **VARIANTS[variant]))
    x = DATA["x"].clone().requires_grad_()
    y = m(x)
    close(y, DATA[f"{variant}.pair.y"])
    (y * DATA["g"]).sum().backward()
    close(x.grad, DATA[f"{variant}.pair.dx"])
    close(m.norm.weight.grad, DATA[f"{variant}.pair.dnorm"])
    theirs = PartitionAttention.convert_state_dict(
        {"qkv.weight": DATA[f"{variant}.pair.dqkv"]}, num_heads=2, **VARIANTS[variant]
    )
    close(m.block.qkv.weight.grad, theirs["qkv.weight"])


@pytest.mark.parametrize(("grid", "window"), [((8,), 4), ((4, 6), 2), ((6, 6), (3, 2)), ((2, 4, 4), (1, 2, 4))])
def test_partitions_come_back(grid, window):
    x = data(2, *grid, 3)
    assert torch.equal(grids.unblock_windows(grids.block_windows(x, window)), x)
    assert torch.equal(grids.ungrid_windows(grids.grid_windows(x, window)), x)


def test_block_and_grid_coincide_when_one_window_is_the_map():
    block, grid = make("block", window_size=4), make("grid", window_size=4)
    x = data(2, 4, 4, 8)
    assert torch.equal(block(x), grid(x))
    q, k, v = (t.reshape(2, 16, 2, 4).transpose(1, 2) for t in block.qkv(x).chunk(3, -1))
    places = grids.coordinates((4, 4))
    step = places[None] - places[:, None] + 3
    bias = block.rel_bias[:, step[..., 0], step[..., 1]]
    expected = block.proj(attention(q, k, v, bias=bias).transpose(1, 2).reshape(2, 4, 4, 8))
    torch.testing.assert_close(block(x), expected, atol=1e-12, rtol=0)


def test_grid_attention_is_block_attention_on_permuted_tokens():
    block, grid = make("block"), make("grid")
    x = data(2, 4, 6, 8)
    permuted = grids.unblock_windows(grids.grid_windows(x, 2))
    back = grids.ungrid_windows(grids.block_windows(block(permuted), 2))
    torch.testing.assert_close(grid(x), back, atol=1e-12, rtol=0)


def test_the_pair_is_global_and_a_half_is_local():
    x = data(1, 6, 8, 8).requires_grad_()

    def reach(m):
        (grad,) = torch.autograd.grad(m(x)[0, 3, 5].sum(), x)
        return grad[0].abs().sum(-1) > 0

    assert reach(make(cls=MaxSA, grid_size=(3, 4))).all()
    # A grid wider apart than the windows leaves tokens out, also in the authors' first stage (56 / 7 > 7).
    assert reach(make(cls=MaxSA)).sum() == 16
    near = torch.zeros(6, 8, dtype=torch.bool)
    near[2:4, 4:6] = True
    assert torch.equal(reach(make("block")), near)
    spread = torch.zeros(6, 8, dtype=torch.bool)
    spread[0::3, 1::4] = True  # the grid window of token (3, 5)
    assert torch.equal(reach(make("grid")), spread)


def test_the_pair_is_two_residual_sublayers():
    m, x = make(cls=MaxSA), data(2, 4, 6, 8)
    hidden = x + m.block(x)
    torch.testing.assert_close(x + m(x), hidden + m.grid(m.norm(hidden)), atol=1e-12, rtol=0)


def test_padding_is_never_attended():
    """A padded map gives on its real part what a mask over the real tokens gives."""
    m = make("grid", rel_bias=False)
    x, valid = data(1, 4, 6, 8), torch.zeros(1, 4, 6, dtype=torch.bool)
    valid[:, :3, :5] = True
    y = m(x, valid=valid)
    changed = torch.where(valid[..., None], x, 100 * x)
    assert torch.equal(m(changed, valid=valid), y)
    allowed = grids.window_partition((4, 6), 2, "grid").q_index
    member = torch.zeros(24, dtype=torch.long).scatter(0, allowed.flatten(), torch.arange(6).repeat_interleave(4))
    q, k, v = (t.reshape(1, 24, 2, 4).transpose(1, 2) for t in m.qkv(x).chunk(3, -1))
    out = attention(q, k, v, mask=masks.documents(member), valid=valid.flatten(1))
    expected = m.proj(out.transpose(1, 2).reshape(1, 4, 6, 8)).masked_fill(~valid[..., None], 0)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)


def test_a_mask_acts_inside_the_windows():
    m, x = make(), data(1, 4, 4, 8).requires_grad_()
    (grad,) = torch.autograd.grad(m(x, mask=masks.causal())[0, 2, 2].sum(), x)
    assert (grad[0].abs().sum(-1) > 0).nonzero().tolist() == [[2, 2]]


def test_forced_specification_gives_the_same():
    m, x = make(cls=MaxSA), data(2, 4, 6, 8)
    with attnlib.use_backend("eager"):
        expected = m(x)
    torch.testing.assert_close(m(x), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(num_heads=3), "num_heads=3 does not divide dim=8"),
        (dict(window_size=0), "at least 1"),
        (dict(window_size=(2, 2, 2, 2)), "must have 1 or 2 or 3 axes"),
        (dict(window_size=(2, 2), rank=3), "names 2 axes, but the grid has 3"),
        (dict(kind="tree"), "kind='tree' is not possible"),
    ],
)
def test_bad_settings_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        make(**config)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"window_size=\(2, 2\) does not divide the grid \(4, 5\)"):
        make(pad="refuse")(data(1, 4, 5, 8))
    with pytest.raises(ValueError, match=r"grid_size=\(3, 3\) does not divide the grid \(4, 6\)"):
        make(cls=MaxSA, grid_size=3, pad="refuse")(data(1, 4, 6, 8))
    with pytest.raises(ValueError, match="window_size=.* does not fit the grid"):
        make(window_size=8, pad="refuse")(data(1, 4, 4, 8))
    with pytest.raises(ValueError, match="as many axes"):
        make(cls=MaxSA, window_size=(2,), grid_size=(2, 2))
    with pytest.raises(ValueError, match="trait mask is False"):
        make(cls=MaxSA)(data(1, 4, 4, 8), mask=masks.causal())
    with pytest.raises(ValueError, match="num_heads is needed"):
        PartitionAttention.convert_state_dict({"qkv.weight": torch.zeros(24, 8)}, head_first=True)
    with pytest.raises(ValueError, match="not that of a square window"):
        PartitionAttention.convert_state_dict({"rel_pos.relative_position_bias_table": torch.zeros(15, 2)})


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("table", ["RelPosBias", "RelPosBiasTf"])
def test_rectangular_windows_of_timm(table, first):
    """Both forms of its table on a window of 3 by 2, heads first and not."""
    prefix = f"rect.{table}.{first}."
    theirs = {k.removeprefix(prefix + "sd."): v for k, v in DATA.items() if k.startswith(prefix + "sd.")}
    m = PartitionAttention(8, 2, (3, 2))
    m.load_state_dict(PartitionAttention.convert_state_dict(theirs, head_first=bool(first), window_size=(3, 2)))
    close(m(DATA[prefix + "x"]), DATA[prefix + "y"])
    if table == "RelPosBias":
        with pytest.raises(ValueError, match="give window_size"):
            PartitionAttention.convert_state_dict(theirs, head_first=bool(first))
        with pytest.raises(ValueError, match=r"not that of window_size=\(4, 2\)"):
            PartitionAttention.convert_state_dict(theirs, head_first=bool(first), window_size=(4, 2))


class Blocks(Fixture):
    """timm's whole blocks: norms, attention, MLP."""

    def _mechanism(self, case):
        return MaxSA(4, 2, 2, parallel=True) if case.startswith("Parallel") else PartitionAttention(4, 2, 2)

    def _convert(self, case, what):
        cls = type(self._mechanism(case))
        return cls.convert_state_dict(self.under(f"{case}/{what}"), head_first=self.config[case]["head_first"])

    def build(self, case, **changes):
        norm = partial(nn.LayerNorm, eps=1e-6)
        block = Block(4, self._mechanism(case), mlp_ratio=2.0, norm=norm)
        block.load_state_dict(self._convert(case, "sd"))
        return block


BLOCKS = Blocks("maxvit-blocks")


@pytest.mark.parametrize("case", BLOCKS.config)
def test_whole_blocks_equal_timm(case):
    BLOCKS.holds(case, BLOCKS.build(case), lambda m, xs: m(xs["x"])[0])


def test_bias_of_the_network_is_one_of_displacements():
    """A table of its values gives the same attention; equal displacements get equal biases."""
    m = make(rel_bias="mlp", window_size=(2, 3), rel_hidden=6)
    table = make(window_size=(2, 3))
    m.rel_mlp.eval()
    values = m.rel_mlp((2, 3)).detach()
    assert values.shape == (2, 3, 5)
    torch.testing.assert_close(values[:, 1, 2], (m.rel_mlp.fc2(m.rel_mlp.fc1.bias.relu())).detach())  # no displacement
    kept = {k: v for k, v in m.state_dict().items() if not k.startswith("rel_mlp")}
    table.load_state_dict({**kept, "rel_bias": values})
    x = data(2, 4, 6, 8)
    torch.testing.assert_close(m(x), table(x))


def test_parallel_halves_stand_beside_one_another():
    m, x = make(cls=MaxSA, parallel=True, layer_scale=0.5), data(2, 4, 6, 8)
    y = m(x)
    torch.testing.assert_close(y[..., :4], m.block_scale(m.block(x)))
    torch.testing.assert_close(y[..., 4:], m.grid_scale(m.grid(x)))
    with pytest.raises(ValueError, match="dim=9"):
        make(cls=MaxSA, dim=9, num_heads=3, parallel=True)
