"""Copies of parts of an attached model, and what changes a module inside a session: own weights, or refused by name."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import attnlib
from attnlib.hooks import Intervention
from hooks.families import FAMILIES

pytest.importorskip("transformers")
pytest.importorskip("diffusers")


class Everywhere(Intervention):
    """In every stage that puts something on an attention module."""

    def on_output(self, site, out):
        return out * 0.5

    def around_sublayer(self, site, hidden, call):
        return call(hidden)


class Sources(Intervention):
    """Also on the projections inside it."""

    def on_context(self, site, k_source, v_source):
        return k_source * 1.5, v_source

    def on_output(self, site, out):
        return out * 0.5


class Scaled(nn.Module):
    def forward(self, weight):
        return weight * 1.3


SEPARATE = [f for f in FAMILIES if f.name != "timm"]  # its queries, keys and values come from one projection
CASES = [(f, Everywhere) for f in FAMILIES] + [(f, Sources) for f in SEPARATE]


def saved(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def averaged(module):
    return torch.optim.swa_utils.AveragedModel(module).module


WAYS = {
    "deepcopy": copy.deepcopy,
    "save": saved,
    "pickle": lambda m: pickle.loads(pickle.dumps(m, 2)),
    "average": averaged,
    "copy of a copy": lambda m: copy.deepcopy(copy.deepcopy(m)),
}


def scaled(module):
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1.2)
    return module


class Scene:
    """A family's model, attached, with its first attention module; and the same untouched."""

    def __init__(self, family, kind):
        self.family, self.kind = family, kind
        self.model, self.plain = family.make(), family.make()
        self.session = attnlib.attach(self.model, kind())
        self.name = self.session.attached[0].name
        self.module, self.untouched = self.inside(self.model), self.inside(self.plain)
        taken = []
        handle = self.untouched.register_forward_pre_hook(lambda m, a, k: taken.append((a, k)), with_kwargs=True)
        with torch.no_grad():
            family.call(self.plain)
        handle.remove()
        self.args, self.kwargs = taken[0]

    def inside(self, model):
        return model.get_submodule(self.name)

    @torch.no_grad()
    def out(self, module):
        out = module(*copy.deepcopy(self.args), **copy.deepcopy(self.kwargs))
        return out[0] if isinstance(out, tuple) else out

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.session.detach()


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1].__name__}")
def scene(request):
    with Scene(*request.param) as made:
        yield made


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_of_one_part_is_plain_with_its_own_weights(scene, way):
    made = WAYS[way]
    assert not torch.equal(scene.out(scene.module), scene.out(scene.untouched))
    new = made(scene.module)
    assert torch.equal(scene.out(new), scene.out(scene.untouched))
    assert new.__dict__.keys() == made(scene.untouched).__dict__.keys()
    attached = scene.out(scene.module)
    assert torch.equal(scene.out(scaled(new)), scene.out(scaled(copy.deepcopy(scene.untouched))))
    assert torch.equal(scene.out(scene.module), attached)
    parent, _, last = scene.name.rpartition(".")
    around = made(scene.model.get_submodule(parent)).get_submodule(last)
    assert torch.equal(scene.out(around), scene.out(scene.untouched))
    scene.session.detach()
    assert torch.equal(scene.out(scaled(around)), scene.out(new))


def test_a_shallow_copy_is_plain_or_refused(scene):
    with pytest.raises(RuntimeError, match=r"is attached, and copy.copy\(...\) of it would share .* attached too"):
        copy.copy(scene.model)
    if scene.kind is Sources and scene.family.name != "multihead":
        with pytest.raises(
            RuntimeError, match=r"copy.copy\(...\) of it would share (k|k_proj|to_k), which is attached"
        ):
            copy.copy(scene.module)
        return
    new = copy.copy(scene.module)
    assert torch.equal(scene.out(new), scene.out(scene.untouched))
    assert all(a is b for a, b in zip(new.parameters(), scene.module.parameters(), strict=True))
    new._parameters = {k: p if p is None else nn.Parameter(p.clone()) for k, p in new._parameters.items()}
    new._modules = {k: copy.deepcopy(m) for k, m in new._modules.items()}
    assert torch.equal(scene.out(scaled(new)), scene.out(scaled(copy.deepcopy(scene.untouched))))
    scene.session.detach()
    assert copy.copy(scene.model)._modules is scene.model._modules


