"""Checks whether a model can be served: tokenizer, end ids, chat template and sampling defaults.

`convert` and `build` run these checks before they write anything; `doctor` runs each on its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from trtqwen.diagnostics import Diagnostic, InputError, SourceError
from trtqwen.hf.config import HfConfig, load_config
from trtqwen.hf.files import GENERATION_CONFIG, read_json
from trtqwen.hf.generation import generation_defaults, generation_findings
from trtqwen.hf.source import HfModel
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.hf.tokenizer_files import TOKENIZER, TOKENIZER_CONFIG
from trtqwen.hf.weights import INDEX

_ANSWER = "ANSWER"
_MARKS = re.compile(r"<[|｜][^<>\s]{1,40}[|｜]>")  # as Qwen and DeepSeek write them
_TURNS = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": _ANSWER})


def read_model(directory: Path) -> tuple[HfConfig, tuple[Diagnostic, ...]]:
    """Read the config of a directory that may have no weights yet, and return findings about its files.

    Raises:
        SourceError: as `convert`, for config, weights and tokenizer, if they exist.
    """
    if not any(directory.glob("*.safetensors")) and not (directory / INDEX).is_file():
        config = load_config(directory)
        return config, config.findings
    source = HfModel(directory)
    if not has_tokenizer(directory):
        return source.config, source.findings
    return source.config, check_model(source)[1]


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory has files of a tokenizer."""
    return any((directory / name).is_file() for name in (TOKENIZER, TOKENIZER_CONFIG, "vocab.json"))


def check_model(source: HfModel) -> tuple[Tokenizer, tuple[Diagnostic, ...]]:
    """Run every check.

    Returns:
        The tokenizer, and findings about the directory, weights and config included.

    Raises:
        SourceError: the first error.
    """
    tokenizer = Tokenizer(source.directory)
    if tokenizer.chat_template is not None:
        tokenizer.chat_template.check(source.directory)
    generation_defaults(source.directory)
    found = [
        *source.findings,
        *tokenizer.findings,
        *vocabulary_findings(tokenizer, source.config),
        *end_findings(tokenizer, source.config),
        *generation_findings(source.directory),
        *template_findings(tokenizer),
    ]
    for finding in found:
        if finding.level == "error":
            raise SourceError(f"{source.directory}: {finding.what}", finding.hint)
    return tokenizer, tuple(found)


def vocabulary_findings(tokenizer: Tokenizer, config: HfConfig) -> Iterator[Diagnostic]:
    """Tokens without a row of the embedding."""
    if len(tokenizer) > config.vocab_size:
        yield Diagnostic(
            f"the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size} rows of its embedding",
            "take the tokenizer of this model; after adding tokens, call resize_token_embeddings and save both",
            code="vocabulary",
        )


def end_findings(tokenizer: Tokenizer, config: HfConfig) -> Iterator[Diagnostic]:
    """Find end ids that are not tokens, and turns without an end token."""
    named = tokenizer.end_ids_by_file
    words = ", ".join(f"{file} {', '.join(map(str, ids)) or 'none'}" for file, ids in named.items())
    if beyond := [token for token in tokenizer.stop_ids if token >= config.vocab_size]:
        yield Diagnostic(
            f"end ids {', '.join(map(str, beyond))} are beyond the {config.vocab_size} rows of the embedding: "
            f"{words}",
            "take tokenizer and config files from one model",
            code="end-ids",
        )
    elif beyond := [token for token in tokenizer.stop_ids if token >= len(tokenizer)]:
        yield Diagnostic(
            f"end ids {', '.join(map(str, beyond))} are not tokens, the tokenizer has {len(tokenizer)}: {words}",
            "take tokenizer and config files from one model",
            code="end-ids",
        )
    turn_end = end_of_turn(tokenizer)
    if turn_end is not None and turn_end not in tokenizer.stop_ids:
        text = f"{tokenizer.decode([turn_end], skip_special_tokens=False)} ({turn_end})"
        if is_instruct(tokenizer.directory):
            yield Diagnostic(
                f"the chat template ends a turn with {text}, which ends no answer: {words}",
                "take generation_config.json and tokenizer_config.json from the Instruct model",
                code="end-ids",
            )
        else:
            yield Diagnostic(
                f"the chat template ends a turn with {text}, which ends no answer: {words}",
                "a base model completes text: do not serve it as chat, or take the Instruct model",
                "warning",
                "end-ids",
            )
    defaults = tokenizer.resolved.declared
    if defaults.get("add_eos_token") and tokenizer.encode_prompt("a")[-1:] == [tokenizer.end_id]:
        yield Diagnostic(
            "the tokenizer ends every raw prompt with its end token (add_eos_token), as transformers does, and the "
            "model goes on after it",
            "set add_eos_token to false: it is meant for training",
            "warning",
            "end-ids",
        )


def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The special token that follows an assistant's answer; None if the template has none, or no such turn."""
    template = tokenizer.chat_template
    if template is None:
        return None
    try:
        text = template.render(_TURNS, add_generation_prompt=False)
    except InputError:
        return None
    _, found, rest = text.rpartition(_ANSWER)
    ids = tokenizer.encode(rest.lstrip())[:1] if found else []
    return ids[0] if ids and ids[0] in tokenizer.resolved.backend.get_added_tokens_decoder() else None


def template_findings(tokenizer: Tokenizer) -> Iterator[Diagnostic]:
    """A missing template, or one whose marks are not tokens."""
    template = tokenizer.chat_template
    if template is None:
        yield Diagnostic(
            "there is no chat template: chats are refused, and prompts are completed as they are",
            "copy chat_template.jinja or tokenizer_config.json from the Instruct model, if it is one",
            "warning",
            "chat-template",
        )
        return
    if template.unread:
        yield Diagnostic(
            "tokenizer_config.json has another chat template than chat_template.jinja or additional_chat_templates; "
            "the files are used, as in transformers",
            "remove the one that the model was not trained with",
            "warning",
            "chat-template",
        )
    try:
        text = template.render(_TURNS[:1])
    except InputError:
        return
    if broken := [mark for mark in dict.fromkeys(_MARKS.findall(text)) if len(tokenizer.encode(mark)) > 1]:
        yield Diagnostic(
            f"{' and '.join(broken)} of the chat template {'are' if len(broken) > 1 else 'is'} not a single token",
            "take tokenizer.json and tokenizer_config.json from the model as published",
            "warning",
            "chat-template",
        )


def is_instruct(directory: Path) -> bool:
    """Qwen's Instruct models sample by default, its base models do not."""
    return "instruct" in directory.resolve().name.lower() or bool(
        read_json(directory / GENERATION_CONFIG).get("do_sample")
    )
