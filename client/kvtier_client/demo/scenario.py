"""What the demo does: seven runs of the same chat, and what each of them has to show.

    baseline    an engine without kvtier: its tokens are what every other run must repeat
    engine 1    with kvtier and an empty pool: it stores, and loads what its device cache has lost
    engine 2    another process: it loads what engine 1 has stored
    engine 3    dies in the middle of a store: nothing of it may stay behind
    engine 4    its daemon dies and comes back: it goes on, and finds its chunks again
    engine 5    another daemon, whose pool is too small for the chats, with a filesystem tier below it
    engine 6    that daemon was stopped, its pool removed, and started again: what it loads was on disk

Owns the order and the checks. What a check says is read by people; whether it holds decides the exit code.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from kvtier.v1 import admin_pb2
from kvtier_client.demo.engine_process import Answer, ChatSpec, EngineProcess, EngineSpec, EngineState
from kvtier_client.private_daemon import Daemon
from kvtier_client.progress import Progress

MIN_REUSE = 0.8
"""Share of what engine 2 could load that it must load."""

MIN_FROM_DISK = 0.4
"""Share of what engine 6 could load in its first turn that it must load. Not all: its requests hold their
chunks in the pool while they wait, and who finds no room computes. That is one long chat in five or none,
whoever comes first: 50 to 86 %."""

WAIT_S = 20.0
"""For what takes well under a second: an engine's end, cleaning up after it, attaching again."""

POLL_S = 0.01
KILL_POINT = "worker.after_store_copy"


@dataclass(frozen=True, slots=True)
class Settings:
    """How much the demo does. The defaults take about a minute on two cores."""

    conversations: int = 16
    turns: int = 5
    crash_turns: int = 3
    """Turns of the run in which the daemon dies; it dies in the last but one."""
    num_blocks: int = 256
    """Device blocks of an engine: too few for all conversations, so that the offload has something to do."""
    blocks_per_chunk: int = 4
    sliding_window: int | None = None
    seed: int = 0
    pool_bytes: str = "256MiB"
    small_pool_bytes: str = "24MiB"
    """Of the daemon with a filesystem tier: about half of what the chats leave."""


QUICK = Settings(conversations=5, turns=3, num_blocks=96, pool_bytes="48MiB", small_pool_bytes="8MiB")
"""Few requests; most of the time goes into starting the processes. Fits the /dev/shm of a plain container."""


@dataclass(slots=True)
class Run:
    """What one engine did."""

    name: str
    answers: list[Answer] = field(default_factory=list)
    state: EngineState = field(default_factory=EngineState)
    wall_s: float = 0.0
    """Time in which the engine worked on requests."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that had to be so."""

    ok: bool
    what: str
    found: str


