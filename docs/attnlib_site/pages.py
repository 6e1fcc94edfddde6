"""Pages of papers, mechanisms, operators, techniques and models, from what they say of themselves."""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
import tomllib
import types
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from attnlib.catalog import Paper

from . import maths, text
from .measured import Study, rows_of
from .text import cell, fence, inline, table

#: What a page of a site is: where it stands, and its Markdown.
Pages = dict[str, str]

#: Packages whose exported names are techniques, and what they act on.
TECHNIQUES = {
    "cache": "Decoders of transformers under `generate()`: what stays in the cache of keys and values.",
    "steer": "Decoders of transformers, with images where a technique is about images; denoisers of diffusers.",
    "reduce": "Vision-language models of transformers under `generate()`: fewer visual tokens.",
    "look": "Any model that can be attached to: what attention does, in bounded memory.",
    "hooks": "The protocol of all techniques: transformers, diffusers, timm, `nn.MultiheadAttention` and this library.",
    "convert": "Models that exist and are turned into others: linear attention, pruning, quantization, distillation.",
    "theory": "Attention as equations that can be run and counted.",
    "parallel": "One sequence over several processes.",
    "optim": "Optimizers of the catalogue.",
}

#: Families of mechanisms: folder of ``attnlib.nn`` -> heading.
FAMILIES = {
    "dense": "Dense", "linear": "Linear", "local": "Local", "partition": "Windows and partitions", "sparse": "Sparse",
    "reduced": "Fewer keys", "heads": "Heads and experts", "scan": "State spaces", "sampled": "Sampled",
    "multimodal": "Multimodal", "models": "Models", "steer": "Steering", "reduce": "Token reduction",
    "cache": "Caches", "convert": "Conversion", "ops": "Operators", "hooks": "Masks by type", "theory": "Theory",
    "bench": "Benchmarks", "parallel": "Parallel", "optim": "Optimizers",
}  # fmt: skip

HELD = {
    "authors": "the authors' code: outputs and gradients are compared with recordings of it",
    "oracle": "a float64 oracle written from the paper, since the authors' code cannot be run or is not released",
}


def family(where: str) -> str:
    """The heading that a module belongs under.

    >>> family("attnlib.nn.sparse.biformer"), family("attnlib.cache.snapkv"), family("attnlib.nn.gates.ours")
    ('Sparse', 'Caches', 'Gates')
    """
    parts = where.split(".")
    word = parts[2] if parts[1] == "nn" and len(parts) > 2 else parts[1]
    return FAMILIES.get(word, word.replace("_", " ").capitalize())


def resolve(name: str) -> Any:
    """The class of a registry name, or what a dotted path names."""
    if "." not in name:
        from attnlib.nn.registry import find

        return find(name)
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def page_of(name: str) -> str:
    """Where the page of a registry name or dotted path stands; empty when it has none of its own.

    >>> page_of("biformer"), page_of("attnlib.cache.SnapKV"), page_of("attnlib.models.pointer.PointerNetwork")
    ('mechanisms/biformer.md', 'techniques/cache/SnapKV.md', '')
    """
    if "." not in name:
        return f"mechanisms/{name}.md"
    value = resolve(name)
    short = name.rpartition(".")[2]
    for package in TECHNIQUES:
        if getattr(importlib.import_module(f"attnlib.{package}"), short, None) is value:
            return f"techniques/{package}/{short}.md"
    from attnlib import ops

    if getattr(ops, short, None) is value:
        return f"operators/{short}.md"
    return ""


def link(here: str, there: str, said: str) -> str:
    """A Markdown link from one page to another."""
    return f"[{said}]({'../' * here.count('/')}{there})"


def signature(value: Any) -> str:
    """How a class or function is called, an argument per line where one line is too long."""
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return ""
    name = value.__name__
    short = f"{name}{found}"
    if len(short) <= 90:
        return _unquoted(short)
    parts: list[str] = []
    seen_star = False
    for p in found.parameters.values():
        if p.kind is p.KEYWORD_ONLY and not seen_star:
            parts.append("*")
        seen_star = seen_star or p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        parts.append(_unquoted(str(p)))
    back = "" if found.return_annotation is found.empty else f" -> {_annotation(found.return_annotation)}"
    return f"{name}(\n" + "".join(f"    {p},\n" for p in parts) + f"){back}"


def _unquoted(text: str) -> str:
    """Annotations as they are written in the source."""
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)


def _annotation(value: Any) -> str:
    return value if isinstance(value, str) else getattr(value, "__name__", str(value))


