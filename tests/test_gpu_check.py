"""The script for a GPU, dry: on a CPU, with a tiny network, uncompiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def dry(out: Path, *pieces: str, **environment: str) -> str:
    out.mkdir()
    given = {"DEVICE": "cpu", "TINY": "--tiny", "HOW": "off", "OUT": str(out), "PY": sys.executable}
    given |= {"TMPDIR": str(out.parent), "SITE": str(out / "none"), "WITH_RESUME": ""}
    command = ["bash", "benchmarks/gpu_check.sh", *pieces]
    given = {**os.environ, **given, **environment}
    done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = (out / "report.txt").read_text()
    for failed in ("FAIL", "TIME", "SKIP"):
        assert failed not in report, report + (out / "log.txt").read_text()
    return report


def test_methods_speed_and_training(tmp_path):
    report = dry(tmp_path / "out", "micro", "bench_cifar", "train", CASES="mocov2")
    assert "PASS micro mocov2 float32 compile off" in report
    assert "bench cifar uncompiled, loop over groups: all" in report
    assert "launches and waiting" in report
    assert "done train, graphs auto: exit 0" in report
    assert (tmp_path / "out" / "backbone.0").stat().st_size > 100_000


@pytest.mark.slow
def test_every_method_and_resume(tmp_path):
    report = dry(tmp_path / "out", "micro", "resume", "bench_r50")
    assert report.count("PASS micro") == 20
    assert "PASS kill and resume, compile off" in report
