"""Is a run well: what is measured on the way, without labels and with them, and the verdict."""
