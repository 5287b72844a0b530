"""MoCo against a transcription of the paper's Algorithm 1, and the invariants of the method."""

import copy
import dataclasses
import gc
import math
import weakref

import numpy as np
import pytest
import torch
from nets import small_encoder
from reference import ReferenceMoCo

from mocokit.chance import Slot
from mocokit.methods.losses import LOSSES
from mocokit.methods.method import Step
from mocokit.methods.moco import MoCo

BATCH, GROUPS, QUEUE, STEPS = 12, 3, 30, 20  # 30 is no multiple of 12: the queue wraps unevenly


def build(encoder, groups=GROUPS, momentum=0.9, dtype=torch.float64, **options):
    options = {"queue_size": QUEUE, "dim": 8} | options
    loss = LOSSES[options.pop("loss", "info_nce")](options.pop("temperature", 0.2))
    torch.manual_seed(1)
    moco = MoCo(encoder, loss=loss, momentum=momentum, count_groups=lambda n: groups, **options)
    return moco.to(dtype)


def batches(dtype=torch.float64, steps=STEPS, batch=BATCH):
    generator = torch.Generator().manual_seed(2)
    for step in range(steps):
        a, b = torch.randn(2, batch, 3, 16, 16, generator=generator, dtype=torch.float64).to(dtype)
        yield step, (a, b), Step(0, step, batch)


def permutation(now, batch=BATCH):
    return torch.from_numpy(np.argsort(now.draw(Slot.KEY_SHUFFLE, batch), kind="stable"))


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def take_step(moco, optimizer, views, now, step):
    output = moco(views, torch.arange(len(views[0])), now)
    output.loss.backward()
    optimizer.step()
    moco.update(output.keep, step, (step + 1) / STEPS)
    optimizer.zero_grad(set_to_none=True)
    return output


@pytest.mark.parametrize("follow_first", [False, True], ids=["paper", "authors"])
@pytest.mark.parametrize("batch_norm", [True, False], ids=["bn", "no-bn"])
@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_equals_the_published_algorithm(head, batch_norm, dtype, tolerance, follow_first):
    plain, grouped = small_encoder(head, batch_norm)
    moco = build(grouped, dtype=dtype)
    reference = ReferenceMoCo(plain.to(dtype), moco.queue.rows, 0.9, 0.2, GROUPS)
    ours, theirs = sgd(moco.encoder), sgd(reference.f_q)
    moved = moco.queue.rows.clone()
    for step, views, now in batches(dtype):
        loss = take_step(moco, ours, views, now, step).loss.detach()
        expected = reference.step(*views, permutation(now), theirs, follow_first)
        assert float(loss) == pytest.approx(float(expected), abs=tolerance)
    if follow_first:
        reference.follow()  # the authors' key encoder is one step behind at the end
    assert not torch.equal(moved, moco.queue.rows)
    torch.testing.assert_close(moco.queue.rows, reference.queue.T, atol=tolerance, rtol=0)
    for ours_, theirs_ in (
        (moco.encoder, reference.f_q),
        (moco.key_encoder, reference.f_k),
    ):
        for p, q in zip(ours_.parameters(), theirs_.parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=tolerance, rtol=0)


@pytest.mark.parametrize("micro_batch", [1, 4, 8, 9])
@pytest.mark.parametrize("symmetric", [False, True])
def test_micro_batches_equal_the_undivided_step(micro_batch, symmetric):
    _, encoder = small_encoder()
    whole = build(copy.deepcopy(encoder), symmetric=symmetric)
    pieces = build(copy.deepcopy(encoder), symmetric=symmetric, micro_batch=micro_batch)
    optimizers = [sgd(whole.encoder), sgd(pieces.encoder)]
    for step, views, now in batches(steps=4):
        outputs = []
        for moco in (whole, pieces):
            output = moco(views, torch.arange(BATCH), now)
            (3.0 * output.loss).backward()  # as under loss scaling
            outputs.append(output)
        for p, q in zip(whole.encoder.parameters(), pieces.encoder.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, atol=1e-10, rtol=0)
        for name, value in outputs[0].metrics.items():
            if name == "contrast_top1":
                torch.testing.assert_close(outputs[1].metrics[name], value)
        for moco, optimizer, output in zip((whole, pieces), optimizers, outputs, strict=True):
            optimizer.step()
            moco.update(output.keep, step, 0.0)
            optimizer.zero_grad(set_to_none=True)
    for (name, p), q in zip(whole.state_dict().items(), pieces.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-10, rtol=0, msg=name)


