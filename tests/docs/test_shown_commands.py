"""Every command that README.md and the folders' READMEs show is run here, or checked as far as it can be.

A command of a program that is not in CHECKS fails: it gets a row there, with the way it is checked and the
reason why it is not simply run.
"""

from __future__ import annotations

import ast
import contextlib
import io
import itertools
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvtier_server.cli import make_parser

from .extract import Shown, commands, documents, program_of
from .sandbox import REPOSITORY, Sandbox

PLACEHOLDER = re.compile(r"\b[A-Z]{3,}\b|\.\.\.")
"""What a person has to replace, and the sandbox did not."""

NOT_RUN = {
    "demo": "computes for a minute; tests/e2e/test_demo.py runs it",
    "completion": "is meant for `source <(...)`; tests/server/cli/test_completion.py completes with it",
}
"""Of kvtier, with the reason; their options are parsed."""

EXIT_CODES = {
    "doctor": {0, 1},  # what is in the way of this machine is not the documentation's mistake
    "pool remove": {1},  # the sandbox's daemon holds it
    "admin clear": {2},  # asks, and nobody is there
    "admin evict": {2},
}
"""Others than 0, by the first words."""


def places() -> dict[str, list[Shown]]:
    """Every command once, with the places where it stands."""
    found: dict[str, list[Shown]] = defaultdict(list)
    for document in documents(REPOSITORY):
        name = document.relative_to(REPOSITORY).as_posix()
        for shown in commands(name, document.read_text()):
            found[shown.text].append(shown)
    return found


PLACES = places()


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    sandbox = Sandbox(tmp_path_factory.mktemp("docs"))
    with sandbox.daemon:
        sandbox.daemon.start()
        yield sandbox


def kvtier(command: str, sandbox: Sandbox) -> None:
    fitted = sandbox.fit(command)
    words = shlex.split(re.split(r"[|>]", fitted)[0], comments=True)
    arguments = [word for word in words[words.index("kvtier") + 1 :] if word != "&"]
    if not arguments or (len(arguments) == 1 and arguments[0].isupper()):
        return  # the program's name, or `kvtier COMMAND`
    if arguments[0] in NOT_RUN or PLACEHOLDER.search(" ".join(arguments)):
        parses(arguments)
    elif arguments[0] == "serve":
        exit_code, said = sandbox.serve(shlex.join(words))
        assert exit_code == 0, said
    elif arguments[0] == "top" and "--once" not in arguments:
        parses(arguments)
        assert sandbox.run(f"{shlex.join(words)} --once --interval 0.1").returncode == 0
    elif len(arguments) == 1 and arguments[0] in {"admin", "bench", "config", "pool"}:
        assert sandbox.run(f"kvtier {arguments[0]} --help").returncode == 0
    elif arguments == ["verify"]:
        parses(["verify", "--path", "/"])
    elif arguments == ["admin", "explain"]:
        assert sandbox.run("kvtier admin explain --help").returncode == 0  # in prose, without its key
    elif arguments[:2] == ["admin", "drain"]:
        sandbox.drain(fitted)
    else:
        if arguments[0] == "bench":
            fitted += {"lookup": " --calls 5", "copy": " --bytes 4MiB", "replay": " --requests 50"}[
                arguments[1]
            ]
        done = sandbox.run(fitted)
        allowed = EXIT_CODES.get(" ".join(arguments[:2])) or EXIT_CODES.get(arguments[0]) or {0}
        assert done.returncode in allowed, f"exit code {done.returncode}\n{done.stdout}{done.stderr}"


def parses(arguments: list[str]) -> None:
    """The options exist. A placeholder stands for a number where one is wanted."""
    said = io.StringIO()
    numbers = [re.sub(r"\b[A-Z]{3,}\b|^N$", "1", argument) for argument in arguments]
    given = [argument for argument in arguments if argument != "..."]
    for attempt in (arguments, numbers, given):
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                make_parser().parse_args(attempt)
        except SystemExit as ended:
            if ended.code == 0:
                return
        else:
            return
    raise AssertionError(said.getvalue())


