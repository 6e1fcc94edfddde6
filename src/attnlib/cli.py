"""The ``attnlib`` command: thin layers over the library."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Every attention mechanism under one interface.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="A setting of the mechanism, as name=value; repeatable.", metavar="NAME=VALUE"),
]


def _version(asked: bool) -> None:
    if asked:
        from . import __version__

        sys.stdout.write(f"attnlib {__version__}\n")
        raise typer.Exit()


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def parse_settings(pairs: list[str] | None) -> dict[str, Any]:
    """``["dim=32", "causal=true"]`` -> ``{"dim": 32, "causal": True}``."""
    settings = {}
    for pair in pairs or []:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"--set {pair!r} must read name=value, for example --set dim=32")
        settings[name.replace("-", "_")] = _value(text)
    return settings


def parse_grid(text: str) -> tuple[int, ...]:
    """``"8,8"`` or ``"8x8"`` -> ``(8, 8)``."""
    try:
        grid = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        raise ValueError(f"grid {text!r} must be one to three whole numbers, for example 128 or 14,14") from None
    if not 1 <= len(grid) <= 3 or min(grid) < 1:
        raise ValueError(f"grid {text!r} must be one to three positive numbers")
    return grid


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


@app.command("list")
def list_(
    text: Annotated[str, typer.Argument(help="Only names containing this.")] = "",
    pattern: Annotated[str | None, typer.Option(help="Only mechanisms with this pattern, e.g. causal-self.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """List the mechanisms.

    [dim]attnlib list[/]  ·  [dim]attnlib list --pattern causal-self[/]  ·  [dim]attnlib list agent --json[/]
    """
    from .nn.registry import default_traits, find, list_mechanisms
    from .types import PATTERNS, check_choice

    if pattern is not None:
        check_choice("pattern", pattern, PATTERNS)
    rows = []
    for name in list_mechanisms():
        cls = find(name)
        most = cls.class_traits  # type: ignore[attr-defined]
        if text.lower() in name and (pattern is None or pattern in most.patterns):
            summary = (cls.__doc__ or "").strip().splitlines()[0]
            # Patterns are what some setting serves; everything else is what an instance by default claims.
            traits = {**default_traits(name).to_dict(), "patterns": most.to_dict()["patterns"]}
            rows.append({"name": name, "summary": summary, **traits})
    others = {
        kind: [
            {"name": n, "summary": (find(n).__doc__ or "").splitlines()[0]}
            for n in list_mechanisms(kind)
            if text.lower() in n
        ]
        for kind in ("fusion", "pool")
    }
    if as_json:
        _print_json({"mechanisms": rows, "fusions": others["fusion"], "pools": others["pool"]})
        return
    _refuse_nothing([*rows, *others["fusion"], *others["pool"]], "mechanism's name", text, list_mechanisms())
    table = _table("name", "patterns", "grids", "work", "")
    for row in rows:
        flags = ("S" if row["streaming"] else " ") + ("M" if row["mask"] else " ")
        table.add_row(
            row["name"], " ".join(_short(p) for p in row["patterns"]), " ".join(str(r) for r in row["grid_ranks"]),
            _cost(row["work"]), flags,
        )  # fmt: skip
    console.print(table)
    for kind, found in others.items():
        if found and pattern is None:
            console.print(f"{kind}s: {', '.join(row['name'] for row in found)}")
    console.print("[dim]NS noncausal self, CS causal self, NC noncausal cross, CC causal cross, with some settings;[/]")
    console.print("[dim]the rest by default: ranks of grids, growth of work, S decodes step by step, M takes a mask[/]")


def _table(first: str, *columns: str, title: str | None = None) -> Table:
    """A table whose first column, the names, is never cut."""
    table = Table(box=None, title=title, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def plain_text(text: str) -> str:
    """Documentation as a terminal shows it: names without the marks of its markup.

    >>> plain_text(":func:`attach` takes ``model`` and a `site`::")
    'attach takes model and a site:'
    """
    lines = []
    for line in text.splitlines():
        if not line.lstrip().startswith((">>>", "...")):
            line = re.sub(r":[a-z:]+:`~?([^`<]*?)(?:\s*<[^`]*>)?`", r"\1", line)
            line = re.sub(r"``(.+?)``|`([^`]+)`", lambda m: m[1] or m[2], line)
            line = re.sub(r"::$", ":", line)
        lines.append(line)
    return "\n".join(lines)


def _short(pattern: str) -> str:
    return {"noncausal-self": "NS", "causal-self": "CS", "noncausal-cross": "NC", "causal-cross": "CC"}[pattern]


def _cost(exponents: dict[str, float]) -> str:
    return " ".join(symbol if e == 1 else f"{symbol}^{e:g}" for symbol, e in exponents.items() if e)


@app.command()
def info(
    name: Annotated[str, typer.Argument(help="A mechanism, alias or paper.")],
    settings: Settings = None,
    as_json: JsonFlag = False,
) -> None:
    """What a mechanism or technique is, takes and claims.

    [dim]attnlib info biformer[/]  ·  [dim]attnlib info softmax-attention --set dim=64 --set causal=true[/]  ·
    [dim]attnlib info snapkv[/]
    """
    import inspect

    from .catalog import papers
    from .nn.registry import find
    from .theory.mixing import passes_table, unified_view

    try:
        cls = find(name)
    except ValueError as error:
        _info_of_paper(name, bool(settings), as_json, error)
        return
    config = parse_settings(settings)
    traits = (cls(**config).traits if config else cls.class_traits).to_dict()  # type: ignore[attr-defined]
    slug = cls.slug  # type: ignore[attr-defined]
    entries = [p.to_dict() for p in papers() if slug in p.mechanisms]
    mechanism = cls(**config) if config else cls
    view, passes = unified_view(mechanism), passes_table(mechanism)
    if as_json:
        _print_json(
            {"name": slug, "doc": inspect.getdoc(cls), "signature": str(inspect.signature(cls)), "traits": traits,
             "view": view, "passes": passes, "papers": entries}
        )  # fmt: skip
        return
    console.print(f"[bold]{slug}[/]  [dim]{cls.__module__}.{cls.__qualname__}[/]\n")
    console.print(plain_text(inspect.getdoc(cls) or ""), markup=False, highlight=False)
    table = _table("claim", "value", title="this instance" if config else "upper bound of claims")
    for key, value in traits.items():
        table.add_row(key, _told(value))
    console.print(table)
    table = _table("Y = M(X) V", "", title="as a mixing matrix")
    for key, text in view.items():
        table.add_row(key, text)
    console.print(table)
    if passes:
        table = _table(*passes[0], title="passes, footprint of one query or head, least traffic")
        for row in passes:
            table.add_row(*(str(value) for value in row.values()))
        console.print(table)
    for entry in entries:
        _print_paper(entry)


def _info_of_paper(name: str, configured: bool, as_json: bool, error: ValueError) -> None:
    """``info`` for what is no registered mechanism: a paper of the catalogue, or a technique by its class."""
    import difflib
    import importlib
    import inspect

    from .catalog import papers
    from .nn.registry import list_mechanisms

    names: dict[str, Any] = {p.slug: p for p in papers()}
    classes = {m.rpartition(".")[2].lower(): p for p in papers() for m in p.mechanisms if "." in m}
    entry = names.get(name.lower()) or classes.get(name.lower())
    if entry is None:
        near = difflib.get_close_matches(name.lower(), [*list_mechanisms(), *names], n=3, cutoff=0.6)
        if "unknown" not in str(error) or not near:
            raise error
        raise ValueError(
            f"unknown mechanism or paper {name!r}; did you mean {' or '.join(map(repr, dict.fromkeys(near)))}?"
        )
    if configured:
        raise ValueError(f"{name!r} is no mechanism that attnlib.create builds, so --set is not possible")
    found: list[dict[str, str]] = []
    for path in entry.mechanisms:
        module, _, attribute = path.rpartition(".")
        if module:
            value = getattr(importlib.import_module(module), attribute)
            found.append({"name": path, "doc": inspect.getdoc(value) or "", "signature": str(inspect.signature(value))})
        else:
            found.append({"name": path, "doc": f"A mechanism: attnlib info {path}", "signature": ""})
    if as_json:
        _print_json({"name": entry.slug, "techniques": found, "papers": [entry.to_dict()]})
        return
    for one in found:
        console.print(f"[bold]{escape(one['name'])}[/][dim]{escape(one['signature'])}[/]", highlight=False)
        console.print(f"\n{plain_text(one['doc'])}\n", markup=False, highlight=False)
    _print_paper(entry.to_dict())


def _told(value: Any) -> str:
    """A claim as people say it.

    >>> _told(True), _told({"N": 2}), _told(["a", "b"]), _told([])
    ('yes', 'N^2', 'a, b', 'none')
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return _cost(value) or "constant"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _refuse_nothing(found: Sequence[Any], what: str, text: str, names: Sequence[str]) -> None:
    """Say that a search found nothing, and what is near."""
    import difflib

    if not found:
        near = difflib.get_close_matches(text.lower(), names, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"no {what} contains {text!r}{hint}")


