"""Requests as OpenAI, vLLM and Triton name their fields.

A field is honored, accepted without effect (`NoEffect`), or refused unless its value is neutral (`Refused`).
docs/reference/compatibility.md is generated from these marks. The setting `unknown_fields` decides about fields that
are in no schema. In messages they are ignored, because clients send earlier turns back with further fields.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from trtqwen.gateway.api.fields import (
    AnyObject,
    Count,
    Few,
    Kept,
    Many,
    NoEffect,
    Refused,
    Schema,
    StopString,
    TokenId,
)

FunctionName = Annotated[str, Field(min_length=1, max_length=256)]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]
Penalty = Annotated[float, Field(ge=-2, le=2)]
# Engines compute in float32, where a factor next to nothing is 0 and a penalty beyond measure leaves no finite logit.
RepetitionPenalty = Annotated[float, Field(ge=0.01, le=10)]
PlainPenalty = Annotated[float, Field(ge=-100, le=100)]
Temperature = Annotated[float, Field(ge=0, le=2)]
TopP = Annotated[float, Field(ge=0, le=1)]
TopK = Annotated[int, Field(ge=-1, lt=2**31)]  # 0 and -1: no limit
Words = Annotated[list[StopString], Field(fail_fast=True, max_length=1024)]
MostLogProbs = Annotated[int, Field(ge=0, le=20)]

_TRACKING = NoEffect("the answer does not depend on it")
_NO_BEAMS = Refused("there is no beam search")
_TEXT_ONLY = Refused("answers are text", (["text"],))


def _prompt_kind(value: Any) -> str | None:
    """Which kind of prompt is meant, by its first element."""
    if isinstance(value, list):
        return f"list of {type(value[0]).__name__}" if value else "list of str"
    return type(value).__name__


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


class StreamOptions(Schema):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Annotated[bool | None, NoEffect("events are not padded")] = None


class StructuredOutputs(Schema):
    """vLLM's `structured_outputs`: exactly one form that the answer has."""

    json_: Annotated[AnyObject | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=1000, fail_fast=True)] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: AnyObject | str | None = None
    disable_fallback: Annotated[Any, NoEffect("there is one backend")] = None
    disable_any_whitespace: Annotated[Any, NoEffect("JSON is written without free white space")] = None
    disable_additional_properties: Annotated[Any, Refused("say so in the schema")] = None
    whitespace_pattern: Annotated[Any, NoEffect("JSON is written without free white space")] = None


class SamplingFields(Schema):
    """What chat and completions have in common; a sampling field left out is the model's own default."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=1024)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: TopP | None = None
    repetition_penalty: RepetitionPenalty | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    ignore_eos: bool | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopString | Words | None = None
    stop_token_ids: Many[TokenId] | None = None
    include_stop_str_in_output: bool | None = None
    bad_words: Words | None = None
    logit_bias: Annotated[dict[TokenKey, Annotated[float, Field(ge=-100, le=100)]], Few] | None = None
    allowed_token_ids: Many[TokenId] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    prompt_logprobs: MostLogProbs | None = None
    structured_outputs: StructuredOutputs | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    guided_json: AnyObject | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(max_length=1000, fail_fast=True)] | None = None
    guided_grammar: str | None = None
    structural_tag: AnyObject | str | None = None
    regex: str | None = None
    ebnf: str | None = None
    priority: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None  # the lowest first, as at vLLM
    user: Annotated[Any, _TRACKING] = None
    metadata: Annotated[Any, _TRACKING] = None
    service_tier: Annotated[Any, _TRACKING] = None
    safety_identifier: Annotated[Any, _TRACKING] = None
    request_id: Annotated[Any, NoEffect("send the header X-Request-Id")] = None
    prompt_cache_key: Annotated[Any, NoEffect("prompts are cached by what they begin with")] = None
    prompt_cache_retention: Annotated[Any, NoEffect("the KV cache keeps what fits")] = None
    spaces_between_special_tokens: Annotated[Any, NoEffect("special tokens are no text")] = None
    guided_decoding_backend: Annotated[Any, NoEffect("there is one backend")] = None
    guided_whitespace_pattern: Annotated[Any, NoEffect("JSON is written without free white space")] = None
    length_penalty: Annotated[Any, NoEffect("it is for beam search")] = None
    early_stopping: Annotated[Any, NoEffect("it is for beam search")] = None
    detokenize: Annotated[Any, Refused("answers are text", (True,))] = None
    skip_special_tokens: Annotated[Any, Refused("special tokens are no text", (True,))] = None
    use_beam_search: Annotated[Any, _NO_BEAMS] = None
    best_of: Annotated[Any, Refused("ask for n answers and choose", (1,))] = None
    logits_processors: Annotated[Any, Refused("no code is taken from clients")] = None
    return_token_ids: Annotated[Any, Refused("use /tokenize")] = None
    return_tokens_as_token_ids: Annotated[Any, Refused("tokens are texts and bytes")] = None
    kv_transfer_params: Annotated[Any, Refused("prompts are read where they are answered")] = None
    lora_path: Annotated[Any, Refused("there is one model")] = None
    add_special_tokens: bool | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether each chunk of a stream carries the usage so far."""
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)


