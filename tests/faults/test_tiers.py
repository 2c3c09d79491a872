"""Tiers below the pool on media that hang, fail, fill up or crawl, and daemons that die over them."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import secrets
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import pytest
from tests.conftest import MakeEngine, StartDaemon
from tests.daemon_process import WAIT_S, DaemonProcess, state_of, wait_until
from tests.faults.conftest import repeats
from tests.faults.engine_process import open_pool
from tests.integration.test_tiers import (
    BATCH,
    EXAMPLE,
    FILE_BYTES,
    MISS,
    PENDING,
    Copier,
    content,
    copier,
    filesystem,
    metric,
    tier,
    wait_for_chunks,
)
from tests.raw_engine import PART_BYTES, to_key, to_keys
from tests.stall import Stall

from kvtier.v1 import admin_pb2
from kvtier.v1 import offload_pb2 as pb
from kvtier_ops.checksum import part_checksum
from kvtier_ops.layout import SLOT_UNIT_BYTES
from kvtier_ops.slot_table import SlotState
from kvtier_server.secondary.filesystem.inspection import WRONG, Inspection

MIB = 1 << 20
DISK_BYTES = 64 * MIB
POOL_BYTES = 256 * PART_BYTES


IO_POINTS = (
    "filesystem.after_open",
    "filesystem.after_write",
    "filesystem.after_rename",
    "filesystem.before_load",
)
KILL_POINTS = (
    *IO_POINTS,
    "filesystem.after_index",
    "filesystem.after_delete",
    "slots.before_published",
    "slots.before_state",
)


def hits(own: Copier, keys: list[bytes], request: str) -> int:
    """Load without patience."""
    found = own.engine.lookup(keys, lease_id=own.engine.new_lease_id(), request_id=request)
    own.finish(request)
    return len(found.slot_ids)


def push_out(own: Copier, first: int = 50_000) -> None:
    """Store as many other chunks as the pool holds."""
    own.store(to_keys(range(first, first + POOL_BYTES // PART_BYTES)))


@pytest.mark.parametrize("point", ["filesystem.after_open", "filesystem.before_load"])
def test_r6_a_tier_thread_that_hangs_holds_up_nobody_else_and_degrades_only_its_tier(
    point: str, start_daemon: StartDaemon, make_engine: MakeEngine, tmp_path: Path
) -> None:
    """R6: a tier's threads hang in the middle of an I/O for as long as the test looks."""
    stall = Stall(tmp_path, point)
    config = filesystem(tmp_path, 'deadline = "200ms"\nreaders = 1\nwriters = 1\n')
    daemon = start_daemon(pool_bytes=POOL_BYTES, config=config, env=stall.env)
    below = to_keys(range(4))
    with copier(daemon, make_engine, "a") as one, copier(daemon, make_engine, "b") as other:
        one.store(below)
        wait_for_chunks(daemon, "disk", len(below))
        if point == "filesystem.before_load":
            push_out(one)
            wait_until(lambda: not tier(daemon, "primary").pinned_chunks, "all that goes down is down")
            stall.arm()
            one.engine.lookup(below, lease_id=one.engine.new_lease_id(), pending_wait_ms=1_900)
        else:
            stall.arm()
            one.store(to_keys(range(100, 104)))
        stall.wait_until_hung()
        wait_until(lambda: daemon.health("kvtier.tier.disk") == "NOT_SERVING", "the tier's health says so")
        assert daemon.health() == "SERVING"
        status = daemon.status()
        assert status.state == "degraded"
        assert "an I/O has been running" in status.tiers[1].health
        for number in range(8):  # the other engine stores, and is served from the pool
            keys = to_keys(range(1_000 + BATCH * number, 1_000 + BATCH * (number + 1)))
            other.store(keys)
            assert other.load(keys, f"load-{number}") == BATCH
        one.finish("request")
        stall.let_go()
        wait_until(lambda: daemon.health("kvtier.tier.disk") == "SERVING", "the tier is in order again")
        assert daemon.status().state == "serving"

        numbers = iter(range(2_000, 100_000))

        def is_stored() -> bool:
            stored = tier(daemon, "disk").chunks
            other.store([to_key(next(numbers))])
            return tier(daemon, "disk").chunks > stored

        wait_until(is_stored, "it takes chunks again")
    wait_until(lambda: not tier(daemon, "primary").pinned_chunks, "no slot is held")


