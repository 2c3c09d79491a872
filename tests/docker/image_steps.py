"""Do what docker/Dockerfile says, one step after the other, without a container engine; then run the result.

    unshare --mount --pid --fork --kill-child --mount-proc python -m tests.docker.image_steps cpu

Every stage is an overlay over this machine's own root and its own Python 3.11, which stand in for the base
image; nothing that a step does is seen outside, and everything is gone at the end. Then the image's process
runs as its user on a read-only root, in a network of its own.

A daemon: its HEALTHCHECK must pass, its metrics must answer, and its STOPSIGNAL must end it with exit code 0.
`demo`: its engine, in namespaces of its own, works on a daemon from `cpu` with nothing between them but the
two volumes of compose.yaml, and is killed. Needs root, and a network to install from.

Differs from an image: the base has everything that is installed here, so a library that the base image does
not have is not missed. `--base DIR` takes the root of another system, such as debootstrap's, in its place.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import http.client
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from tests.daemon_process import REPOSITORY, wait_until
from tests.docker.image_build import Builder, Image, mount

CLONE_NEWNET = 0x40000000
DOCKER_SHM_BYTES = 64 << 20
"""/dev/shm of a container, unless told otherwise."""
POOL = {"KVTIER_POOL__BYTES": str(32 << 20), "KVTIER_POOL__DIRECTORY": "/pool/default"}
STOP_S = 45.0
"""What `docker stop --time` is told to wait, in the Dockerfile's words."""
SMALL_LOAD = ["--conversations", "2", "--turns", "2", "--num-blocks", "64"]


class Volumes:
    """Volumes that several containers mount, by the place they are mounted at."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def mount(self, image: Image, *places: str) -> None:
        """Mount them, and make the image's root read-only."""
        for place in places:
            volume = self._directory / place.replace("/", "-")
            if not volume.exists():
                # As Kubernetes makes a volume with an fsGroup: root's own, and open to everybody.
                volume.mkdir(parents=True)
                gid = image.user.partition(":")[2]
                mount("-t", "tmpfs", "-o", f"mode=2777,uid=0,gid={gid}", "volume", volume)
            mount("--bind", volume, image.root / place)
        mount("-t", "tmpfs", "-o", f"mode=1777,size={DOCKER_SHM_BYTES}", "shm", image.root / "dev/shm")
        mount("-o", "remount,ro", image.root)


def check_daemon(image: Image, volumes: Volumes) -> None:
    """Run a daemon as a container is run, and see that it does what it says. Raises AssertionError."""
    volumes.mount(image, "run/kvtier", "pool", "var/lib/kvtier")
    command = [*image.entrypoint, *image.command]
    assert image.run(command, image.env) == 2, "the default pool does not fit into the /dev/shm of Docker"
    with running_daemon(image) as daemon:
        uid = image.user.partition(":")[0]
        ids = Path(f"/proc/{daemon.pid}/status").read_text()
        assert f"\nUid:\t{uid}\t{uid}\t{uid}\t{uid}\n" in ids, ids
        assert Path(f"/proc/{daemon.pid}/comm").read_text() == "tini\n"
        assert "kvtier_build_info{" in page(image, "/metrics")
        assert page(image, "/readyz") == "serving\n"
        assert image.run(["kvtier", "status"], image.env) == 0
        for module in ("pip", "setuptools", "torch"):
            assert image.run(["python", "-c", f"import {module}"], image.env) == 1, f"{module} is in there"
    assert image.run(image.health, image.env) == 2, "HEALTHCHECK of a stopped daemon"
    kept = image.root / "pool/default/pool"
    assert kept.stat().st_uid == int(uid)
    assert kept.parent.stat().st_mode & 0o777 == 0o700


