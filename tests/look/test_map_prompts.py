"""Maps to prompts: components, boxes, what a segmenter of transformers reads, and maps that say nothing."""

import pytest
import torch

from attnlib.look.prompts import component_boxes, components, from_map
from attnlib.ops.points import ABSENT

F64 = torch.float64


def blobs():
    scores = torch.zeros(2, 6, 10)
    scores[0, 1:3, 1:3] = 0.9
    scores[0, 4, 6:9] = 1.0
    scores[1, 5, 0] = 2.0
    return scores


def test_parts_are_ordered_as_asked():
    scores = blobs()
    by_size = components(scores > 0.5)
    assert by_size[0, 1, 1] == 1 and by_size[0, 4, 7] == 2 and by_size[1].sum() == 1
    assert components(scores > 0.5, scores, by="peak")[0, 4, 7] == 1
    assert components(scores > 0.5, scores, by="sum")[0, 1, 1] == 1
    corner = torch.eye(3, dtype=torch.bool)[None]
    assert components(corner).max() == 1 and components(corner, connectivity=1).max() == 3
    with pytest.raises(ValueError, match="orders parts by scores"):
        components(corner, by="peak")


def test_boxes_are_the_borders_of_cells():
    boxes = component_boxes(components(blobs() > 0.5), (60, 200))
    assert boxes[0].tolist() == [[20, 10, 60, 30], [120, 40, 180, 50]]
    assert boxes[1].tolist() == [[0, 50, 20, 60], [0, 0, 0, 0]]
    assert component_boxes(torch.zeros(2, 3, 3, dtype=torch.long), (9, 9)).shape == (2, 0, 4)


@pytest.mark.parametrize("rule", ["extremes", "bands", "component"])
@pytest.mark.parametrize("size", [(60, 100), (100, 60), (7, 33)])
def test_points_lie_on_the_thing_and_off_it(rule, size):
    scores = torch.zeros(6, 10)
    scores[1:4, 5:8] = torch.tensor([0.95, 1.0, 0.96])
    prompt = from_map(scores, size, rule=rule, count=None if rule == "extremes" else 20)
    cell = (size[1] / 10, size[0] / 6)
    x, y = prompt.points[0, :, 0] / cell[0], prompt.points[0, :, 1] / cell[1]
    inside = (x >= 5) & (x <= 8) & (y >= 1) & (y <= 4)
    labels = prompt.labels[0]
    assert inside[labels == 1].all() and not inside[labels == 0].any() and {0, 1} <= set(labels.tolist())
    assert (prompt.points[0] >= 0).all() and (prompt.points[0, :, 0] < size[1]).all()
    assert (prompt.points[0, :, 1] < size[0]).all() and not prompt.empty.any()
    want = torch.tensor([5 * cell[0], cell[1], 8 * cell[0], 4 * cell[1]])
    torch.testing.assert_close(prompt.boxes[0, 0], want)


def test_the_same_everywhere_gives_no_prompt():
    scores = torch.stack([torch.full((5, 5), 3.0), torch.rand(5, 5, generator=torch.Generator().manual_seed(0))])
    for rule in ("extremes", "bands", "component"):
        prompt = from_map(scores, (20, 20), rule=rule)
        assert prompt.empty.tolist() == [True, False]
        assert (prompt.labels[0] == ABSENT).all() and not prompt.has_box[0].any()
        with pytest.raises(ValueError, match=r"maps \[0\] give no prompt"):
            prompt.inputs()
        alone = from_map(scores[0], (20, 20), rule=rule, continuous=True)
        assert alone.points.shape[1] == 0 and alone.boxes.shape[1] == 0