def saved_bytes(moco, views, now):
    """Bytes that the graph keeps for the backward pass once forward is done."""
    kept = []

    def pack(tensor):
        holder = Held(tensor)
        kept.append(weakref.ref(holder))
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        output = moco(views, torch.arange(BATCH), now)
    gc.collect()
    alive = [ref() for ref in kept]
    return output, sum(holder.tensor.nbytes for holder in alive if holder is not None)


class Held:
    def __init__(self, tensor):
        self.tensor = tensor


def test_only_one_piece_of_activations_is_held():
    _, encoder = small_encoder()
    _, views, now = next(batches())
    _whole, many = saved_bytes(build(copy.deepcopy(encoder)), views, now)
    _pieces, few = saved_bytes(build(copy.deepcopy(encoder), micro_batch=4), views, now)
    assert many > 10**5 and few < many / 100  # after forward nothing is left to keep


def test_pieces_overflow_where_the_whole_does_in_float16():
    _, encoder = small_encoder()
    _, views, now = next(batches(torch.float32))
    finite = []
    for micro in (None, 4):
        for scale in (1.0, 2.0**24):
            moco = build(copy.deepcopy(encoder), dtype=torch.float32, micro_batch=micro)
            step = dataclasses.replace(now, loss_scale=scale)
            with torch.autocast("cpu", dtype=torch.float16):
                output = moco(views, torch.arange(BATCH), step)
            (scale * output.loss).backward()
            finite.append(all(bool(p.grad.isfinite().all()) for p in moco.encoder.parameters()))
    assert finite == [True, False, True, False]


def test_forward_changes_nothing_but_running_statistics():
    _, encoder = small_encoder()
    moco = build(encoder)
    before = {k: v.clone() for k, v in moco.state_dict().items()}
    _, views, now = next(batches())
    moco(views, torch.arange(BATCH), now).loss.backward()
    for name, value in moco.state_dict().items():
        if "running" not in name and "tracked" not in name:
            assert torch.equal(before[name], value), name
    assert not torch.equal(
        before["key_encoder.backbone.1.running_mean"], moco.key_encoder.backbone[1].running_mean
    )


def test_no_gradient_reaches_key_encoder_or_queue():
    _, encoder = small_encoder()
    moco = build(encoder)
    _, views, now = next(batches())
    moco(views, torch.arange(BATCH), now).loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in moco.key_encoder.parameters())
    assert moco.queue.rows.grad is None and not moco.queue.rows.requires_grad
    assert all(p.grad is not None for p in moco.encoder.parameters())


def test_first_follow_is_by_the_formula():
    _, encoder = small_encoder()
    moco = build(encoder, momentum=0.75)
    start = [p.clone() for p in moco.encoder.parameters()]
    _, views, now = next(batches())
    take_step(moco, sgd(moco.encoder), views, now, 0)
    for k0, q, k in zip(
        start, moco.encoder.parameters(), moco.key_encoder.parameters(), strict=True
    ):
        torch.testing.assert_close(k - q, 0.75 * (k0 - q))
        assert not torch.equal(k, k0)


def test_key_encoder_keeps_its_own_running_statistics():
    _, encoder = small_encoder()
    moco = build(encoder, momentum=0.0)  # parameters become the encoder's, buffers do not
    for step, views, now in batches(steps=3):
        take_step(moco, sgd(moco.encoder), views, now, step)
    q, k = moco.encoder.backbone[1], moco.key_encoder.backbone[1]
    assert torch.equal(q.weight, k.weight)
    assert not torch.allclose(q.running_mean, k.running_mean)


