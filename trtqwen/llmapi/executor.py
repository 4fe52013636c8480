"""TensorRT-LLM's LLM API with the interface of the embedded executor.

Traps of the API that are handled here: an answer's tokens are cumulative, and only new ones are passed on; without a
seed all requests use seed 0, so each request's own is sent; `max_tokens` is 32 unless it is sent; the end id is part
of the tokens in some releases and not in others.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from trtqwen.artifact import read_manifest
from trtqwen.diagnostics import EngineError, RequestError
from trtqwen.engine.config import EngineConfig, read_engine_config
from trtqwen.executor.config import ExecutorConfig
from trtqwen.executor.executor import OnResponse, collect_all
from trtqwen.executor.request import FinishReason, IterationStats, Request, Response
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.layout import HF_MODEL, TOKENIZER_DIRECTORY
from trtqwen.llmapi.settings import arguments
from trtqwen.system.host import read_host
from trtqwen.system.processes import resident_bytes
from trtqwen.vllm.answer import Answer

_STATS_SECONDS = 0.1
_TOLD = ("return_log_probs", "return_perf_metrics")


class LlmApiExecutor:
    """A running LLM. Thread-safe; use as a context manager or call `shutdown`.

    Callbacks run on the thread of its event loop: they must be quick and must not raise.

    Raises:
        InputError: if the directory is not a finished engine.
        EngineError: if TensorRT-LLM is not installed, does not know a setting, or does not start.
    """

    def __init__(self, engine: Path, config: ExecutorConfig | None = None, *, verify: bool = True) -> None:
        read_manifest(engine, "engine", digests=verify)
        self.engine_config: EngineConfig = read_engine_config(engine)
        if self.engine_config.backend != "llmapi":
            raise EngineError(f"{engine}: is of backend {self.engine_config.backend}", "serve it with that backend")
        self._config = config or ExecutorConfig()
        self._tokenizer = Tokenizer(engine / TOKENIZER_DIRECTORY)
        self._lock = threading.Lock()
        self._death: str | None = None
        self._running: dict[str, tuple[OnResponse, Any]] = {}
        self._stats = IterationStats(max_blocks=1)
        self._api = _import()
        names = [gpu.name for gpu in read_host().visible_gpus]
        given = arguments(self.engine_config, self._config, engine / HF_MODEL, _version(), names)
        if "quant_config" in given:
            given["quant_config"] = self._api.QuantConfig(**given["quant_config"])
        try:
            self._llm = self._api.LLM(**given)
        except Exception as problem:  # whatever TensorRT-LLM raises
            raise EngineError(f"{engine}: the LLM API did not start: {problem}", "see its output above") from None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_response: OnResponse) -> None:
        """Send a request; its responses come to `on_response`, the last with a finish reason.

        Raises:
            RequestError: if the LLM API cannot do what it asks for, or the queue is full.
            EngineError: if it has died or the id is in flight already.
        """
        build = self.engine_config.build_config
        params = sampling_params(
            self._api, request, build.max_seq_len, self.engine_config.pretrained_config.vocab_size, self._tokenizer
        )
        with self._lock:
            if self._death is not None:
                raise EngineError(f"the engine has stopped ({self._death})", "start the server again")
            if request.id in self._running:
                raise EngineError(f"request id {request.id!r} is in flight already", "use a new one")
            limit = self._config.max_queue_size
            if limit and len(self._running) >= build.max_batch_size + limit:
                raise EngineError(f"Maximum queue size of {limit} has been reached, please try again later")
            self._running[request.id] = (on_response, None)
        asyncio.run_coroutine_threadsafe(self._run(request, params), self._loop)

    def cancel(self, request_id: str) -> None:
        """End a request; it answers with finish reason `CANCELLED` unless it has ended already."""
        with self._lock:
            entry = self._running.pop(request_id, None)
        if entry is not None:
            on_response, output = entry
            if output is not None:
                output.abort()
            on_response(Response(request_id=request_id, finish_reason=FinishReason.CANCELLED))

    def generate(self, requests: Sequence[Request]) -> list[list[Response]]:
        """Run requests together and wait for all; each one's responses in order."""
        return collect_all(self.submit, requests)

    @property
    def alive(self) -> bool:
        """Whether requests are served."""
        return self._death is None

    @property
    def resident_bytes(self) -> int:
        """Memory of this process and the LLM's workers."""
        return resident_bytes(os.getpid())

    def stats(self) -> IterationStats:
        """The LLM's own account of its last step.

        Raises:
            EngineError: if it has died.
        """
        if self._death is not None:
            raise EngineError(f"the engine has stopped ({self._death})", "start the server again")
        try:
            steps = self._llm.get_stats(timeout=_STATS_SECONDS)
        except Exception as problem:  # whatever TensorRT-LLM raises
            self._die(f"the LLM API tells no statistics: {problem}")
            raise EngineError(f"the engine has stopped ({self._death})", "start the server again") from None
        if steps:
            last = steps[-1]
            self._stats = read_stats(json.loads(last) if isinstance(last, str) else last, self._stats)
        elif not self._running:
            self._stats = self._stats.model_copy(update={"active": 0, "waiting": 0, "generation_requests": 0})
        return self._stats

    def shutdown(self) -> None:
        """Stop the LLM; requests in flight end with an error. May be called again."""
        self._die("it was shut down")
        if self._loop.is_running():
            self._loop.call_soon_threadsafe(self._loop.stop)
            if self._thread is not threading.current_thread():
                self._thread.join()
            self._llm.shutdown()

    def __enter__(self) -> LlmApiExecutor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    async def _run(self, request: Request, params: Any) -> None:
        end = request.end_id
        if end is None and request.guided_decoding is not None:
            end = self._tokenizer.end_id
        answer, seen = Answer(request, end, self.engine_config.build_config.tokens_per_block), 0
        try:
            output = self._llm.generate_async(list(request.input_token_ids), sampling_params=params, streaming=True)
            with self._lock:
                if request.id not in self._running:
                    output.abort()
                    return
                on_response, _ = self._running[request.id]
                self._running[request.id] = (on_response, output)
            async for part in output:
                [one] = part.outputs
                ids, log_probs, seen = _new(one, seen)
                response = answer.take(ids, log_probs, one.finish_reason)
                if response is not None and response.finish_reason is not None:
                    answer.reused_tokens = _reused_blocks(one) * self.engine_config.build_config.tokens_per_block
                    response = answer.with_metrics(response)
                if response is not None and self._deliver(request.id, response):
                    if not part.finished:
                        output.abort()
                    return
            error = "the LLM API ended the answer without a reason"
        except Exception as problem:  # whatever TensorRT-LLM raises
            error = f"the LLM API fails: {problem}"
        self._deliver(request.id, Response(request_id=request.id, finish_reason=FinishReason.ERROR, error=error))

    def _deliver(self, request_id: str, response: Response) -> bool:
        """Hand a response on; whether it was the request's last."""
        final = response.finish_reason is not None
        with self._lock:
            entry = (self._running.pop if final else self._running.get)(request_id, None)
        if entry is None:
            return True
        entry[0](response)
        return final

    def _die(self, reason: str) -> None:
        with self._lock:
            if self._death is not None:
                return
            self._death = reason
            orphans, self._running = self._running, {}
        for request_id, (on_response, output) in orphans.items():
            if output is not None:
                output.abort()
            error = f"the engine has stopped ({reason})"
            on_response(Response(request_id=request_id, finish_reason=FinishReason.ERROR, error=error))


