"""The view that scores are taken of follows the training view, and never changes what is trained.

`views.resize` of earlier versions was both. What an unfinished run of then computes stays.
"""

import dataclasses
import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, strategies as st
from PIL import Image
from safetensors.torch import load_file

import mocokit
from mocokit import cli, recipes, settings as settings_
from mocokit.check import check
from mocokit.data.open import open_data
from mocokit.data.sources.arrays import ArraySource
from mocokit.errors import UserError
from mocokit.protocols import features
from mocokit.protocols.features import evaluation_batches, probe_spec
from mocokit.protocols.knn import NEIGHBOURS, suited
from mocokit.protocols.labelled import labelled_split
from mocokit.protocols.training import TrainingViews
from mocokit.run import build
from mocokit.settings import legacy, replace, sizes
from mocokit.settings.schema import Settings
from mocokit.views import sheet
from mocokit.views.params import scoring_bound, seen_share
from mocokit.views.views import evaluation_views
from mocokit.weights.encoder import build_encoder, view_spec
from mocokit.weights.write import write_backbone

# Of every recipe, as it was at commit 97a0129: size and short side of the view that is scored, and
# the bound of training canvases.
BEFORE = {
    "demo": (32, 32, 59),
    "mocov1": (224, 256, 579),
    "mocov2": (224, 256, 579),
    "mocov2_800": (224, 256, 579),
    "mocov2_symmetric": (224, 256, 579),
    "mocov2plus": (224, 256, 579),
    "ablation_a": (224, 256, 579),
    "ablation_b": (224, 256, 579),
    "ablation_c": (224, 256, 579),
    "endtoend": (224, 256, 579),
    "endtoend_4096": (224, 256, 579),
    "endtoend_v1": (224, 256, 579),
    "simclr": (224, 256, 915),
    "simclr_256": (224, 256, 915),
    "memorybank": (224, 256, 579),
    "memorybank_softmax": (224, 256, 579),
    "mocov2_cifar10": (32, 32, 131),
    "mocov2_cifar10_symmetric": (32, 32, 131),
    "endtoend_cifar10": (32, 32, 131),
    "simclr_cifar10": (32, 32, 131),
    "memorybank_cifar10": (32, 32, 83),
    "memorybank_softmax_cifar10": (32, 32, 131),
}


def bound(settings):
    return build.largest_canvas(build.view_specs(settings).values())


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_no_recipe_is_scored_or_trained_on_other_pixels_than_before(name):
    size, side, largest = BEFORE[name]
    settings = recipes.by_name(name)
    spec = view_spec(settings)
    assert (spec.size, spec.resize, bound(settings)) == (size, side, largest)
    assert scoring_bound(spec) == largest
    assert settings.monitor.resize is None and settings.views.canvas is None


@given(st.sampled_from(sorted(BEFORE)), st.integers(8, 600))
def test_the_scoring_view_follows_the_size(name, size):
    """Also 64 pixels of a recipe for 224, of which 6 % of a photo was scored once."""
    settings = replace(recipes.by_name(name), {"views.size": size})
    spec, (before, side, _) = view_spec(settings), BEFORE[name]
    assert abs(spec.resize - size * side / before) <= 0.5
    assert spec.resize >= size and seen_share(spec, 300, 300) > 0.7


@given(st.integers(8, 300), st.integers(0, 900), st.floats(0.1, 1), st.floats(0.01, 1))
def test_canvases_follow_from_the_crops_alone(size, more, centre, area):
    settings = replace(Settings(), {"views.size": size, "views.crop_area": (area, 1.0)})
    other = replace(settings, {"monitor.resize": size + more, "monitor.centre": centre})
    assert bound(other) == bound(settings) == math.ceil(size / math.sqrt(area * 0.75))
    assert view_spec(other).resize == size + more <= scoring_bound(view_spec(other))
    assert settings_.identity(other) == settings_.identity(settings)


