"""CPU time for each token of the gateway's own code: python scripts/bench_stream_cost.py

Streams chats through the gateway's application in this process. A stub in place of gRPC hands it Triton's messages,
and its server's `send` drops the frames: what is left out, the network and gRPC, costs more and varies more than a
change of the code does. `bench_gateway.py` measures the whole. To compare two trees, run it in both, alternately.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
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
from trtqwen.triton.repository import write_repository

_PATH = "/v1/chat/completions"


def message(*token_ids: int) -> Any:
    """Triton's message with new tokens."""
    response = service_pb2.ModelStreamInferResponse()
    response.infer_response.outputs.add(name="output_ids", datatype="INT32", shape=[1, 1, len(token_ids)])
    response.infer_response.raw_output_contents.append(np.array(token_ids, np.int32).tobytes())
    return response


class Call:
    """A gRPC stream whose messages are there already."""

    def __init__(self, tokens: int) -> None:
        self._left = tokens
        self._message = message(40)

    async def read(self) -> Any:
        await asyncio.sleep(0)
        self._left -= 1
        return self._message if self._left >= 0 else grpc.aio.EOF

    def cancel(self) -> None:
        pass


class Stub:
    """In place of Triton's; each request gets this many tokens."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens

    def ModelStreamInfer(self, requests: Any, timeout: float, metadata: Any) -> Call:
        return Call(self._tokens)


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
    app = create_app(config, connect=lambda address: Replica(address, Stub(tokens)))
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
