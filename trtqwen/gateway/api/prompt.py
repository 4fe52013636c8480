"""Rendering of a conversation with the model's template; clients' text stays plain text.

The text of a special token in a message or a tool, such as `<|im_end|>`, is encoded as plain text, because it must
not end a turn. A mark inside it distinguishes it from the special tokens of the template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from trtqwen.gateway.api.fields import is_deep
from trtqwen.gateway.api.reasoning import BEGIN
from trtqwen.gateway.api.schemas import Message, Tool
from trtqwen.gateway.chat_template import ChatTemplate
from trtqwen.gateway.config import GatewayConfig
from trtqwen.gateway.errors import ApiError, bad_request, unsupported
from trtqwen.gateway.model import ServedModel

_MARKS = "".join(map(chr, range(0xFDD0, 0xFDF0)))  # noncharacters, which no text has
_OWN_VARIABLES = {"messages", "tools", "add_generation_prompt", "continue_final_message"}


class Conversation:
    """A rendered conversation.

    Args:
        add_generation_prompt: begin the assistant's turn; None does so unless the last turn is continued.
        continue_final: the last turn, the assistant's, is left open.
        variables: further ones of the template.
        documents: what the answer is to rest on, for templates of retrieval-augmented generation.

    Attributes:
        text: the rendered text, with the marks.

    Raises:
        ApiError: if there is no template, or it refuses the messages.
    """

    def __init__(
        self,
        model: ServedModel,
        template: ChatTemplate | None,
        config: GatewayConfig,
        messages: Sequence[Message],
        tools: Sequence[Tool],
        *,
        add_generation_prompt: bool | None = None,
        continue_final: bool = False,
        variables: Mapping[str, Any] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        if template is None:
            raise ApiError(404, f"{model.name} has no chat template; use /v1/completions", "no_chat_template")
        if continue_final and add_generation_prompt:
            message = (
                "add_generation_prompt begins a new turn, continue_final_message goes on with the last; send one"
            )
            raise bad_request(message, param="continue_final_message")
        if continue_final and messages[-1].role != "assistant":
            message = (
                "continue_final_message goes on with the assistant's text, but the last message is not its; add it"
            )
            raise bad_request(message, param="continue_final_message")
        if own := sorted(_OWN_VARIABLES & (variables or {}).keys()):
            raise bad_request(f"chat_template_kwargs has {own[0]!r}, which has a field of its own; use that")
        given: Any = dict(variables or {})
        if documents is not None:
            if "documents" in given:
                message = "documents are given twice, in the field of that name and in chat_template_kwargs; send one"
                raise bad_request(message, param="documents")
            given["documents"] = documents
        if given.get("documents") and not template.takes_documents:
            message = f"the chat template of {model.name} has no place for documents; put them into the messages"
            raise unsupported("documents", message)
        self._model = model
        self._reasons = template.reasons
        turns: Any = [rendered(index, message) for index, message in enumerate(messages)]
        offered: Any = [tool.model_dump(exclude_none=True) for tool in tools]
        self._mark = ""
        if not config.special_tokens_in_messages:
            turns, offered, given = self._marked(turns, offered, given)
        begin = not continue_final if add_generation_prompt is None else add_generation_prompt
        options = {"continue_final_message": True} if continue_final else {}
        self.text = template.render(turns, offered, **{**given, **options, "add_generation_prompt": begin})

    def ids(self, more: str = "") -> tuple[int, ...]:
        """Token ids of the prompt.

        Args:
            more: text that begins the answer.
        """
        return self._model.encode(self.text + more, "messages", mark=self._mark)

    def reasoning(self, config: GatewayConfig) -> Literal["inside", "outside"] | None:
        """Return where an answer with reasoning begins; None without reasoning."""
        if not (self._reasons if config.reasoning is None else config.reasoning):
            return None
        return "inside" if self.text.rstrip().endswith(BEGIN) else "outside"

    def _marked(self, *parts: Any) -> tuple[Any, ...]:
        pattern = self._model.tokenizer.special_pattern
        if not _holds(parts, pattern):
            return parts
        used = json.dumps(parts, ensure_ascii=False)
        self._mark = next((mark for mark in _MARKS if mark not in used), _MARKS[0])

        def mark(match: re.Match[str]) -> str:
            return match[0][0] + self._mark + match[0][1:]

        return tuple(_replaced(part, pattern, mark) for part in parts)


def rendered(index: int, message: Message) -> dict[str, Any]:
    """A message as chat templates take it: text in one piece, arguments of calls as objects."""
    calls = [call.function for call in message.tool_calls or ()]
    if message.function_call is not None and not calls:
        calls = [message.function_call]
    if message.content is None and message.role != "assistant":
        raise bad_request(f"messages[{index}]: has no content; add it", param="messages")
    role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
    turn: dict[str, Any] = {"role": role, "content": message.text}
    if message.name is not None:
        turn["name"] = message.name
    if message.thought:
        turn["reasoning_content"] = message.thought
    if calls:
        ids = [call.id for call in message.tool_calls or ()] or [None]
        turn["tool_calls"] = [
            {
                **({} if call_id is None else {"id": call_id}),
                "type": "function",
                "function": {"name": call.name, "arguments": _arguments(call.arguments)},
            }
            for call_id, call in zip(ids, calls, strict=True)
        ]
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    return turn


def _arguments(given: str | dict[str, Any] | None) -> Any:
    """A call's arguments; those that a limit cut short stay text, for the model to see what it wrote."""
    if not isinstance(given, str):
        return given or {}
    try:
        arguments = json.loads(given or "{}")
    except (ValueError, RecursionError):
        return given
    if arguments is None:
        return {}
    return given if is_deep(arguments) else arguments


def _holds(value: Any, pattern: re.Pattern[str]) -> bool:
    if isinstance(value, str):
        return pattern.search(value) is not None
    if isinstance(value, Mapping):
        return any(_holds(key, pattern) or _holds(inner, pattern) for key, inner in value.items())
    return isinstance(value, (list, tuple)) and any(_holds(inner, pattern) for inner in value)


def _replaced(value: Any, pattern: re.Pattern[str], mark: Any) -> Any:
    if isinstance(value, str):
        return pattern.sub(mark, value)
    if isinstance(value, Mapping):
        return {pattern.sub(mark, key): _replaced(inner, pattern, mark) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_replaced(inner, pattern, mark) for inner in value)
    return value
