"""Vision backbones: stages, and one short file of settings per family."""
