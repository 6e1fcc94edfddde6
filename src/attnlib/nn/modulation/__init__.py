"""Modulation: aggregate a context first, then let it act on the query by multiplication."""
