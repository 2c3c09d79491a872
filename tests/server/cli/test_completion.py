"""Completion as the shells do it: bash, zsh and fish complete real lines."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvtier_server.cli import COMMANDS, demo

from ...daemon_process import child_environment
from ...terminal import Terminal
from .conftest import Kvtier

BASH = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}; COMPREPLY=()
"$(complete -p kvtier | sed 's/.*-F \\([^ ]*\\).*/\\1/')"
printf '%s\\n' "${COMPREPLY[@]}"
"""

CASES = [
    ("sta", "status", "serve"),
    ("bench l", "lookup", "replay"),
    ("config sh", "show", "check"),
    ("status --o", "--output", "--address"),
    ("status -o js", "json", "table"),
    ("bench replay --tr", "--trace", "--keys"),
    ("demo --qu", "--quick", "--seed"),
]
"""What was typed, what is to be offered, and what is not."""


def needs(shell: str) -> str:
    found = shutil.which(shell)
    if found is None:
        pytest.skip(f"{shell} is not installed")
    return found


@pytest.fixture
def script(kvtier: Kvtier, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    printed = kvtier("completion", request.param)
    assert (printed.returncode, printed.stderr) == (0, "")
    file = tmp_path / f"kvtier.{request.param}"
    file.write_text(printed.stdout)
    return file


def by_bash(script: Path, typed: str) -> list[str]:
    words = ["kvtier", *typed.split()]
    done = subprocess.run(
        [needs("bash"), "--norc", "-c", BASH, "bash", str(script), *words],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        cwd=script.parent,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("script", ["bash"], indirect=True)
@pytest.mark.parametrize(("typed", "offered", "not_offered"), CASES)
def test_bash_completes(script: Path, typed: str, offered: str, not_offered: str) -> None:
    found = by_bash(script, typed)
    assert offered in found
    assert not_offered not in found


@pytest.mark.parametrize("script", ["bash"], indirect=True)
def test_bash_completes_the_files_that_are_there(script: Path) -> None:
    (script.parent / "production.toml").touch()
    assert by_bash(script, "serve --config prod") == ["production.toml"]


@pytest.mark.parametrize("script", ["fish"], indirect=True)
@pytest.mark.parametrize(("typed", "offered", "not_offered"), CASES)
def test_fish_completes(script: Path, tmp_path: Path, typed: str, offered: str, not_offered: str) -> None:
    done = subprocess.run(
        [needs("fish"), "--no-config", "-c", f"source {script}; complete -C 'kvtier {typed}'"],
        env={**os.environ, "HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    found = [line.split("\t")[0] for line in done.stdout.splitlines()]
    assert offered in found
    assert not_offered not in found


@pytest.mark.parametrize("script", ["zsh"], indirect=True)
@pytest.mark.parametrize(("typed", "completed"), [("stat", "status"), ("bench loo", "bench lookup")])
def test_zsh_completes_at_a_terminal(script: Path, tmp_path: Path, typed: str, completed: str) -> None:
    env = {**child_environment(), "ZDOTDIR": str(tmp_path), "HOME": str(tmp_path), "PS1": "ready> "}
    script.rename(tmp_path / "_kvtier")
    with Terminal([needs("zsh"), "-f", "-i"], env) as zsh:
        zsh.wait_for(lambda text: "ready>" in text, "a prompt")
        zsh.press(f"fpath=({tmp_path} $fpath); autoload -Uz compinit; compinit -u -D; clear; echo set-up\r")
        zsh.wait_for(lambda text: text.startswith("set-up"), "the completion is set up")
        zsh.press(f"kvtier {typed}\t")
        zsh.wait_for(lambda text: f"kvtier {completed}" in text, completed)


def test_a_shell_that_is_not_known_is_a_mistake_that_names_those_that_are(kvtier: Kvtier) -> None:
    refused = kvtier("completion", "tcsh")
    assert refused.returncode == 2
    assert all(shell in refused.stderr for shell in ("bash", "zsh", "fish"))


def test_completion_knows_the_options_that_the_demo_has(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    shown = subprocess.run(
        [sys.executable, "-m", "kvtier_client.demo", "--help"],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    listed = {line.split()[0].rstrip(",") for line in shown.splitlines() if line.startswith("  --")}
    assert listed == set(demo.OPTIONS)


def test_every_help_has_an_example(kvtier: Kvtier) -> None:
    for command in COMMANDS:
        if command == "demo":
            continue  # its process shows its own
        shown = kvtier(command, "--help").stdout
        assert re.search(rf"^(?!usage).*\bkvtier {command}\b", shown, re.MULTILINE), command
        assert max(map(len, shown.splitlines())) <= 110
