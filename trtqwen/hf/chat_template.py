"""The chat templates of a model, run as transformers' `apply_chat_template` runs them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import meta

from trtqwen.diagnostics import InputError, SourceError
from trtqwen.hf.files import shown
from trtqwen.hf.template_process import PATIENCE, TemplateRefusal, TemplateTimeout, environment, run_template

TEMPLATE_FILE, TEMPLATE_DIRECTORY = "chat_template.jinja", "additional_chat_templates"
DEFAULT, TOOL_USE = "default", "tool_use"
Messages = Sequence[Mapping[str, Any]]
_CUT = "CONTINUE_FINAL_MESSAGE_TAG "
_PROBE_NAME = "probe_of_calls"
_PROBES: tuple[Messages, ...] = (
    ({"role": "user", "content": "Hello"},),
    ({"role": "system", "content": "You are terse."}, {"role": "user", "content": "Hello"}),
)


class SlowTemplate(InputError):
    """A template exceeded its time limit."""


@dataclass(frozen=True)
class ChatTemplate:
    """Turns conversations into prompts.

    Attributes:
        texts: Jinja sources by name; `default` is among them.
        special_tokens: variables of every template, such as `bos_token`.
        unread: whether tokenizer_config.json has another template, which a file overrides.
        patience: time limit of a template, in seconds.
    """

    texts: Mapping[str, str]
    special_tokens: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    unread: bool = False
    patience: float = PATIENCE

    @property
    def takes_tools(self) -> bool:
        """Return whether the template reads tools."""
        return TOOL_USE in self.texts or "tools" in self.texts[DEFAULT]

    @property
    def takes_documents(self) -> bool:
        """Return whether the template reads documents."""
        return any("documents" in text for text in self.texts.values())

    @cached_property
    def calls_as_text(self) -> bool:
        """Return whether the template renders calls only with arguments as JSON text and null content.

        DeepSeek's template does so. Qwen's templates take arguments as objects, and some an empty content.
        """
        return not self._shows_calls("", {}) and self._shows_calls(None, "{}")

    def _shows_calls(self, content: str | None, arguments: Any) -> bool:
        call = {"type": "function", "function": {"name": _PROBE_NAME, "arguments": arguments}}
        turn = {"role": "assistant", "content": content, "tool_calls": [call]}
        try:
            return _PROBE_NAME in self.render([*_PROBES[0], turn, {"role": "tool", "content": "done"}])
        except InputError:
            return False

    def render(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **arguments: Any,
    ) -> str:
        """The prompt of a conversation.

        Args:
            tools: JSON schemas; with them the template `tool_use` is taken where there is one.
            add_generation_prompt: end with the beginning of the assistant's turn.
            continue_final_message: end inside the last message, which the model continues; needs
                `add_generation_prompt` off.
            arguments: further variables, such as `enable_thinking`; they replace special tokens of the same name.

        Raises:
            SlowTemplate: if it takes longer than `patience`.
            InputError: if the template is broken or refuses the messages.
        """
        if continue_final_message and add_generation_prompt:
            raise InputError(
                "continue_final_message and add_generation_prompt exclude each other", "leave one of the two out"
            )
        name = TOOL_USE if tools is not None and TOOL_USE in self.texts else DEFAULT
        shown_messages = _marked(messages) if continue_final_message else messages
        try:
            text = run_template(
                self.texts[name],
                {
                    **self.special_tokens,
                    **arguments,
                    "messages": shown_messages,
                    "tools": tools,
                    "documents": documents,
                    "add_generation_prompt": add_generation_prompt,
                },
                self.patience,
            )
        except TemplateRefusal as problem:
            kind = SlowTemplate if isinstance(problem, TemplateTimeout) else InputError
            raise kind(
                f"the chat template refuses these messages: {problem}",
                "send messages of the roles and fields that the template expects",
            ) from None
        return _cut(text, messages) if continue_final_message else text

    def check(self, where: Path) -> None:
        """Compile every template, and render a short conversation.

        Raises:
            SourceError: if one is no template, or the default renders no conversation at all.
        """
        for name, text in self.texts.items():
            try:
                run_template(text, None)
            except TemplateRefusal as problem:
                raise SourceError(
                    f"{where}: the chat template {name!r} is broken ({problem})", "correct the template"
                ) from None
        problems = []
        for probe in _PROBES:
            try:
                self.render(probe)
                return
            except InputError as problem:
                problems.append(problem.what)
        raise SourceError(f"{where}: the chat template cannot run ({problems[0]})", "correct the template")

    def standalone(self) -> str:
        """Return the default template with its special tokens as constants."""
        text = self.texts[DEFAULT]
        read = meta.find_undeclared_variables(environment().parse(text))
        lines = [
            f"{{% set {name} = {json.dumps(value, ensure_ascii=False)} %}}\n"
            for name, value in self.special_tokens.items()
            if name in read
        ]
        return "".join(lines) + text

    def configured(self) -> str | list[dict[str, str]]:
        """Return the value for tokenizer_config.json: a template, or a list of named ones."""
        if self.texts.keys() == {DEFAULT}:
            return self.texts[DEFAULT]
        return [{"name": name, "template": text} for name, text in self.texts.items()]


def read_chat_template(
    directory: Path, configured: Any, special_tokens: Mapping[str, str | Sequence[str]]
) -> ChatTemplate | None:
    """The templates of a directory: files first, as transformers reads them; None if there are none.

    Args:
        configured: `chat_template` of tokenizer_config.json: a template, or a list of named ones.

    Raises:
        SourceError: if there are several and none is named `default`, or one is empty.
    """
    texts = {}
    if (path := directory / TEMPLATE_FILE).is_file():
        texts[DEFAULT] = _read(path)
    for path in template_files(directory):
        texts[path.stem] = _read(path)
    others = {} if configured is None else _configured(directory, configured)
    unread = bool(texts and others) and texts != others
    texts = texts or others
    if not texts:
        return None
    if DEFAULT not in texts:
        raise SourceError(
            f"{directory}: has chat templates {', '.join(sorted(texts))}, and none named {DEFAULT!r}",
            f"name the one that chats use {DEFAULT!r}",
        )
    if empty := sorted(name for name, text in texts.items() if not text.strip()):
        raise SourceError(
            f"{directory}: the chat template {empty[0]!r} is empty: transformers renders every chat as nothing",
            "remove it, or copy the template of the model as published",
        )
    return ChatTemplate(texts, special_tokens, unread)


def template_files(directory: Path) -> list[Path]:
    """Named templates besides the default one."""
    return sorted((directory / TEMPLATE_DIRECTORY).glob("*.jinja"))


def _configured(directory: Path, configured: Any) -> dict[str, str]:
    if isinstance(configured, str):
        return {DEFAULT: configured}
    named = (
        [{"name": name, "template": text} for name, text in configured.items()]
        if isinstance(configured, dict)
        else configured
    )
    try:
        texts = {item["name"]: item["template"] for item in named}
    except (TypeError, KeyError):
        texts = {}
    if not texts or not all(isinstance(part, str) for item in texts.items() for part in item):
        raise SourceError(
            f"{directory}: chat_template of tokenizer_config.json is {shown(configured)}, neither a template nor a "
            "list of named ones",
            "correct it",
        )
    return texts


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise SourceError(f"{path}: is not UTF-8", "download the file again") from None


def _marked(messages: Messages) -> Messages:
    """Return a copy whose last text ends with a mark, at which the rendered text is cut."""
    if not messages:
        raise InputError("continue_final_message: there is no message", "send one")
    copy: list[Any] = deepcopy(list(messages))
    content = copy[-1].get("content")
    if isinstance(content, list):
        for block in reversed(content):
            if "text" in block:
                block["text"] += _CUT
                return copy
    if not isinstance(content, str):
        raise InputError("continue_final_message: the last message has no text", "give it a content to go on with")
    copy[-1]["content"] = content + _CUT
    return copy


def _cut(text: str, messages: Messages) -> str:
    content = messages[-1]["content"]
    if not isinstance(content, str):
        content = next(block["text"] for block in reversed(content) if "text" in block)
    mark = _CUT.strip()
    if content.strip() not in text or mark not in text:
        raise InputError(
            "continue_final_message: the chat template does not show the last message's text",
            "send the text as the template keeps it",
        )
    at = text.rindex(mark)
    # A template that strips contents has dropped the mark's trailing space, and means no space before it either.
    return text[:at] if text[at : at + len(_CUT)] == _CUT else text[:at].rstrip()
