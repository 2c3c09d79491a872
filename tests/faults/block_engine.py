"""An engine without a model: a process whose device blocks are numpy arrays and whose bytes tell their key.

It uses the real client and the real shims, all in one process: the scheduler and its only worker. What it
computes for a chunk follows from the chunk's key (and the engine's weights), so every loaded byte can be
checked. It is driven by JSON lines on stdin and answers each with one on stdout; `engine_process.py` is the
other end. Run as `python -m tests.faults.block_engine`.
"""

from __future__ import annotations

import json
import logging
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy as np
from tests.faults.block_device import (
    BLOCKS_PER_CHUNK,
    CHUNK_TOKENS,
    LAYOUT,
    UNWRITTEN,
    Device,
    chunk_blocks,
    content_of,
    facts,
    key_of,
)
from tests.faults.traffic import ErrorRecords, Heartbeat, Traffic

from kvtier_client import ClientOptions, EngineIdentity, OffloadClient, Role, StoreVerdict
from kvtier_client.context import ReqContext
from kvtier_client.jobs import JobId, JobResult, LoadJob, StoreJob
from kvtier_client.scheduler import SchedulerShim
from kvtier_client.worker import WorkerShim
from kvtier_ops import faults
from kvtier_ops.host import Bytes, HostTensors

P = ParamSpec("P")
T = TypeVar("T")

READ_CHUNKS = 8
"""Chunks that `read` pins at once: less than an engine's share of the smallest pools."""
STEP_CHUNKS = 4
"""Chunks that one step computes, as a chunked prefill does."""
PATIENCE_S = 10.0
"""Longest wait of a command for what must come; far above what anything here takes."""

PATIENT_OPTIONS = {
    "lookup_deadline_ms": 1000,
    "prepare_deadline_ms": 1000,
    "reconnect_min_ms": 20,
    "reconnect_max_ms": 100,
}
"""Tests whose subject is not a deadline should not miss one on a busy machine."""

SCHEDULER_POINTS = (
    "lookup_async", "lookup", "prepare_load", "prepare_store", "request_credits", "announce", "start_load",
    "release", "finish", "flush", "flush_and_wait",
)  # fmt: skip
WORKER_POINTS = ("report_store", "report_load", "flush", "flush_and_wait")


