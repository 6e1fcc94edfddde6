"""Iris: crops hold equal edge mass, map back, and dual learning keeps what agrees; no authors' code to hold it to."""

import time

import numpy as np
import pytest
import torch

from attnlib.look.speak import CallableSpeaker, Speaker
from attnlib.look.zoom import (
    InformationCrops,
    Iris,
    dual_learn,
    failure_weights,
    hardest_first,
    information_windows,
    spectral_entropy,
)
from attnlib.look.zoom.iris import box_iou, canny_edges, sobel_edges
from look.speakers import FAMILIES


def _direct(edges, k_min, rho_min, alpha, max_crops):
    """The equations, sum by sum, without windows at the boundary."""
    left, found, k = edges.copy(), [], k_min
    while k <= min(edges.shape) and len(found) < max_crops:
        step, rho_k = max(k // 4, 32), rho_min / (k / k_min) ** 2
        for y in range(0, edges.shape[0] - k + 1, step):
            for x in range(0, edges.shape[1] - k + 1, step):
                rho = left[y : y + k, x : x + k].sum() / k**2
                if rho >= rho_k * (1 - 1e-12) and len(found) < max_crops:
                    found.append(((x, y, x + k, y + k), rho))
                    left[y : y + k, x : x + k] = False
        k = int(np.ceil(alpha * k))
    return found


def _edges(height, width, seed=0):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    return rng.random((height, width)) < 0.5 * np.exp(-((y - height / 3) ** 2 + (x - width / 2) ** 2) / 4000)


@pytest.mark.parametrize("size,k_min,rho,alpha", [((200, 300), 32, 0.1, 1.5), ((170, 131), 40, 0.15, 1.3)])
def test_windows_equal_the_direct_sums(size, k_min, rho, alpha):
    edges = _edges(*size)
    expected = _direct(edges, k_min, rho, alpha, 12)
    found = information_windows(edges, k_min=k_min, rho_min=rho, alpha=alpha, max_crops=12, boundary=False)
    assert [(w.box, w.density) for w in found] == expected and len(expected) > 2


def test_windows_with_no_line_within_a_byte_of_pixels_are_counted_whole():
    edges = np.ones((300, 900), bool)
    edges[:20, 400:] = False
    expected = _direct(edges, 280, 0.9, 1.5, 12)
    found = information_windows(edges, k_min=280, rho_min=0.9, max_crops=12, boundary=False)
    assert [(w.box, w.density) for w in found] == expected and len(expected) > 2


def test_edge_pixels_are_spent_once_and_every_window_holds_as_many():
    edges = _edges(256, 400)
    windows = information_windows(edges, k_min=32, rho_min=0.1, max_crops=30)
    left = edges.copy()
    for window in windows:
        x1, y1, x2, y2 = window.box
        mass = left[y1:y2, x1:x2].sum()
        assert mass == round(window.density * (x2 - x1) ** 2) and mass >= 0.1 * 32**2
        left[y1:y2, x1:x2] = False
    assert 1 < len(windows) <= 30 and len({w.box[2] - w.box[0] for w in windows}) > 1
    assert len(information_windows(edges, k_min=32, rho_min=0.1, max_crops=3)) == 3


def test_strips_at_the_boundary_are_looked_at():
    edges = np.zeros((100, 110), bool)
    edges[90:100, 95:110] = True
    assert information_windows(edges, k_min=64, rho_min=0.03, boundary=False) == []
    (window,) = information_windows(edges, k_min=64, rho_min=0.03)
    assert window.box == (46, 36, 110, 100)


def test_one_dense_place_gives_the_first_crop_and_coordinates_map_back():
    picture = np.full((300, 400, 3), 250, np.uint8)
    picture[96:128, 192:224] = np.random.default_rng(0).integers(0, 255, (32, 32, 3))
    crops = InformationCrops(k_min=32, size=64)(picture)
    x1, y1, x2, y2 = crops[0].box
    assert x1 <= 200 < x2 and y1 <= 110 < y2 and crops[0].image.shape == (64, 64, 3)
    assert crops[-1].box == (0, 0, 400, 300)
    scale = 64 / (x2 - x1)
    assert crops[0].to_picture([[(200 - x1) * scale, (110 - y1) * scale]]).tolist() == [[200.0, 110.0]]
    assert [c.box for c in InformationCrops(k_min=32, order="reading")(picture)[:-1]] == sorted(
        (c.box for c in crops[:-1]), key=lambda box: (box[1], box[0])
    )


def test_dark_and_light_screens_have_the_same_crops():
    picture = np.full((200, 200, 3), 250, np.uint8)
    picture[60:90:4, 60:90] = 10
    boxes = [[c.box for c in InformationCrops(k_min=32)(screen)] for screen in (picture, 255 - picture)]
    assert boxes[0] == boxes[1] and len(boxes[0]) > 1
    for edges in (sobel_edges, canny_edges):
        assert (edges(picture) == edges(255 - picture)).mean() > 0.99


def test_a_blank_screen_has_no_windows_and_is_shown_whole():
    blank = np.full((100, 120, 3), 200, np.uint8)
    assert information_windows(sobel_edges(blank)) == [] == information_windows(np.zeros((100, 120), bool))
    (whole,) = InformationCrops()(blank)
    assert whole.box == (0, 0, 120, 100) and (whole.image == blank).all()


def test_spectral_entropy():
    rng = np.random.default_rng(0)
    grid = np.zeros((64, 64))
    grid[::8] = grid[:, ::8] = 1
    noise = rng.random((64, 64)) < grid.mean()
    assert spectral_entropy(np.zeros((8, 8))) == 0 == spectral_entropy(np.ones((8, 8)))
    assert 0 < spectral_entropy(grid) < spectral_entropy(noise)
    assert hardest_first([grid, np.ones((4, 4)), noise]) == [2, 0, 1]
    energy = np.abs(np.fft.fft2(grid)) ** 2
    p = energy[energy > 1e-9] / energy.sum()
    assert abs(spectral_entropy(grid) + (p * np.log(p)).sum()) < 1e-6


def test_dual_learning_keeps_what_agrees():
    screen = np.zeros((100, 100, 3), np.uint8)
    named = {"ok": (10, 10, 30, 20), "cancel": (50, 50, 80, 70)}
    boxes = {v: k for k, v in named.items()}
    found = dual_learn(lambda image, text: named[text], lambda image, box: boxes[tuple(box)], screen, "ok")
    assert found.agreed and found.rounds == 1 and found.box == named["ok"] and found.text == "ok"
    turn = iter([(0, 0, 5, 5), (20, 20, 25, 25), (40, 40, 45, 45), (60, 60, 65, 65)])
    lost = dual_learn(lambda image, text: next(turn), lambda image, box: "x", screen, "ok")
    assert not lost.agreed and lost.rounds == 3
    turn = iter([(0, 0, 5, 5), (20, 20, 25, 25), (20, 20, 25, 26)])
    late = dual_learn(lambda image, text: next(turn), lambda image, box: "x", screen, "ok")
    assert late.agreed and late.rounds == 2 and late.box == (20, 20, 25, 25)
    assert box_iou((0, 0, 1, 1), (1, 1, 2, 2)) == 0 == box_iou((0, 0, 0, 0), (0, 0, 0, 0))
    weights = failure_weights([4, 0, 0, 2], [4, 4, 0, 4])
    assert torch.allclose(weights.sum(), torch.tensor(1.0).double())
    assert weights[0] == weights.min() > 0 and weights[1] == weights[2] == weights.max()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_it_answers_through_crops_on_tiny_models(family):
    speaker = Speaker(*FAMILIES[family](), max_new_tokens=4)
    screen = np.full((120, 160, 3), 240, np.uint8)
    screen[40:60:4, 40:80] = 0
    iris = Iris(speaker, InformationCrops(k_min=32, max_crops=2, size=32))
    found = iris.answer(screen, "what is it ?")
    assert found.calls["ask"] == 1 and len(found.views) == len(found.boxes) + 1 >= 2
    blank = np.full((120, 160, 3), 240, np.uint8)
    assert iris.answer(blank, "what is it ?") == speaker.ask(blank, "what is it ?")


def test_places_are_told():
    texts = []
    speaker = CallableSpeaker(lambda pictures, text: texts.append(text) or "here")
    screen = np.full((120, 160, 3), 240, np.uint8)
    screen[40:60:4, 40:80] = 0
    found = Iris(speaker, InformationCrops(k_min=32)).answer(screen, "Where is the menu?")
    x1, y1, x2, y2 = found.boxes[0]
    assert f"Crop 1, at ({x1}, {y1}) to ({x2}, {y2}): <image>" in texts[0] and texts[0].endswith("Where is the menu?")
    assert texts[0].count("<image>") == len(found.views)


def test_a_megapixel_is_quick():
    edges = np.random.default_rng(0).random((1000, 1000)) < 0.2
    information_windows(edges)
    start = time.perf_counter()
    information_windows(edges)
    assert time.perf_counter() - start < 1.0  # a bound for busy machines: 0.02 s alone


def test_bad_input_is_told_by_name():
    screen = np.zeros((100, 100, 3), np.uint8)
    for call, error, message in [
        (lambda: InformationCrops()(screen[:1, :1]), ValueError, "1 × 1 pixels is smaller than the smallest window"),
        (lambda: InformationCrops()(screen[:40]), ValueError, "100 × 40 pixels"),
        (lambda: InformationCrops(edges="laplace"), ValueError, "edges"),
        (lambda: InformationCrops(edges=3), TypeError, "edges must be"),
        (lambda: InformationCrops(edges=lambda p: np.zeros((3, 3), bool))(screen), ValueError, "boolean map"),
        (lambda: InformationCrops(alpha=1.0), ValueError, "alpha"),
        (lambda: InformationCrops(rho_min=0), ValueError, "rho_min"),
        (lambda: InformationCrops(k_min=0), ValueError, "k_min"),
        (lambda: InformationCrops(order="size"), ValueError, "order"),
        (lambda: information_windows(np.zeros((4, 4))), ValueError, "boolean map"),
        (lambda: spectral_entropy(np.full((4, 4), np.nan)), ValueError, "finite"),
        (lambda: failure_weights([3], [2]), ValueError, "between 0 and seen"),
        (lambda: failure_weights([1, 2], [2]), ValueError, "one length"),
        (lambda: Iris(CallableSpeaker(), place="no mark"), ValueError, "place must mark"),
        (lambda: dual_learn(lambda i, t: (5, 5, 5, 9), None, screen, "a"), ValueError, "x1 < x2"),
        (lambda: dual_learn(lambda i, t: (0, 0, 500, 9), None, screen, "a"), ValueError, "leaves the picture"),
        (lambda: dual_learn(lambda i, t: (0, 0, 5, 9), lambda i, b: 3, screen, "a"), TypeError, "the text of refer"),
    ]:
        with pytest.raises(error, match=message):
            call()