@pytest.mark.parametrize(("patience", "arrives"), [("20s", True), ("300ms", False)])
def test_r7_a_read_that_stalls_is_a_miss_in_time_and_its_slot_waits_for_the_io(
    patience: str, arrives: bool, start_daemon: StartDaemon, make_engine: MakeEngine, tmp_path: Path
) -> None:
    """R7: MISS at the wait that was asked for; the slot is free when the I/O is over and not before.

    What comes when nobody can be waiting any more is dropped, and until then it is as if nobody had asked.
    """
    stall = Stall(tmp_path, "filesystem.before_load")
    config = f'[leases]\npromotion = "{patience}"\n' + filesystem(tmp_path)
    daemon = start_daemon(pool_bytes=POOL_BYTES, config=config, env=stall.env)
    keys = to_keys(range(2))
    with copier(daemon, make_engine) as own:
        own.store(keys)
        wait_for_chunks(daemon, "disk", len(keys))
        push_out(own)
        wait_until(lambda: not tier(daemon, "primary").pinned_chunks, "all that goes down is down")
        assert hits(own, keys, "before") == 0
        stall.arm()
        lease = own.engine.new_lease_id()
        answer = own.engine.lookup(keys, lease_id=lease, request_id="waits", pending_wait_ms=300)
        assert list(answer.statuses) == [PENDING] * 2
        stall.wait_until_hung()
        scheduler = own.engine.scheduler
        assert scheduler is not None
        resolved = [scheduler.wait_for("resolved").resolved for _ in keys]
        assert {(event.key, event.status) for event in resolved} == {(key, MISS) for key in keys}
        own.finish("waits")
        assert tier(daemon, "primary").reserved_slots == 2
        push_out(own, 60_000)  # the pool turns over, but for those two
        assert tier(daemon, "primary").reserved_slots == 2
        if not arrives:
            wait_until(
                lambda: list(own.engine.lookup(keys, request_id="free").statuses) == [MISS] * 2,
                "the keys are free again",
            )
            own.finish("free")
        stall.let_go()
        wait_until(lambda: tier(daemon, "primary").reserved_slots == 0, "the slots are free")
        assert hits(own, keys, "after") == (2 if arrives else 0)
        wait_until(lambda: tier(daemon, "disk").health == "ok", "the tier is in order")
        assert own.load(keys, "again") == 2
    assert daemon.status().state == "serving"


def test_a_clear_does_not_wait_for_a_tier_that_hangs_and_holds_when_it_goes_on(
    start_daemon: StartDaemon, make_engine: MakeEngine, tmp_path: Path
) -> None:
    """What was being written while it was cleared is gone as well, in the end."""
    stall = Stall(tmp_path, "filesystem.after_write")
    daemon = start_daemon(pool_bytes=POOL_BYTES, config=filesystem(tmp_path), env=stall.env)
    with copier(daemon, make_engine) as own:
        own.store(to_keys(range(BATCH)))
        wait_for_chunks(daemon, "disk", BATCH)
        stall.arm()
        own.store(to_keys(range(100, 100 + BATCH)))
        stall.wait_until_hung()
        request = admin_pb2.ClearRequest(everything=True, wait_ms=200)
        pool, disk = own.engine.admin.Clear(request, timeout=WAIT_S).tiers
        assert (pool.over, pool.chunks + pool.kept_chunks) == (True, 2 * BATCH)
        assert pool.kept_chunks > 0, "what is being written is held"
        assert (disk.over, disk.chunks) == (False, 0)
        new = to_keys(range(200, 200 + BATCH))
        own.store(new)
        assert hits(own, new, "new") == BATCH, "the pool serves as ever"
        stall.let_go()

        old = [*to_keys(range(BATCH)), *to_keys(range(100, 100 + BATCH))]

        def old_ones_are_gone() -> bool:
            there = {path.stem for path in (tmp_path / "root").rglob("*.chunk")}
            return not there & {key.hex() for key in old} and not tier(daemon, "primary").pinned_chunks

        wait_until(old_ones_are_gone, "the tier is cleared of what was there before")
        own.engine.admin.Clear(admin_pb2.ClearRequest(tier="primary"), timeout=WAIT_S)
        assert own.load(old, "cleared") == 0
        own.store(old)
        wait_until(lambda: len(list((tmp_path / "root").rglob("*.chunk"))) >= len(old), "it goes down again")


