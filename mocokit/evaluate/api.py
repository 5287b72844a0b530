"""How good is it: `mocokit evaluate`, and the same in Python."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mocokit import chance
from mocokit.chance import Slot
from mocokit.errors import UserError
from mocokit.evaluate.results import Evaluation
from mocokit.evaluate.session import PIXELS, Options, Session
from mocokit.evaluate.stopping import stoppable
from mocokit.protocols import finetune, linear_paper, linear_quick
from mocokit.protocols.defaults import (
    FineTune,
    Knn,
    Layer,
    Linear,
    LinearProtocol,
    Precision,
    Shared,
    TrainViews,
)
from mocokit.protocols.knn import knn_grid_of, suited
from mocokit.protocols.limits import check_numbers, several
from mocokit.protocols.table import CENTRE, Transform
from mocokit.settings.arguments import checked


@checked
@stoppable
def evaluate_knn(
    run: str | Path,
    data: str | Path | None = None,
    *,
    k: int | Sequence[int] = Knn.k,
    temperature: float | Sequence[float] = Knn.temperature,
    layer: Layer = Shared.layer,
    device: str = Shared.device,
    precision: Precision = Shared.precision,
    size: int | None = Shared.size,
    resize: int | None = Shared.resize,
    seed: int = Shared.seed,
    baseline: bool = Shared.baseline,
    cache: bool = Shared.cache,
    per_class: bool = Shared.per_class,
    confusion: bool = Shared.confusion,
    json: str | Path | None = None,
) -> Evaluation:
    """The weighted vote of the nearest training images, for every k and temperature.

    `run` is a run folder, a checkpoint, an exported file, a timm model, or `random`. `data` is as
    in `pretrain`; None means the run's own images. Without `k` it is as the run's settings state,
    or fitted to the images of a class (protocols.knn.suited). `layer` chooses the output that is
    scored, `size` the side of the views and `resize` the short side that they are the centre of,
    `precision` that of the frozen network. `baseline` scores random weights too, `cache` keeps
    features for the next time. `per_class` and `confusion` print more, `json` names a file for the
    result. Raises UserError.
    """
    k, temperature = several(k), several(temperature)
    check_numbers(k=k or None, temperature=temperature)
    options = Options(
        data=data, layer=layer, device=device, precision=precision, size=size,
        resize=resize, seed=seed, baseline=baseline, cache=cache, per_class=per_class,
        confusion=confusion, json=json,
    )  # fmt: skip
    trial = Session(run, options, leave_one_out=True)
    split = trial.split
    stated, words = _neighbours(k, trial)
    most = len(split.train_numbers)
    for subject in [*trial.subjects(), *trial.pixels()]:
        train = trial.table(subject, split.train)
        test = train if split.leave_one_out else trial.table(subject, split.test)
        known = np.isin(split.train_numbers, train.good)
        numbers, labels = split.train_numbers[known], split.train_labels[known]
        queries, truth = linear_paper.test_features(split, test)
        own_rows = torch.arange(len(numbers)) if split.leave_one_out else None
        bank = train.take(numbers)
        if subject.name == PIXELS:
            bank, queries = bank - (mean := bank.mean(0)), queries - mean
        most = len(numbers) - split.leave_one_out
        if not most:
            raise UserError(f"of {split.train.name} one image can be read; a vote needs others")
        grid = knn_grid_of(
            bank,
            torch.from_numpy(labels),
            queries,
            [min(one, most) for one in stated],
            temperature,
            len(split.classes),
            own_rows,
            subject.device,
        )
        for count, tau, predicted in grid:
            setting = {"k": count, "temperature": tau}
            trial.add(subject, predicted.numpy(), truth, setting)
    shown = words or ", ".join(str(min(one, most)) for one in stated)
    protocol = (
        f"kNN, k {shown}, temperature {', '.join(f'{t:g}' for t in temperature)}, "
        f"{trial.opened.subject.layer} features; {CENTRE.describe(trial.opened.subject.spec)}"
    )
    return trial.finish("knn", protocol)


def _neighbours(asked: Sequence[int], trial: Session) -> tuple[Sequence[int], str]:
    """How many vote: as asked, as the run's settings state, or what suits; that in words."""
    split, settings = trial.split, trial.opened.settings
    stated = None if settings is None else settings.monitor.k
    if asked or stated is not None:
        return asked or (stated,), ""  # type: ignore[return-value]
    one, words = suited(split.train_labels, int(split.leave_one_out))
    return (one,), words


