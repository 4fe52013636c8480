"""The gateway's process: `python -m trtqwen.gateway CONFIG [DESCRIPTOR]`, CONFIG a `GatewayConfig` as JSON.

`trtqwen serve` starts it with the file descriptor of a bound socket, under a guardian that stops it when
`serve` ends.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

from pydantic import ValidationError

from trtqwen.diagnostics import TrtQwenError
from trtqwen.gateway.config import GatewayConfig
from trtqwen.gateway.server import serve


def main() -> int:
    """Serve; returns the exit code."""
    try:
        config = GatewayConfig.model_validate_json(sys.argv[1])
    except (IndexError, ValidationError) as problem:
        print(f"error: the gateway's configuration cannot be used: {problem}", file=sys.stderr)
        return 2
    # While the server runs it has a handler of its own; before and after, nothing is left to finish.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    listener = None
    if len(sys.argv) > 2:
        listener = socket.socket(fileno=int(sys.argv[2]))
    try:
        serve(config, listener)
    except TrtQwenError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    # Without the interpreter's own end, during which a second SIGTERM would count as a death by signal.
    os._exit(code)
