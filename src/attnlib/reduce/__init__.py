"""Removing tokens from the sequence inside pretrained models: a scorer, a selector, a merger, a schedule."""
