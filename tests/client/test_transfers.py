"""Copies of the daemon, against a peer that registers memory in ways that no daemon should."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from kvtier.v1 import transfer_pb2 as pb
from kvtier.v1 import transfer_pb2_grpc
from kvtier_client.jobs import CopyFailure, JobId, JobKind, LoadJob
from kvtier_client.transfers import Copied, RemoteCopies
from kvtier_ops.locks import OwnerLock

from .builders import wait_until
from .doubles import session

LOAD = LoadJob(JobId(1), 1, (1,), (1,), (b"k",), (1,), (1,), (0,), load_lease_id=3)
NO_LOCK_NAMES = ["", "../pool", "ABCDEF", "0" * 65]


class Registrar(transfer_pb2_grpc.TransferServiceServicer):
    """Registers everything, and ends a stream without an answer as soon as a job is there."""

    def __init__(self, socket: Path) -> None:
        self.address = f"unix://{socket}"
        self.lock_file = "0"
        self.server = grpc.server(ThreadPoolExecutor(4))
        transfer_pb2_grpc.add_TransferServiceServicer_to_server(self, self.server)
        self.server.add_insecure_port(self.address)
        self.server.start()

    def RegisterMemory(  # noqa: N802
        self, request: pb.RegisterMemoryRequest, context: grpc.ServicerContext
    ) -> pb.RegisterMemoryResponse:
        return pb.RegisterMemoryResponse(boot_id="b", memory_id=1, lock_file=self.lock_file)

    def Transfer(  # noqa: N802
        self, requests: Iterator[pb.TransferRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.TransferResponse]:
        next(requests)
        context.abort(grpc.StatusCode.UNAVAILABLE, "gone")


@pytest.fixture
def registrar(tmp_path: Path) -> Iterator[Registrar]:
    registrar = Registrar(tmp_path / "s")
    yield registrar
    registrar.server.stop(0).wait()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A pool's, of this user alone."""
    made = tmp_path / "pool"
    made.mkdir(mode=0o700)
    return made


@pytest.mark.parametrize("name", NO_LOCK_NAMES)
def test_a_registration_whose_lock_has_no_proper_name_is_not_taken(
    registrar: Registrar, tmp_path: Path, name: str
) -> None:
    registrar.lock_file = name
    refusals: list[str] = []
    remote = RemoteCopies(registrar.address, [[]])
    remote.on_refused = refusals.append
    remote.begin(session(), tmp_path)
    wait_until(lambda: remote.ready or bool(refusals), "the registration is answered")

    assert not remote.ready
    assert remote.problem == refusals[0]
    assert f"lock_file: {name!r}" in remote.problem
    assert not remote.submit(LOAD, JobKind.LOAD, False, lambda copied: None)
    remote.end()


def test_a_registration_without_any_file_that_tells_the_end_of_copies_is_not_taken(
    registrar: Registrar, tmp_path: Path
) -> None:
    registrar.lock_file = "ab12"
    remote = RemoteCopies(registrar.address, [[]])
    remote.begin(session(), tmp_path)
    wait_until(lambda: bool(remote.problem), "the registration is answered")

    assert not remote.ready
    assert f"files of {tmp_path} are missing" in remote.problem
    remote.end()


def test_a_load_whose_copies_nobody_can_prove_to_be_over_ends_with_the_next_session(
    registrar: Registrar, directory: Path
) -> None:
    copier = OwnerLock.acquire(directory)
    registrar.lock_file = copier.name
    remote = RemoteCopies(registrar.address, [[]])
    broken: list[str] = []
    remote.on_broken = lambda session_id, reason: broken.append(reason)
    remote.begin(session(), directory)
    wait_until(lambda: remote.ready, "the memory is registered")
    (directory / "owners" / copier.name).unlink()  # a file that is gone proves nothing
    ended: list[Copied] = []
    assert remote.submit(LOAD, JobKind.LOAD, False, ended.append)
    wait_until(lambda: bool(broken), "the stream ends")
    assert not ended  # bytes may still arrive, for all that this process knows

    remote.begin(session(), directory)
    wait_until(lambda: bool(ended), "the load ends")
    assert ended[0].failures == [CopyFailure.SESSION_LOST]
    remote.end()
    copier.release()
