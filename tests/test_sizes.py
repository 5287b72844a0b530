"""Sizes: what is adapted to small data, what is kept, and what the settings come to."""

import pytest
import yaml
from hypothesis import given, strategies as st

from mocokit import recipes
from mocokit.errors import UserError
from mocokit.run import command
from mocokit.settings import replace
from mocokit.settings.schema import Settings
from mocokit.settings.sizes import count_groups, count_shares, fit, resolve


def test_published_sizes_stay_on_the_published_data():
    assert fit(recipes.mocov2(), 1_281_167) == (recipes.mocov2(), [])
    assert fit(recipes.mocov2_cifar10(), 50_000) == (recipes.mocov2_cifar10(), [])
    effect = resolve(recipes.mocov2(), 1_281_167)
    assert (effect.steps_per_epoch, effect.total_steps) == (5004, 1_000_800)
    assert (effect.groups, effect.lr, effect.key_momentum) == (8, 0.03, 0.999)
    assert resolve(recipes.mocov2_cifar10(), 50_000).groups == 8


@pytest.mark.parametrize(
    ("batch", "lr", "momentum"),
    [(64, 0.0075, 0.9997498), (128, 0.015, 0.9995), (512, 0.06, 0.998001), (1024, 0.12, 0.996006)],
)
def test_rates_follow_the_batch(batch, lr, momentum):
    settings = replace(recipes.mocov2(), {"train.batch_size": batch})
    effect = resolve(settings, 10**6)
    assert effect.lr == pytest.approx(lr)
    assert effect.key_momentum == pytest.approx(momentum, abs=1e-6)


@pytest.mark.parametrize("value", ["optim.lr", "method.momentum"])
@pytest.mark.parametrize("quoted", [None, 32])
def test_what_is_stated_beside_a_file_is_what_runs(tmp_path, value, quoted):
    """Not rescaled from the batch that the file quotes; what the file itself states is."""
    path = tmp_path / "mine.yaml"
    optim, method = {"lr": 0.1, "lr_batch": 256}, {"momentum": 0.81, "momentum_batch": 256}
    path.write_text(yaml.safe_dump({"recipe": "mocov2", "optim": optim, "method": method}))
    changes = {"train.batch_size": 128, value: 0.25}
    if quoted is not None:
        changes |= {f"{value}_batch": quoted}
    settings, _ = fit(*_asked(path, changes))
    effect = resolve(settings, 10_000)
    ran = {"optim.lr": 0.25 if quoted is None else 1.0}
    ran |= {"method.momentum": 0.25 if quoted is None else 0.25**4}  # 128 is 4 times 32
    of_file = {"optim.lr": 0.05, "method.momentum": 0.9}  # half of the batch quoted
    found = {"optim.lr": effect.lr, "method.momentum": effect.key_momentum}
    assert found == pytest.approx(of_file | {value: ran[value]})


def _asked(path, changes):
    settings, stated = command.asked(str(path), None, changes, needs_data=False)
    return settings, 10_000, stated


def test_null_keeps_the_momentum_as_the_authors_do():
    settings = replace(recipes.mocov2(), {"train.batch_size": 128, "method.momentum_batch": None})
    assert resolve(settings, 10**6).key_momentum == 0.999


@pytest.mark.parametrize(("scale", "lr"), [("linear", 0.12), ("sqrt", 0.06), ("none", 0.03)])
def test_scales(scale, lr):
    settings = replace(recipes.mocov2(), {"train.batch_size": 1024, "optim.scale": scale})
    assert resolve(settings, 10**6).lr == pytest.approx(lr)


def test_what_a_user_states_is_what_runs():
    stated = {"optim.lr": 0.5, "method.momentum": 0.9, "train.batch_size": 64}
    settings, _ = fit(replace(recipes.mocov2(), stated), 10_000, stated)
    effect = resolve(settings, 10_000)
    assert (effect.lr, effect.key_momentum) == (0.5, 0.9)
    stated |= {"optim.lr_batch": 128, "method.momentum_batch": 32}  # both halves of a quotation
    settings, _ = fit(replace(recipes.mocov2(), stated), 10_000, stated)
    effect = resolve(settings, 10_000)
    assert (effect.lr, effect.key_momentum) == (0.25, pytest.approx(0.81))


