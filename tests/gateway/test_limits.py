"""Keys, rates, sizes, queues, deadlines: what is too much is refused early, in order, and says when to come back.

One gateway has all limits at once, and a second replica that does not exist.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.gateway.conftest import Running, quick_gateway
from tests.gateway.deaths import LONG
from tests.waiting import wait_for
from trtqwen.triton.server import TritonServer

pytestmark = pytest.mark.triton
ALICE, BOB, CAROL = "sk-alice-0123456789", "sk-bob-01234567890", "sk-carol-0123456789"
KEYS = f"""\
keys:
  - {{name: alice, key: {ALICE}}}
  - {{name: bob, key: {BOB}, requests_per_minute: 2, tokens_per_minute: 5000}}
  - {{name: carol, key: {CAROL}, tokens_per_minute: 100}}
"""
LIMITS = {
    **{"max_body_bytes": 2000, "max_header_bytes": 4096, "body_seconds": 1, "max_choices": 2},
    **{"default_max_tokens": 5, "max_tokens": 460, "kv_cache_tokens": 470, "max_queued_requests": 1},
    **{"queue_seconds": 1.5, "probe_seconds": 0.5, "stall_seconds": 1.5, "request_seconds": 30},
}
HEAD = (
    "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    f"Authorization: Bearer {ALICE}\r\n"
)


@pytest.fixture(scope="module")
def limited(
    stand_in_repository: Path, stand_in_triton: TritonServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    keys = tmp_path_factory.mktemp("keys") / "keys.yaml"
    keys.write_text(KEYS)
    replicas = (stand_in_triton.grpc_url, "127.0.0.1:9")
    with quick_gateway(
        stand_in_triton, stand_in_repository, forked=False, api_keys=keys, triton=replicas, **LIMITS
    ) as running:
        yield replace(running, key=ALICE)


@contextmanager
def busy(target: Running) -> Iterator[None]:
    """While the block runs, an answer that does not come takes up nearly the whole cache."""
    body = {"model": "qwen", "messages": [{"role": "user", "content": "/hang"}], "max_tokens": 440}
    content = json.dumps(body).encode()
    with target.connect() as connection:
        connection.sendall(f"{HEAD}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        assert wait_for(lambda: target.metric("trtqwen_gateway_in_flight") == 1)
        yield
        connection.shutdown(socket.SHUT_RDWR)
    assert wait_for(lambda: target.metric("trtqwen_gateway_in_flight") == 0)


def raw(target: Running, content: bytes) -> bytes:
    """Whatever comes back for these bytes, until the server closes."""
    answer = b""
    with target.connect() as connection:
        try:
            connection.sendall(content)
            while part := connection.recv(65536):
                answer += part
        except ConnectionError:
            pass
    return answer


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", f"Basic {ALICE}", f"Bearer {ALICE[:-1]}\xff"])
def test_without_a_key_nothing_is_answered(limited: Running, header: str | None) -> None:
    headers = {"Authorization": header or ""}
    for path, body in (("/v1/chat/completions", {}), ("/generate", {}), ("/v1/completions", b"{broken")):
        status, _, text = limited.post(path, body, headers)
        assert (status, json.loads(text)["error"]["type"]) == (401, "authentication_error")
    assert [limited.get(path)[0] for path in ("/health", "/ready", "/metrics")] == [200] * 3


def test_keys_have_rates(limited: Running) -> None:
    assert [limited.ask("hello")[0] for _ in range(4)] == [200] * 4
    bob, carol = replace(limited, key=BOB), replace(limited, key=CAROL)
    for _ in range(2):
        bob.chat("hello")
    with pytest.raises(openai.RateLimitError, match="rate of requests is used up") as caught:
        bob.chat("hello")
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 30
    assert carol.ask("hello", max_tokens=60)[0] == 200
    status, headers, body = carol.ask("hello", max_tokens=60)
    assert (status, body["error"]["code"]) == (429, "rate_limit_exceeded")
    assert "retry-after" in headers
    status, _, body = carol.ask("hello", max_tokens=300)
    assert (status, "more than the key's rate ever allows" in body["error"]["message"]) == (400, True)
    assert "sk-" not in json.dumps(body)


def test_large_bodies_and_headers_are_refused(limited: Running) -> None:
    status, _, text = limited.post("/v1/chat/completions", b" " * 2001)
    assert (status, json.loads(text)["error"]["code"]) == (413, "body_too_large")
    status, _, text = limited.post("/v1/chat/completions", {}, {"X-Long": "x" * 5000})
    assert (status, json.loads(text)["error"]["code"]) == (431, "headers_too_large")
    chunks = (b"64\r\n" + b" " * 100 + b"\r\n") * 30
    assert raw(limited, f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode() + chunks).startswith(b"HTTP/1.1 413")
    assert raw(limited, HEAD.encode() + b"X: " + b"x" * 300_000).startswith(b"HTTP/1.1 431")
    assert raw(limited, b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize(("rest", "answer"), [("Content-Length: 100\r\n\r\nslow", b"HTTP/1.1 408"), ("", b"")])
def test_slow_clients_are_not_waited_for(limited: Running, rest: str, answer: bytes) -> None:
    begun = time.monotonic()
    got = raw(limited, f"{HEAD}{rest}".encode())
    assert got[: len(answer)] == answer
    assert bool(got) == bool(answer)  # headers that do not end get no answer at all
    assert time.monotonic() - begun < 30


def test_limits_of_answers_have_a_default_and_a_cap(limited: Running) -> None:
    assert limited.ask(LONG)[2]["usage"]["completion_tokens"] == 5
    assert limited.ask("hi", max_tokens=461)[2]["error"]["message"] == "max_tokens is 461; this server allows 460"
    assert "one request may have 2 answers" in limited.ask("hi", n=3)[2]["error"]["message"]
    status, _, body = limited.ask("hello " * 5, max_tokens=460)
    assert (status, body["error"]["code"]) == (400, "kv_cache_exceeded")


def test_an_answer_without_a_limit_gets_what_the_cache_has_room_for(another_gateway: Any) -> None:
    target = another_gateway(kv_cache_tokens=64)
    assert target.ask("/again 90 abc ")[2]["usage"]["total_tokens"] == 64
    status, _, body = target.ask("abc " * 40)
    assert (
        status,
        "maximum context length is 64 tokens, as its KV cache holds no more" in body["error"]["message"],
    ) == (400, True)


def test_who_got_no_place_keeps_the_tokens_of_the_rate(another_gateway: Any, tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(
        KEYS.replace("tokens_per_minute: 5000", "tokens_per_minute: 900").replace("minute: 2,", "minute: 99,")
    )
    settings = {"api_keys": keys, "kv_cache_tokens": 470, "max_queued_requests": 0, "max_queued_tokens": 0}
    target = replace(another_gateway(**settings), key=ALICE)
    with busy(target):
        refused = [replace(target, key=BOB).ask("hello", max_tokens=400) for _ in range(5)]
    assert {body["error"]["code"] for _, _, body in refused} == {"queue_full"}
    for _ in range(5):
        assert replace(target, key=BOB).ask("hello", max_tokens=400, n=2)[2]["error"]["code"] == "too_much"
    assert replace(target, key=BOB).ask("hello", max_tokens=400)[0] == 200


def test_who_does_not_fit_waits_and_the_next_is_refused(limited: Running) -> None:
    refused = limited.metric("trtqwen_gateway_refused_total")
    answers: list[Any] = []
    with busy(limited):
        second = threading.Thread(target=lambda: answers.append(limited.ask("hello", max_tokens=400)))
        second.start()
        assert wait_for(lambda: limited.metric("trtqwen_gateway_queued") == 1)
        assert limited.metric("trtqwen_gateway_queued_tokens") > 400
        status, headers, body = limited.ask("hello", max_tokens=400)
        assert (status, body["error"]["code"], body["error"]["type"]) == (429, "queue_full", "rate_limit_error")
        assert 1 <= int(headers["retry-after"]) <= 60
    second.join()
    assert answers[0][2]["choices"][0]["message"]["content"] == "hello"
    assert limited.metric("trtqwen_gateway_refused_total") == refused + 2  # the second was the one that left


def test_trailers_have_a_limit_too(limited: Running) -> None:
    """Nobody reads them, and a route that asks for no key would take them forever."""
    head = b"POST /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
    with limited.connect() as connection, pytest.raises(ConnectionError):
        connection.sendall(head)
        for _ in range(100):
            connection.sendall(b"X-A: %s\r\n" % (b"x" * 1000))
            time.sleep(0.01)
    assert limited.get("/health")[0] == 200


def test_connections_that_are_reset_leave_nothing(limited: Running) -> None:
    def reset(count: int) -> None:
        for _ in range(count):
            with limited.connect() as connection:
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                connection.recv(1)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    reset(300)
    memory = limited.resident_mb
    reset(2000)  # at 5 kB each, if the server kept them
    assert limited.resident_mb < memory + 5


def test_bodies_that_cannot_be_read_count_as_requests(limited: Running, another_gateway: Any, tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(KEYS)
    target = replace(another_gateway(api_keys=keys), key=BOB)
    assert [target.post("/v1/chat/completions", b"{")[0] for _ in range(4)] == [400, 400, 429, 429]


def test_a_long_prompt_is_no_sign_of_death(another_gateway: Any) -> None:
    """The engine is silent for 3 s, and may be: it has 400 tokens to read, at 100 a second or better."""
    target = another_gateway(probe_seconds=0.5, prompt_tokens_per_second=100)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(target.ask, f"/sleep 3 {'word ' * 80}", max_tokens=5) for _ in range(2)]
        until = time.monotonic() + 2.5
        while time.monotonic() < until:
            assert target.get("/ready")[0] == 200
            time.sleep(0.1)
        assert [answer.result()[0] for answer in asked] == [200, 200]


def test_who_waits_inside_the_engine_is_not_stalled(another_gateway: Any) -> None:
    target = another_gateway(stall_seconds=1, probe_seconds=0.5, request_seconds=3)
    begun = time.monotonic()
    status, _, body = target.ask("/hang", n=2)
    assert (status, body["error"]["code"]) == (504, "timeout")  # its deadline, not a second of silence
    assert time.monotonic() - begun > 2.5


def test_a_stop_whose_time_is_over_sends_the_queue_away(another_gateway: Any) -> None:
    target = another_gateway(drain_seconds=1, kv_cache_tokens=470, max_queued_tokens=5000)
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(target.ask, "/hang", max_tokens=440, stream=number > 2) for number in range(4)]
        assert wait_for(lambda: target.metric("trtqwen_gateway_queued") == 3)
        os.kill(target.gateway.pid, signal.SIGTERM)
        answers = [answer.result() for answer in asked]
    assert [(status, body["error"]["code"]) for status, _, body in answers] == [(503, "stopping")] * 4
    assert target.gateway.stop() == 0


def test_a_turn_that_does_not_come_is_429(limited: Running) -> None:
    with busy(limited):
        status, headers, body = limited.ask("hello", max_tokens=400)
        assert (status, body["error"]["code"]) == (429, "queue_timeout")
        assert "retry-after" in headers


def test_a_client_that_leaves_the_queue_loses_its_place(limited: Running) -> None:
    body = {"model": "qwen", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 400}
    content = json.dumps(body).encode()
    with busy(limited):
        with limited.connect() as connection:
            connection.sendall(f"{HEAD}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            assert wait_for(lambda: limited.metric("trtqwen_gateway_queued") == 1)
            connection.shutdown(socket.SHUT_RDWR)
        assert wait_for(lambda: limited.metric("trtqwen_gateway_queued") == 0)
    assert limited.metric("trtqwen_gateway_in_flight_tokens") == 0


def test_a_wedged_engine_is_not_ready_and_its_answers_end(limited: Running) -> None:
    """And the replica that never was there got no request in any of these tests."""
    assert limited.metric("trtqwen_gateway_replica_up") == 1
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(limited.ask("/sleep 4")))
    asking.start()
    assert wait_for(lambda: limited.get("/ready")[0] == 503)
    asking.join()
    assert (answers[0][0], answers[0][2]["error"]["code"]) == (504, "stalled")
    assert wait_for(lambda: limited.get("/ready")[0] == 200)
