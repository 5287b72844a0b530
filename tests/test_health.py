"""Health in the loop: it changes nothing, and the leak it measures is there."""

import json
from contextlib import suppress

import numpy as np
import pytest
import torch
from nets import small_encoder
from torch import nn

import mocokit
from mocokit.engine import checkpoint
from mocokit.health.advice import advise, curve
from mocokit.health.bn_leak import contrast_by_grouping
from mocokit.health.knn_monitor import KnnMonitor
from mocokit.health.verdict import verdict
from mocokit.methods.losses import InfoNCE
from mocokit.methods.method import Step
from mocokit.methods.moco import MoCo
from mocokit.methods.pieces import GroupPlan
from mocokit.nets.modes import evaluating

SMALL = {"engine.threads": 1, "log.every_steps": 1, "save.keep": 9}


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return checkpoint.load(folder / "last.pt")


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_with_and_without_monitor_every_bit_of_the_training_state_is_the_same(toy_npz, tmp_path):
    states = []
    for every in (0, 1):
        out = tmp_path / str(every)
        changes = SMALL | {"monitor.every_epochs": every}
        mocokit.pretrain("demo", toy_npz, out, epochs=3, batch_size=32, settings=changes)
        states.append(weights(out))
        scored = [line for line in lines(out) if "rankme" in line]
        assert len(scored) == (3 if every else 1)
    for part in ("method", "optimizer", "scaler"):
        assert same(states[0][part], states[1][part]), part
    assert states[0]["step"] == 15


def test_health_verdict_and_advice_are_recorded(toy_npz, tmp_path):
    changes = SMALL | {"monitor.every_epochs": 1}
    run = mocokit.pretrain("demo", toy_npz, tmp_path, epochs=5, batch_size=32, settings=changes)
    health = [line for line in lines(tmp_path) if "rankme" in line]
    assert [line["epoch"] for line in health] == [1, 2, 3, 4, 5]
    assert {"knn_backbone", "knn_head"} <= set(health[0]) and health[-1]["finished"]
    for line in health:
        assert 1 <= line["rankme"] <= line["rankme_of"] == 64
        assert 1 <= line["rankme_head"] <= line["rankme_head_of"] == 128
        assert 0 <= line["alignment"] <= 4 and -4.1 < line["uniformity"] <= 0
        assert 0 <= line["contrast_regrouped"] <= 1 and line["contrasted_images"] == 160
        assert line["positives_in_queue"] == pytest.approx(0.2**2 / 2)
        assert line["image_deviation"] > 0.1 and 0 <= line["dead_dimensions"] <= 1
    assert run.result["verdict"] == verdict(lines(tmp_path)).text
    assert run.result["advice"]
    readme = (tmp_path / "README.md").read_text()
    assert "Verdict: " in readme and "Advice: " in readme


@pytest.mark.parametrize("alike", [True, False])
def test_a_sick_run_is_not_advised_to_train_longer(tmp_path, alike):
    """Both curves have points enough for advice."""
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (1 if alike else 80, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "x.npz", train_images=np.broadcast_to(pixels, (80, 32, 32, 3)))
    changes = SMALL | {"monitor.every_epochs": 1, "monitor.images": 32, "data.workers": 0}
    more = {"epochs": 4, "batch_size": 40, "settings": changes}
    result = mocokit.pretrain("demo", tmp_path / "x.npz", tmp_path / "run", **more).result
    found, points = verdict(lines(tmp_path / "run")), lines(tmp_path / "run")
    silent = "no advice on the length of the run while it is not healthy"
    assert ("alike" in found.kinds) is alike and found.healthy is not alike, found.text
    assert len(curve(points, "rankme")) == 4
    assert result["advice"] == (silent if alike else advise(points))
    assert silent != advise(points)
    assert f"Advice: {result['advice']}." in (tmp_path / "run/README.md").read_text()


