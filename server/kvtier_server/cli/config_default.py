"""`kvtier config default`: a file with every setting at its default, each with its unit and its reason.

Owns the layout of that file and the examples of what has no default. Reads back to exactly the defaults; the
tiers stand there as comments, and each is right as it is once the `# ` before its lines is taken away.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping

from pydantic import BaseModel

from kvtier_server.cli.settings import Setting, settings_of
from kvtier_server.config import ENV_PREFIX, ENV_SEPARATOR, OPTIONS, Config
from kvtier_server.config_tiers import TierConfig
from kvtier_server.secondary.factory import BUILTIN_TIERS

COLUMNS = 100
TIER_EXAMPLES: Mapping[str, Mapping[str, str]] = {
    "filesystem": {"root": "/var/lib/kvtier/chunks", "capacity": "200GiB"},
    "object": {"url": "s3://kv-chunks/production", "capacity": "2TiB"},
    "mooncake": {"master": "10.0.0.1:50051", "segment": "64GiB"},
    "example": {},
}
"""Values of the keys that have no default, by type of tier."""

HEAD = """\
Settings of `kvtier serve --config FILE`, all of them, at their defaults.

The environment (KVTIER_POOL__BYTES=64GiB) and the options of `kvtier serve` are stronger than a file.
Sizes are written as "4GiB" or "10GB", durations as "250ms", "10s" or "5min".

To check a file:        kvtier config check --config FILE
To see what holds:      kvtier config show --config FILE"""

TIERS = """\
Tiers below the pool, asked in the order of their tables; none by default. To use one, take the first
"# " away from its lines, and the second from a key that is to have another value than its default."""


def default_file() -> Iterator[str]:
    """Write the file line by line."""
    yield from _comment(HEAD)
    for name, field in Config.model_fields.items():
        model = field.annotation
        if isinstance(model, type) and issubclass(model, BaseModel):
            yield ""
            yield from _section(name, model)
    yield ""
    yield from _comment(TIERS)
    for index, tier_type in enumerate(TIER_EXAMPLES):
        yield ""
        yield from (f"# {line}".rstrip() for line in tier_example(tier_type, with_common=index == 0))


def _section(name: str, model: type[BaseModel]) -> Iterator[str]:
    yield from _comment(" ".join((model.__doc__ or "").split()))
    yield f"[{name}]"
    for setting in settings_of(model):
        path = f"{name}.{setting.key}"
        yield ""
        yield from _explained(setting, path)
        if setting.is_required:
            assert path == "server.address", path
            yield '# address = "unix:///run/kvtier/kvtier.sock"'
        else:
            yield f"{setting.key} = {setting.write(setting.default)}"


def _explained(setting: Setting, path: str) -> Iterator[str]:
    yield from _comment(setting.reason)
    notes = [setting.values]
    if setting.in_environment:
        variable = ENV_PREFIX + path.replace(".", ENV_SEPARATOR).upper()
        notes.append(f"{OPTIONS[path]}, {variable}" if path in OPTIONS else variable)
    yield from _comment(f"({'; '.join(notes)})")


def tier_example(tier_type: str, *, with_common: bool = True) -> Iterator[str]:
    """Write one table, right as it is; keys that stay at their default are comments in it."""
    yield "[[tiers]]"
    yield f'type = "{tier_type}"'
    example = TIER_EXAMPLES[tier_type]
    for setting in settings_of(BUILTIN_TIERS.tier_class(tier_type).Parameters):
        yield from _comment(f"{setting.reason} ({setting.values})")
        if setting.is_required:
            yield f'{setting.key} = "{example[setting.key]}"'
        else:
            yield f"# {setting.key} = {setting.write(setting.default)}"
    if not with_common:
        return
    yield from _comment("Keys that every tier has:")
    for setting in settings_of(TierConfig):
        if setting.key in {"type", "module_path"}:
            continue
        yield from _comment(f"{setting.reason} ({setting.values})")
        default = f'"{tier_type}"' if setting.key == "name" else setting.write(setting.default)
        yield f"# {setting.key} = {default}"


def _comment(text: str) -> Iterator[str]:
    for paragraph in text.split("\n"):
        lines = textwrap.wrap(paragraph, COLUMNS, break_long_words=False, break_on_hyphens=False)
        yield from (f"# {line}".rstrip() for line in lines or [""])
