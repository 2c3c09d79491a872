"""What is installed: kvtier, Python, and the libraries of its extras, by their metadata alone.

Nothing is imported: an installation that is broken must not break the one who looks at it.
"""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import NamedTuple

from kvtier_server import __version__
from kvtier_server.doctor.finding import Finding, failed, passed, skipped, warned

DISTRIBUTION = "kvtier"

_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[[^\]]*\])?\s*\(?(?P<versions>[^;)]*)")
_EXTRA = re.compile(r";.*\bextra\s*==\s*[\"']([^\"']+)[\"']")
_VERSION = re.compile(r"\d+(?:\.\d+)*", re.ASCII)
_BOUND = re.compile(r"\s*(>=|<=|==|<|>)\s*(\d+(?:\.\d+)*)", re.ASCII)


class Requirement(NamedTuple):
    """One library that a part of kvtier needs. `extra`: "" for what is always needed."""

    name: str
    versions: str
    extra: str


def check_installation() -> Iterator[Finding]:
    """Look at everything but the GPU's libraries, which are checked beside the devices."""
    yield passed(
        "kvtier",
        f"kvtier {__version__}, Python {platform.python_version()} ({sys.executable}), "
        f"Linux {platform.release()}",
    )
    needed = requirements()
    if not needed:
        yield skipped(
            "installation", "kvtier runs from its sources here, so nothing says what it needs; pip would"
        )
        return
    yield _check("installation", "", needed)
    yield _check("installation.server", "server", needed, missing="only engines can run here")
    for extra in ("object", "mooncake"):
        yield _check(
            f"installation.{extra}",
            extra,
            needed,
            missing=f"only tiers of the type {extra} need it",
        )


def requirements() -> list[Requirement]:
    """Return what this installation of kvtier declares, nothing where it is none."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []
    return [found for line in lines if (found := parse_requirement(line)) is not None]


def parse_requirement(line: str) -> Requirement | None:
    """Read one line of a distribution's metadata; None for one that is an extra of kvtier itself."""
    match, extra = _REQUIREMENT.match(line.strip()), _EXTRA.search(line)
    if match is None or match["name"] == DISTRIBUTION:
        return None
    return Requirement(match["name"], match["versions"].strip(), extra[1] if extra else "")


def installed_version(name: str) -> str | None:
    """Return the version of an installed distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def fits(version: str, versions: str) -> bool:
    """Tell whether a version is within bounds such as "<8,>=6.33"; what it cannot read it lets pass.

    Compares the release's numbers only: before, after and local parts of versions do not count.
    """
    found = _VERSION.match(version)
    if found is None:
        return True
    mine = _numbers(found[0])
    for bound in versions.split(","):
        match = _BOUND.match(bound)
        if match is None:
            continue
        theirs = _numbers(match[2])
        is_within = {
            ">=": mine >= theirs,
            "<=": mine <= theirs,
            "==": mine == theirs,
            "<": mine < theirs,
            ">": mine > theirs,
        }[match[1]]
        if not is_within:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    numbers = [int(part) for part in version.split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _check(name: str, extra: str, needed: Sequence[Requirement], *, missing: str = "") -> Finding:
    """Look at one extra. `missing`: what it means, and no failure, where some of it is not there."""
    there, absent, unfit = [], [], []
    for requirement in needed:
        if requirement.extra != extra:
            continue
        version = installed_version(requirement.name)
        if version is None:
            absent.append(requirement.name)
        elif not fits(version, requirement.versions):
            unfit.append(f"{requirement.name} {version}, needed is {requirement.versions}")
        else:
            there.append(f"{requirement.name} {version}")
    fix = f"in kvtier's directory: pip install '.{f'[{extra}]' if extra else ''}'"
    if unfit:
        return failed(name, f"of a wrong version: {'; '.join(unfit)}", fix)
    if not absent:
        return passed(name, ", ".join(there))
    text = f"not installed: {', '.join(absent)}"
    if not missing:
        return failed(name, text, fix)
    if extra == "server":
        return warned(name, f"{text}; {missing}", fix)
    return skipped(name, f"{text}; {missing} ({fix})")
