"""The body of OpenAI's `/v1/responses`, and the chat that it asks for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from trtqwen.gateway.api.fields import AnyObject, Count, Many, NoEffect, Refused, Schema, refuse_unsupported
from trtqwen.gateway.api.responses_tools import custom_arguments, offered_by_default, response_tools, told_name
from trtqwen.gateway.api.schemas import ChatRequest, MostLogProbs, SamplingFields
from trtqwen.gateway.api.translate import as_chat
from trtqwen.gateway.errors import bad_request, unsupported

_CALLS = ("function_call", "custom_tool_call")
_RESULTS = ("function_call_output", "custom_tool_call_output")
_NOTHING_KEPT = Refused("answers are not kept; send the whole conversation with each request")


class TextFormat(Schema):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = ""
    description: str | None = None
    schema_: Annotated[AnyObject | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextSettings(Schema):
    format: TextFormat | None = None
    verbosity: Annotated[Any, NoEffect("say in the prompt how long an answer should be")] = None


class ResponseRequest(SamplingFields):
    """Body of `/v1/responses`: OpenAI's fields, and vLLM's for sampling."""

    input: str | Annotated[Many[AnyObject], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    tools: Many[AnyObject] | None = None
    tool_choice: Literal["none", "auto", "required"] | AnyObject | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    top_logprobs: MostLogProbs | None = None
    include: Many[str] | None = None
    chat_template_kwargs: AnyObject | None = None
    reasoning: Annotated[Any, NoEffect("a model that thinks does so by itself")] = None
    store: Annotated[Any, NoEffect("answers are never kept, and say so")] = None
    max_tool_calls: Annotated[Any, NoEffect("only the client runs tools")] = None
    truncation: Annotated[Any, Refused("a conversation that is too long is refused", ("disabled", "auto"))] = None
    background: Annotated[Any, _NOTHING_KEPT] = None
    previous_response_id: Annotated[Any, _NOTHING_KEPT] = None
    conversation: Annotated[Any, _NOTHING_KEPT] = None
    prompt: Annotated[Any, Refused("prompts are not kept; send instructions and input")] = None
    context_management: Annotated[Any, Refused("send the conversation as the model shall read it")] = None

    def ignored(self) -> list[str]:
        return [f"tools.{index}" for index, tool in enumerate(self.tools or ()) if offered_by_default(tool)]

    @property
    def wants_log_probs(self) -> bool:
        return bool(self.top_logprobs) or "message.output_text.logprobs" in (self.include or ())


def chat_of(request: ResponseRequest) -> ChatRequest:
    """The chat that a request asks for.

    Raises:
        ApiError: naming the field, if it cannot be served as asked.
    """
    refuse_unsupported(request)
    if (request.n or 1) > 1:
        raise unsupported("n", "a response is one answer; send several requests")
    form = request.text.format if request.text else None
    tools = [
        {"type": "function", "function": {"name": name, **tool.fields}}
        for name, tool in response_tools(request.tools or ()).items()
    ]
    return as_chat(
        request,
        {
            "messages": _messages(request),
            "max_tokens": request.max_output_tokens,
            "tools": tools or None,
            "tool_choice": _tool_choice(request.tool_choice),
            "parallel_tool_calls": request.parallel_tool_calls,
            "continue_final_message": _is_unfinished(request.input) or None,
            "response_format": None if form is None else _format(form),
            "logprobs": request.wants_log_probs,
            "top_logprobs": request.top_logprobs,
            "chat_template_kwargs": request.chat_template_kwargs,
        },
    )


def _format(form: TextFormat) -> dict[str, Any]:
    if form.type != "json_schema":
        return {"type": form.type}
    return {"type": form.type, "json_schema": {"name": form.name, "schema": form.schema_, "strict": form.strict}}


def _tool_choice(choice: Any) -> Any:
    if not isinstance(choice, Mapping):
        return choice
    if choice.get("type") in ("function", "custom"):
        name = told_name(choice.get("name"), choice.get("namespace"))
        return {"type": "function", "function": {"name": name}}
    if choice.get("type") == "allowed_tools":
        named = [_tool_choice(tool) for tool in choice.get("tools") or ()]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode", "auto"), "tools": named}}
    raise unsupported("tool_choice", f"tool_choice is of type {choice.get('type')!r}; only functions can be chosen")


def _messages(request: ResponseRequest) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if request.instructions:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        return [*messages, {"role": "user", "content": request.input}]
    thought = ""
    for index, item in enumerate(request.input):
        kind = item.get("type", "message")
        if kind == "message":
            messages.append({"role": item.get("role"), "content": item.get("content")})
        elif kind in _CALLS:
            if not messages or messages[-1]["role"] != "assistant" or thought:
                messages.append({"role": "assistant", "content": None})
            messages[-1].setdefault("tool_calls", []).append(_call(item))
        elif kind in _RESULTS:
            output = item.get("output")
            shown = output if isinstance(output, (str, list)) else json.dumps(output, ensure_ascii=False)
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": shown})
        elif kind == "reasoning":
            thought = _thought(item)
        else:
            raise bad_request(
                f"input[{index}] is of type {kind!r}, which is not served here; leave it out", param="input"
            )
        if thought and kind != "reasoning" and messages[-1]["role"] == "assistant":
            messages[-1]["reasoning_content"], thought = thought, ""
    return messages


def _call(item: Mapping[str, Any]) -> dict[str, Any]:
    custom = item["type"] == "custom_tool_call"
    arguments = custom_arguments(item.get("input") or "") if custom else item.get("arguments")
    function = {"name": told_name(item.get("name"), item.get("namespace")), "arguments": arguments}
    return {"id": item.get("call_id"), "type": "function", "function": function}


def _thought(item: Mapping[str, Any]) -> str:
    """What a reasoning item says: all of it, or else what there is of a summary."""
    parts = item.get("content") or item.get("summary") or ()
    return "".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))


def _is_unfinished(given: str | list[dict[str, Any]]) -> bool:
    """Whether the last item is an assistant's unfinished message, by its status: the answer goes on with it."""
    last = {} if isinstance(given, str) else given[-1]
    message = last.get("type", "message") == "message" and last.get("role") == "assistant"
    return message and last.get("status") in ("in_progress", "incomplete")
