"""The log of a tritonserver: why it ended or does not start, and the progress of its shutdown."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from pathlib import Path

from trtqwen.diagnostics import ServerError
from trtqwen.engine.explain import explain

# Triton's python backend sometimes aborts while several models start (triton-inference-server/server 8882).
_START_FAULT = "boost::interprocess::lock_exception"
_UNLOADING = "live models and 0 in-flight non-inference requests"  # logged when no request is left
# An error that trtqwen itself raised in a model; its text is `what; hint`.
_OWN_ERROR = re.compile(r"failed to load '(\w+)' version \d+: Internal: (?:Input|Engine)Error: (.+?)(?:\\n|\n)")
_HARMLESS = ("CudaDriverHelper", "CUDA driver version is insufficient")  # logged as errors on hosts without a GPU
_KILLED = "the log has no error; was it killed, for its memory perhaps?"
_CRASHED = "the log has no error; it crashed"
_NO_ERROR = {-signal.SIGKILL: _KILLED, -signal.SIGTERM: "the log has no error; another process ended it"}
GONE = "the log has no error; it crashed or was killed"
# Triton writes the stack of its crash itself, the signal's handler first: ` 3# function in library`.
_FRAME = re.compile(r"^ *[1-9]\d*# (?:0x[0-9A-F]+|(?P<function>.+)) in (?P<library>\S+)$", re.MULTILINE)
_SYSTEM = ("libc.", "libpthread.", "libstdc++.")


def without_error(code: int) -> str | None:
    """Return the message for an exit code without an error in the log; None uses the log's last line."""
    return _NO_ERROR.get(code, _CRASHED) if code < 0 else None


@dataclass(frozen=True)
class ServerLog:
    """The log of one tritonserver.

    Attributes:
        text: what it has logged since it was last started.
        advice: where the user finds the whole log.
    """

    text: str
    advice: str

    @property
    def start_fault(self) -> bool:
        """Return whether Triton crashed by a known bug during its start."""
        return _START_FAULT in self.text

    @property
    def unloading(self) -> bool:
        """Return whether a stopping Triton has no request left and unloads its models."""
        return _UNLOADING in self.text

    @property
    def own_error(self) -> tuple[str, str] | None:
        """Return why a model of trtqwen did not load, and the hint; None for an error of Triton's."""
        if (found := _OWN_ERROR.search(self.text)) is None:
            return None
        what, _, hint = found[2].partition("; ")
        return f"the model {found[1]} does not load: {what}", f"{hint or 'see the log'} ({self.advice})"

    @property
    def crashed_in(self) -> str | None:
        """Return the innermost named function of Triton's in the stack of its crash, else its library."""
        frames = [(frame["function"], Path(frame["library"]).name) for frame in _FRAME.finditer(self.text)]
        own = [(function, library) for function, library in frames if not library.startswith(_SYSTEM)]
        named = [function.partition("(")[0] for function, _ in own if function]
        return next(iter([*named, *(library for _, library in own)]), None)

    def error(self, event: str, without_error: str | None = None) -> ServerError:
        """Return the error for an event, with the log's most relevant line, where the rest is, and a known cause.

        Args:
            without_error: stands in where the log has no error; None takes its last line.
        """
        lines = [line for line in self.text.splitlines() if line.strip()]
        errors = [
            line.partition("] ")[2]
            for line in lines
            if line.startswith("E") and "] " in line and not any(text in line for text in _HARMLESS)
        ]
        loading = [line for line in errors if line.lstrip('"').startswith("failed to load")]
        if without_error == _CRASHED and self.crashed_in:
            without_error += f" in {self.crashed_in}"
        others = lines if without_error is None else [without_error]
        [telling] = loading[:1] or errors[-1:] or others[-1:] or ["its log is empty"]
        message = telling.strip().strip('"').partition(r"\n\nAt:")[0]  # without the python backend's traceback
        known = explain(line for line in lines if not any(text in line for text in _HARMLESS)).first
        what = f"{event}: {message} ({self.advice})"
        if known is None or known.role != "cause":
            return ServerError(what)
        return ServerError(f"{what}; the cause: {known.cause}", known.hint)
