"""What a person may write into a `[[tiers]]` table for one type of tier.

Owns the base of all parameter models and the reading of a table. Values with units are written as everywhere
in the configuration: `capacity = "256MiB"`, `deadline = "10s"`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, ValidationError

MAX_SUGGESTIONS = 20
"""Mistakes for which a name is suggested: each costs 0.1 ms, and 60,000 fit into a file."""


class TierParameters(BaseModel):
    """Derive from it, one field per key; a field without a default has to be written."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ParameterErrors(ValueError):
    """Every mistake in one table: (key, what is wrong with it)."""

    def __init__(self, errors: list[tuple[str, str]]) -> None:
        self.errors = errors
        super().__init__("; ".join(f"{key}: {problem}" for key, problem in errors))


def read_parameters(model: type[TierParameters], table: Mapping[str, object]) -> TierParameters:
    """Read a table. Raises ParameterErrors with all mistakes."""
    try:
        return model.model_validate(dict(table))
    except ValidationError as invalid:
        errors: list[tuple[str, str]] = []
        for detail in invalid.errors():
            key = str(detail["loc"][0]) if detail["loc"] else ""
            problem = str(detail["msg"]).removeprefix("Value error, ")
            if detail["type"] == "extra_forbidden":
                problem = _unknown(key, model, suggests=len(errors) < MAX_SUGGESTIONS)
            elif detail["type"] == "missing":
                problem = "is missing"
            errors.append((key, problem))
        raise ParameterErrors(errors) from None


def _unknown(key: str, model: type[TierParameters], *, suggests: bool) -> str:
    known = list(model.model_fields)
    close = difflib.get_close_matches(key, known, n=1) if suggests else []
    if close:
        return f"unknown; did you mean {close[0]}?"
    return f"unknown; this tier has {', '.join(known) or 'no parameters'}"
