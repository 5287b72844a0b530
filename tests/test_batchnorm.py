"""Grouped batch norm against torch's own, one group at a time."""

import copy
from contextlib import suppress

import pytest
import timm
import torch
from hypothesis import given, strategies as st
from timm.layers import BatchNormAct2d
from torch import nn

from mocokit.nets import batchnorm
from mocokit.nets.batchnorm import (
    GroupedBatchNorm2d,
    calibrate,
    group_sizes,
    local_statistics,
    one_statistics_update,
    set_groups,
    share_of_groups,
    use_groups,
    use_whole,
)


def filled(layer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(layer.weight.shape, generator=generator) + 0.5)
        layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator))
    return layer.double()


@given(st.integers(1, 500), st.integers(1, 40))
def test_groups_are_even_and_complete(images, groups):
    sizes = group_sizes(images, groups)
    assert sum(sizes) == images and len(sizes) == groups
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


@given(st.integers(1, 64), st.integers(1, 16))
def test_processes_share_all_groups(groups, world):
    shares = [share_of_groups(groups, rank, world) for rank in range(world)]
    assert [g for share in shares for g in range(groups)[share]] == list(range(groups))


def test_eight_groups_on_three_processes():
    shares = [share_of_groups(8, rank, 3) for rank in range(3)]
    assert [share.stop - share.start for share in shares] == [3, 3, 2]


@pytest.mark.parametrize("shape", [(5,), (5, 4, 6)], ids=["NC", "NCHW"])
@pytest.mark.parametrize(("images", "groups"), [(8, 2), (10, 3), (7, 2), (3, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_equals_torch_group_by_group(shape, images, groups, layout):
    if len(shape) == 1 and layout == torch.channels_last:
        pytest.skip("channels-last is a layout of images")
    torch.manual_seed(0)
    ours = filled(GroupedBatchNorm2d(5, images // groups))
    inputs = torch.randn(images, *shape, dtype=torch.float64)
    inputs = (
        inputs.to(memory_format=layout).requires_grad_()
        if len(shape) == 3
        else inputs.requires_grad_()
    )
    outputs = ours(inputs)
    if len(shape) == 3:
        assert outputs.is_contiguous(memory_format=layout)
    gradient = torch.randn_like(outputs)
    outputs.backward(gradient)
    means, variances = [], []
    other = inputs.detach().clone().requires_grad_()
    for part, g, result in zip(
        other.tensor_split(groups),
        gradient.tensor_split(groups),
        outputs.tensor_split(groups),
        strict=True,
    ):
        norm = filled(nn.BatchNorm2d(5) if len(shape) == 3 else nn.BatchNorm1d(5))
        expected = norm(part)
        torch.testing.assert_close(result, expected)
        expected.backward(g)
        means.append(norm.running_mean)
        variances.append(norm.running_var)
    torch.testing.assert_close(inputs.grad, other.grad)
    torch.testing.assert_close(ours.running_mean, torch.stack(means).mean(0))
    torch.testing.assert_close(ours.running_var, torch.stack(variances).mean(0))
    assert int(ours.num_batches_tracked) == 1


def test_number_of_groups_follows_from_the_batch_or_is_set():
    layer = GroupedBatchNorm2d(3, group_size=4).double()
    inputs = torch.randn(10, 3, 2, 2, dtype=torch.float64)
    by_size = layer(inputs)  # round(10 / 4) = 2 groups of five
    torch.testing.assert_close(
        by_size[:5].mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-9, rtol=0
    )
    set_groups(layer, 1)
    assert float(layer(inputs)[:5].detach().mean((0, 2, 3)).abs().max()) > 1e-3


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_eval_is_ordinary_batch_norm(eps):
    layer = filled(GroupedBatchNorm2d(3, 2, eps=eps))
    layer(torch.randn(6, 3, 2, 2, dtype=torch.float64))
    layer.running_var.mul_(1e-3)
    plain = nn.BatchNorm2d(3, eps=eps).double()
    plain.load_state_dict(layer.state_dict())
    inputs = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    before = layer.running_mean.clone()
    torch.testing.assert_close(layer.eval()(inputs), plain.eval()(inputs))
    assert torch.equal(before, layer.running_mean)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_every_batch_norm_of_timm_is_replaced_and_keeps_its_keys(name):
    """efficientnet has BatchNormAct2d, which also applies the activation."""
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=0, drop_rate=0.0, drop_path_rate=0.0)
    ours = use_groups(copy.deepcopy(plain), 2)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in ours.modules())
    assert list(ours.state_dict()) == list(plain.state_dict())
    inputs = torch.randn(4, 3, 64, 64)
    torch.testing.assert_close(ours.eval()(inputs), plain.eval()(inputs))
    expected = torch.cat([plain.train()(part) for part in inputs.split(2)])
    torch.testing.assert_close(ours.train()(inputs), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["images", "vectors", "with activation"])
@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.1])
@pytest.mark.parametrize("momentum", [0.1, 0.01, None])
@pytest.mark.parametrize("affine", [True, False])
def test_a_grouped_norm_keeps_all_that_the_norm_had(kind, eps, momentum, affine):
    """Two batches of small levels, beside which eps is large, in float64; then in evaluation."""
    options = {"eps": eps, "momentum": momentum, "affine": affine}
    if kind == "with activation":
        plain = BatchNormAct2d(5, **options, act_layer=nn.SiLU, drop_layer=nn.Hardtanh)
    else:
        plain = (nn.BatchNorm2d if kind == "images" else nn.BatchNorm1d)(5, **options)
    torch.manual_seed(0)
    for parameter in plain.parameters():
        nn.init.uniform_(parameter, 0.5, 2)
    ours = use_groups(nn.Sequential(copy.deepcopy(plain)), 100)[0].double()
    plain.double()
    frozen = use_groups(nn.Sequential(copy.deepcopy(plain).eval()), 100)[0]
    assert ours.training and not frozen.training
    assert isinstance(ours, GroupedBatchNorm2d) == (kind != "with activation")
    for scale in (0.01, 0.03, 0.02):
        inputs = scale * torch.randn(8, 5, *[3] * (0 if kind == "vectors" else 2)).double() + 0.5
        if scale == 0.02:
            ours.eval(), plain.eval()
        torch.testing.assert_close(ours(inputs), plain(inputs), rtol=1e-9, atol=1e-9)
    theirs = plain.state_dict()
    assert [*theirs] == [*ours.state_dict()]
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-9, atol=1e-12, msg=name)


