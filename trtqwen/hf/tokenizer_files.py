"""A tokenizer's files, and the tokens that they declare."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from trtqwen.diagnostics import SourceError
from trtqwen.hf.files import read_json, shown

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
TOKENIZER_FILES = (
    TOKENIZER,
    TOKENIZER_CONFIG,
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    SPECIAL_TOKENS_MAP,
    ADDED_TOKENS,
    "chat_template.jinja",
)
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FURTHER = "additional_special_tokens"
Token = Any  # str, AddedToken or None; tokenizers has no types


def declared_tokens(
    directory: Path, config: Mapping[str, Any], defaults: Mapping[str, str]
) -> tuple[dict[int, AddedToken], dict[str, Token], list[Token]]:
    """Tokens by their declared ids, named tokens, and further special tokens. An explicit null names no token.

    Args:
        config: tokenizer_config.json.
        defaults: named tokens of the tokenizer's class, where the files name none.

    Raises:
        SourceError: if what a file declares is not a token.
    """
    config = dict(config)
    declared: dict[int, AddedToken] = {}
    path = directory / TOKENIZER_CONFIG
    if config.get("added_tokens_decoder") is not None:
        entries = config["added_tokens_decoder"]
        if not isinstance(entries, dict):
            raise SourceError(f"{path}: added_tokens_decoder is {shown(entries)}, not an object", "correct it")
        for key, value in entries.items():
            declared[_id(path, key)] = _added(path, value)
    else:
        _legacy(directory, config, declared)
    for name in NAMED:
        check_token(path, name, config.get(name))
    if not isinstance(config.get(FURTHER) or [], list):
        raise SourceError(f"{path}: {FURTHER} is {shown(config[FURTHER])}, not a list", "correct it")
    for token in config.get(FURTHER) or []:
        check_token(path, FURTHER, token)
    named = dict(defaults) | {name: token_of(config[name]) for name in NAMED if name in config}
    listed = [token for token in map(token_of, config.get(FURTHER) or []) if token is not None]
    return declared, named, listed


def _legacy(directory: Path, config: dict[str, Any], declared: dict[int, AddedToken]) -> None:
    """Files of slow tokenizers, which count where tokenizer_config.json declares no tokens."""
    for key, value in read_json(directory / SPECIAL_TOKENS_MAP).items():
        if key == FURTHER and isinstance(value, list):
            before = list(config.get(FURTHER) or [])
            value = before + [token for token in value if token not in before]
        elif isinstance(value, dict):
            value = {**value, "special": True}
        config[key] = value
    special = {text_of(token_of(config[name])) for name in NAMED if config.get(name) is not None}
    special |= {text_of(token_of(token)) for token in config.get(FURTHER) or []}
    for content, token_id in read_json(directory / ADDED_TOKENS).items():
        is_special = content in special
        declared[_id(directory / ADDED_TOKENS, token_id)] = AddedToken(
            content, normalized=not is_special, special=is_special
        )
    for entry in read_json(directory / TOKENIZER).get("added_tokens") or []:
        fields = dict(entry)
        declared[int(fields.pop("id"))] = _added(directory / TOKENIZER, fields)


def check_token(path: Path, name: str, value: Any) -> None:
    """Raise a SourceError if the value of a field is not a token."""
    whole = isinstance(value, dict) and isinstance(value.get("content"), str)
    if value is not None and not isinstance(value, str) and not whole:
        raise SourceError(f"{path}: {name} is {shown(value)}, not a token", "write the token's text")


def token_of(value: Any) -> Token:
    """A special token as JSON has it: a text, an object or null."""
    if isinstance(value, dict):
        return AddedToken(**{key: item for key, item in value.items() if key != "__type"})
    return value


def text_of(token: Token) -> str:
    """The text of a token."""
    return str(token.content if isinstance(token, AddedToken) else token)


def _added(path: Path, value: Any) -> AddedToken:
    try:
        return AddedToken(**{key: item for key, item in value.items() if key != "__type"})
    except (AttributeError, TypeError):
        raise SourceError(f"{path}: declares the token {shown(value)}, which is not a token", "correct it") from None


def _id(path: Path, value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise SourceError(
            f"{path}: declares a token of id {shown(value)}, which is not a number", "correct it"
        ) from None
