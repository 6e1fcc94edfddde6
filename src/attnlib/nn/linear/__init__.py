"""Linear attention: the order of products changed, so that cost grows with N."""
