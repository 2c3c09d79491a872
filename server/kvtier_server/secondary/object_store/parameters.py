"""What may be written into the `[[tiers]]` table of an object tier, and what fits together.

Owns no connection and reads no file. Secrets are never values: their files are named.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from kvtier_server.config_values import Bytes, Count, Directory, Nanoseconds, Share
from kvtier_server.secondary.parameters import TierParameters

SCHEMES = ("s3", "gs", "az", "file", "memory")

SCHEMES_OF = {
    "region": ("s3",),
    "allow_http": ("s3", "az"),
    "endpoint": ("s3", "az"),
    "access_key_file": ("s3",),
    "secret_key_file": ("s3", "az"),
    "session_token_file": ("s3",),
    "account": ("az",),
    "service_account_file": ("gs",),
    "ca_file": ("s3", "gs", "az"),
}
"""Keys that mean something for some stores only."""


class Place(NamedTuple):
    """What a URL says: the bucket, or container, and the prefix below it, "" for none."""

    scheme: str
    bucket: str
    prefix: str


def read_url(url: str) -> Place:
    """Take a URL apart. Raises ValueError, which says what to write."""
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        raise ValueError(
            f"{url!r} is no place for objects; write s3://bucket/prefix, gs://..., az://container/prefix, "
            "file:///directory or memory:///"
        )
    if "@" in parts.netloc:
        raise ValueError("has a secret in it; name the file that holds it as secret_key_file")
    if parts.query or parts.fragment:
        raise ValueError(f"{url!r} has a ? or #; write what belongs there as keys of the table")
    prefix = parts.path.strip("/")
    if parts.scheme in ("file", "memory"):
        if parts.netloc:
            raise ValueError(f"{url!r} names a host; write {parts.scheme}:/// and an absolute path")
        if parts.scheme == "file" and not prefix:
            raise ValueError(f"{url!r} names no directory; write file:///directory")
    elif not parts.netloc:
        raise ValueError(f"{url!r} names no bucket; write {parts.scheme}://bucket/prefix")
    return Place(parts.scheme, parts.netloc, prefix)


def _check_url(url: str) -> str:
    read_url(url)
    return url


class ObjectParameters(TierParameters):
    """Keys of an object tier."""

    url: Annotated[str, AfterValidator(_check_url)]
    """s3://bucket/prefix, gs://, az://, file:///directory, memory:/// (the daemon's own memory)."""
    capacity: Bytes
    """Bytes of objects that this daemon keeps; what others wrote does not count."""
    low_water: Share = 0.95
    """Part of the capacity that eviction frees down to, so that not every store has to evict."""
    region: str = ""
    """Of the bucket; default: the environment's, else us-east-1."""
    allow_http: bool = False
    """Allow an endpoint without TLS."""
    endpoint: str = ""
    """Of a store that is not the cloud's own, as "https://ceph.example:443"."""
    session_token_file: Directory = ""
    """File of the session token, where the credentials are temporary ones."""
    secret_key_file: Directory = ""
    """File of the secret key; of Azure that of the account's key."""
    access_key_file: Annotated[Directory, Field(validate_default=True)] = ""
    """File of the access key's id. Files of credentials are read again every few minutes; without them the
    environment's or the machine's own are used."""
    account: str = ""
    """Of Azure; its key is in `secret_key_file`."""
    service_account_file: Directory = ""
    """Of Google: the JSON file of a service account."""
    ca_file: Directory = ""
    """Certificates (PEM) to trust beyond the system's."""
    readers: Annotated[Count, Field(le=256)] = 16
    """Loads under way at once."""
    writers: Annotated[Count, Field(le=256)] = 4
    """Stores under way at once."""
    deadline: Nanoseconds = 10 * 10**9
    """For one chunk, from its submission on, with all that is tried again."""
    max_waiting: Bytes = 256 << 20
    """Bytes of stores that the tier has taken and not written yet."""
    state_directory: Directory = ""
    """Local directory of the index, one for each daemon; default: kvtier in $XDG_STATE_HOME."""

    @property
    def place(self) -> Place:
        """What `url` says."""
        return read_url(self.url)

    @field_validator("endpoint")
    @classmethod
    def _check_endpoint(cls, endpoint: str, info: ValidationInfo) -> str:
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f'{endpoint!r} is no address; write it as "https://host:port"')
        if "@" in parts.netloc:
            raise ValueError("has a secret in it; name the files that hold it as access_key_file and so on")
        if parts.scheme == "http" and not info.data.get("allow_http"):
            raise ValueError(f"{endpoint!r} is not encrypted; write https, or allow_http = true")
        return endpoint

    @field_validator("access_key_file")
    @classmethod
    def _check_pair(cls, access_key_file: str, info: ValidationInfo) -> str:
        is_s3 = str(info.data.get("url", "")).startswith("s3:")
        secret, token = info.data.get("secret_key_file"), info.data.get("session_token_file")
        if is_s3 and bool(access_key_file) != bool(secret):
            raise ValueError("and secret_key_file belong together; write both or none")
        if is_s3 and token and not secret:
            raise ValueError("and secret_key_file are missing beside session_token_file")
        return access_key_file

    @field_validator(*SCHEMES_OF)
    @classmethod
    def _check_scheme(cls, value: str, info: ValidationInfo) -> str:
        scheme = urlsplit(str(info.data.get("url", ""))).scheme
        assert info.field_name is not None, "a validator of fields"
        schemes = SCHEMES_OF[info.field_name]
        if value and scheme and scheme not in schemes:
            raise ValueError(f"is for {', '.join(f'{each}://' for each in schemes)} only")
        return value
