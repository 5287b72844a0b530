"""How the sizes of a run follow from its settings and the number of its images.

`fit` adapts a recipe's default sizes to small data, never what a user stated; `resolve` gives the
values that the settings stand for. Both are pure, and the only places where sizes are rescaled.
"""

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from mocokit.errors import UserError
from mocokit.settings.edit import flatten, replace
from mocokit.settings.schema import Settings

SMALLEST = 64  # images; below, two groups of 32 cannot be filled
STRONG_BLUR = 2 * 2.0 / 224  # of the view's side: twice the papers' largest sigma


@dataclass(frozen=True)
class Resolved:
    """What the settings come to for a number of images; printed, stored, never read back."""

    images: int
    steps_per_epoch: int
    total_steps: int
    groups: int
    lr: float
    key_momentum: float | None  # None where no key encoder follows

    def as_dict(self) -> dict[str, int | float]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def resolve(settings: Settings, images: int) -> Resolved:
    """Learning rate, key momentum, groups and steps of a run on this number of images."""
    batch, optim = settings.train.batch_size, settings.optim
    steps = images // batch if settings.data.last == "drop" else -(-images // batch)
    ratio = batch / optim.lr_batch
    factor = {"linear": ratio, "sqrt": ratio**0.5, "none": 1.0}[optim.scale]
    return Resolved(
        images=images,
        steps_per_epoch=steps,
        total_steps=steps * settings.train.epochs,
        groups=count_groups(settings, batch),
        lr=optim.lr * factor,
        key_momentum=settings.method.key_momentum(batch),
    )


def scoring_side(settings: Settings) -> int:
    """The short side in pixels of the scoring view, of which `views.size` is the centre."""
    return settings.monitor.resize or round(settings.views.size / settings.monitor.centre)


def scored_anew(settings: Settings) -> list[str]:
    """Of a run of 0.1 whose scores no longer have the view that they had then: a notice."""
    before, now = settings.views.canvas, scoring_side(settings)
    if before is None or before == now:
        return []
    return [
        f"earlier versions scored images with the short side at {before} pixels (views.canvas); "
        f"scores are now taken at {now}, of which views.size {settings.views.size} is the centre "
        "(monitor.resize)"
    ]


