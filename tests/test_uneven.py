"""Uneven shares: every loss with every mechanism on three processes is the same as on one.

Four groups of 22 images lie on three processes as 12, 5 and 5 images, then three of 17 as 6, 6 and
5. In float64 two steps of SGD agree to the last digits, with the loss and each metric of the batch.
"""

import os

import pytest
import torch
import torch.distributed as dist
from nets import small_encoder

from mocokit.engine.average import GradientAverage, average_statistics
from mocokit.methods.losses import LOSSES, InfoNCE
from mocokit.methods.memorybank import MemoryBank
from mocokit.methods.method import Step
from mocokit.methods.moco import MoCo
from mocokit.methods.simclr import SimCLR
from mocokit.nets.batchnorm import use_groups, use_whole
from mocokit.nets.heads import build_head

WORLD, DATA, DIM = 3, 40, 8
BATCHES = [(22, 4), (17, 3)]  # images and their groups
T = 0.3
SYMMETRIC, PIECES, WHOLE = {"symmetric": True}, {"micro_batch": 6}, {"whole": True}


def cases():
    """(mechanism, loss, options) by name."""
    found = {}
    for loss in LOSSES:
        for mechanism, variants in {
            "moco": ({}, SYMMETRIC, PIECES | SYMMETRIC | {"enqueue": "one"}, WHOLE),
            "simclr": ({"symmetric": False}, SYMMETRIC, PIECES | SYMMETRIC, WHOLE | SYMMETRIC),
            "bank": ({"negatives": None}, {"negatives": 9}, PIECES | {"negatives": 9}),
        }.items():
            for options in variants:
                words = "-".join(f"{k}={v}" for k, v in options.items())
                found[f"{mechanism}-{loss}-{words}"] = mechanism, loss, options
    for words, options in (("", {}), ("-pieces", PIECES)):
        found[f"bank-nce{words}"] = "bank", "nce", {"noise": True, "negatives": 9} | options
    return found


def build(mechanism, loss, options):
    def count_groups(images):
        return 1 if options.get("whole") else dict(BATCHES)[images]

    encoder = small_encoder(dim=DIM)[1]
    torch.manual_seed(1)
    given = {"loss": (InfoNCE if loss == "nce" else LOSSES[loss])(T), "count_groups": count_groups}
    given |= options
    if mechanism == "moco":
        predictor = use_groups(build_head("mlp_bn", DIM, 12, DIM), 4)
        given |= {"dim": DIM, "queue_size": 50, "momentum": 0.9, "predictor": predictor}
        method = MoCo(encoder, **given)
    elif mechanism == "simclr":
        method = SimCLR(encoder, batch_size=22, **given)
    else:
        method = MemoryBank(encoder, images=DATA, dim=DIM, momentum=0.5, **given)
    if options.get("whole"):
        use_whole(method)
    return method.double().train()


def share(images, groups, rank, world, whole):
    """The rows of the batch that a process holds, by hand."""
    if world == 1:
        return slice(0, images)
    if whole:
        cuts = {22: [0, 8, 15, 22], 17: [0, 6, 12, 17]}[images]
    else:
        cuts = {22: [0, 12, 17, 22], 17: [0, 6, 12, 17]}[images]
    return slice(cuts[rank], cuts[rank + 1])


def steps(case, rank, world):
    """Loss and metrics of each step over the whole batch, and all tensors after the last."""
    mechanism, loss, options = case
    method = build(mechanism, loss, options)
    sgd = torch.optim.SGD(method.trained(), lr=0.05, momentum=0.9)
    average = GradientAverage(method.trained())
    draw, recorded = torch.Generator().manual_seed(2), []
    for number, (images, groups) in enumerate(BATCHES):
        views = torch.randn(2, images, 3, 8, 8, generator=draw, dtype=torch.float64)
        index = torch.randperm(DATA, generator=draw)[:images]
        mine = share(images, groups, rank, world, options.get("whole", False))
        views, index = [view[mine] for view in views[: len(method.views)]], index[mine]
        output = method(views, index, Step(0, number, images))
        output.loss.backward()
        average.finish()
        sgd.step()
        sgd.zero_grad(set_to_none=True)
        method.update(output.keep, number, 0.5)
        part = len(index) / images
        values = {"loss": output.loss.detach() / world}
        values |= {name: value * part for name, value in output.metrics.items()}
        numbers = torch.stack([value.double() for value in values.values()])
        if world > 1:
            # By groups, of which each moves its statistics; with `whole` all have moved alike.
            counts = [[2, 1, 1], [1, 1, 1]][groups == 3]
            average_statistics(method, part if options.get("whole") else counts[rank] / groups)
            dist.all_reduce(numbers)
        recorded.append(dict(zip(values, numbers.tolist(), strict=True)))
    return recorded, method.state_dict()


def in_a_world(out):
    """All cases on this process; the first writes what came of them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    found = {name: steps(case, rank, WORLD) for name, case in cases().items()}
    torch.save(found, f"{out}{rank}")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def together(forks, tmp_path_factory):
    out = tmp_path_factory.mktemp("uneven") / "found"
    forks.run(WORLD, f"{out}.log", "test_uneven:in_a_world", str(out))
    return [torch.load(f"{out}{rank}", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("name", cases())
def test_three_uneven_shares_are_the_batch(together, name):
    recorded, state = steps(cases()[name], 0, 1)
    for rank, found in enumerate(together):
        metrics, tensors = found[name]
        assert tensors.keys() == state.keys()
        for key, tensor in state.items():
            torch.testing.assert_close(
                tensors[key], tensor, atol=1e-10, rtol=1e-9, msg=lambda m, k=key: f"{k}: {m}"
            )
        for step, (values, alone) in enumerate(zip(metrics, recorded, strict=True)):
            # The spread is each process's own, which the loop takes the mean of. NCE may draw an
            # image's own entry, and whether that is nearer than itself is a matter of rounding.
            unlike = {"feature_std", *({"contrast_top1"} if name.startswith("bank-nce") else ())}
            for key in alone.keys() - unlike:
                assert values[key] == pytest.approx(alone[key], rel=1e-9), (rank, step, key)


def test_the_shares_are_uneven_and_all_cases_differ(together):
    """So that no case hides another, and a loss without its weight would be seen."""
    losses = {
        name: tuple(round(values["loss"], 9) for values in recorded)
        for name, (recorded, _) in together[0].items()
    }
    assert len({*losses.values()}) > len(losses) * 0.6
    sizes = [share(22, 4, rank, WORLD, False) for rank in range(WORLD)]
    assert [part.stop - part.start for part in sizes] == [12, 5, 5]