@pytest.mark.parametrize(
    ("images", "batch", "queue"),
    [
        (64, 64, 64),
        (300, 64, 64),
        (600, 128, 128),
        (5_000, 256, 256),
        (10_000, 256, 512),
        (100_000, 256, 8192),
        (1_000_000, 256, 65536),
    ],
)
def test_default_sizes_shrink_to_small_data(images, batch, queue):
    settings, notices = fit(recipes.mocov2(), images)
    assert (settings.train.batch_size, settings.method.queue_size) == (batch, queue)
    assert any("queue" in notice for notice in notices) == (queue < 65536)
    assert any("batch size" in notice for notice in notices) == (batch < 256)


@given(st.integers(64, 10**7), st.sampled_from(sorted(recipes.RECIPES)))
def test_fitted_sizes_are_possible(images, recipe):
    settings, _ = fit(recipes.by_name(recipe), images)
    batch = settings.train.batch_size
    queue, default = (
        getattr(one.method, "queue_size", None) for one in (settings, recipes.by_name(recipe))
    )
    assert 2 <= batch <= images
    assert batch <= max(images / 4, 2 * settings.method.group_size)
    assert queue == default or (
        queue is not None and queue >= batch and (queue <= images / 10 or queue == batch)
    )
    whole = settings.method.batch_norm == "whole"
    assert count_groups(settings, batch) >= (1 if whole else 2)
    assert fit(settings, images)[0] == settings  # nothing left to adapt
    assert resolve(settings, images).steps_per_epoch >= 1


@pytest.mark.parametrize(
    ("recipe", "images", "stated", "left", "said"),
    [
        ("memorybank_softmax", 65_537, False, 65_536, None),
        ("memorybank_softmax", 65_536, False, None, "bank negatives 65536 -> all of the bank's"),
        ("memorybank_softmax", 900, False, None, "-> all of the bank's 900 entries"),
        ("memorybank_softmax", 65_536, True, 65_536, "65536 is over the 65536 images: entries"),
        ("memorybank_softmax", 65_537, True, 65_536, None),
        ("memorybank", 900, False, 4096, None),  # NCE draws with replacement
    ],
)
def test_a_banks_negatives_are_fewer_than_its_images(recipe, images, stated, left, said):
    stated = {"method.bank_negatives"} if stated else set()
    settings, notices = fit(recipes.by_name(recipe), images, stated)
    assert settings.method.bank_negatives == left
    assert any("negatives" in notice for notice in notices) == (said is not None)
    assert said is None or any(said in notice for notice in notices)
    size = f"memory bank of {images:,} x 128 float32: {images / 2048:,.0f} MiB on each device"
    assert any(notice.startswith(size) for notice in notices)


def test_a_stated_queue_is_kept_with_a_warning():
    stated = {"method.queue_size": 4096}
    settings, notices = fit(replace(recipes.mocov2(), stated), 10_000, stated)
    assert settings.method.queue_size == 4096
    assert any("over a tenth of the 10000 images" in notice for notice in notices)


def test_a_stated_batch_is_kept_or_refused():
    stated = {"train.batch_size": 100}
    assert fit(replace(recipes.mocov2(), stated), 120, stated)[0].train.batch_size == 100
    with pytest.raises(UserError, match="batch_size 100 exceeds the 99 images; set at most 99"):
        fit(replace(recipes.mocov2(), stated), 99, stated)


@pytest.mark.parametrize(
    ("images", "batch", "fits"),
    [(64, 32, True), (96, 32, True), (97, 32, False), (98, 32, True), (95, 32, True),
     (65, 64, False), (64, 64, True), (100, 99, False), (75, 2, False), (76, 2, True)],
)  # fmt: skip
def test_of_a_last_batch_only_a_single_image_is_refused(images, batch, fits):
    stated = {"data.last": "keep", "train.batch_size": batch}
    if fits:
        kept = fit(replace(recipes.mocov2(), stated), images, stated)[0]
        assert (kept.data.last, kept.train.batch_size) == ("keep", batch)
    else:
        with pytest.raises(UserError, match=f"a last batch of one of the {images} images"):
            fit(replace(recipes.mocov2(), stated), images, stated)
    dropped = stated | {"data.last": "drop"}
    assert fit(replace(recipes.mocov2(), dropped), images, dropped)[0].data.last == "drop"


def test_too_few_images_are_refused():
    with pytest.raises(UserError, match="63 images are too few: .* at least 64"):
        fit(recipes.mocov2(), 63)


@pytest.mark.parametrize(
    ("batch", "groups"),
    [(256, 8), (128, 4), (64, 2), (32, 2), (16, 2), (100, 3), (4, 2), (3, 1), (2, 1)],
)
def test_groups(batch, groups):
    settings = replace(recipes.mocov2(), {"train.batch_size": batch})
    assert count_groups(settings, batch) == groups


