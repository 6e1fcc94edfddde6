import sys

import numpy as np
import pytest
import torch

from attnlib.bench.data import files as data
from attnlib.bench.data import tasks

LOADERS = {"text": data.text, "digits": data.digits, "photos": data.photos, "series": data.series}


@pytest.mark.parametrize("name", LOADERS)
def test_loading_twice_gives_the_same(name):
    first, second = LOADERS[name](), LOADERS[name]()
    assert first.fingerprint == second.fingerprint and len(first.fingerprint) == 16
    assert first.source and first.split


def test_text_is_english_and_no_paragraph_is_in_both_parts():
    found = data.text()
    train, test = bytes(found.train.tolist()).decode(), bytes(found.test.tolist()).decode()
    assert len(train) > 200_000 and len(test) > 10_000
    for word in (" the ", " is ", " object"):
        assert train.count(word) > 300

    def key(paragraph):
        return " ".join(paragraph.split())

    held = {key(p) for p in test.split("\n\n")} - {""}
    assert len(held) > 50
    assert not held & {key(p) for p in train.split("\n\n")}


def test_digits_are_the_uci_digits_and_no_image_is_in_both_parts():
    (a, la), (b, lb) = data.digits().train, data.digits().test
    assert len(a) + len(b) == 1797 and a.shape[1:] == (8, 8, 1)
    assert torch.bincount(torch.cat([la, lb])).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert not {x.numpy().tobytes() for x in a} & {x.numpy().tobytes() for x in b}


def test_photos_are_photographs_and_none_is_in_both_parts():
    found = data.photos()
    assert len(found.train) == 5 and len(found.test) == 2
    train = {data.fingerprint(p) for p in found.train}
    for photo in found.test:
        assert data.fingerprint(photo) not in train
    for photo in (*found.train, *found.test):
        assert photo.dtype == torch.uint8 and photo.shape[-1] == 3 and min(photo.shape[:2]) >= 256
        grey = photo.float().mean(-1)
        # Neighbouring pixels of photographs are alike; of noise they are not.
        pair = torch.stack([grey[:, 1:].flatten(), grey[:, :-1].flatten()])
        assert torch.corrcoef(pair)[0, 1] > 0.9


def test_series_is_the_recording_and_stretches_do_not_meet():
    found = data.series()
    assert sum(map(len, found.train)) + sum(map(len, found.test)) == 6000
    assert [len(s) for s in found.test] == [500, 500, 500]
    joined = torch.cat(found.train)
    assert joined.mean().abs() < 1e-4 and (joined.std() - 1).abs() < 1e-3
    assert float(joined.max()) > 2.5  # spikes
    assert found.facts["columns"] == ["membrane potential"]


def test_batches_depend_on_the_seed_alone():
    task = tasks.TASKS["digits"]()
    one, two, three = (task.batch(torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one[0], two[0]) and not torch.equal(one[0], three[0])


def test_forecast_targets_are_the_future_of_their_position():
    task = tasks.TASKS["forecast"]()
    window = torch.arange(task._total(), dtype=torch.float32).view(1, -1, 1)
    past, recent, future = task._split(window)
    assert float(past[0, -1]) + 1 == float(recent[0, 0])
    for t in range(task.grid[0]):
        known = float(recent[0, task.patch * (t + 1) - 1])
        assert future[0, t, :, 0].tolist() == [known + 1 + i for i in range(task.horizon)]


def test_references_order_as_they_must():
    text = tasks.TASKS["text"]().references()
    assert 3 < text["pairs of bytes"] < text["byte frequencies"] < 6
    photo = tasks.TASKS["superres"]().references()
    assert photo["bicubic"] > photo["nearest pixel"] > 20
    forecast = tasks.TASKS["forecast"]().references()
    assert forecast["linear autoregression"] < forecast["last value"]


# ---- the user's own data


@pytest.fixture
def folder(tmp_path):
    from PIL import Image

    images = tmp_path / "pictures"
    images.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (80, 96, 3), dtype=np.uint8)).save(images / f"{i}.png")
    (tmp_path / "book.txt").write_text("It was a dark and stormy night. " * 400)
    rows = "\n".join(f"2001-01-{i:04d},{np.sin(i / 9):.4f},{i % 7}" for i in range(1400))
    (tmp_path / "wave.csv").write_text("date,wave,week\n" + rows)
    return tmp_path


