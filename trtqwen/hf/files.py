"""JSON files of a model directory. Duplicate keys, Git LFS pointers and web pages are errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trtqwen.diagnostics import SourceError

GENERATION_CONFIG = "generation_config.json"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_SHOWN = 60  # characters of a value in a message


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no such file.

    Raises:
        SourceError: if the file is not a JSON object, or gives one key two values.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as problem:
        raise SourceError(
            f"{path}: cannot be read ({problem.strerror})", "check the path and its permissions"
        ) from None
    check_downloaded(path, content)
    try:
        data = json.loads(content.decode("utf-8-sig"), object_pairs_hook=lambda pairs: _unique(path, pairs))
    except ValueError as problem:
        raise SourceError(f"{path}: is not JSON ({problem})", "correct the file, or download it again") from None
    if not isinstance(data, dict):
        raise SourceError(f"{path}: is not a JSON object", "download the file again")
    return data


def check_downloaded(path: Path, beginning: bytes) -> None:
    """Refuse a file that is only a placeholder.

    Args:
        beginning: at least the first 100 bytes of the file.

    Raises:
        SourceError: if it is a Git LFS pointer, a web page or empty.
    """
    if beginning.startswith(LFS_POINTER):
        raise SourceError(
            f"{path}: is a Git LFS pointer, not the file itself", "run `git lfs pull` in the model's repository"
        )
    if not beginning:
        raise SourceError(f"{path}: is empty", "download the file again")
    if (
        beginning.lstrip()[:14].lower() in (b"<!doctype html", b"<html><head><t")
        or beginning.lstrip()[:5] == b"<html"
    ):
        raise SourceError(
            f"{path}: is a web page, not the file itself",
            "download the file again with `hf download`; a gated model needs a token",
        )


def shown(value: Any) -> str:
    """A JSON value, cut short, for a message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def token_ids(value: Any, key: str, path: Path) -> tuple[int, ...]:
    """Token ids that a file lists, or the one that it names; nulls, alone or in a list, count as absent.

    Raises:
        SourceError: if one is not a token id.
    """
    listed = value if isinstance(value, list) else [value]
    ids = [item for item in listed if item is not None]
    for item in ids:
        if isinstance(item, bool) or not isinstance(item, int) or item < 0:
            raise SourceError(f"{path}: {key} holds {shown(item)}, not a token id", "write the token's id, a number")
    return tuple(dict.fromkeys(ids))


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result and result[key] != value:
            raise SourceError(
                f"{path}: gives {key!r} twice, {shown(result[key])} and {shown(value)}; transformers takes the last",
                "remove one of the two",
            )
        result[key] = value
    return result
