"""A batch file for SLURM that trains, and resumes after a time limit or a preemption."""

import re
import shlex
from collections.abc import Sequence

from mocokit.errors import UserError

# SIGTERM comes this long before the limit, so that the run can save.
WARNING = 120  # seconds

SCRIPT = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={gpus}
#SBATCH --gpus-per-node={gpus}
#SBATCH --cpus-per-task={cpus}
#SBATCH --time={time}
#SBATCH --output={log}
#SBATCH --open-mode=append
# The run saves when it gets TERM, and ends with 75.
#SBATCH --signal=TERM@{warning}
# After a failed node or a preemption SLURM starts the job again by itself.
#SBATCH --requeue
{extra}
# The signal above reaches only the run. A signal to this script is scancel's or a preemption's.
trap 'cancelled=yes' TERM

# One process for each GPU; a minute after the first has ended, the others are ended too.
srun --cpus-per-task={cpus} --kill-on-bad-exit=0 --wait=60 {command}
code=$?

# --requeue does not cover a time limit, so the job requeues itself.
if [ "$code" -eq 75 ] && [ -z "$cancelled" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def script(
    command: Sequence[str],
    *,
    name: str,
    nodes: int,
    gpus: int,
    cpus: int,
    time: str,
    log: str,
    options: Sequence[str] = (),
) -> str:
    """The file's text: `command`, a list of words, in one process for each GPU.

    `options` are further ones of sbatch, such as partition=gpu. Raises UserError for what would
    break the file's lines.
    """
    if not re.fullmatch(r"(\d+-)?\d{1,4}(:\d{2}){0,2}", time):
        raise UserError(f"--time {time}: write 24:00:00, or 2-12:00:00 for two and a half days")
    for option in options:
        if not re.fullmatch(r"[a-z][a-z-]*(=[^\s#]+)?", option):
            raise UserError(f"--sbatch {option}: write NAME or NAME=VALUE, as in partition=gpu")
    for what, text in (("a name", name), ("--log", log)):
        if re.search(r"\s", text):
            raise UserError(f"{what} of {text!r} has a space, which sbatch's lines do not take")
    return SCRIPT.format(
        command=shlex.join(command),
        extra="\n".join(f"#SBATCH --{option}" for option in options) + ("\n" if options else ""),
        name=name,
        nodes=nodes,
        gpus=gpus,
        cpus=cpus,
        time=time,
        log=log,
        warning=WARNING,
    )
