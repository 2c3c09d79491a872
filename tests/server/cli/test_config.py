"""`kvtier config`: what is wrong, what holds, and a file with everything."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel

from kvtier_server.cli.config_default import TIER_EXAMPLES, default_file, tier_example
from kvtier_server.cli.settings import settings_of, shown
from kvtier_server.config import KNOWN, Config, load_config
from kvtier_server.config_tiers import TierConfig
from kvtier_server.secondary.factory import BUILTIN_TIERS

from .conftest import Kvtier


def write(folder: Path, text: str) -> Path:
    file = folder / "kvtier.toml"
    file.write_text(text)
    return file


def models() -> list[type[BaseModel]]:
    sections = [field.annotation for field in Config.model_fields.values()]
    tiers = [BUILTIN_TIERS.tier_class(tier_type).Parameters for tier_type in BUILTIN_TIERS.types]
    found = [model for model in sections if isinstance(model, type) and issubclass(model, BaseModel)]
    return [*found, TierConfig, *tiers]


def test_the_default_file_reads_back_to_exactly_the_defaults(kvtier: Kvtier, tmp_path: Path) -> None:
    printed = kvtier("config", "default")
    assert (printed.returncode, printed.stderr) == (0, "")
    assert load_config({}, write(tmp_path, printed.stdout), {}) == load_config({}, None, {})


def test_the_default_file_names_every_setting_once(tmp_path: Path) -> None:
    document = tomllib.loads("\n".join(default_file()).replace('# address = "unix', 'address = "unix'))
    assert {section: set(body) for section, body in document.items()} == {
        section: set(keys) for section, keys in KNOWN.items()
    }


@pytest.mark.parametrize("model", models(), ids=lambda model: model.__name__)
def test_every_setting_has_a_reason_and_says_what_may_be_written(model: type[BaseModel]) -> None:
    for setting in settings_of(model):
        assert len(setting.reason) > 10, f"{model.__name__}.{setting.key} has no docstring below it"
        assert setting.values
        assert setting.values != "a value", setting.key


def test_there_is_an_example_of_every_tier() -> None:
    assert sorted(TIER_EXAMPLES) == BUILTIN_TIERS.types


@pytest.mark.parametrize("tier_type", TIER_EXAMPLES)
def test_an_example_tier_is_right_once_its_comment_is_taken_away(tier_type: str, tmp_path: Path) -> None:
    text = "\n".join(default_file())
    start = text.index(f'# [[tiers]]\n# type = "{tier_type}"')
    block = text[start:].split("\n\n")[0]
    uncommented = "\n".join(line.removeprefix("#").removeprefix(" ") for line in block.split("\n"))
    ((common, parameters),) = load_config({}, write(tmp_path, uncommented), {}).tiers
    assert common.type == tier_type
    assert isinstance(parameters, BUILTIN_TIERS.tier_class(tier_type).Parameters)
    for setting in settings_of(type(parameters)):
        assert re.search(rf"^(# )?{setting.key} = ", uncommented, re.MULTILINE), setting.key


@pytest.mark.parametrize("tier_type", TIER_EXAMPLES)
def test_every_default_of_an_example_tier_that_means_something_may_be_written_out(
    tier_type: str, tmp_path: Path
) -> None:
    lines = list(tier_example(tier_type))
    for line in lines:
        written = re.fullmatch(r"# ([a-z_]+) = (.+)", line)
        # "" is "not given", which some keys refuse to be told; two keys need another cascade.
        if written is None or written[2] == '""' or written[1] in {"min_uses", "clean_share"}:
            continue
        text = "\n".join(line.removeprefix("# ") if each == line else each for each in lines)
        read = load_config({}, write(tmp_path, text), {}).tiers
        assert read == load_config({}, write(tmp_path, "\n".join(lines)), {}).tiers, written[1]


def test_check_says_every_mistake_at_once_tiers_included(kvtier: Kvtier, tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
[pool]
byts = "4GiB"
[[tiers]]
type = "filesystem"
root = "relative"
capacity = "4G"
deadlin = "1s"
[[tiers]]
type = "filesytem"
[[tiers]]
root = "/x"
""",
    )
    for command in (["config", "check"], ["config", "show"], ["serve"]):
        refused = kvtier(*command, "--config", str(file), "--pool-bytes", "4G", KVTIER_LIMITS__ENGINES="0")
        assert (refused.returncode, refused.stdout) == (2, "")
        said = refused.stderr.splitlines()
        for path, words in (
            ("pool.byts", "did you mean pool.bytes?"),
            ("pool.bytes", "(--pool-bytes)"),
            ("limits.engines", "(environment KVTIER_LIMITS__ENGINES)"),
            ("tiers[0].root", "absolute"),
            ("tiers[0].capacity", 'did you mean "4GiB"?'),
            ("tiers[0].deadlin", "did you mean deadline?"),
            ("tiers[1].type", "did you mean 'filesystem'?"),
            ("tiers[2].type", "is missing"),
        ):
            assert any(f": {path} (" in line and words in line for line in said), (path, refused.stderr)
        assert len(said) == 8


