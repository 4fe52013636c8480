"""API keys from a file, and their rates."""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import stat
import time
from collections import OrderedDict
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trtqwen.diagnostics import InputError
from trtqwen.gateway.errors import ApiError, bad_request
from trtqwen.yaml_file import read_mapping

_MINUTE = 60.0
_FREE_GUESSES = 20  # wrong keys of one address in a minute, before its further ones wait
_MOST_ADDRESSES = 10_000
_LOOK_SECONDS = 1.0  # between two looks at the keys file
_log = logging.getLogger(__name__)


class _Key(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(min_length=1)]
    key: Annotated[str, Field(min_length=16, pattern=r"^[!-~]+$")] | None = None  # what a header carries unchanged
    key_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    tokens_per_minute: Annotated[int, Field(ge=1)] | None = None
    max_in_flight: Annotated[int, Field(ge=1)] | None = None
    max_queued: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> _Key:
        if (self.key is None) == (self.key_sha256 is None):
            raise ValueError("give either key or key_sha256")
        return self

    @property
    def digest(self) -> bytes:
        return _digest(self.key) if self.key is not None else bytes.fromhex(self.key_sha256 or "")


class _Keys(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: Annotated[list[_Key], Field(min_length=1)]


class TokenBucket:
    """Holds at most a minute's worth and fills evenly."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._size = float(per_minute)
        self._level = self._size
        self._at = now

    def wait(self, amount: float, now: float) -> float:
        """Seconds until `amount` can be taken; 0 if it can be now, infinite if it never can."""
        self._level = min(self._size, self._level + (now - self._at) * self._size / _MINUTE)
        self._at = now
        if amount > self._size:
            return math.inf
        return max(0.0, amount - self._level) * _MINUTE / self._size

    def charge(self, amount: float, now: float) -> float:
        """Take `amount` if possible now; otherwise return the seconds to wait, as `wait` does."""
        seconds = self.wait(amount, now)
        if seconds == 0:
            self.take(amount)
        return seconds

    def take(self, amount: float) -> None:
        """Take `amount`, even if the bucket has less; a negative amount is a refund."""
        self._level -= amount


@dataclass
class Caller:
    """A client with its rates; without buckets, it has no limits."""

    name: str
    requests: TokenBucket | None = None
    tokens: TokenBucket | None = None
    most_in_flight: int | None = None
    most_queued: int | None = None

    def same_limits(self, other: Caller | None) -> bool:
        """Whether another caller has the same limits: its rates then continue."""
        if type(other) is not type(self):
            return False
        rates = [
            (caller.requests and caller.requests.per_minute, caller.tokens and caller.tokens.per_minute)
            for caller in (self, other)
        ]
        limits = [(caller.most_in_flight, caller.most_queued) for caller in (self, other)]
        return rates[0] == rates[1] and limits[0] == limits[1]

    def charge_request(self, now: float) -> None:
        """Take one request from the caller's rate, before any work is done for it.

        Raises:
            ApiError: 429 with the time to wait; then nothing is taken.
        """
        _charge(self.requests, 1, "requests", now)

    def charge_tokens(self, tokens: int, now: float) -> None:
        """Take tokens, prompt and longest answer, from the caller's rate.

        Raises:
            ApiError: 429 with the time to wait, or 400 if no wait is long enough; then nothing is taken.
        """
        _charge(self.tokens, tokens, "tokens", now)

    def take_tokens(self, tokens: int) -> None:
        """Take tokens that were used already; a rate that they exceed fills up later."""
        if self.tokens is not None:
            self.tokens.take(tokens)

    def refund_tokens(self, tokens: int) -> None:
        """Refund the tokens of a request that was refused later."""
        if self.tokens is not None:
            self.tokens.take(-tokens)


def _charge(bucket: TokenBucket | None, amount: int, unit: str, now: float) -> None:
    if bucket is None:
        return
    wait = bucket.charge(amount, now)
    if wait == math.inf:
        message = f"{amount} {unit}, prompt and longest answer, are more than the key's rate ever allows"
        raise bad_request(f"{message}; lower max_tokens", param="max_tokens", code="rate_limit_exceeded")
    if wait > 0:
        seconds = math.ceil(wait)
        message = f"the key's rate of {unit} is used up; try again in {seconds} s"
        raise ApiError(429, message, "rate_limit_exceeded", retry_after=seconds)


_ANONYMOUS = Caller("anonymous")
CALLER: ContextVar[Caller] = ContextVar("caller", default=_ANONYMOUS)  # of the request that a task serves


@dataclass
class Authenticator:
    """Tells callers by their keys; without keys, all callers are one.

    Attributes:
        callers: by SHA-256 of their keys: the keys themselves are not kept.
    """

    callers: dict[bytes, Caller] = field(default_factory=dict)
    anonymous: Caller = field(default_factory=lambda: Caller("anonymous"))
    path: Path | None = None
    wrap: Callable[[bytes, Caller], Caller] = lambda digest, caller: caller
    _state: tuple[int, ...] = ()
    _looked_at: float = float("-inf")

    def refresh(self) -> None:
        """Read the keys file again if it has changed; a file that cannot be used changes nothing."""
        now = time.monotonic()
        if self.path is None or now - self._looked_at < _LOOK_SECONDS:
            return
        self._looked_at = now
        try:
            status = self.path.stat()
            state = (status.st_ino, status.st_size, status.st_mtime_ns)
            if state == self._state:
                return
            known, self._state = self._state, state
            if not known:
                return  # it was read a moment ago
            callers = read_keys(self.path).callers
        except (OSError, InputError) as problem:
            _log.error("the keys are as before: %s", problem)
            return
        old = {caller.name: caller for caller in self.callers.values()}
        self.callers = {
            digest: old[caller.name] if caller.same_limits(old.get(caller.name)) else self.wrap(digest, caller)
            for digest, caller in callers.items()
        }
        _log.warning("%s was read again: %d keys", self.path, len(self.callers))

    def authenticate(self, header: str | None) -> Caller:
        """The caller of an `Authorization` header.

        Raises:
            ApiError: 401 without a known key.
        """
        self.refresh()
        if not self.callers:
            return self.anonymous
        scheme, _, key = (header or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise ApiError(401, "no API key; send it as `Authorization: Bearer KEY`", "missing_api_key")
        digest = _digest(key.strip())
        found = None
        for known, caller in self.callers.items():  # all of them: the time must not tell how far a guess got
            if hmac.compare_digest(known, digest):
                found = caller
        if found is None:
            raise ApiError(401, "the API key is not known here; check it", "invalid_api_key")
        return found


def read_keys(path: Path | None, clock: Callable[[], float] = time.monotonic) -> Authenticator:
    """Read a keys file: YAML, `keys:` over entries.

    Each has a name and either its key or key_sha256, the key's SHA-256 in hex digits. It may have
    requests_per_minute, tokens_per_minute, max_in_flight and max_queued.

    Raises:
        InputError: if the file is missing or an entry cannot be used; keys are not repeated in the message.
    """
    if path is None:
        return Authenticator()
    _check_mode(path)
    content = read_mapping(path)
    try:
        entries = _Keys.model_validate(content).keys
    except ValidationError as problem:
        first = problem.errors()[0]
        field_name = ".".join(map(str, first["loc"])) or "keys"
        raise InputError(f"{path}: field {field_name!r}: {first['msg'].lower()}", "correct it") from None
    callers: dict[bytes, Caller] = {}
    for entry in entries:
        digest = entry.digest
        if any(caller.name == entry.name for caller in callers.values()):
            raise InputError(f"{path}: two entries have the name {entry.name}", "give each its own")
        if digest in callers:
            raise InputError(f"{path}: {entry.name} has the same key as {callers[digest].name}", "give each its own")
        callers[digest] = Caller(
            entry.name,
            _bucket(entry.requests_per_minute, clock),
            _bucket(entry.tokens_per_minute, clock),
            entry.max_in_flight,
            entry.max_queued,
        )
    return Authenticator(callers, path=path)


def _check_mode(path: Path) -> None:
    """Refuse a file that others can write, and warn of one that they can read."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # reading it tells
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise InputError(f"{path}: other users can write it, and so give themselves keys", f"run `chmod 600 {path}`")
    if mode & stat.S_IROTH:
        _log.warning("%s: other users can read the keys; run `chmod 600 %s`, or store key_sha256", path, path)


def _bucket(per_minute: int | None, clock: Callable[[], float]) -> TokenBucket | None:
    return None if per_minute is None else TokenBucket(per_minute, clock())


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class Guesses:
    """Limits wrong keys of an address: after twenty in a minute, one in three seconds."""

    def __init__(self) -> None:
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def wrong(self, address: str, now: float) -> None:
        """Count a wrong key. Requests with a valid key are never delayed.

        Raises:
            ApiError: 429 with the time to wait, if the address has guessed too often.
        """
        bucket = self._buckets.get(address)
        if bucket is None:
            bucket = self._buckets[address] = TokenBucket(_FREE_GUESSES, now)
            if len(self._buckets) > _MOST_ADDRESSES:
                self._buckets.popitem(last=False)
        if (wait := bucket.wait(1, now)) > 0:
            seconds = math.ceil(wait)
            message = f"too many wrong API keys; try again in {seconds} s"
            raise ApiError(429, message, "too_many_keys", retry_after=seconds)
        bucket.take(1)
        if bucket.wait(1, now) > 0:
            _log.warning("%s has sent %d wrong API keys within a minute", address, _FREE_GUESSES)
