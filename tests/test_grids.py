import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlib import Layout
from attnlib.grids import (
    ROUTES,
    TURNS,
    Partition,
    Windows,
    block_windows,
    coordinates,
    crop_grid,
    grid_windows,
    inverse_permutation,
    pad_to_multiple,
    route,
    unblock_windows,
    unflatten_grid,
    ungrid_windows,
    window_partition,
)

X = torch.zeros(1, 4, 2)
LAYOUT = Layout((("a", 3), ("b", 1)))


@pytest.mark.parametrize("cut, join", [(block_windows, unblock_windows), (grid_windows, ungrid_windows)])
@pytest.mark.parametrize("grid, window", [((8,), 4), ((6, 8), (3, 2)), ((4, 6, 2), (2, 3, 1))])
def test_windows_and_back(cut, join, grid, window):
    x = torch.randn(2, *grid, 3)
    assert torch.equal(join(cut(x, window)), x)


def test_block_windows_are_neighbours_and_grid_windows_are_spread():
    x = torch.arange(16).reshape(1, 4, 4, 1)
    assert block_windows(x, 2)[0, 0, 0, ..., 0].tolist() == [[0, 1], [4, 5]]
    assert grid_windows(x, 2)[0, 0, 0, ..., 0].tolist() == [[0, 2], [8, 10]]
    assert window_partition((4, 4), 2, "grid").q_index[0].tolist() == [0, 2, 8, 10]


def test_windows_at_an_interval_lie_between_one_another_in_a_block():
    """They are the grid windows of every block; at interval 1, blocks."""
    x = torch.randn(2, 8, 12, 3)
    far = Windows((8, 12), (2, 3), interval=(2, 4))
    blocks = block_windows(x, (4, 12)).flatten(0, 2)
    expected = grid_windows(blocks, (2, 3)).reshape(2, 16, 6, 3)
    assert far.cut(x).equal(expected) and far.join(far.cut(x)).equal(x)
    assert far.numbers()[1].tolist() == [1, 5, 9, 25, 29, 33]
    assert Windows((8, 12), (2, 3), interval=(1, 1)).cut(x).equal(Windows((8, 12), (2, 3)).cut(x))


@pytest.mark.parametrize("window, words", [((3, 4), "divide"), ((16, 4), "fit"), ((4,), "2")])
def test_windows_that_do_not_fit(window, words):
    with pytest.raises(ValueError, match=words):
        block_windows(torch.zeros(1, 8, 8, 1), window)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_padding_is_undone_by_cropping(h, w, multiple):
    x = torch.randn(1, h, w, 2)
    padded = pad_to_multiple(x, multiple)
    assert padded.shape[1] % multiple == padded.shape[2] % multiple == 0
    assert torch.equal(crop_grid(padded, (h, w)), x)
    assert float(padded.abs().sum()) == pytest.approx(float(x.abs().sum()), rel=1e-5)


def test_inverse_permutation():
    p = torch.stack([torch.randperm(7) for _ in range(3)])
    assert torch.equal(p.gather(1, inverse_permutation(p)), torch.arange(7).expand(3, 7))


@given(st.integers(1, 7), st.integers(1, 7), st.sampled_from(ROUTES), st.sets(st.sampled_from(TURNS)))
@settings(max_examples=60, deadline=None)
def test_routes_visit_every_token_once_and_lead_back(h, w, way, turns):
    name = "-".join([way, *sorted(turns)])
    steps, x = route(name, (h, w)), torch.randn(2, h * w, 3)
    assert sorted(steps.tolist()) == list(range(h * w))
    assert torch.equal(x[:, steps][:, inverse_permutation(steps)], x)
    if "reversed" not in turns:
        assert torch.equal(route(f"{name}-reversed", (h, w)), steps.flip(0))
    if way in ("snake", "spiral"):  # they never jump
        at = coordinates((h, w))[steps]
        assert ((at[1:] - at[:-1]).abs().sum(1) == 1).all()


def walked(name, grid):
    """The map with the step of every token in its place."""
    return inverse_permutation(route(name, grid)).view(grid).tolist()


def test_routes_as_pictures():
    assert walked("rows", (2, 3)) == [[0, 1, 2], [3, 4, 5]]
    assert walked("columns", (2, 3)) == walked("rows-transposed", (2, 3)) == [[0, 2, 4], [1, 3, 5]]
    assert walked("snake", (3, 2)) == [[0, 1], [3, 2], [4, 5]]
    assert walked("snake-transposed", (2, 3)) == [[0, 3, 4], [1, 2, 5]]
    assert walked("diagonal", (2, 3)) == [[0, 1, 3], [2, 4, 5]]
    assert walked("zigzag", (3, 3)) == [[0, 1, 5], [2, 4, 6], [3, 7, 8]]
    assert walked("zigzag-mirrored", (3, 3)) == [row[::-1] for row in walked("zigzag", (3, 3))]
    assert walked("spiral", (3, 4)) == [[0, 1, 2, 3], [9, 10, 11, 4], [8, 7, 6, 5]]
    assert walked("spiral-flipped", (3, 4)) == walked("spiral", (3, 4))[::-1]
    assert walked("spiral-transposed", (4, 3)) == [list(c) for c in zip(*walked("spiral", (3, 4)), strict=True)]
    assert route("rows-reversed", (2, 1, 2)).tolist() == [3, 2, 1, 0]


