"""What a chunk is called in a place that several daemons may share: its space's directory and its file.

A space is named by a digest; a key by its hexadecimal digits, as far as names may be so long. Owns names.
"""

from __future__ import annotations

import functools
import hashlib
import json

from kvtier_ops.namespace import SpaceName

FORMAT_DIRECTORY = "kvtier-1"
SUFFIX = ".chunk"
MAX_HEX_KEY_BYTES = 120
"""A file's name has 255 characters at most."""


@functools.lru_cache(maxsize=256)  # asked for every file, and 20 us of pure Python each
def space_directory(space: SpaceName) -> str:
    """Name the directory of a space."""
    canonical = json.dumps([space.namespace, space.tenant, space.epoch]).encode()
    return hashlib.blake2b(canonical, digest_size=16).hexdigest()


def file_name(key: bytes) -> str:
    """Name a key's file."""
    if len(key) <= MAX_HEX_KEY_BYTES:
        return key.hex() + SUFFIX
    return f"x{hashlib.blake2b(key, digest_size=32).hexdigest()}{SUFFIX}"


def key_of(name: str) -> bytes | None:
    """Read the key off a file's name; None where only its header tells, or it is no chunk's."""
    if not name.endswith(SUFFIX) or name.startswith("x"):
        return None
    try:
        return bytes.fromhex(name.removesuffix(SUFFIX))
    except ValueError:
        return None
