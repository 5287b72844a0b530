"""The verbs. Parses, then imports what the verb needs: `--help` loads no torch."""

import sys
from typing import Annotated, Any

import typer

from mocokit import recipes, settings as settings_
from mocokit.config import Settings
from mocokit.errors import MocokitError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Turn a folder of unlabelled images into a visual backbone by momentum contrast.",
)


@app.callback()
def callback() -> None:
    """Keeps `pretrain` a verb of its own."""


@app.command()
def pretrain(
    recipe: Annotated[
        str | None,
        typer.Argument(help="a recipe's name, a config.yaml, or the images; nothing: a demo"),
    ] = None,
    data: Annotated[str | None, typer.Argument(help="a folder of images, or a .npz")] = None,
    out: Annotated[
        str | None, typer.Option(help="run folder; an unfinished run there is gone on with")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="passes over the images")] = None,
    batch_size: Annotated[int | None, typer.Option(help="images a step, over all GPUs")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps")] = None,
    seed: Annotated[int | None, typer.Option(help="all chance follows from it")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="any setting; repeatable")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with the newest unfinished such run in runs/")
    ] = False,
    show: Annotated[
        bool, typer.Option("--show", help="print every setting and the augmentation, and stop")
    ] = False,
) -> None:
    """Train a backbone by a recipe on a folder of images, labelled or not.

    Without arguments: a two-minute demonstration on embedded textures.
    """
    changes = settings_.parse_assignments(assignments or [])
    flags: dict[str, Any] = {
        "train.epochs": epochs,
        "train.batch_size": batch_size,
        "engine.device": device,
        "seed": seed,
    }
    changes |= {path: value for path, value in flags.items() if value is not None}
    asked, _ = recipes.asked(recipe, data, changes, needs_data=not show)
    if show:
        _show(asked)
        return
    from mocokit.pretrain import pretrain as run

    run(recipe, data, out, resume=resume, settings=changes)


@app.command("check")
def check_data(
    recipe: Annotated[
        str | None, typer.Argument(help="a recipe's name, a config.yaml, or the images")
    ] = None,
    data: Annotated[str | None, typer.Argument(help="a folder of images, or a .npz")] = None,
    out: Annotated[str, typer.Option(help="where to write the sheet")] = "views.png",
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="any setting; repeatable")
    ] = None,
) -> None:
    """Say what a data set holds, and draw a sheet of the views that the network will see."""
    changes = settings_.parse_assignments(assignments or [])
    recipes.asked(recipe, data, changes)  # mistakes come before heavy imports
    from mocokit.check import check

    check(recipe, data, out, changes)


@app.command("recipes")
def list_recipes() -> None:
    """List the recipes: what each is, what it costs, what was published and what we measured."""
    for name, recipe in recipes.RECIPES.items():
        first, *rest = [line.strip() for line in (recipe.__doc__ or "").strip().splitlines()]
        typer.echo(f"{name}\n  {first}")
        for line in rest:
            if line:
                typer.echo(f"    {line}")


def _show(asked: Settings) -> None:
    """Every setting with its meaning, the difference from the recipe, and the augmentation."""
    from mocokit.views.params import ViewSpec, describe

    base = recipes.RECIPES.get(asked.recipe, recipes.mocov2)()
    changed = settings_.difference(base, asked)
    for path, field in settings_.fields():
        value = settings_.get(asked, path)
        was = f"  (recipe: {changed[path][0]})" if path in changed else ""
        typer.echo(f"{path} = {value}{was}\n    {field.description}")
    typer.echo(f"\nDifference from the recipe {asked.recipe}:")
    for path, (before, after) in changed.items():
        typer.echo(f"  {path}: {before} -> {after}")
    if not changed:
        typer.echo("  none")
    typer.echo("\nAugmentation of both views, in order:")
    rows = [
        ("operation", "probability", "parameters"),
        *describe(ViewSpec(**asked.views.model_dump())),
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for operation, probability, parameters in rows:
        typer.echo(f"  {operation:{widths[0]}}  {probability:{widths[1]}}  {parameters}")


def main() -> None:
    """Run a verb and exit: 0 done, 1 our fault, 2 the user's, 75 or 130 stopped and saved."""
    try:
        app()
    except MocokitError as error:
        typer.echo(f"mocokit: {error}", err=True)
        sys.exit(error.exit_code)
