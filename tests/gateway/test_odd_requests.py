"""Requests that are legal and rare: as other languages, proxies, benchmarks and agents write them."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from tests.gateway.conftest import Running
from tests.gateway.test_http import body, request

pytestmark = pytest.mark.triton
USER = {"role": "user", "content": "hello"}
CALL = {"id": "1", "type": "function", "function": {"name": "mcp__files__read", "arguments": ""}}
TOOL = {"type": "function", "function": {"name": "f", "description": None, "parameters": {}, "strict": None}}
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"


def exchange(target: Running, *pieces: bytes) -> bytes:
    """What comes back to bytes that are sent in pieces, each when something has come back to the one before."""
    with socket.create_connection(("127.0.0.1", target.gateway.config.port), timeout=60) as connection:
        received = b""
        for number, piece in enumerate(pieces):
            connection.sendall(piece)
            if number < len(pieces) - 1:
                received += connection.recv(65536)
        while part := connection.recv(65536):
            received += part
    return received


def sized(content: bytes, head: bytes = HEAD) -> bytes:
    return head + b"Content-Length: %d\r\n\r\n" % len(content) + content


def test_a_client_that_expects_100_is_told_to_go_on(obedient: Running) -> None:
    head = HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body())
    answer = exchange(obedient, head, body())
    assert answer.startswith(b"HTTP/1.1 100 ")
    assert b"HTTP/1.1 200 " in answer


@pytest.mark.parametrize(
    ("message", "answers"),
    [
        (
            HEAD
            + b"Transfer-Encoding: chunked\r\n\r\n"
            + b"".join(b"1;x=y\r\n%c\r\n" % byte for byte in body())
            + b"0\r\nX-Trailer: 1\r\n\r\n",
            1,
        ),
        (sized(body(), HEAD.replace(b"Connection: close\r\n", b"")) * 3 + sized(body()), 4),
        (sized(body(), HEAD.upper().replace(b"POST /V1/CHAT/COMPLETIONS", b"POST /v1/chat/completions")), 1),
        (b"\r\nGET http://x/v1/models HTTP/1.1\r\nHost: x\r\nConnection: TE, close\r\nTE: trailers\r\n\r\n", 1),
        (b"GET /v1/models HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", 1),
    ],
    ids=["chunk extensions", "pipelined", "capitals", "absolute form", "HTTP/1.0"],
)
def test_odd_http_is_answered(obedient: Running, message: bytes, answers: int) -> None:
    assert exchange(obedient, message).count(b" 200 OK\r\n") == answers


@pytest.mark.parametrize("kind", ['Application/JSON; charset="utf-8"', "application/vnd.api+json"])
@pytest.mark.parametrize("path", ["//v1//chat/completions/", "/v1/chat/completions?api-version=2024-10-21"])
def test_paths_and_types_have_many_spellings(obedient: Running, path: str, kind: str) -> None:
    assert request(obedient, "POST", path, b"\xef\xbb\xbf" + body(), Content_Type=kind)[0] == 200


CHATS: list[dict[str, Any]] = [
    {"max_tokens": 16.0, "temperature": 1, "n": 1.0, "top_p": 1},
    {"stream": False, "stream_options": {"include_usage": True}},
    {"stream": None, "stream_options": None, "stop": [], "tools": [], "tool_choice": "auto"},
    {"logprobs": False, "top_logprobs": 0, "response_format": {"type": "text"}, "parallel_tool_calls": True},
    {"tools": [TOOL, TOOL], "tool_choice": None},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": None}}]},
    {"reasoning_effort": "high", "verbosity": "low", "store": True, "metadata": {"a": "b"}, "service_tier": "auto"},
    {"truncation_side": "left", "stream_interval": 1, "vllm_xargs": None, "thinking": {"type": "disabled"}},
]
HISTORIES: list[list[Any]] = [
    [{"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "1", "content": []}],
    [{"role": "assistant", "content": None, "tool_calls": None, "function_call": None, "audio": None}],
    [{"role": "assistant", "content": [], "tool_calls": [], "refusal": None, "annotations": []}],
    [{"role": "assistant", "content": "a", "reasoning": "b", "reasoning_details": [{"type": "x"}]}],
    [{"role": "system", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]}],
    [{"role": "developer", "content": "a"}, {"role": "user", "content": "", "name": "Ann Lee"}],
]


def test_chats_of_many_clients_are_answered(obedient: Running) -> None:
    for fields in CHATS:
        status, _, answer = obedient.ask("hello", **fields)
        assert status == 200, (fields, answer)
        assert answer["choices"][0]["message"]["content"] == "hello"
    for history in HISTORIES:
        status, _, answer = obedient.ask("", messages=[USER, *history, USER])
        assert (status, answer["choices"][0]["message"]["content"]) == (200, "hello"), (history, answer)


PROMPT = {"prompt": "Hello", "temperature": 0.0, "best_of": 1, "max_tokens": 4, "ignore_eos": True}
MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
BENCHMARKS: list[tuple[str, dict[str, Any]]] = [  # bodies as the clients write them
    ("/v1/completions", {"prompt": "Hello", "repetition_penalty": 1.0, "max_tokens": 4, "logprobs": None, **USAGE}),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_completion_tokens": 4, "ignore_eos": True, **USAGE}),
    ("/v1/responses", {"input": "Hello", "max_output_tokens": 4, "ignore_eos": True, "stream": True}),
    ("/v1/completions", {**PROMPT, "use_beam_search": False, "top_p": 1.0, "top_k": -1}),
    ("/v1/completions", {**PROMPT, "stream": True}),
    ("/v1/completions", {**PROMPT, "return_logprob": False, "logprob_start_len": -1, "lora_path": None}),
    (
        "/generate_stream",
        {
            **{"accumulate_tokens": True, "text_input": "Hello", "temperature": 0.000001, "top_p": 1.0},
            **{"max_tokens": 4, "stream": True, "min_length": 4, "end_id": 1048576},
        },
    ),
]


def test_benchmarks_run_with_their_own_bodies(live: Running) -> None:
    for path, fields in BENCHMARKS:
        status, _, text = live.post(path, {"model": "qwen", **fields})
        assert status == 200, (path, fields, text)
        if path == "/generate_stream":
            assert text.count("data: {") >= 1  # though the end token is none of the model's
        elif "stream_options" in fields:
            [*_, last, done] = [line for line in text.splitlines() if line]
            least = 4 if "ignore_eos" in fields else 1
            assert least <= json.loads(last[6:])["usage"]["completion_tokens"] <= 4
            assert done == "data: [DONE]"
