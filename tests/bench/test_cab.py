"""The Comprehensive Attention Benchmark: its index on its own scores, its metrics, its tasks' folders."""

import math
import struct
import wave

import numpy as np
import pytest
import torch

from attnlib.bench import cab
from attnlib.bench.cab.tasks import crops, mask_tokens, windows
from attnlib.bench.data.files import DataError

#: Plain attention's scores, as the released example file has them.
PLAIN = {
    "noncausal-self": [3.4748, 1.9735, 4.0953, 2.1985, 34.61, 6.35, 31.66, 23.18, 0.675, 3.42],
    "causal-self": [4.0953, 2.1985, 34.61, 6.35, 31.66],
    "noncausal-cross": [7.425, 0.231, 0.779, 1.138167, 0.77467, 0.478, 0.508, 0.449, 0.4855],
    "causal-cross": [4.0953, 2.1985, 34.61, 6.35, 31.66],
}


# ---- the index


@pytest.mark.parametrize(
    ("pattern", "task", "expected"),
    [
        ("noncausal-self", "TTS", -0.301), ("noncausal-self", "SR", -0.077), ("noncausal-self", "MLM", 0.527),
        ("noncausal-self", "Sum", -0.246), ("noncausal-self", "total", -0.024), ("noncausal-cross", "PCC", 0.449),
        ("noncausal-cross", "LSTF", 0.744), ("noncausal-cross", "total", 0.596), ("causal-cross", "TTS", 1.047),
        ("causal-cross", "Sum", 0.867), ("causal-cross", "total", 0.956),
    ],
)  # fmt: skip
def test_plain_attention_has_its_published_index(pattern, task, expected):
    """The table was made of scores with more digits than the example holds: ROUGE moves the third one."""
    found = cab.compositional_index(pattern, PLAIN[pattern])[task]
    assert found == pytest.approx(expected, abs=4e-3 if task in ("Sum", "total") else 1e-3)


def test_causal_self_without_language_modelling():
    names = [f"{m.task} {m.name}" for m in cab.METRICS["causal-self"]]
    found = cab.compositional_index("causal-self", dict(zip(names[:5], PLAIN["causal-self"], strict=True)))
    assert found["TTS"] == pytest.approx(-0.047, abs=1e-3) and found["Sum"] == pytest.approx(0.784, abs=1e-3)
    assert "LM" not in found and found["total"] == pytest.approx((found["TTS"] + found["Sum"]) / 2)


def test_more_is_better_for_some_and_less_for_others():
    def index(**scores):
        return cab.compositional_index("noncausal-self", {f"SR {k}": v for k, v in scores.items()})["SR"]

    assert index(PSNR=24.0, SSIM=0.7) > index(PSNR=23.0, SSIM=0.7) > index(PSNR=23.0, SSIM=0.6)
    perplexities = [cab.compositional_index("causal-self", {"LM PPL": p})["LM"] for p in (15.0, 20.0)]
    assert perplexities[0] > perplexities[1]


