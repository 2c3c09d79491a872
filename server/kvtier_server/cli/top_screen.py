"""The picture that `kvtier top` draws: lines of text, each cut to the terminal's width.

Owns words, columns and colours; asks nothing and keeps nothing. Made for 80 columns and 24 lines.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.text import Text

from kvtier.v1.admin_pb2 import GetStatusResponse, LeaseStatus, TierStatus
from kvtier_server.cli.status_table import STATE_STYLES, attached, by_engine, printable, shorten
from kvtier_server.cli.top_figures import Rates, copied_bytes, hit_rate, rates
from kvtier_server.units import format_bytes, format_seconds

MIN_COLUMNS = 40
BAR_PARTS = (("used", "#", "green"), ("reserved", "=", "cyan"), ("quarantined", "!", "red"))
"""What a tier's bar is made of, from the left; the rest is free."""
LABEL_COLUMNS = 12
MAX_HINTS = 4
FEWEST_ENGINES = 2
UNKNOWN = "-"


def screen(
    old: GetStatusResponse | None,
    new: GetStatusResponse,
    hints: Sequence[str],
    *,
    address: str,
    columns: int,
    rows: int | None,
) -> list[Text]:
    """Draw one picture. `rows`: the lines there are; None = as many as it takes."""
    now = rates(old, new)
    columns = max(columns, MIN_COLUMNS)
    lines = [
        _title(new, address, columns),
        Text(""),
        *_bars(new, columns),
        Text(""),
        *_work(new, now),
        Text(""),
        *_tiers(new, now),
        Text(""),
    ]
    told = [Text(f"! {hint}", "yellow") for hint in hints]
    room = (
        None if rows is None else max(rows - len(lines) - len(told[:MAX_HINTS]) - bool(told), FEWEST_ENGINES)
    )
    lines += _engines(new, columns, room)
    if told:
        lines += [Text(""), *(told if rows is None else told[:MAX_HINTS])]
    return [fitted(line, columns) for line in lines[:rows]]


def fitted(line: Text, columns: int) -> Text:
    """Cut a line to the width, so that none wraps, and leave nothing in it that a terminal would obey."""
    line.plain = printable(line.plain)
    line.truncate(columns, overflow="ellipsis")
    return line


def waiting(address: str, reason: str, since_s: float, columns: int) -> list[Text]:
    """Draw what stands there while no daemon answers."""
    return [
        fitted(Text.assemble("kvtier top  ", ("no daemon, waiting", "yellow")), columns),
        Text(""),
        fitted(Text(f"address  {address}"), columns),
        fitted(Text(f"for      {format_seconds(since_s)}"), columns),
        Text(""),
        # What to type stands behind a semicolon: on a line of its own.
        *(fitted(Text(line), columns) for part in reason.split("; ") for line in _folded(part, columns)),
    ]


def _folded(text: str, columns: int) -> Iterator[str]:
    line = ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > columns:
            yield line
            line = ""
        line = f"{line} {word}".lstrip()
    yield line


def _title(status: GetStatusResponse, address: str, columns: int) -> Text:
    title = Text.assemble(
        f"kvtier {status.version}  ",
        (status.state, STATE_STYLES.get(status.state, "red")),
        f"  up {format_seconds(status.uptime_seconds)}",
    )
    left = columns - title.cell_len - 2
    title.append("  " + shorten(address, left).rjust(left) if left > 8 else "")
    return title


def _bars(status: GetStatusResponse, columns: int) -> Iterator[Text]:
    for tier in status.tiers:
        is_pool = tier is status.tiers[0]
        name = f"pool {status.pool.name}" if is_pool else tier.name
        if is_pool and len(name) > LABEL_COLUMNS:
            name = "pool"
        label = f"{shorten(name, LABEL_COLUMNS):<{LABEL_COLUMNS}} "
        after = f" {format_bytes(tier.capacity_bytes):>8} {_share(tier.used_bytes, tier.capacity_bytes):>4}"
        yield Text.assemble(label, _bar(tier, columns - len(label) - len(after) - 2), after)
    if status.tiers:
        yield _legend(status.tiers[0], status)


def _bar(tier: TierStatus, width: int) -> Text:
    """Draw a tier's bytes by state. What is there at all gets a cell: one quarantined slot must be seen."""
    bar = Text("[")
    room = width
    for state, sign, style in BAR_PARTS:
        num_bytes = getattr(tier, f"{state}_bytes")
        cells = min(max(round(width * num_bytes / max(tier.capacity_bytes, 1)), int(num_bytes > 0)), room)
        bar.append(sign * cells, style)
        room -= cells
    bar.append("." * room + "]", "dim")
    return bar


