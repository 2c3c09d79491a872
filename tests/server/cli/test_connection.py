"""What a command says where it does not reach a daemon: which mistake it is, and what to type instead."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtier_server.cli import main

from ...certificate_authority import CertificateAuthority, Issued
from ...daemon_process import DaemonProcess
from .conftest import Kvtier


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("unix://relative.sock", "write an absolute path: unix:///"),
        ("/tmp/x.sock", "did you mean unix:///tmp/x.sock?"),
        ("unix:/tmp/x.sock", "did you mean unix:///tmp/x.sock?"),
        ("http://127.0.0.1:9470", "is a URL, and the service speaks gRPC at host:port"),
        ("localhost", "is not host:port; for example 127.0.0.1:9470"),
    ],
)
def test_an_address_that_cannot_be_one_is_answered_with_one_that_can(
    kvtier: Kvtier, address: str, said: str
) -> None:
    typed = kvtier("health", "--address", address)
    assert (typed.returncode, typed.stdout) == (2, "")
    assert typed.stderr.startswith("kvtier: --address: ")
    assert said in typed.stderr
    assert kvtier("health", KVTIER_ADDRESS=address).stderr.startswith("kvtier: KVTIER_ADDRESS: ")


@pytest.mark.parametrize("typed", ["-1", "0", "nan", "inf", "1e30", "soon"])
@pytest.mark.parametrize(
    "command", [("status",), ("health",), ("top", "--once"), ("admin", "sessions"), ("doctor", "--quick")]
)
def test_a_timeout_that_is_no_time_to_wait_is_a_mistake(
    command: tuple[str, ...], typed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--timeout", typed])
    assert ended.value.code == 2
    said = f"argument --timeout: {typed!r} is not a number of seconds above 0 and up to 86400\n"
    assert capsys.readouterr().err.endswith(said)


def test_a_path_that_is_no_socket_is_called_that(kvtier: Kvtier, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    refused = kvtier("status", "--address", f"unix://{file}")
    assert (refused.returncode, refused.stderr) == (2, f"kvtier: unix://{file} is not a socket\n")


def test_the_environment_is_named_where_it_gave_the_address(kvtier: Kvtier, tmp_path: Path) -> None:
    missing = f"unix://{tmp_path}/none.sock"
    refused = kvtier("status", KVTIER_ADDRESS=missing)
    said = f"no daemon at {missing} (from KVTIER_ADDRESS); start one: kvtier serve --address {missing}"
    assert refused.stderr == f"kvtier: {said}\n"


def test_the_default_address_needs_no_option_to_start_at(kvtier: Kvtier) -> None:
    assert kvtier("status").stderr.endswith("; start one: kvtier serve\n")


def test_serve_names_the_environment_that_gave_a_taken_address(kvtier: Kvtier, daemon: DaemonProcess) -> None:
    refused = kvtier("serve", "--name", "other", KVTIER_ADDRESS=daemon.address)
    assert refused.returncode == 1
    assert refused.stderr.endswith("choose another --address (server.address from KVTIER_ADDRESS)\n")
    typed = kvtier("serve", "--name", "other", "--address", daemon.address)
    assert typed.stderr.endswith("choose another --address\n")


@pytest.fixture
def page() -> Iterator[str]:
    """Something that speaks HTTP/1.1 and nothing else, as the page of metrics does."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("command", ["status", "health"])
def test_the_page_of_metrics_is_not_taken_for_the_service(
    kvtier: Kvtier, daemon: DaemonProcess, page: str, command: str
) -> None:
    for address in (f"127.0.0.1:{daemon.metrics_port}", page):
        refused = kvtier(command, "--address", address)
        assert (refused.returncode, refused.stdout) == (2, "")
        said = f"{address} speaks HTTP, not gRPC; is it the daemon's metrics_address?"
        assert refused.stderr == f"kvtier: {said}\n"


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> tuple[Issued, Issued]:
    """Two certificates of one authority."""
    authority = CertificateAuthority(tmp_path_factory.mktemp("ca"))
    return authority.issue("ops"), authority.issue("other")


def test_certificates_that_cannot_be_right_are_named_before_anybody_is_asked(
    kvtier: Kvtier, issued: tuple[Issued, Issued]
) -> None:
    ops, other = issued
    nowhere = ["health", "--address", "127.0.0.1:1"]
    mixed = kvtier(*nowhere, *Issued(ops.ca, ops.cert, other.key).options())
    assert mixed.stderr == f"kvtier: --tls-key {other.key} does not belong to --tls-cert {ops.cert}\n"
    swapped = kvtier(*nowhere, *Issued(ops.key, ops.cert, ops.key).options())
    assert swapped.stderr == f"kvtier: --tls-ca: {ops.key} holds no certificate (PEM)\n"
    keyless = kvtier(*nowhere, *Issued(ops.ca, ops.cert, ops.cert).options())
    assert "are no certificate and its key, in PEM" in keyless.stderr
    assert {mixed.returncode, swapped.returncode, keyless.returncode} == {2}
