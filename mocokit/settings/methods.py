"""The settings `method.*`: one class for each method, chosen by `method.name`.

No class here needs torch. Each says where its method is implemented; a method from outside the
package names itself as `module:Class` and brings its own class of settings (docs/adding/method.md).
"""

import sys
from collections.abc import Collection, Iterable, Mapping
from importlib import import_module
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from mocokit.errors import UserError
from mocokit.files import reason_of
from mocokit.settings import reading
from mocokit.settings.section import Positive, Section, incidental, setting


class MethodSettings(Section):
    """What every method has: a name, and how batch norm cuts a batch into groups."""

    implementation: ClassVar[str] = ""  # "module:Class" of a method of this package

    name: str = setting("moco", "moco, simclr, memorybank, or module:Class of your own")
    batch_norm: Literal["groups", "whole"] = setting(
        "groups", "statistics of groups of images, or of the whole batch over all GPUs"
    )
    group_size: int = setting(32, "images that share batch-norm statistics", ge=2)
    groups: Literal["auto"] | Positive = setting(
        "auto", "batch-norm groups of a batch; auto is batch / group_size, at least two"
    )

    def check_net(self, *, predictor: bool) -> None:
        """Raise ValueError, which begins with a dotted path, where `net` does not fit."""
        if predictor:
            raise ValueError(f"net.predictor must be false for {self.name}, which has none")

    def table_bytes(self, images: int, dim: int) -> int:
        """What the method holds besides networks, such as a queue of keys."""
        return 0

    def key_momentum(self, batch: int) -> float | None:
        """The momentum in effect at this batch size; None where no key encoder follows."""
        return None

    def fit(
        self, images: int, batch: int, dim: int, stated: Collection[str], notices: list[str]
    ) -> dict[str, Any]:
        """Changes {setting: value} that fit default sizes to few images; notices gain their why.

        `stated` holds the dotted paths that the user set, which are kept.
        """
        return {}


Negatives = Annotated[int, Field(ge=1, le=2**20)]  # drawn anew in every step

# Their classes: methods/losses.py. A test holds that both name the same.
LossName = Literal["info_nce", "dcl", "dclw", "align_uniform", "dual_temperature"]


class ContrastiveSettings(MethodSettings):
    """What the methods of this package share: queries, keys and negatives."""

    loss: LossName = setting("info_nce", "the loss between queries, keys and negatives")
    temperature: float = setting(0.2, "softmax temperature", gt=0)
    chunk: Positive | None = incidental(
        None, "compare with this many negatives at a time, to save memory; null: with all at once"
    )


class MoCoSettings(ContrastiveSettings):
    """Momentum contrast: negatives from a queue, keys from an encoder that follows."""

    implementation: ClassVar[str] = "mocokit.methods.moco:MoCo"

    name: Literal["moco"] = setting("moco", MethodSettings.model_fields["name"].description or "")
    queue_size: Positive = setting(65536, "keys held as negatives")
    momentum: float = setting(0.999, "key encoder's momentum, at momentum_batch", ge=0, le=1)
    momentum_batch: Positive | None = setting(
        256, "batch the momentum was quoted at; null keeps it at any batch"
    )
    momentum_schedule: Literal["constant", "cosine"] = setting(
        "constant", "cosine: the key encoder's momentum rises to 1 over the run"
    )
    symmetric: bool = setting(False, "each view is query once and key once")
    enqueue: Literal["both", "one"] = setting(
        "both", "symmetric: keys of both views join the queue, or of one drawn at random"
    )
    shuffle: bool = setting(True, "permute the key images before they are cut into groups")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.enqueue == "one" and not self.symmetric:
            raise ValueError("enqueue = 'one' needs method.symmetric=true")
        return self

    def check_net(self, *, predictor: bool) -> None:
        """Any net fits."""

    def table_bytes(self, images: int, dim: int) -> int:
        return 4 * self.queue_size * dim

    def key_momentum(self, batch: int) -> float | None:
        horizon = batch / self.momentum_batch if self.momentum_batch else 1.0
        return float(self.momentum**horizon)

    def fit(
        self, images: int, batch: int, dim: int, stated: Collection[str], notices: list[str]
    ) -> dict[str, Any]:
        size, limit = self.queue_size, images / 10
        if size <= limit:
            return {}
        if "method.queue_size" in stated:
            notices.append(
                f"method.queue_size {size} is over a tenth of the {images} images: the queue will "
                "hold older keys of an image among its negatives"
            )
            return {}
        smaller = min(size, max(2 ** (int(limit).bit_length() - 1), batch))
        if smaller == size:
            return {}
        notices.append(
            f"queue {size} -> {smaller}: at most a tenth of the {images} images, so that few of an "
            "image's own older keys are among its negatives"
        )
        return {"queue_size": smaller}


class SimCLRSettings(ContrastiveSettings):
    """End-to-end contrast: keys and negatives from the batch itself."""

    implementation: ClassVar[str] = "mocokit.methods.simclr:SimCLR"

    name: Literal["simclr"] = setting(
        "simclr", MethodSettings.model_fields["name"].description or ""
    )
    symmetric: bool = setting(
        False, "all views are queries against all others; false: first views against second ones"
    )
    shuffle: bool = setting(True, "permute the second views before they are cut into groups")


