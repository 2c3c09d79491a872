"""Which epoch the engine's weights need, over sessions and restarts of the daemon.

Owns the promise that after a weight update nothing stored before is hit: until the daemon has confirmed the
new epoch every call misses, and a session that opens in another epoch (the daemon was restarted) is reset
again before it is used.
"""

from __future__ import annotations

import grpc

from kvtier.v1 import offload_pb2
from kvtier_client.channel import read_failure
from kvtier_client.gate import Gate
from kvtier_client.link import Link
from kvtier_client.stats import ClientStats


class Weights:
    """The last reset that the engine asked for. Thread-safe."""

    def __init__(self, gate: Gate, stats: ClientStats) -> None:
        self._gate = gate
        self._stats = stats
        self._weights_id = ""
        self._asked = 0
        """Resets asked for so far: an answer to an earlier one must not count for a later one."""
        self._epoch: int | None = None
        """What the daemon answered to the last one; None until it has."""

    @property
    def epoch(self) -> int:
        """Epoch to attach in: what the last reset led to; 0 = none was asked for, or it is not confirmed."""
        return self._epoch or 0

    def begin(self, weights_id: str) -> Link | None:
        """Let every call miss until a reset is confirmed; return the session to do it in."""
        with self._gate.lock:
            self._weights_id = weights_id
            self._asked += 1
            self._epoch = None
            self._gate.resetting = True
            return self._gate.link

    def restore(self, link: Link, timeout_s: float) -> bool:
        """Bring a session to the epoch that the weights need; False when the daemon did not confirm it."""
        gate = self._gate
        with gate.lock:
            asked, weights_id = self._asked, self._weights_id
            if not asked or link.info.epoch == self._epoch:
                return True
        self._stats.add("rpc_reset")
        request = offload_pb2.ResetRequest(session_id=link.session_id, weights_id=weights_id)
        try:
            reply = link.stub.Reset(request, timeout=timeout_s)
        except (grpc.RpcError, ValueError) as error:
            if read_failure(error).reason == "session_unknown":
                gate.lose(link, "the daemon does not know the session any more")
            return False
        with gate.lock:
            if asked != self._asked:
                return False
            self._epoch = reply.epoch
            link.enter_epoch(reply.epoch)
            gate.resetting = False
        return True
