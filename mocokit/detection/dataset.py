"""Images with boxes, in the layout of PASCAL VOC or COCO.

Annotations that cannot be used are named, counted and left out.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mocokit.data.decode import BadImage, look_at
from mocokit.detection.annotations import Annotated, BadAnnotation, read_xml
from mocokit.errors import UserError
from mocokit.files import printable, read_regular, reason_of, show

Style = Literal["voc", "coco"]
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
LISTS = {"train": ("trainval", "train"), "test": ("test", "val")}
_SHOWN = 200  # characters of a name or a reason
_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width


@dataclass(frozen=True)
class Sample:
    """An image and its boxes (k, 4), in pixels from 0, with right and lower ends outside."""

    name: str
    path: Path
    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    difficult: NDArray[np.bool_]  # COCO: a crowd
    top: int | None = None  # the level that becomes 255, in images of more than 8 bits


@dataclass(frozen=True)
class BoxDataset:
    """The training or test images, their classes, and the problems found in them."""

    name: str
    samples: tuple[Sample, ...]
    classes: tuple[str, ...]
    style: Style
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """A hash of names, boxes and classes, but not of pixels."""
        digest = hashlib.blake2b(repr((self.style, self.classes)).encode(), digest_size=16)
        for sample in self.samples:
            digest.update(f"{sample.name}\0{sample.labels.tolist()}".encode())
            digest.update(f"{sample.boxes.tolist()}{sample.difficult.tolist()}".encode())
        return digest.hexdigest()


@dataclass
class RawSample:
    """The annotations of an image, before classes are numbered."""

    name: str
    path: Path
    objects: list[Annotated]
    size: tuple[float, float] | None = None  # width and height as stated


@dataclass
class Problems:
    """Annotations and images that are left out, and the number found under another suffix."""

    found: list[str] = field(default_factory=list)
    renamed: int = 0

    def add(self, name: str, reason: str) -> None:
        """A stranger's text may be of any length, and there may be millions of them."""
        self.found.append(f"{printable(name[:_SHOWN])}: {printable(reason[:_SHOWN])}")

    def sorted(self) -> tuple[str, ...]:
        """The first of every kind before the second of any, so that each kind is among the named.

        Reasons of a kind end alike.
        """
        seen: Counter[str] = Counter()
        ranks = []
        for one in self.found:
            kind = " ".join(one.split()[-3:])
            ranks.append(seen[kind])
            seen[kind] += 1
        return tuple(self.found[at] for at in np.argsort(ranks, kind="stable").tolist())


Advance = Callable[[int], None]


def read_voc(
    folders: Sequence[tuple[Path, str]], problems: Problems, advance: Advance
) -> list[RawSample]:
    """The images of several lists: (a folder like VOC2007, a list in its ImageSets/Main)."""
    found = []
    for folder, name in folders:
        for identity in identities(folder, name):
            advance(1)
            label = printable(f"{folder.name}/{identity}")
            try:
                path = _image(folder / "JPEGImages", identity, problems)
                objects, reasons, size = read_xml(folder / "Annotations" / f"{identity}.xml")
            except BadAnnotation as error:
                problems.add(label, str(error))
                continue
            for reason in reasons:
                problems.add(label, reason)
            shifted = [
                one._replace(box=(one.box[0] - 1, one.box[1] - 1, one.box[2], one.box[3]))
                for one in objects
            ]
            found.append(RawSample(label, path, shifted, size))
    return found


def identities(folder: Path, name: str) -> list[str]:
    """The identifiers in a list, each once. Raises UserError."""
    path = folder / "ImageSets" / "Main" / f"{name}.txt"
    try:
        lines = read_regular(path).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = f"({printable(reason_of(error))}); it lists the images of {name}"
        raise UserError(f"{show(path)} cannot be read {why}") from None
    return list(dict.fromkeys(line.split()[0] for line in lines if line.strip()))


