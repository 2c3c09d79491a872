"""The import rule: arrows only go down, pure rooms stay pure, the engine's side stays light.

Owns the table of rooms below and its check over the source tree; `make lint` runs it. Whether the rule holds
is decided by reading the sources, nothing is imported. It does not see modules that are loaded by a name made
at run time.

    layers      proto   ops     import nothing of ours
                client  server  import proto and ops, never each other
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ENGINE_LIBRARIES = ("google.protobuf", "grpc", "numpy", "xxhash")
DAEMON_LIBRARIES = (
    *ENGINE_LIBRARIES,
    "google.rpc",
    "grpc_health",
    "grpc_reflection",
    "grpc_status",
    "prometheus_client",
    "pydantic",
    "pydantic_core",
    "pydantic_settings",
    "rich",
    "shtab",
    "structlog",
)
GPU_LIBRARIES = ("cuda", "cupy", "torch")

# What a pure room computes depends on its arguments only: time, chance and the outside come in as values.
IMPURE = (
    "asyncio",
    "concurrent",
    "fcntl",
    "io",
    "mmap",
    "multiprocessing",
    "os",
    "pathlib",
    "random",
    "secrets",
    "select",
    "selectors",
    "shutil",
    "signal",
    "socket",
    "sqlite3",
    "subprocess",
    "tempfile",
    "threading",
    "time",
    "uuid",
)
PURE_OPS = ("kvtier_ops.layout", "kvtier_ops.namespace", "kvtier_ops.plan", "kvtier_ops.prefix")


@dataclass(frozen=True, slots=True)
class Room:
    """A folder or a file, and what may be imported in it. Names stand for themselves and all below them."""

    path: str
    ours: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    deferred: tuple[str, ...] = ()  # more libraries, but only inside functions or under TYPE_CHECKING
    closed: tuple[str, ...] = ()  # taken out of `ours` again
    never: tuple[str, ...] = ()  # taken out of the standard library
    why: str = ""


# The room with the longest path that contains a file is the file's.
ROOMS = (
    Room("proto/kvtier", ours=("kvtier",), libraries=("google.protobuf", "grpc"), why="proto is the ground"),
    Room("proto/generate.py", libraries=("grpc_tools",), why="the generator stands alone"),
    Room(
        "ops/kvtier_ops",
        ours=("kvtier_ops",),
        libraries=ENGINE_LIBRARIES,
        deferred=GPU_LIBRARIES,
        why="ops runs in engine and daemon, knows neither, and loads no torch on import",
    ),
    Room(
        "client/kvtier_client",
        ours=("kvtier", "kvtier_ops", "kvtier_client"),
        closed=("kvtier_client.bench", "kvtier_client.demo", "kvtier_client.vllm"),
        libraries=ENGINE_LIBRARIES,
        deferred=GPU_LIBRARIES,
        why="the client brings four libraries, loads no torch on import, and never meets the server",
    ),
    Room(
        "client/kvtier_client/vllm",
        ours=("kvtier", "kvtier_ops", "kvtier_client"),
        closed=("kvtier_client.bench", "kvtier_client.demo"),
        libraries=(*ENGINE_LIBRARIES, "torch", "vllm"),
        why="the only room that knows vLLM",
    ),
    Room(
        "client/kvtier_client/bench",
        ours=("kvtier", "kvtier_ops", "kvtier_client"),
        closed=("kvtier_client.demo", "kvtier_client.vllm"),
        libraries=ENGINE_LIBRARIES,
        why="what is measured is any engine's client, without torch",
    ),
    Room(
        "client/kvtier_client/demo",
        ours=("kvtier", "kvtier_ops", "kvtier_client"),
        closed=("kvtier_client.bench", "kvtier_client.vllm"),
        libraries=(*ENGINE_LIBRARIES, "torch"),
        why="the reference engine is an engine: it sees what any engine sees",
    ),
    Room(
        "server/kvtier_server",
        ours=("kvtier", "kvtier_ops", "kvtier_server"),
        libraries=DAEMON_LIBRARIES,
        deferred=("cuda", "cupy", "opentelemetry"),
        why="the server has the libraries of its extra and never meets the client",
    ),
    Room(
        "server/kvtier_server/core",
        ours=(
            "kvtier_server.admission",
            "kvtier_server.core",
            "kvtier_server.policies.base",
            "kvtier_server.primary",
            "kvtier_server.secondary.base",
            *PURE_OPS,
        ),
        never=IMPURE,
        why="the core is a pure state machine; daemon.py hands it tiers, policies and the clock",
    ),
    Room(
        "server/kvtier_server/primary",
        ours=("kvtier_server.primary", "kvtier_server.policies.base", *PURE_OPS),
        never=IMPURE,
        why="the index is pure; daemon.py hands it its policy and slot table",
    ),
    Room(
        "server/kvtier_server/policies",
        ours=("kvtier_server.policies", "kvtier_server.out_of_tree", *PURE_OPS),
        never=IMPURE,
        why="a policy is pure and knows only policies",
    ),
    Room(
        "server/kvtier_server/admission.py",
        ours=("kvtier_server.policies.base", *PURE_OPS),
        never=IMPURE,
        why="admission is pure",
    ),
    Room(
        "server/kvtier_server/doctor",
        ours=(
            "kvtier",
            "kvtier_ops",
            "kvtier_server.__version__",
            "kvtier_server.address",
            "kvtier_server.config",
            "kvtier_server.config_tiers",
            "kvtier_server.doctor",
            "kvtier_server.secondary",
            "kvtier_server.units",
        ),
        libraries=("numpy",),
        why="doctor looks at a daemon from outside, and works where most of its libraries are missing",
    ),
    Room(
        "server/kvtier_server/secondary",
        ours=(
            "kvtier_ops",
            "kvtier_server.secondary",
            "kvtier_server.config_values",
            "kvtier_server.out_of_tree",
        ),
        libraries=DAEMON_LIBRARIES,
        why="a tier gets what it needs from the factory and knows nothing above it",
    ),
    Room(
        "server/kvtier_server/secondary/object_store",
        ours=("kvtier_ops", "kvtier_server.secondary", "kvtier_server.config_values"),
        libraries=DAEMON_LIBRARIES,
        deferred=("obstore",),
        why="the store's library is loaded when a tier needs it",
    ),
    Room(
        "server/kvtier_server/secondary/mooncake",
        ours=("kvtier_ops", "kvtier_server.secondary", "kvtier_server.config_values"),
        libraries=DAEMON_LIBRARIES,
        deferred=("mooncake",),
        why="the engine is loaded by the helper process alone, and late",
    ),
)
SOURCE_ROOTS = ("proto", "ops", "server", "client")
PACKAGES = ("kvtier", "kvtier_ops", "kvtier_server", "kvtier_client")
# A name that says nothing about its content collects everything, and then everything imports it.
FORBIDDEN_NAMES = ("common", "helpers", "types", "utils")


@dataclass(frozen=True, slots=True)
class Import:
    """One imported name: `from a.b import c` is `a.b.c`, whether c is a module or not."""

    target: str
    line: int
    deferred: bool


@dataclass(frozen=True, slots=True)
class Source:
    """One parsed file of a source root."""

    path: str  # below the repository root, with forward slashes
    module: str
    imports: tuple[Import, ...]


@dataclass(frozen=True, slots=True, order=True)
class Violation:
    """One line of the report."""

    path: str
    line: int
    rule: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.rule}"


def check(root: Path) -> list[Violation]:
    """Return every violation below the repository root, by file and line."""
    violations = list(_forbidden_names(root))
    sources = []
    for source_root in SOURCE_ROOTS:
        for path in sorted((root / source_root).rglob("*.py")):
            source = _read(root, source_root, path)
            sources.append(source)
            violations += _check_room(source)
    violations += _circles(sources)
    return sorted(violations)


def _forbidden_names(root: Path) -> Iterator[Violation]:
    for folder in (*SOURCE_ROOTS, "tests"):
        for path in (root / folder).rglob("*"):
            is_module = path.is_dir() or path.suffix == ".py"
            if is_module and path.stem in FORBIDDEN_NAMES:
                name = path.relative_to(root).as_posix()
                yield Violation(name, 1, f"`{path.name}` names no noun of the field: name what is in it")


def _read(root: Path, source_root: str, path: Path) -> Source:
    parts = path.relative_to(root / source_root).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    module = ".".join(parts[:-1] if is_package else parts)
    package = module if is_package else module.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    imports = tuple(_imports(tree, package, deferred=False))
    return Source(path.relative_to(root).as_posix(), module, imports)


def _imports(node: ast.AST, package: str, *, deferred: bool) -> Iterator[Import]:
    """Yield the imports below a node, each under its absolute name."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name, node.lineno, deferred)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            above = package.split(".")[: len(package.split(".")) - (node.level - 1)]
            base = ".".join([*above, *([node.module] if node.module else [])])
        for alias in node.names:
            yield Import(f"{base}.{alias.name}", node.lineno, deferred)
    elif isinstance(node, ast.If) and _is_type_checking(node.test):
        for guarded in node.body:
            yield from _imports(guarded, package, deferred=True)
        for other in node.orelse:
            yield from _imports(other, package, deferred=deferred)
    else:
        inside = deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from _imports(child, package, deferred=inside)


