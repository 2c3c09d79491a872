"""Read every chunk file of filesystem tiers, and check header, place, length and checksums.

Needs no daemon and disturbs none that runs: several may share the directory. What is found wrong is never
served: a daemon that comes across it computes instead, and removes it.

  kvtier verify --config /etc/kvtier.toml          the tiers of a configuration (--tier NAME: one of them)
  kvtier verify --path /var/lib/kvtier/chunks      a root, without a configuration
  kvtier verify --path ... --delete                remove what is wrong

Exit code: 0 all right, 1 something is wrong (removed or not), 2 a mistake, or not all could be read.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kvtier_server.cli.failure import Failure
from kvtier_server.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtier_server.secondary.filesystem.inspection import Finding, Inspection

SUMMARY = "check every chunk file of filesystem tiers"

MAX_SHOWN = 50
"""Wrong files that the table names; JSON has them all."""

SHOW_AFTER_S = 1.0
"""Work that takes longer shows how far it is."""

SHOW_EVERY_S = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--config", type=Path, metavar="FILE", help="settings of a daemon, as for `kvtier serve`"
    )
    where.add_argument("--path", type=Path, metavar="ROOT", help="the root of a filesystem tier")
    parser.add_argument("--tier", metavar="NAME", help="with --config: only this tier")
    parser.add_argument("--delete", action="store_true", help="remove what is wrong")
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table", help="default: table")


@dataclass(slots=True)
class Report:
    """What was found below one root."""

    root: str
    counts: Counter[str] = field(default_factory=Counter)
    num_bytes: int = 0
    wrong: list[Finding] = field(default_factory=list)
    unreadable: list[Finding] = field(default_factory=list)
    removed: set[str] = field(default_factory=set)
    """Paths of wrong files that are no more."""
    seconds: float = 0.0


def run(args: argparse.Namespace) -> int:
    """Verify one root after the other."""
    if args.tier is not None and args.config is None:
        raise Failure("--tier names a tier of --config FILE", 2)
    roots = [str(args.path)] if args.path is not None else _configured(args.config, args.tier)
    reports = [_verify(root, delete=args.delete) for root in roots]
    if args.output == "json":
        print(json.dumps({"roots": [to_dict(report) for report in reports]}, indent=2))
    else:
        for report in reports:
            _print(report, delete=args.delete)
    return exit_code(reports)


def exit_code(reports: list[Report]) -> int:
    """1 is surer than 2: what was found wrong is wrong, whatever else could not be read."""
    if any(report.wrong for report in reports):
        return 1
    return 2 if any(report.unreadable for report in reports) else 0


def _configured(file: Path, tier: str | None) -> list[str]:
    """Return the roots of a configuration's filesystem tiers."""
    from kvtier_server.config import ConfigErrors, load_config
    from kvtier_server.secondary.filesystem.tier import FilesystemParameters

    try:
        config = load_config({}, file, os.environ)
    except ConfigErrors as errors:
        raise Failure("\nkvtier: ".join(map(str, errors.errors)), 2) from None
    found = {
        common.name: parameters.root
        for common, parameters in config.tiers
        if isinstance(parameters, FilesystemParameters)
    }
    if tier is not None and tier not in found:
        raise Failure(f"{file} has no filesystem tier {tier!r}; it has {', '.join(found) or 'none'}", 2)
    if not found:
        raise Failure(f"{file} has no filesystem tier; other tiers keep no files that could be verified", 2)
    return [found[tier]] if tier is not None else list(found.values())


