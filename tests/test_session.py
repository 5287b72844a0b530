"""What every evaluation does before it works: mistakes are told first, and for what they are."""

import dataclasses
import importlib
import inspect
import json
import logging
import os
import shlex
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image

import mocokit
from mocokit import recipes
from mocokit.data.open import open_data
from mocokit.engine.folder import RunFolder
from mocokit.engine.record import Console
from mocokit.engine.stop import raise_if_interrupted
from mocokit.errors import Interrupted, NonFiniteLoss, UserError
from mocokit.evaluate import api, results, session, stopping
from mocokit.evaluate.session import Options, Session
from mocokit.health import knn_monitor
from mocokit.protocols import finetune, linear_paper, linear_quick
from mocokit.protocols.finetune import Plan
from mocokit.protocols.table import CENTRE
from mocokit.run import command
from mocokit.weights import resolve
from mocokit.weights.encoder import view_spec

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOCOKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def fetched(monkeypatch):
    """The models whose weights were asked for; none can be had."""
    import timm

    asked = []

    def offline(name, **options):
        asked.append(name)
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise OSError("We couldn't connect")

    monkeypatch.setattr(timm, "create_model", offline)
    return asked


def test_mistakes_come_before_weights_are_fetched(fetched, toy_npz, tmp_path):
    with pytest.raises(UserError, match="there is no run, checkpoint or timm model 'NOTHING'"):
        mocokit.evaluate_knn("NOTHING", "nope")  # the first word is the first mistake
    for data, options, said in (
        ("nope", {}, "there are no images at nope"),
        (None, {}, "name the images to score on"),
        (toy_npz, {"json": tmp_path / "none" / "x.json"}, r"cannot write .* \(there is no folder"),
    ):
        with pytest.raises(UserError, match=said):
            mocokit.evaluate_knn("resnet18", data, **options)
    assert fetched == []


def test_a_missing_connection_is_one_sentence(fetched, toy_npz, caplog):
    with pytest.raises(UserError, match="cannot download the weights of resnet18"):
        mocokit.evaluate_knn("resnet18", toy_npz)
    assert fetched == ["resnet18"] and caplog.records == []
    assert logging.getLogger("huggingface_hub").level != logging.ERROR


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_stopped_evaluation_has_the_code_of_its_signal(number, code):
    @stopping.stoppable
    def evaluate():
        os.kill(os.getpid(), number)
        raise_if_interrupted()

    with pytest.raises(Interrupted) as stopped:
        evaluate()
    assert stopped.value.exit_code == code and stopping._current.get() is None


def test_the_model_is_opened_as_the_options_say(toy_npz, monkeypatch):
    class Opened(Exception):
        pass

    def watched(run, device, **asked):
        raise Opened(run, device, asked)

    monkeypatch.setattr(session, "open_model", watched)
    asked = {"layer": "head", "precision": "bfloat16", "size": 40, "resize": 50, "seed": 7}
    with pytest.raises(Opened) as opened:
        Session("random", Options(data=toy_npz, device="cpu", **asked))
    assert opened.value.args == ("random", CPU, asked)


def test_a_place_for_json(tmp_path):
    results.check_writable(tmp_path / "new.json")
    (tmp_path / "old.json").touch()
    results.check_writable(tmp_path / "old.json")
    for place in (tmp_path, tmp_path / "none/x.json", tmp_path / "old.json/x.json"):
        with pytest.raises(UserError, match="choose another place with --json"):
            results.check_writable(place)


@pytest.mark.parametrize(
    ("recipe", "data", "said"),
    [
        ("tv::nope", None, "there is no file or folder tv; "),
        ("cifar10::nope", None, "there is no file or folder nope; "),
        ("mocov2", "cifar10::x-{0..", "folder x-{0..; its braces name no range"),
        ("x-{000..}.tar", None, "its braces name no range: write {000..146}"),
        ("mocov2", "cifar01", "did you mean cifar10"),
        ("mocov2", None, "mocov2 needs images: name a folder of them after it"),
    ],
)
def test_what_is_missing_is_named(recipe, data, said):
    with pytest.raises(UserError) as caught:
        command.asked(recipe, data, {})
    assert said in str(caught.value) and "endtoend" not in str(caught.value)


def test_a_command_to_copy_is_quoted(tmp_path):
    place = tmp_path / "my runs; rm -r" / "first"
    RunFolder(place).create(recipes.demo(), {})
    with pytest.raises(UserError) as caught:
        resolve.file_of(place)
    words = shlex.split(str(caught.value).partition("resume it: ")[2])
    assert words == ["mocokit", "pretrain", str(place / "config.yaml"), "--out", str(place)]


