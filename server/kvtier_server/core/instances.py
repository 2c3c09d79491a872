"""Engine instances and their sessions: who is attached, and who may replace whom.

An instance is one start of an engine; its processes (a scheduler, one worker per rank) each hold a session.
They share their fate: when one session ends, all do, and the living processes attach again. That is rarer
and far simpler than an instance of which parts are new.

Owns identity and the rules of Attach. Leases and stores of an ended instance are `tiering.py`'s to end.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from kvtier_server.core.limits import Limits
from kvtier_server.core.namespaces import Geometry, Namespace
from kvtier_server.core.refused import BadRequest, Refused
from kvtier_server.core.requests import Requests
from kvtier_server.primary.index import KeySpace


class Locks(Protocol):
    """Seam: the lock files of processes that map the pool, by name. Real: `process_locks`."""

    def hold(self, name: str) -> bool:
        """Follow a lock until `let_go`; False, and nothing is followed anew, unless a process holds it.

        Raises TooManySessions if no more can be followed.
        """

    def is_free(self, name: str) -> bool:
        """Whether the lock can be taken now, and nothing is copied for the process that held it."""

    def let_go(self, name: str) -> None:
        """Follow it no longer."""


class Role(StrEnum):
    """Which half of an engine a session serves."""

    SCHEDULER = "scheduler"
    WORKER = "worker"


class SessionUnknown(Refused):
    """The session is of another boot, or has ended. The client attaches again."""

    reason = "SESSION_UNKNOWN"


class RankTaken(Refused):
    """A living process holds this engine id, role and rank. The client backs off."""

    reason = "RANK_TAKEN"


class WorkersMissing(Refused):
    """Not all workers are attached, so nothing can be leased."""

    reason = "WORKERS_MISSING"


class TooManyEngines(Refused):
    """The daemon has as many engine instances as it may."""

    reason = "LIMIT_ENGINES"


class TooManySessions(Refused):
    """The daemon has as many sessions as it may."""

    reason = "LIMIT_SESSIONS"


MAX_SAID = 80
"""Characters of a session's id that an answer repeats: those of ours have 33."""


def session_unknown(session_id: str) -> SessionUnknown:
    """Make the refusal of a session that is not there, or not the caller's: nobody can tell which."""
    return SessionUnknown(f"session {session_id[:MAX_SAID]!r} is not open here; attach again")


@dataclass(frozen=True, slots=True)
class Applicant:
    """Who wants to attach, with which tensors.

    `mapped_pool_id`: pool the process has mapped; 0 is its word that it can be writing none.
    `previous_session`: not empty is its word that none of its copies still runs.
    """

    engine_id: str
    nonce: int
    role: Role
    rank: int
    world_size: int
    tenant: str
    lock_file: str
    mapped_pool_id: int
    previous_session: str = ""
    epoch: int = 0
    geometry: Geometry | None = None


class Instance:
    """One start of an engine, its sessions and what it holds."""

    def __init__(
        self,
        serial: int,
        applicant: Applicant,
        namespace: Namespace,
        space: KeySpace,
        requests: Requests,
        lookup_lease_ns: int,
    ) -> None:
        self.serial = serial
        self.engine_id = applicant.engine_id
        self.nonce = applicant.nonce
        self.world_size = applicant.world_size
        self.tenant = applicant.tenant
        self.namespace = namespace
        self.space = space
        self.sessions: dict[tuple[Role, int], Session] = {}
        self.requests = requests
        self.lookup_lease_ns = lookup_lease_ns
        """What its sessions were told at Attach, and count on."""
        self.num_leases = 0
        self.pinned_bytes = 0
        self.credit_bytes = 0
        self.credits_asked_ns = 0
        self.inflight_bytes = 0
        self.early_loads: OrderedDict[int, set[int]] = OrderedDict()
        self.ended: OrderedDict[object, None] = OrderedDict()

    def missing_ranks(self) -> list[int]:
        """Worker ranks that are not attached."""
        return [rank for rank in range(self.world_size) if (Role.WORKER, rank) not in self.sessions]

    def remember_ended(self, item: object, max_remembered: int) -> None:
        """Remember that an item ended, so that a repeat is told ALREADY."""
        self.ended[item] = None
        if len(self.ended) > max_remembered:
            self.ended.popitem(last=False)


class Session:
    """One open Attach stream."""

    __slots__ = ("attached_ns", "id", "instance", "lock_file", "rank", "role")

    def __init__(self, session_id: str, instance: Instance, applicant: Applicant, now_ns: int) -> None:
        self.id = session_id
        self.instance = instance
        self.role = applicant.role
        self.rank = applicant.rank
        self.lock_file = applicant.lock_file
        self.attached_ns = now_ns

    def for_scheduling(self) -> Instance:
        """Return the instance. Raises BadRequest for a worker's session.

        Only the scheduler knows the epoch, and so which chunks may be asked for.
        """
        if self.role is not Role.SCHEDULER:
            raise BadRequest("session_id", "a worker's; only the scheduler's session may make this call")
        return self.instance


