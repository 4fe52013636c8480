"""The gateway's process: `python -m trtqwen.gateway CONFIG [DESCRIPTOR]`, CONFIG a `GatewayConfig` as JSON.

With several workers, this process is the first one. It starts each worker with two further descriptors: its sockets
to the broker.

`trtqwen serve` starts it with the file descriptor of a bound socket, under a guardian that stops it when `serve`
ends.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

from pydantic import ValidationError

from trtqwen.diagnostics import TrtQwenError
from trtqwen.gateway.config import GatewayConfig
from trtqwen.gateway.listener import bind


def main() -> int:
    """Serve; returns the exit code."""
    try:
        config = GatewayConfig.model_validate_json(sys.argv[1])
    except (IndexError, ValidationError) as problem:
        print(f"error: the gateway's configuration cannot be used: {problem}", file=sys.stderr)
        return 2
    # While the server runs it has a handler of its own; before and after, nothing is left to finish.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.signal(signal.SIGHUP, lambda *_: None)  # a changed keys file is read again by itself
    listener = None
    if len(sys.argv) > 2:
        listener = socket.socket(fileno=int(sys.argv[2]))
    worker = len(sys.argv) > 4
    try:
        if worker:
            _serve_as_worker(config, listener)
        elif config.num_workers > 1:
            # Metrics are shared by what is set before they are imported.
            from trtqwen.gateway.workers import run_workers

            run_workers(config, listener or bind(config), config.num_workers)
        else:
            from trtqwen.gateway.server import serve

            serve(config, listener)
    except TrtQwenError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    return 0


def _serve_as_worker(config: GatewayConfig, listener: socket.socket | None) -> None:
    from trtqwen.gateway.admission.shared import Link
    from trtqwen.gateway.server import serve

    calls, news = (socket.socket(fileno=int(descriptor)) for descriptor in sys.argv[3:5])
    serve(config, listener, link=Link(calls, news))


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    # Without the interpreter's own end, during which a second SIGTERM would count as a death by signal.
    os._exit(code)
