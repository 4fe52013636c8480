"""Requests as OpenAI names their fields.

As OpenAI does, a field that nobody knows is refused, so that a typing error is not ignored. Fields of OpenAI's that
do not change an answer are accepted; those that would, and cannot be honoured, are refused by `refuse_unsupported`.
Only in messages unknown fields are let through: clients send back what they keep of earlier turns, with fields of
their own.
`top_k`, `repetition_penalty`, `min_tokens` and `ignore_eos` are additions, by the names that vLLM gave them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from trtqwen.gateway.errors import unsupported

StopString = Annotated[str, Field(min_length=1, max_length=256)]
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]
Penalty = Annotated[float, Field(ge=-2, le=2)]
# Engines compute in float32, where a factor next to nothing is 0 and a penalty beyond measure leaves no finite logit.
RepetitionPenalty = Annotated[float, Field(ge=0.01, le=10)]
PlainPenalty = Annotated[float, Field(ge=-100, le=100)]

_UNSUPPORTED = {
    "audio": "answers are text",
    "best_of": "ask for n answers and choose",
    "function_call": "use tool_choice",
    "functions": "use tools",
    "modalities": "answers are text",
    "prediction": "there is no draft decoding",
    "reasoning_effort": "the model does not reason apart from its answer",
    "store": "nothing is kept",
    "suffix": "the model completes at the end only",
    "top_logprobs": "the engine tells the chosen token's probability alone",
    "verbosity": "say in the prompt how long an answer should be",
    "web_search_options": "there is no web search",
}
_MOST_FIELDS = 1024  # of an object, known or not
_DEEPEST = 128  # levels of an object inside another; what walks through them is recursive
_NEUTRAL: tuple[Any, ...] = (None, False, 0, "", [], {}, ["text"])


def _few(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > _MOST_FIELDS:
        raise ValueError(f"there are {len(value)} fields; {_MOST_FIELDS} are allowed")
    return value


def is_deep(value: Any) -> bool:
    """Whether a JSON value holds values in values in values beyond measure."""
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)


def _shallow(value: dict[str, Any]) -> dict[str, Any]:
    if is_deep(value):
        raise ValueError(f"is nested more than {_DEEPEST} levels deep; flatten it")
    return value


def _prompt_kind(value: Any) -> str | None:
    """Which kind of prompt is meant, by its first element."""
    if isinstance(value, list):
        return f"list of {type(value[0]).__name__}" if value else "list of str"
    return type(value).__name__


# The first mistake of a list is enough: a body of a megabyte may hold a million, each with a message of its own.
T = TypeVar("T")
Many = Annotated[list[T], Field(fail_fast=True)]
Prompt = Annotated[
    Annotated[str, Tag("str")]
    | Annotated[Many[str], Tag("list of str")]
    | Annotated[Many[TokenId], Tag("list of int")]
    | Annotated[Many[Many[TokenId]], Tag("list of list")],
    Discriminator(
        _prompt_kind,
        custom_error_type="prompt_type",
        custom_error_message="Input should be a text, texts, token ids, or lists of token ids",
    ),
]
Few = BeforeValidator(_few)
SchemaObject = Annotated[dict[str, Any], AfterValidator(_shallow)]


class _Schema(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        return _few(value)


class _Kept(_Schema):
    """Part of a conversation, as clients keep it."""

    model_config = ConfigDict(extra="ignore")


class StreamOptions(_Schema):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class SamplingFields(_Schema):
    """What chat and completions have in common; a sampling field left out is the model's own default."""

    model: str
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    repetition_penalty: RepetitionPenalty | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    ignore_eos: bool | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=4, fail_fast=True)] | None = None
    logit_bias: Annotated[dict[TokenKey, Annotated[float, Field(ge=-100, le=100)]], Few] | None = None
    # Without effect on the answer:
    user: str | None = None
    metadata: Annotated[dict[str, str], Few] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class TextPart(_Kept):
    type: Literal["text"]
    text: str


class CalledFunction(_Kept):
    name: FunctionName
    arguments: str


class ToolCall(_Kept):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(_Kept):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Many[TextPart] | None = None
    name: str | None = None
    tool_calls: Many[ToolCall] | None = None
    tool_call_id: str | None = None
    audio: None = None
    function_call: None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())


class Function(_Schema):
    name: FunctionName
    description: str | None = None
    parameters: SchemaObject | None = None
    strict: bool | None = None


class Tool(_Schema):
    type: Literal["function"]
    function: Function


class FunctionChoice(_Schema):
    name: str


class NamedTool(_Schema):
    type: Literal["function"]
    function: FunctionChoice


class JsonSchema(_Schema):
    name: str
    description: str | None = None
    schema_: Annotated[SchemaObject | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(_Schema):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(SamplingFields):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[Many[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Many[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    audio: dict[str, Any] | None = None
    function_call: str | dict[str, Any] | None = None
    functions: list[Any] | None = None
    modalities: Many[str] | None = None
    prediction: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    store: bool | None = None
    verbosity: str | None = None
    web_search_options: dict[str, Any] | None = None


class CompletionRequest(SamplingFields):
    """Body of `/v1/completions`; without `max_tokens`, as at OpenAI, an answer has 16 tokens at most."""

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    suffix: str | None = None


class GenerateRequest(_Schema):
    """Body of `/generate` and `/generate_stream`: the names of Triton's ensemble, of which these are served."""

    text_input: Annotated[str, Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)]
    id: str = ""
    stream: bool | None = None
    exclude_input_in_output: bool | None = None
    stop_words: Literal[""] | StopString | Annotated[list[StopString], Field(max_length=4, fail_fast=True)] | None = (
        None
    )
    bad_words: Literal[""] | Annotated[list[str], Field(max_length=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: RepetitionPenalty | None = None
    presence_penalty: PlainPenalty | None = None
    frequency_penalty: PlainPenalty | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None


def refuse_unsupported(request: SamplingFields) -> None:
    """Raise an ApiError if the request asks for what would change the answer and cannot be done."""
    for name, reason in _UNSUPPORTED.items():
        value = getattr(request, name, None)
        neutral = (1, request.n) if name == "best_of" else _NEUTRAL
        if value is not None and value not in neutral:
            raise unsupported(name, f"{name} is not supported: {reason}; leave it out")
