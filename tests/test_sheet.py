"""The contact sheet shows the very views of the first epoch, and says what was drawn."""

import numpy as np
import pytest
import torch
from PIL import Image
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
    contact_sheet(spec, images, [7, 3], 11, tmp_path / "views.png")
    page = read(tmp_path / "views.png")
    pixels, heights, widths = flat(images)
    for view in (0, 1):
        table = draw_table(spec, 11, 0, [7, 3], view, heights, widths)
        for tile in levels(spec, make_views(spec, table, pixels, heights, widths, "cpu")):
            large = tile.round().permute(1, 2, 0).numpy().repeat(zoom, 0).repeat(zoom, 1)
            assert contains(page, large.astype(int)), view
            assert not contains(page, 255 - large.astype(int))


def test_at_most_eight_images_and_any_number_of_columns(tmp_path):
    spec = cifar()
    images = canvases(*[(32, 32)] * 10)
    pages = {}
    for count, columns in ((1, 2), (8, 2), (10, 2), (8, 1), (3, 4)):
        contact_sheet(spec, images[:count], range(count), 0, tmp_path / "v.png", columns)
        pages[count, columns] = read(tmp_path / "v.png")
    assert np.array_equal(pages[8, 2], pages[10, 2])
    assert pages[8, 1].shape[0] > pages[8, 2].shape[0] > pages[1, 2].shape[0]
    assert pages[3, 4].shape[1] > pages[8, 2].shape[1] > pages[8, 1].shape[1]


@pytest.mark.parametrize("size", [8, 32, 100, 224, 300])
def test_pictures_have_a_readable_size(size):
    cell = sheet._Sheet.blank(size, 1, 1).cell
    assert 128 <= cell <= 256
    assert size > 127 or cell % size == 0


def test_odd_canvases(tmp_path):
    images = canvases((1, 1), (1, 300), (500, 2), (900, 700))
    contact_sheet(spec_of(size=32, resize=32), images, range(4), 0, tmp_path / "v.png")
    assert read(tmp_path / "v.png").std() > 10
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet(cifar(), [], [], 0, tmp_path / "v.png")


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
            assert f"b{table.brightness[row]:.2f}" in second and f"h{table.hue[row]:.2f}" in second
    bare = draw_table(spec_of(order=("crop",)), 0, 0, [0], 0, [100], [100])
    assert sheet._caption(spec_of(order=("crop",)), bare, 0)[1] == ""


def test_random_state_is_untouched(tmp_path):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    contact_sheet(cifar(), canvases((32, 32)), [0], 0, tmp_path / "v.png")
    assert torch.equal(before, torch.get_rng_state())