def test_check_says_that_a_configuration_is_right_and_what_it_means(kvtier: Kvtier, tmp_path: Path) -> None:
    file = write(tmp_path, '[pool]\nbytes = "8MiB"\n[[tiers]]\ntype = "example"\nname = "near"\n')
    checked = kvtier("config", "check", "--config", str(file))
    assert checked.returncode == 0
    assert checked.stdout == f"{file}: right; pool of 8MiB, tiers below it: near\n"


def test_check_tells_what_the_environment_overrides(kvtier: Kvtier, tmp_path: Path) -> None:
    file = write(tmp_path, '[pool]\nbytes = "8MiB"\n[server]\nname = "a"\n')
    checked = kvtier("config", "check", "--config", str(file), KVTIER_POOL__BYTES="16MiB")
    source = "environment KVTIER_POOL__BYTES"
    assert checked.returncode == 0
    assert checked.stderr.splitlines() == [
        f"kvtier config: pool.bytes of {file} does not count: {source} says otherwise",
        f"kvtier config: for the rest of this machine: kvtier doctor --config {file}",
    ]


def test_check_reads_the_certificates(kvtier: Kvtier, tmp_path: Path) -> None:
    missing = tmp_path / "none.pem"
    tls = "".join(f'{name} = "{missing}"\n' for name in ("certificate_file", "key_file", "client_ca_file"))
    text = f'[server]\ntcp_address = "127.0.0.1:0"\n[tls]\n{tls}admins = ["ops"]\n[pool]\nbytes = "8MiB"\n'
    checked = kvtier("config", "check", "--config", str(write(tmp_path, text)))
    assert checked.returncode == 2
    said = f"tls: certificate_file {missing} cannot be read: No such file or directory"
    assert checked.stderr == f"kvtier config: {said}\n"


def test_check_knows_that_a_pool_does_not_fit_this_machine(kvtier: Kvtier) -> None:
    refused = kvtier("config", "check", "--pool-bytes", "100TiB")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "pool.bytes: a pool of 102400.00 GiB" in refused.stderr
    assert "does not fit" in refused.stderr


def test_show_names_the_source_of_every_value(kvtier: Kvtier, tmp_path: Path) -> None:
    file = write(tmp_path, '[pool]\npolicy = "arc"\nbytes = "1GiB"\n[[tiers]]\ntype = "example"\n')
    done = kvtier(
        "config", "show", "--config", str(file), "--name", "mine", "-o", "json", KVTIER_POOL__BYTES="2GiB"
    )
    rows = {row["path"]: (row["value"], row["source"]) for row in json.loads(done.stdout)["settings"]}
    assert rows["server.name"] == ("mine", "--name")
    assert rows["pool.bytes"] == ("2GiB", "environment KVTIER_POOL__BYTES")
    assert rows["pool.policy"] == ("arc", str(file))
    assert rows["leases.copy"] == ("5min", "default")
    assert rows["tiers[0].type"] == ("example", str(file))
    assert rows["tiers[0].capacity"] == ("256MiB", "default")
    assert set(rows) >= {f"{section}.{key}" for section, keys in KNOWN.items() for key in keys}


def test_what_show_prints_is_a_configuration_with_the_same_effect(kvtier: Kvtier, tmp_path: Path) -> None:
    file = write(
        tmp_path,
        '[pool]\nbytes = "1500MiB"\n[leases]\nlookup = "2500ms"\n'
        '[[tiers]]\ntype = "filesystem"\nroot = "/var/x"\ncapacity = "1GB"\ncascade = "used"\nmin_uses = 2\n',
    )
    done = kvtier("config", "show", "--config", str(file))
    assert done.returncode == 0
    shown_file = tmp_path / "shown.toml"
    shown_file.write_text(done.stdout)
    again = load_config({}, shown_file, {})
    config = load_config({}, file, {})
    assert again.model_dump(exclude={"tiers", "server"}) == config.model_dump(exclude={"tiers", "server"})
    assert again.tiers == config.tiers


def test_a_secret_is_never_shown() -> None:
    assert shown("password", "hunter2") == "(hidden)"
    assert shown("secret_key_file", "/etc/kvtier/secret") == "/etc/kvtier/secret"
    assert shown("endpoint", "https://me:hunter2@store/x") == "https://(hidden)@store/x"
    assert shown("metadata", "https://store/x@y") == "https://store/x@y"
