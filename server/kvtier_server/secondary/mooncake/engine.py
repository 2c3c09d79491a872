"""Mooncake's store, through two helper processes that are begun, watched and begun again.

Owns when a helper is begun and ended, what it is told, and whether the master is there. The helper that moves
chunks is replaced whenever it fails to answer; the one that lends memory stays as long as it lives.

    daemon ──socket──> transfer helper ──TCP──> segments of all nodes     pool: mapped by both
           ──socket──> segment helper: memory of this node, for all
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import socket
import time
from threading import Lock

from kvtier_server.secondary.base import OffloadingSpec, TierError
from kvtier_server.secondary.mooncake.codes import describe
from kvtier_server.secondary.mooncake.names import beat_name
from kvtier_server.secondary.mooncake.parameters import MooncakeParameters, split_address
from kvtier_server.secondary.mooncake.process import Helper
from kvtier_server.secondary.mooncake.store import ObjectStore
from kvtier_server.secondary.mooncake.wire import HEADER_BYTES, Operation

logger = logging.getLogger(__name__)

CONNECT_S = 1.0
"""What a connection to the master may take before it counts as away."""

SETUP_S = 20.0
"""What a helper's setup may take, the import of the engine included: 0.5 s where all is well."""

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
"""Bounds of the pause after a setup that failed; it doubles with each that fails again."""