def test_parts_of_a_batch_move_the_statistics_once():
    whole, parts = GroupedBatchNorm2d(3, 2).double(), GroupedBatchNorm2d(3, 2).double()
    inputs = torch.randn(10, 3, 2, 2, dtype=torch.float64)
    set_groups(whole, 5)
    whole(inputs)
    with one_statistics_update(parts, 2) as statistics:
        for piece, groups in ((slice(0, 4), 2), (slice(4, 10), 3)):
            set_groups(parts, groups)
            parts(inputs[piece])
            statistics.part(groups)
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_local_statistics_are_the_worlds_again():
    """Also where what one process does by itself fails; layers in groups stay as they are."""
    module = nn.Sequential(GroupedBatchNorm2d(3, 2), GroupedBatchNorm2d(3, 2))
    use_whole(module[:1])
    with local_statistics(module):
        assert [layer.whole for layer in module] == [False, False]
    assert [layer.whole for layer in module] == [True, False]
    with pytest.raises(ZeroDivisionError), local_statistics(module):
        _ = 1 / 0
    assert [layer.whole for layer in module] == [True, False]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("parts", [0, 2])
def test_statistics_without_parts_stay(parts, fails):
    """Means, variances and the count of batches; also where a part fails."""
    layer = GroupedBatchNorm2d(3, 2)
    layer(torch.randn(4, 3, 2, 2))
    before = copy.deepcopy(layer.state_dict())
    with suppress(ZeroDivisionError), one_statistics_update(layer, parts):
        layer(torch.randn(4, 3, 2, 2))
        assert not torch.equal(layer.running_mean, before["running_mean"])
        assert 1 / (not fails)
    assert before.keys() == layer.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_calibrate_gives_the_plain_average_and_keeps_the_mode():
    net = use_groups(nn.Sequential(nn.BatchNorm2d(3, momentum=0.3)), 4).double()
    net.eval()
    batches = [torch.randn(4, 3, 5, 5, dtype=torch.float64) * s + s for s in (1, 2, 3)]
    calibrate(net, batches)
    expected = torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0)
    torch.testing.assert_close(net[0].running_mean, expected)
    assert not net.training and net[0].momentum == 0.3