class Engine:
    """The engine's parts and its commands: each public method is one."""

    def __init__(self) -> None:
        self._device = Device()
        self._weights = ""
        self._started = False
        self._tables: dict[str, tuple[list[str], list[int]]] = {}
        self._results: dict[JobId, JobResult] = {}
        self._direct_jobs = iter(range(1 << 40, 1 << 41))
        self._traffic: Traffic | None = None
        self._made_loads: dict[str, LoadJob] = {}
        self._kept_data: Bytes | None = None
        self._errors = ErrorRecords()
        self._heartbeat = Heartbeat()
        self.slowest_s: Counter[str] = Counter()
        logging.getLogger().addHandler(self._errors)

    # Life

    def start(
        self,
        address: str,
        engine_id: str,
        tenant: str = "",
        weights: str = "",
        weights_id: str = "w0",
        verify_loads: str = "always",
        num_threads: int = 2,
        options: dict[str, float] | None = None,
    ) -> None:
        """Begin to attach."""
        self._weights = weights
        nonce = random.SystemRandom().getrandbits(63) + 1
        given = {**PATIENT_OPTIONS, **(options or {})}
        chosen = ClientOptions(**given)  # type: ignore[arg-type]
        namespace = facts(weights_id)

        def client(role: Role) -> OffloadClient:
            return OffloadClient(
                address,
                EngineIdentity(engine_id, nonce, role, tenant=tenant),
                namespace,
                geometry=[LAYOUT.tensors] if role is Role.WORKER else None,
                options=chosen,
            )

        self._ask = client(Role.SCHEDULER)
        self._copy = client(Role.WORKER)
        _add_points(self._ask, SCHEDULER_POINTS)
        _add_points(self._copy, WORKER_POINTS)
        self._scheduler = SchedulerShim(self._ask)
        on_credits = self._scheduler.on_credits
        setattr(self._scheduler, "on_credits", _between_points("on_credits", on_credits))  # noqa: B010
        self._worker = WorkerShim(
            self._copy,
            HostTensors([list(self._device.pages)]),
            [LAYOUT],
            BLOCKS_PER_CHUNK,
            part=0,
            verify_loads=verify_loads,  # type: ignore[arg-type]
            num_threads=num_threads,
        )
        self._ask.start()
        self._copy.start()
        self._started = True

    def wait_ready(self, not_boot: str = "", not_session: str = "") -> dict[str, str]:
        """Wait until leases would be granted, by another boot and in another session than these."""

        def is_ready() -> bool:
            sessions = (self._ask.session, self._copy.session)
            others = all(
                session is not None and session.boot_id != not_boot and session.session_id != not_session
                for session in sessions
            )
            return others and self._ask.ready and self._copy.wait_attached(0)

        _wait_for(is_ready, f"attached and ready; away: {self._ask.away_reason!r}")
        return self.session()

    def session(self) -> dict[str, str]:
        """The scheduler's session; empty when away."""
        session = self._ask.session
        if session is None:
            return {"session_id": "", "boot_id": "", "epoch": ""}
        return {"session_id": session.session_id, "boot_id": session.boot_id, "epoch": str(session.epoch)}

    def report(self) -> dict[str, Any]:
        """Counters of both clients, logged errors, the longest time of each call, and of waiting to run."""
        return {
            "scheduler": self._ask.stats.snapshot(),
            "worker": self._copy.stats.snapshot(),
            "errors": self._errors.texts,
            "slowest_s": dict(self.slowest_s),
            "starved_s": self._heartbeat.worst_s,
        }

    def close(self) -> None:
        """Leave as an engine does that ends well."""
        if self._started:
            self._worker.close()
            self._copy.close()
            self._ask.close()

    def arm(self, point: str, action: str, nth: int = 1) -> None:
        """Do `action` (kill, stop, die_in_copy) when the point is passed for the nth time."""
        passes = 0

        def act() -> None:
            nonlocal passes
            passes += 1
            if passes == nth:
                if action == "die_in_copy":
                    self._device.forbid_last_layer()
                else:
                    faults.parse_faults(f"{point}={action}")[point]()

        faults.arm(point, act)

    # Requests as an engine runs them

    def run(self, req: str, names: list[str], num_decoded: int = 0) -> dict[str, Any]:
        """Run a request to its end: look up, load what is there, compute and store the rest.

        The last `num_decoded` chunks are not known before they are computed.
        """
        loaded = self.begin(req, names, num_decoded)
        answer = self.load(req, loaded["num_hits"])
        answer |= self.compute(req)
        self.finish(req)
        self._flush()
        return answer

    def begin(self, req: str, names: list[str], num_decoded: int = 0) -> dict[str, Any]:
        """Add a request and look it up; what was found stays pinned."""
        self._tables[req] = (names, self._device.allocate(len(names)))
        keys = [key_of(name) for name in names[: len(names) - num_decoded]]
        self._timed("add_request", self._scheduler.add_request, req, [keys])
        tokens: list[int] = []

        def has_answer() -> bool:
            found = self._timed("lookup", self._scheduler.lookup, req, 0)
            self._timed("end_step", self._scheduler.end_step)
            if found is not None:
                tokens.append(found)
            return found is not None

        _wait_for(has_answer, f"an answer to the lookup of {req}")
        return {"num_hits": tokens[0] // CHUNK_TOKENS}

    def load(self, req: str, num_chunks: int) -> dict[str, Any]:
        """Load the first chunks of a request that was looked up."""
        if not num_chunks:
            return {"loaded": [], "failed": [], "wrong": []}
        self.make_load(req, num_chunks)
        return self.submit_load(req)

    def make_load(self, req: str, num_chunks: int) -> None:
        """Make the job that loads them, which is on its way to the worker from now on."""
        _, blocks = self._tables[req]
        self._made_loads[req] = self._timed(
            "prepare_load",
            self._scheduler.prepare_load,
            req,
            0,
            num_chunks * CHUNK_TOKENS,
            [blocks[: num_chunks * BLOCKS_PER_CHUNK]],
        )

    def submit_load(self, req: str) -> dict[str, Any]:
        """Let the job arrive at the worker, and wait for its result."""
        job = self._made_loads.pop(req)
        names, blocks = self._tables[req]
        self._worker.submit_load(job)
        self._timed("end_step", self._scheduler.end_step)
        result = self._result_of(job.job_id)
        self._scheduler.load_finished(job.job_id, result.ok, result.failed_keys)
        return self._judge(names[: len(job.keys)], blocks, result)

    def compute(self, req: str) -> dict[str, Any]:
        """Compute a request's chunks and store them, a few in each step. Every chunk has one fate."""
        names, blocks = self._tables[req]
        stats = self._scheduler.stats
        before = stats.stored_chunks, stats.skipped.copy()
        for index, name in enumerate(names):
            self._device.write(chunk_blocks(blocks, index), content_of(key_of(name), self._weights))
        num_known = len(self._scheduler._requests[req].groups[0].keys)
        self._scheduler.extend_keys(req, 0, [key_of(name) for name in names[num_known:]])
        stored: list[str] = []
        lost: list[str] = []
        end = 0
        while end < len(names):
            end = min(end + STEP_CHUNKS, len(names))
            self._await_credits(STEP_CHUNKS)
            job = self._timed(
                "prepare_store", self._scheduler.prepare_store, req, end * CHUNK_TOKENS, [blocks]
            )
            if job is not None:
                self._worker.submit_store(job)
            self._timed("end_step", self._scheduler.end_step)
            if job is not None:
                result = self._result_of(job.job_id)
                self._scheduler.store_finished(job.job_id)
                for key, name in ((key_of(name), name) for name in names):
                    if key in job.keys:
                        (lost if key in result.failed_keys else stored).append(name)
        skipped = stats.skipped - before[1]
        return {
            "stored": stored,
            "lost": lost,
            "num_stored": stats.stored_chunks - before[0],
            "skipped": {reason.name: count for reason, count in skipped.items()},
        }

    def finish(self, req: str) -> None:
        """End a request, and its step."""
        _, blocks = self._tables.pop(req)
        self._timed("finish", self._scheduler.finish, req)
        self._timed("end_step", self._scheduler.end_step)
        self._device.free(blocks)

    def reset(self, weights_id: str = "", weights: str = "") -> bool:
        """Update the weights: other bytes from now on. True = the daemon has confirmed the new epoch."""
        self._weights = weights
        return self._scheduler.reset(weights_id)

    # Calls that say what became of every key

    def store(self, req: str, names: list[str], wait: bool = True) -> dict[str, Any]:
        """Store chunks with PrepareStore. With `wait=False` the copies go on; see `join`."""
        blocks = self._device.allocate(len(names))
        for index, name in enumerate(names):
            self._device.write(chunk_blocks(blocks, index), content_of(key_of(name), self._weights))
        keys = [key_of(name) for name in names]
        grant = self._timed("client.prepare_store", self._ask.prepare_store, ReqContext(req), keys)
        granted = [i for i, verdict in enumerate(grant.verdicts) if verdict == StoreVerdict.GRANTED]
        if granted:
            job = StoreJob(
                job_id=JobId(next(self._direct_jobs)),
                pool_id=grant.pool_id,
                slot_ids=tuple(grant.slot_ids),
                generations=tuple(grant.generations),
                keys=tuple(keys[i] for i in granted),
                block_ids=tuple(block for i in granted for block in chunk_blocks(blocks, i)),
                group_sizes=(len(granted) * BLOCKS_PER_CHUNK,),
                block_indices=(0,),
            )
            self._worker.submit_store(job)
        answer: dict[str, Any] = {
            "verdicts": {
                name: StoreVerdict(verdict).name for name, verdict in zip(names, grant.verdicts, strict=True)
            },
            "evicted": [key.hex() for key in grant.evicted_keys],
            "reason": grant.reason,
            "slot_ids": list(grant.slot_ids),
        }
        if wait:
            if granted:
                result = self._result_of(job.job_id)
                answer["lost"] = [names[i] for i in granted if keys[i] in result.failed_keys]
            self._device.free(blocks)
            self._ask.finish(req)
            self._flush()
        elif granted:
            self._tables[req] = ([str(job.job_id)], blocks)
        return answer

    def join(self, reqs: list[str]) -> dict[str, Any]:
        """Wait for the copies of stores that were not waited for; `lost` were not wholly written."""
        lost: list[str] = []
        for req in reqs:
            if req in self._tables:
                (job_id,), blocks = self._tables.pop(req)
                lost += [key.hex() for key in self._result_of(JobId(int(job_id))).failed_keys]
                self._device.free(blocks)
            self._ask.finish(req)
        self._flush()
        return {"lost": lost}

    def reserve(self, req: str, names: list[str]) -> dict[str, Any]:
        """Take slots and neither write nor report."""
        grant = self._ask.prepare_store(ReqContext(req), [key_of(name) for name in names])
        return {"slot_ids": list(grant.slot_ids), "reason": grant.reason}

    def look(self, req: str, names: list[str]) -> str:
        """Ask for a leased Lookup and keep what it grants; returns why it was not answered, if so."""
        return self._ask.lookup(ReqContext(req), [key_of(name) for name in names]).reason

    def pin(self, req: str, names: list[str]) -> bool:
        """Pin chunks with PrepareLoad and never load them; tells whether they were granted."""
        return self._ask.prepare_load(ReqContext(req), [key_of(name) for name in names]) is not None

    def held_credits(self) -> int:
        """Credits that the scheduler has at hand."""
        return self._scheduler._credits.held(0)

    def hits(self, names: list[str]) -> list[str]:
        """Names of the chunks that the daemon has now."""
        answer = self._ask.lookup(ReqContext("look"), [key_of(name) for name in names], lease=False)
        if answer.reason:
            raise RuntimeError(f"the lookup was not answered: {answer.reason}")
        return [name for name, status in zip(names, answer.statuses, strict=True) if status == 1]

    def read(self, names: list[str], req: str = "read") -> dict[str, Any]:
        """Load with PrepareLoad every chunk that the daemon has, and check its bytes."""
        found = self.hits(names)
        fields = ("loaded", "failed", "wrong", "right_in_memory", "untouched")
        answer: dict[str, Any] = {field: [] for field in fields}
        for first in range(0, len(found), READ_CHUNKS):
            for field, values in self._read_some(req, found[first : first + READ_CHUNKS]).items():
                answer[field] += values
            self._flush()
        self._ask.finish(req)
        self._flush()
        return answer

    def _read_some(self, req: str, names: list[str]) -> dict[str, Any]:
        keys = [key_of(name) for name in names]
        grant = self._timed("client.prepare_load", self._ask.prepare_load, ReqContext(req), keys)
        if grant is None:
            return {"failed": names}
        blocks = self._device.allocate(len(names))
        job = LoadJob(
            job_id=JobId(next(self._direct_jobs)),
            pool_id=grant.pool_id,
            slot_ids=tuple(grant.slot_ids),
            generations=tuple(grant.generations),
            keys=tuple(keys),
            block_ids=tuple(blocks),
            group_sizes=(len(blocks),),
            block_indices=(0,),
            load_lease_id=grant.lease_id,
        )
        self._worker.submit_load(job)
        answer = self._judge(names, blocks, self._result_of(job.job_id))
        self._device.free(blocks)
        return answer

    # Traffic

    def traffic_start(self, seed: int, num_prompts: int, max_chunks: int) -> None:
        """Run requests without end on a thread of their own; no other command may use the engine then."""
        assert self._traffic is None, "there is traffic already"
        self._traffic = Traffic(self.run, seed, num_prompts, max_chunks)
        self._traffic.start()

    def traffic_count(self) -> dict[str, int]:
        """How much has been done so far."""
        assert self._traffic is not None, "there is no traffic"
        return {name: len(names) for name, names in self._traffic.names.items()} | {
            "requests": self._traffic.requests
        }

    def traffic_stop(self) -> dict[str, Any]:
        """End it, and say what became of it."""
        traffic, self._traffic = self._traffic, None
        assert traffic is not None, "there is no traffic"
        return traffic.stop()

    # The mapping

    def keep_pool(self) -> None:
        """Hold on to the mapping of today, as a running copy does."""
        session = self._copy.session
        assert session is not None, "away"
        assert session.pool is not None, "a worker maps the pool"
        self._kept_data = session.pool.data

    def touch_pool(self) -> int:
        """Read and write every byte of the mapping that was kept, changing none. Returns how many."""
        data = self._kept_data
        assert data is not None, "no mapping was kept"
        np.bitwise_xor(data, 0, out=data)
        return len(data)

    # Inside

    def _judge(self, names: Sequence[str], blocks: Sequence[int], result: JobResult) -> dict[str, Any]:
        right = {
            name
            for index, name in enumerate(names)
            if self._device.holds(chunk_blocks(blocks, index), content_of(key_of(name), self._weights))
        }
        failed = [name for name in names if key_of(name) in result.failed_keys]
        loaded = [name for name in names if name not in failed]
        return {
            "loaded": loaded,
            "failed": failed,
            "wrong": [name for name in loaded if name not in right],
            "right_in_memory": sorted(right),
            "untouched": [
                name
                for index, name in enumerate(names)
                if (self._device.pages[:, chunk_blocks(blocks, index)] == UNWRITTEN).all()
            ],
        }

    def _result_of(self, job_id: JobId) -> JobResult:
        self._timed("wait", self._worker.wait, [job_id])
        for result in self._worker.get_finished():
            assert result.job_id not in self._results, f"job {result.job_id} ended twice"
            self._results[result.job_id] = result
        return self._results.pop(job_id)

    def _await_credits(self, count: int) -> None:
        """Wait until there are credits, or nobody is asked for any: the forward pass of this engine."""
        book = self._scheduler._credits

        def is_decided() -> bool:
            self._scheduler.end_step()
            is_asked = any(group.asked for group in book._groups)
            return book.held(0) >= count or not self._ask.ready or not is_asked

        _wait_for(is_decided, "an answer to the request for credits")

    def _flush(self) -> None:
        for client in (self._copy, self._ask):
            client.flush_and_wait(PATIENCE_S)

    def _timed(self, name: str, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        started = time.monotonic()
        try:
            return call(*args, **kwargs)
        finally:
            self.slowest_s[name] = max(self.slowest_s[name], time.monotonic() - started)  # type: ignore[assignment]


def _between_points(name: str, call: Callable[P, T]) -> Callable[P, T]:
    def pointed(*args: P.args, **kwargs: P.kwargs) -> T:
        faults.fault_point(f"{name}.before")
        result = call(*args, **kwargs)
        faults.fault_point(f"{name}.after")
        return result

    return pointed


def _add_points(client: OffloadClient, names: Sequence[str]) -> None:
    """Put a fault point before and after these calls; the calls stay what they are."""
    for name in names:
        setattr(client, name, _between_points(f"{client.identity.role.value}.{name}", getattr(client, name)))


def _wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"this did not come within {PATIENCE_S:.0f} s: {what}")
        time.sleep(0.001)


def main() -> None:
    """Answer commands until stdin ends."""
    engine = Engine()
    for line in sys.stdin:
        command = json.loads(line)
        method = getattr(engine, command.pop("op"))
        try:
            answer = {"answer": method(**command)}
        except Exception:  # noqa: BLE001 the test gets the traceback
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), flush=True)  # noqa: T201 the other end reads it
    engine.close()


if __name__ == "__main__":
    main()