def test_processes_share_groups_or_else_single_images():
    whole = replace(Settings(), {"method.batch_norm": "whole"})
    assert count_groups(whole, 100) == 1 and count_shares(whole, 100) == 100
    assert count_groups(Settings(), 100) == count_shares(Settings(), 100) == 3


def test_one_group_needs_an_explicit_setting_and_is_noted():
    stated = {"method.groups": 1}
    settings, notices = fit(replace(recipes.mocov2(), stated), 10**6, stated)
    assert count_groups(settings, 256) == 1
    assert any("one batch-norm group" in notice for notice in notices)


def test_last_partial_batch():
    keep = replace(Settings(), {"data.last": "keep"})
    assert resolve(Settings(), 1000).steps_per_epoch == 3
    assert resolve(keep, 1000).steps_per_epoch == 4
    assert resolve(keep, 1024).steps_per_epoch == 4


@pytest.mark.parametrize(
    ("groups", "batch", "last", "count"),
    [(8, 256, 64, 2), (8, 256, 256, 8), (8, 256, 17, 1), (8, 256, 100, 3), (4, 24, 16, 3)],
)
def test_a_last_partial_batch_has_its_share_of_stated_groups(groups, batch, last, count):
    settings = replace(Settings(), {"method.groups": groups, "train.batch_size": batch})
    assert count_groups(settings, last) == count


@pytest.mark.parametrize(
    ("batch", "images", "fitted"),
    [(100, 400, 100), (100, 399, 96), (256, 1024, 256), (256, 1023, 224), (48, 192, 48)],
)
def test_a_default_batch_may_be_a_quarter_of_the_images(batch, images, fitted):
    """Exactly a quarter too, whether or not whole groups fill it."""
    settings, notices = fit(replace(Settings(), {"train.batch_size": batch}), images)
    assert settings.train.batch_size == fitted
    assert any("batch size" in notice for notice in notices) == (fitted != batch)


@pytest.mark.parametrize(("batch", "groups"), [(8, 4), (9, 4), (16, 8), (2, 1), (3, 1)])
def test_stated_groups_have_two_images_at_least(batch, groups):
    settings = replace(Settings(), {"method.groups": 8, "train.batch_size": batch})
    assert count_groups(settings, batch) == groups


def test_no_group_of_one_image():
    keep = {"data.last": "keep", "train.batch_size": 32}
    with pytest.raises(UserError, match="a last batch of one of the 129 images"):
        fit(replace(recipes.mocov2(), keep), 129, keep)
    assert count_groups(recipes.mocov2(), 3) == 1


def test_a_batch_with_one_statistic_is_not_cut():
    changes = {"method.batch_norm": "whole", "train.micro_batch": 64}
    with pytest.raises(UserError, match="train.micro_batch 64 cuts a batch .* leave micro_batch"):
        fit(replace(Settings(), changes), 10**6, changes)
    for change in changes.items():
        fit(replace(Settings(), dict([change])), 10**6, changes)


@pytest.mark.parametrize(("epochs", "warmup"), [(11, 10.0), (10, 1.0), (5, 0.5)])
def test_a_warm_up_leaves_epochs_at_the_full_rate(epochs, warmup):
    settings = replace(recipes.simclr_256(), {"train.epochs": epochs})
    fitted, notices = fit(settings, 10**6, {"train.epochs"})
    assert fitted.optim.warmup_epochs == warmup
    assert any("warm-up 10 ->" in notice for notice in notices) == (warmup != 10)
    fitted, notices = fit(settings, 10**6, {"train.epochs", "optim.warmup_epochs"})
    assert fitted.optim.warmup_epochs == 10  # as stated
    assert any("leaves none of the" in notice for notice in notices) == (warmup != 10)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, True),
        ({"views.blur_probability": (0.0, 0.5)}, True),
        ({"views.blur_probability": (0.5, 0.0)}, True),
        ({"views.blur_probability": (0.0, 0.0)}, False),
        ({"views.blur_probability": 0.0}, False),
        ({"views.order": ("crop", "flip")}, False),
        ({"views.blur_sigma": (0.1, 2.0)}, False),
        ({"views.size": 112}, False),
        ({"views.size": 111}, True),
    ],
)
def test_a_blur_too_strong_for_small_views_is_told(changes, told):
    changes = {"views.size": 32} | changes
    _, notices = fit(replace(recipes.mocov2(), changes), 10**7, changes)
    assert any("is strong for views of" in notice for notice in notices) == told
