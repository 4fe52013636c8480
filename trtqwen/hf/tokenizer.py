"""A Qwen tokenizer directory: text to ids and back, stop ids, and chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trtqwen.diagnostics import InputError, SourceError

_LONG_TEXT = 10_000  # characters, tokenised in some milliseconds


class Tokenizer:
    """The tokenizer of a model, read from `tokenizer.json` and its companions.

    Raises:
        SourceError: if the directory has no byte-level BPE `tokenizer.json`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise SourceError(f"{directory}: has no tokenizer.json", "copy the model's tokenizer files there")
        try:
            self._backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as problem:  # the library raises bare Exception
            raise SourceError(f"{path}: is not a tokenizer ({problem})", "download the file again") from None
        if not isinstance(self._backend.decoder, tokenizers.decoders.ByteLevel):
            raise SourceError(f"{path}: is not a byte-level BPE tokenizer, as Qwen's are")
        self._config = _read_json(directory / "tokenizer_config.json")
        self._generation = _read_json(directory / "generation_config.json")

    def __len__(self) -> int:
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens written out in it count as special."""
        if len(text) < _LONG_TEXT:
            return list(self._backend.encode(text, add_special_tokens=False).ids)
        # A batch lets other threads of Python go on; alone, `encode` stops them all.
        [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=False)
        return list(encoding.ids)

    def encode_marked(self, text: str, mark: str) -> list[int]:
        """Token ids of `text` without the marks; a special token with a mark inside is plain text."""
        ids: list[int] = []
        begin = 0
        for match in self.special_pattern.finditer(text):
            ids += self._encode_plain(text[begin : match.start()].replace(mark, ""))
            ids.append(self._backend.token_to_id(match[0]))
            begin = match.end()
        return ids + self._encode_plain(text[begin:].replace(mark, ""))

    def _encode_plain(self, text: str) -> list[int]:
        if not text:
            return []
        [encoding] = self._plain_backend.encode_batch_fast([text], add_special_tokens=False)
        return list(encoding.ids)

    @cached_property
    def _plain_backend(self) -> Any:
        """A copy that takes special tokens for text: to change the one that others use would change their answers."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.encode_special_tokens = True
        return backend

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Finds special tokens that are written out in a text."""
        added = self._backend.get_added_tokens_decoder().values()
        special = sorted((token.content for token in added if token.special), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, special)) or "(?!)")

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    @cached_property
    def end_id(self) -> int:
        """Id of the tokenizer's end token (`<|im_end|>` for Instruct models).

        Raises:
            SourceError: if tokenizer_config.json names none.
        """
        token = self._token("eos_token")
        if token is None:
            raise SourceError(f"{self.directory / 'tokenizer_config.json'}: names no eos_token", "add it")
        return token

    @cached_property
    def pad_id(self) -> int:
        token = self._token("pad_token")
        return self.end_id if token is None else token

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Every id that ends an answer, the tokenizer's own first: the files of a Qwen model name different ones."""
        listed = self._generation.get("eos_token_id", [])
        others = listed if isinstance(listed, list) else [listed]
        return tuple(dict.fromkeys([self.end_id, *others]))

    @cached_property
    def chat_template(self) -> str | None:
        path = self.directory / "chat_template.jinja"
        template = path.read_text(encoding="utf-8") if path.is_file() else self._config.get("chat_template")
        return template if isinstance(template, str) else None

    @cached_property
    def token_bytes(self) -> tuple[bytes, ...]:
        """The bytes each id stands for; empty for special tokens, which decoding leaves out."""
        table = {character: byte for byte, character in enumerate(_byte_characters())}
        added = self._backend.get_added_tokens_decoder()

        def to_bytes(token_id: int) -> bytes:
            if token_id in added:
                token = added[token_id]
                return b"" if token.special else token.content.encode()
            return bytes(table[character] for character in self._backend.id_to_token(token_id) or "")

        return tuple(to_bytes(token_id) for token_id in range(len(self)))

    def _token(self, key: str) -> int | None:
        token = self._config.get(key)
        content = token.get("content") if isinstance(token, dict) else token
        return self._backend.token_to_id(content) if isinstance(content, str) else None


@cache
def chat_template(text: str) -> Template:
    """A chat template as `transformers` runs it: in jinja2's sandbox, because it is data from a model directory.

    Raises:
        TemplateError: if it is not a template.
    """
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    environment.filters["tojson"] = _to_json
    return environment.from_string(text)


def render_chat(template: str, messages: Sequence[Mapping[str, str]]) -> str:
    """Render a conversation by a model's own chat template, ready for the assistant's turn.

    Raises:
        InputError: if the template is broken or refuses the messages.
    """
    try:
        return chat_template(template).render(messages=messages, add_generation_prompt=True)
    except TemplateError as problem:
        raise InputError(f"the chat template refuses these messages: {problem}", "change them") from None


def _byte_characters() -> list[str]:
    """The printable stand-in of each byte in byte-level BPE: itself if printable Latin-1, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(substitutes)) for byte in range(256)]


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


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise SourceError(f"{path}: is not JSON ({problem})", "download the file again") from None
    if not isinstance(content, dict):
        raise SourceError(f"{path}: is not a JSON object", "download the file again")
    return content
