"""The whole way, device cache to device cache: whatever happens to the daemon, no token ever differs."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtier_client.demo.engine import Engine
from kvtier_ops import faults
from kvtier_ops.header import HEADER_BYTES, read_header

from ..conftest import StartDaemon
from ..daemon_process import DaemonProcess, wait_until
from .engines import (
    NUM_BLOCKS,
    TEXT_FILE,
    TURNS,
    WINDOW,
    OffloadedEngine,
    attached_engine,
    expected,
    make_model,
    nothing_held,
    outputs,
)


@pytest.mark.parametrize("window", [None, WINDOW], ids=["full", "sliding"])
@pytest.mark.parametrize("blocks_per_chunk", [1, 4])
def test_a_second_engine_loads_what_the_first_one_stored(
    start_daemon: StartDaemon, window: int | None, blocks_per_chunk: int
) -> None:
    daemon = start_daemon(pool_bytes="64MiB")
    with attached_engine(daemon, "one", window=window, blocks_per_chunk=blocks_per_chunk) as one:
        assert one.chat() == expected(window)
        assert one.loaded_tokens > 0, "it gets back what its own device cache has lost"
    with attached_engine(daemon, "two", window=window, blocks_per_chunk=blocks_per_chunk) as two:
        assert two.chat() == expected(window)
        assert two.loaded_share > 0.8
        assert two.failed_loads == 0
    assert daemon.status().checksum_failures == 0
    wait_until(lambda: nothing_held(daemon), "the daemon is rid of both engines")


@pytest.mark.parametrize("window", [None, WINDOW], ids=["full", "sliding"])
def test_a_load_may_begin_inside_a_chunk(start_daemon: StartDaemon, window: int | None) -> None:
    daemon = start_daemon(pool_bytes="64MiB")
    prompt = list(TEXT_FILE.read_bytes()[:140])  # two chunks of four blocks, and a bit
    with attached_engine(daemon, "one", window=window) as one:
        one.engine.add_request("long", prompt, 8)
        (stored,) = one.engine.run()
    with attached_engine(daemon, "two", window=window) as two:
        two.engine.add_request("short", prompt[:40], 8)
        two.engine.run()
        two.engine.add_request("long", prompt, 8)
        (loaded,) = two.engine.run()
    assert (loaded.device_tokens, loaded.loaded_tokens) == (32, 96)
    assert loaded.output == stored.output


def test_requests_that_lose_their_blocks_say_the_same_and_hold_nothing(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(pool_bytes="64MiB")
    text = TEXT_FILE.read_bytes()
    prompts = {"old": list(text[:60]), "young": list(text[100:160])}
    model = make_model()
    plain = Engine(model, model.make_cache(NUM_BLOCKS))
    with attached_engine(daemon, "one", blocks_per_chunk=1, num_blocks=14) as one:
        for engine in (plain, one.engine):
            for name, prompt in prompts.items():
                engine.add_request(name, prompt, 80)
        results = one.engine.run()
        one.engine.check_integrity()
        assert sum(result.preemptions for result in results) > 0
        assert outputs(results) == outputs(plain.run())
        one.engine.add_request("again", prompts["old"], 8)
        one.engine.run()
        wait_until(lambda: daemon.status().tiers[0].pinned_chunks == 0, "no pin outlives its request")


def test_two_engines_at_once_share_their_chunks_and_say_the_same(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(pool_bytes="64MiB")
    with attached_engine(daemon, "one") as one, attached_engine(daemon, "two") as two:
        for _ in range(TURNS):
            list(one.turn())
            list(two.turn())
        assert outputs(one.results) == outputs(two.results) == expected()
        assert two.loaded_share > 0.8
        assert two.offload.copies.stored_bytes < one.offload.copies.stored_bytes


@pytest.mark.parametrize(("window", "seed"), [(None, 1), (WINDOW, 0)], ids=["other-weights", "other-window"])
def test_two_models_never_get_each_others_chunks(
    start_daemon: StartDaemon, window: int | None, seed: int
) -> None:
    daemon = start_daemon(pool_bytes="64MiB")
    with (
        attached_engine(daemon, "one") as one,
        attached_engine(daemon, "other", window=window, seed=seed) as other,
    ):
        list(one.turn())  # the prompts of the first turn are the same for both
        list(other.turn())
        assert other.loaded_tokens == 0
        assert one.chat() == expected()
        assert other.chat() == expected(window, seed)
        assert expected() != expected(window, seed)


def test_an_engine_without_a_daemon_says_the_same(tmp_path: Path) -> None:
    engine = OffloadedEngine(f"unix://{tmp_path}/no.sock", "alone")
    try:
        assert engine.chat() == expected()
        assert engine.loaded_tokens == 0
    finally:
        engine.offload.close()


def test_an_engine_outlives_its_daemon_and_finds_its_chunks_again(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(pool_bytes="64MiB")
    with attached_engine(daemon, "one") as engine:
        list(engine.turn())
        turn = engine.turn()
        next(turn)
        daemon.kill()
        next(turn)
        assert not engine.offload.ready
        daemon.start()
        list(turn)
        wait_until(lambda: engine.offload.ready, "the engine has found the new daemon")
        before = engine.loaded_tokens
        list(engine.turn())
        assert engine.loaded_tokens > before
        assert outputs(engine.results) == expected()
    wait_until(lambda: nothing_held(daemon), "the daemon is rid of the engine")


@pytest.mark.parametrize("point", ["worker.before_load", "load.after_copy"])
def test_when_every_load_fails_the_engine_computes(start_daemon: StartDaemon, point: str) -> None:
    daemon = start_daemon(pool_bytes="64MiB")
    with attached_engine(daemon, "one") as one:
        one.chat()
    with attached_engine(daemon, "two") as two, failing(point):
        assert two.chat() == expected()
        assert two.failed_loads > 0
        assert two.loaded_tokens == 0
    wait_until(lambda: nothing_held(daemon), "no failed load holds a lease")


def test_bytes_that_rot_in_the_pool_change_no_token(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(pool_bytes="64MiB")
    with attached_engine(daemon, "one") as one:
        one.chat()
    flip_some_bytes(daemon)
    with attached_engine(daemon, "two") as two:
        assert two.chat() == expected()
        assert two.failed_loads > 0
        wait_until(lambda: daemon.status().checksum_failures > 0, "the daemon has looked for itself")
    with attached_engine(daemon, "three") as three:
        assert three.chat() == expected()


@contextlib.contextmanager
def failing(point: str) -> Iterator[None]:
    def fail() -> None:
        raise faults.FaultInjected(point)

    faults.arm(point, fail)
    try:
        yield
    finally:
        faults.disarm(point)


def flip_some_bytes(daemon: DaemonProcess) -> None:
    """Flip bytes in every chunk, and in nothing of the pool's own tables."""
    path = daemon.pool_file
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as pool:
        begin = read_header(pool[:HEADER_BYTES], len(pool)).data_offset
        for offset in range(begin + 1000, len(pool), 1 << 14):
            if pool[offset]:
                pool[offset] ^= 0xFF
