"""`[[tiers]]`: what is read, and what is said of what is wrong, all at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvtier_server.config import ConfigErrors, load_config
from kvtier_server.config_tiers import TierConfig
from kvtier_server.secondary.base import OffloadingSpec
from kvtier_server.secondary.example import ExampleParameters, ExampleTier
from kvtier_server.secondary.filesystem.tier import FilesystemParameters
from kvtier_server.secondary.object_store.parameters import ObjectParameters
from kvtier_server.secondary.parameters import MAX_SUGGESTIONS

HERE = Path(__file__).parent


class OutOfTree(ExampleTier):
    """A tier that is not built in."""

    def __init__(
        self,
        spec: OffloadingSpec,
        pool: memoryview,
        tier_type: str,
        on_finished: Callable[[], None],
        parameters: ExampleParameters,
    ) -> None:
        super().__init__(spec, pool, tier_type, on_finished, parameters)


def read(tmp_path: Path, text: str) -> tuple[tuple[TierConfig, object], ...]:
    file = tmp_path / "kvtier.toml"
    file.write_text(text)
    return load_config({}, file, {}).tiers


def problems(tmp_path: Path, text: str) -> dict[str, str]:
    with pytest.raises(ConfigErrors) as raised:
        read(tmp_path, text)
    assert all(str(tmp_path) in error.source for error in raised.value.errors)
    return {error.path: error.problem for error in raised.value.errors}


def test_tiers_are_read_in_their_order_with_units_and_defaults(tmp_path: Path) -> None:
    text = """
[[tiers]]
type = "example"
name = "near"

[[tiers]]
type = "filesystem"
root = "/somewhere"
capacity = "2GiB"
deadline = "250ms"
max_queued = "1MiB"
"""
    (near, _), (disk, parameters) = read(tmp_path, text)
    assert (near.name, disk.name) == ("near", "filesystem")
    assert disk.max_queued == 1 << 20
    assert isinstance(parameters, FilesystemParameters)
    assert (parameters.capacity, parameters.deadline) == (2 << 30, 250_000_000)


def test_the_readme_s_tier_on_s3_is_read_as_it_is_written(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (example,) = [
        block.partition("```")[0]
        for block in readme.split("```toml\n")[1:]
        if 'type = "object"' in block.partition("```")[0]
    ]
    ((common, parameters),) = read(tmp_path, example)
    assert (common.name, common.probe_wait) == ("object", 100_000_000)
    assert isinstance(parameters, ObjectParameters)
    assert parameters.place == ("s3", "kv-chunks", "production")
    assert parameters.capacity == 2 << 40
    assert parameters.secret_key_file == "/etc/kvtier/s3-secret-key"


def test_without_tables_there_are_no_tiers(tmp_path: Path) -> None:
    assert read(tmp_path, "") == ()


def test_a_class_from_elsewhere_is_named_by_its_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    text = '[[tiers]]\ntype = "OutOfTree"\nmodule_path = "test_config_tiers"\ncapacity = "1MiB"\n'
    ((common, _),) = read(tmp_path, text)
    assert common.name == "OutOfTree"


@pytest.mark.parametrize(
    ("table", "path", "problem"),
    [
        ("", "tiers[0].type", "is missing; types are example, filesystem, mooncake, object"),
        ('type = "filesytem"', "tiers[0].type", "did you mean 'filesystem'?"),
        ('type = "Nope"\nmodule_path = "json"', "tiers[0].module_path", "'json' has no 'Nope'"),
        ('type = "JSONDecoder"\nmodule_path = "json"', "tiers[0].module_path", "is not a SecondaryTier"),
        (
            'type = "X"\nmodule_path = "no_such_module"',
            "tiers[0].module_path",
            "importing 'no_such_module' failed",
        ),
        ('type = "example"\ncapacty = "1MiB"', "tiers[0].capacty", "unknown; did you mean capacity?"),
        ('type = "example"\ncapacity = "lots"', "tiers[0].capacity", "'lots' is not a size"),
        ('type = "example"\nname = "primary"', "tiers[0].name", "means the pool"),
        ('type = "example"\nname = "all"', "tiers[0].name", "means every tier"),
        ('type = "example"\nname = "a/b"', "tiers[0].name", "is not a name"),
        (
            'type = "example"\ncascade = "sometimes"',
            "tiers[0].cascade",
            "'published', 'used', 'cold' or 'never'",
        ),
        ('type = "filesystem"\ncapacity = "1GiB"', "tiers[0].root", "is missing"),
        ('type = "filesystem"\ncapacity = "1GiB"\nroot = "here"', "tiers[0].root", "is not an absolute path"),
        ('type = "object"\ncapacity = "1GiB"', "tiers[0].url", "is missing"),
        ('type = "object"\nurl = "bucket"', "tiers[0].url", "write s3://bucket/prefix"),
        ('type = "object"\nurl = "s3:///prefix"', "tiers[0].url", "names no bucket"),
        ('type = "object"\nurl = "s3://key:secret@bucket"', "tiers[0].url", "has a secret in it"),
        ('type = "object"\nurl = "s3://bucket?a=b"', "tiers[0].url", "has a ? or #"),
        ('type = "object"\nurl = "file://host/x"', "tiers[0].url", "names a host"),
        ('type = "object"\nurl = "file:///"', "tiers[0].url", "names no directory"),
        (
            'type = "object"\nurl = "s3://b"\nendpoint = "http://h:1"',
            "tiers[0].endpoint",
            "write https, or allow_http = true",
        ),
        ('type = "object"\nurl = "s3://b"\nendpoint = "h:1"', "tiers[0].endpoint", "is no address"),
        (
            'type = "object"\nurl = "s3://b"\nendpoint = "https://me:secret@h:1"',
            "tiers[0].endpoint",
            "has a secret in it",
        ),
        ('type = "object"\nurl = "gs://b"\nregion = "x"', "tiers[0].region", "is for s3:// only"),
        (
            'type = "object"\nurl = "s3://b"\naccess_key_file = "/a"',
            "tiers[0].access_key_file",
            "write both or none",
        ),
        (
            'type = "object"\nurl = "s3://b"\nsecret_key_file = "/s"',
            "tiers[0].access_key_file",
            "write both or none",
        ),
        (
            'type = "object"\nurl = "s3://b"\nsession_token_file = "/t"',
            "tiers[0].access_key_file",
            "are missing beside session_token_file",
        ),
        (
            'type = "object"\nurl = "s3://b"\naccess_key_file = "here"',
            "tiers[0].access_key_file",
            "is not an absolute path",
        ),
        ('type = "object"\nurl = "s3://b"\naccess_key = "AK"', "tiers[0].access_key", "did you mean"),
    ],
)
def test_what_is_wrong_is_named_by_its_path(tmp_path: Path, table: str, path: str, problem: str) -> None:
    found = problems(tmp_path, f"[[tiers]]\n{table}\n")
    assert problem in found[path], found


def test_all_mistakes_of_all_tables_come_at_once(tmp_path: Path) -> None:
    text = """