def test_a_scoring_view_fits_into_memory():
    """By the ratio of its recipe, a large size may be the centre of a photo beyond all bounds."""
    spec = dataclasses.replace(view_spec(recipes.mocov2()), size=64, resize=640)
    assert resolve._scored(spec, 1638, None).resize == 16380
    for size in (1639, 4096):
        with pytest.raises(UserError, match=f"^size {size} is the centre of .*--resize"):
            resolve._scored(spec, size, None)
    assert resolve._scored(spec, 4096, 4096).resize == 4096


def test_a_run_that_ended_before_its_first_checkpoint(tmp_path):
    RunFolder(tmp_path / "run").create(recipes.demo(), {})
    with pytest.raises(UserError, match=r"ended before its first checkpoint.*config\.yaml --out"):
        resolve.open_model(tmp_path / "run", CPU)
    with pytest.raises(UserError, match="no weights yet"):
        mocokit.load(tmp_path / "run")


def test_a_run_that_was_killed_before_it_wrote_anything(toy_npz, tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.make()
    with pytest.raises(UserError, match="was killed before it began"):
        resolve.open_model(folder.path, CPU)
    settings = {"engine.threads": 1}
    mocokit.pretrain("demo", toy_npz, folder.path, epochs=1, batch_size=32, settings=settings)
    assert folder.result() is not None
    (tmp_path / "other").mkdir()
    (tmp_path / "other/.lock").touch()
    (tmp_path / "other/mine.txt").touch()
    with pytest.raises(UserError, match="holds other files and no run"):
        mocokit.pretrain("demo", toy_npz, tmp_path / "other")
    folder.config.unlink()
    kept = sorted(path for path in folder.path.rglob("*"))
    with pytest.raises(UserError, match=r"has checkpoints, but its config\.yaml is gone; put it"):
        mocokit.pretrain("demo", toy_npz, folder.path, epochs=1)
    assert sorted(path for path in folder.path.rglob("*")) == kept


def save(path, level):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 9), (level, level, level)).save(path)


def test_folders_that_may_be_classes_are_told_and_taken(tmp_path):
    for number in range(12):
        save(tmp_path / f"pets/{'cat' if number % 2 else 'dog'}/{number}.png", 20 * number)
    (note,) = open_data(tmp_path / "pets").train.notes
    assert "its 2 folders are classes, --set data.labels=folders" in note
    assert open_data(tmp_path / "pets", "folders").train.notes == ()
    assert open_data(tmp_path / "pets", "none").train.notes == ()
    found = mocokit.evaluate_knn("random:resnet_tiny", tmp_path / "pets", size=16, k=[3])
    assert found.classes == ("cat", "dog")
    save(tmp_path / "pets/loose.png", 7)
    assert open_data(tmp_path / "pets").train.notes == ()
    with pytest.raises(UserError, match=r"no labels \(loose.png lies directly in .*its class"):
        mocokit.evaluate_knn("random:resnet_tiny", tmp_path / "pets")


def arrays(path, train, test=None, size=(8, 8)):
    draw = np.random.default_rng(0)
    kept = {}
    for name, labels in (("train", train), ("test", test)):
        if labels is not None:
            kept[f"{name}_images"] = draw.integers(0, 255, (len(labels), *size, 3), np.uint8)
            kept[f"{name}_labels"] = np.array(labels)
    np.savez(path, **kept)
    return path


def test_small_and_odd_data(tmp_path, capsys):
    """Four images, one class, a class without training images, images that are not square."""
    judged, quiet = "random:resnet_tiny", {"size": 8, "baseline": False}
    four = arrays(tmp_path / "four.npz", [0, 1, 0, 1])
    found = mocokit.evaluate_knn(judged, four, k=[1, 200], **quiet)
    assert [one.setting["k"] for one in found.results] == [1, 3]
    assert "kNN, k 1, 3," in found.protocol  # each has but three others
    one = arrays(tmp_path / "one.npz", [0] * 9, [0] * 3)
    for evaluate, options in (
        (mocokit.evaluate_knn, {}),
        (mocokit.evaluate_linear, {"protocol": "quick"}),
        (mocokit.evaluate_linear, {"protocol": "paper"}),
        (mocokit.evaluate_finetune, {}),
    ):
        with pytest.raises(UserError, match="at least two classes"):
            evaluate(judged, one, **options, **quiet)
    missing = arrays(tmp_path / "missing.npz", [0, 2] * 6, [0, 1, 2], size=(8, 20))
    found = mocokit.evaluate_knn(judged, missing, per_class=True, **quiet)
    assert found.results[0].scores.per_class[1] == 0 and len(found.classes) == 3
    for protocol in ("quick", "paper"):
        options = {"epochs": 1} if protocol == "paper" else {}
        found = mocokit.evaluate_linear(judged, missing, protocol=protocol, **options, **quiet)
        assert found.results[0].scores.count == 3
    capsys.readouterr()


