"""Sizes and durations as people write them, "4GiB" and "250ms", to and from plain integers.

Owns the units that configuration and command line accept. Bytes and nanoseconds inside, never floats.
"""

from __future__ import annotations

import re
from decimal import Decimal

SIZE_UNITS = {
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
}
DURATION_UNITS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "min": 60 * 10**9, "h": 3600 * 10**9}

_QUANTITY = re.compile(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*", re.ASCII)


class UnitError(ValueError):
    """A text that is no size or no duration. The message shows what one looks like."""


def parse_bytes(text: str) -> int:
    """Read a size such as "64GiB", "1.5MiB", "10GB" (decimal) or "4096" (bytes)."""
    return _parse(text, SIZE_UNITS, what="size", example='"4GiB"', bare_unit="B")


def parse_duration(text: str) -> int:
    """Read a duration such as "250ms", "10s" or "5min" as nanoseconds. A bare number is refused, but 0."""
    return _parse(text, DURATION_UNITS, what="duration", example='"250ms" or "10s"', bare_unit="")


def _parse(text: str, units: dict[str, int], *, what: str, example: str, bare_unit: str) -> int:
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise UnitError(f"{text!r} is not a {what}; write a number and a unit, for example {example}")
    number, unit = match[1], match[2] or bare_unit
    if not unit:
        if Decimal(number) == 0:
            return 0
        raise UnitError(f"{text!r} has no unit; write a {what} as {example}")
    if unit not in units:
        raise UnitError(f"{text!r} has the unknown unit {unit!r}; {_suggest(number, unit, units)}")
    exact = Decimal(number) * units[unit]
    if exact != int(exact):
        raise UnitError(f"{text!r} is not a whole number of {next(iter(units))}")
    return int(exact)


def _suggest(number: str, unit: str, units: dict[str, int]) -> str:
    lowered = unit.lower()
    same = [known for known in units if known.lower() == lowered]
    # From the back, where the binary units and the long durations stand: "G" means GiB, "m" means min.
    alike = [known for known in reversed(units) if known[0].lower() == lowered[0]]
    if same or alike:
        return f'did you mean "{number}{(same or alike)[0]}"?'
    return f"the units are {', '.join(units)}"


def exact_bytes(size: int) -> str:
    """Write a size so that `parse_bytes` reads the same: 4294967296 -> "4GiB", 1500 -> "1500B"."""
    return _exact(size, {unit: SIZE_UNITS[unit] for unit in ("TiB", "GiB", "MiB", "KiB", "B")})


def exact_duration(nanoseconds: int) -> str:
    """Write a duration so that `parse_duration` reads the same: 1500000000 -> "1500ms"."""
    return _exact(nanoseconds, {unit: DURATION_UNITS[unit] for unit in ("h", "min", "s", "ms", "us", "ns")})


def _exact(quantity: int, units: dict[str, int]) -> str:
    unit = next((unit for unit, size in units.items() if quantity and not quantity % size), "")
    unit = unit or ("s" if "s" in units else "B")
    return f"{quantity // units[unit]}{unit}"


def format_bytes(size: int) -> str:
    """Write a size with the largest binary unit: 4294967296 -> "4GiB", 1500 -> "1.5KiB"."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size >= SIZE_UNITS[unit]:
            return f"{size / SIZE_UNITS[unit]:.1f}".removesuffix(".0") + unit
    return f"{size}B"


def write_bytes(size: int) -> str:
    """Write a size exactly, as `parse_bytes` reads it: 4294967296 -> "4GiB", 1500 -> "1500B"."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size and size % SIZE_UNITS[unit] == 0:
            return f"{size // SIZE_UNITS[unit]}{unit}"
    return f"{size}B"


def write_duration(nanoseconds: int) -> str:
    """Write a duration exactly, as `parse_duration` reads it: 90000000000 -> "90s"."""
    for unit in ("h", "min", "s", "ms", "us"):
        if nanoseconds and nanoseconds % DURATION_UNITS[unit] == 0:
            return f"{nanoseconds // DURATION_UNITS[unit]}{unit}"
    return f"{nanoseconds}ns"


def format_seconds(seconds: float) -> str:
    """Write a time span for a person: 0.4 -> "0.4s", 95 -> "1m35s", 7200 -> "2h00m"."""
    if seconds < 60:
        return f"{seconds:.1f}".removesuffix(".0") + "s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours}h{minutes:02}m"
    return f"{hours // 24}d{hours % 24:02}h"
