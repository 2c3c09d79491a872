"""Replies that never reach the engine: what the daemon granted is given back all the same."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import StartDaemon
from tests.daemon_process import DaemonProcess, wait_until
from tests.faults.block_device import chunk_names
from tests.faults.conftest import StartEngine
from tests.faults.engine_process import EngineProcess, held, wait_nothing_held
from tests.faults.socket_proxy import SocketProxy

STORED = chunk_names("stored", 8)
NEW = chunk_names("new", 8)
CALLS = ("lookup", "prepare_load", "prepare_store")


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> DaemonProcess:
    return start_daemon()


@pytest.fixture
def proxy(daemon: DaemonProcess, tmp_path: Path) -> Iterator[SocketProxy]:
    with SocketProxy(daemon, tmp_path / "proxy.sock") as proxy:
        yield proxy


def make_engine(start_engine: StartEngine, address: str) -> EngineProcess:
    """Attach an engine whose chunks of one prompt are stored, and which holds nothing."""
    engine = start_engine().attach(address)
    assert set(engine.ask("store", req="store", names=STORED)["verdicts"].values()) == {"GRANTED"}
    return engine


def send(engine: EngineProcess, call: str) -> None:
    """Make a call that asks for a lease, and wait for nothing."""
    match call:
        case "lookup":
            engine.tell("look", req="lost", names=STORED)
        case "prepare_load":
            engine.tell("pin", req="lost", names=STORED)
        case "prepare_store":
            engine.tell("reserve", req="lost", names=NEW)


def assert_in_vain(engine: EngineProcess, call: str) -> None:
    """The call came back to the engine without a lease."""
    in_vain = {
        "lookup": "deadline",
        "prepare_load": False,
        "prepare_store": {"slot_ids": [], "reason": "deadline"},
    }
    assert engine.answer() == in_vain[call]


@pytest.mark.parametrize("call", CALLS)
def test_r11_what_was_granted_in_a_lost_reply_is_given_back(
    call: str, daemon: DaemonProcess, proxy: SocketProxy, start_engine: StartEngine
) -> None:
    """R11: the daemon granted, the reply came after the deadline; the client's release ends the lease."""
    engine = make_engine(start_engine, proxy.address)
    proxy.hold_replies()
    send(engine, call)
    wait_until(lambda: held(daemon)["leases"] > 0, "the daemon has granted")
    assert_in_vain(engine, call)
    proxy.let_replies()
    wait_nothing_held(daemon, engines=1)
    engine.ask("wait_ready")
    assert engine.ask("read", names=STORED)["loaded"] == STORED
    assert engine.ask("report")["errors"] == []


@pytest.mark.parametrize("call", CALLS)
def test_r11_what_was_granted_in_a_lost_reply_ends_with_the_session(
    call: str, daemon: DaemonProcess, proxy: SocketProxy, start_engine: StartEngine
) -> None:
    """R11: the engine dies before it could give back what it never knew it had."""
    engine = make_engine(start_engine, proxy.address)
    proxy.hold_replies()
    send(engine, call)
    wait_until(lambda: held(daemon)["leases"] > 0, "the daemon has granted")
    engine.kill()
    wait_nothing_held(daemon)


@pytest.mark.parametrize("call", CALLS)
def test_r11_a_daemon_that_hangs_during_a_call_leaves_no_lease(
    call: str, daemon: DaemonProcess, start_engine: StartEngine
) -> None:
    """R11: SIGSTOP of the daemon; when it goes on, call and release reach it together."""
    engine = make_engine(start_engine, daemon.address)
    daemon.signal(signal.SIGSTOP)
    send(engine, call)
    assert_in_vain(engine, call)
    daemon.signal(signal.SIGCONT)
    engine.ask("wait_ready")
    assert engine.ask("read", names=STORED)["loaded"] == STORED
    wait_nothing_held(daemon, engines=1)


def test_r11_credits_of_a_lost_reply_are_given_back(
    daemon: DaemonProcess, proxy: SocketProxy, start_engine: StartEngine
) -> None:
    """R11: credits whose grant came too late are no credits of the engine's, and none of the daemon's."""
    engine = make_engine(start_engine, proxy.address)
    proxy.hold_replies()
    engine.tell("begin", req="new", names=NEW)  # looks up, and asks for credits
    wait_until(lambda: held(daemon)["credits"] > 0, "the daemon has granted")
    assert engine.answer() == {"num_hits": 0}
    engine.ask("finish", req="new")
    wait_until(lambda: engine.ask("report")["scheduler"]["deadline_misses"] >= 2, "both calls were given up")
    assert engine.ask("held_credits") == 0
    proxy.let_replies()
    engine.ask("wait_ready")
    wait_until(lambda: held(daemon)["credits"] == engine.ask("held_credits"), "both count the same credits")
    engine.close()
    wait_nothing_held(daemon)
