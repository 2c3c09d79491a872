from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from tests.certificate_authority import CertificateAuthority, Issued
from tests.daemon_process import wait_until

from kvtier_server.certificates import Certificates
from kvtier_server.config_tls import TlsConfig


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> CertificateAuthority:
    return CertificateAuthority(tmp_path_factory.mktemp("ca"))


def copied(issued: Issued, folder: Path) -> Issued:
    mine = Issued(folder / "ca.pem", folder / "tls.pem", folder / "tls.key")
    for source, target in ((issued.ca, mine.ca), (issued.cert, mine.cert), (issued.key, mine.key)):
        shutil.copyfile(source, target)
        target.chmod(0o600)
    return mine


def certificates_of(files: Issued) -> Certificates:
    return Certificates(
        TlsConfig(certificate_file=str(files.cert), key_file=str(files.key), client_ca_file=str(files.ca))
    )


def test_new_files_are_handed_over_once_and_only_touched_ones_never(
    authority: CertificateAuthority, tmp_path: Path
) -> None:
    files = copied(authority.issue_for_daemon(), tmp_path)
    certificates = certificates_of(files)
    certificates.look()
    assert certificates.latest() is None
    files.key.chmod(0o400)
    os.utime(files.cert)
    certificates.look()
    assert certificates.latest() is None
    copied(authority.issue("second"), tmp_path)
    assert certificates.latest() is None, "gRPC's threads read no file"
    certificates.look()
    assert certificates.latest() is not None
    assert certificates.latest() is None
    certificates.look()
    assert certificates.latest() is None


def test_a_key_that_could_not_be_read_is_read_once_it_can_be(
    authority: CertificateAuthority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = copied(authority.issue_for_daemon(), tmp_path)
    certificates = certificates_of(files)
    copied(authority.issue("renewed"), tmp_path)
    system_open = os.open

    def denied(path: Path, flags: int) -> int:  # not by its mode: tests may run as root
        if path == files.key:
            raise PermissionError(13, "Permission denied")
        return system_open(path, flags)

    with capture_logs() as lines, monkeypatch.context() as system:
        system.setattr(os, "open", denied)
        for _ in range(3):
            certificates.look()
        assert certificates.latest() is None
    assert [line["why"] for line in lines] == [f"key_file {files.key} cannot be read: Permission denied"]
    certificates.look()
    assert certificates.latest() is not None


def test_files_that_were_refused_are_read_again_when_only_the_time_of_their_inode_differs(
    authority: CertificateAuthority, tmp_path: Path
) -> None:
    files = copied(authority.issue_for_daemon(), tmp_path)
    certificates = certificates_of(files)
    copied(authority.issue("other"), tmp_path)
    key = files.key.read_bytes()
    files.key.write_bytes(b"x" * len(key))
    before = files.key.stat()
    with capture_logs() as lines:
        certificates.look()
        certificates.look()
    assert len(lines) == 1
    assert certificates.latest() is None
    files.key.write_bytes(key)

    def only_the_inodes_time_differs() -> bool:
        os.utime(files.key, ns=(before.st_atime_ns, before.st_mtime_ns))
        return files.key.stat().st_ctime_ns != before.st_ctime_ns

    wait_until(only_the_inodes_time_differs, "the clock of the file system goes on")
    certificates.look()
    assert certificates.latest() is not None