def _print_paper(entry: dict[str, Any]) -> None:
    head = f"[bold]{escape(entry['title'])}[/] ({escape(entry['authors'])}, {entry['year']})  {entry['link']}"
    console.print(head, highlight=False)
    for word in ("verified", "differs", "variants", "missing", "not_shown"):
        for line in entry[word]:
            console.print(f"  [dim]{word.replace('_', ' '):<9}[/] {escape(plain_text(line))}", highlight=False)


@app.command()
def models(
    text: Annotated[str, typer.Argument(help="Only names containing this.")] = "", as_json: JsonFlag = False
) -> None:
    """The released sizes of models, with parameters and the licence of their weights.

    [dim]attnlib models[/]  ·  [dim]attnlib models maxvit --json[/]
    """
    from .models.build import counted_params, list_models, model_entry

    rows = []
    for name in list_models(f"*{text.lower()}*"):
        entry = model_entry(name)
        rows.append({**entry.to_dict(), "params": counted_params(entry) if entry.params is None else entry.params})
    if as_json:
        _print_json(rows)
        return
    _refuse_nothing(rows, "model's name", text, list_models())
    table = _table("model", "paper", "parameters", "image", "licence")
    for column in table.columns:  # one line per model: where the terminal is narrow, the paper is cut
        column.no_wrap, column.overflow = column.header != "paper", "ellipsis"
    for row in rows:
        table.add_row(
            row["name"], row["family"], f"{row['params']:,}", str(row["img_size"]), row["license"] or "no weights"
        )
    console.print(table)


