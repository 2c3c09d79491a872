"""The status for a person: its tables and lines of engines fit 80 columns."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvtier.v1.admin_pb2 import GetStatusResponse, SessionStatus
from kvtier_server.units import format_bytes, format_seconds

UNBOUNDED_COLUMNS = 4096
"""Off a terminal, where a line that is broken could not be searched for."""
STATE_STYLES = {"serving": "green", "starting": "yellow", "draining": "yellow", "degraded": "red"}


def print_status(status: GetStatusResponse) -> None:
    """Print to stdout; off a terminal no line is broken."""
    console = Console(
        file=sys.stdout,
        width=None if sys.stdout.isatty() else UNBOUNDED_COLUMNS,
        no_color=bool(os.environ.get("NO_COLOR")),
        highlight=False,
        emoji=False,
        markup=False,
    )
    console.print(
        Text.assemble(
            f"kvtier {status.version}  ",
            (status.state, STATE_STYLES.get(status.state, "red")),
            f"  up {format_seconds(status.uptime_seconds)}  boot {status.boot_id}",
        )
    )
    pool = status.pool
    console.print(
        f"pool {pool.name}  {format_bytes(pool.data_bytes)}, {format_bytes(pool.backed_bytes)} backed, "
        f"policy {pool.policy}\n{pool.path}\n"
    )
    console.print(_tiers(status))
    for tier in status.tiers:
        if tier.health not in ("", "ok"):
            console.print(Text(printable(f"tier {tier.name}: {tier.health}"), "red"))
    console.print()
    for line in _engines(status):
        console.print(printable(line), no_wrap=True, overflow="ellipsis")
    if not status.sessions:
        console.print("no sessions: no engine is attached")
    for line in _copy_devices(status):
        console.print(line)
    console.print()
    if any(lease.count for lease in status.leases):
        console.print(_leases(status))
        console.print()
    console.print(_counts(status))


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    return table


def _tiers(status: GetStatusResponse) -> Table:
    table = _table(
        "\ntier",
        "\nused",
        "\nof",
        "\n%",
        "\nchunks",
        "\npinned",
        "free\nslots",
        "re-\nserved",
        "quaran-\ntined",
    )
    for tier in status.tiers:
        share = tier.used_bytes / tier.usable_bytes if tier.usable_bytes else 0.0
        table.add_row(
            tier.name,
            format_bytes(tier.used_bytes),
            format_bytes(tier.usable_bytes),
            f"{share:.0%}",
            str(tier.chunks),
            str(tier.pinned_chunks),
            str(tier.free_slots),
            str(tier.reserved_slots),
            str(tier.quarantined_slots),
        )
    return table


def _engines(status: GetStatusResponse) -> Iterator[str]:
    """Two or three lines an engine, because pins and credits belong to the instance and not to a rank."""
    for engine_id, sessions in by_engine(status.sessions).items():
        first = sessions[0]
        age = format_seconds(max(session.age_seconds for session in sessions))
        pinned = max(session.pinned_chunks for session in sessions)
        held = f"{pinned} pinned, {max(session.credits for session in sessions)} credits"
        yield f"engine {shorten(engine_id, 24)}  {attached(sessions)}  for {age}  {held}"
        yield f"  {shorten(first.model, 36)}  namespace {first.namespace}  {_tenant(first)}"
        paths = sorted({session.path for session in sessions if session.path})
        if status.copy_devices and paths:
            yield f"  copied by {', '.join(paths)}"


def _copy_devices(status: GetStatusResponse) -> Iterator[str]:
    for device in status.copy_devices:
        parts = [f"copies by device {device.device}", device.state]
        if device.state == "serving":
            parts.append(f"{device.memories} memories, {device.jobs} jobs")
        if device.device != "host" and device.state == "serving":
            of = format_bytes(status.pool.data_bytes)
            parts.append(f"pinned {format_bytes(device.pinned_bytes)} of {of}")
        if device.restarts:
            parts.append(f"begun anew {device.restarts} times")
        yield "  ".join(parts)
        if device.problem:
            yield f"  {device.problem}"


def _tenant(session: SessionStatus) -> str:
    return f"tenant {session.tenant}" if session.tenant else "default tenant"


def by_engine(sessions: Iterable[SessionStatus]) -> dict[str, list[SessionStatus]]:
    """Put the sessions of one engine together, in the order in which the first of each attached."""
    engines: dict[str, list[SessionStatus]] = {}
    for session in sessions:
        engines.setdefault(session.engine_id, []).append(session)
    return engines


def attached(sessions: Sequence[SessionStatus]) -> str:
    """Say which sessions of one engine are open: scheduler + ranks 0-3."""
    ranks = sorted(session.rank for session in sessions if session.role == "worker")
    words = ["scheduler"] if len(ranks) < len(sessions) else []
    if ranks:
        words.append(f"{'rank' if len(ranks) == 1 else 'ranks'} {ranges(ranks)}")
    return " + ".join(words)


def ranges(numbers: Sequence[int]) -> str:
    """Write ascending numbers with their runs drawn together: 0-3,5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def printable(text: str) -> str:
    """Replace what a terminal would obey instead of showing it: names come from engines."""
    return "".join(char if char.isprintable() else "?" for char in text)


def shorten(text: str, width: int) -> str:
    """Cut in the middle: names that engines and models have differ at their ends."""
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}…{text[-tail:]}"


def _leases(status: GetStatusResponse) -> Table:
    table = _table("leases", "count", "oldest")
    for lease in status.leases:
        table.add_row(
            lease.kind, str(lease.count), format_seconds(lease.oldest_age_seconds) if lease.count else "-"
        )
    return table


def _counts(status: GetStatusResponse) -> str:
    looked_up = sum(status.lookup_keys.values())
    if looked_up:
        hits = status.lookup_keys.get("hit", 0)
        lines = [f"lookups   {hits / looked_up:.1%} hits of {looked_up} keys ({_words(status.lookup_keys)})"]
    else:
        lines = ["lookups   none yet"]
    lines.append(f"evicted   {_words(status.evictions)}")
    lines.append(f"refused   {_words(status.store_refused)}")
    if status.checksum_failures:
        lines.append(f"checksum failures   {status.checksum_failures}")
    return "\n".join(lines)


def _words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()) if count) or "none"