@pytest.mark.parametrize("io", ["process", "threads"])
@pytest.mark.parametrize("point", ["filesystem.after_open", "filesystem.before_load"])
def test_a_daemon_is_stopped_in_time_while_a_tier_hangs_and_the_next_one_starts_warm(
    point: str, io: str, start_daemon: StartDaemon, make_engine: MakeEngine, tmp_path: Path
) -> None:
    stall = Stall(tmp_path, point)
    config = '[drain]\ncopies = "200ms"\ntiers = "200ms"\n' + filesystem(tmp_path, f'io = "{io}"\n')
    daemon = start_daemon(pool_bytes=POOL_BYTES, config=config, env=stall.env)
    keys = to_keys(range(4))
    with copier(daemon, make_engine) as own:
        own.store(keys)
        wait_for_chunks(daemon, "disk", len(keys))
        push_out(own)
        wait_until(lambda: not tier(daemon, "primary").pinned_chunks, "all that goes down is down")
        stall.arm()
        if point == "filesystem.before_load":
            own.engine.lookup(keys, lease_id=own.engine.new_lease_id(), pending_wait_ms=1_900)
        else:
            own.store(to_keys(range(100, 104)))
        stall.wait_until_hung()
    # Far below what would be waited for without a bound: the thread never ends.
    assert daemon.stop() == 0
    # A process of its own can be ended; threads end with the daemon.
    assert ("tier_hangs" in daemon.log_text()) == (io == "threads")
    stall.let_go()
    daemon.start()
    with copier(daemon, make_engine) as own:
        wait_for_chunks(daemon, "disk", len(keys))
        assert own.load(keys, "again") == len(keys)
        assert hits(own, to_keys(range(50_000 + 128, 50_256)), "warm") > 0
    daemon.kill()
    assert check_published_slots(daemon) > 0


@pytest.mark.parametrize("point", IO_POINTS)
def test_the_death_of_an_io_process_costs_what_it_was_doing_and_nothing_else(
    point: str, start_daemon: StartDaemon, make_engine: MakeEngine, tmp_path: Path
) -> None:
    """It dies at every twelfth pass; nobody notices but by misses, and no slot stays held."""
    env = {"KVTIER_FAULTS": f"{point}=kill@12"}
    daemon = start_daemon(pool_bytes=POOL_BYTES, config=filesystem(tmp_path), env=env)
    loaded = 0
    with copier(daemon, make_engine) as own:
        for number in range(16):
            own.store(to_keys(range(BATCH * number, BATCH * (number + 1))))
        wait_until(lambda: not tier(daemon, "primary").pinned_chunks, "all that goes down is down")
        push_out(own)
        wait_until(lambda: not tier(daemon, "primary").pinned_chunks, "all that goes down is down")
        for number in range(16 * BATCH):
            loaded += own.load([to_key(number)], f"load-{number}")
        wait_until(lambda: "I/O process" in daemon.log_text(), "it is noted")
        wait_until(lambda: not tier(daemon, "primary").pinned_chunks, "no slot is held")
        wait_until(lambda: tier(daemon, "primary").reserved_slots == 0, "no slot is reserved")
    assert loaded > 8 * BATCH
    assert daemon.exit_code() is None
    # Nothing is on disk that the tier does not count.
    known = tier(daemon, "disk").chunks
    files = [path for path in (tmp_path / "root").rglob("*") if path.is_file() and path.name != "space.json"]
    assert len(files) == known


