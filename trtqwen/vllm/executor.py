"""A running vLLM with the interface of the embedded executor: requests in, tokens out, statistics, an end."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import threading
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from trtqwen.artifact import read_manifest
from trtqwen.diagnostics import EngineError, TrtQwenError
from trtqwen.engine.config import EngineConfig, read_engine_config
from trtqwen.executor.config import ExecutorConfig
from trtqwen.executor.executor import OnResponse, collect_all
from trtqwen.executor.request import FinishReason, IterationStats, Request, Response
from trtqwen.facts.vllm import vllm_facts
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.layout import TOKENIZER_DIRECTORY
from trtqwen.system.processes import resident_bytes
from trtqwen.vllm.answer import Answer
from trtqwen.vllm.request import completion_body, end_id
from trtqwen.vllm.server import VllmServer

START_SECONDS = 1800.0  # large models compile for minutes
STALL_SECONDS = 300.0
_ASK_SECONDS = 10.0
_WATCH_PERIOD = 0.5
T = TypeVar("T")


class VllmExecutor:
    """A running vLLM. Thread-safe; use as a context manager or call `shutdown`.

    Callbacks run on the thread of its event loop: they must be quick and must not raise.

    Args:
        verify: read every file of the engine and compare its digest; otherwise only sizes are compared.
        stall_seconds: a vLLM that sends no token for so long while requests wait counts as dead.

    Raises:
        InputError: if the directory is not a finished engine.
        EngineError: if the engine is for another backend, or vLLM does not start or serves another model.
    """

    def __init__(
        self,
        engine: Path,
        config: ExecutorConfig | None = None,
        *,
        verify: bool = True,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        read_manifest(engine, "engine", digests=verify)
        self.engine_config: EngineConfig = read_engine_config(engine)
        if self.engine_config.backend != "vllm":
            raise EngineError(f"{engine}: is of backend {self.engine_config.backend}", "serve it with that backend")
        self._config = config or ExecutorConfig()
        self._tokenizer = Tokenizer(engine / TOKENIZER_DIRECTORY)
        self._stall_seconds = stall_seconds
        self._lock = threading.Lock()
        self._death: str | None = None
        self._running: dict[str, tuple[OnResponse, asyncio.Future[None] | None]] = {}
        self._heard = time.monotonic()
        self._stats = IterationStats(max_blocks=1)
        self._server = VllmServer(engine, self.engine_config, self._config)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        try:
            self._session = self._wait(self._open(), None)
            self._facts = vllm_facts(self._server.release)
        except BaseException:
            self.shutdown()
            raise
        self._watching = asyncio.run_coroutine_threadsafe(self._watch(), self._loop)

    def submit(self, request: Request, on_response: OnResponse) -> None:
        """Send a request; its responses come to `on_response`, the last with a finish reason.

        Raises:
            RequestError: if vLLM cannot do what it asks for, or the queue is full.
            EngineError: if vLLM has died or the id is in flight already.
        """
        body = completion_body(
            request,
            self._server.served_name,
            self.engine_config.build_config.max_seq_len,
            self._facts,
            self._tokenizer,
        )
        with self._lock:
            if self._death is not None:
                raise EngineError(f"the engine has stopped ({self._death})", "start the server again")
            if request.id in self._running:
                raise EngineError(f"request id {request.id!r} is in flight already", "use a new one")
            limit = self._config.max_queue_size
            if limit and len(self._running) >= self.engine_config.build_config.max_batch_size + limit:
                raise EngineError(f"Maximum queue size of {limit} has been reached, please try again later")
            if not self._running:
                self._heard = time.monotonic()
            self._running[request.id] = (on_response, None)
        self._loop.call_soon_threadsafe(self._begin, request, body)

    def cancel(self, request_id: str) -> None:
        """End a request; it answers with finish reason `CANCELLED` unless it has ended already."""
        self._loop.call_soon_threadsafe(self._cancel, request_id)

    def generate(self, requests: Sequence[Request]) -> list[list[Response]]:
        """Run requests together and wait for all; each one's responses in order."""
        return collect_all(self.submit, requests)

    @property
    def alive(self) -> bool:
        """Whether requests are served."""
        return self._death is None

    @property
    def resident_bytes(self) -> int:
        """Memory of vLLM's processes; 0 for one at an address."""
        return 0 if self._server.pid is None else resident_bytes(self._server.pid)

    def stats(self) -> IterationStats:
        """vLLM's own account, from its metrics.

        Raises:
            EngineError: if it has died.
        """
        if self._death is not None:
            raise EngineError(f"the engine has stopped ({self._death})", "start the server again")
        # Whether it is dead, `_watch` decides.
        with suppress(aiohttp.ClientError, TimeoutError, concurrent.futures.TimeoutError):
            self._stats = read_stats(self._wait(self._get("/metrics"), _ASK_SECONDS), self._stats)
        return self._stats

    def shutdown(self) -> None:
        """Stop vLLM; requests in flight end with an error. May be called again."""
        self._die("it was shut down")
        if self._loop.is_running():
            asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            if self._thread is not threading.current_thread():
                self._thread.join()
        self._server.stop()

    def __enter__(self) -> VllmExecutor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    async def _open(self) -> aiohttp.ClientSession:
        """Connect, wait until vLLM is ready, and check what it serves."""
        self._session = session = aiohttp.ClientSession(
            connector=self._server.connector(), timeout=aiohttp.ClientTimeout(total=None), read_bufsize=1 << 20
        )
        deadline = time.monotonic() + (START_SECONDS if self._server.pid else _ASK_SECONDS)
        while not await self._healthy():
            if end := self._server.end():
                raise EngineError(end, "see vLLM's output above")
            if time.monotonic() > deadline:
                raise EngineError(f"{self._server.url}: no vLLM answers", "start it, or correct engine.vllm.address")
            await asyncio.sleep(0.1)
        self._server.release = json.loads(await self._get("/version"))["version"]
        await self._check_model()
        return session

    async def _check_model(self) -> None:
        listed = json.loads(await self._get("/v1/models"))["data"]
        name, url = self._server.served_name, self._server.url
        serving = {str(entry["id"]): entry for entry in listed}
        if name not in serving:
            raise EngineError(
                f"{url}: serves {', '.join(serving)}, not {name}",
                "correct engine.vllm.served_name, or start vLLM there under that name",
            )
        longest, needed = serving[name].get("max_model_len"), self.engine_config.build_config.max_seq_len
        if isinstance(longest, int) and longest < needed:
            raise EngineError(
                f"{url}: serves {longest} tokens a request, the engine's max_seq_len is {needed}",
                "start vLLM there with a longer context, or build with a smaller max_seq_len",
            )
        text = "The tokenizer's fingerprint: 你好, Ünïcode 12345"
        async with self._session.post(
            f"{url}/tokenize", json={"model": name, "prompt": text, "add_special_tokens": False}
        ) as answer:
            content = await answer.json() if answer.status == 200 else {}
        if content.get("tokens", self._tokenizer.encode(text)) != self._tokenizer.encode(text):
            raise EngineError(f"{url}: serves a model with another tokenizer", "correct engine.vllm.address")

    async def _healthy(self) -> bool:
        try:
            await self._get("/health")
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False
        return True

    async def _get(self, path: str) -> str:
        timeout = aiohttp.ClientTimeout(total=_ASK_SECONDS)
        async with self._session.get(f"{self._server.url}{path}", timeout=timeout) as answer:
            answer.raise_for_status()
            return await answer.text()

    def _begin(self, request: Request, body: dict[str, Any]) -> None:
        if request.id in self._running:
            on_response, _ = self._running[request.id]
            task = self._loop.create_task(self._run(request, body, on_response))
            self._running[request.id] = (on_response, task)

    def _cancel(self, request_id: str) -> None:
        entry = self._running.pop(request_id, None)
        if entry is not None:
            on_response, task = entry
            if task is not None:
                task.cancel()  # the connection closes, and vLLM frees the request's blocks
            on_response(Response(request_id=request_id, finish_reason=FinishReason.CANCELLED))

    async def _run(self, request: Request, body: dict[str, Any], on_response: OnResponse) -> None:
        answer = Answer(request, end_id(request, self._tokenizer), self.engine_config.build_config.tokens_per_block)
        last: Response | None = None
        error = "vLLM closed the connection before the answer was complete"
        try:
            url = f"{self._server.url}/v1/completions"
            async with self._session.post(url, json=body) as reply:
                if reply.status != 200:
                    error = _reason(await reply.text())
                else:
                    async for pieces in _events(reply, answer):
                        self._heard = time.monotonic()
                        response = _response(answer, pieces)
                        if response is None:
                            continue
                        if response.finish_reason is None:
                            self._deliver(request.id, response, on_response)
                            continue
                        last = response
                        if pieces[2] is None or "stream_options" not in body:
                            break  # else what the request used comes behind its last token
                if last is not None:
                    self._deliver(request.id, answer.with_metrics(last), on_response)
                    return
        except aiohttp.ClientError as problem:
            error = f"vLLM does not answer ({problem or type(problem).__name__})"
        except TrtQwenError as problem:
            error = problem.what
        except asyncio.CancelledError:
            return
        # A process that dies takes its connections along a little earlier than its exit is seen.
        for _ in range(20):
            if (end := self._server.end()) is not None:
                self._die(end)
                return
            await asyncio.sleep(0.05 if self._server.pid and "vLLM" in error else 0)
        self._deliver(
            request.id, Response(request_id=request.id, finish_reason=FinishReason.ERROR, error=error), on_response
        )

    def _deliver(self, request_id: str, response: Response, on_response: OnResponse) -> bool:
        """Hand a response on; whether it was the request's last."""
        if request_id not in self._running:
            return True
        final = response.finish_reason is not None
        if final:
            with self._lock:
                del self._running[request_id]
        on_response(response)
        return final

    async def _watch(self) -> None:
        """Notice when vLLM ends or hangs."""
        while self._death is None:
            await asyncio.sleep(_WATCH_PERIOD)
            if (end := self._server.end()) is not None:
                self._die(end)
            elif self._running and time.monotonic() - self._heard > self._stall_seconds:
                self._die(f"vLLM sent no token for {self._stall_seconds:g} s while requests waited")

    def _die(self, reason: str) -> None:
        """Answer whoever waits with an error. The first reason counts."""
        with self._lock:
            if self._death is not None:
                return
            self._death = reason
            orphans, self._running = self._running, {}
        error = f"the engine has stopped ({reason})"
        for request_id, (on_response, _) in orphans.items():
            on_response(Response(request_id=request_id, finish_reason=FinishReason.ERROR, error=error))

    async def _close(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if hasattr(self, "_session"):
            await self._session.close()

    def _wait(self, work: Coroutine[Any, Any, T], timeout: float | None) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout)


