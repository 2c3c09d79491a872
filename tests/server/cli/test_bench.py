"""`kvtier bench` as an operator runs it: small, against daemons of its own and one that runs."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from kvtier_client.bench.figures import percentile
from kvtier_client.bench.traces import TraceError, load_trace, possible_hits, synthetic_trace
from kvtier_ops.directory import default_pool_directory

from ...conftest import StartDaemon
from ...daemon_process import DaemonProcess, child_environment, state_of, wait_until
from ...terminal import Terminal
from .conftest import Kvtier
from .test_json import check


def own_pools() -> set[str]:
    here = default_pool_directory("bench-").parent
    return {entry for entry in os.listdir(here) if f"kvtier-{os.getuid()}-bench-" in entry}


def test_lookup_stands_beside_a_bare_round_trip(kvtier: Kvtier) -> None:
    before = own_pools()
    done = kvtier("bench", "lookup", "--keys", "8,64", "--calls", "10", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    rows = check("bench_lookup", done.stdout)["rows"]
    assert [row["name"] for row in rows] == ["lookup 8", "lookup 8 leased", "lookup 64", "lookup 64 leased"]
    for row in rows:
        assert row["samples"] == 10
        assert 0 < row["p50_ms"] <= row["p99_ms"]
        assert row["ratio"] == pytest.approx(row["p50_ms"] / row["floor_p50_ms"], rel=0.01)
    assert own_pools() <= before, "its daemon's pool is gone"


def test_copy_stands_beside_a_plain_copy(kvtier: Kvtier) -> None:
    sizes = ("--bytes", "4MiB", "--chunk-bytes", "512KiB")
    done = kvtier("bench", "copy", *sizes, "--rounds", "1", "-o", "json")
    assert (done.returncode, done.stderr) == (0, "")
    copied = check("bench_copy", done.stdout)
    assert copied["chunks"] == 8
    assert [row["name"] for row in copied["rows"]] == [
        "store", "store with checksum", "load", "load with checksum",
    ]  # fmt: skip


def test_replay_hits_what_an_unbounded_pool_must_and_repeats_itself(kvtier: Kvtier) -> None:
    options = ("bench", "replay", "--requests", "60", "--pool-share", "1", "--seed", "7", "--json")
    first, second = (check("bench_replay", kvtier(*options).stdout) for _ in range(2))
    assert first["hit_share"] == first["possible_hit_share"] > 0.3
    assert first["hits"] == possible_hits(synthetic_trace(7, 60))
    assert (first["hits"], first["stored_chunks"]) == (second["hits"], second["stored_chunks"])


def test_replay_plays_a_file(kvtier: Kvtier, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [{"timestamp": 0, "hash_ids": [0, 1, 2]}, {"hash_ids": [0, 1, 5]}, {"hash_ids": [9]}]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = kvtier("bench", "replay", "--trace", str(trace))
    assert told.returncode == 0
    assert "3 requests, 7 chunks" in told.stdout
    assert "hits       2 chunks" in told.stdout
    assert "every loaded byte was right" in told.stdout
    assert max(map(len, told.stdout.splitlines())) <= 80 + len(str(trace))


def test_a_daemon_that_runs_is_measured_and_keeps_nothing(kvtier: Kvtier, daemon: DaemonProcess) -> None:
    before = daemon.status()
    done = kvtier("bench", "lookup", "--keys", "16", "--calls", "5", "--address", daemon.address, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert check("bench_lookup", done.stdout)["daemon"] == daemon.address
    after = daemon.status()
    assert sum(after.lookup_keys.values()) > sum(before.lookup_keys.values())
    assert after.tiers[0].chunks == before.tiers[0].chunks
    wait_until(lambda: not daemon.status().sessions, "its sessions have ended")


def test_more_than_a_daemon_has_room_for_is_said(kvtier: Kvtier, start_daemon: StartDaemon) -> None:
    address = start_daemon(pool_bytes="16MiB").address
    done = kvtier("bench", "copy", "--bytes", "64MiB", "--chunk-bytes", "256KiB", "--address", address)
    assert (done.returncode, done.stdout) == (1, "")
    assert "copy less: --bytes" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lookup", "--keys", "0"], "from 1 to 8192"),
        (["lookup", "--keys", "9000"], "from 1 to 8192"),
        (["lookup", "--calls", "-1"], "whole number"),
        (["copy", "--bytes", "4G"], "4GiB"),
        (["copy", "--chunk-bytes", "100KiB"], "multiple of 128KiB"),
        (["replay", "--pool-share", "2"], "at most 1"),
        (["replay", "--seed", "x"], "whole number"),
        (["lookup", "--address", "nonsense"], "host:port"),
        (["disk"], "invalid choice"),
        ([], "required"),
    ],
)
def test_a_mistake_in_the_call_is_exit_2(kvtier: Kvtier, arguments: list[str], words: str) -> None:
    refused = kvtier("bench", *arguments)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert words in refused.stderr


def test_without_a_daemon_at_the_address_it_says_so(kvtier: Kvtier, tmp_path: Path) -> None:
    refused = kvtier("bench", "lookup", "--address", f"unix://{tmp_path}/none.sock")
    assert refused.returncode == 2
    assert "kvtier serve" in refused.stderr


def test_more_chunks_than_a_call_takes_are_refused_before_anything_is_started(kvtier: Kvtier) -> None:
    refused = kvtier("bench", "copy", "--bytes", "2GiB", "--chunk-bytes", "128KiB")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "8192" in refused.stderr
    assert "--chunk-bytes" in refused.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}\n", ":1: is no request"),
        ('{"hash_ids": [1]}\nnonsense\n', ":2: is no request"),
        ('{"hash_ids": [1, "2"]}\n', ":1: hash_ids is no list"),
        ('{"hash_ids": [-1]}\n', ":1: hash_ids is no list"),
        ('{"hash_ids": [true]}\n', ":1: hash_ids is no list"),
        ("", "has no request"),
    ],
)
def test_a_file_that_is_no_trace_is_refused_with_its_line(
    kvtier: Kvtier, tmp_path: Path, text: str, words: str
) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(text)
    refused = kvtier("bench", "replay", "--trace", str(trace))
    assert (refused.returncode, refused.stdout) == (1, "")
    assert words in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_trace_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot be read"):
        load_trace(tmp_path / "none.jsonl")


def test_a_seed_makes_the_same_trace_and_another_seed_another() -> None:
    assert synthetic_trace(1, 50) == synthetic_trace(1, 50) != synthetic_trace(2, 50)


def test_a_percentile_is_a_value_that_was_measured() -> None:
    values = [float(number) for number in range(1, 101)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile([7.0], 0.99)) == (50, 99, 7)


@pytest.mark.parametrize("end", ["Ctrl-C", "SIGTERM"])
def test_an_interrupted_bench_leaves_no_daemon_and_no_pool(end: str) -> None:
    before = own_pools()
    command = [sys.executable, "-m", "kvtier_server", "bench", "lookup", "--calls", "1000000"]
    with Terminal(command, child_environment()) as terminal:
        terminal.wait_for(lambda text: "lookups  [" in text, "a progress bar after a second")
        (pool,) = own_pools() - before
        daemons = [
            int(pid)
            for pid in os.listdir("/proc")
            if pid.isdecimal() and pool.encode().split(b"-", 2)[2] in _command_line(int(pid))
        ]
        assert daemons
        if end == "Ctrl-C":
            terminal.press("\x03")
        else:
            terminal.process.send_signal(signal.SIGTERM)
        assert terminal.wait() == 130
        assert own_pools() <= before
        assert all(state_of(pid) in ("", "Z") for pid in daemons)
        assert "Traceback" not in "\n".join(terminal.lines())


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
