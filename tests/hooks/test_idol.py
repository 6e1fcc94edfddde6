"""IDOL: a video and its depth in one batch, joined behind each stage of a U-Net."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import attnlib  # noqa: E402
from attnlib.hooks import Maps  # noqa: E402
from attnlib.steer import JointModalities, dual_modal_loss  # noqa: E402
from attnlib.steer.diffusion.idol import (  # noqa: E402
    depth_to_heat,
    heat_to_depth,
    map_consistency,
    motion_consistency,
    motion_field,
)  # fmt: skip
from hooks import pipes  # noqa: E402

PAIR = ["a red circle", "a red circle"]


@pytest.fixture(scope="module")
def pipe(folder):
    return pipes.stable_diffusion(folder, model=pipes.unet(size=8))


def moved(joint, seed=0):
    """Weights away from their start, so that the streams see each other."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for block in joint.blocks:
            block.attention.proj.weight.normal_(std=0.3)
        if joint.label is not None:
            joint.label.normal_(std=0.3)
    return joint.eval()


def features(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_motion_field_is_the_softmax_of_cosines():
    x = features(2, 3, 5, 2, 4)
    got = motion_field(x, 0.3)
    for b in range(2):
        for f in range(2):
            for p in range(8):
                a = x[b, f].flatten(1)[:, p]
                scores = torch.stack([F.cosine_similarity(a, c, dim=0) for c in x[b, f + 1].flatten(1).T]) / 0.3
                torch.testing.assert_close(got[b, f, p], scores.softmax(0), rtol=0, atol=1e-12)


def test_losses_vanish_for_streams_alike_and_have_exact_slopes():
    video, depth = features(1, 2, 3, 2, 2), features(1, 2, 3, 2, 2, seed=1)
    assert motion_consistency(video, video) == 0 and map_consistency([video], [video]) == 0
    turn = torch.linalg.qr(features(3, 3, seed=2)).Q  # one rotation of the channels of both leaves it
    spun = [torch.einsum("dc,bfchw->bfdhw", turn, x) for x in (video, depth)]
    torch.testing.assert_close(motion_consistency(*spun), motion_consistency(video, depth), rtol=0, atol=1e-12)
    assert motion_consistency(video, depth) > 0
    pair = [x.clone().requires_grad_() for x in (video, depth)]
    assert torch.autograd.gradcheck(lambda a, b: motion_consistency(a, b, 0.5), pair)
    want = ((video - depth).square().mean() + (2 * video - depth).square().mean()) / 2
    torch.testing.assert_close(map_consistency([video, 2 * video], [depth, depth]), want)


def test_colours_of_depth_can_be_read_back():
    depth = torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(0))
    colours = depth_to_heat(depth)
    assert colours.shape == (2, 3, 5, 6) and 0 <= colours.min() <= colours.max() <= 1
    torch.testing.assert_close(heat_to_depth(colours), depth, rtol=0, atol=1e-6)
    torch.testing.assert_close(heat_to_depth((colours + 0.01).clamp(0, 1)), depth, rtol=0, atol=0.02)
    with pytest.raises(ValueError, match=r"depth must lie in \[0, 1\]"):
        depth_to_heat(depth * 2)


def test_it_starts_as_two_runs_of_the_plain_denoiser(pipe):
    plain = pipes.sample(pipe, PAIR, steps=2)
    joint = JointModalities.of(pipe, num_heads=2)
    with attnlib.attach(pipe, joint):
        assert torch.equal(pipes.sample(pipe, PAIR, steps=2), plain)
    moved(joint)
    with attnlib.attach(pipe, joint):
        got = pipes.sample(pipe, PAIR, steps=2)
    assert (got - plain).abs().amax((1, 2, 3)).min() > 1e-3
    joint.scale = 0.0
    joint.label.data.zero_()
    with attnlib.attach(pipe, joint):
        assert torch.equal(pipes.sample(pipe, PAIR, steps=2), plain)
    assert torch.equal(pipes.sample(pipe, PAIR, steps=2), plain)


def test_the_joint_attention_is_one_over_both_streams_of_each_stage(pipe):
    """A U-Net written out: the stage, then attention over the tokens of both rows."""
    model, joint = pipe.unet, moved(JointModalities.of(pipe, num_heads=2))
    torch.manual_seed(3)
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)

    def behind(name, hidden):
        block = joint.blocks[joint.stages.index(name)]
        n, c, h, w = hidden.shape
        tokens = hidden.permute(0, 2, 3, 1).reshape(1, 2 * h * w, c)
        tokens = tokens + block.attention(block.norm(tokens))
        return tokens.view(n, h, w, c).permute(0, 3, 1, 2)

    with torch.no_grad(), attnlib.attach(model, joint):
        got = model(x, 7, encoder_hidden_states=text).sample
    with torch.no_grad():
        emb = model.time_embedding(model.time_proj(torch.tensor([7, 7]))) + joint.label
        hidden = model.conv_in(x)
        beside = [hidden]
        for i, stage in enumerate(model.down_blocks):
            hidden, out = stage(hidden, emb, encoder_hidden_states=text)
            hidden = behind(f"down_blocks.{i}", hidden)
            beside += [*out[:-1], hidden]
        hidden = behind("mid_block", model.mid_block(hidden, emb, encoder_hidden_states=text))
        for i, stage in enumerate(model.up_blocks):
            some, beside = beside[-len(stage.resnets) :], beside[: -len(stage.resnets)]
            hidden = behind(f"up_blocks.{i}", stage(hidden, tuple(some), emb, encoder_hidden_states=text))
        want = model.conv_out(model.conv_act(model.conv_norm_out(hidden)))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_swapping_streams_and_labels_swaps_outputs(pipe):
    joint = moved(JointModalities.of(pipe, num_heads=2))
    torch.manual_seed(3)
    x, text = torch.randn(4, 4, 8, 8), torch.randn(1, 5, 16).expand(4, -1, -1)
    swap = [2, 3, 0, 1]
    with torch.no_grad(), attnlib.attach(pipe.unet, joint):
        got = pipe.unet(x, 7, encoder_hidden_states=text).sample
        joint.label.data = joint.label.data[[1, 0]]
        other = pipe.unet(x[swap], 7, encoder_hidden_states=text).sample
    torch.testing.assert_close(other, got[swap], rtol=0, atol=1e-5)