def check_engine(daemon_image: Image, image: Image, volumes: Volumes) -> None:
    """Run the load of compose.yaml on a daemon in another container. Raises AssertionError."""
    service = yaml.safe_load((REPOSITORY / "docker" / "compose.yaml").read_text())["services"]["load"]
    places = [each.partition(":")[2].lstrip("/") for each in service["volumes"]]
    volumes.mount(daemon_image, *places, "var/lib/kvtier")
    volumes.mount(image, *places)
    load = [*service["entrypoint"], *SMALL_LOAD]
    with running_daemon(daemon_image):
        assert image.popen([*load, "--rounds", "2"], image.env, apart=True).wait() == 0
        pool = status(daemon_image)["tiers"][0]
        assert pool["chunks"] > 0, pool

        engine = image.popen(service["entrypoint"], image.env, apart=True)  # at full size: some ten seconds
        owners = daemon_image.root / "pool/default/owners"
        wait_until(lambda: status(daemon_image)["tiers"][0]["reserved_slots"] > 0, "the engine holds slots")
        assert any(owners.iterdir())
        engine.kill()
        engine.wait()
        # Its lock is free when its mapping is gone, though neither process has ever known the other's pid.
        wait_until(
            lambda: not any(owners.iterdir()), "the daemon knows that the engine cannot write any more"
        )
        wait_until(lambda: is_as_before(status(daemon_image)), "nothing is left of the engine")


def is_as_before(status: dict[str, Any]) -> bool:
    """Tell whether a daemon without engines has every slot."""
    pool = status["tiers"][0]
    return not status["sessions"] and pool["quarantined_slots"] == pool["reserved_slots"] == 0


@contextlib.contextmanager
def running_daemon(image: Image) -> Iterator[subprocess.Popen[bytes]]:
    """Start the image's process with a small pool, wait for its health, and stop it as Docker does."""
    image.env |= POOL
    daemon = image.popen([*image.entrypoint, *image.command], image.env)
    try:
        wait_until(lambda: daemon.poll() is not None or is_healthy(image), "HEALTHCHECK passes")
        assert daemon.poll() is None, f"it ended with {daemon.returncode}"
        yield daemon
        daemon.send_signal(signal.Signals[image.stop_signal])
        assert daemon.wait(STOP_S) == 0, f"stopped, it ended with {daemon.returncode}"
    finally:
        daemon.kill()


def is_healthy(image: Image) -> bool:
    """Ask as the container engine does."""
    return image.run(image.health, image.env) == 0


def status(image: Image) -> dict[str, Any]:
    """Return the daemon's own figures, at most a second old."""
    found: dict[str, Any] = json.loads(page(image, "/debug/status"))
    return found


def page(image: Image, path: str) -> str:
    """Get one of the daemon's pages."""
    port = int(image.env["KVTIER_SERVER__METRICS_ADDRESS"].rpartition(":")[2])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path)
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def leave_network() -> None:
    """Go on in a network of one's own, which has a loopback: the image's ports are free there."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def main() -> int:
    """Build a target and run it."""
    parser = argparse.ArgumentParser(description="build and run a target of docker/Dockerfile by hand")
    parser.add_argument("target", choices=["cpu", "cuda12", "cuda13", "demo"])
    parser.add_argument("--base", type=Path, default=Path("/"), help="root of a system (default: this one)")
    options = parser.parse_args()
    mount("--make-rprivate", "/")
    directory = Path(tempfile.mkdtemp(prefix="kvtier-image-"))
    mount("-t", "tmpfs", "image", directory)  # layers may not lie in the file system that they lie over
    began = time.monotonic()
    builder = Builder(directory, options.base)
    image = builder.build(options.target)
    daemon = builder.build("cpu") if options.target == "demo" else image
    layer_bytes = sum(file.lstat().st_size for layer in image.layers for file in layer.rglob("*"))
    print(f"-- built in {time.monotonic() - began:.0f} s; {layer_bytes >> 20} MiB over the base", flush=True)
    leave_network()
    volumes = Volumes(directory / "volumes")
    if daemon is image:
        check_daemon(image, volumes)
    else:
        check_engine(daemon, image, volumes)
    print("-- everything as the Dockerfile says")
    return 0


if __name__ == "__main__":
    sys.exit(main())
