"""The invariants of momentum contrast, each named after its number in the project's list of facts.

Where another file tests an invariant against something independent, the docstring names it.
"""

import copy
import math

import pytest
import torch
from nets import small_encoder
from torch import nn
from torch.nn import functional as F

from mocokit import recipes
from mocokit.engine.average import GradientAverage, average_statistics
from mocokit.engine.optim import build_optimizer
from mocokit.methods.losses import LOSSES, InfoNCE
from mocokit.methods.method import Step
from mocokit.methods.moco import MoCo
from mocokit.methods.parts import Queue, follow
from mocokit.methods.simclr import SimCLR
from mocokit.methods.similarity import Negatives
from mocokit.nets.batchnorm import GroupedBatchNorm2d
from mocokit.run.build import build_method
from mocokit.settings import replace
from mocokit.settings.sizes import fit, resolve

BATCH, GROUPS, QUEUE = 12, 3, 30


def moco(groups=GROUPS, momentum=0.9, batch_norm=True, loss="info_nce", **options):
    _, encoder = small_encoder(batch_norm=batch_norm)
    torch.manual_seed(1)
    options = {"queue_size": QUEUE, "dim": 8} | options
    method = MoCo(
        encoder, loss=LOSSES[loss](0.2), momentum=momentum, count_groups=lambda n: groups, **options
    )
    return method.double()


def views(step=0, images=BATCH):
    generator = torch.Generator().manual_seed(step)
    return tuple(torch.randn(2, images, 3, 16, 16, generator=generator, dtype=torch.float64))


def forward(method, step=0, pair=None, images=BATCH):
    pair = views(step, images) if pair is None else pair
    return method(pair, torch.arange(images), Step(0, step, images))


