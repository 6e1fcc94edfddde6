"""Modules that join vision and language: projectors, composite attention, adapters."""
