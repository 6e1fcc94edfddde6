"""The package as a newcomer meets it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import attnlib

ROOT = Path(__file__).parent.parent


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


def imports_of(path: Path) -> set[str]:
    """Packages of attnlib that a file imports at module level."""
    package = path.relative_to(ROOT / "src").with_suffix("").parts
    if package[-1] == "__init__":
        package = (*package, "")
    found = set()
    for line in path.read_text().splitlines():  # module level only: indented imports are lazy on purpose
        if m := re.match(r"from (\.*)([\w.]*) import (.+)", line):
            dots, module, names = m.groups()
            if dots:
                base = package[: len(package) - len(dots)]
                target = ".".join([*base, module] if module else base)
            else:
                target = module
            if target.startswith("attnlib"):
                parts = target.split(".")
                found |= {parts[1]} if len(parts) > 1 else {n.strip(" ()").split(" ")[0] for n in names.split(",")}
        elif m := re.match(r"import attnlib\.(\w+)", line):
            found.add(m.group(1))
    return found


FLOORS = [
    {"checks", "types", "grids", "masks", "positions", "normalizers"},
    {"ops", "optim"},
    {"nn"},
    {"models", "hooks"},
    {"cache", "steer", "reduce", "convert", "look", "theory", "parallel"},
    {"check", "bench", "catalog"},
    {"cli"},
]


def test_floors_import_only_from_below():
    height = {name: level for level, names in enumerate(FLOORS) for name in names}
    wrong = []
    for path in (ROOT / "src" / "attnlib").rglob("*.py"):
        top = path.relative_to(ROOT / "src" / "attnlib").parts[0].removesuffix(".py")
        if top == "__init__":
            continue
        assert top in height, f"{path} stands on no floor"
        for target in imports_of(path):
            if target in height and height[target] > height[top]:
                wrong.append(f"{top} (floor {height[top]}) imports {target} (floor {height[target]}) in {path.name}")
    assert not wrong, wrong


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_python_snippets_run(name):
    """Every python block of a page runs, in order, in one namespace."""
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
