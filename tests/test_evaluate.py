"""`mocokit evaluate`: what can be judged, what is printed beside a number, where it is kept."""

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from shapes import SMALL as FEW, tiny_network, write_shapes
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

import mocokit
from mocokit import chance, cli, recipes
from mocokit.chance import Slot
from mocokit.data.open import open_data
from mocokit.data.sources.arrays import ArraySource
from mocokit.engine import runtime
from mocokit.engine.runtime import seed_libraries
from mocokit.errors import UserError
from mocokit.nets.backbones import build_backbone
from mocokit.protocols.finetune import Classifier, Plan, block_of, parameter_groups
from mocokit.protocols.labelled import labelled_split
from mocokit.protocols.table import features_of
from mocokit.settings import replace
from mocokit.weights.encoder import build_encoder
from mocokit.weights.resolve import folder_of, open_model, timm_spec
from mocokit.weights.subject import weights_hash

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(toy_npz, tmp_path_factory):
    """A finished run of two epochs."""
    out = tmp_path_factory.mktemp("runs") / "toy"
    settings = {"engine.threads": 1}
    mocokit.pretrain("demo", toy_npz, out, epochs=2, batch_size=32, settings=settings)
    return out


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOCOKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def command(capsys, monkeypatch):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["mocokit", "evaluate", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, " ".join((out + err).split())

    return call


def test_flags_are_pinned(capsys, monkeypatch):
    shared = "--size --resize --device --precision --seed --baseline --no-baseline"
    shared += " --per-class --confusion --json --help"
    own = {
        "knn": "--k --temperature --layer --cache --no-cache",
        "linear": "--protocol --train-views --epochs --lr --layer --cache --no-cache",
        "finetune": "--percent --epochs --lr --layer-decay",
        "voc": "--split --trials --seed --steps --batch-size --set --classes --every --out "
        "--device --precision --pictures --json --help",
    }
    for verb, flags in own.items():
        monkeypatch.setattr(sys, "argv", ["mocokit", "evaluate", verb, "--help"])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit):
            cli.main()
        text = capsys.readouterr().out.replace("|", " ").replace("/", " ")
        found = {word.strip(",.;()") for word in text.split() if word.startswith("--")}
        assert found == set(f"{'' if verb == 'voc' else shared} {flags}".split()), verb


@pytest.mark.parametrize(
    ("way", "streams"),
    [
        ("paper", {(0, Slot.EVALUATION), (1, Slot.EVALUATION)}),  # the layer, orders and views
        ("crops", {(3, Slot.EVALUATION)}),
        ("finetune", {(1, Slot.EVALUATION), (2, Slot.EVALUATION)}),
        ("voc", {(0, Slot.DETECTION_WEIGHTS), (0, Slot.DETECTION_ORDER), (1, Slot.DETECTION_DRAW)}),
    ],
)
def test_each_use_of_an_evaluations_seed_has_a_stream_of_its_own(
    way, streams, toy_npz, tmp_path, monkeypatch
):
    """Streams are never renumbered: a score would change. Steps then draw from their stream."""
    asked, given = set(), chance.library_seed

    def watched(seed, step, slot=Slot.LIBRARY):
        asked.add((seed, step, slot))
        return given(seed, step, slot)

    monkeypatch.setattr(chance, "library_seed", watched)
    monkeypatch.setattr(runtime, "library_seed", watched)
    small = {"size": 16, "seed": 5, "baseline": False, "device": "cpu"}
    if way == "voc":
        root = write_shapes(tmp_path / "shapes", 4, 2)
        plan = FEW | {"precise_bn": 0}
        mocokit.evaluate_voc(
            f"random:{tiny_network()}", root, trials=2, seed=5, steps=1, batch_size=2, every=0,
            settings=plan, device="cpu", precision="float32", pictures=0, out=tmp_path / "out",
        )  # fmt: skip
    elif way == "finetune":
        monkeypatch.setattr("mocokit.protocols.finetune.LEAST_STEPS", 2)
        mocokit.evaluate_finetune("random:resnet_tiny", toy_npz, percent=[100], epochs=1, **small)
    else:
        more = {"epochs": 1} if way == "paper" else {"train_views": "crops"}
        protocol = "paper" if way == "paper" else "quick"
        mocokit.evaluate_linear("random:resnet_tiny", toy_npz, protocol=protocol, **small, **more)
    trials = (5, 6) if way == "voc" else (5,)
    for trial in trials:
        assert {(step, slot) for seed, step, slot in asked if seed == trial} >= streams
    of_steps = {seed for seed, _, slot in asked if slot == Slot.LIBRARY}
    last = {"finetune": (2, Slot.EVALUATION), "voc": (1, Slot.DETECTION_DRAW)}.get(way)
    assert of_steps == ({given(trial, *last) for trial in trials} if last else set())


