"""Models from images to images: super-resolution and restoration."""
