"""A training run, from a command's words to its folder."""
