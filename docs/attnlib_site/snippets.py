"""A snippet for every paper: its file under ``docs/snippets``, a mechanism's first row of the table, or a docstring.

In this order, so that a new mechanism has one as soon as it has its row, which every mechanism needs. All of them run
in the tests.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from attnlib.catalog import Paper

ROOT = Path(__file__).parents[2]
FILES = ROOT / "docs" / "snippets"


def rows() -> dict[str, Any]:
    """The first plain row of the conformance table of every mechanism."""
    tests = str(ROOT / "tests")
    if tests not in sys.path:
        sys.path.insert(0, tests)
    table = importlib.import_module("table")
    found: dict[str, Any] = {}
    for case in table.rows():
        if case.extras is None or case.name not in found:
            found.setdefault(case.name, case)
    return found


def of_case(case: Any) -> str:
    """Create a mechanism as its row does, and call it once.

    >>> from attnlib.check import Case
    >>> print(of_case(Case("agent-attention", dict(dim=16, num_heads=2, num_agents=4), (6, 6))))
    import torch
    import attnlib
    <BLANKLINE>
    mixer = attnlib.create("agent-attention", dim=16, num_heads=2, num_agents=4)
    x = torch.randn(2, 6, 6, 16)
    print(mixer(x).shape)
    """
    from attnlib.nn.base import Fusion
    from attnlib.nn.registry import find

    settings = ", ".join(f"{key}={_literal(value)}" for key, value in case.config.items())
    lines = [*_imports(case.config), "import torch", "import attnlib"]
    lines = sorted(set(lines), key=lambda x: (x.startswith("from"), x != "import torch", x))
    cls: Any = find(case.name)
    made = f'attnlib.create("{case.name}", {settings})'
    body: list[str] = []
    if isinstance(cls, type) and issubclass(cls, Fusion):
        shapes = case.streams or _streams(case)
        names = [f"stream_{i}" for i in range(len(shapes))]
        body = [f"fusion = {made}"]
        body += [f"{name} = torch.randn({_sizes((2, *shape))})" for name, shape in zip(names, shapes, strict=True)]
        body += [f"for out in fusion({', '.join(names)}):", "    print(out.shape)"]
        return "\n".join([*lines, "", *body])
    shape = (2, *case.grid, case.config["dim"])
    body = [f"mixer = {made}", f"x = torch.randn({_sizes(shape)})"]
    call = "x"
    traits = cls(**case.config).traits
    if not any("self" in p for p in traits.patterns):
        width = case.config.get("context_dim", case.config["dim"])
        grid = case.context_grid or case.grid
        body.append(f"context = torch.randn({_sizes((2, *grid, width))})")
        call = "x, context=context"
    if case.extras is not None:
        raise ValueError(f"{case.name} takes more than x: write docs/snippets")
    return "\n".join([*lines, "", *body, f"print(mixer({call}).shape)"])


def _streams(case: Any) -> tuple[tuple[int, ...], ...]:
    from attnlib.check.adapt import stream_shapes
    from attnlib.nn.registry import create

    return stream_shapes(case.config, create(case.name, **case.config))


def _sizes(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))


def _literal(value: Any) -> str:
    """A setting as source: plain values as they are, classes of this library by their constructors' fields."""
    text = repr(value)
    return text.replace("'", '"') if "'" in text and '"' not in text else text


def _imports(config: Any) -> list[str]:
    """Imports for settings that are objects of this library, whose ``repr`` is their constructor."""
    found = []
    for value in config.values():
        cls = type(value)
        if cls.__module__.startswith("attnlib"):
            found.append(f"from {cls.__module__} import {cls.__name__}")
    return found


def of_file(slug: str, files: Path = FILES) -> str:
    """A written snippet; its first line may name the model, ``# model: language``, that is put before it."""
    path = files / f"{slug}.py"
    if not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8").strip()
    first, _, rest = text.partition("\n")
    if first.startswith("# model: "):
        model = (files / f"_{first.removeprefix('# model: ')}.py").read_text(encoding="utf-8").strip()
        imports, blank, body = rest.strip().partition("\n\n")
        head, gap, made = model.partition("\n\n" + model.split("\n\n")[-1])
        text = f"{head}\n{imports}{gap}{made}{blank}{body}"
    return re.sub(r"  # fmt: skip", "", text)


def of_docstring(name: str) -> str:
    """The example in the docstring of a dotted path, with what it needs imported; empty when it has none."""
    module, _, attribute = name.rpartition(".")
    doc = inspect.getdoc(getattr(importlib.import_module(module), attribute)) or ""
    code: list[str] = []
    for line in doc.splitlines():
        if line.lstrip().startswith((">>> ", "... ")):
            code.append(line.lstrip()[4:])
        elif line.strip() in (">>>", "..."):
            code.append("")
    if not code:
        return ""
    last = code[-1]
    if not last.startswith((" ", "import", "from", "print(", "assert")) and " = " not in last.split("(")[0]:
        try:
            compile(f"print({last})", "", "exec")
            code[-1] = f"print({last})"
        except SyntaxError:
            pass
    where = importlib.import_module(module)
    home = inspect.getmodule(getattr(where, attribute)) or where
    names = _free(code, vars(home))
    return "\n".join(["import torch", *[f"from {m} import {n}" for n, m in names.items()], "", *code])


def _free(code: list[str], known: dict[str, Any]) -> dict[str, str]:
    """Names that an example takes from its module, and where they can be imported from."""
    import ast

    tree = ast.parse("\n".join(code))
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    made = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    made |= {a.asname or a.name for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
    out = {}
    for name in sorted(used - made - {"torch"}):
        if inspect.ismodule(known.get(name)):
            continue
        if name in known:
            home = getattr(known[name], "__module__", None)
            out[name] = home if isinstance(home, str) and hasattr(known[name], "__name__") else known["__name__"]
    return out


def snippet(entry: Paper, cases: dict[str, Any] | None = None) -> str:
    """The snippet of a paper; empty when nothing gives one."""
    if code := of_file(entry.slug):
        return code
    cases = rows() if cases is None else cases
    for name in entry.mechanisms:
        if name in cases:
            return of_case(cases[name])
    for name in entry.mechanisms:
        if "." in name and (code := of_docstring(name)):
            return code
    return ""
