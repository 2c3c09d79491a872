"""Another user of the machine: what it can reach of a daemon, and what it can put in its way."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import MakeEngine, StartDaemon
from tests.daemon_process import DaemonProcess, wait_until
from tests.raw_engine import to_keys

from kvtier.v1 import offload_pb2 as pb

NOBODY = 65534

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")

TRY = """
import os, socket, sys
socket_file, pool = sys.argv[1:]
def attempt(what, act):
    try:
        act()
        print(what, "worked")
    except PermissionError:
        print(what, "refused")
attempt("connect", lambda: socket.socket(socket.AF_UNIX).connect(socket_file))
attempt("replace", lambda: os.rename(socket_file, socket_file + ".old"))
attempt("read", lambda: os.open(pool, os.O_RDONLY))
attempt("write", lambda: os.open(pool, os.O_RDWR))
attempt("lock", lambda: os.open(os.path.dirname(pool) + "/daemon.lock", os.O_RDWR))
attempt("list", lambda: os.listdir(os.path.dirname(pool)))
"""


@pytest.fixture
def open_dir() -> Iterator[Path]:
    """A directory that everybody may use, as /tmp. To be asked for before a daemon that writes to it."""
    directory = Path(tempfile.mkdtemp(prefix="kvtier-run-"))
    directory.chmod(0o1777)
    yield directory
    shutil.rmtree(directory)


def as_nobody(daemon: DaemonProcess) -> list[str]:
    done = subprocess.run(
        ["/usr/bin/env", "python3", "-c", TRY, str(daemon.socket), str(daemon.pool_file)],
        user=NOBODY, group=NOBODY, extra_groups=[], cwd="/", env={"PATH": os.environ["PATH"]},
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return done.stdout.splitlines()


REFUSED = [f"{what} refused" for what in ("connect", "replace", "read", "write", "lock", "list")]


@as_root
def test_another_user_can_neither_call_the_daemon_nor_open_its_pool(
    open_dir: Path, start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon(address=f"unix://{open_dir}/s/kvtier.sock")
    make_engine(daemon).attach().store(to_keys([1]))
    for path, mode in (
        (daemon.socket, 0o600),
        (daemon.socket.parent, 0o700),
        (daemon.pool_file, 0o600),
        (daemon.pool_directory, 0o700),
        (daemon.pool_directory / "daemon.lock", 0o600),
        (daemon.pool_directory / "owners", 0o700),
    ):
        assert path.stat().st_mode & 0o777 == mode, path
    assert as_nobody(daemon) == REFUSED
    # The directory is one wall; behind it the files' own modes are another.
    daemon.socket.parent.chmod(0o711)
    daemon.pool_directory.chmod(0o711)
    assert as_nobody(daemon) == REFUSED


@as_root
@pytest.mark.parametrize("place", ["the directory", "on the way", "of root"])
def test_a_socket_directory_behind_another_ones_link_is_refused(
    tmp_path: Path, open_dir: Path, place: str
) -> None:
    target = open_dir / "target"
    (target / "s").mkdir(parents=True, mode=0o700)
    link = open_dir / "link"
    link.symlink_to(target / "s" if place == "the directory" else target)
    if place != "of root":
        os.lchown(link, NOBODY, NOBODY)
    directory = link if place == "the directory" else link / "s"
    with DaemonProcess(tmp_path, address=f"unix://{directory}/kvtier.sock") as daemon:
        if place == "of root":
            daemon.start()
            return
        assert daemon.launch().wait() == 2
        assert f"{link} is a link that uid {NOBODY} has made" in daemon.log_text()
        assert "--address" in daemon.log_text()
    assert os.listdir(target / "s") == []


@as_root
def test_a_socket_directory_of_another_user_is_refused(tmp_path: Path, open_dir: Path) -> None:
    theirs = open_dir / "theirs"
    theirs.mkdir(mode=0o755)
    os.chown(theirs, NOBODY, NOBODY)
    with DaemonProcess(tmp_path, address=f"unix://{theirs}/kvtier.sock") as daemon:
        assert daemon.launch().wait() == 2
        assert f"belongs to uid {NOBODY}" in daemon.log_text()


@as_root
@pytest.mark.parametrize("planted", ["directory of another user", "link"])
def test_a_pool_directory_that_another_user_has_made_is_refused(tmp_path: Path, planted: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    with DaemonProcess(tmp_path) as daemon:
        if planted == "link":
            daemon.pool_directory.symlink_to(elsewhere)
            os.lchown(daemon.pool_directory, NOBODY, NOBODY)
        else:
            daemon.pool_directory.mkdir(mode=0o700)
            os.chown(daemon.pool_directory, NOBODY, NOBODY)
        try:
            assert daemon.launch().wait() == 2
            assert str(daemon.pool_directory) in daemon.log_text()
            assert "--name" in daemon.log_text() or "another pool name" in daemon.log_text()
            assert "Traceback" not in daemon.log_text()
        finally:
            if planted == "link":
                daemon.pool_directory.unlink()
    assert os.listdir(elsewhere) == []


def tier(root: Path, state: Path) -> str:
    return (
        f'[[tiers]]\ntype = "filesystem"\nroot = "{root}"\ncapacity = "64MiB"\n'
        f'state_directory = "{state}"\ndirect = "off"\n'
    )


@as_root
@pytest.mark.parametrize("place", ["root", "on the way", "kvtier-1", "owner", "state"])
def test_a_tier_in_a_place_that_another_user_decides_about_is_refused(
    tmp_path: Path, open_dir: Path, place: str
) -> None:
    target, root, state = open_dir / "target", open_dir / "root", open_dir / "state"
    (target / "chunks").mkdir(parents=True)
    match place:
        case "root":
            planted = root
            root.symlink_to(target)
        case "on the way":
            planted = open_dir / "link"
            planted.symlink_to(target)
            root = planted / "chunks"
        case "kvtier-1":
            root.mkdir()
            planted = root / "kvtier-1"
            planted.symlink_to(target)
        case "owner":
            root.mkdir()
            planted = root / "kvtier-1"
            planted.mkdir()
        case _:
            planted = state
            state.symlink_to(target)
    os.lchown(planted, NOBODY, NOBODY)
    with DaemonProcess(tmp_path, config=tier(root, state)) as daemon:
        assert daemon.launch().wait() == 2
        said = daemon.log_text()
        assert "Traceback" not in said
        assert "tier 'filesystem': " in said
        assert planted.name in said
        assert "remove it" in said or "name another" in said
    assert os.listdir(target) == ["chunks"]
    assert os.listdir(target / "chunks") == []


@as_root
def test_links_that_are_planted_below_a_root_while_it_is_used_lead_nowhere(
    open_dir: Path, start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    root, target = open_dir / "root", open_dir / "target"
    target.mkdir()
    daemon = start_daemon(config=tier(root, open_dir / "state"))
    engine = make_engine(daemon).attach()
    engine.store(to_keys(range(64)), request_id="first")
    wait_until(lambda: len(list(root.rglob("*.chunk"))) == 64, "the chunks are on disk")
    (space,) = [path for path in (root / "kvtier-1").iterdir() if path.is_dir()]
    for directory in space.iterdir():
        if directory.is_dir():
            shutil.rmtree(directory)
            directory.symlink_to(target)
            os.lchown(directory, NOBODY, NOBODY)
    engine.store(to_keys(range(64, 512)), request_id="second")
    failures = re.compile(r'kvtier_tier_io_failures_total{tier="filesystem"} [1-9]')
    wait_until(
        lambda: bool(failures.search(daemon.page("/metrics")[1])), "the tier counts what it cannot write"
    )
    assert os.listdir(target) == []
    statuses = set(engine.lookup(to_keys(range(512))).statuses)
    assert statuses == {pb.LOOKUP_STATUS_HIT}, "the pool has them all"
    assert os.listdir(target) == []


HOSTILE = [
    "../../escape",
    "..",
    "/etc/kvtier",
    "a/../../b",
    "..\\..\\c",
    "%2e%2e%2f",
    "$(touch x)",
    "'; --",
    "-rf",
]


def test_names_of_tenants_engines_and_models_never_become_paths(
    start_daemon: StartDaemon, make_engine: MakeEngine, tmp_path: Path
) -> None:
    """Over every tier that keeps names: files, objects, the index of each, and the pool's registry."""
    inside, state = tmp_path / "inside", tmp_path / "state"
    config = (
        tier(inside / "files", state)
        + f'[[tiers]]\ntype = "object"\nurl = "file://{inside}/objects"\ncapacity = "64MiB"\n'
        + f'state_directory = "{state}"\n'
    )
    (inside / "objects").mkdir(parents=True)
    before = set(Path("/etc").iterdir()) | set(tmp_path.parent.iterdir())
    daemon = start_daemon(config=config)
    for number, name in enumerate(HOSTILE):
        engine = make_engine(daemon, f"{name}-engine", tenant=name)
        engine.facts.model = name
        engine.facts.weights_id = name
        engine.attach().store(to_keys([number]))
    every = len(HOSTILE)
    wait_until(lambda: len(list(inside.rglob("*.chunk"))) >= 2 * every, "each chunk is in both tiers")
    stored = [path.relative_to(inside).as_posix() for path in inside.rglob("*")]
    for name in HOSTILE:
        assert not any(name in path for path in stored)
    daemon.kill()
    shutil.rmtree(daemon.pool_directory)
    daemon.start()
    for number, name in enumerate(HOSTILE):
        engine = make_engine(daemon, f"{name}-engine", tenant=name)
        engine.facts.model = name
        engine.facts.weights_id = name
        engine.attach()
        found = engine.lookup(to_keys([number]), lease_id=1, pending_wait_ms=2000)
        assert found.statuses[0] in (pb.LOOKUP_STATUS_HIT, pb.LOOKUP_STATUS_PENDING), name
    after = set(Path("/etc").iterdir()) | set(tmp_path.parent.iterdir())
    assert after == before
    assert {path.name for path in tmp_path.iterdir()} == {"inside", "state", daemon.name}
