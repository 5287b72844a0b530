"""What a user names: a run folder, a checkpoint, an exported file, a timm name, or `random`."""

import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mocokit import recipes
from mocokit.chance import Slot
from mocokit.data.index import load_index
from mocokit.engine.folder import RunFolder
from mocokit.engine.record import Console
from mocokit.engine.runtime import autocast, seed_libraries
from mocokit.errors import UserError
from mocokit.files import brief, given, reason_of, shell_word, show
from mocokit.nets.backbones import build_backbone, check_model
from mocokit.settings import sizes
from mocokit.settings.arguments import checked
from mocokit.settings.schema import LARGEST_SIDE, Settings
from mocokit.views.params import ViewSpec
from mocokit.weights.encoder import build_encoder, view_spec
from mocokit.weights.stored import Stored, fit, read_stored
from mocokit.weights.subject import FrozenModel, Layer

RANDOM = "random"
DEFAULT_RANDOM = "resnet50"


@dataclass(frozen=True)
class Opened:
    """A frozen model with what belongs to it."""

    subject: FrozenModel
    # Makes the same network with random weights; None if the model is one already.
    untrained: Callable[[], FrozenModel] | None
    settings: Settings | None  # of the run that it came from
    folder: RunFolder | None  # that run's folder
    unfinished: str = ""  # "checkpoint of step 4 of 160" where its run had steps to go


def is_ours(run: str | Path) -> bool:
    """Whether `run` is a path, which may come with images, and not a model's name.

    Raises UserError if it names nothing. Downloads nothing.
    """
    if given(run).exists():
        return True
    name = str(run)
    if name == RANDOM or name.startswith(f"{RANDOM}:"):
        _check_random(_random_model(name))
    else:
        _timm_name(name)
    return False


def open_model(
    run: str | Path,
    device: torch.device,
    *,
    layer: Layer = "backbone",
    precision: str = "float32",
    size: int | None = None,
    resize: int | None = None,
    seed: int = 0,
) -> Opened:
    """The model that `run` names, in eval mode on the device. Raises UserError if it names nothing.

    A path that exists comes first, then `random` or `random:MODEL`, then a timm model, whose
    weights timm downloads. `size` replaces the side of the scoring view, `resize` the short side
    that it is the centre of.
    """
    place = partial(_subject, device=device, precision=precision, size=size, resize=resize)
    path = given(run)
    if path.exists():
        return _open_path(path, place, layer, seed)
    name = str(run)
    if layer == "head":
        raise UserError(f"{name} has no head; only a run folder or a checkpoint has one")
    if name == RANDOM or name.startswith(f"{RANDOM}:"):
        model = _random_model(name)
        _check_random(model)
        spec = view_spec(recipes.mocov2())
        network = _random_backbone(model, seed)
        return Opened(place(f"random {model}", network, spec, model), None, None, None)
    return _open_timm(name, place, seed)


def _subject(
    name: str,
    network: nn.Module,
    spec: ViewSpec,
    architecture: str,
    layer: Layer = "backbone",
    width: int | None = None,
    *,
    device: torch.device,
    precision: str,
    size: int | None,
    resize: int | None,
) -> FrozenModel:
    spec = _scored(spec, size, resize)
    network = network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network = network.eval().requires_grad_(False)
    if size is not None:
        try:
            with torch.no_grad():
                network(torch.zeros(1, 3, size, size, device=device))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise UserError(
                f"size {size}: {show(name)} cannot take such views ({reason_of(error)}); leave "
                "--size out"
            ) from None
    width = width or int(network.num_features)  # type: ignore[arg-type]
    kind = partial(autocast, device, precision)
    return FrozenModel(name, network, width, spec, architecture, layer, precision, kind)