def test_a_model_with_two_classes_is_told_the_label(tmp_path):
    model = pipes.unet(size=8, num_class_embeds=2)
    pipe = pipes.stable_diffusion(str(tmp_path), model=model)
    joint = JointModalities.of(pipe, num_heads=2)
    assert joint.label is None
    torch.manual_seed(3)
    x, text = torch.randn(4, 4, 8, 8), torch.randn(4, 5, 16)
    with torch.no_grad():
        want = model(x, 7, encoder_hidden_states=text, class_labels=torch.tensor([0, 0, 1, 1])).sample
        with attnlib.attach(model, joint):
            assert torch.equal(model(x, 7, encoder_hidden_states=text).sample, want)
    with attnlib.attach(pipe, joint):  # a pipeline without class labels
        assert pipes.sample(pipe, PAIR, steps=1, num_images_per_prompt=2).shape == (4, 4, 8, 8)


def test_a_step_of_training_lowers_the_loss_of_both_streams(pipe):
    joint = moved(JointModalities.of(pipe, num_heads=2, keep=["mid_block"]))
    model, maps = pipe.unet, Maps(8)
    torch.manual_seed(3)
    x, noise, text = torch.randn(8, 4, 8, 8), torch.randn(8, 4, 8, 8), torch.randn(1, 5, 16).expand(8, -1, -1)
    optimizer = torch.optim.Adam(joint.parameters(), 3e-3)
    sums = []
    with attnlib.attach(model, joint, maps):
        for _ in range(6):
            out = model(x, 7, encoder_hidden_states=text).sample
            terms = dual_modal_loss(out, noise, joint, [maps.take()], frames=4)
            optimizer.zero_grad()
            sum(terms.values()).backward()
            optimizer.step()
            sums.append(sum(terms.values()).item())
    assert sorted(terms) == ["cross", "depth", "motion", "video"] and terms["motion"] > 0 and terms["cross"] > 0
    assert sums[-1] < sums[0]
    assert all(p.grad is not None for p in joint.parameters())
    again = JointModalities.of(pipe, num_heads=2)
    again.load_state_dict(joint.state_dict())
    pipe.unet.zero_grad()


def test_in_a_video_pipeline_and_in_half_precision(pipe):

    video = pipes.animatediff(pipe)
    plain = pipes.sample(video, PAIR, steps=1, num_frames=2, height=8, width=8)
    joint = JointModalities.of(video, num_heads=2)
    with attnlib.attach(video, joint):
        assert torch.equal(pipes.sample(video, PAIR, steps=1, num_frames=2, height=8, width=8), plain)
    half = pipes.unet(size=8).bfloat16()
    with attnlib.attach(half, moved(JointModalities.of(half, num_heads=2))), torch.no_grad():
        x = torch.randn(2, 4, 8, 8).bfloat16()
        out = half(x, 7, encoder_hidden_states=torch.randn(2, 5, 16).bfloat16()).sample
    assert out.dtype == torch.bfloat16 and bool(out.isfinite().all())


def test_bad_input(pipe):
    with pytest.raises(ValueError, match="has no stages"):
        JointModalities.of(pipes.dit())
    with pytest.raises(ValueError, match=r"stages \['x'\] fit none of"):
        JointModalities.of(pipe, stages=["x"])
    with pytest.raises(ValueError, match="num_class_embeds=5"):
        JointModalities.of(pipes.unet(num_class_embeds=5))
    with pytest.raises(ValueError, match="blocks is empty"):
        JointModalities({})
    joint = JointModalities.of(pipe, num_heads=2)
    with attnlib.attach(pipe, joint), pytest.raises(ValueError, match="is no video and its depth"):
        pipes.sample(pipe, ["a red circle"], steps=1)
    with pytest.raises(RuntimeError, match="did not run yet"):
        JointModalities.of(pipe, num_heads=2).split(torch.zeros(2))
    joint._labels = torch.tensor([0, 1])
    two = torch.zeros(2, 4, 8, 8)
    with pytest.raises(ValueError, match="differ in shape"):
        dual_modal_loss(two, two[:1], joint)
    with pytest.raises(ValueError, match="needs features of several frames"):
        dual_modal_loss(two, two, joint)
    with pytest.raises(ValueError, match="needs maps"):
        dual_modal_loss(two, two, joint, motion=0)
    with pytest.raises(ValueError, match="at least two frames"):
        motion_field(features(1, 1, 2, 2, 2))
    with pytest.raises(ValueError, match="temperature"):
        motion_field(features(1, 2, 2, 2, 2), 0.0)
    with pytest.raises(ValueError, match="layer 0: maps of video"):
        map_consistency([two], [two[:1]])
    with pytest.raises(ValueError, match="maps of the same layers, got 1 and 0"):
        map_consistency([two], [])