def test_scores_are_read_as_the_released_script_reads_them(tmp_path):
    full = {**PLAIN, "causal-self": [*PLAIN["causal-self"], -100.0]}
    path = tmp_path / "scores.txt"
    path.write_text("\r\n".join("\t".join(map(str, full[p])) + " " for p in cab.PATTERNS))
    assert cab.read_scores(path) == full
    for text, message in [
        ("1 2\n3", "2 lines of scores"),
        ("1 x\n" * 4, "no number"),
        ("1 2\n" * 4, "2 numbers instead"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            cab.read_scores(path)


@pytest.mark.parametrize(
    ("pattern", "scores", "message"),
    [
        ("self", [1.0], "pattern='self' is not possible"),
        ("causal-cross", [1.0, 2.0], "must hold 5 numbers"),
        ("causal-cross", {"SR PSNR": 1.0}, "names \\['SR PSNR'\\]"),
        ("noncausal-self", {"SR PSNR": 1.0}, "lacks \\['SR SSIM'\\], without which SR has no index"),
        ("noncausal-self", {}, "scores is empty"),
    ],
)
def test_bad_scores(pattern, scores, message):
    with pytest.raises(ValueError, match=message):
        cab.compositional_index(pattern, scores)


# ---- metrics


def test_perplexity_leaves_out_what_is_not_asked():
    logits = torch.zeros(1, 3, 4)
    logits[0, 2, 1] = 100.0
    assert cab.perplexity(logits, torch.tensor([[0, -100, -100]])) == pytest.approx(4.0)
    assert cab.perplexity(logits, torch.tensor([[-100, -100, 1]])) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="nothing but -100"):
        cab.perplexity(logits, torch.full((1, 3), -100))


def test_rouge_by_hand():
    found = cab.rouge(["the cat was on the mat"], ["The cat sat on a mat."])
    # the, cat, on, mat of 6 and 6; "the cat" of 5 and 5; "the cat on mat" of 6 and 6
    assert found == pytest.approx({"ROUGE-1": 200 / 3, "ROUGE-2": 20.0, "ROUGE-L": 200 / 3})
    assert cab.rouge(["a b"], ["c d"]) == {"ROUGE-1": 0.0, "ROUGE-2": 0.0, "ROUGE-L": 0.0}
    with pytest.raises(ValueError, match="pairs of texts"):
        cab.rouge(["a"], [])


def test_images_are_scored_as_scikit_image_does():
    metrics = pytest.importorskip("skimage.metrics")
    truth = torch.rand(2, 20, 24, 3)
    guess = (truth + 0.1 * torch.randn_like(truth)).clamp(0, 1)
    a, b = (t.mul(255).round().numpy().astype(np.float64) for t in (guess, truth))
    expected = [metrics.peak_signal_noise_ratio(y, x, data_range=255) for x, y in zip(a, b, strict=True)]
    assert cab.psnr(guess, truth) == pytest.approx(np.mean(expected))
    options = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, channel_axis=-1)
    expected = [metrics.structural_similarity(y, x, **options) for x, y in zip(a, b, strict=True)]
    assert cab.ssim(guess, truth) == pytest.approx(np.mean(expected), abs=1e-9)
    assert cab.ssim(truth, truth) == pytest.approx(1.0) and cab.psnr(truth, truth) == math.inf


def test_clouds_by_hand():
    truth = torch.tensor([[[0.0, 0, 0], [1, 0, 0]]])
    guess = torch.tensor([[[0.0, 0, 0.005], [1, 0, 0.3], [1, 0, 0]]])
    there, back = (0.005 + 0.3 + 0) / 3, (0.005 + 0) / 2
    assert cab.chamfer(guess, truth) == pytest.approx(1000 * (there + back) / 2, rel=1e-5)
    assert cab.chamfer(guess, truth, order=2) == pytest.approx(
        1000 * ((0.005**2 + 0.3**2) / 3 + 0.005**2 / 2), rel=1e-5
    )
    assert cab.f_score(guess, truth) == pytest.approx(2 * (2 / 3) * 1 / (2 / 3 + 1))
    assert cab.f_score(guess + 5, truth) == 0.0


def tones(*pitches, rate=8000, samples=2400):
    t = torch.arange(samples) / rate
    return [torch.sin(2 * math.pi * p * t) + 0.05 * torch.sin(2 * math.pi * 3 * p * t) for p in pitches]


