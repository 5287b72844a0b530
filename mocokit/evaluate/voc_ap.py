"""Average precision by its public name; it lives in protocols/voc_ap.py."""

from mocokit.protocols.voc_ap import average_precision

__all__ = ["average_precision"]
