"""What `kvtier doctor` says of real devices: its calls of the driver have no other test."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.daemon_process import child_environment


def test_every_device_is_registered_with_and_shared_between_two_processes() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvtier_server", "doctor", "-o", "json"],
        env=child_environment(),
        stdout=subprocess.PIPE,
        timeout=110,
        check=False,
    )
    checks = json.loads(done.stdout)["checks"]
    devices = [check["text"].split()[0] for check in checks if check["name"] == "gpu.device"]
    assert "no" not in devices, "the driver does not answer"
    for name in ("gpu.register", "gpu.ipc"):
        told = {check["text"].split()[0]: check for check in checks if check["name"] == name}
        assert list(told) == devices
        assert {check["verdict"] for check in told.values()} == {"pass"}, told
