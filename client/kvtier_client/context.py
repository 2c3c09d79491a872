"""The request a call is about: its id and its parameters, built once and handed along.

Owns how parameters become JSON: `5`, `5.0`, `true` and `"5"` stay four things, and what JSON cannot say is
left out, entry by entry, instead of being bent. What is done about it (counting, warning) is the client's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_REQUEST_ID_BYTES = 256


@dataclass(frozen=True, slots=True)
class ParamsJson:
    """`data`: the parameters as JSON, None when there is nothing to send. `dropped`: names left out."""

    data: bytes | None
    dropped: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ReqContext:
    """A request of the engine. Build it once per request and pass it on every call."""

    req_id: str
    kv_transfer_params: Mapping[str, Any] | None = None
    trace_parent: str = ""
    """W3C's header of the request's trace, if it has one: the daemon's spans belong to it."""
    _wire_id: str = field(init=False, repr=False, compare=False)
    _params: list[ParamsJson] = field(init=False, repr=False, compare=False, default_factory=list)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_wire_id", wire_request_id(self.req_id))

    @property
    def wire_id(self) -> str:
        """The id as the daemon knows it."""
        return self._wire_id

    def params_json(self) -> ParamsJson:
        """Return the parameters as JSON. Serialized on the first call, so that most calls pay nothing."""
        if not self._params:
            self._params.append(serialize_params(self.kv_transfer_params))
        return self._params[0]


def wire_request_id(req_id: str) -> str:
    """Return `req_id` where the protocol takes it (1..256 bytes of UTF-8), else a digest of it.

    Users may choose ids; one that is too long must not cost its request the cache.
    """
    if 0 < len(req_id) <= MAX_REQUEST_ID_BYTES and req_id.isascii():
        return req_id
    data = req_id.encode("utf-8", "surrogatepass")
    if 0 < len(data) <= MAX_REQUEST_ID_BYTES and not _has_surrogates(req_id):
        return req_id
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def serialize_params(params: object) -> ParamsJson:
    """Serialize what JSON can say; entries that it cannot are dropped and named. Never raises."""
    if params is None:
        return ParamsJson(None, ())
    if not isinstance(params, Mapping):
        return ParamsJson(None, (f"<{type(params).__name__}>",))
    entries: list[str] = []
    dropped: list[str] = []
    for name, value in params.items():
        try:
            entries.append(f"{_to_json(name, str)}:{_to_json(value)}")
        except (TypeError, ValueError, RecursionError):
            dropped.append(ascii(name)[:80])
    if not entries and dropped:
        return ParamsJson(None, tuple(dropped))
    return ParamsJson(f"{{{','.join(entries)}}}".encode(), tuple(dropped))


def _to_json(value: object, wanted: type | None = None) -> str:
    """Return JSON for `value`, or raise TypeError, ValueError (NaN, a cycle, a surrogate), RecursionError."""
    if wanted is not None and not isinstance(value, wanted):
        raise TypeError(f"{type(value).__name__} is no {wanted.__name__}")
    _refuse_other_keys(value)
    text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    text.encode()  # lone surrogates are valid in a str and in no JSON
    return text


def _refuse_other_keys(value: object) -> None:
    """Raise TypeError for a key that is no string: json would write 5, True and None as strings."""
    if isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(name, str):
                raise TypeError(f"the key {name!r} is no string")
            _refuse_other_keys(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_other_keys(item)


def _has_surrogates(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
