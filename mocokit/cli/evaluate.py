"""`mocokit evaluate ...`: one verb for each way to judge a network."""

from typing import Annotated, Any

import typer

from mocokit.detection.protocol import BATCH_SIZE, STEPS
from mocokit.protocols.defaults import (
    NEIGHBOURS,
    DetectorPrecision,
    FineTune,
    Knn,
    Layer,
    Linear,
    LinearProtocol,
    Precision,
    Shared,
    Split,
    TrainViews,
    Voc,
)

# Lists, because these options are repeatable.
TEMPERATURES, PERCENT = [*Knn.temperature], [*FineTune.percent]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Score a run, a checkpoint, an exported file, a timm model, or random weights.",
)

Run = Annotated[
    str,
    typer.Argument(
        help="run folder, checkpoint, exported file, timm model, random or random:MODEL"
    ),
]
Data = Annotated[
    str | None, typer.Argument(help="labelled images; default: the run's own, if it is a run")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, or mps, which was not run yet")]
NetworkPrecision = Annotated[Precision, typer.Option(help="precision of the frozen network")]
TunedPrecision = Annotated[
    Precision, typer.Option(help="precision of the network; float16 is refused")
]
Size = Annotated[
    int | None,
    typer.Option(help="side of the views; default: as in training"),
]
Resize = Annotated[
    int | None,
    typer.Option(
        help="short side of an image, of which the view is the centre; default: in the recipe's "
        "proportion, such as 256 for 224"
    ),
]
Seed = Annotated[int, typer.Option(help="random seed of splits, crops and random weights")]
Baseline = Annotated[
    bool, typer.Option("--baseline/--no-baseline", help="score random weights beside it")
]
Cache = Annotated[bool, typer.Option("--cache/--no-cache", help="keep features for the next time")]
PerClass = Annotated[bool, typer.Option("--per-class", help="print each class's accuracy")]
Confusion = Annotated[
    bool,
    typer.Option("--confusion", help="print the confusion matrix and include it in --json"),
]
Json = Annotated[str | None, typer.Option("--json", help="also write the result to this file")]
Output = Annotated[Layer, typer.Option("--layer", help="the output that is scored")]


@app.command()
def knn(
    run: Run,
    data: Data = None,
    k: Annotated[
        list[int] | None,
        typer.Option(
            "-k",
            "--k",
            help="neighbours; repeatable; default: as the run's settings state, else "
            f"{NEIGHBOURS}, or half of a class's images if fewer",
        ),
    ] = None,
    temperature: Annotated[
        list[float], typer.Option(help="a vote weighs exp(cosine / temperature); repeatable")
    ] = TEMPERATURES,
    layer: Output = Shared.layer,
    size: Size = Shared.size,
    resize: Resize = Shared.resize,
    device: Device = Shared.device,
    precision: NetworkPrecision = Shared.precision,
    seed: Seed = Shared.seed,
    baseline: Baseline = Shared.baseline,
    cache: Cache = Shared.cache,
    per_class: PerClass = Shared.per_class,
    confusion: Confusion = Shared.confusion,
    json: Json = None,
) -> None:
    """The weighted vote of the nearest training images.

    Without validation images, each image is left out of its own vote.
    """
    from mocokit.evaluate.api import evaluate_knn

    options: dict[str, Any] = {"layer": layer, "cache": cache}
    options |= _shared(size, resize, device, precision, seed, baseline, per_class, confusion, json)
    evaluate_knn(run, data, k=k or (), temperature=temperature, **options)


@app.command()
def linear(
    run: Run,
    data: Data = None,
    protocol: Annotated[
        LinearProtocol,
        typer.Option(help="paper: MoCo's, on random crops; quick: a regression on kept features"),
    ] = Linear.protocol,
    train_views: Annotated[
        TrainViews,
        typer.Option(help="quick: train on a random crop, or on the view of the test"),
    ] = Linear.train_views,
    epochs: Annotated[
        int, typer.Option(help="paper: passes over the training images")
    ] = Linear.epochs,
    lr: Annotated[float, typer.Option(help="paper: initial learning rate")] = Linear.lr,
    layer: Output = Shared.layer,
    size: Size = Shared.size,
    resize: Resize = Shared.resize,
    device: Device = Shared.device,
    precision: NetworkPrecision = Shared.precision,
    seed: Seed = Shared.seed,
    baseline: Baseline = Shared.baseline,
    cache: Cache = Shared.cache,
    per_class: PerClass = Shared.per_class,
    confusion: Confusion = Shared.confusion,
    json: Json = None,
) -> None:
    """A linear classifier on frozen features."""
    from mocokit.evaluate.api import evaluate_linear

    options: dict[str, Any] = {"layer": layer, "cache": cache, "protocol": protocol}
    options["train_views"] = train_views
    options |= _shared(size, resize, device, precision, seed, baseline, per_class, confusion, json)
    evaluate_linear(run, data, epochs=epochs, lr=lr, **options)


@app.command()
def finetune(
    run: Run,
    data: Data = None,
    percent: Annotated[
        list[float], typer.Option(help="share of each class's labels, in percent; repeatable")
    ] = PERCENT,
    epochs: Annotated[
        int, typer.Option(help="passes over the labelled images, at least")
    ] = FineTune.epochs,
    lr: Annotated[float, typer.Option(help="initial learning rate")] = FineTune.lr,
    layer_decay: Annotated[
        float, typer.Option(help="each layer's learning rate over that of the layer above it")
    ] = FineTune.layer_decay,
    size: Size = Shared.size,
    resize: Resize = Shared.resize,
    device: Device = Shared.device,
    precision: TunedPrecision = Shared.precision,
    seed: Seed = Shared.seed,
    baseline: Baseline = Shared.baseline,
    per_class: PerClass = Shared.per_class,
    confusion: Confusion = Shared.confusion,
    json: Json = None,
) -> None:
    """Train all layers on a share of the labels, beside the same from random weights."""
    from mocokit.evaluate.api import evaluate_finetune

    options = _shared(size, resize, device, precision, seed, baseline, per_class, confusion, json)
    evaluate_finetune(
        run, data, percent=percent, epochs=epochs, lr=lr, layer_decay=layer_decay,
        **options,
    )  # fmt: skip


@app.command()
def voc(
    run: Run,
    data: Annotated[
        str, typer.Argument(help="VOCdevkit/, a folder of VOC's layout, or one of COCO's")
    ],
    split: Annotated[Split, typer.Option(help="training images of VOCdevkit")] = Voc.split,
    trials: Annotated[int, typer.Option(help="number of trials; seeds count up")] = Voc.trials,
    seed: Annotated[int, typer.Option(help="random seed of the first trial")] = Shared.seed,
    steps: Annotated[
        int | None,
        typer.Option(help=f"steps; default: {STEPS['07+12']:,}, or {STEPS['07']:,} for 07"),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help=f"batch size; default: {BATCH_SIZE}; a smaller one lowers lr, adds steps"
        ),
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="A=VALUE", help="any value; repeatable")
    ] = None,
    classes: Annotated[str | None, typer.Option(help="A,B,C; default: all in the data")] = None,
    every: Annotated[
        int, typer.Option(help="also test every so many steps; 0: only at the end")
    ] = Voc.every,
    out: Annotated[
        str | None, typer.Option(help="folder; default: one in RUN, or in runs/")
    ] = None,
    device: Device = Shared.device,
    precision: Annotated[
        DetectorPrecision, typer.Option(help="precision of the network")
    ] = Voc.precision,
    pictures: Annotated[
        int, typer.Option(help="test images to draw with the detections")
    ] = Voc.pictures,
    json: Json = None,
    iterations: Annotated[int | None, typer.Option(hidden=True)] = None,  # 0.1's --steps
    ims_per_step: Annotated[int | None, typer.Option(hidden=True)] = None,  # 0.1's --batch-size
) -> None:
    """Fine-tune a Faster R-CNN C4 as the MoCo papers do, and measure AP.

    The same command resumes an interrupted evaluation.

    The papers' network takes a GPU, on which it was not run yet; tests run small ones on a CPU.
    """
    from mocokit.settings import parse_assignments

    settings = parse_assignments(assignments or [])
    from mocokit.evaluate.voc import evaluate_voc

    evaluate_voc(
        run, data, split=split, trials=trials, seed=seed, steps=steps, batch_size=batch_size,
        iterations=iterations, ims_per_step=ims_per_step, settings=settings, every=every, out=out,
        device=device,
        classes=[name.strip() for name in classes.split(",")] if classes else (),
        precision=precision, pictures=pictures, json=json,
    )  # fmt: skip


def _shared(
    size: int | None,
    resize: int | None,
    device: str,
    precision: str,
    seed: int,
    baseline: bool,
    per_class: bool,
    confusion: bool,
    json: str | None,
) -> dict[str, Any]:
    return {
        "size": size,
        "resize": resize,
        "device": device,
        "precision": precision,
        "seed": seed,
        "baseline": baseline,
        "per_class": per_class,
        "confusion": confusion,
        "json": json,
    }
