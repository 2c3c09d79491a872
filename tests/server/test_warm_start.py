"""What the next daemon makes of a pool whose registry was too small for all that was in it."""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtier_ops.layout import TensorLayout
from kvtier_ops.lock_watch import OwnerLocks
from kvtier_ops.locks import OwnerLock
from kvtier_ops.namespace import GroupFacts, NamespaceFacts, SpaceName
from kvtier_ops.pool import Pool
from kvtier_ops.registry import MAX_PAYLOAD_BYTES
from kvtier_server.core.instances import Applicant, Role, Session
from kvtier_server.core.namespaces import Geometry, GeometryMismatch
from kvtier_server.core.tiering import Core
from kvtier_server.policies.loader import make_policy
from kvtier_server.pool_slots import PoolSlots
from kvtier_server.process_locks import ProcessLocks
from kvtier_server.warm_start import Registry, take_over

MIB = 1 << 20
PARTS = 2
TENSORS = 128
PAGE_BYTES = 4096
KEY = b"hash of a block.\0\0\0\0"


class Boot:
    """One daemon's core over the pool in `directory`; closing it leaves the pool as a killed daemon does."""

    def __init__(self, directory: Path) -> None:
        self.pool = Pool.create(directory, 64 * MIB)
        self.locks = OwnerLocks(directory)
        self._own_lock = OwnerLock.acquire(directory)
        serial = itertools.count(1)
        self.core = Core(
            self.pool.data_bytes,
            PoolSlots(self.pool),
            lambda capacity: make_policy("lru", capacity),
            ProcessLocks(self.locks, lambda name: False),
            lambda: next(serial),
        )
        self.core.books.primary.slabs.backed_bytes = self.pool.data_bytes
        self.registry = Registry(self.pool, self.core)
        if self.pool.kept:
            take_over(self.pool, self.core, self.locks)

    def attach(self, model: str, *, reverse: bool = False) -> list[Session]:
        """Attach an engine's scheduler and workers; what they told is written down as the daemon does it."""
        roles = [(Role.SCHEDULER, 0), *((Role.WORKER, rank) for rank in range(PARTS))]
        sessions = []
        for role, rank in roles:
            tensors = geometry(rank, reverse=reverse) if role is Role.WORKER else None
            name = f"{model}-{role}-{rank}"
            applicant = Applicant(
                model, 1, role, rank, PARTS, "", self._own_lock.name, 0, epoch=1, geometry=tensors
            )
            sessions.append(self.core.attach(name, applicant, facts(model), 1))
            self.registry.write()
        return sessions

    def store(self, sessions: list[Session]) -> None:
        scheduler, *workers = sessions
        request = self.core.books.request(scheduler.instance, "r")
        answer = self.core.grants.prepare_store(scheduler, request, [KEY], (), 1, 1)
        for rank, worker in enumerate(workers):
            self.core.completions.report_store(
                worker, rank, answer.slot_ids, answer.generations, [KEY], [1], set()
            )

    def holds(self, model: str) -> bool:
        space = self.core.books.primary.spaces.get(SpaceName(facts(model).digest(), "", 1))
        return space is not None and KEY in space.chunks


def facts(model: str) -> NamespaceFacts:
    group = GroupFacts(16, TENSORS * PAGE_BYTES, 0)
    return NamespaceFacts(
        model,
        "w",
        "bfloat16",
        "sha256",
        16,
        1,
        "NHD",
        (group,),
        num_parts=PARTS,
        pipeline_parallel_size=PARTS,
    )


def geometry(rank: int, *, reverse: bool) -> Geometry:
    names = [f"{'model.layers.' * 20}{rank}.{index}" for index in range(TENSORS)]
    return (tuple(TensorLayout(name, PAGE_BYTES) for name in (names[::-1] if reverse else names)),)


@pytest.fixture
def directory() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="kvtier-test-", dir="/dev/shm"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


def fill(boot: Boot) -> list[str]:
    """Attach and store until what is to be written down is larger than the registry. Returns the models."""
    bytes_of_one = len(json.dumps([(t.name, t.page_bytes) for t in geometry(0, reverse=False)[0]])) * PARTS
    models = [f"model{number}" for number in range(MAX_PAYLOAD_BYTES // bytes_of_one + 2)]
    for model in models:
        boot.store(boot.attach(model))
    return models


def test_no_chunk_survives_whose_geometry_did_not_fit_into_the_registry(directory: Path) -> None:
    boot = Boot(directory)
    models = fill(boot)
    boot.pool.close()
    boot = Boot(directory)
    for model in filter(boot.holds, models):
        with pytest.raises(GeometryMismatch):
            boot.attach(model, reverse=True)
    boot.pool.close()


def test_as_many_namespaces_survive_as_fit_into_the_registry(directory: Path) -> None:
    boot = Boot(directory)
    models = fill(boot)
    boot.pool.close()
    boot = Boot(directory)
    kept = [model for model in models if boot.holds(model)]
    assert len(models) - 3 <= len(kept) < len(models)
    for model in kept:
        boot.attach(model)
    boot.core.check_integrity()
    boot.pool.close()


def test_of_one_namespace_with_too_many_key_spaces_the_newest_survive(directory: Path) -> None:
    boot = Boot(directory)
    sessions = boot.attach("model")
    boot.store(sessions)
    digest, spaces = facts("model").digest(), boot.core.books.primary.spaces
    epochs = range(2, 2 + MAX_PAYLOAD_BYTES // len(digest))
    for epoch in epochs:
        spaces.get_or_add(SpaceName(digest, "", epoch))
    boot.registry.write()
    payload = json.loads(boot.pool.registry.read() or b"")
    on_file = [epoch for _, _, _, epoch in payload["spaces"]]
    assert sorted(on_file) == list(epochs)[-len(on_file) :]
    assert len(on_file) > len(epochs) // 2
    assert list(payload["geometries"]) == [digest]
    boot.pool.close()


def test_a_chunk_is_given_up_if_the_geometry_of_any_of_its_parts_is_not_on_file(directory: Path) -> None:
    boot = Boot(directory)
    boot.store(boot.attach("model"))
    boot.store(boot.attach("other"))
    payload = json.loads(boot.pool.registry.read() or b"")
    del payload["geometries"][facts("model").digest()]["1"]
    boot.pool.registry.write(json.dumps(payload).encode())
    boot.pool.close()
    boot = Boot(directory)
    assert not boot.holds("model")
    assert boot.holds("other")
    boot.core.check_integrity()
    boot.pool.close()
