"""What the sections of the settings are made of."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidatorFunctionWrapHandler, field_validator

MOST = 10**9  # no number is larger, save a seed; where memory or time depends on one, it is less

Positive = Annotated[int, Field(ge=1, le=MOST)]
Count = Annotated[int, Field(ge=0, le=MOST)]
Share = Annotated[float, Field(ge=0, le=1)]
Shares = Share | tuple[Share, Share]  # of both views, or of the first and of the second
Drawn = Annotated[int, Field(ge=1, le=3)]
Magnitude = Annotated[float, Field(ge=0, le=10)]
Spread = Annotated[float, Field(ge=0, le=10)]
Factor = Annotated[float, Field(ge=1e-3, le=1e3)]


def setting(default: Any, meaning: str, **limits: Any) -> Any:
    """A setting that belongs to a run's identity."""
    return Field(default=default, description=meaning, **_bounded(default, limits))


def incidental(default: Any, meaning: str, **limits: Any) -> Any:
    """A setting that changes no training number: device, paths, logging, saving."""
    extra: dict[str, Any] = {"incidental": True}
    limits = _bounded(default, limits)
    return Field(default=default, description=meaning, json_schema_extra=extra, **limits)


def _bounded(default: Any, limits: dict[str, Any]) -> dict[str, Any]:
    """The limits of a number, with MOST where no upper one is stated."""
    number = isinstance(default, (int, float)) and not isinstance(default, bool)
    literal = number and not limits  # Literal[0, 1] states its values itself
    return limits if not number or literal or {"le", "lt"} & set(limits) else {**limits, "le": MOST}


class Section(BaseModel):
    """Frozen, closed to unknown names, without NaN or infinity.

    A value keeps its kind: no text becomes a number, no truth value a number, no number a truth
    value, as pydantic would have it. So `optim.lr=true` and `symmetric=yes` are mistakes.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )

    @field_validator("*", mode="wrap")
    @classmethod
    def _keeps_its_kind(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        found = handler(value)
        check_kinds(value, found)
        return found


def check_kinds(before: Any, after: Any) -> None:
    """Raise ValueError where validation made another kind of value of one."""
    if isinstance(before, (list, tuple)) and isinstance(after, (list, tuple)):
        for one, other in zip(before, after, strict=False):
            check_kinds(one, other)
    elif isinstance(before, Mapping) and isinstance(after, Mapping):
        for one, other in zip(before.values(), after.values(), strict=False):
            check_kinds(one, other)
    else:
        given, wanted = _kind(before), _kind(after)
        if given and wanted and given != wanted:
            raise ValueError(f"must be {wanted}, and this is {given}{_REMEDIES.get(wanted, '')}")


def _kind(value: Any) -> str | None:
    """What a scalar is called in a message; None for all else."""
    for kind, name in _KINDS.items():
        if isinstance(value, kind):
            return name
    return None


# bool comes first, because Python's is an int.
_KINDS: dict[Any, str] = {bool: "true or false", (int, float): "a number", str: "text"}
_REMEDIES = {
    "true or false": "; write true or false",
    "a number": "; write digits without quotes, as in 10, 0.5 or 1e-3",
}
