"""The ids that end a model's answers, as its files name them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trtqwen.artifact.names import CONFIG
from trtqwen.diagnostics import SourceError
from trtqwen.hf.files import read_json, shown

GENERATION_CONFIG = "generation_config.json"


def named_end_ids(directory: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The end ids that generation_config.json and config.json name, by file.

    Raises:
        SourceError: if one is not a token id.
    """
    for name in (GENERATION_CONFIG, CONFIG):
        path = directory / name
        yield name, token_ids(read_json(path).get("eos_token_id"), "eos_token_id", path)


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
