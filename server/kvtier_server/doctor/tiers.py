"""The tiers below the pool, by their configuration: can what they need be had from here?"""

from __future__ import annotations

import mmap
import os
import secrets
import shlex
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kvtier_server.doctor.finding import Finding, failed, passed, skipped, warned
from kvtier_server.doctor.installation import installed_version
from kvtier_server.units import format_bytes

if TYPE_CHECKING:
    from kvtier_server.config_tiers import TierSettings
    from kvtier_server.secondary.filesystem.tier import FilesystemParameters
    from kvtier_server.secondary.mooncake.parameters import MooncakeParameters
    from kvtier_server.secondary.object_store.parameters import ObjectParameters

CONNECT_S = 1.0
"""For a master in the same data centre."""

DIRECT_BYTES = 4096

PACKAGES = {"object": "obstore", "mooncake": "mooncake-transfer-engine-non-cuda"}
"""The distribution behind each extra."""


def check_tiers(tiers: tuple[TierSettings, ...], config_file: Path | None) -> Iterator[Finding]:
    """Look at each tier of the configuration."""
    if not tiers:
        yield skipped("tier", "the configuration has no tiers below the pool")
        return
    from kvtier_server.secondary.filesystem.tier import FilesystemParameters
    from kvtier_server.secondary.mooncake.parameters import MooncakeParameters
    from kvtier_server.secondary.object_store.parameters import ObjectParameters

    edit = f"${{EDITOR:-vi}} {shlex.quote(str(config_file))}" if config_file else "kvtier serve --help"
    for common, parameters in tiers:
        name = f"tier.{common.name}"
        if isinstance(parameters, FilesystemParameters):
            yield from check_filesystem(name, parameters, edit)
        elif isinstance(parameters, ObjectParameters):
            yield from check_object(name, parameters)
        elif isinstance(parameters, MooncakeParameters):
            yield from check_mooncake(name, parameters)
        else:
            yield skipped(name, f"nothing is known of what a tier of the type {common.type} needs")


def check_filesystem(name: str, parameters: FilesystemParameters, edit: str) -> Iterator[Finding]:
    """Check that the root can be written, has room, and takes O_DIRECT where that is wanted."""
    root = Path(parameters.root)
    directory = _existing(root)
    if not directory.is_dir():
        yield failed(name, f"{directory} is no directory", edit)
        return
    if not os.access(directory, os.W_OK | os.X_OK):
        fix = f"sudo install -d -m 0700 -o {os.geteuid()} {shlex.quote(str(root))}"
        yield failed(name, f"uid {os.geteuid()} may not write to {directory}", fix)
        return
    made = "" if directory == root else ", made at the first start"
    yield passed(name, f"{root} can be written{made}")
    yield _check_room(name, parameters, directory, edit)
    if parameters.direct != "off":
        yield _check_direct(name, parameters, directory, edit)


def _existing(path: Path) -> Path:
    return next(each for each in (path, *path.parents) if each.exists())


def _check_room(name: str, parameters: FilesystemParameters, directory: Path, edit: str) -> Finding:
    found = os.statvfs(directory)
    total_bytes, free_bytes = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    reserve_bytes = int(total_bytes * parameters.reserve_free)
    text = (
        f"{format_bytes(free_bytes)} of {format_bytes(total_bytes)} are free, the tier may keep "
        f"{format_bytes(parameters.capacity)}, and leaves {format_bytes(reserve_bytes)} free"
    )
    if free_bytes <= reserve_bytes:
        return warned(name, f"{text}: it writes nothing", f"df -h {shlex.quote(str(directory))}; {edit}")
    if parameters.capacity > total_bytes - reserve_bytes:
        return warned(name, f"{text}: the capacity is more than there is", edit)
    return passed(name, text)


def _check_direct(name: str, parameters: FilesystemParameters, directory: Path, edit: str) -> Finding:
    problem = direct_problem(directory)
    if not problem:
        return passed(name, f"O_DIRECT works in {directory}")
    if parameters.direct == "on":
        return failed(name, f'{problem}, and direct is "on"', edit)
    text = f'{problem}: chunks fill the page cache; direct = "off" says that this is meant'
    return warned(name, text, edit)


def direct_problem(directory: Path) -> str:
    """Write a block past the page cache and read it, in a file without a name; return what went wrong."""
    block = mmap.mmap(-1, DIRECT_BYTES)  # O_DIRECT asks for memory on a block's boundary
    content = secrets.token_bytes(DIRECT_BYTES)
    block[:] = content
    try:
        fd = _open_unnamed(directory)
        try:
            os.pwritev(fd, [block], 0)
            block[:] = bytes(DIRECT_BYTES)
            os.preadv(fd, [block], 0)
        finally:
            os.close(fd)
    except OSError as error:
        return f"O_DIRECT does not work in {directory} ({error.strerror})"
    return "" if block[:] == content else f"O_DIRECT in {directory} does not read what it wrote"


def _open_unnamed(directory: Path) -> int:
    flags = os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC
    try:
        return os.open(directory, flags | os.O_TMPFILE, 0o600)
    except OSError:
        # Not every file system has files without a name. This one's is gone at once.
        path = directory / f".kvtier-doctor-{secrets.token_hex(8)}"
        try:
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
        finally:
            path.unlink(missing_ok=True)


def _check_package(name: str, extra: str) -> Finding:
    package = PACKAGES[extra]
    version = installed_version(package)
    if version is None:
        return failed(
            name, f"{package} is not installed", f"in kvtier's directory: pip install '.[server,{extra}]'"
        )
    return passed(name, f"{package} {version}")


def check_object(name: str, parameters: ObjectParameters) -> Iterator[Finding]:
    """Check that the package is there, and the files with its secrets. Asks no store."""
    yield _check_package(name, "object")
    fields = ("access_key_file", "secret_key_file", "session_token_file", "service_account_file", "ca_file")
    for key in fields:
        file = str(getattr(parameters, key))
        if not file:
            continue
        if os.access(file, os.R_OK):
            yield passed(name, f"{key} {file} can be read")
        else:
            yield failed(
                name, f"{key} {file} cannot be read by uid {os.geteuid()}", f"ls -l {shlex.quote(file)}"
            )


def check_mooncake(name: str, parameters: MooncakeParameters) -> Iterator[Finding]:
    """Check that the package is there, and that the master can be reached."""
    from kvtier_server.secondary.mooncake.parameters import split_address

    yield _check_package(name, "mooncake")
    host, port = split_address(parameters.master)
    began = time.monotonic()
    try:
        socket.create_connection((host, port), CONNECT_S).close()
    except OSError as error:
        text = f"no master at {parameters.master} ({error}); until there is one every lookup misses"
        yield warned(name, text, f"mooncake_master --rpc_address={host} --rpc_port={port}")
    else:
        yield passed(name, f"master at {parameters.master}, {(time.monotonic() - began) * 1e3:.1f} ms away")
