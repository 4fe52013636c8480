"""Texts for calibration and evaluation, from a text or JSONL file or the bundled texts."""

from __future__ import annotations

import json
from pathlib import Path

from trtqwen.diagnostics import InputError
from trtqwen.hf.tokenizer import Tokenizer

CALIBRATION = Path(__file__).parent.parent / "demo" / "calibration.jsonl"
HELDOUT = Path(__file__).parent.parent / "demo" / "heldout.jsonl"


def read_texts(path: Path) -> list[str]:
    """The texts of a file: paragraphs of a text file, or the field `text` of each line of a `.jsonl` file.

    Raises:
        InputError: if the file is missing, empty, or not of its format.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as problem:
        raise InputError(f"{path}: cannot be read ({problem.strerror})", "name a text or JSONL file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8", "convert the file") from None
    if path.suffix == ".jsonl":
        texts = [_text_of(path, number, line) for number, line in enumerate(content.splitlines(), 1) if line.strip()]
    else:
        texts = content.split("\n\n")
    texts = [text.strip() for text in texts if text.strip()]
    if not texts:
        raise InputError(f"{path}: holds no text", "add texts to it")
    return texts


def tokenize(texts: list[str], tokenizer: Tokenizer, max_tokens: int, *, chat: bool = False) -> list[list[int]]:
    """Token ids of each text, at most `max_tokens`; rendered as a user's message by the chat template if asked.

    Raises:
        InputError: if `chat` is set and the model has no chat template.
    """
    if chat:
        if tokenizer.chat_template is None:
            raise InputError(f"{tokenizer.directory}: has no chat template", "leave chat_template off")
        template = tokenizer.chat_template
        texts = [template.render([{"role": "user", "content": text}]) for text in texts]
    encode = tokenizer.encode if chat else tokenizer.encode_prompt
    return [ids[:max_tokens] for text in texts if (ids := encode(text))]


def _text_of(path: Path, number: int, line: str) -> str:
    try:
        return str(json.loads(line)["text"])
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: line {number} is not a JSON object with a field 'text'", "fix the line") from None
