"""The mooncake tier without Mooncake: what becomes of its answers, names, parameters, ports and processes."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvtier_ops.namespace import SpaceName
from kvtier_server.secondary.base import (
    ClearJob,
    JobKind,
    OffloadingSpec,
    Outcome,
    Presence,
    TierChunk,
    TierError,
    TierJob,
)
from kvtier_server.secondary.conformance import (
    GEOMETRY,
    SLOT_BYTES,
    SPACE,
    Bench,
    TierBench,
    TierConformance,
    chunk_bytes,
    key_of,
    parts_of,
    until,
)
from kvtier_server.secondary.mooncake import codes, wire
from kvtier_server.secondary.mooncake.known import Entry, Known
from kvtier_server.secondary.mooncake.listeners import attach
from kvtier_server.secondary.mooncake.names import beat_name, object_name, space_prefix
from kvtier_server.secondary.mooncake.parameters import MooncakeParameters
from kvtier_server.secondary.mooncake.process import Helper
from kvtier_server.secondary.mooncake.tier import MooncakeTier
from kvtier_server.secondary.mooncake.wire import HEADER_BYTES, Operation
from kvtier_server.secondary.parameters import ParameterErrors, read_parameters

from .memory_store import MemoryStore

NEEDED = {"master": "127.0.0.1:50051", "segment": "64MiB"}
DOUBLE = Path(__file__).parent / "mooncake_double"


class InMemory(TierBench):
    """The tier over a store in memory."""

    def make_tier(
        self, spec: OffloadingSpec, pool: memoryview, on_finished: Callable[[], None]
    ) -> MooncakeTier:
        parameters = MooncakeParameters.model_validate({**NEEDED, "heartbeat": "100ms"})
        self.store = MemoryStore(pool, parameters.readers + parameters.writers + 1)
        tier = MooncakeTier(spec, pool, "mooncake", on_finished, parameters, self.store)
        until(lambda: not tier.stats().problem, "the tier has looked at its store")
        return tier


class TestContract(InMemory, TierConformance):
    """The contract."""


class TestAnswers(InMemory):
    """What the store returns, and what the tier makes of it."""

    @pytest.mark.parametrize("code", [codes.NO_SPACE, codes.OVER_QUOTA])
    def test_a_put_without_room_is_refused_and_counted(self, code: int) -> None:
        with self.bench() as bench:
            self.store.answers["put"] = code
            bench.fill(0)
            result = bench.run(JobKind.STORE, bench.hashed(bench.chunk(1, slot=0)))
            assert result.outcomes == (Outcome.REFUSED,)
            assert bench.tier.lookup(SPACE, [key_of(1)]) == [Presence.UNKNOWN]
            assert dict(bench.tier.stats().counts) == {"no_space": 1}
            assert bench.tier.stats().problem == ""

    def test_a_put_of_what_another_node_has_stored_is_done(self) -> None:
        with self.bench() as bench:
            self.store.answers["put"] = codes.EXISTS
            bench.fill(0)
            result = bench.run(JobKind.STORE, bench.hashed(bench.chunk(1, slot=0)))
            assert result.outcomes == (Outcome.DONE,)

    @pytest.mark.parametrize("call", ["put", "get"])
    @pytest.mark.parametrize("code", [codes.RPC_FAILED, codes.RPC_TIMEOUT, codes.LEASE_EXPIRED, -1, -9_999])
    def test_an_error_fails_the_chunk_and_forgets_nothing(self, call: str, code: int) -> None:
        with self.bench() as bench:
            bench.store(1)
            self.store.answers[call] = code
            number = 2 if call == "put" else 1
            bench.fill(3)
            chunk = bench.chunk(number, slot=3)
            kind = JobKind.STORE if call == "put" else JobKind.LOAD
            result = bench.run(kind, bench.hashed(chunk) if call == "put" else chunk)
            assert result.outcomes == (Outcome.FAILED,)
            assert bench.tier.lookup(SPACE, [key_of(1)]) == [Presence.YES]

    @pytest.mark.parametrize("code", [codes.NOT_FOUND, codes.NOT_READY, 0])
    def test_a_chunk_that_is_gone_is_missing_and_told(self, code: int) -> None:
        with self.bench() as bench:
            bench.store(1)
            self.store.answers["get"] = code
            assert bench.run(JobKind.LOAD, bench.chunk(1, slot=3)).outcomes == (Outcome.MISSING,)
            assert [(r.keys, r.reason) for r in bench.tier.get_removed()] == [((key_of(1),), "missing")]
            assert bench.tier.lookup(SPACE, [key_of(1)]) == [Presence.UNKNOWN]

    @pytest.mark.parametrize("position", [0, 100, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 5_000, -1])
    def test_one_flipped_bit_anywhere_is_found_and_the_object_removed(self, position: int) -> None:
        with self.bench() as bench:
            bench.store(1)
            ((name, data),) = self.store.objects.items()
            changed = bytearray(data)
            changed[position] ^= 0x04
            self.store.objects[name] = bytes(changed)
            assert bench.run(JobKind.LOAD, bench.chunk(1, slot=3)).outcomes == (Outcome.CORRUPT,)
            assert [(r.keys, r.reason) for r in bench.tier.get_removed()] == [((key_of(1),), "corrupt")]
            assert not self.store.objects

    @pytest.mark.parametrize("length", [1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 512, -1])
    def test_an_object_of_another_length_is_corrupt(self, length: int) -> None:
        with self.bench() as bench:
            bench.store(1)
            ((name, data),) = self.store.objects.items()
            self.store.objects[name] = data[:length] if length > 0 else data + b"more"
            if 0 < length < HEADER_BYTES:
                self.store.answers["get"] = length  # what a store that read less would say
            assert bench.run(JobKind.LOAD, bench.chunk(1, slot=3)).outcomes == (Outcome.CORRUPT,)

    def test_another_chunks_object_under_its_name_is_not_served(self) -> None:
        with self.bench() as bench:
            bench.store(1)
            bench.store(2, slot=1)
            one, other = self.store.objects
            self.store.objects[one] = self.store.objects[other]
            assert bench.run(JobKind.LOAD, bench.chunk(1, slot=3)).outcomes == (Outcome.CORRUPT,)
            assert bench.run(JobKind.LOAD, bench.chunk(2, slot=3)).outcomes == (Outcome.DONE,)

    def test_what_others_stored_is_found_by_a_probe_and_loaded(self) -> None:
        with self.bench() as first:
            data = first.store(1)
            objects = dict(self.store.objects)
            with self.bench() as bench:
                self.store.objects = objects
                assert bench.tier.lookup(SPACE, [key_of(1)]) == [Presence.UNKNOWN]
                probed = bench.run(JobKind.PROBE, bench.chunk(1, slot=0), bench.chunk(2, slot=0))
                assert probed.outcomes == (Outcome.DONE, Outcome.MISSING)
                assert bench.tier.lookup(SPACE, [key_of(1)]) == [Presence.YES]
                assert bench.run(JobKind.LOAD, bench.chunk(1, slot=3)).outcomes == (Outcome.DONE,)
                assert parts_of(bench.slot(3)) == parts_of(data)

    def test_a_store_that_lies_about_what_it_has_is_a_miss(self) -> None:
        with self.bench() as bench:
            self.store.answers["exists"] = 1
            assert bench.run(JobKind.PROBE, bench.chunk(1, slot=0)).outcomes == (Outcome.DONE,)
            assert bench.run(JobKind.LOAD, bench.chunk(1, slot=3)).outcomes == (Outcome.MISSING,)

    def test_while_the_store_is_away_nothing_is_taken_or_asked_and_it_comes_back(self) -> None:
        with self.bench() as bench:
            bench.store(1)
            self.store.problem = "the master is away"
            until(lambda: bench.tier.stats().problem == "the master is away", "it is noticed")
            job = TierJob(99, JobKind.LOAD, (bench.chunk(1, slot=3),))
            assert bench.tier.lookup(SPACE, [key_of(1), key_of(2)]) == [Presence.NO, Presence.NO]
            assert not bench.tier.submit_load(job)
            assert not bench.tier.submit_probe(job)
            assert not bench.tier.submit_store(job)
            self.store.problem = ""
            until(lambda: bench.tier.stats().problem == "", "it is noticed")
            assert bench.run(JobKind.LOAD, bench.chunk(1, slot=3)).outcomes == (Outcome.DONE,)

    def test_after_errors_in_a_row_it_is_left_alone_until_a_trial_of_its_own_works(self) -> None:
        with self.bench() as bench:
            bench.store(1)
            self.store.fails = True
            for _ in range(5):
                assert bench.run(JobKind.LOAD, bench.chunk(1, slot=3)).outcomes == (Outcome.FAILED,)
            assert "left alone" in bench.tier.stats().problem
            tried = self.store.calls["put"]
            until(lambda: self.store.calls["put"] > tried + 1, "it is tried")
            assert "left alone" in bench.tier.stats().problem
            self.store.fails = False
            until(lambda: bench.tier.stats().problem == "", "it is used again")
            assert len(self.store.objects) == 1, "a trial leaves nothing behind"
            assert bench.run(JobKind.LOAD, bench.chunk(1, slot=3)).outcomes == (Outcome.DONE,)

    def test_a_store_that_has_been_away_is_used_at_once_when_it_is_back(self) -> None:
        with self.bench() as bench:
            bench.store(1)
            self.store.fails = True
            for _ in range(5):
                assert bench.run(JobKind.LOAD, bench.chunk(1, slot=3)).outcomes == (Outcome.FAILED,)
            self.store.problem = "away"
            until(lambda: bench.tier.stats().problem == "away", "it is noticed")
            self.store.fails, self.store.problem = False, ""
            until(lambda: bench.tier.stats().problem == "", "it is used again")
            assert bench.run(JobKind.LOAD, bench.chunk(1, slot=3)).outcomes == (Outcome.DONE,)

    def test_what_cannot_be_removed_is_not_told_as_gone(self) -> None:
        with self.bench() as bench:
            bench.store(1)
            self.store.answers["remove"] = codes.RPC_FAILED
            result = bench.clear(ClearJob(1))
            assert (result.num_removed, result.num_kept) == (0, 1)
            assert not bench.tier.get_removed()
            assert bench.tier.lookup(SPACE, [key_of(1)]) == [Presence.YES]


# Names


def chunk(**changes: Any) -> TierChunk:
    return replace(TierChunk(SPACE, b"k" * 36, GEOMETRY, 3_000, 3), **changes)


def test_every_field_makes_another_name_of_letters_that_any_store_takes() -> None:
    others = [
        chunk(),
        chunk(key=b"k" * 35),
        chunk(key=b"k" * 35 + b"\0"),
        chunk(geometry=b"another layout.."),
        chunk(part_bytes=3_064),
        chunk(num_parts=2),
        chunk(space=SpaceName("m" * 64, "tenant", 7)),
        chunk(space=SpaceName("n" * 64, "", 7)),
        chunk(space=SpaceName("n" * 64, "tenant", 8)),
        chunk(space=SpaceName("n" * 63, "ntenant", 7)),
    ]
    names = [object_name(each) for each in others]
    assert len({*names, beat_name()}) == len(names) + 1
    for name in [*names, beat_name()]:
        assert re.fullmatch(rf"[a-z0-9-]{{{wire.NAME_BYTES}}}", name), name


def test_a_name_depends_on_nothing_but_what_the_chunk_is() -> None:
    assert object_name(chunk()) == object_name(chunk(offset=SLOT_BYTES, checksums=(1, 2, 3)))
    assert object_name(chunk()).startswith(space_prefix(SPACE))


def test_messages_are_read_as_they_were_written() -> None:
    request = wire.Request(4_000_000_000, Operation.GET, object_name(chunk()), 127, 1 << 40, 1 << 33)
    assert wire.unpack_request(wire.pack_request(request)) == request
    assert wire.unpack_answer(wire.pack_answer(7, -900)) == (7, -900)
    assert max(len(wire.pack_request(request)), len(wire.pack_answer(7, 0))) <= wire.MAX_BYTES


# What is known


def test_what_was_heard_of_longest_ago_is_forgotten_first_and_counted_out() -> None:
    known = Known(max_known=2)
    for number in (1, 2, 1, 3):
        known.add(SPACE, key_of(number), Entry(f"o{number}", 100 + number))
    assert known.knows(SPACE, [key_of(number) for number in (1, 2, 3)]) == [True, False, True]
    assert (len(known), known.num_bytes) == (2, 204)
    assert known.remove(SPACE, key_of(1), "missing")
    assert not known.remove(SPACE, key_of(1), "missing")
    assert [entry.object_name for _, _, entry in known.entries(SPACE.__eq__)] == ["o3"]
    assert known.entries(SpaceName("", "", 0).__eq__) == []
    assert known.holdings.chunks_from(0, 10) == ([(SPACE, key_of(3))], None)
    changes = known.holdings.get_changes(10)
    assert changes is not None
    assert [(change.is_held, change.key, change.reason) for change in changes] == [
        (True, key_of(1), "found"),
        (True, key_of(2), "found"),
        (True, key_of(3), "found"),
        (False, key_of(2), "forgotten"),
        (False, key_of(1), "missing"),
    ]


def test_what_this_daemon_stored_stays_its_own_when_it_is_heard_of_again() -> None:
    known = Known()
    for is_own in (True, False):
        known.add(SPACE, key_of(1), Entry("o1", 100, is_own))
    known.add(SPACE, key_of(2), Entry("o2", 100))
    assert [entry.is_own for _, _, entry in known.entries(SPACE.__eq__)] == [True, False]


# Parameters


def test_two_keys_are_enough() -> None:
    parameters = read_parameters(MooncakeParameters, NEEDED)
    assert isinstance(parameters, MooncakeParameters)
    assert (parameters.segment, parameters.metadata, parameters.protocol) == (64 << 20, "P2PHANDSHAKE", "tcp")


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("master", "10.0.0.1", "is not an address; write host:port"),
        ("master", "10.0.0.1:0", "is not an address"),
        ("master", "10.0.0.1:65536", "is not an address"),
        ("master", "http://10.0.0.1:50051", "is not an address"),
        ("segment", "15MiB", 'is too small; write "16MiB" or more'),
        ("metadata", "10.0.0.1:8080", "is no metadata server"),
        ("local_hostname", "0.0.0.0", "is no address that other nodes can reach"),
        ("local_hostname", "node:1", "without a port"),
        ("protocol", "udp", "'tcp' or 'rdma'"),
        ("replicas", 17, "less than or equal to 16"),
        ("replicas", True, "is not a number"),
        ("readers", 65, "less than or equal to 64"),
        ("buffer", "1KiB", "greater than or equal to"),
        ("timeout", "10ms", "greater than or equal to"),
        ("timeout", "11s", "timeout is longer than deadline"),
        ("heartbeat", "1h", "less than or equal to"),
        ("masters", "a:1", "did you mean master?"),
    ],
)
def test_what_is_wrong_is_said(key: str, value: object, problem: str) -> None:
    with pytest.raises(ParameterErrors, match=re.escape(problem)):
        read_parameters(MooncakeParameters, {**NEEDED, key: value})


def test_without_the_package_the_error_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TierError, match=re.escape("pip install '.[server,mooncake]'")):
        MooncakeTier(
            OffloadingSpec(0, 4096, 128),
            memoryview(b""),
            "mooncake",
            lambda: None,
            MooncakeParameters.model_validate(NEEDED),
        )


# Ports


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@pytest.mark.parametrize("address", ["127.0.0.1", ""])
def test_a_filtered_listener_is_reached_at_its_address_only(
    family: socket.AddressFamily, address: str
) -> None:
    with socket.socket(family) as listener:
        listener.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", 0))
        attach(listener, address)
        listener.listen()
        port = listener.getsockname()[1]
        for target in ("127.0.0.1", "127.0.0.2"):
            if target == address:
                socket.create_connection((target, port), 5.0).close()
            else:
                with pytest.raises(TimeoutError):
                    socket.create_connection((target, port), 0.3)


# The helper process, with a double of Mooncake's client in it


class OnDouble(TierBench):
    """The real helper processes, around a double of Mooncake's client that keeps objects in a directory."""

    @pytest.fixture(autouse=True)
    def double(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        roots = [str(Path(root).resolve()) for root in ("proto", "ops", "server")]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(DOUBLE), *roots]))
        monkeypatch.setenv("DOUBLE_DIRECTORY", str(tmp_path))
        monkeypatch.syspath_prepend(str(DOUBLE))
        self.directory = tmp_path
        with socket.create_server(("127.0.0.1", 0)) as master:
            self.master = f"127.0.0.1:{master.getsockname()[1]}"
            yield

    def make_tier(
        self, spec: OffloadingSpec, pool: memoryview, on_finished: Callable[[], None]
    ) -> MooncakeTier:
        parameters = MooncakeParameters.model_validate(
            {"master": self.master, "segment": 0, "timeout": "1s", "heartbeat": "100ms"}
        )
        tier = MooncakeTier(spec, pool, "mooncake", on_finished, parameters)
        until(lambda: not tier.stats().problem, "the helper is there")
        return tier

    def then(self, what: str) -> None:
        """Have the double do something else with the next get: "hang", "late" or "die"."""
        (self.directory / "next").write_text(what)


