"""Whether a call may go out now, and what its outcome means for the next one.

Owns the one lock of a client, the open session (`link`), the breaker and the order of the listener's calls.
The lock is never held over I/O. What opens and closes sessions is `keeper.py`; what is sent, `client.py`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from threading import Condition, Lock, RLock
from typing import ParamSpec

from kvtier_client.breaker import Breaker
from kvtier_client.channel import RpcFailure, read_failure
from kvtier_client.link import Link
from kvtier_client.listener import ClientListener
from kvtier_client.options import ClientOptions
from kvtier_client.stats import ClientStats

logger = logging.getLogger(__name__)
P = ParamSpec("P")


def lease_time() -> float:
    """Seconds for leases: they go on while the machine sleeps, as they do in the daemon."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Gate:
    """Lets calls through to the open session, or says why not."""

    def __init__(self, options: ClientOptions, stats: ClientStats, listener: ClientListener) -> None:
        self.listener = listener
        self.lock = Lock()
        self.changed = Condition(self.lock)
        """The link, the breaker, `closing`, or when a link has something to send, changed."""
        self.flushed = Condition(self.lock)
        """A batch was answered or the link changed. Apart from `changed`: every step flushes, and the
        background thread need not wake for it."""
        self.link: Link | None = None
        self.away_reason = "not started"
        self.closing = False
        self.resetting = False
        """The engine has new weights and the daemon does not know yet: nothing may be hit."""
        shortest_ms = min(options.lookup_deadline_ms, options.prepare_deadline_ms)
        self.breaker = Breaker(options.breaker_threshold, shortest_ms / 1000)
        self._stats = stats
        self._pid = os.getpid()
        self._logged: set[str] = set()
        # Reentrant: a listener may send asynchronously, and a reply that is there already calls back at once.
        self._delivery = RLock()

    @property
    def forked(self) -> bool:
        """Whether this is a child's copy.

        Its locks may be held by threads that do not exist here, and grpc does not survive a fork: it must
        touch neither.
        """
        return os.getpid() != self._pid

    def adopt_process(self) -> None:
        """Belong to the calling process; before anything was started."""
        self._pid = os.getpid()

    def enter(self) -> Link | str:
        """Return the session to call, or the reason why the call misses at once."""
        if os.getpid() != self._pid:
            return "forked"
        link = self.link
        if link is None:
            self._stats.add("away_misses")
            return "closed" if self.closing else "away"
        if self.resetting:
            self._stats.add("away_misses")
            return "resetting"
        if self.breaker.is_open:
            self._stats.add("breaker_misses")
            return "breaker_open"
        return link

    def answered(self, link: Link, boot_id: str, call: str) -> bool:
        """Note an answer to a kind of call; False if the session is over, so that it grants nothing."""
        if boot_id != link.boot_id:
            self.lose(link, f"the daemon was restarted (boot {boot_id})")
            return False
        if not self.breaker.is_clean(call):
            with self.lock:
                self.breaker.answered(call)
        return self.link is link

    def failed(self, link: Link, error: Exception, call: str, *, counts: bool = True) -> RpcFailure:
        """Note a failed call and say why it failed. `counts`: its deadline was one to judge the daemon by."""
        failure = read_failure(error)
        if failure.is_missed_deadline:
            self.missed_deadline(call, counts=counts)
            return failure
        self._stats.add("refused_calls")
        if failure.is_our_bug and failure.reason not in self._logged:
            self._logged.add(failure.reason)
            logger.error(
                "the daemon failed a call (%s): %s; this is a bug, please report it; more are only counted",
                failure.reason,
                failure.details,
            )
        if failure.boot_id:
            self.answered(link, failure.boot_id, call)
        if failure.reason == "session_unknown":
            self.lose(link, "the daemon does not know the session any more")
        return failure

    def missed_deadline(self, call: str, *, counts: bool = True) -> None:
        """Note that there is no answer by the deadline. `counts`: it was one to judge the daemon by."""
        self._stats.add("deadline_misses")
        if not counts:
            return
        with self.lock:
            opened = self.breaker.missed(call, time.monotonic())
            if opened:
                self.changed.notify_all()
        if opened:
            self._stats.add("breaker_opens")
            logger.warning(
                "the daemon does not answer %s in time; the engine goes on without it until it does", call
            )

    def install(self, link: Link) -> bool:
        """Let calls through to a new session; False, and nothing is changed, while new weights need a reset.

        Whoever asks for one from now on finds this session to do it in.
        """
        with self.lock:
            if self.resetting:
                return False
            self.link = link
            self.away_reason = ""
            self.breaker.reset()
            self.changed.notify_all()
        return True

    def lose(self, link: Link, reason: str) -> None:
        """End a session as far as calls are concerned; the background thread does the rest."""
        with self.lock:
            if self.link is link:
                self.link = None
                self.away_reason = reason
                self.changed.notify_all()
                self.flushed.notify_all()

    def close_breaker(self) -> None:
        """Let calls through again."""
        with self.lock:
            self.breaker.close()

    def deliver(self, link: Link, call: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Call the listener about a session, unless the session is over."""
        with self._delivery:
            if self.link is link:
                self._call(call, *args, **kwargs)

    def deliver_detached(self, call: Callable[[str], None], reason: str) -> None:
        """Tell the listener that the session is over. Nothing about that session is delivered afterwards."""
        with self._delivery:
            self._call(call, reason)

    def _call(self, call: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            call(*args, **kwargs)
        except Exception:
            self._stats.add("listener_errors")
            logger.exception("the listener's %s failed", getattr(call, "__name__", call))
