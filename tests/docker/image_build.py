"""The steps of docker/Dockerfile, run one after the other in overlays over a root that is there already.

Owns stages and their mounts; `image_steps.py` says what for. Needs root, and mount and pid namespaces of its
own: nothing is unmounted here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.daemon_process import REPOSITORY
from tests.docker.dockerfile import Instruction, Stage, expand, is_ignored, read

PASSED_ON = ("PIP_", "SSL_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
"""Variables, or beginnings of them, that steps get from outside: how to reach a package index. The image's
own process gets none of them."""

BASE_ENV = {"PATH": "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"}
APART = ("unshare", "--pid", "--ipc", "--net", "--fork", "--kill-child")
DEVICES = ("full", "null", "random", "urandom", "zero")


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

    def popen(
        self, command: Sequence[str], env: Mapping[str, str], *, apart: bool = False
    ) -> subprocess.Popen[bytes]:
        """Start a command in it, as its user. `apart`: with pids, IPC and a network of its own."""
        uid, _, gid = self.user.partition(":")
        return subprocess.Popen(
            [
                *(APART if apart else ()),
                *("chroot", f"--userspec={uid}:{gid}", "--groups=", str(self.root)),
                *("env", "-i", "-C", self.workdir),
                *(f"{name}={value}" for name, value in env.items()),
                *command,
            ],
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
            if stage.name in self._images:
                continue
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
        mount("-t", "proc", "proc", root / "proc")
        mount("-t", "tmpfs", "-o", "mode=0755", "dev", root / "dev")
        for device in DEVICES:
            (root / "dev" / device).touch()
            mount("--bind", f"/dev/{device}", root / "dev" / device)
        (root / "dev/shm").mkdir()
        mount("-t", "tmpfs", "-o", "mode=1777", "tmp", root / "tmp")
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
    mount("-t", "overlay", "-o", f"lowerdir={lower},upperdir={layers[0]},workdir={work}", "stage", root)


def mount(*arguments: str | Path) -> None:
    """Mount something, as the command does with these arguments."""
    subprocess.run(["mount", *map(str, arguments)], check=True)


def _ignored_in_context(directory: str, names: list[str]) -> set[str]:
    place = Path(directory).relative_to(REPOSITORY)
    return {name for name in names if is_ignored(str(place / name))}