def test_continuous_points_have_gradient():
    scores = torch.rand(2, 4, 5, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    prompt = from_map(scores, (16, 20), rule="bands", count=4, continuous=True)
    still = from_map(scores, (16, 20), rule="bands", count=4)
    assert (prompt.points - still.points).abs().max() < 1.5 and not still.points.requires_grad
    weight = torch.randn(prompt.points.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    grad = torch.autograd.grad((prompt.points * weight).sum(), scores)[0]
    assert grad.isfinite().all() and grad.abs().sum() > 0
    step = 1e-6
    moved = scores.detach().clone()
    moved[0, 1, 2] += step
    other = from_map(moved, (16, 20), rule="bands", count=4, continuous=True)
    slope = ((other.points - prompt.points) * weight).sum() / step
    torch.testing.assert_close(slope, grad[0, 1, 2], rtol=1e-3, atol=1e-6)


def test_a_scale_and_a_shift_change_nothing():
    scores = torch.rand(1, 6, 6, dtype=F64, generator=torch.Generator().manual_seed(3))
    one, other = from_map(scores, (30, 30), upsample=2), from_map(5 * scores - 2, (30, 30), upsample=2)
    assert one.points.equal(other.points) and one.labels.equal(other.labels)


def test_a_segmenter_of_transformers_reads_it():
    transformers = pytest.importorskip("transformers")
    small = dict(hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    torch.manual_seed(0)
    model = transformers.SamModel(
        transformers.SamConfig(
            vision_config=dict(
                **small, output_channels=16, image_size=64, patch_size=16, mlp_dim=16, global_attn_indexes=[0],
                window_size=2, num_pos_feats=8,
            ),
            prompt_encoder_config=dict(hidden_size=16, image_size=64, patch_size=16, mask_input_channels=4),
            mask_decoder_config=dict(**small, mlp_dim=16, iou_head_hidden_dim=8),
        )
    ).eval()  # fmt: skip
    scores = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0))
    prompt = from_map(scores, (48, 64), rule="extremes", threshold=0.6)
    assert (prompt.labels == ABSENT).any()  # maps of different length in one batch
    inputs = prompt.inputs(64, box=True)
    assert inputs["input_points"].shape == (2, 1, prompt.points.shape[1], 2)
    out = model(pixel_values=torch.rand(2, 3, 64, 64), **inputs)
    assert out.pred_masks.isfinite().all() and out.pred_masks.shape[:2] == (2, 1)


def test_tokens_are_laid_out():
    scores = torch.arange(12.0)
    assert from_map(scores[None], (30, 40), grid=(3, 4), count=1).points[0].tolist() == [[35, 25], [5, 5]]
    with pytest.raises(ValueError, match="fill no square"):
        from_map(scores, (30, 40))
    assert from_map(torch.arange(9.0), (30, 30), count=1).points[0, 0].tolist() == [25, 25]
    with pytest.raises(ValueError, match="has 6 cells, but map has 12"):
        from_map(scores[None], (30, 40), grid=(2, 3))


def test_bad_input_is_refused_by_name():
    with pytest.raises(ValueError, match="map is empty"):
        from_map(torch.zeros(1, 0, 4), (8, 8))
    with pytest.raises(ValueError, match="map must be finite"):
        from_map(torch.full((2, 2), float("nan")), (8, 8))
    with pytest.raises(TypeError, match="floating-point scores"):
        from_map(torch.zeros(2, 2, dtype=torch.long), (8, 8))
    with pytest.raises(ValueError, match="rule="):
        from_map(torch.rand(2, 2), (8, 8), rule="peaks")
    with pytest.raises(ValueError, match=r"image_size must be \(height, width\)"):
        from_map(torch.rand(2, 2), (8, 8, 3))
    with pytest.raises(ValueError, match="part must be"):
        from_map(torch.rand(2, 2), (8, 8), part=1.5)
    assert from_map(torch.rand(0, 3, 3), (9, 9)).points.shape[0] == 0


def test_no_input_is_changed():
    scores = blobs()
    before = scores.clone()
    from_map(scores, (60, 100), upsample=2, continuous=True)
    assert scores.equal(before)