@checked
@stoppable
def evaluate_linear(
    run: str | Path,
    data: str | Path | None = None,
    *,
    protocol: LinearProtocol = Linear.protocol,
    train_views: TrainViews = Linear.train_views,
    epochs: int = Linear.epochs,
    lr: float = Linear.lr,
    layer: Layer = Shared.layer,
    device: str = Shared.device,
    precision: Precision = Shared.precision,
    size: int | None = Shared.size,
    resize: int | None = Shared.resize,
    seed: int = Shared.seed,
    baseline: bool = Shared.baseline,
    cache: bool = Shared.cache,
    per_class: bool = Shared.per_class,
    confusion: bool = Shared.confusion,
    json: str | Path | None = None,
) -> Evaluation:
    """A linear classifier on frozen features: `paper` (random crops, 100 epochs) or `quick`.

    The other arguments are those of `evaluate_knn`. epochs and lr belong to `paper` alone.
    train_views belongs to `quick`: `crops` as in the paper, or `centre` as in the test. Raises
    UserError, and NonFiniteLoss if the probe diverges.
    """
    check_numbers(epochs=epochs, lr=lr)
    if protocol == "paper" and train_views != "crops":
        raise UserError("--train-views belongs to --protocol quick; paper trains on crops")
    if protocol == "quick" and (epochs, lr) != (Linear.epochs, Linear.lr):
        raise UserError("--epochs and --lr belong to --protocol paper; quick sets its own step")
    options = Options(
        data=data, layer=layer, device=device, precision=precision, size=size,
        resize=resize, seed=seed, baseline=baseline, cache=cache, per_class=per_class,
        confusion=confusion, json=json,
    )  # fmt: skip
    trial = Session(run, options)
    first = trial.opened.subject
    stream = chance.library_seed(trial.options.seed, 3, Slot.EVALUATION)
    views = Transform(stream) if train_views == "crops" else CENTRE
    if protocol == "paper":
        words = linear_paper.protocol(first, epochs, lr)
    else:
        words = linear_quick.protocol(first, views, trial.options.seed)
    for subject in trial.subjects():
        test = trial.table(subject, trial.split.test)
        with trial.baselines_fault_noted(subject):
            if protocol == "quick":
                train = trial.table(subject, trial.split.train, views)
                fitted = linear_quick.fit_quick(
                    trial.split, train, subject.device, seed=trial.options.seed
                )
            else:
                fitted = linear_paper.fit_paper(
                    subject,
                    trial.split,
                    seed=trial.options.seed,
                    epochs=epochs,
                    lr=lr,
                    workers=trial.workers,
                    progress=trial.epoch_progress(subject),
                    states=trial.states,
                )
            trial.add_fitted(subject, fitted, test)
    return trial.finish(f"linear ({protocol})", words)


@checked
@stoppable
def evaluate_finetune(
    run: str | Path,
    data: str | Path | None = None,
    *,
    percent: float | Sequence[float] = FineTune.percent,
    epochs: int = FineTune.epochs,
    lr: float = FineTune.lr,
    layer_decay: float = FineTune.layer_decay,
    device: str = Shared.device,
    precision: Precision = Shared.precision,
    size: int | None = Shared.size,
    resize: int | None = Shared.resize,
    seed: int = Shared.seed,
    baseline: bool = Shared.baseline,
    per_class: bool = Shared.per_class,
    confusion: bool = Shared.confusion,
    json: str | Path | None = None,
) -> Evaluation:
    """Fine-tuning of all layers with each percentage of the labels.

    The other arguments are those of `evaluate_knn`, without `layer` and `cache`. Raises UserError,
    and NonFiniteLoss if training diverges.
    """
    percent = several(percent)
    check_numbers(percent=percent, epochs=epochs, lr=lr, layer_decay=layer_decay)
    if precision == "float16":
        raise UserError("float16 gradients would vanish in fine-tuning; take bfloat16 or float32")
    options = Options(
        data=data, device=device, precision=precision, size=size, resize=resize,
        seed=seed, baseline=baseline, cache=False, per_class=per_class, confusion=confusion,
        json=json,
    )  # fmt: skip
    trial = Session(run, options)
    plan = finetune.Plan(epochs=epochs, lr=lr, layer_decay=layer_decay)
    words = plan.describe(trial.opened.subject)
    for share in percent:
        part = trial.split.with_share(share / 100, trial.options.seed)
        trial.console.say(f"{share:g} % of the labels: {plan.ahead(len(part.train_numbers))}")
        for subject in trial.subjects(calibrate=False):
            with trial.baselines_fault_noted(subject):
                predicted, truth, details = finetune.fine_tune(
                    subject,
                    part,
                    plan,
                    seed=trial.options.seed,
                    workers=trial.workers,
                    progress=trial.epoch_progress(subject, f" {share:g} %"),
                    states=trial.states,
                )
                setting = {"labels": f"{share:g} %", "images_used": details["images"]}
                trial.add(subject, predicted.numpy(), truth, setting, details)
    return trial.finish("finetune", words)