def test_layout_reads_and_joins():
    layout = Layout((("text", 3), ("image", (2, 2)), ("cls", 1)))
    x = torch.randn(2, 8, 4)
    parts = layout.split(x)
    assert {k: v.shape[1] for k, v in parts.items()} == {"text": 3, "image": 4, "cls": 1}
    assert torch.equal(layout.join(parts), x)
    assert layout.types().tolist() == [0, 0, 0, 1, 1, 1, 1, 2]
    assert layout.span("cls") == (7, 8) and layout.grid() == (2, 2) and hash(layout) == hash(Layout(layout.segments))
    assert coordinates((2, 2)).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Layout((("a", 1), ("a", 2))), "repeats"),
        (lambda: Layout((("a", -1),)), "negative"),
        (lambda: Layout((("a", 3),)).check(4), "adds up to 3"),
        (lambda: Layout((("a", 3),)).span("b"), "no segment 'b'"),
        (lambda: Layout((("a", 3),)).grid(), "0 grid segments"),
        (lambda: window_partition((4,), 2, "diagonal"), "diagonal"),
        (lambda: Layout((("a", ()),)), "1 to 3 axes"),
        (lambda: Layout((("a", (1, 2, 3, 4)),)), "1 to 3 axes"),
        (lambda: Layout((("a", 2.5),)), "'a'.*2.5"),
        (lambda: Layout((("a", True),)), "'a'.*True"),
        (lambda: Layout(((3, 2),)), "name of a segment.*3"),
        (lambda: Layout((("a",),)), "pairs"),
        (lambda: Layout("ab"), "segments.*'ab'"),
        (lambda: Layout(None), "segments.*None"),
        (lambda: Layout.image(2, 2.0), "width.*2.0"),
        (lambda: LAYOUT.split(X, dim=3), "dim=3"),
        (lambda: LAYOUT.split([1]), r"x.*\[1\]"),
        (lambda: LAYOUT.join({"a": X}), r"\['a'\].*\['a', 'b'\]"),
        (lambda: LAYOUT.join({"a": X, "b": X, "c": X}), "'c'"),
        (lambda: LAYOUT.join({"a": X, "b": X}), "parts.'a'. has 4.*says 3"),
        (lambda: coordinates((2, -1)), "grid.*-1"),
        (lambda: coordinates(()), "grid"),
        (lambda: coordinates(3), "grid.*3"),
        (lambda: block_windows(X, 2.0), "window_size.*2.0"),
        (lambda: block_windows(X[0], 2), "x must have shape"),
        (lambda: unblock_windows(X), "x must have shape"),
        (lambda: unflatten_grid(X, (3, 2)), r"grid=\(3, 2\).*4"),
        (lambda: pad_to_multiple(X, 0), "multiple.*0"),
        (lambda: crop_grid(X, (5,)), r"grid=\(5,\)"),
        (lambda: crop_grid(X, (2, 2)), r"grid=\(2, 2\)"),
        (lambda: window_partition((0, 4), 2), "grid.*0"),
        (lambda: Partition(torch.zeros(2, 2)), "q_index.*float32"),
        (lambda: Partition(torch.full((2, 2), -2)), "q_index holds -2"),
        (lambda: Partition(torch.zeros(2, 2, dtype=torch.long), torch.zeros(3, 2, dtype=torch.long)), "3 groups.*2"),
        (lambda: route("circle", (2, 2)), "'circle'.*spiral"),
        (lambda: route("snake-upwards", (2, 2)), "upwards.*reversed"),
        (lambda: route("rows-reversed-reversed", (2, 2)), "no route"),
        (lambda: route(3, (2, 2)), "name.*3"),
        (lambda: route("snake", (4,)), "two axes"),
        (lambda: route("columns", (2, 2, 2)), "two axes"),
        (lambda: inverse_permutation(torch.tensor([0, 0, 2])), "leaves out token 1"),
        (lambda: inverse_permutation(torch.tensor([0, 3, 1])), "token 3"),
        (lambda: inverse_permutation(torch.tensor([0.0])), "permutation.*float32"),
    ],
)
def test_bad_arguments_are_refused(make, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make()
