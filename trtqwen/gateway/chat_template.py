"""The model's chat templates for clients of the web: what they cannot render is the client's mistake."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from trtqwen.diagnostics import InputError
from trtqwen.gateway.errors import bad_request
from trtqwen.hf import chat_template as hf


class ChatTemplate:
    """Renders what clients send.

    Attributes:
        takes_tools: whether there is a place for tools.
        takes_documents: whether there is a place for documents.
        reasons: whether a template knows what a model thinks before it answers.
    """

    def __init__(self, template: hf.ChatTemplate) -> None:
        self._template = template
        self.takes_tools = template.takes_tools
        self.takes_documents = template.takes_documents
        self.reasons = any("<think>" in text or "</think>" in text for text in template.texts.values())

    def render(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], **options: Any) -> str:
        """The prompt, ready for the assistant's turn.

        Args:
            options: further arguments of `trtqwen.hf.chat_template.ChatTemplate.render`; with
                `continue_final_message` the last turn stays open.

        Raises:
            ApiError: if the template refuses the messages.
        """
        if self._template.calls_as_text:
            messages = _calls_as_text(messages)
        try:
            return self._template.render(messages, tools=tools or None, **options)
        except InputError as problem:
            raise bad_request(problem.what, param="messages") from None


def _calls_as_text(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as DeepSeek's template takes calls: arguments in JSON, and a null where there is no content."""
    copy = deepcopy(list(messages))
    for message in copy:
        for call in message.get("tool_calls") or ():
            function = call["function"]
            if not isinstance(function["arguments"], str):
                function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        if message.get("tool_calls"):
            message["content"] = message.get("content") or None
    return copy
