"""Every number a daemon goes by: its name, its unit, its default and the reason for it.

Owns reading them (command line > environment > file > default) and saying all that is wrong at once. Inside,
sizes are bytes and durations nanoseconds; outside both are written with units ("64GiB", "250ms").

A setting that a reload (SIGHUP) applies has LIVE or AT_ATTACH in its type; every other one needs a restart:
the daemon has built something on it, or attached engines were told it and would run into a smaller one.
"""

from __future__ import annotations

import contextlib
import difflib
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from kvtier_ops.directory import default_pool_directory
from kvtier_ops.ipc import MAX_TENSORS
from kvtier_server.address import AddressError, default_address, is_remote, socket_path
from kvtier_server.config_otel import OtelConfig
from kvtier_server.config_tiers import TierProblem, TierSettings, read_tiers
from kvtier_server.config_tls import FILES, NEEDS_TLS, TlsConfig
from kvtier_server.config_values import (
    AT_ATTACH,
    LIVE,
    AdminAddress,
    Bytes,
    Count,
    CountOrNone,
    Directory,
    ListenAddress,
    MetricsAddress,
    Name,
    Nanoseconds,
    NanosecondsOrNone,
    PolicyName,
    Share,
    TcpAddress,
)
from kvtier_server.regular_file import FileUnusable, read_regular_file
from kvtier_server.secondary.parameters import MAX_SUGGESTIONS

ENV_PREFIX = "KVTIER_"
ENV_SEPARATOR = "__"
DEFAULT_METRICS_ADDRESS = "127.0.0.1:9471"

MAX_FILE_BYTES = 1 << 20
"""Of the file: all settings, and as many tiers and certificates as are allowed, need a fraction of it."""

OPTIONS: Mapping[str, str] = {
    "server.address": "--address",
    "server.name": "--name",
    "server.metrics_address": "--metrics-address",
    "server.log_level": "--log-level",
    "pool.bytes": "--pool-bytes",
    "pool.policy": "--policy",
    "pool.fresh": "--fresh",
}
"""The settings that `kvtier serve` also takes as an option."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ServerConfig(_Section):
    """Where the daemon listens and how it speaks."""

    address: ListenAddress
    """unix:///path, or host:port. Default: one socket per user (kvtier_server.address)."""
    tcp_address: TcpAddress = ""
    """host:port to listen on too, for tools and other machines; "" = none. Beyond loopback with [tls]."""
    admin_address: AdminAddress = ""
    """unix:///path, in a directory of its own: calls that change something come here, and `address` refuses
    them. "" = `address` takes all."""
    metrics_address: MetricsAddress = DEFAULT_METRICS_ADDRESS
    """host:port of /metrics and the health pages; port 0 = any free one, "" = none."""
    name: Name = "default"
    """Names the pool: one daemon per name and user."""
    log_level: Annotated[Literal["debug", "info", "warning", "error"], LIVE] = "info"
    """The least important lines that are logged."""
    log_format: Literal["auto", "json", "console"] = "auto"
    """auto = console on a terminal, JSON lines otherwise."""


class PoolConfig(_Section):
    """The host memory the daemon owns."""

    bytes: Annotated[Bytes, Field(ge=1 << 20, le=1 << 47)] = 4 << 30
    """Bytes of slots. Small enough for a laptop; nodes set their own."""
    policy: PolicyName = "lru"
    """Which chunk is evicted first: a name, or "package.module:Class"."""
    directory: Directory = ""
    """Where the pool's files lie, an absolute path; "" = /dev/shm/kvtier-<uid>-<name>."""
    fresh: bool = False
    """Drop what an earlier daemon left instead of starting warm."""
    backing_piece: Annotated[Bytes, Field(ge=4096)] = 64 << 20
    """Memory is taken in pieces of this size: 15 ms each, so that stopping never waits long for one."""


