"""docker/Dockerfile as its stages, with their instructions in order, and what .dockerignore lets into them.

Reads; runs nothing.
"""

from __future__ import annotations

import fnmatch
import io
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import dockerfile_parse
from tests.daemon_process import REPOSITORY

DOCKERFILE = REPOSITORY / "docker" / "Dockerfile"

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction. `flags`: {"from": "wheel"} of `COPY --from=wheel`."""

    name: str
    value: str
    flags: Mapping[str, str]
    line: int

    @property
    def words(self) -> list[str]:
        """The value as an exec form or as words."""
        if self.value.startswith("["):
            return [str(word) for word in json.loads(self.value)]
        return shlex.split(self.value)

    @property
    def pairs(self) -> dict[str, str]:
        """The value of ENV, LABEL or ARG; "" for an ARG without a default."""
        pairs = (word.partition("=") for word in shlex.split(self.value))
        return {name: value for name, _, value in pairs}


@dataclass(slots=True)
class Stage:
    """One FROM and what follows it. `base`: another stage's name, or an image."""

    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)

    def all(self, name: str) -> list[Instruction]:
        """Every instruction called `name`, in order."""
        return [each for each in self.instructions if each.name == name]


@dataclass(frozen=True, slots=True)
class Dockerfile:
    """The stages by name, in order; `args` are those before the first FROM."""

    args: dict[str, str]
    stages: dict[str, Stage]

    def chain(self, target: str) -> list[Stage]:
        """Return the stages that `target` is made of, the base image's first."""
        stage = self.stages[target]
        return [*(self.chain(stage.base) if stage.base in self.stages else []), stage]

    def needed(self, target: str) -> list[Stage]:
        """Return every stage that a build of `target` runs, each after those that it needs."""
        found: dict[str, Stage] = {}
        for stage in self.chain(target):
            for copy in stage.all("COPY"):
                if (source := copy.flags.get("from")) is not None:
                    found |= {other.name: other for other in self.needed(source)}
            found[stage.name] = stage
        return list(found.values())


def read(file: Path = DOCKERFILE) -> Dockerfile:
    """Read a Dockerfile whose every stage has a name."""
    parser = dockerfile_parse.DockerfileParser(fileobj=io.BytesIO(file.read_bytes()))
    args: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    for entry in parser.structure:
        if entry["instruction"] == "COMMENT":
            continue
        instruction = _instruction(entry["instruction"], entry["value"], entry["startline"] + 1)
        if instruction.name == "FROM":
            base, as_, name = instruction.words
            assert as_ == "AS", instruction
            stage = stages[name] = Stage(name, expand(base, args))
        elif stage is not None:
            stage.instructions.append(instruction)
        elif instruction.name == "ARG":
            args |= instruction.pairs
    return Dockerfile(args, stages)


def expand(text: str, scope: Mapping[str, str]) -> str:
    """Replace $NAME and ${NAME}; what has no value is empty, as Docker has it."""
    return _VARIABLE.sub(lambda found: scope.get(found[1] or found[2], ""), text)


def is_ignored(path: str) -> bool:
    """Tell whether .dockerignore keeps a file out of the build: the last pattern that matches decides."""
    prefixes = [path, *(str(parent) for parent in Path(path).parents if str(parent) != ".")]
    ignored = False
    for pattern in _patterns():
        plain = pattern.removeprefix("!")
        if any(_matches(prefix, plain) for prefix in prefixes):
            ignored = not pattern.startswith("!")
    return ignored


def _instruction(name: str, value: str, line: int) -> Instruction:
    flags = {}
    while name in ("COPY", "HEALTHCHECK", "RUN") and (found := re.match(r"--([\w-]+)=(\S+)\s+", value)):
        flags[found[1]] = found[2]
        value = value[found.end() :]
    return Instruction(name, value, flags, line)


def _patterns() -> list[str]:
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _matches(path: str, pattern: str) -> bool:
    if pattern.startswith("**/"):
        return fnmatch.fnmatch(Path(path).name, pattern.removeprefix("**/"))
    return path.count("/") == pattern.count("/") and fnmatch.fnmatch(path, pattern)