@pytest.mark.parametrize(
    ("tested", "shown", "vote"),
    [
        ([0, 1, 2], "k 5 (half of a class's 10 images in the bank)", 5),
        (None, "k 4 (half of a class's 9 images in the bank)", 4),  # an image's own row is no vote
    ],
)
def test_neighbours_that_nobody_states_follow_the_images_that_can_vote(
    tmp_path, tested, shown, vote
):
    data = arrays(tmp_path / "data.npz", [0, 1, 2] * 10, tested)
    found = mocokit.evaluate_knn("random:resnet_tiny", data, size=8, baseline=False)
    assert found.protocol.startswith(f"kNN, {shown}, temperature ")
    assert found.results[0].setting["k"] == vote
    stated = mocokit.evaluate_knn("random:resnet_tiny", data, size=8, baseline=False, k=[5])
    assert stated.protocol.startswith("kNN, k 5, temperature ")


@pytest.fixture(scope="module")
def finished(toy_npz, tmp_path_factory):
    out, settings = tmp_path_factory.mktemp("finished") / "run", {"engine.threads": 1}
    mocokit.pretrain("demo", toy_npz, out, epochs=1, batch_size=32, settings=settings)
    return out


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        (mocokit.evaluate_linear, {"protocol": "quick", "cache": False}),
        (mocokit.evaluate_linear, {"protocol": "paper", "epochs": 1, "cache": False}),
        (mocokit.evaluate_finetune, {"percent": 100, "epochs": 1}),
    ],
    ids=["quick", "paper", "finetune"],
)
@pytest.mark.parametrize("diverges", ["neither", "random weights", "the run"])
def test_a_baseline_that_diverges_costs_no_result(
    finished, toy_npz, monkeypatch, verb, options, diverges
):
    """A probe on random weights is left out with a note; one on the trained network is the end."""
    judged = []

    def failing(fit):
        def fitted(*given, **named):
            judged.append(("the run", "random weights")[len(judged)])
            if judged[-1] == diverges:
                raise NonFiniteLoss("the probe diverged")
            return fit(*given, **named)

        return fitted

    monkeypatch.setattr(linear_quick, "fit_quick", failing(linear_quick.fit_quick))
    monkeypatch.setattr(linear_paper, "fit_paper", failing(linear_paper.fit_paper))
    monkeypatch.setattr(finetune, "fine_tune", failing(finetune.fine_tune))
    monkeypatch.setattr(finetune, "LEAST_STEPS", 1)
    asked = {"size": 8, **options}
    if diverges == "the run":
        with pytest.raises(NonFiniteLoss, match="^the probe diverged$"):
            verb(finished, toy_npz, **asked)
        assert judged == ["the run"]
        return
    found = verb(finished, toy_npz, **asked)
    assert judged == ["the run", "random weights"]
    names = [one.features for one in found.results]
    notes = [note for note in found.notes if "diverged" in note]
    if diverges == "neither":
        assert len(names) == 2 and "random" in names[1] and notes == []
    else:
        assert len(names) == 1 and "random" not in names[0]
        assert notes == ["random weights: the probe diverged"]


def test_a_run_that_was_moved_keeps_its_report(toy_npz, tmp_path):
    settings = {"engine.threads": 1}
    data = tmp_path / "data.npz"
    shutil.copy(toy_npz, data)
    mocokit.pretrain("demo", data, tmp_path / "run", epochs=1, batch_size=32, settings=settings)
    moved = tmp_path / "elsewhere" / "run"
    moved.parent.mkdir()
    shutil.move(tmp_path / "run", moved)
    found = mocokit.evaluate_knn(moved, baseline=False)
    kept = json.loads((moved / "evaluations.jsonl").read_text())
    assert kept["results"][0]["accuracy"] == round(found.accuracy, 6)
    data.unlink()
    with pytest.raises(
        UserError, match=r"training images are no longer at .*data\.npz; pass their new location"
    ):
        mocokit.evaluate_knn(moved)
    assert mocokit.evaluate_knn(moved, toy_npz, baseline=False).accuracy == found.accuracy
    assert mocokit.evaluate_knn(moved, toy_npz, baseline=False, layer="head").accuracy > 0.25


