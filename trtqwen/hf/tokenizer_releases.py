"""Findings about tokenizer files for which transformers 4 and 5 give different ids."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, normalizers, pre_tokenizers

from trtqwen.diagnostics import Diagnostic
from trtqwen.hf.files import read_json
from trtqwen.hf.tokenizer_files import ADDED_TOKENS, TOKENIZER, TOKENIZER_CONFIG

_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def qwen_words() -> pre_tokenizers.PreTokenizer:
    """Splits a text into words as transformers' Qwen2Tokenizer does."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_QWEN_WORDS), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def undeclared_tokens(
    directory: Path, config: Mapping[str, Any], backend: tokenizers.Tokenizer
) -> Iterator[Diagnostic]:
    """Tokens that only a file declares which transformers does not read."""
    if config.get("added_tokens_decoder") is None:
        return
    lost = [token for token in read_json(directory / ADDED_TOKENS) if backend.token_to_id(token) is None]
    if lost:
        yield Diagnostic(
            f"{directory}: {ADDED_TOKENS} lists {', '.join(lost[:4])}, which added_tokens_decoder of "
            f"{TOKENIZER_CONFIG} does not: not added, as transformers does",
            f"add them to added_tokens_decoder if the model was trained with them, or remove {ADDED_TOKENS}",
            "warning",
            "tokenizer",
        )


def release_5_differences(
    directory: Path,
    config: Mapping[str, Any],
    kind: str,
    backend: tokenizers.Tokenizer,
    declared: Mapping[int, AddedToken],
) -> Iterator[Diagnostic]:
    """What transformers 5 takes from tokenizer_config.json alone, and release 4 from tokenizer.json too."""
    added = backend.get_added_tokens_decoder()
    lost = [token.content for token_id, token in sorted(added.items()) if token_id not in declared]
    if lost and config.get("added_tokens_decoder") is not None:
        yield Diagnostic(
            f"{directory / TOKENIZER_CONFIG}: added_tokens_decoder lacks {', '.join(lost[:4])}, which {TOKENIZER} "
            "has: transformers 4 and trtqwen know it, transformers 5 gives other ids",
            "add every token of tokenizer.json to added_tokens_decoder",
            "warning",
            "tokenizer",
        )
    if kind == "Qwen2Tokenizer" and config.get("add_prefix_space"):
        yield Diagnostic(
            f"{directory / TOKENIZER_CONFIG}: add_prefix_space is true: transformers 5 puts a space before a text, "
            "transformers 4 and trtqwen do as tokenizer.json says",
            "set it to false, as Qwen's models have it",
            "warning",
            "tokenizer",
        )


def rebuilt_by_release_5(directory: Path, backend: tokenizers.Tokenizer) -> Iterator[Diagnostic]:
    """transformers 5 splits texts of every Qwen2 by Qwen2's own rules; release 4 by the file's."""
    parts = (backend.normalizer, normalizers.NFC()), (backend.pre_tokenizer, qwen_words())
    if any(_split_state(mine) != _split_state(usual) for mine, usual in parts):
        yield Diagnostic(
            f"{directory / TOKENIZER}: splits texts in another way than Qwen2: transformers 4 and trtqwen do as the "
            "file says, transformers 5 as Qwen2",
            "",
            "warning",
            "tokenizer",
        )


def _split_state(part: Any) -> Any:
    if part is None:
        return None
    state = json.loads(part.__getstate__())
    for item in state.get("pretokenizers", []):
        item.pop("trim_offsets", None)
    return state
