"""Dense prediction: a class for every pixel, from the maps of any backbone."""
