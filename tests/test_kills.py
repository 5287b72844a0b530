"""`kill -9` at any moment, during a write too: the resumed run is bit for bit the straight one.

A process that has loaded everything forks each run, so that a kill costs no seconds of loading.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from mocokit.engine import checkpoint

SETTINGS = {
    "engine.threads": 1,
    "optim.name": "sgd",
    "optim.lr": 0.05,
    "save.every_steps": 1,
    "log.every_steps": 1,
    "monitor.every_epochs": 1,
}
KILLS = 10

# Prints the exit status of every run; a run that is killed gives 9.
FORKING = """
import json, os, random, signal, sys, time
import mocokit, mocokit.train, timm  # loaded by a run when it builds its network
from mocokit.engine import checkpoint

data, straight, killed, kills, moment, settings = sys.argv[1:]
settings, replace, writes = json.loads(settings), os.replace, 0

def dying_replace(source, target):
    global writes
    writes += str(source).endswith(".partial") and "step-" in str(source)
    if writes == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

def run(out, dying=False):
    pid = os.fork()
    if pid == 0:
        if dying:
            checkpoint.os.replace = dying_replace
        code = 1
        try:
            mocokit.pretrain("demo", data, out, epochs=4, batch_size=32, settings=settings)
            code = 0
        finally:
            os._exit(code)
    return pid

def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def lines():
    path = os.path.join(killed, "metrics.jsonl")
    return open(path).read().count("\\n") if os.path.exists(path) else 0

start = time.monotonic()
codes = [ended(run(straight))]
step = (time.monotonic() - start) / 40
draw = random.Random(0)
for number in range(int(kills)):
    pid = run(killed, moment == "write")
    if moment == "random":
        further = lines() + draw.randrange(3)  # of some 25 with those of scores
        look = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while lines() < further and not os.waitid(os.P_PID, pid, look):
            time.sleep(0.001)
        time.sleep(draw.random() * step)
        os.kill(pid, signal.SIGKILL)
    codes.append(ended(pid))
codes.append(ended(run(killed)))
print(json.dumps(codes))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the runs")
@pytest.mark.parametrize(("moment", "kills"), [("random", KILLS), ("write", 2)])
def test_killed_at_any_moment_and_resumed_equals_straight(toy_npz, tmp_path, moment, kills):
    folders = tmp_path / "straight", tmp_path / "killed"
    command = [sys.executable, "-c", FORKING, toy_npz, *folders, str(kills), moment]
    done = subprocess.run(
        [*command, json.dumps(SETTINGS)], stdout=subprocess.PIPE, text=True, check=True
    )
    first, *between, last = json.loads(done.stdout)
    assert (first, last) == (0, 0)
    assert between.count(-9) > kills / 2 and {*between} <= {0, -9}  # some may have been faster
    one, two = (checkpoint.load(folder / "last.pt") for folder in folders)
    assert one["step"] == two["step"] == 20
    assert {"queue.rows", "encoder.head.0.weight", "key_encoder.head.0.weight"} < {*one["method"]}
    for name, tensor in one["method"].items():
        assert torch.equal(tensor, two["method"][name]), name
    a, b = (told(folder) for folder in folders)
    assert a == b
    assert not list(folders[1].rglob("*.partial"))


def told(folder):
    """What the run says of its numbers: every line, without clocks and memory."""
    clocks = {"images_per_s", "data_wait", "peak_memory_gib"}
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in clocks} for line in lines]