@pytest.mark.parametrize(
    ("size", "area", "centre", "crops"),
    [
        (32, 0.2, 83, 131),  # 32 / sqrt(0.2 x 3/4) and 32 / sqrt(0.08 x 3/4)
        (32, 1.0, 37, 131),
        (32, 0.02, 262, 131),  # 32 / sqrt(0.02 x 3/4)
        (224, 0.2, 579, 915),
    ],
)
def test_evaluations_read_the_pixels_of_the_crops_that_they_make(size, area, centre, crops):
    """Both probes crop more narrowly than most recipes, and the scoring view is their test's."""
    asked = []

    class Bounded:
        """Images that are read one by one, as of a folder."""

        def __len__(self):
            return 6

        def __getattr__(self, name):
            return getattr(arrays, name)

        def read(self, index, bound=None):
            asked.append(bound)
            return arrays.read(index, bound)

    arrays = ArraySource(np.zeros((6, size, size, 3), np.uint8), np.arange(6) % 2, "toy")
    source = Bounded()
    settings = replace(Settings(), {"views.size": size, "views.crop_area": (area, 1.0)})
    spec, cpu = view_spec(settings), torch.device("cpu")
    split, numbers = labelled_split(source, source, seed=0), np.arange(4)
    for bound, batches in (
        (centre, evaluation_batches(source, numbers, spec, cpu)),
        (crops, evaluation_batches(source, numbers, spec, cpu, crops=5)),
        (crops, TrainingViews(probe_spec(spec), split, cpu, 0, 0, 4, 0)),
    ):
        asked.clear()
        assert len([*batches]) >= 1
        assert {*asked} == {bound}


@pytest.mark.parametrize("crops", [None, 5])
def test_a_view_of_an_evaluation_is_the_images_own(monkeypatch, crops):
    """Wherever it lies among the others, in whatever batch; and no two have the same crop."""
    monkeypatch.setattr(features, "BATCH", 4)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    source = ArraySource(np.broadcast_to(pixels, (30, 40, 40, 3)).copy(), None, "toy")
    spec = view_spec(replace(Settings(), {"views.size": 32}))

    def views(numbers, crops=crops):
        found = {}
        numbers = np.asarray(numbers, np.int64)
        for batch, rows in evaluation_batches(source, numbers, spec, torch.device("cpu"), 0, crops):
            assert len(rows) <= 4
            found |= dict(zip(batch.index.tolist(), rows, strict=True))
        assert sorted(found) == sorted(numbers)
        return found

    whole = views(range(30))
    for numbers in ([7], [29, 3, 11, 0, 8, 21], range(2, 30, 3)):
        for number, view in views(numbers).items():
            assert torch.equal(view, whole[number]), number
    distinct = {view.numpy().tobytes() for view in whole.values()}
    assert len(distinct) == (30 if crops else 1)
    if crops:
        others = views(range(30), crops + 1)
        assert not any(torch.equal(view, whole[number]) for number, view in others.items())


def test_views_of_other_sizes_are_not_bound_to_the_scoring_view():
    settings = replace(Settings(), {"views.size": 32, "monitor.resize": 40})
    large = build.view_specs(settings)
    assert {spec.size for spec in large.values()} == {32}
    with pytest.raises(UserError, match=r"monitor.resize 40 cannot be smaller than views.size 48"):
        replace(settings, {"views.size": 48})


OLD = [  # recipe, size and short side in a config.yaml of before; the short side that is scored now
    ("mocov2", 224, 256, 256),
    ("mocov2", 64, 256, 73),
    ("mocov1", 96, 256, 110),
    ("simclr", 32, 256, 37),
    ("mocov2", 64, 64, 64),
    ("mocov2", 300, 320, 343),
    ("demo", 32, 32, 32),
    ("demo", 16, 16, 16),
    ("demo", 16, 32, 16),
    ("mocov2_cifar10", 24, 32, 24),
    ("memorybank_cifar10", 64, 64, 64),
]


def as_of_before(settings, resize, version):
    """config.yaml as 0.1 wrote it, or 0.2 before this change."""
    tree = yaml.safe_load(settings_.to_yaml(settings))
    del tree["views"]["canvas"], tree["monitor"]["resize"], tree["monitor"]["centre"]
    tree["views"]["resize"], tree["monitor"]["k"] = resize, 200
    if version == "0.1":
        tree["method"] = dict.fromkeys(legacy.METHOD_0_1) | tree["method"]
    return yaml.safe_dump(tree, sort_keys=False)


