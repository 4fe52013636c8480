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
        reasons: whether it knows what a model thinks before it answers.

    Raises:
        SourceError: if it is not a template.
    """

    def __init__(self, text: str) -> None:
        try:
            self._template = chat_template(text)
        except TemplateError as problem:
            raise SourceError(f"the model's chat template is broken ({problem})", "download it again") from None
        self.takes_tools = "tools" in text
        self.reasons = "</think>" in text or "<think>" in text

    def render(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], **options: Any) -> str:
        """The prompt, ready for the assistant's turn.

        Args:
            options: further variables of the template; with `continue_final_message` the last turn stays open.

        Raises:
            ApiError: if the template refuses the messages.
        """
        variables = {"add_generation_prompt": True, **options}
        try:
            text = self._template.render(messages=messages, tools=tools or None, **variables)
        except (TemplateError, TypeError, ValueError) as problem:
            raise bad_request(f"the chat template refuses these messages: {problem}", param="messages") from None
        if options.get("continue_final_message"):
            last = str(messages[-1]["content"]).rstrip()
            text = text[: text.rindex(last) + len(last)]
        return text
