"""What an operator may name: namespaces, tenants and tiers, as the pool and the attached engines have them.

Owns the completion of a digest's beginning, and refusals that say what there is. Changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kvtier_server.core.below import Below
from kvtier_server.core.books import Books
from kvtier_server.core.events import POOL
from kvtier_server.core.lower_tiers import LowerTier
from kvtier_server.core.namespaces import Namespace
from kvtier_server.core.refused import BadRequest

DIGEST_DIGITS = 32
"""Of a whole namespace digest."""

MAX_NAMED = 8
"""Names that a refusal lists; of the others it says how many they are."""

MAX_QUOTED_CHARS = 64


class Names:
    """Looks names up. `namespaces` are those of attached engines, and of engines whose chunks are there."""

    def __init__(self, books: Books, below: Below, namespaces: Mapping[str, Namespace]) -> None:
        self._books = books
        self._below = below
        self._namespaces = namespaces

    def namespaces(self) -> list[str]:
        """Return all digests, those of engines in the order of their first Attach, then what is left over."""
        left = {space.name.namespace for space in self._books.primary.spaces}.difference(self._namespaces)
        return [*self._namespaces, *sorted(left)]

    def which_namespaces(self) -> str:
        """Say for a refusal which namespaces there are."""
        known = self.namespaces()
        return f"there are {named(known)}" if known else "there is none: no engine has attached yet"

    def tenants(self) -> list[str]:
        """Return all tenants that have chunks or an engine; "" is the default one."""
        used = {space.name.tenant for space in self._books.primary.spaces}
        return sorted(used.union(instance.tenant for instance in self._books.instances))

    def digest(self, beginning: str, *, may_be_unknown: bool = False) -> str:
        """Complete the beginning of a digest; "" stays "". Raises BadRequest.

        With `may_be_unknown` a whole one passes that the pool does not know: tiers keep more.
        """
        known = self.namespaces()
        is_whole = may_be_unknown and len(beginning) == DIGEST_DIGITS
        if not beginning or is_whole or beginning in known:
            return beginning
        found = sorted(digest for digest in known if digest.startswith(beginning))
        if not found:
            raise BadRequest(
                "namespace",
                f"no namespace of the pool begins with {quoted(beginning)}; {self.which_namespaces()}. One "
                f"that only a tier below holds is named by all {DIGEST_DIGITS} digits",
            )
        if len(found) > 1:
            problem = f"{quoted(beginning)} begins {named(found)}; write more digits"
            raise BadRequest("namespace", problem)
        return found[0]

    def check_tenant(self, tenant: str) -> None:
        """Raise BadRequest if nobody has this tenant."""
        known = self.tenants()
        if tenant not in known:
            which = f"there are {named(map(repr, known))}" if known else "there is none yet"
            problem = f'no engine and no chunk has tenant {quoted(tenant)}; {which} ("" = default)'
            raise BadRequest("tenant", problem)

    def tier(self, name: str) -> LowerTier | None:
        """Return the tier below the pool of this name, None for the pool. Raises BadRequest."""
        if name == POOL:
            return None
        below = next((below for below in self._below.tiers if below.rules.name == name), None)
        if below is None:
            names = ", ".join([POOL, *(below.rules.name for below in self._below.tiers)])
            raise BadRequest("tier", f"there is no tier {quoted(name)}; tiers are {names}")
        return below


def quoted(name: str) -> str:
    """Repeat what was given, not more of it than a trailer has room for."""
    return repr(name if len(name) <= MAX_QUOTED_CHARS else name[:MAX_QUOTED_CHARS] + "...")


def named(names: Iterable[str]) -> str:
    """List a few names, and how many there are beyond them."""
    all_names = list(names)
    more = len(all_names) - MAX_NAMED
    return ", ".join(all_names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