[pool]
bites = "4GiB"
[[tiers]]
type = "filesystem"
capacity = "much"
[[tiers]]
type = "nothing"
"""
    assert set(problems(tmp_path, text)) == {
        "pool.bites",
        "tiers[0].root",
        "tiers[0].capacity",
        "tiers[1].type",
    }


def test_of_very_many_unknown_keys_the_first_get_a_suggestion(tmp_path: Path) -> None:
    keys = "\n".join(f"capacty{index} = 1" for index in range(2 * MAX_SUGGESTIONS))
    found = problems(tmp_path, f'[[tiers]]\ntype = "example"\n{keys}')
    hints = [found[f"tiers[0].capacty{index}"] for index in range(2 * MAX_SUGGESTIONS)]
    assert set(hints[:MAX_SUGGESTIONS]) == {"unknown; did you mean capacity?"}
    assert all(hint.startswith("unknown; this tier has ") for hint in hints[MAX_SUGGESTIONS:])


def test_two_tiers_need_two_names(tmp_path: Path) -> None:
    text = '[[tiers]]\ntype = "example"\n' * 2
    assert "give each tier a name" in problems(tmp_path, text)["tiers[1].name"]


def test_more_tiers_than_allowed_are_refused(tmp_path: Path) -> None:
    text = "".join(f'[[tiers]]\ntype = "example"\nname = "t{number}"\n' for number in range(9))
    assert problems(tmp_path, text) == {"tiers": "9 tiers; at most 8 are allowed"}


def test_a_section_where_tables_belong_is_explained(tmp_path: Path) -> None:
    assert "write [[tiers]]" in problems(tmp_path, '[tiers]\ntype = "example"\n')["tiers"]