def test_knn_is_the_runs_own_score_and_scikit_learns(run, command, toy_npz):
    code, said = command("knn", run, "--json", run / "out.json", "--per-class", "--confusion")
    assert code == 0
    for text in (
        "kNN, k 160, temperature 0.1, backbone features",
        "160 training images, 40 test images",
        "trained backbone, k 160",
        "random weights, k 160",
        "by class, the weakest first",
        "rows are what the images are",
        "seed 0, float32 on cpu; random weights with batch-norm statistics of the training images",
    ):
        assert text in said, text
    found = json.loads((run / "out.json").read_text())
    trained, untrained, pixels = found["results"]
    assert trained["features"] == "trained backbone" and trained["images"] == 40
    assert np.trace(trained["confusion"]) / 40 == trained["accuracy"]
    assert untrained["features"] == "random weights"
    assert pixels["features"] == "raw pixels, centred"
    for name in ("protocol", "weights", "data_fingerprint", "date", "hardware", "versions"):
        assert found[name], name

    arrays, backbone = np.load(toy_npz, allow_pickle=False), mocokit.load(run)

    def features(images):
        with torch.no_grad():
            pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
            return backbone((pixels - 0.5) / 0.25).numpy()

    def centred(images):
        return (images - arrays["train_images"].mean(0)).reshape(len(images), -1) / 255 / 0.25

    for made, ours in ((features, trained), (centred, pixels)):
        other = KNeighborsClassifier(160, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.1))
        other.fit(made(arrays["train_images"]), arrays["train_labels"])
        theirs = other.score(made(arrays["test_images"]), arrays["test_labels"])
        assert ours["accuracy"] == pytest.approx(theirs, abs=0.026)  # one image of 40


def test_every_evaluation_is_added_to_the_runs_report(run, command, toy_npz):
    before = (run / "README.md").read_text()
    had = len((run / "evaluations.jsonl").read_text().splitlines()) if "Eval" in before else 0
    assert command("knn", run, toy_npz, "--k", 5, "--k", 9, "--no-baseline")[0] == 0
    assert command("linear", run, "--protocol", "quick", "--no-baseline")[0] == 0
    lines = (run / "evaluations.jsonl").read_text().splitlines()
    assert len(lines) == had + 2
    after = (run / "README.md").read_text()
    assert after.startswith(before.split("\n## Evaluations")[0].rstrip())
    assert after.count("## Evaluations") == 1
    assert "trained backbone, k 9, temperature 0.1" in after and "### linear (quick) on" in after
    # Asked to train again, the finished run keeps its report.
    mocokit.pretrain(str(run / "config.yaml"), out=run)
    assert (run / "README.md").read_text() == after


def test_a_run_that_cannot_be_written_is_judged_all_the_same(run, command, monkeypatch):
    def full(folder, record):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mocokit.run.readme.append", full)
    code, said = command("knn", run, "--no-baseline")
    assert code == 0 and "cannot add this to" in said and "No space left" in said


def test_the_two_linear_protocols_are_never_confused(run, command):
    code, said = command("linear", run, "--epochs", 2, "--no-baseline")
    assert code == 0 and "the linear protocol of MoCo v2" in said
    assert "(the paper's are 100 and 30)" in said and "quick" not in said.split("note")[0]
    code, said = command("linear", run, "--protocol", "quick")
    assert code == 0 and "not the paper's protocol" in said and "a random crop of area" in said
    code, said = command("linear", run, "--protocol", "quick", "--train-views", "centre")
    assert code == 0 and "a random crop" not in said
    for words in (["--lr", 1], ["--epochs", 2], ["--epochs", 2, "--lr", 1]):
        code, said = command("linear", run, "--protocol", "quick", *words)
        assert code == 2 and "--epochs and --lr belong to --protocol paper" in said
    for words in ([], ["--protocol", "paper"]):
        code, said = command("linear", run, *words, "--train-views", "centre")
        assert code == 2 and "--train-views belongs to --protocol quick" in said


