from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest

from kvtier_ops.pool import (
    MappedPool,
    Pool,
    PoolBusy,
    PoolClosed,
    PoolDirectoryError,
    PoolFormatError,
    PoolMismatch,
    SlotState,
    default_pool_directory,
)

from .conftest import MIB, StartChild


def backed_pool(directory: Path, *, data_bytes: int = MIB, fresh: bool = False) -> Pool:
    pool = Pool.create(directory, data_bytes, fresh=fresh)
    pool.back(0, pool.data_bytes)
    pool.back_records(range(pool.data_bytes // 4096))
    return pool


def test_a_pool_knows_whether_its_file_is_still_where_it_was(pool: Pool) -> None:
    seen = [pool.is_in_place]
    content = pool.path.read_bytes()
    pool.path.unlink()
    seen.append(pool.is_in_place)
    pool.path.write_bytes(content)  # another file, if with the same bytes
    seen.append(pool.is_in_place)
    assert seen == [True, False, False]


def test_the_file_and_its_directory_are_open_to_one_user_only(pool_directory: Path) -> None:
    directory = pool_directory / "made"
    pool = Pool.create(directory, MIB)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(pool.path.stat().st_mode) == 0o600
    pool.remove()
    assert not directory.exists()


@pytest.mark.parametrize("name", ["", ".hidden", "..", "a/b", "a b", "x" * 65, "ü", "a\n"])
def test_a_pool_name_that_could_leave_its_place_is_refused(name: str) -> None:
    with pytest.raises(PoolDirectoryError, match="not allowed"):
        default_pool_directory(name)


def test_a_pool_name_leads_to_a_directory_of_this_user() -> None:
    assert default_pool_directory("llama-70b.a") == Path(f"/dev/shm/kvtier-{os.geteuid()}-llama-70b.a")


def test_a_directory_that_is_a_link_or_open_to_others_is_refused(pool_directory: Path) -> None:
    real = pool_directory / "real"
    real.mkdir(0o700)
    link = pool_directory / "link"
    link.symlink_to(real)
    with pytest.raises(PoolDirectoryError, match="link"):
        Pool.create(link, MIB)
    real.chmod(0o770)
    with pytest.raises(PoolDirectoryError, match="chmod 700"):
        Pool.create(real, MIB)
    assert list(real.iterdir()) == []


def test_a_client_sees_what_the_daemon_wrote_and_the_daemon_what_the_client_wrote(pool: Pool) -> None:
    client = MappedPool.open(pool.path, pool.pool_id)
    (generation,) = pool.slots.reserve([5], 1, 4096)
    assert client.generation(5) == generation
    client.part_view(5, 64, 100)[:] = 42
    assert (pool.slot_view(5, 4096)[64:164] == 42).all()
    assert client.data.shape == (pool.data_bytes,)
    client.close()


def test_a_client_that_expects_another_pool_is_refused(pool: Pool) -> None:
    with pytest.raises(PoolMismatch, match="attach again"):
        MappedPool.open(pool.path, pool.pool_id ^ 1)


@pytest.mark.parametrize("damage", ["empty", "text", "bit flip", "cut", "other version"])
def test_a_file_that_is_no_pool_of_this_format_is_refused_and_replaced(
    pool_directory: Path, damage: str
) -> None:
    pool = Pool.create(pool_directory, MIB)
    path, pool_id = pool.path, pool.pool_id
    pool.close()
    content = bytearray(path.read_bytes())
    if damage == "empty":
        content = bytearray()
    elif damage == "text":
        content[:8] = b"#!/bin/s"
    elif damage == "bit flip":
        content[20] ^= 1
    elif damage == "cut":
        content = content[:-4096]
    else:
        content[8] += 1
    path.write_bytes(content)
    with pytest.raises(PoolFormatError, match="--fresh"):
        MappedPool.open(path, pool_id)
    replaced = Pool.create(pool_directory, MIB)
    assert not replaced.kept
    assert replaced.pool_id != pool_id
    replaced.close()


def test_a_link_in_the_place_of_the_pool_is_not_followed(pool_directory: Path) -> None:
    victim = pool_directory / "victim"
    victim.write_text("precious")
    (pool_directory / "pool").symlink_to(victim)
    with pytest.raises(PoolFormatError):
        MappedPool.open(pool_directory / "pool", 1)
    Pool.create(pool_directory, MIB).close()
    assert victim.read_text() == "precious"


def test_a_kept_file_preserves_records_generations_and_bytes_across_a_sigkilled_daemon(
    pool_directory: Path, start_child: StartChild
) -> None:
    daemon = start_child(
        """
import sys
from pathlib import Path
from kvtier_ops.pool import Pool
pool = Pool.create(Path(sys.argv[1]), 1 << 20)
pool.back(0, pool.data_bytes)
pool.back_records(range(256))
pool.slabs.configure(1 << 19, 2)
pool.slabs.assign(1, 8192)
pool.registry.write(b"namespaces")
for _ in range(3):
    generations = pool.slots.reserve([2, 4], 6, 8192)
pool.slot_view(2, 8192)[:] = 17
pool.slots.publish(2, 3, b"a key", [11, 12])
pool.slots.write_recency([2], [1234])
print(pool.pool_id, *generations, flush=True)
sys.stdin.read()
""",
        pool_directory,
    )
    assert daemon.stdout is not None
    pool_id, *generations = map(int, daemon.stdout.readline().split())
    with pytest.raises(PoolBusy, match=str(daemon.pid)):
        Pool.create(pool_directory, MIB)
    daemon.kill()
    daemon.wait()
    pool = Pool.create(pool_directory, MIB)
    assert pool.kept
    assert pool.pool_id == pool_id
    published, reserved = pool.slots.read(2), pool.slots.read(4)
    assert published is not None
    assert (published.state, published.generation, published.key) == (
        SlotState.PUBLISHED,
        generations[0],
        b"a key",
    )
    assert (published.space_id, published.checksums, published.recency) == (3, (11, 12), 1234)
    assert published.slot_bytes == 8192
    assert reserved is not None
    assert (reserved.state, reserved.owner, reserved.generation) == (SlotState.RESERVED, 6, generations[1])
    assert pool.slots.reserve([2], 1, 8192) == [generations[0] + 1]
    assert (pool.slot_view(2, 8192) == 17).all()
    assert pool.slabs.read() == (1 << 19, [0, 8192])
    assert pool.registry.read() == b"namespaces"
    pool.close()


@pytest.mark.parametrize("change", ["fresh", "size"])
def test_a_replaced_file_leaves_the_mapping_of_the_old_one_whole(pool_directory: Path, change: str) -> None:
    old = backed_pool(pool_directory)
    client = MappedPool.open(old.path, old.pool_id)
    client.data[:] = 5
    old.close()
    size = MIB if change == "fresh" else 2 * MIB
    new = backed_pool(pool_directory, data_bytes=size, fresh=change == "fresh")
    assert not new.kept
    new.data[:] = 9
    assert (client.data == 5).all()
    client.close()
    new.close()


@pytest.mark.parametrize("change", ["fresh", "size", "removed"])
def test_no_slot_of_a_new_file_has_a_generation_of_the_file_before_it(
    pool_directory: Path, change: str
) -> None:
    slots = range(256)
    old = backed_pool(pool_directory)
    granted = set(old.slots.reserve(slots, 1, 4096))
    if change == "removed":
        old.remove()
    else:
        old.close()
    size = 2 * MIB if change == "size" else MIB
    new = backed_pool(pool_directory, data_bytes=size, fresh=change == "fresh")
    unused = {new.generation(slot) for slot in slots}
    assert unused.isdisjoint(granted)
    for _ in range(3):
        assert (granted | unused).isdisjoint(new.slots.reserve(slots, 1, 4096))
    new.close()


def test_a_size_is_rounded_down_to_whole_slot_units(pool_directory: Path) -> None:
    pool = Pool.create(pool_directory, MIB + 4095)
    assert pool.data_bytes == MIB
    pool.close()
    assert Pool.create(pool_directory, MIB + 1).kept
    with pytest.raises(ValueError, match="at least"):
        Pool.create(pool_directory, 4095)


def test_only_what_was_backed_takes_memory(pool_directory: Path) -> None:
    pool = Pool.create(pool_directory, 1 << 30)
    front = pool.path.stat().st_blocks * 512
    assert front < 4 * MIB
    pool.back(MIB, 2 * MIB)
    pool.back_records([0, 512])
    assert pool.path.stat().st_blocks * 512 == front + 2 * MIB + 2 * 4096
    pool.close()


def test_backing_keeps_what_is_there(pool: Pool) -> None:
    pool.data[:] = 3
    (generation,) = pool.slots.reserve([1], 1, 4096)
    pool.back(0, pool.data_bytes)
    pool.back_records(range(2048))
    assert (pool.data == 3).all()
    assert pool.generation(1) == generation


@pytest.mark.parametrize(("offset", "length"), [(-4096, 4096), (0, 8 * MIB + 1), (8 * MIB, 1), (0, 0)])
def test_backing_outside_the_data_area_is_refused(pool: Pool, offset: int, length: int) -> None:
    with pytest.raises(IndexError, match=f"offset {offset} "):
        pool.back(offset, length)


@pytest.mark.parametrize(
    ("slot_id", "offset", "size"), [(2048, 0, 1), (-1, 0, 1), (2047, 0, 4097), (0, -1, 1), (0, 0, -1)]
)
def test_a_view_outside_the_data_area_is_refused_naming_the_offset(
    pool: Pool, slot_id: int, offset: int, size: int
) -> None:
    with pytest.raises(IndexError, match=f"offset {slot_id * 4096 + offset} "):
        pool.part_view(slot_id, offset, size)


def test_a_closed_pool_says_so_and_frees_its_lock_and_descriptors(pool_directory: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    pool = Pool.create(pool_directory, MIB)
    client = MappedPool.open(pool.path, pool.pool_id)
    for opened in (pool, client):
        opened.close()
        opened.close()
        with pytest.raises(PoolClosed):
            opened.generation(0)
        with pytest.raises(PoolClosed):
            opened.slot_view(0, 1)
    with pytest.raises(PoolClosed):
        pool.back(0, 4096)
    assert len(os.listdir("/proc/self/fd")) == before
    assert "kvtier-test" not in Path("/proc/self/maps").read_text()
    Pool.create(pool_directory, MIB).close()


def test_removing_a_pool_leaves_its_clients_their_memory(pool_directory: Path) -> None:
    pool = backed_pool(pool_directory)
    client = MappedPool.open(pool.path, pool.pool_id)
    for locks in ("owners", "gates"):
        (pool_directory / locks).mkdir(0o700)
        (pool_directory / locks / "abc").touch()
    pool.remove()
    assert not pool_directory.exists()
    client.data[:] = 1
    assert int(np.sum(client.data)) == MIB
    client.close()


def test_removing_a_pool_spares_files_that_are_not_its_own(pool_directory: Path) -> None:
    other = pool_directory / "other"
    other.touch()
    Pool.create(pool_directory, MIB).remove()
    assert list(pool_directory.iterdir()) == [other]
