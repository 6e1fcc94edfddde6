"""DAF against the authors' whole class over a trunk of fixed waves: answer, every term, every gradient."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

import attnlib
from attnlib.models.backbones.resnet import resnet
from attnlib.models.backbones.stages import FeatureInfo
from attnlib.models.dense.daf import DAF, DEAD, SemanticModule, _renamed, convert
from tests.parity import by_name

PATH = Path(__file__).parents[1] / "fixtures" / "models" / "daf.safetensors"


class Waves(nn.Module):
    """The trunk of the recording: no parameters, four maps."""

    def __init__(self, dims=(256, 512, 1024, 2048)):
        super().__init__()
        self.dims = dims
        self.feature_info = FeatureInfo({"num_chs": c, "reduction": 4 * 2**i, "index": i} for i, c in enumerate(dims))

    def forward(self, x):
        maps = []
        for i, c in enumerate(self.dims):
            waves = torch.cos(torch.arange(c * x.shape[1], dtype=x.dtype).view(c, -1) * 0.7) / x.shape[1] ** 0.5
            x = torch.sin(3 * F.avg_pool2d(torch.einsum("bchw,oc->bohw", x, waves), 2 if i else 4, ceil_mode=True))
            maps.append(x)
        return maps


def numbers(key, shape):
    """The weights of the recording, by name."""
    return torch.full(shape, 0.4, dtype=torch.float64) if key.endswith("gamma") else by_name(key, shape)


def small(**settings):
    return DAF(3, 1, 8, encoder=Waves((8, 8, 16, 16)), **settings)


def test_as_released():
    with safe_open(PATH, "pt") as held:
        meta, want = held.metadata(), {k: held.get_tensor(k) for k in held.keys()}  # noqa: SIM118
    state = {k: numbers(k, s) for k, s in json.loads(meta["shapes"]).items()}
    model = DAF(encoder=Waves()).double()
    model.load_state_dict(convert(state, model), strict=True)
    # They are in the released state dict, and the strict load above is without them.
    stats = ("running_mean", "running_var", "num_batches_tracked")
    assert sum(v.numel() for k, v in state.items() if re.fullmatch(DEAD, k) and not k.endswith(stats)) == 955_412
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, 1, 32, 32, dtype=torch.float64, generator=g)
    target = torch.randint(0, 5, (3, 32, 32), generator=g)
    torch.testing.assert_close(model.eval()(x)[:, :, ::8, ::8], want["y"], rtol=0, atol=1e-9)
    x.requires_grad_(True)
    terms = model.train().loss(model(x), target)
    for name, term in terms.items():
        torch.testing.assert_close(term, want[name], rtol=0, atol=1e-9)
    sum(terms.values()).backward()
    torch.testing.assert_close(x.grad[:, :, ::4, ::4], want["gx"], rtol=0, atol=1e-9)
    names, ours = json.loads(meta["names"]), dict(model.named_parameters())
    assert len(names) == len(ours)
    for i, name in enumerate(names):
        grad = ours[_renamed(name)].grad
        torch.testing.assert_close(grad.norm(), want["norms"][i], rtol=1e-8, atol=1e-9)
        wave = torch.cos(torch.arange(grad.numel(), dtype=torch.float64)).view_as(grad)
        torch.testing.assert_close((grad * wave).sum(), want["sums"][i], rtol=1e-8, atol=1e-9)


def test_parameters_with_the_trunk():
    with torch.device("meta"):
        model = DAF()
    assert sum(p.numel() for p in model.parameters()) == 103_556_063 == 104_511_475 - 955_412
    head = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("encoder."))
    assert head + 955_412 == 17_775_411


def test_the_names_of_the_released_trunk_are_all_known():
    """torchvision's ResNeXt under the release's wrapper, name by name."""
    with torch.device("meta"):
        model = DAF()
    own = {k for k in model.state_dict() if k.startswith("encoder.")}
    found = set()
    tails = {"conv": ["weight"], "norm": ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]}
    for kind, last in ((k, t) for k, ts in tails.items() for t in ts):
        theirs = [f"resnext.layer0.{int(kind == 'norm')}.{last}"]
        for stage, depth in enumerate((3, 4, 23, 3), 1):
            lead = f"resnext.layer{stage}." + ("1." if stage == 1 else "")
            for block in range(depth):
                theirs += [f"{lead}{block}.{'bn' if kind == 'norm' else 'conv'}{n}.{last}" for n in (1, 2, 3)]
            theirs.append(f"{lead}0.downsample.{int(kind == 'norm')}.{last}")
        found |= {_renamed(name) for name in theirs}
    assert found == own


def test_gamma_starts_at_nothing_and_eval_is_the_mean_of_refined():
    torch.manual_seed(0)
    model = small().eval()
    for stage in model.stages:
        for scale in stage:
            y = torch.randn(1, 3, 4, 8)
            assert scale.position(y).equal(y) and scale.channel(y).equal(y)
    x = torch.randn(2, 1, 32, 32)
    made = model.everything(x)
    assert len(made.coarse) == len(made.refined) == 4 and len(made.copies) == 8
    torch.testing.assert_close(model(x), torch.stack(made.refined).mean(0))


def test_guided_training_brings_codes_together():
    torch.manual_seed(0)
    model = small()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 1, 32, 32, generator=g)
    target = (x[:, 0].abs() > 1).long() + (x[:, 0] > 1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3, betas=(0.9, 0.99))
    seen = []
    for _ in range(12):
        terms = model.loss(model(x), target)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        seen.append({k: float(v.detach()) for k, v in terms.items()})
    assert seen[-1]["guide"] < 0.7 * seen[0]["guide"] and seen[-1]["reconstruct"] < seen[0]["reconstruct"]
    assert seen[-1]["refined"] < seen[0]["refined"]


@pytest.mark.parametrize("size", [(33, 47), (16, 16), (50, 18)])
def test_any_size(size):
    model = small().eval()
    x = torch.randn(2, 1, *size)
    y = model(x)
    assert y.shape == (2, 3, *size) and y.isfinite().all()
    torch.testing.assert_close(y[:1], model(x[:1]), rtol=1e-4, atol=1e-5)
    assert model.train().predict(x).shape == (2, *size) and model.training
    assert model.eval()(x[:0]).shape == (0, 3, *size)


def test_bad_input():
    model = small().eval()
    for x in (torch.zeros(1, 3, 32, 32), torch.zeros(1, 32, 32), torch.zeros(1, 1, 32, 32).long()):
        with pytest.raises(ValueError, match="x must be images"):
            model(x)
    with pytest.raises(ValueError, match="4 a side at least"):
        model(torch.zeros(1, 1, 32, 8))
    with pytest.raises(ValueError, match="feature_info of 4 maps"):
        DAF(encoder=Waves((4, 4)))
    with pytest.raises(ValueError, match="target holds the class 3"):
        model.loss(model(torch.zeros(1, 1, 16, 16)), torch.full((1, 16, 16), 3))
    with pytest.raises(ValueError, match="is no part of"):
        convert({"encoder.weight": torch.zeros(1)}, model)
    with pytest.raises(ValueError, match="need bottlenecks"):
        resnet(basic=True, groups=2)


def test_semantic_module_and_grouped_trunks():
    code, back = SemanticModule(4)(torch.randn(2, 4, 9, 6))
    assert code.shape == (2, 16, 2, 1) and back.shape == (2, 4, 9, 6)
    trunk = attnlib.create_model("resnet50", groups=32, group_width=4, depths=(1, 1, 1, 1), num_classes=2)
    assert trunk.stages[0].blocks[0].conv2.conv.weight.shape == (128, 4, 3, 3)
