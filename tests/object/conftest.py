"""One Ceph for all tests here, with a bucket for each."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.daemon_process import REPOSITORY

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


def readme_example() -> str:
    """The README's table of a tier on S3."""
    (example,) = [
        block.partition("```")[0]
        for block in (REPOSITORY / "README.md").read_text().split("```toml\n")[1:]
        if 'type = "object"' in block.partition("```")[0]
    ]
    return example


@pytest.fixture
def s3_table(ceph: Ceph, tmp_path: Path) -> str:
    """The README's table with the server, a new bucket and the files of this test; without an index."""
    access, secret = tmp_path / "access-key", tmp_path / "secret-key"
    access.write_text(ceph.s3.access_key + "\n")
    secret.write_text(ceph.s3.secret_key + "\n")
    table = readme_example()
    for key, value in {
        "url": f"s3://{ceph.make_bucket()}/chunks",
        "endpoint": ceph.s3.endpoint,
        "access_key_file": str(access),
        "secret_key_file": str(secret),
        "probe_wait": "1s",  # on a machine that does more than this
    }.items():
        table, count = re.subn(rf'^{key} = "[^"]*"', f'{key} = "{value}"', table, flags=re.MULTILINE)
        assert count == 1, f"the README's example has {count} lines with {key}"
    return f'{table}name = "s3"\nallow_http = true\ndeadline = "2s"\n'
