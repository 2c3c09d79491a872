"""What must be right before a daemon serves, and what it says when it is not."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.conftest import MakeEngine, StartDaemon
from tests.daemon_process import DaemonProcess
from tests.raw_engine import to_key, to_keys

from kvtier.v1 import offload_pb2 as pb
from kvtier_ops.pool import MappedPool

Refuse = Callable[..., tuple[int, str]]


@pytest.fixture
def refuse(tmp_path: Path) -> Iterator[Refuse]:
    """Start a daemon that must not come up; returns its exit code and what it said."""
    with contextlib.ExitStack() as daemons:

        def launch(pool_bytes: str = "4MiB", **options: str) -> tuple[int, str]:
            daemon = daemons.enter_context(DaemonProcess(tmp_path, pool_bytes, **options))  # type: ignore[arg-type]
            code = daemon.launch().wait()
            assert "Traceback" not in daemon.log_text()
            return code, daemon.log_text()

        yield launch


def test_a_second_daemon_of_one_name_exits_1_and_names_the_holder(
    daemon: DaemonProcess, refuse: Refuse
) -> None:
    code, said = refuse(name=daemon.name)
    assert code == 1
    assert f"pid {daemon.pid}" in said
    assert "--name" in said
    assert daemon.health() == "SERVING"


def test_a_second_daemon_on_one_socket_exits_1_and_names_the_holder(
    daemon: DaemonProcess, refuse: Refuse
) -> None:
    code, said = refuse(address=daemon.address)
    assert code == 1
    assert f"pid {daemon.pid}" in said
    assert "--address" in said
    assert daemon.health() == "SERVING"


def test_a_pool_larger_than_the_machine_exits_2_with_the_figures(refuse: Refuse) -> None:
    code, said = refuse(pool_bytes="100TiB")
    assert code == 2
    assert str(100 << 40) in said
    assert re.search(r"file system /dev/shm [\d.]+ GiB", said), said
    assert re.search(r"MemAvailable [\d.]+ GiB", said), said
    assert "ask for at most" in said


def test_a_pool_that_was_refused_leaves_nothing_behind(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path, "100TiB") as daemon:
        assert daemon.launch().wait() == 2
        assert not daemon.pool_file.exists()
        assert not daemon.socket.exists()


@pytest.mark.parametrize(
    ("policy", "hint"),
    [
        ("lrU2", '("lru", "arc")'),
        ("no_such_package.policies:Mine", "importing 'no_such_package.policies' failed"),
        ("pathlib:Path", "is not a CachePolicy"),
    ],
)
def test_a_policy_that_cannot_be_had_exits_2_and_says_why(refuse: Refuse, policy: str, hint: str) -> None:
    code, said = refuse(policy=policy)
    assert code == 2
    assert hint in said


def test_all_mistakes_of_a_configuration_are_said_at_once(refuse: Refuse) -> None:
    code, said = refuse(pool_bytes="many", config="[limits]\nengine = 3\n", log_level="loud")
    assert code == 2
    for path in ("pool.bytes", "limits.engine", "server.log_level"):
        assert path in said
    assert "did you mean limits.engines?" in said


def test_a_metrics_port_that_is_taken_exits_1_and_says_so(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder, DaemonProcess(tmp_path) as daemon:
        address = f"127.0.0.1:{holder.getsockname()[1]}"
        assert daemon.launch("--metrics-address", address).wait() == 1
        assert address in daemon.log_text()
        assert "--metrics-address" in daemon.log_text()


def test_a_directory_that_others_may_write_to_holds_no_socket(refuse: Refuse, tmp_path: Path) -> None:
    directory = tmp_path / "open"
    directory.mkdir()
    directory.chmod(0o777)
    code, said = refuse(address=f"unix://{directory}/kvtier.sock")
    assert code == 2
    assert str(directory) in said


def test_a_pool_directory_that_others_can_read_is_refused_with_the_command_that_helps(
    tmp_path: Path,
) -> None:
    with DaemonProcess(tmp_path) as daemon:
        daemon.pool_directory.mkdir(mode=0o755)
        assert daemon.launch().wait() == 2
        assert f"chmod 700 {daemon.pool_directory}" in daemon.log_text()


FIFO_POLICY = '''
from kvtier_server.policies.lru import LruPolicy

class FifoPolicy(LruPolicy):
    """Oldest insert first: a use does not count."""

    def touch(self, chunk_ids, stamps):
        pass
'''


@pytest.mark.parametrize("policy", ["lru", "fifo_policy:FifoPolicy"])
def test_a_policy_from_outside_the_project_decides_what_is_evicted(
    tmp_path: Path, start_daemon: StartDaemon, make_engine: MakeEngine, policy: str
) -> None:
    (tmp_path / "fifo_policy.py").write_text(FIFO_POLICY)
    daemon = start_daemon(pool_bytes="1MiB", policy=policy, env={"PYTHONPATH": f"{tmp_path}"})
    assert daemon.status().pool.policy == policy
    engine = make_engine(daemon).attach()
    oldest = to_key(0)
    engine.store([oldest], request_id="first")
    for number in (1, 2, 3):
        engine.store(to_keys(range(number * 85 - 84, number * 85 + 1)), request_id=f"fill {number}")
    engine.lookup([oldest], request_id="used again")
    assert daemon.status().tiers[0].chunks == 256
    engine.store([to_key(1000)], request_id="one more")
    kept = list(engine.lookup([oldest]).statuses) == [pb.LOOKUP_STATUS_HIT]
    assert kept == (policy == "lru")


def test_geometries_of_namespaces_that_left_no_chunk_do_not_outlive_the_daemon(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon()
    with make_engine(daemon) as keeper:
        kept = keeper.attach_scheduler().attached.namespace_digest
        keeper.attach_worker()
        keeper.store([to_key(1)])
    idle = make_engine(daemon).attach()
    daemon.kill()
    idle.close()
    daemon.start()
    engine = make_engine(daemon)
    new = engine.attach_scheduler().attached.namespace_digest
    engine.attach_worker()
    pool = MappedPool.open(daemon.pool_file, engine.describe().pool.pool_id)
    registry = json.loads(pool.registry.read() or b"{}")
    pool.close()
    assert set(registry["geometries"]) == {kept, new}
    assert {namespace for _, namespace, _, _ in registry["spaces"]} == {kept, new}
