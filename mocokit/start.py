"""What is done with a method once, before the first step of a process."""

import torch.distributed as dist

from mocokit import build
from mocokit.diagnosis import MakeViews
from mocokit.engine.world import World
from mocokit.job import Job
from mocokit.nets.batchnorm import alone, group_sizes, moving_once, set_groups
from mocokit.nets.heads import calibrate_head


def calibrate_on_first_group(job: Job, make_views: MakeViews) -> None:
    """Scale the head's start on the first group of the first batch, whatever a process's share."""
    method = job.parts.method
    if job.world.writes:
        known = job.settings, job.unread(), World(), job.device, 0, job.bad.known
        views = make_views(job, 0, build.build_loader(*known).batch_at(0))[0][:]
        first = group_sizes(job.images_of(0), job.effect.groups)[0]
        with moving_once(method.encoder, 0), alone(method.encoder):
            set_groups(method.encoder, 1)
            calibrate_head(method.encoder, views[:first])
    if job.world.size > 1:
        for parameter in method.encoder.parameters():
            dist.broadcast(parameter.data, 0)
    method.begin_anew()
