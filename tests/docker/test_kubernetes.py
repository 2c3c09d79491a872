"""docker/kubernetes: every overlay is rendered, held against Kubernetes' own schemas, and against what the
daemon and the Pod Security Standards want.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.daemon_process import REPOSITORY
from tests.docker.dockerfile import read
from tests.docker.pod_security import baseline_violations, containers, level, restricted_violations

from kvtier_server.config import KNOWN, Config, load_config
from kvtier_server.units import parse_bytes

KUBERNETES = REPOSITORY / "docker" / "kubernetes"
OVERLAYS = ("sidecar", "daemonset", "mtls")
ON_THE_HOST = ("daemonset", "mtls")
VERSIONS = ("1.29", "1.33", "1.37")
"""The first with native sidecars by default, and newer ones."""
GIB = 1 << 30
TABLES_BYTES = 256 << 20
"""More than what a pool of 16 GiB has beside its slots."""

Fields = dict[str, Any]

pytestmark = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="no kubectl here: kubernetes.io/docs/tasks/tools"
)


class Rendered:
    """What `kubectl apply -k` of an overlay would send."""

    def __init__(self, overlay: str) -> None:
        self.overlay = overlay
        done = subprocess.run(
            ["kubectl", "kustomize", str(KUBERNETES / "overlays" / overlay)],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        self.warnings = done.stderr
        self.documents: list[Fields] = list(yaml.safe_load_all(done.stdout))

    def all(self, kind: str) -> list[Fields]:
        return [document for document in self.documents if document["kind"] == kind]

    def pods(self) -> dict[str, Fields]:
        """Specs of pods, by the name of what makes them."""
        return {
            document["metadata"]["name"]: document["spec"]["template"]["spec"]
            for document in self.documents
            if "template" in document.get("spec", {})
        }

    def container(self, name: str) -> tuple[Fields, Fields]:
        """Return a container and its pod."""
        found = [
            (each, pod) for pod in self.pods().values() for each in containers(pod) if each["name"] == name
        ]
        assert len(found) == 1
        return found[0]

    def config(self, tmp_path: Path) -> Config:
        """Read the daemon's settings as it will."""
        if self.overlay == "mtls" and "tls" not in KNOWN:
            pytest.skip("this version knows no [tls]")
        (settings,) = [document["data"] for document in self.all("ConfigMap")]
        file = tmp_path / "kvtier.toml"
        file.write_text(settings["kvtier.toml"])
        env = {each["name"]: each.get("value", "10.0.0.7") for each in self.container("kvtier")[0]["env"]}
        env = {name: value.replace("$(POD_IP)", env["POD_IP"]) for name, value in env.items()}
        return load_config({}, file, env)


@pytest.fixture(scope="module", params=OVERLAYS)
def rendered(request: pytest.FixtureRequest) -> Rendered:
    return Rendered(request.param)


def uid() -> int:
    return int(read().stages["runtime"].all("ARG")[0].pairs["KVTIER_UID"])


def quantity(text: str) -> int:
    """Read a quantity of memory, "18Gi"."""
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", text).groups()  # type: ignore[union-attr]
    return int(number) << {"Mi": 20, "Gi": 30}[unit]


def mounts(container: Fields, pod: Fields) -> dict[str, Fields]:
    """The volumes of a container by the place they are mounted at."""
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    return {each["mountPath"]: volumes[each["name"]] for each in container["volumeMounts"]}


