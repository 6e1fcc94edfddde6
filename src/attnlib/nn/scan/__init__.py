"""Selective scans: along routes through a map, along channels."""
