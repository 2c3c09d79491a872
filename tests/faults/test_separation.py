"""What must never be mistaken for another's: namespaces, other engines' request ids, epochs after a reset."""

from __future__ import annotations

import json
import random
import secrets
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import MakeEngine, StartDaemon
from tests.daemon_process import child_environment
from tests.faults.block_device import chunk_names
from tests.faults.conftest import StartEngine, repeats
from tests.faults.engine_process import EngineProcess
from tests.faults.socket_proxy import SocketProxy
from tests.raw_engine import to_keys

from kvtier.v1 import offload_pb2 as pb
from kvtier_client.attach import facts_message
from kvtier_ops.namespace import GroupFacts, NamespaceFacts

CLIENT_SIDE = """
import json, sys
from kvtier_client.attach import attach_request
from kvtier_client.options import EngineIdentity, Role
from kvtier_ops.namespace import GroupFacts, NamespaceFacts

for line in sys.stdin:
    fields = json.loads(line)
    groups = tuple(GroupFacts(**{**g, "layer_names": tuple(g["layer_names"])}) for g in fields.pop("groups"))
    facts = NamespaceFacts(**fields, groups=groups)
    request = attach_request(EngineIdentity("engine", 1, Role.SCHEDULER), facts, ())
    print(json.dumps([facts.digest(), request.SerializeToString().hex()]))
"""

DAEMON_SIDE = """
import sys
from kvtier.v1 import offload_pb2
from kvtier_server.facts import facts_of

for line in sys.stdin:
    print(facts_of(offload_pb2.AttachRequest.FromString(bytes.fromhex(line))).digest())
"""


def run_fresh(script: str, lines: list[str], hash_seed: int) -> list[str]:
    """Run a script in a process of its own, with another order of its sets, and return its output's lines."""
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env=child_environment(PYTHONHASHSEED=str(hash_seed)),
        input="\n".join(lines),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


TEXTS = ("model", "weights_id", "kv_dtype", "hash_algorithm", "kv_cache_layout")
COUNTS = (
    "tokens_per_hash", "blocks_per_chunk", "num_parts", "tensor_parallel_size", "pipeline_parallel_size",
    "prefill_context_parallel_size", "decode_context_parallel_size",
)  # fmt: skip


def random_facts(pick: random.Random) -> NamespaceFacts:
    """Any facts that a daemon would take."""
    texts = {name: pick.choice(("a", "b", "ab", "é", "a|b", '"', "a,b")) for name in TEXTS}
    counts = {name: pick.randint(1, 9) for name in COUNTS}
    groups = tuple(
        GroupFacts(
            pick.randint(1, 64),
            pick.randint(1, 1 << 20),
            pick.choice((0, 0, 128)),
            tuple(f"layer.{n}" for n in range(pick.randrange(3))),
        )
        for _ in range(pick.randint(1, 4))
    )
    extra = {pick.choice("xyz"): pick.choice(("", "1", "2")) for _ in range(pick.randrange(3))}
    return NamespaceFacts(**texts, **counts, groups=groups, extra=extra)  # type: ignore[arg-type]


def change_one(facts: NamespaceFacts, pick: random.Random) -> NamespaceFacts:
    """Return facts that differ in one part."""
    field = pick.choice((*TEXTS, *COUNTS, "group", "groups", "order", "extra"))
    if field in TEXTS:
        return replace(facts, **{field: getattr(facts, field) + pick.choice((" ", "a", "\x00"))})
    if field in COUNTS:
        return replace(facts, **{field: getattr(facts, field) + 1})
    if field == "extra":
        return replace(facts, extra={**facts.extra, "w": ""})
    if field == "groups":
        return replace(facts, groups=(*facts.groups, facts.groups[0]))
    if field == "order" and facts.groups[0] != facts.groups[-1]:
        return replace(facts, groups=facts.groups[::-1])
    changes: Mapping[str, Callable[[GroupFacts], Any]] = {
        "tokens_per_block": lambda group: group.tokens_per_block + 1,
        "part_bytes": lambda group: group.part_bytes + 1,
        "sliding_window_tokens": lambda group: group.sliding_window_tokens + 1,
        "layer_names": lambda group: (*group.layer_names, "layer"),
    }
    name = pick.choice(list(changes))
    index = pick.randrange(len(facts.groups))
    group = facts.groups[index]
    changed = replace(group, **{name: changes[name](group)})
    return replace(facts, groups=(*facts.groups[:index], changed, *facts.groups[index + 1 :]))


