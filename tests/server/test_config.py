from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvtier_server.address import MAX_SOCKET_PATH_BYTES, default_address
from kvtier_server.config import KNOWN, MAX_FILE_BYTES, OPTIONS, ConfigErrors, load_config
from kvtier_server.secondary.parameters import MAX_SUGGESTIONS


def write(folder: Path, text: str) -> Path:
    file = folder / "kvtier.toml"
    file.write_text(text)
    return file


def mistakes(flags: dict[str, str] | None = None, file: Path | None = None, **env: str) -> dict[str, str]:
    """Load what must fail; return problem by "path (source)"."""
    with pytest.raises(ConfigErrors) as caught:
        load_config(flags or {}, file, env)
    found = {f"{error.path} ({error.source})": error.problem for error in caught.value.errors}
    assert len(found) == len(caught.value.errors), "a mistake is reported twice"
    return found


def test_without_any_source_the_defaults_hold() -> None:
    config = load_config({}, None, {})
    assert config.pool.bytes == 4 << 30
    assert config.limits.max_keys == 8192
    assert config.leases.copy_ == 300 * 10**9
    assert config.server.metrics_address == "127.0.0.1:9471"
    assert config.pool_directory.name.endswith("-default")


def test_a_flag_beats_the_environment_which_beats_the_file(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
        [pool]
        bytes = "1GiB"
        policy = "arc"
        backing_piece = "32MiB"
        [leases]
        copy = "10s"
        """,
    )
    env = {"KVTIER_POOL__BYTES": "2GiB", "KVTIER_POOL__POLICY": "lru"}
    config = load_config({"pool.bytes": "3GiB"}, file, env)
    assert config.pool.bytes == 3 << 30
    assert config.pool.policy == "lru"
    assert config.pool.backing_piece == 32 << 20
    assert config.leases.copy_ == 10 * 10**9


def test_the_address_of_the_commands_is_the_daemons_too_unless_its_own_is_given() -> None:
    short, long = "unix:///tmp/a.sock", "unix:///tmp/b.sock"
    assert load_config({}, None, {"KVTIER_ADDRESS": short}).server.address == short
    both = {"KVTIER_ADDRESS": short, "KVTIER_SERVER__ADDRESS": long}
    assert load_config({}, None, both).server.address == long


def test_all_mistakes_of_all_sources_are_reported_at_once(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
        engines = 3
        [pool]
        byts = "4GiB"
        fresh = "perhaps"
        [servr]
        name = "x"
        [limits]
        engines = true
        max_keys = 0
        pin_share = 2
        [leases]
        lookup = 30
        """,
    )
    found = mistakes(
        {"pool.bytes": "4G"},
        file,
        KVTIER_SERVER__NAME="../x",
        KVTIER_SERVER__LOG_LEVEL="loud",
        KVTIER_POOL_BYTES="1GiB",
    )
    assert found == {
        f"engines ({file})": "stands in no section; did you mean limits.engines?",
        f"pool.byts ({file})": "unknown; did you mean pool.bytes?",
        f"pool.fresh ({file})": "must be a valid boolean, unable to interpret input; got 'perhaps'",
        f"servr.name ({file})": "there is no section [servr]; did you mean [server]?",
        f"limits.engines ({file})": "true is not a number",
        f"limits.max_keys ({file})": "must be greater than or equal to 1; got 0",
        f"limits.pin_share ({file})": "must be less than or equal to 1; got 2",
        f"leases.lookup ({file})": '30 has no unit; write a duration as "250ms" or "10s"',
        "pool.bytes (--pool-bytes)": "'4G' has the unknown unit 'G'; did you mean \"4GiB\"?",
        "server.name (environment KVTIER_SERVER__NAME)": (
            "pool name '../x' is not allowed: use 1 to 64 of A-Z a-z 0-9 _ . - and no dot in front"
        ),
        "server.log_level (environment KVTIER_SERVER__LOG_LEVEL)": (
            "must be 'debug', 'info', 'warning' or 'error'; got 'loud'"
        ),
        " (environment KVTIER_POOL_BYTES)": "is not read; did you mean KVTIER_POOL__BYTES?",
    }