def count_groups(settings: Settings, batch: int) -> int:
    """Groups that share batch-norm statistics in a batch; at least two unless stated otherwise.

    With one group the key images' shuffle does nothing, and the statistics leak which key belongs
    to which query (MoCo v1, section 3.3, "Shuffling BN").
    """
    method = settings.method
    if method.batch_norm == "whole":
        return 1
    if method.groups == "auto":
        return max(1, min(max(2, round(batch / method.group_size)), batch // 2))
    share = batch / settings.train.batch_size  # a last partial batch has fewer groups
    return max(1, min(round(method.groups * share), batch // 2))


def count_shares(settings: Settings, batch: int) -> int:
    """What processes share of a batch: whole groups, or single images where there are none."""
    return batch if settings.method.batch_norm == "whole" else count_groups(settings, batch)


def check_processes(settings: Settings, processes: int) -> None:
    """Raise UserError for more processes than a batch has parts for."""
    shares = count_shares(settings, settings.train.batch_size)
    if processes > shares:
        whole = settings.method.batch_norm == "whole"
        raise UserError(
            f"{processes} processes for the {shares} images of a batch; start fewer"
            if whole
            else f"{processes} processes for {shares} batch-norm groups; a process holds whole "
            "groups, so start fewer, or lower method.group_size"
        )


def fit(
    settings: Settings, images: int, stated: Collection[str] = ()
) -> tuple[Settings, list[str]]:
    """Adapt default sizes to the data; returns the settings that run, and what to tell the user.

    `stated` holds the dotted paths that the user set, which are kept. Raises UserError when the
    images cannot fill what was stated.
    """
    if images < SMALLEST:
        raise UserError(
            f"{images} images are too few: contrast needs at least {SMALLEST}, "
            "and learns little from fewer than some thousands"
        )
    notices: list[str] = []
    changes: dict[str, Any] = {**_batch(settings, images, stated, notices)}
    batch = changes.get("train.batch_size", settings.train.batch_size)
    if settings.data.last == "keep" and images % batch == 1:
        raise UserError(
            f"data.last=keep leaves a last batch of one of the {images} images, which has no batch "
            "statistics; set data.last=drop, or another train.batch_size"
        )
    changes |= _method(settings, images, batch, stated, notices)
    changes |= _warmup(settings, stated, notices)
    for value, quoted_at in (
        ("optim.lr", "optim.lr_batch"),
        ("method.momentum", "method.momentum_batch"),
    ):
        # What a user states is what runs. A method of another's may quote it at no batch.
        if value in stated and quoted_at not in stated and quoted_at in flatten(settings):
            changes[quoted_at] = batch
    notices += _blur(settings, stated)
    fitted = replace(settings, changes)
    if fitted.method.name == "moco" and count_groups(fitted, batch) < 2:
        notices.append(
            "one batch-norm group: the key shuffle cannot hide statistics, contrast accuracy may "
            "be won by a leak"
        )
    if fitted.method.batch_norm == "whole" and fitted.train.micro_batch is not None:
        raise UserError(
            f"train.micro_batch {fitted.train.micro_batch} cuts a batch whose statistics are one "
            "(method.batch_norm=whole), which would be another method; set "
            "method.batch_norm=groups, as the recipe endtoend does, or leave micro_batch out"
        )
    return fitted, notices


def _batch(
    settings: Settings, images: int, stated: Collection[str], notices: list[str]
) -> dict[str, int]:
    batch, group = settings.train.batch_size, settings.method.group_size
    if "train.batch_size" in stated:
        if batch > images:
            raise UserError(
                f"train.batch_size {batch} exceeds the {images} images; set at most {images}"
            )
        return {}
    if batch <= images / 4:
        return {}
    smaller = min(max(images // 4 // group, 2) * group, images, batch)
    if smaller == batch:
        return {}
    notices.append(
        f"batch size {batch} -> {smaller}: the recipe's is over a quarter of the {images} images"
    )
    return {"train.batch_size": smaller}


def _method(
    settings: Settings, images: int, batch: int, stated: Collection[str], notices: list[str]
) -> dict[str, Any]:
    changes = settings.method.fit(images, batch, settings.net.dim, stated, notices)
    return {f"method.{name}": value for name, value in changes.items()}


def _blur(settings: Settings, stated: Collection[str]) -> list[str]:
    """The papers' blur is for 224 pixels; of a small view it leaves nothing fine."""
    views = settings.views
    low, high = views.blur_sigma
    shares = views.blur_probability
    used = "blur" in views.order and (max(shares) if isinstance(shares, tuple) else shares) > 0
    if not used or "views.blur_sigma" in stated or high / views.size <= STRONG_BLUR:
        return []
    fair = [round(side * views.size / 224, 2) for side in (low, high)]
    return [
        f"blur of up to {high:g} pixels is strong for views of {views.size} (the papers blur 224 "
        f"so); in proportion it is --set views.blur_sigma=[{fair[0]:g},{fair[1]:g}]"
    ]


def _warmup(settings: Settings, stated: Collection[str], notices: list[str]) -> dict[str, float]:
    warmup, epochs = settings.optim.warmup_epochs, settings.train.epochs
    if warmup < epochs:
        return {}
    if "optim.warmup_epochs" in stated:
        notices.append(
            f"optim.warmup_epochs {warmup:g} leaves none of the {epochs} epochs at the full rate"
        )
        return {}
    notices.append(f"warm-up {warmup:g} -> {epochs / 10:g} epochs: the run has {epochs}")
    return {"optim.warmup_epochs": epochs / 10}