@app.command()
def papers(
    text: Annotated[str, typer.Argument(help="Only papers containing this.")] = "", as_json: JsonFlag = False
) -> None:
    """The papers that work here.

    [dim]attnlib papers[/]  ·  [dim]attnlib papers "linear attention" --json[/]
    """
    from .catalog import papers as find_papers

    found = find_papers(text)
    if as_json:
        _print_json([p.to_dict() for p in found])
        return
    _refuse_nothing(found, "paper", text, [p.slug for p in find_papers()])
    table = _table("paper", "year", "title", "held to")
    for p in found:
        table.add_row(p.slug, str(p.year), p.title, p.parity)
    console.print(table)


@app.command()
def explain(
    op: Annotated[str, typer.Argument(help="The operator, e.g. linear_attention.")] = "attention",
    shape: Annotated[str, typer.Option(help="B,H,N,D of the queries.")] = "1,8,1024,64",
    kv_shape: Annotated[
        str | None, typer.Option(help="B,H,M,D of keys and values; like the queries by default.")
    ] = None,
    v_dim: Annotated[int | None, typer.Option(help="Width of the values; that of the keys by default.")] = None,
    normalizer: Annotated[str, typer.Option(help="softmax, sigmoid, clipped_softmax, ...")] = "softmax",
    causal: Annotated[bool, typer.Option(help="Causal mask.")] = False,
    window: Annotated[int | None, typer.Option(help="Sliding window of this width.")] = None,
    weights: Annotated[bool, typer.Option(help="The weights are wanted too.")] = False,
    grad: Annotated[bool, typer.Option(help="Gradients are wanted.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A further argument of the operator; repeatable.", metavar="NAME=VALUE"),
    ] = None,
    backend: Annotated[str | None, typer.Option(help="Force one backend.")] = None,
    device: Annotated[str | None, typer.Option(help="The choice on a device that need not be here, e.g. cuda.")] = None,
    dtype: Annotated[str, typer.Option(help="Type of the tensors, e.g. bfloat16.")] = "float32",
    as_json: JsonFlag = False,
) -> None:
    """Which backend runs for a call of an operator, and why each other is passed over.

    [dim]attnlib explain --shape 1,8,4096,64 --window 513[/]  ·  [dim]attnlib explain --normalizer sigmoid --grad[/]  ·
    [dim]attnlib explain linear_attention --shape 1,4,512,32 --grad[/]  ·
    [dim]attnlib explain neighborhood_attention --shape 1,2,64,16 --set grid=8,8 --set kernel_size=3[/]  ·
    [dim]attnlib explain linear_attention --device cuda --dtype bfloat16[/]
    """
    import torch

    from . import masks
    from .checks import check_choice
    from .ops import explain as explain_call
    from .ops._dispatch import find

    def parse(name: str, text: str) -> tuple[int, ...]:
        sizes = [part.strip() for part in text.split(",")]
        if len(sizes) != 4 or not all(part.isdigit() for part in sizes):
            raise ValueError(f"{name} {text!r} must be four whole numbers B,H,N,D, for example 1,8,1024,64")
        return tuple(int(part) for part in sizes)

    find(op)
    other = {"depthwise": "x and weight", "neighborhood_av": "weights, v and kernel_size"}
    if op in other:
        raise ValueError(f"the arguments of {op} are {other[op]}, not q, k, v: ask attnlib.explain in Python")
    check_choice("dtype", dtype, ["float64", "float32", "bfloat16", "float16"])
    made: dict[str, Any] = dict(requires_grad=grad, dtype=getattr(torch, dtype))
    q = torch.empty(parse("--shape", shape), **made)
    sizes = parse("--kv-shape", kv_shape or shape)
    k = torch.empty(sizes, **made)
    v = torch.empty(*sizes[:3], sizes[3] if v_dim is None else v_dim, **made)
    call = parse_settings(settings)
    for name, value in call.items():
        if isinstance(value, str) and re.fullmatch(r"\d+(,\d+)+", value):
            call[name] = tuple(map(int, value.split(",")))
    if causal or window is not None:
        mask: masks.Mask | None = masks.causal() if causal else None
        if window is not None:
            mask = masks.sliding_window(window) if mask is None else mask & masks.sliding_window(window)
        call["mask"] = mask
    if normalizer != "softmax":
        call["normalizer"] = normalizer
    if weights:
        call["return_weights"] = True
    text = explain_call(op, q, k, v, **call, backend=backend, device=device)
    if as_json:
        runs, *rest = text.splitlines()
        passed = dict(line.removeprefix("passed over: ").split(": ", 1) for line in rest)
        _print_json({"runs": runs.removeprefix("runs: "), "passed_over": passed})
    else:
        console.print(text, highlight=False, markup=False)


