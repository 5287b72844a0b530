"""The verbs. Parses, then imports what the verb needs: `--help` loads no torch."""

import json
import os
import signal
import sys
from typing import Annotated, Any

import typer

from mocokit import settings as settings_
from mocokit.cli import evaluate, launch, show as show_, slurm, streams
from mocokit.errors import MocokitError, UserError
from mocokit.files import printable, write_result
from mocokit.run import command
from mocokit.settings import sizes
from mocokit.settings.schema import Settings
from mocokit.version import VERSION

_MISUSE: Any = typer.BadParameter.__base__  # every mistake that typer finds; it has no name for it
# More than any machine or cluster has: what is beyond is a slip.
_NODES, _PROCESSES, _RESTARTS = 100_000, 1024, 100_000

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Turn a folder of unlabelled images into a visual backbone by momentum contrast.",
)

app.add_typer(evaluate.app, name="evaluate")


def _print_version(asked: bool) -> None:
    if asked:
        from mocokit.cli.version import report

        typer.echo(report())
        raise typer.Exit


@app.callback()
def callback(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            is_eager=True,  # before typer complains that there is no command
            callback=_print_version,
            help="print the versions and the hardware, as a bug report needs them",
        ),
    ] = False,
) -> None:
    """Options of `mocokit` itself. Without this function, a single verb would need no name."""


Data = Annotated[
    str | None,
    typer.Argument(help="the images: a folder, archives, a list, arrays, or a known set"),
]
Device = Annotated[
    str | None, typer.Option(help="auto, cpu, cuda, cuda:1, or mps, which was not run yet")
]
AllowImport = Annotated[
    list[str] | None,
    typer.Option(metavar="MODULE", help="let a method of this module be imported; repeatable"),
]
Processes = Annotated[
    int | None,
    typer.Option(min=1, max=_PROCESSES, help="processes on this machine; else one per visible GPU"),
]
Nodes = Annotated[int, typer.Option(min=1, max=_NODES, help="machines, each of which runs this")]
Restarts = Annotated[
    int,
    typer.Option(
        min=0,
        max=_RESTARTS,
        help="after a failure, restart from the last checkpoint up to this many times",
    ),
]


@app.command()
def pretrain(
    recipe: Annotated[
        str | None,
        typer.Argument(help="a recipe's name, a config.yaml, or the images; nothing: the demo"),
    ] = None,
    data: Data = None,
    out: Annotated[
        str | None, typer.Option(help="run folder; an unfinished run in it is resumed")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="passes over the images")] = None,
    batch_size: Annotated[int | None, typer.Option(help="images a step, over all GPUs")] = None,
    device: Device = None,
    seed: Annotated[int | None, typer.Option(help="random seed")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="any setting; repeatable")
    ] = None,
    allow_import: AllowImport = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="resume the newest unfinished run like this one in runs/"),
    ] = False,
    extend: Annotated[
        int | None,
        typer.Option(
            metavar="EPOCHS",
            min=1,
            help="RECIPE is a finished run: train this much longer, in a new run folder",
        ),
    ] = None,
    processes: Processes = None,
    nodes: Nodes = 1,
    rdzv: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="where several machines meet")
    ] = None,
    restarts: Restarts = 0,
    deterministic: Annotated[
        bool | None,
        typer.Option("--deterministic", help="equal kernels on CUDA, for equal bits there too"),
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="print what differs and what is in effect, then stop")
    ] = False,
    show_all: Annotated[
        bool, typer.Option("--show-all", help="print every setting as a config.yaml, then stop")
    ] = False,
) -> None:
    """Train a backbone by a recipe on a folder of images, labelled or not.

    Without arguments: a demonstration on embedded textures, two minutes on a core of an EPYC.

    Several processes are tested on a CPU; on several GPUs and on a cluster it was not run yet.
    """
    changes = settings_.parse_assignments(assignments or [])
    flags = {
        "train.epochs": epochs,
        "train.batch_size": batch_size,
        "engine.device": device,
        "seed": seed,
        "engine.deterministic": deterministic,
    }
    changes = command.merge(flags, changes)
    if extend is not None:
        from mocokit.run.extend import lengthened

        recipe, changes = lengthened(recipe, extend, changes)
    needs_data, allowed = not (show or show_all), allow_import or []
    asked, stated = command.asked(recipe, data, changes, needs_data, allowed)
    if show or show_all:
        typer.echo(show_.pretrain(asked, stated, everything=show_all))
        return
    if _launched(asked, processes, nodes, rdzv, restarts):
        return
    from mocokit.train import pretrain as run

    run(recipe, data, out, resume=resume, settings=changes, allow_import=allowed)


