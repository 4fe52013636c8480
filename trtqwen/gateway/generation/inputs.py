"""From a sampling plan to input tensors of `tensorrt_llm`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from trtqwen.gateway.errors import unsupported
from trtqwen.gateway.generation.guide import Guide
from trtqwen.gateway.model import ServedModel
from trtqwen.triton.words import Words, pack_words

Array = npt.NDArray[Any]

_DTYPES: dict[str, type[np.generic]] = {
    **dict.fromkeys(("input_ids", "input_lengths", "request_output_len", "end_id", "pad_id"), np.int32),
    **dict.fromkeys(("runtime_top_k", "min_tokens"), np.int32),
    **dict.fromkeys(("temperature", "runtime_top_p", "repetition_penalty"), np.float32),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), np.float32),
    **dict.fromkeys(("streaming", "exclude_input_in_output", "return_log_probs"), np.bool_),
    "return_perf_metrics": np.bool_,
    **dict.fromkeys(("guided_decoding_guide_type", "guided_decoding_guide"), np.object_),
    "seed": np.uint64,
}
_OLDER_NAMES = {"seed": "random_seed", "min_tokens": "min_length"}  # before TensorRT-LLM 1.0


@dataclass(frozen=True)
class Sampling:
    """The sampling plan of a request.

    Attributes:
        values: by the engine's tensor names.
        bias: added to the logits, by token id.
        allowed: the only ids that may be chosen; empty is all.
        bad_words: sequences of ids that are never completed.
        log_probs: tell each token's log probability.
        top_log_probs: number of most likely tokens with log probabilities.
        prompt_log_probs: number of most likely tokens at each position of the prompt; None for no log probabilities.
        stop_ids: ids that end an answer, besides the model's own.
        end_id: replaces the model's own.
        cache_salt: the client's: requests with another one share no KV cache blocks with it.
    """

    values: Mapping[str, float]
    seed: int
    bias: Mapping[int, float] = field(default_factory=dict)
    allowed: tuple[int, ...] = ()
    bad_words: Words = ()
    log_probs: bool = False
    top_log_probs: int = 0
    prompt_log_probs: int | None = None
    ignore_eos: bool = False
    stop_ids: frozenset[int] = frozenset()
    end_id: int | None = None
    cache_salt: str = ""
    guide: Guide | None = None

    @property
    def min_tokens(self) -> int:
        return int(self.values.get("min_tokens", 0))


def engine_inputs(
    model: ServedModel, sampling: Sampling, prompt: tuple[int, ...], max_tokens: int, index: int
) -> dict[str, Array]:
    """The tensors of one sequence.

    Args:
        index: number of the answer; each has a seed of its own.

    Raises:
        ApiError: if the release's contract lacks a tensor that the request needs.
    """
    values: dict[str, Any] = {
        "input_lengths": len(prompt),
        "request_output_len": max_tokens,
        "pad_id": model.tokenizer.pad_id,
        "streaming": True,
        "exclude_input_in_output": True,
        "seed": (sampling.seed + index) % 2**64,
        **{name: value for name, value in sampling.values.items() if name != "min_p"},
    }
    if not sampling.ignore_eos:
        # The model's other stop ids are watched for by the gateway: stop words leak memory in some releases.
        values["end_id"] = model.tokenizer.end_id if sampling.end_id is None else sampling.end_id
    if sampling.log_probs:
        values["return_log_probs"] = True
    if "return_perf_metrics" in model.tensors:
        values["return_perf_metrics"] = True
    if sampling.guide is not None:
        values["guided_decoding_guide_type"] = sampling.guide.kind.encode()
        values["guided_decoding_guide"] = sampling.guide.text.encode()
    tensors: dict[str, Array] = {"input_ids": np.array([prompt], np.int32)}
    for name, value in values.items():
        tensors[_tensor_name(model, name)] = np.array([[value]], _DTYPES[name])
    if sampling.bad_words:
        tensors[_tensor_name(model, "bad_words_list")] = pack_words([sampling.bad_words])
    if sampling.bias or sampling.allowed:
        bias = tensors[_tensor_name(model, "embedding_bias")] = np.zeros((1, model.vocab_size), np.float32)
        if sampling.allowed:
            bias[:] = -np.inf
            bias[0, list(sampling.allowed)] = 0
        bias[0, list(sampling.bias)] += list(sampling.bias.values())
    return tensors


def cache_salt(model: ServedModel, sampling: Sampling, caller: str) -> str:
    """Return the salt that separates a request's KV cache blocks from those of others; empty shares them with all.

    Args:
        caller: name of the API key, which shares blocks with itself alone; empty shares them with all keys.
    """
    if not (model.reuses_kv_cache and "cache_salt" in model.extensions and (caller or sampling.cache_salt)):
        return ""
    return hashlib.sha256(f"{caller}\0{sampling.cache_salt}".encode("utf-8", "surrogatepass")).hexdigest()


def engine_extensions(model: ServedModel, sampling: Sampling, salt: str = "", owner: str = "") -> dict[str, Any]:
    """Return a plan's extensions of upstream's tensors; empty for none.

    Args:
        salt: as `cache_salt` makes it.
        owner: name of the API key: keys take turns at the compiler of guides.

    Raises:
        ApiError: naming the field, if the engine does not do it.
    """
    wanted: dict[str, Any] = {}
    if "min_p" in sampling.values:
        _require(model, "min_p", "min_p", "this engine samples without it")
        wanted["min_p"] = sampling.values["min_p"]
    count = max(sampling.top_log_probs, sampling.prompt_log_probs or 0)
    if count:
        _require(model, "top_log_probs", "top_logprobs", "this engine tells the chosen token's probability alone")
        wanted["num_top_log_probs"] = count
    if sampling.prompt_log_probs is not None:
        _require(model, "prompt_log_probs", "prompt_logprobs", "this engine tells no probabilities of the prompt")
        wanted["return_prompt_log_probs"] = True
    if sampling.cache_salt:
        _require(model, "cache_salt", "cache_salt", "this engine shares KV cache blocks between all requests")
    if salt:
        wanted["cache_salt"] = salt
    if sampling.guide is not None and "owner" in model.extensions:
        wanted["owner"] = hashlib.sha256(owner.encode("utf-8", "surrogatepass")).hexdigest()
    if "tell_stop" in model.extensions:
        wanted["tell_stop"] = True
    return wanted


def _require(model: ServedModel, extension: str, field: str, why: str) -> None:
    if extension not in model.extensions:
        raise unsupported(field, f"{field} is not served: {why}; leave it out")


def _tensor_name(model: ServedModel, name: str) -> str:
    for known in (name, _OLDER_NAMES.get(name, name)):
        if known in model.tensors:
            return known
    raise unsupported(name, f"{name} is not served by the engine behind this server; leave it out")
