"""Where images lie: each kind of place is a source, as data/source.py asks."""
