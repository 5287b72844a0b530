"""Backbones by name: sizes, stems, initialisation as torchvision's."""

import math

import pytest
import torch
import torchvision
from torch import nn

from mocokit import chance, recipes
from mocokit.errors import UserError
from mocokit.nets.backbones import build_backbone
from mocokit.nets.heads import Encoder, build_head, calibrate_head
from mocokit.settings import replace
from mocokit.weights.encoder import build_encoder
from mocokit.weights.resolve import open_model


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_resnet50_has_the_published_size():
    backbone = build_backbone("resnet50")
    assert count(backbone) == 23_508_032  # counted on the authors' trunk
    encoder = Encoder(backbone, build_head("mlp", backbone.num_features, None, 128))
    assert count(encoder) == 27_966_656  # and on their whole v2 encoder


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_initialisation_is_torchvisions(name):
    torch.manual_seed(0)
    ours = {k: p.detach() for k, p in build_backbone(name).named_parameters()}
    model = getattr(torchvision.models, name)()
    theirs = {k: p.detach() for k, p in model.named_parameters()}
    for path, parameter in ours.items():
        expected = theirs[path]
        assert parameter.shape == expected.shape
        error = (
            5 * float(expected.std() if expected.numel() > 1 else 0) / math.sqrt(expected.numel())
        )
        assert float(parameter.mean()) == pytest.approx(
            float(expected.mean()), abs=error * 2 + 1e-6
        )
        if expected.dim() == 4:
            assert float(parameter.std()) == pytest.approx(float(expected.std()), rel=0.1)
        else:
            assert torch.equal(parameter, expected)


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        *((name, stem) for name in ("resnet18", "resnet50") for stem in ("imagenet", "small")),
        ("resnet_tiny", "imagenet"),
    ],
)
def test_every_convolution_starts_as_he_et_al_have_it_for_outputs(name, stem):
    """Normal with variance 2 / (k k outputs), as torchvision's ResNets (arXiv 1502.01852)."""
    torch.manual_seed(0)
    found = [m for m in build_backbone(name, stem).modules() if isinstance(m, nn.Conv2d)]
    assert len(found) > 8 and all(conv.bias is None for conv in found)
    for conv in found:
        weight, numbers = conv.weight.detach().flatten(), conv.weight.numel()
        scale = math.sqrt(2 / (conv.out_channels * math.prod(conv.kernel_size)))
        assert float(weight.std()) == pytest.approx(scale, rel=5 / math.sqrt(2 * numbers)), conv
        assert abs(float(weight.mean())) < 5 * scale / math.sqrt(numbers)
        normal = float((weight.abs() > 2 * scale).float().mean())  # none, if it were uniform
        assert normal == pytest.approx(0.0455, abs=5 * 0.208 / math.sqrt(numbers)) and normal > 0.01


def test_zero_init_last_starts_blocks_as_identities():
    assert build_backbone("resnet18").layer1[0].bn2.weight.tolist() == [1.0] * 64
    zeroed = build_backbone("resnet18", zero_init_last=True).layer1[0].bn2.weight
    assert zeroed.tolist() == [0.0] * 64


def test_small_stem_keeps_the_resolution():
    backbone = build_backbone("resnet18", "small")
    assert backbone.conv1.kernel_size == (3, 3) and backbone.conv1.stride == (1, 1)
    assert isinstance(backbone.maxpool, nn.Identity)
    seen = []
    backbone.layer1.register_forward_hook(lambda m, i, o: seen.append(i[0].shape))
    assert backbone(torch.randn(4, 3, 32, 32)).shape == (4, 512)
    assert seen == [(4, 64, 32, 32)]


def test_resnet_tiny():
    backbone = build_backbone("resnet_tiny")
    assert backbone(torch.randn(4, 3, 32, 32)).shape == (4, backbone.num_features)


@pytest.mark.parametrize(
    ("name", "stem", "sentence"),
    [
        ("resnet19", "imagenet", "did you mean resnet18"),
        ("vit_tiny_patch16_224", "small", "no stem that can be made small"),
    ],
)
def test_what_cannot_be_built_says_so(name, stem, sentence):
    with pytest.raises(UserError, match=sentence):
        build_backbone(name, stem)


def test_num_features_is_what_comes_out():
    backbone = build_backbone("mobilenetv3_small_050")  # 288 maps, then 1024 features
    assert backbone(torch.randn(4, 3, 64, 64)).shape == (4, backbone.num_features)


@pytest.mark.parametrize("seed", [0, 7])
def test_first_weights_come_from_their_own_stream(seed):
    expected = chance.library_seed(seed, 0, chance.Slot.INITIALISE)
    changes = {"net.backbone": "resnet_tiny", "views.size": 32, "seed": seed}
    build_encoder(replace(recipes.mocov2(), changes))
    assert torch.initial_seed() == expected
    torch.manual_seed(1)
    ours = open_model("random:resnet_tiny", torch.device("cpu"), seed=seed).subject.network
    assert torch.initial_seed() == expected
    torch.manual_seed(expected)
    again = dict(build_backbone("resnet_tiny").named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, again[name]), name


def test_views_that_a_backbone_cannot_take_are_named():
    settings = replace(recipes.mocov2(), {"net.backbone": "vit_tiny_patch16_224", "views.size": 32})
    with pytest.raises(UserError, match="vit_tiny_patch16_224 cannot take views of 32 pixels"):
        build_encoder(settings)


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize(
    "backbone", ["resnet_tiny", "resnet18", "mobilenetv3_small_050", "vit_tiny_patch16_224"]
)
def test_a_new_encoder_has_seen_no_image(backbone, head):
    """Whether it can take the views is tried on two of zeros: that leaves no trace."""
    size = 224 if backbone.startswith("vit") else 32
    changes = {"net.backbone": backbone, "net.head": head, "views.size": size}
    encoder = build_encoder(replace(recipes.mocov2(), changes))
    fresh = {"running_mean": 0, "running_var": 1, "num_batches_tracked": 0}
    seen = [(name.rpartition(".")[2], value) for name, value in encoder.named_buffers()]
    assert all((value == fresh[name]).all() for name, value in seen)
    assert {name for name, _ in seen} == (set() if size == 224 else set(fresh))
    assert all(module.training for module in encoder.modules())
    assert all(p.requires_grad and p.grad is None for p in encoder.parameters())


def test_heads_are_the_papers():
    linear, mlp = build_head("linear", 20, None, 8), build_head("mlp", 20, None, 8)
    assert [type(m) for m in linear] == [nn.Linear]
    assert [type(m) for m in mlp] == [nn.Linear, nn.ReLU, nn.Linear]
    assert mlp[0].weight.shape == (20, 20) and mlp[2].weight.shape == (8, 20)
    assert mlp[0].bias is not None and mlp[2].bias is not None
    assert build_head("mlp", 20, 12, 8)[0].weight.shape == (12, 20)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_calibrated_head_spreads_its_outputs(kind):
    torch.manual_seed(0)
    encoder = Encoder(nn.Flatten(), build_head(kind, 48, None, 8))
    images = torch.rand(256, 3, 4, 4) * 0.01 + 5
    calibrate_head(encoder, images)
    outputs = encoder(images)
    torch.testing.assert_close(outputs.mean(0), torch.zeros(8), atol=1e-2, rtol=0)
    torch.testing.assert_close(outputs.std(0), torch.ones(8), atol=1e-2, rtol=0)