Event = tuple[list[int], list[float], "str | None"]


async def _events(reply: aiohttp.ClientResponse, answer: Answer) -> AsyncGenerator[Event, None]:
    """The pieces of a stream: token ids, log probabilities and finish reason of the events that came together."""
    buffer = b""
    async for data in reply.content.iter_any():
        buffer += data
        *events, buffer = buffer.split(b"\n\n")
        ids: list[int] = []
        log_probs: list[float] = []
        finish: str | None = None
        for event in events:
            text = event.removeprefix(b"data:").strip()
            if not text or text == b"[DONE]" or not event.startswith(b"data:"):
                continue
            content = json.loads(text)
            if "error" in content:
                raise EngineError(_reason(text.decode("utf-8", "replace")))
            details = (content.get("usage") or {}).get("prompt_tokens_details") or {}
            answer.reused_tokens = details.get("cached_tokens") or answer.reused_tokens
            for choice in content.get("choices", ()):
                ids += choice.get("token_ids") or ()
                log_probs += (choice.get("logprobs") or {}).get("token_logprobs") or ()
                finish = choice.get("finish_reason") or finish
        if ids or finish:
            yield ids, log_probs, finish


def _response(answer: Answer, pieces: Event) -> Response | None:
    ids, log_probs, finish = pieces
    if finish in ("abort", "error"):
        raise EngineError(f"vLLM ended the request with {finish}")
    return answer.take(ids, log_probs, finish)