def source(volume: Fields) -> Fields:
    return {kind: value for kind, value in volume.items() if kind != "name"}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_resource_is_what_kubernetes_understands(rendered: Rendered, version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate").validate
    for document in rendered.documents:
        validate(document, version, strict=True)
    assert not rendered.warnings


def test_the_namespace_enforces_what_the_overlay_says_it_meets(rendered: Rendered) -> None:
    met = {level(pod) for pod in rendered.pods().values()}
    strictest = max(met, key=["restricted", "baseline", "privileged"].index)
    (namespace,) = rendered.all("Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == strictest
    comment = (KUBERNETES / "overlays" / rendered.overlay / "kustomization.yaml").read_text()
    assert f"# Pod Security: {strictest}" in comment
    assert (strictest == "restricted") == (rendered.overlay == "sidecar")


@pytest.mark.parametrize("overlay", ON_THE_HOST)
def test_directories_of_the_host_and_who_makes_them_are_all_that_is_not_restricted(overlay: str) -> None:
    for pod in Rendered(overlay).pods().values():
        assert all(each.endswith(": hostPath") for each in baseline_violations(pod))
        assert all(each.startswith("directories: ") for each in restricted_violations(pod))


def test_every_container_is_kept_small(rendered: Rendered) -> None:
    for pod in rendered.pods().values():
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(pod):
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"]["drop"] == ["ALL"]


def test_daemon_and_engine_are_one_user(rendered: Rendered) -> None:
    for pod in rendered.pods().values():
        assert pod["securityContext"]["runAsUser"] == uid()
        assert pod["securityContext"]["fsGroup"] == uid()


@pytest.mark.parametrize("overlay", ON_THE_HOST)
def test_the_directories_of_the_host_are_made_for_that_user(overlay: str, tmp_path: Path) -> None:
    rendered = Rendered(overlay)
    container, pod = rendered.container("directories")
    (script,) = container["args"]
    config = rendered.config(tmp_path)
    for directory in (Path(config.server.address.removeprefix("unix://")).parent, config.pool.directory):
        assert f" {directory}" in script
    assert f"chown {uid()}:{uid()}" in script
    daemon, _ = rendered.container("kvtier")
    for place, volume in mounts(container, pod).items():
        assert mounts(daemon, pod)[place] == volume


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it makes directories for another user")
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="no setpriv here: apt-get install util-linux")
def test_the_directories_are_made_with_the_one_capability_that_their_maker_keeps(tmp_path: Path) -> None:
    container, _ = Rendered("daemonset").container("directories")
    (script,) = container["args"]
    (kept,) = container["securityContext"]["capabilities"]["add"]
    script = script.replace("/run/kvtier", f"{tmp_path}/run").replace("/pool", f"{tmp_path}/pool")
    capabilities = f"-all,+{kept.lower()}"
    command = ["setpriv", "--bounding-set", capabilities, "--inh-caps", capabilities, "--no-new-privs"]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *container["command"], script], capture_output=True, text=True, check=False, timeout=30
        )

    made = [tmp_path / "run" / "daemon", tmp_path / "pool" / "default"]
    for directory in made:
        directory.parent.mkdir()
    for _ in range(2):  # the second time they are there, and somebody else's
        done = run()
        assert done.returncode == 0, done.stderr
        assert [(each.stat().st_uid, each.stat().st_mode & 0o777) for each in made] == [(uid(), 0o700)] * 2

    os.chown(tmp_path / "pool", uid(), uid())
    refused = run()
    assert refused.returncode == 1
    assert f"behind {tmp_path}/pool is not root's" in refused.stderr


