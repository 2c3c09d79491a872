"""One Ceph for all tests here, with a bucket for each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from .ceph import APT, Ceph, missing_programs


@pytest.fixture(scope="session")
def ceph() -> Iterator[Ceph]:
    missing = missing_programs()
    if missing:
        why = f"no S3 server to test with ({', '.join(missing)} missing); type: {APT}"
        if os.environ.get("KVTIER_TEST_CEPH") == "required":
            pytest.fail(why)
        pytest.skip(why)
    server = Ceph()
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
def s3_table(ceph: Ceph, tmp_path: Path) -> str:
    """A `[[tiers]]` table of a new bucket, as a person would write it, without an index of its own."""
    access, secret = tmp_path / "access-key", tmp_path / "secret-key"
    access.write_text(ceph.s3.access_key + "\n")
    secret.write_text(ceph.s3.secret_key + "\n")
    return f"""
[[tiers]]
type = "object"
name = "s3"
url = "s3://{ceph.make_bucket()}/chunks"
capacity = "256MiB"
endpoint = "{ceph.s3.endpoint}"
allow_http = true
region = "us-east-1"
access_key_file = "{access}"
secret_key_file = "{secret}"
probe_wait = "1s"
deadline = "2s"
"""
