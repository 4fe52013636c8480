"""TensorRT-LLM's LLM API with the interface of the embedded executor.

Properties of the API that this module handles:

- An answer's tokens are cumulative; only new ones are passed on.
- Without a seed, all requests use seed 0. Each request sends its own seed.
- `max_tokens` is 32 unless it is sent.
- A stop word is cut from the tokens unless `include_stop_str_in_output` is set; clients of Triton expect it.
- The end id is part of the tokens in some releases and not in others.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator, Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from trtqwen.artifact.names import HF_MODEL
from trtqwen.diagnostics import EngineError, RequestError
from trtqwen.executor.config import ExecutorConfig
from trtqwen.executor.request import IterationStats, Request
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.llmapi.settings import arguments
from trtqwen.relay.answer import Piece
from trtqwen.relay.executor import STALL_SECONDS, RelayExecutor
from trtqwen.system.host import read_host
from trtqwen.system.processes import resident_bytes

_STATS_SECONDS = 0.1
_TOLD = ("return_log_probs", "return_perf_metrics")


class LlmApiExecutor(RelayExecutor[Any]):
    """A running LLM in this process. Thread-safe; use as a context manager or call `shutdown`.

    Args:
        verify, stall_seconds: see `RelayExecutor`.

    Raises:
        InputError: if the directory is not a finished engine.
        EngineError: if TensorRT-LLM is not installed, does not know a setting, or does not start.
    """

    def __init__(
        self,
        engine: Path,
        config: ExecutorConfig | None = None,
        *,
        verify: bool = True,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        super().__init__(engine, config, "llmapi", verify=verify, stall_seconds=stall_seconds)
        self._llm: Any = None
        try:
            self._api = _import()
            names = [gpu.name for gpu in read_host().visible_gpus]
            given = arguments(self.engine_config, self._config, engine / HF_MODEL, _version(), names)
            if "quant_config" in given:
                given["quant_config"] = self._api.QuantConfig(**given["quant_config"])
            self._llm = self._api.LLM(**given)
        except EngineError:
            self.shutdown()
            raise
        except Exception as problem:  # TensorRT-LLM raises any type
            self.shutdown()
            raise EngineError(f"{engine}: the LLM API did not start: {problem}", "see its output above") from None
        self._watch()

    @property
    def resident_bytes(self) -> int:
        """Memory of this process and the LLM's workers."""
        return resident_bytes(os.getpid())

    def _prepare(self, request: Request) -> Any:
        limit, size = self.engine_config.build_config.max_seq_len, self.engine_config.pretrained_config.vocab_size
        return sampling_params(self._api, request, limit, size, self._tokenizer)

    async def _pieces(self, request: Request, prepared: Any) -> AsyncGenerator[Piece, None]:
        block = self.engine_config.build_config.tokens_per_block
        output, seen = None, 0
        try:
            salt = {"cache_salt": request.cache_salt} if request.cache_salt else {}
            output = self._llm.generate_async(
                list(request.input_token_ids), sampling_params=prepared, streaming=True, **salt
            )
            async for part in output:
                [one] = part.outputs
                if one.finish_reason not in (None, "length", "stop"):
                    raise EngineError(f"the LLM API ended the request with {one.finish_reason}")
                ids, log_probs, seen = _new(one, seen)
                yield Piece(ids, log_probs, one.finish_reason, _reused_blocks(one) * block)
        except EngineError:
            raise
        except Exception as problem:  # TensorRT-LLM raises any type
            raise EngineError(f"the LLM API fails: {problem}") from None
        finally:
            if output is not None and not output.finished:
                output.abort()

    def _read_stats(self, before: IterationStats) -> IterationStats:
        try:
            steps = self._llm.get_stats(timeout=_STATS_SECONDS)
        except Exception as problem:  # TensorRT-LLM raises any type
            self._die(f"the LLM API tells no statistics: {problem}")
            return before
        if steps:
            last = steps[-1]
            return read_stats(json.loads(last) if isinstance(last, str) else last, before)
        if self._running:
            return before
        return before.model_copy(update={"active": 0, "waiting": 0, "generation_requests": 0})

    def _stop_engine(self) -> None:
        if self._llm is not None:
            self._llm.shutdown()


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
    if request.priority:
        raise RequestError("priority: this engine serves requests in the order of their arrival", "leave it out")
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
        "include_stop_str_in_output": True,
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
    """Return the executor's statistics from those of one step."""
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