def test_every_mount_has_its_volume_and_every_volume_is_mounted(rendered: Rendered) -> None:
    for pod in rendered.pods().values():
        mounted = {each["name"] for container in containers(pod) for each in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_a_variable_is_named_only_after_it_is_set(rendered: Rendered) -> None:
    # Kubernetes leaves $(NAME) as it stands where NAME comes later, or never.
    for pod in rendered.pods().values():
        for container in containers(pod):
            known: set[str] = set()
            for each in container.get("env", []):
                assert set(re.findall(r"\$\((\w+)\)", each.get("value", ""))) <= known
                known.add(each["name"])


def test_the_daemon_takes_its_settings(rendered: Rendered, tmp_path: Path) -> None:
    config = rendered.config(tmp_path)
    assert config.server.metrics_address == "10.0.0.7:9471"
    assert config.pool.bytes == 16 * GIB


def test_the_pool_fits_into_its_volume_and_the_daemon_into_its_memory(rendered: Rendered) -> None:
    daemon, pod = rendered.container("kvtier")
    env = {each["name"]: each.get("value") for each in daemon["env"]}
    pool_bytes = parse_bytes(env["KVTIER_POOL__BYTES"])
    volume = mounts(daemon, pod)["/pool"]
    if "emptyDir" in volume:
        assert volume["emptyDir"]["medium"] == "Memory"
        assert quantity(volume["emptyDir"]["sizeLimit"]) >= pool_bytes + TABLES_BYTES
    else:
        assert volume["hostPath"]["path"].startswith("/dev/shm/")
    resources = daemon["resources"]
    assert resources["requests"] == resources["limits"]
    assert quantity(resources["limits"]["memory"]) >= pool_bytes + 2 * GIB


def test_daemon_and_engine_share_the_pool_at_equal_paths_and_the_socket_where_it_is_used(
    rendered: Rendered,
) -> None:
    daemon, engine = (mounts(*rendered.container(name)) for name in ("kvtier", "vllm"))
    assert source(daemon["/pool"]) == source(engine["/pool"])
    address = {each["name"]: each.get("value", "") for each in rendered.container("vllm")[0]["env"]}[
        "KVTIER_ADDRESS"
    ]
    if address.startswith("unix://"):
        assert Path(address.removeprefix("unix://")).parents[1] == Path("/run/kvtier")
        assert source(daemon["/run/kvtier"]) == source(engine["/run/kvtier"])
    else:
        assert "/run/kvtier" not in engine


def test_an_engine_in_another_pod_comes_to_the_daemon_of_its_own_node() -> None:
    rendered = Rendered("mtls")
    (service,) = rendered.all("Service")
    assert service["spec"]["internalTrafficPolicy"] == "Local"
    (port,) = service["spec"]["ports"]
    daemon, _ = rendered.container("kvtier")
    (grpc,) = [each for each in daemon["ports"] if each["name"] == port["targetPort"]]
    env = {each["name"]: each.get("value") for each in daemon["env"]}
    assert env["KVTIER_SERVER__TCP_ADDRESS"] == f"$(POD_IP):{grpc['containerPort']}"
    engine_env = {each["name"]: each.get("value") for each in rendered.container("vllm")[0]["env"]}
    name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
    assert engine_env["KVTIER_ADDRESS"] == f"{name}.{namespace}.svc:{port['port']}"


@pytest.mark.parametrize("container", ["kvtier", "vllm"])
def test_certificates_are_where_they_are_looked_for(container: str) -> None:
    rendered = Rendered("mtls")
    found, pod = rendered.container(container)
    tls = mounts(found, pod)["/etc/kvtier-tls"]
    assert tls["secret"]["defaultMode"] == 0o440
    (settings,) = [document["data"]["kvtier.toml"] for document in rendered.all("ConfigMap")]
    named = settings if container == "kvtier" else str(found["env"])
    for file in ("tls.crt", "tls.key", "ca.crt"):
        assert f"/etc/kvtier-tls/{file}" in named


@pytest.mark.parametrize("overlay", ON_THE_HOST)
def test_a_daemon_of_its_own_pod_is_started_ready_and_alive_by_its_pages(overlay: str) -> None:
    daemon, _ = Rendered(overlay).container("kvtier")
    assert daemon["startupProbe"]["httpGet"] == {"path": "/readyz", "port": "metrics"}
    assert daemon["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "metrics"}
    assert daemon["livenessProbe"]["httpGet"] == {"path": "/livez", "port": "metrics"}
    assert {"name": "metrics", "containerPort": 9471} in daemon["ports"]


def test_a_sidecar_neither_holds_up_the_engines_start_nor_takes_its_traffic_away() -> None:
    sidecar, pod = Rendered("sidecar").container("kvtier")
    assert pod["initContainers"] == [sidecar]
    assert sidecar["restartPolicy"] == "Always"
    assert "startupProbe" not in sidecar
    assert "readinessProbe" not in sidecar
    assert sidecar["livenessProbe"]["httpGet"] == {"path": "/livez", "port": "metrics"}


def test_a_daemon_is_given_the_time_to_drain(rendered: Rendered, tmp_path: Path) -> None:
    daemon, pod = rendered.container("kvtier")
    drain = rendered.config(tmp_path).drain
    drain_s = (drain.copies + drain.tiers) / 1e9
    engine_s = 30 if rendered.overlay == "sidecar" else 0  # it ends first, and the time is the pod's
    assert pod["terminationGracePeriodSeconds"] >= drain_s + engine_s + 10
    assert daemon["lifecycle"]["preStop"]["exec"]["command"] == ["kvtier", "admin", "drain"]


def test_no_daemon_takes_a_device_from_an_engine(rendered: Rendered) -> None:
    daemon, _ = rendered.container("kvtier")
    assert not [name for name in daemon["resources"]["limits"] if "gpu" in name]
    engine, _ = rendered.container("vllm")
    assert "nvidia.com/gpu" in engine["resources"]["limits"]


def test_restricted_is_left_by_each_thing_that_it_forbids() -> None:
    (pod,) = Rendered("sidecar").pods().values()
    assert level(pod) == "restricted"
    assert level({**pod, "hostIPC": True}) == "privileged"
    assert level({**pod, "volumes": [{"name": "x", "hostPath": {"path": "/"}}]}) == "privileged"
    assert level({**pod, "securityContext": {}}) == "baseline"
    plain = [{**container, "securityContext": {}} for container in pod["containers"]]
    assert level({**pod, "containers": plain}) == "baseline"
