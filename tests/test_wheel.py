"""The wheel, installed alone in another folder, without any extra: it works, and says which extra something needs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXTRAS = "transformers diffusers peft accelerate timm sklearn skimage scipy matplotlib jinja2 gguf".split()

BLOCKED = f"""
import importlib.machinery
import sys
class Without(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        absent = name.partition(".")[0] in {EXTRAS!r}
        return None if absent else super().find_spec(name, path, target)
sys.meta_path = [Without if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A function that runs code where only the wheel and what it asks for are installed."""
    pytest.importorskip("hatchling", reason="the wheel is built with hatchling, which the lock file installs")
    place = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", place, ROOT], check=True)
    (wheel,) = place.glob("attnlib-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", place / "site", wheel], check=True)
    (place / "elsewhere").mkdir()

    def run(code, ok=True):
        env = {**os.environ, "PYTHONPATH": str(place / "site")}
        done = subprocess.run(
            [sys.executable, "-c", BLOCKED + code], capture_output=True, text=True, cwd=place / "elsewhere", env=env
        )
        assert (done.returncode == 0) == ok, done.stderr
        return done.stdout if ok else done.stderr.strip().splitlines()[-1]

    run(f"import attnlib; assert attnlib.__file__.startswith({str(place)!r}), attnlib.__file__")
    return run


def test_it_imports_lists_creates_and_checks(alone):
    out = alone(
        "import torch, attnlib\n"
        "print(len(attnlib.list_mechanisms()))\n"
        "m = attnlib.create('softmax-attention', dim=16, num_heads=2)\n"
        "print(*m(torch.randn(1, 5, 16)).shape)\n"
        "from attnlib.check import check\n"
        "print(check(m, grid=(12,), select=['patterns', 'copies']))\n"
        "from attnlib import catalog; print(len(catalog.papers()))\n"
    ).splitlines()
    assert int(out[0]) > 30 and out[1] == "1 5 16" and int(out[-1]) > 50 and len(out) > 4


@pytest.mark.parametrize("arguments", [["list"], ["info", "biformer"], ["papers"], ["--help"]])
def test_the_command_line_works(alone, arguments):
    assert len(alone(f"import sys; sys.argv = ['attnlib', *{arguments!r}]\nfrom attnlib.cli import main\nmain()")) > 100


@pytest.mark.parametrize(
    ("code", "extra"),
    [
        ("import attnlib.models.language", "hf"),
        ("import attnlib.models.pldr", "hf"),
        ("import attnlib.hooks.hf.state", "hf"),
        ("import torch; from attnlib.look import plots; plots._figure(1, 1)", "bench"),
        ("from attnlib.bench.data.files import require; require('sklearn.datasets')", "bench"),
        ("import sys; sys.argv = ['attnlib', 'compare', 'biformer']; import attnlib.cli; attnlib.cli.main()", "bench"),
    ],
)
def test_what_needs_an_extra_says_which(alone, code, extra):
    assert f"attnlib[{extra}]" in alone(code, ok=False)


def test_modules_that_need_no_extra_import(alone):
    alone(
        "import importlib\n"
        "for name in 'bench cache catalog check checks grids hooks look masks nn normalizers ops optim positions '\\\n"
        "        'reduce steer theory types'.split():\n"
        "    importlib.import_module('attnlib.' + name)\n"
    )