def _scored(spec: ViewSpec, size: int | None, resize: int | None) -> ViewSpec:
    """With another size and short side of the scoring view. Raises UserError."""
    if size is not None:
        side = round(size * spec.resize / spec.size)
        if resize is None and side > LARGEST_SIDE:
            raise UserError(
                f"size {size} is the centre of a photo of {side:,} pixels by this model's ratio, "
                f"and at most {LARGEST_SIDE:,} are possible; state the short side with --resize"
            )
        spec = dataclasses.replace(spec, size=size, resize=side)
    if resize is None:
        return spec
    if resize < spec.size:
        raise UserError(
            f"resize {resize} is smaller than the centre crop of {spec.size} pixels; set at least "
            "that, or a smaller size"
        )
    return dataclasses.replace(spec, resize=resize)


def _open_path(path: Path, place: Callable[..., FrozenModel], layer: Layer, seed: int) -> Opened:
    folder = folder_of(path)
    if RunFolder(path).is_begun:
        raise UserError(
            f"the run in {show(path)} was killed before it began; start it again with --out"
        )
    if path.is_dir() and folder is None:
        raise UserError(
            f"{show(path)} is no run folder: it has no config.yaml; give a run folder or a file"
        )
    head = layer == "head"
    found = read_stored(path / "last.pt" if head and path.is_dir() else file_of(path))
    if found.settings is None:
        return _open_foreign(found, place, layer, seed)
    settings, net = found.settings, found.settings.net
    unfinished = _unfinished(settings, found.step, folder)
    architecture = f"{net.backbone} stem={net.stem} head={net.head}"
    spec = view_spec(settings)

    def of(encoder: Any, name: str) -> FrozenModel:
        network, width = (encoder, net.dim) if head else (encoder.backbone, None)
        return place(name, network, spec, architecture, layer, width)

    encoder = build_encoder(settings)
    if head and found.encoder is None:
        raise UserError(f"{show(path)} holds a backbone without its head; give the run folder")
    if head and found.encoder is not None:
        fit(encoder, found.encoder, found.path, net.backbone)
    else:
        fit(encoder.backbone, found.backbone, found.path, net.backbone)
    called = "trained, head's output" if head else "trained backbone"
    called += f", {unfinished}" if unfinished else ""

    def untrained() -> FrozenModel:
        return of(build_encoder(settings.model_copy(update={"seed": seed})), "random weights")

    return Opened(of(encoder, called), untrained, settings, folder, unfinished)


def _unfinished(settings: Settings, step: int | None, folder: RunFolder | None) -> str:
    """ "checkpoint of step 4 of 160", or "" for weights after the last step."""
    if step is None:
        return ""
    try:
        if folder is None:
            raise UserError("the number of its images is not known")
        images = load_index(folder.index).length
    except UserError:
        return f"checkpoint of step {step:,}"
    total = sizes.resolve(settings, images).total_steps
    return f"checkpoint of step {step:,} of {total:,}" if step < total else ""


def folder_of(path: Path) -> RunFolder | None:
    """The run folder at a path or above it."""
    path = path.absolute()  # not resolved: last.pt is a link that may lead elsewhere
    for place in (path, path.parent, path.parent.parent):
        folder = RunFolder(place)
        if folder.is_run:
            return folder
        if place.is_dir() and place != path and place.name != "checkpoints":
            return None
    return None


def _random_model(name: str) -> str:
    return name.partition(":")[2] or DEFAULT_RANDOM


def _check_random(model: str) -> None:
    check_model(model, f"{RANDOM}:{model}: there is no such model", prefix=f"{RANDOM}:")


def _random_backbone(model: str, seed: int) -> nn.Module:
    seed_libraries(seed, 0, Slot.INITIALISE)
    return build_backbone(model)


def _open_foreign(
    found: Stored, place: Callable[..., FrozenModel], layer: Layer, seed: int
) -> Opened:
    """A ResNet of the paper's authors, of torchvision or of others, with the views of ImageNet."""
    if layer == "head":
        raise UserError(f"{show(found.path)} has no head; only runs of mocokit have one")
    spec = view_spec(recipes.mocov2())

    def untrained() -> FrozenModel:
        return place("random weights", _random_backbone(found.model, seed), spec, found.model)

    trained = place(found.path.name, _backbone(found), spec, found.model)
    return Opened(trained, untrained, None, None)


