import errno
import io
import json
import re
import socket

import pytest
import torch
from rich.console import Console

import attnlib
from attnlib.bench import clock, store, training
from attnlib.bench import compare as module
from attnlib.bench.compare import PRESETS, Interrupted, compare
from attnlib.bench.data.tasks import TASKS
from attnlib.bench.specs import CONTROL, Spec
from attnlib.bench.speed import scaling
from attnlib.bench.store import StorageError
from attnlib.bench.training import Settings

SMALL = Settings(dim=16, depth=1, num_heads=2)
IDENTITY = "bench_stubs:Identity"
STEPS = 8


def small(out, mechanisms=("softmax-attention", IDENTITY), tasks=("digits",), seeds=2, **more):
    """A comparison of a few steps per run."""
    more = {"steps": STEPS, "settings": SMALL, "scale": False, "quiet": True, "control": False, **more}
    return compare(list(mechanisms), list(tasks), out=out, seeds=seeds, **more)


@pytest.fixture
def counted(monkeypatch):
    """Every run that is really trained, as (task, label, seed)."""
    ran = []
    original = training.run

    def run(task, spec, seed, *args, **kwargs):
        ran.append((task.name, spec.label, seed))
        return original(task, spec, seed, *args, **kwargs)

    monkeypatch.setattr(training, "run", run)
    return ran


def test_training_lowers_the_loss_and_beats_chance():
    task = TASKS["digits"]()
    record = training.run(task, Spec("softmax-attention"), 0, 160, Settings(dim=32, depth=1, num_heads=2), sample=True)
    first, last = record["loss_curve"][0][1], record["loss_curve"][-1][1]
    assert record["status"] == "ok" and last < 0.6 * first
    assert record["metrics"]["accuracy"] > 60
    assert len(record["sample"]["guesses"]) == 24
    assert record["step_seconds"] > 0 and record["parameters"]["total"] > 0


def test_the_same_seed_gives_the_same_run():
    task = TASKS["digits"]()
    a, b, c = (training.run(task, Spec("softmax-attention"), s, 5, SMALL) for s in (1, 1, 2))
    assert a["loss_curve"] == b["loss_curve"] and a["metrics"] == b["metrics"]
    assert a["loss_curve"] != c["loss_curve"]


def test_finished_runs_are_not_repeated(tmp_path, counted):
    first = small(tmp_path)
    assert len(counted) == 4 and first.results["finished"]
    assert len({r["steps"] for r in first.results["runs"]}) == 1
    again = small(tmp_path)
    assert len(counted) == 4 and again.results["reused"] == 4
    assert again.results["runs"] == first.results["runs"]
    assert again.results["summary"] == first.results["summary"]
    more = small(tmp_path, mechanisms=("softmax-attention", IDENTITY, f"{IDENTITY},draws=2"))
    assert counted[4:] == [("digits", "Identity (draws=2)", 0), ("digits", "Identity (draws=2)", 1)]
    assert len(more.results["runs"]) == 6
    assert [m["label"] for m in more.results["mechanisms"]][1:] == ["Identity", "Identity (draws=2)"]
    small(tmp_path, settings=Settings(dim=8, depth=1, num_heads=2))
    assert len(counted) == 10  # other settings are other runs


def test_settings_shorten_to_the_name_where_that_is_enough(tmp_path, counted):
    one = small(tmp_path, [f"{IDENTITY},draws=2"], seeds=1).results
    assert [(m["label"], m["settings"]) for m in one["mechanisms"]][1] == ("Identity", "draws=2")
    two = small(tmp_path, [f"{IDENTITY},draws=2", f"{IDENTITY},draws=3"], seeds=1).results
    assert {r["label"] for r in two["runs"]} == {"softmax-attention", "Identity (draws=2)", "Identity (draws=3)"}
    assert len(counted) == 3  # a new label is not a new run


def test_runs_go_seed_by_seed(tmp_path, counted):
    small(tmp_path)
    assert [seed for *_, seed in counted] == [0, 0, 1, 1]


def test_an_interrupt_keeps_what_was_finished(tmp_path, counted, monkeypatch):
    original = training.run

    def stop_at_third(*args, **kwargs):
        if len(counted) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(training, "run", stop_at_third)
    printed = io.StringIO()
    with pytest.raises(Interrupted, match=r"2 finished pieces are kept in .*Run the same command again") as error:
        small(tmp_path, quiet=False, console=Console(file=printed))
    assert str(error.value) in printed.getvalue()
    assert isinstance(error.value, KeyboardInterrupt)
    assert len(list((tmp_path / "runs").glob("*.json"))) == 2
    part = json.loads((tmp_path / "results.json").read_text())
    assert part["finished"] is False and len(part["runs"]) == 2
    assert "Not complete" in (tmp_path / "report.html").read_text()
    monkeypatch.setattr(training, "run", original)
    done = small(tmp_path)
    assert done.results["finished"] and len(done.results["runs"]) == 4
    assert len(counted) == 4 and len(set(counted)) == 4


