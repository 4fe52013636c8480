"""The model's own chat template, compiled once: it turns a conversation and its tools into a prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trtqwen.errors import SourceError
from trtqwen.gateway.errors import bad_request


class ChatTemplate:
    """A template as `transformers` runs it: in jinja2's sandbox, because it is data from a model directory.

    Attributes:
        takes_tools: whether it has a place for tools.

    Raises:
        SourceError: if it is not a template.
    """

    def __init__(self, text: str) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        environment.filters["tojson"] = _to_json
        try:
            self._template = environment.from_string(text)
        except TemplateError as problem:
            raise SourceError(f"the model's chat template is broken ({problem}); download it again") from None
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


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes what HTML needs, which a prompt does not.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
