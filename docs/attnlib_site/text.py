"""Docstrings as Markdown: paragraphs, literal blocks, arguments as lists, examples as code."""

from __future__ import annotations

import re
import textwrap

#: Headings of a docstring, and whether names stand before colons in what follows.
SECTIONS = {"Args": True, "Attributes": True, "Raises": True, "Returns": False, "Yields": False}


def inline(text: str) -> str:
    """Markup inside a line: roles and doubled backticks become code, words between stars stay so, nothing else is read.

    >>> inline(":func:`attach` gives ``y = a * b`` for a * b < c")
    '`attach` gives `y = a * b` for a \\\\* b &lt; c'
    """
    text = re.sub(r":[a-z:]+:`~?([^`<]*?)(?:\s*<[^`]*>)?`", r"``\1``", text)
    parts = re.split(r"(``.+?``|`[^`]+`)", text)
    return "".join(_code(p) if p.startswith("`") else _plain(p) for p in parts)


def _code(text: str) -> str:
    return f"`{text.strip('`').strip()}`"


def _plain(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("\\", "\\\\")
    text = re.sub(r"([|\[\]])", r"\\\1", text)
    return re.sub(r"(?<![\w*])(\*[A-Za-z][^*]*?[A-Za-z.]\*)(?![\w*])|\*", lambda m: m[1] or r"\*", text)


def cell(text: str) -> str:
    """One cell of a table: a pipe would end it, also inside code.

    >>> cell("``a | b``")
    '<code>a &#124; b</code>'
    """
    out = inline(re.sub(r"[ \t\n]+", " ", text.strip()))
    if "|" in out.replace("\\|", ""):
        out = re.sub(r"`([^`]*\|[^`]*)`", lambda m: f"<code>{_entities(m[1])}</code>", out)
    return out


def _entities(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table of cells that are Markdown already."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def fence(code: str, language: str = "text") -> str:
    """A block of code."""
    return f"```{language}\n{textwrap.dedent(code).strip(chr(10))}\n```\n"


def _blocks(lines: list[str]) -> list[list[str]]:
    """Runs of lines without an empty one in between."""
    out: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            out[-1].append(line)
        elif out[-1]:
            out.append([])
    return [b for b in out if b]


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _items(lines: list[str]) -> str:
    """``name: text`` entries, each with the deeper lines below it."""
    depth = min((_indent(x) for x in lines if x.strip()), default=0)
    found: list[str] = []
    for line in lines:
        if not line.strip():
            continue
        if _indent(line) == depth:
            found.append(line.strip())
        else:
            found[-1] += " " + line.strip()
    out = []
    for entry in found:
        name, colon, rest = entry.partition(": ")
        known = colon and len(name) < 90 and "`" not in name
        names = ", ".join(f"`{n.strip()}`" for n in name.split(",")) if known else ""
        out.append(f"- {names}: {inline(rest)}" if known else f"- {inline(entry)}")
    return "\n".join(out) + "\n"


def markdown(doc: str) -> str:
    """A docstring (as :func:`inspect.getdoc` gives it) as Markdown.

    >>> print(markdown("Say y::\\n\\n    y = x\\n\\nArgs:\\n    x: what\\n        is said."))
    Say y:
    <BLANKLINE>
    ```text
    y = x
    ```
    <BLANKLINE>
    **Args**
    <BLANKLINE>
    - `x`: what is said.
    <BLANKLINE>
    """
    lines = doc.splitlines()
    out: list[str] = []
    at = 0
    while at < len(lines):
        line = lines[at]
        if not line.strip():
            at += 1
            continue
        section = re.fullmatch(r"([A-Z][a-z]+):", line)
        if section and section[1] in SECTIONS:
            body, at = _below(lines, at + 1, 0)
            items = SECTIONS[section[1]]
            out += [f"**{section[1]}**\n", _items(body) if items else inline(" ".join(x.strip() for x in body)) + "\n"]
        elif line.lstrip().startswith(">>>"):
            end = at
            while end < len(lines) and lines[end].strip():
                end += 1
            out.append(fence("\n".join(lines[at:end]), "pycon"))
            at = end
        elif re.match(r"\s*([*-]|\d+\.) ", line):
            end = at
            while end < len(lines) and lines[end].strip() and not lines[end].lstrip().startswith(">>>"):
                end += 1
            out.append(_list(lines[at:end]))
            at = end
        else:
            end = at
            while end < len(lines) and lines[end].strip() and not lines[end].lstrip().startswith(">>>"):
                if end > at and re.match(r"\s*[*-] ", lines[end]):
                    break
                end += 1
            text = " ".join(x.strip() for x in lines[at:end])
            literal = text.endswith("::")
            text = text[:-1] if literal else text
            out.append(inline(text) + "\n")
            at = end
            if literal:
                body, at = _below(lines, at, _indent(line))
                if body:
                    out.append(fence("\n".join(body)))
    return "\n".join(out)


def _list(lines: list[str]) -> str:
    items: list[str] = []
    for line in lines:
        if match := re.match(r"\s*(?:[*-]|\d+\.) (.*)", line):
            items.append(match[1])
        else:
            items[-1] += " " + line.strip()
    return "\n".join(f"- {inline(item)}" for item in items) + "\n"


def _below(lines: list[str], at: int, depth: int) -> tuple[list[str], int]:
    """The lines from ``at`` that are deeper than ``depth``, and where they end."""
    end = at
    while end < len(lines) and (not lines[end].strip() or _indent(lines[end]) > depth):
        end += 1
    body = lines[at:end]
    while body and not body[-1].strip():
        body.pop()
    while body and not body[0].strip():
        body.pop(0)
    return body, end


def summary(doc: str) -> str:
    """The first sentence or line of a docstring, without its markup's colons."""
    first = _blocks(doc.splitlines())[0] if doc.strip() else [""]
    return " ".join(x.strip() for x in first).removesuffix("::")


def equations(doc: str) -> list[str]:
    """What a docstring writes as equations: literal blocks, and code with an equals sign before the arguments.

    >>> equations("``y = W x`` with ``W`` learnt.\\n\\nThen::\\n\\n    z = y^2\\n\\nArgs:\\n    a: ``b = 2``.")
    ['y = W x', 'z = y^2']
    """
    lines = doc.splitlines()
    stop = next((i for i, x in enumerate(lines) if re.fullmatch(r"[A-Z][a-z]+:", x)), len(lines))
    lines = lines[:stop]
    found: list[str] = []
    text: list[str] = []
    at = 0

    def spans() -> None:
        for code in re.findall(r"``(.+?)``", " ".join(x.strip() for x in text), flags=re.S):
            if re.search(r"[^=!<>\s] = |~ ", code) and not re.fullmatch(r"\w+ = [\w.]+", code):
                found.append(code)
        text.clear()

    while at < len(lines):
        text.append(lines[at])
        at += 1
        if text[-1].rstrip().endswith("::"):
            spans()
            body, at = _below(lines, at, _indent(lines[at - 1]))
            block = textwrap.dedent("\n".join(body))
            if re.search(r"[^=]=[^=]", block) and not re.search(r"^(import|from) ", block, flags=re.M):
                found.append(block)
    spans()
    return found
