from __future__ import annotations

from pathlib import Path

import pytest

from kvtier_server.config import ConfigErrors, load_config

FILES = '[tls]\ncertificate_file = "/c"\nkey_file = "/k"\nclient_ca_file = "/a"\n'
SERVER = '[server]\naddress = "unix:///run/engines/kvtier.sock"\n'
TCP = SERVER + 'tcp_address = "0.0.0.0:9470"\n'


def problems(tmp_path: Path, text: str) -> dict[str, str]:
    file = tmp_path / "kvtier.toml"
    file.write_text(text)
    try:
        load_config({}, file, {})
    except ConfigErrors as errors:
        return {error.path: error.problem for error in errors.errors}
    return {}


def test_certificates_and_names_make_every_address_right(tmp_path: Path) -> None:
    for names in ('admins = ["ops"]', 'observers = ["o"]', '[tls.tenants]\n"engine" = "a"'):
        assert problems(tmp_path, TCP + FILES + names) == {}
        assert problems(tmp_path, '[server]\naddress = "node7:1"\n' + FILES + names) == {}


@pytest.mark.parametrize(
    "tls",
    [
        "",
        '[tls]\nobservers = ["everybody"]\n',
        '[tls]\ncertificate_file = ""\nkey_file = ""\nclient_ca_file = ""\n',
        '[tls.tenants]\n"engine" = "a"\n',
    ],
)
def test_other_machines_are_never_let_in_without_certificates(tmp_path: Path, tls: str) -> None:
    assert "needs mTLS: set tls.certificate_file" in problems(tmp_path, TCP + tls)["server.tcp_address"]


@pytest.mark.parametrize("left_out", ["certificate_file", "key_file", "client_ca_file"])
def test_each_of_the_three_files_is_needed(tmp_path: Path, left_out: str) -> None:
    some = "".join(line + "\n" for line in FILES.splitlines() if left_out not in line)
    assert problems(tmp_path, TCP + some + 'admins = ["ops"]').keys() == {f"tls.{left_out}"}


def test_certificates_that_nobody_can_use_are_mistakes(tmp_path: Path) -> None:
    assert "no certificate has a role" in problems(tmp_path, TCP + FILES)["tls.tenants"]
    unused = problems(tmp_path, SERVER + FILES + 'admins = ["ops"]')
    assert "set server.tcp_address" in unused["tls.certificate_file"]


@pytest.mark.parametrize(
    ("line", "path", "problem"),
    [
        ('certificate_file = "relative"', "tls.certificate_file", "not an absolute path"),
        ('admins = [""]', "tls.admins", "is no name of a certificate"),
        ('admins = "ops"', "tls.admins", "must be a valid tuple"),
        ('admin = ["ops"]', "tls.admin", "did you mean tls.admins?"),
        ('tenants = {"e" = "' + "t" * 65 + '"}', "tls.tenants", "at most 64"),
        ('tenants = {"e" = "a\\u0007b"}', "tls.tenants", "printable"),
        ('tenants = {"e" = 5}', "tls.tenants", "valid string"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, line: str, path: str, problem: str) -> None:
    assert problem in problems(tmp_path, SERVER + "[tls]\n" + line)[path]


@pytest.mark.parametrize(
    ("lines", "path", "problem"),
    [
        ('tcp_address = "unix:///run/x.sock"', "server.tcp_address", "is a unix socket"),
        ('tcp_address = "localhost"', "server.tcp_address", "not host:port"),
        ('admin_address = "localhost:1"', "server.admin_address", "is no unix socket"),
        (
            'admin_address = "unix:///run/engines/admin.sock"',
            "server.admin_address",
            "whoever is given that directory has both sockets",
        ),
    ],
)
def test_addresses_that_do_not_go_together_are_mistakes(
    tmp_path: Path, lines: str, path: str, problem: str
) -> None:
    assert problem in problems(tmp_path, SERVER + lines)[path]
    two = '[server]\naddress = "127.0.0.1:1"\ntcp_address = "127.0.0.1:2"\n'
    assert "server.address is TCP too" in problems(tmp_path, two)["server.tcp_address"]
