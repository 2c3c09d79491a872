"""Reading the configuration again while the daemon runs (SIGHUP).

Owns the order: read on a thread of its own, which nobody waits for longer than READ_S; compare, apply what
can be, say what was done. A configuration with a mistake changes nothing. What a setting means is its room's;
`apply` hands the new one out.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread

import structlog

from kvtier_server import logs
from kvtier_server.config import Config, ConfigErrors
from kvtier_server.config_changes import Changes, compare
from kvtier_server.config_values import AT_ATTACH
from kvtier_server.metrics import Metrics

READ_S = 10.0
"""Longest wait for the file: a network file system of good health answers in far less."""

MAX_MISTAKES = 20
"""So many are in the line of the log, which is written on the loop's thread."""

log = structlog.get_logger("kvtier.reload")


class _NoAnswer(Exception):
    """The file has not been read in time; the message says by which reading."""


class Reloads:
    """Reloads of one daemon, one at a time. All on the loop's thread, but for reading the file."""

    def __init__(
        self,
        config: Config,
        reread: Callable[[], Config],
        apply: Callable[[Config], None],
        metrics: Metrics,
    ) -> None:
        """`reread` reads all sources again and raises ConfigErrors. `apply` must not fail half way."""
        self._config = config
        self._reread = reread
        self._apply = apply
        self._metrics = metrics
        self._task: asyncio.Task[None] | None = None
        self._again = False
        self._reading: Future[Config] | None = None

    def ask(self) -> asyncio.Task[None]:
        """Begin a reload; one that is asked for during another comes after it, and stands for all such.

        Returns the one that runs.
        """
        if self._task is not None:
            self._again = True
            return self._task
        self._task = task = asyncio.get_running_loop().create_task(self._reload())
        task.add_done_callback(self._ended)
        return task

    def stop(self) -> None:
        """Give up the one that runs and those that were asked for."""
        self._again = False
        if self._task is not None:
            self._task.cancel()

    def _ended(self, _: asyncio.Task[None]) -> None:
        self._task = None
        if self._again:
            self._again = False
            self.ask()

    async def _reload(self) -> None:
        try:
            self._take(compare(self._config, await self._read()))
        except ConfigErrors as errors:
            mistakes = [str(error) for error in errors.errors[:MAX_MISTAKES]]
            if len(errors.errors) > MAX_MISTAKES:
                mistakes.append(f"and {len(errors.errors) - MAX_MISTAKES} more; kvtier config check has all")
            self._refuse(mistakes)
        except _NoAnswer as error:
            self._refuse([str(error)])
        except Exception:  # a bug of ours must be seen, and the daemon goes on as it was
            self._metrics.config_reloaded("failed", None)
            log.exception("config_reload_failed", effect="the daemon goes on with its configuration")

    async def _read(self) -> Config:
        """Read on a thread that nobody waits for at the end. Raises ConfigErrors, _NoAnswer."""
        if self._reading is not None and not self._reading.done():
            raise _NoAnswer("the file does not answer: an earlier reading of it still hangs")
        reading: Future[Config] = Future()
        reading.set_running_or_notify_cancel()  # it cannot be cancelled: nothing wakes who hangs in a file

        def read() -> None:
            try:
                reading.set_result(self._reread())
            except Exception as error:  # noqa: BLE001 the waiting task's to judge
                reading.set_exception(error)

        self._reading = reading
        Thread(target=read, name="kvtier-reload", daemon=True).start()
        try:
            async with asyncio.timeout(READ_S):
                return await asyncio.wrap_future(reading)
        except TimeoutError:
            raise _NoAnswer(f"the file does not answer: it was not read in {READ_S:g} s") from None

    def _refuse(self, mistakes: list[str]) -> None:
        self._metrics.config_reloaded("failed", None)
        effect = "nothing has changed; mend it and send SIGHUP again"
        log.error("config_reload_failed", mistakes=mistakes, effect=effect)

    def _take(self, changes: Changes) -> None:
        old_level, new_level = self._config.server.log_level, changes.config.server.log_level
        self._apply(changes.config)
        self._config = changes.config
        # Said at whichever level says more: who turns the log down, or up, wants to see that it worked.
        logs.set_level(min(old_level, new_level, key=logs.LEVELS.__getitem__))
        if changes.restart:
            log.warning(
                "config_needs_restart", settings=changes.restart, effect="these go on with their old values"
            )
        log.info(
            "config_reloaded",
            changed={change.path: str(change) for change in changes.applied},
            for_new_engines=[change.path for change in changes.applied if change.when is AT_ATTACH],
        )
        logs.set_level(new_level)
        result = "needs_restart" if changes.restart else "applied" if changes.applied else "unchanged"
        self._metrics.config_reloaded(result, time.time())
