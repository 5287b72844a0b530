"""A run against values that do not come from the run: by hand, from a formula, or "differs from".

Stopped = straight, three processes = one, packed = unpacked compare the program with itself, and a
fault that both sides share passes. Here the loop is watched while it trains a small network.
"""

import copy
import json
import math
import os
import shutil
import signal
from itertools import chain

import numpy as np
import pytest
import stubs
import torch
from built import BATCH, IMAGES, Built
from PIL import Image
from reference_views import crop_exact, picture
from torch.nn import functional as F

from mocokit import chance
from mocokit.chance import Slot
from mocokit.engine import checkpoint
from mocokit.engine.due import Due
from mocokit.engine.world import World
from mocokit.errors import Interrupted, UserError
from mocokit.methods import losses
from mocokit.methods.method import KeyGroups, NoLeak, Step
from mocokit.methods.moco import MoCo
from mocokit.methods.pieces import GroupPlan
from mocokit.methods.simclr import SimCLR
from mocokit.nets.batchnorm import set_groups
from mocokit.run import begin, build, messages
from mocokit.run.begin import begun
from mocokit.run.build import settle
from mocokit.run.recording import Recording, finish
from mocokit.settings import get, methods
from mocokit.views.params import draw_table
from mocokit.views.views import ViewsOnDemand, make_views

pytestmark = pytest.mark.usefixtures("no_scores")

PER_EPOCH, STEPS = 4, 8
SIDE = 20  # of the images, and of their canvases: no crop has more pixels to give
SYMMETRIC = {"method.symmetric": True}


def lines(built):
    text = built.run.folder.metrics.read_text().splitlines()
    return [json.loads(line) for line in text]


def order(epoch, seed=0):
    return chance.Order(seed, epoch, IMAGES)[np.arange(IMAGES)]


def views_by_hand(spec, images, step, number, seed=0):
    """View `number` of the images of a step, and which they are."""
    epoch, place = divmod(step, PER_EPOCH)
    index = order(epoch, seed)[place * BATCH : (place + 1) * BATCH]
    sides = np.full(BATCH, SIDE), np.full(BATCH, SIDE)
    table = draw_table(spec, seed, epoch, index, number, *sides)
    pixels = torch.from_numpy(images[index]).flatten()
    return make_views(spec, table, pixels, *sides, "cpu"), index


BY_HAND = {
    "method.groups": 1, "method.queue_size": 80, "method.momentum": 0.9, "optim.lr": 0.5,
    "method.momentum_schedule": "cosine", "log.every_steps": 1, "seed": 3,
}  # fmt: skip
BOTH = {"method.symmetric": True, "net.predictor": True}