class EngineStore(ObjectStore):
    """See the module's first lines."""

    def __init__(self, spec: OffloadingSpec, parameters: MooncakeParameters, num_headers: int) -> None:
        """Open the pool's file. Starts nothing: that is `keep`'s. Raises TierError."""
        if not spec.pool_file:
            raise TierError("this tier's helper process has to map the pool, and this pool has no file")
        self._own = parameters
        self._timeout_s = parameters.timeout / 1e9
        try:
            self._pool_fd = os.open(spec.pool_file, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise TierError(f"the pool's file {spec.pool_file} cannot be opened: {error.strerror}") from error
        self._pool_lock_fd = spec.pool_lock_fd
        self._headers_fd = os.memfd_create("kvtier-mooncake-headers", os.MFD_CLOEXEC)
        os.ftruncate(self._headers_fd, num_headers * HEADER_BYTES)
        self._headers = mmap.mmap(self._headers_fd, num_headers * HEADER_BYTES)
        self.headers = memoryview(self._headers)
        self._settings = {
            "metadata": parameters.metadata,
            "master": parameters.master,
            "protocol": parameters.protocol,
            "devices": parameters.devices,
            "segment": parameters.segment,
            "buffer": parameters.buffer,
            "replicas": parameters.replicas,
            "pool": self._pool_fd,
            "pool_offset": spec.pool_file_offset,
            "pool_bytes": spec.pool_bytes,
            "headers": self._headers_fd,
            "headers_bytes": num_headers * HEADER_BYTES,
        }
        self._lock = Lock()
        self._helpers: dict[str, Helper] = {}
        self._closed = False
        self._pause_s = FIRST_PAUSE_S
        self._begin_after = 0.0
        self._last_failure = ""

    def put(self, name: str, header: int, offset: int, num_bytes: int) -> int:
        return self._transfer().ask(
            Operation.PUT, name, self._timeout_s, header=header, offset=offset, num_bytes=num_bytes
        )

    def get(self, name: str, header: int, offset: int, num_bytes: int) -> int:
        return self._transfer().ask(
            Operation.GET, name, self._timeout_s, header=header, offset=offset, num_bytes=num_bytes
        )

    def exists(self, name: str) -> int:
        return self._transfer().ask(Operation.EXISTS, name, self._timeout_s)

    def remove(self, name: str) -> int:
        return self._transfer().ask(Operation.REMOVE, name, self._timeout_s)

    def keep(self) -> str:
        try:
            address = self._reach_master()
            for role in ("segment", "transfer"):
                if role == "transfer" or self._own.segment:
                    self._have(role, address)
            problem = self._beat()
        except OSError as error:
            return str(error.strerror or error)
        self._pause_s = FIRST_PAUSE_S
        return problem

    def _reach_master(self) -> str:
        """Look whether the master's port answers; returns this node's address on the way to it."""
        host, port = split_address(self._own.master)
        try:
            with socket.create_connection((host, port), CONNECT_S) as connection:
                return str(connection.getsockname()[0])
        except OSError as error:
            raise OSError(
                error.errno,
                f"the master at {self._own.master} is not reached: {error.strerror or error}",
            ) from error

    def _beat(self) -> str:
        """Ask the master about an object that is never there; only it can know."""
        helper = self._transfer()
        code = helper.ask(Operation.EXISTS, beat_name(), self._timeout_s)
        if code >= 0:
            return ""
        helper.kill()  # a client that has lost its master may take longer to find it again than a new one
        return f"the master at {self._own.master} does not answer: {describe(code)}"

    def _have(self, role: str, address: str) -> None:
        """Begin a helper if there is none. Raises OSError if there can be none now."""
        helper = self._helpers.get(role)
        if helper is not None and not helper.has_ended:
            return
        if time.monotonic() < self._begin_after:
            raise OSError(errno.EAGAIN, self._last_failure)
        own_address = self._own.local_hostname or address
        settings = {**self._settings, "local_hostname": own_address, "address": address}
        # Who maps the pool also holds the lock on it, so that it is not taken over before that ends.
        of_transfer = (self._pool_fd, self._headers_fd, self._pool_lock_fd)
        fds = [fd for fd in of_transfer if fd >= 0] if role == "transfer" else []
        with self._lock:
            if self._closed:
                raise OSError(errno.ESHUTDOWN, "the tier has been shut down")
            helper = self._helpers[role] = Helper(role, settings, fds, self._environment(address))
        try:
            code = helper.wait_ready(SETUP_S)
            failure = describe(code) if code else ""
        except OSError as error:
            failure = str(error.strerror)
        if failure:
            helper.kill()
            said = f"; it said: {helper.last_line}" if helper.last_line else ""
            self._last_failure = f"the {role} process cannot be set up: {failure}{said}"
            self._begin_after = time.monotonic() + self._pause_s
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            raise OSError(errno.EIO, self._last_failure)

    def _environment(self, address: str) -> dict[str, str]:
        """Return what the engine reads from its environment, unless somebody has set it already.

        Its own timeouts lie within ours, so that most of its failures are answers and not silence.
        """
        milliseconds = str(max(1, int(self._timeout_s * 1000 / 4)))
        seconds = str(max(1, int(self._timeout_s / 2)))
        wanted = {
            "MC_TCP_BIND_ADDRESS": address,
            "MC_RPC_TIMEOUT_MS": milliseconds,
            "MC_RPC_CONNECT_TIMEOUT_MS": milliseconds,
            "MC_TRANSFER_TIMEOUT": seconds,
            "MC_TCP_PROGRESS_TIMEOUT_SEC": seconds,
            "MC_TCP_STATUS_TIMEOUT_SEC": seconds,
            "MC_STORE_CLIENT_METRIC": "0",
            "MC_LOG_LEVEL": "WARNING",
        }
        return {**wanted, **os.environ}

    def _transfer(self) -> Helper:
        helper = self._helpers.get("transfer")
        if helper is None or helper.has_ended:
            raise OSError(errno.ENOTCONN, "no helper process yet")
        return helper

    def close(self, timeout_s: float) -> bool:
        give_up_at = time.monotonic() + timeout_s
        with self._lock:
            was_closed, self._closed = self._closed, True
            helpers = dict(self._helpers)
        if (transfer := helpers.get("transfer")) is not None:
            transfer.kill()
        # The segment last: it may need its time to say goodbye.
        ended = [
            helpers[role].close(max(0.0, give_up_at - time.monotonic()))
            for role in ("transfer", "segment")
            if role in helpers
        ]
        if all(ended) and not was_closed:
            os.close(self._pool_fd)
            os.close(self._headers_fd)
        return all(ended)
