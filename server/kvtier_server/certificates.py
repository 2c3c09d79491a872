"""The daemon's certificate and the authority of its clients, read again when the files change.

Owns the files' contents. gRPC asks for them on a thread of its own before every handshake: connections that
are open keep what they were made with, the next ones see what the files say. Files that cannot be used change
nothing: what was read before stays, and a line in the log says why.
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
from kvtier_server.socket_lock import StartError

MAX_FILE_BYTES = 4 << 20
"""Of one PEM file: a system's whole list of authorities has a quarter of it."""

REPLACING_S = 0.05
"""Between reading new files and handing them to gRPC; see `Certificates._latest`."""

log = structlog.get_logger("kvtier.certificates")

_Version = tuple[tuple[int, int, int, int], ...]
"""What tells a file from the one it replaced: device, inode, time and size, of all three."""


class CertificatesError(Exception):
    """The files cannot be used; the message names the file."""


class Certificates:
    """What a listening address presents and demands. Made on the main thread; asked on gRPC's."""

    def __init__(self, config: TlsConfig) -> None:
        """Read the files. Raises StartError."""
        self._paths = {name: Path(getattr(config, name)) for name in FILES}
        self._lock = threading.Lock()
        self._refused: _Version | None = None
        self._told = ""
        try:
            self._version = self._current_version()
            self._first = self._read()
        except CertificatesError as error:
            raise StartError(f"tls: {error}", 2) from None
        if self._paths["key_file"].stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            path = self._paths["key_file"]
            log.warning("tls_key_open_to_others", file=str(path), fix=f"chmod 600 {path}")

    def credentials(self) -> grpc.ServerCredentials:
        """Return credentials that demand a certificate of every client, and follow the files."""
        # The types know no None, which gRPC takes as "nothing has changed".
        return grpc.dynamic_ssl_server_credentials(self._first, self._latest, True)  # type: ignore[arg-type]

    def _latest(self) -> grpc.ServerCertificateConfiguration | None:
        """Return what the files say now; None where that is what gRPC has, or cannot be used.

        None, and not the same again: whatever is returned replaces what handshakes of other threads are
        about to use, and gRPC frees it under their hands (its issue 36693; 500 handshakes at once ended the
        process). So there is also a pause before a replacement, in which those come through that asked
        before: they need microseconds, and who asks now waits for this call.
        """
        with self._lock:
            try:
                version = self._current_version()
                if version == self._version:
                    self._told = ""
                elif version != self._refused:
                    configuration = self._read_anew(version)
                    if configuration is not None:
                        time.sleep(REPLACING_S)
                    return configuration
            except CertificatesError as error:
                if str(error) != self._told:  # once, not at every handshake
                    self._told = str(error)
                    log.error(  # noqa: TRY400 the message says it all
                        "tls_files_refused", why=self._told, effect="the last ones stay in use"
                    )
            return None

    def _read_anew(self, version: _Version) -> grpc.ServerCertificateConfiguration | None:
        """Read new files. Raises CertificatesError; these are not read again then."""
        self._refused = version
        configuration = self._read()
        self._refused = None
        if self._current_version() != version:
            return None  # somebody is writing them: the next handshake looks again
        self._version, self._told = version, ""
        log.info("tls_files_reloaded", certificate=str(self._paths["certificate_file"]))
        return configuration

    def _current_version(self) -> _Version:
        return tuple(_version_of(name, path) for name, path in self._paths.items())

    def _read(self) -> grpc.ServerCertificateConfiguration:
        """Read and check. Raises CertificatesError."""
        certificate, key, authorities = (_content(name, path) for name, path in self._paths.items())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # Paths, not the bytes: Python's ssl takes nothing else. Whoever reads compares versions after.
            context.load_cert_chain(self._paths["certificate_file"], self._paths["key_file"], _no_password)
        except (ssl.SSLError, OSError, ValueError) as error:
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
        return grpc.ssl_server_certificate_configuration([(key, certificate)], authorities)


def _no_password() -> str:
    raise ValueError("the key has a password")  # else OpenSSL asks on the terminal


def _version_of(name: str, path: Path) -> tuple[int, int, int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise CertificatesError(f"{name} {path} cannot be read: {error.strerror}") from error
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def _content(name: str, path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise CertificatesError(f"{name} {path} cannot be read: {error.strerror}") from error
    if len(content) > MAX_FILE_BYTES:
        raise CertificatesError(f"{name} {path} has more than {MAX_FILE_BYTES} bytes, so it is no PEM file")
    return content


def _why(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return str(reason).lower().replace("_", " ") if isinstance(reason, str) else str(error)
