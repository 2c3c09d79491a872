"""The daemon's certificate and the authority of its clients, read again when the files change.

Owns the files' contents. A thread of its own looks at the files; gRPC, which asks before every handshake on
threads of its own, is handed what is ready and waits for no file. Connections that are open keep what they
were made with, those made a second later see what the files say. Files that cannot be used change nothing:
what was read before stays, and a line in the log says why.
"""

from __future__ import annotations

import os
import ssl
import stat
import threading
import time
from pathlib import Path

import grpc
import structlog

from kvtier_server.config_tls import FILES, TlsConfig
from kvtier_server.regular_file import FileUnreadable, FileUnusable, read_regular_file
from kvtier_server.socket_lock import StartError

MAX_FILE_BYTES = 4 << 20
"""Of one PEM file: a system's whole list of authorities has a quarter of it."""

LOOK_S = 1.0
"""Between two looks at the files."""

HANGS_S = 10.0
"""A look that takes longer is logged: the files lie where nothing answers any more."""

REPLACING_S = 0.05
"""Between having new files and handing them to gRPC; see `Certificates.latest`."""

log = structlog.get_logger("kvtier.certificates")

_Version = tuple[tuple[int, int, int, int, int], ...]
"""What tells a file from the one it replaced: device, inode, both times and size, of all three. The second
time, of the inode, changes with its mode and owner too: who may read a file is part of what it is."""

_Content = tuple[bytes, bytes, bytes]
"""Certificate, key, authorities."""


class CertificatesError(Exception):
    """The files cannot be used; the message names the file."""


class _Unreadable(CertificatesError):
    """The system refuses a file; it may not the next time, though the file is the same."""


class Certificates:
    """What a listening address presents and demands. Made on the main thread; asked on gRPC's."""

    def __init__(self, config: TlsConfig) -> None:
        """Read the files. Raises StartError."""
        self._paths = {name: Path(getattr(config, name)) for name in FILES}
        self._lock = threading.Lock()
        """Held for what gRPC is handed, never for a file."""
        self._ready: grpc.ServerCertificateConfiguration | None = None
        self._refused: _Version | None = None
        self._told = ""
        self._stopped = threading.Event()
        self._looks_since: float | None = None
        try:
            self._version = self._current_version()
            self._content = self._read()
        except CertificatesError as error:
            raise StartError(f"tls: {error}", 2) from None
        if self._paths["key_file"].stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            path = self._paths["key_file"]
            log.warning("tls_key_open_to_others", file=str(path), fix=f"chmod 600 {path}")

    def credentials(self) -> grpc.ServerCredentials:
        """Return credentials that demand a certificate of every client, and follow the files."""
        first = _configuration(self._content)
        # The types know no None, which gRPC takes as "nothing has changed".
        return grpc.dynamic_ssl_server_credentials(first, self.latest, True)  # type: ignore[arg-type]

    def follow(self) -> None:
        """Look at the files from now on, every LOOK_S."""
        threading.Thread(target=self._look_until_stopped, name="kvtier-certificates", daemon=True).start()

    def stop(self) -> None:
        """Look no more. Waits for nothing: a look that hangs ends with the process."""
        self._stopped.set()

    def _look_until_stopped(self) -> None:
        while not self._stopped.wait(LOOK_S):
            self._looks_since = time.monotonic()
            try:
                self.look()
            except Exception:  # a bug of ours must be seen, and the next files may be others
                log.exception("tls_look_failed", effect="the last files stay in use")
            self._looks_since = None

    def latest(self) -> grpc.ServerCertificateConfiguration | None:
        """Return what new files say; None where that is what gRPC has. On gRPC's threads.

        None, and not the same again: whatever is returned replaces what handshakes of other threads are
        about to use, and gRPC frees it under their hands (its issue 36693; 500 handshakes at once ended the
        process). So there is also a pause before a replacement, in which those come through that asked
        before: they need microseconds, and who asks now waits for this call.
        """
        with self._lock:
            since = self._looks_since
            if since is not None and time.monotonic() - since > HANGS_S:
                self._tell("the files do not answer")
            if self._ready is not None:
                time.sleep(REPLACING_S)
            ready, self._ready = self._ready, None
            return ready

    def look(self) -> None:
        """Read the files if they are others than before, and have them ready for gRPC. On one thread."""
        try:
            version = self._current_version()
            if version == self._version:
                self._told = ""
            elif version != self._refused:
                self._read_anew(version)
        except CertificatesError as error:
            self._tell(str(error))

    def _tell(self, why: str) -> None:
        """Log why the files are not taken: once, not at every look."""
        if why != self._told:
            self._told = why
            log.error("tls_files_refused", why=why, effect="the last ones stay in use")

    def _read_anew(self, version: _Version) -> None:
        """Read new files. Raises CertificatesError; these are not read again then, but for _Unreadable."""
        try:
            content = self._read()
        except _Unreadable:
            raise
        except CertificatesError:
            self._refused = version
            raise
        self._refused = None
        if self._current_version() != version:
            return  # somebody is writing them: the next look is soon
        self._version, self._told = version, ""
        if content == self._content:
            return  # touched, or given another mode: nothing for gRPC
        self._content = content
        with self._lock:
            self._ready = _configuration(content)
        log.info("tls_files_reloaded", certificate=str(self._paths["certificate_file"]))

    def _current_version(self) -> _Version:
        return tuple(_version_of(name, path) for name, path in self._paths.items())

    def _read(self) -> _Content:
        """Read and check. Raises CertificatesError."""
        certificate, key, authorities = (_content_of(name, path) for name, path in self._paths.items())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # Paths, not the bytes: Python's ssl takes nothing else. Whoever reads compares versions after.
            context.load_cert_chain(self._paths["certificate_file"], self._paths["key_file"], _no_password)
        except (ssl.SSLError, OSError, ValueError) as error:
            if isinstance(error, OSError) and not isinstance(error, ssl.SSLError):
                raise _Unreadable(f"certificate_file or key_file cannot be read: {error.strerror}") from error
            both = f"{self._paths['certificate_file']} and {self._paths['key_file']}"
            raise CertificatesError(
                f"certificate_file and key_file ({both}) are no certificate and its key, in PEM and "
                f"without a password: {_why(error)}"
            ) from error
        try:
            context.load_verify_locations(cadata=authorities.decode("ascii"))
        except (ssl.SSLError, ValueError) as error:
            path = self._paths["client_ca_file"]
            raise CertificatesError(
                f"client_ca_file ({path}) has no certificates in PEM: {_why(error)}"
            ) from error
        return certificate, key, authorities


def _configuration(content: _Content) -> grpc.ServerCertificateConfiguration:
    certificate, key, authorities = content
    return grpc.ssl_server_certificate_configuration([(key, certificate)], authorities)


def _no_password() -> str:
    raise ValueError("the key has a password")  # else OpenSSL asks on the terminal


def _version_of(name: str, path: Path) -> tuple[int, int, int, int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise _Unreadable(f"{name} {path} cannot be read: {error.strerror}") from error
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size


def _content_of(name: str, path: Path) -> bytes:
    try:
        return read_regular_file(path, MAX_FILE_BYTES)
    except FileUnreadable as error:
        raise _Unreadable(f"{name} {path} {error}") from error
    except FileUnusable as error:
        raise CertificatesError(f"{name} {path} {error}; it is no PEM file") from error


def _why(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return str(reason).lower().replace("_", " ") if isinstance(reason, str) else str(error)
