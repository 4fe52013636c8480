"""A Qwen tokenizer directory: text to ids and back, stop ids, and chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from trtqwen.artifact.names import CONFIG
from trtqwen.diagnostics import Diagnostic, SourceError
from trtqwen.hf.chat_template import ChatTemplate, read_chat_template
from trtqwen.hf.files import GENERATION_CONFIG, read_json, token_ids
from trtqwen.hf.resolved_tokenizer import resolve_tokenizer, tokens_around, write_tokenizer
from trtqwen.hf.tokenizer_files import TOKENIZER_CONFIG

_LONG_TEXT = 10_000  # characters, tokenized in some milliseconds


class Tokenizer:
    """The tokenizer of a model, combined from its files as transformers does.

    Attributes:
        findings: findings about the files.

    Raises:
        SourceError: if the directory has no byte-level BPE tokenizer, or its files contradict each other.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.resolved = resolve_tokenizer(directory)
        self._backend = self.resolved.backend
        self._before, self._behind = tokens_around(self._backend)
        self.findings: tuple[Diagnostic, ...] = self.resolved.findings

    def __len__(self) -> int:
        added = max(self._backend.get_added_tokens_decoder(), default=-1)
        return max(int(self._backend.get_vocab_size(with_added_tokens=True)), added + 1)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` and nothing else; special tokens written out in it count as special."""
        if len(text) < _LONG_TEXT:
            return list(self._backend.encode(text, add_special_tokens=False).ids)
        # A batch lets other threads of Python go on; alone, `encode` stops them all.
        [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=False)
        return list(encoding.ids)

    def encode_prompt(self, text: str) -> list[int]:
        """Return the token ids of a raw prompt, with the tokens that the tokenizer adds around a text, such as BOS.

        A text that begins with the same tokens, as a rendered conversation does, gets them once.
        """
        ids = self.encode(text)
        before = list(self._before)
        return [*([] if ids[: len(before)] == before else before), *ids, *self._behind]

    @property
    def adds_tokens(self) -> bool:
        """Whether a raw prompt gets tokens of its own."""
        return bool(self._before or self._behind)

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
        """Return a copy that encodes special tokens as text; the shared backend must not change."""
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
        """Id of the tokenizer's end token (`<|im_end|>` for Instruct models); without one, the first that files name.

        Raises:
            SourceError: if no file names one.
        """
        return self.stop_ids[0]

    @cached_property
    def pad_id(self) -> int:
        token = self._named("pad_token")
        return self.end_id if token is None else token

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Every id that ends an answer, the tokenizer's own first: the files of a Qwen model name different ones.

        Raises:
            SourceError: if no file names one.
        """
        ids = [token for listed in self.end_ids_by_file.values() for token in listed]
        if not ids:
            raise SourceError(
                f"{self.directory}: no file defines an end token",
                f"add eos_token to {TOKENIZER_CONFIG}, as the model's card has it",
            )
        return tuple(dict.fromkeys(ids))

    @cached_property
    def end_ids_by_file(self) -> Mapping[str, tuple[int, ...]]:
        """The ids that each file names as end of an answer.

        Raises:
            SourceError: if one is not a token id.
        """
        own = self._named("eos_token")
        ids: dict[str, tuple[int, ...]] = {TOKENIZER_CONFIG: () if own is None else (own,)}
        for name in (GENERATION_CONFIG, CONFIG):
            path = self.directory / name
            ids[name] = token_ids(read_json(path).get("eos_token_id"), "eos_token_id", path)
        return ids

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The model's chat templates; None for a model without."""
        return read_chat_template(
            self.directory, self.resolved.declared.get("chat_template"), self.resolved.special_tokens
        )

    @cached_property
    def token_bytes(self) -> tuple[bytes, ...]:
        """Return the bytes of each id; empty for special tokens, which decoding omits."""
        table = {character: byte for byte, character in enumerate(_byte_characters())}
        added = self._backend.get_added_tokens_decoder()

        def to_bytes(token_id: int) -> bytes:
            if token_id in added:
                token = added[token_id]
                return b"" if token.special else token.content.encode()
            text = self._backend.id_to_token(token_id) or ""
            try:
                return bytes([table[character] for character in text])
            except KeyError:
                return text.encode()  # no stand-ins for bytes: the decoder takes the text as it is

        return tuple(to_bytes(token_id) for token_id in range(len(self)))

    def make_tables(self) -> None:
        """Make the tables of the first use in advance: a vocabulary of 150,000 tokens takes half a second."""
        _ = self.token_bytes, self.special_pattern, self._plain_backend

    def write(self, directory: Path) -> None:
        """Write the complete tokenizer, with every stop id in generation_config.json.

        Whatever reads the directory, a python model, TensorRT-LLM or vLLM, gets the same ids and ends.
        """
        template = self.chat_template
        write_tokenizer(self.resolved, None if template is None else template.configured(), directory)
        settings = read_json(self.directory / GENERATION_CONFIG)
        settings["eos_token_id"] = list(self.stop_ids)
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        (directory / GENERATION_CONFIG).write_text(text + "\n", encoding="utf-8")

    def token_id(self, text: str) -> int | None:
        """The id of a whole token."""
        found: int | None = self._backend.token_to_id(text)
        return found

    def _named(self, name: str) -> int | None:
        token = self.resolved.special_tokens.get(name)
        return self.token_id(token) if isinstance(token, str) else None


def render_chat(template: ChatTemplate, messages: Sequence[Mapping[str, Any]]) -> str:
    """Render a conversation by a model's own chat template, ready for the assistant's turn.

    Raises:
        InputError: if the template is broken or refuses the messages.
    """
    return template.render(messages)


def _byte_characters() -> list[str]:
    """The printable stand-in of each byte in byte-level BPE: itself if printable Latin-1, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(substitutes)) for byte in range(256)]
