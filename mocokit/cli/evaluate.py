"""`mocokit evaluate ...`: one verb for each way to judge a network."""

from typing import Annotated, Any, Literal

import typer

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
    str | None, typer.Argument(help="labelled images; nothing: those the run was trained on")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")]
Precision = Annotated[
    Literal["float32", "bfloat16", "float16"], typer.Option(help="of the frozen network")
]
Size = Annotated[
    int | None,
    typer.Option(help="side of the evaluation view; nothing: as the network was trained"),
]
Seed = Annotated[int, typer.Option(help="of splits, crops and first weights")]
Baseline = Annotated[
    bool, typer.Option("--baseline/--no-baseline", help="score random weights beside it")
]
Cache = Annotated[bool, typer.Option("--cache/--no-cache", help="keep features in $MOCOKIT_CACHE")]
PerClass = Annotated[bool, typer.Option("--per-class", help="print each class's accuracy")]
Confusion = Annotated[
    bool, typer.Option("--confusion", help="print and write who is taken for whom")
]
Json = Annotated[str | None, typer.Option("--json", help="also write the result to this file")]
Head = Annotated[
    Literal["backbone", "head"], typer.Option("--layer", help="whose output the features are")
]


@app.command()
def knn(
    run: Run,
    data: Data = None,
    k: Annotated[list[int] | None, typer.Option("-k", "--k", help="neighbours; repeatable")] = None,
    temperature: Annotated[
        list[float] | None, typer.Option(help="exp(cosine / temperature) is a vote; repeatable")
    ] = None,
    layer: Head = "backbone",
    size: Size = None,
    device: Device = "auto",
    precision: Precision = "float32",
    seed: Seed = 0,
    baseline: Baseline = True,
    cache: Cache = True,
    per_class: PerClass = False,
    confusion: Confusion = False,
    json: Json = None,
) -> None:
    """The weighted vote of the nearest training images (default: k 200, temperature 0.1).

    Without validation images each image is left out of its own vote.
    """
    from mocokit.evaluate.api import evaluate_knn

    options: dict[str, Any] = {"layer": layer, "cache": cache}
    options |= _shared(size, device, precision, seed, baseline, per_class, confusion, json)
    evaluate_knn(run, data, k=k or (200,), temperature=temperature or (0.1,), **options)


@app.command()
def linear(
    run: Run,
    data: Data = None,
    protocol: Annotated[
        Literal["paper", "quick"],
        typer.Option(help="paper: MoCo's, 100 epochs of crops; quick: a minute on cached features"),
    ] = "paper",
    train_views: Annotated[
        Literal["crops", "centre"],
        typer.Option(help="quick: trained on a random crop, or on the view of the test"),
    ] = "crops",
    epochs: Annotated[int, typer.Option(help="paper: passes over the training images")] = 100,
    lr: Annotated[float, typer.Option(help="paper: first learning rate")] = 30.0,
    layer: Head = "backbone",
    size: Size = None,
    device: Device = "auto",
    precision: Precision = "float32",
    seed: Seed = 0,
    baseline: Baseline = True,
    cache: Cache = True,
    per_class: PerClass = False,
    confusion: Confusion = False,
    json: Json = None,
) -> None:
    """A linear classifier on frozen features."""
    from mocokit.evaluate.api import evaluate_linear

    options: dict[str, Any] = {"layer": layer, "cache": cache, "protocol": protocol}
    options["train_views"] = train_views
    options |= _shared(size, device, precision, seed, baseline, per_class, confusion, json)
    evaluate_linear(run, data, epochs=epochs, lr=lr, **options)


@app.command()
def finetune(
    run: Run,
    data: Data = None,
    percent: Annotated[
        list[float] | None, typer.Option(help="of the labels; repeatable (default: 1, 10, 100)")
    ] = None,
    epochs: Annotated[int, typer.Option(help="passes over the labelled images, at least")] = 30,
    lr: Annotated[float, typer.Option(help="first learning rate")] = 0.05,
    layer_decay: Annotated[
        float, typer.Option(help="each layer's learning rate over that of the layer above it")
    ] = 1.0,
    size: Size = None,
    device: Device = "auto",
    precision: Precision = "float32",
    seed: Seed = 0,
    baseline: Baseline = True,
    per_class: PerClass = False,
    confusion: Confusion = False,
    json: Json = None,
) -> None:
    """Train all layers on a share of the labels, beside the same from random weights."""
    from mocokit.evaluate.api import evaluate_finetune

    options = _shared(size, device, precision, seed, baseline, per_class, confusion, json)
    evaluate_finetune(
        run, data, percent=percent or (1, 10, 100), epochs=epochs, lr=lr, layer_decay=layer_decay,
        **options,
    )  # fmt: skip


@app.command()
def voc(
    run: Run,
    data: Annotated[
        str, typer.Argument(help="VOCdevkit/, a folder of VOC's layout, or one of COCO's")
    ],
    split: Annotated[Literal["07+12", "07"], typer.Option(help="of VOCdevkit")] = "07+12",
    trials: Annotated[int, typer.Option(help="how many, with seeds one after another")] = 5,
    seed: Annotated[int, typer.Option(help="of the first trial")] = 0,
    steps: Annotated[
        int | None, typer.Option(help="training steps (default: 24,000, or 9,000 for 07)")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="images per step (default: 16); fewer take a lower lr and more steps"),
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="A=VALUE", help="any value; repeatable")
    ] = None,
    classes: Annotated[str | None, typer.Option(help="A,B,C; nothing: all that are found")] = None,
    every: Annotated[int, typer.Option(help="test every so many steps too")] = 0,
    out: Annotated[
        str | None, typer.Option(help="folder; nothing: one in RUN, or in runs/")
    ] = None,
    device: Device = "auto",
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"], typer.Option(help="of the network")
    ] = "auto",
    pictures: Annotated[int, typer.Option(help="test images to draw with what was found")] = 6,
    json: Json = None,
    iterations: Annotated[int | None, typer.Option(hidden=True)] = None,  # 0.1's --steps
    ims_per_step: Annotated[int | None, typer.Option(hidden=True)] = None,  # 0.1's --batch-size
) -> None:
    """Fine-tune a Faster R-CNN C4 as the MoCo papers do, and measure AP. Takes a GPU.

    The same command goes on with what was stopped.
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
        "device": device,
        "precision": precision,
        "seed": seed,
        "baseline": baseline,
        "per_class": per_class,
        "confusion": confusion,
        "json": json,
    }