def test_an_io_process_that_dies_while_it_has_nothing_to_do_costs_nothing(
    start_daemon: StartDaemon, make_engine: MakeEngine, tmp_path: Path
) -> None:
    daemon = start_daemon(pool_bytes=POOL_BYTES, config=filesystem(tmp_path))
    keys = to_keys(range(BATCH))
    with copier(daemon, make_engine) as own:
        own.store(keys)
        wait_for_chunks(daemon, "disk", BATCH)
        push_out(own)
        wait_until(lambda: not tier(daemon, "primary").pinned_chunks, "all that goes down is down")
        for number in range(4):
            helper = io_process(daemon)
            os.kill(helper, signal.SIGKILL)
            wait_until(lambda helper=helper: state_of(helper) in ("Z", ""), "it is dead")  # type: ignore[misc]
            assert own.load(keys, f"load-{number}") == BATCH
            push_out(own, 60_000 + 1_000 * number)
            wait_until(lambda: not tier(daemon, "primary").pinned_chunks, "all that goes down is down")


@pytest.mark.parametrize("point", ["filesystem.after_open", "filesystem.before_load"])
def test_the_pool_of_a_killed_daemon_is_not_taken_over_before_its_io_is_over(
    point: str, start_daemon: StartDaemon, make_engine: MakeEngine, tmp_path: Path
) -> None:
    """A read that is under way would arrive in a slot that is the next daemon's by then."""
    config = filesystem(tmp_path)
    daemon = start_daemon(pool_bytes=POOL_BYTES, config=config, env={"KVTIER_FAULTS": f"{point}=stop"})
    keys = to_keys(range(4))
    with copier(daemon, make_engine) as own:
        if point == "filesystem.before_load":
            own.store(keys)
            wait_for_chunks(daemon, "disk", len(keys))
            push_out(own)
            wait_until(lambda: not tier(daemon, "primary").pinned_chunks, "all that goes down is down")
            own.engine.lookup(keys, lease_id=own.engine.new_lease_id(), pending_wait_ms=1_900)
        else:
            own.store(keys)
        helper = io_process(daemon)
        wait_until(lambda: state_of(helper) == "T", "the I/O process stands still")
        daemon.kill()
    daemon.launch()
    assert daemon.wait() == 1
    assert "processes of the last daemon still use the pool" in daemon.log_text()
    os.kill(helper, signal.SIGKILL)
    daemon.start()


