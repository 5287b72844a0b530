"""Settings as dotted paths: to and from YAML, `--set a.b=value`, and the difference of two."""

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from mocokit.errors import UserError
from mocokit.files import brief, printable
from mocokit.settings import legacy, reading
from mocokit.settings.methods import BUILT_IN, MethodSettings, read_method, settings_class
from mocokit.settings.schema import Settings

LABELS = frozenset({"recipe"})  # names, not settings: a difference never lists them


def fields(settings: BaseModel | None = None, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting as (dotted path, its declaration), in the order of schema.py.

    Those of `method` are those of the method that the settings name.
    """
    settings = Settings() if settings is None else settings
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            yield from fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field
    for name in settings.model_extra or {}:  # of a method whose class is not here
        yield f"{prefix}{name}", FieldInfo(annotation=None)


def get(settings: Settings, path: str) -> Any:
    """The value at a dotted path."""
    value: Any = settings
    for name in path.split("."):
        value = getattr(value, name)
    return value


def flatten(settings: Settings) -> dict[str, Any]:
    """{dotted path: value} of every setting."""
    return {path: get(settings, path) for path, _ in fields(settings)}


def replace(settings: Settings, changes: Mapping[str, Any], origin: str = "setting") -> Settings:
    """The same settings with {dotted path: value} changed.

    With another `method.name`, what the new method has too keeps its value. Raises UserError naming
    the path, with the nearest known one, or the value and its range.
    """
    tree, method = settings.model_dump(), type(settings.method)
    if "method.name" in changes:
        tree["method"], method = _of_other_method(tree["method"], changes["method.name"], origin)
    known = _paths_with(settings, method)
    for path, value in changes.items():
        if legacy.means_nothing(path, value, method):
            continue
        if any(name.startswith(f"{path}.") for name in known):
            raise UserError(f"{origin} {path} is a section; name one of its settings, {path}.…=…")
        if path not in known:
            path = brief(path)
            raise UserError(f"{origin} {path} does not exist{_hint(path, known, method)}")
        *sections, name = path.split(".")
        branch = tree
        for section in sections:
            branch = branch[section]
        branch[name] = value
    return _validate(tree, origin)


def _paths_with(settings: Settings, method: type[MethodSettings]) -> list[str]:
    """Every path that these settings would have with a method's own."""
    if type(settings.method) is method:  # an outside method's may be the parent of ours
        return [path for path, _ in fields(settings)]
    others = [path for path, _ in fields(settings) if not path.startswith("method.")]
    return [*others, *(f"method.{name}" for name in method.model_fields)]


def _of_other_method(
    before: Mapping[str, Any], name: Any, origin: str
) -> tuple[dict[str, Any], type[MethodSettings]]:
    """A section `method` for the method `name`, with what it shares with the one before."""
    try:
        found = type(read_method({"name": name}))
    except ValueError as error:  # ValidationError is one
        if isinstance(error, ValidationError):
            return {"name": name}, settings_class(name)  # a setting without default is missing
        raise UserError(f"{origin}: method{error}") from None
    # What equal names mean is known of this package's methods alone.
    known = name == before["name"] or BUILT_IN.keys() >= {name, before["name"]}
    common = found.model_fields if known else MethodSettings.model_fields
    shared = {key: value for key, value in before.items() if key in common}
    kept = {key: value for key, value in shared.items() if _takes(found, key, value)}
    return {**kept, "name": name}, found


def _takes(method: type[MethodSettings], name: str, value: Any) -> bool:
    """Whether a method that has this setting takes this value; not every loss fits each method."""
    try:
        method.model_validate({name: value})
    except ValidationError as error:
        return all(one["loc"][:1] != (name,) for one in error.errors())
    return True


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """["a.b=value", ...] as {dotted path: value}, read by the rule of settings/reading.py.

    Of a path that is assigned twice, the last value holds. Raises UserError.
    """
    changes: dict[str, Any] = {}
    for text in assignments:
        path, equals, value = text.partition("=")
        path = path.strip()
        if not equals or not path:
            raise UserError(
                f"--set takes path=value, as in method.temperature=0.1, not {brief(text)!r}"
            )
        changes[path] = reading.assigned(value, f"--set {brief(path)}: {brief(value.strip())}")
    return changes


def difference(a: Settings, b: Settings) -> dict[str, tuple[Any, Any]]:
    """{dotted path: (value in a, value in b)} where two differ; the recipe's name is left out.

    A setting that only the other's method has is None.
    """
    left, right = flatten(a), flatten(b)
    both = {path: (left.get(path), right.get(path)) for path in left | right}
    return {path: pair for path, pair in both.items() if path not in LABELS and pair[0] != pair[1]}


def identity(settings: Settings) -> dict[str, Any]:
    """The settings that make a run what it is: all but those declared with `incidental`."""
    kept = (path for path, field in fields(settings) if not is_incidental(field))
    return {path: get(settings, path) for path in kept}


def is_incidental(field: FieldInfo) -> bool:
    """Whether a setting says only where or how often, and so changes no training number."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("incidental"))


def to_yaml(settings: Settings, resolved: Mapping[str, Any] | None = None) -> str:
    """Every setting as YAML; `resolved` adds values in effect, for reading only."""
    tree = settings.model_dump(mode="json")
    text = reading.to_text(tree, default_flow_style=None, width=100)
    if resolved:
        text += "# What follows from the settings above; never read back.\n"
        text += reading.to_text({"resolved": dict(resolved)})
    return text


def from_yaml(text: str, origin: str = "config.yaml") -> Settings:
    """Settings from YAML text; what is missing takes its default, `resolved` is ignored."""
    return _settings_of(reading.from_text(text, origin), origin)


def load(path: Path) -> Settings:
    """Settings of a YAML file."""
    return _settings_of(reading.from_file(path), str(path))


def stated_in(path: Path) -> set[str]:
    """Dotted paths of the settings that a YAML file states."""
    tree = reading.from_file(path)
    known = {name for name, _ in fields(_settings_of(tree, str(path)))}
    return known & set(_paths(tree, ""))


def _settings_of(tree: Any, origin: str) -> Settings:
    if not isinstance(tree, dict):
        raise UserError(
            f"{printable(origin)} must hold settings by name, such as `train: {{epochs: 100}}`"
        )
    stated = {name: value for name, value in tree.items() if name != "resolved"}
    return _validate(legacy.upgrade(stated), printable(origin))


def _paths(tree: Any, prefix: str) -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _validate(tree: Mapping[str, Any], origin: str) -> Settings:
    try:
        if "method" in tree:
            tree = {**tree, "method": _method_of(tree["method"], origin)}
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise UserError(_sentence(error, origin)) from None


def _method_of(section: Any, origin: str) -> MethodSettings:
    """By itself, because which settings it has follows from one of them."""
    try:
        found: MethodSettings = read_method(section)
    except ValidationError as error:
        method = settings_class(section.get("name", "moco"))
        raise UserError(_sentence(error, origin, ("method",), method)) from None
    except ValueError as error:
        raise UserError(f"{origin}: method{error}") from None
    return found


# pydantic's words that lack a remedy.
_REMEDY = {
    "string_type": 'must be text; put it into quotes, as in "2024"',
    "tuple_type": "must be a list, as in [0.2, 1.0]",
    "bool_type": "must be true or false",
}


def _sentence(
    error: ValidationError,
    origin: str,
    section: tuple[str, ...] = (),
    method: type[MethodSettings] = BUILT_IN["moco"],
) -> str:
    """The first problem in one sentence, with the number of others; paths are dotted and full."""
    errors = error.errors(include_url=False)
    known = _paths_with(Settings(), method)

    def named(path: str) -> str:  # pydantic adds which member of a union it tried
        return max((name for name in known if path.startswith(name)), key=len, default=path)

    paths = [brief(".".join(str(part) for part in (*section, *one["loc"]))) for one in errors]
    first, path = errors[0], paths[0]
    if first["type"] == "extra_forbidden":
        text = f"{origin}: {path} does not exist{_did_you_mean(path, known)}"
    else:
        reason = _REMEDY.get(first["type"], first["msg"].removeprefix("Value error, "))
        if first["type"] == "value_error" and isinstance(first["input"], (dict, BaseModel)):
            # A check of a whole section, which begins with a setting's name in that section.
            text = f"{origin}: " + ".".join(part for part in (path, reason) if part)
        else:
            reason = reason[:1].lower() + reason[1:]
            text = f"{origin}: {named(path)} = {reading.shown(first['input'])}: {reason}"
    others = len({named(path) for path in paths}) - 1
    return text + (f" (and {others} more)" if others else "")


def _hint(path: str, known: list[str], method: type[MethodSettings]) -> str:
    """After "does not exist": which method has it, or what is near."""
    if path in legacy.MOVED:
        return f" any more; {legacy.MOVED[path]}"
    section, _, name = path.partition(".")
    owners = [other for other, found in BUILT_IN.items() if name in found.model_fields]
    if section == "method" and owners and name not in method.model_fields:
        here = next((one for one, found in BUILT_IN.items() if found is method), "this method")
        which = f"method {here}" if here in BUILT_IN else here
        return f" for {which}; it belongs to {' and '.join(owners)}"
    return _did_you_mean(path, known)


def _did_you_mean(path: str, known: list[str]) -> str:
    close = difflib.get_close_matches(path, known, n=1, cutoff=0.6)
    if not close:  # the right name in the wrong section
        last = path.rsplit(".", 1)[-1]
        names = {name.rsplit(".", 1)[-1]: name for name in known}
        close = [names[n] for n in difflib.get_close_matches(last, names, n=1, cutoff=0.6)]
    if close:
        return f"; did you mean {close[0]}?"
    return "; `mocokit pretrain RECIPE --show-all` lists every setting"
