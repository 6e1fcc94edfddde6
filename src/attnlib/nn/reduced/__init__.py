"""Reduced keys: queries read a short summary of the tokens."""
