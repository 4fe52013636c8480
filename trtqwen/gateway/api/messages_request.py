"""The body of Anthropic's `/v1/messages`, and the chat that it asks for."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from trtqwen.gateway.api.fields import (
    AnyObject,
    Count,
    Kept,
    Many,
    NoEffect,
    Refused,
    Schema,
    StopString,
    refuse_unsupported,
)
from trtqwen.gateway.api.schemas import ChatRequest, FunctionName, TopK, TopP
from trtqwen.gateway.api.translate import as_chat
from trtqwen.gateway.errors import bad_request, unsupported

_THOUGHTS = ("thinking", "redacted_thinking")
_BILLING = "x-anthropic-billing-header"  # begins a block of Claude Code's that differs with each request


class AnthropicMessage(Kept):
    role: Literal["user", "assistant", "system"]
    content: str | Many[AnyObject]


class AnthropicTool(Kept):
    type: str | None = None
    name: FunctionName
    description: str | None = None
    input_schema: AnyObject | None = None
    strict: bool | None = None


class AnthropicToolChoice(Kept):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class CountTokensRequest(Schema):
    """Body of `/v1/messages/count_tokens`, and what `/v1/messages` has in common with it."""

    model: str | None = None
    messages: Annotated[Many[AnthropicMessage], Field(min_length=1)]
    system: str | Many[AnyObject] | None = None
    tools: Many[AnthropicTool] | None = None
    tool_choice: AnthropicToolChoice | None = None
    output_config: AnyObject | None = None
    output_format: AnyObject | None = None
    thinking: Annotated[Any, NoEffect("a model that thinks does so by itself")] = None
    cache_control: Annotated[Any, NoEffect("prompts are cached by what they begin with")] = None
    context_management: Annotated[Any, NoEffect("send the conversation as the model shall read it")] = None
    mcp_servers: Annotated[Any, Refused("only the client runs tools")] = None


class MessagesRequest(CountTokensRequest):
    """Body of `/v1/messages`."""

    max_tokens: Count | None = None
    stream: bool | None = None
    stop_sequences: Annotated[list[StopString], Field(fail_fast=True, max_length=1024)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    metadata: Annotated[Any, NoEffect("the answer does not depend on it")] = None
    service_tier: Annotated[Any, NoEffect("the answer does not depend on it")] = None
    inference_geo: Annotated[Any, NoEffect("the answer does not depend on it")] = None
    container: Annotated[Any, Refused("only the client runs tools")] = None


def chat_of(request: CountTokensRequest) -> ChatRequest:
    """The chat that a request asks for.

    Raises:
        ApiError: naming the field, if it cannot be served as asked.
    """
    refuse_unsupported(request)
    messages: list[dict[str, Any]] = []
    if system := _system(request.system or ""):
        messages.append({"role": "system", "content": system})
    for index, message in enumerate(request.messages):
        messages += _turns(message, f"messages.{index}")
    fields: dict[str, Any] = {
        "model": request.model,
        "messages": messages,
        "tools": [_tool(index, tool) for index, tool in enumerate(request.tools or ())] or None,
        "response_format": _format(request),
    }
    if request.tool_choice is not None:
        kind, name = request.tool_choice.type, request.tool_choice.name
        named = {"type": "function", "function": {"name": name or ""}}
        fields["tool_choice"] = {"any": "required", "tool": named}.get(kind, kind)
        fields["parallel_tool_calls"] = False if request.tool_choice.disable_parallel_tool_use else None
    if request.messages[-1].role == "assistant":
        fields["continue_final_message"] = True
    if isinstance(request, MessagesRequest):
        fields |= {"max_tokens": request.max_tokens, "stop": request.stop_sequences or None}
        fields |= {name: getattr(request, name) for name in ("temperature", "top_p", "top_k")}
    return as_chat(request, fields)


def _system(given: str | list[dict[str, Any]]) -> str:
    """Return the system prompt without parts that mean nothing to the model and prevent KV cache reuse."""
    if isinstance(given, list):
        given = [block for block in given if not str(block.get("text", "")).startswith(_BILLING)]
    return _text(given, "system")


def _format(request: CountTokensRequest) -> dict[str, Any] | None:
    form = request.output_format or (request.output_config or {}).get("format")
    if not isinstance(form, dict) or form.get("type") != "json_schema":
        return None
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": form.get("schema")}}


def _tool(index: int, tool: AnthropicTool) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise unsupported("tools", f"tools[{index}] is of type {tool.type!r}; only tools that the client runs work")
    function: dict[str, Any] = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": {**function, "strict": tool.strict}}


def _turns(message: AnthropicMessage, place: str) -> list[dict[str, Any]]:
    """Return a message as turns of a chat. Results of tools become separate turns before the rest of the message."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results, texts, calls, thoughts = [], [], [], []
    for number, block in enumerate(message.content):
        kind, where = block.get("type"), f"{place}.content.{number}"
        if kind in ("text", "document"):
            texts.append(_block_text(block, where))
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": json.dumps(block.get("input") or {})}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result":
            content = _text(block.get("content") or "", where)
            results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content})
        elif kind in _THOUGHTS:
            thoughts.append(str(block.get("thinking", "")))
        else:
            message_ = f"{where} is of type {kind!r}, but this model reads text alone; leave it out"
            raise bad_request(message_, param="messages")
    turn: dict[str, Any] = {"role": message.role, "content": "".join(texts) if texts or not calls else None}
    if calls:
        turn["tool_calls"] = calls
    if thoughts:
        turn["reasoning_content"] = "".join(thoughts)
    return [*results, turn] if texts or calls or not results else results


def _text(content: Any, place: str) -> str:
    """The text of blocks."""
    if isinstance(content, str):
        return content
    blocks = content if isinstance(content, list) else [content]
    return "".join(_block_text(block, f"{place}.{number}") for number, block in enumerate(blocks))


def _block_text(block: Any, place: str) -> str:
    """The text of a text, of a document that is one, or of the name of a tool that a search has found."""
    kind = block.get("type") if isinstance(block, dict) else None
    if kind == "text":
        return str(block.get("text", ""))
    if kind == "tool_reference":
        return str(block.get("tool_name", ""))
    source = block.get("source") if kind == "document" else None
    if isinstance(source, dict) and source.get("type") == "text":
        return str(source.get("data", ""))
    if isinstance(source, dict) and source.get("type") == "content":
        return _text(source.get("content") or "", place)
    raise bad_request(f"{place} is of type {kind!r}, but this model reads text alone; leave it out", param="messages")
