"""The settings as a person meets them: value in its own notation, range, and the reason beside it.

Reasons are the attribute docstrings of the configuration's classes, read from their source, so that there is
one place for them. Owns no setting and no default.
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from kvtier_server.config_values import unit_of
from kvtier_server.units import write_bytes, write_duration

_BOUNDS = (
    ("ge", "at least"),
    ("gt", "above"),
    ("le", "at most"),
    ("lt", "below"),
)
_KINDS = {
    int: "a number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    tuple: "a list of texts",
    dict: "a table of texts",
}
_UNBOUNDED = 1 << 40
"""A count this large is no limit that anybody meets (config_values.Count)."""

SECRET_WORDS = ("secret", "password", "token", "credential", "access_key", "api_key")
HIDDEN = "(hidden)"


@dataclass(frozen=True, slots=True)
class Setting:
    """One key of a section or of a tier. `reason` is one paragraph."""

    key: str
    unit: Literal["size", "duration", ""]
    default: object
    is_required: bool
    values: str
    """What may be written: "a size, at least 1MiB"."""
    reason: str
    in_environment: bool
    """Whether a text can be its value: lists and tables stand in the file."""

    def write(self, value: object) -> str:
        """Write a value as TOML has it."""
        return json.dumps(self.plain(value), ensure_ascii=False, default=str)

    def plain(self, value: object) -> object:
        """Return a value in the notation of the configuration: sizes and durations as texts with units."""
        if isinstance(value, int) and not isinstance(value, bool):
            if self.unit == "size":
                return write_bytes(value)
            if self.unit == "duration":
                return write_duration(value)
        return value


def settings_of(model: type[BaseModel]) -> Iterator[Setting]:
    """Return the settings of a section or of a tier's parameters, in their order."""
    reasons = _reasons(model)
    for name, field in model.model_fields.items():
        unit = unit_of(field.metadata)
        yield Setting(
            key=field.alias or name,
            unit=unit,
            default=None if field.is_required() else field.default,
            is_required=field.is_required(),
            values=_values(field, unit),
            reason=reasons.get(name, ""),
            in_environment=get_origin(field.annotation) not in (dict, tuple),
        )


@cache
def _reasons(model: type[BaseModel]) -> dict[str, str]:
    """Attribute docstrings by attribute, those of base classes included."""
    found: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if not issubclass(base, BaseModel) or base is BaseModel:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):  # a class without a source file has no reasons
            continue
        definition = tree.body[0]
        assert isinstance(definition, ast.ClassDef), definition
        for before, after in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name):
                text = _docstring(after)
                if text:
                    found[before.target.id] = " ".join(text.split())
    return found


def _docstring(node: ast.stmt) -> str:
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    value = node.value.value if is_text else ""  # type: ignore[attr-defined]
    return value if isinstance(value, str) else ""


def _values(field: FieldInfo, unit: Literal["size", "duration", ""]) -> str:
    if get_origin(field.annotation) is Literal:
        return " or ".join(json.dumps(choice) for choice in get_args(field.annotation))
    kind = {"size": "a size", "duration": "a duration"}.get(unit) or _kind(field.annotation)
    return ", ".join([kind, *_bounds(field.metadata, unit)])


def _kind(annotation: Any) -> str:
    return _KINDS.get(get_origin(annotation) or annotation, "a value")


def _bounds(metadata: list[Any], unit: Literal["size", "duration", ""]) -> Iterator[str]:
    strictest: dict[str, float] = {}
    for found in metadata:
        for attribute, words in _BOUNDS:
            bound = getattr(found, attribute, None)
            if bound is not None:
                pick = max if words in {"at least", "above"} else min
                strictest[words] = pick(strictest.get(words, bound), bound)
    for words, bound in strictest.items():
        if (unit and bound <= 1) or (words == "at most" and bound >= _UNBOUNDED and not unit):
            continue  # says nothing: a size is a byte or more
        yield f"{words} {_bound(bound, unit)}"


def _bound(bound: float, unit: Literal["size", "duration", ""]) -> str:
    if unit == "size":
        return write_bytes(int(bound))
    if unit == "duration":
        return write_duration(int(bound))
    return f"{int(bound):,}" if bound == int(bound) else f"{bound:g}"


def shown(key: str, value: object) -> object:
    """Return what may be shown of a value: nothing of a secret, which belongs into a file."""
    if not isinstance(value, str) or not value:
        return value
    lowered = key.lower()
    if not lowered.endswith("_file") and any(word in lowered for word in SECRET_WORDS):
        return HIDDEN
    if "://" in value:
        scheme, _, rest = value.partition("://")
        authority, slash, path = rest.partition("/")
        if "@" in authority:
            return f"{scheme}://{HIDDEN}@{authority.rpartition('@')[2]}{slash}{path}"
    return value
