"""Sampled keys: every query reads a few predicted points of a feature map."""