def test_finetune_with_shares_of_the_labels(run, command, monkeypatch):
    monkeypatch.setattr("mocokit.protocols.finetune.LEAST_STEPS", 4)
    before = (run / "backbone.safetensors").read_bytes()
    code, said = command("finetune", run, "--percent", 10, "--percent", 100, "--epochs", 2)
    assert code == 0 and "trained backbone, labels 10 %" in said
    assert "random weights, labels 100 %" in said and "Nesterov" in said
    record = json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])
    assert [one["images_used"] for one in record["results"]] == [16, 16, 160, 160]
    assert (run / "backbone.safetensors").read_bytes() == before


@pytest.mark.parametrize("which", [".", "last.pt", "backbone.safetensors", "checkpoints"])
def test_whatever_names_a_run_is_the_same_network(run, which):
    path = sorted((run / which).glob("*.pt"))[-1] if which == "checkpoints" else run / which
    opened = open_model(path, CPU)
    assert opened.subject.weights == weights_hash(mocokit.load(run))
    assert opened.folder.path.resolve() == run.resolve()
    assert opened.subject.spec.mean == (0.5, 0.5, 0.5) and opened.subject.width == 64
    assert not opened.subject.network.training


def test_the_head_is_another_subject(run, command):
    opened = open_model(run, CPU, layer="head")
    assert opened.subject.width == 128
    views = torch.randn(4, 3, 32, 32)
    state = load_file(run / "backbone.safetensors")
    assert all(
        torch.equal(opened.subject.network.backbone.state_dict()[k], state[k]) for k in state
    )
    assert opened.subject.features(views).shape == (4, 128)
    code, said = command("knn", run, "--layer", "head", "--no-baseline")
    assert code == 0 and "trained, head's output" in said and "head features" in said
    with pytest.raises(UserError, match="give the run folder"):
        open_model(run / "backbone.safetensors", CPU, layer="head")


@pytest.mark.parametrize("layer", ["backbone", "head"])
def test_features_of_an_encoder_in_bfloat16_are_float32(run, toy_npz, layer):
    exact, coarse = (
        open_model(run, CPU, layer=layer, precision=precision).subject
        for precision in ("float32", "bfloat16")
    )
    views = torch.randn(8, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = exact.network(views)
    assert expected.dtype == torch.bfloat16
    found = coarse.features(views)
    assert found.dtype == exact.features(views).dtype == torch.float32
    assert torch.equal(found, expected.float())
    scale = exact.features(views).abs().max()
    assert 0 < (found - exact.features(views)).abs().max() < 0.05 * scale
    source = open_data(toy_npz).validation
    tables = [features_of(subject, source).rows for subject in (exact, coarse)]
    assert tables[1].dtype == np.float32
    assert 0 < np.abs(tables[0] - tables[1]).max() < 0.05 * np.abs(tables[0]).max()


@pytest.mark.parametrize("which", ["run", "head", "file", "of others", "timm"])
def test_the_untrained_network_is_the_one_of_the_seed_that_is_asked_for(
    run, tmp_path, monkeypatch, which
):
    """That with which a training of this seed would begin. The trained one has no part in it."""
    import timm

    made, layer = timm.create_model, "head" if which == "head" else "backbone"
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **o: made(name, **o))
    place = {"file": run / "backbone.safetensors", "timm": "resnet18"}.get(which, run)
    if which == "of others":
        place = tmp_path / "resnet18.pth"
        torch.save(made("resnet18").state_dict(), place)

    def first(seed):
        if which in ("of others", "timm"):
            seed_libraries(seed, 0, Slot.INITIALISE)
            return build_backbone("resnet18")
        encoder = build_encoder(replace(recipes.demo(), {"seed": seed}))
        return encoder if layer == "head" else encoder.backbone

    opened = {seed: open_model(place, CPU, layer=layer, seed=seed) for seed in (0, 1)}
    found = [weights_hash(one.untrained().network) for one in opened.values()]
    assert found == [weights_hash(first(seed)) for seed in opened] and len(set(found)) == 2
    assert weights_hash(opened[1].untrained().network) == found[1]  # however often
    if which != "timm":  # whose weights are drawn here
        assert len({one.subject.weights for one in opened.values()} - set(found)) == 1


