"""The model's own chat template, compiled once: it turns a conversation and its tools into a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from trtqwen.diagnostics import SourceError
from trtqwen.gateway.errors import bad_request
from trtqwen.hf.tokenizer import chat_template


class ChatTemplate:
    """A template that takes tools, for clients of the web.

    Attributes:
        takes_tools: whether it has a place for tools.

    Raises:
        SourceError: if it is not a template.
    """

    def __init__(self, text: str) -> None:
        try:
            self._template = chat_template(text)
        except TemplateError as problem:
            raise SourceError(f"the model's chat template is broken ({problem})", "download it again") from None
        self.takes_tools = "tools" in text

    def render(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> str:
        """The prompt, ready for the assistant's turn.

        Raises:
            ApiError: if the template refuses the messages.
        """
        try:
            return self._template.render(messages=messages, tools=tools or None, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError) as problem:
            raise bad_request(f"the chat template refuses these messages: {problem}", param="messages") from None
