"""docker/compose.yaml: of the right form, and its services agree with one another and with the images."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.daemon_process import REPOSITORY
from tests.docker.dockerfile import read

from kvtier_server.config import Config, load_config
from kvtier_server.units import parse_bytes

COMPOSE = REPOSITORY / "docker" / "compose.yaml"
PROFILES = ("cpu", "gpu")
DAEMON_OF = {"cpu": "kvtier", "gpu": "kvtier-gpu"}
ENGINE_OF = {"cpu": "load", "gpu": "vllm"}
TABLES_BYTES = 64 << 20
"""More than what a pool has beside its slots: 1.5 % of 4 GiB."""
GIB = 1 << 30

Service = dict[str, Any]


def interpolated() -> dict[str, Any]:
    """The file with the default of every variable."""
    text = COMPOSE.read_text()
    return yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def services() -> dict[str, Service]:
    found: dict[str, Service] = interpolated()["services"]
    return found


@pytest.fixture(scope="module")
def volumes() -> dict[str, Any]:
    found: dict[str, Any] = interpolated()["volumes"]
    return found


def image_env(target: str) -> dict[str, str]:
    env: dict[str, str] = {}
    for stage in read().chain(target):
        for each in stage.all("ENV"):
            env |= each.pairs
    return env


def config_of(service: Service) -> Config:
    return load_config({}, None, image_env(service["build"]["target"]) | service["environment"])


def size(text: str) -> int:
    """Read a size as Docker and mount write it, "6g"."""
    number, unit = re.fullmatch(r"(\d+)([kmg])", text).groups()  # type: ignore[union-attr]
    return int(number) << {"k": 10, "m": 20, "g": 30}[unit]


def options(volume: Mapping[str, Any]) -> dict[str, str]:
    return dict(each.split("=") for each in volume["driver_opts"]["o"].split(","))


def mounted(service: Service) -> dict[str, str]:
    """Named volumes by the place they are mounted at."""
    pairs = (each.split(":") for each in service["volumes"] if isinstance(each, str))
    return {target: name for name, target in pairs}


def test_it_is_a_compose_file() -> None:
    checker = Path(sys.executable).with_name("check-jsonschema")
    if not checker.exists():
        pytest.skip("no schema here: pip install check-jsonschema")
    checked = subprocess.run(
        [checker, "--builtin-schema", "vendor.compose-spec", COMPOSE],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("profile", PROFILES)
def test_docker_compose_reads_it(profile: str) -> None:
    docker = shutil.which("docker")
    command = [str(docker), "compose", "--file", str(COMPOSE), "--profile", profile]
    version = subprocess.run([*command, "version"], capture_output=True, check=False) if docker else None
    if version is None or version.returncode != 0:
        pytest.skip("no Docker with its compose plugin here")
    done = subprocess.run(
        [*command, "config", "--quiet"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_every_variable_has_a_default() -> None:
    for found in re.findall(r"(?<!\$)\$\{[^}]*\}?|(?<!\$)\$\w+", COMPOSE.read_text()):
        assert ":-" in found, found


@pytest.mark.parametrize("profile", PROFILES)
def test_a_daemon_takes_the_settings_that_it_is_given(services: dict[str, Service], profile: str) -> None:
    config = config_of(services[DAEMON_OF[profile]])
    assert config.pool.bytes == 4 * GIB
    assert config.server.metrics_address == "0.0.0.0:9471"


@pytest.mark.parametrize("profile", PROFILES)
def test_daemon_and_engine_share_the_socket_and_the_pool_at_equal_paths(
    services: dict[str, Service], profile: str
) -> None:
    daemon, engine = services[DAEMON_OF[profile]], services[ENGINE_OF[profile]]
    config = config_of(daemon)
    for path in (config.server.address.removeprefix("unix://"), config.pool.directory):
        places = {name for place, name in mounted(daemon).items() if path.startswith(f"{place}/")}
        assert len(places) == 1
        assert places == {name for place, name in mounted(engine).items() if path.startswith(f"{place}/")}


def test_vllm_is_told_where_the_daemon_is(services: dict[str, Service]) -> None:
    command = services["vllm"]["command"]
    given = json.loads(command[command.index("--kv-transfer-config") + 1])
    assert given["kv_connector"] == "KVTierConnector"
    assert (
        services["vllm"]["environment"]["KVTIER_ADDRESS"] == config_of(services["kvtier-gpu"]).server.address
    )


def test_socket_and_pool_lie_in_memory_and_belong_to_the_user_of_all_images(
    volumes: dict[str, Any], services: dict[str, Service]
) -> None:
    uid = read().stages["runtime"].all("ARG")[0].pairs["KVTIER_UID"]
    for name in ("run", "pool"):
        assert volumes[name]["driver_opts"]["type"] == "tmpfs"
        assert (options(volumes[name])["uid"], options(volumes[name])["mode"]) == (uid, "0700")
    assert services["vllm"]["user"].partition(":")[0] == uid


@pytest.mark.parametrize("profile", PROFILES)
def test_the_pool_fits_into_its_volume_and_the_daemon_into_its_memory(
    services: dict[str, Service], volumes: dict[str, Any], profile: str
) -> None:
    daemon = services[DAEMON_OF[profile]]
    pool_bytes = parse_bytes(daemon["environment"]["KVTIER_POOL__BYTES"])
    assert size(options(volumes["pool"])["size"]) >= pool_bytes + TABLES_BYTES
    assert size(daemon["deploy"]["resources"]["limits"]["memory"]) >= pool_bytes + 2 * GIB


@pytest.mark.parametrize("profile", PROFILES)
def test_a_daemon_is_given_the_time_to_drain(services: dict[str, Service], profile: str) -> None:
    daemon = services[DAEMON_OF[profile]]
    drain = config_of(daemon).drain
    grace_s = int(daemon["stop_grace_period"].removesuffix("s"))
    assert grace_s * 10**9 > drain.copies + drain.tiers + 10 * 10**9


@pytest.mark.parametrize("profile", PROFILES)
def test_who_waits_for_a_service_waits_for_its_health(services: dict[str, Service], profile: str) -> None:
    waits = services[ENGINE_OF[profile]]["depends_on"]
    assert waits == {DAEMON_OF[profile]: {"condition": "service_healthy"}}
    for service in services.values():
        for name, how in service.get("depends_on", {}).items():
            assert how["condition"] == "service_healthy"
            assert services[name]["healthcheck"]["test"]


def test_the_profile_without_a_gpu_needs_none_and_no_vllm(services: dict[str, Service]) -> None:
    chosen = [service for service in services.values() if "gpu" not in service.get("profiles", [])]
    assert chosen
    for service in chosen:
        assert "nvidia" not in json.dumps(service)
        assert service.get("build", {}).get("target") in (None, "cpu", "demo")
    assert all(set(service.get("profiles", [])) < set(PROFILES) for service in services.values())


def test_every_service_is_kept_small(services: dict[str, Service]) -> None:
    for name, service in services.items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert service.get("privileged") is None, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_prometheus_and_grafana_get_their_files(services: dict[str, Service]) -> None:
    binds = [
        each
        for name in ("prometheus", "grafana")
        for each in services[name]["volumes"]
        if isinstance(each, dict)
    ]
    assert {each["source"] for each in binds} == {
        "./prometheus/prometheus.yml",
        "./prometheus/alerts.yml",
        "./grafana/provisioning",
        "./grafana/dashboards",
    }
    assert all(each["read_only"] for each in binds)
