"""Attach on the wire, and in the core's words: namespace facts, geometry, the applicant."""

from __future__ import annotations

import re

from kvtier.v1 import offload_pb2 as pb
from kvtier_ops.layout import TensorLayout
from kvtier_ops.namespace import (
    MAX_EXTRA_FACTS,
    MAX_GROUPS,
    MAX_NAMES_BYTES,
    MAX_TENSORS,
    MAX_WORLD_SIZE,
    GroupFacts,
    NamespaceFacts,
    utf8_bytes,
)
from kvtier_server.callers import MAX_SAID
from kvtier_server.core.instances import Applicant, Role
from kvtier_server.core.namespaces import Geometry
from kvtier_server.core.refused import BadRequest, Refused

PROTOCOL_MINOR = 1
"""Newest minor version of kvtier.v1; the one before is served too."""

MAX_NAME_BYTES = 128
MAX_TENANT_BYTES = 64
_LOCK_NAME = re.compile(r"[0-9a-f]{8,64}")


class ProtocolVersion(Refused):
    """The client speaks a minor version that this daemon does not."""

    reason = "PROTOCOL_VERSION"


def applicant_of(request: pb.AttachRequest) -> Applicant:
    """Check and translate who attaches. Raises BadRequest, ProtocolVersion."""
    _check_counts(request)
    if not PROTOCOL_MINOR - 1 <= request.protocol_minor <= PROTOCOL_MINOR:
        raise ProtocolVersion(
            f"the client speaks kvtier.v1 minor {request.protocol_minor}, this daemon "
            f"{PROTOCOL_MINOR - 1} to {PROTOCOL_MINOR}; upgrade the older of the two"
        )
    roles = {pb.SESSION_ROLE_SCHEDULER: Role.SCHEDULER, pb.SESSION_ROLE_WORKER: Role.WORKER}
    role = roles.get(request.role)
    if role is None:
        raise BadRequest("role", f"{request.role} is no role")
    _check_text("engine_id", request.engine_id, 1, MAX_NAME_BYTES)
    _check_text("tenant", request.tenant, 0, MAX_TENANT_BYTES)
    if not request.instance_nonce:
        raise BadRequest("instance_nonce", "0; it is a random number")
    if not 1 <= request.world_size <= MAX_WORLD_SIZE:
        raise BadRequest("world_size", f"{request.world_size}; 1 to {MAX_WORLD_SIZE} are supported")
    if request.rank >= (request.world_size if role is Role.WORKER else 1):
        raise BadRequest("rank", f"{request.rank}; it is below world_size, and 0 for a scheduler")
    if not _LOCK_NAME.fullmatch(request.lock_file):
        raise BadRequest("lock_file", "not the name of a lock file (8 to 64 hex digits)")
    return Applicant(
        engine_id=request.engine_id,
        nonce=request.instance_nonce,
        role=role,
        rank=request.rank,
        world_size=request.world_size,
        tenant=request.tenant,
        lock_file=request.lock_file,
        mapped_pool_id=request.mapped_pool_id,
        previous_session=request.previous_session,
        epoch=request.epoch if role is Role.SCHEDULER else 0,
        geometry=_geometry_of(request) if role is Role.WORKER else None,
    )


