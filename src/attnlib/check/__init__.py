"""Conformance: every claim in the traits, tested."""

from .case import Case

__all__ = ["Case"]