def test_text_file(folder):
    task = tasks.TASKS["text"](folder / "book.txt")
    assert len(task.data.train) == 9 * len(task.data.test)
    assert task.batch(torch.Generator())[0].shape == (8, 64)
    assert "book.txt" in task.data.source and str(folder) not in task.data.source


def test_image_folder(folder):
    task = tasks.TASKS["upsample"](folder / "pictures")
    assert len(task.data.train) == 2 and len(task.data.test) == 1
    low, bicubic, high = task.batch(torch.Generator())
    assert low.shape == (4, 8, 8, 3) and bicubic.shape == high.shape == (4, 24, 24, 3)


def test_csv_file_keeps_numeric_columns_and_order_in_time(folder):
    task = tasks.TASKS["forecast"](folder / "wave.csv")
    assert task.data.facts["columns"] == ["wave", "week"]
    assert len(task.data.train[0]) == 1050 and len(task.data.test[0]) == 350
    assert task.batch(torch.Generator())[2].shape == (16, 16, 16, 2)


KINDS = {"text": "text", "superres": "images", "forecast": "series", "digits": "digits"}


def test_each_path_finds_its_tasks(folder):
    assert set(data.resolve(folder / "book.txt", KINDS)) == {"text"}
    assert set(data.resolve(folder / "pictures", KINDS)) == {"superres"}
    assert set(data.resolve({"forecast": folder / "wave.csv"}, KINDS)) == {"forecast"}
    assert data.resolve(None, KINDS) == {}


def test_unreadable_paths_are_named_with_what_is_possible(folder):
    missing = folder / "nowhere.txt"
    with pytest.raises(data.DataError, match=r"data='.*nowhere.txt' does not exist; possible: a text file") as error:
        data.resolve(missing, KINDS)
    assert isinstance(error.value, ValueError)
    (folder / "empty").mkdir()
    with pytest.raises(data.DataError, match=r"empty' is a folder without images.*\.png"):
        data.resolve(folder / "empty", KINDS)
    with pytest.raises(data.DataError, match="is a folder of images, which none of the tasks"):
        data.resolve(folder / "pictures", {"text": "text"})
    with pytest.raises(data.DataError, match="task 'forecast' reads a CSV file"):
        data.resolve({"forecast": folder / "book.txt"}, KINDS)
    with pytest.raises(data.DataError, match=r"\['songs'\]"):
        data.resolve({"songs": folder / "book.txt"}, KINDS)


def test_a_path_that_the_system_refuses(folder, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(data.DataError, match=r"book.txt' cannot be read \(Permission denied\)"):
        data.resolve(folder / "book.txt", KINDS)


def test_unsuitable_files_are_refused(folder):
    (folder / "short.txt").write_text("too little")
    with pytest.raises(data.DataError, match="10 bytes; a text needs at least"):
        data.text(folder / "short.txt")
    (folder / "blob.txt").write_bytes(bytes(8192))
    with pytest.raises(data.DataError, match="binary"):
        data.text(folder / "blob.txt")
    (folder / "words.csv").write_text("a,b\n" + "x,y\n" * 50)
    with pytest.raises(data.DataError, match="no column that is mostly numbers"):
        data.series(folder / "words.csv")
    (folder / "brief.csv").write_text("v\n" + "1\n2\n" * 50)
    with pytest.raises(data.DataError, match="needs 272 consecutive samples"):
        tasks.TASKS["forecast"](folder / "brief.csv")
    (folder / "pictures" / "torn.png").write_bytes(b"not a picture")
    with pytest.raises(data.DataError, match="torn.png' is not an image"):
        data.photos(folder / "pictures")


def test_a_wheel_without_its_photographs_says_so(monkeypatch):
    monkeypatch.setattr(data, "_TRAIN_PHOTOS", (("skimage", "data/absent.png"),))
    with pytest.raises(data.DataError, match="installed skimage does not ship data/absent.png.*data=PATH"):
        data.photos()


def test_a_missing_extra_names_the_command(monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "skimage"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(ImportError, match=r"needs 'skimage': pip install 'attnlib\[bench\]'"):
        data.require("skimage.data")


def test_tasks_are_found_by_name_and_by_pattern():
    assert tasks.expand(["causal-self", "digits", "text"]) == ["text", "digits"]
    assert {tasks.TASKS[t].pattern for t in tasks.expand(None)} == {
        "noncausal-self",
        "causal-self",
        "noncausal-cross",
        "causal-cross",
    }
    with pytest.raises(ValueError, match=r"tasks: 'sudoku' is not possible; choose from text \(causal-self\)"):
        tasks.expand(["sudoku"])