class LimitsConfig(_Section):
    """What one engine, one call and one daemon may use. Each limit is also a metric, kvtier_limit."""

    max_keys: Annotated[Count, Field(le=1 << 20)] = 8192
    """Keys in one call: a prompt of 131,072 tokens in chunks of 16."""
    max_message: Annotated[Bytes, Field(ge=64 << 10, le=(1 << 31) - 1)] = 8 << 20
    """Bytes of one gRPC message: 8,192 keys of 128 bytes and 6,144 more each; gRPC's own default is 4 MiB."""
    max_params: Bytes = 64 << 10
    """Bytes of one request's parameters."""
    engines: Annotated[Count, LIVE] = 64
    """Engine instances attached at once: more than run on one node."""
    sessions: Annotated[Count, LIVE] = 1024
    """Open sessions: 64 engines with a scheduler and 15 ranks each."""
    watchers: Count = 64
    """Streams of EventsService at once: watchers, and snapshots that are being sent."""
    unary_calls: Annotated[Count, LIVE] = 256
    """Calls at once. An own counter: gRPC's maximum_concurrent_rpcs counts open streams too."""
    requests_per_instance: Annotated[Count, AT_ATTACH] = 65_536
    """Unfinished requests of one engine instance."""
    leases_per_instance: Annotated[Count, LIVE] = 65_536
    """Leases that one engine instance holds: one for each of its unfinished requests."""
    remembered_keys: Annotated[Count, AT_ATTACH] = 1 << 20
    """Keys of an instance's unfinished requests, so that recency changes once per request."""
    remembered_completions: Count = 65_536
    """Ended leases kept, so that a repeated report is answered ALREADY."""
    tombstone: Annotated[Nanoseconds, LIVE] = 60 * 10**9
    """How long the release of an unknown lease is remembered: longer than a call that could grant it."""
    pin_share: Annotated[Share, LIVE] = 0.5
    """Part of the pool that one instance may pin; beyond it a lookup answers HIT_UNLEASED."""
    credit_share: Annotated[Share, LIVE] = 1 / 16
    """Part of the pool that one instance may hold as credits."""
    min_credit_slots: Annotated[Count, LIVE] = 64
    """Credits that one instance may hold even where its share of a small pool is less."""
    events: Count = 65_536
    """Events kept for watchers that come back."""
    event_keys: Count = 1 << 20
    """Keys in all kept events together, some 100 MB: as many as come and go in a snapshot of a million."""
    transfer_memories: Count = 8
    """Registrations of device memory of one session; an engine has one, or one more while it replaces it."""
    transfer_tensors: Annotated[Count, Field(le=MAX_TENSORS)] = MAX_TENSORS
    """Tensors of one registration: each is compared with every other of its group."""
    transfer_devices: Count = 32
    """Devices with a copy process at one time; nodes have 8 or 16."""
    transfer_jobs: Count = 512
    """Copies under way for one Transfer stream; its client copies itself what would be more."""
    transfer_answers: Count = 512
    """Unread answers of one Transfer stream; nothing more is taken from it meanwhile."""
    session_events: Annotated[Count, LIVE] = 65_536
    """Unread events of one session; a session that reads slower is ended (SLOW_READER). A writer's death
    resolves all keys of a call (max_keys) at once, and sending takes 65 us an event: room for eight calls."""


class LeasesConfig(_Section):
    """How long leases live. Guards against leaks; correctness rests on generations, never on these."""

    lookup: Annotated[Nanoseconds, AT_ATTACH] = 30 * 10**9
    """Renewed every third of it by the client, which was told it at Attach."""
    copy_: Annotated[Nanoseconds, Field(alias="copy"), LIVE] = 300 * 10**9
    """Load and store leases: far above any copy."""
    pending_wait: Annotated[Nanoseconds, LIVE] = 2 * 10**9
    """Longest wait for a PENDING key that a client may ask for."""
    promotion: Annotated[Nanoseconds, LIVE] = 10 * 10**9
    """Longest way from a tier into the pool; then the key is free again, and what comes later is dropped."""


class AdmissionConfig(_Section):
    """Which chunks are worth storing."""

    store_threshold: Annotated[CountOrNone, Field(le=255), LIVE] = 0
    """A chunk is stored when it is offered for this many times; 0 and 1 = always."""
    max_tracked: Count = 64_000
    """Chunks whose offers are counted, the oldest forgotten first."""


