"""The study of box bias, as small as it goes, and the average precision that it measures."""

import pytest
import torch

from attnlib.bench.studies import detection
from attnlib.models.detect.plain_detr import Detections


def found(boxes, scores):
    return Detections(torch.tensor(boxes).float(), torch.tensor(scores), torch.zeros(len(boxes), dtype=torch.long))


def test_average_precision():
    truth = [{"boxes": torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10]]), "labels": torch.zeros(2)}]
    right = found([[0, 0, 10, 10], [20, 0, 30, 10]], [0.9, 0.8])
    assert detection.average_precision([right], truth) == 100
    twice = found([[0, 0, 10, 10], [0, 0, 10, 10], [20, 0, 30, 10]], [0.9, 0.8, 0.7])
    assert detection.average_precision([twice], truth) == pytest.approx(100 * (1 + 2 / 3) / 2)
    assert detection.average_precision([found([[5, 5, 30, 30]], [0.5])], truth) == 0


def test_boxes_hold_their_digits():
    images, targets = detection.pictures_of_digits(4, "train", torch.Generator().manual_seed(0))
    for image, target in zip(images, targets, strict=True):
        inside = torch.zeros_like(image, dtype=torch.bool)
        for x1, y1, x2, y2 in target["boxes"].int().tolist():
            inside[:, y1:y2, x1:x2] = True
        assert float(image[~inside].abs().sum()) == 0 and 1 <= len(target["boxes"]) <= 3


def test_the_study_runs(tmp_path):
    result = detection.measure(pictures=tmp_path, steps=(1, 2), batch=2, seeds=(0, 1), tested=4)
    assert [r["name"] for r in result["rows"]] == list(detection.NAMES) and (tmp_path / "detection-cpu.svg").exists()
