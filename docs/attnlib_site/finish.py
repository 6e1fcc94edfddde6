"""After the generator: what it would load from elsewhere is replaced, and every link is followed.

Needs nothing but the standard library: ``python -m attnlib_site.finish SITE``.
"""

from __future__ import annotations

import posixpath
import re
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

#: Attributes through which a browser loads something by itself.
LOADS = {
    "script": ("src",), "img": ("src", "srcset"), "iframe": ("src",), "source": ("src", "srcset"), "embed": ("src",),
    "video": ("src", "poster"), "audio": ("src",), "object": ("data",), "image": ("href", "xlink:href"),
    "use": ("href", "xlink:href"),
}  # fmt: skip

#: Kinds of ``<link>`` that load or connect.
LINKS = {
    "stylesheet",
    "icon",
    "preload",
    "prefetch",
    "preconnect",
    "dns-prefetch",
    "manifest",
    "modulepreload",
    "shortcut",
}

#: The generator's stand-in for workers on pages that are opened as files; ours is ``worker.js``.
SHIM = re.compile(r'<script src="https://unpkg\.com/iframe-worker/shim"[^>]*></script>')


@dataclass
class Page(HTMLParser):
    """What a page loads, where its links lead, and its anchors."""

    loads: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note one element."""
        values = {key: value or "" for key, value in attrs}
        self.anchors |= {values[key] for key in ("id", "name") if key in values}
        for key in LOADS.get(tag, ()):
            if key in values:
                parts = values[key].split(",") if key == "srcset" else [values[key]]
                self.loads += [p.split()[0] for p in parts if p.strip()]
        if tag == "link" and LINKS & set(values.get("rel", "").split()):
            self.loads.append(values.get("href", ""))
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        self.loads += [u for u in re.findall(r"url\(['\"]?([^'\")]+)", values.get("style", "")) if u[0] != "#"]


def read(text: str) -> Page:
    """A page as it is read."""
    page = Page()
    page.feed(text)
    return page


def foreign(address: str) -> bool:
    """Whether an address leads to another place.

    >>> foreign("https://cdn.example/a"), foreign("//cdn.example/a"), foreign("../a.js"), foreign("data:image/png,")
    (True, True, False, False)
    """
    return address.startswith("//") or urlsplit(address).scheme in ("http", "https", "ws", "wss", "ftp")


def localise(site: Path) -> int:
    """Put our worker in place of the one that would be loaded from elsewhere; give the number of pages changed."""
    changed = 0
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        up = "../" * (len(path.relative_to(site).parts) - 1) or "./"
        new = SHIM.sub(f'<script src="{up}worker.js"></script>', text)
        if new != text:
            path.write_text(new, encoding="utf-8")
            changed += 1
    return changed


def problems(site: Path) -> list[str]:
    """Everything that would be loaded from elsewhere, and every link that leads nowhere."""
    found: list[str] = []
    pages = {p.relative_to(site).as_posix(): read(p.read_text(encoding="utf-8")) for p in sorted(site.rglob("*.html"))}
    for where, page in pages.items():
        found += [f"{where} loads {address}" for address in page.loads if foreign(address)]
        for address in (*page.loads, *page.links):
            parts = urlsplit(address)
            if parts.scheme or parts.netloc or where == "404.html":
                continue
            target = (
                posixpath.normpath(posixpath.join(posixpath.dirname(where), unquote(parts.path)))
                if parts.path
                else where
            )
            if (site / target).is_dir():
                target = posixpath.join(target, "index.html")
            if not (site / target).is_file():
                found.append(f"{where} leads to {address}, which is not there")
            elif (
                parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors | {"__skip"}
            ):
                found.append(f"{where} leads to {address}, and there is no such heading")
    for path in sorted(site.rglob("*.css")):
        text = path.read_text(encoding="utf-8")
        for address in re.findall(r"url\(['\"]?([^'\")]+)", text) + re.findall(r"@import\s+['\"]([^'\"]+)", text):
            if foreign(address):
                found.append(f"{path.relative_to(site)} loads {address}")
    return found


def main() -> None:
    """Finish a site; exit code 1 where a link leads nowhere or something is loaded from elsewhere."""
    site = Path(sys.argv[1])
    localise(site)
    found = problems(site)
    count = sum(1 for _ in site.rglob("*.html"))
    sys.stdout.write(
        "\n".join(found) + f"{chr(10) if found else ''}{count} pages, {len(found)} problems: {site}/index.html\n"
    )
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
