"""A package `tensorrt_llm` with the LLM API's names: LLM, SamplingParams and what they give back.

Built from the signatures that upstream holds stable (tests/unittest/api_stability) and from SamplingParams' fields
at 000a01de. Unknown arguments and fields are refused, as upstream does. It generates 5, 6, 7, 8, 5, 6 and so on.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from trtqwen.facts.llmapi import llm_arguments


@dataclass(kw_only=True)
class GuidedDecodingParams:
    json: Any = None
    regex: str | None = None
    grammar: str | None = None
    json_object: bool = False
    structural_tag: str | None = None


@dataclass(kw_only=True)
class SamplingParams:
    end_id: int | None = None
    pad_id: int | None = None
    max_tokens: int = 32
    bad: Any = None
    bad_token_ids: list[int] | None = None
    stop: Any = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    embedding_bias: Any = None
    n: int = 1
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    temperature: float | None = None
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    min_p: float | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_context_logits: bool = False
    return_generation_logits: bool = False
    exclude_input_from_output: bool = True
    return_perf_metrics: bool = False
    guided_decoding: GuidedDecodingParams | None = None
    ignore_eos: bool = False
    detokenize: bool = True
    add_special_tokens: bool = True
    skip_special_tokens: bool = True


@dataclass
class Logprob:
    logprob: float
    rank: int = 1


@dataclass
class CompletionOutput:
    index: int = 0
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    request_perf_metrics: Any = None


class RequestOutput:
    """One request; each part of the stream holds all tokens so far."""

    def __init__(self, llm: LLM, prompt: list[int], params: SamplingParams) -> None:
        self._llm, self._params, self.prompt_token_ids = llm, params, prompt
        self.outputs = [CompletionOutput(logprobs=[] if params.logprobs else None)]
        self.finished = self.aborted = False

    def abort(self) -> None:
        self.aborted = True
        self._llm.aborted.append(self)

    async def _parts(self) -> AsyncIterator[RequestOutput]:
        [one] = self.outputs
        for index in range(self._params.max_tokens):
            await asyncio.sleep(self._llm.gap)
            if self.aborted:
                return
            if self._llm.broken:
                raise RuntimeError("the worker has ended")
            token = 5 + index % 4
            stops = token in (self._params.stop_token_ids or ()) or token == self._params.end_id
            one.token_ids.append(token)
            if one.logprobs is not None:
                one.logprobs.append({99: Logprob(-0.5), token: Logprob(-float(index))})
            if stops or index + 1 == self._params.max_tokens:
                one.finish_reason, self.finished = "stop" if stops else "length", True
            cut = not self._llm.tells_end_id if token == self._params.end_id else stops
            if cut and not (stops and self._params.include_stop_str_in_output and token != self._params.end_id):
                del one.token_ids[-1]
            yield self
            if self.finished:
                return

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self._parts()


class LLM:
    """Remembers its arguments and its requests' parameters in `started`, `params` and `aborted`."""

    release = "1.2.1"
    tells_end_id = True
    started: list[LLM] = []  # noqa: RUF012

    def __init__(self, model: str, **arguments: Any) -> None:
        unknown = set(arguments) - llm_arguments(self.release)
        if unknown:
            raise TypeError(f"LLM got invalid argument: {sorted(unknown)[0]}")
        if arguments.get("load_format") == "broken":
            raise RuntimeError("no GPU")
        self.arguments = {"model": model, **arguments}
        self.params: list[SamplingParams] = []
        self.salts: list[str | None] = []
        self.aborted: list[RequestOutput] = []
        self.gap, self.broken, self.stopped = 0.0, False, False
        self.started.append(self)

    def generate_async(
        self,
        inputs: list[int],
        sampling_params: SamplingParams | None = None,
        streaming: bool = False,
        cache_salt: str | None = None,
    ) -> RequestOutput:
        assert streaming
        assert sampling_params is not None
        self.salts.append(cache_salt)
        self.params.append(sampling_params)
        return RequestOutput(self, inputs, sampling_params)

    def get_stats(self, timeout: float | None = 2) -> list[Any]:
        if self.broken:
            raise RuntimeError("the worker has ended")
        cache = {"maxNumBlocks": 100, "usedNumBlocks": 7, "reusedBlocks": 3, "tokensPerBlock": 32}
        batching = {"numContextRequests": 1, "numGenRequests": 2, "numCtxTokens": 9, "numPausedRequests": 0}
        return [{"iter": 4, "numActiveRequests": 3, "kvCacheStats": cache, "inflightBatchingStats": batching}]

    def shutdown(self) -> None:
        self.stopped = True


@dataclass
class QuantConfig:
    quant_algo: str | None = None


def package() -> types.ModuleType:
    """The package, to stand in `sys.modules`."""
    module = types.ModuleType("tensorrt_llm")
    LLM.started = []
    module.LLM, module.SamplingParams, module.QuantConfig = LLM, SamplingParams, QuantConfig  # type: ignore[attr-defined]
    module.llmapi = types.SimpleNamespace(GuidedDecodingParams=GuidedDecodingParams)  # type: ignore[attr-defined]
    return module