def _legend(pool: TierStatus, status: GetStatusResponse) -> Text:
    free = max(pool.usable_bytes - pool.used_bytes - pool.reserved_bytes, 0)
    parts = [f"# {format_bytes(pool.used_bytes)} published"]
    if pool.reserved_bytes:
        parts.append(f"= {format_bytes(pool.reserved_bytes)} reserved")
    if pool.quarantined_bytes:  # with the others' words it would not fit
        parts = [part.rpartition(" ")[0] for part in parts]
        parts.append(f"! {format_bytes(pool.quarantined_bytes)} quarantined")
    parts.append(f". {format_bytes(free)} free")
    label = shorten(status.pool.policy, LABEL_COLUMNS)
    return Text(f"{label:<{LABEL_COLUMNS}} {'  '.join(parts)}", "dim")


def _work(status: GetStatusResponse, now: Rates | None) -> Iterator[Text]:
    keys = sum(status.lookup_keys.values())
    yield Text(f"{'':10}{'now':>24}{'since start':>26}", "dim")
    yield _row(
        "lookups",
        f"{_number(now.lookup_keys_per_s)} keys/s" if now else UNKNOWN,
        f"{_number(keys)} keys",
    )
    yield _row("hit rate", _percent(now.hit_rate if now else None), _percent(hit_rate(status.lookup_keys)))
    for direction in ("load", "store"):
        rate = getattr(now, f"{direction}_bytes_per_s") if now else None
        yield _row(
            direction,
            f"{rate / 1e9:.2f} GB/s" if rate is not None else UNKNOWN,
            f"{copied_bytes(status, direction) / 1e9:.2f} GB",
        )
    yield _row(
        "evicted",
        f"{_number(now.evictions_per_s)} chunks/s" if now else UNKNOWN,
        f"{_number(sum(status.evictions.values()))} chunks",
    )
    yield _row(
        "refused",
        f"{_number(now.refused_per_s)} stores/s" if now else UNKNOWN,
        f"{_number(sum(status.store_refused.values()))} stores",
    )
    held = [_lease(lease) for lease in status.leases if lease.count]
    yield Text(f"{'leases':<10}{'  '.join(held) or 'none'}")


def _row(name: str, now: str, ever: str) -> Text:
    return Text(f"{name:<10}{now:>24}{ever:>26}")


def _lease(lease: LeaseStatus) -> str:
    return f"{lease.count} {lease.kind} (oldest {format_seconds(lease.oldest_age_seconds)})"


def _tiers(status: GetStatusResponse, now: Rates | None) -> Iterator[Text]:
    yield Text(
        f"{'tier':<12}{'chunks':>9}{'pinned':>8}{'free':>9}{'hit tok/s':>11}{'down MB/s':>11}{'up MB/s':>9}"
        f"{'queued':>9}",
        "dim",
    )
    for tier in status.tiers:
        rate = now.tiers.get(tier.name) if now else None
        is_pool = tier is status.tiers[0]
        yield Text(
            f"{shorten('pool' if is_pool else tier.name, 12):<12}{_number(tier.chunks):>9}"
            f"{_number(tier.pinned_chunks) if is_pool else UNKNOWN:>8}"
            f"{_number(tier.free_slots) if is_pool else UNKNOWN:>9}"
            f"{_number(rate.hit_tokens_per_s) if rate else UNKNOWN:>11}"
            f"{UNKNOWN if is_pool or rate is None else f'{rate.down_bytes_per_s / 1e6:.1f}':>11}"
            f"{UNKNOWN if is_pool or rate is None else f'{rate.up_bytes_per_s / 1e6:.1f}':>9}"
            f"{UNKNOWN if is_pool else format_bytes(tier.queued_bytes):>9}",
            "" if tier.health in ("", "ok") else "red",
        )


def _engines(status: GetStatusResponse, columns: int, room: int | None) -> Iterator[Text]:
    engines = list(by_engine(status.sessions).items())
    if not engines:
        return
    name = min(20 + max(columns - 80, 0), 48)
    yield Text(f"{'engine':<{name}} {'attached':<20}{'for':>8}{'pinned':>8}{'credits':>8}  namespace", "dim")
    shown = engines if room is None or len(engines) + 1 <= room else engines[: max(room - 2, 1)]
    for engine_id, sessions in shown:
        age = format_seconds(max(session.age_seconds for session in sessions))
        yield Text(
            f"{shorten(engine_id, name):<{name}} {shorten(attached(sessions), 20):<20}{age:>8}"
            f"{_number(max(session.pinned_chunks for session in sessions)):>8}"
            f"{_number(max(session.credits for session in sessions)):>8}  {sessions[0].namespace}"
        )
    if len(shown) < len(engines):
        yield Text(f"and {len(engines) - len(shown)} more: kvtier status", "dim")


def _number(value: float) -> str:
    """Write a count or a rate in at most seven columns: 12.3, 4,567, 89.0k, 1.2M."""
    if value == 0:
        return "0"
    if value < 100 and value != int(value):
        return f"{value:.1f}"
    if value < 10_000:
        return f"{value:,.0f}"
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.1f}{unit}"
    raise AssertionError(value)


def _percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{share:.1%}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else UNKNOWN