def doc_of(value: Any) -> str:
    """A docstring of its own, not one that is inherited."""
    own = vars(value).get("__doc__") if isinstance(value, type) else getattr(value, "__doc__", None)
    return inspect.cleandoc(own) if own else ""


def module_doc(value: Any) -> str:
    """The docstring of the module that something stands in."""
    module = inspect.getmodule(value)
    return inspect.cleandoc(module.__doc__) if module and module.__doc__ else ""


def equations(entry: Paper) -> list[str]:
    """What the docstrings of a paper's mechanisms write as equations, the first that do."""
    for name in entry.mechanisms:
        value = resolve(name)
        for doc in (doc_of(value), module_doc(value)):
            if found := text.equations(doc):
                return found
    return []


@cache
def tex() -> dict[str, list[str]]:
    """Equations in TeX by paper."""
    return tomllib.loads((Path(__file__).parent / "equations.toml").read_text(encoding="utf-8"))


def _lines(title: str, lines: Iterable[str], linked: Callable[[str], str]) -> str:
    items = [f"- {linked(inline(line))}" for line in lines]
    return f"## {title}\n\n" + "\n".join(items) + "\n" if items else ""


def results_linked(here: str, stems: Iterable[str]) -> Callable[[str], str]:
    """Makes links of the names of files of results in a line."""
    known = set(stems)

    def linked(line: str) -> str:
        def one(match: re.Match[str]) -> str:
            stem = match[1]
            return link(here, f"results/{stem}.md", f"{stem}.json") if stem in known else match[0]

        return re.sub(r"`?(?:benchmarks/results/)?([\w-]+)\.json`?", one, line)

    return linked


