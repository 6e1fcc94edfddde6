"""Operators on ``(q, k, v)``: an eager specification and faster backends for each."""

from .attention import BACKENDS, attention, attention_partial, explain, use_backend

__all__ = ["BACKENDS", "attention", "attention_partial", "explain", "use_backend"]
