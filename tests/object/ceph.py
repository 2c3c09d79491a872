"""A real S3 server for tests: one Ceph monitor, manager, memory-backed OSD and RADOS gateway, on loopback.

Owns its processes and a directory of its own, which is removed. Needs no root and no configuration of the
machine's. Everything in it is lost at its end.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

APT = "apt-get install --no-install-recommends ceph-mon ceph-osd ceph-mgr radosgw"
PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "ceph-mgr", "monmaptool", "radosgw", "radosgw-admin")
START_S = 90.0
"""Six times what a start takes on two cores, and less than what a test may take."""

STOP_S = 10.0


def missing_programs() -> list[str]:
    """Name what is not installed."""
    return [program for program in PROGRAMS if shutil.which(program) is None]


class S3(NamedTuple):
    """How to reach the gateway."""

    endpoint: str
    access_key: str
    secret_key: str


class Ceph:
    """A cluster of one machine. `start` before use, `stop` in any case."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="kvtier-run-"))
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._mon_port, self._s3_port = _free_ports(2)
        self.s3 = S3(
            f"http://127.0.0.1:{self._s3_port}", secrets.token_hex(10).upper(), secrets.token_urlsafe(30)
        )

    def start(self) -> None:
        """Return when the gateway answers."""
        fsid = str(uuid.uuid4())
        self._conf.write_text(self._configuration(fsid))
        for name in ("mon", "osd", "mgr"):
            (self._directory / name).mkdir()
        self._start_monitor(fsid)
        self._start_osd()
        self._launch("mgr", "ceph-mgr", "--id", "a")
        self.start_gateway()
        self._run(
            "radosgw-admin", "user", "create", "--uid", "test", "--display-name", "test",
            "--access-key", self.s3.access_key, "--secret-key", self.s3.secret_key,
        )  # fmt: skip

    def make_bucket(self) -> str:
        """Make an empty bucket; returns its name."""
        from datetime import timedelta

        import obstore
        from obstore.store import S3Store

        name = f"bucket-{secrets.token_hex(4)}"
        root = S3Store(
            name,
            config={
                "endpoint": self.s3.endpoint,
                "region": "us-east-1",
                "access_key_id": self.s3.access_key,
                "secret_access_key": self.s3.secret_key,
            },
            client_options={"allow_http": True},
        )
        # The library makes no buckets; a request that it has signed does.
        url = obstore.sign(root, "PUT", "", timedelta(minutes=1))
        with urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=START_S) as reply:
            assert reply.status == 200, reply.status
        return name

    def start_gateway(self) -> None:
        """Start the gateway, anew if it was killed; what was stored is there again."""
        self._launch("rgw", "radosgw", "--name", "client.rgw")
        self._wait(self._answers, "the gateway answers")

    def kill_gateway(self) -> None:
        """End the gateway without a chance to do anything."""
        gateway = self._processes.pop("rgw")
        gateway.send_signal(signal.SIGCONT)
        gateway.kill()
        gateway.wait(STOP_S)

    @contextmanager
    def stopped_gateway(self) -> Iterator[None]:
        """Stop the gateway's process: it accepts connections and says nothing."""
        gateway = self._processes["rgw"]
        gateway.send_signal(signal.SIGSTOP)
        try:
            # Each of its threads answers until it has stopped.
            self._wait(
                lambda: all(state == "T" for state in _thread_states(gateway.pid)), "the gateway stops"
            )
            yield
        finally:
            gateway.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """Kill every process and remove everything."""
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        for process in self._processes.values():
            process.wait(STOP_S)
        self._processes.clear()
        shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def _conf(self) -> Path:
        return self._directory / "ceph.conf"

    def _configuration(self, fsid: str) -> str:
        at = self._directory
        return f"""
[global]
fsid = {fsid}
mon_host = v2:127.0.0.1:{self._mon_port}
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
public_network = 127.0.0.0/8
ms_bind_ipv6 = false
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
run_dir = {at}
admin_socket = {at}/$name.asok
pid_file = {at}/$name.pid
log_file = {at}/$name.log
crash_dir = {at}/crash
keyring = {at}/keyring
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pgp_num = 4
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_warn_on_pool_no_redundancy = false
mon_data_avail_crit = 0
mon_data_avail_warn = 0

[mon]
mon_data = {at}/mon
mon_initial_members = a

[osd]
osd_data = {at}/osd
osd_objectstore = memstore
memstore_device_bytes = 2147483648
osd_memory_target = 939524096
# A gateway that was killed is waited for by the next one for so many seconds; by default 30.
osd_client_watch_timeout = 3

[mgr]
mgr_data = {at}/mgr
mgr_initial_modules =

[client.rgw]
rgw_frontends = beast endpoint=127.0.0.1:{self._s3_port} tcp_nodelay=1
rgw_data = {at}/rgw
rgw_thread_pool_size = 32
rgw_enable_usage_log = false
rgw_enable_gc_threads = false
rgw_enable_lc_threads = false
# Without authentication there is no key to be secure with, which is what a gateway's default asks for.
ms_mon_client_mode = crc
"""

    def _start_monitor(self, fsid: str) -> None:
        monmap = str(self._directory / "monmap")
        self._run(
            "monmaptool", "--create", "--fsid", fsid,
            "--addv", "a", f"[v2:127.0.0.1:{self._mon_port}]", monmap,
        )  # fmt: skip
        self._run("ceph-mon", "--mkfs", "--id", "a", "--monmap", monmap)
        self._launch("mon", "ceph-mon", "--id", "a")
        self._wait(lambda: self._ceph("mon", "stat") is not None, "the monitor answers")

    def _start_osd(self) -> None:
        osd = str(uuid.uuid4())
        self._ceph("osd", "new", osd)
        self._run("ceph-osd", "--mkfs", "--id", "0", "--osd-uuid", osd)
        self._launch("osd", "ceph-osd", "--id", "0")
        self._wait(lambda: "1 up" in (self._ceph("osd", "stat") or ""), "the OSD is up")

    def _ceph(self, *arguments: str) -> str | None:
        command = ["ceph", "--conf", str(self._conf), "--connect-timeout", "5", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=START_S, check=False)
        return done.stdout if done.returncode == 0 else None

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [program, "--conf", str(self._conf), *arguments],
            capture_output=True,
            text=True,
            timeout=START_S,
            check=False,
        )
        assert done.returncode == 0, f"{program} {' '.join(arguments)}: {done.stderr}"

    def _launch(self, name: str, program: str, *arguments: str) -> None:
        with (self._directory / f"{name}.out").open("ab") as out:
            self._processes[name] = subprocess.Popen(
                [program, "--conf", str(self._conf), "--foreground", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "TMPDIR": str(self._directory)},
            )

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.s3.endpoint, timeout=5) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        give_up_at = time.monotonic() + START_S
        while not condition():
            ended = [name for name, process in self._processes.items() if process.poll() is not None]
            assert not ended, f"{ended} ended before {what}: {self._last_words(ended)}"
            assert time.monotonic() < give_up_at, f"waited {START_S:.0f} s in vain for this: {what}"
            time.sleep(0.1)

    def _last_words(self, names: Sequence[str]) -> str:
        files = [*(self._directory / f"{name}.out" for name in names), *self._directory.glob("*.log")]
        return "\n".join(
            f"{file.name}: {file.read_text(errors='replace')[-2000:]}" for file in files if file.exists()
        )


def _thread_states(pid: int) -> list[str]:
    """Letters of the states of a process's threads, as in proc(5)."""
    stats = [(task / "stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return [stat.rpartition(")")[2].split()[0] for stat in stats]


def _free_ports(count: int) -> list[int]:
    """Ports that nobody has now. Should one be taken before it is used, the start fails and says so."""
    with contextlib.ExitStack() as sockets:
        found = [sockets.enter_context(socket.socket()) for _ in range(count)]
        for each in found:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in found]