def test_a_run_finds_its_own_images_as_it_was_told_to(toy_npz, tmp_path, monkeypatch):
    """Its data.root, and folders as classes where it was told so."""
    seen, plain = [], open_data
    monkeypatch.setattr(
        "mocokit.evaluate.session.open_data", lambda *words: seen.append(words) or plain(toy_npz)
    )
    run = tmp_path / "run"
    changes = {"engine.threads": 1, "data.root": str(tmp_path)}
    mocokit.pretrain("demo", toy_npz, run, epochs=1, batch_size=32, settings=changes)
    Session(run, Options())
    assert seen == [(str(toy_npz), "auto", str(tmp_path))]


def test_pixels_are_left_out_where_they_take_too_much(tmp_path, monkeypatch):
    data = arrays(tmp_path / "x.npz", [0, 1] * 4)
    monkeypatch.setattr("mocokit.evaluate.session.PIXEL_MEMORY", 4 * 3 * 16 * 16 * 8 - 1)
    found = mocokit.evaluate_knn("random:resnet_tiny", data, size=16)
    assert len(found.results) == 1 and "over 2 GiB" in found.notes[0]
    monkeypatch.setattr("mocokit.evaluate.session.PIXEL_LIMIT", 15)
    found = mocokit.evaluate_knn("random:resnet_tiny", data, size=16)
    assert len(found.results) == 1 and found.notes == ()


class Seen(Exception):
    pass


SEEDED = {  # the call, and where its seed must arrive: module and function
    "share": (mocokit.evaluate_finetune, {"percent": [50]}, "labelled.LabelledSplit.with_share"),
    "finetune": (mocokit.evaluate_finetune, {"percent": [100]}, "finetune.fine_tune"),
    "paper": (mocokit.evaluate_linear, {"protocol": "paper"}, "linear_paper.fit_paper"),
    "quick": (mocokit.evaluate_linear, {"protocol": "quick"}, "linear_quick.fit_quick"),
}


@pytest.mark.parametrize("name", SEEDED)
def test_the_seed_reaches_what_draws(toy_npz, monkeypatch, name):
    call, options, where = SEEDED[name]
    home, _, function = where.partition(".")
    owner, _, method = function.rpartition(".")
    place = importlib.import_module(f"mocokit.protocols.{home}")
    place = getattr(place, owner) if owner else place
    signature = inspect.signature(getattr(place, method))

    def watched(*words, **named):
        raise Seen(signature.bind(*words, **named).arguments["seed"])

    monkeypatch.setattr(place, method, watched)
    for seed in (0, 7):
        with pytest.raises(Seen) as seen:
            call("random:resnet_tiny", toy_npz, seed=seed, size=16, **options)
        assert seen.value.args == (seed,)


def test_random_crops_of_the_quick_probe_follow_the_seed(toy_npz, monkeypatch):
    """The centre crop does not, nor do the views of the test."""

    def crops(**options):
        seen = {}

        def table(self, subject, source, transform=CENTRE):
            seen[len(source)] = transform.crops

        def fitted(*words, **named):
            raise Seen

        monkeypatch.setattr(Session, "table", table)
        monkeypatch.setattr("mocokit.protocols.linear_quick.fit_quick", fitted)
        quick = {"protocol": "quick", "size": 16, "cache": False} | options
        with pytest.raises(Seen):
            mocokit.evaluate_linear("random:resnet_tiny", toy_npz, **quick)
        return seen

    drawn = [crops(seed=seed) for seed in (0, 1, 1)]
    assert {found.pop(40) for found in drawn} == {None}
    first, second, again = (found[160] for found in drawn)
    assert None not in (first, second) and first != second == again
    assert crops(seed=1, train_views="centre") == {160: None, 40: None}


def test_pixels_are_centred_by_the_bank(tmp_path, monkeypatch):
    data, seen = arrays(tmp_path / "x.npz", [0, 1] * 4, [0, 1, 0]), []
    plain = api.knn_grid_of
    monkeypatch.setattr(
        api, "knn_grid_of", lambda *of: seen.append((of[0].mean(0), of[2].mean(0))) or plain(*of)
    )
    mocokit.evaluate_knn("random:resnet_tiny", data, size=8, cache=False)
    bank, queries = seen[-1]
    assert bank.abs().max() < 1e-5 and queries.abs().max() > 1e-2


