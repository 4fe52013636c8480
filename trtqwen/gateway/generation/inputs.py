"""From a request's sampling fields to input tensors of `tensorrt_llm`."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from trtqwen.gateway.api.schemas import GenerateRequest, SamplingFields
from trtqwen.gateway.errors import bad_request, unsupported
from trtqwen.gateway.generation.guide import Guide
from trtqwen.gateway.model import ServedModel
from trtqwen.hf.generation import GenerationDefaults

Array = npt.NDArray[Any]

_DTYPES: dict[str, type[np.generic]] = {
    **dict.fromkeys(("input_ids", "input_lengths", "request_output_len", "end_id", "pad_id"), np.int32),
    **dict.fromkeys(("runtime_top_k", "min_tokens"), np.int32),
    **dict.fromkeys(("temperature", "runtime_top_p", "repetition_penalty"), np.float32),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), np.float32),
    **dict.fromkeys(("streaming", "exclude_input_in_output", "return_log_probs"), np.bool_),
    **dict.fromkeys(("guided_decoding_guide_type", "guided_decoding_guide"), np.object_),
    "seed": np.uint64,
}
_OLDER_NAMES = {"seed": "random_seed", "min_tokens": "min_length"}  # before TensorRT-LLM 1.0
_NEUTRAL = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_tokens": 0}
_GREEDY_BELOW = 1e-6  # smaller ones end as 0 in float32, which to an engine is top_p not given
_SEED_BITS = 53  # what every client's JSON numbers carry exactly


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        values: by the engine's tensor names.
        bias: added to the logits, by token id.
    """

    values: Mapping[str, float]
    seed: int
    bias: Mapping[int, float] = field(default_factory=dict)
    log_probs: bool = False
    ignore_eos: bool = False
    guide: Guide | None = None

    @property
    def min_tokens(self) -> int:
        return int(self.values.get("min_tokens", 0))


def draw_seed() -> int:
    return secrets.randbits(_SEED_BITS)


def plan_sampling(request: SamplingFields | GenerateRequest, defaults: GenerationDefaults) -> dict[str, float]:
    """The sampling tensors of a request; what it leaves open is the model's default."""
    temperature = request.temperature
    if temperature is None:
        temperature = defaults.temperature if defaults.do_sample else 0.0
    top_p = defaults.top_p if request.top_p is None else request.top_p
    penalty = defaults.repetition_penalty if request.repetition_penalty is None else request.repetition_penalty
    values: dict[str, float] = {
        "repetition_penalty": penalty,
        "presence_penalty": request.presence_penalty or 0.0,
        "frequency_penalty": request.frequency_penalty or 0.0,
        "min_tokens": request.min_tokens or 0,
    }
    values = {name: value for name, value in values.items() if value != _NEUTRAL[name]}
    if min(temperature, top_p) < _GREEDY_BELOW:
        return values | {"runtime_top_k": 1}
    # Without top_k and top_p, TensorRT-LLM does not sample at all: top_p always goes along.
    top_k = defaults.top_k if request.top_k is None else request.top_k
    return values | {"temperature": temperature, "runtime_top_p": top_p} | ({"runtime_top_k": top_k} if top_k else {})


def plan_bias(request: SamplingFields, vocab_size: int) -> dict[int, float]:
    """What a request adds to the logits, by token id.

    Raises:
        ApiError: if an id is outside the vocabulary.
    """
    bias = {int(token): value for token, value in (request.logit_bias or {}).items()}
    if bias and max(bias) >= vocab_size:
        message = f"logit_bias: token id {max(bias)} is outside the vocabulary of {vocab_size}"
        raise bad_request(f"{message}; use the model's own tokenizer", param="logit_bias")
    return bias


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
        **sampling.values,
    }
    if not sampling.ignore_eos:
        # The model's other stop ids are watched for by the gateway: stop words leak memory in some releases.
        values["end_id"] = model.tokenizer.end_id
    if sampling.log_probs:
        values["return_log_probs"] = True
    if sampling.guide is not None:
        values["guided_decoding_guide_type"] = b"json_schema"
        values["guided_decoding_guide"] = sampling.guide.text.encode()
    tensors: dict[str, Array] = {"input_ids": np.array([prompt], np.int32)}
    for name, value in values.items():
        tensors[_tensor_name(model, name)] = np.array([[value]], _DTYPES[name])
    if sampling.bias:
        bias = tensors[_tensor_name(model, "embedding_bias")] = np.zeros((1, model.vocab_size), np.float32)
        bias[0, list(sampling.bias)] = list(sampling.bias.values())
    return tensors


def _tensor_name(model: ServedModel, name: str) -> str:
    for known in (name, _OLDER_NAMES.get(name, name)):
        if known in model.tensors:
            return known
    raise unsupported(name, f"{name} is not served by this release of the engine; leave it out")