@app.command()
def check(
    target: Annotated[str, typer.Argument(help="A mechanism's name, or module:Class of your own.")],
    settings: Settings = None,
    grid: Annotated[str | None, typer.Option(help="Grid of the inputs to try, e.g. 12 or 8,8.")] = None,
    infer: Annotated[bool, typer.Option("--infer", help="Also try what is not claimed.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Test every claim of a mechanism, claim by claim. Exit code 1 when one fails.

    [dim]attnlib check biformer[/]  ·  [dim]attnlib check my.module:MyAttention --set dim=32 --grid 16 --infer[/]
    """
    from .check import run_cli

    report = run_cli(target, parse_settings(settings), None if grid is None else parse_grid(grid), infer=infer)
    if as_json:
        _print_json(report.to_dict())
    else:
        console.print(report)
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def bench(
    names: Annotated[list[str] | None, typer.Argument(help="Mechanisms to time; none: operator suites.")] = None,
    suite: Annotated[str, typer.Option(help="Operator suite, or 'all'.")] = "all",
    grid: Annotated[str, typer.Option(help="Grid of the inputs.")] = "1024",
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the JSON results.")] = None,
    against: Annotated[
        str | None, typer.Option(help="Revision or folder: time small calls here beside that source tree.")
    ] = None,
    rows: Annotated[str, typer.Option(help="With --against: a pattern of the calls.")] = "*",
    workers: Annotated[int, typer.Option(help="Studies at a time; what is timed runs alone.")] = 1,
    ray: Annotated[bool, typer.Option("--ray", help="Studies go to a Ray cluster; needs attnlib\\[ray].")] = False,
    model: Annotated[
        str | None, typer.Option(help="Measure techniques on it: smollm2 (make models), a folder, or a name.")
    ] = None,
    techniques: Annotated[
        list[str] | None,
        typer.Option("--with", help="With --model: a technique; repeatable.", metavar="NAME,key=value"),
    ] = None,
    length: Annotated[int, typer.Option(help="With --model: tokens of a prompt.")] = 1024,
    as_json: JsonFlag = False,
) -> None:
    """Time operators and mechanisms: medians of interleaved runs, as ratios to softmax attention.

    [dim]attnlib bench sigmoid-attention --grid 1024 --set dim=256 --set num_heads=4[/]  ·
    [dim]attnlib bench --suite normalizers --out results[/]  ·  [dim]attnlib bench --against HEAD~5 --rows "step*"[/]  ·
    [dim]attnlib bench --model smollm2 --with SnapKV,ratio=0.5 --with KeyNorm,ratio=0.5 --out report[/]
    """
    from .bench import run_against, run_bench, run_techniques

    if model is not None or techniques:
        other = [*(names or []), *(["--suite"] if suite != "all" else []), *(["--against"] if against else [])]
        if other:
            raise ValueError(f"--model measures techniques (--with) and nothing else, got {', '.join(other)} too")
        results = run_techniques(model, techniques or [], length, out, console, as_json)
    elif against is not None:
        results = run_against(against, rows, out, console, as_json)
    else:
        results = run_bench(
            list(names or []), suite, parse_grid(grid), parse_settings(settings), out, console, as_json, workers, ray
        )
    if as_json:
        _print_json(results)


@app.command()
def compare(
    mechanisms: Annotated[list[str] | None, typer.Argument(help="Mechanisms to compare; none: the preset's.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Comma-separated tasks; all by default.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of every run; each task's own by default.")] = None,
    budget: Annotated[float | None, typer.Option(help="Minutes after which no further run starts.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for results and the report.")] = Path("attnlib-report"),
    data: Annotated[Path | None, typer.Option(help="Your own text file, image folder or CSV.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Seeds per mechanism and task.")] = None,
    preset: Annotated[str | None, typer.Option(help="A named selection, e.g. demo.")] = None,
    device: Annotated[str, typer.Option(help="Where models are trained, e.g. cuda.")] = "cpu",
    workers: Annotated[
        int | None, typer.Option(help="Runs at a time; by default one per core on the CPU, at most 8.")
    ] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Runs go to a Ray cluster; needs attnlib\\[ray].")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train and time mechanisms side by side on real data and write a report.

    [dim]attnlib compare softmax-attention sigmoid-attention --tasks digits --out report[/]  ·
    [dim]attnlib compare lightning-attention-2 --tasks text --data book.txt[/]

    The number of steps does not depend on the machine. Run it again with the same --out to resume: finished runs are
    kept.
    """
    from .bench.compare import compare as run
    from .bench.workers import available_cores

    if workers is None:
        workers = min(8, available_cores()) if device == "cpu" else 1
    result = run(
        list(mechanisms or []), tasks=tasks.split(",") if tasks else None, steps=steps, budget_minutes=budget, out=out,
        data=data, seeds=seeds, preset=preset, device=device, workers=workers, ray=ray, quiet=as_json,
    )  # fmt: skip
    if as_json:
        _print_json(result.results)


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="smollm2 (make models), a folder of a transformers model, or its name.")],
    to: Annotated[str, typer.Option(help="hedgehog, lolcats, elu1 or window.")] = "lolcats",
    out: Annotated[Path | None, typer.Option(help="Folder for the converted model and its report.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text to train on; inside installed packages by default.")] = None,
    settings: Settings = None,
    layers: Annotated[str | None, typer.Option(help="Comma-separated numbers; all layers by default.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of attention transfer.")] = 100,
    adapter_steps: Annotated[int, typer.Option(help="Steps of low-rank adapters afterwards.")] = 0,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 256,
    batch: Annotated[int, typer.Option(help="Windows of a step.")] = 1,
    loss: Annotated[str, typer.Option(help="mse (head outputs) or xent (maps).")] = "mse",
    lr: Annotated[float, typer.Option(help="Of the transfer.")] = 1e-2,
    as_json: JsonFlag = False,
) -> None:
    """Convert a language model's attention, train it to agree, and say how close it stayed.

    [dim]attnlib convert smollm2 --to lolcats --out converted[/]  ·
    [dim]attnlib convert ./my-llama --to hedgehog --loss xent --steps 500 --adapter-steps 200 --out converted[/]

    Afterwards: import attnlib.convert; AutoModelForCausalLM.from_pretrained("converted"). Run it again with the same
    --out to resume training.
    """
    from .bench.converting import convert_model

    numbers = None if layers is None else list(parse_numbers(layers))
    report = convert_model(
        model, to, out, text, parse_settings(settings), numbers, steps, adapter_steps, length, batch, loss, lr,
        progress=not as_json,
    )  # fmt: skip
    if as_json:
        _print_json(report)
        return
    table = _table("layer", "error", "divergence", "entropy", "of softmax", title=f"converted to {to}")
    for row in report["layers"]:
        numbers_of = (row[name] for name in ("error", "divergence", "entropy", "teacher_entropy"))
        table.add_row(str(row["layer"]), *(f"{value:.4f}" for value in numbers_of))
    console.print(table)
    bits = report["bits_per_byte"]
    console.print(f"bits per byte {bits['original']:.3f} before, {bits['converted']:.3f} after", highlight=False)
    if "agreement" in report["model"]:
        console.print(f"same next token in {report['model']['agreement']:.1%}", highlight=False)