@pytest.mark.parametrize("changes", [{}, BOTH], ids=["mocov2", "symmetric-with-predictor"])
def test_the_loop_is_the_papers_algorithm_by_hand(small, tmp_path, changes):
    """Eight steps of MoCo in plain torch, with one batch-norm group: views, rates, queue, norms."""
    built = Built(small, BY_HAND | changes, tmp_path / "run")
    encoder, predictor = copy.deepcopy((built.method.encoder, built.method.predictor))
    key_encoder, queue = copy.deepcopy(encoder), built.method.queue.rows.clone()
    for network in (encoder, predictor, key_encoder):
        set_groups(network.train(), 1)
    trained = [*encoder.parameters(), *predictor.parameters()]
    sgd = torch.optim.SGD(trained, lr=1.0, momentum=0.9, weight_decay=1e-4)
    images, momentum = np.load(small)["train_images"], 0.9 ** (BATCH / 256)
    expected = {"loss": [], "grad_norm": [], "lr": [], "key_momentum": []}
    for step in range(STEPS):
        views = [
            views_by_hand(built.specs[name], images, step, number, seed=3)[0]
            for number, name in enumerate(("query", "key"))
        ]
        pairs = [views, views[::-1]] if changes else [views]
        with torch.no_grad():
            keys = [F.normalize(key_encoder(key)) for _, key in pairs]
        loss = 0
        for (query, _), k in zip(pairs, keys, strict=True):
            q = F.normalize(predictor(encoder(query)))
            logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / 0.2
            loss = loss + F.cross_entropy(logits, torch.zeros(BATCH, dtype=torch.long))
        sgd.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in trained))
        rate = 0.5 * BATCH / 256 * (1 + math.cos(math.pi * (step // PER_EPOCH) / 2)) / 2
        sgd.param_groups[0]["lr"] = rate
        sgd.step()
        rises = 1 - (1 - momentum) * (1 + math.cos(math.pi * (step + 1) / STEPS)) / 2
        with torch.no_grad():
            for mine, theirs in zip(encoder.parameters(), key_encoder.parameters(), strict=True):
                theirs.mul_(rises).add_(mine, alpha=1 - rises)
        queue = torch.cat([queue, *keys])[-80:]
        found = float(loss.detach()), norm, rate, rises
        for values, value in zip(expected.values(), found, strict=True):
            values.append(value)
    method = built.trained()
    recorded = lines(built)
    for name, values in expected.items():
        assert [line[name] for line in recorded] == pytest.approx(values, rel=1e-3), name
    assert [line["epoch"] for line in recorded] == [0] * 4 + [1] * 4
    at = int(method.queue.pointer)
    assert at == STEPS * BATCH * len(pairs) % 80
    newest_last = torch.cat([method.queue.rows[at:], method.queue.rows[:at]])
    torch.testing.assert_close(newest_last, queue, atol=1e-3, rtol=0)
    hands = {"encoder": encoder, "key_encoder": key_encoder, "predictor": predictor}
    for name, network in hands.items():
        ours = getattr(method, name).state_dict()
        for key, value in network.state_dict().items():
            torch.testing.assert_close(ours[key], value, atol=1e-3, rtol=2e-3, msg=f"{name}.{key}")


class Watched:
    """What each forward and update of a run is given."""

    def __init__(self, monkeypatch, method=MoCo):
        self.views, self.index, self.steps, self.progress, self.scales = [], [], [], [], []
        self.library = []
        forward, update = method.forward, method.update

        def see(this, views, index, step):
            self.views.append([view[:].clone() for view in views])
            self.index.append(index.numpy().copy())
            self.steps.append(step)
            self.library.append(torch.initial_seed())
            return forward(this, views, index, step)

        def follow(this, keep, step, progress):
            self.progress.append((step, progress))
            update(this, keep, step, progress)

        monkeypatch.setattr(method, "forward", see)
        monkeypatch.setattr(method, "update", follow)


def test_each_step_has_its_own_images_views_and_numbers(small, tmp_path, monkeypatch):
    seen = Watched(monkeypatch)
    built = Built(small, {"seed": 7}, tmp_path / "run")
    built.trained()
    images = np.load(small)["train_images"]
    for step in range(STEPS):
        for number, name in enumerate(("query", "key")):
            views, index = views_by_hand(built.specs[name], images, step, number, seed=7)
            assert torch.equal(seen.views[step][number], views), (step, name)
        assert seen.index[step].tolist() == index.tolist()
        assert seen.steps[step] == Step(7, step, BATCH, 1.0)
    assert seen.progress == [(step, (step + 1) / STEPS) for step in range(STEPS)]
    assert seen.library == [chance.library_seed(7, step) for step in range(STEPS)]
    assert len({*seen.library}) == STEPS
    # The same image in two epochs, and its two views in one, differ.
    first, second = (seen.index[0].tolist(), seen.index[4].tolist())
    assert first != second
    both = sorted({*np.concatenate(seen.index[:4])} & {*np.concatenate(seen.index[4:])})
    assert len(both) > IMAGES / 2
    for image in both[:9]:
        at = [
            (step, int(np.flatnonzero(seen.index[step] == image)[0]))
            for step in range(STEPS)
            if image in seen.index[step]
        ]
        drawn = [seen.views[step][number][row] for step, row in at for number in (0, 1)]
        for one in range(len(drawn)):
            assert not any(torch.equal(drawn[one], other) for other in drawn[one + 1 :])


@pytest.mark.parametrize("on_demand", [False, True])
def test_a_method_is_told_where_each_view_was_cut(tmp_path, monkeypatch, on_demand):
    """Canvas, box and mirror give each view again, by PIL; no image is square."""
    monkeypatch.setattr("mocokit.run.state.HELD_VIEWS", 0)
    folder = tmp_path / "images"
    folder.mkdir()
    sizes = [(height, width) for height in range(20, 40, 2) for width in range(21, 37, 2)]
    for number, size in enumerate(sizes):
        Image.fromarray(picture(*size, number)).save(folder / f"{number:02}.png")
    changes = {"views.order": ("crop", "flip"), "views.mean": (0, 0, 0), "views.std": (1, 1, 1)}
    changes |= {"train.micro_batch": 16} if on_demand else {}
    built = Built(folder, changes, tmp_path / "run")
    batch = built.loader.batch_at(0)
    views = built.run.views(0, batch)
    names = [built.splits.train.describe(int(number)) for number in batch.index]
    pixels = [np.asarray(Image.open(folder / name)) for name in names]
    assert len(views) == 2 and not np.array_equal(views[0].boxes, views[1].boxes)
    for view in views:
        assert isinstance(view.images, ViewsOnDemand) == on_demand and len(view) == BATCH
        assert view.canvas.tolist() == [[*image.shape[:2]] for image in pixels]
        assert (view.boxes[:, :2] >= 0).all() and {*view.flipped.tolist()} == {False, True}
        assert (view.boxes[:, :2] + view.boxes[:, 2:] <= view.canvas).all()
        whole = view[:]
        for row, image in enumerate(pixels):
            expected = crop_exact(image, view.boxes[row], 16)
            expected = expected.flip(2) if view.flipped[row] else expected
            torch.testing.assert_close(whole[row], expected, atol=1 / 255, rtol=0)
        rows = np.array([5, 0, 31])
        assert torch.equal(view[rows], whole[rows]) and torch.equal(view[3:9], whole[3:9])


RATES = {
    "by-epoch": ({}, [1] * 4 + [0.5] * 4),
    "from-1": ({"optim.first_epoch": 1}, [0.5] * 4 + [0] * 4),
    "smooth": (
        {"optim.per": "step"},
        [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)],
    ),
    "warm-up": ({"optim.warmup_epochs": 1.0}, [1 / 5, 2 / 5, 3 / 5, 4 / 5] + [0.5] * 4),
    "drops": (
        {"optim.schedule": "steps", "optim.drops": (0.25, 0.5), "optim.per": "step"},
        [1] * 2 + [0.1] * 2 + [0.01] * 4,
    ),
}


@pytest.mark.parametrize(
    ("kind", "name"), [*((kind, "sgd") for kind in RATES), ("smooth", "adamw"), ("smooth", "lars")]
)
def test_the_rate_of_a_step_is_in_effect_when_it_is_taken(small, tmp_path, monkeypatch, kind, name):
    changes, shares = RATES[kind]
    built = Built(small, {**changes, "optim.name": name}, tmp_path / "run")
    taken, step = [], type(built.optimizer).step
    monkeypatch.setattr(
        type(built.optimizer),
        "step",
        lambda self, *rest: taken.append(self.param_groups[0]["lr"]) or step(self, *rest),
    )
    built.trained()
    peak = 0.03 * BATCH / 256
    assert taken == pytest.approx([peak * share for share in shares], rel=1e-9, abs=1e-15)


def test_the_key_encoder_takes_over_the_calibrated_head(small, tmp_path, monkeypatch):
    """Scaled on the first group of the first query views, before the first forward."""
    seen, states, forward = Watched(monkeypatch), [], MoCo.forward

    def see(this, views, index, step):
        if not states:
            states.append(copy.deepcopy(this.eval()))
            this.train()
        return forward(this, views, index, step)

    monkeypatch.setattr(MoCo, "forward", see)
    built = Built(small, {"net.calibrate_head": True}, tmp_path / "run")
    drawn = copy.deepcopy(built.method.encoder)
    built.trained()
    (method,) = states
    keys = dict(method.key_encoder.named_parameters())
    for name, parameter in method.encoder.named_parameters():
        assert torch.equal(parameter, keys[name]), name
    assert not torch.equal(method.encoder.head[2].weight, drawn.head[2].weight)
    for mine, before in zip(
        method.encoder.backbone.parameters(), drawn.backbone.parameters(), strict=True
    ):
        assert torch.equal(mine, before)
    before = dict(drawn.named_buffers())
    for name, buffer in method.encoder.named_buffers():
        assert torch.equal(buffer, before[name]), f"{name}: calibration is no step"
    set_groups(method.encoder.train(), 1)
    with torch.no_grad():
        outputs = method.encoder(seen.views[0][0][: BATCH // 4])
    torch.testing.assert_close(outputs.mean(0), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(outputs.std(0), torch.ones(8), atol=1e-3, rtol=0)


@pytest.mark.parametrize("enqueue", ["one", "both"])
def test_keys_of_either_view_join_the_queue_by_their_draw(small, tmp_path, monkeypatch, enqueue):
    built = Built(small, SYMMETRIC | {"method.enqueue": enqueue}, tmp_path / "run")
    keys, chosen = [], []
    encode = MoCo.keys
    monkeypatch.setattr(MoCo, "keys", lambda *rest: keys.append(encode(*rest)) or keys[-1])
    for number in range(24):
        batch = built.loader.batch_at(0)
        keys.clear()
        step = Step(0, number, BATCH)
        kept = built.method.train()(
            built.run.views(0, batch), torch.from_numpy(batch.index), step
        ).keep
        if enqueue == "both":
            assert torch.equal(kept, torch.cat(keys))
            return
        view = int(chance.uniform(0, number, 0, 0, Slot.ENQUEUE) * 2)
        assert torch.equal(kept, keys[view]) and not torch.equal(kept, keys[1 - view])
        chosen.append(view)
    assert {*chosen} == {0, 1}


def test_milestones_are_kept_for_good(small, tmp_path):
    changes = {"train.epochs": 4, "save.keep": 1, "save.milestone_epochs": 2}
    built = Built(small, changes | {"save.every_steps": 3}, tmp_path / "run")
    built.trained()
    assert checkpoint.steps(built.run.folder.checkpoints) == [2 * PER_EPOCH, 4 * PER_EPOCH]


def test_a_steps_numbers_are_of_its_seed_and_number():
    """Key shuffles, views whose keys join the queue, and a bank's negatives are drawn so."""
    for seed, number in ((0, 0), (0, 3), (7, 3)):
        for slot in (Slot.KEY_SHUFFLE, Slot.ENQUEUE, Slot.BANK_NEGATIVES):
            drawn = Step(seed, number, 40).draw(slot, 40)
            by_hand = [float(chance.uniform(seed, number, n, 0, slot)) for n in range(40)]
            assert drawn.tolist() == by_hand
    plan = GroupPlan(40, 5, None)
    order = plan.key_permutation(Step(7, 3, 40), True)
    assert order.tolist() == np.argsort(chance.uniform(7, 3, np.arange(40), 0, 200)).tolist()
    assert GroupPlan(40, 2, None).key_permutation(Step(7, 3, 40), True).tolist() == order.tolist()
    assert plan.key_permutation(Step(7, 3, 40), False).tolist() == list(range(40))
    alone = GroupPlan(40, 1, None)
    assert alone.key_permutation(Step(7, 3, 40), True).tolist() == list(range(40))


@pytest.mark.parametrize("seed", [0, 5])
def test_scored_images_are_drawn_from_all(small, tmp_path, seed):
    """Not the first ones, which in a folder are of one class."""
    changes = {"seed": seed, "monitor.bank": 30, "monitor.images": 30}
    built = Built(small, changes, tmp_path / "run")
    for numbers, slot in ((built.monitor.bank_numbers, 110), (built.health.numbers, 115)):
        order = np.argsort(chance.uniform(seed, 0, np.arange(IMAGES), 0, slot), kind="stable")
        assert numbers.tolist() == sorted(order[:30].tolist()) != list(range(30))
    views = built.run.views(0, built.loader.batch_at(0))
    found = built.health.run(built.method.encoder, views)
    # No rank exceeds the number of images: 30 features of 64 numbers, and projections to 8.
    assert (found["rankme_of"], found["rankme_head_of"]) == (30, 8)


def test_scores_are_taken_in_the_precision_of_the_run(small, tmp_path, monkeypatch):
    """kNN and health both, and their own products outside of it."""
    built = Built(small, {"engine.precision": "bfloat16"}, tmp_path / "run")
    found, both = [], type(built.method.encoder).both

    def see(self, images):
        found.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        return both(self, images)

    monkeypatch.setattr(type(built.method.encoder), "both", see)
    built.health.run(built.method.encoder, built.run.views(0, built.loader.batch_at(0)))
    assert found == [torch.bfloat16]
    assert dict(built.monitor.run(built.method.encoder))
    assert found == [torch.bfloat16] * 3
    assert not torch.is_autocast_enabled("cpu")


KEEP = {"data.last": "keep"}
WORLDS = {  # settings, and how many processes at most: by groups of 8 of 32 images, and of 8 left
    "drop": ({}, 4),
    "keep": (KEEP, 2),
    "keep, none left": (KEEP | {"train.batch_size": 34}, 4),
    "one group left": (KEEP | {"method.groups": 4}, 1),
    "whole": ({"method.batch_norm": "whole", "train.batch_size": 16}, 16),
    "whole, keep": (KEEP | {"method.batch_norm": "whole", "train.batch_size": 16}, 8),
}


@pytest.mark.parametrize("name", WORLDS)
def test_as_many_processes_as_the_smallest_batch_has_parts(small, tmp_path, name):
    """Then each holds some of every batch, and all of them the whole; with one more, no run."""
    changes, most = WORLDS[name]
    built = Built(small, changes, tmp_path / "run")
    settings, source = built.run.settings, built.run.unread()

    def loader(rank, world):
        cpu, known = torch.device("cpu"), built.run.bad.known
        return build.build_loader(settings, source, SIDE, World(rank, world), cpu, 0, known)

    whole = loader(0, 1)
    last = -(-IMAGES // settings.train.batch_size) - ("data.last" not in changes)
    parts = [loader(rank, most) for rank in range(most)]
    for step in (0, last - 1, last):
        shares = [part.batch_at(step).index.tolist() for part in parts]
        assert all(shares) and [*chain(*shares)] == whole.batch_at(step).index.tolist()
    with pytest.raises(UserError, match=f"{most + 1} processes"):
        loader(0, most + 1)


def test_the_leak_of_one_batch_norm_is_checked_on_one_process(small, tmp_path, monkeypatch):
    """Over several processes its share need not be whole groups: then the reason is told."""
    for changes in ({}, {"method.batch_norm": "whole"}, {"method.groups": 1}):
        method = Built(small, changes, tmp_path / "run").method
        assert isinstance(method.leak, KeyGroups)
        with monkeypatch.context() as patch:
            patch.setattr("mocokit.methods.moco.rank_and_world", lambda: (0, 2))
            assert isinstance(method.leak, NoLeak if method.whole else KeyGroups)


STARTS = {
    "own": (
        {"recipe": "mocov2", "optim.lr": 0.5, "method.group_size": 4},
        {
            "optim.lr": "0.03 in the recipe -> 0.5",
            "method.group_size": "32 in the recipe -> 4",
            "train.batch_size": "256 in the recipe -> 32",
            "net.backbone": "resnet50 in the recipe -> resnet_tiny",
            "views.blur_sigma": "(0.1, 2.0) in the recipe -> (0.1, 1.0)",
        },
        "8 steps of 32 images in 8 batch-norm groups, lr 0.0625, key momentum 0.999875, ",
    ),
    "another": (
        {"recipe": "simclr", "method.name": "simclr", "method.batch_norm": "whole"},
        {"views.size": "224 in the recipe -> 16", "train.epochs": "1000 in the recipe -> 2"},
        "8 steps of 32 images in 1 batch-norm group, lr ",
    ),
    "nobody's": ({}, {}, "8 steps of 32 images in 4 batch-norm groups, lr "),
}


@pytest.mark.parametrize("name", STARTS)
def test_the_start_tells_what_is_in_effect_and_what_the_recipe_has(name, small, tmp_path, capsys):
    """First the recipe's value, then the one in its place; of the machine nothing."""
    changes, expected, steps = STARTS[name]
    built = Built(small, changes, tmp_path / "run")
    with begun(built.run):
        messages.start(built.run)
    found = capsys.readouterr().err
    assert steps in found and f"{built.settings.recipe}: {IMAGES} images, 4 classes" in found
    told = dict(line.strip().split(": ", 1) for line in found.splitlines() if " -> " in line)
    assert expected.items() <= told.items()
    assert bool(told) == bool(expected)
    assert not any(path.startswith(("engine.", "data.path")) for path in told)
    assert ("key momentum" in found) == (name != "another")


@pytest.mark.parametrize(
    ("groups", "micro", "world", "piece"),
    [
        (4, None, 1, 16),  # groups of 8 in a batch of 32
        (4, None, 2, 8),
        (4, None, 4, None),  # one group each
        (4, 32, 1, 16),
        (4, 16, 1, 8),
        (4, 16, 2, 8),
        (4, 32, 2, 8),  # a process holds its share of the batch at most
        (4, 8, 1, None),
        (4, 12, 1, 8),
        (2, None, 1, 16),
        (2, None, 2, None),
        (16, None, 2, 8),
        (16, 4, 2, 2),
    ],
)
def test_out_of_memory_names_half_of_what_a_process_held(
    small, tmp_path, groups, micro, world, piece
):
    changes = {"method.groups": groups, "train.micro_batch": micro}
    run = Built(small, changes, tmp_path / "run").run
    run.world, run.step = World(0, world), 6
    said = run.out_of_memory()
    assert said.startswith("step 7 does not fit into the memory of cpu")
    if piece is None:
        assert f"even in pieces of one group of {BATCH // groups} images" in said
        assert "lower train.batch_size or views.size" in said
    else:
        assert f"--set train.micro_batch={piece}, which gives the same result" in said


def test_out_of_memory_with_one_statistic_names_no_piece(small, tmp_path):
    run = Built(small, {"method.batch_norm": "whole"}, tmp_path / "run").run
    assert "lower train.batch_size, or set method.batch_norm=groups" in run.out_of_memory()
    assert "micro_batch" not in run.out_of_memory()


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({"method.group_size": 8}, 2),
        ({"method.groups": 3}, 1),
        ({"method.batch_norm": "whole"}, 16),
    ],
)
def test_a_last_batch_takes_as_many_processes_as_it_has_parts(small, tmp_path, changes, most):
    """136 images in batches of 40 leave 16: two groups of 8, one group, or 16 single images."""
    changes = changes | {"train.batch_size": 40, "data.last": "keep"}
    built = Built(small, changes, tmp_path / "run")

    def loaders(world):
        run = built.run
        known = run.device, 0, run.bad.known
        return [
            build.build_loader(run.settings, run.unread(), run.bound, World(r, world), *known)
            for r in range(world)
        ]

    for world in {1, most}:
        parts = [loader.batch_at(3).index for loader in loaders(world)]
        assert [len(part) for part in parts] == [16 // world] * world
        assert np.concatenate(parts).tolist() == order(0)[120:].tolist()
    sentence = f"leaves a last batch of 16 images, too few for {most + 1} processes"
    with pytest.raises(UserError, match=sentence):
        loaders(most + 1)


def test_the_last_good_checkpoint_is_the_newest(small, tmp_path):
    built = Built(small, {}, tmp_path / "run")
    assert "no checkpoint was due before" in built.run.last_good()
    built.run.folder.path.mkdir()
    for step in (4, 8):
        checkpoint.save(built.run.folder.checkpoints, step, built.run.state())
    assert "checkpoint is " + str(tmp_path / "run/checkpoints/step-00000008.pt") in (
        built.run.last_good()
    )
    # What was read is saved: nothing writes it again before the next step.
    built.run.load(checkpoint.load(built.run.folder.checkpoints / checkpoint.name_of(8)))
    assert (built.run.step, built.run.saved) == (8, 8)


def test_what_was_just_written_is_kept_whatever_lies_after_it(small, tmp_path):
    run = Built(small, {"save.keep": 1}, tmp_path / "run").run
    run.folder.path.mkdir()
    for step in (2, 8):  # the latter is another run's
        checkpoint.save(run.folder.checkpoints, step, {})
    run.step = 4
    run.save()
    assert checkpoint.steps(run.folder.checkpoints) == [4, 8]


def test_copies_are_compared_where_it_is_due(small, tmp_path, monkeypatch):
    """As with several processes, of which one would be another."""
    compared = []
    monkeypatch.setattr("mocokit.train.compare_replicas", lambda *given: compared.append(given))
    monkeypatch.setattr(Due, "compare", lambda self, step: step % self.compare_steps == 0)
    built = Built(small, {"engine.compare_steps": 3}, tmp_path / "run")
    method = built.trained()
    assert compared == [(method, 3), (method, 6)]


def test_a_collapsed_encoder_is_at_chance_not_at_100_percent():
    """Its query is as near to every negative as to its key."""
    alike = F.normalize(torch.ones(16, 8))
    contrast = losses.Contrast(losses.InfoNCE(0.2), GroupPlan(16, 1, None))
    contrast(alike, alike, losses.Negatives(alike))
    metrics = contrast.metrics()
    assert float(metrics["contrast_top1"]) == 0.0
    assert float(metrics["feature_std"]) == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("micro", [8, BATCH, 2 * BATCH])
def test_simclr_counts_both_views_of_a_micro_batch(small, tmp_path, micro):
    """One that holds one view of the batch, but not both, is done in pieces too."""
    changes = {"method.name": "simclr", "train.micro_batch": micro}
    built, sizes = Built(small, changes, tmp_path / "run"), []
    built.method.encoder.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    batch = built.loader.batch_at(0)
    views, index = built.run.views(0, batch), torch.from_numpy(batch.index)
    built.method.train()(views, index, Step(0, 0, BATCH))
    assert max(sizes) == micro
    assert sum(sizes) == 2 * BATCH * (1 if micro == 2 * BATCH else 2)  # GradCache's second pass


HALF = {"engine.precision": "float16", "log.every_steps": 1, "train.epochs": 4}


class TestFloat16:
    """A CPU computes it slowly and overflows as a GPU does, which is what matters here."""

    @pytest.mark.parametrize("micro", [None, 8])
    def test_norm_and_scale(self, small, tmp_path, monkeypatch, micro):
        """The recorded norm is without the scale; each forward is told the scale in effect."""
        norms = {}
        for precision in ("float32", "float16"):
            with monkeypatch.context() as patch:
                seen = Watched(patch)
                scales, scale = [], torch.amp.GradScaler.scale
                patch.setattr(
                    torch.amp.GradScaler,
                    "scale",
                    lambda self, loss, s=scales, f=scale: (
                        s.append(self.get_scale()) or f(self, loss)
                    ),
                )
                changes = HALF | {"engine.precision": precision, "train.micro_batch": micro}
                changes["train.epochs"] = 2
                built = Built(small, changes, tmp_path / precision)
                if precision == "float16":
                    built.run.parts.scaler.load_state_dict(
                        built.run.parts.scaler.state_dict() | {"scale": 64.0, "growth_interval": 5}
                    )
                built.trained()
                norms[precision] = [line["grad_norm"] for line in lines(built)]
                assert [step.loss_scale for step in seen.steps] == scales
                if precision == "float16":
                    assert scales == [64.0] * 5 + [128.0] * 3
        assert norms["float16"][:4] == pytest.approx(norms["float32"][:4], rel=0.1)

    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"method.loss": "dclw", "method.symmetric": True},
            {"method.name": "simclr"},
            {"method.name": "memorybank"},
            {"method.name": "memorybank", "method.loss": "nce", "method.bank_negatives": 9},
        ],
        ids=["moco", "moco-coupled", "simclr", "bank", "bank-nce"],
    )
    def test_pieces_take_the_scale_out_again(self, small, tmp_path, changes):
        """A power of two, in float32: the gradients are the same numbers, and the whole step's."""
        gradients = []
        for micro, scale in ((None, 1.0), (8, 1.0), (8, 1024.0)):
            built = Built(small, changes | {"train.micro_batch": micro}, tmp_path / "run")
            batch = built.loader.batch_at(0)
            views, index = built.run.views(0, batch), torch.from_numpy(batch.index)
            step = Step(0, 0, BATCH, loss_scale=scale)
            (built.method.train()(views, index, step).loss * scale).backward()
            parts = [p.grad.flatten() / scale for p in built.method.trained()]
            gradients.append(torch.cat(parts))
        whole, pieces, scaled = gradients
        assert float(whole.norm()) > 0.01
        torch.testing.assert_close(pieces, scaled, atol=1e-7, rtol=1e-6)
        torch.testing.assert_close(pieces, whole, atol=1e-4, rtol=1e-3)

    def test_a_method_clips_what_is_unscaled(self, small, tmp_path, monkeypatch):
        class Clipping(stubs.SimSiam):
            clip = 0.01

        monkeypatch.setattr(methods, "_outside", {})
        methods.use("stubs:Clipping", Clipping)
        changes = {"method.name": "stubs:Clipping", "train.epochs": 1}
        built = Built(small, HALF | changes, tmp_path / "run")
        scaler, taken, step = built.run.parts.scaler, [], torch.optim.SGD.step
        scaler.load_state_dict(scaler.state_dict() | {"scale": 64.0})

        def see(self, *rest):
            gradients = [p.grad for group in self.param_groups for p in group["params"]]
            taken.append(float(torch.nn.utils.get_total_norm(gradients)))
            return step(self, *rest)

        monkeypatch.setattr(torch.optim.SGD, "step", see)
        built.trained()
        assert taken == pytest.approx([0.01] * 4, rel=1e-3)
        assert all(line["grad_norm"] > 0.02 for line in lines(built)), "recorded before it is cut"

    def test_resume_goes_on_with_the_scale(self, small, tmp_path, monkeypatch):
        """Straight and stopped agree; the scale is not the first one, and its growth is counted."""
        states, seen = {}, {}
        for name, stop_at in (("straight", None), ("stopped", 10)):
            with monkeypatch.context() as patch:
                if stop_at is not None:
                    update = MoCo.update

                    def stopping(self, keep, step, progress, update=update, at=stop_at):
                        update(self, keep, step, progress)
                        if step >= at:
                            os.kill(os.getpid(), signal.SIGTERM)

                    patch.setattr(MoCo, "update", stopping)
                    built = Built(small, HALF, tmp_path / name)
                    built.run.parts.scaler.load_state_dict(
                        built.run.parts.scaler.state_dict()
                        | {"scale": 2.0**20, "growth_interval": 3}
                    )
                    with pytest.raises(Interrupted):
                        built.trained()
                    assert 0 < built.run.step < 16
                    saved = built.run.parts.scaler.state_dict()
                    assert saved["scale"] not in (2.0**16, 2.0**20) and saved["_growth_tracker"]
            with monkeypatch.context() as patch:
                watched = Watched(patch)
                built = Built(small, HALF, tmp_path / name)
                if stop_at is None:
                    built.run.parts.scaler.load_state_dict(
                        built.run.parts.scaler.state_dict()
                        | {"scale": 2.0**20, "growth_interval": 3}
                    )
                built.trained()
                if stop_at is not None:
                    assert watched.steps[0].loss_scale == saved["scale"]
                states[name] = checkpoint.load(built.run.folder.last)
                seen[name] = [line["loss"] for line in lines(built)]
        for part in ("method", "optimizer", "scaler"):
            one, other = ({"": state[part]} for state in states.values())
            assert checkpoint.digest(one) == checkpoint.digest(other), part
        assert seen["straight"] == seen["stopped"]
        assert states["straight"]["scaler"]["_growth_tracker"] in (0, 1, 2)

    def test_a_skipped_step_leaves_all_as_it_was(self, small, tmp_path, monkeypatch):
        """Weights, velocities, key encoder and queue; only batch statistics and the scale move."""
        built = Built(small, HALF | {"train.epochs": 1}, tmp_path / "run")
        scaler = built.run.parts.scaler
        scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0**100})
        before = copy.deepcopy(built.method.state_dict())
        seen = Watched(monkeypatch)
        method = built.trained()
        assert not seen.progress and scaler.get_scale() == 2.0**96
        assert not built.optimizer.state_dict()["state"]
        for name, tensor in method.state_dict().items():
            moved = name.endswith(("running_mean", "running_var", "num_batches_tracked"))
            assert torch.equal(tensor, before[name]) != moved, name
        assert built.run.step == 4, "a step that is skipped counts"


