"""Real daemons on one host, standing for nodes, over a real master: byte for byte, and through its faults."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.conftest import MakeEngine, StartDaemon
from tests.daemon_process import DaemonProcess, wait_until
from tests.integration.test_tiers import (
    BATCH,
    POOL_BYTES,
    POOL_CHUNKS,
    Copier,
    copier,
    metric,
    tier,
    wait_for_chunks,
)
from tests.raw_engine import to_keys

from .conftest import Master, children

README = Path(__file__).parents[2] / "README.md"
RECOVERY_S = 60.0


def from_readme(master: Master) -> str:
    """The README's example, with this master and a segment for a small machine, and quicker in its checks."""
    (example,) = re.findall(
        r'```toml\n(\[\[tiers\]\]\ntype = "mooncake"\n.*?)```', README.read_text(), re.DOTALL
    )
    config, num_masters = re.subn(r'(?m)^master = "\S+"', f'master = "{master.address}"', example)
    config, num_segments = re.subn(r'(?m)^segment = "\S+"', 'segment = "64MiB"', config)
    assert (num_masters, num_segments) == (1, 1), example
    return config + 'heartbeat = "200ms"\ntimeout = "2s"\n'


def node(start_daemon: StartDaemon, master: Master) -> DaemonProcess:
    return start_daemon(pool_bytes=POOL_BYTES, config=from_readme(master))


def is_well(daemon: DaemonProcess) -> bool:
    return tier(daemon, "mooncake").health == "ok"


def wait_well(*daemons: DaemonProcess) -> None:
    for daemon in daemons:
        wait_until(lambda daemon=daemon: is_well(daemon), "the tier is connected", RECOVERY_S)  # type: ignore[misc]


def load(own: Copier, keys: Sequence[bytes], name: str) -> int:
    """Load prompt by prompt, every byte checked; returns how many chunks were served."""
    return sum(
        own.load(keys[first : first + BATCH], f"{name}-{first}") for first in range(0, len(keys), BATCH)
    )


def works_again(own: Copier, daemon: DaemonProcess, first: int) -> None:
    """Store new chunks until some go down: after faults the tier may be left alone for a while."""
    numbers = iter(range(first, first + 10_000))

    def goes_down() -> bool:
        before = metric(daemon, "kvtier_cascade_bytes_total", "mooncake")
        own.store(to_keys([next(numbers)]))
        try:
            wait_until(
                lambda: metric(daemon, "kvtier_cascade_bytes_total", "mooncake") > before, "it goes down", 1.0
            )
        except AssertionError:
            return False
        return True

    wait_until(goes_down, "chunks go down again", RECOVERY_S)


