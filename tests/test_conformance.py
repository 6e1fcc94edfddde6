"""Every mechanism of the table is held to every claim it makes."""

import pytest
from table import rows

from attnlib.check import Case, check

#: One row of each name is exported at a free size too.
FIRST = {row.name: row.id for row in reversed(list(rows()))}.values()


@pytest.mark.parametrize("case", [pytest.param(row, id=row.id) for row in rows()])
def test_conformance(case: Case) -> None:
    report = check(case, brief=case.id not in FIRST)
    assert report.ok, "\n" + "\n".join(f"{f.claim}: {f.why}" for f in report.failed)
    # Refusing half precision by name breaks no claim, but none of ours does.
    assert report["bfloat16"].status == "pass", report["bfloat16"].why
