"""The contact sheet: what the first epoch does to a few images, drawn as a picture to look at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from mocokit.views.params import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    RANDOM_OPERATIONS,
    SATURATION,
    Table,
    ViewSpec,
    draw_table,
    seen_share,
)
from mocokit.views.views import evaluation_views, make_views

SIGNATURE = b"mocokit contact sheet"  # by which a later sheet knows that it may take its place
_MOST = 8
_CELL = (128, 256)  # smallest and largest side of a picture on the sheet
_GAP, _TITLE, _LINE, _FONT = 12, 30, 15, 12
_PAPER, _INK, _FAINT = "#fcfcfa", "#202428", "#70767c"
_COLOURS = ("#c2410c", "#1d4ed8", "#15803d")  # of the first, the second and all other views
_JITTER_LETTERS = {BRIGHTNESS: "b", CONTRAST: "c", SATURATION: "s", HUE: "h"}

Levels = NDArray[np.uint8]


def contact_sheet(
    specs: Mapping[str, ViewSpec],
    canvases: Sequence[Levels],
    index: Sequence[int],
    seed: int,
    path: str | Path | IO[bytes],
    columns: int = 2,
    scored: ViewSpec | None = None,
    kind: str | None = None,
) -> None:
    """Write each image beside its views in epoch 0, at most 8 images.

    specs: how each view is made, by name; canvases: (H, W, 3) each; index: their stable numbers;
    `columns` images are side by side. The boxes of the crops are outlined on the image. `scored`
    adds the view of which scores are taken. `kind` is Pillow's name of the file's format, by
    default the one of the path's ending.
    """
    if not canvases:
        raise ValueError("a contact sheet needs at least one image")
    canvases, index = canvases[:_MOST], index[:_MOST]
    drawn = [_draw(spec, canvases, index, seed, view) for view, spec in enumerate(specs.values())]
    size = max(spec.size for spec in specs.values())
    last = [] if scored is None else [("scored", _INK)]
    sheet = _Sheet.blank(size, len(canvases), columns, len(specs) + len(last))
    colours = [(name, _colour(view)) for view, name in enumerate(specs)]
    sheet.header(f"{_named(specs)}, epoch 0, seed {seed}", [*colours, *last])
    for place, canvas in enumerate(canvases):
        boxes = [table.boxes[place] for table, _ in drawn]
        original = _outlined(canvas, boxes, sheet.cell)
        height, width = canvas.shape[:2]
        sheet.put(place, 0, original, [f"image {index[place]}", f"{width}x{height}"], _INK)
        for view, (spec, (table, pictures)) in enumerate(zip(specs.values(), drawn, strict=True)):
            picture, text = _fit(pictures[place], sheet.cell), _caption(spec, table, place)
            sheet.put(place, 1 + view, picture, text, _colour(view))
        if scored is not None:
            picture = _fit(_scored(scored, canvas), sheet.cell)
            sheet.put(place, 1 + len(specs), picture, _seen(scored, height, width), _INK)
    sheet.image.save(path, kind, pnginfo=_signed(), comment=SIGNATURE)


def is_sheet(content: bytes) -> bool:
    """Whether this is a contact sheet, as a PNG or a JPEG."""
    return content[:3] in (b"\x89PN", b"\xff\xd8\xff") and SIGNATURE in content[:1000]


def _signed() -> PngInfo:
    info = PngInfo()
    info.add_text("Software", SIGNATURE.decode())
    return info


def _named(specs: Mapping[str, ViewSpec]) -> str:
    """query (view 0) and key (view 1)"""
    words = [f"{name} (view {view})" for view, name in enumerate(specs)]
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else words[0]


def _colour(view: int) -> str:
    return _COLOURS[min(view, len(_COLOURS) - 1)]


def _draw(
    spec: ViewSpec, canvases: Sequence[Levels], index: Sequence[int], seed: int, view: int
) -> tuple[Table, Levels]:
    """Of one view the table and the pictures (N, size, size, 3)."""
    heights, widths = np.array([canvas.shape[:2] for canvas in canvases], np.int64).T
    flat = torch.from_numpy(np.concatenate([canvas.reshape(-1) for canvas in canvases]))
    table = draw_table(spec, seed, 0, index, view, heights, widths)
    return table, _levels(spec, make_views(spec, table, flat, heights, widths, "cpu"))


def _scored(spec: ViewSpec, canvas: Levels) -> Levels:
    """(size, size, 3): what a score sees of an image."""
    height, width = (np.array([side], np.int64) for side in canvas.shape[:2])
    flat = torch.from_numpy(canvas.reshape(-1))
    seen: Levels = _levels(spec, evaluation_views(spec, flat, height, width, "cpu"))[0]
    return seen


def _seen(spec: ViewSpec, height: int, width: int) -> list[str]:
    """Its caption."""
    share = seen_share(spec, height, width)
    return [f"centre {spec.size} of {spec.resize}", f"{share:.0%} of the image"]


def _levels(spec: ViewSpec, views: Tensor) -> Levels:
    """Views (N, 3, S, S) as pixels (N, S, S, 3)."""
    levels = views.permute(0, 2, 3, 1) * torch.tensor(spec.std) + torch.tensor(spec.mean)
    return (levels * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def _caption(spec: ViewSpec, table: Table, row: int) -> list[str]:
    """What was drawn for one view, in applied order, on two lines."""
    height, width = table.boxes[row, 2:]
    factors = (table.brightness, table.contrast, table.saturation, table.hue)
    steps = [f"{_JITTER_LETTERS[step]}{factors[step][row]:.2f}" for step in table.order[row]]
    words = {
        "crop": f"crop {width}x{height}",
        "flip": "flip" if table.flip[row] else "",
        "jitter": "jitter " + " ".join(steps) if table.jitter[row] else "",
        "grayscale": "gray" if table.grayscale[row] else "",
        "blur": f"blur {table.sigma[row]:.2f}" if table.sigma[row] else "",
        "randaugment": " + ".join(_random_words(table.randaugment[row])),
        "solarize": "solarize" if table.solarize[row] else "",
    }
    # Jitter is as long as all others together, so it has the second line to itself.
    others = [words[operation] for operation in spec.order if operation != "jitter"]
    return [" | ".join(word for word in others if word), words["jitter"]]


def _random_words(drawn: NDArray[np.void]) -> list[str]:
    applied = [one for one in drawn if one["operation"] >= 0]
    names = [RANDOM_OPERATIONS[one["operation"]] for one in applied]
    plain = ("autocontrast", "equalize", "invert")  # what has no argument
    return [
        name if name in plain else f"{name} {one['amount']:.4g}"
        for name, one in zip(names, applied, strict=True)
    ]


def _fit(levels: Levels, cell: int) -> Image.Image:
    """A picture as large as fits the cell; small ones keep their pixels visible."""
    picture = Image.fromarray(levels)
    scale = cell / max(picture.size)
    size = [max(1, round(side * scale)) for side in picture.size]
    kind = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    return picture.resize((size[0], size[1]), kind)


def _outlined(canvas: Levels, boxes: Sequence[NDArray[np.int64]], cell: int) -> Image.Image:
    picture = _fit(canvas, cell)
    draw = ImageDraw.Draw(picture)
    scale = cell / max(canvas.shape[:2])
    for view, box in enumerate(boxes):
        top, left, height, width = (float(side) * scale for side in box)
        right, bottom = left + max(width - 1, 1), top + max(height - 1, 1)
        draw.rectangle((left, top, right, bottom), outline=_colour(view), width=2)
    return picture


@dataclass(frozen=True)
class _Sheet:
    """Blocks of an image and its views with two lines of text below each, under a title."""

    image: Image.Image
    cell: int
    columns: int
    views: int

    @classmethod
    def blank(cls, size: int, count: int, columns: int, views: int) -> "_Sheet":
        small, large = _CELL
        cell = size if small <= size <= large else large
        if size < small:
            cell = size * max(2, round(1.25 * small / size))
        columns = max(1, min(columns, count))
        lines = -(-count // columns)
        across = columns * ((1 + views) * (cell + _GAP) + _GAP) + _GAP
        down = 2 * _TITLE + lines * (cell + 2 * _LINE + _GAP)
        return cls(Image.new("RGB", (across, down), _PAPER), cell, columns, views)

    def header(self, title: str, names: Sequence[tuple[str, str]]) -> None:
        """The title, and over each block what its pictures are: (name, colour) of each view."""
        draw = ImageDraw.Draw(self.image)
        draw.text((_GAP, 8), title, fill=_INK, font=ImageFont.load_default(_FONT + 3))
        for block in range(self.columns):
            over = [("image", _INK), *names]
            for cell, (name, colour) in enumerate(over):
                left, _ = self._corner(block, cell)
                font = ImageFont.load_default(_FONT + 1)
                draw.text((left, 2 * _TITLE - 20), name, fill=colour, font=font)

    def put(
        self, place: int, cell: int, picture: Image.Image, lines: Sequence[str], colour: str
    ) -> None:
        """A picture and its caption, cut where the cell ends."""
        left, top = self._corner(place, cell)
        self.image.paste(picture, (left, top))
        text = Image.new("RGB", (self.cell + _GAP - 2, 2 * _LINE), _PAPER)
        draw = ImageDraw.Draw(text)
        for number, line in enumerate(lines):
            shade = colour if number == 0 else _FAINT
            font = _font(line, text.width)
            draw.text((0, number * _LINE + 1), line, fill=shade, font=font)
        self.image.paste(text, (left, top + self.cell + 1))

    def _corner(self, place: int, cell: int) -> tuple[int, int]:
        block = place % self.columns
        wide = (1 + self.views) * (self.cell + _GAP) + _GAP
        left = _GAP + block * wide + cell * (self.cell + _GAP)
        return left, 2 * _TITLE + place // self.columns * (self.cell + 2 * _LINE + _GAP)


def _font(line: str, width: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The largest font, down to 8 points, in which the line fits the width."""
    for points in range(_FONT, 8, -1):
        font = ImageFont.load_default(points)
        if font.getlength(line) <= width:
            return font
    return ImageFont.load_default(8)