class DrainConfig(_Section):
    """What SIGTERM waits for, each at most this long. Kubernetes kills 30 s after SIGTERM."""

    copies: Annotated[NanosecondsOrNone, LIVE] = 10 * 10**9
    """Copies of engines that run, so that they end as they began."""
    tiers: Annotated[NanosecondsOrNone, LIVE] = 15 * 10**9
    """Chunks on their way down to the tiers below the pool; what is left then is not kept there."""


class Config(_Section):
    """All settings of one daemon."""

    server: ServerConfig
    pool: PoolConfig = PoolConfig()
    limits: LimitsConfig = LimitsConfig()
    leases: LeasesConfig = LeasesConfig()
    admission: AdmissionConfig = AdmissionConfig()
    drain: DrainConfig = DrainConfig()
    tls: TlsConfig = TlsConfig()
    otel: OtelConfig = OtelConfig()
    tiers: tuple[TierSettings, ...] = ()
    """Below the pool, in the order they are asked; [[tiers]] in the file (kvtier_server.config_tiers)."""

    @property
    def pool_directory(self) -> Path:
        """Where the pool lives; by default it follows from the name."""
        return Path(self.pool.directory) if self.pool.directory else default_pool_directory(self.server.name)

    def limit_values(self) -> dict[str, float]:
        """Return every limit and time under its dotted path, in base units, for kvtier_limit{name}."""
        values: dict[str, float] = {}
        for section in ("limits", "leases", "admission", "drain"):
            for key, value in getattr(self, section).model_dump(by_alias=True).items():
                path = f"{section}.{key}"
                values[path] = value / 1e9 if path in _DURATIONS else value
        return values


def _known() -> dict[str, dict[str, str]]:
    """Every setting: section -> key as written in the file -> attribute."""
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    return {
        section: {field.alias or name: name for name, field in model.model_fields.items()}
        for section, model in sections.items()
        if isinstance(model, type) and issubclass(model, BaseModel)
    }


KNOWN = _known()
_DURATIONS = {
    "limits.tombstone",
    "otel.timeout",
    *(f"{section}.{key}" for section in ("leases", "drain") for key in KNOWN[section]),
}


@dataclass(frozen=True, slots=True)
class ConfigError:
    """One mistake. `path` is dotted, empty where a source as a whole cannot be read."""

    path: str
    source: str
    problem: str

    def __str__(self) -> str:
        where = f"{self.path} ({self.source})" if self.path else self.source
        return f"{where}: {self.problem}"


class ConfigErrors(Exception):
    """Every mistake in one configuration; nothing was started."""

    def __init__(self, errors: Iterable[ConfigError]) -> None:
        self.errors = list(errors)
        super().__init__("\n".join(map(str, self.errors)))


class _Given(NamedTuple):
    raw: object
    source: str


_Values = dict[tuple[str, str], _Given]


def load_config(flags: Mapping[str, str], file: Path | None, env: Mapping[str, str]) -> Config:
    """Read a configuration. `flags` are by dotted path: {"pool.bytes": "4GiB"}.

    A value that a stronger source overrides is not looked at. Raises ConfigErrors with all mistakes.
    """
    return read_config(flags, file, env)[0]


