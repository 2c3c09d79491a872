"""Which vLLM this package was built and tested against, and a clear refusal of every other.

Owns the range. Differences inside the range are handled where they are met.
"""

from __future__ import annotations

import re

OLDEST = (0, 27)
NEWEST = (0, 33)
"""Minor releases, both included. vLLM's offloading interface changes in minor releases only."""

_RELEASE = re.compile(r"(\d+)\.(\d+)")


class UnsupportedVLLM(ImportError):
    """vLLM is missing, or is a release that this package was not built for."""


def installed_version() -> str:
    """Return the version of the vLLM that would be imported here."""
    try:
        from vllm.version import __version__ as version
    except ImportError as error:
        raise UnsupportedVLLM(
            f"kvtier_client.vllm needs vLLM {_range()}, which cannot be imported here ({error}); "
            "install kvtier into the environment of the engine: pip install kvtier"
        ) from error
    return str(version)


def check_version(version: str | None = None) -> str:
    """Return the version of vLLM, or raise UnsupportedVLLM if it is outside of the supported range."""
    found = installed_version() if version is None else version
    match = _RELEASE.match(found)
    if match is None:
        raise UnsupportedVLLM(f"vLLM calls its version {found!r}, which tells no release; {_advice()}")
    release = (int(match[1]), int(match[2]))
    if not OLDEST <= release <= NEWEST:
        age = "older" if release < OLDEST else "newer"
        raise UnsupportedVLLM(f"vLLM {found} is {age} than what this kvtier supports; {_advice()}")
    return found


def is_at_least(minor: int) -> bool:
    """Tell whether the installed vLLM is 0.`minor` or newer."""
    match = _RELEASE.match(installed_version())
    return match is not None and (int(match[1]), int(match[2])) >= (0, minor)


def _range() -> str:
    return f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"


def _advice() -> str:
    newest = f"{NEWEST[0]}.{NEWEST[1]}"
    return f"it supports vLLM {_range()}: pip install 'vllm=={newest}.*', or another release of kvtier"