def test_fine_tuning_says_ahead_what_it_will_do():
    plan = Plan(epochs=1, batch_size=128)
    assert plan.ahead(51200) == "51,200 labelled images, 1 epoch of them, 400 steps"
    assert "100 epochs of them, 400 steps (more than --epochs 1," in plan.ahead(500)


def test_random_weights_are_calibrated_on_images_of_all_classes(monkeypatch):
    """Files of a folder come class by class: the first ones are of one class."""
    seen = []
    monkeypatch.setattr(knn_monitor, "CALIBRATION", 1)
    monkeypatch.setattr(knn_monitor, "BATCH", 10)
    monkeypatch.setattr(knn_monitor, "calibrate", lambda network, batches: seen.extend(batches))
    monkeypatch.setattr(
        knn_monitor,
        "evaluation_batches",
        lambda source, numbers, *rest: [(None, int(number)) for number in numbers],
    )
    knn_monitor.calibrated(None, range(95), None, None)
    assert seen == [0, 9, 19, 28, 38, 47, 57, 66, 76, 85]


def test_what_a_network_cannot_look_at_is_told(monkeypatch):
    class Choosy(torch.nn.Linear):
        num_features = 4

        def forward(self, images):
            assert images.shape[-1] == 224, "Input height (100) doesn't match model (224)."
            return images

    monkeypatch.setattr(resolve, "_random_backbone", lambda model, seed: Choosy(4, 4))
    assert resolve.open_model("random:resnet18", CPU, size=224).subject.width == 4
    with pytest.raises(UserError, match=r"size 100: .* such views \(Input height .*--size out"):
        resolve.open_model("random:resnet18", CPU, size=100)


def test_unreadable_images_are_counted_on_both_sides(tmp_path):
    for number in range(24):
        side = "val" if number >= 16 else "train"
        save(tmp_path / f"pets/{side}/{'cat' if number % 2 else 'dog'}/{number}.png", 10 * number)
    (tmp_path / "pets/train/cat/1.png").write_bytes(b"not an image")
    (tmp_path / "pets/val/dog/22.png").write_bytes(b"not an image")
    found = mocokit.evaluate_knn(
        "random:resnet_tiny", tmp_path / "pets", size=16, k=[50], baseline=False
    )
    assert found.notes == (
        "1 training image could not be read: left out",
        "1 test image could not be read: neither right nor wrong",
    )
    assert found.results[0].setting["k"] == 15 and found.results[0].scores.count == 7
    for path in (tmp_path / "pets/val").rglob("*.png"):
        path.write_bytes(b"not an image")
    with pytest.raises(UserError, match="can be read"):
        mocokit.evaluate_knn("random:resnet_tiny", tmp_path / "pets", size=16, baseline=False)


def test_no_test_image_to_score_fine_tuning_on(tmp_path, monkeypatch):
    monkeypatch.setattr("mocokit.protocols.finetune.LEAST_STEPS", 1)
    for number in range(8):
        save(tmp_path / f"pets/train/{'cat' if number % 2 else 'dog'}/{number}.png", 10 * number)
    for side in ("cat", "dog"):
        (tmp_path / f"pets/val/{side}").mkdir(parents=True)
        (tmp_path / f"pets/val/{side}/1.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match="none of the test images of pets can be read"):
        mocokit.evaluate_finetune(
            "random:resnet_tiny", tmp_path / "pets", size=16, percent=[100], epochs=1
        )


def test_without_a_home_one_sentence_names_the_remedy(toy_npz, homeless):
    with pytest.raises(UserError, match="no home folder .*; set MOCOKIT_CACHE to a folder"):
        mocokit.evaluate_knn("random:resnet_tiny", toy_npz)
    found = mocokit.evaluate_knn("random:resnet_tiny", toy_npz, cache=False, size=16)
    assert found.accuracy > 0


def test_names_of_classes_reach_a_terminal_as_text(capsys):
    """Folders name classes: rich would read [/a] as markup, and a terminal obeys an escape."""
    names = ["[/a]", "[bold]b", "\x1b]0;title\x07c"]
    Console().table("classes", ["class", names[0]], [(name, "1") for name in names])
    shown = capsys.readouterr().err
    assert "[/a]" in shown and "[bold]b" in shown and "\\x1b]0;title\\x07c" in shown
    assert "\x1b]" not in shown and "\x07" not in shown