def test_load_takes_back_all_that_state_gives(small, tmp_path):
    """Each part of a checkpoint, into a run that has another of each."""
    changes = {"engine.precision": "float16", "save.every_epochs": 0}
    one = Built(small, changes, tmp_path / "one")
    one.trained()
    one.run.bad.note(((7, "seven", "gone"), (9, "nine", "gone")), 2)
    state = {**one.run.state(), "step": 8}
    other = Built(small, changes | {"seed": 5}, tmp_path / "other").run
    other.load(copy.deepcopy(state))
    assert (other.step, other.saved, other.bad.first) == (8, 8, {7: 2, 9: 2})
    again = other.state()
    for part in ("method", "optimizer", "scaler", "bad_images"):
        assert checkpoint.digest({"": again[part]}) == checkpoint.digest({"": state[part]}), part
    assert {*state} - {"step"} == {
        "method", "optimizer", "scaler", "settings", "fingerprint", "bad_images", "processes",
        "instruction_set",
    }  # fmt: skip
    other.world = World(0, 3)
    assert other.state()["processes"] == 3
    assert state["fingerprint"] == one.splits.train.fingerprint and state["processes"] == 1


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        (1, 2, "was written by 1 process, now there are 2"),
        (2, 1, "was written by 2 processes, now there is 1"),
        (3, 2, "was written by 3 processes, now there are 2"),
        (2, 2, None),
    ],
)
def test_another_number_of_processes_is_told(
    small, tmp_path, monkeypatch, capsys, before, now, told
):
    built = Built(small, {}, tmp_path / "run")
    state = {**built.run.state(), "step": 0, "processes": before}
    monkeypatch.setattr(begin, "_newest", lambda run: state)
    built.run.world = World(0, now)
    with begun(built.run):
        pass
    said = " ".join(capsys.readouterr().err.split())
    assert ("the checkpoint was written by" in said) == (told is not None)
    assert told is None or told in said


