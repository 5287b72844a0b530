"""A run's processes, forked from one that has loaded everything: none costs seconds of loading.

What matters only in an interpreter of its own, its start and its end, is seen in test_launch.py.
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path


class Forks:
    """A server that forks; `close` ends it with all that it started."""

    def __init__(self):
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def run(self, world, log, function, *arguments):
        """Call MODULE:FUNCTION of the tests in each of `world` processes that find one another.

        What they print is in the files log0, log1, ...; the assertion is that all end well.
        """
        asked = [world, free_port(), str(log), function, arguments]
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        codes = json.loads(self._server.stdout.readline())
        texts = [Path(f"{log}{rank}").read_text() for rank in range(world)]
        assert codes == [0] * world, "\n".join(texts)

    def close(self):
        os.killpg(self._server.pid, signal.SIGKILL)
        self._server.communicate()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve():
    for line in sys.stdin:
        world, port, log, name, arguments = json.loads(line)
        module, function = name.split(":")
        call = getattr(importlib.import_module(module), function)
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
        ranks = {}
        for rank in map(str, range(world)):
            pid = os.fork()
            if pid == 0:
                os.environ |= place | {"RANK": rank, "LOCAL_RANK": rank}
                _child(call, arguments, log + rank)
            ranks[pid] = int(rank)
        codes = [0] * world
        while ranks:
            pid, status = os.wait()
            codes[ranks.pop(pid)] = os.waitstatus_to_exitcode(status)
            if status:  # the others would wait for it
                for other in ranks:
                    os.kill(other, signal.SIGKILL)
        print(json.dumps(codes), flush=True)


def _child(call, arguments, log):
    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        call(*arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    importlib.import_module("mocokit.train")
    importlib.import_module("timm")
    serve()
