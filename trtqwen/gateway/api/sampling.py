"""The sampling plan of a request."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from trtqwen.gateway.api.schemas import GenerateRequest, SamplingFields
from trtqwen.gateway.errors import bad_request
from trtqwen.gateway.generation.guide import Guide
from trtqwen.gateway.generation.inputs import Sampling
from trtqwen.gateway.model import ServedModel
from trtqwen.hf.generation import GenerationDefaults
from trtqwen.triton.words import Words

_NEUTRAL = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_tokens": 0,
    "min_p": 0.0,
}
_GREEDY_BELOW = 1e-6  # smaller ones end as 0 in float32, which to an engine is top_p not given
_SEED_BITS = 53  # what every client's JSON numbers carry exactly


def plan_sampling(
    model: ServedModel,
    request: SamplingFields,
    *,
    log_probs: bool = False,
    top_log_probs: int = 0,
    prompt_log_probs: int | None = None,
    guide: Guide | None = None,
) -> Sampling:
    """Return the sampling plan of a request.

    Raises:
        ApiError: if a token id is outside the vocabulary.
    """
    bias = {int(token): value for token, value in (request.logit_bias or {}).items()}
    allowed = tuple(request.allowed_token_ids or ())
    check_ids(model, bias, "logit_bias")
    check_ids(model, allowed, "allowed_token_ids")
    return Sampling(
        sampling_values(request, model.defaults),
        draw_seed() if request.seed is None else request.seed,
        bias,
        allowed=allowed,
        bad_words=bad_words(model, request.bad_words or ()),
        log_probs=log_probs,
        top_log_probs=top_log_probs,
        prompt_log_probs=prompt_log_probs,
        ignore_eos=bool(request.ignore_eos),
        stop_ids=frozenset(request.stop_token_ids or ()),
        cache_salt=request.cache_salt or "",
        guide=guide,
    )


def sampling_values(request: SamplingFields | GenerateRequest, defaults: GenerationDefaults) -> dict[str, float]:
    """The sampling tensors of a request; what it leaves open is the model's default."""
    temperature = request.temperature
    if temperature is None:
        temperature = defaults.temperature if defaults.do_sample else 0.0
    top_p = defaults.top_p if request.top_p is None else request.top_p
    penalty = defaults.repetition_penalty if request.repetition_penalty is None else request.repetition_penalty
    min_p = getattr(request, "min_p", None)
    values: dict[str, float] = {
        "repetition_penalty": penalty,
        "presence_penalty": request.presence_penalty or 0.0,
        "frequency_penalty": request.frequency_penalty or 0.0,
        "min_tokens": request.min_tokens or 0,
        "min_p": defaults.min_p if min_p is None else min_p,
    }
    values = {name: value for name, value in values.items() if value != _NEUTRAL[name]}
    if min(temperature, top_p) < _GREEDY_BELOW:
        values.pop("min_p", None)
        return values | {"runtime_top_k": 1}
    # Without top_k and top_p, TensorRT-LLM does not sample at all: top_p always goes along.
    top_k = defaults.top_k if request.top_k is None else max(0, request.top_k)
    return values | {"temperature": temperature, "runtime_top_p": top_p} | ({"runtime_top_k": top_k} if top_k else {})


def draw_seed() -> int:
    """Return a random seed for a request without one."""
    return secrets.randbits(_SEED_BITS)


def bad_words(model: ServedModel, words: Sequence[str]) -> Words:
    """Return the token ids of forbidden words, both with and without a space before them."""
    ids = [model.encode(text, "bad_words") for word in words for text in (word, f" {word.lstrip()}")]
    return tuple(dict.fromkeys(filter(None, ids)))


def check_ids(model: ServedModel, ids: Sequence[int] | dict[int, float], param: str) -> None:
    """Raise an ApiError if a token id is outside the vocabulary."""
    if ids and max(ids) >= model.vocab_size:
        message = f"{param}: token id {max(ids)} is outside the vocabulary of {model.vocab_size}"
        raise bad_request(f"{message}; use the model's own tokenizer", param=param)