def facts_of(request: pb.AttachRequest) -> NamespaceFacts:
    """Translate the namespace. Raises BadRequest if the client's digest of it is not ours."""
    message = request.namespace
    facts = NamespaceFacts(
        model=message.model,
        weights_id=message.weights_id,
        kv_dtype=message.kv_dtype,
        hash_algorithm=message.hash_algorithm,
        tokens_per_hash=message.tokens_per_hash,
        blocks_per_chunk=message.blocks_per_chunk,
        kv_cache_layout=message.kv_cache_layout,
        groups=tuple(
            GroupFacts(
                tokens_per_block=group.tokens_per_block,
                part_bytes=group.part_bytes,
                sliding_window_tokens=group.sliding_window_tokens,
                layer_names=tuple(group.layer_names),
            )
            for group in message.groups
        ),
        num_parts=message.num_parts,
        tensor_parallel_size=message.tensor_parallel_size,
        pipeline_parallel_size=message.pipeline_parallel_size,
        prefill_context_parallel_size=message.prefill_context_parallel_size,
        decode_context_parallel_size=message.decode_context_parallel_size,
        extra=dict(message.extra),
    )
    digest = facts.digest()
    if request.namespace_digest and request.namespace_digest != digest:
        raise BadRequest(
            "namespace_digest",
            f"{request.namespace_digest[:MAX_SAID]}, but the daemon computes {digest} from the same facts: "
            "client and daemon are of versions that do not belong together",
        )
    return facts


def facts_message(facts: NamespaceFacts) -> pb.NamespaceFacts:
    """Translate the namespace back."""
    return pb.NamespaceFacts(
        model=facts.model,
        weights_id=facts.weights_id,
        kv_dtype=facts.kv_dtype,
        hash_algorithm=facts.hash_algorithm,
        tokens_per_hash=facts.tokens_per_hash,
        blocks_per_chunk=facts.blocks_per_chunk,
        kv_cache_layout=facts.kv_cache_layout,
        groups=[
            pb.GroupFacts(
                tokens_per_block=group.tokens_per_block,
                part_bytes=group.part_bytes,
                sliding_window_tokens=group.sliding_window_tokens,
                layer_names=group.layer_names,
            )
            for group in facts.groups
        ],
        num_parts=facts.num_parts,
        tensor_parallel_size=facts.tensor_parallel_size,
        pipeline_parallel_size=facts.pipeline_parallel_size,
        prefill_context_parallel_size=facts.prefill_context_parallel_size,
        decode_context_parallel_size=facts.decode_context_parallel_size,
        extra=facts.extra,
    )


def _check_counts(request: pb.AttachRequest) -> None:
    """Refuse more of anything than there can be, before any of it is looked at."""
    facts = request.namespace
    groups, geometry = facts.groups, request.geometry
    _check_at_most("namespace.groups", len(groups), MAX_GROUPS)
    _check_at_most("namespace.groups.layer_names", sum(len(g.layer_names) for g in groups), MAX_TENSORS)
    _check_at_most("namespace.extra", len(facts.extra), MAX_EXTRA_FACTS)
    _check_at_most("geometry", len(geometry), MAX_GROUPS)
    _check_at_most("geometry.tensors", sum(len(group.tensors) for group in geometry), MAX_TENSORS)


def _check_at_most(field: str, number: int, limit: int) -> None:
    if number > limit:
        raise BadRequest(field, f"{number} entries; at most {limit} are allowed")


def _geometry_of(request: pb.AttachRequest) -> Geometry:
    names = utf8_bytes(tensor.name for group in request.geometry for tensor in group.tensors)
    if names > MAX_NAMES_BYTES:
        raise BadRequest(
            "geometry.tensors", f"names of {names} bytes; {MAX_NAMES_BYTES} are allowed together"
        )
    for index, group in enumerate(request.geometry):
        for position, tensor in enumerate(group.tensors):
            if not tensor.page_bytes:
                raise BadRequest(f"geometry[{index}].tensors[{position}].page_bytes", "0; it is at least 1")
    return tuple(
        tuple(TensorLayout(tensor.name, tensor.page_bytes) for tensor in group.tensors)
        for group in request.geometry
    )


def _check_text(field: str, text: str, shortest: int, longest: int) -> None:
    num_bytes = len(text.encode())
    if not shortest <= num_bytes <= longest:
        raise BadRequest(field, f"{num_bytes} bytes; {shortest} to {longest} are allowed")
    if not text.isprintable():
        raise BadRequest(field, "has characters that cannot be printed")
