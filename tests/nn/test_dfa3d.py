"""dfa3d: the module against trilinear sampling of the explicit volume, and the criteria of its card."""

import pytest
import torch
import torch.nn.functional as F
from parity import Fixture

import attnlib
from attnlib import Layout
from attnlib.nn.sampled.dfa3d import CameraAttention, DepthCarry

F64 = torch.float64
LEVELS = Layout((("fine", (4, 5)), ("coarse", (2, 3))))


def make(**config):
    torch.manual_seed(0)
    module = attnlib.create("dfa3d", **{"dim": 8, "num_heads": 2, "num_points": 4, "depth_bins": 5, **config}).double()
    for p in module.parameters():
        torch.nn.init.normal_(p, 0, 0.4)
    return module


def lifted(tokens=26, bins=5, batch=2, features=8):
    depth = torch.randn(batch, tokens, bins, dtype=F64).softmax(-1)
    return torch.cat([torch.randn(batch, tokens, features, dtype=F64), depth], -1)


def oracle(module, x, context, shapes, reference):
    """The paper's definition: build E for every level, sample it trilinearly."""
    b, n, heads, levels, points = *x.shape[:2], module.num_heads, len(shapes), module.num_points
    features, depth = context.split([8, module.depth_bins], -1)
    value = module.value_proj(features).view(b, -1, heads, 8 // heads)
    flat = module.sampling_offsets(x).view(b, n, heads, levels, points, 2)
    deep = module.sampling_offsets_depth(x).view(b, n, heads, levels, points, 1)
    weights = module.attention_weights(x).view(b, n, heads, -1).softmax(-1).view(b, n, heads, levels, points)
    out = torch.zeros(b, n, heads, 8 // heads, dtype=F64)
    start, anchors = 0, reference.shape[2]
    for level, (h, w) in enumerate(shapes):
        part = slice(start, start + h * w)
        volume = torch.einsum("bmhd,bmz->bhdzm", value[:, part], depth[:, part]).unflatten(-1, (h, w)).flatten(0, 1)
        for p in range(points):
            at = reference[:, :, p % anchors, None] + torch.cat([flat, deep], -1)[:, :, :, level, p] / torch.tensor(
                [w, h, module.depth_bins]
            )
            where = 2 * at.transpose(1, 2).flatten(0, 1)[:, None, None] - 1
            sample = F.grid_sample(volume, where, align_corners=False)[:, :, 0, 0].view(b, heads, -1, n)
            out += weights[:, :, :, level, p, None] * sample.permute(0, 3, 1, 2)
        start += h * w
    return module.output_proj(out.flatten(2))


@pytest.mark.parametrize("anchors", [1, 2])
def test_output_and_gradients_equal_the_explicit_volume(anchors):
    module = make(num_levels=2, context_layout=LEVELS, num_anchors=anchors)
    x = torch.randn(2, 7, 8, dtype=F64, requires_grad=True)
    context = lifted().requires_grad_()
    reference = torch.rand(2, 7, anchors, 3, dtype=F64)
    leaves = [x, context, *(p for n, p in module.named_parameters() if not n.startswith("reference."))]
    y, want = module(x, context, carry=reference), oracle(module, x, context, [(4, 5), (2, 3)], reference)
    torch.testing.assert_close(y, want, atol=1e-6, rtol=1e-6)
    g = torch.randn_like(y)
    for mine, theirs in zip(torch.autograd.grad(y, leaves, g), torch.autograd.grad(want, leaves, g), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_uniform_depth_gives_a_share_of_flat_deformable_attention():
    module = make(depth_bins=6)
    with torch.no_grad():
        module.sampling_offsets_depth.weight.zero_()
        module.sampling_offsets_depth.bias.zero_()
    flat = attnlib.create("deformable-attention", dim=8, num_heads=2, num_points=4, reference="learned").double()
    own = ("sampling_offsets_depth.", "reference.")
    shared = {k: v for k, v in module.state_dict().items() if not k.startswith(own)}
    flat.load_state_dict({**flat.state_dict(), **shared})
    with torch.no_grad():
        for m in (module, flat):
            m.output_proj.bias.zero_()
    features = torch.randn(2, 4, 5, 8, dtype=F64)
    context = torch.cat([features, torch.full((2, 4, 5, 6), 1 / 6, dtype=F64)], -1)
    x, reference = torch.randn(2, 7, 8, dtype=F64), torch.rand(2, 7, 3, dtype=F64) * 0.8 + 0.1
    # a value bias would be lifted too, so this holds with it
    torch.testing.assert_close(module(x, context, carry=reference), flat(x, features, carry=reference[..., :2]) / 6)


def test_initial_depth_offsets():
    module = attnlib.create("dfa3d", dim=8, num_heads=4, num_points=3, num_levels=2, depth_bins=4)
    bias = module.sampling_offsets_depth.bias.view(4, 2, 3)
    want = torch.tensor([0.5, 0.5, -0.5, -0.5])[:, None, None] * torch.tensor([1.0, 2, 3])
    torch.testing.assert_close(bias, want.expand(4, 2, 3))
    assert not module.sampling_offsets_depth.weight.any()


def test_depth_weight_tells_how_much_lies_at_the_depth_looked_for():
    module = make(depth_bins=4)
    with torch.no_grad():
        for layer in (module.sampling_offsets, module.sampling_offsets_depth):
            layer.weight.zero_()
            layer.bias.zero_()
    depth = F.one_hot(torch.full((1, 4, 4), 2), 4).to(F64)
    context = torch.cat([torch.randn(1, 4, 4, 8, dtype=F64), depth], -1)
    x = torch.randn(1, 2, 8, dtype=F64)
    for bin_, share in ((2, 1.0), (1, 0.0)):
        reference = torch.tensor([0.5, 0.5, (bin_ + 0.5) / 4], dtype=F64).expand(1, 2, 3)
        out = module(x, context, carry=reference, returns=("carry",))
        assert isinstance(out.carry, DepthCarry) and out.carry.depth_weight.shape == (1, 2, 2)
        torch.testing.assert_close(out.carry.depth_weight, torch.full((1, 2, 2), share, dtype=F64))
        torch.testing.assert_close(module(x, context, carry=out.carry), out.y)


def test_a_grid_of_queries_refers_to_its_own_cells():
    module = make(reference="grid")
    x, context = torch.randn(1, 2, 3, 4, 8, dtype=F64), lifted(batch=1)[:, :20].view(1, 4, 5, 13)
    out = module(x, context, returns=("carry",))
    torch.testing.assert_close(out.carry.reference[0, 1, 0, 2, 0], torch.tensor([2.5 / 4, 0.5 / 3, 1.5 / 2], dtype=F64))
    torch.testing.assert_close(module(x, context, carry=out.carry), out.y)


def test_features_and_depth_of_padding_are_never_read():
    module = make()
    context = lifted()[:, :20].view(2, 4, 5, 13)
    valid = torch.ones(2, 4, 5, dtype=torch.bool)
    valid[:, :, 3:] = False
    x = torch.randn(2, 7, 8, dtype=F64)
    y = module(x, context, context_valid=valid)
    changed = context.masked_fill(~valid.unsqueeze(-1), float("nan"))
    torch.testing.assert_close(module(x, changed, context_valid=valid), y)


def test_the_authors_names_are_understood():
    module = make()
    theirs = {f"deformable_attention.{k}": v for k, v in module.state_dict().items() if "reference" not in k}
    theirs = {k.replace("deformable_attention.output", "output"): v for k, v in theirs.items()}
    theirs["empty_query.weight"] = torch.zeros(3)
    ours = attnlib.convert_state_dict("dfa3d", theirs)
    assert set(ours) == {k for k in module.state_dict() if not k.startswith("reference.")}


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"depth_bins": 0}, "depth_bins must be at least 1"),
        ({"num_anchors": 3}, "num_points=4 must be a multiple of num_anchors=3"),
        ({"num_heads": 3}, "num_heads=3"),
        ({"context_layout": LEVELS}, "context_layout has 2 levels"),
    ],
)
def test_bad_settings_are_refused(config, match):
    with pytest.raises(ValueError, match=match):
        make(**config)


