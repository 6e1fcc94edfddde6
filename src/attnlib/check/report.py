"""What the kit found: one finding per claim, printable and as JSON."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, field
from typing import Any

STYLES = {"pass": "green", "fail": "bold red", "skip": "dim"}


@dataclass(frozen=True)
class Finding:
    """The verdict on one claim.

    Args:
        claim: name of the claim, see :data:`attnlib.check.CLAIMS`.
        status: ``"pass"``, ``"fail"``, or ``"skip"`` when nothing is claimed.
        why: what was seen.
        measured: the figure behind the verdict, where there is one.
        limit: what ``measured`` was held against.
        loose: the claim holds but promises far less than what was measured.
        seconds: time it took.
    """

    claim: str
    status: str
    why: str
    measured: float | None = None
    limit: float | None = None
    loose: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """All findings on one mechanism; prints as a table.

    >>> Report("mine", {"dim": 8}, (4,), [Finding("causality", "fail", "reads token 3")]).ok
    False
    """

    target: str
    config: dict[str, Any]
    grid: tuple[int, ...]
    findings: list[Finding]
    claims: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def ok(self) -> bool:
        """No claim was refuted."""
        return not self.failed

    @property
    def failed(self) -> list[Finding]:
        """The refuted claims."""
        return [f for f in self.findings if f.status == "fail"]

    @property
    def seconds(self) -> float:
        """Time of the whole check."""
        return sum(f.seconds for f in self.findings)

    def __getitem__(self, claim: str) -> Finding:
        for finding in self.findings:
            if finding.claim == claim:
                return finding
        raise KeyError(f"no finding on {claim!r}; there are {[f.claim for f in self.findings]}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plain = (int, float, str, bool, type(None))
        return {
            "target": self.target,
            "config": {k: v if isinstance(v, plain) else str(v) for k, v in self.config.items()},
            "grid": list(self.grid),
            "ok": self.ok,
            "seconds": round(self.seconds, 3),
            "claims": self.claims,
            "note": self.note,
            "findings": [asdict(f) for f in self.findings],
        }

    def summary(self) -> str:
        """One line."""
        count = {s: sum(f.status == s for f in self.findings) for s in STYLES}
        verdict = "keeps its claims" if self.ok else f"breaks {', '.join(f.claim for f in self.failed)}"
        return (
            f"{self.target} {verdict}: {count['pass']} passed, {count['fail']} failed, "
            f"{count['skip']} of {len(self.findings)} claims not tested, {self.seconds:.1f} s"
        )

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        settings = ", ".join(f"{k}={v}" for k, v in self.config.items())
        table = Table(title=f"{self.target}({settings}) on {self.grid}", title_justify="left")
        table.add_column("claim", no_wrap=True)
        table.add_column("verdict", no_wrap=True)
        table.add_column("measured", justify="right", no_wrap=True)
        table.add_column("what was seen", overflow="fold")
        for f in self.findings:
            verdict = {"skip": "not claimed"}.get(f.status, f.status) + (" (loose)" if f.loose else "")
            measured = "" if f.measured is None else f"{f.measured:.3g}"
            table.add_row(f.claim, Text(verdict, STYLES[f.status]), measured, Text(f.why))
        end = Text(self.summary(), STYLES["pass" if self.ok else "fail"])
        return Group(table, end, Text(self.note)) if self.note else Group(table, end)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=120, force_terminal=False)
        console.print(self)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()