def sampling_params(api: Any, request: Request, max_seq_len: int, vocab_size: int, tokenizer: Tokenizer) -> Any:
    """The request as `SamplingParams`.

    Args:
        api: the package `tensorrt_llm`.

    Raises:
        RequestError: naming the tensor, if the LLM API cannot do what the request asks for.
    """
    room = max_seq_len - len(request.input_token_ids)
    if room < 1:
        raise RequestError(
            f"Prompt length ({len(request.input_token_ids)}) exceeds maximum input length ({max_seq_len - 1})",
            "shorten the prompt or build the engine with a larger max_seq_len",
        )
    for name in type(request.output).model_fields:
        if name not in _TOLD and getattr(request.output, name):
            raise RequestError(f"{name}: is not served by the LLM API", "leave the tensor out")
    sampling = request.sampling
    fields: dict[str, Any] = {
        "max_tokens": min(request.max_tokens, room),
        "seed": sampling.seed,
        "detokenize": False,
        "add_special_tokens": False,
        "exclude_input_from_output": True,
    }
    if sampling.greedy:
        fields["top_k"] = 1
    else:
        fields |= {"temperature": sampling.temperature, "top_k": sampling.top_k or None}
        fields |= {"top_p": sampling.top_p or None, "min_p": sampling.min_p or None}
    for name, neutral in (("repetition_penalty", 1.0), ("presence_penalty", 0.0), ("frequency_penalty", 0.0)):
        if (value := getattr(sampling, name)) != neutral:
            fields[name] = value
    if sampling.min_tokens:
        fields["min_tokens"] = sampling.min_tokens
    end = request.end_id
    if request.guided_decoding is not None:
        end = tokenizer.end_id if end is None else end
        fields["guided_decoding"] = _guide(api, request)
    fields |= {"ignore_eos": True} if end is None else {"end_id": end, "pad_id": end}
    stops = [word[0] for word in request.stop_words if len(word) == 1]
    if stops:
        fields["stop_token_ids"] = stops
    if request.output.return_log_probs:
        fields["logprobs"] = 1
    if request.output.return_perf_metrics:
        fields["return_perf_metrics"] = True
    if request.bad_words:
        if any(len(word) > 1 for word in request.bad_words):
            raise RequestError("bad_words_list: the LLM API forbids single tokens", "send words of one token")
        fields["bad_token_ids"] = [word[0] for word in request.bad_words]
    if request.embedding_bias:
        fields["embedding_bias"] = _bias(request.embedding_bias, vocab_size)
    return api.SamplingParams(**fields)