def test_speech_by_its_own_filters():
    """A loop over the definition; and a wave that lingers costs nothing along the best alignment."""
    a, b = tones(440.0, 520.0)
    n, hop, rate = 400, 100, 8000

    def spectrum(wave):
        padded = torch.nn.functional.pad(wave.double()[None], (n // 2, n // 2), mode="reflect")[0]
        window = 0.5 - 0.5 * torch.cos(2 * math.pi * torch.arange(n).double() / n)
        frames = torch.stack([padded[i * hop : i * hop + n] * window for i in range(len(wave) // hop + 1)])
        return torch.fft.rfft(frames).abs().square()

    mel = lambda f: 2595 * math.log10(1 + f / 700)  # noqa: E731
    edges = [700 * (10 ** (m / 2595) - 1) for m in np.linspace(mel(20.0), mel(4000.0), 82)]
    bank = torch.zeros(n // 2 + 1, 80, dtype=torch.double)
    for i in range(n // 2 + 1):
        f = i * rate / n
        for j in range(80):
            low, top, high = edges[j : j + 3]
            bank[i, j] = max(0.0, min((f - low) / (top - low), (high - f) / (high - top)))
    logs = [torch.log(spectrum(w) @ bank + 1e-6) for w in (a, b)]
    apart = torch.cdist(logs[0][None], logs[1][None])[0] / math.sqrt(80)
    # Steady tones: the alignment that goes straight is within rounding of the best.
    assert cab.mel_spectral_distortion(a, b, rate) <= float(apart.diagonal().mean()) + 1e-9
    assert cab.mel_spectral_distortion(a, b, rate) >= 0.8 * float(apart.diagonal().mean())
    assert cab.mel_spectral_distortion(a, a, rate) == 0.0
    assert cab.mel_cepstral_distortion(a, b, rate) > 0.1


def test_speech_metrics_are_those_of_the_recorded_run():
    """What torchaudio's filter bank and cosine transform give under the published definition, for these two waves."""
    t = torch.arange(3000) / 8000
    g = torch.Generator().manual_seed(0)
    a = torch.sin(2 * 3.14159 * 440 * t) + 0.1 * torch.randn(3000, generator=g)
    b = torch.sin(2 * 3.14159 * 470 * t[:2600]) + 0.1 * torch.randn(2600, generator=g)
    assert cab.mel_spectral_distortion(a, b, 8000) == pytest.approx(1.401948590432444, abs=1e-4)
    assert cab.mel_cepstral_distortion(a, b, 8000) == pytest.approx(1.6736621145279176, abs=1e-4)


def test_time_is_warped():
    low, high = tones(300.0, 1200.0, samples=1600)
    short, long = torch.cat([low, high]), torch.cat([low, low[:800], high])
    straight = cab.mel_spectral_distortion(short, torch.cat([high, low]), 8000)
    assert cab.mel_spectral_distortion(short, long, 8000) < 0.2 * straight


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cab.ssim(torch.zeros(1, 8, 8, 3), torch.zeros(1, 8, 8, 3)), "window of 11"),
        (lambda: cab.psnr(torch.zeros(1, 8, 8, 3), torch.zeros(1, 8, 9, 3)), "of one shape"),
        (lambda: cab.chamfer(torch.zeros(1, 0, 3), torch.zeros(1, 2, 3)), "guess has no points"),
        (lambda: cab.chamfer(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), order=3), "order=3 is not possible"),
        (lambda: cab.mel_spectral_distortion(torch.zeros(10), torch.zeros(10), 8000), "shorter than half a window"),
        (lambda: cab.mel_spectral_distortion(torch.zeros(9), torch.zeros(9), 10), "rate must be at least 1000"),
    ],
)
def test_bad_input_of_metrics(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- tasks


def test_there_are_seven_and_four_come_out_of_packages():
    assert list(cab.TASKS) == ["TTS", "Sum", "SR", "MLM", "LM", "PCC", "LSTF"]
    for name, task in cab.TASKS.items():
        if not task.packaged:
            with pytest.raises(DataError, match=f"{name} needs a folder with"):
                cab.load(name)
    with pytest.raises(ValueError, match="task='QA' is not possible"):
        cab.load("QA")
    with pytest.raises(DataError, match="is no folder"):
        cab.load("LM", "nowhere")


def test_packaged_text_series_and_photographs():
    text = cab.load("MLM")
    assert min(len(text.train), len(text.valid), len(text.test)) > 1000
    series = cab.load("LSTF")
    past, future = windows(series.test, 96, 48)
    assert past.shape[1:] == (96, 1) and future.shape[1:] == (48, 1)
    torch.testing.assert_close(past[1, :-1], past[0, 1:])
    pairs = cab.load("SR", side=64, factor=4)
    low, high = pairs.train[0]
    assert low.shape == (16, 16, 3) and high.shape == (64, 64, 3) and 0 <= float(low.min()) <= float(high.max()) <= 1
    assert len(pairs.valid) and len(pairs.test)


def test_masking_by_shares():
    tokens = torch.randint(100, (4, 5000), generator=torch.Generator().manual_seed(0))
    inputs, targets = mask_tokens(tokens, 100, 100, torch.Generator().manual_seed(1))
    asked = targets != -100
    assert torch.equal(targets[asked], tokens[asked]) and torch.equal(inputs[~asked], tokens[~asked])
    assert float(asked.float().mean()) == pytest.approx(0.15, abs=0.01)
    assert float((inputs[asked] == 100).float().mean()) == pytest.approx(0.8, abs=0.02)
    assert float((inputs[asked] == tokens[asked]).float().mean()) == pytest.approx(0.1, abs=0.02)


def test_squares_of_an_image():
    image = torch.arange(5 * 7 * 3).view(5, 7, 3).to(torch.uint8)
    cut = crops(image, 2)
    assert cut.shape == (6, 2, 2, 3)
    torch.testing.assert_close(cut[4], image[2:4, 2:4].float() / 255)


def write_text(root):
    for split in ("train", "valid", "test"):
        (root / f"{split}.txt").write_text(f"the text of {split}")


def write_summaries(root):
    for split in ("train", "val", "test"):
        (root / f"{split}.source").write_text("one document\nanother document\n")
        (root / f"{split}.target").write_text("one\nanother\n")


def write_speech(root):
    (root / "wavs").mkdir()
    (root / "metadata.csv").write_text("".join(f"LJ{i}|Dr. {i}|Doctor {i}\n" for i in range(5)))
    for i in range(5):
        with wave.open(str(root / "wavs" / f"LJ{i}.wav"), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes(struct.pack("<4h", 0, 16384, -32768, i))


def write_images(root):
    image = pytest.importorskip("PIL.Image")
    for folder, side in (("hr_16", 16), ("lr_4", 4)):
        (root / folder).mkdir()
        for i in range(4):
            image.fromarray(np.full((side, side, 3), 50 * i, np.uint8)).save(root / folder / f"{i}.png")


def write_series(root):
    for name, lines in (("ETTh1", 14400), ("ETTh2", 14400), ("ETTm1", 57600), ("ECL", 20), ("WTH", 20)):
        rows = "".join(f"t,{i % 7},{i}\n" for i in range(lines))
        (root / f"{name}.csv").write_text("date,a,OT\n" + rows)


def write_clouds(root):
    for split in ("train", "val", "test"):
        whole = root / split / "complete" / "chair"
        views = root / split / "partial" / "chair" / "x1"
        whole.mkdir(parents=True)
        views.mkdir(parents=True)
        head = "# .PCD\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\nWIDTH 2\nPOINTS 2\nDATA "
        (whole / "x1.pcd").write_text(head + "ascii\n0 0 1\n1 0.5 0\n")
        (views / "00.pcd").write_bytes((head + "binary\n").encode() + struct.pack("<6f", 1, 2, 3, 4, 5, 6))
        (views / "01.pcd").write_text(head + "ascii\n0 0 0\n1 1 1\n")


WRITERS = {
    "LM": (write_text, "valid.txt"), "MLM": (write_text, "test.txt"), "Sum": (write_summaries, "val.target"),
    "TTS": (write_speech, "wavs/LJ3.wav"), "SR": (write_images, "lr_4/2.png"), "LSTF": (write_series, "ECL.csv"),
    "PCC": (write_clouds, "val/partial/chair/x1/00.pcd"),
}  # fmt: skip
SETTINGS = {"SR": dict(side=16, factor=4)}


@pytest.mark.parametrize("task", cab.TASKS)
def test_a_folder_is_read_and_a_missing_file_named(task, tmp_path):
    write, lost = WRITERS[task]
    write(tmp_path)
    found = cab.load(task, tmp_path, **SETTINGS.get(task, {}))
    assert len(found.train) and len(found.valid) and len(found.test) and tmp_path.name in found.source
    (tmp_path / lost).unlink()
    if task == "PCC":
        (tmp_path / "val/partial/chair/x1/01.pcd").unlink()
    with pytest.raises(DataError, match=f"{task}: folder .* lacks '{lost}'.*; it must hold"):
        cab.load(task, tmp_path, **SETTINGS.get(task, {}))


def test_what_is_read(tmp_path):
    for name, (write, _) in WRITERS.items():
        if name != "MLM":
            (tmp_path / name).mkdir()
            write(tmp_path / name)
    assert bytes(cab.load("LM", tmp_path / "LM").valid.tolist()) == b"the text of valid"
    assert cab.load("Sum", tmp_path / "Sum").test[1] == ("another document", "another")
    text, sound, rate = cab.load("TTS", tmp_path / "TTS").train[1]
    assert text == "Doctor 1" and rate == 8000
    torch.testing.assert_close(sound, torch.tensor([0.0, 0.5, -1.0, 1 / 32768]))
    partial, whole = cab.load("PCC", tmp_path / "PCC").train[0]
    assert partial.tolist() == [[1, 2, 3], [4, 5, 6]] and whole.tolist() == [[0, 0, 1], [1, 0.5, 0]]
    series = cab.load("LSTF", tmp_path / "LSTF", series="ECL")
    assert [len(s[0]) for s in (series.train, series.valid, series.test)] == [14, 2, 4]
    torch.testing.assert_close(series.train[0].mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(series.train[0].std(0, correction=0), torch.ones(2))
    assert [len(s[0]) for s in (cab.load("LSTF", tmp_path / "LSTF").train, series.train)] == [8640, 14]


@pytest.mark.parametrize(
    ("task", "file", "content", "message"),
    [
        ("Sum", "val.target", "one\n", "holds 2 lines and val.target 1"),
        ("LM", "train.txt", "", "is empty"),
        ("TTS", "metadata.csv", "LJ0\n", "lines are name|text"),
        ("TTS", "wavs/LJ0.wav", "noise", "is no wave file"),
        ("LSTF", "ETTh1.csv", "date,a\nt,x\n" * 9000, "no number"),
        ("LSTF", "ETTh1.csv", "date,a\nt,1\n", "the published split reads 14400"),
        ("LSTF", "ETTh1.csv", "a,b\n1,2\n", "the first of them date"),
        ("PCC", "train/complete/chair/x1.pcd", "FIELDS a b c\nDATA ascii\n", "FIELDS x y z"),
        ("PCC", "train/complete/chair/x1.pcd", "FIELDS x y z\nPOINTS 2\nDATA ascii\n1 2 3\n", "3 numbers for 2 points"),
    ],
)
def test_files_that_are_not_what_they_should_be(task, file, content, message, tmp_path):
    WRITERS[task][0](tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=message.replace("|", r"\|")):
        cab.load(task, tmp_path, **({"series": "ETTh1"} if task == "LSTF" else {})).train[0]


def test_windows_that_do_not_fit():
    with pytest.raises(DataError, match="past=30 and future=30"):
        windows([torch.zeros(50, 1)], 30, 30)