@pytest.mark.parametrize(
    ("path", "stored", "default", "where"),
    [
        ("engine.precision", "float32", "bfloat16", "default_precision"),
        ("engine.precision", "bfloat16", "float32", "default_precision"),
        ("engine.threads", 3, 5, "default_threads"),
        ("engine.memory_format", "contiguous", "channels_last", None),
        ("engine.compile", True, False, None),
    ],
)
def test_auto_is_what_the_run_to_resume_has(small, monkeypatch, path, stored, default, where):
    """Else the machine decides; CUDA graphs alone change no number, so they are always anew."""
    if where is not None:
        monkeypatch.setattr(build, where, lambda *rest: default)
    asked = Built(small, {path: "auto"}, None).settings
    before = Built(small, {path: stored}, None).settings
    cpu = torch.device("cpu")
    assert get(settle(asked, cpu, None), path) == default
    assert get(settle(asked, cpu, before), path) == stored
    assert get(settle(before, cpu, asked), path) == stored, "what is stated stays"
    assert get(settle(asked, cpu, asked), path) == default, "0.1 stored fewer settings"
    graphs = Built(small, {"engine.cuda_graphs": "auto"}, None).settings
    has = Built(small, {"engine.cuda_graphs": True}, None).settings
    assert settle(graphs, cpu, has).engine.cuda_graphs is False