@pytest.mark.parametrize("version", ["0.1", "0.2-dev"])
@pytest.mark.parametrize(("recipe", "size", "resize", "scored"), OLD)
def test_settings_of_before_keep_canvases_and_get_the_new_view(
    recipe, size, resize, scored, version
):
    asked = replace(recipes.by_name(recipe), {"views.size": size})
    old = settings_.from_yaml(as_of_before(asked, resize, version))
    assert bound(old) == max(resize, bound(asked)) and view_spec(old).resize == scored
    again = settings_.from_yaml(settings_.to_yaml(old))
    assert again == old == settings_.from_yaml(settings_.to_yaml(again))
    said = sizes.scored_anew(again)
    assert bool(said) == (resize != scored)
    assert not said or (f"at {scored}," in said[0] and "monitor.resize" in said[0])
    # The same command again takes what the run has, so it is no conflict.
    settled = build.settle(asked, torch.device("cpu"), old)
    assert settled.views.canvas == resize and bound(settled) == bound(old)
    fresh = build.settle(asked, torch.device("cpu"), None)
    assert fresh.views.canvas is None


@pytest.mark.parametrize("recipe", ["demo", "mocov2_cifar10", "mocov2"])
def test_what_a_file_of_before_states_in_todays_names_holds(recipe):
    """The views that 0.1 wrote have a part of today's settings: as a person may have added them."""
    views, monitor = {"size": 32, "resize": 32}, {"k": 7, "centre": 0.5}
    tree = {"recipe": recipe, "views": views, "monitor": monitor}
    old = settings_.from_yaml(yaml.safe_dump(tree))
    assert (old.monitor.centre, old.monitor.k, view_spec(old).resize) == (0.5, 7, 64)
    monitor |= {"resize": 50}
    assert view_spec(settings_.from_yaml(yaml.safe_dump(tree))).resize == 50
    views |= {"canvas": 90}
    assert settings_.from_yaml(yaml.safe_dump(tree)).views.canvas == 90
    del tree["monitor"], views["canvas"]
    plain = settings_.from_yaml(yaml.safe_dump(tree))
    assert (plain.monitor.centre, plain.views.canvas) == (1.0, 32)


def test_the_old_name_is_refused_in_one_sentence_that_names_the_new_one(capsys, monkeypatch):
    words = ["mocokit", "pretrain", "mocov2", "--show", "--set", "views.resize=64"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 2 and "monitor.resize" in said and said.count(". ") == 0


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """48 JPEG photos of 800 pixels and more in two classes: their decoder may shrink them."""
    draw = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("large")
    for number in range(64):
        levels = draw.integers(0, 255, (30, 30, 3), dtype=np.uint8)
        place = root / "train" / "ab"[number % 2] / f"{number}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(levels).resize((800, 810 + number)).save(place)
    return root


TINY = {
    "net.backbone": "resnet_tiny", "views.size": 48, "views.crop_area": [0.5, 1.0],
    "method.queue_size": 32, "engine.threads": 1, "engine.precision": "float32",
    "data.workers": 0, "log.every_steps": 1, "save.every_steps": 1, "save.keep": 9,
    "monitor.every_epochs": 0,
}  # fmt: skip


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def test_an_unfinished_run_of_before_resumes_bit_for_bit(large, tmp_path, monkeypatch, capsys):
    """Its canvases had 256 pixels where the crops of 48 need 79, and photos were shrunk by less."""
    train = {"epochs": 2, "batch_size": 32, "device": "cpu"}
    kept, other = tmp_path / "kept", tmp_path / "other"
    mocokit.pretrain("mocov2", large, kept, settings=TINY | {"views.canvas": 256}, **train)
    mocokit.pretrain("mocov2", large, other, settings=TINY, **train)
    assert losses(kept) != losses(other)  # or the canvases would not matter here
    for way in ("config", "command"):
        old = tmp_path / way
        shutil.copytree(kept, old, symlinks=True)
        stop_after(old, 1)
        for last in (2, 4) if way == "config" else (4,):  # resumed, stopped and resumed again
            capsys.readouterr()
            if way == "config":
                mocokit.pretrain(str(old / "config.yaml"), out=old)
            else:
                mocokit.pretrain("mocov2", large, old, settings=TINY, **train)
            said = " ".join(capsys.readouterr().err.split())
            assert said.count("scores are now taken at 55, of which views.size 48") == 1
            if last == 2:
                stop_after(old, 2, rewritten=True)
        assert losses(old) == losses(kept)
        one, two = (load_file(folder / "backbone.safetensors") for folder in (kept, old))
        assert all(torch.equal(one[name], two[name]) for name in one)


def stop_after(folder, step, rewritten=False):
    """As if a signal had stopped it there; unless rewritten since, in the words of before."""
    (folder / "backbone.safetensors").unlink()
    for path in (folder / "checkpoints").glob("*.pt"):
        if int(path.stem[5:]) > step:
            path.unlink()
    path = folder / "checkpoints" / f"step-{step:08d}.pt"
    last = folder / "last.pt"
    last.unlink()
    last.symlink_to(f"checkpoints/{path.name}")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:step]))
    if rewritten:
        return
    from mocokit.engine import checkpoint

    state = checkpoint.load(path)
    old = as_of_before(settings_.from_yaml(state["settings"]), 256, "0.2-dev")
    state["settings"] = old
    (folder / "config.yaml").write_text(old)
    step = state.pop("step")
    del state["format"]
    checkpoint.save(folder / "checkpoints", step, state)