class TestContractThroughTheHelper(OnDouble, TierConformance):
    """The contract, through the real processes."""


class TestHelper(OnDouble):
    @pytest.mark.parametrize("what", ["hang", "late", "die"])
    def test_a_get_that_goes_wrong_fails_and_writes_nothing_afterwards(self, what: str) -> None:
        with self.bench() as bench:
            data = bench.store(1)
            self.then(what)
            result = bench.run(JobKind.LOAD, bench.chunk(1, slot=3))
            assert result.outcomes == (Outcome.FAILED,)
            before = bench.fill(3)
            until(lambda: not (self.directory / "next").exists(), "it was done")
            ended = _ended_helper(self.directory)
            assert ended, "the process that may still write is gone when the load has ended"
            _again(bench, data)
            assert bench.slot(3)[: chunk_bytes()] == before

    def test_a_helper_that_cannot_be_set_up_is_said_and_tried_again(self) -> None:
        (self.directory / "refuse").touch()
        spec = OffloadingSpec(SLOT_BYTES, 4096, 128, str(self.directory / "pool"))
        (self.directory / "pool").write_bytes(bytes(SLOT_BYTES))
        parameters = MooncakeParameters.model_validate(
            {"master": self.master, "segment": "64MiB", "heartbeat": "100ms"}
        )
        tier = MooncakeTier(spec, memoryview(bytearray(SLOT_BYTES)), "mooncake", lambda: None, parameters)
        try:
            until(lambda: "cannot be set up: invalid parameters" in tier.stats().problem, "it says why")
            (self.directory / "refuse").unlink()
            until(lambda: tier.stats().problem == "", "it is tried again")
        finally:
            assert tier.shutdown(5.0)