def read_config(
    flags: Mapping[str, str], file: Path | None, env: Mapping[str, str]
) -> tuple[Config, dict[str, str]]:
    """Read a configuration as `load_config` does; also where each value was given, by dotted path.

    A setting that is not among them has its default.
    """
    errors: list[ConfigError] = []
    values: _Values = {("server", "address"): _Given(default_address(env), "default")}
    tiers: tuple[TierSettings, ...] = ()
    if file is not None:
        in_file, tables = _read_file(file, errors)
        values |= in_file
        problems: list[TierProblem] = []
        tiers = read_tiers(tables, problems)
        errors += [ConfigError(problem.path, str(file), problem.problem) for problem in problems]
    values |= _read_env(env, errors)
    for path, raw in flags.items():
        section, _, key = path.partition(".")
        values[section, key] = _Given(raw, OPTIONS.get(path, "command line"))
    known: dict[str, dict[str, object]] = {}
    for (section, key), given in values.items():
        if key in KNOWN.get(section, {}):
            known.setdefault(section, {})[key] = given.raw
        else:
            errors.append(ConfigError(f"{section}.{key}", given.source, _unknown(section, key, errors)))
    errors += _unprotected(values)
    config = _build(known, values, errors)
    if config is not None:
        errors += _check_together(config, values)
    if errors or config is None:
        raise ConfigErrors(errors)
    sources = {f"{section}.{key}": value.source for (section, key), value in values.items()}
    return config.model_copy(update={"tiers": tiers}), sources


def _read_file(file: Path, errors: list[ConfigError]) -> tuple[_Values, Sequence[object]]:
    """Return the settings of the sections, and the tables of the tiers."""
    try:
        document = tomllib.loads(read_regular_file(file, MAX_FILE_BYTES).decode())
    except FileUnusable as error:
        errors.append(ConfigError("", str(file), str(error)))
        return {}, ()
    except ValueError as error:  # not TOML, or not UTF-8
        errors.append(ConfigError("", str(file), f"is not TOML: {error}"))
        return {}, ()
    except RecursionError:
        errors.append(ConfigError("", str(file), "is not TOML that can be read: it is nested too deeply"))
        return {}, ()
    tables = document.pop("tiers", [])
    if not isinstance(tables, list):
        errors.append(ConfigError("tiers", str(file), "is no list; write [[tiers]], one for each tier"))
        tables = []
    values: _Values = {}
    for section, body in document.items():
        if not isinstance(body, dict):
            hint = _suggest_path(section, errors) or f"there are {_sections()}"
            errors.append(ConfigError(section, str(file), f"stands in no section; {hint}"))
        elif section not in KNOWN and not body:
            errors.append(ConfigError(section, str(file), _unknown(section, "", errors)))
        else:
            values |= {(section, key): _Given(raw, str(file)) for key, raw in body.items()}
    return values, tables


def _read_env(env: Mapping[str, str], errors: list[ConfigError]) -> _Values:
    """Take KVTIER_<SECTION>__<KEY>. KVTIER_ADDRESS, which all commands know, is weaker than its long form."""
    values: _Values = {}
    if env.get("KVTIER_ADDRESS"):
        values["server", "address"] = _Given(env["KVTIER_ADDRESS"], "environment KVTIER_ADDRESS")
    for variable, raw in sorted(env.items()):
        if not variable.startswith(ENV_PREFIX):
            continue
        section, separator, key = variable.removeprefix(ENV_PREFIX).lower().partition(ENV_SEPARATOR)
        if separator:
            values[section, key] = _Given(raw, f"environment {variable}")
        elif variable in _SINGLE_UNDERSCORE:
            problem = f"is not read; did you mean {_SINGLE_UNDERSCORE[variable]}?"
            errors.append(ConfigError("", f"environment {variable}", problem))
    return values


def _env_variable(section: str, key: str) -> str:
    return f"{ENV_PREFIX}{section}{ENV_SEPARATOR}{key}".upper()


# The likely slip. Other variables without a double underscore are left alone: engines have their own, and a
# Kubernetes service called "kvtier" puts KVTIER_PORT and its like into every pod.
_SINGLE_UNDERSCORE = {
    variable.replace(ENV_SEPARATOR, "_"): variable
    for section, keys in KNOWN.items()
    for variable in (_env_variable(section, key) for key in keys)
}


def _build(
    known: Mapping[str, Mapping[str, object]], values: _Values, errors: list[ConfigError]
) -> Config | None:
    try:
        return Config.model_validate(known)
    except ValidationError as invalid:
        for detail in invalid.errors():
            section, key = str(detail["loc"][0]), str(detail["loc"][1])
            source = values[section, key].source
            errors.append(ConfigError(f"{section}.{key}", source, _problem(section, key, detail)))
        return None


