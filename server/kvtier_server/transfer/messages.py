"""What engines say on the wire, checked and translated for a copy process, and its answers back.

Owns the checks that need no memory and no slot; nothing of what a session may have copied.
"""

from __future__ import annotations

from itertools import chain

from kvtier.v1 import transfer_pb2 as pb
from kvtier_ops.ipc import HandleError, MemoryHandle, MemoryKind
from kvtier_ops.namespace import MAX_GROUPS
from kvtier_server.core.instances import Session
from kvtier_server.core.namespaces import GeometryMismatch
from kvtier_server.core.refused import BadRequest
from kvtier_server.message_bytes import BLOCKS_PER_KEY
from kvtier_server.transfer.wire import Done, Job, Register


def register_of(
    request: pb.RegisterMemoryRequest, session: Session, memory_id: int, max_tensors: int
) -> Register:
    """Check and translate; the gate is still to come. Raises BadRequest, GeometryMismatch."""
    namespace = session.instance.namespace
    part = namespace.part_of(session.rank)
    geometry = namespace.geometries[part]
    if len(request.groups) != len(geometry):
        raise GeometryMismatch("groups: number of groups", len(geometry), len(request.groups))
    paired: list[list[tuple[MemoryHandle, int]]] = []
    for index, (group, tensors) in enumerate(zip(request.groups, geometry, strict=True)):
        if len(group.tensors) != len(tensors):
            raise GeometryMismatch(f"groups[{index}]: number of tensors", len(tensors), len(group.tensors))
        paired.append(
            [
                (_handle_of(message), tensor.page_bytes)
                for message, tensor in zip(group.tensors, tensors, strict=True)
            ]
        )
    count = sum(map(len, paired))
    if count > max_tensors:
        raise BadRequest("groups", f"{count} tensors; {max_tensors} are allowed (limits.transfer_tensors)")
    try:
        for handle, page_bytes in chain.from_iterable(paired):
            handle.check(page_bytes)  # against each other, which takes longer, the helper checks them
    except HandleError as error:
        raise BadRequest("groups", str(error)) from error
    return Register(
        memory_id,
        namespace.facts.blocks_per_chunk,
        part,
        namespace.facts.num_parts,
        tuple(tuple(handle for handle, _ in group) for group in paired),
        tuple(tuple(tensor.page_bytes for tensor in tensors) for tensors in geometry),
        request.event_handle,
        "",
    )


def _handle_of(message: pb.MemoryHandle) -> MemoryHandle:
    try:
        kind = MemoryKind(message.kind)
    except ValueError:
        raise BadRequest("groups", f"kind: {message.kind} is no kind of memory that is known here") from None
    return MemoryHandle(
        kind,
        message.device_uuid,
        message.handle,
        message.allocation_bytes,
        message.offset_bytes,
        message.size_bytes,
        message.block_stride_bytes,
        message.num_blocks,
    )


def job_of(request: pb.TransferRequest, max_keys: int) -> Job:
    """Check what can be checked without the memory, and translate. Raises BadRequest."""
    if request.direction not in (pb.TRANSFER_DIRECTION_STORE, pb.TRANSFER_DIRECTION_LOAD):
        raise BadRequest("direction", f"{request.direction}; it is STORE or LOAD")
    if not 1 <= len(request.slot_ids) <= max_keys:
        raise BadRequest("slot_ids", f"{len(request.slot_ids)} slots; 1 to {max_keys} are allowed in a job")
    for field, entries, allowed in (
        ("block_ids", len(request.block_ids), BLOCKS_PER_KEY * max_keys),
        ("group_sizes", len(request.group_sizes), MAX_GROUPS),
        ("block_indices", len(request.block_indices), MAX_GROUPS),
        ("group_slots", len(request.group_slots), MAX_GROUPS),
        ("keys", len(request.keys), max_keys),
    ):
        if entries > allowed:
            raise BadRequest(field, f"{entries} entries; at most {allowed} are allowed in a job")
    if len(request.generations) != len(request.slot_ids):
        raise BadRequest(
            "generations", f"{len(request.generations)} entries for {len(request.slot_ids)} slots"
        )
    if request.group_slots and sum(request.group_slots) != len(request.slot_ids):
        raise BadRequest(
            "group_slots", f"their sum is {sum(request.group_slots)}, there are {len(request.slot_ids)} slots"
        )
    return Job(
        request.job_id,
        request.memory_id,
        request.direction == pb.TRANSFER_DIRECTION_STORE,
        request.verify,
        tuple(request.slot_ids),
        tuple(request.generations),
        tuple(request.block_ids),
        tuple(request.group_sizes),
        tuple(request.block_indices),
        tuple(request.group_slots) or None,
        request.wait_value,
        (),
    )


def response_of(job: Job, done: Done) -> pb.TransferResponse:
    """Translate the end of a job."""
    return pb.TransferResponse(
        job_id=job.job_id,
        ok=not done.failed,
        failed=done.failed,
        failures=[pb.TransferFailure.ValueType(why) for why in done.failures],
        checksums=done.checksums,
        message=done.message,
        bytes=done.num_bytes,
        seconds=done.seconds,
    )
