"""Equations in TeX as MathML, when the site is built: ``python -m attnlib_site.maths PAGES``.

Browsers draw MathML by themselves, so that nothing has to be loaded. Needs ``latex2mathml`` (``constraints/docs.txt``).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

#: How a page holds an equation until then.
BLOCK = re.compile(r"^```math\n(.*?)\n```$", flags=re.S | re.M)


def fence(tex: str) -> str:
    """A block that :func:`render` finds."""
    return f"```math\n{tex}\n```\n"


def mathml(tex: str) -> str:
    r"""An equation as MathML on a line of its own.

    Raises:
        ValueError: a command that the converter does not know, which would be shown as it is written.
    """
    from latex2mathml.converter import convert

    text = convert(tex, display="block")
    if unknown := re.findall(r"\\[a-zA-Z]+", text):
        raise ValueError(f"{unknown} of {tex!r} cannot be rendered")
    return text


def render(page: str) -> str:
    """A page whose equations are MathML."""
    return BLOCK.sub(lambda m: f'<div class="equation" markdown="0">{mathml(m[1])}</div>', page)


def main() -> None:
    """Render every page of a folder in place."""
    count = 0
    for path in Path(sys.argv[1]).rglob("*.md"):
        text = path.read_text(encoding="utf-8")
        if "```math" in text:
            path.write_text(render(text), encoding="utf-8")
            count += len(BLOCK.findall(text))
    sys.stdout.write(f"{count} equations\n")


if __name__ == "__main__":
    main()
