"""Weights that a user names: what they are, and what goes with them."""