def test_metrics_are_shares_of_the_batch(small, tmp_path, monkeypatch):
    """What a forward gives is what is recorded, on one process, under its own name."""
    given, forward = [], SimCLR.forward

    def see(*rest):
        output = forward(*rest)
        given.append(
            (float(output.loss.detach()), {k: float(v) for k, v in output.metrics.items()})
        )
        return output

    monkeypatch.setattr(SimCLR, "forward", see)
    built = Built(small, {"method.name": "simclr", "log.every_steps": 3}, tmp_path / "run")
    built.trained()
    recorded = lines(built)
    assert [line["step"] for line in recorded] == [1, 3, 6, 8]
    for line in recorded:
        loss, metrics = given[line["step"] - 1]
        assert line["loss"] == pytest.approx(loss, rel=1e-5)
        assert {*metrics} == {"contrast_top1", "feature_std"} < {*line}
        for name, value in metrics.items():
            assert line[name] == pytest.approx(value, rel=1e-5)
    assert recorded[-1]["chance_loss"] == pytest.approx(math.log(1 + BATCH - 1), rel=1e-5)


def test_waiting_for_images_is_told_once_and_not_for_its_start(small, tmp_path, monkeypatch):
    run = Built(small, {}, tmp_path / "run").run
    record, told = Recording.__new__(Recording), []
    record.run, record._waits, record._advised = run, [], False
    monkeypatch.setattr(run.console, "note", told.append)
    for share, count in [(1.0, 2), (0.0, 5), (0.1, 9), (0.2, 4)]:
        for _ in range(count):
            record._advise(share)
            assert not told or (share == 0.2 and record._advised)
    record._advise(0.2)
    record._advise(0.2)
    assert len(told) == 1 and "of the time went into waiting for images" in told[0]


def test_what_a_finished_run_stands_on_is_there(small, tmp_path, monkeypatch):
    """Also where somebody made room while the last scores were taken."""
    built = Built(small, {}, tmp_path / "run")
    built.trained()
    built.run.hold = None
    shutil.rmtree(built.run.folder.checkpoints)
    monkeypatch.setattr(build, "build_monitor", lambda *rest: None)
    assert finish(built.run)["finished"]
    assert checkpoint.is_saved(built.run.folder.checkpoints, STEPS)
