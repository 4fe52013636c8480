"""The one error hierarchy: every message says what is wrong, where, and what to do about it."""

from __future__ import annotations


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


class RequestError(TrtQwenError):
    """One inference request cannot be served; the engine goes on with the others."""


class ServerError(TrtQwenError):
    """Triton did not start, died, or refused a request."""


class PortInUseError(ServerError):
    """A port that the server needs is taken."""

    exit_code = 2
