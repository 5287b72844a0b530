"""The memory bank against a transcription of InstDisc, and what a bank must keep."""

import copy

import numpy as np
import pytest
import torch
from nets import small_encoder
from reference import ReferenceBank

from mocokit.chance import Slot
from mocokit.methods.losses import LOSSES
from mocokit.methods.memorybank import MemoryBank
from mocokit.methods.method import Step

BATCH, GROUPS, IMAGES, M, T = 12, 3, 40, 9, 0.2


def build(encoder, noise=False, negatives=M, loss="info_nce", **options):
    torch.manual_seed(1)
    return MemoryBank(
        encoder, loss=LOSSES[loss](T), images=IMAGES, dim=8, negatives=negatives, momentum=0.5,
        count_groups=lambda n: GROUPS, noise=noise, **options,
    ).double()  # fmt: skip


def batches(steps=6):
    generator = torch.Generator().manual_seed(2)
    for number in range(steps):
        view = torch.randn(BATCH, 3, 16, 16, generator=generator, dtype=torch.float64)
        index = torch.randperm(IMAGES, generator=generator)[:BATCH]
        yield number, view, index, Step(0, number, BATCH)


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)


def take(method, optimizer, view, index, now, number):
    output = method((view,), index, now)
    output.loss.backward()
    optimizer.step()
    method.update(output.keep, number, 0.0)
    optimizer.zero_grad(set_to_none=True)
    return float(output.loss.detach())


@pytest.mark.parametrize(
    ("noise", "negatives"), [(False, None), (False, M), (True, M)], ids=["all", "drawn", "nce"]
)
def test_equals_the_transcription(noise, negatives):
    plain, grouped = small_encoder()
    method = build(grouped, noise, negatives)
    reference = ReferenceBank(plain.double(), method.bank.rows, T, GROUPS)
    ours, theirs = sgd(method.encoder), sgd(plain)
    for number, view, index, now in batches():
        count = (BATCH if noise else 1) * (negatives or 0)
        drawn = torch.from_numpy(
            np.floor(now.draw(Slot.BANK_NEGATIVES, count) * IMAGES).astype(np.int64)
        )
        drawn = drawn.view(BATCH, M) if noise else drawn if count else torch.arange(IMAGES)
        q = reference.encode(view)
        if noise:
            reference.estimate(q, index, drawn)
        loss = reference.loss(q, index, drawn, noise)
        theirs.zero_grad()
        loss.backward()
        theirs.step()
        reference.blend(q.detach(), index)
        actual = take(method, ours, view, index, now, number)
        assert actual == pytest.approx(float(loss.detach()), abs=1e-10)
    torch.testing.assert_close(method.bank.rows, reference.rows, atol=1e-10, rtol=0)
    for p, q in zip(method.encoder.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-10, rtol=0)
    if noise:
        assert float(method.constant) == pytest.approx(float(reference.z))


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("micro_batch", [4, 8])
def test_pieces_equal_the_undivided_step(noise, micro_batch):
    _, encoder = small_encoder()
    whole = build(copy.deepcopy(encoder), noise)
    pieces = build(copy.deepcopy(encoder), noise, micro_batch=micro_batch)
    a, b = sgd(whole.encoder), sgd(pieces.encoder)
    for number, view, index, now in batches(3):
        first = take(whole, a, view, index, now, number)
        assert take(pieces, b, view, index, now, number) == pytest.approx(first, abs=1e-10)
    for (name, p), q in zip(whole.state_dict().items(), pieces.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-10, rtol=0, msg=name)


def test_scores_come_before_the_bank_moves():
    _, encoder = small_encoder()
    method = build(encoder, negatives=None)
    _, view, index, now = next(batches())
    before = method.bank.rows.clone()
    output = method((view,), index, now)
    assert torch.equal(method.bank.rows, before)
    method.update(output.keep, 0, 0.0)
    moved = (method.bank.rows != before).any(1)
    assert torch.equal(moved.nonzero()[:, 0], index.sort().values)
    mixed = torch.nn.functional.normalize(0.5 * before[index] + 0.5 * output.keep.vectors, dim=1)
    torch.testing.assert_close(method.bank.rows[index], mixed)


def test_bank_and_constant_are_saved():
    _, encoder = small_encoder()
    method = build(encoder, noise=True)
    for number, view, index, now in batches(2):
        take(method, sgd(method.encoder), view, index, now, number)
    _, encoder = small_encoder(seed=5)
    other = build(encoder, noise=True)
    other.load_state_dict(method.state_dict())
    assert torch.equal(other.bank.rows, method.bank.rows)
    assert float(other.constant) == float(method.constant) > 0
    assert method.health() == {"bank_seen": 2 * BATCH / IMAGES}


def test_a_bank_is_full_from_the_step_that_fills_it():
    """Two epochs: what is seen again fills it no further."""
    _, encoder = small_encoder()
    method = build(encoder)
    shares = []
    for number, view, index, now in batches(8):
        shares.append(method.health()["bank_seen"])
        take(method, sgd(method.encoder), view, index, now, number)
    assert shares == [0.0, 0.3, 0.6, 0.9, 1.0, 1.0, 1.0, 1.0]


def test_one_view_is_asked_for():
    assert [role.name for role in MemoryBank.views] == ["query"]


@pytest.mark.parametrize("negatives", [None, M])
def test_chance_is_the_loss_of_vectors_all_alike(negatives):
    _, encoder = small_encoder()
    for noise in (False, True) if negatives else (False,):
        method = build(encoder, noise, negatives)
        assert method.chance_loss > 0 and np.isfinite(method.chance_loss)
    method = build(encoder, False, negatives)
    assert method.chance_loss == pytest.approx(np.log(1 + (negatives or IMAGES - 1)))
