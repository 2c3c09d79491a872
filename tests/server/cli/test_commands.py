"""What holds for all commands, and the small ones."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from kvtier_server import __version__
from kvtier_server.cli import COMMANDS, main, serve
from kvtier_server.config import OPTIONS

from ...daemon_process import DaemonProcess
from .conftest import Kvtier, environment


def test_help_names_every_command(kvtier: Kvtier) -> None:
    shown = kvtier("--help")
    assert shown.returncode == 0
    assert all(f"\n    {name} " in shown.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "demo"])
def test_every_command_explains_itself(kvtier: Kvtier, command: str) -> None:
    shown = kvtier(command, "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert f"usage: kvtier {command}" in shown.stdout


def test_the_version_is_data(kvtier: Kvtier) -> None:
    assert kvtier("version").stdout == kvtier("--version").stdout == f"kvtier {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["frobnicate"], ["status", "--bogus"], ["status", "-o", "yaml"]])
def test_a_mistake_in_the_call_is_exit_2_with_the_usage_on_stderr(
    kvtier: Kvtier, arguments: list[str]
) -> None:
    refused = kvtier(*arguments)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "usage: kvtier" in refused.stderr


SLOW = {
    "asyncio",
    "google.protobuf",
    "grpc",
    "kvtier_ops",
    "kvtier_server.config",
    "numpy",
    "prometheus_client",
    "pydantic",
    "rich",
    "shtab",
    "structlog",
    "torch",
}
"""Modules that cost more than a hundredth of a second each."""


def slow_modules(tmp_path: Path, *arguments: str) -> set[str]:
    """Which of them a command has imported at its end."""
    code = (
        "import sys\nfrom kvtier_server.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return SLOW & set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["health"], ["version"], *([name, "--help"] for name in COMMANDS if name != "demo")],
    ids=" ".join,
)
def test_quick_commands_import_none_of_the_slow_libraries(tmp_path: Path, arguments: list[str]) -> None:
    assert slow_modules(tmp_path, *arguments) == set()


def test_health_of_a_daemon_that_answers_imports_grpc_and_nothing_else(
    tmp_path: Path, daemon: DaemonProcess
) -> None:
    # asyncio comes with grpc. protobuf's own code is not needed: the message is read by hand.
    assert slow_modules(tmp_path, "health", "--address", daemon.address) == {"grpc", "asyncio"}


def test_serve_takes_exactly_the_options_that_the_configuration_knows() -> None:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    taken = {action.dest: action.option_strings[0] for action in parser._actions if "." in action.dest}
    assert taken == dict(OPTIONS)


def test_serve_reports_every_mistake_and_starts_nothing(kvtier: Kvtier, tmp_path: Path) -> None:
    file = tmp_path / "kvtier.toml"
    file.write_text('[pool]\nbyts = "4GiB"\n')
    refused = kvtier(
        "serve",
        "--config",
        str(file),
        "--address",
        "10.1.2.3:80",
        "--pool-bytes",
        "4G",
        KVTIER_LIMITS__ENGINES="0",
    )
    assert (refused.returncode, refused.stdout) == (2, "")
    lines = refused.stderr.splitlines()
    assert len(lines) == 4
    assert f"kvtier serve: pool.byts ({file}): unknown; did you mean pool.bytes?" in lines
    assert any(
        line.startswith("kvtier serve: server.address (--address): ") and "mTLS" in line for line in lines
    )
    assert any(line.startswith("kvtier serve: pool.bytes (--pool-bytes): ") for line in lines)
    assert any(line.startswith("kvtier serve: limits.engines (environment ") for line in lines)


def test_the_demo_gets_all_that_stands_behind_its_name(tmp_path: Path) -> None:
    """With a demo of its own on the path: the real one computes for seconds."""
    package = tmp_path / "kvtier_client" / "demo"
    package.mkdir(parents=True)
    (tmp_path / "kvtier_client" / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text("import sys\nprint(sys.argv[1:])\nsys.exit(7)\n")
    env = environment(tmp_path)
    env["PYTHONPATH"] = f"{tmp_path}:{env['PYTHONPATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "kvtier_server", "demo", "--seed", "3", "--help", "x"],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (7, "['--seed', '3', '--help', 'x']\n", "")


def test_the_demo_explains_itself_where_torch_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["demo", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "usage: kvtier demo" in shown
    assert "--sliding-window TOKENS" in shown
    assert main(["demo"]) == 1
    assert "run in kvtier's directory: pip install '.[demo]'" in capsys.readouterr().err


def test_a_key_with_half_a_byte_is_told_so(kvtier: Kvtier) -> None:
    refused = kvtier("admin", "explain", "--namespace", "ab", "--key", "abc")
    assert refused.returncode == 2
    assert "'abc' has an odd number of digits" in refused.stderr
    assert "is not a key in hex" in kvtier("admin", "explain", "--namespace", "ab", "--key", "xyz").stderr


def test_a_command_that_is_nearly_one_is_answered_with_it(kvtier: Kvtier) -> None:
    refused = kvtier("statsu")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "'statsu' is no command; did you mean 'status'?" in refused.stderr


@pytest.mark.parametrize("arguments", [["config", "default"], ["version"]])
def test_output_that_cannot_be_written_is_one_line_and_exit_1(tmp_path: Path, arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "kvtier_server", *arguments],
            env=environment(tmp_path),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    said = "kvtier: the output cannot be written: No space left on device\n"
    assert (ended.returncode, ended.stderr) == (1, said)


def test_a_stdout_that_was_closed_is_no_error(tmp_path: Path) -> None:
    ended = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-m", "kvtier_server", "version"],
        env=environment(tmp_path),
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_reader_that_stops_early_is_no_error(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "kvtier_server", "version"],
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == 0
