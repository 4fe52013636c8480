"""Clients of a load test: Triton's gRPC and OpenAI's HTTP, both with prompts as token ids."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import aiohttp
import grpc
import numpy as np
from tritonclient.grpc import service_pb2_grpc

from trtqwen.bench.workload import Ask
from trtqwen.diagnostics import ServerError
from trtqwen.triton.messages import ANY_SIZE, infer_request, output_arrays
from trtqwen.triton.streams import read_rest_async

Api = Literal["grpc", "completions"]
OnPiece = Callable[[int], None]
_NO_END = -1


@dataclass(frozen=True)
class Target:
    """The server under load. It is sent to the processes of the load generator.

    Attributes:
        url: `host:port` of Triton's gRPC, or `http://host:port` of a server with OpenAI's routes.
        model: what the server calls the model; for gRPC the Triton model.
        api_key: sent to HTTP servers as a bearer token.
        timeout: seconds for one answer.
        ignore_eos: generate past the end token, so that every answer has the requested length.
        keep: keep token ids, log probabilities and text of the answers.
        stop_ids: token ids that end an answer if `ignore_eos` is off.
        token_ids: whether an HTTP server can send the ids of its tokens, as vLLM can.
        vocab_size: of the model, padding included; gRPC needs it to bias logits.
    """

    url: str
    api: Api
    model: str
    api_key: str | None = None
    timeout: float = 600
    ignore_eos: bool = True
    keep: bool = False
    stop_ids: tuple[int, ...] = ()
    token_ids: bool = False
    vocab_size: int = 0


@dataclass
class Outcome:
    """A complete answer."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    text: str = ""


class Endpoint(Protocol):
    """An open connection to a target."""

    async def generate(self, ask: Ask, on_piece: OnPiece, bias: dict[int, float] | None = None) -> Outcome:
        """Send a request, call `on_piece` with the number of tokens of each piece, and return the whole answer.

        Raises:
            ServerError: if the server refuses, fails or cannot be reached.
        """

    async def close(self) -> None: ...


def api_of(url: str) -> Api:
    """The protocol that an address stands for."""
    return "completions" if url.startswith(("http://", "https://")) else "grpc"


async def connect(target: Target) -> Endpoint:
    """Return a client for the target's protocol. It connects with its first request."""
    return GrpcEndpoint(target) if target.api == "grpc" else HttpEndpoint(target)


class GrpcEndpoint:
    """Triton's model `tensorrt_llm`: token ids in and out."""

    def __init__(self, target: Target) -> None:
        self._target = target
        options = [ANY_SIZE, ("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.aio.insecure_channel(target.url, options)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    async def generate(self, ask: Ask, on_piece: OnPiece, bias: dict[int, float] | None = None) -> Outcome:
        target, ids = self._target, np.array([ask.token_ids], np.int32)
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "input_lengths": np.array([[ids.size]], np.int32),
            "request_output_len": np.array([[ask.max_tokens]], np.int32),
            "streaming": np.array([[True]]),
            "end_id": np.array([[_NO_END]], np.int32),
        }
        if not target.ignore_eos and target.stop_ids:
            inputs["end_id"] = np.array([[target.stop_ids[0]]], np.int32)
        if target.keep:
            inputs["return_log_probs"] = np.array([[True]])
        if bias:
            inputs["embedding_bias"] = _dense(bias, target.vocab_size)
        outcome = Outcome(prompt_tokens=len(ask.token_ids))
        request = infer_request(target.model, uuid.uuid4().hex, inputs)
        call = self._stub.ModelStreamInfer(_once(request), timeout=target.timeout)
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                if message.error_message:
                    await read_rest_async(call)
                    raise ServerError(f"{target.url}: {message.error_message}")
                count = _count(message.infer_response)
                if count:
                    on_piece(count)
                    outcome.output_tokens += count
                    if target.keep:
                        self._keep(outcome, output_arrays(message.infer_response))
        except grpc.RpcError as problem:
            raise ServerError(f"{target.url}: {problem.code().name}: {problem.details()}") from None
        finally:
            call.cancel()
        return outcome

    @staticmethod
    def _keep(outcome: Outcome, arrays: Any) -> None:
        outcome.token_ids += arrays["output_ids"].reshape(-1).tolist()
        outcome.log_probs += arrays.get("output_log_probs", np.zeros(0)).reshape(-1).tolist()

    async def close(self) -> None:
        await self._channel.close()


def _dense(bias: dict[int, float], vocab_size: int) -> Any:
    values = np.zeros((1, vocab_size), np.float32)
    values[0, list(bias)] = list(bias.values())
    return values


def _count(response: Any) -> int:
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        if output.name == "output_ids":
            return len(raw) // 4
    return 0


async def _once(request: Any) -> AsyncIterator[Any]:
    yield request


class HttpEndpoint:
    """OpenAI's `/v1/completions` with token ids as the prompt, streamed."""

    def __init__(self, target: Target) -> None:
        self._target = target
        headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=target.timeout),
            read_bufsize=1 << 20,
        )

    async def generate(self, ask: Ask, on_piece: OnPiece, bias: dict[int, float] | None = None) -> Outcome:
        target = self._target
        body: dict[str, Any] = {
            "model": target.model,
            "prompt": list(ask.token_ids),
            "max_tokens": ask.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": target.ignore_eos,
        }
        if target.token_ids:
            body["return_token_ids"] = True
        if target.keep:
            body["logprobs"] = 0
        if bias:
            body["logit_bias"] = {str(token): value for token, value in bias.items()}
        outcome = Outcome(prompt_tokens=len(ask.token_ids))
        try:
            async with self._session.post(f"{target.url}/v1/completions", json=body) as answer:
                if answer.status != 200:
                    raise ServerError(f"{target.url}: status {answer.status}: {_reason(await answer.text())}")
                await self._read(answer, outcome, on_piece)
        except aiohttp.ClientError as problem:
            raise ServerError(f"{target.url}: {problem or type(problem).__name__}") from None
        except TimeoutError:
            raise ServerError(f"{target.url}: no whole answer within {target.timeout:g} s") from None
        return outcome

    async def _read(self, answer: aiohttp.ClientResponse, outcome: Outcome, on_piece: OnPiece) -> None:
        told = False
        async for line in answer.content:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                break
            event = json.loads(data)
            if "error" in event:
                raise ServerError(f"{self._target.url}: {_reason(data.decode('utf-8', 'replace'))}")
            for choice in event.get("choices", ()):
                ids = choice.get("token_ids") or ()
                if ids or choice.get("text"):
                    on_piece(len(ids))
                    outcome.output_tokens += 0 if told else len(ids)
                    if self._target.keep:
                        self._keep(outcome, choice, ids)
            usage = event.get("usage")
            if usage:
                told = True
                outcome.prompt_tokens = usage["prompt_tokens"]
                outcome.output_tokens = usage["completion_tokens"]

    @staticmethod
    def _keep(outcome: Outcome, choice: dict[str, Any], ids: Any) -> None:
        outcome.text += choice.get("text") or ""
        outcome.token_ids += ids
        outcome.log_probs += (choice.get("logprobs") or {}).get("token_logprobs") or ()

    async def close(self) -> None:
        await self._session.close()


def _reason(text: str) -> str:
    """Return the message of an error in OpenAI's format, or the start of the body if it has another format."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text.strip()[:200] or "no reason given"
