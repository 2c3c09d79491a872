"""An operator stops the daemon under a running engine and starts it again: requests get slower, no more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from kvtier_client.demo.chat import ChatConfig, Conversation, run_turn
from kvtier_client.demo.engine import Engine
from kvtier_client.demo.engine_process import Answer, ChatSpec, EngineProcess, EngineSpec

from ..conftest import StartDaemon
from ..daemon_process import DaemonProcess, child_environment, wait_until
from .engines import (
    CONVERSATIONS,
    NUM_BLOCKS,
    SYSTEM_TOKENS,
    TEXT_FILE,
    Outputs,
    attached_engine,
    make_model,
    nothing_held,
    outputs,
)

TURNS = 5
"""As many as the engine's own cache has room for, of one conversation; the others come from the daemon."""
CHAT = ChatSpec(str(TEXT_FILE), conversations=CONVERSATIONS, system_tokens=SYSTEM_TOKENS)


def expected() -> Outputs:
    """What an engine without a daemon says."""
    config = ChatConfig(seed=CHAT.seed, conversations=CONVERSATIONS, system_tokens=SYSTEM_TOKENS)
    text, model = TEXT_FILE.read_bytes(), make_model()
    chats = [Conversation(text, config, number) for number in range(CONVERSATIONS)]
    engine = Engine(model, model.make_cache(NUM_BLOCKS))
    return outputs([result for _ in range(TURNS) for result in run_turn(engine, chats)])


def drain(daemon: DaemonProcess) -> None:
    """Stop the daemon as an operator does, and see that it has ended well."""
    done = subprocess.run(
        [sys.executable, "-m", "kvtier_server", "admin", "drain", "--wait", "--address", daemon.address],
        env=child_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "the daemon is gone\n"), done.stderr
    assert daemon.wait() == 0
    assert "Traceback" not in daemon.log_text()


def test_a_stop_and_start_of_the_daemon_under_a_running_engine_fails_no_request(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon(pool_bytes="64MiB")
    answers: list[Answer] = []
    spec = EngineSpec("chat", CHAT, address=daemon.address, num_blocks=NUM_BLOCKS)
    with EngineProcess(spec, tmp_path) as engine:
        assert engine.wait_started().ready
        for _ in range(2):
            answers += engine.turn()
        assert sum(answer.loaded_tokens for answer in answers) > 0, "the daemon is of use"

        turn = engine.turn()
        answers.append(next(turn))
        drain(daemon)  # in the middle of a turn, which goes on meanwhile
        answers += turn

        turn = engine.turn()
        answers.append(next(turn))  # there is nobody
        assert not daemon.socket.exists()
        daemon.start()
        answers += turn

        wait_until(lambda: engine.state().ready, "the engine has found the new daemon")
        back = [answer for _ in range(TURNS - 4) for answer in engine.turn()]
        answers += back
        assert sum(answer.loaded_tokens for answer in back) > 0, "hits come back"
    assert len(answers) == TURNS * CONVERSATIONS, "a request failed"
    assert {answer.request_id: answer.output for answer in answers} == expected()
    assert daemon.status().checksum_failures == 0
    wait_until(lambda: nothing_held(daemon), "the daemon is rid of the engine")


def test_what_was_stored_before_the_stop_is_hit_after_the_start(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(pool_bytes="64MiB")
    with attached_engine(daemon, "one") as one:
        list(one.turn())
        drain(daemon)
        daemon.start()
        # Another engine, whose own cache is empty: every hit is one that outlived the stop.
        with attached_engine(daemon, "two") as two:
            list(two.turn())
            assert outputs(two.results) == outputs(one.results)
            assert two.loaded_share > 0.8
            assert two.failed_loads == 0
