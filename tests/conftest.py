"""What holds for every test: the marks that come with a folder, how hypothesis searches, real daemons."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.daemon_process import DaemonProcess
    from tests.raw_engine import RawEngine

    from kvtier.v1 import offload_pb2 as pb

TESTS = Path(__file__).parent
MARK_OF_FOLDER = {
    "faults": pytest.mark.faults,
    "gpu": pytest.mark.gpu,
    "mooncake": pytest.mark.mooncake,
    "object": pytest.mark.object,
    "observability": pytest.mark.observability,
}

# No deadline: an example that is slow on a busy machine is no defect. In CI the examples are the same on
# every run, so that a red run can be repeated; by hand they are new each time.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

# A shell without job control starts what it puts into the background with SIGINT ignored, and children
# inherit that: no Ctrl-C of a test would reach a program.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before -m picks by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in MARK_OF_FOLDER:
            item.add_marker(MARK_OF_FOLDER[folder])


def pytest_sessionfinish() -> None:
    """Remove the device memory of engines that were killed together with whoever would have removed it."""
    for path in Path("/dev/shm").glob("kvtier-mem-*"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # its exporter lives as long as this is refused
            path.unlink()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not Path("/dev/nvidiactl").exists():
        pytest.skip("no NVIDIA GPU here")


StartDaemon = Callable[..., "DaemonProcess"]
MakeEngine = Callable[..., "RawEngine"]

# grpc is imported inside these fixtures: most tests need none.


@pytest.fixture
def start_daemon(tmp_path: Path) -> Iterator[StartDaemon]:
    """Start daemons (arguments as DaemonProcess); after the test they are gone, and their pools."""
    from tests.daemon_process import DaemonProcess

    with contextlib.ExitStack() as daemons:

        def start(
            *,
            pool_bytes: int | str = "4MiB",
            config: str = "",
            env: Mapping[str, str] | None = None,
            **options: str,
        ) -> DaemonProcess:
            daemon = DaemonProcess(tmp_path, pool_bytes, config=config, env=env, **options)
            return daemons.enter_context(daemon).start()

        yield start


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon with default settings, shared by a module; engines have namespaces of their own."""
    from tests.daemon_process import DaemonProcess

    with DaemonProcess(tmp_path_factory.mktemp("daemon")) as daemon:
        yield daemon.start()


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    """Make raw engines that are not attached yet; after the test their sessions end."""
    from tests.raw_engine import RawEngine

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
    """A raw engine with one worker, attached to the module's daemon."""
    return make_engine(daemon).attach()
