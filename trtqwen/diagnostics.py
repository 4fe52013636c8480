"""Diagnostics, and the hierarchy of errors.

A diagnostic has two texts: `what` says what is wrong and where, and `hint` says what to do about it. Only the hint
gives advice, and it names only options, fields and commands that exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pydantic import ValidationError

_LONGEST_VALUE = 60  # characters of a value in a message


Level = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Diagnostic:
    """One thing to report.

    Attributes:
        what: what is wrong and where, without advice.
        hint: what to do about it; empty if there is nothing to do.
        level: `error` stops the command, `warning` does not, `note` is information.
        code: a short, stable name, for example `D12` or `kv-cache`; empty for errors of a single place.
    """

    what: str
    hint: str = ""
    level: Level = "error"
    code: str = ""

    def __str__(self) -> str:
        return f"{self.what}; {self.hint}" if self.hint else self.what

    def as_json(self) -> dict[str, str]:
        """The fields of the diagnostic, as `--json` prints them."""
        return {"level": self.level, "code": self.code, "what": self.what, "hint": self.hint}


class TrtQwenError(Exception):
    """Base of all errors that trtqwen raises on purpose.

    Args:
        what: what is wrong and where.
        hint: what to do about it.

    Attributes:
        exit_code: exit status of the command: 2 for bad usage or bad input, 1 for a failure at run time.
    """

    exit_code = 1

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what, hint)
        self.what = what
        self.hint = hint

    @property
    def diagnostic(self) -> Diagnostic:
        return Diagnostic(self.what, self.hint)

    def __str__(self) -> str:
        return str(self.diagnostic)


class InputError(TrtQwenError):
    """An input of the caller cannot be used."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe file has an unknown key or a value out of range."""


class SourceError(InputError):
    """A Hugging Face model directory is incomplete, damaged or of another architecture."""


class CheckpointError(InputError):
    """A TensorRT-LLM checkpoint directory is incomplete, damaged or cannot be written as asked."""


class OutputError(InputError):
    """An output directory cannot be written: it exists, or its parent cannot be used."""


class EngineError(TrtQwenError):
    """An engine cannot be built or run."""


class ContainerError(TrtQwenError):
    """A container cannot be started."""


class RequestError(TrtQwenError):
    """One inference request cannot be served; the engine continues with the others."""


class ServerError(TrtQwenError):
    """Triton did not start, exited, or refused a request."""


class PortInUseError(ServerError):
    """A port that the server needs is taken."""

    exit_code = 2


class SettingError(ValueError):
    """A setting in a pydantic model has a wrong value. pydantic collects it; `first_hint` reads its hint.

    Args:
        what: what is wrong.
        hint: what to do about it.
    """

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what)
        self.hint = hint


def why_unreadable(problem: OSError | UnicodeDecodeError) -> str:
    """Return why a text file cannot be read, for the middle of a sentence."""
    return "it is not UTF-8 text" if isinstance(problem, UnicodeDecodeError) else problem.strerror or str(problem)


def first_hint(problem: ValidationError) -> str:
    """Return the hint of pydantic's first error; empty if it has none."""
    error = problem.errors()[0].get("ctx", {}).get("error")
    return error.hint if isinstance(error, SettingError) else ""


def first_problem(problem: ValidationError) -> str:
    """Return pydantic's first error as a part of a sentence, with field and value."""
    first = problem.errors()[0]
    field = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return f"field {field!r} is unknown"
    if first["type"] == "missing":
        return f"field {field!r} is missing"
    if not field or first["type"] == "value_error":
        return f"{field + ': ' if field else ''}{message}"
    given = repr(first["input"])
    if len(given) > _LONGEST_VALUE:
        given = f"{given[:_LONGEST_VALUE]}..."
    return f"field {field!r}: {message[0].lower()}{message[1:]} (got {given})"
