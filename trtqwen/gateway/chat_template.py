"""The model's chat templates for web clients: a message that they cannot render is a client's error."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

from trtqwen.diagnostics import InputError
from trtqwen.gateway.errors import bad_request
from trtqwen.hf import chat_template as hf

_QUICK_SECONDS = 0.05  # that every stream may wait for a template


class NeedsThread(Exception):
    """A template takes too long for the event loop: try again in a thread."""


class ChatTemplate:
    """Renders clients' messages in another process, because a template is an untrusted program.

    Attributes:
        slow: whether the template was slow once; the event loop does not wait for it again.
        takes_tools: whether a template reads tools.
        takes_documents: whether a template reads documents.
        reasons: whether a template has reasoning.
    """

    def __init__(self, template: hf.ChatTemplate) -> None:
        self._template = template
        self._quick = replace(template, patience=_QUICK_SECONDS)
        self._calls_as_text = template.calls_as_text
        self.slow = False
        self.takes_tools = template.takes_tools
        self.takes_documents = template.takes_documents
        self.reasons = any("<think>" in text or "</think>" in text for text in template.texts.values())

    def render(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], **options: Any) -> str:
        """The prompt, ready for the assistant's turn.

        Args:
            options: further arguments of `trtqwen.hf.chat_template.ChatTemplate.render`; with
                `continue_final_message` the last turn stays open.

        Raises:
            NeedsThread: if an event loop runs in this thread, and the template is not quick.
            ApiError: if the template refuses the messages.
        """
        if self._calls_as_text:
            messages = _calls_as_text(messages)
        template = self._quick if _in_event_loop() else self._template
        try:
            if self.slow and template is self._quick:
                raise NeedsThread
            return template.render(messages, tools=tools or None, **options)
        except hf.SlowTemplate as problem:
            if template is self._quick:
                self.slow = True
                raise NeedsThread from None
            raise bad_request(problem.what, param="messages") from None
        except InputError as problem:
            raise bad_request(problem.what, param="messages") from None


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _calls_as_text(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with calls as DeepSeek's template reads them: arguments as JSON text, empty content as null."""
    copy = deepcopy(list(messages))
    for message in copy:
        for call in message.get("tool_calls") or ():
            function = call["function"]
            if not isinstance(function["arguments"], str):
                function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        if message.get("tool_calls"):
            message["content"] = message.get("content") or None
    return copy
