"""The study of voxels, as small as it goes."""

import pytest
import torch

from attnlib.bench.studies import voxels
from attnlib.ops.voxels import check_voxels, window_segments


def test_scenes_are_voxels_of_every_kind_and_windows_are_unequal():
    given = voxels.scenes(4, torch.Generator().manual_seed(0))
    check_voxels(given.coords, voxels.SHAPE)
    assert set(given.labels.tolist()) == set(range(len(voxels.KINDS) + 1))
    assert given.coords[:, 0].max() == 3 and given.x.abs().max() <= 1
    lengths = window_segments(given.coords, voxels.SHAPE, voxels.WINDOW)[1].diff()
    assert lengths.max() > voxels.LIMIT > lengths.float().mean()


@pytest.mark.parametrize("limit", [None, 4])
def test_padded_windows_are_softmax_attention_window_by_window(limit):
    torch.manual_seed(0)
    m, bounds = voxels.PaddedSoftmax(8, 2, limit).double(), torch.tensor([0, 3, 4, 11])
    x = torch.randn(11, 8, dtype=torch.double)
    y = m.packed(x, bounds)
    for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        end = b if limit is None else min(b, a + limit)
        q, k, v = (t.view(-1, 2, 4).transpose(0, 1) for t in m.qkv(x[a:end]).chunk(3, -1))
        out = (q @ k.mT / 2).softmax(-1) @ v
        torch.testing.assert_close(y[a:end], m.proj(out.transpose(0, 1).flatten(1)))
        assert not y[end:b].any()


def test_answers_stand_in_the_order_of_the_voxels():
    torch.manual_seed(0)
    model = voxels.Teller(voxels.SEGMENTS).eval()
    given = voxels.scenes(2, torch.Generator().manual_seed(0))
    order = torch.randperm(len(given.x))
    mixed = voxels.Scenes(*(t[order] for t in given))
    torch.testing.assert_close(model(mixed), model(given)[order], atol=1e-4, rtol=1e-4)


def test_the_study_runs(tmp_path):
    found = voxels.measure(steps=1, batch=1, pool=2, seeds=(0, 1), tested=2, timed=1)
    assert [r["name"] for r in found["rows"]] == list(voxels.NAMES) == list(found["costs"])
    sizes = {r["name"]: r["parameters"]["mean"] for r in found["rows"]}
    assert sizes[voxels.SEGMENTS] == sizes[voxels.BASELINE] == sizes[voxels.LIMITED] > sizes[voxels.NONE]
