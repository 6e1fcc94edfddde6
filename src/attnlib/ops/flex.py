"""Backend under construction: serves nothing yet."""

from __future__ import annotations

from ._call import AttentionCall

NAME = "flex"


def supports(call: AttentionCall) -> str | None:
    """Why this backend cannot serve the call."""
    return "not built yet"
