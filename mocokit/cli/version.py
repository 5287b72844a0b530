"""`mocokit --version`: what a bug report needs to say about versions and hardware."""

import platform
from collections import Counter
from importlib.metadata import PackageNotFoundError, version

from mocokit.version import VERSION


def report() -> str:
    """A few lines; the first one is the version of mocokit."""
    import torch

    from mocokit.engine.hardware import cpu_name, gpus, memory_gib
    from mocokit.engine.runtime import choose_device, default_precision, default_threads

    device, memory = choose_device("auto"), memory_gib()
    cpu = f"{cpu_name()}, {default_threads()} usable cores"
    lines = [
        f"mocokit {VERSION}",
        f"Python {platform.python_version()} on {platform.platform()}",
        # torch's own text names the build too, such as 2.11.0+cu128.
        f"torch {torch.__version__}, torchvision {_version('torchvision')}, "
        f"timm {_version('timm')}",
        f"device: {device}, precision {default_precision(device)}",
        f"CPU: {cpu}" + (f", {memory:.1f} GiB memory" if memory else ""),
    ]
    counted = Counter(gpus())
    lines += [f"GPU: {count} x {name}" for name, count in counted.items()] or ["GPU: none"]
    return "\n".join(lines)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
