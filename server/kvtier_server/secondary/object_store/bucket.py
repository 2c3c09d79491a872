"""The requests of the object tier, one method each: the seam where tests put a bad store.

Owns the connection, its credentials and its times. Every method waits for the answer, may be called from any
thread, and raises OSError for whatever goes wrong, with one line that says what. Paths are relative to the
URL's prefix.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvtier_server.secondary.base import TierError
from kvtier_server.secondary.object_store.parameters import ObjectParameters

if TYPE_CHECKING:
    from obstore.store import AzureConfig, ClientConfig, ObjectStore, RetryConfig, S3Config, S3Credential

MAX_RETRIES = 3
"""After an error that may pass, within the deadline."""

LONGEST_BACKOFF_S = 1.0
CREDENTIALS_S = 600.0
"""For how long credentials that were read are good. The library asks anew five minutes before."""

MAX_MESSAGE_CHARS = 200
MAX_DELETES = 1_000
"""Objects that one request may remove."""

Buffer = bytes | bytearray | memoryview


class Found(NamedTuple):
    """An object: its length, and its bytes; only the first ones where the length is not what was expected."""

    num_bytes: int
    data: memoryview


class Bucket:
    """Objects below one URL."""

    def __init__(self, parameters: ObjectParameters) -> None:
        """Make what is needed for requests; makes none. Raises TierError."""
        try:
            import obstore
        except ImportError as error:
            raise TierError(
                "the object tier needs the package obstore; type in kvtier's directory: "
                "pip install '.[server,object]'"
            ) from error
        self._obstore = obstore
        self._errors = (obstore.exceptions.BaseError, OSError)
        self._not_found = (obstore.exceptions.NotFoundError, FileNotFoundError)
        try:
            self._store = _open(parameters)
        except (*self._errors, ValueError) as error:
            raise TierError(f"{parameters.url} cannot be used: {_in_short(error)}") from error

    def check(self) -> None:
        """Ask whether the bucket is there and may be read."""
        with self._told():
            next(iter(self._obstore.list(self._store, chunk_size=1)), None)

    def size(self, path: str) -> int | None:
        """Length of an object; None if there is none. A bucket that is not there looks the same."""
        with self._told():
            try:
                return self._obstore.head(self._store, path)["size"]
            except self._not_found:
                return None

    def get(self, path: str, num_bytes: int, first_bytes: int) -> Found | None:
        """Read an object of `num_bytes`; of one that has another length at most `first_bytes`."""
        with self._told():
            try:
                found = self._obstore.get(self._store, path)
                size = found.meta["size"]
                if size == num_bytes or size <= first_bytes:
                    return Found(size, memoryview(found.bytes()))
                del found  # nobody asked for the rest of it
                first = self._obstore.get_range(self._store, path, start=0, end=first_bytes)
                return Found(size, memoryview(first))
            except self._not_found as error:
                if "NoSuchBucket" in str(error):
                    raise
                return None

    def put_new(self, path: str, data: Buffer) -> bool:
        """Write an object that is not there; False if it is, and stays as it was."""
        with self._told():
            try:
                self._obstore.put(self._store, path, data, mode="create")
            except self._obstore.exceptions.AlreadyExistsError:
                return False
            return True

    def put(self, path: str, data: Buffer) -> None:
        """Write an object in place of what is there."""
        with self._told():
            self._obstore.put(self._store, path, data, mode="overwrite", use_multipart=False)

    def delete(self, paths: Sequence[str]) -> None:
        """Remove objects; those that are not there are no error."""
        for first in range(0, len(paths), MAX_DELETES):
            some = list(paths[first : first + MAX_DELETES])
            with self._told():
                try:
                    self._obstore.delete(self._store, some)
                except self._not_found as error:
                    if "NoSuchBucket" in str(error):
                        raise
                    self._delete_each(some)

    def _delete_each(self, paths: Sequence[str]) -> None:
        """Remove objects one by one: of a batch, some stores leave the others when one is not there."""
        for path in paths:
            with suppress(*self._not_found):
                self._obstore.delete(self._store, path)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Say in one line what went wrong: the library's messages have dozens."""
        try:
            yield
        except self._errors as error:
            raise OSError(errno.EIO, _in_short(error)) from error


