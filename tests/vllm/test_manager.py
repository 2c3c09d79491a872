"""What the manager and the connector's metadata do, without an engine around them."""

from __future__ import annotations

from collections import Counter

import pytest
from tests.client.doubles import RecordingClient, session
from tests.client.test_requests import facts, keys
from vllm.v1.kv_offload.base import ReqContext

from kvtier_client.stats import ClientStats
from kvtier_client.vllm.connector import KVTierWorkerMetadata, adopt
from kvtier_client.vllm.keys import ChunkKeys
from kvtier_client.vllm.manager import KVTierOffloadingManager
from kvtier_client.vllm.worker import FailedLoad
from kvtier_ops.namespace import NamespaceFacts


class StartedClient(RecordingClient):
    def __init__(self, namespace: NamespaceFacts) -> None:
        super().__init__(namespace)
        self.stats = ClientStats()

    def start(self) -> None:
        self.attach(session([4096]))


def manager_with_a_request() -> tuple[KVTierOffloadingManager, StartedClient, ReqContext]:
    """A request of three chunks that the daemon lacks, and the slots for them."""
    client = StartedClient(facts(0))
    manager = KVTierOffloadingManager(client, ChunkKeys(client.facts, (0,)), has_connector=True)
    ctx = ReqContext(req_id="r")
    manager.on_new_request(ctx)
    # vLLM's keys are hash and group; its hashes have no group yet.
    manager.add_request("r", [key[:-4] for key in keys(3)], may_load=True)
    client.lookups[-1].arrive("MMM", slots=[1, 2, 3])
    manager.begin_attempt("r", [], 0)
    return manager, client, ctx


def test_a_request_that_lost_its_blocks_stores_nothing_until_it_has_new_ones() -> None:
    manager, _, ctx = manager_with_a_request()
    manager.note_scheduled({"r"}, {"other": 1})
    manager.end_step()
    lost = manager.prepare_store(keys(3)[:1], ctx)
    assert lost is not None
    assert list(lost.keys_to_store) == []

    manager.note_scheduled((), {"r": 32})
    again = manager.prepare_store(keys(3)[:1], ctx)
    assert again is not None
    assert list(again.keys_to_store) == keys(3)[:1]


def test_a_bug_costs_the_store_and_not_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    manager, client, ctx = manager_with_a_request()

    monkeypatch.setattr(client, "announce", None)  # which cannot be called
    output = manager.prepare_store(keys(3), ctx)
    assert output is not None
    assert list(output.keys_to_store) == []


def test_what_one_rank_failed_to_load_is_failed_for_all() -> None:
    good, bad = KVTierWorkerMetadata(), KVTierWorkerMetadata()
    bad.add(FailedLoad("r", frozenset([b"a"]), (1, 2), expedited=False, reasons={"torn": 1}))
    worse = KVTierWorkerMetadata()
    worse.add(FailedLoad("r", frozenset([b"b"]), (3,), expedited=False, reasons={"torn": 1}))

    for merged in (good.aggregate(bad).aggregate(worse), bad.aggregate(good).aggregate(worse)):
        assert merged.failed_keys == {"r": {b"a", b"b"}}
        assert merged.failure_reasons == Counter(torn=2)
    assert bad.failed_keys == {"r": {b"a"}}


def test_a_connector_that_cannot_be_told_of_failed_loads_is_refused() -> None:
    class Wrapper:
        pass

    with pytest.raises(ValueError, match="Wrapper of failed loads"):
        adopt([Wrapper()])
    with pytest.raises(ValueError, match="this connector of failed loads"):
        adopt([])
