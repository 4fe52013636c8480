"""Limits of the work before the queue: the memory of request bodies, and the parallel work on long bodies.

Keys take turns. Within a key the smallest comes first, so that a short request does not wait behind long ones.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count

from trtqwen.gateway.errors import ApiError

LONG_BODY = 4 << 10  # bytes; a shorter one takes only a millisecond or two
_BYTES_A_BYTE = 2  # of memory: the body, and the text in it
_BYTES_A_VALUE = 64  # of a parsed value, besides its text
_VALUES = (b",", b"[", b"{", b":")  # at most one value follows each
_MOST_WAITING = 256  # of one key
_SHORT_SECONDS = 0.005  # of work, after which a key does not pause
_MOST_SOCKETS = 64  # WebSockets of one key: each may hold a body's bytes


def body_memory(body: bytes | bytearray) -> int:
    """Estimate the memory of a JSON body while its request is served: its text and the parsed values."""
    return _BYTES_A_BYTE * len(body) + _BYTES_A_VALUE * sum(map(body.count, _VALUES))


class Memory:
    """Limits the memory of requests that are served, in total and for each key.

    Args:
        most: bytes in all.
        most_per_key: bytes of one key.
    """

    def __init__(self, most: int, most_per_key: int) -> None:
        self._most = most
        self._most_per_key = most_per_key
        self._taken = Counter[str]()

    def take(self, key: str, size: int) -> None:
        """Allocate bytes.

        Raises:
            ApiError: 413 if a key may never have this many, 429 if there is no room now; then nothing is allocated.
        """
        if size > self._most_per_key:
            what = f"the request's body takes {size} bytes of memory, and {self._most_per_key} are allowed"
            raise ApiError(413, f"{what} (request_memory); send less", "body_too_large")
        if self._taken[key] + size > self._most_per_key or self._taken.total() + size > self._most:
            message = "the bodies of other requests take all the memory (request_memory); try again in 1 s"
            raise ApiError(429, message, "too_many_bytes", retry_after=1)
        self._taken[key] += size

    def give_back(self, key: str, size: int) -> None:
        """Release bytes."""
        self._taken[key] -= size
        if self._taken[key] <= 0:
            del self._taken[key]


class Share:
    """The memory of one request; use it as a context manager, which releases it."""

    def __init__(self, memory: Memory, key: str) -> None:
        self._memory = memory
        self._key = key
        self._size = 0

    def grow(self, size: int) -> None:
        """Take as much as makes `size` bytes in all.

        Raises:
            ApiError: as `Memory.take` does.
        """
        if size > self._size:
            self._memory.give_back(self._key, self._size)
            taken, self._size = self._size, 0
            try:
                self._memory.take(self._key, size)
            except ApiError:
                self._memory.take(self._key, taken)
                self._size = taken
                raise
            self._size = size

    def __enter__(self) -> Share:
        return self

    def __exit__(self, *_: object) -> None:
        self._memory.give_back(self._key, self._size)
        self._size = 0


@dataclass
class _Waiting:
    """The turns that one key waits for, the smallest first."""

    turns: list[tuple[int, int, asyncio.Future[None]]] = field(default_factory=list)


class Turns:
    """Limits the number of workers at a time.

    Args:
        most: in all.
        most_per_key: of one key.
        seconds: how long one may wait.
        what: what they wait for, in words.
        rests: after its turn, a key pauses for as long as the turn took, so that it uses at most half of the time.
    """

    def __init__(self, most: int, most_per_key: int, seconds: float, what: str, *, rests: bool = False) -> None:
        self._most = most
        self._most_per_key = most_per_key
        self._seconds = seconds
        self._what = what
        self._rests = rests
        self._working = Counter[str]()
        self._resting = Counter[str]()
        self._waiting: OrderedDict[str, _Waiting] = OrderedDict()  # in the order of their turns
        self._numbers = count()

    @asynccontextmanager
    async def turn(self, key: str, size: int) -> AsyncIterator[None]:
        """Wait for a turn and hold it for the block.

        Args:
            size: the smaller comes first among those of one key.

        Raises:
            ApiError: 429 if too many wait, or no turn comes in time.
        """
        await self._wait(key, size)
        begun = time.monotonic()
        try:
            yield
        finally:
            if self._rests and (pause := time.monotonic() - begun) > _SHORT_SECONDS:
                self._resting[key] += 1
                asyncio.get_running_loop().call_later(pause, self._rested, key)
            self._end(key)

    async def _wait(self, key: str, size: int) -> None:
        waiting = self._waiting.setdefault(key, _Waiting())
        if len(waiting.turns) >= _MOST_WAITING:
            raise self._busy()
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heappush(waiting.turns, (size.bit_length(), next(self._numbers), turn))
        self._grant()
        try:
            # Not wait_for: before Python 3.12 it loses a cancellation that comes together with the turn.
            await asyncio.wait((turn,), timeout=self._seconds)
            if not turn.done():
                raise self._busy()
        except BaseException:
            if turn.done():
                self._end(key)
            else:
                turn.cancel()
                self._forget(key)
            raise

    def _end(self, key: str) -> None:
        self._working[key] -= 1
        if not self._working[key]:
            del self._working[key]
        self._grant()

    def _rested(self, key: str) -> None:
        self._resting[key] -= 1
        if not self._resting[key]:
            del self._resting[key]
        self._grant()

    def _grant(self) -> None:
        for key in tuple(self._waiting):
            if self._working.total() >= self._most:
                return
            waiting = self._waiting[key]
            while waiting.turns and self._working[key] + self._resting[key] < self._most_per_key:
                _, _, turn = heappop(waiting.turns)
                if not turn.done():
                    turn.set_result(None)
                    self._working[key] += 1
                    break
            self._waiting.move_to_end(key)
            if not waiting.turns:
                del self._waiting[key]

    def _forget(self, key: str) -> None:
        """Remove the turns of requests that have ended."""
        with suppress(KeyError):
            waiting = self._waiting[key]
            waiting.turns = [turn for turn in waiting.turns if not turn[2].done()]
            waiting.turns.sort()
            if not waiting.turns:
                del self._waiting[key]

    def _busy(self) -> ApiError:
        message = f"too many requests of this key wait for {self._what}; try again in 1 s"
        return ApiError(429, message, "too_busy", retry_after=1)


class Desk:
    """The limits of one process.

    Args:
        memory: bytes that bodies may take.
        keys: how many API keys there are; with several, none takes all.
        cpus: of this process.
        seconds: how long a request may wait for a turn.
        largest_body: bytes of a request.
    """

    def __init__(self, memory: int, keys: int, cpus: int, seconds: float, largest_body: int) -> None:
        several = keys > 1
        memory = max(memory, 4 * _BYTES_A_BYTE * largest_body)
        self.memory = Memory(memory, memory // 2 if several else memory)
        self.bodies = Turns(max(2, cpus // 2), 1 if several else 2, seconds, "a long body to be read", rests=several)
        self._sockets = Counter[str]()

    def share(self, key: str) -> Share:
        """The memory of one request."""
        return Share(self.memory, key)

    @asynccontextmanager
    async def socket(self, key: str) -> AsyncIterator[bool]:
        """Count a WebSocket for the block; yields whether the key may have one more."""
        allowed = self._sockets[key] < _MOST_SOCKETS
        self._sockets[key] += allowed
        try:
            yield allowed
        finally:
            self._sockets[key] -= allowed
            if not self._sockets[key]:
                del self._sockets[key]