def test_bfloat16_inputs_keep_float32_statistics():
    layer = GroupedBatchNorm2d(3, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = layer(torch.randn(4, 3, 2, 2).bfloat16())
    assert outputs.dtype == torch.bfloat16 and layer.running_mean.dtype == torch.float32


@pytest.mark.parametrize("shape", [(24, 5, 4, 3), (24, 6)])
@pytest.mark.parametrize("layout", ["planes", "channels last"])
@pytest.mark.parametrize("affine", [True, False])
def test_equal_groups_at_once_are_the_loop_over_groups(shape, layout, affine, monkeypatch):
    """Outputs, gradients and buffers, in float64; a GPU takes the one way, a CPU the other."""
    torch.manual_seed(0)
    inputs = 3 * torch.randn(shape, dtype=torch.float64) + 1
    if layout == "channels last" and len(shape) == 4:
        inputs = inputs.to(memory_format=torch.channels_last)
    gradient = torch.randn(shape, dtype=torch.float64)
    found = []
    for at_once in (False, True):
        monkeypatch.setattr(batchnorm, "_at_once", lambda inputs, sizes, at_once=at_once: at_once)
        torch.manual_seed(1)
        norm = GroupedBatchNorm2d(shape[1], 6, momentum=0.3, affine=affine).double()
        for tensor in (*norm.parameters(), norm.running_mean, norm.running_var):
            torch.nn.init.uniform_(tensor, 0.5, 2)
        given = inputs.clone().requires_grad_()
        outputs = norm(given)
        torch.relu_(outputs).backward(gradient)  # in place, as a ResNet's activations are
        gradients = [p.grad for p in norm.parameters()]
        assert given.grad is not None and None not in gradients and bool(gradients) == affine
        found.append([outputs, given.grad, *gradients, *norm.buffers()])
    for of_loop, of_all in zip(*found, strict=True):
        assert of_loop.stride() == of_all.stride()
        torch.testing.assert_close(of_all, of_loop, rtol=1e-12, atol=1e-12)


def test_groups_go_at_once_on_a_gpu_alone_and_only_if_equal():
    class OnGpu:
        is_cuda, shape = True, (8, 3, 1, 1)

        def numel(self):
            return 24

    assert batchnorm._at_once(OnGpu(), [4, 4])
    assert not batchnorm._at_once(OnGpu(), [5, 3])
    assert not batchnorm._at_once(OnGpu(), [1] * 8)  # torch's own error is the better one
    assert not batchnorm._at_once(torch.zeros(8, 3, 1, 1), [4, 4])


@pytest.mark.parametrize("dimensions", [1, 2])
def test_a_norm_without_scale_is_grouped_too(dimensions):
    """The last layer of MoCo v3's heads; its state dict has the same names before and after."""
    norm = nn.BatchNorm1d if dimensions == 1 else nn.BatchNorm2d
    plain = nn.Sequential(norm(5, affine=False))
    grouped = use_groups(copy.deepcopy(plain), 4)
    inputs = torch.randn(8, 5, *[3] * (2 * dimensions - 2))
    assert plain.state_dict().keys() == grouped.state_dict().keys()
    expected = torch.cat([plain(part) for part in inputs.split(4)])
    torch.testing.assert_close(grouped(inputs), expected)
    grouped.eval(), plain.eval()
    grouped.load_state_dict(plain.state_dict())
    torch.testing.assert_close(grouped(inputs), plain(inputs))


def test_calibration_that_fails_leaves_momentum_and_mode():
    net = nn.Sequential(GroupedBatchNorm2d(3, 4))

    def batches():
        yield torch.randn(4, 3, 5, 5)
        raise OSError("unreadable")

    before = net[0].momentum
    with pytest.raises(OSError, match="unreadable"):
        calibrate(net.eval(), batches())
    assert net[0].momentum == before and not net.training and not net[0].training
