"""What users do with models, on a small one of every family that has a recorded run."""

import copy
import pickle

import pytest
import torch
from parity import Models
from torch import nn

import attnlib

FIRST = dict(reversed(Models.all()))
#: Read more than an image.
GUIDED = {"interformer-imsa"}
#: Have a classifier.
CLASSIFY = sorted(set(FIRST) - GUIDED - {"datr-distortion-aware", "hat", "mhs-vm", "rgt"})
IMAGES = sorted(set(FIRST) - GUIDED)


class Small:
    """The model of a family's first recorded run, its images, and what else it reads."""

    def __init__(self, slug: str, **settings):
        self.recorded = Models(slug)
        config = self.recorded.config[FIRST[slug]]
        torch.manual_seed(0)
        self.model = attnlib.create_model(config["model"], **{**config["settings"], **settings}).eval()
        self.x = self.recorded.tensors[f"{FIRST[slug]}/x"].float()
        self.beside = self.recorded.under(f"{FIRST[slug]}/with")
        #: Channels last in memory, of images or of clips.
        self.last = torch.channels_last if self.x.dim() == 4 else torch.channels_last_3d

    def __call__(self, model=None, x=None):
        return (self.model if model is None else model)(self.x if x is None else x, **self.beside)


def close(a, b, tolerance=1e-4):
    assert a.shape == b.shape
    a, b = a.detach(), b.detach()
    assert float((a - b).abs().max()) <= tolerance * max(float(b.abs().max()), 1e-6)


@pytest.mark.parametrize("slug", sorted(FIRST))
@torch.no_grad()
def test_copies_and_layouts_of_memory_change_nothing(slug):
    small = Small(slug)
    before, numbers = {k: v.clone() for k, v in small.model.state_dict().items()}, torch.get_rng_state()
    y = small()
    assert torch.equal(numbers, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in small.model.state_dict().items())
    close(small(pickle.loads(pickle.dumps(small.model))), y, 1e-6)
    close(small(copy.deepcopy(small.model).to(memory_format=small.last)), y)
    close(small(x=small.x.to(memory_format=small.last)), y)
    close(small(x=small.x.transpose(2, 3).contiguous().transpose(2, 3)), y)
    close(small(attnlib.deploy(small.model)), y)


@pytest.mark.parametrize("slug", CLASSIFY)
@torch.no_grad()
def test_heads_come_and_go(slug):
    small = Small(slug)
    small.model.reset_classifier(7)
    assert small().shape == (len(small.x), 7)
    small.model.reset_classifier(0)
    width = small.model.head_hidden_size
    assert small().shape == (len(small.x), width)
    assert small(Small(slug, num_classes=0).model).shape == (len(small.x), width)


@pytest.mark.parametrize("slug", CLASSIFY)
@torch.no_grad()
def test_maps_have_the_sides_and_widths_they_say(slug):
    small = Small(slug, features_only=True)
    maps, info = small(), small.model.feature_info
    assert [m.shape[1] for m in maps] == info.channels()
    assert [m.shape[-1] for m in maps] == [-(-small.x.shape[-1] // r) for r in info.reduction()]
    close(small(Small(slug, features_only=True, out_indices=(-1,)).model)[0], maps[-1], 1e-6)


@pytest.mark.parametrize("slug", sorted(FIRST))
def test_checkpointing_changes_nothing_but_what_is_kept(slug):
    small = Small(slug)
    if slug in CLASSIFY:
        small.x = torch.cat([small.x, 0.5 * small.x.flip(0)])
    kept = {}

    def run(model):
        def keep(t):
            sizes[t.untyped_storage().data_ptr()] = t.numel()
            return t

        sizes = {}
        if slug in GUIDED:
            for module in model.modules():  # a batch of one has no statistics
                module.training = not isinstance(module, nn.BatchNorm2d)
        else:
            model.train()
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = small(model)
        y.square().sum().backward()
        kept[model] = sum(sizes.values())
        return y, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, model.state_dict()

    plain, again = copy.deepcopy(small.model), copy.deepcopy(small.model)
    again.set_grad_checkpointing()
    (y, grads, state), (y2, grads2, state2) = run(plain), run(again)
    close(y2, y, 1e-5)
    assert grads.keys() == grads2.keys()
    for name, grad in grads.items():
        close(grads2[name], grad, 1e-4)
    for name, held in state.items():
        close(state2[name].double(), held.double(), 1e-6)
    assert kept[again] < kept[plain]


@pytest.mark.parametrize("slug", IMAGES)
@torch.no_grad()
def test_images_are_independent_of_their_neighbours_and_may_be_none(slug):
    small = Small(slug)
    one = small.x[:1]
    close(small(x=torch.cat([one, 5 * torch.randn_like(one)]))[:1], small(x=one))
    assert small(x=one[:0]).shape == (0, *small(x=one).shape[1:])


@pytest.mark.parametrize("slug", IMAGES)
@torch.no_grad()
def test_odd_sides(slug):
    small = Small(slug)
    y = small(x=torch.randn(1, *small.x.shape[1:-2], 37, 53))
    assert y.isfinite().all()


@pytest.mark.parametrize("slug", sorted(FIRST))
def test_every_precision_keeps_its_type(slug):
    small = Small(slug)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        with torch.no_grad():
            y = small(copy.deepcopy(small.model).to(dtype), small.x.to(dtype))
        assert y.dtype == dtype
        assert y.isfinite().all()
    frozen, x = small.model.requires_grad_(False), small.x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = small(frozen, x)
    y.float().sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("slug", IMAGES)
@torch.no_grad()
def test_whole_graphs(slug):
    torch._dynamo.reset()
    small = Small(slug)
    small.model, small.x = small.model.double(), small.x.double()
    close(small(torch.compile(small.model, backend="eager", fullgraph=True)), small(), 1e-9)


#: A parameter without a gradient stops training over several processes: what does not take part in a step, as released.
#: The CNN's own classifier is an exit of Dynamic Perceiver that the last one does not read.
IDLE = {"dynamic-perceiver": "head.fc.2.", "medvitv2": ".idle.", "sparsifiner": ".inner."}


@pytest.mark.parametrize("slug", IMAGES)
def test_every_parameter_takes_part_in_training(slug):
    small = Small(slug)
    small(small.model.train(), torch.cat([small.x, 0.5 * small.x])).square().sum().backward()
    idle = [n for n, p in small.model.named_parameters() if p.requires_grad and p.grad is None]
    assert all(IDLE.get(slug, "no name") in name for name in idle), idle


#: Numbers that mean something where others would not.
MAY = {"alpha", "focal_levels", "focal_windows", "layer_scale", "prune_blocks", "topks"}


@pytest.mark.parametrize("slug", sorted(FIRST))
def test_settings_that_cannot_be_are_refused_by_their_names(slug):
    config = Models(slug).config[FIRST[slug]]
    for name in {**config["settings"], "img_size": None, "drop_path_rate": None}:
        for bad in ("nonsense", {}, float("nan"), torch.ones(2), object(), list(range(1, 8)), -1):
            if name in MAY and isinstance(bad, (int, list)):
                continue
            with pytest.raises((TypeError, ValueError)) as caught, torch.device("meta"):
                attnlib.create_model(config["model"], **{**config["settings"], name: bad})
                pytest.fail(f"{name}={bad!r} was taken")
            assert name in str(caught.value) or "stages" in str(caught.value)