def as_json(facts: NamespaceFacts) -> str:
    """Return the facts for a process that makes its own of them."""
    groups = [
        {name: getattr(group, name) for name in GroupFacts.__dataclass_fields__} for group in facts.groups
    ]
    fields = {name: getattr(facts, name) for name in (*TEXTS, *COUNTS)}
    return json.dumps({**fields, "extra": dict(facts.extra), "groups": groups})


def test_c2_facts_that_differ_in_one_part_have_another_digest_and_both_sides_compute_the_same() -> None:
    """C2: random pairs; a client's process computes the digest, and a daemon's from what Attach says."""
    pick = random.Random(2)
    pairs = []
    for _ in repeats(1000, 10_000):
        facts = random_facts(pick)
        pairs.append((facts, change_one(facts, pick)))
    given = [facts for pair in pairs for facts in pair]
    answers = [json.loads(line) for line in run_fresh(CLIENT_SIDE, list(map(as_json, given)), hash_seed=1)]
    assert run_fresh(DAEMON_SIDE, [request for _, request in answers], hash_seed=2) == [
        digest for digest, _ in answers
    ]
    digests = [digest for digest, _ in answers]
    assert digests == [facts.digest() for facts in given]
    for (one, other), first, second in zip(pairs, digests[::2], digests[1::2], strict=True):
        assert first != second, (one, other)


