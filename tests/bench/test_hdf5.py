"""Weights out of HDF5 files: what h5py wrote, damage, and the edge detector's VGG-16 where it is kept."""

import pytest
import torch
from parity import HERE

from attnlib.bench import models
from attnlib.bench.hdf5 import read_hdf5
from attnlib.models.perception import EccNet

KEPT = HERE / "hdf5" / "keras.h5"


def test_arrays_that_h5py_wrote():
    found = read_hdf5(KEPT)
    assert torch.equal(found["block1/layers/conv2d/vars/0"], torch.arange(6.0).view(1, 2, 3))
    assert torch.equal(found["block1/layers/conv2d/vars/1"], torch.ones(3))
    assert {k: v.tolist() for k, v in found.items() if k.startswith("many")} == {
        f"many/{i}": [float(i)] * 2
        for i in range(20)  # more than one table of names
    }
    assert len(found) == 22


def test_damage_is_told(tmp_path):
    whole = KEPT.read_bytes()
    for name, data, says in (
        ("short.h5", whole[:3000], "truncated or damaged"),
        ("other.h5", b"PK" + whole[2:], "no HDF5 file of the first format"),
        ("newer.h5", whole[:8] + b"\2" + whole[9:], "no HDF5 file of the first format"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=says):
            read_hdf5(tmp_path / name)


def test_names_of_the_blocks(monkeypatch, tmp_path):
    arrays = {}
    for b, count in enumerate((2, 2, 3, 3, 3)):
        for i in range(count):
            stem = f"block{b + 1}/layers/conv2d{f'_{i}' if i else ''}/vars"
            conv = EccNet(width=1).blocks[b][2 * i]
            arrays[f"{stem}/0"], arrays[f"{stem}/1"] = conv.weight.permute(2, 3, 1, 0).detach(), conv.bias.detach()
    arrays["fuse/vars/0"] = torch.zeros(1, 1, 5, 1)
    net = EccNet(width=1).load_keras(models._vgg16(arrays))
    kernel = arrays["block3/layers/conv2d_2/vars/0"]
    assert torch.equal(net.blocks[2][4].weight, kernel.permute(3, 2, 0, 1))


@pytest.mark.skipif(not models.is_here("hed-vgg16"), reason="make models fetches it")
def test_the_edge_detectors_trunk():
    net, processor = models.load("hed", ecc_depth=0, kind="max")
    assert processor is None and sum(p.numel() for p in net.parameters()) == 14714688
    edge = torch.zeros(1, 3, 64, 64)
    edge[..., 32:] = 255
    with torch.no_grad():
        block = net.blocks[0](edge)
    assert float(block[..., 20:44, 30:34].std()) > 2 * float(block[..., 20:44, 8:12].std())
