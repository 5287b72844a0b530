"""The contact sheet shows the very views of the first epoch, and says what was drawn."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor, ImageDraw
from reference_views import cifar, flat, levels, picture, spec_of, v2

from mocokit.views import sheet
from mocokit.views.params import draw_table
from mocokit.views.sheet import contact_sheet
from mocokit.views.views import make_views


def canvases(*sizes):
    return [picture(*size, seed) for seed, size in enumerate(sizes)]


def read(path):
    with Image.open(path) as image:
        assert image.format == "PNG" and image.mode == "RGB"
        return np.asarray(image).astype(int)


def both(spec):
    return {"query": spec, "key": spec}


def contains(page, tile, tolerance=1):
    """Whether a tile stands somewhere on the page, found by its top left corner."""
    height, width = tile.shape[:2]
    corner = np.abs(page[: 1 - height or None, : 1 - width or None] - tile[0, 0]).max(-1)
    for top, left in np.argwhere(corner <= tolerance):
        if np.abs(page[top : top + height, left : left + width] - tile).max() <= tolerance:
            return True
    return False


@pytest.mark.parametrize("spec, zoom", [(cifar(), 5), (v2(64), 2), (v2(128), 1)])
def test_the_views_of_the_first_epoch_stand_on_the_sheet(spec, zoom, tmp_path):
    images = canvases((40, 50), (90, 70))
    contact_sheet(both(spec), images, [7, 3], 11, tmp_path / "views.png")
    page = read(tmp_path / "views.png")
    pixels, heights, widths = flat(images)
    for view in (0, 1):
        table = draw_table(spec, 11, 0, [7, 3], view, heights, widths)
        for tile in levels(spec, make_views(spec, table, pixels, heights, widths, "cpu")):
            large = tile.round().permute(1, 2, 0).numpy().repeat(zoom, 0).repeat(zoom, 1)
            assert contains(page, large.astype(int)), view
            assert not contains(page, 255 - large.astype(int))


@pytest.fixture
def placed(monkeypatch):
    """What is put on a sheet: of each (place, cell) the picture, its lines and their colour."""
    found = {}
    put = sheet._Sheet.put

    def record(self, place, cell, picture, lines, colour):
        found[place, cell] = np.asarray(picture).astype(int), list(lines), colour
        put(self, place, cell, picture, lines, colour)

    monkeypatch.setattr(sheet._Sheet, "put", record)
    return found


def test_every_picture_has_its_own_caption(placed, tmp_path):
    """Image, query and key, in this order, each with what was drawn for it and no other."""
    spec, images, index = v2(64), canvases((40, 50), (90, 70), (64, 64)), [7, 3, 12]
    contact_sheet(both(spec), images, index, 11, tmp_path / "views.png")
    pixels, heights, widths = flat(images)
    assert len(placed) == 9
    for place, number in enumerate(index):
        height, width = images[place].shape[:2]
        _, lines, ink = placed[place, 0]
        assert lines == [f"image {number}", f"{width}x{height}"]
        assert ink not in (sheet._COLOURS[0], sheet._COLOURS[1])
    for view, expected in ((0, sheet._COLOURS[0]), (1, sheet._COLOURS[1])):
        table = draw_table(spec, 11, 0, index, view, heights, widths)
        tiles = levels(spec, make_views(spec, table, pixels, heights, widths, "cpu"))
        for place, tile in enumerate(tiles):
            large = tile.round().permute(1, 2, 0).numpy().repeat(2, 0).repeat(2, 1)
            picture, lines, ink = placed[place, 1 + view]
            assert np.abs(picture - large).max() <= 1 and ink == expected
            assert lines == sheet._caption(spec, table, place)


def test_columns_are_headed_by_what_stands_below(monkeypatch, tmp_path):
    written = {}
    text = ImageDraw.ImageDraw.text

    def record(self, place, words, *rest, fill, **keywords):
        written.setdefault(words, []).append((place[0], fill))
        text(self, place, words, *rest, fill=fill, **keywords)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    contact_sheet(both(cifar()), canvases((32, 32), (32, 32)), [0, 1], 7, tmp_path / "v.png")
    blank = sheet._Sheet.blank(32, 2, 2, 2)
    assert "query (view 0) and key (view 1), epoch 0, seed 7" in written
    for cell, (name, ink) in enumerate(zip(("query", "key"), sheet._COLOURS[:2], strict=True), 1):
        assert written[name] == [(blank._corner(block, cell)[0], ink) for block in (0, 1)]


def test_the_boxes_of_query_and_key_are_outlined(placed, tmp_path):
    """On gray images, so that what has a colour is an outline; the key's lies on top."""
    spec, sizes = v2(64), [(40, 50), (90, 70), (500, 300), (16, 16)]
    images = [np.full((*size, 3), 128, np.uint8) for size in sizes]
    contact_sheet(both(spec), images, range(4), 5, tmp_path / "views.png")
    heights, widths = np.array(sizes).T
    query, key = (draw_table(spec, 5, 0, range(4), view, heights, widths).boxes for view in (0, 1))
    for place, size in enumerate(sizes):
        picture, scale = placed[place, 0][0], 128 / max(size)

        def ends(colour, picture=picture):
            """First and last place, down and across, of a colour, and how many pixels have it."""
            where = np.argwhere((picture == ImageColor.getrgb(colour)).all(-1))
            return where.min(0), where.max(0), len(where)

        first, last, count = ends(sheet._COLOURS[1])
        assert count > 40
        assert np.abs(first - scale * key[place, :2]).max() <= 1
        assert np.abs(last + 1 - scale * (key[place, :2] + key[place, 2:])).max() <= 1
        first, last, count = ends(sheet._COLOURS[0])
        assert count > 40
        assert (first >= scale * query[place, :2] - 1).all()
        assert (last + 1 <= scale * (query[place, :2] + query[place, 2:]) + 1).all()


