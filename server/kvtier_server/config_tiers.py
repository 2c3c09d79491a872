"""The `[[tiers]]` tables of the configuration: the tiers below the pool, in the order they are asked.

Owns the keys that every tier has, and says what is wrong in which table. The keys of one type of tier are
that tier's own (`SecondaryTier.Parameters`).

    [[tiers]]
    type = "example"
    capacity = "256MiB"
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from kvtier_server.config_values import LIVE, Bytes, Count, Nanoseconds, Share
from kvtier_server.secondary.base import TierError
from kvtier_server.secondary.factory import BUILTIN_TIERS
from kvtier_server.secondary.parameters import ParameterErrors, TierParameters
from kvtier_server.stats import PRIMARY_TIER

MAX_TIERS = 8
"""Below the pool; each miss asks them all."""

MAX_NAME_CHARS = 32

ONLY_WITH = {"min_uses": "used", "clean_share": "cold"}
"""Keys that say more about one kind of cascade."""

RESERVED_NAMES = {PRIMARY_TIER: "the pool", "pool": "the pool", "all": "every tier"}
"""What commands call something else."""


def _check_tier_name(name: str) -> str:
    if not name or len(name) > MAX_NAME_CHARS or not name.replace("-", "").replace("_", "").isalnum():
        raise ValueError(f"{name!r} is not a name of 1 to {MAX_NAME_CHARS} letters, digits, - and _")
    if name in RESERVED_NAMES:
        raise ValueError(f"{name!r} means {RESERVED_NAMES[name]}")
    return name


class TierConfig(BaseModel):
    """What every tier has. LIVE: a reload applies it; the rest, and the tiers' own keys, need a restart."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: str
    """A built-in type, or with `module_path` the name of a class there."""
    module_path: str = ""
    """The module of a tier that is not built in."""
    name: Annotated[str, AfterValidator(_check_tier_name)]
    """In status, metrics and events. Default: the type."""
    cascade: Literal["published", "used", "cold", "never"] = "published"
    """When chunks go down: at once when they are published, after `min_uses` uses, before they are evicted,
    or never (read only)."""
    min_uses: Annotated[Count, Field(le=255), LIVE] = 1
    """With cascade = "used": so many requests must have used a chunk after it was stored."""
    clean_share: Annotated[Share, Field(le=0.5), LIVE] = 0.125
    """With cascade = "cold": so much of the pool is free or has a copy below, for the stores to come."""
    max_queued: Annotated[Bytes, LIVE] = 1 << 30
    """Chunks that wait to go down, without holding their slots; what comes beyond it is dropped."""
    max_running: Annotated[Bytes, LIVE] = 64 << 20
    """Chunks that are being written down; they cannot be evicted meanwhile."""
    probe_wait: Annotated[Nanoseconds, LIVE] = 20 * 10**6
    """How long a request waits to hear whether a chunk is there that others may have stored."""


class TierSettings(NamedTuple):
    """One table: the keys that every tier has, and the tier's own."""

    common: TierConfig
    parameters: TierParameters


class TierProblem(NamedTuple):
    """One mistake: where, as `tiers[0].capacity`, and what."""

    path: str
    problem: str


def read_tiers(tables: Sequence[object], problems: list[TierProblem]) -> tuple[TierSettings, ...]:
    """Read all tables; what is wrong goes into `problems`, with the path of the key."""
    if len(tables) > MAX_TIERS:
        problems.append(TierProblem("tiers", f"{len(tables)} tiers; at most {MAX_TIERS} are allowed"))
    settings = [read for index, table in enumerate(tables) for read in _read(index, table, problems)]
    seen: set[str] = set()
    for index, (common, _) in enumerate(settings):
        if common.name in seen:
            problems.append(
                TierProblem(f"tiers[{index}].name", f"{common.name!r} is taken; give each tier a name")
            )
        seen.add(common.name)
    return tuple(settings)


def _read(index: int, table: object, problems: list[TierProblem]) -> Iterator[TierSettings]:
    where = f"tiers[{index}]"
    if not isinstance(table, Mapping):
        problems.append(TierProblem(where, "is no table; write [[tiers]] above its keys"))
        return
    known = TierConfig.model_fields.keys()
    common = {key: value for key, value in table.items() if key in known}
    own = {key: value for key, value in table.items() if key not in known}
    if "type" not in common:
        problems.append(TierProblem(f"{where}.type", f"is missing; types are {_types()}"))
        return
    common.setdefault("name", common["type"])
    try:
        config = TierConfig.model_validate(common)
    except ValidationError as invalid:
        for detail in invalid.errors():
            problem = str(detail["msg"]).removeprefix("Value error, ")
            problems.append(TierProblem(f"{where}.{detail['loc'][0]}", problem))
        return
    for key, when in ONLY_WITH.items():
        if key in common and config.cascade != when:
            problems.append(TierProblem(f"{where}.{key}", f'does nothing without cascade = "{when}"'))
    try:
        parameters = BUILTIN_TIERS.parameters(config.type, own, config.module_path)
    except TierError as error:
        key = "module_path" if config.module_path else "type"
        problems.append(TierProblem(f"{where}.{key}", str(error)))
        return
    except ParameterErrors as wrong:
        problems += [TierProblem(f"{where}.{key}", problem) for key, problem in wrong.errors]
        return
    yield TierSettings(config, parameters)


def _types() -> str:
    return ", ".join(BUILTIN_TIERS.types)
