"""vLLM's worker on a device: who copies, in which order, and what happens when that one cannot or dies.

The worker class, the daemon and its copy process are the real ones; the device is shared memory.
"""

from __future__ import annotations

import logging
import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.client.vllm.shared_device import SharedDevice
from tests.conftest import StartDaemon
from tests.daemon_process import DaemonProcess, state_of, wait_until
from tests.integration.test_transfer import helper_pid
from tests.stall import Stall
from tests.vllm.device_rank import POOL_BYTES, DeviceRank

from kvtier_client import transfers
from kvtier_client.tls import TlsFiles
from kvtier_client.vllm.paths import choose_path
from kvtier_client.vllm.tensors import BoundTensors, UnsupportedTensors
from kvtier_ops.ipc import MemoryHandle


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What kvtier warns of; vLLM's loggers do not propagate to pytest's."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Keep(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("vllm.kvtier", "kvtier_client")]
    for logger in loggers:
        logger.addHandler(handler)
    yield messages
    for logger in loggers:
        logger.removeHandler(handler)


@contextmanager
def rank_of(
    daemon: DaemonProcess, device: SharedDevice | None = None, **options: Any
) -> Iterator[DeviceRank]:
    with DeviceRank(daemon.address, device or SharedDevice(), **options) as rank:
        yield rank


def path_in_status(daemon: DaemonProcess) -> str:
    return next(session.path for session in daemon.status().sessions if session.role == "worker")


