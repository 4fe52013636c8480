"""`/v1/chat/completions`: from a request to what the engine is asked for.

Under tool_choice "auto" the model writes freely, and whether a call keeps to its tool's parameters is the model's
doing: `strict` is accepted there, as clients send it by habit, and promises nothing. A call that tool_choice forces
is held to the parameters, `strict` or not.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any

from trtqwen.gateway.api.envelope import choice_count
from trtqwen.gateway.api.schemas import ChatRequest, Message, NamedTool, Tool, is_deep, refuse_unsupported
from trtqwen.gateway.api.tools import OPEN, call_schema
from trtqwen.gateway.chat_template import ChatTemplate
from trtqwen.gateway.config import GatewayConfig
from trtqwen.gateway.errors import ApiError, bad_request, unsupported
from trtqwen.gateway.generation.generator import GenerationPlan, fit_max_tokens
from trtqwen.gateway.generation.guide import plan_guide, require_guides, schema_guide
from trtqwen.gateway.generation.inputs import Sampling, draw_seed, plan_bias, plan_sampling
from trtqwen.gateway.model import ServedModel


@dataclass(frozen=True)
class ChatPlan:
    """A chat request, worked out.

    Attributes:
        parse_calls: look for tool calls in the answer.
        forced_call: the answer is a call from its first token on.
        one_call: the answer ends with its first call.
    """

    generation: GenerationPlan
    parse_calls: bool = False
    forced_call: bool = False
    one_call: bool = False
    include_usage: bool = False


def plan_chat(
    model: ServedModel, template: ChatTemplate | None, config: GatewayConfig, request: ChatRequest
) -> ChatPlan:
    """Render, tokenise and check a chat request.

    Raises:
        ApiError: naming the field, if it cannot be served as asked.
    """
    refuse_unsupported(request)
    if template is None:
        raise ApiError(404, f"{model.name} has no chat template; use /v1/completions", "no_chat_template")
    choices = choice_count(request.n, 1, config.max_choices)
    offered, forced = _offered_tools(request)
    guide = plan_guide(model, request.response_format)
    if offered and not template.takes_tools:
        raise unsupported("tools", f"the chat template of {model.name} has no place for tools; leave them out")
    if offered and not forced and guide is not None:
        # The guide holds the answer from its first token on: the model could never begin a call.
        raise unsupported(
            "response_format",
            "response_format holds the whole answer to JSON, so no tool could be called; drop one of them, or set "
            'tool_choice to "none"',
        )
    if forced:
        require_guides(model, "tool_choice")
        if guide is not None:
            raise bad_request("tool_choice forces a call, response_format an answer; drop one", param="tool_choice")
        guide = schema_guide(call_schema(forced), "tools")
    prompt = template.render(_messages(request), [tool.model_dump(exclude_none=True) for tool in offered])
    ids = model.encode(prompt + f"{OPEN}\n" if forced else prompt, "messages")
    asked = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    sampling = Sampling(
        plan_sampling(request, model.defaults),
        draw_seed() if request.seed is None else request.seed,
        plan_bias(request, model.vocab_size),
        log_probs=bool(request.logprobs),
        ignore_eos=bool(request.ignore_eos),
        guide=guide,
    )
    generation = GenerationPlan(
        request_id=f"chatcmpl-{uuid.uuid4().hex}",
        prompts=(ids,) * choices,
        choices=choices,
        max_tokens=fit_max_tokens(model, config, len(ids), asked),
        sampling=sampling,
        stop=request.stop_strings,
    )
    return ChatPlan(
        generation,
        parse_calls=bool(offered),
        forced_call=bool(forced),
        one_call=bool(forced) or request.parallel_tool_calls is False,
        include_usage=request.include_usage,
    )


def _offered_tools(request: ChatRequest) -> tuple[list[Tool], list[Tool]]:
    """The tools that the model is told of, and those of which it must call one."""
    tools, choice = request.tools or [], request.tool_choice
    if choice is None or choice == "auto":
        return tools, []
    if choice == "none":
        return [], []
    if not tools:
        raise bad_request("tool_choice asks for a call, but there are no tools; add them", param="tool_choice")
    if isinstance(choice, NamedTool):
        named = [tool for tool in tools if tool.function.name == choice.function.name]
        if not named:
            raise bad_request(f"tool_choice names {choice.function.name!r}, which is no tool", param="tool_choice")
        return tools, named[:1]
    return tools, tools


def _messages(request: ChatRequest) -> list[dict[str, Any]]:
    return [_rendered(index, message) for index, message in enumerate(request.messages)]


def _rendered(index: int, message: Message) -> dict[str, Any]:
    """A message as chat templates take it: text in one piece, arguments of calls as objects."""
    if message.content is None and not (message.role == "assistant" and message.tool_calls):
        raise bad_request(f"messages[{index}]: has no content; add it", param="messages")
    rendered: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": message.text,
    }
    if message.name is not None:
        rendered["name"] = message.name
    if message.tool_calls:
        rendered["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        rendered["tool_call_id"] = message.tool_call_id
    return rendered


def _arguments(text: str) -> Any:
    """A call's arguments; those that a limit cut short stay text, for the model to see what it wrote."""
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text
    return text if is_deep(arguments) else arguments
