"""U-Net and its switches: the release's arithmetic in float64, written out; any size; backbones; what is refused."""

import copy
import importlib
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnlib
from attnlib.bench.data.blobs import blobs
from attnlib.models.dense.context import ASPP, DualAttention
from attnlib.models.dense.unet import PlainEncoder, UNet, Up
from attnlib.models.losses import dice_loss


def wild(model):
    """Numbers away from their start, so that nothing is the identity by chance."""
    torch.manual_seed(3)
    for name, p in model.named_parameters():
        p.data.add_(torch.randn_like(p) * (0.5 if "gamma" in name else 0.1))
    for name, b in model.named_buffers():
        if "running" in name:
            b.add_(torch.rand_like(b) * 0.2)
    return model.double().eval()


# The release, from its equations: Keras' layers as functions of our parameters.


def bn(norm, x):
    shape = (1, -1, *[1] * (x.dim() - 2))
    mean, var, w, b = (t.view(shape) for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias))
    return (x - mean) / (var + 1e-3).sqrt() * w + b


def block(b, x):
    for conv, norm, _ in b.convs:
        x = F.relu(bn(norm, F.conv3d(x, conv.weight, conv.bias, padding=1)))
    return x


def transposed(up, x, stride):
    """Keras' Conv3DTranspose, kernel 3, "same", stride 2 or more: zeros between places, a full convolution, cut."""
    b, c, *grid = x.shape
    spread = x.new_zeros(b, c, *((n - 1) * stride + 1 for n in grid))
    spread[:, :, ::stride, ::stride, ::stride] = x
    y = F.conv3d(spread, up.conv.weight.transpose(0, 1).flip(2, 3, 4), None, padding=2)
    size = [n * stride for n in grid]
    y = F.pad(y, [p for n, m in zip(reversed(size), reversed(y.shape[2:]), strict=True) for p in (0, max(n - m, 0))])
    return y[:, :, : size[0], : size[1], : size[2]] + up.conv.bias.view(1, -1, 1, 1, 1)


def linear(layer, x):
    y = torch.einsum("bcdhw,oc->bodhw", x, layer.weight)
    return y if layer.bias is None else y + layer.bias.view(1, -1, 1, 1, 1)


def dual(m, x):
    flat = x.flatten(2)  # (B, C, N)
    q, k, v = (linear(f, x).flatten(2) for f in (m.position.q, m.position.k, m.position.v))
    pam = m.position.gamma * (v @ (q.mT @ k).softmax(-1).mT).view(x.shape) + x
    rows = (flat @ flat.mT).softmax(-1)
    cam = m.channel.gamma * (rows.mT @ flat).view(x.shape) + x

    def convs(s, y):
        (conv, norm, _), _, last = s
        y = F.relu(bn(norm, F.conv3d(y, conv.weight, conv.bias, padding=1)))
        return F.conv3d(y, last.weight, last.bias, padding=1)

    y = convs(m.position_convs, pam) + convs(m.channel_convs, cam)
    conv, norm = m.project
    return bn(norm, F.conv3d(y, conv.weight, conv.bias))


def released(m, x):
    maps, image, e = [], x, m.encoder
    for i, b in enumerate(e.blocks):
        if str(i) in e.images:
            conv = e.images[str(i)][0]
            x = torch.cat([F.relu(F.conv3d(image, conv.weight, conv.bias, padding=1)), x], 1)
        x = block(b, x)
        maps.append(x)
        if i < len(e.blocks) - 1:
            x, image = F.max_pool3d(x, 2), F.avg_pool3d(image, 2)
    if m.bottleneck is not None:
        x = dual(m.bottleneck, x)
    bottom, out = x, []
    for i in reversed(range(len(m.levels))):
        level, skip = m.levels[i], maps[i]
        x = transposed(level.up, x, 2)
        if level.norm_all:
            guide = [transposed(level.guide_up, bottom, 2 ** (len(m.levels) - i))] if m.guided else []
            x = F.relu(bn(level.norm, torch.cat([*guide, skip, x], 1)))
        else:
            x = F.relu(bn(level.norm, x))
            if (gate := level.gate) is not None:
                pair = [bn(gate.signal_norm, linear(gate.signal, x)), bn(gate.skip_norm, linear(gate.skip, skip))]
                psi = bn(gate.psi_norm, linear(gate.psi, F.relu(torch.cat(pair, 1)))).sigmoid()
                assert psi.shape[1] == 1 and 0 < psi.min() and psi.max() < 1
                skip = skip * psi
            x = torch.cat([x, skip], 1)
        x = block(level.block, x)
        if i < len(m.heads):
            out.insert(0, F.conv3d(x, m.heads[i].weight, m.heads[i].bias))
    return out


