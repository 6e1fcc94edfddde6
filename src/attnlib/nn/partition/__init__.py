"""Attention inside groups of tokens (engine B)."""