def _launched(
    asked: Settings, processes: int | None, nodes: int, rdzv: str | None, restarts: int
) -> bool:
    """Whether this command was run by processes that were started for it, to their end."""
    from mocokit.engine.world import announced

    launch.watch_starter()
    launch.end_again()
    several = announced(os.environ)
    if several:
        sizes.check_processes(asked, several.world.size)  # before they wait for one another
    if launch.REPORTS not in os.environ and several:
        given = {"--processes": processes, "--rdzv": rdzv, "--nodes": nodes > 1 or None}
        given["--restarts"] = restarts or None
        if words := [name for name, value in given.items() if value is not None]:
            raise UserError(
                f"{', '.join(words)}: this is a process of several already, started by somebody "
                "else, who decides on their number and starts them again; leave it out"
            )
    launch.check_place(nodes, rdzv)
    device = asked.engine.device
    number = None if several else launch.count_processes(device, processes, nodes, restarts)
    if number is None:
        return False
    sizes.check_processes(asked, number * nodes)  # before so many are started
    same = {"mocokit": VERSION, "recipe": asked.recipe, "--restarts": str(restarts)}
    same |= {path: str(value) for path, value in settings_.identity(asked).items()}
    launch.launch(sys.argv[1:], number, nodes, rdzv, restarts, same)
    return True


@app.command("check")
def check_data(
    recipe: Annotated[
        str | None,
        typer.Argument(help="a recipe's name, a config.yaml, or the images; nothing: the demo"),
    ] = None,
    data: Data = None,
    out: Annotated[str, typer.Option(help="where to write the sheet")] = "views.png",
    quick: Annotated[
        bool, typer.Option("--quick", help="read 200 images of a split, not all")
    ] = False,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="any setting; repeatable")
    ] = None,
    allow_import: AllowImport = None,
) -> None:
    """Say what a data set holds, and draw a sheet of the views that the network will see."""
    changes = settings_.parse_assignments(assignments or [])
    allowed = allow_import or []
    command.asked(recipe, data, changes, allowed=allowed)  # mistakes come before heavy imports
    from mocokit.check import check

    check(recipe, data, out, changes, quick=quick, allow_import=allowed)


@app.command("pack")
def pack_data(
    data: Annotated[
        str, typer.Argument(help="the images: a folder, archives, a list, arrays, or a known set")
    ],
    file: Annotated[str, typer.Argument(help="the file to write")],
    recipe: Annotated[
        str, typer.Option(help="whose smallest crop says how far images may be shrunk")
    ] = "mocov2",
    raw: Annotated[
        bool, typer.Option("--raw", help="store bare pixels: most room, no decoding")
    ] = False,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="any setting; repeatable")
    ] = None,
) -> None:
    """Put all images, no larger than training needs, into one file that is faster to read."""
    changes = settings_.parse_assignments(assignments or [])
    command.asked(recipe, data, changes)
    from mocokit.pack import pack

    signal.signal(signal.SIGINT, signal.default_int_handler)  # `pack` prints how to resume
    pack(data, file, recipe, raw, changes)