def make_target(command: str, _: Sandbox) -> None:
    targets = [word for word in shlex.split(command)[1:] if "=" not in word and not word.startswith("-")]
    if targets and shutil.which("make") is None:
        pytest.skip("make is not installed")
    for target in targets:
        done = subprocess.run(
            ["make", "--dry-run", target], cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def pip_install(command: str, _: Sandbox) -> None:
    """The extras exist, and so do the requirement files."""
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    words = shlex.split(command)
    assert words[1] == "install", "only `pip install` is known"
    for word in words[2:]:
        named = re.fullmatch(r"(?:\.|kvtier)(?:\[([\w,]+)\])?", word)
        if named is None:
            assert word.startswith("-") or (REPOSITORY / word).exists(), f"{word} is not kvtier"
        elif named[1]:
            assert set(named[1].split(",")) <= set(extras), f"there are the extras {sorted(extras)}"


def vllm_serve(command: str, _: Sandbox) -> None:
    """What is handed to vLLM is JSON, names a class that exists, and keys that its settings read."""
    words = shlex.split(command)
    for flag, value in itertools.pairwise(words):
        if flag != "--kv-transfer-config":
            continue
        given = json.loads(value)
        extra = given.get("kv_connector_extra_config", {})
        module = given.get("kv_connector_module_path") or extra["spec_module_path"]
        folder = REPOSITORY / "client" / module.replace(".", "/")
        name = extra["spec_name"] if given["kv_connector"] == "OffloadingConnector" else given["kv_connector"]
        assert name in ast.dump(ast.parse((folder / "__init__.py").read_text())), f"{module} has no {name}"
        settings = (folder / "settings.py").read_text()
        for key in extra:
            assert key in {"spec_name", "spec_module_path"} or key in settings, key


def is_bash(command: str, _: Sandbox) -> None:
    done = subprocess.run(
        ["bash", "-n", "-c", command], capture_output=True, text=True, check=False, timeout=10
    )
    assert done.returncode == 0, done.stderr


def has_its_files(command: str, sandbox: Sandbox) -> None:
    """Bash can read it, and paths below a folder of this repository are there."""
    is_bash(command, sandbox)
    for word in shlex.split(command):
        path = word.partition("=")[2] or word
        if path.split("/")[0] in {"docker", "tests", "client", "server", "ops", "proto"} and "/" in path:
            assert (REPOSITORY / path).exists(), f"there is no {path}"


def runs(command: str, sandbox: Sandbox) -> None:
    fitted = sandbox.fit(command)
    programs = {program_of(part) for part in fitted.split("|")}
    missing = [program for program in programs if not shutil.which(program)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    done = sandbox.run(fitted)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}{done.stderr}"


def python(command: str, sandbox: Sandbox) -> None:
    """A module that is named exists; it is not run, because it measures or tests for minutes."""
    words = shlex.split(command)
    if "-m" in words:
        module = words[words.index("-m") + 1]
        if module.startswith(("tests.", "kvtier_")):
            roots = [REPOSITORY / root for root in (".", "server", "client", "ops", "proto")]
            path = module.replace(".", "/")
            assert any((r / f"{path}.py").exists() or (r / path).is_dir() for r in roots), module
    has_its_files(command, sandbox)


CHECKS: dict[str, tuple[Callable[[str, Sandbox], None], str]] = {
    "kvtier": (kvtier, "run, beside a daemon"),
    "curl": (runs, "run, against that daemon"),
    "make": (make_target, "targets take minutes: they exist, and can be expanded"),
    "pip": (pip_install, "installs: the extras exist"),
    "vllm": (vllm_serve, "needs vLLM and a model (tests/vllm/test_serve.py): its JSON is read"),
    "python": (python, "measures or tests for minutes: what it names exists"),
    "python3": (python, "as python"),
    "source": (is_bash, "changes the shell of who types it"),
    "export": (is_bash, "changes the shell of who types it"),
    "cd": (is_bash, "changes the shell of who types it"),
    "git": (is_bash, "reaches other machines"),
    "mkdir": (is_bash, "writes where an administrator does"),
    "cp": (has_its_files, "writes where an administrator does"),
    "sudo": (has_its_files, "needs an administrator"),
    "systemctl": (has_its_files, "needs systemd"),
    "kill": (is_bash, "names a process that is not there"),
    "fuser": (is_bash, "names a pool that is not there; exit code 1 where nobody holds it"),
    "docker": (has_its_files, "needs a container engine"),
    "podman": (has_its_files, "needs a container engine"),
    "kubectl": (has_its_files, "needs a cluster"),
    "kustomize": (has_its_files, "is not installed by the tests"),
    "helm": (has_its_files, "needs a cluster"),
    "promtool": (has_its_files, "is not installed by `make venv`"),
    "mooncake_master": (is_bash, "is installed by `make test-mooncake`"),
    "jq": (is_bash, "reads what another command prints"),
    "uv": (is_bash, "installs"),
    "sh": (runs, "run, in the sandbox's directory"),
    "openssl": (is_bash, "makes what a certificate's owner keeps"),
}
"""How a program's commands are checked, and why so."""


@pytest.mark.parametrize("command", PLACES, ids=[f"{PLACES[text][0]}"[:120] for text in PLACES])
def test_a_shown_command_works(command: str, sandbox: Sandbox) -> None:
    where = "\n".join(map(str, PLACES[command]))
    program = program_of(command)
    assert program in CHECKS, f"{where}\nnobody checks `{program}`: give it a row in CHECKS"
    check, _ = CHECKS[program]
    try:
        check(command, sandbox)
    except (AssertionError, ValueError, subprocess.TimeoutExpired) as error:
        raise AssertionError(f"{where}\n{error}") from error


def test_there_is_something_to_check() -> None:
    assert {program_of(text) for text in PLACES} >= {"kvtier", "make", "pip"}
    assert {shown.file for found in PLACES.values() for shown in found} >= {"README.md"}


def test_every_room_has_a_readme_of_at_most_a_screen() -> None:
    for room in ("proto", "ops", "server", "client", "tests", "docker"):
        lines = (REPOSITORY / room / "README.md").read_text().splitlines()
        assert 3 <= len(lines) <= 60, room
        assert max(len(line) for line in lines if not line.startswith("|")) <= 120, room


@pytest.mark.parametrize("room", ["proto", "ops", "server", "client", "tests"])
def test_what_a_rooms_readme_names_is_there(room: str) -> None:
    text = (REPOSITORY / room / "README.md").read_text()
    for name in re.findall(r"`([\w/]+\.(?:py|proto|cu|yaml|md|toml)|[\w/]+/)`", text):
        candidates: list[Path] = [REPOSITORY / name, REPOSITORY / room / name]
        candidates += [folder / name for folder in (REPOSITORY / room).iterdir() if folder.is_dir()]
        candidates += [folder / name for folder in (REPOSITORY / room).glob("*/*") if folder.is_dir()]
        assert any(candidate.exists() for candidate in candidates), f"{room}/README.md names {name}"
