"""HTTP as clients speak it: upgrades, old versions, half-closed connections, other origins, ids, encodings."""

from __future__ import annotations

import gzip
import http.client
import json
import socket
from collections.abc import Callable
from typing import Any

import pytest

from tests.gateway.conftest import Running
from tests.waiting import wait_for

pytestmark = pytest.mark.triton
JSON = {"Content-Type": "application/json"}


def body(text: str = "hello", **fields: Any) -> bytes:
    return json.dumps({"model": "qwen", "messages": [{"role": "user", "content": text}], **fields}).encode()


def request(target: Running, method: str, path: str, content: bytes | None = None, **headers: str) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", target.gateway.config.port, timeout=60)
    connection.request(method, path, content, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, text


def raw(target: Running, head: str, content: bytes, pieces: int = 1, shut: bool = False) -> bytes:
    """All that comes back to a request written by hand, in some pieces."""
    message = f"{head}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content
    with target.connect() as connection:
        connection.settimeout(60)
        size = -(-len(message) // pieces)
        for start in range(0, len(message), size):
            connection.sendall(message[start : start + size])
        if shut:
            connection.shutdown(socket.SHUT_WR)
        received = b""
        while piece := connection.recv(65536):
            received += piece
        return received


@pytest.mark.parametrize("pieces", [1, 7])
@pytest.mark.parametrize("upgrade", ["h2c", "TLS/1.0", "websocket"])
def test_an_upgrade_that_is_not_served_is_ignored(obedient: Running, upgrade: str, pieces: int) -> None:
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings, close\r\n"
        f"Upgrade: {upgrade}\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA"
    )
    answer = raw(obedient, head, body(), pieces)
    assert answer.startswith(b"HTTP/1.1 200")
    assert b'"content":"hello"' in answer


def test_an_upgrade_with_a_chunked_body_is_ignored(obedient: Running) -> None:
    content = body()
    with obedient.connect() as connection:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close, Upgrade\r\nUpgrade: h2c\r\n"
        head += "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        chunks = [content[:20], content[20:]]
        connection.sendall(
            head.encode() + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in chunks) + b"0\r\n\r\n"
        )
        assert connection.recv(20).startswith(b"HTTP/1.1 200")


def test_two_upgrades_on_one_connection_are_both_answered(obedient: Running) -> None:
    content = body()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n"
    one = f"{head}Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content
    with obedient.connect() as connection:
        connection.settimeout(60)
        connection.sendall(one + one)
        received = b""
        while received.count(b'"content":"hello"') < 2:
            received += connection.recv(65536)
        assert received.count(b"HTTP/1.1 200") == 2


@pytest.mark.parametrize("stream", [True, False])
def test_http_1_0_gets_no_chunk_sizes(obedient: Running, stream: bool) -> None:
    answer = raw(obedient, "POST /v1/chat/completions HTTP/1.0", body(stream=stream))
    head, _, content = answer.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    if stream:
        assert content.startswith(b"data: {")
        assert content.endswith(b"data: [DONE]\n\n")
    else:
        assert json.loads(content)["choices"][0]["message"]["content"] == "hello"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_has_shut_its_sending_half_is_answered(obedient: Running, stream: bool) -> None:
    answer = raw(obedient, "POST /v1/chat/completions HTTP/1.1\r\nHost: x", body(stream=stream), shut=True)
    while answer.startswith(b"HTTP/1.1 102"):  # a busy machine is slow: the client is asked whether it is there
        answer = answer.partition(b"\r\n\r\n")[2]
    assert answer.startswith(b"HTTP/1.1 200")
    assert (b"[DONE]" if stream else b'"content":"hello"') in answer


def test_one_that_waits_long_is_asked_whether_it_is_still_there(obedient: Running) -> None:
    text = "/again 600 a"
    answer = raw(obedient, "POST /v1/chat/completions HTTP/1.1\r\nHost: x", body(text, max_tokens=400), shut=True)
    assert b"HTTP/1.1 102" in answer
    assert b"HTTP/1.1 200" in answer


def test_one_that_has_gone_is_noticed(obedient: Running) -> None:
    content = body("/hang", max_tokens=400)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
    with obedient.connect() as connection:
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
        assert wait_for(lambda: obedient.metric("trtqwen_gateway_in_flight") >= 1, 60)
    assert wait_for(lambda: obedient.metric("trtqwen_gateway_in_flight") == 0, 60)


