"""End-to-end contrast against transcriptions of SimCLR and of MoCo's end-to-end mechanism."""

import copy

import numpy as np
import pytest
import torch
from nets import small_encoder
from reference import reference_endtoend, reference_simclr

from mocokit.chance import Slot
from mocokit.methods.losses import LOSSES
from mocokit.methods.method import Step
from mocokit.methods.simclr import SimCLR
from mocokit.nets.batchnorm import use_whole

BATCH, GROUPS, T = 12, 3, 0.3


def build(encoder, loss="info_nce", whole=False, **options):
    method = SimCLR(
        encoder, loss=LOSSES[loss](T), count_groups=lambda n: 1 if whole else GROUPS,
        batch_size=BATCH, whole=whole, **options,
    )  # fmt: skip
    if whole:
        use_whole(method)
    return method.double()


def batch(step=0, images=BATCH):
    generator = torch.Generator().manual_seed(step)
    views = torch.randn(2, images, 3, 16, 16, generator=generator, dtype=torch.float64)
    return views, Step(0, step, images)


def gradients(module):
    return [p.grad.clone() for p in module.parameters()]


def step(method, views, now):
    method.zero_grad()
    output = method(tuple(views), torch.arange(len(views[0])), now)
    output.loss.backward()
    return output, gradients(method.encoder)


def same(a, b, tolerance=1e-10):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=tolerance, rtol=0)


def test_simclr_is_algorithm_1_with_one_batch_of_2n_views():
    plain, grouped = small_encoder()
    plain, method = plain.double(), build(grouped, whole=True)
    for number in range(3):
        views, now = batch(number)
        output, ours = step(method, views, now)
        plain.zero_grad()
        loss = reference_simclr(plain, *views, T)
        loss.backward()
        assert float(output.loss.detach()) == pytest.approx(float(loss.detach()), abs=1e-12)
        same(ours, gradients(plain))
    same(plain.buffers(), method.encoder.buffers())  # running statistics too


@pytest.mark.parametrize("symmetric", [True, False])
def test_endtoend_is_mocos_in_shuffled_groups(symmetric):
    plain, grouped = small_encoder()
    plain, method = plain.double(), build(grouped, symmetric=symmetric)
    for number in range(3):
        views, now = batch(number)
        order = torch.from_numpy(np.argsort(now.draw(Slot.KEY_SHUFFLE, BATCH), kind="stable"))
        output, ours = step(method, views, now)
        plain.zero_grad()
        loss = reference_endtoend(plain, *views, order, T, GROUPS, symmetric)
        loss.backward()
        assert float(output.loss.detach()) == pytest.approx(float(loss.detach()), abs=1e-12)
        same(ours, gradients(plain))