@pytest.mark.parametrize(
    ("every", "measured", "scored"),
    [
        (0, [4], [4]),
        (1, [1, 2, 3, 4], [1, 2, 3, 4]),
        (2, [1, 2, 4], [2, 4]),
    ],
)
def test_scores_are_taken_every_few_epochs_and_once_at_the_end(
    toy_npz, tmp_path, monkeypatch, every, measured, scored
):
    """Health is measured after the first epoch too, without a score."""
    taken, run = [], KnnMonitor.run

    def counted(self, encoder):
        taken.append(encoder)
        return run(self, encoder)

    monkeypatch.setattr(KnnMonitor, "run", counted)
    changes = SMALL | {"monitor.every_epochs": every, "monitor.images": 32, "data.workers": 0}
    mocokit.pretrain("demo", toy_npz, tmp_path, epochs=4, batch_size=80, settings=changes)
    found = lines(tmp_path)
    assert [line["epoch"] for line in found if "rankme" in line] == measured
    for name in ("knn_backbone", "knn_head", "scored_images"):
        assert [line["epoch"] for line in found if name in line] == scored, name
    assert len(taken) == len(scored)
    for name in ("knn_random_weights", "knn_raw_pixels"):
        assert [line["epoch"] for line in found if name in line] == [4], name


def test_without_labels_health_is_still_measured(photos, tmp_path):
    changes = {"net.backbone": "resnet_tiny", "views.size": 32}
    changes |= SMALL | {"monitor.every_epochs": 1, "data.workers": 0}
    run = mocokit.pretrain("mocov2", photos, tmp_path, epochs=2, batch_size=40, settings=changes)
    health = [line for line in lines(tmp_path) if "rankme" in line]
    assert len(health) == 2 and not any("knn_backbone" in line for line in health)
    assert "verdict" in run.result


def moco(shuffle, seed=0):
    encoder = small_encoder(seed=seed)[1]
    return MoCo(
        encoder,
        dim=8,
        queue_size=64,
        loss=InfoNCE(0.2),
        momentum=0.9,
        count_groups=lambda images: images // 4,
        shuffle=shuffle,
    )


def images_of(seed, count=32):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("pattern", range(16))
def test_after_an_evaluation_every_submodule_has_its_own_mode(pattern, fails):
    """Whatever stands in training inside of what does not, and the reverse; also after an error."""
    inner = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(4))
    outer = nn.Sequential(nn.Linear(4, 4), inner)
    modules = [outer, inner, *inner]
    modes = [bool(pattern >> place & 1) for place in range(4)]
    for module, mode in zip(modules, modes, strict=True):
        module.training = mode
    inputs = torch.ones(3, 4)
    with suppress(ZeroDivisionError), evaluating(outer):
        assert not any(module.training for module in outer.modules())
        assert torch.equal(outer(inputs), outer(inputs)) and not outer(inputs).requires_grad
        assert 1 / (not fails)
    assert [module.training for module in modules] == modes
    assert outer[0].training and torch.is_grad_enabled() and outer(inputs).requires_grad


def test_measuring_changes_nothing():
    method = moco(shuffle=False).train()
    before = {k: v.clone() for k, v in method.state_dict().items()}
    steps = [((images_of(1), images_of(2)), torch.arange(32), Step(0, 7, 32))]
    contrast_by_grouping(method, steps, torch.no_grad)
    assert same(dict(method.state_dict()), before)
    assert method.shuffle is False and method.count_groups(32) == 8 and method.training


def test_the_other_groups_are_those_of_a_step_that_no_run_reaches():
    """Else a method that shuffles would be compared with itself."""
    method, seen, orders = moco(shuffle=True).train(), [], []
    forward, permutation = MoCo.forward, GroupPlan.key_permutation

    def see(self, views, index, step):
        seen.append(step)
        return forward(self, views, index, step)

    def order(self, step, shuffle):
        orders.append((shuffle, permutation(self, step, shuffle).tolist()))
        return permutation(self, step, shuffle)

    steps = [((images_of(1), images_of(2)), torch.arange(32), Step(3, n, 32)) for n in (7, 8)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MoCo, "forward", see)
        patch.setattr(GroupPlan, "key_permutation", order)
        contrast_by_grouping(method, steps, torch.no_grad)
    assert [step.number for step in seen] == [7, 7 + 2**40, 8, 8 + 2**40]
    assert {(step.seed, step.images) for step in seen} == {(3, 32)}
    assert len({tuple(one) for _, one in orders}) == 4 and all(shuffle for shuffle, _ in orders)