def test_on_a_device_the_daemon_copies(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(pool_bytes=POOL_BYTES)
    with rank_of(daemon) as rank:
        rank.wait_remote()
        assert path_in_status(daemon) == "remote_host"
        rank.store_all(range(3), [0, 1, 2, 3, 9, 8])
        rank.load_all(range(3), [10, 20, 30, 31, 12, 11])
        assert rank.same([10, 20, 30, 31, 12, 11], [0, 1, 2, 3, 9, 8])
        # A load that begins and ends inside a chunk.
        assert rank.end(rank.load([0, 1], [15, 16], first_block=1)) == []
        assert rank.same([15, 16], [1, 2])
        assert rank.device.settled == 0, "the engine has copied nothing itself"
        assert rank.worker.take_fallbacks() == Counter()
        assert rank.device.memory[0].name in Path(f"/proc/{helper_pid(daemon)}/maps").read_text()


def test_what_the_daemon_copies_comes_after_the_engines_compute(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(pool_bytes=POOL_BYTES)
    with rank_of(daemon) as rank:
        rank.wait_remote()
        rank.store_all([5], [4, 5])
        rank.device.compute.hold()
        stored, loaded = rank.store([7], [0, 1]), rank.load([5], [6, 7])
        wait_until(lambda: daemon.status().copy_devices[0].jobs == 2, "the daemon has both jobs")
        before = rank.blocks([6, 7])
        # What the compute still writes is what is to be stored.
        rank.tensors[0][0] = 42
        assert not rank.is_over(stored)
        assert not rank.is_over(loaded)
        assert all(map(torch.equal, rank.blocks([6, 7]), before)), "no byte of the load has come"
        rank.device.compute.let_go()
        assert rank.end(stored) == rank.end(loaded) == []
        assert rank.same([6, 7], [4, 5])
        rank.store_all([8], [0, 1])
        rank.load_all([7], [20, 21])
        assert rank.same([20, 21], [0, 1])


def test_what_the_engine_copies_itself_comes_after_its_compute_too(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(pool_bytes=POOL_BYTES)
    with rank_of(daemon, transfer="shm") as rank:
        rank.device.compute.hold()
        job_id = rank.store([7], [0, 1])
        rank.tensors[0][0] = 42
        assert not rank.is_over(job_id)
        rank.device.compute.let_go()
        assert rank.end(job_id) == []
        rank.store_all([8], [2, 3])
        rank.load_all([7], [20, 21])
        assert rank.same([20, 21], [0, 1])


def test_with_shm_the_engine_copies_through_the_pinned_pool(
    start_daemon: StartDaemon, said: list[str]
) -> None:
    daemon = start_daemon(pool_bytes=POOL_BYTES)
    with rank_of(daemon, transfer="shm") as rank:
        assert rank.remote is None
        wait_until(lambda: sum(rank.device.registered.values()) == POOL_BYTES, "the pool is pinned")
        rank.store_all(range(3), [0, 1, 2, 3, 9, 8])
        rank.load_all(range(3), [10, 20, 30, 31, 12, 11])
        assert rank.same([10, 20, 30, 31, 12, 11], [0, 1, 2, 3, 9, 8])
        assert path_in_status(daemon) == "shm"
        assert rank.worker.take_fallbacks() == Counter(), "it was asked for"
    assert rank.device.registered == {}, "let go of before the pool was unmapped"
    assert said == []


def test_memory_that_cannot_be_exported_is_copied_by_the_engine_and_said_once_aloud(
    start_daemon: StartDaemon, said: list[str]
) -> None:
    daemon = start_daemon(pool_bytes=POOL_BYTES)
    device = SharedDevice("tensor_ptr: set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False")
    with rank_of(daemon, device) as rank:
        (warning,) = said
        assert "copies through shared memory itself" in warning
        assert "expandable_segments:False" in warning
        assert rank.worker.take_fallbacks() == Counter(export=1)
        assert rank.worker.take_fallbacks() == Counter()
        rank.store_all(range(3), [0, 1, 2, 3, 9, 8])
        rank.load_all(range(3), [10, 20, 30, 31, 12, 11])
        assert rank.same([10, 20, 30, 31, 12, 11], [0, 1, 2, 3, 9, 8])
        assert device.settled > 0
        assert path_in_status(daemon) == "shm"


def test_memory_that_the_daemon_refuses_is_copied_by_the_engine_and_said_aloud(
    start_daemon: StartDaemon, said: list[str]
) -> None:
    daemon = start_daemon(pool_bytes=POOL_BYTES)
    device = SharedDevice()
    rank = DeviceRank(daemon.address, device)
    device.close()  # no name, no way in; the engine's own mapping stays
    with rank:
        wait_until(lambda: bool(rank.remote.problem), "the daemon has refused")
        wait_until(lambda: sum(device.registered.values()) == POOL_BYTES, "the engine pins the pool now")
        assert any("cannot be opened" in message for message in said), said
        assert rank.worker.take_fallbacks() == Counter(refused=1)
        rank.store_all(range(3), [0, 1, 2, 3, 9, 8])
        rank.load_all(range(3), [10, 20, 30, 31, 12, 11])
        assert rank.same([10, 20, 30, 31, 12, 11], [0, 1, 2, 3, 9, 8])
        assert path_in_status(daemon) == "shm"


def test_a_group_with_padding_is_copied_by_the_engine(start_daemon: StartDaemon, said: list[str]) -> None:
    daemon = start_daemon(pool_bytes=POOL_BYTES)
    with rank_of(daemon, padding_bytes=512) as rank:
        assert rank.worker.take_fallbacks() == Counter(export=1)
        assert "take fewer bytes" in said[0]
        rank.store_all(range(3), [0, 1, 2, 3, 9, 8])
        rank.load_all(range(3), [10, 20, 30, 31, 12, 11])
        assert rank.same([10, 20, 30, 31, 12, 11], [0, 1, 2, 3, 9, 8])


def test_who_insists_on_cuda_ipc_hears_at_the_start_why_it_cannot_be(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(pool_bytes=POOL_BYTES)
    device = SharedDevice("tensor_ptr: set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False")
    with pytest.raises(UnsupportedTensors, match="expandable_segments:False"):
        DeviceRank(daemon.address, device, transfer="cuda_ipc")
    with pytest.raises(UnsupportedTensors, match=r"they are in host memory; use \"auto\" or \"shm\""):
        DeviceRank(daemon.address, device, transfer="cuda_ipc", on_device=False)
    device.close()


def test_the_daemon_copies_for_an_engine_that_reaches_it_with_certificates() -> None:
    device = SharedDevice()
    bound = BoundTensors(((device.tensor(8, 4096),),), ())
    tls = TlsFiles("ca.pem", "cert.pem", "key.pem")
    path = choose_path("auto", bound, "kvtier.example:8443", tls, device)
    assert path.remote is not None
    assert path.problem == ""
    with pytest.raises(UnsupportedTensors, match="with certificates"):
        choose_path("cuda_ipc", bound, "kvtier.example:8443", None, device)
    device.close()


def test_a_copy_process_that_is_killed_costs_its_loads_which_are_computed(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    stall = Stall(tmp_path, "helper.before_job")
    daemon = start_daemon(pool_bytes=POOL_BYTES, env=stall.env)
    with rank_of(daemon) as rank:
        rank.wait_remote()
        rank.store_all(range(2), [0, 1, 2, 3])
        helper = helper_pid(daemon)
        stall.arm()
        job_id = rank.load(range(2), [10, 11, 12, 13])
        stall.wait_until_hung()
        os.kill(helper, signal.SIGKILL)
        (failed,) = rank.end(job_id)
        assert failed.block_ids == (10, 11, 12, 13)
        assert len(failed.keys) == 2
        stall.let_go()
        rank.load_all(range(2), [10, 11, 12, 13])
        assert rank.same([10, 11, 12, 13], [0, 1, 2, 3])
        assert helper_pid(daemon) != helper
        (device,) = daemon.status().copy_devices
        assert (device.device, device.state, device.restarts) == ("host", "serving", 1)


def test_a_daemon_that_comes_back_opens_the_memory_again(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(pool_bytes=POOL_BYTES)
    with rank_of(daemon) as rank:
        rank.wait_remote()
        rank.store_all(range(2), [0, 1, 2, 3])
        helper = helper_pid(daemon)
        daemon.kill()
        wait_until(lambda: state_of(helper) == "", "its copy process ends with it")
        daemon.start()
        wait_until(lambda: rank.scheduler.ready and rank.remote.ready, "the new daemon copies")
        rank.load_all(range(2), [10, 11, 12, 13])  # what was stored has outlived it
        assert rank.same([10, 11, 12, 13], [0, 1, 2, 3])
        assert rank.device.settled == 0


def test_a_daemon_that_stands_still_costs_a_load_and_no_request_its_life(
    start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "PING_S", 0.3)
    daemon = start_daemon(pool_bytes=POOL_BYTES)
    with rank_of(daemon) as rank:
        rank.wait_remote()
        rank.store_all(range(2), [0, 1, 2, 3])
        rank.device.compute.hold()  # so that the load is with the copy process when the daemon stops
        job_id = rank.load(range(2), [10, 11, 12, 13])
        wait_until(lambda: daemon.status().copy_devices[0].jobs == 1, "the daemon has the job")
        daemon.signal(signal.SIGSTOP)
        rank.device.compute.let_go()
        (failed,) = rank.end(job_id)
        assert failed.block_ids == (10, 11, 12, 13)
        daemon.signal(signal.SIGCONT)
        wait_until(lambda: rank.scheduler.ready and rank.remote.ready, "the daemon copies again")
        rank.load_all(range(2), [20, 21, 22, 23])
        assert rank.same([20, 21, 22, 23], [0, 1, 2, 3])


class OddDevice(SharedDevice):
    """A driver that fails in ways nobody has thought of."""

    def __init__(self, *, exports: bool) -> None:
        super().__init__()
        self._exports = exports
        if exports:
            self.compute.record = self._fail  # type: ignore[method-assign]

    def export(self, tensor: torch.Tensor) -> MemoryHandle:
        return super().export(tensor) if self._exports else self._fail()

    def mark(self) -> int:
        return 0

    @staticmethod
    def _fail() -> Any:
        raise AttributeError("module 'cuda.bindings.driver' has no attribute 'cuSomething'")


@pytest.mark.parametrize("exports", [False, True])
def test_a_driver_that_is_not_as_we_know_it_costs_speed_and_no_engine(
    exports: bool, start_daemon: StartDaemon, said: list[str]
) -> None:
    daemon = start_daemon(pool_bytes=POOL_BYTES)
    with rank_of(daemon, OddDevice(exports=exports)) as rank:
        if exports:
            rank.wait_remote()
        rank.store_all(range(3), [0, 1, 2, 3, 9, 8])
        rank.load_all(range(3), [10, 20, 30, 31, 12, 11])
        assert rank.same([10, 20, 30, 31, 12, 11], [0, 1, 2, 3, 9, 8])
        assert rank.device.settled > 0
        assert len(said) == 1, said