def sgd(method):
    return torch.optim.SGD(method.trained(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def step(method, optimizer, number=0):
    output = forward(method, number)
    output.loss.backward()
    optimizer.step()
    method.update(output.keep, number, 0.0)
    optimizer.zero_grad(set_to_none=True)
    return output


def negatives_of(method, number):
    """The rows that a forward compares its queries with, once for each direction."""
    seen, compare = [], Negatives.compare

    def watched(self, *arguments):
        seen.append(self.rows.clone())
        return compare(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Negatives, "compare", watched)
        with torch.no_grad():
            forward(method, number)
    return seen


def test_invariant_01_the_authors_order_and_the_papers_give_the_same_keys():
    """20 steps against a transcription in both orders: test_moco.py. Here: the key encoder used at
    a step is the one that the steps before left, and forward leaves it alone."""
    method = moco()
    optimizer = sgd(method)
    for number in range(3):
        before = [p.clone() for p in method.key_encoder.parameters()]
        output = forward(method, number)
        for p, old in zip(method.key_encoder.parameters(), before, strict=True):
            assert torch.equal(p, old)
        output.loss.backward()
        optimizer.step()
        method.update(output.keep, number, 0.0)


def test_invariant_02_one_step_from_equal_weights_leaves_m_of_the_difference():
    method = moco(momentum=0.75)
    old = [p.clone() for p in method.key_encoder.parameters()]
    step(method, sgd(method))
    for k, q, before in zip(
        method.key_encoder.parameters(), method.encoder.parameters(), old, strict=True
    ):
        torch.testing.assert_close(k - q, 0.75 * (before - q))
        assert not torch.equal(k, before)


def test_invariant_03_key_statistics_are_its_own_and_never_averaged():
    method = moco(momentum=0.0)  # parameters become the encoder's at once
    step(method, sgd(method))
    q, k = method.encoder.backbone[1], method.key_encoder.backbone[1]
    assert torch.equal(q.weight, k.weight) and method.key_encoder.training
    assert not torch.equal(q.running_mean, k.running_mean)


def test_invariant_04_buffers_are_not_broadcast(monkeypatch):
    """Of a method, processes exchange gradients and running statistics, and no queue.

    Equality of queues on all processes: test_world.py.
    """
    method, sent = moco(), []

    def all_reduce(tensor, async_op=False):
        sent.append(tensor.numel())

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    average = GradientAverage(method.trained())
    sum(parameter.sum() for parameter in method.trained()).backward()
    average.finish()
    assert sum(sent) == sum(parameter.numel() for parameter in method.trained())
    sent.clear()
    average_statistics(method, 0.5)
    buffers = dict(method.named_buffers())
    running = [name for name in buffers if name.endswith(("running_mean", "running_var"))]
    assert running and sum(sent) == sum(buffers[name].numel() for name in running)


@pytest.mark.parametrize(("size", "count"), [(30, 12), (7, 12), (16, 16), (5, 1), (12, 5)])
def test_invariant_05_any_ratio_of_queue_and_batch_keeps_every_key_in_order(size, count):
    """No divisibility is asked for, and no batch is dropped for it."""
    queue, everything = Queue(size, 3), []
    assert torch.allclose(queue.rows.norm(dim=1), torch.ones(size))
    for number in range(9):
        keys = F.normalize(torch.randn(count, 3) + number, dim=1)
        everything += list(keys)
        queue.enqueue(keys)
        at = int(queue.pointer)
        newest = torch.cat([queue.rows[at:], queue.rows[:at]])  # oldest first
        known = min(len(everything), size)
        torch.testing.assert_close(newest[-known:], torch.stack(everything[-known:]))
    assert torch.allclose(queue.rows.norm(dim=1), torch.ones(size))


def test_invariant_06_keys_of_a_step_are_negatives_only_from_the_next_on():
    method = moco()
    optimizer = sgd(method)
    for number in range(4):
        rows, at = method.queue.rows.clone(), int(method.queue.pointer)
        seen = negatives_of(method, number)
        assert torch.equal(seen[0], rows)
        output = step(method, optimizer, number)
        assert float((output.keep @ rows.T).max()) < 1 - 1e-9
        places = (at + torch.arange(BATCH)) % QUEUE
        assert torch.equal(method.queue.rows[places], output.keep)


def test_invariant_06_in_neither_direction_is_the_positive_among_the_negatives():
    """lightly's symmetric recipes fail this: each image's own key is among its negatives."""
    method = moco(symmetric=True)
    step(method, sgd(method))  # so that there are real keys in the queue
    before = method.queue.rows.clone()
    seen = negatives_of(method, 1)
    assert len(seen) == 2 and all(torch.equal(rows, before) for rows in seen)
    output = forward(method, 1)
    assert float((output.keep @ before.T).max()) < 1 - 1e-9
    assert len(output.keep) == 2 * BATCH


def test_invariant_07_the_queue_may_change_after_the_backward_pass_without_a_copy():
    method = moco()
    output = forward(method)
    output.loss.backward()
    before = method.queue.rows.data_ptr()
    method.update(output.keep, 0, 0.0)  # in place; the authors clone 33 MB a step instead
    assert method.queue.rows.data_ptr() == before


def test_invariant_08_no_gradient_reaches_keys_key_encoder_or_queue():
    method = moco()
    output = forward(method)
    assert not output.keep.requires_grad and not method.queue.rows.requires_grad
    output.loss.backward()
    assert all(p.grad is None for p in method.key_encoder.parameters())
    assert all(p.grad is not None for p in method.encoder.parameters())
    ours = {id(p) for p in method.key_encoder.parameters()}
    optimizer = build_optimizer("sgd", method.parameter_groups(), 0.1, 0.9, 1e-4)
    assert not ours & {id(p) for group in optimizer.param_groups for p in group["params"]}


def test_invariant_09_the_loss_is_cross_entropy_of_logits_whose_first_is_right():
    method = moco(batch_norm=False, groups=1, shuffle=False)
    a, b = views()
    with torch.no_grad():
        q, k = (F.normalize(method.encoder(view), dim=1) for view in (a, b))
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ method.queue.rows.T], 1) / 0.2
        expected = F.cross_entropy(logits, torch.zeros(BATCH, dtype=torch.long))
        torch.testing.assert_close(forward(method, pair=(a, b)).loss, expected)


