"""What the operator writes under `kv_connector_extra_config`, checked.

Owns kvtier's keys, their defaults and their errors. Keys of vLLM itself pass; vLLM parses them, and only what
it would misread or kvtier cannot do is refused here. Imports no vLLM, so that a configuration can be checked
anywhere.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, cast, get_args

from kvtier_client.channel import parse_address
from kvtier_client.options import ClientOptions
from kvtier_client.tls import VARIABLES, TlsFiles
from kvtier_client.worker import VerifyLoads

Transfer = Literal["auto", "shm", "cuda_ipc"]

ADDRESS_VARIABLE = "KVTIER_ADDRESS"
"""Names the daemon where the configuration does not: one environment for all engines of a node."""

MAX_WAIT_MS = 3_600_000
"""An hour. Longer is a mistake in the unit."""
MAX_TENANT_BYTES = 64
MAX_WEIGHTS_ID_BYTES = 256
MAX_PATH_BYTES = 4096

VLLM_KEYS = frozenset(
    {
        "spec_name",
        "spec_module_path",
        "block_size",
        "blocks_per_chunk",
        "canonical_layout",
        "offload_prompt_only",
        "self_describing_kv_events",
        "sync_load_budget_bytes",
    }
)
"""Read by vLLM's OffloadingConnector from the same dictionary."""


class SettingsError(ValueError):
    """The configuration cannot be used. The message lists every problem, each with its key."""


@dataclass(frozen=True, slots=True)
class Settings:
    """kvtier's part of `kv_connector_extra_config`. Times in milliseconds."""

    address: str
    """The daemon: `unix:///path/to/socket` or `127.0.0.1:port`."""
    lookup_wait_ms: float = 0.5
    """How long a scheduler step waits for the answer to a lookup before it asks again in the next step."""
    lookup_deadline_ms: float = 50
    """No answer by then is a miss."""
    promotion_wait_ms: int = 2000
    """How long a request waits for a chunk that is on its way from a lower tier."""
    transfer: Transfer = "auto"
    """How bytes move: `shm` = the engine copies through the mapped pool, `cuda_ipc` = the daemon copies to
    and from the GPU's memory. `auto` = `cuda_ipc` on a GPU, `shm` where that cannot be, which is said
    aloud."""
    weights_id: str | None = None
    """Names the weights. Engines share chunks only under the same one. None: made from the weights' files."""
    tenant: str = ""
    """Whom the chunks belong to and are counted for."""
    verify_loads: VerifyLoads = "always"
    """How often the checksum of a loaded chunk is compared."""
    tls_ca: str = ""
    """PEM of who signed the daemon's certificate, for an address of TCP; with `tls_cert` and `tls_key`."""
    tls_cert: str = ""
    tls_key: str = ""
    tls_server_name: str = ""
    """What the daemon's certificate is called, where that is not the address' host."""

    @classmethod
    def from_extra_config(cls, extra_config: Mapping[str, object]) -> Settings:
        """Check all keys at once and raise SettingsError with everything that is wrong."""
        reader = _Reader(extra_config)
        tls = reader.tls()
        settings = cls(
            address=reader.address(TlsFiles.given(tls)),
            tls_ca=tls["ca"],
            tls_cert=tls["cert"],
            tls_key=tls["key"],
            tls_server_name=tls["server_name"],
            lookup_wait_ms=reader.milliseconds("lookup_wait_ms", _DEFAULTS.lookup_wait_ms, zero=True),
            lookup_deadline_ms=reader.milliseconds(
                "lookup_deadline_ms", _DEFAULTS.lookup_deadline_ms, zero=False
            ),
            promotion_wait_ms=round(
                reader.milliseconds("promotion_wait_ms", _DEFAULTS.promotion_wait_ms, zero=True)
            ),
            transfer=cast("Transfer", reader.choice("transfer", get_args(Transfer), _DEFAULTS.transfer)),
            weights_id=reader.weights_id(),
            tenant=reader.text("tenant", MAX_TENANT_BYTES),
            verify_loads=cast(
                "VerifyLoads",
                reader.choice("verify_loads", get_args(VerifyLoads), _DEFAULTS.verify_loads),
            ),
        )
        reader.check_keys_of_vllm()
        reader.check_unknown_keys()
        if reader.problems:
            listed = "\n".join(f"  {problem}" for problem in reader.problems)
            raise SettingsError(f"kv_connector_extra_config cannot be used:\n{listed}")
        return settings

    def client_options(self) -> ClientOptions:
        """Return the bounds of one client. Who is patient with lookups is so with the other calls."""
        return ClientOptions(
            lookup_wait_ms=self.lookup_wait_ms,
            lookup_deadline_ms=self.lookup_deadline_ms,
            prepare_deadline_ms=max(ClientOptions().prepare_deadline_ms, 2 * self.lookup_deadline_ms),
            promotion_wait_ms=self.promotion_wait_ms,
            tls=TlsFiles.given(
                {
                    "ca": self.tls_ca,
                    "cert": self.tls_cert,
                    "key": self.tls_key,
                    "server_name": self.tls_server_name,
                }
            ),
        )


