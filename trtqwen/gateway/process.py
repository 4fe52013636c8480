"""Start the gateway in a process of its own, and stop it when its streams have ended."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from trtqwen.diagnostics import ServerError
from trtqwen.gateway.admission.auth import read_keys
from trtqwen.gateway.config import GatewayConfig
from trtqwen.gateway.fleet.peers import forget_told, told_in
from trtqwen.gateway.listener import bind
from trtqwen.system.guarded import Farewell, python_environment, start_guarded
from trtqwen.system.leftovers import workspace
from trtqwen.system.processes import Relay, Service, child, ending, kill_session, living, stopped

_REASON = "error: "  # begins the line that tells why it ended, which `check` passes on
_GRACE_SECONDS = 8  # beyond the gateway's own time to drain
_SIGNAL_SECONDS = 0.2
_LISTEN_SECONDS = 60.0
_LOOK_SECONDS = 1.0  # between two looks at whether it is stopped, which read the states of all processes
# A long prompt takes much memory for a moment. Few arenas, and large blocks of their own, give it back afterwards.
_ALLOCATOR = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}


class GatewayProcess(Service):
    """A running gateway; use as a context manager or call `start` and `stop`. It ends with this process.

    Its log goes to this process's standard error.

    Args:
        frozen_seconds: how long it may be stopped (SIGSTOP) before that counts as its end; 0 is forever.
        engine_seconds: how long the engine may take for its first token, counted from the gateway's start. The
            gateway itself has a minute until it listens.

    Attributes:
        config: its port is the one in use.

    Raises:
        InputError: if its address cannot be listened on or its keys file not be used.
    """

    name = "the gateway"
    start_seconds = _LISTEN_SECONDS

    def __init__(
        self, config: GatewayConfig, *, frozen_seconds: float = 0, engine_seconds: float = Service.start_seconds
    ) -> None:
        read_keys(config.api_keys)  # report a mistake in a file now, not when the engine is loaded
        read_keys(config.admin_keys)
        self._listener = bind(config)
        update: dict[str, object] = {"port": self._listener.getsockname()[1]}
        for name in ("repository", "models", "api_keys", "admin_keys"):  # it runs in another directory
            path: Path | None = getattr(config, name)
            update[name] = path and path.absolute()
        self.config = config.model_copy(update=update)
        self.stop_seconds = config.drain_seconds
        self._frozen_seconds, self._engine_seconds = frozen_seconds, engine_seconds
        self._cleanup = ExitStack()
        self._frozen_since: float | None = None
        self._next_look = 0.0
        self._process: subprocess.Popen[str] | None = None
        self._relay: Relay | None = None

    @property
    def url(self) -> str:
        return self.config.url

    @property
    def pid(self) -> int:
        """Process id of the gateway itself, not of its guardian."""
        return child(self._running.pid)

    def start(self) -> None:
        """Start the process; `wait_until_ready` tells when it serves."""
        if self._listener.fileno() < 0:  # it was started before
            self._listener = bind(self.config)
        forget_told(self._state_file().parent)  # by processes that were killed
        self._frozen_since = None
        self.start_seconds = _LISTEN_SECONDS
        descriptor = self._listener.fileno()
        self._process = start_guarded(
            [sys.executable, "-m", "trtqwen.gateway", self.config.model_dump_json(), str(descriptor)],
            python_environment() | _ALLOCATOR,
            Path("/"),  # Python looks for modules in the working directory
            output=subprocess.PIPE,
            pass_fds=(descriptor,),
            # The first asks it to finish what runs, the second to end that with an error.
            farewell=Farewell(((signal.SIGTERM, 0.2), (signal.SIGTERM, _GRACE_SECONDS)), self._places),
        )
        self._listener.close()
        assert self._process.stdout is not None
        self._relay = Relay(self._process.stdout, keep_back=_REASON)

    def late(self) -> ServerError:
        return ServerError(f"{super().late().what}: {self._last_line()}")

    def check(self) -> None:
        """Raise a ServerError if the gateway has ended by itself, or was stopped (SIGSTOP) for `frozen_seconds`."""
        code = self._running.poll()
        if code is not None:
            raise ServerError(f"the gateway {ending(code)}: {self._last_line()}")
        now = time.monotonic()
        if not self._frozen_seconds or now < self._next_look:
            return
        self._next_look = now + _LOOK_SECONDS
        if not any(stopped(pid) for pid in living(self._running.pid)):
            self._frozen_since = None
        elif self._frozen_since is None:
            self._frozen_since = now
        elif now - self._frozen_since > self._frozen_seconds:
            raise ServerError(f"the gateway has been stopped (SIGSTOP) for {now - self._frozen_since:.0f} s")

    def stop(self, *, drain: bool = True) -> int:
        """Let running requests finish and end the process; returns its exit code. May be called again."""
        self._listener.close()
        process = self._process
        if process is None:
            return 0
        seconds = self.config.drain_seconds if drain else 0
        process.terminate()
        if not drain:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_SIGNAL_SECONDS)  # two signals that come together are one
            process.terminate()
        try:
            process.wait(seconds + _GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            kill_session(process.pid)
        if process.stdin is not None:
            process.stdin.close()
        if self._relay is not None:
            self._relay.join()
        return process.wait()

    def close(self) -> None:
        """Remove its files, which it keeps between two starts."""
        self._cleanup.close()

    def tell(self, state: Mapping[str, object]) -> None:
        """Set the supervisor's state for `/ready` and the metrics."""
        path = self._state_file()
        with suppress(OSError):  # a full disk must not end a server
            partial = path.with_suffix(".new")
            partial.write_text(json.dumps(state), encoding="utf-8")
            partial.replace(path)

    def told(self) -> list[dict[str, Any]]:
        """Return the gateway processes' state of their models."""
        return told_in(self._state_file().parent)

    def _state_file(self) -> Path:
        """The supervisor's file, in a directory that lasts over restarts."""
        if self.config.supervisor is None:
            state = self._cleanup.enter_context(workspace()) / "supervisor.json"
            self.config = self.config.model_copy(update={"supervisor": state})
            return state
        return self.config.supervisor

    @property
    def _places(self) -> tuple[Path, ...]:
        return (self.config.supervisor.parent,) if self.config.supervisor is not None else ()

    def kill(self) -> None:
        if (process := self._process) is not None:
            kill_session(process.pid)

    @property
    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            raise ServerError("the gateway is not running", "call start() first")
        return self._process

    def answers(self) -> bool:
        """Whether the engine answers through the gateway."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=2)
        try:
            connection.request("GET", "/ready")
            status = connection.getresponse().status
            self.start_seconds = max(self._engine_seconds, _LISTEN_SECONDS)  # it listens: the engine may be slow
            return status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _last_line(self) -> str:
        if self._relay is None:
            return "it was not started"
        self._relay.join(0 if self._running.poll() is None else 1)
        return self._relay.last_lines[-1].removeprefix(_REASON) if self._relay.last_lines else "it said nothing"
