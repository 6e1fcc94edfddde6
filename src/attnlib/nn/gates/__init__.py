"""Gates: mechanisms whose output is the map times a gate, from strips, means and maps of single numbers."""