@pytest.mark.parametrize("name", ["agunet3d", "daunet3d", "dagunet3d", "unet3d"])
def test_it_is_the_release(name):
    m = wild(attnlib.create_model(name, dims=(4, 6, 16)))
    x = torch.randn(2, 1, 16, 12, 16, dtype=torch.float64, requires_grad=True)
    want = released(m, x)
    torch.testing.assert_close(m(x), want[0], rtol=0, atol=1e-10)
    g = torch.randn_like(want[0])
    ours, theirs = (torch.autograd.grad(y, [x, *m.parameters()], g, allow_unused=True) for y in (m(x), want[0]))
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    if name != "unet3d":  # every level's prediction, with dropout and batch statistics as they are in evaluation
        m.train()
        for part in m.modules():
            if isinstance(part, (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)):
                part.eval()
        for a, b in zip(m(x), want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_switches_off_is_the_plain_unet():
    """gamma = 0: the attentions at the bottom are the identity; a gate that is always open changes nothing."""
    torch.manual_seed(0)
    plain = attnlib.create_model("unet3d", dims=(4, 6, 8)).eval()
    gated = attnlib.create_model("unet3d", dims=(4, 6, 8), skip_gate="concat").eval()
    gated.load_state_dict(plain.state_dict(), strict=False)
    for level in gated.levels:
        nn.init.constant_(level.gate.psi_norm.bias, 40.0)
    x = torch.randn(1, 1, 8, 8, 8)
    torch.testing.assert_close(gated(x), plain(x))
    b = DualAttention(8)
    y = torch.randn(1, 2, 3, 4, 8)
    assert b.position(y).equal(y) and b.channel(y).equal(y)


def test_deep_supervision_predicts_at_halving_sizes():
    m = attnlib.create_model("daunet3d", dims=(2, 4, 4, 8, 8))
    maps = m(torch.randn(2, 1, 32, 32, 32))
    assert [tuple(y.shape[2:]) for y in maps] == [(n,) * 3 for n in (32, 16, 8, 4)]
    assert isinstance(m.eval()(torch.randn(2, 1, 16, 16, 16)), torch.Tensor)
    terms = m.loss(maps, torch.randint(0, 2, (2, 32, 32, 32)))
    assert list(terms) == ["dice", "dice_2", "dice_3", "dice_4"]


def test_small_axes_are_not_pooled_and_come_back():
    """The release pools axes above 4 only but doubles all of them on the way up, which cannot fit."""
    e = PlainEncoder(3, 1, (2, 2, 2, 2))
    maps = e(torch.randn(1, 1, 32, 9, 3))
    assert [tuple(m.shape[2:]) for m in maps] == [(32, 9, 3), (16, 5, 3), (8, 3, 3), (4, 3, 3)]
    m = attnlib.create_model("dagunet3d", dims=(2, 4, 8)).eval()
    for grid in ((32, 9, 3), (1, 1, 1), (7, 6, 5)):
        x = torch.randn(2, 1, *grid)
        before = x.clone()
        y = m(x)
        assert y.shape == (2, 2, *grid) and y.isfinite().all() and x.equal(before)
        torch.testing.assert_close(y[:1], m(x[:1]), rtol=1e-4, atol=1e-5)
    assert m(torch.zeros(0, 1, 8, 8, 8)).shape == (0, 2, 8, 8, 8)


def test_strides_of_ones_own_are_shared_by_the_way_up():
    m = UNet(dims=(2, 4, 4), strides=[(1, 2, 2), (2, 4, 2)]).eval()
    maps = m.encoder(torch.randn(1, 1, 8, 16, 8))
    assert [tuple(y.shape[2:]) for y in maps] == [(8, 16, 8), (8, 8, 4), (4, 2, 2)]
    assert m(torch.randn(1, 1, 7, 17, 9)).shape == (1, 2, 7, 17, 9)
    with pytest.raises(ValueError, match=r"x has 7 pixels along axis 1 .* \(8\)"):
        m(torch.zeros(1, 1, 8, 7, 8))
    up = Up(2, 2, 3)
    y = torch.randn(1, 2, 4, 5)
    torch.testing.assert_close(up(y, (4, 5)), F.conv_transpose2d(y, up.conv.weight, up.conv.bias, 1, 1))


@pytest.mark.parametrize("bottleneck", ["dual", "aspp", "dappm", None])
@pytest.mark.parametrize("gate", [None, "sum", "concat"])
def test_slots_in_images(bottleneck, gate):
    m = attnlib.create_model("unet2d", dims=(4, 8, 8), bottleneck=bottleneck, skip_gate=gate, loss_kind="both")
    x, y = torch.randn(2, 3, 17, 12), torch.randint(0, 2, (2, 17, 12))
    sum(m.loss(m(x), y).values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())
    assert m.predict(x).shape == (2, 17, 12) and m.training
    half = copy.deepcopy(m).eval().to(torch.bfloat16)
    assert half(x.to(torch.bfloat16)).dtype == torch.bfloat16


def test_backbones_encode():
    """Ours, timm's and transformers': channels and strides as they say, or as they are measured."""
    torch.manual_seed(0)
    small = dict(embed_dim=8, depths=(1, 1), num_heads=(1, 1), kernel_size=3, dilations=None)
    ours = attnlib.create_model("dinat_mini", features_only=True, **small)
    halvings = ours.feature_info.reduction()[0].bit_length() - 1
    dims = [4] * (halvings + len(ours.feature_info.channels()) - 1)
    encoders = [(ours, dims)]
    if importlib.util.find_spec("timm"):
        timm = importlib.import_module("timm")
        encoders.append((timm.create_model("resnet10t", features_only=True, out_indices=(0, 1, 2)), [4, 4, 8]))
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], out_features=["stage1", "stage2"]
    )
    encoders.append((transformers.ResNetBackbone(config), [4, 4, 4]))
    x = torch.randn(2, 3, 50, 44)
    for encoder, dims in encoders:
        m = UNet(3, 2, dims, 2, encoder=encoder, skip_gate="sum", bottleneck="aspp")
        m.loss(m(x), torch.zeros(2, 50, 44, dtype=torch.long))["dice"].backward()
        assert m.eval()(x).shape == (2, 2, 50, 44)
        with pytest.raises(ValueError, match="dims must have"):
            UNet(3, 2, (4,), 2, encoder=encoder)
    with pytest.raises(ValueError, match="belong to the plain encoder"):
        UNet(3, 2, (4, 4), 2, encoder=ours, input_pyramid=True)