def test_a_full_disk_loses_nothing(tmp_path, counted, monkeypatch):
    original = store.write_json

    def full(path, value):
        if path.parent == tmp_path / "runs" and len(counted) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path, value)

    monkeypatch.setattr(store, "write_json", full)
    with pytest.raises(StorageError, match="No space left on device.*1 finished pieces are safe") as error:
        small(tmp_path)
    (unsaved,) = error.value.unsaved
    assert unsaved["label"] == "Identity" and unsaved["metrics"]
    rescued = re.search(r"the last one is in (\S+\.json)", str(error.value))
    assert json.loads(open(rescued[1]).read())["metrics"] == unsaved["metrics"]
    monkeypatch.setattr(store, "write_json", original)
    done = small(tmp_path)
    assert len(done.results["runs"]) == 4 and len(counted) == 5  # the first run was not repeated
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_damaged_file_is_measured_again(tmp_path, counted):
    small(tmp_path, seeds=1)
    victim = sorted((tmp_path / "runs").glob("*softmax*"))[0]
    victim.write_text('{"status": "ok", "met')
    again = small(tmp_path, seeds=1)
    assert counted[2:] == [("digits", "softmax-attention", 0)]
    assert again.results["damaged_files"] == [victim.name]
    assert json.loads(victim.read_text())["status"] == "ok"


def test_an_unwritable_folder_is_refused_before_anything_runs(tmp_path, counted):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="out=.*cannot be written"):
        small(tmp_path / "file")
    assert not counted


def test_unsupported_patterns_are_listed_with_the_trait(tmp_path):
    found = small(
        tmp_path,
        ["softmax-attention", IDENTITY, "bench_stubs:GridOnly", "bench_stubs:Refusing", "bench_stubs:NotAMechanism"],
        ["text", "digits"],
        seeds=1,
    ).results
    reasons = {(s["mechanism"], s["what"]): s["reason"] for s in found["skipped"]}
    assert "trait patterns = {noncausal-self}: causal-self is not among them" in reasons["Identity", "text"]
    assert "trait grid_ranks = [2]: this task has a grid of rank 1" in reasons["GridOnly", "text"]
    assert "N must be 7, got 64" in reasons["Refusing", "digits"]
    assert "no class_traits" in reasons["NotAMechanism", "digits"]
    assert {(r["task"], r["label"]) for r in found["runs"]} == {
        ("text", "softmax-attention"),
        ("digits", "softmax-attention"),
        ("digits", "Identity"),
        ("digits", "GridOnly"),
    }


def test_one_failure_does_not_stop_the_others(tmp_path):
    found = small(tmp_path, [IDENTITY, "bench_stubs:Exploding", "bench_stubs:Diverging"], seeds=1, baseline=None)
    results = json.loads(found.json.read_text())  # strict JSON although a run ended in not-a-number
    assert results["failed"][0]["mechanism"] == "Exploding" and "out of luck" in results["failed"][0]["reason"]
    status = {r["label"]: r["status"] for r in results["runs"]}
    assert status == {"Identity": "ok", "Diverging": "diverged"}
    row = next(s for s in results["summary"] if s["mechanism"] == "Diverging")
    assert row["mean"] is None and row["diverged"] == 1
    assert "diverged" in found.report.read_text() and "out of luck" in found.report.read_text()


def test_a_budget_that_runs_out_starts_no_further_run_says_so_and_goes_on(tmp_path, counted):
    printed = io.StringIO()
    more = {"quiet": False, "console": Console(file=printed, width=80)}
    part = small(tmp_path, budget_minutes=1e-9, **more).results
    assert not part["runs"] and len(part["left_out"]) == 4 and part["finished"] is False
    assert "4 runs were not started" in printed.getvalue()
    assert "4 runs are missing" in (tmp_path / "report.html").read_text()
    done = small(tmp_path).results
    assert done["finished"] and len(done["runs"]) == 4 and done["steps"] == {"digits": STEPS}


def test_steps_are_those_of_the_task_whatever_the_machine(tmp_path):
    found = module._steps(None, ["text", "digits"], 1.0)
    assert found == {"text": TASKS["text"].steps, "digits": TASKS["digits"].steps}
    assert module._steps({"text": 3}, ["text", "digits"], 0.5) == {"text": 3, "digits": round(0.5 * found["digits"])}
    assert module._steps(7, ["text", "digits"], 1.0) == {"text": 7, "digits": 7}


