"""The house: a floor imports from floors below, no files import each other in a circle, and no place is empty."""

import ast
from pathlib import Path

import pytest

import attnlib

SOURCE = Path(attnlib.__file__).parent

FLOORS = [
    {"checks", "extras", "files", "types", "grids", "masks", "positions", "normalizers"},
    {"ops", "optim"},
    {"nn"},
    {"models", "hooks"},
    {"cache", "steer", "reduce", "convert", "look", "theory", "parallel"},
    {"check", "bench", "catalog"},
    {"cli"},
]
HEIGHT = {name: level for level, names in enumerate(FLOORS) for name in names}


def modules(source: Path) -> dict[str, Path]:
    found = {}
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Modules that a file imports anywhere in it: at the top, indented, and under TYPE_CHECKING."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*base, *((node.module or "").split(".") if node.module else [])])
            for alias in node.names:
                inner = f"{target}.{alias.name}"
                found.add(inner if inner in known else target)
    return {m for m in found if m in known} - {name}


def graph(source: Path) -> dict[str, set[str]]:
    known = modules(source)
    return {name: imports(name, path, known) for name, path in known.items()}


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules each of which reaches the others (Tarjan)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in edges[node]:
            if other not in order:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], order[other])
        if low[node] == order[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in edges:
        if node not in order:
            visit(node)
    return found


@pytest.fixture(scope="module")
def edges():
    # The package itself imports nothing but by name, on first use; its type hints are no arrows.
    return {name: targets for name, targets in graph(SOURCE).items() if name != "attnlib"}


def floor(module: str) -> int:
    return HEIGHT[module.split(".")[1]]


def test_every_package_stands_on_a_floor(edges):
    tops = {name.split(".")[1] for name in edges}
    assert tops <= HEIGHT.keys(), tops - HEIGHT.keys()


def test_no_arrow_leads_upward(edges):
    wrong = [f"{a} -> {b}" for a, targets in edges.items() for b in targets if b != "attnlib" and floor(b) > floor(a)]
    assert not wrong, wrong


def test_no_circle_of_files(edges):
    edges = {a: {b for b in targets if b != "attnlib"} for a, targets in edges.items()}
    assert not circles(edges)


def test_nothing_below_imports_the_package_itself(edges):
    assert not [name for name, targets in edges.items() if "attnlib" in targets and floor(name) < len(FLOORS) - 2]


def test_circles_and_upward_arrows_are_seen(tmp_path):
    """What is looked for is found: also when imports are indented, or stand under TYPE_CHECKING."""
    root = tmp_path / "attnlib"
    for place, text in {
        "__init__": "",
        "ops/__init__": "",
        "ops/a": "def f():\n    from .b import g\n",
        "ops/b": "from . import c\n",
        "ops/c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import f\n",
        "ops/d": "def f():\n    import attnlib.nn.e\n",
        "nn/__init__": "",
        "nn/e": "",
    }.items():
        path = root / f"{place}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    edges = graph(root)
    assert circles(edges) == [["attnlib.ops.a", "attnlib.ops.b", "attnlib.ops.c"]]
    assert edges["attnlib.ops.d"] == {"attnlib.nn.e"} and floor("attnlib.nn.e") > floor("attnlib.ops.d")


def test_no_two_files_of_tests_have_one_name():
    """Without packages around them, the second of a name would not be collected."""
    names = [p.name for p in Path(__file__).parent.rglob("test_*.py")]
    assert not {n for n in names if names.count(n) > 1}


def test_no_committed_file_names_a_folder_of_one_machine():
    """Libraries write into a configuration where a model was loaded from."""
    root = Path(__file__).parent.parent
    for folder in ("examples", "benchmarks", "tests/fixtures"):
        for file in (root / folder).rglob("*.json"):
            assert '"_name_or_path": "/' not in file.read_text(encoding="utf-8"), file
