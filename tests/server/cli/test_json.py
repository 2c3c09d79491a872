"""What `-o json` promises: the schemas beside this file, each held by the real output of a real daemon.

A field may be added, with its schema. None may vanish, be renamed or change its type: every field of a schema
is required, and FIELDS has all that there ever were.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from ...conftest import MakeEngine, StartDaemon
from ...daemon_process import DaemonProcess, wait_until
from ...raw_engine import to_keys
from .conftest import Kvtier

SCHEMAS = Path(__file__).parent / "schemas"
FIELDS = SCHEMAS / "fields.txt"
"""Every field as `schema path: type`."""


def schema(name: str) -> dict[str, Any]:
    loaded = json.loads((SCHEMAS / f"{name}.json").read_text())
    assert isinstance(loaded, dict)
    return loaded


def check(name: str, printed: str) -> Any:
    value = json.loads(printed)
    errors = [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
        for error in Draft202012Validator(schema(name)).iter_errors(value)
    ]
    assert not errors, "\n".join(errors)
    return value


def objects(node: object) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        if "properties" in node:
            yield node
        for value in node.values():
            yield from objects(value)
    elif isinstance(node, list):
        for value in node:
            yield from objects(value)


def fields(name: str) -> Iterator[str]:
    def walk(node: dict[str, Any], path: str) -> Iterator[str]:
        kind = node.get("type", "constant")
        yield f"{name} {path or '.'}: {'|'.join(kind) if isinstance(kind, list) else kind}"
        for key, value in node.get("properties", {}).items():
            yield from walk(value, f"{path}.{key}")
        if "items" in node:
            yield from walk(node["items"], f"{path}[]")
        if isinstance(node.get("additionalProperties"), dict):
            yield from walk(node["additionalProperties"], f"{path}.*")

    yield from walk(schema(name), "")


NAMES = sorted(file.stem for file in SCHEMAS.glob("*.json"))


@pytest.mark.parametrize("name", NAMES)
def test_a_schema_is_one_and_requires_every_field(name: str) -> None:
    loaded = schema(name)
    Draft202012Validator.check_schema(loaded)
    for node in objects(loaded):
        assert node["required"] == list(node["properties"])
        assert node["additionalProperties"] is False


def test_no_field_that_there_ever_was_has_vanished_or_changed_its_type() -> None:
    ever = FIELDS.read_text().splitlines()
    now = {line for name in NAMES for line in fields(name)}
    assert set(ever) <= now, "scripts rely on these"
    assert now <= set(ever), f"a new field: write it into {FIELDS} too"


@pytest.fixture
def tiered(start_daemon: StartDaemon, tmp_path: Path) -> DaemonProcess:
    config = (
        f'[[tiers]]\ntype = "filesystem"\nname = "disk"\nroot = "{tmp_path}/chunks"\ncapacity = "64MiB"\n'
        f'state_directory = "{tmp_path}/state"\n'
    )
    return start_daemon(config=config)


def test_commands_that_ask_a_daemon_print_what_their_schemas_say(
    kvtier: Kvtier, tiered: DaemonProcess, make_engine: MakeEngine, tmp_path: Path
) -> None:
    engine = make_engine(tiered).attach()
    engine.store(to_keys(range(4)))
    engine.lookup(to_keys(range(6)), lease_id=engine.new_lease_id())
    wait_until(lambda: tiered.status().tiers[1].chunks == 4, "the tier has the chunks")
    at = ("--address", tiered.address)
    status = check("status", kvtier("status", "-o", "json", *at).stdout)
    assert status["tiers"][1]["cascades"]
    assert status["sessions"]
    assert any(lease["count"] for lease in status["leases"])
    assert status["transfers"]
    check("health", kvtier("health", "-o", "json", *at).stdout)
    assert check("health", kvtier("health", "--tier", "disk", "-o", "json", *at).stdout)["service"]
    check("top_once", kvtier("top", "--once", "--interval", "0.1", "-o", "json", *at).stdout)
    assert check("pool_show", kvtier("pool", "show", "--name", tiered.name, "-o", "json").stdout)["slots"]
    verified = check("verify", kvtier("verify", "--path", f"{tmp_path}/chunks", "-o", "json").stdout)
    assert sum(verified["roots"][0]["files"].values()) >= 4
    namespace = check("admin_namespaces", kvtier("admin", "namespaces", "-o", "json", *at).stdout)
    check("admin_sessions", kvtier("admin", "sessions", "-o", "json", *at).stdout)
    check("admin_tenants", kvtier("admin", "tenants", "-o", "json", *at).stdout)
    asked = ("--namespace", namespace["namespaces"][0]["digest"], "--key", to_keys([1])[0].hex())
    assert check("admin_explain", kvtier("admin", "explain", *asked, "-o", "json", *at).stdout)["details"]
    check("admin_evict", kvtier("admin", "evict", "--bytes", "1B", "--yes", "-o", "json", *at).stdout)
    cleared = kvtier("admin", "clear", "--tier", "all", "--yes", "-o", "json", *at).stdout
    assert len(check("admin_clear", cleared)["tiers"]) == 2
    assert check("admin_drain", kvtier("admin", "drain", "--wait", "-o", "json", *at).stdout)["gone"]


def test_what_verify_finds_wrong_is_as_its_schema_says(
    kvtier: Kvtier, tiered: DaemonProcess, make_engine: MakeEngine, tmp_path: Path
) -> None:
    engine = make_engine(tiered).attach()
    engine.store(to_keys(range(2)))
    wait_until(lambda: tiered.status().tiers[1].chunks == 2, "the tier has the chunks")
    spoiled = max(
        (file for file in (tmp_path / "chunks").rglob("*") if file.is_file()), key=lambda f: f.stat().st_size
    )
    spoiled.write_bytes(spoiled.read_bytes()[:-1] + b"\xff")
    done = kvtier("verify", "--path", f"{tmp_path}/chunks", "-o", "json")
    assert done.returncode == 1
    assert check("verify", done.stdout)["roots"][0]["wrong"]


def test_doctor_and_config_print_what_their_schemas_say(kvtier: Kvtier, tmp_path: Path) -> None:
    file = tmp_path / "kvtier.toml"
    file.write_text('[pool]\nbytes = "8MiB"\n[[tiers]]\ntype = "example"\n')
    check("doctor", kvtier("doctor", "--quick", "--config", str(file), "-o", "json").stdout)
    check("config_show", kvtier("config", "show", "--config", str(file), "-o", "json").stdout)