def inside(folder: Path, name: str) -> Path:
    """A file inside a folder. Raises BadAnnotation if its untrusted name leads out of it."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
        raise BadAnnotation("its name leads out of the folder, refused")
    return folder / pure


def is_file(path: Path) -> bool:
    """Whether there is such a file; a name that the system refuses is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def _image(folder: Path, identity: str, problems: Problems) -> Path:
    path = inside(folder, identity + IMAGE_SUFFIXES[0])
    if is_file(path):
        return path
    for suffix in IMAGE_SUFFIXES[1:]:
        other = path.with_name(path.name.removesuffix(IMAGE_SUFFIXES[0]) + suffix)
        if is_file(other):
            problems.renamed += 1
            return other
    raise BadAnnotation("there is no image of that name")


def class_names(raws: Iterable[RawSample]) -> tuple[str, ...]:
    """All class names that occur, in alphabetical order, like VOC's."""
    return tuple(sorted({one.name for raw in raws for one in raw.objects}))


def build(
    name: str,
    raws: list[RawSample],
    classes: tuple[str, ...],
    style: Style,
    problems: Problems,
    *,
    train: bool,
    top: int | None = None,
) -> BoxDataset:
    """Number the classes, read the header of each image, and leave out what cannot be used.

    As in detectron2, training leaves out crowds and images without boxes, and uses difficult boxes.
    Raises UserError if no image is left.
    """
    numbers = {one: number for number, one in enumerate(classes)}
    samples, empty, beyond = [], 0, 0
    for raw in raws:
        try:
            height, width = image_size(raw.path)
            if raw.size not in (None, (width, height)):
                assert raw.size is not None
                stated = f"{raw.size[0]:g} x {raw.size[1]:g} pixels are annotated"
                raise BadAnnotation(f"{stated}, but {width} x {height} is its image's size")
        except BadAnnotation as error:
            boxes = f"; its {len(raw.objects):,} boxes are left out too" if raw.objects else ""
            problems.add(raw.name, f"{error}{boxes}")
            continue
        good = []
        for one in raw.objects:
            reason = _fault(one, numbers, height, width)
            if reason:
                problems.add(raw.name, reason)
            elif not (train and style == "coco" and one.difficult):
                good.append(one)
                beyond += not _within(one, height, width)
        if train and not good:
            empty += 1
            continue
        samples.append(
            Sample(
                raw.name,
                raw.path,
                np.array([one.box for one in good], np.float64).reshape(-1, 4),
                np.array([numbers[one.name] for one in good], np.int64),
                np.array([one.difficult for one in good], bool),
                top,
            )
        )
    if not samples:
        first = problems.sorted()
        why = f"; {len(first):,} were left out, the first: {first[0]}" if first else ""
        raise UserError(f"{printable(name)} has no image with a usable annotation{why}")
    notes = []
    if empty:
        notes.append(f"{empty} images of {name} without a usable box are not trained on")
    if problems.renamed:
        notes.append(f"{problems.renamed} images of {name} were found under another suffix")
    if beyond:
        text = f"{beyond} boxes of {name} reach beyond their images by more than a pixel"
        if style == "coco" and 2 * beyond > sum(len(sample.boxes) for sample in samples):
            text += ": COCO's are left, top, width, height, in pixels"
        notes.append(text)
    return BoxDataset(name, tuple(samples), classes, style, problems.sorted(), tuple(notes))


def _fault(one: Annotated, numbers: dict[str, int], height: int, width: int) -> str | None:
    left, top, right, bottom = one.box
    if one.name not in numbers:
        return f"unknown class {one.name}"
    if not np.isfinite(one.box).all() or right <= left or bottom <= top:
        return f"{one.name} has a box without area"
    if right <= 0 or bottom <= 0 or left >= width or top >= height:
        return f"{one.name} has a box outside of the image"
    if right <= 1 and bottom <= 1 and min(height, width) > 2:
        return f"{one.name} has a box within one pixel, as if in shares of the image"
    return None


def _within(one: Annotated, height: int, width: int) -> bool:
    left, top, right, bottom = one.box
    return left >= -1 and top >= -1 and right <= width + 1 and bottom <= height + 1


def image_size(path: Path) -> tuple[int, int]:
    """Height and width as a viewer shows the image, from its header. Raises BadAnnotation."""
    try:
        with open(path, "rb") as file:
            look = look_at(file)
    except (OSError, BadImage) as error:
        raise BadAnnotation(
            f"its image cannot be read ({printable(reason_of(error)[:80])})"
        ) from None
    turned = look.orientation in _TURNED
    return (look.width, look.height) if turned else (look.height, look.width)
