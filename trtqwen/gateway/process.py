"""Starts the gateway as a process of its own, and stops it when its streams have ended."""

from __future__ import annotations

import http.client
import subprocess
import sys

from trtqwen.diagnostics import ServerError
from trtqwen.gateway.admission.auth import read_keys
from trtqwen.gateway.config import GatewayConfig
from trtqwen.gateway.listener import bind
from trtqwen.system.processes import Relay, Service

_REASON = "error: "  # begins the line that tells why it ended, which `check` passes on
_GRACE_SECONDS = 10  # beyond the gateway's own time to drain


class GatewayProcess(Service):
    """A running gateway; use as a context manager or call `start` and `stop`. It ends with this process.

    What it logs comes out at this process's standard error.

    Attributes:
        config: its port is the one in use.

    Raises:
        InputError: if its address cannot be listened on or its keys file not be used.
    """

    def __init__(self, config: GatewayConfig) -> None:
        read_keys(config.api_keys)  # a mistake in the file is told now, not when the engine is loaded
        self._listener = bind(config)
        self.config = config.model_copy(update={"port": self._listener.getsockname()[1]})
        self._process: subprocess.Popen[str] | None = None
        self._relay: Relay | None = None

    @property
    def url(self) -> str:
        return self.config.url

    @property
    def pid(self) -> int:
        return self._running.pid

    def start(self) -> None:
        """Start the process; `wait_until_ready` tells when it serves."""
        descriptor = self._listener.fileno()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "trtqwen.gateway", self.config.model_dump_json(), str(descriptor)],
            stdin=subprocess.PIPE,  # its end is the end of this process
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=(descriptor,),
            start_new_session=True,  # Ctrl-C in the terminal is for us alone
        )
        self._listener.close()
        assert self._process.stdout is not None
        self._relay = Relay(self._process.stdout, keep_back=_REASON)

    def wait_until_ready(self, timeout: float = 60, behind: Service | None = None) -> None:
        """Return when the engine answers through the gateway; at once with an error when the gateway ends instead.

        Args:
            timeout: seconds.
            behind: the server that it asks; its end is an error too.

        Raises:
            ServerError: with the last line that the gateway wrote.
        """
        self._wait(
            self._answers,
            timeout,
            lambda: f"the gateway was not ready within {timeout:g} s: {self._last_line()}",
            behind,
        )

    def check(self) -> None:
        """Raise a ServerError if the gateway has ended by itself."""
        code = self._running.poll()
        if code is not None:
            raise ServerError(f"the gateway ended with code {code}: {self._last_line()}")

    def stop(self) -> int:
        """Let running requests finish and end the process; returns its exit code. May be called again."""
        self._listener.close()
        process = self._process
        if process is None:
            return 0
        process.terminate()
        try:
            process.wait(self.config.drain_seconds + _GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
        if process.stdin is not None:
            process.stdin.close()
        if self._relay is not None:
            self._relay.join()
        return process.wait()

    @property
    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            raise ServerError("the gateway is not running", "call start() first")
        return self._process

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=2)
        try:
            connection.request("GET", "/ready")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _last_line(self) -> str:
        if self._relay is None:
            return "it was not started"
        self._relay.join(0 if self._running.poll() is None else 1)
        return self._relay.last_lines[-1].removeprefix(_REASON) if self._relay.last_lines else "it said nothing"