def test_evaluate_takes_another_view(toy_npz, tmp_path):
    judge = {"size": 16, "baseline": False, "k": [5]}
    for resize, words in (
        (None, "short side 18, centre crop 16 x 16"),  # 256 for 224
        (16, "short side and centre 16 x 16"),
        (32, "short side 32, centre crop 16 x 16"),
    ):
        found = mocokit.evaluate_knn("random:resnet_tiny", toy_npz, resize=resize, **judge)
        assert words in found.protocol
    quick = {"protocol": "quick", "resize": 20, "size": 16, "baseline": False}
    found = mocokit.evaluate_linear("random:resnet_tiny", toy_npz, **quick)
    assert "short side 20" in found.protocol
    for evaluate in (mocokit.evaluate_knn, mocokit.evaluate_linear, mocokit.evaluate_finetune):
        with pytest.raises(
            UserError,
            match="resize = 99999: must be a whole number of at least 8 and at most 16,384",
        ):
            evaluate("random:resnet_tiny", toy_npz, resize=99999, size=16)
        with pytest.raises(UserError, match="resize 15 is smaller than the centre crop of 16"):
            evaluate("random:resnet_tiny", toy_npz, resize=15, size=16)


VIEWS = [({}, True), ({"size": 24}, False), ({"resize": 40}, False)]


@pytest.mark.parametrize(("asked", "told"), [*VIEWS, ({"size": 24, "resize": 40}, False)])
def test_a_run_of_before_is_scored_anew_unless_another_view_is_asked_for(
    toy_npz, tmp_path, asked, told
):
    settings = replace(recipes.demo(), {"views.canvas": 48})
    write_backbone(tmp_path / "x.safetensors", build_encoder(settings).backbone, settings)
    options = {"k": [5], "baseline": False, "cache": False} | asked
    found = mocokit.evaluate_knn(tmp_path / "x.safetensors", toy_npz, **options)
    notes = [note for note in found.notes if "scores are now taken at 32, of which" in note]
    assert len(notes) == told and len(found.notes) == told


def test_the_monitor_scores_the_view_that_is_set(toy_npz, tmp_path):
    for resize in (None, 32, 60):
        settings = replace(recipes.demo(), {"monitor.resize": resize, "data.path": str(toy_npz)})
        splits = open_data(str(toy_npz), "auto", None)
        monitor = build.build_monitor(settings, splits, torch.device("cpu"))
        health = build.build_health(settings, splits, torch.device("cpu"))
        assert monitor.spec.resize == health.spec.resize == (resize or 32)
        seen = "short side and centre 32" if resize != 60 else "short side 60, centre crop 32"
        assert seen in monitor.protocol


def test_the_contact_sheet_and_check_show_what_a_score_sees(tmp_path, monkeypatch, photos, capsys):
    put, found, written = sheet._Sheet.put, {}, []
    header = sheet._Sheet.header

    def record(self, place, cell, picture, lines, colour):
        found[place, cell] = np.asarray(picture).astype(int), list(lines)
        put(self, place, cell, picture, lines, colour)

    def names(self, title, over):
        written.extend(over)
        header(self, title, over)

    monkeypatch.setattr(sheet._Sheet, "put", record)
    monkeypatch.setattr(sheet._Sheet, "header", names)
    check("mocov2", photos, tmp_path / "v.png", {"views.size": 64}, images=3)
    said = " ".join(capsys.readouterr().err.split())
    assert "resized to 73 pixels, of which 64 x 64 in the centre (monitor.resize)" in said
    assert [name for name, _ in written] == ["query", "key", "scored"]
    assert {cell for _, cell in found} == {0, 1, 2, 3}
    spec = view_spec(replace(Settings(), {"views.size": 64}))
    source = open_data(str(photos), "auto", None).train
    for place in range(3):
        number = int(found[place, 0][1][0].split()[1])
        canvas = source.read(number)
        height, width = (np.array([side]) for side in canvas.shape[:2])
        views = evaluation_views(
            spec, torch.from_numpy(canvas.reshape(-1).copy()), height, width, "cpu"
        )
        mean, std = (torch.tensor(one).view(3, 1, 1) for one in (spec.mean, spec.std))
        levels = ((views[0] * std + mean) * 255).round().clamp(0, 255).permute(1, 2, 0)
        large = levels.numpy().astype(int).repeat(2, 0).repeat(2, 1)
        assert np.abs(found[place, 3][0] - large).max() <= 1
        share = seen_share(spec, *canvas.shape[:2])
        assert found[place, 3][1] == ["centre 64 of 73", f"{share:.0%} of the image"]


