"""Images with boxes, in the layout of PASCAL VOC or COCO.

Annotations that cannot be used are named, counted and left out.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mocokit.data.decode import BadImage, look_at
from mocokit.detection.annotations import Annotated, BadAnnotation, read_xml
from mocokit.errors import UserError
from mocokit.files import printable, reason_of

Style = Literal["voc", "coco"]
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
LISTS = {"train": ("trainval", "train"), "test": ("test", "val")}
_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width


@dataclass(frozen=True)
class Sample:
    """An image and its boxes (k, 4), in pixels from 0, with right and lower ends outside."""

    name: str
    path: Path
    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    difficult: NDArray[np.bool_]  # COCO: a crowd


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


@dataclass
class Problems:
    """Annotations and images that are left out, and the number found under another suffix."""

    found: list[str] = field(default_factory=list)
    renamed: int = 0

    def add(self, name: str, reason: str) -> None:
        self.found.append(f"{printable(name)}: {printable(reason)}")


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
                objects, reasons = read_xml(folder / "Annotations" / f"{identity}.xml")
            except BadAnnotation as error:
                problems.add(label, str(error))
                continue
            for reason in reasons:
                problems.add(label, reason)
            shifted = [
                one._replace(box=(one.box[0] - 1, one.box[1] - 1, one.box[2], one.box[3]))
                for one in objects
            ]
            found.append(RawSample(label, path, shifted))
    return found


def identities(folder: Path, name: str) -> list[str]:
    """The identifiers in a list, each once. Raises UserError."""
    path = folder / "ImageSets" / "Main" / f"{name}.txt"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); it lists the images of {name}") from None
    return list(dict.fromkeys(line.split()[0] for line in lines if line.strip()))


def inside(folder: Path, name: str) -> Path:
    """A file inside a folder. Raises BadAnnotation if its untrusted name leads out of it."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
        raise BadAnnotation("its name leads out of the folder, refused")
    return folder / pure


def _image(folder: Path, identity: str, problems: Problems) -> Path:
    path = inside(folder, identity + IMAGE_SUFFIXES[0])
    if path.is_file():
        return path
    for suffix in IMAGE_SUFFIXES[1:]:
        other = path.with_name(path.name.removesuffix(IMAGE_SUFFIXES[0]) + suffix)
        if other.is_file():
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
) -> BoxDataset:
    """Number the classes, read the header of each image, and leave out what cannot be used.

    As in detectron2, training leaves out crowds and images without boxes, and uses difficult boxes.
    Raises UserError if no image is left.
    """
    numbers = {one: number for number, one in enumerate(classes)}
    samples, empty = [], 0
    for raw in raws:
        try:
            height, width = image_size(raw.path)
        except BadAnnotation as error:
            problems.add(raw.name, str(error))
            continue
        good = []
        for one in raw.objects:
            reason = _fault(one, numbers, height, width)
            if reason:
                problems.add(raw.name, reason)
            elif not (train and style == "coco" and one.difficult):
                good.append(one)
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
            )
        )
    if not samples:
        first = f"; the first problem: {problems.found[0]}" if problems.found else ""
        raise UserError(f"{name} has no image with a usable annotation{first}")
    notes = []
    if empty:
        notes.append(f"{empty} images of {name} without a usable box are not trained on")
    if problems.renamed:
        notes.append(f"{problems.renamed} images of {name} were found under another suffix")
    return BoxDataset(name, tuple(samples), classes, style, tuple(problems.found), tuple(notes))


def _fault(one: Annotated, numbers: dict[str, int], height: int, width: int) -> str | None:
    left, top, right, bottom = one.box
    if one.name not in numbers:
        return f"unknown class {one.name}"
    if not np.isfinite(one.box).all() or right <= left or bottom <= top:
        return f"{one.name} has a box without area"
    if right <= 0 or bottom <= 0 or left >= width or top >= height:
        return f"{one.name} has a box outside of the image"
    return None


def image_size(path: Path) -> tuple[int, int]:
    """Height and width as a viewer shows the image, from its header. Raises BadAnnotation."""
    try:
        with open(path, "rb") as file:
            look = look_at(file)
    except (OSError, BadImage) as error:
        raise BadAnnotation(f"its image cannot be read ({reason_of(error)[:80]})") from None
    turned = look.orientation in _TURNED
    return (look.width, look.height) if turned else (look.height, look.width)
