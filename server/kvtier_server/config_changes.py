"""What is different between the configuration a daemon goes by and one that was read again.

Owns the split into what a reload applies and what needs a restart, by the marks in `config.py`. Applies
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pydantic import BaseModel

from kvtier_server.config import Config
from kvtier_server.config_tiers import TierSettings
from kvtier_server.config_values import Reload, written


class Change(NamedTuple):
    """One setting. `when` says how a reload applies it; None = a restart does."""

    path: str
    old: str
    new: str
    when: Reload | None

    def __str__(self) -> str:
        return f"{self.old} -> {self.new}"


class Changes(NamedTuple):
    """All that differs, and the configuration to go by from now on: the old one with what can be applied."""

    config: Config
    applied: list[Change]
    restart: list[str]
    """Paths of what needs a restart. Values are left out: they may say where secrets are."""


def compare(old: Config, new: Config) -> Changes:
    """Split what differs."""
    changes: list[Change] = []
    sections: dict[str, object] = {}
    for name in type(old).model_fields:
        before, after = getattr(old, name), getattr(new, name)
        if isinstance(before, BaseModel):
            changes += _differences(name, before, after)
            sections[name] = _merged(before, after)
    tiers, tier_changes = _compare_tiers(old.tiers, new.tiers)
    changes += tier_changes
    return Changes(
        old.model_copy(update=sections | {"tiers": tiers}),
        [change for change in changes if change.when is not None],
        [change.path for change in changes if change.when is None],
    )


def _differences(where: str, old: BaseModel, new: BaseModel) -> Iterator[Change]:
    for name, field in type(old).model_fields.items():
        before, after = getattr(old, name), getattr(new, name)
        if before != after:
            texts = (written(field.metadata, before), written(field.metadata, after))
            when = next((mark for mark in field.metadata if isinstance(mark, Reload)), None)
            yield Change(f"{where}.{field.alias or name}", *texts, when)


def _merged(old: BaseModel, new: BaseModel) -> BaseModel:
    marked = [
        name
        for name, field in type(old).model_fields.items()
        if any(isinstance(mark, Reload) for mark in field.metadata)
    ]
    return old.model_copy(update={name: getattr(new, name) for name in marked})


def _compare_tiers(
    old: tuple[TierSettings, ...], new: tuple[TierSettings, ...]
) -> tuple[tuple[TierSettings, ...], list[Change]]:
    """Compare tier by tier; where they are not the same ones in the same order, that alone is told."""
    names = [[(common.name, common.type) for common, _ in tiers] for tiers in (old, new)]
    if names[0] != names[1]:
        return old, [Change("tiers", "", "", None)]
    changes: list[Change] = []
    merged = []
    for (common, own), (new_common, new_own) in zip(old, new, strict=True):
        where = f"tiers[{common.name}]"
        changes += _differences(where, common, new_common)
        if type(own) is type(new_own):  # else its module_path differs, which is told already
            changes += [change._replace(when=None) for change in _differences(where, own, new_own)]
        merged.append(TierSettings(common.model_copy(update=_merged(common, new_common).__dict__), own))
    return tuple(merged), changes
