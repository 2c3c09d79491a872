"""Check the settings of a daemon, show those that hold, or write a file with all of them.

  kvtier config check --config /etc/kvtier.toml       every mistake at once, with its dotted path
  kvtier config show --config /etc/kvtier.toml        what holds, and where each value was given
  kvtier config default > kvtier.toml                 all settings with their units and reasons

`check` and `show` take the options of `kvtier serve` and read its environment, so that they say what it would
do. Exit code: 0 right, 2 mistakes, or `check` sees that the pool does not fit here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvtier_server.cli import serve
from kvtier_server.cli.failure import Failure
from kvtier_server.units import format_bytes

if TYPE_CHECKING:
    from kvtier_server.config import Config

SUMMARY = "check, show or write the settings of a daemon"
MISTAKES = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="{check,show,default}")
    for name, text in (
        ("check", "say every mistake, and whether the pool fits this machine"),
        ("show", "print the settings that hold, each with its source; never a secret"),
    ):
        action = actions.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example:\n  kvtier config {name} --config /etc/kvtier.toml",
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        serve.add_arguments(action)
        if name == "show":
            action.add_argument(
                "-o", "--output", choices=("toml", "json"), default="toml", help="default: toml"
            )
    actions.add_parser(
        "default",
        help="print a file with every setting, its default, unit and reason",
        description="Print a file with every setting at its default, with its unit and the reason for it.",
        epilog="example:\n  kvtier config default > kvtier.toml",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run(args: argparse.Namespace) -> int:
    """Check, show or write."""
    if args.action == "default":
        from kvtier_server.cli.config_default import default_file

        print("\n".join(default_file()))
        return 0
    from kvtier_server.config import ConfigErrors, read_config

    try:
        config, given = read_config(serve.given_flags(args), args.config, os.environ)
    except ConfigErrors as errors:
        for error in errors.errors:
            print(f"kvtier config: {error}", file=sys.stderr)
        return MISTAKES
    if args.action == "check":
        return _check(config, given, args)
    rows = list(effective(config, given, str(args.config)))
    if args.output == "json":
        print(json.dumps({"settings": [asdict(row) for row in rows]}, indent=2, default=str))
    else:
        print("\n".join(as_toml(rows)))
    return 0


def _check(config: Config, given: dict[str, str], args: argparse.Namespace) -> int:
    """Print what is right; what this machine has no room for is a mistake too."""
    from kvtier_ops.capacity import PoolTooLarge, check_capacity
    from kvtier_ops.directory import PoolError

    try:
        check_capacity(config.pool_directory, config.pool.bytes)
    except PoolTooLarge as error:
        print(f"kvtier config: pool.bytes: {error}", file=sys.stderr)
        return MISTAKES
    except (OSError, PoolError) as error:
        raise Failure(f"{config.pool_directory} cannot be looked into: {error}", MISTAKES) from None
    if config.tls.is_on:
        from kvtier_server.certificates import Certificates
        from kvtier_server.socket_lock import StartError

        try:
            Certificates(config.tls)
        except StartError as error:
            print(f"kvtier config: {error}", file=sys.stderr)
            return MISTAKES
    for path, source in overridden(args.config, given):
        message = f"{path} of {args.config} does not count: {source} says otherwise"
        print(f"kvtier config: {message}", file=sys.stderr)
    tiers = ", ".join(common.name for common, _ in config.tiers) or "none"
    what = str(args.config) if args.config else "no file, the defaults"
    print(f"{what}: right; pool of {format_bytes(config.pool.bytes)}, tiers below it: {tiers}")
    doctor = f"kvtier doctor --config {shlex.quote(str(args.config))}" if args.config else "kvtier doctor"
    print(f"kvtier config: for the rest of this machine: {doctor}", file=sys.stderr)
    return 0


def overridden(file: Path | None, given: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Return what the file has and the environment overrides: dotted path, source."""
    if file is None:
        return
    with contextlib.suppress(OSError, ValueError):  # it has been read before: whoever changes it asks again
        for section, body in tomllib.loads(file.read_text(encoding="utf-8")).items():
            for key in body if isinstance(body, dict) else ():
                source = given.get(f"{section}.{key}", "")
                if source.startswith("environment "):
                    yield f"{section}.{key}", source


@dataclass(frozen=True, slots=True)
class Effective:
    """One setting that holds, its value as the configuration writes it."""

    path: str
    """Dotted; of a tier `tiers[0].capacity`."""
    value: object
    source: str
    """"default", or where it was given."""


def effective(config: Config, given: dict[str, str], file: str) -> Iterator[Effective]:
    """Return every setting in the order of the sections, then those of the tiers."""
    from kvtier_server.cli.settings import settings_of, shown
    from kvtier_server.config import KNOWN

    for section, keys in KNOWN.items():
        model = getattr(config, section)
        for setting in settings_of(type(model)):
            value = setting.plain(getattr(model, keys[setting.key]))
            path = f"{section}.{setting.key}"
            yield Effective(path, shown(setting.key, value), given.get(path, "default"))
    for index, (common, parameters) in enumerate(config.tiers):
        for part in (common, parameters):
            written = part.model_fields_set
            for setting in settings_of(type(part)):
                value = setting.plain(getattr(part, setting.key))
                source = file if setting.key in written else "default"
                yield Effective(f"tiers[{index}].{setting.key}", shown(setting.key, value), source)


def as_toml(rows: list[Effective]) -> Iterator[str]:
    """Write the settings as a file that `kvtier serve` reads, with the source of each beside it.

    Defaults of tiers are comments: some keys may not be written without another one.
    """
    head = ""
    for row in rows:
        section, _, key = row.path.rpartition(".")
        if section != head:
            yield from ([""] if head else [])
            yield "[[tiers]]" if section.startswith("tiers[") else f"[{section}]"
            head = section
        is_default_of_tier = section.startswith("tiers[") and row.source == "default"
        sign = "# " if is_default_of_tier else ""
        setting = f"{sign}{key} = {json.dumps(row.value, ensure_ascii=False, default=str)}"
        yield f"{setting:<40}  # {row.source}"
