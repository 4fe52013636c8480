"""Chats and plain generation over a WebSocket, by a plain client on wsproto."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    CloseConnection,
    Event,
    Ping,
    RejectConnection,
    Request,
    TextMessage,
)

from tests.gateway.conftest import Running, access_log
from tests.waiting import GENEROUS, wait_for
from trtqwen.gateway.api.websocket import _send

pytestmark = pytest.mark.triton


class Client:
    """A WebSocket that waits for what comes next."""

    def __init__(self, target: Running, path: str, headers: dict[str, str]) -> None:
        self._socket: socket.socket = target.connect()
        self._socket.settimeout(60)
        self._connection = WSConnection(ConnectionType.CLIENT)
        extra = [(name.encode(), value.encode()) for name, value in headers.items()]
        self._send(Request(host=f"127.0.0.1:{target.gateway.config.port}", target=path, extra_headers=extra))
        self._events = self._incoming()
        self.first = next(self._events)

    def ask(self, **body: Any) -> None:
        self._send(TextMessage(data=json.dumps(body)))

    def messages(self) -> Iterator[Any]:
        """JSON messages up to `[DONE]`."""
        while True:
            message = self.message()
            if message == "[DONE]":
                return
            yield json.loads(message)

    def message(self) -> str:
        text = ""
        for event in self._events:
            assert isinstance(event, TextMessage), event
            text += event.data
            if event.message_finished:
                return text
        raise AssertionError("the connection ended")

    def close(self) -> None:
        self._socket.close()

    def _send(self, event: Event) -> None:
        self._socket.sendall(self._connection.send(event))

    def _incoming(self) -> Iterator[Event]:
        while data := self._socket.recv(65536):
            self._connection.receive_data(data)
            for event in self._connection.events():
                if isinstance(event, Ping):
                    self._send(event.response())
                else:
                    yield event


@pytest.fixture
def connect() -> Iterator[Callable[..., Client]]:
    clients: list[Client] = []

    def opened(target: Running, path: str = "/v1/chat/completions", **headers: str) -> Client:
        clients.append(Client(target, path, headers))
        return clients[-1]

    yield opened
    for client in clients:
        client.close()


def asked(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": "qwen", "messages": [{"role": "user", "content": text}], **fields}


def test_chats_come_one_after_another(obedient: Running, connect: Callable[..., Client]) -> None:
    client = connect(obedient)
    assert isinstance(client.first, AcceptConnection)
    for text in ("hello", "again hello"):
        client.ask(**asked(text))
        chunks = list(client.messages())
        assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == text
    client.ask(**asked("x", temperature="warm"))
    error = json.loads(client.message())["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", "temperature")
    client.ask(**asked("/break oops"))
    assert "oops" in [json.loads(client.message()) for _ in range(3)][-1]["error"]["message"]
    client.ask(**asked("still here"))
    assert list(client.messages())


def test_plain_generation(obedient: Running, connect: Callable[..., Client]) -> None:
    client = connect(obedient, "/generate_stream")
    client.ask(text_input="hello", max_tokens=60)
    text = ""
    while text != "hello":
        text += json.loads(client.message())["text_output"]


def test_a_client_that_goes_frees_its_place(obedient: Running, connect: Callable[..., Client]) -> None:
    client = connect(obedient)
    client.ask(**asked("/hang", max_tokens=400))
    assert wait_for(lambda: obedient.metric("trtqwen_gateway_in_flight") >= 1)
    client.close()
    assert wait_for(lambda: obedient.metric("trtqwen_gateway_in_flight") == 0)


def test_a_client_that_goes_as_an_event_is_sent_is_noticed() -> None:
    """The answer's task ends also where the cancellation meets a message that has just gone out."""

    class Socket:
        async def send_text(self, text: str) -> None:
            asyncio.get_running_loop().call_soon(answers[0].cancel)

    async def frames() -> AsyncGenerator[bytes, None]:
        yield b"data: one\n\n"
        await asyncio.get_running_loop().create_future()  # an engine that is silent

    async def test() -> None:
        socket: Any = Socket()
        answers.append(asyncio.ensure_future(_send(socket, frames())))
        await asyncio.wait(answers, timeout=GENEROUS)
        assert answers[0].cancelled()

    answers: list[asyncio.Task[None]] = []
    asyncio.run(test())


def test_keys_rates_and_origins_hold(
    another_gateway: Callable[..., Running],
    connect: Callable[..., Client],
    tmp_path: Path,
) -> None:
    with access_log(tmp_path / "access.log") as entries:
        keys = tmp_path / "keys.yaml"
        keys.write_text("keys: [{name: a, key: sk-0123456789abcdef, requests_per_minute: 1}]")
        target = another_gateway(api_keys=keys, allowed_origins=("https://chat.example.com",))
        assert isinstance(connect(target).first, (RejectConnection, CloseConnection))
        key = {"authorization": "Bearer sk-0123456789abcdef"}
        assert isinstance(
            connect(target, origin="https://evil.example", **key).first, (RejectConnection, CloseConnection)
        )
        client = connect(target, origin="https://chat.example.com", **key)
        client.ask(**asked("hello"))
        assert list(client.messages())
        client.ask(**asked("hello"))
        assert json.loads(client.message())["error"]["code"] == "rate_limit_exceeded"
        assert wait_for(lambda: len(entries()) == 4)  # two refused connections, and two messages
        assert [(line["method"], line["key"], line["status"]) for line in entries()] == [
            ("WEBSOCKET", None, 401),
            ("WEBSOCKET", "a", 403),
            ("WEBSOCKET", "a", 200),
            ("WEBSOCKET", "a", 429),
        ]
        assert entries()[2]["output_tokens"] > 0
