"""The configuration: readable, and if not, every mistake with what mends it."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from kvtier_server.doctor.finding import Finding, failed, passed, skipped
from kvtier_server.doctor.subject import Subject
from kvtier_server.units import format_bytes

if TYPE_CHECKING:
    from kvtier_server.config import ConfigError

NAME = "configuration"


def read_configuration(
    flags: Mapping[str, str],
    options: tuple[str, ...],
    file: Path | None,
    env: Mapping[str, str],
    address: str,
) -> tuple[Subject, list[Finding]]:
    """Read what `kvtier serve` would read. Where it has mistakes, the subject has the defaults.

    `flags` are by dotted path, `options` are the same as they are typed; `address` is where a client would
    look, for when no configuration says it.
    """
    try:
        from kvtier_server.config import ConfigErrors, load_config
    except ModuleNotFoundError as error:
        text = f"cannot be read without {error.name}, which comes with the extra server"
        return Subject.unconfigured(address), [skipped(NAME, text)]
    try:
        subject = Subject.of_config(load_config(flags, file, env), options)
    except ConfigErrors as errors:
        findings = [_mistake(error, file) for error in errors.errors]
        defaults = Subject.of_config(load_config({}, None, {}), ())
        subject = dataclasses.replace(defaults, address=address)
        return subject, [*findings, skipped(NAME, f"what follows is about {_told(subject, None)} instead")]
    return subject, [passed(NAME, _told(subject, file))]


def _told(subject: Subject, file: Path | None) -> str:
    tiers = ", ".join(common.name for common, _ in subject.tiers)
    source = str(file) if file else "no file, so the defaults"
    below = f"tiers below: {tiers}" if tiers else "no tiers below"
    return f"{source}: pool {subject.name} of {format_bytes(subject.pool_bytes)}, {below}"


def _mistake(error: ConfigError, file: Path | None) -> Finding:
    variable = error.source.removeprefix("environment ")
    if variable != error.source:
        fix = f"unset {variable}"
    elif file is not None and error.source == str(file):
        fix = f"${{EDITOR:-vi}} {shlex.quote(error.source)}"
    else:
        fix = "kvtier serve --help"
    return failed(NAME, str(error), fix)