@cache
def fits(name: str) -> tuple[bool, bool]:
    """Whether a mechanism with its defaults can be built into a decoder, and into a pyramid of images."""
    import torch

    from attnlib.models.build import create_model
    from attnlib.models.language import DecoderConfig, DecoderForCausalLM

    sizes = {"vocab_size": 8, "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 1}

    def built(make: Callable[[], Any]) -> bool:
        try:
            with torch.device("meta"):
                make()
        except (ValueError, TypeError, NotImplementedError):
            return False
        return True

    return (
        built(lambda: DecoderForCausalLM(DecoderConfig(**sizes, num_attention_heads=4, mechanisms=[name]))),
        built(lambda: create_model("nat_mini", mechanism=name, depths=(1, 1, 1, 1))),
    )


def attaches(value: Any, name: str) -> list[str]:
    """Where something of the catalogue can be used or attached, in sentences."""
    from attnlib.hooks import Intervention
    from attnlib.hooks.intervention import STAGES
    from attnlib.nn.base import Fusion, Mechanism
    from attnlib.nn.pools import Pool

    short = name.rpartition(".")[2]
    if isinstance(value, type) and issubclass(value, Intervention):
        stages = [s for s in STAGES if getattr(value, s, None) is not getattr(Intervention, s, None)]
        package = value.__module__.split(".")[1]
        place = "Denoisers of diffusers." if ".diffusion" in value.__module__ else TECHNIQUES.get(package, "")
        acts = f" It acts in {', '.join(f'`{s}`' for s in stages)}." if stages else ""
        return [f"`{short}` is attached to a model that exists: `attnlib.attach(model, {short}(...))`. {place}{acts}"]
    if isinstance(value, type) and issubclass(value, Fusion):
        return [f'`attnlib.create("{name}", ...)` takes several streams and gives as many.']
    if isinstance(value, type) and issubclass(value, Pool) and "." not in name:
        return [f'`attnlib.create("{name}", ...)` turns the tokens of any encoder, (B, N, C), into one vector.']
    if isinstance(value, type) and issubclass(value, Mechanism) and "." not in name:
        traits, (decodes, sees) = value.class_traits, fits(name)
        out = [f'`attnlib.create("{name}", ...)`, a module of its own.']
        if "causal-self" in traits.patterns:
            steps = ", token by token with a state or a cache" if traits.streaming else ""
            asked = "" if decodes else ", with settings that make it causal"
            out.append(f'In any layer of a language model: `DecoderConfig(mechanisms=["{name}"])`{steps}{asked}.')
        if "noncausal-self" in traits.patterns and 2 in traits.grid_ranks:
            asked = "" if sees else ", with settings that make it look both ways"
            code = f'`attnlib.create_model("nat_mini", mechanism="{name}")`'
            out.append(f"In the blocks of image backbones that attend, such as {code}{asked}.")
        return out
    from torch import nn, optim

    from attnlib.steer.diffusion.video import Policy

    place = f"`from {name.rpartition('.')[0]} import {short}`"
    if isinstance(value, type) and issubclass(value, Policy):
        said = f"`attnlib.attach(denoiser, BlockSparse({short}(...)))` on a video denoiser of diffusers"
        return [f"{said}; `BlockSparse` stands in `attnlib.steer`."]
    if isinstance(value, type):
        kinds = ((nn.Module, "a module of PyTorch"), (optim.Optimizer, "an optimizer of PyTorch"))
        return [f"{place}: {next((said for kind, said in kinds if issubclass(value, kind)), 'a class')}."]
    return [f"{place}: a function."] if callable(value) else []


def paper_page(entry: Paper, snippet: str, studies: Iterable[Study], sizes: Mapping[str, list[str]]) -> str:
    """One paper: equation, snippet, what a machine checked, figures, differences, what is missing."""
    here = f"papers/{entry.slug}.md"
    studies = list(studies)
    linked = results_linked(here, [s.stem for s in studies])
    out = [f"# {inline(entry.title)}\n"]
    head = [f"{inline(entry.authors)}, {entry.year}"]
    if entry.link:
        head.append(f"[arXiv {entry.arxiv}]({entry.link})")
    if entry.code:
        commit = f" at `{entry.commit[:8]}`" if entry.commit else ""
        code = (
            f"[{entry.code}](https://github.com/{entry.code})" if re.fullmatch(r"[\w.-]+/[\w.-]+", entry.code) else ""
        )
        head.append(f"code: {code or inline(entry.code)}{commit}")
    out.append(" · ".join(head) + "\n")
    held = HELD.get(entry.parity, f"{inline(entry.parity)}: outputs and gradients are compared with it")
    out.append(f"Held to {held}.\n")
    named = []
    for name in entry.mechanisms:
        there = page_of(name)
        named.append(link(here, there, f"`{name}`") if there else f"`{name}`")
    out.append(f"Here: {', '.join(named)}, in `{entry.where}`.\n")
    written = [fence(block) for block in _joined(equations(entry))]
    if rendered := tex().get(entry.slug, []):
        out += ["## Equation\n", *map(maths.fence, rendered)]
        if written:
            out.append('??? note "As its docstring writes it"\n')
            out += [textwrap.indent(block, "    ") for block in written]
    elif written:
        out += ["## Equation\n", *written]
    if snippet:
        out += ["## Try it\n", fence(snippet, "python")]
    used = [line for name in entry.mechanisms for line in attaches(resolve(name), name)]
    if names := sizes.get(entry.slug):
        shown = ", ".join(f"`{n}`" for n in names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        used.append(f"Released sizes ({link(here, f'models.md#{entry.slug}', 'all')}): {shown}.")
    if used:
        out += ["## Where it can be used\n", "\n".join(f"- {line}" for line in used) + "\n"]
    out.append(_lines("What a machine checked", entry.verified, linked))
    if measured := _measured(here, entry, studies):
        out += ["## Measured here\n", measured]
    out.append(_lines("What differs from the authors' code", entry.differs, linked))
    out.append(_lines("Variants", entry.variants, linked))
    out.append(_lines("Missing", entry.missing, linked))
    out.append(_lines("Not shown here", entry.not_shown, linked))
    return "\n".join(x for x in out if x)


def _joined(found: list[str]) -> list[str]:
    """Single lines together in one block, blocks of several lines as they are."""
    out: list[str] = []
    for block in found:
        if out and "\n" not in block and "\n\n" not in out[-1] and len(out[-1].splitlines()) < 8:
            out[-1] += f"\n{block}"
        else:
            out.append(block)
    return out[:4]


def _measured(here: str, entry: Paper, studies: list[Study]) -> str:
    names = [n if "." not in n else n.rpartition(".")[2] for n in (*entry.mechanisms, entry.slug)]
    told = " ".join(entry.verified)
    out = []
    for study in studies:
        found = rows_of(study, list(dict.fromkeys(names)))
        where = link(here, f"results/{study.stem}.md", study.title)
        if found:
            out.append(f"**{where}** ({study.machine})\n")
            for grid, rows in found:
                if grid.title and grid.title != "mechanisms":
                    out.append(f"*{grid.title.capitalize()}*\n")
                out.append(grid.markdown(rows))
        elif f"{study.stem}.json" in told:
            out.append(f"**{where}** ({study.machine})\n")
    return "\n".join(out)


def mechanism_page(name: str, entries: Iterable[Paper]) -> str:
    """One mechanism: docstrings, claims, and how it reads as a mixing matrix."""
    from attnlib.nn.registry import find
    from attnlib.theory.mixing import passes_table, unified_view

    cls = find(name)
    here = f"mechanisms/{name}.md"
    out = [f"# {name}\n", f"`{cls.__module__}.{cls.__qualname__}`\n"]
    papers = [link(here, f"papers/{e.slug}.md", cell(e.title)) for e in entries if name in e.mechanisms]
    if papers:
        out.append(f"From {', '.join(papers)}.\n")
    if said := module_doc(cls):
        out.append(text.markdown(said))
    out += [f"## {cls.__name__}\n", fence(signature(cls), "python"), text.markdown(doc_of(cls))]
    traits = cls.class_traits.to_dict() if hasattr(cls, "class_traits") else {}
    if traits:
        out += ["## What it claims, and a machine checks\n"]
        out += [
            "Upper bounds over all settings; `attnlib check` tests each claim of an instance.\n",
            table(["claim", ""], [[k.replace("_", " "), cell(told(v))] for k, v in traits.items()]),
        ]
        view = unified_view(cls)
        out += ["## As a mixing matrix `Y = M(X) V`\n", table(["", ""], [[k, cell(v)] for k, v in view.items()])]
        if passes := passes_table(cls):
            head, *rows = passes
            out += [
                "## Passes, footprint, least traffic\n",
                table([cell(str(x)) for x in head], [[cell(str(x)) for x in r] for r in rows]),
            ]
    return "\n".join(out)


def told(value: Any) -> str:
    """A claim as people say it.

    >>> told(True), told({"N": 2, "agents": 1}), told(["a", "b"]), told([])
    ('yes', 'N^2 agents', 'a, b', 'none')
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return " ".join(s if e == 1 else f"{s}^{e:g}" for s, e in value.items() if e) or "constant"
    if isinstance(value, (list, tuple, set, frozenset)):
        return ", ".join(map(str, sorted(value, key=str) if isinstance(value, (set, frozenset)) else value)) or "none"
    return str(value)


def name_page(here: str, name: str, value: Any, entries: Iterable[Paper]) -> str:
    """One exported name: how it is called, and its docstring."""
    from attnlib.hooks import Intervention

    dotted = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', name)}"
    out = [f"# {name}\n", f"`{dotted}`\n"]
    papers = [
        link(here, f"papers/{e.slug}.md", cell(e.title))
        for e in entries
        if any("." in m and m.rpartition(".")[2] == name and resolve(m) is value for m in e.mechanisms)
    ]
    if papers:
        out.append(f"From {', '.join(papers)}.\n")
    if callable(value) and (call := signature(value)):
        out.append(fence(call, "python"))
    doc = doc_of(value) or inspect.getdoc(value) or ""
    if isinstance(value, types.ModuleType):
        doc = inspect.cleandoc(value.__doc__ or "")
    out.append(text.markdown(doc))
    if isinstance(value, type):
        if issubclass(value, Intervention):
            out += [f"{line}\n" for line in attaches(value, dotted)]
        for key, method in vars(value).items():
            if inspect.isfunction(method) and not key.startswith("_") and (said := doc_of(method)):
                out += [f"## {key}\n", fence(signature(method), "python"), text.markdown(said)]
    return "\n".join(out)


def backends(name: str) -> str:
    """The backends of an operator with the derivatives they have; empty for what has none."""
    from attnlib import ops

    if name not in ops.operators():
        return ""
    found = ops.derivatives(name)
    heads = list(dict.fromkeys(key for row in found.values() for key in row))
    rows = [[f"`{backend}`", *(cell(row.get(key, "")) for key in heads)] for backend, row in found.items()]
    said = f"`attnlib.explain(attnlib.ops.{name}, ...)` says which one serves a call, and why others are passed over.\n"
    return "\n".join(["## Backends, and their derivatives\n", said, table(["backend", *map(cell, heads)], rows)])


def exported(package: str) -> dict[str, Any]:
    """The classes and functions that a package exports, by name."""
    module = importlib.import_module(package)
    found = {name: getattr(module, name) for name in module.__all__}
    return {name: value for name, value in found.items() if callable(value) or isinstance(value, types.ModuleType)}


def packages(entries: list[Paper]) -> Pages:
    """Pages of operators and of techniques, with the tables that lead to them."""
    out: Pages = {}
    ops = exported("attnlib.ops")
    rows = []
    for name, value in sorted(ops.items()):
        out[f"operators/{name}.md"] = name_page(f"operators/{name}.md", name, value, entries) + "\n" + backends(name)
        rows.append([f"[`{name}`]({name}.md)", cell(text.summary(inspect.getdoc(value) or ""))])
    head = text.markdown(inspect.cleandoc(importlib.import_module("attnlib.ops").__doc__ or ""))
    out["operators/index.md"] = f"# Operators\n\n{head}\n{table(['', ''], rows)}"
    sections = ["# Techniques\n"]
    for package, said in TECHNIQUES.items():
        rows = []
        for name, value in sorted(exported(f"attnlib.{package}").items()):
            here = f"techniques/{package}/{name}.md"
            out[here] = name_page(here, name, value, entries)
            rows.append([f"[`{name}`]({package}/{name}.md)", cell(text.summary(inspect.getdoc(value) or ""))])
        sections += [f"## attnlib.{package}\n", f"{said}\n", table(["", ""], rows)]
    out["techniques/index.md"] = "\n".join(sections)
    return out


def models_page(entries: list[Paper], params: Callable[[Any], int]) -> tuple[str, dict[str, list[str]]]:
    """All sizes of models under a heading per family, and the names of each family."""
    from attnlib.models.build import list_models, model_entry

    titles = {e.slug: e.title for e in entries}
    families: dict[str, list[Any]] = {}
    for name in list_models():
        entry = model_entry(name)
        families.setdefault(entry.family, []).append(entry)
    out = [
        "# Models\n",
        "Every size that `attnlib.create_model(name)` builds, with its parameters, counted on a model that holds no "
        "numbers where the authors' count is not asserted. `pretrained=PATH` reads the authors' or timm's file.\n",
    ]
    for slug, found in sorted(families.items()):
        title = link("models.md", f"papers/{slug}.md", inline(titles[slug])) if slug in titles else ""
        out.append(f"## {slug} {{ #{slug} }}\n")
        out.append(f"{title}\n" if title else "")
        rows = [
            [f"`{e.name}`", f"{params(e):,}", str(e.img_size or ""), cell(e.task), cell(e.license or "no weights")]
            for e in found
        ]
        out.append(table(["model", "parameters", "image", "task", "licence of the weights"], rows))
    return "\n".join(out), {slug: [e.name for e in found] for slug, found in families.items()}


def papers_index(entries: list[Paper]) -> str:
    """All papers under a heading per family."""
    out = [
        "# Papers\n",
        f"{len(entries)} papers work here. A paper is listed when what it releases runs and is held to something: the "
        "authors' code, or a float64 oracle. Each page says what was checked, and what was not.\n",
    ]
    for name, group in grouped(entries).items():
        rows = [
            [
                f"[{cell(e.title)}]({e.slug}.md)",
                str(e.year),
                cell(e.parity),
                cell(", ".join(m.rpartition(".")[2] for m in e.mechanisms[:4])),
            ]
            for e in group
        ]
        out += [f"## {name}\n", table(["paper", "year", "held to", "here"], rows)]
    return "\n".join(out)


def grouped(entries: Iterable[Paper]) -> dict[str, list[Paper]]:
    """Papers by family, families and papers in order of their names."""
    out: dict[str, list[Paper]] = {}
    for entry in entries:
        out.setdefault(family(entry.where), []).append(entry)
    return {name: sorted(out[name], key=lambda e: e.title.lower()) for name in sorted(out)}


def mechanisms_index(entries: list[Paper]) -> str:
    """All mechanisms with their patterns and growth."""
    from attnlib.nn.registry import find, list_mechanisms

    rows = []
    for name in list_mechanisms():
        cls: Any = find(name)
        traits = cls.class_traits
        patterns = ", ".join(sorted(traits.patterns))
        ranks = ", ".join(map(str, sorted(traits.grid_ranks)))
        said = text.summary(inspect.getdoc(cls) or "")
        rows.append([f"[`{name}`]({name}.md)", cell(said), cell(patterns), ranks, cell(told(traits.work)),
                     "yes" if traits.streaming else ""])  # fmt: skip
    fusions, pools = (
        [
            [f"[`{name}`]({name}.md)", cell(text.summary(inspect.getdoc(find(name)) or ""))]
            for name in list_mechanisms(k)
        ]
        for k in ("fusion", "pool")
    )
    return "\n".join([
        "# Mechanisms\n",
        "Every name that `attnlib.create` builds, with the upper bounds of its claims; each page has them all.\n",
        table(["name", "", "patterns", "grid ranks", "work", "streams"], rows),
        "## Fusions of several streams\n", table(["name", ""], fusions),
        "## Pools of tokens\n", table(["name", ""], pools),
    ])  # fmt: skip
