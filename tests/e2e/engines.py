"""Reference engines for the end-to-end tests: one chat, what it must say, and engines that run it.

Most tests run their engines in the test's own process, one client session for each half of an engine as
anywhere else; what needs a process to be killed uses `kvtier_client.demo.engine_process`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from kvtier_client.demo.adapter import KvtierOffload
from kvtier_client.demo.chat import ChatConfig, Conversation, run_turn
from kvtier_client.demo.engine import Engine, RequestResult
from kvtier_client.demo.model import Model, ModelConfig
from kvtier_client.options import ClientOptions

from ..daemon_process import DaemonProcess, wait_until

TEXT_FILE = Path(__file__)
NUM_BLOCKS = 64
"""Holds two of the chat's conversations at their end."""
CONVERSATIONS = 4
TURNS = 3
SYSTEM_TOKENS = 160
WINDOW = 40  # no multiple of the block size on purpose

PATIENT = ClientOptions(lookup_deadline_ms=5000, prepare_deadline_ms=5000)
"""So that a busy machine makes no misses where a test counts hits."""

Outputs = dict[str, tuple[int, ...]]


@cache
def make_model(window: int | None = None, seed: int = 0) -> Model:
    return Model(ModelConfig(sliding_window=window, seed=seed))


def conversations() -> list[Conversation]:
    text = TEXT_FILE.read_bytes()
    config = ChatConfig(system_tokens=SYSTEM_TOKENS)
    return [Conversation(text, config, number) for number in range(CONVERSATIONS)]


@cache
def expected(window: int | None = None, seed: int = 0) -> Outputs:
    """What any engine with this model must say: the answers of one without an offload."""
    model = make_model(window, seed)
    engine = Engine(model, model.make_cache(NUM_BLOCKS))
    chats = conversations()
    return outputs([result for _ in range(TURNS) for result in run_turn(engine, chats)])


def outputs(results: Sequence[RequestResult]) -> Outputs:
    return {result.request_id: result.output for result in results}


class OffloadedEngine:
    """An engine with kvtier in this process, and its chat."""

    def __init__(
        self,
        address: str,
        name: str,
        *,
        window: int | None = None,
        seed: int = 0,
        blocks_per_chunk: int = 4,
        num_blocks: int = NUM_BLOCKS,
    ) -> None:
        model = make_model(window, seed)
        device_cache = model.make_cache(num_blocks)
        self.tokens_per_chunk = blocks_per_chunk * device_cache.tokens_per_block
        self.offload = KvtierOffload(
            address,
            name,
            model.config,
            device_cache,
            blocks_per_chunk=blocks_per_chunk,
            options=PATIENT,
        )
        self.engine = Engine(model, device_cache, offload=self.offload)
        self.results: list[RequestResult] = []
        self._chats = conversations()
        self._turns_left = TURNS

    def turn(self) -> Iterator[RequestResult]:
        """Run the next turn of the chat; yield results as they finish."""
        self._turns_left -= 1
        for result in run_turn(self.engine, self._chats):
            self.results.append(result)
            yield result
        self.engine.check_integrity()

    def chat(self) -> Outputs:
        """Run the turns that are left; return all that was said."""
        while self._turns_left:
            list(self.turn())
        return outputs(self.results)

    @property
    def loaded_tokens(self) -> int:
        return sum(result.loaded_tokens for result in self.results)

    @property
    def loaded_share(self) -> float:
        """Of the prompt tokens in full chunks that were not in the device cache."""
        return self.loaded_tokens / sum(r.missing_tokens(self.tokens_per_chunk) for r in self.results)

    @property
    def failed_loads(self) -> int:
        return sum(result.failed_loads for result in self.results)


@contextlib.contextmanager
def attached_engine(
    daemon: DaemonProcess,
    name: str,
    *,
    window: int | None = None,
    seed: int = 0,
    blocks_per_chunk: int = 4,
    num_blocks: int = NUM_BLOCKS,
) -> Iterator[OffloadedEngine]:
    """An engine that the daemon knows; afterwards its sessions are closed."""
    engine = OffloadedEngine(
        daemon.address,
        name,
        window=window,
        seed=seed,
        blocks_per_chunk=blocks_per_chunk,
        num_blocks=num_blocks,
    )
    try:
        wait_until(lambda: engine.offload.ready, f"{name} is attached")
        yield engine
    finally:
        engine.offload.close()


def nothing_held(daemon: DaemonProcess) -> bool:
    """Whether no engine holds anything in the daemon."""
    status = daemon.status()
    pool = status.tiers[0]
    held = (pool.reserved_slots, pool.quarantined_slots, pool.pinned_chunks)
    return not status.sessions and not any(held) and not any(lease.count for lease in status.leases)
