"""Reloads whose file does not answer; the others are asked of a real daemon (tests/integration)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest
from structlog.testing import capture_logs

from kvtier_server import reload
from kvtier_server.config import Config, ConfigError, ConfigErrors
from kvtier_server.metrics import Metrics
from kvtier_server.reload import MAX_MISTAKES, Reloads

CONFIG = Config.model_validate({"server": {"address": "unix:///tmp/x.sock"}})
WAIT_S = 30.0


class SlowFile:
    """Answers when it is let."""

    def __init__(self) -> None:
        self.answers = threading.Event()
        self.has_answered = threading.Event()

    def read(self) -> Config:
        self.answers.wait(WAIT_S)
        self.has_answered.set()
        return CONFIG


@pytest.fixture
def file() -> Iterator[SlowFile]:
    slow = SlowFile()
    yield slow
    slow.answers.set()


def reloads_of(file: SlowFile, metrics: Metrics) -> Reloads:
    return Reloads(CONFIG, file.read, lambda _: None, metrics)


async def one_of(read: Callable[[], Config], metrics: Metrics) -> None:
    await one(Reloads(CONFIG, read, lambda _: None, metrics))


async def one(reloads: Reloads) -> None:
    await asyncio.wait_for(reloads.ask(), WAIT_S)


def count(metrics: Metrics, result: str) -> float | None:
    return metrics.registry.get_sample_value("kvtier_config_reloads_total", {"result": result})


def test_a_file_that_does_not_answer_fails_the_reload_and_may_answer_the_next(
    file: SlowFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = Metrics(version="0", limits={})

    async def scenario() -> list[list[str]]:
        reloads = reloads_of(file, metrics)
        with capture_logs() as lines:
            await one(reloads)
            await one(reloads)
        assert count(metrics, "failed") == 2
        assert metrics.registry.get_sample_value("kvtier_config_last_reload_successful") == 0
        file.answers.set()
        await asyncio.to_thread(file.has_answered.wait, WAIT_S)
        monkeypatch.setattr(reload, "READ_S", WAIT_S)
        while not count(metrics, "unchanged"):  # the thread that was late may need an instant to end
            await one(reloads)
        return [line["mistakes"] for line in lines]

    monkeypatch.setattr(reload, "READ_S", 0.01)
    first, second = asyncio.run(asyncio.wait_for(scenario(), WAIT_S))
    assert first == ["the file does not answer: it was not read in 0.01 s"]
    assert second == ["the file does not answer: an earlier reading of it still hangs"]
    assert metrics.registry.get_sample_value("kvtier_config_last_reload_successful") == 1


def test_the_log_has_the_first_of_very_many_mistakes_and_their_number() -> None:
    metrics = Metrics(version="0", limits={})

    def read() -> Config:
        raise ConfigErrors(ConfigError(f"pool.x{index}", "file", "unknown") for index in range(60_000))

    with capture_logs() as lines:
        asyncio.run(one_of(read, metrics))
    (line,) = lines
    assert line["mistakes"][0] == "pool.x0 (file): unknown"
    assert line["mistakes"][MAX_MISTAKES:] == [
        f"and {60_000 - MAX_MISTAKES} more; kvtier config check has all"
    ]
    assert count(metrics, "failed") == 1


def test_a_stop_waits_for_no_reading(file: SlowFile) -> None:
    metrics = Metrics(version="0", limits={})

    async def scenario() -> None:
        reloads = reloads_of(file, metrics)
        running = reloads.ask()
        assert reloads.ask() is running, "the second one comes after it"
        await asyncio.sleep(0)  # it reads now
        reloads.stop()
        await asyncio.wait([running], timeout=WAIT_S)
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}, "none of both goes on"

    asyncio.run(scenario())  # and asyncio.run waits for its own threads
    (reader,) = [thread for thread in threading.enumerate() if thread.name == "kvtier-reload"]
    assert reader.daemon
    assert count(metrics, "failed") == 0