def test_invariant_12_shuffling_is_undone_and_spares_the_queries():
    shuffled, straight = moco(batch_norm=False), moco(batch_norm=False, shuffle=False)
    torch.testing.assert_close(
        forward(shuffled).keep, forward(straight).keep
    )  # no groups, no trace
    shuffled, straight = moco(), moco(shuffle=False)
    assert not torch.allclose(forward(shuffled).keep, forward(straight).keep)
    q, s = (m.encoder.backbone[1].running_mean for m in (shuffled, straight))
    assert torch.equal(q, s)  # queries were grouped alike


def test_invariant_13_in_one_group_a_shuffle_does_nothing():
    a, b = moco(groups=1), moco(groups=1, shuffle=False)
    assert torch.equal(forward(a).loss, forward(b).loss)


def test_invariant_14_the_notebooks_interleaved_groups_are_ours_in_another_order():
    """Its SplitBatchNorm puts image n into split n mod s; ours are consecutive, of any size."""
    torch.manual_seed(0)
    images, splits = torch.randn(12, 4, 3, 3, dtype=torch.float64), 3
    theirs = F.batch_norm(  # the notebook's reshape: splits become channels
        images.reshape(12 // splits, splits * 4, 3, 3), None, None, training=True
    ).reshape(12, 4, 3, 3)
    order = torch.arange(12).view(-1, splits).T.flatten()  # 0, 3, 6, 9, 1, ...
    layer = GroupedBatchNorm2d(4, 4).double()
    for layout in (torch.contiguous_format, torch.channels_last):
        ours = layer(images[order].contiguous(memory_format=layout))[order.argsort()]
        torch.testing.assert_close(ours, theirs)
    assert int(layer.num_batches_tracked) == 2  # it counts, where the notebook's stays 0


def test_invariant_14_running_statistics_are_the_mean_over_groups():
    images = torch.randn(9, 4, 3, 3, dtype=torch.float64)
    layer, plain = GroupedBatchNorm2d(4, 3).double(), []
    layer(images)
    for part in images.split(3):
        one = nn.BatchNorm2d(4).double()
        one(part)
        plain.append(one.running_var)
    torch.testing.assert_close(layer.running_var, torch.stack(plain).mean(0))


def test_invariant_16_the_start_is_easy_then_the_loss_rises_to_chance():
    """The random queue is easy to tell from keys, which resemble each other; then keys fill it."""
    method = moco(queue_size=48, momentum=0.99)
    optimizer = torch.optim.SGD(method.trained(), lr=1e-4)
    losses = [float(step(method, optimizer, number).loss.detach()) for number in range(6)]
    assert losses[0] < 0.5 * method.chance_loss
    assert max(losses[4:]) > losses[0]
    assert losses[5] == pytest.approx(method.chance_loss, rel=0.15)
    assert f"{method.chance_loss:.2f}" in method.expectation


def test_invariant_18_the_symmetric_loss_is_a_sum_over_one_snapshot():
    a, b = views()
    both = forward(moco(symmetric=True), pair=(a, b))
    one, other = forward(moco(), pair=(a, b)), forward(moco(), pair=(b, a))
    torch.testing.assert_close(both.loss, one.loss + other.loss)
    assert torch.equal(both.keep, torch.cat([one.keep, other.keep]))


@pytest.mark.parametrize(("symmetric", "count"), [(False, BATCH - 1), (True, 2 * (BATCH - 1))])
def test_invariant_20_end_to_end_has_the_batch_as_negatives_and_two_gradients(symmetric, count):
    _, encoder = small_encoder(batch_norm=False)
    options = {"count_groups": lambda n: 1, "batch_size": BATCH, "symmetric": symmetric}
    method = SimCLR(encoder, loss=InfoNCE(0.2), **options).double()
    assert method.negatives == count
    assert method.chance_loss == pytest.approx(math.log(1 + count))
    a, b = (view.requires_grad_() for view in views())
    forward(method, pair=(a, b)).loss.backward()
    assert float(a.grad.abs().sum()) > 0 and float(b.grad.abs().sum()) > 0


def test_invariant_21_the_bank_scores_with_old_entries_and_knows_the_images():
    """Against a transcription: test_memorybank.py."""
    settings = replace(recipes.memorybank_cifar10(), {"net.backbone": "resnet_tiny"})
    method = build_method(settings, resolve(settings, 256)).double()
    before = method.bank.rows.clone()
    index = torch.tensor([200, 3])
    output = method((torch.randn(2, 3, 32, 32).double(),), index, Step(0, 0, 2))
    assert torch.equal(method.bank.rows, before)
    method.update(output.keep, 0, 0.0)
    assert (method.bank.rows != before).any(1).nonzero()[:, 0].tolist() == [3, 200]


@pytest.mark.parametrize("name", ["mocov1", "mocov2", "mocov2_cifar10", "memorybank", "endtoend"])
def test_invariant_24_weight_decay_covers_batch_norm_and_biases(name):
    optim = recipes.by_name(name).optim
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = build_optimizer(
        optim.name, [{"params": [*net.parameters()]}], 0.1, 0.9, optim.weight_decay
    )
    before = [p.detach().clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, old in zip(net.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old * (1 - 0.1 * optim.weight_decay))


def test_invariant_24_lars_spares_them():
    optim = recipes.simclr().optim
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = build_optimizer(
        optim.name, [{"params": [*net.parameters()]}], 0.1, 0.9, 0.5, optim.trust
    )
    before = [p.detach().clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = [not torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True)]
    assert moved == [True, False, False, False]


@pytest.mark.parametrize("name", ["moco", "simclr", "memorybank"])
def test_invariant_25_all_state_of_a_method_is_saved(name):
    """A killed and resumed run against a straight one: test_resume.py and test_pretrain.py."""
    queue = {"method.queue_size": 64} if name == "moco" else {}
    changes = {"net.backbone": "resnet_tiny", "method.name": name, **queue}
    settings = replace(recipes.mocov2_cifar10(), changes)
    method, other = (build_method(settings, resolve(settings, 512)) for _ in range(2))
    output = method(
        tuple(torch.randn(len(method.views), 8, 3, 32, 32)), torch.arange(8), Step(0, 0, 8)
    )
    method.update(output.keep, 0, 0.5)
    other.load_state_dict(method.state_dict())
    for (key, a), b in zip(method.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b), key
    assert all(not module._non_persistent_buffers_set for module in method.modules())


def test_invariant_26_pieces_move_running_statistics_once():
    """Gradients of GradCache against the undivided step: test_simclr.py."""
    _, encoder = small_encoder()
    options = {"count_groups": lambda n: GROUPS, "batch_size": BATCH, "micro_batch": 4}
    method = SimCLR(copy.deepcopy(encoder), loss=InfoNCE(0.2), **options).double()
    forward(method).loss.backward()
    assert int(method.encoder.backbone[1].num_batches_tracked) == 1


@pytest.mark.parametrize(("momentum", "steps"), [(0.99, 69), (0.999, 693), (0.9999, 6931)])
def test_invariant_27_half_lives(momentum, steps):
    key, query = (nn.Linear(1, 1, bias=False).double().requires_grad_(False) for _ in range(2))
    key.weight.fill_(1.0)
    query.weight.zero_()
    for _ in range(steps):
        follow(key, query, momentum)
    assert float(key.weight) == pytest.approx(0.5, abs=0.002)


@pytest.mark.parametrize(("batch", "expected"), [(64, 0.9997498), (128, 0.9995), (512, 0.998)])
def test_invariant_27_the_horizon_per_image_is_kept(batch, expected):
    settings = replace(recipes.mocov2(), {"train.batch_size": batch})
    assert resolve(settings, 10**6).key_momentum == pytest.approx(expected, abs=2e-6)


def test_invariant_28_a_hand_set_queue_over_a_tenth_of_the_data_warns():
    stated = {"method.queue_size": 65536}
    _, notices = fit(replace(recipes.mocov2(), stated), 200_000, stated)
    assert any("over a tenth of the 200000 images" in notice for notice in notices)
    _, notices = fit(replace(recipes.mocov2(), stated), 700_000, stated)
    assert not notices
