"""How a run is doing, at the moments when the loop asks: scores, health, a verdict."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from mocokit.data.loader import Loader
from mocokit.engine.runtime import autocast
from mocokit.engine.stop import Stopped, StopSignals
from mocokit.health.bn_leak import Coming, contrast_by_grouping
from mocokit.health.knn_monitor import KnnMonitor
from mocokit.health.measures import HealthMonitor, positives_in_queue
from mocokit.methods.method import KeyGroups, Step
from mocokit.run import build
from mocokit.run.state import RunState
from mocokit.transfer import to_device

CONTRASTED = 2048  # images that are contrasted under two groupings, where there are as many


def diagnose(
    run: RunState,
    loader: Loader,
    monitor: KnnMonitor | None,
    stop: StopSignals,
) -> dict[str, Any]:
    """Every process calls it; the one that writes also scores, and measures the geometry.

    A signal breaks off what that one does alone; then nothing was found.

    The images are those of the steps to come, which the queue does not hold yet. Nothing that
    training reads is changed.
    """
    # Without gradients, and in evaluation, each encoder would be another graph to compile.
    with torch.compiler.set_stance("force_eager"):
        return _diagnose(run, loader, monitor, stop)


def _diagnose(
    run: RunState,
    loader: Loader,
    monitor: KnnMonitor | None,
    stop: StopSignals,
) -> dict[str, Any]:
    method, settings = run.parts.method, run.settings
    precision = partial(autocast, run.device, settings.engine.precision)
    found: dict[str, Any] = {}
    if isinstance(method.leak, KeyGroups):
        images = min(CONTRASTED, run.effect.images)
        steps = -(-images // settings.train.batch_size)
        coming = upcoming(run, loader, steps)
        found |= contrast_by_grouping(method, coming, precision)
    else:
        found["leak_unchecked"] = method.leak.reason
    for queue in method.queues.values():
        rows, each = len(queue.rows), queue.keys_per_image
        share = positives_in_queue(run.effect.images, rows, each)
        found["positives_in_queue"] = max(share, found.get("positives_in_queue", 0.0))
    if not run.world.writes:
        return {}
    health: HealthMonitor = build.build_health(settings, run.splits, run.device)
    try:
        with stop.interruptible():
            views, _, _ = next(upcoming(run, loader, 1))
            found |= health.run(method.encoder, views)
            if monitor is not None:
                found |= dict(monitor.run(method.encoder))
                found["scored_images"] = monitor.scored_images
    except Stopped:
        return {}
    return found


def upcoming(run: RunState, loader: Loader, count: int) -> Iterator[Coming]:
    """The next steps, as the loop will see them."""
    for step in range(run.step, run.step + count):
        batch = loader.batch_at(step)
        now = Step(run.settings.seed, step, run.images_of(step))
        run.set_groups(now.images)
        yield run.views(step, batch), to_device(batch.index, run.device), now
