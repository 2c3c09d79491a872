from __future__ import annotations

import pytest

from kvtier_client import ClientOptions, EngineIdentity, OffloadClient, Role
from kvtier_ops.layout import TensorLayout
from kvtier_ops.namespace import FactsError, NamespaceFacts

from .builders import FACTS, make_client


@pytest.mark.parametrize(
    "address",
    ["unix:///run/kvtier/daemon.sock", "unix:relative.sock", "127.0.0.1:9470", "localhost:1", "[::1]:9470"],
)
def test_an_address_of_this_machine_is_taken(address: str) -> None:
    make_client(address)


@pytest.mark.parametrize(
    ("address", "advice"),
    [
        ("", "write unix:///path"),
        ("/run/kvtier.sock", "write unix:///run/kvtier.sock"),
        ("unix://run/kvtier.sock", "write unix:///run/kvtier.sock"),
        ("unix:", "names no socket"),
        ("unix:///", "names no socket"),
        ("unix:///" + "d" * 107, "at most 107"),
        ("unix//run/kvtier.sock", "is no address"),
        ("http://127.0.0.1:9470", "is no address"),
        ("127.0.0.1", "is no address"),
        ("127.0.0.1:0", "is no address"),
        ("127.0.0.1:65536", "is no address"),
        ("10.0.0.5:9470", "not on this machine"),
        ("node7.cluster:9470", "not on this machine"),
    ],
)
def test_a_wrong_address_says_what_to_write(address: str, advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        make_client(address)


@pytest.mark.parametrize(
    "fields",
    [
        {"engine_id": ""},
        {"engine_id": "e" * 129},
        {"instance_nonce": 0},
        {"instance_nonce": 1 << 64},
        {"world_size": 0},
        {"world_size": 33},
        {"role": Role.WORKER, "rank": 2, "world_size": 2},
        {"rank": 1, "world_size": 2},
        {"tenant": "t" * 65},
    ],
)
def test_an_identity_that_the_daemon_would_refuse_cannot_be_made(fields: dict[str, object]) -> None:
    values: dict[str, object] = {"engine_id": "e", "instance_nonce": 1, "role": Role.SCHEDULER, **fields}
    with pytest.raises(ValueError, match=r"must|is 0"):
        EngineIdentity(**values)  # type: ignore[arg-type]


def test_wrong_facts_and_options_are_refused_before_anything_is_opened() -> None:
    identity = EngineIdentity("e", 1, Role.SCHEDULER)
    with pytest.raises(FactsError, match=r"namespace\.model"):
        OffloadClient("unix:/s", identity, NamespaceFacts("", "w", "d", "h", 16, 1, "l", FACTS.groups))
    with pytest.raises(ValueError, match="lookup_deadline_ms"):
        ClientOptions(lookup_deadline_ms=0)
    with pytest.raises(ValueError, match="reconnect_min_ms"):
        ClientOptions(reconnect_min_ms=500, reconnect_max_ms=100)


def test_a_workers_tensors_must_add_up_to_the_facts() -> None:
    worker = EngineIdentity("e", 1, Role.WORKER)
    with pytest.raises(ValueError, match="a worker must tell the tensors"):
        OffloadClient("unix:/s", worker, FACTS)
    with pytest.raises(ValueError, match="adds up to 512"):
        OffloadClient("unix:/s", worker, FACTS, geometry=[[TensorLayout("layer.0", 512)]])
    with pytest.raises(ValueError, match="geometry belongs to workers"):
        OffloadClient("unix:/s", EngineIdentity("e", 1, Role.SCHEDULER), FACTS, geometry=[[]])