@pytest.mark.parametrize("loss", ["info_nce", "dcl", "dclw", "align_uniform", "dual_temperature"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("micro_batch", [1, 4, 9])
def test_pieces_equal_the_undivided_step(micro_batch, symmetric, loss):
    """GradCache: gradients, loss and metrics; running statistics move once."""
    _, encoder = small_encoder()
    views, now = batch(images=11)  # uneven groups
    whole = build(copy.deepcopy(encoder), loss, symmetric=symmetric)
    pieces = build(copy.deepcopy(encoder), loss, symmetric=symmetric, micro_batch=micro_batch)
    (a, ours), (b, theirs) = step(whole, views, now), step(pieces, views, now)
    torch.testing.assert_close(a.loss, b.loss, atol=1e-12, rtol=0)
    same(ours, theirs)
    same(whole.buffers(), pieces.buffers(), 1e-12)
    for name in a.metrics:
        torch.testing.assert_close(a.metrics[name], b.metrics[name])


def test_pieces_in_float32_are_right_to_1e_5():
    _, encoder = small_encoder()
    views, now = batch()
    whole = build(copy.deepcopy(encoder)).float()
    pieces = build(copy.deepcopy(encoder), micro_batch=4).float()
    (_, ours), (_, theirs) = step(whole, views.float(), now), step(pieces, views.float(), now)
    for x, y in zip(ours, theirs, strict=True):
        assert float((x - y).norm()) <= 1e-5 * float(x.norm()) + 1e-8


@pytest.mark.parametrize("chunk", [None, 5])
def test_cached_gradients_are_computed_outside_autocast(monkeypatch, chunk):
    """The gradient by the vectors is float32's, as where a loop differentiates; not bfloat16's."""
    _, encoder = small_encoder()
    method = build(encoder, micro_batch=4, chunk=chunk).float()
    views, now = batch()
    found, differentiate = [], torch.autograd.grad

    def watched(loss, inputs, **options):
        if len(inputs) == 1 and len(inputs[0]) == 2 * BATCH:
            (again,) = differentiate(loss, inputs, retain_graph=True)
            with torch.autocast("cpu", enabled=False):
                (exact,) = differentiate(loss, inputs, retain_graph=True)
            found.append((again, exact))
        return differentiate(loss, inputs, **options)

    monkeypatch.setattr(torch.autograd, "grad", watched)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        method(tuple(views.float()), torch.arange(BATCH), now)
    ((again, exact),) = found
    torch.testing.assert_close(again, exact, rtol=1e-6, atol=1e-8)


def test_dropout_is_the_same_in_both_passes():
    """Otherwise the cached gradients belong to other vectors than those they are handed to."""
    _, encoder = small_encoder(batch_norm=False)
    encoder.head.append(torch.nn.Dropout(0.5))
    views, now = batch()
    pieces = build(copy.deepcopy(encoder), micro_batch=4)
    torch.manual_seed(7)
    output, ours = step(pieces, views, now)
    torch.manual_seed(7)
    net, vectors = copy.deepcopy(encoder).double(), []
    order = np.argsort(now.draw(Slot.KEY_SHUFFLE, BATCH), kind="stable")
    for view in (views[0], views[1][order]):
        vectors += [net(part) for part in view.split(4)]
    z = torch.nn.functional.normalize(torch.cat(vectors), dim=1)
    z = torch.cat([z[:BATCH], z[BATCH:][np.argsort(order)]])
    logits = (z @ z.T / T).masked_fill(torch.eye(len(z), dtype=torch.bool), float("-inf"))
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(len(z)).roll(BATCH))
    loss.backward()
    assert float(output.loss.detach()) == pytest.approx(float(loss.detach()), abs=1e-12)
    same(ours, gradients(net))


def test_negatives_in_chunks_change_nothing():
    _, encoder = small_encoder()
    views, now = batch()
    a, b = (build(copy.deepcopy(encoder), chunk=chunk) for chunk in (None, 5))
    same(step(a, views, now)[1], step(b, views, now)[1])


def test_nothing_follows_a_step():
    _, encoder = small_encoder()
    method = build(encoder)
    views, now = batch()
    before = {name: t.clone() for name, t in method.state_dict().items() if "running" not in name}
    method.update(step(method, views, now)[0].keep, 0, 0.1)
    for name, tensor in before.items():
        if "num_batches" not in name:
            assert torch.equal(method.state_dict()[name], tensor), name


def test_the_loss_starts_near_chance():
    _, encoder = small_encoder()
    method = build(encoder)
    assert method.negatives == 2 * (BATCH - 1)
    assert build(encoder, symmetric=False).negatives == BATCH - 1
    views, now = batch()
    loss = float(method(tuple(views), torch.arange(BATCH), now).loss.detach())
    assert loss == pytest.approx(method.chance_loss, abs=1.0)


def test_an_image_that_is_twice_in_a_batch_is_no_negative_of_itself():
    """A bad image's substitute may be there already: at 2N - 2 negatives it has two fewer."""
    _, grouped = small_encoder()
    method = build(grouped, whole=True)
    views, now = batch()
    twice = torch.tensor([*range(BATCH - 1), 0])
    output = method(tuple(views), twice, now)
    a, b = (torch.nn.functional.normalize(v, dim=1) for v in method.encoder(
        torch.cat([*views])).detach().chunk(2))  # fmt: skip
    queries, keys, owners = torch.cat([a, b]), torch.cat([b, a]), torch.cat([twice, twice])
    losses = []
    for query, key, owner in zip(queries, keys, owners, strict=True):
        others = torch.cat([a, b])[owners != owner] @ query / T
        logits = torch.cat([(query @ key)[None] / T, others])
        losses.append(logits.logsumexp(0) - logits[0])
    assert float(output.loss.detach()) == pytest.approx(float(torch.stack(losses).mean()), abs=1e-9)
