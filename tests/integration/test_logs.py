"""What a daemon says about itself, and that none of it is what users wrote, or names made from it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import MakeEngine, StartDaemon
from tests.daemon_process import DaemonProcess, wait_until
from tests.raw_engine import RawEngine, failure

from kvtier.v1 import admin_pb2
from kvtier.v1 import offload_pb2 as pb

MARKER = b"MARKER-OF-A-KEY-"
PROMPT = "MARKER-OF-A-PROMPT"
TOKEN = 987654321987


def marked(number: int) -> bytes:
    """A key that is found again wherever it turns up: 32 bytes of hash, and the group."""
    return MARKER + number.to_bytes(16, "big") + bytes(4)


def lines(daemon: DaemonProcess) -> list[dict[str, object]]:
    return [json.loads(line) for line in daemon.log_text().splitlines()]


def traces() -> Iterator[str]:
    """How a key, a prompt or a token could stand in a text; 8 digits of a key are allowed."""
    yield MARKER.decode()[:8]
    yield MARKER.hex()[:10]
    yield MARKER.hex()[:10].upper()
    yield repr(list(MARKER[:4]))[1:-1]
    yield PROMPT
    yield str(TOKEN)


def provoke(daemon: DaemonProcess, engine: RawEngine, files: Path) -> list[str]:
    """Have everything go wrong with marked keys that can; returns what the errors say."""
    context = pb.RequestContext(
        request_id="r", params_json=json.dumps({"prompt": PROMPT, "token_ids": [TOKEN]}).encode()
    )
    broken = pb.RequestContext(request_id="b", params_json=f'{{"prompt": "{PROMPT}", [{TOKEN}'.encode())
    session = engine.session_id
    every = [marked(number) for number in range(64)]
    engine.store(every, request_id="store")
    wait_until(lambda: len(list(files.rglob("*.chunk"))) >= 64, "the chunks are on disk")
    calls = [
        lambda: engine.lookup([MARKER * 20]),
        lambda: engine.lookup([MARKER[:4]]),
        lambda: engine.lookup([marked(1)] * 9000),
        lambda: engine.prepare_load([marked(1000), marked(1001)]),
        lambda: engine.stub.Lookup(pb.LookupRequest(session_id=session, context=context, keys=[b""])),
        lambda: engine.stub.Lookup(pb.LookupRequest(session_id="gone", keys=every)),
        lambda: engine.send_bytes("/kvtier.v1.OffloadService/Lookup", b"\x0a\xff" + MARKER),
        lambda: engine.complete(store_reports=[pb.StoreReport(slot_ids=[1, 2], keys=[marked(1)])]),
        lambda: engine.admin.Clear(admin_pb2.ClearRequest(tier="nowhere"), timeout=30),
    ]
    told = [failure(call).message for call in calls]
    for asked in (context, broken):
        request = pb.LookupRequest(
            session_id=session, context=asked, keys=every, lease_id=engine.new_lease_id()
        )
        engine.stub.Lookup(request, timeout=30)
    return told


def spoil(files: Path) -> None:
    """Make chunks unreadable in different ways: other bytes, no file at all, a directory in its place."""
    found = sorted(files.rglob("*.chunk"))
    for number, path in enumerate(found):
        match number % 3:
            case 0:
                content = bytearray(path.read_bytes())
                content[-1] ^= 0xFF
                content[5000] ^= 0xFF
                path.write_bytes(content)
            case 1:
                path.unlink()
                path.mkdir()
            case _:
                os.truncate(path, 100)


@pytest.mark.parametrize("io", ["process", "threads"])
def test_no_key_no_prompt_and_no_token_is_in_logs_errors_or_status(
    start_daemon: StartDaemon, make_engine: MakeEngine, tmp_path: Path, io: str
) -> None:
    files, objects = tmp_path / "files", tmp_path / "objects"
    objects.mkdir()
    config = f"""
[server]
log_level = "debug"
[[tiers]]
type = "filesystem"
root = "{files}"
capacity = "64MiB"
state_directory = "{tmp_path / "state"}"
io = "{io}"
[[tiers]]
type = "object"
url = "file://{objects}"
capacity = "64MiB"
state_directory = "{tmp_path / "state"}"
"""
    daemon = start_daemon(config=config)
    engine = make_engine(daemon).attach()
    told = provoke(daemon, engine, files)
    assert len(told) == 9
    engine.close()
    daemon.stop()
    shutil.rmtree(daemon.pool_directory)
    spoil(files)
    spoil(objects)
    daemon.start()
    engine = make_engine(daemon, facts=engine.facts).attach()
    for number in range(64):
        engine.lookup(
            [marked(number)], lease_id=engine.new_lease_id(), pending_wait_ms=500, request_id=str(number)
        )
    wait_until(lambda: any("tier" in str(line["event"]) for line in lines(daemon)), "a tier complains")
    cleared = admin_pb2.ClearRequest(tier="filesystem", wait_ms=10_000)
    engine.admin.Clear(cleared, timeout=30)  # which cannot remove a directory, and says so with its name
    wait_until(lambda: "could not be removed" in daemon.log_text(), "the tier says what stays")
    shutil.rmtree(files / "kvtier-1")
    (files / "kvtier-1").write_text("in the way")
    engine.store([marked(number) for number in range(100, 164)], request_id="in the way")
    wait_until(lambda: "left alone" in daemon.log_text(), "the tier says why it does not work")
    places = {
        "log": daemon.log_text(),
        "stdout": daemon.out_text(),
        "debug": daemon.page("/debug/status")[1],
        "metrics": daemon.page("/metrics")[1],
        "errors": "\n".join(told),
        "status": str(daemon.status()),
    }
    daemon.stop()
    places["log"] += daemon.log_text()
    for place, text in places.items():
        assert text, place
        for trace in traces():
            assert trace not in text, (
                place,
                trace,
                text[max(0, text.find(trace) - 300) : text.find(trace) + 200],
            )


def test_off_a_terminal_every_line_of_a_life_is_json(
    start_daemon: StartDaemon, make_engine: MakeEngine, tmp_path: Path
) -> None:
    """With its helpers: what one of them writes to stderr is a line of the daemon's log."""
    daemon = start_daemon(
        config=f'[[tiers]]\ntype = "filesystem"\nroot = "{tmp_path}/f"\ncapacity = "16MiB"\n'
        f'state_directory = "{tmp_path}/s"\n'
    )
    make_engine(daemon).attach().store([marked(1)])
    assert daemon.stop() == 0
    for line in lines(daemon):
        assert {"event", "level", "timestamp"} <= line.keys()
    events = [str(line["event"]) for line in lines(daemon)]
    assert "serving" in events
    assert events[-1] == "stopped"
