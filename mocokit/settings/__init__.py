"""The settings of a run: declared, changed by dotted paths, and fitted to the data."""

from mocokit.settings.edit import (
    LABELS,
    difference,
    fields,
    flatten,
    from_yaml,
    get,
    identity,
    is_incidental,
    load,
    parse_assignments,
    replace,
    stated_in,
    to_yaml,
)

__all__ = [
    "LABELS",
    "difference",
    "fields",
    "flatten",
    "from_yaml",
    "get",
    "identity",
    "is_incidental",
    "load",
    "parse_assignments",
    "replace",
    "stated_in",
    "to_yaml",
]
