"""LinFusion mounted on a tiny U-Net: it begins with the model's projections, learns, and comes off bit for bit."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from diffusers import UNet2DConditionModel  # noqa: E402

import attnlib  # noqa: E402
from attnlib.steer.diffusion.linfusion import LinFusion, distillation_losses  # noqa: E402


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12, attention_head_dim=(2, 4), norm_num_groups=4,
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def inputs():
    return torch.randn(1, 4, 8, 8), torch.randn(1, 5, 12)


def call(unet, inputs):
    x, text = inputs
    return unet(x, 3, encoder_hidden_states=text).sample


def test_mounting_and_taking_off(unet, inputs):
    before = call(unet, inputs)
    student = LinFusion.of(unet)
    attn1 = [n for n, m in unet.named_modules() if n.endswith("attn1")]
    assert list(student.names) == attn1
    first = unet.get_submodule(attn1[0])
    assert torch.equal(student.replacements[0].q.weight, first.to_q.weight)
    with attnlib.attach(unet, student):
        mounted = call(unet, inputs)
        seen = []
        handle = student.replacements[0].register_forward_hook(lambda m, a, y: seen.append((a[0], y)))
        call(unet, inputs)
        handle.remove()
    assert not torch.allclose(mounted, before)
    x, y = seen[0]
    torch.testing.assert_close(student.replacements[0](x), y)
    assert torch.equal(call(unet, inputs), before)


def test_released_layers_load_by_number(unet):
    student = LinFusion.of(unet)
    theirs = {}
    for i, layer in enumerate(student.replacements):
        for name, value in layer.state_dict().items():
            for ours, other in (("g_q.", "to_q_."), ("g_k.", "to_k_."), ("proj.", "to_out.0.")):
                name = name.replace(ours, other)
            name = name if name.startswith("to_") else f"to_{name}"
            theirs[f"{i}.{name}"] = value + 1
    student.load_authors(theirs)
    assert torch.equal(student.replacements[0].q.weight, theirs["0.to_q.weight"])
    with pytest.raises(ValueError, match="lacks"):
        student.load_authors({k: v for k, v in theirs.items() if k != "0.to_q_.0.weight"})


def test_distillation_lowers_the_features_error_below_that_of_plain_features(unet, inputs):
    """The networks before queries and keys learn what 1 + elu alone cannot do."""
    layer = unet.get_submodule(LinFusion.of(unet).names[0])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 64, layer.to_q.in_features, generator=generator)
    with torch.no_grad():
        teacher = layer(x)
    student = LinFusion.of(unet).replacements[0]
    plain = LinFusion.of(unet, mid_dim=0).replacements[0]
    errors = []
    for module, train in ((plain, False), (student, True)):
        optimizer = torch.optim.AdamW(module.parameters(), 3e-3)
        for _ in range(60 if train else 0):
            loss = distillation_losses(teacher, teacher, teacher, [module(x)], [teacher])["features"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            errors.append((module(x) - teacher).square().mean().item())
    assert errors[1] < 0.5 * errors[0]


def test_bad_calls_are_refused(unet):
    with pytest.raises(ValueError, match="no self-attention"):
        LinFusion.of(unet, pattern="attn7")
    one = torch.zeros(1, 3)
    with pytest.raises(ValueError, match="one for each"):
        distillation_losses(one, one, one, [one])
    with pytest.raises(ValueError, match="target"):
        distillation_losses(one, torch.zeros(1, 4), one)
