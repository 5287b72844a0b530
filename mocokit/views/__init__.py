"""Pixels to views: canvases and a table of random parameters in, normalised batches out."""