@app.command()
def look(
    model: Annotated[str, typer.Argument(help="smollm2 (make models), a folder of a transformers model, or its name.")],
    text: Annotated[str | None, typer.Option(help="What it reads.")] = None,
    image: Annotated[Path | None, typer.Option(help="A picture that it reads.")] = None,
    ids: Annotated[str | None, typer.Option(help="Comma-separated numbers of tokens that it reads.")] = None,
    techniques: Annotated[
        list[str] | None, typer.Option("--with", help="A technique that acts; repeatable.", metavar="NAME,key=value")
    ] = None,
    attribute: Annotated[
        list[str] | None,
        typer.Option(
            help="logits, gradient, saliency, grad-cam, relevance, integrated-gradients, or with --corrupted patch or "
            "first-order; repeatable."
        ),
    ] = None,
    corrupted: Annotated[str | None, typer.Option(help="Another text, as long, for patching.")] = None,
    diff: Annotated[
        str | None, typer.Option(help="A run of --save, or 'plain': show what differs from it.", metavar="RUN")
    ] = None,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("look.html"),
    save: Annotated[Path | None, typer.Option(help="Keep the run in a .safetensors file.")] = None,
    layers: Annotated[str | None, typer.Option(help="Comma-separated numbers; all layers by default.")] = None,
) -> None:
    """Look into a model while it reads: one page with every head, which asks nothing of any other place.

    [dim]attnlib look smollm2 --text "When Mary and John went to the store," --attribute logits --out page.html[/]  ·
    [dim]attnlib look smollm2 --text "..." --with SinkCalibration,beta=0.4 --diff plain[/]  ·
    [dim]attnlib look dinov2 --image cat.png[/]
    """
    from .bench.looking import look_at

    numbers = None if layers is None else list(parse_numbers(layers))
    written = look_at(
        model, text=text, image=image, ids=None if ids is None else list(parse_numbers(ids, "--ids")),
        techniques=techniques or [], attribute=attribute or [], corrupted=corrupted, diff=diff, out=out, save=save,
        layers=numbers,
    )  # fmt: skip
    console.print(f"{escape(str(written))} ({written.stat().st_size / 1e6:.1f} MB)", highlight=False, soft_wrap=True)


def parse_numbers(text: str, name: str = "--layers") -> tuple[int, ...]:
    """``"0,3"`` -> ``(0, 3)``."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise ValueError(f"{name} {text!r} must be whole numbers, for example 0,1,2")
    return tuple(map(int, parts))


def main() -> None:
    """Entry point: errors of use are one line, not a traceback."""
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        Console(stderr=True).print(f"[bold red]error[/] {escape(text)}", highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