def _is_type_checking(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", None)
    return name == "TYPE_CHECKING"


def _below(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def _room_of(path: str) -> Room | None:
    rooms = [room for room in ROOMS if path == room.path or path.startswith(room.path + "/")]
    return max(rooms, key=lambda room: len(room.path), default=None)


def _check_room(source: Source) -> Iterator[Violation]:
    room = _room_of(source.path)
    if room is None:
        rule = "no room for this file: give it one in ROOMS of tests/lint/check_imports.py"
        yield Violation(source.path, 1, rule)
        return
    for imported in source.imports:
        if not _permitted(room, imported):
            where = " outside a function" if _below(imported.target, room.deferred) else ""
            rule = f"{room.path} may not import {imported.target}{where}: {room.why}"
            yield Violation(source.path, imported.line, rule)


def _permitted(room: Room, imported: Import) -> bool:
    target = imported.target
    if _below(target, PACKAGES):
        return _below(target, room.ours) and not _below(target, room.closed)
    if target.partition(".")[0] in sys.stdlib_module_names:
        return not _below(target, room.never)
    return _below(target, room.libraries) or (imported.deferred and _below(target, room.deferred))


def _circles(sources: list[Source]) -> Iterator[Violation]:
    """Yield each circle once, at the import that leaves its first module.

    Imports inside functions count: they hide a circle from the interpreter, not from the reader.
    """
    by_module = {source.module: source for source in sources}
    arrows: dict[str, dict[str, int]] = {}
    for source in sources:
        lines = arrows.setdefault(source.module, {})
        for imported in source.imports:
            # `from a.b import c` reaches the module a.b.c if there is one, else a.b.
            parent = imported.target.rpartition(".")[0]
            reached = imported.target if imported.target in by_module else parent
            if reached in by_module:
                lines.setdefault(reached, imported.line)
    seen: set[frozenset[str]] = set()
    for module in sorted(arrows):
        circle = _shortest_circle(module, arrows)
        if circle and frozenset(circle) not in seen:
            seen.add(frozenset(circle))
            after = circle[1] if len(circle) > 1 else module
            drawing = " -> ".join([*circle, module])
            yield Violation(by_module[module].path, arrows[module][after], f"a circle of imports: {drawing}")


def _shortest_circle(start: str, arrows: dict[str, dict[str, int]]) -> list[str] | None:
    """Return the modules of a shortest way from `start` back to it, breadth first; None if there is none."""
    came_from: dict[str, str] = {}
    frontier = [start]
    while frontier:
        following = []
        for module in frontier:
            for reached in sorted(arrows[module]):
                if reached == start:
                    way = [module]
                    while way[-1] != start:
                        way.append(came_from[way[-1]])
                    return way[::-1]
                if reached not in came_from:
                    came_from[reached] = module
                    following.append(reached)
        frontier = following
    return None


def main(argv: list[str]) -> int:
    """Check the tree named by the argument, or this one; return 1 if anything was found."""
    root = Path(argv[0]) if argv else Path(__file__).resolve().parents[2]
    violations = check(root)
    for violation in violations:
        print(violation)
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
