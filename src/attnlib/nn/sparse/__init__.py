"""Mechanisms that read chosen keys: engine C."""
