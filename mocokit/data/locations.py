"""Texts that name images: a path, a pattern of paths, a well-known set, several joined by `::`.

Needs no heavy import, so that a mistake in a command is reported at once.
"""

import difflib
import glob
import os
import re
from itertools import islice

from mocokit.errors import UserError

NAMED = ("cifar10", "cifar100", "stl10", "imagenette", "imagenet", "voc")
HUB = "hub:"  # before the name of a set of Hugging Face
_EMPTY = "nothing stands before or after a `::`: give a place on both sides, or leave it out"
_MOST = 1_000_000  # paths that a pattern may stand for
_INNERMOST = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def split(text: str) -> list[str]:
    """The places that a text names, in order; what exists as it is written is one place."""
    if _there(text):
        return [text]
    parts = text.split("::")
    if "" in parts:
        raise UserError(_EMPTY if len(parts) > 1 else "there is no file or folder without a name")
    return [place for part in parts for place in _matching(part)]


def exist(text: str) -> bool:
    """Whether a text names anything that can be looked at."""
    return bool(text) and all(
        is_elsewhere(part) or any(map(_there, _matching(part)))
        for part in ([text] if _there(text) else text.split("::"))
    )


def lacking(text: str) -> str:
    """The sentence for a text that names nothing: what of it is not there, and the remedy."""
    parts = [text] if _there(text) else text.split("::")
    absent = (part for part in parts if not exist(part))
    part = next(absent, text)
    if not part:
        return _EMPTY
    return f"there is no file or folder {part}; {remedy(part)}"


def remedy(part: str) -> str:
    """What to do about a place that is not there."""
    inside = _INNERMOST.findall(part)
    ranges = [one for one in inside if ".." in one and not _RANGE.fullmatch(one)]
    if part.count("{") != part.count("}") or ranges:
        return "its braces name no range: write {000..146}, or {a,b} for a choice"
    if close := difflib.get_close_matches(part, NAMED, n=1, cutoff=0.7):
        return f"did you mean {close[0]}?"
    if os.path.dirname(part):
        return "give an existing path of images"
    return f"give an existing path of images, or one of {', '.join(NAMED)}"


def absolute(text: str) -> str:
    """The same places, named so that they are found from any folder."""
    parts = [text] if _there(text) else text.split("::")
    return "::".join(map(_from_anywhere, parts))


def _from_anywhere(part: str) -> str:
    if is_elsewhere(part):
        return part
    # A choice is expanded where it may be one of roots, and where `..` inside it leads up from it.
    parent = ".." in part.partition("{")[2].split("/")
    if (part.startswith("{") or parent) and not _there(part):
        return "::".join(os.path.abspath(os.path.expanduser(path)) for path in expand(part))
    return os.path.abspath(os.path.expanduser(part))


def is_elsewhere(place: str) -> bool:
    """Whether a place is the name of a set rather than a path; what lies here comes first."""
    return (place in NAMED or place.startswith(HUB)) and not _there(place)


def _there(path: str) -> bool:
    """False too for what cannot be looked up: a name too long, a folder that is closed to us."""
    try:
        return os.path.exists(os.path.expanduser(path))
    except (OSError, ValueError):
        return False


def _matching(pattern: str) -> list[str]:
    """What a pattern of {a,b}, {000..146}, * and ? stands for; a range keeps its leading zeros."""
    if _there(pattern) or is_elsewhere(pattern):
        return [pattern]
    found: list[str] = []
    for path in expand(pattern):
        stars = glob.has_magic(path) and not _there(path)
        found += sorted(glob.glob(os.path.expanduser(path))) if stars else [path]
    return list(dict.fromkeys(found))


def expand(pattern: str) -> list[str]:
    """The texts that a pattern of braces stands for, in order and each once."""
    texts = [pattern]
    while any(_INNERMOST.search(text) for text in texts):
        more = (one for text in texts for one in _first_expanded(text, pattern))
        texts = list(islice(more, _MOST + 1))
        if len(texts) > _MOST:
            raise UserError(f"{pattern} stands for more than {_MOST:,} paths: narrow it")
    return list(dict.fromkeys(texts))


def _first_expanded(text: str, pattern: str) -> list[str]:
    match = _INNERMOST.search(text)
    if match is None:
        return [text]
    before, after = text[: match.start()], text[match.end() :]
    return [f"{before}{choice}{after}" for choice in _choices(match[1], pattern)]


def _choices(inside: str, pattern: str) -> list[str]:
    if match := _RANGE.fullmatch(inside):
        first, last = int(match[1]), int(match[2])
        if last < first or last - first >= _MOST:
            remedy = "write {first..last} with first <= last"
            raise UserError(f"{{{inside}}} in {pattern} is no range of numbers: {remedy}")
        return [f"{number:0{len(match[1])}d}" for number in range(first, last + 1)]
    return inside.split(",")
