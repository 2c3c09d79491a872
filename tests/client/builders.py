"""Facts and identities that the client's tests share."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence

from kvtier_client import ClientListener, ClientOptions, EngineIdentity, OffloadClient, Role, SessionInfo
from kvtier_ops.layout import TensorLayout
from kvtier_ops.namespace import GroupFacts, NamespaceFacts

FACTS = NamespaceFacts(
    model="tiny",
    weights_id="w1",
    kv_dtype="bfloat16",
    hash_algorithm="sha256",
    tokens_per_hash=16,
    blocks_per_chunk=1,
    kv_cache_layout="LBHNC",
    groups=(GroupFacts(tokens_per_block=16, part_bytes=4096),),
)
KEYS = [bytes([number]) * 32 + bytes(4) for number in range(4)]


def make_client(
    address: str,
    *,
    role: Role = Role.SCHEDULER,
    options: ClientOptions | None = None,
    listener: ClientListener | None = None,
) -> OffloadClient:
    return OffloadClient(
        address,
        EngineIdentity("engine-1", 7, role),
        FACTS,
        geometry=[[TensorLayout("layer.0", 4096)]] if role is Role.WORKER else None,
        options=options,
        listener=listener,
    )


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 20) -> None:
    """Wait for what a background thread will do."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"did not happen in {timeout_s} s: {what}"
        time.sleep(0.002)


def wait_for_child(pid: int, timeout_s: float = 20) -> int:
    """Wait for a forked child and return its exit status; kill it and return -1 if it hangs."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -1


class Notes(ClientListener):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []
        self.drained = True

    def names(self) -> list[object]:
        return [name for name, *_ in self.told]

    def on_attached(self, session: SessionInfo) -> None:
        self.told.append(("attached", session))

    def on_detached(self, reason: str) -> None:
        self.told.append(("detached", reason))

    def drain(self, timeout_s: float) -> bool:
        self.told.append(("drain",))
        return self.drained

    def on_resolved(self, lease_id: int, key: bytes, status: int, slot_id: int, generation: int) -> None:
        self.told.append(("resolved", lease_id, key, status, slot_id, generation))

    def on_credits(
        self, group: int, slot_ids: Sequence[int], generations: Sequence[int], lease_id: int
    ) -> None:
        self.told.append(("credits", group, list(slot_ids), list(generations), lease_id))

    def on_credits_wanted(self, count: int) -> None:
        self.told.append(("credits_wanted", count))

    def on_draining(self, deadline_ms: int) -> None:
        self.told.append(("draining", deadline_ms))

    def on_workers_changed(self, missing_ranks: tuple[int, ...]) -> None:
        self.told.append(("workers", missing_ranks))
