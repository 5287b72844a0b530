"""A text file that lists images: one path a line, and a class behind a tab if there is one.

With nothing behind the tab an image is unlabelled.
"""

import os
from pathlib import Path
from unicodedata import category

import numpy as np

from mocokit.data.names import Names, short_name
from mocokit.data.source import UNLABELLED
from mocokit.data.sources.folder import IMAGES, FolderSource, Labels
from mocokit.data.walk import has_ending
from mocokit.errors import UserError
from mocokit.files import printable, read_regular, reason_of, show

ENDINGS = (".txt", ".lst", ".list", ".tsv")

LOOKED_AT = 100  # lines, one of which must name a file, or end as an image's name does


def open_listing(path: Path, labels: Labels) -> FolderSource:
    """The images that a list names, relative to the list's own folder; line i is image i."""
    if labels == "folders":
        remedy = "write the class behind a tab, and set auto"
        raise UserError(f"data.labels=folders needs a folder, but {show(path)} is a list: {remedy}")
    try:
        content = read_regular(path)
    except OSError as error:
        raise UserError(
            f"the list {show(path)} cannot be read ({printable(reason_of(error))})"
        ) from error
    if b"\0" in content[:4096]:
        raise UserError(f"{show(path)} is no list of image files: it is no text")
    lines = [line for line in content.removeprefix(b"\xef\xbb\xbf").splitlines() if line.strip()]
    split = (line.partition(b"\t") for line in lines)
    pairs = [(_plain(path.parent, name), tab, label) for name, tab, label in split]
    pairs = [pair for pair in pairs if pair[0]]
    if not pairs:
        raise UserError(f"the list {show(path)} is empty: write one path a line")
    if not any(_names_a_file(path.parent, name) for name, _, _ in pairs[:LOOKED_AT]):
        first = show(os.fsdecode(pairs[0][0]))[:60]
        what = f"{show(path)} is no list of image files: none is called {first!r}, its first line"
        raise UserError(f"{what}; write one path a line")
    names = Names.of([name for name, _, _ in pairs])
    tabs = sum(bool(tab) for _, tab, _ in pairs)
    name = short_name(path.stem)
    if not tabs or labels == "none":
        return FolderSource(path.parent, names, None, (), name)
    if tabs < len(pairs):
        missing = show(os.fsdecode(next(name for name, tab, _ in pairs if not tab)))
        remedy = "write one behind a tab, or set data.labels=none"
        raise UserError(f"{missing} in the list {show(path)} has no class: {remedy}")
    written = [label.strip() for _, _, label in pairs]
    _check_alike(path, pairs, written)
    blank = {text for text in set(written) if _is_blank(text)}
    order = sorted(
        set(written) - blank, key=lambda text: (len(text) if text.isdigit() else 0, text)
    )
    classes = tuple(printable(os.fsdecode(text)) for text in order)
    numbers = {text: number for number, text in enumerate(order)}
    numbers |= dict.fromkeys(blank, UNLABELLED)
    found = np.fromiter((numbers[text] for text in written), np.int64, len(written))
    source = FolderSource(path.parent, names, found if order else None, classes, name)
    if without := int((found == UNLABELLED).sum()):
        what = f"{without:,} of {len(found):,} images have nothing behind the tab"
        source.notes = (f"{what}: they are trained on without a class, and not scored",)
    return source


def _check_alike(path: Path, pairs: list[tuple[bytes, bytes, bytes]], written: list[bytes]) -> None:
    """Raises UserError for a file that is listed twice, with two classes."""
    known: dict[bytes, bytes] = {}
    for (name, _, _), label in zip(pairs, written, strict=True):
        if known.setdefault(name, label) != label:
            both = " and ".join(show(os.fsdecode(text)) or "none" for text in (known[name], label))
            raise UserError(
                f"{show(os.fsdecode(name))} in the list {show(path)} has two classes, {both}: keep "
                "one of its lines, or set data.labels=none"
            )


def _is_blank(label: bytes) -> bool:
    """Whether nobody would see it: spaces of any kind, and characters without a shape."""
    return all(one.isspace() or category(one) in ("Cc", "Cf") for one in os.fsdecode(label))


def _plain(root: Path, name: bytes) -> bytes:
    """A name as a person meant it: without spaces around it and with ~ known; a comment is none."""
    if name[:1] not in b"#~" and name == name.strip():
        return name
    if os.path.lexists(os.path.join(os.fsencode(root), name)):
        return name
    meant = os.path.expanduser(name.strip())
    return b"" if meant.startswith(b"#") else meant


def _names_a_file(root: Path, name: bytes) -> bool:
    if has_ending(name, IMAGES):
        return True
    try:
        return (root / os.fsdecode(name)).is_file()
    except (OSError, ValueError):
        return False
