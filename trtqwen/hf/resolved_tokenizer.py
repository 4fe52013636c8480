"""The tokenizer of a directory, from all of its files, as transformers' `AutoTokenizer` combines them.

`tokenizer.json` is not the whole tokenizer: transformers drops its truncation and padding, adds the tokens that only
`tokenizer_config.json` or `added_tokens.json` declare, takes BOS, EOS and PAD from there, and for LlamaTokenizer
(which DeepSeek-R1-Distill-Qwen names) puts BOS first. The rules are those of transformers 4.57, which
TensorRT-LLM 1.2 pins; where transformers 5 gives other ids for the same files, a finding says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from trtqwen.diagnostics import Diagnostic, SourceError
from trtqwen.hf.files import check_downloaded, read_json, shown
from trtqwen.hf.tokenizer_files import (
    FURTHER,
    NAMED,
    TOKENIZER,
    TOKENIZER_CONFIG,
    Token,
    check_token,
    declared_tokens,
    text_of,
    token_of,
)
from trtqwen.hf.tokenizer_releases import qwen_words, rebuilt_by_release_5, release_5_differences, undeclared_tokens

_END = "<|endoftext|>"
# What each class of transformers takes for named tokens that the files leave out. TokenizersBackend is of release 5.
_DEFAULTS: dict[str, dict[str, str]] = {
    "Qwen2Tokenizer": {"unk_token": _END, "eos_token": _END, "pad_token": _END},
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "GPT2Tokenizer": {"unk_token": _END, "bos_token": _END, "eos_token": _END},
    "PreTrainedTokenizer": {},
    "TokenizersBackend": {},
}


@dataclass(frozen=True)
class ResolvedTokenizer:
    """A complete tokenizer.

    Attributes:
        backend: without truncation and padding, with every declared token.
        special_tokens: what chat templates know by name.
        declared: tokenizer_config.json.
        findings: findings about the files.
    """

    backend: tokenizers.Tokenizer
    special_tokens: dict[str, str | list[str]]
    declared: dict[str, Any]
    findings: tuple[Diagnostic, ...]


def resolve_tokenizer(directory: Path) -> ResolvedTokenizer:
    """Combine the files of a directory.

    Raises:
        SourceError: if files are missing or damaged, contradict each other, or are not a byte-level BPE tokenizer.
    """
    config = read_json(directory / TOKENIZER_CONFIG)
    kind = _kind(directory, config)
    backend = _backend(directory, kind)
    _check_model(directory / TOKENIZER, backend)
    padding = backend.padding
    backend.no_truncation()
    backend.no_padding()
    declared, named, listed = declared_tokens(directory, config, _DEFAULTS[kind])
    findings = [*release_5_differences(directory, config, kind, backend, declared)]
    if padding is not None:
        named.setdefault("pad_token", padding["pad_token"])
    extra = config.get("extra_special_tokens")
    for token in extra.values() if isinstance(extra, dict) else extra or []:
        check_token(directory / TOKENIZER_CONFIG, "extra_special_tokens", token)
    if isinstance(extra, dict):
        named |= {name: token_of(value) for name, value in extra.items()}
    elif isinstance(extra, list):
        listed = [*listed, *(token for token in map(token_of, extra) if token not in listed)]
    known = {token.content: token for token in declared.values()}
    named = {name: known.get(str(text_of(token)), token) for name, token in named.items() if token is not None}
    if kind == "Qwen2Tokenizer":
        named = {name: _special(token) for name, token in named.items()}
    backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
    _add_tokens(backend, declared, named, listed)
    _check_ids(directory, backend, declared)
    _prefix_space(backend, bool(config.get("add_prefix_space") or False))
    findings += [*undeclared_tokens(directory, config, backend), *rebuilt_by_release_5(directory, backend)]
    if kind == "LlamaTokenizer":
        findings += _begin_and_end(directory, backend, config, named)
    special: dict[str, str | list[str]] = {name: text_of(token) for name, token in named.items()}
    if listed and not isinstance(extra, list):
        special[FURTHER] = [text_of(token) for token in listed]
    return ResolvedTokenizer(backend, special, config, tuple(findings))


def write_tokenizer(resolved: ResolvedTokenizer, chat_template: Any, directory: Path) -> None:
    """Write the complete tokenizer: AutoTokenizer, and every reader of `tokenizer.json` alone, gets the same ids.

    Args:
        chat_template: as tokenizer_config.json has it; None without one.
    """
    backend, config = resolved.backend, dict(resolved.declared)
    for key in ("chat_template", "auto_map", "extra_special_tokens", "backend", "processor_class", *NAMED, FURTHER):
        config.pop(key, None)
    config |= {name: resolved.special_tokens.get(name) for name in NAMED}
    config |= {name: value for name, value in resolved.special_tokens.items() if name not in NAMED}
    config["added_tokens_decoder"] = {
        str(token_id): _state(token) for token_id, token in sorted(backend.get_added_tokens_decoder().items())
    }
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if chat_template is not None:
        config["chat_template"] = chat_template
    directory.mkdir(exist_ok=True)
    backend.save(str(directory / TOKENIZER))
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (directory / TOKENIZER_CONFIG).write_text(text + "\n", encoding="utf-8")


def _kind(directory: Path, config: Mapping[str, Any]) -> str:
    """The class that transformers loads, without `Fast`."""
    name = config.get("tokenizer_class") or "Qwen2Tokenizer"
    kind = str(name).removesuffix("Fast")
    if kind not in _DEFAULTS:
        raise SourceError(
            f"{directory / TOKENIZER_CONFIG}: tokenizer_class is {shown(name)}, which Qwen2 models do not use",
            f"use the tokenizer as published; trtqwen knows {', '.join(_DEFAULTS)}",
        )
    return kind


def _backend(directory: Path, kind: str) -> tokenizers.Tokenizer:
    path, vocabulary = directory / TOKENIZER, [directory / name for name in ("vocab.json", "merges.txt")]
    if path.is_file():
        with path.open("rb") as file:
            check_downloaded(path, file.read(128))
        try:
            return tokenizers.Tokenizer.from_file(str(path))
        except Exception as problem:  # the library raises bare Exception
            raise SourceError(f"{path}: is not a tokenizer ({problem})", "download the file again") from None
    if kind != "Qwen2Tokenizer" or not all(path.is_file() for path in vocabulary):
        raise SourceError(f"{directory}: has no tokenizer.json", "copy the model's tokenizer files there")
    try:
        backend = tokenizers.Tokenizer(BPE.from_file(*map(str, vocabulary)))
    except Exception as problem:
        raise SourceError(
            f"{directory}: vocab.json and merges.txt are not a BPE vocabulary ({problem})", "download them again"
        ) from None
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = qwen_words()
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def _check_model(path: Path, backend: tokenizers.Tokenizer) -> None:
    if not isinstance(backend.model, BPE) or not isinstance(backend.decoder, decoders.ByteLevel):
        raise SourceError(
            f"{path}: is not a byte-level BPE tokenizer, as Qwen's are",
            "take tokenizer.json from the model as published",
        )
    if backend.model.dropout:
        raise SourceError(
            f"{path}: has a dropout of {backend.model.dropout:g}: a text gets other ids each time",
            "set model.dropout to null; it is meant for training",
        )


def _add_tokens(
    backend: tokenizers.Tokenizer,
    declared: Mapping[int, AddedToken],
    named: Mapping[str, Token],
    listed: Iterable[Token],
) -> None:
    """Add tokens that differ from the backend's, in transformers' order."""
    present = backend.get_added_tokens_decoder().values()
    alike = {repr(token) for token in present}
    missing: list[Token] = [token for _, token in sorted(declared.items()) if repr(token) not in alike]
    seen = {token.content for token in (*present, *missing)}
    special = {text_of(token) for token in (*named.values(), *listed)}
    for token in (*named.values(), *listed):
        if text_of(token) not in seen:
            missing.append(token)
            seen.add(text_of(token))
    tokens = []
    for token in missing:
        content = text_of(token)
        if isinstance(token, str):
            token = AddedToken(token, special=content in special)
        else:
            token.special = token.special or content in special
        tokens.append(token)
    if tokens:
        backend.add_tokens(tokens)


def _check_ids(directory: Path, backend: tokenizers.Tokenizer, declared: Mapping[int, AddedToken]) -> None:
    for token_id, token in sorted(declared.items()):
        given = backend.token_to_id(token.content)
        if given != token_id:
            raise SourceError(
                f"{directory}: the tokenizer's files disagree: token {token.content!r} is declared as id {token_id}, "
                f"and {TOKENIZER} makes it {given} (as transformers does)",
                "take the tokenizer's files from one model, all of them",
            )


def _begin_and_end(
    directory: Path, backend: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, Token]
) -> Iterator[Diagnostic]:
    """Add BOS and EOS around a text as LlamaTokenizer does, by tokenizer_config.json."""
    before = [token.id for token in _around(backend)]
    wanted = []
    for flag, name, default in (("add_bos_token", "bos_token", True), ("add_eos_token", "eos_token", False)):
        value = config.get(flag, default)
        if value and name not in named:
            raise SourceError(
                f"{directory / TOKENIZER_CONFIG}: {flag} is true, but {name} is not named", f"name {name}"
            )
        wanted.append(text_of(named[name]) if value else "")
    begin, end = wanted
    single = [*([f"{begin}:0"] if begin else []), "$A:0", *([f"{end}:0"] if end else [])]
    pair = [*single, *([f"{begin}:1"] if begin else []), "$B:1", *([f"{end}:1"] if end else [])]
    backend.post_processor = processors.TemplateProcessing(
        single=single,
        pair=pair,
        special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys(wanted) if token],
    )
    after = [token.id for token in _around(backend)]
    if before != after:
        yield Diagnostic(
            f"{directory}: tokenizer_class LlamaTokenizer puts {begin or 'nothing'} before and {end or 'nothing'} "
            f"behind a text (add_bos_token, add_eos_token), which {TOKENIZER} does not: transformers 4 does so, "
            "transformers 5 does not",
            "",
            "warning",
            "tokenizer",
        )


@dataclass(frozen=True)
class Around:
    """A token that the post-processor adds around a text."""

    id: int
    before: bool


def _around(backend: tokenizers.Tokenizer) -> list[Around]:
    """The tokens that are put around a text."""
    plain = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a", add_special_tokens=True).ids
    extra = len(whole) - len(plain)
    at = next((start for start in range(extra + 1) if whole[start : start + len(plain)] == plain), 0)
    return [Around(token, place < at) for place, token in enumerate(whole) if not at <= place < at + len(plain)]


def tokens_around(backend: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids that the tokenizer puts before and behind a text."""
    around = _around(backend)
    return (
        tuple(token.id for token in around if token.before),
        tuple(token.id for token in around if not token.before),
    )


def _prefix_space(backend: tokenizers.Tokenizer, add_prefix_space: bool) -> None:
    """A lone ByteLevel pre-tokenizer follows tokenizer_config.json's add_prefix_space."""
    part = backend.pre_tokenizer
    if isinstance(part, pre_tokenizers.ByteLevel) and part.add_prefix_space != add_prefix_space:
        part.add_prefix_space = add_prefix_space
        backend.pre_tokenizer = part


def _special(token: Token) -> Token:
    return AddedToken(token, normalized=False, special=True) if isinstance(token, str) else token


def _state(token: AddedToken) -> dict[str, Any]:
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {name: getattr(token, name) for name in names}