def test_a_key_in_the_wrong_section_is_shown_the_right_one(tmp_path: Path) -> None:
    file = write(tmp_path, "[server]\npolicy = 'lru'\n[zebra]\n")
    found = mistakes(file=file)
    assert found[f"server.policy ({file})"] == "unknown; did you mean pool.policy?"
    assert found[f"zebra ({file})"].startswith("there is no section [zebra]; there are [server], [pool]")


@pytest.mark.parametrize(
    ("text", "path", "hint", "plain"),
    [
        ("[pool]\n{0}", "pool.byts{0}", "unknown; did you mean pool.bytes?", "unknown; [pool] has bytes, "),
        ("{0}", "byts{0}", "did you mean pool.bytes?", "stands in no section; there are [server], [pool]"),
    ],
)
def test_of_very_many_mistakes_all_are_told_and_the_first_get_a_suggestion(
    tmp_path: Path, text: str, path: str, hint: str, plain: str
) -> None:
    number = 3 * MAX_SUGGESTIONS
    keys = "\n".join(f"byts{index} = 1" for index in range(number))
    file = write(tmp_path, text.format(keys))
    found = mistakes(file=file)
    problems = [found[f"{path.format(index)} ({file})"] for index in range(number)]
    assert all(hint in problem for problem in problems[:MAX_SUGGESTIONS])
    assert all(problem.startswith(plain) for problem in problems[MAX_SUGGESTIONS:])


def test_an_unknown_variable_with_a_double_underscore_is_a_mistake_and_others_are_left_alone() -> None:
    load_config(
        {}, None, {"KVTIER_PORT": "tcp://10.0.0.1:80", "KVTIER_SERVICE_HOST": "x", "POOL__BYTES": "x"}
    )
    found = mistakes(KVTIER_POOL__BITES="1GiB")
    assert found == {"pool.bites (environment KVTIER_POOL__BITES)": "unknown; did you mean pool.bytes?"}


def test_a_file_that_cannot_be_read_is_one_mistake_among_the_others(tmp_path: Path) -> None:
    missing = tmp_path / "none.toml"
    assert mistakes({"pool.bytes": "x"}, missing).keys() == {f" ({missing})", "pool.bytes (--pool-bytes)"}
    broken = write(tmp_path, "[pool\n")
    assert "is not TOML" in mistakes(file=broken)[f" ({broken})"]
    write(tmp_path, "a = " + "[" * 10_000)
    assert "nested too deeply" in mistakes(file=broken)[f" ({broken})"]
    broken.write_bytes(b"\xff\xfe")
    assert "is not TOML" in mistakes(file=broken)[f" ({broken})"]


def test_a_file_that_is_none_or_too_large_is_refused_at_once(tmp_path: Path) -> None:
    fifo, large = tmp_path / "fifo", tmp_path / "large"
    os.mkfifo(fifo)
    large.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    assert mistakes(file=fifo) == {f" ({fifo})": "is no regular file"}
    assert mistakes(file=tmp_path) == {f" ({tmp_path})": "is no regular file"}
    assert mistakes(file=large) == {
        f" ({large})": f"has more than {MAX_FILE_BYTES} bytes, the most that is read"
    }
    large.write_bytes(b"#" * MAX_FILE_BYTES)
    assert load_config({}, large, {}).limits.engines == 64


def test_values_that_are_right_alone_and_wrong_together_are_mistakes() -> None:
    found = mistakes(
        KVTIER_LIMITS__SESSIONS="4", KVTIER_LIMITS__MAX_PARAMS="8MiB", KVTIER_LEASES__LOOKUP="1s"
    )
    assert found.keys() == {
        "limits.sessions (environment KVTIER_LIMITS__SESSIONS)",
        "limits.max_params (environment KVTIER_LIMITS__MAX_PARAMS)",
        "leases.pending_wait (default)",
    }


@pytest.mark.parametrize(
    ("policy", "problem"),
    [
        ("arcc", "no policy is called 'arcc', did you mean 'arc'?"),
        ("fifo", "write arc, lru, or package.module:ClassName"),
        ("package.module:", "neither a policy's name"),
    ],
)
def test_a_policy_that_there_is_not_is_refused_with_all_other_mistakes(policy: str, problem: str) -> None:
    found = mistakes({"pool.policy": policy, "pool.bytes": "1"})
    assert problem in found["pool.policy (--policy)"]
    assert "pool.bytes (--pool-bytes)" in found