def _reason(text: str) -> str:
    """The message of an error as vLLM writes it, or the start of what came in its place."""
    try:
        content = json.loads(text)
        return f"vLLM refuses the request: {content.get('error', content)['message']}"
    except (ValueError, KeyError, TypeError):
        return f"vLLM refuses the request: {text.strip()[:200] or 'it gives no reason'}"


def read_stats(metrics: str, before: IterationStats) -> IterationStats:
    """The executor's account from vLLM's metrics, summed over its engines.

    Args:
        before: the account before, for what only grows.
    """
    values: dict[str, float] = {}
    blocks, block_size = 0, 1
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name == "vllm:cache_config_info":
                blocks = int(_number(sample.labels.get("num_gpu_blocks")))
                block_size = int(_number(sample.labels.get("block_size"))) or 1
            elif sample.name.startswith("vllm:"):
                values[sample.name] = values.get(sample.name, 0.0) + sample.value

    def value(name: str) -> int:
        return int(values.get(f"vllm:{name}", 0))

    active = value("num_requests_running")
    usage = values.get("vllm:kv_cache_usage_perc", 0.0)
    return IterationStats(
        iterations=value("iteration_tokens_total_count"),
        context_tokens=value("prompt_tokens_total"),
        generation_tokens=value("generation_tokens_total"),
        active=active,
        waiting=value("num_requests_waiting"),
        max_active=max(active, before.max_active),
        paused=value("num_preemptions_total"),
        used_blocks=round(usage * max(0, blocks - 1)),
        max_blocks=max(1, blocks - 1),
        reused_blocks=value("prefix_cache_hits_total") // block_size,
        generation_requests=active,
    )


def _number(text: str | None) -> float:
    try:
        return float(text or 0)
    except ValueError:
        return 0.0