def test_replicas_of_any_part_are_refused(scene):
    """As ``torch.nn.parallel.replicate`` makes them, of every module in turn."""
    for part in (scene.model, scene.model.get_submodule(scene.name.rpartition(".")[0]), scene.module):
        with pytest.raises(RuntimeError, match=r"is attached, and a replica of it \(torch.nn.DataParallel\)"):
            [m._replicate_for_data_parallel() for m in part.modules()]
    scene.session.detach()
    assert [m._replicate_for_data_parallel() for m in scene.model.modules()]


def parametrized(scene, itself):
    """The weight of a projection, or one of the attention module's own, seen through a parametrization; everywhere."""
    again = scene.family.make()
    for module in (scene.module, scene.untouched, scene.inside(again)):
        own = [n for n, p in module.named_parameters(recurse=False) if p.dim() > 1]
        if itself and not own:
            module.register_parameter("extra", nn.Parameter(torch.ones(2, 2)))
            own = ["extra"]
        owner = module if itself else next(m for m in module.modules() if type(m) is nn.Linear)
        parametrize.register_parametrization(owner, own[0] if itself else "weight", Scaled())
    return again


@pytest.mark.parametrize("itself", [False, True], ids=["a projection", "the attention"])
@torch.no_grad()
def test_parametrizations_inside_are_followed_and_copied(scene, itself):
    if not itself and scene.family.name == "multihead":
        pytest.skip("its projection is read past the module")
    again = parametrized(scene, itself)
    with attnlib.attach(again, scene.kind()):
        assert torch.equal(scene.family.call(scene.model), scene.family.call(again))
    new = copy.deepcopy(scene.module)
    assert torch.equal(scene.out(new), scene.out(scene.untouched))
    assert new.__dict__.keys() == copy.deepcopy(scene.untouched).__dict__.keys()
    assert torch.equal(scene.out(scaled(new)), scene.out(scaled(copy.deepcopy(scene.untouched))))
    with pytest.raises(RuntimeError, match="parametrized modules"):  # PyTorch's own refusal, as without a session
        pickle.dumps(
            scene.module if itself else next(m for m in scene.module.modules() if hasattr(m, "parametrizations"))
        )
    scene.session.detach()
    assert torch.equal(scene.out(scene.module), scene.out(scene.untouched))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_other_types_inside(scene, dtype):
    again = scene.family.make().to(dtype)
    scene.model.to(dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with attnlib.attach(again, scene.kind()):
            assert torch.equal(scene.family.call(scene.model), scene.family.call(again))
    finally:
        torch.set_default_dtype(before)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_quantized_inside(scene):
    """A quantized copy is plain; quantized in place, projections are followed, or refused where one is attached."""
    quantize = torch.ao.quantization.quantize_dynamic
    settings = dict(qconfig_spec={nn.Linear}, dtype=torch.qint8)
    if scene.family.name != "multihead":  # whose fused path PyTorch itself breaks
        new = quantize(scene.model, **settings)
        assert torch.equal(scene.family.call(new), scene.family.call(quantize(scene.plain, **settings)))
    again = quantize(scene.family.make(), **settings)
    quantize(scene.model, inplace=True, **settings)
    if scene.kind is Sources and scene.family.name != "multihead":
        with pytest.raises(RuntimeError, match="another module was put in its place"):
            scene.family.call(scene.model)
        return
    with attnlib.attach(again, scene.kind()):
        assert torch.equal(scene.family.call(scene.model), scene.family.call(again))


@torch.no_grad()
def test_an_average_follows_the_attached_weights(scene):
    ema = torch.optim.swa_utils.AveragedModel(scene.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    ema.update_parameters(scene.model)  # the first one is taken as it is
    scaled(scene.model)
    ema.update_parameters(scene.model)
    expected = scene.plain
    for p in expected.parameters():
        p.copy_(torch.lerp(p, p * 1.2, 0.5))
    torch.testing.assert_close(scene.family.call(ema.module), scene.family.call(expected))
