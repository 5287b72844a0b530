"""Settings as dotted paths: to and from YAML, `--set a.b=value`, and the difference of two."""

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from mocokit.errors import UserError
from mocokit.settings.schema import Settings

LABELS = frozenset({"recipe"})  # names, not settings: a difference never lists them


def fields(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting as (dotted path, its declaration), in the order of schema.py."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from fields(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def get(settings: Settings, path: str) -> Any:
    """The value at a dotted path."""
    value: Any = settings
    for name in path.split("."):
        value = getattr(value, name)
    return value


def flatten(settings: Settings) -> dict[str, Any]:
    """{dotted path: value} of every setting."""
    return {path: get(settings, path) for path, _ in fields()}


def replace(settings: Settings, changes: Mapping[str, Any], origin: str = "setting") -> Settings:
    """The same settings with {dotted path: value} changed.

    Raises UserError naming the path, with the nearest known one, or the value and its range.
    """
    tree = settings.model_dump()
    known = [path for path, _ in fields()]
    for path, value in changes.items():
        if any(name.startswith(f"{path}.") for name in known):
            raise UserError(f"{origin} {path} is a section; name one of its settings, {path}.…=…")
        if path not in known:
            raise UserError(f"{origin} {path} does not exist{_did_you_mean(path, known)}")
        *sections, name = path.split(".")
        branch = tree
        for section in sections:
            branch = branch[section]
        branch[name] = value
    return _validate(tree, origin)


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """["a.b=value", ...] as {dotted path: value}; the value is read as YAML."""
    changes = {}
    for text in assignments:
        path, equals, value = text.partition("=")
        if not equals or not path.strip():
            raise UserError(f"--set takes path=value, as in method.temperature=0.1, not {text!r}")
        try:
            changes[path.strip()] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):
            raise UserError(f"--set {path}: {value!r} is not a YAML value") from None
    return changes


def difference(a: Settings, b: Settings) -> dict[str, tuple[Any, Any]]:
    """{dotted path: (value in a, value in b)} where two differ; the recipe's name is left out."""
    left, right = flatten(a), flatten(b)
    return {
        path: (left[path], right[path])
        for path in left
        if path not in LABELS and left[path] != right[path]
    }


def identity(settings: Settings) -> dict[str, Any]:
    """The settings that make a run what it is: all but those declared with `incidental`."""
    return {path: get(settings, path) for path, field in fields() if not is_incidental(field)}


def is_incidental(field: FieldInfo) -> bool:
    """Whether a setting says only where or how often, and so changes no training number."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("incidental"))


def to_yaml(settings: Settings, resolved: Mapping[str, Any] | None = None) -> str:
    """Every setting as YAML; `resolved` adds values in effect, for reading only."""
    tree = settings.model_dump(mode="json")
    text: str = yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=100)
    if resolved:
        text += "# What follows from the settings above; never read back.\n"
        text += yaml.safe_dump({"resolved": dict(resolved)}, sort_keys=False)
    return text


def from_yaml(text: str, origin: str = "config.yaml") -> Settings:
    """Settings from YAML text; what is missing takes its default, `resolved` is ignored."""
    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{origin} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{origin} must hold settings by name, such as `train: {{epochs: 100}}`")
    tree.pop("resolved", None)
    return _validate(tree, origin)


def load(path: Path) -> Settings:
    """Settings of a YAML file."""
    try:
        return from_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def stated_in(path: Path) -> set[str]:
    """Dotted paths of the settings that a YAML file states."""
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = {name for name, _ in fields()}
    return known & set(_paths(tree, ""))


def _paths(tree: Any, prefix: str) -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _validate(tree: Mapping[str, Any], origin: str) -> Settings:
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise UserError(_sentence(error, origin)) from None


def _sentence(error: ValidationError, origin: str) -> str:
    """The first problem in one sentence, with the number of others."""
    errors, known = error.errors(), [path for path, _ in fields()]

    def named(path: str) -> str:  # pydantic adds which member of a union it tried
        return max((name for name in known if path.startswith(name)), key=len, default=path)

    paths = [".".join(str(part) for part in one["loc"]) for one in errors]
    first, path = errors[0], paths[0]
    if first["type"] == "extra_forbidden":
        text = f"{origin}: {path} does not exist{_did_you_mean(path, known)}"
    else:
        reason = first["msg"].removeprefix("Value error, ")
        reason = reason[:1].lower() + reason[1:]
        shown = "" if isinstance(first["input"], (dict, BaseModel)) else f" = {first['input']!r}"
        text = f"{origin}: {named(path)}{shown}: {reason}"
    others = len({named(path) for path in paths}) - 1
    return text + (f" (and {others} more)" if others else "")


def _did_you_mean(path: str, known: list[str]) -> str:
    close = difflib.get_close_matches(path, known, n=1, cutoff=0.6)
    if not close:  # the right name in the wrong section
        last = path.rsplit(".", 1)[-1]
        names = {name.rsplit(".", 1)[-1]: name for name in known}
        close = [names[n] for n in difflib.get_close_matches(last, names, n=1, cutoff=0.6)]
    if close:
        return f"; did you mean {close[0]}?"
    return "; `mocokit pretrain RECIPE --show-all` lists every setting"