def _timm_name(name: str) -> str:
    """The model that a name means, with the tag of its weights; raises UserError."""
    model = name.removeprefix("timm:")
    what = f"there is no run, checkpoint or timm model {brief(name)!r}"
    untagged = model.partition(".")[0]
    # Of our own models there are no published weights.
    check_model(untagged, f"{what} (random or random:MODEL has random weights)", ours=(RANDOM,))
    return model


@contextmanager
def _without_retries() -> Iterator[None]:
    """Hugging Face logs each of ten attempts, which are one mistake."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _open_timm(name: str, place: Callable[..., FrozenModel], seed: int) -> Opened:
    import timm
    from timm.data import resolve_model_data_config

    model = _timm_name(name)
    Console().say(f"timm {model}: its weights, from Hugging Face's cache or from the network")
    try:
        with _without_retries():
            network = timm.create_model(model, pretrained=True, num_classes=0)
    except Exception as error:
        raise UserError(
            f"timm cannot download the weights of {model} ({reason_of(error)}); connect, put them "
            f"into Hugging Face's cache, or evaluate random weights with random:{model}"
        ) from None
    width: Any = getattr(network, "head_hidden_size", None) or network.num_features
    network.num_features = int(width)
    spec = timm_spec(resolve_model_data_config(network))

    def untrained() -> FrozenModel:
        backbone = _random_backbone(model.partition(".")[0], seed)
        return place("random weights", backbone, spec, model)

    return Opened(place(f"timm {model}", network, spec, model), untrained, None, None)


def timm_spec(config: dict[str, Any]) -> ViewSpec:
    """The evaluation view that a timm model was published with."""
    size = int(config["input_size"][-1])
    return dataclasses.replace(
        view_spec(recipes.mocov2()),
        size=size,
        resize=max(size, round(size / config["crop_pct"])),
        interpolation="bicubic" if config["interpolation"] == "bicubic" else "bilinear",
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


@checked
def load(path: str | Path) -> nn.Module:
    """The backbone of a run folder, a checkpoint, a backbone.safetensors or a ResNet of others.

    On the CPU, in eval mode. (N, 3, H, W), normalised as in the run's settings, ->
    (N, .num_features). For a run folder, the finished backbone, or else the newest checkpoint's.
    Raises UserError if there is none.
    """
    return _backbone(read_stored(file_of(path))).eval()


def read(path: str | Path) -> tuple[Settings, dict[str, Tensor]]:
    """The settings and the weights of the backbone of a run. Raises UserError."""
    found = read_stored(file_of(path))
    if found.settings is None:
        raise UserError(f"{show(path)} was not written by mocokit: it holds no settings")
    return found.settings, found.backbone


def file_of(path: str | Path) -> Path:
    """The file that holds the backbone of a run folder, or the file itself. Raises UserError."""
    path = given(path)
    if path.is_dir():
        if (path / "config.yaml").is_file() and not (path / "last.pt").is_file():
            raise UserError(
                f"the run in {show(path)} ended before its first checkpoint, so it has no weights "
                f"yet; resume it: mocokit pretrain {shell_word(path / 'config.yaml')} "
                f"--out {shell_word(path)}"
            )
        finished = path / "backbone.safetensors"
        path = finished if finished.is_file() else path / "last.pt"
    if not path.is_file():
        raise UserError(f"there is no backbone at {show(path)}; give a run folder or a checkpoint")
    return path


def _backbone(found: Stored) -> nn.Module:
    """The network of stored weights."""
    settings = found.settings
    if settings is None:
        network = build_backbone(found.model)
    else:
        network = build_backbone(found.model, settings.net.stem, settings.method.group_size)
    fit(network, found.backbone, found.path, found.model)
    return network
