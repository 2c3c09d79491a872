from __future__ import annotations

import os
import random
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvtier_ops.cuda_export import ExportedEvent, export_cuda
from kvtier_ops.ipc import (
    MAX_TENSORS,
    HandleError,
    MemoryHandle,
    MemoryKind,
    SharedAllocation,
    check_registration,
    export_shared,
    find_overlap,
    open_shared,
)

CUDA = MemoryHandle(MemoryKind.CUDA_IPC, bytes(16), bytes(64), 1 << 20, 4096, 8192, 1024, 8)
SHARED = replace(CUDA, kind=MemoryKind.POSIX_SHM, device_uuid=b"", handle=b"kvtier-mem-" + b"0" * 32)


@pytest.fixture
def allocation() -> Iterator[SharedAllocation]:
    made = SharedAllocation(1 << 16)
    yield made
    made.close()


def test_a_handle_that_fits_passes() -> None:
    for handle in (CUDA, SHARED):
        handle.check(1024)
        replace(handle, size_bytes=7 * 1024 + 1000).check(1000)  # the last page needs no padding
        replace(handle, num_blocks=1, block_stride_bytes=8192).check(8192)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("kind", {"kind": 0}),
        ("kind", {"kind": 3}),
        ("device_uuid", {"device_uuid": b""}),
        ("device_uuid", {"device_uuid": bytes(17)}),
        ("device_uuid", {"kind": MemoryKind.POSIX_SHM}),
        ("handle", {"handle": b""}),
        ("handle", {"handle": bytes(63)}),
        ("handle", {"handle": bytes(65)}),
        *[
            (field, {field: value})
            for field in ("allocation_bytes", "size_bytes", "block_stride_bytes", "num_blocks")
            for value in (0, -1, (1 << 63) - 1, (1 << 64) - 1)
        ],
        ("offset_bytes", {"offset_bytes": -1}),
        ("offset_bytes", {"offset_bytes": (1 << 64) - 1}),
        ("size_bytes", {"offset_bytes": (1 << 20) - 8191}),
        ("size_bytes", {"offset_bytes": 0, "size_bytes": (1 << 20) + 1}),
        ("block_stride_bytes", {"block_stride_bytes": 1023}),
        ("num_blocks", {"num_blocks": 9}),
        ("num_blocks", {"num_blocks": 1 << 32}),
        ("num_blocks", {"block_stride_bytes": 1025}),
    ],
)
def test_a_handle_that_is_wrong_is_refused_naming_the_field(field: str, change: dict[str, object]) -> None:
    with pytest.raises(HandleError, match=f"^{field}: "):
        replace(CUDA, **change).check(1024)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name",
    [b"", b"pool", b"../etc/passwd", b"kvtier-mem-" + b"0" * 31, b"kvtier-mem-/" + b"0" * 31]
    + [b"kvtier-mem-" + b"0" * 32 + tail for tail in (b"\n", b"\0", b"/")]
    + [b"\xff" * 43],
)
def test_shared_memory_cannot_be_named_like_another_file(name: bytes) -> None:
    with pytest.raises(HandleError, match=r"^handle: "):
        replace(SHARED, handle=name).check(1024)


def tensor(offset: int, stride: int, num_blocks: int, page: int) -> tuple[MemoryHandle, int]:
    size = (num_blocks - 1) * stride + page
    handle = replace(
        SHARED, offset_bytes=offset, size_bytes=size, block_stride_bytes=stride, num_blocks=num_blocks
    )
    return handle, page


@pytest.mark.parametrize(
    ("first", "second", "overlap"),
    [
        (tensor(0, 64, 8, 64), tensor(512, 64, 8, 64), False),
        (tensor(0, 64, 8, 64), tensor(511, 64, 8, 64), True),
        (tensor(0, 128, 8, 64), tensor(64, 128, 8, 64), False),  # layers that interleave
        (tensor(0, 128, 8, 64), tensor(63, 128, 8, 64), True),
        (tensor(0, 128, 8, 65), tensor(64, 128, 8, 64), True),
        (tensor(0, 128, 8, 64), tensor(0, 128, 8, 64), True),
        (tensor(0, 100, 50, 1), tensor(50, 30, 9, 1), True),
        (tensor(0, 100, 50, 1), tensor(5, 20, 200, 1), False),
    ],
)
def test_tensors_overlap_where_their_pages_do(
    first: tuple[MemoryHandle, int], second: tuple[MemoryHandle, int], overlap: bool
) -> None:
    assert find_overlap([first, second]) == ((0, 1) if overlap else None)
    assert find_overlap([second, first]) == ((0, 1) if overlap else None)


def test_overlaps_are_found_as_by_a_set_of_bytes() -> None:
    rng = random.Random(5)
    seen = set()
    for _ in range(3000):
        pair = []
        for _ in range(2):
            page = rng.randint(1, 8)
            stride = page + rng.choice([0, 0, 1, 5, 16])
            pair.append(tensor(rng.randint(0, 60), stride, rng.randint(1, 6), page))
        touched = [
            {
                handle.offset_bytes + block * handle.block_stride_bytes + byte
                for block in range(handle.num_blocks)
                for byte in range(page)
            }
            for handle, page in pair
        ]
        overlap = bool(touched[0] & touched[1])
        seen.add((overlap, pair[0][0].block_stride_bytes == pair[1][0].block_stride_bytes))
        assert find_overlap(pair) == ((0, 1) if overlap else None)
    assert len(seen) == 4