class TextPart(Kept):
    type: Literal["text", "input_text", "output_text", "refusal", "thinking"]
    text: str = ""
    refusal: str | None = None


def _as_parts(content: Any) -> Any:
    """Content with parts that are plain strings made objects.

    Raises:
        ValueError: if a part is no text.
    """
    if not isinstance(content, list):
        return content
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind not in ("text", "input_text", "output_text", "refusal", "thinking"):
            raise ValueError(f"part {index} is of type {kind[:64]!r}, but this model reads text alone; leave it out")
        if not isinstance(part, (dict, str, TextPart)):
            raise ValueError(f"part {index} is neither a text nor an object with a type; correct it")
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]


Content = Annotated[str | Many[TextPart] | None, BeforeValidator(_as_parts)]


def text_of(content: str | list[TextPart] | None) -> str:
    """The text of a message's content."""
    if isinstance(content, str):
        return content
    return "".join(part.text or part.refusal or "" for part in content or () if part.type != "thinking")


class CalledFunction(Kept):
    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(Kept):
    id: str | None = None
    type: Literal["function"] | None = "function"
    function: CalledFunction


class Message(Kept):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content = None
    name: str | None = None
    tool_calls: Many[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: Any = None  # what vLLM calls it since 0.12
    function_call: CalledFunction | None = None
    audio: None = None

    @property
    def text(self) -> str:
        return text_of(self.content)

    @property
    def thought(self) -> str:
        """What the assistant thought."""
        return self.reasoning_content or (self.reasoning if isinstance(self.reasoning, str) else "")


class Function(Kept):
    name: FunctionName
    description: str | None = None
    parameters: AnyObject | None = None
    strict: bool | None = None


class Tool(Kept):
    type: Literal["function"] = "function"
    function: Function


class FunctionChoice(Kept):
    name: str


class NamedTool(Kept):
    type: Literal["function"]
    function: FunctionChoice


class AllowedToolList(Kept):
    mode: Literal["auto", "required"] = "auto"
    tools: Many[NamedTool]


class AllowedTools(Kept):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedToolList


class JsonSchema(Schema):
    name: str = ""
    description: str | None = None
    schema_: Annotated[AnyObject | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Schema):
    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None
    structures: Any = None  # with triggers and format: what a structural tag is made of
    triggers: Any = None
    format: Any = None


class ChatRequest(SamplingFields):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[Many[Message], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: MostLogProbs | None = None
    response_format: ResponseFormat | None = None
    tools: Many[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: AnyObject | None = None
    documents: Many[AnyObject] | None = None
    echo: bool | None = None
    include_reasoning: bool | None = None
    separate_reasoning: bool | None = None
    reasoning_effort: Annotated[Any, NoEffect("the model has no levels of effort")] = None
    verbosity: Annotated[Any, NoEffect("say in the prompt how long an answer should be")] = None
    store: Annotated[Any, NoEffect("answers are never kept")] = None
    stream_reasoning: Annotated[Any, NoEffect("reasoning is streamed with the rest")] = None
    add_special_tokens: Annotated[Any, NoEffect("the chat template writes them")] = None
    chat_template: Annotated[Any, Refused("templates are the server's")] = None
    mm_processor_kwargs: Annotated[Any, Refused("the model reads text alone")] = None
    audio: Annotated[Any, _TEXT_ONLY] = None
    modalities: Annotated[Any, _TEXT_ONLY] = None
    function_call: Annotated[Any, Refused("use tool_choice", ("none",))] = None
    functions: Annotated[Any, Refused("use tools")] = None
    prediction: Annotated[Any, NoEffect("it would change the speed alone")] = None
    web_search_options: Annotated[Any, Refused("there is no web search")] = None


class CompletionRequest(SamplingFields):
    """Body of `/v1/completions`; without `max_tokens`, as at OpenAI, an answer has 16 tokens at most."""

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    echo: bool | None = None
    logprobs: MostLogProbs | None = None
    response_format: ResponseFormat | None = None
    suffix: Annotated[Any, Refused("the model completes at the end alone")] = None
    prompt_embeds: Annotated[Any, Refused("prompts are texts or token ids")] = None


class GenerateRequest(Schema):
    """Body of `/generate` and `/generate_stream`: inputs of Triton's ensemble by name. As at Triton, an object among
    them, such as `parameters`, holds further inputs.
    """

    text_input: Annotated[str, Field(min_length=1)]
    max_tokens: Count | None = None
    id: str = ""
    stream: bool | None = None
    exclude_input_in_output: bool | None = None
    stop_words: Literal[""] | StopString | Words | None = None
    bad_words: Literal[""] | StopString | Words | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_k: TopK | None = None
    top_p: TopP | None = None
    repetition_penalty: RepetitionPenalty | None = None
    presence_penalty: PlainPenalty | None = None
    frequency_penalty: PlainPenalty | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    random_seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    min_length: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    end_id: TokenId | None = None
    return_log_probs: bool | None = None
    pad_id: Annotated[Any, NoEffect("prompts are not padded")] = None
    length_penalty: Annotated[Any, NoEffect("it is for beam search")] = None
    len_penalty: Annotated[Any, NoEffect("it is for beam search")] = None
    model: Annotated[Any, NoEffect("there is one model")] = None
    beam_width: Annotated[Any, Refused("there is no beam search", (1,))] = None
    num_return_sequences: Annotated[Any, Refused("send several requests", (1,))] = None
    return_context_logits: Annotated[Any, Refused("ask Triton by gRPC")] = None
    return_generation_logits: Annotated[Any, Refused("ask Triton by gRPC")] = None

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        flat = {key: inner for key, inner in value.items() if not isinstance(inner, dict)}
        for key, inner in value.items():
            if isinstance(inner, dict):
                if twice := sorted(flat.keys() & inner.keys()):
                    raise ValueError(f"{twice[0]!r} is given again inside {key!r}; give it once")
                flat |= inner
        return flat


class TokenizeRequest(Schema):
    """Body of `/tokenize`: a prompt, or messages as in a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[Many[Message], Field(min_length=1)] | None = None
    tools: Many[Tool] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: AnyObject | None = None
    documents: Many[AnyObject] | None = None
    return_token_strs: bool | None = None
    add_special_tokens: bool | None = None
    chat_template: Annotated[Any, Refused("templates are the server's")] = None


class DetokenizeRequest(Schema):
    """Body of `/detokenize`."""

    model: str | None = None
    tokens: Annotated[Many[TokenId], Field(max_length=1 << 20)]
    skip_special_tokens: bool | None = None