def test_heads_methods_slashes_and_prefixes(another_gateway: Callable[..., Running]) -> None:
    target = another_gateway(path_prefix="/llm", trusted_proxies=("127.0.0.1",))
    for path in ("/v1/models", "/v1/models/", "//v1//models", "/llm/v1/models", "/v1/models/qwen", "/health", "/"):
        status, headers, content = request(target, "HEAD", path)
        assert (status, content) == (200, b""), path
        assert "x-request-id" in headers
    assert request(target, "GET", "/api/v1/models", x_forwarded_prefix="/api")[0] == 200
    status, headers, _ = request(target, "GET", "/v1/chat/completions")
    assert (status, headers["allow"]) == (405, "OPTIONS, POST")
    assert request(target, "DELETE", "/v1/models")[1]["allow"] == "GET, HEAD, OPTIONS"
    status, _, content = request(target, "POST", "/v1/embeddings", b"{}")
    assert (status, "makes no embeddings" in json.loads(content)["error"]["message"]) == (404, True)
    assert "/v1/chat/completions" in json.loads(request(target, "POST", "/v1/chat", b"{}")[2])["error"]["message"]


def test_bodies_say_what_is_wrong_with_them(obedient: Running) -> None:
    def ask(content: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
        status, _, text = request(obedient, "POST", "/v1/chat/completions", content, **(JSON | headers))
        return status, json.loads(text)["error"]

    status, error = ask(gzip.compress(body()), Content_Encoding="gzip")
    assert (status, "'gzip'" in error["message"]) == (415, True)
    status, error = ask(b'{"model":"qwen","messages":[{"role":"user","content":"\xff"}]}')
    assert (status, error["code"], "UTF-8" in error["message"]) == (400, "invalid_json", True)
    status, error = ask(b"[" * 100_000)
    assert (status, error["code"]) == (400, "invalid_json")
    assert ask(body(), Content_Type="text/plain")[0] == 415


def test_ids_come_back_and_go_with_the_answer(obedient: Running) -> None:
    _, headers, content = request(obedient, "POST", "/v1/chat/completions", body(), X_Request_Id="trace-7", **JSON)
    assert headers["x-request-id"] == "trace-7"
    assert json.loads(content)["id"].startswith("chatcmpl-trace-7-")
    _, headers, _ = request(obedient, "POST", "/v1/chat/completions", b"{", X_Request_Id="e-1", **JSON)
    assert headers["x-request-id"] == "e-1"
    assert len(request(obedient, "GET", "/v1/models")[1]["x-request-id"]) == 32
    assert obedient.chat("hi")._request_id


def test_pages_of_other_origins(another_gateway: Callable[..., Running], tmp_path: Any) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text("keys: [{name: a, key: sk-0123456789abcdef}]")
    target = another_gateway(allowed_origins=("https://chat.example.com",), api_keys=keys)
    asks = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization"}
    good = {"Origin": "https://chat.example.com"}
    status, headers, _ = request(target, "OPTIONS", "/v1/chat/completions", None, **good, **asks)
    assert (status, headers["access-control-allow-origin"]) == (200, good["Origin"])
    assert request(target, "OPTIONS", "/v1/chat/completions", None, Origin="http://localhost:3000", **asks)[0] == 400
    status, headers, _ = request(target, "POST", "/v1/chat/completions", body(), **good, **JSON)
    assert (status, headers["access-control-allow-origin"]) == (401, good["Origin"])
    assert headers["www-authenticate"] == "Bearer"
    assert request(target, "GET", "/v1/models", X_Api_Key="sk-0123456789abcdef")[0] == 200


def test_unknown_fields_are_told_refused_or_ignored(another_gateway: Callable[..., Running]) -> None:
    for setting, status in (("warn", 200), ("ignore", 200), ("refuse", 400)):
        target = another_gateway(unknown_fields=setting)
        found, headers, content = request(
            target, "POST", "/v1/chat/completions", body(max_token=5, tools=[], é=1, stream_options={"x": 1}), **JSON
        )
        assert found == status
        told = headers.get("x-trtqwen-ignored")
        assert told == ("max_token, %C3%A9, stream_options.x" if setting == "warn" else None)
        if setting == "refuse":
            error = json.loads(content)["error"]
            assert (error["code"], error["param"]) == ("unknown_field", "max_token")
            assert "did you mean 'max_tokens'" in error["message"]
