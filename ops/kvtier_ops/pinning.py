"""The pool's mapping made known to a device driver, piece by piece, in the background.

Owns the thread and how far it has come. What registers a piece is given to it: cudaHostRegister in the helper
(by cupy) and in an engine that copies through shared memory (by cuda-bindings, `cuda_registrar`).

NOT RUN ON A GPU yet: `cuda_registrar`. The thread and its pieces run in the tests with mlock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PIECE_BYTES = 64 << 30
"""The largest piece that is registered at once. A copy may name one piece only."""

HOST_REGISTER_FLAGS = 1 | 2
"""cudaHostRegisterPortable and cudaHostRegisterMapped: for every device, and for kernels."""

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Registrar:
    """What makes memory known to a driver and takes that back; both raise an exception with the reason."""

    register: Callable[[int, int], None]
    """Address, bytes. Runs without the GIL: a large piece takes seconds."""
    unregister: Callable[[int], None]
    """Address."""


class PinnedPool:
    """Registers the pool from its front on. A piece that cannot be registered ends it: what lies behind is
    still copied, staged by the driver, and `error` says why.
    """

    def __init__(
        self,
        pool: Bytes,
        registrar: Registrar,
        piece_bytes: int = PIECE_BYTES,
        on_error: Callable[[str], None] = lambda error: None,
    ) -> None:
        """Begin. `pool`: shape (bytes,), uint8, kept mapped until `close`. The thread tells `on_error`."""
        self._on_error = on_error
        self._pool = pool
        self._registrar = registrar
        self._starts = tuple(range(0, pool.size, piece_bytes))
        self._piece_bytes = piece_bytes
        self._changed = threading.Condition()
        self._ready_bytes = 0
        self._error = ""
        self._stop = False
        self._thread = threading.Thread(target=self._register, name="pin-pool", daemon=True)
        self._thread.start()

    @property
    def ready_bytes(self) -> int:
        """How much of the pool's front is registered. Never falls before `close`."""
        return self._ready_bytes

    @property
    def error(self) -> str:
        """Why the rest will not be registered; empty if nothing failed."""
        return self._error

    @property
    def boundaries(self) -> tuple[int, ...]:
        """The offsets where two pieces meet."""
        return self._starts[1:]

    def wait(self, timeout_s: float) -> bool:
        """Wait until all is registered or failed; tell whether all is registered."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or self._ready_bytes == self._pool.size, timeout_s)
        return self._ready_bytes == self._pool.size

    def close(self) -> str:
        """Take the registrations back; no copy runs any more. Waits for the piece under way.

        Returns why the driver would not, or nothing. Safe to repeat.
        """
        self._stop = True
        self._thread.join()
        done, self._ready_bytes = self._ready_bytes, 0
        reason = ""
        for start in self._starts:
            if start < done:
                try:
                    self._registrar.unregister(self._pool.ctypes.data + start)
                except Exception as error:  # noqa: BLE001 - a driver raises its own; the others are still tried
                    reason = f"the pool's piece at {start} stays registered: {error}"
        return reason

    def _register(self) -> None:
        for start in self._starts:
            size = min(self._piece_bytes, self._pool.size - start)
            if self._stop:
                return
            error = ""
            try:
                self._registrar.register(self._pool.ctypes.data + start, size)
            except Exception as raised:  # noqa: BLE001 - a driver raises its own; told to whoever asks
                error = (
                    f"{size} bytes of the pool at {start} cannot be registered: {raised}; check `ulimit -l` "
                    "and the memory limit of the container"
                )
            with self._changed:
                self._error = error
                if not error:
                    self._ready_bytes = start + size
                self._changed.notify_all()
            if error:
                self._on_error(error)
                return


def cuda_registrar(device: int) -> Registrar:
    """Return cudaHostRegister through cuda-bindings, for an engine, with this device current."""
    from cuda.bindings import runtime

    def check(answer: tuple[object, ...]) -> None:
        if int(answer[0]) != 0:  # type: ignore[call-overload]
            raise OSError(str(answer[0]))

    def register(address: int, nbytes: int) -> None:
        check(runtime.cudaSetDevice(device))
        check(runtime.cudaHostRegister(address, nbytes, HOST_REGISTER_FLAGS))

    def unregister(address: int) -> None:
        # Without it a thread that has not chosen a device makes a context on the first one.
        check(runtime.cudaSetDevice(device))
        check(runtime.cudaHostUnregister(address))

    return Registrar(register, unregister)