@pytest.mark.parametrize(("groups", "regrouped"), [(1, 2), (2, 2), (8, 8)])
def test_keys_are_regrouped_in_two_groups_at_least(groups, regrouped):
    """Whatever it trains with; afterwards all is as before."""
    method = moco(shuffle=False)
    method.count_groups, method.whole = lambda images: groups, True
    count = method.count_groups
    with pytest.raises(ZeroDivisionError), method.regrouped():
        assert (method.count_groups(32), method.shuffle, method.whole) == (regrouped, True, False)
        _ = 1 / 0
    assert (method.count_groups, method.shuffle, method.whole) == (count, False, True)


class Telling(torch.nn.Module):
    """An encoder that says nothing of an image but how its group was normalised: a pure leak."""

    def __init__(self, group):
        super().__init__()
        self.backbone, self.head = torch.nn.Identity(), torch.nn.Identity()
        self.group = group
        self.mix = torch.nn.Parameter(
            torch.randn(192, 8, generator=torch.Generator().manual_seed(0))
        )

    def forward(self, images):
        parts = images.flatten(1).split(self.group)
        return torch.cat([(part.mean(0) @ self.mix).expand(len(part), -1) for part in parts])


def test_a_pure_leak_is_seen_and_honest_features_are_not_accused():
    """Both views alike: an encoder of group statistics finds its key only in its own group."""

    def measured(encoder, shuffle):
        method = MoCo(
            encoder,
            dim=8,
            queue_size=512,
            loss=InfoNCE(0.2),
            momentum=0.9,
            count_groups=lambda images: images // 4,
            shuffle=shuffle,
        )
        steps = [
            ((images_of(n, 64), images_of(n, 64)), torch.arange(64), Step(0, n, 64))
            for n in range(4)
        ]
        return contrast_by_grouping(method, steps, torch.no_grad)

    found = measured(Telling(4), shuffle=False)
    assert found["contrast_trained"] == 1.0 and found["contrast_regrouped"] < 0.6
    assert found["contrasted_images"] == 256
    found = measured(Telling(4), shuffle=True)
    assert abs(found["contrast_trained"] - found["contrast_regrouped"]) < 0.2
    found = measured(Telling(1), shuffle=False)  # groups of one: a function of the image alone
    assert found["contrast_trained"] == found["contrast_regrouped"] == 1.0


PROVOKED = {
    "momentum": {"method.momentum": 0},
    "leak": {"method.shuffle": False, "method.group_size": 8},
    "collapsed": {"optim.lr": 0.2},
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", PROVOKED)
def test_failures_provoked_for_real(kind, tmp_path):
    changes = PROVOKED[kind] | {"monitor.every_epochs": 1}
    mocokit.pretrain("demo", out=tmp_path, epochs=12, settings=changes)
    assert kind in verdict(lines(tmp_path)).kinds


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_hundredfold_learning_rate_is_seen_after_the_first_epoch(seed, tmp_path):
    changes = {"optim.lr": 0.2, "monitor.every_epochs": 1}
    mocokit.pretrain("demo", out=tmp_path, epochs=2, seed=seed, settings=changes)
    recorded = lines(tmp_path)
    first = next(at for at, line in enumerate(recorded) if "rankme" in line)
    assert "collapsed" in verdict(recorded[: first + 1]).kinds


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_constant_images_provoked_for_real(tmp_path):
    import numpy as np

    np.savez(tmp_path / "same.npz", train_images=np.full((1000, 32, 32, 3), 90, np.uint8))
    mocokit.pretrain("demo", tmp_path / "same.npz", tmp_path / "run", epochs=3)
    assert verdict(lines(tmp_path / "run")).kinds == ("alike",)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_healthy_demo_is_called_healthy_throughout(seed, tmp_path):
    changes = {"monitor.every_epochs": 1}
    mocokit.pretrain("demo", out=tmp_path, epochs=12, seed=seed, settings=changes)
    recorded = lines(tmp_path)
    for end in range(1, len(recorded) + 1):
        found = verdict(recorded[:end])
        assert found is None or found.healthy, found.text