def _open(parameters: ObjectParameters) -> ObjectStore:
    from obstore.store import AzureStore, GCSStore, LocalStore, MemoryStore, S3Store

    place = parameters.place
    prefix = place.prefix or None
    if place.scheme == "memory":
        return MemoryStore()
    if place.scheme == "file":
        return LocalStore(Path("/", place.prefix), mkdir=True)
    client_options, retry_config = _client_options(parameters), _retry_config(parameters)
    if place.scheme == "gs":
        return GCSStore(
            place.bucket,
            prefix=prefix,
            config={"service_account": parameters.service_account_file}
            if parameters.service_account_file
            else None,
            client_options=client_options,
            retry_config=retry_config,
        )
    if place.scheme == "az":
        return AzureStore(
            place.bucket,
            prefix=prefix,
            config=_azure_config(parameters),
            client_options=client_options,
            retry_config=retry_config,
        )
    credentials = _FileCredentials(parameters) if parameters.access_key_file else None
    return S3Store(
        place.bucket,
        prefix=prefix,
        config=_s3_config(parameters),
        client_options=client_options,
        retry_config=retry_config,
        credential_provider=credentials,
    )


def _client_options(parameters: ObjectParameters) -> ClientConfig:
    # Half the deadline for one request, half for beginning others: together it is kept.
    half = timedelta(microseconds=max(1, parameters.deadline // 2_000))
    options: ClientConfig = {
        "timeout": half,
        "connect_timeout": min(half, timedelta(seconds=5)),
        "allow_http": parameters.allow_http,
    }
    if parameters.ca_file:
        options["root_certificate"] = _read("ca_file", parameters.ca_file)
    return options


def _retry_config(parameters: ObjectParameters) -> RetryConfig:
    return {
        "max_retries": MAX_RETRIES,
        "retry_timeout": timedelta(microseconds=max(1, parameters.deadline // 2_000)),
        "backoff": {
            "init_backoff": timedelta(milliseconds=50),
            "max_backoff": timedelta(seconds=LONGEST_BACKOFF_S),
        },
    }


def _s3_config(parameters: ObjectParameters) -> S3Config:
    # The chunk's own checksums are verified at each load; SHA-256 of every payload would find nothing more.
    config: S3Config = {"unsigned_payload": True}
    if parameters.region:
        config["region"] = parameters.region
    if parameters.endpoint:
        config["endpoint"] = parameters.endpoint
    return config


def _azure_config(parameters: ObjectParameters) -> AzureConfig:
    config: AzureConfig = {}
    if parameters.account:
        config["account_name"] = parameters.account
    if parameters.secret_key_file:
        config["account_key"] = _read("secret_key_file", parameters.secret_key_file)
    if parameters.endpoint:
        config["endpoint"] = parameters.endpoint
    return config


class _FileCredentials:
    """Reads the files of S3 credentials, now and whenever the library asks: they may be replaced."""

    def __init__(self, parameters: ObjectParameters) -> None:
        """Read them once, so that a name that is wrong is told at the start. Raises TierError."""
        self._own = parameters
        self()

    def __call__(self) -> S3Credential:
        own = self._own
        token = _read("session_token_file", own.session_token_file) if own.session_token_file else None
        return {
            "access_key_id": _read("access_key_file", own.access_key_file),
            "secret_access_key": _read("secret_key_file", own.secret_key_file),
            "token": token,
            "expires_at": datetime.now(UTC) + timedelta(seconds=CREDENTIALS_S),
        }


def _read(key: str, file: str) -> str:
    try:
        text = Path(file).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise TierError(
            f"{key} {file} cannot be read ({why}); make it a file that this user may read, with nothing but "
            "the secret in it"
        ) from error
    if not text:
        raise TierError(f"{key} {file} is empty; write the secret into it")
    return text


_STATUS = re.compile(r"status code: (\d+[^:\n]*)(?:.*?<Code>(\w+)</Code>)?", re.DOTALL)
_REQUEST = re.compile(r"Error performing [A-Z]+ (https?://\S+) in .* - (?:HTTP error: )?(.*)", re.DOTALL)
_QUERY = re.compile(r"(https?://[^\s?]+)\?\S*")


def _in_short(error: BaseException) -> str:
    """Say in one line what the library says in many, without a URL's query: it may be signed."""
    text = _QUERY.sub(r"\1", str(error).split("\n\nDebug source:")[0])
    if answered := _STATUS.search(text):
        status, code = answered.groups()
        return f"the store answered {status.strip()}{f' ({code})' if code else ''}"
    if asked := _REQUEST.search(text):
        text = ": ".join(asked.groups())
    # Of our own: the library has asked for the credentials again.
    text = text.rpartition(f"{TierError.__name__}: ")[2]
    text = " ".join(text.split())
    return text if len(text) <= MAX_MESSAGE_CHARS else f"{text[:MAX_MESSAGE_CHARS]}..."