def _ended_helper(directory: Path) -> bool:
    pid = int((directory / "pid").read_text())
    return not Path(f"/proc/{pid}").exists()


def _again(bench: Bench, data: bytes) -> None:
    def is_loaded() -> bool:
        job = bench.submit(JobKind.LOAD, [bench.chunk(1, slot=5)])
        return bench.results(job)[job].outcomes == (Outcome.DONE,)

    until(is_loaded, "a new helper serves")
    assert parts_of(bench.slot(5)) == parts_of(data)


def test_a_helper_ends_with_the_process_that_began_it(tmp_path: Path) -> None:
    """A process that begins a helper and is killed: the helper must not outlive it."""
    import subprocess

    code = (
        "import os, sys, time, threading\n"
        "from kvtier_server.secondary.mooncake.process import Helper\n"
        "helper = Helper('segment', dict(local_hostname='', metadata='', segment=0, buffer=0, protocol='tcp',"
        " devices='', master='', address='127.0.0.1'), [], os.environ)\n"
        "helper.wait_ready(20)\n"
        "print(helper.pid, flush=True)\n"
        "threading.Event().wait()\n"
    )
    roots = [str(Path(root).resolve()) for root in ("proto", "ops", "server")]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(DOUBLE), *roots]),
        "DOUBLE_DIRECTORY": str(tmp_path),
    }
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        parent.send_signal(signal.SIGKILL)
    until(lambda: not Path(f"/proc/{pid}").exists() or _is_zombie(pid), "the helper ends")


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_helper_that_never_starts_is_an_error(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}  # neither Mooncake nor kvtier is found
    helper = Helper("segment", {}, [], env)
    with pytest.raises(OSError, match="has ended"):
        helper.wait_ready(20.0)
    assert helper.close(5.0)
