"""The command `mocokit`: its verbs parse, then import what they need."""

from mocokit.cli.app import main

__all__ = ["main"]
