"""The one error hierarchy: every message says what is wrong, where, and what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

_LONGEST_VALUE = 60  # characters of a value in a message


class TrtQwenError(Exception):
    """Base of all errors that trtqwen raises on purpose.

    Attributes:
        exit_code: what the command line returns: 2 for bad usage or bad input, 1 for a failure on the way.
    """

    exit_code = 1


class InputError(TrtQwenError):
    """What the caller handed in cannot be used as it is."""

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
    """One inference request cannot be served; the engine goes on with the others."""


class ServerError(TrtQwenError):
    """Triton did not start, died, or refused a request."""


class PortInUseError(ServerError):
    """A port that the server needs is taken."""

    exit_code = 2


def first_problem(problem: ValidationError) -> str:
    """The first of what pydantic found, as a part of a sentence that names field and value."""
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