def io_process(daemon: DaemonProcess) -> int:
    """Process id of a daemon's only child."""
    tasks = Path(f"/proc/{daemon.pid}/task").iterdir()
    (child,) = [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
    return child


def test_a_daemon_that_is_killed_while_it_reads_its_directories_loses_nothing(
    start_daemon: StartDaemon, make_engine: MakeEngine, tmp_path: Path
) -> None:
    config = filesystem(tmp_path)
    keys = to_keys(range(4 * BATCH))
    first = start_daemon(pool_bytes=POOL_BYTES, config=config)
    with copier(first, make_engine) as own:
        own.store(keys)
        wait_for_chunks(first, "disk", len(keys))
    first.kill()  # so that the next one reads the directories
    dies = DaemonProcess(
        tmp_path, POOL_BYTES, config=config, env={"KVTIER_FAULTS": "filesystem.before_scan=kill@20"}
    )
    with dies:
        dies.launch()
        assert dies.wait() == -signal.SIGKILL
    successor = start_daemon(pool_bytes=POOL_BYTES, config=config)
    with copier(successor, make_engine) as own:
        wait_for_chunks(successor, "disk", len(keys))
        for number in range(4):
            assert own.load(keys[BATCH * number : BATCH * (number + 1)], f"load-{number}") == BATCH


def random_config(chance: random.Random, tmp_path: Path) -> str:
    """A filesystem tier, large or small, and perhaps another tier before or behind it."""
    more = (
        f'durability = "{chance.choice(("process", "os"))}"\n'
        f'direct = "{chance.choice(("auto", "off"))}"\n'
        f"writers = {chance.choice((1, 4))}\n"
    )
    disk = filesystem(tmp_path, more)
    if chance.random() < 0.5:
        disk = disk.replace('"64MiB"', f'"{chance.choice((24, 100)) * FILE_BYTES}"')
    return "".join(chance.choice(([disk], [disk], [EXAMPLE, disk], [disk, EXAMPLE])))


def store_missing(own: Copier, keys: Sequence[bytes], request: str) -> None:
    """Store what the pool lacks of some chunks."""
    granted = own.engine.prepare_store(keys, request_id=request)
    new = [
        key
        for key, verdict in zip(keys, granted.verdicts, strict=True)
        if verdict == pb.STORE_VERDICT_GRANTED
    ]
    for slot_id, key in zip(granted.slot_ids, new, strict=True):
        own.pool.slot_view(slot_id, PART_BYTES)[:] = list(content(key))
    report = pb.StoreReport(
        slot_ids=granted.slot_ids,
        generations=granted.generations,
        keys=new,
        checksums=[part_checksum(memoryview(content(key))) for key in new],
    )
    own.engine.complete(own.engine.workers[0], store_reports=[report])
    own.finish(request)


def work_until_it_dies(own: Copier, chance: random.Random, old: int, new: int) -> int:
    """Store and load batches until a call fails; every byte is checked. Returns the chunks loaded.

    Batches up to `old` may be known, those from there to `new` are stored for the first time.
    """
    loaded = 0
    try:
        for turn in itertools.count():
            first = BATCH * chance.randrange(old, new)
            store_missing(own, to_keys(range(first, first + BATCH)), f"store-{turn}")
            first = BATCH * chance.randrange(new)
            loaded += own.load(to_keys(range(first, first + BATCH)), f"load-{turn}")
    except grpc.RpcError:
        pass
    except AssertionError as error:
        if "the stream ended" not in str(error):
            raise
    return loaded


def check_published_slots(daemon: DaemonProcess) -> int:
    """Compare every published slot of a pool without a daemon with what was stored under its key."""
    pool = open_pool(daemon.pool_file)
    count = 0
    try:
        for slot_id in range(pool.data_bytes // SLOT_UNIT_BYTES):
            record = pool.slots.read(slot_id)
            if record is not None and record.state is SlotState.PUBLISHED:
                found = bytes(pool.slot_view(slot_id, PART_BYTES))
                assert found == content(record.key), f"slot {slot_id}: another's bytes"
                count += 1
    finally:
        pool.close()
    return count


@pytest.mark.timeout(3_600)  # with full counts
def test_w2_a_daemon_killed_anywhere_serves_what_was_stored_and_nothing_else(
    start_daemon: StartDaemon, make_engine: MakeEngine, tmp_path: Path
) -> None:
    """W2: SIGKILL at random points of cascades and slot-table writes; pool and files outlive each round."""
    name = f"test-{os.getpid()}-{secrets.token_hex(4)}"
    new_batches = 20
    num_batches = published = loaded = 0
    for round_number in repeats(10, 500):
        chance = random.Random(round_number)
        # What the I/O process passes kills it, or its daemon while it runs on.
        action = chance.choice(("kill", "kill-parent"))
        point = chance.choice(KILL_POINTS)
        fault = f"{point}={action if point in IO_POINTS else 'kill'}@{chance.randint(1, 200)}"
        config = random_config(chance, tmp_path)
        daemon = DaemonProcess(tmp_path, POOL_BYTES, config=config, env={"KVTIER_FAULTS": fault}, name=name)
        old, num_batches = num_batches, num_batches + new_batches
        try:
            with contextlib.suppress(Dead):
                start_or_die(daemon)
                with copier(daemon, make_engine) as own:
                    # Whichever comes first.
                    at_last = threading.Timer(chance.uniform(0.2, 2.0), daemon.signal, [signal.SIGKILL])
                    at_last.start()
                    loaded += work_until_it_dies(own, chance, old, num_batches)
                    at_last.join()
            assert daemon.wait() == -signal.SIGKILL, daemon.log_text()
            published += check_published_slots(daemon)
        except (AssertionError, grpc.RpcError) as error:
            daemon.close()
            raise AssertionError(f"round {round_number}, {fault}: {error}\n{config}") from error
    last = start_daemon(pool_bytes=POOL_BYTES, config=filesystem(tmp_path), name=name)
    with copier(last, make_engine) as own:
        for number in range(max(num_batches - 100, 0), num_batches):
            loaded += own.load(to_keys(range(BATCH * number, BATCH * (number + 1))), f"last-{number}")
    assert published > 0
    assert loaded > 0
    inspection = Inspection(str(tmp_path / "root"))
    wrong = [found for found in map(inspection.look_at, inspection.entries()) if found.verdict in WRONG]
    inspection.close()
    assert wrong == [], "no file has its name before it is whole"


class Dead(Exception):
    """The daemon was killed before it served."""


def start_or_die(daemon: DaemonProcess) -> None:
    """Start a daemon that may be killed at once. Raises Dead if it was."""
    try:
        daemon.start()
    except (AssertionError, grpc.RpcError):
        if daemon.exit_code() != -signal.SIGKILL:
            raise
        raise Dead from None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """The root of a tier on a file system of its own, with room for DISK_BYTES and 4,096 files."""
    folder = tmp_path / "root"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},nr_inodes=4096", "tmpfs", str(folder)],
        check=False,
        capture_output=True,
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def take_space(folder: Path, leave_bytes: int) -> Path:
    """Take all of a file system but so much; returns the file that has it."""
    found = os.statvfs(folder)
    greedy = folder / "greedy"
    with greedy.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, found.f_bavail * found.f_frsize - leave_bytes)
    return greedy


