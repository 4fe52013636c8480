"""Rates of API keys that several gateways share: token buckets in Redis or Valkey.

A script in the server takes from a bucket and fills it by the server's own clock, so that gateways on several
machines agree. If the server does not answer, the gateway refuses requests of keys with a rate, because it does not
know their remaining rate.
"""

from __future__ import annotations

import math
import os
from typing import Any

from trtqwen.diagnostics import InputError
from trtqwen.gateway.admission.auth import Authenticator, TokenBucket, read_keys
from trtqwen.gateway.config import GatewayConfig
from trtqwen.gateway.errors import ApiError

PASSWORD = "TRTQWEN_RATES_PASSWORD"
_SECONDS = 0.5  # for one question
# KEYS: the bucket. ARGV: its size, the amount, and 1 to take it regardless of the rest. Returns the seconds to wait.
_SCRIPT = """
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000
local size, amount = tonumber(ARGV[1]), tonumber(ARGV[2])
local level, at = unpack(redis.call('HMGET', KEYS[1], 'level', 'at'))
level = level and math.min(size, tonumber(level) + (now - tonumber(at)) * size / 60) or size
local wait = 0
if ARGV[3] == '1' or amount <= level then level = level - amount else wait = (amount - level) * 60 / size end
redis.call('HSET', KEYS[1], 'level', string.format('%.6f', level), 'at', string.format('%.6f', now))
redis.call('EXPIRE', KEYS[1], math.ceil((size - level) * 60 / size) + 1)
return string.format('%.6f', wait)
"""


class SharedBucket(TokenBucket):
    """A token bucket in the server; its clock is the server's."""

    def __init__(self, script: Any, name: str, per_minute: int) -> None:
        super().__init__(per_minute, 0)
        self._script = script
        self._name = name

    def charge(self, amount: float, now: float) -> float:
        return math.inf if amount > self.per_minute else self._ask(amount)

    def take(self, amount: float) -> None:
        self._ask(amount, whatever_is_left=True)

    def _ask(self, amount: float, *, whatever_is_left: bool = False) -> float:
        import redis

        arguments = [self.per_minute, amount, int(whatever_is_left)]
        try:
            return float(self._script(keys=[self._name], args=arguments))
        except redis.RedisError:
            message = "the server that keeps the rates of keys does not answer; try again"
            raise ApiError(503, message, "rates_unavailable", retry_after=5) from None


def open_keys(config: GatewayConfig) -> Authenticator:
    """The callers of a gateway, with rates of their own or shared ones.

    Raises:
        InputError: as `read_keys`, or if rates are to be shared and the package for it is missing.
    """
    authenticator = read_keys(config.api_keys)
    if config.rates_url is None:
        return authenticator
    try:
        import redis
    except ImportError:
        raise InputError(
            "rates_url is set and the package redis is not installed", "install trtqwen[redis]"
        ) from None
    client = redis.Redis.from_url(
        config.rates_url,
        password=os.environ.get(PASSWORD),
        socket_timeout=_SECONDS,
        socket_connect_timeout=_SECONDS,
    )
    script = client.register_script(_SCRIPT)
    for digest, caller in authenticator.callers.items():
        name = f"trtqwen:rate:{digest.hex()[:32]}"
        if caller.requests is not None:
            caller.requests = SharedBucket(script, f"{name}:requests", caller.requests.per_minute)
        if caller.tokens is not None:
            caller.tokens = SharedBucket(script, f"{name}:tokens", caller.tokens.per_minute)
    return authenticator
