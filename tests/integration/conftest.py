"""One daemon per module, and raw engines that attach to it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
from tests.daemon_process import DaemonProcess
from tests.raw_engine import RawEngine

from kvtier.v1 import offload_pb2 as pb

MakeEngine = Callable[..., RawEngine]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon with default settings, shared by a module; engines have namespaces of their own."""
    with DaemonProcess(tmp_path_factory.mktemp("daemon")) as daemon:
        yield daemon.start()


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    """Make engines that are not attached yet; after the test their sessions end."""
    with contextlib.ExitStack() as engines:

        def make(
            daemon: DaemonProcess,
            engine_id: str = "",
            *,
            nonce: int = 0,
            world_size: int = 1,
            facts: pb.NamespaceFacts | None = None,
            tenant: str = "",
        ) -> RawEngine:
            engine = RawEngine(
                daemon.address, engine_id, nonce=nonce, world_size=world_size, facts=facts, tenant=tenant
            )
            return engines.enter_context(engine)

        yield make


@pytest.fixture
def engine(daemon: DaemonProcess, make_engine: MakeEngine) -> RawEngine:
    """An engine with one worker, attached."""
    return make_engine(daemon).attach()
