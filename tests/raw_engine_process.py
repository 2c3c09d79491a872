"""A raw engine, or one of its workers, as a process of its own: something that tests can stop and kill.

Owns both sides: `RawEngineProcess` in the test, and the child. The child attaches, takes slots if it
is told to, says so in one line, and then waits until its input ends or somebody kills it.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from kvtier.v1 import offload_pb2 as pb

from .daemon_process import REPOSITORY, WAIT_S, child_environment
from .raw_engine import RawEngine, to_keys


@dataclass(frozen=True, slots=True)
class Hello:
    """What the child says once it is attached: its session, its lock, and the slots it was granted."""

    session_id: str
    lock_file: str
    slot_ids: list[int]
    generations: list[int]


class RawEngineProcess:
    """A child that is the worker `rank` of `engine`, or with rank None all of it.

    A whole engine then reserves slots for chunks 0 .. num_stores-1, and is in mid-store for good.
    """

    def __init__(self, engine: RawEngine, rank: int | None = None, num_stores: int = 0) -> None:
        task = {
            "address": engine.address,
            "engine_id": engine.engine_id,
            "nonce": engine.nonce,
            "world_size": engine.world_size,
            "facts": engine.facts.SerializeToString().hex(),
            "rank": rank,
            "num_stores": num_stores,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.raw_engine_process", json.dumps(task)],
            cwd=REPOSITORY,
            env=child_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout is not None, "a pipe was asked for"
        line = self.process.stdout.readline()
        assert line, f"the engine process ended with {self.process.wait(WAIT_S)}"
        self.hello = Hello(**json.loads(line))

    def stop_running(self) -> None:
        """Freeze it (SIGSTOP): it lives, holds its lock, and does nothing."""
        self.process.send_signal(signal.SIGSTOP)

    def kill(self) -> None:
        """End it without a chance to do anything (SIGKILL). A second call does nothing."""
        self.process.kill()
        self.process.wait(WAIT_S)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def main(task_json: str) -> None:
    """Do the child's part."""
    task = json.loads(task_json)
    engine = RawEngine(
        task["address"],
        task["engine_id"],
        nonce=task["nonce"],
        world_size=task["world_size"],
        facts=pb.NamespaceFacts.FromString(bytes.fromhex(task["facts"])),
    )
    hello: dict[str, object] = {"slot_ids": [], "generations": []}
    if task["rank"] is None:
        session = engine.attach().workers[0]
        if task["num_stores"]:
            granted = engine.prepare_store(to_keys(range(task["num_stores"])))
            hello = {"slot_ids": list(granted.slot_ids), "generations": list(granted.generations)}
    else:
        session = engine.attach_worker(task["rank"])
    hello |= {"session_id": session.id, "lock_file": session.lock.name}
    print(json.dumps(hello), flush=True)  # noqa: T201 the parent reads it
    sys.stdin.read()
    engine.close()


if __name__ == "__main__":
    main(sys.argv[1])
