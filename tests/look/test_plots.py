"""Pictures show the numbers they were given, and say what is missing."""

import importlib
import io

import pytest
import torch

from attnlib.look import head_grid, map_over_image, profile, sink_profile


def png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=40)
    assert buffer.getvalue()[:4] == b"\x89PNG"


@pytest.fixture
def drawn():
    pytest.importorskip("matplotlib")


def test_map_over_image(drawn):
    weights = torch.rand(2, 4, 4)
    figure = map_over_image(weights, torch.rand(3, 16, 16), ["a", "b"])
    assert len(figure.axes) == 3
    for axis, values in zip(figure.axes[1:], weights, strict=True):
        torch.testing.assert_close(torch.as_tensor(axis.images[1].get_array().data), values)
    png(figure)
    png(map_over_image(weights[0], torch.rand(3, 8, 12)))


def test_head_grid(drawn):
    maps = torch.rand(2, 3, 4, 5)
    figure = head_grid(maps, image=torch.rand(3, 8, 10))
    assert len(figure.axes) == 6
    torch.testing.assert_close(torch.as_tensor(figure.axes[4].images[1].get_array().data), maps[1, 1])
    png(figure)


def test_profiles(drawn):
    results = {0: {"sink_score": torch.tensor([0.25, 0.75])}, 5: {"sink_score": torch.tensor([0.5, 1.0])}}
    figure = sink_profile(results)
    lines = figure.axes[0].lines
    assert [list(line.get_ydata()) for line in lines] == [[0.25, 0.75], [0.5, 1.0], [0.5, 0.75]]
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["0", "5"]
    png(figure)


@pytest.mark.parametrize(
    "draw, match",
    [
        (lambda: map_over_image(torch.rand(4), torch.rand(3, 8, 8)), "weights must have shape"),
        (lambda: map_over_image(torch.rand(4, 4), torch.rand(8, 8)), "image must have shape"),
        (lambda: map_over_image(torch.rand(4, 4), torch.rand(3, 8, 8), ["a", "b"]), "2 titles"),
        (lambda: head_grid(torch.rand(3, 4, 4)), "maps must have shape"),
        (lambda: head_grid(torch.rand(1, 1, 4, 4), labels=["a", "b"]), "2 labels"),
        (lambda: profile({}, "rank"), "nothing was recorded"),
        (lambda: profile({0: {"entropy": torch.rand(2)}}, "rank"), r"possible: \['entropy'\]"),
    ],
)
def test_bad_input(draw, match):
    with pytest.raises(ValueError, match=match):
        draw()


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    plain = importlib.import_module

    def missing(name, *args):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return plain(name, *args)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"pip install 'attnlib\[bench\]'"):
        head_grid(torch.rand(1, 1, 2, 2))