def test_bad_inputs_are_refused():
    module, x = make(), torch.zeros(2, 7, 8, dtype=F64)
    context = torch.zeros(2, 4, 5, 13, dtype=F64)
    with pytest.raises(ValueError, match="needs a context"):
        module(x)
    with pytest.raises(ValueError, match="context_dim=13"):
        module(x, context[..., :8])
    with pytest.raises(ValueError, match="carry must hold reference points"):
        module(x, context, carry=torch.zeros(2, 7, 2, dtype=F64))
    with pytest.raises(TypeError, match="carry must be a tensor"):
        module(x, context, carry=0.5)
    with pytest.raises(ValueError, match="x must have shape"):
        make(reference="grid")(x, context)


class Cameras(Fixture):
    """Their cross-attention to several cameras; its CUDA kernels replaced by trilinear samples of the whole volume."""

    def _convert(self, case, what):
        return CameraAttention.convert_state_dict(self.under(f"{case}/{what}"))

    def build(self, case, **changes):
        c = self.config[case]
        levels = Layout((("fine", (2, 3)), ("coarse", (1, 2))))
        common = dict(num_levels=2, num_points=4, num_anchors=c["num_anchors"], context_layout=levels)
        common |= dict(reference="carried", out_proj=False)
        if c["depth_bins"]:
            core = attnlib.create("dfa3d", dim=4, num_heads=2, depth_bins=c["depth_bins"], **common)
        else:
            core = attnlib.create("deformable-attention", dim=4, num_heads=2, **common)
        module = CameraAttention(core, **{"num_queries": c["num_queries"], "compat": "authors", **changes})
        module.load_state_dict(self._convert(case, "sd"))
        return module