def test_an_exported_file_alone_is_enough(run, tmp_path, toy_npz, command):
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((run / "backbone.safetensors").read_bytes())
    code, said = command("knn", alone, toy_npz)
    assert code == 0 and "--json FILE writes it down" in said


def test_random_weights_by_name(command, toy_npz):
    code, said = command("knn", "random:resnet_tiny", toy_npz, "--size", 32)
    assert (
        code == 0
        and "random resnet_tiny, k " in said
        and "batch-norm statistics of the training" in said
    )
    # There is no baseline of a baseline, but the images themselves.
    assert len(said.split("temperature 0.1 │")) == 3 and "raw pixels, centred, k " in said
    seeds = [open_model("random:resnet_tiny", CPU, seed=seed).subject.weights for seed in (0, 0, 1)]
    assert seeds[0] == seeds[1] != seeds[2]


def test_a_timm_model_brings_its_own_view(monkeypatch):
    import timm

    made = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **o: made(name, **o))
    opened = open_model("resnet18.a1_in1k", CPU)
    assert opened.subject.width == 512 and opened.subject.name == "timm resnet18.a1_in1k"
    assert opened.subject.spec.interpolation == "bicubic" and opened.subject.spec.size == 224
    assert opened.untrained().weights != opened.subject.weights
    config = {"input_size": (3, 224, 224), "crop_pct": 0.875, "interpolation": "bilinear"}
    config |= {"mean": (0.1, 0.2, 0.3), "std": (1, 1, 1)}
    spec = timm_spec(config)
    assert (spec.size, spec.resize, spec.mean) == (224, 256, (0.1, 0.2, 0.3))


def test_timm_without_a_connection_says_so(monkeypatch):
    import timm

    def offline(name, **options):
        raise OSError("We couldn't connect")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        UserError, match="cannot download the weights of resnet18 .*random:resnet18"
    ):
        open_model("resnet18", CPU)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["knn", "NOTHING", "{toy}"], "there is no run, checkpoint or timm model"),
        (["knn", "resnet81", "{toy}"], "did you mean resnet"),
        (["knn", "random"], "name the images to score on"),
        (["knn", "random:resnet_tiny", "{photos}/day 0"], "has no labels"),
        (["knn", "random:resnet_tiny", "none.npz"], "there are no images at none.npz"),
        (["knn", "random:nonet", "{toy}"], "random:nonet: there is no such model; did you mean"),
        (["knn", "random:resnet_tiny", "cifar01"], "did you mean cifar10?"),
        (["knn", "{run}", "x-{{000.."], "write {000..146}"),
        (["knn", "{run}", "{run}"], "is a run folder, not images; leave it out"),
        (["knn", "{run}", "{run}/README.md"], "is a file of another kind"),
        (["knn", "{run}", "--json", "{run}"], "cannot write"),
        (["knn", "{run}", "--k", "0"], "k = 0: must be a whole number of at least 1"),
        (["knn", "{run}", "--temperature", "0"], "temperature = 0.0: must be a number above 0"),
        (["knn", "{run}/checkpoints"], "there is no backbone at"),
        (["knn", "{photos}"], "is no run folder"),
        (["linear", "{run}", "--epochs", "0"], "epochs = 0: must be a whole number of at least 1"),
        (["finetune", "{run}", "--percent", "0"], "above 0"),
        (["finetune", "{run}", "--layer-decay", "2"], "at most 1"),
        (["finetune", "{run}", "--precision", "float16"], "take bfloat16 or float32"),
        (["knn", "{run}", "--device", "cuda:9"], "device cuda:9"),
        (["knn", "random", "{toy}", "--layer", "head"], "random has no head"),
        (["knn", "{run}", "--json", "{run}/none/x.json"], "cannot write"),
    ],
)
def test_mistakes_exit_2_with_a_sentence(run, toy_npz, photos, command, words, sentence):
    code, said = command(*(w.format(run=run, toy=toy_npz, photos=photos) for w in words))
    assert code == 2 and sentence in said and "Traceback" not in said


