"""NeuroFovea: the authors' transform and networks, regions one by one in float64, and what makes a metamer."""

import json
import math

import pytest
import torch
from parity import HERE
from safetensors import safe_open

from attnlib.grids import LogPolarWindows, log_polar_windows
from attnlib.models.perception.metamers import (
    FoveatedTransfer,
    coral,
    decoder,
    descend,
    encoder,
    region_statistics,
    released_encoder,
    statistic_loss,
    texture_share,
)


@pytest.fixture(scope="module")
def recorded():
    with safe_open(HERE / "neurofovea-metamers.safetensors", "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, f.metadata()  # noqa: SIM118


def sines(*shape, k):
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * k).view(shape)


def fill(network):
    for i, p in enumerate(network.parameters()):
        fan = p[0].numel() if p.dim() > 1 else 1
        p.data = sines(*p.shape, k=0.31 + 0.07 * i) * (2 * fan**-0.5 if p.dim() > 1 else 0.1)
    return network


class Flat(torch.nn.Module):
    """Stand for the networks in the recording: pooled colours, mixed by sines."""

    def __init__(self, out, dim, k, decode):
        super().__init__()
        self.weight, self.decode = sines(out, dim, k=k) / (20 if decode else 1), decode

    def forward(self, x):
        if self.decode:
            return torch.einsum("oc,bchw->bohw", self.weight.to(x), x)[:, :, ::4, ::4]
        return torch.einsum("oc,bchw->bohw", self.weight.to(x), torch.nn.functional.avg_pool2d(x, 8)).relu()


def test_the_authors_transform(recorded):
    tensors, _ = recorded
    content = (0.5 + 0.5 * sines(3, 512, 512, k=0.00371) * sines(3, 512, 512, k=1.3)).float()
    noise = (sines(3, 512, 512, k=2.1) + sines(3, 512, 512, k=0.917) ** 3).float()
    rows = torch.arange(64)
    masks = torch.stack(
        [(1.2 - ((rows[:, None] - 10.0 * i - 6) ** 2 + (rows - i * 23 % 64) ** 2) / (120.0 + 60 * i)) for i in range(6)]
    ).clamp(0, 1)
    colours = coral(noise[None], content[None])
    torch.testing.assert_close(colours[0, :, ::64, ::64], tensors["coral"], atol=1e-5, rtol=1e-4)
    transfer = FoveatedTransfer(Flat(512, 3, 0.37, False), Flat(3, 512, 0.53, True))
    windows = LogPolarWindows(masks, torch.zeros(6), torch.arange(6))
    share = torch.tensor([0, 0.2, 0.5, 0.7, 0.9, 1.0])
    mixed = transfer.mix(transfer.encoder(content[None]), transfer.encoder(colours), windows, share)
    scale = float(tensors["y"].abs().max())
    assert float((transfer.decoder(mixed) - tensors["y"]).abs().max()) < 1e-4 * scale
    assert float((tensors["reference"] - tensors["y"]).abs().max()) > 0.1 * scale
    plain = transfer.decoder(transfer.encoder(content[None]))
    assert float((plain - tensors["reference"]).abs().max()) < 1e-4 * scale


