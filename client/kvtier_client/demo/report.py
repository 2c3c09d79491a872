"""The demo's result: a table of runs and a list of checks, for people and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict

from kvtier_client.demo.scenario import Check, Run, Settings, hit_rate

HEADINGS = (
    "run", "requests", "prompt tok", "device tok", "loaded tok", "hit rate",
    "stored", "loaded", "GB/s", "ttft mean", "ttft p50", "wall",
)  # fmt: skip

LEGEND = """\
device tok  prompt tokens that were still in the engine's own cache
hit rate    loaded tokens / tokens in full chunks that were not in its own cache
GB/s        how fast loads were copied and verified
ttft        time to the first token, waiting for the other conversations of the turn included"""


def table(runs: Sequence[Run]) -> str:
    """Return the runs as a table with a legend."""
    rows = [HEADINGS, *(_row(run) for run in runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join([*lines, "", LEGEND])


def check_lines(checks: Sequence[Check]) -> str:
    """Return one line a check."""
    return "\n".join(f"{'PASS' if check.ok else 'FAIL'}  {check.what}: {check.found}" for check in checks)


def to_json(settings: Settings, runs: Sequence[Run], checks: Sequence[Check]) -> dict[str, object]:
    """Return everything: settings, a summary a run with its answers, the checks."""
    return {
        "ok": all(check.ok for check in checks),
        "settings": asdict(settings),
        "runs": [
            {
                **summary(run),
                "counters": dict(run.state.counters),
                "answers": [asdict(answer) for answer in run.answers],
            }
            for run in runs
        ],
        "checks": [asdict(check) for check in checks],
    }


def summary(run: Run) -> dict[str, str | int | float]:
    """Return the figures of one run, in base units."""
    state = run.state
    first_tokens = [answer.first_token_s for answer in run.answers] or [0.0]
    return {
        "name": run.name,
        "requests": len(run.answers),
        "prompt_tokens": sum(answer.prompt_tokens for answer in run.answers),
        "device_tokens": sum(answer.device_tokens for answer in run.answers),
        "loaded_tokens": sum(answer.loaded_tokens for answer in run.answers),
        "missing_tokens": sum(answer.missing_tokens for answer in run.answers),
        "computed_tokens": sum(answer.computed_tokens for answer in run.answers),
        "failed_loads": sum(answer.failed_loads for answer in run.answers),
        "hit_rate": hit_rate(run),
        "stored_bytes": state.stored_bytes,
        "loaded_bytes": state.loaded_bytes,
        "load_bytes_per_s": state.loaded_bytes / state.load_s if state.load_s else 0.0,
        "first_token_mean_s": statistics.fmean(first_tokens),
        "first_token_p50_s": statistics.median(first_tokens),
        "wall_s": run.wall_s,
    }


def _row(run: Run) -> tuple[str, ...]:
    figures = summary(run)
    offloads = run.state.counters != {}
    return (
        run.name,
        f"{figures['requests']}",
        f"{figures['prompt_tokens']}",
        f"{figures['device_tokens']}",
        f"{figures['loaded_tokens']}" if offloads else "-",
        f"{figures['hit_rate']:.1%}" if offloads else "-",
        _megabytes(run.state.stored_bytes) if offloads else "-",
        _megabytes(run.state.loaded_bytes) if offloads else "-",
        f"{float(figures['load_bytes_per_s']) / 1e9:.1f}" if run.state.load_s else "-",
        f"{float(figures['first_token_mean_s']) * 1000:.0f} ms",
        f"{float(figures['first_token_p50_s']) * 1000:.0f} ms",
        f"{run.wall_s:.1f} s",
    )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