def _bias(bias: Mapping[int, float], vocab_size: int) -> Any:
    import torch

    values = np.zeros(vocab_size, np.float32)
    values[list(bias)] = list(bias.values())
    return torch.from_numpy(values)


def _guide(api: Any, request: Request) -> Any:
    guided = request.guided_decoding
    assert guided is not None
    make: Callable[..., Any] = api.llmapi.GuidedDecodingParams
    if guided.guide_type == "json":
        return make(json_object=True)
    if guided.guide_type == "json_schema":
        return make(json=guided.guide)
    if guided.guide_type == "regex":
        return make(regex=guided.guide)
    if guided.guide_type == "ebnf_grammar":
        return make(grammar=guided.guide)
    return make(structural_tag=guided.guide)


def _new(output: Any, seen: int) -> tuple[list[int], list[float], int]:
    """The tokens since the part before, with their log probabilities, and how many there are now."""
    ids, given = list(output.token_ids), list(output.logprobs or [])
    new = ids[seen:]
    values = given[seen:] if len(given) == len(ids) else given[-len(new) :] if new else []
    log_probs = [
        float(value) if isinstance(value, (int, float)) else float(value[token].logprob)
        for token, value in zip(new, values, strict=False)
    ]
    return new, log_probs, len(ids)


def _reused_blocks(output: Any) -> int:
    """KV cache blocks of the prompt that were computed before, if the LLM tells."""
    metrics = getattr(output, "request_perf_metrics", None)
    cache = getattr(metrics, "kv_cache_metrics", None)
    return int(getattr(cache, "num_reused_blocks", 0) or 0)


def read_stats(step: Mapping[str, Any], before: IterationStats) -> IterationStats:
    """The executor's account from one step's statistics."""
    cache = step.get("kvCacheStats") or {}
    batching = step.get("inflightBatchingStats") or {}
    active = int(step.get("numActiveRequests", 0))
    return IterationStats(
        iterations=int(step.get("iter", before.iterations)),
        active=active,
        waiting=int(step.get("numQueuedRequests", 0)),
        max_active=max(active, before.max_active),
        used_blocks=int(cache.get("usedNumBlocks", 0)),
        max_blocks=max(1, int(cache.get("maxNumBlocks", before.max_blocks))),
        reused_blocks=int(cache.get("reusedBlocks", 0)),
        context_requests=int(batching.get("numContextRequests", 0)),
        generation_requests=int(batching.get("numGenRequests", 0)),
        step_context_tokens=int(batching.get("numCtxTokens", 0)),
        paused_requests=int(batching.get("numPausedRequests", 0)),
    )


def _import() -> Any:
    try:
        import tensorrt_llm
    except ImportError as problem:
        raise EngineError(
            f"tensorrt_llm cannot be imported ({problem}), but the backend llmapi runs in its process",
            "serve in NVIDIA's image: `trtqwen serve RECIPE --in-container`",
        ) from None
    return tensorrt_llm


def _version() -> str:
    try:
        return metadata.version("tensorrt_llm")
    except metadata.PackageNotFoundError:
        return "1.2.1"