def test_a_policy_of_somebody_else_is_not_imported_while_the_settings_are_read() -> None:
    assert (
        load_config({"pool.policy": "no_such.module:Policy"}, None, {}).pool.policy == "no_such.module:Policy"
    )


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("unix:///" + "x" * MAX_SOCKET_PATH_BYTES, f"{MAX_SOCKET_PATH_BYTES + 1} bytes"),
        ("unix://" + "/ü" * 40, "120 bytes"),
        ("unix://relative.sock", "absolute"),
        ("unix:relative.sock", "absolute"),
        ("/tmp/x.sock", "did you mean unix:///tmp/x.sock?"),
        ("unix:/tmp/x.sock", "did you mean unix:///tmp/x.sock?"),
        ("http://127.0.0.1:9470", "is a URL"),
        ("unix:///", "absolute"),
        ("0.0.0.0:9470", "needs mTLS: set tls.certificate_file"),
        ("node7:9470", "or a loopback address such as 127.0.0.1:9470"),
        ("[2001:db8::1]:9470", "or use a unix:// socket"),
        ("127.0.0.1", "not host:port"),
        ("127.0.0.1:65536", "not host:port"),
        ("::1:9470", "ambiguous"),
        ("", "not host:port"),
    ],
)
def test_an_address_that_cannot_or_must_not_be_listened_on_is_refused(address: str, problem: str) -> None:
    assert problem in mistakes({"server.address": address})["server.address (--address)"]


@pytest.mark.parametrize(
    "address",
    [
        "unix:///" + "x" * (MAX_SOCKET_PATH_BYTES - 1),
        "127.0.0.1:0",
        "127.9.9.9:1",
        "localhost:9470",
        "[::1]:9470",
    ],
)
def test_a_socket_path_of_107_bytes_and_any_loopback_address_are_taken(address: str) -> None:
    assert load_config({"server.address": address}, None, {}).server.address == address


def test_the_default_socket_is_the_runtime_directorys_if_there_is_one(tmp_path: Path) -> None:
    assert default_address({}, uid=0) == "unix:///run/kvtier/kvtier.sock"
    assert default_address({}, uid=7) == "unix:///tmp/kvtier-7/kvtier.sock"
    assert (
        default_address({"XDG_RUNTIME_DIR": str(tmp_path)}, uid=7) == f"unix://{tmp_path}/kvtier/kvtier.sock"
    )
    gone = {"XDG_RUNTIME_DIR": str(tmp_path / "gone")}
    assert default_address(gone, uid=7) == "unix:///tmp/kvtier-7/kvtier.sock"


def test_every_setting_can_be_given_in_the_environment() -> None:
    """Each is read, under its own name, and complains about a value that cannot be right."""
    for section, keys in KNOWN.items():
        for key in keys:
            variable = f"KVTIER_{section}__{key}".upper()
            # 300 characters that no name, path, number, unit or choice is made of
            assert mistakes({}, None, **{variable: "?" * 300}).keys() == {
                f"{section}.{key} (environment {variable})"
            }


def test_every_option_of_serve_names_a_setting() -> None:
    settings = {f"{section}.{key}" for section, keys in KNOWN.items() for key in keys}
    assert OPTIONS.keys() <= settings


def test_limits_are_given_to_the_metrics_in_base_units() -> None:
    values = load_config({}, None, {"KVTIER_LEASES__PENDING_WAIT": "250ms"}).limit_values()
    assert values["leases.pending_wait"] == 0.25
    assert values["limits.tombstone"] == 60
    assert values["limits.max_message"] == 8 << 20
    assert values["limits.pin_share"] == 0.5
    numbers = {f"{s}.{k}" for s in ("limits", "leases", "admission", "drain") for k in KNOWN[s]}
    assert values.keys() == numbers


def test_a_config_cannot_be_changed() -> None:
    config = load_config({}, None, {})
    with pytest.raises(ValueError, match="frozen"):
        config.pool.bytes = 1
