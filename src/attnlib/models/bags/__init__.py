"""Bags: many instances, one answer. Slides of patches, patients of slides and genes."""
