"""Who may make which call: the table of methods and roles, and its check before any handler runs.

A method that is not in the table is refused wherever callers are told apart, so that nobody can forget to
think about a new one. Who the caller is comes from `callers.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeAlias

import grpc
import structlog

from kvtier_server.callers import Caller, Role, RoleMissing, call_comes_from
from kvtier_server.core.refused import Refused
from kvtier_server.rpc import CallScope

ANYBODY = frozenset(Role)
"""Whoever has a role at all."""

_ENGINE = frozenset({Role.ENGINE})
_OBSERVER = frozenset({Role.OBSERVER})
_ADMIN = frozenset({Role.ADMIN})

METHOD_ROLES: Mapping[str, frozenset[Role]] = {
    "/kvtier.v1.OffloadService/Describe": _ENGINE,
    "/kvtier.v1.OffloadService/Attach": _ENGINE,
    "/kvtier.v1.OffloadService/Lookup": _ENGINE,
    "/kvtier.v1.OffloadService/PrepareLoad": _ENGINE,
    "/kvtier.v1.OffloadService/PrepareStore": _ENGINE,
    "/kvtier.v1.OffloadService/Complete": _ENGINE,
    "/kvtier.v1.OffloadService/RenewLeases": _ENGINE,
    "/kvtier.v1.OffloadService/Touch": _ENGINE,
    "/kvtier.v1.OffloadService/FinishRequest": _ENGINE,
    "/kvtier.v1.OffloadService/Reset": _ENGINE,
    "/kvtier.v1.TransferService/RegisterMemory": _ENGINE,
    "/kvtier.v1.TransferService/Transfer": _ENGINE,
    "/kvtier.v1.EventsService/Watch": _OBSERVER,
    "/kvtier.v1.EventsService/Snapshot": _OBSERVER,
    "/kvtier.v1.AdminService/GetStatus": _OBSERVER,
    "/kvtier.v1.AdminService/ListSessions": _OBSERVER,
    "/kvtier.v1.AdminService/ListNamespaces": _OBSERVER,
    "/kvtier.v1.AdminService/ListTenants": _OBSERVER,
    "/kvtier.v1.AdminService/Explain": _OBSERVER,
    "/kvtier.v1.AdminService/Evict": _ADMIN,
    "/kvtier.v1.AdminService/Clear": _ADMIN,
    "/kvtier.v1.AdminService/SetQuota": _ADMIN,
    "/kvtier.v1.AdminService/Drain": _ADMIN,
    "/grpc.health.v1.Health/Check": ANYBODY,
    "/grpc.health.v1.Health/Watch": ANYBODY,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": ANYBODY,
}
"""Full method name -> one of these roles is needed. Reading what operators see is `observer`, changing it
`admin`."""

log = structlog.get_logger("kvtier.access")

Context = Any
"""grpc.aio.ServicerContext of whatever messages a method has."""

MethodHandler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

Identify = Callable[[Context], Caller]
"""Tell who calls. Raises CertificateUnknown."""


class Gatekeeper(grpc.aio.ServerInterceptor):
    """Lets a call through to its handler if its caller has the role for it."""

    def __init__(self, scope: CallScope, identify: Identify) -> None:
        self._scope = scope
        self._identify = identify

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[MethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> MethodHandler | None:
        """Return the handler with the check before it; what nobody serves stays UNIMPLEMENTED."""
        handler = await continuation(handler_call_details)
        return handler if handler is None else self._guarded(str(handler_call_details.method), handler)

    def check(self, method: str, context: Context) -> None:
        """Note the caller of a call. Raises CertificateUnknown, RoleMissing."""
        caller = self._identify(context)
        needed = METHOD_ROLES.get(method, frozenset())
        if not caller.roles & needed:
            raise RoleMissing(_missing(method, needed, caller), method=method)
        call_comes_from(caller)

    async def refuse(self, method: str, context: Context, error: Exception) -> None:
        """End a call. Never returns."""
        short = method.removeprefix("/kvtier.v1.").removeprefix("/")
        refused = self._scope.as_refused(short, error)
        peer = context.peer()
        log.warning("call_refused", method=short, peer=peer, reason=refused.reason, why=str(refused))
        self._scope.observe_refused(short, refused)
        await self._scope.abort(context, refused)

    def _guarded(self, method: str, handler: MethodHandler) -> MethodHandler:
        arity = (
            ("stream" if handler.request_streaming else "unary")
            + "_"
            + ("stream" if handler.response_streaming else "unary")
        )
        behaviour = getattr(handler, arity)
        make = getattr(grpc, f"{arity}_rpc_method_handler")
        made: MethodHandler = make(
            self._guard(method, behaviour),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
        return made

    def _guard(self, method: str, behaviour: Callable[[Any, Context], Any]) -> Callable[[Any, Context], Any]:
        async def answer(request: Any, context: Context) -> Any:
            try:
                self.check(method, context)
            except Refused as refused:
                request = None
                await self.refuse(method, context, refused)
            answered = behaviour(request, context)
            request = None  # a refusal must not hold it: see rpc.py's first lines
            return await answered

        async def answers(request: Any, context: Context) -> AsyncIterator[Any]:
            try:
                self.check(method, context)
            except Refused as refused:
                request = None
                await self.refuse(method, context, refused)
            messages = behaviour(request, context)
            request = None
            async for message in messages:
                yield message

        return answers if inspect.isasyncgenfunction(behaviour) else answer


def _missing(method: str, needed: frozenset[Role], caller: Caller) -> str:
    call = method.rpartition(".")[2]
    if not needed:
        return f"{call} is open to no role yet (METHOD_ROLES); call it over the daemon's unix socket"
    need = " or ".join(sorted(needed))
    if not caller.name:
        return f"{call} needs the role {need}, which this socket does not give; use server.admin_address"
    have = ", ".join(sorted(caller.roles))
    return f"{call} needs the role {need}; the certificate of {caller.name!r} has {have}"
