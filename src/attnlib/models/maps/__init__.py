"""Maps of roads: what a coarse map knows beforehand, for whoever looks from above."""