def test_every_task_has_its_first_seed_before_any_has_a_second(tmp_path, counted):
    small(tmp_path, ["softmax-attention"], ["digits", "forecast"], seeds=2)
    assert [(task, seed) for task, _, seed in counted] == [
        ("digits", 0), ("forecast", 0), ("digits", 1), ("forecast", 1),
    ]  # fmt: skip


def test_runs_in_processes_equal_runs_here(tmp_path):
    here = small(tmp_path / "a", ["softmax-attention"]).results
    apart = small(tmp_path / "b", ["softmax-attention"], workers=2).results
    drop = ("step_seconds", "train_seconds", "evaluate_seconds")
    strip = [[{k: v for k, v in r.items() if k not in drop} for r in found["runs"]] for found in (here, apart)]
    assert strip[0] == strip[1] and len(strip[0]) == 2


def test_every_number_stands_beside_a_model_without_a_mechanism(tmp_path):
    printed = io.StringIO()
    console = Console(file=printed, width=80)
    found = small(tmp_path, [IDENTITY], control=True, quiet=False, console=console).results
    assert [m["label"] for m in found["mechanisms"]] == ["softmax-attention", "Identity", CONTROL]
    rows = {s["mechanism"]: s for s in found["summary"]}
    assert rows[CONTROL]["gain"] is None and not rows[CONTROL]["no_better"]
    assert rows[CONTROL]["parameters"]["mechanism"] == 0
    for label in ("softmax-attention", "Identity"):
        row, own = rows[label], {}
        for r in found["runs"]:
            own.setdefault(r["label"], {})[r["seed"]] = r["metrics"]["accuracy"]
        gains = [own[label][s] - own[CONTROL][s] for s in (0, 1)]
        assert row["gain"]["mean"] == pytest.approx(sum(gains) / 2)
        assert row["no_better"] == (not row["gain"]["mean"] > row["gain"]["half"])
    text = printed.getvalue()
    assert CONTROL in text and all(len(line.rstrip()) <= 80 for line in text.splitlines() if "report:" not in line)
    assert ("=  no better than without a mechanism" in text) == any(r["no_better"] for r in rows.values())
    assert "differences between mechanisms need two of them and three seeds" in text


def test_pairs_are_separated_only_where_the_seeds_agree():
    tasks = {"digits": TASKS["digits"]}

    def runs(**values):
        return [
            {"task": "digits", "label": label, "seed": seed, "status": "ok", "metrics": {"accuracy": v}}
            for label, row in values.items()
            for seed, v in enumerate(row)
        ]

    # a and b move together from seed to seed, c moves by itself
    found = runs(a=(90, 70, 80, 60), b=(80.1, 60, 69.9, 50), c=(60, 90, 70, 81))
    pairs = {(p["better"], p["worse"]): p for p in module.pairs(found, tasks, ["a", "b", "c"], 0.95)}
    assert pairs["a", "b"]["separated"] and pairs["a", "b"]["by"] == pytest.approx(10)
    assert sum(p["separated"] for p in pairs.values()) == 1


def test_results_hold_every_measurement_and_no_names_of_the_machine(tmp_path):
    found = small(tmp_path, ["softmax-attention", IDENTITY], ["digits", "forecast"])
    text = found.json.read_text()
    results = json.loads(text)
    assert str(tmp_path) not in text and str(tmp_path) not in found.report.read_text()
    if len(socket.gethostname()) > 3:
        assert socket.gethostname() not in text
    assert results["machine"]["torch"] == torch.__version__ and results["machine"]["cpu"]
    assert results["seeds"] == [0, 1] and results["budget_minutes"] is None
    row = next(s for s in results["summary"] if s["mechanism"] == "Identity" and s["task"] == "digits")
    values = [r["metrics"]["accuracy"] for r in results["runs"] if r["label"] == "Identity"]
    assert row["mean"] == pytest.approx(sum(values) / 2) and row["seeds"] == [0, 1]
    assert row["half_width"] == pytest.approx(12.7062 * abs(values[0] - values[1]) / 2, rel=1e-3)
    assert row["difference"]["n"] == 2
    assert all(r["loss_curve"] and r["step_seconds"] > 0 for r in results["runs"])
    assert results["tasks"]["forecast"]["references"]["last value"] > 0


def test_the_terminal_shows_a_table_and_where_the_report_is(tmp_path):
    printed = io.StringIO()
    found = small(tmp_path, seeds=1, quiet=False, console=Console(file=printed, width=100))
    text = printed.getvalue()
    assert "Identity" in text and "accuracy in %, higher is better" in text and f"report: {found.report}" in text
    value = next(s["mean"] for s in found.results["summary"] if s["mechanism"] == "Identity")
    assert f"{value:.2f}" in text or f"{value:.1f}" in text