class Instances:
    """All instances and sessions."""

    def __init__(self, limits: Limits, locks: Locks) -> None:
        self._limits = limits
        self._locks = locks
        self._by_name: dict[tuple[str, int], Instance] = {}
        self._seats: dict[tuple[str, Role, int], Session] = {}
        self.sessions: dict[str, Session] = {}
        self._serial = 0
        self._requests = itertools.count(1)

    def set_limits(self, limits: Limits) -> None:
        """Go by other limits from now on. What is beyond them stays."""
        self._limits = limits

    def __iter__(self) -> Iterator[Instance]:
        return iter(self._by_name.values())

    def __len__(self) -> int:
        return len(self._by_name)

    def session(self, session_id: str) -> Session:
        """Return an open session. Raises SessionUnknown."""
        session = self.sessions.get(session_id)
        if session is None:
            raise session_unknown(session_id)
        return session

    def seat_holder(self, applicant: Applicant, now_ns: int) -> Session | None:
        """Return the session that holds the applicant's seat and may be replaced; None if the seat is free.

        Raises RankTaken if its process lives and is not the applicant.
        """
        holder = self._seats.get((applicant.engine_id, applicant.role, applicant.rank))
        if holder is None or self._locks.is_free(holder.lock_file):
            return holder
        if holder.instance.tenant != applicant.tenant:
            # Without the lock's name: who knows it passes for the process that holds it.
            raise RankTaken(
                f"engine {applicant.engine_id!r} has a living {applicant.role} of rank {applicant.rank} of "
                "another tenant; give this engine another engine_id"
            )
        if applicant.lock_file == holder.lock_file:
            return holder
        age_s = (now_ns - holder.attached_ns) // 1_000_000_000
        raise RankTaken(
            f"engine {applicant.engine_id!r} has a living {applicant.role} of rank {applicant.rank}, "
            f"attached for {age_s} s (lock {holder.lock_file}); stop that process or give this engine "
            "another engine_id",
            age_seconds=str(age_s),
            lock=holder.lock_file,
        )

    def check_room(self, applicant: Applicant) -> None:
        """Raise TooManyEngines or TooManySessions."""
        if len(self.sessions) >= self._limits.max_sessions:
            raise TooManySessions(f"{len(self.sessions)} sessions are open, the limit (limits.sessions)")
        new = (applicant.engine_id, applicant.nonce) not in self._by_name
        if new and len(self._by_name) >= self._limits.max_engines:
            raise TooManyEngines(f"{len(self._by_name)} engines are attached, the limit (limits.engines)")

    def check_same(self, applicant: Applicant, namespace: Namespace) -> None:
        """Raise BadRequest if the applicant contradicts the instance it says it belongs to."""
        instance = self._by_name.get((applicant.engine_id, applicant.nonce))
        if instance is None:
            return
        for field, ours, theirs in (
            ("namespace", instance.namespace.digest, namespace.digest),
            ("world_size", instance.world_size, applicant.world_size),
            ("tenant", instance.tenant, applicant.tenant),
        ):
            if ours != theirs:
                raise BadRequest(field, f"{theirs!r}, but this engine instance attached with {ours!r}")

    def open(
        self, session_id: str, applicant: Applicant, namespace: Namespace, space: KeySpace, now_ns: int
    ) -> Session:
        """Seat the applicant; the instance is new if it is the first of it."""
        name = (applicant.engine_id, applicant.nonce)
        instance = self._by_name.get(name)
        if instance is None:
            self._serial += 1
            requests = Requests(
                self._limits.max_requests, self._limits.max_remembered_keys, self._requests.__next__
            )
            ttl_ns = self._limits.lookup_lease_ns
            instance = Instance(self._serial, applicant, namespace, space, requests, ttl_ns)
            self._by_name[name] = instance
        session = Session(session_id, instance, applicant, now_ns)
        self.sessions[session_id] = session
        instance.sessions[(applicant.role, applicant.rank)] = session
        self._seats[(applicant.engine_id, applicant.role, applicant.rank)] = session
        return session

    def remove(self, instance: Instance) -> list[Session]:
        """Take an instance and all its sessions out. Returns the sessions."""
        del self._by_name[(instance.engine_id, instance.nonce)]
        sessions = list(instance.sessions.values())
        for session in sessions:
            del self.sessions[session.id]
            seat = (instance.engine_id, session.role, session.rank)
            if self._seats.get(seat) is session:
                del self._seats[seat]
        instance.sessions.clear()
        return sessions
