"""The lines on segmentation of the suite of tasks, small, and the lesions that they look for."""

import gzip
import json
import struct
from pathlib import Path

import pytest
import torch

from attnlib.bench.data import brain, referring
from attnlib.bench.data.files import DataError
from attnlib.bench.data.scenes import BACKGROUND, make_scene
from attnlib.bench.studies.tasks import lesions, sentence

ROOT = Path(__file__).parents[2]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def nifti(volume, kind=2):
    """A compressed file of bytes, first axis fastest."""
    head = bytearray(352)
    head[40:56] = struct.pack("<8h", 3, *volume.shape, 1, 1, 1, 1)
    head[70:72] = struct.pack("<h", kind)
    head[108:112] = struct.pack("<f", 352.0)
    head[344:348] = b"n+1\0"
    return gzip.compress(bytes(head) + volume.permute(2, 1, 0).contiguous().numpy().tobytes())


def test_nifti_files_are_read_or_refused(tmp_path):
    volume = torch.randint(0, 256, (4, 6, 2), generator=rng(), dtype=torch.uint8)
    path = tmp_path / "a.nii.gz"
    path.write_bytes(nifti(volume))
    assert torch.equal(brain.read_nifti(path), volume)
    short = gzip.compress(gzip.decompress(nifti(volume))[:-1])
    for raw, said in (
        (nifti(volume, 4), "three of bytes"), (nifti(volume)[:-9], "cannot be read"), (b"no", "cannot be read"),
        (gzip.compress(bytes(400)), "no NIfTI-1"), (short, "47 voxels of 48"),
    ):  # fmt: skip
        path.write_bytes(raw)
        with pytest.raises(DataError, match=said):
            brain.read_nifti(path)
    for name in ("t1", "gm", "wm"):
        (tmp_path / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz").write_bytes(nifti(volume))
    head = brain.mni(tmp_path)
    assert head.t1.shape == (2, 3, 1)
    torch.testing.assert_close(head.white[1, 2, 0], volume[2:4, 4:6].float().mean() / 255)


def test_without_nilearn_the_template_says_where_it_is(monkeypatch):
    monkeypatch.setattr(brain.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install --no-deps nilearn"):
        brain.mni()


def test_slabs_share_nothing():
    head = brain.phantom()
    train, test = brain.slabs(head, gap=3)
    assert train and test and min(abs(a - b) for a in train for b in test) == 4
    assert torch.equal(head.white, head.white.flip(0))  # which is why no hemisphere is held out


def test_lesions_are_where_labels_say_and_as_large():
    head = brain.phantom()
    train, _ = brain.slabs(head)
    sizes = []
    for diameter in ((4.0, 6.0), (10.0, 20.0)):
        with_, labels = brain.lesions(head, train, 40, rng(1), number=(1, 1), diameter=diameter, noise=0.0, shade=0.0)
        assert bool((labels.flatten(1).sum(1) > 0).all())
        sizes.append(float(labels.flatten(1).sum(1).float().mean()))
        inside = torch.stack([i[0][l == 1].mean() for i, l in zip(with_, labels, strict=True)])
        around = torch.nn.functional.max_pool2d(labels[:, None].float(), 5, 1, 2)[:, 0] - labels > 0
        outside = torch.stack([i[0][a].median() for i, a in zip(with_, around, strict=True)])
        assert float((inside < outside).float().mean()) > 0.9  # darker than what is around
    assert 3 < sizes[0] < 8 < 15 < sizes[1] < 79
    empty, labels = brain.lesions(head, train, 4, rng(1), number=(0, 0))
    assert not labels.any() and empty.isfinite().all()
    with pytest.raises(ValueError, match="side=200"):
        brain.lesions(head, train, 1, side=200)


def test_scores_of_lesions_are_counted_by_hand():
    truth = torch.zeros(2, 6, 6, dtype=torch.bool)
    truth[0, 0, :4], truth[1, 0, 0] = True, True
    found = truth.clone()
    found[0, 0, :2] = False
    found[1, 0, 0], found[1, 3:5, 3] = False, True
    found[0, 5, 5] = True
    assert lesions.scores(found, truth) == pytest.approx({"dice": 50 * 4 / 7, "detected": 50.0})
    assert lesions.false_alarms(found, truth) == 1.0


def test_lesions_study(tmp_path):
    names = ("unet", "deep", "dagunet", "medusa")
    given = dict(steps=1, seeds=(0, 1), tested=1, made=4, names=names, head=brain.phantom(size=(48, 60, 48)))
    found = lesions.measure(**given, keep=tmp_path / "kept", pictures=tmp_path)
    assert [r["name"] for r in found["rows"]] == list(names) and "made-up" in found["data"]
    assert all(0 <= r["dice small"]["mean"] <= 100 for r in found["rows"])
    assert {r["name"] for r in found["rows"] if "beside" in r} == {"dagunet"}
    assert (tmp_path / "tasks-lesions-cpu.svg").exists() and (tmp_path / "tasks-lesions-cpu.png").exists()
    assert lesions.measure(**given, keep=tmp_path / "kept")["runs"] == found["runs"] and json.dumps(found)
    assert len(lesions.table(found).splitlines()) == 2 + len(names)


@pytest.mark.parametrize("name", lesions.SHOWN)
def test_networks_have_one_encoder_and_all_of_them_learns(name):
    net = lesions.network(name)
    inner = (net.model if name == "medusa" else net).encoder
    assert tuple(b.convs[1][0].weight.shape[0] for b in inner.blocks) == lesions.DIMS
    x, y = brain.lesions(brain.phantom(size=(32, 40, 32)), [15, 16], 2, rng(), side=32, number=(1, 1))
    lesions.objective(net, (x, y)).backward()
    assert not [n for n, p in net.named_parameters() if p.grad is None]
    assert lesions.answers(net, x).shape == y.shape


def fits(said, name):
    """Whether a sentence fits a thing."""
    colour, shape = name.split()
    return said in (f"the {name}", f"all {colour} things", f"all {referring.PLURALS.get(shape)}")


def test_sentences_name_nothing_one_thing_or_many():
    for seed in range(30):
        scene = make_scene(seed)
        seen = [t.name for t in scene.things if t.contrast >= referring.SEEN]
        for kind, least, most in (("none", 0, 0), ("one", 1, 1), ("many", 2, 99)):
            for said in referring.sentences(scene, kind):
                named = [n for n in seen if fits(said, n)]
                assert least <= len(named) <= most, (said, seen)


def test_masks_are_the_pixels_that_differ_from_the_ground():
    checked = 0
    for seed in range(40):
        scene = make_scene(seed, noise=0.0)
        if any(t.name.startswith("digit") or t.contrast < referring.SEEN for t in scene.things):
            continue
        assert torch.equal(referring.mask(scene, scene.names), (scene.image - BACKGROUND).abs().amax(0) > 0)
        checked += 1
    assert checked > 5


def test_samples_have_the_kinds_they_say():
    samples = referring.referred(12, 1)
    assert samples.pixels.shape == (12, 3, 64, 64) and set(samples.kind.tolist()) == {0, 1, 2}
    assert torch.equal(samples.masks.flatten(1).any(1), samples.kind > 0)
    assert ((samples.words > 0) == (samples.erased > 0)).all() and (samples.erased[:, 1] == 1).all()
    again, other = referring.referred(12, 1), referring.referred(12, 1, "test")
    assert again.sentences == samples.sentences and not torch.equal(other.pixels, samples.pixels)


def test_sentence_study(tmp_path):
    def read(sentences):
        return torch.randn(len(sentences), 6, generator=rng())

    names = ("none", "added", "softmax*C", "dmmi plain", "dmmi")
    given = dict(steps=1, seeds=(0, 1), tested=5, made=5, names=names, read=read, keep=tmp_path / "kept")
    found = sentence.measure(**given, pictures=tmp_path)
    assert [r["name"] for r in found["rows"]] == list(names)
    assert all(0 <= r["mIoU"]["mean"] <= 100 and 0 <= r["empty"]["mean"] <= 100 for r in found["rows"])
    assert {r["name"] for r in found["rows"] if "beside" in r} == {"softmax*C", "dmmi"}
    assert (tmp_path / "tasks-sentence-cpu.svg").exists() and (tmp_path / "tasks-sentence-cpu.png").exists()
    assert sentence.measure(**given)["runs"] == found["runs"] and json.dumps(found)
    assert len(sentence.table(found).splitlines()) == 2 + len(names)


def test_only_gates_and_what_is_added_hear_the_sentence():
    samples, chosen = referring.referred(3, 2), torch.arange(3)
    for name in sentence.SHOWN:
        torch.manual_seed(0)
        net = sentence.network(name, 6)
        answers = []
        for k in range(2):
            other = samples._replace(words=samples.words.roll(k, 0))
            vectors = torch.randn(3, 6, generator=rng(k))
            given = sentence.inputs(name, other, chosen, vectors)
            assert ("erased" in given) == (name == "dmmi")
            with torch.no_grad():
                answers.append(net.eval()(**given))
        assert torch.equal(*answers) == (name == "none"), name


@pytest.mark.parametrize("line", ["lesions", "sentence"])
def test_the_page_has_the_table_of_the_results(line):
    found = json.loads((ROOT / "benchmarks" / "results" / f"tasks-{line}-cpu.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "tasks-segmentation.md").read_text(encoding="utf-8")
    module, names = {"lesions": (lesions, lesions.NAMES), "sentence": (sentence, tuple(sentence.SHOWN))}[line]
    assert f"<!-- {line} -->\n{module.table(found)}\n<!-- end {line} -->" in page
    assert [row["name"] for row in found["rows"]] == list(names)