# A slotted class has no defaults to read: `Settings.tenant` is a descriptor.
_DEFAULTS = Settings(address="")
OWN_KEYS = frozenset(field.name for field in fields(Settings))


class _Reader:
    """Reads key after key and keeps what was wrong; a wrong value reads as its default."""

    def __init__(self, extra_config: Mapping[str, object]) -> None:
        self._config = extra_config
        self.problems: list[str] = []

    def tls(self) -> dict[str, str]:
        """Read the certificates' paths: from the configuration, else the environment; all "" if wrong."""
        found = {
            name: self.text(f"tls_{name}", MAX_PATH_BYTES) or os.environ.get(variable, "")
            for name, variable in VARIABLES.items()
        }
        try:
            TlsFiles.given(found)
        except ValueError as error:
            self.problems.append(f"tls_ca, tls_cert, tls_key: {error}")
            return dict.fromkeys(VARIABLES, "")
        return found

    def address(self, tls: TlsFiles | None) -> str:
        found = self._config.get("address")
        origin = "address"
        if found is None and ADDRESS_VARIABLE in os.environ:
            found, origin = os.environ[ADDRESS_VARIABLE], f"address (from ${ADDRESS_VARIABLE})"
        if found is None:
            self.problems.append(
                'address is missing: write "address": "unix:///path/to/socket", the address that '
                f"`kvtier serve` prints, or set ${ADDRESS_VARIABLE}"
            )
            return ""
        if not isinstance(found, str):
            self.problems.append(f"{origin}: must be a string as unix:///path/to/socket, not {found!r}")
            return ""
        try:
            parse_address(found, tls)
        except ValueError as error:
            self.problems.append(f"{origin}: {error}")
        return found

    def milliseconds(self, key: str, default: float, *, zero: bool) -> float:
        found = self._config.get(key, default)
        if isinstance(found, int | float) and not isinstance(found, bool):
            enough = found >= 0 if zero else found > 0
            if enough and found <= MAX_WAIT_MS:  # neither is true of NaN
                return found
        lowest = "0" if zero else "more than 0"
        self._refuse(key, f"a number of milliseconds, {lowest} to {MAX_WAIT_MS}")
        return default

    def choice(self, key: str, allowed: tuple[str, ...], default: str) -> str:
        found = self._config.get(key, default)
        if not isinstance(found, str) or found not in allowed:
            self._refuse(key, "one of " + ", ".join(f'"{name}"' for name in allowed))
            return default
        return found

    def text(self, key: str, max_bytes: int) -> str:
        found = self._config.get(key, "")
        if not isinstance(found, str) or len(found.encode()) > max_bytes:
            self._refuse(key, f"a string of at most {max_bytes} bytes")
            return ""
        return found

    def weights_id(self) -> str | None:
        if self._config.get("weights_id") is None:
            return None
        found = self.text("weights_id", MAX_WEIGHTS_ID_BYTES)
        if self._config["weights_id"] == "":
            self.problems.append("weights_id is empty: name the weights, or leave the key out")
        return found or None

    def check_keys_of_vllm(self) -> None:
        if self._config.get("canonical_layout", False) is not False:
            self.problems.append(
                "canonical_layout: kvtier keeps chunks in the layout of the engine, so that engines share "
                "them only with the same tensor_parallel_size; remove the key, or set it to false"
            )
        for key in ("blocks_per_chunk", "block_size"):
            found = self._config.get(key)
            is_int = isinstance(found, int) and not isinstance(found, bool)
            if found is not None and not (is_int and cast("int", found) > 0):
                self._refuse(key, "an integer, 1 or more")
        if self._config.get("blocks_per_chunk") is not None and self._config.get("block_size") is not None:
            self.problems.append("block_size and blocks_per_chunk say the same; keep one of them")
        for key in ("offload_prompt_only", "self_describing_kv_events"):
            if not isinstance(self._config.get(key, False), bool):
                self._refuse(key, "true or false")

    def check_unknown_keys(self) -> None:
        known = sorted(OWN_KEYS | VLLM_KEYS)
        for key in self._config:
            if key in known:
                continue
            near = difflib.get_close_matches(str(key), known, n=1)
            advice = f"did you mean {near[0]}?" if near else "known keys are " + ", ".join(known)
            self.problems.append(f"{key} is no known key; {advice}")

    def _refuse(self, key: str, allowed: str) -> None:
        self.problems.append(f"{key}: must be {allowed}, not {self._config[key]!r}")