def _problem(section: str, key: str, detail: ErrorDetails) -> str:
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    message = detail["msg"].replace("Input should be", "must be", 1)
    unit = " ns" if f"{section}.{key}" in _DURATIONS else ""
    return f"{message}{unit}; got {detail['input']!r}"


def _check_together(config: Config, values: _Values) -> list[ConfigError]:
    """Find values that are right alone and wrong together."""
    limits = config.limits

    def wrong(section: str, key: str, problem: str) -> ConfigError:
        given = values.get((section, key))
        return ConfigError(f"{section}.{key}", given.source if given else "default", problem)

    errors = []
    if limits.max_params >= limits.max_message:
        errors.append(
            wrong("limits", "max_params", "must be smaller than limits.max_message, which carries it")
        )
    if limits.sessions < limits.engines:
        errors.append(
            wrong("limits", "sessions", f"is {limits.sessions}, fewer than limits.engines = {limits.engines}")
        )
    if config.leases.pending_wait >= config.leases.lookup:
        errors.append(
            wrong("leases", "pending_wait", "must be shorter than leases.lookup, which pins meanwhile")
        )
    for path, problem in _check_addresses(config):
        section, _, key = path.partition(".")
        errors.append(wrong(section, key, problem))
    return errors


def _unprotected(values: _Values) -> Iterator[ConfigError]:
    """Find addresses that other machines reach where no certificates are named; some are `problems`'.

    Asked of what was written, so that it is told among all other mistakes.
    """
    if any(("tls", name) in values and values["tls", name].raw for name in FILES):
        return
    for key in ("address", "tcp_address"):
        given = values.get(("server", key))
        if given is not None and isinstance(given.raw, str):
            with contextlib.suppress(AddressError):
                if given.raw and is_remote(given.raw):
                    yield ConfigError(f"server.{key}", given.source, NEEDS_TLS)


def _check_addresses(config: Config) -> Iterator[tuple[str, str]]:
    """Find addresses and certificates that do not go together: (dotted path, problem)."""
    server = config.server
    is_tcp = socket_path(server.address) is None
    yield from config.tls.problems(listens_on_tcp=is_tcp or bool(server.tcp_address))
    if is_tcp and server.tcp_address:
        yield (
            "server.tcp_address",
            "server.address is TCP too; make that a unix:// socket, or leave one out",
        )
    admin, engines = socket_path(server.admin_address), socket_path(server.address)
    if admin is not None and engines is not None and admin.parent == engines.parent:
        problem = (
            f"is in {engines.parent}, as server.address: whoever is given that directory has both sockets"
        )
        yield "server.admin_address", f"{problem}; put it into another one"


def _unknown(section: str, key: str, errors: Sequence[ConfigError]) -> str:
    """Say what is wrong with an unknown key. `errors`: those found so far."""
    if section in KNOWN:
        close = _closest(key, KNOWN[section], errors)
        if close:
            return f"unknown; did you mean {section}.{close}?"
        return f"unknown; {_suggest_path(key, errors) or f'[{section}] has ' + ', '.join(KNOWN[section])}"
    close = _closest(section, KNOWN, errors)
    if close:
        return f"there is no section [{section}]; did you mean [{close}]?"
    return f"there is no section [{section}]; there are {_sections()}"


def _sections() -> str:
    return ", ".join(f"[{name}]" for name in KNOWN)


def _suggest_path(key: str, errors: Sequence[ConfigError]) -> str:
    """Name the setting of any section that `key` looks like, for a key in the wrong place; else ""."""
    paths = {name: f"{section}.{name}" for section, keys in KNOWN.items() for name in keys}
    close = _closest(key, paths, errors)
    return f"did you mean {paths[close]}?" if close else ""


def _closest(written: str, names: Iterable[str], errors: Sequence[ConfigError]) -> str:
    """Return the name that is nearly what was written; "" if none is, or there are many mistakes already."""
    if len(errors) >= MAX_SUGGESTIONS:
        return ""
    return next(iter(difflib.get_close_matches(written, list(names), n=1)), "")
