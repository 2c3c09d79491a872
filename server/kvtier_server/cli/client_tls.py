"""The certificates of a command that speaks to a daemon over TCP: which files, and whether they can be right.

Looked at with Python's ssl, which says what gRPC does not: its connections only fail.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvtier_server.address import parse_host_port, socket_path
from kvtier_server.cli.failure import Failure

if TYPE_CHECKING:
    import ssl

MISTAKE = 2

OPTIONS = (
    ("ca", "KVTIER_TLS_CA", "who signed the daemon's certificate"),
    ("cert", "KVTIER_TLS_CERT", "your certificate"),
    ("key", "KVTIER_TLS_KEY", "its key"),
)
SERVER_NAME = "KVTIER_TLS_SERVER_NAME"


class TlsFiles(NamedTuple):
    """Authority, key and certificate in PEM, as gRPC takes them; and the files they are from."""

    ca: bytes
    key: bytes
    cert: bytes
    paths: dict[str, str]


def add_tls_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --tls-ca, --tls-cert, --tls-key and --tls-server-name."""
    for name, variable, text in OPTIONS:
        parser.add_argument(f"--tls-{name}", metavar="FILE", help=f"over TCP: {text}, PEM (else {variable})")
    parser.add_argument(
        "--tls-server-name",
        metavar="NAME",
        help=f"what the daemon's certificate is called, if not the address' host (else {SERVER_NAME})",
    )


def server_name(args: argparse.Namespace) -> str | None:
    """Return what the daemon's certificate is called, where it was said."""
    return getattr(args, "tls_server_name", None) or os.environ.get(SERVER_NAME)


def given_paths(args: argparse.Namespace, address: str) -> dict[str, str]:
    """Return the files that were named, by option; none for a unix socket, which needs no certificate."""
    if socket_path(address) is not None:
        return {}
    paths = {
        name: getattr(args, f"tls_{name}", None) or os.environ.get(variable) for name, variable, _ in OPTIONS
    }
    return {name: path for name, path in paths.items() if path}


def read_tls_files(args: argparse.Namespace, address: str) -> TlsFiles | None:
    """Read them, None where none are given. Raises Failure, also for files that cannot be right."""
    paths = given_paths(args, address)
    if not paths:
        return None
    contents: dict[str, bytes] = {}
    for name, variable, text in OPTIONS:
        if name not in paths:
            raise Failure(f"--tls-{name} (or {variable}) is missing: {text}", MISTAKE)
        try:
            contents[name] = Path(paths[name]).read_bytes()
        except OSError as error:
            raise Failure(f"--tls-{name}: {paths[name]} cannot be read: {error.strerror}", MISTAKE) from None
    files = TlsFiles(contents["ca"], contents["key"], contents["cert"], paths)
    _check(files)
    return files


def check_signer(files: TlsFiles, address: str, timeout_s: float) -> None:
    """Raise Failure if the daemon's certificate was signed by somebody else; all else is gRPC's to say.

    By a handshake, in which names are not compared: gRPC has rules of its own for them.
    """
    import socket
    import ssl

    context = _context(files)
    context.set_alpn_protocols(["h2"])
    host, port = parse_host_port(address)
    try:
        with socket.create_connection((host, port), timeout_s) as plain, context.wrap_socket(plain):
            pass
    except ssl.SSLCertVerificationError as error:
        raise Failure(
            f"--tls-ca: {files.paths['ca']} does not vouch for the daemon at {address} "
            f"({error.verify_message}); name the authority that signed its certificate",
            MISTAKE,
        ) from None
    except OSError:  # also ssl's other errors
        return


def _check(files: TlsFiles) -> None:
    """Raise Failure if the authority is none, or certificate and key are no pair."""
    import ssl

    _context(files)
    cert, key = files.paths["cert"], files.paths["key"]
    if not (Path(cert).is_file() and Path(key).is_file()):
        return  # a pipe, which has been read: ssl could not read it again
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(cert, key, _no_password)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None)
        if reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"):
            raise Failure(f"--tls-key {key} does not belong to --tls-cert {cert}", MISTAKE) from None
        raise Failure(
            f"--tls-cert {cert} and --tls-key {key} are no certificate and its key, in PEM and without a "
            f"password ({reason or error})",
            MISTAKE,
        ) from None


def _context(files: TlsFiles) -> ssl.SSLContext:
    """Return a context that believes the authority alone. Raises Failure if the file has none."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    try:
        context.load_verify_locations(cadata=files.ca.decode("ascii", "ignore"))
    except (ssl.SSLError, ValueError):
        raise Failure(f"--tls-ca: {files.paths['ca']} holds no certificate (PEM)", MISTAKE) from None
    return context


def _no_password() -> str:
    raise ValueError("the key has a password")  # else OpenSSL asks on the terminal