def test_one_convolution_is_what_aspp_of_rate_one_is():
    torch.manual_seed(0)
    m = ASPP(4, 3, (1,), pointwise=False, pooled=False, project=False).eval()
    x = torch.randn(2, 5, 6, 4)
    conv, norm, _ = m.branches[0]
    want = F.relu(norm(F.conv2d(x.permute(0, 3, 1, 2), conv.weight, padding=1))).permute(0, 2, 3, 1)
    torch.testing.assert_close(m(x), want)
    with pytest.raises(ValueError, match="exactly one branch, got 5"):
        ASPP(4, 3, project=False)
    with pytest.raises(ValueError, match="no branch"):
        ASPP(4, 3, (), pointwise=False, pooled=False)


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: ASPP(0, 4), ValueError, "dim must be an integer of at least 1, got 0"),
        (lambda: ASPP(8, 2.5), TypeError, "out_dim must be an integer of at least 1, got 2.5"),
        (lambda: DualAttention(8, eps=-1), ValueError, "eps must be .*at least 0, got -1"),
        (lambda: ASPP(8, 4)(torch.zeros(1, 3, 4, 7)), ValueError, "x has 7 channels .* dim=8"),
        (lambda: ASPP(8, 4)(torch.zeros(1, 3, 4, 5, 8)), ValueError, r"x must have shape \(B, H, W, 8\)"),
        (lambda: ASPP(8, 4)(torch.zeros(1, 0, 4, 8)), ValueError, "x must hold at least one place"),
        (lambda: ASPP(8, 4)(torch.zeros(1, 3, 4, 8).long()), TypeError, "x must be a floating-point tensor"),
        (lambda: DualAttention(8)(torch.zeros(1, 2, 3, 4, 7)), ValueError, "x has 7 channels .* dim=8"),
        (lambda: DualAttention(8)(torch.zeros(1, 3, 4, 8)), ValueError, r"x must have shape \(B, D, H, W, 8\)"),
    ],
)
def test_bad_channels_and_grids_of_the_bottom_are_refused_by_name(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_a_sphere_is_learnt():
    """32^3, seconds on one thread, Dice above 0.9."""
    torch.manual_seed(0)
    m = attnlib.create_model("daunet3d", dims=(4, 8), momentum=0.2)
    optimizer = torch.optim.Adam(m.parameters(), 0.02)
    g = torch.Generator().manual_seed(0)
    x, y = blobs(2, (32, 32, 32), most=1, radius=(0.2, 0.3), generator=g)
    for _ in range(20):
        optimizer.zero_grad()
        sum(m.loss(m(x), y).values()).backward()
        optimizer.step()
    x, y = blobs(4, (32, 32, 32), most=1, radius=(0.2, 0.3), generator=g)
    found = m.predict(x) > 0
    assert 2 * (found & (y > 0)).sum() / (found.sum() + (y > 0).sum()) > 0.9


def test_tiles_are_the_whole_away_from_what_sees_everything():
    torch.manual_seed(0)
    m = UNet(dims=(2, 4), rank=2).eval()
    x = torch.randn(1, 1, 40, 36)
    assert m.predict(x, tile=16, overlap=12, blend=0).equal(m.predict(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(dims=(4,)), "at least two levels"),
        (dict(rank=1), "rank"),
        (dict(skip_gate="product"), "skip_gate"),
        (dict(bottleneck="pam"), "bottleneck"),
        (dict(bottleneck="dappm"), "for images"),
        (dict(strides=[(2, 2)]), "strides must be 1 of 3"),
        (dict(num_classes=1, loss_kind="cross_entropy"), "num_classes of at least 2"),
        (dict(compat="keras"), "compat"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        UNet(**{"dims": (4, 4), **settings})


def test_bad_images_and_labels():
    m = UNet(dims=(2, 4)).eval()
    for x in (torch.zeros(1, 1, 4, 4), torch.zeros(1, 3, 4, 4, 4), torch.zeros(1, 1, 4, 0, 4), None):
        with pytest.raises(ValueError, match="x must be"):
            m(x)
    y = m(torch.zeros(1, 1, 4, 4, 4))
    with pytest.raises(ValueError, match="target holds the class 2; possible: 0 to 1, and 255 for none"):
        m.loss(y, torch.full((1, 4, 4, 4), 2))
    assert m.loss(y, torch.full((1, 4, 4, 4), 255))["dice"].isfinite()
    authors = UNet(dims=(2, 4), compat="authors")
    labels = torch.ones(1, 4, 4, 4, dtype=torch.long)
    assert authors.loss(y, labels)["dice"].equal(dice_loss(y, labels, compat="authors"))


def test_it_compiles_and_exports():
    m = attnlib.create_model("daunet3d", dims=(2, 8)).eval()
    x = torch.randn(1, 1, 6, 6, 6)
    torch.testing.assert_close(torch.compile(m, backend="eager")(x), m(x))
    assert torch.equal(torch.export.export(m, (x,)).module()(x), m(x))
