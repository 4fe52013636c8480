"""Requests of the executor in the format of vLLM's `/v1/completions`."""

from __future__ import annotations

import json
from typing import Any

from trtqwen.diagnostics import RequestError
from trtqwen.executor.request import GuidedDecodingParams, Request
from trtqwen.facts.vllm import VllmFacts
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.recipe import VllmSettings

_LARGEST_BIAS = 100.0
_LARGEST_TEMPERATURE = 2
_LARGEST_PENALTY = 2
_TOLD = ("return_log_probs", "return_perf_metrics", "num_top_log_probs")


def completion_body(
    request: Request, settings: VllmSettings, max_seq_len: int, facts: VllmFacts, tokenizer: Tokenizer
) -> dict[str, Any]:
    """The body of a streamed completion with token ids in and out.

    The engine's contract differs from vLLM's: only the request's own `end_id` ends an answer, stop words are token
    sequences, which the caller looks for, and a request without top_k, top_p and min_p is greedy.

    Raises:
        RequestError: naming the tensor, if vLLM cannot do what the request asks for.
    """
    room = max_seq_len - len(request.input_token_ids)
    if room < 1:
        raise RequestError(
            f"Prompt length ({len(request.input_token_ids)}) exceeds maximum input length ({max_seq_len - 1})",
            "shorten the prompt or build the engine with a larger max_seq_len",
        )
    _refuse(request)
    body: dict[str, Any] = {
        "model": settings.served_name,
        "prompt": list(request.input_token_ids),
        "max_tokens": min(request.max_tokens, room),
        "stream": True,
        "return_token_ids": True,
        "ignore_eos": True,
        "skip_special_tokens": False,
        **_sampling(request),
    }
    if stop_ids := _stop_ids(request, tokenizer):
        body["stop_token_ids"] = stop_ids
    if request.output.return_log_probs:
        body["logprobs"] = request.output.num_top_log_probs
        if request.output.num_top_log_probs:
            body["return_tokens_as_token_ids"] = True  # two tokens may have one text
    if request.output.return_perf_metrics:
        body["stream_options"] = {"include_usage": True}
    if request.cache_salt:
        body["cache_salt"] = request.cache_salt
    if request.priority:
        _check_priority(settings)
        body["priority"] = request.priority
    if request.embedding_bias:
        body["logit_bias"] = {str(token): _bias(value) for token, value in request.embedding_bias.items()}
    if request.bad_words:
        _add_bad_words(body, request, facts, tokenizer)
    if request.guided_decoding is not None:
        body["structured_outputs"] = _guide(request.guided_decoding)
    return body


def _stop_ids(request: Request, tokenizer: Tokenizer) -> list[int]:
    """Ids that end the answer in vLLM: the end id, for a guided one the tokenizer's, and stop words of one token."""
    end = tokenizer.end_id if request.end_id is None and request.guided_decoding is not None else request.end_id
    ids = [] if end is None else [end]
    return ids + [word[0] for word in request.stop_words if len(word) == 1]


def _refuse(request: Request) -> None:
    for name in type(request.output).model_fields:
        if name not in _TOLD and getattr(request.output, name):
            raise RequestError(f"{name}: vLLM does not tell", "leave the tensor out")
    if request.sampling.temperature > _LARGEST_TEMPERATURE and not request.sampling.greedy:
        raise RequestError(
            f"temperature: vLLM takes values from 0 to 2 (got {request.sampling.temperature:g})", "correct the tensor"
        )
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(request.sampling, name)
        if abs(value) > _LARGEST_PENALTY:
            raise RequestError(f"{name}: vLLM takes values from -2 to 2 (got {value:g})", "correct the tensor")


def _check_priority(settings: VllmSettings) -> None:
    """At an address, vLLM decides itself."""
    if settings.address is None and settings.arguments.get("scheduling-policy") != "priority":
        raise RequestError(
            "priority: this vLLM serves requests in the order of their arrival",
            "set engine.vllm.arguments to {scheduling-policy: priority}, or leave it out",
        )


def _sampling(request: Request) -> dict[str, Any]:
    sampling = request.sampling
    fields: dict[str, Any] = {"temperature": 0.0}
    if not sampling.greedy:
        seed = sampling.seed if sampling.seed < 2**63 else sampling.seed - 2**64
        fields = {"temperature": sampling.temperature, "top_p": sampling.top_p or 1.0, "top_k": sampling.top_k}
        fields |= {"min_p": sampling.min_p, "seed": seed}
    for name, neutral in (("repetition_penalty", 1.0), ("presence_penalty", 0.0), ("frequency_penalty", 0.0)):
        if (value := getattr(sampling, name)) != neutral:
            fields[name] = value
    if sampling.min_tokens:
        fields["min_tokens"] = min(sampling.min_tokens, request.max_tokens)
    return fields


def _bias(value: float) -> float:
    """Clamp a bias to vLLM's range, whose ends already force or forbid a token."""
    return max(-_LARGEST_BIAS, min(_LARGEST_BIAS, value))


def _add_bad_words(body: dict[str, Any], request: Request, facts: VllmFacts, tokenizer: Tokenizer) -> None:
    """Forbid words of one token with a bias, and longer ones as texts, if these mean the same."""
    bias = body.setdefault("logit_bias", {})
    longer = []
    for word in request.bad_words:
        if len(word) == 1:
            bias[str(word[0])] = -_LARGEST_BIAS
            continue
        text = tokenizer.decode(word, skip_special_tokens=False)
        if "bad_words" not in facts.request_fields or tokenizer.encode(text) != list(word):
            raise RequestError(
                f"bad_words_list: vLLM {facts.release} cannot forbid the sequence {list(word)}",
                "send words of one token, or leave the tensor out",
            )
        longer.append(text)
    if longer:
        body["bad_words"] = longer
    if not bias:
        del body["logit_bias"]


def _guide(guided: GuidedDecodingParams) -> dict[str, Any]:
    if guided.guide_type == "json":
        return {"json_object": True}
    if guided.guide_type == "json_schema":
        try:
            return {"json": json.loads(guided.guide)}
        except ValueError as problem:
            what = f"guided_decoding_guide: is not a usable json_schema ({problem})"
            raise RequestError(what, "correct it") from None
    return {"regex" if guided.guide_type == "regex" else "grammar": guided.guide}
