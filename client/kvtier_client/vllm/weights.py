"""Which weights a model computes with: the default `weights_id`, and digests of configurations.

Owns the rule by which two engines are said to have the same weights without anybody saying so: the commit of
a hub model, or the names, sizes and times of the files of a local one. It never reads a weight file. Imports
no vLLM.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path

WEIGHT_PATTERNS = (
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.gguf",
    "*.safetensors.index.json",
    "consolidated*",
    "config.json",
    "params.json",
)
"""What vLLM's loaders read in the model's folder, and not below it."""

FILE_FORMATS = frozenset(
    {
        "auto",
        "hf",
        "pt",
        "safetensors",
        "npcache",
        "gguf",
        "mistral",
        "bitsandbytes",
        "sharded_state",
        "fastsafetensors",
        "instanttensor",
        "runai_streamer",
        "runai_streamer_sharded",
    }
)
"""Load formats that take the weights from the model's own files. Others may take them from anywhere."""

DUMMY = "dummy"
CONFIG_FILES = ("config.json", "params.json")

# Where a configuration was found and who wrote it, not what it says.
_NOT_CONTENT = frozenset({"name_or_path", "transformers_version"})
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SNAPSHOT = re.compile(r"(?:.*/)?models--(?P<repo>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})/*")
_SHARD = re.compile(r"(.+)-\d+-of-\d+\.gguf")


class WeightsError(ValueError):
    """Nothing tells which weights these are. The message says how to name them."""


@dataclass(frozen=True, slots=True)
class WeightsSource:
    """Where an engine was told to take the weights of one model from."""

    model: str
    """A folder, a file, or a name on the hub."""
    revision: str | None = None
    commit: str | None = None
    """The commit that the engine's own download was resolved to, if it says."""
    load_format: str = "auto"
    seed: int = 0
    """Makes the weights of load format "dummy"."""
    download_dir: str | None = None
    remote: str = ""
    """Not empty: the weights come from this address and `model` holds the configuration only."""


def default_weights_id(source: WeightsSource) -> str:
    """Name the weights of `source`; the same in all processes of an engine, and after a restart.

    Raise WeightsError where that cannot be known.
    """
    if source.load_format == DUMMY:
        return f"dummy:{source.seed}"
    if source.load_format not in FILE_FORMATS:
        raise _unknown(source, f"load format {source.load_format!r} may take weights from anywhere")
    if source.remote:
        raise _unknown(source, f"its weights come from {source.remote}")
    commit = _commit(source)
    if commit is not None:
        _, _, variant = _split_variant(display_name(source.model))
        return f"hub:{commit}:{variant}" if variant else f"hub:{commit}"
    path = Path(source.model)
    if path.is_file():
        shard = _SHARD.fullmatch(path.name)
        files = sorted(path.parent.glob(f"{glob.escape(shard[1])}-*.gguf")) if shard else [path]
        return f"files:{_digest_files(files)}"
    if path.is_dir():
        found = {file for pattern in WEIGHT_PATTERNS for file in path.glob(pattern)}
        files = sorted(file for file in found if file.is_file())
        if all(file.name in CONFIG_FILES for file in files):
            raise _unknown(source, "its folder holds no weight files")
        return f"files:{_digest_files(files)}"
    raise _unknown(source, "it is no folder, no file, and in no snapshot of the hub's cache")


def display_name(model: str) -> str:
    """Return the hub's name of a model that is given as a snapshot in the cache, else `model` itself.

    vLLM swaps one for the other when it is offline.
    """
    match = _SNAPSHOT.fullmatch(model)
    return match["repo"].replace("--", "/") if match else model


def model_folder(source: WeightsSource) -> Path | None:
    """Return the folder that holds the model's configuration on this machine; a single file has none."""
    path = Path(source.model)
    if path.exists():
        return path if path.is_dir() else None
    commit = _commit(source)
    folder = _cached_repo(source) / "snapshots" / commit if commit else None
    return folder if folder is not None and folder.is_dir() else None


def config_file_digest(folder: Path | None) -> str | None:
    """Return a digest of what the model's configuration file says, or None if there is none to read."""
    for name in CONFIG_FILES:
        try:
            content = json.loads((folder / name).read_bytes()) if folder else None
        except (OSError, ValueError):
            continue
        if isinstance(content, dict):
            return config_digest(content)
    return None


def config_digest(config: Mapping[str, object]) -> str:
    """Return a digest of a configuration, without where it was found and who wrote it."""
    kept = {key: value for key, value in config.items() if key not in _NOT_CONTENT and key[:1] != "_"}
    return stable_digest(kept)


def stable_digest(value: object) -> str:
    """Return 32 hex digits that are the same in every process for values that say the same.

    Objects are read field by field, classes and functions by name.
    """
    text = json.dumps(_plain(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _plain(value: object) -> object:
    if isinstance(value, Enum):
        return f"{type(value).__name__}.{value.name}"
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(json.dumps(_plain(item), sort_keys=True) for item in value)
    name = getattr(value, "__qualname__", None)
    if name is not None:
        return f"{getattr(value, '__module__', '')}.{name}"
    if is_dataclass(value):
        content = {field.name: getattr(value, field.name, None) for field in fields(value)}
        return [type(value).__name__, _plain(content)]
    if hasattr(value, "__dict__"):
        return [type(value).__name__, _plain(vars(value))]
    return str(value)


def _commit(source: WeightsSource) -> str | None:
    snapshot = _SNAPSHOT.fullmatch(source.model)
    if snapshot:
        return snapshot["commit"]
    if Path(source.model).exists():
        return None
    if source.revision and _COMMIT.fullmatch(source.revision):
        return source.revision
    if source.commit:
        return source.commit
    try:
        text = (_cached_repo(source) / "refs" / (source.revision or "main")).read_text("ascii").strip()
    except (OSError, ValueError):
        return None
    return text if _COMMIT.fullmatch(text) else None


def _split_variant(model: str) -> tuple[str, str, str]:
    """Split `org/name:Q4_K_M` and `org/name/file.gguf` into the repository, a separator and the variant."""
    if ":" in model:
        return model.partition(":")
    parts = model.split("/")
    return "/".join(parts[:2]), "/", "/".join(parts[2:])


def _cached_repo(source: WeightsSource) -> Path:
    repo, _, _ = _split_variant(source.model)
    return _hub_cache(source.download_dir) / ("models--" + repo.replace("/", "--"))


def _hub_cache(download_dir: str | None) -> Path:
    """Return the hub's cache folder, by the rules of huggingface_hub."""
    if download_dir:
        return Path(download_dir)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return Path(os.path.expandvars(os.environ[name])).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{caches}/huggingface"
    return Path(os.path.expandvars(home)).expanduser() / "hub"


def _digest_files(files: list[Path]) -> str:
    return stable_digest(list(_file_facts(files)))


def _file_facts(files: list[Path]) -> Iterator[tuple[str, int, int]]:
    for file in files:
        found = file.stat()
        yield file.name, found.st_size, found.st_mtime_ns


def _unknown(source: WeightsSource, why: str) -> WeightsError:
    return WeightsError(
        f"cannot tell which weights {source.model!r} has: {why}. Name them: "
        '"weights_id": "<a name of your own, another one for other weights>" in kv_connector_extra_config'
    )