CAMERAS = Cameras("dfa3d-cameras")


@pytest.mark.parametrize("case", CAMERAS.config)
def test_cameras_equal_the_authors(case):
    def call(m, inputs):
        return m(inputs["x"], inputs["maps"], inputs["reference"], inputs["seen"])

    CAMERAS.holds(case, CAMERAS.build(case), call)


def test_a_query_is_read_where_it_is_seen():
    m = CAMERAS.build("flat", compat=None).double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in CAMERAS.under("flat/x").items()}
    x, maps, reference, seen = (inputs[name] for name in ("x", "maps", "reference", "seen"))
    seen = seen.clone()
    seen[1, :, 2] = False
    y = m(x, maps, reference, seen)
    torch.testing.assert_close(y[1, 2], m.proj.bias)  # no camera sees it
    each = [m.attention(x, maps[:, v], carry=reference[:, v]) * seen[:, v].any(-1, keepdim=True) for v in range(2)]
    count = seen.any(-1).sum(1).clamp(min=1)[..., None]
    torch.testing.assert_close(y, m.proj(sum(each) / count))
    alone = m(x[1:], maps[1:], reference[1:], seen[1:])
    torch.testing.assert_close(y[1:], alone)


def test_bad_cameras():
    m = CAMERAS.build("flat")
    inputs = CAMERAS.under("flat/x")
    with pytest.raises(ValueError, match=r"seen must have shape \(2, 2, 4, 2\)"):
        m(inputs["x"], inputs["maps"], inputs["reference"], inputs["seen"][..., 0])
    with pytest.raises(ValueError, match="out_proj=False"):
        CameraAttention(attnlib.create("deformable-attention", dim=4, num_heads=2))
    with pytest.raises(ValueError, match="num_queries=4 needs depth weights"):
        CameraAttention(m.attention, num_queries=4)