def take_inodes(folder: Path) -> Path:
    """Make files until no more can be made; returns the folder that they are in."""
    greedy = folder / "greedy"
    greedy.mkdir()
    for number in itertools.count():
        try:
            (greedy / str(number)).touch()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return greedy
    raise AssertionError("unreachable")


def give_back(greedy: Path) -> None:
    if greedy.is_dir():
        shutil.rmtree(greedy)
    else:
        greedy.unlink()


@pytest.mark.parametrize("what", ["inodes", "bytes"])
def test_d3_a_disk_without_space_degrades_its_tier_and_costs_the_pool_nothing(
    what: str, small_disk: Path, start_daemon: StartDaemon, make_engine: MakeEngine, tmp_path: Path
) -> None:
    """D3 on a real file system of 64 MiB: ENOSPC, until somebody makes room."""
    daemon = start_daemon(pool_bytes=POOL_BYTES, config=filesystem(tmp_path))
    numbers = iter(range(10_000, 1_000_000))

    def store_some(own: Copier) -> None:
        own.store(to_keys([next(numbers) for _ in range(BATCH)]))

    with copier(daemon, make_engine) as own:
        keys = to_keys(range(2 * BATCH))
        own.store(keys)
        wait_for_chunks(daemon, "disk", len(keys))
        greedy = take_inodes(small_disk) if what == "inodes" else take_space(small_disk, 0)

        def is_refused() -> bool:
            store_some(own)
            refused = metric(daemon, "kvtier_tier_refused_total", "disk", 'reason="no_space"')
            return refused > 0 or "left alone after" in tier(daemon, "disk").health

        wait_until(is_refused, "the tier finds no space")
        if what == "inodes":
            wait_until(lambda: daemon.status().state == "degraded", "the daemon says so")
            assert "No space left on device" in tier(daemon, "disk").health
        new = to_keys(range(5_000, 5_000 + BATCH))
        own.store(new)
        assert hits(own, new, "new") == BATCH, "the pool serves as ever"
        assert daemon.exit_code() is None
        assert not list(small_disk.rglob("tmp-*"))
        give_back(greedy)

        def is_stored() -> bool:
            stored = tier(daemon, "disk").chunks
            store_some(own)
            wait_until(lambda: not daemon.status().tiers[0].pinned_chunks, "what goes down is down")
            return tier(daemon, "disk").chunks > stored

        wait_until(is_stored, "the tier comes back by itself")
        wait_until(lambda: daemon.status().state == "serving", "the daemon serves in full")
    assert "Traceback" not in daemon.log_text()


