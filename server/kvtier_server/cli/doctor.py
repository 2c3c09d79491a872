"""Check this machine, the installation and the configuration, with or without a daemon and a GPU.

  kvtier doctor                                for the daemon that runs, or one with the default settings
  kvtier doctor --config /etc/kvtier.toml      before that daemon is started, or beside it
  kvtier doctor --pool-bytes 200GiB            would such a pool fit?

Each check is a line: PASS, WARN, FAIL or SKIP and what was found; below WARN and FAIL stands what to type.
Nothing is changed. GPUs are tried with a real copy between two processes, which takes a second and some
1 GiB of each device's memory; --quick leaves that out.

Exit code: 0 no check has failed, 1 at least one has, 2 a mistake in the call.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvtier_server import __version__
from kvtier_server.address import client_address
from kvtier_server.cli.connection import explain, open_channel, timeout_seconds
from kvtier_server.cli.failure import Failure

if TYPE_CHECKING:
    from kvtier.v1.admin_pb2 import GetStatusResponse
    from kvtier_server.doctor.finding import Finding
    from kvtier_server.doctor.serving import Silence

SUMMARY = "check machine, installation, settings and GPUs"

_SETTINGS = {
    "--address": (
        "server.address",
        "ADDRESS",
        "of the daemon (else KVTIER_ADDRESS, else the default socket)",
    ),
    "--name": ("server.name", "NAME", "name of the pool (default: default)"),
    "--pool-bytes": ("pool.bytes", "SIZE", "size of the pool (default: 4GiB, or the running daemon's)"),
}
"""What `kvtier serve` takes too, in the same words."""

NAME_COLUMNS = 22

COLOURS = {"pass": "32", "warn": "33", "fail": "31", "skip": "2"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings as TOML, as for kvtier serve")
    for option, (setting, metavar, text) in _SETTINGS.items():
        parser.add_argument(option, dest=setting, metavar=metavar, help=text)
    parser.add_argument(
        "--timeout",
        type=timeout_seconds,
        default=5.0,
        metavar="SECONDS",
        help="longest wait for the daemon (default: 5)",
    )
    parser.add_argument(
        "--device", action="append", default=[], metavar="UUID", help="try this GPU only; may be repeated"
    )
    parser.add_argument("--quick", action="store_true", help="do not copy through the GPUs")
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table", help="default: table")


def run(args: argparse.Namespace) -> int:
    """Check everything, and say it as it becomes known."""
    from kvtier_server.doctor.examination import Request, examine

    flags = {name: value for name, value in vars(args).items() if "." in name and value is not None}
    request = Request(
        flags=flags,
        options=_as_typed(args),
        config=args.config,
        env=os.environ,
        address=client_address(flags.get("server.address"), os.environ),
        uuids=tuple(args.device),
        is_quick=args.quick,
    )
    findings = examine(request, _asker(args.timeout))
    if args.output == "json":
        seen = list(findings)
        print(json.dumps(to_dict(seen), indent=2))
    else:
        seen = list(_printed(findings))
        print(f"\n{told(seen)}")
    return exit_code(seen)


def exit_code(findings: Sequence[Finding]) -> int:
    """1 where something does not work."""
    return 1 if any(finding.verdict == "fail" for finding in findings) else 0


def to_dict(findings: Sequence[Finding]) -> dict[str, object]:
    """Write it as JSON has it. Fields are added here, never renamed; `fix` is "" of PASS and SKIP."""
    from kvtier_server.doctor.finding import Verdict, worst

    counts = Counter(finding.verdict for finding in findings)
    return {
        "version": __version__,
        "verdict": worst(findings).value,
        "counts": {verdict.value: counts[verdict] for verdict in Verdict},
        "checks": [
            {
                "name": finding.name,
                "verdict": finding.verdict.value,
                "text": finding.text,
                "fix": finding.fix,
            }
            for finding in findings
        ],
    }


def told(findings: Sequence[Finding]) -> str:
    """Sum up in one line."""
    from kvtier_server.doctor.finding import Verdict

    counts = Counter(finding.verdict for finding in findings)
    return ", ".join(f"{counts[verdict]} {verdict.value.upper()}" for verdict in Verdict)


def lines(finding: Finding, colour: Callable[[str, str], str]) -> Iterator[str]:
    """Write a finding for a person: a line, and below it what to type."""
    word = colour(finding.verdict.value.upper(), COLOURS[finding.verdict.value])
    yield f"{word}  {finding.name:<{NAME_COLUMNS}} {finding.text}"
    if finding.fix:
        yield f"      {'':<{NAME_COLUMNS}} -> {finding.fix}"


def _printed(findings: Iterator[Finding]) -> Iterator[Finding]:
    is_coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def colour(text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if is_coloured else text

    for finding in findings:
        for line in lines(finding, colour):
            print(line, flush=True)
        yield finding


def _as_typed(args: argparse.Namespace) -> tuple[str, ...]:
    """Return the options that mean the same daemon to `kvtier serve`."""
    typed = ["--config", str(args.config)] if args.config is not None else []
    for option, (setting, _, _) in _SETTINGS.items():
        value = getattr(args, setting)
        if value is not None:
            typed += [option, value]
    return tuple(typed)


def _asker(timeout_s: float) -> Callable[[str], GetStatusResponse | Silence]:
    from kvtier_server.doctor.serving import Silence

    def ask(address: str) -> GetStatusResponse | Silence:
        args = argparse.Namespace(address=address, timeout=timeout_s)
        try:
            _, channel = open_channel(args)
        except Failure as failure:
            return Silence(str(failure), is_listening=False)
        import grpc

        from kvtier.v1 import admin_pb2, admin_pb2_grpc

        stub = admin_pb2_grpc.AdminServiceStub(channel)
        with channel:
            try:
                return stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=timeout_s)
            except grpc.RpcError as error:
                return Silence(str(explain(error, address, args)), is_listening=True)

    return ask