def test_different_strides_over_millions_of_blocks_are_compared() -> None:
    many = 1 << 21
    assert find_overlap([tensor(0, 64, many, 16), tensor(16, 32, 2 * many, 8)]) is None
    assert find_overlap([tensor(0, 64, many, 16), tensor(15, 32, 2 * many, 8)]) == (0, 1)
    with pytest.raises(HandleError, match=r"^num_blocks: "):
        find_overlap([tensor(0, 64, 1 << 25, 16), tensor(16, 32, 1 << 26, 8)])


def test_a_registration_may_share_a_tensor_between_groups_but_not_within_one() -> None:
    check_registration([[tensor(0, 64, 8, 64)], [tensor(0, 64, 8, 64)]])
    with pytest.raises(HandleError, match=r"^offset_bytes: tensors 0 and 1 of group 1 overlap"):
        check_registration([[], [tensor(0, 64, 8, 64), tensor(0, 64, 8, 64)]])


def test_a_registration_that_contradicts_itself_is_refused() -> None:
    other_size = (replace(tensor(8192, 64, 8, 64)[0], allocation_bytes=1 << 19), 64)
    with pytest.raises(HandleError, match=r"^allocation_bytes: tensor 1 of group 0"):
        check_registration([[tensor(0, 64, 8, 64), other_size]])
    with pytest.raises(HandleError, match=r"^block_stride_bytes: .*\(tensor 1 of group 0\)"):
        check_registration([[tensor(0, 64, 8, 64), (tensor(8192, 64, 8, 64)[0], 65)]])
    with pytest.raises(HandleError, match=r"^groups: 1025 tensors"):
        check_registration([[tensor(i * 64, 64, 1, 64) for i in range(MAX_TENSORS + 1)]])


def test_a_full_registration_of_interleaved_layers_passes() -> None:
    check_registration([[tensor(i * 64, 64 * MAX_TENSORS // 4, 4, 64) for i in range(MAX_TENSORS // 4)]])


def test_shared_memory_is_seen_by_who_opens_it_and_only_by_its_owner(allocation: SharedAllocation) -> None:
    handle = export_shared(allocation, 0, 4096, 4096, 1)
    handle.check(4096)
    opened = open_shared(handle)
    allocation.data[5] = 7
    assert opened[5] == 7
    assert stat.S_IMODE(os.stat(f"/dev/shm/{allocation.name}").st_mode) == 0o600
    allocation.close()
    opened[6] = 8
    assert allocation.data[6] == 8
    with pytest.raises(HandleError, match=r"^handle: .*No such file"):
        open_shared(handle)


def test_shared_memory_of_another_size_is_refused(allocation: SharedAllocation) -> None:
    handle = replace(export_shared(allocation, 0, 4096, 4096, 1), allocation_bytes=1 << 17)
    with pytest.raises(HandleError, match=r"^allocation_bytes: 131072, but .* 65536"):
        open_shared(handle)


def test_a_link_in_the_place_of_shared_memory_is_refused(tmp_path: Path) -> None:
    handle = SHARED.handle.decode()
    target = tmp_path / "file"
    target.write_bytes(bytes(1 << 20))
    link = Path("/dev/shm") / handle
    link.symlink_to(target)
    try:
        with pytest.raises(HandleError, match=r"^handle: "):
            open_shared(SHARED)
    finally:
        link.unlink()


_EXPORTER = """
import sys
from kvtier_ops.ipc import SharedAllocation
allocation = SharedAllocation(1 << 16)
print(allocation.name, flush=True)
sys.stdin.read()
"""


def test_shared_memory_of_a_process_that_was_killed_is_refused_and_removed(
    start_child: Callable[..., object],
) -> None:
    child = start_child(_EXPORTER)
    name = child.stdout.readline().strip()  # type: ignore[attr-defined]
    handle = replace(SHARED, handle=name.encode(), allocation_bytes=1 << 16)
    assert open_shared(handle).size == 1 << 16
    child.kill()  # type: ignore[attr-defined]
    child.wait()  # type: ignore[attr-defined]
    with pytest.raises(HandleError, match=r"^handle: the process that made .* is gone"):
        open_shared(handle)
    assert not os.path.exists(f"/dev/shm/{name}")


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="there is a CUDA driver")
def test_exporting_device_memory_without_a_driver_is_an_error_that_names_the_way_out() -> None:
    for export in (lambda: export_cuda(4096, 4096, 4096, 1), lambda: ExportedEvent(lambda: 0)):
        with pytest.raises(HandleError, match=r"^kind: .*; set transfer = shm$"):
            export()


def test_importing_the_ops_loads_no_gpu_library(start_child: Callable[..., object]) -> None:
    child = start_child(
        "import sys, kvtier_ops.copy_engine, kvtier_ops.cuda, kvtier_ops.cuda_export, kvtier_ops.fragments\n"
        "print(sorted({'torch', 'cupy', 'cuda'} & set(sys.modules)))"
    )
    assert child.stdout.readline().strip() == "[]"  # type: ignore[attr-defined]
    assert "kvtier_ops.ipc" in sys.modules