def test_at_most_eight_images_and_any_number_of_columns(tmp_path):
    spec = cifar()
    images = canvases(*[(32, 32)] * 10)
    pages = {}
    for count, columns in ((1, 2), (7, 2), (8, 2), (10, 2), (8, 1), (3, 4)):
        contact_sheet(both(spec), images[:count], range(count), 0, tmp_path / "v.png", columns)
        pages[count, columns] = read(tmp_path / "v.png")
    assert np.array_equal(pages[8, 2], pages[10, 2])
    assert not np.array_equal(pages[7, 2], pages[8, 2])
    assert pages[8, 1].shape[0] > pages[8, 2].shape[0] > pages[1, 2].shape[0]
    assert pages[3, 4].shape[1] > pages[8, 2].shape[1] > pages[8, 1].shape[1]


@pytest.mark.parametrize("size", [8, 32, 100, 107, 127, 224, 300])
def test_pictures_have_a_readable_size(size):
    cell = sheet._Sheet.blank(size, 1, 1, 2).cell
    assert 128 <= cell <= 256
    assert size > 127 or cell % size == 0


def test_odd_canvases(tmp_path):
    images = canvases((1, 1), (1, 300), (500, 2), (900, 700))
    contact_sheet(both(spec_of(size=32, resize=32)), images, range(4), 0, tmp_path / "v.png")
    assert read(tmp_path / "v.png").std() > 10
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet(both(cifar()), [], [], 0, tmp_path / "v.png")


def test_captions_name_what_was_drawn():
    spec = v2()
    sizes = np.full(200, 100)
    table = draw_table(spec, 0, 0, np.arange(200), 0, sizes, sizes)
    for row in range(200):
        first, second = sheet._caption(spec, table, row)
        height, width = table.boxes[row, 2:]
        words = first.split(" | ")
        assert words[0] == f"crop {width}x{height}"
        assert ("flip" in words) == table.flip[row]
        assert ("gray" in words) == table.grayscale[row]
        assert (f"blur {table.sigma[row]:.2f}" in words) == (table.sigma[row] > 0)
        assert second.startswith("jitter ") == table.jitter[row]
        if table.jitter[row]:
            letters = "".join(word[0] for word in second.split()[1:])
            assert letters == "".join("bcsh"[step] for step in table.order[row])
            factors = (table.brightness, table.contrast, table.saturation, table.hue)
            for letter, factor in zip("bcsh", factors, strict=True):
                assert f"{letter}{factor[row]:.2f}" in second.split()
    bare = draw_table(spec_of(order=("crop",)), 0, 0, [0], 0, [100], [100])
    assert sheet._caption(spec_of(order=("crop",)), bare, 0)[1] == ""


def test_captions_name_randaugment_and_solarisation_too():
    order = ("crop", "solarize", "flip", "randaugment", "grayscale")
    spec = spec_of(order=order, solarize_probability=0.5, grayscale_probability=0.5)
    sizes = np.full(100, 50)
    table = draw_table(spec, 0, 0, np.arange(100), 0, sizes, sizes)
    for row, drawn in enumerate(table.randaugment):
        height, width = table.boxes[row, 2:]
        words = [
            f"crop {width}x{height}",
            "solarize" * int(table.solarize[row]),
            "flip" * int(table.flip[row]),
            " + ".join(sheet._random_words(drawn)),
            "gray" * int(table.grayscale[row]),
        ]
        assert sheet._caption(spec, table, row) == [" | ".join(filter(None, words)), ""]
    assert len({str(drawn) for drawn in table.randaugment}) > 50


def test_random_state_is_untouched(tmp_path):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    contact_sheet(both(cifar()), canvases((32, 32)), [0], 0, tmp_path / "v.png")
    assert torch.equal(before, torch.get_rng_state())