def test_the_share_that_is_seen():
    spec = dataclasses.replace(view_spec(Settings()), size=64, resize=256)
    assert seen_share(spec, 256, 256) == pytest.approx(0.0625)
    assert seen_share(spec, 100, 200) == seen_share(spec, 200, 100) == pytest.approx(0.03125)


@pytest.mark.parametrize(
    ("counts", "left_out", "k"),
    [
        ([5000] * 10, 0, NEIGHBOURS),
        ([400] * 3, 0, 200),
        ([399] * 3, 0, 199),
        ([30] * 50, 0, 15),
        ([30] * 2, 1, 14),
        ([1, 30, 3000], 0, 15),
        ([2, 2], 0, 1),
        ([1, 1], 1, 1),
    ],
)
def test_neighbours_follow_the_images_of_a_class(counts, left_out, k):
    labels = np.repeat(3 * np.arange(len(counts)), counts)  # not all numbers are classes
    found, words = suited(labels, left_out)
    assert found == k and words.startswith(str(k))
    alone = np.median(counts) - left_out < 2
    assert ("half of a class's" in words) == (k < 200 and not alone)
    assert ("one image" in words) == alone


def test_stated_neighbours_are_kept(toy_npz):
    """By the recipe, by the user, and by a run's settings in `evaluate`."""
    splits = open_data(str(toy_npz), "auto", None)
    for changes, shown in (({}, "k 20 (half of a class's 40 images"), ({"monitor.k": 7}, "k 7,")):
        settings = replace(Settings(), {"views.size": 32, **changes})
        assert shown in build.build_monitor(settings, splits, torch.device("cpu")).protocol
    stated = {"demo", "memorybank_cifar10"} | {n for n in recipes.RECIPES if "cifar10" in n}
    for name in stated - {"simclr_cifar10"}:
        assert recipes.by_name(name).monitor.k == 200
    quiet = {"size": 8, "baseline": False}
    assert "k 20 (half" in mocokit.evaluate_knn("random:resnet_tiny", toy_npz, **quiet).protocol
    found = mocokit.evaluate_knn("random:resnet_tiny", toy_npz, k=[3, 500], **quiet)
    assert "k 3, 160," in found.protocol


@pytest.mark.parametrize(
    ("recipe", "changes", "stated", "told"),
    [
        ("mocov2", {"views.size": 64}, (), True),
        ("mocov2", {"views.size": 112}, (), False),
        ("mocov2", {"views.size": 111}, (), True),
        ("mocov2", {}, (), False),
        ("mocov2", {"views.size": 64}, ("views.blur_sigma",), False),
        ("mocov2", {"views.size": 64, "views.blur_probability": 0}, (), False),
        ("mocov2", {"views.size": 64, "views.blur_probability": (0.0, 0.1)}, (), True),
        ("mocov2", {"views.size": 64, "views.blur_sigma": (0.1, 1.0)}, (), False),
        ("mocov1", {"views.size": 64}, (), False),
        ("mocov2_cifar10", {}, (), False),
        ("demo", {}, (), False),
    ],
)
def test_a_blur_in_pixels_is_told_on_small_views(recipe, changes, stated, told):
    settings = replace(recipes.by_name(recipe), changes)
    _, notices = sizes.fit(settings, 100_000, stated)
    found = [one for one in notices if "blur" in one]
    assert bool(found) == told
    if told:
        size = settings.views.size
        assert f"views of {size}" in found[0]
        proposed = found[0].split("views.blur_sigma=")[1]
        fair = replace(settings, {"views.blur_sigma": yaml.safe_load(proposed)})
        assert fair.views.blur_sigma[1] == pytest.approx(2 * size / 224, abs=0.01)