def _verify(root: str, *, delete: bool) -> Report:
    from kvtier_server.secondary.filesystem.inspection import WRONG, Inspection, Verdict

    report = Report(root)
    began = time.monotonic()
    try:
        inspection = Inspection(root)
    except OSError as error:
        raise Failure(
            f"{root} cannot be read as the root of a filesystem tier ({error.strerror}: {error.filename}); "
            "name the directory that a tier has as its root",
            2,
        ) from None
    try:
        with _progress(root) as show:
            for finding in _findings(inspection, show):
                report.counts[finding.verdict] += 1
                report.num_bytes += finding.num_bytes
                if finding.verdict is Verdict.UNREADABLE:
                    report.unreadable.append(finding)
                elif finding.verdict in WRONG:
                    report.wrong.append(finding)
                    if delete:
                        _remove(inspection, finding, report)
    except OSError as error:
        raise Failure(f"{root}: a directory cannot be read ({error.strerror}: {error.filename})", 2) from None
    finally:
        inspection.close()
    report.seconds = time.monotonic() - began
    return report


def _remove(inspection: Inspection, finding: Finding, report: Report) -> None:
    try:
        if inspection.remove(finding):
            report.removed.add(finding.entry.path)
    except OSError as error:
        print(f"kvtier: {finding.entry.path} cannot be removed: {error.strerror}", file=sys.stderr)


def _findings(inspection: Inspection, show: Callable[[int, int, int], None]) -> Iterator[Finding]:
    entries = list(inspection.entries())
    num_bytes = 0
    for number, entry in enumerate(entries):
        show(number, len(entries), num_bytes)
        finding = inspection.look_at(entry)
        num_bytes += finding.num_bytes
        yield finding


@contextmanager
def _progress(root: str) -> Iterator[Callable[[int, int, int], None]]:
    """Show how far the work is on a terminal, once it has taken a second."""
    shown_at = began = time.monotonic()
    width = 0

    def show(number: int, total: int, num_bytes: int) -> None:
        nonlocal shown_at, width
        now = time.monotonic()
        if now - began < SHOW_AFTER_S or now - shown_at < SHOW_EVERY_S:
            return
        shown_at = now
        bar = "#" * (20 * number // total)
        rate = format_bytes(int(num_bytes / (now - began)))
        line = f"{root} [{bar:<20}] {number} of {total} files, {rate}/s"
        width = max(width, len(line))
        print(f"\r{line:<{width}}", end="", file=sys.stderr, flush=True)

    def quiet(_number: int, _total: int, _num_bytes: int) -> None:
        return

    try:
        yield show if sys.stderr.isatty() else quiet
    finally:
        if width:
            print(f"\r{'':<{width}}\r", end="", file=sys.stderr, flush=True)


Json = str | int | float | bool | list["Json"] | dict[str, "Json"]


def to_dict(report: Report) -> dict[str, Json]:
    """Write a report as JSON has it."""
    return {
        "root": report.root,
        "seconds": round(report.seconds, 3),
        "bytes": report.num_bytes,
        "files": dict(sorted(report.counts.items())),
        "wrong": [
            {
                "path": finding.entry.path,
                "problem": str(finding.verdict),
                "detail": finding.detail,
                "removed": finding.entry.path in report.removed,
            }
            for finding in report.wrong
        ],
        "unreadable": [
            {"path": finding.entry.path, "problem": finding.detail} for finding in report.unreadable
        ],
    }


def _print(report: Report, *, delete: bool) -> None:
    took = format_seconds(report.seconds)
    print(f"{report.root}: {format_bytes(report.num_bytes)} read in {took}")
    for verdict, count in sorted(report.counts.items()):
        print(f"  {verdict:<18} {count:>10}")
    for finding in (report.wrong + report.unreadable)[:MAX_SHOWN]:
        detail = f": {finding.detail}" if finding.detail else ""
        removed = "  (removed)" if finding.entry.path in report.removed else ""
        print(f"  {finding.entry.path}  {finding.verdict}{detail}{removed}")
    hidden = len(report.wrong) + len(report.unreadable) - MAX_SHOWN
    if hidden > 0:
        print(f"  and {hidden} more; all of them: kvtier verify -o json")
    if report.wrong and not delete:
        print("  to remove what is wrong: the same command with --delete")