def test_a_diverging_probe_exits_1_with_its_remedy(run, command):
    code, said = command("linear", run, "--epochs", 3, "--lr", "1e38")
    assert code == 1 and "--protocol quick" in said and "nan" not in said.lower()


def toy_source(count, classes=3, labelled=True):
    images = np.random.default_rng(0).integers(0, 255, (count, 8, 8, 3), np.uint8)
    return ArraySource(images, np.arange(count) % classes if labelled else None, "toy")


def test_tasks():
    train, test = toy_source(30), toy_source(9)
    both = labelled_split(train, test, seed=0)
    assert len(both.train_numbers) == 30 and len(both.test_numbers) == 9 and not both.leave_one_out
    alone = labelled_split(train, None, seed=0, leave_one_out=True)
    assert alone.leave_one_out and alone.test is alone.train
    held = labelled_split(train, toy_source(9, labelled=False), seed=0)
    assert len(held.test_numbers) == 6 and not set(held.test_numbers) & set(held.train_numbers)
    share = both.with_share(0.1, 0)
    assert len(share.train_numbers) == 3 and sorted(share.train_labels) == [0, 1, 2]
    with pytest.raises(UserError, match="no labels"):
        labelled_split(toy_source(9, labelled=False), None, seed=0)
    assert labelled_split(train, toy_source(20, classes=5), seed=0).classes == tuple("01234")


def test_leave_one_out_from_the_command_line(run, command, tmp_path):
    """Every image twice: each finds its double, and would find itself."""
    pixels = np.random.default_rng(0).integers(0, 255, (30, 32, 32, 3), np.uint8)
    images, labels = np.concatenate([pixels, pixels]), np.concatenate([np.arange(30)] * 2)
    np.savez(tmp_path / "twice.npz", train_images=images, train_labels=labels)
    np.savez(tmp_path / "once.npz", train_images=pixels, train_labels=np.arange(30))
    code, said = command("knn", run, tmp_path / "twice.npz", "--k", 1, "--no-baseline")
    assert code == 0 and "temperature 0.1 │ 100.0%" in said
    assert "each left out of its own vote" in said
    code, said = command("knn", run, tmp_path / "once.npz", "--k", 1, "--no-baseline")
    assert code == 2 and "once has one image per class, so no image has another one" in said


def test_layer_wise_rates():
    model = Classifier(build_backbone("resnet_tiny"), 64, 3)
    groups = parameter_groups(model, 0.1, 0.5)
    rates = [group["lr"] for group in groups]
    assert rates == pytest.approx([0.0125, 0.025, 0.05, 0.1]) and rates[-1] == 0.1
    listed = [p for group in groups for p in group["params"]]
    assert len(listed) == len(list(model.parameters())) == len(set(map(id, listed)))
    assert any(p is model.backbone.conv1.weight for p in groups[0]["params"])
    assert block_of("layer1.0.conv1.weight") == "layer1.0" and block_of("conv1.weight") == ""
    assert block_of("blocks.3.attn.qkv.bias") == "blocks.3"


def test_few_labels_make_more_epochs():
    plan = Plan(epochs=30, batch_size=128)
    assert plan.epochs_for(50_000) == 30 and plan.epochs_for(500) == 100
    assert plan.epochs_for(384) == 134  # of 3 steps; 133 would be 399
    for images in range(1, 3000):
        epochs, steps = plan.epochs_for(images), len(range(0, images, 128))
        assert epochs * steps >= 400 and (epochs == 30 or (epochs - 1) * steps < 400)
        ahead = f"{images:,} labelled images, {epochs} epochs of them, {epochs * steps:,} steps"
        assert plan.ahead(images).partition(" (")[::2] == (
            ahead, "more than --epochs 30, for at least 400 steps)" if epochs > 30 else ""
        )  # fmt: skip


def test_the_new_layer_starts_without_an_opinion():
    model = Classifier(nn.Flatten(), 12, 4)
    assert bool((model(torch.randn(2, 3, 2, 2)) == 0).all())


def test_folder_of(tmp_path, run):
    assert folder_of(tmp_path) is None and folder_of(run / "README.md").path == run
