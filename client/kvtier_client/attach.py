"""The messages of Attach, and the thread that reads its stream.

Owns the translation of what the engine told into kvtier.v1. When to attach, and what an event does, is
decided in `keeper.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Event, Thread

import grpc

from kvtier.v1 import offload_pb2
from kvtier_client.answers import SessionInfo, SessionLimits
from kvtier_client.channel import read_failure
from kvtier_client.options import EngineIdentity, Role
from kvtier_ops.layout import TensorLayout
from kvtier_ops.namespace import NamespaceFacts
from kvtier_ops.pool import MappedPool

PROTOCOL_MINOR = 0
"""Newest minor version of kvtier.v1 that this client speaks."""

END_WAIT_S = 1.0
"""How long the end of a cancelled stream is waited for; it comes at once, unless the listener hangs."""

_ROLES = {
    Role.SCHEDULER: offload_pb2.SESSION_ROLE_SCHEDULER,
    Role.WORKER: offload_pb2.SESSION_ROLE_WORKER,
}


def facts_message(facts: NamespaceFacts) -> offload_pb2.NamespaceFacts:
    """Return the facts for the wire."""
    return offload_pb2.NamespaceFacts(
        model=facts.model,
        weights_id=facts.weights_id,
        kv_dtype=facts.kv_dtype,
        hash_algorithm=facts.hash_algorithm,
        tokens_per_hash=facts.tokens_per_hash,
        blocks_per_chunk=facts.blocks_per_chunk,
        kv_cache_layout=facts.kv_cache_layout,
        groups=[
            offload_pb2.GroupFacts(
                tokens_per_block=group.tokens_per_block,
                sliding_window_tokens=group.sliding_window_tokens,
                part_bytes=group.part_bytes,
                layer_names=group.layer_names,
            )
            for group in facts.groups
        ],
        tensor_parallel_size=facts.tensor_parallel_size,
        pipeline_parallel_size=facts.pipeline_parallel_size,
        prefill_context_parallel_size=facts.prefill_context_parallel_size,
        decode_context_parallel_size=facts.decode_context_parallel_size,
        num_parts=facts.num_parts,
        extra=facts.extra,
    )


def attach_request(
    identity: EngineIdentity, facts: NamespaceFacts, geometry: Sequence[Sequence[TensorLayout]]
) -> offload_pb2.AttachRequest:
    """Return what is the same in every Attach of a process: no lock file, no previous session yet."""
    return offload_pb2.AttachRequest(
        protocol_minor=PROTOCOL_MINOR,
        engine_id=identity.engine_id,
        instance_nonce=identity.instance_nonce,
        role=_ROLES[identity.role],
        rank=identity.rank,
        world_size=identity.world_size,
        tenant=identity.tenant,
        namespace=facts_message(facts),
        namespace_digest=facts.digest(),
        geometry=[
            offload_pb2.GroupGeometry(
                tensors=[
                    offload_pb2.TensorGeometry(name=tensor.name, page_bytes=tensor.page_bytes)
                    for tensor in tensors
                ]
            )
            for tensors in geometry
        ],
    )


def check_geometry(
    identity: EngineIdentity, facts: NamespaceFacts, geometry: Sequence[Sequence[TensorLayout]] | None
) -> None:
    """Raise ValueError unless a worker's tensors are given and add up to what the facts say."""
    if identity.role is Role.SCHEDULER:
        if geometry is not None:
            raise ValueError("geometry belongs to workers; a scheduler has no tensors")
        return
    if geometry is None or len(geometry) != len(facts.groups):
        raise ValueError(
            f"a worker must tell the tensors of its {len(facts.groups)} KV-cache groups: "
            "geometry=[[TensorLayout(name, page_bytes), ...], ...]"
        )
    for index, (tensors, group) in enumerate(zip(geometry, facts.groups, strict=True)):
        part_bytes = facts.blocks_per_chunk * sum(tensor.page_bytes for tensor in tensors)
        if part_bytes != group.part_bytes:
            raise ValueError(
                f"geometry[{index}] adds up to {part_bytes} bytes a chunk, but "
                f"facts.groups[{index}].part_bytes is {group.part_bytes}"
            )


def session_info(attached: offload_pb2.Attached, pool: MappedPool | None) -> SessionInfo:
    """Return what the daemon said about the session it opened."""
    limits = attached.limits
    return SessionInfo(
        session_id=attached.session_id,
        boot_id=attached.boot_id,
        pool=pool,
        pool_id=attached.pool.pool_id,
        slot_bytes=tuple(attached.slot_bytes),
        limits=SessionLimits(
            max_keys=limits.max_keys,
            max_params_bytes=limits.max_params_bytes,
            lookup_lease_ms=limits.lookup_lease_ms,
            max_credit_bytes=limits.max_credit_bytes,
        ),
        epoch=attached.epoch,
        missing_ranks=tuple(attached.missing_ranks),
    )


class EventStream:
    """The stream of one Attach and the thread that reads it.

    The first message goes to `on_first`. The others are read after `release` and go to `on_event`; then
    `on_end` is told why the stream ended, always and once. All are called on the reading thread.
    """

    def __init__(
        self,
        attach: grpc.UnaryStreamMultiCallable[offload_pb2.AttachRequest, offload_pb2.AttachResponse],
        request: offload_pb2.AttachRequest,
        *,
        on_first: Callable[[offload_pb2.AttachResponse], None],
        on_event: Callable[[offload_pb2.AttachResponse], None],
        on_end: Callable[[str], None],
    ) -> None:
        self._call = attach(request)
        self._on_first = on_first
        self._on_event = on_event
        self._on_end = on_end
        self._released = Event()
        self._closed = False
        self._thread = Thread(target=self._read, name="kvtier-events", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def release(self) -> None:
        """Let the events after the first one through."""
        self._released.set()

    def close(self) -> None:
        """End the stream, which ends the session, and wait for the thread, END_WAIT_S at most.

        A thread that the listener holds longer reads nothing more when it comes back.
        """
        self._closed = True
        self._call.cancel()
        self._released.set()
        self._thread.join(END_WAIT_S)

    def _read(self) -> None:
        reason = "the daemon closed the stream"
        try:
            first = next(self._call, None)
            if first is not None:
                self._on_first(first)
                self._released.wait()
                for event in self._call:
                    if self._closed:
                        break
                    self._on_event(event)
        except grpc.RpcError as error:
            failure = read_failure(error)
            reason = f"{failure.reason}: {failure.details}"
        finally:
            self._on_end(reason)