def test_the_authors_networks(recorded):
    tensors, meta = recorded
    shapes = json.loads(meta["shapes"])
    up, down = fill(encoder()), fill(decoder())
    theirs = {k: torch.zeros(v) for k, v in shapes["encoder"].items()}
    used = released_encoder(theirs)
    assert {k: list(v.shape) for k, v in up.state_dict().items()} == {k: list(v.shape) for k, v in used.items()}
    assert set(theirs) - set(used) == {f"{i}.{n}" for i in (32, 35, 38, 42, 45, 48, 51) for n in ("weight", "bias")}
    assert {k: list(v.shape) for k, v in down.state_dict().items()} == shapes["decoder"]
    with torch.no_grad():
        features = up(0.5 + 0.5 * sines(1, 3, 24, 16, k=0.9))
        torch.testing.assert_close(features[:, ::8], tensors["encoded"], atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(down(features), tensors["decoded"], atol=1e-12, rtol=1e-9)


def test_shares_are_the_authors(recorded):
    areas, shares = (torch.tensor(json.loads(recorded[1][k])) for k in ("areas", "shares"))
    windows = LogPolarWindows(torch.zeros(6, 4, 4), torch.cat([torch.ones(1), areas]), torch.zeros(6))
    torch.testing.assert_close(texture_share(windows, 512, compat="authors")[1:], shares)
    ours = texture_share(windows, 512)
    assert ours[0] == 0 and (ours[1:].diff() > 0).all() and ours.max() < 1
    radius = (areas / math.pi).sqrt() * 26 / 512
    torch.testing.assert_close(ours[1:], torch.tanh(1.281 * radius / 2))
    huge = windows._replace(area=torch.tensor([1.0, 0.0, 1e9, 0.0, 0.0, 0.0]))
    assert texture_share(huge, 512).tolist()[1:3] == [0.0, 1.0]


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    transfer = FoveatedTransfer(encoder(4, pools=1), decoder(4, pools=1)).double().eval()
    transfer.encoder[-2].weight.data *= 30  # deviations far above the 1e-5 that is added to variances
    transfer.decoder[1].weight.data /= 30
    transfer.decoder[-1].bias.data += 0.5  # within what is clamped
    return transfer, log_polar_windows((64, 64), 0.6, fovea=8, reduce=2)


def images(count=1, seed=0):
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("overlap", ["overwrite", "blend"])
def test_regions_one_by_one(small, overlap):
    transfer, windows = small
    f, n = transfer.encoder(images(2)), transfer.encoder(images(2, 1))
    share = texture_share(windows, 64)
    want, weight = torch.zeros_like(f), windows.weights.double()
    for mask, alpha in zip(weight, share.double(), strict=True):
        inside = mask > 1e-3
        a, b = f[:, :, inside], n[:, :, inside]
        (m, s), (mn, sn) = ((t.mean(2, keepdim=True), (t.var(2, keepdim=True) + 1e-5).sqrt()) for t in (a, b))
        mixed = (1 - alpha) * a + alpha * ((b - mn) / sn * s + m)
        if overlap == "overwrite":
            want[:, :, inside] = mixed
        else:
            own = f.clone()
            own[:, :, inside] = mixed
            full = (1 - alpha) * f + alpha * ((n - mn[..., None]) / sn[..., None] * s[..., None] + m[..., None])
            want += full * mask / weight.sum(0)
    found = FoveatedTransfer(transfer.encoder, transfer.decoder, overlap).mix(f, n, windows, share)
    torch.testing.assert_close(found, want, atol=1e-9, rtol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("overlap", ["overwrite", "blend"])
def test_no_texture_is_the_reference_exactly_in_what_it_decodes(small, overlap):
    transfer, windows = small
    transfer = FoveatedTransfer(transfer.encoder, transfer.decoder, overlap)
    found = transfer(images(), windows, share=torch.zeros(len(windows.weights)))
    torch.testing.assert_close(found, transfer.reference(images()), atol=1e-12, rtol=0)
    f = transfer.encoder(images())
    for seed in (1, 2):  # the fovea keeps its features whatever the noise
        mixed = transfer.mix(f, transfer.encoder(images(1, seed)), windows, texture_share(windows, 64))
        alone = (windows.weights[1:] <= 1e-3).all(0)
        assert int(alone.sum()) > 20
        torch.testing.assert_close(mixed[..., alone], f[..., alone], atol=1e-12, rtol=0)


@torch.no_grad()
def test_full_texture_has_the_statistics_of_the_image(small):
    transfer, _ = small
    weights = torch.zeros(4, 32, 32)
    for i in range(4):  # regions that do not overlap
        weights[i, 16 * (i // 2) : 16 * (i // 2) + 16, 16 * (i % 2) : 16 * (i % 2) + 16] = 1
    windows = LogPolarWindows(weights, torch.ones(4), torch.arange(4))
    f, n = torch.randn(2, 1, 8, 32, 32, dtype=torch.float64) * torch.tensor([3.0, 1.0]).view(2, 1, 1, 1, 1) + 2
    g = transfer.mix(f, n, windows, torch.ones(4))
    inside = weights.flatten(1).double()
    pairs = zip(*(region_statistics(t.flatten(2).mT, inside) for t in (g, f)), strict=True)
    for got, want in pairs:
        assert float((got - want).abs().max()) < 1e-4
    assert float((g - f).abs().max()) > 0.01


@torch.no_grad()
def test_two_seeds_differ_in_the_periphery(small):
    transfer, windows = small[0], log_polar_windows((64, 64), 0.6, fovea=14, reduce=2)
    a, b = (transfer(images(4), windows, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    apart = (a - b).abs().mean((0, 1))
    away = torch.hypot(*torch.meshgrid(torch.arange(64) - 31.5, torch.arange(64) - 31.5, indexing="ij"))
    near, middle, far = (apart[(away >= lo) & (away < hi)].mean() for lo, hi in ((0, 4), (15, 19), (24, 32)))
    assert near < 1e-12 < middle < far
    again = transfer(images(4), windows, generator=torch.Generator().manual_seed(0))
    assert torch.equal(a, again)


@torch.no_grad()
def test_colours_are_taken_over():
    noise, target = torch.randn(1, 3, 40, 40, dtype=torch.float64), images()
    target[:, 1] = 0.3 * target[:, 0] + 0.1 * target[:, 1]
    got = coral(noise, target)
    torch.testing.assert_close(got.flatten(2).mean(2), target.flatten(2).mean(2))
    corr = [torch.corrcoef(t[0].flatten(1)) for t in (got, target)]
    assert float((corr[0] - corr[1]).abs().max()) < 2e-3


def test_descent_lowers_the_same_statistics(small):
    transfer, windows = small
    start = images(1, 5)
    found, losses = descend(transfer.encoder, images(), windows, start, steps=15)
    assert len(losses) == 16 and losses[-1] < 0.5 * losses[0]
    assert float(statistic_loss(transfer.encoder, found, images(), windows).detach()) == pytest.approx(
        losses[-1], rel=1e-6
    )
    assert len(descend(transfer.encoder, images(), windows, start, steps=15, until=losses[3])[1]) <= 5


def test_weights_from_a_path(tmp_path):
    torch.manual_seed(0)
    whole = {**encoder().state_dict(), "32.weight": torch.zeros(512, 512, 3, 3), "32.bias": torch.zeros(512)}
    torch.save(whole, tmp_path / "vgg.pth")
    torch.save(decoder().state_dict(), tmp_path / "dec.pth")
    transfer = FoveatedTransfer.released(tmp_path / "vgg.pth", tmp_path / "dec.pth")
    assert torch.equal(transfer.encoder[2].weight, whole["2.weight"])
    with pytest.raises(FileNotFoundError, match="download_models_and_stimuli"):
        FoveatedTransfer.released(tmp_path / "none.pth", tmp_path / "dec.pth")
    with pytest.raises(RuntimeError, match="Missing key"):
        FoveatedTransfer.released(tmp_path / "dec.pth", tmp_path / "dec.pth")


def test_bad_input(small):
    transfer, windows = small
    with pytest.raises(ValueError, match=r"grid of \(32, 32\), features on \(16, 16\)"):
        transfer(images()[..., :32, :32], windows)
    one = LogPolarWindows(torch.eye(32 * 32)[:3].view(3, 32, 32), torch.ones(3), torch.arange(3))
    with pytest.raises(ValueError, match="fewer than two cells have no deviation: 3 of 3"):
        transfer(images(), one)
    with pytest.raises(ValueError, match="share"):
        transfer(images(), windows, share=torch.zeros(3))
    with pytest.raises(ValueError, match="constant"):
        transfer(torch.full((1, 3, 64, 64), 0.5, dtype=torch.float64), windows)
    with pytest.raises(ValueError, match="overlap"):
        FoveatedTransfer(transfer.encoder, transfer.decoder, "mean")
    with pytest.raises(ValueError, match="images"):
        transfer(images()[:, :1], windows)
    with pytest.raises(ValueError, match="pools"):
        encoder(8, pools=4)