@app.command("slurm")
def write_slurm(
    recipe: Annotated[
        str | None,
        typer.Argument(help="a recipe's name, a config.yaml, or the images; nothing: the demo"),
    ] = None,
    data: Data = None,
    out: Annotated[
        str | None, typer.Option(help="run folder; required, because the job resumes it")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, max=_NODES, help="machines")] = 1,
    gpus: Annotated[int, typer.Option(min=1, max=_PROCESSES, help="GPUs of each machine")] = 8,
    cpus: Annotated[int, typer.Option(min=1, max=_PROCESSES, help="processors for each GPU")] = 8,
    time: Annotated[str, typer.Option(help="time limit of a job, which then resumes")] = "24:00:00",
    sbatch: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="of sbatch, as partition=gpu; repeatable"),
    ] = None,
    file: Annotated[str, typer.Option(help="where to write the batch file")] = "mocokit.sbatch",
    epochs: Annotated[int | None, typer.Option(help="passes over the images")] = None,
    batch_size: Annotated[int | None, typer.Option(help="images a step, over all GPUs")] = None,
    seed: Annotated[int | None, typer.Option(help="random seed")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="any setting; repeatable")
    ] = None,
    allow_import: AllowImport = None,
) -> None:
    """Write a batch file for SLURM that trains, saves before its limit, and resumes by itself.

    Tested with stand-ins for srun and scontrol; by SLURM itself it was not run yet.
    """
    changes = settings_.parse_assignments(assignments or [])
    flags = {"train.epochs": epochs, "train.batch_size": batch_size, "seed": seed}
    allowed = allow_import or []
    asked, _ = command.asked(recipe, data, command.merge(flags, changes), allowed=allowed)
    if out is None:
        raise UserError("name the run folder with --out: a job that resumes must find it again")
    shares = sizes.count_shares(asked, asked.train.batch_size)
    if nodes * gpus > shares:
        raise UserError(
            f"{nodes * gpus} GPUs for the {shares} batch-norm groups of a batch of "
            f"{asked.train.batch_size}: each holds whole groups, so ask for fewer, or raise "
            "--batch-size"
        )
    options = {"--epochs": epochs, "--batch-size": batch_size, "--seed": seed}
    # The job may start in another folder.
    is_file = (recipe or "").endswith((".yaml", ".yml"))
    first = os.path.abspath(recipe) if recipe and is_file else asked.recipe
    words = [sys.executable, "-m", "mocokit", "pretrain", first, *filter(None, [asked.data.path])]
    words += ["--out", os.path.abspath(out)]
    words += [word for k, v in options.items() if v is not None for word in (k, str(v))]
    words += [word for text in assignments or [] for word in ("--set", text)]
    words += [word for module in allowed for word in ("--allow-import", module)]
    if asked.data.root:
        root = json.dumps(os.path.abspath(os.path.expanduser(asked.data.root)), ensure_ascii=False)
        words += ["--set", f"data.root={root}"]
    name = f"mocokit-{asked.recipe}"
    text = slurm.script(
        words, name=name, nodes=nodes, gpus=gpus, cpus=cpus, time=time, log=f"{name}-%j.log",
        options=sbatch or [],
    )  # fmt: skip
    content = text.encode("utf-8", "surrogateescape")
    write_result(file, content, "--file", _is_batch_file)
    typer.echo(f"{file}: {nodes * gpus} GPUs. Submit it with: sbatch {file}")


def _is_batch_file(content: bytes) -> bool:
    """Whether `mocokit slurm` wrote it."""
    return content.startswith(b"#!/bin/bash\n#SBATCH") and b" -m mocokit pretrain " in content


@app.command("recipes")
def list_recipes(
    name: Annotated[
        str | None, typer.Argument(help="a recipe, for its whole story; nothing: list all")
    ] = None,
) -> None:
    """List the recipes with their published and measured accuracies, or describe one of them."""
    typer.echo(show_.recipe_list() if name is None else show_.recipe_story(name))


def main() -> None:
    """Run a verb and exit: 0 done, 1 our error, 2 the user's mistake, 75 or 130 stopped, saved."""
    # Until a run takes over signals, Ctrl-C ends everything at once: an import cannot be unwound.
    before = signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
    try:
        with streams.unheard() as out:
            code = _exit_code()
            if not code and (what := streams.lost(out)):
                code = _report(MocokitError(what))
    finally:
        signal.signal(signal.SIGINT, before)
    sys.exit(code)


def _exit_code() -> int:
    """Run the verb that the command line names."""
    try:
        return app(standalone_mode=False) or 0  # the code of what asked to end, such as --help
    except SystemExit as end:
        # Typer keeps silent about every closed pipe. Those of the output do not come this far.
        if not isinstance(end.__context__, BrokenPipeError):
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        return _report(MocokitError(streams.sentence(end.__context__)))
    except _MISUSE as error:  # typer quotes words as they were given
        if (
            not error.ctx or error.message != error.ctx.get_help()
        ):  # shown where no command is named
            error.message = str(UserError(error.message))
        error.show()
        return UserError.exit_code
    except MocokitError as error:
        return _report(error)
    except OSError as error:  # the last net
        return _report(MocokitError(streams.sentence(error)))


def _report(error: MocokitError) -> int:
    """Say what went wrong, here or through the command that started this process."""
    if not launch.report(error):
        rank = printable(os.environ.get("RANK", "0"))
        typer.echo(f"mocokit: {'' if rank == '0' else f'process {rank}: '}{error}", err=True)
    return error.exit_code
