"""The package as a newcomer meets it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import attnlib

ROOT = Path(__file__).parent.parent
DOCS = list((ROOT / "docs").glob("*.md"))


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_is_fast_and_takes_no_extra():
    out = python(
        "import sys, time, torch; t = time.process_time(); import attnlib; attnlib.attention; attnlib.create;"
        "print(time.process_time() - t);"
        "extras = {'transformers', 'diffusers', 'timm', 'sklearn', 'skimage', 'matplotlib', 'jinja2', 'peft'};"
        "print(sorted(extras & set(sys.modules)))"
    ).splitlines()
    assert float(out[0]) < 1.0
    assert out[1] == "[]"


def test_registry_imports_no_extra():
    out = python(
        "import sys, attnlib; attnlib.list_mechanisms();"
        "print(sorted({'transformers', 'diffusers', 'timm', 'sklearn', 'matplotlib'} & set(sys.modules)))"
    )
    assert out == "[]"


def test_every_public_name_resolves():
    for name in attnlib.__all__:
        assert getattr(attnlib, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'atention'"):
        attnlib.atention  # noqa: B018


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in sorted(DOCS))])
def test_python_snippets_run(name, tmp_path, monkeypatch):
    """Every python block of a page runs, in order, in one namespace, in a folder that may be written to."""
    if name.startswith("docs/"):
        for extra in ("transformers", "sklearn", "skimage", "matplotlib"):
            pytest.importorskip(extra)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.S)
    assert blocks or name != "README.md"
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, name, "exec"), namespace)  # noqa: S102


def test_readme_commands_exist():
    text = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"^make (\w+)", text, flags=re.M)):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
    commands = set(re.findall(r"^attnlib (\w+)", text, flags=re.M))
    assert commands
    shown = subprocess.run(
        [sys.executable, "-m", "attnlib.cli", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for command in commands:
        assert command in shown, command
