from __future__ import annotations

import time
from dataclasses import replace

import grpc
import pytest

from kvtier.v1 import offload_pb2_grpc
from kvtier_client.chores import MIN_RENEW_S, Chores
from kvtier_client.gate import Gate, lease_time
from kvtier_client.link import Link
from kvtier_client.listener import ClientListener
from kvtier_client.options import ClientOptions
from kvtier_client.outbox import Outbox
from kvtier_client.sender import CompletionSender
from kvtier_client.stats import ClientStats

from .doubles import LIMITS, session


def chores_of(lookup_lease_ms: int) -> tuple[Chores, Link]:
    """The chores of a session whose channel is closed: every call fails at once."""
    channel = grpc.insecure_channel("unix:///nowhere")
    stub = offload_pb2_grpc.OffloadServiceStub(channel)
    channel.close()
    options, stats = ClientOptions(), ClientStats()
    gate = Gate(options, stats, ClientListener())
    limits = replace(LIMITS, lookup_lease_ms=lookup_lease_ms)
    link = Link(session(limits=limits), stub, options, stats)
    gate.install(link)
    return Chores(gate, link, CompletionSender(gate, options, stats, Outbox()), options, stats), link


@pytest.mark.parametrize("lookup_lease_ms", [0, 1, 90])
def test_leases_of_hardly_any_time_are_not_renewed_without_a_pause(lookup_lease_ms: int) -> None:
    before = time.monotonic()
    chores, _ = chores_of(lookup_lease_ms)
    assert chores._wake_at() >= before + MIN_RENEW_S

    chores._renew_at = before = time.monotonic()
    chores._do_what_is_due()
    assert chores._wake_at() >= before + MIN_RENEW_S


def test_a_renewal_that_fails_is_not_repeated_without_a_pause() -> None:
    chores, link = chores_of(120)
    link.leases.granted(1, "r", lease_time() + 60)  # whatever the machine is slow with, it has not expired
    link.leases.keep(1)
    chores._renew_at = before = time.monotonic()
    chores._do_what_is_due()

    assert chores._stats.snapshot()["rpc_renew_leases"] == 1
    assert chores._wake_at() >= before + MIN_RENEW_S