def test_c2_no_key_hits_in_a_namespace_that_differs_in_one_part(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    """C2: engines whose facts, or tenants, differ in one part share nothing through a real daemon."""
    daemon = start_daemon()
    base = NamespaceFacts(
        model="model",
        weights_id="w0",
        kv_dtype="bfloat16",
        hash_algorithm="sha256",
        tokens_per_hash=16,
        blocks_per_chunk=1,
        kv_cache_layout="NHD",
        groups=(GroupFacts(16, 4096),),
    )
    keys = to_keys(range(8))
    make_engine(daemon, facts=facts_message(base)).attach().store(keys)

    def statuses(facts: NamespaceFacts, tenant: str = "") -> set[int]:
        with make_engine(daemon, facts=facts_message(facts), tenant=tenant).attach() as engine:
            return set(engine.lookup(keys).statuses)

    assert statuses(base) == {pb.LOOKUP_STATUS_HIT}
    assert statuses(base, tenant="other") == {pb.LOOKUP_STATUS_MISS}
    others = [replace(base, **{name: getattr(base, name) + "x"}) for name in TEXTS]
    others += [
        replace(base, **{name: getattr(base, name) + 1})
        for name in COUNTS
        if name not in {"num_parts", "blocks_per_chunk"}
    ]
    others += [
        replace(base, blocks_per_chunk=2),
        replace(base, extra={"lora": "a"}),
        replace(base, groups=(GroupFacts(32, 4096),)),
        replace(base, groups=(GroupFacts(16, 8192),)),
        replace(base, groups=(GroupFacts(16, 4096, 128),)),
        replace(base, groups=(GroupFacts(16, 4096, 0, ("layer.0",)),)),
        replace(base, groups=(GroupFacts(16, 4096), GroupFacts(16, 4096))),
    ]
    for facts in others:
        assert statuses(facts) == {pb.LOOKUP_STATUS_MISS}, facts
    assert statuses(base) == {pb.LOOKUP_STATUS_HIT}


def test_c3_engines_with_the_same_request_ids_have_no_effect_on_each_other(
    start_daemon: StartDaemon, start_engine: StartEngine
) -> None:
    """C3: two engines, same request ids, different prompts; each has its own bytes and leases."""
    daemon = start_daemon()
    one, other = start_engine("one").attach(daemon), start_engine("other").attach(daemon)
    prompts = {one: chunk_names("one", 8), other: chunk_names("other", 8)}
    for engine, names in prompts.items():
        engine.tell("run", req="request", names=names)
    for engine, names in prompts.items():
        assert engine.answer()["stored"] == names

    for engine, names in prompts.items():
        assert engine.ask("begin", req="request", names=names)["num_hits"] == 8
    one.ask("finish", req="request")  # ends its own leases, not the other's
    assert other.ask("load", req="request", num_chunks=8)["loaded"] == prompts[other]
    other.ask("finish", req="request")

    for number in range(30):  # both at once, request for request
        for engine in prompts:
            engine.tell(
                "run", req=f"request-{number}", names=chunk_names(f"{engine.engine_id}{number % 7}", 6)
            )
        for engine in prompts:
            answer = engine.answer()
            assert (answer["wrong"], answer["failed"], answer["lost"]) == ([], [], [])
            assert len(answer["loaded"]) == (6 if number >= 7 else 0)


OLD = chunk_names("old", 8)


def run(engine: EngineProcess, names: list[str]) -> list[str]:
    """Run a request, and return what it loaded; its bytes must be the ones of the engine's weights."""
    answer = engine.ask("run", req=secrets.token_hex(4), names=names)
    assert (answer["wrong"], answer["failed"]) == ([], [])
    loaded: list[str] = answer["loaded"]
    return loaded


def test_c4_a_reset_leaves_the_old_epoch_to_the_engine_that_did_not_reset(
    start_daemon: StartDaemon, start_engine: StartEngine
) -> None:
    """C4: Reset by one engine, without and with a weights id."""
    daemon = start_daemon()
    one, other = start_engine("one").attach(daemon), start_engine("other").attach(daemon)
    run(one, OLD)
    assert run(other, OLD) == OLD
    for weights_id in ("", "step-1"):
        assert one.ask("reset", weights_id=weights_id, weights=f"one {weights_id}") is True
        assert run(one, OLD) == []  # stored anew, with other bytes under the same keys
        assert run(one, OLD) == OLD
        assert run(other, OLD) == OLD


def test_c4_engines_share_an_epoch_only_by_the_same_weights_id(
    start_daemon: StartDaemon, start_engine: StartEngine
) -> None:
    """C4: Reset by two engines, without weights ids, with equal and with different ones."""
    daemon = start_daemon()
    one, other = start_engine("one").attach(daemon), start_engine("other").attach(daemon)
    run(one, OLD)
    for engine in (one, other):
        assert engine.ask("reset", weights=engine.engine_id) is True
        assert run(engine, OLD) == []
    for engine in (one, other):
        assert engine.ask("reset", weights_id="step-1", weights="new") is True
    assert run(one, OLD) == []
    assert run(other, OLD) == OLD
    assert other.ask("reset", weights_id="step-2", weights="newer") is True
    assert run(other, OLD) == []
    assert run(one, OLD) == OLD


@pytest.mark.parametrize("weights_id", ["", "step-1"])
@pytest.mark.parametrize("loss", ["daemon restarted", "connection cut", "daemon away during the reset"])
def test_c4_an_engine_never_hits_its_old_epoch_again_whatever_session_it_loses(
    weights_id: str, loss: str, start_daemon: StartDaemon, start_engine: StartEngine, tmp_path: Path
) -> None:
    """C4: the new session is in the new epoch, too, and finds there what was stored in it."""
    daemon = start_daemon()
    with SocketProxy(daemon, tmp_path / "proxy.sock") as proxy:
        engine = start_engine("engine").attach(proxy.address)
        run(engine, OLD)
        before = engine.ask("session")
        if loss == "daemon away during the reset":
            daemon.kill()
            assert engine.ask("reset", weights_id=weights_id, weights="new") is False
            assert run(engine, OLD) == []
            daemon.restart()
        else:
            assert engine.ask("reset", weights_id=weights_id, weights="new") is True
            run(engine, chunk_names("new", 4))
            if loss == "daemon restarted":
                daemon.restart()
            else:
                proxy.cut()
        engine.ask("wait_ready", not_session=before["session_id"])
        if loss != "daemon away during the reset":
            assert run(engine, chunk_names("new", 4)) == chunk_names("new", 4)
        assert run(engine, OLD) == []
        assert run(engine, OLD) == OLD
        assert engine.ask("report")["errors"] == []
