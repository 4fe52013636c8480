"""The `config.pbtxt` files of a model repository, and placeholders that upstream's fill_template did not fill."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from trtqwen.artifact.names import MODEL_CONFIG
from trtqwen.diagnostics import InputError

_PLACEHOLDER = re.compile(r"\$\{(\w+)\}")
_PARAMETER = re.compile(r'\bkey\s*:\s*"([^"]*)"')
_FIELD = re.compile(r"(\w+)\s*:[^:]*$")


@dataclass(frozen=True)
class Placeholder:
    """A `${name}` that was not filled.

    Attributes:
        line: counted from 1.
        key: the parameter or field it stands for.
        quoted: whether it is the whole value of a string; without quotes, the file cannot be parsed.
    """

    name: str
    line: int
    key: str
    quoted: bool


@dataclass(frozen=True)
class ModelFile:
    """One model of a repository.

    Attributes:
        config: None if the file cannot be parsed.
        error: why it cannot be parsed, with line and column.
    """

    name: str
    path: Path
    placeholders: tuple[Placeholder, ...]
    config: ModelConfig | None
    error: str = ""

    def parameter(self, key: str) -> str:
        """A string parameter; empty, as upstream's backends take it, where it is absent or not filled."""
        if self.config is None or key not in self.config.parameters:
            return ""
        value = str(self.config.parameters[key].string_value)
        return "" if value.startswith("${") else value

    def flag(self, key: str) -> bool | None:
        """A boolean parameter, as the C++ backend reads it; None where it is not set."""
        return {"true": True, "1": True, "false": False, "0": False}.get(self.parameter(key).lower())


def read_model_files(repository: Path) -> Mapping[str, ModelFile]:
    """Every model of a repository, by the name of its directory.

    Raises:
        InputError: if the directory holds no model.
    """
    paths = sorted(repository.glob(f"*/{MODEL_CONFIG}")) if repository.is_dir() else []
    if not paths:
        raise InputError(f"{repository}: holds no */{MODEL_CONFIG}", "name a Triton model repository")
    return {path.parent.name: _read(path) for path in paths}


def _read(path: Path) -> ModelFile:
    text = path.read_text(encoding="utf-8", errors="replace")
    placeholders = tuple(_placeholders(text))
    name = path.parent.name
    try:
        return ModelFile(name, path, placeholders, text_format.Parse(text, ModelConfig()))
    except text_format.ParseError as problem:
        message = str(problem).partition(" : ")[2] or str(problem)
        where = f"{problem.GetLine()}:{problem.GetColumn()}"
        return ModelFile(name, path, placeholders, None, f"line {where}: {message}")


def _placeholders(text: str) -> Iterator[Placeholder]:
    parameter = ""
    for number, line in enumerate(text.splitlines(), start=1):
        code = line.partition("#")[0]
        if named := _PARAMETER.search(code):
            parameter = named[1]
        for found in _PLACEHOLDER.finditer(code):
            before = code[: found.start()]
            name = _FIELD.search(before)
            field = name[1] if name else ""
            key = parameter if field == "string_value" else field
            yield Placeholder(found[1], number, key, quoted=before.count('"') % 2 == 1)
