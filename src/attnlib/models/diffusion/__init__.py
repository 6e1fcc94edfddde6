"""Models that denoise."""
