"""Every technique takes its layers as a sequence, and says so when it gets one number or one string."""

import pytest

from attnlib.cache import Cap, KeyNorm, KVCompression, SnapKV
from attnlib.hooks import MaskByType, Record, composite
from attnlib.look import Statistics
from attnlib.reduce import CMAI, CompositeLayers
from attnlib.steer import (
    DualAttention,
    HeadDivergence,
    HeadReinforcement,
    HeadScale,
    SinkCalibration,
    SoftPAG,
    VisualBoost,
    VisualRedistribution,
)
from attnlib.types import to_list

TECHNIQUES = {
    "KVCompression": lambda layers: KVCompression(KeyNorm(), Cap(4), layers=layers),
    "SnapKV": lambda layers: SnapKV(ratio=0.5, layers=layers),
    "MaskByType": lambda layers: MaskByType(composite(), layers),
    "Record": lambda layers: Record(layers),
    "Statistics": lambda layers: Statistics(layers),
    "CMAI": lambda layers: CMAI(layers=layers),
    "CompositeLayers": lambda layers: CompositeLayers(layers),
    "DualAttention": lambda layers: DualAttention(layers=layers),
    "HeadDivergence": lambda layers: HeadDivergence(layers=layers),
    "HeadReinforcement": lambda layers: HeadReinforcement(layers=layers),
    "HeadScale": lambda layers: HeadScale([1.0, 0.5], layers),
    "SinkCalibration": lambda layers: SinkCalibration(layers=layers),
    "SoftPAG": lambda layers: SoftPAG(layers=layers),
    "VisualBoost": lambda layers: VisualBoost(layers=layers),
    "VisualRedistribution": lambda layers: VisualRedistribution([0], layers=layers),
}


@pytest.mark.parametrize("name", TECHNIQUES)
def test_layers_are_a_sequence(name):
    make = TECHNIQUES[name]
    assert make((2, "*.3.*")).layers == [2, "*.3.*"]
    assert make(None).layers is None
    for single in (3, "model.layers.3.*"):
        with pytest.raises(TypeError, match=r"layers must be a sequence such as .* write layers=\["):
            make(single)


def test_to_list():
    assert to_list("heads", range(2)) == [0, 1] and to_list("heads", None) is None
    with pytest.raises(TypeError, match=r"heads must be a sequence such as \[0, 1\], got 2; write heads=\[2\]"):
        to_list("heads", 2)
    with pytest.raises(TypeError, match="heads must be a sequence"):
        Record(heads=1)
