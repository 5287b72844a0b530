"""What a user names: a run folder, a checkpoint, an exported file, a timm name, or `random`."""

import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mocokit import recipes, settings as settings_
from mocokit.chance import Slot
from mocokit.data.index import load_index
from mocokit.engine import checkpoint
from mocokit.engine.folder import RunFolder
from mocokit.engine.record import Console
from mocokit.engine.runtime import autocast, seed_libraries
from mocokit.errors import UserError
from mocokit.nets.backbones import build_backbone, check_model
from mocokit.settings import sizes
from mocokit.settings.schema import LARGEST_SIDE, Settings
from mocokit.views.params import ViewSpec
from mocokit.weights.encoder import build_encoder, view_spec
from mocokit.weights.layouts import SUFFIXES, read_resnet
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
    if Path(run).expanduser().exists():
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
    path = Path(run).expanduser()
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
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"size {size}: {name} cannot take such views ({reason[:160]}); leave --size out"
            ) from None
    width = width or int(network.num_features)  # type: ignore[arg-type]
    kind = partial(autocast, device, precision)
    return FrozenModel(name, network, width, spec, architecture, layer, precision, kind)


def _scored(spec: ViewSpec, size: int | None, resize: int | None) -> ViewSpec:
    """With another size and short side of the scoring view. Raises UserError."""
    if size is not None:
        if size < 8:
            raise UserError(f"size {size} is too small for an image; set at least 8")
        spec = dataclasses.replace(spec, size=size, resize=round(size * spec.resize / spec.size))
    if resize is None:
        return spec
    if resize > LARGEST_SIDE:
        raise UserError(f"resize {resize} is too large; set at most {LARGEST_SIDE}")
    if resize < spec.size:
        raise UserError(
            f"resize {resize} is smaller than the centre crop of {spec.size} pixels; set at least "
            "that, or a smaller size"
        )
    return dataclasses.replace(spec, resize=resize)


def _open_path(path: Path, place: Callable[..., FrozenModel], layer: Layer, seed: int) -> Opened:
    if path.suffix in SUFFIXES and path.is_file():
        return _open_foreign(path, place, layer, seed)
    folder = folder_of(path)
    if RunFolder(path).is_begun:
        raise UserError(f"the run in {path} was killed before it began; start it again with --out")
    if path.is_dir() and folder is None:
        raise UserError(
            f"{path} is no run folder: it has no config.yaml; give a run folder or a file"
        )
    settings, state, step = _read(_head_file(path) if layer == "head" else path)
    unfinished = _unfinished(settings, step, folder)
    net = settings.net
    architecture = f"{net.backbone} stem={net.stem} head={net.head}"
    spec = view_spec(settings)

    def of(encoder: Any, name: str) -> FrozenModel:
        network, width = (encoder, net.dim) if layer == "head" else (encoder.backbone, None)
        return place(name, network, spec, architecture, layer, width)

    encoder = build_encoder(settings)
    if layer == "head":
        method: dict[str, torch.Tensor] = checkpoint.load(_head_file(path))["method"]
        prefix = "encoder."
        state = {k.removeprefix(prefix): v for k, v in method.items() if k.startswith(prefix)}
        encoder.load_state_dict(state)
    else:
        encoder.backbone.load_state_dict(state)
    called = "trained backbone" if layer == "backbone" else "trained, head's output"
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


def _head_file(path: Path) -> Path:
    """Only checkpoints contain the head."""
    if path.suffix == ".safetensors":
        raise UserError(f"{path} holds a backbone without its head; give the run folder")
    return path / "last.pt" if path.is_dir() else path


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


def _open_foreign(path: Path, place: Callable[..., FrozenModel], layer: Layer, seed: int) -> Opened:
    """A ResNet of the paper's authors or of torchvision, with the views of ImageNet."""
    if layer == "head":
        raise UserError(f"{path} has no head; only runs of mocokit have one")
    model, state = read_resnet(path)
    spec = view_spec(recipes.mocov2())
    network = build_backbone(model)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not fit {model} ({reason})") from None

    def untrained() -> FrozenModel:
        return place("random weights", _random_backbone(model, seed), spec, model)

    return Opened(place(path.name, network, spec, model), untrained, None, None)


def _timm_name(name: str) -> str:
    """The model that a name means, with the tag of its weights; raises UserError."""
    model = name.removeprefix("timm:")
    what = f"there is no run, checkpoint or timm model {name!r}"
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
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"timm cannot download the weights of {model} ({reason[:160]}); connect, put them "
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


def load(path: str | Path) -> nn.Module:
    """The backbone of a run folder, a checkpoint or a backbone.safetensors.

    On the CPU, in eval mode. (N, 3, H, W), normalised as in the run's settings, ->
    (N, .num_features). For a run folder, the finished backbone, or else the newest checkpoint's.
    Raises UserError if there is none.
    """
    settings, state = read(path)
    net = settings.net
    backbone = build_backbone(net.backbone, net.stem, settings.method.group_size)
    backbone.load_state_dict(state)
    return backbone.eval()


def read(path: str | Path) -> tuple[Settings, dict[str, Tensor]]:
    """The settings and the weights of the backbone that `load` loads. Raises UserError."""
    settings, state, _ = _read(Path(path))
    return settings, state


def _read(path: Path) -> tuple[Settings, dict[str, Tensor], int | None]:
    """As `read`, and the step of a checkpoint."""
    if path.is_dir():
        if (path / "config.yaml").is_file() and not (path / "last.pt").is_file():
            what = f"the run in {path} ended before its first checkpoint, so it has no weights yet"
            remedy = f"resume it: mocokit pretrain {path}/config.yaml --out {path}"
            raise UserError(f"{what}; {remedy}")
        finished = path / "backbone.safetensors"
        path = finished if finished.is_file() else path / "last.pt"
    if not path.is_file():
        raise UserError(f"there is no backbone at {path}; give a run folder or a checkpoint")
    return _read_safe(path) if path.suffix == ".safetensors" else _read_run(path)


def _read_safe(path: Path) -> tuple[Settings, dict[str, Tensor], None]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if "mocokit" not in metadata:
        raise UserError(f"{path} was not written by mocokit: its metadata holds no settings")
    return settings_.from_yaml(metadata["mocokit"], str(path)), state, None


def _read_run(path: Path) -> tuple[Settings, dict[str, Tensor], int]:
    state = checkpoint.load(path)
    prefix = "encoder.backbone."
    method = cast(dict[str, Tensor], state["method"])
    weights = {k.removeprefix(prefix): v for k, v in method.items() if k.startswith(prefix)}
    return settings_.from_yaml(state["settings"], str(path)), weights, int(state["step"])
