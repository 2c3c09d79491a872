"""The caller's trace, told to the daemon: W3C's `traceparent`, as metadata of the calls of a request.

Owns where it comes from and what it may look like. Knows no tracing library: the engine that has one gives a
function (`ClientOptions.trace_context`), or the header with the request.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

from kvtier_client.context import ReqContext

logger = logging.getLogger(__name__)

TraceContext = Callable[[], str]
"""Return the `traceparent` of what the calling thread is doing; "" if nothing is traced."""

Metadata = tuple[tuple[str, str], ...]

HEADER = "traceparent"
_TRACE_PARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def trace_metadata(ctx: ReqContext, current: TraceContext | None) -> Metadata | None:
    """Return what a call says of the request's trace, None if there is none. Raises nothing.

    Of the request if it has one, else of its `kv_transfer_params`, else of the thread.
    """
    parent: object = ctx.trace_parent
    if not parent and ctx.kv_transfer_params is not None:
        parent = ctx.kv_transfer_params.get(HEADER, "")
    if not parent and current is not None:
        try:
            parent = current()
        except Exception:
            logger.debug("the engine's trace_context failed", exc_info=True)
    return ((HEADER, parent),) if isinstance(parent, str) and _TRACE_PARENT.fullmatch(parent) else None
