"""Grid-local attention: a window around every token (engine A)."""
