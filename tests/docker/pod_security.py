"""Kubernetes' Pod Security Standards, as far as they say something about a pod of Linux: what a pod breaks.

Written after https://kubernetes.io/docs/concepts/security/pod-security-standards/. Left out, because nothing
here sets them: AppArmor, SELinux, sysctls, Windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

Level = Literal["privileged", "baseline", "restricted"]
Fields = dict[str, Any]

BASELINE_CAPABILITIES = frozenset(
    {
        "AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE",
        "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT",
    }
)  # fmt: skip
RESTRICTED_VOLUMES = frozenset(
    {
        "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected",
        "secret",
    }
)  # fmt: skip


def level(pod: Fields) -> Level:
    """Return the strictest level that a pod's `spec` meets."""
    if any(baseline_violations(pod)):
        return "privileged"
    return "baseline" if any(restricted_violations(pod)) else "restricted"


def baseline_violations(pod: Fields) -> Iterator[str]:
    """Yield what `baseline` forbids, each as `who: what`."""
    for host in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(host):
            yield f"pod: {host}"
    for volume in pod.get("volumes", []):
        if "hostPath" in volume:
            yield f"volume {volume['name']}: hostPath"
    if _seccomp(pod) == "Unconfined":
        yield "pod: seccomp Unconfined"
    for container in containers(pod):
        yield from (f"{container['name']}: {what}" for what in _of_a_container(container))


def restricted_violations(pod: Fields) -> Iterator[str]:
    """Yield what `restricted` forbids beyond `baseline`."""
    for volume in pod.get("volumes", []):
        kinds = set(volume) - {"name"}
        if not kinds <= RESTRICTED_VOLUMES | {"hostPath"}:
            yield f"volume {volume['name']}: {', '.join(kinds)}"
    for container in containers(pod):
        name, context = container["name"], container.get("securityContext", {})
        capabilities = context.get("capabilities", {})
        if context.get("allowPrivilegeEscalation") is not False:
            yield f"{name}: allowPrivilegeEscalation"
        if (_inherited(pod, context, "runAsNonRoot")) is not True:
            yield f"{name}: runAsNonRoot"
        if _inherited(pod, context, "runAsUser") == 0:
            yield f"{name}: runAsUser"
        if (_seccomp(container) or _seccomp(pod)) not in ("RuntimeDefault", "Localhost"):
            yield f"{name}: seccomp"
        if "ALL" not in capabilities.get("drop", []):
            yield f"{name}: capabilities are not dropped"
        for capability in set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
            yield f"{name}: capability {capability}"


def containers(pod: Fields) -> list[Fields]:
    """Return all containers of a pod, those that start first first."""
    return [*pod.get("initContainers", []), *pod["containers"]]


def _of_a_container(container: Fields) -> Iterator[str]:
    context = container.get("securityContext", {})
    if context.get("privileged"):
        yield "privileged"
    if context.get("procMount", "Default") != "Default":
        yield "procMount"
    if _seccomp(container) == "Unconfined":
        yield "seccomp Unconfined"
    for capability in context.get("capabilities", {}).get("add", []):
        if capability not in BASELINE_CAPABILITIES:
            yield f"capability {capability}"
    if any(port.get("hostPort") for port in container.get("ports", [])):
        yield "hostPort"


def _seccomp(of: Fields) -> str:
    return str(of.get("securityContext", {}).get("seccompProfile", {}).get("type", ""))


def _inherited(pod: Fields, context: Fields, name: str) -> object:
    return context.get(name, pod.get("securityContext", {}).get(name))
