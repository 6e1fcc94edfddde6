"""Mechanisms whose queries read a few summaries of the tokens: engine D."""
