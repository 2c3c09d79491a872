"""Sessions, namespaces and tenants, as tables of 80 columns or as JSON."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvtier_server.cli.admin.asking import ask, print_json

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from kvtier.v1.admin_pb2 import NamespaceStatus, SessionStatus, TenantStatus

SUMMARIES = {
    "sessions": "list who is attached",
    "namespaces": "list whose chunks can be shared, with chunks and engines",
    "tenants": "list who uses how much of the pool",
}
DESCRIPTIONS = {
    "sessions": """List the open sessions: of each engine its scheduler and its workers.

Pins and credits belong to the engine, and stand at each of its sessions. The namespace's first 12 digits are
what other commands take.""",
    "namespaces": """List the namespaces: all that decides whether chunks of two engines are interchangeable.

Engines that should share chunks and do not are in two namespaces here; -o json shows all facts of both.
"?" stands where only chunks of an earlier daemon are left, and no engine has attached since.""",
    "tenants": """List the tenants, the largest first, with what their chunks take in the pool.""",
}

COLUMNS = 80


def add_arguments(_: argparse.ArgumentParser) -> None:
    """Add the options of these actions: none."""


def run(args: argparse.Namespace) -> int:
    """List."""
    from kvtier.v1 import admin_pb2 as pb

    requests: dict[str, tuple[str, Message, type[Message]]] = {
        "sessions": ("ListSessions", pb.ListSessionsRequest(), pb.ListSessionsResponse),
        "namespaces": ("ListNamespaces", pb.ListNamespacesRequest(), pb.ListNamespacesResponse),
        "tenants": ("ListTenants", pb.ListTenantsRequest(), pb.ListTenantsResponse),
    }
    method, request, reply_type = requests[args.action]
    reply = ask(args, method, request, reply_type, "the daemon counts")
    if args.output == "json":
        print_json(reply)
        return 0
    match reply:
        case pb.ListSessionsResponse():
            _print(
                SESSION_COLUMNS, [_session(s) for s in reply.sessions], "no sessions: no engine is attached"
            )
        case pb.ListNamespacesResponse():
            rows = [_namespace(namespace) for namespace in reply.namespaces]
            _print(NAMESPACE_COLUMNS, rows, "no namespaces: no engine has attached, and the pool is empty")
        case pb.ListTenantsResponse():
            _print(TENANT_COLUMNS, [_tenant(t) for t in reply.tenants], "no tenants: no engine has attached")
    return 0


SESSION_COLUMNS = ("engine", "role", "tenant", "namespace", "for", "pinned", "credits")
NAMESPACE_COLUMNS = ("namespace", "model", "dtype", "tp", "engines", "chunks", "used")
TENANT_COLUMNS = ("tenant", "engines", "chunks", "used")
LEFT = {"engine", "role", "tenant", "namespace", "model", "dtype"}
"""Columns of words; the others are numbers."""

DIGITS = 12
"""Of a digest: what is unique among the few that a daemon has."""


def _session(session: SessionStatus) -> Sequence[str]:
    from kvtier_server.units import format_seconds

    return (
        _shorten(session.engine_id, 16),
        session.role if session.role == "scheduler" else f"{session.role} {session.rank}",
        _tenant_name(session.tenant),
        session.namespace,
        format_seconds(session.age_seconds),
        str(session.pinned_chunks),
        str(session.credits),
    )


def _namespace(namespace: NamespaceStatus) -> Sequence[str]:
    from kvtier_server.units import format_bytes

    facts = namespace.facts if namespace.HasField("facts") else None
    return (
        namespace.digest[:DIGITS],
        _shorten(facts.model, 22) if facts is not None else "?",
        _shorten(facts.kv_dtype, 8) if facts is not None else "?",
        str(facts.tensor_parallel_size) if facts is not None else "?",
        str(namespace.engines),
        str(namespace.chunks),
        format_bytes(namespace.used_bytes),
    )


def _tenant(tenant: TenantStatus) -> Sequence[str]:
    from kvtier_server.units import format_bytes

    name = _tenant_name(tenant.tenant, 40)
    return (name, str(tenant.engines), str(tenant.chunks), format_bytes(tenant.used_bytes))


def _tenant_name(tenant: str, width: int = 10) -> str:
    return _shorten(tenant, width) if tenant else "(default)"


def _shorten(text: str, width: int) -> str:
    from kvtier_server.cli.status_table import shorten

    return shorten(text, width)


def _print(columns: Sequence[str], rows: Sequence[Sequence[str]], nothing: str) -> None:
    if not rows:
        print(nothing)
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column in LEFT else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(
        file=sys.stdout,
        width=None if sys.stdout.isatty() else COLUMNS,
        no_color=bool(os.environ.get("NO_COLOR")),
        highlight=False,
        emoji=False,
        markup=False,
    ).print(table)
