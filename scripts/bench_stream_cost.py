"""CPU time for each token of the gateway's own code: python scripts/bench_stream_cost.py

Streams chats through the gateway's application in this process. A stub in place of gRPC hands it the messages of
Triton's carrier, and its server's `send` drops the frames: what is left out, the network and gRPC, costs more and
varies more than a change of the code does. `bench_gateway.py` measures the whole. To compare two trees, run it in
both, alternately.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Awaitable, Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import uvloop
from tritonclient.grpc import service_pb2

from trtqwen.checkpoint.convert import plan_conversion, run_conversion
from trtqwen.demo import MODEL
from trtqwen.engine.builder import build_engine
from trtqwen.gateway.app import create_app
from trtqwen.gateway.config import GatewayConfig
from trtqwen.gateway.generation.upstream import Replica
from trtqwen.recipe import CheckpointRecipe, EngineRecipe, ServeRecipe
from trtqwen.triton.messages import infer_response
from trtqwen.triton.repository import write_repository

_TURNS = 4  # of the event loop, from one message to the next
_PATH = "/v1/chat/completions"


def message(outputs: dict[str, Any]) -> Any:
    """Triton's message with output tensors."""
    return service_pb2.ModelStreamInferResponse(infer_response=infer_response(outputs))


class Call:
    """A gRPC stream whose next message comes when the client has had time for the one before.

    Args:
        ready: is awaited before the first one.
    """

    def __init__(self, messages: Iterable[Any], ready: Awaitable[Any]) -> None:
        self._messages = iter(messages)
        self._ready: Awaitable[Any] | None = ready

    async def read(self) -> Any:
        ready, self._ready = self._ready, None
        if ready is not None:
            await ready
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        return next(self._messages, grpc.aio.EOF)

    def cancel(self) -> None:
        pass


class Stub:
    """In place of Triton's: the streams of a round get their tokens on one carrier, a token of each in a message."""

    def __init__(self, streams: int, tokens: int) -> None:
        self._streams, self._tokens = streams, tokens
        self._begin()

    def _begin(self) -> None:
        self._numbers: list[int] = []
        self._all, self._sent = asyncio.Event(), asyncio.Event()

    def ModelStreamInfer(self, requests: Any, timeout: float, metadata: Any) -> Call:
        try:
            requests.__anext__().send(None)  # it never waits
        except StopIteration as item:
            request = item.value
        own = json.loads(request.parameters["trtqwen"].string_param or "{}")
        if "carry" in own:
            self._begin()
            return Call(self._rows(), self._all.wait())
        if "carrier" in own:
            self._numbers.append(own["carrier"][1])
            if len(self._numbers) == self._streams:
                self._all.set()
            return Call([self._tokens_message(self._tokens)], self._sent.wait())
        return Call([self._tokens_message(1)], asyncio.sleep(0))  # a probe

    def _rows(self) -> Iterator[Any]:
        rows = message({"output_ids": np.array([[(number, 40) for number in self._numbers]], np.int32)})
        for _ in range(self._tokens - 1):
            yield rows
        self._sent.set()

    def _tokens_message(self, total: int) -> Any:
        return message({"output_ids": np.array([[[40]]], np.int32), "sequence_length": np.array([[total]], np.int32)})


async def stream(app: Any, body: bytes) -> int:
    """Send one request; returns the number of frames."""
    frames = 0
    asked = False

    async def receive() -> Any:
        nonlocal asked
        if asked:
            await asyncio.Event().wait()
        asked = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(event: Any) -> None:
        nonlocal frames
        frames += 1
        assert event.get("status", 200) == 200, event

    headers = [(b"host", b"x"), (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    scope = {
        **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http"},
        **{"path": _PATH, "raw_path": _PATH.encode(), "query_string": b"", "root_path": "", "headers": headers},
        **{"client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2), "state": {"server_send": send}},
    }
    await app(scope, receive, send)
    return frames


async def measure(repository: Path, streams: int, tokens: int, rounds: int) -> float:
    """Microseconds for each token, in the best round."""
    config = GatewayConfig(repository=repository, triton=("127.0.0.1:9",), model_name="bench")
    app = create_app(config, connect=lambda address: Replica(address, Stub(streams, tokens)))
    content = {"model": "bench", "stream": True, "max_tokens": tokens, "messages": [{"role": "user", "content": "a"}]}
    body, best = json.dumps(content).encode(), float("inf")
    async with app.router.lifespan_context(app):
        await asyncio.sleep(1)  # for the probe that finds the engine working
        for _ in range(rounds):
            begun = time.process_time()
            frames = await asyncio.gather(*(stream(app, body) for _ in range(streams)))
            best = min(best, (time.process_time() - begun) / streams / tokens * 1e6)
            assert min(frames) > tokens
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1500, help="of each stream")
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    limits = {"max_batch_size": options.streams, "max_num_tokens": 4096, "max_seq_len": 2048}
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        run_conversion(plan_conversion(MODEL, CheckpointRecipe(dtype="float32")), home / "checkpoint")
        build_engine(home / "checkpoint", EngineRecipe(backend="torch", **limits), home / "engine")
        write_repository(home / "engine", ServeRecipe(), home / "repository")
        cost = uvloop.run(measure(home / "repository", options.streams, options.tokens, options.rounds))
    print(json.dumps({"gateway_code_us_per_token": round(cost, 2)}))


if __name__ == "__main__":
    main()