class MemoryBankSettings(ContrastiveSettings):
    """A vector for every image, as it was when the image was last seen."""

    implementation: ClassVar[str] = "mocokit.methods.memorybank:MemoryBank"

    name: Literal["memorybank"] = setting(
        "memorybank", MethodSettings.model_fields["name"].description or ""
    )
    loss: LossName | Literal["nce"] = setting(  # type: ignore[assignment]
        "info_nce", "the loss between queries, keys and negatives; nce: InstDisc's"
    )
    bank_negatives: Negatives | None = setting(
        None, "entries drawn as negatives; null compares with all of the bank"
    )
    bank_momentum: float = setting(0.5, "share of the old in a new entry", ge=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.loss == "nce" and self.bank_negatives is None:
            raise ValueError("bank_negatives must be a number for loss nce, such as 4096")
        if self.loss == "nce" and self.chunk is not None:
            raise ValueError("chunk must be null for loss nce, whose negatives are each image's")
        return self

    def table_bytes(self, images: int, dim: int) -> int:
        return 4 * images * dim

    def fit(
        self, images: int, batch: int, dim: int, stated: Collection[str], notices: list[str]
    ) -> dict[str, Any]:
        changes: dict[str, Any] = {}
        if self.loss != "nce" and (self.bank_negatives or 0) >= images:
            if "method.bank_negatives" in stated:
                notices.append(
                    f"method.bank_negatives {self.bank_negatives} is over the {images} images: "
                    "entries are drawn several times"
                )
            else:
                notices.append(
                    f"bank negatives {self.bank_negatives} -> all of the bank's {images} entries"
                )
                changes["bank_negatives"] = None
        notices.append(
            f"memory bank of {images:,} x {dim} float32: {images * dim * 4 / 2**20:,.0f} MiB on "
            "each device, and in each checkpoint"
        )
        return changes


class OutsideSettings(MethodSettings):
    """Of a method whose class was not imported: kept as they are, enough to load its backbone."""

    model_config = ConfigDict(extra="allow")


BUILT_IN: dict[str, type[MethodSettings]] = {
    "moco": MoCoSettings,
    "simclr": SimCLRSettings,
    "memorybank": MemoryBankSettings,
}

# Classes of methods from outside the package, by name, and the modules that may be imported: both
# as the user of this process said.
_outside: dict[str, Any] = {}
_allowed: set[str] = set()


def settings_class(name: str) -> type[MethodSettings]:
    """The class of settings of a method; of one that may not be imported, OutsideSettings."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    if name not in _outside and may_import(name):
        use(name)
    found = _outside.get(name)
    return OutsideSettings if found is None else found.settings


def read_method(value: Any) -> Any:
    """A section `method` as the settings of the method that it names."""
    if isinstance(value, MethodSettings):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(" must hold settings by name, such as {name: moco}")
    name = value.get("name", "moco")
    if not isinstance(name, str) or (name not in BUILT_IN and ":" not in name):
        raise ValueError(
            f".name = {reading.shown(name)} is no method; use {', '.join(BUILT_IN)}, or "
            "module:Class of your own"
        )
    return settings_class(name).model_validate({**value, "name": name})


def allow(modules: Iterable[str]) -> None:
    """Let methods of these modules, and of modules below them, be imported: of no others."""
    _allowed.clear()
    _allowed.update(modules)


def is_known(name: str) -> bool:
    """Whether a method is built-in, or its class is here already."""
    return name in BUILT_IN or name in _outside


def may_import(name: str) -> bool:
    """Whether the user of this process named or allowed the module of a method `module:Class`."""
    module = name.partition(":")[0]
    return any(module == one or module.startswith(f"{one}.") for one in _allowed)


def use(name: str, method: Any = None) -> None:
    """Let `name` be a `method.name`: of this class, or of the one that `module:Class` names."""
    method = _imported(name) if method is None else method
    found = getattr(method, "settings", None)
    if not (isinstance(found, type) and issubclass(found, MethodSettings)):
        raise UserError(
            f"method {name} brings no settings: its attribute `settings` must be a subclass of "
            "mocokit.methods.method.MethodSettings"
        )
    _outside[name] = method


def implementation(settings: MethodSettings) -> Any:
    """The class that implements a method. Raises UserError for code that may not be imported."""
    if settings.name in _outside:
        return _outside[settings.name]
    if isinstance(settings, OutsideSettings):
        module = settings.name.partition(":")[0]
        raise UserError(
            f"method {settings.name} is code from outside mocokit, and is imported only if you say "
            f"so in this command: add --allow-import {module}, or in Python method=..."
        )
    return _imported(settings.implementation)


def _imported(name: str) -> Any:
    """What `module:Class` names."""
    module, _, attribute = name.partition(":")
    if module.partition(".")[0] != "mocokit" and "" not in sys.path:
        sys.path.append("")  # last, so that no file beside the user shadows an installed module
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"method {name} cannot be imported: {reason_of(error)}") from None