def test_the_baseline_joins_by_itself(tmp_path):
    found = small(tmp_path, [IDENTITY], seeds=1).results
    assert [m["label"] for m in found["mechanisms"]] == ["softmax-attention", "Identity"]


def test_user_data_chooses_its_tasks(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("It was a dark and stormy night. " * 400)
    found = compare(
        ["softmax-attention"], None, tmp_path / "out", book, steps=2, seeds=1, settings=SMALL, scale=False, quiet=True
    ).results
    assert list(found["tasks"]) == ["text"] and "book.txt" in found["tasks"]["text"]["data"]["source"]


@pytest.mark.parametrize(
    "more,message",
    [
        ({"mechanisms": ["softmx-attention"]}, "did you mean 'softmax-attention'"),
        ({"mechanisms": ["softmax-attention,heads"]}, "write NAME,key=value"),
        ({"mechanisms": ["nowhere.at.all:Thing"]}, "cannot be imported"),
        ({"mechanisms": []}, "mechanisms is empty"),
        ({"tasks": ["sudoku"]}, "tasks: 'sudoku' is not possible; choose from text"),
        ({"budget_minutes": 0}, "budget_minutes"),
        ({"steps": 0}, "steps"),
        ({"steps": {"text": 3}}, "a task of steps"),
        ({"workers": 0}, "workers"),
        ({"workers": 10**4}, "workers=10000 is beyond the cores here; possible: 1 to"),
        ({"device": "abacus"}, "device='abacus' is not possible here"),
        ({"device": "meta"}, "device='meta' is not possible"),
        ({"seeds": 0}, "seeds=0 is not possible"),
        ({"seeds": [1, 1]}, "different integers"),
        ({"preset": "huge"}, "preset='huge'"),
        ({"confidence": 95}, "confidence"),
        ({"threads": 0}, "threads"),
        ({"data": "/no/such/file"}, "data='/no/such/file' does not exist; possible"),
    ],
)
def test_bad_arguments_name_what_is_possible(tmp_path, more, message):
    given = {"mechanisms": ["softmax-attention"], "tasks": ["digits"], "out": tmp_path, "quiet": True, **more}
    with pytest.raises(ValueError, match=re.escape(message)):
        compare(**given)
    assert not list(tmp_path.rglob("*.json"))


def test_presets_name_existing_tasks_and_cover_every_pattern():
    for preset in PRESETS.values():
        assert set(preset.tasks) <= set(TASKS)
        available = preset.available()
        assert available and {s.name for s in available} <= set(attnlib.list_mechanisms())
    demo = PRESETS["demo"]
    assert {TASKS[name].pattern for name in demo.tasks} == {t.pattern for t in TASKS.values()}
    settings = Settings(**demo.settings)
    for task in TASKS.values():
        able = [
            s
            for s in demo.available()
            if not s.why_not(task.pattern, task.grid, settings.dim, settings.num_heads, task.context)
        ]
        assert "softmax-attention" in {s.name for s in able}, task.name


# ---- time and memory against N


def test_peak_memory_counts_what_is_held_at_once():
    def held():
        a = torch.zeros(1000)
        b = torch.zeros(1000)
        return a + b

    def freed():
        for _ in range(5):
            torch.zeros(1000)

    assert 3 * 4000 <= clock.peak_bytes(held) < 3 * 4000 + 1000
    assert 4000 <= clock.peak_bytes(freed) < 2 * 4000


def test_scaling_tells_quadratic_from_linear_and_lists_the_unable():
    specs = [Spec(IDENTITY), Spec("bench_stubs:Quadratic"), Spec("bench_stubs:Refusing")]
    records, skipped = scaling.measure_group(specs, "noncausal-self", 8, 1, sides=(8, 16, 24), rounds=2)
    assert [r["mechanism"] for r in records] == ["Identity", "Quadratic"]
    assert all(r["sizes"] == [64, 256, 576] and min(r["forward_seconds"]) > 0 for r in records)
    rows = {r["mechanism"]: r for r in scaling.summarise(records, "Quadratic")}
    assert rows["Identity"]["peak_exponent"] == pytest.approx(1.0, abs=0.1)
    assert rows["Quadratic"]["peak_exponent"] == pytest.approx(2.0, abs=0.2)
    assert rows["Identity"]["peak_efficiency_length"] < 64
    assert rows["Quadratic"]["peak_efficiency_length"] is None
    assert skipped[0]["mechanism"] == "Refusing" and "N must be 7" in skipped[0]["reason"]
    _, unable = scaling.measure_group([Spec(IDENTITY)], "causal-self", 8, 1, sides=(8,))
    assert "causal-self is not among them" in unable[0]["reason"]
