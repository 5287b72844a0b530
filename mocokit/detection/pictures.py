"""Pictures of detections: boxes beside the true boxes, and a bar for each class."""

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mocokit.data.decode import decode
from mocokit.detection.dataset import BoxDataset
from mocokit.detection.train import Outcome
from mocokit.protocols.voc_ap import Precisions

SHOWN_SCORE = 0.5
_CELL, _GAP, _LINE, _FONT = 360, 8, 18, 12
_PAPER, _INK, _GRID = (255, 255, 255), (30, 30, 30), (225, 225, 225)
Marks = list[tuple[Sequence[float], int, str]]  # box, class, label


def chosen(data: BoxDataset, tested: Outcome, count: int) -> list[int]:
    """The numbers of `count` readable test images, evenly spaced."""
    good = [number for number in range(len(data.samples)) if number not in tested.bad]
    places = np.linspace(0, len(good) - 1, min(count, len(good))).round().astype(int)
    return [good[place] for place in dict.fromkeys(places.tolist())]


def sheet(data: BoxDataset, tested: Outcome, count: int) -> Image.Image:
    """A row for each image: the true boxes on the left, the detections on the right."""
    rows = []
    for number in chosen(data, tested, count):
        sample = data.samples[number]
        picture = Image.fromarray(decode(sample.path, None, sample.top))
        truth: Marks = [
            (box, int(label), data.classes[label] + (" (difficult)" if difficult else ""))
            for box, label, difficult in zip(
                sample.boxes.tolist(), sample.labels, sample.difficult, strict=True
            )
        ]
        found: Marks = [
            (one.box, label, f"{data.classes[label]} {one.score:.2f}")
            for label, some in enumerate(tested.detections)
            for one in some
            if one.image == number and one.score >= SHOWN_SCORE
        ]
        rows.append((sample.name, _marked(picture, truth), _marked(picture, found)))
    height = _LINE + sum(max(a.height, b.height) + _LINE + _GAP for _, a, b in rows) + _GAP
    image = Image.new("RGB", (2 * _CELL + 3 * _GAP, height), _PAPER)
    pen, font, top = ImageDraw.Draw(image), ImageFont.load_default(_FONT), _LINE + _GAP
    pen.text((_GAP, 3), "true boxes", fill=_INK, font=font)
    pen.text((_CELL + 2 * _GAP, 3), f"found, score {SHOWN_SCORE:g} or more", fill=_INK, font=font)
    for name, left, right in rows:
        image.paste(left, (_GAP, top))
        image.paste(right, (_CELL + 2 * _GAP, top))
        top += max(left.height, right.height)
        pen.text((_GAP, top + 2), name, fill=_INK, font=font)
        top += _LINE + _GAP
    return image


def _marked(picture: Image.Image, marks: Marks) -> Image.Image:
    scale = _CELL / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    small = picture.resize(size, Image.Resampling.LANCZOS)
    pen, font = ImageDraw.Draw(small), ImageFont.load_default(_FONT)
    for box, label, text in marks:
        left, top, right, bottom = (value * scale for value in box)
        colour = _colour(label)
        place = (left, top, max(right - 1, left + 1), max(bottom - 1, top + 1))
        pen.rectangle(place, outline=colour, width=2)
        at = (max(0.0, left + 2), max(0.0, top - _FONT - 2 if top > _FONT + 2 else top + 2))
        pen.rectangle(pen.textbbox(at, text, font=font), fill=colour)
        pen.text(at, text, fill=_PAPER, font=font)
    return small


def _colour(label: int) -> tuple[int, int, int]:
    """Hues spaced by the golden ratio, dark enough for white letters."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.85, 0.75)
    return round(255 * red), round(255 * green), round(255 * blue)


def bars(scores: Precisions, title: str) -> Image.Image:
    """A bar of the AP50 of each class, with a darker bar of its AP inside."""
    names = max([len(name) for name in scores.classes] + [8]) * 7
    wide, row = 400, _LINE + 4
    image = Image.new("RGB", (names + wide + 100, (len(scores.classes) + 2) * row), _PAPER)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(_FONT)
    pen.text((_GAP, 4), f"{title}: AP50 (light) and AP (dark), percent", fill=_INK, font=font)
    for mark in range(0, 101, 20):
        across = names + wide * mark / 100
        pen.line((across, row, across, image.height - row), fill=_GRID)
        pen.text((across - 6, image.height - row + 3), str(mark), fill=_INK, font=font)
    for at, name in enumerate(scores.classes):
        top = (at + 1) * row
        pen.text((_GAP, top + 3), name, fill=_INK, font=font)
        if not scores.wanted[at]:
            pen.text((names + 2, top + 3), "none in the test images", fill=_INK, font=font)
            continue
        ap50, ap = float(scores.values[at, 0]), float(scores.values[at].mean())
        pen.rectangle((names, top + 3, names + wide * ap50, top + row - 4), fill=(160, 190, 230))
        pen.rectangle((names, top + 7, names + wide * ap, top + row - 8), fill=(40, 80, 150))
        text = f"{100 * ap50:.1f} / {100 * ap:.1f}"
        pen.text((names + wide * ap50 + 4, top + 3), text, fill=_INK, font=font)
    return image
