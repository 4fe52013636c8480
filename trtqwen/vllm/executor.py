"""A running vLLM with the interface of the embedded executor."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from trtqwen.diagnostics import EngineError
from trtqwen.executor.config import ExecutorConfig
from trtqwen.executor.request import IterationStats, Request
from trtqwen.facts.vllm import check_release, vllm_facts
from trtqwen.recipe import VllmSettings
from trtqwen.relay.answer import Piece
from trtqwen.relay.executor import STALL_SECONDS, RelayExecutor
from trtqwen.system.processes import resident_bytes
from trtqwen.vllm.request import completion_body
from trtqwen.vllm.server import VllmPlace

_ASK_SECONDS = 10.0
_OWN_SECONDS = 60.0  # a vLLM that was started here may be slow on a busy machine: `serve` watches it
_POLL_SECONDS = 0.1
_STATS_SECONDS = 0.25  # vLLM's metrics are long: asking more often costs both sides a share of a core
_FINGERPRINT = "The tokenizer's fingerprint: 你好, Ünïcode 12345"


class VllmExecutor(RelayExecutor[dict[str, Any]]):
    """A connection to a running vLLM. Thread-safe; use as a context manager or call `shutdown`.

    Args:
        place: of a vLLM that `VllmServer` starts; waits for it without a limit. None is the address in the engine's
            settings, which has to answer within ten seconds.
        verify, stall_seconds: see `RelayExecutor`.

    Raises:
        InputError: if the directory is not a finished engine.
        EngineError: if the engine is for another backend, or vLLM does not answer or serves another model.
    """

    def __init__(
        self,
        engine: Path,
        config: ExecutorConfig | None = None,
        *,
        place: VllmPlace | None = None,
        verify: bool = True,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        super().__init__(engine, config, "vllm", verify=verify, stall_seconds=stall_seconds)
        self._settings = self.engine_config.vllm or VllmSettings()
        self._place = place
        self._asked = 0.0
        self._session: aiohttp.ClientSession | None = None
        try:
            if place is None and self._settings.address is None:
                raise EngineError(
                    "vLLM is not started by the Triton model",
                    "serve the repository with `trtqwen serve`, or set engine.vllm.address in the recipe",
                )
            self._url = "http://vllm" if place is not None else str(self._settings.address)
            self._where = "vLLM" if place is not None else self._url
            release = self._wait(self._connect())
            check_release(release)
            self._facts = vllm_facts(release)
        except BaseException:
            self.shutdown()
            raise
        self._watch()

    @property
    def resident_bytes(self) -> int:
        """Memory of vLLM's processes; 0 for one at an address."""
        pid = self._place.pid if self._place is not None else None
        return 0 if pid is None else resident_bytes(pid)

    async def _connect(self) -> str:
        """Connect, wait until vLLM is ready, and check what it serves; returns its release."""
        # No connection is used twice: vLLM closes one that has idled for 5 seconds, and a request that is sent on it
        # at that moment would fail.
        connector = (
            aiohttp.UnixConnector(str(self._place.socket), limit=0, force_close=True)
            if self._place is not None
            else aiohttp.TCPConnector(limit=0, force_close=True)
        )
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=aiohttp.ClientTimeout(total=None), read_bufsize=1 << 20
        )
        deadline = time.monotonic() + _ASK_SECONDS
        while not await self._healthy():
            if self._place is None and time.monotonic() > deadline:
                raise EngineError(f"{self._where}: no vLLM answers", "start it, or correct engine.vllm.address")
            await asyncio.sleep(_POLL_SECONDS)
        try:
            release = str((await self._get_json("/version"))["version"])
            await self._check_model((await self._get_json("/v1/models"))["data"])
        except (aiohttp.ClientError, asyncio.TimeoutError, ValueError, KeyError, TypeError):
            raise EngineError(f"{self._where}: does not answer as vLLM does", "correct engine.vllm.address") from None
        return release

    async def _check_model(self, listed: list[dict[str, Any]]) -> None:
        name, where = self._settings.served_name, self._where
        serving = {str(entry["id"]): entry for entry in listed}
        if name not in serving:
            raise EngineError(
                f"{where}: serves {', '.join(serving)}, not {name}",
                "correct engine.vllm.served_name, or start vLLM there under that name",
            )
        longest, needed = serving[name].get("max_model_len"), self.engine_config.build_config.max_seq_len
        if isinstance(longest, int) and longest < needed:
            raise EngineError(
                f"{where}: serves {longest} tokens per request, but the engine's max_seq_len is {needed}",
                "start vLLM there with a longer context, or build with a smaller max_seq_len",
            )
        body = {"model": name, "prompt": _FINGERPRINT, "add_special_tokens": False}
        async with self._open.post(f"{self._url}/tokenize", json=body) as answer:
            content = await answer.json() if answer.status == 200 else {}
        expected = self._tokenizer.encode(_FINGERPRINT)
        if content.get("tokens", expected) != expected:
            raise EngineError(f"{where}: serves a model with another tokenizer", "correct engine.vllm.address")

    @property
    def _open(self) -> aiohttp.ClientSession:
        assert self._session is not None
        return self._session

    async def _healthy(self) -> bool:
        try:
            await self._get("/health")
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError):
            return False
        return True

    async def _get(self, path: str) -> str:
        timeout = aiohttp.ClientTimeout(total=_ASK_SECONDS if self._place is None else _OWN_SECONDS)
        async with self._open.get(f"{self._url}{path}", timeout=timeout) as answer:
            answer.raise_for_status()
            return await answer.text()

    async def _get_json(self, path: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(await self._get(path))
        return content

    def _prepare(self, request: Request) -> dict[str, Any]:
        limit = self.engine_config.build_config.max_seq_len
        return completion_body(request, self._settings, limit, self._facts, self._tokenizer)

    async def _pieces(self, request: Request, prepared: dict[str, Any]) -> AsyncGenerator[Piece, None]:
        """Closing the generator closes the connection, and vLLM frees the request's blocks."""
        try:
            async with self._open.post(f"{self._url}/v1/completions", json=prepared) as reply:
                if reply.status != 200:
                    raise EngineError(_reason(await reply.text()))
                last: Piece | None = None
                async for piece in _events(reply):
                    if last is not None:
                        last = replace(last, reused_tokens=piece.reused_tokens)
                    elif piece.finish is not None and "stream_options" in prepared:
                        last = piece  # what the request used comes behind its last token
                    else:
                        yield piece
                if last is not None:
                    yield last
        except aiohttp.ClientError as problem:
            raise EngineError(f"vLLM does not answer ({problem or type(problem).__name__})") from None
        raise EngineError("vLLM closed the connection before the answer was complete")

    async def _alive_after(self, error: str) -> str | None:
        try:
            await self._get("/health")
        except asyncio.TimeoutError:
            return None  # it may be busy: the watchdog decides
        except aiohttp.ClientConnectionError:
            return error
        except aiohttp.ClientError:
            return f"vLLM calls itself unhealthy: {error}"
        return None

    def _read_stats(self, before: IterationStats) -> IterationStats:
        """Return vLLM's statistics, from its metrics. Waits for an answer, but not after its end."""
        now = time.monotonic()
        if now - self._asked < _STATS_SECONDS:
            return before
        while self._death is None:
            try:
                text = self._wait(self._get("/metrics"))
            except (asyncio.TimeoutError, concurrent.futures.CancelledError):
                continue
            except aiohttp.ClientResponseError:
                return before
            except aiohttp.ClientError as problem:
                self._die(f"vLLM does not answer ({problem or type(problem).__name__})")
                break
            self._asked = now
            return read_stats(text, before)
        return before

    def _stop_engine(self) -> None:
        """Do nothing: `serve` stops vLLM."""

    async def _close(self) -> None:
        if self._session is not None:
            await self._session.close()


async def _events(reply: aiohttp.ClientResponse) -> AsyncIterator[Piece]:
    """Yield the pieces of a stream; events that arrive together become one piece."""
    buffer = b""
    async for data in reply.content.iter_any():
        buffer += data
        *events, buffer = buffer.split(b"\n\n")
        ids: list[int] = []
        log_probs: list[float] = []
        top: list[list[tuple[int, float]]] = []
        finish: str | None = None
        reused = 0
        for event in events:
            text = event.removeprefix(b"data:").strip()
            if not text or text == b"[DONE]" or not event.startswith(b"data:"):
                continue
            content = json.loads(text)
            if "error" in content:
                raise EngineError(_reason(text.decode("utf-8", "replace")))
            details = (content.get("usage") or {}).get("prompt_tokens_details") or {}
            reused = details.get("cached_tokens") or reused
            for choice in content.get("choices", ()):
                ids += choice.get("token_ids") or ()
                told = choice.get("logprobs") or {}
                log_probs += told.get("token_logprobs") or ()
                top += [_likeliest(place) for place in told.get("top_logprobs") or ()]
                finish = choice.get("finish_reason") or finish
        if finish in ("abort", "error"):
            raise EngineError(f"vLLM ended the request with {finish}")
        if ids or finish or reused:
            yield Piece(ids, log_probs, finish, reused, top)


def _likeliest(place: dict[str, float] | None) -> list[tuple[int, float]]:
    """Tokens as `token_id:5` with their log probabilities, the most likely first; without ids they count as none."""
    named = [(name.partition("token_id:"), value) for name, value in (place or {}).items()]
    found = [(int(text), value) for (_, is_id, text), value in named if is_id]
    return sorted(found, key=lambda entry: -entry[1])


def _reason(text: str) -> str:
    """Return the message of an error in vLLM's format, or the start of the body if it has another format."""
    try:
        content = json.loads(text)
        return f"vLLM refuses the request: {content.get('error', content)['message']}"
    except (ValueError, KeyError, TypeError):
        return f"vLLM refuses the request: {text.strip()[:200] or 'it gives no reason'}"


def read_stats(metrics: str, before: IterationStats) -> IterationStats:
    """Return the executor's statistics from vLLM's metrics, summed over its engines.

    Args:
        before: the previous statistics, for values that only grow.
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
