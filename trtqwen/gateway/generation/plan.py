"""The plan of a generation, and the pieces of its answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from trtqwen.gateway.config import GatewayConfig
from trtqwen.gateway.errors import bad_request
from trtqwen.gateway.generation.inputs import Sampling
from trtqwen.gateway.model import ServedModel

Finish = Literal["stop", "length", "tool_calls"]
_RESERVED = 1024  # tokens of an answer without a limit of its own, at first


@dataclass(frozen=True)
class TokenLogProb:
    """A token of an answer.

    Attributes:
        text: as bytes; a character may take several tokens.
        log_prob: natural logarithm of its probability; None for the first token of a prompt, which follows nothing.
        start: characters of the answer before the one that it begins or belongs to.
        top: ids and log probabilities of the most likely tokens at its place, if asked for.
    """

    token_id: int
    text: bytes
    log_prob: float | None
    start: int
    top: tuple[tuple[int, float], ...] = ()


class Piece(NamedTuple):
    """Part of an answer; the last one says why it ended.

    Attributes:
        number: of the answer.
        prompt: the prompt's tokens, with the first piece, if asked for.
        matched: the stop string or the id of the stop token that ended it; None for the model's own end.
    """

    number: int
    text: str
    log_probs: tuple[TokenLogProb, ...] = ()
    finish: Finish | None = None
    matched: str | int | None = None
    prompt: tuple[TokenLogProb, ...] = ()


@dataclass(frozen=True)
class GenerationPlan:
    """The plan of a generation.

    Attributes:
        request_id: unique; the sequences' ids derive from it.
        prompts: token ids, one tuple for each answer, answers of one prompt side by side.
        choices: answers of each prompt.
        max_tokens: of each answer.
        reserved: tokens of each answer that are reserved when it begins; if it gets longer, more are.
        stop: strings that end an answer.
        keep_stop: an answer ends with its stop string, not before it.
        priority: of those of one API key that wait, the requests with the lowest go first.
    """

    request_id: str
    prompts: tuple[tuple[int, ...], ...]
    choices: int
    max_tokens: int
    sampling: Sampling
    reserved: int
    stop: tuple[str, ...] = ()
    keep_stop: bool = False
    priority: int = 0

    @property
    def reserved_tokens(self) -> int:
        """Tokens of all prompts and answers that are reserved when the request begins."""
        return sum(len(prompt) + self.reserved for prompt in self.prompts)


@dataclass
class Usage:
    """Tokens so far; a prompt with several answers counts once.

    Attributes:
        cached_tokens: prompt tokens that the engine had read before; None until it says so.
    """

    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int | None = None


class Observation(Protocol):
    """Sees one request's answers."""

    def piece(self, piece: Piece) -> None:
        """The next piece."""

    def end(self, usage: Usage, failure: BaseException | None) -> None:
        """The end, with what kept the answers from being complete, if anything."""


@dataclass(frozen=True)
class Room:
    """The limit of an answer and the reservation at its start, in tokens."""

    max_tokens: int
    reserved: int


def fit_answer(model: ServedModel, config: GatewayConfig, prompt_tokens: int, asked: int | None) -> Room:
    """Return the limit of an answer: the requested one, or the rest of the context.

    Raises:
        ApiError: with the numbers, if the prompt leaves no room or the answer asked for does not fit. LiteLLM and
            LangChain tell these errors by their words, and turn to a model with a longer context.
    """
    context, cache = model.limits.max_seq_len, model.cache_tokens(config.kv_cache_tokens)
    limit, code = (context, "context_length_exceeded") if context <= cache else (cache, "kv_cache_exceeded")
    why = "" if context <= cache else ", as its KV cache holds no more"
    room = limit - prompt_tokens
    if room < 1:
        raise bad_request(
            f"prompt is too long: {prompt_tokens} tokens; this model's maximum context length is {limit} tokens"
            f"{why}; shorten the prompt to {limit - 1} tokens or fewer",
            code=code,
        )
    if asked is None:
        most = min(room, config.default_max_tokens or room, config.max_tokens or room)
        return Room(most, min(most, _RESERVED))
    if config.max_tokens is not None and asked > config.max_tokens:
        raise bad_request(f"max_tokens is {asked}; this server allows {config.max_tokens}", param="max_tokens")
    if asked > room:
        raise bad_request(
            f"max_tokens is too large: {asked}; this model's maximum context length is {limit} tokens{why}, and the "
            f"prompt has {prompt_tokens}; ask for {room} or fewer",
            param="max_tokens",
            code=code,
        )
    return Room(asked, asked)