class Scenario:
    """Runs everything; `runs` and `checks` fill up on the way, so that a failure still shows what was."""

    def __init__(
        self, settings: Settings, daemon: Daemon, tiered: Daemon, text_file: Path, logs: Path
    ) -> None:
        self.runs: list[Run] = []
        self.checks: list[Check] = []
        self._settings = settings
        self._daemon = daemon
        self._tiered = tiered
        self._text_file = text_file
        self._logs = logs

    def run(self) -> None:
        """Do it all. The first daemon runs already, the one with a filesystem tier does not."""
        self._baseline()
        self._first_engine()
        self._second_engine()
        self._killed_engine()
        self._killed_daemon()
        self._daemon.close()
        self._daemon = self._tiered.start()
        self._small_pool()
        self._empty_pool()

    # The seven runs

    def _baseline(self) -> None:
        with self._engine("baseline", address=None) as engine:
            self._chat(engine, self._settings.turns)

    def _first_engine(self) -> None:
        with self._engine("engine-1") as engine:
            run = self._chat(engine, self._settings.turns)
        self._check_tokens(run)
        loaded = sum(answer.loaded_tokens for answer in run.answers)
        self._check(loaded > 0, "engine 1 finds chunks of earlier turns in the pool", f"{loaded} tokens")

    def _second_engine(self) -> None:
        with self._engine("engine-2") as engine:
            run = self._chat(engine, self._settings.turns)
        self._check_tokens(run)
        rate = hit_rate(run)
        what = f"engine 2 loads more than {MIN_REUSE:.0%} of what engine 1 stored and it misses"
        self._check(rate > MIN_REUSE, what, f"{rate:.1%}")

    def _killed_engine(self) -> None:
        settings = self._settings
        before = self._daemon.status()
        # Another seed: what is in the pool already would not be stored.
        chat = ChatSpec(str(self._text_file), settings.conversations, seed=settings.seed + 1)
        with self._engine("engine-3", chat=chat, faults=f"{KILL_POINT}=kill") as engine:
            engine.wait_started()
            progress = Progress("engine-3 is killed in mid-store", 1)
            engine.begin_turn()
            code = engine.wait_ended(WAIT_S)
            killed_at = time.monotonic()
            left = self._wait_clean()
            clean_s = time.monotonic() - killed_at
            progress.close()
        self._check(
            code == -signal.SIGKILL,
            "engine 3 is killed in the middle of a store",
            "it stores nothing" if code is None else f"exit code {code}",
        )
        self._check(
            not left,
            "nothing of engine 3 stays: no session, lease, reserved or quarantined slot, no pin",
            ", ".join(left) or f"clean after {clean_s * 1000:.0f} ms",
        )
        chunks = self._daemon.status().tiers[0].chunks
        self._check(
            chunks == before.tiers[0].chunks,
            "no half-stored chunk of engine 3 can be read",
            f"{before.tiers[0].chunks} chunks before, {chunks} after",
        )

    def _killed_daemon(self) -> None:
        turns = self._settings.crash_turns
        restart_after = max(2, self._settings.conversations // 2)

        def crash(turn: int, answers: int) -> None:
            if turn == turns - 2 and answers == 1:
                self._daemon.kill()
            elif turn == turns - 2 and answers == restart_after:
                self._daemon.start()

        with self._engine("engine-4") as engine:
            run = self._chat(engine, turns, crash, before_last=lambda: self._wait_ready(engine))
        self._check_tokens(run)
        last = run.answers[-self._settings.conversations :]
        loaded = sum(answer.loaded_tokens for answer in last)
        self._check(
            run.state.ready and loaded > 0,
            "engine 4 has attached to the restarted daemon and finds its chunks again",
            f"{loaded} tokens loaded in its last turn" if run.state.ready else "not attached",
        )

    def _small_pool(self) -> None:
        with self._engine("engine-5") as engine:
            run = self._chat(engine, self._settings.turns)
        self._check_tokens(run)
        self._daemon.stop()  # writes down what is still to be written

    def _empty_pool(self) -> None:
        self._daemon.remove_pool()
        pool, disk = self._wait_for_index(self._daemon.start())
        self._check(
            pool.chunks == 0 and disk.used_bytes > pool.capacity_bytes,
            "the restarted daemon has an empty pool, and on disk more than fits in it",
            f"{disk.used_bytes >> 20} MiB, the pool has {pool.capacity_bytes >> 20} MiB",
        )
        with self._engine("engine-6") as engine:
            run = self._chat(engine, self._settings.turns)
        self._check_tokens(run)
        rate = hit_rate(replace(run, answers=run.answers[: self._settings.conversations]))
        what = f"engine 6 loads more than {MIN_FROM_DISK:.0%} of what it misses in its first turn, from disk"
        self._check(rate > MIN_FROM_DISK, what, f"{rate:.1%}")

    # Their parts

    def _engine(
        self, name: str, address: str | None = "", chat: ChatSpec | None = None, faults: str = ""
    ) -> EngineProcess:
        settings = self._settings
        spec = EngineSpec(
            name,
            chat or ChatSpec(str(self._text_file), settings.conversations, settings.seed),
            address=self._daemon.address if address == "" else address,
            num_blocks=settings.num_blocks,
            blocks_per_chunk=settings.blocks_per_chunk,
            sliding_window=settings.sliding_window,
            model_seed=settings.seed,
        )
        return EngineProcess(spec, self._logs, faults)

    def _chat(
        self,
        engine: EngineProcess,
        turns: int,
        on_answer: Callable[[int, int], None] = lambda turn, answers: None,
        before_last: Callable[[], None] = lambda: None,
    ) -> Run:
        """Have an engine run its turns. `on_answer` gets the turn and how many answers it has so far."""
        run = Run(engine.spec.name)
        self.runs.append(run)
        progress = Progress(f"{run.name} starts", turns * self._settings.conversations)
        try:
            engine.wait_started()
            progress.say(run.name)
            for turn in range(turns):
                if turn == turns - 1:
                    before_last()
                began = time.monotonic()
                for number, answer in enumerate(engine.turn(), start=1):
                    run.answers.append(answer)
                    progress.advance()
                    on_answer(turn, number)
                run.wall_s += time.monotonic() - began
            run.state = engine.state()
        finally:
            progress.close()
        return run

    def _wait_for_index(self, daemon: Daemon) -> Sequence[admin_pb2.TierStatus]:
        """Return the tiers when the one on disk has read what it holds, or after WAIT_S."""
        deadline = time.monotonic() + WAIT_S
        while not (tiers := daemon.status().tiers)[1].chunks and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return tiers

    def _wait_ready(self, engine: EngineProcess) -> None:
        deadline = time.monotonic() + WAIT_S
        while not engine.state().ready and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def _wait_clean(self) -> list[str]:
        """Wait until nobody holds anything in the daemon; return what is still held after WAIT_S."""
        deadline = time.monotonic() + WAIT_S
        while (left := held(self._daemon.status())) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return left

    def _check_tokens(self, run: Run) -> None:
        baseline = {answer.request_id: answer for answer in self.runs[0].answers}
        difference = first_difference(baseline, run.answers)
        what = f"{run.name} says the same tokens as the baseline"
        self._check(not difference, what, difference or f"{len(run.answers)} requests")

    def _check(self, ok: bool, what: str, found: str) -> None:
        self.checks.append(Check(ok, what, found))


def hit_rate(run: Run) -> float:
    """Return the share of the tokens that could have been loaded that were."""
    missing = sum(answer.missing_tokens for answer in run.answers)
    return sum(answer.loaded_tokens for answer in run.answers) / missing if missing else 0.0


def held(status: admin_pb2.GetStatusResponse) -> list[str]:
    """Name what engines hold in the daemon: sessions, leases, slots, pins. Empty = nothing."""
    pool = status.tiers[0]
    counts = {
        "sessions": len(status.sessions),
        "leases": sum(lease.count for lease in status.leases),
        "reserved slots": pool.reserved_slots,
        "quarantined slots": pool.quarantined_slots,
        "pinned chunks": pool.pinned_chunks,
    }
    return [f"{count} {name}" for name, count in counts.items() if count]


def first_difference(baseline: dict[str, Answer], answers: Sequence[Answer]) -> str:
    """Say where the first token differs from the baseline; "" when none does."""
    for answer in answers:
        expected = baseline[answer.request_id].output
        for position, (want, got) in enumerate(zip(expected, answer.output, strict=False)):
            if want != got:
                return f"{answer.request_id}, token {position}: baseline {want}, here {got}"
        if len(expected) != len(answer.output):
            return f"{answer.request_id}: baseline {len(expected)} tokens, here {len(answer.output)}"
    return ""
