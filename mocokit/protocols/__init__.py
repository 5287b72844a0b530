"""Protocols that measure a backbone. They read weights and never change training state."""