def test_keys_join_the_queue_only_after_their_step():
    _, encoder = small_encoder()
    moco = build(encoder)
    optimizer = sgd(moco.encoder)
    for step, views, now in batches(steps=5):
        before, pointer = moco.queue.rows.clone(), int(moco.queue.pointer)
        output = moco(views, torch.arange(BATCH), now)
        similar = output.keep @ before.T
        assert float(similar.max()) < 1 - 1e-9  # the step's keys are not among its negatives
        output.loss.backward()
        optimizer.step()
        moco.update(output.keep, step, 0.0)
        torch.testing.assert_close(moco.queue.rows.norm(dim=1), torch.ones(QUEUE).double())
        places = (pointer + torch.arange(BATCH)) % QUEUE
        assert torch.equal(moco.queue.rows[places], output.keep)


def test_shuffle_changes_groups_but_not_the_order_of_keys():
    _, encoder = small_encoder(batch_norm=False)
    _, views, now = next(batches())
    shuffled = build(copy.deepcopy(encoder))(views, torch.arange(BATCH), now)
    straight = build(copy.deepcopy(encoder), shuffle=False)(views, torch.arange(BATCH), now)
    torch.testing.assert_close(shuffled.keep, straight.keep)  # without BN groups mean nothing
    _, encoder = small_encoder()
    shuffled = build(copy.deepcopy(encoder))(views, torch.arange(BATCH), now)
    straight = build(copy.deepcopy(encoder), shuffle=False)(views, torch.arange(BATCH), now)
    assert not torch.allclose(shuffled.keep, straight.keep)


def test_one_group_makes_the_shuffle_a_no_op():
    _, encoder = small_encoder()
    _, views, now = next(batches())
    shuffled = build(copy.deepcopy(encoder), groups=1)(views, torch.arange(BATCH), now)
    straight = build(copy.deepcopy(encoder), groups=1, shuffle=False)(
        views, torch.arange(BATCH), now
    )
    assert torch.equal(shuffled.loss, straight.loss)


def test_symmetric_loss_is_the_sum_of_both_directions_against_one_queue():
    _, encoder = small_encoder()
    _, (a, b), now = next(batches())
    both = build(copy.deepcopy(encoder), symmetric=True)((a, b), torch.arange(BATCH), now)
    one = build(copy.deepcopy(encoder))((a, b), torch.arange(BATCH), now)
    other = build(copy.deepcopy(encoder))((b, a), torch.arange(BATCH), now)
    torch.testing.assert_close(both.loss, one.loss + other.loss)
    torch.testing.assert_close(both.keep, torch.cat([one.keep, other.keep]))


def test_channels_last_gives_the_same_numbers():
    _, encoder = small_encoder()
    _, (a, b), now = next(batches())
    plain = build(copy.deepcopy(encoder))((a, b), torch.arange(BATCH), now)
    moco = build(copy.deepcopy(encoder)).to(memory_format=torch.channels_last)
    views = tuple(v.contiguous(memory_format=torch.channels_last) for v in (a, b))
    torch.testing.assert_close(moco(views, torch.arange(BATCH), now).loss, plain.loss)


def test_loss_of_unrelated_unit_vectors_is_near_chance():
    _, encoder = small_encoder()
    moco = build(encoder, queue_size=4096, temperature=1.0)
    assert moco.chance_loss == pytest.approx(math.log(4097))
    both = build(encoder, queue_size=4096, symmetric=True)  # a sum of two losses
    assert both.chance_loss == pytest.approx(2 * math.log(4097))
    _, views, now = next(batches())
    loss = float(moco(views, torch.arange(BATCH), now).loss.detach())
    assert abs(loss - math.log(4097)) < 1.5


def test_loss_and_queue_stay_float32_under_autocast():
    _, encoder = small_encoder()
    moco = build(encoder, dtype=torch.float32)
    _, views, now = next(batches(torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = moco(views, torch.arange(BATCH), now)
    assert output.loss.dtype == output.keep.dtype == torch.float32
    norms = output.keep.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))
