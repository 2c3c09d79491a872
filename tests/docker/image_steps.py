"""Do what docker/Dockerfile says, one step after the other, without a container engine; then run the result.

    unshare --mount --pid --fork --kill-child --mount-proc python -m tests.docker.image_steps cpu

Every stage is an overlay over this machine's own root and its own Python 3.11, which stand in for the base
image; nothing that a step does is seen outside, and everything is gone at the end. Then the image's process
runs as its user on a read-only root, in a network of its own: its HEALTHCHECK must pass, its metrics must
answer, and its STOPSIGNAL must end it with exit code 0. Needs root and a network to install from.

Differs from an image: the base has everything that is installed here, so a library that the base image does
not have is not missed. `--base DIR` takes the root of another system, such as debootstrap's, in its place.
"""

from __future__ import annotations

import argparse
import ctypes
import http.client
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.daemon_process import REPOSITORY, wait_until
from tests.docker.dockerfile import Instruction, Stage, expand, is_ignored, read

PASSED_ON = ("PIP_", "SSL_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
"""Variables, or beginnings of them, that steps get from outside: how to reach a package index. The image's
own process gets none of them."""

BASE_ENV = {"PATH": "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"}
DEVICES = ("full", "null", "random", "urandom", "zero")
CLONE_NEWNET = 0x40000000
DOCKER_SHM_BYTES = 64 << 20
"""/dev/shm of a container, unless told otherwise."""
POOL_BYTES = 16 << 20
STOP_S = 45.0
"""What `docker stop --time` is told to wait, in the Dockerfile's words."""


@dataclass(slots=True)
class Image:
    """The file system of a stage so far, and what is to be run in it."""

    root: Path
    layers: list[Path]
    """Its writable layer and those below, uppermost first, without the base's."""
    env: dict[str, str] = field(default_factory=lambda: dict(BASE_ENV))
    args: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "0:0"
    health: list[str] = field(default_factory=list)
    stop_signal: str = "SIGTERM"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def popen(self, command: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start a command in it, as its user."""
        uid, _, gid = self.user.partition(":")
        return subprocess.Popen(
            [
                "chroot",
                f"--userspec={uid}:{gid}",
                "--groups=",
                str(self.root),
                "env",
                "-i",
                "-C",
                self.workdir,
            ]
            + [f"{name}={value}" for name, value in env.items()]
            + list(command),
            env=BASE_ENV,
            stdin=subprocess.DEVNULL,
        )

    def run(self, command: Sequence[str], env: Mapping[str, str]) -> int:
        """Run a command to its end; return its exit code."""
        return self.popen(command, env).wait()


class Builder:
    """Makes images out of stages, below one directory."""

    def __init__(self, directory: Path, base: Path) -> None:
        self._directory = directory
        self._base = base
        self._images: dict[str, Image] = {}

    def build(self, target: str) -> Image:
        """Run every step that `target` needs. Raises AssertionError with the line of a step that fails."""
        dockerfile = read()
        for stage in dockerfile.needed(target):
            image = self._images[stage.name] = self._begin(stage)
            for instruction in stage.instructions:
                print(f"-- {stage.name}, line {instruction.line}: {instruction.name}", flush=True)
                self._step(image, instruction)
        return self._images[target]

    def _begin(self, stage: Stage) -> Image:
        below = self._images.get(stage.base)
        place = self._directory / stage.name
        layers = [place / "layer", *(below.layers if below is not None else [])]
        root = place / "root"
        _overlay(root, layers, self._base, place / "work")
        for name in ("proc", "dev", "tmp"):
            (root / name).mkdir(exist_ok=True)
        # This Python takes the place of the base image's, under the name that it has there.
        prefixes = [layer.with_name("prefix") for layer in layers]
        _overlay(root / "usr/local", prefixes, Path(sys.base_prefix), place / "prefix-work")
        _mount("-t", "proc", "proc", root / "proc")
        _mount("-t", "tmpfs", "-o", "mode=0755", "dev", root / "dev")
        for device in DEVICES:
            (root / "dev" / device).touch()
            _mount("--bind", f"/dev/{device}", root / "dev" / device)
        (root / "dev/shm").mkdir()
        _mount("-t", "tmpfs", "-o", "mode=1777", "tmp", root / "tmp")
        if below is None:
            subprocess.run(["chroot", str(root), "ldconfig"], check=True)
            return Image(root, layers)
        return Image(
            root, layers, dict(below.env), {}, below.workdir, below.user, below.health, below.stop_signal,
            below.entrypoint, below.command,
        )  # fmt: skip

    def _step(self, image: Image, step: Instruction) -> None:
        scope = image.args | image.env
        match step.name:
            case "ARG":
                image.args |= {name: expand(value, scope) for name, value in step.pairs.items()}
            case "ENV":
                image.env |= {name: expand(value, scope) for name, value in step.pairs.items()}
            case "WORKDIR":
                image.workdir = step.value
                (image.root / step.value.lstrip("/")).mkdir(parents=True, exist_ok=True)
            case "USER":
                image.user = expand(step.value, scope)
            case "COPY":
                self._copy(image, step)
            case "RUN":
                code = image.run(["/bin/sh", "-c", step.value], _passed_on() | scope)
                assert code == 0, f"line {step.line} ended with {code}: {step.value}"
            case "HEALTHCHECK":
                image.health = _health_command(step)
            case "STOPSIGNAL":
                image.stop_signal = step.value
            case "ENTRYPOINT":
                image.entrypoint = step.words
            case "CMD":
                image.command = step.words
            case "LABEL" | "EXPOSE" | "VOLUME":
                pass
            case other:
                raise AssertionError(f"line {step.line}: {other} is not known here")

    def _copy(self, image: Image, step: Instruction) -> None:
        *sources, target = step.words
        into = image.root / (Path(image.workdir) / target).as_posix().lstrip("/")
        copied_from = step.flags.get("from")
        for source in sources:
            origin = (
                self._images[copied_from].root / source.lstrip("/") if copied_from else REPOSITORY / source
            )
            if origin.is_dir():
                ignore = None if copied_from else _ignored_in_context
                shutil.copytree(origin, into, symlinks=True, dirs_exist_ok=True, ignore=ignore)
            else:
                into.mkdir(parents=True, exist_ok=True)
                assert copied_from or not is_ignored(source), (
                    f"line {step.line}: .dockerignore hides {source}"
                )
                shutil.copy2(origin, into)


def check(image: Image) -> None:
    """Run an image as a container is run, and see that it does what it says. Raises AssertionError."""
    _leave_network()
    uid, gid = image.user.split(":")
    for volume in ("run/kvtier", "pool", "var/lib/kvtier"):
        # As Kubernetes mounts a volume with an fsGroup: root's own, and open to everybody.
        _mount("-t", "tmpfs", "-o", f"mode=2777,uid=0,gid={gid}", "volume", image.root / volume)
    _mount("-t", "tmpfs", "-o", f"mode=1777,size={DOCKER_SHM_BYTES}", "shm", image.root / "dev/shm")
    _mount("-o", "remount,ro", image.root)

    command = [*image.entrypoint, *image.command]
    assert image.run(command, image.env) == 2, "the default pool does not fit into the /dev/shm of Docker"

    image.env |= {"KVTIER_POOL__BYTES": str(POOL_BYTES), "KVTIER_POOL__DIRECTORY": "/pool/default"}
    daemon = image.popen(command, image.env)
    try:
        wait_until(lambda: daemon.poll() is not None or _is_healthy(image), "HEALTHCHECK passes")
        assert daemon.poll() is None, f"it ended with {daemon.returncode}"
        ids = Path(f"/proc/{daemon.pid}/status").read_text()
        assert f"\nUid:\t{uid}\t{uid}\t{uid}\t{uid}\n" in ids, ids
        assert Path(f"/proc/{daemon.pid}/comm").read_text() == "tini\n"
        assert "kvtier_build_info{" in _page(image, "/metrics")
        assert _page(image, "/readyz") == "serving\n"
        assert image.run(["kvtier", "status"], image.env) == 0
        for module in ("pip", "setuptools", "torch"):
            assert image.run(["python", "-c", f"import {module}"], image.env) == 1, (
                f"{module} is in the image"
            )
        daemon.send_signal(signal.Signals[image.stop_signal])
        assert daemon.wait(STOP_S) == 0, f"stopped, it ended with {daemon.returncode}"
    finally:
        daemon.kill()
    assert image.run(image.health, image.env) == 2, "HEALTHCHECK of a stopped daemon"
    kept = image.root / "pool/default/pool"
    assert kept.stat().st_uid == int(uid)
    assert kept.parent.stat().st_mode & 0o777 == 0o700


def _is_healthy(image: Image) -> bool:
    time.sleep(0.2)  # a start of Python each
    return image.run(image.health, image.env) == 0


def _page(image: Image, path: str) -> str:
    port = int(image.env["KVTIER_SERVER__METRICS_ADDRESS"].rpartition(":")[2])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path)
    return connection.getresponse().read().decode()


def _health_command(step: Instruction) -> list[str]:
    if step.value == "NONE":
        return []
    return Instruction("CMD", step.value.removeprefix("CMD").strip(), {}, step.line).words


def _passed_on() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}


def _overlay(root: Path, layers: Sequence[Path], base: Path, work: Path) -> None:
    for directory in (root, layers[0], work):
        directory.mkdir(parents=True, exist_ok=True)
    lower = ":".join(map(str, [*layers[1:], base]))
    _mount("-t", "overlay", "-o", f"lowerdir={lower},upperdir={layers[0]},workdir={work}", "stage", root)


def _mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)


def _leave_network() -> None:
    """Go on in a network of one's own, which has a loopback: the image's ports are free there."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def _ignored_in_context(directory: str, names: list[str]) -> set[str]:
    place = Path(directory).relative_to(REPOSITORY)
    return {name for name in names if is_ignored(str(place / name))}


def main() -> int:
    """Build a target and run it."""
    parser = argparse.ArgumentParser(description="build and run a target of docker/Dockerfile by hand")
    parser.add_argument("target", choices=list(read().stages))
    parser.add_argument("--base", type=Path, default=Path("/"), help="root of a system (default: this one)")
    options = parser.parse_args()
    _mount("--make-rprivate", "/")
    directory = Path(tempfile.mkdtemp(prefix="kvtier-image-"))
    _mount("-t", "tmpfs", "image", directory)  # layers may not lie in the file system that they lie over
    began = time.monotonic()
    image = Builder(directory, options.base).build(options.target)
    layer_bytes = sum(file.lstat().st_size for layer in image.layers for file in layer.rglob("*"))
    print(f"-- built in {time.monotonic() - began:.0f} s; {layer_bytes >> 20} MiB over the base", flush=True)
    check(image)
    print("-- everything as the Dockerfile says")
    return 0


if __name__ == "__main__":
    sys.exit(main())