def test_what_one_node_stored_the_other_loads(
    master: Master, start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    one, other = node(start_daemon, master), node(start_daemon, master)
    wait_well(one, other)
    keys = to_keys(range(4 * BATCH))
    with copier(one, make_engine) as writer, copier(other, make_engine) as reader:
        writer.store(keys)
        wait_for_chunks(one, "mooncake", len(keys))
        assert load(reader, keys, "there") == len(keys)
        back = to_keys(range(1_000, 1_000 + BATCH))
        reader.store(back)
        wait_for_chunks(other, "mooncake", len(keys) + len(back))
        assert load(writer, back, "back") == len(back)
    wait_until(lambda: metric(other, "kvtier_promotion_bytes_total", "mooncake") > 0, "it is counted")
    assert metric(one, "kvtier_backpressure_dropped_total", "mooncake") == 0


def test_a_working_set_four_times_the_pool_is_served(
    master: Master, start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = node(start_daemon, master)
    wait_well(daemon)
    keys = to_keys(range(4 * POOL_CHUNKS))
    with copier(daemon, make_engine) as own:
        for first in range(0, len(keys), BATCH):
            own.store(keys[first : first + BATCH])
            wait_for_chunks(daemon, "mooncake", first + BATCH)
        assert load(own, keys, "all") == len(keys)


def test_a_daemon_starts_without_a_master_and_recovers_by_itself(
    master: Master, start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    master.kill()
    daemon = node(start_daemon, master)
    wait_until(lambda: "is not reached" in tier(daemon, "mooncake").health, "the status says why")
    keys = to_keys(range(BATCH))
    with copier(daemon, make_engine) as own:
        own.store(keys)
        assert load(own, keys, "from the pool") == BATCH
        assert load(own, to_keys(range(500, 500 + BATCH)), "of nobody") == 0
        master.start()
        wait_well(daemon)
        works_again(own, daemon, 2_000)


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_master_that_goes_leaves_misses_and_comes_back(
    how: str, master: Master, start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    one, other = node(start_daemon, master), node(start_daemon, master)
    wait_well(one, other)
    keys = to_keys(range(2 * BATCH))
    with copier(one, make_engine) as writer, copier(other, make_engine) as reader:
        writer.store(keys)
        wait_for_chunks(one, "mooncake", len(keys))
        if how == "killed":
            master.kill()
        else:
            master.signal(signal.SIGSTOP)
        load(reader, keys, "at once")  # whatever is served is right
        wait_until(lambda: not is_well(one) and not is_well(other), "both say that it is away", RECOVERY_S)
        assert load(reader, to_keys(range(600, 600 + BATCH)), "of nobody") == 0
        fresh = to_keys(range(700, 700 + BATCH))
        writer.store(fresh)
        assert load(writer, fresh, "from the pool") == BATCH
        if how == "killed":
            master.start()
        else:
            master.signal(signal.SIGCONT)
        wait_well(one, other)
        works_again(writer, one, 3_000)
        works_again(reader, other, 13_000)
        load(reader, keys, "after")
    assert one.exit_code() is None
    assert other.exit_code() is None


def test_a_node_that_is_killed_takes_its_chunks_with_it_and_nothing_else(
    master: Master, start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    one, other = node(start_daemon, master), node(start_daemon, master)
    wait_well(one, other)
    keys = to_keys(range(8 * BATCH))
    with copier(one, make_engine) as writer:
        writer.store(keys)
        wait_for_chunks(one, "mooncake", len(keys))
    helpers = children(one.pid)
    assert set(helpers) == {"segment", "transfer"}
    one.kill()
    wait_until(lambda: not any(map(is_alive, helpers.values())), "its helpers end with it")
    with copier(other, make_engine) as reader:
        load(reader, keys, "at once")
        works_again(reader, other, 4_000)
        served = load(reader, keys, "after")
        assert served < len(keys), "a dead node's chunks were served"
    assert other.exit_code() is None


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("role", ["transfer", "segment"])
def test_a_helper_that_ends_or_hangs_leaves_misses_and_the_daemons_go_on(
    role: str, number: signal.Signals, master: Master, start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    one, other = node(start_daemon, master), node(start_daemon, master)
    wait_well(one, other)
    keys = to_keys(range(4 * BATCH))
    with copier(one, make_engine) as writer, copier(other, make_engine) as reader:
        writer.store(keys)
        wait_for_chunks(one, "mooncake", len(keys))
        # The reader's own process that moves chunks, or the memory in which about half of them lie.
        victim = other if role == "transfer" else one
        pid = children(victim.pid)[role]
        os.kill(pid, number)
        load(reader, keys, "at once")
        if (role, number) == ("segment", signal.SIGSTOP):
            os.kill(pid, signal.SIGCONT)  # it is let be: what is in it is others' too
        else:
            wait_until(
                lambda: children(victim.pid).get(role) not in {None, pid}, "it is replaced", RECOVERY_S
            )
        wait_well(one, other)
        works_again(writer, one, 5_000)
        works_again(reader, other, 15_000)
        load(reader, keys, "after")
    assert one.exit_code() is None
    assert other.exit_code() is None


def test_a_daemon_that_stops_takes_its_helpers_with_it(master: Master, start_daemon: StartDaemon) -> None:
    daemon = node(start_daemon, master)
    wait_well(daemon)
    helpers = children(daemon.pid)
    assert daemon.stop() == 0
    assert not any(map(is_alive, helpers.values()))


def test_the_helpers_ports_are_open_to_nobody_or_to_this_address_only(
    master: Master, start_daemon: StartDaemon
) -> None:
    daemon = node(start_daemon, master)
    wait_well(daemon)
    helpers = children(daemon.pid)
    ports = {role: listening_ports(pid) for role, pid in helpers.items()}
    assert ports["segment"], "the segment is to be reached"
    for port in ports["segment"]:
        assert connects("127.0.0.1", port)
    for address in ("127.0.0.1", "127.0.0.2"):
        for role, own_ports in ports.items():
            for port in own_ports:
                may = (role, address) == ("segment", "127.0.0.1")
                assert connects(address, port) == may, (role, address, port)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def listening_ports(pid: int) -> set[int]:
    """Ports on which a process listens, whatever their addresses."""
    inodes = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        target = os.readlink(fd)
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(int(fields[1].rpartition(":")[2], 16))
    return found


def connects(address: str, port: int) -> bool:
    import socket

    try:
        with socket.create_connection((address, port), 1.0):
            return True
    except TimeoutError:
        return False
