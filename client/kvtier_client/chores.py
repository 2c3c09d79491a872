"""What the background thread does while a session is open: renew leases, probe, repeat lost reports.

Owns when each is due. With the breaker open only the probe goes out.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator

import grpc

from kvtier.v1 import offload_pb2
from kvtier_client.channel import read_failure
from kvtier_client.gate import Gate, lease_time
from kvtier_client.link import Link
from kvtier_client.options import ClientOptions
from kvtier_client.sender import CompletionSender
from kvtier_client.stats import ClientStats

logger = logging.getLogger(__name__)

MIN_RENEW_S = 0.05
"""Renewals come no faster, whatever the daemon says of its leases: no time at all would cost a full core.
Leases that need it faster run out, which is a miss."""

_jitter = random.Random()
# Of its own: an engine that seeded the process's generator must draw the numbers it expects.


def pauses_s(options: ClientOptions) -> Iterator[float]:
    """Yield the pauses between attempts, doubling between the two bounds.

    Each is up to a fifth shorter, so that the engines of a node do not come back all at once.
    """
    pause_ms = options.reconnect_min_ms
    while True:
        yield pause_ms / 1000 * _jitter.uniform(0.8, 1.0)
        pause_ms = min(2 * pause_ms, options.reconnect_max_ms)


class Chores:
    """The duties of one open session. Runs on the background thread only."""

    def __init__(
        self, gate: Gate, link: Link, sender: CompletionSender, options: ClientOptions, stats: ClientStats
    ) -> None:
        self._gate = gate
        self._link = link
        self._sender = sender
        self._options = options
        self._stats = stats
        self._renew_at = time.monotonic() + self._third_s
        self._probe_at: float | None = None
        self._closed_at = 0.0
        self._pauses = pauses_s(options)

    def run(self) -> None:
        """Work until the session is lost or the client closes."""
        gate = self._gate
        while True:
            with gate.lock:
                if not self._is_over():
                    gate.changed.wait(max(0.0, self._wake_at() - time.monotonic()))
                if self._is_over():
                    return
            self._do_what_is_due()

    @property
    def _third_s(self) -> float:
        return max(self._link.leases.ttl_s / 3, MIN_RENEW_S)

    def _is_over(self) -> bool:
        return self._gate.closing or self._gate.link is not self._link

    def _wake_at(self) -> float:
        if self._gate.breaker.is_open:
            # None: it has just opened, and the first probe is to be planned.
            return 0.0 if self._probe_at is None else self._probe_at
        return min(at for at in (self._renew_at, self._link.retry_at, self._link.flush_at) if at is not None)

    def _do_what_is_due(self) -> None:
        now = time.monotonic()
        if self._gate.breaker.is_open:
            if self._probe_at is None:
                # One that opens again at once is probed ever more seldom: each time costs a deadline.
                if now - self._closed_at > self._options.reconnect_max_ms / 1000:
                    self._pauses = pauses_s(self._options)
                self._probe_at = now + next(self._pauses)
            elif now >= self._probe_at and not self._probe():
                self._probe_at = time.monotonic() + next(self._pauses)
            return
        self._probe_at = None
        if now >= self._renew_at:
            retry_s = max(min(self._third_s / 4, self._options.reconnect_max_ms / 1000), MIN_RENEW_S)
            self._renew_at = now + (self._third_s if self._renew() else retry_s)
        if self._link.retry_at is not None and now >= self._link.retry_at:
            self._sender.send(self._link)
        if self._link.flush_at is not None and now >= self._link.flush_at:
            with self._gate.lock:
                self._link.flush_at = None
            self._sender.flush()

    def _probe(self) -> bool:
        """Ask the daemon something small; an answer in time closes the breaker."""
        self._stats.add("rpc_describe")
        request = offload_pb2.DescribeRequest()
        try:
            described = self._link.stub.Describe(request, timeout=self._options.lookup_deadline_ms / 1000)
        except (grpc.RpcError, ValueError) as error:
            # Told in the log already when the breaker opened; a daemon that is gone ends the stream.
            logger.debug("the probe failed: %s", read_failure(error).reason)
            return False
        if self._gate.answered(self._link, described.boot_id, "Describe"):
            self._gate.close_breaker()
            self._closed_at = time.monotonic()
            logger.info("the daemon answers in time again")
            self._sender.send(self._link)
        return True

    def _renew(self) -> bool:
        """Renew the kept leases; False when a call failed, so that it is tried again soon."""
        gate, link = self._gate, self._link
        sent_at = lease_time()
        with gate.lock:
            link.leases.expire(sent_at)
            lease_ids = link.leases.kept()
        for some in (lease_ids[i : i + link.max_keys] for i in range(0, len(lease_ids), link.max_keys)):
            self._stats.add("rpc_renew_leases")
            request = offload_pb2.RenewLeasesRequest(session_id=link.session_id, lease_ids=some)
            try:
                reply = link.stub.RenewLeases(request, timeout=self._options.prepare_deadline_ms / 1000)
            except (grpc.RpcError, ValueError) as error:
                gate.failed(link, error, "RenewLeases")
                return False
            if not gate.answered(link, reply.boot_id, "RenewLeases"):
                return False
            self._note_renewed(some, reply, sent_at)
        return True

    def _note_renewed(
        self, lease_ids: list[int], reply: offload_pb2.RenewLeasesResponse, sent_at: float
    ) -> None:
        renewed = lost = 0
        with self._gate.lock:
            for lease_id, status in zip(lease_ids, reply.statuses, strict=False):
                if status == offload_pb2.COMPLETE_STATUS_OK:
                    self._link.leases.renewed(lease_id, sent_at)
                    renewed += 1
                else:
                    self._link.leases.forget(lease_id)
                    lost += 1
        self._stats.add("leases_renewed", renewed)
        self._stats.add("leases_lost", lost)
