"""Rates of keys that two gateways share in a real Redis."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.gateway.conftest import Running
from tests.waiting import wait_for
from trtqwen.diagnostics import InputError
from trtqwen.gateway.admission.rates import open_keys
from trtqwen.gateway.config import GatewayConfig, gateway_config
from trtqwen.gateway.errors import ApiError

redis = pytest.importorskip("redis", reason="install the extra redis")
KEY, OTHER = "0123456789abcdef", "fedcba9876543210"


class Server:
    """A Redis or Valkey server."""

    def __init__(self, directory: Path) -> None:
        program = shutil.which("valkey-server") or shutil.which("redis-server")
        if program is None:
            pytest.skip("redis-server is missing; install the package redis-server")
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        self.url = f"redis://127.0.0.1:{port}/0"
        self.process = subprocess.Popen(
            [program, "--port", str(port), "--save", "", "--dir", str(directory)], stdout=subprocess.DEVNULL
        )
        assert wait_for(self._answers)

    def _answers(self) -> bool:
        try:
            return bool(redis.Redis.from_url(self.url).ping())
        except redis.RedisError:
            return False

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    running = Server(tmp_path)
    yield running
    running.stop()


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys.yaml"
    limited = f"{{name: a, key: {KEY}, requests_per_minute: 6, tokens_per_minute: 1000}}"
    path.write_text(f"keys:\n- {limited}\n- {{name: b, key: {OTHER}}}\n")
    return path


def test_a_bucket_is_one_for_all(server: Server, keys: Path) -> None:
    config = GatewayConfig(repository=keys, api_keys=keys, rates_url=server.url)
    one, other = (open_keys(config).authenticate(f"Bearer {KEY}") for _ in range(2))
    one.charge_tokens(600, 0)
    with pytest.raises(ApiError) as refused:
        other.charge_tokens(600, 0)
    assert (refused.value.status, refused.value.code) == (429, "rate_limit_exceeded")
    assert 0 < int(refused.value.headers["Retry-After"]) <= 12  # a refused charge takes nothing
    other.charge_tokens(400, 0)
    one.refund_tokens(600)
    other.charge_tokens(600, 0)
    one.take_tokens(500)  # used already: the bucket owes
    with pytest.raises(ApiError):
        other.charge_tokens(1, 0)
    with pytest.raises(ApiError) as never:
        other.charge_tokens(1001, 0)
    assert never.value.status == 400
    client = redis.Redis.from_url(server.url)
    names = client.keys("*")
    assert len(names) == 1
    assert KEY.encode() not in names[0]  # nor is the key kept there
    assert 60 < client.ttl(names[0]) <= 92
    server.stop()
    with pytest.raises(ApiError) as silent:
        one.charge_tokens(1, 0)
    assert (silent.value.status, silent.value.code) == (503, "rates_unavailable")


def test_addresses(keys: Path) -> None:
    for url, says in (("http://h", "redis://host"), ("redis://:secret@h:1/0", "TRTQWEN_RATES_PASSWORD")):
        with pytest.raises(InputError, match=says) as refused:
            gateway_config(repository=keys, rates_url=url)
        assert "secret" not in str(refused.value)


@pytest.mark.triton
def test_a_limit_holds_across_gateways_and_outlives_one(
    server: Server, keys: Path, another_gateway: Callable[..., Running]
) -> None:
    gateways = [another_gateway(api_keys=keys, rates_url=server.url) for _ in range(2)]
    begun = time.monotonic()
    for gateway in gateways:
        gateway.key = KEY
    statuses = [gateways[number % 2].ask("hello", max_tokens=5)[0] for number in range(14)]
    refilled = int((time.monotonic() - begun) / 10) + 1
    assert 6 <= statuses.count(200) <= 6 + refilled
    assert set(statuses) == {200, 429}
    gateways[1].key = OTHER  # a key without a rate asks nobody
    os.kill(gateways[0].gateway.pid, signal.SIGKILL)
    assert gateways[1].ask("hello", max_tokens=5)[0] == 200
    gateways[1].key = KEY
    assert gateways[1].ask("hello", max_tokens=900)[0] in (400, 429)
    server.stop()
    status, _, body = gateways[1].ask("hello", max_tokens=5)
    assert (status, body["error"]["code"]) == (503, "rates_unavailable")
    gateways[1].key = OTHER
    assert gateways[1].ask("hello", max_tokens=5)[0] == 200
