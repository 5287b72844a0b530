"""What the sections of the settings are made of."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Shares = Share | tuple[Share, Share]  # of both views, or of the first and of the second
Drawn = Annotated[int, Field(ge=1, le=3)]
Magnitude = Annotated[float, Field(ge=0, le=10)]
Spread = Annotated[float, Field(ge=0)]


def setting(default: Any, meaning: str, **limits: Any) -> Any:
    """A setting that belongs to a run's identity."""
    return Field(default=default, description=meaning, **limits)


def incidental(default: Any, meaning: str, **limits: Any) -> Any:
    """A setting that changes no training number: device, paths, logging, saving."""
    extra: dict[str, Any] = {"incidental": True}
    return Field(default=default, description=meaning, json_schema_extra=extra, **limits)


class Section(BaseModel):
    """Frozen, and closed to unknown names."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )
