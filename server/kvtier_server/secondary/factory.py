"""From a `[[tiers]]` table to a tier: the types that are registered, and classes from elsewhere.

Owns the names of the built-in tiers, which are imported when they are used, and the messages that explain why
a type was refused. Owns no tier.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches

from kvtier_server.out_of_tree import NotUsable, describe, load_class
from kvtier_server.secondary.base import OffloadingSpec, SecondaryTier, TierError
from kvtier_server.secondary.parameters import TierParameters, read_parameters


class TierFactory:
    """Makes tiers by type. `register` adds a type; the daemon uses `BUILTIN_TIERS`."""

    def __init__(self) -> None:
        self._places: dict[str, tuple[str, str]] = {}

    def register(self, tier_type: str, module_path: str, class_name: str) -> None:
        """Add a type by the place of its class; nothing is imported before it is used."""
        if tier_type in self._places:
            raise ValueError(f"a tier called {tier_type!r} is registered already")
        self._places[tier_type] = (module_path, class_name)

    @property
    def types(self) -> list[str]:
        """Registered types, in alphabetical order."""
        return sorted(self._places)

    def tier_class(self, tier_type: str, module_path: str = "") -> type[SecondaryTier]:
        """Find a class: a registered type, or the class called `tier_type` in `module_path`.

        Raises TierError, which says what exists.
        """
        if module_path:
            return self._load(tier_type, module_path, tier_type)
        if tier_type not in self._places:
            close = get_close_matches(tier_type.lower(), self._places, n=1)
            hint = f", did you mean {close[0]!r}?" if close else ""
            raise TierError(f"no tier is called {tier_type!r}{hint}; {self._choices()}")
        return self._load(tier_type, *self._places[tier_type])

    def parameters(
        self, tier_type: str, table: Mapping[str, object], module_path: str = ""
    ) -> TierParameters:
        """Read what is written for a tier. Raises TierError or ParameterErrors."""
        return read_parameters(self.tier_class(tier_type, module_path).Parameters, table)

    def create(
        self,
        tier_type: str,
        parameters: TierParameters,
        spec: OffloadingSpec,
        pool: memoryview,
        on_finished: Callable[[], None],
        module_path: str = "",
    ) -> SecondaryTier:
        """Make a tier. Raises TierError if it cannot be had."""
        tier_class = self.tier_class(tier_type, module_path)
        try:
            return tier_class(spec, pool, tier_type, on_finished, parameters)
        except TierError:
            raise
        except Exception as error:  # code that is not ours may raise anything
            raise TierError(f"tier {tier_type!r} could not be made: {describe(error)}") from error

    def _load(self, tier_type: str, module_path: str, class_name: str) -> type[SecondaryTier]:
        try:
            return load_class(module_path, class_name, SecondaryTier)  # type: ignore[type-abstract]
        except NotUsable as error:
            raise TierError(f"tier {tier_type!r}: {error}; {self._choices()}") from error

    def _choices(self) -> str:
        return (
            f"types are {', '.join(self.types)}; for a class of your own write its name as type and its "
            "module as module_path"
        )


BUILTIN_TIERS = TierFactory()
BUILTIN_TIERS.register("example", "kvtier_server.secondary.example", "ExampleTier")
BUILTIN_TIERS.register("filesystem", "kvtier_server.secondary.filesystem.tier", "FilesystemTier")
BUILTIN_TIERS.register("object", "kvtier_server.secondary.object_store.tier", "ObjectTier")
BUILTIN_TIERS.register("mooncake", "kvtier_server.secondary.mooncake.tier", "MooncakeTier")
