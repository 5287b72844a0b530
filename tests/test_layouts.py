"""ResNets of others, as facebookresearch/moco and torchvision write them."""

import pickle
from pathlib import Path

import pytest
import timm
import torch

from mocokit.errors import UserError
from mocokit.weights.layouts import read_resnet
from mocokit.weights.resolve import open_model
from mocokit.weights.subject import weights_hash

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=7)


def state_of(network, prefix, head=True):
    state = {f"{prefix}{k}": v for k, v in network.state_dict().items()}
    return state if head else {k: v for k, v in state.items() if ".fc." not in k}


@pytest.mark.parametrize("prefix", ["module.encoder_q.", "encoder_q.", "module.", ""])
def test_the_query_encoder_is_taken(network, tmp_path, prefix):
    state = state_of(network, prefix)
    if "encoder_q" in prefix:
        state |= {k.replace("encoder_q", "encoder_k"): v + 1 for k, v in state.items()}
        state["module.queue"] = torch.zeros(7, 16)
    path = tmp_path / "checkpoint_0199.pth.tar"
    torch.save({"epoch": 200, "arch": "resnet18", "state_dict": state} if prefix else state, path)
    opened = open_model(path, CPU)
    assert opened.subject.architecture == "resnet18" and opened.folder is None
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = network.eval().forward_head(network.forward_features(images), pre_logits=True)
        assert torch.allclose(opened.subject.network(images), expected, atol=1e-5)
    assert opened.untrained is not None and opened.untrained().weights != opened.subject.weights


def test_torchvisions_resnet50_fits(tmp_path):
    from torchvision.models import resnet50

    torch.manual_seed(1)
    theirs = resnet50().eval()
    torch.save(theirs.state_dict(), tmp_path / "resnet50-0676ba61.pth")
    ours = open_model(tmp_path / "resnet50-0676ba61.pth", CPU).subject
    theirs.fc = torch.nn.Identity()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(ours.network(images), theirs(images), atol=1e-4)


def test_what_is_no_resnet_is_refused(network, tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"state_dict": {"cls_token": torch.zeros(3)}}, path)
    with pytest.raises(UserError, match="no ResNet that is known here"):
        open_model(path, CPU)
    state = {k: v for k, v in network.state_dict().items() if not k.startswith("layer3.1.conv2")}
    torch.save(state, path)
    with pytest.raises(UserError, match=r"does not fit resnet18: it lacks layer3.1.conv2.weight"):
        open_model(path, CPU)
    torch.save({k: v for k, v in state.items() if not k.startswith("layer3.1")}, path)
    with pytest.raises(UserError, match="1 basic blocks"):
        open_model(path, CPU)
    path.write_bytes(pickle.dumps(UserError))
    with pytest.raises(UserError, match="unpickling"):
        open_model(path, CPU)


@pytest.mark.parametrize(
    ("taken", "other"),
    [
        ("module.encoder_q.", "module.encoder_k."),
        ("module.base_encoder.", "module.momentum_encoder."),
        ("online.net.", "target.net."),
        ("teacher.", "student."),
        ("teacher.", "model."),
        ("model.", "model_ema."),
        ("backbone.", "encoder_k."),
        ("", "target."),
    ],
)
def test_of_two_networks_the_one_is_taken_that_papers_transfer(taken, other):
    names = ["conv1.weight", *(f"layer{n}.{block}.conv1.weight" for n in "13" for block in "01")]
    one, two = ({name: torch.full((1,), value) for name in names} for value in (1.0, 2.0))

    def as_names(inner: str, prefix: str, state: dict) -> dict:
        return {f"{prefix}{inner}{name}": value for name, value in state.items()}

    def as_dicts(inner: str, prefix: str, state: dict) -> dict:
        """As DINO has it: a dict of its own for each network, however its keys begin."""
        found = {f"{inner}{name}": value for name, value in state.items()}
        return {prefix.removesuffix("."): found} if prefix else found

    for put in (as_names, as_dicts):
        for inner in ("", "backbone.", "module.backbone."):
            right, wrong = put(inner, taken, one), put(inner, other, two)
            for state in (right | wrong, wrong | right):
                for content in (state, {"state_dict": state}):
                    kind, weights = read_resnet(content, Path("x.pt"))
                    assert kind == "resnet18" and weights.keys() == set(names)
                    assert {float(value) for value in weights.values()} == {1.0}


def test_a_hash_tells_apart_names_kinds_shapes_and_bits():
    def of(**tensors):
        module = torch.nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return weights_hash(module)

    zeros = torch.zeros(2, 2)
    assert of(a=zeros, b=zeros) == of(b=zeros.clone(), a=zeros.T)
    others = [
        of(a=zeros), of(b=zeros), of(a=zeros.view(4)), of(a=zeros.int()), of(a=-zeros),
        of(a=zeros, b=zeros), of(a=torch.zeros(2, 4)),
    ]  # fmt: skip
    assert len(set(others)) == len(others)