def test_d5_under_the_reserve_of_free_space_own_chunks_go_and_then_nothing_is_written(
    small_disk: Path, start_daemon: StartDaemon, make_engine: MakeEngine, tmp_path: Path
) -> None:
    """D5: what this daemon wrote makes room for the reserve; without any of it, cascading stops."""
    reserve = 0.25
    config = filesystem(tmp_path).replace("reserve_free = 0.0", f"reserve_free = {reserve}")
    daemon = start_daemon(pool_bytes=4 * POOL_BYTES, config=config)
    num_chunks = 8 * BATCH

    def free() -> int:
        found = os.statvfs(small_disk)
        return found.f_bavail * found.f_frsize

    def idle() -> bool:
        return not daemon.status().tiers[0].pinned_chunks

    with copier(daemon, make_engine) as own:
        own.store(to_keys(range(num_chunks)))
        wait_for_chunks(daemon, "disk", num_chunks)
        # Half of what was written is now too much.
        greedy = take_space(small_disk, int(reserve * DISK_BYTES) - num_chunks // 2 * FILE_BYTES)
        numbers = iter(range(10_000, 1_000_000))

        def is_above_reserve() -> bool:
            own.store([to_key(next(numbers))])
            wait_until(idle, "what goes down is down")
            return free() >= int(reserve * DISK_BYTES)

        wait_until(is_above_reserve, "the reserve is free again")
        assert 0 < tier(daemon, "disk").chunks <= num_chunks // 2
        assert metric(daemon, "kvtier_tier_healthy", "disk") == 1
        newest = [to_key(next(numbers))]
        own.store(newest)
        wait_until(idle, "what goes down is down")
        assert 0 < tier(daemon, "disk").chunks <= num_chunks // 2, "it goes on in what room there is"

        give_back(greedy)
        greedy = take_space(small_disk, 0)

        def stops() -> bool:
            own.store([to_key(next(numbers))])
            return metric(daemon, "kvtier_tier_refused_total", "disk", 'reason="no_space"') > 0

        wait_until(stops, "cascading stops")
        wait_until(idle, "what goes down is down")
        assert tier(daemon, "disk").chunks == 0
        assert not list(small_disk.rglob("*.chunk"))
        assert (tier(daemon, "disk").health, daemon.status().state) == ("ok", "serving")
        give_back(greedy)

        def goes_on() -> bool:
            own.store([to_key(next(numbers))])
            return tier(daemon, "disk").chunks > 0

        wait_until(goes_on, "it goes on when there is room")


def rss_bytes(daemon: DaemonProcess) -> int:
    """Memory of the daemon's own, without what it shares."""
    status = Path(f"/proc/{daemon.pid}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


@pytest.mark.parametrize("delay_s", [0.002, 0.2])
def test_d4_a_slow_disk_holds_no_more_than_its_queue_and_the_rest_is_dropped_and_counted(
    delay_s: float, start_daemon: StartDaemon, make_engine: MakeEngine, tmp_path: Path
) -> None:
    """D4: each write takes about ten or a thousand times of what it takes here otherwise."""
    queued, running = 64 * PART_BYTES, 16 * PART_BYTES
    more = f"max_queued = {queued}\nmax_running = {running}\nwriters = 1\n"
    daemon = start_daemon(
        pool_bytes=POOL_BYTES,
        config=filesystem(tmp_path, more),
        env={"KVTIER_FAULTS": f"filesystem.after_open=sleep:{delay_s}"},
    )
    with copier(daemon, make_engine) as own:
        own.store(to_keys(range(4 * BATCH)))
        before = rss_bytes(daemon)
        offered = 4 * BATCH
        most = 0.0
        for first in range(1_000, 1_000 + 256 * BATCH, BATCH):
            own.store(to_keys(range(first, first + BATCH)))
            offered += BATCH
            if not first // BATCH % 16:
                most = max(most, metric(daemon, "kvtier_tier_queued_bytes", "disk"))

        def num_done() -> float:
            return (
                metric(daemon, "kvtier_backpressure_dropped_total", "disk")
                + metric(daemon, "kvtier_tier_chunks", "disk")
                + metric(daemon, "kvtier_tier_queued_bytes", "disk") / PART_BYTES
            )

        wait_until(lambda: num_done() == offered, "every chunk is stored, queued or counted as dropped")
        assert most <= queued + running
        assert metric(daemon, "kvtier_backpressure_dropped_total", "disk") > (
            offered // 2 if delay_s > 0.1 else 0
        )
        assert rss_bytes(daemon) - before < 16 * MIB
        assert hits(own, to_keys(range(first, first + BATCH)), "newest") == BATCH
        assert daemon.status().state == "serving"
    daemon.kill()
