"""Longer measurements, each of one question."""
