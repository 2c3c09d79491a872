"""What one configured value may look like: the types of kvtier_server.config and their messages.

Owns no setting and no default; each type turns what was written into what the daemon uses, or says why not.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from enum import Enum
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from kvtier_ops.directory import PoolDirectoryError, default_pool_directory
from kvtier_server.address import AddressError, check_listen_address, parse_host_port, socket_path
from kvtier_server.policies.loader import check_policy_name
from kvtier_server.units import UnitError, exact_bytes, exact_duration, parse_bytes, parse_duration


class Reload(Enum):
    """Stands in a setting's Annotated: a reload (SIGHUP) applies it. What has no mark needs a restart."""

    LIVE = "at once"
    AT_ATTACH = "for engines that attach from then on"
    """Those that are attached go by what they were told."""


LIVE, AT_ATTACH = Reload.LIVE, Reload.AT_ATTACH


def _to_bytes(raw: object) -> int:
    if isinstance(raw, int) and not isinstance(raw, bool):
        return raw
    if not isinstance(raw, str):
        raise UnitError(f'{raw!r} is not a size; write a text such as "4GiB"')
    return parse_bytes(raw)


def _to_nanoseconds(raw: object) -> int:
    if not isinstance(raw, str):
        raise UnitError(f'{raw!r} has no unit; write a duration as "250ms" or "10s"')
    return parse_duration(raw)


def _refuse_bool(raw: object) -> object:
    if isinstance(raw, bool):  # a bool is an int to Python, not to whoever wrote `engines = true`
        raise ValueError(f"{str(raw).lower()} is not a number")  # noqa: TRY004 - pydantic collects ValueErrors
    return raw


def _check_name(name: str) -> str:
    try:
        default_pool_directory(name)
    except PoolDirectoryError as error:
        raise ValueError(str(error)) from None
    return name


def _check_address(address: str) -> str:
    check_listen_address(address)
    return address


def _check_tcp_address(address: str) -> str:
    if socket_path(address) is not None:
        raise AddressError(
            f"{address!r} is a unix socket; that is server.address, this is a host:port beside it"
        )
    if address:
        check_listen_address(address)
    return address


def _check_admin_address(address: str) -> str:
    if address:
        check_listen_address(address)
        if socket_path(address) is None:
            raise AddressError(f"{address!r} is no unix socket; over TCP certificates have roles ([tls])")
    return address


def _check_metrics_address(address: str) -> str:
    if address:
        parse_host_port(address, example_port=9471)
    return address


def _check_directory(directory: str) -> str:
    if directory and not os.path.isabs(directory):
        raise ValueError(f"{directory!r} is not an absolute path")
    return directory


_POLICY = re.compile(r"[a-z][a-z0-9_]*|[A-Za-z_][\w.]*:[A-Za-z_]\w*", re.ASCII)


def _check_policy(policy: str) -> str:
    if not _POLICY.fullmatch(policy):
        raise ValueError(f'{policy!r} is neither a policy\'s name ("lru", "arc") nor "package.module:Class"')
    if ":" not in policy:  # a class of somebody else is imported by the daemon alone
        check_policy_name(policy)
    return policy


def unit_of(metadata: Iterable[object]) -> Literal["size", "duration", ""]:
    """Say how a field's values are written, from its pydantic metadata: with a unit, or as they are."""
    readers = {found.func for found in metadata if isinstance(found, BeforeValidator)}
    if _to_bytes in readers:
        return "size"
    return "duration" if _to_nanoseconds in readers else ""


Bytes = Annotated[int, BeforeValidator(_to_bytes), Field(ge=1)]
BytesOrNone = Annotated[int, BeforeValidator(_to_bytes), Field(ge=0)]
Nanoseconds = Annotated[int, BeforeValidator(_to_nanoseconds), Field(ge=1)]
NanosecondsOrNone = Annotated[int, BeforeValidator(_to_nanoseconds), Field(ge=0)]
Count = Annotated[int, BeforeValidator(_refuse_bool), Field(ge=1, le=1 << 40)]
CountOrNone = Annotated[int, BeforeValidator(_refuse_bool), Field(ge=0, le=1 << 40)]
Share = Annotated[float, BeforeValidator(_refuse_bool), Field(gt=0, le=1, allow_inf_nan=False)]
Name = Annotated[str, AfterValidator(_check_name)]
ListenAddress = Annotated[str, AfterValidator(_check_address)]
TcpAddress = Annotated[str, AfterValidator(_check_tcp_address)]
AdminAddress = Annotated[str, AfterValidator(_check_admin_address)]
MetricsAddress = Annotated[str, AfterValidator(_check_metrics_address)]
Directory = Annotated[str, AfterValidator(_check_directory)]
AbsolutePath = Annotated[str, AfterValidator(_check_directory)]
PolicyName = Annotated[str, AfterValidator(_check_policy)]


def written(metadata: Iterable[object], value: object) -> str:
    """Write a value of a type above, whose field has this metadata, as it may stand in the file."""
    readers = {mark.func for mark in metadata if isinstance(mark, BeforeValidator)}
    if isinstance(value, int) and _to_nanoseconds in readers:
        return exact_duration(value)
    if isinstance(value, int) and _to_bytes in readers:
        return exact_bytes(value)
    return str(value)
