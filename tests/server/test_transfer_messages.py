from __future__ import annotations

import pytest

from kvtier.v1 import transfer_pb2 as pb
from kvtier_server.core.refused import BadRequest
from kvtier_server.message_bytes import BLOCKS_PER_KEY
from kvtier_server.transfer.messages import job_of

MAX_KEYS = 8


def job(**fields: list[int] | list[bytes]) -> pb.TransferRequest:
    return pb.TransferRequest(
        job_id=1,
        direction=pb.TRANSFER_DIRECTION_LOAD,
        slot_ids=[1],
        generations=[1],
        **fields,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("field", "items"),
    [
        ("block_ids", [0] * (MAX_KEYS * BLOCKS_PER_KEY + 1)),
        ("group_sizes", [0] * 65),
        ("block_indices", [0] * 65),
        ("group_slots", [0] * 65),
        ("keys", [b""] * (MAX_KEYS + 1)),
    ],
)
def test_a_job_that_repeats_a_field_more_often_than_can_be_is_refused_by_that_field(
    field: str, items: list[int] | list[bytes]
) -> None:
    with pytest.raises(BadRequest) as caught:
        job_of(job(**{field: items}), MAX_KEYS)
    assert caught.value.metadata["field"] == field
    assert f"{len(items)} entries" in str(caught.value)


def test_a_job_with_as_many_blocks_as_it_may_have_is_taken() -> None:
    asked = job(block_ids=[0] * (MAX_KEYS * BLOCKS_PER_KEY), group_sizes=[1] * 64)
    assert len(job_of(asked, MAX_KEYS).block_ids) == MAX_KEYS * BLOCKS_PER_KEY
